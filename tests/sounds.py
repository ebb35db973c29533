"""What the tests of sound share: random U-Nets, a second definition of them, mu-law, and WAV files.

The definition runs one sample at a time and knows nothing of convolutions, chunks or levels that run apart: what models/train.py does
with whole clips, and the program in its own way, it does by the recurrences of the paper alone."""
import itertools
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import ROOT

RATE, START = 8000, 128
VARIANTS = [dict(stages=[[ssm, numbers]] * 5, discretization=hold, norm=norm)
            for ssm, numbers, hold, norm in itertools.product(("s4", "s6"), ("real", "complex"), ("zoh", "delta_b"), ("layernorm", "rmsnorm"))]
MIXED = dict(stages=[["s4", "complex"], ["s4", "real"], ["s6", "complex"], ["s6", "real"], ["s4", "complex"]], discretization="zoh", norm="layernorm")


def config(**changes):
    return {"model_type": "mamba_unet", "d_model": 12, "n_blocks": 2, "pool": [3, 2], "vocab_size": 256, "d_state": 5, "d_conv": 4, "expand": 2,
            "layer_norm_epsilon": 1e-5, "sample_rate": RATE, "start_token": START, "normalization": "minmax", **MIXED, **changes}


def stage_names(c):
    """In order of flow; numbers count from the outside."""
    levels = range(len(c["pool"]))
    return [f"down.{i}" for i in levels] + ["center"] + [f"up.{i}" for i in reversed(levels)]


def random_weights(c, seed=1):
    """{name: float32}, as config.json's model has them."""
    rng, w = np.random.default_rng(seed), {}
    norm = lambda name, d: w.update({f"{name}.weight": rng.uniform(0.5, 1.5, d)} | ({f"{name}.bias": rng.normal(0, 0.3, d)} if c["norm"] == "layernorm" else {}))
    matrix = lambda rows, cols, gain=1.0: rng.normal(0, gain / cols ** 0.5, (rows, cols))
    n_pools = len(c["pool"])
    for stage, (name, (ssm, numbers)) in enumerate(zip(stage_names(c), c["stages"])):
        d = c["d_model"] << min(stage, 2 * n_pools - stage)
        inner, n, rank, pair = c["expand"] * d, c["d_state"], -(-d // 16), (2,) if numbers == "complex" else ()
        for i in range(c["n_blocks"]):
            p = f"{name}.blocks.{i}.mixer."
            norm(f"{name}.blocks.{i}.norm", d)
            w |= {p + "in_proj.weight": matrix(2 * inner, d, 1.5), p + "conv1d.weight": rng.normal(0, 0.6, (inner, 1, c["d_conv"])),
                  p + "conv1d.bias": rng.normal(0, 0.3, inner), p + "A_log": np.log(rng.uniform(0.3, 4, (inner, n))), p + "D": rng.normal(0.5, 1, inner),
                  p + "out_proj.weight": matrix(d, inner)}
            if pair:
                w[p + "A_imag"] = rng.uniform(-6, 6, (inner, n))
            if ssm == "s6":  # complex ones with more gain are chaotic
                w |= {p + "x_proj.weight": matrix(rank + 2 * n * (1 + len(pair)), inner, 0.4 if pair else 1.0), p + "dt_proj.weight": matrix(inner, rank, 1.5),
                      p + "dt_proj.bias": rng.uniform(-5, 0, inner)}
            else:
                w |= {p + "dt_bias": rng.uniform(-4, 1, inner), p + "B": rng.normal(0, 1, (inner, n, *pair)), p + "C": rng.normal(0, 1, (inner, n, *pair))}
    for i, p in enumerate(c["pool"]):
        low, wide = c["d_model"] << (i + 1), (c["d_model"] << i) * p
        w |= {f"down.{i}.pool.weight": matrix(low, wide), f"down.{i}.pool.bias": rng.normal(0, 0.3, low),
              f"up.{i}.pool.weight": matrix(wide, low), f"up.{i}.pool.bias": rng.normal(0, 0.3, wide)}
    w |= {"embed.weight": rng.normal(0, 1, (256, c["d_model"])), "head.weight": matrix(256, c["d_model"], 2.0), "head.bias": rng.normal(0, 0.3, 256)}
    norm("norm", c["d_model"])
    return {name: value.astype(np.float32) for name, value in w.items()}


def write_checkpoint(folder, c, w):
    folder.mkdir(parents=True)
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c))
    return folder


def convert(folder, out, kind="f32"):
    subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, out, "--type", kind], check=True, stderr=subprocess.DEVNULL)
    return out


def silu(x):
    return x / (1 + np.exp(-x))


class Block:
    """x + out_proj(ssm(conv(in_proj(norm(x))))), a step at a time, in double precision."""
    def __init__(self, c, w, name, kind):
        self.c, (self.ssm, self.numbers) = c, kind
        self.w = {key[len(name):]: value.astype(np.float64) for key, value in w.items() if key.startswith(name)}
        inner = len(self.w["mixer.D"])
        self.past = np.zeros((inner, c["d_conv"]))
        self.h = np.zeros((inner, c["d_state"]), complex)
        self.a = -np.exp(self.w["mixer.A_log"]) + 1j * self.w.get("mixer.A_imag", 0)

    def pairs(self, x):
        """Real numbers, or complex ones whose parts lie side by side, as [..., d_state]."""
        return x if self.numbers == "real" else x.reshape(-1, self.c["d_state"], 2) @ [1, 1j]

    def __call__(self, x):
        w = self.w
        u, z = np.split(w["mixer.in_proj.weight"] @ normalize(self.c, x, w["norm.weight"], w.get("norm.bias")), 2)
        self.past = np.hstack([self.past[:, 1:], u[:, None]])
        u = silu((self.past * w["mixer.conv1d.weight"][:, 0]).sum(1) + w["mixer.conv1d.bias"])
        if self.ssm == "s6":
            rank = w["mixer.dt_proj.weight"].shape[1]
            dt, b, c = np.split(w["mixer.x_proj.weight"] @ u, [rank, (rank + len(w["mixer.x_proj.weight"])) // 2])
            dt, b, c = w["mixer.dt_proj.weight"] @ dt + w["mixer.dt_proj.bias"], self.pairs(b), self.pairs(c)
        else:
            dt, b, c = w["mixer.dt_bias"], self.pairs(w["mixer.B"]), self.pairs(w["mixer.C"])
        dt = np.log1p(np.exp(dt))[:, None]
        b = b * ((np.exp(dt * self.a) - 1) / self.a if self.c["discretization"] == "zoh" else dt)
        self.h = np.exp(dt * self.a) * self.h + b * u[:, None]
        y = (c * self.h).sum(1).real * (2 if self.numbers == "complex" else 1)
        return x + w["mixer.out_proj.weight"] @ ((y + w["mixer.D"] * u) * silu(z))


def normalize(c, x, weight, bias):
    if c["norm"] == "layernorm":
        return (x - x.mean()) / np.sqrt(x.var() + c["layer_norm_epsilon"]) * weight + bias
    return x / np.sqrt((x * x).mean() + c["layer_norm_epsilon"]) * weight


class UNet:
    """The whole model, a sample at a time: stages inside run when the ones outside have gathered enough steps for them."""
    def __init__(self, c, w):
        self.c, self.w, n = c, w, len(c["pool"])
        self.stages = [[Block(c, w, f"{name}.blocks.{i}.", kind) for i in range(c["n_blocks"])] for name, kind in zip(stage_names(c), c["stages"])]
        self.gathered = [[] for _ in range(n)]
        self.waiting = [[np.zeros(c["d_model"] << i)] * p for i, p in enumerate(c["pool"])]  # zeros, not the bias, before anything came up

    def level(self, i, x):
        if i == len(self.c["pool"]):
            skip = x
            for block in self.stages[i]:
                x = block(x)
            return x + skip
        p, skips = self.c["pool"][i], []
        for block in self.stages[i]:
            skips.append(x)
            x = block(x)
        skips.append(x)
        self.gathered[i].append(x)
        x = self.waiting[i].pop(0) + skips.pop()
        if len(self.gathered[i]) == p:
            down = np.stack(self.gathered[i], 1).ravel()  # feature h of step s at h p + s
            below = self.level(i + 1, self.w[f"down.{i}.pool.weight"] @ down + self.w[f"down.{i}.pool.bias"])
            up = self.w[f"up.{i}.pool.weight"] @ below + self.w[f"up.{i}.pool.bias"]
            self.gathered[i], self.waiting[i] = [], list(up.reshape(-1, p).T)
        for block in self.stages[len(self.stages) - 1 - i]:
            x = block(x) + skips.pop()
        return x

    def logits(self, ids):
        rows = []
        for token in ids:
            x = self.level(0, self.w["embed.weight"][token].astype(np.float64))
            x = normalize(self.c, x, self.w["norm.weight"], self.w.get("norm.bias"))
            rows.append(self.w["head.weight"] @ x + self.w["head.bias"])
        return np.array(rows)


# ---- Samples and codes, by the formulas of the data's origin ----

def encode(x, normalization="minmax"):
    """Codes of a clip of samples from -1 to 1."""
    x = np.asarray(x, np.float64)
    low, high, peak = x.min(), x.max(), np.abs(x).max()
    a = {"minmax": lambda: -1 + 2 * (x - low) / (high - low + 1e-6) if high > low else 0 * x, "peak": lambda: x / peak if peak else x,
         "none": lambda: x}[normalization]()
    e = np.sign(a) * np.log(1 + 255 * np.abs(a + 1e-8)) / np.log(256)
    return np.clip(np.trunc((e + 1) / 2 * 255.99 + 0.005), 0, 255).astype(int)


def decode(codes):
    v = np.asarray(codes) / 128 - 1
    return np.sign(v) * (256 ** np.abs(v) - 1) / 255


def chunk(name, data, size=None):
    return name + struct.pack("<I", len(data) if size is None else size) + data + b"\0" * (len(data) % 2)


def wav(data, coding=1, channels=1, bits=16, rate=RATE, size=None, before=b"", extensible=False, align=None):
    """A WAV file of these bytes."""
    width = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else coding, channels, rate, rate * width, align or width, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, coding) + bytes.fromhex("000000001000800000aa00389b71")
    body = b"WAVE" + chunk(b"fmt ", form) + before + chunk(b"data", data, size)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pcm(x):
    """16-bit samples as bytes."""
    return np.clip(np.rint(np.asarray(x) * 32768), -32768, 32767).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """(path, config, weights) of a model whose stages are of all kinds."""
    folder = tmp_path_factory.mktemp("unet")
    c = config()
    w = random_weights(c)
    return convert(write_checkpoint(folder / "checkpoint", c, w), folder / "unet.bin"), c, w
