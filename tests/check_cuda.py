"""The GPU backend in depth. Part of `make check`; `make test-cuda` runs it with a GPU too, where there is one.

Emulated: every schedule of threads, every format and odd shape, ThreadSanitizer, AddressSanitizer with UBSan, and mutants that must be
noticed. Compiled by nvcc for every architecture: no spilled register, stated numbers of them, and the instructions that the kernels
are about. On a GPU: compute-sanitizer and the bench."""
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest

import emulated_cuda
import test_formats
from conftest import FIXTURES, ROOT
from test_cuda import distance, logits_of, path_of, text

# ---- numbers ----

# RMS of the difference to the CPU, of the logits' deviation: activations rounded to 8 bits now and then fall to the other side of a half.
@pytest.mark.parametrize("name", test_formats.FORMATS)
def test_formats_agree(cuda, name, tmp_path):
    path = test_formats.write_model(tmp_path / "m.gguf", name)
    ids = np.random.default_rng(5).integers(0, test_formats.N_VOCAB, 67)
    found = logits_of(cuda, path, ids, tmp_path, "--device", "cuda")
    expected = logits_of(cuda, path, ids, tmp_path, "--device", "cpu")
    if name in ("F32", "F16", "BF16"):
        assert distance(found, expected) <= {"F32": 1e-4, "F16": 2e-3, "BF16": 2e-3}[name]
    else:
        assert np.sqrt(((found - expected) ** 2).mean()) <= 0.01 * expected.std()
        assert np.abs(found[0] - expected[0]).max() <= 1e-3 * expected.std()  # before anything is amplified
    for chunk in (1, 9):
        assert logits_of(cuda, path, ids, tmp_path, "--device", "cuda", "-ub", chunk).tobytes() == found.tobytes()


def write_shape(path, d_model, d_inner, d_state, d_conv, dt_rank, n_vocab=37, n_layer=2, kind="F32", ties=False, seed=2):
    """A random model of a shape that nobody publishes. ties: all logits of a row are equal, and below zero."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(str(path), "mamba")
    for key, value in (("block_count", n_layer), ("embedding_length", d_model), ("ssm.inner_size", d_inner), ("ssm.state_size", d_state),
                       ("ssm.conv_kernel", d_conv), ("ssm.time_step_rank", dt_rank), ("context_length", 1024)):
        w.add_uint32("mamba." + key, value)
    w.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    matrices = {"token_embd": (n_vocab, d_model)}
    vectors = {"output_norm.weight": 1 + 0.1 * normal(d_model)}
    for i in range(n_layer):
        matrices |= {f"blk.{i}.ssm_in": (2 * d_inner, d_model), f"blk.{i}.ssm_x": (dt_rank + 2 * d_state, d_inner),
                     f"blk.{i}.ssm_dt": (d_inner, dt_rank), f"blk.{i}.ssm_out": (d_model, d_inner)}
        vectors |= {f"blk.{i}.attn_norm.weight": 1 + 0.1 * normal(d_model), f"blk.{i}.ssm_conv1d.weight": 0.5 * normal(d_inner, d_conv),
                    f"blk.{i}.ssm_conv1d.bias": 0.1 * normal(d_inner), f"blk.{i}.ssm_dt.bias": normal(d_inner) - 3,
                    f"blk.{i}.ssm_a": -np.exp(normal(d_inner, d_state)), f"blk.{i}.ssm_d": normal(d_inner)}
    if ties:
        vectors["output_norm.weight"] *= -1
    for name, (rows, cols) in matrices.items():
        of_kind = gguf.GGMLQuantizationType[kind]
        values = normal(rows, cols) * np.float32(1 / np.sqrt(cols))
        if ties and name == "token_embd":
            values[:] = 3
        elif ties:
            values *= np.float32(0.1)
        w.add_tensor(name + ".weight", gguf.quants.quantize(values, of_kind), raw_dtype=of_kind)
    for name, values in vectors.items():
        w.add_tensor(name, values)
    for write in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        write()
    return path


SHAPES = {  # d_model, d_inner, d_state, d_conv, dt_rank
    "one of each": (1, 1, 1, 1, 1),
    "odd": (33, 47, 17, 2, 3),
    "states in memory order": (16, 24, 64, 4, 1),
    "sixteen lanes": (16, 20, 100, 4, 5),
    "the most states": (16, 18, 256, 3, 2),
    "several slices": (700, 530, 3, 5, 300),
}


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(cuda, shape, kind, tmp_path):
    path = write_shape(tmp_path / "m.gguf", *SHAPES[shape], kind=kind)
    ids = np.random.default_rng(6).integers(0, 37, 66)
    found = logits_of(cuda, path, ids, tmp_path, "--device", "cuda")
    assert distance(found, logits_of(cuda, path, ids, tmp_path, "--device", "cpu")) <= (1e-4 if kind == "F32" else 2e-3)
    for chunk in (1, 2, 33) if shape != "several slices" else (2,):  # shorter than the convolution, and between the kernels' shapes
        assert logits_of(cuda, path, ids, tmp_path, "--device", "cuda", "-ub", chunk).tobytes() == found.tobytes()
    lines = b"".join(json.dumps({"ids": [i, 3 * i], "max_tokens": 2 + i % 2, "seed": i, "logprobs": 1}).encode() + b"\n" for i in range(10))
    arguments = ["generate", path, "--jsonl", "--print-ids", "--ignore-eos", "-q", "--device", "cuda"]
    alone = cuda(*arguments, "-np", "1", input=lines).stdout
    assert b"error" not in alone and len(alone.splitlines()) == 10
    assert cuda(*arguments, "-np", "10", input=lines).stdout == alone


def test_too_many_states(cuda, tmp_path):
    """A model that the GPU does not run: the CPU does, unless --device cuda was asked for."""
    path = write_shape(tmp_path / "m.gguf", 8, 8, 257, 4, 1)
    assert cuda("score", path, "--ids", "1 2").stdout == cuda("score", path, "--ids", "1 2", "--device", "cpu").stdout
    done = cuda("score", path, "--ids", "1 2", "--device", "cuda", check=False)
    assert done.returncode == 1 and b"257" in done.stderr and done.stderr.count(b"\n") == 1 and done.stdout == b""


def test_turing(cuda, tmp_path):
    """Without bf16 in its tensor cores, such weights are uploaded as F32."""
    if not cuda.emulated:
        pytest.skip("the emulation chooses the architecture")
    ids = list(range(20))
    expected = logits_of(cuda, path_of("mamba_tied.bf16"), ids, tmp_path, "--device", "cpu")
    assert distance(logits_of(cuda, path_of("mamba_tied.bf16"), ids, tmp_path, CUDA_EMU_ARCH="75"), expected) <= 1e-4


def test_infinities_are_seen(cuda, tmp_path):
    """A number that is not finite reaches the logits through every method of the products, and is reported."""
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        path = write_shape(tmp_path / f"{kind}.gguf", 32, 32, 4, 4, 32, kind=kind)
        data = bytearray(path.read_bytes())
        tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == "blk.0.ssm_dt.weight")
        at = int(tensor.data_offset)
        data[at:at + 4] = np.float32(np.inf).tobytes() if kind == "F32" else {"F16": b"\0\x7c\0\0", "BF16": b"\x80\x7f\0\0", "Q8_0": b"\0\x7c\1\1"}[kind]
        path.write_bytes(data)
        done = cuda("score", path, "--ids", "1 2 3", "--device", "cuda", check=False)
        assert done.returncode == 1 and b"finite" in done.stderr, (kind, done.stdout, done.stderr)


# ---- schedules and sanitizers ----

def small_runs(folder):
    """Short runs that together reach all kernels and their branches: (arguments, standard input)."""
    f16 = write_shape(folder / "f16.gguf", 40, 33, 5, 3, 3, n_layer=1, kind="F16")
    slices = write_shape(folder / "slices.gguf", 520, 20, 20, 4, 260, n_layer=1, kind="F32")  # of dt_proj fewer than of in_proj
    lanes = write_shape(folder / "lanes.gguf", 8, 9, 65, 4, 2, n_layer=1, kind="BF16")
    q8_0 = write_shape(folder / "q8_0.gguf", 64, 32, 4, 4, 32, n_layer=1, kind="Q8_0")
    wide = write_shape(folder / "wide.gguf", 8, 8, 3, 4, 2, n_vocab=300, n_layer=1, kind="F16")  # more tokens than threads that choose one
    five = write_shape(folder / "five.gguf", 1088, 8, 4, 4, 2, n_layer=1)  # slices
    ties = write_shape(folder / "ties.gguf", 8, 16, 3, 4, 2, n_vocab=300, n_layer=1, ties=True)
    batch = b'{"ids": [1, 2, 3, 4, 5], "max_tokens": 2, "seed": 1}\n{"ids": [4], "max_tokens": 3, "seed": 2}\n{"ids": [7, 7], "max_tokens": 2, "seed": 3}\n'
    runs = [(["generate", path, "--jsonl", "--print-ids", "--logprobs", "3", "-q", *options], batch)
            for path in (f16, slices, lanes, q8_0) for options in ([], ["-ub", "2"])]
    greedy = batch.replace(b'"seed"', b'"temperature": 0, "seed"')
    runs += [(["generate", path, "--jsonl", "--print-ids", "-q"], greedy) for path in (f16, q8_0, wide)]
    runs += [(["score", path, "--per-token", "-ub", "65", "--ids", text(np.arange(70) % 37)], None) for path in (f16, slices, lanes, q8_0)]
    runs += [(["generate", ties, "--greedy", "--print-ids", "-n", "2", "--ids", "5", "-q"], None), (["score", five, "--per-token", "--ids", text(range(36))], None)]
    runs += [(["score", wide, "--per-token", "--ids", text(range(30))], None)]  # half of the warps of a tile have columns
    runs += [(["score", FIXTURES / "mamba_falcon.f32.bin", "--per-token", "--ids", text(range(n))], None) for n in (1, 5)]
    k = test_formats.write_model(folder / "k.gguf", "Q2_K")
    return [*runs, (["score", k, "--per-token", "--ids", text(range(3))], None), (["score", k, "--per-token", "--ids", text(range(65))], None)]


def outputs(program, runs, **environment):
    """What they write; a run that fails is its exit status."""
    found = []
    for arguments, data in runs:
        done = subprocess.run([program, *map(str, arguments), "--device", "cuda"], input=data or b"", capture_output=True, timeout=600,
                              env={**os.environ, **environment})
        found.append(done.stdout if done.returncode == 0 else (done.returncode, done.stderr[-1500:].decode(errors="replace")))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return small_runs(tmp_path_factory.mktemp("runs"))


def test_schedules(emulated_program, runs):
    first = outputs(emulated_program, runs)
    assert all(isinstance(output, bytes) and output for output in first), first
    for schedule in emulated_cuda.SCHEDULES[1:]:
        assert outputs(emulated_program, runs, CUDA_EMU_SCHEDULE=schedule) == first, schedule


SANITIZER_OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0", "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


@pytest.mark.parametrize("flags", [["-fsanitize=thread"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
def test_sanitizers(emulated_program, runs, flags, tmp_path):
    program = emulated_cuda.build(tmp_path, *flags)
    expected = outputs(emulated_program, runs)
    for schedule in ("forward", "1"):
        assert outputs(program, runs, CUDA_EMU_SCHEDULE=schedule, **SANITIZER_OPTIONS) == expected, schedule


# ---- mutants ----

# Mutants that change nothing that could be seen, by a part of what is said of them, and why.
SAME = {
    "const bool finite = exponent": "magnitudes above 1.7e38, whose squares overflow",
    "const float inverse = exponent > 0": "magnitudes below 2.4e-38",
    "first < in.n * TILE * share": "one round more, in which no output exists",
    "logit == than && id < than_id": "no token is compared with itself",
    "N < per_word": "where a load has whole words, the shift is zero anyway",
    "if (first + 64 < end) load(next": "weights of one block more are loaded, and not used; so in the next three",
    "if (k + 128 < end) load(next": "",
    "if (first + N < end) load_fragment": "",
    "if (block + 2 * N < end) load_fragment": "",
    "COLUMNS > 1 &&": "COLUMNS is 1 or 8",
    "prefetch(state": "a prefetch changes nothing; so in the next two",
    "tile * TILE >= out.split) return": "",
    "n * (out.c.d_conv - 1); i += n_threads)": "",
    "for (int n0 = first; n0 < end": "four states behind the last one fail n0 + i < end",
    "channel < s.n ?": "a channel more is padding, whose numbers are zero; so in the next",
    "if (channel >= c.n) return": "",
    "i < S::STAGES - 1": "the unit is copied to its own stage once more; or one behind the last, to a stage that is not used; so in the next two",
    "if (unit + i < end) from": "",
    "if (unit + S::STAGES - 1 < end)": "",
    "if (thread < S::COLUMNS && group0": "a factor more, where nothing else is or no column",
    "if (row + r < w.rows": "a row more is padding",
    "n0 < SCAN_LANES * PER_LANE": "16 states more fail n0 + i < s.d_state",
    "[i] = n0 + i < s.d_state ?": "a state more is not used",
    "i < N; i += 32 * S::WARPS": "more factors fail i + thread < N",
    "j < SCAN_GROUP) s.y": "another lane has the same sum; a token more is not a span's, or is written by its own",
    "a2[i] = n < s.d_state": "B and C of a state more are zero; so in the next",
    "h[i] = n < s.d_state": "",
    "unit < UNITS": "a unit more fails unit < n",
    "q == 0 && half * N + b": "factors of a unit more are padding",
    "i < high; i++) words": "a word more lands where the scales come next",
    "t0 < sp.n": "a tile more has no tokens",
}


def test_mutants(emulated_program, runs, tmp_path):
    """Each barrier left out, each mask without its last lane, each bound moved by one makes some run differ, or a sanitizer speak."""
    source, mutants = emulated_cuda.mutate(tmp_path)
    builds = {"plain": [], "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "thread": ["-fsanitize=thread"]}
    for name in builds:
        (tmp_path / name).mkdir()
    programs = {name: emulated_cuda.build(tmp_path / name, "-w", *flags, source=source) for name, flags in builds.items()}
    expected = outputs(emulated_program, runs)
    assert outputs(programs["plain"], runs) == expected  # none chosen

    def noticed(n):
        return any(outputs(programs[name], [run], CUDA_MUTANT=str(n), CUDA_EMU_SCHEDULE=schedule, **SANITIZER_OPTIONS) != [output]
                   for name, schedule in (("plain", "reverse"), ("plain", "forward"), ("address", "forward"), ("thread", "forward"))
                   for run, output in zip(runs, expected))

    tried = [n for n, what in enumerate(mutants) if not any(part in what for part in SAME)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        alive = [mutants[n] for n, seen in zip(tried, pool.map(noticed, tried)) if not seen]
    assert len(tried) > 70 and not alive, "\n".join(alive)


# ---- compiled by nvcc ----

ARCHITECTURES = ["75", "80", "86", "90", "100", "120"]
# The most registers of any of a kernel's forms and architectures. With more than 128, an SM has room for one block of 256 threads less.
CEILINGS = {"product_few": 255, "product_tiles": 255, "prepare": 128, "add_slices": 48, "scan_tokens": 128, "scan_steps": 128, "choose_rows": 64, "conv_tokens": 48,
            "norm_tokens": 48, "norm_dt_b_c": 48}
# Products: few columns (one, or 8) and tiles of three sizes, F32 of two; the others: three each of scan_tokens and scan_steps, choose, conv,
# two norms, add_slices.
PRODUCTS = 5 * len(test_formats.FORMATS) - 1


def tool(name):
    """A program of CUDA's toolkit, or of its wheels in the tests' environment (tests/requirements-check.txt)."""
    wheels = pathlib.Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/cu*/bin/{name}")
    found = shutil.which(name) or next(map(str, wheels), None)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """`make cuda` in a folder of its own: (folder, what ptxas said)."""
    folder = tmp_path_factory.mktemp("nvcc")
    nvcc = tool("nvcc")
    for name in ("Makefile", "mamba.c", "mamba_cuda.cu"):
        shutil.copy(ROOT / name, folder)
    done = subprocess.run(["make", "cuda", f"NVCC={nvcc}", "NVCC_EXTRA=-Xptxas -v"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert not re.search(r"warning", done.stdout.replace("-Wno-warning", "")), done.stdout
    return folder, done.stdout


def kernel_name(mangled):
    """product_few<Q8_0, 8> of _Z11product_fewIL6format3ELi8EEv..."""
    name = re.match(r"_Z\d+([a-z_]+?)(?:I(.*?)EEv|\d|P)", mangled)
    template = re.findall(r"6format(\d+)|Li(\d+)", name[2] or "")
    values = [test_formats.FORMATS[int(f)] if f else n for f, n in template]
    return name[1], f"{name[1]}<{', '.join(values)}>" if values else name[1], values


@pytest.mark.xdist_group("nvcc")
def test_registers(compiled):
    """Nothing is spilled on any architecture, and no kernel has more registers than its ceiling. The sums of tiles are in local memory."""
    found = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
                       r"(\d+) bytes spill loads\n.*?Used (\d+) registers", compiled[1])
    kernels = {(kernel_name(mangled)[1], arch) for mangled, arch, *_ in found}
    assert {arch for _, arch in kernels} == set(ARCHITECTURES)
    assert len(found) == len(kernels) == len(ARCHITECTURES) * (PRODUCTS + len(test_formats.FORMATS) + 11)
    for mangled, arch, stack, stores, loads, registers in found:
        base, name, values = kernel_name(mangled)
        sums = 16 * int(values[1]) * int(values[2]) if base == "product_tiles" else 0
        assert (int(stores), int(loads)) == (0, 0) and int(stack) in (0, sums), f"{name} spills on sm_{arch}"
        assert int(registers) <= CEILINGS[base], f"{name} has {registers} registers on sm_{arch}"


@pytest.mark.xdist_group("nvcc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions(compiled, arch):
    """Weights are read 16 bytes a lane (or 8, the plane of single bits), nothing narrower than a word; tensor cores multiply; local memory
    holds the sums of tiles alone."""
    cuobjdump = tool("cuobjdump")
    tool("nvdisasm")
    path = f"{os.path.dirname(cuobjdump)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([cuobjdump, "-sass", "-arch", f"sm_{arch}", compiled[0] / "mamba"], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "PATH": path})
    functions = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)[1:]
    products = 0
    for mangled, code in zip(functions[::2], functions[1::2]):
        base, name, values = kernel_name(mangled)
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, flags=re.MULTILINE)
        assert instructions and (base == "product_tiles" or not any(i.startswith(("LDL", "STL")) for i in instructions)), name
        if not base.startswith("product"):
            continue
        products += 1
        loads = [i for i in instructions if i.startswith("LDG")]
        assert not [i for i in loads if re.search(r"\.[US](8|16)", i)], f"{name}: {loads}"
        assert sum(i.endswith(".128") or ".128." in i for i in loads) >= 4, f"{name}: {loads}"
        # BF16 has no tensor cores on Turing, where those weights are uploaded as F32.
        expected = None if values[0] == "F32" or (values[0] == "BF16" and arch == "75") else "HMMA" if values[0] in ("F16", "BF16") else "IMMA"
        assert expected is None or any(i.startswith(expected) for i in instructions), f"{name} has no {expected}"
    assert products == PRODUCTS


@pytest.mark.xdist_group("nvcc")
def test_starts_without_a_gpu(compiled):
    """The program needs none of CUDA's libraries to start, and runs on the CPU where no GPU is."""
    program = compiled[0] / "mamba"
    libraries = subprocess.run(["ldd", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "not found" not in libraries and not re.search(r"libcu|libnv|stdc\+\+", libraries), libraries
    arguments = ["score", path_of("mamba_tied.f32"), "--ids", "1 2 3"]
    cpu = subprocess.run([ROOT / "mamba", *arguments, "--device", "cpu"], capture_output=True, check=True)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([program, *arguments], capture_output=True, check=True, env=hidden).stdout == cpu.stdout
    done = subprocess.run([program, *arguments, "--device", "cuda"], capture_output=True, env=hidden)
    assert done.returncode == 1 and done.stderr.startswith(b"mamba: --device cuda: no NVIDIA ") and done.stderr.count(b"\n") == 1


def test_make_says_what_is_missing(tmp_path):
    done = subprocess.run(["make", "-C", ROOT, "cuda", "NVCC=no-such-compiler"], capture_output=True, text=True)
    assert done.returncode != 0 and "nvcc" in done.stderr and "install" in done.stderr
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "-C", ROOT, "cuda", f"NVCC={old}"], capture_output=True, text=True)
    assert done.returncode != 0 and "nvcc 12 or later" in done.stderr


# ---- on a GPU ----

def test_compute_sanitizer(gpu_program):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed")
    for check in ("memcheck", "racecheck", "synccheck", "initcheck"):
        for n in (1, 70):
            subprocess.run(["compute-sanitizer", f"--tool={check}", "--error-exitcode=9", gpu_program, "score", path_of("mamba_awkward.q8_0"),
                            "--ids", text(range(n)), "--device", "cuda"], check=True, stdout=subprocess.DEVNULL)


def test_gpu_bench(gpu_program):
    """Prints what `mamba bench` measures; README's figures come from here."""
    done = subprocess.run([gpu_program, "bench", ROOT / "models" / "tales.bin", "--device", "cuda", "-r", "3"], stdout=subprocess.PIPE, text=True,
                          check=True)
    print(done.stdout)
    assert done.stdout.count("\n") > 10
