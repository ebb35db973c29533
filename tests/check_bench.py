"""The benchmarks' scripts run, in their short modes; what they measure is for `make bench`. Part of `make check`."""
import subprocess
import sys

import pytest

from conftest import ROOT

BENCH = ROOT / "tests" / "bench"
pytestmark = pytest.mark.xdist_group("llama.cpp")  # which is built once


@pytest.mark.parametrize("arguments, words", [
    (["requests.py", "--short"], ["| models/tales.bin, 20 requests", "MB at 1,000 requests"]),
    (["audio.py", "--short"], ["| tiny |", "samples scored in"]),
    (["dna.py", "--short"], ["| tiny | 4,096 |", "variants/s with the prefix read once"]),
    (["paper.py", "--short"], ["| 512 |", "| mamba tiny | 2 |", "| transformer tiny | 2 |", "| 128 |"]),
    (["compare_llama.py", "--layers", "1", "--types", "q8_0", "--rounds", "1", "--prompt", "16", "--gen", "2"], ["| q8_0 ("]),
])
def test_script(arguments, words):
    done = subprocess.run([sys.executable, BENCH / arguments[0], *arguments[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode == 1 and done.stderr.startswith("compare_llama.py: llama.cpp"):
        pytest.skip(done.stderr)  # it cannot be built here, for want of a tool or the network
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
