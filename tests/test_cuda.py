"""The GPU backend: the whole program, its commands and files, with mamba_cuda.cu run by an emulation of CUDA (cuda_emu.h).

`make test-cuda` runs the same tests on a GPU as well, where there is one, with the program that `make cuda` builds. Against the CPU,
log-probabilities agree within a tolerance; among batches, chunks and ways to launch, every comparison is of bytes."""
import json
import subprocess

import numpy as np
import pytest

import reference
from conftest import PROGRAM
from sounds import unet  # noqa: F401 (a fixture)
from test_model import model_path as path_of, numbers, text

# Of a log-probability in nats, against the CPU and the reference. BF16: activations keep 16 bits. Block-quantised weights: both round
# activations to 8 bits, and a rounding that falls to the other side of a half shows.
TOLERANCE = {"f32": 1e-4, "f16": 2e-3, "bf16": 2e-3, "q8_0": 2e-2}
FILES = ["mamba_tied.f32", "mamba_untied.f32", "mamba_falcon.f32", "mamba_awkward.f32", "mamba_tied.f16", "mamba_tied.bf16", "mamba_tied.q8_0",
         "mamba_awkward.q8_0"]


def logits_of(run, path, ids, tmp_path, *options, **environment):
    out = tmp_path / "logits.npy"
    run("score", path, "--ids", text(ids), "--logits", out, *options, **environment)
    values = np.load(out)
    out.unlink()
    return values


def distance(a, b):
    """The largest difference of log-probabilities; not below any tolerance where a number is missing."""
    return np.abs(reference.log_softmax(a) - reference.log_softmax(b)).max()


@pytest.mark.parametrize("name", FILES)
def test_logits(cuda, name, tmp_path):
    """Of 70 tokens in one pass (the kernels for prompts): against the CPU, and against what transformers said where it ran on the same
    numbers. In passes of one token and of 7 (the kernels for few columns): the same bytes."""
    ids, tolerance = numbers(name)["ids"][:70], TOLERANCE[name.split(".")[1]]
    found = logits_of(cuda, path_of(name), ids, tmp_path, "--device", "cuda")
    assert distance(found, logits_of(cuda, path_of(name), ids, tmp_path, "--device", "cpu")) <= tolerance
    if "q8_0" not in name:  # whose fixture knows no rounded activations
        expected = numbers(name)["logprobs"][:69]
        assert np.abs(reference.log_softmax(found)[np.arange(69), ids[1:]] - expected).max() <= tolerance
    for chunk in (1, 7):
        assert logits_of(cuda, path_of(name), ids, tmp_path, "--device", "cuda", "-ub", chunk).tobytes() == found.tobytes()


@pytest.mark.parametrize("name", ["mamba_tied.f16", "mamba_falcon.f32", "mamba_awkward.q8_0"])
def test_greedy(cuda, name):
    """The text that transformers continues with, one graph a token; without graphs and in lock-step the same."""
    expected = numbers(name)
    key = next(k for k in expected if k.startswith("greedy_"))
    arguments = ["generate", path_of(name), "--greedy", "--print-ids", "-n", "12", "--ids", text(expected["ids"][:int(key[7:])]), "--ignore-eos"]
    first = cuda(*arguments).stdout
    assert [int(word) for word in first.split()] == list(expected[key][:12])
    assert cuda(*arguments, "--device", "cuda", MAMBA_CUDA_GRAPHS="0").stdout == first


def test_batches(cuda):
    """Requests of all lengths, drawn and scored: the same bytes for every -np and -ub, which give the kernels all their shapes."""
    random = np.random.default_rng(3)
    lines = b""
    for i in range(12):
        ids = [int(t) for t in random.integers(0, 160, random.choice([1, 2, 5, 40]))]
        lines += json.dumps({"id": i, "ids": ids, "max_tokens": int(random.choice([1, 4, 9])), "seed": i, "logprobs": 2}).encode() + b"\n"
    arguments = ["generate", path_of("mamba_tied.q8_0"), "--jsonl", "--print-ids", "-q", "--device", "cuda"]
    first = cuda(*arguments, "-np", "1", input=lines).stdout
    assert len(first.splitlines()) == 12 and b"error" not in first
    for options in (["-np", "12"], ["-np", "3", "-ub", "4"], ["-np", "12", "-ub", "100"]):
        assert cuda(*arguments, *options, input=lines).stdout == first, options
    assert cuda(*arguments, "-np", "12", input=lines, MAMBA_CUDA_GRAPHS="0").stdout == first


def test_embed(cuda, tmp_path):
    """Hidden states after every number of blocks and after the final norm."""
    name = "mamba_tied.f32"
    for options in (["--layer", "0"], ["--layer", "1"], ["--layer", "2"], []):
        rows = []
        for device in ("cuda", "cpu"):
            cuda("embed", path_of(name), "--ids", text(numbers(name)["ids"][:20]), "--pool", "none", *options, "--device", device, "-o", tmp_path / "e.npy")
            rows.append(np.load(tmp_path / "e.npy"))
        assert rows[0].shape == (20, 64) and np.abs(rows[0] - rows[1]).max() <= 2e-5 * max(1.0, np.abs(rows[1]).max())


@pytest.mark.parametrize("name", ["mamba_tied.f16", "mamba_awkward.f32"])
def test_states_move(cuda, name, tmp_path):
    """A text that is saved on one side and goes on on the other; on the GPU alone, a detour through a file changes nothing."""
    ids = numbers(name)["ids"][:21]
    go_on = ["generate", path_of(name), "--greedy", "--print-ids", "-n", "6", "--ignore-eos"]
    whole = cuda(*go_on, "--ids", text(ids), "--device", "cpu").stdout
    for first, second in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")):
        state = tmp_path / f"{first}.state"
        cuda("generate", path_of(name), "-n", "0", "--print-ids", "--ids", text(ids[:12]), "--save-state", state, "--device", first)
        assert cuda(*go_on, "--ids", text(ids[12:]), "--load-state", state, "--device", second).stdout == whole, (first, second)
    # The state files of both sides hold nearly the same numbers.
    a, b = (np.frombuffer(state.read_bytes()[80 + 4 * 12:-8], np.float32) for state in (tmp_path / "cpu.state", tmp_path / "cuda.state"))
    assert a.shape == b.shape and np.abs(a - b).max() <= 1e-3 * np.abs(a).max()
    # Requests that all continue one state, each from a copy of it.
    lines = b"".join(json.dumps({"ids": [int(i)], "max_tokens": 3, "temperature": 0}).encode() + b"\n" for i in ids[12:16])
    outputs = [cuda("generate", path_of(name), "--jsonl", "--print-ids", "--load-state", tmp_path / "cuda.state", "-np", n, "-q", input=lines).stdout
               for n in ("1", "4")]
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 4


def test_bench(cuda):
    done = cuda("bench", path_of("mamba_tied.f16"), "--device", "cuda", "-p", "20", "-n", "2", "-np", "1,3", "-r", "1", "-o", "jsonl", "-q")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["n_prompt"], r["n_gen"], r["n_parallel"]) for r in rows] == [(20, 0, 1), (0, 2, 1), (20, 0, 3), (0, 2, 3)]
    for r in rows:
        assert r["device"] == "cuda" and r["gpu_info"] and r["gpu_memory"] > 150000 and r["avg_ts"] > 0 and r["read_gb_per_s"] > 0
        assert (r["weight_gb_per_s"] > 0 and r["bandwidth_percent"] >= 0) == (r["n_gen"] > 0) or r["bandwidth_percent"] == 0


def test_sound_runs_on_the_cpu(cuda, unet):  # noqa: F811
    """An audio U-Net is not the GPU's: the CPU runs it by default, and --device cuda says so."""
    arguments = ["score", unet[0], "--ids", "128 5 77 200"]
    default = cuda(*arguments)
    assert default.stdout == cuda(*arguments, "--device", "cpu").stdout and default.stderr == b""
    done = cuda(*arguments, "--device", "cuda", check=False)
    assert done.returncode == 1 and done.stdout == b"" and b"U-Nets run on the CPU" in done.stderr and done.stderr.count(b"\n") == 1


# ---- choosing a device, and what goes wrong ----

def test_without_cuda():
    """The program that plain `make` builds."""
    arguments = [PROGRAM, "score", path_of("mamba_tied.f32"), "--ids", "1 2 3"]
    plain = subprocess.run(arguments, capture_output=True, check=True)
    assert subprocess.run([*arguments, "--device", "cpu"], capture_output=True, check=True).stdout == plain.stdout
    if b"" == subprocess.run([*arguments, "--device", "cuda"], capture_output=True).stdout:
        done = subprocess.run([*arguments, "--device", "cuda"], capture_output=True)
        assert done.returncode == 1 and done.stderr.startswith(b"mamba: --device cuda: ") and done.stderr.count(b"\n") == 1
    for wrong in (["--device", "gpu"], ["--device", "cuda", "--sandbox"], ["--device"]):
        done = subprocess.run([*arguments, *wrong], capture_output=True)
        assert done.returncode == 2 and done.stdout == b"" and done.stderr.startswith(b"mamba: --")


def emulated_only(cuda):
    if not cuda.emulated:
        pytest.skip("faults are made by the emulation")


@pytest.mark.parametrize("environment, words", [
    ({"CUDA_EMU_NO_DRIVER": "1"}, ["no NVIDIA driver"]),
    ({"CUDA_EMU_NO_DEVICE": "1"}, ["no NVIDIA GPU"]),
    ({"CUDA_EMU_FAULT": "driver"}, ["driver knows CUDA 11.8", "needs 13.0", "update"]),
    ({"CUDA_EMU_ARCH": "61"}, ["compute capability 6.1", "7.5"]),
    ({"CUDA_EMU_ARCH": "87", "CUDA_EMU_NO_CODE": "1"}, ["no code", "compute capability 8.7", "ARCHS=87"]),
])
def test_no_usable_gpu(cuda, environment, words):
    """By default the CPU runs the model, without a word; --device cuda says why it cannot."""
    emulated_only(cuda)
    arguments = ["score", path_of("mamba_tied.f32"), "--ids", "1 2 3"]
    cpu = cuda(*arguments, "--device", "cpu")
    default = cuda(*arguments, **environment)
    assert default.stdout == cpu.stdout and default.stderr == b""
    done = cuda(*arguments, "--device", "cuda", check=False, **environment)
    message = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and message.count("\n") == 1 and message.startswith("mamba: --device cuda: "), message
    assert all(word in message for word in words), message


def test_too_little_memory(cuda):
    emulated_only(cuda)
    done = cuda("score", path_of("mamba_tied.f32"), "--ids", "1 2 3", check=False, CUDA_EMU_MEMORY="1000000")
    message = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and message.count("\n") == 1, message
    assert all(word in message for word in ("GB free", "this takes", "weights", "smaller -np", "--device cpu")), message


@pytest.mark.parametrize("fault", ["cudaMalloc:3", "cudaMallocHost", "cudaMemcpyAsync:2", "cudaStreamCreate", "cudaSetDevice", "cudaMemGetInfo",
                                   "cudaMemsetAsync", "cudaGetDeviceProperties", "cudaDeviceGetAttribute", "cudaFuncGetAttributes:2"])
def test_a_failing_start(cuda, fault):
    emulated_only(cuda)
    for device in (["--device", "cuda"], []):
        done = cuda("score", path_of("mamba_tied.f32"), "--ids", "1 2 3", *device, check=False, CUDA_EMU_FAULT=fault)
        message = done.stderr.decode()
        if not device and done.returncode == 0:  # asked before a GPU was found usable: the CPU runs the model
            assert fault == "cudaDeviceGetAttribute"
            continue
        assert done.returncode == 1 and done.stdout == b"" and message.count("\n") == 1 and "the GPU failed while " in message, message


@pytest.mark.parametrize("fault", ["kernel:90", "cudaStreamSynchronize:40"])
def test_a_lost_gpu(cuda, fault):
    """What came before the fault is kept, and one line says what happened."""
    emulated_only(cuda)
    arguments = ["generate", path_of("mamba_tied.f32"), "--ids", "1 2 3", "-n", "30", "--print-ids", "--greedy", "--ignore-eos", "-q"]
    whole = cuda(*arguments).stdout
    done = cuda(*arguments, check=False, CUDA_EMU_FAULT=fault)
    message = done.stderr.decode()
    assert done.returncode == 1 and message.count("\n") == 1 and "the GPU failed while " in message, message
    assert whole.startswith(done.stdout) and len(done.stdout) < len(whole)
    assert done.stdout


@pytest.mark.parametrize("fault", ["cudaGraphLaunch:3", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_steps_without_a_graph(cuda, fault):
    """A graph takes memory of the driver's own; where there is none, the steps go on without."""
    emulated_only(cuda)
    arguments = ["generate", path_of("mamba_tied.f32"), "--ids", "1 2 3", "-n", "30", "--print-ids", "--greedy", "--ignore-eos", "-q"]
    assert cuda(*arguments, CUDA_EMU_FAULT=fault).stdout == cuda(*arguments).stdout
