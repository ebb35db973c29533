#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["gguf>=0.18", "huggingface_hub", "numpy", "safetensors", "tqdm"]
# ///
"""Convert a Mamba checkpoint (a folder or a Hugging Face id) to the GGUF file that `mamba` and llama.cpp read.

Needs: pip install gguf huggingface_hub numpy safetensors tqdm      (torch only when the weights are a pytorch_model.bin)

Read from top to bottom: 1 errors and small helpers; 2 config.json; 3 the checkpoint's tensors; 4 which tensor becomes
which; 5 the tokenizer; 6 writing the file; 7 download and command line. Names, shapes, configuration and tokenizer are
checked before the output is opened; values are checked as they stream through, one tensor in memory at a time, into a
temporary file that takes the output's name only when it is complete.
"""
import argparse
import contextlib
import itertools
import json
import math
import mmap
import os
import re
import signal
import struct
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

try:
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as GGMLType, LlamaFileType, TokenType
    from gguf.utility import SafetensorsLocal
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"convert_weights.py: {e}; to install what it needs: "
             "pip install 'gguf>=0.18' huggingface_hub numpy safetensors tqdm")
except KeyboardInterrupt:
    sys.exit("convert_weights.py: interrupted; nothing was written")

# ---------------------------------------------------------------- 1 errors and small helpers


class ConvertError(Exception):
    """What was found and what was expected, in one line for the user."""


def say(text):
    print(f"convert_weights.py: {text}", file=sys.stderr)


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_json(path, default=None):
    """The object in a JSON file; `default`, when given, stands for a file that is not there."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair, "\ud83d", is no text that GGUF can hold
    except (ValueError, RecursionError) as e:
        raise ConvertError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


# ---------------------------------------------------------------- 2 config.json


@dataclass
class Config:
    d_model: int
    n_layer: int
    vocab_size: int             # rows of the embedding, padding included
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    rms_eps: float
    conv_bias: bool
    tied: bool | None           # what config.json says; None: nothing
    dt_b_c_eps: float | None    # FalconMamba normalises dt, B and C with this epsilon
    context_length: int
    labels: list                # names of a classifier's classes; empty when the config names none

    @property
    def n_labels(self):
        return len(self.labels)

    @property
    def xz(self):               # rows of in_proj: x and the gate z
        return 2 * self.d_inner

    @property
    def dt_b_c(self):           # rows of x_proj: dt, B and C
        return self.dt_rank + 2 * self.d_state


INTEGER = "a positive integer", lambda value: type(value) is int and 0 < value < 2**31
FACTOR = "a positive number up to 1024", lambda value: type(value) in (int, float) and 0 < value <= 1024
EPSILON = "a number between 1e-37 and 1", lambda value: isinstance(value, float) and 1e-37 < value < 1    # above 0 as float32, too
FLAG = "true or false", lambda value: isinstance(value, bool)


def take(config, path, key, kind, default=...):
    """The value of a key of config.json, of this kind; without a default the key must be there."""
    value = config[key] if default is ... else config.get(key, default)
    what, fits = kind
    if value is not default and not fits(value):
        raise ConvertError(f"{path}: {key} is {value!r}, expected {what}")
    return value


def take_dt_rank(config, path, key, d_model):
    rank = None if config.get(key) == "auto" else take(config, path, key, INTEGER, None)
    return rank or math.ceil(d_model / 16)


def refuse(config, path, **expected):
    """Every key in `expected` that config.json sets must have exactly this value: nothing else is implemented."""
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            raise ConvertError(f"{path}: {key} is {json.dumps(config[key])}, only {json.dumps(value)} is supported")


def class_labels(c, path):
    """transformers' id2label in the order of its ids."""
    names = c.get("id2label") or {}
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise ConvertError(f"{path}: id2label has the keys {sorted(names)[:5]}..., expected 0 to {len(names) - 1}")
    return [str(names[str(i)]) for i in range(len(names))]


def config_hf(c, path):
    """transformers' MambaConfig and FalconMambaConfig."""
    refuse(c, path, rms_norm=True, use_bias=False, hidden_act="silu")
    falcon = c["model_type"] == "falcon_mamba"
    d_model = take(c, path, "hidden_size", INTEGER)
    return Config(
        d_model=d_model, n_layer=take(c, path, "num_hidden_layers", INTEGER), vocab_size=take(c, path, "vocab_size", INTEGER),
        d_inner=take(c, path, "intermediate_size", INTEGER, None) or int(take(c, path, "expand", FACTOR, 2) * d_model),
        d_state=take(c, path, "state_size", INTEGER, 16), d_conv=take(c, path, "conv_kernel", INTEGER, 4),
        dt_rank=take_dt_rank(c, path, "time_step_rank", d_model), rms_eps=take(c, path, "layer_norm_epsilon", EPSILON, 1e-5),
        conv_bias=take(c, path, "use_conv_bias", FLAG, True), tied=take(c, path, "tie_word_embeddings", FLAG, None),
        dt_b_c_eps=take(c, path, "mixer_rms_eps", EPSILON, 1e-6) if falcon else None,
        context_length=take(c, path, "max_position_embeddings", INTEGER, None) or 2**20, labels=class_labels(c, path))


def config_state_spaces(c, path):
    """The state-spaces/mamba package's MambaConfig, whose defaults these are."""
    ssm = c.get("ssm_cfg") or {}
    refuse(c, path, rms_norm=True, d_intermediate=0, attn_layer_idx=[])
    inside = f"{path}: ssm_cfg"
    refuse(ssm, inside, layer="Mamba1", bias=False)
    d_model = take(c, path, "d_model", INTEGER)
    pad = take(c, path, "pad_vocab_size_multiple", INTEGER, 8)
    return Config(
        d_model=d_model, n_layer=take(c, path, "n_layer", INTEGER),
        vocab_size=math.ceil(take(c, path, "vocab_size", INTEGER) / pad) * pad,
        d_inner=int(take(ssm, inside, "expand", FACTOR, 2) * d_model), d_state=take(ssm, inside, "d_state", INTEGER, 16),
        d_conv=take(ssm, inside, "d_conv", INTEGER, 4), dt_rank=take_dt_rank(ssm, inside, "dt_rank", d_model), rms_eps=1e-5,
        conv_bias=take(ssm, inside, "conv_bias", FLAG, True), tied=take(c, path, "tie_embeddings", FLAG, None), dt_b_c_eps=None,
        labels=class_labels(c, path), context_length=2**20)     # a recurrence has no limit of its own; llama.cpp's converter writes this number too


@dataclass
class UNetConfig:
    """An audio U-Net (sections 4.4 and E.4 of the Mamba paper), in the words of the config.json that models/train.py writes."""
    d_model: int                # of the outermost level; level i is 2^i times as wide
    n_blocks: int               # a stage
    pool: list                  # steps that become one, the outermost first
    stages: list                # pairs of s4 or s6 and real or complex, in order of flow
    sample_rate: int
    vocab_size: int = 256
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    discretization: str = "zoh"
    norm: str = "layernorm"
    layer_norm_epsilon: float = 1e-5
    start_token: int = 128
    normalization: str = "minmax"
    # what Config has, too
    labels: list = field(default_factory=list)
    conv_bias = True
    tied = False

    @property
    def n_layer(self):
        return self.n_blocks * len(self.stages)

    def level(self, stage):
        return min(stage, len(self.stages) - 1 - stage)

    def width(self, level):
        return self.d_model << level

    def dt_rank(self, level):
        return math.ceil(self.width(level) / 16)

    @property
    def norm_parts(self):
        return ("weight", "bias") if self.norm == "layernorm" else ("weight",)


def config_unet(c, path):
    known = {f.name for f in fields(UNetConfig) if f.name != "labels"}
    unknown = sorted(set(c) - known - {"model_type"})
    if unknown:
        raise ConvertError(f"{path}: {', '.join(unknown)}: expected only {', '.join(sorted(known))}")
    missing = [key for key in ("d_model", "n_blocks", "pool", "stages", "sample_rate") if key not in c]
    if missing:
        raise ConvertError(f"{path}: {missing[0]} is missing")
    config = UNetConfig(**{key: value for key, value in c.items() if key != "model_type"})
    kinds = [[ssm, numbers] for ssm in ("s4", "s6") for numbers in ("real", "complex")]
    words = {"discretization": ("zoh", "delta_b"), "norm": ("layernorm", "rmsnorm"), "normalization": ("minmax", "peak", "none")}
    for key in ("d_model", "n_blocks", "sample_rate", "d_state", "d_conv", "expand", "vocab_size", "start_token"):
        value = getattr(config, key)
        if type(value) is not int or not (key != "start_token") <= value < 2**24:
            raise ConvertError(f"{path}: {key} is {value!r}, expected a positive integer")
    for key, allowed in words.items():
        if getattr(config, key) not in allowed:
            raise ConvertError(f"{path}: {key} is {getattr(config, key)!r}, expected {' or '.join(allowed)}")
    if config.vocab_size != 256 or config.start_token not in range(256):
        raise ConvertError(f"{path}: vocab_size {config.vocab_size} and start_token {config.start_token!r}, expected 256 codes and one of them")
    if not 1 <= len(config.pool) <= 4 or any(not isinstance(p, int) or not 2 <= p < 2**16 for p in config.pool):
        raise ConvertError(f"{path}: pool is {config.pool!r}, expected one to four integers from 2 on")
    if len(config.stages) != 2 * len(config.pool) + 1 or any(list(stage) not in kinds for stage in config.stages):
        raise ConvertError(f"{path}: stages is {config.stages!r}, expected {2 * len(config.pool) + 1} pairs of s4 or s6 and real or complex")
    take(c, path, "layer_norm_epsilon", EPSILON, 1e-5)
    return config


def load_config(folder):
    path = folder / "config.json"
    if not path.is_file():
        raise ConvertError(f"{folder}: no config.json, expected a Mamba checkpoint folder")
    c = read_json(path)
    kind = c.get("model_type")
    try:
        if kind == "mamba_unet":
            return config_unet(c, path)
        if kind in ("mamba", "falcon_mamba"):
            return config_hf(c, path)
        if kind is None and "d_model" in c and "n_layer" in c:
            return config_state_spaces(c, path)
    except KeyError as e:
        raise ConvertError(f"{path}: {e.args[0]} is missing") from None
    except (TypeError, AttributeError) as e:
        raise ConvertError(f"{path}: a value of the wrong kind: {e}") from None
    found = f"model_type {kind!r}" if kind else f"no model_type, architectures {c.get('architectures')}"
    raise ConvertError(f"{path}: {found}, expected model_type mamba, falcon_mamba or mamba_unet, "
                       "or the d_model and n_layer of a state-spaces checkpoint")


# ---------------------------------------------------------------- 3 the checkpoint's tensors


class SafetensorsFile:
    """Tensors of one .safetensors file: `shapes` by name, values mapped from the file on demand."""
    DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}

    def __init__(self, path):
        try:
            safe_open(path, "numpy")                    # the package's own check of header, offsets and file size
        except SafetensorError as e:
            raise ConvertError(f"{path}: {e}") from None
        self.path = path
        self.tensors = SafetensorsLocal(path).tensors   # numpy has no bfloat16, so the bytes are taken from here
        self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}

    def read(self, name):
        t = self.tensors[name]
        if t.dtype not in self.DTYPES:
            raise ConvertError(f"{self.path}: {name}: found type {t.dtype}, expected one of {', '.join(self.DTYPES)}")
        values = t.mmap_bytes().view(self.DTYPES[t.dtype]).reshape(t.shape)
        if t.dtype == "BF16":                           # bfloat16 is the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


class TorchFile:
    """The same for a pytorch_model.bin; weights_only keeps its pickle from running code."""

    def __init__(self, path):
        try:
            import torch
        except ImportError:
            raise ConvertError(f"{path}: reading it needs the torch package (pip install torch)") from None
        warnings.simplefilter("ignore")                 # torch's, on what is new or old in torch
        try:
            try:
                self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:                        # torch's format before 1.6 cannot be mapped
                self.tensors = torch.load(path, map_location="cpu", weights_only=True)
            self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
            if not all(isinstance(name, str) and t.layout == torch.strided and not t.is_meta for name, t in self.tensors.items()):
                raise TypeError
        except OSError:
            raise
        except Exception:                               # unpickling fails in many ways, with pages of advice; all of them mean this
            raise ConvertError(f"{path}: damaged, or not a PyTorch state dictionary of dense tensors and nothing else; "
                               "fetch it again, or save the model as model.safetensors") from None
        self.path = path

    def read(self, name):
        t = self.tensors[name]
        if not t.is_floating_point():
            raise ConvertError(f"{self.path}: {name}: found type {t.dtype}, expected a floating-point one")
        return t.detach().float().numpy()               # it may be a parameter


def weight_files(folder):
    """The files that hold the weights, safetensors before pytorch_model.bin, shards through their index."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConvertError(f"{index}: no weight_map, expected one that names the shards")
            names = sorted(set(map(str, weight_map.values())))
            for name in names:
                if os.path.basename(name) != name or not (folder / name).is_file():
                    raise ConvertError(f"{index}: lists {name}, which is not in {folder}")
            return [folder / name for name in names]
    raise ConvertError(f"{folder}: no weights found, expected model.safetensors, pytorch_model.bin or their .index.json")


# A classifier on the final norm's output, as models named ...ForSequenceClassification have it under one of these names.
CLASSIFIERS = ("score.", "classifier.")


def open_checkpoint(folder, config):
    """{tensor name as transformers spells it: (file, name in that file)}; a U-Net's names are its own."""
    tensors = {}
    for path in weight_files(folder):
        file = (SafetensorsFile if path.suffix == ".safetensors" else TorchFile)(path)
        for name in file.shapes:
            whole = name.startswith(("backbone.", "lm_head.", *CLASSIFIERS))
            whole |= isinstance(config, UNetConfig)
            full = name if whole else f"backbone.{name}"                                        # saved without a head
            full = full.replace("backbone.embedding.", "backbone.embeddings.")                  # state-spaces' spelling
            if full in tensors:
                raise ConvertError(f"{path}: tensor {name} is there twice")
            tensors[full] = (file, name)
    return tensors


# ---------------------------------------------------------------- 4 which tensor becomes which

# Name in the GGUF file, name in the checkpoint, its shape in terms of Config, and whether it takes --type: A, D, conv,
# biases and norms stay F32. Last, where the values are not stored as they are, what becomes of them. {} is the layer.


def negative_exp(a_log):
    with np.errstate(over="ignore"):                    # encode() reports an infinity
        return -np.exp(a_log)                           # A = -exp(A_log)


MODEL_TENSORS = (
    ("token_embd.weight", "backbone.embeddings.weight", ("vocab_size", "d_model"), True),
    ("output_norm.weight", "backbone.norm_f.weight", ("d_model",), False),
    ("output.weight", "lm_head.weight", ("vocab_size", "d_model"), True),
)
LAYER_TENSORS = (
    ("attn_norm.weight", "norm.weight", ("d_model",), False),
    ("ssm_in.weight", "mixer.in_proj.weight", ("xz", "d_model"), True),
    ("ssm_conv1d.weight", "mixer.conv1d.weight", ("d_inner", 1, "d_conv"), False),
    ("ssm_conv1d.bias", "mixer.conv1d.bias", ("d_inner",), False),
    ("ssm_x.weight", "mixer.x_proj.weight", ("dt_b_c", "d_inner"), True),
    ("ssm_dt.weight", "mixer.dt_proj.weight", ("d_inner", "dt_rank"), True),
    ("ssm_dt.bias", "mixer.dt_proj.bias", ("d_inner",), False),
    ("ssm_a", "mixer.A_log", ("d_inner", "d_state"), False, negative_exp),
    ("ssm_d", "mixer.D", ("d_inner",), False),
    ("ssm_out.weight", "mixer.out_proj.weight", ("d_model", "d_inner"), True),
)
TYPES = {name.lower(): (GGMLType[name], LlamaFileType[file_type]) for name, file_type in (
    ("F32", "ALL_F32"), ("F16", "MOSTLY_F16"), ("BF16", "MOSTLY_BF16"), ("Q8_0", "MOSTLY_Q8_0"), ("Q4_0", "MOSTLY_Q4_0"),
    ("Q4_1", "MOSTLY_Q4_1"), ("Q5_0", "MOSTLY_Q5_0"), ("Q5_1", "MOSTLY_Q5_1"))}


def complex_a(a_log, a_imag):
    return np.stack([negative_exp(a_log), a_imag], -1)


def steps_outside(p, axis):
    """A pooling has feature h of step s at h p + s of `axis`; mamba has step behind step, s H + h."""
    def arrange(values):
        split = values.shape[:axis] + (-1, p) + values.shape[axis + 1:]
        return values.reshape(split).swapaxes(axis, axis + 1).reshape(values.shape)
    return arrange


def block_table(config, stage):
    """A U-Net's block. S4 has dt_bias, B and C of its own; complex numbers have real and imaginary part side by side."""
    (ssm, numbers), level = config.stages[stage], config.level(stage)
    d_model, d_inner, n, rank = config.width(level), config.expand * config.width(level), config.d_state, config.dt_rank(level)
    pair = (2,) if numbers == "complex" else ()
    yield from ((f"attn_norm.{part}", f"norm.{part}", (d_model,), False) for part in config.norm_parts)
    yield "ssm_in.weight", "mixer.in_proj.weight", (2 * d_inner, d_model), True
    yield "ssm_conv1d.weight", "mixer.conv1d.weight", (d_inner, 1, config.d_conv), False
    yield "ssm_conv1d.bias", "mixer.conv1d.bias", (d_inner,), False
    if ssm == "s6":
        yield "ssm_x.weight", "mixer.x_proj.weight", (rank + 2 * n * (1 + len(pair)), d_inner), True
        yield "ssm_dt.weight", "mixer.dt_proj.weight", (d_inner, rank), True
    yield "ssm_dt.bias", "mixer.dt_proj.bias" if ssm == "s6" else "mixer.dt_bias", (d_inner,), False
    if pair:
        yield "ssm_a", ("mixer.A_log", "mixer.A_imag"), (d_inner, n), False, complex_a
    else:
        yield "ssm_a", "mixer.A_log", (d_inner, n), False, negative_exp
    if ssm == "s4":
        yield "ssm_b", "mixer.B", (d_inner, n, *pair), False
        yield "ssm_c", "mixer.C", (d_inner, n, *pair), False
    yield "ssm_d", "mixer.D", (d_inner,), False
    yield "ssm_out.weight", "mixer.out_proj.weight", (d_model, d_inner), True


def unet_table(config):
    n_pools, names = len(config.pool), ["center"]
    for level in reversed(range(n_pools)):              # the checkpoint counts from the outside in both directions
        names = [f"down.{level}", *names, f"up.{level}"]
    yield "token_embd.weight", "embed.weight", (256, config.d_model), True
    yield from ((f"output_norm.{part}", f"norm.{part}", (config.d_model,), False) for part in config.norm_parts)
    yield "output.weight", "head.weight", (256, config.d_model), True
    yield "output.bias", "head.bias", (256,), False
    for i, p in enumerate(config.pool):
        low, wide = config.width(i + 1), config.width(i) * p
        yield f"pool_{i}.down.weight", f"down.{i}.pool.weight", (low, wide), True, steps_outside(p, 1)
        yield f"pool_{i}.down.bias", f"down.{i}.pool.bias", (low,), False
        yield f"pool_{i}.up.weight", f"up.{i}.pool.weight", (wide, low), True, steps_outside(p, 0)
        yield f"pool_{i}.up.bias", f"up.{i}.pool.bias", (wide,), False, steps_outside(p, 0)
    for stage, name in enumerate(names):
        for block in range(config.n_blocks):
            prefix = f"{name}.blocks.{block}."
            for target, sources, *rest in block_table(config, stage):
                sources = [sources] if isinstance(sources, str) else sources
                yield f"blk.{stage * config.n_blocks + block}.{target}", [prefix + source for source in sources], *rest


def tensor_table(config):
    if isinstance(config, UNetConfig):
        yield from unet_table(config)
        return
    yield from MODEL_TENSORS
    for i in range(config.n_layer):
        for name, source, *rest in LAYER_TENSORS:
            yield f"blk.{i}.{name}", f"backbone.layers.{i}.{source}", *rest


@dataclass
class Tensor:
    """One tensor of the output."""
    name: str
    shape: tuple                # of each of its sources in the checkpoint
    type: GGMLType
    arrange: object             # of the values of its sources; None: they are stored as they are
    sources: list = field(default_factory=list)     # (SafetensorsFile or TorchFile, name there); none: a bias that the model does
                                                    # not have, zeros

    @property
    def gguf_shape(self):       # conv1d's [d_inner, 1, d_conv] loses its middle, complex numbers lie side by side
        return self.shape if len(self.shape) < 2 else (self.shape[0], math.prod(self.shape[1:]) * max(1, len(self.sources)))

    @property
    def nbytes(self):
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.gguf_shape) // block * size

    @property
    def place(self):
        file, name = self.sources[0]
        return f"{file.path}: {name}"

    def read(self):
        """float32 [gguf_shape], as the file stores it apart from its type."""
        if not self.sources:
            return np.zeros(self.gguf_shape, np.float32)
        values = [file.read(name) for file, name in self.sources]
        return (self.arrange(*values) if self.arrange else values[0]).reshape(self.gguf_shape)

    def encode(self):
        """The bytes of the tensor in its type, as an array."""
        values = self.read()
        peak = np.abs([values.min(), values.max()]).max()       # NaN when there is one
        if not np.isfinite(peak):
            what = "NaN" if np.isnan(peak) else "infinity"
            raise ConvertError(f"{self.place}: found {what}, expected finite weights")
        # F16, and the F16 scales of the quantised types, end at 65504; no trained Mamba comes near it. BF16 ends just below F32.
        end, use = {GGMLType.F32: (np.inf, ""), GGMLType.BF16: (2.0**128 - 2.0**120, "f32")}.get(self.type, (65504, "bf16 or f32"))
        if peak > end:
            raise ConvertError(f"{self.place}: found a weight of {peak:g}, {self.type.name} ends at {end:g}; use --type {use}")
        with np.errstate(all="ignore"):                 # blocks of denormals: scale 0, whatever their quotients are
            return np.ascontiguousarray(gguf.quants.quantize(values, self.type))


def storage_type(shape, wanted):
    """A row must be whole blocks; F16 where it is not (dt_rank 48 against blocks of 32)."""
    return GGMLType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def classifier_table(checkpoint):
    """The entries of a classifier, where the checkpoint has one; its bias is optional."""
    for head in CLASSIFIERS:
        if f"{head}weight" in checkpoint:
            yield "cls.output.weight", f"{head}weight", ("n_labels", "d_model"), False
            if f"{head}bias" in checkpoint:
                yield "cls.output.bias", f"{head}bias", ("n_labels",), False
            return                                      # a second one is a tensor that is not expected


def plan_tensors(checkpoint, config, wanted, folder):
    """The output's tensors in file order, after every name and shape of the checkpoint has been checked."""
    plan, left = [], dict(checkpoint)
    classifier = list(classifier_table(checkpoint))
    if not classifier:
        config.labels = []                              # transformers writes two names into every config
    elif not config.labels:                             # and leaves them out where they are these two
        file, name = checkpoint[classifier[0][1]]
        config.labels = [f"LABEL_{i}" for i in range(max([1, *file.shapes[name][:1]]))]     # its shape is checked below
    for name, sources, dims, takes_type, *arrange in itertools.chain(tensor_table(config), classifier):
        shape = tuple(d if isinstance(d, int) else getattr(config, d) for d in dims)
        tensor = Tensor(name, shape, storage_type(shape, wanted) if takes_type else GGMLType.F32, *(arrange or [None]))
        plan.append(tensor)
        if name.endswith("conv1d.bias") and not config.conv_bias:
            continue
        if sources == "lm_head.weight" and sources not in left and (config.tied is not False or classifier):
            plan.pop()                                  # tied: llama.cpp and mamba use the embedding
            continue
        for source in [sources] if isinstance(sources, str) else sources:
            if source not in left:
                raise ConvertError(f"{folder}: tensor {source} is missing, expected shape {list(shape)}")
            file, name = left.pop(source)
            tensor.sources.append((file, name))
            if file.shapes[name] != shape:
                raise ConvertError(f"{file.path}: {name}: found shape {list(file.shapes[name])}, "
                                   f"expected {list(shape)} ({' x '.join(map(str, dims))})")
    if left:
        file, name = next(iter(left.values()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ConvertError(f"{file.path}: {name} {list(file.shapes[name])}{more}: expected no such tensor in a Mamba of "
                           f"{config.n_layer} layers")
    return drop_tied_head(plan, config)


def drop_tied_head(plan, config):
    """A head that equals the embedding is not stored twice, whatever config.json says."""
    by_name = {t.name: t for t in plan}
    head = None if isinstance(config, UNetConfig) else by_name.get("output.weight")
    if head and np.array_equal(head.read(), by_name["token_embd.weight"].read(), equal_nan=True):
        plan.remove(head)
    elif head and config.tied:
        raise ConvertError(f"{head.sources[0][0].path}: lm_head.weight differs from the embedding, but config.json says that they "
                           "are tied; set tie_word_embeddings (or tie_embeddings) there to what the model was trained with")
    return plan


# ---------------------------------------------------------------- 5 the tokenizer


@dataclass
class Tokenizer:
    tokens: list                # GPT-2's byte alphabet for normal tokens, literal text for added ones
    types: list                 # TokenType of each
    merges: list                # "left right", best first; empty for a vocabulary of bytes or characters
    pre: str                    # pre-tokenisation, by llama.cpp's name
    normalizer: str             # "nfc" or "none"
    ids: dict = field(default_factory=dict)     # bos, eos, unknown, padding
    add_bos: bool = False
    origin: str = ""


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next character from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


BYTE_ALPHABET = byte_alphabet()


def unsupported(path, what):
    return ConvertError(f"{path}: {what} is not supported; --no-tokenizer converts the model without its tokenizer")


def as_list(part):
    """A normalizer, pre-tokenizer or post-processor of tokenizer.json as the list of its steps."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return next((part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part), [])


def read_normalizer(spec, path):
    steps = [step["type"] for step in as_list(spec.get("normalizer"))]
    if steps not in ([], ["NFC"]):
        raise unsupported(path, f"normalizer {' + '.join(steps)}")
    return "nfc" if steps else "none"


def read_pre_tokenizer(spec, path):
    """llama.cpp's name for it, or "characters" where every character stands alone."""
    steps = as_list(spec.get("pre_tokenizer"))
    names = [step["type"] for step in steps]
    empty_split = names == ["Split"] and steps[0].get("pattern") in ({"Regex": ""}, {"String": ""}) \
        and steps[0].get("behavior") == "Isolated"
    if spec["model"].get("type") == "WordLevel" and not empty_split:   # it looks up what stands between two splits as a whole
        raise unsupported(path, f"a WordLevel model with pre-tokenizer {' + '.join(names) or None}")
    byte_level = next((step for step in steps if step["type"] == "ByteLevel"), None)
    if byte_level and (byte_level.get("add_prefix_space", True) or not byte_level.get("use_regex", True)):
        raise unsupported(path, "a ByteLevel pre-tokenizer with add_prefix_space or without use_regex")
    if names == ["ByteLevel"]:
        return "gpt-2"
    if names == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        punctuation, _, digits, split = steps
        if (punctuation.get("behavior") == "Contiguous" and not digits.get("individual_digits")
                and split.get("pattern") == {"Regex": "[0-9][0-9][0-9]"} and split.get("behavior") == "Isolated"
                and not split.get("invert")):
            return "falcon"
    if names == [] or empty_split:
        return "characters"
    raise unsupported(path, f"pre-tokenizer {' + '.join(names)}")


def read_model(spec, path):
    """(vocabulary {token: id}, merges as "left right", unknown token or None) of tokenizer.json's model."""
    model = spec.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind not in ("BPE", "WordLevel"):
        raise unsupported(path, f"a tokenizer model of type {kind}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(option):
            raise unsupported(path, f"{option} = {json.dumps(model[option])} in the tokenizer model")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return model.get("vocab", {}), merges, model.get("unk_token")


def added_bos(spec, ids, path):
    """The id, one of `ids`, that the post-processor puts in front of a text, or None."""
    bos = None
    for step in as_list(spec.get("post_processor")):
        template = step.get("single", [])
        kinds = [next(iter(piece)) for piece in template]
        if step["type"] == "ByteLevel" or kinds == ["Sequence"]:
            continue                                    # changes offsets only, or nothing
        if step["type"] != "TemplateProcessing" or kinds != ["SpecialToken", "Sequence"] or bos is not None:
            raise unsupported(path, f"a post-processor ({step['type']}) that adds more than one token in front of the text")
        adds = step["special_tokens"][template[0]["SpecialToken"]["id"]]["ids"]
        if len(adds) != 1 or type(adds[0]) is not int or adds[0] not in ids:
            raise unsupported(path, f"a post-processor that adds {adds}, not one id of the vocabulary,")
        bos = adds[0]
    return bos


def build_tokenizer(vocab, added, merges, pre, normalizer, path):
    """Put a vocabulary {token: id} and added tokens [{id, content, special, ...}] into id order."""
    characters = pre == "characters"
    added_ids = {a["id"] for a in added}
    texts = {token: i for token, i in vocab.items() if i not in added_ids}
    ids = {*texts.values(), *added_ids}
    if not all(type(i) is int and 0 <= i < 2**24 for i in ids) or not 0 < len(ids) == len(texts) + len(added):
        raise ConvertError(f"{path}: {len(texts) + len(added)} tokens, expected some, each with a small number of its own")
    if not merges and any(len(token) != 1 for token in texts):
        longest = max(texts, key=len)
        raise unsupported(path, f"a vocabulary without merges that holds more than single characters ({longest!r})")
    if merges and characters:
        raise unsupported(path, "merges without a ByteLevel pre-tokenizer")
    alphabet = set(BYTE_ALPHABET.values())
    ordinary = {token for token in texts if token and alphabet.issuperset(token)}      # an added token may have taken an id
    for merge in merges:
        pair = merge.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ordinary:
            raise unsupported(path, f"merge {merge!r}, not two ordinary tokens that join to a third,")
    n = 1 + max(ids)
    tokens, types = [f"[PAD{i}]" for i in range(n)], [TokenType.UNUSED] * n
    for token, i in texts.items():
        tokens[i] = "".join(BYTE_ALPHABET[b] for b in token.encode()) if characters else token
        types[i] = TokenType.NORMAL
    for a in added:
        if not isinstance(a["content"], str):
            raise ConvertError(f"{path}: added token {a['id']} has the content {a['content']!r}, expected a text")
        if not a["special"] and (a.get("lstrip") or a.get("rstrip") or a.get("single_word")):
            raise unsupported(path, f"added token {a['content']!r} with lstrip, rstrip or single_word")
        tokens[a["id"]] = a["content"]
        types[a["id"]] = TokenType.CONTROL if a["special"] else TokenType.USER_DEFINED
    return Tokenizer(tokens, types, merges, "gpt-2" if characters else pre, normalizer, origin=path.name)


def special_ids(folder, id_of, control):
    """bos, eos, unknown and padding ids: by text from the tokenizer's own files, else by number from config.json."""
    sources = [read_json(folder / name, {}) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config = read_json(folder / "config.json", {})
    ids = {}
    for short, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        for source in sources:
            token = source.get(f"{short}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in id_of:
                ids.setdefault(key, id_of[token])
        number = config.get(f"{short}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and number in control:   # its default is 0, which in a vocabulary of characters may be a letter
            ids.setdefault(key, number)
    return ids


def check_options(folder, path):
    """tokenizer_config.json, after refusing what it may add to the tokenizer's own rules."""
    options = read_json(folder / "tokenizer_config.json", {})
    for key in ("add_prefix_space", "add_eos_token"):
        if options.get(key):
            raise unsupported(path, f"{key} in tokenizer_config.json")
    return options


def tokenizer_from_json(folder):
    path = folder / "tokenizer.json"
    spec = read_json(path)
    options = check_options(folder, path)
    vocab, merges, unknown = read_model(spec, path)
    added = spec.get("added_tokens") or []
    tokenizer = build_tokenizer(vocab, added, merges, read_pre_tokenizer(spec, path), read_normalizer(spec, path), path)
    id_of = {**vocab, **{a["content"]: a["id"] for a in added}}
    bos = added_bos(spec, set(id_of.values()), path)
    tokenizer.ids = special_ids(folder, id_of, {a["id"] for a in added if a["special"]})
    # The unknown token that text can turn into is the model's; transformers' unk_token only names one.
    tokenizer.ids.pop("unknown", None)
    if unknown in id_of:
        tokenizer.ids["unknown"] = id_of[unknown]
        if spec["model"].get("fuse_unk") and not vocab.keys() >= {*BYTE_ALPHABET.values()}:  # else no text has an unknown part
            raise unsupported(path, "fuse_unk with an unknown token")
    if bos is not None:
        tokenizer.ids["bos"] = bos
    tokenizer.add_bos = bos is not None or bool(options.get("add_bos_token") and "bos" in tokenizer.ids)
    for option in ("truncation", "padding"):
        if spec.get(option):
            say(f"{path}: its {option} is not kept, a text gives all of its tokens and no more")
    return tokenizer


def tokenizer_from_gpt2_files(folder):
    """vocab.json and merges.txt, as GPT-2's tokenizer has them; GPT-NeoX's class adds NFC."""
    path = folder / "vocab.json"
    options = check_options(folder, path)
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ConvertError(f"{folder / 'merges.txt'}: not UTF-8: {e}") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocab, merges, _ = read_model({"model": {"type": "BPE", "vocab": read_json(path), "merges": merges}}, path)
    id_of = {**vocab, **read_json(folder / "added_tokens.json", {})}
    ids = special_ids(folder, id_of, set())
    special = set(ids.values())
    added = [{"id": i, "content": token, "special": i in special} for token, i in id_of.items()
             if i in special or token not in vocab]
    normalizer = "nfc" if str(options.get("tokenizer_class", "")).startswith("GPTNeoX") else "none"
    tokenizer = build_tokenizer(vocab, added, merges, "gpt-2", normalizer, path)
    tokenizer.ids, tokenizer.add_bos = ids, bool(options.get("add_bos_token") and "bos" in ids)
    return tokenizer


def read_gguf_keys(path):
    """The metadata of a GGUF file. gguf.GGUFReader needs ten seconds for a vocabulary of 50,000, this a fifth of one."""
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    string, array, at = 8, 9, 0

    def take(kind, count):
        """The next `count` values of a kind."""
        if kind == array:
            return [take(*struct.unpack("<IQ", take_bytes(12))) for _ in range(count)]
        if kind == string:
            return [take_bytes(*struct.unpack("<Q", take_bytes(8))).decode() for _ in range(count)]
        size = struct.calcsize(codes[kind]) * count
        return list(struct.unpack(f"<{count}{codes[kind]}", take_bytes(size)))

    def take_bytes(size):
        nonlocal at
        at += size
        if at > len(data):
            raise ValueError(f"{at - len(data)} bytes are missing")
        return data[at - size:at]

    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, _, n_keys = struct.unpack("<4sIQQ", take_bytes(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it does not start as one")
            return {take(string, 1)[0]: take(*take(4, 1), 1)[0] for _ in range(n_keys)}
    except (ValueError, KeyError, RecursionError, struct.error) as e:
        raise ConvertError(f"{path}: not a readable GGUF file: {first_line(e)}") from None


def tokenizer_from_gguf(path):
    """The vocabulary of a GGUF file, without the [PADn] that fill it up to a model's embedding."""
    key = read_gguf_keys(path)
    if key.get("tokenizer.ggml.model") != "gpt2":
        raise ConvertError(f"{path}: tokenizer.ggml.model is {key.get('tokenizer.ggml.model')!r}, expected 'gpt2'")
    pre = key.get("tokenizer.ggml.pre")
    if pre is None and key.get("general.architecture") == "gptneox":    # files older than the key: GPT-2's regex, NFC
        pre = "olmo"
    if pre not in ("gpt-2", "mpt", "olmo", "falcon"):
        raise ConvertError(f"{path}: tokenizer.ggml.pre is {pre!r}, expected gpt-2, mpt, olmo or falcon")
    normalizer = key.get("mamba.tokenizer.normalizer", "nfc" if pre in ("mpt", "olmo") else "none")
    tokens, types = key.get("tokenizer.ggml.tokens", []), key.get("tokenizer.ggml.token_type", [])
    if not tokens or len(types) != len(tokens):
        raise ConvertError(f"{path}: {len(tokens)} tokens and {len(types)} token types, expected a type for each token")
    while tokens and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop()
    ids = {k: key[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "unknown", "padding")
           if key.get(f"tokenizer.ggml.{k}_token_id", len(tokens)) < len(tokens)}
    return Tokenizer(tokens, types[:len(tokens)], key.get("tokenizer.ggml.merges", []),
                     "falcon" if pre == "falcon" else "gpt-2", normalizer, ids,
                     bool(key.get("tokenizer.ggml.add_bos_token")), key.get("general.name", path.stem))


def own_tokenizer(folder):
    """The tokenizer that comes with a checkpoint, or None."""
    if (folder / "tokenizer.json").is_file():
        read, path = tokenizer_from_json, folder / "tokenizer.json"
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        read, path = tokenizer_from_gpt2_files, folder / "vocab.json"
    else:
        for name in ("tokenizer.model", "spiece.model", "vocab.txt"):
            if (folder / name).is_file():
                raise unsupported(folder / name, "this kind of tokenizer, without a tokenizer.json,")
        return None
    try:
        return read(folder)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as e:
        raise ConvertError(f"{path}: not a tokenizer as the tokenizers package writes it ({e!r})") from None


NEOX_TOKENS = 50277         # in tokenizer.bin
SHARED_TOKENIZER = Path(__file__).resolve().with_name("tokenizer.bin")


def dna_tokenizer():
    """Single nucleotides, numbered as HyenaDNA's and Caduceus' character tokenizers number them."""
    special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    types = [TokenType.CONTROL] * 6 + [TokenType.UNKNOWN] + [TokenType.NORMAL] * 5
    return Tokenizer([*special, *"ACGTN"], types, [], "gpt-2", "dna", {"eos": 1, "unknown": 6, "padding": 4}, False, "nucleotides")


def model_tokenizer(folder, vocab_size, vocab=None):
    """The one of --vocab; the checkpoint's own; the repository's tokenizer.bin when the vocabulary fits it; else None."""
    tokenizer = dna_tokenizer() if vocab == "dna" else own_tokenizer(folder)
    if tokenizer is None:
        # Embeddings are padded to a multiple of 8 to 64; a vocabulary of another size is another vocabulary.
        if not NEOX_TOKENS <= vocab_size < NEOX_TOKENS + 64 or not SHARED_TOKENIZER.is_file():
            return None
        tokenizer = tokenizer_from_gguf(SHARED_TOKENIZER)
    n = len(tokenizer.tokens)
    if n > vocab_size:
        raise ConvertError(f"{folder}: {tokenizer.origin} has {n} tokens, the embedding only {vocab_size} rows; "
                           "--no-tokenizer converts the model without its tokenizer")
    # llama.cpp wants a token for each row of the embedding.
    tokenizer.tokens += [f"[PAD{i}]" for i in range(n, vocab_size)]
    tokenizer.types += [TokenType.UNUSED] * (vocab_size - n)
    return tokenizer


# ---------------------------------------------------------------- 6 writing the file


class Writer(gguf.GGUFWriter):
    """gguf's writer has no empty arrays, but llama.cpp wants the key of the merges even where there are none."""

    def _pack_val(self, val, vtype, *args, **kwargs):
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            return struct.pack("<IIQ", vtype, gguf.GGUFValueType.STRING, 0)
        return super()._pack_val(val, vtype, *args, **kwargs)


def add_unet_config(writer, config):
    levels = range(len(config.pool) + 1)
    writer.add_uint32("mamba.embedding_length", config.d_model)
    writer.add_uint32("mamba.block_count", config.n_layer)
    writer.add_uint32("mamba.ssm.conv_kernel", config.d_conv)
    writer.add_uint32("mamba.ssm.inner_size", config.expand * config.d_model)
    writer.add_uint32("mamba.ssm.state_size", config.d_state)
    writer.add_uint32("mamba.ssm.time_step_rank", config.dt_rank(0))
    writer.add_string("mamba.ssm.discretization", config.discretization)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", config.layer_norm_epsilon)
    writer.add_string("mamba.unet.norm", config.norm)
    writer.add_array("mamba.unet.pool", config.pool)
    writer.add_uint32("mamba.unet.blocks_per_stage", config.n_blocks)
    writer.add_array("mamba.unet.stages", [".".join(stage) for stage in config.stages])
    writer.add_array("mamba.unet.time_step_ranks", [config.dt_rank(level) for level in levels])
    writer.add_uint32("mamba.audio.sample_rate", config.sample_rate)
    writer.add_uint32("mamba.audio.start_token", config.start_token)
    writer.add_string("mamba.audio.normalization", config.normalization)


def add_config(writer, config, file_type):
    writer.add_file_type(file_type)
    if file_type not in (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(config, UNetConfig):
        add_unet_config(writer, config)
        return
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(0)       # llama.cpp asks for these two of every architecture
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.dt_rank)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_ssm_dt_b_c_rms(config.dt_b_c_eps is not None)
    if config.labels:
        writer.add_array("mamba.classifier.output_labels", config.labels)
    if config.dt_b_c_eps is not None:
        writer.add_float32("mamba.ssm.dt_b_c_rms_epsilon", config.dt_b_c_eps)


def add_tokenizer(writer, tokenizer):
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_key_value("tokenizer.ggml.merges", tokenizer.merges, gguf.GGUFValueType.ARRAY)
    for key, i in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_string("mamba.tokenizer.normalizer", tokenizer.normalizer)


def write_tensors(writer, plan):
    """Metadata, then each tensor as it is read. Not writer.write_tensor_data: its error for a full disk has no errno."""
    for t in plan:
        writer.add_tensor_info(t.name, t.gguf_shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    with tqdm(total=sum(t.nbytes for t in plan), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for t in plan:
            data = t.encode()
            out.write(data.data)
            writer.write_padding(out, data.nbytes)
            bar.update(data.nbytes)


def write_gguf(path, name, config, file_type, tokenizer, plan):
    """Write to a temporary file beside `path`, sync and rename: `path` is complete or untouched."""
    if path.exists() and not path.is_file():
        raise ConvertError(f"{path}: found a folder or device, expected the name of a file to write")
    target = Path(os.path.realpath(path))           # a symbolic link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = Writer(temporary, "mamba-unet" if isinstance(config, UNetConfig) else "mamba")
    writer.add_name(os.fsencode(name).decode(errors="replace"))     # a folder's name need not be UTF-8
    if config:
        add_config(writer, config, file_type)
    add_tokenizer(writer, tokenizer)
    try:
        write_tensors(writer, plan)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(temporary, target)
    except OSError as e:
        raise ConvertError(f"{path}: {e.strerror or e}; nothing was written") from None
    finally:                    # after success there is nothing left to remove
        with contextlib.suppress(OSError):
            writer.close()      # on a full disk this fails once more
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- 7 download and command line

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")


def download(repo_id, revision, weights):
    """The folder with a snapshot of a Hugging Face repository: only what a conversion reads, one format of weights."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        names = [file.rfilename for file in HfApi().model_info(repo_id, revision=revision).siblings or []]
        wanted = [name for name in names if name in SMALL_FILES]
        for pattern in (r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"):
            found = [name for name in names if re.fullmatch(pattern, name)] if weights else []
            if found:
                wanted += found
                break
        if not wanted:
            raise ConvertError(f"{repo_id}: no Mamba checkpoint in this repository, it has {', '.join(names[:5]) or 'no files'}")
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except ConvertError:
        raise
    except Exception as e:      # errors of HTTP, of the network, of authentication, of the cache folder: all one line
        raise ConvertError(f"{repo_id}: no such folder, and cannot be fetched from the Hugging Face hub: {first_line(e)}") from None


def source_folder(args):
    """SRC as (folder or GGUF file, name of the model)."""
    path = Path(args.src)
    if path.is_dir() or path.is_file() and args.tokenizer_only:
        return path, path.resolve().name
    if path.exists():
        raise ConvertError(f"{path}: found a file, expected a checkpoint folder or a Hugging Face id")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", args.src):
        raise ConvertError(f"{path}: no such folder, and not a Hugging Face id (OWNER/NAME)")
    return download(args.src, args.revision, weights=not args.tokenizer_only), args.src.split("/")[1]


def refuse_source(out, source, *others):
    """Nothing that is read may be written over, by whatever name: in the source's folder OUT may only replace a GGUF file."""
    if not out.is_file():
        return
    with open(out, "rb") as f:
        lost = f.read(4) not in (b"GGUF", b"")
    for path in [source, *others, *(source.iterdir() if lost and source.is_dir() else [])]:
        if path.exists() and out.samefile(path):
            raise ConvertError(f"{out}: would replace {path}; give the output another name")


def convert_tokenizer(source, name, out):
    tokenizer = tokenizer_from_gguf(source) if source.is_file() else own_tokenizer(source)
    if tokenizer is None:
        raise ConvertError(f"{source}: no tokenizer.json, expected one or a GGUF file with a vocabulary")
    write_gguf(out, tokenizer.origin if source.is_file() else name, None, None, tokenizer, [])
    say(f"{out}: {len(tokenizer.tokens)} tokens, {len(tokenizer.merges)} merges, pre-tokenizer {tokenizer.pre}, "
         f"normalizer {tokenizer.normalizer}")


def convert_model(folder, name, args):
    config = load_config(folder)
    wanted, file_type = TYPES[args.type]
    plan = plan_tensors(open_checkpoint(folder, config), config, wanted, folder)
    tokenizer = None if args.no_tokenizer or isinstance(config, UNetConfig) else model_tokenizer(folder, config.vocab_size, args.vocab)
    write_gguf(args.out, name, config, file_type, tokenizer, plan)
    say(f"{args.out}: {config.n_layer} layers, d_model {config.d_model}, vocabulary {config.vocab_size}, "
         f"{args.type.upper()}, {args.out.stat().st_size / 1e6:.1f} MB, "
         + (f"{config.sample_rate} Hz" if isinstance(config, UNetConfig)
            else f"tokenizer: {tokenizer.origin if tokenizer else 'none'}"))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="convert_weights.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n", 1)[0],
        epilog="""examples:
  convert_weights.py state-spaces/mamba-130m-hf mamba-130m.bin          from Hugging Face (HF_ENDPOINT, HF_HOME, HF_TOKEN apply)
  convert_weights.py ./my-checkpoint model.bin --type q8_0              from a folder, 8 bits a weight
  convert_weights.py --tokenizer-only vocabulary.gguf tokenizer.bin     only a vocabulary

SRC holds config.json with model.safetensors or pytorch_model.bin (or their shards), as state-spaces/mamba or transformers
(mamba, falcon_mamba) write them. The tokenizer is the checkpoint's own tokenizer.json or vocab.json and merges.txt; without
one, tokenizer.bin beside this script when the vocabulary has its size; else none, and the model runs on token ids.""")
    parser.add_argument("src", metavar="SRC", help="checkpoint folder or Hugging Face id (OWNER/NAME)")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, for example model.bin")
    parser.add_argument("--type", choices=TYPES, default="f16", type=str.lower,
                        help="type of the matrices (default f16); A, D, conv, biases and norms are always f32, and a matrix "
                             "whose rows are no multiple of a quantised block of 32 is f16")
    parser.add_argument("--no-tokenizer", action="store_true", help="store no tokenizer: the model runs on token ids")
    parser.add_argument("--tokenizer-only", action="store_true",
                        help="write only the vocabulary of SRC, a folder, an id or a GGUF file")
    parser.add_argument("--vocab", choices=["dna"], help="the vocabulary of single nucleotides (A 7, C 8, G 9, T 10, N 11, as in "
                        "HyenaDNA), for a checkpoint that has none")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face repository")
    args = parser.parse_args(argv)
    if args.vocab and (args.no_tokenizer or args.tokenizer_only):
        parser.error("--vocab excludes --no-tokenizer and --tokenizer-only")
    if args.no_tokenizer and args.tokenizer_only:
        parser.error("--no-tokenizer and --tokenizer-only exclude each other")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:          # as under nohup
            signal.signal(signum, signal.default_int_handler)   # ends as Ctrl-C does, temporary file removed
    try:
        source, name = source_folder(args)
        refuse_source(args.out, source, *([] if args.tokenizer_only else [SHARED_TOKENIZER]))
        if args.tokenizer_only:
            convert_tokenizer(source, name, args.out)
        else:
            convert_model(source, name, args)
    except ConvertError as e:
        say(" ".join(str(e).split()))
        return 1
    except OSError as e:
        say(f"{e.filename or args.src}: {e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
