"""What the tests of nucleotides share: a random model, FASTA files, and scores from token ids to compare with."""
import json
import random
import subprocess
import sys

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import ROOT

ID = {**dict(zip("ACGTN", range(7, 12))), **dict.fromkeys("RYSWKMBDHV", 11), "U": 10}
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def checkpoint(folder, d_model=32, layers=2, vocab=16, seed=3):
    """A random checkpoint as transformers writes it, without a tokenizer."""
    rng, inner = np.random.default_rng(seed), 2 * d_model
    rank = -(-d_model // 16)

    def r(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    w = {"backbone.embeddings.weight": r(vocab, d_model), "backbone.norm_f.weight": r(d_model)}
    for i in range(layers):
        p = f"backbone.layers.{i}."
        w |= {p + "norm.weight": r(d_model), p + "mixer.A_log": np.abs(r(inner, 16)), p + "mixer.D": r(inner),
              p + "mixer.in_proj.weight": r(2 * inner, d_model), p + "mixer.conv1d.weight": r(inner, 1, 4), p + "mixer.conv1d.bias": r(inner),
              p + "mixer.x_proj.weight": r(rank + 32, inner), p + "mixer.dt_proj.weight": r(inner, rank), p + "mixer.dt_proj.bias": r(inner) - 2,
              p + "mixer.out_proj.weight": r(d_model, inner)}
    folder.mkdir()
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": vocab,
                                                    "state_size": 16, "conv_kernel": 4, "expand": 2}))
    return folder


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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dna")
    return convert(checkpoint(folder / "checkpoint"), folder / "dna.bin")


def ids(bases):
    return " ".join(str(ID[b]) for b in bases.upper())


def reverse_complement(bases):
    return bases.upper().translate(COMPLEMENT)[::-1]


def rows(stdout):
    return [line.split("\t") for line in stdout.decode().splitlines()[1:]]


def some_bases(n, seed=1, letters="ACGT"):
    return "".join(random.Random(seed).choices(letters, k=n))


def fasta(tmp_path, text, name="x.fa"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def own_scores(mamba, model, bases, *options):
    """Log-probabilities by position of the bases that are scored, from a run on token ids."""
    table = rows(mamba("score", model, "--ids", ids(bases), "--per-token", *options).stdout)
    return {int(r[1]): float(r[4]) for r in table if r[2] != "11"}


def write(records, width=60, end="\n", last=True):
    lines = []
    for name, bases in records.items():
        lines += [f">{name} and more words", *(bases[i:i + width] for i in range(0, len(bases), width))]
    return end.join(lines) + end * last


def vocabulary(tmp_path, tokens, types=None, model="gpt2", merges=(), **more):
    """A vocabulary-only file of these letters, or of tokens of any types."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "mamba")
    writer.add_string("tokenizer.ggml.model", model)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", types or [2 if t == "<unk>" else 1 for t in tokens])
    if merges:
        writer.add_array("tokenizer.ggml.merges", merges)
    for key, value in more.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "v.gguf"
