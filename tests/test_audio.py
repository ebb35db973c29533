"""Audio models: the U-Net against a second definition of it, clips to codes and back, WAV files from anywhere."""
import io
import os
import shlex
import signal
import struct
import subprocess
import sys
import time
import wave

import numpy as np
import pytest

import sounds
import reference
from conftest import FIXTURES, PROGRAM, ROOT
from sounds import RATE, START, unet  # noqa: F401 (a fixture)
from test_model import npy, score_logits, text

RNG = np.random.default_rng(5)
CLIP = np.convolve(RNG.normal(0, 0.05, 700), np.ones(9), "same").clip(-1, 1)


def codes_of(mamba, path, file, **keywords):
    """The codes of a WAV file, as the program made them."""
    rows = mamba("score", path, "--wav", file, "--per-token", "-q", **keywords).stdout.decode().splitlines()[1:]
    return [int(row.split("\t")[2]) for row in rows]


def samples_of(data):
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def fails(mamba, *args, status=1, **keywords):
    """One line on standard error, nothing on standard output."""
    done = mamba(*args, check=False, **keywords)
    message = done.stderr.decode()
    assert done.returncode == status and done.stdout == b"", (done.returncode, message)
    assert status == 2 or message.count("\n") == 1, message
    return message


# ---- Numbers ----

@pytest.mark.parametrize("variant", [*sounds.VARIANTS, sounds.MIXED], ids=lambda v: "-".join(["mixed" if v is sounds.MIXED else ".".join(v["stages"][0]), v["discretization"], v["norm"]]))
def test_logits(mamba, tmp_path, variant):
    c = sounds.config(n_blocks=1, **variant)
    w = sounds.random_weights(c, seed=7)
    path = sounds.convert(sounds.write_checkpoint(tmp_path / "c", c, w), tmp_path / "m.bin")
    ids = [START, *RNG.integers(0, 256, 52)]
    found, expected = npy(score_logits(mamba, path, ids, tmp_path)), sounds.UNet(c, w).logits(ids)
    assert found.shape == expected.shape and expected.std() > 0.5
    assert np.all(np.abs(found - expected) <= 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("pool, blocks", [([2], 3), ([16, 4], 1), ([2, 2, 2], 1)])
def test_other_shapes(mamba, tmp_path, pool, blocks):
    c = sounds.config(pool=pool, n_blocks=blocks, stages=[["s6", "real"], ["s4", "complex"]] * len(pool) + [["s6", "complex"]], d_model=10, d_state=16)
    w = sounds.random_weights(c)
    path = sounds.convert(sounds.write_checkpoint(tmp_path / "c", c, w), tmp_path / "m.bin")
    for n in (1, 2, 77):  # neither a multiple of the poolings nor long enough for all of them
        ids = RNG.integers(0, 256, n)
        found, expected = npy(score_logits(mamba, path, ids, tmp_path)), sounds.UNet(c, w).logits(ids)
        assert np.all(np.abs(found - expected) <= 1e-4 * np.abs(expected).max())


def test_the_same_bits(mamba, unet, tmp_path):
    """Whatever the chunks, the threads and the instruction set."""
    ids = RNG.integers(0, 256, 100)
    whole = score_logits(mamba, unet[0], ids, tmp_path)
    for options, env in [(("-ub", "1"), {}), (("-ub", "2"), {}), (("-ub", "7"), {}), (("-ub", "99"), {}), (("-t", "1"), {}), (("-t", "3"), {}),
                         ((), {"MAMBA_ISA": "generic"})]:
        assert score_logits(mamba, unet[0], ids, tmp_path, *options, env=env) == whole, (options, env)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_types(mamba, unet, tmp_path, kind):
    c = sounds.config(d_model=32)
    folder = sounds.write_checkpoint(tmp_path / "c", c, sounds.random_weights(c))
    ids = RNG.integers(0, 256, 60)
    full, small = (npy(score_logits(mamba, sounds.convert(folder, tmp_path / f"{k}.bin", k), ids, tmp_path)) for k in ("f32", kind))
    assert np.sqrt(np.mean((full - small) ** 2)) <= {"f16": 0.01, "q8_0": 0.2}[kind] * full.std()


def test_greedy_follows_the_logits(mamba, unet, tmp_path):
    path, c, w = unet
    prompt = [START, 3, 200, 90]
    ids = list(map(int, mamba(path, "--ids", text(prompt), "-n", "40", "--greedy", "--print-ids").stdout.split()))
    best = sounds.UNet(c, w).logits([*prompt, *ids])[len(prompt) - 1:-1].argmax(1)
    assert ids == best.tolist() and len(set(ids)) > 3


def test_a_run_goes_on_where_it_stopped(mamba, unet, tmp_path):
    """Bit for bit, with the state saved in the middle of a clip, and of what a pooling gathers."""
    path, state, clip = unet[0], tmp_path / "state", tmp_path / "clip.wav"
    clip.write_bytes(sounds.wav(sounds.pcm(CLIP[:100])))
    whole = mamba(path, "--wav", clip, "-n", "60", "-s", "4", "-o", "-", "--sound-format", "raw").stdout
    for first in (1, 7, 12, 35):
        part = tmp_path / "part.wav"
        mamba(path, "--wav", clip, "-n", str(first), "-s", "4", "-o", part, "--sound-format", "raw", "--save-state", state)
        rest = mamba(path, "--load-state", state, "-n", str(60 - first), "-s", "4", "-o", "-", "--sound-format", "raw").stdout
        assert part.read_bytes() + rest == whole, first
    score = lambda *options: mamba("score", path, *options, "-q").stdout.split()[-3]
    assert score("--wav", clip) == score("--wav", clip, "-ub", "5")


def test_many_clips_at_once(mamba, unet, tmp_path):
    files = []
    for i, n in enumerate((1, 5, 6, 100, 311, 64)):
        files += ["--wav", tmp_path / f"{i}.wav"]
        files[-1].write_bytes(sounds.wav(sounds.pcm(CLIP[i:i + n])))
    together = mamba("score", unet[0], *files, "-q").stdout.decode().splitlines()
    apart = [mamba("score", unet[0], "--wav", f, "-q", "-np", "1").stdout.decode().splitlines()[1] for f in files[1::2]]
    assert together[1:] == apart
    assert mamba("score", unet[0], *files, "-q", "-np", "2", "-ub", "9").stdout.decode().splitlines() == together


# ---- What commands say ----

def test_score(mamba, unet, tmp_path):
    path, c, w = unet
    clip = tmp_path / "clip.wav"
    clip.write_bytes(sounds.wav(sounds.pcm(CLIP[:90])))
    header, row = (line.split("\t") for line in mamba("score", path, "--wav", clip, "-q").stdout.decode().splitlines())
    codes = sounds.encode(np.frombuffer(sounds.pcm(CLIP[:90]), "<i2") / 32768)
    nll = -reference.log_softmax(sounds.UNet(c, w).logits([START, *codes[:-1]]))[np.arange(90), codes].sum()
    assert header == ["id", "tokens", "nll", "bits_per_token", "perplexity"] and row[:2] == [str(clip), "90"]
    assert abs(float(row[2]) - nll) <= 1e-5 * nll and abs(float(row[3]) - nll / 90 / np.log(2)) <= 1e-5 * nll


def test_embed(mamba, unet, tmp_path):
    clip, out = tmp_path / "clip.wav", tmp_path / "out.npy"
    clip.write_bytes(sounds.wav(sounds.pcm(CLIP[:50])))
    rows = {}
    for pool in ("last", "mean", "none"):
        mamba("embed", unet[0], "--wav", clip, "--pool", pool, "-o", out)
        rows[pool] = np.load(out)
    assert rows["none"].shape == (50, 12)  # a row a sample
    assert np.array_equal(rows["last"][0], rows["none"][-1]) and np.allclose(rows["mean"][0], rows["none"].mean(0), atol=1e-6)
    assert "different rates" in fails(mamba, "embed", unet[0], "--wav", clip, "--layer", "1", "-o", out)


def test_a_name_that_ends_as_raw_samples_do(mamba, unet, tmp_path):
    mamba(unet[0], "-n", "9", "-s", "1", "-o", tmp_path / "x.raw")
    assert (tmp_path / "x.raw").read_bytes() == mamba(unet[0], "-n", "9", "-s", "1", "-o", "-", "--sound-format", "raw").stdout


def test_seconds_and_defaults(mamba, unet):
    for seconds in ("0.25", "0.7", "0.0011"):  # as samples; 0.7 is less than 0.7 as a float
        assert len(samples_of(mamba(unet[0], "-o", "-", "--seconds", seconds, "-s", "1").stdout)) == round(float(seconds) * RATE)
    out = mamba(unet[0], "-o", "-", "-n", "9", "-s", "1").stdout
    assert len(samples_of(out)) == 9 and out == mamba(unet[0], "-o", "-", "-n", "9", "-s", "1", "--temp", "1", "--top-k", "0", "--top-p", "1", "--min-p", "0").stdout
    assert out != mamba(unet[0], "-o", "-", "-n", "9", "-s", "2").stdout


def test_default_temperature_draws_from_the_model_itself(mamba, unet):
    """In 400 first samples each code comes as often as the model says."""
    path, c, w = unet
    p = np.exp(reference.log_softmax(sounds.UNet(c, w).logits([START])))[0]
    counts = np.bincount([int(mamba(path, "--print-ids", "-n", "1", "-s", str(s)).stdout) for s in range(400)], minlength=256)
    order = np.argsort(p)[::-1]
    for k in (8, 32, 64):  # the share of the k likeliest
        expected = p[order[:k]].sum()
        assert abs(counts[order[:k]].sum() / 400 - expected) <= 4 * np.sqrt(expected * (1 - expected) / 400)


# ---- Codes ----

def test_every_code_becomes_its_sample(mamba, unet):
    out = samples_of(mamba(unet[0], "--ids", text([START, *range(256)]), "--echo", "-n", "0", "-o", "-").stdout)
    assert out[0] == 0 and np.array_equal(out[1:], np.clip(np.rint(sounds.decode(np.arange(256)) * 32768), -32768, 32767))
    assert out[1] == -32768 and out[129] == 0  # codes 0 and 128


@pytest.mark.parametrize("normalization", ["minmax", "peak", "none"])
def test_samples_become_their_codes(mamba, tmp_path, normalization):
    c = sounds.config(normalization=normalization, n_blocks=1)
    path = sounds.convert(sounds.write_checkpoint(tmp_path / "c", c, sounds.random_weights(c)), tmp_path / "m.bin")
    for clip in (np.arange(-128, 128) / 128, np.arange(-300, 300) ** 3 / 3e7, np.array([0.25, -0.5]), np.zeros(7), np.full(7, 0.3)):
        file = tmp_path / "clip.wav"
        file.write_bytes(sounds.wav(sounds.pcm(clip)))
        x = np.frombuffer(sounds.pcm(clip), "<i2") / 32768
        assert codes_of(mamba, path, file) == sounds.encode(x, normalization).tolist()


def test_silence_is_the_code_of_silence(mamba, unet, tmp_path):
    file = tmp_path / "silence.wav"
    file.write_bytes(sounds.wav(sounds.pcm(np.zeros(30))))
    assert codes_of(mamba, unet[0], file) == [128] * 30


@pytest.mark.parametrize("level", [1.0, 0.01])
def test_a_clip_goes_on_at_its_own_level(mamba, unet, tmp_path, level):
    """--echo gives the clip back, within half a step of mu-law at its level."""
    file = tmp_path / "clip.wav"
    clip = CLIP / np.abs(CLIP).max() * level + 0.1 * level
    file.write_bytes(sounds.wav(sounds.pcm(clip)))
    out = samples_of(mamba(unet[0], "--wav", file, "--echo", "-n", "50", "-s", "3", "-o", "-").stdout) / 32768
    assert len(out) == len(clip) + 50
    x = np.clip(np.rint(clip * 32768), -32768, 32767) / 32768
    a = 2 * (x - x.min()) / (x.max() - x.min()) - 1
    step = (1 / 255 + np.abs(a)) * np.log(256) / 128 * (x.max() - x.min()) / 2
    assert np.all(np.abs(out[:len(x)] - x) <= 1.1 * step + 2 / 32768)
    assert np.all(np.abs(out[len(x):]) <= np.abs(x).max() + 0.01)


# ---- WAV files from anywhere ----

X = np.array([0, 0.5, -0.5, 0.25, -1, 0.99, 0.125, -0.375])
READABLE = {
    "8": sounds.wav((X * 128 + 128).clip(0, 255).astype("u1").tobytes(), bits=8),
    "16": sounds.wav(sounds.pcm(X)),
    "24": sounds.wav(b"".join(struct.pack("<i", int(v * 2 ** 31))[1:] for v in X), bits=24),
    "32": sounds.wav(b"".join(struct.pack("<i", int(v * 2 ** 31)) for v in X), bits=32),
    "float": sounds.wav(X.astype("<f4").tobytes(), coding=3, bits=32),
    "double": sounds.wav(X.astype("<f8").tobytes(), coding=3, bits=64),
    "stereo": sounds.wav(sounds.pcm(np.stack([X - 0.0, X], 1).ravel()), channels=2),
    "extensible": sounds.wav(sounds.pcm(X), extensible=True),
    "odd chunk": sounds.wav(sounds.pcm(X), before=sounds.chunk(b"LIST", b"abc")),
    "from a pipe": sounds.wav(sounds.pcm(X), size=0xFFFFFFFF),
    "from a pipe, with 0": sounds.wav(sounds.pcm(X), size=0),
    "from sox's pipe": sounds.wav(sounds.pcm(X), size=0x7FFFFFFF - 36),
    "a chunk behind": sounds.wav(sounds.pcm(X)) + sounds.chunk(b"LIST", b"abcd"),
}


@pytest.mark.parametrize("name", READABLE)
def test_reads(mamba, unet, tmp_path, name):
    file = tmp_path / "clip.wav"
    file.write_bytes(READABLE[name])
    stored = np.trunc(X * 128) / 128 if name == "8" else np.rint(X * 32768) / 32768 if name in ("16", "stereo", "extensible") else X
    found = np.array(codes_of(mamba, unet[0], file))
    assert len(found) == len(X) and np.all(np.abs(found - sounds.encode(stored)) <= (name == "24")), found  # of which the last bits are cut off
    assert codes_of(mamba, unet[0], "-", input=READABLE[name]) == found.tolist()


def test_reads_its_own_mu_law(mamba, unet, tmp_path):
    """8-bit mu-law as G.711 has it, which is what WAV files call by that name; decoded as audioop's tables do."""
    file = tmp_path / "law.wav"
    out = mamba(unet[0], "--ids", text([START, *range(256)]), "--echo", "-n", "0", "-o", "-", "--sound-format", "mulaw").stdout
    assert out[20:22] == b"\x07\x00" and len(out) % 2 == 0
    data = out[58:58 + 257]
    expand = []
    for byte in data:  # ITU-T G.711: 14 bits, scaled to 16
        u = ~byte & 0xFF
        t = (((u & 15) << 3) + 0x84) << (u >> 4 & 7)
        expand.append((0x84 - t) if u & 0x80 else (t - 0x84))
    exact = np.clip(np.rint(sounds.decode([128, *range(256)]) * 32768), -32768, 32767)
    assert np.all(np.abs(np.array(expand) - exact) <= np.maximum(8, np.abs(exact) / 31))
    file.write_bytes(out)
    assert len(codes_of(mamba, unet[0], file)) == 257


UNREADABLE = {
    "nothing": (b"", "not a WAV file"),
    "something else": (b"fLaC" + bytes(100), "not a WAV file"),
    "another rate": (sounds.wav(sounds.pcm(X), rate=44100), "44100 samples a second, the model 8000; convert it: sox "),
    "cut off": (sounds.wav(sounds.pcm(X))[:-3], "is it cut off?"),
    "half a frame": (sounds.wav(sounds.pcm(X)[:-1]), "is it cut off?"),
    "no data": (sounds.wav(b"")[:36], "no chunk 'data'"),
    "ADPCM": (sounds.wav(bytes(16), coding=2, bits=4), "coding 2 with 4 bits"),
    "twelve bits": (sounds.wav(bytes(16), bits=12), "coding 1 with 12 bits"),
    "no channels": (sounds.wav(bytes(16), channels=0), "0 channels"),
    "24 bits in 4 bytes": (sounds.wav(bytes(24), bits=24, align=4), "frames of 4 bytes, but its samples fill 3"),
    "infinity": (sounds.wav(np.array([0, np.inf], "<f4").tobytes(), coding=3, bits=32), "sample 1 is inf"),
    "not a number": (sounds.wav(np.array([np.nan], "<f4").tobytes(), coding=3, bits=32), "sample 0 is"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_refuses(mamba, unet, tmp_path, name):
    data, words = UNREADABLE[name]
    file, out = tmp_path / "clip.wav", tmp_path / "out.wav"
    file.write_bytes(data)
    message = fails(mamba, unet[0], "--wav", file, "-n", "5", "-o", "-")
    assert words in message and str(file) in message
    mamba(unet[0], "--wav", file, "-n", "5", "-o", out, check=False)
    assert os.listdir(tmp_path) == ["clip.wav"]
    done = mamba("score", unet[0], "--wav", file, "-q", check=False)
    assert done.returncode == 1 and words in done.stderr.decode()


def test_an_empty_clip(mamba, unet, tmp_path):
    file = tmp_path / "empty.wav"
    file.write_bytes(sounds.wav(b""))
    assert mamba("score", unet[0], "--wav", file, "-q").stdout.decode().splitlines()[1].split("\t")[1:] == ["0", "0.000000", "nan", "nan"]
    assert len(samples_of(mamba(unet[0], "--wav", file, "-n", "5", "-o", "-").stdout)) == 5


# ---- Output ----

def test_formats(mamba, unet, tmp_path):
    run = lambda *options: mamba(unet[0], "-n", "33", "-s", "1", "-o", "-", *options).stdout
    raw, whole, law = run("--sound-format", "raw"), run(), run("--sound-format", "mulaw")
    assert len(raw) == 66 and whole == sounds.wav(raw)
    assert struct.unpack("<I", law[4:8])[0] + 8 == len(law) == 58 + 34 and struct.unpack("<I", law[54:58])[0] == 33
    file = tmp_path / "out.wav"
    mamba(unet[0], "-n", "33", "-s", "1", "-o", file)
    assert file.read_bytes() == whole


def test_an_interrupted_file_is_whole(unet, tmp_path):
    """Its header says how much came; so does that of a pipe's reader who knows that nobody knew."""
    file = tmp_path / "out.wav"
    run = subprocess.Popen([PROGRAM, unet[0], "-n", "-1", "-s", "1", "-o", file], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    temporary = None
    for _ in range(600):
        temporary = temporary or next(tmp_path.glob("out.wav.*"), None)
        if temporary and temporary.stat().st_size > 4000:
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT
    assert b"s of sound" in run.stderr.read() and os.listdir(tmp_path) == ["out.wav"]
    assert len(samples_of(file.read_bytes())) * 2 + 44 == file.stat().st_size > 4000


def test_a_reader_that_leaves(unet):
    run = subprocess.Popen([PROGRAM, unet[0], "-n", "-1", "-s", "1", "-o", "-"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert struct.unpack("<I", run.stdout.read(1000)[40:44])[0] == 0xFFFFFFFF
    run.stdout.close()
    assert run.wait(60) == 0


def test_codes_without_sound(mamba, unet):
    """--print-ids and --jsonl, for programs."""
    ids = mamba(unet[0], "-n", "8", "-s", "1", "--print-ids").stdout
    assert len(ids.split()) == 8
    answer = mamba("generate", unet[0], "--jsonl", "--print-ids", input=b'{"ids": [128], "seed": 1, "max_tokens": 8}\n').stdout
    assert str(list(map(int, ids.split()))).encode() in answer


@pytest.mark.parametrize("change, words", [
    (lambda k, w: w.update({"down.1.blocks.0.mixer.A_log": np.full_like(w["down.1.blocks.0.mixer.A_log"], -90)}), None),  # exp(A dt) = 1: legal, and slow
    (lambda k, w: w.update({"center.blocks.0.mixer.A_log": np.full_like(w["center.blocks.0.mixer.A_log"], -200),
                            "center.blocks.0.mixer.A_imag": 0 * w["center.blocks.0.mixer.A_imag"]}), "nearly 0 at [0, 0]"),
    (lambda k, w: w.update({"up.0.blocks.0.mixer.C": np.full_like(w["up.0.blocks.0.mixer.C"], 3e38),
                            "up.0.blocks.0.mixer.B": np.full_like(w["up.0.blocks.0.mixer.B"], 3e38)}), "is no finite number")])
def test_extreme_states(mamba, tmp_path, change, words):
    """What cannot be computed is refused when the model is opened."""
    c = sounds.config(n_blocks=1)
    w = sounds.random_weights(c)
    change(c, w)
    path = sounds.convert(sounds.write_checkpoint(tmp_path / "c", c, w), tmp_path / "m.bin")
    done = mamba("score", path, "--ids", "1 2 3", "-q", check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == ((1, 1) if words else (0, 0)) and (words or "").encode() in done.stderr, done.stderr


def patched(path, out, old, new):
    """The file with the bytes `old`, which it holds once, replaced."""
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    out.write_bytes(data.replace(old, new))
    return out


def u32(key, value):
    return key + struct.pack("<II", 4, value)


@pytest.mark.parametrize("key, old, new, words", [
    (b"mamba.unet.blocks_per_stage", 2, 3, "blocks_per_stage is 3"), (b"mamba.unet.blocks_per_stage", 2, 0, "blocks_per_stage is 0"),
    (b"mamba.unet.blocks_per_stage", 2, 0x33333334, "blocks_per_stage is"), (b"mamba.ssm.time_step_rank", 1, 777, "time_step_rank is its first"),
    (b"mamba.audio.sample_rate", RATE, 0, "sample_rate is 0"), (b"mamba.audio.start_token", START, 256, "start_token is 256")])
def test_hostile_headers(mamba, unet, tmp_path, key, old, new, words):
    path = patched(unet[0], tmp_path / "m.bin", u32(key, old), u32(key, new))
    assert words in fails(mamba, "score", path, "--ids", "1 2 3")


def test_a_huge_count_of_blocks(mamba, unet, tmp_path):
    """As a number of 64 bits whose product wraps to the right count."""
    n_layer, data = 10, unet[0].read_bytes()
    old = b"mamba.unet.blocks_per_stage" + struct.pack("<II", 4, 2)
    wrapping = n_layer * pow(5, -1, 2 ** 64) % 2 ** 64
    new = b"mamba.unet.blocks_per_stage" + struct.pack("<IQ", 10, wrapping)
    at = data.index(old)
    # The header grows by four bytes; the data section keeps its place when the padding has room for them, else the file is refused anyway.
    (tmp_path / "m.bin").write_bytes(data[:at] + new + data[at + len(old):])
    fails(mamba, "score", tmp_path / "m.bin", "--ids", "1 2 3")


def test_standard_input_is_a_clip(mamba, unet):
    """As it is a text for text models; nothing at all is no prompt."""
    clip = sounds.wav(sounds.pcm(CLIP[:40]))
    assert mamba("score", unet[0], input=clip).stdout == mamba("score", unet[0], "--wav", "-", input=clip).stdout
    assert mamba(unet[0], "-n", "9", "-s", "1", "-o", "-", input=clip).stdout == mamba(unet[0], "-n", "9", "-s", "1", "-o", "-", "--wav", "-", input=clip).stdout
    assert "not a WAV file" in fails(mamba, unet[0], "-n", "9", "-o", "-", input=b"text\n")


def test_the_reader_of_a_fifo_leaves(unet, tmp_path):
    """-o FIFO ends as quietly as -o -."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    run = subprocess.Popen([PROGRAM, unet[0], "-n", "-1", "-s", "1", "-o", fifo], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with open(fifo, "rb") as reader:
        reader.read(1000)
    assert run.wait(60) == 0 and b"Broken" not in run.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])  # the second: a cluster's warning
def test_an_interrupted_redirection_is_whole(unet, tmp_path, number):
    """-o - > FILE, with a number of samples that was not reached."""
    with open(tmp_path / "out.wav", "wb") as out:
        run = subprocess.Popen([PROGRAM, unet[0], "-n", "100000000", "-s", "1", "-o", "-"], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)
        while os.fstat(out.fileno()).st_size < 4000:
            time.sleep(0.02)
        run.send_signal(number)
        assert run.wait(60) == 128 + number
    data = (tmp_path / "out.wav").read_bytes()
    assert len(samples_of(data)) * 2 + 44 == len(data)


@pytest.mark.parametrize("how", ["wav", "mulaw"])
def test_appended_sound_is_one_file(unet, tmp_path, how):
    """`-o - >> new.wav`: the header is right from the start, and no second one is appended."""
    program, options = shlex.quote(str(PROGRAM)), f"-n 999 -s 1 -q --sound-format {how}"
    subprocess.run(f"{program} {unet[0]} {options} -o new.wav; {program} {unet[0]} {options} -o - >> added.wav", shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "added.wav").read_bytes() == (tmp_path / "new.wav").read_bytes()


def test_a_loud_clip_is_saved_and_loaded(mamba, unet, tmp_path):
    clip, state = tmp_path / "loud.wav", tmp_path / "state"
    clip.write_bytes(sounds.wav((X * 2 ** 31).astype("<f4").tobytes(), coding=3, bits=32))
    mamba(unet[0], "--wav", clip, "-n", "5", "-s", "1", "-o", tmp_path / "o.wav", "--save-state", state)
    assert len(mamba(unet[0], "--load-state", state, "-n", "5", "-s", "1", "-o", "-", "--sound-format", "raw").stdout) == 10


def test_wrong_uses(mamba, unet, tmp_path):
    path, tale, clip = unet[0], FIXTURES / "mamba_tied.f32.bin", tmp_path / "clip.wav"
    clip.write_bytes(sounds.wav(sounds.pcm(CLIP)))
    assert "-o FILE" in fails(mamba, path, "-n", "5")
    assert "--wav FILE" in fails(mamba, path, "-p", "text", "-n", "5", "-o", "-")
    assert "standard input: not a WAV file" in fails(mamba, "score", path)
    assert "no classifier" in fails(mamba, "classify", path, "--ids", "1 2")
    assert "there are 2" in fails(mamba, path, "--wav", clip, "--wav", clip, "-o", "-", status=2)
    assert "the same file" in fails(mamba, path, "-o", tmp_path / "x", "--save-state", tmp_path / "x", status=2)
    assert "reads --wav" in fails(mamba, path, "--prefix", "text", "-o", "-")
    assert "no audio model" in fails(mamba, tale, "--wav", clip, "-n", "5")
    assert "no audio model" in fails(mamba, tale, "--seconds", "1")
    assert "twice" in fails(mamba, path, "--seconds", "1", "-n", "5", "-o", "-", status=2)
    assert "expected wav|mulaw|raw" in fails(mamba, path, "-o", "-", "--sound-format", "mp3", status=2)
    assert "sox -t wav" in fails(mamba, path, "-n", "5", "-o", tmp_path / "x.FLAC") and not any(tmp_path.glob("*.FLAC*"))
    assert "--stop does not apply to sound" in fails(mamba, path, "-n", "5", "--stop", "x", "--print-ids")
    assert "more than 1000000000 samples" in fails(mamba, path, "--seconds", "1e6", "-o", "-")
    assert "--output does not apply with --jsonl" in fails(mamba, path, "--jsonl", "-o", "x", input=b"{}\n", status=2)
    assert "--print-ids" in fails(mamba, path, "--jsonl", input=b"{}\n")
    assert "read once" in fails(mamba, "score", path, "--wav", "-", "--wav", "-", status=2)
    assert "does not apply to tokenize" in fails(mamba, "tokenize", path, "--wav", clip, status=2)


def test_a_text_can_go_to_a_file(mamba, tmp_path):
    out = tmp_path / "out.txt"
    options = "--ids", "1 2 3", "-n", "9", "-s", "1", "--print-ids"
    mamba(FIXTURES / "mamba_tied.f32.bin", *options, "-o", out)
    assert out.read_bytes() == mamba(FIXTURES / "mamba_tied.f32.bin", *options).stdout


def test_digits(mamba, tmp_path):
    """The model that is shipped, and what `make demo-audio` does with it: it finds its own sound much likelier than the same samples
    in another order."""
    model, file = ROOT / "models" / "digits.bin", tmp_path / "digits.wav"
    mamba(model, "--seconds", 2, "-s", 1, "-o", file)
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (8000, 16000)
        samples = np.frombuffer(sound.readframes(16000), "<i2")
    (tmp_path / "shuffled.wav").write_bytes(sounds.wav(RNG.permutation(samples).tobytes(), rate=8000))
    table = mamba("score", model, "-q", "--wav", file, "--wav", tmp_path / "shuffled.wav").stdout.decode().splitlines()[1:]
    own, shuffled = (float(row.split("\t")[3]) for row in table)
    assert own < 6 and shuffled > own + 1, table
    subprocess.run([sys.executable, ROOT / "models" / "draw_sound.py", file, tmp_path / "digits.png"], check=True)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "shuffled.wav").read_bytes()[:20], b"", sounds.wav(bytes(400), channels=2, rate=8000):
        (tmp_path / "wrong.wav").write_bytes(wrong)
        done = subprocess.run([sys.executable, ROOT / "models" / "draw_sound.py", tmp_path / "wrong.wav", tmp_path / "wrong.png"],
                              stderr=subprocess.PIPE)
        assert done.returncode == 1 and done.stderr.startswith(b"draw_sound.py: ") and done.stderr.count(b"\n") == 1
