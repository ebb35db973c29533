"""DNA models of the paper's sizes against transformers and llama.cpp, and what a record of a million bases costs. Part of `make check`."""
import random
import shutil
import subprocess
import time

import numpy as np
import pytest

import reference
from check_llama import close, llama, their_logits  # noqa: F401: llama is a fixture
from conftest import PROGRAM, peak_rss, run_mamba
from nucleotides import convert, random_checkpoint

SIZES = {"250K": (8, 64), "700K": (10, 96), "1.4M": (12, 128), "3.5M": (14, 192), "7.0M": (16, 256), "19.3M": (20, 384), "40.7M": (24, 512)}  # E.3.2


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_paper(tmp_path, size):
    """Each converts and runs, from token ids and from FASTA. Deep random models amplify rounding: the reference is transformers in
    float64, from which we are no further away than its own float32, or 1e-4."""
    import torch
    folder, model = random_checkpoint(tmp_path / "checkpoint", *SIZES[size])
    path = convert(folder, tmp_path / "dna.bin")
    bases = "".join(random.Random(1).choices("ACGTN", weights=[4, 4, 4, 4, 1], k=200))
    ids = [7 + "ACGTN".index(b) for b in bases]
    with torch.no_grad():
        single = reference.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].numpy())
        expected = reference.log_softmax(model.double()(input_ids=torch.tensor([ids])).logits[0].numpy())
    limit = max(1e-4, np.abs(single - expected).max())
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy")
    assert np.abs(reference.log_softmax(np.load(tmp_path / "l.npy")) - expected).max() <= limit
    (tmp_path / "x.fa").write_text(f">x\n{bases}\n")
    row = run_mamba("score", path, "--fasta", tmp_path / "x.fa").stdout.decode().splitlines()[1].split("\t")
    scored = [t for t in range(1, len(ids)) if ids[t] != 11]
    assert int(row[1]) == len(scored) and abs(float(row[2]) + sum(expected[t - 1, ids[t]] for t in scored)) < limit * len(scored)


def test_llama_cpp_reads_the_vocabulary(llama, tmp_path):  # noqa: F811
    path = convert(random_checkpoint(tmp_path / "checkpoint", 2, 64)[0], tmp_path / "dna.bin")
    ids = np.random.default_rng(1).integers(7, 12, 100)
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy")
    close(np.load(tmp_path / "l.npy"), their_logits(llama, path, ids), 1e-4)


def test_a_million_bases_in_the_memory_of_a_thousand(tmp_path):
    """The peak is read while the process waits for the next record."""
    path = convert(random_checkpoint(tmp_path / "checkpoint", 2, 64)[0], tmp_path / "dna.bin")

    def peak(n):
        run = subprocess.Popen([PROGRAM, "score", path, "--fasta", "-", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        unit = "".join(random.Random(1).choices("ACGT", k=1024))
        run.stdin.write(f">long\n{unit * (n // 1024)}\n>next\nACGT".encode())
        run.stdin.flush()
        time.sleep(2)  # all but the last piece is through
        peak = peak_rss(run.pid)
        out, _ = run.communicate()
        row = out.splitlines()[1].split(b"\t")
        assert row[0] == b"long" and int(row[1]) == n - 1 and run.returncode == 0
        return peak

    few, many = peak(1 << 10), peak(1 << 20)
    assert many < few + 1024, (few, many)  # KiB


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    """A small model, and a genome of two chromosomes in lines of 50, with soft masking and N."""
    folder = tmp_path_factory.mktemp("genome")
    rng = random.Random(4)
    with open(folder / "ref.fa", "w") as file:
        for name, n in (("chr1", 5000), ("chr2", 1234)):
            bases = "".join(rng.choices("ACGTacgtN", weights=[8, 8, 8, 8, 4, 4, 4, 4, 1], k=n))
            file.write(f">{name} a chromosome\n" + "".join(bases[i:i + 50] + "\n" for i in range(0, n, 50)))
    convert(random_checkpoint(folder / "checkpoint", 2, 64)[0], folder / "dna.bin")
    return folder


@pytest.mark.skipif(not shutil.which("samtools"), reason="samtools is not installed")
def test_regions_are_those_of_samtools(genome):
    """What samtools cuts out of the file scores as the regions of BED do: the same rows, ids included."""
    rng = random.Random(7)
    spans = [("chr1", 0, 1), ("chr1", 0, 50), ("chr1", 49, 51), ("chr2", 1233, 1234), ("chr1", 4000, 6000), ("chr2", 0, 1234)]
    spans += [("chr1", a, a + rng.randrange(1, 400)) for a in rng.sample(range(4900), 40)]
    (genome / "r.bed").write_text("".join(f"{c}\t{a}\t{b}\n" for c, a, b in spans))
    (genome / "r.txt").write_text("".join(f"{c}:{a + 1}-{min(b, 5000)}\n" for c, a, b in spans))
    cut = subprocess.run(["samtools", "faidx", genome / "ref.fa", "-r", genome / "r.txt"], check=True, capture_output=True).stdout
    assert run_mamba("score", genome / "dna.bin", "--fasta", genome / "ref.fa", "--bed", genome / "r.bed").stdout == \
        run_mamba("score", genome / "dna.bin", "--fasta", "-", input=cut).stdout


@pytest.mark.skipif(not shutil.which("samtools"), reason="samtools is not installed")
def test_samtools_reads_what_is_generated(genome):
    out = genome / "out.fa"
    run_mamba(genome / "dna.bin", "--fasta", genome / "ref.fa", "-n", 200, "-s", 1, "--ignore-eos", "--fasta-out", out)
    subprocess.run(["samtools", "faidx", out], check=True)
    assert (genome / "out.fa.fai").read_text().splitlines() == ["chr1\t200\t6\t60\t61", "chr2\t200\t216\t60\t61"]


@pytest.mark.skipif(not shutil.which("bcftools"), reason="bcftools is not installed")
def test_bcftools_reads_what_is_rated(genome):
    """Through bcftools to BCF and back; its own query says what the table says; norm agrees about REF with our check."""
    lines = (genome / "ref.fa").read_text().split(">")[1].splitlines()[1:]
    bases, rng, rows = "".join(lines).upper(), random.Random(9), []
    for pos in sorted(rng.sample(range(1, 4990), 60)):
        ref = bases[pos - 1:pos - 1 + rng.choice([1, 1, 1, 2, 5])]
        alts = sorted({*("".join(rng.choices("ACGT", k=rng.choice([1, 1, 2, 6]))) for _ in range(rng.choice([1, 1, 2, 3])))} - {ref})
        rows.append(f"chr1\t{pos}\t.\t{ref}\t{','.join(alts) or '.'}\t50\tPASS\tDP={pos}\tGT\t0/1\n")
    rows.append(f"chr1\t4995\t.\t{'A' if bases[4994] != 'A' else 'C'}\t<DEL>,G\t.\t.\t.\tGT\t./.\n")
    header = ["##fileformat=VCFv4.2", "##contig=<ID=chr1,length=5000>", '##FILTER=<ID=PASS,Description="ok">', '##ALT=<ID=DEL,Description="Deletion">',
              '##INFO=<ID=DP,Number=1,Type=Integer,Description="Depth">', '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
              "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone"]
    (genome / "in.vcf").write_text("\n".join(header) + "\n" + "".join(rows))
    arguments = ["score", genome / "dna.bin", "-q", "--fasta", genome / "ref.fa", "--vcf", genome / "in.vcf", "--window", "100"]
    rated = run_mamba(*arguments, check=False)
    assert rated.returncode == 1 and rated.stderr.count(b"\n") == 1  # the last line's REF

    def bcftools(*words, **more):
        return subprocess.run(["bcftools", *words], capture_output=True, check=True, **more)

    (genome / "out.bcf").write_bytes(bcftools("view", "-Ob", "-", input=rated.stdout).stdout)
    bcftools("index", str(genome / "out.bcf"))
    seen = bcftools("query", "-f", "%CHROM\t%POS\t%REF\t%ALT\t%INFO/MAMBA_LLR\t%INFO/MAMBA_ERROR\t%INFO/DP\n", str(genome / "out.bcf")).stdout.decode().splitlines()
    ours = {}
    for row in run_mamba(*arguments, "--tsv", check=False).stdout.decode().splitlines()[1:]:
        chrom, pos, _, ref, alt, ratio, error = row.split("\t")
        ours.setdefault((chrom, pos, ref), []).append((alt, ratio, error))
    for line in seen:
        chrom, pos, ref, alt, ratio, error, depth = line.split("\t")
        if alt == ".":
            continue
        expected = ours.pop((chrom, pos, ref))
        assert alt == ",".join(e[0] for e in expected) and error == expected[0][2] and depth in (pos, ".")
        values = ratio.split(",") if ratio != "." else ["."] * len(expected)
        for value, e in zip(values, expected, strict=True):  # BCF holds single precision, and query prints six digits
            assert value == e[1] or abs(float(value) - float(e[1])) <= 1e-5 * max(1, abs(float(e[1])))
    assert not ours
    checked = subprocess.run(["bcftools", "norm", "-c", "w", "-f", genome / "ref.fa", genome / "in.vcf"], capture_output=True, text=True)
    assert checked.stderr.count("REF_MISMATCH") == 1 and "4995" in checked.stderr


def test_a_line_of_many_alleles(genome):
    """They begin one after the other: memory is that of the line."""
    bases = "".join((genome / "ref.fa").read_text().split(">")[1].splitlines()[1:]).upper()
    pos = bases.index("ACG") + 1
    alts = ",".join("A" + "".join("ACGT"[i >> 2 * k & 3] for k in range(8)) for i in range(20000))
    (genome / "many.vcf").write_text(f"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\nchr1\t{pos}\t.\tA\t{alts}\t.\t.\t.\n")
    run = subprocess.Popen([PROGRAM, "score", genome / "dna.bin", "-q", "--fasta", genome / "ref.fa", "--vcf", genome / "many.vcf", "--window", "1024", "--rc-average"],
                           stdout=subprocess.DEVNULL)
    time.sleep(4)
    peak = peak_rss(run.pid)
    run.kill()
    run.wait()
    assert peak < 40000, peak
