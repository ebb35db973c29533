"""models/train.py: cleaning, the fused kernels, exact resumption, what is refused, and the export as transformers reads it.

Needs torch, tokenizers, safetensors and, for the last test, transformers; the fused kernels need a C++ compiler.
"""
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import types

import pytest

from conftest import run_mamba
from nucleotides import convert

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "models" / "train.py"
torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
from sounds import wav  # noqa: E402


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


SHAPES = {"text": ["--vocab", "320", "--d-model", "32", "--n-layer", "2", "--length", "24", "--batch", "4"],
          "dna": ["--d-model", "32", "--n-layer", "2", "--length", "32,64", "--batch", "8"],
          "species": ["--length", "32,64", "--batch", "8"]}


def training(command, data, out, *more, steps=6):
    """The words of a short run."""
    return [command, "--data", str(data), "--out", str(out), *SHAPES[command], "--steps", str(steps), "--eval-every", "3",
            "--warmup", "2", "--threads", "2", *more]


def start(words, status=0, **more):
    done = subprocess.run([sys.executable, str(TRAIN), *words], capture_output=True, text=True, **more)
    assert done.returncode == status, done.stderr
    return done


def refused(words, **more):
    """The one line that says why the program does not do it."""
    line = start(words, status=1, **more).stderr
    assert line.count("\n") == 1 and line.startswith("train.py: "), line
    return line


def run(corpus, out, *more, steps=6):
    return start(training("text", corpus, out, *more, steps=steps))


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
    return start(training(command, data, out, *more, steps=steps))


@pytest.fixture(scope="module")
def pretrained(train, tmp_path_factory):
    """best.pt of a run of dna that has learned nothing."""
    path = tmp_path_factory.mktemp("pretrained") / "best.pt"
    config = train.Config(train.DNA_ROWS, 16, 1)
    torch.save({"task": "dna", "config": vars(config), "model": train.Mamba(config, train.PlainOps()).state_dict()}, path)
    return path


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
    assert "expected NAME=WEIGHT" in refused(["text", "--data", str(corpus), "--out", str(tmp_path / "r"), "--mix", "v2=1"])


@pytest.mark.parametrize("command, option", [
    ("audio", "--pool=4"), ("text", "--eval-every=0"), ("dna", "--save-every=0"), ("dna", "--d-model=0"), ("text", "--n-layer=-1"),
    ("audio", "--n-blocks=0"), ("audio", "--d-state=0"), ("audio", "--length=0"), ("text", "--vocab=0"), ("dna", "--steps=0"),
    ("dna", "--batch=0"), ("dna", "--seed=-1"), ("dna", "--threads=-1"), ("dna", "--dropout=1"), ("dna", "--lr=-1"),
    ("dna", "--lr=nan"), ("baselines", "--order=-1")])
def test_wrong_numbers_are_refused(train, monkeypatch, capsys, command, option):
    more = ["--out", "missing"] * (command != "baselines")
    monkeypatch.setattr(sys, "argv", ["train.py", command, "--data", "missing", *more, option])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and f"argument {option.split('=')[0]}: invalid" in capsys.readouterr().err


def test_too_few_documents_is_one_line(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "few")
    for path in (tmp_path / "few").glob("tinystories_*"):
        path.write_text("Once upon a time Tom went out.\n\nHe saw a ball.")
    assert "none is left for validation" in refused(["text", "--data", str(tmp_path / "few"), "--out", str(tmp_path / "r")])


def test_what_is_not_counted(train):
    """A batch of nothing but N adds nothing, also where a mean over nothing is no number."""
    model = train.Mamba(train.Config(16, 16, 1), train.PlainOps())
    n, bases = np.full(50, 11), np.array([7, 8, 9, 10] * 12)
    alone = train.total_nats(model, [bases], ignored=11)
    assert train.total_nats(model, [n, bases], ignored=11, tokens_a_batch=50) == alone and alone[1] == 47
    assert train.total_nats(model, [n], ignored=11) == (0.0, 0)


def test_text_batches_depend_on_the_step_alone(train):
    """Also epochs later, where --resume begins."""
    corpora = {"a": train.Corpus([np.arange(10 * i, 10 * i + 9) for i in range(7)], [], [], {})}
    batches, again = (train.TextBatches(corpora, {"a": 1.3}, 3, 4, 0) for _ in range(2))
    steps = [(batches.next(step).tolist(), batches.epochs(step + 1)) for step in range(30)]
    assert len({str(ids) for ids, _ in steps}) == 30 and steps[-1][1] > 5
    assert (again.next(29).tolist(), again.epochs(30)) == steps[-1]


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
    assert expected in refused([*words, *["--out", "r"] * (words[0] != "baselines")], cwd=tmp_path)


SPECIES = ["species", "--data", "mt.fa", "--length", "32", "--from"]


@pytest.mark.parametrize("words, expected", [
    ([*SPECIES, "nothere.pt"], "nothere.pt: No such file"),
    ([*SPECIES, "junk.pt"], "junk.pt: cut off, or no best.pt"),
    ([*SPECIES, "last.pt"], "last.pt: cut off, or no best.pt"),
    ([*SPECIES, "text.pt"], "--from text.pt: a model of text, expected one of dna"),
    (["dna", "--data", ".", "--out", "cut", "--resume"], "last.pt: cut off, or no last.pt"),
    (["dna", "--data", ".", "--out", "junk.pt"], "junk.pt: File exists"),
    (["export", "--out", "cut"], "best.pt: cut off, or no best.pt"),
    (["audio", "--data", "letter"], "a_b_c.wav: expected WORD_SPEAKER_TAKE.wav with a number for TAKE"),
    (["audio", "--data", "silent"], "a_b_0.wav: no samples"),
    (["audio", "--data", "junk"], "a_b_0.wav: file does not start with RIFF id"),
    (["audio", "--data", "few"], "few: 0 for train (takes from 8 on), 0 for valid (takes from 5 on), 1 for test"),
    (["audio", "--data", "rates"], "sample rates [8000, 16000]"),
    (["judge", "--data", "few"], "few: 0 for train (takes from 5 on), 1 for test (takes from 0 on), sample rates [8000]"),
    (["judge", "--data", "empty"], "empty: 0 for train")])
def test_mistakes_are_one_line(genomes, pretrained, tmp_path, words, expected):
    shutil.copy(genomes / "species" / "mt.fa", tmp_path)
    saved = torch.load(pretrained, weights_only=True)
    torch.save(saved | {"task": "text"}, tmp_path / "text.pt")
    torch.save({"model": saved["model"], "optimizer": {}}, tmp_path / "last.pt")
    (tmp_path / "junk.pt").write_text("This is no checkpoint.")
    for folder, clips in {"letter": {"c": (8000, 9)}, "silent": {"0": (8000, 0)}, "few": {"0": (8000, 9)},
                          "rates": {"0": (8000, 9), "5": (8000, 9), "8": (16000, 9)}, "junk": {}, "empty": {}, "cut": {}}.items():
        (tmp_path / folder).mkdir()
        for take, (rate, samples) in clips.items():
            (tmp_path / folder / f"a_b_{take}.wav").write_bytes(wav(bytes(2 * samples), rate=rate))
    (tmp_path / "junk" / "a_b_0.wav").write_text("This is no sound.")
    for name in ("best.pt", "last.pt"):
        (tmp_path / "cut" / name).write_bytes(pretrained.read_bytes()[:-100])
    assert expected in refused([*words, *["--out", "r"] * ("--out" not in words and words[0] != "judge")], cwd=tmp_path)


def test_states_that_the_fused_scan_lacks(train, tmp_path):
    if not has_extension(train):
        pytest.skip("no C++ compiler")
    for take in range(9):
        (tmp_path / f"a_b_{take}.wav").write_bytes(wav(bytes(2000)))
    words = ["audio", "--data", str(tmp_path), "--d-model", "16", "--n-blocks", "1", "--length", "64", "--steps", "1",
             "--threads", "1", "--d-state", "8"]
    assert "--d-state 8: the fused scan has 16, --ops plain any number" in refused([*words, "--out", str(tmp_path / "fused")])
    start([*words, "--out", str(tmp_path / "plain"), "--ops", "plain"])


def test_protein_is_no_genome(tmp_path):
    """Its letters are N nearly everywhere, but not so many that it is refused for that alone."""
    rng = random.Random(2)
    (tmp_path / "genome.fa").write_text(">g\n" + "".join(rng.choices("ACGT", k=400)) + "\n")
    (tmp_path / "protein.fa").write_text(">p\n" + "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=20000)) + "\n")
    line = refused(training("dna", tmp_path, tmp_path / "r", "--ops", "plain", "--threads", "1"), timeout=120)  # not for ever
    assert "protein.fa (80% N)" in line and "genome.fa" not in line and line.endswith("; a protein FASTA?\n"), line


@pytest.mark.parametrize("command", ["text", "dna", "species"])
def test_resume_with_other_data(corpus, genomes, pretrained, tmp_path, command):
    """What counts is what the data says, not where it lies."""
    source, name = {"text": (corpus, "tinystories_v2_valid_head.txt"), "dna": (genomes, "one.fa"),
                    "species": (genomes / "species", "mt.fa")}[command]
    shutil.copytree(source, tmp_path / "data")
    path = tmp_path / "data" / name
    data, content = path if command == "species" else path.parent, path.read_text()
    more = ["--ops", "plain", "--stop-at", "1", *["--from", str(pretrained)] * (command == "species")]
    start(training(command, data, tmp_path / "r", *more))
    if command == "species":  # the same genomes in another order are other classes
        path.write_text("".join(f">{record}" for record in reversed(content.split(">")[1:])))
    else:
        path.write_text(content.replace("Lily", "Rosa").replace("ACA", "ATA"))
    line = refused(training(command, data, tmp_path / "r", *more, "--resume"))
    assert f"--resume: {data}: not the data that the run was started with" in line
    path.write_text(content)
    (tmp_path / "data").rename(tmp_path / "moved")
    start(training(command, tmp_path / "moved" / data.relative_to(tmp_path / "data"), tmp_path / "r", *more, "--resume"))


def test_resume_with_fewer_steps(genomes, tmp_path):
    """A run can be cut short, also before its first evaluation: it ends with the weights that it has."""
    run_dna("dna", genomes, tmp_path / "r", "--ops", "plain", "--stop-at", "2")
    assert not (tmp_path / "r" / "best.pt").exists()
    run_dna("dna", genomes, tmp_path / "r", "--ops", "plain", "--resume", steps=1)
    assert json.loads((tmp_path / "r" / "report.json").read_text())["step"] == 2
    assert (tmp_path / "r" / "hf" / "config.json").exists()


def test_signals(train, tmp_path):
    """The first one ends the run after the present step, a second one the program; so does one during the final test."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    o = types.SimpleNamespace(steps=9, stop_at=0, eval_every=99, save_every=99)
    of, found = types.SimpleNamespace(step=0, seconds=0, state=dict, o=o), []

    def train_step():
        of.step += 1
        if of.step == 2:
            signal.raise_signal(signal.SIGTERM)
            found.extend(signal.getsignal(number) for number in numbers)
        return 0.0

    of.train_step = train_step
    try:
        assert not train.train(of, tmp_path) and of.step == 2 and found == [signal.SIG_DFL] * 2
        o.stop_at = 3
        assert not train.train(of, tmp_path) and [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_all_processors_are_those_of_this_process(genomes, tmp_path):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("Linux's")
    one = {min(os.sched_getaffinity(0))}
    words = training("dna", genomes, tmp_path / "r", "--ops", "plain", "--threads", "0", steps=1)
    assert " 1 threads" in start(words, preexec_fn=lambda: os.sched_setaffinity(0, one)).stdout
