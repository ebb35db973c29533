// The fuzz targets: what strangers' files and lines go through in mamba.c. FUZZ_TARGET in the environment names one.
// libFuzzer calls both functions below.
//
//   clang -g -O1 -std=gnu11 -ffp-contract=off -fsanitize=fuzzer,address,undefined targets.c -lm
#define MAMBA_NO_MAIN
#include "../../mamba.c"

enum { N_VOCABULARIES = 6 };
static struct tokenizer vocabularies[N_VOCABULARIES];

// A state file from a stranger, for a small model. Only one with the right checksum gets far, so it is put right.
static void fuzz_state(const uint8_t *data, size_t n) {
    struct layer layers[2] = {{0}};
    struct model m = {.c = {.n_layer = 2, .d_inner = 5, .d_state = 3, .d_conv = 4, .n_vocab = 9, .level = {{.d_inner = 5}}},
                      .layers = layers, .fingerprint = 7};
    lay_out_state(&m);
    struct sequence *s = sequence_new(&m.c);
    struct resume *r = xcalloc(1, sizeof *r);
    struct error e = {""};
    uint8_t *file = xmalloc(n);
    if (n) memcpy(file, data, n);
    if (n >= 8) memcpy(file + n - 8, &(uint64_t){hash_bytes(STATE_VERSION, file, n - 8)}, 8);
    if (!state_parse(file, n, &m, s, r, &e) && !e.text[0]) abort();  // refused without a word
    free(file);
    free(r);
    sequence_free(s);
}

// A model file from a stranger: its header is read, its tensors are bound, its vocabulary is loaded, and if it is a small
// model it runs, for weights of any kind.
static void fuzz_gguf(const uint8_t *data, size_t n) {
    struct model m = {.file = {.map = data, .size = n}};
    struct tokenizer t = {0};
    struct error e = {""};
    bool ok = gguf_parse(&m.file, &e);
    struct error in_vocabulary = {""};
    if (ok && gguf_has_tokenizer(&m.file)) {
        struct ids ids = {0};
        bool loaded = tokenizer_load(&t, &m.file, &in_vocabulary);
        if (loaded) tokenize(&t, (const char *)data, n < 64 ? n : 64, true, &ids);
        else if (!in_vocabulary.text[0]) abort();  // refused without a word
        if (loaded) tokenizer_close(&t);
        free(ids.p);
    }
    ok = ok && model_bind(&m, &e);
    if (ok && m.c.n_layer < 4 && m.c.d_model <= 64 && m.c.d_inner <= 256 && m.c.n_vocab <= 256) {
        struct context *ctx = context_new(&m, choose_kernels(), 1, 8, 1);
        struct sequence *s = sequence_new(&m.c);
        forward(ctx, &(struct segment){s, (int32_t[8]){0}, 8, true}, 1, m.c.n_layer);
        sequence_free(s);
        context_free(ctx);
    }
    if (ok == (e.text[0] != 0)) abort();  // refused without a word, or accepted with one
    m.file.map = NULL;               // not mapped
    model_close(&m);
}

// A text in one of the vocabularies, which the first byte chooses: its ids are in the vocabulary, give the text back as it was
// after normalisation, and are those of its two parts where it can be cut.
static void fuzz_tokenizer(const uint8_t *data, size_t n) {
    if (n == 0) return;
    const struct tokenizer *t = &vocabularies[data[0] % N_VOCABULARIES];
    const bool parse_special = data[0] & 128;
    struct ids ids = {0};
    struct buffer expected = {0}, found = {0};
    const char *text = (const char *)data + 1;
    tokenize(t, text, n - 1, parse_special, &ids);
    struct ids parts = {0};
    const size_t cut = n > 1 ? last_cut(t, text, 1, n - 1) : 0;
    if (cut) tokenize(t, text, cut, parse_special, &parts);
    if (cut) tokenize(t, text + cut, n - 1 - cut, parse_special, &parts);
    if (cut && (parts.n != ids.n || memcmp(parts.p, ids.p, ids.n * sizeof *ids.p) != 0)) abort();
    free(parts.p);
    for (size_t i = 0; i < ids.n; i++) {
        if (ids.p[i] < 0 || ids.p[i] >= t->n_tokens) abort();
        buffer_add(&found, t->token[ids.p[i]].p, t->token[ids.p[i]].n);
    }
    if (t->characters) buffer_add(&expected, text, n - 1);
    else repair_utf8(text, n - 1, &expected);
    size_t normal_n = 0;
    char *normal = t->nfc && !parse_special ? nfc(expected.p, expected.n, &normal_n) : NULL;
    bool every_byte = true;  // a vocabulary that lacks bytes loses them
    for (int b = 0; b < 256; b++) every_byte &= t->byte_token[b] >= 0;
    struct str wanted = {normal ? normal : expected.p, normal ? normal_n : expected.n};
    bool normalised_in_parts = t->nfc && parse_special;
    bool same = found.n == wanted.n && (!wanted.n || memcmp(found.p, wanted.p, wanted.n) == 0);
    if (every_byte && !normalised_in_parts && !same) abort();
    free(normal);
    free(expected.p);
    free(found.p);
    free(ids.p);
}

// A FASTA file from a stranger, through a pipe of memory: names and bases are what they should be, nothing is lost, and what
// a record's region holds is what was read from beginning to end.
static void fuzz_fasta(const uint8_t *data, size_t n) {
    static struct fasta fa;
    struct error e = {""};
    struct buffer all = {0};  // of each record without a wrong letter: its name, a 0, its bases, '\n'
    const struct fasta start = {.path = "fuzz", .line_begins = true, .keep_case = n % 2};
    uint8_t bases[7];
    fa = start;
    if (!(fa.f = fmemopen((void *)data, n, "rb"))) return;
    while (fasta_next(&fa, &e)) {
        if (strpbrk(fa.name, " \t\n")) abort();
        const size_t begin = all.n;
        buffer_add(&all, fa.name, strlen(fa.name) + 1);
        for (size_t got = sizeof bases; got == sizeof bases;) {
            got = fasta_read(&fa, bases, sizeof bases, &e);
            for (size_t i = 0; i < got; i++)
                if (!strchr("ACGTNacgtn", bases[i])) abort();
            buffer_add(&all, bases, got);
        }
        buffer_add(&all, "\n", 1);
        if (e.text[0]) all.n = begin;
        e.text[0] = 0;
    }
    fasta_close(&fa);
    fa = start;
    if (!(fa.f = fmemopen((void *)data, n, "rb"))) abort();
    bool indexed = !e.text[0] && fasta_index(&fa, &e);
    for (size_t at = 0, next; indexed && at < all.n; at = next) {
        const char *name = all.p + at, *from = name + strlen(name) + 1;
        const size_t n_bases = (size_t)((char *)memchr(from, '\n', (size_t)(all.p + all.n - from)) - from);
        next = (size_t)(from - all.p) + n_bases + 1;
        const struct fasta_record *r = fasta_find(&fa, str_of(name), &e);
        for (size_t begin = 0; r && begin < n_bases && !e.text[0]; begin += 3) {
            const size_t end = begin + sizeof bases < n_bases ? begin + sizeof bases : n_bases;
            if (!fasta_seek(&fa, r, (int64_t)begin, (int64_t)end, &e)) abort();
            size_t got = fasta_read(&fa, bases, sizeof bases, &e);
            if (!e.text[0] && (got != end - begin || memcmp(bases, from + begin, got) != 0)) abort();
        }
        e.text[0] = 0;
    }
    fasta_close(&fa);
    free(all.p);
}

// A line of BED from a stranger, about a file of ours: a region lies in its record, and its bases are there.
static void fuzz_bed(const uint8_t *data, size_t n) {
    static struct fasta fa;
    struct str line = {(const char *)data, n};
    struct error e = {""};
    int64_t begin, end;
    uint8_t bases[32];
    if (!fa.f) {
        static char file[] = ">a\nACGTACGT\nACG\n>chr1\nACGTACG\nACGTACG\n>track1\nA\n>empty\n";
        fa = (struct fasta){.f = fmemopen(file, sizeof file - 1, "rb"), .path = "fuzz", .line_begins = true};
        if (!fa.f || !fasta_index(&fa, &e)) abort();
    }
    if (bed_is_comment(line)) return;
    const struct fasta_record *r = bed_parse(&fa, line, &begin, &end, &e);
    if (!r != !!e.text[0]) abort();
    if (!r) return;
    if (begin < 0 || begin > end || end > r->n_bases || !fasta_seek(&fa, r, begin, end, &e)) abort();
    if (fasta_read(&fa, bases, sizeof bases, &e) != (size_t)(end - begin) || e.text[0]) abort();
}

// A line of VCF from a stranger. What is written is read again, and written as the same bytes.
static void fuzz_vcf(const uint8_t *data, size_t n) {
    struct buffer first = {0}, second = {0};
    struct error e = {""};
    struct str line = {(const char *)data, n};
    if (n && !memchr(data, '\n', n) && data[0] == '#') add_vcf_header(&first, line);
    for (int run = 0; run < 2 && n && data[0] != '#' && !memchr(data, '\n', n); run++) {
        struct variant *v = xcalloc(1, sizeof *v);
        if (run) line = (struct str){first.p, first.n - 1};
        if (variant_parse(v, line, &e)) {
            if (n % 3 == 0) v->problem = "REF_MISMATCH";
            if (v->n_alleles < 1 || v->position < -1) abort();
            v->nll[0] = 1;
            add_variant_line(run ? &second : &first, v);
            add_variant_rows(&second, v);
            if (!run) second.n = 0;
            else if (second.n < first.n || memcmp(first.p, second.p, first.n) != 0) abort();
        } else if (run) {
            abort();
        } else {
            run = 2;
        }
        variant_free(v);
    }
    free(first.p);
    free(second.p);
}

// A WAV file from a stranger. What comes out is finite, and its codes are codes.
static void fuzz_wav(const uint8_t *data, size_t n) {
    struct wav w;
    struct error e = {""};
    bool ok = wav_parse(&w, data, n, &e);
    if (ok == (e.text[0] != 0)) abort();  // refused without a word
    for (int loudness = LOUDNESS_MINMAX; ok && loudness <= LOUDNESS_NONE; loudness++) {
        const struct clip_scale scale = clip_scale(w.samples, w.n, (enum loudness)loudness);
        for (size_t i = 0; i < w.n; i++) {
            const int32_t code = mu_law_encode((double)w.samples[i], &scale);
            if (code < 0 || code > 255 || !isfinite(mu_law_decode(code, &scale))) abort();
        }
    }
    free(w.samples);
}

// A line of --jsonl. What is read as a prompt is written as the same string.
static void fuzz_jsonl(const uint8_t *data, size_t n) {
    const struct settings settings = {.n_predict = 1};
    const struct options o = {.settings = settings};
    struct request *r = request_new(&(struct session){.o = &o}, NULL);
    struct str prompt, again;
    struct buffer repaired = {0}, written = {0};
    if (!request_parse(r, (struct str){(const char *)data, n}, 300, &prompt)) {
        if (!r->error.text[0]) abort();  // refused without a word
        prompt.n = 0;
    }
    if (prompt.n) repair_utf8(prompt.p, prompt.n, &repaired);
    add_json_string(&written, (struct str){repaired.p, repaired.n});
    struct json j = {written.p, written.p, written.p + written.n, &r->error};
    r->error.text[0] = 0;
    if (!json_string(&j, &again) || again.n != repaired.n || (again.n && memcmp(again.p, repaired.p, again.n) != 0)) abort();
    free(repaired.p);
    free(written.p);
    request_free(r);
}

static const struct {
    const char *name;
    void (*run)(const uint8_t *data, size_t n);
} targets[] = {{"gguf", fuzz_gguf}, {"tokenizer", fuzz_tokenizer}, {"state", fuzz_state}, {"jsonl", fuzz_jsonl},
             {"fasta", fuzz_fasta}, {"bed", fuzz_bed}, {"vcf", fuzz_vcf}, {"wav", fuzz_wav}};

static void (*target)(const uint8_t *data, size_t n);

static void load_vocabularies(void) {
    const char *files[N_VOCABULARIES] = {"tokenizer.bin", "tests/fixtures/vocab_gpt2.gguf", "tests/fixtures/vocab_nfc.gguf",
        "tests/fixtures/vocab_falcon.gguf", "tests/fixtures/vocab_bytes.gguf", "tests/fixtures/vocab_characters.gguf"};
    for (int i = 0; i < N_VOCABULARIES; i++) {
        struct gguf g;
        struct error e = {""};
        if (!gguf_open(&g, files[i], &e) || !tokenizer_load(&vocabularies[i], &g, &e)) die("%s", e.text);
        gguf_close(&g);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *name = getenv("FUZZ_TARGET");
    for (size_t i = 0; name && i < sizeof targets / sizeof *targets; i++)
        if (strcmp(targets[i].name, name) == 0) target = targets[i].run;
    if (!target) die("FUZZ_TARGET names no target");
    if (target == fuzz_tokenizer) load_vocabularies();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    target(data, n);
    return 0;
}
