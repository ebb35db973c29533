"""Every fuzz target for 20 seconds, after everything that ever crashed it. Part of `make check`; `make fuzz` runs longer."""
import pathlib
import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
import run as fuzz  # noqa: E402

SECONDS = 20


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("clang") or not list(pathlib.Path("/usr/lib").glob("llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*")):
        pytest.skip("clang with libFuzzer is not installed")
    return fuzz.build(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_fuzz(program, target):
    executions, trouble = fuzz.fuzz(target, program, SECONDS)
    assert trouble is None, trouble
    assert executions > 1000
