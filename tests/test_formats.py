"""Every format of weights: what a block means, against the gguf package, and products with it, against numpy in float64.

The bits of the products are compared between instruction sets by unit.c."""
import gguf
import numpy as np
import pytest

import reference

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
D, N_VOCAB = 256, 101  # 256: the longest block, and d_inner as well
# Offsets of a block's half floats (scale, minimum): the only bytes that may not be anything.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def random_rows(rng, name, rows, cols, size):
    """Random bytes of a type, as the array that GGUFWriter takes; elements of about `size`."""
    kind = gguf.GGMLQuantizationType[name]
    if name not in HALVES:
        return gguf.quants.quantize(rng.normal(size=(rows, cols)).astype(np.float32) * size, kind)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, cols // block, n_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        data[:, :, at:at + 2] = np.frombuffer(rng.uniform(0.5, 1, rows * cols // block).astype(np.float16).tobytes(),
                                              np.uint8).reshape(rows, cols // block, 2)
    plain = gguf.quants.dequantize(data.reshape(rows, -1), kind)
    for at in HALVES[name]:  # once more, smaller
        halves = data[:, :, at:at + 2].copy().view(np.float16) * np.float16(size / plain.std())
        data[:, :, at:at + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def write_model(path, name, seed=1):
    """One block whose four large matrices and embedding have the format."""
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[name]
    w = gguf.GGUFWriter(str(path), "mamba")
    for key, value in (("block_count", 1), ("embedding_length", D), ("ssm.inner_size", D), ("ssm.state_size", 16),
                       ("ssm.conv_kernel", 4), ("ssm.time_step_rank", 9), ("context_length", 1024)):
        w.add_uint32("mamba." + key, value)
    w.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    for tensor, rows in (("token_embd", N_VOCAB), ("blk.0.ssm_in", 2 * D), ("blk.0.ssm_x", 9 + 32), ("blk.0.ssm_out", D)):
        w.add_tensor(tensor + ".weight", random_rows(rng, name, rows, D, 0.15), raw_dtype=kind)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    for tensor, values in (("output_norm.weight", 1 + 0.1 * normal(D)), ("blk.0.attn_norm.weight", 1 + 0.1 * normal(D)),
                           ("blk.0.ssm_conv1d.weight", 0.5 * normal(D, 4)), ("blk.0.ssm_conv1d.bias", 0.1 * normal(D)),
                           ("blk.0.ssm_dt.weight", 0.3 * normal(D, 9)), ("blk.0.ssm_dt.bias", normal(D) - 3),
                           ("blk.0.ssm_a", -np.exp(normal(D, 16))), ("blk.0.ssm_d", normal(D))):
        w.add_tensor(tensor, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_elements(mamba, tmp_path, name):
    """embed --layer 0 gives rows of the embedding: the same floats as gguf-py's."""
    path = write_model(tmp_path / "m.gguf", name)
    ids = [*range(N_VOCAB), 0, 5, 5]
    out = tmp_path / "rows.npy"
    mamba("embed", path, "--ids", " ".join(map(str, ids)), "--layer", "0", "--pool", "none", "-o", out)
    tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == "token_embd.weight")
    assert np.array_equal(np.load(out), gguf.quants.dequantize(tensor.data, tensor.tensor_type)[ids])


@pytest.mark.parametrize("name", FORMATS)
def test_products(mamba, tmp_path, name):
    """Logits of one token, against products in float64 that round activations in the same places. (Later tokens amplify a
    rounding that falls to the other side of a half; test_model.py bounds that.)"""
    path = write_model(tmp_path / "m.gguf", name)
    model = reference.Mamba(path)
    for token in (0, 7, N_VOCAB - 1):
        out = tmp_path / "logits.npy"
        mamba("score", path, "--ids", str(token), "--logits", out)
        _, wanted = model.forward([token])
        assert wanted.std() > 0.5
        assert np.sqrt(((np.load(out) - wanted) ** 2).mean()) <= 0.01 * wanted.std()
