"""models/train.py: cleaning, the fused kernels, exact resumption, and the export as transformers reads it.

Needs torch, tokenizers, safetensors and, for the last test, transformers; the fused kernels need a C++ compiler.
"""
import importlib.util
import json
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from conftest import run_mamba
from nucleotides import convert

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


@pytest.fixture(scope="module")
def genomes(tmp_path_factory):
    """FASTA of a made-up genome rich in A and T, and of three species that differ in composition."""
    folder = tmp_path_factory.mktemp("genomes")
    rng = random.Random(1)
    draw = lambda n, weights=(1, 1, 1, 1): "".join(rng.choices("ACGT", weights, k=n))
    at_rich = (6, 1, 1, 6)  # 1.59 bits
    (folder / "one.fa").write_text(f">a\n{draw(6000, at_rich)}\n>b\n{'n' * 2000}{draw(4000, at_rich).lower()}\n")
    species = folder / "species"
    species.mkdir()
    with open(species / "mt.fa", "w") as file:
        for name, weights in (("cat", (6, 1, 1, 6)), ("dog_big", (1, 6, 6, 1)), ("dog_small", (1, 6, 6, 1)), ("fox", (6, 6, 1, 1))):
            file.write(f">{name} mitochondrion\n{draw(1600, weights)}\n")
    return folder


def run_dna(command, data, out, *more, steps=6):
    words = [sys.executable, str(TRAIN), command, "--data", str(data), "--out", str(out), "--length", "32,64", "--batch", "8", "--steps", str(steps),
             "--eval-every", "3", "--warmup", "2", "--threads", "2", *more]
    if command == "dna":
        words += ["--d-model", "32", "--n-layer", "2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


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


@pytest.mark.parametrize("command, option", [("audio", "--pool=4"), ("text", "--eval-every=0"), ("dna", "--save-every=0")])
def test_wrong_numbers_are_refused(tmp_path, command, option):
    result = subprocess.run([sys.executable, str(TRAIN), command, "--data", str(tmp_path), "--out", str(tmp_path / "r"), option], capture_output=True, text=True)
    assert result.returncode == 2 and f"argument {option.split('=')[0]}: invalid" in result.stderr


def test_too_few_documents_is_one_line(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "few")
    for path in (tmp_path / "few").glob("tinystories_*"):
        path.write_text("Once upon a time Tom went out.\n\nHe saw a ball.")
    command = [sys.executable, str(TRAIN), "text", "--data", str(tmp_path / "few"), "--out", str(tmp_path / "r")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "none is left for validation" in result.stderr, result.stderr


def test_what_is_not_counted(train):
    """A batch of nothing but N adds nothing, also where a mean over nothing is no number."""
    model = train.Mamba(train.Config(16, 16, 1), train.PlainOps())
    n, bases = np.full(50, 11), np.array([7, 8, 9, 10] * 12)
    alone = train.total_nats(model, [bases], ignored=11)
    assert train.total_nats(model, [n, bases], ignored=11, tokens_a_batch=50) == alone and alone[1] == 47
    assert train.total_nats(model, [n], ignored=11) == (0.0, 0)


def test_nucleotides(train, genomes, tmp_path):
    (tmp_path / "x.fa").write_text(">a m.3243A>G b\nacgtU\nRYN\n>\nT")
    records = train.read_fasta(tmp_path / "x.fa")
    assert [name for name, _ in records] == ["a", ""] and records[0][1].tolist() == [7, 8, 9, 10, 11, 11, 11, 11] and records[1][1].tolist() == [10]
    assert train.reverse_complement(records[0][1]).tolist() == [11, 11, 11, 11, 7, 8, 9, 10]
    parts = train.split_genome([np.arange(1000), np.arange(1000, 1007)])
    assert sorted(np.concatenate([p for pieces in parts.values() for p in pieces])) == list(range(1007))
    assert sum(map(len, parts["valid"])) == pytest.approx(50, abs=2) and [p[0] for p in parts["valid"]][:2] == [90, 290]
    genome = train.ID_OF_LETTER[np.frombuffer(b"ACGTTT" + train.MITOCHONDRIAL_ORIGIN.encode() + b"AAC", np.uint8)]
    assert train.rotate(genome).tolist() == np.roll(genome, -6).tolist() and train.rotate(np.roll(genome, -10)).tolist() == np.roll(genome, -6).tolist()


def test_context_models(train):
    """By hand: counts of both strands, and each order's estimate from the one below."""
    ids = train.ID_OF_LETTER[np.frombuffer(b"ACGNACA", np.uint8)]
    both = "ACGNACA", "TGTNCGT"
    on_both = lambda pieces: [train.bases_of(strand) for p in pieces for strand in (p, train.reverse_complement(p))]
    counts = train.count_contexts(on_both([ids]), 4, 1)
    assert all(counts[a, b] == sum(s[i:i + 2] == "ACGT"[a] + "ACGT"[b] for s in both for i in range(6)) for a in range(4) for b in range(4))
    zero = [sum(s.count(c) for s in both) for c in "ACGT"]
    test = train.ID_OF_LETTER[np.frombuffer(b"ACNGT", np.uint8)]
    tables = [train.count_contexts(on_both([ids, ids[:1]]), 4, order) for order in (0, 1)]
    bits = train.context_model_bits(tables, [train.bases_of(p) for p in (test, test[:1])], 4, 1, [2.0])[0]
    zero = [z + (c in "AT") for c, z in zip("ACGT", zero)]  # the second piece, too short for a context, on both strands
    order0 = [(z + 2 * 0.25) / (sum(zero) + 2) for z in zero]
    expected = [-np.log2((counts[a, b] + 2 * order0[b]) / (counts[a].sum() + 2)) for a, b in ((0, 1), (2, 3))]
    assert bits == pytest.approx(np.mean(expected))


def test_dna_and_species(train, genomes, tmp_path):
    """Pretraining resumes exactly and learns the composition; the classifier tells species apart that differ in composition."""
    run_dna("dna", genomes, tmp_path / "whole", steps=40)
    run_dna("dna", genomes, tmp_path / "parts", "--stop-at", "22", steps=40)
    run_dna("dna", genomes, tmp_path / "parts", "--resume", steps=40)
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["test"]["bits"] < 1.8
    run_dna("species", genomes / "species" / "mt.fa", tmp_path / "species", "--from", str(tmp_path / "whole" / "best.pt"), "--lr", "5e-3", steps=150)
    report = json.loads((tmp_path / "species" / "report.json").read_text())
    assert report["test"]["right at 64"] > 90, report
    config = json.loads((tmp_path / "species" / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "fox"} and config["architectures"] == ["MambaForSequenceClassification"]


def test_the_program_agrees_about_nucleotides(train, genomes, tmp_path):
    """Held-out bits of the report are those of score on the same windows; classify agrees with the definition."""
    run_dna("dna", genomes, tmp_path / "dna", "--ops", "plain", steps=12)
    report = json.loads((tmp_path / "dna" / "report.json").read_text())
    parts = train.read_genome(genomes)
    letters = np.array(list("?" * 7 + "ACGTN????"))
    (tmp_path / "test.fa").write_text("".join(f">{i}\n{''.join(letters[p])}\n" for i, p in enumerate(parts["test"])))
    model = convert(tmp_path / "dna" / "hf", tmp_path / "dna.bin")
    rows = [line.split("\t") for line in run_mamba("score", model, "--fasta", tmp_path / "test.fa", "--window", 64).stdout.decode().splitlines()[1:]]
    nats, bases = sum(float(r[2]) for r in rows), sum(int(r[1]) for r in rows)
    assert nats / bases / np.log(2) == pytest.approx(report["test"]["bits"], abs=1e-4)
    run_dna("species", genomes / "species" / "mt.fa", tmp_path / "species", "--from", str(tmp_path / "dna" / "best.pt"), "--ops", "plain")
    classifier = convert(tmp_path / "species" / "hf", tmp_path / "species.bin")
    best = torch.load(tmp_path / "species" / "best.pt", weights_only=True)
    network = train.Mamba(train.Config(**best["config"]), train.PlainOps()).eval()
    network.load_state_dict(best["model"])
    table = [line.split("\t") for line in
             run_mamba("classify", classifier, "--fasta", genomes / "species" / "mt.fa", "--window", 100).stdout.decode().splitlines()[1:]]
    found = np.array([float(row[2]) for row in table]).reshape(-1, 3)
    assert [row[1] for row in table[:3]] == ["cat", "dog", "fox"]
    windows = [ids[i:i + 100] for _, ids in train.read_fasta(genomes / "species" / "mt.fa") for i in range(0, len(ids), 100)]
    with torch.no_grad():
        expected = torch.softmax(network.classify(torch.from_numpy(np.stack(windows).astype(np.int64))), -1).numpy()
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("words, expected", [(["dna", "--data", "."], "no FASTA file"), (["baselines", "--data", "."], "no FASTA file"),
                                             (["dna", "--data", "missing"], "missing: no FASTA file"), (["species", "--data", "missing", "--from", "x"], "missing: No such file")])
def test_no_data_is_one_line(tmp_path, words, expected):
    more = ["--out", str(tmp_path / "r")] if words[0] != "baselines" else []
    result = subprocess.run([sys.executable, str(TRAIN), *words, *more], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and expected in result.stderr
