"""DNA models of the paper's sizes against transformers and llama.cpp, and what a record of a million bases costs. Part of `make check`."""
import pathlib
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import reference
from check_llama import close, llama, their_logits  # noqa: F401: llama is a fixture
from conftest import PROGRAM, ROOT, run_mamba

SIZES = {"250K": (8, 64), "700K": (10, 96), "1.4M": (12, 128), "3.5M": (14, 192), "7.0M": (16, 256), "19.3M": (20, 384), "40.7M": (24, 512)}  # E.3.2


def random_checkpoint(folder, layers, width):
    """transformers' own initialisation: (folder, model)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(layers)
    config = transformers.MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=16, state_size=16, conv_kernel=4, expand=2)
    model = transformers.MambaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return folder, model


def convert(folder, out):
    subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, out, "--type", "f32", "--vocab", "dna"], check=True, stderr=subprocess.DEVNULL)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_paper(tmp_path, size):
    """Each converts and runs, from token ids and from FASTA. Deep random models amplify rounding: the reference is transformers in
    float64, from which we are no further away than its own float32, or 1e-4."""
    import torch
    folder, model = random_checkpoint(tmp_path / "checkpoint", *SIZES[size])
    path = convert(folder, tmp_path / "dna.bin")
    bases = "".join(random.Random(1).choices("ACGTN", weights=[4, 4, 4, 4, 1], k=200))
    ids = [7 + "ACGTN".index(b) for b in bases]
    with torch.no_grad():
        single = reference.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].numpy())
        expected = reference.log_softmax(model.double()(input_ids=torch.tensor([ids])).logits[0].numpy())
    limit = max(1e-4, np.abs(single - expected).max())
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy")
    assert np.abs(reference.log_softmax(np.load(tmp_path / "l.npy")) - expected).max() <= limit
    (tmp_path / "x.fa").write_text(f">x\n{bases}\n")
    row = run_mamba("score", path, "--fasta", tmp_path / "x.fa").stdout.decode().splitlines()[1].split("\t")
    scored = [t for t in range(1, len(ids)) if ids[t] != 11]
    assert int(row[1]) == len(scored) and abs(float(row[2]) + sum(expected[t - 1, ids[t]] for t in scored)) < limit * len(scored)


def test_llama_cpp_reads_the_vocabulary(llama, tmp_path):  # noqa: F811
    path = convert(random_checkpoint(tmp_path / "checkpoint", 2, 64)[0], tmp_path / "dna.bin")
    ids = np.random.default_rng(1).integers(7, 12, 100)
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy")
    close(np.load(tmp_path / "l.npy"), their_logits(llama, path, ids), 1e-4)


def test_a_million_bases_in_the_memory_of_a_thousand(tmp_path):
    """The peak is read while the process waits for the next record."""
    path = convert(random_checkpoint(tmp_path / "checkpoint", 2, 64)[0], tmp_path / "dna.bin")

    def peak(n):
        run = subprocess.Popen([PROGRAM, "score", path, "--fasta", "-", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        unit = "".join(random.Random(1).choices("ACGT", k=1024))
        run.stdin.write(f">long\n{unit * (n // 1024)}\n>next\nACGT".encode())
        run.stdin.flush()
        time.sleep(2)  # all but the last piece is through
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{run.pid}/status").read_text())[1])
        out, _ = run.communicate()
        row = out.splitlines()[1].split(b"\t")
        assert row[0] == b"long" and int(row[1]) == n - 1 and run.returncode == 0
        return peak

    few, many = peak(1 << 10), peak(1 << 20)
    assert many < few + 1024, (few, many)  # KiB
