#!/usr/bin/env python3
"""Trains the models that this folder ships, on a CPU, and models of nucleotides.

    python train.py text --data FOLDER --out RUN      prepares the corpora, trains, exports RUN/hf (Hugging Face format)
    python train.py dna --data FOLDER --out RUN       next-nucleotide pretraining on the FASTA files of a folder
    python train.py species --data FILE --out RUN --from DNA_RUN/best.pt       a classifier on top of such a model
    python train.py COMMAND ... --resume              goes on exactly where RUN/last.pt stopped
    python train.py export --out RUN                  exports the best weights so far of a run that is still going on
    python train.py baselines --data FOLDER           what context models without a network reach on the split of dna
    python train.py check-ops                         compares the fused kernels with float64 autograd of the definitions
    python ../convert_weights.py RUN/hf tales.bin --type q8_0 (--vocab dna)    makes the file that mamba reads

Needs torch, numpy and safetensors, tokenizers for text, and a C++ compiler for the fused kernels (train_ops.cpp). Without
one everything runs in plain PyTorch, some twenty times slower. README.md says how each model was made.

What lies in RUN: log.jsonl (one line a report), last.pt (all that --resume needs), best.pt (the weights with the lowest
held-out loss), hf/ (the exported best.pt), report.json; for text also data/ (tokenizer and token ids).

Sections: 1 text, 2 nucleotides, 3 definitions, 4 fused kernels, 5 model, 6 tasks and their evaluation, 7 training,
8 export, 9 check of the kernels, 10 command line.
"""
import argparse, ctypes, dataclasses, functools, hashlib, json, math, os, pathlib, platform, re, signal
import subprocess, sys, time

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
    digest = hashlib.sha256(json.dumps([corpora, mix, vocab_size], sort_keys=True).encode()).hexdigest()
    index = cache / "index.json"
    if not index.exists() or json.loads(index.read_text())["digest"] != digest:
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
        return np.split(ids, np.flatnonzero(ids == 0)[1:])
    return ({name: Corpus(*(load(name, part) for part in ("train", "valid", "test")),
                          {part: info[name][part]["bytes"] for part in info[name]}) for name in info},
            Tokenizer.from_file(str(cache / "tokenizer.json")), info)


class TextBatches:
    """Documents in a new order each epoch, run together and cut into windows of length + 1. Epoch e depends on (seed, e)
    alone, so (epoch, position) is all the state there is. A corpus of weight 1.3 goes in once and 30 % of it once more."""
    def __init__(self, corpora, mix, batch, length, seed):
        self.documents = [(d, mix[name]) for name, c in corpora.items() for d in c.train]
        self.batch, self.length, self.seed, self.epoch, self.position = batch, length, seed, 0, 0
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
        """The ids [batch, length + 1] that come next; the steps follow each other."""
        if self.position + self.batch > len(self.windows):
            self.epoch, self.position = self.epoch + 1, 0
            self.windows = self.cut()
        self.position += self.batch
        return torch.from_numpy(self.windows[self.position - self.batch:self.position])

    def state(self):
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
        self.windows = self.cut()

    def epochs(self, step):
        return self.epoch + self.position / len(self.windows)


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


def read_genome(folder):
    files = sorted(path for path in pathlib.Path(folder).iterdir() if path.suffix in (".fa", ".fasta", ".fna"))
    if not files:
        sys.exit(f"train.py: {folder}: no FASTA file, expected *.fa, *.fasta or *.fna")
    return split_genome([ids for path in files for _, ids in read_fasta(path)])


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
    """Windows at uniform places of either strand. A step's windows depend on (seed, step, steps) alone: there is no state.
    The tokens of a step stay the same while the windows grow."""
    def __init__(self, pieces, o):
        self.pieces, self.o = [p for p in pieces if len(p) > max(o.length)], o
        if not self.pieces:
            sys.exit(f"train.py: --length {max(o.length)}: no sequence is longer than that")
        if np.mean(np.concatenate(self.pieces) == N) > 0.9:
            sys.exit("train.py: nearly all bases are N")

    def next(self, step):
        rng = np.random.default_rng([self.o.seed, step])
        length = at_step(self.o.length, step, self.o.steps)
        rows = []
        while len(rows) < self.count(length):
            window = uniform_window(rng, self.pieces, length + 1)
            if np.mean(window == N) < 0.5:  # a gap of the assembly teaches nothing
                rows.append(either_strand(rng, window))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def count(self, length):
        """Windows a step, of this length."""
        return max(1, self.o.batch * self.o.length[0] // length)

    def state(self):
        return {}

    def restore(self, state):
        pass

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
    """A uniform species, a uniform place in its genomes (E.3.4), a window there of a length drawn from --length, on either
    strand."""
    def __init__(self, species, o):
        self.species, self.o = list(species.values()), o
        self.pieces = [p for pieces in self.species for p in pieces]
        if min(max(map(len, pieces)) for pieces in self.species) < max(o.length):
            sys.exit(f"train.py: --length {max(o.length)}: a species has no sequence of that length to train on")

    def next(self, step):
        rng = np.random.default_rng([self.o.seed, step])
        length = int(rng.choice(self.o.length))
        labels = rng.integers(len(self.species), size=self.count(length))
        rows = [either_strand(rng, uniform_window(rng, self.species[label], length)) for label in labels]
        return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(labels)


# ---- 3. Definitions in plain PyTorch: what the fused kernels compute ---------------------------------------------

def selective_scan(u, dt, A, bc, D, z, dt_bias):
    """The selective SSM of Mamba (arXiv 2312.00752, Algorithm 2), its D skip and its gate.
    u, dt, z [batch, time, d_inner]; A [d_inner, d_state]; bc [batch, time, 2 d_state]; D, dt_bias [d_inner]."""
    delta = F.softplus(dt + dt_bias)
    B, C = bc.chunk(2, dim=-1)
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(ys, 1) + D * u) * F.silu(z)


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


# ---- 4. Fused kernels: the same four functions from train_ops.cpp ------------------------------------------------

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
    @staticmethod
    def forward(ctx, u, dt, A, bc, D, z, bias):
        assert A.shape[1] == STATES, f"the fused scan needs d_state {STATES}, found {A.shape[1]}"
        batch, length, channels = u.shape
        (y,), bcf = like(u), bc.float()  # B and C converted once here, not once a channel block
        states = torch.empty(batch, -(-length // 16), channels // LANES, STATES, LANES)  # before every 16 steps
        call("scan", *map(activations, (u, dt)), A, activations(bcf), D, activations(z), bias, activations(y), states)
        ctx.save_for_backward(u, dt, A, bcf, D, z, bias, states)
        ctx.dtype = bc.dtype
        return y

    @staticmethod
    def backward(ctx, gy):
        u, dt, A, bcf, D, z, bias, states = ctx.saved_tensors
        gy = gy.contiguous()
        gu, gdt, gA, gbc, gD, gz, gbias = like(u, dt, A, bcf, D, z, bias)
        call("scan_grad", *map(activations, (gy, u, dt)), A, activations(bcf), D, activations(z), bias, states,
             activations(gu), activations(gdt), gA, activations(gbc), gD, activations(gz), gbias)
        return gu, gdt, gA, gbc.to(ctx.dtype), gD, gz, gbias


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


# ---- 5. Model: Mamba-1 with transformers' tensor names --------------------------------------------------------------

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


class Weight(nn.Module):
    """A weight (and bias) under the name that transformers gives it."""
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)


class Mixer(nn.Module):
    """The Mamba block without its norm (figure 3 of the paper)."""
    def __init__(self, c):
        super().__init__()
        uniform = lambda rows, cols: torch.empty(rows, cols).uniform_(-cols ** -0.5, cols ** -0.5)
        dt = torch.exp(torch.rand(c.d_inner) * math.log(0.1 / 0.001) + math.log(0.001))  # step sizes from 0.001 to 0.1
        self.in_proj = Weight(uniform(2 * c.d_inner, c.d_model))
        self.conv1d = Weight((torch.rand(c.d_inner, 1, c.d_conv) * 2 - 1) * c.d_conv ** -0.5, torch.zeros(c.d_inner))
        self.x_proj = Weight(uniform(c.dt_rank + 2 * c.d_state, c.d_inner))
        self.dt_proj = Weight(uniform(c.d_inner, c.dt_rank), dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, c.d_state + 1)).repeat(c.d_inner, 1))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = Weight(uniform(c.d_model, c.d_inner) / math.sqrt(c.n_layer))
        self.d_inner, self.dt_rank = c.d_inner, c.dt_rank

    def forward(self, x, ops):
        # The halves of in_proj (x and z) and of x_proj (dt and B, C) are separate products: their gradients then need not
        # be copied together.
        in_x, in_z = self.in_proj.weight.split(self.d_inner)
        to_dt, to_bc = self.x_proj.weight.split([self.dt_rank, self.x_proj.weight.shape[0] - self.dt_rank])
        u = ops.conv(F.linear(x, in_x), self.conv1d.weight[:, 0].t().contiguous(), self.conv1d.bias)
        dt = F.linear(F.linear(u, to_dt), self.dt_proj.weight)
        y = ops.scan(u, dt, -torch.exp(self.A_log), F.linear(u, to_bc), self.D, F.linear(x, in_z), self.dt_proj.bias)
        return F.linear(y, self.out_proj.weight)


class Layer(nn.Module):
    def __init__(self, c, dropout):
        super().__init__()
        self.norm, self.mixer, self.eps = Weight(torch.ones(c.d_model)), Mixer(c), c.eps
        self.dropout = LockedDropout(dropout)

    def forward(self, x, ops):
        return x + self.dropout(self.mixer(ops.norm(x, self.norm.weight, self.eps), ops))


class Mamba(nn.Module):
    """Embedding, layers, norm; the head is the embedding. The residual stream is float32."""
    def __init__(self, config, ops, dropout=0.0):
        super().__init__()
        self.config, self.ops = config, ops
        self.backbone = nn.Module()
        self.backbone.embeddings = Weight(torch.randn(config.vocab_size, config.d_model) * 0.02)
        self.backbone.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.n_layer))
        self.backbone.norm_f = Weight(torch.ones(config.d_model))
        self.dropout = LockedDropout(dropout)
        if config.n_labels:
            self.score = Weight(torch.randn(config.n_labels, config.d_model) * 0.02)

    def hidden(self, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.ops.half):
            x = self.dropout(F.embedding(ids, self.backbone.embeddings.weight))
            for layer in self.backbone.layers:
                x = layer(x, self.ops)
            return self.ops.norm(x, self.backbone.norm_f.weight, self.config.eps)

    def loss(self, ids, target):
        """Mean nats per token over the targets that are not negative. ids, target [batch, time]."""
        return self.ops.cross_entropy(self.hidden(ids).flatten(0, 1), self.backbone.embeddings.weight, target.flatten())

    def logits(self, ids):
        return self.hidden(ids).float() @ self.backbone.embeddings.weight.t()

    def classify(self, ids):
        """Logits [batch, n_labels]: the classifier reads the last position (E.3.4)."""
        return self.hidden(ids)[:, -1].float() @ self.score.weight.t()


# ---- 6. Tasks: what is read, what its loss is, how it is judged -----------------------------------------------------
#
# A task has: name; config; batches; describe(), lines about its data; loss(model, batch), in nats; unit and in_unit(nats), how
# training losses are reported; scores(model, part), {name: value} with the value that picks the checkpoint, the lower the
# better, under the key `chooses`; and what Task has a default of.

class Task:
    labels = None  # of a classifier

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
        self.batches = SpeciesBatches(self.parts["train"], o)
        self.start = torch.load(o.start, weights_only=True)
        self.config = Config(**self.start["config"] | {"n_labels": len(self.labels)})

    def initialise(self, model):
        """The pretrained backbone; the classifier is new."""
        missing, unexpected = model.load_state_dict(self.start["model"], strict=False)
        if missing != ["score.weight"] or unexpected:
            sys.exit(f"train.py: --from {self.o.start}: expected the weights of a language model, missing {missing[:3]}, "
                     f"unexpected {unexpected[:3]}")

    def describe(self):
        return [f"{part}: " + ", ".join(f"{name} {sum(map(len, pieces))}" for name, pieces in species.items())
                for part, species in self.parts.items()]

    @staticmethod
    def loss(model, batch):
        ids, labels = batch
        return F.cross_entropy(model.classify(ids), labels)

    @staticmethod
    def in_unit(nats):
        return nats

    @torch.no_grad()
    def scores(self, model, part):
        """Accuracy by window length, in percent, each species weighing the same: windows of both strands at every eighth of
        their length. And the mean loss of all of them, which picks the checkpoint."""
        model.eval()
        result, losses = {}, []
        for length in self.o.length:
            right = []
            for label, pieces in enumerate(self.parts[part].values()):
                windows = [w for p in pieces for i in range(0, len(p) - length + 1, max(1, length // 8))
                           for w in (p[i:i + length], reverse_complement(p[i:i + length]))]
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


TASKS = {task.name: task for task in (TextTask, GenomeTask, SpeciesTask)}


def count_contexts(pieces, order):
    """Counts [4^order, 4] of the bases behind each context of `order` bases, on both strands. A context with an N counts
    nowhere."""
    counts = np.zeros(4 ** (order + 1), np.int64)
    for piece in pieces:
        for strand in (piece, reverse_complement(piece)):
            code, clean = context_codes(strand, order)
            counts += np.bincount(code[clean], minlength=len(counts))
    return counts.reshape(-1, 4)


def context_codes(ids, order):
    """For each base from `order` on: context and base as one number in base 4, and whether all of them are A, C, G or T."""
    count = max(0, len(ids) - order)
    code, clean = np.zeros(count, np.int64), np.ones(count, bool)
    for i in range(order + 1):
        letters = ids[i:i + count]
        code = code * 4 + (letters.astype(np.int64) - A) % 4
        clean &= letters != N
    return code, clean


def context_model_bits(parts, part, order, strengths):
    """-log2 p per base of a context model with backoff, one figure for each of `strengths`: the estimate of order k is the
    counts of order k plus `strength` times the estimate of order k - 1, and order 0 begins from the uniform one. (A
    Dirichlet prior for each context, MacKay and Peto 1995.)"""
    tables = [count_contexts(parts["train"], k) for k in range(order + 1)]
    bits = np.zeros(len(strengths))
    scored = 0
    for piece in parts[part]:
        at = [context_codes(piece, k) for k in range(order + 1)]
        clean = np.flatnonzero(at[order][1])
        scored += len(clean)
        for i, strength in enumerate(strengths):
            estimate = np.full(len(clean), 0.25)
            for k, table in enumerate(tables):
                code = at[k][0][clean + order - k]
                context, base = code // 4, code % 4
                estimate = (table[context, base] + strength * estimate) / (table[context].sum(1) + strength)
            bits[i] -= np.log2(estimate).sum()
    return bits / scored


def baselines(o):
    """Prints held-out bits per base of context models; their strength is the best one on the valid part."""
    parts = read_genome(o.data)
    strengths = [2 ** k for k in range(-1, 11)]
    for order in o.order:
        best = strengths[int(np.argmin(context_model_bits(parts, "valid", order, strengths)))]
        valid, test = (context_model_bits(parts, part, order, [best])[0] for part in ("valid", "test"))
        print(f"order {order}: valid {valid:.4f}, test {test:.4f} bits per base (strength {best})", flush=True)


# ---- 7. Training -----------------------------------------------------------------------------------------------------

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


class Run:
    """Everything that a training run carries from step to step."""
    def __init__(self, model, task, options):
        self.model, self.task, self.batches, self.o = model, task, task.batches, options
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith("A_log")]
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
        return self.o.lr * min(1, (self.step + 1) / self.o.warmup) * max(0.02, min(1, left))

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
                **self.batches.state(), "options": comparable(self.o)}

    def restore(self, state):
        for key, value in comparable(self.o).items():
            if state["options"].get(key, value) != value:
                sys.exit(f"train.py: --resume: the run was started with {key} {state['options'][key]}, now it is {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        self.batches.restore(state)
        torch.set_rng_state(state["rng"])


def comparable(options):
    """The options that decide the result; another value of one of them would not be the same run."""
    free = ("command", "data", "out", "resume", "eval_every", "save_every", "threads", "start", "ops", "precision", "stop_at", "steps")
    return {name: value for name, value in vars(options).items() if name not in free}


def evaluate(run, out):
    """Held-out scores of the weights and of their average; best.pt keeps the better of the two, if it is the best so far."""
    scores = {}
    for kind in ("weights", "average"):
        if kind == "average":
            run.swap_average()
        scores[kind] = run.task.scores(run.model, "valid")
        if scores[kind][run.task.chooses] < run.best:
            run.best = scores[kind][run.task.chooses]
            write_atomically(out / "best.pt", {
                "task": run.task.name, "model": run.model.state_dict(), "step": run.step, "kind": kind,
                "config": dataclasses.asdict(run.model.config), "labels": run.task.labels, "valid": scores[kind]})
    run.swap_average()
    return scores


def train(run, out):
    """Steps, reports, checkpoints. SIGINT and SIGTERM end the run after the present step, ready for --resume."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    last = min(run.o.stop_at or run.o.steps, run.o.steps)
    losses = []
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
    return run.step == run.o.steps


def short(scores):
    return " ".join(f"{name} {value:.4g}" for name, value in scores.items())


# ---- 8. Export -------------------------------------------------------------------------------------------------------

def export_hugging_face(model, folder, tokenizer=None, labels=None):
    """The folder that transformers' MambaForCausalLM.from_pretrained and convert_weights.py read. (For nucleotides there is
    no tokenizer: convert_weights.py --vocab dna. transformers has no Mamba classifier; the names are those it would have.)"""
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
        **ends, **classes, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_prefix_space": False, "bos_token": END,
            "eos_token": END, "clean_up_tokenization_spaces": False}, indent=2) + "\n")


def export_best(out, ops):
    """Exports out/best.pt to out/hf. Returns its model and a report."""
    if not (out / "best.pt").exists():
        sys.exit(f"train.py: {out / 'best.pt'} does not exist: the run has not been evaluated yet, or failed")
    best = torch.load(out / "best.pt", weights_only=True)
    model = Mamba(Config(**best["config"]), ops)
    model.load_state_dict(best["model"])
    tokenizer = None
    if (out / "data" / "tokenizer.json").exists():
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    export_hugging_face(model, out / "hf", tokenizer, best.get("labels"))
    report = {"step": best["step"], "kind": best["kind"], "valid": best["valid"]}
    print(f"step {report['step']} ({report['kind']}): valid {short(report['valid'])}", flush=True)
    return model, report


# ---- 9. Check of the kernels -----------------------------------------------------------------------------------------

def relative_error(a, b):
    """Largest difference over largest magnitude (zero over zero is zero); a NaN stays one."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def check_one(name, fused, plain, inputs, tolerance):
    """Value and every gradient of `fused` against float64 autograd of `plain`, at the same (possibly rounded) inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
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
        ops, dtype, tolerance = FusedOps(half), torch.bfloat16 if half else torch.float32, 2e-2 if half else 2e-5
        act = lambda *shape: torch.randn(*shape).to(dtype)
        for batch, length, channels in [(1, 1, 16), (2, 16, 32), (3, 37, 48), (5, 17, 16), (1, 64, 32)]:
            A = -torch.rand(channels, STATES) * 8 - 0.1
            inputs = [act(batch, length, channels), act(batch, length, channels), A, act(batch, length, 2 * STATES),
                      torch.randn(channels), act(batch, length, channels), torch.randn(channels)]
            shape = f"[{batch}, {length}, {channels}] {dtype}"
            passed.append(check_one(f"scan {shape}", ops.scan, selective_scan, inputs, tolerance))
            inputs = [act(batch, length, channels), torch.randn(4, channels), torch.randn(channels)]
            passed.append(check_one(f"conv {shape}", ops.conv, causal_conv, inputs, tolerance))
        passed.append(check_one(f"norm [3, 5, 64] {dtype}", lambda x, w: ops.norm(x, w, 1e-5),
                                lambda x, w: rms_norm(x, w, 1e-5), [torch.randn(3, 5, 64), torch.randn(64)], tolerance))
        target = torch.randint(0, 96, (1100,))  # more rows than the kernel takes at a time
        target[::7] = -100
        passed.append(check_one(f"cross-entropy [1100, 96] {dtype}", lambda x, E: ops.cross_entropy(x, E, target),
                                lambda x, E: tied_cross_entropy(x, E, target),
                                [act(1100, 48), torch.randn(96, 48)], tolerance))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return all(passed)


# ---- 10. Command line -------------------------------------------------------------------------------------------------

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
    torch.set_num_threads(o.threads or os.cpu_count())
    torch.set_flush_denormal(True)
    torch.manual_seed(o.seed)
    out = pathlib.Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "last.pt").exists() and not o.resume:
        sys.exit(f"train.py: {out}: holds a run already; give --resume to go on with it or another --out")
    if o.resume and not (out / "last.pt").exists():
        sys.exit(f"train.py: --resume: {out / 'last.pt'} does not exist")
    task = TASKS[o.command](o, out)
    if task.config.d_model % LANES:
        sys.exit(f"train.py: --d-model {task.config.d_model}: expected a multiple of {LANES}")
    ops = choose_ops(o.ops, o.precision)
    model = Mamba(task.config, ops, o.dropout)
    task.initialise(model)
    print("\n".join(task.describe()))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {type(ops).__name__}, activations "
          f"{'bfloat16' if ops.half else 'float32'}, {torch.get_num_threads()} threads", flush=True)
    run = Run(model, task, o)
    if o.resume:
        run.restore(torch.load(out / "last.pt", weights_only=True))
    if not train(run, out):
        print(f"stopped after step {run.step}; --resume goes on")
        return
    best, report = export_best(out, ops)
    report |= {"test": task.scores(best, "test"), "options": comparable(o) | {"steps": o.steps}, "seconds": round(run.seconds),
               "data": task.describe()}
    print(f"test {short(report['test'])}", *task.show(best), sep="\n", flush=True)
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())


def lengths(text):
    """"256,1024" to a list; argparse reports what is none."""
    values = [int(item) for item in text.split(",")]
    if min(values) < 2:
        raise ValueError
    return values


def main():
    parser = argparse.ArgumentParser(description="Trains the models that this repository ships.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check-ops", help="compare the fused kernels with float64 autograd of the definitions")
    export = commands.add_parser("export", help="export the best weights so far of a run that may still be going on")
    export.add_argument("--out", required=True, help="folder of the run")
    compare = commands.add_parser("baselines", help="held-out bits per base of context models on the split of dna")
    compare.add_argument("--data", required=True, help="folder with FASTA files")
    compare.add_argument("--order", type=lambda text: [int(k) for k in text.split(",")], default=[0, 12], metavar="K,K")
    training = {name: commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
                for name, summary in [("text", "train the text model"), ("dna", "train a model of nucleotides"),
                                      ("species", "train a classifier of species from a model of nucleotides")]}
    text, dna, species = training.values()
    text.add_argument("--data", required=True, help="folder with the corpora, see TEXT_CORPORA")
    text.add_argument("--mix", default="v2=1,v1=1,books=0.3", help="passes through each corpus per epoch")
    text.add_argument("--vocab", type=int, default=4096, help="tokens in the vocabulary")
    text.add_argument("--length", type=int, default=512, help="tokens a window")
    dna.add_argument("--data", required=True, help="folder with FASTA files")
    dna.add_argument("--length", type=lengths, default="1024", metavar="L,L",
                     help="bases a window; several: one after the other, each for an equal part of the steps")
    species.add_argument("--data", required=True, help="FASTA file, the first word of a record's name is its species")
    species.add_argument("--from", dest="start", required=True, help="best.pt of a run of dna")
    species.add_argument("--length", type=lengths, default="256,512,1024,2048,4096", metavar="L,L",
                         help="bases a window, drawn for each step")
    for command, d_model, n_layer in [(text, 256, 8), (dna, 128, 12)]:
        command.add_argument("--d-model", type=int, default=d_model)
        command.add_argument("--n-layer", type=int, default=n_layer)
    for command, batch, rate, dropout in [(text, 8, 2e-3, 0.15), (dna, 16, 4e-3, 0.0), (species, 64, 5e-4, 0.1)]:
        add = command.add_argument
        add("--out", required=True, help="folder of the run")
        add("--resume", action="store_true", help="go on from OUT/last.pt")
        add("--steps", type=int, default=4000, help="may be changed with --resume")
        add("--batch", type=int, default=batch, help="windows a step; of longer ones than the first --length as many fewer")
        add("--lr", type=float, default=rate, help="highest learning rate")
        add("--warmup", type=int, default=100, help="steps")
        add("--decay", type=float, default=0.3, help="part of the steps over which the rate falls at the end")
        add("--weight-decay", type=float, default=0.1, help="of the matrices")
        add("--dropout", type=float, default=dropout)
        add("--clip", type=float, default=1.0, help="norm of the gradient")
        add("--ema", type=float, default=0.998, help="decay of the averaged weights")
        add("--seed", type=int, default=0)
        add("--eval-every", type=int, default=100, help="steps")
        add("--save-every", type=int, default=100, help="steps")
        add("--stop-at", type=int, default=0, help="stop after this step, for a later --resume (0: do not)")
        add("--threads", type=int, default=0, help="0: all processors")
        add("--ops", choices=["auto", "fused", "plain"], default="auto")
        add("--precision", choices=["auto", "bf16", "float32"], default="auto", help="of the activations, with fused ops")
    o = parser.parse_args()
    if o.command == "check-ops":
        try:
            sys.exit(0 if check_ops() else 1)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"train.py: the fused kernels could not be built: {getattr(error, 'stderr', '') or error}")
    elif o.command == "export":
        export_best(pathlib.Path(o.out), PlainOps())
    elif o.command == "baselines":
        baselines(o)
    else:
        command_train(o)


if __name__ == "__main__":
    main()
