"""Sound against programs of others: the U-Net of models/train.py in PyTorch, and sox. Part of `make check`."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import sounds
from conftest import PROGRAM, ROOT, run_mamba
from sounds import RATE, START, unet  # noqa: F401 (a fixture)

torch = pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "models"))
import train  # noqa: E402

RNG = np.random.default_rng(8)


def unet_config(c):
    return train.UNetConfig(**{"eps" if key == "layer_norm_epsilon" else key: value for key, value in c.items() if key != "model_type"})


def definition(c, w):
    """The PyTorch model with these weights, in double precision: whole clips at once, S4 by convolution."""
    model = train.UNet(unet_config(c), train.PlainOps())
    model.load_state_dict({name: torch.from_numpy(value) for name, value in w.items()})
    return model.double().eval()


@pytest.mark.parametrize("variant", [*sounds.VARIANTS, sounds.MIXED], ids=str)
def test_logits(tmp_path, variant):
    c = sounds.config(d_model=16, pool=[4, 2], **variant)
    w = sounds.random_weights(c, seed=3)
    path = sounds.convert(sounds.write_checkpoint(tmp_path / "c", c, w), tmp_path / "m.bin")
    ids = [START, *RNG.integers(0, 256, 150)]
    with torch.no_grad():
        expected = definition(c, w).logits(torch.tensor([ids]))[0].numpy()
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy", "-ub", "64")
    found = np.load(tmp_path / "l.npy")
    assert np.all(np.abs(found - expected) <= 1e-4 * np.abs(expected).max())


def test_the_shape_of_the_paper(tmp_path):
    """YouTubeMix: D = 64, p = 16, three blocks a stage, as train.py initialises it."""
    torch.manual_seed(0)
    model = train.UNet(train.UNetConfig(sample_rate=16000), train.PlainOps()).eval()
    assert sum(p.numel() for p in model.parameters()) == 3663616  # "3.5M" of table 4, with complex S4
    train.export_unet(model, tmp_path / "hf")
    path = sounds.convert(tmp_path / "hf", tmp_path / "m.bin")
    ids = [START, *RNG.integers(0, 256, 2047)]
    with torch.no_grad():
        expected = model.logits(torch.tensor([ids]))[0].numpy()
    run_mamba("score", path, "--ids", " ".join(map(str, ids)), "--logits", tmp_path / "l.npy")
    assert np.all(np.abs(np.load(tmp_path / "l.npy") - expected) <= 1e-4 * np.abs(expected).max())


def test_codes_and_scores_as_in_training(tmp_path, unet):
    """train.py's clips have the program's codes, and its loss is the program's."""
    path, c, w = unet
    x = np.convolve(RNG.normal(0, 0.1, 500), np.ones(5), "same").clip(-1, 1)
    (tmp_path / "clip.wav").write_bytes(sounds.wav(sounds.pcm(x)))
    samples, rate = train.read_wav(tmp_path / "clip.wav")
    for kind in ("minmax", "peak", "none"):
        assert np.array_equal(train.mu_law_encode(train.normalize(samples, kind)), sounds.encode(samples, kind))
    assert np.allclose(train.mu_law_decode(np.arange(256)), sounds.decode(np.arange(256)))
    ids = torch.tensor([[START, *train.mu_law_encode(train.normalize(samples, "minmax")).tolist()]])
    with torch.no_grad():
        nats = definition(c, w).loss(ids[:, :-1], ids[:, 1:]).item() * 500
    row = run_mamba("score", path, "--wav", tmp_path / "clip.wav", "-q").stdout.decode().splitlines()[1].split("\t")
    assert rate == RATE and row[1] == "500" and abs(float(row[2]) - nats) <= 1e-5 * nats


@pytest.mark.parametrize("change, words", [
    ({"pool": [3]}, "expected 3 pairs"), ({"pool": []}, "expected one to four"), ({"stages": [["s5", "real"]] * 5}, "s4 or s6"),
    ({"discretization": "bilinear"}, "zoh or delta_b"), ({"norm": None}, "layernorm or rmsnorm"), ({"vocab_size": 128}, "256 codes"),
    ({"d_model": 0}, "positive integer"), ({"layer_norm_epsilon": 2.0}, "between 1e-37 and 1"), ({"d_inner": 4}, "expected only"),
    ({"sample_rate": None}, "positive integer")])
def test_wrong_configurations(tmp_path, change, words):
    c = sounds.config()
    folder = sounds.write_checkpoint(tmp_path / "c", c, sounds.random_weights(c))
    (folder / "config.json").write_text(json.dumps(c | change))
    done = subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, tmp_path / "m.bin"], capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize("name, words", [("up.1.pool.bias", "tensor up.1.pool.bias is missing"), ("center.blocks.0.mixer.A_imag", "A_imag is missing")])
def test_missing_tensors(tmp_path, name, words):
    c = sounds.config()
    w = sounds.random_weights(c)
    del w[name]
    done = subprocess.run([sys.executable, ROOT / "convert_weights.py", sounds.write_checkpoint(tmp_path / "c", c, w), tmp_path / "m.bin"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr


# ---- sox ----

@pytest.fixture(scope="module")
def sox():
    if not shutil.which("sox"):
        pytest.skip("sox is not installed")

    def run(*args, **keywords):
        return subprocess.run(["sox", *map(str, args)], check=True, capture_output=True, **keywords).stdout
    return run


@pytest.mark.parametrize("form", ["wav", "mulaw", "raw"])
def test_sox_reads_what_is_written(sox, unet, tmp_path, form):
    out, ids = tmp_path / "out.wav", [START, *range(256)]
    run_mamba(unet[0], "--ids", " ".join(map(str, ids)), "--echo", "-n", "0", "-o", out, "--sound-format", form)
    options = ["-t", "raw", "-r", RATE, "-e", "signed", "-b", 16, "-c", 1] if form == "raw" else []
    samples = np.frombuffer(sox(*options, out, "-t", "raw", "-e", "signed", "-b", 16, "-c", 1, "-"), "<i2")
    exact = np.clip(np.rint(sounds.decode(ids) * 32768), -32768, 32767)
    assert len(samples) == len(ids) and np.all(np.abs(samples - exact) <= (np.maximum(8, np.abs(exact) / 31) if form == "mulaw" else 0))


def test_sox_reads_a_pipe(sox, unet):
    sound = run_mamba(unet[0], "-n", "50", "-s", "1", "-o", "-").stdout
    assert len(sox("-t", "wav", "-", "-t", "raw", "-", input=sound)) == 100


def test_sox_reads_a_pipe_without_end(sox, unet):
    """-n -1, as in: mamba audio.bin -n -1 -o - | sox -t wav - ...; the reader leaves first, the header knows no length."""
    with subprocess.Popen([PROGRAM, unet[0], "-n", "-1", "-s", "1", "-q", "-o", "-"], stdout=subprocess.PIPE) as process:
        sound = process.stdout.read(44 + 2000)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    assert len(sox("-t", "wav", "-", "-t", "raw", "-", input=sound)) == 2000


@pytest.mark.parametrize("options", [["-b", 8], ["-b", 16], ["-b", 24], ["-b", 32], ["-e", "float", "-b", 32], ["-e", "float", "-b", 64], ["-e", "mu-law"],
                                     ["-c", 2]], ids=str)
def test_reads_what_sox_writes(sox, unet, tmp_path, options):
    """Of every coding, from a file and from a pipe."""
    plain, clip = tmp_path / "plain.wav", tmp_path / "clip.wav"
    x = np.convolve(RNG.normal(0, 0.1, 300), np.ones(5), "same").clip(-0.9, 0.9)
    plain.write_bytes(sounds.wav(sounds.pcm(x)))
    codes = lambda *args, **keywords: np.array([int(row.split("\t")[2]) for row in run_mamba("score", unet[0], "--per-token", "-q", "--wav", *args, **keywords).stdout.decode().splitlines()[1:]])
    sox("-D", plain, *options, clip)
    found, expected = codes(clip), codes(plain)
    a, b = sounds.decode(found), sounds.decode(expected)
    coarse = "8" in str(options[1:2]) or "mu-law" in options
    assert len(found) == len(expected) and np.all(np.abs(a - b) <= (0.08 if coarse else 0.0) * np.maximum(np.abs(b), 0.4) + (0.02 if coarse else 0))
    piped = sox("-D", plain, *options, "-t", "wav", "-")
    assert np.array_equal(codes("-", input=piped), found)


def test_the_advice_about_rates(sox, unet, tmp_path):
    """What the error says to do works."""
    clip, out = tmp_path / "clip.wav", tmp_path / "OUT.wav"
    clip.write_bytes(sounds.wav(sounds.pcm(np.sin(np.arange(4410) / 20)), rate=44100))
    message = run_mamba("score", unet[0], "--wav", clip, check=False).stderr.decode()
    advice = message[message.index("sox "):].split()
    assert advice[1:] == [str(clip), "-r", str(RATE), "OUT.wav"]
    sox(*advice[1:-1], out)
    assert run_mamba("score", unet[0], "--wav", out, "-q").stdout.decode().splitlines()[1].split("\t")[1] == "800"


def test_a_short_training_run(tmp_path):
    """train.py audio on clips of a tone: the loss falls, and what it exports is a model that runs."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        x = 0.5 * np.sin(np.arange(900) * (0.2 + 0.01 * (i % 3)))
        (data / f"tone_someone_{i}.wav").write_bytes(sounds.wav(sounds.pcm(x)))
    command = [sys.executable, ROOT / "models" / "train.py", "audio", "--data", data, "--out", tmp_path / "run", "--d-model", "16", "--n-blocks", "1", "--pool", "4,2",
               "--length", "512", "--steps", "60", "--warmup", "5", "--eval-every", "30", "--lr", "5e-3", "--stages", "s4.complex,s4.real,s6.complex,s6.real,s4.complex"]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"]["bits"] < 5
    path = sounds.convert(tmp_path / "run" / "hf", tmp_path / "m.bin")
    rows = run_mamba("score", path, "-q", *[option for i in range(5) for option in ("--wav", data / f"tone_someone_{i}.wav")]).stdout.decode().splitlines()[1:]
    nats, samples = (sum(float(row.split("\t")[k]) for row in rows) for k in (2, 1))
    assert samples == 4500 and abs(nats / samples / np.log(2) - report["test"]["bits"]) < 1e-3
