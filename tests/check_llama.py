"""The same files in llama.cpp and here. Part of `make check`; build_llama.py builds llama.cpp on first use.

What llama.cpp cannot run is not compared: an expansion factor other than 2, an epsilon of its own for FalconMamba's inner norms."""
import os
import subprocess
import sys

import numpy as np
import pytest

import build_llama
import reference
from conftest import ROOT, run_mamba

pytestmark = pytest.mark.xdist_group("llama.cpp")  # which is built once
FIXTURES = ROOT / "tests" / "fixtures"
SHIPPED = ROOT / "models" / "tales.bin"
WIDE = dict(hidden_size=64, num_hidden_layers=3, vocab_size=50280, state_size=16, conv_kernel=4, time_step_rank=4,
            tie_word_embeddings=True)  # the vocabulary of the published text models


@pytest.fixture(scope="session")
def llama():
    """(folder of llama.cpp's sources, llama_logits)"""
    try:
        return build_llama.ensure()
    except build_llama.Unavailable as reason:
        pytest.skip(str(reason))


def text(ids):
    return " ".join(str(int(i)) for i in ids)


def our_logits(mamba, path, ids, tmp_path):
    out = tmp_path / "logits.npy"
    mamba("score", path, "--ids", text(ids), "--logits", out)
    return np.load(out)


def their_logits(llama, path, ids, n_ubatch=512):
    done = subprocess.run([llama[1], path, str(n_ubatch), "2"], input=text(ids).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, dtype=np.float32).reshape(len(ids), -1)


def close(a, b, tolerance):
    difference = np.abs(reference.log_softmax(a) - reference.log_softmax(b))
    assert a.shape == b.shape and np.all(difference <= tolerance), f"largest difference {np.nanmax(difference)}"


def nll(logits, ids):
    """Mean negative log-probability of ids[1:]."""
    return -reference.log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()


@pytest.mark.parametrize("name", ["mamba_tied.f32", "mamba_untied.f32"])
def test_our_file_there(mamba, llama, tmp_path, name):
    path, ids = FIXTURES / f"{name}.bin", np.load(FIXTURES / f"{name}.npz")["ids"]
    close(our_logits(mamba, path, ids, tmp_path), their_logits(llama, path, ids), 1e-4)


@pytest.mark.parametrize("name", ["mamba_tied.f16", "mamba_tied.bf16", "mamba_tied.q8_0"])
def test_our_typed_file_there(mamba, llama, tmp_path, name):
    """llama.cpp rounds the activations to the type of the weights; here only Q8_0 does. Hence a looser bound: root mean square of the
    difference below 4 % of the logits' spread (test_model.py derives it for 8 bits; F16 and BF16 stay under it)."""
    path, ids = FIXTURES / f"{name}.bin", np.load(FIXTURES / f"{name}.npz")["ids"]
    ours, theirs = our_logits(mamba, path, ids, tmp_path), their_logits(llama, path, ids)
    assert ours.shape == theirs.shape and np.sqrt(((ours - theirs) ** 2).mean()) <= 0.04 * theirs.std()


def test_our_greedy_text_there(mamba, llama):
    """Each token of our greedy text is llama.cpp's best after the text so far, its state carried in batches of 7."""
    path, expected = FIXTURES / "mamba_tied.f32.bin", np.load(FIXTURES / "mamba_tied.f32.npz")
    prompt = expected["ids"][:12].tolist()
    made = [int(word) for word in mamba("generate", path, "--greedy", "--print-ids", "--ids", text(prompt), "-n", "64").stdout.split()]
    theirs = their_logits(llama, path, prompt + made, n_ubatch=7)
    assert len(made) == 64 and theirs[len(prompt) - 1:-1].argmax(axis=1).tolist() == made


def their_conversion(llama, folder, path, kind):
    """llama.cpp's own converter; it brings its own gguf package."""
    script = llama[0] / "convert_hf_to_gguf.py"
    if not script.exists():
        pytest.skip("the source package has no convert_hf_to_gguf.py")
    done = subprocess.run([sys.executable, script, folder, "--outfile", path, "--outtype", kind], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=["mamba", "falcon"])
def checkpoint(request, tmp_path_factory):
    """(folder that transformers wrote, the same checkpoint converted by us to F32)"""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_fixtures
    # llama.cpp's file has no word for the inner epsilon and its program takes the outer one; here FalconMamba's own 1e-6 is assumed.
    shape = dict(WIDE, **({"mixer_rms_eps": 1e-6, "layer_norm_epsilon": 1e-6} if request.param == "falcon" else {}))
    folder = tmp_path_factory.mktemp(request.param)
    model = make_fixtures.make_model(request.param, shape, seed=2)
    model.save_pretrained(folder / "checkpoint")
    make_fixtures.convert(model, folder / "ours.bin", "f32")
    return folder / "checkpoint", folder / "ours.bin"


def test_their_conversion_here(mamba, llama, checkpoint, tmp_path):
    folder, ours = checkpoint
    theirs, ids = tmp_path / "theirs.gguf", np.random.default_rng(3).integers(0, 50277, 150)
    their_conversion(llama, folder, theirs, "f32")
    here = our_logits(mamba, theirs, ids, tmp_path)
    close(here, our_logits(mamba, ours, ids, tmp_path), 1e-4)
    close(here, their_logits(llama, theirs, ids), 1e-4)
    close(our_logits(mamba, ours, ids, tmp_path), their_logits(llama, ours, ids), 1e-4)

    # Their file carries the GPT-NeoX vocabulary; its text side works as well as ours.
    words = "The  quick brown fox, 1234 times:\n\n    ran.\n"
    ids_here = mamba("tokenize", theirs, "-p", words).stdout
    assert ids_here == mamba("tokenize", ROOT / "tokenizer.bin", "-p", words).stdout and len(ids_here.split()) > 10
    assert mamba("generate", theirs, "-p", words, "-n", "4", "--greedy").returncode == 0


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_their_typed_conversion_here(mamba, llama, checkpoint, tmp_path, kind):
    theirs, ids = tmp_path / "theirs.gguf", np.random.default_rng(3).integers(0, 50277, 100)
    their_conversion(llama, checkpoint[0], theirs, kind)
    ours, reference_logits = our_logits(mamba, theirs, ids, tmp_path), their_logits(llama, theirs, ids)
    assert ours.shape == reference_logits.shape
    assert np.sqrt(((ours - reference_logits) ** 2).mean()) <= 0.04 * reference_logits.std()


@pytest.fixture(scope="module")
def own_text():
    """2,000 tokens that the shipped model wrote."""
    made = run_mamba("generate", SHIPPED, "--print-ids", "--ignore-eos", "-s", "4", "-n", "2000", "-p", "Once upon a time").stdout
    return np.array([int(word) for word in made.split()])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_perplexity_of_quantised_files(mamba, llama, own_text, tmp_path, kind):
    """The shipped model as llama-quantize writes it: perplexity within 0.5 % of llama.cpp's on the same file, which rounds activations
    in blocks of other sizes. Both read the text from the front."""
    path = SHIPPED
    if kind != "Q8_0":
        build_llama.ensure(tools=True)
        path = tmp_path / "requantised.gguf"
        subprocess.run([build_llama.cache_dir() / "build" / "bin" / "llama-quantize", "--allow-requantize", SHIPPED, path, kind], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kinds = {line.split("\t")[2] for line in mamba("inspect", path).stdout.decode().splitlines() if line.startswith("tensor")}
        assert kind.removesuffix("_M") in kinds, kinds
    ours, theirs = nll(our_logits(mamba, path, own_text, tmp_path), own_text), nll(their_logits(llama, path, own_text), own_text)
    assert len(own_text) == 2000 and abs(np.exp(ours - theirs) - 1) <= 0.005, (ours, theirs)
