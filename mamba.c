// mamba: selective state space models (Mamba, arXiv 2312.00752) of text, DNA and sound, in one file.
//
//   cc -std=gnu11 -O2 -ffp-contract=off -fopenmp mamba.c -o mamba -lm
//
// `make cuda` adds mamba_cuda.cu, which runs the same forwards on a GPU behind the interface at the end of section 0.
//
// A model is a GGUF file, read through mmap and used in place. Every sequence owns one recurrent state a layer, so
// memory does not grow with the length of the text. One forward serves prefill, decode, scoring and embedding: it takes
// any number of sequences with any number of new tokens each.
//
// The promise: the same model, tokens and seed give the same bits whatever the number of threads, the batch, the way
// the prompt is cut into chunks, a save and load of the state, and the instruction set. It holds because every output
// is a sum whose additions happen in one order, fixed by its length and weight format alone (section 4).
//
// Sections, bottom up; each opens with its purpose, what it may call and who calls it:
//
//    0  structs                                  9  sampler
//    1  errors, memory, threads, half floats    10  JSON
//    2  GGUF                                    11  genomes: FASTA, BED, VCF
//    3  configuration, tensor binding           12  sound: WAV, mu-law
//    4  kernels, once per instruction set       13  requests
//    5  layers                                  14  engine: many sequences at once
//    6  forward over a ragged batch             15  commands
//    7  sequence state: save and load           16  bench
//    8  Unicode and tokenizer                   17  command line

#ifndef MAMBA_ISA_PASS  // the kernels of section 4 are compiled by including this file again: see there

#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // sched_getaffinity
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64  // files over 2 GB on 32-bit machines
#endif
#ifndef __GNUC__
#error "gcc or clang is needed"
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifndef MAMBA_HEADER_ONLY  // mamba_cuda.cu wants the structs and the interface of the GPU, and is C++
#include <complex.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#if __has_include(<linux/seccomp.h>)
#define MAMBA_SANDBOX
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#endif  // not MAMBA_HEADER_ONLY

#define MAMBA_VERSION "0.1"

// MAMBA_PLAIN_C: the portable kernels alone, which compile faster. Old clang knows the dot product only where the whole
// program may use it.
#if defined(__x86_64__) && !defined(MAMBA_PLAIN_C)
#define MAMBA_X86_KERNELS
#if __clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11)
#define MAMBA_AVX_VNNI
#ifdef __linux__  // whom a program must ask
#define MAMBA_AMX
#endif
#endif
#elif defined(__aarch64__) && !defined(MAMBA_PLAIN_C) && \
    (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#define MAMBA_NEON_KERNELS
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF files and state files are little-endian, and so must the machine be"
#endif
#if !defined(MAMBA_HEADER_ONLY) && ((FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16) || defined(__FAST_MATH__))
#error "results would differ from those of other machines: no -ffast-math, and for 32-bit x86 -msse2 -mfpmath=sse"
#endif

// ====================================================================================================================
// 0. Structs.
// What the sections share. No code. Used by all of them.
// ====================================================================================================================

struct error {
    char text[640];  // one line, without the program's name and a line end
};

struct str {  // bytes that somebody else owns, not terminated
    const char *p;
    size_t n;
};

enum gguf_type {  // of a metadata value, numbered as in the file
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY,
    GGUF_U64, GGUF_I64, GGUF_F64, GGUF_N_TYPES
};

struct gguf_kv {
    struct str key;
    enum gguf_type type;       // of the value, or of each element of an array
    bool is_array;
    uint64_t count;            // elements; 1 for a plain value
    const uint8_t *value;      // first element, inside the mapping
};

enum format {  // of tensor data; table in section 2, quantised blocks in section 4
    F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, N_FORMATS
};

struct tensor {
    struct str name;
    enum format format;
    int n_dims;
    int64_t ne[4];             // elements a dimension, the fastest first; unused ones are 1
    uint64_t offset, n_bytes;  // of the data; offset from the data section's start
    const uint8_t *data;       // inside the mapping
};

struct gguf {                  // owner of the mapping, kv and tensors; gguf_close frees them
    char *path;
    const uint8_t *map;
    size_t size, data_start;   // bytes of the file; where tensor data begins
    struct gguf_kv *kv;        // [n_kv], in file order
    struct tensor *tensors;    // [n_tensors], in file order
    const struct str **by_key;   // [n_kv] into kv, sorted; each is the beginning of a struct gguf_kv
    const struct str **by_name;  // [n_tensors] into tensors, likewise
    uint64_t n_kv, n_tensors;
    uint32_t version;
};

enum loudness { LOUDNESS_MINMAX, LOUDNESS_PEAK, LOUDNESS_NONE };  // how a clip is scaled before it becomes codes: section 12

enum { MAX_POOLS = 4, MAX_LEVELS = MAX_POOLS + 1 };

struct level_size {            // of the blocks at one rate; an audio U-Net has several, a text model one
    int d_model, d_inner, dt_rank;
    int period;                // tokens a step
};

struct config {
    int n_layer, d_model, d_inner, d_state, d_conv, dt_rank;  // the paper's names; d_inner = E*D, d_state = N; of level 0
    struct level_size level[MAX_LEVELS];  // the outermost first
    int n_pools, pool[MAX_POOLS];  // steps that become one between two levels; n_pools 0: a plain stack of blocks
    int n_blocks;              // a stage, of which a U-Net has 2 * n_pools + 1; layers are numbered in order of flow
    bool layer_norm;           // norms are LayerNorm; RMSNorm otherwise
    bool zoh;                  // B is discretised by zero-order hold (equation 4); as dt * B otherwise, like Mamba's code
    int n_vocab;               // rows of the embedding; a tokenizer may use fewer
    int context_length;        // tokens that a text of the training had; 0 when unknown. Nothing limits how long a text may be
    float norm_eps;
    int n_labels;              // of the classifier; 0: there is none
    int sample_rate;           // of an audio model, whose tokens are mu-law codes; 0: not one
    int start_token;           // what stands before a clip
    enum loudness loudness;
    bool dt_b_c_rms;           // FalconMamba: RMSNorm without weight on dt, B and C
    float dt_b_c_eps;
    size_t conv_floats, ssm_floats, pool_floats;  // of a sequence's buffers
};

struct matrix {                // [rows][cols], row-major, in the mapping
    const uint8_t *data;
    enum format format;
    int rows, cols;
    size_t row_bytes;
};

// Vectors and the small per-channel arrays are copied at load: rows padded with zeros to 16 floats, channels innermost.
struct layer {
    int level;                 // whose sizes are its own
    bool s4;                   // dt, B and C do not depend on the input (algorithm 1): no x and dt
    bool is_complex;           // A, B, C and the states; a state stands for its conjugate, too
    size_t conv_at, ssm_at;    // where its part of a sequence's buffers begins, in floats
    const float *norm, *norm_b;  // [d_model]; norm_b of LayerNorm only
    struct matrix in;          // [2*d_inner][d_model]: rows of x, then rows of the gate z
    const float *conv_w;       // [d_conv][d_inner], the oldest tap first
    const float *conv_b;       // [d_inner]
    struct matrix x;           // [dt_rank + 2*d_state*R][d_inner]: rows of dt, B, C. R is 1, or 2 of complex numbers: real and
                               // imaginary part
    struct matrix dt;          // [d_inner][dt_rank]
    const float *dt_b;         // [d_inner]
    const float *a2;           // [d_inner/16][d_state][R][16]: A * log2(e), so that exp(dt*A) = exp2(dt*a2); its imaginary part as
                               // it is, an angle
    const float *a_inverse;    // [d_inner/16][d_state][R][16]: 1 / A, with zero-order hold
    const float *decay, *weight;  // [d_inner/16][d_state][R][16] of S4: exp(dt*A), and C times the discretised B
    const float *d;            // [d_inner]
    struct matrix out;         // [d_model][d_inner]
};

struct pooling {               // between level i and level i + 1 of a U-Net, P = pool[i], D = d_model of level i
    struct matrix down;        // [2*D][P*D], one step behind the other
    struct matrix up;          // [P*D][2*D]
    const float *down_b, *up_b;  // [2*D], [P*D]
    size_t at;                 // of a sequence's pool buffer: steps that wait for the others [P][D], then what came up last [P][D]
};

struct model {                 // owner of the file, layers and the arena of small arrays; model_close frees them
    struct gguf file;
    struct config c;
    struct matrix embd;        // [n_vocab][d_model]
    struct matrix head;        // [n_vocab][d_model]; the embedding itself when tied
    const float *head_b;       // [n_vocab] of a U-Net, or NULL
    const float *norm, *norm_b;  // [d_model]
    struct pooling pools[MAX_POOLS];
    const float *cls_w, *cls_b;  // [n_labels][d_model], [n_labels]: the classifier, on the output of norm
    struct str *labels;        // [n_labels], in the mapping
    struct layer *layers;      // [n_layer]
    float *arena;
    uint64_t fingerprint;      // of header and samples of the weights: ties a saved state to its model
};

struct sequence {              // one stream of tokens; owner of its buffers
    float *conv;               // of each layer: [d_conv-1][d_inner], the last inputs of the convolution, the oldest first
    float *ssm;                // of each layer: [d_inner/16][d_state][R][16], h of equation 2a
    float *pool;               // of each pooling of a U-Net: struct pooling
    int64_t n_past;            // tokens consumed
    struct device *device;     // the GPU that holds the buffers, in its slot; they are not here then. NULL: the CPU
    int slot;
};

// 256 columns of a token's activations in blocks of 32, value = q * scale: all that products with quantised weights read of them.
struct act_chunk {
    int8_t q[256];
    float scale[8];
    float scaled_sum[8];       // scale * sum of q, of each 32
    int32_t surplus[8];        // 128 * sum of q, of each 32: by so much the product with weights that are 128 too high is too high
    int32_t surplus_16[16];    // likewise, of each 16
};

// Activations, one row a token: floats, and for block-quantised weights the same numbers as integers.
struct act {
    float *f;                  // [n_rows][ld]; what pads a row to ld stays zero
    struct act_chunk *q;       // [ceil(columns/256)][n_rows], NULL when no consumer is block-quantised
    int ld, n_rows;            // ld is a multiple of 32
};

struct segment {               // the new tokens of one sequence in a batch
    struct sequence *seq;
    const int32_t *tokens;
    int n_tokens;
    bool want_logits;          // of the last token
};

// ---- The GPU. mamba_cuda.cu implements these; a program built without it has no struct device (MAMBA_CUDA). ----
// A function that returns false (or NULL) has filled the error, in one line without the file's name; what a device did before
// is kept. All calls come from one thread. Sums have one order for all shapes, so results do not depend on the batch.

struct device;                 // owner of a model's weights on a GPU, of all memory that a forward needs there, and of states

struct device_shape {          // what memory is taken for
    int max_tokens, max_rows, max_sequences;  // of a forward; logits of a call; states
};

struct device_facts {
    char name[128];
    uint64_t bytes;            // that this program takes there
    double read_gb_per_s;      // what its memory gives, by its clock and width; 0: unknown
};

struct device_choice {
    int32_t id;                // the likeliest token that may be drawn; -1: there is none
    float max;                 // of all logits; NaN when one is not finite
};

// q, scales and minima of a row of block-quantised weights: element k = scale[k / group] * (q[k] - zero) + min[k / group].
typedef void unpack_row(enum format format, const uint8_t *row, int n, int8_t *q, float *scale, float *min);

#ifdef __cplusplus
extern "C" {
#endif
bool device_usable(struct error *e);  // is there a GPU, with a driver that knows this program's code?
bool device_runs(const struct model *m, struct error *e);  // can it run this model?
struct device *device_open(const struct model *m, struct device_shape shape, unpack_row *unpack, struct error *e);
void device_close(struct device *d);
struct device_facts device_facts(const struct device *d);
// x [n_tokens][ld_x]: rows of the embedding, one a token. Row i of logits [rows][ld_logits] belongs to the i-th segment that
// wants logits, as in forward(); logits NULL: they stay where they are, and device_choose() reads them there.
bool device_forward(struct device *d, const struct segment *segments, int n_segments, int n_layers, const float *x, int ld_x,
                    float *logits, int ld_logits, struct error *e);
bool device_choose(struct device *d, int n_rows, struct device_choice *choices, struct error *e);
bool device_ban(struct device *d, const int32_t *tokens, size_t n, struct error *e);  // tokens that are never drawn
// Of the last forward: logits of n of its tokens; a row a token of the final norm's output, or of the residual stream.
bool device_logits(struct device *d, const int *tokens, int n, float *logits, int ld_logits, struct error *e);
bool device_hidden(struct device *d, bool normed, float *rows, int ld, struct error *e);
int device_take_slot(struct device *d);  // -1: there is none left
void device_leave_slot(struct device *d, int slot);
bool device_reset_state(struct device *d, int slot, struct error *e);
bool device_copy_state(struct device *d, int to, int from, struct error *e);
bool device_read_state(struct device *d, int slot, float *conv, float *ssm, struct error *e);  // laid out as in struct sequence
bool device_write_state(struct device *d, int slot, const float *conv, const float *ssm, struct error *e);
#ifdef __cplusplus
}
#endif

#ifndef MAMBA_HEADER_ONLY  // up to the end of the file

// Progress of one phase of a forward: a cut of work whose items do not depend on each other.
struct phase {
    _Alignas(64) atomic_int n_done;  // the phase has ended when all its items are done
};

// Buffers of the steps of one level in a forward, "tokens" of it. Text has level 0 alone.
struct level {
    struct level_size size;
    int ld_model, ld_dbc, ld_up;  // floats from token to token
    float *x;                  // [max_tokens][ld_model] residual stream
    struct act normed;         // [max_tokens][d_model] input of in_proj; after a forward, in level 0: the final norm's output
    struct act u;              // [max_tokens][d_inner] x of equation 2, after convolution and SiLU
    float *z;                  // [max_tokens][u.ld] gate
    float *dbc;                // [max_tokens][ld_dbc] dt (low rank), B, C of each token
    struct act dt_low;         // [max_tokens][dt_rank] input of dt_proj
    struct act y;              // [max_tokens][d_inner] dt before the scan, its gated output after
    float *skip;               // [n_blocks + 1][max_tokens][ld_model] what the way up adds, of a U-Net
    struct act down_in;        // [max_tokens][P*d_model] input of the pooling to the next level
    float *up;                 // [max_tokens][ld_up] what the next level sends up, [P][d_model]
    int n_tokens;              // of the batch in progress
    int *n_new;                // [max_tokens] of each of its segments
};

struct context {               // what a forward needs besides the model; owner of all buffers, allocated once
    const struct model *m;
    const struct kernels *k;
    int n_threads, max_tokens, max_rows;  // tokens a forward, logit rows a call
    struct level level[MAX_LEVELS];
    struct act head_in;        // [max_rows][d_model]
    float *logits;             // [max_rows][ld_vocab]
    int ld_vocab;
    int n_team;                // threads of the last forward
    int n_left_out;            // threads that are done without, because other processes have their cores: review_team()
    bool on_probation;         // a thread that was left out is back, not for long
    int patience;              // how long one is left out; more after each try that failed
    double worked;             // seconds of work so far
    double loss, change;       // at what of these a thread last lost its core, and one was last left out or came back
    atomic_llong longest_wait; // nanoseconds that a thread waited for another in the forward in progress
    struct phase *phases;      // [n_phases] of a forward
    atomic_int *n_taken;       // [n_threads][ld_phases] items of each thread's share of a phase that are taken
    int n_phases, ld_phases;
    const struct segment *segments;  // the batch in progress
    int n_segments, n_tokens, n_rows, n_run_layers;
    struct device *device;     // runs the forwards; NULL: the CPU does. Owned
    bool wants_hidden;         // x and normed are read after a forward: a device copies them to here
    bool only_choices;         // a device's next forward gives choices instead of logits
    struct device_choice *choices;  // [max_rows]; NULL on the CPU
};

// ====================================================================================================================
// 1. Errors, memory, threads, half floats.
// Calls libc only; called from everywhere. die() is for what a command cannot go on from; parsers return false and
// fill a struct error, so that they can be tested with hostile input inside one process.
// ====================================================================================================================

// Control characters of names found in files must not reach the terminal: below 32, 127, and U+0080 to U+009F, C2 80 to C2 9F in
// UTF-8.
static void print_line(FILE *f, const char *text) {
    fputs("mamba: ", f);
    for (int c, before = 0; (c = (unsigned char)*text) != 0; text++, before = c)
        fputc(c < 32 || c == 127 || (before == 0xc2 && c >= 0x80 && c < 0xa0) ? '?' : c, f);
    fputc('\n', f);
}

static char usage_hint[32] = "mamba --help";  // where a wrong command line sends; becomes that of the command

// Says what went wrong and ends the program: with status 1, or with 2 and a hint where it is the command line.
__attribute__((format(printf, 2, 3))) static _Noreturn void end_with(int status, const char *format, ...) {
    struct error e;
    va_list args;
    va_start(args, format);
    vsnprintf(e.text, sizeof e.text, format, args);
    va_end(args);
    fflush(stdout);  // what was written so far is kept
    print_line(stderr, e.text);
    if (status == 2) fprintf(stderr, "Try: %s\n", usage_hint);
    exit(status);
}

#define die(...) end_with(1, __VA_ARGS__)
#define usage_error(...) end_with(2, __VA_ARGS__)

// The first error of a parse stays.
__attribute__((format(printf, 2, 3))) static void set_error(struct error *e, const char *format, ...) {
    if (e->text[0]) return;
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
}

// So that a check reads: return fail(e, ...). A macro, because static analysers do not look into variadic functions and
// have to see the false.
#define fail(e, ...) (set_error(e, __VA_ARGS__), false)

__attribute__((returns_nonnull)) static void *xmalloc(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) die("out of memory: %zu bytes more were asked for", n);
    return p;
}

__attribute__((returns_nonnull)) static void *xrealloc(void *old, size_t n) {
    void *p = realloc(old, n ? n : 1);
    if (!p) die("out of memory: %zu bytes more were asked for", n);
    return p;
}

// Zeroed, 64-byte aligned; free() releases it.
__attribute__((returns_nonnull)) static void *xcalloc(size_t count, size_t size) {
    size_t bytes;
    void *p = NULL;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX / 2 || posix_memalign(&p, 64, bytes ? bytes : 1))
        die("out of memory: %zu times %zu bytes more were asked for", count, size);
    return memset(p, 0, bytes);
}

struct buffer {  // growing bytes; owner of p
    char *p;
    size_t n, capacity;
};

static void buffer_add(struct buffer *b, const void *data, size_t n) {
    if (n > b->capacity - b->n) {
        b->capacity = (b->n + n) * 2 + 64;
        b->p = xrealloc(b->p, b->capacity);
    }
    if (n) memcpy(b->p + b->n, data, n);  // NOLINT(clang-analyzer-core.NonNullParamChecker): n > 0 has made room
    b->n += n;
}

static struct str str_of(const char *text) { return (struct str){text, strlen(text)}; }

// A string of its own; the caller owns it.
static char *copy_text(struct str s) {
    char *copy = xmalloc(s.n + 1);
    if (s.n) memcpy(copy, s.p, s.n);
    copy[s.n] = 0;
    return copy;
}

// Appends text, and a 0 behind it that does not count.
__attribute__((format(printf, 2, 0))) static void buffer_vprintf(struct buffer *b, const char *format, va_list args) {
    for (int pass = 0; pass < 2; pass++) {
        size_t room = b->capacity - b->n;
        va_list once;
        va_copy(once, args);
        int n = vsnprintf(room ? b->p + b->n : NULL, room, format, once);
        va_end(once);
        if (n < 0) return;
        if ((size_t)n < room) {
            b->n += (size_t)n;
            return;
        }
        b->capacity = (b->n + (size_t)n) * 2 + 64;
        b->p = xrealloc(b->p, b->capacity);
    }
}

__attribute__((format(printf, 2, 3))) static void buffer_printf(struct buffer *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    buffer_vprintf(b, format, args);
    va_end(args);
}

// An output file appears under its name only when it is whole: it is written beside its destination, synced and renamed.
// A symbolic link is followed, and the rights of a file that is replaced stay. A pipe or device (/dev/stdout, a FIFO) is written
// directly.
struct outfile {
    FILE *f;
    const char *path;          // the caller's
    char *target, *temporary;  // owned: where path leads, and what becomes it; NULL when written directly
    struct outfile *next;      // of those that are unfinished
};

static struct outfile *unfinished;  // removed at exit, so that an error leaves nothing half-written

static void outfile_discard(struct outfile *o) {
    if (o->f && o->f != stdout) fclose(o->f);
    if (o->temporary) unlink(o->temporary);
    free(o->temporary);
    free(o->target);
    o->f = NULL;
    o->target = o->temporary = NULL;
    for (struct outfile **at = &unfinished; *at; at = &(*at)->next)
        if (*at == o) {
            *at = o->next;
            return;
        }
}

// For handlers of signals, which may not free.
static void unlink_unfinished(void) {
    for (const struct outfile *o = unfinished; o; o = o->next)
        if (o->temporary) unlink(o->temporary);
}

static void discard_unfinished(void) {
    while (unfinished) outfile_discard(unfinished);
}

static bool is_same(const struct stat *x, const struct stat *y) { return x->st_dev == y->st_dev && x->st_ino == y->st_ino; }

// Whether a path leads to this file: not to a pipe or device, which may well have several uses.
static bool leads_to(const char *path, const struct stat *file) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode) && is_same(&st, file);
}

// "-", or the file that standard output goes to, which cannot be replaced meanwhile.
static bool is_stdout(const char *path) {
    struct stat st;
    return strcmp(path, "-") == 0 || (fstat(STDOUT_FILENO, &st) == 0 && leads_to(path, &st));
}

// path NULL: standard output.
static bool outfile_open(struct outfile *o, const char *path, struct error *e) {
    struct stat st;
    *o = (struct outfile){.path = path};
    if (!path || is_stdout(path)) {
        o->f = stdout;
        o->path = "standard output";
        return true;
    }
    const bool exists = stat(path, &st) == 0;
    if (exists && !S_ISREG(st.st_mode)) {
        o->f = fopen(path, "wb");
        return o->f ? true : fail(e, "%s: %s", path, strerror(errno));
    }
    if (!exists && lstat(path, &st) == 0) return fail(e, "%s: a link to nothing", path);
    o->target = realpath(path, NULL);
    if (!o->target) o->target = copy_text(str_of(path));  // there is nothing yet
    size_t n = strlen(o->target);
    o->temporary = xmalloc(n + 8);
    memcpy(o->temporary, o->target, n);
    memcpy(o->temporary + n, ".XXXXXX", 8);
    o->next = unfinished;
    unfinished = o;  // before there is a file, so that no signal finds one that nobody knows
    int fd = mkstemp(o->temporary);
    mode_t mask = umask(0);
    umask(mask);
    if (fd >= 0 && exists && fchown(fd, st.st_uid, st.st_gid) != 0) errno = 0;  // only root may
    if (fd < 0 || fchmod(fd, exists ? st.st_mode & 0777 : 0666 & ~mask) != 0 || !(o->f = fdopen(fd, "wb"))) {
        set_error(e, "%s: cannot be written: %s", path, strerror(errno));
        if (fd >= 0) close(fd);
        else o->temporary[0] = 0;
        outfile_discard(o);
        return false;
    }
    return true;
}

static bool outfile_commit(struct outfile *o, struct error *e) {
    bool ok = fflush(o->f) == 0 && !ferror(o->f);
    if (o->temporary) ok = ok && fsync(fileno(o->f)) == 0 && rename(o->temporary, o->target) == 0;
    if (!ok) {
        set_error(e, "%s: %s", o->path, strerror(errno));
        outfile_discard(o);
        return false;
    }
    if (o->temporary) {  // the rename itself is on disk only when its directory is
        char *slash = strrchr(o->temporary, '/');
        if (slash) slash[1] = 0;
        int dir = open(slash ? o->temporary : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (dir >= 0) {
            fsync(dir);
            close(dir);
        }
        o->temporary[0] = 0;
    }
    outfile_discard(o);
    return true;
}

// Files that are read: "-" is standard input.
static const char *input_name(const char *path) { return strcmp(path, "-") == 0 ? "standard input" : path; }

static FILE *input_open(const char *path, struct error *e) {
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!f) set_error(e, "%s: %s", path, strerror(errno));
    return f;
}

static void input_close(FILE *f) {
    if (f && f != stdin) fclose(f);
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int ceil_div(int n, int by) { return (n + by - 1) / by; }
static int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

// A whole number in decimal digits.
static bool parse_u64(struct str s, uint64_t *out) {
    uint64_t v = 0;
    for (size_t i = 0; i < s.n; i++)
        if (s.p[i] < '0' || s.p[i] > '9' || __builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, s.p[i] - '0', &v))
            return false;
    *out = v;
    return s.n > 0;
}

static int min_int(int a, int b) { return a < b ? a : b; }

// The first two numbers in a small file of the kernel, such as cpu.max; returns how many it found.
static int read_numbers(const char *path, long long *a, long long *b) {
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    int n = fscanf(f, "%lld%*[,- ]%lld", a, b);
    fclose(f);
    return n > 0 ? n : 0;
}

// n, or the cores that the quota of a cgroup is worth, if they are fewer: microseconds a period, in one file or in two.
static int within_quota(int n, const char *root, const char *folder) {
    char path[2200];
    long long quota = 0, period = 0, ignored;
    snprintf(path, sizeof path, "%s%s/cpu.max", root, folder);
    read_numbers(path, &quota, &period);
    snprintf(path, sizeof path, "%s%s/cpu.cfs_quota_us", root, folder);
    read_numbers(path, &quota, &ignored);
    snprintf(path, sizeof path, "%s%s/cpu.cfs_period_us", root, folder);
    read_numbers(path, &period, &ignored);
    return quota > 0 && period > 0 ? min_int(n, (int)((quota + period - 1) / period)) : n;
}

// n, or what this process's cgroup and those around it leave of it. A line is "0::/folder" for version 2 and
// "4:cpu,cpuacct:/folder" for version 1.
static int within_cgroups(int n) {
    char line[2048];
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':'), *folder = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!folder) continue;
        *folder++ = 0;
        folder[strcspn(folder, "\n")] = 0;
        const char *cpu = strstr(controllers, "cpu");
        while (cpu && cpu[3] && cpu[3] != ',') cpu = strstr(cpu + 3, "cpu");  // not cpuset, cpuacct
        const char *root = cpu ? "/sys/fs/cgroup/cpu" : controllers[1] ? NULL : "/sys/fs/cgroup";
        for (char *end = root ? folder + strlen(folder) : NULL; end; end = strrchr(folder, '/')) {
            *end = 0;
            n = within_quota(n, root, folder);
        }
    }
    if (f) fclose(f);
    return n;
}

// Physical cores that this process may use: affinity mask, one hardware thread a core, cgroup quota.
static int default_threads(void) {
    int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t allowed;  // of up to 1024; where there are more, the call fails
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        n = 0;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            // The siblings file reads "0,64" or "0-1". A core counts once, at its first hardware thread that is allowed.
            char path[96];
            long long first = cpu, second = cpu;
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            read_numbers(path, &first, &second);
            bool counted = first < cpu && first >= 0 && first < CPU_SETSIZE && CPU_ISSET((int)first, &allowed);
            if (!counted) n++;
        }
    }
    n = within_cgroups(n);
#endif
    return n > 0 ? n : 1;
}

// Denormal numbers are read and written as zero, in every thread: they cost time (a decayed state is full of them),
// and all instruction sets must agree on what they do with them.
static void flush_denormals(void) {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);  // FTZ and DAZ
#elif defined(__aarch64__)
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1u << 24));
#endif
}

static float float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t bits_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * 0x1p-24f;  // a half's denormals are normal floats: exact, flushed by nothing
    return sign ? -tiny : tiny;
}

static float bf16_to_f32(uint16_t b) { return float_from_bits((uint32_t)b << 16); }

static uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

// The finaliser of SplitMix64: every bit of x counts for every bit of the result.
static uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

// Eight bytes at a time; not for enemies, who can forge it, but for accidents. n may be any number.
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {
    const uint8_t *p = data;
    for (; n; p += 8) {
        uint64_t word = 0;
        size_t take = n < 8 ? n : 8;
        memcpy(&word, p, take);
        h = (h ^ word ^ (uint64_t)take << 56) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 29;
        n -= take;
    }
    return h;
}

// ====================================================================================================================
// 2. GGUF.
// Reads the header of an untrusted file through a cursor that cannot overrun, and checks every size before use. Calls
// section 1; called by section 3, the tokenizer, `inspect` and bench. Errors name the byte offset where it helps.
// ====================================================================================================================

static const struct {
    const char *name;
    int block, bytes;  // elements a block, bytes a block
    int gguf_id;       // number of the type in the file
    int group;         // elements that share a scale; 0: not quantised
    int bits;          // of q, without a sign but in Q8_0
    int zero;          // element = scale * (q - zero), and with has_min + min
    bool has_min;
} formats[N_FORMATS] = {
    [F32] = {"F32", 1, 4, 0, 0, 0, 0, false},
    [F16] = {"F16", 1, 2, 1, 0, 0, 0, false},
    [BF16] = {"BF16", 1, 2, 30, 0, 0, 0, false},
    [Q8_0] = {"Q8_0", 32, 34, 8, 32, 8, 0, false},
    [Q4_0] = {"Q4_0", 32, 18, 2, 32, 4, 8, false},
    [Q4_1] = {"Q4_1", 32, 20, 3, 32, 4, 0, true},
    [Q5_0] = {"Q5_0", 32, 22, 6, 32, 5, 16, false},
    [Q5_1] = {"Q5_1", 32, 24, 7, 32, 5, 0, true},
    [Q2_K] = {"Q2_K", 256, 84, 10, 16, 2, 0, true},
    [Q3_K] = {"Q3_K", 256, 110, 11, 16, 3, 4, false},
    [Q4_K] = {"Q4_K", 256, 144, 12, 32, 4, 0, true},
    [Q5_K] = {"Q5_K", 256, 176, 13, 32, 5, 0, true},
    [Q6_K] = {"Q6_K", 256, 210, 14, 16, 6, 32, false},
};

static bool is_quantized(const struct matrix *m) { return formats[m->format].block > 1; }

static const struct {
    const char *name;
    int bytes;
} gguf_types[GGUF_N_TYPES] = {
    [GGUF_U8] = {"u8", 1},   [GGUF_I8] = {"i8", 1},   [GGUF_U16] = {"u16", 2},  [GGUF_I16] = {"i16", 2},
    [GGUF_U32] = {"u32", 4}, [GGUF_I32] = {"i32", 4}, [GGUF_F32] = {"f32", 4},  [GGUF_BOOL] = {"bool", 1},
    [GGUF_U64] = {"u64", 8}, [GGUF_I64] = {"i64", 8}, [GGUF_F64] = {"f64", 8},  [GGUF_STRING] = {"string", 0},
    [GGUF_ARRAY] = {"array", 0},
};

struct cursor {
    const uint8_t *p;
    size_t size, pos;
    struct error *error;  // the first error stays, and every later read gives zeros
};

static bool cursor_take(struct cursor *c, size_t n, const uint8_t **data) {
    if (c->error->text[0]) return false;
    if (n > c->size - c->pos)
        return fail(c->error, "the file ends at byte %zu, inside its header: %zu bytes more were expected at byte %zu",
                    c->size, n, c->pos);
    *data = c->p + c->pos;
    c->pos += n;
    return true;
}

static uint64_t cursor_uint(struct cursor *c, int bytes) {
    const uint8_t *p = NULL;
    uint64_t v = 0;
    if (cursor_take(c, (size_t)bytes, &p)) memcpy(&v, p, (size_t)bytes);
    return v;
}

static struct str cursor_str(struct cursor *c) {
    uint64_t n = cursor_uint(c, 8);
    const uint8_t *p = NULL;
    if (n > SIZE_MAX / 2) set_error(c->error, "a string of %" PRIu64 " bytes at byte %zu of the header", n, c->pos);
    if (!cursor_take(c, (size_t)n, &p)) return (struct str){"", 0};
    return (struct str){(const char *)p, (size_t)n};
}

static bool str_is(struct str s, const char *text) { return s.n == strlen(text) && memcmp(s.p, text, s.n) == 0; }

static bool str_begins(struct str s, const char *text) { return s.n >= strlen(text) && memcmp(s.p, text, strlen(text)) == 0; }

// Bytes of the byte-order mark that a text may begin with: 3 or 0.
static size_t byte_order_mark(const void *text, size_t n) { return n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0; }

// Of gzip and bgzip.
static bool is_gzip(const void *p, size_t n) { return n >= 2 && memcmp(p, "\x1f\x8b", 2) == 0; }

// For "%.*s": names found in a file can be of any length.
static int str_show(struct str s) { return s.n < 64 ? (int)s.n : 64; }

static int str_compare(struct str a, struct str b) {
    int order = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

// A metadata value; strings are walked so that a later walk over them needs no checks.
static void read_kv(struct cursor *c, struct gguf_kv *kv) {
    kv->key = cursor_str(c);
    uint64_t type = cursor_uint(c, 4);
    kv->is_array = type == GGUF_ARRAY;
    kv->count = 1;
    if (kv->is_array) {
        type = cursor_uint(c, 4);
        kv->count = cursor_uint(c, 8);
    }
    if (type >= GGUF_N_TYPES || type == GGUF_ARRAY) {
        set_error(c->error, "metadata '%.*s' has type %" PRIu64 "; expected a plain type or an array of one",
             str_show(kv->key), kv->key.p, type);
        return;
    }
    kv->type = (enum gguf_type)type;
    kv->value = c->p + c->pos;
    size_t bytes;
    const uint8_t *skipped;
    if (kv->type == GGUF_STRING) {
        for (uint64_t i = 0; i < kv->count && !c->error->text[0]; i++) cursor_str(c);
    } else if (__builtin_mul_overflow(kv->count, (uint64_t)gguf_types[kv->type].bytes, &bytes)) {
        set_error(c->error, "metadata '%.*s' has %" PRIu64 " elements", str_show(kv->key), kv->key.p,
             kv->count);
    } else {
        cursor_take(c, bytes, &skipped);
    }
}

// Name, shape, type and place of a tensor. Bytes are computed with overflow checks.
static bool read_tensor_info(struct cursor *c, struct tensor *t) {
    t->name = cursor_str(c);
    uint64_t n_dims = cursor_uint(c, 4), elements = 1, blocks;
    if (n_dims < 1 || n_dims > 4)
        return fail(c->error, "tensor '%.*s' has %" PRIu64 " dimensions; expected 1 to 4", str_show(t->name), t->name.p, n_dims);
    t->n_dims = (int)n_dims;
    for (int i = 0; i < 4; i++) {
        uint64_t ne = i < t->n_dims ? cursor_uint(c, 8) : 1;
        if (c->error->text[0]) return false;
        if (ne < 1 || ne > INT_MAX || __builtin_mul_overflow(elements, ne, &elements) || elements > INT64_MAX)
            return fail(c->error, "tensor '%.*s': dimension %d has %" PRIu64 " elements", str_show(t->name), t->name.p, i, ne);
        t->ne[i] = (int64_t)ne;
    }
    uint64_t type = cursor_uint(c, 4);
    t->offset = cursor_uint(c, 8);
    if (c->error->text[0]) return false;
    int f = 0;
    while (f < N_FORMATS && (uint64_t)formats[f].gguf_id != type) f++;
    if (f == N_FORMATS)
        return fail(c->error,
                    "tensor '%.*s' has GGUF type %" PRIu64 "; expected F32, F16, BF16, Q8_0, Q4_0 to Q5_1 or Q2_K to Q6_K",
                    str_show(t->name), t->name.p, type);
    t->format = (enum format)f;
    if (t->ne[0] % formats[f].block)
        return fail(c->error, "tensor '%.*s': a row of %" PRId64 " elements is not a multiple of %s's block of %d",
                    str_show(t->name), t->name.p, t->ne[0], formats[f].name, formats[f].block);
    blocks = elements / (uint64_t)formats[f].block;
    if (__builtin_mul_overflow(blocks, (uint64_t)formats[f].bytes, &t->n_bytes) || t->n_bytes > INT64_MAX)
        return fail(c->error, "tensor '%.*s' is larger than any file", str_show(t->name), t->name.p);
    return true;
}

static int compare_names(const void *a, const void *b) { return str_compare(**(struct str *const *)a, **(struct str *const *)b); }

// The names of n items of `size` bytes, each of which begins with its name, sorted for lookups that a header with millions of
// entries cannot slow down; the caller owns the array. Names that stand twice are refused.
static const struct str **index_names(const void *items, uint64_t n, size_t size, struct error *e) {
    const struct str **index = xmalloc((size_t)n * sizeof(void *));
    for (uint64_t i = 0; i < n; i++) index[i] = (const struct str *)(const void *)((const char *)items + i * size);
    qsort(index, (size_t)n, sizeof(void *), compare_names);
    for (uint64_t i = 1; i < n; i++)
        if (compare_names(&index[i - 1], &index[i]) == 0)
            set_error(e, "the name '%.*s' stands twice in the header", str_show(*index[i]), index[i]->p);
    return index;
}

static const void *find_name(const struct str *const *index, uint64_t n, const char *name) {
    const struct str wanted = {name, strlen(name)}, *p = &wanted;
    const struct str *const *found = bsearch(&p, index, (size_t)n, sizeof(void *), compare_names);
    return found ? *found : NULL;
}

static const struct gguf_kv *gguf_find(const struct gguf *g, const char *key) { return find_name(g->by_key, g->n_kv, key); }

static const struct tensor *gguf_tensor(const struct gguf *g, const char *name) {
    return find_name(g->by_name, g->n_tensors, name);
}

// An integer of any width, or a bool; false when the key is absent or of another type.
static bool gguf_int(const struct gguf *g, const char *key, int64_t *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->is_array) return false;
    uint64_t u = 0;
    int bytes = gguf_types[kv->type].bytes;
    if (kv->type == GGUF_F32 || kv->type == GGUF_F64 || kv->type == GGUF_STRING) return false;
    memcpy(&u, kv->value, (size_t)bytes);
    bool is_signed = kv->type == GGUF_I8 || kv->type == GGUF_I16 || kv->type == GGUF_I32;
    if (is_signed && u >> (8 * bytes - 1)) u |= ~UINT64_C(0) << (8 * bytes - 1);
    *out = (int64_t)u;
    return true;
}

// The numbers of an array of 32-bit integers, at most `max` of them; returns how many, 0 when it is none or longer.
static int gguf_ints(const struct gguf *g, const char *key, int32_t *out, int max) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || !kv->is_array || (kv->type != GGUF_I32 && kv->type != GGUF_U32) || kv->count > (uint64_t)max) return 0;
    memcpy(out, kv->value, (size_t)kv->count * sizeof *out);
    return (int)kv->count;
}

static bool gguf_float(const struct gguf *g, const char *key, float *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->is_array || kv->type != GGUF_F32) return false;
    memcpy(out, kv->value, 4);
    return true;
}

// The same for a key that may be absent, which leaves *out as it is: an error only where it has another type.
static bool gguf_int_if_any(const struct gguf *g, const char *key, int64_t *out, struct error *e) {
    if (!gguf_find(g, key) || gguf_int(g, key, out)) return true;
    return fail(e, "metadata '%s' has a wrong type; expected an integer or a bool", key);
}

static bool gguf_float_if_any(const struct gguf *g, const char *key, float *out, struct error *e) {
    if (!gguf_find(g, key) || gguf_float(g, key, out)) return true;
    return fail(e, "metadata '%s' has a wrong type; expected a float32", key);
}

// The string at *at of a walk over an array of strings; moves *at behind it.
static struct str gguf_next_str(const uint8_t **at) {
    uint64_t n;
    memcpy(&n, *at, 8);
    struct str s = {(const char *)*at + 8, (size_t)n};
    *at += 8 + n;
    return s;
}

static bool gguf_str(const struct gguf *g, const char *key, struct str *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->is_array || kv->type != GGUF_STRING) return false;
    const uint8_t *at = kv->value;
    *out = gguf_next_str(&at);
    return true;
}

// Parses the header of map[0..size). On failure nothing stays allocated.
static bool gguf_parse(struct gguf *g, struct error *e) {
    struct cursor c = {g->map, g->size, 0, e};
    const uint8_t *magic;
    if (g->size < 24 || !cursor_take(&c, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return fail(e, "not a GGUF file (%zu bytes, begins otherwise); convert a checkpoint with convert_weights.py",
                    g->size);
    g->version = (uint32_t)cursor_uint(&c, 4);
    if (g->version != 3 && g->version != 2)
        return fail(e, "GGUF version %" PRIu32 "; expected 3 (or 2), little-endian", g->version);
    g->n_tensors = cursor_uint(&c, 8);
    g->n_kv = cursor_uint(&c, 8);
    // The smallest tensor entry takes 8+4+8+4+8 bytes, the smallest metadata entry 8+4+1: this bounds what is allocated.
    if (g->n_tensors > (g->size - c.pos) / 32 || g->n_kv > (g->size - c.pos) / 13)
        return fail(e, "the header counts %" PRIu64 " tensors and %" PRIu64 " metadata entries in a file of %zu bytes",
                    g->n_tensors, g->n_kv, g->size);
    g->kv = xcalloc((size_t)g->n_kv, sizeof *g->kv);
    g->tensors = xcalloc((size_t)g->n_tensors, sizeof *g->tensors);
    for (uint64_t i = 0; i < g->n_kv && !e->text[0]; i++) read_kv(&c, &g->kv[i]);
    for (uint64_t i = 0; i < g->n_tensors && !e->text[0]; i++) read_tensor_info(&c, &g->tensors[i]);
    if (e->text[0]) return false;
    g->by_key = index_names(g->kv, g->n_kv, sizeof *g->kv, e);
    g->by_name = index_names(g->tensors, g->n_tensors, sizeof *g->tensors, e);
    if (e->text[0]) return false;

    int64_t alignment = 32;
    if (!gguf_int_if_any(g, "general.alignment", &alignment, e)) return false;
    if (alignment < 8 || alignment > 1 << 20 || (alignment & (alignment - 1)))
        return fail(e, "general.alignment is %" PRId64 "; expected a power of two from 8 on", alignment);
    g->data_start = (c.pos + (size_t)alignment - 1) & ~((size_t)alignment - 1);
    uint64_t left = g->data_start < g->size ? g->size - g->data_start : 0;
    for (uint64_t i = 0; i < g->n_tensors; i++) {
        struct tensor *t = &g->tensors[i];
        if (t->offset % (uint64_t)alignment)
            return fail(e, "tensor '%.*s' is at offset %" PRIu64 ", which is not a multiple of the alignment %" PRId64,
                        str_show(t->name), t->name.p, t->offset, alignment);
        if (g->data_start > g->size || t->offset > g->size - g->data_start ||
            t->n_bytes > g->size - g->data_start - t->offset)
            return fail(e, "tensor '%.*s' needs bytes %" PRIu64 " to %" PRIu64 " of the file, which has %zu: is it cut off?",
                        str_show(t->name), t->name.p, g->data_start + t->offset, g->data_start + t->offset + t->n_bytes, g->size);
        if (t->n_bytes > left)  // what a model takes in memory is bounded by its file
            return fail(e, "tensor '%.*s' overlaps others: together they need more than the file holds", str_show(t->name),
                        t->name.p);
        left -= t->n_bytes;
        t->data = g->map + g->data_start + t->offset;
    }
    return true;
}

static void gguf_close(struct gguf *g) {
    if (g->map) munmap((void *)g->map, g->size);
    free(g->kv);
    free(g->tensors);
    free(g->by_key);
    free(g->by_name);
    free(g->path);
    *g = (struct gguf){0};
}

static bool gguf_open(struct gguf *g, const char *path, struct error *e) {
    *g = (struct gguf){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // of a pipe that nobody writes to open() would wait
    struct stat st;
    if (fd < 0) return fail(e, "%s: %s", path, strerror(errno));
    const bool known = fstat(fd, &st) == 0;
    if (!known || !S_ISREG(st.st_mode)) {
        close(fd);
        if (known && S_ISDIR(st.st_mode))
            return fail(e, "%s: a folder; expected a GGUF file, as convert_weights.py makes one of a checkpoint's folder", path);
        return fail(e, "%s: not a regular file: a model is mapped into memory, so it cannot come from a pipe", path);
    }
    if (st.st_size == 0) {
        close(fd);
        return fail(e, "%s: the file is empty; expected a GGUF file", path);
    }
    void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) return fail(e, "%s: cannot map %lld bytes: %s", path, (long long)st.st_size, strerror(errno));
    g->map = map;
    g->size = (size_t)st.st_size;
    g->path = copy_text(str_of(path));
    struct error inner = {""};
    if (gguf_parse(g, &inner)) return true;
    gguf_close(g);
    return fail(e, "%s: %s", path, inner.text);
}

// ====================================================================================================================
// 3. Configuration and tensor binding.
// Turns a GGUF file into a struct model: every name is bound to a field once, with its type and shape checked. Calls
// sections 1 and 2; called by the commands.
// ====================================================================================================================

static int word_among(struct str s, const char *const *words) {
    for (int i = 0; words[i]; i++)
        if (str_is(s, words[i])) return i;
    return -1;
}

// The value of a key as its place among the words; -1: it is none of them.
static int gguf_word(const struct gguf *g, const char *key, const char *const *words, int otherwise) {
    struct str s;
    if (!gguf_find(g, key)) return otherwise;
    return gguf_str(g, key, &s) ? word_among(s, words) : -1;
}

// What an audio U-Net has besides (section 4.4 of the paper, E.4): levels, each twice as wide as the one before it.
static bool unet_config_read(const struct gguf *g, struct config *c, struct error *e) {
    int32_t pool[MAX_POOLS], ranks[MAX_LEVELS];
    const int n_pools = gguf_ints(g, "mamba.unet.pool", pool, MAX_POOLS);
    int64_t rate = 0, start = -1, n_blocks = 0, tokens_a_step = 1;
    if (n_pools < 1 || gguf_ints(g, "mamba.unet.time_step_ranks", ranks, MAX_LEVELS) != n_pools + 1)
        return fail(e, "expected 1 to %d numbers in 'mamba.unet.pool', and one more in 'mamba.unet.time_step_ranks'", MAX_POOLS);
    if (!gguf_int(g, "mamba.unet.blocks_per_stage", &n_blocks) || n_blocks < 1 || n_blocks > c->n_layer ||
        n_blocks * (2 * n_pools + 1) != c->n_layer)
        return fail(e, "mamba.unet.blocks_per_stage is %" PRId64 "; %d blocks in %d stages were expected", n_blocks, c->n_layer,
                    2 * n_pools + 1);
    if (ranks[0] != c->dt_rank || c->dt_b_c_rms)
        return fail(e, "a U-Net's mamba.ssm.time_step_rank is its first time_step_ranks, %d, and it has no norms of dt, B and C",
                    ranks[0]);
    for (int i = 0; i <= n_pools; i++) {
        if (ranks[i] < 1 || ranks[i] > 1 << 20 || c->d_inner > (1 << 20) >> i || c->d_model > (1 << 20) >> i)
            return fail(e, "level %d of the U-Net is wider than %d, or its time_step_rank %d is none", i, 1 << 20, ranks[i]);
        c->level[i] = (struct level_size){c->d_model << i, c->d_inner << i, ranks[i], (int)tokens_a_step};
        if (i < n_pools) tokens_a_step *= c->pool[i] = pool[i];
        if (i < n_pools && (pool[i] < 2 || tokens_a_step > 1 << 20 || (int64_t)pool[i] * c->level[i].d_model > 1 << 20))
            return fail(e, "mamba.unet.pool holds %d; expected numbers from 2 on whose product is at most %d", pool[i], 1 << 20);
    }
    const int norm = gguf_word(g, "mamba.unet.norm", (const char *const[]){"rmsnorm", "layernorm", NULL}, 1);
    const int hold = gguf_word(g, "mamba.ssm.discretization", (const char *const[]){"delta_b", "zoh", NULL}, 0);
    const int loudness = gguf_word(g, "mamba.audio.normalization", (const char *const[]){"minmax", "peak", "none", NULL},
                                   LOUDNESS_MINMAX);
    if (norm < 0 || hold < 0 || loudness < 0)
        return fail(e, "expected rmsnorm or layernorm in 'mamba.unet.norm', delta_b or zoh in 'mamba.ssm.discretization', and "
                    "minmax, peak or none in 'mamba.audio.normalization'");
    if (!gguf_int(g, "mamba.audio.sample_rate", &rate) || rate < 1 || rate > 1 << 24)
        return fail(e, "mamba.audio.sample_rate is %" PRId64 "; expected samples a second", rate);
    if (!gguf_int(g, "mamba.audio.start_token", &start) || start < 0 || start > 255)
        return fail(e, "mamba.audio.start_token is %" PRId64 "; expected 0 to 255", start);
    c->n_pools = n_pools;
    c->n_blocks = (int)n_blocks;
    c->layer_norm = norm;
    c->zoh = hold;
    c->loudness = (enum loudness)loudness;
    c->sample_rate = (int)rate;
    c->start_token = (int)start;
    return true;
}

static bool config_read(const struct gguf *g, struct config *c, struct error *e) {
    struct str arch = {"", 0};
    if (!gguf_str(g, "general.architecture", &arch))
        return fail(e, "metadata 'general.architecture' is missing, or no string; expected \"mamba\" or \"mamba-unet\"");
    const bool unet = str_is(arch, "mamba-unet");
    if (!unet && !str_is(arch, "mamba"))
        return fail(e, "general.architecture is \"%.*s\"; expected \"mamba\" or \"mamba-unet\"", str_show(arch), arch.p);
    if (!g->n_tensors) return fail(e, "the file holds no weights; expected a model, and not a vocabulary alone");
    int64_t shards = 1;
    if (gguf_int(g, "split.count", &shards) && shards > 1)
        return fail(e, "one of %" PRId64 " parts of a model; llama-gguf-split --merge makes one file of them", shards);
    const struct {
        const char *key;
        int *field;
        int max;  // far above every published model; keeps products of sizes inside their types
    } fields[] = {
        {"mamba.block_count", &c->n_layer, 1 << 16},       {"mamba.embedding_length", &c->d_model, 1 << 20},
        {"mamba.ssm.inner_size", &c->d_inner, 1 << 20},    {"mamba.ssm.state_size", &c->d_state, 1 << 12},
        {"mamba.ssm.conv_kernel", &c->d_conv, 16},         {"mamba.ssm.time_step_rank", &c->dt_rank, 1 << 20},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        int64_t v;
        if (!gguf_int(g, fields[i].key, &v)) return fail(e, "metadata '%s' is missing, or no integer", fields[i].key);
        if (v < 1 || v > fields[i].max)
            return fail(e, "%s is %" PRId64 "; expected 1 to %d", fields[i].key, v, fields[i].max);
        *fields[i].field = (int)v;
    }
    c->norm_eps = 1e-5f;
    c->dt_b_c_eps = 1e-6f;  // transformers' mixer_rms_eps
    int64_t dt_b_c_rms = 0, length = 0;
    if (!gguf_float_if_any(g, "mamba.attention.layer_norm_rms_epsilon", &c->norm_eps, e) ||
        !gguf_float_if_any(g, "mamba.ssm.dt_b_c_rms_epsilon", &c->dt_b_c_eps, e) ||
        !gguf_int_if_any(g, "mamba.ssm.dt_b_c_rms", &dt_b_c_rms, e) || !gguf_int_if_any(g, "mamba.context_length", &length, e))
        return false;
    if (!(c->norm_eps >= 0 && c->norm_eps < 1) || !(c->dt_b_c_eps >= 0 && c->dt_b_c_eps < 1))
        return fail(e, "a norm's epsilon is %g or %g; expected a small positive number", (double)c->norm_eps,
                    (double)c->dt_b_c_eps);
    c->dt_b_c_rms = dt_b_c_rms != 0;
    c->context_length = length > 0 && length < 1 << 20 ? (int)length : 0;  // converters that do not know it write 2^20
    c->level[0] = (struct level_size){c->d_model, c->d_inner, c->dt_rank, 1};
    return !unet || unet_config_read(g, c, e);
}

struct binder {  // binding in progress; the first error stays
    const struct gguf *g;
    float *next;  // free part of the arena; NULL while its size is being counted
    size_t used;  // floats of the arena given out
    struct error *error;
};

// The tensor of this name with shape [rows][cols], or [cols] when rows is 0; rows -1 accepts any number of rows.
static const struct tensor *bind_tensor(struct binder *b, const char *name, int64_t rows, int64_t cols) {
    if (b->error->text[0]) return NULL;
    const struct tensor *t = gguf_tensor(b->g, name);
    if (!t) {
        set_error(b->error, "tensor '%s' is missing", name);
        return NULL;
    }
    // A vector may be stored as [1][cols], and a convolution as [d_inner][1][d_conv]: same numbers, same order.
    int64_t found_rows = t->ne[1] * t->ne[2] * t->ne[3];
    bool rows_fit = rows < 0 ? found_rows <= 1 << 28 : found_rows == (rows ? rows : 1);
    if (t->ne[0] != cols || !rows_fit) {
        char wanted[24] = "any, ";
        if (rows >= 0) snprintf(wanted, sizeof wanted, "%" PRId64 ", ", rows ? rows : 1);
        set_error(b->error, "tensor '%s' has shape [%" PRId64 ", %" PRId64 "]; expected [%s%" PRId64 "]", name, found_rows,
             t->ne[0], wanted, cols);
        return NULL;
    }
    return t;
}

static struct matrix bind_matrix(struct binder *b, const char *name, int rows, int cols) {
    const struct tensor *t = bind_tensor(b, name, rows, cols);
    if (!t) return (struct matrix){0};
    return (struct matrix){
        .data = t->data, .format = t->format, .rows = (int)(t->ne[1] * t->ne[2] * t->ne[3]), .cols = cols,
        .row_bytes = (size_t)cols / (size_t)formats[t->format].block * (size_t)formats[t->format].bytes};
}

// n floats of the arena, zeroed; NULL while sizes are counted.
static float *arena_take(struct binder *b, size_t n) {
    float *p = b->next;
    n = (n + 15) & ~(size_t)15;
    b->used += n;
    if (p) b->next += n;
    return p;
}

// Copies an F32 tensor of shape [rows][cols] to `to`, element (r, c) to to[r * row_step + c * col_step]. NULL, while sizes are
// counted: its values are not looked at.
static void copy_floats(struct binder *b, const char *name, int rows, int cols, float *to, size_t row_step,
                        size_t col_step) {
    const struct tensor *t = bind_tensor(b, name, rows, cols);
    if (!t) return;
    if (t->format != F32) {
        set_error(b->error, "tensor '%s' has type %s; expected F32", name, formats[t->format].name);
        return;
    }
    if (!to) return;
    for (int r = 0; r < (rows ? rows : 1); r++)
        for (int c = 0; c < cols; c++) {
            float v;
            memcpy(&v, t->data + 4 * ((size_t)r * (size_t)cols + (size_t)c), 4);
            if (!isfinite(v)) {
                set_error(b->error, "tensor '%s' holds %g at [%d, %d]; expected a finite number", name, (double)v, r, c);
                return;
            }
            to[(size_t)r * row_step + (size_t)c * col_step] = v;
        }
}

static const float *bind_vector(struct binder *b, const char *name, int n) {
    float *to = arena_take(b, (size_t)n);
    copy_floats(b, name, 0, n, to, 0, 1);
    return to;
}

// Copies a tensor [d_inner][d_state * parts] to plain memory, which the caller frees. NULL while sizes are counted; after an error
// it holds nothing of use.
static float *read_states(struct binder *b, const char *name, const struct level_size *size, int n_state) {
    if (!b->next) {
        copy_floats(b, name, size->d_inner, n_state, NULL, 0, 0);
        return NULL;
    }
    float *plain = xmalloc((size_t)size->d_inner * (size_t)n_state * sizeof *plain);
    copy_floats(b, name, size->d_inner, n_state, plain, (size_t)n_state, 1);
    return plain;
}

// Where state n of channel ch is in the arrays that kernels read; the imaginary part is 16 behind the real one.
static size_t state_at(size_t ch, size_t n, size_t n_state, size_t parts) {
    return ((ch / 16 * n_state + n) * parts) * 16 + ch % 16;
}

// Room for a number for each state of a layer, at state_at().
static float *take_states(struct binder *b, const struct layer *l, const struct config *c) {
    return arena_take(b, (size_t)round_up(c->level[l->level].d_inner, 16) * (size_t)c->d_state * (1 + (size_t)l->is_complex));
}

// A of equation 2, which the file holds as -exp(A_log) [d_inner][d_state][R], as exponents of 2 and angles; and 1 / A.
static void bind_a(struct binder *b, struct layer *l, const char *name, const struct config *c) {
    const struct level_size *size = &c->level[l->level];
    const size_t n_state = (size_t)c->d_state, parts = 1 + l->is_complex;
    float *a2 = take_states(b, l, c), *inverse = c->zoh ? take_states(b, l, c) : NULL;
    float *a = read_states(b, name, size, c->d_state * (int)parts);
    for (size_t ch = 0; a && !b->error->text[0] && ch < (size_t)size->d_inner; ch++)
        for (size_t n = 0; n < n_state; n++) {
            const size_t to = state_at(ch, n, n_state, parts);
            const float *from = a + (ch * n_state + n) * parts, im = l->is_complex ? from[1] : 0.0f;
            const double squared = (double)*from * (double)*from + (double)im * (double)im;
            if (*from > 0.0f)
                set_error(b->error, "tensor '%s' holds %g at [%zu, %zu], with which states would grow; expected -exp(A_log)", name,
                          (double)*from, ch, n);
            a2[to] = *from * 0x1.715476p+0f;
            if (l->is_complex) a2[to + 16] = im;
            if (!inverse) continue;
            inverse[to] = (float)((double)*from / squared);
            if (l->is_complex) inverse[to + 16] = (float)(-(double)im / squared);
            if (!isfinite(inverse[to]) || (l->is_complex && !isfinite(inverse[to + 16])))
                set_error(b->error, "tensor '%s' holds nearly 0 at [%zu, %zu], which zero-order hold divides by", name, ch, n);
        }
    l->a2 = a2;
    l->a_inverse = inverse;
    free(a);
}

// What a time-invariant SSM (S4) needs for a step: h = decay h + u and y = weight . h, where decay = exp(dt A), weight = C B'
// and B' is the discretised B (equation 4, or dt B). That B' is in the weight and not in the state saves a product. Complex
// states stand for their conjugates, too: y is twice the real part.
static void bind_fixed(struct binder *b, struct layer *l, const char *const names[3], const struct config *c) {
    const struct level_size *size = &c->level[l->level];
    const size_t n_state = (size_t)c->d_state, parts = 1 + l->is_complex;
    float *decay = take_states(b, l, c), *weight = take_states(b, l, c), *abc[3];
    for (int i = 0; i < 3; i++) abc[i] = read_states(b, names[i], size, c->d_state * (int)parts);
    for (size_t ch = 0; decay && !b->error->text[0] && ch < (size_t)size->d_inner; ch++) {
        const double raw = (double)l->dt_b[ch], dt = fmax(raw, 0) + log1p(exp(-fabs(raw)));  // softplus
        for (size_t n = 0; n < n_state; n++) {
            const size_t from = (ch * n_state + n) * parts, to = state_at(ch, n, n_state, parts);
            double complex v[3];
            for (int i = 0; i < 3; i++) v[i] = (double)abc[i][from] + (l->is_complex ? (double)abc[i][from + 1] * I : 0);
            const double complex power = cexp(dt * v[0]);
            const bool divide = c->zoh && cabs(dt * v[0]) > 1e-9;  // its limit at 0 is dt
            const double complex w = (l->is_complex ? 2 : 1) * v[2] * v[1] * (divide ? (power - 1) / v[0] : dt);
            decay[to] = (float)creal(power);
            weight[to] = (float)creal(w);
            if (l->is_complex) decay[to + 16] = (float)cimag(power), weight[to + 16] = (float)cimag(w);
            if (creal(v[0]) > 0)
                set_error(b->error, "tensor '%s' has a positive real part at [%zu, %zu]: its state would grow without end",
                          names[0], ch, n);
            if (!isfinite(weight[to]) || !isfinite(weight[to + 16 * (parts - 1)]))
                set_error(b->error, "tensor '%s' gives a state that is no finite number, at [%zu, %zu]", names[2], ch, n);
        }
    }
    for (int i = 0; i < 3; i++) free(abc[i]);
    l->decay = decay;
    l->weight = weight;
}

static void bind_layer(struct binder *b, struct layer *l, const struct config *c, int i) {
    char name[64], names[3][64];
    const struct level_size *size = &c->level[l->level];
#define NAME(suffix) (snprintf(name, sizeof name, "blk.%d." suffix, i), name)
    size_t ld = (size_t)round_up(size->d_inner, 16);
    l->norm = bind_vector(b, NAME("attn_norm.weight"), size->d_model);
    l->norm_b = c->layer_norm ? bind_vector(b, NAME("attn_norm.bias"), size->d_model) : NULL;
    l->in = bind_matrix(b, NAME("ssm_in.weight"), 2 * size->d_inner, size->d_model);
    float *conv = arena_take(b, ld * (size_t)c->d_conv);  // [d_inner][d_conv] in the file, channels innermost here
    copy_floats(b, NAME("ssm_conv1d.weight"), size->d_inner, c->d_conv, conv, 1, ld);
    l->conv_w = conv;
    l->conv_b = bind_vector(b, NAME("ssm_conv1d.bias"), size->d_inner);
    l->dt_b = bind_vector(b, NAME("ssm_dt.bias"), size->d_inner);
    if (l->s4) {
        snprintf(names[0], sizeof *names, "blk.%d.ssm_a", i);
        snprintf(names[1], sizeof *names, "blk.%d.ssm_b", i);
        snprintf(names[2], sizeof *names, "blk.%d.ssm_c", i);
        bind_fixed(b, l, (const char *const[]){names[0], names[1], names[2]}, c);
    } else {
        l->x = bind_matrix(b, NAME("ssm_x.weight"), size->dt_rank + 2 * c->d_state * (1 + l->is_complex), size->d_inner);
        l->dt = bind_matrix(b, NAME("ssm_dt.weight"), size->d_inner, size->dt_rank);
        bind_a(b, l, NAME("ssm_a"), c);
    }
    l->d = bind_vector(b, NAME("ssm_d"), size->d_inner);
    l->out = bind_matrix(b, NAME("ssm_out.weight"), size->d_model, size->d_inner);
#undef NAME
}

static void bind_pooling(struct binder *b, struct pooling *p, const struct config *c, int i) {
    char name[64];
#define NAME(suffix) (snprintf(name, sizeof name, "pool_%d." suffix, i), name)
    const int d_model = c->level[i].d_model, wide = c->pool[i] * d_model;
    p->down = bind_matrix(b, NAME("down.weight"), 2 * d_model, wide);
    p->down_b = bind_vector(b, NAME("down.bias"), 2 * d_model);
    p->up = bind_matrix(b, NAME("up.weight"), wide, 2 * d_model);
    p->up_b = bind_vector(b, NAME("up.bias"), wide);
#undef NAME
}

static void bind_all(struct binder *b, struct model *m) {
    const struct config *c = &m->c;
    m->embd = bind_matrix(b, "token_embd.weight", c->sample_rate ? 256 : -1, c->d_model);
    m->c.n_vocab = m->embd.rows;
    m->head = gguf_tensor(b->g, "output.weight") ? bind_matrix(b, "output.weight", c->n_vocab, c->d_model) : m->embd;
    m->head_b = c->n_pools ? bind_vector(b, "output.bias", c->n_vocab) : NULL;
    m->norm = bind_vector(b, "output_norm.weight", c->d_model);
    m->norm_b = c->layer_norm ? bind_vector(b, "output_norm.bias", c->d_model) : NULL;
    if (c->n_labels) {
        float *w = arena_take(b, (size_t)c->n_labels * (size_t)c->d_model);
        copy_floats(b, "cls.output.weight", c->n_labels, c->d_model, w, (size_t)c->d_model, 1);
        bool has_bias = gguf_tensor(b->g, "cls.output.bias");
        m->cls_w = w;
        m->cls_b = has_bias ? bind_vector(b, "cls.output.bias", c->n_labels) : arena_take(b, (size_t)c->n_labels);
    }
    for (int i = 0; i < c->n_pools; i++) bind_pooling(b, &m->pools[i], c, i);
    for (int i = 0; i < c->n_layer && !b->error->text[0]; i++) bind_layer(b, &m->layers[i], c, i);
}

// The kind of the blocks of each stage of a U-Net, "s4.complex" for instance; the others are S6 and real.
static bool stages_read(struct model *m, struct error *e) {
    const int n_stages = 2 * m->c.n_pools + 1;
    const struct gguf_kv *kv = gguf_find(&m->file, "mamba.unet.stages");
    if (!m->c.n_pools) return true;
    if (!kv || !kv->is_array || kv->type != GGUF_STRING || kv->count != (uint64_t)n_stages)
        return fail(e, "metadata 'mamba.unet.stages' is not an array of %d strings", n_stages);
    const uint8_t *at = kv->value;
    for (int stage = 0; stage < n_stages; stage++) {
        const struct str kind = gguf_next_str(&at);
        const bool s4 = str_begins(kind, "s4."), is_complex = str_is(kind, "s4.complex") || str_is(kind, "s6.complex");
        if (!is_complex && !str_is(kind, "s4.real") && !str_is(kind, "s6.real"))
            return fail(e, "mamba.unet.stages holds \"%.*s\"; expected s4 or s6, a dot, and real or complex", str_show(kind),
                        kind.p);
        for (int i = 0; i < m->c.n_blocks; i++) {
            struct layer *l = &m->layers[stage * m->c.n_blocks + i];
            *l = (struct layer){.level = min_int(stage, n_stages - 1 - stage), .s4 = s4, .is_complex = is_complex};
        }
    }
    return true;
}

// Gives every layer and pooling its place in a sequence's buffers.
static void lay_out_state(struct model *m) {
    struct config *c = &m->c;
    c->conv_floats = c->ssm_floats = c->pool_floats = 0;
    for (int i = 0; i < c->n_layer; i++) {
        struct layer *l = &m->layers[i];
        const size_t channels = (size_t)round_up(c->level[l->level].d_inner, 16);
        l->conv_at = c->conv_floats;
        l->ssm_at = c->ssm_floats;
        c->conv_floats += channels * (size_t)(c->d_conv - 1);
        c->ssm_floats += channels * (size_t)c->d_state * (size_t)(1 + l->is_complex);
    }
    for (int i = 0; i < c->n_pools; i++) {
        m->pools[i].at = c->pool_floats;
        c->pool_floats += 2 * (size_t)c->pool[i] * (size_t)c->level[i].d_model;
    }
}

// The names of the classes, where the file has a classifier.
static bool model_labels(struct model *m, struct error *e) {
    const struct gguf_kv *kv = gguf_find(&m->file, "mamba.classifier.output_labels");
    if (!kv) return true;
    if (!kv->is_array || kv->type != GGUF_STRING || kv->count < 1 || kv->count > 1 << 20)
        return fail(e, "metadata 'mamba.classifier.output_labels' is not an array of strings");
    m->c.n_labels = (int)kv->count;
    m->labels = xmalloc((size_t)kv->count * sizeof *m->labels);
    const uint8_t *at = kv->value;
    for (int i = 0; i < m->c.n_labels; i++) m->labels[i] = gguf_next_str(&at);
    return true;
}

// Of everything in the header (names, shapes, types, vocabulary) and 64 bytes at both ends of every tensor: two models
// of one shape, or two quantisations of one model, differ in it.
static uint64_t model_fingerprint(const struct gguf *g) {
    uint64_t h = hash_bytes(UINT64_C(0x6d616d6261), g->map, g->data_start < g->size ? g->data_start : g->size);
    for (uint64_t i = 0; i < g->n_tensors; i++) {
        const struct tensor *t = &g->tensors[i];
        size_t n = t->n_bytes < 64 ? (size_t)t->n_bytes : 64;
        h = hash_bytes(h, t->data, n);
        h = hash_bytes(h, t->data + t->n_bytes - n, n);
    }
    return h;
}

static void model_close(struct model *m) {
    free(m->layers);
    free(m->labels);
    free(m->arena);
    gguf_close(&m->file);
    *m = (struct model){0};
}

// Checks and binds what m->file holds. Tensors that the architecture does not name are ignored, as llama.cpp does.
static bool model_bind(struct model *m, struct error *e) {
    const struct gguf *g = &m->file;
    if (!config_read(g, &m->c, e) || !model_labels(m, e)) return false;
    if ((uint64_t)m->c.n_layer > g->n_tensors / 10)  // bounds the allocation by what the file really holds
        return fail(e, "mamba.block_count is %d, but the file holds only %" PRIu64 " tensors", m->c.n_layer, g->n_tensors);
    m->layers = xcalloc((size_t)m->c.n_layer, sizeof *m->layers);
    if (!stages_read(m, e)) return false;
    lay_out_state(m);
    struct binder b = {g, NULL, 0, e};
    bind_all(&b, m);  // first pass: checks everything, counts the arena
    if (e->text[0]) return false;
    m->arena = xcalloc(b.used, sizeof *m->arena);
    b = (struct binder){g, m->arena, 0, e};
    bind_all(&b, m);        // values are looked at only now
    if (e->text[0]) return false;
    m->fingerprint = model_fingerprint(g);
    return true;
}

static bool model_open(struct model *m, const char *path, struct error *e) {
    *m = (struct model){0};
    struct error inner = {""};
    if (!gguf_open(&m->file, path, e)) return false;
    if (model_bind(m, &inner)) return true;
    model_close(m);
    return fail(e, "%s: %s", path, inner.text);
}

// ====================================================================================================================
// 4. Kernels.
// Everything that touches many numbers. Calls sections 1 and 2; called by 5, 6, 9, 14 and 16 through struct kernels. Each kernel
// is written once, over vectors of 16 lanes, and compiled once per instruction set: this file includes itself, and the
// part between the two ISA PASS lines below is the body. What differs is the vocabulary of vector operations at its
// head. The plain C vocabulary defines what the others must compute, bit for bit.
//
// The order of summation, which every kernel keeps:
//   float weights   lane j adds the products k = j, j+16, j+32 ... by fused multiply-add; then the lanes are added as a
//                   tree, j with j+8, j+4, j+2, j+1.
//   quantised       against activations quantised to 8 bits in blocks of 32: an exact integer dot product over each group
//                   of 16 or 32 weights that share a scale, then sum = fma(weight_scale * activation_scale, dot, sum)
//                   and, in formats with a minimum, sum = fma(minimum, activation_scale * sum of the activations, sum);
//                   groups in rising order.
// How many rows and tokens are in flight together never changes a sum, so a GEMV and a GEMM give the same bits.
// ====================================================================================================================

enum {
    ITEM_BYTES = 49152,     // of weights; telling another core of an item takes as long as multiplying less than these
    STATE_BYTES = 16,       // of weights that take as long as one state of one channel does in a scan
    ROW_TOKENS = 4,         // of so few tokens memory sets the pace: float weights are multiplied as they are read
    SHORT_ROW = 128,        // columns; rows of F32 that are no longer are multiplied several at a time even then
    FETCH_AHEAD = 8192,     // bytes of a row read alone that are fetched early: the processor's own guesses end with each page
    FETCH_TOKENS = 4,       // and tokens, where a few channels of each are gone through
    SECOND_CACHE = 2,       // for __builtin_prefetch, of weights: the first cache has few buffers for what is on its way
    SCAN_TOKENS = 16,       // so many at most go through a few states of 16 channels, then through the next
    TOKEN_BLOCK = 96,       // so many tokens at most are multiplied with a part of the weights before the next part
    Q_TOKEN_BLOCK = 192,    // likewise of quantised weights, which are unpacked for each block
    ROW_BLOCK = 96,         // so many rows are one item of work, when tokens are many; or a third of it, for the threads' sake
    NARROW_COLUMNS = 64,    // float matrices of at most so many columns have products of their own
};

// Row r of a matrix, or its last one: products take 16 rows at once, and what is behind the last is not stored.
static inline const uint8_t *row_or_last(const struct matrix *m, int r) {
    return m->data + (size_t)min_int(r, m->rows - 1) * m->row_bytes;
}

// The chunk of a token that holds a column.
static inline struct act_chunk *act_chunk_of(const struct act *x, int token, int column) {
    return x->q + (size_t)(column / 256) * (size_t)x->n_rows + token;
}

// By how much the product of a group of weights with these activations is too high where the weights are `zero` too high. zero
// divides 128, or is 0.
static inline int32_t surplus_of(const struct act_chunk *x, int zero, int group, int g) {
    const int32_t of_128 = group == 32 ? x->surplus[g] : x->surplus_16[g];
    return zero == 128 ? of_128 : of_128 / 128 * zero;
}

// scale * sum of q of a group: what a minimum of weights is multiplied with.
static inline float scaled_sum_of(const struct act_chunk *x, int group, int g) {
    const int32_t sum = x->surplus_16[g] / 128;
    return group == 32 ? x->scaled_sum[g] : x->scale[g / 2] * (float)sum;
}

struct conv_args {          // one sequence, channels [0, n) of pointers already moved to the first channel
    const float *w, *b;     // [d_conv][ld_w], [n]
    float *state;           // [d_conv-1][ld_w], the oldest first
    const float *next_state;  // of the sequence that has its turn next, likewise: is only fetched; where there is none, `state`
    const float *in;        // [n_tokens][ld]
    float *out;             // [n_tokens][ld]; may be `in`
    int d_conv, n_tokens, n, ld_w, ld;
};

struct scan_args {          // one sequence, channels [0, n) likewise; n and all strides are multiples of 16
    const float *a2;        // [n/16][d_state][R][16], R is 2 of complex numbers and 1 otherwise
    const float *a_inverse; // likewise, NULL: B is discretised as dt * B
    const float *d, *dt_b;  // [n]
    float *state;           // [n/16][d_state][R][16]
    const float *next_state;  // as in struct conv_args
    const float *u, *z;     // [n_tokens][ld]
    const float *bc;        // [n_tokens][ld_bc]: B [d_state][R], C [d_state][R]
    float *dt_y;            // [n_tokens][ld]: dt before its bias and softplus; replaced by the output
    int d_state, n_tokens, n, ld, ld_bc;
    bool is_complex;
};

struct scan_block {         // 16 channels of some tokens between the parts of a scan
    float dt[SCAN_TOKENS][16];     // after softplus
    float least[SCAN_TOKENS][16];  // of a2, so that its product with dt is -125
    float in[SCAN_TOKENS][16];     // dt * u, with zero-order hold u
    float y[SCAN_TOKENS][16];
};

struct fixed_scan_args {    // S4: one sequence, channels [0, n) likewise
    const float *decay, *weight;  // [n/16][d_state][R][16]
    const float *d;         // [n]
    float *state;           // [n/16][d_state][R][16]
    const float *next_state;  // as in struct conv_args
    const float *u, *z;     // [n_tokens][ld]
    float *y;               // [n_tokens][ld]
    int d_state, n_tokens, n, ld;
    bool is_complex;
};

struct kernels {
    const char *name;
    // y[t*ldy + r] = (or +=) row row0+r of w times row token0+t of x
    void (*matmul)(const struct matrix *w, int row0, int n_rows, const struct act *x, int token0, int n_tokens, float *y,
                   int ldy, bool add);
    void (*dequantize)(enum format format, const uint8_t *row, int n, float *x);
    unpack_row *unpack_weights;
    void (*quantize)(const float *x, int n, struct act_chunk *to, int column);  // these n columns of it; multiples of 32
    void (*norm)(const float *x, const float *w, const float *b, float *y, int n, float eps);  // b NULL: RMSNorm; w NULL: 1
    void (*conv_silu)(const struct conv_args *a);
    void (*scan)(const struct scan_args *a);
    void (*fixed_scan)(const struct fixed_scan_args *a);
    float (*finite_max)(const float *x, int n);                      // NaN when any element is NaN or infinite
    void (*exp_minus)(const float *x, int n, float max, float *y);   // y = exp(x - max)
};

// Defined by each pass over the body: the vector type, its operations, and the kernels.
#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define ISA_NAME(name) PASTE(name, MAMBA_ISA_PASS)
#define vf ISA_NAME(vf)
#define v_set ISA_NAME(v_set)
#define v_load ISA_NAME(v_load)
#define v_load_n ISA_NAME(v_load_n)
#define vt ISA_NAME(vt)
#define t_zero ISA_NAME(t_zero)
#define t_load ISA_NAME(t_load)
#define t_load_f16 ISA_NAME(t_load_f16)
#define t_load_bf16 ISA_NAME(t_load_bf16)
#define t_store ISA_NAME(t_store)
#define t_fma ISA_NAME(t_fma)
#define t_first ISA_NAME(t_first)
#define v_first ISA_NAME(v_first)
#define v_store ISA_NAME(v_store)
#define v_store_n ISA_NAME(v_store_n)
#define v_store_i8 ISA_NAME(v_store_i8)
#define v_add ISA_NAME(v_add)
#define v_sub ISA_NAME(v_sub)
#define v_mul ISA_NAME(v_mul)
#define v_div ISA_NAME(v_div)
#define v_fma ISA_NAME(v_fma)
#define v_min ISA_NAME(v_min)
#define v_max ISA_NAME(v_max)
#define v_sum ISA_NAME(v_sum)
#define v_add_exponent ISA_NAME(v_add_exponent)
#define v_split_exponent ISA_NAME(v_split_exponent)
#define v_exp2 ISA_NAME(v_exp2)
#define v_silu ISA_NAME(v_silu)
#define v_softplus ISA_NAME(v_softplus)
#define v_sums ISA_NAME(v_sums)
#define v_max_lane ISA_NAME(v_max_lane)
#define v_put ISA_NAME(v_put)
#define v_load_most ISA_NAME(v_load_most)
#define v_store_most ISA_NAME(v_store_most)
#define sum_16 ISA_NAME(sum_16)
#define sum_8 ISA_NAME(sum_8)
#define max_8 ISA_NAME(max_8)
#define sum_8_rows ISA_NAME(sum_8_rows)
#define t_load_weights ISA_NAME(t_load_weights)
#define vi ISA_NAME(vi)
#define v_set_int ISA_NAME(v_set_int)
#define vw ISA_NAME(vw)
#define v_dots_begin ISA_NAME(v_dots_begin)
#define v_dot4 ISA_NAME(v_dot4)
#define v_dots_end ISA_NAME(v_dots_end)
#define v_from_int ISA_NAME(v_from_int)
#define v_from_byte ISA_NAME(v_from_byte)
#define v_from_halves ISA_NAME(v_from_halves)
#define v_bits ISA_NAME(v_bits)
#define v_join ISA_NAME(v_join)
#define h_load ISA_NAME(h_load)
#define vb ISA_NAME(vb)
#define b_load ISA_NAME(b_load)
#define b_store ISA_NAME(b_store)
#define b_nibbles ISA_NAME(b_nibbles)
#define b_bits ISA_NAME(b_bits)
#define b_field ISA_NAME(b_field)
#define b_join ISA_NAME(b_join)
#define b_sub ISA_NAME(b_sub)
#define dot_words ISA_NAME(dot_words)
#define dot_bytes ISA_NAME(dot_bytes)
#define add_words ISA_NAME(add_words)
#define even_dwords ISA_NAME(even_dwords)
#define odd_dwords ISA_NAME(odd_dwords)
#define add_word_pairs ISA_NAME(add_word_pairs)
#define dot_4_rows ISA_NAME(dot_4_rows)
#define add_pairs ISA_NAME(add_pairs)
#define dot_16_rows ISA_NAME(dot_16_rows)
#define add_pairs_512 ISA_NAME(add_pairs_512)
#define transpose_dwords ISA_NAME(transpose_dwords)
#define unpack ISA_NAME(unpack)
#define chunk_scales ISA_NAME(chunk_scales)
#define chunk ISA_NAME(chunk)
#define chunk_block ISA_NAME(chunk_block)
#define v_add_int ISA_NAME(v_add_int)
#define add_group ISA_NAME(add_group)
#define chunk_dot ISA_NAME(chunk_dot)
#define rows_dot ISA_NAME(rows_dot)
#define chunk_halves ISA_NAME(chunk_halves)
#define chunk_words ISA_NAME(chunk_words)
#define four_groups ISA_NAME(four_groups)
#define block_scales ISA_NAME(block_scales)
#define panel ISA_NAME(panel)
#define fetch ISA_NAME(fetch)
#define fetch_of ISA_NAME(fetch_of)
#define fetch_shares ISA_NAME(fetch_shares)
#define panel_fill ISA_NAME(panel_fill)
#define fetch_state ISA_NAME(fetch_state)
#define panels_fill ISA_NAME(panels_fill)
#define panel_dot ISA_NAME(panel_dot)
#define panels_dot ISA_NAME(panels_dot)
#define tile ISA_NAME(tile)
#define fetch_rows_below ISA_NAME(fetch_rows_below)
#define tile_rows ISA_NAME(tile_rows)
#define wide_product ISA_NAME(wide_product)
#define narrow_panel ISA_NAME(narrow_panel)
#define narrow_fill ISA_NAME(narrow_fill)
#define narrow_dot ISA_NAME(narrow_dot)
#define narrow_product ISA_NAME(narrow_product)
#define fetch_sums ISA_NAME(fetch_sums)
#define blocks_product ISA_NAME(blocks_product)
#define quantized_product ISA_NAME(quantized_product)
#define block_product ISA_NAME(block_product)
#define multiply ISA_NAME(multiply)
#define operands ISA_NAME(operands)
#define tiles ISA_NAME(tiles)
#define row_by_row ISA_NAME(row_by_row)
#define floats_of ISA_NAME(floats_of)
#define prefetch ISA_NAME(prefetch)
#define fetch_token ISA_NAME(fetch_token)
#define conv_4_taps ISA_NAME(conv_4_taps)
#define conv_any_taps ISA_NAME(conv_any_taps)
#define v_exp2_minus_1 ISA_NAME(v_exp2_minus_1)
#define v_exp2_parts ISA_NAME(v_exp2_parts)
#define v_exp2_factors ISA_NAME(v_exp2_factors)
#define v_sincos ISA_NAME(v_sincos)
#define fixed_step ISA_NAME(fixed_step)
#define fixed_step_complex ISA_NAME(fixed_step_complex)
#define fixed_channels ISA_NAME(fixed_channels)
#define scan_begin ISA_NAME(scan_begin)
#define scan_end ISA_NAME(scan_end)
#define scan_states ISA_NAME(scan_states)
#define scan_zoh ISA_NAME(scan_zoh)
#define scan_complex ISA_NAME(scan_complex)

// In front of loops whose trip count is a constant after inlining: arrays of vectors then live in registers. MAMBA_ROLLED leaves
// them rolled, and formats share their code, in builds that look for errors: with sanitizers' code in every copy clang takes
// twenty minutes.
#ifdef __clang__
#define UNROLL_FULLY _Pragma("clang loop unroll(full)")
#define NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define UNROLL_FULLY _Pragma("GCC unroll 16")
#define NO_UNROLL _Pragma("GCC unroll 1")
#endif
#ifdef MAMBA_ROLLED
#undef UNROLL_FULLY
#define UNROLL_FULLY NO_UNROLL
#endif
#define LANE static inline __attribute__((always_inline, unused))
#define ROUND 0x1.8p23f  // added to a float, leaves the nearest integer in its lowest bits

// What the registers of an instruction set allow, found by measurement. Each pass defines OF_ISA, which takes its column, and
// OF_VNNI, which takes the first value where x86 has instructions for dot products of bytes (AVX512-VNNI, AVX-VNNI). AVX-512
// without them could not be measured: it has what the numbers of its registers and instructions suggest.
//                                  AVX-512, AVX2, NEON, plain C
#define TILE_LANES    OF_ISA(16, 8, 4, 16)            // floats a register
#define TILE_ROWS     OF_ISA(4, 3, 4, 1)              // of float weights, and tokens, whose sums are in registers together
#define TILE_TOKENS   OF_ISA(6, 4, 6, 1)
#define ROW_GROUP     OF_ISA(16, 24, 24, 24)          // rows, and columns of them, that stay in the nearest cache
#define COLUMN_BLOCK  OF_ISA(384, 1024, 1024, 1024)
#define NARROW_TOKENS OF_ISA(6, 5, 4, 1)              // tokens whose sums are in registers together, of few columns
#define Q_TOKENS      OF_ISA(OF_VNNI(12, 8), 4, 4, 1)  // tokens, and panels of 16 quantised rows, likewise
#define Q_PANELS      OF_ISA(OF_VNNI(2, 1), 1, 1, 1)
#define SCAN_STATES   OF_ISA(4, 2, 1, 1)              // whose exponentials are computed together
// In plain C every operation is a loop: copies of these functions take seconds to compile.
#define MATH          OF_ISA(LANE, LANE, LANE, static __attribute__((noinline)))

#endif  // not MAMBA_HEADER_ONLY
#endif  // not MAMBA_ISA_PASS
#ifdef MAMBA_ISA_PASS  // ---------------------------------------------------------------------- ISA PASS: begin --------

#if defined(ISA_AVX512)
#define OF_ISA(avx512, avx2, neon, plain) avx512
#elif defined(ISA_AVX2)
#define OF_ISA(avx512, avx2, neon, plain) avx2
#elif defined(ISA_NEON)
#define OF_ISA(avx512, avx2, neon, plain) neon
#else
#define OF_ISA(avx512, avx2, neon, plain) plain
#endif
#if defined(ISA_VNNI)
#define OF_VNNI(with, without) with
#else
#define OF_VNNI(with, without) without
#endif

// Sums of four products of unsigned and signed bytes.
#if defined(ISA_VNNI) && defined(ISA_AVX2)
LANE __m256i dot_bytes(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#endif

// The same without VNNI: in words, whose pairs are added in the end.
#if (defined(ISA_AVX512) || defined(ISA_AVX2)) && !defined(ISA_VNNI)
LANE __m256i dot_words(__m256i w, __m256i x, bool is_signed) {
    // Unsigned q have 6 bits at most and signed ones are at most 128 in magnitude, x at most 127: pairs stay below 2^15.
    return is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
}
LANE __m256i add_words(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
// gcc would put an addition off until its sum is used, and keep every product in memory until then.
#ifndef MAMBA_EMULATE_AVX512
#define DONE_HERE(v) __asm__("" : "+v"(v))
#else
#define DONE_HERE(v) (void)(v)
#endif
#endif

// What both x86 vocabularies end in: the trees over lanes, of 8 that are left.
#if defined(ISA_AVX512) || defined(ISA_AVX2)
LANE float sum_8(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
LANE float max_8(__m256 a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
// The sums of 8 vectors of 16 lanes, side by side.
LANE __m256 sum_8_rows(float (*v)[16]) {
    __m256 half[8], quarter[4], pair[2];
    UNROLL_FULLY for (int i = 0; i < 8; i++) half[i] = _mm256_add_ps(_mm256_loadu_ps(v[i]), _mm256_loadu_ps(v[i] + 8));
    UNROLL_FULLY for (int i = 0; i < 4; i++)  // in half j: row i + 4 j
        quarter[i] = _mm256_add_ps(_mm256_permute2f128_ps(half[i], half[i + 4], 0x20),
                                   _mm256_permute2f128_ps(half[i], half[i + 4], 0x31));
    UNROLL_FULLY for (int i = 0; i < 2; i++)
        pair[i] = _mm256_add_ps(_mm256_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0x44),
                                _mm256_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88), _mm256_shuffle_ps(pair[0], pair[1], 0xdd));
}
#endif

#if defined(ISA_AVX512)

typedef __m512 vf;
LANE vf t_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
LANE vf t_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
#define UNROLL UNROLL_FULLY
LANE vf v_set(float x) { return _mm512_set1_ps(x); }
LANE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
LANE vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
LANE vf v_first(vf a, int n) { return _mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), a); }
LANE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
LANE void v_store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
LANE void v_store_i8(int8_t *p, vf a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }
LANE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
LANE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
LANE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LANE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
LANE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LANE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
LANE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
LANE float v_sum(vf v) { return sum_8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
LANE vf v_sums(float (*v)[16]) { return _mm512_insertf32x8(_mm512_castps256_ps512(sum_8_rows(v)), sum_8_rows(v + 8), 1); }
LANE float v_max_lane(vf v) { return max_8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
LANE vf v_add_exponent(vf p, vf n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
LANE vf v_split_exponent(vf x, vf *e) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
    *e = _mm512_cvtepi32_ps(n);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
}
typedef __m512i vi;
LANE vi v_set_int(int n) { return _mm512_set1_epi32(n); }
LANE vi v_add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
#if defined(ISA_VNNI)
LANE vi v_dot4(vi sum, const int8_t *w, const int8_t *x, bool is_signed) {
    const int four = (int)load_u32((const uint8_t *)x);
    (void)is_signed;  // panels are not
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(w), _mm512_set1_epi32(four));
}
#else
typedef __m512i vw;
LANE vw v_dots_begin(vi sum) { return (void)sum, _mm512_setzero_si512(); }
LANE vi v_dots_end(vi sum, vw dots) {
    sum = v_add_int(sum, _mm512_madd_epi16(dots, _mm512_set1_epi16(1)));
    DONE_HERE(sum);
    return sum;
}
LANE vw v_dot4(vw sum, const int8_t *w, const int8_t *x, bool is_signed) {
    const int four = (int)load_u32((const uint8_t *)x);
    __m512i a = _mm512_loadu_si512(w), b = _mm512_set1_epi32(four);
    if (is_signed) {
        b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
        a = _mm512_abs_epi8(a);
    }
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b));
    DONE_HERE(sum);
    return sum;
}
#endif
LANE vf v_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
LANE vi v_bits(vi a, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(a, (unsigned)shift), _mm512_set1_epi32(mask));
}
LANE vi v_join(vi low, vi high, int shift) { return _mm512_or_si512(low, _mm512_slli_epi32(high, (unsigned)shift)); }
LANE vf v_from_byte(vi a, int i) { return v_from_int(_mm512_srai_epi32(_mm512_slli_epi32(a, (unsigned)(24 - 8 * i)), 24)); }
LANE vf v_from_halves(vi a, int shift) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, (unsigned)shift))); }

#elif defined(ISA_AVX2)

typedef struct {
    __m256 lo, hi;
} vf;
typedef __m256 vt;
LANE vt t_zero(void) { return _mm256_setzero_ps(); }
LANE vt t_load(const float *p) { return _mm256_loadu_ps(p); }
LANE vt t_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
LANE vt t_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
LANE void t_store(float *p, vt a) { _mm256_storeu_ps(p, a); }
LANE vt t_fma(vt a, vt b, vt c) { return _mm256_fmadd_ps(a, b, c); }
LANE vt t_first(vt a, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
#define UNROLL UNROLL_FULLY
LANE vf v_set(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LANE vf v_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LANE void v_store(float *p, vf a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
LANE void v_store_i8(int8_t *p, vf a) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
LANE vf v_add(vf a, vf b) { return (vf){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LANE vf v_sub(vf a, vf b) { return (vf){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LANE vf v_mul(vf a, vf b) { return (vf){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LANE vf v_div(vf a, vf b) { return (vf){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LANE vf v_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LANE vf v_min(vf a, vf b) { return (vf){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LANE vf v_max(vf a, vf b) { return (vf){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LANE float v_sum(vf v) { return sum_8(_mm256_add_ps(v.lo, v.hi)); }
LANE vf v_sums(float (*v)[16]) { return (vf){sum_8_rows(v), sum_8_rows(v + 8)}; }
LANE float v_max_lane(vf v) { return max_8(_mm256_max_ps(v.lo, v.hi)); }
LANE vf v_add_exponent(vf p, vf n) {
    __m256i lo = _mm256_slli_epi32(_mm256_castps_si256(n.lo), 23), hi = _mm256_slli_epi32(_mm256_castps_si256(n.hi), 23);
    return (vf){_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.lo), lo)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.hi), hi))};
}
LANE vf v_split_exponent(vf x, vf *e) {
    __m256i lo = _mm256_castps_si256(x.lo), hi = _mm256_castps_si256(x.hi), base = _mm256_set1_epi32(0x3f2aaaab);
    __m256i n_lo = _mm256_srai_epi32(_mm256_sub_epi32(lo, base), 23);
    __m256i n_hi = _mm256_srai_epi32(_mm256_sub_epi32(hi, base), 23);
    *e = (vf){_mm256_cvtepi32_ps(n_lo), _mm256_cvtepi32_ps(n_hi)};
    return (vf){_mm256_castsi256_ps(_mm256_sub_epi32(lo, _mm256_slli_epi32(n_lo, 23))),
                _mm256_castsi256_ps(_mm256_sub_epi32(hi, _mm256_slli_epi32(n_hi, 23)))};
}
typedef struct {
    __m256i lo, hi;
} vi;
LANE vi v_set_int(int n) { return (vi){_mm256_set1_epi32(n), _mm256_set1_epi32(n)}; }
LANE vi v_add_int(vi a, vi b) { return (vi){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
#if defined(ISA_VNNI)
LANE vi v_dot4(vi sum, const int8_t *w, const int8_t *x, bool is_signed) {
    const int four = (int)load_u32((const uint8_t *)x);
    (void)is_signed;  // panels are not
    const __m256i b = _mm256_set1_epi32(four);
    return (vi){dot_bytes(sum.lo, _mm256_loadu_si256((const __m256i *)w), b),
                dot_bytes(sum.hi, _mm256_loadu_si256((const __m256i *)(w + 32)), b)};
}
#else
typedef struct {
    __m256i lo, hi;
} vw;
LANE vw v_dots_begin(vi sum) { return (void)sum, (vw){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LANE vi v_dots_end(vi sum, vw dots) {
    sum = v_add_int(sum, (vi){add_words(dots.lo), add_words(dots.hi)});
    DONE_HERE(sum.lo);
    DONE_HERE(sum.hi);
    return sum;
}
LANE vw v_dot4(vw sum, const int8_t *w, const int8_t *x, bool is_signed) {
    const int four = (int)load_u32((const uint8_t *)x);
    __m256i b = _mm256_set1_epi32(four);
    __m256i lo = _mm256_loadu_si256((const __m256i *)w), hi = _mm256_loadu_si256((const __m256i *)(w + 32));
    sum.lo = _mm256_add_epi16(sum.lo, dot_words(lo, b, is_signed));
    sum.hi = _mm256_add_epi16(sum.hi, dot_words(hi, b, is_signed));
    DONE_HERE(sum.lo);
    DONE_HERE(sum.hi);
    return sum;
}
#endif
LANE vf v_from_int(vi a) { return (vf){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
LANE vi v_bits(vi a, int shift, int mask) {
    __m256i bits = _mm256_set1_epi32(mask);
    return (vi){_mm256_and_si256(_mm256_srli_epi32(a.lo, shift), bits), _mm256_and_si256(_mm256_srli_epi32(a.hi, shift), bits)};
}
LANE vi v_join(vi low, vi high, int shift) {
    return (vi){_mm256_or_si256(low.lo, _mm256_slli_epi32(high.lo, shift)),
                _mm256_or_si256(low.hi, _mm256_slli_epi32(high.hi, shift))};
}
LANE vf v_from_byte(vi a, int i) {
    return v_from_int((vi){_mm256_srai_epi32(_mm256_slli_epi32(a.lo, 24 - 8 * i), 24),
                           _mm256_srai_epi32(_mm256_slli_epi32(a.hi, 24 - 8 * i), 24)});
}
LANE vf v_from_halves(vi a, int shift) {
    a = v_bits(a, shift, 0xffff);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
    return (vf){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

#elif defined(ISA_NEON)

typedef struct {
    float32x4_t q[4];
} vf;
typedef float32x4_t vt;
LANE vt t_zero(void) { return vdupq_n_f32(0); }
LANE vt t_load(const float *p) { return vld1q_f32(p); }
LANE vt t_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
LANE vt t_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
LANE void t_store(float *p, vt a) { vst1q_f32(p, a); }
LANE vt t_fma(vt a, vt b, vt c) { return vfmaq_f32(c, a, b); }
LANE vt t_first(vt a, int n) {
    const int32x4_t lane = {0, 1, 2, 3};
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vcltq_s32(lane, vdupq_n_s32(n))));
}
#define UNROLL UNROLL_FULLY
#define EACH UNROLL_FULLY for (int i = 0; i < 4; i++)
LANE vf v_set(float x) { return (vf){{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
LANE vf v_load(const float *p) { return (vf){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
LANE void v_store(float *p, vf a) { EACH vst1q_f32(p + 4 * i, a.q[i]); }
LANE void v_store_i8(int8_t *p, vf a) {
    int16x8_t lo = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.q[0])), vqmovn_s32(vcvtnq_s32_f32(a.q[1])));
    int16x8_t hi = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.q[2])), vqmovn_s32(vcvtnq_s32_f32(a.q[3])));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
}
LANE vf v_add(vf a, vf b) {
    EACH a.q[i] = vaddq_f32(a.q[i], b.q[i]);
    return a;
}
LANE vf v_sub(vf a, vf b) {
    EACH a.q[i] = vsubq_f32(a.q[i], b.q[i]);
    return a;
}
LANE vf v_mul(vf a, vf b) {
    EACH a.q[i] = vmulq_f32(a.q[i], b.q[i]);
    return a;
}
LANE vf v_div(vf a, vf b) {
    EACH a.q[i] = vdivq_f32(a.q[i], b.q[i]);
    return a;
}
LANE vf v_fma(vf a, vf b, vf c) {
    EACH c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
    return c;
}
LANE vf v_min(vf a, vf b) {  // vminq would give NaN where one is
    EACH a.q[i] = vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
    return a;
}
LANE vf v_max(vf a, vf b) {
    EACH a.q[i] = vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
    return a;
}
LANE float v_sum(vf v) {
    float32x4_t a = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
    float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
LANE float v_max_lane(vf v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.q[0], v.q[1]), vmaxq_f32(v.q[2], v.q[3]))); }
LANE vf v_add_exponent(vf p, vf n) {
    EACH p.q[i] = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.q[i]), vshlq_n_s32(vreinterpretq_s32_f32(n.q[i]), 23)));
    return p;
}
LANE vf v_split_exponent(vf x, vf *e) {
    EACH {
        int32x4_t bits = vreinterpretq_s32_f32(x.q[i]), n = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f2aaaab)), 23);
        e->q[i] = vcvtq_f32_s32(n);
        x.q[i] = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(n, 23)));
    }
    return x;
}
typedef struct {
    int32x4_t q[4];
} vi;
LANE vi v_set_int(int n) { return (vi){{vdupq_n_s32(n), vdupq_n_s32(n), vdupq_n_s32(n), vdupq_n_s32(n)}}; }
LANE vi v_add_int(vi a, vi b) {
    EACH a.q[i] = vaddq_s32(a.q[i], b.q[i]);
    return a;
}
LANE vi v_dot4(vi sum, const int8_t *w, const int8_t *x, bool is_signed) {  // unsigned q have 6 bits at most
    (void)is_signed;
    int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(load_u32((const uint8_t *)x)));
    EACH sum.q[i] = vdotq_s32(sum.q[i], vld1q_s8(w + 16 * i), four);
    return sum;
}
LANE vf v_from_int(vi a) {
    vf r;
    EACH r.q[i] = vcvtq_f32_s32(a.q[i]);
    return r;
}
LANE vi v_bits(vi a, int shift, int mask) {
    int32x4_t right = vdupq_n_s32(-shift), bits = vdupq_n_s32(mask);
    EACH a.q[i] = vandq_s32(vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.q[i]), right)), bits);
    return a;
}
LANE vi v_join(vi low, vi high, int shift) {
    EACH low.q[i] = vorrq_s32(low.q[i], vshlq_s32(high.q[i], vdupq_n_s32(shift)));
    return low;
}
LANE vf v_from_byte(vi a, int byte) {
    vf r;
    EACH r.q[i] = vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(a.q[i], vdupq_n_s32(24 - 8 * byte)), 24));
    return r;
}
LANE vf v_from_halves(vi a, int shift) {
    vf r;
    a = v_bits(a, shift, 0xffff);
    EACH r.q[i] = vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(a.q[i])));
    return r;
}
#undef EACH

#else  // plain C: the definition

typedef struct {
    float lane[16];
} vf;
#define UNROLL  // sixteen lanes are loops themselves here
#define EACH NO_UNROLL for (int i = 0; i < 16; i++)
LANE vf v_set(float x) {
    vf r;
    EACH r.lane[i] = x;
    return r;
}
LANE vf v_load(const float *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
LANE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
LANE vf t_load_f16(const uint16_t *p) {
    vf r;
    EACH r.lane[i] = f16_to_f32(p[i]);
    return r;
}
LANE vf t_load_bf16(const uint16_t *p) {
    vf r;
    EACH r.lane[i] = bf16_to_f32(p[i]);
    return r;
}
LANE void v_store_i8(int8_t *p, vf a) { EACH p[i] = (int8_t)lrintf(a.lane[i]); }  // to nearest, ties to even
LANE vf v_add(vf a, vf b) {
    EACH a.lane[i] += b.lane[i];
    return a;
}
LANE vf v_sub(vf a, vf b) {
    EACH a.lane[i] -= b.lane[i];
    return a;
}
LANE vf v_mul(vf a, vf b) {
    EACH a.lane[i] *= b.lane[i];
    return a;
}
LANE vf v_div(vf a, vf b) {
    EACH a.lane[i] /= b.lane[i];
    return a;
}
LANE vf v_fma(vf a, vf b, vf c) {  // a * b + c, rounded once
    EACH c.lane[i] = fmaf(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
LANE vf v_min(vf a, vf b) {  // b where either is NaN
    EACH a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
LANE vf v_max(vf a, vf b) {  // b where either is NaN
    EACH a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
LANE float v_sum(vf v) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) v.lane[i] += v.lane[i + half];
    return v.lane[0];
}
LANE float v_max_lane(vf v) {
    float max = v.lane[0];
    for (int i = 1; i < 16; i++) max = v.lane[i] > max ? v.lane[i] : max;
    return max;
}
LANE vf v_add_exponent(vf p, vf n) {  // p * 2^n, where n is an integer in the lowest bits of its mantissa
    EACH p.lane[i] = float_from_bits(bits_from_float(p.lane[i]) + (bits_from_float(n.lane[i]) << 23));
    return p;
}
LANE vf v_split_exponent(vf x, vf *e) {  // x = m * 2^e with m in [2/3, 4/3): returns m
    EACH {
        uint32_t bits = bits_from_float(x.lane[i]);
        int32_t n = (int32_t)(bits - 0x3f2aaaab) >> 23;
        e->lane[i] = (float)n;
        x.lane[i] = float_from_bits(bits - ((uint32_t)n << 23));
    }
    return x;
}
typedef struct {
    int32_t lane[16];
} vi;
LANE vi v_set_int(int n) {
    vi r;
    EACH r.lane[i] = n;
    return r;
}
LANE vi v_add_int(vi a, vi b) {
    EACH a.lane[i] += b.lane[i];
    return a;
}
// Sums of a few dot products of bytes, on their way from a vi to a vi: in other vocabularies their lanes may be narrower. An
// unsigned q of b bits leaves room for 2^(7 - b) products of four, a signed one for one.
LANE vi v_dot4(vi sum, const int8_t *w, const int8_t *x, bool is_signed) {  // lane i adds four products: w[i] [4] with x [4]
    EACH for (int j = 0; j < 4; j++) sum.lane[i] += (is_signed ? w[4 * i + j] : (uint8_t)w[4 * i + j]) * x[j];
    return sum;
}
LANE vf v_from_int(vi a) {
    vf r;
    EACH r.lane[i] = (float)a.lane[i];
    return r;
}
LANE vi v_bits(vi a, int shift, int mask) {
    EACH a.lane[i] = (int32_t)((uint32_t)a.lane[i] >> shift) & mask;
    return a;
}
LANE vi v_join(vi low, vi high, int shift) {
    EACH low.lane[i] |= (int32_t)((uint32_t)high.lane[i] << shift);
    return low;
}
LANE vf v_from_byte(vi a, int byte) {  // which is signed
    vf r;
    EACH r.lane[i] = (float)(int8_t)((uint32_t)a.lane[i] >> 8 * byte);
    return r;
}
LANE vf v_from_halves(vi a, int shift) {  // a half float in 16 bits of each
    vf r;
    EACH r.lane[i] = f16_to_f32((uint16_t)((uint32_t)a.lane[i] >> shift));
    return r;
}
#undef EACH

#endif  // vocabulary

// The first n lanes, the others zero.
#ifndef ISA_AVX512
LANE vf v_load_n(const float *p, int n) {
    float full[16] = {0};
    memcpy(full, p, (size_t)n * sizeof *p);
    return v_load(full);
}
LANE vf v_first(vf a, int n) {
    float full[16];
    v_store(full, a);
    return v_load_n(full, n);
}
LANE void v_store_n(float *p, vf a, int n) {
    float full[16];
    v_store(full, a);
    memcpy(p, full, (size_t)n * sizeof *p);
}
#endif

// Sums of a panel as its products come, for v_dot4; but on x86 without VNNI they have a shape of their own.
#if defined(ISA_VNNI) || !(defined(ISA_AVX512) || defined(ISA_AVX2))
typedef vi vw;
LANE vw v_dots_begin(vi sum) { return sum; }
LANE vi v_dots_end(vi sum, vw dots) { return (void)sum, dots; }
#endif

// A vt is what one register holds of a vf: TILE_LANES lanes, here all of them.
#if TILE_LANES == 16
typedef vf vt;
LANE vt t_zero(void) { return v_set(0.0f); }
LANE vt t_load(const float *p) { return v_load(p); }
LANE void t_store(float *p, vt a) { v_store(p, a); }
LANE vt t_fma(vt a, vt b, vt c) { return v_fma(a, b, c); }
LANE vt t_first(vt a, int n) { return v_first(a, n); }
#endif

// As many lanes of a vector as an array still has, if they are not all.
LANE vf v_load_most(const float *p, int left) { return left < 16 ? v_load_n(p, left) : v_load(p); }
LANE void v_store_most(float *p, vf a, int left) {
    if (left < 16) v_store_n(p, a, left);
    else v_store(p, a);
}

// v_sum of each of 16 vectors.
#if !defined(ISA_AVX512) && !defined(ISA_AVX2)
LANE vf v_sums(float (*v)[16]) {
    float sum[16];
    NO_UNROLL for (int i = 0; i < 16; i++) sum[i] = v_sum(v_load(v[i]));
    return v_load(sum);
}
#endif

// to[0..n) = (or +=) the first n lanes.
LANE void v_put(float *to, vf a, int n, bool add) {
    if (n == 16) v_store(to, add ? v_add(v_load(to), a) : a);
    else v_store_n(to, add ? v_add(v_load_n(to, n), a) : a, n);
}

// P(f) of k vectors, where 2^f = 1 + f P(f) for f from -1/2 to 1/2 with relative error 2e-8 (tests/fit_polynomials.py). Side by
// side, because each is a chain of operations that wait for one another.
LANE void v_exp2_factors(const vf *f, vf *p, const int k) {
    static const float terms[] = {0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f};
    UNROLL for (int i = 0; i < k; i++) p[i] = v_set(terms[0]);
    UNROLL for (int term = 1; term < 6; term++)
        UNROLL for (int i = 0; i < k; i++) p[i] = v_fma(p[i], f[i], v_set(terms[term]));
}

// t, clamped to [-126, 126], is n + f with n the nearest integer; returns P(f). Adding ROUND, 1.5 * 2^23, rounds to an integer
// and leaves it in the lowest bits.
LANE vf v_exp2_parts(vf t, vf *n, vf *f) {
    vf round = v_set(ROUND), p;
    t = v_min(v_set(126.0f), v_max(v_set(-126.0f), t));
    *n = v_add(t, round);
    *f = v_sub(t, v_sub(*n, round));
    v_exp2_factors(f, &p, 1);
    return p;
}

// 2^t
MATH vf v_exp2(vf t) {
    vf n, f, p = v_exp2_parts(t, &n, &f);
    return v_add_exponent(v_fma(p, f, v_set(1.0f)), n);
}

// 2^t - 1 without the cancellation near t = 0: with 2^t = 2^n (1 + q), it is 2^n q + (2^n - 1).
MATH vf v_exp2_minus_1(vf t) {
    vf n, f, p = v_exp2_parts(t, &n, &f), power = v_add_exponent(v_set(1.0f), n);
    return v_fma(power, v_mul(p, f), v_sub(power, v_set(1.0f)));
}

// Sine, and cosine minus 1, of an angle in radians. Whole turns are taken off with 2 pi in two parts; sine and cosine of half
// of what is left, which is at most a quarter turn, are Taylor series to x^11 and x^12; then sin 2x = 2 sin x cos x, cos 2x - 1
// = -2 sin^2 x.
MATH void v_sincos(vf angle, vf *sine, vf *cosine_minus_1) {
    vf round = v_set(ROUND), turns = v_sub(v_fma(angle, v_set(0x1.45f306p-3f), round), round);
    vf left = v_fma(turns, v_set(0x1.777a5cp-23f), v_fma(turns, v_set(-0x1.921fb6p+2f), angle));
    vf x = v_mul(left, v_set(0.5f)), q = v_mul(x, x);
    vf s = v_set(-2.50521084e-8f), c = v_set(2.08767570e-9f);
    s = v_fma(s, q, v_set(2.75573192e-6f));
    s = v_fma(s, q, v_set(-1.98412698e-4f));
    s = v_fma(s, q, v_set(8.33333333e-3f));
    s = v_fma(s, q, v_set(-1.66666667e-1f));
    s = v_fma(v_mul(s, q), x, x);
    c = v_fma(c, q, v_set(-2.75573192e-7f));
    c = v_fma(c, q, v_set(2.48015873e-5f));
    c = v_fma(c, q, v_set(-1.38888889e-3f));
    c = v_fma(c, q, v_set(4.16666667e-2f));
    c = v_fma(c, q, v_set(-0.5f));
    c = v_fma(c, q, v_set(1.0f));
    vf twice = v_add(s, s);
    *sine = v_mul(twice, c);
    *cosine_minus_1 = v_mul(v_sub(v_set(0.0f), twice), s);
}

// x * sigmoid(x)
MATH vf v_silu(vf x) {
    return v_div(x, v_add(v_set(1.0f), v_exp2(v_mul(x, v_set(-0x1.715476p+0f)))));
}

// log(1 + e^x) = max(x, 0) + log(1 + t) with t = e^-|x|. u = 1 + t loses the low bits of t; they come back as the
// first term of the logarithm's series at u. log(m) = s - s^2/2 + s^3 P(s), s = m - 1 (tests/fit_polynomials.py).
MATH vf v_softplus(vf x) {
    vf one = v_set(1.0f), minus_abs = v_min(x, v_sub(v_set(0.0f), x));
    vf t = v_exp2(v_mul(minus_abs, v_set(0x1.715476p+0f))), u = v_add(one, t), e;
    vf s = v_sub(v_split_exponent(u, &e), one);
    vf p = v_set(-0x1.0e2acp-3f);
    p = v_fma(p, s, v_set(0x1.1df35p-3f));
    p = v_fma(p, s, v_set(-0x1.f03c18p-4f));
    p = v_fma(p, s, v_set(0x1.1ef19ap-3f));
    p = v_fma(p, s, v_set(-0x1.55b7e6p-3f));
    p = v_fma(p, s, v_set(0x1.99ce42p-3f));
    p = v_fma(p, s, v_set(-0x1.fffe5ep-3f));
    p = v_fma(p, s, v_set(0x1.55550cp-2f));
    p = v_fma(p, s, v_set(-0.5f));
    vf log_u = v_fma(e, v_set(0x1.62e43p-1f), v_fma(v_mul(s, s), p, s));
    vf lost = v_div(v_sub(t, v_sub(u, one)), u);
    return v_add(v_max(v_set(0.0f), x), v_add(log_u, lost));
}

// ---- Float weights ----

// Weights whose turn comes next, in file order. They are fetched into the second cache in shares while others are multiplied: all
// at once the lines would wait for each other.
struct fetch {
    const uint8_t *at, *end;
    int share;                       // bytes; float products fetch lines instead
};

// Some columns of ROW_GROUP rows at most, and of TOKEN_BLOCK tokens at most.
struct operands {
    const uint8_t *w;                // [rows][n], row_bytes from row to row
    size_t row_bytes;
    const float *x;                  // [tokens][n], ldx from token to token
    size_t ldx;
    int n;                           // a multiple of 16
    bool first;                      // sums begin here
    float (*sums)[ROW_GROUP][16];    // [token][row][lane]
    struct fetch *fetch;             // a line at each step of a tile of several rows
    bool few;                        // tokens: not that, but the next tile's rows, or what lies there
    bool near;                       // that is not enough: the first tokens fetch the next tile's rows too
};

LANE vt t_load_weights(enum format format, const uint8_t *w) {
    if (format == F32) return t_load((const float *)w);
    return format == F16 ? t_load_f16((const uint16_t *)w) : t_load_bf16((const uint16_t *)w);
}

// Of the rows below a tile's, the lines that lie k columns behind w.
LANE void fetch_rows_below(enum format format, int rows, size_t row_bytes, const uint8_t *w, int k) {
    UNROLL for (int r = 0; r < rows; r++)
        __builtin_prefetch(w + (size_t)(rows + r) * row_bytes + (size_t)(k * formats[format].bytes));
}

// `rows` rows from `row` on times `tokens` tokens from `token` on. It goes through the columns for `registers` registers of lanes
// at a time. format, rows, tokens and registers are constants at every call, so that the sums stay in registers.
LANE void tile(enum format format, int rows, int tokens, int registers, const struct operands o, int row, int token) {
    const uint8_t *w = o.w + (size_t)row * o.row_bytes;
    const float *x = o.x + (size_t)token * o.ldx;
    const uint8_t *ahead = o.fetch->at;
    const bool more = rows > 1 && !o.few && ahead < o.fetch->end, near = rows > 1 && o.near && token == 0;
    for (int lane = 0; lane < 16; lane += registers * TILE_LANES) {
        vt sum[4][6][16 / TILE_LANES], wv[4][16 / TILE_LANES];  // of the largest tile: a size that varies would be no constant
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int i = 0; i < registers; i++)
                    sum[r][t][i] = o.first ? t_zero() : t_load(o.sums[token + t][row + r] + lane + i * TILE_LANES);
        NO_UNROLL for (int k = lane; k < o.n; k += 16) {
            if (rows == 1) __builtin_prefetch(w + k * formats[format].bytes + FETCH_AHEAD, 0, SECOND_CACHE);
            if (rows > 1 && o.few) fetch_rows_below(format, rows, o.row_bytes, w, k);
            if (more) {
                __builtin_prefetch(ahead, 0, SECOND_CACHE);
                ahead += 64;
                if (near) fetch_rows_below(format, rows, o.row_bytes, w, k);
            }
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int i = 0; i < registers; i++)
                    wv[r][i] = t_load_weights(format, w + (size_t)r * o.row_bytes +
                                                          (size_t)((k + i * TILE_LANES) * formats[format].bytes));
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int i = 0; i < registers; i++) {
                    vt xv = t_load(x + (size_t)t * o.ldx + k + i * TILE_LANES);
                    UNROLL for (int r = 0; r < rows; r++) sum[r][t][i] = t_fma(wv[r][i], xv, sum[r][t][i]);
                }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int i = 0; i < registers; i++)
                    t_store(o.sums[token + t][row + r] + lane + i * TILE_LANES, sum[r][t][i]);
    }
    if (rows > 1) o.fetch->at = ahead;
}

// Up to ROW_TOKENS tokens, a row at a time: memory is read best that way, where rows are long.
LANE void row_by_row(enum format format, int rows, int tokens, const struct operands o) {
    for (int r = 0; r < rows; r++)
        switch (tokens) {
        case 1: tile(format, 1, 1, 16 / TILE_LANES, o, r, 0); break;
        case 2: tile(format, 1, 2, 16 / TILE_LANES, o, r, 0); break;
        case 3: tile(format, 1, 3, 16 / TILE_LANES, o, r, 0); break;
        case 4: tile(format, 1, 4, 16 / TILE_LANES, o, r, 0); break;
        }
}

// All rows times `tokens` tokens, a constant at every call.
LANE void tile_rows(int rows, int tokens, const struct operands o, int token) {
    int r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS) tile(F32, TILE_ROWS, tokens, 1, o, r, token);
    for (; r < rows; r++) tile(F32, 1, tokens, 1, o, r, token);
}

// Many tokens or short rows, and F32. Tokens outside, rows inside: the rows stay in the cache while tokens pass.
LANE void tiles(int rows, int tokens, const struct operands o) {
    for (int t = 0, n; t < tokens; t += n)
        switch (n = min_int(tokens - t, TILE_TOKENS)) {
        case 1: tile_rows(rows, 1, o, t); break;
        case 2: tile_rows(rows, 2, o, t); break;
        case 3: tile_rows(rows, 3, o, t); break;
        case 4: tile_rows(rows, 4, o, t); break;
        case 5: tile_rows(rows, 5, o, t); break;
        case 6: tile_rows(rows, 6, o, t); break;
        }
    _Static_assert(TILE_TOKENS <= 6, "a tile of more tokens needs a case");
}

// n columns of a row as floats, and zeros up to a multiple of 16. end: of the matrix, behind which nothing may be read.
LANE void floats_of(enum format format, const uint8_t *row, const uint8_t *end, int n, float *to) {
    const size_t bytes = (size_t)formats[format].bytes;
    int k = 0;
    for (; k + TILE_LANES <= n; k += TILE_LANES) t_store(to + k, t_load_weights(format, row + (size_t)k * bytes));
    for (; k % 16 || k < n; k += TILE_LANES) {
        uint8_t last[64] = {0};
        const uint8_t *from = row + (size_t)k * bytes;
        if (k < n && end - from < TILE_LANES * (int)bytes) from = memcpy(last, from, (size_t)(n - k) * bytes);
        t_store(to + k, k < n ? t_first(t_load_weights(format, from), n - k) : t_zero());
    }
}

// At most TOKEN_BLOCK tokens. Of many tokens COLUMN_BLOCK columns at a time, that they may stay in the nearest cache; weights of 16
// bits become floats once for all of these tokens.
LANE void wide_product(enum format format, const struct matrix *m, int row0, int n_rows, const float *x, size_t ldx, int tokens,
                       float *y, int ldy, bool add) {
    float sums[TOKEN_BLOCK][ROW_GROUP][16], floats[ROW_GROUP][COLUMN_BLOCK];
    const size_t bytes = (size_t)formats[format].bytes;
    const uint8_t *end = m->data + (size_t)m->rows * m->row_bytes;
    const bool few = tokens <= ROW_TOKENS, by_rows = few && (format != F32 || m->cols > SHORT_ROW);
    const bool near = ceil_div(tokens, TILE_TOKENS) < TILE_ROWS * TILE_LANES / 16;  // F32 has more lines than tiles take steps
    for (int r = 0; r < n_rows; r += ROW_GROUP) {
        const int rows = min_int(ROW_GROUP, n_rows - r);
        const uint8_t *next = m->data + (size_t)(row0 + r + rows) * m->row_bytes;  // only fetched: it may lie behind the matrix
        struct fetch fetch = {.at = next, .end = next + (size_t)rows * m->row_bytes};
        for (int k = 0, n; k < m->cols; k += n) {
            const uint8_t *w = m->data + (size_t)(row0 + r) * m->row_bytes + (size_t)k * bytes;
            n = by_rows ? m->cols - k : min_int(COLUMN_BLOCK, m->cols - k);
            const bool in_place = n >= 16 && (by_rows || format == F32);
            if (in_place) n = n / 16 * 16;
            struct operands o = {w, m->row_bytes, x + k, ldx, round_up(n, 16), k == 0, sums, &fetch, in_place && few,
                                 in_place && near};
            if (in_place) {
                if (by_rows) row_by_row(format, rows, tokens, o);
                else tiles(rows, tokens, o);
                continue;
            }
            for (int i = 0; i < rows; i++) floats_of(format, w + (size_t)i * m->row_bytes, end, n, floats[i]);
            o.w = (const uint8_t *)floats;
            o.row_bytes = sizeof floats[0];
            tiles(rows, tokens, o);
        }
        for (int t = 0; t < tokens; t++) {
            float *to = y + (size_t)t * (size_t)ldy + r;
            int i = 0;
            for (; i + 16 <= rows; i += 16) v_put(to + i, v_sums(sums[t] + i), 16, add);
            for (; i < rows; i++) to[i] = add ? to[i] + v_sum(v_load(sums[t][i])) : v_sum(v_load(sums[t][i]));
        }
    }
}

// ---- Quantised weights: blocks of 32 or 256 elements in one of ggml's ten layouts ----
//
// unpack() and chunk_scales() are all that knows of layouts. What uses them works on chunks of 256 columns of 16 rows:
// rows_dot() for one token, straight from the blocks; for more tokens panel_fill() once, which interleaves the rows, and
// panel_dot(). No copy of the weights is kept: it would double their memory and delay the first token.

// Vectors of 32 bytes.
#if defined(ISA_AVX512) || defined(ISA_AVX2)
typedef __m256i vb;
LANE float h_load(const uint8_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(load_u16(p)))); }
LANE vb b_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
LANE void b_store(void *p, vb a) { _mm256_storeu_si256((__m256i *)p, a); }
LANE vb b_field(vb a, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(a, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}
LANE vb b_nibbles(const void *p) {
    __m128i a = _mm_loadu_si128((const __m128i *)p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(a, 4), a), _mm256_set1_epi8(15));
}
LANE vb b_bits(uint32_t bits) {  // byte i of the mask selects bit i % 8 of byte i / 8
    vb spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                                                                     0x0303030303030303));
    vb mask = _mm256_set1_epi64x((long long)0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask), _mm256_set1_epi8(1));
}
LANE vb b_sub(vb a, int n) { return _mm256_sub_epi8(a, _mm256_set1_epi8((char)n)); }
LANE vb b_join(vb low, vb high, int shift) { return _mm256_or_si256(low, _mm256_slli_epi16(high, shift)); }
// The even and the odd dwords of a and then b, in each half: what is to be added pair by pair.
LANE vb even_dwords(vb a, vb b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}
LANE vb odd_dwords(vb a, vb b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
}
LANE vb add_pairs(vb a, vb b) { return _mm256_add_epi32(even_dwords(a, b), odd_dwords(a, b)); }  // as hadd, which is slower

// Dot products of four rows with x: dwords of the lower half over elements 0 to 15, of the upper half over 16 to 31. VNNI takes
// the weights as unsigned: see UNSIGNED_ZERO.
#if defined(ISA_VNNI) && defined(ISA_AVX2)
LANE vb dot_4_rows(enum format format, const vb w[4], vb x) {
    vb s[4];
    UNROLL for (int i = 0; i < 4; i++) s[i] = dot_bytes(_mm256_setzero_si256(), format == Q8_0 ? b_sub(w[i], 128) : w[i], x);
    return add_pairs(add_pairs(s[0], s[1]), add_pairs(s[2], s[3]));
}
#elif !defined(ISA_VNNI)
LANE vb add_word_pairs(vb a, vb b) { return _mm256_add_epi16(even_dwords(a, b), odd_dwords(a, b)); }

LANE vb dot_4_rows(enum format format, const vb w[4], vb x) {  // in words as long as the sums of so many bits fit
    vb s[4];
    UNROLL for (int i = 0; i < 4; i++) s[i] = dot_words(w[i], x, format == Q8_0);
    if (formats[format].bits <= 5) return add_words(add_word_pairs(add_word_pairs(s[0], s[1]), add_word_pairs(s[2], s[3])));
    if (formats[format].bits <= 6) return add_pairs(add_words(add_word_pairs(s[0], s[1])), add_words(add_word_pairs(s[2], s[3])));
    UNROLL for (int i = 0; i < 4; i++) s[i] = add_words(s[i]);
    return add_pairs(add_pairs(s[0], s[1]), add_pairs(s[2], s[3]));
}
#endif
#elif defined(ISA_NEON)
typedef struct {
    uint8x16_t lo, hi;
} vb;
LANE float h_load(const uint8_t *p) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load_u16(p)))), 0); }
LANE vb b_load(const void *p) { return (vb){vld1q_u8(p), vld1q_u8((const uint8_t *)p + 16)}; }
LANE void b_store(void *p, vb a) {
    vst1q_u8(p, a.lo);
    vst1q_u8((uint8_t *)p + 16, a.hi);
}
LANE vb b_field(vb a, int shift, int mask) {
    int8x16_t right = vdupq_n_s8((int8_t)-shift);
    uint8x16_t bits = vdupq_n_u8((uint8_t)mask);
    return (vb){vandq_u8(vshlq_u8(a.lo, right), bits), vandq_u8(vshlq_u8(a.hi, right), bits)};
}
LANE vb b_nibbles(const uint8_t *p) { return (vb){vandq_u8(vld1q_u8(p), vdupq_n_u8(15)), vshrq_n_u8(vld1q_u8(p), 4)}; }
LANE vb b_bits(uint32_t bits) {  // byte i of the mask selects bit i % 8 of byte i / 8
    uint8x16_t mask = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), one = vdupq_n_u8(1);
    uint8x16_t lo = vcombine_u8(vdup_n_u8((uint8_t)bits), vdup_n_u8((uint8_t)(bits >> 8)));
    uint8x16_t hi = vcombine_u8(vdup_n_u8((uint8_t)(bits >> 16)), vdup_n_u8((uint8_t)(bits >> 24)));
    return (vb){vandq_u8(vtstq_u8(lo, mask), one), vandq_u8(vtstq_u8(hi, mask), one)};
}
LANE vb b_sub(vb a, int n) { return (vb){vsubq_u8(a.lo, vdupq_n_u8((uint8_t)n)), vsubq_u8(a.hi, vdupq_n_u8((uint8_t)n))}; }
LANE vb b_join(vb low, vb high, int shift) {
    int8x16_t left = vdupq_n_s8((int8_t)shift);
    return (vb){vorrq_u8(low.lo, vshlq_u8(high.lo, left)), vorrq_u8(low.hi, vshlq_u8(high.hi, left))};
}
#else
typedef struct {
    uint8_t byte[32];
} vb;
#define EACH NO_UNROLL for (int i = 0; i < 32; i++)
LANE float h_load(const uint8_t *p) { return f16_to_f32(load_u16(p)); }
LANE vb b_load(const void *p) {
    vb r;
    memcpy(&r, p, sizeof r);
    return r;
}
LANE void b_store(void *p, vb a) { memcpy(p, &a, sizeof a); }
LANE vb b_field(vb a, int shift, int mask) {  // of each byte
    EACH a.byte[i] = (uint8_t)(a.byte[i] >> shift & mask);
    return a;
}
LANE vb b_nibbles(const uint8_t *p) {  // the low nibbles of 16 bytes, then the high ones
    vb r;
    EACH r.byte[i] = i < 16 ? p[i] & 15 : p[i - 16] >> 4;
    return r;
}
LANE vb b_bits(uint32_t bits) {  // a bit a byte
    vb r;
    EACH r.byte[i] = bits >> i & 1;
    return r;
}
LANE vb b_sub(vb a, int n) {  // from each byte, modulo 256
    EACH a.byte[i] = (uint8_t)(a.byte[i] - n);
    return a;
}
LANE vb b_join(vb low, vb high, int shift) {
    EACH low.byte[i] = (uint8_t)(low.byte[i] | high.byte[i] << shift);
    return low;
}
#undef EACH
#endif

// q of elements 32 i to 32 i + 31 of a block.
LANE vb unpack(enum format format, const uint8_t *p, int i) {
    switch (format) {
    // d [half], in formats with a minimum m [half], in 5-bit formats 32 fifth bits, then the elements: bytes, or 16 bytes
    // whose low nibbles are elements 0 to 15 and whose high nibbles are elements 16 to 31.
    case Q8_0: return b_load(p + 2);
    case Q4_0: return b_nibbles(p + 2);
    case Q4_1: return b_nibbles(p + 4);
    case Q5_0: return b_join(b_nibbles(p + 6), b_bits(load_u32(p + 2)), 4);
    case Q5_1: return b_join(b_nibbles(p + 8), b_bits(load_u32(p + 4)), 4);
    // Scales of 16 elements [16], 64 bytes with two bits each of four runs of 32, d, dmin [half].
    case Q2_K: return b_field(b_load(p + 16 + i / 4 * 32), i % 4 * 2, 3);
    // Third bits [32], 64 bytes as in Q2_K, scales [12], d [half].
    case Q3_K: return b_join(b_field(b_load(p + 32 + i / 4 * 32), i % 4 * 2, 3), b_field(b_load(p), i, 1), 2);
    // d, dmin [half], scales of 32 elements [12], in Q5_K fifth bits [32], then 4 times 32 bytes: low nibbles are one run
    // of 32, high nibbles the next.
    case Q4_K: return b_field(b_load(p + 16 + i / 2 * 32), i % 2 * 4, 15);
    case Q5_K: return b_join(b_field(b_load(p + 48 + i / 2 * 32), i % 2 * 4, 15), b_field(b_load(p + 16), i, 1), 4);
    // Low nibbles [128], upper two bits [64], scales of 16 elements [16 signed bytes], d [half]. In each half of the block
    // 64 bytes of nibbles and 32 of upper bits serve four runs.
    case Q6_K:
        return b_join(b_field(b_load(p + i / 4 * 64 + i % 2 * 32), i % 4 / 2 * 4, 15),
                      b_field(b_load(p + 128 + i / 4 * 32), i % 4 * 2, 3), 4);
    default: return b_load(p);  // not reached
    }
}

// How much too high weights are where they are multiplied. VNNI wants them unsigned, and what 128 add to a product is known
// beforehand: of signed ones alone, or in a panel of all that are not natural numbers. Others take q as it is in the file.
#define UNSIGNED_ZERO(format) (OF_VNNI((format) == Q8_0, false) ? 128 : formats[format].zero)
#define PANEL_ZERO(format) (OF_VNNI(formats[format].zero != 0, false) ? 128 : UNSIGNED_ZERO(format))

// 16 rows by up to 256 columns. Lane r of a vector belongs to row r.
struct panel {
    float scale[16][16];       // [group][row]
    float min[16][16];         // [group][row]
    int8_t w[64][16][4];       // [column/4][row][column%4] q, less what panel_fill() takes off
};

// A chunk of weights: n columns of 16 rows.
struct chunk {
    const uint8_t *row[16];    // begins of the rows; of those that do not exist, of the last one that does: not stored later
    size_t at;                 // bytes from there to the chunk
    int n;
};

LANE const uint8_t *chunk_block(enum format format, const struct chunk *c, int row, int i) {
    return c->row[row] + c->at + (size_t)(i * 32 / formats[format].block * formats[format].bytes);
}

// to[ld * column + row] = dword `column` of row `row`, of eight rows.
#if defined(ISA_AVX512) || defined(ISA_AVX2)
LANE void transpose_dwords(vb row[8], void *to, int ld) {
    vb pair[8], four[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
            four[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        b_store((int32_t *)to + ld * i, _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
        b_store((int32_t *)to + ld * (i + 4), _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
    }
}
#else
LANE void transpose_dwords(vb row[8], void *to, int ld) {
    for (int r = 0; r < 8; r++) {
        int32_t column[8];
        b_store(column, row[r]);
        for (int c = 0; c < 8; c++) memcpy((int32_t *)to + ld * c + r, &column[c], sizeof *column);
    }
}
#endif

// Half floats at offset `at` of each block of 32: to to[block][row].
LANE void chunk_halves(enum format format, const struct chunk *c, size_t at, float (*to)[16]) {
    uint16_t half[8][16];
    for (int b = 0; b < c->n / 32; b++)
        UNROLL for (int r = 0; r < 16; r++) half[b][r] = load_u16(chunk_block(format, c, r, b) + at);
    for (int b = 0; b < c->n / 32; b++)
        UNROLL for (int i = 0; i < 16; i += TILE_LANES) t_store(to[b] + i, t_load_f16(half[b] + i));
}

// 16 bytes at offset `at` of the first block of each row, as four vectors of dwords, whose lanes are the rows.
#if defined(ISA_AVX512) || defined(ISA_AVX2)
LANE void chunk_words(enum format format, const struct chunk *c, size_t at, vi w[4]) {
    __m256i to[2][4];
    UNROLL for (int h = 0; h < 2; h++) {
        __m256i r[4];  // rows i and i + 4 of a half
        UNROLL for (int i = 0; i < 4; i++)
            r[i] = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(chunk_block(format, c, 8 * h + i + 4, 0) + at)),
                                    _mm_loadu_si128((const __m128i *)(chunk_block(format, c, 8 * h + i, 0) + at)));
        __m256i low[2] = {_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpacklo_epi32(r[2], r[3])};
        __m256i high[2] = {_mm256_unpackhi_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[2], r[3])};
        to[h][0] = _mm256_unpacklo_epi64(low[0], low[1]);
        to[h][1] = _mm256_unpackhi_epi64(low[0], low[1]);
        to[h][2] = _mm256_unpacklo_epi64(high[0], high[1]);
        to[h][3] = _mm256_unpackhi_epi64(high[0], high[1]);
    }
#if defined(ISA_AVX512)
    UNROLL for (int i = 0; i < 4; i++) w[i] = _mm512_inserti64x4(_mm512_castsi256_si512(to[0][i]), to[1][i], 1);
#else
    UNROLL for (int i = 0; i < 4; i++) w[i] = (vi){to[0][i], to[1][i]};
#endif
}
#elif defined(ISA_NEON)
LANE void chunk_words(enum format format, const struct chunk *c, size_t at, vi w[4]) {
    UNROLL for (int q = 0; q < 4; q++) {
        int32x4_t r[4];
        UNROLL for (int i = 0; i < 4; i++) r[i] = vreinterpretq_s32_u8(vld1q_u8(chunk_block(format, c, 4 * q + i, 0) + at));
        int32x4x2_t even = vzipq_s32(r[0], r[2]), odd = vzipq_s32(r[1], r[3]);
        int32x4x2_t low = vzipq_s32(even.val[0], odd.val[0]), high = vzipq_s32(even.val[1], odd.val[1]);
        w[0].q[q] = low.val[0];
        w[1].q[q] = low.val[1];
        w[2].q[q] = high.val[0];
        w[3].q[q] = high.val[1];
    }
}
#else
LANE void chunk_words(enum format format, const struct chunk *c, size_t at, vi w[4]) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) w[i].lane[r] = (int32_t)load_u32(chunk_block(format, c, r, 0) + at + 4 * (size_t)i);
}
#endif

// Scales or minima of four groups of each row: d times its byte of `bytes`, less zero.
LANE void four_groups(float (*to)[16], vf d, vi bytes, float zero) {
    UNROLL for (int i = 0; i < 4; i++) v_store(to[i], v_mul(d, v_sub(v_from_byte(bytes, i), v_set(zero))));
}

// Scales and, where the format has them, minima of a chunk's groups, of all rows at once.
LANE void chunk_scales(enum format format, const struct chunk *c, struct panel *p) {
    const int nibble = 0x0f0f0f0f, two = 0x03030303, six = 0x3f3f3f3f;  // masks of four bytes at once
    vi w[4];
    vf d, minus_dmin;
    switch (format) {
    case Q2_K:  // low nibble: scale, high nibble: minimum
        chunk_words(format, c, 68, w);
        d = v_from_halves(w[3], 0);
        minus_dmin = v_sub(v_set(0.0f), v_from_halves(w[3], 16));
        chunk_words(format, c, 0, w);
        UNROLL for (int i = 0; i < 4; i++) {
            four_groups(p->scale + 4 * i, d, v_bits(w[i], 0, nibble), 0);
            four_groups(p->min + 4 * i, minus_dmin, v_bits(w[i], 4, nibble), 0);
        }
        break;
    case Q3_K:  // 6 bits, zero at 32: 16 nibbles, then 16 times two upper bits
        chunk_words(format, c, 94, w);
        d = v_from_halves(w[3], 16);
        chunk_words(format, c, 92, w);
        UNROLL for (int i = 0; i < 4; i++)
            four_groups(p->scale + 4 * i, d, v_join(v_bits(w[1 + i % 2], i / 2 * 4, nibble), v_bits(w[3], 2 * i, two), 4), 32);
        break;
    case Q4_K: case Q5_K:  // 8 scales and 8 minima of 6 bits: four of each in whole bytes, the others in what is left
        chunk_words(format, c, 0, w);
        d = v_from_halves(w[0], 0);
        minus_dmin = v_sub(v_set(0.0f), v_from_halves(w[0], 16));
        four_groups(p->scale, d, v_bits(w[1], 0, six), 0);
        four_groups(p->scale + 4, d, v_join(v_bits(w[3], 0, nibble), v_bits(w[1], 6, two), 4), 0);
        four_groups(p->min, minus_dmin, v_bits(w[2], 0, six), 0);
        four_groups(p->min + 4, minus_dmin, v_join(v_bits(w[3], 4, nibble), v_bits(w[2], 6, two), 4), 0);
        break;
    case Q6_K:  // signed bytes
        chunk_words(format, c, 194, w);
        d = v_from_halves(w[3], 16);
        chunk_words(format, c, 192, w);
        UNROLL for (int i = 0; i < 4; i++) four_groups(p->scale + 4 * i, d, w[i], 0);
        break;
    default:    // blocks of 32
        chunk_halves(format, c, 0, p->scale);
        if (formats[format].has_min) chunk_halves(format, c, 2, p->min);
    }
}

// ---- one row ----

// Scales of one block's groups and, in formats that have them, minima.
LANE void block_scales(enum format format, const uint8_t *block, float *scale, float *min) {
    const bool has_min = formats[format].has_min;
    if (formats[format].block == 32) {
        *scale = h_load(block);
        if (has_min) *min = h_load(block + 2);
        return;
    }
    struct chunk c = {.n = 256};
    struct panel p;
    for (int r = 0; r < 16; r++) c.row[r] = block;
    chunk_scales(format, &c, &p);
    for (int g = 0; g < 256 / formats[format].group; g++) {
        scale[g] = p.scale[g][0];
        if (has_min) min[g] = p.min[g][0];
    }
}

// A row of block-quantised weights, here and for a device that lays them out in another way. min stays as it is in formats without.
static void ISA_NAME(unpack_row)(enum format format, const uint8_t *row, int n, int8_t *q, float *scale, float *min) {
    const int block = formats[format].block, groups = block / formats[format].group;
    for (int k = 0; k < n; k += block, row += formats[format].bytes, scale += groups, min += groups) {
        block_scales(format, row, scale, min);
        for (int i = 0; i < block; i += 32) b_store(q + k + i, unpack(format, row, i / 32));
    }
}

// Element = scale * (q - zero) + min, each operation rounded, as gguf-py does it.
static void ISA_NAME(dequantize)(enum format format, const uint8_t *row, int n, float *x) {
    const int block = formats[format].block, group = formats[format].group;
    if (format == F32) memcpy(x, row, (size_t)n * sizeof *x);
    else if (format == F16) for (int i = 0; i < n; i++) x[i] = h_load(row + 2 * (size_t)i);
    else if (format == BF16) for (int i = 0; i < n; i++) x[i] = bf16_to_f32(load_u16(row + 2 * (size_t)i));
    else for (int k = 0; k < n; k += block, row += formats[format].bytes) {
        int8_t q[256];
        float scale[16], min[16] = {0};
        ISA_NAME(unpack_row)(format, row, block, q, scale, min);
        for (int i = 0; i < block; i++) x[k + i] = scale[i / group] * (float)(q[i] - formats[format].zero) + min[i / group];
    }
}

// ---- one token ----

// Dot products of 32 q of 16 rows with x, the first 16 and the last 16 apart.
#if defined(ISA_AVX512) && defined(ISA_VNNI)
LANE __m512i add_pairs_512(__m512i a, __m512i b) {  // add_pairs() in both halves
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

LANE void dot_16_rows(enum format format, const struct chunk *c, int i, const int8_t *xp, vi *first, vi *second) {
    const int in_block = i % (formats[format].block / 32);
    const __m512i x = _mm512_broadcast_i64x4(b_load(xp));
    __m512i d[2];  // of eight rows each, as dot_4_rows() of the first four in the lower half and of the others in the upper
    UNROLL for (int h = 0; h < 2; h++) {
        __m512i s[4];
        UNROLL for (int j = 0; j < 4; j++) {
            const vb low = unpack(format, chunk_block(format, c, 8 * h + j, i), in_block);
            const vb high = unpack(format, chunk_block(format, c, 8 * h + j + 4, i), in_block);
            __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            if (format == Q8_0) w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            s[j] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x);
        }
        d[h] = add_pairs_512(add_pairs_512(s[0], s[1]), add_pairs_512(s[2], s[3]));
    }
    *first = _mm512_shuffle_i32x4(d[0], d[1], 0x88);
    *second = _mm512_shuffle_i32x4(d[0], d[1], 0xdd);
}
#elif defined(ISA_AVX512) || defined(ISA_AVX2)
LANE void dot_16_rows(enum format format, const struct chunk *c, int i, const int8_t *xp, vi *first, vi *second) {
    const int in_block = i % (formats[format].block / 32);
    const vb x = b_load(xp);
    __m128i d[8];  // of each four rows the first and the second
    NO_UNROLL for (int r = 0; r < 16; r += 4) {
        vb w[4];
        UNROLL for (int j = 0; j < 4; j++) w[j] = unpack(format, chunk_block(format, c, r + j, i), in_block);
        b_store(d + r / 2, dot_4_rows(format, w, x));
    }
    vb lo_first = _mm256_set_m128i(d[2], d[0]), lo_second = _mm256_set_m128i(d[3], d[1]);
    vb hi_first = _mm256_set_m128i(d[6], d[4]), hi_second = _mm256_set_m128i(d[7], d[5]);
#if defined(ISA_AVX512)
    *first = _mm512_inserti64x4(_mm512_castsi256_si512(lo_first), hi_first, 1);
    *second = _mm512_inserti64x4(_mm512_castsi256_si512(lo_second), hi_second, 1);
#else
    *first = (vi){lo_first, hi_first};
    *second = (vi){lo_second, hi_second};
#endif
}
#elif defined(ISA_NEON)
LANE void dot_16_rows(enum format format, const struct chunk *c, int i, const int8_t *x, vi *first, vi *second) {
    const int8x16_t x_lo = vld1q_s8(x), x_hi = vld1q_s8(x + 16);
    const int32x4_t zero = vdupq_n_s32(0);
    NO_UNROLL for (int r = 0; r < 16; r += 4) {
        int32x4_t lo[4], hi[4];
        UNROLL for (int j = 0; j < 4; j++) {
            vb w = unpack(format, chunk_block(format, c, r + j, i), i % (formats[format].block / 32));
            lo[j] = vdotq_s32(zero, vreinterpretq_s8_u8(w.lo), x_lo);
            hi[j] = vdotq_s32(zero, vreinterpretq_s8_u8(w.hi), x_hi);
        }
        first->q[r / 4] = vpaddq_s32(vpaddq_s32(lo[0], lo[1]), vpaddq_s32(lo[2], lo[3]));
        second->q[r / 4] = vpaddq_s32(vpaddq_s32(hi[0], hi[1]), vpaddq_s32(hi[2], hi[3]));
    }
}
#else
LANE void dot_16_rows(enum format format, const struct chunk *c, int i, const int8_t *x, vi *first, vi *second) {
    for (int r = 0; r < 16; r++) {
        int8_t w[32];
        b_store(w, unpack(format, chunk_block(format, c, r, i), i % (formats[format].block / 32)));
        first->lane[r] = second->lane[r] = 0;
        for (int j = 0; j < 16; j++) {
            first->lane[r] += w[j] * x[j];
            second->lane[r] += w[j + 16] * x[j + 16];
        }
    }
}
#endif

// sum + group's scale * dot, and its minimum * x_min, the scaled sum of the activations: the order that section 4's head fixes.
LANE vf add_group(const struct panel *p, bool has_min, int g, vi dot, float x_scale, float x_min, vf sum) {
    sum = v_fma(v_mul(v_load(p->scale[g]), v_set(x_scale)), v_from_int(dot), sum);
    return has_min ? v_fma(v_load(p->min[g]), v_set(x_min), sum) : sum;
}

// Fetches the i-th 32 columns' share of what 16 rows hold, in file order. Formats of fewer bits wait for memory less, and lose a
// per cent where it comes from the second cache.
LANE void prefetch(enum format format, const uint8_t *rows, int i) {
    const int bytes = 16 * 32 * formats[format].bytes / formats[format].block;
    UNROLL for (int at = 0; at < bytes; at += 64) {
        if (formats[format].bits == 8) __builtin_prefetch(rows + i * bytes + at, 0, SECOND_CACHE);
        else __builtin_prefetch(rows + i * bytes + at);
    }
}

// Adds a chunk, whose scales are in p, times one token to sums [16]. The format is a constant at every call. 16 rows are 16
// streams, more than the processor follows by itself: `ahead`, what the next 16 rows hold of as many bytes, is fetched in
// between, in file order.
LANE void rows_dot(enum format format, const struct chunk *c, const uint8_t *ahead, const struct act_chunk *x,
                   const struct panel *p, float *sums) {
    const bool has_min = formats[format].has_min;
    const int zero = UNSIGNED_ZERO(format), group = formats[format].group;
    const int together = formats[format].block == 256 ? 2 : 1;  // blocks of 32, whose shifts are constants then
    vf s = v_load(sums);
    for (int i0 = 0; i0 < c->n / 32; i0 += together)
        UNROLL for (int i = i0; i < i0 + together; i++) {
            vi first, second;
            prefetch(format, ahead, i);
            dot_16_rows(format, c, i, x->q + 32 * i, &first, &second);
            UNROLL for (int h = 0; h < 32 / group; h++) {
                const vi dot = group == 32 ? v_add_int(first, second) : h ? second : first;
                const int g = 32 / group * i + h;
                s = add_group(p, has_min, g, v_add_int(dot, v_set_int(-surplus_of(x, zero, group, g))), x->scale[i],
                              scaled_sum_of(x, group, g), s);
            }
        }
    v_store(sums, s);
}

// ---- several tokens ----

// As many bytes as Q_PANELS panels of n columns have: a share for every 32 that are unpacked, and as many more as are named.
LANE struct fetch fetch_of(enum format format, const uint8_t *ahead, int n, int shares) {
    const int bytes = Q_PANELS * 16 * n / formats[format].block * formats[format].bytes;
    return (struct fetch){ahead, ahead + bytes, ceil_div(bytes, Q_PANELS * (n / 32) + shares)};
}

LANE void fetch_shares(struct fetch *f, int shares) {
    const uint8_t *stop = f->at + min_int(shares * f->share, (int)(f->end - f->at));
    for (; f->at < stop; f->at += 64) __builtin_prefetch(f->at, 0, SECOND_CACHE);
}

// The weights of a chunk, less `less` modulo 256; chunk_scales() does the rest of the panel. The format is a constant at every
// call.
LANE void panel_fill(enum format format, const struct chunk *c, int less, struct fetch *f, struct panel *p) {
    for (int i = 0; i < c->n / 32; i++) {
        fetch_shares(f, 1);
        NO_UNROLL for (int r = 0; r < 16; r += 8) {
            vb row[8];
            UNROLL for (int j = 0; j < 8; j++) {
                row[j] = unpack(format, chunk_block(format, c, r + j, i), i % (formats[format].block / 32));
                if (less) row[j] = b_sub(row[j], less);
            }
            transpose_dwords(row, p->w[8 * i][r], 16);
        }
    }
}

// Fetches the places in y of n_rows rows of a few tokens: lines that have left the caches, in an order that the processor does not
// see through. Storing the sums would wait for each.
LANE void fetch_sums(const float *y, int ldy, int n_rows, int tokens) {
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < n_rows; r += 16) __builtin_prefetch(y + (size_t)t * (size_t)ldy + r, 1);
}

// Adds Q_PANELS panels of n columns, times `tokens` tokens, to sums [tokens][Q_PANELS][16]. format and tokens are constants at
// every call.
LANE void panel_dot(enum format format, const struct panel *p, int n, int tokens, const struct act_chunk *x,
                    float (*sums)[Q_PANELS][16]) {
    const int group = formats[format].group, zero = PANEL_ZERO(format);
    const bool is_signed = format == Q8_0 && !zero;
    const int together = min_int(group / 4, format == Q8_0 ? 1 : 1 << (7 - formats[format].bits));  // products in a vw
    const int abreast = together <= 2 ? 1 : tokens;  // registers for a few weights and all sums, or for all tokens' vw
    for (int g = 0; g < n / group; g++) {
        vi dot[Q_TOKENS][Q_PANELS];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int i = 0; i < Q_PANELS; i++) dot[t][i] = v_set_int(-surplus_of(x + t, zero, group, g));
        UNROLL for (int k = 0; k < group / 4; k += together)
            UNROLL for (int t0 = 0; t0 < tokens; t0 += abreast) {
                vw dots[Q_TOKENS][Q_PANELS];
                UNROLL for (int t = t0; t < t0 + abreast; t++)
                    UNROLL for (int i = 0; i < Q_PANELS; i++) dots[t][i] = v_dots_begin(dot[t][i]);
                UNROLL for (int j = k; j < k + together; j++)
                    UNROLL for (int t = t0; t < t0 + abreast; t++)
                        UNROLL for (int i = 0; i < Q_PANELS; i++)
                            dots[t][i] = v_dot4(dots[t][i], p[i].w[g * group / 4 + j][0], x[t].q + g * group + 4 * j, is_signed);
                UNROLL for (int t = t0; t < t0 + abreast; t++)
                    UNROLL for (int i = 0; i < Q_PANELS; i++) dot[t][i] = v_dots_end(dot[t][i], dots[t][i]);
            }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int i = 0; i < Q_PANELS; i++)
                v_store(sums[t][i], add_group(p + i, formats[format].has_min, g, dot[t][i], x[t].scale[g * group / 32],
                                              scaled_sum_of(x + t, group, g), v_load(sums[t][i])));
    }
}

// What panels_dot() and amx_chunk() multiply: Q_PANELS panels of chunks.
LANE void panels_fill(enum format format, const struct chunk *c, int less, struct fetch *f, struct panel *p) {
    for (int i = 0; i < Q_PANELS; i++) {
        chunk_scales(format, c + i, p + i);
        panel_fill(format, c + i, less, f, p + i);
    }
}

// chunk_dot() for more than one token. Nothing is fetched in front of a step of Q_TOKENS: gcc 12 would then keep the tokens'
// pointers in memory, and take half as long again.
LANE void panels_dot(enum format format, const struct chunk *c, const uint8_t *ahead, int n_tokens, const struct act_chunk *x,
                     float (*sums)[Q_PANELS][16], const float *y, int ldy) {
    const int few = Q_TOKENS < 4 ? Q_TOKENS : 4;
    struct panel p[Q_PANELS];
    struct fetch f = fetch_of(format, ahead, c->n, n_tokens % Q_TOKENS);
    panels_fill(format, c, formats[format].zero - PANEL_ZERO(format), &f, p);
    for (int left = n_tokens, step; left > 0; left -= step) {
        if (left >= Q_TOKENS) {
            panel_dot(format, p, c->n, step = Q_TOKENS, x, sums);
        } else if (left >= few) {
            fetch_shares(&f, step = few);
            panel_dot(format, p, c->n, few, x, sums);
        } else {
            fetch_shares(&f, step = 1);
            panel_dot(format, p, c->n, 1, x, sums);
        }
        if (y) fetch_sums(y + (size_t)(n_tokens - left) * (size_t)ldy, ldy, 16 * Q_PANELS, step);
        x += step;
        sums += step;
    }
}

#ifdef ISA_AMX
// ---- many tokens, by Intel's matrix instructions: 16 of them times 16 rows, a group of 32 columns in one ----
//
// Such a dot product is an exact integer, as everywhere, and is added as everywhere. (Groups of 16 gain nothing: half the columns
// for as many additions.)

enum { AMX_TOKENS = 16 };
#define AMX_DOTS 0  // [token][row], 32 bits; numbers of tile registers must be literals
#define AMX_X 1     // [token][32]
#define AMX_W 2     // [column/4][row][column%4]

// What ldtilecfg reads: of each tile register the bytes a row, and the rows. (Not a local variable: gcc 12 thinks that only the
// first eight bytes are read, and would not store the others.)
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_registers = {1, 0, {0}, {64, 32, 64}, {AMX_TOKENS, AMX_TOKENS, 8}};

// panel_dot() for AMX_TOKENS tokens, of which the first `done` had their turn before.
LANE void amx_dot(enum format format, const struct panel *p, int n, const struct act_chunk *x, int done, struct fetch *f,
                  float (*sums)[Q_PANELS][16]) {
    int32_t dots[AMX_TOKENS][16] __attribute__((aligned(64)));
    for (int i = 0; i < Q_PANELS; i++) {
        vf sum[AMX_TOKENS];
        fetch_shares(f, n / 32);
        UNROLL for (int t = 0; t < AMX_TOKENS; t++) sum[t] = v_load(sums[t][i]);
        for (int g = 0; g < n / 32; g++) {
            _tile_zero(AMX_DOTS);
            _tile_loadd(AMX_X, x->q + 32 * g, sizeof *x);
            _tile_loadd(AMX_W, p[i].w[8 * g], 64);
            _tile_dpbssd(AMX_DOTS, AMX_X, AMX_W);
            _tile_stored(AMX_DOTS, dots, 64);
            UNROLL for (int t = 0; t < AMX_TOKENS; t++) {
                const vi dot = _mm512_load_si512(dots[t]);
                sum[t] = add_group(p + i, formats[format].has_min, g, dot, x[t].scale[g], x[t].scaled_sum[g], sum[t]);
            }
        }
        UNROLL for (int t = 0; t < AMX_TOKENS; t++)
            if (t >= done) v_store(sums[t][i], sum[t]);
    }
}

// chunk_dot() for AMX_TOKENS tokens at least: when fewer are left, some have their turn again.
LANE void amx_chunk(enum format format, const struct chunk *c, const uint8_t *ahead, int n_tokens, const struct act_chunk *x,
                    float (*sums)[Q_PANELS][16], const float *y, int ldy) {
    struct panel p[Q_PANELS];
    if (formats[format].group != 32) return;  // never called for these: no code for them
    struct fetch f = fetch_of(format, ahead, c->n, ceil_div(n_tokens, AMX_TOKENS) * Q_PANELS * (c->n / 32));
    panels_fill(format, c, formats[format].zero, &f, p);
    __asm__ volatile("" ::: "memory");  // gcc is not told that tiles are loaded from memory
    for (int token = 0; token < n_tokens; token += AMX_TOKENS) {
        const int from = min_int(token, n_tokens - AMX_TOKENS);
        amx_dot(format, p, c->n, x + from, token - from, &f, sums + from);
        if (y) fetch_sums(y + (size_t)from * (size_t)ldy, ldy, 16 * Q_PANELS, AMX_TOKENS);
    }
}
#endif

// Adds n_panels chunks of one row's length, 16 rows after 16 rows, times n_tokens tokens to sums [n_tokens][n_panels][16]. Of one
// token n_panels is 1, else Q_PANELS. ahead: what the next rows hold of as many bytes. y: where the sums will go next, or NULL.
// amx: by amx_chunk(). The format and amx are constants at every call.
LANE void chunk_dot(enum format format, bool amx, const struct chunk *c, const uint8_t *ahead, int n_tokens,
                    const struct act_chunk *x, float (*sums)[16], const float *y, int ldy) {
#ifdef ISA_AMX
    if (amx) {
        amx_chunk(format, c, ahead, n_tokens, x, (float (*)[Q_PANELS][16])sums, y, ldy);
        return;
    }
#endif
    (void)amx;
    if (n_tokens == 1) {
        struct panel p;  // of which only the scales are used
        chunk_scales(format, c, &p);
        rows_dot(format, c, ahead, x, &p, sums[0]);
        return;
    }
    panels_dot(format, c, ahead, n_tokens, x, (float (*)[Q_PANELS][16])sums, y, ldy);
}

// At most Q_TOKEN_BLOCK tokens. amx, a constant at every call: see chunk_dot().
LANE void blocks_product(bool amx, const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens,
                         float *y, int ldy, bool add) {
    float sums[Q_TOKEN_BLOCK * Q_PANELS][16];
    const int n_panels = n_tokens == 1 ? 1 : Q_PANELS, together = 16 * n_panels;  // rows
    const size_t chunk_bytes = (size_t)(256 / formats[m->format].block * formats[m->format].bytes);
    for (int r = 0; r < n_rows; r += together) {
        struct chunk c[Q_PANELS] = {{.at = 0}};
        for (int i = 0; i < together; i++)
            c[i / 16].row[i % 16] = row_or_last(m, row0 + r + i);
        const uint8_t *ahead = c->row[0] + (size_t)together * m->row_bytes;  // only fetched: it may lie behind the matrix
        memset(sums, 0, (size_t)(n_tokens * n_panels) * sizeof sums[0]);
        for (int k = 0; k < m->cols; k += 256, ahead += (size_t)together * chunk_bytes) {
            const struct act_chunk *xk = act_chunk_of(x, token0, k);
            const float *to = k + 256 < m->cols ? NULL : y + r;
            for (int i = 0; i < n_panels; i++) c[i].n = min_int(m->cols - k, 256), c[i].at = (size_t)(k / 256) * chunk_bytes;
#if (defined(ISA_AVX512) || defined(ISA_AVX2) || defined(ISA_NEON)) && !defined(MAMBA_ROLLED)  // code of its own for each format
            switch (m->format) {
            case Q8_0: chunk_dot(Q8_0, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q4_0: chunk_dot(Q4_0, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q4_1: chunk_dot(Q4_1, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q5_0: chunk_dot(Q5_0, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q5_1: chunk_dot(Q5_1, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q2_K: chunk_dot(Q2_K, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q3_K: chunk_dot(Q3_K, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q4_K: chunk_dot(Q4_K, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q5_K: chunk_dot(Q5_K, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case Q6_K: chunk_dot(Q6_K, amx, c, ahead, n_tokens, xk, sums, to, ldy); break;
            case F32: case F16: case BF16: case N_FORMATS: break;
            }
#else
            chunk_dot(m->format, amx, c, ahead, n_tokens, xk, sums, to, ldy);
#endif
        }
        for (int t = 0; t < n_tokens; t++)
            for (int i = 0; i < n_panels && r + 16 * i < n_rows; i++)
                v_put(y + (size_t)t * (size_t)ldy + r + 16 * i, v_load(sums[t * n_panels + i]), min_int(16, n_rows - r - 16 * i),
                      add);
    }
}

static void quantized_product(const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens,
                              float *y, int ldy, bool add) {
    blocks_product(false, m, row0, n_rows, x, token0, n_tokens, y, ldy, add);
}

#ifdef ISA_AMX
// quantized_product(), by tiles where they gain.
static void amx_product(const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens, float *y,
                        int ldy, bool add) {
    if (formats[m->format].group != 32 || n_tokens < AMX_TOKENS) {
        quantized_product(m, row0, n_rows, x, token0, n_tokens, y, ldy, add);
        return;
    }
    _tile_loadconfig(&amx_registers);
    blocks_product(true, m, row0, n_rows, x, token0, n_tokens, y, ldy, add);
    _tile_release();
}
#endif

// ---- Float weights of few columns, for many tokens: there the sums of lanes would take longer than the products ----

// 16 rows as floats: a vector is a column, whose lane r belongs to row r. Columns that one lane of the sums adds up are together.
struct narrow_panel {
    int steps;                    // of such columns
    float w[NARROW_COLUMNS][16];  // [column % 16 * steps + column / 16][row]; 0 behind the last column
};

static void narrow_fill(const struct matrix *m, int row0, struct narrow_panel *p) {
    float rows[16][NARROW_COLUMNS];
    const uint8_t *end = m->data + (size_t)m->rows * m->row_bytes;
    p->steps = ceil_div(m->cols, 16);
    for (int r = 0; r < 16; r++) floats_of(m->format, row_or_last(m, row0 + r), end, m->cols, rows[r]);
    for (int k = 0; k < 16 * p->steps; k += 8)
        for (int r = 0; r < 16; r += 8) {
            vb part[8];
            for (int i = 0; i < 8; i++) part[i] = b_load(rows[r + i] + k);
            transpose_dwords(part, &p->w[k % 16 * p->steps + k / 16][r], 16 * p->steps);
        }
}

// sums [tokens][16] = a panel times the tokens, whose number is a constant at every call. The lanes of the sums have their turns in
// the order 0, 8, 4, 12, 2, 10 ..., and the tree over them is added as it grows, like a binary counter: a turn whose number ends in
// `level` ones completes as many branches.
LANE void narrow_dot(const struct narrow_panel *p, int tokens, const float *x, size_t ldx, float (*sums)[16]) {
    float branch[4][NARROW_TOKENS][16];  // [level] waits for its other half
    for (int turn = 0; turn < 16; turn++) {
        const int lane = (turn & 1) << 3 | (turn & 2) << 1 | (turn & 4) >> 1 | (turn & 8) >> 3;
        const float *w = p->w[lane * p->steps], *xk = x + lane;
        vf sum[NARROW_TOKENS];
        UNROLL for (int t = 0; t < tokens; t++) sum[t] = v_set(0.0f);
        NO_UNROLL for (int i = 0; i < p->steps; i++, w += 16, xk += 16) {
            const vf wv = v_load(w);
            UNROLL for (int t = 0; t < tokens; t++) sum[t] = v_fma(wv, v_set(xk[(size_t)t * ldx]), sum[t]);
        }
        int level = 0;
        NO_UNROLL for (; turn >> level & 1; level++)
            UNROLL for (int t = 0; t < tokens; t++) sum[t] = v_add(v_load(branch[level][t]), sum[t]);
        UNROLL for (int t = 0; t < tokens; t++) v_store(level < 4 ? branch[level][t] : sums[t], sum[t]);
    }
}

static void narrow_product(const struct matrix *m, int row0, int n_rows, const float *x, size_t ldx, int n_tokens, float *y,
                           int ldy, bool add) {
    struct narrow_panel p;
    float sums[NARROW_TOKENS][16];
    for (int r = 0; r < n_rows; r += 16) {
        narrow_fill(m, row0 + r, &p);
        for (int t = 0, n; t < n_tokens; t += n) {
            const float *xt = x + (size_t)t * ldx;
            float *to = y + (size_t)t * (size_t)ldy + r;
            n = n_tokens - t < NARROW_TOKENS ? 1 : NARROW_TOKENS;
            fetch_sums(to, ldy, 16, n);
            if (n == 1) narrow_dot(&p, 1, xt, ldx, sums);
            else narrow_dot(&p, NARROW_TOKENS, xt, ldx, sums);
            for (int i = 0; i < n; i++) v_put(to + (size_t)i * (size_t)ldy, v_load(sums[i]), min_int(16, n_rows - r), add);
        }
    }
}

// ---- Products of any format ----

typedef void block_product(const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens, float *y,
                           int ldy, bool add);

// quantized_by multiplies quantised weights.
static void multiply(block_product *quantized_by, const struct matrix *m, int row0, int n_rows, const struct act *x, int token0,
                     int n_tokens, float *y, int ldy, bool add) {
    const bool quantized = is_quantized(m), many = n_tokens > ROW_TOKENS && n_tokens >= NARROW_TOKENS;
    const bool narrow = !quantized && many && m->cols <= NARROW_COLUMNS;
    const int block = narrow ? n_tokens : quantized ? Q_TOKEN_BLOCK : TOKEN_BLOCK;
    const size_t ldx = (size_t)x->ld;
    for (int t = 0; t < n_tokens; t += block) {
        const int tokens = min_int(block, n_tokens - t);
        const float *xf = x->f + (size_t)(token0 + t) * ldx;
        float *to = y + (size_t)t * (size_t)ldy;
        if (narrow) narrow_product(m, row0, n_rows, xf, ldx, tokens, to, ldy, add);
        else if (m->format == F32) wide_product(F32, m, row0, n_rows, xf, ldx, tokens, to, ldy, add);
        else if (m->format == F16) wide_product(F16, m, row0, n_rows, xf, ldx, tokens, to, ldy, add);
        else if (m->format == BF16) wide_product(BF16, m, row0, n_rows, xf, ldx, tokens, to, ldy, add);
        else quantized_by(m, row0, n_rows, x, token0 + t, tokens, to, ldy, add);
    }
}

static void ISA_NAME(matmul)(const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens,
                             float *y, int ldy, bool add) {
    multiply(quantized_product, m, row0, n_rows, x, token0, n_tokens, y, ldy, add);
}

#ifdef ISA_AMX
static void matmul_amx(const struct matrix *m, int row0, int n_rows, const struct act *x, int token0, int n_tokens, float *y,
                       int ldy, bool add) {
    multiply(amx_product, m, row0, n_rows, x, token0, n_tokens, y, ldy, add);
}
#endif

// ---- Activations ----

// Sum of 16 bytes.
LANE int32_t sum_16(const int8_t *q) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    const __m128i offset = _mm_xor_si128(_mm_loadu_si128((const __m128i *)q), _mm_set1_epi8(-128));  // q + 128, unsigned
    const __m128i halves = _mm_sad_epu8(offset, _mm_setzero_si128());
    return _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 16 * 128;
#elif defined(ISA_NEON)
    return vaddlvq_s8(vld1q_s8(q));
#else
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += q[i];
    return sum;
#endif
}

// q = round(x / scale), scale = max|x| / 127 of each 32. A NaN or an infinity makes the first scale NaN, so that it reaches the
// logits, where it is reported.
static void ISA_NAME(quantize)(const float *x, int n, struct act_chunk *to, int column) {
    const vf zero = v_set(0.0f);
    int8_t *q = to->q + column;
    float *scale = to->scale + column / 32;
    vf poison = zero;
    for (int b = 0; b < n / 32; b++) {
        const vf lo = v_load(x + 32 * b), hi = v_load(x + 32 * b + 16);
        const float max = v_max_lane(v_max(v_max(lo, hi), v_sub(zero, v_min(lo, hi))));
        const vf inverse = v_set(max > 1e-30f ? 127.0f / max : 0.0f);
        v_store_i8(q + 32 * b, v_mul(lo, inverse));
        v_store_i8(q + 32 * b + 16, v_mul(hi, inverse));
        scale[b] = max / 127.0f;
        poison = v_fma(v_add(lo, hi), zero, poison);
    }
    scale[0] += v_sum(poison);
    for (int b = column / 32; b < (column + n) / 32; b++) {
        const int32_t first = sum_16(to->q + 32 * b), second = sum_16(to->q + 32 * b + 16);
        to->surplus_16[2 * b] = 128 * first;
        to->surplus_16[2 * b + 1] = 128 * second;
        to->surplus[b] = 128 * (first + second);
        to->scaled_sum[b] = to->scale[b] * (float)(first + second);
    }
}

// LayerNorm, or without b, and then with a mean of 0, RMSNorm; w NULL: 1.
static void ISA_NAME(norm)(const float *x, const float *w, const float *b, float *y, int n, float eps) {
    float lanes[16];
    vf sum = v_set(0.0f), squares = v_set(0.0f);
    for (int k = 0; b && k < n; k += 16) sum = v_add(v_load_most(x + k, n - k), sum);
    const vf mean = v_set(v_sum(sum) / (float)n);
    v_store(lanes, mean);
    for (int k = 0; k < n; k += 16) {
        vf v = v_sub(v_load_most(x + k, n - k), v_load_most(lanes, n - k));
        squares = v_fma(v, v, squares);
    }
    const vf r = v_set(1.0f / sqrtf(v_sum(squares) / (float)n + eps));
    for (int k = 0; k < n; k += 16) {
        vf v = v_mul(v_sub(v_load_most(x + k, n - k), mean), r);
        if (b) v = v_fma(v, v_load_most(w + k, n - k), v_load_most(b + k, n - k));
        else if (w) v = v_mul(v, v_load_most(w + k, n - k));
        v_store_most(y + k, v, n - k);
    }
}

// Fetches n floats from `at` on of a next_state: each sequence's lies elsewhere.
LANE void fetch_state(const float *next_state, size_t at, size_t n) {
    for (size_t i = 0; i < n; i += 16) __builtin_prefetch(next_state + at + i, 0, SECOND_CACHE);
}

// The same channels of a later token, which lie a page away: the processor does not guess where.
LANE void fetch_token(const float *p, int ld) { __builtin_prefetch(p + FETCH_TOKENS * ld); }

// out = silu(b + sum over taps of w[tap] * input), in tap order. The last inputs move through `past`, the oldest first.
// Four taps, as in every published model, stay in registers.
static void conv_4_taps(const struct conv_args *a) {
    for (int c = 0; c < a->n; c += 16) {
        vf past[4], w[4], b = v_load(a->b + c);
        UNROLL for (int i = 0; i < 4; i++) w[i] = v_load(a->w + (size_t)i * (size_t)a->ld_w + c);
        UNROLL for (int i = 0; i < 3; i++) {
            const size_t at = (size_t)i * (size_t)a->ld_w + (size_t)c;
            fetch_state(a->next_state, at, 16);
            past[i] = v_load(a->state + at);
        }
        for (int t = 0; t < a->n_tokens; t++) {
            const float *in = a->in + (size_t)t * (size_t)a->ld + c;
            fetch_token(in, a->ld);
            past[3] = v_load(in);
            vf sum = b;
            UNROLL for (int i = 0; i < 4; i++) sum = v_fma(w[i], past[i], sum);
            UNROLL for (int i = 0; i < 3; i++) past[i] = past[i + 1];
            v_store(a->out + (size_t)t * (size_t)a->ld + c, v_silu(sum));
        }
        UNROLL for (int i = 0; i < 3; i++) v_store(a->state + (size_t)i * (size_t)a->ld_w + c, past[i]);
    }
}

static void conv_any_taps(const struct conv_args *a) {
    for (int c = 0; c < a->n; c += 16)
        for (int t = 0; t < a->n_tokens; t++) {
            float *to = a->out + (size_t)t * (size_t)a->ld + c, *state = a->state + c;
            vf now = v_load(a->in + (size_t)t * (size_t)a->ld + c), sum = v_load(a->b + c);
            for (int i = 0; i < a->d_conv - 1; i++) {  // shifts the state while it reads it
                vf past = v_load(state + (size_t)i * (size_t)a->ld_w);
                vf next = i + 2 < a->d_conv ? v_load(state + (size_t)(i + 1) * (size_t)a->ld_w) : now;
                sum = v_fma(v_load(a->w + (size_t)i * (size_t)a->ld_w + c), past, sum);
                v_store(state + (size_t)i * (size_t)a->ld_w, next);
            }
            sum = v_fma(v_load(a->w + (size_t)(a->d_conv - 1) * (size_t)a->ld_w + c), now, sum);
            v_store(to, v_silu(sum));
        }
}

static void ISA_NAME(conv_silu)(const struct conv_args *a) {
    if (a->d_conv == 4) conv_4_taps(a);
    else conv_any_taps(a);
}

// What the states of 16 channels need of the tokens t0 .. t0 + n, and y = D * u, to which they add.
static void scan_begin(const struct scan_args *a, int c, int t0, int n, struct scan_block *b) {
    const vf d = v_load(a->d + c), dt_b = v_load(a->dt_b + c);
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)(t0 + t) * (size_t)a->ld + (size_t)c;
        fetch_token(a->dt_y + at, a->ld);
        fetch_token(a->u + at, a->ld);
        fetch_token(a->z + at, a->ld);
        vf dt = v_softplus(v_add(v_load(a->dt_y + at), dt_b)), u = v_load(a->u + at);
        v_store(b->dt[t], dt);
        v_store(b->least[t], v_div(v_set(-125.0f), dt));
        v_store(b->in[t], a->a_inverse ? u : v_mul(dt, u));
        v_store(b->y[t], v_mul(d, u));
    }
}

// The gate.
static void scan_end(const struct scan_args *a, int c, int t0, int n, const struct scan_block *b) {
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)(t0 + t) * (size_t)a->ld + (size_t)c;
        v_store(a->dt_y + at, v_mul(v_load(b->y[t]), v_silu(v_load(a->z + at))));
    }
}

// k states of 16 channels: h = exp(dt * A) * h + dt * B * u, and what they add to the output, y += C * h. dt * A is never above
// 0, and not below -125, where 2^x is as good as 0, because A is taken not below `least`. So its exponential needs no clamp, and
// dt * A no product of its own.
LANE void scan_states(const struct scan_args *a, int n_tokens, struct scan_block *block, float *state, const float *a2,
                      const float *bc, const int k) {
    vf h[4], a2_n[4], round = v_set(ROUND);
    UNROLL for (int i = 0; i < k; i++) h[i] = v_load(state + 16 * i), a2_n[i] = v_load(a2 + 16 * i);
    for (int t = 0; t < n_tokens; t++) {
        const float *b = bc + (size_t)t * (size_t)a->ld_bc, *c = b + a->d_state;
        vf dt = v_load(block->dt[t]), least = v_load(block->least[t]), in = v_load(block->in[t]), y = v_load(block->y[t]);
        vf a_t[4], n[4], f[4], p[4];
        UNROLL for (int i = 0; i < k; i++) a_t[i] = v_max(least, a2_n[i]);
        UNROLL for (int i = 0; i < k; i++) n[i] = v_fma(dt, a_t[i], round);
        UNROLL for (int i = 0; i < k; i++) f[i] = v_fma(dt, a_t[i], v_sub(round, n[i]));
        v_exp2_factors(f, p, k);
        UNROLL for (int i = 0; i < k; i++) p[i] = v_fma(p[i], f[i], v_set(1.0f));
        UNROLL for (int i = 0; i < k; i++) h[i] = v_fma(v_add_exponent(p[i], n[i]), h[i], v_mul(in, v_set(b[i])));
        UNROLL for (int i = 0; i < k; i++) y = v_fma(h[i], v_set(c[i]), y);
        v_store(block->y[t], y);
    }
    UNROLL for (int i = 0; i < k; i++) v_store(state + 16 * i, h[i]);
}

// A state with zero-order hold: h = exp(dt * A) * h + (exp(dt * A) - 1) / A * B * u.
static void scan_zoh(const struct scan_args *a, int n_tokens, struct scan_block *block, float *state, const float *a2,
                     const float *a_inverse, const float *bc) {
    vf h = v_load(state);
    for (int i = 0; i < n_tokens; i++) {
        const float *b = bc + (size_t)i * (size_t)a->ld_bc, *c = b + a->d_state;
        vf t = v_mul(v_load(block->dt[i]), v_load(a2)), factor = v_mul(v_exp2_minus_1(t), v_load(a_inverse));
        h = v_fma(v_exp2(t), h, v_mul(v_mul(factor, v_load(block->in[i])), v_set(*b)));
        v_store(block->y[i], v_fma(h, v_set(*c), v_load(block->y[i])));
    }
    v_store(state, h);
}

// A complex state, where y += 2 Re(C * h). a_inverse NULL: B is discretised as dt * B.
static void scan_complex(const struct scan_args *a, int n_tokens, struct scan_block *block, float *state, const float *a2,
                         const float *a_inverse, const float *bc) {
    vf re = v_load(state), im = v_load(state + 16);
    for (int i = 0; i < n_tokens; i++) {
        const float *b = bc + (size_t)i * (size_t)a->ld_bc, *c = b + 2 * a->d_state;
        vf dt = v_load(block->dt[i]), in = v_load(block->in[i]), t = v_mul(dt, v_load(a2)), size = v_exp2(t), sine, turned;
        v_sincos(v_mul(dt, v_load(a2 + 16)), &sine, &turned);
        vf a_re = v_fma(size, turned, size), a_im = v_mul(size, sine), b_re = v_set(b[0]), b_im = v_set(b[1]);
        if (a_inverse) {  // (e^x cos y - 1) + i e^x sin y = (e^x (cos y - 1) + (e^x - 1)) + ..., over A; then times B
            vf f_re = v_fma(size, turned, v_exp2_minus_1(t)), i_re = v_load(a_inverse), i_im = v_load(a_inverse + 16);
            vf g_re = v_sub(v_mul(f_re, i_re), v_mul(a_im, i_im)), g_im = v_fma(f_re, i_im, v_mul(a_im, i_re));
            vf product = v_sub(v_mul(g_re, b_re), v_mul(g_im, b_im));
            b_im = v_fma(g_re, b_im, v_mul(g_im, b_re));
            b_re = product;
        }
        vf minus_im = v_sub(v_set(0.0f), im), new_re = v_fma(a_re, re, v_fma(a_im, minus_im, v_mul(in, b_re)));
        im = v_fma(a_re, im, v_fma(a_im, re, v_mul(in, b_im)));
        re = new_re;
        vf y = v_fma(im, v_set(-2.0f * c[1]), v_load(block->y[i]));
        v_store(block->y[i], v_fma(re, v_set(2.0f * c[0]), y));
    }
    v_store(state, re);
    v_store(state + 16, im);
}

// The selective scan with discretisation, skip and gate (equations 2 and 4; algorithm 2, line 6), 16 channels a vector:
//   dt = softplus(dt + dt_b)    h[n] = exp(dt * A[n]) * h[n] + dt * B[n] * u    y = (sum of C[n] * h[n] + D * u) * silu(z)
// A few states at once go through a few tokens, in registers.
static void ISA_NAME(scan)(const struct scan_args *a) {
    const size_t parts = 1 + a->is_complex, n_state = (size_t)a->d_state;
    struct scan_block block;
    for (int c = 0; c < a->n; c += 16)
        for (int t0 = 0; t0 < a->n_tokens; t0 += SCAN_TOKENS) {
            const int n_tokens = min_int(SCAN_TOKENS, a->n_tokens - t0);
            const size_t at = (size_t)c * n_state * parts;
            const float *bc = a->bc + (size_t)t0 * (size_t)a->ld_bc, *a2 = a->a2 + at;
            float *state = a->state + at;
            if (t0 == 0) fetch_state(a->next_state, at, 16 * n_state * parts);
            scan_begin(a, c, t0, n_tokens, &block);
            for (size_t n = 0, k; n < n_state; n += k) {
                const size_t to = 16 * parts * n;
                const float *inverse = a->a_inverse ? a->a_inverse + at + to : NULL, *bc_n = bc + parts * n;
                k = !a->is_complex && !inverse && n_state - n >= SCAN_STATES ? SCAN_STATES : 1;
                if (a->is_complex) scan_complex(a, n_tokens, &block, state + to, a2 + to, inverse, bc_n);
                else if (inverse) scan_zoh(a, n_tokens, &block, state + to, a2 + to, inverse, bc_n);
                else if (k > 1) scan_states(a, n_tokens, &block, state + to, a2 + to, bc_n, SCAN_STATES);
                else scan_states(a, n_tokens, &block, state + to, a2 + to, bc_n, 1);
            }
            scan_end(a, c, t0, n_tokens, &block);
        }
}

// A state of 16 channels of a time-invariant SSM: h = decay * h + u, y += weight * h, of complex numbers their real part.
LANE void fixed_step(float *state, vf u, const float *decay, const float *weight, vf *y) {
    vf h = v_fma(v_load(decay), v_load(state), u);
    v_store(state, h);
    *y = v_fma(v_load(weight), h, *y);
}

LANE void fixed_step_complex(float *state, vf u, const float *decay, const float *weight, vf *y) {
    vf re = v_load(state), im = v_load(state + 16), a_re = v_load(decay), a_im = v_load(decay + 16);
    vf new_re = v_fma(a_re, re, v_sub(u, v_mul(a_im, im))), new_im = v_fma(a_re, im, v_mul(a_im, re));
    v_store(state, new_re);
    v_store(state + 16, new_im);
    *y = v_fma(v_load(weight), new_re, v_sub(*y, v_mul(v_load(weight + 16), new_im)));
}

LANE void fixed_channels(const struct fixed_scan_args *a, const bool is_complex) {
    const int step = is_complex ? 32 : 16;
    for (int c = 0; c < a->n; c += 16) {
        const size_t at = (size_t)(c / 16) * (size_t)(a->d_state * step);
        const float *decay = a->decay + at, *weight = a->weight + at;
        float *state = a->state + at;
        fetch_state(a->next_state, at, (size_t)(a->d_state * step));
        for (int t = 0; t < a->n_tokens; t++) {
            const size_t row = (size_t)t * (size_t)a->ld + (size_t)c;
            vf u = v_load(a->u + row), y = v_mul(v_load(a->d + c), u);
            for (int i = 0; i < a->d_state * step; i += step) {
                if (is_complex) fixed_step_complex(state + i, u, decay + i, weight + i, &y);
                else fixed_step(state + i, u, decay + i, weight + i, &y);
            }
            v_store(a->y + row, v_mul(y, v_silu(v_load(a->z + row))));
        }
    }
}

static void ISA_NAME(fixed_scan)(const struct fixed_scan_args *a) {
    if (a->is_complex) fixed_channels(a, true);
    else fixed_channels(a, false);
}

// Reads the last 16 elements twice when n is not a multiple of 16: a maximum does not mind.
static float ISA_NAME(finite_max)(const float *x, int n) {
    if (n < 16) {
        float max = x[0], poison = 0.0f;
        for (int i = 0; i < n; i++) max = x[i] > max ? x[i] : max, poison += x[i] * 0.0f;
        return max + poison;
    }
    vf max = v_load(x), poison = v_set(0.0f), zero = v_set(0.0f);
    for (int k = 0; k < n; k += 16) {
        vf v = v_load(x + (k + 16 <= n ? k : n - 16));
        max = v_max(max, v);
        poison = v_fma(v, zero, poison);
    }
    return v_max_lane(max) + v_sum(poison);
}

static void ISA_NAME(exp_minus)(const float *x, int n, float max, float *y) {
    for (int k = 0; k < n; k += 16)
        v_store_most(y + k, v_exp2(v_mul(v_sub(v_load_most(x + k, n - k), v_set(max)), v_set(0x1.715476p+0f))), n - k);
}

#define ISA_STRING2(x) #x
#define ISA_STRING(x) ISA_STRING2(x)
#define KERNELS(name, matmul) { \
    name, matmul, ISA_NAME(dequantize), ISA_NAME(unpack_row), ISA_NAME(quantize), \
    ISA_NAME(norm), ISA_NAME(conv_silu), ISA_NAME(scan), ISA_NAME(fixed_scan), ISA_NAME(finite_max), \
    ISA_NAME(exp_minus), \
}
static const struct kernels ISA_NAME(kernels) = KERNELS(ISA_STRING(MAMBA_ISA_PASS), ISA_NAME(matmul));
#ifdef ISA_AMX
static const struct kernels kernels_amx = KERNELS("amx", matmul_amx);
#endif
#undef KERNELS
#undef ISA_STRING
#undef ISA_STRING2
#undef OF_ISA
#undef OF_VNNI
#undef PANEL_ZERO
#undef UNSIGNED_ZERO
#undef DONE_HERE
#undef UNROLL

#endif  // --------------------------------------------------------------------------------- ISA PASS: end --------------
#if !defined(MAMBA_ISA_PASS) && !defined(MAMBA_HEADER_ONLY)

// A pass is compiled for an instruction set between these two. (tests/emulate_avx512.h replaces the intrinsics of most.)
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define TARGET_AVX2 "avx2,fma,f16c"
#ifdef MAMBA_EMULATE_AVX512
#define TARGET_AVX512 TARGET_AVX2
#define TARGET_AVX512_VNNI TARGET_AVX2
#define TARGET_AVX_VNNI TARGET_AVX2
#else
#define TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl," TARGET_AVX2
#ifdef MAMBA_AMX
#define TARGET_AVX512_VNNI "amx-tile,amx-int8,avx512vnni," TARGET_AVX512  // which a compiler does not use by itself
#else
#define TARGET_AVX512_VNNI "avx512vnni," TARGET_AVX512
#endif
#define TARGET_AVX_VNNI "avxvnni," TARGET_AVX2
#endif

#ifdef MAMBA_X86_KERNELS
#define ISA_AVX512
#define ISA_VNNI
#ifdef MAMBA_AMX
#define ISA_AMX
#endif
#define MAMBA_ISA_PASS avx512
TARGET(TARGET_AVX512_VNNI)
#include "mamba.c"
END_TARGET
#undef MAMBA_ISA_PASS
#undef ISA_AMX
#undef ISA_VNNI

#define MAMBA_ISA_PASS avx512bw
TARGET(TARGET_AVX512)
#include "mamba.c"
END_TARGET
#undef MAMBA_ISA_PASS
#undef ISA_AVX512

#define ISA_AVX2
#ifdef MAMBA_AVX_VNNI
#define ISA_VNNI
#define MAMBA_ISA_PASS avxvnni
TARGET(TARGET_AVX_VNNI)
#include "mamba.c"
END_TARGET
#undef MAMBA_ISA_PASS
#undef ISA_VNNI
#endif

#define MAMBA_ISA_PASS avx2
TARGET(TARGET_AVX2)
#include "mamba.c"
END_TARGET
#undef MAMBA_ISA_PASS
#undef ISA_AVX2
#endif  // x86-64

#ifdef MAMBA_NEON_KERNELS
#ifdef __clang__
#define TARGET_NEON "dotprod"
#else
#define TARGET_NEON "arch=armv8.2-a+dotprod"
#endif
#define MAMBA_ISA_PASS neon
#define ISA_NEON
TARGET(TARGET_NEON)
#include "mamba.c"
END_TARGET
#undef ISA_NEON
#undef MAMBA_ISA_PASS
#endif

#define MAMBA_ISA_PASS generic
#include "mamba.c"
#undef MAMBA_ISA_PASS

enum { MAX_ISAS = 6 };

#ifdef MAMBA_AMX
// Whether the processor has Intel's matrix instructions, for bytes, and Linux lets this process have their registers: it must be
// asked.
static bool amx_usable(void) {
#ifdef MAMBA_EMULATE_AVX512
    return true;
#else
    enum { XTILE_DATA = 18, REQUEST_PERMISSION = 0x1023 };  // ARCH_REQ_XCOMP_PERM, Linux 5.16
    unsigned unused, features;
    if (!__get_cpuid_count(7, 0, &unused, &unused, &unused, &features)) return false;
    return features & 1 << 24 && features & 1 << 25 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, XTILE_DATA) == 0;
#endif
}
#endif

// The kernels that this processor runs, the widest first; returns how many.
static int usable_kernels(const struct kernels *usable[MAX_ISAS]) {
    int n = 0;
#ifdef MAMBA_X86_KERNELS
    unsigned features = 0, unused;
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all of these have F16C too
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    bool avx_vnni = avx2 && __get_cpuid_count(7, 1, &features, &unused, &unused, &unused) && features & 1 << 4;
#ifdef MAMBA_EMULATE_AVX512
    avx512_vnni = avx512 = avx_vnni = true;
#endif
#ifdef MAMBA_AMX
    if (avx512_vnni && amx_usable()) usable[n++] = &kernels_amx;
#endif
    if (avx512_vnni) usable[n++] = &kernels_avx512;
    if (avx512) usable[n++] = &kernels_avx512bw;
#ifdef MAMBA_AVX_VNNI
    if (avx_vnni) usable[n++] = &kernels_avxvnni;
#else
    (void)avx_vnni;
#endif
    if (avx2) usable[n++] = &kernels_avx2;
#endif
#ifdef MAMBA_NEON_KERNELS
    bool dot_product = true;
#ifdef __linux__
    dot_product = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    if (dot_product) usable[n++] = &kernels_neon;
#endif
    usable[n++] = &kernels_generic;
    return n;
}

// The widest kernels, or those that MAMBA_ISA names.
static const struct kernels *choose_kernels(void) {
    const struct kernels *usable[MAX_ISAS];
    int n = usable_kernels(usable);
    const char *wanted = getenv("MAMBA_ISA");
    if (!wanted || !*wanted) return usable[0];
    struct buffer names = {0};
    for (int i = 0; i < n; i++) {
        if (strcmp(usable[i]->name, wanted) == 0) return free(names.p), usable[i];
        buffer_printf(&names, i ? ", %s" : "%s", usable[i]->name);
    }
    die("MAMBA_ISA=%s: this processor offers %s", wanted, names.p);
}

// ====================================================================================================================
// 5. Layers.
// The phases of a Mamba block (figure 3 of the paper), each run by all threads of a team: a thread takes the next item
// of its share when it is free, then of others' shares. Who computes an item never changes its bits. Calls section 4; called by
// section 6.
// ====================================================================================================================

struct team {               // one thread's view of a forward in progress
    struct context *ctx;
    int thread;             // its number in the team
    int phase;              // which one this thread is in
    int n_shares;           // of that phase, which it found taken
    bool has_item;          // it is working on an item of that phase
    int n_before;           // items of the phase before
    bool ended_it;          // the last one of a phase was this thread's
};

// Keeps the longest of a forward's waits, by any thread.
static void note_wait(struct context *ctx, double seconds) {
    const long long now = (long long)(1e9 * seconds);
    long long longest = atomic_load_explicit(&ctx->longest_wait, memory_order_relaxed);
    while (now > longest && !atomic_compare_exchange_weak(&ctx->longest_wait, &longest, now)) continue;
}

// Waits until a phase's items are done: spins for some dozens of microseconds, and then offers its core to whoever wants it, since
// the thread that is waited for may be the one that does not run.
static void await_phase(struct context *ctx, struct phase *p, int n_items) {
    double start = 0;
    for (int spins = 0; atomic_load_explicit(&p->n_done, memory_order_acquire) < n_items; spins++) {
        if (spins >= 4000) {
            if (!start) start = now_seconds();
            sched_yield();  // which may take as long as another process's time slice
        }
#if defined(__x86_64__)
        else _mm_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
    if (start) note_wait(ctx, now_seconds() - start);
}

// Items that follow each other are a thread's share: it reads weights in long runs, what it fetched ahead is its own next item,
// and the channels that it has in its caches are those it works on in the next phase. Then it helps the threads after it.
static bool take_item(struct team *t, int n_items, int *item) {
    const struct context *ctx = t->ctx;
    for (; t->n_shares < ctx->n_team; t->n_shares++) {
        const int owner = (t->thread + t->n_shares) % ctx->n_team;
        const int first = (int)((long long)n_items * owner / ctx->n_team);
        const int n = (int)((long long)n_items * (owner + 1) / ctx->n_team) - first;
        atomic_int *n_taken = &ctx->n_taken[owner * ctx->ld_phases + t->phase];
        if (atomic_load_explicit(n_taken, memory_order_relaxed) >= n) continue;  // without taking its owner's line away
        *item = first + atomic_fetch_add_explicit(n_taken, 1, memory_order_relaxed);
        if (*item < first + n) return true;
    }
    return false;
}

// The next item of the phase for this thread, as in: while (next_item(t, n_items, &item)) { ... }. A phase begins when the one
// before it is done, which other threads may still work on. A thread that lost its core between two items is not waited for: the
// others take its share, and it finds the phases ended when it comes back. A phase of one item is left to the thread that ended
// the one before it, which need not wait to be told; the others go on to the next phase and wait for both.
static bool next_item(struct team *t, int n_items, int *item) {
    struct phase *phases = t->ctx->phases;
    if (!n_items) return false;
    if (t->has_item) {
        t->ended_it = atomic_fetch_add_explicit(&phases[t->phase].n_done, 1, memory_order_acq_rel) == n_items - 1;
        t->has_item = n_items > 1 && take_item(t, n_items, item);
    } else if (n_items == 1 && t->phase > 0) {
        *item = 0;
        t->has_item = t->ended_it;
    } else {
        if (t->phase > 0 && !t->ended_it) await_phase(t->ctx, &phases[t->phase - 1], t->n_before);
        t->ended_it = false;
        t->has_item = take_item(t, n_items, item);
    }
    if (t->has_item) return true;
    t->phase++;
    t->n_shares = 0;
    t->n_before = n_items;
    return false;
}

static void quantize_rows(const struct kernels *k, struct act *a, int row0, int n_rows, int col0, int n_cols) {
    if (!a->q) return;
    for (int r = row0; r < row0 + n_rows; r++)
        for (int c = col0, n; c < col0 + n_cols; c += n) {
            n = min_int(256 - c % 256, col0 + n_cols - c);
            const float *x = a->f + (size_t)r * (size_t)a->ld + (size_t)c, *later = x + FETCH_TOKENS * (size_t)a->ld;
            for (int i = 0; i < n; i += 16) __builtin_prefetch(later + i);
            k->quantize(x, n, act_chunk_of(a, r, c), c % 256);
        }
}

// Rows of weights a block: few blocks, since memory is read best in long runs, and each block reads the activations of all
// tokens; but several a thread, so that nobody waits long for the last one, where each is worth an item. More than one token may
// have rows in groups of 32.
static int rows_of_block(const struct context *ctx, int rows, size_t row_bytes, int n_tokens) {
    const int group = n_tokens == 1 ? 16 : 32, n = ctx->n_threads, most = 4 * n;
    const int64_t worth = (int64_t)rows * (int64_t)row_bytes * n_tokens / ITEM_BYTES;
    const int n_items = worth < most ? (int)worth : most, n_blocks = n_items > n ? n_items / n * n : n_items;
    if (n_blocks <= 1) return round_up(rows, group);
    const int block = round_up(ceil_div(rows, n_blocks), group);
    return n_blocks < most ? block : min_int(block, 128);
}

// w times the rows of x, cut into blocks of rows and tokens; the whole product is one phase. It is added to what y holds, or to
// the bias, or to nothing.
static void matmul_phase(struct team *t, const struct matrix *w, const float *bias, const struct act *x, int n_tokens, float *y,
                         int ldy, bool add) {
    // Items are smaller where there would be too few for all threads to be done at about the same time.
    const int whole_rows = w->rows / ROW_BLOCK, wanted = 4 * t->ctx->n_threads;
    const bool unpack_less = is_quantized(w) && whole_rows * (n_tokens / Q_TOKEN_BLOCK) >= wanted;
    const int token_block = unpack_less ? Q_TOKEN_BLOCK : TOKEN_BLOCK, n_token_blocks = ceil_div(n_tokens, token_block);
    const bool enough = whole_rows * n_token_blocks >= wanted;
    const int row_block = n_tokens <= ROW_TOKENS ? rows_of_block(t->ctx, w->rows, w->row_bytes, n_tokens)
                        : enough ? ROW_BLOCK : ROW_BLOCK / 3;
    const int n_row_blocks = ceil_div(w->rows, row_block);
    int item;
    while (next_item(t, n_row_blocks * n_token_blocks, &item)) {
        const int r = item % n_row_blocks * row_block, token = item / n_row_blocks * token_block;
        const int n_rows = min_int(row_block, w->rows - r), n = min_int(token_block, n_tokens - token);
        float *to = y + (size_t)token * (size_t)ldy + r;
        for (int i = 0; bias && i < n; i++) memcpy(to + (size_t)i * (size_t)ldy, bias + r, (size_t)n_rows * sizeof *to);
        t->ctx->k->matmul(w, r, n_rows, x, token, n, to, ldy, add || bias);
    }
}

static void embed_phase(struct team *t) {
    struct context *ctx = t->ctx;
    int item;
    while (next_item(t, ctx->n_tokens, &item)) {
        int token = item;
        const struct segment *s = ctx->segments;
        for (; token >= s->n_tokens; s++) token -= s->n_tokens;
        const struct matrix *m = &ctx->m->embd;
        ctx->k->dequantize(m->format, m->data + (size_t)s->tokens[token] * m->row_bytes, m->cols,
                           ctx->level[0].x + (size_t)item * (size_t)ctx->level[0].ld_model);
    }
}

// normed = norm(x), of each token of a level. On its way a U-Net's x is kept for a skip, or is given one that was kept; the
// block's own output is added later, which is only another order of the same sum.
struct skips {
    float *keep;               // [tokens][ld_model], or NULL
    const float *add;          // likewise; what was kept last when it is the same buffer
};

static void norm_phase(struct team *t, struct level *v, const float *weight, const float *bias, struct skips skips) {
    const struct context *ctx = t->ctx;
    const int n = v->size.d_model;
    int token;
    while (next_item(t, v->n_tokens, &token)) {
        const size_t row = (size_t)token * (size_t)v->ld_model;
        float *x = v->x + row, *y = v->normed.f + (size_t)token * (size_t)v->normed.ld;
        ctx->k->norm(x, weight, bias, y, n, ctx->m->c.norm_eps);
        quantize_rows(ctx->k, &v->normed, token, 1, 0, n);
        if (skips.keep) memcpy(skips.keep + row, x, (size_t)n * sizeof *x);
        for (int i = 0; skips.add && i < n; i++) x[i] += skips.add[row + (size_t)i];
    }
}

// The sequence after a segment's; the last one's own.
static const struct sequence *next_sequence(const struct context *ctx, int segment) {
    return ctx->segments[min_int(segment + 1, ctx->n_segments - 1)].seq;
}

// Channels a block, a multiple of 32; the arrays behind the last one are padded.
static int channel_block(const struct context *ctx, const struct level *v, const struct layer *l, int *n_blocks) {
    const size_t bytes = 2 * l->in.row_bytes + STATE_BYTES * (size_t)ctx->m->c.d_state;
    const int block = round_up(rows_of_block(ctx, v->size.d_inner, bytes, v->n_tokens), 32);
    *n_blocks = ceil_div(v->size.d_inner, block);
    return block;
}

// in_proj, convolution, SiLU and, of a block whose SSM does not depend on the input, that too: channels do not meet, so a block of
// them goes through all of it at once.
static void in_conv_phase(struct team *t, struct level *v, const struct layer *l) {
    struct context *ctx = t->ctx;
    const struct config *cfg = &ctx->m->c;
    int n_blocks, block = channel_block(ctx, v, l, &n_blocks), item, ld = v->u.ld;
    const size_t n_state = (size_t)cfg->d_state * (size_t)(1 + l->is_complex);
    while (next_item(t, n_blocks, &item)) {
        int c = item * block, n = min_int(block, v->size.d_inner - c), n_padded = round_up(n, 16), token = 0;
        const size_t ssm_at = l->ssm_at + (size_t)c * n_state;
        ctx->k->matmul(&l->in, c, n, &v->normed, 0, v->n_tokens, v->u.f + c, ld, false);
        ctx->k->matmul(&l->in, v->size.d_inner + c, n, &v->normed, 0, v->n_tokens, v->z + c, ld, false);
        for (int s = 0; s < ctx->n_segments; s++) {
            const size_t row = (size_t)token;
            const struct sequence *seq = ctx->segments[s].seq, *next = next_sequence(ctx, s);
            float *rows = v->u.f + row * (size_t)ld + c;
            ctx->k->conv_silu(&(struct conv_args){
                .w = l->conv_w + c, .b = l->conv_b + c, .state = seq->conv + l->conv_at + c,
                .next_state = next->conv + l->conv_at + c, .in = rows, .out = rows, .d_conv = cfg->d_conv,
                .n_tokens = v->n_new[s], .n = n_padded, .ld_w = round_up(v->size.d_inner, 16), .ld = ld});
            if (l->s4)
                ctx->k->fixed_scan(&(struct fixed_scan_args){
                    .decay = l->decay + (size_t)c * n_state, .weight = l->weight + (size_t)c * n_state, .d = l->d + c,
                    .state = seq->ssm + ssm_at, .next_state = next->ssm + ssm_at, .u = rows,
                    .z = v->z + row * (size_t)ld + c, .y = v->y.f + row * (size_t)ld + c, .d_state = cfg->d_state,
                    .n_tokens = v->n_new[s], .n = n_padded, .ld = ld, .is_complex = l->is_complex});
            token += v->n_new[s];
        }
        quantize_rows(ctx->k, l->s4 ? &v->y : &v->u, 0, v->n_tokens, c, n);
    }
}

// The low-rank dt becomes dt_proj's input; FalconMamba normalises dt, B and C first.
static void dt_low_phase(struct team *t, struct level *v) {
    struct context *ctx = t->ctx;
    const struct config *c = &ctx->m->c;
    const int rank = v->size.dt_rank;
    int token;
    while (next_item(t, v->n_tokens, &token)) {
        float *dbc = v->dbc + (size_t)token * (size_t)v->ld_dbc;
        float *dt = v->dt_low.f + (size_t)token * (size_t)v->dt_low.ld;
        if (c->dt_b_c_rms) {
            ctx->k->norm(dbc, NULL, NULL, dt, rank, c->dt_b_c_eps);
            for (int i = 0; i < 2; i++) {
                float *b_or_c = dbc + rank + (size_t)i * (size_t)c->d_state;
                ctx->k->norm(b_or_c, NULL, NULL, b_or_c, c->d_state, c->dt_b_c_eps);
            }
        } else {
            memcpy(dt, dbc, (size_t)rank * sizeof *dt);
        }
        quantize_rows(ctx->k, &v->dt_low, token, 1, 0, rank);
    }
}

// dt_proj, selective scan, skip and gate, again a block of channels at once.
static void dt_scan_phase(struct team *t, struct level *v, const struct layer *l) {
    struct context *ctx = t->ctx;
    const struct config *cfg = &ctx->m->c;
    int n_blocks, block = channel_block(ctx, v, l, &n_blocks), item, ld = v->y.ld;
    const size_t n_state = (size_t)cfg->d_state * (size_t)(1 + l->is_complex);
    while (next_item(t, n_blocks, &item)) {
        int c = item * block, n = min_int(block, v->size.d_inner - c), token = 0;
        const size_t ssm_at = l->ssm_at + (size_t)c * n_state;
        ctx->k->matmul(&l->dt, c, n, &v->dt_low, 0, v->n_tokens, v->y.f + c, ld, false);
        for (int s = 0; s < ctx->n_segments; s++) {
            const size_t row = (size_t)token;
            ctx->k->scan(&(struct scan_args){
                .a2 = l->a2 + (size_t)c * n_state, .a_inverse = l->a_inverse ? l->a_inverse + (size_t)c * n_state : NULL,
                .d = l->d + c, .dt_b = l->dt_b + c, .state = ctx->segments[s].seq->ssm + ssm_at,
                .next_state = next_sequence(ctx, s)->ssm + ssm_at, .u = v->u.f + row * (size_t)ld + c,
                .z = v->z + row * (size_t)ld + c,
                .bc = v->dbc + row * (size_t)v->ld_dbc + v->size.dt_rank, .dt_y = v->y.f + row * (size_t)ld + c,
                .d_state = cfg->d_state, .n_tokens = v->n_new[s], .n = round_up(n, 16), .ld = ld, .ld_bc = v->ld_dbc,
                .is_complex = l->is_complex});
            token += v->n_new[s];
        }
        quantize_rows(ctx->k, &v->y, 0, v->n_tokens, c, n);
    }
}

// x += out_proj(ssm(conv(in_proj(norm(x)))))
static void mamba_block(struct team *t, int layer, struct skips skips) {
    const struct layer *l = &t->ctx->m->layers[layer];
    struct level *v = &t->ctx->level[l->level];
    norm_phase(t, v, l->norm, l->norm_b, skips);
    in_conv_phase(t, v, l);
    if (!l->s4) {
        matmul_phase(t, &l->x, NULL, &v->u, v->n_tokens, v->dbc, v->ld_dbc, false);
        dt_low_phase(t, v);
        dt_scan_phase(t, v, l);
    }
    matmul_phase(t, &l->out, NULL, &v->y, v->n_tokens, v->x, v->ld_model, true);
}

// ---- Poolings of a U-Net ----

// Where a segment's steps lie at pooling i: its first row in level i, its first in the next one, and the place among P of the step
// that comes first, by what its sequence had behind it before this batch.
struct pool_place {
    int row, row_up, place;
};

static struct pool_place pool_place(const struct context *ctx, int i, int segment) {
    const struct level *v = &ctx->level[i];
    const struct segment *s = &ctx->segments[segment];
    struct pool_place p = {.place = (int)((s->seq->n_past - s->n_tokens) / v->size.period % ctx->m->c.pool[i])};
    for (int j = 0; j < segment; j++) p.row += v->n_new[j], p.row_up += v[1].n_new[j];
    return p;
}

static float *skip_rows(const struct level *v, const struct context *ctx, int i) {
    return v->skip + (size_t)i * (size_t)ctx->max_tokens * (size_t)v->ld_model;
}

// P steps side by side are the input of one of the next level. Those that are too few wait in the sequence. And x is kept for
// the last skip.
static void gather_down_phase(struct team *t, int i) {
    struct context *ctx = t->ctx;
    struct level *v = &ctx->level[i];
    const int p = ctx->m->c.pool[i], n = v->size.d_model;
    int item;
    while (next_item(t, ctx->n_segments, &item)) {
        struct pool_place at = pool_place(ctx, i, item);
        const size_t first = (size_t)at.row * (size_t)v->ld_model;
        float *waiting = ctx->segments[item].seq->pool + ctx->m->pools[i].at;
        const float *x = v->x + first;
        memcpy(skip_rows(v, ctx, ctx->m->c.n_blocks) + first, x, (size_t)v->n_new[item] * (size_t)v->ld_model * sizeof *x);
        for (int step = 0; step < v->n_new[item]; step++, x += v->ld_model) {
            memcpy(waiting + (size_t)at.place * (size_t)n, x, (size_t)n * sizeof *x);
            if (++at.place < p) continue;
            at.place = 0;
            memcpy(v->down_in.f + (size_t)at.row_up * (size_t)v->down_in.ld, waiting, (size_t)p * (size_t)n * sizeof *x);
            quantize_rows(ctx->k, &v->down_in, at.row_up++, 1, 0, p * n);
        }
    }
}

// The next level's x becomes the input of the pooling that brings it up.
static void copy_phase(struct team *t, struct level *next) {
    int token;
    while (next_item(t, next->n_tokens, &token)) {
        memcpy(next->normed.f + (size_t)token * (size_t)next->normed.ld, next->x + (size_t)token * (size_t)next->ld_model,
               (size_t)next->size.d_model * sizeof(float));
        quantize_rows(t->ctx->k, &next->normed, token, 1, 0, next->size.d_model);
    }
}

// x = what came up + the last skip. What comes of a step of the next level is used from the step behind it on, or tokens would see
// themselves: a sequence holds the last one, and begins with zeros.
static void scatter_up_phase(struct team *t, int i) {
    struct context *ctx = t->ctx;
    struct level *v = &ctx->level[i];
    const int p = ctx->m->c.pool[i], n = v->size.d_model;
    int item;
    while (next_item(t, ctx->n_segments, &item)) {
        struct pool_place at = pool_place(ctx, i, item);
        const size_t first = (size_t)at.row * (size_t)v->ld_model;
        float *last = ctx->segments[item].seq->pool + ctx->m->pools[i].at + (size_t)p * (size_t)n, *x = v->x + first;
        const float *skip = skip_rows(v, ctx, ctx->m->c.n_blocks) + first, *from = last;
        for (int step = 0; step < v->n_new[item]; step++, x += v->ld_model, skip += v->ld_model) {
            for (int k = 0; k < n; k++) x[k] = from[at.place * n + k] + skip[k];
            if (++at.place < p) continue;
            at.place = 0;
            from = v->up + (size_t)at.row_up++ * (size_t)v->ld_up;
        }
        if (from != last) memcpy(last, from, (size_t)p * (size_t)n * sizeof *x);
    }
}

// Runs the stages from level i inwards (section 4.4): down, the levels below, and up again. `layer` is the first on the way down.
static void unet(struct team *t, int i, int layer) {
    struct context *ctx = t->ctx;
    const struct config *c = &ctx->m->c;
    struct level *v = &ctx->level[i];
    const int n = c->n_blocks;
    if (i == c->n_pools) {  // the centre has one skip around it
        float *skip = skip_rows(v, ctx, 0);
        for (int b = 0; b < n; b++) mamba_block(t, layer + b, (struct skips){b == 0 ? skip : NULL, b == n - 1 ? skip : NULL});
        return;
    }
    const struct pooling *pool = &ctx->m->pools[i];
    struct level *next = v + 1;
    for (int b = 0; b < n; b++) mamba_block(t, layer + b, (struct skips){skip_rows(v, ctx, b), NULL});
    gather_down_phase(t, i);
    if (next->n_tokens) {
        matmul_phase(t, &pool->down, pool->down_b, &v->down_in, next->n_tokens, next->x, next->ld_model, false);
        unet(t, i + 1, layer + n);
        copy_phase(t, next);
        matmul_phase(t, &pool->up, pool->up_b, &next->normed, next->n_tokens, v->up, v->ld_up, false);
    }
    scatter_up_phase(t, i);
    const int behind = layer + n * (2 * (c->n_pools - i));  // the first on the way up
    for (int b = 0; b < n; b++) mamba_block(t, behind + b, (struct skips){NULL, skip_rows(v, ctx, n - 1 - b)});
}

// ====================================================================================================================
// 6. Forward over a ragged batch.
// Prefill, decode, batched decode and scoring are the same call with different shapes. Calls section 5; called by the
// commands. All memory is allocated by context_new: a forward allocates nothing.
// ====================================================================================================================

enum { PHASES_A_LAYER = 6, PHASES_A_POOL = 5, PHASES_BESIDE = 4 };  // embedding, final norm, gathering rows, head

// Floats from row to row: an odd multiple of 32, or one column of many rows, as a block of channels goes through it, would fall on
// a few sets of the caches: widths are multiples of large powers of two.
static int leading_dimension(int n_cols) { return round_up(n_cols, 32) | 32; }

static struct act act_new(int n_rows, int n_cols, bool quantized) {
    struct act a = {.ld = leading_dimension(n_cols), .n_rows = n_rows};
    a.f = xcalloc((size_t)n_rows * (size_t)a.ld, sizeof *a.f);
    if (quantized) a.q = xcalloc((size_t)n_rows * (size_t)ceil_div(n_cols, 256), sizeof *a.q);
    return a;
}

static void act_free(struct act *a) {
    free(a->f);
    free(a->q);
}

#ifndef MAMBA_CUDA  // a program without GPUs: context_use_device refuses, and what stands behind it is not reached
bool device_usable(struct error *e) { return fail(e, "this program was built without CUDA; build it with: make cuda"); }
bool device_runs(const struct model *m, struct error *e) { return m && device_usable(e); }
struct device *device_open(const struct model *m, struct device_shape shape, unpack_row *unpack, struct error *e) {
    (void)m, (void)shape, (void)unpack, device_usable(e);
    return NULL;
}
void device_close(struct device *d) { (void)d; }
struct device_facts device_facts(const struct device *d) { return (void)d, (struct device_facts){.bytes = 0}; }
bool device_forward(struct device *d, const struct segment *segments, int n_segments, int n_layers, const float *x, int ld_x,
                    float *logits, int ld_logits, struct error *e) {
    (void)d, (void)segments, (void)n_segments, (void)n_layers, (void)x, (void)ld_x, (void)logits, (void)ld_logits;
    return device_usable(e);
}
bool device_choose(struct device *d, int n_rows, struct device_choice *choices, struct error *e) {
    return (void)d, (void)n_rows, (void)choices, device_usable(e);
}
bool device_ban(struct device *d, const int32_t *tokens, size_t n, struct error *e) {
    return (void)d, (void)tokens, (void)n, device_usable(e);
}
bool device_logits(struct device *d, const int *tokens, int n, float *logits, int ld_logits, struct error *e) {
    return (void)d, (void)tokens, (void)n, (void)logits, (void)ld_logits, device_usable(e);
}
bool device_hidden(struct device *d, bool normed, float *rows, int ld, struct error *e) {
    return (void)d, (void)normed, (void)rows, (void)ld, device_usable(e);
}
int device_take_slot(struct device *d) { return (void)d, -1; }
void device_leave_slot(struct device *d, int slot) { (void)d, (void)slot; }
bool device_reset_state(struct device *d, int slot, struct error *e) { return (void)d, (void)slot, device_usable(e); }
bool device_copy_state(struct device *d, int to, int from, struct error *e) {
    return (void)d, (void)to, (void)from, device_usable(e);
}
bool device_read_state(struct device *d, int slot, float *conv, float *ssm, struct error *e) {
    return (void)d, (void)slot, (void)conv, (void)ssm, device_usable(e);
}
bool device_write_state(struct device *d, int slot, const float *conv, const float *ssm, struct error *e) {
    return (void)d, (void)slot, (void)conv, (void)ssm, device_usable(e);
}
#endif

// A device that fails ends the program: what was written so far is kept.
static void device_must(bool ok, const struct error *e) {
    if (!ok) die("%s", e->text);
}

// Buffers for up to max_tokens steps of level i.
static void level_init(struct level *v, const struct model *m, int i, int max_tokens) {
    const struct config *c = &m->c;
    const size_t n = (size_t)max_tokens;
    bool q_in = i == 0 && is_quantized(&m->head), q_x = false, q_dt = false, q_out = false, any_complex = false;
    for (int j = 0; j < c->n_layer; j++) {
        const struct layer *l = &m->layers[j];
        if (l->level != i) continue;
        q_in |= is_quantized(&l->in);
        q_x |= is_quantized(&l->x);
        q_dt |= is_quantized(&l->dt);
        q_out |= is_quantized(&l->out);
        any_complex |= l->is_complex;
    }
    if (i > 0) q_in |= is_quantized(&m->pools[i - 1].up);
    v->size = c->level[i];
    v->ld_model = leading_dimension(v->size.d_model);
    v->ld_dbc = leading_dimension(v->size.dt_rank + 2 * c->d_state * (1 + any_complex));
    v->x = xcalloc(n * (size_t)v->ld_model, sizeof(float));
    v->normed = act_new(max_tokens, v->size.d_model, q_in);
    v->u = act_new(max_tokens, v->size.d_inner, q_x);
    v->z = xcalloc(n * (size_t)v->u.ld, sizeof(float));
    v->dbc = xcalloc(n * (size_t)v->ld_dbc, sizeof(float));
    v->dt_low = act_new(max_tokens, v->size.dt_rank, q_dt);
    v->y = act_new(max_tokens, v->size.d_inner, q_out);
    v->n_new = xcalloc(n, sizeof *v->n_new);
    if (c->n_pools) v->skip = xcalloc((size_t)(c->n_blocks + 1) * n * (size_t)v->ld_model, sizeof(float));
    if (i == c->n_pools) return;
    v->ld_up = leading_dimension(c->pool[i] * v->size.d_model);
    v->down_in = act_new(max_tokens, c->pool[i] * v->size.d_model, is_quantized(&m->pools[i].down));
    v->up = xcalloc(n * (size_t)v->ld_up, sizeof(float));
}

static void level_free(struct level *v) {
    act_free(&v->normed);
    act_free(&v->u);
    act_free(&v->dt_low);
    act_free(&v->y);
    act_free(&v->down_in);
    free(v->x);
    free(v->z);
    free(v->dbc);
    free(v->skip);
    free(v->up);
    free(v->n_new);
}

// max_tokens: the most tokens of one forward; max_rows: the most logit rows of one call.
static struct context *context_new(const struct model *m, const struct kernels *k, int n_threads, int max_tokens,
                                   int max_rows) {
    const struct config *c = &m->c;
    struct context *ctx = xcalloc(1, sizeof *ctx);
    ctx->m = m;
    ctx->k = k;
    ctx->n_threads = n_threads;
    ctx->max_tokens = max_tokens;
    ctx->max_rows = max_rows;
    ctx->ld_vocab = round_up(c->n_vocab, 16);
    for (int i = 0; i <= c->n_pools; i++) level_init(&ctx->level[i], m, i, max_tokens);
    ctx->head_in = act_new(max_rows, c->d_model, is_quantized(&m->head));
    ctx->logits = xcalloc((size_t)max_rows * (size_t)ctx->ld_vocab, sizeof(float));
    ctx->n_phases = c->n_layer * PHASES_A_LAYER + c->n_pools * PHASES_A_POOL + PHASES_BESIDE;
    ctx->phases = xcalloc((size_t)ctx->n_phases, sizeof *ctx->phases);
    ctx->ld_phases = round_up(ctx->n_phases, 64 / (int)sizeof *ctx->n_taken);
    ctx->n_taken = xcalloc((size_t)n_threads * (size_t)ctx->ld_phases, sizeof *ctx->n_taken);
    return ctx;
}

static void context_free(struct context *ctx) {
    if (!ctx) return;
    if (ctx->device) device_close(ctx->device);
    free(ctx->choices);
    for (int i = 0; i <= ctx->m->c.n_pools; i++) level_free(&ctx->level[i]);
    act_free(&ctx->head_in);
    free(ctx->logits);
    free(ctx->phases);
    free(ctx->n_taken);
    free(ctx);
}

static struct sequence *sequence_new(const struct config *c) {
    struct sequence *s = xcalloc(1, sizeof *s);
    s->conv = xcalloc(c->conv_floats, sizeof(float));
    s->ssm = xcalloc(c->ssm_floats, sizeof(float));
    s->pool = xcalloc(c->pool_floats, sizeof(float));
    return s;
}

// A sequence whose state is where the context's forwards run.
static struct sequence *context_sequence(const struct context *ctx) {
    if (!ctx->device) return sequence_new(&ctx->m->c);
    struct sequence *s = xcalloc(1, sizeof *s);
    struct error e = {""};
    s->device = ctx->device;
    s->slot = device_take_slot(ctx->device);
    if (s->slot < 0) die("the GPU has no room for another sequence");
    device_must(device_reset_state(s->device, s->slot, &e), &e);
    return s;
}

// A device's state comes to the sequence's buffers to be saved, or goes back when it was loaded.
static void sequence_fetch(struct sequence *s, const struct config *c) {
    struct error e = {""};
    if (!s->device) return;
    s->conv = xcalloc(c->conv_floats, sizeof(float));
    s->ssm = xcalloc(c->ssm_floats, sizeof(float));
    device_must(device_read_state(s->device, s->slot, s->conv, s->ssm, &e), &e);
}

static void sequence_return(struct sequence *s) {
    struct error e = {""};
    if (!s->device) return;
    device_must(device_write_state(s->device, s->slot, s->conv, s->ssm, &e), &e);
    free(s->conv);
    free(s->ssm);
    s->conv = s->ssm = NULL;
}

// Back to the empty sequence: without this a state would leak into the next text.
static void sequence_reset(struct sequence *s, const struct config *c) {
    struct error e = {""};
    s->n_past = 0;
    if (s->device) {
        device_must(device_reset_state(s->device, s->slot, &e), &e);
        return;
    }
    memset(s->conv, 0, c->conv_floats * sizeof(float));
    memset(s->ssm, 0, c->ssm_floats * sizeof(float));
    memset(s->pool, 0, c->pool_floats * sizeof(float));
}

static void sequence_copy(struct sequence *to, const struct sequence *from, const struct config *c) {
    struct error e = {""};
    to->n_past = from->n_past;
    if (to->device) {
        device_must(device_copy_state(to->device, to->slot, from->slot, &e), &e);
        return;
    }
    memcpy(to->conv, from->conv, c->conv_floats * sizeof(float));
    memcpy(to->ssm, from->ssm, c->ssm_floats * sizeof(float));
    memcpy(to->pool, from->pool, c->pool_floats * sizeof(float));
}

static void sequence_free(struct sequence *s) {
    if (!s) return;
    if (s->device) device_leave_slot(s->device, s->slot);
    free(s->conv);
    free(s->ssm);
    free(s->pool);
    free(s);
}

// Logits of the rows in head_in.
static void head_phase(struct team *t) {
    struct context *ctx = t->ctx;
    matmul_phase(t, &ctx->m->head, ctx->m->head_b, &ctx->head_in, ctx->n_rows, ctx->logits, ctx->ld_vocab, false);
}

static void gather_row(struct context *ctx, int token, int row) {
    const struct act *from = &ctx->level[0].normed, *to = &ctx->head_in;
    const size_t n = (size_t)to->ld;
    memcpy(to->f + (size_t)row * n, from->f + (size_t)token * n, n * sizeof *to->f);
    for (int c = 0; to->q && c < ctx->m->c.d_model; c += 256) *act_chunk_of(to, row, c) = *act_chunk_of(from, token, c);
}

// The rows that the batch asks for: the last token of each segment that wants logits.
static void gather_phase(struct team *t) {
    struct context *ctx = t->ctx;
    int item;
    while (next_item(t, 1, &item))
        for (int s = 0, token = 0, row = 0; s < ctx->n_segments; s++) {
            token += ctx->segments[s].n_tokens;
            if (ctx->segments[s].want_logits) gather_row(ctx, token - 1, row++);
        }
}

static void forward_team(struct team *t) {
    struct context *ctx = t->ctx;
    embed_phase(t);
    if (ctx->m->c.n_pools) unet(t, 0, 0);
    else
        for (int i = 0; i < ctx->n_run_layers; i++) mamba_block(t, i, (struct skips){NULL, NULL});
    if (ctx->n_run_layers < ctx->m->c.n_layer) return;
    norm_phase(t, &ctx->level[0], ctx->m->norm, ctx->m->norm_b, (struct skips){NULL, NULL});
    if (!ctx->n_rows) return;
    gather_phase(t);
    head_phase(t);
}

// Chooses the size of the next teams, after one of n threads worked for some time. A thread that loses its core in the middle of
// an item, or has none when the others are done, keeps them waiting for milliseconds. Where that is much of a forward and happens
// twice, which is no accident, the next ones do with a thread less, and later it is tried again.
static void review_team(struct context *ctx, int n, double seconds) {
    enum { MAX_PATIENCE = 16 };
    const double lost = 1e-3, lately = 0.1, retry = 0.5;  // seconds; a process's time slice is some milliseconds
    const double waited = 1e-9 * (double)atomic_exchange(&ctx->longest_wait, 0);
    ctx->worked += seconds;
    if (n > 1 && waited > fmax(lost, seconds / 8)) {
        const bool again = ctx->loss > 0 && ctx->worked - ctx->loss < lately + seconds;
        ctx->loss = ctx->worked;
        if (again || ctx->on_probation) {
            ctx->patience = ctx->on_probation ? min_int(2 * ctx->patience, MAX_PATIENCE) : 1;
            ctx->n_left_out++;
            ctx->on_probation = false;
            ctx->change = ctx->worked;
        }
    } else if (ctx->n_left_out && ctx->worked - ctx->change >= retry * ctx->patience) {
        ctx->n_left_out--;
        ctx->on_probation = true;
        ctx->change = ctx->worked;
    } else if (ctx->worked - ctx->change >= lately) {
        ctx->on_probation = false;
    }
}

// Runs body on a team of threads, in one parallel region.
static void run_team(struct context *ctx, void (*body)(struct team *)) {
    const int n_threads = ctx->n_threads - ctx->n_left_out;
    const double start = now_seconds();
    double began = start, ended = start;  // for the first thread, which waits for the others at both ends
    ctx->n_team = n_threads;
    for (int i = 0; i < ctx->n_phases; i++) atomic_init(&ctx->phases[i].n_done, 0);
    for (int i = 0; i < n_threads * ctx->ld_phases; i++) atomic_init(&ctx->n_taken[i], 0);
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
#endif
    {
        struct team t = {.ctx = ctx};
        flush_denormals();
#ifdef _OPENMP
        t.thread = omp_get_thread_num();
        if (t.thread == 0) began = now_seconds();
#endif
        body(&t);
#ifdef _OPENMP
        if (t.thread == 0) ended = now_seconds();
#endif
    }
    const double now = now_seconds();
    note_wait(ctx, fmax(began - start, now - ended));
    review_team(ctx, n_threads, now - start);
}

// forward() where a GPU runs it. The embedding's rows are made here, so that the table itself, which may be large, need not be
// there; it is the head as well in many models, and then it is.
static void forward_on_device(struct context *ctx) {
    struct error e = {""};
    run_team(ctx, embed_phase);
    struct level *v = &ctx->level[0];
    device_must(device_forward(ctx->device, ctx->segments, ctx->n_segments, ctx->n_run_layers, v->x, v->ld_model,
                               ctx->only_choices ? NULL : ctx->logits, ctx->ld_vocab, &e), &e);
    if (ctx->only_choices) device_must(device_choose(ctx->device, ctx->n_rows, ctx->choices, &e), &e);
    if (!ctx->wants_hidden) return;
    const bool normed = ctx->n_run_layers == ctx->m->c.n_layer;
    device_must(device_hidden(ctx->device, false, v->x, v->ld_model, &e), &e);
    device_must(!normed || device_hidden(ctx->device, true, v->normed.f, v->normed.ld, &e), &e);
}

// The steps of each level that a segment's tokens complete.
static void count_steps(struct context *ctx, int segment) {
    const struct segment *s = &ctx->segments[segment];
    for (int l = 0; l <= ctx->m->c.n_pools; l++) {
        struct level *v = &ctx->level[l];
        const int period = v->size.period;
        v->n_new[segment] = (int)((s->seq->n_past + s->n_tokens) / period - s->seq->n_past / period);
        v->n_tokens += v->n_new[segment];
    }
}

// Feeds every segment's tokens to its sequence. Afterwards row i of ctx->logits belongs to the i-th segment that wants
// logits, and level 0's normed (all layers) or x (the first n_layers; a U-Net runs all of them) holds a row a token. Tokens must
// lie in the vocabulary, and all segments together hold at most max_tokens of them; none is empty.
static void forward(struct context *ctx, const struct segment *segments, int n_segments, int n_layers) {
    ctx->segments = segments;
    ctx->n_segments = n_segments;
    ctx->n_run_layers = n_layers;
    ctx->n_tokens = ctx->n_rows = 0;
    for (int l = 0; l <= ctx->m->c.n_pools; l++) ctx->level[l].n_tokens = 0;
    for (int i = 0; i < n_segments; i++) {
        ctx->n_tokens += segments[i].n_tokens;
        ctx->n_rows += segments[i].want_logits;
        count_steps(ctx, i);
        segments[i].seq->n_past += segments[i].n_tokens;
    }
    if (ctx->n_tokens && ctx->device) forward_on_device(ctx);
    else if (ctx->n_tokens) run_team(ctx, forward_team);
}

// Logits of n of the last forward's tokens, at most max_rows of them, to rows 0 ... n-1 of ctx->logits.
static void logits_of(struct context *ctx, const int *tokens, int n) {
    struct error e = {""};
    if (ctx->device) {
        device_must(device_logits(ctx->device, tokens, n, ctx->logits, ctx->ld_vocab, &e), &e);
        return;
    }
    for (int i = 0; i < n; i++) gather_row(ctx, tokens[i], i);
    ctx->n_rows = n;
    run_team(ctx, head_phase);
}

// ====================================================================================================================
// 7. Sequence state: save and load.
// A state file continues a text where another run left it. It names its version, the model's fingerprint and shape; it
// is written beside its destination, synced and renamed, so that a reader finds the old file or the new one. Calls
// sections 1, 3 and 6; called by the commands. All numbers are little-endian; floats are in logical order, unpadded:
// conv [n_layer][d_conv-1][d_inner], ssm [n_layer][d_inner][d_state][R], pool as in struct pooling.
// ====================================================================================================================

enum { RECENT_MAX = 4096, STATE_VERSION = 2 };

struct clip_scale {         // of sound: a sample of -1 to 1 is -1 + 2 (x - low) / range of its clip
    double low, range;
};

static const struct clip_scale FULL_SCALE = {-1, 2};

struct resume {             // what a run needs besides the recurrent state to go on exactly
    int32_t pending[1];     // the last token, sampled but not fed to the model yet
    int n_pending;
    int32_t recent[RECENT_MAX];  // last tokens, the oldest first, for the repeat penalty
    int n_recent;
    char bytes[4];          // of a character that the tokens so far leave incomplete
    int n_bytes;
    struct clip_scale scale;  // of sound
};

struct state_header {       // 96 bytes at the start of the file; the hash of all that precedes it ends the file
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t fingerprint;
    uint32_t n_layer, d_inner, d_state, d_conv;
    uint64_t n_past;
    uint32_t n_pending, n_recent, n_bytes;
    int32_t pending;
    char bytes[8];
    struct clip_scale scale;
    uint64_t file_bytes;
};
_Static_assert(sizeof(struct state_header) == 96, "the file's layout, without padding");

static const char state_magic[8] = "MAMBAST";

static size_t state_floats(const struct model *m) {
    const struct config *c = &m->c;
    size_t n = c->pool_floats;
    for (int i = 0; i < c->n_layer; i++) {
        const struct layer *l = &m->layers[i];
        n += (size_t)c->level[l->level].d_inner * (size_t)(c->d_conv - 1 + c->d_state * (1 + l->is_complex));
    }
    return n;
}

static struct state_header state_header_of(const struct model *m, const struct sequence *s, const struct resume *r) {
    const struct config *c = &m->c;
    struct state_header h = {
        .version = STATE_VERSION, .header_bytes = sizeof h, .fingerprint = m->fingerprint,
        .n_layer = (uint32_t)c->n_layer, .d_inner = (uint32_t)c->d_inner, .d_state = (uint32_t)c->d_state,
        .d_conv = (uint32_t)c->d_conv, .n_past = (uint64_t)s->n_past, .n_pending = (uint32_t)r->n_pending,
        .n_recent = (uint32_t)r->n_recent, .n_bytes = (uint32_t)r->n_bytes,
        .pending = r->n_pending ? r->pending[0] : 0, .scale = r->scale};
    memcpy(h.magic, state_magic, sizeof h.magic);
    memcpy(h.bytes, r->bytes, (size_t)r->n_bytes);
    h.file_bytes = sizeof h + 4 * ((uint64_t)r->n_recent + state_floats(m)) + 8;
    return h;
}

// Moves floats between the padded buffers and the file's order: to_file, or back.
static void state_copy(const struct model *m, struct sequence *s, float *file, bool to_file) {
    const struct config *c = &m->c;
    for (int i = 0; i < c->n_layer; i++) {
        const struct layer *l = &m->layers[i];
        const size_t d_inner = (size_t)c->level[l->level].d_inner, ld = (size_t)round_up((int)d_inner, 16);
        for (int tap = 0; tap < c->d_conv - 1; tap++, file += d_inner) {
            float *conv = s->conv + l->conv_at + (size_t)tap * ld;
            memcpy(to_file ? file : conv, to_file ? conv : file, d_inner * sizeof *file);
        }
    }
    for (int i = 0; i < c->n_layer; i++) {
        const struct layer *l = &m->layers[i];
        const size_t parts = 1 + l->is_complex, n_state = (size_t)c->d_state;
        for (size_t ch = 0; ch < (size_t)c->level[l->level].d_inner; ch++)
            for (size_t n = 0; n < n_state * parts; n++, file++) {
                float *ssm = s->ssm + l->ssm_at + state_at(ch, n / parts, n_state, parts) + n % parts * 16;
                *(to_file ? file : ssm) = *(to_file ? ssm : file);
            }
    }
    if (c->pool_floats) memcpy(to_file ? file : s->pool, to_file ? s->pool : file, c->pool_floats * sizeof *file);
}

// Writes to an open file; an error stays in its stream, for outfile_commit.
static void state_write(struct outfile *out, const struct model *m, struct sequence *s, const struct resume *r) {
    struct state_header h = state_header_of(m, s, r);
    char *file = xmalloc((size_t)h.file_bytes), *p = file;
    memcpy(p, &h, sizeof h);
    p += sizeof h;
    memcpy(p, r->recent, (size_t)r->n_recent * sizeof *r->recent);
    p += (size_t)r->n_recent * sizeof *r->recent;
    state_copy(m, s, (float *)p, true);
    uint64_t hash = hash_bytes(STATE_VERSION, file, (size_t)h.file_bytes - 8);
    memcpy(file + h.file_bytes - 8, &hash, 8);
    fwrite(file, 1, (size_t)h.file_bytes, out->f);
    free(file);
}

// Checks everything before *s and *r are touched. file: 4-byte aligned.
static bool state_parse(uint8_t *file, size_t n, const struct model *m, struct sequence *s, struct resume *r,
                        struct error *e) {
    struct state_header h;
    const struct config *c = &m->c;
    if (n < sizeof h || memcmp(file, state_magic, 8) != 0) return fail(e, "not a state file (%zu bytes)", n);
    memcpy(&h, file, sizeof h);
    if (h.version != STATE_VERSION || h.header_bytes != sizeof h)
        return fail(e, "state file version %" PRIu32 "; this program reads version %d", h.version, STATE_VERSION);
    if (h.n_layer != (uint32_t)c->n_layer || h.d_inner != (uint32_t)c->d_inner || h.d_state != (uint32_t)c->d_state ||
        h.d_conv != (uint32_t)c->d_conv)
        return fail(e, "the state of a model with n_layer %" PRIu32 ", d_inner %" PRIu32 ", d_state %" PRIu32 ", d_conv %"
                    PRIu32 "; this model has %d, %d, %d, %d", h.n_layer, h.d_inner, h.d_state, h.d_conv, c->n_layer,
                    c->d_inner, c->d_state, c->d_conv);
    if (h.fingerprint != m->fingerprint) return fail(e, "the state of another model file with the same shape");
    if (h.n_past > INT64_MAX / 2 || h.n_pending > 1 || h.n_recent > RECENT_MAX || h.n_bytes > 3 ||
        !isfinite(h.scale.low) || !isfinite(h.scale.range))
        return fail(e, "the state file's header is damaged");
    size_t expected = sizeof h + 4 * (h.n_recent + state_floats(m)) + 8;
    if (n != expected || h.file_bytes != n)
        return fail(e, "the state file has %zu bytes; expected %zu: is it cut off?", n, expected);
    uint64_t hash;
    memcpy(&hash, file + n - 8, 8);
    if (hash != hash_bytes(STATE_VERSION, file, n - 8)) return fail(e, "the state file is damaged: its checksum differs");
    const int32_t *recent = (const int32_t *)(file + sizeof h);
    for (uint32_t i = 0; i < h.n_recent + h.n_pending; i++) {
        int32_t id = i < h.n_recent ? recent[i] : h.pending;
        if (id < 0 || id >= c->n_vocab)
            return fail(e, "the state file names token %" PRId32 "; the vocabulary has %d", id, c->n_vocab);
    }
    *r = (struct resume){.pending = {h.pending}, .n_pending = (int)h.n_pending, .n_recent = (int)h.n_recent,
                         .n_bytes = (int)h.n_bytes, .scale = h.scale};
    memcpy(r->recent, recent, h.n_recent * sizeof *recent);
    memcpy(r->bytes, h.bytes, sizeof r->bytes);
    s->n_past = (int64_t)h.n_past;
    state_copy(m, s, (float *)(file + sizeof h + 4 * (size_t)h.n_recent), false);
    return true;
}

static bool state_load(const char *path, const struct model *m, struct sequence *s, struct resume *r, struct error *e) {
    size_t limit = sizeof(struct state_header) + 4 * (RECENT_MAX + state_floats(m)) + 8;  // of a fitting file
    FILE *f = fopen(path, "rb");
    if (!f) return fail(e, "%s: %s", path, strerror(errno));
    uint8_t *file = xmalloc(limit + 1);
    size_t n = fread(file, 1, limit + 1, f);
    struct error inner = {""};
    bool ok = ferror(f) ? fail(&inner, "%s", strerror(errno)) : state_parse(file, n, m, s, r, &inner);
    fclose(f);
    free(file);
    return ok ? true : fail(e, "%s: %s", path, inner.text);
}

// ====================================================================================================================
// 8. Unicode and tokenizer.
// Text to token ids and back, as Hugging Face tokenizers do it: added tokens, NFC, pre-tokenisation, byte-level BPE with
// merges by rank. Calls sections 1 and 2; called by sections 11 and 13 to 15.
// ====================================================================================================================

// ---- Unicode: UTF-8, the classes that pre-tokenisation asks for, and NFC ----
//
// The tables say what Hugging Face tokenizers answers about every code point, because ids have to equal its ids. They
// are coded as text (the script explains the digits) and unpacked once, by unicode_init(), into arrays indexed by code
// point: most of those pages stay untouched zeros, which cost no memory.

enum { UC_LETTER = 1, UC_NUMBER = 2, UC_SPACE = 4, UC_PUNCT = 8, UC_DECOMPOSES = 16 };
#define UC_END 0x110000u         // one past the last code point
#define UC_REPLACEMENT 0xFFFDu   // stands for what is not UTF-8
#define UC_MAX_RANKS 64          // combining classes are numbered 1.. in rising order; 0 is a starter
enum { HANGUL_S = 0xAC00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11A7,
       HANGUL_LS = 19, HANGUL_VS = 21, HANGUL_TS = 28, HANGUL_SYLLABLES = HANGUL_LS * HANGUL_VS * HANGUL_TS };

// ---- begin of the tables printed by tests/make_unicode.py ----
// Ranges: gap, length - 1. UC_MARK_RUNS adds the rank of the combining class. The last three hold canonical
// decompositions by one step, 940, 103 and 1017 entries, the first of them what NFC composes again.
static const char UC_LETTER_RANGES[] =
    "_(<)<R#-#'#(9$A$eH'.1'*#$#`,'$$%&$#)#$%$#$6$_9$`5+`P$H%#)K_.='&PMF$$_I$#2$*$-%%#3#$@@_!.#;C,$'#(8'#,#&#:;*-(:$(4L]"
    "X&#5#*,22'*%$%8$)$#&&&#3#0$$%1$-#+('$%8$)$$$$$$B&$#6%3+$%$8$)$$$'&#5#2$:#.*%$%8$)$$$'&#A$$%2#4#$(&%$&&$$#$$&$&%&.9"
    "#W*$%$9$2&#=%%#%$A#'*$%$9$,$'&#B$$$2$4+$%$K%#3#(%+%;((4&:$+$#%)]R$$/)]$$#$'$:$#$,$$,#%'$#8&C#_&*$F>'_ZM7#3('&&#&$*"
    "%'//#4H$#(#%M$cC$&%)$#$&%K$&%C$&%)$#$&%1$[$&%_)H23_<%(&h6%3$<(_1)**405141/$%2VF#'#_*_!*'%D$#(_,-AT@%'.N'<Y9,W_9#_D"
    "Q4*Y@0$-N=FL%-F%-(M%%L&$($$&#(a._'bH%(%H%(%*$#$#$#$A%W$)$#&%$)&&%('/(%$)_[#0#3/_L#'#%,$#&')#$#$#$&$-%&(''#W$_jNaS)"
    "&&$/H$#(#%Z*#39,)$)$)$)$)$)$)$)_7#eT$M'($'_<)%$_@$&(M$_D4BS2fCakV_'io3_*P%b!&2-$7Q3A%_,T+%_M%_)%$$#$*82$%$&$9@V1T_"
    "%(&#$$.>-9<!*Q!#3'$,-'$K:%$*79&#&T$#&$%'%#$#;%%-*%/(%(%(,)$)$M$0)_Y@cx./9'SbjWd(%_PI)/'(#$,$/$'$#$$$$$_RDd%5_&%XK."
    "_['$`1G<)<._!&(%(%(%%F.$<$5$$$1%0E`%d@!&SRB06$*)H-@%F'*S`H5F'F'J+V/-$1$)$$$-$1$)$$&V/c-,8-*;($L$+_,(%#$N$$&#%9-9,A"
    "_(5$$-8-<_-Z)$_'#2&$%$!M!&!F*$>>X-8-504_U_/ZU0U0FI>,9b-L)$3%^!-#+8M4Q7>9/W $%#0OC;=F@#%#+E&#/R1&8#$#F4$;6$_&)$#$&$"
    "1$,*QI*%$%8$)$$$'&#5#/'A,$#%#$H$#<#$#OW5&7%AR7$$#a'QL&GR7#^M0#_.=H)a(N_[_&B*%#%*$$$:2#$#_E*%I3#$#!#-J*#8#.P6#5_/a6"
    "CB+$G4#T@_W)$$$H8#<($$$B1#c>52#$/$D`'#_6m8aUa2_i[_G2oV4(<``E(gMap$@{9g!*A4_54@5R3&B7(5e/OaB_&`+_1(#_)/_'$$#!ad2+rH"
    "L,brZ&$)$$$bU2#@%%#1&+dF_d!_Q(/&+*,aaU_;$_-$$%#%$%&$.$#$)$_'$&%*$)$>$&$'$#&)$cJ%;$;$A$;$A$;$A$;$A$;$*|OA)(b8_$`=O-"
    ")3#c8@5Nf'>aS@%#f2)$&$$$1$a3^_**#r'&$=$$$#%#$,$&$#$#)#'#$#$#$%$$$#%#$#$#$#$#$$$#%&$)$&$&$#$,$3(%$'$3`gKte^C`c0)aL%"
    "`~$1azC2h8_g)g$w)`p5(`cV";
static const char UC_NUMBER_RANGES[] =
    "S,`#$(#%%v$,`1,a5,dW,_],'(_S,_],_],%(_U/_Z,+)_N,_O)*5_T,_G,_],_-6b!,_-,i^6lL%a^,),9,c#,`+-`P,),a%,_=,`1,),o=#&(),a"
    "5U%'j)^_58hA@u(#j #<+1%cN&`5,A*$1C,J1mj3,a+,c7(`E,I,a5,9,_=,dQ,i`A,f0O/[4$cL=G&@#+#`1'a9,mM*<)J+_2'9(`K$%2%P_'+W$A"
    "%_2'_O*;*L)cA(S,),bIA`I,M&_W)`1@`+,_#,`;,*6b.,cM,_],d1,_M,)6_3.e#5_D,i%,_=!aR,_-,e%,_M7oR_Ufa0,_e%,_=,`1,$)fQ,b99j"
    "pD,vI6/6_S;p@T_e!,e%,f9,b*,i[+`+,k.]$%$&_3O$1n%/_l>,";
static const char UC_SPACE_RANGES[] =
    ",'5#_K#=#`{6#_fB-@$(#R#``K#";
static const char UC_PUNCT_RANGES[] =
    "D1-)=(=&E#(#&#-$&#&#iM#+#eQ(L$V#$#%#%#O$7$$$0#%$_1&_M#N0aX%Y1B#b8$-#d:#jV#_A#-$`S1$#H&_.#_1''$_V(`V#h/+`B#h7$O$_5%"
    "_.$`H%$%H-c0$aG$`+)$(`W)`F&^'_%$_'*.#kS:+6$/$.A$1$hD&@$p(0_6$B,dN8_&&C$jN&$$_W#`:Q$5e=%',%.3#/#_I#_A#ml]$b@%_J#-#_"
    "Z(d7&_=$K%$#T$R#_H/3$`'&`)$3$b,#hx]$a!,9E$0$#'#$$`@%$($&-$&$=%$#>#$#$)dU%i+#S#dY#j:#a6#B#bC+I#_W)_))_@&qY)_T$$&`)&"
    "S$_6'&#0#$%_!(_R#g##b-9_P%b+%_v4'ghD$`0#_('+#hy)#a}F'";
static const char UC_MARK_RUNS[] =
    "jS7U##V#&P##V##N#'P#$L#&P#$L#-P#'$#&P#%U%#U%#Y##U#%P#%U#$P$%U#&P##U##V#$P##U##W#$X##W#$X##W#/UbF'Ub<#P#&U##P#%U##Q"
    "##P#(U#(P#$U##P#$U##Q##T##U##(##)##*##+##,##-##.##/##0#$1##2##3##4$#5$#6##7$#U##P$#0_/*U##<##=##>S#9##:##;##<##=##"
    ">##!##@#$U#$P#'U##P#$U##P3#A_L)U%&U##P##U%$U$#P#$U##PF#BA#U##P#$U##P#$U#%P##U#$P##U##P#%U##P##U##P##U##P##U##P#$U`"
    "K)U##P##UE&U$+U$%U$'UN%P`#0U$#P#$U##P#$U##P#%U#%P##9##:##;#%U##P#$U#$P#'U_##%3#'&#U##P#$U_N#%3#'_U#%3#'_U#%3#'_U#%"
    "3#'`*#'`*#'*#C##D_L#%3#'`*#'`'#'_T$E##'0&F_S$G1&H_3$P>#P$#P$#NZ#I##J$#K(&J%#J$$U##'$$U_%#P_W#%$$'_9#Pi^%UmS#'B#'`H"
    "#'-#Ua:#T`:#Q##U##PaJ#U##P_.#'7*U%#PS'U#(P#$U##P_]#%2#'I#U##P#)UY$']#%.$'_*#%`C%U$#$#'P#$U#&P##U$)$'#P)#U&$Ua5$U##"
    "P#)U##P#$U##X##M##P##L#GU(#U##W##P##U##Pj#$U#$$#&U#%$#$U'#U&$$##U##P##U#$$#&P##U_q-%U`8#'_GBUg1#O##T##V##Q#$R_P$&m"
    "tO#U',UC$U_7$UbG#'a,#'>4U %PH#'_F#%/#'a^#U$$U##P%$U($U$#UW#'b)#'hoW#8jT)U#)P#$Un0#PaQ#P`@'Uz%#P$#UK#U##$##P'#'`P#U"
    "##PtZ#'[#' #'##%_,%US$'_%#%_3#',#%_Q#'##%`]#%##'_8#%3#';)U&'Ua<#'&#%`&#'##%b.#'##%`)#'_]#'##%_Z#'sJ#'hmO'$^)Uhy6#$"
    "`vI$N#%$&#S#'N+*P%'U#$PA&U`!%U_xF)U$3U%)U$$U$'U_bX)P_T(U##%";
static const char UC_COMPOSED[] =
    "d;`-wG%#%%#%%#%%#-%#''']%'_4%#%%#%%#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0)3$%#%%#%%#%%#-%#''']%'_4%#%%#%%"
    "#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0'#1%_V*%_'#%_&'%_'#%_&_+%_'#%^_4%_'#%_&%%_'#%_&-%_'#%_&-%_'#%_$#%_'"
    "#)_$2%_'#%_&'%_'#%_&%%_'#%_&_)%_'#%_&Z%_'#%^6%_'#%_&+%_'#%_&%%_'#%_&_'%_'#%_$_0%_'#)_$%%_'#%_&%%_'#%_&'%_'#%_&_+%_"
    "'#%_&_(+%,%_'#%_$_1%_'#'_$_2%_'#%_&_3%_'#%_&X%_'#-^8%_'#%_&_3%_'#%_&X%_'#+_$2%_'#%_&'%_'#%_&-%_'#) 6%_'#%_&_3%_'#%"
    "_&X%_'#%_$8%_'#%_&%%_'#%_&_1%_'#%_&X%_'#%_$Y%_'#%_&X%_'#)_$4%_'#%_&%%_'#%_&'%_'#%_&+%_'#%_&%%_'#%_&]%_'#%^_2%_'#%^"
    "#%_'#%_&/%%0%_'#%_&/%_'#%_&-%_'#_+_<A%_'#!V#%_'#]_N@%_'#%R#%_'#%V#%_'#%V#%_'#%a=2%_'#%_&(%_'#%_&9%_'#%_&:%_'#'_V+%"
    "_'#%hO#%%#%iP#%_'#)c43%_'#%Z#%_'#%Z[%_'#%jI_.%%#%_N3%e5#%p:#+_,8%_'#)T$%_'#%`Y%%_'#%_$#%_'#%>#%_'#%d(!%_'#%_&'%_'#"
    "%Z&%_'#%_&'%_'#%Z&%_'#%_&'%_'#%V&%_'#%_&'%_'#% &%_'#%_&'%_'#% &%_'#%_&'%_'#%_*M%_'#%_$#%_'#)_>V%_'#1_4,%_'#%Z_'%_'"
    "#%aQ_,%_'#%_(#%_'#%cB)%_'#%lY(%%#%mJ#%_'#i3_E(%vU#'+#%'#%'#'/#'/#%+#%_)#W_H1%;#%;0%+#%'#%'#%G#WF1%;#%.0%/#%+#-5#%#"
    "1_!`12%#3'&0+<1-K0%&$%9/98#_'_'#Q(.%#3'&0+_-1-Z0%&$%9/S_I5%%#`!a,4%_'#!_2#%_'#%_&'%_'#)X&%_'#)c='%%#%d@#%_'#%_$#%_"
    "'#)_$*%_'#%_&+%_'#%V#%_'#)cK#%%#%d2#%_'#%_:*%_'#%_&+%_'#%_&)%_'#%Z(%_'#)Z#%_'#gYmWz)%#%%_)#%_(%%_-$c+bI#'J#EE#q[q["
    "vS33#))#c%b[b7%#UjKjSjQ)#R%#U`;`Ab3_S_OT%%#%$Ub+b3b1b#b%b111#%#%'#J%+Ib1b+aA%%#%$UbObYaU'#-%),%(Mq!qGqM`zS`zS`|)''"
    "#''#''#''#++#_9_9#''#)'#%%#')#u9ed<dk6%_'#%_$^%_'#%_&[%_'#%_&!%_'#%a9_F%_'#%c</%_'#%_&[%_'#%_&!%_'#%_&6%_'#%_&/%_'"
    "#%cS_@%%#%$%%%#%dV_!%_'#%_&)%_'#%m%_:%%#%n(%%_'#%_$(%_'#%_$)%_'#%_&[%_'#%_&X%_'#%_&_%%_'#%_&1%_'#%_$'%_'#%a;_D%_'#"
    "%c>#%_'#%_&_+%_'#%_&!%_'#%_$>%_'#%e|/_$%%#%e}4_A%_'#%_&*%_'#%_$_>%_'#%_&/%_'#%_&[%_'#%_$Z%_'#%_&[%_'#%_&!%_'#%_&*%"
    "_'#%a=_>%_'#%_&1%_'#%`Y2%%#%$%%%#%f<#%_'#%_&/%_'#%^#%_'#%_&[%_'#%e}/_$%%#%e~4_A%_'#%_$_:%_'#%_&[%_'#%eMZ%%#%-#%%#%"
    "euA#%%#%e~@#%_'#%_&[%_'#%_&!%_'#%_&*%_'#%_$4%_'#%_&;%_'#%_&(%_'#%f)_>%%#%%1%%#%g0,%_'#%_&_'%_'#%_$_,%_'#%_&%%_'#%_"
    "&1%_'#%_&$%_'#%_&[%_'#%_$Z%_'#%_&%%_'#%_$$%_'#%_$,%_'#%_&_)%_'#%_&!%_'#%F#%;_8%)'%'#'fO(-hF[%_'#%_&V%_'#%a12%_'#%_"
    "&$%_'#%_&5%_'#%_&.%_'#%e{S$%%#%ezP$%%#%$$%%#%$5%%#%$.%%#%ezM)%%#%fa&]%_'#%_&V%_'#%_&.%_'#%a9&%_'#%_&$%_'#%_&5%_'#%"
    "_&.%_'#%e|7$%%#%faN1%_'#%_&W%_'#%V#%_'#%_&V%_'#%a92%_'#%_&$%_'#%_&5%_'#%_&.%_'#%e|K$%%#%ev $%%#%$$%%#%$5%%#%$.%%#%"
    "$_'%%#%i&#%_'#%_&V%_'#%h!2%%#%$$%%#%$5%%#%$.%%#%$_'%%#%i<_,%_'#%_&_-%_'#%_&V%_'#%_&.%_'#1y!C%#%%eg%J%%#%$%%%#%$`-%"
    "%#%eh*_D%#%%eh9J%%#%$%%%#%$`-%%#%eg._D%#%%eg=J%%#%$%%%#)ehBG%#%%ehQJ%%#%$%%%#)egJG%#%%egYJ%%#%$%%%#%$`-%%#%eh^_D%#"
    "%%ei1J%%#%$%%%#%$`-%%#%eh*_D%#%%eh9J%%#%$%%%#%$`-%%#%ei>_D%#%%eiMJ%%#%$%%%#%$`-%%#%eh>_D%#%%ehMJ%%#%$%%%#)eiRG%#%%"
    "ej%J%%#%$%%%#)ehRG%#%%ei%J%%#%$%%%#%$`-%%#'ej*_B'ej;J'#%'#`-%ei._D%#%%ei=J%%#%$%%%#%$`-%%#%ejB_D%#%%ejQJ%%#%$%%%#%"
    "$`-%%#%ejB`.'+#''#''#'/#'/#'+#+ef1`5%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%E#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#"
    "%%#%%#%%#%%#%%#%_I#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%ejN`(%#&%ejQ`-%ejP#%,#'-(%em))%en,`(%#&%#*'#`5-vT"
    "(%fdS)%ejL#%4#'5(%em=)%enD`4''#'#`5%en3`4%#%%#`-%em*_^%#&%E*+D`/%E#%_H_^%#&%#*)ep5#%#%%#`-%enT_^%#&%/*'6I%#%%+_C%/"
    "#%_2_^%#&%#*'*K%w8J-fe'`5%ej8#%-#',(%en=)%eoT`4'7#'#`5kSe}-<%'#I'#_%`##%+#%&#_Q_I#--#))#SS#''#YQ#)1#)'#')#Qg`@#'ga"
    "7#9J#%g`L#%'#%ga;#%%#)=#%%#))#%%#1)#%%#)1#%%#))#%%#_-Y#%/#%%#%'#_I_D#%%#%K#%%#1_'#%%#%%#%%#ap)aq[ja1''#''#''#''#''"
    "#''#''#''#''#''#''#))#''#''#11#%#%')$%#%')$%#%')$%#%')$%#%Q_P$7`Y#!!#''#''#''#''#''#''#''#''#''#''#''#))#''#''#11#"
    "%#%')$%#%')$%#%')$%#%')$%#%Q_P$)`=#%%#%%#%%#+9#_yr+_yr+_yvE''#A7#b9bKaI%%#p#oQoU%#Uj1j7iU%#6'#=f;fAf'%%#";
static const char UC_EXCLUDED[] =
    "yWwWwI_qW_qI_s-%%#%%#%-#%-#%%#%5#%+#b-aSb3%%#'=#`Sb9b3)/#_-_*#%%#%-#)A#f!f/fC%%#__3_a/_d177#--#--#--#=X&7_I`0'#'%`"
    "-;'%#5`.#G_)_U77#--#--#--#=X&bd+ac4aj:'+#''#''#'/#'/#'+#`'_V#!+#''#3_M#3_H#3_K#3_2#)w@#9w5#'7#h+{&5`pMiiG_C_uo)gyV"
    "s/'U)947%#%%`_kW$%#%%`_lL8%#%%#+%%#%%#%%#%%#%%#%%#''#%%#%%#%%#%%#''#''#%%#''#%%#''#%%#%%#%%#%%#%L(%*/%7#%5#_w`Kaxn"
    "Iaxp7%%#%15%#%%#%%#%%#%`Ya#<%%#%%5%%#%$%%%#";
static const char UC_SINGLETONS[] =
    "yOwG%%'G_I`^7s25b+enQwK_IzD!`S)fi+%%gQeoZ+zNo%ju9%%_v~Ovq-%g|B%hq[%o*%e}L%ft8%_nI%rd)%#%puT%m`+%n`>%~%%`h'%clA%`kO"
    "%_w;%jI%hG%_~Q%hf %x=%}[%wQ%biM%an=%`fQ%raL%_h1%dg%%_zA%ci3%dj5%of^%b|Q%cxO%|I%hg<%fg%%_sE%h~L%`dU%_s]%_mC%e|!%ok&"
    "%pM%gU%bvO%_qM%_{Q%_g5%`kK%_q9%`W%_~I%`m%%_b-%sM%g}:%f)%_a1%_rE%b_]%a_]%ceP%kh8%_r=%exC%_a+%av:%_tK%ch;%`u)%np(%|/"
    "%arU%~1%h5%avC%fS%dk!%o}P%jd-%jl8%B%hv#%}#%_rY%b|#%`{@%hy0%_{=%fw!%ndD%arO%_aE%cd%%n5%gc(%ha7%h}V%beS%bt2%fd9%_|B%"
    "dg[%i_$%_e5%fc=%ao7%_t=%fe^%gpW%gi^%`o:%fn1%fhT%buI%hh8%u5%a/%d_W%cl'%_m/%`eE%_yI%nv6%i)%_j5%_lM%_x=%`u1%`l3%eq5%_"
    "f=%_aI%_U%rh0%cj)%_f%%gpA%k_B%xC%aO%t/%`wY%p7%yO%_jU%_aC%s-%a{E%`u.%`}I%xY%oj8%bK%o[%em5%djG%n3%it<%h#%|'%`c]%bk7%"
    "`h %gv$%`b]%_h'%mE%r7%ce+%d)%`}A%cO%bw#%_fG%`O%d[%qi(%ieE%dk#%_hS%li<%bzH%qW%`|C%`M%`mS%_cI%``C%_d#%a{K%a`+%a~E%md"
    "D%jtG%p_0%cpO%b#%_k3%iE%_l5%i/%x/%_eI%eg#%p{8%bl]%k|/%puX%al7%bmA%fyO%jt8%lM%_x1%a_G%ghI%pe8%n/%`e+%`pG%hA%iC%_b-%"
    "_zU%mW%`oU%`mK%G%`j)%_i;%p_,%ehA%ea(%e{=%uO%br7%bl-%_nK%q!%lsF%_r[%ciI%_zL%`U%j7%`qR%p8%eb1%nc&%k}K%k_^%_L%aiM%_aI"
    "%d{]%fz4%bt-%_tN%hwU%_y,%auA%ajV%ijB%aqT%_d;)t/'av7)cmJ%fz+%|[%rW%_+%1%_;%e|)%e`Z%wE'_t%'_gS)_jS%dE+`aS%=%_!%_dS%a"
    "kB%_oY%p|,%h=%a;%jK%Y%aI%qG%aA%a3%mO%a!%}W%7%_a;%e'%_3%a7%zM%bY%cU%nK%_h/%c=%fS%qG%d5%nQ%_cU%cQ%9%$%3%/%1%_G%%%c[%"
    "`-%hI%pS%M%_W%h-%bY%n3%bK%#%m[%_f5%b!%j)%_W%kK%_Q%tW%b7%_vY%g!%`#%lyZ%a~s)%aut&)ky2%|9%`D%n2%m)%_]%hY%_M%tA%`:%`3%"
    "`=%s'%`]%bU%C%g#%dG%}3%1%bS%`3%g]%a[%`6%b!%_B%bW%`/%k7%`[%_S%fK%gC%c=%+%_]%_a5%`-%k%%kK%B%`Y%f;%i/%_s)%_l>%b'%b)%h"
    "Y%b]%_Q%eC%'%cM%E%U%`W%6%k/%n-%g%%d1%e!%c)%i#%dI%z-%c1%|/%m/%`5%C%gY%_Y%_@%_S%(%D%`C%`M%jO%pK%h!%gU%e9%_`7%a=%aU%b"
    "=%_/%;%_G%v1%_dO%aftW%.%a`M%bdlJ%_d1%_)%bki/%`wU%g`1%a}z2%`AbevQssX%,%5%aq|]%aqs:%`G%=%`9%b#%_%%`G%R%enD%azc/%arn<"
    "%1%C%I%arcA%ayxP%erO%_3%ard7%arc^%=%v2%vC%5%bwrG%bwp>%!%evJ%exC%9%_!%-%exN%e{;%'%Y%O%9%%%E%_K%3%5%U%7%'%#%#%ar}9%a"
    "kf:%er>%M%asdC%asd*%/%M%c'%a:%C%_'%_[%`S%W%`1%C%_)%#%M%G%3%A%i7%g&%g)%dF%_-%_cP%_xY%gF%_3%U%b6%cE%$%b)%atlK%atj6%-"
    "%A%K%3%`+%atuK%`/%ats2%_E%;%`H%bO%glJ%!%gqG%_S%#%au`!%at|$%M%A%;%aueI%aue0%1%z-%y0%gvD%gxI%!%`O%_L%aux9%aur4%aur9%"
    "aupZ%(%E%a9%%%h_L%h`G%_=%M%_!%hb@%b`kY%b`k$%hd#%)%)%K%bxz#%bxx2%avpQ%#%ame^%ggD%#%he4%bd{9%jp/%bgd*%5%hfR%hh9%_M%7"
    "%_+%bC%hm,%^%hnS%awb3%aw`D%b5%+%'%&%_C%K%_/%>%9%_E%K%+%W%9%`/%`S%_-%b+%awn[%awoD%`,%aG%Y%a1%awqI%awoD%a(%Z%i_ %if9"
    "%M%_%%_2%idP%ik]%]%axgC%axcD%g1%cT%inB%ip[%iq@%_.%d_C%)%ctQ%a6%d|=%ne&%gjO%+%/%`%%8%axw'%bdnV%i{9%aX%dU%_M%axrC%ax"
    "r0%aL%f-%ja %jcA%a1%`9%d7%axs-%axq>%jm$%jo9%ay`7%ax~H%jo2%jp3%_A%Y%%%ayk;%eyR%e}=%ayj*%ayy+%ayu8%!%a:%cU%_7%_Y%_R%"
    "_7%A%=%ayr%%aytN%f9%`)%kb(%ke/%*%ayuS%ay|J%j=%ayt[%_G%aysF%aU%X%(%km(%knK%_M%.%_S%aiy!%ait:%az_#%ay|(%azg%%azb8%=%"
    "Y%azu/%azsF%M%az|[%e=%az|N%E%la,%lb%%laH%#%lg%%M%M%K%`5%lh(%lk)%a{qS%a{pZ%a{t#%a{r6%apcU%ao~@%a|g)%Q%bK%bjy^%;%lrK"
    "%a|jQ%$%_5%W%a|k@%%%#%_=%lsX%lv'%luH%`K%bkuM%a|z0%`'%`+%l{(%bldA%a}bR%a}fK%_=%a}f.%a'%mb*%md]%7%-%a}v]%g]%#%a}{H%m"
    "cN%bmj%%a}}(%)%miR%bmoY%a}{2%mnF%mo7%,%]%a~sC%a~p0%mp.%msC%_]%`1%mv$%bnw/%_%%bnv^%bn{W%a~zP%a~~+%a~}0%a9%9%b_g1%`="
    "%b_fH%b_k'%b_jB%aq}=%bbbF%ne9%`M%nf2%nh1%hfT%bi}C%!%kzV%5%aqr(%)%ar'%r_L%np7%.%G%jvV%jwC%'%7%_9%b`e+%b`e,%_W%`7%`!"
    "%bF%c+%_;%aO%fJ%a]%'%C%b`e3%h5%b^%bqaB%n~/%'%_-%ba{!%baxV%b`q!%bqsT%+%bqx+%gI%bra<%ogQ%;%9%'%`+%_(%b!%_>%c%%`L%`1%"
    "Y%on@%oqC%_'%oq>%otI%)%bauG%baqN%1%ovT%owQ%tlX%bxrY%d+%bt_6%5%p`]%`E%c1%dQ%bbi5%bbf<%O%a#%a'%bbu/%}vX%aby@%@%_O%ac"
    "_C%abwZ%a7%bc~W%Y%bct,%a)%_'%bczM%bcz8%gA%c5%%%a&%jM%[%bdiY%bc}<%rf.%rgK%bdhK%bxoH%rmY%md %mh-%bd}#%e)%byrJ%3%rrG%"
    "ben7%bz`Z%bzeG%beqD%#%_#%bez-%bes^%rtX%rw3%b/%Y%`#%ry.%b{t!%bfp&%h'%d5%sj0%_%%slO%bgl)%b|z>%b||5%fU%b9%bgoR%stD%sv"
    "I%-%1%7%1%_1%bhhU";
// ---- end of the tables printed by tests/make_unicode.py ----

typedef struct { uint32_t code, first, last; } canonical_pair;  // code = first + last, or just first when last is 0

static uint8_t uc_flags[UC_END];             // [code point] UC_ flags
static uint8_t uc_rank[UC_END];              // [code point] rank of the combining class
static canonical_pair uc_decomposed[2200];   // [uc_n_decomposed] by code
static canonical_pair uc_composed[1000];     // [uc_n_composed] by first, then last
static size_t uc_n_decomposed, uc_n_composed;

static uint32_t uc_number(const char **text) {
    uint32_t high = 0;
    for (;;) {
        char c = *(*text)++;
        uint32_t digit = (uint32_t)((c == ' ' ? '\\' : c == '!' ? '?' : c) - '#');
        if (digit < 60) return high * 60 + digit;
        high = high * 32 + (digit - 60) + 1;
    }
}

static uint32_t uc_difference(const char **text) {  // zigzag: 0, -1, 1, -2, ...; negative ones wrap around
    uint32_t n = uc_number(text);
    return n & 1 ? ~(n >> 1) : n >> 1;
}

static void uc_unpack_ranges(const char *text, uint8_t flag) {
    for (uint32_t code = 0; *text; ) {
        code += uc_number(&text);
        for (uint32_t end = code + uc_number(&text) + 1; code < end; code++) uc_flags[code] |= flag;
    }
}

static void uc_unpack_pairs(const char *text, bool composes, bool singleton) {
    canonical_pair pair = {0, 0, 0};
    while (*text) {
        pair.code += uc_difference(&text);
        pair.first += uc_difference(&text);
        if (!singleton) pair.last += uc_difference(&text);
        uc_decomposed[uc_n_decomposed++] = pair;
        if (composes) uc_composed[uc_n_composed++] = pair;
        uc_flags[pair.code] |= UC_DECOMPOSES;
    }
}

static int uc_by_code(const void *a, const void *b) {
    uint32_t x = ((const canonical_pair *)a)->code, y = ((const canonical_pair *)b)->code;
    return (x > y) - (x < y);
}

static int uc_by_parts(const void *a, const void *b) {
    const canonical_pair *x = a, *y = b;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->last > y->last) - (x->last < y->last);
}

// Called once, before the first text and before any thread.
static void unicode_init(void) {
    if (uc_n_decomposed) return;
    uc_unpack_ranges(UC_LETTER_RANGES, UC_LETTER);
    uc_unpack_ranges(UC_NUMBER_RANGES, UC_NUMBER);
    uc_unpack_ranges(UC_SPACE_RANGES, UC_SPACE);
    uc_unpack_ranges(UC_PUNCT_RANGES, UC_PUNCT);
    const char *text = UC_MARK_RUNS;
    for (uint32_t code = 0; *text; ) {
        code += uc_number(&text);
        uint32_t end = code + uc_number(&text) + 1, rank = uc_number(&text);
        for (; code < end; code++) uc_rank[code] = (uint8_t)rank;
    }
    uc_unpack_pairs(UC_COMPOSED, true, false);
    uc_unpack_pairs(UC_EXCLUDED, false, false);
    uc_unpack_pairs(UC_SINGLETONS, false, true);
    qsort(uc_decomposed, uc_n_decomposed, sizeof uc_decomposed[0], uc_by_code);
    qsort(uc_composed, uc_n_composed, sizeof uc_composed[0], uc_by_parts);
}

static inline unsigned unicode_class(uint32_t cp) { return cp < UC_END ? uc_flags[cp] & 15u : 0; }

// Decodes one code point from the n >= 1 bytes at s and returns how many bytes it took. What is not UTF-8 gives U+FFFD
// for each maximal subpart (Unicode 3.9, table 3-8), as Python's errors='replace' does: a sequence that breaks off
// takes the bytes that could still have become a character, and the byte that broke it is read again as a beginning.
static int utf8_decode(const char *s, size_t n, uint32_t *cp) {
    const uint8_t *b = (const uint8_t *)s;
    *cp = b[0];
    if (b[0] < 0x80) return 1;
    int size = b[0] >= 0xC2 && b[0] <= 0xDF ? 2 : (b[0] & 0xF0) == 0xE0 ? 3 : b[0] >= 0xF0 && b[0] <= 0xF4 ? 4 : 1;
    // The second byte's range rules out overlong forms, surrogates and what lies above U+10FFFF.
    uint8_t low = b[0] == 0xE0 ? 0xA0 : b[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t high = b[0] == 0xED ? 0x9F : b[0] == 0xF4 ? 0x8F : 0xBF;
    uint32_t code = b[0] & (0x7Fu >> size);
    int used = 1;
    for (; used < size && (size_t)used < n && b[used] >= low && b[used] <= high; used++, low = 0x80, high = 0xBF)
        code = code << 6 | (b[used] & 0x3Fu);
    *cp = size > 1 && used == size ? code : UC_REPLACEMENT;
    return used;
}

// Writes cp to out (room for 4 bytes) and returns how many bytes it took.
static int utf8_encode(uint32_t cp, char *out) {
    if (cp < 0x80) { out[0] = (char)cp; return 1; }
    int more = cp < 0x800 ? 1 : cp < 0x10000 ? 2 : 3;  // continuation bytes
    static const uint8_t LEAD[4] = {0, 0xC0, 0xE0, 0xF0};
    out[0] = (char)(LEAD[more] | cp >> 6 * more);
    for (int i = 1; i <= more; i++) out[i] = (char)(0x80 | (cp >> 6 * (more - i) & 0x3F));
    return more + 1;
}

// Appends the full canonical decomposition of cp to out and returns how many code points that is (at most 4).
static size_t nfc_decompose(uint32_t cp, uint32_t *out) {
    if (cp - HANGUL_S < HANGUL_SYLLABLES) {
        uint32_t s = cp - HANGUL_S, t = s % HANGUL_TS;
        out[0] = HANGUL_L + s / (HANGUL_VS * HANGUL_TS);
        out[1] = HANGUL_V + s / HANGUL_TS % HANGUL_VS;
        if (t) out[2] = HANGUL_T + t;
        return t ? 3 : 2;
    }
    // cppcheck-suppress arrayIndexOutOfBoundsCond ; utf8_decode() gives nothing from UC_END on
    if (!(uc_flags[cp] & UC_DECOMPOSES)) { *out = cp; return 1; }
    canonical_pair key = {cp, 0, 0};
    const canonical_pair *pair = bsearch(&key, uc_decomposed, uc_n_decomposed, sizeof key, uc_by_code);
    size_t n = nfc_decompose(pair->first, out);  // only `first` decomposes further, three steps deep at most
    if (pair->last) out[n++] = pair->last;
    return n;
}

// The code point that canonically equals first + last, or 0.
static uint32_t nfc_compose(uint32_t first, uint32_t last) {
    if (first - HANGUL_L < HANGUL_LS && last - HANGUL_V < HANGUL_VS)
        return HANGUL_S + ((first - HANGUL_L) * HANGUL_VS + last - HANGUL_V) * HANGUL_TS;
    bool open = first - HANGUL_S < HANGUL_SYLLABLES && (first - HANGUL_S) % HANGUL_TS == 0;  // a syllable without a T
    if (open && last - (HANGUL_T + 1) < HANGUL_TS - 1)
        return first + last - HANGUL_T;
    canonical_pair key = {0, first, last};
    const canonical_pair *pair = bsearch(&key, uc_composed, uc_n_composed, sizeof key, uc_by_parts);
    return pair ? pair->code : 0;
}

// Sorts each run of marks by combining class, stably: counting, so that a million marks take linear time. tmp: [n]
static void nfc_reorder(uint32_t *cp, size_t n, uint32_t *tmp) {
    for (size_t i = 0, end; i < n; i = end) {
        bool sorted = true;
        for (end = i + 1; uc_rank[cp[i]] && end < n && uc_rank[cp[end]]; end++)
            sorted = sorted && uc_rank[cp[end - 1]] <= uc_rank[cp[end]];
        if (sorted) continue;
        size_t at[UC_MAX_RANKS + 1] = {0};  // [rank] where its next mark goes
        for (size_t k = i; k < end; k++) at[uc_rank[cp[k]] + 1]++;
        for (int r = 1; r <= UC_MAX_RANKS; r++) at[r] += at[r - 1];
        for (size_t k = i; k < end; k++) tmp[at[uc_rank[cp[k]]]++] = cp[k];
        memcpy(cp + i, tmp, (end - i) * sizeof *cp);
    }
}

// Composes in place and returns how many code points are left. A character joins the last starter unless one between
// them is a starter or of the same or a higher class.
static size_t nfc_recompose(uint32_t *cp, size_t n) {
    size_t kept = 0, starter = SIZE_MAX;
    for (size_t i = 0; i < n; i++) {
        uint8_t rank = uc_rank[cp[i]];
        bool adjacent = kept > 0 && starter == kept - 1;
        if (starter != SIZE_MAX && (adjacent || uc_rank[cp[kept - 1]] < rank)) {
            uint32_t whole = nfc_compose(cp[starter], cp[i]);
            if (whole) { cp[starter] = whole; continue; }
        }
        if (rank == 0) starter = kept;
        cp[kept++] = cp[i];
    }
    return kept;
}

// Unicode's normal form C of valid UTF-8: a buffer of *out_n bytes that the caller frees. Nothing below U+0300 changes
// by itself or joins what is before it, so the text falls into pieces that begin there; pieces of one such character,
// which ordinary text is made of, are copied.
static char *nfc(const char *utf8, size_t n, size_t *out_n) {
    const uint8_t *s = (const uint8_t *)utf8;
    char *out = xmalloc(3 * n + 1);    // 3: U+1D160 and its like; the script that makes the tables checks the bound
    uint32_t *cp = NULL, *tmp = NULL;  // [2 * room] code points of one decomposed piece, at most 2 a byte
    size_t used = 0, room = 0;
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && (s[end] >= 0xCC || (s[end] & 0xC0) == 0x80); ) end++;  // 0xCC leads U+0300
        if (s[i] < 0xCC && (end == i + 1 || (end == i + 2 && s[i] >= 0x80))) {
            memcpy(out + used, utf8 + i, end - i);
            used += end - i;
            continue;
        }
        if (end - i > room) {
            free(cp);
            free(tmp);
            room = end - i < 1024 ? 1024 : end - i;
            cp = xmalloc(2 * room * sizeof *cp);
            tmp = xmalloc(2 * room * sizeof *tmp);
        }
        size_t count = 0;
        for (size_t k = i; k < end; ) {
            uint32_t c;
            k += (size_t)utf8_decode(utf8 + k, end - k, &c);
            count += nfc_decompose(c, cp + count);
        }
        nfc_reorder(cp, count, tmp);
        count = nfc_recompose(cp, count);
        for (size_t k = 0; k < count; k++) used += (size_t)utf8_encode(cp[k], out + used);
    }
    free(cp);
    free(tmp);
    *out_n = used;
    return out;
}

// ---- The vocabulary ----

enum token_type { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE };

struct merge {              // a pair of neighbours that may become one token
    int32_t left, right, result;
    int32_t rank;           // the lowest goes first; -1 marks an empty place of the table
};

struct tokenizer {          // owner of everything but the file it was read from
    int32_t n_tokens;
    struct str *token;      // [n_tokens] bytes that the token stands for
    uint8_t *type;          // [n_tokens] enum token_type
    char *bytes;            // what token[] points to
    int32_t *by_bytes;      // [n_slots] hash table over the bytes of normal tokens: id, or -1
    uint32_t n_slots;       // a power of two
    uint64_t hash_seed;     // another one in each process, so that no file can hold tokens or merges that all meet in one slot
    struct merge *merges;   // [n_merge_slots] hash table over pairs
    uint32_t n_merge_slots;
    int32_t byte_token[256];  // token of each single byte, or -1
    int32_t *added;         // [n_added] control and user-defined tokens, the longest first
    int n_added;
    bool added_first[256];  // some added token begins with this byte
    bool added_spaces;      // some added token has white space behind other characters
    int32_t bos, eos, unknown;  // -1 when there is none
    bool add_bos, nfc, falcon, characters;
    bool nucleotides, keep_case;  // texts are DNA; lower case is no upper case (--case-sensitive)
};

struct ids {                // growing list of token ids; owner of p
    int32_t *p;
    size_t n, capacity;
};

static void ids_add(struct ids *ids, int32_t id) {
    if (ids->n == ids->capacity) {
        ids->capacity = ids->capacity * 2 + 64;
        ids->p = xrealloc(ids->p, ids->capacity * sizeof *ids->p);
    }
    ids->p[ids->n++] = id;
}

// GPT-2's alphabet writes every byte as a printable character: most of Latin-1 as itself, the others from U+0100 on.
static int byte_of_alphabet(uint32_t cp) {
    bool itself = (cp >= 33 && cp <= 126) || (cp >= 161 && cp <= 172) || (cp >= 174 && cp <= 255);
    if (itself) return (int)cp;
    if (cp < 256 || cp >= 256 + 68) return -1;
    uint32_t i = cp - 256;  // the i-th byte that is not itself: 0-32, 127-160, 173
    return (int)(i < 33 ? i : i < 67 ? i + 94 : 173);
}

// Writes the bytes that the alphabet's text stands for; false when it is not written in the alphabet.
static bool bytes_of_alphabet(struct str text, char *to, size_t *n) {
    *n = 0;
    for (size_t i = 0; i < text.n;) {
        uint32_t cp;
        i += (size_t)utf8_decode(text.p + i, text.n - i, &cp);
        int byte = byte_of_alphabet(cp);
        if (byte < 0) return false;
        to[(*n)++] = (char)byte;
    }
    return true;
}

static int32_t *token_slot(const struct tokenizer *t, struct str s) {
    uint32_t i = (uint32_t)(hash_bytes(t->hash_seed, s.p, s.n) >> 32) & (t->n_slots - 1);
    // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): load_tokens() has made the table
    while (t->by_bytes[i] >= 0 && str_compare(t->token[t->by_bytes[i]], s) != 0) i = (i + 1) & (t->n_slots - 1);
    return &t->by_bytes[i];
}

static struct merge *merge_slot(const struct tokenizer *t, int32_t left, int32_t right) {
    const uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t i = (uint32_t)(mix64(key ^ t->hash_seed) >> 32) & (t->n_merge_slots - 1);
    while (t->merges[i].rank >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
        i = (i + 1) & (t->n_merge_slots - 1);
    return &t->merges[i];
}

static uint32_t table_size(uint64_t n) {  // a power of two, at most half full
    uint32_t size = 16;
    while (size < 2 * n && size < 1u << 30) size *= 2;
    return size;
}

static bool load_tokens(struct tokenizer *t, const struct gguf *g, struct error *e) {
    const struct gguf_kv *tokens = gguf_find(g, "tokenizer.ggml.tokens"), *types = gguf_find(g, "tokenizer.ggml.token_type");
    if (!tokens || !tokens->is_array || tokens->type != GGUF_STRING || tokens->count == 0 || tokens->count > 1 << 28)
        return fail(e, "metadata 'tokenizer.ggml.tokens' is missing or not an array of strings");
    if (types && (!types->is_array || types->count != tokens->count || (types->type != GGUF_I32 && types->type != GGUF_U32)))
        return fail(e, "metadata 'tokenizer.ggml.token_type' does not give one integer to each of the %" PRIu64 " tokens",
                    tokens->count);
    t->n_tokens = (int32_t)tokens->count;
    size_t n = (size_t)t->n_tokens, total = 0;
    const uint8_t *at = tokens->value;
    for (size_t i = 0; i < n; i++) total += gguf_next_str(&at).n;
    t->token = xmalloc(n * sizeof *t->token);
    t->type = xmalloc(n);
    char *to = t->bytes = xmalloc(total);
    t->n_slots = table_size(n);
    t->by_bytes = xmalloc(t->n_slots * sizeof *t->by_bytes);
    memset(t->by_bytes, 0xff, t->n_slots * sizeof *t->by_bytes);
    at = tokens->value;
    for (size_t i = 0; i < n; i++) {
        struct str text = gguf_next_str(&at);
        uint32_t type = TOKEN_NORMAL;
        if (types) memcpy(&type, types->value + 4 * i, 4);
        if (type < TOKEN_NORMAL || type > TOKEN_BYTE)
            return fail(e, "token %zu has type %" PRIu32 "; expected 1 to 6", i, type);
        size_t len = 0;
        if (type != TOKEN_NORMAL || !bytes_of_alphabet(text, to, &len)) memcpy(to, text.p, len = text.n);
        t->type[i] = (uint8_t)type;
        t->token[i] = (struct str){to, len};
        to += len;
        int32_t *slot = type == TOKEN_NORMAL ? token_slot(t, t->token[i]) : NULL;
        if (slot && *slot < 0) *slot = (int32_t)i;
    }
    for (int b = 0; b < 256; b++) t->byte_token[b] = *token_slot(t, (struct str){&(char){(char)b}, 1});
    return true;
}

static bool load_merges(struct tokenizer *t, const struct gguf *g, struct error *e) {
    const struct gguf_kv *kv = gguf_find(g, "tokenizer.ggml.merges");
    const uint64_t n = kv ? kv->count : 0;
    if (kv && !(kv->is_array && kv->type == GGUF_STRING)) return fail(e, "tokenizer.ggml.merges is no array of strings");
    if (n > 1 << 28) return fail(e, "%" PRIu64 " merges", n);
    t->characters = n == 0;
    t->n_merge_slots = table_size(n);
    t->merges = xmalloc(t->n_merge_slots * sizeof *t->merges);
    for (uint32_t i = 0; i < t->n_merge_slots; i++) t->merges[i].rank = -1;
    struct buffer pair = {0};
    const uint8_t *at = n ? kv->value : NULL;
    for (uint64_t i = 0; i < n; i++) {
        struct str line = gguf_next_str(&at);
        const char *space = line.n > 2 ? memchr(line.p + 1, ' ', line.n - 2) : NULL;  // the alphabet has no space
        size_t left_n = 0, right_n = 0, cut = space ? (size_t)(space - line.p) : 0;
        pair.n = 0;
        buffer_add(&pair, line.p, line.n);  // makes room: bytes are never longer than their spelling
        bool ok = space && bytes_of_alphabet((struct str){line.p, cut}, pair.p, &left_n) &&
                  bytes_of_alphabet((struct str){space + 1, line.n - cut - 1}, pair.p + left_n, &right_n);
        int32_t left = ok ? *token_slot(t, (struct str){pair.p, left_n}) : -1;
        int32_t right = ok ? *token_slot(t, (struct str){pair.p + left_n, right_n}) : -1;
        int32_t result = ok ? *token_slot(t, (struct str){pair.p, left_n + right_n}) : -1;
        if (left < 0 || right < 0 || result < 0) {
            free(pair.p);
            return fail(e, "merge %" PRIu64 " (\"%.*s\") does not name two tokens that make a third", i, str_show(line), line.p);
        }
        struct merge *slot = merge_slot(t, left, right);
        if (slot->rank < 0) *slot = (struct merge){left, right, result, (int32_t)i};
    }
    free(pair.p);
    return true;
}

static const struct tokenizer *sorting;  // qsort passes no context

static int longest_first(const void *a, const void *b) {
    size_t x = sorting->token[*(const int32_t *)a].n, y = sorting->token[*(const int32_t *)b].n;
    return x != y ? (x < y ? 1 : -1) : *(const int32_t *)a - *(const int32_t *)b;
}

// Does white space begin with byte i, behind something else?
static bool space_begins(const char *s, size_t i) {
    size_t from = i;
    uint32_t cp;
    if (i == 0 || (uint8_t)s[i] >= 0x80 || !(unicode_class((uint8_t)s[i]) & UC_SPACE)) return false;
    do from--;
    while (from && i - from < 4 && (s[from] & 0xc0) == 0x80);  // the character before it
    utf8_decode(s + from, i - from, &cp);
    return !(unicode_class(cp) & UC_SPACE);
}

// The last place before byte n, from `from` on, where a text can be cut: the ids of both parts are those of the whole, because
// words end where white space begins, and nothing composes with it. 0: there is none.
static size_t last_cut(const struct tokenizer *t, const char *s, size_t from, size_t n) {
    if (t->added_spaces) return 0;
    while (n-- > from)
        if (space_begins(s, n)) return n;
    return 0;
}

enum { MAX_ADDED = 8192 };  // each is looked for wherever its first byte stands in a text

static bool collect_added(struct tokenizer *t, struct error *e) {
    for (int32_t i = 0; i < t->n_tokens; i++) {
        bool added = (t->type[i] == TOKEN_CONTROL || t->type[i] == TOKEN_USER_DEFINED) && t->token[i].n > 0;
        if (!added) continue;
        if (t->n_added % 64 == 0) t->added = xrealloc(t->added, ((size_t)t->n_added + 64) * sizeof *t->added);
        t->added[t->n_added++] = i;
        t->added_first[(uint8_t)t->token[i].p[0]] = true;
        for (size_t k = 1; k < t->token[i].n; k++) t->added_spaces |= space_begins(t->token[i].p, k);
    }
    if (t->n_added > MAX_ADDED)
        return fail(e, "%d control and user-defined tokens; expected at most %d", t->n_added, MAX_ADDED);
    sorting = t;
    if (t->n_added) qsort(t->added, (size_t)t->n_added, sizeof *t->added, longest_first);
    sorting = NULL;
    return true;
}

static bool load_special_id(const struct tokenizer *t, const struct gguf *g, const char *key, int32_t *id, struct error *e) {
    int64_t v;
    if (!gguf_int(g, key, &v) || v == UINT32_MAX) return true;
    if (v < 0 || v >= t->n_tokens)
        return fail(e, "%s is %" PRId64 ", but there are %" PRId32 " tokens", key, v, t->n_tokens);
    *id = (int32_t)v;
    return true;
}

static void tokenizer_close(struct tokenizer *t) {
    free(t->token);  // NOLINT(clang-analyzer-unix.Malloc): the struct is cleared below, a second call frees nothing
    free(t->type);
    free(t->bytes);
    free(t->by_bytes);
    free(t->merges);
    free(t->added);
    *t = (struct tokenizer){0};
}

static bool gguf_has_tokenizer(const struct gguf *g) { return gguf_find(g, "tokenizer.ggml.tokens") != NULL; }

// Reads the vocabulary out of g, which must outlive the call only.
static bool tokenizer_load(struct tokenizer *t, const struct gguf *g, struct error *e) {
    unicode_init();
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *t = (struct tokenizer){.bos = -1, .eos = -1, .unknown = -1, .hash_seed = hash_bytes((uintptr_t)t, &now, sizeof now)};
    struct str model = {"", 0}, pre = {"gpt-2", 5}, normalizer = {"none", 4};
    gguf_str(g, "tokenizer.ggml.model", &model);
    if (!str_is(model, "gpt2"))
        return fail(e, "tokenizer.ggml.model is \"%.*s\"; this version reads byte-level BPE (\"gpt2\")", str_show(model), model.p);
    gguf_str(g, "tokenizer.ggml.pre", &pre);
    // Published conversions of the GPT-NeoX vocabulary say mpt or olmo: GPT-2's pre-tokenisation behind NFC.
    bool neox = str_is(pre, "mpt") || str_is(pre, "olmo");
    t->falcon = str_is(pre, "falcon");
    if (!neox && !t->falcon && !str_is(pre, "gpt-2") && !str_is(pre, "gpt2"))
        return fail(e, "tokenizer.ggml.pre is \"%.*s\"; this version knows gpt-2, mpt, olmo and falcon", str_show(pre), pre.p);
    if (neox) normalizer = (struct str){"nfc", 3};
    gguf_str(g, "mamba.tokenizer.normalizer", &normalizer);
    t->nfc = str_is(normalizer, "nfc");
    t->nucleotides = str_is(normalizer, "dna");
    if (!t->nfc && !t->nucleotides && !str_is(normalizer, "none"))
        return fail(e, "mamba.tokenizer.normalizer is \"%.*s\"; expected nfc, dna or none", str_show(normalizer), normalizer.p);
    int64_t flag = 0;
    t->add_bos = gguf_int(g, "tokenizer.ggml.add_bos_token", &flag) && flag;
    bool ok = load_tokens(t, g, e) && load_merges(t, g, e) &&
              load_special_id(t, g, "tokenizer.ggml.bos_token_id", &t->bos, e) &&
              load_special_id(t, g, "tokenizer.ggml.eos_token_id", &t->eos, e) &&
              load_special_id(t, g, "tokenizer.ggml.unknown_token_id", &t->unknown, e) && collect_added(t, e);
    if (!ok) tokenizer_close(t);
    return ok;
}

// ---- Byte-pair encoding ----

struct symbol {             // a token in the making, in a list
    int32_t id;             // -1: merged away, or a byte without a token
    int prev, next;         // -1 at the ends
};

struct candidate {          // a pair of neighbours that could merge
    int32_t rank, left, right;  // left and right ids, to see whether the pair still stands
    int at;                 // index of the left symbol
};

struct encoder {            // buffers of an encoding in progress; owner of both
    const struct tokenizer *t;
    struct symbol *symbols;
    struct candidate *heap;  // the lowest rank on top, then the leftmost
    size_t capacity, n_heap;
    struct ids *out;
};

static bool candidate_before(const struct candidate *a, const struct candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct encoder *e, struct candidate c) {
    size_t i = e->n_heap++;
    for (; i && candidate_before(&c, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = c;
}

static struct candidate heap_pop(struct encoder *e) {
    struct candidate top = e->heap[0], last = e->heap[--e->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child + 1 < e->n_heap && candidate_before(&e->heap[child + 1], &e->heap[child])) child++;
        if (child >= e->n_heap || !candidate_before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = last;
    return top;
}

static void consider_pair(struct encoder *e, int at) {
    if (at < 0 || e->symbols[at].next < 0) return;
    int32_t left = e->symbols[at].id, right = e->symbols[e->symbols[at].next].id;
    if (left < 0 || right < 0) return;
    const struct merge *m = merge_slot(e->t, left, right);
    if (m->rank >= 0) heap_push(e, (struct candidate){m->rank, left, right, at});
}

// One word, as bytes. Merges always take the lowest rank, the leftmost of equals. Time n log n, for hostile words too.
static void encode_word(struct encoder *e, const char *word, size_t n) {
    const struct tokenizer *t = e->t;
    int32_t whole = n > 1 ? -1 : t->byte_token[(uint8_t)word[0]];
    if (whole >= 0) {
        ids_add(e->out, whole);
        return;
    }
    if (n > e->capacity) {
        e->capacity = 2 * n;
        e->symbols = xrealloc(e->symbols, e->capacity * sizeof *e->symbols);
        e->heap = xrealloc(e->heap, 3 * e->capacity * sizeof *e->heap);  // n pairs, and two new ones a merge
    }
    for (size_t i = 0; i < n; i++)
        e->symbols[i] = (struct symbol){t->byte_token[(uint8_t)word[i]], (int)i - 1, i + 1 < n ? (int)i + 1 : -1};
    e->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++) consider_pair(e, (int)i);
    while (e->n_heap) {
        struct candidate c = heap_pop(e);
        struct symbol *left = &e->symbols[c.at];
        if (left->id != c.left || left->next < 0 || e->symbols[left->next].id != c.right) continue;  // no longer stands
        struct symbol *right = &e->symbols[left->next];
        left->id = merge_slot(t, c.left, c.right)->result;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) e->symbols[left->next].prev = c.at;
        consider_pair(e, left->prev);
        consider_pair(e, c.at);
    }
    for (int i = 0; i >= 0; i = e->symbols[i].next) {
        int32_t id = e->symbols[i].id >= 0 ? e->symbols[i].id : t->unknown;
        if (id >= 0) ids_add(e->out, id);
    }
}

// ---- Pre-tokenisation ----

// Length of the first match of GPT-2's expression at s:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static size_t gpt2_word(const char *s, size_t n) {
    if (s[0] == '\'' && n > 1) {
        if (strchr("stmd", s[1]) && s[1]) return 2;
        if (n > 2 && (memcmp(s + 1, "re", 2) == 0 || memcmp(s + 1, "ve", 2) == 0 || memcmp(s + 1, "ll", 2) == 0)) return 3;
    }
    const unsigned classes = UC_LETTER | UC_NUMBER | UC_SPACE;
    uint32_t cp;
    size_t i = s[0] == ' ' && n > 1 ? 1 : 0, next = i + (size_t)utf8_decode(s + i, n - i, &cp);
    unsigned class = unicode_class(cp) & classes;
    if (!(class & UC_SPACE)) {
        while (next < n) {
            size_t len = (size_t)utf8_decode(s + next, n - next, &cp);
            if ((unicode_class(cp) & classes) != class) break;
            next += len;
        }
        return next;
    }
    // A run of white space leaves its last character to the word behind it, unless it is alone or ends the text.
    size_t last = 0, count = 0;
    for (i = 0; i < n; i += next) {
        next = (size_t)utf8_decode(s + i, n - i, &cp);
        if (!(unicode_class(cp) & UC_SPACE)) return count > 1 ? last : i;
        last = i;
        count++;
    }
    return n;
}

// FalconMamba cuts words once more, where digits meet other bytes and after every third digit. It does so after bytes
// were written in GPT-2's alphabet, where six Latin-1 characters that stand for bytes count as digits.
static void encode_falcon_word(struct encoder *e, const char *s, size_t n) {
    size_t start = 0;
    bool in_number = false;
    int digits = 0;         // ASCII digits since `start`, all of them so far
    for (size_t i = 0; i < n; i++) {
        uint8_t b = (uint8_t)s[i];
        bool digit = b >= '0' && b <= '9', number = digit || b == 0xb2 || b == 0xb3 || b == 0xb9 || (b >= 0xbc && b <= 0xbe);
        if (i > start && number != in_number) {
            encode_word(e, s + start, i - start);
            start = i;
            digits = 0;
        }
        in_number = number;
        digits = digit ? digits + 1 : 0;
        if (digits == 3) {  // the first three in a row, wherever they begin, stand alone
            if (i - 2 > start) encode_word(e, s + start, i - 2 - start);
            encode_word(e, s + i - 2, 3);
            start = i + 1;
            digits = 0;
        }
    }
    if (start < n) encode_word(e, s + start, n - start);
}

static void encode_words(struct encoder *e, const char *s, size_t n) {
    while (n) {
        size_t word = gpt2_word(s, n);
        if (e->t->falcon) encode_falcon_word(e, s, word);
        else encode_word(e, s, word);
        s += word;
        n -= word;
    }
}

// FalconMamba separates runs of punctuation before anything else.
static void encode_falcon(struct encoder *e, const char *s, size_t n) {
    for (size_t start = 0, i = 0; start < n; start = i) {
        bool punctuation = false;
        for (size_t len; i < n; i += len) {
            uint32_t cp;
            len = (size_t)utf8_decode(s + i, n - i, &cp);
            bool p = unicode_class(cp) & UC_PUNCT;
            if (i > start && p != punctuation) break;
            punctuation = p;
        }
        encode_words(e, s + start, i - start);
    }
}

// The token of a letter, or the one for what is unknown, or -1.
static int32_t letter_token(const struct tokenizer *t, uint8_t letter) {
    return t->byte_token[letter] >= 0 ? t->byte_token[letter] : t->unknown;
}

// A letter of DNA as models spell it: upper case, T for the U of RNA, and N for what is known in part (the IUPAC codes); 0 for
// white space, -1 for anything else. Lower case, which marks repeats, is upper case unless it is kept.
static int nucleotide(uint8_t c, bool keep_case) {
    if (c == 'U' || c == 'u') c--;
    if (c && strchr("ACGTN", c)) return c;
    if (c && strchr("acgtn", c)) return keep_case ? c : c - 'a' + 'A';
    if (c && strchr("RYSWKMBDHVryswkmbdhv", c)) return 'N';
    return isspace(c) ? 0 : -1;
}

// What is no letter of DNA stays, and becomes the unknown token.
static void normalize_nucleotides(const struct tokenizer *t, const char *s, size_t n, struct buffer *out) {
    for (size_t i = 0; i < n; i++) {
        int c = nucleotide((uint8_t)s[i], t->keep_case);
        char letter = c < 0 ? s[i] : (char)c;
        if (c) buffer_add(out, &letter, 1);
    }
}

// A vocabulary without merges: whole characters, else their bytes, else the unknown token.
static void encode_characters(struct encoder *e, const char *s, size_t n) {
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t cp;
        len = (size_t)utf8_decode(s + i, n - i, &cp);
        int32_t id = *token_slot(e->t, (struct str){s + i, len});
        for (size_t b = 0; id < 0 && b < len; b++)
            if (e->t->byte_token[(uint8_t)s[i + b]] < 0) id = e->t->unknown;
        if (id >= 0) ids_add(e->out, id);
        else for (size_t b = 0; b < len; b++) {
            int32_t byte = e->t->byte_token[(uint8_t)s[i + b]];
            if (byte >= 0) ids_add(e->out, byte);
        }
    }
}

// The longest added token of this type at s, or -1.
static int32_t added_token_at(const struct tokenizer *t, enum token_type type, const char *s, size_t n) {
    if (!t->added_first[(uint8_t)s[0]]) return -1;
    for (int i = 0; i < t->n_added; i++) {
        struct str a = t->token[t->added[i]];
        if (t->type[t->added[i]] == type && a.n <= n && memcmp(a.p, s, a.n) == 0) return t->added[i];
    }
    return -1;
}

// Cuts s at added tokens of one type and hands what lies between to `rest`.
static void encode_around(struct encoder *e, enum token_type type, const char *s, size_t n,
                          void (*rest)(struct encoder *, const char *, size_t)) {
    size_t start = 0;
    for (size_t i = 0; i < n;) {
        int32_t id = added_token_at(e->t, type, s + i, n - i);
        if (id < 0) {
            i++;
            continue;
        }
        if (i > start) rest(e, s + start, i - start);
        ids_add(e->out, id);
        start = i += e->t->token[id].n;
    }
    if (n > start) rest(e, s + start, n - start);
}

static void encode_plain(struct encoder *e, const char *s, size_t n) {
    if (e->t->characters) encode_characters(e, s, n);
    else if (e->t->falcon) encode_falcon(e, s, n);
    else encode_words(e, s, n);
}

// Special tokens are cut out of the raw text; other added tokens, such as runs of spaces, out of the normalised text.
static void encode_normalized(struct encoder *e, const char *s, size_t n) {
    struct buffer normal = {0};
    if (e->t->nucleotides) normalize_nucleotides(e->t, s, n, &normal);
    else if (e->t->nfc) normal.p = nfc(s, n, &normal.n);
    if (normal.p || e->t->nucleotides) s = normal.p, n = normal.n;
    encode_around(e, TOKEN_USER_DEFINED, s, n, encode_plain);
    free(normal.p);
}

// What is not UTF-8 becomes U+FFFD, as it would on its way into any Unicode string; a character vocabulary keeps bytes.
static void repair_utf8(const char *s, size_t n, struct buffer *out) {
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t cp;
        char utf8[4];
        len = (size_t)utf8_decode(s + i, n - i, &cp);
        if (cp == UC_REPLACEMENT) buffer_add(out, utf8, (size_t)utf8_encode(cp, utf8));
        else buffer_add(out, s + i, len);
    }
}

// Appends the ids of a text. parse_special: the names of control tokens in the text become those tokens.
static void tokenize(const struct tokenizer *t, const char *s, size_t n, bool parse_special, struct ids *out) {
    struct encoder e = {.t = t, .out = out};
    struct buffer repaired = {0};
    if (!t->characters) {
        repair_utf8(s, n, &repaired);
        s = repaired.p;
        n = repaired.n;
    }
    if (parse_special) encode_around(&e, TOKEN_CONTROL, s, n, encode_normalized);
    else if (n) encode_normalized(&e, s, n);
    free(e.symbols);
    free(e.heap);
    free(repaired.p);
}

// ---- Text on its way out ----

// Bytes at the end of s that begin a character which later bytes may complete.
static size_t incomplete_tail(const char *s, size_t n) {
    for (size_t tail = 1; tail <= 3 && tail <= n; tail++) {
        uint8_t b = (uint8_t)s[n - tail];
        if ((b & 0xc0) == 0x80) continue;
        uint32_t cp;
        size_t size = b >= 0xf0 ? 4 : b >= 0xe0 ? 3 : b >= 0xc2 ? 2 : 1;
        bool begins = (size_t)utf8_decode(s + n - tail, tail, &cp) == tail;
        return b < 0xf5 && size > tail && begins ? tail : 0;
    }
    return 0;
}

struct emitter {            // turns tokens into text that is whole at every flush, and watches for stop texts
    struct buffer *to;
    struct buffer held;     // owned: not written yet
    const struct str *stops;  // [n_stops]
    int n_stops;
    bool stopped;           // a stop text came: nothing more is written
};

static void emit_bytes(struct emitter *e, size_t n) {
    repair_utf8(e->held.p, n, e->to);
    memmove(e->held.p, e->held.p + n, e->held.n -= n);
}

// Where the first stop text begins in the held bytes, or where one may begin that is not whole yet.
static size_t find_stop(struct emitter *e) {
    size_t partial = e->held.n;
    for (size_t i = 0; i < e->held.n; i++)
        for (int s = 0; s < e->n_stops; s++) {
            size_t n = e->stops[s].n, left = e->held.n - i;
            if (memcmp(e->held.p + i, e->stops[s].p, n < left ? n : left) != 0) continue;
            e->stopped = n <= left;
            if (e->stopped) return i;
            if (partial > i) partial = i;
        }
    return partial;
}

static void emit(struct emitter *e, struct str text) {
    buffer_add(&e->held, text.p, text.n);
    size_t n = find_stop(e);
    if (!e->stopped) {
        size_t tail = incomplete_tail(e->held.p, e->held.n);
        if (e->held.n - tail < n) n = e->held.n - tail;
    }
    if (n) emit_bytes(e, n);
}

// ====================================================================================================================
// 9. Sampler.
// From logits to a token. Candidates pass, as in llama.cpp, the repeat penalty, top-k, top-p, min-p and the temperature.
// Calls sections 1, 4, 7 and 8; called by section 14.
// ====================================================================================================================

struct sampling {
    float temperature, top_p, min_p, repeat_penalty;
    int top_k, repeat_last_n;
    uint64_t seed;
};

struct choice {
    float logit, p;
    int32_t id;
};

struct token_logprob {
    int32_t id;
    double logprob;         // NaN: nothing came before it
};

struct sampler {            // what drawing a token works on; owner of choices and p
    const struct kernels *k;
    struct choice *choices;  // [n_vocab]
    float *p;               // [n_vocab]
    int n_vocab;
};

// A number in [0, 1) for position t: a function of seed and t alone, so that a resumed or batched sequence draws what an
// uninterrupted one draws. (SplitMix64: mix64() over a Weyl sequence in t, started at a mix of the seed.)
static double random_at(uint64_t seed, int64_t t) {
    uint64_t start = mix64(seed + UINT64_C(0x9e3779b97f4a7c15));
    return (double)(mix64(start + (uint64_t)t * UINT64_C(0x9e3779b97f4a7c15)) >> 11) * 0x1p-53;
}

// The higher logit first; of equal ones the lower id, so that the order is total.
static int better_first(const void *a, const void *b) {
    const struct choice *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

// The k best of n choices to the front, in order: a heap with the worst of the best on top.
static void select_best(struct choice *c, int n, int k) {
    for (int i = 1; i < n; i++) {
        if (i < k) {  // sift up
            int at = i;
            struct choice moving = c[i];
            for (; at && better_first(&c[(at - 1) / 2], &moving) < 0; at = (at - 1) / 2) c[at] = c[(at - 1) / 2];
            c[at] = moving;
            continue;
        }
        if (better_first(&c[i], &c[0]) > 0) continue;
        int at = 0;
        struct choice moving = c[i];
        for (int child; (child = 2 * at + 1) < k; at = child) {
            if (child + 1 < k && better_first(&c[child], &c[child + 1]) < 0) child++;
            if (better_first(&c[child], &moving) < 0) break;
            c[at] = c[child];
        }
        c[at] = moving;
    }
    qsort(c, (size_t)k, sizeof *c, better_first);
}

static void best_to_front(struct choice *c, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (c[i].logit > c[best].logit) best = i;
    const struct choice first = c[0];
    c[0] = c[best];
    c[best] = first;
}

// p = softmax over the first n choices, in float; returns the sum in double, added in order.
static double choice_probabilities(struct sampler *s, int n, float scale) {
    for (int i = 0; i < n; i++) s->p[i] = s->choices[i].logit * scale;
    s->k->exp_minus(s->p, n, s->choices[0].logit * scale, s->p);
    double sum = 0;
    for (int i = 0; i < n; i++) sum += s->choices[i].p = s->p[i];
    return sum;
}

// So cold that nothing but the likeliest token has a chance, and 1/T could overflow.
static bool is_greedy(const struct sampling *how) { return how->temperature < 1e-5f; }

// Every token, as the logits [n_vocab] have it.
static void list_choices(struct sampler *s, const float *logits) {
    for (int32_t id = 0; id < s->n_vocab; id++) s->choices[id] = (struct choice){logits[id], 0, id};
}

// The token at position t, from logits [n_vocab]; -1 when none is left to choose from. banned: tokens that are not drawn.
static int32_t sample(struct sampler *s, const struct sampling *how, const float *logits, const struct ids *banned,
                      const struct resume *past, int64_t t) {
    struct choice *c = s->choices;
    int from = past->n_recent > how->repeat_last_n ? past->n_recent - how->repeat_last_n : 0, n = 0;
    list_choices(s, logits);
    for (size_t i = 0; i < banned->n; i++) c[banned->p[i]].logit = -INFINITY;
    for (int i = from; i < past->n_recent && how->repeat_penalty != 1.0f; i++) {
        struct choice *again = &c[past->recent[i]];
        if (again->p == 0)
            again->logit = again->logit > 0 ? again->logit / how->repeat_penalty : again->logit * how->repeat_penalty;
        again->p = 1;  // a token is penalised once, however often it came
    }
    for (int32_t id = 0; id < s->n_vocab; id++)
        if (c[id].logit > -INFINITY) c[n++] = c[id];
    if (n == 0) return -1;
    const bool greedy = is_greedy(how);
    int k = greedy ? 1 : how->top_k > 0 ? min_int(how->top_k, n) : n;
    if (k == n && how->top_p >= 1 && !(how->min_p > 0)) best_to_front(c, n);  // all may be drawn: no order is needed
    else select_best(c, n, k);
    if (greedy) return c[0].id;

    if (how->top_p < 1.0f) {
        double limit = choice_probabilities(s, k, 1.0f) * (double)how->top_p, sum = 0;
        int kept = 0;
        while (kept < k && (kept == 0 || sum < limit)) sum += c[kept++].p;
        k = kept;
    }
    if (how->min_p > 0) {
        choice_probabilities(s, k, 1.0f);  // relative to the best, whose exp(0) is 1
        int kept = 1;
        while (kept < k && c[kept].p >= how->min_p) kept++;
        k = kept;
    }
    double target = choice_probabilities(s, k, 1.0f / how->temperature) * random_at(how->seed, t), sum = 0;
    for (int i = 0; i < k; i++) {
        sum += c[i].p;
        if (target < sum) return c[i].id;
    }
    return c[k - 1].id;
}

// log p(token) = logit - max - log sum exp(logit - max). Sixteen sums in double, so that their order is fixed. The n_top
// likeliest tokens go to top, the best first, with their log-probability in p.
static double log_probability(struct sampler *s, const float *logits, float max, int32_t token, int n_top,
                              struct token_logprob *top) {
    double lanes[16] = {0}, sum = 0;
    s->k->exp_minus(logits, s->n_vocab, max, s->p);
    for (int i = 0; i < s->n_vocab; i++) lanes[i % 16] += s->p[i];
    for (int i = 0; i < 16; i++) sum += lanes[i];
    const double log_sum = log(sum);
    n_top = min_int(n_top, s->n_vocab);
    if (n_top > 0) {
        list_choices(s, logits);
        select_best(s->choices, s->n_vocab, n_top);
        for (int i = 0; i < n_top; i++)
            top[i] = (struct token_logprob){s->choices[i].id, (double)(s->choices[i].logit - max) - log_sum};
    }
    return (double)(logits[token] - max) - log_sum;
}

static struct sampler sampler_new(const struct kernels *k, int n_vocab) {
    return (struct sampler){k, xmalloc((size_t)n_vocab * sizeof(struct choice)), xmalloc((size_t)n_vocab * sizeof(float)), n_vocab};
}

static void sampler_free(struct sampler *s) {
    free(s->choices);
    free(s->p);
}

// ====================================================================================================================
// 10. JSON.
// Reads a line's values in place and appends values to a buffer (RFC 8259). Calls sections 1 and 8; called by sections 13
// and 14 and by bench.
// ====================================================================================================================

struct json {               // cursor over a text that changes under it: strings are decoded where they stand
    char *p;
    const char *start, *end;
    struct error *error;    // the first error stays
};

// The first byte of what comes next, or -1 at the end.
static int json_peek(struct json *j) {
    while (j->p < j->end && strchr(" \t\r\n", *j->p) && *j->p) j->p++;
    return j->p < j->end ? (uint8_t)*j->p : -1;
}

static bool json_take(struct json *j, char c) {
    if (json_peek(j) != (uint8_t)c) return false;
    j->p++;
    return true;
}

static bool json_fail(struct json *j, const char *expected) {
    if (j->p >= j->end) return fail(j->error, "the line ends where %s was expected", expected);
    return fail(j->error, "column %td: expected %s", j->p - j->start + 1, expected);
}

// Takes c, or fails: `what` says what was expected.
static bool json_expect(struct json *j, char c, const char *what) { return json_take(j, c) || json_fail(j, what); }

static bool json_word(struct json *j, const char *word) {
    size_t n = strlen(word);
    if (json_peek(j) < 0 || (size_t)(j->end - j->p) < n || memcmp(j->p, word, n) != 0) return false;
    j->p += n;
    return true;
}

// Four hexadecimal digits, or -1.
static int32_t json_hex(const struct json *j, const char *p) {
    int32_t v = 0;
    for (int i = 0; i < 4; i++) {
        if (p + i >= j->end || !isxdigit((uint8_t)p[i])) return -1;
        int digit = tolower((uint8_t)p[i]);
        v = v * 16 + (digit > '9' ? digit - 'a' + 10 : digit - '0');
    }
    return v;
}

// One escape at j->p, decoded to *to: never longer than it was. Half a surrogate pair becomes U+FFFD.
static bool json_escape(struct json *j, char **to) {
    const char *known = "\"\\/bfnrt", *means = "\"\\/\b\f\n\r\t", *at;
    char c = j->p + 1 < j->end ? j->p[1] : 0;
    if (c && (at = strchr(known, c))) {
        *(*to)++ = means[at - known];
        j->p += 2;
        return true;
    }
    int32_t cp = c == 'u' ? json_hex(j, j->p + 2) : -1;
    if (cp < 0) return json_fail(j, "an escape such as \\n or \\u00e9");
    j->p += 6;
    if (cp >= 0xd800 && cp < 0xe000) {
        int32_t low = cp < 0xdc00 && j->end - j->p >= 6 && j->p[0] == '\\' && j->p[1] == 'u' ? json_hex(j, j->p + 2) : -1;
        bool pair = low >= 0xdc00 && low < 0xe000;
        if (pair) j->p += 6;
        cp = pair ? 0x10000 + ((cp - 0xd800) << 10) + (low - 0xdc00) : (int32_t)UC_REPLACEMENT;
    }
    *to += utf8_encode((uint32_t)cp, *to);
    return true;
}

static bool json_string(struct json *j, struct str *out) {
    if (!json_expect(j, '"', "a string")) return false;
    char *to = j->p;
    *out = (struct str){to, 0};
    while (j->p < j->end && *j->p != '"') {
        if ((uint8_t)*j->p < 32) return json_fail(j, "no control character inside a string (write \\n, \\t, \\u0001)");
        if (*j->p == '\\') {
            if (!json_escape(j, &to)) return false;
        } else {
            *to++ = *j->p++;
        }
    }
    out->n = (size_t)(to - out->p);
    return json_expect(j, '"', "the quote that ends a string");
}

// The digits of a number, as they stand.
static bool json_number(struct json *j, struct str *out) {
    json_peek(j);
    char *from = j->p, *p = from;
#define DIGITS for (digits = p; p < j->end && isdigit((uint8_t)*p); p++)
    const char *digits;
    if (p < j->end && *p == '-') p++;
    DIGITS;
    bool ok = p > digits && !(*digits == '0' && p > digits + 1);
    if (ok && p < j->end && *p == '.') {
        p++;
        DIGITS;
        ok = p > digits;
    }
    if (ok && p < j->end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < j->end && (*p == '+' || *p == '-')) p++;
        DIGITS;
        ok = p > digits;
    }
#undef DIGITS
    if (!ok) return json_fail(j, "a number");
    j->p = p;
    *out = (struct str){from, (size_t)(p - from)};
    return true;
}

// Walks over one value of any kind.
static bool json_skip(struct json *j, int depth) {
    struct str ignored;
    int c = json_peek(j);
    if (depth > 64) return json_fail(j, "no more than 64 levels");
    if (c == '"') return json_string(j, &ignored);
    if (c == '{' || c == '[') {
        const char close = c == '{' ? '}' : ']';
        j->p++;
        if (json_take(j, close)) return true;
        do {
            if (c == '{' && (!json_string(j, &ignored) || !json_expect(j, ':', "a colon"))) return false;
            if (!json_skip(j, depth + 1)) return false;
        } while (json_take(j, ','));
        return json_expect(j, close, "a comma or the end of the list");
    }
    if (json_word(j, "true") || json_word(j, "false") || json_word(j, "null")) return true;
    return json_number(j, &ignored);
}

// Writes s as a string; what is not UTF-8 becomes U+FFFD.
static void add_json_string(struct buffer *b, struct str s) {
    buffer_add(b, "\"", 1);
    for (size_t i = 0, n; i < s.n; i += n) {
        uint32_t cp;
        char utf8[4];
        n = (size_t)utf8_decode(s.p + i, s.n - i, &cp);
        if (cp == '"' || cp == '\\') buffer_printf(b, "\\%c", (char)cp);
        else if (cp == '\n' || cp == '\t' || cp == '\r') buffer_printf(b, "\\%c", cp == '\n' ? 'n' : cp == '\t' ? 't' : 'r');
        else if (cp < 32) buffer_printf(b, "\\u%04x", (unsigned)cp);
        else if (cp == UC_REPLACEMENT) buffer_add(b, utf8, (size_t)utf8_encode(cp, utf8));
        else buffer_add(b, s.p + i, n);
    }
    buffer_add(b, "\"", 1);
}

// JSON has no word for infinity and what is not a number.
static void add_json_number(struct buffer *b, double v) {
    if (isfinite(v)) buffer_printf(b, "%.6f", v);
    else buffer_printf(b, "null");
}

// ====================================================================================================================
// 11. Genomes: FASTA, BED, VCF.
// Reads records of nucleotides from a file or a pipe of any size, a piece at a time: many lines or one, line ends of any
// kind, white space inside. From a file whose lines are equally long, regions too. Lines of BED and VCF name such regions.
// Calls sections 1 and 8; called by sections 13 to 15.
// ====================================================================================================================

struct fasta_record {       // where a record lies in its file; owner of name
    char *name;
    int64_t n_bases, offset;  // of its first base, in bytes
    int64_t line_bases, line_bytes;  // of each line but the last, without and with its end
    bool irregular;         // its lines differ: a base's place cannot be computed
    bool twice;             // another one has its name
};

struct fasta {              // a file being read; owner of f, name and records
    FILE *f;
    const char *path;
    uint8_t chunk[1 << 16];
    size_t at, n;           // chunk[at] to chunk[n - 1] are not consumed yet
    int64_t n_read;         // bytes of the file, up to chunk[n]
    bool line_begins;       // with chunk[at]
    bool started;           // a record has begun
    bool keep_case;
    char *name;             // of the record: the first word of its line, or its number
    int64_t n_records, n_bases;  // records begun; bases of this one, or of its region, handed out
    int64_t origin, n_left; // of a region: where in the record it begins, from 0; its bases still to come
    bool in_region;
    struct fasta_record *records;  // [n_indexed] by name, once fasta_index() was called
    size_t n_indexed;
};

// The next byte, which is not consumed, or EOF.
static int fasta_peek(struct fasta *fa) {
    if (fa->at == fa->n) {
        fa->at = 0;
        fa->n = fread(fa->chunk, 1, sizeof fa->chunk, fa->f);
        fa->n_read += (int64_t)fa->n;
    }
    return fa->n ? fa->chunk[fa->at] : EOF;
}

static int fasta_byte(struct fasta *fa) {
    int c = fasta_peek(fa);
    if (c == EOF) return EOF;
    fa->at++;
    fa->line_begins = c == '\n' || c == '\r';
    return c;
}

static bool fasta_open(struct fasta *fa, const char *path, bool keep_case, struct error *e) {
    *fa = (struct fasta){.f = input_open(path, e), .path = input_name(path), .keep_case = keep_case, .line_begins = true};
    if (!fa->f) return false;
    const off_t at = ftello(fa->f);  // of a pipe -1
    fa->n_read = at > 0 ? at : 0;
    fasta_peek(fa);
    if (is_gzip(fa->chunk, fa->n))
        return fail(e, "%s is compressed; use: zcat FILE | mamba ... --fasta -, or for --bed and --vcf: zcat FILE > genome.fa",
                    fa->path);
    fa->at = byte_order_mark(fa->chunk, fa->n);
    return true;
}

static void fasta_close(struct fasta *fa) {
    input_close(fa->f);
    free(fa->name);
    for (size_t i = 0; i < fa->n_indexed; i++) free(fa->records[i].name);
    free(fa->records);
    *fa = (struct fasta){0};
}

// A byte as an error names it.
static const char *show_byte(int c, char to[16]) {
    snprintf(to, 16, isprint(c) ? "'%c'" : "byte %d", c);
    return to;
}

// Goes on to the next record, over what is left of this one. False at the end of the file, or with an error.
static bool fasta_next(struct fasta *fa, struct error *e) {
    int c;
    char shown[16];
    while ((c = fasta_peek(fa)) != EOF && !(fa->line_begins && c == '>')) {
        if (!fa->started && fa->line_begins && c == ';') {  // a comment, as the oldest files have them
            while (fasta_byte(fa) != EOF && !fa->line_begins) {}
        } else if (!fa->started && c != '\n' && c != '\r') {
            return fail(e, "%s begins with %s; expected '>' and the name of a record", fa->path, show_byte(c, shown));
        } else {
            fasta_byte(fa);
        }
    }
    if (ferror(fa->f)) return fail(e, "%s: %s", fa->path, strerror(errno));
    if (c == EOF) return false;
    struct buffer name = {0};
    bool ended = false;
    fasta_byte(fa);
    while ((c = fasta_byte(fa)) != EOF && !fa->line_begins) {
        ended |= isspace(c) && name.n;
        if (!isspace(c) && !ended) buffer_add(&name, &(char){(char)c}, 1);
    }
    fa->started = true;
    fa->n_records++;
    fa->n_bases = 0;
    if (!name.n) buffer_printf(&name, "%" PRId64, fa->n_records);
    buffer_add(&name, "", 1);
    free(fa->name);
    fa->name = name.p;
    return true;
}

// Up to n bases of the record; fewer at its end or with an error.
static size_t fasta_read(struct fasta *fa, uint8_t *to, size_t n, struct error *e) {
    size_t got = 0;
    char shown[16];
    if (fa->in_region && (int64_t)n > fa->n_left) n = (size_t)fa->n_left;
    while (got < n) {
        int c = fasta_peek(fa);
        if (c == EOF || (fa->line_begins && c == '>')) break;
        fasta_byte(fa);
        int base = nucleotide((uint8_t)c, fa->keep_case);
        if (base < 0) {
            set_error(e, "%s: record %s: %s at base %" PRId64 "; expected A, C, G, T, N or an IUPAC code", fa->path, fa->name,
                      show_byte(c, shown), fa->origin + fa->n_bases + (int64_t)got + 1);
            break;
        }
        if (base) to[got++] = (uint8_t)base;
    }
    if (ferror(fa->f)) set_error(e, "%s: %s", fa->path, strerror(errno));
    else if (fa->in_region && got < n) set_error(e, "%s: record %s has changed while it was in use", fa->path, fa->name);
    fa->n_bases += (int64_t)got;
    fa->n_left -= (int64_t)got;
    return got;
}

// ---- Regions ----

struct fasta_line {         // of a record being indexed
    int64_t bytes, blanks;  // its length so far, and the white space at its end
    uint8_t last;           // byte of it
    bool must_be_last;      // a line of the record was shorter than its first one, or ended in another way
};

// A line of bases has ended, in n_end bytes '\n' (0: with the file). Blanks at its end are as much of the end as '\r' is.
static void fasta_line_ends(struct fasta_record *r, struct fasta_line *line, int n_end) {
    const int64_t bases = line->bytes - line->blanks, bytes = line->bytes + n_end;
    if (!r->line_bytes) {
        r->line_bases = bases;
        r->line_bytes = bytes;
    }
    if (bases && (line->must_be_last || bases > r->line_bases)) r->irregular = true;
    line->must_be_last |= bases < r->line_bases || bytes != r->line_bytes;
    r->n_bases += bases;
    line->bytes = line->blanks = 0;
}

// Some bytes of a line. False: there is a '\r' inside, where fasta_next() would have a line begin.
static bool fasta_line_goes_on(struct fasta_record *r, struct fasta_line *line, const uint8_t *p, size_t n) {
    size_t letters = n;
    while (letters && isspace(p[letters - 1])) letters--;
    if (n && ((line->bytes && line->last == '\r') || memchr(p, '\r', n - 1))) return false;
    r->irregular |= letters && line->blanks;
    for (const char *blank = " \t\v\f"; *blank; blank++) r->irregular |= memchr(p, *blank, letters) != NULL;
    line->blanks = (int64_t)(n - letters) + (letters ? 0 : line->blanks);
    line->bytes += (int64_t)n;
    if (n) line->last = p[n - 1];
    return true;
}

// What chunk holds of the line at hand.
static bool fasta_index_bytes(struct fasta *fa, struct fasta_record *r, struct fasta_line *line) {
    const uint8_t *from = fa->chunk + fa->at, *end = memchr(from, '\n', fa->n - fa->at);
    const size_t n = end ? (size_t)(end - from) : fa->n - fa->at;
    if (!fasta_line_goes_on(r, line, from, n)) return false;
    fa->at += n + (end != NULL);
    fa->line_begins = end != NULL;
    if (end) fasta_line_ends(r, line, 1);
    return true;
}

static int by_record_name(const void *a, const void *b) {
    return strcmp(((const struct fasta_record *)a)->name, ((const struct fasta_record *)b)->name);
}

// Reads the whole file once and notes where its records lie, as a .fai of samtools does.
static bool fasta_index(struct fasta *fa, struct error *e) {
    struct fasta_line line = {0};
    const char *old_mac = "%s has lines that end as on old Macs; use: tr '\\r' '\\n' < FILE";
    if (fseeko(fa->f, 0, SEEK_CUR) != 0)
        return fail(e, "%s is a pipe; regions and variants need a file that can be read at any place", fa->path);
    while (fasta_peek(fa) != EOF) {
        struct fasta_record *r = fa->n_indexed ? &fa->records[fa->n_indexed - 1] : NULL;
        if (r && !(fa->line_begins && fasta_peek(fa) == '>')) {
            if (!fasta_index_bytes(fa, r, &line)) return fail(e, old_mac, fa->path);
            continue;
        }
        if (!fasta_next(fa, e)) break;
        if (fa->n && fa->chunk[fa->at - 1] == '\r') {  // fasta_next() took a byte: there is one before `at`
            if (fasta_peek(fa) != '\n') return fail(e, old_mac, fa->path);
            fasta_byte(fa);
        }
        if ((fa->n_indexed & (fa->n_indexed - 1)) == 0)  // room for twice as many
            fa->records = xrealloc(fa->records, (fa->n_indexed ? 2 * fa->n_indexed : 1) * sizeof *fa->records);
        fa->records[fa->n_indexed++] = (struct fasta_record){.name = fa->name, .offset = fa->n_read - (int64_t)(fa->n - fa->at)};
        fa->name = NULL;
        line = (struct fasta_line){0};
    }
    if (line.bytes) fasta_line_ends(&fa->records[fa->n_indexed - 1], &line, 0);
    if (ferror(fa->f)) set_error(e, "%s: %s", fa->path, strerror(errno));
    if (fa->n_indexed) qsort(fa->records, fa->n_indexed, sizeof *fa->records, by_record_name);
    for (size_t i = 1; i < fa->n_indexed; i++)
        if (by_record_name(&fa->records[i - 1], &fa->records[i]) == 0) fa->records[i - 1].twice = fa->records[i].twice = true;
    return !e->text[0];
}

// The record of a name, whose regions can be read; NULL, with an error: there is none.
static const struct fasta_record *fasta_find(const struct fasta *fa, struct str name, struct error *e) {
    const struct fasta_record key = {.name = copy_text(name)};
    const struct fasta_record *r =
        fa->n_indexed ? bsearch(&key, fa->records, fa->n_indexed, sizeof key, by_record_name) : NULL;
    free(key.name);
    if (!r) set_error(e, "%s has no record %.*s", fa->path, str_show(name), name.p);
    else if (r->twice) set_error(e, "%s: two records have the name %s; a region would be of either", fa->path, r->name);
    else if (r->irregular)
        set_error(e, "%s: record %s: its lines differ in length or have blanks inside, regions need lines of one length "
                  "(seqkit seq -w 60)", fa->path, r->name);
    return e->text[0] ? NULL : r;
}

// fasta_read() will read bases begin (from 0) to end, which are inside the record.
static bool fasta_seek(struct fasta *fa, const struct fasta_record *r, int64_t begin, int64_t end, struct error *e) {
    off_t at = r->line_bases ? r->offset + begin / r->line_bases * r->line_bytes + begin % r->line_bases : r->offset;
    if (fseeko(fa->f, at, SEEK_SET) != 0) return fail(e, "%s: %s", fa->path, strerror(errno));
    fa->at = fa->n = 0;
    fa->line_begins = false;
    fa->in_region = true;
    fa->n_bases = 0;
    fa->origin = begin;
    fa->n_left = end - begin;
    free(fa->name);
    fa->name = copy_text(str_of(r->name));
    return true;
}

// ---- Lines of BED and VCF ----

// Cuts a line at tabs, or (spaces) at white space. Returns the number of its fields; the first max of them are in f.
static int split_line(const char *p, size_t n, bool spaces, struct str *f, int max) {
    int count = 0;
    for (size_t i = 0; i <= n;) {
        while (spaces && i < n && (p[i] == ' ' || p[i] == '\t')) i++;
        if (spaces && i == n) break;
        size_t from = i;
        while (i < n && p[i] != '\t' && !(spaces && p[i] == ' ')) i++;
        if (count < max) f[count] = (struct str){p + from, i - from};
        count++;
        i++;
    }
    return count;
}

static bool is_blank(struct str line) {
    size_t i = 0;
    while (i < line.n && (line.p[i] == ' ' || line.p[i] == '\t' || line.p[i] == '\r')) i++;
    return i == line.n;
}

// Comments and what tells a browser how to draw.
static bool bed_is_comment(struct str line) {
    struct str first;
    if (split_line(line.p, line.n, true, &first, 1) == 0) return true;
    return first.p[0] == '#' || str_is(first, "track") || str_is(first, "browser");
}

// The first three columns of a line of BED: bases [begin, end) of a record, counted from 0. NULL, with an error: it names none.
static const struct fasta_record *bed_parse(const struct fasta *fa, struct str line, int64_t *begin, int64_t *end,
                                            struct error *e) {
    struct str f[3];
    uint64_t from, to;
    const bool has_tabs = line.n && memchr(line.p, '\t', line.n);  // then an empty column is one
    if (split_line(line.p, line.n, !has_tabs, f, 3) < 3)
        return set_error(e, "fewer than three columns; expected record, start and end"), NULL;
    if (!parse_u64(f[1], &from) || !parse_u64(f[2], &to) || from > to) {
        set_error(e, "start \"%.*s\" and end \"%.*s\"; expected two integers, the first not above the second", str_show(f[1]),
                  f[1].p, str_show(f[2]), f[2].p);
        return NULL;
    }
    const struct fasta_record *r = fasta_find(fa, f[0], e);
    const uint64_t n = r ? (uint64_t)r->n_bases : 0;
    if (r && (from > n || (from == n && to > n)))
        return set_error(e, "begins at base %" PRIu64 " of %s, which has %" PRIu64, from, r->name, n), NULL;
    *begin = (int64_t)(from < n ? from : n);
    *end = (int64_t)(to < n ? to : n);  // cut there, as samtools does
    return r;
}

// Letters that can be scored: no N, no symbolic allele <DEL>, no break end, no '*' or '.'.
static bool is_sequence(struct str allele) {
    bool letters = allele.n > 0;
    for (size_t i = 0; i < allele.n; i++) letters &= allele.p[i] && strchr("ACGTacgt", allele.p[i]);
    return letters;
}

enum { VCF_CHROM, VCF_POS, VCF_ID, VCF_REF, VCF_ALT, VCF_QUAL, VCF_FILTER, VCF_INFO, VCF_COLUMNS };

struct variant {            // a line of VCF, and what is found out about it; owner of all it points to
    char *line;
    size_t n_line;
    struct str column[VCF_COLUMNS];  // in line
    int64_t position;       // of REF's first base in the record, from 0; -1: before it, where a telomere is
    struct str *alleles;    // [n_alleles] in line, REF first
    int n_alleles;
    uint8_t *bases;         // [n_bases] the window of the record, whose bases `ref` and on are REF
    size_t n_bases, ref;
    double *nll;            // [n_alleles] of the window with each allele, in nats; NaN: the allele is no sequence
    const char *problem;    // why there is no ratio: a word for MAMBA_ERROR; NULL: there is one
    int n_parts;            // of its computation, that have not ended
};

static void variant_free(struct variant *v) {
    if (!v) return;
    free(v->line);
    free(v->alleles);
    free(v->bases);
    free(v->nll);
    free(v);
}

// The columns up to INFO, and the alleles.
static bool variant_parse(struct variant *v, struct str line, struct error *e) {
    struct str *c = v->column;
    uint64_t position;
    v->line = copy_text(line);
    v->n_line = line.n;
    const int n = split_line(v->line, line.n, false, c, VCF_COLUMNS);
    if (n < VCF_COLUMNS) return fail(e, "%d columns between tabs; expected 8 or more", n);
    for (int i = 0; i < VCF_COLUMNS; i++)
        if (!c[i].n) return fail(e, "column %d is empty", i + 1);
    if (!parse_u64(c[VCF_POS], &position) || position > INT64_MAX)
        return fail(e, "POS \"%.*s\"; expected an integer", str_show(c[VCF_POS]), c[VCF_POS].p);
    v->position = (int64_t)position - 1;
    const char *at = c[VCF_ALT].p, *end = at + c[VCF_ALT].n;
    int n_alleles = 1 + !(c[VCF_ALT].n == 1 && *at == '.');  // '.': there is no other allele
    for (const char *p = at; p < end; p++) n_alleles += *p == ',';
    v->alleles = xcalloc((size_t)n_alleles, sizeof *v->alleles);
    v->nll = xcalloc((size_t)n_alleles, sizeof *v->nll);
    v->alleles[v->n_alleles++] = c[VCF_REF];
    while (v->n_alleles < n_alleles) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        struct str allele = {at, (size_t)((comma ? comma : end) - at)};
        if (!is_sequence(allele)) v->nll[v->n_alleles] = (double)NAN;
        v->alleles[v->n_alleles++] = allele;
        at += allele.n + (comma != NULL);
    }
    return true;
}

// Appends the ratio of an allele's likelihood to the reference's, in nats.
static void add_ratio(struct buffer *out, const struct variant *v, int allele) {
    if (v->problem || isnan(v->nll[allele])) buffer_printf(out, ".");
    else buffer_printf(out, "%.6f", v->nll[0] - v->nll[allele]);
}

// A row of a table for each allele but REF.
static void add_variant_rows(struct buffer *out, const struct variant *v) {
    for (int i = 1; i < v->n_alleles; i++) {
        buffer_add(out, v->line, (size_t)(v->column[VCF_ALT].p - v->line));
        buffer_add(out, v->alleles[i].p, v->alleles[i].n);
        buffer_add(out, "\t", 1);
        add_ratio(out, v, i);
        buffer_printf(out, "\t%s\n", v->problem ? v->problem : ".");
    }
}

static const char *const vcf_entries[] = {"MAMBA_LLR", "MAMBA_ERROR"};  // of INFO

// Whether an entry of INFO, NAME=VALUE or NAME, is one of ours.
static bool is_our_entry(struct str entry) {
    bool ours = false;
    for (int k = 0; k < 2; k++) {
        const size_t n = strlen(vcf_entries[k]);
        ours |= str_begins(entry, vcf_entries[k]) && (entry.n == n || entry.p[n] == '=');
    }
    return ours;
}

// The line with our entries in INFO, in place of those of an earlier run.
static void add_variant_line(struct buffer *out, const struct variant *v) {
    const struct str info = v->column[VCF_INFO];
    const char *rest = info.p + info.n;
    buffer_add(out, v->line, (size_t)(info.p - v->line));
    const size_t begin = out->n;
    for (size_t i = 0, n; i < info.n; i += n + 1) {
        const char *end = memchr(info.p + i, ';', info.n - i);
        n = end ? (size_t)(end - info.p) - i : info.n - i;
        struct str entry = {info.p + i, n};
        if (!n || str_is(entry, ".") || is_our_entry(entry)) continue;
        if (out->n > begin) buffer_add(out, ";", 1);
        buffer_add(out, entry.p, n);
    }
    for (int i = 1; i < v->n_alleles; i++) {
        if (i == 1) buffer_printf(out, out->n > begin ? ";MAMBA_LLR=" : "MAMBA_LLR=");
        else buffer_add(out, ",", 1);
        add_ratio(out, v, i);
    }
    if (v->problem && v->n_alleles > 1) buffer_printf(out, ";MAMBA_ERROR=%s", v->problem);
    if (out->n == begin) buffer_add(out, ".", 1);
    buffer_add(out, rest, (size_t)(v->line + v->n_line - rest));
    buffer_add(out, "\n", 1);
}

// A line about the file goes on as it is; before the last of them stand those about our entries. Returns whether it is the last.
static bool add_vcf_header(struct buffer *out, struct str line) {
    static const char *const about[] = {
        "Number=A,Type=Float,Description=\"Log-likelihood of a window with this allele minus that with the "
        "reference, in nats, by mamba\"",
        "Number=1,Type=String,Description=\"Why MAMBA_LLR is missing\""};
    const bool is_last = str_begins(line, "#CHROM");
    bool is_ours = false;
    for (int i = 0; i < 2; i++) {
        char begin[32];
        snprintf(begin, sizeof begin, "##INFO=<ID=%s,", vcf_entries[i]);
        is_ours |= str_begins(line, begin);
        if (is_last) buffer_printf(out, "%s%s>\n", begin, about[i]);
    }
    if (is_ours) return false;
    buffer_add(out, line.p, line.n);
    buffer_add(out, "\n", 1);
    return is_last;
}

// A record in lines of 60 bases.
static void add_fasta_record(struct buffer *out, const char *name, const char *bases, size_t n) {
    buffer_printf(out, ">%s\n", name);
    for (size_t i = 0; i < n; i += 60) {
        buffer_add(out, bases + i, n - i < 60 ? n - i : 60);
        buffer_add(out, "\n", 1);
    }
}

static uint8_t complement(uint8_t base) {
    const char *letters = "ACGTacgt", *complements = "TGCAtgca", *at = strchr(letters, base);
    return base && at ? (uint8_t)complements[at - letters] : base;
}

static void reverse_complement(uint8_t *bases, size_t n) {
    for (size_t i = 0, j = n; i < j--; i++) {
        uint8_t first = complement(bases[i]);
        bases[i] = complement(bases[j]);
        bases[j] = first;
    }
}

// ====================================================================================================================
// 12. Sound: WAV and mu-law.
// A clip becomes codes from 0 to 255, which are the tokens of an audio model, and back. WAV files come from anywhere. Calls
// sections 1 and 7; called by sections 13 to 15.
// ====================================================================================================================

struct wav {                // a clip, all channels in one; owner of samples
    float *samples;         // [n] from -1 to 1
    size_t n;
    int sample_rate;
};

enum wav_coding { WAV_PCM = 1, WAV_FLOAT = 3, WAV_MU_LAW = 7, WAV_EXTENSIBLE = 0xfffe };

struct wav_format {
    unsigned coding, channels, bits, frame;  // frame: bytes of a sample of every channel
    uint32_t sample_rate;
};

// G.711's mu-law, which WAV calls by that name: a sign, three bits of exponent, four of mantissa, all inverted.
static float g711_decode(uint8_t byte) {
    const int code = ~byte & 0xff, magnitude = (((code & 15) << 3) + 132) << (code >> 4 & 7);
    return (float)(code & 128 ? 132 - magnitude : magnitude - 132) / 32768;
}

static uint8_t g711_encode(int sample) {
    const int magnitude = min_int(sample < 0 ? -sample : sample, 32635) + 132;
    int exponent = 7;
    while (exponent && !(magnitude >> (exponent + 7))) exponent--;
    return (uint8_t)~((sample < 0 ? 128 : 0) | exponent << 4 | (magnitude >> (exponent + 3) & 15));
}

// One sample of any format that wav_format_read() lets through.
static float wav_sample(const struct wav_format *f, const uint8_t *p) {
    union {
        uint32_t u;
        float f;
    } four;
    double wide;
    if (f->coding == WAV_MU_LAW) return g711_decode(*p);
    if (f->bits == 8) return ((float)*p - 128) / 128;  // the only unsigned one
    if (f->bits == 64) return memcpy(&wide, p, 8), (float)wide;
    four.u = f->bits == 16 ? (uint32_t)load_u16(p) << 16
           : f->bits == 24 ? (uint32_t)load_u16(p) << 8 | (uint32_t)p[2] << 24 : load_u32(p);
    return f->coding == WAV_FLOAT ? four.f : (float)((double)(int32_t)four.u / 2147483648.0);
}

static bool wav_format_read(struct wav_format *f, const uint8_t *p, size_t n, struct error *e) {
    if (n < 16) return fail(e, "its format has %zu bytes; expected 16 or more", n);
    *f = (struct wav_format){load_u16(p), load_u16(p + 2), load_u16(p + 14), load_u16(p + 12), load_u32(p + 4)};
    if (f->coding == WAV_EXTENSIBLE && n >= 26) f->coding = load_u16(p + 24);
    const bool known = (f->coding == WAV_PCM && (f->bits == 8 || f->bits == 16 || f->bits == 24 || f->bits == 32)) ||
                       (f->coding == WAV_FLOAT && (f->bits == 32 || f->bits == 64)) || (f->coding == WAV_MU_LAW && f->bits == 8);
    if (!known)
        return fail(e, "samples of coding %u with %u bits; expected PCM (8, 16, 24, 32), float (32, 64) or mu-law (8): sox can "
                    "convert it", f->coding, f->bits);
    if (!f->channels || !f->sample_rate || f->sample_rate > INT_MAX)
        return fail(e, "%u channels at %" PRIu32 " Hz", f->channels, f->sample_rate);
    const unsigned filled = f->bits / 8 * f->channels;
    return f->frame == filled || fail(e, "frames of %u bytes, but its samples fill %u: sox can convert it", f->frame, filled);
}

// The data chunk's frames, each the mean of its channels.
static bool wav_data_read(struct wav *w, const struct wav_format *f, const uint8_t *p, size_t n, struct error *e) {
    const size_t bytes = f->bits / 8;
    if (n % f->frame) return fail(e, "the last of its frames of %u bytes has %zu: is it cut off?", f->frame, n % f->frame);
    w->n = n / f->frame;
    w->sample_rate = (int)f->sample_rate;
    w->samples = xmalloc(w->n * sizeof *w->samples);
    for (size_t i = 0; i < w->n; i++) {
        double sum = 0;
        for (unsigned c = 0; c < f->channels; c++, p += bytes) sum += (double)wav_sample(f, p);
        w->samples[i] = (float)(sum / f->channels);
        if (!isfinite(w->samples[i])) return fail(e, "sample %zu is %g; expected a finite number", i, (double)w->samples[i]);
    }
    return true;
}

// A whole WAV file; w->samples is to be freed in any case. Writers into a pipe do not know its length, and put a very large one
// there, or 0: it then ends with the file.
static bool wav_parse(struct wav *w, const uint8_t *p, size_t n, struct error *e) {
    struct wav_format f = {0};
    *w = (struct wav){0};
    if (n < 12 || memcmp(p, "RIFF", 4) != 0 || memcmp(p + 8, "WAVE", 4) != 0)
        return fail(e, "not a WAV file (%zu bytes): sox can make one", n);
    for (size_t at = 12; n - at >= 8;) {
        const uint8_t *chunk = p + at;
        size_t size = load_u32(chunk + 4);
        at += 8;
        const bool is_data = memcmp(chunk, "data", 4) == 0, unknown = size == 0 || (size >= 0x7ff00000 && size > n - at);
        if (is_data && unknown) size = n - at;
        if (is_data && unknown && f.coding) size -= size % f.frame;
        if (size > n - at)
            return fail(e, "its chunk '%.4s' has %zu bytes, but the file ends after %zu: is it cut off?", (const char *)chunk,
                        size, n - at);
        if (memcmp(chunk, "fmt ", 4) == 0 && !wav_format_read(&f, chunk + 8, size, e)) return false;
        if (is_data) return f.coding ? wav_data_read(w, &f, chunk + 8, size, e) : fail(e, "its data come before their format");
        at += size;
        at += size % 2 && at < n;  // chunks begin at even places
    }
    return fail(e, "it holds no chunk 'data'");
}

// How a clip is scaled before it is encoded. Its own span (minmax) is what SaShiMi's code takes, which moves silence away from
// 0; its peak does not. A clip without any change is silence, of code 128, not 0 as by the formula.
static struct clip_scale clip_scale(const float *x, size_t n, enum loudness loudness) {
    double min = n ? (double)x[0] : 0, max = min;
    for (size_t i = 0; i < n; i++) {
        min = fmin(min, (double)x[i]);
        max = fmax(max, (double)x[i]);
    }
    const double peak = fmax(fabs(min), fabs(max));
    if (loudness == LOUDNESS_NONE || peak == 0) return FULL_SCALE;
    if (loudness == LOUDNESS_PEAK) return (struct clip_scale){-peak, 2 * peak};
    return min == max ? (struct clip_scale){min - 1, 2} : (struct clip_scale){min, max - min + 1e-6};
}

// The code of a sample x of a clip (SaShiMi's mu-law of 8 bits, with its epsilons; it is not G.711's), and back.
static int32_t mu_law_encode(double x, const struct clip_scale *s) {
    const double a = -1 + 2 * (x - s->low) / s->range, sign = (a > 0) - (a < 0);
    const double companded = sign * log1p(255 * fabs(a + 1e-8)) / log(256);
    const double code = (companded + 1) / 2 * 255.99 + 0.005;
    return code < 0 ? 0 : code > 255 ? 255 : (int32_t)code;
}

static double mu_law_decode(int32_t code, const struct clip_scale *s) {
    const double v = code / 128.0 - 1, a = copysign((pow(256, fabs(v)) - 1) / 255, v);
    return s->low + (a + 1) / 2 * s->range;
}

// Not said yet; 16-bit PCM in a WAV file; 8-bit mu-law in one; 16-bit PCM without a header.
enum sound_format { SOUND_UNSAID, SOUND_WAV, SOUND_MU_LAW, SOUND_RAW };

static void add_u32(struct buffer *b, uint32_t v) { buffer_add(b, &v, 4); }

// Of n samples; -1: nobody knows how many.
static void add_wav_header(struct buffer *b, enum sound_format format, int sample_rate, int64_t n) {
    if (format == SOUND_RAW) return;
    const bool mu_law = format == SOUND_MU_LAW;
    const uint32_t bytes = mu_law ? 1 : 2, head = mu_law ? 4 + 8 + 18 + 8 + 4 + 8 : 4 + 8 + 16 + 8;
    const bool known = n >= 0 && n * (int64_t)bytes + head + 1 <= UINT32_MAX;
    const uint32_t data = known ? (uint32_t)n * bytes : UINT32_MAX, samples = known ? (uint32_t)n : UINT32_MAX;
    buffer_add(b, "RIFF", 4);
    add_u32(b, known ? head + data + data % 2 : UINT32_MAX);
    buffer_add(b, "WAVEfmt ", 8);
    add_u32(b, mu_law ? 18 : 16);
    add_u32(b, (mu_law ? WAV_MU_LAW : WAV_PCM) | 1 << 16);  // one channel
    add_u32(b, (uint32_t)sample_rate);
    add_u32(b, (uint32_t)sample_rate * bytes);
    add_u32(b, bytes | (8 * bytes) << 16);
    if (mu_law) {           // what is not PCM has an extension, of no bytes here, and a count of samples
        buffer_add(b, "\0\0fact", 6);
        add_u32(b, 4);
        add_u32(b, samples);
    }
    buffer_add(b, "data", 4);
    add_u32(b, data);
}

static void add_sound(struct buffer *b, enum sound_format format, const uint8_t *codes, size_t n, const struct clip_scale *scale) {
    for (size_t i = 0; i < n; i++) {
        const double x = mu_law_decode(codes[i], scale) * 32768;
        const int16_t sample = (int16_t)lrint(x < -32768 ? -32768 : x > 32767 ? 32767 : x);
        const uint8_t byte = g711_encode(sample);
        if (format == SOUND_MU_LAW) buffer_add(b, &byte, 1);
        else buffer_add(b, &sample, 2);
    }
}

// ====================================================================================================================
// 13. Requests.
// A request is a text that a command works on: of the command line, of a line of --jsonl, of a record of --fasta. Here is
// what it is made from and how it is answered. Calls everything above; called by sections 14 to 17.
// ====================================================================================================================

enum command { GENERATE, SCORE, EMBED, CLASSIFY, TOKENIZE, BENCH, INSPECT, N_COMMANDS };

static const char *const command_names[N_COMMANDS] = {"generate", "score", "embed", "classify", "tokenize", "bench", "inspect"};

enum source { FROM_TEXT, FROM_FILE, FROM_IDS, FROM_WAV };  // -p, -f, --ids, --wav

struct input {              // one text of the command line, in its order
    enum source source;
    const char *value;      // the text, the path ("-" is standard input), or the ids
};

enum { MAX_TOP = 20, MAX_SLOTS = 1 << 16 };  // alternatives that logprobs may ask for; sequences at once

struct settings {           // what a line of --jsonl may set; the command line gives the defaults
    struct sampling sampling;
    int n_predict;          // -1: to the end of the text
    int logprobs;           // likeliest tokens to report beside each one; -1: no log-probabilities
    bool echo;
    struct str *stops;      // [n_stops]; the bytes belong to the arguments or to the request's line
    int n_stops;
};

// What the words of an option mean, in the order of its table.
enum device_option { DEVICE_UNSAID, DEVICE_CPU, DEVICE_CUDA };  // unsaid: cuda where there is a GPU that runs the model
enum pool { POOL_LAST, POOL_MEAN, POOL_NONE };
enum bench_op { OP_MODEL, OP_SCAN };
enum bench_format { BENCH_MD, BENCH_CSV, BENCH_JSON, BENCH_JSONL };

struct options {            // the command line, parsed; defaults are llama.cpp's where it has them
    enum command command;
    const char *model;
    struct input *inputs;   // [n_inputs], owned
    int n_inputs;
    bool input_implied;     // standard input, which nobody named
    struct settings settings;  // owner of stops
    float seconds;          // of sound; 0: settings.n_predict samples
    enum sound_format sound_format;
    int n_threads, ubatch, n_parallel;  // n_parallel 0: as many as the input is worth
    bool seed_given;
    bool greedy, ignore_eos, print_ids, parse_special, quiet;
    bool jsonl, unordered, sandbox;
    const char *prefix, *save_state, *load_state, *tokenizer;
    enum device_option device;
    const char *fasta, *bed, *vcf, *track, *fasta_out;
    int window, stride;     // bases; 0: whole records, --vcf VCF_WINDOW; every window begins where the last one ended
    bool rc_average, case_sensitive, tsv;
    bool per_token;
    const char *logits;
    enum pool pool;
    int layer;
    const char *output;
    bool decode;
    const char *bench_prompts, *bench_gens, *bench_parallels, *bench_threads;
    enum bench_format bench_format;
    int repeats;
    enum bench_op bench_op;
    bool paper;
    bool help, version;
};

struct base {               // what requests continue: a text that was read once; owner of both
    struct sequence *seq;
    int32_t last;           // of its tokens: left to be fed by each of them, so that they know what is expected next; -1: none
    struct resume *resume;  // of the session's base only; NULL: none
    // Of a variant's alleles, which begin behind it one after the other:
    struct base *next;
    struct request *whole;
    int allele;             // the next one to begin
    bool reversed;
};

struct session {            // what every command that runs a model has open
    const struct options *o;  // own
    struct options own;     // the command line, with defaults that depend on the model
    struct outfile out;     // the file that the command writes; standard output when it writes none
    struct outfile state;   // of --save-state
    bool sound;             // the command writes sound
    struct model model;
    struct tokenizer tokenizer;
    bool has_tokenizer;
    struct ids banned;      // tokens that are never drawn
    int32_t unscored[2];    // N and n of nucleotides, which nothing is to be said about; -1: there is none
    struct base *base;      // what every request continues: --prefix, --load-state; NULL: nothing
};

static volatile sig_atomic_t interrupted;  // the signal, once one came

static struct timespec interrupted_at;

static void end_at_once(int signal) {
    unlink_unfinished();
    _exit(128 + signal);
}

// The first Ctrl-C or kill ends a command at its next step, a second one ends the process. Several at once, as timeout(1)
// sends them, are one.
static void on_signal(int signal) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!interrupted) {
        interrupted_at = now;
        interrupted = signal;
    } else if (now.tv_sec - interrupted_at.tv_sec + (now.tv_nsec - interrupted_at.tv_nsec) * 1e-9 > 0.5) {
        end_at_once(signal);
    }
}

// end_at_once() until something runs that is to end in good order, then on_signal(). A read or write that waits is cut short.
// What whoever started the program had it ignore (nohup, a shell's background) stays ignored.
static void catch_signals(void (*handler)(int signal)) {
    static const int signals[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};  // USR1: a cluster's warning
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action = {.sa_handler = handler}, before;
        if (sigaction(signals[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(signals[i], &action, NULL);
    }
}

static void stop_if_interrupted(void) {
    if (!interrupted) return;
    fflush(stdout);
    discard_unfinished();
    _exit(128 + interrupted);
}

// Ends the program when standard output failed: quietly when its reader went away, with a line when the disk is full.
static void check_stdout(void) {
    fflush(stdout);
    if (!ferror(stdout)) return;
    if (errno == EPIPE) {
        discard_unfinished();
        _exit(0);
    }
    die("standard output: %s", strerror(errno));
}

static void check_finite(const struct session *s, float max_logit, int64_t position) {
    if (!isfinite(max_logit))
        die("%s: the model's output after token %" PRId64 " is not a finite number: its weights are damaged", s->o->model,
            position);
}

// A line on standard error, on a terminal only, once the work has taken a second.
struct progress {
    const char *what;
    double start, shown;
    double sample_rate;        // of sound that is being made; 0: none
    bool on, visible;
};

static struct progress progress_new(const char *what, bool quiet) {
    return (struct progress){.what = what, .start = now_seconds(), .on = !quiet && isatty(STDERR_FILENO)};
}

static void progress_clear(struct progress *p) {
    if (p->visible) fprintf(stderr, "\r%*s\r", 64, "");
    p->visible = false;
}

// fraction: of the work, negative when nobody knows. n_requests: ended ones; negative where there is only one.
static void progress_show(struct progress *p, double fraction, int64_t n_requests, int64_t n_tokens) {
    double now = now_seconds(), elapsed = now - p->start;
    if (!p->on || elapsed < 1 || now - p->shown < 0.2) return;
    p->shown = now;
    p->visible = true;
    fprintf(stderr, "\r%s", p->what);
    if (fraction >= 0) fprintf(stderr, " %3d %%", (int)(100 * fraction));
    if (n_requests >= 0) fprintf(stderr, " %" PRId64 " requests", n_requests);
    if (p->sample_rate > 0)
        fprintf(stderr, " %.0f samples/s, %.2f times real time  ", (double)n_tokens / elapsed,
                (double)n_tokens / elapsed / p->sample_rate);
    else fprintf(stderr, " %.0f tokens/s  ", (double)n_tokens / elapsed);
}

// ---- Reading texts ----

static bool read_all(const char *path, struct buffer *b, struct error *e) {
    FILE *f = input_open(path, e);
    if (!f) return false;
    for (size_t n = 1; n;) {
        char chunk[65536];
        n = fread(chunk, 1, sizeof chunk, f);
        buffer_add(b, chunk, n);
    }
    bool ok = !ferror(f) || fail(e, "%s: %s", input_name(path), strerror(errno));
    input_close(f);
    return ok;
}

static bool parse_ids(const char *text, int n_vocab, struct ids *out, struct error *e) {
    for (const char *p = text; *p;) {
        if (isspace((unsigned char)*p) || *p == ',') {
            p++;
            continue;
        }
        char *end;
        errno = 0;
        long v = strtol(p, &end, 10);
        if (end == p || errno || v < 0 || v >= n_vocab || (*end && !isspace((unsigned char)*end) && *end != ','))
            return fail(e, "token id \"%.20s\": expected a number from 0 to %d", p, n_vocab - 1);
        ids_add(out, (int32_t)v);
        p = end;
    }
    return true;
}

static bool need_tokenizer(const struct session *s, struct error *e) {
    if (s->has_tokenizer) return true;
    if (s->model.c.sample_rate && s->o->command == TOKENIZE)
        return fail(e, "%s is an audio model: samples have no vocabulary", s->o->model);
    if (s->model.c.sample_rate) return fail(e, "%s is an audio model: it reads --wav FILE, or codes with --ids", s->o->model);
    return fail(e, "%s: the file carries no tokenizer and tokenizer.bin does not fit; use --ids, or --tokenizer FILE", s->o->model);
}

// What a token stands for. The embedding may have more rows than the vocabulary has tokens, and a request may name any row.
static struct str token_text(const struct session *s, int32_t id) {
    return s->has_tokenizer && id < s->tokenizer.n_tokens ? s->tokenizer.token[id] : (struct str){"", 0};
}

// Appends the tokens of a text. BOS goes in front where the file asks for it, unless the text continues another.
static bool read_text(const struct session *s, struct str text, bool continues, struct ids *out, struct error *e) {
    const struct tokenizer *t = &s->tokenizer;
    if (!need_tokenizer(s, e)) return false;
    if (t->add_bos && t->bos >= 0 && !continues) ids_add(out, t->bos);
    if (text.n) tokenize(t, text.p, text.n, s->o->parse_special, out);
    return true;
}

// The samples of a WAV file, behind the token that begins a clip.
static bool read_clip(const struct session *s, const char *path, bool continues, struct ids *out, struct clip_scale *scale,
                      struct error *e) {
    const struct config *c = &s->model.c;
    struct buffer b = {0};
    struct error inner = {""};
    struct wav w = {0};
    if (!c->sample_rate) return fail(e, "%s is no audio model: --wav does not apply", s->o->model);
    const char *name = input_name(path);
    bool ok = read_all(path, &b, e);
    if (ok && !b.n && s->o->input_implied && s->o->command == GENERATE) return true;  // nobody meant standard input
    if (ok && !wav_parse(&w, (const uint8_t *)b.p, b.n, &inner)) ok = fail(e, "%s: %s", name, inner.text);
    free(b.p);
    if (ok && w.sample_rate != c->sample_rate)
        ok = fail(e, "%s has %d samples a second, the model %d; convert it: sox %s -r %d OUT.wav", name, w.sample_rate,
                  c->sample_rate, path, c->sample_rate);
    if (ok) *scale = clip_scale(w.samples, w.n, c->loudness);
    if (ok && !continues) ids_add(out, c->start_token);
    for (size_t i = 0; ok && i < w.n; i++) ids_add(out, mu_law_encode((double)w.samples[i], scale));
    free(w.samples);
    return ok;
}

struct text_file {          // a file whose text becomes tokens a piece at a time; owner of f and b
    FILE *f;                // NULL: it has ended, or none was opened
    const char *path;       // for errors
    struct buffer b;        // read, and not tokens yet
    int64_t n_read, size;   // bytes; size 0: unknown
    bool continues;         // no token goes in front
    bool chomps;            // a line end at its end does not count
};

enum { TEXT_PIECE = 1 << 16 };  // bytes

static void text_close(struct text_file *t) {
    input_close(t->f);
    free(t->b.p);
    *t = (struct text_file){0};
}

static bool text_open(struct text_file *t, const char *path, bool continues, bool chomps, struct error *e) {
    struct stat st;
    *t = (struct text_file){.f = input_open(path, e), .path = input_name(path), .continues = continues, .chomps = chomps};
    if (!t->f) return false;
    if (fstat(fileno(t->f), &st) == 0 && S_ISREG(st.st_mode)) t->size = st.st_size;
    return true;
}

// The first bytes of a text may tell that it is none.
static bool check_text(const struct session *s, const struct text_file *t, struct error *e) {
    if (is_gzip(t->b.p, t->b.n)) return fail(e, "%s is compressed; use: zcat FILE | mamba ... -f -", t->path);
    if (s->tokenizer.nucleotides && t->b.n && t->b.p[0] == '>')
        return fail(e, "%s begins with '>', as FASTA does; use --fasta FILE", t->path);
    return true;
}

// Appends the tokens of the text up to a place where it can be cut, which are those that it has as a whole. Closes the file
// behind the last ones, or with an error. So a text takes the same memory whatever its length, if it has white space.
static bool read_piece(const struct session *s, struct text_file *t, struct ids *out, struct error *e) {
    size_t cut = 0;
    bool more = true;
    const bool begins = !t->n_read;
    while (more && !cut) {
        char piece[TEXT_PIECE];
        const size_t n = fread(piece, 1, sizeof piece, t->f), n_before = t->b.n;
        buffer_add(&t->b, piece, n);
        t->n_read += (int64_t)n;
        more = n == sizeof piece;
        if (more) cut = last_cut(&s->tokenizer, t->b.p, n_before, t->b.n);
    }
    bool ok = !ferror(t->f) || fail(e, "%s: %s", t->path, strerror(errno));
    ok = ok && (!begins || check_text(s, t, e));
    if (!more && t->chomps && t->b.n && t->b.p[t->b.n - 1] == '\n') {
        t->b.n--;
        if (t->b.n && t->b.p[t->b.n - 1] == '\r') t->b.n--;
    }
    ok = ok && read_text(s, (struct str){t->b.p, more ? cut : t->b.n}, t->continues, out, e);
    t->continues = true;
    if (cut) memmove(t->b.p, t->b.p + cut, t->b.n -= cut);
    if (!more || !ok) text_close(t);
    return ok;
}

// A file of a text, or standard input. `echo prompt |` ends in a line end that nobody means to be continued from.
static bool open_input(const struct session *s, const struct input *in, bool continues, struct text_file *t, struct error *e) {
    return need_tokenizer(s, e) && text_open(t, in->value, continues, s->o->command == GENERATE, e);
}

// Appends the tokens of one input of the command line. scale: of a clip, where the input is one.
static bool read_input(const struct session *s, const struct input *in, bool continues, struct ids *out, struct clip_scale *scale,
                       struct error *e) {
    if (in->source == FROM_IDS) return parse_ids(in->value, s->model.c.n_vocab, out, e);
    if (in->source == FROM_WAV) return read_clip(s, in->value, continues, out, scale, e);
    if (in->source == FROM_TEXT) return read_text(s, str_of(in->value), continues, out, e);
    struct text_file file;
    bool ok = open_input(s, in, continues, &file, e);
    while (ok && file.f) ok = read_piece(s, &file, out, e);
    return ok;
}

struct line_reader {        // lines of a file that may come slowly; owner of b
    const char *path;       // for errors
    int fd;
    struct buffer b;        // read and not handed out yet, from `start` on
    size_t start;
    int64_t n_lines, n_bytes;  // lines handed out; bytes read
    bool ended, skipping;   // skipping: the rest of a line that was too long
};

enum { MAX_LINE = 1 << 26 };  // bytes; what is longer is answered with an error
enum line { LINE, LINE_TOO_LONG, NO_LINE_YET, NO_MORE_LINES };

// More bytes; false when there are none now (wait: ... and never will be, or a signal came).
static bool read_more(struct line_reader *l, bool wait) {
    struct pollfd ready = {.fd = l->fd, .events = POLLIN};
    if (l->ended || poll(&ready, 1, wait ? -1 : 0) <= 0) return false;
    if (l->start) memmove(l->b.p, l->b.p + l->start, l->b.n -= l->start);
    l->start = 0;
    char chunk[65536];
    ssize_t n = read(l->fd, chunk, sizeof chunk);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return false;
    if (n < 0) die("%s: %s", l->path, strerror(errno));
    l->ended = n == 0;
    l->n_bytes += n;
    buffer_add(&l->b, chunk, (size_t)n);
    return n > 0;
}

// The next line, without its end; it stands until the next call. wait: until there is one, the file ends or a signal comes.
static enum line next_line(struct line_reader *l, bool wait, struct str *line) {
    size_t searched = 0;
    for (;;) {
        size_t n = l->b.n - l->start;
        char *from = n ? l->b.p + l->start : NULL;
        char *end = n > searched ? memchr(from + searched, '\n', n - searched) : NULL;
        if (!end && !l->ended && n > MAX_LINE) {  // forget what has come of it
            l->skipping = true;
            l->start = l->b.n;
            n = 0;
        }
        if (end || (l->ended && n)) {
            *line = (struct str){from, end ? (size_t)(end - from) : n};
            l->start += line->n + (end != NULL);
            const size_t mark = l->n_lines++ ? 0 : byte_order_mark(line->p, line->n);
            line->p += mark, line->n -= mark;
            bool too_long = l->skipping || line->n > MAX_LINE;
            l->skipping = false;
            return too_long ? LINE_TOO_LONG : LINE;
        }
        searched = n;
        if (!read_more(l, wait) && !l->ended) return NO_LINE_YET;
        if (!l->ended || l->start < l->b.n) continue;
        if (!l->skipping) return NO_MORE_LINES;
        l->skipping = false;  // the last line was too long, and has no end
        l->n_lines++;
        return LINE_TOO_LONG;
    }
}

// ---- A request ----

enum { PREFIX = -1, VCF_WINDOW = 1024 };  // of --vcf: an allele that is none; bases around a variant

struct request {            // one text; owner of all it points to but seq, base and whole
    struct request *next;   // in the order of the input
    char *id;               // JSON, or what stands in the id column of a table
    char *record;           // --fasta: the name of the record that it is from
    int64_t origin;         // its first base there, counted from 0
    struct variant *variant;  // --vcf: what a line says, answered by parts
    struct request *whole;  // of a part: the variant's request
    int allele;             // of a part, 0 is REF; PREFIX: what stands before all of them
    char *line;             // bytes of stop texts
    struct settings settings;
    struct ids tokens;      // fed before anything is sampled; with a base, the token it left to be fed comes first
    size_t n_carried;       // of tokens: those that are not its own: the base's last one, or what begins a record or clip
    size_t n_dropped;       // tokens before tokens.p[0] that were forgotten: those of a long record
    size_t n_feed, n_fed;   // tokens that are to be fed, and are; after them comes resume->pending, drawn from the logits
    bool streams;           // more tokens are to be read: the last one known is not fed before the next is
    struct text_file file;  // from which they come, where it is one of text
    bool reversed;          // --rc-average: the other strand is being read
    bool all_rows;          // log-probabilities of the prompt's own tokens are wanted
    struct sequence *seq;   // lent while it runs
    struct base *base;      // what it continues; NULL: nothing
    struct resume *resume;  // generate only
    struct clip_scale scale;  // of the clip that it continues
    struct emitter text;    // generate: writes to body, or to out when that is text
    int64_t n_out_ids;      // generate --print-ids: ids written
    int64_t n_generated, n_before;  // tokens drawn; tokens of the base that were fed
    double nll;             // score: of n_scored tokens, in nats
    int64_t n_scored;
    struct buffer logprobs; // of struct token_logprob, where they are asked for
    struct buffer tops;     // of them, settings.logprobs a token: the likeliest in its place, the best first; id -1: none
    double *sum;            // [d_model] embed --pool mean
    float *pooled;          // [d_model]
    float *strand;          // --rc-average: pooled of the first strand, or with --track a log-probability a base (NaN: none yet)
    struct buffer body;     // --jsonl: the text of generate, the rows of embed --pool none
    struct buffer answer;   // --jsonl: the command's members of the answer
    struct buffer out, track;  // bytes for the output and for --track, not written yet
    const char *finish_reason;  // generate: once it has ended
    struct error error;
    size_t held;            // bytes that it holds once it is done
    bool done;
};

static struct request *request_new(const struct session *s, struct base *base) {
    const struct settings *defaults = &s->o->settings;
    struct request *r = xcalloc(1, sizeof *r);
    r->settings = *defaults;
    r->settings.stops = xmalloc((size_t)defaults->n_stops * sizeof *r->settings.stops);
    if (defaults->n_stops)
        memcpy(r->settings.stops, defaults->stops, (size_t)defaults->n_stops * sizeof *r->settings.stops);
    r->base = base;
    r->scale = base && base->resume ? base->resume->scale : FULL_SCALE;
    if (base && base->last >= 0) ids_add(&r->tokens, base->last);
    r->n_carried = r->tokens.n;
    return r;
}

// Everything but what is still to be written: many requests may have ended before the oldest one does.
static void request_strip(struct request *r) {
    variant_free(r->variant);
    text_close(&r->file);
    void *owned[] = {r->id, r->record, r->line, r->settings.stops, r->tokens.p, r->resume, r->text.held.p,
                     r->logprobs.p, r->tops.p, r->sum, r->pooled, r->strand, r->body.p, r->answer.p};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    *r = (struct request){.next = r->next, .out = r->out, .track = r->track, .done = r->done};
}

static void request_free(struct request *r) {
    request_strip(r);
    free(r->out.p);
    free(r->track.p);
    free(r);
}

static size_t n_tokens_of(const struct request *r) { return r->n_dropped + r->tokens.n; }

static int32_t token_at(const struct request *r, size_t at) { return r->tokens.p[at - r->n_dropped]; }

// Those that were fed make room for others.
static void forget_fed(struct request *r) {
    const size_t n = r->n_fed - r->n_dropped;
    if (n) memmove(r->tokens.p, r->tokens.p + n, (r->tokens.n -= n) * sizeof *r->tokens.p);
    r->n_dropped += n;
}

// How many of the known tokens are fed: not the last one while more may come, or when somebody else goes on with it: the alleles
// behind a prefix, or the run that loads the state of one that generates nothing.
static void plan_feed(struct request *r) {
    const bool is_prefix = r->allele == PREFIX && r->tokens.n, only_reads = r->resume && r->settings.n_predict == 0;
    r->n_feed = n_tokens_of(r) - (r->streams || is_prefix || only_reads);
    if (!only_reads || r->streams) return;
    r->resume->pending[0] = r->tokens.p[r->tokens.n - 1];
    r->resume->n_pending = 1;
}

enum request_kind { R_INTEGER, R_NUMBER, R_BOOL, R_SEED, R_STOP, R_ID, R_PROMPT, R_IDS, R_IGNORED };

// Names of OpenAI's completions, and ids.
static const struct request_field {
    const char *name;
    enum request_kind kind;
    size_t field;           // in struct settings
    double min, max;
} request_fields[] = {
#define FIELD(name) offsetof(struct settings, name)
    {"id", R_ID, 0, 0, 0},
    {"prompt", R_PROMPT, 0, 0, 0},
    {"ids", R_IDS, 0, 0, 0},
    {"max_tokens", R_INTEGER, FIELD(n_predict), -1, 1e9},
    {"temperature", R_NUMBER, FIELD(sampling.temperature), 0, 1e6},
    {"top_k", R_INTEGER, FIELD(sampling.top_k), 0, 1e9},
    {"top_p", R_NUMBER, FIELD(sampling.top_p), 0, 1},
    {"min_p", R_NUMBER, FIELD(sampling.min_p), 0, 1},
    {"repeat_penalty", R_NUMBER, FIELD(sampling.repeat_penalty), 0.01, 100},
    {"repeat_last_n", R_INTEGER, FIELD(sampling.repeat_last_n), 0, RECENT_MAX},
    {"seed", R_SEED, FIELD(sampling.seed), 0, 0},
    {"stop", R_STOP, 0, 0, 0},
    {"echo", R_BOOL, FIELD(echo), 0, 0},
    {"logprobs", R_INTEGER, FIELD(logprobs), 0, MAX_TOP},
    {"model", R_IGNORED, 0, 0, 0},
    {"user", R_IGNORED, 0, 0, 0},
    {"metadata", R_IGNORED, 0, 0, 0},
#undef FIELD
};
enum { N_REQUEST_FIELDS = sizeof request_fields / sizeof *request_fields };

struct request_parse {
    struct json j;
    struct request *r;
    struct str prompt;
    bool has_prompt, has_ids;
    bool seen[N_REQUEST_FIELDS];
    int n_vocab;
};

// A number between min and max. A wrong one is an error of the request, but the line can be read on.
static bool request_number(struct request_parse *q, const struct request_field *f, double *v) {
    struct str digits = {"", 0};
    char text[72];
    if (!json_number(&q->j, &digits)) return false;
    snprintf(text, sizeof text, "%.*s", str_show(digits), digits.p);
    *v = strtod(text, NULL);
    bool whole = f->kind == R_NUMBER || *v == floor(*v);
    if (digits.n > (size_t)str_show(digits) || !(*v >= f->min && *v <= f->max) || !whole) {
        set_error(q->j.error, "%s %s: expected %s from %.10g to %.10g", f->name, text,
                  f->kind == R_NUMBER ? "a number" : "an integer", f->min, f->max);
        *v = f->min;
    }
    return true;
}

static bool request_ids(struct request_parse *q) {
    const struct request_field token = {"ids", R_INTEGER, 0, 0, q->n_vocab - 1};
    q->r->tokens.n = q->r->n_carried;
    q->has_ids = true;
    if (!json_expect(&q->j, '[', "an array of token ids")) return false;
    if (json_take(&q->j, ']')) return true;
    do {
        double v;
        if (!request_number(q, &token, &v)) return false;
        ids_add(&q->r->tokens, (int32_t)v);
    } while (json_take(&q->j, ','));
    return json_expect(&q->j, ']', "a comma or the end of the array");
}

enum { MAX_STOPS = 16, MAX_STOP_BYTES = 1024 };

static bool request_stops(struct request_parse *q) {
    struct settings *s = &q->r->settings;
    bool several = json_take(&q->j, '[');
    s->n_stops = 0;
    if (several && json_take(&q->j, ']')) return true;
    do {
        struct str stop;
        if (!json_string(&q->j, &stop)) return false;
        if (!stop.n) set_error(q->j.error, "stop: the text is empty");
        if (stop.n > MAX_STOP_BYTES || s->n_stops == MAX_STOPS)  // each is looked for at every token, while others wait
            return fail(q->j.error, "stop: expected at most %d texts of at most %d bytes", MAX_STOPS, MAX_STOP_BYTES);
        s->stops = xrealloc(s->stops, ((size_t)s->n_stops + 1) * sizeof *s->stops);
        s->stops[s->n_stops++] = stop;
    } while (several && json_take(&q->j, ','));
    return !several || json_expect(&q->j, ']', "a comma or the end of the array");
}

static bool request_id(struct request_parse *q) {
    struct buffer id = {0};
    struct str s;
    const int first = json_peek(&q->j);
    const bool is_text = first == '"';
    if (!is_text && first != '-' && !(first >= '0' && first <= '9')) return json_fail(&q->j, "a string or a number");
    if (!(is_text ? json_string(&q->j, &s) : json_number(&q->j, &s))) return false;
    if (is_text) add_json_string(&id, s);
    else buffer_add(&id, s.p, s.n);
    buffer_add(&id, "", 1);
    free(q->r->id);
    q->r->id = id.p;
    return true;
}

static bool request_value(struct request_parse *q, const struct request_field *f) {
    void *field = (char *)&q->r->settings + f->field;
    struct str s;
    double v;
    if (json_word(&q->j, "null")) return true;  // as if it were not there
    switch (f->kind) {
    case R_ID: return request_id(q);
    case R_IDS: return request_ids(q);
    case R_STOP: return request_stops(q);
    case R_IGNORED: return json_skip(&q->j, 0);
    case R_PROMPT: return q->has_prompt = json_string(&q->j, &q->prompt);
    case R_BOOL:
        *(bool *)field = json_word(&q->j, "true");
        return *(bool *)field || json_word(&q->j, "false") ? true : json_fail(&q->j, "true or false");
    case R_INTEGER:
    case R_NUMBER:
        if (!request_number(q, f, &v)) return false;
        if (f->kind == R_NUMBER) *(float *)field = (float)v;
        else *(int *)field = (int)v;
        return true;
    case R_SEED:
        if (!json_number(&q->j, &s)) return false;
        if (!str_is(s, "-1") && !parse_u64(s, field))  // -1: the command line's
            set_error(q->j.error, "seed %.*s: expected an integer from 0 to 2^64 - 1, or -1", str_show(s), s.p);
        return true;
    }
    return false;
}

// The value of a field; an error says of which.
static bool field_value(struct request_parse *q, const struct request_field *f) {
    if (request_value(q, f)) return true;
    const struct error e = *q->j.error;
    if (strncmp(e.text, "column", 6) == 0) snprintf(q->j.error->text, sizeof q->j.error->text, "%s: %.600s", f->name, e.text);
    return false;
}

// Fills r from a line, which changes under the parser and belongs to r afterwards. Errors go to r->error; after one that
// leaves the line readable, it is read on for its id. *prompt is the text to tokenize, NULL when ids were given.
static bool request_parse(struct request *r, struct str line, int n_vocab, struct str *prompt) {
    r->line = xmalloc(line.n);
    if (line.n) memcpy(r->line, line.p, line.n);
    struct request_parse q = {.j = {r->line, r->line, r->line + line.n, &r->error}, .r = r, .n_vocab = n_vocab};
    struct json *j = &q.j;
    bool ok = json_expect(j, '{', "an object, {\"prompt\": ...}");
    if (ok && !json_take(j, '}')) {
        do {
            struct str name;
            const struct request_field *f = NULL;
            ok = json_string(j, &name) && json_expect(j, ':', "a colon");
            for (int i = 0; ok && i < N_REQUEST_FIELDS; i++)
                if (str_is(name, request_fields[i].name)) f = &request_fields[i];
            bool *seen = f ? &q.seen[f - request_fields] : NULL;
            if (ok && !f) set_error(&r->error, "unknown field \"%.*s\"", str_show(name), name.p);
            if (seen && *seen) set_error(&r->error, "%s is given twice", f->name);
            if (seen) *seen = true;
            ok = ok && (f ? field_value(&q, f) : json_skip(j, 0));
        } while (ok && json_take(j, ','));
        ok = ok && json_expect(j, '}', "a comma or the end of the object");
    }
    if (ok && json_peek(j) >= 0) json_fail(j, "nothing behind the object");
    if (q.has_prompt == q.has_ids) set_error(&r->error, q.has_ids ? "both prompt and ids" : "neither prompt nor ids");
    *prompt = q.has_ids ? (struct str){NULL, 0} : q.prompt;
    return !r->error.text[0];
}

// ---- Answers ----

// A token as text of JSON; one that is not UTF-8 by itself as OpenAI spells it, "bytes:\xe2\x80".
static void add_json_token(struct buffer *b, const struct session *s, int32_t id) {
    struct str t = token_text(s, id);
    struct buffer bytes = {0};
    bool valid = t.n > 0;
    for (size_t i = 0, n; i < t.n; i += n) {
        uint32_t cp;
        n = (size_t)utf8_decode(t.p + i, t.n - i, &cp);
        valid &= cp != UC_REPLACEMENT;
    }
    if (!t.n) buffer_printf(&bytes, "%" PRId32, id);
    else if (!valid) buffer_printf(&bytes, "bytes:");
    for (size_t i = 0; i < t.n && !valid; i++) buffer_printf(&bytes, "\\x%02x", (uint8_t)t.p[i]);
    add_json_string(b, valid ? t : (struct str){bytes.p, bytes.n});
    free(bytes.p);
}

// OpenAI's object: parallel arrays, an element a token.
static void add_json_logprobs(struct buffer *b, const struct session *s, const struct request *r) {
    const struct token_logprob *l = (const struct token_logprob *)r->logprobs.p;
    size_t n = r->logprobs.n / sizeof *l;
    buffer_printf(b, ", \"logprobs\": {\"tokens\": [");
    for (size_t i = 0; i < n; i++) {
        if (i) buffer_printf(b, ", ");
        add_json_token(b, s, l[i].id);
    }
    buffer_printf(b, "], \"ids\": [");
    for (size_t i = 0; i < n; i++) buffer_printf(b, i ? ", %" PRId32 : "%" PRId32, l[i].id);
    buffer_printf(b, "], \"token_logprobs\": [");
    for (size_t i = 0; i < n; i++) {
        if (i) buffer_printf(b, ", ");
        add_json_number(b, l[i].logprob);
    }
    buffer_printf(b, "]");
    if (r->settings.logprobs > 0) {
        buffer_printf(b, ", \"top_logprobs\": [");
        for (size_t i = 0; i < n; i++) {
            const struct token_logprob *top = (const struct token_logprob *)r->tops.p + i * (size_t)r->settings.logprobs;
            buffer_printf(b, "%s%s", i ? ", " : "", top->id >= 0 ? "{" : "null");
            for (int k = 0; k < r->settings.logprobs && top[k].id >= 0; k++) {
                if (k) buffer_printf(b, ", ");
                add_json_token(b, s, top[k].id);
                buffer_printf(b, ": ");
                add_json_number(b, top[k].logprob);
            }
            if (top->id >= 0) buffer_printf(b, "}");
        }
        buffer_printf(b, "]");
    }
    buffer_printf(b, "}");
}

static void add_json_vector(struct buffer *b, const float *v, int n) {
    buffer_printf(b, "[");
    for (int i = 0; i < n; i++) buffer_printf(b, i ? ", %.9g" : "%.9g", (double)v[i]);
    buffer_printf(b, "]");
}

// The whole line: r->answer is what the command has to say.
static void add_json_answer(struct buffer *b, const struct session *s, const struct request *r) {
    buffer_printf(b, "{\"id\": %s", r->id);
    if (r->error.text[0]) {
        buffer_printf(b, ", \"error\": ");
        add_json_string(b, str_of(r->error.text));
        buffer_printf(b, "}\n");
        return;
    }
    buffer_add(b, r->answer.p, r->answer.n);
    if (r->settings.logprobs >= 0 && (s->o->command == GENERATE || s->o->command == SCORE)) add_json_logprobs(b, s, r);
    int64_t n_prompt = r->n_before + (int64_t)n_tokens_of(r);
    buffer_printf(b, ", \"usage\": {\"prompt_tokens\": %" PRId64 ", \"completion_tokens\": %" PRId64 ", \"total_tokens\": %" PRId64
                  "}}\n", n_prompt, r->n_generated, n_prompt + r->n_generated);
}

// ====================================================================================================================
// 14. Engine.
// Up to -np requests run at once, each in a sequence of its own: a step gives every one its next tokens in one forward,
// those that end leave, and others enter before the next step. Calls everything above; called by the commands.
// ====================================================================================================================

enum { LOGIT_ROWS = 64, LOGITS = 1 << 20 };  // of prompts, held at once: 64 rows, or more of a small vocabulary
enum { HELD_BYTES = 1 << 26 };  // answers that wait for an older one; with more, no new request begins

struct row {                // of logits
    struct request *r;
    size_t at;              // it stands behind token `at` of the request; from n_tokens_of(r) - 1 on, one is drawn
    float max;              // of the logits
    struct token_logprob next;  // the token that follows, known or drawn; id -1: there is none
    struct token_logprob top[MAX_TOP];  // the likeliest in its place, as many as are asked for
};

struct window {             // the bases at hand of the record that is cut into windows; owner of bases
    uint8_t *bases;         // [n], room for a window
    size_t n;
    int64_t from, covered;  // position of the first one; bases of the record that were in a window
    bool in_record;
};

struct engine {             // owner of all but s; requests leave it when they are written
    struct session *s;
    struct context *ctx;
    struct request *first, **end;  // requests in the order of the input, unwritten ones only
    struct request *prefixes;  // parts of variants that are to run: what precedes the alleles; owned
    struct base *bases;     // whose alleles are to run, the latest first; owned
    struct request **running;  // [n_slots]; parts of variants belong to the engine, too
    struct request **batch;  // [n_slots] of the step in progress, with their segments
    struct segment *segments;  // [n_slots]
    struct sequence **idle;  // [n_idle] sequences that no request has: up to n_slots of requests, and as many of bases
    struct row *rows;       // [max_rows]
    int *row_tokens;        // [max_rows] their tokens in the batch
    struct sampler *samplers;  // [n_threads], scratch of each thread
    int n_slots, n_running, n_idle, n_layers;
    struct sequence *kept;  // state of the one request whose state is saved
    struct resume *kept_resume;
    size_t held;            // bytes of answers that wait
    FILE *output;
    bool reader_gone;       // the output's reader closed it
    bool has_header;        // the table's or array's is written
    bool no_more;           // all requests have come
    bool is_long, said_long;  // a text went past the length of those that the model was trained on; a line said so
    int next_input;         // of the command line; above 0 once its first request has come
    struct line_reader lines;  // of --jsonl, --bed, --vcf
    struct fasta fasta;     // of --fasta
    bool vcf_declared;      // the last line of the VCF's header, #CHROM, has come
    struct request *long_record;  // which must end before another one is read
    struct window window;   // of --window
    struct buffer array;    // embed --fasta: all rows, which are written when their number is known
    int64_t input_size;     // of a plain file of lines or records; 0: unknown
    struct progress progress;
    int64_t n_requests, n_failed;  // ended
    int64_t n_fed, n_sampled;  // tokens
    int64_t n_samples;      // of sound that were written
    double prompt_seconds, sample_seconds;  // of steps before and after something was first sampled
};

// Forwards run on the GPU where there is one, or as --device says.
static void context_use_device(struct context *ctx, const struct options *o, int n_sequences) {
    struct error e = {""};
    const bool wanted = o->device == DEVICE_CUDA;
    const struct device_shape shape = {ctx->max_tokens, ctx->max_rows, n_sequences};
    if (o->device == DEVICE_CPU || (o->sandbox && !wanted)) return;  // the driver opens files and devices of its own
    if (!device_usable(&e) || !device_runs(ctx->m, &e)) {
        if (wanted) die("--device cuda: %s", e.text);
        return;
    }
    ctx->device = device_open(ctx->m, shape, ctx->k->unpack_weights, &e);
    if (!ctx->device) die("%s: %s", o->model, e.text);
    ctx->choices = xcalloc((size_t)ctx->max_rows, sizeof *ctx->choices);
}

static struct engine *engine_new(struct session *s, int n_slots, int64_t max_tokens, FILE *output) {
    struct engine *en = xcalloc(1, sizeof *en);
    const struct options *o = s->o;
    const struct kernels *k = choose_kernels();
    const int n_threads = o->n_threads;
    int n_tokens = max_tokens < o->ubatch ? (int)max_tokens : o->ubatch;
    if (n_tokens < n_slots) n_tokens = n_slots;
    int n_rows = n_slots;   // a row for each sequence that draws; prompts whose tokens are scored use more
    const int many_rows = s->model.c.n_vocab < LOGITS / LOGIT_ROWS ? LOGITS / s->model.c.n_vocab : LOGIT_ROWS;
    if (o->command == SCORE || (o->command == GENERATE && o->jsonl))
        n_rows = min_int(n_tokens, n_slots > many_rows ? n_slots : many_rows);
    en->s = s;
    en->ctx = context_new(&s->model, k, n_threads, n_tokens, n_rows);
    en->ctx->wants_hidden = o->command == EMBED || o->command == CLASSIFY;
    // Sequences: of requests, of --vcf's bases, of what every request continues, and one that is kept to be saved.
    context_use_device(en->ctx, o, n_slots * (o->vcf ? 2 : 1) + 2);
    struct error e = {""};
    if (en->ctx->device) device_must(device_ban(en->ctx->device, s->banned.p, s->banned.n, &e), &e);
    en->end = &en->first;
    en->n_slots = n_slots;
    en->running = xcalloc((size_t)n_slots, sizeof(void *));
    en->batch = xcalloc((size_t)n_slots, sizeof(void *));
    en->segments = xcalloc((size_t)n_slots, sizeof *en->segments);
    en->idle = xcalloc(2 * (size_t)n_slots, sizeof(void *));
    en->rows = xcalloc((size_t)n_rows, sizeof *en->rows);
    en->row_tokens = xcalloc((size_t)n_rows, sizeof *en->row_tokens);
    en->samplers = xcalloc((size_t)n_threads, sizeof *en->samplers);
    for (int i = 0; i < n_threads; i++) en->samplers[i] = sampler_new(k, s->model.c.n_vocab);
    en->n_layers = o->command == EMBED && o->layer >= 0 ? o->layer : s->model.c.n_layer;
    en->output = output;
    return en;
}

static void base_free(struct base *b) {
    if (!b) return;
    sequence_free(b->seq);
    free(b->resume);
    free(b);
}

static void engine_free(struct engine *en) {
    struct request **lists[] = {&en->prefixes, &en->first};
    for (int i = 0; i < en->n_running; i++)
        if (en->running[i]->whole) {
            sequence_free(en->running[i]->seq);
            request_free(en->running[i]);
        }
    for (int i = 0; i < 2; i++)
        while (*lists[i]) {
            struct request *r = *lists[i];
            *lists[i] = r->next;
            sequence_free(r->seq);
            request_free(r);
        }
    while (en->bases) {
        struct base *base = en->bases;
        en->bases = base->next;
        base_free(base);
    }
    sequence_free(en->kept);
    for (int i = 0; i < en->n_idle; i++) sequence_free(en->idle[i]);
    for (int i = 0; i < en->ctx->n_threads; i++) sampler_free(&en->samplers[i]);
    void *owned[] = {en->running, en->batch, en->segments, en->idle, en->rows, en->row_tokens, en->samplers, en->kept_resume,
                     en->lines.b.p, en->window.bases, en->array.p};
    fasta_close(&en->fasta);
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    context_free(en->ctx);
    free(en);
}

// To where the request begins: at nothing, or behind its base.
static void request_rewind(struct request *r, const struct session *s) {
    if (r->base) sequence_copy(r->seq, r->base->seq, &s->model.c);
    else sequence_reset(r->seq, &s->model.c);
}

// Feeds the base's tokens in chunks; stops early when a signal comes.
static void feed(struct context *ctx, struct sequence *seq, const int32_t *tokens, size_t n, struct progress *p) {
    for (size_t at = 0; at < n && !interrupted; at += (size_t)ctx->max_tokens) {
        int now = n - at < (size_t)ctx->max_tokens ? (int)(n - at) : ctx->max_tokens;
        forward(ctx, &(struct segment){seq, tokens + at, now, false}, 1, ctx->m->c.n_layer);
        progress_show(p, (double)(at + (size_t)now) / (double)n, -1, (int64_t)at + now);
    }
    progress_clear(p);
}

// ---- What commands do with a request ----

// Header of a .npy file, version 1.0: float32, C order, padded to 64 bytes.
static void add_npy_header(struct buffer *b, int64_t rows, int64_t cols) {
    char text[119];         // with the 10 bytes before it, and a line end: 128
    snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%" PRId64 ", %" PRId64 "), }", rows, cols);
    buffer_add(b, "\x93NUMPY\x01\0\x76\0", 10);
    buffer_printf(b, "%-117s\n", text);
}

static void write_npy_header(FILE *f, int64_t rows, int64_t cols) {
    struct buffer header = {0};
    add_npy_header(&header, rows, cols);
    fwrite(header.p, 1, header.n, f);
    free(header.p);
}

// A token's bytes, or a file's name, in a column of a table.
static void add_escaped(struct buffer *b, struct str s) {
    for (size_t i = 0, len; i < s.n; i += len) {
        uint32_t cp;
        len = (size_t)utf8_decode(s.p + i, s.n - i, &cp);
        if (s.p[i] == '\\') buffer_printf(b, "\\\\");
        else if (cp == '\t' || cp == '\n' || cp == '\r') buffer_printf(b, "\\%c", cp == '\t' ? 't' : cp == '\n' ? 'n' : 'r');
        else if (cp < 32 || (cp >= 127 && cp < 160) || cp == UC_REPLACEMENT)
            for (size_t k = 0; k < len; k++) buffer_printf(b, "\\x%02x", (uint8_t)s.p[i + k]);
        else buffer_add(b, s.p + i, len);
    }
}

static void remember(struct resume *r, int32_t token) {
    if (r->n_recent == RECENT_MAX) memmove(r->recent, r->recent + 1, (size_t)--r->n_recent * sizeof *r->recent);
    r->recent[r->n_recent++] = token;
}

enum { SOUND_BLOCK = 256 };  // samples that are written together

// The codes so far become sound; `all`, or there are enough of them.
static void write_sound(struct engine *en, struct request *r, bool all) {
    if (!r->body.n || (!all && r->body.n < SOUND_BLOCK)) return;
    en->n_samples += (int64_t)r->body.n;
    add_sound(&r->out, en->s->o->sound_format, (const uint8_t *)r->body.p, r->body.n, &r->resume->scale);
    r->body.n = 0;
}

// generate: whether a request's letters become a record.
static bool writes_fasta(const struct options *o) { return o->fasta_out || (o->command == GENERATE && o->fasta); }

// A token on its way out: as text, as a sample, as an id, or kept for the answer. Beside ids, text is made where stop texts are to
// be found in it, or a state keeps its end.
static void generate_write(struct engine *en, struct request *r, struct emitter *text, int32_t token) {
    const struct session *s = en->s;
    const bool ids = s->o->print_ids, known = s->has_tokenizer && token < s->tokenizer.n_tokens;
    const bool control = known && s->tokenizer.type[token] == TOKEN_CONTROL;
    const char code = (char)token;
    if (s->sound) {
        buffer_add(&r->body, &code, 1);
        write_sound(en, r, false);
        return;
    }
    if (ids && s->o->jsonl) buffer_printf(&r->answer, "%s%" PRId32, r->n_out_ids++ ? ", " : ", \"ids\": [", token);
    else if (ids) buffer_printf(&r->out, r->n_out_ids++ ? " %" PRId32 : "%" PRId32, token);
    struct str shown = token_text(s, token);
    if (writes_fasta(s->o) && shown.n != 1) shown = str_of("N");  // no letter
    if ((!ids || text->n_stops || s->o->save_state) && !control) emit(text, shown);
    if (ids) r->body.n = 0;
}

static bool generate_begin(struct engine *en, struct request *r) {
    const struct session *s = en->s;
    struct buffer *to = s->o->jsonl || s->o->print_ids || writes_fasta(s->o) ? &r->body : &r->out;
    int32_t first = s->has_tokenizer ? (s->tokenizer.bos >= 0 ? s->tokenizer.bos : s->tokenizer.eos) : -1;
    if (s->model.c.sample_rate) first = s->model.c.start_token;
    const bool needs_text = !s->o->print_ids || r->settings.n_stops;
    if (needs_text && !s->sound && !need_tokenizer(s, &r->error)) return false;
    r->resume = xcalloc(1, sizeof *r->resume);
    if (s->base) *r->resume = *s->base->resume;
    r->resume->scale = r->scale;
    r->resume->n_pending = 0;  // it is the first of r->tokens
    // Nothing to begin from: the token that begins a text, or the one that separates texts.
    if (!r->tokens.n && s->base) return fail(&r->error, "the state holds no token to continue from");
    if (!r->tokens.n && first < 0 && r->record)
        return fail(&r->error, "%s: record %s is empty, and the vocabulary has no token that begins a text", en->fasta.path, r->id);
    if (!r->tokens.n && first < 0)
        return fail(&r->error, "the prompt is empty, and the vocabulary has no token that begins a text");
    if (!r->tokens.n) {
        ids_add(&r->tokens, first);
        if (s->model.c.sample_rate) r->n_carried = 1;
    }
    for (size_t i = r->n_carried; i < r->tokens.n; i++) remember(r->resume, r->tokens.p[i]);
    if (s->sound) {
        const int64_t echoed = r->settings.echo ? (int64_t)(r->tokens.n - r->n_carried) : 0;
        add_wav_header(&r->out, s->o->sound_format, s->model.c.sample_rate,
                       r->settings.n_predict < 0 ? -1 : echoed + r->settings.n_predict);
    }
    // A character that the state's run left incomplete goes on in what is drawn now, unless the prompt comes between.
    const struct str begun = {r->resume->bytes, (size_t)r->resume->n_bytes};
    const bool has_prompt = r->streams || r->tokens.n > r->n_carried;
    r->text = (struct emitter){.to = to, .stops = r->settings.stops, .n_stops = r->settings.n_stops};
    if (!has_prompt) buffer_add(&r->text.held, begun.p, begun.n);
    if (r->settings.echo) {
        struct emitter echo = {.to = to};  // stop texts do not apply to the prompt
        if (has_prompt) buffer_add(&echo.held, begun.p, begun.n);
        for (size_t i = r->n_carried; i < r->tokens.n; i++) generate_write(en, r, &echo, r->tokens.p[i]);
        if (echo.held.n) emit_bytes(&echo, echo.held.n);
        free(echo.held.p);
    }
    return true;
}

// top NULL: the first token of a text, before which there is nothing.
static void keep_logprob(struct request *r, struct token_logprob next, const struct token_logprob *top) {
    const struct token_logprob none = {.id = -1};
    if (r->settings.logprobs < 0) return;
    buffer_add(&r->logprobs, &next, sizeof next);
    for (int k = 0; k < r->settings.logprobs; k++) buffer_add(&r->tops, top ? &top[k] : &none, sizeof none);
}

// A token was drawn: the text grows, and may end.
static void generate_token(struct engine *en, struct request *r, int32_t token) {
    const struct session *s = en->s;
    r->resume->pending[0] = token;
    r->resume->n_pending = 1;
    remember(r->resume, token);
    r->n_generated++;
    en->n_sampled++;
    bool eos = s->has_tokenizer && token == s->tokenizer.eos;
    if (!eos) generate_write(en, r, &r->text, token);
    if (eos || r->text.stopped) r->finish_reason = "stop";
    else if (r->settings.n_predict >= 0 && r->n_generated >= r->settings.n_predict) r->finish_reason = "length";
}

// What is still held back: part of a stop text that never came is text; an incomplete character waits in a saved state.
static void generate_end(struct engine *en, struct request *r) {
    struct emitter *text = &r->text;
    const bool save = en->s->o->save_state != NULL;
    size_t keep = save && !text->stopped ? incomplete_tail(text->held.p, text->held.n) : 0;
    if (keep) memcpy(r->resume->bytes, text->held.p + text->held.n - keep, keep);
    r->resume->n_bytes = (int)keep;
    if (!text->stopped && text->held.n > keep) emit_bytes(text, text->held.n - keep);
    if (en->s->sound) {
        write_sound(en, r, true);
    } else if (en->s->o->jsonl) {
        buffer_printf(&r->answer, !en->s->o->print_ids ? ", \"text\": " : r->n_out_ids ? "]" : ", \"ids\": []");
        if (!en->s->o->print_ids) add_json_string(&r->answer, (struct str){r->body.p, r->body.n});
        buffer_printf(&r->answer, ", \"finish_reason\": \"%s\"", r->finish_reason);
    } else if (writes_fasta(en->s->o)) {
        add_fasta_record(&r->out, r->id, r->body.p, r->body.n);
    } else if (en->s->o->print_ids) {
        buffer_add(&r->out, "\n", 1);
    }
    if (!save) return;
    en->kept = r->seq;
    en->kept_resume = r->resume;
    r->seq = NULL;
    r->resume = NULL;
}

// A line of --track: a base of the request, from 0, and its log-probability.
static void add_track(struct request *r, int64_t base, double logprob) {
    base += r->origin;
    buffer_printf(&r->track, "%s\t%" PRId64 "\t%" PRId64 "\t%.4f\n", r->record, base, base + 1, logprob);
}

static bool is_unscored(const struct session *s, int32_t id) { return id == s->unscored[0] || id == s->unscored[1]; }

// The token behind number `at` is known, and so is what the model thought of it.
static void score_token(struct engine *en, struct request *r, size_t at, const struct token_logprob *next) {
    const struct session *s = en->s;
    const size_t position = at + 1 - r->n_carried;
    if (is_unscored(s, next->id)) return;
    r->nll -= next->logprob;
    r->n_scored++;
    if (s->o->track && !r->strand) add_track(r, (int64_t)position, next->logprob);
    if (r->strand) {
        float *base = &r->strand[r->reversed ? n_tokens_of(r) - r->n_carried - 1 - position : position];
        *base = isnan(*base) ? (float)next->logprob : (*base + (float)next->logprob) / 2;
    }
    if (!s->o->per_token || s->o->jsonl) return;
    buffer_printf(&r->out, "%s\t%zu\t%" PRId32 "\t", r->id, position, next->id);
    add_escaped(&r->out, token_text(s, next->id));
    buffer_printf(&r->out, "\t%.6f\n", next->logprob);
}

static void score_end(const struct session *s, struct request *r) {
    const double mean = r->nll / (double)r->n_scored;  // NaN when nothing was predicted
    const int strands = r->reversed ? 2 : 1;  // of which nll and n_scored are the sums
    for (size_t i = 0; r->strand && i < n_tokens_of(r) - r->n_carried; i++)
        if (!isnan(r->strand[i])) add_track(r, (int64_t)i, (double)r->strand[i]);
    if (s->o->jsonl) {
        buffer_printf(&r->answer, ", \"tokens\": %" PRId64 ", \"nll\": %.6f, \"bits_per_token\": ", r->n_scored, r->nll);
        add_json_number(&r->answer, mean / log(2));
        buffer_printf(&r->answer, ", \"perplexity\": ");
        add_json_number(&r->answer, exp(mean));
    } else if (!s->o->per_token && r->n_scored) {
        buffer_printf(&r->out, "%s\t%.17g\t%.6f\t%.6f\t%.6f\n", r->id, (double)r->n_scored / strands, r->nll / strands,
                      mean / log(2), exp(mean));
    } else if (!s->o->per_token) {
        buffer_printf(&r->out, "%s\t0\t0.000000\tnan\tnan\n", r->id);
    }
}

// Hidden states of tokens [r->n_fed, + n), which are rows token0 and on of the batch: each one (none), the last, or the
// mean in double. Tokens that the base left to be fed are not the text's own.
static void embed_rows(struct engine *en, struct request *r, int token0, int n) {
    const struct options *o = en->s->o;
    const struct context *ctx = en->ctx;
    const int d = en->s->model.c.d_model;
    const bool normed = o->layer < 0;  // --layer N counts blocks, and even the last one's output comes before the norm
    const bool all = o->pool == POOL_NONE, mean = o->pool == POOL_MEAN;
    for (int t = 0; t < n; t++) {
        const struct level *v = &ctx->level[0];
        const float *row = normed ? v->normed.f + (size_t)(token0 + t) * (size_t)v->normed.ld
                                  : v->x + (size_t)(token0 + t) * (size_t)v->ld_model;
        check_finite(en->s, ctx->k->finite_max(row, d), r->n_before + (int64_t)r->n_fed + t + 1);
        if (r->n_fed + (size_t)t < r->n_carried) continue;
        if (all) buffer_add(o->jsonl ? &r->body : &r->out, row, (size_t)d * sizeof *row);
        for (int i = 0; i < d && mean; i++) r->sum[i] += (double)row[i];
        memcpy(r->pooled, row, (size_t)d * sizeof *row);
    }
    if (r->streams || r->n_fed + (size_t)n < n_tokens_of(r)) return;
    for (int i = 0; i < d && mean; i++) r->pooled[i] = (float)(r->sum[i] / (double)(n_tokens_of(r) - r->n_carried));
    for (int i = 0; i < d && r->reversed; i++) r->pooled[i] = (r->pooled[i] + r->strand[i]) / 2;
    if (!o->rc_average || r->reversed) return;
    r->strand = memcpy(xmalloc((size_t)d * sizeof *r->strand), r->pooled, (size_t)d * sizeof *r->strand);
    memset(r->sum, 0, (size_t)d * sizeof *r->sum);
}

static void embed_end(const struct session *s, struct request *r) {
    const int d = s->model.c.d_model;
    const bool all = s->o->pool == POOL_NONE;
    const float *rows = (const float *)r->body.p;
    const size_t n = r->body.n / ((size_t)d * sizeof *rows);
    if (!s->o->jsonl) {
        if (!all) buffer_add(&r->out, r->pooled, (size_t)d * sizeof *r->pooled);
        return;
    }
    buffer_printf(&r->answer, ", \"embedding\": ");
    if (!all) add_json_vector(&r->answer, r->pooled, d);
    for (size_t i = 0; i < n; i++) {
        buffer_printf(&r->answer, i ? ", " : "[");
        add_json_vector(&r->answer, rows + i * (size_t)d, d);
    }
    if (all) buffer_printf(&r->answer, "]");
}

// The classifier on the pooled output of the final norm: p = softmax(W x + b).
static void classify_end(const struct session *s, const struct kernels *k, struct request *r) {
    const struct model *m = &s->model;
    const int n = m->c.n_labels, d = m->c.d_model;
    float *p = xmalloc((size_t)n * sizeof *p), max = -INFINITY;
    double sum = 0;
    int best = 0;
    for (int l = 0; l < n; l++) {
        double logit = (double)m->cls_b[l];
        for (int i = 0; i < d; i++) logit += (double)m->cls_w[(size_t)l * (size_t)d + (size_t)i] * (double)r->pooled[i];
        p[l] = (float)logit;
        if (p[l] > max) max = p[best = l];
    }
    k->exp_minus(p, n, max, p);
    for (int l = 0; l < n; l++) sum += (double)p[l];
    if (s->o->jsonl) {
        buffer_printf(&r->answer, ", \"label\": ");
        add_json_string(&r->answer, m->labels[best]);
        buffer_printf(&r->answer, ", \"probabilities\": {");
    }
    for (int l = 0; l < n; l++) {
        double share = (double)p[l] / sum;
        if (s->o->jsonl) {
            if (l) buffer_printf(&r->answer, ", ");
            add_json_string(&r->answer, m->labels[l]);
            buffer_printf(&r->answer, l + 1 < n ? ": %.6f" : ": %.6f}", share);
        } else {
            buffer_printf(&r->out, "%s\t", r->id);
            add_escaped(&r->out, m->labels[l]);
            buffer_printf(&r->out, "\t%.6f\n", share);
        }
    }
    free(p);
}

static const char *table_header(const struct options *o) {
    if (o->tsv) return "chrom\tpos\tid\tref\talt\tllr\terror\n";
    if (o->command == CLASSIFY) return "id\tlabel\tprobability\n";
    if (o->command != SCORE || o->vcf) return "";
    return o->per_token ? "id\tpos\ttoken_id\ttoken\tlogprob\n" : "id\ttokens\tnll\tbits_per_token\tperplexity\n";
}

// What stands before the first result in a table or array.
static void add_header(struct engine *en, struct request *r) {
    const struct options *o = en->s->o;
    const int64_t n = (int64_t)(r->tokens.n - r->n_carried);
    en->has_header = true;
    if (o->track)
        fputs("track type=bedGraph name=\"log-probability\" description=\"of each base, natural logarithm\"\n", en->s->out.f);
    buffer_printf(&r->out, "%s", table_header(o));
    if (o->command == EMBED && !o->fasta)
        add_npy_header(&r->out, o->pool == POOL_NONE ? n : o->n_inputs, en->s->model.c.d_model);
    if (!o->logits) return;
    write_npy_header(en->s->out.f, (int64_t)r->tokens.n, en->s->model.c.n_vocab);
}

// The request's tokens are known: sets up what its command keeps. False: it has failed.
static bool request_begin(struct engine *en, struct request *r) {
    const struct session *s = en->s;
    const enum command command = s->o->command;
    const size_t d = (size_t)s->model.c.d_model, n_own = r->tokens.n - r->n_carried;
    if (s->base) r->n_before = s->base->seq->n_past;
    if (command == GENERATE && !generate_begin(en, r)) return false;
    plan_feed(r);
    bool rows = command == SCORE || (command == GENERATE && r->settings.echo);
    if (rows && !r->n_carried && r->tokens.n) keep_logprob(r, (struct token_logprob){r->tokens.p[0], (double)NAN}, NULL);
    if (s->o->track && s->o->rc_average) {
        r->strand = xmalloc((n_own + 1) * sizeof *r->strand);
        for (size_t i = 0; i < n_own; i++) r->strand[i] = NAN;
    }
    r->all_rows = (command == SCORE && r->allele != PREFIX) || (rows && r->settings.logprobs >= 0);
    if (command == EMBED && s->o->fasta && en->has_header && s->o->pool == POOL_NONE)
        return fail(&r->error, "--pool none writes the rows of one record, and %s is another", r->id);
    if (!s->o->jsonl && !en->has_header) add_header(en, r);
    if (command == EMBED || command == CLASSIFY) {
        if (!n_own && r->record) return fail(&r->error, "%s: record %s is empty: nothing stands for it", en->fasta.path, r->id);
        if (!n_own) return fail(&r->error, "text %s is empty: nothing stands for it", r->id);
        r->sum = xcalloc(d, sizeof *r->sum);
        r->pooled = xcalloc(d, sizeof *r->pooled);
    }
    return true;
}

// ---- Variants ----
//
// A line of VCF is answered by parts, which run like any request. The first reads what precedes the variant in its window;
// one for each allele continues from there with the allele and what follows. With --rc-average so does the other strand.

// Appends the bases of a part, as its strand has them: what precedes the alleles, or an allele and what follows.
static void add_part_bases(struct buffer *out, const struct variant *v, int allele, bool reversed, bool keep_case) {
    const size_t behind = v->ref + v->alleles[0].n;
    const struct str left = {(const char *)v->bases, v->ref}, right = {(const char *)v->bases + behind, v->n_bases - behind};
    if (allele == PREFIX) {
        buffer_add(out, reversed ? right.p : left.p, reversed ? right.n : left.n);
    } else {
        if (reversed) buffer_add(out, left.p, left.n);
        for (size_t i = 0; i < v->alleles[allele].n; i++) {  // each in the case of the reference's base there
            const int upper = nucleotide((uint8_t)v->alleles[allele].p[i], false);
            const size_t there = v->ref + (i < v->alleles[0].n ? i : v->alleles[0].n - 1);
            const char base = (char)(keep_case && islower(v->bases[there]) ? tolower(upper) : upper);
            buffer_add(out, &base, 1);
        }
        if (!reversed) buffer_add(out, right.p, right.n);
    }
    if (reversed) reverse_complement((uint8_t *)out->p, out->n);
}

// A request for bases, which are still to come. It begins as the model's texts do, or continues the base.
static struct request *new_bases_request(const struct session *s, struct base *base) {
    const struct tokenizer *t = &s->tokenizer;
    struct request *r = request_new(s, base);
    if (t->add_bos && t->bos >= 0 && !base) ids_add(&r->tokens, t->bos);
    r->n_carried = r->tokens.n;
    return r;
}

static void add_bases(const struct session *s, struct request *r, const uint8_t *bases, size_t n) {
    for (size_t i = 0; i < n; i++)
        ids_add(&r->tokens, letter_token(&s->tokenizer, bases[i]));  // open_fasta() has found one for each
}

// A part of a variant, which continues the base.
static struct request *new_part(struct engine *en, struct request *whole, struct base *base, int allele, bool reversed) {
    struct request *r = new_bases_request(en->s, base);
    struct buffer bases = {0};
    r->whole = whole;
    r->allele = allele;
    r->reversed = reversed;
    add_part_bases(&bases, whole->variant, allele, reversed, en->s->tokenizer.keep_case);
    add_bases(en->s, r, (const uint8_t *)bases.p, bases.n);
    free(bases.p);
    return r;
}

// The next part that is to run, NULL: there is none. The latest base comes first, so that few are kept.
static struct request *next_part(struct engine *en) {
    struct base *base = en->bases;
    if (base) return new_part(en, base->whole, base, base->allele, base->reversed);
    struct request *r = en->prefixes;
    if (r) {
        en->prefixes = r->next;
        r->next = NULL;
    }
    return r;
}

// To the next allele that is a sequence; after the last one the base has served, and its sequence can be used again.
static void next_allele(struct engine *en, struct base *base) {
    const struct variant *v = base->whole->variant;
    do base->allele++;
    while (base->allele < v->n_alleles && isnan(v->nll[base->allele]));
    if (base->allele < v->n_alleles) return;
    en->bases = base->next;
    en->idle[en->n_idle++] = base->seq;
    base->seq = NULL;
    base_free(base);
}

// A part has ended. Alleles wait for what precedes them. Returns the variant's request once all its parts have ended, else NULL.
static struct request *part_end(struct engine *en, struct request *r) {
    struct request *whole = r->whole;
    struct variant *v = whole->variant;
    if (r->allele != PREFIX) {
        v->nll[r->allele] += r->nll / (en->s->o->rc_average ? 2 : 1);
        en->idle[en->n_idle++] = r->seq;
    } else {
        struct base *base = xcalloc(1, sizeof *base);
        *base = (struct base){.seq = r->seq, .last = r->tokens.n ? r->tokens.p[r->tokens.n - 1] : -1, .next = en->bases,
                              .whole = whole, .reversed = r->reversed};
        en->bases = base;
        for (int i = 0; i < v->n_alleles; i++) v->n_parts += !isnan(v->nll[i]);
    }
    request_free(r);
    return --v->n_parts ? NULL : whole;
}

// It leaves the engine's batch: its answer is made, and its sequence is free for another.
static void request_end(struct engine *en, struct request *r) {
    const struct session *s = en->s;
    if (r->whole && !(r = part_end(en, r))) return;
    const bool failed = r->error.text[0] != 0;
    if (!r->finish_reason) r->finish_reason = "length";
    if (failed && s->o->command == EMBED && !s->o->jsonl && !interrupted) die("%s", r->error.text);  // its array would lack a row
    if (failed && !s->o->jsonl && !interrupted) print_line(stderr, r->error.text);
    if (en->long_record == r) en->long_record = NULL;
    if (!failed && s->o->command == GENERATE) generate_end(en, r);
    if (r->variant && s->o->tsv) add_variant_rows(&r->out, r->variant);
    else if (r->variant) add_variant_line(&r->out, r->variant);
    else if (!failed && s->o->command == SCORE && !s->o->vcf) score_end(s, r);
    if (!failed && s->o->command == EMBED) embed_end(s, r);
    if (!failed && s->o->command == CLASSIFY) classify_end(s, en->ctx->k, r);
    en->n_requests++;
    en->n_failed += failed;
    if (s->o->jsonl) add_json_answer(&r->out, s, r);
    if (r->seq) en->idle[en->n_idle++] = r->seq;
    r->done = true;
    request_strip(r);
    en->held += r->held = sizeof *r + r->out.n + r->track.n;
}

// ---- Requests come, run and go ----

// Reads on in what a request of the command line is made of, of which generate takes all texts: a piece of a file, or the next one.
static void read_more_input(struct engine *en, struct request *r) {
    const struct session *s = en->s;
    const struct options *o = s->o;
    const bool together = o->command == GENERATE;
    if (!r->file.f) {
        const struct input *in = en->next_input < o->n_inputs ? &o->inputs[en->next_input] : NULL;  // NULL: a state alone
        const bool continues = s->base || (together && en->next_input > 0);
        if (in && in->source == FROM_FILE) open_input(s, in, continues, &r->file, &r->error);
        else if (in) read_input(s, in, continues, &r->tokens, &r->scale, &r->error);
        if (in && in->source == FROM_WAV && !continues && r->tokens.n) r->n_carried = 1;  // what begins a clip is no sample of it
        en->next_input++;
    }
    if (r->file.f) read_piece(s, &r->file, &r->tokens, &r->error);
    r->streams = !r->error.text[0] && (r->file.f || (together && en->next_input < o->n_inputs));
}

// A text of the command line; generate takes all of them together as one prompt.
static struct request *next_input_request(struct engine *en) {
    const struct session *s = en->s;
    const struct options *o = s->o;
    const bool together = o->command == GENERATE;
    en->no_more = en->next_input > 0 && (together || en->next_input == o->n_inputs);
    if (en->no_more) return NULL;
    struct request *r = request_new(s, s->base);
    struct buffer id = {0};
    const enum source source = together ? FROM_TEXT : o->inputs[en->next_input].source;
    bool named = (source == FROM_FILE || source == FROM_WAV) && strcmp(o->inputs[en->next_input].value, "-") != 0;
    if (named) add_escaped(&id, str_of(o->inputs[en->next_input].value));
    else buffer_printf(&id, "%d", en->next_input + 1);
    buffer_add(&id, "", 1);
    r->id = id.p;
    const bool whole = r->settings.echo || o->logits || (o->command == EMBED && o->pool == POOL_NONE);
    do read_more_input(en, r);
    while (r->streams && (whole || r->tokens.n < 2));
    return r;
}

// A request for the record at hand, or a part of it.
static struct request *new_record_request(struct engine *en, char *id) {
    struct request *r = new_bases_request(en->s, en->s->base);
    r->id = id;
    r->record = copy_text(str_of(en->fasta.name));
    r->origin = en->fasta.origin;
    return r;
}

// Reads on in the record: the next piece; or all of it, where both strands are read or it is written, too.
static void read_bases(struct engine *en, struct request *r) {
    uint8_t piece[1 << 14];
    const bool whole = en->s->o->rc_average || r->settings.echo;
    size_t got = sizeof piece;
    for (bool more = true; more; more = whole && got == sizeof piece) {
        got = fasta_read(&en->fasta, piece, sizeof piece, &r->error);
        add_bases(en->s, r, piece, got);
    }
    r->streams = got == sizeof piece && !r->error.text[0];
    const bool is_long = r->tokens.n > sizeof piece;  // kept whole: one at a time
    en->long_record = r->streams || is_long ? r : NULL;
}

// The next line of --jsonl, --bed or --vcf that is not to be skipped. False: there is none, or none yet. An error: it is too long.
static bool next_input_line(struct engine *en, bool (*skip)(struct str line), struct str *line, struct error *e) {
    const struct options *o = en->s->o;
    enum line kind;
    do {
        kind = next_line(&en->lines, !en->first, line);
        if (kind == LINE && en->lines.n_lines == 1 && is_gzip(line->p, line->n))
            die("%s is compressed; use: %s", en->lines.path, o->jsonl ? "zcat FILE | mamba ... --jsonl"
                : o->bed ? "zcat FILE | mamba ... --bed -" : "bcftools view FILE | mamba ... --vcf -");
        if (kind == LINE && line->n && line->p[line->n - 1] == '\r') line->n--;
    } while (kind == LINE && skip(*line));
    if (kind == LINE_TOO_LONG) set_error(e, "the line has more than %d bytes", MAX_LINE);
    en->no_more = kind == NO_MORE_LINES;
    return kind == LINE || kind == LINE_TOO_LONG;
}

// A request that has failed: what is wrong with the present line.
static struct request *line_error(struct engine *en, const char *what) {
    struct request *r = request_new(en->s, NULL);
    set_error(&r->error, "%s: line %" PRId64 ": %s", en->lines.path, en->lines.n_lines, what);
    return r;
}

// --bed: the next region, as if it were a record. False: there is none yet, or (r: an error of its own) it cannot be read.
static bool next_region(struct engine *en, struct request **r) {
    struct error e = {""};
    struct str line = {NULL, 0};
    if (!next_input_line(en, bed_is_comment, &line, &e)) return false;
    if (!e.text[0]) {
        int64_t begin, end;
        const struct fasta_record *record = bed_parse(&en->fasta, line, &begin, &end, &e);
        if (record && fasta_seek(&en->fasta, record, begin, end, &e)) return true;
    }
    *r = line_error(en, e.text);
    return false;
}

// The next record of the file. False: there is none, or (r: an error of its own) the file cannot be read.
static bool next_record(struct engine *en, struct request **r) {
    struct error e = {""};
    *r = NULL;
    if (en->s->o->bed) return next_region(en, r);
    if (fasta_next(&en->fasta, &e)) return true;
    en->no_more = true;
    if (!e.text[0]) return false;
    *r = request_new(en->s, NULL);
    (*r)->error = e;
    return false;
}

static struct request *next_record_request(struct engine *en) {
    struct request *r;
    struct buffer id = {0};
    if (en->long_record) return NULL;
    if (!next_record(en, &r)) return r;
    const struct fasta *fa = &en->fasta;
    buffer_printf(&id, "%s", fa->name);
    if (fa->in_region) buffer_printf(&id, ":%" PRId64 "-%" PRId64, fa->origin + 1, fa->origin + fa->n_left);
    r = new_record_request(en, id.p);
    read_bases(en, r);
    return r;
}

// --window: its bases, and of the record's last one those that are left. Named as samtools names regions.
static struct request *next_window_request(struct engine *en) {
    const struct options *o = en->s->o;
    struct window *w = &en->window;
    const size_t window = (size_t)o->window, stride = (size_t)(o->stride ? o->stride : o->window);
    for (;;) {
        struct request *r;
        struct error e = {""};
        if (!w->in_record) {
            if (!next_record(en, &r)) return r;
            w->in_record = true;
            w->n = 0;
            w->from = w->covered = 0;
        }
        while (w->from > en->fasta.n_bases && fasta_read(&en->fasta, w->bases, 1, &e) == 1) {}  // between windows
        w->n += fasta_read(&en->fasta, w->bases + w->n, window - w->n, &e);
        w->in_record = w->n == window && !e.text[0];
        int64_t end = w->from + (int64_t)w->n;
        if ((end <= w->covered || !w->n) && !e.text[0]) continue;  // nothing new
        struct buffer id = {0};
        buffer_printf(&id, "%s:%" PRId64 "-%" PRId64, en->fasta.name, en->fasta.origin + w->from + 1, en->fasta.origin + end);
        r = new_record_request(en, id.p);
        r->origin += w->from;
        r->error = e;
        add_bases(en->s, r, w->bases, w->n);
        w->covered = end;
        w->from += (int64_t)stride;
        w->n = stride < w->n ? w->n - stride : 0;
        if (w->n) memmove(w->bases, w->bases + stride, w->n);
        return r;
    }
}

// --rc-average: the other strand, from its beginning.
static void reverse_strand(const struct session *s, struct request *r) {
    int32_t *p = r->tokens.p + r->n_carried;
    const size_t n = r->tokens.n - r->n_carried;
    for (size_t i = 0, j = n; i < j; i++) {
        int32_t swap = p[i];
        p[i] = p[--j];
        p[j] = swap;
    }
    for (size_t i = 0; i < n; i++)
        for (const char *letter = "ACGTacgt"; *letter; letter++)
            if (p[i] == s->tokenizer.byte_token[(uint8_t)*letter]) {
                p[i] = letter_token(&s->tokenizer, complement((uint8_t)*letter));
                break;
            }
    request_rewind(r, s);
    r->reversed = true;
    r->n_fed = 0;
}

// Where the variant's window lies and what is in it. False: there is no ratio, and e says why to people.
static bool variant_window(struct engine *en, struct variant *v, struct error *e) {
    const int64_t window = en->s->o->window ? en->s->o->window : VCF_WINDOW, n_ref = (int64_t)v->alleles[0].n;
    const struct fasta_record *record = fasta_find(&en->fasta, v->column[VCF_CHROM], e);
    const char **problem = &v->problem;
    if (!record) return *problem = "NO_REFERENCE", false;
    if (v->position < 0 || v->position > record->n_bases - n_ref)
        return *problem = "OUT_OF_RANGE", fail(e, "%s has %" PRId64 " bases", record->name, record->n_bases);
    if (!is_sequence(v->alleles[0])) return *problem = "BAD_REF", fail(e, "REF is no sequence of A, C, G and T");
    if (n_ref > window) return *problem = "TOO_LONG", fail(e, "REF has %" PRId64 " bases, --window %" PRId64, n_ref, window);
    int64_t begin = v->position + n_ref / 2 - window / 2, end = begin + window;
    if (begin < 0) begin = 0;
    if (end > record->n_bases) end = record->n_bases;
    v->bases = xmalloc((size_t)(end - begin));
    v->ref = (size_t)(v->position - begin);
    *problem = "BAD_REFERENCE";
    if (!fasta_seek(&en->fasta, record, begin, end, e)) return false;
    v->n_bases = fasta_read(&en->fasta, v->bases, (size_t)(end - begin), e);
    if (e->text[0]) return false;
    *problem = "REF_MISMATCH";
    for (size_t i = 0; i < v->alleles[0].n; i++)
        if (nucleotide((uint8_t)v->alleles[0].p[i], false) != toupper(v->bases[v->ref + i]))
            return fail(e, "REF is %.*s, but %s has %.*s there", str_show(v->alleles[0]), v->alleles[0].p, en->fasta.path,
                        str_show(v->alleles[0]), (const char *)v->bases + v->ref);
    *problem = NULL;
    return true;
}

// --vcf: the next line. A request that has parts is answered when they have ended; others are at once.
static struct request *next_variant_request(struct engine *en) {
    struct str line;
    struct error e = {""};
    const bool found = next_input_line(en, is_blank, &line, &e);
    if (en->no_more && !en->vcf_declared) die("%s: no line #CHROM; expected a VCF", en->lines.path);
    if (!found) return NULL;
    if (e.text[0]) return line_error(en, e.text);
    struct request *r = request_new(en->s, NULL);
    if (!en->has_header) add_header(en, r);
    const size_t n_before = r->out.n;
    if (line.p[0] == '#') {
        if (str_begins(line, "#CHROM") && split_line(line.p, line.n, false, NULL, 0) < VCF_COLUMNS)
            die("%s: line %" PRId64 ": fewer than %d columns between tabs; expected those of a VCF, up to INFO", en->lines.path,
                en->lines.n_lines, VCF_COLUMNS);
        en->vcf_declared |= add_vcf_header(&r->out, line);
        if (en->s->o->tsv) r->out.n = n_before;
        return r;
    }
    if (!en->vcf_declared)
        die("%s: line %" PRId64 " is no variant of a VCF: no line #CHROM came before it", en->lines.path, en->lines.n_lines);
    struct variant *v = r->variant = xcalloc(1, sizeof *v);
    if (!variant_parse(v, line, &e)) {
        request_free(r);
        return line_error(en, e.text);
    }
    bool wanted = false;    // by an allele
    for (int i = 1; i < v->n_alleles; i++) wanted |= !isnan(v->nll[i]);
    if (!wanted) return r;
    if (!variant_window(en, v, &e)) {
        set_error(&r->error, "%s: line %" PRId64 ": %.*s:%" PRId64 ": %s", en->lines.path, en->lines.n_lines,
                  str_show(v->column[VCF_CHROM]), v->column[VCF_CHROM].p, v->position + 1, e.text);
        return r;
    }
    for (int strand = 0; strand <= (int)en->s->o->rc_average; strand++) {
        struct request *part = new_part(en, r, en->s->base, PREFIX, strand);
        part->next = en->prefixes;
        en->prefixes = part;
        v->n_parts++;
    }
    return r;
}

// A line of --jsonl; empty ones are passed over. A line that cannot be used is a request with an error.
static struct request *next_line_request(struct engine *en) {
    struct session *s = en->s;
    struct str line, prompt = {NULL, 0};
    struct error e = {""};
    if (!next_input_line(en, is_blank, &line, &e)) return NULL;
    struct request *r = request_new(s, s->base);
    r->error = e;
    if (!e.text[0] && request_parse(r, line, s->model.c.n_vocab, &prompt) && prompt.p)
        read_text(s, prompt, s->base != NULL, &r->tokens, &r->error);
    if (!r->id) {  // the line's number tells answers without an id apart
        struct buffer id = {0};
        buffer_printf(&id, "%" PRId64, en->lines.n_lines);
        r->id = id.p;
    }
    return r;
}

// The next request of the input; NULL: there is none, or none yet.
static struct request *next_request(struct engine *en) {
    const struct options *o = en->s->o;
    if (o->jsonl) return next_line_request(en);
    if (o->vcf) return next_variant_request(en);
    if (o->window) return next_window_request(en);
    return o->fasta ? next_record_request(en) : next_input_request(en);
}

// It gets a sequence and runs, if there is anything to run.
static void request_start(struct engine *en, struct request *r) {
    if (!r->error.text[0] && request_begin(en, r)) {
        r->seq = en->n_idle ? en->idle[--en->n_idle] : context_sequence(en->ctx);
        request_rewind(r, en->s);
        if (r->n_feed) en->running[en->n_running++] = r;
    }
    if (!r->n_feed || r->error.text[0]) request_end(en, r);
}

static bool ends_early(const struct engine *en) { return interrupted || en->reader_gone; }

// Lets requests in while there is room: first the parts of those that have begun. It may wait for input, but not for what
// would not be answered.
static void engine_admit(struct engine *en) {
    while (en->n_running < en->n_slots && !ends_early(en)) {
        struct request *r = next_part(en);
        if (r) {
            struct base *base = r->base != en->s->base ? r->base : NULL;
            request_start(en, r);
            if (base) next_allele(en, base);
            continue;
        }
        if (en->no_more || en->held >= HELD_BYTES || !(r = next_request(en))) break;
        *en->end = r;
        en->end = &r->next;
        if (!en->s->o->vcf) request_start(en, r);
        else if (!r->variant || !r->variant->n_parts) request_end(en, r);  // a line of VCF does not run itself
    }
}

// The next tokens of a request that streams, in place of those that were fed.
static void request_more(struct engine *en, struct request *r) {
    forget_fed(r);
    const size_t n_before = r->tokens.n;
    if (en->s->o->fasta) read_bases(en, r);
    else read_more_input(en, r);
    for (size_t i = n_before; r->resume && i < r->tokens.n; i++) remember(r->resume, r->tokens.p[i]);
    plan_feed(r);
}

// The next tokens of the running requests: first one of each that draws tokens; prompts share the rest. Returns their number.
static int engine_batch(struct engine *en) {
    int n = 0, left = en->ctx->max_tokens;
    for (int i = 0; i < en->n_running; i++) {
        struct request *r = en->running[i];
        while (r->streams && r->n_feed - r->n_fed < (size_t)left) request_more(en, r);
    }
    for (int prompts = 0; prompts < 2; prompts++)
        for (int i = 0; i < en->n_running && left; i++) {
            struct request *r = en->running[i];
            const size_t n_left = r->n_feed - r->n_fed;
            bool draws = en->s->o->command == GENERATE && r->settings.n_predict != 0;
            if ((n_left > 0) != prompts || (!n_left && !draws)) continue;
            int now = n_left == 0 ? 1 : n_left < (size_t)left ? (int)n_left : left;
            draws &= (size_t)now >= n_left && !r->streams && !r->error.text[0];
            const int32_t *tokens = n_left ? r->tokens.p + (r->n_fed - r->n_dropped) : r->resume->pending;
            en->segments[n] = (struct segment){r->seq, tokens, now, draws && !(r->all_rows && n_left)};
            en->batch[n++] = r;
            left -= now;
        }
    return n;
}

// A row's next token is drawn or looked up, and its log-probability is computed where somebody wants it.
static void judge_row(struct engine *en, struct row *row, const float *logits, struct sampler *scratch) {
    const struct request *r = row->r;
    const int n_vocab = en->s->model.c.n_vocab;
    const bool draws = row->at + 1 >= n_tokens_of(r) && en->s->o->command == GENERATE;
    struct token_logprob *next = &row->next;
    *next = (struct token_logprob){.id = -1};
    if (en->ctx->only_choices) {
        const struct device_choice *choice = &en->ctx->choices[row - en->rows];
        row->max = choice->max;
        next->id = choice->id;
        return;
    }
    row->max = en->ctx->k->finite_max(logits, n_vocab);
    if (!isfinite(row->max)) return;
    if (row->at + 1 < n_tokens_of(r)) next->id = token_at(r, row->at + 1);
    else if (draws) next->id = sample(scratch, &r->settings.sampling, logits, &en->s->banned, r->resume, r->seq->n_past);
    if (next->id < 0 || (draws && r->settings.logprobs < 0)) return;
    for (int k = 0; k < MAX_TOP; k++) row->top[k].id = -1;  // a small vocabulary may have fewer
    next->logprob = log_probability(scratch, logits, row->max, next->id, r->settings.logprobs, row->top);
}

// Rows 0 ... n-1 of the logits are given to their requests.
static void engine_take_rows(struct engine *en, int n) {
    const size_t ld = (size_t)en->ctx->ld_vocab, n_vocab = (size_t)en->s->model.c.n_vocab;
    const bool worth_a_team = n > 1 && en->ctx->n_team > 1 && (size_t)n * n_vocab > 1 << 16;
    (void)worth_a_team;  // without OpenMP
#ifdef _OPENMP
#pragma omp parallel for num_threads(en->ctx->n_team) schedule(dynamic) if (worth_a_team)
#endif
    for (int i = 0; i < n; i++) {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        flush_denormals();
        judge_row(en, &en->rows[i], en->ctx->logits + (size_t)i * ld, &en->samplers[thread]);
    }
    for (int i = 0; i < n; i++) {
        struct row *row = &en->rows[i];
        struct request *r = row->r;
        check_finite(en->s, row->max, r->n_before + (int64_t)row->at + 1);
        if (en->s->o->logits && fwrite(en->ctx->logits + (size_t)i * ld, sizeof(float), n_vocab, en->s->out.f) != n_vocab)
            die("%s: %s", en->s->o->logits, strerror(errno));
        struct token_logprob kept = row->next;
        if (en->s->o->command == SCORE && is_unscored(en->s, kept.id)) kept.logprob = (double)NAN;
        if (kept.id >= 0) keep_logprob(r, kept, row->top);
        if (row->at + 1 < n_tokens_of(r)) score_token(en, r, row->at, &row->next);
        else if (en->s->o->command == GENERATE && row->next.id < 0) die("no token is left to choose from");
        else if (en->s->o->command == GENERATE) generate_token(en, r, row->next.id);
    }
}

// Logits of all tokens of the batch's requests that want them, a few rows at a time.
static void engine_score(struct engine *en, int n) {
    int n_rows = 0;
    for (int i = 0, token = 0; i < n; token += en->segments[i++].n_tokens) {
        struct request *r = en->batch[i];
        if (!r->all_rows || r->n_fed == r->n_feed) continue;
        for (int t = 0; t < en->segments[i].n_tokens; t++) {
            size_t at = r->n_fed + (size_t)t;
            if (en->s->o->command == SCORE && at + 1 == n_tokens_of(r) && !en->s->o->logits) continue;  // nothing follows
            if (n_rows == en->ctx->max_rows) {
                logits_of(en->ctx, en->row_tokens, n_rows);
                engine_take_rows(en, n_rows);
                n_rows = 0;
            }
            en->row_tokens[n_rows] = token + t;
            en->rows[n_rows++] = (struct row){.r = r, .at = at};
        }
    }
    if (!n_rows) return;
    logits_of(en->ctx, en->row_tokens, n_rows);
    engine_take_rows(en, n_rows);
}

// Are the logits of this step's n segments wanted for their likeliest token alone? A GPU finds that itself.
static bool all_greedy(const struct engine *en, int n) {
    int n_rows = 0;
    for (int i = 0; i < n; i++) {
        const struct settings *settings = &en->batch[i]->settings;
        const struct sampling *how = &settings->sampling;
        if (!en->segments[i].want_logits) continue;
        n_rows++;
        if (!is_greedy(how) || how->repeat_penalty != 1.0f || settings->logprobs >= 0) return false;
    }
    return n_rows > 0;
}

// No text is too long, but past the length of those that a model was trained on it may know less. Said once, and not inside a text
// that is being written.
static void say_long(struct engine *en, bool is_end) {
    const struct session *s = en->s;
    const bool streams = s->o->command == GENERATE && !s->o->jsonl;
    if (!en->is_long || en->said_long || s->o->quiet || (streams && !is_end)) return;
    progress_clear(&en->progress);
    fprintf(stderr, "mamba: %s was trained on texts of %d tokens, and a longer one came: it may be worse past that%s\n",
            s->o->model, s->model.c.context_length, s->o->fasta && !s->o->window && !streams ? "; --window cuts records" : "");
    en->said_long = true;
}

// The one that logits for drawing stand behind: of the text, or drawn.
static size_t last_token(const struct request *r) { return n_tokens_of(r) - 1 + (size_t)r->n_generated; }

// One forward, and what its results mean to each request.
static void engine_step(struct engine *en) {
    const enum command command = en->s->o->command;
    double start = now_seconds(), *time = en->n_sampled ? &en->sample_seconds : &en->prompt_seconds;
    int n = engine_batch(en), n_rows = 0;
    en->ctx->only_choices = en->ctx->device && all_greedy(en, n);
    forward(en->ctx, en->segments, n, en->n_layers);
    const int trained = en->s->model.c.context_length;
    for (int i = 0; i < n && trained; i++) en->is_long |= en->segments[i].seq->n_past > trained;
    say_long(en, false);
    for (int i = 0; i < n; i++)  // logits that the forward made: of tokens that are drawn
        if (en->segments[i].want_logits) en->rows[n_rows++] = (struct row){.r = en->batch[i], .at = last_token(en->batch[i])};
    engine_take_rows(en, n_rows);
    en->ctx->only_choices = false;
    engine_score(en, n);
    for (int i = 0, token = 0; i < n; token += en->segments[i++].n_tokens) {
        struct request *r = en->batch[i];
        if (command == EMBED || command == CLASSIFY) embed_rows(en, r, token, en->segments[i].n_tokens);
        if (r->n_fed == r->n_feed) continue;
        r->n_fed += (size_t)en->segments[i].n_tokens;
        en->n_fed += en->segments[i].n_tokens;
    }
    *time += now_seconds() - start;
    int n_left = 0;
    for (int i = 0; i < en->n_running; i++) {
        struct request *r = en->running[i];
        bool draws = command == GENERATE && r->settings.n_predict != 0;
        bool ended = draws ? r->finish_reason != NULL : r->n_fed == r->n_feed && !r->streams;
        if (ended && en->s->o->rc_average && !r->reversed && !r->whole) {
            reverse_strand(en->s, r);
            ended = false;
        }
        if (ended || r->error.text[0]) request_end(en, r);
        else en->running[n_left++] = r;
    }
    en->n_running = n_left;
}

// Writes what requests have for the output: in the order of the input, or (--unordered) as they end.
static void write_answers(struct engine *en) {
    bool wrote = false;
    if (en->reader_gone) return;
    for (struct request **at = &en->first; *at;) {
        struct request *r = *at;
        if (r->out.n && en->s->o->fasta && en->s->o->command == EMBED) {
            buffer_add(&en->array, r->out.p, r->out.n);
        } else if (r->out.n) {
            progress_clear(&en->progress);
            fwrite(r->out.p, 1, r->out.n, en->output);
            wrote = true;
        }
        if (r->track.n && fwrite(r->track.p, 1, r->track.n, en->s->out.f) != r->track.n)
            die("%s: %s", en->s->o->track, strerror(errno));
        r->out.n = r->track.n = 0;
        if (r->done) {
            *at = r->next;
            if (!*at) en->end = at;
            en->held -= r->held;
            request_free(r);
        } else if (en->s->o->unordered) {
            at = &r->next;
        } else {
            break;
        }
    }
    if (wrote) fflush(en->output);
    if (!ferror(en->output)) return;
    en->reader_gone = errno == EPIPE || (errno == EINTR && interrupted);
    if (!en->reader_gone) die("%s: %s", en->output == stdout ? "standard output" : en->s->out.path, strerror(errno));
}

// How much of the work is done; negative where nobody knows.
static double engine_fraction(const struct engine *en) {
    const struct options *o = en->s->o;
    const struct request *r = en->first;
    const struct line_reader *l = &en->lines;
    if (o->fasta || o->jsonl) {
        const bool by_lines = o->jsonl || o->bed || o->vcf;
        int64_t done = by_lines ? l->n_bytes - (int64_t)(l->b.n - l->start)
                                : en->fasta.n_read - (int64_t)(en->fasta.n - en->fasta.at);
        return en->input_size ? (double)done / (double)en->input_size : -1;
    }
    if (!r || !r->tokens.n) return -1;
    if (en->s->sound && en->n_sampled)
        return r->settings.n_predict > 0 ? (double)r->n_generated / (double)r->settings.n_predict : -1;
    double done = (double)r->n_fed / (double)n_tokens_of(r);
    if (r->file.f) done = r->file.size ? (double)(r->file.n_read - (int64_t)r->file.b.n) / (double)r->file.size : -1;
    return done < 0 ? -1 : ((double)en->n_requests + done) / (o->command == GENERATE ? 1 : o->n_inputs);
}

static void engine_progress(struct engine *en) {
    const struct options *o = en->s->o;
    if (o->command == GENERATE && !o->jsonl && !en->s->sound && en->n_sampled) return;  // the text itself shows how far it is
    const bool draws = en->s->sound && en->n_sampled;  // the speed of drawing is not that of reading a prompt
    if (draws && en->progress.what != command_names[GENERATE]) {
        en->progress.what = command_names[GENERATE];
        en->progress.start = now_seconds();
    }
    progress_show(&en->progress, engine_fraction(en), o->jsonl || o->fasta ? en->n_requests : -1,
                  draws ? en->n_sampled : en->n_fed + en->n_sampled);
}

// Runs all requests. Ends early when a signal came or the output's reader has gone.
static void engine_run(struct engine *en) {
    for (;;) {
        engine_admit(en);
        write_answers(en);
        if (ends_early(en)) break;
        if (en->n_running) {
            engine_step(en);
            write_answers(en);
            engine_progress(en);
        } else if (en->no_more && !en->first) {
            break;
        }
    }
    progress_clear(&en->progress);
}

// ====================================================================================================================
// 15. Commands.
// generate, score, embed, classify, tokenize, inspect. Calls everything above; called by section 17. Standard output carries
// data only; what is for people goes to standard error.
// ====================================================================================================================

// ---- Opening ----

// tokenizer.bin beside the model, beside the program, or in share/mamba of the program's prefix: the i-th of these paths.
static bool default_tokenizer_path(const struct options *o, int i, char *path, size_t size) {
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    const char *from = i == 0 ? o->model : program, *slash = strrchr(from, '/');
    if (i && !slash) return false;
    snprintf(path, size, "%.*s%stokenizer.bin", slash ? (int)(slash - from) + 1 : 0, from, i == 2 ? "../share/mamba/" : "");
    return true;
}

static bool open_default_tokenizer(struct session *s, struct error *e) {
    char path[PATH_MAX + 64];
    for (int i = 0; i < 3; i++) {
        if (!default_tokenizer_path(s->o, i, path, sizeof path) || access(path, R_OK) != 0) continue;
        struct gguf g;
        struct error inner = {""};
        if (!gguf_open(&g, path, e)) return false;
        const bool ok = tokenizer_load(&s->tokenizer, &g, &inner);
        gguf_close(&g);
        if (!ok) return fail(e, "%s: %s", path, inner.text);
        // Only a model that was made for this vocabulary has about as many rows: they are padded to a multiple of 8 to 128.
        int spare = s->model.c.n_vocab - s->tokenizer.n_tokens;
        s->has_tokenizer = spare >= 0 && spare < 128;
        if (s->has_tokenizer) return true;
        tokenizer_close(&s->tokenizer);
    }
    return true;
}

static void open_tokenizer(struct session *s) {
    struct error e = {""};
    const char *path = s->o->tokenizer ? s->o->tokenizer : s->o->model;
    struct gguf other = {0};
    const struct gguf *g = &s->model.file;
    if (s->o->tokenizer) {
        if (!gguf_open(&other, path, &e)) die("%s", e.text);
        if (!gguf_has_tokenizer(&other)) die("%s: holds no tokenizer", path);
        g = &other;
    }
    if (gguf_has_tokenizer(g)) {
        if (!tokenizer_load(&s->tokenizer, g, &e)) die("%s: %s", path, e.text);
        s->has_tokenizer = true;
    } else if (!open_default_tokenizer(s, &e)) {
        die("%s", e.text);
    }
    gguf_close(&other);
    if (s->has_tokenizer && s->tokenizer.n_tokens > s->model.c.n_vocab)
        die("%s: a vocabulary of %" PRId32 " tokens; expected at most %d, the rows of the embedding", path,
            s->tokenizer.n_tokens, s->model.c.n_vocab);
    if (s->o->tokenizer && s->model.c.n_vocab - s->tokenizer.n_tokens >= 1024 && !s->o->quiet)  // more than what pads a vocabulary
        fprintf(stderr, "mamba: --tokenizer %s: %" PRId32 " tokens for %d rows of the embedding: is it this model's?\n", path,
                s->tokenizer.n_tokens, s->model.c.n_vocab);
}

// Tokens that must never be drawn: rows that pad the vocabulary, unused and unknown tokens, with --ignore-eos the end of text,
// and in DNA what is no letter.
static struct ids banned_tokens(const struct session *s) {
    struct ids banned = {0};
    const struct tokenizer *t = &s->tokenizer;
    for (int32_t id = 0; id < s->model.c.n_vocab && s->has_tokenizer; id++) {
        // NOLINTNEXTLINE(clang-analyzer-unix.Malloc): a vocabulary that did not fit was closed, and another one loaded
        const int type = id < t->n_tokens ? t->type[id] : TOKEN_UNUSED;
        bool drawn = type == TOKEN_NORMAL || (type != TOKEN_UNUSED && type != TOKEN_UNKNOWN && !t->nucleotides);
        if (id == t->eos) drawn = !s->o->ignore_eos;
        if (!drawn) ids_add(&banned, id);
    }
    return banned;
}

static const struct gguf *mapped;  // the open model, for the handler

// A page of the model that is no longer in its file: somebody cut it, or its disk failed. All threads may find out at once:
// the first one speaks.
static void on_bus_error(int signal, siginfo_t *info, void *context) {
    (void)context;
    const uint8_t *at = info->si_addr;
    if (mapped && at >= mapped->map && at < mapped->map + mapped->size) {
        static atomic_flag said = ATOMIC_FLAG_INIT;
        const char *parts[] = {"mamba: ", mapped->path, ": became shorter while it was in use, or could not be read\n"};
        while (atomic_flag_test_and_set(&said)) pause();
        for (int i = 0; i < 3; i++)
            if (write(STDERR_FILENO, parts[i], strlen(parts[i])) < 0) break;
        unlink_unfinished();
        _exit(1);
    }
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(signal, &action, NULL);  // and the instruction fails once more
}

#ifdef MAMBA_SANDBOX
enum {                      // numbers of the kernel's interface, which are the same on every machine
    LANDLOCK_CREATE_RULESET = 444, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF, IO_URING_SETUP = 425,
    FILES_READ = 1 << 2, FILES_READ_DIR = 1 << 3, FILES_REMOVE = 1 << 5, FILES_MAKE = 1 << 8,
};

// Lets the process still do `access` to a file, or to what lies in a folder. One that does not exist needs no rule.
static void sandbox_allow(int ruleset, const char *path, uint64_t access) {
    struct {
        uint64_t access;
        int32_t parent;
    } __attribute__((packed)) rule = {access, path ? open(path, O_PATH | O_CLOEXEC) : -1};
    if (rule.parent < 0) return;
    syscall(LANDLOCK_ADD_RULE, ruleset, 1, &rule, 0);
    close(rule.parent);
}

// No more sockets of any kind: Landlock knows TCP only.
static bool sandbox_sockets(void) {
    struct sock_filter code[] = {
#if defined(__x86_64__)     // whose 32-bit system calls have other numbers
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
#endif
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_socketcall        // 32-bit machines have two ways
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socketcall, 4, 0),
#endif
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IO_URING_SETUP, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 1, 0),  // and so have x32's
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EACCES),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// From here on the process can open the files that its command line names, and nothing else: no file, no socket. Called
// before anything of a model or request is looked at, when the output is open, and before any thread is started.
static void sandbox_enter(const struct options *o, const struct outfile *out, const struct outfile *state) {
#ifdef _OPENMP
    omp_get_max_threads();  // clang's runtime opens a file of its own when it begins, which this makes it do
#endif
    long abi = syscall(LANDLOCK_CREATE_RULESET, NULL, (size_t)0, 1);  // the kernel's version of the interface
    if (abi < 1) die("--sandbox: this kernel has no Landlock (Linux 5.13, and enabled at boot); run without --sandbox");
    uint64_t handled = (1 << (abi == 1 ? 13 : abi == 2 ? 14 : abi < 5 ? 15 : 16)) - 1;  // all rights to files it knows
    int ruleset = (int)syscall(LANDLOCK_CREATE_RULESET, &handled, sizeof handled, 0);
    const char *named[] = {o->model, o->tokenizer, o->load_state, o->prefix, o->fasta, o->bed, o->vcf};
    for (size_t i = 0; i < sizeof named / sizeof *named; i++) sandbox_allow(ruleset, named[i], FILES_READ);
    for (int i = 0; i < o->n_inputs; i++)
        if (o->inputs[i].source == FROM_FILE || o->inputs[i].source == FROM_WAV)
            sandbox_allow(ruleset, o->inputs[i].value, FILES_READ);
    for (int i = 0; i < 3; i++) {
        char path[PATH_MAX + 64];
        if (default_tokenizer_path(o, i, path, sizeof path)) sandbox_allow(ruleset, path, FILES_READ);
    }
    for (int i = 0; i < 2; i++) {  // their folders, where they get their names: not to open what is there
        const char *temporary = i ? state->temporary : out->temporary, *slash = temporary ? strrchr(temporary, '/') : NULL;
        char folder[PATH_MAX];
        if (!temporary) continue;
        snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - temporary) + 1 : 1, slash ? temporary : ".");
        sandbox_allow(ruleset, folder, FILES_READ_DIR | FILES_REMOVE | FILES_MAKE);
    }
    if (ruleset < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0 ||
        !sandbox_sockets())
        die("--sandbox: %s", strerror(errno));
    close(ruleset);
}
#else
static void sandbox_enter(const struct options *o, const struct outfile *out, const struct outfile *state) {
    (void)o, (void)out, (void)state;
    die("--sandbox needs Linux, and this program was built without its headers");
}
#endif

// What a file's name promises: sound in a format that this program does not write, or samples without a header.
static const char *const other_formats[] = {".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aif", ".au", NULL};
static const char *const raw_names[] = {".raw", ".pcm", NULL};

static bool name_ends(const char *name, const char *const *ends) {
    const char *dot = strrchr(name, '.');
    for (; dot && *ends; ends++)
        if (strcasecmp(dot, *ends) == 0) return true;
    return false;
}

// Defaults that depend on the model: llama.cpp's for text; for sound those of the paper's experiments, which sample from the model
// as it is.
static void fill_defaults(struct session *s) {
    struct options *o = &s->own;
    struct sampling *how = &o->settings.sampling;
    const bool audio = s->model.c.sample_rate != 0;
    if (o->greedy) how->temperature = 0;
    if (isnan(how->temperature)) how->temperature = audio ? 1.0f : 0.8f;
    if (how->top_k < 0) how->top_k = audio ? 0 : 40;
    if (isnan(how->top_p)) how->top_p = audio ? 1.0f : 0.95f;
    if (isnan(how->min_p)) how->min_p = audio ? 0.0f : 0.05f;
    if (!audio && (o->seconds > 0 || o->sound_format))
        die("%s is no audio model: --seconds and --sound-format do not apply", o->model);
    if (o->settings.n_predict < -1) {
        const double n = audio ? (o->seconds > 0 ? (double)o->seconds : 5) * s->model.c.sample_rate : 128;
        if (n > 1e9) die("--seconds %g: more than 1000000000 samples at %d Hz", (double)o->seconds, s->model.c.sample_rate);
        o->settings.n_predict = n < 1 ? 1 : (int)lrint(n);
    }
    if (audio && o->tokenizer) die("--tokenizer does not apply to an audio model");
    if (audio && o->input_implied) o->inputs[0].source = FROM_WAV;
    if (audio && o->layer >= 0) die("--layer does not apply to an audio model: its layers have different rates");
    if (audio && o->settings.n_stops) die("--stop does not apply to sound");
    if (!audio || o->command != GENERATE || o->print_ids) return;
    if (o->jsonl) die("--jsonl with an audio model needs --print-ids: its answers are text");
    if (!o->output) die("%s writes sound: name a file with -o FILE, or -o - for a pipe", o->model);
    if (name_ends(o->output, other_formats))
        die("%s: only WAV and raw samples are written; convert them: -o - --sound-format wav | sox -t wav - %s", o->output,
            o->output);
    s->sound = true;
    if (!o->sound_format) o->sound_format = name_ends(o->output, raw_names) ? SOUND_RAW : SOUND_WAV;
}

// Lower case letters stay what they are, where --case-sensitive says so and there are any. To a vocabulary without them they are N,
// which is never scored: alleles would all be the same.
static void keep_case(struct session *s) {
    const struct tokenizer *t = &s->tokenizer;
    s->tokenizer.keep_case = s->o->case_sensitive;
    if (s->o->case_sensitive && !s->o->fasta && !t->nucleotides)
        die("%s: the vocabulary is none of nucleotides: --case-sensitive does not apply", s->o->model);
    if (s->o->case_sensitive && s->o->vcf && s->has_tokenizer && letter_token(t, 'a') == letter_token(t, 'n'))
        die("%s: the vocabulary has no lower case: with --case-sensitive, alleles in lower case would have no ratio", s->o->model);
}

// output: the file that the command writes, besides standard output or in its place; NULL: none.
static void open_session(struct session *s, const struct options *o, const char *output) {
    struct error e = {""};
    *s = (struct session){.own = *o};
    s->o = &s->own;
    if (!s->own.n_threads) s->own.n_threads = default_threads();  // before the sandbox: it asks files of the kernel
    catch_signals(end_at_once);
    if (!outfile_open(&s->out, output, &e)) die("%s", e.text);  // better now than after an hour
    if (o->save_state && !outfile_open(&s->state, o->save_state, &e)) die("%s", e.text);
    if (o->sandbox) sandbox_enter(o, &s->out, &s->state);
    if (!model_open(&s->model, o->model, &e)) die("%s", e.text);
    fill_defaults(s);
    mapped = &s->model.file;
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
    if (!s->model.c.sample_rate) open_tokenizer(s);
    s->banned = banned_tokens(s);
    keep_case(s);
    const bool is_dna = s->has_tokenizer && (s->tokenizer.nucleotides || o->fasta);
    for (int i = 0; i < 2; i++)
        s->unscored[i] = is_dna && (i == 0 || o->case_sensitive) ? letter_token(&s->tokenizer, "Nn"[i]) : -1;
}

static void close_session(struct session *s) {
    mapped = NULL;
    if (s->out.temporary) outfile_discard(&s->out);  // it has not become whole
    if (s->state.temporary) outfile_discard(&s->state);
    base_free(s->base);
    free(s->banned.p);
    tokenizer_close(&s->tokenizer);
    model_close(&s->model);
}

// ---- Running requests ----

// A wait that a signal ended is no error.
static _Noreturn void die_reading(const struct error *e) {
    stop_if_interrupted();
    die("%s", e->text);
}

// What every request continues: a saved state, then the prefix. The last token is left to be fed by each of them, so that
// they know what the model expects next.
static void read_base(struct session *s, struct context *ctx) {
    const struct options *o = s->o;
    struct error e = {""};
    struct ids tokens = {0};
    struct text_file file = {0};
    struct progress progress = progress_new("prefix", o->quiet);
    if (!o->load_state && !o->prefix) return;
    struct sequence *base = context_sequence(ctx);
    struct resume *r = xcalloc(1, sizeof *r);
    r->scale = FULL_SCALE;
    if (o->load_state) {
        sequence_fetch(base, &s->model.c);
        if (!state_load(o->load_state, &s->model, base, r, &e)) die_reading(&e);
        sequence_return(base);
    }
    for (int i = 0; i < r->n_pending; i++) ids_add(&tokens, r->pending[i]);
    const bool continues = o->load_state != NULL, is_file = o->prefix && access(o->prefix, F_OK) == 0;
    const struct str text = {o->prefix, o->prefix ? strlen(o->prefix) : 0};
    if (is_file && !text_open(&file, o->prefix, continues, false, &e)) die_reading(&e);
    bool more = o->prefix != NULL;
    while (more && !interrupted) {
        const size_t n_before = tokens.n;
        if (!(file.f ? read_piece(s, &file, &tokens, &e) : read_text(s, text, continues, &tokens, &e))) die_reading(&e);
        for (size_t i = n_before; i < tokens.n; i++) remember(r, tokens.p[i]);
        if (tokens.n > n_before) r->n_bytes = 0;
        more = file.f != NULL;
        if (!tokens.n) continue;
        feed(ctx, base, tokens.p, tokens.n - 1, &progress);
        tokens.p[0] = tokens.p[tokens.n - 1];
        tokens.n = 1;
    }
    if (o->prefix && !tokens.n && !interrupted) die("--prefix: the text is empty");
    if (o->prefix && !is_file && !o->prefix[strcspn(o->prefix, " \t\n")])  // a word may be a misspelt name: said with -q too
        fprintf(stderr, "mamba: --prefix: there is no file %s, so this is the text\n", o->prefix);
    s->base = xcalloc(1, sizeof *s->base);
    *s->base = (struct base){.seq = base, .last = tokens.n ? tokens.p[tokens.n - 1] : -1, .resume = r};
    free(tokens.p);
    text_close(&file);
    stop_if_interrupted();
}

// A bound of the tokens that the inputs hold, so that a short text does not pay for a long one's buffers.
static int64_t bound_tokens(const struct options *o) {
    int64_t n = 2;          // the base's token, BOS
    struct stat st;
    if (o->jsonl || o->prefix || o->fasta) return o->ubatch;
    for (int i = 0; i < o->n_inputs; i++) {
        const char *value = o->inputs[i].value;
        if (o->inputs[i].source == FROM_TEXT || o->inputs[i].source == FROM_IDS) n += (int64_t)strlen(value);
        else n += strcmp(value, "-") != 0 && stat(value, &st) == 0 && S_ISREG(st.st_mode) ? st.st_size : o->ubatch;
        if (n > o->ubatch) return o->ubatch;
    }
    return n;
}

// The lines of --jsonl, --bed or --vcf: standard input, or a file.
static void open_lines(struct engine *en) {
    const struct options *o = en->s->o;
    const char *path = o->bed ? o->bed : o->vcf ? o->vcf : o->inputs[0].value;
    struct stat st;
    en->lines.path = input_name(path);
    if (strcmp(path, "-") != 0) {
        en->lines.fd = open(path, O_RDONLY | O_CLOEXEC);
        if (en->lines.fd < 0) die("%s: %s", path, strerror(errno));
    }
    if (fstat(en->lines.fd, &st) == 0 && S_ISREG(st.st_mode)) en->input_size = st.st_size;
}

// Ends the program when the vocabulary is not one of single letters, as an option needs it.
static void need_letters(const struct session *s, const char *option) {
    struct error e = {""};
    if (!need_tokenizer(s, &e)) die("%s", e.text);
    if (!s->tokenizer.characters) die("%s: the vocabulary is one of words; %s needs one of single letters", s->o->model, option);
}

static void open_fasta(struct engine *en) {
    const struct options *o = en->s->o;
    struct stat st;
    struct error e = {""};
    const struct tokenizer *t = &en->s->tokenizer;
    need_letters(en->s, "--fasta");
    for (const char *letter = o->case_sensitive ? "ACGTNacgtn" : "ACGTN"; *letter; letter++) {
        bool needed = strchr("ACGT", *letter) != NULL;  // the others may be the unknown token
        if ((needed ? t->byte_token[(uint8_t)*letter] : letter_token(t, (uint8_t)*letter)) < 0)
            die("%s: the vocabulary has no token for '%c'", o->model, *letter);
    }
    if (!fasta_open(&en->fasta, o->fasta, o->case_sensitive, &e)) die("%s", e.text);
    if (o->bed || o->vcf) {
        if (!fasta_index(&en->fasta, &e)) die("%s", e.text);
        open_lines(en);
    } else if (fstat(fileno(en->fasta.f), &st) == 0 && S_ISREG(st.st_mode)) {
        en->input_size = st.st_size;
    }
    if (!o->vcf) en->window.bases = xmalloc((size_t)o->window);
}

// An engine for the command's requests, which stand behind its base.
static struct engine *open_engine(struct session *s, FILE *output) {
    enum { DEFAULT_SLOTS = 16 };
    const struct options *o = s->o;
    int n_slots = o->n_parallel ? o->n_parallel : DEFAULT_SLOTS;
    if (!o->jsonl && !o->fasta) n_slots = o->command == GENERATE ? 1 : min_int(n_slots, o->n_inputs);
    struct engine *en = engine_new(s, n_slots, bound_tokens(o), output);
    if (o->jsonl) open_lines(en);
    if (o->fasta) open_fasta(en);
    catch_signals(on_signal);
    read_base(s, en->ctx);
    en->progress = progress_new(o->command == GENERATE && !o->jsonl ? "prompt" : command_names[o->command], o->quiet);
    en->progress.sample_rate = s->model.c.sample_rate;
    return en;
}

// The summary of --jsonl, and the exit status of every command that ran requests.
static int close_engine(struct engine *en) {
    const struct options *o = en->s->o;
    double seconds = now_seconds() - en->progress.start;
    if (o->jsonl && (!o->quiet || en->n_failed)) {
        fprintf(stderr, "mamba: %s%" PRId64 " requests, %" PRId64 " failed", interrupted ? "interrupted: " : "", en->n_requests,
                en->n_failed);
        if (!o->quiet)
            fprintf(stderr, ", %.1f requests/s; prompts %" PRId64 " tokens, %.1f tokens/s; generated %" PRId64
                    " tokens, %.1f tokens/s", (double)en->n_requests / seconds, en->n_fed, (double)en->n_fed / seconds,
                    en->n_sampled, (double)en->n_sampled / seconds);
        fputc('\n', stderr);
    }
    say_long(en, true);
    int status = interrupted ? 128 + interrupted : en->n_failed ? 1 : 0;
    base_free(en->s->base);  // its state may be on the engine's device
    en->s->base = NULL;
    engine_free(en);
    return status;
}

// A file is whole or not there at all: what failed is missing in it.
static void say_unwritten(const struct engine *en) {
    const char *path = en->s->out.path;
    struct error e = {""};
    if (en->reader_gone) set_error(&e, "%s: not written, because the reader of standard output left before the end", path);
    else if (en->n_failed && !interrupted) set_error(&e, "%s: not written, because %" PRId64 " failed", path, en->n_failed);
    else set_error(&e, "%s: not written: interrupted", path);
    print_line(stderr, e.text);
}

// ---- generate ----

// What is written at the end of n samples of sound: the header of a file says how many there are, also when fewer came than were
// to. (A pipe's cannot be changed, nor that of a file that sound was appended to.)
static void finish_sound(const struct session *s, int64_t n) {
    struct buffer header = {0};
    struct stat st;
    FILE *f = s->out.f;
    add_wav_header(&header, s->o->sound_format, s->model.c.sample_rate, n);
    if (s->o->sound_format == SOUND_MU_LAW && n % 2) putc(0, f);  // chunks have an even length
    const int64_t bytes = s->o->sound_format == SOUND_MU_LAW ? n + n % 2 : 2 * n;
    if (header.n && fflush(f) == 0 && fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode) &&
        st.st_size == (int64_t)header.n + bytes && !(fcntl(fileno(f), F_GETFL) & O_APPEND) && fseeko(f, 0, SEEK_SET) == 0) {
        fwrite(header.p, 1, header.n, f);
        fseeko(f, 0, SEEK_END);
    }
    free(header.p);
}

static void say_generated(const struct engine *en) {
    const struct options *o = en->s->o;
    const double speed = en->n_sampled > 1 ? (double)(en->n_sampled - 1) / en->sample_seconds : 0.0;
    const int rate = en->s->model.c.sample_rate;
    const bool from_ids = o->n_inputs && o->inputs[0].source == FROM_IDS;
    const bool first_added = rate && en->n_fed && !o->load_state && !o->prefix && !from_ids;  // the token before a clip
    if (o->quiet || o->jsonl || en->n_failed) return;
    if (rate)
        fprintf(stderr,
                "mamba: prompt %" PRId64 " samples, generated %" PRId64
                ", %.2f s of sound; %.0f samples/s, %.2f times real time; seed %" PRIu64 "\n",
                en->n_fed - first_added, en->n_sampled, (double)en->n_sampled / rate, speed,
                speed / rate, o->settings.sampling.seed);
    else
        fprintf(stderr,
                "mamba: prompt %" PRId64 " tokens, %.1f tokens/s; generated %" PRId64 " tokens, %.1f tokens/s; seed %" PRIu64
                "\n",
                en->n_fed, en->n_fed ? (double)en->n_fed / en->prompt_seconds : 0.0, en->n_sampled, speed,
                o->settings.sampling.seed);
}

static int command_generate(const struct options *o) {
    struct session s;
    struct error e = {""};
    open_session(&s, o, o->fasta_out ? o->fasta_out : o->output);
    const bool to_file = s.out.f != stdout;
    if (o->fasta_out) need_letters(&s, "--fasta-out");
    if (s.sound && !to_file && isatty(STDOUT_FILENO)) die("sound is no text for a terminal: use -o FILE, or a pipe");
    struct engine *en = open_engine(&s, s.out.f);
    engine_run(en);
    struct request *r = en->first;  // not ended: a signal came, or the reader left. What it has so far is kept
    bool cut = !o->jsonl && !o->fasta && r && r->resume && r->n_fed == r->n_feed && !r->streams;
    if (cut) {
        request_end(en, r);
        en->n_running = 0;  // it was the only one
        write_answers(en);
    }
    if (!o->quiet && !o->print_ids && !o->jsonl && !writes_fasta(o) && !to_file && !s.sound && !en->reader_gone &&
        isatty(STDOUT_FILENO))
        putchar('\n');
    if (s.sound && !en->n_failed && !en->reader_gone) finish_sound(&s, en->n_samples);
    if (!en->reader_gone) check_stdout();
    say_generated(en);
    const bool unfinished_text = interrupted && !cut && (en->first || !en->no_more);
    if (to_file && (en->n_failed || unfinished_text)) say_unwritten(en);
    else if (to_file && !en->reader_gone && !outfile_commit(&s.out, &e)) die("%s", e.text);
    if (en->kept) {         // last: a state is never ahead of what was written
        sequence_fetch(en->kept, &s.model.c);
        state_write(&s.state, &s.model, en->kept, en->kept_resume);
        if (!outfile_commit(&s.state, &e)) die("%s", e.text);
    }
    int status = close_engine(en);
    close_session(&s);
    return status;
}

// ---- score, embed, classify ----

// embed --fasta: nobody knew the number of rows before.
static void write_array(struct engine *en) {
    const size_t d = (size_t)en->s->model.c.d_model;
    write_npy_header(en->output, (int64_t)(en->array.n / (d * sizeof(float))), (int64_t)d);
    fwrite(en->array.p, 1, en->array.n, en->output);
}

// What goes to a file gets its name only when nothing failed.
static int command_requests(const struct options *o) {
    struct session s;
    struct error e = {""};
    open_session(&s, o, o->logits ? o->logits : o->track ? o->track : o->output);
    FILE *output = o->command == EMBED ? s.out.f : stdout;
    if (o->layer > s.model.c.n_layer) die("--layer %d: %s has %d layers", o->layer, o->model, s.model.c.n_layer);
    if (o->command == EMBED && !o->jsonl && output == stdout && isatty(STDOUT_FILENO))
        die("embed writes binary .npy data: use -o FILE or a pipe");
    if (o->command == CLASSIFY && !s.model.c.n_labels)
        die("%s: the model has no classifier (tensor 'cls.output.weight')", o->model);
    struct engine *en = open_engine(&s, output);
    engine_run(en);
    bool whole = !en->n_failed && !ends_early(en);
    if (whole && o->fasta && o->command == EMBED) write_array(en);
    if (whole && !o->jsonl && !en->has_header) fputs(table_header(o), stdout);  // of a table without rows
    if (s.out.f != stdout && whole && !outfile_commit(&s.out, &e)) die("%s", e.text);
    if (whole) check_stdout();
    const bool cut_off = en->reader_gone && s.out.f != stdout && s.out.f != output;  // by the reader of something else
    if (s.out.f != stdout && !whole && (cut_off || !en->reader_gone)) say_unwritten(en);
    int status = close_engine(en);
    close_session(&s);
    return cut_off ? 1 : status;
}

// ---- tokenize ----

// Text of ids on one line's worth of output; the bytes as they are.
static void print_decoded(const struct tokenizer *t, const struct ids *ids) {
    struct buffer bytes = {0}, clean = {0};
    for (size_t i = 0; i < ids->n; i++) buffer_add(&bytes, t->token[ids->p[i]].p, t->token[ids->p[i]].n);
    repair_utf8(bytes.p, bytes.n, &clean);
    buffer_add(&clean, "\n", 1);
    fwrite(clean.p, 1, clean.n, stdout);
    free(bytes.p);
    free(clean.p);
}

// A line of ids is a text, as it was when they were written.
static bool decode_lines(const struct session *s, const struct input *in, struct error *e) {
    struct buffer b = {0};
    bool ok = true;
    if (in->source == FROM_FILE) ok = read_all(in->value, &b, e);
    else buffer_add(&b, in->value, strlen(in->value));
    if (ok && b.n && memchr(b.p, 0, b.n)) ok = fail(e, "%s: holds a byte 0; expected ids", input_name(in->value));
    if (b.n && b.p[b.n - 1] == '\n') b.n--;
    buffer_add(&b, "\n", 2);
    long number = 1;
    for (char *line = b.p, *end; ok && (end = strchr(line, '\n')); line = end + 1, number++) {
        struct ids ids = {0};
        struct error why = {""};
        *end = 0;
        if (!parse_ids(line, s->tokenizer.n_tokens, &ids, &why))
            ok = in->source == FROM_FILE ? fail(e, "%s: line %ld: %s", input_name(in->value), number, why.text)
                                         : fail(e, "%s", why.text);
        if (ok) print_decoded(&s->tokenizer, &ids);
        free(ids.p);
    }
    free(b.p);
    return ok;
}

// A line of ids for a text.
static bool encode_text(const struct session *s, const struct input *in, struct error *e) {
    struct ids ids = {0};
    struct clip_scale scale;  // of a clip, which is no text
    const bool ok = read_input(s, in, false, &ids, &scale, e);
    for (size_t t = 0; ok && t < ids.n; t++) printf("%s%" PRId32, t ? " " : "", ids.p[t]);
    if (ok) putchar('\n');
    free(ids.p);
    return ok;
}

static int command_tokenize(const struct options *o) {
    struct error e = {""};
    struct session s = {.o = o, .has_tokenizer = true};
    int status = 0;
    if (o->sandbox) sandbox_enter(o, &s.out, &s.state);
    if (!gguf_open(&s.model.file, o->tokenizer ? o->tokenizer : o->model, &e)) die("%s", e.text);
    const struct gguf *g = &s.model.file;
    if (gguf_has_tokenizer(g)) {
        if (!tokenizer_load(&s.tokenizer, g, &e)) die("%s: %s", g->path, e.text);
    } else {  // a model that relies on tokenizer.bin
        gguf_close(&s.model.file);
        if (!model_open(&s.model, o->model, &e)) die("%s", e.text);
        s.has_tokenizer = false;
        open_tokenizer(&s);
        if (!need_tokenizer(&s, &e)) die("%s", e.text);
    }
    s.model.c.n_vocab = s.tokenizer.n_tokens;
    keep_case(&s);
    for (int i = 0; i < o->n_inputs; i++) {
        e.text[0] = 0;
        if (!(o->decode ? decode_lines : encode_text)(&s, &o->inputs[i], &e)) {
            print_line(stderr, e.text);
            status = 1;
        }
        check_stdout();
    }
    close_session(&s);
    return status;
}

// ---- inspect ----

static void add_value(struct buffer *out, const struct gguf_kv *kv, const uint8_t **at) {
    if (kv->type == GGUF_STRING) {
        struct str s = gguf_next_str(at);
        buffer_printf(out, "\"");
        add_escaped(out, (struct str){s.p, s.n <= 200 ? s.n : 200});
        buffer_printf(out, s.n <= 200 ? "\"" : "...\" (%zu bytes)", s.n);
        return;
    }
    union {
        uint64_t u;
        int64_t i;
        double d;
        float f;
    } v = {0};
    int bytes = gguf_types[kv->type].bytes;
    memcpy(&v, *at, (size_t)bytes);
    *at += bytes;
    int unused = 64 - 8 * bytes;
    switch (kv->type) {
    case GGUF_F32: buffer_printf(out, "%.9g", (double)v.f); break;
    case GGUF_F64: buffer_printf(out, "%.17g", v.d); break;
    case GGUF_BOOL: buffer_printf(out, v.u ? "true" : "false"); break;
    case GGUF_I8: case GGUF_I16: case GGUF_I32: case GGUF_I64:
        buffer_printf(out, "%" PRId64, (int64_t)(v.u << unused) >> unused);
        break;
    default: buffer_printf(out, "%" PRIu64, v.u);
    }
}

static int command_inspect(const struct options *o) {
    struct gguf g;
    struct error e = {""};
    struct buffer out = {0};
    if (o->sandbox) sandbox_enter(o, &(struct outfile){0}, &(struct outfile){0});
    if (!gguf_open(&g, o->model, &e)) die("%s", e.text);
    buffer_printf(&out, "file\t%s\nbytes\t%zu\nversion\t%" PRIu32 "\n", o->model, g.size, g.version);
    for (uint64_t i = 0; i < g.n_kv; i++) {
        const struct gguf_kv *kv = &g.kv[i];
        const uint8_t *at = kv->value;
        buffer_printf(&out, "metadata\t");
        add_escaped(&out, kv->key);
        buffer_printf(&out, "\t%s", gguf_types[kv->type].name);
        if (kv->is_array) buffer_printf(&out, "[%" PRIu64 "]", kv->count);
        buffer_printf(&out, "\t");
        for (uint64_t j = 0; j < kv->count && j < 6; j++) {
            if (j) buffer_printf(&out, ", ");
            add_value(&out, kv, &at);
        }
        buffer_printf(&out, kv->count > 6 ? ", ...\n" : "\n");
    }
    uint64_t parameters = 0;
    for (uint64_t i = 0; i < g.n_tensors; i++) {
        const struct tensor *t = &g.tensors[i];
        buffer_printf(&out, "tensor\t");
        add_escaped(&out, t->name);
        buffer_printf(&out, "\t%s\t[", formats[t->format].name);
        uint64_t n = 1;
        for (int d = t->n_dims - 1; d >= 0; d--) {  // the slowest dimension first, as everywhere in this program
            buffer_printf(&out, "%" PRId64 "%s", t->ne[d], d ? ", " : "]\t");
            n *= (uint64_t)t->ne[d];
        }
        buffer_printf(&out, "%" PRIu64 " bytes\n", t->n_bytes);
        parameters += n;
    }
    buffer_printf(&out, "parameters\t%" PRIu64 "\n", parameters);
    bool vocabulary_only = g.n_tensors == 0;
    fwrite(out.p, 1, out.n, stdout);
    free(out.p);
    gguf_close(&g);
    struct model m;
    if (!vocabulary_only) {  // last, so that what a file holds is seen even when it is no model that runs here
        if (!model_open(&m, o->model, &e)) die("%s", e.text);
        printf("state\t%zu bytes a sequence\n", state_floats(&m) * sizeof(float));
        model_close(&m);
    }
    check_stdout();
    return 0;
}

// ====================================================================================================================
// 16. Bench.
// Tokens per second of prompts and of decoding, under llama-bench's names. Calls everything above; called by section 17.
// ====================================================================================================================

enum { MAX_BENCH_LIST = 32, MAX_REPEATS = 100 };

struct bench_list {
    int n, v[MAX_BENCH_LIST];
};

struct bench_test {         // n_parallel sequences, each with a prompt, then with tokens that are generated one at a time
    int n_prompt, n_gen, n_parallel, n_threads;
    double read_gb_per_s;      // what memory gives to so many threads
};

struct bench_result {
    double seconds[MAX_REPEATS], prompt_seconds[MAX_REPEATS];  // of a whole run; of its prompts
    uint64_t logits_hash;   // of the last logits: equal for every number of threads and instruction set
};

struct bench {
    const struct options *o;
    struct model model;
    char cpu[96], title[48];  // of the processor; of what is measured
    uint64_t n_params, model_size, step_bytes;  // step_bytes: weights that one decoding step reads
    double state_bytes;        // of a sequence, that a step reads
    struct device_facts gpu;   // bytes 0: the CPU is measured
};

// "512,2048": numbers from min to max.
static struct bench_list parse_list(const char *name, const char *text, int min, int max) {
    struct bench_list list = {0};
    for (const char *p = text; list.n < MAX_BENCH_LIST; p++) {
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < min || v > max || (*end && *end != ',')) break;
        list.v[list.n++] = (int)v;
        p = end;
        if (!*end) return list;
    }
    usage_error("%s %s: expected up to %d numbers from %d to %d, separated by commas", name, text, MAX_BENCH_LIST, min, max);
}

// Bytes per second that all threads together read from memory by the widest loads, the best of three passes. Pages of one repeated
// value could be merged by a hypervisor and then be read faster than memory is, so each number differs from its neighbours.
static double read_bandwidth(int n_threads) {
    const size_t n = (size_t)1 << 27, block = 16384;  // floats: 512 MiB, larger than caches
    const struct kernels *usable[MAX_ISAS];
    float *x = xcalloc(n, sizeof *x), max = 0;
    double best = 0;
    usable_kernels(usable);
    (void)n_threads;  // without OpenMP
#ifdef _OPENMP
#pragma omp parallel for num_threads(n_threads) schedule(static)
#endif
    for (size_t i = 0; i < n; i++) x[i] = (float)((uint32_t)i * 0x9e3779b9u >> 8);
    for (int pass = 0; pass < 3; pass++) {
        double start = now_seconds();
#ifdef _OPENMP
#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : max)
#endif
        for (size_t i = 0; i < n; i += block) max += usable[0]->finite_max(x + i, (int)block);
        double rate = (double)(n * sizeof *x) / (now_seconds() - start);
        if (rate > best) best = rate;
    }
    if (max == 1) best = 0;  // so that nothing is optimised away
    free(x);
    return best;
}

// What stands behind a name and a colon in a file of the kernel's; `to` stays as it is where there is none.
static void read_kernel_value(const char *path, const char *name, char *to, size_t size) {
    char line[256];
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strncmp(line, name, strlen(name)) == 0 ? strchr(line, ':') : NULL;
        if (!colon) continue;
        snprintf(to, size, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f) fclose(f);
}

// Bytes. What getrusage() says begins at the size of the process that started this one.
static long peak_resident_set(void) {
    struct rusage usage;
    char kib[32] = "";
    read_kernel_value("/proc/self/status", "VmHWM", kib, sizeof kib);
    if (*kib) return strtol(kib, NULL, 10) * 1024;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss * 1024;
}

static int32_t random_token(const struct model *m, int sequence, int position) {
    return (int32_t)(mix64((uint64_t)sequence << 32 | (uint32_t)position) % (uint64_t)m->c.n_vocab);
}

// One run: prompts one after the other in passes of at most max_tokens, then all sequences a token a pass.
static void bench_run(struct context *ctx, struct sequence **seqs, const struct bench_test *t, double *seconds,
                      double *prompt_seconds) {
    const struct model *m = ctx->m;
    int32_t *tokens = xmalloc((size_t)ctx->max_tokens * sizeof *tokens);
    struct segment *segments = xcalloc((size_t)t->n_parallel, sizeof *segments);
    for (int s = 0; s < t->n_parallel; s++) sequence_reset(seqs[s], &m->c);
    double start = now_seconds();
    for (int s = 0; s < t->n_parallel; s++)
        for (int at = 0, now; at < t->n_prompt; at += now) {
            now = min_int(ctx->max_tokens, t->n_prompt - at);
            for (int i = 0; i < now; i++) tokens[i] = random_token(m, s, at + i);
            forward(ctx, &(struct segment){seqs[s], tokens, now, at + now == t->n_prompt}, 1, m->c.n_layer);
            stop_if_interrupted();
        }
    *prompt_seconds = now_seconds() - start;
    for (int i = 0; i < t->n_gen; i++) {
        for (int s = 0; s < t->n_parallel; s++) {
            tokens[s] = random_token(m, s, t->n_prompt + i);
            segments[s] = (struct segment){seqs[s], &tokens[s], 1, true};
        }
        forward(ctx, segments, t->n_parallel, m->c.n_layer);
        stop_if_interrupted();
    }
    *seconds = now_seconds() - start;
    free(tokens);
    free(segments);
}

static void bench_measure(struct bench *b, const struct bench_test *t, struct bench_result *r) {
    int pass = min_int(b->o->ubatch, t->n_prompt);
    struct context *ctx = context_new(&b->model, choose_kernels(), t->n_threads, pass > t->n_parallel ? pass : t->n_parallel,
                                      t->n_parallel);
    struct sequence **seqs = xcalloc((size_t)t->n_parallel, sizeof(void *));
    context_use_device(ctx, b->o, t->n_parallel);
    if (ctx->device) b->gpu = device_facts(ctx->device);
    for (int s = 0; s < t->n_parallel; s++) seqs[s] = context_sequence(ctx);
    double ignored;
    struct bench_test warm_up = *t;
    warm_up.n_prompt = pass;
    warm_up.n_gen = min_int(t->n_gen, 2);
    bench_run(ctx, seqs, &warm_up, &ignored, &ignored);
    for (int i = 0; i < b->o->repeats; i++) bench_run(ctx, seqs, t, &r->seconds[i], &r->prompt_seconds[i]);
    r->logits_hash = hash_bytes(1, ctx->logits, (size_t)b->model.c.n_vocab * sizeof(float));
    for (int s = 0; s < t->n_parallel; s++) sequence_free(seqs[s]);
    free(seqs);
    context_free(ctx);
}

static double mean_of(const double *v, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += v[i];
    return sum / n;
}

static double deviation_of(const double *v, int n) {  // of a sample; 0 for a single value
    double mean = mean_of(v, n), squares = 0;
    for (int i = 0; i < n; i++) squares += (v[i] - mean) * (v[i] - mean);
    return n > 1 ? sqrt(squares / (n - 1)) : 0;
}

enum { SCAN_CHANNELS = 1024, SCAN_STATE = 16, SCAN_ITEM = 64 };  // D and N of section E.5; channels a thread takes at once

static float *random_floats(size_t n, float scale, float offset) {
    float *x = xcalloc(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = offset + scale * (float)((double)(mix64(i) >> 40) * 0x1p-23 - 1.0);
    return x;
}

// --op scan: the selective scan alone, with discretisation, skip and gate, over one sequence of n_prompt tokens.
static void scan_measure(const struct options *o, const struct bench_test *t, struct bench_result *r) {
    const struct kernels *k = choose_kernels();
    const int ld = leading_dimension(SCAN_CHANNELS);
    const size_t n = (size_t)t->n_prompt * (size_t)ld, n_state = (size_t)SCAN_CHANNELS * SCAN_STATE;
    float *u = random_floats(n, 1, 0), *z = random_floats(n, 1, 0), *dt = random_floats(n, 1, -2);
    float *bc = random_floats((size_t)t->n_prompt * 2 * SCAN_STATE, 1, 0), *a2 = random_floats(n_state, 8, -8.5f);
    float *d = random_floats(SCAN_CHANNELS, 1, 0), *dt_b = random_floats(SCAN_CHANNELS, 1, 0);
    float *dt_y = xcalloc(n, sizeof *dt_y), *state = xcalloc(n_state, sizeof *state);
    for (int i = -1; i < o->repeats; i++) {  // the first one warms up
        memcpy(dt_y, dt, n * sizeof *dt);
        memset(state, 0, n_state * sizeof *state);
        double start = now_seconds();
#ifdef _OPENMP
#pragma omp parallel for num_threads(t->n_threads) schedule(dynamic)
#endif
        for (size_t c = 0; c < SCAN_CHANNELS; c += SCAN_ITEM) {
            flush_denormals();
            k->scan(&(struct scan_args){
                .a2 = a2 + c * SCAN_STATE, .d = d + c, .dt_b = dt_b + c, .state = state + c * SCAN_STATE,
                .next_state = state + c * SCAN_STATE, .u = u + c, .z = z + c, .bc = bc, .dt_y = dt_y + c, .d_state = SCAN_STATE,
                .n_tokens = t->n_prompt, .n = SCAN_ITEM, .ld = ld, .ld_bc = 2 * SCAN_STATE});
        }
        stop_if_interrupted();
        if (i >= 0) r->seconds[i] = r->prompt_seconds[i] = now_seconds() - start;
    }
    r->logits_hash = hash_bytes(1, dt_y + n - (size_t)ld, SCAN_CHANNELS * sizeof *dt_y);
    float *owned[] = {u, z, dt, bc, a2, d, dt_b, dt_y, state};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

struct field {              // of a row of results; owner of value
    const char *name;
    bool is_text;
    char *value;
};

enum { MAX_FIELDS = 32 };

__attribute__((format(printf, 4, 5))) static void add_field(struct field *f, int *n, const char *name, const char *format, ...) {
    struct buffer value = {0};
    va_list args;
    va_start(args, format);
    buffer_vprintf(&value, format, args);
    va_end(args);
    f[(*n)++] = (struct field){name, format[0] == '%' && format[1] == 's', value.p};
}

// The row of a test. Tokens a second: of prompt and generated tokens where a test has only one of them; where it has
// both, as in the paper, of the generated ones over the whole time, and in gen_ts without the prompts' time.
static int bench_fields(const struct bench *b, const struct bench_test *t, const struct bench_result *r, struct field *f) {
    const int n_runs = b->o->repeats, per_sequence = t->n_gen ? t->n_gen : t->n_prompt;
    const bool is_scan = b->o->bench_op == OP_SCAN;
    const double tokens = (double)per_sequence * t->n_parallel;
    double ts[MAX_REPEATS], gen_ts[MAX_REPEATS], ns[MAX_REPEATS], gb[MAX_REPEATS];
    for (int i = 0; i < n_runs; i++) {
        double gen_seconds = r->seconds[i] - r->prompt_seconds[i];
        double state = b->state_bytes * t->n_parallel;
        ns[i] = r->seconds[i] * 1e9;
        ts[i] = tokens / r->seconds[i];
        gen_ts[i] = t->n_gen ? tokens / gen_seconds : 0;
        gb[i] = t->n_gen ? ((double)b->step_bytes + state) * t->n_gen / gen_seconds / 1e9 : 0;
    }
    char when[32];
    time_t now = time(NULL);
    struct tm utc;
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    const double read_gb_per_s = b->gpu.bytes ? b->gpu.read_gb_per_s : t->read_gb_per_s, rate = mean_of(gb, n_runs);
    int n = 0;
    add_field(f, &n, "build", "%s", MAMBA_VERSION);
    add_field(f, &n, "cpu_info", "%s", b->cpu);
    add_field(f, &n, "isa", "%s", choose_kernels()->name);
    add_field(f, &n, "model_filename", "%s", is_scan ? "" : b->o->model);
    add_field(f, &n, "model_type", "%s", b->title);
    add_field(f, &n, "model_size", "%" PRIu64, b->model_size);
    add_field(f, &n, "model_n_params", "%" PRIu64, b->n_params);
    add_field(f, &n, "n_ubatch", "%d", b->o->ubatch);
    add_field(f, &n, "n_threads", "%d", t->n_threads);
    add_field(f, &n, "n_prompt", "%d", t->n_prompt);
    add_field(f, &n, "n_gen", "%d", t->n_gen);
    add_field(f, &n, "n_parallel", "%d", t->n_parallel);
    add_field(f, &n, "test_time", "%s", when);
    add_field(f, &n, "avg_ns", "%.0f", mean_of(ns, n_runs));
    add_field(f, &n, "stddev_ns", "%.0f", deviation_of(ns, n_runs));
    add_field(f, &n, "avg_ts", "%.2f", mean_of(ts, n_runs));
    add_field(f, &n, "stddev_ts", "%.2f", deviation_of(ts, n_runs));
    add_field(f, &n, "gen_ts", "%.2f", mean_of(gen_ts, n_runs));
    add_field(f, &n, "weight_gb_per_s", "%.2f", rate);
    add_field(f, &n, "read_gb_per_s", "%.2f", read_gb_per_s);
    add_field(f, &n, "bandwidth_percent", "%.1f", read_gb_per_s > 0 ? 100 * rate / read_gb_per_s : 0.0);
    add_field(f, &n, "peak_rss", "%ld", peak_resident_set());
    add_field(f, &n, "device", "%s", b->gpu.bytes ? "cuda" : "cpu");
    add_field(f, &n, "gpu_info", "%s", b->gpu.name);
    add_field(f, &n, "gpu_memory", "%" PRIu64, b->gpu.bytes);
    add_field(f, &n, "logits_hash", "%s%016" PRIx64, "", r->logits_hash);
    return n;
}

static void print_json_row(const struct field *f, int n) {
    struct buffer b = {0};
    for (int i = 0; i < n; i++) {
        buffer_printf(&b, "%s\"%s\": ", i ? ", " : "{", f[i].name);
        if (f[i].is_text) add_json_string(&b, str_of(f[i].value));
        else buffer_printf(&b, "%s", f[i].value);
    }
    fwrite(b.p, 1, b.n, stdout);
    putchar('}');
    free(b.p);
}

static void print_csv_row(const struct field *f, int n) {
    for (int i = 0; i < n; i++) {
        printf("%s\"", i ? "," : "");
        for (const char *p = f[i].value; *p; p++) printf(*p == '"' ? "\"\"" : "%c", *p);
        putchar('"');
    }
    putchar('\n');
}

static const char *value_of(const struct field *f, const char *name) {
    while (strcmp(f->name, name) != 0) f++;
    return f->value;
}

// llama-bench's table, one row a test.
static void print_md_row(const struct bench *b, const struct bench_test *t, const struct field *f) {
    char test[48], speed[64];
    if (t->n_prompt && t->n_gen) snprintf(test, sizeof test, "pp%d+tg%d", t->n_prompt, t->n_gen);
    else snprintf(test, sizeof test, "%s%d", t->n_gen ? "tg" : "pp", t->n_gen ? t->n_gen : t->n_prompt);
    snprintf(speed, sizeof speed, "%s ± %s", value_of(f, "avg_ts"), value_of(f, "stddev_ts"));
    printf("| %s | %.2f MiB | %.2f M | %7d | %9d | %12s | %20s | %8.5s | %5.1f |\n", b->title, (double)b->model_size / 1048576,
           (double)b->n_params / 1e6, t->n_threads, t->n_parallel, test, speed, t->n_gen ? value_of(f, "weight_gb_per_s") : "",
           b->gpu.bytes ? b->gpu.read_gb_per_s : t->read_gb_per_s);
}

static void bench_print(const struct bench *b, const struct bench_test *t, const struct bench_result *r, bool first, bool last) {
    const enum bench_format format = b->o->bench_format;
    struct field f[MAX_FIELDS];
    int n = bench_fields(b, t, r, f);
    if (format == BENCH_MD) {
        if (first)
            printf("| model | size | params | threads | sequences | test | t/s | GB/s | of GB/s |\n"
                   "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
        print_md_row(b, t, f);
    } else if (format == BENCH_CSV) {
        for (int i = 0; i < n && first; i++) printf("%s%s", f[i].name, i + 1 < n ? "," : "\n");
        print_csv_row(f, n);
    } else if (format == BENCH_JSONL) {
        print_json_row(f, n);
        putchar('\n');
    } else {
        printf(first ? "[\n  " : "  ");
        print_json_row(f, n);
        printf(last ? "\n]\n" : ",\n");
    }
    for (int i = 0; i < n; i++) free(f[i].value);
    check_stdout();
}

// All combinations: prompts and generation apart, or (--paper) one after the other in one test.
static int bench_tests(const struct options *o, struct bench_test **tests) {
    char default_list[16];
    const bool cuda = o->device == DEVICE_CUDA;
    snprintf(default_list, sizeof default_list, "%d", default_threads());
#define GIVEN(list, otherwise) (o->list ? o->list : (otherwise))
    struct bench_list threads = parse_list("-t", GIVEN(bench_threads, default_list), 1, 4096);
    struct bench_list parallels = parse_list("-np", GIVEN(bench_parallels, o->paper || cuda ? "1,2,4,8,16,32,64,128" : "1"), 1,
                                             MAX_SLOTS);
    struct bench_list prompts = parse_list("-p", GIVEN(bench_prompts, o->paper ? "2048" : "512"), 0, 1 << 24);
    struct bench_list gens = parse_list("-n", GIVEN(bench_gens, "128"), 0, 1 << 24);
#undef GIVEN
    if (o->bench_op == OP_SCAN) {
        gens.n = 0;
        parallels = (struct bench_list){1, {1}};
    }
    int n = 0;
    *tests = xcalloc((size_t)threads.n * (size_t)parallels.n * (size_t)(prompts.n + 1) * (size_t)(gens.n + 1), sizeof **tests);
    for (int t = 0; t < threads.n; t++)
        for (int np = 0; np < parallels.n; np++)
            for (int p = 0; p <= prompts.n; p++)      // the last of each list: none
                for (int g = 0; g <= gens.n; g++) {
                    struct bench_test test = {.n_prompt = p < prompts.n ? prompts.v[p] : 0, .n_gen = g < gens.n ? gens.v[g] : 0,
                                              .n_parallel = parallels.v[np], .n_threads = threads.v[t]};
                    bool both = p < prompts.n && g < gens.n, apart = (p < prompts.n) != (g < gens.n);
                    if ((o->paper ? both : apart) && (test.n_prompt || test.n_gen)) (*tests)[n++] = test;
                }
    return n;
}

// In a process of its own, so that its buffer does not count in peak_rss. (No thread has been started yet.)
static double read_bandwidth_apart(int n_threads) {
    int ends[2];
    double rate = 0;
    if (pipe(ends) != 0) return 0;
    pid_t child = fork();
    if (child == 0) {
        rate = read_bandwidth(n_threads);
        _exit(write(ends[1], &rate, sizeof rate) == (ssize_t)sizeof rate ? 0 : 1);
    }
    close(ends[1]);
    if (child < 0 || read(ends[0], &rate, sizeof rate) != (ssize_t)sizeof rate) rate = 0;
    close(ends[0]);
    if (child > 0) waitpid(child, NULL, 0);
    return rate;
}

// Bytes of weights and of a sequence's state that a token takes in the mean: those of a U-Net's inner levels are read every
// `period`.
static void unet_bytes(const struct model *m, double *weights, double *state) {
    const struct config *c = &m->c;
    *weights = (double)m->embd.row_bytes + (double)m->head.rows * (double)m->head.row_bytes;
    *state = 0;
    for (int i = 0; i < c->n_layer; i++) {
        const struct layer *l = &m->layers[i];
        const struct matrix *parts[] = {&l->in, &l->x, &l->dt, &l->out};
        const double period = c->level[l->level].period;
        for (int p = 0; p < 4; p++) *weights += (double)parts[p]->rows * (double)parts[p]->row_bytes / period;
        *state += 4.0 * c->level[l->level].d_inner * (c->d_conv - 1 + c->d_state * (1 + l->is_complex)) / period;
    }
    for (int i = 0; i < c->n_pools; i++) {
        const struct matrix *parts[] = {&m->pools[i].down, &m->pools[i].up};
        for (int p = 0; p < 2; p++) *weights += (double)parts[p]->rows * (double)parts[p]->row_bytes / c->level[i + 1].period;
    }
}

static void bench_open(struct bench *b) {
    struct error e = {""};
    if (!model_open(&b->model, b->o->model, &e)) die("%s", e.text);
    const struct config *c = &b->model.c;
    snprintf(b->title, sizeof b->title, "mamba %dx%d %s", c->n_layer, c->d_model, formats[b->model.layers[0].in.format].name);
    for (uint64_t i = 0; i < b->model.file.n_tensors; i++) {
        const struct tensor *t = &b->model.file.tensors[i];
        b->model_size += t->n_bytes;
        b->n_params += (uint64_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]);
        // Of an embedding that is not also the head, a step reads one row.
        bool one_row = t->data == b->model.embd.data && b->model.head.data != b->model.embd.data;
        b->step_bytes += one_row ? b->model.embd.row_bytes : t->n_bytes;
    }
    b->state_bytes = (double)(state_floats(&b->model) * sizeof(float));
    if (c->n_pools) {
        double weights;
        unet_bytes(&b->model, &weights, &b->state_bytes);
        b->step_bytes = (uint64_t)weights;
        memcpy(b->title, "u-net", 5);
    }
}

static int command_bench(const struct options *o) {
    struct bench b = {.o = o, .cpu = "unknown"};
    struct bench_test *tests;
    int n_tests = bench_tests(o, &tests);
    if (!n_tests) usage_error("nothing to measure: the lists of -p and -n hold only 0");
    catch_signals(end_at_once);
    if (o->bench_op == OP_SCAN) snprintf(b.title, sizeof b.title, "scan %dx%d F32", SCAN_CHANNELS, SCAN_STATE);
    else bench_open(&b);
    for (int i = 0; i < n_tests && o->device != DEVICE_CUDA; i++) {
        int j = 0;
        while (tests[j].n_threads != tests[i].n_threads) j++;
        tests[i].read_gb_per_s = j < i ? tests[j].read_gb_per_s : read_bandwidth_apart(tests[i].n_threads) / 1e9;
    }
    read_kernel_value("/proc/cpuinfo", "model name", b.cpu, sizeof b.cpu);
    catch_signals(on_signal);
    for (int i = 0; i < n_tests; i++) {
        struct bench_result r = {.logits_hash = 0};
        if (o->bench_op == OP_SCAN) scan_measure(o, &tests[i], &r);
        else bench_measure(&b, &tests[i], &r);
        bench_print(&b, &tests[i], &r, i == 0, i + 1 == n_tests);
    }
    free(tests);
    model_close(&b.model);
    return 0;
}

// ====================================================================================================================
// 17. Command line.
// One table describes every option: its names, what it takes, which commands know it, and where it goes. Help is printed
// from the same table. Calls sections 15 and 16.
// ====================================================================================================================

#define ON(command) (1u << (command))
#define ON_MODEL (ON(GENERATE) | ON(SCORE) | ON(EMBED) | ON(CLASSIFY))
#define ON_INPUT (ON_MODEL | ON(TOKENIZE))
#define ON_RECORDS (ON(SCORE) | ON(EMBED) | ON(CLASSIFY))

static const struct {
    int (*run)(const struct options *);  // returns the exit status
    const char *summary, *example;
} commands[N_COMMANDS] = {
    [GENERATE] = {command_generate, "continue a prompt, token by token, on standard output (the default)",
                  "mamba models/tales.bin -p \"Once upon a time\" -n 200 -s 7"},
    [SCORE] = {command_requests, "log-likelihood of a text, as a table: id tokens nll bits_per_token perplexity",
               "mamba score model.bin -f chapter1.txt -f chapter2.txt"},
    [EMBED] = {command_requests, "a text's hidden states, as .npy (float32)",
               "mamba embed model.bin -p \"a text\" --pool mean -o text.npy"},
    [CLASSIFY] = {command_requests, "probabilities of a classifier's labels, as a table: id label probability",
                  "mamba classify model.bin -f letter1.txt -f letter2.txt"},
    [TOKENIZE] = {command_tokenize, "token ids of a text, one line a text; --decode turns them back",
                  "mamba tokenize tokenizer.bin -p \"Hello world\""},
    [BENCH] = {command_bench, "tokens per second, as llama-bench reports them",
               "mamba bench model.bin -p 512 -n 128 -np 1,8,32 -o json"},
    [INSPECT] = {command_inspect, "metadata and tensors of a model file", "mamba inspect model.bin | grep ^tensor"},
};

enum option_kind { FLAG, INTEGER, NUMBER, TEXT, CHOICE, READS, WRITES, SEED, INPUT, STOP_TEXT };  // READS, WRITES: a file

static const struct option {
    const char *short_name, *name, *takes, *help;
    enum option_kind kind;
    unsigned on;            // commands that know it
    size_t field;           // offset in struct options; of INPUT an enum source
    double min, max;        // of a CHOICE: what the first word stands for
} option_table[] = {
#define FIELD(name) offsetof(struct options, name)
    {"-m", "--model", "FILE", "model file (or the first argument)", READS, ~0u, FIELD(model), 0, 0},
    {"-p", "--prompt", "TEXT", "the text; may be repeated (generate puts them together)", INPUT, ON_INPUT, FROM_TEXT, 0, 0},
    {"-f", "--file", "FILE", "the text is in FILE; - is standard input; may be repeated", INPUT, ON_INPUT, FROM_FILE, 0, 0},
    {NULL, "--wav", "FILE", "a clip of sound, for an audio model; - is standard input", INPUT,
     ON(GENERATE) | ON(SCORE) | ON(EMBED), FROM_WAV, 0, 0},
    {NULL, "--ids", "\"12 7 99\"", "token ids instead of text; nothing is added to them", INPUT, ON_INPUT, FROM_IDS, 0, 0},
    {"-n", "--n-predict", "N", "tokens (128) or samples (5 s) to generate; -1: to the end of the text", INTEGER,
     ON(GENERATE), FIELD(settings.n_predict), -1, 1e9},
    {NULL, "--seconds", "S", "seconds of sound to generate", NUMBER, ON(GENERATE), FIELD(seconds), 1e-3, 1e6},
    {"-o", "--output", "FILE", "write here, not to standard output; sound needs it (- is standard output)", WRITES, ON(GENERATE),
     FIELD(output), 0, 0},
    {NULL, "--sound-format", "wav|mulaw|raw", "WAV of 16 bits or of 8-bit mu-law, or 16 bits alone (as FILE ends, or wav)", CHOICE,
     ON(GENERATE), FIELD(sound_format), SOUND_WAV, 0},
    {"-s", "--seed", "N", "seed of the random numbers (-1, the default: one from the clock)", SEED, ON(GENERATE), 0, 0, 0},
    {NULL, "--temp", "T", "temperature (0.8; of sound 1); 0: always the likeliest token", NUMBER, ON(GENERATE),
     FIELD(settings.sampling.temperature), 0, 1e6},
    {NULL, "--top-k", "K", "choose among the K likeliest tokens (40; of sound 0); 0: all", INTEGER, ON(GENERATE),
     FIELD(settings.sampling.top_k), 0, 1e9},
    {NULL, "--top-p", "P", "choose among the likeliest that make up P (0.95; of sound 1); 1: all", NUMBER, ON(GENERATE),
     FIELD(settings.sampling.top_p), 0, 1},
    {NULL, "--min-p", "P", "leave out what is less likely than P times the likeliest (0.05; of sound 0)", NUMBER, ON(GENERATE),
     FIELD(settings.sampling.min_p), 0, 1},
    {NULL, "--repeat-penalty", "X", "make tokens that came lately less likely (1.0: off)", NUMBER, ON(GENERATE),
     FIELD(settings.sampling.repeat_penalty), 0.01, 100},
    {NULL, "--repeat-last-n", "N", "how far back the penalty looks (64; 4096 at most)", INTEGER, ON(GENERATE),
     FIELD(settings.sampling.repeat_last_n), 0, RECENT_MAX},
    {NULL, "--greedy", NULL, "always the likeliest token", FLAG, ON(GENERATE), FIELD(greedy), 0, 0},
    {NULL, "--stop", "TEXT", "end before this text; may be repeated", STOP_TEXT, ON(GENERATE), 0, 0, 0},
    {NULL, "--ignore-eos", NULL, "never end by the end-of-text token", FLAG, ON(GENERATE), FIELD(ignore_eos), 0, 0},
    {NULL, "--echo", NULL, "print the prompt too", FLAG, ON(GENERATE), FIELD(settings.echo), 0, 0},
    {NULL, "--print-ids", NULL, "print token ids instead of text", FLAG, ON(GENERATE), FIELD(print_ids), 0, 0},
    {NULL, "--save-state", "FILE", "write the state at the end", WRITES, ON(GENERATE), FIELD(save_state), 0, 0},
    {NULL, "--load-state", "FILE", "continue from a saved state", READS, ON_MODEL, FIELD(load_state), 0, 0},
    {NULL, "--prefix", "FILE|TEXT", "what comes before every text, read once: a file of this name, else the text", READS, ON_MODEL,
     FIELD(prefix), 0, 0},
    {NULL, "--jsonl", NULL, "requests come as JSON, one a line, and so do the answers", FLAG, ON_MODEL, FIELD(jsonl), 0, 0},
    {NULL, "--unordered", NULL, "--jsonl: each answer as soon as it is there, not in the order of the requests", FLAG, ON_MODEL,
     FIELD(unordered), 0, 0},
    {NULL, "--logprobs", "K", "--jsonl: log-probabilities of the tokens, and of the K likeliest beside each", INTEGER,
     ON(GENERATE) | ON(SCORE), FIELD(settings.logprobs), 0, MAX_TOP},
    {NULL, "--fasta", "FILE", "the records of a FASTA file, each as a text; - is standard input", READS, ON_RECORDS | ON(GENERATE),
     FIELD(fasta), 0, 0},
    {NULL, "--bed", "FILE", "--fasta: the regions of a BED file instead of whole records", READS, ON_RECORDS | ON(GENERATE),
     FIELD(bed), 0, 0},
    {NULL, "--fasta-out", "FILE", "write what is generated here, as FASTA (--fasta alone: to standard output)", WRITES,
     ON(GENERATE), FIELD(fasta_out), 0, 0},
    {NULL, "--vcf", "FILE", "--fasta: the variants of a VCF, written with their ratios (INFO/MAMBA_LLR)", READS, ON(SCORE),
     FIELD(vcf), 0, 0},
    {NULL, "--tsv", NULL, "--vcf: write a table, a row an allele", FLAG, ON(SCORE), FIELD(tsv), 0, 0},
    {NULL, "--window", "W", "--fasta: windows of W bases, not whole records; --vcf: around a variant (1024)", INTEGER, ON(SCORE),
     FIELD(window), 1, 1 << 30},
    {NULL, "--window", "W", "--fasta: windows of W bases instead of whole records", INTEGER, ON(EMBED) | ON(CLASSIFY),
     FIELD(window), 1, 1 << 30},
    {NULL, "--stride", "S", "--window: a window begins every S bases (W)", INTEGER, ON_RECORDS, FIELD(stride), 1, 1 << 30},
    {NULL, "--rc-average", NULL, "--fasta: the mean over both strands", FLAG, ON_RECORDS, FIELD(rc_average), 0, 0},
    {NULL, "--track", "FILE", "--fasta: write each base's log-probability as bedGraph", WRITES, ON(SCORE), FIELD(track), 0, 0},
    {NULL, "--case-sensitive", NULL, "nucleotides: lower case is not read as upper case", FLAG, ON_INPUT,
     FIELD(case_sensitive), 0, 0},
    {"-np", "--parallel", "N", "sequences at once (16); results do not depend on it", INTEGER, ON_MODEL,
     FIELD(n_parallel), 1, MAX_SLOTS},
    {NULL, "--per-token", NULL, "a row a token: id pos token_id token logprob", FLAG, ON(SCORE), FIELD(per_token), 0, 0},
    {NULL, "--logits", "FILE", "write float32 [tokens, vocabulary] as .npy", WRITES, ON(SCORE), FIELD(logits), 0, 0},
    {NULL, "--pool", "last|mean|none", "one vector a text, or a row a token (last)", CHOICE, ON(EMBED), FIELD(pool), POOL_LAST,
     0},
    {NULL, "--pool", "last|mean", "what the classifier reads: the last position, or the mean of all (last)", CHOICE, ON(CLASSIFY),
     FIELD(pool), POOL_LAST, 0},
    {NULL, "--layer", "N", "after N blocks; 0 is the embedding (default: all, and the final norm)", INTEGER, ON(EMBED),
     FIELD(layer), 0, 1e6},
    {"-o", "--output", "FILE", "write here, not to standard output", WRITES, ON(EMBED), FIELD(output), 0, 0},
    {NULL, "--decode", NULL, "turn ids into text", FLAG, ON(TOKENIZE), FIELD(decode), 0, 0},
    {NULL, "--parse-special", NULL, "names of special tokens in the text mean those tokens", FLAG, ON_INPUT,
     FIELD(parse_special), 0, 0},
    {NULL, "--tokenizer", "FILE", "take the vocabulary from this file", READS, ON_INPUT, FIELD(tokenizer), 0, 0},
    {"-t", "--threads", "N", "threads (the physical cores this process may use)", INTEGER, ON_MODEL, FIELD(n_threads), 1, 4096},
    {"-p", "--n-prompt", "N,...", "lengths of prompts to read (512); 0: none", TEXT, ON(BENCH), FIELD(bench_prompts), 0, 0},
    {"-n", "--n-gen", "N,...", "numbers of tokens to generate (128); 0: none", TEXT, ON(BENCH), FIELD(bench_gens), 0, 0},
    {"-np", "--parallel", "N,...", "sequences at once (1; with --device cuda and --paper 1, 2, 4 ... 128)", TEXT, ON(BENCH),
     FIELD(bench_parallels), 0, 0},
    {"-t", "--threads", "N,...", "threads (the physical cores this process may use)", TEXT, ON(BENCH),
     FIELD(bench_threads), 0, 0},
    {"-r", "--repetitions", "N", "runs of each test (3)", INTEGER, ON(BENCH), FIELD(repeats), 1, MAX_REPEATS},
    {"-o", "--output", "md|csv|json|jsonl", "format of the results (md)", CHOICE, ON(BENCH), FIELD(bench_format),
     BENCH_MD, 0},
    {NULL, "--paper", NULL, "section E.5 of the paper: prompt 2048, then generate 128, 1 to 128 sequences", FLAG, ON(BENCH),
     FIELD(paper), 0, 0},
    {NULL, "--op", "scan", "the scan alone, of -p tokens, 1024 channels, 16 states; takes no model", CHOICE, ON(BENCH),
     FIELD(bench_op), OP_SCAN, 0},
    {NULL, "--device", "cpu|cuda", "where the model runs (cuda where there is a GPU)", CHOICE, ON_MODEL | ON(BENCH),
     FIELD(device), DEVICE_CPU, 0},
    {"-ub", "--ubatch-size", "N", "prompt tokens a pass (512)", INTEGER, ON_MODEL | ON(BENCH), FIELD(ubatch), 1, 1 << 16},
    {NULL, "--sandbox", NULL, "give up the right to open other files than those named here, and sockets (Linux)", FLAG,
     ON_INPUT | ON(INSPECT), FIELD(sandbox), 0, 0},
    {"-q", "--quiet", NULL, "no progress and no timings on standard error", FLAG, ~0u, FIELD(quiet), 0, 0},
    {"-h", "--help", NULL, "this help", FLAG, ~0u, FIELD(help), 0, 0},
    {NULL, "--version", NULL, "print the version", FLAG, ~0u, FIELD(version), 0, 0},
#undef FIELD
};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

static void print_general_help(FILE *f) {
    fputs("Usage: mamba [COMMAND] MODEL [OPTIONS]\n\n"
          "Runs selective state space models (Mamba) from a GGUF file.\n\nCommands:\n", f);
    for (int c = 0; c < N_COMMANDS; c++) fprintf(f, "  %-10s %s\n", command_names[c], commands[c].summary);
    fputs("\nmamba help COMMAND shows the options of a command.\n"
          "Text comes from -p TEXT, -f FILE, or standard input when it is not a terminal.\n\nExample:\n  ", f);
    fprintf(f, "%s\n", commands[GENERATE].example);
}

static void print_command_help(FILE *f, enum command c) {
    fprintf(f, "Usage: mamba %s MODEL [OPTIONS]\n\n%s: %s\n\nOptions:\n", command_names[c], command_names[c],
            commands[c].summary);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        char left[64];
        if (!(o->on & ON(c))) continue;
        snprintf(left, sizeof left, "%s%s%s%s%s", o->short_name ? o->short_name : "", o->short_name ? ", " : "", o->name,
                 o->takes ? " " : "", o->takes ? o->takes : "");
        fprintf(f, "  %-27s %s\n", left, o->help);
    }
    fprintf(f, "\nExample:\n  %s\n", commands[c].example);
}

static int find_command(const char *name) {
    for (int c = 0; c < N_COMMANDS; c++)
        if (strcmp(command_names[c], name) == 0) return c;
    return -1;
}

static double parse_number(const struct option *o, const char *value) {
    char *end;
    errno = 0;
    double v = strtod(value, &end);
    bool whole = o->kind != INTEGER || v == floor(v);
    if (end == value || *end || errno || !(v >= o->min && v <= o->max) || !whole)
        usage_error("%s %s: expected %s from %.10g to %.10g", o->name, value, o->kind == INTEGER ? "an integer" : "a number",
                    o->min, o->max);
    return v;
}

// The place of a value among the words that an option takes, as in "last|mean|none", counted from o->min.
static int parse_choice(const struct option *o, const char *value) {
    int choice = (int)o->min;
    for (const char *word = o->takes; word && *word; choice++) {
        const size_t n = strcspn(word, "|");
        if (str_is((struct str){word, n}, value)) return choice;
        word += n + (word[n] == '|');
    }
    usage_error("%s %s: expected %s", o->name, value, o->takes);
}

static void add_input(struct options *o, enum source source, const char *value) {
    o->inputs = xrealloc(o->inputs, ((size_t)o->n_inputs + 1) * sizeof *o->inputs);
    o->inputs[o->n_inputs++] = (struct input){source, value};
}

static void apply_option(struct options *o, const struct option *opt, const char *value) {
    void *field = (char *)o + opt->field;
    switch (opt->kind) {
    case FLAG: *(bool *)field = true; break;
    case INTEGER: *(int *)field = (int)parse_number(opt, value); break;
    case NUMBER: *(float *)field = (float)parse_number(opt, value); break;
    case CHOICE: *(int *)field = parse_choice(opt, value); break;
    case READS: case WRITES:
        if (!*value) usage_error("%s: the name is empty", opt->name);
        *(const char **)field = value;
        break;
    case TEXT: *(const char **)field = value; break;
    case SEED:
        o->seed_given = strcmp(value, "-1") != 0;  // llama.cpp's word for a new one
        if (o->seed_given && !parse_u64(str_of(value), &o->settings.sampling.seed))
            usage_error("--seed %s: expected an integer from 0 to 2^64 - 1, or -1", value);
        break;
    case INPUT: add_input(o, (enum source)opt->field, value); break;
    case STOP_TEXT:
        if (!*value) usage_error("--stop: the text is empty");
        o->settings.stops = xrealloc(o->settings.stops, ((size_t)o->settings.n_stops + 1) * sizeof *o->settings.stops);
        o->settings.stops[o->settings.n_stops++] = str_of(value);
        break;
    }
}

// The table's entry for an argument: the command's own, or another's for the error message. The value of --name=value goes
// to *value.
static const struct option *find_option(const char *arg, enum command command, const char **value) {
    const char *equals = strncmp(arg, "--", 2) == 0 ? strchr(arg, '=') : NULL;
    size_t n = equals ? (size_t)(equals - arg) : strlen(arg);
    const struct option *other = NULL;
    *value = equals ? equals + 1 : NULL;
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        bool is_long = strlen(o->name) == n && strncmp(o->name, arg, n) == 0;
        if (!is_long && (!o->short_name || strcmp(o->short_name, arg) != 0)) continue;
        if (o->on & ON(command)) return o;
        other = o;
    }
    return other;
}

// An option that begins as an unknown one does, for the error message; NULL when none resembles it.
static const char *similar_option(const char *arg, enum command command) {
    const char *best = NULL;
    size_t most = strlen("--ab");
    for (int i = 0; i < N_OPTIONS; i++) {
        const char *name = option_table[i].name;
        size_t n = 0;
        while (name[n] && name[n] == arg[n]) n++;
        if (n > most && (option_table[i].on & ON(command))) best = name, most = n;
    }
    return best;
}

static _Noreturn void unknown_option(const char *arg, enum command command) {
    const char *similar = similar_option(arg, command);
    if (similar) usage_error("unknown option %s; is it %s?", arg, similar);
    usage_error("unknown option %s", arg);
}

// An argument that is neither command nor model nor an option's value.
static _Noreturn void surplus_argument(const char *first, const char *arg) {
    if (find_command(first) >= 0) usage_error("%s: a command comes before all options", first);
    if (find_command(arg) < 0 && access(first, F_OK) != 0) usage_error("%s: no such command, and no such file", first);
    usage_error("%s: one argument too many; a prompt is given with -p", arg);
}

// A text that came by none of -p, -f, --ids, --wav is on standard input, unless that is a terminal. A run that continues a state
// does not look there: inside `while read` it would eat the lines of the loop.
static void default_input(struct options *o) {
    bool continues = o->load_state && o->command == GENERATE && !o->jsonl;
    if (o->command == INSPECT || o->command == BENCH || o->n_inputs || o->fasta || continues) return;
    o->input_implied = !o->jsonl && !isatty(STDIN_FILENO);
    if (o->input_implied || o->jsonl) add_input(o, FROM_FILE, "-");
    else if (o->command != GENERATE)
        usage_error("%s: no input; use -p TEXT, -f FILE or a pipe", command_names[o->command]);
}

// Whether an output would replace a file that something else names. "-" is read.
static bool replaces(const char *output, const char *named) {
    struct stat st;
    return (strcmp(named, "-") == 0 ? fstat(STDIN_FILENO, &st) : stat(named, &st)) == 0 && leads_to(output, &st);
}

// What a path names in its folder, and the folder; NULL when that is not there.
static const char *name_in_folder(const char *path, struct stat *folder) {
    const char *slash = strrchr(path, '/');
    char *name = copy_text((struct str){slash ? path : ".", slash ? (size_t)(slash - path) + 1 : 1});
    const bool is_there = stat(name, folder) == 0;
    free(name);
    return !is_there ? NULL : slash ? slash + 1 : path;
}

// Whether two outputs are one file that is not there yet.
static bool same_new_file(const char *a, const char *b) {
    struct stat x, y;
    const char *a_name = name_in_folder(a, &x), *b_name = name_in_folder(b, &y);
    return a_name && b_name && strcmp(a_name, b_name) == 0 && is_same(&x, &y) && access(a, F_OK) != 0;
}

// The file that an option of the command names; NULL: none, or it is no such option.
static const char *file_of(const struct options *o, const struct option *option) {
    const bool is_file = option->kind == READS || option->kind == WRITES;
    return is_file && (option->on & ON(o->command)) ? *(const char *const *)((const char *)o + option->field) : NULL;
}

// An output may not replace what is read, or another output. A state may: the run goes on from it.
static void check_written(const struct options *o, const struct option *written) {
    const char *path = file_of(o, written);
    if (written->kind != WRITES || !path || strcmp(path, "-") == 0) return;
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *other = &option_table[i];
        const char *named = file_of(o, other);
        const bool writes = other->kind == WRITES, goes_on = path == o->save_state && named == o->load_state;
        if (!named || other == written || goes_on || (writes && strcmp(named, "-") == 0)) continue;
        if (replaces(path, named) || (writes && same_new_file(path, named)))
            usage_error("%s and %s name the same file", written->name, other->name);
    }
    for (int i = 0; i < o->n_inputs; i++)
        if ((o->inputs[i].source == FROM_FILE || o->inputs[i].source == FROM_WAV) && replaces(path, o->inputs[i].value))
            usage_error("%s names an input: %s", written->name, path);
}

static void check_options(struct options *o) {
    if (!o->model && o->bench_op != OP_SCAN) usage_error("no model file; the first argument names it");
    const bool cuda = o->device == DEVICE_CUDA;
    if (cuda && o->sandbox) usage_error("--sandbox does not apply with --device cuda: its driver opens other files");
    const char *not_scan = cuda ? "--device cuda" : o->paper ? "--paper" : o->model ? "a model" : o->bench_gens ? "-n"
                         : o->bench_parallels ? "-np" : NULL;
    if (o->bench_op == OP_SCAN && not_scan) usage_error("--op scan does not apply with %s", not_scan);
    int from_stdin = 0, clips = 0;
    for (int i = 0; i < o->n_inputs; i++) {
        const enum source source = o->inputs[i].source;
        from_stdin += (source == FROM_FILE || source == FROM_WAV) && strcmp(o->inputs[i].value, "-") == 0;
        clips += source == FROM_WAV;
    }
    if (from_stdin > 1) usage_error("-: standard input can be read once only");
    if (o->command == GENERATE && clips > 1) usage_error("--wav: a clip is continued at its own level, and there are %d", clips);
    if (o->fasta && (o->jsonl || o->n_inputs)) usage_error("--fasta is the input: --jsonl, -p, -f, --ids and --wav do not apply");
    const char *files[] = {o->save_state, o->logits, o->track}, *names[] = {"--save-state", "--logits", "--track"};
    for (int i = 0; i < 3; i++)
        if (files[i] && is_stdout(files[i]))
            usage_error("%s %s: standard output has something else to carry", names[i], files[i]);
    bool one_file = o->n_inputs == 1 && o->inputs[0].source == FROM_FILE;
    if (o->jsonl && !one_file)
        usage_error("--jsonl reads requests from standard input or one -f FILE; -p, --ids and --wav do not apply");
    const char *not_jsonl = o->save_state ? "--save-state" : o->logits ? "--logits"
                            : o->output ? "--output" : NULL;
    if (o->jsonl && not_jsonl) usage_error("%s does not apply with --jsonl", not_jsonl);
    const char *of_fasta = o->bed ? "--bed" : o->vcf ? "--vcf" : o->window ? "--window" : o->rc_average ? "--rc-average"
                         : o->track ? "--track" : NULL;
    if (!o->fasta && of_fasta) usage_error("%s needs --fasta", of_fasta);
    if (o->stride && !o->window) usage_error("--stride needs --window");
    const char *lines = o->bed ? "--bed" : "--vcf", *not_vcf = o->bed ? "--bed" : o->stride ? "--stride" : o->track ? "--track"
                        : o->per_token ? "--per-token" : o->logits ? "--logits" : NULL;
    if (o->vcf && not_vcf) usage_error("%s does not apply with --vcf", not_vcf);
    if (o->tsv && !o->vcf) usage_error("--tsv needs --vcf");
    if (o->vcf && o->window == 1) usage_error("--vcf needs a --window of 2 or more: the first base has no score");
    if ((o->bed || o->vcf) && strcmp(o->fasta, "-") == 0)
        usage_error("%s needs a FASTA file that can be read at any place, not --fasta -", lines);
    if (o->track && (o->window || o->logits)) usage_error("--track does not apply with %s", o->window ? "--window" : "--logits");
    if (o->save_state && (o->fasta || o->fasta_out)) usage_error("--save-state does not apply with --fasta and --fasta-out");
    if (o->print_ids && (o->fasta || o->fasta_out)) usage_error("--print-ids does not apply with --fasta and --fasta-out");
    if (o->print_ids && o->sound_format) usage_error("--sound-format does not apply with --print-ids");
    if (o->fasta_out && o->output) usage_error("--output does not apply with --fasta-out");
    if (o->seconds > 0 && o->settings.n_predict != -2) usage_error("-n and --seconds say the same thing twice");
    if (o->jsonl && o->fasta_out) usage_error("--fasta-out does not apply with --jsonl");
    if (o->logits && o->fasta) usage_error("--logits does not apply with --fasta");
    const bool no_pool = o->pool == POOL_NONE, each_token = o->per_token || o->logits || no_pool;
    if (!o->jsonl && !o->fasta && (o->logits || no_pool) && o->n_inputs != 1)
        usage_error("%s writes the rows of one text, and there are %d", o->logits ? "--logits" : "--pool none", o->n_inputs);
    if (o->rc_average && each_token) usage_error("--rc-average does not apply with --per-token, --logits and --pool none");
    if (!o->jsonl && o->unordered) usage_error("--unordered needs --jsonl");
    if (!o->jsonl && o->settings.logprobs >= 0) usage_error("--logprobs needs --jsonl");
    if (o->jsonl && o->per_token && o->settings.logprobs < 0) o->settings.logprobs = 0;
    for (int i = 0; i < N_OPTIONS; i++) check_written(o, &option_table[i]);
}

// Fills o from the arguments. Returns false when help or the version was asked for and printed.
static bool parse_arguments(struct options *o, int argc, char **argv) {
    const char *positional[3];
    const struct option *given[N_OPTIONS];
    const char *typed[N_OPTIONS];
    int n_positional = 0, n_given = 0;
    o->help = argc > 1 && strcmp(argv[1], "help") == 0;
    int command = argc > 1 + o->help ? find_command(argv[1 + o->help]) : -1;  // options follow it, and depend on it
    o->command = command >= 0 ? (enum command)command : GENERATE;
    if (command >= 0 || (argc > 1 && access(argv[1], F_OK) == 0))  // the second: a model, for the default command
        snprintf(usage_hint, sizeof usage_hint, "mamba help %s", command_names[o->command]);
    for (int i = 1 + o->help; i < argc; i++) {
        const char *value;
        const int arg = i;
        if (argv[i][0] != '-' || !argv[i][1]) {
            if (n_positional == 3) usage_error("%s: one argument too many", argv[i]);
            positional[n_positional++] = argv[i];
            continue;
        }
        const struct option *opt = find_option(argv[i], o->command, &value);
        if (!opt) unknown_option(argv[i], o->command);
        if (value && !opt->takes) usage_error("%s takes no value", opt->name);
        if (opt->takes && !value) {
            if (i + 1 == argc) usage_error("%s needs a value: %s", argv[i], opt->takes);
            value = argv[++i];
        }
        bool repeated = false;
        for (int g = 0; g < n_given; g++) repeated |= given[g] == opt;
        if (repeated && (opt->kind == READS || opt->kind == WRITES)) usage_error("%s is given twice", opt->name);
        if (!repeated) typed[n_given] = argv[arg], given[n_given++] = opt;
        apply_option(o, opt, value ? value : "");
    }
    int next = command >= 0;  // the first positional argument that is not the command
    if (o->help || o->version) {
        if (o->version) printf("mamba %s\n", MAMBA_VERSION);
        else if (command >= 0) print_command_help(stdout, o->command);
        else if (n_positional && strcmp(argv[1], "help") == 0) usage_error("%s: no such command", positional[0]);
        else print_general_help(stdout);
        return false;
    }
    for (int g = 0; g < n_given; g++)
        if (!(given[g]->on & ON(o->command)))
            usage_error("%.*s does not apply to %s", (int)strcspn(typed[g], "="), typed[g], command_names[o->command]);
    if (next < n_positional && !o->model) o->model = positional[next++];
    if (next < n_positional) surplus_argument(o->model, positional[next]);
    default_input(o);
    check_options(o);
    return true;
}

static struct options default_options(void) {
    return (struct options){
        .ubatch = 512, .layer = -1, .repeats = 3,
        .settings = {.n_predict = -2, .logprobs = -1,  // -2, NaN and top_k -1: fill_defaults() knows
                     .sampling = {.temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN, .repeat_penalty = 1.0f,
                                  .repeat_last_n = 64}}};
}

// A standard stream that was closed (2>&-) is not to become the next file that is opened, which would get what is said there. What
// is written to such an output is lost with an error.
static void open_standard_streams(void) {
    const char *const paths[] = {"/dev/null", "/dev/full", "/dev/null"};
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open(paths[fd], fd ? O_WRONLY : O_RDONLY) < 0) break;  // the lowest one that is free
}

#ifndef MAMBA_NO_MAIN
int main(int argc, char **argv) {
    struct options o = default_options();
    open_standard_streams();
    if (argc < 2) {
        print_general_help(stderr);
        return 2;
    }
    if (!parse_arguments(&o, argc, argv)) {
        check_stdout();
        return 0;
    }
    if (!o.seed_given) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        o.settings.sampling.seed = mix64((uint64_t)t.tv_sec * UINT64_C(1000000007) + (uint64_t)t.tv_nsec) >> 32;
    }
    atexit(discard_unfinished);
    signal(SIGPIPE, SIG_IGN);  // a closed pipe is seen as EPIPE when writing,
    signal(SIGXFSZ, SIG_IGN);  // and a limit on the size of files as EFBIG
    int status = commands[o.command].run(&o);
    free(o.inputs);
    free(o.settings.stops);
    return status;
}
#endif

#endif  // not MAMBA_ISA_PASS, not MAMBA_HEADER_ONLY
