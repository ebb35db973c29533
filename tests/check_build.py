"""The source as compilers, analysers and run-time checkers see it. Part of `make check`.

A tool that is missing is reported as skipped; .ci/run installs all of them. Groups are what one worker does (conftest.py)."""
import concurrent.futures
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

DIALECT = ["-std=gnu11", "-ffp-contract=off", "-fopenmp"]

# Left out of clang-tidy: advice that C11's optional Annex K be used, the order of struct fields, parameters of one type side by
# side, _GNU_SOURCE, the file that includes itself, conversions that the kernels mean, and one recursion whose depth is bounded.
TIDY = ("-*,bugprone-*,clang-analyzer-*,performance-*,portability-*,misc-*,-clang-analyzer-security.insecureAPI.*,"
        "-clang-analyzer-optin.performance.Padding,-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier,"
        "-bugprone-suspicious-include,-bugprone-narrowing-conversions,-misc-no-recursion")


def run(*command, **options):
    """A command that must end with status 0; its output is shown when it does not, and returned."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          **options)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.mark.xdist_group("warnings")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("openmp", [True, False])
def test_no_warnings(compiler, openmp, tmp_path):
    flags = DIALECT if openmp else DIALECT[:2] + ["-Wno-unknown-pragmas"]
    program = tmp_path / "mamba"
    run(compiler, "-O1", *flags, "-Wall", "-Wextra", "-Werror", "mamba.c", "-o", program, "-lm")
    run(program, "--version")
    if subprocess.run([program, "inspect", "models/tales.bin", "--sandbox"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0:
        run(program, "score", "models/tales.bin", "-p", "a dog", "--sandbox")  # clang's OpenMP has files of its own


@pytest.mark.xdist_group("warnings")
def test_musl(tmp_path):
    """The static program of README, on a machine without Linux's own headers for musl."""
    program = tmp_path / "mamba"
    run("musl-gcc", "-O1", "-static", *DIALECT[:2], "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "mamba.c", "-o", program, "-lm")
    arguments = ["models/tales.bin", "-p", "Once upon a time", "-n", "16", "-s", "1", "-q"]
    assert run(program, *arguments) == run(ROOT / "mamba", *arguments)


@pytest.mark.xdist_group("analysers")
def test_clang_tidy():
    found = [line for line in run("clang-tidy", "--quiet", f"--checks={TIDY}", "mamba.c", "--", *DIALECT).splitlines()
             if re.search(r": (warning|error): ", line)]
    assert found == []


@pytest.mark.xdist_group("analysers")
def test_cppcheck():
    """invalidPointerCast: rows of a model file and of a state file are bytes that are read as floats."""
    run("cppcheck", "--quiet", "--enable=warning,performance,portability", "--inline-suppr", "--suppress=invalidPointerCast",
        "--max-configs=64", "--error-exitcode=1", "mamba.c")


@pytest.mark.xdist_group("avx512")
def test_avx512_emulated(tmp_path):
    """The unit tests with AVX-512 and AVX-VNNI computed by AVX2: the kernels are tested on machines that cannot run them."""
    if platform.machine() != "x86_64" or "avx2" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("emulated with AVX2, which this machine lacks")
    if not pathlib.Path("/usr/include/simde").exists():
        pytest.skip("libsimde-dev is not installed")
    run("gcc", "-O1", *DIALECT, "-D_GNU_SOURCE", "-DMAMBA_EMULATE_AVX512", "-mavx2", "-mfma", "-mf16c", "-include",
        "tests/emulate_avx512.h", "-w", "tests/unit.c", "-o", tmp_path / "unit", "-lm")
    assert re.search(r"\d+ passed, 0 failed\n$", run(tmp_path / "unit", "tests/fixtures"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Builds for 64-bit ARM by a cross compiler, and the command that runs them here: (folder, command)."""
    if not shutil.which("aarch64-linux-gnu-gcc") or not shutil.which("qemu-aarch64"):
        pytest.skip("gcc-aarch64-linux-gnu or qemu-user is not installed")
    folder = tmp_path_factory.mktemp("arm")
    for source, program in (("mamba.c", "mamba"), ("tests/unit.c", "unit")):
        run("aarch64-linux-gnu-gcc", "-O2", *DIALECT, "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", source, "-o", folder / program, "-lm")
    return folder, ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


@pytest.mark.xdist_group("arm")
def test_neon_kernels(emulated):
    """Bit by bit against plain C, compiled for the same machine."""
    folder, command = emulated
    assert re.search(r"^neon: \d+ passed, 0 failed\n$", run(*command, folder / "unit", "tests/fixtures", "kernels"), re.MULTILINE)


@pytest.mark.xdist_group("arm")
@pytest.mark.parametrize("arguments", [
    *(["score", f"tests/fixtures/{name}.bin", "--ids", "3 1 4 15 9 26 5 35 8 97 9 32 3 84 6"] for name in
      ("mamba_tied.f32", "mamba_tied.f16", "mamba_tied.bf16", "mamba_awkward.f32", "mamba_awkward.q8_0", "mamba_falcon.f32")),
    ["models/tales.bin", "-p", "Once upon a time", "-n", "40", "-s", "5"],
])
def test_neon_gives_the_same_bytes(emulated, arguments, tmp_path):
    """An ARM and an x86 processor agree on every bit of every logit, and so on every text."""
    folder, command = emulated
    outputs = []
    for i, start in enumerate(([ROOT / "mamba"], [*command, folder / "mamba"])):
        logits = ["--logits", tmp_path / f"{i}.npy"] if arguments[0] == "score" else []
        done = subprocess.run([*map(str, start), *arguments, *logits, "-q", "-t", "2"], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                              env={**os.environ, "MAMBA_ISA": "neon" if i else ""})
        outputs.append(done.stdout + (logits[1].read_bytes() if logits else b""))
    assert outputs[0] == outputs[1] and len(outputs[0]) > 50


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Builds with AddressSanitizer and UndefinedBehaviorSanitizer that stop at the first finding: (program, unit tests)."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-O1", "-g", *DIALECT, "-DMAMBA_ROLLED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-unused-function"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each takes minutes
        for program in [pool.submit(run, "clang", *flags, source, "-o", folder / name, "-lm") for source, name in
                        (("mamba.c", "mamba"), ("tests/unit.c", "unit"))]:
            program.result()
    return folder / "mamba", folder / "unit"


def test_unit_tests_sanitized(sanitized):
    assert re.search(r"\d+ passed, 0 failed\n$", run(sanitized[1], "tests/fixtures"))


@pytest.mark.parametrize("tests", ["test_cli.py", "test_model.py", "test_tokenizer.py", "test_requests.py", "test_dna.py", "test_regions.py", "test_audio.py"])
def test_commands_sanitized(sanitized, tests):
    run(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", ROOT / "tests" / tests,
        env={**os.environ, "MAMBA": str(sanitized[0])})


@pytest.mark.xdist_group("arm")
@pytest.mark.parametrize("arguments", [
    ["models/tales.bin", "-p", "Once upon a time", "-n", "8", "-s", "7", "-t", "1"],
    ["score", "models/tales.bin", "-p", "Once upon a time", "-t", "2"],
    ["embed", "tests/fixtures/mamba_awkward.f32.bin", "--ids", "1 2 3", "--pool", "mean"],
])
def test_valgrind(arguments):
    """No use of uninitialised memory (which sanitizers do not see) and nothing lost. Valgrind has no AVX-512."""
    run("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite", "--show-leak-kinds=definite", ROOT / "mamba", *arguments)
