#!/usr/bin/env python3
"""Samples a second of generation for the paper's audio shapes, against the same model in PyTorch's step mode; scoring of a clip of
958,464 samples (YouTubeMix's length), with time and resident set.

    audio.py [--short]

Weights are random, as models/train.py initialises them: YouTubeMix (D = 64, three blocks a stage, pooling by 16; complex S4 outside and S6
in the centre), SC09 (pooling by 4, real S6; D = 64 with 8 blocks a stage, and D = 96 with 15). Both programs take turns, medians of three rounds. A real-time factor is samples a second
over the sample rate. --short runs a small model once, to see that this script works."""
import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "models"), str(pathlib.Path(__file__).parent)]
import sounds  # noqa: E402
import train  # noqa: E402
from dna import run  # noqa: E402

S4, S6, S6_REAL = ["s4", "complex"], ["s6", "complex"], ["s6", "real"]
SHAPES = {"YouTubeMix": dict(pool=[16, 16], stages=[S4, S4, S6, S4, S4]), "SC09, 6M": dict(pool=[4, 4], n_blocks=8, stages=[S6_REAL] * 5),
          "SC09, 25M": dict(pool=[4, 4], n_blocks=15, d_model=96, stages=[S6_REAL] * 5)}
CLIP = 958464


class Steps:
    """train.UNet a sample at a time: each block keeps the last inputs of its convolution and its states."""
    def __init__(self, model):
        self.model, c = model, model.config
        self.gathered, self.waiting = [[] for _ in c.pool], [list(torch.zeros(p, c.d_model << i)) for i, p in enumerate(c.pool)]
        self.memory = {}

    def block(self, layer, x):
        m, c = layer.mixer, layer.mixer.c
        past, h = self.memory.get(layer, (torch.zeros(c.d_inner, c.d_conv), 0))
        u, z = (m.in_proj.weight @ layer.norm(x, self.model.ops)).chunk(2)
        past = torch.cat([past[:, 1:], u[:, None]], 1)
        u = F.silu((past * m.conv1d.weight[:, 0]).sum(1) + m.conv1d.bias)
        A = -torch.exp(m.A_log)
        pairs = (lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)))) if c.numbers == "complex" else (lambda x: x)
        if c.numbers == "complex":
            A = torch.complex(A, m.A_imag)
        if c.ssm == "s6":
            dt, bc = (m.x_proj.weight @ u).split([c.dt_rank, m.x_proj.weight.shape[0] - c.dt_rank])
            dt, (B, C) = F.softplus(m.dt_proj.weight @ dt + m.dt_proj.bias), map(pairs, bc.chunk(2))
        else:
            dt, B, C = F.softplus(m.dt_bias), pairs(m.B.flatten(1)), pairs(m.C.flatten(1))
        h = torch.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
        self.memory[layer] = past, h
        y = (h * C).sum(-1)
        y = (2 * y.real if c.numbers == "complex" else y) + m.D * u
        return x + m.out_proj.weight @ (y * F.silu(z))

    def level(self, i, x):
        model, c = self.model, self.model.config
        if i == len(c.pool):
            skip = x
            for layer in model.center.blocks:
                x = self.block(layer, x)
            return x + skip
        skips = []
        for layer in model.down[i].blocks:
            skips.append(x)
            x = self.block(layer, x)
        self.gathered[i].append(x)
        x = x + self.waiting[i].pop(0)
        if len(self.gathered[i]) == c.pool[i]:
            down = model.down[i].pool
            below = self.level(i + 1, down.weight @ torch.stack(self.gathered[i], 1).flatten() + down.bias)
            up = model.up[i].pool
            self.gathered[i], self.waiting[i] = [], list((up.weight @ below + up.bias).view(-1, c.pool[i]).t())
        for layer in model.up[i].blocks:
            x = self.block(layer, x) + skips.pop()
        return x

    @torch.no_grad()
    def logits(self, token):
        model = self.model
        return model.head.weight @ model.norm(self.level(0, model.embed.weight[token]), model.ops) + model.head.bias


def check_steps(model):
    """The step mode says what the whole does, or the comparison means nothing."""
    ids = torch.randint(0, 256, (1, 600))
    steps = Steps(model)
    with torch.no_grad():
        whole = model.logits(ids)[0]
    found = torch.stack([steps.logits(token) for token in ids[0]])
    assert (found - whole).abs().max() <= 1e-3 * whole.abs().max(), "PyTorch's two modes disagree"


def pytorch_rate(model, seconds):
    """Samples a second of drawing from the model; two threads are slower than one here."""
    torch.set_num_threads(1)
    steps, token, n, start = Steps(model), 128, 0, time.monotonic()
    while time.monotonic() - start < seconds:
        token, n = torch.multinomial(torch.softmax(steps.logits(token), 0), 1).item(), n + 1
    return n / (time.monotonic() - start)


def generated_rate(path, threads, count, folder):
    """Without the time that the program takes to start: the difference of a long and a short run."""
    seconds = [run(path, "-o", folder / "out.wav", "-n", n, "-s", 1, "-t", threads, "-q")[0] for n in (count // 10, count)]
    return (count - count // 10) / (seconds[1] - seconds[0])


def scoring(name, path, folder, samples, rounds):
    x = np.convolve(np.random.default_rng(0).normal(0, 0.05, samples), np.ones(9), "same").clip(-1, 1)
    row = {"model": name, "samples": samples}
    for n in (samples // 64, samples):
        (folder / "clip.wav").write_bytes(sounds.wav(sounds.pcm(x[:n]), rate=16000))
        runs = [run("score", path, "--wav", folder / "clip.wav", "-q") for _ in range(rounds)]
        row[f"seconds_{n}"], row[f"peak_rss_mb_{n}"] = statistics.median(r[0] for r in runs), max(r[2] for r in runs)
    print(f"{name}: {samples} samples scored in {row[f'seconds_{samples}']:.1f} s, resident set {row[f'peak_rss_mb_{samples}']:.1f} MB "
          f"({row[f'peak_rss_mb_{samples // 64}']:.1f} MB for {samples // 64})", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    shapes = {"tiny": dict(pool=[4, 2], n_blocks=1, d_model=16, stages=[S4, S4, S6, S6_REAL, S4])} if short else SHAPES
    rounds, results = 1 if short else 3, {"generation": [], "scoring": []}
    torch.manual_seed(0)
    print("| model | parameters | type | mamba, 1 thread | 2 threads | PyTorch | times real time at 16 kHz | at 8 kHz |\n| --- | ---: | --- |" + " ---: |" * 5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name, shape in shapes.items():
            model = train.UNet(train.UNetConfig(sample_rate=16000, **shape), train.PlainOps()).eval()
            check_steps(model)
            train.export_unet(model, folder / name)
            paths = {kind: sounds.convert(folder / name, folder / f"{name}.{kind}.bin", kind) for kind in ("f32", "q8_0")}
            rates = {}
            for _ in range(rounds):
                for kind, path in paths.items():
                    for threads in (1, 2):
                        rates.setdefault((kind, threads), []).append(generated_rate(path, threads, 2000 if short else 16000, folder))
                rates.setdefault("pytorch", []).append(pytorch_rate(model, 1 if short else 5))
            rates = {key: statistics.median(values) for key, values in rates.items()}
            for kind in paths:
                best = max(rates[kind, 1], rates[kind, 2])
                row = {"model": name, "parameters": sum(p.numel() for p in model.parameters()), "type": kind, "mamba_1": rates[kind, 1],
                       "mamba_2": rates[kind, 2], "pytorch": rates["pytorch"]}
                results["generation"].append(row)
                print(f"| {name} | {row['parameters'] / 1e6:.1f}M | {kind} | {row['mamba_1']:,.0f} | {row['mamba_2']:,.0f} | {row['pytorch']:,.0f} | "
                      f"{best / 16000:.2f} | {best / 8000:.2f} |", flush=True)
        first = next(iter(shapes))
        results["scoring"].append(scoring(first, folder / f"{first}.f32.bin", folder, 1 << 14 if short else CLIP, rounds))
    if not short:
        (ROOT / "tests" / "bench" / "results" / "audio.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
