#!/usr/bin/env python3
"""Builds llama.cpp, the program that our model files are compared with, once, outside the repository.

The sources are those that the PyPI source package of llama-cpp-python carries (PyPI is the only network this needs); its Python
bindings are not used. What is built is the library for this CPU alone and tests/llama_logits.c, which prints its logits.

    python3 tests/build_llama.py [--sdist FILE] [--tools]     prints the folder

--tools also builds llama-bench and llama-quantize. A folder that is complete is used again.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOOLS = ["llama-bench", "llama-quantize"]
HELPER = Path(__file__).resolve().with_name("llama_logits.c")


class Unavailable(RuntimeError):
    """What this machine lacks (a tool, the network), as opposed to what went wrong."""


def cache_dir():
    """~/.cache/mamba-tests/llama-VERSION, below XDG_CACHE_HOME where that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-tests" / f"llama-{VERSION}"


def step(name, command, **options):
    """Runs one command with its output in the log; a failure shows the end of that log."""
    log = cache_dir() / f"{name}.log"
    with open(log, "wb") as out:
        done = subprocess.run([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{name} failed ({log}):\n" + "\n".join(tail))


def fetch(sdist):
    """The source package, downloaded unless given, its checksum verified. [path]"""
    target = cache_dir() / f"llama_cpp_python-{VERSION}.tar.gz"
    if sdist:
        shutil.copyfile(sdist, target)
    elif not target.exists():
        # pip runs the package's build back end to learn its name and version, hence the minutes this takes.
        try:
            step("download", [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                              f"llama-cpp-python=={VERSION}", "-d", cache_dir()])
        except RuntimeError as error:
            raise Unavailable(f"llama.cpp's sources could not be fetched: {error}") from None
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != SHA256:
        target.unlink()
        raise RuntimeError(f"{target.name}: SHA-256 is {found}, expected {SHA256}")
    return target


def unpack(archive, source):
    """Only vendor/llama.cpp of the archive, moved into place when it is complete."""
    if source.exists():
        return
    prefix = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tarfile.open(archive) as tar:
        for member in tar:
            # Links are left out: an archive member must not be able to write outside of its folder.
            if member.name.startswith(prefix) and (member.isfile() or member.isdir()) and ".." not in member.name:
                tar.extract(member, scratch)
        os.rename(Path(scratch) / prefix, source)


def compiler_flags():
    """Of C++, the user's and ours. Some releases of gcc (PR target/114098) take the operand of ldtilecfg for eight bytes and drop what
    is stored behind them as never read, so that llama.cpp's use of Intel's matrix instructions (AMX) ends the program."""
    flags = os.environ.get("CXXFLAGS", "")
    header = subprocess.run([os.environ.get("CXX", "c++"), "-march=native", "-E", "-dD", "-x", "c++", "-"], text=True,
                            input="#include <immintrin.h>", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    broken = "#define __AMX_INT8__ 1" in header and r'"ldtilecfg\t%X0"' in header
    return flags + " -fno-dse -fno-tree-dse" if broken else flags


def build(source, targets):
    """cmake and a compiler, at the lowest priority and two jobs at most: a laptop stays usable."""
    nice = ["nice", "-n", "19"]
    flags = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_NATIVE": "ON", "LLAMA_OPENSSL": "OFF",
             "LLAMA_BUILD_COMMON": "ON" if len(targets) > 1 else "OFF", "LLAMA_BUILD_TOOLS": "ON" if len(targets) > 1 else "OFF",
             "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_SERVER": "OFF", "LLAMA_BUILD_APP": "OFF",
             "LLAMA_USE_PREBUILT_UI": "OFF", "CMAKE_CXX_FLAGS": compiler_flags()}
    step("configure", [*nice, "cmake", "-S", source, "-B", cache_dir() / "build", *[f"-D{k}={v}" for k, v in flags.items()]])
    jobs = min(2, os.cpu_count() or 1)
    step("build", [*nice, "cmake", "--build", cache_dir() / "build", "-j", jobs, "--target", *targets])


def helper(source):
    """llama_logits, linked with the library; compiled again whenever its source is newer."""
    program = cache_dir() / "llama_logits"
    if not program.exists() or program.stat().st_mtime < HELPER.stat().st_mtime:
        libraries = cache_dir() / "build" / "bin"
        step("helper", ["cc", "-O2", "-Wall", "-Wextra", "-o", program, HELPER, f"-I{source / 'include'}",
                        f"-I{source / 'ggml' / 'include'}", f"-L{libraries}", "-lllama", "-lggml", "-lggml-base",
                        f"-Wl,-rpath,{libraries}", f"-Wl,-rpath-link,{libraries}"])
    return program


def ensure(sdist=None, tools=False):
    """Everything present and built. Returns (folder of llama.cpp's sources, path of the program llama_logits)."""
    for tool in ("cmake", "cc", "c++"):
        if not shutil.which(tool):
            raise Unavailable(f"llama.cpp needs {tool} to be built")
    cache_dir().mkdir(parents=True, exist_ok=True)
    source = cache_dir() / "llama.cpp"
    if not source.exists():
        unpack(fetch(sdist), source)
    targets = ["llama"] + (TOOLS if tools else [])
    built = cache_dir() / ("built-tools" if tools else "built")
    if not built.exists():
        build(source, targets)
        for name in ("built", built.name):
            (cache_dir() / name).touch()
    return source, helper(source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", help="the source package, when it was downloaded before")
    parser.add_argument("--tools", action="store_true", help="also build " + ", ".join(TOOLS))
    options = parser.parse_args()
    try:
        ensure(options.sdist, options.tools)
    except (RuntimeError, OSError) as error:
        sys.exit(f"build_llama.py: {error}")
    print(cache_dir())
