"""What the Python tests share: where the program is, and how to run it."""
import os
import pathlib
import re
import shutil
import subprocess

import pytest

import emulated_cuda

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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Several workers share the tests (pytest-xdist): one takes a whole file, whose tests use what is built once, unless it says otherwise."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


# ---- the GPU backend: test_cuda.py, check_cuda.py ----

PLACES = ["emulated"] + (["gpu"] if os.environ.get("MAMBA_TEST_GPU") else [])


@pytest.fixture(scope="session")
def emulated_program(tmp_path_factory):
    if emulated_cuda.available():
        pytest.skip(emulated_cuda.available())
    return emulated_cuda.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def gpu_program(tmp_path_factory):
    """What `make cuda` builds, where there is a GPU."""
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no GPU here")
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("gpu")
    for name in ("Makefile", "mamba.c", "mamba_cuda.cu"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["make", "cuda"], cwd=folder, check=True)
    return folder / "mamba"


@pytest.fixture(params=PLACES)
def cuda(request):
    """The program on the device: cuda(*arguments, **environment) to what it did."""
    program = request.getfixturevalue(f"{request.param}_program")

    def run(*arguments, input=None, check=True, **environment):
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        done = subprocess.run([program, *map(str, arguments)], **stdin, capture_output=True, env={**os.environ, **environment}, timeout=600)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done
    run.program, run.emulated = program, request.param == "emulated"
    return run
