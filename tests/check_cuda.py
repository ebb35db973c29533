"""The GPU backend in depth. Part of `make check`; `make test-cuda` runs it with a GPU too, where there is one.

Emulated: every schedule of threads, every format and odd shape, ThreadSanitizer, AddressSanitizer with UBSan, and mutants that must be
noticed. Compiled by nvcc for every architecture: no spilled register, stated numbers of them, and the instructions that the kernels
are about. On a GPU: compute-sanitizer and the bench."""
import os
import re
import shutil
import subprocess

import gguf
import numpy as np
import pytest

import emulated_cuda
import test_formats
from conftest import FIXTURES, ROOT
from test_cuda import cuda, distance, emulated_program, gpu_program, logits_of, path_of, text  # noqa: F401 (fixtures)

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


def write_shape(path, d_model, d_inner, d_state, d_conv, dt_rank, n_vocab=37, n_layer=2, kind="F32", seed=2):
    """A random model of a shape that nobody publishes."""
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
    for name, (rows, cols) in matrices.items():
        of_kind = gguf.GGMLQuantizationType[kind]
        w.add_tensor(name + ".weight", gguf.quants.quantize(normal(rows, cols) * np.float32(1 / np.sqrt(cols)), of_kind), raw_dtype=of_kind)
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
    for chunk in (1, 2, 33):  # shorter than the convolution, and between the kernels' shapes
        assert logits_of(cuda, path, ids, tmp_path, "--device", "cuda", "-ub", chunk).tobytes() == found.tobytes()


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
    slices = write_shape(folder / "slices.gguf", 300, 20, 20, 4, 2, n_layer=1, kind="F32")
    lanes = write_shape(folder / "lanes.gguf", 8, 9, 70, 4, 2, n_layer=1, kind="BF16")
    q8_0 = write_shape(folder / "q8_0.gguf", 64, 32, 4, 4, 32, n_layer=1, kind="Q8_0")
    batch = b'{"ids": [1, 2, 3], "max_tokens": 2, "seed": 1}\n{"ids": [4], "max_tokens": 3, "seed": 2}\n{"ids": [7, 7], "max_tokens": 2, "seed": 3}\n'
    runs = [(["generate", path, "--jsonl", "--print-ids", "--logprobs", "3", "-q", *options], batch)
            for path in (f16, slices, lanes, q8_0) for options in ([], ["-ub", "2"])]
    runs += [(["score", path, "--per-token", "--ids", text(np.arange(66) % 37)], None) for path in (f16, slices, lanes, q8_0)]
    runs += [(["score", FIXTURES / "mamba_falcon.f32.bin", "--per-token", "--ids", text(range(n))], None) for n in (1, 5)]
    k = test_formats.write_model(folder / "k.gguf", "Q2_K")
    return [*runs, (["score", k, "--per-token", "--ids", text(range(3))], None), (["score", k, "--per-token", "--ids", text(range(66))], None)]


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


def test_schedules(emulated_program, runs):  # noqa: F811
    first = outputs(emulated_program, runs)
    assert all(isinstance(output, bytes) and output for output in first), first
    for schedule in emulated_cuda.SCHEDULES[1:]:
        assert outputs(emulated_program, runs, CUDA_EMU_SCHEDULE=schedule) == first, schedule


@pytest.mark.parametrize("flags", [["-fsanitize=thread"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
def test_sanitizers(emulated_program, runs, flags, tmp_path):  # noqa: F811
    program = emulated_cuda.build(tmp_path, *flags)
    expected = outputs(emulated_program, runs)
    environment = {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0", "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    for schedule in ("forward", "1"):
        assert outputs(program, runs, CUDA_EMU_SCHEDULE=schedule, **environment) == expected, schedule


# ---- mutants ----

# Mutants that change nothing that could be seen, by a part of their line, and why.
SAME = {
}


def test_mutants(emulated_program, runs, tmp_path):  # noqa: F811
    """Each barrier left out, each mask without its last lane, each bound moved by one makes some run differ."""
    source, mutants = emulated_cuda.mutate(tmp_path)
    program = emulated_cuda.build(tmp_path, "-w", source=source)
    expected = outputs(emulated_program, runs)
    assert outputs(program, runs) == expected  # none chosen
    alive = []
    for n, what in enumerate(mutants):
        if any(part in what for part in SAME):
            continue
        noticed = any(outputs(program, [run], CUDA_MUTANT=str(n), CUDA_EMU_SCHEDULE=schedule) != [output]
                      for schedule in ("reverse", "forward") for run, output in zip(runs, expected))
        if not noticed:
            alive.append(what)
    assert len(mutants) > 60 and not alive, "\n".join(alive)
