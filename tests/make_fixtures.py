#!/usr/bin/env python3
"""Writes tests/fixtures/mamba_*.bin, tiny random Mamba models, and beside each an .npz with what transformers says about it.

    python3 tests/make_fixtures.py            needs torch, transformers and what convert_weights.py needs

The weights are drawn so that every part of the model matters: decay rates over a factor of 32, step sizes from 0.02 to 1.3, a
convolution with weight on all taps, norms away from 1. The logits spread over several units, and a greedy text is only kept when its
best token leads clearly at every step, so that rounding cannot decide it.

Each .npz holds, for one model file (float32 unless said otherwise):
    ids [tokens] int32        the text
    rows [rows] int32         the positions for which whole rows are kept
    logits [rows, vocab]      what the model says after token rows[i]
    logprobs [tokens - 1]     log-probability of ids[t + 1] after ids[: t + 1]
    hidden [n_layer + 2, rows, d_model]   hidden[N]: the residual stream after N blocks, N = 0 the embeddings; the last: after the final norm
    hidden_mean [n_layer + 2, d_model]    the same, averaged over all tokens
    greedy_K [n] int32        the greedy continuation of the first K tokens
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
N_TOKENS, N_GREEDY, MIN_MARGIN = 140, 64, 2e-3

# Shapes: "awkward" has rows that are no multiple of 32 or 16, as few taps as a convolution of this kind gets, and a state of 5.
SHAPES = {
    "tied": dict(hidden_size=64, num_hidden_layers=2, vocab_size=160, state_size=16, conv_kernel=4, time_step_rank=4,
                 tie_word_embeddings=True),
    "untied": dict(hidden_size=32, num_hidden_layers=3, vocab_size=160, state_size=8, conv_kernel=4, time_step_rank=2,
                   tie_word_embeddings=False, use_conv_bias=False),
    "falcon": dict(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=16, conv_kernel=4, time_step_rank=8,
                   tie_word_embeddings=False, mixer_rms_eps=0.01),
    "awkward": dict(hidden_size=96, intermediate_size=144, num_hidden_layers=2, vocab_size=301, state_size=5, conv_kernel=3, time_step_rank=7,
                    tie_word_embeddings=True, layer_norm_epsilon=1e-3),
}
FILES = [("tied", "f32"), ("tied", "f16"), ("tied", "bf16"), ("tied", "q8_0"), ("untied", "f32"), ("falcon", "f32"),
         ("awkward", "f32"), ("awkward", "q8_0")]

# GGUF's names of the tensors that take a type, and transformers'.
BLOCK_MATRICES = {"ssm_in": "in_proj", "ssm_x": "x_proj", "ssm_dt": "dt_proj", "ssm_out": "out_proj"}


def make_model(name, shape, seed):
    """A random model in transformers, float32. Also used by check_transformers.py and check_llama.py with larger shapes."""
    falcon = name == "falcon"
    # No token ends a text: the greedy continuation then depends on the logits alone.
    config = (transformers.FalconMambaConfig if falcon else transformers.MambaConfig)(
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape)
    config.intermediate_size = shape.get("intermediate_size", config.intermediate_size)  # the constructor derives it
    model = (transformers.FalconMambaForCausalLM if falcon else transformers.MambaForCausalLM)(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    normal = lambda t, std, mean=0.0: t.copy_(torch.randn(t.shape, generator=random) * std + mean)
    uniform = lambda t, low, high: t.copy_(torch.rand(t.shape, generator=random) * (high - low) + low)
    with torch.no_grad():
        normal(model.backbone.embeddings.weight, 2.5 / config.hidden_size ** 0.5)
        uniform(model.backbone.norm_f.weight, 0.5, 1.5)
        if not config.tie_word_embeddings:
            normal(model.lm_head.weight, 2.5 / config.hidden_size ** 0.5)
        for block in model.backbone.layers:
            uniform(block.norm.weight, 0.5, 1.5)
            mixer = block.mixer
            for matrix, gain in ((mixer.in_proj, 1.5), (mixer.x_proj, 0.8), (mixer.dt_proj, 1.5), (mixer.out_proj, 1.0)):
                normal(matrix.weight, gain / matrix.weight.shape[1] ** 0.5)
            normal(mixer.conv1d.weight, 0.6)
            if mixer.conv1d.bias is not None:
                normal(mixer.conv1d.bias, 0.3)
            uniform(mixer.dt_proj.bias, -4.0, 1.0)
            mixer.A_log.copy_(torch.log(torch.rand(mixer.A_log.shape, generator=random) * 15.5 + 0.5))
            normal(mixer.D, 0.5, 1.0)
    return model


@torch.no_grad()
def greedy(model, prompt, n):
    """(the n most likely tokens in turn, the smallest lead of the best token over the second), each step over the whole text."""
    ids, margin = list(prompt), np.inf
    for _ in range(n):
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return np.array(ids[len(prompt):], dtype=np.int32), margin


def greedy_texts(model, ids):
    """{greedy_K: tokens} for prompts of 1, 2 and 12 tokens; None when one is too close to call or keeps to a few tokens."""
    texts = {}
    for k, n in ((1, 16), (2, 16), (12, N_GREEDY)):
        texts[f"greedy_{k}"], margin = greedy(model, ids[:k].tolist(), n)
        if margin < MIN_MARGIN or len(set(texts[f"greedy_{k}"].tolist())) < n // 8:
            return None
    return texts


@torch.no_grad()
def residual_stream(model, ids):
    """[n_layer + 2, tokens, d_model] as in the head of this file, and the logits [tokens, vocab].

    Collected by hooks: what transformers puts first into output_hidden_states has changed between its versions."""
    seen = []
    hooks = [model.backbone.embeddings.register_forward_hook(lambda m, i, out: seen.append(out)),
             *[block.register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
               for block in model.backbone.layers],
             model.backbone.norm_f.register_forward_hook(lambda m, i, out: seen.append(out))]
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack([h[0] if h.dim() == 3 else h for h in seen]), logits


@torch.no_grad()
def take_weights(model, path):
    """Puts the matrices of a model file, decoded, into the transformers model: the reference for rounded weights."""
    tensors = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}

    def copy(name, parameter):
        t = tensors[name]
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))

    copy("token_embd.weight", model.backbone.embeddings.weight)
    if "output.weight" in tensors:
        copy("output.weight", model.lm_head.weight)
    for i, block in enumerate(model.backbone.layers):
        for ours, theirs in BLOCK_MATRICES.items():
            copy(f"blk.{i}.{ours}.weight", getattr(block.mixer, theirs).weight)


def convert(model, path, kind, *options):
    """save_pretrained, then convert_weights.py."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, path, "--type", kind, *options], check=True)


def write_numbers(model, path, ids):
    """The .npz of one model file. False when a greedy text is too close to call."""
    take_weights(model, path)
    rows = np.unique(np.r_[0:6, 6:N_TOKENS:8, N_TOKENS - 1]).astype(np.int32)
    hidden, logits = residual_stream(model, ids)
    logprobs = torch.log_softmax(logits.double(), dim=-1)[torch.arange(N_TOKENS - 1), torch.from_numpy(ids[1:]).long()]
    texts = greedy_texts(model, ids)
    if texts is None:
        return False
    numbers = dict(ids=ids, rows=rows, logits=logits[rows].numpy(), logprobs=logprobs.float().numpy(),
                   hidden=hidden[:, rows].numpy(), hidden_mean=hidden.double().mean(dim=1).float().numpy(), **texts)
    assert float(logits.std()) > 1.0 and all(np.isfinite(v).all() for v in numbers.values())
    np.savez_compressed(path.with_suffix(".npz"), **numbers)
    return True


def main():
    torch.set_num_threads(1)
    FIXTURES.mkdir(exist_ok=True)
    for name, shape in SHAPES.items():
        ids = np.random.default_rng(7).integers(0, shape["vocab_size"], N_TOKENS).astype(np.int32)
        # A shape's files move into place together: a model never stands beside another one's numbers.
        with tempfile.TemporaryDirectory(dir=FIXTURES) as scratch:
            paths = {kind: Path(scratch) / f"mamba_{name}.{kind}.bin" for n, kind in FILES if n == name}
            for seed in range(100):
                if greedy_texts(make_model(name, shape, seed), ids) is None:
                    continue
                for kind, path in paths.items():
                    convert(make_model(name, shape, seed), path, kind)
                if all(write_numbers(make_model(name, shape, seed), path, ids) for path in paths.values()):
                    break
            else:
                sys.exit(f"{name}: no seed gives clear greedy texts")
            for file in sorted(Path(scratch).iterdir()):
                os.replace(file, FIXTURES / file.name)
        print(f"{name}: seed {seed}", flush=True)


if __name__ == "__main__":
    main()
