"""convert_weights.py: every checkpoint layout, type, tokenizer and mistake, on tiny checkpoints written here.

Results are read back with gguf.GGUFReader and compared with what this file computes on its own from the same random
weights. The Hugging Face id is tried against a small server on this machine, through HF_ENDPOINT.
"""
import functools
import http.server
import importlib.util
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "convert_weights.py"
spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
convert_weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_weights)

D_MODEL, N_LAYER, VOCAB, D_INNER, D_STATE, D_CONV, DT_RANK = 32, 2, 40, 64, 4, 4, 2

# ---------------------------------------------------------------- checkpoints


def random_weights(seed=0, vocab=VOCAB, head=False):
    """A checkpoint as transformers names it, float32."""
    rng = np.random.default_rng(seed)

    def r(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)
    w = {"backbone.embeddings.weight": r(vocab, D_MODEL), "backbone.norm_f.weight": r(D_MODEL)}
    for i in range(N_LAYER):
        p = f"backbone.layers.{i}."
        w[p + "norm.weight"] = r(D_MODEL)
        w[p + "mixer.A_log"] = r(D_INNER, D_STATE)
        w[p + "mixer.D"] = r(D_INNER)
        w[p + "mixer.in_proj.weight"] = r(2 * D_INNER, D_MODEL)
        w[p + "mixer.conv1d.weight"] = r(D_INNER, 1, D_CONV)
        w[p + "mixer.conv1d.bias"] = r(D_INNER)
        w[p + "mixer.x_proj.weight"] = r(DT_RANK + 2 * D_STATE, D_INNER)
        w[p + "mixer.dt_proj.weight"] = r(D_INNER, DT_RANK)
        w[p + "mixer.dt_proj.bias"] = r(D_INNER)
        w[p + "mixer.out_proj.weight"] = r(D_MODEL, D_INNER)
    if head:
        w["lm_head.weight"] = r(vocab, D_MODEL)
    return w


def expected_tensors(w):
    """{GGUF name: float32 array} of that checkpoint, each written out by hand."""
    e = {"token_embd.weight": w["backbone.embeddings.weight"], "output_norm.weight": w["backbone.norm_f.weight"]}
    for i in range(N_LAYER):
        p, b = f"backbone.layers.{i}.", f"blk.{i}."
        e[b + "attn_norm.weight"] = w[p + "norm.weight"]
        e[b + "ssm_a"] = -np.exp(w[p + "mixer.A_log"])
        e[b + "ssm_d"] = w[p + "mixer.D"]
        e[b + "ssm_in.weight"] = w[p + "mixer.in_proj.weight"]
        e[b + "ssm_conv1d.weight"] = w[p + "mixer.conv1d.weight"][:, 0, :]
        e[b + "ssm_conv1d.bias"] = w[p + "mixer.conv1d.bias"]
        e[b + "ssm_x.weight"] = w[p + "mixer.x_proj.weight"]
        e[b + "ssm_dt.weight"] = w[p + "mixer.dt_proj.weight"]
        e[b + "ssm_dt.bias"] = w[p + "mixer.dt_proj.bias"]
        e[b + "ssm_out.weight"] = w[p + "mixer.out_proj.weight"]
    if "lm_head.weight" in w:
        e["output.weight"] = w["lm_head.weight"]
    return e


MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")


def hf_config(**changes):
    config = {"model_type": "mamba", "hidden_size": D_MODEL, "num_hidden_layers": N_LAYER, "vocab_size": VOCAB,
              "intermediate_size": D_INNER, "expand": 2, "state_size": D_STATE, "conv_kernel": D_CONV,
              "time_step_rank": DT_RANK, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
              "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0}
    return {**config, **changes}


def state_spaces_config(**changes):
    config = {"d_model": D_MODEL, "n_layer": N_LAYER, "vocab_size": VOCAB - 3, "ssm_cfg": {"d_state": D_STATE},
              "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    return {**config, **changes}


def write_checkpoint(folder, weights, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_bf16(path, weights):
    """A .safetensors file of bfloat16, which numpy cannot hold: the upper halves of these float32."""
    header, data = {}, b""
    for name, values in weights.items():
        raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


# ---------------------------------------------------------------- running the converter and reading its file


@pytest.fixture
def convert(capsys):
    """convert(*arguments) -> (exit status, standard error); standard output must stay empty. hangup: what SIGHUP did before."""
    def run(*args, hangup=signal.SIG_DFL):
        before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM), signal.SIGHUP: signal.signal(signal.SIGHUP, hangup)}
        try:
            status = convert_weights.main([str(a) for a in args])
        except SystemExit as e:                         # argparse
            status = e.code
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        captured = capsys.readouterr()
        assert captured.out == ""
        return status, captured.err
    return run


class Result:
    """Metadata and dequantised tensors of a GGUF file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.key = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {t.name: t.tensor_type for t in reader.tensors}
        self.tensors = {}
        for t in reader.tensors:
            values = gguf.quants.dequantize(t.data, t.tensor_type)
            self.tensors[t.name] = values.reshape([int(n) for n in reversed(t.shape)])


def assert_converted(path, weights, keys=()):
    """The F32 file `path` holds exactly these weights, bit for bit."""
    result, expected = Result(path), expected_tensors(weights)
    assert result.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert result.types[name] == gguf.GGMLQuantizationType.F32
        assert result.tensors[name].shape == values.shape, name
        assert np.array_equal(result.tensors[name], values), name
    for name, value in dict(keys).items():
        assert result.key[name] == value, name
    return result


def assert_failed(run, out, *texts):
    """One line that says these things, exit status 1, and no file, not even a temporary one."""
    status, err = run
    assert status == 1 and err.startswith("convert_weights.py: ") and err.count("\n") == 1, (status, err)
    for text in texts:
        assert text in err, err
    assert not out.exists() and not list(out.parent.glob(".*")), list(out.parent.iterdir())


CONFIG_KEYS = {
    "general.architecture": "mamba", "general.name": "tiny", "general.file_type": 0, "mamba.context_length": 2**20,
    "mamba.embedding_length": D_MODEL, "mamba.block_count": N_LAYER, "mamba.vocab_size": VOCAB,
    "mamba.feed_forward_length": 0, "mamba.attention.head_count": 0, "mamba.ssm.conv_kernel": D_CONV,
    "mamba.ssm.inner_size": D_INNER, "mamba.ssm.state_size": D_STATE, "mamba.ssm.time_step_rank": DT_RANK,
    "mamba.ssm.dt_b_c_rms": False, "mamba.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "tokenizer.ggml.model": "no_vocab"}


# ---------------------------------------------------------------- layouts


def test_hf_layout(tmp_path, convert):
    weights = random_weights()
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    status, err = convert(folder, tmp_path / "m.bin", "--type", "f32")
    assert status == 0 and "2 layers" in err and err.count("\n") == 1
    result = assert_converted(tmp_path / "m.bin", weights, CONFIG_KEYS)
    assert not {k for k in result.key if k.startswith("tokenizer.")} - {"tokenizer.ggml.model"}
    assert "mamba.ssm.dt_b_c_rms_epsilon" not in result.key


@pytest.mark.parametrize("head, bias, names", [("score", False, {"0": "cat", "1": "dog", "2": "cow"}), ("classifier", True, None)])
def test_classifier(tmp_path, convert, head, bias, names):
    """Its weights stay F32; classes without names are numbered; without lm_head the embedding stands in, tied or not."""
    rng = np.random.default_rng(5)
    weights = random_weights()
    cls = {f"{head}.weight": rng.normal(size=(3, D_MODEL)).astype(np.float32)}
    if bias:
        cls[f"{head}.bias"] = rng.normal(size=3).astype(np.float32)
    changes = {"id2label": names} if names else {}
    folder = write_checkpoint(tmp_path / "tiny", {**weights, **cls}, hf_config(tie_word_embeddings=False, **changes))
    assert convert(folder, tmp_path / "m.bin", "--type", "q8_0")[0] == 0
    result = Result(tmp_path / "m.bin")
    assert result.key["mamba.classifier.output_labels"] == (["cat", "dog", "cow"] if names else ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert {name: result.types[name] for name in result.types if name.startswith("cls.")}.keys() == {f"cls.output.{part.split('.')[1]}" for part in cls}
    for name, values in cls.items():
        stored = f"cls.output.{name.split('.')[1]}"
        assert result.types[stored] == gguf.GGMLQuantizationType.F32 and np.array_equal(result.tensors[stored], values)
    assert "output.weight" not in result.tensors


def test_classifier_mistakes(tmp_path, convert):
    weights = {**random_weights(), "score.weight": np.ones((3, D_MODEL), np.float32)}
    folder = write_checkpoint(tmp_path / "two", weights, hf_config(id2label={"0": "a", "1": "b"}))
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", "score.weight", "[3, 32]", "[2, 32]")
    folder = write_checkpoint(tmp_path / "gap", weights, hf_config(id2label={"0": "a", "2": "b"}))
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", "id2label")
    folder = write_checkpoint(tmp_path / "half", weights, hf_config(id2label={"0": "a", "1": "b", "2": "\ud83d"}))
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", "config.json: not valid JSON", "surrogates not allowed")
    for shape in ((0, D_MODEL), ()):
        folder = write_checkpoint(tmp_path / "none", {**weights, "score.weight": np.ones(shape, np.float32)}, hf_config())
        assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", f"score.weight: found shape {list(shape)}, expected [1, 32]")


def test_names_of_classes_without_a_classifier(tmp_path, convert):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config(id2label={"0": "LABEL_0", "1": "LABEL_1"}))
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert "mamba.classifier.output_labels" not in Result(tmp_path / "m.bin").key


def test_state_spaces_layout(tmp_path, convert):
    """Its spelling of the embedding, the padded vocabulary, the head that repeats the embedding, dt_rank from d_model."""
    weights = random_weights()
    stored = {name.replace("embeddings", "embedding"): values for name, values in weights.items()}
    stored["lm_head.weight"] = weights["backbone.embeddings.weight"].copy()
    folder = write_checkpoint(tmp_path / "tiny", stored, state_spaces_config())
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", weights, CONFIG_KEYS)


def test_sharded(tmp_path, convert):
    weights = random_weights(head=True)
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[i::3]}, folder / shard)
        index.update(dict.fromkeys(names[i::3], shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", weights)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert_failed(convert(folder, tmp_path / "n.bin"), tmp_path / "n.bin", "model-00002-of-00003.safetensors")


def test_falcon(tmp_path, convert):
    weights = random_weights(head=True)
    config = hf_config(model_type="falcon_mamba", mixer_rms_eps=3e-6, tie_word_embeddings=False)
    folder = write_checkpoint(tmp_path / "tiny", weights, config)
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", weights, {
        "mamba.ssm.dt_b_c_rms": True, "mamba.ssm.dt_b_c_rms_epsilon": float(np.float32(3e-6))})


def test_saved_without_head(tmp_path, convert):
    """MambaModel.save_pretrained: names without "backbone."."""
    weights = random_weights()
    stored = {name.removeprefix("backbone."): values for name, values in weights.items()}
    for rank in ("auto", None):
        folder = write_checkpoint(tmp_path / "tiny", stored, hf_config(time_step_rank=rank, intermediate_size=None))
        assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
        assert_converted(tmp_path / "m.bin", weights)


def test_no_conv_bias(tmp_path, convert):
    weights = random_weights()
    zero = {name: np.zeros_like(v) if name.endswith("conv1d.bias") else v for name, v in weights.items()}
    stored = {name: v for name, v in weights.items() if not name.endswith("conv1d.bias")}
    folder = write_checkpoint(tmp_path / "tiny", stored, hf_config(use_conv_bias=False))
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", zero)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_source_types(tmp_path, convert, dtype):
    weights = random_weights()
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    if dtype == "bfloat16":
        weights = {k: (v.view(np.uint32) & 0xFFFF0000).view(np.float32) for k, v in weights.items()}
        write_bf16(folder / "model.safetensors", weights)
    else:
        save_file({k: v.astype(dtype) for k, v in weights.items()}, folder / "model.safetensors")
        weights = {k: v.astype(dtype).astype(np.float32) for k, v in weights.items()}
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", weights)


def test_pytorch_bin(tmp_path, convert):
    torch = pytest.importorskip("torch")
    weights = random_weights()
    stored = {name.replace("embeddings", "embedding"): torch.from_numpy(v) for name, v in weights.items()}
    stored["lm_head.weight"] = stored["backbone.embedding.weight"]
    folder = write_checkpoint(tmp_path / "tiny", weights, state_spaces_config(tie_embeddings=True))
    (folder / "model.safetensors").unlink()
    for new_format in (True, False):                    # the older one cannot be mapped
        torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
        assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
        assert_converted(tmp_path / "m.bin", weights, CONFIG_KEYS)
    half = {name: v.to(torch.bfloat16) for name, v in stored.items()}
    torch.save(half, folder / "pytorch_model.bin")
    assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
    assert_converted(tmp_path / "m.bin", {name.replace("embedding.", "embeddings."): v.float().numpy()
                                          for name, v in half.items() if name != "lm_head.weight"})
    for bad in ({"optimizer": [1, 2, 3]}, {0: torch.ones(2)}, {"backbone.a": torch.eye(2).to_sparse()}, [torch.ones(2)],
                {"backbone.a": torch.ones(2, device="meta")}, {"backbone.a": np.float64(1)}, b"garbage"):
        torch.save(bad, folder / "pytorch_model.bin")
        if isinstance(bad, bytes):
            (folder / "pytorch_model.bin").write_bytes(bad)
        assert_failed(convert(folder, tmp_path / "n.bin"), tmp_path / "n.bin", "pytorch_model.bin: damaged, or not a PyTorch state "
                      "dictionary of dense tensors and nothing else; fetch it again, or save the model as model.safetensors\n")


def test_pytorch_bin_runs_no_code(tmp_path, convert):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    (folder / "model.safetensors").unlink()
    torch.save({"backbone.norm_f.weight": Evil()}, folder / "pytorch_model.bin")
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", "pytorch_model.bin")
    assert not (tmp_path / "owned").exists()


# ---------------------------------------------------------------- tied and untied heads


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_head(tmp_path, convert, says, head):
    weights = random_weights(head=head == "different")
    stored = dict(weights)
    if head == "equal":
        stored["lm_head.weight"] = weights["backbone.embeddings.weight"].copy()
    folder = write_checkpoint(tmp_path / "tiny", stored, hf_config(tie_word_embeddings=says))
    run, out = convert(folder, tmp_path / "m.bin", "--type", "f32"), tmp_path / "m.bin"
    if head == "absent" and says is False:
        assert_failed(run, out, "lm_head.weight is missing, expected shape [40, 32]")
    elif head == "different" and says is True:
        assert_failed(run, out, "lm_head.weight differs from the embedding")
    else:
        assert run[0] == 0
        assert_converted(out, weights)


# ---------------------------------------------------------------- types

# The largest error of a value, from the definition of each block of 32, as a fraction of the block's range: half a step,
# and for the symmetric 4 and 5 bit types a whole one, which is where the value opposite the largest is cut off. Scales
# are float16, so each may be off by 2^-11 of itself, and by 2^-25 where it is tiny.
BLOCK_ERROR = {"q8_0": lambda b: np.abs(b).max(1) / 127 / 2, "q4_0": lambda b: np.abs(b).max(1) / 8,
               "q5_0": lambda b: np.abs(b).max(1) / 16, "q4_1": lambda b: np.ptp(b, 1) / 15 / 2,
               "q5_1": lambda b: np.ptp(b, 1) / 31 / 2}


@pytest.mark.parametrize("name,file_type", [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7), ("q4_0", 2), ("q4_1", 3),
                                            ("q5_0", 8), ("q5_1", 9)])
def test_types(tmp_path, convert, name, file_type):
    weights = random_weights(head=True)
    weights["backbone.embeddings.weight"][3] = 0                    # an empty block, and one of denormals
    weights["backbone.embeddings.weight"][4] *= 1e-39
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    assert convert(folder, tmp_path / "m.bin", "--type", name)[0] == 0
    result, expected = Result(tmp_path / "m.bin"), expected_tensors(weights)
    assert result.key["general.file_type"] == file_type
    assert result.key.get("general.quantization_version") == (2 if name[0] == "q" else None)
    assert result.tensors.keys() == expected.keys()
    for tensor, values in expected.items():
        stored, matrix = result.types[tensor].name.lower(), tensor.endswith(MATRICES)
        if not matrix:
            assert stored == "f32" and np.array_equal(result.tensors[tensor], values), tensor
        elif name[0] == "q" and values.shape[-1] % 32:              # ssm_dt: rows of dt_rank = 2
            assert tensor.endswith("ssm_dt.weight") and stored == "f16"
        else:
            assert stored == name, tensor
        difference = np.abs(result.tensors[tensor] - values)
        if stored == "f16":
            assert np.array_equal(result.tensors[tensor], values.astype(np.float16).astype(np.float32)), tensor
        elif stored == "bf16":
            assert np.all(difference <= np.abs(values) * 2**-8 + 2**-134), tensor     # 2^-133: the spacing of denormals
        elif matrix and stored in BLOCK_ERROR:
            blocks = values.reshape(-1, 32)
            limit = BLOCK_ERROR[stored](blocks) + np.abs(blocks).max(1) * 2**-10 + 127 * 2**-25
            assert np.all(difference.reshape(-1, 32) <= limit[:, None]), tensor
            assert np.any(difference > 0), tensor


def test_default_type_is_f16(tmp_path, convert):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    assert convert(folder, tmp_path / "m.bin")[0] == 0
    assert Result(tmp_path / "m.bin").types["blk.1.ssm_in.weight"].name == "F16"


def test_end_of_bf16(tmp_path, convert):
    weights, out, last = random_weights(), tmp_path / "m.bin", np.float32(2.0**128 - 2.0**120)
    weights[LAYER1 + "mixer.in_proj.weight"][0, 7] = -last
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    assert convert(folder, out, "--type", "bf16")[0] == 0
    assert Result(out).tensors["blk.1.ssm_in.weight"][0, 7] == -last
    out.unlink()
    weights[LAYER1 + "mixer.in_proj.weight"][0, 7] = -3.4028e38                                 # rounds to infinity
    save_file(weights, folder / "model.safetensors")
    assert_failed(convert(folder, out, "--type", "bf16"), out, "found a weight of 3.4028e+38, BF16 ends at 3.38953e+38; use --type f32")


# ---------------------------------------------------------------- mistakes


def rename(old, new):
    return lambda w, c: w.__setitem__(new, w.pop(old))


def put(name, value):
    return lambda w, c: w[name].flat.__setitem__(7, value)


LAYER1 = "backbone.layers.1."
MISTAKES = {
    "missing tensor": (lambda w, c: w.pop(LAYER1 + "mixer.D"), f"{LAYER1}mixer.D is missing, expected shape [64]"),
    "misspelt tensor": (rename(LAYER1 + "mixer.D", LAYER1 + "mixer.DD"), f"{LAYER1}mixer.D is missing"),
    "one more": (lambda w, c: w.update({"backbone.extra": w["backbone.norm_f.weight"]}), "backbone.extra [32]: expected no such"),
    "too many layers": (lambda w, c: c.update(num_hidden_layers=1), "and 9 more: expected no such tensor in a Mamba of 1 layers"),
    "too few layers": (lambda w, c: c.update(num_hidden_layers=2**30), "backbone.layers.2.norm.weight is missing"),
    "wrong shape": (lambda w, c: w.update({LAYER1 + "mixer.A_log": w[LAYER1 + "mixer.A_log"].T.copy()}),
                    "mixer.A_log: found shape [4, 64], expected [64, 4] (d_inner x d_state)"),
    "wrong vocabulary": (lambda w, c: c.update(vocab_size=41), "found shape [40, 32], expected [41, 32]"),
    "integers": (lambda w, c: w.update({LAYER1 + "mixer.D": np.ones(64, np.int32)}), "found type I32"),
    "NaN": (put(LAYER1 + "mixer.out_proj.weight", np.nan), "layers.1.mixer.out_proj.weight: found NaN"),
    "NaN in the embedding": (put("backbone.embeddings.weight", np.nan), "backbone.embeddings.weight: found NaN"),
    "infinity": (put(LAYER1 + "mixer.conv1d.bias", -np.inf), "layers.1.mixer.conv1d.bias: found infinity"),
    "A overflows": (put(LAYER1 + "mixer.A_log", 100.0), "mixer.A_log: found infinity"),
    "beyond F16": (put(LAYER1 + "mixer.in_proj.weight", -7e4), "found a weight of 70000, F16 ends at 65504"),
    "other model": (lambda w, c: c.update(model_type="llama"), "model_type 'llama', expected model_type mamba"),
    "Mamba-2": (lambda w, c: c.update(model_type="mamba2"), "model_type 'mamba2', expected model_type mamba"),
    "no model type": (lambda w, c: c.pop("model_type"), "no model_type"),
    "bias": (lambda w, c: c.update(use_bias=True), "use_bias is true, only false is supported"),
    "layer norm": (lambda w, c: c.update(rms_norm=False), "rms_norm is false, only true is supported"),
    "activation": (lambda w, c: c.update(hidden_act="gelu"), 'hidden_act is "gelu"'),
    "no width": (lambda w, c: c.pop("hidden_size"), "hidden_size is missing"),
    "width in words": (lambda w, c: c.update(hidden_size="thirty-two"), "config.json"),
    "width in a string": (lambda w, c: c.update(hidden_size="64"), "hidden_size is '64', expected a positive integer"),
    "true layers": (lambda w, c: c.update(num_hidden_layers=True), "num_hidden_layers is True, expected a positive integer"),
    "no state": (lambda w, c: c.update(state_size=0), "state_size is 0, expected a positive integer"),
    "fractional state": (lambda w, c: c.update(state_size=16.0), "state_size is 16.0, expected a positive integer"),
    "rank in words": (lambda w, c: c.update(time_step_rank="Auto"), "time_step_rank is 'Auto', expected a positive integer"),
    "epsilon": (lambda w, c: c.update(layer_norm_epsilon="small"), "layer_norm_epsilon is 'small'"),
    "no epsilon": (lambda w, c: c.update(layer_norm_epsilon=None), "layer_norm_epsilon is None"),
    "0 as float32": (lambda w, c: c.update(layer_norm_epsilon=1e-50), "layer_norm_epsilon is 1e-50, expected a number between 1e-37 and 1"),
    "Falcon's epsilon": (lambda w, c: c.update(model_type="falcon_mamba", mixer_rms_eps=None), "mixer_rms_eps is None"),
    "bias in a string": (lambda w, c: c.update(use_conv_bias="false"), "use_conv_bias is 'false', expected true or false"),
    "tied in a string": (lambda w, c: c.update(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
    "expansion": (lambda w, c: (c.pop("intermediate_size"), c.update(expand=float("inf"))), "expand is inf, expected a positive number"),
    "length": (lambda w, c: c.update(max_position_embeddings=-1), "max_position_embeddings is -1"),
    "two heads": (lambda w, c: w.update({head: np.ones((2, D_MODEL), np.float32) for head in ("score.weight", "classifier.weight")}),
                  "classifier.weight [2, 32]: expected no such"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, convert, name):
    change, text = MISTAKES[name]
    weights, config = random_weights(), hf_config()
    change(weights, config)
    folder = write_checkpoint(tmp_path / "tiny", weights, config)
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", text)


@pytest.mark.parametrize("change,text", [
    ({"ssm_cfg": {"layer": "Mamba2"}}, 'ssm_cfg: layer is "Mamba2", only "Mamba1"'), ({"rms_norm": False}, "rms_norm"),
    ({"attn_layer_idx": [3]}, "attn_layer_idx is [3]"), ({"d_intermediate": 64}, "d_intermediate is 64"),
    ({"ssm_cfg": {"bias": True}}, "bias is true"), ({"pad_vocab_size_multiple": 64}, "expected [64, 32]"),
    ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0, expected a positive integer"),
    ({"ssm_cfg": {"d_state": "4"}}, "ssm_cfg: d_state is '4'"), ({"ssm_cfg": [4]}, "a value of the wrong kind")])
def test_state_spaces_mistakes(tmp_path, convert, change, text):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), state_spaces_config(**change))
    assert_failed(convert(folder, tmp_path / "m.bin"), tmp_path / "m.bin", text)


def test_broken_files(tmp_path, convert):
    out = tmp_path / "m.bin"
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    weights = (folder / "model.safetensors").read_bytes()
    for broken in (b"", weights[:-1], weights[:100], b"\xff" * 300):
        (folder / "model.safetensors").write_bytes(broken)
        assert_failed(convert(folder, out), out, "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert_failed(convert(folder, out), out, "no weights found, expected model.safetensors, pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_failed(convert(folder, out), out, "no weight_map")
    (folder / "config.json").write_text("{")
    assert_failed(convert(folder, out), out, "config.json: not valid JSON")
    (folder / "config.json").write_text("[" * 100_000)
    assert_failed(convert(folder, out), out, "config.json: not valid JSON: maximum recursion depth")
    (folder / "config.json").write_text("[]")
    assert_failed(convert(folder, out), out, "found a JSON list, expected an object")
    (folder / "config.json").unlink()
    assert_failed(convert(folder, out), out, "no config.json")
    assert_failed(convert(tmp_path / "nowhere", out), out, "no such folder")


def test_command_line(tmp_path, convert, capsys):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    for args in ((folder,), (folder, tmp_path / "m.bin", "--type", "q9_9"), (folder, tmp_path / "m.bin", "--what"),
                 (folder, tmp_path / "m.bin", "--no-tokenizer", "--tokenizer-only")):
        status, err = convert(*args)
        assert status == 2 and "usage:" in err
    with pytest.raises(SystemExit) as end:
        convert_weights.main(["--help"])
    help_text, err = capsys.readouterr()
    assert end.value.code == 0 and "examples:" in help_text and "--type" in help_text and err == ""


# ---------------------------------------------------------------- the output appears whole or not at all


def test_unwritable(tmp_path, convert):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    status, err = convert(folder, tmp_path / "no" / "m.bin")
    assert status == 1 and "m.bin: No such file or directory; nothing was written" in err
    status, err = convert(folder, tmp_path)
    assert status == 1 and "found a folder or device" in err
    status, err = convert(folder, "/dev/null")
    assert status == 1 and "found a folder or device" in err and not Path("/dev/null").is_file()


def test_overwrites_only_when_complete(tmp_path, convert):
    weights, out = random_weights(), tmp_path / "m.bin"
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    assert convert(folder, out, "--type", "f32")[0] == 0
    before = out.read_bytes()
    bad = {**weights, LAYER1 + "mixer.out_proj.weight": np.full((D_MODEL, D_INNER), np.nan, np.float32)}
    save_file(bad, folder / "model.safetensors")
    assert convert(folder, out, "--type", "f32")[0] == 1
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "tiny"]
    save_file(random_weights(seed=1), folder / "model.safetensors")
    assert convert(folder, out, "--type", "f32")[0] == 0
    assert_converted(out, random_weights(seed=1))


def test_sources_are_left_alone(tmp_path, convert, monkeypatch):
    """Neither under their own names nor under others; a GGUF file beside them is written over."""
    folder = write_checkpoint(tmp_path / "tiny", random_weights(vocab=408), hf_config(vocab_size=408))
    small_bpe().save(str(folder / "tokenizer.json"))
    (tmp_path / "symbolic").symlink_to(folder / "model.safetensors")
    os.link(folder / "model.safetensors", tmp_path / "hard")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for out in (*sorted(folder.iterdir()), tmp_path / "symbolic", tmp_path / "hard"):
        for options in ((), ("--tokenizer-only",)):
            status, err = convert(folder, out, *options)
            assert status == 1 and f"{out}: would replace {folder}/" in err and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    for _ in range(2):
        assert convert(folder, folder / "m.bin")[0] == 0
    status, err = convert("--tokenizer-only", folder / "m.bin", folder / "m.bin")
    assert status == 1 and "m.bin: would replace" in err and Result(folder / "m.bin").tensors
    monkeypatch.setattr(convert_weights, "SHARED_TOKENIZER", folder / "m.bin")
    assert convert(folder, folder / "m.bin")[0] == 1 and convert("--tokenizer-only", folder, folder / "m.bin")[0] == 0


def test_symbolic_link_stays_one(tmp_path, convert):
    weights = random_weights()
    folder = write_checkpoint(tmp_path / "tiny", weights, hf_config())
    (tmp_path / "there").mkdir()
    (tmp_path / "m.bin").symlink_to("there/n.bin")
    for _ in range(2):                                  # without and with the file that it names
        assert convert(folder, tmp_path / "m.bin", "--type", "f32")[0] == 0
        assert os.readlink(tmp_path / "m.bin") == "there/n.bin" and os.listdir(tmp_path / "there") == ["n.bin"]
        assert_converted(tmp_path / "there" / "n.bin", weights)
        (tmp_path / "there" / "n.bin").write_bytes(b"GGUF")


def test_folder_whose_name_is_not_utf8(tmp_path, convert):
    folder = write_checkpoint(tmp_path / os.fsdecode(b"mod\xe8le"), random_weights(), hf_config())
    assert convert(folder, tmp_path / "m.bin")[0] == 0
    assert Result(tmp_path / "m.bin").key["general.name"] == "mod\ufffdle"


def test_interrupted_at_once(tmp_path):
    """Most of the first second goes into the packages: here one of them is interrupted."""
    (tmp_path / "gguf.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, tmp_path / "m.bin"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert_failed((done.returncode, done.stderr), tmp_path / "m.bin", "interrupted; nothing was written")


@pytest.mark.parametrize("signum,hangup", [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL),
                                           (signal.SIGHUP, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_IGN)])
def test_interrupted(tmp_path, convert, monkeypatch, signum, hangup):
    """The last is nohup's."""
    folder, out, encode = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config()), tmp_path / "m.bin", []

    def interrupted(tensor, original=convert_weights.Tensor.encode):
        encode.append(tensor)
        if len(encode) == 5:
            assert list(tmp_path.glob(".m.bin.*"))
            os.kill(os.getpid(), signum)
        return original(tensor)
    monkeypatch.setattr(convert_weights.Tensor, "encode", interrupted)
    run = convert(folder, out, hangup=hangup)
    if hangup == signal.SIG_IGN:
        assert run[0] == 0 and Result(out).tensors
    else:
        assert_failed(run, out, "interrupted")


def test_file_size_limit(tmp_path):
    """Every write past 16 KiB fails, as on a full disk."""
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    done = subprocess.run([sys.executable, SCRIPT, folder, tmp_path / "m.bin"], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14)))
    assert_failed((done.returncode, done.stderr), tmp_path / "m.bin", "m.bin: File too large; nothing was written")


def test_full_disk(tmp_path, convert):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
        assert_failed(convert(folder, disk / "m.bin"), disk / "m.bin", "m.bin: No space left on device; nothing was written")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- tokenizers

TEXTS = ["Hello, world!", "  two  spaces\n\n\tand a tab ", "don't we'll I'M", "naïve cafe\u0301 ﬁ ①", "数字 123456 ٣٤", "",
         "<|end|> inside <tool>", "a" * 40, "\u00a0\u2028x\x00\x7f", "🙂👍🏽", " x", "x  ", "12 345 6789", "...!?;:"]


@functools.cache
def trained_bpe():
    """tokenizer.json of a byte-level BPE of 400 tokens with a special and two ordinary added tokens."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([Path(__file__).read_text()] + TEXTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=True)])
    return t.to_str()


def small_bpe(normalizer=None, pre=None):
    t = Tokenizer.from_str(trained_bpe())
    if normalizer:
        t.normalizer = normalizer
    if pre:
        t.pre_tokenizer = pre
    return t


def rebuilt(key):
    """A Hugging Face tokenizer from the metadata of a GGUF file alone."""
    tokens, types = key["tokenizer.ggml.tokens"], key["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] in (1, 3)}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in key["tokenizer.ggml.merges"]]))
    if key["mamba.tokenizer.normalizer"] == "nfc":
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t.add_special_tokens([token for i, token in enumerate(tokens) if types[i] == 3])
    t.add_tokens([AddedToken(token, normalized=False) for i, token in enumerate(tokens) if types[i] == 4])
    return t


def convert_with_tokenizer(tmp_path, convert, tokenizer, vocab=408, files=(), **config):
    folder = write_checkpoint(tmp_path / "tiny", random_weights(vocab=vocab), hf_config(vocab_size=vocab, **config))
    if tokenizer:
        tokenizer = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        (folder / "tokenizer.json").write_text(tokenizer)
    for name, content in dict(files).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return convert(folder, tmp_path / "m.bin")


@pytest.mark.parametrize("normalizer,name", [
    (None, "none"), (normalizers.NFC(), "nfc"), (normalizers.Sequence([normalizers.NFC()]), "nfc")])
def test_own_tokenizer(tmp_path, convert, normalizer, name):
    tokenizer = small_bpe(normalizer)
    n = tokenizer.get_vocab_size()
    assert n == 402
    status, err = convert_with_tokenizer(tmp_path, convert, tokenizer, files={
        "tokenizer_config.json": {"eos_token": {"content": "<|end|>"}, "unk_token": "<|end|>"}})
    assert status == 0 and "tokenizer.json" in err
    key = Result(tmp_path / "m.bin").key
    tokens, types = key["tokenizer.ggml.tokens"], key["tokenizer.ggml.token_type"]
    assert key["tokenizer.ggml.model"] == "gpt2" and key["tokenizer.ggml.pre"] == "gpt-2"
    assert key["mamba.tokenizer.normalizer"] == name
    assert key["tokenizer.ggml.eos_token_id"] == 0 and key["tokenizer.ggml.bos_token_id"] == 0     # config.json's 0 is special
    assert "tokenizer.ggml.unknown_token_id" not in key         # bytes cover every text: nothing turns into it
    assert key["tokenizer.ggml.add_bos_token"] is False
    assert len(tokens) == len(types) == 408 and tokens[402:] == [f"[PAD{i}]" for i in range(402, 408)]
    assert types[0] == 3 and types[400:402] == [4, 4] and types[402:] == [5] * 6 and set(types[1:400]) == {1}
    assert tokens[400:402] == ["<tool>", "    "]
    copy = rebuilt(key)
    for text in TEXTS:
        assert copy.encode(text).ids == tokenizer.encode(text).ids, text


def test_merges_as_pairs_and_strings(tmp_path, convert):
    spec = json.loads(small_bpe().to_str())
    pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    keys = []
    for merges in (pairs, [" ".join(p) for p in pairs]):
        spec["model"]["merges"] = merges
        assert convert_with_tokenizer(tmp_path, convert, json.dumps(spec))[0] == 0
        keys.append(Result(tmp_path / "m.bin").key)
    assert keys[0] == keys[1] and keys[0]["tokenizer.ggml.merges"] == [" ".join(p) for p in pairs]


def test_bos_from_template(tmp_path, convert):
    tokenizer = small_bpe()
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])])
    assert convert_with_tokenizer(tmp_path, convert, tokenizer, bos_token_id=None)[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.add_bos_token"] is True and key["tokenizer.ggml.bos_token_id"] == 0
    tokenizer.post_processor = processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 0)])
    (tmp_path / "m.bin").unlink()
    assert_failed(convert_with_tokenizer(tmp_path, convert, tokenizer), tmp_path / "m.bin", "post-processor", "--no-tokenizer")
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    spec = json.loads(tokenizer.to_str())
    for ids in ([0, 1], [], [402], [-1], ["x"], [False], [[0]]):
        spec["post_processor"]["special_tokens"]["<|end|>"]["ids"] = ids
        assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), tmp_path / "m.bin",
                      f"a post-processor that adds {ids}, not one id of the vocabulary, is not supported; --no-tokenizer")


def test_bos_from_options(tmp_path, convert):
    files = {"tokenizer_config.json": {"bos_token": "<|end|>", "add_bos_token": True}}
    assert convert_with_tokenizer(tmp_path, convert, small_bpe(), files=files)[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.add_bos_token"] is True and key["tokenizer.ggml.bos_token_id"] == 0


def test_ids_of_no_kind(tmp_path, convert):
    """A special token that is no text, or an id that is no number, names none: the other files are asked."""
    for nothing in ([], {}, ["<|end|>"]):
        files = {"tokenizer_config.json": {"bos_token": nothing, "eos_token": {"content": nothing}}}
        config = {"bos_token_id": 0, "eos_token_id": nothing}
        assert convert_with_tokenizer(tmp_path, convert, small_bpe(), files=files, **config)[0] == 0
        key = Result(tmp_path / "m.bin").key
        assert key["tokenizer.ggml.bos_token_id"] == 0 and "tokenizer.ggml.eos_token_id" not in key


def test_truncation_is_not_kept(tmp_path, convert):
    tokenizer = small_bpe()
    tokenizer.enable_truncation(3)
    status, err = convert_with_tokenizer(tmp_path, convert, tokenizer)
    assert status == 0 and "tokenizer.json: its truncation is not kept" in err and err.count("\n") == 2
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=9)
    status, err = convert_with_tokenizer(tmp_path, convert, tokenizer)
    assert status == 0 and "tokenizer.json: its padding is not kept" in err and err.count("\n") == 2


def falcon_pre_tokenizer(**split):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex(split.get("pattern", "[0-9][0-9][0-9]")), "isolated")])


def test_falcon_tokenizer(tmp_path, convert):
    assert convert_with_tokenizer(tmp_path, convert, small_bpe(pre=falcon_pre_tokenizer()))[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.pre"] == "falcon" and key["mamba.tokenizer.normalizer"] == "none"


def changed(**options):
    def change(spec):
        spec["model"].update(options)
    return change


def words(pre_tokenizer):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[": 2}, "unk_token": "["}
    return lambda s: s.update(model=model, added_tokens=[], pre_tokenizer=pre_tokenizer or s["pre_tokenizer"])


def merged(names_part):
    """An added token that a merge makes, or that is a part of one."""
    def change(spec):
        first = spec["model"]["merges"][0]
        left, right = first.split(" ") if isinstance(first, str) else first
        content = left if names_part else left + right
        spec["added_tokens"].append({"id": spec["model"]["vocab"][content], "content": content, "special": False})
    return change


def ideographs(spec):
    spec["model"]["vocab"].update({"中": 402, "中a": 403})
    spec["model"]["merges"].append(["中", "a"])


def fused(spec):
    """Unknown bytes side by side are one token; where every byte has a token, fuse_unk changes nothing."""
    spec["model"].update(unk_token="<|end|>", fuse_unk=True)
    del spec["model"]["vocab"]["ÿ"]


UNSUPPORTED_TOKENIZERS = {
    "falcon with other digits": (falcon_pre_tokenizer(pattern="[0-9]"), None, "pre-tokenizer Punctuation + ByteLevel"),
    "prefix space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, "add_prefix_space"),
    "whitespace": (pre_tokenizers.Whitespace(), None, "pre-tokenizer Whitespace"),
    "no regex": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None, "use_regex"),
    "lower case": (None, lambda s: s.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    "ignore_merges": (None, changed(ignore_merges=True), "ignore_merges = true"),
    "byte_fallback": (None, changed(byte_fallback=True), "byte_fallback = true"),
    "dropout": (None, changed(dropout=0.1), "dropout = 0.1"),
    "suffix": (None, changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "Unigram": (None, changed(type="Unigram"), "type Unigram"),
    "merges of characters": (None, lambda s: s.update(pre_tokenizer=None), "merges without a ByteLevel pre-tokenizer"),
    "stripping": (None, lambda s: s["added_tokens"][1].update(lstrip=True), "added token '<tool>' with lstrip"),
    "words of bytes": (None, words(None), "a WordLevel model with pre-tokenizer ByteLevel"),
    "the text as a word": (None, words({"type": "Sequence", "pretokenizers": []}), "a WordLevel model with pre-tokenizer None"),
    "added token of a merge": (None, merged(names_part=False), ", not two ordinary tokens that join to a third, is"),
    "added token in a merge": (None, merged(names_part=True), ", not two ordinary tokens that join to a third, is"),
    "merge outside of the alphabet": (None, ideographs, "merge '中 a', not two ordinary tokens that join to a third, is"),
    "fused unknown tokens": (None, fused, "fuse_unk"),
    "whole words": (None, lambda s: s["added_tokens"][2].update(single_word=True), "single_word"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_TOKENIZERS)
def test_unsupported_tokenizers(tmp_path, convert, name):
    pre, change, text = UNSUPPORTED_TOKENIZERS[name]
    spec = json.loads(small_bpe().to_str())
    if pre:
        spec["pre_tokenizer"] = json.loads(small_bpe(pre=pre).to_str())["pre_tokenizer"]
    if change:
        change(spec)
    out = tmp_path / "m.bin"
    assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, text, "--no-tokenizer")
    assert convert(tmp_path / "tiny", out, "--no-tokenizer")[0] == 0
    assert Result(out).key["tokenizer.ggml.model"] == "no_vocab"


def test_damaged_tokenizers(tmp_path, convert):
    out, good = tmp_path / "m.bin", small_bpe().to_str()
    assert_failed(convert_with_tokenizer(tmp_path, convert, good[:-1]), out, "tokenizer.json: not valid JSON")
    for key in ("added_tokens", "pre_tokenizer", "post_processor", "normalizer"):
        spec = {**json.loads(good), key: [17]}
        assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, "tokenizer.json: not a tokenizer")
    for vocab in ({}, {"a": 0, "b": 0}, {"a": -1}, {"a": True}, {"a": 2**60}, {"a": "b"}):
        spec = {**json.loads(good), "model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
        assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, "each with a small number of its own")
    spec = json.loads(good)
    spec["model"]["merges"][5] = ["x", "nowhere"]
    assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, "merge 'x nowhere'")
    spec = json.loads(good)
    spec["added_tokens"][1]["content"] = 5
    assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, "added token 400 has the content 5, expected a text")
    for half in ("\ud83d", "\udc4d"):
        spec["added_tokens"][1]["content"] = half
        assert_failed(convert_with_tokenizer(tmp_path, convert, json.dumps(spec)), out, "tokenizer.json: not valid JSON", "surrogates")
    assert_failed(convert_with_tokenizer(tmp_path, convert, good, vocab=400), out, "402 tokens, the embedding only 400 rows")
    assert_failed(convert_with_tokenizer(tmp_path, convert, good, files={"tokenizer_config.json": {"add_eos_token": True}}), out,
                  "add_eos_token in tokenizer_config.json")
    (tmp_path / "tiny" / "tokenizer.json").unlink()
    assert_failed(convert_with_tokenizer(tmp_path, convert, None, files={"tokenizer.model": "x"}), out, "tokenizer.model")


def test_vocab_and_merges_files(tmp_path, convert):
    tokenizer = small_bpe()
    spec = json.loads(tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    files = {"vocab.json": spec["model"]["vocab"], "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
             "added_tokens.json": {"<tool>": 400, "    ": 401}, "special_tokens_map.json": {"eos_token": "<|end|>"}}
    assert convert_with_tokenizer(tmp_path, convert, None, files=files)[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.eos_token_id"] == 0 and key["mamba.tokenizer.normalizer"] == "none"
    assert key["tokenizer.ggml.token_type"][:1] + key["tokenizer.ggml.token_type"][400:] == [3, 4, 4] + [5] * 6
    copy = rebuilt(key)
    for text in TEXTS:
        assert copy.encode(text).ids == tokenizer.encode(text).ids, text
    (tmp_path / "tiny" / "merges.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "m.bin").unlink()
    assert_failed(convert(tmp_path / "tiny", tmp_path / "m.bin"), tmp_path / "m.bin", "merges.txt")


def character_tokenizer(kind, vocab):
    if kind == "WordLevel":
        t = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        t.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    else:
        t = Tokenizer(models.BPE(vocab, [], unk_token="[UNK]"))
    t.add_special_tokens(["[UNK]", "[SEP]"])
    return t


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_character_vocabulary(tmp_path, convert, kind):
    vocab = {"A": 0, "C": 1, "G": 2, "T": 3, "é": 4, " ": 5, "[UNK]": 6, "[SEP]": 7}
    tokenizer = character_tokenizer(kind, vocab)
    assert tokenizer.encode("ACé?T").ids == [0, 1, 4, 6, 3]
    files = {"tokenizer_config.json": {"sep_token": "[SEP]"}}
    assert convert_with_tokenizer(tmp_path, convert, tokenizer, vocab=8, files=files)[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.tokens"] == ["A", "C", "G", "T", "Ã©", "Ġ", "[UNK]", "[SEP]"]     # é is bytes C3 A9
    assert key["tokenizer.ggml.token_type"] == [1] * 6 + [3] * 2 and key["tokenizer.ggml.merges"] == []
    assert key["tokenizer.ggml.unknown_token_id"] == 6 and key["tokenizer.ggml.pre"] == "gpt-2"
    # config.json's eos_token_id is transformers' default 0, which here is the letter A: it must not end a text.
    assert "tokenizer.ggml.eos_token_id" not in key and "tokenizer.ggml.bos_token_id" not in key
    (tmp_path / "m.bin").unlink()
    words = character_tokenizer(kind, {**vocab, "GATTACA": 8})
    assert_failed(convert_with_tokenizer(tmp_path, convert, words, vocab=9), tmp_path / "m.bin", "'GATTACA'")


def test_byte_vocabulary(tmp_path, convert):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert convert_with_tokenizer(tmp_path, convert, tokenizer, vocab=256)[0] == 0
    key = Result(tmp_path / "m.bin").key
    assert key["tokenizer.ggml.tokens"] == alphabet and key["tokenizer.ggml.merges"] == []


# ---------------------------------------------------------------- tokenizer.bin


@pytest.fixture(scope="module")
def neox():
    """Metadata of the shipped tokenizer.bin. gguf.GGUFReader would need ten seconds and more for its 100,000 strings."""
    return convert_weights.read_gguf_keys(ROOT / "tokenizer.bin")


def test_tokenizer_bin(neox):
    tokens, types = neox["tokenizer.ggml.tokens"], neox["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 50277 and len(neox["tokenizer.ggml.merges"]) == 50009
    assert tokens[:2] == ["<|endoftext|>", "<|padding|>"] and types[:2] == [3, 3] and set(types[2:50254]) == {1}
    assert tokens[50254:] == [" " * n for n in range(24, 1, -1)] and types[50254:] == [4] * 23
    assert neox["tokenizer.ggml.pre"] == "gpt-2" and neox["mamba.tokenizer.normalizer"] == "nfc"
    assert neox["tokenizer.ggml.bos_token_id"] == neox["tokenizer.ggml.eos_token_id"] == 0
    assert neox["tokenizer.ggml.add_bos_token"] is False


def test_tokenizer_bin_ids(neox):
    """Ids that GPT-NeoX-20B's tokenizer is known to give, from a Hugging Face tokenizer built of this file."""
    t = rebuilt(neox)
    assert t.encode("Hello world").ids == [12092, 1533]
    assert t.encode("Hello, my dog is cute").ids == [12092, 13, 619, 4370, 310, 20295]
    assert t.encode("a" + " " * 24 + "b").ids == [66, 50254, 67]
    assert t.encode("cafe\u0301").ids == t.encode("café").ids
    assert t.encode("<|endoftext|>").ids == [0]
    text = "def f(x):\n    return  x\t\r\n" + " " * 53 + "数字🙂 naïve\u00a0…"
    assert t.decode(t.encode(text).ids) == text or t.decoder is None    # no decoder is set: the ids are what is compared
    joined = "".join(t.id_to_token(i) if i >= 50254 else bytes(INVERSE[c] for c in t.id_to_token(i)).decode("latin-1")
                     for i in t.encode(text).ids)
    assert joined.encode("latin-1").decode() == text


INVERSE = {character: byte for byte, character in convert_weights.BYTE_ALPHABET.items()}


def test_byte_alphabet():
    assert sorted(INVERSE) == sorted(pre_tokenizers.ByteLevel.alphabet()) and len(INVERSE) == 256
    for text in ("é", " ", "\n", "中", "\x7f", "\u00ad"):
        [(piece, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert piece == "".join(convert_weights.BYTE_ALPHABET[b] for b in text.encode())


def test_tokenizer_only(tmp_path, convert):
    assert convert("--tokenizer-only", ROOT / "tokenizer.bin", tmp_path / "t.bin")[0] == 0
    assert (tmp_path / "t.bin").read_bytes() == (ROOT / "tokenizer.bin").read_bytes()
    (tmp_path / "tiny").mkdir()
    assert_failed(convert("--tokenizer-only", tmp_path / "tiny", tmp_path / "u.bin"), tmp_path / "u.bin", "no tokenizer.json")
    small_bpe().save(str(tmp_path / "tiny" / "tokenizer.json"))
    assert convert("--tokenizer-only", tmp_path / "tiny", tmp_path / "u.bin")[0] == 0
    result = Result(tmp_path / "u.bin")
    assert len(result.key["tokenizer.ggml.tokens"]) == 402 and result.tensors == {}
    # the round trip through a model file drops its [PADn]
    assert convert_with_tokenizer(tmp_path, convert, None)[0] == 0
    assert convert("--tokenizer-only", tmp_path / "m.bin", tmp_path / "v.bin")[0] == 0
    again = Result(tmp_path / "v.bin").key
    assert {k: v for k, v in again.items() if k.startswith("tokenizer.ggml.token")} == {
        k: v for k, v in result.key.items() if k.startswith("tokenizer.ggml.token")}


def test_tokenizer_only_broken_gguf(tmp_path, convert):
    out, data = tmp_path / "t.bin", (ROOT / "tokenizer.bin").read_bytes()
    huge = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60)
    for broken in (b"", b"GGUF", b"GGML" + data[4:], data[:200], data[:100_000], huge, b"\xff" * 500):
        (tmp_path / "broken.gguf").write_bytes(broken)
        assert_failed(convert("--tokenizer-only", tmp_path / "broken.gguf", out), out, "broken.gguf: not a readable GGUF file")
    folder = write_checkpoint(tmp_path / "tiny", random_weights(), hf_config())
    assert convert(folder, tmp_path / "m.bin")[0] == 0
    assert_failed(convert("--tokenizer-only", tmp_path / "m.bin", out), out, "tokenizer.ggml.model is 'no_vocab', expected 'gpt2'")


@pytest.mark.parametrize("vocab,fits", [(50280, True), (50340, True), (50341, False), (50276, False)])
def test_shared_tokenizer(tmp_path, convert, neox, vocab, fits):
    """A checkpoint without a tokenizer gets tokenizer.bin when its vocabulary has that size."""
    folder = write_checkpoint(tmp_path / "tiny", random_weights(vocab=vocab), hf_config(vocab_size=vocab))
    assert convert(folder, tmp_path / "m.bin", "--type", "q8_0")[0] == 0
    key = convert_weights.read_gguf_keys(tmp_path / "m.bin")
    assert key["mamba.vocab_size"] == vocab and key["tokenizer.ggml.model"] == ("gpt2" if fits else "no_vocab")
    if fits:
        assert key["tokenizer.ggml.tokens"] == neox["tokenizer.ggml.tokens"] + [f"[PAD{i}]" for i in range(50277, vocab)]
        assert key["tokenizer.ggml.token_type"] == neox["tokenizer.ggml.token_type"] + [5] * (vocab - 50277)


# ---------------------------------------------------------------- a Hugging Face id, against a server on this machine


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hugging Face hub as downloading one public repository takes."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.requests = files, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append(self.path)
        path, files = self.path.split("?")[0], self.server.files
        if re.fullmatch(r"/api/models/owner/tiny(/revision/[^/]+)?", path):
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": self.server.commit, "private": False, "tags": [],
                    "siblings": [{"rfilename": name} for name in files]}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif re.fullmatch(r"/api/models/owner/tiny/tree/[^/]+", path):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
                    for i, (name, data) in enumerate(files.items())]
            self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif (m := re.fullmatch(r"/owner/tiny/resolve/[^/]+/(.+)", path)) and m[1] in files:
            self.reply(200, files[m[1]], ETag=f'"{sorted(files).index(m[1]):040x}"', X_Repo_Commit=self.server.commit)
        else:
            self.reply(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """hub(files, *arguments) -> (process, requests that the server saw)"""
    def run(files, *args):
        server = Hub(files)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
        env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_ETAG_TIMEOUT": "5"}
        try:
            done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, env=env,
                                  cwd=tmp_path, timeout=120)
        finally:
            server.shutdown()
            server.server_close()
        return done, server.requests
    return run


def repository(tmp_path, weights, **config):
    folder = write_checkpoint(tmp_path / "source", weights, hf_config(**config))
    small_bpe().save(str(folder / "tokenizer.json"))
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return {**files, "pytorch_model.bin": b"never read", "README.md": b"# tiny", "onnx/model.safetensors": b"never read",
            "flax_model.msgpack": b"never read"}


def test_hub(tmp_path, hub):
    """Downloads configuration, tokenizer and safetensors; not pytorch_model.bin, nor what else a repository holds."""
    weights = random_weights(vocab=408)
    done, requests = hub(repository(tmp_path, weights, vocab_size=408), "owner/tiny", tmp_path / "m.bin", "--type", "f32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "tokenizer.json" in done.stderr
    assert_converted(tmp_path / "m.bin", weights, {"general.name": "tiny", "mamba.vocab_size": 408})
    fetched = {r.split("?")[0].split("/", 5)[5] for r in requests if "/resolve/" in r}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}


def test_hub_sharded(tmp_path, hub):
    weights = random_weights(vocab=408)
    files = repository(tmp_path, weights, vocab_size=408)
    half = sorted(weights)[:7]
    save_file({n: v for n, v in weights.items() if n in half}, tmp_path / "a")
    save_file({n: v for n, v in weights.items() if n not in half}, tmp_path / "b")
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    files[shards[0]], files[shards[1]] = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {n: shards[n not in half] for n in weights}}).encode()
    del files["model.safetensors"]
    done, _ = hub(files, "owner/tiny", tmp_path / "m.bin", "--type", "f32", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert_converted(tmp_path / "m.bin", weights)


def test_hub_mistakes(tmp_path, hub, convert):
    out = tmp_path / "m.bin"
    for repo, text in (("owner/none", "owner/none: no such folder, and cannot be fetched from the Hugging Face hub"),
                       ("owner/tiny", "no Mamba checkpoint in this repository, it has README.md")):
        done, _ = hub({"README.md": b"# nothing else"}, repo, out)
        assert_failed((done.returncode, done.stderr), out, text)
    assert_failed(convert("owner/tiny/x", out), out, "no such folder, and not a Hugging Face id")
