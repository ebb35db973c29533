#!/usr/bin/env python3
"""This program and llama.cpp on the same files, in turn, in one run: tokens per second and their ratios.

    compare_llama.py [--shape 130m] [--types f32,f16,q8_0,Q4_0,Q4_K_M] [--rounds 3] [--threads 2] [--prompt 512] [--gen 64] [--json FILE]

llama.cpp is built from the PyPI source package of llama-cpp-python for this processor (tests/build_llama.py; the first time takes
minutes). Model files have random weights and stay in the cache folder. Each round runs one program and then the other, so that a
machine whose speed drifts slows both; what is printed are medians over the rounds, and the medians of the rounds' ratios. With
--json FILE all rows of both programs are kept."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
import build_llama  # noqa: E402
import random_model  # noqa: E402

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types that convert_weights.py writes; the others come from llama-quantize


def model_file(shape, kind, layers):
    """The file of a shape and type, made when it is not there."""
    folder = build_llama.cache_dir().parent / "models"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{shape}{f'-{layers}-layers' if layers else ''}"
    path = folder / f"mamba-{name}.{kind}.bin"
    if not path.exists():
        if kind in CONVERTED:
            random_model.make(shape, path, kind, layers)
        else:
            source = model_file(shape, "f16", layers)
            partial = path.with_suffix(".partial")
            subprocess.run([build_llama.cache_dir() / "build" / "bin" / "llama-quantize", source, partial, kind], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            os.replace(partial, path)
    return path


def rows(out, path):
    """{(n_prompt, n_gen): row} of either program's output, which names the file without its folder."""
    return {(row["n_prompt"], row["n_gen"]): row | {"model_filename": path.name} for row in json.loads(out)}


def ours(path, o):
    out = subprocess.run([ROOT / "mamba", "bench", path, "-p", str(o.prompt), "-n", str(o.gen), "-t", str(o.threads), "-r", "1",
                          "-o", "json", "-q"], check=True, stdout=subprocess.PIPE).stdout
    return rows(out, path)


def theirs(path, o):
    out = subprocess.run([build_llama.cache_dir() / "build" / "bin" / "llama-bench", "-m", path, "-p", str(o.prompt), "-n", str(o.gen),
                          "-t", str(o.threads), "-r", "1", "-o", "json"], check=True, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL).stdout
    return rows(out, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=random_model.SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--types", default="f32,f16,q8_0,Q4_0,Q4_K_M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--json", type=pathlib.Path)
    o = parser.parse_args()
    try:
        build_llama.ensure(tools=True)
    except build_llama.Unavailable as reason:
        sys.exit(f"compare_llama.py: {reason}")
    prompt, gen = (o.prompt, 0), (0, o.gen)
    all_rounds = {}
    for kind in o.types.split(","):
        path = model_file(o.shape, kind, o.layers)
        rounds = [(ours(path, o), theirs(path, o)) for _ in range(o.rounds)]
        all_rounds[kind] = [{"mamba": list(a.values()), "llama.cpp": list(b.values())} for a, b in rounds]
        median = lambda of: statistics.median(of(*pair) for pair in rounds)
        speed = lambda which, test: median(lambda *pair: pair[which][test]["avg_ts"])
        ratio = lambda test: median(lambda a, b: a[test]["avg_ts"] / b[test]["avg_ts"])
        if len(all_rounds) == 1:
            row = rounds[0][0][prompt]
            print(f"{row['cpu_info']}, {row['isa']}, {o.threads} threads, shape {o.shape}, medians of {o.rounds} rounds\n")
            print(f"| file | prompt {o.prompt}: here | llama.cpp | ratio | decode: here | llama.cpp | ratio | weights read, of GB/s |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        print(f"| {kind} ({path.stat().st_size / 1e6:.0f} MB) | {speed(0, prompt):.0f} | {speed(1, prompt):.0f} | {ratio(prompt):.2f} | "
              f"{speed(0, gen):.1f} | {speed(1, gen):.1f} | {ratio(gen):.2f} | "
              f"{median(lambda a, _: a[gen]['weight_gb_per_s']):.1f} of {median(lambda a, _: a[gen]['read_gb_per_s']):.1f} |", flush=True)
    if o.json:
        o.json.write_text(json.dumps(all_rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
