#!/usr/bin/env python3
"""Runs the tests and prints, last and alone on a line, "N passed, N failed" (", N skipped" may follow).

    tests/run.py quick    C unit tests and tests/test_*.py
    tests/run.py slow     tests/check_*.py: PyTorch, llama.cpp, sanitizers, linters
    tests/run.py cuda     those of the GPU backend, emulated, and on a GPU where there is one

The exit status is 0 only when nothing failed and something passed. `make test` calls the
first, `make check` the first two, `make test-cuda` the third.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

TESTS = pathlib.Path(__file__).resolve().parent


def run_unit_tests():
    """The C tests print a line a failure, and their counts in the last line."""
    done = subprocess.run([TESTS / "unit"], stdout=subprocess.PIPE, text=True)
    # Only the sum at the end may stand alone on a line.
    print("tests/unit: ".join(["", *done.stdout.splitlines(keepends=True)]), end="", flush=True)
    counts = re.search(r"(\d+) passed, (\d+) failed\n$", done.stdout)
    passed, failed = map(int, counts.groups()) if counts else (0, 0)
    if failed == 0 and (done.returncode != 0 or not counts):
        print(f"tests/unit ended with status {done.returncode}" + ("" if counts else " and no counts"))
        failed = 1
    return passed, failed, 0


def run_pytest(files, n_workers):
    """One pytest over all files; its counts are read from the report, not from what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        # -p no:cacheprovider: the tests leave nothing in the source tree
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfEs", "--durations=25", "-p", "no:cacheprovider",
                               "-n", str(n_workers), "--dist=loadgroup", "--timeout=2400", f"--junitxml={report}", *map(str, files)], cwd=TESTS)
        if not report.exists():
            print(f"pytest ended with status {done.returncode} and no report")
            return 0, 1, 0
        total = failed = skipped = 0
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total += int(suite.get("tests"))
            failed += int(suite.get("failures")) + int(suite.get("errors"))
            skipped += int(suite.get("skipped"))
        if done.returncode != 0 and failed == 0:
            print(f"pytest ended with status {done.returncode}")
            failed = 1
        return total - failed - skipped, failed, skipped


def main():
    if sys.argv[1:] not in (["quick"], ["slow"], ["cuda"]):
        sys.exit(__doc__)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and so would the tests
    start = time.monotonic()
    n_workers = min(4, len(os.sched_getaffinity(0)))  # many tests use all cores themselves
    if sys.argv[1] == "quick":
        counts = [run_unit_tests(), run_pytest(sorted(TESTS.glob("test_*.py")), n_workers)]
    elif sys.argv[1] == "cuda":
        os.environ["MAMBA_TEST_GPU"] = "1"
        counts = [run_pytest([TESTS / "test_cuda.py", TESTS / "check_cuda.py"], 0)]
    else:
        counts = [run_pytest(sorted(TESTS.glob("check_*.py")), n_workers)]
    passed, failed, skipped = (sum(column) for column in zip(*counts))
    print(f"{time.monotonic() - start:.0f} seconds")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    sys.exit(0 if failed == 0 and passed > 0 else 1)


if __name__ == "__main__":
    main()
