#!/usr/bin/env python3
"""Runs the fuzz targets with clang's libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.

    tests/fuzz/run.py SECONDS [TARGET ...]

Each target first gets every input of tests/fuzz/crashes (what has ever gone wrong), then SECONDS of mutations of
tests/fuzz/seeds. A new crash is written to tests/fuzz/crashes/TARGET, to be fixed and kept; the exit status is 1. The
corpus that grows lies in ~/.cache/mamba-tests/fuzz, so that a later run goes on from it.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPUS = pathlib.Path.home() / ".cache" / "mamba-tests" / "fuzz"
TARGETS = {"gguf": 20000, "tokenizer": 300, "state": 1200, "jsonl": 600, "fasta": 300, "bed": 100, "vcf": 200, "wav": 300}  # the most bytes of an input


def build(folder):
    program = folder / "fuzz"
    subprocess.run(["clang", "-g", "-O1", "-std=gnu11", "-ffp-contract=off", "-w", "-DMAMBA_PLAIN_C", "-fsanitize=fuzzer,address,undefined",
                    "-fno-sanitize-recover=all", HERE / "targets.c", "-o", program, "-lm"], check=True, cwd=ROOT)
    return program


def fuzz(target, program, seconds):
    """Runs old crashes and `seconds` of new inputs: (executions, what it wrote when it failed, or None)."""
    crashes, corpus = HERE / "crashes" / target, CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    options = {"cwd": ROOT, "capture_output": True, "text": True, "errors": "replace", "env": {**os.environ, "FUZZ_TARGET": target}}
    for old in sorted(crashes.glob("*")) if crashes.exists() else []:
        done = subprocess.run([program, old], **options)
        if done.returncode != 0:
            return 0, f"{old} fails again:\n{done.stderr[-4000:]}"
    # An input may make the program allocate what its size justifies: never more than 64 MB at once.
    done = subprocess.run([program, f"-max_total_time={seconds}", f"-max_len={TARGETS[target]}", "-malloc_limit_mb=64", "-timeout=10",
                           "-rss_limit_mb=2048", "-print_final_stats=1", f"-dict={HERE / 'words.dict'}", "-verbosity=0",
                           f"-artifact_prefix={corpus}/../{target}-", corpus, HERE / "seeds" / target], **options)
    count = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    executions = int(count[1]) if count else 0
    if done.returncode == 0:
        return executions, None
    crashes.mkdir(parents=True, exist_ok=True)
    for artifact in CORPUS.glob(f"{target}-*"):
        artifact.rename(crashes / artifact.name)
    return executions, done.stderr[-6000:]


def main():
    if len(sys.argv) < 2 or not sys.argv[1].isdigit():
        sys.exit(__doc__)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        program = build(pathlib.Path(folder))
        for target in sys.argv[2:] or TARGETS:
            executions, trouble = fuzz(target, program, int(sys.argv[1]))
            print(f"{target}: {executions} executions, {'a crash' if trouble else 'no crash'}", flush=True)
            failed |= trouble is not None
            if trouble:
                print(trouble)
    sys.exit(failed)


if __name__ == "__main__":
    main()
