#!/usr/bin/env python3
"""Writes tests/fuzz/seeds: small inputs that each parser accepts, for a fuzzer to start from.

    tests/fuzz/make_seeds.py        needs what the tests need
"""
import pathlib
import struct
import sys
import tempfile

import gguf
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sounds  # noqa: E402

SEEDS = pathlib.Path(__file__).resolve().parent / "seeds"


def tensor(writer, name, data, kind):
    if kind is None:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def model(path, kind, classes=(), falcon=False, layers=1):
    """A model of one kind of weights that is as small as blocks of 32 allow (d_state 2, dt_rank 3)."""
    d, inner, state, conv, rank, vocab = (32, 64, 2, 4, 3, 9) if kind != gguf.GGMLQuantizationType.Q4_K else (256, 256, 2, 4, 3, 2)
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "mamba")
    for name, value in (("block_count", layers), ("embedding_length", d), ("ssm.inner_size", inner), ("ssm.state_size", state),
                        ("ssm.conv_kernel", conv), ("ssm.time_step_rank", rank)):
        writer.add_uint32(f"mamba.{name}", value)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    if falcon:
        writer.add_bool("mamba.ssm.dt_b_c_rms", True)
    if classes:
        writer.add_array("mamba.classifier.output_labels", list(classes))
        writer.add_tensor("cls.output.weight", random.standard_normal((len(classes), d), dtype=np.float32))

    def normal(*shape):
        return random.standard_normal(shape, dtype=np.float32) * 0.1

    tensor(writer, "token_embd.weight", normal(vocab, d), kind)
    writer.add_tensor("output_norm.weight", normal(d) + 1)
    for i in range(layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", normal(d) + 1)
        tensor(writer, f"blk.{i}.ssm_in.weight", normal(2 * inner, d), kind)
        writer.add_tensor(f"blk.{i}.ssm_conv1d.weight", normal(inner, conv))
        writer.add_tensor(f"blk.{i}.ssm_conv1d.bias", normal(inner))
        tensor(writer, f"blk.{i}.ssm_x.weight", normal(rank + 2 * state, inner), kind)
        writer.add_tensor(f"blk.{i}.ssm_dt.weight", normal(inner, rank))
        writer.add_tensor(f"blk.{i}.ssm_dt.bias", normal(inner))
        writer.add_tensor(f"blk.{i}.ssm_a", -np.abs(normal(inner, state)))
        writer.add_tensor(f"blk.{i}.ssm_d", normal(inner))
        tensor(writer, f"blk.{i}.ssm_out.weight", normal(d, inner), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(path):
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "mpt")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "\u0120", "\u0120ab", "<|end|>", "   "])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 1, 1, 3, 4])
    writer.add_array("tokenizer.ggml.merges", ["a b", "\u0120 ab"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def state(path, pending, recent):
    """As section 7 of mamba.c lays it out, for the model of fuzz_state; the target puts the checksum right."""
    layers, inner, n, conv, size = 2, 5, 3, 4, 96
    floats = layers * inner * (conv - 1 + n)
    size += 4 * (len(recent) + floats) + 8
    header = struct.pack("<8sIIQIIIIQIIIi8sddQ", b"MAMBAST\0", 2, 96, 7, layers, inner, n, conv, 12, len(pending), len(recent), 2,
                         (pending or [0])[0], b"\xe2\x82", -1, 2, size)
    path.write_bytes(header + struct.pack(f"<{len(recent)}i", *recent) + bytes(4 * floats + 8))


def main():
    for folder in ("gguf", "tokenizer", "state", "jsonl", "fasta", "bed", "vcf", "wav"):
        (SEEDS / folder).mkdir(parents=True, exist_ok=True)
    kinds = gguf.GGMLQuantizationType
    model(SEEDS / "gguf/f32", None)
    model(SEEDS / "gguf/q8_0", kinds.Q8_0, falcon=True, layers=2)
    model(SEEDS / "gguf/q4_0", kinds.Q4_0, classes=("cat", "dog"))
    vocabulary(SEEDS / "gguf/vocabulary")
    with tempfile.TemporaryDirectory() as folder:
        for name, hold in (("unet_zoh", "zoh"), ("unet_delta", "delta_b")):
            c = sounds.config(d_model=2, n_blocks=1, pool=[2], d_state=2, discretization=hold,
                              stages=[["s4", "complex"], ["s6", "complex"], ["s6" if hold == "zoh" else "s4", "real"]])
            checkpoint = sounds.write_checkpoint(pathlib.Path(folder) / name, c, sounds.random_weights(c))
            sounds.convert(checkpoint, SEEDS / "gguf" / name)
    texts = ["Hello world", "  I'll say 123 things\n\n\tto  you", "caf\u00e9 cafe\u0301 \ud55c\uae00 \U0001f600", "<|endoftext|> <|padding|>", "ACGTNacgtn"]
    for i, text in enumerate(texts):
        (SEEDS / f"tokenizer/text{i}").write_bytes(bytes([i + 128 * (i == 3)]) + text.encode())
    (SEEDS / "tokenizer/broken").write_bytes(b"\1\xff\xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 \xc0\x80")
    state(SEEDS / "state/plain", [3], [1, 2, 3])
    state(SEEDS / "state/empty", [], [])
    lines = ['{"id": "a", "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0.5, "seed": 18446744073709551615}',
             '{"id": 7, "ids": [1, 2, 299], "stop": ["a", "\\n\\n"], "echo": true, "logprobs": 2, "top_k": 3, "top_p": 1e-1, "min_p": 0}',
             '{"prompt": "\\u00e9 \\ud83d\\ude00 \\ud83d \\"\\\\\\/\\b\\f\\n\\r\\t", "metadata": {"a": [1, {"b": null}, "c", -0.5E+3]}}',
             ' { "prompt" : "" , "stop" : "." , "user" : "me" , "seed" : null } ']
    for i, line in enumerate(lines):
        (SEEDS / f"jsonl/line{i}").write_text(line)
    records = [">one more words\nACGTNacgtn\nRYSW\n>two\n\n>three\nA", ">x\r\nAC GT\r\n\r\n>\r\nTT\r\n", ";old\n;comment\n\n>y\nACXGT\n>z\n>w\nAA\n"]
    for i, text in enumerate(records):
        (SEEDS / f"fasta/records{i}").write_bytes(text.encode())
    regular = [">a b\nACGT\nACGT\nAC\n>c\nAC\n", ">a\r\nACG\r\nTTA\r\nA\r\n>b\r\nA", ">a\nACGTACGTACGTACGT\n>b\n>c\nA\nC\nG"]
    for i, text in enumerate(regular):
        (SEEDS / f"fasta/regular{i}").write_bytes(text.encode())
    for i, line in enumerate(["chr1\t0\t100\tname\t0\t-", "chr1 5 9223372036854775807", "track name=x", "chr1\t5"]):
        (SEEDS / f"bed/line{i}").write_text(line)
    variants = ["chr1\t100\t.\tA\tC,<DEL>,GT\t50\tPASS\tDP=3;MAMBA_LLR=1,.,2;SOMATIC;MAMBA_ERROR=X\tGT\t0/1", "1\t0\trs1\tAC\t.\t.\t.\t.",
                "##INFO=<ID=MAMBA_LLR,Number=A>", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for i, line in enumerate(variants):
        (SEEDS / f"vcf/line{i}").write_text(line)
    x = np.array([0, 0.5, -0.5, 0.25])
    clips = [sounds.wav(sounds.pcm(x)), sounds.wav(bytes(6), bits=24, channels=2), sounds.wav(x.astype("<f4").tobytes(), coding=3, bits=32),
             sounds.wav(bytes(3), coding=7, bits=8, before=sounds.chunk(b"LIST", b"a")), sounds.wav(x.astype("<f8").tobytes(), coding=3, bits=64, extensible=True),
             sounds.wav(sounds.pcm(x), size=0xFFFFFFFF)]
    for i, clip in enumerate(clips):
        (SEEDS / f"wav/clip{i}").write_bytes(clip)


if __name__ == "__main__":
    main()
