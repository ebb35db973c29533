#!/usr/bin/env python3
"""Measures decoding on this machine and draws it: bytes of weights read per second against what memory gives, for each format,
and tokens per second against the number of sequences.

    plots.py [--shape 130m] [--types f32,f16,q8_0,Q4_0,Q4_K_M] [--threads 2]

Writes results/decode.json (rows of `mamba bench -o json`), results/bandwidth.svg and results/batch.svg beside this file.
Model files are those of compare_llama.py."""
import argparse
import json
import os
import pathlib
import subprocess

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from compare_llama import ROOT, build_llama, model_file  # noqa: E402
import random_model  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
BATCHES = "1,2,4,8,16,32,64,128"


def measure(o):
    """{type: rows}: one sequence with three repeats, then each batch once."""
    rows = {}
    for kind in o.types.split(","):
        path = model_file(o.shape, kind, None)
        bench = lambda *options: json.loads(subprocess.run(
            [ROOT / "mamba", "bench", path, "-p", "0", "-t", str(o.threads), "-o", "json", *options], check=True,
            stdout=subprocess.PIPE).stdout)
        rows[kind] = bench("-n", "64") + bench("-n", "16", "-np", BATCHES, "-r", "1")
        for row in rows[kind]:
            row["model_filename"] = path.name
    return rows


def title(rows, o):
    row = next(iter(rows.values()))[0]
    return f"Mamba {o.shape}, random weights, {row['cpu_info']} ({row['isa']}), {o.threads} threads"


def draw_bandwidth(rows, o):
    figure, axes = plt.subplots(figsize=(7, 3.6))
    kinds = list(rows)
    read = [rows[k][0]["weight_gb_per_s"] for k in kinds]
    bars = axes.bar(kinds, read, color="tab:blue", width=0.6)
    axes.bar_label(bars, [f"{rows[k][0]['avg_ts']:.0f} tokens/s" for k in kinds], fontsize=8)
    limit = max(row[0]["read_gb_per_s"] for row in rows.values())
    axes.axhline(limit, color="black", linewidth=1)
    axes.text(len(kinds) - 0.6, limit, f"memory: {limit:.0f} GB/s", ha="right", va="bottom", fontsize=8)
    axes.set(ylabel="weights and state read, GB/s", title=title(rows, o), ylim=(0, 1.2 * max(limit, *read)))
    axes.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(RESULTS / "bandwidth.svg")


def draw_batches(rows, o):
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for kind, of_kind in rows.items():
        axes.plot([r["n_parallel"] for r in of_kind[1:]], [r["avg_ts"] for r in of_kind[1:]], marker="o", markersize=3, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(b) for b in BATCHES.split(",")], BATCHES.split(","))
    axes.set(xlabel="sequences decoded together", ylabel="tokens/s, all together", title=title(rows, o), ylim=(0, None))
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "batch.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=random_model.SHAPES)
    parser.add_argument("--types", default="f32,f16,q8_0,Q4_0,Q4_K_M")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    o = parser.parse_args()
    if any(kind not in ("f32", "f16", "bf16", "q8_0") for kind in o.types.split(",")):
        build_llama.ensure(tools=True)
    rows = measure(o)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw_bandwidth(rows, o)
    draw_batches(rows, o)


if __name__ == "__main__":
    main()
