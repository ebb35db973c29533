#!/usr/bin/env python3
"""Trains the models that this folder ships. Today: the text model tales.bin, on a CPU.

    python train.py text --data FOLDER --out RUN     prepares the corpora, trains, exports RUN/hf (Hugging Face format)
    python train.py text --data FOLDER --out RUN --resume                  goes on exactly where RUN/last.pt stopped
    python train.py export --out RUN                 exports the best weights so far of a run that is still going on
    python train.py check-ops                        compares the fused kernels with float64 autograd of the definitions
    python ../convert_weights.py RUN/hf tales.bin --type q8_0              makes the file that mamba reads

Needs torch, numpy, tokenizers and safetensors, and a C++ compiler for the fused kernels (train_ops.cpp). Without one
everything runs in plain PyTorch, some twenty times slower. README.md says how tales.bin was made.

What lies in RUN: data/ (tokenizer and token ids), log.jsonl (one line a report), last.pt (all that --resume needs),
best.pt (the weights with the lowest held-out loss), hf/ (the exported best.pt), report.json.

Sections: 1 data, 2 definitions, 3 fused kernels, 4 model, 5 evaluation, 6 training, 7 export, 8 check of the kernels,
9 command line.
"""
import argparse, ctypes, dataclasses, functools, hashlib, json, math, os, pathlib, platform, re, signal
import subprocess, sys, time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

END = "<|endoftext|>"  # id 0; stands before every document, so it both opens and separates them
HERE = pathlib.Path(__file__).resolve().parent


# ---- 1. Data: clean, cut into documents, split, tokenize -----------------------------------------------------------

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


class Batches:
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

    def next(self):
        if self.position + self.batch > len(self.windows):
            self.epoch, self.position = self.epoch + 1, 0
            self.windows = self.cut()
        self.position += self.batch
        return torch.from_numpy(self.windows[self.position - self.batch:self.position])

    def seek(self, epoch, position):
        self.epoch, self.position = epoch, position
        self.windows = self.cut()


# ---- 2. Definitions in plain PyTorch: what the fused kernels compute ---------------------------------------------

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


# ---- 3. Fused kernels: the same four functions from train_ops.cpp ------------------------------------------------

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


# ---- 4. Model: Mamba-1 with transformers' tensor names --------------------------------------------------------------

@dataclasses.dataclass
class Config:
    vocab_size: int = 4096
    d_model: int = 256
    n_layer: int = 8
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    eps: float = 1e-5

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


# ---- 5. Evaluation ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def total_nats(model, documents, tokens_a_batch=8192):
    """-ln p of all documents, each read from its END token with an empty state. Short ones share a batch; what lies behind
    the end of a document cannot change it, since the model is causal, and is not counted."""
    model.eval()
    total, group = 0.0, []
    def run():
        width = max(map(len, group))
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        target = torch.full((len(group), width - 1), -100)
        for row, document in enumerate(group):
            ids[row, :len(document)] = torch.from_numpy(document)
            target[row, :len(document) - 1] = torch.from_numpy(document[1:])
        return model.loss(ids[:, :-1], target).item() * (target >= 0).sum().item()
    for document in sorted(documents, key=len):
        if group and (len(group) + 1) * len(document) > tokens_a_batch:
            total, group = total + run(), []
        group.append(document)
    total += run()
    model.train()
    return total


def bits_per_byte(model, corpora, part):
    """{corpus: -log2 p per UTF-8 byte of its documents}, and "stories" over all of STORIES together."""
    nats = {name: total_nats(model, getattr(c, part)) for name, c in corpora.items() if getattr(c, part)}
    result = {name: n / math.log(2) / corpora[name].bytes[part] for name, n in nats.items()}
    stories = [name for name in STORIES if name in nats]
    result["stories"] = sum(nats[n] for n in stories) / math.log(2) / sum(corpora[n].bytes[part] for n in stories)
    return result


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


# ---- 6. Training -----------------------------------------------------------------------------------------------------

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
    def __init__(self, model, batches, options):
        self.model, self.batches, self.o = model, batches, options
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
        ids = self.batches.next()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.model.loss(ids[:, :-1], ids[:, 1:])
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
                "epoch": self.batches.epoch, "position": self.batches.position, "options": comparable(self.o)}

    def restore(self, state):
        for key, value in comparable(self.o).items():
            if state["options"].get(key, value) != value:
                sys.exit(f"train.py: --resume: the run was started with {key} {state['options'][key]}, now it is {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        self.batches.seek(state["epoch"], state["position"])
        torch.set_rng_state(state["rng"])


def comparable(options):
    """The options that decide the result; another value of one of them would not be the same run."""
    free = ("command", "data", "out", "resume", "eval_every", "save_every", "threads", "ops", "precision", "stop_at", "steps")
    return {name: value for name, value in vars(options).items() if name not in free}


def evaluate(run, corpora, out):
    """Held-out bits per byte of the weights and of their average; best.pt keeps the better of the two, if it is the best so
    far."""
    scores = {}
    for kind in ("weights", "average"):
        if kind == "average":
            run.swap_average()
        scores[kind] = bits_per_byte(run.model, corpora, "valid")
        if scores[kind]["stories"] < run.best:
            run.best = scores[kind]["stories"]
            write_atomically(out / "best.pt", {"model": run.model.state_dict(), "step": run.step, "kind": kind,
                                               "config": dataclasses.asdict(run.model.config), "valid": scores[kind]})
    run.swap_average()
    return scores


def train(run, corpora, out, info):
    """Steps, reports, checkpoints. SIGINT and SIGTERM end the run after the present step, ready for --resume."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    weights = dict(parse_mix(run.o.mix))
    bytes_a_token = (sum(info[n]["train"]["bytes"] * w for n, w in weights.items()) /
                     sum(info[n]["train"]["tokens"] * w for n, w in weights.items()))
    last = run.o.stop_at or run.o.steps
    losses = []
    while run.step < min(last, run.o.steps) and not stop:
        began = time.perf_counter()
        losses.append(run.train_step())
        run.seconds += time.perf_counter() - began
        if run.step % run.o.eval_every == 0 or run.step == run.o.steps:
            scores = evaluate(run, corpora, out)
            epoch = run.batches.epoch + run.batches.position / len(run.batches.windows)
            report = {"step": run.step, "epoch": round(epoch, 2),
                      "lr": run.learning_rate(), "train_bits_per_byte": np.mean(losses) / math.log(2) / bytes_a_token,
                      "valid": scores, "best": run.best, "seconds": round(run.seconds),
                      "tokens_per_second": round(run.step * run.o.batch * run.o.length / run.seconds)}
            losses = []
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(report) + "\n")
            short = lambda s: " ".join(f"{k} {v:.3f}" for k, v in s.items())
            print(f"step {run.step}/{run.o.steps} epoch {report['epoch']} train {report['train_bits_per_byte']:.3f} | "
                  f"held-out: {short(scores['weights'])} | average: {short(scores['average'])} | best {run.best:.4f} | "
                  f"{report['tokens_per_second']} tokens/s", flush=True)
        if run.step % run.o.save_every == 0:
            write_atomically(out / "last.pt", run.state())
    write_atomically(out / "last.pt", run.state())
    return run.step == run.o.steps


# ---- 7. Export -------------------------------------------------------------------------------------------------------

def export_hugging_face(model, tokenizer, folder):
    """The folder that transformers' MambaForCausalLM.from_pretrained and convert_weights.py read."""
    from safetensors.torch import save_file
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, str(folder / "model.safetensors"),
              metadata={"format": "pt"})
    config = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": c.vocab_size, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer, "state_size": c.d_state, "expand": c.expand, "intermediate_size": c.d_inner,
        "conv_kernel": c.d_conv, "time_step_rank": c.dt_rank, "layer_norm_epsilon": c.eps, "hidden_act": "silu",
        "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_prefix_space": False, "bos_token": END,
        "eos_token": END, "clean_up_tokenization_spaces": False}, indent=2) + "\n")


# ---- 8. Check of the kernels -----------------------------------------------------------------------------------------

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


# ---- 9. Command line -------------------------------------------------------------------------------------------------

def parse_mix(text):
    """"v2=1,books=0.3" to pairs."""
    try:
        mix = [(name, float(weight)) for name, weight in (item.split("=") for item in text.split(","))]
    except ValueError:
        mix = []
    if {name for name, _ in mix} != set(TEXT_CORPORA) or any(weight < 0 for _, weight in mix):
        sys.exit(f"train.py: --mix {text}: expected NAME=WEIGHT,... with a weight for each of {', '.join(TEXT_CORPORA)}")
    return mix


def command_text(o):
    torch.set_num_threads(o.threads or os.cpu_count())
    torch.set_flush_denormal(True)
    torch.manual_seed(o.seed)
    out = pathlib.Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "last.pt").exists() and not o.resume:
        sys.exit(f"train.py: {out}: holds a run already; give --resume to go on with it or another --out")
    mix = dict(parse_mix(o.mix))
    corpora, tokenizer, info = prepare_text(o.data, out, mix, o.vocab)
    for name, parts in info.items():
        print(f"{name}: " + "; ".join(f"{part} {i['documents']} documents, {i['bytes']} bytes, {i['tokens']} tokens"
                                      for part, i in parts.items()))
    if o.d_model % LANES:
        sys.exit(f"train.py: --d-model {o.d_model}: expected a multiple of {LANES}")
    rows = -(-tokenizer.get_vocab_size() // LANES) * LANES  # a small corpus may have fewer merges than --vocab asks for
    config = Config(vocab_size=rows, d_model=o.d_model, n_layer=o.n_layer)
    ops = choose_ops(o.ops, o.precision)
    model = Mamba(config, ops, o.dropout)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {type(ops).__name__}, activations "
          f"{'bfloat16' if ops.half else 'float32'}, {torch.get_num_threads()} threads", flush=True)
    run = Run(model, Batches(corpora, mix, o.batch, o.length, o.seed), o)
    if o.resume:
        if not (out / "last.pt").exists():
            sys.exit(f"train.py: --resume: {out / 'last.pt'} does not exist")
        run.restore(torch.load(out / "last.pt", weights_only=True))
    if not train(run, corpora, out, info):
        print(f"stopped after step {run.step}; --resume goes on")
        return
    report = finish(out, ops, corpora)
    report |= {"options": comparable(o) | {"steps": o.steps}, "seconds": round(run.seconds), "data": info}
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())


def finish(out, ops, corpora=None):
    """Exports out/best.pt to out/hf and prints samples of it."""
    from tokenizers import Tokenizer
    if not (out / "best.pt").exists():
        sys.exit(f"train.py: {out / 'best.pt'} does not exist: the run has not been evaluated yet, or failed")
    best = torch.load(out / "best.pt", weights_only=True)
    tokenizer = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    model = Mamba(Config(**best["config"]), ops)
    model.load_state_dict(best["model"])
    export_hugging_face(model, tokenizer, out / "hf")
    report = {"step": best["step"], "kind": best["kind"], "valid": best["valid"]}
    if corpora:
        report["test"] = bits_per_byte(model, corpora, "test")
    for key, value in report.items():
        print(f"{key}: " + (" ".join(f"{k} {v:.4f}" for k, v in value.items()) if isinstance(value, dict) else str(value)))
    for seed in (1, 2):
        print(f"--- sample {seed}:\n{sample(model, tokenizer, 'Once upon a time', seed=seed)}", flush=True)
    return report


def main():
    parser = argparse.ArgumentParser(description="Trains the models that this repository ships.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check-ops", help="compare the fused kernels with float64 autograd of the definitions")
    export = commands.add_parser("export", help="export the best weights so far of a run that may still be going on")
    export.add_argument("--out", required=True, help="folder of the run")
    text = commands.add_parser("text", help="train the text model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = text.add_argument
    add("--data", required=True, help="folder with the corpora, see TEXT_CORPORA")
    add("--out", required=True, help="folder of the run")
    add("--resume", action="store_true", help="go on from OUT/last.pt")
    add("--mix", default="v2=1,v1=1,books=0.3", help="passes through each corpus per epoch")
    add("--vocab", type=int, default=4096, help="tokens in the vocabulary")
    add("--d-model", type=int, default=256)
    add("--n-layer", type=int, default=8)
    add("--steps", type=int, default=4000, help="may be changed with --resume")
    add("--batch", type=int, default=8, help="windows a step")
    add("--length", type=int, default=512, help="tokens a window")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--warmup", type=int, default=100, help="steps")
    add("--decay", type=float, default=0.3, help="part of the steps over which the rate falls at the end")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--dropout", type=float, default=0.15)
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
    if o.command == "export":
        finish(pathlib.Path(o.out), PlainOps())
        return
    command_text(o)


if __name__ == "__main__":
    main()
