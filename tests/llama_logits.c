/* llama_logits: what llama.cpp says after each token of a sequence. Linked with libllama by tests/build_llama.py.

       llama_logits MODEL N_UBATCH N_THREADS < ids > logits

   ids: token ids in decimal, separated by white space. logits: raw float32 [tokens, vocab] in the machine's byte order. */
#include <stdio.h>
#include <stdlib.h>
#include "llama.h"

static void die(const char *what) {
    fprintf(stderr, "llama_logits: %s\n", what);
    exit(1);
}

/* llama.cpp's own log: warnings and errors only. */
static void log_errors(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char **argv) {
    if (argc != 4) die("usage: llama_logits MODEL N_UBATCH N_THREADS < ids > logits");
    int n_ubatch = atoi(argv[2]), n_threads = atoi(argv[3]);
    if (n_ubatch < 1 || n_threads < 1) die("N_UBATCH and N_THREADS are positive");

    int n_tokens = 0, capacity = 0;
    llama_token *tokens = NULL; /* [n_tokens] */
    for (int id; scanf("%d", &id) == 1;) {
        if (n_tokens == capacity) {
            capacity = capacity ? 2 * capacity : 1024;
            tokens = realloc(tokens, (size_t)capacity * sizeof *tokens);
            if (!tokens) die("out of memory");
        }
        tokens[n_tokens++] = id;
    }
    if (n_tokens == 0) die("no token ids on standard input");

    llama_log_set(log_errors, NULL);
    llama_backend_init();
    struct llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    struct llama_model *model = llama_model_load_from_file(argv[1], model_params);
    if (!model) die("the model could not be loaded");

    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t)n_tokens;
    params.n_batch = params.n_ubatch = (uint32_t)n_ubatch;
    params.n_threads = params.n_threads_batch = n_threads;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) die("the context could not be made");

    int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_batch batch = llama_batch_init(n_ubatch, 0, 1);
    for (int start = 0; start < n_tokens; start += n_ubatch) {
        batch.n_tokens = n_tokens - start < n_ubatch ? n_tokens - start : n_ubatch;
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i] = tokens[start + i];
            batch.pos[i] = start + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch) != 0) die("llama_decode failed");
        size_t count = (size_t)batch.n_tokens * (size_t)n_vocab;
        if (fwrite(llama_get_logits(context), sizeof(float), count, stdout) != count) die("standard output is not writable");
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    free(tokens);
    return fflush(stdout) == 0 ? 0 : 1;
}
