"""Mamba in numpy, float64, one token after the other: a second definition beside transformers', for the tests that run without torch.

Reads our model files through the gguf package, so that every weight is what the file's type makes of it. Written from the paper
(arXiv 2312.00752, algorithm 2 and section 3.4) and independent of mamba.c: no shared order of summation, no shared approximations.
"""
import gguf
import numpy as np


def load(path):
    """(metadata {key: value}, tensors {name: (float64 array, type name)}) of a GGUF file."""
    reader = gguf.GGUFReader(str(path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        tensors[t.name] = (values.reshape([int(n) for n in reversed(t.shape)]), t.tensor_type.name)
    return metadata, tensors


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rms_norm(x, epsilon, weight=1.0):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def silu(x):
    return x / (1.0 + np.exp(-x))


def quantise_rows(x):
    """x with each block of 32 rounded to 8 bits: what a product with quantised weights does to its activations. [rows, columns]"""
    blocks = x.reshape(x.shape[0], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127.0
    return (np.round(blocks / np.where(scale > 0, scale, 1.0)) * scale).reshape(x.shape)


class Mamba:
    def __init__(self, path):
        self.metadata, self.tensors = load(path)
        key = lambda name: self.metadata["mamba." + name]
        self.n_layer = key("block_count")
        self.d_inner, self.d_state, self.d_conv = key("ssm.inner_size"), key("ssm.state_size"), key("ssm.conv_kernel")
        self.dt_rank = key("ssm.time_step_rank")
        self.epsilon = key("attention.layer_norm_rms_epsilon")
        self.normalised = self.metadata.get("mamba.ssm.dt_b_c_rms", False)  # FalconMamba
        self.inner_epsilon = self.metadata.get("mamba.ssm.dt_b_c_rms_epsilon", 1e-6)

    def get(self, name):
        return self.tensors[name][0]

    def product(self, x, name):
        """x [tokens, columns] times the matrix [rows, columns], transposed. [tokens, rows]"""
        weight, kind = self.tensors[name]
        return (quantise_rows(x) if kind.startswith("Q") else x) @ weight.T

    def block(self, x, layer):
        """One Mamba block with its norm, without the residual. x [tokens, d_model] to [tokens, d_model]"""
        get, product = lambda s: self.get(f"blk.{layer}.{s}"), lambda a, s: self.product(a, f"blk.{layer}.{s}")
        xz = product(rms_norm(x, self.epsilon, get("attn_norm.weight")), "ssm_in.weight")
        u, z = xz[:, :self.d_inner], xz[:, self.d_inner:]

        # Causal convolution of each channel over time: d_conv - 1 zeros stand before the first token.
        history = np.concatenate([np.zeros((self.d_conv - 1, self.d_inner)), u])
        kernel = get("ssm_conv1d.weight")  # [d_inner, d_conv]
        u = silu(sum(history[k:k + len(x)] * kernel[:, k] for k in range(self.d_conv)) + get("ssm_conv1d.bias"))

        dt, B, C = np.split(product(u, "ssm_x.weight"), [self.dt_rank, self.dt_rank + self.d_state], axis=1)
        if self.normalised:
            dt, B, C = (rms_norm(part, self.inner_epsilon) for part in (dt, B, C))
        dt = np.logaddexp(0.0, product(dt, "ssm_dt.weight") + get("ssm_dt.bias"))  # softplus [tokens, d_inner]

        # h' = exp(dt A) h + dt B u, y = C h (equations 2a and 2b with the discretisation of section 3.6)
        A, state, y = get("ssm_a"), np.zeros((self.d_inner, self.d_state)), np.empty_like(u)
        for t in range(len(x)):
            state = np.exp(dt[t, :, None] * A) * state + (dt[t] * u[t])[:, None] * B[t]
            y[t] = state @ C[t]
        return product((y + get("ssm_d") * u) * silu(z), "ssm_out.weight")

    def forward(self, ids):
        """(hidden, logits): hidden[N] is the residual stream after N blocks, hidden[-1] what the final norm makes of the last."""
        hidden = [self.get("token_embd.weight")[np.asarray(ids)]]
        for layer in range(self.n_layer):
            hidden.append(hidden[-1] + self.block(hidden[-1], layer))
        hidden.append(rms_norm(hidden[-1], self.epsilon, self.get("output_norm.weight")))
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return hidden, self.product(hidden[-1], head)
