"""A vocabulary in a GGUF file as a Hugging Face tokenizer: what the ids of `mamba tokenize` are compared with."""
import gguf
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def read_vocabulary(path):
    fields = gguf.GGUFReader(path).fields
    def value(key, default=None):
        return fields[key].contents() if key in fields else default
    return {"pre": value("tokenizer.ggml.pre"), "tokens": value("tokenizer.ggml.tokens"),
            "types": value("tokenizer.ggml.token_type"), "merges": value("tokenizer.ggml.merges", []),
            "normalizer": value("mamba.tokenizer.normalizer", "none")}


def write_vocabulary(path, vocabulary):
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if vocabulary["merges"]:
        writer.add_token_merges(vocabulary["merges"])
    if "unknown" in vocabulary:
        writer.add_unk_token_id(vocabulary["unknown"])
    writer.add_string("mamba.tokenizer.normalizer", vocabulary["normalizer"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def build(vocabulary, parse_special):
    """parse_special: names of special tokens in the text become those tokens, as Hugging Face does by default."""
    tokens, types = vocabulary["tokens"], vocabulary["types"]
    ids = {text: i for i, (text, kind) in enumerate(zip(tokens, types))}
    t = Tokenizer(models.BPE(vocab=ids, merges=[tuple(m.split(" ")) for m in vocabulary["merges"]]))
    if vocabulary["normalizer"] == "nfc":
        t.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if vocabulary["pre"] == "falcon":
        t.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Punctuation("contiguous"), byte_level, pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")])
    else:
        t.pre_tokenizer = byte_level
    t.add_special_tokens([AddedToken(x, normalized=False) for x, kind in zip(tokens, types) if kind == CONTROL])
    t.add_tokens([AddedToken(x, normalized=True) for x, kind in zip(tokens, types) if kind == USER_DEFINED])
    t.encode_special_tokens = not parse_special
    return t


def encode(tokenizer, data):
    """Ids of a file's bytes; what is not UTF-8 becomes U+FFFD, as in any Unicode string."""
    return tokenizer.encode(data.decode("utf-8", errors="replace"), add_special_tokens=False).ids
