#!/usr/bin/env python3
"""Trains the models that this folder ships, on a CPU, and models of nucleotides.

    python train.py text --data FOLDER --out RUN      prepares the corpora, trains, exports RUN/hf (Hugging Face format)
    python train.py dna --data FOLDER --out RUN       next-nucleotide pretraining on the FASTA files of a folder
    python train.py species --data FILE --out RUN --from DNA_RUN/best.pt       a classifier on top of such a model
    python train.py audio --data FOLDER --out RUN     an audio U-Net on the WAV files of a folder
    python train.py COMMAND ... --resume              goes on exactly where RUN/last.pt stopped
    python train.py export --out RUN                  exports the best weights so far of a run that is still going on
    python train.py baselines --data FOLDER           what context models without a network reach on the split of dna or audio
    python train.py judge --data FOLDER --wav FILE    whether generated digits can be told from each other, by a network that knows the real ones
    python train.py check-ops                         compares the fused kernels with float64 autograd of the definitions
    python ../convert_weights.py RUN/hf tales.bin --type q8_0 (--vocab dna)    makes the file that mamba reads

Needs torch, numpy and safetensors, tokenizers for text, and a C++ compiler for the fused kernels (train_ops.cpp). Without
one everything runs in plain PyTorch, some twenty times slower. README.md says how each model was made.

What lies in RUN: log.jsonl (one line a report), last.pt (all that --resume needs), best.pt (the weights with the lowest
held-out loss), hf/ (the exported best.pt), report.json; for text also data/ (tokenizer and token ids).

Sections: 1 text, 2 nucleotides, 3 sound, 4 definitions, 5 fused kernels, 6 models, 7 tasks and their evaluation,
8 judging generated digits, 9 training, 10 export, 11 check of the kernels, 12 command line.
"""
import argparse, ctypes, dataclasses, functools, hashlib, json, math, os, pathlib, platform, re, signal
import subprocess, sys, time, wave

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

END = "<|endoftext|>"  # id 0; stands before every document, so it both opens and separates them
HERE = pathlib.Path(__file__).resolve().parent


# ---- 1. Text: clean, cut into documents, split, tokenize -----------------------------------------------------------

PUNCTUATION = str.maketrans({
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "--",
    "\u2026": "...", "\u00a0": " ", "\u200a": " ", "\ufeff": "", "\r": ""})


def repair_mojibake(text):
    """UTF-8 punctuation (E2 80 xx) that was read as Windows-1252, "\u00e2\u20ac\u0153" for a left quote, is turned back
    by the opposite round trip. A right double quote (E2 80 9D) has lost its last byte: cp1252 has no 9D."""
    def back(match):
        try:
            return match.group().encode("cp1252").decode("utf-8")
        except UnicodeError:
            return "\u201d" + match.group()[2:]
    return re.sub("\u00e2\u20ac[^\\x00-\\x7f\u00e2]?", back, text)


def clean(text):
    """ASCII quotes and dashes, no spaces at line ends."""
    return re.sub(r"[ \t]+\n", "\n", repair_mojibake(text).translate(PUNCTUATION))


def as_document(text):
    """Paragraphs separated by one blank line."""
    return "\n\n".join(p.strip() for p in re.split(r"\n\s*\n", text) if p.strip())


# How the stories of a file without separators begin. The second pattern introduces somebody.
OPENING = re.compile(
    r"Once\b|"
    r"(?:[A-Z]\w+(?:,? (?:and|the) \w+)*) (?:(?:was|is) an? [\w ]+ (?:who|that)\b|"
    r"(?:are|were) (?:\w+ )?(?:friends|twins|playing)\b|(?:like|likes|liked|love|loves|loved) to )")
DAY_OPENING = re.compile(r"One [\w ]*day\b|It was an? [\w ]*day\b|There (?:was|were|lived) ")


def group_stories(parts, opens):
    """Joins parts to stories; a part that `opens` begins a new one."""
    stories = []
    for part in filter(str.strip, parts):
        if opens(part) or not stories:
            stories.append(part)
        else:
            stories[-1] += "\n\n" + part
    return stories


def read_v2(path):
    """TinyStories V2: stories between end markers, one line a paragraph. The file is the head of a longer one, so its
    last story is cut off."""
    return [story.replace("\n", "\n\n") for story in clean(path.read_text("utf-8")).split(END)][:-1]


def read_v1_train(path):
    """TinyStories V1 without end markers: a single line break stands between stories (and between some paragraphs), a
    blank line between paragraphs. The last story is cut off."""
    parts = re.split(r"(?<!\n)\n(?!\n)", clean(path.read_text("utf-8")))
    return group_stories(parts, lambda p: OPENING.match(p) or DAY_OPENING.match(p))[:-1]


def read_v1_valid(path):
    """As above, but blank lines stand everywhere, so "One day" may well open a second paragraph. Begins inside a story."""
    parts = re.split(r"\n+", clean(path.read_text("utf-8")))
    return group_stories(parts, OPENING.match)[1:-1]


def read_book(path):
    """Chapters and tales. A heading is a short line alone that does not end as a sentence does."""
    def heading(paragraph):
        return len(paragraph) <= 60 and "\n" not in paragraph and re.match(r"[A-Z]", paragraph) and paragraph[-1].isalnum()
    chapters, before = [], False
    for paragraph in as_document(clean(path.read_text("utf-8"))).split("\n\n"):
        now = bool(heading(paragraph))
        if not chapters or (now and not before):
            chapters.append(paragraph)
        else:
            chapters[-1] += "\n\n" + paragraph
        before = now
    return chapters


TEXT_CORPORA = {  # name: files and their readers
    "v2": [("tinystories_v2_valid_head.txt", read_v2)],
    "v1": [("tinystories_v1_train_head.txt", read_v1_train), ("tinystories_v1_valid_head.txt", read_v1_valid)],
    "books": [("books/*.txt", read_book)],
}
STORIES = ("v2", "v1")  # the corpora whose held-out loss picks the best checkpoint


def words_of(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def split_documents(corpora):
    """{name: documents} to {name: {"train" | "valid" | "test": documents}}: 1 in 40 valid (picks the checkpoint), 1 in
    40 test (is only reported). The hash of a document's words decides, so that the split is the same everywhere and copies fall on
    the same side. Training documents that share a fifth of their 8-word sequences with held-out ones are dropped, too."""
    splits, seen, held = {}, set(), set()
    grams = lambda words: {tuple(words[i:i + 8]) for i in range(len(words) - 7)}
    for name, documents in corpora.items():
        splits[name] = {"train": [], "valid": [], "test": []}
        for text in documents:
            words = words_of(text)
            digest = hashlib.sha256(" ".join(words).encode()).digest()
            if len(words) < 30 or digest in seen:
                continue
            seen.add(digest)
            part = {0: "valid", 1: "test"}.get(int.from_bytes(digest[:4], "little") % 40, "train")
            splits[name][part].append(text)
            if part != "train":
                held |= grams(words)
    for name in splits:
        train = splits[name]["train"]
        share = [len(g & held) / max(1, len(g)) for g in (grams(words_of(t)) for t in train)]
        splits[name]["train"] = [t for t, s in zip(train, share) if s < 0.2]
    return splits


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE with GPT-2's pre-tokenisation. Encoding a text puts END in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


@dataclasses.dataclass
class Corpus:
    train: list  # of int64 arrays of ids, each beginning with END
    valid: list
    test: list
    bytes: dict  # part: UTF-8 bytes of its texts


def digest_of(data):
    """Of strings, numbers and arrays in lists and dictionaries, whose order does not count."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=lambda a: hashlib.sha256(a).hexdigest()).encode()).hexdigest()


def prepare_text(folder, out, mix, vocab_size):
    """The corpora as token ids, and the tokenizer. Kept in out/data; made anew when a source, this program's cleaning or
    the mix has changed."""
    from tokenizers import Tokenizer
    cache, folder = out / "data", pathlib.Path(folder)
    sources = {name: [(path, reader) for pattern, reader in entries for path in sorted(folder.glob(pattern))]
               for name, entries in TEXT_CORPORA.items()}
    for name, files in sources.items():
        if not files:
            patterns = ", ".join(pattern for pattern, _ in TEXT_CORPORA[name])
            sys.exit(f"train.py: {folder}: no file of the corpus {name}, expected {patterns}")
    corpora = {name: [as_document(d) for path, reader in files for d in reader(path)] for name, files in sources.items()}
    digest, index = digest_of([corpora, mix, vocab_size]), cache / "index.json"
    if not index.exists() or json.loads(index.read_text())["digest"] != digest:
        if (out / "last.pt").exists():  # its weights know the ids of the tokenizer that is there
            sys.exit(f"train.py: --resume: {folder}: not the data that the run was started with, says {index}; give those, or "
                     "another --out")
        cache.mkdir(parents=True, exist_ok=True)
        splits = split_documents(corpora)
        rng = np.random.default_rng(0)  # the tokenizer sees the corpora in the proportions of the training mix
        texts = [t for name, parts in splits.items() for t in parts["train"] if rng.random() < mix[name]]
        tokenizer = train_tokenizer(texts, vocab_size)
        tokenizer.save(str(cache / "tokenizer.json"))
        info = {"digest": digest, "corpora": {}}
        for name, parts in splits.items():
            info["corpora"][name] = {}
            for part, documents in parts.items():
                ids = [e.ids for e in tokenizer.encode_batch(documents)]
                np.save(cache / f"{name}.{part}.npy", np.array([i for d in ids for i in d], np.uint16))
                info["corpora"][name][part] = {"documents": len(documents), "tokens": sum(map(len, ids)),
                                               "bytes": sum(len(t.encode()) for t in documents)}
        write_atomically(index, json.dumps(info, indent=1).encode())
    info = json.loads(index.read_text())["corpora"]
    def load(name, part):
        ids = np.load(cache / f"{name}.{part}.npy").astype(np.int64)
        return np.split(ids, np.flatnonzero(ids == 0)[1:]) if len(ids) else []
    return ({name: Corpus(*(load(name, part) for part in ("train", "valid", "test")),
                          {part: info[name][part]["bytes"] for part in info[name]}) for name in info},
            Tokenizer.from_file(str(cache / "tokenizer.json")), info)


class TextBatches:
    """Documents in a new order each epoch, run together and cut into windows of length + 1. Epoch e depends on (seed, e)
    alone, and so a step's windows on (seed, step). A corpus of weight 1.3 goes in once and 30 % of it once more."""
    def __init__(self, corpora, mix, batch, length, seed):
        self.documents = [(d, mix[name]) for name, c in corpora.items() for d in c.train]
        self.batch, self.length, self.seed, self.epoch, self.first = batch, length, seed, 0, 0  # first: step of the epoch
        self.windows = self.cut()

    def cut(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        copies = [int(weight + rng.random()) for _, weight in self.documents]
        chosen = rng.permutation(np.repeat(np.arange(len(self.documents)), copies))
        stream = np.concatenate([self.documents[i][0] for i in chosen])[rng.integers(self.length):]
        count = len(stream) // (self.length + 1)
        if count < self.batch:
            sys.exit(f"train.py: an epoch has {len(stream)} tokens, too few for a batch of {self.batch} x {self.length}")
        windows = stream[:count * (self.length + 1)].reshape(count, self.length + 1)
        return windows[rng.permutation(count)]

    def next(self, step):
        """The ids [batch, length + 1] of a step, which may lie epochs ahead, as --resume has it, but not behind."""
        while (step - self.first + 1) * self.batch > len(self.windows):
            self.epoch, self.first = self.epoch + 1, self.first + len(self.windows) // self.batch
            self.windows = self.cut()
        begin = (step - self.first) * self.batch
        return torch.from_numpy(self.windows[begin:begin + self.batch])

    def epochs(self, step):
        return self.epoch + (step - self.first) * self.batch / len(self.windows)


# ---- 2. Nucleotides: FASTA, splits, windows -----------------------------------------------------------------------

# HyenaDNA's and Caduceus' numbering, 12 tokens padded to 16 rows: convert_weights.py --vocab dna.
A, C, G, T, N, DNA_ROWS = 7, 8, 9, 10, 11, 16
ID_OF_LETTER = np.full(256, N, np.uint8)  # IUPAC's other letters are N, lower case (soft masking) is upper case
COMPLEMENT = np.arange(DNA_ROWS, dtype=np.uint8)
for letters, number, complement in [(b"Aa", A, T), (b"Cc", C, G), (b"Gg", G, C), (b"Tt", T, A)]:
    ID_OF_LETTER[list(letters)] = number
    COMPLEMENT[number] = complement


def read_fasta(path):
    """[(first word of the name or "", ids uint8 [bases])] of a file's records."""
    records = []
    for part in re.split(rb"(?m)^>", pathlib.Path(path).read_bytes())[1:]:
        name, _, sequence = part.partition(b"\n")
        letters = np.frombuffer(sequence.translate(None, b" \t\r\n"), np.uint8)
        records.append(((name.decode(errors="replace").split() or [""])[0], ID_OF_LETTER[letters]))
    if not records:
        sys.exit(f"train.py: {path}: no FASTA record, expected a line that begins with >")
    return records


def reverse_complement(ids):
    return COMPLEMENT[ids[::-1]]


def split_genome(sequences, blocks=100):
    """{"train" | "valid" | "test": pieces}. Of each sequence's hundred blocks every twentieth is valid and another twentieth
    test: many short pieces, because a single satellite or cluster of repeats would make a long one easy or hard. (By place
    alone: sequences that are copies of each other, or of one species, belong in one folder only when that is meant.)"""
    parts = {"train": [], "valid": [], "test": []}
    for ids in sequences:
        begin = 0
        for i in range(blocks):
            part = {9: "valid", 19: "test"}.get(i % 20)
            if part:
                cuts = [begin, len(ids) * i // blocks, len(ids) * (i + 1) // blocks]
                parts["train"].append(ids[cuts[0]:cuts[1]])
                parts[part].append(ids[cuts[1]:cuts[2]])
                begin = cuts[2]
        parts["train"].append(ids[begin:])
    return {part: [piece for piece in pieces if len(piece)] for part, pieces in parts.items()}


def genome_files(folder):
    files = sorted(path for path in pathlib.Path(folder).glob("*") if path.suffix in (".fa", ".fasta", ".fna"))
    if not files:
        sys.exit(f"train.py: {folder}: no FASTA file, expected *.fa, *.fasta or *.fna")
    return files


def read_genome(folder):
    return split_genome([ids for path in genome_files(folder) for _, ids in read_fasta(path)])


def at_step(lengths, step, steps):
    """The length of the windows at a step: sequence length warm-up (E.3.2) spends equal parts of the steps on each."""
    return lengths[min(len(lengths) - 1, step * len(lengths) // steps)]


def uniform_window(rng, pieces, length):
    """A window at one of all places where one of this length fits into a piece."""
    places = np.array([max(0, len(piece) - length + 1) for piece in pieces])
    piece = pieces[rng.choice(len(places), p=places / places.sum())]
    start = rng.integers(len(piece) - length + 1)
    return piece[start:start + length]


def either_strand(rng, window):
    return reverse_complement(window) if rng.integers(2) else window


class GenomeBatches:
    """Windows at uniform places of either strand. A step's windows depend on (seed, step, steps) alone. The tokens of a step
    stay the same while the windows grow."""
    def __init__(self, pieces, o):
        self.pieces, self.o = [p for p in pieces if len(p) > max(o.length)], o
        if not self.pieces:
            sys.exit(f"train.py: --length {max(o.length)}: no sequence is longer than that")

    def next(self, step):
        rng = np.random.default_rng([self.o.seed, step])
        length = at_step(self.o.length, step, self.o.steps)
        rows, tries = [], 0
        while len(rows) < self.count(length):
            window, tries = uniform_window(rng, self.pieces, length + 1), tries + 1
            if np.mean(window == N) < 0.5:  # a gap of the assembly teaches nothing
                rows.append(either_strand(rng, window))
                tries = 0
            elif tries == 1000:  # these are no gaps
                files = {path: np.concatenate([ids for _, ids in read_fasta(path)]) == N for path in genome_files(self.o.data)}
                path = max(files, key=lambda path: files[path].sum())
                sys.exit(f"train.py: {path} ({files[path].mean():.0%} N): {tries} windows of {length + 1} letters in a row were N "
                         "for at least half, expected nucleotides; a protein FASTA?")
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def count(self, length):
        """Windows a step, of this length."""
        return max(1, self.o.batch * self.o.length[0] // length)

    def epochs(self, step):
        return step * self.o.batch * self.o.length[0] / sum(map(len, self.pieces))


MITOCHONDRIAL_ORIGIN = "GTTTATGTAGCTTA"  # the gene of tRNA-Phe, where most records of a mammal's mitochondrion begin


def rotate(ids):
    """A circular genome from MITOCHONDRIAL_ORIGIN on, so that the same part of each species is held out."""
    text, origin = ids.tobytes(), ID_OF_LETTER[list(MITOCHONDRIAL_ORIGIN.encode())].tobytes()
    at = (text + text[:len(origin)]).find(origin)
    return np.roll(ids, -max(at, 0))


def read_species(path):
    """{part: {species: [ids]}}: of each genome the second quarter is test, the eighth behind it valid, the rest train. A record
    belongs to the species that its name's first word says, up to an underscore."""
    parts = {"train": {}, "valid": {}, "test": {}}
    for name, ids in read_fasta(path):
        ids = rotate(ids)
        cuts = [len(ids) * i // 8 for i in (0, 2, 4, 5, 8)]
        for part, begin, end in zip(("train", "test", "valid", "train"), cuts, cuts[1:]):
            parts[part].setdefault(name.split("_")[0], []).append(ids[begin:end])
    return parts


class SpeciesBatches(GenomeBatches):
    """A uniform species, a uniform place in its genomes (E.3.4), a window there of a length drawn from --length. One
    strand: those of a mitochondrion are not alike."""
    def __init__(self, species, o):
        self.species, self.o = list(species.values()), o
        self.pieces = [p for pieces in self.species for p in pieces]
        if min(max(map(len, pieces)) for pieces in self.species) < max(o.length):
            sys.exit(f"train.py: --length {max(o.length)}: a species has no sequence of that length to train on")

    def next(self, step):
        rng = np.random.default_rng([self.o.seed, step])
        length = int(rng.choice(self.o.length))
        labels = rng.integers(len(self.species), size=self.count(length))
        rows = [uniform_window(rng, self.species[label], length) for label in labels]
        return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(labels)


# ---- 3. Sound: WAV, mu-law, splits, rows ----------------------------------------------------------------------------

SILENCE = 128  # the code of 0, and the token that a clip begins from


def read_wav(path):
    """(samples float64 [n] from -1 to 1, sample rate) of a 16-bit mono file."""
    try:
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                sys.exit(f"train.py: {path}: {file.getnchannels()} channels of {8 * file.getsampwidth()} bits, expected one of 16")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
            if not len(samples):
                sys.exit(f"train.py: {path}: no samples")
            return samples, file.getframerate()
    except (EOFError, ValueError, wave.Error) as error:
        sys.exit(f"train.py: {path}: {error if str(error) else 'not a whole WAV file'}")


def normalize(samples, kind):
    """A clip scaled to [-1, 1]: "minmax" from its lowest to its highest sample, as SaShiMi's code does, which moves silence away from
    0; "peak" by its largest magnitude, which does not; "none" not at all. A silent clip stays at 0."""
    low, high, peak = samples.min(), samples.max(), np.abs(samples).max()
    if kind == "minmax" and high > low:
        return -1 + 2 * (samples - low) / (high - low + 1e-6)
    if kind == "peak" and peak > 0:
        return samples / peak
    return samples if kind == "none" else np.zeros_like(samples)


def mu_law_encode(a):
    """Codes 0 to 255 of samples from -1 to 1; SaShiMi's formula, epsilons included."""
    companded = np.sign(a) * np.log1p(255 * np.abs(a + 1e-8)) / np.log(256)
    return np.clip((companded + 1) / 2 * 255.99 + 0.005, 0, 255).astype(np.uint8)


def mu_law_decode(codes):
    v = codes / 128 - 1
    return np.sign(v) * (256 ** np.abs(v) - 1) / 255


def read_takes(folder, read, lowest):
    """({part: [(word, speaker, read(samples))]}, sample rate) of the files WORD_SPEAKER_TAKE.wav. lowest: {part: its first take},
    the highest one first."""
    parts, rates = {part: [] for part in lowest}, set()
    for path in sorted(pathlib.Path(folder).glob("*_*_*.wav")):
        word, speaker, take = path.stem.rsplit("_", 2)
        if not take.isdecimal():
            sys.exit(f"train.py: {path}: expected WORD_SPEAKER_TAKE.wav with a number for TAKE")
        samples, rate = read_wav(path)
        parts[next(part for part in lowest if int(take) >= lowest[part])].append((word, speaker, read(samples)))
        rates.add(rate)
    if not all(parts.values()) or len(rates) != 1:
        found = ", ".join(f"{len(clips)} for {part} (takes from {lowest[part]} on)" for part, clips in parts.items())
        sys.exit(f"train.py: {folder}: {found}, sample rates {sorted(rates)}; expected WORD_SPEAKER_TAKE.wav of one rate for each")
    return parts, rates.pop()


def read_clips(folder, kind):
    """({"train" | "valid" | "test": [codes uint8]}, sample rate, {speaker: its training clips}). Takes 0 to 4 are test, as the
    corpus of spoken digits has it, 5 to 7 valid."""
    takes, rate = read_takes(folder, lambda x: mu_law_encode(normalize(x, kind)), {"train": 8, "valid": 5, "test": 0})
    speakers = {}
    for _, speaker, codes in takes["train"]:
        speakers.setdefault(speaker, []).append(codes)
    return {part: [codes for _, _, codes in clips] for part, clips in takes.items()}, rate, speakers


class ClipBatches:
    """Rows of clips of one speaker with pauses between them, each from its beginning. A step's rows depend on (seed, step)
    alone."""
    def __init__(self, speakers, rate, o):
        self.speakers, self.rate, self.o = list(speakers.values()), rate, o

    def row(self, rng):
        clips, parts, length = self.speakers[rng.integers(len(self.speakers))], [[SILENCE]], 1
        while length <= self.o.length:
            clip = clips[rng.integers(len(clips))]
            pause = np.full(rng.integers(self.rate // 20, self.rate // 5), SILENCE, np.uint8)
            parts += [clip, pause]
            length += len(clip) + len(pause)
        return np.concatenate(parts)[:self.o.length + 1]

    def next(self, step):
        rng = np.random.default_rng([self.o.seed, step])
        return torch.from_numpy(np.stack([self.row(rng) for _ in range(self.o.batch)]).astype(np.int64))

    def epochs(self, step):
        return step * self.o.batch * self.o.length / sum(len(c) for clips in self.speakers for c in clips)


# ---- 4. Definitions in plain PyTorch: what the fused kernels compute ---------------------------------------------

def input_factor(A, delta, zoh):
    """What the discretised B is times B: (exp(delta A) - 1) / A as equation 4 of the paper has it (zero-order hold), or delta, which
    its code computes."""
    return torch.expm1(delta * A) / A if zoh else delta


def selective_scan(u, dt, A, bc, D, z, dt_bias, zoh=False):
    """The selective SSM of Mamba (arXiv 2312.00752, Algorithm 2; S6), its D skip and its gate.
    u, dt, z [batch, time, d_inner]; A [d_inner, d_state], real or complex; bc [batch, time, 2 d_state], of complex states with
    the real and the imaginary part of each number side by side; D, dt_bias [d_inner]. A complex state stands for its
    conjugate, too, which makes y twice its real part."""
    delta = F.softplus(dt + dt_bias)
    B, C = bc.chunk(2, dim=-1)
    if A.is_complex():
        B, C = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (B, C))
    h, ys = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + input_factor(A, step, zoh) * B[:, t, None, :] * u[:, t, :, None]
        y = (h * C[:, t, None, :]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    return (torch.stack(ys, 1) + D * u) * F.silu(z)


def fixed_scan(u, delta, A, B, C, D, z, zoh=False):
    """The same with B, C [d_inner, d_state] and delta [d_inner] that do not depend on the input (Algorithm 1; S4), which makes it
    a convolution of u with k_l = C exp(delta A)^l B."""
    length, width = u.shape[1], math.isqrt(u.shape[1] - 1) + 1
    step = delta[:, None]
    weight = C * B * input_factor(A, step, zoh)
    # exp(delta A (width i + j)) as the product of a power for i and one for j: a matrix product instead of d_inner x d_state x time
    power = lambda i: torch.exp(step[..., None] * A[..., None] * i)  # [d_inner, d_state, width]
    i = torch.arange(width, dtype=u.dtype)
    kernel = ((weight[..., None] * power(width * i)).transpose(1, 2) @ power(i)).flatten(1)[:, :length]
    kernel = 2 * kernel.real if A.is_complex() else kernel
    padded = 1 << (2 * length - 1).bit_length()  # so that the ends do not meet; a power of two is transformed fastest
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=padded) * torch.fft.rfft(kernel, n=padded)
    y = torch.fft.irfft(spectrum, n=padded)[..., :length].transpose(1, 2)
    return (y + D * u) * F.silu(z)


def causal_conv(x, weight, bias):
    """silu of a depthwise convolution that sees the present step and the three before. x [batch, time, channels];
    weight [4, channels]."""
    y = F.conv1d(F.pad(x.transpose(1, 2), (weight.shape[0] - 1, 0)), weight.t()[:, None], bias, groups=x.shape[2])
    return F.silu(y).transpose(1, 2)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def tied_cross_entropy(x, embedding, target):
    """Mean cross-entropy of the logits x @ embedding.T [rows, vocab]; negative targets are left out."""
    return F.cross_entropy(x @ embedding.t(), target, ignore_index=-100)


class PlainOps:
    half = False  # activations are float32
    scan, conv, cross_entropy = staticmethod(selective_scan), staticmethod(causal_conv), staticmethod(tied_cross_entropy)
    norm = staticmethod(rms_norm)


# ---- 5. Fused kernels: the same four functions from train_ops.cpp ------------------------------------------------

LANES, STATES = 16, 16  # train_ops.cpp: channels come in multiples of the one, d_state is the other


def cpu_flags():
    """The instruction sets of this processor, as Linux names them; empty elsewhere."""
    try:
        line = next(l for l in open("/proc/cpuinfo") if l.startswith(("flags", "Features")))
        return set(line.split(":")[1].split())
    except (OSError, StopIteration):
        return set()


@functools.lru_cache(None)
def build_library():
    """Compiles train_ops.cpp into the user's cache, under a name of its own for each source and kind of processor."""
    source = HERE / "train_ops.cpp"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-march=native", "-fopenmp", "-ffp-contract=fast",
               "-fPIC", "-shared"]
    if "avx512f" in cpu_flags():
        command.append("-mprefer-vector-width=512")
    kind = json.dumps([source.read_text(), command, platform.machine(), sorted(cpu_flags())])
    kind = hashlib.sha256(kind.encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mamba-train"
    library = folder / f"train_ops-{kind}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*command, str(source), "-o", str(temporary)], check=True, stderr=subprocess.PIPE, text=True)
        os.replace(temporary, library)
    return ctypes.CDLL(str(library))


class Activations(ctypes.Structure):
    """struct Tensor of train_ops.cpp."""
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "len", "channels", "stride", "half")]


def activations(x):
    """Describes x [batch, len, channels] (or [rows, channels], a single sequence), whose rows are equally spaced."""
    shape, stride = (x.shape, x.stride()) if x.dim() == 3 else ((1, *x.shape), (x.numel(), *x.stride()))
    assert x.dtype in (torch.float32, torch.bfloat16)
    assert stride[2] == 1 and (shape[0] == 1 or stride[0] == shape[1] * stride[1]), "rows must be equally spaced"
    assert shape[2] % LANES == 0, f"channels must be a multiple of {LANES}, found {shape[2]}"
    return Activations(x.data_ptr(), *shape, stride[1], x.dtype == torch.bfloat16)


def call(name, *args):
    """Calls ops_NAME. Activations go by reference, numbers as float, other tensors (contiguous float32 or int64) by
    address."""
    def convert(a):
        if isinstance(a, Activations):
            return ctypes.byref(a)
        if isinstance(a, bool):
            return ctypes.c_int64(a)
        if isinstance(a, float):
            return ctypes.c_float(a)
        assert a.is_contiguous() and a.dtype in (torch.float32, torch.int64)
        return ctypes.c_void_p(a.data_ptr())
    function = getattr(build_library(), "ops_" + name)
    function.restype = None
    function(*map(convert, args))


def like(*tensors):
    return [torch.empty(x.shape, dtype=x.dtype) for x in tensors]


class FusedScan(torch.autograd.Function):
    """A is real or complex; as a complex number it stands for its conjugate, too."""
    @staticmethod
    def forward(ctx, u, dt, A, bc, D, z, bias):
        if A.shape[1] != STATES:
            sys.exit(f"train.py: --d-state {A.shape[1]}: the fused scan has {STATES}, --ops plain any number")
        batch, length, channels = u.shape
        (y,), bcf = like(u), bc.float()  # B and C converted once here, not once a channel block
        A, is_complex = (torch.view_as_real(A.resolve_conj()).contiguous(), True) if A.is_complex() else (A.contiguous(), False)
        states = torch.empty(batch, -(-length // 16), channels // LANES, A[0].numel(), LANES)  # before every 16 steps
        call("scan", *map(activations, (u, dt)), A, is_complex, activations(bcf), D, activations(z), bias, activations(y), states)
        ctx.save_for_backward(u, dt, A, bcf, D, z, bias, states)
        ctx.dtype, ctx.is_complex = bc.dtype, is_complex
        return y

    @staticmethod
    def backward(ctx, gy):
        u, dt, A, bcf, D, z, bias, states = ctx.saved_tensors
        gy = gy.contiguous()
        gu, gdt, gA, gbc, gD, gz, gbias = like(u, dt, A, bcf, D, z, bias)
        call("scan_grad", *map(activations, (gy, u, dt)), A, ctx.is_complex, activations(bcf), D, activations(z), bias, states,
             activations(gu), activations(gdt), gA, activations(gbc), gD, activations(gz), gbias)
        return gu, gdt, torch.view_as_complex(gA) if ctx.is_complex else gA, gbc.to(ctx.dtype), gD, gz, gbias


class FusedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        assert weight.shape[0] == 4, f"the fused convolution has width 4, found {weight.shape[0]}"
        y, = like(x)
        call("conv", activations(x), weight, bias, activations(y))
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, weight, bias = ctx.saved_tensors
        gy = gy.contiguous()
        gx, gweight, gbias = like(x, weight, bias)
        call("conv_grad", activations(gy), activations(x), weight, bias, activations(gx), gweight, gbias)
        return gx, gweight, gbias


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, half):
        x = x.contiguous()
        y = torch.empty(x.shape, dtype=torch.bfloat16 if half else torch.float32)
        scale = torch.empty(x.shape[:-1])
        call("norm", x, weight, activations(y), scale, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, weight, scale = ctx.saved_tensors
        gy = gy.contiguous()
        gx, gweight = like(x, weight)
        call("norm_grad", activations(gy), x, weight, scale, gx, gweight)
        return gx, gweight, None, None


class FusedCrossEntropy(torch.autograd.Function):
    """The logits exist for ROWS rows at a time and become their own gradient, so they stay near the cache."""
    ROWS = 1024

    @staticmethod
    def forward(ctx, x, embedding, target, half, needs_grad):
        dtype = torch.bfloat16 if half else torch.float32
        xs, E, target, count = x.to(dtype), embedding.to(dtype), target.contiguous(), max(1, (target >= 0).sum().item())
        gx, gE, losses = torch.empty_like(xs), torch.zeros_like(embedding), torch.empty(len(xs))
        for i in range(0, len(xs), FusedCrossEntropy.ROWS):
            rows = slice(i, i + FusedCrossEntropy.ROWS)
            logits = xs[rows] @ E.t()
            call("xent", activations(logits), target[rows], 1 / count, losses[rows])
            if needs_grad:
                gx[rows] = logits @ E
                gE += logits.t() @ xs[rows]
        ctx.save_for_backward(gx, gE)
        ctx.dtype = x.dtype
        return losses.sum() / count

    @staticmethod
    def backward(ctx, g):
        gx, gE = ctx.saved_tensors
        return (gx * g).to(ctx.dtype), gE * g, None, None, None


class FusedOps:
    scan, conv = staticmethod(FusedScan.apply), staticmethod(FusedConv.apply)

    def __init__(self, half):
        build_library()
        self.half = half

    def norm(self, x, weight, eps):
        return FusedNorm.apply(x, weight, eps, self.half)

    def cross_entropy(self, x, embedding, target):
        return FusedCrossEntropy.apply(x, embedding, target, self.half, torch.is_grad_enabled())


def choose_ops(wanted, precision):
    """Fused kernels where they can be built; bfloat16 activations where the processor multiplies them natively."""
    half = precision == "bf16" or (precision == "auto" and "avx512_bf16" in cpu_flags())
    if wanted != "plain":
        try:
            return FusedOps(half)
        except (OSError, subprocess.CalledProcessError) as error:  # no compiler, or one that fails
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            if wanted == "fused":
                sys.exit(f"train.py: the fused kernels could not be built: {reason}")
            print(f"train.py: the fused kernels could not be built ({reason}); going on in plain PyTorch, about twenty "
                  "times slower", file=sys.stderr)
    return PlainOps()


# ---- 6. Models: Mamba-1 with transformers' tensor names, and the U-Net --------------------------------------------------------------

@dataclasses.dataclass
class Config:
    vocab_size: int = 4096
    d_model: int = 256
    n_layer: int = 8
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    eps: float = 1e-5
    n_labels: int = 0  # classes of a classifier, which has no language head; 0: a language model
    ssm: str = "s6"    # or s4: B, C and delta do not depend on the input
    numbers: str = "real"            # or complex: of A, B, C and the states
    discretization: str = "delta_b"  # or zoh, see input_factor
    norm: str = "rmsnorm"            # or layernorm

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def dt_rank(self):
        return math.ceil(self.d_model / 16)


class LockedDropout(nn.Module):
    """One mask per sequence and channel, the same at every step: almost no random numbers, where nn.Dropout draws one an
    element, and a channel that is missing for a whole window is also the stronger regulariser for a recurrent model."""
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return x * ((torch.rand(x.shape[0], 1, x.shape[2]) >= self.p) / (1 - self.p)).to(x.dtype)


def uniform(rows, cols):
    return torch.empty(rows, cols).uniform_(-cols ** -0.5, cols ** -0.5)


class Weight(nn.Module):
    """A weight (and bias) under the name that transformers gives it."""
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)


class Mixer(nn.Module):
    """The Mamba block without its norm (figure 3 of the paper), with either SSM. A begins as S4D-Real or S4D-Lin (section 3.6)."""
    def __init__(self, c):
        super().__init__()
        self.in_proj = Weight(uniform(2 * c.d_inner, c.d_model))
        self.conv1d = Weight((torch.rand(c.d_inner, 1, c.d_conv) * 2 - 1) * c.d_conv ** -0.5, torch.zeros(c.d_inner))
        is_complex = c.numbers == "complex"
        if c.ssm == "s6":
            self.x_proj = Weight(uniform(c.dt_rank + 2 * c.d_state * (1 + is_complex), c.d_inner))
            self.dt_proj = Weight(uniform(c.d_inner, c.dt_rank), self.random_steps(c))
        else:
            self.dt_bias = nn.Parameter(self.random_steps(c))
            self.B = nn.Parameter(torch.ones(c.d_inner, c.d_state))
            self.C = nn.Parameter(torch.randn(c.d_inner, c.d_state))
            if is_complex:
                self.B = nn.Parameter(torch.stack([self.B.detach(), torch.zeros_like(self.B)], -1))
                self.C = nn.Parameter(torch.randn(c.d_inner, c.d_state, 2) * 0.5 ** 0.5)
        if is_complex:
            self.A_log = nn.Parameter(torch.full((c.d_inner, c.d_state), math.log(0.5)))
            self.A_imag = nn.Parameter(math.pi * torch.arange(c.d_state).repeat(c.d_inner, 1).float())
        else:
            self.A_log = nn.Parameter(torch.log(torch.arange(1.0, c.d_state + 1)).repeat(c.d_inner, 1))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = Weight(uniform(c.d_model, c.d_inner) / math.sqrt(c.n_layer))
        self.c = c

    @staticmethod
    def random_steps(c):
        """Biases that softplus takes to step sizes from 0.001 to 0.1."""
        dt = torch.exp(torch.rand(c.d_inner) * math.log(0.1 / 0.001) + math.log(0.001))
        return dt + torch.log(-torch.expm1(-dt))

    def forward(self, x, ops):
        # The halves of in_proj (x and z) and of x_proj (dt and B, C) are separate products: their gradients then need not
        # be copied together.
        c = self.c
        in_x, in_z = self.in_proj.weight.split(c.d_inner)
        u = ops.conv(F.linear(x, in_x), self.conv1d.weight[:, 0].t().contiguous(), self.conv1d.bias)
        z = F.linear(x, in_z)
        A, zoh = -torch.exp(self.A_log), c.discretization == "zoh"
        if c.numbers == "complex":
            A = torch.complex(A, self.A_imag)
        if c.ssm == "s4":
            B, C = (torch.view_as_complex(x) if c.numbers == "complex" else x for x in (self.B, self.C))
            y = fixed_scan(u, F.softplus(self.dt_bias), A, B, C, self.D, z, zoh)
        else:
            to_dt, to_bc = self.x_proj.weight.split([c.dt_rank, self.x_proj.weight.shape[0] - c.dt_rank])
            dt = F.linear(F.linear(u, to_dt), self.dt_proj.weight)
            rest = u, dt, A, F.linear(u, to_bc), self.D, z, self.dt_proj.bias
            y = selective_scan(*rest, zoh=True) if zoh else ops.scan(*rest)
        return F.linear(y, self.out_proj.weight)


class Norm(Weight):
    def __init__(self, c):
        super().__init__(torch.ones(c.d_model), torch.zeros(c.d_model) if c.norm == "layernorm" else None)
        self.c = c

    def forward(self, x, ops):
        if self.c.norm == "layernorm":
            return F.layer_norm(x, (self.c.d_model,), self.weight, self.bias, self.c.eps)
        return ops.norm(x, self.weight, self.c.eps)


class Layer(nn.Module):
    def __init__(self, c, dropout):
        super().__init__()
        self.norm, self.mixer = Norm(c), Mixer(c)
        self.dropout = LockedDropout(dropout)

    def forward(self, x, ops):
        return x + self.dropout(self.mixer(self.norm(x, ops), ops))


class Mamba(nn.Module):
    """Embedding, layers, norm; the head is the embedding. The residual stream is float32."""
    def __init__(self, config, ops, dropout=0.0):
        super().__init__()
        self.config, self.ops = config, ops
        self.backbone = nn.Module()
        self.backbone.embeddings = Weight(torch.randn(config.vocab_size, config.d_model) * 0.02)
        self.backbone.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.n_layer))
        self.backbone.norm_f = Norm(config)
        self.dropout = LockedDropout(dropout)
        if config.n_labels:
            self.score = Weight(torch.randn(config.n_labels, config.d_model) * 0.02)

    def hidden(self, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.ops.half):
            x = self.dropout(F.embedding(ids, self.backbone.embeddings.weight))
            for layer in self.backbone.layers:
                x = layer(x, self.ops)
            return self.backbone.norm_f(x, self.ops)

    def loss(self, ids, target):
        """Mean nats per token over the targets that are not negative. ids, target [batch, time]."""
        return self.ops.cross_entropy(self.hidden(ids).flatten(0, 1), self.backbone.embeddings.weight, target.flatten())

    def logits(self, ids):
        return self.hidden(ids).float() @ self.backbone.embeddings.weight.t()

    def classify(self, ids):
        """Logits [batch, n_labels]: the classifier reads the last position (E.3.4)."""
        return self.hidden(ids)[:, -1].float() @ self.score.weight.t()


@dataclasses.dataclass
class UNetConfig:
    """Sizes of the U-Net of section 4.4 and E.4, in the words of config.json."""
    d_model: int = 64                   # of the outermost stages; it doubles at each pooling
    n_blocks: int = 3                   # a stage
    pool: list = dataclasses.field(default_factory=lambda: [16, 16])  # samples that become one, the outermost first
    stages: list = dataclasses.field(default_factory=lambda: [["s4", "complex"]] * 5)  # in order of flow
    vocab_size: int = 256
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    discretization: str = "delta_b"
    norm: str = "layernorm"
    eps: float = 1e-5
    sample_rate: int = 8000
    start_token: int = 128              # silence
    normalization: str = "peak"         # of a clip before mu-law, see mu_law_encode

    def stage(self, i):
        """The Config of the blocks of stage i."""
        ssm, numbers = self.stages[i]
        level = min(i, 2 * len(self.pool) - i)
        return Config(d_model=self.d_model << level, n_layer=self.n_blocks * len(self.stages), d_state=self.d_state,
                      d_conv=self.d_conv, expand=self.expand, ssm=ssm, numbers=numbers, discretization=self.discretization,
                      norm=self.norm, eps=self.eps)


class Stage(nn.Module):
    def __init__(self, c, n_blocks, pool, dropout):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(c, dropout) for _ in range(n_blocks))
        if pool:  # [rows, cols] of the linear map
            self.pool = Weight(uniform(*pool), torch.zeros(pool[0]))


def pool_down(x, p, pool):
    """[batch, time, H] to [batch, time / p, 2 H]: p steps side by side, feature h of step s at h p + s."""
    return F.linear(x.unflatten(1, (-1, p)).transpose(2, 3).flatten(2), pool.weight, pool.bias)


def pool_up(x, p, pool):
    """[batch, time, 2 H] to [batch, p time, H]. What comes of a step is used from the next one on, or samples would see
    themselves."""
    x = F.pad(F.linear(x, pool.weight, pool.bias)[:, :-1], (0, 0, 1, 0))
    return x.unflatten(2, (-1, p)).transpose(2, 3).flatten(1, 2)


class UNet(nn.Module):
    """Two poolings, each with stages of blocks before and behind; a skip lands behind every block on the way up."""
    def __init__(self, config, ops, dropout=0.0):
        super().__init__()
        self.config, self.ops = config, ops
        n, pools, last = config.n_blocks, len(config.pool), len(config.stages) - 1
        width = lambda level: config.d_model << level
        self.embed = Weight(torch.randn(config.vocab_size, config.d_model))
        self.down = nn.ModuleList(Stage(config.stage(s), n, (width(s + 1), width(s) * config.pool[s]), dropout) for s in range(pools))
        self.center = Stage(config.stage(pools), n, None, dropout)
        self.up = nn.ModuleList(Stage(config.stage(last - s), n, (width(s) * config.pool[s], width(s + 1)), dropout)
                                for s in range(pools))
        self.norm = Norm(config)
        self.head = Weight(uniform(config.vocab_size, config.d_model), torch.zeros(config.vocab_size))

    def logits(self, ids):
        """[batch, time, vocab_size] for ids that begin with the start token; any length."""
        ops, pools, skips = self.ops, self.config.pool, []
        x = F.embedding(F.pad(ids, (0, -ids.shape[1] % math.prod(pools))), self.embed.weight)
        for stage, p in zip(self.down, pools):
            for block in stage.blocks:
                skips.append(x)
                x = block(x, ops)
            skips.append(x)
            x = pool_down(x, p, stage.pool)
        skips.append(x)
        for block in self.center.blocks:
            x = block(x, ops)
        x = x + skips.pop()
        for stage, p in zip(reversed(self.up), reversed(pools)):
            x = pool_up(x, p, stage.pool) + skips.pop()
            for block in stage.blocks:
                x = block(x, ops) + skips.pop()
        return F.linear(self.norm(x, ops), self.head.weight, self.head.bias)[:, :ids.shape[1]]

    def loss(self, ids, target):
        """Mean nats per token over the targets that are not negative. ids, target [batch, time]."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), target.flatten(), ignore_index=-100)


# ---- 7. Tasks: what is read, what its loss is, how it is judged -----------------------------------------------------
#
# A task has: name; config; batches; describe(), lines about its data; loss(model, batch), in nats; unit and in_unit(nats), how
# training losses are reported; scores(model, part), {name: value} with the value that picks the checkpoint, the lower the
# better, under the key `chooses`; and what Task has a default of.

class Task:
    labels = None  # of a classifier
    digest = None  # of the data, which --resume wants to be the same wherever they lie; those of text are known by index.json

    def initialise(self, model):
        """What a new model begins with, other than random weights."""

    def show(self, model):
        """Samples for the eye."""
        return []


@torch.no_grad()
def total_nats(model, documents, ignored=-1, tokens_a_batch=8192):
    """(-ln p, tokens counted) of all documents, each read from its first token with an empty state; the first token and
    those equal to `ignored` are not counted. Short ones share a batch; what lies behind the end of a document cannot change it,
    since the model is causal, and is not counted either."""
    model.eval()
    total, counted = 0.0, 0
    for group in by_length(documents, tokens_a_batch):
        width = max(map(len, group))
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        target = torch.full((len(group), width - 1), -100)
        for row, document in enumerate(group):
            ids[row, :len(document)] = torch.from_numpy(document)
            target[row, :len(document) - 1] = torch.from_numpy(document[1:])
        target[target == ignored] = -100
        count = (target >= 0).sum().item()
        if count:  # the mean over nothing is not 0
            total, counted = total + model.loss(ids[:, :-1], target).item() * count, counted + count
    model.train()
    return total, counted


def by_length(documents, tokens_a_batch):
    """Groups of documents of similar length that are no more than tokens_a_batch together, padding included."""
    group = []
    for document in sorted(documents, key=len):
        if group and (len(group) + 1) * len(document) > tokens_a_batch:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


@torch.no_grad()
def sample(model, tokenizer, prompt, count=200, temperature=0.8, top_k=40, seed=1):
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        values, tokens = (model.logits(torch.tensor([ids]))[0, -1] / temperature).topk(top_k)
        ids.append(tokens[torch.multinomial(torch.softmax(values, -1), 1, generator=generator)].item())
        if ids[-1] == 0:
            break
    model.train()
    return tokenizer.decode(ids)


class TextTask(Task):
    """The next token of stories. Judged by held-out bits per UTF-8 byte."""
    name, unit, chooses = "text", "bits per byte", "stories"

    def __init__(self, o, out):
        mix = dict(parse_mix(o.mix))
        self.corpora, self.tokenizer, self.info = prepare_text(o.data, out, mix, o.vocab)
        if not any(self.corpora[name].valid for name in STORIES if name in self.corpora):
            sys.exit(f"train.py: {o.data}: too few documents: none is left for validation")
        rows = -(-self.tokenizer.get_vocab_size() // LANES) * LANES  # a small corpus may have fewer merges than --vocab
        self.config = Config(vocab_size=rows, d_model=o.d_model, n_layer=o.n_layer)
        self.batches = TextBatches(self.corpora, mix, o.batch, o.length, o.seed)
        total = lambda kind: sum(self.info[name]["train"][kind] * weight for name, weight in mix.items())
        self.bytes_a_token = total("bytes") / total("tokens")

    def describe(self):
        return [f"{name}: " + "; ".join(f"{part} {i['documents']} documents, {i['bytes']} bytes, {i['tokens']} tokens"
                                        for part, i in parts.items()) for name, parts in self.info.items()]

    @staticmethod
    def loss(model, ids):
        return model.loss(ids[:, :-1], ids[:, 1:])

    def in_unit(self, nats):
        return nats / math.log(2) / self.bytes_a_token

    def scores(self, model, part):
        """-log2 p per UTF-8 byte of each corpus's documents, and "stories" over all of STORIES together."""
        nats = {name: total_nats(model, getattr(c, part))[0] for name, c in self.corpora.items() if getattr(c, part)}
        result = {name: n / math.log(2) / self.corpora[name].bytes[part] for name, n in nats.items()}
        stories = [name for name in STORIES if name in nats]
        result["stories"] = (sum(nats[n] for n in stories) / math.log(2) /
                             sum(self.corpora[n].bytes[part] for n in stories))
        return result

    def show(self, model):
        return [f"--- sample {seed}:\n{sample(model, self.tokenizer, 'Once upon a time', seed=seed)}" for seed in (1, 2)]


class GenomeTask(Task):
    """The next nucleotide; N is read but neither predicted nor counted. Judged by held-out bits per base."""
    name, unit, chooses = "dna", "bits per base", "bits"

    def __init__(self, o, out):
        self.parts, self.o = read_genome(o.data), o
        self.digest = digest_of(self.parts)
        self.config = Config(vocab_size=DNA_ROWS, d_model=o.d_model, n_layer=o.n_layer)
        self.batches = GenomeBatches(self.parts["train"], o)

    def describe(self):
        return [f"{part}: {len(pieces)} pieces, {sum(map(len, pieces))} bases, {sum((p == N).sum() for p in pieces)} of them N"
                for part, pieces in self.parts.items()]

    @staticmethod
    def loss(model, ids):
        target = ids[:, 1:]
        return model.loss(ids[:, :-1], target.masked_fill(target == N, -100))

    @staticmethod
    def in_unit(nats):
        return nats / math.log(2)

    def scores(self, model, part):
        """-log2 p per base in windows of the longest --length, each read from an empty state, as score --window does."""
        length = max(self.o.length)
        windows = [p[i:i + length].astype(np.int64) for p in self.parts[part] for i in range(0, len(p), length)]
        nats, bases = total_nats(model, [w for w in windows if len(w) > 1], ignored=N, tokens_a_batch=16 * length)
        return {"bits": nats / math.log(2) / bases}


class SpeciesTask(Task):
    """Which species a window of a genome is from (E.3.4). Judged by the held-out part of each genome."""
    name, unit, chooses = "species", "nats", "nats"

    def __init__(self, o, out):
        self.parts, self.o = read_species(o.data), o
        self.labels = list(self.parts["train"])
        self.digest = digest_of([self.labels, self.parts])
        self.batches = SpeciesBatches(self.parts["train"], o)
        self.start = load(o.start, "best.pt")
        if self.start["task"] != "dna":
            sys.exit(f"train.py: --from {o.start}: a model of {self.start['task']}, expected one of dna")
        self.config = Config(**self.start["config"] | {"n_labels": len(self.labels)})

    def initialise(self, model):
        """The pretrained backbone; the classifier is new."""
        model.load_state_dict(self.start["model"] | {"score.weight": model.score.weight})

    def describe(self):
        return [f"{part}: " + ", ".join(f"{name} {sum(map(len, pieces))}" for name, pieces in species.items())
                for part, species in self.parts.items()]

    @staticmethod
    def loss(model, batch):
        """Of the species, which is asked for at every 128th position: each prefix of a window is a window, and the last position
        alone gives little to learn from. Beside it the loss of the next nucleotide, or the model does not come to know the
        genomes' differences."""
        ids, labels = batch
        hidden, target = model.hidden(ids), ids[:, 1:].masked_fill(ids[:, 1:] == N, -100)
        step = math.gcd(ids.shape[1], 128)
        logits = hidden[:, step - 1::step].float() @ model.score.weight.t()
        return (F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])) +
                model.ops.cross_entropy(hidden[:, :-1].flatten(0, 1), model.backbone.embeddings.weight, target.flatten()))

    @staticmethod
    def in_unit(nats):
        return nats

    @torch.no_grad()
    def scores(self, model, part):
        """Accuracy by window length, in percent, each species weighing the same: windows at every eighth of
        their length. And the mean loss of all of them, which picks the checkpoint."""
        model.eval()
        result, losses = {}, []
        for length in self.o.length:
            right = []
            for label, pieces in enumerate(self.parts[part].values()):
                windows = [p[i:i + length] for p in pieces for i in range(0, len(p) - length + 1, max(1, length // 8))]
                if not windows:
                    continue
                logits = torch.cat([model.classify(torch.from_numpy(np.stack(windows[i:i + 64]).astype(np.int64)))
                                    for i in range(0, len(windows), 64)])
                target = torch.full((len(windows),), label)
                losses.append(F.cross_entropy(logits, target).item())
                right.append((logits.argmax(-1) == target).double().mean().item())
            if right:
                result[f"right at {length}"] = 100 * float(np.mean(right))
        model.train()
        return result | {"nats": float(np.mean(losses))}


class AudioTask(Task):
    """The next sample. Judged by held-out bits per sample of whole clips, each from its beginning."""
    name, unit, chooses = "audio", "bits per sample", "bits"

    def __init__(self, o, out):
        self.parts, rate, speakers = read_clips(o.data, o.normalization)
        self.digest = digest_of(self.parts)
        self.config = UNetConfig(d_model=o.d_model, n_blocks=o.n_blocks, pool=o.pool, stages=o.stages, d_state=o.d_state,
                                 discretization=o.discretization, norm=o.norm, sample_rate=rate, start_token=SILENCE,
                                 normalization=o.normalization)
        self.batches = ClipBatches(speakers, rate, o)

    def describe(self):
        return [f"{part}: {len(clips)} clips, {sum(map(len, clips))} samples" for part, clips in self.parts.items()]

    @staticmethod
    def loss(model, ids):
        return model.loss(ids[:, :-1], ids[:, 1:])

    @staticmethod
    def in_unit(nats):
        return nats / math.log(2)

    def scores(self, model, part):
        clips = [np.concatenate([[SILENCE], clip]).astype(np.int64) for clip in self.parts[part]]
        nats, samples = total_nats(model, clips, tokens_a_batch=32768)
        return {"bits": nats / math.log(2) / samples}


TASKS = {task.name: task for task in (TextTask, GenomeTask, SpeciesTask, AudioTask)}


def context_codes(symbols, size, order):
    """For each symbol from `order` on: its context and itself as one number in base `size`, and whether all of them are symbols:
    negative ones are none."""
    count = max(0, len(symbols) - order)
    code, clean = np.zeros(count, np.int64), np.ones(count, bool)
    for i in range(order + 1):
        letters = symbols[i:i + count]
        code = code * size + letters
        clean &= letters >= 0
    return code, clean


def count_contexts(pieces, size, order):
    """Counts [size^order, size] of the symbols behind each context of `order` symbols."""
    counts = np.zeros(size ** (order + 1), np.int64)
    for piece in pieces:
        code, clean = context_codes(piece, size, order)
        counts += np.bincount(code[clean], minlength=len(counts))
    return counts.reshape(-1, size)


def context_model_bits(tables, pieces, size, order, strengths):
    """-log2 p per symbol of a context model with backoff, one figure for each of `strengths`: the estimate of order k is the
    counts of order k plus `strength` times the estimate of order k - 1, and order 0 begins from the uniform one. (A
    Dirichlet prior for each context, MacKay and Peto 1995.) The first `order` symbols of a piece are not scored."""
    bits = np.zeros(len(strengths))
    scored = 0
    for piece in pieces:
        at = [context_codes(piece, size, k) for k in range(order + 1)]
        clean = np.flatnonzero(at[order][1])
        scored += len(clean)
        for i, strength in enumerate(strengths):
            estimate = np.full(len(clean), 1 / size)
            for k, table in enumerate(tables):
                code = at[k][0][clean + order - k]
                context, symbol = code // size, code % size
                estimate = (table[context, symbol] + strength * estimate) / (table[context].sum(1) + strength)
            bits[i] -= np.log2(estimate).sum()
    return bits / scored


def bases_of(ids):
    """0 to 3, and -1 for N."""
    return np.where(ids == N, -1, ids.astype(np.int64) - A)


def baselines(o):
    """Prints held-out bits per symbol of context models; their strength is the best one on the valid part."""
    if any(pathlib.Path(o.data).glob("*.wav")):
        unit, size, parts = "sample", 256, read_clips(o.data, "peak")[0]
        parts = {part: [clip.astype(np.int64) for clip in clips] for part, clips in parts.items()}
    else:
        unit, size, parts = "base", 4, read_genome(o.data)
        parts["train"] = parts["train"] + [reverse_complement(piece) for piece in parts["train"]]
        parts = {part: [bases_of(piece) for piece in pieces] for part, pieces in parts.items()}
    strengths = [2 ** k for k in range(-1, 11)]
    for order in o.order:
        tables = [count_contexts(parts["train"], size, k) for k in range(order + 1)]
        bits = lambda part, chosen: context_model_bits(tables, parts[part], size, order, chosen)
        best = strengths[int(np.argmin(bits("valid", strengths)))]
        print(f"order {order}: valid {bits('valid', [best])[0]:.4f}, test {bits('test', [best])[0]:.4f} bits per {unit} "
              f"(strength {best})", flush=True)


# ---- 8. Judging generated digits -----------------------------------------------------------------------------------------

MEL_BANDS, FRAMES = 32, 64  # what the judge sees of a clip: 0.64 s at 8 kHz


def mel_filters(bins, rate):
    """Triangles [MEL_BANDS, bins] over the bins of a power spectrum, equally spaced on the mel scale (O'Shaughnessy 1987)."""
    to_hz = lambda mel: 700 * (10 ** (mel / 2595) - 1)
    edges = to_hz(torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), MEL_BANDS + 2)) / (rate / 2) * (bins - 1)
    bin_ = torch.arange(bins)[None]
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.clamp(torch.minimum((bin_ - left) / (middle - left), (right - bin_) / (right - middle)), min=0)


def log_mel(clip, rate):
    """[MEL_BANDS, FRAMES] of a clip of any length, in its middle; loudness does not count."""
    x = torch.tensor(clip, dtype=torch.float32)
    power = torch.stft(x, 256, hop_length=rate // 100, window=torch.hann_window(256), return_complex=True, pad_mode="constant").abs() ** 2
    mel = torch.log(mel_filters(len(power), rate) @ power + 1e-4)
    missing = FRAMES - mel.shape[1]
    mel = F.pad(mel, (missing // 2, missing - missing // 2), value=mel.min().item()) if missing >= 0 else mel[:, -missing // 2:][:, :FRAMES]
    return (mel - mel.mean()) / (mel.std() + 1e-5)


class Judge(nn.Module):
    """A small convolutional network from log-mel spectrograms to words."""
    def __init__(self, words):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 8)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(2048, words))

    def forward(self, mels):
        return self.layers(mels[:, None])


def train_judge(mels, labels, words, epochs=20):
    judge = Judge(words)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(mels)).split(32):
            moved = torch.roll(mels[rows], (int(torch.randint(-2, 3, ())), int(torch.randint(-6, 7, ()))), (1, 2))
            F.cross_entropy(judge(moved), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
    return judge.eval()


def clips_between_pauses(samples, rate):
    """What lies between at least 40 ms of exact silence and is 0.1 s or longer."""
    silent = np.concatenate([[True], samples == 0, [True]])
    edges = np.flatnonzero(np.diff(silent.astype(int)))  # begin and end of each run of other samples
    runs = edges.reshape(-1, 2).tolist()
    joined = runs[:1]
    for begin, end in runs[1:]:
        if begin - joined[-1][1] < rate // 25:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    return [samples[begin:end] for begin, end in joined if end - begin >= rate // 10]


@torch.no_grad()
def opinion(judge, clips, rate):
    """What the judge makes of clips: (log-probabilities [clips, words], a line of figures). The inception score is
    exp(mean KL(p(word | clip) || p(word))), from 1 to the number of words (table 4 of the paper has it, by another judge)."""
    logp = torch.log_softmax(judge(torch.stack([log_mel(clip, rate) for clip in clips])), -1)
    p = logp.exp()
    score = math.exp((p * (logp - p.mean(0).log())).sum(1).mean().item())
    return logp, (f"{len(clips)} clips, mean {np.mean([len(c) for c in clips]) / rate:.2f} s; likeliest word has p {p.max(1).values.mean():.3f} on average, over 0.9 in "
                  f"{(p.max(1).values > 0.9).double().mean():.1%}; {len(set(p.argmax(1).tolist()))} words; inception score {score:.2f}")


def judge_sound(o):
    """Trains the judge on the training clips of --data and has it listen to the test clips, to those with their samples in another
    order (a control), and to the clips of each --wav."""
    torch.manual_seed(0)
    takes, rate = read_takes(o.data, lambda x: normalize(x, "peak"), {"train": 5, "test": 0})
    words = sorted({word for word, _, _ in takes["train"]})
    labels = {part: torch.tensor([words.index(word) for word, _, _ in clips]) for part, clips in takes.items()}
    judge = train_judge(torch.stack([log_mel(x, rate) for _, _, x in takes["train"]]), labels["train"], len(words))
    test = [x for _, _, x in takes["test"]]
    logp, line = opinion(judge, test, rate)
    print(f"test clips, {(logp.argmax(1) == labels['test']).double().mean():.1%} of them named right: {line}")
    rng, block = np.random.default_rng(0), rate // 20
    print("the same, samples in random order within 50 ms:", opinion(judge, [np.concatenate([rng.permutation(x[i:i + block]) for i in range(0, len(x), block)]) for x in test], rate)[1])
    for path in o.wav:
        clips = clips_between_pauses(read_wav(path)[0], rate)
        print(f"{path}:", opinion(judge, clips, rate)[1] if clips else "no clips between pauses", flush=True)


# ---- 9. Training -----------------------------------------------------------------------------------------------------

def write_atomically(path, content):
    """Whole or not at all, also when the machine stops in between."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path, kind):
    """A checkpoint of that kind, "best.pt" or "last.pt"."""
    with open(path, "rb") as file:
        try:
            content = torch.load(file, weights_only=True)
            content[{"best.pt": "task", "last.pt": "optimizer"}[kind]]
        except Exception:  # one for each way in which a file can be broken
            sys.exit(f"train.py: {path}: cut off, or no {kind} of a run")
    return content


class Run:
    """Everything that a training run carries from step to step."""
    def __init__(self, model, task, options):
        self.model, self.task, self.batches, self.o = model, task, task.batches, options
        own = ("A_log", "A_imag", "B", "C")  # of the SSM
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.rsplit(".", 1)[-1] not in own]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]  # norms, conv, A, D, biases: no decay
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": options.weight_decay},
                                            {"params": rest, "weight_decay": 0.0}],
                                           lr=options.lr, betas=(0.9, 0.95), fused=True)
        self.average = [p.detach().clone() for p in model.parameters()]  # exponential moving average of the weights
        self.step, self.best, self.seconds = 0, math.inf, 0.0

    def learning_rate(self):
        """Linear warm-up, constant, and over the last part of the steps a line down to a fiftieth. Unlike a cosine over all
        steps this lets a run be cut short or prolonged with --resume --steps."""
        left = (self.o.steps - self.step) / max(1, self.o.decay * self.o.steps)
        return self.o.lr * min(1, (self.step + 1) / max(1, self.o.warmup)) * max(0.02, min(1, left))

    def train_step(self):
        batch = self.batches.next(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.o.clip)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            sys.exit(f"train.py: step {self.step}: loss {loss.item()}, gradient norm {norm.item()}; try a lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.o.ema, (1 + self.step) / (10 + self.step))  # follows quickly at first
        torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.item()

    def swap_average(self):
        """Exchanges the weights and their average; a second call undoes it."""
        for p, average in zip(self.model.parameters(), self.average):
            kept = p.data.clone()
            p.data.copy_(average)
            average.copy_(kept)

    def state(self):
        return {"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict(),
                "step": self.step, "best": self.best, "seconds": self.seconds, "rng": torch.get_rng_state(),
                "options": comparable(self.o), "digest": self.task.digest}

    def restore(self, state):
        if state.get("digest", self.task.digest) != self.task.digest:
            sys.exit(f"train.py: --resume: {self.o.data}: not the data that the run was started with; give those, or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        torch.set_rng_state(state["rng"])


def comparable(options):
    """The options that decide the result; another value of one of them would not be the same run."""
    free = ("data", "out", "resume", "eval_every", "save_every", "threads", "start", "ops", "precision", "stop_at", "steps", "keep")
    return {name: value for name, value in vars(options).items() if name not in free}


def evaluate(run, out):
    """Held-out scores of the weights and of their average; best.pt keeps the better of the two, if it is the best so far."""
    scores = {}
    for kind in ("weights", "average"):
        if kind == "average":
            run.swap_average()
        scores[kind] = run.task.scores(run.model, "valid")
        if scores[kind][run.task.chooses] < run.best or (run.o.keep == "last" and kind == "average"):
            run.best = scores[kind][run.task.chooses]
            write_atomically(out / "best.pt", {
                "task": run.task.name, "model": run.model.state_dict(), "step": run.step, "kind": kind,
                "config": dataclasses.asdict(run.model.config), "labels": run.task.labels, "valid": scores[kind],
                "length": max(run.o.length) if isinstance(run.o.length, list) else run.o.length})
    run.swap_average()
    return scores


def train(run, out):
    """Steps, reports, checkpoints. SIGINT and SIGTERM end the run after the present step, ready for --resume; a second one, or
    one after the last step, ends the program at once."""
    def handle(handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)
    stop, losses = [], []
    handle(lambda *_: (stop.append(1), handle(signal.SIG_DFL)))
    last = min(run.o.stop_at or run.o.steps, run.o.steps)
    if run.step >= run.o.steps:  # --resume with fewer --steps: the run ends with the weights of now
        evaluate(run, out)
    while run.step < last and not stop:
        began = time.perf_counter()
        losses.append(run.train_step())
        run.seconds += time.perf_counter() - began
        if run.step % run.o.eval_every == 0 or run.step == run.o.steps:
            scores = evaluate(run, out)
            report = {"step": run.step, "epoch": round(run.batches.epochs(run.step), 2), "lr": run.learning_rate(),
                      "train": run.task.in_unit(np.mean(losses)), "unit": run.task.unit, "valid": scores,
                      "best": run.best, "seconds": round(run.seconds), "seconds_a_step": run.seconds / run.step}
            losses = []
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(report) + "\n")
            print(f"step {run.step}/{run.o.steps} epoch {report['epoch']} train {report['train']:.4f} {run.task.unit} | "
                  f"held-out: {short(scores['weights'])} | average: {short(scores['average'])} | best {run.best:.4f} | "
                  f"{report['seconds_a_step']:.2f} s a step", flush=True)
        if run.step % run.o.save_every == 0:
            write_atomically(out / "last.pt", run.state())
    write_atomically(out / "last.pt", run.state())
    handle(signal.SIG_DFL)
    return run.step >= run.o.steps


def short(scores):
    return " ".join(f"{name} {value:.4g}" for name, value in scores.items())


# ---- 10. Export -------------------------------------------------------------------------------------------------------

def export_hugging_face(model, folder, length, tokenizer=None, labels=None):
    """The folder that transformers' MambaForCausalLM.from_pretrained and convert_weights.py read. (For nucleotides there is
    no tokenizer: convert_weights.py --vocab dna. transformers has no Mamba classifier; the names are those it would have.)
    length: of the longest windows it was trained on, in tokens; the program says when a text is longer."""
    from safetensors.torch import save_file
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, str(folder / "model.safetensors"),
              metadata={"format": "pt"})
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} if tokenizer else {}
    classes = {"id2label": dict(enumerate(labels))} if labels else {}
    config = {
        "architectures": ["MambaForSequenceClassification" if labels else "MambaForCausalLM"],
        "model_type": "mamba", "vocab_size": c.vocab_size, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer, "state_size": c.d_state, "expand": c.expand, "intermediate_size": c.d_inner,
        "conv_kernel": c.d_conv, "time_step_rank": c.dt_rank, "layer_norm_epsilon": c.eps, "hidden_act": "silu",
        "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True, "tie_word_embeddings": True,
        "max_position_embeddings": length, **ends, **classes, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_prefix_space": False, "bos_token": END,
            "eos_token": END, "clean_up_tokenization_spaces": False}, indent=2) + "\n")


def export_unet(model, folder):
    """config.json and model.safetensors of a U-Net, as convert_weights.py reads them."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, str(folder / "model.safetensors"),
              metadata={"format": "pt"})
    config = {"model_type": "mamba_unet", **dataclasses.asdict(model.config)}
    config["layer_norm_epsilon"] = config.pop("eps")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def new_model(config, ops, dropout=0.0):
    return (UNet if isinstance(config, UNetConfig) else Mamba)(config, ops, dropout)


def export_best(out, ops):
    """Exports out/best.pt to out/hf. Returns its model and a report."""
    if not (out / "best.pt").exists():
        sys.exit(f"train.py: {out / 'best.pt'} does not exist: the run has not been evaluated yet, or failed")
    best = load(out / "best.pt", "best.pt")
    model = new_model((UNetConfig if best["task"] == "audio" else Config)(**best["config"]), ops)
    model.load_state_dict(best["model"])
    tokenizer = None
    if (out / "data" / "tokenizer.json").exists():
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    if best["task"] == "audio":
        export_unet(model, out / "hf")
    else:
        export_hugging_face(model, out / "hf", best.get("length", 2**20), tokenizer, best.get("labels"))
    report = {"step": best["step"], "kind": best["kind"], "valid": best["valid"]}
    print(f"step {report['step']} ({report['kind']}): valid {short(report['valid'])}", flush=True)
    return model, report


# ---- 11. Check of the kernels -----------------------------------------------------------------------------------------

def relative_error(a, b):
    """Largest difference over largest magnitude (zero over zero is zero); a NaN stays one."""
    return ((wide(a) - wide(b)).abs().max() / b.abs().max().double().clamp(min=1e-30)).item()


def wide(x):
    """In double precision."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def check_one(name, fused, plain, inputs, tolerance):
    """Value and every gradient of `fused` against float64 autograd of `plain`, at the same (possibly rounded) inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    doubles = [wide(x.detach()).requires_grad_() for x in inputs]
    out, reference = fused(*inputs), plain(*doubles)
    seed = torch.randn(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, seed), torch.autograd.grad(reference, doubles, seed.double())
    errors = [relative_error(a.detach(), b.detach()) for a, b in [(out, reference), *zip(*gradients)]]
    passed = all(e <= tolerance for e in errors)
    print(f"{'ok  ' if passed else 'FAIL'} {name:44s} value {errors[0]:.1e}, gradients up to {max(errors[1:]):.1e} "
          f"(allowed {tolerance:.0e})")
    return passed


def check_ops():
    """Odd lengths, lengths around the chunk of 16, both precisions, padding in the targets."""
    torch.manual_seed(0)
    passed = []
    for half in (False, True):
        ops, dtype = choose_ops("fused", "bf16" if half else "float32"), torch.bfloat16 if half else torch.float32
        tolerance = 2e-2 if half else 2e-5
        act = lambda *shape: torch.randn(*shape).to(dtype)
        for batch, length, channels in [(1, 1, 16), (2, 16, 32), (3, 37, 48), (5, 17, 16), (1, 64, 32)]:
            A = -torch.rand(channels, STATES) * 8 - 0.1
            inputs = [act(batch, length, channels), act(batch, length, channels), A, act(batch, length, 2 * STATES),
                      torch.randn(channels), act(batch, length, channels), torch.randn(channels)]
            shape = f"[{batch}, {length}, {channels}] {dtype}"
            passed.append(check_one(f"scan {shape}", ops.scan, selective_scan, inputs, tolerance))
            inputs[2:4] = torch.complex(A, torch.randn(channels, STATES) * 9), act(batch, length, 4 * STATES)
            passed.append(check_one(f"complex scan {shape}", ops.scan, selective_scan, inputs, max(tolerance, 1e-4)))  # angles of many turns
            inputs = [act(batch, length, channels), torch.randn(4, channels), torch.randn(channels)]
            passed.append(check_one(f"conv {shape}", ops.conv, causal_conv, inputs, tolerance))
        passed.append(check_one(f"norm [3, 5, 64] {dtype}", lambda x, w: ops.norm(x, w, 1e-5),
                                lambda x, w: rms_norm(x, w, 1e-5), [torch.randn(3, 5, 64), torch.randn(64)], tolerance))
        target = torch.randint(0, 96, (1100,))  # more rows than the kernel takes at a time
        target[::7] = -100
        passed.append(check_one(f"cross-entropy [1100, 96] {dtype}", lambda x, E: ops.cross_entropy(x, E, target),
                                lambda x, E: tied_cross_entropy(x, E, target),
                                [act(1100, 48), torch.randn(96, 48)], 2 * tolerance))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return all(passed)


# ---- 12. Command line -------------------------------------------------------------------------------------------------

def parse_mix(text):
    """"v2=1,books=0.3" to pairs."""
    try:
        mix = [(name, float(weight)) for name, weight in (item.split("=") for item in text.split(","))]
    except ValueError:
        mix = []
    if {name for name, _ in mix} != set(TEXT_CORPORA) or any(weight < 0 for _, weight in mix):
        sys.exit(f"train.py: --mix {text}: expected NAME=WEIGHT,... with a weight for each of {', '.join(TEXT_CORPORA)}")
    return mix


def command_train(o):
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS binds none
    torch.set_num_threads(o.threads or processors)
    torch.set_flush_denormal(True)
    torch.manual_seed(o.seed)
    out = pathlib.Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "last.pt").exists() and not o.resume:
        sys.exit(f"train.py: {out}: holds a run already; give --resume to go on with it or another --out")
    if o.resume:
        state = load(out / "last.pt", "last.pt")
        for key, value in comparable(o).items():
            if state["options"].get(key, value) != value:
                sys.exit(f"train.py: --resume: the run was started with {key} {state['options'][key]}, now it is {value}")
    task = TASKS[o.command](o, out)
    if task.config.d_model % LANES:
        sys.exit(f"train.py: --d-model {task.config.d_model}: expected a multiple of {LANES}")
    ops = choose_ops(o.ops, o.precision)
    model = new_model(task.config, ops, o.dropout)
    task.initialise(model)
    print("\n".join(task.describe()))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {type(ops).__name__}, activations "
          f"{'bfloat16' if ops.half else 'float32'}, {torch.get_num_threads()} threads", flush=True)
    run = Run(model, task, o)
    if o.resume:
        run.restore(state)
    if not train(run, out):
        print(f"stopped after step {run.step}; --resume goes on")
        return
    best, report = export_best(out, ops)
    report |= {"test": task.scores(best, "test"), "parameters": sum(p.numel() for p in best.parameters()),
               "options": comparable(o) | {"steps": o.steps}, "seconds": round(run.seconds), "data": task.describe()}
    print(f"test {short(report['test'])}", *task.show(best), sep="\n", flush=True)
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())


def lengths(text):
    """"256,1024" to a list; argparse reports what is none."""
    values = [int(item) for item in text.split(",")]
    if min(values) < 2:
        raise ValueError
    return values


def poolings(text):
    """The two poolings of a U-Net."""
    values = lengths(text)
    if len(values) != 2:
        raise ValueError
    return values


def number(name, kind, low, below=math.inf):
    """A type for argparse, which reports its name."""
    def convert(text):
        value = kind(text)
        if not low <= value < below:  # as NaN is not, either
            raise ValueError
        return value
    convert.__name__ = name
    return convert


positive, natural, non_negative = number("positive", int, 1), number("natural", int, 0), number("non-negative", float, 0)


def stages(text):
    """"s4.real,..." for five stages or one for all."""
    pairs = [item.split(".") for item in text.split(",")]
    if len(pairs) not in (1, 5) or any(pair not in [[a, b] for a in ("s4", "s6") for b in ("real", "complex")] for pair in pairs):
        raise ValueError
    return pairs * (5 // len(pairs))


def main():
    parser = argparse.ArgumentParser(description="Trains the models that this repository ships.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check-ops", help="compare the fused kernels with float64 autograd of the definitions")
    export = commands.add_parser("export", help="export the best weights so far of a run that may still be going on")
    export.add_argument("--out", required=True, help="folder of the run")
    compare = commands.add_parser("baselines", help="held-out bits of context models on the split of dna or of audio")
    compare.add_argument("--data", required=True, help="folder with FASTA or WAV files")
    compare.add_argument("--order", type=lambda text: [natural(k) for k in text.split(",")], default=[0, 12], metavar="K,K")
    judge = commands.add_parser("judge", help="what a network that knows the real words makes of generated sound")
    judge.add_argument("--data", required=True, help="folder of WORD_SPEAKER_TAKE.wav")
    judge.add_argument("--wav", action="append", default=[], help="a 16-bit file of generated clips with pauses between them; may be repeated")
    training = {name: commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
                for name, summary in [("text", "train the text model"), ("dna", "train a model of nucleotides"),
                                      ("species", "train a classifier of species from a model of nucleotides"),
                                      ("audio", "train a U-Net on sound")]}
    text, dna, species, audio = training.values()
    text.add_argument("--data", required=True, help="folder with the corpora, see TEXT_CORPORA")
    text.add_argument("--mix", default="v2=1,v1=1,books=0.3", help="passes through each corpus per epoch")
    text.add_argument("--vocab", type=positive, default=4096, help="tokens in the vocabulary")
    text.add_argument("--length", type=positive, default=512, help="tokens a window")
    dna.add_argument("--data", required=True, help="folder with FASTA files")
    dna.add_argument("--length", type=lengths, default="1024", metavar="L,L",
                     help="bases a window; several: one after the other, each for an equal part of the steps")
    species.add_argument("--data", required=True, help="FASTA file, the first word of a record's name is its species")
    species.add_argument("--from", dest="start", required=True, help="best.pt of a run of dna")
    species.add_argument("--length", type=lengths, default="256,512,1024,2048,4096", metavar="L,L",
                         help="bases a window, drawn for each step")
    audio.add_argument("--data", required=True, help="folder of WORD_SPEAKER_TAKE.wav")
    audio.add_argument("--length", type=positive, default=8192, help="samples a row")
    audio.add_argument("--d-model", type=positive, default=64, help="of the outermost stages")
    audio.add_argument("--n-blocks", type=positive, default=3, help="a stage")
    audio.add_argument("--pool", type=poolings, default="4,4", metavar="P,P", help="the outermost first")
    audio.add_argument("--stages", type=stages, default="s4.complex,s4.complex,s6.complex,s4.complex,s4.complex", metavar="S,...",
                       help="s4 or s6 and real or complex for each stage, in order of flow; or one for all")
    audio.add_argument("--d-state", type=positive, default=16)
    audio.add_argument("--discretization", choices=["delta_b", "zoh"], default="delta_b")
    audio.add_argument("--norm", choices=["layernorm", "rmsnorm"], default="layernorm")
    audio.add_argument("--normalization", choices=["peak", "minmax", "none"], default="peak", help="of a clip")
    for command, d_model, n_layer in [(text, 256, 8), (dna, 128, 12)]:
        command.add_argument("--d-model", type=positive, default=d_model)
        command.add_argument("--n-layer", type=positive, default=n_layer)
    for command, batch, rate, dropout in [(text, 8, 2e-3, 0.15), (dna, 16, 4e-3, 0.0), (species, 64, 5e-4, 0.1),
                                          (audio, 2, 2e-3, 0.0)]:
        add = command.add_argument
        add("--out", required=True, help="folder of the run")
        add("--resume", action="store_true", help="go on from OUT/last.pt")
        add("--steps", type=positive, default=4000, help="may be changed with --resume")
        add("--batch", type=positive, default=batch, help="windows a step; of longer ones than the first --length as many fewer")
        add("--lr", type=non_negative, default=rate, help="highest learning rate")
        add("--warmup", type=natural, default=100, help="steps")
        add("--decay", type=non_negative, default=0.3, help="part of the steps over which the rate falls at the end")
        add("--weight-decay", type=non_negative, default=0.1, help="of the matrices")
        add("--dropout", type=number("share", float, 0, 1), default=dropout)
        add("--clip", type=non_negative, default=1.0, help="norm of the gradient")
        add("--ema", type=non_negative, default=0.998, help="decay of the averaged weights")
        add("--seed", type=natural, default=0)
        add("--keep", choices=["best", "last"], default="last" if command is species else "best",
            help="which weights become the model: those with the lowest held-out loss, or the averaged ones at the end")
        add("--eval-every", type=positive, default=100, help="steps")
        add("--save-every", type=positive, default=100, help="steps")
        add("--stop-at", type=natural, default=0, help="stop after this step, for a later --resume (0: do not)")
        add("--threads", type=natural, default=0, help="0: all processors")
        add("--ops", choices=["auto", "fused", "plain"], default="auto")
        add("--precision", choices=["auto", "bf16", "float32"], default="auto", help="of the activations, with fused ops")
    o = parser.parse_args()
    try:
        if o.command == "check-ops":
            sys.exit(0 if check_ops() else 1)
        elif o.command == "export":
            export_best(pathlib.Path(o.out), PlainOps())
        elif o.command == "judge":
            judge_sound(o)
        elif o.command == "baselines":
            baselines(o)
        else:
            command_train(o)
    except OSError as error:
        sys.exit(f"train.py: {error.filename or o.command}: {error.strerror or error}")


if __name__ == "__main__":
    main()
