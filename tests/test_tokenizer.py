"""`mamba tokenize` against ids that Hugging Face tokenizers gave (fixtures/tokenizer_cases.json), and back to text."""
import hashlib
import json
import os
import random
import resource
import unicodedata

import pytest

from conftest import ROOT
from nucleotides import vocabulary

FIXTURES = ROOT / "tests" / "fixtures"
CASES = json.loads((FIXTURES / "tokenizer_cases.json").read_text())
FILES = sorted({file for case in CASES.values() for file in case["ids"]})
NEOX, BYTES, LETTERS = "../../tokenizer.bin", "vocab_bytes.gguf", "vocab_characters.gguf"


def data_of(case):
    unit = bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode()
    return unit * case.get("times", 1)


def tokenize(mamba, folder, file, texts, *options):
    """Lines of ids, one a text; every text is a file of its own, and all go through one process."""
    arguments = []
    for i, data in enumerate(texts):
        path = folder / f"text{i}"
        path.write_bytes(data)
        arguments += ["-f", str(path)]
    lines = mamba("tokenize", FIXTURES / file, *arguments, *options).stdout.split(b"\n")
    assert len(lines) == len(texts) + 1 and lines[-1] == b""
    return [line.decode() for line in lines[:-1]]


@pytest.mark.parametrize("parse_special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("file", FILES)
def test_ids(mamba, tmp_path, file, parse_special):
    names = [name for name, case in CASES.items() if file in case["ids"]]
    assert len(names) > 100
    lines = tokenize(mamba, tmp_path, file, [data_of(CASES[name]) for name in names], *["--parse-special"] * parse_special)
    wrong = {}
    for name, line in zip(names, lines):
        expected = CASES[name]["ids"][file][-1 if parse_special else 0]
        found = line
        if isinstance(expected, dict):
            found = {"count": len(line.split()), "sha256": hashlib.sha256(line.encode()).hexdigest()}
        if found != expected:
            wrong[name] = (found, expected)
    assert not wrong


def test_special_tokens_are_text_unless_asked_for():
    """Both readings occur in the fixture: without this, a program that ignores --parse-special could pass."""
    for file in (NEOX, "vocab_gpt2.gguf", "vocab_falcon.gguf"):
        assert len(CASES["end of text"]["ids"][file]) == 2 and len(CASES["end of text and a mark"]["ids"][file]) == 2


@pytest.mark.parametrize("file", [f for f in FILES if f != LETTERS])
def test_decoding_gives_the_text_back(mamba, tmp_path, file):
    """Every text that is UTF-8, after normalisation; a broken one with U+FFFD for what is not."""
    names = [name for name, case in CASES.items() if "times" not in case]
    texts = [data_of(CASES[name]) for name in names]
    arguments, expected = [], []
    for i, (data, ids) in enumerate(zip(texts, tokenize(mamba, tmp_path, file, texts))):
        (tmp_path / f"ids{i}").write_text(ids)
        arguments += ["-f", tmp_path / f"ids{i}"]
        text = data.decode("utf-8", errors="replace")
        expected.append(unicodedata.normalize("NFC", text) if file in (NEOX, "vocab_nfc.gguf") else text)
    done = mamba("tokenize", FIXTURES / file, "--decode", *arguments).stdout.decode()
    assert done == "".join(text + "\n" for text in expected)


def test_decode_gives_a_text_for_each_line_of_ids(mamba):
    lines = mamba("tokenize", FIXTURES / NEOX, "-p", "Hello world", "-p", "", "-p", "two  spaces").stdout
    assert lines.count(b"\n") == 3
    assert mamba("tokenize", FIXTURES / NEOX, "--decode", input=lines).stdout == b"Hello world\n\ntwo  spaces\n"


def test_decode_reads_ids_from_files_and_standard_input(mamba, tmp_path):
    (tmp_path / "ids").write_text("12092 1533\n")
    expected = mamba("tokenize", FIXTURES / NEOX, "--decode", "--ids", "12092 1533").stdout
    assert mamba("tokenize", FIXTURES / NEOX, "--decode", "-f", tmp_path / "ids").stdout == expected
    assert mamba("tokenize", FIXTURES / NEOX, "--decode", input=b"12092 1533").stdout == expected


def test_a_text_by_every_way_in(mamba, tmp_path):
    text = b"It's  a\ttext\n"
    (ids,) = tokenize(mamba, tmp_path, NEOX, [text])
    assert mamba("tokenize", FIXTURES / NEOX, "-p", text.decode()).stdout.decode().split() == ids.split()
    assert mamba("tokenize", FIXTURES / NEOX, input=text).stdout.decode().split() == ids.split()
    assert mamba("tokenize", FIXTURES / NEOX, "-f", "-", input=text).stdout.decode().split() == ids.split()
    both = mamba("tokenize", FIXTURES / NEOX, "-p", "a", "-p", text.decode()).stdout.decode().splitlines()
    assert len(both) == 2 and both[1] == ids


def test_empty_text_is_an_empty_line(mamba, tmp_path):
    for file in FILES:
        assert tokenize(mamba, tmp_path, file, [b"", b"A", b""])[::2] == ["", ""]


@pytest.mark.parametrize("ids", ["50277", "-1", "12 4294967296", "99999999999999999999", "7 x", "1.5"])
def test_ids_that_are_none(mamba, ids):
    done = mamba("tokenize", FIXTURES / NEOX, "--decode", "--ids", ids, check=False)
    error = done.stderr.decode()
    assert done.returncode in (1, 2) and done.stdout.strip() == b""
    assert error.startswith("mamba: ") and error.count("\n") == 1 and error.endswith("\n")


def test_a_bad_id_of_a_file_is_found_by_its_line(mamba, tmp_path):
    (tmp_path / "ids").write_text("12092\n1533 x\n")
    done = mamba("tokenize", FIXTURES / NEOX, "--decode", "-f", tmp_path / "ids", check=False)
    assert (done.returncode, done.stdout) == (1, b"Hello\n")
    assert done.stderr.decode() == f'mamba: {tmp_path / "ids"}: line 2: token id "x": expected a number from 0 to 50276\n'


def test_a_file_that_is_not_there(mamba, tmp_path):
    done = mamba("tokenize", FIXTURES / NEOX, "-f", tmp_path / "nothing", check=False)
    assert done.returncode == 1 and b"nothing" in done.stderr and done.stderr.count(b"\n") == 1


def broken_vocabularies():
    """name -> change to a sound vocabulary that makes it unusable, and a word that the error has to say."""
    def set_to(key, value):
        return lambda v: v | {key: value(v) if callable(value) else value}
    return {"a merge of no tokens": (set_to("merges", lambda v: v["merges"] + ["zz qq"]), "zz qq"),
            "a merge without a space": (set_to("merges", lambda v: ["ab"] + v["merges"]), "ab"),
            "an unknown pre-tokenizer": (set_to("pre", "llama3"), "llama3"),
            "an unknown normalizer": (set_to("normalizer", "nfkc"), "nfkc"),
            "fewer types than tokens": (set_to("types", lambda v: v["types"][:-1]), "token_type"),
            "an unknown type": (set_to("types", lambda v: v["types"][:-1] + [77]), "77"),
            "an unknown token out of range": (set_to("unknown", 10 ** 6), "1000000")}


@pytest.mark.parametrize("name", broken_vocabularies())
def test_broken_vocabulary(mamba, tmp_path, name):
    from hf_tokenizer import read_vocabulary, write_vocabulary
    change, word = broken_vocabularies()[name]
    sound = read_vocabulary(FIXTURES / "vocab_gpt2.gguf")
    write_vocabulary(tmp_path / "sound.gguf", sound)
    assert mamba("tokenize", tmp_path / "sound.gguf", "-p", "a").returncode == 0
    write_vocabulary(tmp_path / "broken.gguf", change(sound))
    done = mamba("tokenize", tmp_path / "broken.gguf", "-p", "a", check=False)
    error = done.stderr.decode()
    assert done.returncode == 1 and error.startswith("mamba: ") and error.count("\n") == 1
    assert word in error and "broken.gguf" in error


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_read_in_pieces(mamba, tmp_path, file):
    """Pieces of 65,536 bytes end where white space begins: the ids are those that the text has as a whole, as an argument."""
    rng = random.Random(file)
    parts = [data for data in map(data_of, CASES.values()) if len(data) < 200 and b"\0" not in data]
    for options in ([], ["--parse-special"]) * 4:
        text = b""
        while len(text) < 66_000:
            text += rng.choice(parts) + rng.choice([b"", b"", b" ", b"\n", b"  ", b"\t", "\u3000".encode(), "\u0301".encode()])
        (line,) = tokenize(mamba, tmp_path, file, [text], *options)
        assert line == mamba("tokenize", FIXTURES / file, "-p", os.fsdecode(text), *options).stdout.decode()[:-1]


# Looked up by name: pytest puts a test's parameters into the environment of what it starts.
HOSTILE = {
    "one letter": b"a" * 250_000, "one word of many merges": b"the" * 80_000, "spaces": b" " * 250_000,
    "spaces and a word": b" " * 250_000 + b"x", "digits": b"1" * 250_000, "punctuation": b"." * 250_000,
    "combining marks": b"a" + "\u0345".encode() * 120_000 + "\u0334".encode() * 120_000,
    "marks in turn": b"a" + "\u0345\u0301\u0334".encode() * 80_000, "Hangul": "\u1112\u1161\u11ab".encode() * 50_000,
    "half characters": b"\xf0\x9f\x98" * 80_000, "special tokens": b"<|endoftext|>" * 20_000, "almost special": b"<|" * 120_000}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("file", [NEOX, "vocab_falcon.gguf"])
def test_time_on_hostile_text(mamba, tmp_path, file, name):
    """A quarter of a megabyte of the worst in seconds, which nothing quadratic can do; processor time, as machines are busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    (line,) = tokenize(mamba, tmp_path, file, [HOSTILE[name]], "--parse-special")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 6
    assert len(line) > 0


def test_added_tokens_are_bounded(mamba, tmp_path):
    """Each is looked for wherever its first byte stands: a file may not ask for tens of thousands."""
    for n in (8192, 8193):
        file = vocabulary(tmp_path, ["a", *(f"<{i}>" for i in range(n))], types=[1] + [4] * n)
        done = mamba("tokenize", file, "-p", "a<7>", check=False)
        assert done.stdout == (b"0 8\n" if n == 8192 else b"") and (b"8193 control and user-defined tokens" in done.stderr) == (n == 8193)
