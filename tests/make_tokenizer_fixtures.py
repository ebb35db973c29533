#!/usr/bin/env python3
"""Write fixtures/vocab_*.gguf and fixtures/tokenizer_cases.json: texts and the ids that Hugging Face tokenizers gives them.

Ran with tokenizers 0.23.3 and gguf 0.19.0. The vocabularies are small ones made here, and ../tokenizer.bin, whose ids
are those of the published text models. A text is JSON text, or hex where it is not UTF-8 or holds a zero byte; a case
with more than 300 ids keeps their number and hash.
"""
import hashlib
import json
from pathlib import Path

from tokenizers import pre_tokenizers

from hf_tokenizer import CONTROL, NORMAL, USER_DEFINED, build, encode, read_vocabulary, write_vocabulary

TESTS = Path(__file__).resolve().parent
FIXTURES = TESTS / "fixtures"


def alphabet():
    """GPT-2's character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


ALPHABET = alphabet()
assert sorted(ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(words, pre, normalizer, control=(), user_defined=()):
    """A vocabulary of all bytes and of the given words, each reached by merging its bytes from the left."""
    tokens, merges = list(control) + ALPHABET, []
    for word in words:
        spelling = "".join(ALPHABET[b] for b in word.encode())
        for n in range(2, len(spelling) + 1):
            if spelling[:n] not in tokens:
                tokens.append(spelling[:n])
                merges.append(f"{spelling[:n - 1]} {spelling[n - 1]}")
    types = [CONTROL] * len(control) + [NORMAL] * (len(tokens) - len(control)) + [USER_DEFINED] * len(user_defined)
    return {"pre": pre, "tokens": tokens + list(user_defined), "types": types, "merges": merges, "normalizer": normalizer}


WORDS = ("  ", "    ", " the", " a", "the", "aa", "aaaa", "aaaaaaaa", "'s", "'ll", " '", "12", "123", "1234", "23", "45", "00",
         "000", " 1", " 12", "...", "?!", " .", "!!", "ò", "é", "e\u0301", "\u0301", "한국", "\n\n", "\r\n", "\t\t",
          "한", "你好", "👩‍", "½",
         "²3", ">>", "<|")


def vocabularies():
    special, spaces = ["<|endoftext|>", ">>TITLE<<"], [" " * n for n in range(6, 1, -1)]
    letters = ["[UNK]", *"ACGTNacgtn", "é", "한"]
    spell = lambda text: "".join(ALPHABET[b] for b in text.encode())
    return {
        "vocab_gpt2": bpe(WORDS, "gpt-2", "none", special, spaces + ["<|user|>", "naïve"]),
        "vocab_nfc": bpe(WORDS, "gpt-2", "nfc", special, spaces),
        "vocab_falcon": bpe(WORDS, "falcon", "none", special, ["<|user|>"]),
        "vocab_bytes": {"pre": "gpt-2",
          "tokens": ALPHABET, "types": [NORMAL] * 256, "merges": [], "normalizer": "none"},
        "vocab_characters": {"pre": "gpt-2", "tokens": letters[:1] + [spell(c) for c in letters[1:]], "merges": [],
                             "types": [CONTROL] + [NORMAL] * (len(letters) - 1), "normalizer": "none", "unknown": 0},
    }


def texts():
    """{name: bytes} for every vocabulary."""
    t = {"empty": "", "word": "Hello world", "one newline": "\n", "one space": " ", "100 kB of one letter": "a" * 100_000,
         "100 kB of spaces": " " * 100_000, "100 kB of digits": "1234567890" * 10_000}
    for n in range(1, 31):
        t[f"{n} spaces alone"], t[f"{n} spaces before a word"] = " " * n, "x" + " " * n + "the end"
    t |= {"25 to 50 spaces": "".join(" " * n + "|" for n in range(25, 51)),
          "white space mix": "a \n b\t\tc \t\n\n  d\r\n\r\ne\v\ff\n\n\n   \n", "tabs": "\t\ta\t \tb\t",
          "CRLF": "one\r\ntwo\r\n\r\nthree\r\n",
          "spaces at the end": "the end   ", "newlines at the end": "the end\n\n\n",
          "indented code": "if x:\n        y = 1\n\treturn\n",
          "contractions": "it's we're I've I'm you'll he'd don't 'S 'T IT'S 'l 'r 'v '' '",
          "contraction at word start": "'tis 'so 're'll",
          "curly apostrophe": "it\u2019s don\u2019t", "numbers": "3.14159 1,000,000 1234567 12 a1b2 007 1e-10 x123456y",
          "digits of many scripts": "\u0661\u0662\u0663 \u0967\u0968\u0969 \u0e51\u0e52 \uff11\uff12\uff13 \U0001d7d8\U0001d7d9 \u216b \u4e00\u4e8c \U000104a0",
          "number-like letters": "x\u00b2 y\u00b3 \u00b9 \u00bc\u00bd\u00be \u2460 12\u00b2345 \u00f2123 \u00f3\u00b2\u00b3\u00b9",
          "bytes that count as digits": "\u00f2 \u00f3 \u00f9 \u00fc\u00fd\u00fe per\u00f2 citt\u00e0 pi\u00f9 1\u00f22 \u00c2\u00b212345",
          "falcon numbers": "1 12 123 1234 12345 123456 1234567 a123b 1.234,56",
          "punctuation": "Wait... what?! (yes) [no] {a} <b> \"c\" `d` $5 +6 ~ ^ | = @#%&*",
          "Unicode punctuation": "\u00abquoi\u00bb \u2014 \u2026 \u3001\u3002\uff01 \u00a1hola! \u2e4f \U00010100 \u066a \u055a", "symbols": "\u20ac5 \u00a310 \u00b1\u00d7\u00f7 \u2192\u2200\u2203 \u00a9\u00ae\u2122",
          "CJK": "你好，世界。 東京タワー ｶﾞ 한국어 텍스트", "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☺️ 1️⃣ 😀😀",
          "decomposed Hangul": "\u1112\u1161\u11ab\u1100\u116e\u11a8 \uac00\u11a8 \u1100\uac00 \u1161\u11a8 \uac01\u11a8 \u1112\u1161\u11a7",
          "Vietnamese": "Tiê\u0301ng Vie\u0323\u0302t, Tie\u0302\u0301ng Vi\u1ec7t, a\u0302\u0323 a\u0323\u0302",
          "combining marks": "e\u0301 \u0301e a\u0315\u0300\u05ae\u0300\u0062 \u0344 q\u0307\u0323 q\u0323\u0307 \u0301",
          "canonical singletons": "\u212b \u2126 \u212a \uf900 \ufa77 \u2000\u2001 \u1f71 \u0374 \u037e \u0387 \u2329",
          "composition exclusions": "\u0958 \ufb2c \U0001d15e \U0001d160 \u2adc \u0f73 \u0f43 \ufb1d",
          "blocked composition": "\u1100\u0300\u1161 a\u0327\u0323\u0308\u0301 \u0b47\u0300\u0b3e \u09c7\u09be",
          "three-step composition": "\u03b1\u0313\u0301\u0345 \u1fb4 A\u030a\u0301 \u01fa \u1fc4 \u03b7\u0301\u0345",
          "marks before text": "\u0301\u0323abc",
          "U+0085": "a\u0085b \u0085 c", "U+00A0": "a\u00a0b \u00a0c\u00a0\u00a0d", "U+2028": "a\u2028b\u2029c",
          "U+3000": "a\u3000b\u3000\u3000c", "U+180E": "a\u180eb \u180e c",
          "other spaces": "a\u1680b\u2000c\u2009d\u202fe\u205ff\u200bg\ufeffh\u001ci\u001fj",
          "zero bytes": "a\0b\0\0 \0c", "controls": "\x01\x02 \x1b[0m \x7f\x80\x9f",
          "private and unassigned": "\ue000 \U000f0000 \u0378 \ufffe \U0010ffff",
          "end of text": "a<|endoftext|>b <|endoftext|><|endoftext|>\n",
          "end of text and a mark": "<|endoftext|>\u0338 a<|endoftext|>\u0301e",
          "mark and end of text": "e\u0301<|endoftext|>e",
          "almost end of text": "<|endoftext| <|endoftext |> <<|endoftext|>>",
          "special of another kind": "x>>TITLE<< >>TITLE<y",
          "user-defined tokens": "a<|user|>b naïve  nai\u0308ve <|user|>\u0338", "padding": "<|padding|>x",
          "special across spaces": "  <|endoftext|>   a", "DNA": "ACGTNNNNacgtnnnnACGT\nRYK",
          "DNA and others": "AC\u00e9GT \ud55c x",
          "bidirectional": "שלום עולם \u200fabc\u200e مرحبا",
          "source": "for (int i = 0; i < n; ++i) {\n    x[i] += 0x1F; // ok\n}\n",
          "ligatures": "\ufb01 \ufb03 \u01c4 \u1e9e", "Thai, Devanagari": "สวัสดีครับ नमस्ते दुनिया",
          "math letters": "\U0001d400\U0001d4d0 \u2115\u211d",
          "newest letters": "\U000323af \U00031350 \U0001e4d0 \u1c89 \U00010d40"}
    out = {name: text.encode() for name, text in t.items()}
    broken = {"lone continuation": b"a\x80b\xbf\xbf", "overlong": b"\xc0\x80 \xc1\xbf \xe0\x80\x80 \xf0\x80\x80\x80",
          "surrogates": b"\xed\xa0\x80\xed\xbf\xbf x",
              "above U+10FFFF": b"\xf4\x90\x80\x80 \xf5\x80\x80\x80 \xff\xfe",
          "cut short": b"\xc3 \xe2\x82 \xf0\x9f\x98 x", "cut at the end": b"abc\xf0\x9f\x98",
              "cut 3 at the end": b"abc\xe2\x82", "cut 2 at the end": b"abc\xc3",
          "broken by a character": b"\xe2\x82\xc3\xa9\xf0\x9f\xe2\x82\xac",
              "Latin-1": b"caf\xe9 na\xefve", "UTF-16": "hi é".encode("utf-16"),
          "all bytes": bytes(range(256)), "byte order mark": b"\xef\xbb\xbfabc"}
    return out | {f"broken: {name}": data for name, data in broken.items()}


def characters(vocabulary, data):
    """The definition of a vocabulary without merges: whole characters, else their bytes, else the unknown token."""
    ids = {token: i for i, (token, kind) in enumerate(zip(vocabulary["tokens"], vocabulary["types"])) if kind == NORMAL}
    out = []
    for ch in data.decode("utf-8", errors="surrogateescape"):  # a broken byte stays a byte
        spelling = "".join(ALPHABET[b] for b in ch.encode("utf-8", errors="surrogateescape"))
        if spelling in ids:
            out.append(ids[spelling])
        elif all(c in ids for c in spelling):
            out += [ids[c] for c in spelling]
        else:
            out.append(vocabulary["unknown"])
    return out


def expected(ids):
    if len(ids) <= 300:
        return " ".join(map(str, ids))
    return {"count": len(ids), "sha256": hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()}


def main():
    small = vocabularies()
    for name, vocabulary in small.items():
        write_vocabulary(FIXTURES / f"{name}.gguf", vocabulary)
    everything = {"../../tokenizer.bin": read_vocabulary(TESTS.parent / "tokenizer.bin")}
    everything |= {f"{name}.gguf": vocabulary for name, vocabulary in small.items()}
    cases = {}
    for name, data in texts().items():
        valid = b"\0" not in data and data.decode("utf-8", errors="ignore").encode() == data
        long = len(data) > 10_000  # all of these repeat something
        unit = next((data[:n] for n in (1, 10) if data[:n] * (len(data) // n) == data), data) if long else data
        cases[name] = {"text": unit.decode()} if valid else {"hex": unit.hex()}
        cases[name] |= {"times": len(data) // len(unit)} if long else {}
        cases[name]["ids"] = {}
    for file, vocabulary in everything.items():
        plain, special = build(vocabulary, False), build(vocabulary, True)
        for name, data in texts().items():
            if vocabulary["merges"]:
                answers = [expected(encode(plain, data)), expected(encode(special, data))]
            elif file == "vocab_characters.gguf" and ("broken" in name or len(data) > 10_000):
                continue  # how a broken sequence splits into unknown tokens is nobody's definition
            else:
                answers = [expected(characters(vocabulary, data))] * 2
            cases[name]["ids"][file] = answers[:1] if answers[0] == answers[1] else answers
    rows = [f" {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()]
    (FIXTURES / "tokenizer_cases.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
