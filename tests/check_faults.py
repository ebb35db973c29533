"""Faults while running: signals, killed saves, full disks, a model that is cut, no memory, slow readers. Part of `make check`."""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import gguf
import numpy as np
import pytest

from conftest import FIXTURES, PROGRAM, ROOT, run_mamba
from nucleotides import model  # noqa: F401: a fixture

TALES = ROOT / "models" / "tales.bin"
IDS_MODEL = FIXTURES / "mamba_tied.f32.bin"
ENDLESS = ["-n", "-1", "--ignore-eos", "-s", "1"]


def start(*arguments, **options):
    return subprocess.Popen([PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **options)


def wait_until_it_catches(run, number):
    """Returns when the program has its handler for the signal: however slow the machine is, what is sent then is for it."""
    def caught():
        status = pathlib.Path(f"/proc/{run.pid}/status").read_text()
        return int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], 16) >> number - 1 & 1
    deadline = time.monotonic() + 60
    while run.poll() is None and not caught():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def requests(n, max_tokens=5):
    return "".join(json.dumps({"id": i, "prompt": "Once upon a time", "max_tokens": max_tokens, "seed": i}) + "\n" for i in range(n)).encode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_answers_so_far(number):
    """Whole lines only, and each is what a run without a signal writes."""
    run = start(TALES, "--jsonl", "-np", 4, stdin=subprocess.PIPE)
    run.stdin.write(requests(200, 50))
    first = run.stdout.readline()
    run.send_signal(number)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and b"interrupted" in errors
    whole = run_mamba(TALES, "--jsonl", input=requests(200, 50)).stdout
    assert (first + rest).endswith(b"\n") and whole.startswith(first + rest) and len(first + rest) < len(whole)


@pytest.mark.parametrize("arguments", [[TALES, "-p", "Once", *ENDLESS], ["score", TALES, "-f", ROOT / "mamba.c"], ["embed", TALES, "-f", ROOT / "mamba.c"]])
def test_sigterm_ends_every_command(arguments):
    run = start(*arguments)
    wait_until_it_catches(run, signal.SIGTERM)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("arguments", [[TALES, "-p", "Once", *ENDLESS], ["score", TALES, "--per-token", "-f", ROOT / "mamba.c"],
                                       ["embed", TALES, "--pool", "none", "-f", ROOT / "mamba.c"], [TALES, "--jsonl"]])
def test_a_reader_that_leaves(arguments):
    """The program ends by itself, quietly."""
    run = start(*arguments, "-q", stdin=subprocess.PIPE)
    if "--jsonl" in arguments:
        run.stdin.write(requests(500))
    run.stdout.read(10)
    run.stdout.close()
    assert run.wait(60) == 0 and run.stderr.read() == b""


def test_a_slow_reader_gets_every_byte():
    """The program waits for it, in bounded memory."""
    run = start(IDS_MODEL, "--jsonl", "--print-ids", "-q", stdin=subprocess.PIPE)
    data = "".join(json.dumps({"ids": [i % 100], "max_tokens": 60, "seed": i}) + "\n" for i in range(1500)).encode()
    os.set_blocking(run.stdin.fileno(), False)
    sent = got = 0
    output = []
    while True:
        if sent < len(data):
            try:
                sent += os.write(run.stdin.fileno(), data[sent:sent + 65536])
            except BlockingIOError:
                pass
            if sent == len(data):
                run.stdin.close()
        if got < 20000:
            time.sleep(0.01)  # 100 reads a second of 200 bytes, then the rest at once
        piece = run.stdout.read(200 if got < 20000 else 1 << 20)
        if not piece:
            break
        output.append(piece)
        got += len(piece)
    assert run.wait(60) == 0
    assert b"".join(output) == run_mamba(IDS_MODEL, "--jsonl", "--print-ids", "-np", 1, input=data).stdout


def test_a_signal_ends_a_write_that_waits():
    """The reader does not read, the pipe is full, and the first signal is enough."""
    run = start(IDS_MODEL, "--ids", "1", "--print-ids", *ENDLESS)
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 128 + signal.SIGINT


def test_timeout_signals_twice(tmp_path):
    """coreutils' timeout signals the process and its group: that is one wish, and nothing is left behind."""
    subprocess.run(["timeout", "-s", "INT", "2", PROGRAM, TALES, "-p", "Once", *ENDLESS, "-q", "--save-state", tmp_path / "s"], stdout=subprocess.DEVNULL)
    subprocess.run(["timeout", "-s", "INT", "2", PROGRAM, "score", TALES, "-f", ROOT / "mamba.c", "-q", "--logits", tmp_path / "l.npy"], stdout=subprocess.DEVNULL)
    assert os.listdir(tmp_path) == ["s"]
    assert run_mamba(TALES, "--load-state", tmp_path / "s", "-n", 1).returncode == 0


def test_a_second_signal_ends_at_once_and_cleans_up(tmp_path):
    run = start("score", TALES, "-f", ROOT / "mamba.c", "-q", "-ub", 65536, "-t", 1, "--logits", tmp_path / "l.npy")  # one long step
    wait_until_it_catches(run, signal.SIGINT)
    time.sleep(0.5)  # now it has the handler that waits for the step
    run.send_signal(signal.SIGINT)
    time.sleep(1.2)
    if run.poll() is None:
        run.send_signal(signal.SIGINT)
    assert run.wait(2) == 128 + signal.SIGINT and os.listdir(tmp_path) == []


def test_an_early_signal_cleans_up(model, tmp_path):
    """While the input is waited for, before anything runs."""
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "pipe")
    run = start("score", model, "-q", "--fasta", tmp_path / "pipe", "--track", tmp_path / "out" / "t")
    wait_until_it_catches(run, signal.SIGINT)
    while not os.listdir(tmp_path / "out"):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 128 + signal.SIGINT and os.listdir(tmp_path / "out") == []


def test_a_signal_leaves_the_old_records(model, tmp_path):
    """A record that is cut would look whole: of several none is written, and one continuation is what came so far."""
    out = tmp_path / "o.fa"
    (tmp_path / "x.fa").write_text("".join(f">{i}\nACGT\n" for i in range(40)))
    for inputs, written in ((["--fasta", tmp_path / "x.fa"], False), (["-p", "ACGT"], True)):
        out.write_text("precious")
        run = start(model, *inputs, "-q", "-n", "100000000", "--ignore-eos", "--fasta-out", out)
        wait_until_it_catches(run, signal.SIGINT)
        time.sleep(1.5)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 128 + signal.SIGINT and (out.read_text().startswith(">1\n") if written else out.read_text() == "precious")
        assert (b"not written: interrupted" in errors) == (not written)


def test_killed_while_saving(tmp_path):
    """The state is the old one or the new one, whenever the kill comes."""
    state, wanted = tmp_path / "s.state", {}
    for seed in (1, 2):
        run_mamba(TALES, "-p", "Once upon a time", "-n", 3, "-s", seed, "--save-state", state)
        wanted[state.read_bytes()] = seed
    assert len(wanted) == 2
    chance, found = random.Random(1), []
    start_time = time.monotonic()
    run_mamba(TALES, "-p", "Once upon a time", "-n", 3, "-s", 1, "--save-state", state)
    usual = time.monotonic() - start_time
    for i in range(150):
        run = start(TALES, "-p", "Once upon a time", "-n", "3", "-s", str(1 + i % 2), "--save-state", state)
        time.sleep(chance.uniform(0.5, 1.1) * usual)
        run.kill()
        run.communicate()
        assert state.read_bytes() in wanted
        found.append(wanted[state.read_bytes()] == 1 + i % 2)
    assert True in found and False in found, "every kill came too early, or too late"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_full(small_disk):
    """One line, exit 1, the old file is kept and nothing is left beside it."""
    old = small_disk / "old"
    for arguments in ([TALES, "-p", "x", "-n", 1, "-q", "--save-state", old], ["score", IDS_MODEL, "-q", "--ids", "1 2 3 " * 100, "--logits", old],
                      ["embed", IDS_MODEL, "-q", "--ids", "1 2 3 " * 200, "--pool", "none", "-o", old]):
        old.write_bytes(b"old")
        done = run_mamba(*arguments, check=False)
        assert done.returncode == 1 and b"No space left on device" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
        assert old.read_bytes() == b"old" and os.listdir(small_disk) == ["old"]
    with open(small_disk / "out", "wb") as out:
        done = subprocess.run([PROGRAM, IDS_MODEL, "--jsonl", "--print-ids", "-q"], input=b'{"ids": [1], "max_tokens": 200}\n' * 1000, stdout=out,
                              stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == b"mamba: standard output: No space left on device\n", done.stderr


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_model_cut_while_mapped(tmp_path, size):
    """A page that has gone is one clear line, not a crash; the text so far is kept."""
    model = tmp_path / "model.bin"
    shutil.copy(TALES, model)
    state = tmp_path / "s.state"
    state.write_bytes(b"old")
    run = start(model, "-p", "Once", *ENDLESS, "--save-state", state)
    first = run.stdout.read(20)
    os.truncate(model, size)
    text, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and errors == f"mamba: {model}: became shorter while it was in use, or could not be read\n".encode(), errors
    assert run_mamba(TALES, "-p", "Once", *ENDLESS[2:], "-n", 4000).stdout.startswith((first + text)[:200])
    assert state.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["model.bin", "s.state"]


def test_no_memory():
    """Under every limit a run works or says in one line that memory is short."""
    worked = refused = 0
    for megabytes in [*range(4, 60, 3), *range(60, 400, 20)]:
        command = f"ulimit -v {megabytes * 1024}; exec '{PROGRAM}' '{TALES}' --jsonl -np 4 -q -t 2"
        done = subprocess.run(["bash", "-c", command], input=requests(8), capture_output=True, timeout=60)
        loader = b"error while loading shared libraries" in done.stderr or b"cannot allocate" in done.stderr
        if done.returncode == 0:
            worked += 1
            assert len(done.stdout.splitlines()) == 8 and done.stderr == b""
        else:
            refused += not loader
            lines = [line for line in done.stderr.splitlines() if line]  # OpenMP puts an empty line before its own
            assert loader or (done.returncode == 1 and len(lines) == 1), (megabytes, done.returncode, done.stderr)
    assert worked > 3 and refused > 3, (worked, refused)


def test_a_cgroup_with_a_quota():
    """The default number of threads is what the cgroups around the process leave, as systemd and containers set them up."""
    cores = len(os.sched_getaffinity(0))
    one = (("cpu/tasks", "/sys/fs/cgroup/cpu", "tasks", "cpu.cfs_quota_us", "100000"), ("cgroup.controllers", "/sys/fs/cgroup", "cgroup.procs", "cpu.max", "100000 100000"))
    _, root, members, quota, value = next((v for v in one if os.path.exists(f"/sys/fs/cgroup/{v[0]}")), (None,) * 5)
    outer = pathlib.Path(root or "/", f"mamba-test-{os.getpid()}")
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / quota).write_text(value)
    except (OSError, TypeError):
        pytest.skip("cgroups cannot be made here")
    threads = lambda prefix: json.loads(subprocess.run([*prefix, PROGRAM, "bench", TALES, "-p", "8", "-n", "0", "-r", "1", "-o", "jsonl"],
                                                       check=True, stdout=subprocess.PIPE).stdout)["n_threads"]
    try:
        assert threads(["sh", "-c", f'echo $$ > {outer}/inner/{members}; exec "$@"', "sh"]) == 1
        assert cores < 2 or threads([]) > 1
    finally:
        for folder in (outer / "inner", outer):
            folder.rmdir()


def test_offsets_behind_2_to_the_31(tmp_path):
    """An embedding of 2.2e9 elements (Q4_0, nearly all of the file is a hole), which is the head, too: its last rows are found."""
    rows, width, inner, path = 2100, 1 << 20, 16, tmp_path / "large.bin"
    writer = gguf.GGUFWriter(path, "mamba")
    for key, value in (("context_length", 1), ("embedding_length", width), ("block_count", 1), ("ssm.conv_kernel", 4), ("ssm.inner_size", inner),
                       ("ssm.state_size", 1), ("ssm.time_step_rank", 1)):
        writer.add_uint32(f"mamba.{key}", value)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    floats = {"output_norm.weight": (width,), "blk.0.attn_norm.weight": (width,), "blk.0.ssm_in.weight": (2 * inner, width),
              "blk.0.ssm_conv1d.weight": (inner, 4), "blk.0.ssm_conv1d.bias": (inner,), "blk.0.ssm_x.weight": (3, inner),
              "blk.0.ssm_dt.weight": (inner, 1), "blk.0.ssm_dt.bias": (inner,), "blk.0.ssm_a": (inner, 1), "blk.0.ssm_d": (inner,),
              "blk.0.ssm_out.weight": (width, inner)}
    writer.add_tensor_info("token_embd.weight", (rows, width // 32 * 18), np.dtype(np.uint8), rows * width // 32 * 18, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name, shape in floats.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + rows * width // 32 * 18 + sum(4 * int(np.prod(shape)) for shape in floats.values()) + 4096)
    tensors = {t.name: t for t in gguf.GGUFReader(path, "r+").tensors}
    tensors["output_norm.weight"].data[:] = 1
    nibbles, signs = np.random.default_rng(0).integers(0, 256, (2, width // 32, 16), np.uint8), {}
    for row, bits in zip((2049, 2099), nibbles):  # each element is 1 or -1: 9 or 7, less 8
        block = np.zeros((width // 32, 18), np.uint8)
        block[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        block[:, 2:] = 0x77 + (bits & 0x22)
        tensors["token_embd.weight"].data.reshape(rows, -1)[row] = block.reshape(-1)
        signs[row] = np.concatenate([(block[:, 2:] & 15).astype(int) - 8, (block[:, 2:] >> 4).astype(int) - 8], axis=1).reshape(-1)
    for t in tensors.values():
        t.data.base.flush() if hasattr(t.data.base, "flush") else None
    del tensors
    for row in signs:
        run_mamba("embed", path, "--ids", row, "--layer", 0, "-o", tmp_path / "e.npy")
        assert np.array_equal(np.load(tmp_path / "e.npy")[0], signs[row])
    run_mamba("score", path, "--ids", 2099, "--logits", tmp_path / "l.npy")
    logits = np.load(tmp_path / "l.npy")[0]
    expected = np.zeros(rows)
    expected[2049], expected[2099] = signs[2049] @ signs[2099], width
    assert np.abs(logits - expected).max() < 1e-3 * width and np.abs(expected[2049]) < 1e-2 * width and not logits[:2049].any()
