#!/usr/bin/env python3
"""The ablation of the paper's audio models (E.4, figure 10) at small scale: U-Nets that differ in the blocks of their stages, each
trained on as many samples.

    ablation.py --data FOLDER --out FOLDER [--steps 400] [options of `train.py audio`]

Trains the variants one after the other into OUT/VARIANT, goes on where it was stopped, and skips what is finished. Then prints
a table and draws held-out bits per sample against the samples read in training, to models/ablation.svg."""
import argparse
import json
import pathlib
import subprocess
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
# Blocks of the five stages in order of flow; the outer ones are the first and the last, which see every sample, and their
# neighbours, which see every p-th.
VARIANTS = {
    "S6, real": "s6.real", "S6, complex": "s6.complex", "S4, real": "s4.real", "S4, complex": "s4.complex",
    "outer S4, inner S6, real": "s4.real,s4.real,s6.real,s4.real,s4.real",
    "outer S4, inner S6, complex": "s4.complex,s4.complex,s6.complex,s4.complex,s4.complex"}


def folder(o, name):
    return o.out / name.lower().replace(", ", "-").replace(" ", "-")


def train(o, name, options):
    out = folder(o, name)
    if (out / "report.json").exists():
        return
    resume = ["--resume"] if (out / "last.pt").exists() else []
    subprocess.run([sys.executable, HERE / "train.py", "audio", "--data", o.data, "--out", out, "--stages", VARIANTS[name],
                    "--steps", str(o.steps), *options, *resume], check=True)


def report_of(o, name):
    return json.loads((folder(o, name) / "report.json").read_text())


def row(o, name):
    """One line of the table: parameters, held-out bits."""
    report = report_of(o, name)
    return f"| {name} | {report['parameters']:,} | {report['valid']['bits']:.3f} | {report['test']['bits']:.3f} |"


def draw(o, path):
    figure, axes = plt.subplots(figsize=(7, 4))
    for i, name in enumerate(VARIANTS):
        options = report_of(o, name)["options"]
        a_step = options["batch"] * options["length"]
        log = [json.loads(line) for line in (folder(o, name) / "log.jsonl").read_text().splitlines()]
        axes.plot([entry["step"] * a_step / 1e6 for entry in log], [min(scores["bits"] for scores in entry["valid"].values()) for entry in log],
                  color=f"C{i // 2}", linestyle="-" if i % 2 else "--", marker="o", markersize=3, label=name)
    axes.set(xlabel="samples read in training, millions", ylabel="bits per held-out sample", title="Spoken digits, 8 kHz")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plot", type=pathlib.Path, default=HERE / "ablation.svg")
    o, options = parser.parse_known_args()
    for name in VARIANTS:
        train(o, name, options)
    print("| blocks | parameters | valid | test |\n| --- | ---: | ---: | ---: |")
    print("\n".join(row(o, name) for name in VARIANTS))
    draw(o, o.plot)


if __name__ == "__main__":
    main()
