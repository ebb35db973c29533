// The GPU backend of mamba: implements the interface of struct device that mamba.c declares.
//
//   make cuda                                      nvcc 12 or later
//   g++ -x c++ -DCUDA_EMULATION mamba_cuda.cu      on the CPU, for tests: tests/cuda_emu.h
//
// One forward is four kernels a layer while sequences decode, one token each:
//
//   in_proj     norm (a factor after the dot product), product, convolution and SiLU
//   x_proj      product: dt (low rank), B, C
//   dt_proj     product, selective scan, skip and gate
//   out_proj    product, added to the residual stream
//
// Prompts have the convolution and the scan in kernels of their own, which do the same operations in the same order.
//
// The promise: on one GPU the same tokens give the same bits whatever the batch, the chunks of a prompt and the kernels' shapes,
// because a product has one method for all of them. A row of weights times a column of activations is a sum over blocks of
// 32: the block's dot product, from zero, times the block's scale, is added by one fused multiply-add. Blocks add up in rising
// order within a slice of the row, and slices in rising order; slices depend on the length of the row alone. The dot
// product itself is made by tensor cores (mma), in which an element depends on its row and its column only:
//
//   quantised      bytes, exact; activations are rounded to 8 bits in blocks of 32, as on the CPU
//   F16, BF16      activations are cut into a high and a low part of the weights' type, which together keep 22 (16) bits
//   F32            no tensor cores: fused multiply-adds in rising order
//
// Everything is compiled without contraction of multiplications and additions (-fmad=false).
//
// Bottom-up: layout of weights, fragments, product, layers, device, interface.

#define MAMBA_HEADER_ONLY
#include "mamba.c"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#ifdef CUDA_EMULATION
#include "tests/cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; type *name = (type *)name##_bytes
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#define DEVICE static __device__ __forceinline__
#define WHOLE_WARP 0xffffffffu

// ====================================================================================================================
// Layout of weights.
// A matrix is cut into tiles of 16 rows and those into chunks of 256 columns, what is missing filled with zeros. In a chunk the
// weights stand as a warp reads them: 16 bytes a lane, lanes side by side. Nothing is rounded or decoded: a quantised weight
// keeps its bits, in planes of 8, 4, 2 or 1 bits that a chunk holds one after the other.
// ====================================================================================================================

enum { TILE = 16, CHUNK = 256, BLOCK = 32, BLOCKS = CHUNK / BLOCK, MAX_SLICES = 8 };

// Bits of the low plane of q, and of the high one above it; 0: there is none.
static constexpr __host__ __device__ int low_bits(enum format f) { return f == Q8_0 ? 8 : f == Q2_K || f == Q3_K ? 2 : 4; }
static constexpr __host__ __device__ int high_bits(enum format f) { return f == Q6_K ? 2 : f == Q5_0 || f == Q5_1 || f == Q5_K || f == Q3_K ? 1 : 0; }
static constexpr __host__ __device__ bool is_quantized(enum format f) { return f != F32 && f != F16 && f != BF16; }
static constexpr __host__ __device__ bool is_k(enum format f) { return f == Q2_K || f == Q3_K || f == Q4_K || f == Q5_K || f == Q6_K; }
static constexpr __host__ __device__ bool has_min(enum format f) { return f == Q4_1 || f == Q5_1 || f == Q2_K || f == Q4_K || f == Q5_K; }
static constexpr __host__ __device__ int group_of(enum format f) { return f == Q2_K || f == Q3_K || f == Q6_K ? 16 : 32; }
static constexpr __host__ __device__ int zero_of(enum format f) { return f == Q4_0 ? 8 : f == Q5_0 ? 16 : f == Q3_K ? 4 : f == Q6_K ? 32 : 0; }

// 16-byte words of a chunk, and 4-byte words of a row's scales in a chunk: half floats, or (K formats) the two of the block of
// 256 and then a byte for each group's scale and each group's minimum.
static constexpr __host__ __device__ int chunk_words(enum format f) {
    return f == F32 ? 1024 : is_quantized(f) ? 32 * (low_bits(f) + high_bits(f)) : 512;
}
static constexpr __host__ __device__ int scale_words(enum format f) {
    return !is_quantized(f) ? 0 : is_k(f) ? 1 + CHUNK / group_of(f) / 4 * (has_min(f) ? 2 : 1) : has_min(f) ? 8 : 4;
}

// Blocks whose weights are loaded together: more where a warp has one tile of rows and few columns, since then loads in flight
// are what counts, and registers are left.
static constexpr __host__ __device__ int blocks_at_once(enum format f, int r, int c) {
    const int n = !is_quantized(f) ? 1 : f == Q8_0 ? 2 : 4;
    return r * c > 1 ? n : n == 1 ? 4 : 8;
}

struct weights {            // a matrix on the device
    const uint4 *data;      // [n_tiles][n_chunks][chunk_words]
    const unsigned *scales; // [n_tiles][n_chunks][scale_words][16 rows]
    int rows, n_chunks;
    enum format format;
};

// Slices of a row: at most MAX_SLICES, of so many chunks each. They depend on nothing but the row's length.
static __host__ __device__ inline int slice_chunks(int n_chunks) { return (n_chunks + MAX_SLICES - 1) / MAX_SLICES; }
static __host__ __device__ inline int slice_count(int n_chunks) { return (n_chunks + slice_chunks(n_chunks) - 1) / slice_chunks(n_chunks); }

// ---- Filling it, on the host ----


// Where a byte q of row r (0 to 15) and column k (of the chunk) stands. Lane = 4 (r % 8) + q-th four of the half block; its words
// are numbered e = 4 block + 2 (r / 8) + half, and byte i of word e has k % 4 = i.
static void place_q(uint8_t *chunk, enum format f, int r, int k, int q) {
    const int lane = r % 8 * 4 + k % 16 / 4, e = k / 32 * 4 + r / 8 * 2 + k % 32 / 16, i = k % 4;
    const int low = low_bits(f), high = high_bits(f);
    const auto put = [&](uint8_t *plane, int bits, int value) {  // 8 / bits words share one
        const int word = e * bits / 8, shift = e % (8 / bits) * bits;
        plane[(word / 4 * 32 + lane) * 16 + word % 4 * 4 + i] |= (uint8_t)(value << shift);
    };
    put(chunk, low, q & ((1 << low) - 1));
    if (high) put(chunk + 32 * low * 16, high, q >> low);
}

static unsigned load_half_bits(const uint8_t *p) { return (unsigned)(p[0] | p[1] << 8); }

static float half_to_float(unsigned h) {
    const int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
    const double v = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return (float)(h & 0x8000 ? -v : v);
}

// The words of scales of one row in one chunk, from the file's block and what it was decoded to.
static void place_scales(unsigned *to, enum format f, int row, const uint8_t *block, int n_blocks, const float *scale, const float *min) {
    uint8_t bytes[4 * 16] = {0};
    static const int halves_at[N_FORMATS][2] = {{}, {}, {}, {0, 0}, {0, 0}, {0, 2}, {0, 0}, {0, 2}, {80, 82}, {108, 108}, {0, 2}, {0, 2}, {208, 208}};
    if (!is_k(f)) {         // n_blocks blocks of 32
        const int block_bytes = f == Q8_0 ? 34 : f == Q4_0 ? 18 : f == Q4_1 ? 20 : f == Q5_0 ? 22 : 24;
        for (int b = 0; b < n_blocks; b++, block += block_bytes) {
            memcpy(bytes + 2 * b, block + halves_at[f][0], 2);
            if (has_min(f)) memcpy(bytes + 16 + 2 * b, block + halves_at[f][1], 2);
        }
    } else {
        const int groups = CHUNK / group_of(f);
        const float d = half_to_float(load_half_bits(block + halves_at[f][0])), m = half_to_float(load_half_bits(block + halves_at[f][1]));
        memcpy(bytes, block + halves_at[f][0], 2);
        memcpy(bytes + 2, block + halves_at[f][1], 2);
        for (int g = 0; g < groups; g++) {  // both products were exact, and so are these quotients
            bytes[4 + g] = (uint8_t)(d != 0 ? lrintf(scale[g] / d) : 0);
            if (has_min(f)) bytes[4 + groups + g] = (uint8_t)(m != 0 ? lrintf(-min[g] / m) : 0);
        }
    }
    for (int w = 0; w < scale_words(f); w++) memcpy(&to[w * TILE + row], bytes + 4 * w, 4);
}

// A tile of 16 rows from the file's matrix to the device's layout; data and scales are zeroed.
static void fill_tile(const struct matrix *m, enum format f, int tile, int n_chunks, uint8_t *data, unsigned *scales, unpack_row *unpack) {
    const size_t chunk_bytes = (size_t)chunk_words(f) * 16;
    const int group = group_of(f);
    std::vector<int8_t> q(is_quantized(f) ? (size_t)m->cols : 0);
    std::vector<float> scale(q.size() / group), min(q.size() / group);
    for (int r = 0; r < TILE && tile * TILE + r < m->rows; r++) {
        const uint8_t *row = m->data + (size_t)(tile * TILE + r) * m->row_bytes;
        if (is_quantized(f)) unpack(f, row, m->cols, q.data(), scale.data(), min.data());
        const int run = is_quantized(f) ? 1 : f == F32 ? 4 : 8;  // columns that stay side by side
        for (int k = 0; k < m->cols; k += run) {
            uint8_t *chunk = data + (size_t)(k / CHUNK) * chunk_bytes;
            const int c = k % CHUNK, n = m->cols - k < run ? m->cols - k : run;
            if (is_quantized(f)) {
                place_q(chunk, f, r, c, f == Q8_0 ? (uint8_t)q[k] : q[k]);
            } else if (m->format == BF16 && f == F32) {  // a bf16 is the upper half of a float
                for (int i = 0; i < n; i++) memcpy(chunk + (c / 4 * TILE + r) * 16 + 4 * i + 2, row + 2 * (size_t)(k + i), 2);
            } else if (f == F32) {
                memcpy(chunk + (c / 4 * TILE + r) * 16, row + 4 * (size_t)k, 4 * (size_t)n);
            } else {
                memcpy(chunk + ((c / 32 * 2 + r / 8) * 32 + r % 8 * 4 + c % 32 / 8) * 16, row + 2 * (size_t)k, 2 * (size_t)n);
            }
        }
        for (int c = 0; c < n_chunks && is_quantized(f); c++) {
            const int blocks = (m->cols - c * CHUNK < CHUNK ? m->cols - c * CHUNK : CHUNK) / BLOCK;
            const uint8_t *block = row + m->row_bytes * (size_t)c * CHUNK / (size_t)m->cols;
            const size_t g = (size_t)c * CHUNK / (size_t)group;
            place_scales(scales + (size_t)c * scale_words(f) * TILE, f, r, block, blocks, scale.data() + g, min.data() + g);
        }
    }
}

// ====================================================================================================================
// Fragments: what a lane holds of weights and activations for a product of 16 rows, 8 columns and a block of 32.
// Lane = 4 g + q. Of the weights it holds rows g and g + 8, of the activations column g, of the result rows g and g + 8 in
// columns 2 q and 2 q + 1. Which places of k a lane takes is free as long as both sides agree: 8 q to 8 q + 7 of F16 and
// BF16, so that it reads 16 bytes; 4 q to 4 q + 3 in each half of a block of bytes.
// ====================================================================================================================

#ifndef CUDA_EMULATION
// d += a * b, m16n8k16. The emulation brings its own.
DEVICE void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

DEVICE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800    // on Turing BF16 weights are uploaded as F32
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_s8(int d[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b));
#else
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(b));
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[2]), "+r"(d[3]) : "r"(a1), "r"(b));
#endif
}
#endif

DEVICE float half_at(unsigned word, int upper) {
    __half2 h;
    memcpy(&h, &word, 4);
    const float2 f = __half22float2(h);
    return upper ? f.y : f.x;
}

template <enum format F> DEVICE uint32_t pack_pair(float a, float b) {
    uint32_t word;
    if constexpr (F == F16) {
        const __half2 h = __floats2half2_rn(a, b);
        memcpy(&word, &h, 4);
    } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
        memcpy(&word, &h, 4);
    }
    return word;
}

template <enum format F> DEVICE float2 unpack_pair(uint32_t word) {
    if constexpr (F == F16) {
        __half2 h;
        memcpy(&h, &word, 4);
        return __half22float2(h);
    } else {
        __nv_bfloat162 h;
        memcpy(&h, &word, 4);
        return __bfloat1622float2(h);
    }
}

// COUNT words (2, or a multiple of 4) of a plane, for the block b of the chunk and on. lane: the plane's first word for this lane.
template <int COUNT, int BITS> DEVICE void load_plane(const uint4 *lane, int b, uint32_t *words) {
    if constexpr (COUNT == 2) {
        const uint2 two = ((const uint2 *)(lane + b * BITS / 8 * 32))[b * BITS / 4 % 2];
        words[0] = two.x, words[1] = two.y;
    }
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
        const uint4 four = lane[(b * BITS / 8 + i) * 32];
        words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
}

// Weights of N blocks of one tile, as loaded: all loads are under way before the first is used.
template <enum format F, int N> struct loaded {
    static constexpr int low = is_quantized(F) ? low_bits(F) * N / 2 : 8 * N, high = is_quantized(F) ? high_bits(F) * N / 2 : 0;
    uint32_t words[low + high];

    // chunk: the tile's first word for this lane; b: the first block, a multiple of N
    __device__ __forceinline__ void load(const uint4 *chunk, int b) {
        load_plane<low, is_quantized(F) ? low_bits(F) : 16>(chunk, b, words);
        if constexpr (high > 0) load_plane<high, high_bits(F)>(chunk + 32 * low_bits(F), b, words + low);
    }

    // Four q of the i-th block, row g + 8 r, half h of the block, less their zero.
    __device__ __forceinline__ uint32_t q(int i, int r, int h) const {
        constexpr int lb = low_bits(F), hb = high_bits(F);
        const int e = 4 * i + 2 * r + h;
        if constexpr (lb == 8) return words[e];
        uint32_t v = words[e * lb / 8] >> e % (8 / lb) * lb & (lb == 4 ? 0x0f0f0f0fu : 0x03030303u);
        if constexpr (hb > 0) v |= (words[low + e * hb / 8] >> e % (8 / hb) * hb & (hb == 2 ? 0x03030303u : 0x01010101u)) << lb;
        return zero_of(F) ? __vsub4(v, (unsigned)zero_of(F) * 0x01010101u) : v;
    }
};

// Scales and minima of N blocks of one row, loaded as whole words.
template <enum format F, int N> struct group_scales {
    static constexpr int per_word = !is_k(F) ? 2 : group_of(F) == 16 ? 2 : 4;  // blocks
    static constexpr int n = N > per_word ? N / per_word : 1;
    unsigned super, scale_words[n], min_words[n];

    // row: the chunk's words, moved to the row; b: the first block, a multiple of N
    __device__ __forceinline__ void load(const unsigned *row, int b) {
        const unsigned *first = row + ((is_k(F) ? 1 : 0) + b / per_word) * TILE;
        if constexpr (is_k(F)) super = row[0];
#pragma unroll
        for (int i = 0; i < n; i++) scale_words[i] = first[i * TILE];
#pragma unroll
        for (int i = 0; i < n && has_min(F); i++) min_words[i] = first[(BLOCKS / per_word + i) * TILE];
    }

    __device__ __forceinline__ float one(const unsigned *words, int upper, int i, int h) const {
        if constexpr (!is_k(F)) return half_at(words[i / 2], i % 2);
        const int g = group_of(F) == 16 ? 2 * i + h : i;
        // Without minima both halves are the scale's, and both are used: a load of one half alone would be a narrow one.
        return half_at(super, has_min(F) ? upper : h) * (float)(int8_t)(words[g / 4] >> g % 4 * 8);
    }

    // Of the i-th block and, in formats with groups of 16, its half h.
    __device__ __forceinline__ float scale(int i, int h) const { return one(scale_words, 0, i, h); }
    __device__ __forceinline__ float min(int i, int h) const { return is_k(F) ? -one(min_words, 1, i, h) : one(min_words, 0, i, h); }
};

// A column's block of activations as the product takes it, and what the result is multiplied by.
template <enum format F> struct column_block {
    uint32_t b[is_quantized(F) ? 2 : 8];  // bytes of both halves; or pairs: high parts [4], low parts [4]
    float scale[2];         // of columns 2 q and 2 q + 1
    float sum[2][2];        // [half][column] scale * sum of the bytes, for minima
};

// The largest magnitude of a block, as bits: those of a NaN are larger than those of infinity, and so it is not lost.
DEVICE unsigned block_max(const float v[8]) {
    unsigned max_bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) max_bits = max(max_bits, __float_as_uint(v[i]) & 0x7fffffffu);
    max_bits = max(max_bits, __shfl_xor_sync(WHOLE_WARP, max_bits, 1));
    return max(max_bits, __shfl_xor_sync(WHOLE_WARP, max_bits, 2));
}

// A value that the four lanes of column g share, of columns 2 q and 2 q + 1.
DEVICE void of_own_columns(float v, float own[2]) {
    const int q = threadIdx.x % 4;
    own[0] = __shfl_sync(WHOLE_WARP, v, 8 * q);
    own[1] = __shfl_sync(WHOLE_WARP, v, 8 * q + 4);
}

// q = round(x / scale), scale = max|x| / 127, as the CPU does it.
template <enum format F> DEVICE void make_bytes(const float v[8], column_block<F> *c) {
    const float largest = __uint_as_float(block_max(v)), scale = largest / 127.0f;
    const float inverse = largest > 1e-30f && largest < 1e30f ? 127.0f / largest : 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        c->b[h] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) c->b[h] |= ((unsigned)__float2int_rn(v[4 * h + i] * inverse) & 255u) << 8 * i;
    }
    of_own_columns(scale, c->scale);
    if constexpr (has_min(F)) {
        int sums[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int s = __dp4a((int)c->b[h], 0x01010101, 0);
            s += __shfl_xor_sync(WHOLE_WARP, s, 1);
            sums[h] = s + __shfl_xor_sync(WHOLE_WARP, s, 2);
        }
        if (group_of(F) == 32) sums[0] += sums[1];
        of_own_columns(scale * (float)sums[0], c->sum[0]);
        if (group_of(F) == 16) of_own_columns(scale * (float)sums[1], c->sum[1]);
    }
}

// x = 2^e * (high + low): a power of two brings the block's largest to between 1 and 2, so that neither part leaves the
// range of its type. Blocks of denormals count as zero; infinities and NaN reach the result through the scale.
template <enum format F> DEVICE void make_pairs(const float v[8], column_block<F> *c) {
    const unsigned bits = block_max(v), exponent = bits >> 23;
    const bool finite = exponent < 254;
    const float inverse = exponent > 0 && finite ? __uint_as_float((254 - exponent) << 23) : 0.0f;
    of_own_columns(finite ? __uint_as_float(exponent << 23) : __uint_as_float(0x7fc00000), c->scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = v[2 * i] * inverse, b = v[2 * i + 1] * inverse;
        c->b[i] = pack_pair<F>(a, b);
        const float2 high = unpack_pair<F>(c->b[i]);
        c->b[4 + i] = pack_pair<F>(a - high.x, b - high.y);
    }
}

// Rows g and g + 8 of a tile, N blocks of them.
template <enum format F, int N> struct fragment {
    loaded<F, N> weights;
    group_scales<F, N> scales[2];  // not loaded, and so not there, for floats
};

// sum += the i-th loaded block of a tile's rows times a column block.
template <enum format F, int N> DEVICE void multiply(const fragment<F, N> &w, int n, const column_block<F> &c, float sum[4]) {
    if constexpr (is_quantized(F)) {
        int dot[4] = {0, 0, 0, 0};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            mma_s8(dot, w.weights.q(n, 0, h), w.weights.q(n, 1, h), c.b[h]);
            if (group_of(F) == 32 && h == 0) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const group_scales<F, N> &row = w.scales[i / 2];
                sum[i] = fmaf(row.scale(n, h) * c.scale[i % 2], (float)dot[i], sum[i]);
                if constexpr (has_min(F)) sum[i] = fmaf(row.min(n, h), c.sum[group_of(F) == 16 ? h : 0][i % 2], sum[i]);
                dot[i] = 0;
            }
        }
    } else {
        float dot[4] = {0, 0, 0, 0};
#pragma unroll
        for (int step = 0; step < 2; step++) {
            const uint32_t *at = w.weights.words + 8 * n + 2 * step, a[4] = {at[0], at[4], at[1], at[5]};
            if constexpr (F == F16) {
                mma_f16(dot, a, c.b + 2 * step);
                mma_f16(dot, a, c.b + 4 + 2 * step);
            } else {
                mma_bf16(dot, a, c.b + 2 * step);
                mma_bf16(dot, a, c.b + 4 + 2 * step);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(c.scale[i % 2], dot[i], sum[i]);
    }
}

// ====================================================================================================================
// Product: y = w x for the columns of x, which are tokens.
// The two kernels below differ in who does what, never in what is computed: product_split has a warp for each slice of 16 rows
// and few columns, and what follows a product in a layer while decoding; product_tiles has many columns, and its warps take
// slices one after the other.
// ====================================================================================================================

struct input {              // of a product
    const float *x;         // [n][ld], what pads a row to whole chunks is zero
    const int *rows;        // [n] numbers of its rows; NULL: 0, 1, 2 ...
    const float *norm;      // [whole chunks] weight of an RMS norm over x; NULL: there is none
    int n, ld, n_normed;    // columns; floats of a row that the norm counts
    float eps;
};

DEVICE const float *input_row(const input &in, int column) {
    return in.x + (size_t)(in.rows ? in.rows[column] : column) * (size_t)in.ld;
}

DEVICE float4 load4(const float *p) { return *(const float4 *)p; }

DEVICE float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

DEVICE float dot4(float4 a, float4 b, float sum) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum)))); }

// One slice of R tiles and C times 8 columns: sums [R][C][4] as a lane holds them, and the sums of squares of its own columns.
template <int R, int C> struct sums {
    float v[R][C][4];
    float squares[C][2];
};

// F32: a lane reads its own two columns, and rows g and g + 8.
template <int R, int C>
DEVICE void slice_of_floats(const weights &w, const input &in, const int tile[R], int column0, int chunk0, int chunk1, sums<R, C> *s) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    for (int chunk = chunk0; chunk < chunk1; chunk++)
#pragma unroll 1
        for (int k = 0; k < CHUNK; k += 4) {
            float4 x[C][2];
#pragma unroll
            for (int i = 0; i < 2 * C; i++) {
                const int column = column0 + i / 2 * 8 + 2 * q + i % 2;
                float4 v = make_float4(0, 0, 0, 0);
                if (column < in.n) v = load4(input_row(in, column) + chunk * CHUNK + k);
                s->squares[i / 2][i % 2] = dot4(v, v, s->squares[i / 2][i % 2]);
                x[i / 2][i % 2] = in.norm ? times(v, load4(in.norm + chunk * CHUNK + k)) : v;
            }
#pragma unroll
            for (int i = 0; i < 2 * R; i++) {
                const uint4 bits = w.data[((size_t)tile[i / 2] * w.n_chunks + chunk) * chunk_words(F32) + k / 4 * TILE + g + i % 2 * 8];
                const float4 a = make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w));
#pragma unroll
                for (int j = 0; j < 2 * C; j++) {
                    float *sum = &s->v[i / 2][j / 2][i % 2 * 2 + j % 2];
                    *sum = dot4(a, x[j / 2][j % 2], *sum);
                }
            }
        }
}

template <enum format F, int R, int C>
DEVICE void slice(const weights &w, const input &in, const int tile[R], int column0, int chunk0, int chunk1, sums<R, C> *s) {
    constexpr int N = blocks_at_once(F, R, C);
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    const int near = is_quantized(F) ? 4 * q : 8 * q, far = near + (is_quantized(F) ? 16 : 4);  // where its two fours of a block stand
    float squares[C];
#pragma unroll
    for (int c = 0; c < C; c++) squares[c] = 0;
    for (int chunk = chunk0; chunk < chunk1; chunk++)
#pragma unroll 1
        for (int b0 = 0; b0 < BLOCKS; b0 += N) {
            fragment<F, N> a[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                const size_t at = (size_t)tile[r] * w.n_chunks + chunk;
                a[r].weights.load(w.data + at * chunk_words(F) + lane, b0);
#pragma unroll
                for (int i = 0; i < 2 && is_quantized(F); i++) a[r].scales[i].load(w.scales + at * scale_words(F) * TILE + g + 8 * i, b0);
            }
#pragma unroll
            for (int i = 0; i < N * C; i++) {
                const int b = b0 + i / C, c = i % C, k = chunk * CHUNK + b * BLOCK, column = column0 + 8 * c + g;
                float4 v[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
                if (column < in.n) {
                    const float *x = input_row(in, column) + k;
                    v[0] = load4(x + near);
                    v[1] = load4(x + far);
                }
                squares[c] = dot4(v[1], v[1], dot4(v[0], v[0], squares[c]));
                if (in.norm) {
                    v[0] = times(v[0], load4(in.norm + k + near));
                    v[1] = times(v[1], load4(in.norm + k + far));
                }
                const float x[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
                column_block<F> block;
                if constexpr (is_quantized(F)) make_bytes<F>(x, &block);
                else make_pairs<F>(x, &block);
#pragma unroll
                for (int r = 0; r < R; r++) multiply<F, N>(a[r], i / C, block, s->v[r][c]);
            }
        }
#pragma unroll
    for (int c = 0; c < C; c++) {
        squares[c] += __shfl_xor_sync(WHOLE_WARP, squares[c], 1);
        squares[c] += __shfl_xor_sync(WHOLE_WARP, squares[c], 2);
        of_own_columns(squares[c], s->squares[c]);
    }
}

template <enum format F, int R, int C>
DEVICE void slice_sums(const weights &w, const input &in, const int tile[R], int column0, int chunk0, int chunk1, sums<R, C> *s) {
#pragma unroll
    for (int i = 0; i < R * C * 4; i++) s->v[i / (4 * C)][i / 4 % C][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < C * 2; i++) s->squares[i / 2][i % 2] = 0;
    if constexpr (F == F32) slice_of_floats<R, C>(w, in, tile, column0, chunk0, chunk1, s);
    else slice<F, R, C>(w, in, tile, column0, chunk0, chunk1, s);
}

// RMSNorm after the product: its weight was multiplied before, and 1 / rms is a factor of the whole column.
DEVICE float norm_factor(const input &in, float squares) { return in.norm ? 1.0f / sqrtf(squares / (float)in.n_normed + in.eps) : 1.0f; }

// ---- What follows a product while every sequence decodes one token ----

DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

struct conv {               // of a layer
    const float *w, *b;     // [d_conv][ld], [ld]
    float *state;           // of slot 0: [d_conv-1][ld], the oldest first
    size_t slot_floats;     // from one slot's state to the next
    int d_conv, n, ld;      // n channels
};

struct scan {               // of a layer
    const float *a2;        // [ld/16][d_state][16]: A * log2(e)
    const float *d, *dt_b;  // [ld]
    float *state;           // of slot 0: [ld/16][d_state][16]
    const float *u, *z;     // [tokens][ld_u], [tokens][ld_z]
    const float *bc;        // [tokens][ld_bc]: B [d_state], C [d_state]
    float *y;               // [tokens][ld_u]
    size_t slot_floats;
    int d_state, n, ld_u, ld_z, ld_bc;
};

// out = silu(b + sum over taps of w[tap] * input), in tap order; the state moves on by one.
DEVICE float conv_token(const conv &c, int slot, int channel, float now) {
    float *state = c.state + (size_t)slot * c.slot_floats + channel, sum = c.b[channel];
    for (int i = 0; i < c.d_conv - 1; i++) {
        sum = fmaf(c.w[(size_t)i * c.ld + channel], state[(size_t)i * c.ld], sum);
        state[(size_t)i * c.ld] = i + 2 < c.d_conv ? state[(size_t)(i + 1) * c.ld] : now;
    }
    return silu(fmaf(c.w[(size_t)(c.d_conv - 1) * c.ld + channel], now, sum));
}

// One state of one channel (equation 2a with the discretisation of section 3.6, and 2b):
//   h = exp(dt * A) * h + dt * B * u        y += C * h
DEVICE float scan_state(float h, float dt, float dt_u, float a2, float b, float c, float *y) {
    h = fmaf(exp2f(dt * a2), h, dt_u * b);
    *y = fmaf(c, h, *y);
    return h;
}

// Lanes that share a channel: lane j has the states n = j, j + lanes, j + 2 lanes ..., at most 16 of them.
static __host__ __device__ inline int scan_lanes(int d_state) { return d_state <= 64 ? 4 : 16; }

// What the lanes add to y is summed as a tree. Then skip and gate.
DEVICE float scan_output(int lanes, float part, float d, float u, float z) {
    for (int distance = 1; distance < lanes; distance *= 2) part += __shfl_xor_sync(WHOLE_WARP, part, distance);
    return fmaf(d, u, part) * silu(z);
}

// What lane j adds to y for one token of a channel; the state is in memory.
DEVICE float scan_part(const scan &s, int slot, int token, int channel, int j, float dt_low) {
    const size_t at = (size_t)(channel / 16) * s.d_state * 16 + channel % 16;
    const float *bc = s.bc + (size_t)token * s.ld_bc, u = s.u[(size_t)token * s.ld_u + channel];
    float *state = s.state + (size_t)slot * s.slot_floats + at, part = 0;
    const float dt = softplus(dt_low + s.dt_b[channel]);
    for (int n = j; n < s.d_state; n += scan_lanes(s.d_state))
        state[16 * n] = scan_state(state[16 * n], dt, dt * u, s.a2[at + 16 * n], bc[n], bc[s.d_state + n], &part);
    return part;
}

enum epilogue { STORE, ADD, CONV, SCAN };

struct output {             // of a product, and what follows it
    epilogue kind;
    float *y;               // [n][ld_y] rows below `split`; ADD adds to it; CONV: u, the convolution's output
    float *y2;              // [n][ld_y2] the others
    int split, ld_y, ld_y2;
    const int *slots;       // [n] of each column's sequence
    conv c;
    scan s;
};

DEVICE void store(const output &out, int row, int column, float v) {
    if (row >= out.split) {
        out.y2[(size_t)column * out.ld_y2 + row - out.split] = v;
        return;
    }
    float *y = &out.y[(size_t)column * out.ld_y + row];
    *y = out.kind == ADD ? *y + v : v;
}

// Block: 32 threads for each warp; blockIdx.x: 8 C columns, blockIdx.y: tile of rows. Warps beyond the slices help at the end.
// Shared: parts [slices][8 C columns][TILE rows], squares [slices][8 C].
template <enum format F, int C> __global__ void __launch_bounds__(256, 1) product_split(const weights w, const input in, const output out) {
    constexpr int COLUMNS = 8 * C;
    DYNAMIC_SHARED(float, parts);
    const int n_slices = slice_count(w.n_chunks), per = slice_chunks(w.n_chunks), warp = threadIdx.y;
    const int tile[1] = {(int)blockIdx.y}, column0 = (int)blockIdx.x * COLUMNS;
    float *squares = parts + n_slices * COLUMNS * TILE;
    if (warp < n_slices) {
        const int g = threadIdx.x / 4, q = threadIdx.x % 4;
        sums<1, C> s;
        slice_sums<F, 1, C>(w, in, tile, column0, warp * per, min((warp + 1) * per, w.n_chunks), &s);
#pragma unroll
        for (int i = 0; i < C * 4; i++) {
            const int column = i / 4 * 8 + 2 * q + i % 2, row = g + i % 4 / 2 * 8;
            parts[(warp * COLUMNS + column) * TILE + row] = s.v[0][i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < C * 2; i++)
            if (g == 0) squares[warp * COLUMNS + i / 2 * 8 + 2 * q + i % 2] = s.squares[i / 2][i % 2];
    }
    __syncthreads();
    // An output a thread, or (SCAN) several: lanes of one output are neighbours, then come the rows of a column.
    const int n_threads = (int)blockDim.y * 32, share = out.kind == SCAN ? scan_lanes(out.s.d_state) : 1;
    for (int first = 0; first < COLUMNS * TILE * share; first += n_threads) {
        const int i = (first + warp * 32 + (int)threadIdx.x) / share, row = (int)blockIdx.y * TILE + i % TILE, column = column0 + i / TILE;
        const bool exists = i < COLUMNS * TILE && row < w.rows && column < in.n;
        float v = 0, square = 0;
        for (int s = 0; s < n_slices && exists; s++) {
            v += parts[s * COLUMNS * TILE + i];
            square += squares[s * COLUMNS + i / TILE];
        }
        v *= norm_factor(in, square);
        if (out.kind == SCAN) {  // all lanes shuffle, also those without an output
            const int j = (int)threadIdx.x % share;
            const float y = exists ? scan_part(out.s, out.slots[column], column, row, j, v) : 0.0f;
            const float sum = scan_output(share, y, exists ? out.s.d[row] : 0.0f, exists ? out.s.u[(size_t)column * out.s.ld_u + row] : 0.0f,
                                          exists ? out.s.z[(size_t)column * out.s.ld_z + row] : 0.0f);
            if (exists && j == 0) out.s.y[(size_t)column * out.s.ld_u + row] = sum;
        } else if (exists && out.kind == CONV && row < out.split) {
            out.y[(size_t)column * out.ld_y + row] = conv_token(out.c, out.slots[column], row, v);
        } else if (exists) {
            store(out, row, column, v);
        }
    }
}

// Warps of a block: 2 of rows by 4 of columns. A warp has R tiles, as many as registers are there for, and C times 8 columns.
enum { TILES_WARPS = 8, TILES_C = 2, TILES_COLUMNS = 4 * TILES_C * 8 };
static constexpr __host__ __device__ int tiles_r(enum format f) { return f == F16 || f == BF16 || f == Q8_0 || f == Q4_0 ? 4 : 2; }

template <enum format F> __global__ void __launch_bounds__(256, 1) product_tiles(const weights w, const input in, const output out) {
    constexpr int R = tiles_r(F), C = TILES_C;
    const int n_slices = slice_count(w.n_chunks), per = slice_chunks(w.n_chunks), n_tiles = (w.rows + TILE - 1) / TILE;
    const int warp = threadIdx.y, g = threadIdx.x / 4, q = threadIdx.x % 4;
    const int tile0 = ((int)blockIdx.y * 2 + warp % 2) * R, column0 = ((int)blockIdx.x * 4 + warp / 2) * 8 * C;
    if (tile0 >= n_tiles || column0 >= in.n) return;
    int tile[R];
#pragma unroll
    for (int r = 0; r < R; r++) tile[r] = min(tile0 + r, n_tiles - 1);  // behind the last one: computed, not stored
    sums<R, C> total = {};
    for (int s = 0; s < n_slices; s++) {
        sums<R, C> part;
        slice_sums<F, R, C>(w, in, tile, column0, s * per, min((s + 1) * per, w.n_chunks), &part);
#pragma unroll
        for (int i = 0; i < R * C * 4; i++) total.v[i / (4 * C)][i / 4 % C][i % 4] += part.v[i / (4 * C)][i / 4 % C][i % 4];
#pragma unroll
        for (int i = 0; i < C * 2; i++) total.squares[i / 2][i % 2] += part.squares[i / 2][i % 2];
    }
#pragma unroll
    for (int i = 0; i < R * C * 4; i++) {
        const int r = i / (4 * C), c = i / 4 % C, column = column0 + 8 * c + 2 * q + i % 2;
        const int row = (tile0 + r) * TILE + g + i % 4 / 2 * 8;
        if (row < w.rows && column < in.n)
            store(out, row, column, total.v[r][c][i % 4] * norm_factor(in, total.squares[c][i % 2]));
    }
}

// ====================================================================================================================
// The rest of a layer, for prompts.
// ====================================================================================================================

struct span {               // the new tokens of one sequence
    int slot, token0, n;
};

// u = silu(convolution of x), a thread for each channel and token. x [tokens][ld], the products of in_proj. Does not move the
// state, which the first tokens of every span read: conv_state does.
__global__ void __launch_bounds__(128) conv_tokens(const conv c, const float *x, const int *slots, const int *positions, float *u, int ld) {
    const int channel = (int)(blockIdx.x * 128 + threadIdx.x), token = (int)blockIdx.y, position = positions[token];
    if (channel >= c.n) return;
    const float *state = c.state + (size_t)slots[token] * c.slot_floats + channel, *now = x + (size_t)token * ld + channel;
    float sum = c.b[channel];
    for (int i = 0; i < c.d_conv; i++) {
        const int back = c.d_conv - 1 - i;  // tokens
        const float v = back <= position ? now[-(ptrdiff_t)back * ld] : state[(size_t)(position + i) * c.ld];
        sum = fmaf(c.w[(size_t)i * c.ld + channel], v, sum);
    }
    u[(size_t)token * ld + channel] = silu(sum);
}

// The last inputs of each span become the state, in rising order: what is read later is not written before.
__global__ void __launch_bounds__(128) conv_state(const conv c, const float *x, const span *spans, int ld) {
    const int channel = (int)(blockIdx.x * 128 + threadIdx.x);
    const span s = spans[blockIdx.y];
    if (channel >= c.n) return;
    float *state = c.state + (size_t)s.slot * c.slot_floats + channel;
    for (int i = 0; i < c.d_conv - 1; i++) {
        const int t = s.n - (c.d_conv - 1) + i;
        state[(size_t)i * c.ld] = t >= 0 ? x[(size_t)(s.token0 + t) * ld + channel] : state[(size_t)(s.n + i) * c.ld];
    }
}

// The selective scan over the tokens of each span: LANES lanes a channel, each with its states in registers. Time stays in
// order, so that cuts of a prompt do not change a bit. dt_low [tokens][ld_u]: the products of dt_proj.
template <int PER_LANE, int LANES> __global__ void __launch_bounds__(128, 1) scan_tokens(const scan s, const float *dt_low, const span *spans) {
    const int j = (int)threadIdx.x % LANES, number = (int)(blockIdx.x * 128 + threadIdx.x) / LANES;
    const int channel = min(number, s.n - 1);  // lanes behind the last channel shuffle like the others, and touch no state
    const span sp = spans[blockIdx.y];
    const size_t at = (size_t)(channel / 16) * s.d_state * 16 + channel % 16;
    float *state = s.state + (size_t)sp.slot * s.slot_floats + at, h[PER_LANE];
    const float d = s.d[channel], dt_b = s.dt_b[channel];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) h[i] = number < s.n && LANES * i + j < s.d_state ? state[16 * (LANES * i + j)] : 0.0f;
    for (int token = sp.token0; token < sp.token0 + sp.n; token++) {
        const float *bc = s.bc + (size_t)token * s.ld_bc;
        const float u = s.u[(size_t)token * s.ld_u + channel], z = s.z[(size_t)token * s.ld_z + channel];
        const float dt = softplus(dt_low[(size_t)token * s.ld_u + channel] + dt_b);
        float part = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int n = LANES * i + j;
            if (n < s.d_state) h[i] = scan_state(h[i], dt, dt * u, s.a2[at + 16 * n], bc[n], bc[s.d_state + n], &part);
        }
        const float y = scan_output(LANES, part, d, u, z);
        if (number < s.n && j == 0) s.y[(size_t)token * s.ld_u + channel] = y;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (number < s.n && LANES * i + j < s.d_state) state[16 * (LANES * i + j)] = h[i];
    }
}

// ====================================================================================================================
// Norms that stand alone, a warp for each row: the final one, and (without weight) FalconMamba's of dt, B and C.
// ====================================================================================================================

DEVICE void norm_row(const float *x, const float *w, float *y, int n, float eps) {
    float squares = 0;
    for (int k = (int)threadIdx.x; k < n; k += 32) squares = fmaf(x[k], x[k], squares);
    for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(WHOLE_WARP, squares, distance);
    const float r = 1.0f / sqrtf(squares / (float)n + eps);
    for (int k = (int)threadIdx.x; k < n; k += 32) y[k] = w ? x[k] * r * w[k] : x[k] * r;
}

__global__ void __launch_bounds__(32) norm_tokens(const float *x, const float *w, float *y, int n, int ld, float eps) {
    norm_row(x + (size_t)blockIdx.x * ld, w, y + (size_t)blockIdx.x * ld, n, eps);
}

// dt [tokens][ld_dt], bc [tokens][ld_bc]; blockIdx.y: 0 dt, 1 B, 2 C
__global__ void __launch_bounds__(32) norm_dt_b_c(float *dt, float *bc, int dt_rank, int d_state, int ld_dt, int ld_bc, float eps) {
    const int part = (int)blockIdx.y;
    float *row = part ? bc + (size_t)blockIdx.x * ld_bc + (part - 1) * d_state : dt + (size_t)blockIdx.x * ld_dt;
    norm_row(row, NULL, row, part ? d_state : dt_rank, eps);
}

// ---- The likeliest token of each row of logits, for greedy decoding: only a few bytes leave the GPU ----

// The better of two: the larger logit, then the smaller id; an id of -1 is none.
DEVICE bool is_better(float logit, int id, float than, int than_id) {
    return id >= 0 && (than_id < 0 || logit > than || (logit == than && id < than_id));
}

// A block a row. banned: bits of tokens that are not drawn.
__global__ void __launch_bounds__(256) choose_rows(const float *logits, const unsigned *banned, struct device_choice *choices, int n_vocab) {
    DYNAMIC_SHARED(float, parts);  // [8 warps] best, id (as bits), max, poison
    const float *row = logits + (size_t)blockIdx.x * n_vocab;
    const int warp = (int)threadIdx.x / 32;
    float best = 0, largest = row[0], poison = 0;  // poison: NaN when something is not finite
    int best_id = -1;
    for (int id = (int)threadIdx.x; id < n_vocab; id += 256) {
        const float v = row[id];
        largest = fmaxf(largest, v);
        poison = fmaf(v, 0.0f, poison);
        if (!(banned[id / 32] >> id % 32 & 1) && is_better(v, id, best, best_id)) best = v, best_id = id;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(WHOLE_WARP, best, distance);
        const int other_id = __shfl_xor_sync(WHOLE_WARP, best_id, distance);
        if (is_better(other, other_id, best, best_id)) best = other, best_id = other_id;
        largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, distance));
        poison += __shfl_xor_sync(WHOLE_WARP, poison, distance);
    }
    if (threadIdx.x % 32 == 0) {
        parts[4 * warp] = best;
        parts[4 * warp + 1] = __uint_as_float((unsigned)best_id);
        parts[4 * warp + 2] = largest;
        parts[4 * warp + 3] = poison;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < 8; w++) {
        const int id = (int)__float_as_uint(parts[4 * w + 1]);
        if (is_better(parts[4 * w], id, best, best_id)) best = parts[4 * w], best_id = id;
        largest = fmaxf(largest, parts[4 * w + 2]);
        poison += parts[4 * w + 3];
    }
    choices[blockIdx.x] = device_choice{best_id, largest + poison};
}

// ====================================================================================================================
// The device.
// ====================================================================================================================

struct device_layer {
    float *norm;            // [ld_model]
    float *conv_w, *conv_b; // [d_conv][ld_inner], [ld_inner]
    float *dt_b, *a2, *d;   // as in struct layer
    weights in, x, dt, out;
};

struct device {             // owner of all memory on the GPU, of staging and of graphs
    const struct model *m;
    struct device_shape shape;
    struct device_facts facts;
    cudaStream_t stream;
    bool no_bf16;           // Turing: such weights are uploaded as F32
    bool use_graphs;
    std::vector<device_layer> layers;
    weights head;
    float *norm;            // [ld_model]
    float *conv, *ssm;      // [slots][slot_conv], [slots][slot_ssm]: struct sequence's buffers
    size_t slot_conv, slot_ssm;  // floats
    std::vector<int> free_slots;
    int ld_model, ld_inner, ld_dt;  // of rows that products read: whole chunks
    int ld_state, ld_bc;    // d_inner padded to 16, as the CPU has it; 2 * d_state
    // [max_tokens][...], as in struct context
    float *x, *normed, *u_in, *u, *z, *dt_low, *bc, *dt, *y;
    float *logits;          // [max_rows][n_vocab]
    unsigned *banned;       // [n_vocab / 32 + 1] bits
    struct device_choice *choices, *host_choices;  // [max_rows]; the latter pinned
    int *batch;             // [max_tokens] slots, [max_tokens] positions, [max_tokens] spans, [max_rows] rows
    int *host_batch;        // pinned, and so are
    float *host_rows, *host_logits;  // [max_tokens][ld_model], [max_rows][n_vocab]
    struct graph { int n_tokens, n_rows; cudaGraphExec_t exec; };
    std::vector<graph> graphs;  // of decoding steps
    int n_tokens;           // of the last forward
    bool counting;          // memory is being counted, not taken
    size_t bytes, weight_bytes;
    std::vector<void *> memory;
};

__attribute__((format(printf, 2, 3))) static bool set_error(struct error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    return false;
}

static bool ok(cudaError_t r, const char *doing, struct error *e) {
    return r == cudaSuccess || set_error(e, "the GPU failed while %s: %s", doing, cudaGetErrorString(r));
}

// ---- Memory and upload ----

// Room for n elements, zeroed. Called twice for everything: first to count.
template <class T> static bool reserve(struct device *d, T **p, size_t n, struct error *e) {
    const size_t bytes = (n * sizeof(T) + 255) / 256 * 256;
    d->bytes += d->counting ? bytes : 0;
    if (d->counting) return true;
    if (!ok(cudaMalloc(p, n * sizeof(T)), "taking memory", e)) return false;
    d->memory.push_back(*p);
    return ok(cudaMemsetAsync(*p, 0, n * sizeof(T), d->stream), "clearing memory", e);
}

static bool upload_floats(struct device *d, float **p, const float *from, size_t n, size_t padded, struct error *e) {
    return reserve(d, p, padded, e) &&
           (d->counting || (ok(cudaMemcpyAsync(*p, from, n * sizeof(float), cudaMemcpyHostToDevice, d->stream), "uploading weights", e) &&
                            ok(cudaStreamSynchronize(d->stream), "uploading weights", e)));
}

// Tiles go through a buffer of about 16 MB, filled by all threads.
static bool upload_matrix(struct device *d, weights *w, const struct matrix *m, unpack_row *unpack, struct error *e) {
    const enum format f = m->format == BF16 && d->no_bf16 ? F32 : m->format;
    const int n_tiles = (m->rows + TILE - 1) / TILE, n_chunks = (m->cols + CHUNK - 1) / CHUNK;
    const size_t data = (size_t)n_chunks * chunk_words(f) * 16, scales = (size_t)n_chunks * scale_words(f) * TILE;  // bytes, words of a tile
    uint4 *to;
    unsigned *to_scales;
    *w = weights{NULL, NULL, m->rows, n_chunks, f};
    if (!reserve(d, &to, n_tiles * data / 16, e) || !reserve(d, &to_scales, n_tiles * scales + 1, e)) return false;
    if (d->counting) return true;
    const int at_once = (int)((16u << 20) / data) + 1;
    std::vector<uint8_t> buffer;
    std::vector<unsigned> scale_buffer;
    for (int first = 0; first < n_tiles; first += at_once) {
        const int n = n_tiles - first < at_once ? n_tiles - first : at_once;
        buffer.assign(n * data, 0);
        scale_buffer.assign(n * scales, 0);
#pragma omp parallel for schedule(dynamic)
        for (int t = 0; t < n; t++) fill_tile(m, f, first + t, n_chunks, buffer.data() + t * data, scale_buffer.data() + t * scales, unpack);
        if (!ok(cudaMemcpyAsync((uint8_t *)to + first * data, buffer.data(), n * data, cudaMemcpyHostToDevice, d->stream), "uploading weights", e) ||
            (scales && !ok(cudaMemcpyAsync(to_scales + first * scales, scale_buffer.data(), n * scales * 4, cudaMemcpyHostToDevice, d->stream),
                           "uploading weights", e)) ||
            !ok(cudaStreamSynchronize(d->stream), "uploading weights", e))
            return false;
    }
    w->data = to;
    w->scales = to_scales;
    return true;
}

static bool take_weights(struct device *d, unpack_row *unpack, struct error *e) {
    const struct model *m = d->m;
    const struct config *c = &m->c;
    const size_t inner = (size_t)d->ld_state;
    for (int i = 0; i < c->n_layer; i++) {
        const struct layer *from = &m->layers[i];
        device_layer *l = &d->layers[(size_t)i];
        if (!upload_floats(d, &l->norm, from->norm, (size_t)c->d_model, (size_t)d->ld_model, e) ||
            !upload_matrix(d, &l->in, &from->in, unpack, e) ||
            !upload_floats(d, &l->conv_w, from->conv_w, inner * (size_t)c->d_conv, inner * (size_t)c->d_conv, e) ||
            !upload_floats(d, &l->conv_b, from->conv_b, (size_t)c->d_inner, inner, e) || !upload_matrix(d, &l->x, &from->x, unpack, e) ||
            !upload_matrix(d, &l->dt, &from->dt, unpack, e) || !upload_floats(d, &l->dt_b, from->dt_b, (size_t)c->d_inner, inner, e) ||
            !upload_floats(d, &l->a2, from->a2, inner * (size_t)c->d_state, inner * (size_t)c->d_state, e) ||
            !upload_floats(d, &l->d, from->d, (size_t)c->d_inner, inner, e) || !upload_matrix(d, &l->out, &from->out, unpack, e))
            return false;
    }
    return upload_floats(d, &d->norm, m->norm, (size_t)c->d_model, (size_t)d->ld_model, e) && upload_matrix(d, &d->head, &m->head, unpack, e);
}

static bool take_buffers(struct device *d, struct error *e) {
    const size_t tokens = (size_t)d->shape.max_tokens, rows = (size_t)d->shape.max_rows, slots = (size_t)d->shape.max_sequences;
    const size_t model = tokens * (size_t)d->ld_model, inner = tokens * (size_t)d->ld_inner;
    return reserve(d, &d->conv, slots * d->slot_conv + 1, e) && reserve(d, &d->ssm, slots * d->slot_ssm, e) && reserve(d, &d->x, model, e) &&
           reserve(d, &d->normed, model, e) && reserve(d, &d->u_in, inner, e) && reserve(d, &d->u, inner, e) && reserve(d, &d->z, inner, e) &&
           reserve(d, &d->dt_low, tokens * (size_t)d->ld_dt, e) && reserve(d, &d->bc, tokens * (size_t)d->ld_bc, e) &&
           reserve(d, &d->dt, inner, e) && reserve(d, &d->y, inner, e) && reserve(d, &d->logits, rows * (size_t)d->m->c.n_vocab, e) &&
           reserve(d, &d->banned, (size_t)d->m->c.n_vocab / 32 + 1, e) && reserve(d, &d->choices, rows, e) &&
           reserve(d, &d->batch, 5 * tokens + rows, e);
}

// Counts first, so that too little memory is said before anything is uploaded.
static bool take_memory(struct device *d, unpack_row *unpack, struct error *e) {
    size_t free_bytes, total;
    d->counting = true;
    take_weights(d, unpack, e);
    d->weight_bytes = d->bytes;
    take_buffers(d, e);
    d->counting = false;
    if (!ok(cudaMemGetInfo(&free_bytes, &total), "asking for its memory", e)) return false;
    const double gb = 1e-9, spare = 64e6;  // for what the driver takes: code, graphs
    if ((double)d->bytes + spare > (double)free_bytes)
        return set_error(e, "the GPU has %.2f GB free of %.2f, and this takes %.2f (weights %.2f, states of %d sequences %.2f): "
                         "use a smaller -np or -ub, smaller weights, or --device cpu", (double)free_bytes * gb, (double)total * gb,
                         ((double)d->bytes + spare) * gb, (double)d->weight_bytes * gb, d->shape.max_sequences,
                         (double)(d->shape.max_sequences * (d->slot_conv + d->slot_ssm) * sizeof(float)) * gb);
    const size_t tokens = (size_t)d->shape.max_tokens, rows = (size_t)d->shape.max_rows;
    return take_weights(d, unpack, e) && take_buffers(d, e) &&
           ok(cudaMallocHost(&d->host_batch, (5 * tokens + rows) * sizeof(int)), "taking pinned memory", e) &&
           ok(cudaMallocHost(&d->host_choices, rows * sizeof(struct device_choice)), "taking pinned memory", e) &&
           ok(cudaMallocHost(&d->host_rows, tokens * (size_t)d->ld_model * sizeof(float)), "taking pinned memory", e) &&
           ok(cudaMallocHost(&d->host_logits, rows * (size_t)d->m->c.n_vocab * sizeof(float)), "taking pinned memory", e) &&
           ok(cudaStreamSynchronize(d->stream), "uploading weights", e);
}

// ---- Launching ----

enum { FEW_COLUMNS = 8, SPLIT_COLUMNS = 64 };  // up to so many, product_split takes 8, or 32 at once

template <enum format F> static void launch_product(struct device *d, const weights &w, const input &in, const output &out) {
    const bool fused = out.kind == CONV || out.kind == SCAN;
    const int n_tiles = (w.rows + TILE - 1) / TILE, n_slices = slice_count(w.n_chunks), columns = in.n <= FEW_COLUMNS ? 8 : 32;
    if (in.n > SPLIT_COLUMNS && !fused) {
        const dim3 grid((unsigned)((in.n + TILES_COLUMNS - 1) / TILES_COLUMNS), (unsigned)((n_tiles + 2 * tiles_r(F) - 1) / (2 * tiles_r(F))));
        LAUNCH(product_tiles<F>, grid, dim3(32, TILES_WARPS), 0, d->stream, w, in, out);
        return;
    }
    const dim3 grid((unsigned)((in.n + columns - 1) / columns), (unsigned)n_tiles), threads(32, n_slices < 4 ? 4 : (unsigned)n_slices);
    const size_t shared = (size_t)n_slices * (size_t)columns * (TILE + 1) * sizeof(float);
    if (columns == 8) LAUNCH((product_split<F, 1>), grid, threads, shared, d->stream, w, in, out);
    else LAUNCH((product_split<F, 4>), grid, threads, shared, d->stream, w, in, out);
}

static void product(struct device *d, const weights &w, const input &in, const output &out) {
    switch (w.format) {
    case F32: launch_product<F32>(d, w, in, out); break;
    case F16: launch_product<F16>(d, w, in, out); break;
    case BF16: launch_product<BF16>(d, w, in, out); break;
    case Q8_0: launch_product<Q8_0>(d, w, in, out); break;
    case Q4_0: launch_product<Q4_0>(d, w, in, out); break;
    case Q4_1: launch_product<Q4_1>(d, w, in, out); break;
    case Q5_0: launch_product<Q5_0>(d, w, in, out); break;
    case Q5_1: launch_product<Q5_1>(d, w, in, out); break;
    case Q2_K: launch_product<Q2_K>(d, w, in, out); break;
    case Q3_K: launch_product<Q3_K>(d, w, in, out); break;
    case Q4_K: launch_product<Q4_K>(d, w, in, out); break;
    case Q5_K: launch_product<Q5_K>(d, w, in, out); break;
    case Q6_K: launch_product<Q6_K>(d, w, in, out); break;
    case N_FORMATS: break;
    }
}

static const int *slots_of(const struct device *d) { return d->batch; }
static const int *positions_of(const struct device *d) { return d->batch + d->shape.max_tokens; }
static const span *spans_of(const struct device *d) { return (const span *)(d->batch + 2 * (size_t)d->shape.max_tokens); }
static const int *rows_of(const struct device *d) { return d->batch + 5 * (size_t)d->shape.max_tokens; }

static void launch_scan(struct device *d, const scan &s, int n_spans) {
    const dim3 grid((unsigned)(s.n * scan_lanes(s.d_state) + 127) / 128, (unsigned)n_spans);
    if (s.d_state <= 16) LAUNCH((scan_tokens<4, 4>), grid, dim3(128), 0, d->stream, s, d->dt, spans_of(d));
    else if (s.d_state <= 64) LAUNCH((scan_tokens<16, 4>), grid, dim3(128), 0, d->stream, s, d->dt, spans_of(d));
    else LAUNCH((scan_tokens<16, 16>), grid, dim3(128), 0, d->stream, s, d->dt, spans_of(d));
}

// x += out_proj(scan(conv(in_proj(norm(x))))); decoding: every sequence has one token
static void run_layer(struct device *d, int i, int n_tokens, int n_spans, bool decoding) {
    const struct config *c = &d->m->c;
    const device_layer *l = &d->layers[(size_t)i];
    const size_t layer = (size_t)i;
    const conv cv = {l->conv_w, l->conv_b, d->conv + layer * (size_t)(c->d_conv - 1) * (size_t)d->ld_state, d->slot_conv, c->d_conv, c->d_inner,
                     d->ld_state};
    const scan sc = {l->a2, l->d, l->dt_b, d->ssm + layer * (size_t)d->ld_state * (size_t)c->d_state, d->u, d->z, d->bc, d->y, d->slot_ssm,
                     c->d_state, c->d_inner, d->ld_inner, d->ld_inner, d->ld_bc};
    const input x = {d->x, NULL, l->norm, n_tokens, d->ld_model, c->d_model, c->norm_eps};
    const input u = {d->u, NULL, NULL, n_tokens, d->ld_inner, 0, 0}, dt_low = {d->dt_low, NULL, NULL, n_tokens, d->ld_dt, 0, 0};
    const input y = {d->y, NULL, NULL, n_tokens, d->ld_inner, 0, 0};
    const dim3 channels((unsigned)(c->d_inner + 127) / 128, (unsigned)n_tokens), of_spans(channels.x, (unsigned)n_spans);
    product(d, l->in, x, output{decoding ? CONV : STORE, decoding ? d->u : d->u_in, d->z, c->d_inner, d->ld_inner, d->ld_inner, slots_of(d), cv, sc});
    if (!decoding) {
        LAUNCH(conv_tokens, channels, dim3(128), 0, d->stream, cv, d->u_in, slots_of(d), positions_of(d), d->u, d->ld_inner);
        LAUNCH(conv_state, of_spans, dim3(128), 0, d->stream, cv, d->u_in, spans_of(d), d->ld_inner);
    }
    product(d, l->x, u, output{STORE, d->dt_low, d->bc, c->dt_rank, d->ld_dt, d->ld_bc, NULL, cv, sc});
    if (c->dt_b_c_rms)
        LAUNCH(norm_dt_b_c, dim3((unsigned)n_tokens, 3), dim3(32), 0, d->stream, d->dt_low, d->bc, c->dt_rank, c->d_state, d->ld_dt, d->ld_bc,
               c->dt_b_c_eps);
    product(d, l->dt, dt_low, output{decoding ? SCAN : STORE, d->dt, NULL, c->d_inner, d->ld_inner, 0, slots_of(d), cv, sc});
    if (!decoding) launch_scan(d, sc, n_spans);
    product(d, l->out, y, output{ADD, d->x, NULL, c->d_model, d->ld_model, 0, NULL, cv, sc});
}

static void run_head(struct device *d, int n_rows) {
    const int n_vocab = d->m->c.n_vocab;
    const input in = {d->normed, rows_of(d), NULL, n_rows, d->ld_model, 0, 0};
    product(d, d->head, in, output{STORE, d->logits, NULL, n_vocab, n_vocab, 0, NULL, {}, {}});
}

static void run_layers(struct device *d, int n_tokens, int n_spans, int n_layers, int n_rows, bool decoding) {
    for (int i = 0; i < n_layers; i++) run_layer(d, i, n_tokens, n_spans, decoding);
    if (n_layers < d->m->c.n_layer) return;
    LAUNCH(norm_tokens, dim3((unsigned)n_tokens), dim3(32), 0, d->stream, d->x, d->norm, d->normed, d->m->c.d_model, d->ld_model, d->m->c.norm_eps);
    if (n_rows) run_head(d, n_rows);
}

// A decoding step is one graph, made when a batch of its size first comes.
static bool run_graph(struct device *d, int n_tokens, int n_rows, struct error *e) {
    for (const auto &g : d->graphs)
        if (g.n_tokens == n_tokens && g.n_rows == n_rows) return ok(cudaGraphLaunch(g.exec, d->stream), "launching a graph", e);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    if (!ok(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "making a graph", e)) return false;
    run_layers(d, n_tokens, n_tokens, d->m->c.n_layer, n_rows, true);
    bool made = ok(cudaStreamEndCapture(d->stream, &graph), "making a graph", e) && ok(cudaGraphInstantiate(&exec, graph, 0), "making a graph", e);
    if (graph) cudaGraphDestroy(graph);
    if (exec) d->graphs.push_back({n_tokens, n_rows, exec});
    return made && ok(cudaGraphLaunch(exec, d->stream), "launching a graph", e);
}

static bool fetch_logits(struct device *d, int n_rows, float *logits, int ld_logits, struct error *e) {
    const size_t n_vocab = (size_t)d->m->c.n_vocab;
    if (n_rows && !ok(cudaMemcpyAsync(d->host_logits, d->logits, (size_t)n_rows * n_vocab * sizeof(float), cudaMemcpyDeviceToHost, d->stream),
                      "copying logits", e))
        return false;
    if (!ok(cudaGetLastError(), "starting a kernel", e) || !ok(cudaStreamSynchronize(d->stream), "running the model", e)) return false;
    for (int r = 0; r < n_rows; r++) memcpy(logits + (size_t)r * ld_logits, d->host_logits + (size_t)r * n_vocab, n_vocab * sizeof(float));
    return true;
}

static bool copy_state_floats(struct device *d, float *to, const float *from, size_t n, cudaMemcpyKind kind, struct error *e) {
    return !n || ok(cudaMemcpyAsync(to, from, n * sizeof(float), kind, d->stream), "copying a state", e);
}

// ====================================================================================================================
// The interface.
// ====================================================================================================================

extern "C" {

bool device_usable(struct error *e) {
    int n = 0, driver = 0, runtime = 0, major = 0, minor = 0;
    const cudaError_t r = cudaGetDeviceCount(&n);
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (!driver) return set_error(e, "no NVIDIA driver is installed here");
    if (r == cudaErrorInsufficientDriver)
        return set_error(e, "the NVIDIA driver knows CUDA %d.%d, and this program needs %d.%d: update the driver", driver / 1000,
                         driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (r == cudaErrorNoDevice || (r == cudaSuccess && n == 0)) return set_error(e, "no NVIDIA GPU was found");
    if (!ok(r, "being looked for", e) || !ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "being asked for its version", e) ||
        !ok(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "being asked for its version", e))
        return false;
    return 10 * major + minor >= 75 || set_error(e, "the GPU has compute capability %d.%d; 7.5 (Turing) or later is needed", major, minor);
}

bool device_runs(const struct model *m, struct error *e) {
    bool plain = !m->c.n_pools && !m->c.layer_norm && !m->c.zoh && !m->head_b;
    for (int i = 0; i < m->c.n_layer; i++) plain &= !m->layers[i].s4 && !m->layers[i].is_complex;
    if (!plain) return set_error(e, "audio U-Nets run on the CPU alone");
    if (m->c.d_state > 256) return set_error(e, "d_state is %d; the GPU takes up to 256", m->c.d_state);
    if (m->c.n_vocab > 1000000 || m->c.d_inner > 500000) return set_error(e, "a matrix has more than a million rows, too many for the GPU");
    return true;
}

void device_close(struct device *d) {
    if (!d) return;
    for (const auto &g : d->graphs) cudaGraphExecDestroy(g.exec);
    for (void *p : d->memory) cudaFree(p);
    cudaFreeHost(d->host_batch);
    cudaFreeHost(d->host_rows);
    cudaFreeHost(d->host_choices);
    cudaFreeHost(d->host_logits);
    if (d->stream) cudaStreamDestroy(d->stream);
    delete d;
}

struct device *device_open(const struct model *m, struct device_shape shape, unpack_row *unpack, struct error *e) {
    const struct config *c = &m->c;
    const auto whole_chunks = [](int n) { return (n + CHUNK - 1) / CHUNK * CHUNK; };
    const char *graphs = getenv("MAMBA_CUDA_GRAPHS");  // 0: none, to look for errors
    int major = 0, clock = 0, width = 0;
    cudaDeviceProp properties;
    if (shape.max_tokens > 65535) {  // the y of a grid
        set_error(e, "the GPU takes up to 65535 tokens a pass; use a smaller -ub or -np");
        return NULL;
    }
    struct device *d = new device();
    d->m = m;
    d->shape = shape;
    d->use_graphs = !graphs || strcmp(graphs, "0") != 0;
    d->layers.resize((size_t)c->n_layer);
    d->ld_model = whole_chunks(c->d_model);
    d->ld_inner = whole_chunks(c->d_inner);
    d->ld_dt = whole_chunks(c->dt_rank);
    d->ld_state = (c->d_inner + 15) / 16 * 16;
    d->ld_bc = 2 * c->d_state;
    d->slot_conv = c->conv_floats;
    d->slot_ssm = c->ssm_floats;
    for (int i = 0; i < shape.max_sequences; i++) d->free_slots.push_back(i);  // taken from the end: what is read behind a state is seen
    if (ok(cudaSetDevice(0), "being started", e) && ok(cudaStreamCreate(&d->stream), "being started", e) &&
        ok(cudaGetDeviceProperties(&properties, 0), "being asked for its name", e) &&
        ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "being asked for its version", e)) {
        d->no_bf16 = major < 8;
        if (take_memory(d, unpack, e)) {
            cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, 0);  // kHz; twice that many transfers
            cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, 0);
            snprintf(d->facts.name, sizeof d->facts.name, "%.127s", properties.name);
            d->facts.bytes = d->bytes;
            d->facts.read_gb_per_s = 2.0 * clock * 1e3 * width / 8 / 1e9;
            return d;
        }
    }
    device_close(d);
    return NULL;
}

struct device_facts device_facts(const struct device *d) { return d->facts; }

bool device_forward(struct device *d, const struct segment *segments, int n_segments, int n_layers, const float *x, int ld_x, float *logits,
                    int ld_logits, struct error *e) {
    const int max_tokens = d->shape.max_tokens;
    int n_tokens = 0, n_rows = 0, *slots = d->host_batch, *positions = slots + max_tokens, *rows = slots + 5 * (size_t)max_tokens;
    span *spans = (span *)(slots + 2 * (size_t)max_tokens);
    for (int i = 0; i < n_segments; i++) {
        spans[i] = span{segments[i].seq->slot, n_tokens, segments[i].n_tokens};
        for (int t = 0; t < segments[i].n_tokens; t++) {
            slots[n_tokens] = segments[i].seq->slot;
            positions[n_tokens++] = t;
        }
        if (segments[i].want_logits) rows[n_rows++] = n_tokens - 1;
    }
    for (int t = 0; t < n_tokens; t++) {  // what pads a row stays zero
        float *row = d->host_rows + (size_t)t * d->ld_model;
        memcpy(row, x + (size_t)t * ld_x, (size_t)d->m->c.d_model * sizeof(float));
        memset(row + d->m->c.d_model, 0, (size_t)(d->ld_model - d->m->c.d_model) * sizeof(float));
    }
    d->n_tokens = n_tokens;
    const bool decoding = n_tokens == n_segments;
    if (!ok(cudaMemcpyAsync(d->batch, d->host_batch, (5 * (size_t)max_tokens + (size_t)d->shape.max_rows) * sizeof(int), cudaMemcpyHostToDevice,
                            d->stream), "copying a batch", e) ||
        !ok(cudaMemcpyAsync(d->x, d->host_rows, (size_t)n_tokens * d->ld_model * sizeof(float), cudaMemcpyHostToDevice, d->stream),
            "copying a batch", e))
        return false;
    if (decoding && d->use_graphs && n_layers == d->m->c.n_layer) {
        if (!run_graph(d, n_tokens, n_rows, e)) return false;
    } else {
        run_layers(d, n_tokens, n_segments, n_layers, n_rows, decoding);
    }
    return fetch_logits(d, logits ? n_rows : 0, logits, ld_logits, e);
}

bool device_choose(struct device *d, int n_rows, struct device_choice *choices, struct error *e) {
    LAUNCH(choose_rows, dim3((unsigned)n_rows), dim3(256), 8 * 4 * sizeof(float), d->stream, d->logits, d->banned, d->choices, d->m->c.n_vocab);
    const size_t bytes = (size_t)n_rows * sizeof *choices;
    if (!ok(cudaMemcpyAsync(d->host_choices, d->choices, bytes, cudaMemcpyDeviceToHost, d->stream), "copying tokens", e) ||
        !ok(cudaGetLastError(), "starting a kernel", e) || !ok(cudaStreamSynchronize(d->stream), "choosing tokens", e))
        return false;
    memcpy(choices, d->host_choices, bytes);
    return true;
}

bool device_ban(struct device *d, const int32_t *tokens, size_t n, struct error *e) {
    std::vector<unsigned> bits((size_t)d->m->c.n_vocab / 32 + 1);
    for (size_t i = 0; i < n; i++) bits[(size_t)tokens[i] / 32] |= 1u << tokens[i] % 32;
    return ok(cudaMemcpyAsync(d->banned, bits.data(), bits.size() * sizeof(unsigned), cudaMemcpyHostToDevice, d->stream), "copying tokens", e) &&
           ok(cudaStreamSynchronize(d->stream), "copying tokens", e);
}

bool device_logits(struct device *d, const int *tokens, int n, float *logits, int ld_logits, struct error *e) {
    const size_t at = 5 * (size_t)d->shape.max_tokens;
    memcpy(d->host_batch + at, tokens, (size_t)n * sizeof(int));
    if (!ok(cudaMemcpyAsync(d->batch + at, d->host_batch + at, (size_t)n * sizeof(int), cudaMemcpyHostToDevice, d->stream), "copying a batch", e))
        return false;
    run_head(d, n);
    return fetch_logits(d, n, logits, ld_logits, e);
}

bool device_hidden(struct device *d, bool normed, float *rows, int ld, struct error *e) {
    const size_t n = (size_t)d->n_tokens * (size_t)d->ld_model;
    if (!ok(cudaMemcpyAsync(d->host_rows, normed ? d->normed : d->x, n * sizeof(float), cudaMemcpyDeviceToHost, d->stream), "copying rows", e) ||
        !ok(cudaStreamSynchronize(d->stream), "copying rows", e))
        return false;
    for (int t = 0; t < d->n_tokens; t++)
        memcpy(rows + (size_t)t * ld, d->host_rows + (size_t)t * d->ld_model, (size_t)d->m->c.d_model * sizeof(float));
    return true;
}

int device_take_slot(struct device *d) {
    if (d->free_slots.empty()) return -1;
    const int slot = d->free_slots.back();
    d->free_slots.pop_back();
    return slot;
}

void device_leave_slot(struct device *d, int slot) { d->free_slots.push_back(slot); }

bool device_reset_state(struct device *d, int slot, struct error *e) {
    float *conv = d->conv + (size_t)slot * d->slot_conv, *ssm = d->ssm + (size_t)slot * d->slot_ssm;
    const size_t n_conv = d->slot_conv * sizeof *conv, n_ssm = d->slot_ssm * sizeof *ssm;
    return (!n_conv || ok(cudaMemsetAsync(conv, 0, n_conv, d->stream), "clearing a state", e)) &&
           ok(cudaMemsetAsync(ssm, 0, n_ssm, d->stream), "clearing a state", e);
}

bool device_copy_state(struct device *d, int to, int from, struct error *e) {
    const size_t n_conv = d->slot_conv, n_ssm = d->slot_ssm, t = (size_t)to, f = (size_t)from;
    return copy_state_floats(d, d->conv + t * n_conv, d->conv + f * n_conv, n_conv, cudaMemcpyDeviceToDevice, e) &&
           copy_state_floats(d, d->ssm + t * n_ssm, d->ssm + f * n_ssm, n_ssm, cudaMemcpyDeviceToDevice, e);
}

bool device_read_state(struct device *d, int slot, float *conv, float *ssm, struct error *e) {
    return copy_state_floats(d, conv, d->conv + (size_t)slot * d->slot_conv, d->slot_conv, cudaMemcpyDeviceToHost, e) &&
           copy_state_floats(d, ssm, d->ssm + (size_t)slot * d->slot_ssm, d->slot_ssm, cudaMemcpyDeviceToHost, e) &&
           ok(cudaStreamSynchronize(d->stream), "copying a state", e);
}

bool device_write_state(struct device *d, int slot, const float *conv, const float *ssm, struct error *e) {
    return copy_state_floats(d, d->conv + (size_t)slot * d->slot_conv, conv, d->slot_conv, cudaMemcpyHostToDevice, e) &&
           copy_state_floats(d, d->ssm + (size_t)slot * d->slot_ssm, ssm, d->slot_ssm, cudaMemcpyHostToDevice, e) &&
           ok(cudaStreamSynchronize(d->stream), "copying a state", e);
}

}  // extern "C"
