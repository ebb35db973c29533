#!/usr/bin/env python3
"""Bases a second of score --fasta by length, against transformers; resident set by length; variants a second with and without a
shared prefix.

    dna.py [--short]

Models of the paper's 1.4M and 7M shapes with random weights, float32. A file holds records of one length, 65,536 bases or more in
all; transformers, which is given the same ids in batches of 16,384 tokens, reads as far as a batch takes it less than one minute.
Medians of three rounds; one round for longer records than those and for transformers, which take minutes. "Without" a shared prefix
means a FASTA file of both windows of each variant. --short runs a small model once, to see that this script works."""
import argparse
import json
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from nucleotides import convert, random_checkpoint  # noqa: E402

MAMBA = ROOT / "mamba"
SHAPES = {"1.4M": (12, 128), "7.0M": (16, 256)}
TOTAL, BATCH, PATIENCE = 1 << 16, 1 << 14, 60
WINDOW = 1024


def run(*words):
    """(seconds, output, peak resident set in MB); the peak is the last one seen before the process ended."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([MAMBA, *map(str, words)], stdout=subprocess.PIPE)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        peak = int(found[1]) / 1024 if found else peak
        time.sleep(0.005)
    seconds = time.monotonic() - start
    assert process.returncode == 0
    return seconds, process.stdout.read(), peak


def write_fasta(path, records):
    with open(path, "w") as file:
        for name, bases in records:
            file.write(f">{name}\n" + "".join(bases[i:i + 60] + "\n" for i in range(0, len(bases), 60)))


def transformers_rate(model, length, threads):
    torch.set_num_threads(threads)
    ids = torch.randint(7, 11, (max(1, BATCH // length), length))
    start = time.monotonic()
    with torch.no_grad():
        torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
    return ids.numel() / (time.monotonic() - start)


def by_length(folder, name, path, model, lengths, rounds):
    unit = "".join(random.Random(0).choices("ACGT", k=1 << 16))
    rows, too_slow = [], False
    for length in lengths:
        count = max(1, TOTAL // length)
        bases = (unit * (1 + length // len(unit)))[:length]
        write_fasta(folder / "x.fa", ((i, bases) for i in range(count)))
        rates, peaks = {}, []
        for round_ in range(rounds if length <= TOTAL else 1):
            for threads in (1, 2):
                seconds, _, peak = run("score", path, "--fasta", folder / "x.fa", "-q", "-t", threads)
                rates.setdefault(("mamba", threads), []).append(count * length / seconds)
                peaks.append(peak)
                if not too_slow and round_ == 0:
                    rates.setdefault(("transformers", threads), []).append(transformers_rate(model, length, threads))
        # Twice as many positions in one sequence take twice the steps, one after the other.
        if ("transformers", 1) in rates:
            too_slow = 4 * length / min(rates["transformers", 1]) > PATIENCE
        row = {"model": name, "length": length, "records": count, "peak_rss_mb": max(peaks)}
        row |= {f"{program}_{threads}": statistics.median(rates.get((program, threads), [float("nan")])) for program in ("mamba", "transformers") for threads in (1, 2)}
        rows.append(row)
        cell = lambda key: f"{row[key]:,.0f}" if row[key] == row[key] else ""
        print(f"| {name} | {length:,} | {cell('mamba_1')} | {cell('mamba_2')} | {cell('transformers_1')} | {cell('transformers_2')} | {row['peak_rss_mb']:.1f} |", flush=True)
    return rows


def variants(folder, name, path, count, rounds):
    """SNVs in a made-up chromosome: through --vcf, and as two windows each."""
    rng = random.Random(1)
    bases = "".join(rng.choices("ACGT", k=1 << 20))
    places = sorted(rng.sample(range(WINDOW, len(bases) - WINDOW), count))
    alts = [rng.choice([b for b in "ACGT" if b != bases[at]]) for at in places]
    write_fasta(folder / "ref.fa", [("chr1", bases)])
    lines = "".join(f"chr1\t{at + 1}\t.\t{bases[at]}\t{alt}\t.\t.\t.\n" for at, alt in zip(places, alts))
    (folder / "x.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + lines)
    half = WINDOW // 2
    write_fasta(folder / "windows.fa", ((f"{at}{allele}", bases[at - half:at] + allele + bases[at + 1:at + half]) for at, alt in zip(places, alts)
                                        for allele in (bases[at], alt)))
    rates = {"shared": [], "apart": []}
    for _ in range(rounds):
        seconds, table, _ = run("score", path, "-q", "--fasta", folder / "ref.fa", "--vcf", folder / "x.vcf", "--tsv", "--window", WINDOW)
        rates["shared"].append(count / seconds)
        seconds, windows, _ = run("score", path, "-q", "--fasta", folder / "windows.fa")
        rates["apart"].append(count / seconds)
    ratios = [float(line.split("\t")[5]) for line in table.decode().splitlines()[1:]]
    nll = [float(line.split("\t")[2]) for line in windows.decode().splitlines()[1:]]
    assert len(ratios) == count and all(abs(r - (a - b)) <= 2e-3 for r, a, b in zip(ratios, nll[::2], nll[1::2])), "the two ways disagree"
    medians = {way: statistics.median(rate) for way, rate in rates.items()}
    print(f"{name}: {medians['shared']:.1f} variants/s with the prefix read once, {medians['apart']:.1f} as two windows each "
          f"(--window {WINDOW}, {count} SNVs)", flush=True)
    return {"model": name, "window": WINDOW, "count": count} | medians


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    shapes = {"tiny": (2, 32)} if short else SHAPES
    lengths = [1 << 10, 1 << 12] if short else [1 << k for k in (10, 12, 14, 17, 20)]
    results = {"bases_per_second": [], "variants_per_second": []}
    print("| model | bases | mamba, 1 thread | 2 threads | transformers, 1 thread | 2 threads | resident set, MB |")
    print("| --- |" + " ---: |" * 6)
    with tempfile.TemporaryDirectory() as temporary:
        for name, shape in shapes.items():
            folder = pathlib.Path(temporary) / name
            model = random_checkpoint(folder, *shape)[1]
            path = convert(folder, folder / "dna.bin")
            results["bases_per_second"] += by_length(folder, name, path, model, lengths, 1 if short else 3)
            results["variants_per_second"].append(variants(folder, name, path, 20 if short else 200, 1 if short else 3))
    if not short:
        (ROOT / "tests" / "bench" / "results" / "dna.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
