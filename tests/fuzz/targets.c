// The fuzz targets: each calls the entry in its parser's own section of mamba.c. FUZZ_TARGET in the environment names it.
// libFuzzer calls both functions below.
//
//   clang -g -O1 -std=gnu11 -ffp-contract=off -fsanitize=fuzzer,address,undefined targets.c -lm
#define MAMBA_FUZZ
#define MAMBA_NO_MAIN
#include "../../mamba.c"

enum { N_VOCABULARIES = 6 };
static struct tokenizer vocabularies[N_VOCABULARIES];

static void fuzz_vocabularies(const uint8_t *data, size_t n) { fuzz_tokenizer(vocabularies, N_VOCABULARIES, data, n); }

static const struct {
    const char *name;
    void (*run)(const uint8_t *data, size_t n);
} targets[] = {{"gguf", fuzz_gguf}, {"tokenizer", fuzz_vocabularies}, {"state", fuzz_state}, {"jsonl", fuzz_jsonl},
             {"fasta", fuzz_fasta}, {"bed", fuzz_bed}, {"vcf", fuzz_vcf}, {"wav", fuzz_wav}};

static void (*target)(const uint8_t *data, size_t n);

static void load_vocabularies(void) {
    const char *files[N_VOCABULARIES] = {"tokenizer.bin", "tests/fixtures/vocab_gpt2.gguf", "tests/fixtures/vocab_nfc.gguf",
        "tests/fixtures/vocab_falcon.gguf", "tests/fixtures/vocab_bytes.gguf", "tests/fixtures/vocab_characters.gguf"};
    for (int i = 0; i < N_VOCABULARIES; i++) {
        struct gguf g;
        struct error e = {""};
        if (!gguf_open(&g, files[i], &e) || !tokenizer_load(&vocabularies[i], &g, &e)) die("%s", e.text);
        vocabularies[i].file = g;
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *name = getenv("FUZZ_TARGET");
    for (size_t i = 0; name && i < sizeof targets / sizeof *targets; i++)
        if (strcmp(targets[i].name, name) == 0) target = targets[i].run;
    if (!target) die("FUZZ_TARGET names no target");
    if (target == fuzz_vocabularies) load_vocabularies();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    target(data, n);
    return 0;
}
