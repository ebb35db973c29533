#!/usr/bin/env python3
"""Section E.5 of the Mamba paper (arXiv 2312.00752), redone on this machine with the comparators it used.

    paper.py [--minutes 20] [--full] [--short] [--threads 2]

(a) The scan alone, D = 1024, N = 16, one sequence of 2^9 to 2^19 tokens: `mamba bench --op scan` against an FFT convolution and causal
    attention in PyTorch. Attention ends where it takes over a minute.
(b) End to end: prompt 2048, generate 128, 1 to 128 sequences: Mamba 130M and 1.4B against GPT-3-style models of 125M and 1.3B in
    transformers, all with random float32 weights, as far as --minutes reach (--full: all of it).
(c) Peak memory of (b), and against the length of a prompt.

Writes results/paper.json, paper_scan.svg, paper_throughput.svg and paper_memory.svg beside this file, and prints tables. --short takes
small sizes and writes nothing: it shows that this script works."""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PROMPT, GENERATE = 2048, 128
TRANSFORMERS = {"125m": (12, 768, 12), "1.3b": (24, 2048, 16), "tiny": (2, 64, 2)}  # layers, width, heads (GPT-3, table 2.1)
PAIRS = [("130m", "125m"), ("1.4b", "1.3b")]


def mamba_bench(*options):
    done = subprocess.run([ROOT / "mamba", "bench", *map(str, options), "-o", "json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


# ---- workers: PyTorch, a process for each figure, so that memory is its own ----

def measured(run, repeats):
    """The median seconds of some runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def peak_rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def convolution(length, repeats):
    """y = irfft(rfft(x) rfft(k)), padded to twice the length; a few channels at a time, so that it fits into memory."""
    import torch
    channels = 1024
    block = max(1, min(channels, (1 << 24) // length))
    x, k = torch.randn(block, length), torch.randn(block, length)

    def run():
        for _ in range(0, channels, block):
            torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(k, n=2 * length), n=2 * length)[..., :length]

    return {"seconds": measured(run, repeats)}


def attention(length, repeats):
    """Causal attention of 16 heads of 64."""
    import torch
    q, k, v = (torch.randn(1, 16, length, 64) for _ in range(3))
    return {"seconds": measured(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), repeats)}


def transformer(shape, batch, prompt, generate):
    """transformers' generate() with its key-value cache, greedy: seconds with and without the prompt's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    layers, width, heads = TRANSFORMERS[shape]
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=prompt + generate, vocab_size=50257)).eval()
    ids = torch.randint(0, 50257, (batch, prompt))

    def run(ids, n):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, min_new_tokens=n, max_new_tokens=n)
        return time.perf_counter() - start

    run(ids[:1, :16], 2)  # warms up
    first = run(ids, 1)
    return {"seconds": run(ids, generate), "prompt_seconds": first, "peak_rss": peak_rss()}


def worker(threads, name, *arguments, timeout=None):
    """The result of one of the functions above in a process of its own; None when it takes too long or has no memory."""
    try:
        done = subprocess.run([sys.executable, __file__, "--threads", str(threads), "--worker", json.dumps([name, *arguments])], timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0 or b"allocate memory" in done.stderr:
        return None
    if done.returncode:
        sys.exit(done.stderr.decode())
    return json.loads(done.stdout.splitlines()[-1])


# ---- the three parts ----

def part_scan(o):
    rows, alive = [], {"convolution": True, "attention": True}
    for power in range(9, 12 if o.short else 20):
        length = 1 << power
        repeats = 3 if power < 16 else 1
        (ours,) = mamba_bench("--op", "scan", "-p", length, "-t", o.threads, "-r", repeats)
        row = {"length": length, "scan": ours["avg_ns"] / 1e9}
        for name in alive:
            result = worker(o.threads, name, length, repeats, timeout=300) if alive[name] else None
            row[name] = result["seconds"] if result else None
            alive[name] = bool(result) and result["seconds"] * (4 if name == "attention" else 2) < 60  # what the next length will take
        rows.append(row)
        print(f"| {length} | " + " | ".join(f"{row[k] * 1000:.1f}" if row[k] else "" for k in ("scan", "convolution", "attention")) + " |", flush=True)
    return rows


def throughput(row):
    return row["batch"] * GENERATE / row["seconds"], row["batch"] * GENERATE / (row["seconds"] - row["prompt_seconds"])


def part_generation(o, pairs, prompt, generate, batches):
    """Batches in rising order, each program until the minutes of its share are used up."""
    import random_model
    from compare_llama import model_file
    rows = []
    for ours, theirs in pairs:
        share = o.minutes * 60 / len(pairs) / 2
        for name in (f"mamba {ours}", f"transformer {theirs}"):
            used, took, last = 0.0, 0.0, 1
            for batch in batches:
                if not o.full and used + took * batch / last > share:
                    break
                start = time.monotonic()
                if name.startswith("mamba"):
                    path = o.tiny if o.short else model_file(ours, "f32", None)
                    arguments = ["-p", prompt, "-n", generate] if o.short else ["--paper"]
                    result = mamba_generation(path, batch, prompt, generate, o)
                else:
                    result = worker(o.threads, "transformer", theirs, batch, prompt, generate)
                took, last = time.monotonic() - start, batch
                used += took
                if not result:
                    print(f"{name}: {batch} sequences do not fit into this machine's memory", flush=True)
                    break
                rows.append({"model": name, "batch": batch, **result})
                with_prompt, without = throughput(rows[-1])
                print(f"| {name} | {batch} | {with_prompt:.1f} | {without:.1f} | {result['peak_rss'] / 1e6:.0f} |", flush=True)
    return rows


def mamba_generation(path, batch, prompt, generate, o):
    """One run of prompts and generation, as `mamba bench --paper` does for its batches."""
    (row,) = mamba_bench(path, "--paper", "-np", batch, "-p", prompt, "-n", generate, "-t", o.threads, "-r", 1)
    seconds = row["avg_ns"] / 1e9
    return {"seconds": seconds, "prompt_seconds": seconds - batch * generate / row["gen_ts"], "peak_rss": row["peak_rss"]}


def part_memory(o, lengths):
    """Peak resident set while a prompt of this length is read and a token generated."""
    from compare_llama import model_file
    path = o.tiny if o.short else model_file("130m", "f32", None)
    rows = []
    for length in lengths:
        (ours,) = mamba_bench(path, "-p", length, "-n", 0, "-t", o.threads, "-r", 1)
        theirs = worker(o.threads, "transformer", "tiny" if o.short else "125m", 1, length, 1) if length <= 16384 else None
        rows.append({"length": length, "mamba": ours["peak_rss"], "transformer": theirs["peak_rss"] if theirs else None})
        print(f"| {length} | {ours['peak_rss'] / 1e6:.0f} | {theirs['peak_rss'] / 1e6:.0f} |" if theirs else f"| {length} | {ours['peak_rss'] / 1e6:.0f} | |",
              flush=True)
    return rows


def draw(results):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    def finish(axes, name, **settings):
        axes.set(**settings)
        axes.set_title(f"{results['cpu']} ({results['isa']}), {results['threads']} threads", fontsize=9)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.figure.savefig(RESULTS / f"{name}.svg", bbox_inches="tight")

    _, axes = plt.subplots(figsize=(7, 3.6))
    for key, label in (("scan", "selective scan (mamba)"), ("convolution", "FFT convolution (PyTorch)"), ("attention", "causal attention (PyTorch)")):
        points = [(r["length"], r[key] * 1000) for r in results["scan"] if r[key]]
        axes.plot(*zip(*points), marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    finish(axes, "paper_scan", xlabel="sequence length", ylabel="ms")
    _, axes = plt.subplots(figsize=(7, 3.6))
    for model in dict.fromkeys(r["model"] for r in results["generation"]):
        rows = [r for r in results["generation"] if r["model"] == model]
        batches, (all_of_it, generating) = [r["batch"] for r in rows], zip(*map(throughput, rows))
        (line,) = axes.plot(batches, all_of_it, marker="o", markersize=3, label=model)
        axes.plot(batches, generating, marker="o", markersize=3, markerfacecolor="white", linestyle=":", color=line.get_color(),
                  label=f"{model}, without the prompt's time")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    finish(axes, "paper_throughput", xlabel="sequences", ylabel="generated tokens/s")
    _, axes = plt.subplots(figsize=(7, 3.6))
    for key in ("mamba", "transformer"):
        points = [(r["length"], r[key] / 1e9) for r in results["memory"] if r[key]]
        axes.plot(*zip(*points), marker="o", markersize=3, label={"mamba": "mamba 130m", "transformer": "transformer 125m"}[key])
    axes.set_xscale("log", base=2)
    finish(axes, "paper_memory", xlabel="tokens in the prompt", ylabel="peak resident set, GB", ylim=(0, None))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        import torch
        torch.set_num_threads(o.threads)
        name, *arguments = json.loads(o.worker)
        print(json.dumps({"convolution": convolution, "attention": attention, "transformer": transformer}[name](*arguments)))
        return
    o.tiny = ROOT / "models" / "tales.bin"
    (any_row,) = mamba_bench("--op", "scan", "-p", 64, "-r", 1, "-t", o.threads)
    results = {"cpu": any_row["cpu_info"], "isa": any_row["isa"], "threads": o.threads}
    print(f"{results['cpu']}, {results['isa']}, {o.threads} threads\n\n| length | scan, ms | FFT convolution | causal attention |\n| ---: | ---: | ---: | ---: |")
    results["scan"] = part_scan(o)
    print(f"\n| model, prompt {PROMPT}, {GENERATE} generated | sequences | tokens/s | without the prompt's time | peak RSS, MB |\n| --- | ---: | ---: | ---: | ---: |")
    if o.short:
        results["generation"] = part_generation(o, [("tiny", "tiny")], 16, 4, (1, 2))
    else:
        results["generation"] = part_generation(o, PAIRS, PROMPT, GENERATE, (1, 2, 4, 8, 16, 32, 64, 128))
    print("\n| tokens | mamba 130m, peak RSS, MB | transformer 125m |\n| ---: | ---: | ---: |")
    results["memory"] = part_memory(o, (64, 128) if o.short else (512, 2048, 8192, 32768, 131072))
    if not o.short:
        (RESULTS / "paper.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            globals()["RESULTS"] = pathlib.Path(folder)
            draw(results)
            assert len(list(pathlib.Path(folder).iterdir())) == 3


if __name__ == "__main__":
    main()
