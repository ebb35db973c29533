"""FASTA in, scores and embeddings out: each record, window and strand gives what a run on its token ids gives."""
import io
import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

from conftest import FIXTURES, PROGRAM, ROOT
from nucleotides import ID, checkpoint, fasta, ids, model, own_scores, reverse_complement, rows, some_bases, vocabulary, write  # noqa: F401: model is a fixture


def test_vocabulary(mamba, model):
    reader = gguf.GGUFReader(model)
    assert reader.fields["tokenizer.ggml.tokens"].contents()[:12] == ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]
    assert reader.fields["mamba.tokenizer.normalizer"].contents() == "dna"
    assert mamba("tokenize", model, "-p", "ACGTN acgtn\nRYswU").stdout == b"7 8 9 10 11 7 8 9 10 11 11 11 11 11 10\n"
    assert mamba("tokenize", model, "-p", "AcX", "--case-sensitive").stdout == b"7 6 6\n"
    assert mamba("tokenize", model, "--ids", "7 8 9 10 11", "--decode").stdout == b"ACGTN\n"
    assert mamba("tokenize", model, "-p", "[CLS]a c[SEP]", "--parse-special").stdout == b"0 7 8 1\n"
    assert mamba("tokenize", model, "-p", "a[SEP]").stdout == b"7 6 11 6 6 6\n"  # S is G or C


def test_generate_writes_letters(mamba, model):
    out = mamba(model, "-p", "ACGT", "-n", 40, "-s", 1, "-q", "--ignore-eos").stdout.decode()
    assert out and set(out) <= set("ACGTN")


def letters(text):
    """{name: bases} of FASTA; no line has more than 60."""
    records = {}
    for part in text.decode().split(">")[1:]:
        name, *lines = part.splitlines()
        assert all(len(line) == 60 for line in lines[:-1]) and (not lines or 0 < len(lines[-1]) <= 60)
        records[name] = "".join(lines)
    return records


def test_generate_writes_fasta(mamba, model, tmp_path):
    """The letters that plain output has, in lines of 60; a record for each record of --fasta, on standard output or in a file."""
    options = ["-s", 3, "-n", 150, "--ignore-eos", "-q"]
    plain = mamba(model, "-p", "ACGT", *options).stdout.decode()
    assert len(plain) == 150 and mamba(model, "-p", "ACGT", *options, "--fasta-out", tmp_path / "o.fa").stdout == b""
    assert letters((tmp_path / "o.fa").read_bytes()) == {"1": plain}
    texts = {"one": "ACGT", "two": some_bases(100), "long": some_bases(20000), "last": "GG"}
    path = fasta(tmp_path, write(texts))
    out = mamba(model, "--fasta", path, *options, "--echo").stdout
    assert letters(out) == {name: mamba(model, "-p", text, *options, "--echo").stdout.decode() for name, text in texts.items()}
    assert mamba(model, "--fasta", path, *options, "--echo", "--fasta-out", "-", "-np", 1, "-ub", 9).stdout == out
    (tmp_path / "r.bed").write_text("long\t5\t90\none\t0\t2\n")
    regions = letters(mamba(model, "--fasta", path, "--bed", tmp_path / "r.bed", *options).stdout)
    assert regions == {name: mamba(model, "-p", text, *options).stdout.decode() for name, text in
                       (("long:6-90", texts["long"][5:90]), ("one:1-2", "AC"))}


def test_fasta_holds_letters(mamba, model):
    """What the prompt had besides is N there."""
    (record,) = letters(mamba(model, "-p", "ACGXT", "--echo", "-n", 4, "--fasta-out", "-").stdout).values()
    assert record.startswith("ACGNT") and set(record) <= set("ACGTN")


def test_a_record_that_cannot_be_continued(mamba, model, tmp_path):
    """On standard output the others are there; a file is whole or is not written."""
    path = fasta(tmp_path, ">a\nACGT\n>b\nACX\n>c\nAC\n")
    done = mamba(model, "-q", "--fasta", path, "-n", 5, "--ignore-eos", check=False)
    assert done.returncode == 1 and list(letters(done.stdout)) == ["a", "c"]
    done = mamba(model, "-q", "--fasta", path, "-n", 5, "--fasta-out", tmp_path / "o.fa", check=False)
    assert done.returncode == 1 and not (tmp_path / "o.fa").exists() and f"{tmp_path / 'o.fa'}: not written, because 1 failed" in done.stderr.decode()


def test_an_empty_record_cannot_be_continued(mamba, model, tmp_path):
    """Its vocabulary has no token to begin with; the record is named."""
    no_start = vocabulary(tmp_path, list("ACGTN"))
    path = fasta(tmp_path, ">a\nACGT\n>b\n>c\nAC\n")
    done = mamba(model, "-q", "--tokenizer", no_start, "--fasta", path, "-n", 5, check=False)
    assert done.returncode == 1 and list(letters(done.stdout)) == ["a", "c"] and f"{path}: record b is empty" in done.stderr.decode()


def test_words_are_no_fasta(mamba):
    done = mamba(ROOT / "models" / "tales.bin", "-p", "Once", "--fasta-out", "-", check=False)
    assert done.returncode == 1 and b"single letters" in done.stderr


@pytest.mark.parametrize("options", [["--fasta", "x", "--print-ids"], ["--fasta-out", "x", "--save-state", "y"], ["--fasta-out", "x", "--jsonl"]])
def test_what_is_no_fasta(mamba, model, options):
    done = mamba(model, *options, check=False, input=b"")
    assert done.returncode == 2 and b"does not apply" in done.stderr


RECORDS = {"one": "ACGTACGTTTGACA", "two": "acgtNNNNryACGT", "empty": "", "four": some_bases(700), "five": "A"}


@pytest.mark.parametrize("layout", [{}, {"width": 7}, {"width": 10 ** 6}, {"end": "\r\n"}, {"last": False}, {"end": "\n\n", "width": 3}, {"end": "\r"}])
def test_records(mamba, model, tmp_path, layout):
    path = fasta(tmp_path, write(RECORDS, **layout))
    table = rows(mamba("score", model, "--fasta", path).stdout)
    assert [row[0] for row in table] == list(RECORDS)
    for row, bases in zip(table, RECORDS.values()):
        scores = own_scores(mamba, model, bases) if bases else {}
        assert int(row[1]) == len(scores) and abs(float(row[2]) + sum(scores.values())) < 1e-5 * max(1, len(scores))
        assert float(row[3]) == pytest.approx(float(row[2]) / len(scores) / np.log(2), abs=2e-6) if scores else row[3] == "nan"
    assert mamba("score", model, "--fasta", "-", input=path.read_bytes()).stdout == mamba("score", model, "--fasta", path, "-np", 1, "-ub", 5).stdout


def test_a_byte_order_mark(mamba, model, tmp_path):
    path, marked, regions = fasta(tmp_path, write(RECORDS)), tmp_path / "marked.fa", tmp_path / "regions.bed"
    marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    regions.write_text("four\t3\t90\none\t0\t14\n")
    for options in ([], ["--bed", regions]):
        assert mamba("score", model, "--fasta", marked, *options).stdout == mamba("score", model, "--fasta", path, *options).stdout


def test_rna(mamba, model, tmp_path):
    """U is read as T, which models are trained on."""
    options = ["--fasta", "-", "--per-token"]
    dna, rna = (mamba("score", model, *options, input=text).stdout for text in (b">a\nACGTTtacgtt\n", b">a\nACGUTuacguu\n"))
    assert dna == rna and len(rows(rna)) == 10
    assert mamba("tokenize", model, "-p", "u", "--case-sensitive").stdout == mamba("tokenize", model, "-p", "t", "--case-sensitive").stdout


def test_fasta_that_is_named_a_text(mamba, model, tmp_path):
    path = fasta(tmp_path, ">a\nACGT\n")
    for options in (["-f", path], ["-p", "ACGT", "--prefix", path]):
        done = mamba("score", model, *options, check=False)
        assert done.returncode == 1 and f"{path} begins with '>'" in done.stderr.decode() and b"--fasta" in done.stderr and done.stdout == b""


def test_old_comments_and_blank_lines(mamba, model, tmp_path):
    path = fasta(tmp_path, ";a comment\n\n>x\n\nAC GT\n\tAC\n>y\n")
    assert [row[:2] for row in rows(mamba("score", model, "--fasta", path).stdout)] == [["x", "5"], ["y", "0"]]


def test_a_long_record_is_read_in_pieces(mamba, model, tmp_path):
    """Longer than what is held at once; between short ones, which wait for it."""
    bases = some_bases(70001, letters="ACGTacgtN")
    texts = ["ACGT", bases, "TTTT"]
    path = fasta(tmp_path, write(dict(zip(("a", "long", "b"), texts))))
    requests = "".join(json.dumps({"ids": [ID[b] for b in text.upper()]}) + "\n" for text in texts).encode()
    whole = json.loads(mamba("score", model, "--jsonl", "--logprobs", 0, input=requests).stdout.splitlines()[1])["logprobs"]
    scored = [v for i, v in zip(whole["ids"][1:], whole["token_logprobs"][1:]) if i != 11]
    table = rows(mamba("score", model, "--fasta", path).stdout)
    assert [row[0] for row in table] == ["a", "long", "b"] and abs(float(table[1][2]) + sum(scored)) < 0.05 and int(table[1][1]) == len(scored)
    assert mamba("score", model, "--fasta", path, "-np", 1, "-ub", 37).stdout == mamba("score", model, "--fasta", path, "-np", 5).stdout
    for pool in ("last", "mean"):
        mamba("embed", model, "--fasta", path, "--pool", pool, "-o", tmp_path / "f.npy")
        expected = [json.loads(line)["embedding"] for line in mamba("embed", model, "--jsonl", "--pool", pool, input=requests).stdout.splitlines()]
        assert np.array_equal(np.load(tmp_path / "f.npy"), np.float32(expected))


@pytest.mark.parametrize("window, stride, spans", [
    (300, None, [(0, 300), (300, 600), (600, 700)]), (300, 100, [(0, 300), (100, 400), (200, 500), (300, 600), (400, 700)]),
    (100, 250, [(0, 100), (250, 350), (500, 600)]), (100, 350, [(0, 100), (350, 450)]), (1000, None, [(0, 700)]), (700, 1, [(0, 700)]), (350, None, [(0, 350), (350, 700)])])
def test_windows(mamba, model, tmp_path, window, stride, spans):
    """Named as samtools names regions: from 1, both ends included."""
    bases = RECORDS["four"]
    path = fasta(tmp_path, write({"s": "AC", "four": bases, "e": "", "t": "ACG"}))
    table = rows(mamba("score", model, "--fasta", path, "--window", window, *(["--stride", stride] if stride else [])).stdout)
    assert [row[0] for row in table] == ["s:1-2", *(f"four:{a + 1}-{b}" for a, b in spans), "t:1-3"]
    alone = rows(mamba("score", model, *sum((["--ids", ids(bases[a:b])] for a, b in spans), [])).stdout)
    assert [row[1:] for row in table[1:-1]] == [row[1:] for row in alone]


def test_both_strands(mamba, model, tmp_path):
    bases = [some_bases(50, 7), some_bases(333, 8, "ACGTN"), "NACGTA", "A"]
    path = fasta(tmp_path, write({str(i): b for i, b in enumerate(bases)}))
    table = rows(mamba("score", model, "--fasta", path, "--rc-average").stdout)
    for row, b in zip(table, bases):
        forward, backward = own_scores(mamba, model, b), own_scores(mamba, model, reverse_complement(b))
        total = -sum(forward.values()) - sum(backward.values())
        assert abs(float(row[2]) - total / 2) < 1e-4 and float(row[1]) == (len(forward) + len(backward)) / 2
        assert forward == {} or abs(float(row[3]) - total / (len(forward) + len(backward)) / np.log(2)) < 1e-5
    for pool in ("last", "mean"):
        both = np.load(io.BytesIO(mamba("embed", model, "--fasta", path, "--rc-average", "--pool", pool).stdout))
        alone = [np.load(io.BytesIO(mamba("embed", model, *sum((["--ids", ids(f(b))] for b in bases), []), "--pool", pool).stdout))
                 for f in (str, reverse_complement)]
        assert np.allclose(both, (alone[0] + alone[1]) / 2, atol=1e-6)


def test_both_strands_behind_a_prefix(mamba, model, tmp_path):
    bases, prefix = some_bases(40, 11), "ACGTTGATTACAG"
    path = fasta(tmp_path, write({"x": bases}))
    mamba(model, "-p", prefix, "-n", 0, "--save-state", tmp_path / "s")
    expected = np.mean([-sum(v for p, v in own_scores(mamba, model, prefix + strand).items() if p >= len(prefix))
                        for strand in (bases, reverse_complement(bases))])
    for base in (["--prefix", prefix], ["--load-state", tmp_path / "s"]):
        row = rows(mamba("score", model, "--fasta", path, "--rc-average", *base).stdout)[0]
        assert abs(float(row[2]) - expected) < 1e-4


@pytest.mark.parametrize("both", [False, True])
def test_track(mamba, model, tmp_path, both):
    """bedGraph: positions from 0, a line a base that is scored, in order."""
    records = {"one": some_bases(60, 2, "ACGTN"), "two": some_bases(20, 3)}
    path, track = fasta(tmp_path, write(records)), tmp_path / "t.bedgraph"
    mamba("score", model, "--fasta", path, "--track", track, *["--rc-average"] * both)
    header, *lines = track.read_text().splitlines()
    assert header.startswith("track type=bedGraph ")
    found = {name: {} for name in records}
    for line in lines:
        name, start, end, value = line.split("\t")
        assert int(end) == int(start) + 1 and list(found[name]) == sorted(found[name])
        found[name][int(start)] = float(value)
    for name, bases in records.items():
        expected = own_scores(mamba, model, bases)
        if both:
            n, backward = len(bases), own_scores(mamba, model, reverse_complement(bases))
            backward = {n - 1 - p: v for p, v in backward.items()}
            expected = {p: np.mean([s[p] for s in (expected, backward) if p in s]) for p in sorted({*expected, *backward})}
        assert found[name].keys() == expected.keys() and all(abs(found[name][p] - v) < 1e-4 for p, v in expected.items())


def test_embed_every_base(mamba, model, tmp_path):
    path = fasta(tmp_path, write({"x": some_bases(600)}))
    mamba("embed", model, "--fasta", path, "--pool", "none", "--layer", 1, "-o", tmp_path / "f.npy")
    mamba("embed", model, "--ids", ids(some_bases(600)), "--pool", "none", "--layer", 1, "-o", tmp_path / "i.npy")
    assert np.array_equal(np.load(tmp_path / "f.npy"), np.load(tmp_path / "i.npy"))


def test_a_wrong_letter(mamba, model, tmp_path):
    """File, record and offset; the other records are scored, and the exit status tells."""
    path = fasta(tmp_path, b">a\nACGT\n>b\nACG\nTX\nAAAA\n>c\nAC\x01GT\n>d\nACGT\n")
    done = mamba("score", model, "-q", "--fasta", path, check=False)
    assert done.returncode == 1 and [row[0] for row in rows(done.stdout)] == ["a", "d"]
    first, second = done.stderr.decode().splitlines()
    assert f"{path}: record b: 'X' at base 5" in first and "record c: byte 1 at base 3" in second
    done = mamba("score", model, "-q", "--fasta", path, "--window", 3, check=False)
    assert done.returncode == 1 and [row[0] for row in rows(done.stdout)] == ["a:1-3", "a:4-4", "b:1-3", "d:1-3", "d:4-4"]


@pytest.mark.parametrize("content, words", [(b"ACGT\n", "begins with 'A'"), (b"\xff\xfeA", "begins with byte 255"), (b" >a\nACGT\n", "begins with ' '"),
                                            (b"\x1f\x8b\x08\x00", "zcat"), (None, "No such file")])
def test_files_that_are_none(mamba, model, tmp_path, content, words):
    path = fasta(tmp_path, content) if content is not None else tmp_path / "missing"
    done = mamba("score", model, "-q", "--fasta", path, check=False)
    assert done.returncode == 1 and words in done.stderr.decode() and done.stderr.count(b"\n") == 1 and done.stdout == b""


def test_names(mamba, model, tmp_path):
    """A blank before the name is none of it; a record without a name has its number."""
    path = fasta(tmp_path, "> chr1 more\nAC\n>\nACG\n>\tx\ty\nA\n")
    assert [row[0] for row in rows(mamba("score", model, "--fasta", path).stdout)] == ["chr1", "2", "x"]


def test_five_letters(mamba, model, tmp_path):
    """Any vocabulary with the letters works, N is not scored in any, and a token that begins texts begins records."""
    path = fasta(tmp_path, write({"x": "ACGTNACN", "y": "NNACGNT"}))
    letters = vocabulary(tmp_path, list("ACGTN"))
    table = rows(mamba("score", model, "--tokenizer", letters, "--fasta", path).stdout)
    assert [row[1] for row in table] == ["5", "4"]
    alone = mamba("score", model, "--ids", "0 1 2 3 4 0 1 4", "--per-token").stdout
    assert abs(float(table[0][2]) + sum(float(r[4]) for r in rows(alone) if r[2] != "4")) < 1e-5
    no_n = vocabulary(tmp_path, [*"ACGT", "<unk>"], unknown_token_id=4)
    assert rows(mamba("score", model, "--tokenizer", no_n, "--fasta", path, "--rc-average").stdout)[0][1] == "5.5"
    bos = vocabulary(tmp_path, [*"ACGTN", "<s>"], bos_token_id=5, add_bos_token=1)
    (row, _) = rows(mamba("score", model, "--tokenizer", bos, "--fasta", path).stdout)
    alone = mamba("score", model, "--ids", "5 0 1 2 3 4 0 1 4", "--per-token").stdout
    assert row[1] == "6" and abs(float(row[2]) + sum(float(r[4]) for r in rows(alone) if r[2] != "4")) < 1e-5


def test_lower_case_n_is_n(mamba, model, tmp_path):
    path = fasta(tmp_path, write({"x": "ACnnGT"}))
    assert rows(mamba("score", model, "--fasta", path, "--case-sensitive").stdout)[0][1] == "3"


@pytest.mark.parametrize("tokens, words", [(list("AC") + ["<unk>"], "no token for 'G'"), (list("ACGT"), "no token for 'N'")])
def test_a_vocabulary_that_lacks_letters(mamba, model, tmp_path, tokens, words):
    more = {"unknown_token_id": tokens.index("<unk>")} if "<unk>" in tokens else {}
    path = fasta(tmp_path, write({"x": "ACAC"}))
    done = mamba("score", model, "--tokenizer", vocabulary(tmp_path, tokens, **more), "--fasta", path, check=False)
    assert done.returncode == 1 and words in done.stderr.decode() and done.stdout == b""


def test_a_vocabulary_of_words(mamba, tmp_path):
    done = mamba("score", ROOT / "models" / "tales.bin", "--fasta", fasta(tmp_path, ">a\nACGT\n"), check=False)
    assert done.returncode == 1 and b"single letters" in done.stderr


def test_rows_of_every_base_are_of_one_record(mamba, model, tmp_path):
    path = fasta(tmp_path, ">a\nACGTACGT\n>b\nACG\n")
    done = mamba("embed", model, "--fasta", path, "--pool", "none", "-o", tmp_path / "f.npy", check=False)
    assert done.returncode == 1 and b"--pool none" in done.stderr and not (tmp_path / "f.npy").exists()
    done = mamba("embed", model, "--fasta", fasta(tmp_path, ">a\nACGT\n>b\n>c\nA\n"), check=False)
    assert done.returncode == 1 and b"b" in done.stderr.split(b":")[1] and b"empty" in done.stderr and done.stdout == b""
    done = mamba("classify", model, "-p", "ACGT", "--pool", "none", check=False)
    assert done.returncode == 2 and b"--pool none" in done.stderr


def test_a_reader_that_leaves_before_the_track_is_whole(mamba, model, tmp_path):
    path, track = fasta(tmp_path, write({f"r{i}": some_bases(3000, i) for i in range(200)})), tmp_path / "t.bedgraph"
    done = subprocess.run(["bash", "-c", f"'{PROGRAM}' score '{model}' --fasta '{path}' --track '{track}' -q -np 1 | head -n 1; echo ${{PIPESTATUS[0]}}"],
                          capture_output=True)
    assert done.stdout.splitlines()[-1] == b"1" and b"t.bedgraph" in done.stderr and not track.exists()


def test_a_track_on_standard_output(mamba, model):
    done = mamba("score", model, "--fasta", "x", "--track", "-", check=False)
    assert done.returncode == 2 and b"standard output" in done.stderr


def test_a_record_that_failed_leaves_no_track(mamba, model, tmp_path):
    mamba("score", model, "--fasta", fasta(tmp_path, ">a\nACGT\n>b\nAX\n"), "--track", tmp_path / "t", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.fa"]


def test_an_empty_file(mamba, model, tmp_path):
    """A table without rows."""
    assert mamba("score", model, "-q", "--fasta", fasta(tmp_path, "")).stdout == b"id\ttokens\tnll\tbits_per_token\tperplexity\n"


def test_a_model_without_nucleotides(mamba, tmp_path):
    done = mamba("score", FIXTURES / "mamba_tied.f32.bin", "--fasta", fasta(tmp_path, ">a\nACGT\n"), check=False)
    assert done.returncode == 1 and b"no tokenizer" in done.stderr


@pytest.mark.parametrize("options, words", [
    (["--window", 5], "--window needs --fasta"), (["--rc-average"], "--rc-average needs --fasta"), (["--track", "x"], "--track needs --fasta"),
    (["--fasta", "x", "-p", "A"], "--fasta is the input"), (["--fasta", "x", "--jsonl"], "--fasta is the input"),
    (["--fasta", "x", "--stride", 5], "--stride needs --window"), (["--fasta", "x", "--window", 5, "--track", "y"], "--track does not apply"),
    (["--fasta", "x", "--rc-average", "--per-token"], "--rc-average does not apply"), (["--fasta", "x", "--window", 0], "--window 0")])
def test_wrong_combinations(mamba, model, options, words):
    done = mamba("score", model, *options, check=False)
    assert done.returncode == 2 and words in done.stderr.decode()


def test_demo():
    """models/demo_dna.sh: the Alu is foreseen, coin tosses are not; the cytochrome b is a human's; a CpG that becomes TG is the likeliest change."""
    done = subprocess.run([ROOT / "models" / "demo_dna.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    bits = {row[0]: float(row[3]) for row in lines if len(row) == 5 and row[0] != "id"}
    assert bits["random"] > 1.95 and bits["alu"] < bits["random"] - 0.2 and bits["reverse"] < bits["random"] - 0.2
    bars = {line[:13].strip(): line[13:] for line in done.stdout.splitlines() if "\u2588" in line}
    assert {len(bars[name]) for name in ("alu", "reverse")} == {90}
    chance = {row[1]: float(row[2]) for row in lines if len(row) == 3 and row[0].startswith("cytochrome_b:")}
    assert len(chance) == 5 and abs(sum(chance.values()) - 1) < 1e-5 and chance["human"] > 0.5
    ratios = {row[4]: float(row[5]) for row in lines if row[:2] == ["alu", "330"]}
    assert set(ratios) == set("AGT") and max(ratios, key=ratios.get) == "T"
