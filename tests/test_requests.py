"""Many sequences at once: --jsonl, -np, --prefix, classify, --sandbox. Each answer is what a run of its own gives, byte for byte."""
import gzip
import io
import json
import os
import random
import re
import subprocess
import threading
import time

import gguf
import numpy as np
import pytest

from conftest import FIXTURES, PROGRAM, ROOT, peak_rss

TALES = ROOT / "models" / "tales.bin"
IDS_MODEL = FIXTURES / "mamba_tied.f32.bin"  # no tokenizer
WORDS = "Once upon a time there was a little dog who liked to play in the park with his big red ball".split()


def lines_of(requests):
    return "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in requests).encode()


def answers(mamba, command, model, requests, *options, status=0):
    done = mamba(command, model, "--jsonl", *options, input=lines_of(requests), check=False)
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def some_requests(n, seed=0):
    """Prompts and lengths of all sizes: longer than a pass, empty, one token; some end by a stop text."""
    chance = random.Random(seed)
    requests = []
    for i in range(n):
        length = chance.choice([0, 1, 2, 3, 7, 20, 90])
        requests.append({"id": i, "prompt": " ".join(chance.choices(WORDS, k=length)), "max_tokens": chance.choice([0, 1, 2, 5, 30]),
                         "seed": chance.randrange(2 ** 64), "temperature": chance.choice([0, 0.5, 1.0]), "top_k": chance.choice([0, 3, 40])})
        if i % 5 == 0:
            requests[-1]["stop"] = [".", "the"]
        if i % 7 == 0:
            requests[-1]["echo"] = True
        if i % 3 == 0:
            requests[-1]["logprobs"] = i % 4
    return requests


def test_the_same_bytes_for_every_batch(mamba):
    data = lines_of(some_requests(60))
    first = mamba(TALES, "--jsonl", "-np", 1, "-t", 1, input=data).stdout
    assert len(first.splitlines()) == 60
    for options in (["-np", 3], ["-np", 64, "-t", 2], ["-np", 7, "-ub", 5], ["-np", 2, "-ub", 1]):
        assert mamba(TALES, "--jsonl", *options, input=data).stdout == first, options
    loose = mamba(TALES, "--jsonl", "--unordered", input=data).stdout
    assert sorted(loose.splitlines()) == sorted(first.splitlines())


def test_the_same_text_as_alone(mamba):
    requests = some_requests(12, seed=3)
    for request, answer in zip(requests, answers(mamba, "generate", TALES, requests, "-np", 5), strict=True):
        options = ["-n", request["max_tokens"], "-s", request["seed"], "--temp", request["temperature"], "--top-k", request["top_k"]]
        for stop in request.get("stop", []):
            options += ["--stop", stop]
        alone = mamba(TALES, "-q", "-p", request["prompt"], *options, *["--echo"] * request.get("echo", False)).stdout.decode()
        assert answer["id"] == request["id"] and answer["text"] == alone
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["completion_tokens"] <= request["max_tokens"]
        assert answer["finish_reason"] in ("stop", "length")
        assert (answer["finish_reason"] == "length") == (usage["completion_tokens"] == request["max_tokens"]) or "stop" in request


def test_state_does_not_leak(mamba):
    """A, B, A through one sequence."""
    a, b = {"prompt": "Once upon", "seed": 1, "max_tokens": 20}, {"prompt": "The big red ball", "seed": 2, "max_tokens": 9}
    first, _, again = answers(mamba, "generate", TALES, [a, b, a], "-np", 1)
    assert first["text"] == again["text"]


def test_ids_and_defaults(mamba):
    """Values that a line does not give are the command line's; a line without id has its number."""
    requests = [{"ids": [5, 6, 7]}, "\n", "  \r\n", {"ids": [9], "max_tokens": 2, "id": "x\"\\\u00e9"}, {"ids": [5, 6, 7], "max_tokens": None}]
    got = answers(mamba, "generate", IDS_MODEL, requests, "--print-ids", "-n", 4, "-s", 8)
    assert [a["id"] for a in got] == [1, "x\"\\\u00e9", 5]
    assert [len(a["ids"]) for a in got] == [4, 2, 4] and got[0]["ids"] == got[2]["ids"]
    alone = mamba(IDS_MODEL, "--ids", "5 6 7", "--print-ids", "-n", 4, "-s", 8, "-q").stdout.split()
    assert got[0]["ids"] == [int(i) for i in alone]


@pytest.mark.parametrize("line, words", [
    ("nonsense", ["column 1", "object"]),
    ("{}", ["neither prompt nor ids"]),
    ('{"prompt": "a", "ids": [1]}', ["both"]),
    ('{"prompt": 7}', ["column 12", "a string"]),
    ('{"prompt": "a"', ["the line ends", "comma"]),
    ('{"prompt": "a"} x', ["column 17", "nothing behind"]),
    ('{"prompt": "a\tb"}', ["control character"]),
    ('{"prompt": "\\x"}', ["escape"]),
    ('{"prompt": "\\u12g4"}', ["escape"]),
    ('{"prompt": "a', ["quote"]),
    ('{"prompt" "a"}', ["colon"]),
    ('{"prompt": "a", "max_tokens": -2}', ["max_tokens -2", "from -1"]),
    ('{"prompt": "a", "max_tokens": 1.5}', ["max_tokens 1.5", "integer"]),
    ('{"prompt": "a", "max_tokens": 01}', ["a number"]),
    ('{"prompt": "a", "max_tokens": "3"}', ["a number"]),
    ('{"prompt": "a", "top_p": 1e999}', ["top_p 1e999"]),
    ('{"prompt": "a", "temperature": NaN}', ["a number"]),
    ('{"prompt": "a", "seed": -2}', ["seed -2"]),
    ('{"prompt": "a", "seed": 18446744073709551616}', ["seed 18446744073709551616"]),
    ('{"prompt": "a", "stop": [""]}', ["stop", "empty"]),
    ('{"prompt": "a", "stop": 3}', ["stop: column 25", "a string"]),
    ('{"prompt": ["a"]}', ["prompt: column 12: expected a string"]),
    (json.dumps({"prompt": "a", "stop": ["b"] * 17}), ["stop", "at most 16 texts"]),
    (json.dumps({"prompt": "a", "stop": "b" * 1025}), ["stop", "at most 1024 bytes"]),
    ('{"prompt": "a", "echo": 1}', ["true or false"]),
    ('{"prompt": "a", "logprobs": 21}', ["logprobs 21", "0 to 20"]),
    ('{"prompt": "a", "max_token": 3}', ["unknown field", "max_token"]),
    ('{"prompt": "a", "seed": 1, "prompt": "b"}', ["prompt is given twice"]),
    ('{"prompt": "a", "id": [1]}', ["id: column", "a string or a number"]),
    ('{"ids": [4096]}', ["4096", "0 to 4095"]),
    ('{"ids": [1, -1]}', ["-1"]),
    ('{"ids": "1 2"}', ["array"]),
    ('{"prompt": "a", "metadata": ' + "[" * 99 + "]" * 99 + "}", ["64 levels"]),
])
def test_bad_lines(mamba, line, words):
    """Each gets an answer that says what is wrong; the others go on; the exit status tells."""
    good = {"id": "good", "prompt": "Once", "max_tokens": 2, "seed": 1}
    got = answers(mamba, "generate", TALES, [good, line + "\n", good], status=1)
    assert len(got) == 3 and got[0] == got[2] and "text" in got[0]
    assert set(got[1]) == {"id", "error"} and got[1]["id"] == 2
    assert all(word in got[1]["error"] for word in words), got[1]["error"]


def test_what_is_not_scored_has_no_logprob(mamba):
    """N of DNA: the sum of the log-probabilities is -nll."""
    (line,) = answers(mamba, "score", ROOT / "models" / "dna.bin", [{"prompt": "ACNGT"}], "--per-token")
    known = [p for p in line["logprobs"]["token_logprobs"] if p is not None]
    assert len(known) == line["tokens"] == 3 and abs(sum(known) + line["nll"]) < 1e-5
    assert line["logprobs"]["token_logprobs"][2] is None


def test_how_far_the_penalty_looks(mamba):
    (line,) = answers(mamba, "generate", TALES, [{"prompt": "The dog", "temperature": 0, "repeat_penalty": 2, "repeat_last_n": 3, "max_tokens": 30}])
    alone = mamba(TALES, "-p", "The dog", "--greedy", "--repeat-penalty", 2, "--repeat-last-n", 3, "-n", 30).stdout.decode()
    assert line["text"] == alone


def test_a_bad_line_keeps_its_id(mamba):
    (answer,) = answers(mamba, "score", TALES, [{"top_p": 7, "prompt": "x", "id": "me"}], status=1)
    assert answer["id"] == "me" and "top_p" in answer["error"]


def test_a_model_without_a_tokenizer(mamba):
    (answer,) = answers(mamba, "generate", IDS_MODEL, [{"prompt": "x"}], status=1)
    assert "no tokenizer" in answer["error"]


def test_a_line_that_is_too_long(mamba):
    got = answers(mamba, "generate", TALES, ['{"prompt": "' + "x" * (1 << 26) + '"}\n', {"prompt": "a", "max_tokens": 1}], status=1)
    assert "67108864 bytes" in got[0]["error"] and got[0]["id"] == 1 and got[1]["id"] == 2 and "text" in got[1]


def test_nothing_to_do(mamba):
    for data in (b"", b"\n\n"):
        done = mamba("score", TALES, "--jsonl", input=data)
        assert done.stdout == b"" and b"0 requests" in done.stderr


def test_the_last_line_needs_no_end(mamba):
    assert len(mamba("score", TALES, "--jsonl", input=b'{"prompt": "a b"}').stdout.splitlines()) == 1


def test_ends_when_nobody_reads(mamba):
    """At the first answer, though more requests might come."""
    run = subprocess.Popen([PROGRAM, "score", TALES, "--jsonl", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    run.stdout.close()
    run.stdin.write(b'{"prompt": "a b"}\n')
    run.stdin.flush()
    try:
        assert run.wait(20) == 0
    finally:
        run.kill()
        run.stdin.close()


def test_a_byte_order_mark(mamba):
    request = b'{"prompt": "Once", "max_tokens": 3, "temperature": 0}\n'
    assert mamba(TALES, "--jsonl", input=b"\xef\xbb\xbf" + request).stdout == mamba(TALES, "--jsonl", input=request).stdout


def test_summary(mamba):
    """The speeds of reading and of generating are two."""
    said = mamba(TALES, "--jsonl", input=b'{"prompt": "Once upon a time", "max_tokens": 3}\n' * 4).stderr.decode()
    assert re.fullmatch(r"mamba: 4 requests, 0 failed, [\d.]+ requests/s; prompts 20 tokens, [\d.]+ tokens/s; generated 12 tokens, [\d.]+ tokens/s\n", said)


def test_a_quiet_summary(mamba):
    """Only when something failed, and then without timings."""
    done = mamba(TALES, "--jsonl", "-q", input=b'{"prompt": "a", "max_tokens": 1}\n{}\n', check=False)
    assert done.stderr == b"mamba: 2 requests, 1 failed\n"
    assert mamba(TALES, "--jsonl", "-q", input=b'{"prompt": "a", "max_tokens": 1}\n').stderr == b""


def test_compressed_requests(mamba, tmp_path):
    path = tmp_path / "requests.gz"
    path.write_bytes(gzip.compress(lines_of(some_requests(5))))
    done = mamba(TALES, "--jsonl", "-f", path, check=False)
    assert done.returncode == 1 and b"zcat FILE" in done.stderr and done.stdout == b""


def test_requests_from_a_file(mamba, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(lines_of(some_requests(5)))
    assert mamba(TALES, "--jsonl", "-f", path).stdout == mamba(TALES, "--jsonl", input=path.read_bytes()).stdout


def test_every_string_comes_back_as_json(mamba):
    text = "".join(map(chr, range(1, 128))) + "\u00e9\u20ac\U0001f600\u2028"
    (answer,) = answers(mamba, "generate", TALES, [{"prompt": text, "echo": True, "max_tokens": 0}])
    assert answer["text"] == text and answer["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 0
    broken = b'{"prompt": "a\xff\xe2\x82 \\ud83d", "echo": true, "max_tokens": 0, "id": "\xff"}\n'
    answer = json.loads(mamba(TALES, "--jsonl", input=broken).stdout)
    assert answer["text"] == "a\ufffd\ufffd \ufffd" and answer["id"] == "\ufffd"


def test_logprobs_of_one_token_are_one_number(mamba):
    requests = [{"prompt": prompt, "max_tokens": 40, "temperature": 0, "logprobs": 1} for prompt in ("a", "The dog", "One day")]
    for answer in answers(mamba, "generate", TALES, requests):
        assert answer["logprobs"]["token_logprobs"] == [value for top in answer["logprobs"]["top_logprobs"] for value in top.values()]


def test_logprobs(mamba):
    """Those of an echoed prompt are score's; those of drawn tokens too; the likeliest are in order and hold the greedy token."""
    request = {"prompt": "Once upon a time, there was", "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": True}
    (answer,) = answers(mamba, "generate", TALES, [request])
    logprobs = answer["logprobs"]
    (scored,) = answers(mamba, "score", TALES, [{"ids": logprobs["ids"], "logprobs": 3}])
    assert scored["logprobs"] == logprobs and logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert len(logprobs["ids"]) == answer["usage"]["total_tokens"]
    table = mamba("score", TALES, "--per-token", "--ids", " ".join(map(str, logprobs["ids"]))).stdout.decode().splitlines()[1:]
    assert [float(row.split("\t")[4]) for row in table] == logprobs["token_logprobs"][1:]
    for token, logprob, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]))[-12:]:
        assert top[token] == logprob == max(top.values()) and len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True)
    assert "".join(logprobs["tokens"][1:]) == answer["text"]  # the first one is <|endoftext|>, which begins a text
    no_echo = {**request, "echo": False, "logprobs": 0}
    (answer,) = answers(mamba, "generate", TALES, [no_echo])
    assert answer["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][-12:] and "top_logprobs" not in answer["logprobs"]


def test_score(mamba, tmp_path):
    texts = ["Once upon a time", "", "a", "The dog " * 300]
    files = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}").write_text(text)
        files += ["-f", tmp_path / f"{i}"]
    table = [row.split("\t") for row in mamba("score", TALES, *files).stdout.decode().splitlines()[1:]]
    assert mamba("score", TALES, *files, "-np", 1).stdout == mamba("score", TALES, *files, "-np", 3, "-ub", 7).stdout
    for row, answer in zip(table, answers(mamba, "score", TALES, [{"prompt": text} for text in texts]), strict=True):
        assert int(row[1]) == answer["tokens"]
        for text, name in zip(row[2:], ("nll", "bits_per_token", "perplexity")):
            assert float(text) == answer[name] if answer[name] is not None else text == "nan"
    (answer,) = answers(mamba, "score", TALES, [{"prompt": texts[0]}], "--per-token")
    assert len(answer["logprobs"]["token_logprobs"]) == answer["tokens"] + 1


@pytest.mark.parametrize("pool", ["last", "mean", "none"])
def test_embed(mamba, tmp_path, pool):
    texts = ["Once upon a time", "a", "The dog " * 300]
    got = answers(mamba, "embed", TALES, [{"prompt": text} for text in texts], "--pool", pool, "--layer", 3)
    for text, answer in zip(texts, got, strict=True):
        mamba("embed", TALES, "-p", text, "--pool", pool, "--layer", 3, "-o", tmp_path / "e.npy")
        expected = np.load(tmp_path / "e.npy")
        assert np.array_equal(np.float32(answer["embedding"]).reshape(expected.shape), expected)
    (answer,) = answers(mamba, "embed", TALES, [{"ids": []}], status=1)
    assert "empty" in answer["error"]
    if pool != "none":
        together = mamba("embed", TALES, "--pool", pool, "--layer", 3, *sum((["-p", text] for text in texts), [])).stdout
        assert np.array_equal(np.load(io.BytesIO(together)), np.float32([answer["embedding"] for answer in got]))


@pytest.fixture
def classifier(tmp_path):
    """The fixture with a head of three classes: (path, weights [3, d_model], bias)."""
    chance = np.random.default_rng(4)
    reader = gguf.GGUFReader(str(IDS_MODEL))
    writer = gguf.GGUFWriter(tmp_path / "classifier.bin", "mamba")
    for name, field in reader.fields.items():
        if name.startswith("mamba.") and field.types[0] == gguf.GGUFValueType.UINT32:
            writer.add_uint32(name, int(field.parts[field.data[0]][0]))
        elif name.startswith("mamba.") and field.types[0] == gguf.GGUFValueType.FLOAT32:
            writer.add_float32(name, float(field.parts[field.data[0]][0]))
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data))
    d_model = int(reader.fields["mamba.embedding_length"].contents())
    weight, bias = chance.standard_normal((3, d_model), dtype=np.float32), chance.standard_normal(3, dtype=np.float32)
    writer.add_array("mamba.classifier.output_labels", ["cat", "dog", "a\ttab"])
    writer.add_tensor("cls.output.weight", weight)
    writer.add_tensor("cls.output.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "classifier.bin", weight, bias


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_classify(mamba, tmp_path, classifier, pool):
    path, weight, bias = classifier
    texts = [[5, 6, 7], [9], list(range(100))]
    mamba("embed", path, *sum((["--ids", " ".join(map(str, ids))] for ids in texts), []), "--pool", pool, "-o", tmp_path / "e.npy")
    logits = np.load(tmp_path / "e.npy").astype(np.float64) @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    done = mamba("classify", path, *sum((["--ids", " ".join(map(str, ids))] for ids in texts), []), "--pool", pool)
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header == ["id", "label", "probability"]
    assert [row[:2] for row in rows] == [[str(i + 1), label] for i in range(3) for label in ("cat", "dog", "a\\ttab")]
    assert np.abs(np.reshape([float(row[2]) for row in rows], (3, 3)) - expected).max() < 2e-6
    for answer, p in zip(answers(mamba, "classify", path, [{"ids": ids} for ids in texts], "--pool", pool), expected, strict=True):
        assert list(answer["probabilities"]) == ["cat", "dog", "a\ttab"] and answer["label"] == list(answer["probabilities"])[int(p.argmax())]
        assert np.abs(np.array(list(answer["probabilities"].values())) - p).max() < 2e-6


def test_classify_without_a_classifier(mamba):
    done = mamba("classify", TALES, "-p", "x", check=False)
    assert done.returncode == 1 and b"no classifier" in done.stderr and done.stdout == b""


# ---- one prefix, many suffixes ----

PREFIX, SUFFIXES = "Once upon a time there was a little dog.", [" He liked", " The ball", " One day, Tom and his mom went to the park."]


def test_prefix_is_the_beginning_of_each_text(mamba, tmp_path):
    """The prompt is cut into tokens on its own, so the whole text is compared as ids."""
    def ids(text):
        return [int(i) for i in mamba("tokenize", TALES, "-p", text).stdout.split()]

    (tmp_path / "prefix.txt").write_text(PREFIX)
    requests = [{"prompt": s, "seed": 5, "max_tokens": 25, "logprobs": 1} for s in SUFFIXES]
    got = answers(mamba, "generate", TALES, requests, "--prefix", PREFIX)
    assert got == answers(mamba, "generate", TALES, requests, "--prefix", tmp_path / "prefix.txt", "-np", 1, "-ub", 3)
    bos = [i for i in ids(SUFFIXES[0]) if i == 0]  # put before a text, and not before one that continues
    whole = [{"ids": ids(PREFIX) + ids(s)[len(bos):], "seed": 5, "max_tokens": 25, "logprobs": 1} for s in SUFFIXES]
    assert [{**a, "id": None} for a in got] == [{**a, "id": None} for a in answers(mamba, "generate", TALES, whole)]

    scores = answers(mamba, "score", TALES, [{"prompt": s} for s in SUFFIXES], "--prefix", PREFIX)
    (before,) = answers(mamba, "score", TALES, [{"ids": whole[0]["ids"][:len(ids(PREFIX))]}])
    for with_prefix, request in zip(scores, whole):
        (complete,) = answers(mamba, "score", TALES, [{"ids": request["ids"]}])
        assert abs(complete["nll"] - before["nll"] - with_prefix["nll"]) < 3e-6
        assert complete["tokens"] == before["tokens"] + with_prefix["tokens"]

    embedded = answers(mamba, "embed", TALES, [{"prompt": s} for s in SUFFIXES], "--prefix", PREFIX, "--pool", "none")
    for answer, request in zip(embedded, whole):
        (complete,) = answers(mamba, "embed", TALES, [{"ids": request["ids"]}], "--pool", "none")
        assert answer["embedding"] == complete["embedding"][len(ids(PREFIX)):]


def test_a_saved_state_is_a_prefix(mamba, tmp_path):
    state = tmp_path / "s.state"
    mamba(TALES, "-p", PREFIX, "-n", 0, "--save-state", state)
    requests = [{"prompt": s, "seed": 5, "max_tokens": 25} for s in SUFFIXES]
    assert answers(mamba, "generate", TALES, requests, "--load-state", state) == answers(mamba, "generate", TALES, requests, "--prefix", PREFIX)
    assert mamba("score", TALES, "--load-state", state, "-p", SUFFIXES[0]).stdout == mamba("score", TALES, "--prefix", PREFIX, "-p", SUFFIXES[0]).stdout
    both = mamba(TALES, "--load-state", state, "--prefix", SUFFIXES[0], "-p", SUFFIXES[1], "-s", 1, "-n", 9, "-q").stdout
    assert both == mamba(TALES, "--load-state", state, "-p", SUFFIXES[0], "-p", SUFFIXES[1], "-s", 1, "-n", 9, "-q").stdout


# ---- as a partner of another program ----

def test_an_answer_comes_before_the_next_question(mamba):
    """A program that waits for each answer is not kept waiting for a batch to fill."""
    run = subprocess.Popen([PROGRAM, "score", TALES, "--jsonl", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for i in range(5):
        run.stdin.write(lines_of([{"id": i, "prompt": "Once upon a time"}]))
        run.stdin.flush()
        assert json.loads(run.stdout.readline())["id"] == i
    run.stdin.close()
    assert run.wait(60) == 0 and run.stdout.read() == b""


def test_short_requests_do_not_wait_for_a_long_one(mamba):
    """Continuous batching: with two sequences, all short ones pass through the second while the first is busy."""
    requests = [{"id": "long", "prompt": "Once", "max_tokens": 2000, "seed": 1}]
    requests += [{"id": i, "prompt": "a", "max_tokens": 3, "seed": 1} for i in range(50)]
    got = answers(mamba, "generate", TALES, requests, "-np", 2, "--unordered", "--ignore-eos")
    assert [a["id"] for a in got] == list(range(50)) + ["long"]
    assert [a["id"] for a in answers(mamba, "generate", TALES, requests, "-np", 2, "--ignore-eos")] == ["long"] + list(range(50))


# ---- long texts ----

BYTES = [FIXTURES / "mamba_awkward.f32.bin", "--tokenizer", FIXTURES / "vocab_bytes.gguf"]  # a token a byte


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of two pieces (65,536 bytes), with a line end at its end."""
    chance = random.Random(4)
    words = b" ".join(bytes(chance.choices(b"abcdefghij", k=chance.randint(1, 9))) for _ in range(16_000))
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_bytes(words[:70_000] + b"\n")
    return path


def test_a_long_file_is_scored_as_one_text(mamba, book):
    ids = [{"id": 1, "ids": list(book.read_bytes())}]
    (expected,) = answers(mamba, "score", BYTES[0], ids)
    row = mamba("score", *BYTES, "-f", book).stdout.decode().splitlines()[1].split("\t")
    assert row[1:] == [str(expected["tokens"]), f"{expected['nll']:.6f}", f"{expected['bits_per_token']:.6f}", f"{expected['perplexity']:.6f}"]
    per_token = mamba("score", *BYTES, "-f", book, "--per-token", "-ub", 1000).stdout.splitlines()[1:]
    assert [int(line.split(b"\t")[2]) for line in per_token] == ids[0]["ids"][1:]
    assert [int(line.split(b"\t")[1]) for line in per_token] == list(range(1, len(per_token) + 1))
    (expected,) = answers(mamba, "embed", BYTES[0], ids, "--pool", "mean")
    found = np.load(io.BytesIO(mamba("embed", *BYTES, "-f", book, "--pool", "mean").stdout))
    assert np.array_equal(found[0], np.float32(expected["embedding"]))
    several = mamba("score", *BYTES, "-f", book, "-p", "x yz", "-f", book).stdout.decode().splitlines()
    assert several[1].split("\t")[1:] == row[1:] == several[3].split("\t")[1:]


def test_a_long_prompt_is_continued_as_one_text(mamba, book, tmp_path):
    """From a file, in any company, by a pipe, behind a prefix, and over a state; the line end at the end does not count."""
    text, greedy = book.read_bytes()[:-1], ["--greedy", "--print-ids", "-n", 12, "-q"]

    def expected(data):
        request = {"ids": list(data), "max_tokens": 12, "temperature": 0}
        return " ".join(map(str, answers(mamba, "generate", BYTES[0], [request], *BYTES[1:], "--print-ids")[0]["ids"])).encode() + b"\n"

    alone = expected(text)
    assert mamba(*BYTES, "-f", book, *greedy).stdout == alone
    assert mamba(*BYTES, *greedy, input=text + b"\n").stdout == alone
    assert mamba(*BYTES, "-f", book, "--echo", *greedy).stdout == " ".join(map(str, text)).encode() + b" " + alone
    assert mamba(*BYTES, "-p", "so: ", "-f", book, "-p", " and", *greedy).stdout == expected(b"so: " + text + b" and")
    assert mamba(*BYTES, "--prefix", book, "-p", "and", *greedy).stdout == expected(text + b"\nand")
    state = tmp_path / "book.state"
    assert mamba(*BYTES, "-f", book, "-n", 0, "-q", "--save-state", state).stdout == b""
    assert mamba(*BYTES, "--load-state", state, *greedy).stdout == alone
    repeated = ["--repeat-penalty", 1.5, "--repeat-last-n", 4096]
    assert mamba(*BYTES, "-f", book, *greedy, *repeated).stdout == mamba(*BYTES, "--load-state", state, *greedy, *repeated).stdout


@pytest.mark.skipif("MAMBA" in os.environ, reason="a sanitizer keeps what was freed")
@pytest.mark.parametrize("options", [["score", *BYTES, "-np", "1"], [*BYTES, "-n", "-1", "--ignore-eos"]], ids=["score", "generate"])
def test_memory_does_not_grow_with_the_text(book, tmp_path, options):
    def peak(n):
        """Asked for when the first output has come: score then waits for another text, and generate goes on."""
        path = tmp_path / "text"
        path.write_bytes(book.read_bytes()[:-1] * n)
        more = ["-f", "-"] if options[0] == "score" else []
        run = subprocess.Popen([PROGRAM, *map(str, options), "-q", "-f", path, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        run.stdout.read(60)  # longer than the table's header
        peak = peak_rss(run.pid)
        run.kill()
        run.communicate()
        return peak

    few, many = peak(2), peak(9)
    assert many < few + 1024, (few, many)  # ids alone would take 1,900 KiB


@pytest.mark.skipif("MAMBA" in os.environ, reason="a sanitizer keeps what was freed")
def test_memory_does_not_grow_with_the_lines(mamba):
    def peak(n):
        """The program's own figure, asked for before it ends: what wait4() reports begins at the size of its parent."""
        run = subprocess.Popen([PROGRAM, IDS_MODEL, "--jsonl", "--print-ids", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        data = lines_of([{"ids": [i % 100, 3], "max_tokens": 1, "seed": 1} for i in range(n)])
        writer = threading.Thread(target=lambda: (run.stdin.write(data), run.stdin.flush()))
        writer.start()
        for _ in range(n):
            run.stdout.readline()
        writer.join()
        peak = peak_rss(run.pid)
        run.stdin.close()
        assert run.wait(60) == 0
        return peak

    few, many = peak(100), peak(3000)
    assert many < few + 1024, (few, many)


def test_wrong_combinations(mamba):
    for options, words in [(["-p", "x"], "--jsonl reads requests"), (["--save-state", "x"], "--save-state does not apply"),
                           (["--ids", "1"], "--jsonl reads requests")]:
        done = mamba(TALES, "--jsonl", *options, check=False)
        assert done.returncode == 2 and words.encode() in done.stderr, done.stderr
    for options, words in [(["--unordered"], "--unordered needs --jsonl"), (["--logprobs", "1"], "--logprobs needs --jsonl")]:
        done = mamba(TALES, "-p", "x", *options, check=False)
        assert done.returncode == 2 and words.encode() in done.stderr
    done = mamba("embed", TALES, "--jsonl", "-o", "x.npy", check=False)
    assert done.returncode == 2 and b"--output does not apply" in done.stderr


def test_an_unreadable_file_in_the_middle(mamba, tmp_path):
    """As with wc: a line for it, the others are scored, and the exit status tells."""
    (tmp_path / "a").write_text("Once upon")
    (tmp_path / "c").write_text("a time")
    done = mamba("score", TALES, "-q", "-f", tmp_path / "a", "-f", tmp_path / "b", "-f", tmp_path, "-f", tmp_path / "c", check=False)
    assert done.returncode == 1
    assert [line.split(b"\t")[0] for line in done.stdout.splitlines()[1:]] == [str(tmp_path / "a").encode(), str(tmp_path / "c").encode()]
    errors = done.stderr.decode().splitlines()
    assert len(errors) == 2 and f"{tmp_path}/b: No such file" in errors[0] and "Is a directory" in errors[1]
    done = mamba("embed", TALES, "-f", tmp_path / "a", "-f", tmp_path / "b", "-o", tmp_path / "e.npy", check=False)
    assert done.returncode == 1 and not (tmp_path / "e.npy").exists()
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_ids_behind_the_vocabulary(mamba):
    """The embedding may have more rows than the vocabulary has tokens: such an id has no text."""
    small = ["--tokenizer", FIXTURES / "vocab_bytes.gguf"]
    requests = [{"ids": [4095, 70, 3000], "echo": True, "max_tokens": 0, "logprobs": 1}, {"ids": [70], "echo": True, "max_tokens": 0}]
    first, second = answers(mamba, "generate", TALES, requests, *small)
    assert first["text"] == second["text"] and len(second["text"]) == 1 and len(first["logprobs"]["ids"]) == 3
    assert mamba(TALES, *small, "--ids", "4095 70", "--echo", "-n", 0, "-q").stdout.decode() == second["text"]
    assert len(mamba("score", TALES, *small, "--ids", "4095 70", "--per-token").stdout.splitlines()) == 2


def test_a_last_line_that_is_too_long_and_has_no_end(mamba):
    (answer,) = answers(mamba, "score", TALES, ["a" * (67108864 + 36)], status=1)
    assert "67108864 bytes" in answer["error"]


def test_temperature_of_a_request_beats_greedy(mamba):
    requests = [{"prompt": "Once", "max_tokens": 20, "seed": s, **more} for s, more in ((1, {}), (2, {}), (1, {"temperature": 1.5}), (2, {"temperature": 1.5}))]
    cold, cold2, warm, warm2 = (a["text"] for a in answers(mamba, "generate", TALES, requests, "--greedy"))
    assert cold == cold2 and len({cold, warm, warm2}) == 3


def test_embeddings_have_no_logprobs(mamba):
    (answer,) = answers(mamba, "embed", TALES, [{"prompt": "a", "logprobs": 2}])
    assert set(answer) == {"id", "embedding", "usage"}


@pytest.mark.parametrize("options", [["score", TALES, "-p", "x", "--logits", "-"], [TALES, "-p", "x", "--save-state", "-"]])
def test_two_things_on_standard_output(mamba, options):
    done = mamba(*options, check=False)
    assert done.returncode == 2 and b"standard output" in done.stderr and done.stdout == b""


def test_nothing_is_left_beside_an_output_that_failed(mamba, tmp_path):
    for options in (["-f", tmp_path / "missing", "--save-state", tmp_path / "s"], ["-p", "", "--ids", "99999", "--save-state", tmp_path / "s"]):
        assert mamba(TALES, *options, check=False).returncode == 1
    assert mamba("score", TALES, "-f", tmp_path / "missing", "--logits", tmp_path / "l.npy", check=False).returncode == 1
    assert os.listdir(tmp_path) == []


def test_a_state_from_the_end_of_time(mamba, tmp_path):
    """Its checksum is no secret; the number of tokens behind it must still be one that can be counted on from."""
    state = tmp_path / "s"
    mamba(TALES, "-p", "x", "-n", 1, "--save-state", state)
    data = bytearray(state.read_bytes())
    data[40:48] = (2 ** 63 - 1).to_bytes(8, "little")

    def hashed(data):
        h = 2  # as hash_bytes() in mamba.c, from the version on
        for i in range(0, len(data), 8):
            word = data[i:i + 8]
            h = ((h ^ int.from_bytes(word, "little") ^ len(word) << 56) * 0x9e3779b97f4a7c15) % 2 ** 64
            h ^= h >> 29
        return h.to_bytes(8, "little")

    assert hashed(state.read_bytes()[:-8]) == state.read_bytes()[-8:]
    data[-8:] = hashed(data[:-8])
    state.write_bytes(data)
    done = mamba(TALES, "--load-state", state, "-n", 1, check=False)
    assert done.returncode == 1 and b"damaged" in done.stderr


# ---- the sandbox ----

def landlock():
    return os.path.exists("/proc/sys/kernel") and subprocess.run([PROGRAM, "inspect", TALES, "--sandbox"], capture_output=True).returncode == 0


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_sandbox_changes_no_result(mamba, tmp_path):
    (tmp_path / "prompt").write_text("Once upon a time")
    (tmp_path / "lines").write_bytes(lines_of(some_requests(5)))
    state = tmp_path / "s.state"
    for options in (["-f", tmp_path / "prompt", "-s", 1, "-n", 9], ["score", "-f", tmp_path / "prompt"], ["embed", "-f", tmp_path / "prompt"],
                    ["tokenize", "-f", tmp_path / "prompt"], ["inspect"], ["--jsonl", "-f", tmp_path / "lines", "--prefix", tmp_path / "prompt"]):
        command = [options[0]] if options[0] in ("score", "embed", "tokenize", "inspect") else []
        rest = options[len(command):]
        assert mamba(*command, TALES, *rest, "--sandbox").stdout == mamba(*command, TALES, *rest).stdout
    saving = ["-p", "x", "-s", 1, "-n", 3, "--save-state"]
    mamba(TALES, *saving, state, "--sandbox")
    sandboxed = state.read_bytes()
    mamba(TALES, *saving, state)
    assert state.read_bytes() == sandboxed
    assert mamba(TALES, "--load-state", state, "-s", 1, "-n", 3, "--sandbox").returncode == 0
    (tmp_path / "real").mkdir()
    (tmp_path / "real/e.npy").write_bytes(b"")
    (tmp_path / "e.npy").symlink_to(tmp_path / "real/e.npy")
    mamba("embed", TALES, "-p", "x", "-o", tmp_path / "e.npy", "--sandbox")
    assert (tmp_path / "e.npy").is_symlink() and np.load(tmp_path / "real/e.npy").shape == (1, 256)
    os.chdir(tmp_path)
    mamba("score", TALES, "-p", "x y", "--logits", "l.npy", "--sandbox")  # beside the working directory's name
    assert np.load("l.npy").shape[1] == 4096


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_sandbox_needs_no_file_that_was_not_named(mamba, tmp_path):
    done = mamba("score", TALES, "-f", tmp_path / "missing", "--sandbox", check=False)
    assert done.returncode == 1 and b"missing" in done.stderr


def test_sandbox_without_landlock(tmp_path):
    """An old kernel: syscall() says so of Landlock's numbers, and only of those (an OpenMP runtime calls it, too)."""
    (tmp_path / "old.c").write_text("""
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        long syscall(long n, long a, long b, long c, long d, long e, long f)
        {
            if (n == 444) {  // landlock_create_ruleset, which old headers do not name
                errno = ENOSYS;
                return -1;
            }
            return ((long (*)(long, long, long, long, long, long, long))dlsym(RTLD_NEXT, "syscall"))(n, a, b, c, d, e, f);
        }""")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c", "-ldl"], check=True)
    done = subprocess.run([PROGRAM, "score", TALES, "-p", "x", "--sandbox"], capture_output=True, env={**os.environ, "LD_PRELOAD": f"{tmp_path}/old.so"})
    if b"runtime does not come first" in done.stderr:
        pytest.skip("a sanitized build refuses LD_PRELOAD")
    assert done.returncode == 1 and done.stdout == b"" and re.fullmatch(rb"mamba: --sandbox: .*Landlock.*\n", done.stderr), done.stderr


def test_stop_texts_end_ids_too(mamba):
    """With --print-ids the ids up to the one that completes the stop text are printed."""
    options = ["-p", "The dog", "--greedy", "-n", "20"]
    ids = mamba(TALES, *options, "--print-ids").stdout.split()
    stopped = mamba(TALES, *options, "--print-ids", "--stop", ".").stdout.split()
    text = mamba(TALES, *options, "--stop", ".").stdout
    assert len(stopped) < 20 and stopped == ids[:len(stopped)]
    assert mamba("tokenize", TALES, "--decode", "--ids", b" ".join(stopped).decode()).stdout == text + b".\n"
    request = b'{"prompt": "The dog", "temperature": 0, "max_tokens": 20, "stop": ["."]}\n'
    answer = json.loads(mamba(TALES, "--jsonl", "--print-ids", input=request).stdout)
    assert answer["ids"] == list(map(int, stopped)) and answer["finish_reason"] == "stop"


def test_standard_input_that_does_not_wait():
    """A pipe whose owner set O_NONBLOCK: no line is there yet, which is not the end."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    run = subprocess.Popen([PROGRAM, "score", TALES, "--jsonl", "-q"], stdin=read, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as to:
        for i in range(2):
            time.sleep(0.2)
            to.write(b'{"prompt": "a dog"}\n')
            assert b"nll" in run.stdout.readline()
    assert run.wait(60) == 0 and run.stderr.read() == b""
