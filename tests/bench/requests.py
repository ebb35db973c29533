#!/usr/bin/env python3
"""Requests a second of --jsonl with 1 to 128 sequences at once, against a process for each request; resident set against their number.

    requests.py [--short]

All ways answer the same requests and take turns, three rounds of which the medians are printed. The files are models/tales.bin and
the 130M shape in Q8_0 with random weights. --short runs a few requests of the first once, to see that this script works."""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
from conftest import peak_rss  # noqa: E402

MAMBA = ROOT / "mamba"
PARALLEL = (1, 8, 32, 128)


def requests(n, max_tokens):
    """Prompts of 1 to 8 tokens, answers of max_tokens."""
    return ({"id": i, "ids": [(i * 37 + j * 11) % 4000 + 5 for j in range(1 + i % 8)], "max_tokens": max_tokens, "seed": i} for i in range(n))


def run_jsonl(model, lines, parallel):
    """(seconds, answers)"""
    start = time.monotonic()
    done = subprocess.run([MAMBA, model, "--jsonl", "--print-ids", "--ignore-eos", "-q", "-np", str(parallel)], input=lines, check=True, stdout=subprocess.PIPE)
    return time.monotonic() - start, done.stdout


def resident_set(model, n, parallel=32):
    """The peak in MB after n requests, asked for before the process ends: what wait4() reports begins at the size of its parent."""
    process = subprocess.Popen([MAMBA, model, "--jsonl", "--print-ids", "-q", "-np", str(parallel)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def write():
        for r in requests(n, 1):
            process.stdin.write(json.dumps(r).encode() + b"\n")
        process.stdin.flush()

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(n):
        process.stdout.readline()
    writer.join()
    peak = peak_rss(process.pid) / 1024
    process.stdin.close()
    assert process.wait() == 0
    return peak


def run_apart(model, wanted):
    """A process for each request, one after the other: (seconds, ids of each)."""
    start, found = time.monotonic(), []
    for r in wanted:
        done = subprocess.run([MAMBA, model, "--ids", " ".join(map(str, r["ids"])), "-n", str(r["max_tokens"]), "-s", str(r["seed"]), "--print-ids",
                               "--ignore-eos", "-q"], check=True, stdout=subprocess.PIPE)
        found.append([int(i) for i in done.stdout.split()])
    return time.monotonic() - start, found


def throughput(name, model, n, max_tokens, rounds):
    wanted = list(requests(n, max_tokens))
    lines = "".join(json.dumps(r) + "\n" for r in wanted).encode()
    rates = {way: [] for way in ("apart", *PARALLEL)}
    for _ in range(rounds):
        seconds, apart = run_apart(model, wanted)
        rates["apart"].append(n / seconds)
        for parallel in PARALLEL:
            seconds, out = run_jsonl(model, lines, parallel)
            rates[parallel].append(n / seconds)
            assert [json.loads(line)["ids"] for line in out.splitlines()] == apart, f"-np {parallel} answers otherwise"
    medians = {str(way): statistics.median(rate) for way, rate in rates.items()}
    print(f"| {name}, {n} requests of {max_tokens} tokens | " + " | ".join(f"{medians[str(way)]:.1f}" for way in rates) + " |", flush=True)
    return {"model": name, "requests": n, "max_tokens": max_tokens, "requests_per_s": medians}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    tales = ROOT / "models" / "tales.bin"
    print("| requests a second | a process each | " + " | ".join(f"`-np {n}`" for n in PARALLEL) + " |")
    print("| --- |" + " ---: |" * (1 + len(PARALLEL)))
    results = [throughput("models/tales.bin", tales, 20 if short else 300, 32, 1 if short else 3)]
    if not short:
        from compare_llama import model_file
        results.append(throughput("130M Q8_0", model_file("130m", "q8_0", None), 96, 32, 3))
    memory = {n: resident_set(tales, n) for n in ((100, 1000) if short else (1000, 100000))}
    print("\nResident set, models/tales.bin: " + ", ".join(f"{mb:.1f} MB at {n:,} requests" for n, mb in memory.items()))
    if not short:
        out = ROOT / "tests" / "bench" / "results" / "requests.json"
        out.write_text(json.dumps({"throughput": results, "resident_set_mb": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
