"""Random texts through `mamba tokenize` and, live, through Hugging Face tokenizers: the ids are equal, text by text."""
import random
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT
from hf_tokenizer import build, encode, read_vocabulary, write_vocabulary

TEXTS_PER_KIND, VARIANTS = 300, [("gpt-2", "nfc"), ("gpt-2", "none"), ("falcon", "none"), ("falcon", "nfc")]
MARKS = [chr(c) for c in range(0x300, 0x1F000) if unicodedata.combining(chr(c))]
CANONICAL = [chr(c) for c in range(0xC0, 0x30000) if unicodedata.normalize("NFD", chr(c)) != chr(c) and not 0xAC00 <= c <= 0xD7A3]
SCRIPTS = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE80),
           (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2100, 0x2200), (0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00),
           (0xFF00, 0xFFF0), (0x1D400, 0x1D800), (0x1F300, 0x1F650)]
PIECES = ["def ", "return", "\n", "\n\n", "\r\n", "    ", "\t", " ", "  ", "   ", " " * 26, "(", ")", "[i]", " = ", " == ", "->", "...", "'s", "'ll",
          "'", "\"", "# ", "//", "0x1F", "123", "1", "4567", "3.14", "self", "_name", "CamelCase", "the", " and", " The", "<|endoftext|>",
          "<|padding|>", "<|endof", "ò", "²", "½", "é", "e\u0301", "\u00a0", "\u2028", "\u3000", "<", ">", "\u0338", "$", "{", "}", ";", "\0"]


def code_point(rng):
    while True:
        c = rng.randrange(*rng.choice([(0, 0x800), (0, 0x3000), (0, 0x10000), (0x10000, 0x20000), (0x20000, 0x33480), (0, 0x110000)]))
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def any_code_points(rng):
    return "".join(code_point(rng) for _ in range(rng.randint(1, 60))).encode()


def mixed_scripts(rng):
    out = []
    for _ in range(rng.randint(1, 12)):
        low, high = rng.choice(SCRIPTS)
        out += [chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8))] + [" "] * rng.choice([0, 1, 1, 1, 2, 5])
    return "".join(out).encode()


def marks(rng):
    return "".join(rng.choice(MARKS) if rng.random() < 0.5 else rng.choice(CANONICAL) if rng.random() < 0.4 else
                   unicodedata.normalize("NFD", rng.choice(CANONICAL)) if rng.random() < 0.5 else rng.choice("aeo <>=|'1")
                   for _ in range(rng.randint(1, 40))).encode()


def source_code(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 60))).encode()


def broken_bytes(rng):
    data = bytearray(rng.choice([any_code_points, mixed_scripts, source_code])(rng))
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        change = rng.random()
        if change < 0.3 and len(data) > 1:
            del data[at]
        elif change < 0.7:
            data.insert(at, rng.choice([0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xA0, 0xED, 0x9F, 0xF0, 0x90, 0xF4, 0x8F, 0xF5, 0xFF]))
        else:
            data[at] = rng.randrange(256)
    return bytes(data)


def any_bytes(rng):
    return rng.randbytes(rng.randint(0, 100))


def long_words(rng):
    letters = rng.choice(["a", "ab", "the", "0123456789", "ACGT", "acgtN", ".!?", "\n ", "éò²", "\u1112\u1161\u11ab"])
    return "".join(rng.choice(letters) for _ in range(rng.randint(100, 3000))).encode()


GENERATORS = [any_code_points, mixed_scripts, marks, source_code, broken_bytes, any_bytes, long_words]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """[(path, bytes)], the same for every variant."""
    rng, folder, out = random.Random(20231201), tmp_path_factory.mktemp("texts"), []
    for generator in GENERATORS:
        for i in range(TEXTS_PER_KIND if generator is not long_words else 50):
            out.append((folder / f"{generator.__name__}{i}", generator(rng)))
            out[-1][0].write_bytes(out[-1][1])
    return out


@pytest.fixture(scope="module")
def neox():
    return read_vocabulary(ROOT / "tokenizer.bin")


@pytest.mark.parametrize("pre, normalizer", VARIANTS)
def test_random_texts(mamba, texts, neox, tmp_path, pre, normalizer):
    vocabulary = neox | {"pre": pre, "normalizer": normalizer}
    write_vocabulary(tmp_path / "vocab.gguf", vocabulary)
    arguments = ["tokenize", tmp_path / "vocab.gguf", *(argument for path, _ in texts for argument in ("-f", path))]
    reference = build(vocabulary, False)
    for option in [], ["--parse-special"]:
        reference.encode_special_tokens = not option
        lines = mamba(*arguments, *option).stdout.decode().split("\n")
        assert len(lines) == len(texts) + 1
        wrong = [(path.name, data, line, expected) for (path, data), line in zip(texts, lines)
                 if line != (expected := " ".join(map(str, encode(reference, data))))]
        assert not wrong, f"{len(wrong)} of {len(texts)} texts, the shortest: {min(wrong, key=lambda w: len(w[1]))}"


def test_every_code_point(mamba, neox, tmp_path):
    """Each code point with a letter, a digit and punctuation about it, 256 a text."""
    reference, arguments, expected = build(neox, True), [], []
    for first in range(0, 0x110000, 256):
        text = "".join(f"a{chr(c)}b {chr(c)}1{chr(c)}.{chr(c)}  {chr(c)}\n" for c in range(first, first + 256) if not 0xD800 <= c <= 0xDFFF)
        if not text or first >= 0x40000 and first >> 12 != 0xE0 and first % 0x4000:
            continue  # surrogates; planes where nothing is assigned, or all is private use, give a sample
        (tmp_path / f"{first:06x}").write_bytes(text.encode())
        arguments += ["-f", tmp_path / f"{first:06x}"]
        expected.append(" ".join(map(str, encode(reference, text.encode()))))
    lines = mamba("tokenize", ROOT / "tokenizer.bin", *arguments).stdout.decode().split("\n")
    wrong = [arguments[2 * i + 1].name for i, ids in enumerate(expected) if lines[i] != ids]
    assert len(lines) == len(expected) + 1 and not wrong


def test_unicode_tables_are_what_the_script_prints():
    command = [sys.executable, ROOT / "tests" / "make_unicode.py", "--check", ROOT / "mamba.c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
