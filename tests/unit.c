// Unit tests of mamba.c: they include it with its main off. Prints a line a failure, and the counts last.
// Exit status 1 when anything failed.
//
//   unit [FIXTURES [kernels]]    the folder of fixtures; without it, the one beside the program. kernels: only the tests of
//                                section 4, for emulators

#define _GNU_SOURCE
#include <stdlib.h>

// Every allocation is counted, so that "decoding allocates nothing" can fail, and so is the largest one's size.
static long n_allocations;
static size_t largest_allocation;
static void count_allocation(size_t n) {
    n_allocations++;
    if (n > largest_allocation) largest_allocation = n;
}
static void *counted_malloc(size_t n) {
    count_allocation(n);
    return malloc(n);
}
static void *counted_realloc(void *p, size_t n) {
    count_allocation(n);
    return realloc(p, n);
}
static int counted_posix_memalign(void **p, size_t alignment, size_t n) {
    count_allocation(n);
    return posix_memalign(p, alignment, n);
}
#define malloc counted_malloc
#define realloc counted_realloc
#define posix_memalign counted_posix_memalign
#define MAMBA_NO_MAIN
#include "../mamba.c"
#ifdef MAMBA_SANDBOX
#include <sys/socket.h>
#endif

static int n_passed, n_failed;

#define CHECK(condition, ...)                                                     \
    do {                                                                          \
        if (condition) n_passed++;                                                \
        else {                                                                    \
            n_failed++;                                                           \
            printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition);        \
            printf(__VA_ARGS__);                                                  \
            putchar('\n');                                                        \
        }                                                                         \
    } while (0)

static uint64_t random_state = 1;
static uint64_t random_bits(void) { return mix64(random_state += UINT64_C(0x9e3779b97f4a7c15)); }
static double uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }
static float normal(void) {  // Box and Muller
    return (float)(sqrt(-2 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform()));
}

static const struct kernels *isa[MAX_ISAS];
static int n_isa;

// ---- half floats ----

static void test_half_floats(void) {
    int wrong = 0;
    for (int i = 0; i < 65536; i++) {
        int exponent = i >> 10 & 31, mantissa = i & 1023;
        double v = exponent == 31 ? (mantissa ? (double)NAN : (double)INFINITY)
                   : exponent     ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
        float got = f16_to_f32((uint16_t)i), want = (float)(i & 0x8000 ? -v : v);
        wrong += !(got == want || (isnan(got) && isnan(want)));
    }
    CHECK(wrong == 0, "%d of 65536 half floats differ", wrong);
    // Each instruction set's own conversion, with denormals flushed: those of a half are normal floats and must stay.
    uint16_t *halves = xmalloc(65536 * sizeof *halves);
    float *floats = xmalloc(65536 * sizeof *floats);
    flush_denormals();
    for (int k = 0; k < n_isa; k++) {
        wrong = 0;
        for (int i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
        isa[k]->dequantize(F16, (const uint8_t *)halves, 65536, floats);
        for (int i = 0; i < 65536; i++) {
            float want = f16_to_f32((uint16_t)i);
            wrong += !(bits_from_float(floats[i]) == bits_from_float(want) || (isnan(floats[i]) && isnan(want)));
        }
        CHECK(wrong == 0, "%s: %d of 65536 half floats differ", isa[k]->name, wrong);
    }
    free(halves);
    free(floats);
    CHECK(bf16_to_f32(0x3fc0) == 1.5f, "bf16 1.5 is %g", (double)bf16_to_f32(0x3fc0));
}

// ---- elementwise functions, seen through the kernels that use them ----

enum { N_POINTS = 4096 };

static void test_functions(const struct kernels *k) {
    static float x[N_POINTS], y[N_POINTS], ones[N_POINTS], zeros[N_POINTS], gate[N_POINTS], state[N_POINTS];
    double worst_exp = 0, worst_silu = 0, worst_softplus = 0;
    for (int i = 0; i < N_POINTS; i++) {
        x[i] = -60.0f + 120.0f * (float)i / N_POINTS;
        ones[i] = 1;
        gate[i] = 30;  // silu(30) = 30 to the last bit or so
    }
    k->exp_minus(x, N_POINTS, 20.0f, y);  // from e^-80 to e^40
    for (int i = 0; i < N_POINTS; i++)  // far below the maximum the argument's own rounding counts
        worst_exp = fmax(worst_exp, fabs(y[i] / exp((double)x[i] - 20) - 1) / (1 + fabs((double)x[i] - 20)));
    CHECK(worst_exp < 2e-7, "%s: exp is off by %g", k->name, worst_exp);

    // A convolution of one tap that is 1 with bias 0 leaves silu(x).
    k->conv_silu(&(struct conv_args){.w = ones, .b = zeros, .state = state, .next_state = state, .in = x, .out = y, .d_conv = 1,
                                     .n_tokens = 1, .n = N_POINTS, .ld_w = N_POINTS, .ld = N_POINTS});
    for (int i = 0; i < N_POINTS; i++)
        worst_silu = fmax(worst_silu, fabs(y[i] - x[i] / (1 + exp(-(double)x[i]))) / (fabs((double)x[i]) + 1e-6));
    CHECK(worst_silu < 1e-6, "%s: silu is off by %g", k->name, worst_silu);

    // One state, A = 0, B = C = u = 1, D = 0, from h = 0: y = softplus(x) * silu(gate).
    float b_and_c[2] = {1, 1};
    memcpy(y, x, sizeof y);
    memset(state, 0, sizeof state);
    k->scan(&(struct scan_args){.a2 = zeros, .d = zeros, .dt_b = zeros, .state = state, .next_state = state, .u = ones,
                                .z = gate, .bc = b_and_c, .dt_y = y, .d_state = 1, .n_tokens = 1, .n = N_POINTS,
                                .ld = N_POINTS, .ld_bc = 2});
    for (int i = 0; i < N_POINTS; i++) {
        double want = fmax((double)x[i], 0) + log1p(exp(-fabs((double)x[i])));
        worst_softplus = fmax(worst_softplus, fabs((double)y[i] / 30 - want) / (want + 1e-30));
    }
    CHECK(worst_softplus < 1e-5, "%s: softplus is off by %g, relatively", k->name, worst_softplus);

    // States that only decay, A = -1, -2, ... as exponents of 2, h = C = 1 before: y = sum of 2^(softplus(x) A) * silu(gate), however
    // far below the least float it is.
    static float h[6 * N_POINTS], a2[6 * N_POINTS];
    for (int n_state = 1; n_state <= 6; n_state++) {
        float nothing_in[12] = {0};
        for (int n = 0; n < n_state; n++) nothing_in[n_state + n] = 1;
        for (int i = 0; i < n_state * N_POINTS; i++) h[i] = 1, a2[i] = -1.0f - (float)(i / 16 % n_state);
        memcpy(y, x, sizeof y);
        k->scan(&(struct scan_args){.a2 = a2, .d = zeros, .dt_b = zeros, .state = h, .next_state = h, .u = zeros, .z = gate,
                                    .bc = nothing_in, .dt_y = y, .d_state = n_state, .n_tokens = 1, .n = N_POINTS, .ld = N_POINTS,
                                    .ld_bc = 2 * n_state});
        double worst = 0;
        for (int i = 0; i < N_POINTS; i++) {
            double want = 0, dt = fmax((double)x[i], 0) + log1p(exp(-fabs((double)x[i])));
            for (int n = 1; n <= n_state; n++) want += exp2(-n * dt);
            worst = fmax(worst, fabs((double)y[i] / 30 - want) / want);
        }
        CHECK(worst < 1e-5, "%s: the decay of %d states is off by %g, relatively", k->name, n_state, worst);
    }
    x[0] = 1e30f;  // a step that nothing outlasts
    k->scan(&(struct scan_args){.a2 = a2, .d = zeros, .dt_b = zeros, .state = ones, .next_state = ones, .u = ones, .z = gate,
                                .bc = b_and_c, .dt_y = x, .d_state = 1, .n_tokens = 1, .n = 16, .ld = 16, .ld_bc = 2});
    CHECK(fabsf(x[0] / 30 / 1e30f - 1) < 1e-5f, "%s: a long step gives %g", k->name, (double)x[0]);

    float with_nan[40];
    for (int i = 0; i < 40; i++) with_nan[i] = (float)i;
    CHECK(k->finite_max(with_nan, 40) == 39.0f && k->finite_max(with_nan, 7) == 6.0f, "%s: maximum", k->name);
    for (int i = 0; i < 40; i++) {
        with_nan[i] = i % 2 ? NAN : INFINITY;
        CHECK(isnan(k->finite_max(with_nan, 40)), "%s: element %d is not finite, and went unseen", k->name, i);
        with_nan[i] = (float)i;
    }
}

// ---- products ----

static uint16_t half_of(float v) {  // truncates: any value near v will do
    uint32_t bits = bits_from_float(v);
    int exponent = (int)(bits >> 23 & 255) - 112;
    uint32_t sign = bits >> 16 & 0x8000;
    if (exponent <= 0) return (uint16_t)sign;
    return (uint16_t)(sign | (uint32_t)(exponent > 30 ? 30 : exponent) << 10 | (bits >> 13 & 0x3ff));
}

enum { RANDOM_BYTES = -1 };

// Any bytes are a valid block, but for its one or two half floats: a quantiser would avoid some that a file may hold. They are
// random, or all `byte`.
static void make_blocks(enum format format, uint8_t *data, size_t n, float size, int byte) {
    const struct { int d, min; float unit; } fields[N_FORMATS] = {  // offsets, -1: none; elements of about `size`
        [Q8_0] = {0, -1, 80}, [Q4_0] = {0, -1, 5}, [Q4_1] = {0, 2, 5}, [Q5_0] = {0, -1, 10}, [Q5_1] = {0, 2, 10},
        [Q2_K] = {80, 82, 10}, [Q3_K] = {108, -1, 40}, [Q4_K] = {0, 2, 150}, [Q5_K] = {0, 2, 300}, [Q6_K] = {208, -1, 1500},
    };
    for (size_t b = 0; b < n; b++, data += formats[format].bytes) {
        for (int i = 0; i < formats[format].bytes; i++)
            data[i] = (uint8_t)(byte == RANDOM_BYTES ? (int)(random_bits() >> 56) : byte);
        memcpy(data + fields[format].d, &(uint16_t){half_of(size / fields[format].unit)}, 2);
        if (fields[format].min >= 0) memcpy(data + fields[format].min, &(uint16_t){half_of(size / 30)}, 2);
    }
}

static struct matrix random_matrix(enum format format, int rows, int cols, float size) {
    size_t row_bytes = (size_t)cols / (size_t)formats[format].block * (size_t)formats[format].bytes;
    uint8_t *data = xcalloc((size_t)rows, row_bytes);
    if (formats[format].group) {
        make_blocks(format, data, (size_t)rows * row_bytes / (size_t)formats[format].bytes, size, RANDOM_BYTES);
    } else {
        for (size_t i = 0; i < (size_t)rows * (size_t)cols; i++) {
            float v = normal() * size;
            if (format == F32) memcpy(data + 4 * i, &v, 4);
            else memcpy(data + 2 * i, &(uint16_t){format == F16 ? half_of(v) : (uint16_t)(bits_from_float(v) >> 16)}, 2);
        }
    }
    return (struct matrix){data, format, rows, cols, row_bytes};
}

// Against double, and the same bits on every instruction set and for every cut into rows and tokens. Frees both.
static void check_product(struct matrix m, struct act x, int tokens) {
    const enum format format = m.format;
    const int rows = m.rows, cols = m.cols;
    size_t n = (size_t)rows * (size_t)tokens * sizeof(float);
    float *y = xmalloc(n), *first = xmalloc(n), *row = xmalloc((size_t)cols * sizeof *row);
    for (int i = 0; i < n_isa; i++) {
        const struct kernels *k = isa[i];
        if (is_quantized(&m)) quantize_rows(k, &x, 0, tokens, 0, cols);
        memset(y, 0, n);  // what is added to
        for (int r = 0; r < rows;) {  // in pieces of random size
            int n_rows = 1 + (int)(random_bits() % 20), token = 0;
            if (n_rows > rows - r) n_rows = rows - r;
            while (token < tokens) {
                int n_tokens = 1 + (int)(random_bits() % (tokens > 100 ? 250 : tokens > 16 ? 25 : 9));
                if (n_tokens > tokens - token) n_tokens = tokens - token;
                k->matmul(&m, r, n_rows, &x, token, n_tokens, y + token * rows + r, rows, random_bits() & 1);
                token += n_tokens;
            }
            r += n_rows;
        }
        if (i == 0) memcpy(first, y, n);
        CHECK(memcmp(first, y, n) == 0, "%s %s [%d, %d] x %d: %s differs from %s", "product", formats[format].name, rows, cols,
              tokens, k->name, isa[0]->name);
    }
    double worst = 0;
    for (int r = 0; r < rows; r++) {
        isa[0]->dequantize(format, m.data + (size_t)r * m.row_bytes, cols, row);
        for (int t = 0; t < tokens; t++) {
            double sum = 0, size = 0;
            for (int c = 0; c < cols; c++) {
                const struct act_chunk *q = act_chunk_of(&x, t, c);
                double v = is_quantized(&m) ? (double)q->q[c % 256] * (double)q->scale[c % 256 / 32] : (double)x.f[t * x.ld + c];
                sum += (double)row[c] * v;
                size += fabs((double)row[c] * v);
            }
            double off = fabs((double)first[t * rows + r] - sum) / (size + 1e-9);
            if (!(off <= worst)) worst = off;
        }
    }
    CHECK(worst < 1e-5, "product %s [%d, %d] x %d is off by %g", formats[format].name, rows, cols, tokens, worst);
    free((void *)m.data);
    act_free(&x);
    free(y);
    free(first);
    free(row);
}

// Every format, shapes that are multiples of nothing.
static void test_products(enum format format, int rows, int cols, int tokens) {
    struct act x = act_new(tokens, cols, true);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < cols; i++) x.f[t * x.ld + i] = normal();
    check_product(random_matrix(format, rows, cols, 1), x, tokens);
}

// Sums of the largest magnitude that there is, in each format: weights with all bits set, or the smallest or largest signed byte,
// times activations that are all quantised to 127 or -127. Where a kernel adds in fewer bits than 32, it must have room for them.
static void test_largest_sums(enum format format, uint8_t byte) {
    const int rows = 17, cols = 512, tokens = 14;
    struct matrix m = random_matrix(format, rows, cols, 1);
    make_blocks(format, (uint8_t *)m.data, (size_t)rows * m.row_bytes / (size_t)formats[format].bytes, 1, byte);
    struct act x = act_new(tokens, cols, true);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < cols; i++) x.f[t * x.ld + i] = t % 2 ? -1 : 1;
    check_product(m, x, tokens);
}

static void test_quantize(void) {
    float x[96];
    struct act_chunk q[MAX_ISAS];
    memset(q, 0, sizeof q);
    for (int i = 0; i < 96; i++) x[i] = i < 32 ? 0 : normal() * (i < 64 ? 1e-3f : 1e3f);
    for (int i = 0; i < n_isa; i++) {
        const int from = 96;  // a column in the middle of a chunk
        isa[i]->quantize(x, 96, q + i, from);
        CHECK(memcmp(q + i, q, sizeof *q) == 0, "%s quantises otherwise than %s", isa[i]->name, isa[0]->name);
        for (int j = from; j < from + 96; j += 32) {
            int want[2] = {0};
            for (int l = 0; l < 32; l++) want[l / 16] += q[i].q[j + l];
            CHECK(q[i].surplus_16[j / 16] == 128 * want[0] && q[i].surplus_16[j / 16 + 1] == 128 * want[1] &&
                  q[i].surplus[j / 32] == 128 * (want[0] + want[1]) && q[i].scaled_sum[j / 32] == q[i].scale[j / 32] * (float)(want[0] + want[1]),
                  "%s: wrong sums of columns %d to %d", isa[i]->name, j, j + 31);
        }
        for (int j = 0; j < 96; j++) {
            const float scale = q[i].scale[(from + j) / 32];
            CHECK(fabsf((float)q[i].q[from + j] * scale - x[j]) <= scale * 0.5001f, "%s: %g became %d * %g", isa[i]->name, (double)x[j],
                  q[i].q[from + j], (double)scale);
        }
        float bad[32] = {1, 2, NAN};
        struct act_chunk ignored;
        isa[i]->quantize(bad, 32, &ignored, 0);
        CHECK(isnan(ignored.scale[0]), "%s: a NaN vanished in a block", isa[i]->name);
        bad[2] = INFINITY;
        isa[i]->quantize(bad, 32, &ignored, 0);
        CHECK(!isfinite(ignored.scale[0]), "%s: an infinity vanished in a block", isa[i]->name);
    }
}

// ---- threads ----

// Forwards of some length, in each of which a thread waits for another; returns the next team's size.
static int team_after(struct context *ctx, int n_forwards, double seconds, double waited) {
    for (int i = 0; i < n_forwards; i++) {
        note_wait(ctx, waited / 2);
        note_wait(ctx, waited);
        review_team(ctx, ctx->n_threads - ctx->n_left_out, seconds);
    }
    return ctx->n_threads - ctx->n_left_out;
}

// A thread that keeps losing its core is left out, and tried again; a single loss is an accident, and so is one of little weight.
static void test_review_team(void) {
    struct context ctx = {.n_threads = 2};
    CHECK(team_after(&ctx, 1, 5e-3, 4e-3) == 2 && team_after(&ctx, 50, 5e-3, 0) == 2, "one loss changed the team");
    CHECK(team_after(&ctx, 1, 5e-3, 4e-3) == 2, "two losses at different times changed the team");
    CHECK(team_after(&ctx, 1, 5e-3, 4e-3) == 1, "two losses left the team as it was");
    int n = 0;
    while (n < 1000 && team_after(&ctx, 1, 5e-3, 0) == 1) n++;
    CHECK(n >= 99 && n <= 101, "tried again after %d forwards", n);  // half a second
    CHECK(team_after(&ctx, 1, 5e-3, 4e-3) == 1, "a loss on probation left the team as it was");
    for (n = 0; n < 1000 && team_after(&ctx, 1, 5e-3, 0) == 1;) n++;
    CHECK(n >= 199 && n <= 201, "tried again after %d forwards, the second time", n);
    CHECK(team_after(&ctx, 50, 5e-3, 0) == 2 && team_after(&ctx, 50, 1e-4, 5e-4) == 2, "unevenness was taken for a loss");
    CHECK(team_after(&ctx, 50, 0.2, 4e-3) == 2, "a thread was left out whose losses hardly count in long forwards");
    CHECK(team_after(&ctx, 2, 0.2, 0.1) == 1, "a thread stayed whose losses are half of long forwards");
    ctx = (struct context){.n_threads = 1};
    CHECK(team_after(&ctx, 50, 5e-3, 4e-3) == 1 && ctx.n_left_out == 0, "nobody is left");
}

// ---- the model: one result, however a run is cut up ----

static const float *random_vector(int n, float mean, float size) {
    float *v = xcalloc((size_t)round_up(n, 16), sizeof *v);
    for (int i = 0; i < n; i++) v[i] = mean + size * normal();
    return v;
}

// A row that is no multiple of the block cannot have the format.
static enum format fitting(enum format format, int cols, enum format otherwise) {
    return cols % formats[format].block ? otherwise : format;
}

// [d_inner/16][d_state][R][16]: both parts from low to high, padding zero.
static const float *random_states(const struct level_size *size, int n_state, int parts, float low, float high) {
    float *v = xcalloc((size_t)round_up(size->d_inner, 16) * (size_t)(n_state * parts), sizeof *v);
    for (size_t ch = 0; ch < (size_t)size->d_inner; ch++)
        for (size_t i = 0; i < (size_t)(n_state * parts); i++)
            v[state_at(ch, i / (size_t)parts, (size_t)n_state, (size_t)parts) + i % (size_t)parts * 16] = low + (high - low) * (float)uniform();
    return v;
}

static void random_layer(struct layer *l, const struct config *c, enum format format) {
    const struct level_size *size = &c->level[l->level];
    const int ld = round_up(size->d_inner, 16), parts = 1 + l->is_complex;
    l->norm = random_vector(size->d_model, 1, 0.1f);
    l->norm_b = c->layer_norm ? random_vector(size->d_model, 0, 0.1f) : NULL;
    l->in = random_matrix(fitting(format, size->d_model, F16), 2 * size->d_inner, size->d_model, 0.1f);
    float *conv = xcalloc((size_t)(ld * c->d_conv), sizeof *conv);
    for (int tap = 0; tap < c->d_conv; tap++)
        for (int ch = 0; ch < size->d_inner; ch++) conv[tap * ld + ch] = 0.5f * normal();
    l->conv_w = conv;
    l->conv_b = random_vector(size->d_inner, 0, 0.1f);
    l->dt_b = random_vector(size->d_inner, -3, 1);
    if (l->s4) {
        l->decay = random_states(size, c->d_state, parts, -0.7f, 0.7f);  // of magnitude below 1
        l->weight = random_states(size, c->d_state, parts, -0.1f, 0.1f);
    } else {
        l->a2 = random_states(size, c->d_state, parts, -8, 0);
        l->a_inverse = c->zoh ? random_states(size, c->d_state, parts, -1, 0) : NULL;
        l->x = random_matrix(fitting(format, size->d_inner, BF16), size->dt_rank + 2 * c->d_state * parts, size->d_inner, 0.1f);
        l->dt = random_matrix(F32, size->d_inner, size->dt_rank, 0.3f);
    }
    l->d = random_vector(size->d_inner, 1, 0.2f);
    l->out = random_matrix(fitting(format, size->d_inner, F32), size->d_model, size->d_inner, 0.1f);
}

// A text model, or with n_pools a U-Net whose stages are of all kinds.
static struct model random_model(struct config c, enum format format) {
    for (int i = 0; i <= c.n_pools; i++)
        c.level[i] = (struct level_size){c.d_model << i, c.d_inner << i, c.dt_rank + i, i ? c.level[i - 1].period * c.pool[i - 1] : 1};
    struct model m = {.c = c, .fingerprint = random_bits()};
    m.layers = xcalloc((size_t)c.n_layer, sizeof *m.layers);
    m.embd = random_matrix(fitting(format, c.d_model, F32), c.n_vocab, c.d_model, 0.5f);
    m.head = m.embd;
    m.head_b = c.n_pools ? random_vector(c.n_vocab, 0, 0.1f) : NULL;
    m.norm = random_vector(c.d_model, 1, 0.1f);
    m.norm_b = c.layer_norm ? random_vector(c.d_model, 0, 0.1f) : NULL;
    for (int i = 0; i < c.n_layer; i++) {
        const int stage = c.n_pools ? i / c.n_blocks : 0;
        if (c.n_pools) m.layers[i] = (struct layer){.level = min_int(stage, 2 * c.n_pools - stage), .s4 = stage & 1, .is_complex = stage >> 1 & 1};
        random_layer(&m.layers[i], &c, format);
    }
    for (int i = 0; i < c.n_pools; i++) {
        const int d_model = c.level[i].d_model, wide = c.pool[i] * d_model;
        m.pools[i] = (struct pooling){
            .down = random_matrix(fitting(format, wide, F32), 2 * d_model, wide, 0.1f), .down_b = random_vector(2 * d_model, 0, 0.1f),
            .up = random_matrix(fitting(format, 2 * d_model, F32), wide, 2 * d_model, 0.1f), .up_b = random_vector(wide, 0, 0.1f)};
    }
    lay_out_state(&m);
    return m;
}

static void free_random_model(struct model *m) {
    for (int i = 0; i < m->c.n_layer; i++) {
        struct layer *l = &m->layers[i];
        const void *parts[] = {l->norm, l->norm_b, l->in.data, l->conv_w, l->conv_b, l->x.data, l->dt.data, l->dt_b, l->a2, l->a_inverse,
                               l->decay, l->weight, l->d, l->out.data};
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) free((void *)parts[p]);
    }
    for (int i = 0; i < m->c.n_pools; i++) {
        const struct pooling *pool = &m->pools[i];
        const void *parts[] = {pool->down.data, pool->up.data, pool->down_b, pool->up_b};
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) free((void *)parts[p]);
    }
    free((void *)m->embd.data);
    free((void *)m->head_b);
    free((void *)m->norm);
    free((void *)m->norm_b);
    free(m->layers);
}

static uint64_t sequence_hash(const struct config *c, const struct sequence *s) {
    uint64_t h = hash_bytes(1, s->conv, c->conv_floats * sizeof(float));
    h = hash_bytes(h, s->ssm, c->ssm_floats * sizeof(float));
    return hash_bytes(h, s->pool, c->pool_floats * sizeof(float));
}

// Feeds n tokens in chunks of at most `chunk` (0: of random sizes); returns a hash of the last logits and the state.
static uint64_t run_alone(struct context *ctx, struct sequence *s, const int32_t *tokens, int n, int chunk) {
    const struct config *c = &ctx->m->c;
    for (int at = 0; at < n;) {
        int now = chunk ? chunk : 1 + (int)(random_bits() % 7);
        if (now > n - at) now = n - at;
        struct segment segment = {s, tokens + at, now, at + now == n};
        forward(ctx, &segment, 1, c->n_layer);
        at += now;
    }
    return hash_bytes(sequence_hash(c, s), ctx->logits, (size_t)c->n_vocab * sizeof(float));
}

enum { N_TOKENS = 150 };

static void test_one_result(struct config c, enum format format) {
    struct model m = random_model(c, format);
    c = m.c;
    int32_t tokens[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = (int32_t)(random_bits() % (uint64_t)c.n_vocab);
    const int chunks[] = {N_TOKENS, 33, 0, 1, 2, 3, 4, 5, 31, 32, 127, 128, 129};  // 0: of random sizes
    uint64_t whole = 0;
    for (int k = 0; k < n_isa; k++)
        for (int threads = 1; threads <= 2; threads++) {
            struct context *ctx = context_new(&m, isa[k], threads, N_TOKENS, 4);
            struct sequence *s = sequence_new(&c), *other = sequence_new(&c), *third = sequence_new(&c);
            for (size_t i = 0; i < sizeof chunks / sizeof *chunks && ((k == 0 && threads == 1) || i < 3); i++) {
                sequence_reset(s, &c);
                uint64_t h = run_alone(ctx, s, tokens, N_TOKENS, chunks[i]);
                if (!whole) whole = h;
                CHECK(h == whole, "%s %s, %d threads, d_model %d: chunks of %d give other bits than the whole", formats[format].name,
                      isa[k]->name, threads, c.d_model, chunks[i]);
            }
            CHECK(isfinite(isa[k]->finite_max(ctx->logits, c.n_vocab)), "logits are finite");

            // Three sequences of different lengths in one batch; the one in the middle asks for no logits.
            const int length[3] = {7, 1, 40};
            uint64_t alone[3], together[3];
            struct sequence *all[3] = {s, other, third};
            struct segment batch[3];
            for (int i = 0; i < 3; i++) {
                sequence_reset(all[i], &c);
                alone[i] = run_alone(ctx, all[i], tokens + 10 * i, length[i], N_TOKENS);
                if (i == 1) alone[i] = sequence_hash(&c, all[i]);
                sequence_reset(all[i], &c);
                batch[i] = (struct segment){all[i], tokens + 10 * i, length[i], i != 1};
            }
            forward(ctx, batch, 3, c.n_layer);
            for (int i = 0; i < 3; i++) {
                together[i] = sequence_hash(&c, all[i]);
                if (i != 1)
                    together[i] = hash_bytes(together[i], ctx->logits + (size_t)(i / 2) * (size_t)ctx->ld_vocab,
                                             (size_t)c.n_vocab * sizeof(float));
                CHECK(together[i] == alone[i], "%s %s: sequence %d of a ragged batch differs from running it alone",
                      formats[format].name, isa[k]->name, i);
            }

            // Decoding allocates nothing. (A first forward lets OpenMP start its threads.)
            struct segment one = {s, tokens, 1, true};
            forward(ctx, &one, 1, c.n_layer);
            long before = n_allocations;
            for (int i = 0; i < 5; i++) forward(ctx, &one, 1, c.n_layer);
            CHECK(n_allocations == before, "decoding allocated %ld times", n_allocations - before);
            sequence_free(s);
            sequence_free(other);
            sequence_free(third);
            context_free(ctx);
        }
    free_random_model(&m);
}

// ---- state files ----

static void test_state(struct config c) {
    struct model m = random_model(c, F32), other = m;
    c = m.c;
    other.fingerprint++;
    struct sequence *s = sequence_new(&c), *back = sequence_new(&c);
    int32_t some[29];
    for (int i = 0; i < 29; i++) some[i] = i % c.n_vocab;
    struct context *ctx = context_new(&m, isa[0], 1, 29, 1);
    run_alone(ctx, s, some, 29, 29);
    context_free(ctx);
    s->n_past = 12345678901;
    struct resume *r = xcalloc(1, sizeof *r), *got = xcalloc(1, sizeof *got);
    *r = (struct resume){.pending = {7}, .n_pending = 1, .recent = {1, 2, 39}, .n_recent = 3, .bytes = "\xe2\x82", .n_bytes = 2};
    char path[] = "/tmp/mamba-unit-XXXXXX";
    int fd = mkstemp(path);
    struct error e = {""};
    struct outfile out;
    bool saved = fd >= 0 && outfile_open(&out, path, &e);
    if (saved) state_write(&out, &m, s, r);
    CHECK(saved && outfile_commit(&out, &e), "saving: %s", e.text);
    CHECK(state_load(path, &m, back, got, &e), "loading: %s", e.text);
    CHECK(sequence_hash(&c, s) == sequence_hash(&c, back) && back->n_past == s->n_past, "the state came back otherwise");
    CHECK(memcmp(r, got, sizeof *r) == 0, "what a run resumes from came back otherwise");
    CHECK(!state_load(path, &other, back, got, &e) && strstr(e.text, "another model"), "another model: %s", e.text);

    struct buffer file = {0};
    char chunk[4096];
    for (ssize_t n; (n = read(fd, chunk, 0)) > 0;) buffer_add(&file, chunk, (size_t)n);
    FILE *f = fopen(path, "rb");
    for (size_t n; f && (n = fread(chunk, 1, sizeof chunk, f));) buffer_add(&file, chunk, n);
    if (f) fclose(f);
    uint64_t before = sequence_hash(&c, back);
    int accepted = 0, silent = 0;
    uint8_t *copy = xmalloc(file.n);
    for (size_t i = 0; i < file.n; i++) {  // cut at every length, and every byte damaged
        struct error cut = {""}, damaged = {""};
        memcpy(copy, file.p, file.n);
        accepted += state_parse(copy, i, &m, back, got, &cut);
        copy[i] ^= 0x41;
        accepted += state_parse(copy, file.n, &m, back, got, &damaged);
        silent += !cut.text[0] || !damaged.text[0];
    }
    CHECK(accepted == 0 && silent == 0, "%d damaged state files were accepted, %d without a word", accepted, silent);
    CHECK(sequence_hash(&c, back) == before, "a refused state file changed the state");
    free(copy);
    free(file.p);
    free(r);
    free(got);
    sequence_free(s);
    sequence_free(back);
    free_random_model(&m);
    unlink(path);
    close(fd);
}

// ---- GGUF headers from an enemy ----

static bool bind_bytes(const uint8_t *bytes, size_t n, struct error *e) {
    struct model m = {.file = {.map = bytes, .size = n}};
    bool ok = gguf_parse(&m.file, e) && model_bind(&m, e);
    struct tokenizer t = {0};
    if (ok && gguf_has_tokenizer(&m.file) && tokenizer_load(&t, &m.file, e)) tokenizer_close(&t);
    m.file.map = NULL;  // not mapped
    model_close(&m);
    return ok;
}

static void test_hostile_header(const char *path) {
    struct gguf g;
    struct error e = {""};
    if (!gguf_open(&g, path, &e)) {
        CHECK(false, "%s", e.text);
        return;
    }
    int silent = 0;
    uint8_t *copy = xmalloc(g.size);
    memcpy(copy, g.map, g.size);
    struct error whole = {""};
    largest_allocation = 0;
    CHECK(bind_bytes(copy, g.size, &whole), "%s", whole.text);
    for (size_t i = 0; i < g.data_start; i++) {
        struct error cut = {""}, flipped = {""};
        uint8_t *exact = xmalloc(i);  // so that a sanitizer sees a read past the end
        memcpy(exact, g.map, i);
        silent += bind_bytes(exact, i, &cut) || !cut.text[0];
        free(exact);
        for (int bit = 0; bit < 8; bit += 7) {
            copy[i] ^= (uint8_t)(1 << bit);
            silent += !bind_bytes(copy, g.size, &flipped) && !flipped.text[0];
            copy[i] ^= (uint8_t)(1 << bit);
        }
    }
    CHECK(silent == 0, "%d cut or damaged headers went wrong without a word", silent);
    CHECK(largest_allocation < 8 * g.size, "a header of %zu bytes made the program ask for %zu", g.data_start, largest_allocation);
    for (int i = 0; i < 2000; i++) {  // random bytes behind the magic
        size_t n = 24 + random_bits() % 200;
        uint8_t *random = xmalloc(n);
        for (size_t b = 0; b < n; b++) random[b] = (uint8_t)(random_bits() >> (random_bits() % 3 * 28));
        memcpy(random, "GGUF\3\0\0\0", 8);
        struct error r = {""};
        silent += bind_bytes(random, n, &r) || !r.text[0];
        free(random);
    }
    CHECK(silent == 0, "%d random headers were accepted", silent);
    free(copy);
    gguf_close(&g);
}

// ---- the sandbox ----

#ifdef MAMBA_SANDBOX
// What a process can still do inside: one bit for each thing that should have failed, or succeeded.
static int sandboxed(const char *model, const char *output) {
    struct options o = {.model = model};
    struct outfile out;
    struct error e = {""};
    int wrong = 0;
    if (!outfile_open(&out, output, &e)) return 1;
    sandbox_enter(&o, &out, &(struct outfile){0});
    int fd = open(model, O_RDONLY);
    wrong |= (fd < 0) << 1;  // it was named
    wrong |= (open("/etc/passwd", O_RDONLY) >= 0) << 2;
    wrong |= (open(model, O_WRONLY) >= 0) << 3;
    wrong |= (open("/tmp/mamba-sandbox-new", O_CREAT | O_RDWR, 0600) >= 0) << 4;
    wrong |= (socket(AF_INET, SOCK_STREAM, 0) >= 0) << 5;
    wrong |= (socket(AF_INET, SOCK_DGRAM, 0) >= 0) << 6;
    wrong |= (socket(AF_UNIX, SOCK_STREAM, 0) >= 0) << 7;
    char *arguments[] = {"/bin/true", NULL};
    wrong |= (execv("/bin/true", arguments) != -1) << 8;
    fputs("whole", out.f);
    wrong |= !outfile_commit(&out, &e) << 9;  // the output gets its name
    return wrong;
}

static void test_sandbox(const char *model) {
    char output[] = "/tmp/mamba-sandbox-XXXXXX";
    int fd = mkstemp(output), status = 0, answer = -1, ends[2];
    if (syscall(LANDLOCK_CREATE_RULESET, NULL, (size_t)0, 1) < 1 || fd < 0 || pipe(ends) != 0) {
        printf("the sandbox is not tested: this kernel has no Landlock\n");
        return;
    }
    close(fd);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int wrong = sandboxed(model, output);
        _exit(write(ends[1], &wrong, sizeof wrong) != (ssize_t)sizeof wrong);
    }
    close(ends[1]);
    if (read(ends[0], &answer, sizeof answer) != (ssize_t)sizeof answer) answer = -1;
    waitpid(child, &status, 0);
    close(ends[0]);
    char text[8] = "";
    FILE *f = fopen(output, "rb");
    size_t n = f ? fread(text, 1, 7, f) : 0;
    if (f) fclose(f);
    unlink(output);
    CHECK(answer == 0 && WIFEXITED(status), "inside the sandbox, wrong were %#x", (unsigned)answer);
    CHECK(n == 5 && strcmp(text, "whole") == 0, "the sandboxed output is \"%s\"", text);
}
#endif

// ---- sampler ----

static void test_sampler(void) {
    enum { V = 50, DRAWS = 40000 };
    float logits[V];
    double p[V], sum = 0;
    const struct ids none = {0};
    struct resume *past = xcalloc(1, sizeof *past);
    for (int i = 0; i < V; i++) logits[i] = 1.5f * normal();
    for (int i = 0; i < V; i++) sum += p[i] = exp((double)logits[i] / 0.7);
    struct sampling all = {.temperature = 0.7f, .top_p = 1, .repeat_penalty = 1, .repeat_last_n = 64, .seed = 5};
    struct sampler s = sampler_new(isa[0], V);
    int count[V] = {0};
    for (int t = 0; t < DRAWS; t++) count[sample(&s, &all, logits, &none, past, t)]++;
    double chi2 = 0;
    for (int i = 0; i < V; i++) chi2 += pow(count[i] - DRAWS * p[i] / sum, 2) / (DRAWS * p[i] / sum);
    CHECK(chi2 < 49 + 6 * sqrt(2 * 49), "chi square is %g with 49 degrees of freedom", chi2);

    // Which tokens top-k, top-p and min-p let through, against a sort.
    int order[V];
    for (int i = 0; i < V; i++) order[i] = i;
    for (int i = 0; i < V; i++)
        for (int j = i + 1; j < V; j++)
            if (logits[order[j]] > logits[order[i]]) {
                int swap = order[i];
                order[i] = order[j];
                order[j] = swap;
            }
    double plain = 0, running = 0;
    for (int i = 0; i < V; i++) plain += exp((double)logits[i]);
    int nucleus = 0, likely = 0;
    while (running < 0.6 * plain) running += exp((double)logits[order[nucleus++]]);
    while (likely < V && logits[order[likely]] - logits[order[0]] >= logf(0.2f)) likely++;
    const struct {
        struct sampling s;
        int allowed;
    } cases[] = {{{.temperature = 1, .top_k = 3, .top_p = 1, .repeat_penalty = 1}, 3},
                 {{.temperature = 1, .top_p = 0.6f, .repeat_penalty = 1}, nucleus},
                 {{.temperature = 1, .top_p = 1, .min_p = 0.2f, .repeat_penalty = 1}, likely}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        bool seen[V] = {false};
        int distinct = 0, outside = 0;
        for (int t = 0; t < 4000; t++) seen[sample(&s, &cases[c].s, logits, &none, past, t)] = true;
        for (int i = 0; i < V; i++) distinct += seen[i];
        for (int i = cases[c].allowed; i < V; i++) outside += seen[order[i]];
        CHECK(outside == 0, "case %zu drew %d tokens that it should not", c, outside);
        CHECK(distinct >= cases[c].allowed - 1, "case %zu drew %d of %d tokens", c, distinct, cases[c].allowed);
    }

    struct sampling greedy = {.repeat_penalty = 1, .repeat_last_n = 3};
    int32_t four = 4, every[V];
    const struct ids ban_four = {.p = &four, .n = 1}, ban_all = {.p = every, .n = V};
    for (int i = 0; i < V; i++) every[i] = i;
    logits[9] = logits[4] = 100;
    logits[7] = 60;
    CHECK(sample(&s, &greedy, logits, &none, past, 0) == 4, "of equal logits the lower id is taken");
    CHECK(sample(&s, &greedy, logits, &ban_four, past, 0) == 9, "a banned token is not taken");
    CHECK(sample(&s, &greedy, logits, &ban_all, past, 0) == -1, "no token is left");
    greedy.repeat_penalty = 1.5f;  // 9 came twice and is penalised once: 67 is still more than 60, and 44 would not be
    past->n_recent = 4;
    memcpy(past->recent, (int32_t[]){4, 9, 9, 2}, 4 * sizeof(int32_t));
    CHECK(sample(&s, &greedy, logits, &ban_four, past, 0) == 9, "a token was penalised twice");
    greedy.repeat_penalty = 2;
    CHECK(sample(&s, &greedy, logits, &ban_four, past, 0) == 7, "the repeat penalty did not count");
    CHECK(sample(&s, &greedy, logits, &none, past, 0) == 4, "the repeat penalty looked back too far");

    struct token_logprob top[3];
    double max = 100, total = 0, logprob = log_probability(&s, logits, 100, 7, 3, top);
    for (int i = 0; i < V; i++) total += exp((double)logits[i] - max);
    CHECK(fabs(logprob - (60 - max - log(total))) < 1e-5, "log p is %g", logprob);
    CHECK(top[0].id == 4 && top[1].id == 9 && top[2].id == 7 && top[2].logprob == logprob, "the likeliest are %d, %d, %d",
          top[0].id, top[1].id, top[2].id);
    CHECK(random_at(1, 5) == random_at(1, 5) && random_at(1, 5) != random_at(1, 6) && random_at(1, 5) != random_at(2, 5),
          "random numbers are a function of seed and position");
    sampler_free(&s);
    free(past);
}

// ---- text on its way out ----

// Emits the pieces with these stop texts; the output goes to `out`.
static bool emitted(const char *const *pieces, int n, const char *const *stops, int n_stops, char *out) {
    struct buffer text = {0};
    struct str stop[4];
    for (int i = 0; i < n_stops; i++) stop[i] = (struct str){stops[i], strlen(stops[i])};
    struct emitter e = {.to = &text, .stops = stop, .n_stops = n_stops};
    for (int i = 0; i < n && !e.stopped; i++) emit(&e, (struct str){pieces[i], strlen(pieces[i])});
    if (!e.stopped && e.held.n) emit_bytes(&e, e.held.n);
    buffer_add(&text, "", 1);
    strcpy(out, text.p);
    free(text.p);
    free(e.held.p);
    return e.stopped;
}

static void test_emitter(void) {
    char out[256];
    const char *split[] = {"one en", "d", "of", " text"}, *stops[] = {"endof", "zzz"};
    CHECK(emitted(split, 4, stops, 2, out) && strcmp(out, "one ") == 0, "a stop text over three tokens left \"%s\"", out);
    const char *almost[] = {"one en", "do", "r", "f"};
    CHECK(!emitted(almost, 4, stops, 2, out) && strcmp(out, "one endorf") == 0, "what was no stop text became \"%s\"", out);
    const char *nested[] = {"ab", "c"}, *two[] = {"abcd", "bc"};
    CHECK(emitted(nested, 2, two, 2, out) && strcmp(out, "a") == 0, "the stop text inside another left \"%s\"", out);
    const char *euro[] = {"5 \xe2", "\x82", "\xac!"};
    CHECK(!emitted(euro, 3, NULL, 0, out) && strcmp(out, "5 \xe2\x82\xac!") == 0, "a character over three tokens: \"%s\"", out);
    const char *broken[] = {"a\xff", "\xe2\x82", "b"};
    CHECK(!emitted(broken, 3, NULL, 0, out) && strcmp(out, "a\xef\xbf\xbd\xef\xbf\xbd" "b") == 0, "broken bytes: \"%s\"", out);
    CHECK(incomplete_tail("a\xf0\x9f\x98", 4) == 3 && incomplete_tail("\xf0\x9f\x98\x80", 4) == 0 && incomplete_tail("\xff", 1) == 0,
          "incomplete characters at the end");
}

#ifdef MAMBA_EMULATE_AVX512
#define TILE_PRODUCTS emulated_tile_products
#else
#define TILE_PRODUCTS 1
#endif

int main(int argc, char **argv) {
    char fixture[PATH_MAX];
    const char *slash = strrchr(argv[0], '/');
    if (argc > 1) snprintf(fixture, sizeof fixture, "%s/mamba_tied.f32.bin", argv[1]);
    else snprintf(fixture, sizeof fixture, "%.*sfixtures/mamba_tied.f32.bin", slash ? (int)(slash - argv[0]) + 1 : 0, argv[0]);
    n_isa = usable_kernels(isa);
    test_half_floats();
    for (int i = 0; i < n_isa; i++) test_functions(isa[i]);
    test_quantize();
    test_review_team();
    for (int f = 0; f < N_FORMATS; f++) {
        int block = formats[f].block;
        if (formats[f].group) {
            test_largest_sums((enum format)f, 0xff);
            test_largest_sums((enum format)f, 0x80);
            test_largest_sums((enum format)f, 0x7f);
        }
        test_products((enum format)f, 5, round_up(3 * 32, block), 7);
        test_products((enum format)f, 33, 7 * block, 13);
        test_products((enum format)f, 1, block, 1);
        test_products((enum format)f, 19, round_up(96 * 5 + 11, block), 6);
        test_products((enum format)f, 40, round_up(96, block), 300);  // more tokens than a call of matmul keeps sums of
        test_products((enum format)f, 21, round_up(NARROW_COLUMNS + 45, block), 300);
        test_products((enum format)f, 17, round_up(NARROW_COLUMNS - 3, block), 130);
        test_products((enum format)f, 34, 3 * block, 17);                  // one token more than a register of tokens
        test_products((enum format)f, 34, round_up(2 * 256 + 96, block), 130);  // three chunks of columns
    }
    CHECK(TILE_PRODUCTS > 0, "the kernels %s multiply no tiles", isa[0]->name);
    if (argc > 2 && strcmp(argv[2], "kernels") == 0) {  // under an emulator the rest takes minutes
        printf("%s: %d passed, %d failed\n", isa[0]->name, n_passed, n_failed);
        return n_failed != 0;
    }
    const struct config shapes[] = {
        {.n_layer = 2, .d_model = 64, .d_inner = 128, .d_state = 16, .d_conv = 4, .dt_rank = 4, .n_vocab = 100, .norm_eps = 1e-5f},
        {.n_layer = 2, .d_model = 96, .d_inner = 192, .d_state = 5, .d_conv = 3, .dt_rank = 7, .n_vocab = 301, .norm_eps = 1e-5f,
         .dt_b_c_rms = true, .dt_b_c_eps = 1e-6f},
        {.n_layer = 1, .d_model = 256, .d_inner = 256, .d_state = 16, .d_conv = 4, .dt_rank = 9, .n_vocab = 101, .norm_eps = 1e-5f},
        {.n_layer = 3, .d_model = 37, .d_inner = 74, .d_state = 16, .d_conv = 2, .dt_rank = 3, .n_vocab = 11, .norm_eps = 1e-5f},
        {.n_layer = 10, .n_blocks = 2, .n_pools = 2, .pool = {2, 3}, .d_model = 32, .d_inner = 64, .d_state = 16, .d_conv = 4,
         .dt_rank = 2, .n_vocab = 256, .norm_eps = 1e-5f, .layer_norm = true, .zoh = true},
        {.n_layer = 7, .n_blocks = 1, .n_pools = 3, .pool = {4, 2, 3}, .d_model = 13, .d_inner = 26, .d_state = 3, .d_conv = 3,
         .dt_rank = 1, .n_vocab = 50, .norm_eps = 1e-5f},
        {.n_layer = 5, .n_blocks = 1, .n_pools = 2, .pool = {16, 2}, .d_model = 16, .d_inner = 48, .d_state = 5, .d_conv = 4,
         .dt_rank = 2, .n_vocab = 50, .norm_eps = 1e-5f, .layer_norm = true},
    };
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int f = 0; f < N_FORMATS; f++)  // formats with blocks of 256 have a shape of their own
            if ((formats[f].block == 256) == (shapes[s].d_model == 256)) test_one_result(shapes[s], (enum format)f);
    test_state((struct config){.n_layer = 2, .d_model = 24, .d_inner = 50, .d_state = 3, .d_conv = 4, .dt_rank = 2, .n_vocab = 40,
                               .norm_eps = 1e-5f});
    test_state((struct config){.n_layer = 5, .n_blocks = 1, .n_pools = 2, .pool = {2, 3}, .d_model = 3, .d_inner = 5, .d_state = 2,
                               .d_conv = 3, .dt_rank = 1, .n_vocab = 40, .norm_eps = 1e-5f});
    test_hostile_header(fixture);
#ifdef MAMBA_SANDBOX
    test_sandbox(fixture);
#endif
    test_sampler();
    test_emitter();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
