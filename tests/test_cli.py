"""The command line: help, errors and exit statuses, pipes, streams, files that appear whole or not at all."""
import csv
import gzip
import json
import os
import pathlib
import re
import shlex
import signal
import struct
import subprocess
import time

import numpy as np
import pytest

from conftest import FIXTURES, PROGRAM, ROOT
from nucleotides import vocabulary

MODEL = FIXTURES / "mamba_tied.f32.bin"
TALES = ROOT / "models" / "tales.bin"
VOCABULARY = FIXTURES / "vocab_gpt2.gguf"
COMMANDS = ["generate", "score", "embed", "tokenize", "bench", "inspect"]
IDS = ["--ids", "5 6 7 8"]


def one_line(done, status, *words):
    """An error is one line on standard error (and, for a wrong command line, a hint), and nothing on standard output."""
    text = done.stderr.decode()
    lines = [line for line in text.splitlines() if not line.startswith("Try: mamba ")]
    assert done.returncode == status, text
    assert len(lines) == 1 and lines[0].startswith("mamba: "), text
    for word in words:
        assert str(word) in lines[0], text
    assert done.stdout == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_help(mamba, command):
    a = mamba("help", command).stdout.decode()
    assert a == mamba(command, "--help").stdout.decode()
    assert a.startswith(f"Usage: mamba {command} MODEL") and "Example:" in a
    assert max(map(len, a.splitlines())) <= 110


def test_hints(mamba, tmp_path):
    """A wrong command line sends to the help of its command; --prefix says when a word was no file's name."""
    assert b"Try: mamba help score\n" in mamba("score", MODEL, "--nonsense", check=False).stderr
    assert b"Try: mamba help generate\n" in mamba(MODEL, "-n", "many", check=False).stderr
    assert b"Try: mamba --help\n" in mamba("--nonsense", check=False).stderr
    said = lambda *options: b"there is no file " in mamba("score", ROOT / "models/tales.bin", "-p", "a dog", *options).stderr
    (tmp_path / "short").write_text("He had")
    assert not said("--prefix", tmp_path / "short")
    assert said("--prefix", "instructions.txt") and said("--prefix", "instructions.txt", "-q") and not said("--prefix", "He had")


def test_general_help(mamba):
    text = mamba("--help").stdout.decode()
    assert all(command in text for command in COMMANDS)
    assert re.fullmatch(r"mamba \d+\.\d+\n", mamba("--version").stdout.decode())
    done = mamba(check=False)
    assert done.returncode == 2 and done.stdout == b"" and b"Usage" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--frobnicate"], ["unknown option --frobnicate"]),
    ([MODEL, "-n"], ["-n needs a value"]),
    ([MODEL, "-n", "x"], ["--n-predict x", "integer"]),
    ([MODEL, "-n", "1.5"], ["--n-predict 1.5", "integer"]),
    ([MODEL, "--top-p", "2"], ["--top-p 2", "0 to 1"]),
    ([MODEL, "--temp", "nan"], ["--temp nan"]),
    ([MODEL, "-s", "-2"], ["--seed -2", "or -1"]),
    ([MODEL, "--prefix", ""], ["--prefix: the name is empty"]),
    ([MODEL, "-t", "0"], ["--threads 0"]),
    ([MODEL, "--stop", ""], ["--stop"]),
    ([MODEL, "--greedy=yes"], ["--greedy takes no value"]),
    ([MODEL, "--per-token"], ["--per-token does not apply to generate"]),
    (["score", MODEL, "--greedy"], ["--greedy does not apply to score"]),
    (["score", MODEL, "-n", "5"], ["-n does not apply to score"]),
    (["inspect", MODEL, "-p", "x"], ["-p does not apply to inspect"]),
    (["inspect", MODEL, "--prompt=x"], ["--prompt does not apply to inspect"]),
    (["score", MODEL, "--load-state", "a", "--load-state", "b"], ["--load-state is given twice"]),
    ([MODEL, *IDS, "-o", MODEL], ["--output and --model name the same file"]),
    ([MODEL, "-f", ROOT / "README.md", "--save-state", FIXTURES / "../../README.md"], ["--save-state names an input"]),
    ([MODEL, *IDS, "-o", "no-such-file", "--save-state", "./no-such-file"], ["--output and --save-state name the same file"]),
    ([MODEL, *IDS, "--print-ids", "--sound-format", "raw"], ["--sound-format does not apply with --print-ids"]),
    (["embed", MODEL, "--pool", "max"], ["--pool max", "expected last|mean|none"]),
    (["--per-tokens"], ["unknown option --per-tokens"]),
    (["score", MODEL, "--per-tokens"], ["unknown option --per-tokens; is it --per-token?"]),
    ([MODEL, "extra"], ["extra", "-p"]),
    (["scroe", MODEL], ["scroe: no such command, and no such file"]),
    (["-q", "score", MODEL], ["score: a command comes before all options"]),
    ([MODEL, "-n", "9999999999"], ["from -1 to 1000000000"]),
    (["score", MODEL, *IDS, *IDS, "--logits", "x.npy"], ["--logits", "there are 2"]),
    (["embed", MODEL, *IDS, *IDS, "--pool", "none"], ["--pool none", "there are 2"]),
    (["score", MODEL, "--fasta", "x.fa", "--logits", "x.npy"], ["--logits does not apply with --fasta"]),
    (["bench", MODEL, "-p", "0", "-n", "0"], ["nothing to measure"]),
    (["bench", "--op", "scan", "--paper"], ["--op scan does not apply with --paper"]),
    (["bench", "--op", "scan", "-n", "7"], ["--op scan does not apply with -n"]),
    (["bench", "--op", "scan", "x.bin"], ["--op scan does not apply with a model"]),
    (["score"], ["no model file"]),
    (["help", "dance"], ["dance", "no such command"]),
    (["score", MODEL, "-f", "-", "-f", "-"], ["standard input"]),
    (["bench", MODEL, "-p", "5,x"], ["-p 5,x", "commas"]),
    (["bench", MODEL, "-np", "0"], ["-np 0"]),
    (["bench", MODEL, "-o", "xml"], ["--output xml", "expected md|csv|json|jsonl"]),
    (["bench", MODEL, "-o", "js"], ["--output js"]),
    ([MODEL, *IDS, "--device", ""], ["--device", "expected cpu|cuda"]),
    (["classify", MODEL, *IDS, "--pool", "none"], ["--pool none", "expected last|mean"]),
    (["bench", MODEL, "--greedy"], ["--greedy does not apply to bench"]),
    (["bench", "--op", "dance"], ["--op dance", "expected scan"]),
    (["bench"], ["no model file"]),
])
def test_wrong_command_line(mamba, arguments, words):
    one_line(mamba(*arguments, check=False), 2, *words)


@pytest.mark.parametrize("arguments, words", [
    (["no-such-model.bin", *IDS], ["no-such-model.bin", "No such file"]),
    (["/", *IDS], ["/: a folder", "convert_weights.py"]),
    (["/dev/null", *IDS], ["/dev/null", "not a regular file"]),
    ([VOCABULARY, *IDS], ["holds no weights", "vocabulary"]),
    (["bench", "no-such-model.bin", "-p", "1"], ["no-such-model.bin", "No such file"]),
    (["tokenize", VOCABULARY, "-f", "no-such-prompt.txt"], ["no-such-prompt.txt", "No such file"]),
    ([MODEL, "-p", "hello"], ["tokenizer"]),
    ([MODEL, "--ids", "5 160", "--print-ids"], ["160", "0 to 159"]),
    ([MODEL, "--ids", "5 -1", "--print-ids"], ["-1"]),
    ([MODEL, "--ids", "5 six", "--print-ids"], ["six"]),
    (["embed", MODEL, *IDS, "--layer", "99"], ["--layer 99"]),
    (["embed", MODEL, "--ids", ""], ["empty"]),
    ([MODEL, *IDS, "--print-ids", "--load-state", "no-such.state"], ["no-such.state"]),
    ([MODEL, *IDS, "--print-ids", "--save-state", "/no/such/folder/x.state"], ["/no/such/folder/x.state"]),
    (["score", MODEL, *IDS, "--logits", "/no/such/folder/x.npy"], ["/no/such/folder/x.npy"]),
    ([MODEL, *IDS, "--tokenizer", MODEL], ["holds no tokenizer"]),
    (["score", TALES, "-p", "Once", "--case-sensitive"], ["nucleotides", "--case-sensitive"]),
    (["tokenize", VOCABULARY, "-p", "Once", "--case-sensitive"], ["nucleotides", "--case-sensitive"]),
])
def test_what_fails_while_running(mamba, arguments, words):
    one_line(mamba(*arguments, check=False), 1, *words)


@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]),
    (b"hello, this is no model at all", ["not a GGUF file"]),
    (b"GGUF\x03\0\0\0" + b"\xff" * 16, ["counts"]),
    (b"GGUF\x07\0\0\0" + b"\0" * 16, ["version 7"]),
    (b"GGUF\x03\0\0\0" + b"\0" * 16, ["general.architecture"]),
])
def test_broken_model_files(mamba, tmp_path, content, words):
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    one_line(mamba("score", path, *IDS, check=False), 1, path, *words)


def changed_model(tmp_path, change):
    """The fixture with one change to its bytes."""
    data = bytearray(MODEL.read_bytes())
    change(data)
    path = tmp_path / "changed.bin"
    path.write_bytes(data)
    return path


def test_truncated_model(mamba, tmp_path):
    path = changed_model(tmp_path, lambda d: d.__delitem__(slice(len(d) - 100, None)))
    one_line(mamba("score", path, *IDS, check=False), 1, path, "cut off")


def test_missing_tensor(mamba, tmp_path):
    def rename(d):
        at = d.index(b"blk.1.ssm_out.weight")
        d[at:at + 3] = b"xxx"
    one_line(mamba("score", changed_model(tmp_path, rename), *IDS, check=False), 1, "'blk.1.ssm_out.weight' is missing")


def test_wrong_shape(mamba, tmp_path):
    def shrink(d):
        at = d.index(b"mamba.ssm.time_step_rank") + len(b"mamba.ssm.time_step_rank") + 4
        d[at] += 1
    one_line(mamba("score", changed_model(tmp_path, shrink), *IDS, check=False), 1, "shape", "expected")


def changed_weight(tmp_path, tensor, value):
    """The fixture with another number at the beginning of a tensor."""
    gguf = pytest.importorskip("gguf")
    offset = next(t.data_offset for t in gguf.GGUFReader(str(MODEL)).tensors if t.name == tensor)
    return changed_model(tmp_path, lambda d: d.__setitem__(slice(offset, offset + 4), struct.pack("<f", value)))


@pytest.mark.parametrize("tensor, value, words", [
    ("blk.0.ssm_d", float("nan"), ["blk.0.ssm_d", "finite"]),
    ("blk.0.ssm_in.weight", float("nan"), ["not a finite number"]),
    ("blk.0.ssm_a", 0.5, ["blk.0.ssm_a", "holds 0.5 at [0, 0]", "-exp(A_log)"])])
def test_wrong_number_in_weights(mamba, tmp_path, tensor, value, words):
    path = changed_weight(tmp_path, tensor, value)
    one_line(mamba(path, *IDS, "--print-ids", check=False), 1, path, *words)


@pytest.mark.parametrize("command, token", [(["generate", "--print-ids"], 4), (["score", "--logits", "l.npy"], 1), (["embed", "-o", "e.npy"], 1)])
def test_where_the_output_is_no_number(mamba, tmp_path, command, token):
    """generate looks at the last token's logits, the others at each row."""
    path = changed_weight(tmp_path, "blk.0.ssm_in.weight", float("nan"))
    options = [tmp_path / option if option.endswith(".npy") else option for option in command[1:]]
    assert f"after token {token} is not a finite" in mamba(command[0], path, *IDS, *options, check=False).stderr.decode()


@pytest.mark.parametrize("key, words", [("mamba.attention.layer_norm_rms_epsilon", ["layer_norm_rms_epsilon", "wrong type", "float32"]),
                                        ("mamba.block_count", ["'mamba.block_count' is missing, or no integer"])])
def test_metadata_of_a_wrong_type(mamba, tmp_path, key, words):
    """Not the default in its place: the model would be another one. A float32 becomes a uint32, or the other way round."""
    uint32, float32 = struct.pack("<I", 4), struct.pack("<I", 6)
    def retype(d):
        at = d.index(key.encode()) + len(key)
        assert d[at:at + 4] == (float32 if "epsilon" in key else uint32)
        d[at:at + 4] = uint32 if "epsilon" in key else float32
    one_line(mamba("score", changed_model(tmp_path, retype), *IDS, check=False), 1, *words)


def test_broken_vocabularies(mamba, tmp_path):
    """The file is named, also where it is one that nobody named; and merges of a wrong type are not none."""
    (tmp_path / "model.bin").write_bytes(MODEL.read_bytes())
    beside = vocabulary(tmp_path, list("ab"), model="unigram").rename(tmp_path / "tokenizer.bin")
    one_line(mamba("score", tmp_path / "model.bin", "-p", "a", check=False), 1, f"{beside}: tokenizer.ggml.model")
    numbers = vocabulary(tmp_path, list("ab"), merges=[1, 2])
    one_line(mamba("tokenize", numbers, "-p", "ab", check=False), 1, "tokenizer.ggml.merges is no array of strings")


def test_inspect_cuts_what_is_longer(mamba, tmp_path):
    """Texts of 200 bytes are whole."""
    shown = mamba("inspect", vocabulary(tmp_path, list("ab"), model="d" * 200)).stdout.decode()
    assert f'"{"d" * 200}"\n' in shown


def test_tensors_that_overlap(mamba, tmp_path):
    """The last tensor is said to lie where the first one does, and the file ends before it."""
    gguf = pytest.importorskip("gguf")
    last = max(gguf.GGUFReader(str(MODEL)).tensors, key=lambda t: t.data_offset)
    def move(d):
        name = last.name.encode()
        at = d.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8 * len(last.shape) + 4
        d[at:at + 8] = bytes(8)
        del d[int(last.data_offset):]
    one_line(mamba("score", changed_model(tmp_path, move), *IDS, check=False), 1, "overlaps others")


def test_a_part_of_a_model(mamba, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "mamba")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one_line(mamba("score", tmp_path / "part.gguf", *IDS, check=False), 1, "one of 3 parts", "--merge")


def test_a_pipe_that_nobody_writes_to(mamba, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    one_line(mamba("score", tmp_path / "fifo", *IDS, check=False, timeout=10), 1, "not a regular file")


def test_names_cannot_control_the_terminal(mamba):
    done = mamba("score", "no\x1bsuch\u009b31mfile\u00e9", *IDS, check=False)
    assert b"no?such\xc2?31mfile\xc3\xa9" in done.stderr


def test_vocabulary_that_does_not_match(mamba, tmp_path):
    done = mamba("score", MODEL, "-p", "x", "--tokenizer", ROOT / "tokenizer.bin", check=False)
    one_line(done, 1, "50277", "160")


def test_reader_that_leaves(mamba):
    """| head -c 10 ends quietly."""
    done = subprocess.run(f"'{PROGRAM}' '{MODEL}' --ids '5 6' --print-ids -n 100000 -q | head -c 10; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, timeout=60)
    assert done.stderr == b"" and done.stdout[10:] == b"0\n"


def test_full_disk(mamba):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([PROGRAM, "score", MODEL, *IDS, "--per-token"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"No space left" in done.stderr


def test_nothing_half_written(mamba, tmp_path):
    """A run that fails leaves the old file, and nothing beside it."""
    path = tmp_path / "logits.npy"
    path.write_bytes(b"old")
    broken = changed_model(tmp_path, lambda d: d.__setitem__(slice(len(d) - 40000, None), b"\xff" * 40000))
    assert mamba("score", broken, *IDS, "--logits", path, check=False).returncode == 1
    assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["changed.bin", "logits.npy"]


def test_score_table(mamba):
    rows = [line.split("\t") for line in mamba("score", MODEL, *IDS, "--ids", "9").stdout.decode().splitlines()]
    assert rows[0] == ["id", "tokens", "nll", "bits_per_token", "perplexity"]
    assert rows[1][:2] == ["1", "3"] and rows[2] == ["2", "0", "0.000000", "nan", "nan"]
    nll, bits, perplexity = map(float, rows[1][2:])
    assert abs(bits - nll / 3 / np.log(2)) < 1e-5 and abs(perplexity / np.exp(nll / 3) - 1) < 1e-5
    tokens = [line.split("\t") for line in mamba("score", MODEL, *IDS, "--per-token").stdout.decode().splitlines()]
    assert tokens[0] == ["id", "pos", "token_id", "token", "logprob"]
    assert [row[2] for row in tokens[1:]] == ["6", "7", "8"]
    assert abs(sum(float(row[4]) for row in tokens[1:]) + nll) < 1e-5


def test_inspect(mamba):
    lines = mamba("inspect", MODEL).stdout.decode().splitlines()
    assert "metadata\tgeneral.architecture\tstring\t\"mamba\"" in lines
    assert any(line.startswith("tensor\tblk.0.ssm_in.weight\tF32\t[256, 64]") for line in lines)


def bench_rows(mamba, *options):
    return json.loads(mamba("bench", MODEL, "-r", 2, "-o", "json", *options).stdout)


def test_bench(mamba):
    rows = bench_rows(mamba, "-p", "7,9", "-n", "5", "-np", "1,3", "-t", "1,2")
    tests = [(r["n_threads"], r["n_parallel"], r["n_prompt"], r["n_gen"]) for r in rows]
    assert tests == [(t, np, *test) for t in (1, 2) for np in (1, 3) for test in ((7, 0), (9, 0), (0, 5))]
    for row in rows:
        assert row["avg_ts"] > 0 and row["avg_ns"] > 0 and row["stddev_ts"] >= 0
        assert (row["weight_gb_per_s"] > 0) == (row["n_gen"] > 0) and row["peak_rss"] > 1e6 and row["read_gb_per_s"] > 0
    # The last logits do not depend on the threads, the batch or the pass.
    assert len({r["logits_hash"] for r in rows if r["n_gen"]}) == 1
    (row,) = json.loads(mamba("bench", MODEL, "-r", 1, "-o", "json", "-p", 9, "-n", 0, "-ub", 2).stdout)
    assert abs(9 / row["avg_ts"] * 1e9 / row["avg_ns"] - 1) < 1e-3  # one run: one time, one speed
    assert row["logits_hash"] == rows[1]["logits_hash"] != rows[0]["logits_hash"]


def test_bench_scan(mamba):
    """Needs no model; the result does not depend on threads or instruction set."""
    run = lambda threads, isa="": json.loads(mamba("bench", "--op", "scan", "-p", "33,7", "-r", 1, "-o", "json", "-t", threads, env={"MAMBA_ISA": isa}).stdout)
    first = run(1)
    assert [r["n_prompt"] for r in first] == [33, 7] and all(r["avg_ts"] > 0 for r in first) and first[0]["logits_hash"] != first[1]["logits_hash"]
    for other in (run(2), run(2, "generic")):
        assert [r["logits_hash"] for r in other] == [r["logits_hash"] for r in first]


def test_bench_formats(mamba):
    options = ["bench", MODEL, "-p", 4, "-n", 3, "-r", 1]
    table = mamba(*options).stdout.decode().splitlines()
    assert len(table) == 4 and "pp4" in table[2] and "tg3" in table[3] and {line.count("|") for line in table} == {10}
    rows = list(csv.DictReader(mamba(*options, "-o", "csv").stdout.decode().splitlines()))
    lines = [json.loads(line) for line in mamba(*options, "-o", "jsonl").stdout.splitlines()]
    assert [row["n_gen"] for row in rows] == ["0", "3"] and [line["n_gen"] for line in lines] == [0, 3]
    assert set(rows[0]) == set(lines[0]) and {"model_filename", "model_type", "model_size", "model_n_params"} <= set(rows[0])


def test_bench_names_the_whole_path(mamba, tmp_path):
    model = tmp_path / ("a" * 200) / ("b" * 200)
    model.parent.mkdir()
    model.symlink_to(MODEL)
    (row,) = json.loads(mamba("bench", model, "-p", 4, "-n", 0, "-r", 1, "-o", "json").stdout)
    assert row["model_filename"] == str(model)


def test_a_prompt_that_is_compressed(mamba, tmp_path):
    text = tmp_path / "text.gz"
    text.write_bytes(gzip.compress(b"Once upon a time"))
    for options in (["-f", text], ["-p", "x", "--prefix", text]):
        one_line(mamba("score", TALES, *options, check=False), 1, text, "zcat")
    one_line(mamba("score", TALES, check=False, input=text.read_bytes()), 1, "zcat")


def test_same_seed_same_ids_and_other_seed_others(mamba):
    def ids(seed, *more):
        return mamba(MODEL, *IDS, "--print-ids", "-n", 30, "-s", seed, *more).stdout

    assert ids(1) == ids(1, "-t", 1) == ids(1, "-ub", 1) != ids(2)


def test_quiet_says_nothing(mamba):
    assert mamba(MODEL, *IDS, "--print-ids", "-n", 3, "-q").stderr == b""
    assert b"tokens/s" in mamba(MODEL, *IDS, "--print-ids", "-n", 3).stderr


def test_stdin_is_left_alone_when_a_state_is_continued(mamba, tmp_path):
    """Inside `while read` a run must not eat the lines of the loop."""
    mamba(MODEL, *IDS, "--print-ids", "-n", 2, "--save-state", tmp_path / "s")
    script = f"printf 'a\\nb\\n' | while read -r l; do '{PROGRAM}' '{MODEL}' --load-state '{tmp_path}/s' --print-ids -n 1 -q >/dev/null; echo $l; done"
    assert subprocess.run(script, shell=True, capture_output=True, timeout=60).stdout == b"a\nb\n"


def test_interrupt_keeps_the_text_and_saves_the_state(mamba, tmp_path):
    """Ctrl-C ends a generation with the text so far, and what is saved continues it."""
    state = tmp_path / "s.state"
    run = subprocess.Popen([PROGRAM, MODEL, "--ids", "5 6", "--print-ids", "-n", "100000000", "-s", "1", "--save-state", state],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)  # no buffer that communicate() would not see
    first = b""
    while len(first) < 200:
        first += run.stdout.read(200)
    run.send_signal(signal.SIGINT)
    rest, _ = run.communicate(timeout=60)
    ids = (first + rest).decode().split()
    assert run.returncode == 130 and len(ids) > 10
    more = mamba(MODEL, "--load-state", state, "--print-ids", "-n", 5, "-s", 1).stdout.decode().split()
    whole = mamba(MODEL, "--ids", "5 6", "--print-ids", "-n", len(ids) + 5, "-s", 1).stdout.decode().split()
    assert ids + more == whole


def test_longer_than_the_training(mamba):
    """Said once, behind a text that is being written and at once elsewhere; nowhere with -q, and not of a text that is just as long."""
    model, trained = ROOT / "models" / "tales.bin", 512
    ids = lambda n: " ".join(["7"] * n)
    said = lambda *arguments, **options: mamba(*arguments, **options).stderr.decode().count("was trained on texts of 512 tokens")
    assert said("score", model, "--ids", ids(trained)) == 0
    assert said("score", model, "--ids", ids(trained + 1)) == 1
    assert said("score", model, "--ids", ids(trained + 1), "-q") == 0
    lines = "".join(f'{{"ids": [{", ".join(ids(n).split())}], "max_tokens": 1}}\n' for n in (600, 9, 700))
    assert said(model, "--jsonl", input=lines.encode()) == 1
    grown = mamba(model, "--ids", ids(trained - 2), "-n", "4", "--ignore-eos")
    assert grown.stderr.decode().splitlines()[-1].startswith(f"mamba: {model} was trained on")
    assert said(model, "--ids", ids(trained - 2), "-n", "3", "--ignore-eos") == 0


def test_output_through_a_link(mamba, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/out.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to(tmp_path / "real/out.npy")
    mamba("embed", MODEL, *IDS, "-o", tmp_path / "link.npy")
    assert (tmp_path / "link.npy").is_symlink() and np.load(tmp_path / "real/out.npy").shape == (1, 64)
    assert os.listdir(tmp_path / "real") == ["out.npy"]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(tmp_path, ignored):
    """SIGHUP ends a run and leaves nothing half-written; under nohup it does not."""
    (tmp_path / "in").write_text("a word " * 100000)
    to_file = [ROOT / "models/tales.bin", "-f", tmp_path / "in", "--logits", tmp_path / "x.npy"]
    run = subprocess.Popen([PROGRAM, *(["embed", MODEL, "--jsonl", "-q"] if ignored else ["score", *to_file])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL))
    if ignored:
        run.stdin.write(b'{"ids": [5, 6]}\n')
        run.stdin.flush()
        assert run.stdout.readline()
        run.send_signal(signal.SIGHUP)
        assert run.communicate(b'{"ids": [5, 6]}\n', timeout=60)[0].count(b"embedding") == 1 and run.returncode == 0
    else:
        while len(os.listdir(tmp_path)) < 2:
            assert run.poll() is None
        run.send_signal(signal.SIGHUP)
        assert run.wait(60) == 128 + signal.SIGHUP and os.listdir(tmp_path) == ["in"]


def test_the_demo_writes_what_readme_shows(mamba):
    command = re.search(r"^demo: mamba\n\t\./mamba (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    shown = " ".join(re.findall(r"^> ?(.*)$", (ROOT / "README.md").read_text(), re.M)).removesuffix(" [...]").split()
    assert len(shown) > 50
    arguments = [ROOT / word if word.startswith("models/") else word for word in shlex.split(command)]
    assert mamba(*arguments, "-q").stdout.decode().split()[:len(shown)] == shown


def test_an_output_is_no_input(mamba, tmp_path):
    """Nothing that is read is written over, by whatever name; a state may be continued in its own file, and devices are no files."""
    text, genome = tmp_path / "t.txt", tmp_path / "g.fa"
    text.write_text("Once upon")
    genome.write_text(">a\nACGT\n")
    (tmp_path / "link").symlink_to(text)
    dna = ROOT / "models" / "dna.bin"
    for arguments in (["generate", TALES, "-f", text, "-o", tmp_path / "link"], ["score", dna, "--fasta", genome, "--track", genome],
                      ["generate", dna, "--fasta", genome, "--fasta-out", tmp_path / "." / "g.fa"]):
        done = mamba(*arguments, check=False)
        assert done.returncode == 2 and (b"same file" in done.stderr or b"names an input" in done.stderr)
    assert text.read_text() == "Once upon" and genome.read_text() == ">a\nACGT\n"
    state = tmp_path / "s.state"
    mamba(TALES, "-f", text, "-n", 2, "--save-state", state)
    mamba(TALES, "--load-state", state, "-n", 2, "--save-state", state)
    mamba(TALES, "-f", "/dev/null", "-n", 2, "-o", "/dev/null", "--save-state", "/dev/null")
    with open(text, "rb") as file:
        done = subprocess.run([PROGRAM, TALES, "-o", text], stdin=file, stderr=subprocess.PIPE)
    assert done.returncode == 2 and text.read_text() == "Once upon"
    mamba(TALES, "--prefix", "Once upon", "-p", " a", "-n", 2, "-o", tmp_path / "Once upon")  # a text that names no file yet
    mamba(TALES, "-f", "-", "-n", 2, "-o", tmp_path / "new.txt", input=b"x")
    one_line(mamba(TALES, "-p", "x", "-o", "/no/a/x", "--save-state", "/no/b/x", check=False), 1, "/no/a/x")


def test_rights_of_a_replaced_file_stay(mamba, tmp_path):
    out = tmp_path / "private"
    out.write_text("")
    out.chmod(0o600)
    mamba(TALES, "-p", "Once", "-n", 2, "-o", out)
    assert out.stat().st_mode & 0o777 == 0o600 and out.stat().st_size
    (tmp_path / "dangling").symlink_to("nothing")
    done = mamba(TALES, "-p", "Once", "-n", 2, "-o", tmp_path / "dangling", check=False)
    assert done.returncode == 1 and b"a link to nothing" in done.stderr and (tmp_path / "dangling").is_symlink()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path, closed):
    """A stream that was closed does not become an output file's descriptor."""
    program, state, out = shlex.quote(str(PROGRAM)), tmp_path / "s.state", tmp_path / "out.txt"
    run = lambda options, closed: subprocess.run(f"{program} {TALES} -p Once -n 5 --greedy {options} {closed}", shell=True).returncode
    assert run(f"-o {out}", "") == 0
    expected = out.read_bytes()
    assert run(f"-o {out}", closed) == 0 and out.read_bytes() == expected
    status = run(f"--save-state {state}", closed)
    assert status == (1 if closed.startswith(">") else 0)
    assert not state.exists() if status else state.read_bytes().startswith(b"MAMBAST")


def test_a_prompt_that_cannot_be_read(mamba, tmp_path):
    """Nothing is drawn after the part that could be read."""
    for options in ([], ["--print-ids"]):
        done = mamba(TALES, "-p", "Once upon a time", "-f", tmp_path / "missing", "-n", 5, *options, check=False)
        one_line(done, 1, "missing")


def test_line_ends_of_a_prompt(mamba):
    """One line end is none of it, be it of Windows."""
    answers = {mamba(TALES, "-n", 5, "--greedy", input=b"Once upon a time" + end).stdout for end in (b"", b"\n", b"\r\n")}
    assert len(answers) == 1


def test_names_in_tables(mamba, tmp_path):
    path = tmp_path / "a\tb\nc.txt"
    path.write_text("Once upon a time")
    table = mamba("score", TALES, "-f", path).stdout.decode().splitlines()
    assert len(table) == 2 and table[1].split("\t")[0] == str(tmp_path) + "/a\\tb\\nc.txt" and table[1].count("\t") == 4


def test_a_character_that_a_state_left_incomplete(mamba, tmp_path):
    """Its first byte waits for the second; a prompt that comes between ends the wait, as text or as ids."""
    waits = tmp_path / "waits.state"
    for seed in range(400):  # until a draw ends in an incomplete character
        how = ["-p", "Once", "-n", 1, "-s", seed, "--temp", 1000, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--save-state", waits]
        if not mamba(TALES, *how).stdout:
            break
    else:
        pytest.fail("no draw ended inside a character")
    continued = mamba(TALES, "--load-state", waits, "-p", " upon a time", "--greedy", "-n", 4).stdout.decode()
    assert "\ufffd" not in continued
    echoed = mamba(TALES, "--load-state", waits, "-p", " upon a time", "--greedy", "-n", 4, "--echo").stdout.decode()
    assert echoed == "\ufffd upon a time" + continued
    request = b'{"prompt": " upon a time", "temperature": 0, "max_tokens": 4}\n'
    assert json.loads(mamba(TALES, "--load-state", waits, "--jsonl", input=request).stdout)["text"] == continued
    as_ids = tmp_path / "ids.state"
    how[-1] = as_ids
    mamba(TALES, *how, "--print-ids")
    assert as_ids.read_bytes() == waits.read_bytes()


def test_decode_of_a_byte_0(mamba):
    done = mamba("tokenize", TALES, "--decode", input=b"7 8\n9\0\n10\n", check=False)
    one_line(done, 1, "byte 0")


def test_tokenize_goes_on_behind_a_missing_file(mamba, tmp_path):
    done = mamba("tokenize", TALES, "-p", "Once", "-f", tmp_path / "missing", "-p", "Once", check=False)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2 and done.stderr.count(b"\n") == 1


def catches(pid, number):
    """Whether a process has a handler of its own for a signal."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]
    return int(caught, 16) >> (number - 1) & 1


@pytest.mark.parametrize("seconds", [0, 2])  # while it measures memory, and later
@pytest.mark.parametrize("arguments", [[TALES, "-p", "2048", "-n", "0", "-r", "50"], ["--op", "scan", "-p", "20000", "-r", "50"]])
def test_bench_ends_with_a_signal(arguments, seconds):
    bench = subprocess.Popen([PROGRAM, "bench", *arguments, "-t", "1", "-q"], stdout=subprocess.DEVNULL)
    while not catches(bench.pid, signal.SIGTERM):
        assert bench.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    bench.terminate()
    assert bench.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("option", ["--prefix", "--load-state"])
def test_a_signal_while_a_pipe_is_waited_for(tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    run = subprocess.Popen([PROGRAM, TALES, option, tmp_path / "pipe", "-p", "x", "-n", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with open(tmp_path / "pipe", "wb"):
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=1)
        run.terminate()
        out, said = run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM and out == b"" and said == b""


def test_a_full_disk_under_an_empty_table():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([PROGRAM, "score", ROOT / "models/dna.bin", "--fasta", "/dev/null"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1


def test_a_state_that_generates_nothing_has_no_speed(mamba, tmp_path):
    state = tmp_path / "s.state"
    mamba(TALES, "-p", "Once", "-n", 0, "--save-state", state)
    assert b"nan" not in mamba(TALES, "--load-state", state, "-n", 0).stderr


def test_a_vocabulary_of_another_model(mamba, tmp_path):
    """Far fewer tokens than the embedding has rows are worth a line."""
    arguments = ["score", TALES, "-p", "ACGT", "--tokenizer", ROOT / "models/dna.bin"]
    assert b"is it this model's?" in mamba(*arguments).stderr and mamba(*arguments, "-q").stderr == b""


def test_the_reader_of_a_table_leaves_before_its_header(tmp_path):
    """What is written besides is whole all the same."""
    (tmp_path / "none.fa").write_text("")
    subprocess.run(f"{{ sleep 0.5; {shlex.quote(str(PROGRAM))} score {ROOT}/models/dna.bin --fasta none.fa --track t.bg; }} | true", shell=True, cwd=tmp_path)
    assert (tmp_path / "t.bg").exists()


def test_an_output_where_standard_output_goes(tmp_path):
    """One file cannot take both; as the only output it is written as standard output is."""
    program, dna = shlex.quote(str(PROGRAM)), ROOT / "models/dna.bin"
    run = lambda line: subprocess.run(line, shell=True, cwd=tmp_path, stderr=subprocess.PIPE)
    (tmp_path / "g.fa").write_text(">a\nACGT\n")
    for name in ("both.txt", "/dev/stdout"):
        done = run(f"{program} score {dna} --fasta g.fa --track {name} > both.txt")
        assert done.returncode == 2 and b"something else to carry" in done.stderr
    assert run(f"echo keep > all.txt; {program} {TALES} -p Once -n 3 --greedy -q -o /dev/stdout >> all.txt").returncode == 0
    lines = (tmp_path / "all.txt").read_text().split("\n", 1)
    assert lines[0] == "keep" and lines[1]
