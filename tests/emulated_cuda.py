"""Builds `mamba` with its GPU backend run by the emulation of CUDA in cuda_emu.h, and the variants that the tests look at.

    python3 tests/emulated_cuda.py FOLDER     builds FOLDER/mamba
"""
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEDULES = ["forward", "reverse", "lockstep", "1", "2", "3", "4"]


def run(*command):
    done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}")


def build(folder, *flags, source=None):
    """The whole program, compiled with these flags; source: another text of mamba_cuda.cu. Returns its path."""
    folder = pathlib.Path(folder)
    source = source or ROOT / "mamba_cuda.cu"
    fma = ["-mfma"] if " fma " in pathlib.Path("/proc/cpuinfo").read_text() else []  # else fmaf() is a function
    common = ["-O1", "-g1", "-ffp-contract=off", *fma, "-I", ROOT, *flags]
    # The plain C kernels alone: they compile fastest. Without OpenMP, whose threads ThreadSanitizer does not know.
    jobs = [["gcc", "-std=gnu11", *common, "-DMAMBA_CUDA", "-DMAMBA_PLAIN_C", "-c", ROOT / "mamba.c", "-o", folder / "main.o"],
            ["g++", "-x", "c++", "-std=c++17", *common, "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DCUDA_EMULATION", "-c", source,
             "-o", folder / "cuda.o"]]
    running = [subprocess.Popen([str(part) for part in job], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for job in jobs]
    for process in running:
        output = process.communicate()[0]
        if process.returncode != 0:
            raise RuntimeError(output[-4000:])
    run("g++", *flags, folder / "main.o", folder / "cuda.o", "-o", folder / "mamba", "-lm")
    return folder / "mamba"


def available():
    """Why it cannot be built here, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None if "x86_64" in subprocess.run(["uname", "-m"], stdout=subprocess.PIPE, text=True).stdout else "the emulation runs on x86-64 only"


# ---- Mutants ----

def device_code(text):
    """Where kernels and what they call begin and end in the text of mamba_cuda.cu."""
    return text.index("// Fragments: what a lane holds"), text.index("// The device.\n")


def mutate(folder):
    """One source that holds all mutants, of which CUDA_MUTANT=N chooses one: a barrier left out, a mask without its last lane, the
    right side of a comparison of integers one larger. Returns (its path, descriptions [N])."""
    text = (ROOT / "mamba_cuda.cu").read_text()
    begin, end = device_code(text)
    mutants = []

    def replaced(match, line):
        what = match.group(0)
        mutants.append(f"{what.strip()} in: {line.strip()}")
        n = len(mutants) - 1
        if what == "__syncthreads();":
            return f"if (!mutant({n})) __syncthreads();"
        if what == "WHOLE_WARP":
            return f"(mutant({n}) ? 0x7fffffffu : 0xffffffffu)"
        return f"{what}mutant({n}) + "

    lines = []
    seen = True             # by g++
    for line in text[begin:end].splitlines(keepends=True):
        seen = not line.startswith("#ifndef CUDA_EMULATION") and (seen or line.startswith("#endif"))
        code, slash, comment = line.partition("//")
        if seen and not line.lstrip().startswith("#") and "constexpr" not in code and "static_assert" not in code and not code.startswith("//"):
            code = re.sub(r"__syncthreads\(\);|\bWHOLE_WARP\b| (?:<|>|<=|>=) (?!<|[\d.]+(?:e[-+]?\d+)?f\b)", lambda m: replaced(m, line), code)
        lines.append(code + slash + comment)
    chooser = '#include <cstdlib>\nstatic int mutant(int n) { static const char *s = getenv("CUDA_MUTANT"); static const int one = s ? atoi(s) : -1; return n == one; }\n'
    path = pathlib.Path(folder) / "mutants.cu"
    path.write_text(chooser + text[:begin] + "".join(lines) + text[end:])
    return path, mutants


if __name__ == "__main__":
    print(build(sys.argv[1]))
