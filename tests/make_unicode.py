#!/usr/bin/env python3
"""Print the Unicode tables of mamba.c (section 9), as Hugging Face tokenizers sees Unicode.

    make_unicode.py                    print the block
    make_unicode.py --check FILE.c     exit 1 unless the block in FILE.c is what would be printed
    make_unicode.py --update FILE.c    put the block between the markers in FILE.c

Token ids have to equal those of Hugging Face tokenizers, and its parts carry different versions of Unicode: the regular
expressions one, Punctuation an older one, NFC a third. So nothing here comes from a Unicode database: each table is what
the tokenizers package answers when it is asked about every code point. Ran with tokenizers 0.23.3, whose answers give
    \\p{L} 141,028 code points, \\p{N} 1,911, \\s 25, Punctuation 726, canonical decompositions 2,060 besides Hangul.

Format: each table is a C string of numbers. A number is written in 92 digits (the printable characters from '#' to
'~', with ' ' for the backslash and '!' for the question mark, which could begin a trigraph). Its last digit, below 60,
is the rest of a division by 60; digits d of 60 and more come before it and give the quotient in base 32, each as
d - 60 + 1. Signed differences are zigzag-coded.
"""
import argparse
import sys

BEGIN = "// ---- begin of the tables printed by tests/make_unicode.py ----"
END = "// ---- end of the tables printed by tests/make_unicode.py ----"
LAST_DIGITS, MORE_DIGITS = 60, 32      # digits that end a number, digits that continue it
HANGUL = range(0xAC00, 0xD7A4)         # composed and decomposed by arithmetic, not by table
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
SEPARATOR = "\n"                       # a starter that neither composes nor is a letter, number or punctuation


# ---- asking the tokenizers package ----

def matching(make_splitter, separator=SEPARATOR):
    """Code points which the splitter (behaviour `removed`) takes out of a text."""
    splitter, found = make_splitter(), []
    for i in range(0, len(CODE_POINTS), 256):
        chunk = CODE_POINTS[i:i + 256]
        text = separator.join(map(chr, chunk))
        kept = {ch for piece, _ in splitter.pre_tokenize_str(text) for ch in piece}
        found += [c for c in chunk if chr(c) not in kept]
    return found


def normalized(form, strings):
    """Each string in the given normal form; strings are sent many at a time, apart by a separator."""
    out = []
    for i in range(0, len(strings), 1024):
        chunk = strings[i:i + 1024]
        answer = form.normalize_str(SEPARATOR.join(chunk)).split(SEPARATOR)
        if len(answer) != len(chunk):  # the separator itself is in the chunk
            answer = [form.normalize_str(s) for s in chunk]
        out += answer
    return out


def mark_ranks(nfd, decomposition):
    """{code point: rank of its canonical combining class}, 1 the lowest, for every mark that moves.

    Only the order of the classes matters, and swaps show it: NFD swaps two marks when the second has the lower class.
    U+0334 is of the lowest class and U+0345 of the highest, so every other mark moves past one of the two.
    """
    plain = [c for c in CODE_POINTS if c not in decomposition and c not in HANGUL]
    after = normalized(nfd, [chr(c) + "\u0334" for c in plain])
    before = normalized(nfd, ["\u0345" + chr(c) for c in plain])
    marks = [c for c, a, b in zip(plain, after, before) if a[0] != chr(c) or b[0] == chr(c)]

    def order(a, b):
        if nfd.normalize_str(chr(a) + chr(b))[0] != chr(a):
            return 1
        return -1 if nfd.normalize_str(chr(b) + chr(a))[0] == chr(a) else 0

    marks = [c for c in marks if c not in (0x334, 0x345)]
    ladder = [[0x334], [0x345]]        # marks of one class each, classes rising
    for c in marks:
        low, high = 0, len(ladder)
        while low < high:
            middle = (low + high) // 2
            relation = order(c, ladder[middle][0])
            if relation == 0:
                ladder[middle].append(c)
                break
            low, high = (middle + 1, high) if relation > 0 else (low, middle)
        else:
            ladder.insert(low, [c])
    return {c: rank for rank, rung in enumerate(ladder, 1) for c in rung}


def canonical_pairs(nfc, decomposition):
    """Tables of decomposition by one step: [(c, first, last)] that NFC composes again, those it does not, [(c, one)]."""
    composed, excluded, singletons = [], [], []
    by_parts = {parts: c for c, parts in decomposition.items() if len(parts) > 1}
    for c, parts in sorted(decomposition.items()):
        if len(parts) == 1:
            singletons.append((c, ord(parts)))
            continue
        front = nfc.normalize_str(parts[:-1])  # several code points may decompose so; the one that NFC makes is meant
        first = ord(front) if len(front) == 1 else by_parts[parts[:-1]]
        again = nfc.normalize_str(parts) == chr(c)
        assert again == (nfc.normalize_str(chr(first) + parts[-1]) == chr(c)), hex(c)
        (composed if again else excluded).append((c, first, ord(parts[-1])))
    return composed, excluded, singletons


def probe():
    """Everything the tables say, as a dict of name -> list of numbers."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    nfd, nfc = normalizers.NFD(), normalizers.NFC()

    def by_regex(pattern):
        return lambda: pre_tokenizers.Split(Regex(pattern), "removed")

    letters = matching(by_regex(r"\p{L}"))
    numbers = matching(by_regex(r"\p{N}"))
    spaces = matching(by_regex(r"\s"), separator="x")
    punctuation = matching(lambda: pre_tokenizers.Punctuation("removed"))

    parts = dict(zip(CODE_POINTS, normalized(nfd, [chr(c) for c in CODE_POINTS])))
    decomposition = {c: s for c, s in parts.items() if s != chr(c) and c not in HANGUL}
    ranks = mark_ranks(nfd, decomposition)
    composed, excluded, singletons = canonical_pairs(nfc, decomposition)

    # What nfc() in mamba.c relies on.
    below = [chr(c) for c in range(0x300)]
    assert normalized(nfc, below) == below
    assert min(last for _, _, last in composed) >= 0x300 and min(ranks) >= 0x300, "text may be cut before U+0000..U+02FF"
    assert max(ranks.values()) < 64
    composites = normalized(nfc, [chr(c) for c in CODE_POINTS])
    for c, full, short in zip(CODE_POINTS, parts.values(), composites):
        size = len(chr(c).encode())
        assert len(full) <= 2 * size and len(short.encode()) <= 3 * size, hex(c)
    return {
        "UC_LETTER_RANGES": code_ranges(letters), "UC_NUMBER_RANGES": code_ranges(numbers),
        "UC_SPACE_RANGES": code_ranges(spaces), "UC_PUNCT_RANGES": code_ranges(punctuation),
        "UC_MARK_RUNS": code_ranges(sorted(ranks), ranks),
        "UC_COMPOSED": code_tuples(composed), "UC_EXCLUDED": code_tuples(excluded),
        "UC_SINGLETONS": code_tuples(singletons),
    }, f"{len(composed)}, {len(excluded)} and {len(singletons)} entries"


# ---- coding ----

def code_ranges(points, value_of=None):
    """Runs of consecutive code points with one value: gap since the last run, length - 1 and, if there are any, value."""
    numbers, end, i = [], 0, 0
    while i < len(points):
        j = i + 1
        while j < len(points) and points[j] == points[i] + j - i and (
                value_of is None or value_of[points[j]] == value_of[points[i]]):
            j += 1
        numbers += [points[i] - end, j - i - 1] + ([] if value_of is None else [value_of[points[i]]])
        end, i = points[i] + j - i, j
    return numbers


def zigzag(n):
    return 2 * n if n >= 0 else -2 * n - 1


def code_tuples(rows):
    """Each column as differences from the row above."""
    numbers, above = [], (0,) * 3
    for row in rows:
        numbers += [zigzag(a - b) for a, b in zip(row, above)]
        above = row
    return numbers


def digits(number):
    rest, last = divmod(number, LAST_DIGITS)
    out = [last]
    while rest:
        rest, more = divmod(rest - 1, MORE_DIGITS)
        out.append(LAST_DIGITS + more)
    return "".join({"\\": " ", "?": "!"}.get(chr(35 + d), chr(35 + d)) for d in reversed(out))


def block():
    tables, sizes = probe()
    lines = [BEGIN,
             "// Ranges: gap, length - 1. UC_MARK_RUNS adds the rank of the combining class. The last three hold canonical",
             f"// decompositions by one step, {sizes}, the first of them what NFC composes again."]
    for name, numbers in tables.items():
        text = "".join(map(digits, numbers))
        rows = [text[i:i + 114] for i in range(0, len(text), 114)]
        lines.append(f"static const char {name}[] =")
        lines += [f'    "{row}"' for row in rows]
        lines[-1] += ";"
    return "\n".join(lines + [END]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="FILE.c")
    parser.add_argument("--update", metavar="FILE.c")
    args = parser.parse_args()
    path = args.check or args.update
    if path is None:
        sys.stdout.write(block())
        return 0
    with open(path, encoding="utf-8") as f:
        source = f.read()
    begin, end = source.find(BEGIN), source.find(END)
    if begin < 0 or end < begin:
        sys.exit(f"make_unicode.py: {path}: no lines '{BEGIN}' and '{END}'")
    end += len(END) + 1
    wanted = block()
    if args.update:
        with open(path, "w", encoding="utf-8") as f:
            f.write(source[:begin] + wanted + source[end:])
        return 0
    if source[begin:end] != wanted:
        sys.exit(f"make_unicode.py: {path}: the Unicode tables are not what this script prints; run it with --update")
    print(f"{path}: the Unicode tables are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
