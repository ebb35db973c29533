"""Regions of BED and variants of VCF: what a run on their bases alone gives; corner cases of both files."""
import os
import random
import subprocess

import pytest

from conftest import PROGRAM, run_mamba
from nucleotides import fasta, ids, model, own_scores, reverse_complement, rows, some_bases, vocabulary, write  # noqa: F401: model is a fixture

GENOME = {"chr1": some_bases(3000, 1), "chr2": some_bases(101, 2, "ACGTacgtN"), "short": "A", "empty": "", "last": some_bases(240, 3)}


def bed(tmp_path, *regions, name="r.bed"):
    path = tmp_path / name
    path.write_text("".join("\t".join(map(str, r)) + "\n" for r in regions))
    return path


# ---- BED ----

@pytest.mark.parametrize("layout", [{}, {"width": 7}, {"width": 10 ** 6}, {"end": "\r\n"}, {"last": False}, {"width": 80, "end": "\r\n", "last": False},
                                    {"end": " \n"}, {"width": 7, "end": " \t\r\n", "last": False}])
def test_regions(mamba, model, tmp_path, layout):
    """In the order of the file: unsorted, overlapping, twice, at both ends, over the end (cut there, as samtools does), of no base."""
    path = fasta(tmp_path, write(GENOME, **layout))
    spans = [("last", 0, 240), ("chr1", 0, 1), ("chr1", 0, 60), ("chr1", 59, 61), ("chr1", 2990, 3000), ("chr1", 2990, 4000), ("chr2", 30, 101),
             ("chr1", 100, 700), ("chr1", 650, 1300), ("chr1", 100, 700), ("short", 0, 1), ("chr1", 5, 5), ("empty", 0, 0)]
    table = rows(mamba("score", model, "--fasta", path, "--bed", bed(tmp_path, *spans)).stdout)
    assert len(table) == len(spans)
    for row, (name, a, b) in zip(table, spans):
        bases = GENOME[name][a:b]
        scores = own_scores(mamba, model, bases) if bases else {}
        assert row[0] == f"{name}:{a + 1}-{a + len(bases)}" and int(row[1]) == len(scores)
        assert abs(float(row[2]) + sum(scores.values())) < 1e-5 * max(1, len(scores))


def test_layout_of_bed(mamba, model, tmp_path):
    """Tabs or blanks, more columns, comments, browser lines, CRLF, empty lines, no end of the last line; from a pipe."""
    path = fasta(tmp_path, write(GENOME))
    text = b"track name=x\nbrowser position chr1:1-10\n# a comment\nchr1\t0\t10\tname\t0\t-\r\n\nchr1 10  20\nlast\t3\t9"
    done = mamba("score", model, "--fasta", path, "--bed", "-", input=text)
    assert [row[0] for row in rows(done.stdout)] == ["chr1:1-10", "chr1:11-20", "last:4-9"]
    (tmp_path / "x.bed").write_bytes(text)
    assert mamba("score", model, "--fasta", path, "--bed", tmp_path / "x.bed", "-np", 1, "-ub", 3).stdout == done.stdout


def test_bad_lines_of_bed(mamba, model, tmp_path):
    """File and line number; the others are scored, and the exit status tells."""
    path = fasta(tmp_path, write(GENOME))
    regions = [("chr1", 0, 10), ("chrX", 0, 10), ("chr1", 5), ("chr1", -5, 10), ("chr1", 10, 5), ("chr1", 3000, 3001), ("chr1", "a", "b"),
               ("chr1", "", 0, 5), ("chr1", 0, 2 ** 64), ("chr1", 2 ** 62, 2 ** 63 - 1), ("chr1", 5000, 5000), ("chr1", 2 ** 63 - 1, 2 ** 63 - 1), ("last", 1, 3)]
    done = mamba("score", model, "-q", "--fasta", path, "--bed", bed(tmp_path, *regions), check=False)
    assert done.returncode == 1 and [row[0] for row in rows(done.stdout)] == ["chr1:1-10", "last:2-3"]
    lines = done.stderr.decode().splitlines()
    assert [line.split(":")[2] for line in lines] == [f" line {i}" for i in range(2, 13)]
    assert "no record chrX" in lines[0] and "three columns" in lines[1] and "chr1, which has 3000" in lines[4]


def test_an_empty_region_behind_the_end(mamba, model, tmp_path):
    """It has no bases, with more of the file behind its record."""
    path = fasta(tmp_path, write({"a": "ACGT" * 15, "b": some_bases(100000)}))
    for more in ([], ["--window", 50]):
        done = mamba("score", model, "-q", "--fasta", path, "--bed", bed(tmp_path, ("a", 61, 61), ("a", 60, 60), ("b", 0, 5)), *more, check=False)
        assert done.returncode == 1 and b"begins at base 61 of a, which has 60" in done.stderr and rows(done.stdout)[-1][0] == "b:1-5"


def test_records_that_look_like_comments(mamba, model, tmp_path):
    path = fasta(tmp_path, write({"track1": "ACGT", "browser_x": "ACG"}))
    done = mamba("score", model, "--fasta", path, "--bed", bed(tmp_path, ("track", "x"), ("track1", 0, 4), ("browser_x", 0, 3)))
    assert [row[0] for row in rows(done.stdout)] == ["track1:1-4", "browser_x:1-3"]


def test_commands_and_windows_of_regions(mamba, model, tmp_path):
    path, regions = fasta(tmp_path, write(GENOME)), bed(tmp_path, ("chr1", 100, 350), ("last", 10, 60))
    table = rows(mamba("score", model, "--fasta", path, "--bed", regions, "--window", 100).stdout)
    assert [row[0] for row in table] == ["chr1:101-200", "chr1:201-300", "chr1:301-350", "last:11-60"]
    alone = rows(mamba("score", model, *sum((["--ids", ids(b)] for b in (GENOME["chr1"][100:200], GENOME["chr1"][200:300], GENOME["chr1"][300:350],
                                                                         GENOME["last"][10:60])), [])).stdout)
    assert [row[1:] for row in table] == [row[1:] for row in alone]
    mamba("embed", model, "--fasta", path, "--bed", regions, "-o", tmp_path / "r.npy")
    mamba("embed", model, "--ids", ids(GENOME["chr1"][100:350]), "--ids", ids(GENOME["last"][10:60]), "-o", tmp_path / "i.npy")
    assert (tmp_path / "r.npy").read_bytes() == (tmp_path / "i.npy").read_bytes()
    for more in ([], ["--rc-average"]):
        mamba("score", model, "--fasta", path, "--bed", regions, "--track", tmp_path / "t", *more)
        places = [line.split("\t")[:2] for line in (tmp_path / "t").read_text().splitlines()[1:]]
        first = 0 if more else 1
        assert places == [["chr1", str(i)] for i in range(100 + first, 350)] + [["last", str(i)] for i in range(10 + first, 60)]


def test_a_long_region_is_read_in_pieces(mamba, model, tmp_path):
    bases = some_bases(70001)
    path = fasta(tmp_path, write({"long": bases}))
    table = rows(mamba("score", model, "--fasta", path, "--bed", bed(tmp_path, ("long", 0, 5), ("long", 17, 60017), ("long", 100, 200))).stdout)
    cut = fasta(tmp_path, write({"a": bases[:5], "b": bases[17:60017], "c": bases[100:200]}), "cut.fa")
    assert [row[1:] for row in table] == [row[1:] for row in rows(mamba("score", model, "--fasta", cut).stdout)]


@pytest.mark.parametrize("name", ["a" * n for n in range(1, 7)])
def test_blanks_where_a_piece_of_the_file_ends(mamba, model, tmp_path, name):
    """Lines of 4096 bytes, so that a piece of 64 KiB ends between the letters and the blanks, or in them."""
    bases = some_bases(80000)
    path, regions = fasta(tmp_path, write({name: bases}, width=4092, end=" \t \n")), bed(tmp_path, (name, 65000, 65500), (name, 79000, 80000))
    cut = fasta(tmp_path, write({"x": bases[65000:65500], "y": bases[79000:]}), "cut.fa")
    of_regions, whole = (rows(mamba("score", model, "--fasta", *options).stdout) for options in ([path, "--bed", regions], [cut]))
    assert [row[1:] for row in of_regions] == [row[1:] for row in whole]


def test_a_last_line_may_end_in_its_own_way(mamba, model, tmp_path):
    """samtools faidx a:6-8 says CGT."""
    path = fasta(tmp_path, ">a\nACGT \nACGT \nAC\n")
    done = mamba(model, "-q", "--fasta", path, "--bed", bed(tmp_path, ("a", 5, 8), ("a", 7, 99)), "-n", 0, "--echo")
    assert done.stdout == b">a:6-8\nCGT\n>a:8-10\nTAC\n"


@pytest.mark.parametrize("content, words", [
    (b">a\nACGT\n>b\nAC\nACGT\n", "line 2: x.fa: record b: its lines differ in length"), (b">b\nACGT\n\nACGT\n", "record b: its lines differ"),
    (b">b\n\nACGT\n", "record b: its lines differ"), (b">b\nACGT\r\nACGT\nAC\n", "record b: its lines differ"),
    (b">b\nAC GT\nACGTA\n", "have blanks inside"), (b">b\nACGT \nACGT\nA\n", "record b: its lines differ"), (b">b\nACGX\n", "record b: 'X' at base 4"), (b">b\nAC\n>b\nAC\n", "two records have the name b"),
    (b">b\rAC\rAC\r", "as on old Macs"), (b">b\nAC\r>c\nAC\n", "as on old Macs"), (b"ACGT\n", "begins with 'A'"), (b"", "no record b")])
def test_files_without_regions(mamba, model, tmp_path, content, words):
    fasta(tmp_path, content)
    regions = bed(tmp_path, ("# one line",), ("b", 0, 4))
    done = subprocess.run([PROGRAM, "score", model, "-q", "--fasta", "x.fa", "--bed", regions], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and words in done.stderr.decode() and done.stderr.count(b"\n") == 1 and rows(done.stdout) == []


def test_records_that_no_region_is_of_do_no_harm(mamba, model, tmp_path):
    """One is irregular, two have one name."""
    path = fasta(tmp_path, ">a\nACGT\nA\nACG\n>b\nGATTACA\nGATT\n>c\nAC\n>c\nA\n")
    table = rows(mamba("score", model, "--fasta", path, "--bed", bed(tmp_path, ("b", 5, 9))).stdout)
    assert table[0][1:] == rows(mamba("score", model, "--ids", ids("CAGA")).stdout)[0][1:]


def test_a_pipe_has_no_regions(mamba, model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    regions = bed(tmp_path, ("a", 0, 1))
    done = subprocess.run(["bash", "-c", f"printf '>a\\nACGT\\n' | '{PROGRAM}' score '{model}' -q --fasta /dev/stdin --bed '{regions}'"], capture_output=True)
    assert done.returncode == 1 and b"is a pipe" in done.stderr


def test_compressed_lines(mamba, model, tmp_path):
    path = fasta(tmp_path, write(GENOME))
    for option in ("--bed", "--vcf"):
        done = mamba("score", model, "-q", "--fasta", path, option, "-", input=b"\x1f\x8b\x08\0\0\n", check=False)
        assert done.returncode == 1 and f"FILE | mamba ... {option} -" in done.stderr.decode()


# ---- VCF ----

HEADER = ["##fileformat=VCFv4.2", "##contig=<ID=chr1,length=3000>", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
COLUMNS = f"{HEADER[-1]}\n".encode()


def vcf(tmp_path, *variants, header=HEADER, end="\n"):
    """variants: (chrom, pos, ref, alt) or with an INFO and more columns."""
    lines = [*header]
    for i, (chrom, pos, ref, alt, *rest) in enumerate(variants):
        lines.append("\t".join([chrom, str(pos), f"v{i}", ref, alt, ".", "PASS", *(rest or ["."])]))
    path = tmp_path / "x.vcf"
    path.write_text(end.join(lines) + end, newline="")
    return path


def entries(stdout):
    """[{key: value}] of INFO."""
    lines = [line.split("\t") for line in stdout.decode().splitlines() if not line.startswith("#")]
    return [dict(item.partition("=")[::2] for item in line[7].split(";")) for line in lines]


def other(base, k=0):
    return [b for b in "ACGT" if b != base.upper()][k]


def expected_ratio(mamba, model, bases, pos, ref, alt, window, both):
    """The definition: two full passes over the window, one with each allele. pos from 1."""
    at = pos - 1
    begin = min(at, max(0, at + len(ref) // 2 - window // 2))
    end = min(len(bases), max(at + len(ref), at + len(ref) // 2 - window // 2 + window))
    texts = [bases[begin:at] + allele + bases[at + len(ref):end] for allele in (ref, alt)]
    strands = [str.upper] + [reverse_complement] * both
    total = [sum(sum(own_scores(mamba, model, strand(text)).values()) for strand in strands) for text in texts]
    return (total[1] - total[0]) / len(strands)


@pytest.mark.parametrize("window, both", [(None, False), (64, False), (64, True), (65, True), (3, False), (4, False)])
def test_ratios(mamba, model, tmp_path, window, both):
    """SNVs, insertions, deletions, several alleles; in the middle, at both ends, over a line's end."""
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    at = lambda pos, n=1: bases[pos - 1:pos - 1 + n]
    variants = [(1500, at(1500), other(at(1500))), (61, at(61), other(at(61), 1)), (1, at(1), other(at(1))), (3000, at(3000), other(at(3000))),
                (700, at(700), at(700) + "GATTACA"), (800, at(800, 3), at(800)), (2999, at(2999, 2), at(2999) + "TT"), (1, at(1, 2), at(1)),
                (900, at(900), f"{other(at(900))},{at(900)}A,{other(at(900), 2)}"), (1500, at(1500).lower(), other(at(1500)).lower())]
    options = [*(["--window", window] if window else []), *["--rc-average"] * both]
    done = mamba("score", model, "--fasta", path, "--vcf", vcf(tmp_path, *(("chr1", *v) for v in variants)), *options)
    found = entries(done.stdout)
    assert len(found) == len(variants)
    for (pos, ref, alts), info in zip(variants, found):
        for alt, ratio in zip(alts.split(","), info["MAMBA_LLR"].split(","), strict=True):
            assert abs(float(ratio) - expected_ratio(mamba, model, bases, pos, ref, alt, window or 1024, both)) < 1e-4, (pos, ref, alt)
    for more in (["-np", 1], ["-np", 3, "-ub", 7], ["-t", 1]):
        assert mamba("score", model, "--fasta", path, "--vcf", tmp_path / "x.vcf", *options, *more).stdout == done.stdout
    if window != 64 or both:
        return
    prefixed = mamba("score", model, "--fasta", path, "--vcf", tmp_path / "x.vcf", "--window", 64, "--prefix", "ACGTTG")
    found = float(entries(prefixed.stdout)[0]["MAMBA_LLR"])
    texts = ["ACGTTG" + bases[1467:1499] + base + bases[1500:1531] for base in (bases[1499], variants[0][2])]
    total = [sum(v for p, v in own_scores(mamba, model, text).items() if p >= 6) for text in texts]
    assert abs(found - (total[1] - total[0])) < 1e-4


def test_an_n_is_not_scored(mamba, model, tmp_path):
    bases = GENOME["chr2"]
    path = fasta(tmp_path, write(GENOME))
    pos = next(i for i in range(20, 80) if bases[i] not in "Nn" and "N" in bases[i + 1:i + 30].upper()) + 1
    done = mamba("score", model, "--fasta", path, "--vcf", vcf(tmp_path, ("chr2", pos, bases[pos - 1], other(bases[pos - 1]))))
    expected = expected_ratio(mamba, model, bases, pos, bases[pos - 1], other(bases[pos - 1]), 1024, False)
    assert abs(float(entries(done.stdout)[0]["MAMBA_LLR"]) - expected) < 1e-4


def test_what_gets_no_ratio(mamba, model, tmp_path):
    """A word in MAMBA_ERROR and a line on standard error; symbolic alleles just have none."""
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    a = bases[99]
    variants = [("chr1", 100, other(a), a), ("chrX", 5, "A", "C"), ("chr1", 3001, "A", "C"), ("chr1", 3000, bases[2999] + "A", "C"), ("chr1", 0, "N", "A"),
                ("chr1", 101, bases[100:141], "A"), ("chr1", 100, "<X>", "A"), ("chr1", 100, a, "<DEL>"), ("chr1", 100, a, "*," + other(a)),
                ("chr1", 100, a, "."), ("chr1", 100, a, f"{a}[chr2:3["), ("chr1", 2 ** 62, "A", "C")]
    path_vcf = vcf(tmp_path, *variants)
    done = mamba("score", model, "-q", "--fasta", path, "--vcf", path_vcf, "--window", 40, check=False)
    found = entries(done.stdout)
    assert done.returncode == 1 and [info.get("MAMBA_ERROR") for info in found] == [
        "REF_MISMATCH", "NO_REFERENCE", "OUT_OF_RANGE", "OUT_OF_RANGE", "OUT_OF_RANGE", "TOO_LONG", "BAD_REF", None, None, None, None, "OUT_OF_RANGE"]
    assert all(info["MAMBA_LLR"] == "." for info in found[:8]) and found[8]["MAMBA_LLR"].startswith(".,") and "MAMBA_LLR" not in found[9]
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 8 and f"{path_vcf}: line 4: chr1:100: REF is {other(a)}, but {path} has {a} there" in lines[0]
    table = rows(mamba("score", model, "-q", "--fasta", path, "--vcf", path_vcf, "--window", 40, "--tsv", check=False).stdout)
    assert [row[6] for row in table] == ["REF_MISMATCH", "NO_REFERENCE", "OUT_OF_RANGE", "OUT_OF_RANGE", "OUT_OF_RANGE", "TOO_LONG", "BAD_REF", *"....",
                                         "OUT_OF_RANGE"]
    assert table[0][:5] == ["chr1", "100", "v0", other(a), a] and [row[4] for row in table[8:10]] == ["*", other(a)] and float(table[9][5])


def test_an_allele_with_other_letters_has_no_ratio(mamba, model, tmp_path):
    """A term would be missing on one side only. Lines on which nothing is to be rated are not looked up."""
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    a = bases[99]
    variants = [("chr1", 100, a, f"N,{other(a)},R,{a}N,U"), ("chr1", 100, "N", "<DEL>"), ("nowhere", 7, "A", "."), ("chr1", 100, other(a), "<NON_REF>"),
                ("chr1", 100, a + "N", a)]
    done = mamba("score", model, "-q", "--fasta", path, "--vcf", vcf(tmp_path, *variants), check=False)
    found = entries(done.stdout)
    assert [v == "." for v in found[0]["MAMBA_LLR"].split(",")] == [True, False, True, True, True]
    assert [info.get("MAMBA_ERROR") for info in found] == [None, None, None, None, "BAD_REF"] and done.stderr.count(b"\n") == 1


def test_comments_in_a_header(mamba, model, tmp_path):
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    header = [HEADER[0], "# a comment", *HEADER[1:]]
    done = mamba("score", model, "--fasta", path, "--vcf", vcf(tmp_path, ("chr1", 9, bases[8], other(bases[8])), header=header)).stdout.decode()
    lines = done.splitlines()
    assert lines[:3] == header[:3] and done.count("##INFO") == 2 and lines[5] == header[3]
    done = mamba("score", model, "-q", "--fasta", path, "--vcf", "-", input=b"# a comment\nchr1\t9\t.\tA\tC\t.\t.\t.\n", check=False)
    assert done.returncode == 1 and b"no line #CHROM" in done.stderr


def test_a_zero_byte_in_a_sample(mamba, model, tmp_path):
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    line = f"chr1\t9\t.\t{bases[8]}\t{other(bases[8])}\t.\t.\t.\tGT\ta\0b\tc\n".encode()
    done = mamba("score", model, "--fasta", path, "--vcf", "-", input=COLUMNS + line)
    assert done.stdout.endswith(b"\tGT\ta\0b\tc\n")


def test_the_file_stays_as_it_is(mamba, model, tmp_path):
    """Header lines, other entries, samples; CRLF becomes LF; a second run replaces its own entries."""
    path, bases = fasta(tmp_path, write(GENOME)), GENOME["chr1"]
    header = [*HEADER[:2], '##INFO=<ID=DP,Number=1,Type=Integer,Description="depth">', HEADER[2] + "\tFORMAT\tone\ttwo"]
    more = ["GT:DP", "0/1:3", "1|1:4"]
    variants = [("chr1", 50 + i, bases[49 + i], other(bases[49 + i]), info, *more)
                for i, info in enumerate(["DP=3", ".", "DP=3;SOMATIC", "MAMBA_LLR=7;DP=2", "DP=2;MAMBA_LLR=7;MAMBA_ERROR=X;MAMBA_LLRS=1"])]
    first = mamba("score", model, "--fasta", path, "--vcf", vcf(tmp_path, *variants, header=header, end="\r\n")).stdout.decode()
    lines = first.splitlines()
    assert "\r" not in first and lines[:3] == header[:3] and lines[5] == header[3] and all(line.startswith("##INFO=<ID=MAMBA_") for line in lines[3:5])
    columns = [line.split("\t") for line in lines[6:]]
    assert [c[7].split("MAMBA_LLR=")[0] for c in columns] == ["DP=3;", "", "DP=3;SOMATIC;", "DP=2;", "DP=2;MAMBA_LLRS=1;"]
    assert all(c[8:] == more and c[:2] == ["chr1", str(50 + i)] for i, c in enumerate(columns))
    assert mamba("score", model, "--fasta", path, "--vcf", "-", input=first.encode()).stdout.decode() == first


@pytest.mark.parametrize("text, words, status", [
    (b"chr1\t5\t.\tA\tC\t.\t.\t.\n", "no line #CHROM came before it", 1), (COLUMNS + b"chr1\t5\t.\tA\tC\n", "line 2: 5 columns between tabs", 1),
    (COLUMNS + b"chr1\tx\t.\tA\tC\t.\t.\t.\n", 'line 2: POS "x"', 1), (COLUMNS + b"chr1\t5\t.\tA\t\t.\t.\t.\n", "line 2: column 5 is empty", 1),
    (b"", "no line #CHROM; expected a VCF", 1), (b"##fileformat=VCFv4.2\n", "no line #CHROM; expected a VCF", 1), (COLUMNS + b"\n", "", 0),
    (b"\xef\xbb\xbf" + COLUMNS + b"\n", "", 0), (COLUMNS.replace(b"\t", b" "), "line 1: fewer than 8 columns", 1)])
def test_bad_lines_of_vcf(mamba, model, tmp_path, text, words, status):
    path = fasta(tmp_path, write(GENOME))
    done = mamba("score", model, "-q", "--fasta", path, "--vcf", "-", input=text, check=False)
    assert done.returncode == status and words in done.stderr.decode() and done.stderr.count(b"\n") == status


def test_alleles_in_lower_case_are_not_all_the_same(mamba, model, tmp_path):
    """To a vocabulary of capitals they would all be N, and every ratio 0."""
    path = fasta(tmp_path, write({"x": "acgtacgt"}))
    done = mamba("score", model, "--fasta", path, "--vcf", vcf(tmp_path, ("x", 2, "C", "G")), "--case-sensitive", check=False)
    assert (done.returncode, done.stdout) == (1, b"") and b"the vocabulary has no lower case" in done.stderr


def test_variants_in_a_soft_masked_reference(mamba, model, tmp_path):
    """With --case-sensitive an allele has the case of the base it stands on, whatever the VCF's is."""
    letters, options = vocabulary(tmp_path, list("ACGTNacgtn")), ["--case-sensitive", "--tokenizer"]
    path = fasta(tmp_path, write({"a": "ACGTACGTaacgtaacgtACGTAC"}))
    variants = vcf(tmp_path, *[("a", 12, ref, alt) for ref, alt in (("G", "A"), ("g", "a"), ("G", "ATT"), ("gtA", "c"))])
    table = rows(mamba("score", model, "--fasta", path, "--vcf", variants, "--tsv", *options, letters).stdout)
    windows = fasta(tmp_path, write({"ref": "ACGTACGTaacgtaacgtACGTAC", "a": "ACGTACGTaacataacgtACGTAC", "att": "ACGTACGTaacatttaacgtACGTAC",
                                     "c": "ACGTACGTaaccacgtACGTAC"}), name="w.fa")
    nll = {row[0]: float(row[2]) for row in rows(mamba("score", model, "--fasta", windows, *options, letters).stdout)}
    for row, name in zip(table, ("a", "a", "att", "c")):
        assert abs(float(row[5]) - (nll["ref"] - nll[name])) < 1e-4


def test_many_variants(mamba, model, tmp_path):
    """More than run at once, on both strands, with many alleles each: the same bytes whatever -np; memory for those that run."""
    rng, bases = random.Random(5), GENOME["chr1"]
    variants = []
    for _ in range(300):
        pos = rng.randrange(1, 3000)
        ref = bases[pos - 1:pos - 1 + rng.randrange(1, 4)]
        alts = {some_bases(rng.randrange(1, 6), rng.random()) for _ in range(rng.randrange(1, 25))} - {ref}
        variants.append(("chr1", pos, ref, ",".join(sorted(alts)) or "."))
    path, path_vcf = fasta(tmp_path, write(GENOME)), vcf(tmp_path, *variants)
    runs = {run_mamba("score", model, "--fasta", path, "--vcf", path_vcf, "--window", 50, "--rc-average", *more).stdout
            for more in ([], ["-np", 1], ["-np", 2, "-ub", 3], ["-np", 100])}
    assert len(runs) == 1 and len(entries(runs.pop())) == 300


@pytest.mark.parametrize("options, words", [
    (["--bed", "x"], "--bed needs --fasta"), (["--vcf", "x"], "--vcf needs --fasta"), (["--fasta", "x", "--bed", "y", "--vcf", "z"], "--bed does not apply"),
    (["--fasta", "x", "--tsv"], "--tsv needs --vcf"), (["--fasta", "x", "--vcf", "y", "--window", 1], "--vcf needs a --window of 2"), (["--fasta", "x", "--vcf", "y", "--track", "z"], "--track does not apply"),
    (["--fasta", "x", "--vcf", "y", "--window", 5, "--stride", 5], "--stride does not apply"), (["--fasta", "-", "--bed", "y"], "not --fasta -")])
def test_wrong_combinations(mamba, model, options, words):
    done = mamba("score", model, *options, check=False)
    assert done.returncode == 2 and words in done.stderr.decode()
