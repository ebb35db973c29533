"""Numbers: the program against transformers' fixtures (make_fixtures.py says what they hold), and against itself.

Most comparisons are of bytes: the same tokens give the same bits whatever the chunks, the threads, the instruction set or a detour
through a saved state."""
import io
import os
import shutil
import subprocess

import numpy as np
import pytest

import reference
from conftest import PROGRAM, ROOT

FIXTURES = ROOT / "tests" / "fixtures"
FLOAT_FILES = ["mamba_tied.f32", "mamba_tied.f16", "mamba_tied.bf16", "mamba_untied.f32", "mamba_falcon.f32", "mamba_awkward.f32"]
Q8_FILES = ["mamba_tied.q8_0", "mamba_awkward.q8_0"]
ALL_FILES = FLOAT_FILES + Q8_FILES
TOLERANCE = 1e-4  # of a log-probability in nats, for float weights


def model_path(name):
    return FIXTURES / f"{name}.bin"


def numbers(name):
    return np.load(FIXTURES / f"{name}.npz")


def text(ids):
    """Ids as --ids takes them."""
    return " ".join(str(int(i)) for i in ids)


def parse_ids(stdout):
    return [int(word) for word in stdout.split()]


def score_logits(mamba, path, ids, tmp_path, *options, **keywords):
    """The bytes of the .npy that score --logits writes."""
    out = tmp_path / "logits.npy"
    mamba("score", path, "--ids", text(ids), "--logits", out, *options, **keywords)
    data = out.read_bytes()
    out.unlink()
    return data


def npy(data):
    return np.load(io.BytesIO(data))


def table(stdout):
    """A TSV with a header line as a list of dicts."""
    header, *lines = stdout.decode().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def generate_ids(mamba, path, n, *options, **keywords):
    return parse_ids(mamba("generate", path, "--print-ids", "-n", str(n), *options, **keywords).stdout)


def refuses_state(mamba, path, state):
    """Going on from this state ends with status 1, one line that names the state file, and nothing on standard output."""
    done = mamba("generate", path, "--print-ids", "-n", "3", "--load-state", state, check=False)
    message = done.stderr.decode()
    assert done.returncode == 1, message
    assert message.startswith(f"mamba: {state}: ") and message.count("\n") == 1, message
    assert done.stdout == b""
    return message


def close_hidden(found, expected):
    """Residual streams have no scale of their own: the tolerance is relative to the largest element."""
    return np.all(np.abs(found - expected) <= 2e-5 * max(1.0, np.abs(expected).max()))


# ---- against transformers ----

@pytest.mark.parametrize("name", ALL_FILES)
def test_fixture_agrees_with_the_second_definition(name):
    """transformers and tests/reference.py were written apart: an error in making the fixtures shows here, without the program."""
    expected, model = numbers(name), reference.Mamba(model_path(name))
    if name in Q8_FILES:  # transformers ran on the decoded weights, with activations left as they are
        model.tensors = {key: (values, "F32") for key, (values, kind) in model.tensors.items()}
    hidden, logits = model.forward(expected["ids"])
    logprobs = reference.log_softmax(logits)[np.arange(len(expected["ids"]) - 1), expected["ids"][1:]]
    assert np.all(np.abs(logprobs - expected["logprobs"]) <= TOLERANCE)
    assert np.all(np.abs(logits[expected["rows"]] - expected["logits"]) <= TOLERANCE)
    assert close_hidden(np.stack(hidden)[:, expected["rows"]], expected["hidden"])
    assert logits.std() > 1.0, "the fixture's logits are too even to tell a right model from a wrong one"


@pytest.mark.parametrize("name", FLOAT_FILES)
def test_logits(mamba, tmp_path, name):
    expected = numbers(name)
    logits = npy(score_logits(mamba, model_path(name), expected["ids"], tmp_path))
    assert logits.dtype == np.float32 and logits.shape == (len(expected["ids"]), expected["logits"].shape[1])
    difference = reference.log_softmax(logits[expected["rows"]]) - reference.log_softmax(expected["logits"])
    assert np.all(np.abs(difference) <= TOLERANCE)
    logprobs = reference.log_softmax(logits)[np.arange(len(logits) - 1), expected["ids"][1:]]
    assert np.all(np.abs(logprobs - expected["logprobs"]) <= TOLERANCE)


@pytest.mark.parametrize("name", Q8_FILES)
def test_logits_q8_0(mamba, tmp_path, name):
    """Products with Q8_0 weights round their activations to 8 bits as well.

    Against reference.py, which rounds in the same places, what is left is rounding of ties: an activation that lands on the other
    side of a half moves by 1/127 of its block's largest. Against transformers, which does not round, each product carries a relative
    error of about (1/127) / sqrt(12) * (largest / rms = 2.5 to 4 in a block of 32) = 0.6 to 0.9 % rms. The path of a logit crosses about
    ten products, which add up as sqrt(10) to 3 %, and the scan's exponentials spread it: 5 % was measured. The bounds are 1 % and 10 % of
    the logits' standard deviation, root mean square; a wrong scale or order gives 100 %."""
    expected = numbers(name)
    logits = npy(score_logits(mamba, model_path(name), expected["ids"], tmp_path))
    _, rounded = reference.Mamba(model_path(name)).forward(expected["ids"])
    rms = lambda x: np.sqrt((x * x).mean()) / expected["logits"].std()
    assert rms(logits - rounded) <= 0.01
    assert rms(logits[expected["rows"]] - expected["logits"]) <= 0.10


@pytest.mark.parametrize("name", ALL_FILES)
def test_score_tables(mamba, tmp_path, name):
    """--per-token and the table of sums say what the logits say."""
    expected = numbers(name)
    ids = expected["ids"]
    logits = npy(score_logits(mamba, model_path(name), ids, tmp_path))
    logprobs = reference.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    rows = table(mamba("score", model_path(name), "--ids", text(ids), "--per-token").stdout)
    assert list(rows[0]) == ["id", "pos", "token_id", "token", "logprob"]
    assert [int(row["token_id"]) for row in rows] == ids[1:].tolist()
    assert [int(row["pos"]) for row in rows] == list(range(1, len(ids)))
    assert np.all(np.abs(np.array([float(row["logprob"]) for row in rows]) - logprobs) <= 1e-5)

    (row,) = table(mamba("score", model_path(name), "--ids", text(ids)).stdout)
    nll, tokens = -logprobs.sum(), len(ids) - 1
    assert int(row["tokens"]) == tokens
    assert abs(float(row["nll"]) - nll) <= 1e-5 * nll
    assert abs(float(row["bits_per_token"]) - nll / tokens / np.log(2)) <= 1e-4
    assert abs(float(row["perplexity"]) / np.exp(nll / tokens) - 1) <= 1e-4


@pytest.mark.parametrize("name", FLOAT_FILES)
@pytest.mark.parametrize("length", [1, 2, 12])
def test_greedy_text(mamba, name, length):
    """Prompts of one and two tokens are shorter than the convolution's history."""
    expected = numbers(name)
    wanted = expected[f"greedy_{length}"].tolist()
    prompt = text(expected["ids"][:length])
    assert generate_ids(mamba, model_path(name), len(wanted), "--greedy", "--ids", prompt) == wanted


@pytest.mark.parametrize("name", FLOAT_FILES)
def test_embed(mamba, tmp_path, name):
    """--layer N is the residual stream after N blocks, from 0, the embeddings, to n_layer; without it: after the final norm."""
    expected = numbers(name)
    ids, n_layer = text(expected["ids"]), len(expected["hidden"]) - 2
    for index in range(n_layer + 2):
        layer = ["--layer", str(index)] if index <= n_layer else []
        embed = lambda pool: npy(mamba("embed", model_path(name), "--ids", ids, "--pool", pool, *layer).stdout)
        rows, last, mean = embed("none"), embed("last"), embed("mean")
        assert rows.dtype == np.float32 and rows.shape == (len(expected["ids"]), expected["hidden"].shape[2])
        assert close_hidden(rows[expected["rows"]], expected["hidden"][index])
        assert np.array_equal(last.reshape(-1), rows[-1])
        assert close_hidden(mean.reshape(-1), expected["hidden_mean"][index])
    to_file = tmp_path / "embedding.npy"
    assert mamba("embed", model_path(name), "--ids", ids, "-o", to_file).stdout == b""
    assert to_file.read_bytes() == mamba("embed", model_path(name), "--ids", ids).stdout


def test_embed_layer_out_of_range(mamba):
    expected = numbers("mamba_tied.f32")
    done = mamba("embed", model_path("mamba_tied.f32"), "--ids", "1 2 3", "--layer", str(len(expected["hidden"]) - 1), check=False)
    assert done.returncode in (1, 2) and done.stdout == b"" and done.stderr.count(b"\n") == 1


# ---- the same bits ----

@pytest.mark.parametrize("name", ALL_FILES)
def test_chunks(mamba, tmp_path, name):
    """Token by token, in chunks and whole: equal bytes. The sizes sit on both sides of every tile and block of the kernels."""
    path, ids = model_path(name), numbers(name)["ids"]
    whole = score_logits(mamba, path, ids, tmp_path)
    assert np.isfinite(npy(whole)).all()
    for size in (1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129):
        assert score_logits(mamba, path, ids, tmp_path, "-ub", str(size)) == whole, f"-ub {size}"


@pytest.mark.parametrize("name", ["mamba_tied.f32", "mamba_falcon.f32", "mamba_awkward.q8_0"])
def test_prefix_of_any_length(mamba, tmp_path, name):
    """Row t depends on tokens 0 to t alone: a shorter text gives the first rows of a longer one. One token is a text, too."""
    path, ids = model_path(name), numbers(name)["ids"]
    whole = npy(score_logits(mamba, path, ids, tmp_path))
    for length in (1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129):
        assert npy(score_logits(mamba, path, ids[:length], tmp_path)).tobytes() == whole[:length].tobytes(), f"{length} tokens"


@pytest.mark.parametrize("name", ALL_FILES)
def test_threads(mamba, tmp_path, name):
    path, ids = model_path(name), numbers(name)["ids"]
    one = score_logits(mamba, path, ids, tmp_path, "-t", "1")
    for threads in ("2", "3"):
        assert score_logits(mamba, path, ids, tmp_path, "-t", threads) == one, f"-t {threads}"
        assert score_logits(mamba, path, ids, tmp_path, "-t", threads, "-ub", "7") == one, f"-t {threads} -ub 7"


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx512bw", "avxvnni", "avx2", "generic"])
@pytest.mark.parametrize("name", ALL_FILES)
def test_instruction_sets(mamba, tmp_path, name, isa):
    path, ids = model_path(name), numbers(name)["ids"]
    probe = mamba("score", path, "--ids", "1 2", check=False, env={"MAMBA_ISA": isa})
    if isa != "generic" and probe.returncode == 1 and b"MAMBA_ISA" in probe.stderr:
        pytest.skip(probe.stderr.decode().strip())
    whole = score_logits(mamba, path, ids, tmp_path)
    for size in ("512", "5", "1"):
        assert score_logits(mamba, path, ids, tmp_path, "-ub", size, env={"MAMBA_ISA": isa}) == whole, f"-ub {size}"


def test_unknown_instruction_set(mamba):
    done = mamba("score", model_path("mamba_tied.f32"), "--ids", "1 2", check=False, env={"MAMBA_ISA": "mmx"})
    assert done.returncode in (1, 2) and done.stdout == b"" and b"mmx" in done.stderr and done.stderr.count(b"\n") == 1


def test_generated_tokens_are_scored_the_same(mamba, tmp_path):
    """Decode against prefill: each greedy token is the best of the row that score gives for the text so far."""
    for name in ALL_FILES:
        path, prompt = model_path(name), numbers(name)["ids"][:12].tolist()
        made = generate_ids(mamba, path, 40, "--greedy", "--ids", text(prompt))
        logits = npy(score_logits(mamba, path, prompt + made, tmp_path))
        assert logits[len(prompt) - 1:-1].argmax(axis=1).tolist() == made, name


# ---- state ----

SAMPLING = {"greedy": ["--greedy"], "sampled": ["--temp", "0.8", "-s", "11"],
            "penalised": ["--temp", "0.8", "-s", "11", "--repeat-penalty", "1.3", "--repeat-last-n", "16"]}


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_save_and_load(mamba, tmp_path, name, sampling):
    """20 tokens, a saved state and 20 more are the 40 of an uninterrupted run, also when the two halves differ in chunks and threads."""
    path, prompt, state = model_path(name), text(numbers(name)["ids"][:37]), tmp_path / "state"
    whole = generate_ids(mamba, path, 40, *SAMPLING[sampling], "--ids", prompt)
    assert len(whole) == 40 and len(set(whole)) > 5
    first = generate_ids(mamba, path, 20, *SAMPLING[sampling], "--ids", prompt, "--save-state", state, "-ub", "5", "-t", "1")
    second = generate_ids(mamba, path, 20, *SAMPLING[sampling], "--load-state", state, "-t", "2")
    assert first + second == whole
    assert os.listdir(tmp_path) == ["state"], "a temporary file was left behind"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 36])
def test_save_after_the_prompt(mamba, tmp_path, length):
    """-n 0 reads a prompt and saves; what follows may be more prompt. A first part shorter than the convolution's history as well."""
    for name in ("mamba_falcon.f32", "mamba_awkward.f32", "mamba_tied.q8_0"):
        path, ids, state = model_path(name), numbers(name)["ids"][:60], tmp_path / "state"
        sampled = ["--temp", "0.8", "-s", "3"]
        whole = generate_ids(mamba, path, 24, *sampled, "--ids", text(ids))
        assert generate_ids(mamba, path, 0, "--ids", text(ids[:length]), "--save-state", state) == []
        assert generate_ids(mamba, path, 24, *sampled, "--load-state", state, "--ids", text(ids[length:])) == whole, name


def test_state_saved_again(mamba, tmp_path):
    """Loading and saving in one go, the same file for both, many times over."""
    path, prompt, state = model_path("mamba_tied.f32"), text(numbers("mamba_tied.f32")["ids"][:5]), tmp_path / "state"
    whole = generate_ids(mamba, path, 30, "-s", "5", "--ids", prompt)
    parts = generate_ids(mamba, path, 6, "-s", "5", "--ids", prompt, "--save-state", state)
    for _ in range(4):
        parts += generate_ids(mamba, path, 6, "-s", "5", "--load-state", state, "--save-state", state)
    assert parts == whole


def test_branches(mamba, tmp_path):
    """Two continuations of one state equal two separate texts, in any order, and leave the file as it was."""
    path, ids, state = model_path("mamba_untied.f32"), numbers("mamba_untied.f32")["ids"], tmp_path / "state"
    generate_ids(mamba, path, 0, "--ids", text(ids[:50]), "--save-state", state)
    before = state.read_bytes()
    for suffix in (ids[50:60], ids[60:75], ids[50:60]):
        apart = generate_ids(mamba, path, 20, "-s", "9", "--ids", text([*ids[:50], *suffix]))
        assert generate_ids(mamba, path, 20, "-s", "9", "--load-state", state, "--ids", text(suffix)) == apart
    assert state.read_bytes() == before


def test_requests_do_not_leak(mamba, tmp_path):
    """A, B, A in one process: each as if it were alone."""
    name = "mamba_tied.f32"
    ids = numbers(name)["ids"]
    first, second = text(ids[:60]), text(ids[60:71])
    alone = {request: table(mamba("score", model_path(name), "--ids", request).stdout)[0]["nll"] for request in (first, second)}
    rows = table(mamba("score", model_path(name), "--ids", first, "--ids", second, "--ids", first).stdout)
    assert [row["nll"] for row in rows] == [alone[first], alone[second], alone[first]]
    assert alone[first] != alone[second]


@pytest.fixture
def saved_state(mamba, tmp_path_factory):
    """Of mamba_tied.f32; it loads there, so that what the tests below change is what makes it refused."""
    path = tmp_path_factory.mktemp("state") / "state"
    generate_ids(mamba, model_path("mamba_tied.f32"), 3, "--ids", "1 2 3 4 5 6 7", "--save-state", path)
    assert len(generate_ids(mamba, model_path("mamba_tied.f32"), 3, "--load-state", path)) == 3
    return path


@pytest.mark.parametrize("other", ["mamba_tied.f16", "mamba_tied.q8_0", "mamba_untied.f32", "mamba_falcon.f32"])
def test_state_of_another_model(mamba, saved_state, other):
    refuses_state(mamba, model_path(other), saved_state)


def test_state_of_other_weights(mamba, tmp_path, saved_state):
    """Same name, shapes and metadata; one weight differs."""
    data = bytearray(model_path("mamba_tied.f32").read_bytes())
    data[-3] ^= 0x10  # inside the last tensor
    (tmp_path / "other.bin").write_bytes(data)
    refuses_state(mamba, tmp_path / "other.bin", saved_state)


def test_truncated_state(mamba, tmp_path, saved_state):
    """Cut inside the magic, between and inside header fields, in the middle of the data, one byte short; and one byte long."""
    data, short = saved_state.read_bytes(), tmp_path / "short"
    lengths = {*range(0, 8), *range(8, 129, 8), 97, len(data) // 2, len(data) - 8, len(data) - 4, len(data) - 1}
    for length in sorted(n for n in lengths if n < len(data)):
        short.write_bytes(data[:length])
        refuses_state(mamba, model_path("mamba_tied.f32"), short)
    short.write_bytes(data + b"\0")
    refuses_state(mamba, model_path("mamba_tied.f32"), short)


def test_corrupted_state(mamba, tmp_path, saved_state):
    """One bit turned over, in the header or in the numbers, is noticed."""
    data, bad = saved_state.read_bytes(), tmp_path / "bad"
    positions = {*range(0, 96, 3), *np.linspace(96, len(data) - 1, 12).astype(int).tolist()}
    for position in sorted(positions):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        bad.write_bytes(changed)
        refuses_state(mamba, model_path("mamba_tied.f32"), bad)


def test_state_that_is_no_file(mamba, tmp_path):
    path = model_path("mamba_tied.f32")
    refuses_state(mamba, path, tmp_path / "missing")
    refuses_state(mamba, path, tmp_path)
    refuses_state(mamba, path, path)  # a file of another kind


def test_failed_save_keeps_the_old_state(mamba, tmp_path, saved_state):
    """A full disk, played by a limit of 4 KiB on the size of files: the old state stays, nothing is left half-written."""
    state = tmp_path / "state"
    shutil.copyfile(saved_state, state)
    assert state.stat().st_size > 8192
    command = ["bash", "-c", "ulimit -f 4; exec \"$@\"", "bash", PROGRAM, "generate",
               model_path("mamba_tied.f32"), "--ids", "9 8 7", "-n", "3", "--print-ids", "-q", "--save-state", state]
    done = subprocess.run([str(part) for part in command], capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and done.stderr.startswith(b"mamba: ") and done.stderr.count(b"\n") == 1
    assert state.read_bytes() == saved_state.read_bytes() and os.listdir(tmp_path) == ["state"]


def test_unwritable_state(mamba, tmp_path):
    for target in (tmp_path / "no-such-folder" / "state", tmp_path):
        done = mamba("generate", model_path("mamba_tied.f32"), "--ids", "9 8 7", "-n", "3", "-q", "--print-ids", "--save-state", target,
                     check=False)
        assert done.returncode == 1 and done.stderr.startswith(b"mamba: ") and done.stderr.count(b"\n") == 1
    assert os.listdir(tmp_path) == []
