"""What the Python tests share: where the program is, and how to run it."""
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
PROGRAM = pathlib.Path(os.environ.get("MAMBA", ROOT / "mamba"))  # check_build.py puts a sanitized build here


def run_mamba(*args, input=None, check=True, env=None, binary=True, timeout=300):
    """Runs the program under test. check: a nonzero exit status fails the test with what it wrote to standard error."""
    if input is None:
        stdin = {"stdin": subprocess.DEVNULL}
    else:
        stdin = {"input": input}
    done = subprocess.run([PROGRAM, *map(str, args)], **stdin, capture_output=True,
                          text=not binary, env={**os.environ, **(env or {})}, timeout=timeout)
    if check and done.returncode != 0:
        pytest.fail(f"mamba {' '.join(map(str, args))}: exit {done.returncode}: {done.stderr}")
    return done


def peak_rss(pid):
    """The largest resident set of a process that still runs, in KiB. (What wait4() reports begins at the size of its parent.)"""
    return int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


@pytest.fixture
def mamba():
    return run_mamba
