#!/usr/bin/env python3
"""Writes a model file of a published shape with random weights, for benchmarks: speed does not depend on what weights say.

    random_model.py SHAPE OUT [--type q8_0] [--layers N]

SHAPE is 130m, 370m, 790m, 1.4b, 2.8b (state-spaces' README), or 6.9b (64 layers of 4096). A checkpoint is made beside OUT,
converted by convert_weights.py and removed, so that what is measured is what a user would have. It needs about 2 bytes a weight of
disk besides OUT."""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "1.4b": (48, 2048), "2.8b": (64, 2560), "6.9b": (64, 4096)}
VOCAB, STATE, CONV = 50280, 16, 4


def tensors(layers, d_model, rng):
    """(name, array) of a whole checkpoint; the matrices in float16. Drawn so that activations keep their size."""
    inner, rank = 2 * d_model, -(-d_model // 16)

    def matrix(rows, cols, gain):
        return (rng.standard_normal((rows, cols), np.float32) * (gain / cols ** 0.5)).astype(np.float16)

    yield "backbone.embeddings.weight", matrix(VOCAB, d_model, 2.5)
    yield "backbone.norm_f.weight", np.ones(d_model, np.float32)
    for i in range(layers):
        at = f"backbone.layers.{i}."
        yield at + "norm.weight", np.ones(d_model, np.float32)
        at += "mixer."
        yield at + "in_proj.weight", matrix(2 * inner, d_model, 1.0)
        yield at + "conv1d.weight", rng.standard_normal((inner, 1, CONV), np.float32) * 0.5
        yield at + "conv1d.bias", rng.standard_normal(inner, np.float32) * 0.1
        yield at + "x_proj.weight", matrix(rank + 2 * STATE, inner, 0.8)
        yield at + "dt_proj.weight", matrix(inner, rank, 1.0)
        yield at + "dt_proj.bias", rng.uniform(-4, 1, inner).astype(np.float32)
        yield at + "A_log", np.log(np.tile(np.arange(1, STATE + 1, dtype=np.float32), (inner, 1)))
        yield at + "D", np.ones(inner, np.float32)
        yield at + "out_proj.weight", matrix(d_model, inner, layers ** -0.5)


def write_checkpoint(folder, layers, d_model, seed=0):
    """One shard a layer, so that memory stays small."""
    shards, pending, index = 0, {}, {}

    def flush():
        nonlocal shards, pending
        shards += 1
        save_file(pending, folder / f"model-{shards:05}.safetensors", metadata={"format": "pt"})
        index.update({name: f"model-{shards:05}.safetensors" for name in pending})
        pending = {}

    for name, array in tensors(layers, d_model, np.random.default_rng(seed)):
        pending[name] = array
        if name.endswith(("norm_f.weight", "out_proj.weight")):
            flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": d_model, "num_hidden_layers": layers,
        "intermediate_size": 2 * d_model, "state_size": STATE, "conv_kernel": CONV, "time_step_rank": -(-d_model // 16),
        "vocab_size": VOCAB, "expand": 2, "tie_word_embeddings": True, "use_conv_bias": True, "use_bias": False,
        "layer_norm_epsilon": 1e-5}))


def make(shape, out, kind, layers=None):
    n_layer, d_model = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=pathlib.Path(out).resolve().parent) as scratch:
        folder = pathlib.Path(scratch) / f"mamba-{shape}-random"
        folder.mkdir()
        write_checkpoint(folder, layers or n_layer, d_model)
        temporary = pathlib.Path(scratch) / "model.bin"
        subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, temporary, "--type", kind], check=True,
                       stderr=subprocess.DEVNULL)
        shutil.move(temporary, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out")
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    o = parser.parse_args()
    make(o.shape, o.out, o.type, o.layers)
