"""models/train.py: cleaning, the fused kernels, exact resumption, and the export as transformers reads it.

Needs torch, tokenizers, safetensors and, for the last test, transformers; the fused kernels need a C++ compiler.
"""
import importlib.util
import json
import pathlib
import random
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "models" / "train.py"
torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def has_extension(module):
    try:
        module.build_library()
        return True
    except Exception:
        return False


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Made-up stories in the three formats of the real files."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    names, things = ["Lily", "Tom", "Sara", "Max"], ["ball", "tree", "boat", "hat", "song", "river", "stone"]

    def sentence():
        return " ".join(rng.choice(["the", "a", "red", "big", "saw", "liked", "found", "with", "and"] + names + things)
                        for _ in range(12)) + "."

    def story(gap):
        opening = f"Once upon a time {rng.choice(names)} went out. " + sentence()
        return gap.join([opening] + [sentence() + " " + sentence() for _ in range(3)])

    (folder / "tinystories_v2_valid_head.txt").write_text("\n<|endoftext|>\n".join(story("\n") for _ in range(150)))
    (folder / "tinystories_v1_train_head.txt").write_text("\n".join(story("\n\n") for _ in range(150)))
    valid = ["Spot was glad."] + [story("\n\n") for _ in range(150)]
    (folder / "tinystories_v1_valid_head.txt").write_text("\n\n".join(valid))
    (folder / "books").mkdir()
    chapters = [f"Chapter the {i}th\n\n" + "\n\n".join(sentence() for _ in range(10)) for i in range(80)]
    (folder / "books" / "one.txt").write_text("\n\n".join(chapters))
    return folder


def run(corpus, out, *more, steps=6):
    command = [sys.executable, str(TRAIN), "text", "--data", str(corpus), "--out", str(out), "--vocab", "320",
               "--d-model", "32", "--n-layer", "2", "--length", "24", "--batch", "4", "--steps", str(steps),
               "--eval-every", "3", "--warmup", "2", "--threads", "2", *more]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_cleaning(train):
    broken = 'He said, \u00e2\u20ac\u0153Wow\u00e2\u20ac\u009d! I don\u00e2\u20ac\u2122t. \u00e2\u20ac\u0153Yes\u00e2\u20ac \n'
    assert train.clean(broken.replace("\u009d", "")) == 'He said, "Wow"! I don\'t. "Yes"\n'
    assert train.clean("\u201cna\u00efve\u201d \u2014 caf\u00e9\u2026") == '"na\u00efve" -- caf\u00e9...'
    assert train.as_document(" One. \n \n\n Two. ") == "One.\n\nTwo."


def test_documents(train, corpus):
    stories = train.read_v1_valid(corpus / "tinystories_v1_valid_head.txt")
    assert len(stories) == 149 and all(s.startswith("Once upon") for s in stories)  # the first begins inside a story
    assert len(train.read_v1_train(corpus / "tinystories_v1_train_head.txt")) == 149
    assert len(train.read_v2(corpus / "tinystories_v2_valid_head.txt")) == 149
    assert len(train.read_book(corpus / "books" / "one.txt")) == 80


def test_no_copies_across_the_split(train):
    rng = random.Random(1)
    documents = [" ".join(rng.choice("abcdefghij") * 3 + str(rng.randrange(99)) for _ in range(60)) for _ in range(400)]
    split = train.split_documents({"a": documents, "b": [d.upper() for d in documents] + [d + " x" for d in documents]})
    assert not any(d.isupper() for part in split["b"].values() for d in part)  # a copy but for its case is no second document
    root = lambda text: text.removesuffix(" x")
    held = {root(d) for name in split for part in ("valid", "test") for d in split[name][part]}
    trained = {root(d) for name in split for d in split[name]["train"]}
    assert held and trained and not held & trained


def test_fused_kernels(train):
    if not has_extension(train):
        pytest.skip("no C++ compiler")
    assert train.check_ops()


@pytest.mark.parametrize("ops", ["plain", "fused"])
def test_resume_is_exact(train, corpus, tmp_path, ops):
    if ops == "fused" and not has_extension(train):
        pytest.skip("no C++ compiler")
    run(corpus, tmp_path / "whole", "--ops", ops)
    run(corpus, tmp_path / "parts", "--ops", ops, "--stop-at", "4")
    assert not (tmp_path / "parts" / "hf").exists()
    run(corpus, tmp_path / "parts", "--ops", ops, "--resume")
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6 and whole["best"] == parts["best"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    for a, b in zip(whole["average"], parts["average"]):
        assert torch.equal(a, b)


def test_export_equals_transformers(train, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    run(corpus, tmp_path / "run", "--ops", "plain", "--dropout", "0", steps=12)
    folder = tmp_path / "run" / "hf"
    theirs = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = json.loads((folder / "config.json").read_text())
    shape = train.Config(config["vocab_size"], config["hidden_size"], config["num_hidden_layers"])
    ours = train.Mamba(shape, train.PlainOps()).eval()
    ours.load_state_dict(torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"])
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once upon a time Lily found a red stone.").ids
    assert ids[0] == 0  # the tokenizer puts the end marker in front
    with torch.no_grad():
        difference = (ours.logits(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max().item()
    assert difference <= 1e-4


def test_wrong_mix_is_one_line(corpus, tmp_path):
    command = [sys.executable, str(TRAIN), "text", "--data", str(corpus), "--out", str(tmp_path / "r"), "--mix", "v2=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "expected NAME=WEIGHT" in result.stderr
