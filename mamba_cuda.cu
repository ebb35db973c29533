// The GPU backend of mamba: implements the interface of struct device that mamba.c declares.
//
//   make cuda                                      nvcc 12 or later
//   g++ -x c++ -DCUDA_EMULATION mamba_cuda.cu      on the CPU, for tests: tests/cuda_emu.h
//
// A layer is four products, and what is between them:
//
//   in_proj     norm (a factor after the dot product), product, convolution and SiLU
//   x_proj      product: dt (low rank), B, C
//   dt_proj     product, softplus, selective scan, skip and gate
//   out_proj    product, added to the residual stream
//
// While one sequence decodes, each line is a kernel (product_few); while several do, the scan is one of its own (scan_steps). Many columns
// of a product are prepared once (prepare) and multiplied in tiles (product_tiles, add_slices). In prompts the convolution and the scan
// are kernels of their own (conv_tokens, scan_tokens), which do the same operations in the same order. From Hopper on, a kernel starts
// while the one before it ends: it loads weights, and then waits for its inputs.
//
// The promise: on one GPU the same tokens give the same bits whatever the batch, the chunks of a prompt and the kernels' shapes,
// because a product has one method for all of them. A row of weights times a column of activations is a sum over blocks of
// 32: the block's dot product, from zero, times the block's scale, is added by one fused multiply-add. Blocks add up in rising
// order within a slice of the row, and slices in rising order; slices depend on the length of the row alone. The dot
// product itself is made by tensor cores (mma), in which an element depends on its row and its column only:
//
//   quantised      bytes, exact; activations are rounded to 8 bits in blocks of 32, as on the CPU
//   F16, BF16      activations are cut into a high and a low part of the weights' type, which together keep 22 (16) bits
//   F32            no tensor cores: four sums a slice, of every fourth four of its columns in rising order, added as a tree
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
#define LAUNCH(kernel, grid, threads, shared_bytes, device, ...) \
    launch(kernel, grid, threads, shared_bytes, (device)->stream, (device)->early_start, __VA_ARGS__)

// More shared memory than 48 KB is asked for, once for each kernel; where that fails, so does the launch.
#define ALLOW_SHARED(kernel, bytes) \
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); \
    (void)allowed

// early: the kernel may be started before the last one has ended, and waits for it itself (inputs_ready()).
template <class... P, class... A>
static void launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream, bool early, A... args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, P(args)...);  // an error stays until cudaGetLastError()
}
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

// Blocks whose weights a warp loads together where it has few columns: loads in flight are what counts then.
static constexpr __host__ __device__ int blocks_at_once(enum format f) { return is_quantized(f) && f != Q8_0 ? 8 : 4; }

struct weights {            // a matrix on the device
    const uint4 *data;      // [n_tiles][n_chunks][chunk_words]
    const unsigned *scales; // [n_tiles][n_chunks][scale_words][16 rows]
    int rows, cols, n_chunks;
    enum format format;
};

static __host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Slices of a row: at most MAX_SLICES, of so many chunks each. They depend on nothing but the row's length.
static __host__ __device__ inline int slice_chunks(int n_chunks) { return ceil_div(n_chunks, MAX_SLICES); }
static __host__ __device__ inline int slice_count(int n_chunks) { return ceil_div(n_chunks, slice_chunks(n_chunks)); }

// ---- Filling it, on the host ----


// Where a byte q of row r (0 to 15) and column k (of the chunk) stands. Lane = 4 (r % 8) + q-th four of the half block; its words
// are numbered e = 4 block + 2 half + r / 8, as a tensor core takes them, and byte i of word e has k % 4 = i.
static void place_q(uint8_t *chunk, enum format f, int r, int k, int q) {
    const int lane = r % 8 * 4 + k % 16 / 4, e = k / 32 * 4 + k % 32 / 16 * 2 + r / 8, i = k % 4;
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
        const int run = is_quantized(f) ? 1 : f == F32 ? 4 : 2;  // columns that stay side by side
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
                const int step = c % 8 / 4;  // of the two that a tensor core takes for a block: four of a lane's eight columns each
                const int lane = r % 8 * 4 + c % 32 / 8, word = c % 4 / 2 * 2 + r / 8;
                memcpy(chunk + ((c / 32 * 2 + step) * 32 + lane) * 16 + word * 4, row + 2 * (size_t)k, 2 * (size_t)n);
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
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

DEVICE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800    // on Turing BF16 weights are uploaded as F32
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_s8(int d[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[2]), "+r"(d[3]) : "r"(a1), "r"(b));
#endif
}

// d += a * b, m16n8k32: a holds rows g and g + 8 of the first half, then of the second.
DEVICE void mma_s8_block(int d[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_s8(d, a[0], a[1], b[0]);
    mma_s8(d, a[2], a[3], b[1]);
#endif
}

// From global to shared memory past the registers: 4, 8 or 16 bytes of each thread, aligned to as many. Copies up to
// copies_end() are a group, and copies_wait<N>() waits for all of a thread's groups but the last N.
template <int BYTES> DEVICE void copy_async(void *shared, const void *global) {
#if __CUDA_ARCH__ >= 800
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
#else
    if constexpr (BYTES == 16) *(uint4 *)shared = *(const uint4 *)global;
    else if constexpr (BYTES == 8) *(uint2 *)shared = *(const uint2 *)global;
    else *(unsigned *)shared = *(const unsigned *)global;
#endif
}

DEVICE void copies_end() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// A kernel may be started before the one before it has ended (launch()): it waits here before it touches what others write or
// read, and says at its start that the next one may be started, too.
DEVICE void inputs_ready() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// To the second-level cache, in which nothing gets old.
DEVICE void prefetch(const void *global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// 2^x, where what is below the smallest normal number is 0.
DEVICE float exp2_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
        const int e = 4 * i + 2 * h + r;
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
        const int shift = N < per_word ? b % per_word * 8 : 0;
        if constexpr (is_k(F)) super = row[0];
#pragma unroll
        for (int i = 0; i < n; i++) scale_words[i] = first[i * TILE] >> shift;
#pragma unroll
        for (int i = 0; i < n && has_min(F); i++) min_words[i] = first[(BLOCKS / per_word + i) * TILE] >> shift;
    }

    // The same of a unit in shared memory, which has a row of 16 words for each word loaded; b: the row's block
    __device__ __forceinline__ void take(const unsigned *rows, int b) {
        const int shift = N < per_word ? b % per_word * 8 : 0, at = is_k(F) ? TILE : 0;
        super = rows[0];
        scale_words[0] = rows[at] >> shift;
        min_words[0] = has_min(F) ? rows[at + TILE] >> shift : 0;
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

// Numbers that go with a column's block: its scale, and for minima the scale times the sum of its bytes, or of each half's.
static constexpr __host__ __device__ int factor_count(enum format f) { return f == F32 ? 0 : !has_min(f) ? 1 : group_of(f) == 16 ? 3 : 2; }

// A block of activations of one column, as the four lanes that share column g hold it.
template <enum format F> struct column_block {
    uint32_t b[is_quantized(F) ? 2 : 8];  // bytes of both halves; or pairs: high parts [4], low parts [4]
    float factors[factor_count(F)];
};

// What a lane multiplies with: the operand, of column g, and the factors, of its results' columns 2 q and 2 q + 1.
template <enum format F> struct operand {
    uint32_t b[is_quantized(F) ? 2 : 8];
    float factors[factor_count(F)][2];
};

// The largest magnitudes of N blocks, as bits: those of a NaN are larger than those of infinity, and so it is not lost.
template <int N> DEVICE void block_max(const float v[N][8], unsigned max_bits[N]) {
#pragma unroll
    for (int b = 0; b < N; b++) {
        max_bits[b] = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) max_bits[b] = max(max_bits[b], __float_as_uint(v[b][i]) & 0x7fffffffu);
    }
#pragma unroll
    for (int b = 0; b < N; b++) max_bits[b] = max(max_bits[b], __shfl_xor_sync(WHOLE_WARP, max_bits[b], 1));
#pragma unroll
    for (int b = 0; b < N; b++) max_bits[b] = max(max_bits[b], __shfl_xor_sync(WHOLE_WARP, max_bits[b], 2));
}

// q = round(x / scale), scale = max|x| / 127, as the CPU does it.
template <enum format F> DEVICE void make_bytes(const float v[8], unsigned max_bits, column_block<F> *c) {
    const float largest = __uint_as_float(max_bits), scale = largest / 127.0f;
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        c->b[h] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) c->b[h] |= ((unsigned)__float2int_rn(v[4 * h + i] * inverse) & 255u) << 8 * i;
    }
    c->factors[0] = scale;
    if constexpr (has_min(F)) {
        int sums[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int s = __dp4a((int)c->b[h], 0x01010101, 0);
            s += __shfl_xor_sync(WHOLE_WARP, s, 1);
            sums[h] = s + __shfl_xor_sync(WHOLE_WARP, s, 2);
        }
        if (group_of(F) == 32) sums[0] += sums[1];
        c->factors[1] = scale * (float)sums[0];
        if constexpr (group_of(F) == 16) c->factors[2] = scale * (float)sums[1];
    }
}

// x = 2^e * (high + low): a power of two brings the block's largest to between 1 and 2, so that neither part leaves the
// range of its type. Blocks of denormals count as zero; infinities and NaN reach the result through the scale.
template <enum format F> DEVICE void make_pairs(const float v[8], unsigned max_bits, column_block<F> *c) {
    const unsigned exponent = max_bits >> 23;
    const bool finite = exponent < 254;
    const float inverse = exponent > 0 && finite ? __uint_as_float((254 - exponent) << 23) : 0.0f;
    c->factors[0] = finite ? __uint_as_float(exponent << 23) : __uint_as_float(0x7fc00000);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = v[2 * i] * inverse, b = v[2 * i + 1] * inverse;
        c->b[i] = pack_pair<F>(a, b);
        const float2 high = unpack_pair<F>(c->b[i]);
        c->b[4 + i] = pack_pair<F>(a - high.x, b - high.y);
    }
}

template <enum format F, int N> DEVICE void make_blocks(const float v[N][8], column_block<F> c[N]) {
    unsigned max_bits[N];
    block_max<N>(v, max_bits);
#pragma unroll
    for (int b = 0; b < N; b++) {
        if constexpr (is_quantized(F)) make_bytes<F>(v[b], max_bits[b], &c[b]);
        else make_pairs<F>(v[b], max_bits[b], &c[b]);
    }
}

// A value that the four lanes of column g share, of columns 2 q and 2 q + 1.
DEVICE void of_own_columns(float v, float own[2]) {
    const int q = threadIdx.x % 4;
    own[0] = __shfl_sync(WHOLE_WARP, v, 8 * q);
    own[1] = __shfl_sync(WHOLE_WARP, v, 8 * q + 4);
}

template <enum format F> DEVICE operand<F> operand_of(const column_block<F> &c) {
    operand<F> o;
#pragma unroll
    for (int i = 0; i < (is_quantized(F) ? 2 : 8); i++) o.b[i] = c.b[i];
#pragma unroll
    for (int i = 0; i < factor_count(F); i++) of_own_columns(c.factors[i], o.factors[i]);
    return o;
}

// Rows g and g + 8 of a tile, N blocks of them.
template <enum format F, int N> struct fragment {
    loaded<F, N> weights;
    group_scales<F, N> scales[2];  // not loaded, and so not there, for floats
};

// A sum of bytes' products as a float. Such sums start from EXACT, whose bits as a float are 1.5 * 2^23: a sum below 2^22 in
// magnitude then stands in the mantissa, and one subtraction is cheaper than a conversion.
enum { EXACT = 0x4b400000 };
DEVICE float exact_float(int sum) { return __uint_as_float((unsigned)sum) - 12582912.0f; }

// dot += the n-th loaded block of R tiles (of its half h, where groups of 16 have scales) times those of C times 8 columns. A tensor core
// takes several steps: all tiles and columns go side by side, so that none waits for its own last one.
template <enum format F, int N, int R, int C, class T>
DEVICE void multiply_block(const fragment<F, N> a[R], int n, int h, const operand<F> x[C], T dot[R][C][4]) {
    if constexpr (is_quantized(F)) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const loaded<F, N> &w = a[r].weights;
            const uint32_t words[4] = {w.q(n, 0, h), w.q(n, 1, h), w.q(n, 0, 1), w.q(n, 1, 1)};
#pragma unroll
            for (int c = 0; c < C; c++) {
                if constexpr (group_of(F) == 16) mma_s8(dot[r][c], words[0], words[1], x[c].b[h]);
                else mma_s8_block(dot[r][c], words, x[c].b);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)  // both halves of 16, high and low parts
#pragma unroll
            for (int k = 0; k < R * C; k++) {
                const int r = k / C, c = k % C;
                const uint32_t *words = a[r].weights.words + 8 * n + i / 2 * 4;
                if constexpr (F == F16) mma_f16(dot[r][c], words, x[c].b + i % 2 * 4 + i / 2 * 2);
                else mma_bf16(dot[r][c], words, x[c].b + i % 2 * 4 + i / 2 * 2);
            }
    }
}

// sums[r][c] += the n-th loaded block of R tiles times those of C times 8 columns.
template <enum format F, int N, int R, int C>
DEVICE void multiply(const fragment<F, N> a[R], int n, const operand<F> x[C], float *const sums[R][C]) {
    if constexpr (is_quantized(F)) {
#pragma unroll
        for (int h = 0; h < BLOCK / group_of(F); h++) {
            int dot[R][C][4];
#pragma unroll
            for (int i = 0; i < 4 * R * C; i++) dot[i / 4 / C][i / 4 % C][i % 4] = EXACT;
            multiply_block<F, N, R, C>(a, n, h, x, dot);
#pragma unroll
            for (int i = 0; i < 4 * R * C; i++) {
                const int r = i / 4 / C, c = i / 4 % C, k = i % 4;
                const group_scales<F, N> &row = a[r].scales[k / 2];
                float *sum = &sums[r][c][k];
                *sum = fmaf(row.scale(n, h) * x[c].factors[0][k % 2], exact_float(dot[r][c][k]), *sum);
                if constexpr (has_min(F)) *sum = fmaf(row.min(n, h), x[c].factors[1 + h][k % 2], *sum);
            }
        }
    } else {
        float dot[R][C][4] = {};
        multiply_block<F, N, R, C>(a, n, 0, x, dot);
#pragma unroll
        for (int i = 0; i < 4 * R * C; i++) {
            const int r = i / 4 / C, c = i / 4 % C, k = i % 4;
            sums[r][c][k] = fmaf(x[c].factors[0][k % 2], dot[r][c][k], sums[r][c][k]);
        }
    }
}

// ====================================================================================================================
// Product: y = w x for the columns of x, which are tokens.
// Kernels differ in who does what, never in what is computed. For few columns (are_few()), product_few has a warp for each slice of
// 16 rows and makes operands of the columns where it needs them; what follows a product in a layer while decoding is its end.
// For more, prepare makes the operands once, product_tiles multiplies them from shared memory, and where it has too few blocks
// to fill the GPU, these take slices of their own, which add_slices adds up.
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

// At most n columns from `first` on.
DEVICE input from_column(input in, int first, int n) {
    if (in.rows) in.rows += first;
    else in.x += (size_t)first * (size_t)in.ld;
    in.n = min(n, in.n - first);
    return in;
}

DEVICE float4 load4(const float *p) { return *(const float4 *)p; }

DEVICE float4 floats_of(uint4 v) { return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)); }

DEVICE float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

DEVICE float dot4(float4 a, float4 b, float sum) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum)))); }

// Four floats of a column times the norm's weight, zeros where there is no such column; adds the squares of those without it.
DEVICE float4 load_normed(const input &in, int column, int k, float *squares) {
    const float4 v = column < in.n ? load4(input_row(in, column) + k) : make_float4(0, 0, 0, 0);
    if (!in.norm) return v;
    *squares = dot4(v, v, *squares);
    return times(v, load4(in.norm + k));
}

// The sum over the four lanes of a column.
DEVICE float sum_of_four(float v) {
    v += __shfl_xor_sync(WHOLE_WARP, v, 1);
    return v + __shfl_xor_sync(WHOLE_WARP, v, 2);
}

// N blocks of a column from column k of the row on. Lane q has of a block what it has of weights, too. squares: of each block.
template <enum format F, int N> DEVICE void load_blocks(const input &in, int column, int k, float x[N][8], float squares[N]) {
    const int q = threadIdx.x % 4, near = is_quantized(F) ? 4 * q : 8 * q, far = near + (is_quantized(F) ? 16 : 4);
#pragma unroll
    for (int b = 0; b < N; b++) {
        squares[b] = 0;
        const float4 v = load_normed(in, column, k + b * BLOCK + near, &squares[b]), w = load_normed(in, column, k + b * BLOCK + far, &squares[b]);
        x[b][0] = v.x, x[b][1] = v.y, x[b][2] = v.z, x[b][3] = v.w, x[b][4] = w.x, x[b][5] = w.y, x[b][6] = w.z, x[b][7] = w.w;
    }
}

// RMSNorm after the product: its weight was multiplied before, and 1 / rms is a factor of the whole column. squares: its sum of
// squares in each chunk, so many floats apart.
DEVICE float norm_factor(const input &in, const float *squares, int apart, int n_chunks) {
    if (!in.norm) return 1.0f;
    float sum = 0;
    for (int c = 0; c < n_chunks; c++) sum += squares[(size_t)c * apart];
    return 1.0f / sqrtf(sum / (float)in.n_normed + in.eps);
}

// What a lane adds up of a tile and 8 columns: rows g and g + 8 times columns 2 q and 2 q + 1. F32: times all 8 columns, of
// the fours of k that are q modulo 4.
template <enum format F> struct sums {
    float v[F == F32 ? 16 : 4];
};

// Its results. F32: the four lanes' sums are added as a tree, and each lane keeps those of its columns.
template <enum format F> DEVICE void own_sums(const sums<F> &s, float own[4]) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = s.v[i];
    if constexpr (F == F32) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float four[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float low = s.v[8 * h + i], high = s.v[8 * h + 4 + i];
                four[i] = (q & 2 ? high : low) + __shfl_xor_sync(WHOLE_WARP, q & 2 ? low : high, 2);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                own[2 * h + i] = (q & 1 ? four[2 + i] : four[i]) + __shfl_xor_sync(WHOLE_WARP, q & 1 ? four[i] : four[2 + i], 1);
        }
    }
}

// ---- Few columns ----

enum { FEW_COLUMNS = 8 };

// Columns of the row from `first` to `end` - 1, times one or all of the columns of x. squares [chunks][FEW_COLUMNS], where the norm
// needs them. F32: 64 at once, of which lane q has four fours. Weights of the next 64 are under way meanwhile.
template <int COLUMNS> DEVICE void slice_of_floats(const weights &w, const input &in, int tile, int first, int end, sums<F32> *s, float *squares) {
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    const uint4 *row = w.data + (size_t)tile * w.n_chunks * chunk_words(F32) + q * TILE + g;
    uint4 a[4][2], next[4][2] = {};
    float square[COLUMNS] = {};
    const auto load = [&](uint4 to[4][2], int k) {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i / 2][i % 2] = row[(k / 4 + i / 2 * 4) * TILE + i % 2 * 8];
    };
    load(a, first);
    if (first + 64 < end) load(next, first + 64);
    inputs_ready();
    for (int k = first; k < end; k += 64) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float4 x = load_normed(in, j, k + 16 * i + 4 * q, &square[j]);
#pragma unroll
                for (int h = 0; h < 2; h++) s->v[8 * h + j] = dot4(floats_of(a[i][h]), x, s->v[8 * h + j]);
            }
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 2][i % 2] = next[i / 2][i % 2];
        if (k + 128 < end) load(next, k + 128);
        if (!in.norm || (k % CHUNK + 64 != CHUNK && k + 64 < end)) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {  // a chunk is over
            const float sum = sum_of_four(square[j]);
            if (lane == 0) squares[k / CHUNK * FEW_COLUMNS + j] = sum;
            square[j] = 0;
        }
    }
}

template <enum format F, int N> DEVICE void load_fragment(const weights &w, int tile, int block, fragment<F, N> *a) {
    const size_t at = (size_t)tile * w.n_chunks + block / BLOCKS;
    const int lane = threadIdx.x;
    a->weights.load(w.data + at * chunk_words(F) + lane, block % BLOCKS);
#pragma unroll
    for (int i = 0; i < 2 && is_quantized(F); i++) a->scales[i].load(w.scales + at * scale_words(F) * TILE + lane / 4 + 8 * i, block % BLOCKS);
}

// A pair of blocks of all columns. square: of the lane's part of the chunk, to which those of each block are added in rising order.
template <enum format F> DEVICE void blocks_of_columns(const input &in, int block, column_block<F> c[2], float *square) {
    float x[2][8], squares[2];
    load_blocks<F, 2>(in, threadIdx.x / 4, block * BLOCK, x, squares);
    make_blocks<F, 2>(x, c);
    *square = (block % BLOCKS ? *square + squares[0] : squares[0]) + squares[1];
}

// The chunk of a single column: its 8 blocks are spread over the lanes, of which each makes one.
template <enum format F> DEVICE column_block<F> block_of_one_column(const input &in, int chunk, float *square) {
    const int lane = threadIdx.x;
    float x[1][8], squares[1];
    column_block<F> c[1];
    load_blocks<F, 1>(in, 0, chunk * CHUNK + lane / 4 * BLOCK, x, squares);
    make_blocks<F, 1>(x, c);
    if (!in.norm) return c[0];
    *square = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) *square += __shfl_sync(WHOLE_WARP, squares[0], 4 * b + lane % 4);
    return c[0];
}

// Block i of the chunk, from the lanes that have it. Seven columns more with the same numbers are multiplied, and not looked at.
template <enum format F> DEVICE operand<F> operand_of_one_column(const column_block<F> &c, int i) {
    operand<F> o;
#pragma unroll
    for (int k = 0; k < (is_quantized(F) ? 2 : 8); k++) o.b[k] = __shfl_sync(WHOLE_WARP, c.b[k], 4 * i + (int)threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < factor_count(F); k++) o.factors[k][0] = o.factors[k][1] = __shfl_sync(WHOLE_WARP, c.factors[k], 4 * i);
    return o;
}

// The same for other formats, in whole blocks, N at once. Weights of 2 N blocks are under way before the inputs are there.
template <enum format F, int COLUMNS>
DEVICE void slice_of_blocks(const weights &w, const input &in, int tile, int first, int end, sums<F> *s, float *squares) {
    constexpr int N = blocks_at_once(F);
    fragment<F, N> a, next;
    column_block<F> c[2];
    float *sums[1][1] = {{s->v}}, square = 0;
    load_fragment<F, N>(w, tile, first, &a);
    next = a;
    if (first + N < end) load_fragment<F, N>(w, tile, first + N, &next);
    inputs_ready();
    for (int block = first; block < end; block += N) {
        if (COLUMNS == 1 && block % BLOCKS == 0) c[0] = block_of_one_column<F>(in, block / BLOCKS, &square);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (COLUMNS > 1 && i % 2 == 0) blocks_of_columns<F>(in, block + i, c, &square);
            const operand<F> x = COLUMNS == 1 ? operand_of_one_column<F>(c[0], (block + i) % BLOCKS) : operand_of<F>(c[i % 2]);
            multiply<F, N, 1, 1>(&a, i, &x, sums);
        }
        if (in.norm) {
            const float sum = sum_of_four(square);
            if (threadIdx.x % 4 == 0) squares[block / BLOCKS * FEW_COLUMNS + threadIdx.x / 4] = sum;
        }
        a = next;
        if (block + 2 * N < end) load_fragment<F, N>(w, tile, block + 2 * N, &next);
    }
}

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
    const float *u, *gate;  // [tokens][ld_u]; the latter is silu(z)
    const float *bc;        // [tokens][2 d_state]: B, C
    float *y;               // [tokens][ld_u]
    size_t slot_floats;
    int d_state, n, ld_u;
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
    h = fmaf(exp2_flushed(dt * a2), h, dt_u * b);
    *y = fmaf(c, h, *y);
    return h;
}

// Lanes that share a channel, neighbours; lane j has so many states from n = j * scan_states() on.
enum { SCAN_LANES = 16 };
static constexpr __host__ __device__ int scan_states(int d_state) { return d_state <= 16 ? 1 : d_state <= 64 ? 4 : 16; }

// A state of 16 channels on its way to the second-level cache.
DEVICE void prefetch_scan_state(const scan &s, int slot, int tile, int thread, int n_threads) {
    const float *state = s.state + (size_t)slot * s.slot_floats + (size_t)tile * s.d_state * 16;
    for (int n = 2 * thread; n < s.d_state; n += 2 * n_threads) prefetch(state + 16 * n);  // two states are 128 bytes
}

// What lane j adds to y for one token of a channel; the state is in memory.
DEVICE float scan_part(const scan &s, int slot, int token, int channel, int j, float dt) {
    const size_t at = (size_t)(channel / 16) * s.d_state * 16 + channel % 16;
    const int first = j * scan_states(s.d_state), end = min(first + scan_states(s.d_state), s.d_state);
    const float *bc = s.bc + (size_t)token * 2 * s.d_state, dt_u = dt * s.u[(size_t)token * s.ld_u + channel];
    float *state = s.state + (size_t)slot * s.slot_floats + at, part = 0;
    for (int n0 = first; n0 < end; n0 += 4) {  // four at once: all are loaded before the first is stored
        float h[4] = {}, a2[4] = {}, b[4] = {}, c[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (n0 + i < end) h[i] = state[16 * (n0 + i)], a2[i] = s.a2[at + 16 * (n0 + i)], b[i] = bc[n0 + i], c[i] = bc[s.d_state + n0 + i];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (n0 + i < end) state[16 * (n0 + i)] = scan_state(h[i], dt, dt_u, a2[i], b[i], c[i], &part);
    }
    return part;
}

// Skip and gate of a token of a channel.
DEVICE void store_scanned(const scan &s, int token, int channel, float y) {
    const size_t at = (size_t)token * s.ld_u + channel;
    s.y[at] = fmaf(s.d[channel], s.u[at], y) * s.gate[at];
}

// A token of a channel, by its SCAN_LANES lanes: what they add is summed as a tree. All lanes of a warp come here, also those without a channel.
DEVICE void scan_step(const scan &s, int slot, int token, int channel, bool exists, float dt) {
    const int j = (int)threadIdx.x % SCAN_LANES;
    float y = exists ? scan_part(s, slot, token, channel, j, dt) : 0.0f;
#pragma unroll
    for (int distance = 1; distance < SCAN_LANES; distance *= 2) y += __shfl_xor_sync(WHOLE_WARP, y, distance);
    if (exists && j == 0) store_scanned(s, token, channel, y);
}

// The same by one thread, which keeps memory busier where there are sequences enough: 16 states are loaded before the first is stored.
// blockIdx.x: channels, y: token.
enum { STEP_THREADS = 128 };
template <int PER_LANE> __global__ void __launch_bounds__(STEP_THREADS, 4) scan_steps(const scan s, const float *dt, const int *slots) {
    const int token = (int)blockIdx.y, channel = (int)(blockIdx.x * STEP_THREADS + threadIdx.x);
    const size_t at = (size_t)(channel / 16) * s.d_state * 16 + channel % 16, token_at = (size_t)token * s.ld_u + channel;
    const float *bc = s.bc + (size_t)token * 2 * s.d_state;
    float *state = s.state + (size_t)slots[token] * s.slot_floats + at, h[16], a2[16], b[16], c[16], parts[SCAN_LANES] = {};
    const auto load_states = [&](int n0) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            h[i] = n0 + i < s.d_state ? state[16 * (n0 + i)] : 0.0f;
            a2[i] = n0 + i < s.d_state ? s.a2[at + 16 * (n0 + i)] : 0.0f;
        }
    };
    next_may_start();
    if (channel >= s.n) return;
    load_states(0);  // which this forward has not written, and the last one has ended
    inputs_ready();
    const float step = dt[token_at], step_u = step * s.u[token_at];
#pragma unroll
    for (int n0 = 0; n0 < SCAN_LANES * PER_LANE; n0 += 16) {
        if (n0) load_states(n0);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            b[i] = n0 + i < s.d_state ? bc[n0 + i] : 0.0f;
            c[i] = n0 + i < s.d_state ? bc[s.d_state + n0 + i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (n0 + i < s.d_state) state[16 * (n0 + i)] = scan_state(h[i], step, step_u, a2[i], b[i], c[i], &parts[(n0 + i) / PER_LANE]);
    }
#pragma unroll
    for (int distance = 1; distance < SCAN_LANES; distance *= 2)
#pragma unroll
        for (int lane = 0; lane < SCAN_LANES; lane += 2 * distance) parts[lane] += parts[lane + distance];
    store_scanned(s, token, channel, parts[0]);
}

enum epilogue {             // what becomes of the products v of a row
    STORE,                  // y = v
    ADD,                    // y += v
    GATE,                   // y = v, y2 = silu(v)                      in_proj
    CONV,                   // y = the convolution, y2 = silu(v)        in_proj of one token a sequence
    STEP,                   // y = softplus(v + dt_b)                   dt_proj
    SCAN                    // a step of the scan with that             dt_proj of one token
};

struct output {
    epilogue kind;
    float *y;               // [n][ld_y] rows below `split`
    float *y2;              // [n][ld_y2] the others
    int split, ld_y, ld_y2;
    const int *slots;       // [n] of each column's sequence
    conv c;
    scan s;
};

DEVICE void store(const output &out, int row, int column, float v) {
    if (row >= out.split) {
        out.y2[(size_t)column * out.ld_y2 + row - out.split] = out.kind == GATE || out.kind == CONV ? silu(v) : v;
        return;
    }
    float *y = &out.y[(size_t)column * out.ld_y + row];
    if (out.kind == ADD) v += *y;
    else if (out.kind == CONV) v = conv_token(out.c, out.slots[column], row, v);
    else if (out.kind == STEP) v = softplus(v + out.s.dt_b[row]);
    *y = v;
}

// States that a tile's end will read are on their way to the second-level cache while the block waits for its inputs.
DEVICE void prefetch_states(const output &out, int column0, int n, int tile) {
    const int thread = (int)(threadIdx.y * 32 + threadIdx.x), n_threads = (int)blockDim.y * 32;
    if (out.kind == SCAN) prefetch_scan_state(out.s, out.slots[column0], tile, thread, n_threads);
    if (out.kind != CONV || tile * TILE >= out.split) return;
    for (int i = thread; i < n * (out.c.d_conv - 1); i += n_threads)
        prefetch(out.c.state + (size_t)out.slots[column0 + i % n] * out.c.slot_floats + (size_t)(i / n) * out.c.ld + tile * TILE);
}

// blockIdx.x: COLUMNS (1 or FEW_COLUMNS) at once; blockIdx.y: tile of rows. Block: 32 threads for each warp; warps beyond the slices help
// at the end.
// Shared: parts [slices][8 columns][TILE rows], squares [chunks][8] where there is a norm.
template <enum format F, int COLUMNS> __global__ void __launch_bounds__(256, 1) product_few(const weights w, const input whole, const output out) {
    DYNAMIC_SHARED(float, parts);
    const int n_slices = slice_count(w.n_chunks), per = slice_chunks(w.n_chunks);
    const int warp = threadIdx.y, tile = (int)blockIdx.y, column0 = (int)blockIdx.x * COLUMNS;
    const input in = from_column(whole, column0, COLUMNS);
    float *squares = parts + n_slices * FEW_COLUMNS * TILE;
    next_may_start();
    prefetch_states(out, column0, in.n, tile);
    if (warp < n_slices) {
        const int g = threadIdx.x / 4, q = threadIdx.x % 4, first = warp * per * CHUNK, end = min(first + per * CHUNK, w.cols);
        sums<F> s = {};
        float own[4];
        if constexpr (F == F32) slice_of_floats<COLUMNS>(w, in, tile, first, end, &s, squares);
        else slice_of_blocks<F, COLUMNS>(w, in, tile, first / BLOCK, ceil_div(end, BLOCK), &s, squares);
        own_sums<F>(s, own);
#pragma unroll
        for (int i = 0; i < 4; i++) parts[(warp * FEW_COLUMNS + 2 * q + i % 2) * TILE + g + i / 2 * 8] = own[i];
    } else {
        inputs_ready();
    }
    __syncthreads();
    // An output a thread, or (SCAN) several: lanes of one output are neighbours, then come the rows of a column.
    const int n_threads = (int)blockDim.y * 32, share = out.kind == SCAN ? SCAN_LANES : 1;
    for (int first = 0; first < in.n * TILE * share; first += n_threads) {
        const int i = (first + warp * 32 + (int)threadIdx.x) / share, row = tile * TILE + i % TILE, local = i / TILE, column = column0 + local;
        const bool exists = row < w.rows && local < in.n;
        float v = 0;
        for (int s = 0; s < n_slices && exists; s++) v += parts[s * FEW_COLUMNS * TILE + i];
        if (exists) v *= norm_factor(in, squares + local, FEW_COLUMNS, w.n_chunks);
        if (out.kind != SCAN) {
            if (exists) store(out, row, column, v);
        } else {
            scan_step(out.s, exists ? out.slots[column] : 0, column, row, exists, exists ? softplus(v + out.s.dt_b[row]) : 0.0f);
        }
    }
}

// ---- Many columns ----
// Rows and columns are walked in units: what is copied to shared memory at once.

static constexpr __host__ __device__ int unit_columns(enum format f) { return f == F32 ? 16 : is_quantized(f) ? 64 : 32; }
static constexpr __host__ __device__ int unit_blocks(enum format f) { return f == F32 ? 0 : unit_columns(f) / BLOCK; }
// 16-byte words of a tile's weights, of its scales (rows of 16 words, as group_scales has them), and of 8 columns' operands.
static constexpr __host__ __device__ int unit_weights(enum format f) { return chunk_words(f) / (CHUNK / unit_columns(f)); }
static constexpr __host__ __device__ int unit_scales(enum format f) { return is_quantized(f) ? 4 * (1 + is_k(f) + has_min(f)) : 0; }
static constexpr __host__ __device__ int unit_operands(enum format f) { return f == F16 || f == BF16 ? 64 : 32; }

struct prepared {           // columns of a product, ready for product_tiles
    uint4 *operands;        // [ld/8][units][unit_operands]: 16 bytes a lane, lanes side by side
    float *factors;         // [blocks][factor_count][ld]
    float *squares;         // [chunks][ld]
    int ld, n_units;        // columns, those that are missing to whole tiles zero; units of a row
};

// A warp for 8 columns (blockIdx.x) and a chunk (blockIdx.y).
template <enum format F> __global__ void __launch_bounds__(32, 16) prepare(const input in, const prepared to) {
    constexpr int UNITS = CHUNK / unit_columns(F);
    const int lane = threadIdx.x, q = lane % 4, group = (int)blockIdx.x, column = 8 * group + lane / 4, chunk = (int)blockIdx.y;
    const int unit0 = chunk * UNITS, n = min(UNITS, to.n_units - unit0);
    uint4 *operands = to.operands + ((size_t)group * to.n_units + unit0) * unit_operands(F) + lane;
    float square = 0;
    next_may_start();
    inputs_ready();
    if constexpr (F == F32) {
        float4 v[UNITS];
#pragma unroll
        for (int i = 0; i < UNITS; i++) v[i] = load_normed(in, column, (unit0 + i) * unit_columns(F) + 4 * q, &square);
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
            if (unit < n) *(float4 *)&operands[unit * unit_operands(F)] = v[unit];
    } else {
        // Words of a lane's block, units of four blocks, 16-byte words of a lane's unit.
        constexpr int WORDS = is_quantized(F) ? 2 : 8, N = 4 / unit_blocks(F), FOURS = unit_blocks(F) * WORDS / 4;
        float x[BLOCKS][8], squares[BLOCKS];
        load_blocks<F, BLOCKS>(in, column, chunk * CHUNK, x, squares);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) square += squares[b];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            column_block<F> c[4];
            make_blocks<F, 4>(x + 4 * half, c);
#pragma unroll
            for (int i = 0; i < 4 * WORDS / 4; i++) {
                const int word = 4 * i;
                const uint32_t *at = &c[word / WORDS].b[word % WORDS];
                if (half * N + i / FOURS < n)
                    operands[32 * (half * WORDS + i)] = WORDS == 2 ? make_uint4(at[0], at[1], c[word / WORDS + 1].b[0], c[word / WORDS + 1].b[1])
                                                                   : make_uint4(at[0], at[1], at[2], at[3]);
            }
#pragma unroll
            for (int i = 0; i < 4 * factor_count(F); i++) {
                const int b = i / factor_count(F), k = i % factor_count(F), block = chunk * BLOCKS + half * 4 + b;
                if (q == 0 && half * N + b / unit_blocks(F) < n) to.factors[((size_t)block * factor_count(F) + k) * to.ld + column] = c[b].factors[k];
            }
        }
    }
    square = sum_of_four(square);
    if (q == 0) to.squares[(size_t)chunk * to.ld + column] = square;
}

enum { AT_ONCE = 2 };       // blocks of a multiprocessor whose shared memory is enough: one computes while the other waits

// A block's tile of the result: WR warps of rows by WC of columns; a warp has R tiles of 16 rows and C times 8 columns.
// What it holds of a unit in shared memory, in 16-byte words: for each tile weights and scales, operands, factors.
template <enum format FORMAT, int R_, int C_, int WR_, int WC_> struct stage {
    static constexpr enum format F = FORMAT;
    static constexpr int R = R_, C = C_, WR = WR_, WC = WC_, WARPS = WR * WC, TILES = WR * R, GROUPS = WC * C, COLUMNS = 8 * GROUPS;
    static constexpr int TILE_WORDS = unit_weights(F) + unit_scales(F), OPERANDS = TILES * TILE_WORDS, FACTORS = OPERANDS + GROUPS * unit_operands(F);
    static constexpr int WORDS = FACTORS + unit_blocks(F) * factor_count(F) * COLUMNS / 4;
    static constexpr int STAGES = R * C >= 8 ? 3 : 5;  // small tiles are done before the next one but one is there
    // At the end, results [WC groups of 8 columns][LD] and factors [COLUMNS] stand there; LD is so that lanes write to different banks.
    static constexpr int LD = TILES * TILE + 4, RESULT_BYTES = (8 * WC * LD + COLUMNS) * 4;
    static constexpr int BYTES = STAGES * WORDS * 16 > RESULT_BYTES ? STAGES * WORDS * 16 : RESULT_BYTES;
    static_assert(BYTES <= 64 << 10, "Turing has so much");
};

// Two blocks of a plane, its lanes' words side by side; a lane's bytes are 4 BITS.
template <int BITS> DEVICE void copy_plane(uint4 *to, const uint4 *plane, int pair) {
    const int lane = threadIdx.x;
    if constexpr (BITS == 1) copy_async<4>((unsigned *)to + lane, (const unsigned *)plane + pair);
    else if constexpr (BITS == 2) copy_async<8>((uint2 *)to + lane, (const uint2 *)(plane + pair / 2 * 32) + pair % 2);
    else
#pragma unroll
        for (int i = 0; i < BITS / 4; i++) copy_async<16>(to + 32 * i + lane, plane + (pair * BITS / 4 + i) * 32);
}

// Where a thread copies from: everything that does not depend on the unit. A warp copies a tile and some groups of columns.
template <class S> struct source {
    static constexpr enum format F = S::F;
    static constexpr int OWN_TILES = (S::TILES + S::WARPS - 1) / S::WARPS;
    const uint4 *tile[OWN_TILES], *scales[OWN_TILES], *operands;
    const float *factors;
    int n_units;
    unsigned ld;

    __device__ __forceinline__ source(const weights &w, const prepared &x, int tile0, int group0) : n_units(x.n_units), ld((unsigned)x.ld) {
        const int last = ceil_div(w.rows, TILE) - 1, thread = (int)(threadIdx.y * 32 + threadIdx.x), lane = threadIdx.x;
#pragma unroll
        for (int i = 0; i < OWN_TILES; i++) {
            // Behind the last tile: computed, not stored.
            const size_t first = (size_t)min(tile0 + (int)threadIdx.y + i * S::WARPS, last) * w.n_chunks;
            tile[i] = w.data + first * chunk_words(F) + lane;
            scales[i] = (const uint4 *)(w.scales + first * scale_words(F) * TILE) + lane % 4;
        }
        operands = x.operands + (size_t)group0 * x.n_units * unit_operands(F) + lane;
        factors = x.factors + group0 * 8 + thread % (S::COLUMNS / 4) * 4;
    }

    // A unit's weights, which are there from the start.
    __device__ __forceinline__ void copy_tiles(uint4 *to, int unit) const {
        constexpr int PER_CHUNK = CHUNK / unit_columns(F);
        const int lane = threadIdx.x, pair = unit % PER_CHUNK, chunk = unit / PER_CHUNK;
#pragma unroll
        for (int t = 0; t < OWN_TILES; t++) {
            const int own = (int)threadIdx.y + t * S::WARPS;
            if (S::TILES % S::WARPS && own >= S::TILES) continue;
            uint4 *tile_to = to + own * S::TILE_WORDS;
            if constexpr (is_quantized(F)) {
                const uint4 *from = tile[t] + chunk * chunk_words(F);
                copy_plane<low_bits(F)>(tile_to, from, pair);
                if constexpr (high_bits(F) > 0) copy_plane<high_bits(F)>(tile_to + 8 * low_bits(F), from + 32 * low_bits(F), pair);
                // Rows of the chunk's scales: (K formats) the two of the block of 256, then the word with this unit's scales, and minima.
                constexpr int per_word = group_scales<F, 2>::per_word, K = is_k(F);
                const int i = lane / 4, row = i < K ? 0 : K + (i - K) * (BLOCKS / per_word) + 2 * pair / per_word;
                if (lane < unit_scales(F))
                    copy_async<16>(tile_to + unit_weights(F) + lane, scales[t] + (chunk * scale_words(F) + row) * (TILE / 4));
            } else {
#pragma unroll
                for (int i = 0; i < unit_weights(F); i += 32) copy_async<16>(tile_to + i + lane, tile[t] + unit * unit_weights(F) + i);
            }
        }
    }

    // Its columns.
    __device__ __forceinline__ void copy_columns(uint4 *to, int unit) const {
        const int thread = (int)threadIdx.y * 32 + (int)threadIdx.x;
#pragma unroll
        for (int i = 0; i < (S::GROUPS + S::WARPS - 1) / S::WARPS; i++) {
            const int group = S::WARPS - 1 - (int)threadIdx.y + i * S::WARPS;  // first the warps that may have no tile
            if (S::GROUPS % S::WARPS && group >= S::GROUPS) continue;
            const uint4 *from = operands + (group * n_units + unit) * unit_operands(F);
#pragma unroll
            for (int k = 0; k < unit_operands(F); k += 32) copy_async<16>(to + S::OPERANDS + group * unit_operands(F) + k + threadIdx.x, from + k);
        }
        constexpr int FOURS = S::COLUMNS / 4, N = S::WORDS - S::FACTORS;
#pragma unroll
        for (int i = 0; i < N; i += 32 * S::WARPS)
            if (i + thread < N) copy_async<16>(to + S::FACTORS + i + thread, factors + (size_t)(unsigned)(unit * (N / FOURS) + (i + thread) / FOURS) * ld);
    }
};

// A tile's unit of this lane, from shared memory.
template <enum format F> DEVICE void load_unit(const uint4 *tile, int unit, fragment<F, unit_blocks(F)> *a) {
    constexpr int low = is_quantized(F) ? low_bits(F) : 8, high = is_quantized(F) ? high_bits(F) : 0;  // words of the lane
    const int lane = threadIdx.x, g = lane / 4;
    uint32_t *words = a->weights.words;
    if constexpr (low == 2) {
        const uint2 two = ((const uint2 *)tile)[lane];
        words[0] = two.x, words[1] = two.y;
    }
#pragma unroll
    for (int i = 0; i < low / 4; i++) {
        const uint4 four = tile[32 * i + lane];
        words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < high; i++) words[low + i] = ((const uint32_t *)(tile + 8 * low))[high * lane + i];
    if constexpr (is_quantized(F)) {
        const unsigned *scales = (const unsigned *)(tile + unit_weights(F)) + g;
#pragma unroll
        for (int i = 0; i < 2; i++) a->scales[i].take(scales + 8 * i, unit * unit_blocks(F));
    }
}

template <class S> DEVICE void multiply_unit(const uint4 *shared, int unit, sums<S::F> part[S::R][S::C]) {
    constexpr enum format F = S::F;
    constexpr int R = S::R, C = S::C;
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4, tile0 = (int)threadIdx.y % S::WR * R, group0 = (int)threadIdx.y / S::WR * C;
    const uint4 *tiles = shared + tile0 * S::TILE_WORDS, *operands = shared + S::OPERANDS + group0 * unit_operands(F);
    if constexpr (F == F32) {
        float4 a[R][2];
#pragma unroll
        for (int i = 0; i < 2 * R; i++) a[i / 2][i % 2] = floats_of(tiles[i / 2 * S::TILE_WORDS + q * TILE + g + i % 2 * 8]);
#pragma unroll
        for (int j = 0; j < 8 * C; j++) {
            const float4 x = floats_of(operands[j * 4 + q]);
#pragma unroll
            for (int i = 0; i < 2 * R; i++) {
                float *sum = &part[i / 2][j / 8].v[i % 2 * 8 + j % 8];
                *sum = dot4(a[i / 2][i % 2], x, *sum);
            }
        }
    } else {
        // P groups of 8 columns are multiplied side by side.
        constexpr int N = unit_blocks(F), K = factor_count(F), WORDS = is_quantized(F) ? 2 : 8, P = C > 1 ? 2 : 1;
        fragment<F, N> a[R];
#pragma unroll
        for (int r = 0; r < R; r++) load_unit<F>(tiles + r * S::TILE_WORDS, unit, &a[r]);
#pragma unroll
        for (int c0 = 0; c0 < C; c0 += P) {
            uint32_t words[P][N * WORDS];
#pragma unroll
            for (int i = 0; i < P * N * WORDS / 4; i++) {
                const int c = i / (N * WORDS / 4), k = i % (N * WORDS / 4);
                const uint4 four = operands[(c0 + c) * unit_operands(F) + 32 * k + lane];
                words[c][4 * k] = four.x, words[c][4 * k + 1] = four.y, words[c][4 * k + 2] = four.z, words[c][4 * k + 3] = four.w;
            }
#pragma unroll
            for (int b = 0; b < N; b++) {
                operand<F> x[P];
                float *sums[R][P];
#pragma unroll
                for (int c = 0; c < P; c++) {
                    const float *factors = (const float *)(shared + S::FACTORS) + b * K * S::COLUMNS + (group0 + c0 + c) * 8 + 2 * q;
#pragma unroll
                    for (int i = 0; i < WORDS; i++) x[c].b[i] = words[c][b * WORDS + i];
#pragma unroll
                    for (int i = 0; i < K; i++) {
                        const float2 two = *(const float2 *)(factors + i * S::COLUMNS);
                        x[c].factors[i][0] = two.x, x[c].factors[i][1] = two.y;
                    }
#pragma unroll
                    for (int r = 0; r < R; r++) sums[r][c] = part[r][c0 + c].v;
                }
                multiply<F, N, R, P>(a, b, x, sums);
            }
        }
    }
}

// blockIdx.x: columns, y: rows, z: slices. Shared: stages, of which all but one are on their way. parts: NULL, or where blocks that
// have not all slices leave the sums of each one, [slices][columns][tiles * TILE].
template <class S>
__global__ void __launch_bounds__(32 * S::WARPS, AT_ONCE)
    product_tiles(const weights w, const prepared x, const input in, const output out, float *parts) {
    constexpr enum format F = S::F;
    constexpr int R = S::R, C = S::C, WR = S::WR, WC = S::WC;
    DYNAMIC_SHARED(uint4, shared);
    const int n_slices = slice_count(w.n_chunks), per = slice_chunks(w.n_chunks) * (CHUNK / unit_columns(F));
    const int slice0 = n_slices * (int)blockIdx.z / (int)gridDim.z, slice1 = n_slices * ((int)blockIdx.z + 1) / (int)gridDim.z;
    const int tile0 = (int)blockIdx.y * S::TILES, group0 = (int)blockIdx.x * S::GROUPS, end = min(slice1 * per, x.n_units);
    const int g = threadIdx.x / 4, q = threadIdx.x % 4, warp_row = (int)threadIdx.y % WR, warp_column = (int)threadIdx.y / WR;
    const source<S> from(w, x, tile0, group0);
    volatile float total[R][C][4];  // in memory: it is used once a slice, and registers are few
#pragma unroll
    for (int i = 0; i < R * C * 4; i++) total[i / 4 / C][i / 4 % C][i % 4] = 0;
    int unit = slice0 * per;
    next_may_start();
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++)
        if (unit + i < end) from.copy_tiles(shared + i * S::WORDS, unit + i);
    inputs_ready();
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++) {
        if (unit + i < end) from.copy_columns(shared + i * S::WORDS, unit + i);
        copies_end();
    }
    uint4 *now = shared, *last = shared + (S::STAGES - 1) * S::WORDS;
    for (int slice = slice0; slice < slice1; slice++) {
        sums<F> part[R][C] = {};
        for (const int slice_end = min(unit + per, end); unit < slice_end; unit++) {
            copies_wait<S::STAGES - 2>();
            __syncthreads();  // this unit is there, and nobody uses the stage of the last one any more
            if (unit + S::STAGES - 1 < end) {
                from.copy_tiles(last, unit + S::STAGES - 1);
                from.copy_columns(last, unit + S::STAGES - 1);
            }
            copies_end();
            multiply_unit<S>(now, unit, part);
            last = now;
            now = now == shared + (S::STAGES - 1) * S::WORDS ? shared : now + S::WORDS;
        }
        float own[R][C][4];
#pragma unroll
        for (int i = 0; i < R * C; i++) own_sums<F>(part[i / C][i % C], own[i / C][i % C]);
        if (!parts) {
#pragma unroll
            for (int i = 0; i < R * C * 4; i++) {
                const int r = i / 4 / C, c = i / 4 % C, k = i % 4;
                total[r][c][k] = total[r][c][k] + own[r][c][k];
            }
            continue;
        }
        const int ld = ceil_div(w.rows, TILE) * TILE, row = (tile0 + warp_row * R) * TILE + g, column = (group0 + warp_column * C) * 8 + 2 * q;
        float *to = parts + ((size_t)slice * in.n + column) * ld + row;
#pragma unroll
        for (int i = 0; i < R * C * 4; i++) {
            const int r = i / 4 / C * TILE + i % 4 / 2 * 8, c = i / 4 % C * 8 + i % 2;
            if (row + r < w.rows && column + c < in.n) to[(size_t)c * ld + r] = own[i / 4 / C][i / 4 % C][i % 4];
        }
    }
    if (parts) return;
    // Results go through shared memory, each warp's groups of columns in turn, and from there row after row: a thread has one row.
    constexpr int ROWS = S::TILES * TILE, LD = S::LD, STEP = 32 * S::WARPS / ROWS;
    static_assert(32 * S::WARPS % ROWS == 0, "a thread has one row");
    float *results = (float *)shared, *factors = results + 8 * WC * LD;
    const int thread = (int)threadIdx.y * 32 + (int)threadIdx.x, own_row = thread % ROWS, row = tile0 * TILE + own_row;
    __syncthreads();
    if (thread < S::COLUMNS && group0 * 8 + thread < in.n) factors[thread] = norm_factor(in, x.squares + group0 * 8 + thread, x.ld, w.n_chunks);
#pragma unroll
    for (int c = 0; c < C; c++) {
#pragma unroll
        for (int i = 0; i < R * 4; i++)
            results[(warp_column * 8 + 2 * q + i % 2) * LD + (warp_row * R + i / 4) * TILE + g + i % 4 / 2 * 8] = total[i / 4][c][i % 4];
        __syncthreads();
#pragma unroll 2
        for (int i = thread / ROWS; i < 8 * WC && row < w.rows; i += STEP) {
            const int local = (i / 8 * C + c) * 8 + i % 8, column = group0 * 8 + local;
            if (column < in.n) store(out, row, column, results[i * LD + own_row] * factors[local]);
        }
        __syncthreads();
    }
}

// A thread an output; blockIdx.y: column.
__global__ void __launch_bounds__(128) add_slices(const float *parts, const float *squares, int ld_squares, const input in, const output out,
                                                  int rows, int n_slices, int n_chunks) {
    const int row = (int)(blockIdx.x * 128 + threadIdx.x), column = (int)blockIdx.y;
    const size_t ld_parts = (size_t)(ceil_div(rows, TILE) * TILE);
    float v = 0;
    next_may_start();
    inputs_ready();
    if (row >= rows) return;
    for (int s = 0; s < n_slices; s++) v += parts[((size_t)s * in.n + column) * ld_parts + row];
    store(out, row, column, v * norm_factor(in, squares + column, ld_squares, n_chunks));
}

// ====================================================================================================================
// The rest of a layer, for prompts.
// ====================================================================================================================

struct span {               // the new tokens of one sequence
    int slot, token0, n;
};

DEVICE float4 fma4(float4 a, float4 b, float4 c) {
    return make_float4(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y), fmaf(a.z, b.z, c.z), fmaf(a.w, b.w, c.w));
}

// u = silu(convolution of x), a thread for four channels of a token; what pads the channels is zero and stays so. x [tokens][ld], the
// products of in_proj. Does not move the state, which the first tokens of every span read: scan_tokens does.
__global__ void __launch_bounds__(128) conv_tokens(const conv c, const float *x, const int *slots, const int *positions, float *u, int ld) {
    const int channel = 4 * (int)(blockIdx.x * 128 + threadIdx.x), token = (int)blockIdx.y, position = positions[token];
    next_may_start();
    inputs_ready();
    if (channel >= c.n) return;
    const float *state = c.state + (size_t)slots[token] * c.slot_floats + channel, *now = x + (size_t)token * ld + channel;
    float4 sum = load4(c.b + channel);
#pragma unroll 4
    for (int i = 0; i < c.d_conv; i++) {
        const int back = c.d_conv - 1 - i;  // tokens
        const float4 v = load4(back <= position ? now - (ptrdiff_t)back * ld : state + (size_t)(position + i) * c.ld);
        sum = fma4(load4(c.w + (size_t)i * c.ld + channel), v, sum);
    }
    *(float4 *)(u + (size_t)token * ld + channel) = make_float4(silu(sum.x), silu(sum.y), silu(sum.z), silu(sum.w));
}

// The last inputs of a span become the state, in rising order: what is read later is not written before.
DEVICE void move_conv_state(const conv &c, const float *x, int ld, span s, int channel) {
    float *state = c.state + (size_t)s.slot * c.slot_floats + channel;
    for (int i = 0; i < c.d_conv - 1; i++) {
        const int t = s.n - (c.d_conv - 1) + i;
        state[(size_t)i * c.ld] = t >= 0 ? x[(size_t)(s.token0 + t) * ld + channel] : state[(size_t)(s.n + i) * c.ld];
    }
}

// The selective scan over the tokens of each span, in order, so that cuts of a prompt do not change a bit. A block has 16
// channels, SCAN_LANES lanes each with PER_LANE states in registers, and goes from tile to tile of tokens: one is in shared memory
// while the next is copied. Only one multiply-add a token and state waits for the token before.
enum { SCAN_CHANNELS = 16, SCAN_THREADS = SCAN_CHANNELS * SCAN_LANES, SCAN_GROUP = 8 };

template <int STATES> struct scan_tile {  // states of a channel, padded
    static constexpr int TOKENS = STATES <= 16 ? 32 : STATES <= 64 ? 16 : 8;
    float dt[TOKENS][SCAN_CHANNELS], u[TOKENS][SCAN_CHANNELS], gate[TOKENS][SCAN_CHANNELS];
    float b[TOKENS][STATES], c[TOKENS][STATES];  // zero behind the last state
};

// n tokens from token0 on, of the block's channels. Behind them stand tokens that leave a state as it is to the bit: h = 1 h - 0.
template <int STATES> DEVICE void copy_scan_tile(scan_tile<STATES> *to, const scan &s, const float *dt, int token0, int n) {
    constexpr int TOKENS = scan_tile<STATES>::TOKENS, FOURS = SCAN_CHANNELS / 4, PARTS = STATES / 4;
    static_assert(TOKENS * FOURS <= SCAN_THREADS, "a thread copies four channels of a token");
    const int thread = (int)threadIdx.x, t = thread / FOURS, four = thread % FOURS * 4;
    if (t < n) {
        const size_t at = (size_t)(token0 + t) * s.ld_u + (size_t)blockIdx.x * SCAN_CHANNELS + four;
        copy_async<16>(&to->dt[t][four], dt + at);
        copy_async<16>(&to->u[t][four], s.u + at);
        copy_async<16>(&to->gate[t][four], s.gate + at);
    } else if (t < TOKENS) {
        *(float4 *)&to->dt[t][four] = *(float4 *)&to->gate[t][four] = make_float4(0, 0, 0, 0);
        *(float4 *)&to->u[t][four] = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
    }
    const float *bc = s.bc + (size_t)token0 * 2 * s.d_state;
#pragma unroll
    for (int i = thread; i < TOKENS * PARTS; i += SCAN_THREADS) {  // four states of a token
        const int token = i / PARTS, state = i % PARTS * 4;
        const float *b = bc + token * 2 * s.d_state + state;
        if (s.d_state % 4 == 0 && token < n && state < s.d_state) {
            copy_async<16>(&to->b[token][state], b);
            copy_async<16>(&to->c[token][state], b + s.d_state);
            continue;
        }
#pragma unroll 1
        for (int k = 0; k < 4; k++) {
            const bool exists = token < n && state + k < s.d_state;
            if (exists) copy_async<4>(&to->b[token][state + k], b + k);
            else to->b[token][state + k] = 0;
            if (exists) copy_async<4>(&to->c[token][state + k], b + s.d_state + k);
            else to->c[token][state + k] = 0;
        }
    }
    copies_end();
}

// The sums of a channel's lanes for SCAN_GROUP tokens: lane j gets that of token j % SCAN_GROUP. Lanes exchange halves of what they
// still have; each sum is made in the order of scan_step().
DEVICE float scan_sums(const float part[SCAN_GROUP], int j) {
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        four[i] = (j & 1 ? part[2 * i + 1] : part[2 * i]) + __shfl_xor_sync(WHOLE_WARP, j & 1 ? part[2 * i] : part[2 * i + 1], 1);
#pragma unroll
    for (int i = 0; i < 2; i++)
        two[i] = (j & 2 ? four[2 * i + 1] : four[2 * i]) + __shfl_xor_sync(WHOLE_WARP, j & 2 ? four[2 * i] : four[2 * i + 1], 2);
    const float sum = (j & 4 ? two[1] : two[0]) + __shfl_xor_sync(WHOLE_WARP, j & 4 ? two[0] : two[1], 4);
    return sum + __shfl_xor_sync(WHOLE_WARP, sum, 8);
}

// dt [tokens][ld_u]; conv_in [tokens][ld_u], the inputs of the convolution, which is over: its state moves on, too.
template <int PER_LANE>
__global__ void __launch_bounds__(SCAN_THREADS, 2) scan_tokens(const scan s, const float *dt, const conv cv, const float *conv_in, const span *spans) {
    constexpr int STATES = PER_LANE * SCAN_LANES, TOKENS = scan_tile<STATES>::TOKENS;
    DYNAMIC_SHARED(scan_tile<STATES>, tiles);  // [2]
    const int j = (int)threadIdx.x % SCAN_LANES, local = (int)threadIdx.x / SCAN_LANES, channel = (int)blockIdx.x * SCAN_CHANNELS + local;
    const span sp = spans[blockIdx.y];
    const size_t at = (size_t)blockIdx.x * s.d_state * 16 + local;
    float *state = s.state + (size_t)sp.slot * s.slot_floats + at, h[PER_LANE], a2[PER_LANE];
    const float d = s.d[channel];
    next_may_start();
    inputs_ready();
    if (sp.n == 1) {  // a sequence that decodes beside a prompt
        scan_step(s, sp.slot, sp.token0, channel, channel < s.n, channel < s.n ? dt[(size_t)sp.token0 * s.ld_u + channel] : 0.0f);
        if (j == 0) move_conv_state(cv, conv_in, s.ld_u, sp, channel);
        return;
    }
    copy_scan_tile<STATES>(tiles, s, dt, sp.token0, min(sp.n, (int)TOKENS));
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int n = j * PER_LANE + i;
        a2[i] = n < s.d_state ? s.a2[at + 16 * n] : 0.0f;
        h[i] = n < s.d_state ? state[16 * n] : 0.0f;
    }
    for (int t0 = 0, now = 0; t0 < sp.n; t0 += TOKENS, now ^= 1) {
        const int n = min(sp.n - t0, (int)TOKENS), n_next = min(sp.n - t0 - n, (int)TOKENS);
        if (n_next > 0) copy_scan_tile<STATES>(tiles + (now ^ 1), s, dt, sp.token0 + t0 + TOKENS, n_next);
        else copies_end();
        copies_wait<1>();
        __syncthreads();
        const scan_tile<STATES> &in = tiles[now];
        for (int t = 0; t < n; t += SCAN_GROUP) {
            float part[SCAN_GROUP] = {};
#pragma unroll
            for (int k = 0; k < SCAN_GROUP; k++) {
                const float step = in.dt[t + k][local], step_u = step * in.u[t + k][local];
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    const int n = j * PER_LANE + i;
                    h[i] = scan_state(h[i], step, step_u, a2[i], in.b[t + k][n], in.c[t + k][n], &part[k]);
                }
            }
            const int own = t + j % SCAN_GROUP;
            const float y = fmaf(d, in.u[own][local], scan_sums(part, j)) * in.gate[own][local];
            if (own < n && j < SCAN_GROUP) s.y[(size_t)(sp.token0 + t0 + own) * s.ld_u + channel] = y;
        }
        __syncthreads();  // nobody uses this tile any more
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int n = j * PER_LANE + i;
        if (n < s.d_state) state[16 * n] = h[i];
    }
    if (j == 0) move_conv_state(cv, conv_in, s.ld_u, sp, channel);
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
    next_may_start();
    inputs_ready();
    norm_row(x + (size_t)blockIdx.x * ld, w, y + (size_t)blockIdx.x * ld, n, eps);
}

// dt [tokens][ld_dt], bc [tokens][2 d_state]; blockIdx.y: 0 dt, 1 B, 2 C
__global__ void __launch_bounds__(32) norm_dt_b_c(float *dt, float *bc, int dt_rank, int d_state, int ld_dt, float eps) {
    const int part = (int)blockIdx.y;
    next_may_start();
    inputs_ready();
    float *row = part ? bc + (size_t)blockIdx.x * 2 * d_state + (part - 1) * d_state : dt + (size_t)blockIdx.x * ld_dt;
    norm_row(row, NULL, row, part ? d_state : dt_rank, eps);
}

// ---- The likeliest token of each row of logits, for greedy decoding: only a few bytes leave the GPU ----

// The better of two: the larger logit, then the smaller id; an id of -1 is none.
DEVICE bool is_better(float logit, int id, float than, int than_id) {
    return id >= 0 && (than_id < 0 || logit > than || (logit == than && id < than_id));
}

// A block a row. banned: bits of tokens that are not drawn.
enum { CHOOSE_THREADS = 1024, CHOOSE_WARPS = CHOOSE_THREADS / 32 };
__global__ void __launch_bounds__(CHOOSE_THREADS) choose_rows(const float *logits, const unsigned *banned, struct device_choice *choices,
                                                              int n_vocab) {
    DYNAMIC_SHARED(float, parts);  // [warps] best, id (as bits), max, poison
    const float *row = logits + (size_t)blockIdx.x * n_vocab;
    const int warp = (int)threadIdx.x / 32;
    next_may_start();
    inputs_ready();
    float best = 0, largest = row[0], poison = 0;  // poison: NaN when something is not finite
    int best_id = -1;
    for (int id = (int)threadIdx.x; id < n_vocab; id += CHOOSE_THREADS) {
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
    for (int w = 1; w < CHOOSE_WARPS; w++) {
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

enum { MAX_PROMPTS = 16 };  // graphs of prompts: a long text has chunks of one or two sizes

struct device {             // owner of all memory on the GPU, of staging and of graphs
    const struct model *m;
    struct device_shape shape;
    struct device_facts facts;
    cudaStream_t stream;
    bool no_bf16;           // Turing: such weights are uploaded as F32
    bool use_graphs;
    bool early_start;       // from Hopper on: kernels are started before the last one has ended
    int n_processors;
    std::vector<device_layer> layers;
    weights head;
    float *norm;            // [ld_model]
    float *conv, *ssm;      // [slots][slot_conv], [slots][slot_ssm]: struct sequence's buffers
    size_t slot_conv, slot_ssm;  // floats
    std::vector<int> free_slots;
    int ld_model, ld_inner, ld_dt;  // of rows that products read: whole chunks
    int ld_state;           // d_inner padded to 16, as the CPU has it
    // [max_tokens][...], as in struct context
    float *x, *normed, *u_in, *u, *gate, *dt_low, *bc, *dt, *y;
    prepared columns;       // of a product; ld is set for each
    float *parts;           // [max_parts] of products whose slices are of several blocks
    size_t max_parts;
    float *logits;          // [max_rows][n_vocab]
    unsigned *banned;       // [n_vocab / 32 + 1] bits
    struct device_choice *choices, *host_choices;  // [max_rows]; the latter pinned
    int *batch;             // [max_tokens] slots, [max_tokens] positions, [max_tokens] spans, [max_rows] rows
    int *host_batch;        // pinned, and so are
    float *host_rows, *host_logits;  // [max_tokens][ld_model], [max_rows][n_vocab]
    struct graph { int n_tokens, n_spans, n_rows, n_seen; cudaGraphExec_t exec; };  // exec: NULL until it pays
    std::vector<graph> graphs;
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
    const int n_tiles = ceil_div(m->rows, TILE), n_chunks = ceil_div(m->cols, CHUNK);
    const size_t data = (size_t)n_chunks * chunk_words(f) * 16, scales = (size_t)n_chunks * scale_words(f) * TILE;  // bytes, words of a tile
    uint4 *to;
    unsigned *to_scales;
    *w = weights{NULL, NULL, m->rows, m->cols, n_chunks, f};
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
    const struct config *c = &d->m->c;
    const size_t tokens = (size_t)d->shape.max_tokens, rows = (size_t)d->shape.max_rows, slots = (size_t)d->shape.max_sequences;
    const size_t model = tokens * (size_t)d->ld_model, inner = tokens * (size_t)d->ld_inner;
    // Operands take at most 4 bytes a float, and are whole tiles of columns. What is added up later has at most so many tiles.
    const size_t most = tokens > rows ? tokens : rows, columns = most > FEW_COLUMNS ? (most + 63) / 64 * 64 : 0;
    const size_t ld = (size_t)(d->ld_model > d->ld_inner ? d->ld_model : d->ld_inner), longest = ld > (size_t)d->ld_dt ? ld : (size_t)d->ld_dt;
    const size_t few_tiles = (size_t)d->n_processors * 64 * 64, outputs = columns * (2 * (size_t)c->d_inner + TILE);
    d->max_parts = MAX_SLICES * (few_tiles < outputs ? few_tiles : outputs);
    return reserve(d, &d->conv, slots * d->slot_conv + 1, e) && reserve(d, &d->ssm, slots * d->slot_ssm, e) && reserve(d, &d->x, model, e) &&
           reserve(d, &d->normed, model, e) && reserve(d, &d->u_in, inner, e) && reserve(d, &d->u, inner, e) && reserve(d, &d->gate, inner, e) &&
           reserve(d, &d->dt_low, tokens * (size_t)d->ld_dt, e) && reserve(d, &d->bc, tokens * 2 * (size_t)c->d_state, e) &&
           reserve(d, &d->dt, inner, e) && reserve(d, &d->y, inner, e) && reserve(d, &d->columns.operands, columns * longest / 4 + 1, e) &&
           reserve(d, &d->columns.factors, columns * longest / BLOCK * 3 + 1, e) && reserve(d, &d->columns.squares, columns * longest / CHUNK + 1, e) &&
           reserve(d, &d->parts, d->max_parts + 1, e) && reserve(d, &d->logits, rows * (size_t)c->n_vocab, e) &&
           reserve(d, &d->banned, (size_t)c->n_vocab / 32 + 1, e) && reserve(d, &d->choices, rows, e) &&
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

// Whether product_few takes n columns: up to 64, where its blocks of 8 columns, each of which reads the weights again, are not many
// for the GPU. Measured on an H200: at 768 channels it is faster up to 64 columns, at 2560 up to 16.
static bool are_few(const struct device *d, int n, int rows) {
    return n <= FEW_COLUMNS || (n <= 8 * FEW_COLUMNS && ceil_div(n, FEW_COLUMNS) * ceil_div(rows, TILE) <= 12 * d->n_processors);
}

template <enum format F> static void launch_few(struct device *d, const weights &w, const input &in, const output &out) {
    const int n_slices = slice_count(w.n_chunks), columns = in.n == 1 ? 1 : FEW_COLUMNS;
    const int ends = ceil_div(columns * TILE * (out.kind == SCAN ? SCAN_LANES : 1), 32);  // warps that have something to do at the end
    const dim3 grid((unsigned)ceil_div(in.n, columns), (unsigned)ceil_div(w.rows, TILE)), threads(32, (unsigned)(ends < n_slices ? n_slices : ends));
    const size_t shared = ((size_t)n_slices * TILE + (in.norm ? (size_t)w.n_chunks : 0)) * FEW_COLUMNS * sizeof(float);
    if (columns == 1) LAUNCH((product_few<F, 1>), grid, threads, shared, d, w, in, out);
    else LAUNCH((product_few<F, FEW_COLUMNS>), grid, threads, shared, d, w, in, out);
}

// Blocks of a product's columns and rows.
template <class S> static dim3 tile_grid(const weights &w, int n) {
    return dim3((unsigned)ceil_div(n, S::COLUMNS), (unsigned)ceil_div(w.rows, S::TILES * TILE));
}

// Slices of their own where there are fewer blocks than the GPU's multiprocessors take.
template <class S> static void launch_tiles(struct device *d, const weights &w, const input &in, const output &out) {
    constexpr enum format F = S::F;
    const int n_slices = slice_count(w.n_chunks);
    dim3 grid = tile_grid<S>(w, in.n);
    const size_t n_parts = (size_t)n_slices * (size_t)in.n * (size_t)ceil_div(w.rows, TILE) * TILE;
    const int z = n_parts <= d->max_parts ? AT_ONCE * d->n_processors / (int)(grid.x * grid.y) : 1;
    grid.z = (unsigned)(z < 1 ? 1 : z > n_slices ? n_slices : z);
    prepared columns = d->columns;
    columns.ld = (int)grid.x * S::COLUMNS;
    columns.n_units = ceil_div(w.cols, unit_columns(F));
    ALLOW_SHARED((product_tiles<S>), S::BYTES);
    LAUNCH(prepare<F>, dim3((unsigned)columns.ld / 8, (unsigned)w.n_chunks), dim3(32), 0, d, in, columns);
    LAUNCH((product_tiles<S>), grid, dim3(32, S::WARPS), S::BYTES, d, w, columns, in, out, grid.z > 1 ? d->parts : NULL);
    if (grid.z > 1)
        LAUNCH(add_slices, dim3((unsigned)ceil_div(w.rows, 128), (unsigned)in.n), dim3(128), 0, d, d->parts, columns.squares, columns.ld, in, out,
               w.rows, n_slices, w.n_chunks);
}

template <enum format F> static void launch_product(struct device *d, const weights &w, const input &in, const output &out) {
    // Scales take registers: then a warp has fewer rows; and those of K formats and Q5_1 so many that a block has fewer warps.
    constexpr int R = is_quantized(F) ? 2 : 4;
    using large = stage<F, R, 4, is_k(F) || F == Q5_1 ? 2 : 8 / R, 2>;
    if (are_few(d, in.n, w.rows)) {
        launch_few<F>(d, w, in, out);
        return;
    }
    if constexpr (F != F32) {  // whose sums take four times the registers
        const dim3 grid = tile_grid<large>(w, in.n);
        if (in.n > 32 && (int)(grid.x * grid.y) >= AT_ONCE * d->n_processors) {  // enough for all multiprocessors
            launch_tiles<large>(d, w, in, out);
            return;
        }
    }
    if (in.n > 32) launch_tiles<stage<F, 2, 2, 2, 4>>(d, w, in, out);
    else launch_tiles<stage<F, 2, 1, 2, 4>>(d, w, in, out);
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

static void launch_scan(struct device *d, const scan &s, const conv &c, int n_spans) {
    const dim3 grid((unsigned)ceil_div(s.n, SCAN_CHANNELS), (unsigned)n_spans);
    const dim3 threads(SCAN_THREADS);
    switch (scan_states(s.d_state)) {
    case 1: LAUNCH(scan_tokens<1>, grid, threads, 2 * sizeof(scan_tile<16>), d, s, d->dt, c, d->u_in, spans_of(d)); break;
    case 4: LAUNCH(scan_tokens<4>, grid, threads, 2 * sizeof(scan_tile<64>), d, s, d->dt, c, d->u_in, spans_of(d)); break;
    case 16: LAUNCH(scan_tokens<16>, grid, threads, 2 * sizeof(scan_tile<256>), d, s, d->dt, c, d->u_in, spans_of(d)); break;
    }
}

// One token of each sequence.
static void launch_steps(struct device *d, const scan &s, int n_tokens) {
    const dim3 grid((unsigned)ceil_div(s.n, STEP_THREADS), (unsigned)n_tokens), threads(STEP_THREADS);
    switch (scan_states(s.d_state)) {
    case 1: LAUNCH(scan_steps<1>, grid, threads, 0, d, s, d->dt, slots_of(d)); break;
    case 4: LAUNCH(scan_steps<4>, grid, threads, 0, d, s, d->dt, slots_of(d)); break;
    case 16: LAUNCH(scan_steps<16>, grid, threads, 0, d, s, d->dt, slots_of(d)); break;
    }
}

// x += out_proj(scan(conv(in_proj(norm(x)))))
static void run_layer(struct device *d, int i, int n_tokens, int n_spans) {
    const bool one_each = n_tokens == n_spans;  // every sequence has one token
    const struct config *c = &d->m->c;
    const device_layer *l = &d->layers[(size_t)i];
    const size_t layer = (size_t)i;
    const conv cv = {l->conv_w, l->conv_b, d->conv + layer * (size_t)(c->d_conv - 1) * (size_t)d->ld_state, d->slot_conv, c->d_conv, c->d_inner,
                     d->ld_state};
    const scan sc = {l->a2, l->d, l->dt_b, d->ssm + layer * (size_t)d->ld_state * (size_t)c->d_state, d->u, d->gate, d->bc, d->y, d->slot_ssm,
                     c->d_state, c->d_inner, d->ld_inner};
    const input x = {d->x, NULL, l->norm, n_tokens, d->ld_model, c->d_model, c->norm_eps};
    const input u = {d->u, NULL, NULL, n_tokens, d->ld_inner, 0, 0}, dt_low = {d->dt_low, NULL, NULL, n_tokens, d->ld_dt, 0, 0};
    const input y = {d->y, NULL, NULL, n_tokens, d->ld_inner, 0, 0};
    const dim3 channels((unsigned)ceil_div(c->d_inner, 4 * 128), (unsigned)n_tokens);
    float *in_to = one_each ? d->u : d->u_in;
    product(d, l->in, x, output{one_each ? CONV : GATE, in_to, d->gate, c->d_inner, d->ld_inner, d->ld_inner, slots_of(d), cv, sc});
    if (!one_each) LAUNCH(conv_tokens, channels, dim3(128), 0, d, cv, d->u_in, slots_of(d), positions_of(d), d->u, d->ld_inner);
    product(d, l->x, u, output{STORE, d->dt_low, d->bc, c->dt_rank, d->ld_dt, 2 * c->d_state, NULL, cv, sc});
    if (c->dt_b_c_rms)
        LAUNCH(norm_dt_b_c, dim3((unsigned)n_tokens, 3), dim3(32), 0, d, d->dt_low, d->bc, c->dt_rank, c->d_state, d->ld_dt, c->dt_b_c_eps);
    product(d, l->dt, dt_low, output{one_each && n_tokens == 1 ? SCAN : STEP, d->dt, NULL, c->d_inner, d->ld_inner, 0, slots_of(d), cv, sc});
    if (!one_each) launch_scan(d, sc, cv, n_spans);
    else if (n_tokens > 1) launch_steps(d, sc, n_tokens);
    product(d, l->out, y, output{ADD, d->x, NULL, c->d_model, d->ld_model, 0, NULL, cv, sc});
}

// Logits of the rows that the batch names, of the normed residual stream.
static void run_head(struct device *d, int n_rows) {
    const struct config *c = &d->m->c;
    const input in = {d->x, rows_of(d), d->norm, n_rows, d->ld_model, c->d_model, c->norm_eps};
    product(d, d->head, in, output{STORE, d->logits, NULL, c->n_vocab, c->n_vocab, 0, NULL, {}, {}});
}

static void run_layers(struct device *d, int n_tokens, int n_spans, int n_layers, int n_rows) {
    for (int i = 0; i < n_layers; i++) run_layer(d, i, n_tokens, n_spans);
    if (n_layers == d->m->c.n_layer && n_rows) run_head(d, n_rows);
}

// What is known of forwards of this size. NULL: it is a prompt, and there are MAX_PROMPTS graphs of prompts.
static device::graph *graph_entry(struct device *d, int n_tokens, int n_spans, int n_rows) {
    const bool is_prompt = n_tokens > n_spans;
    int prompts = 0, oldest = -1;  // of prompts, that without a graph which came first
    for (size_t i = 0; i < d->graphs.size(); i++) {
        device::graph &g = d->graphs[i];
        if (g.n_tokens == n_tokens && g.n_spans == n_spans && g.n_rows == n_rows) return &g;
        if (g.n_tokens == g.n_spans) continue;
        prompts++;
        if (!g.exec && oldest < 0) oldest = (int)i;
    }
    if (is_prompt && prompts == MAX_PROMPTS) {
        if (oldest < 0) return NULL;
        d->graphs.erase(d->graphs.begin() + oldest);
    }
    d->graphs.push_back({n_tokens, n_spans, n_rows, 0, NULL});
    return &d->graphs.back();
}

// A graph takes memory of the driver's own: where there is none left, this and later forwards start kernel by kernel. What is wrong with
// the GPU itself is said again by the next call.
static void give_up_graphs(struct device *d) {
    d->use_graphs = false;
    cudaGetLastError();
}

// The graph of a forward, which takes less of the CPU than its kernels one by one: made when a step of decoding first comes in this
// size, and when a prompt comes for the third time, as the chunks of a long text do. NULL: there is none, or the driver cannot make it.
static cudaGraphExec_t forward_graph(struct device *d, int n_tokens, int n_spans, int n_rows) {
    device::graph *g = graph_entry(d, n_tokens, n_spans, n_rows);
    if (!g) return NULL;
    if (g->exec || (++g->n_seen < 3 && n_tokens > n_spans)) return g->exec;
    cudaGraph_t captured = NULL;
    bool made = cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (made) {
        run_layers(d, n_tokens, n_spans, d->m->c.n_layer, n_rows);
        made = cudaStreamEndCapture(d->stream, &captured) == cudaSuccess && cudaGraphInstantiate(&g->exec, captured, 0) == cudaSuccess;
    }
    if (captured) cudaGraphDestroy(captured);
    if (made) return g->exec;
    give_up_graphs(d);
    return g->exec = NULL;
}

// A whole forward.
static void run_forward(struct device *d, int n_tokens, int n_spans, int n_rows) {
    const cudaGraphExec_t exec = d->use_graphs ? forward_graph(d, n_tokens, n_spans, n_rows) : NULL;
    if (exec) {
        if (cudaGraphLaunch(exec, d->stream) == cudaSuccess) return;
        give_up_graphs(d);
    }
    run_layers(d, n_tokens, n_spans, d->m->c.n_layer, n_rows);
}

static bool fetch_logits(struct device *d, int n_rows, float *logits, int ld_logits, struct error *e) {
    const size_t n_vocab = (size_t)d->m->c.n_vocab;
    if (n_rows && !ok(cudaMemcpyAsync(d->host_logits, d->logits, (size_t)n_rows * n_vocab * sizeof(float), cudaMemcpyDeviceToHost, d->stream),
                      "copying logits", e))
        return false;
    if (!ok(cudaGetLastError(), "starting a kernel", e)) return false;
    if (n_rows && !ok(cudaStreamSynchronize(d->stream), "running the model", e)) return false;
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
    cudaFuncAttributes kernels;
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
    if (10 * major + minor < 75)
        return set_error(e, "the GPU has compute capability %d.%d; 7.5 (Turing) or later is needed", major, minor);
    const cudaError_t code = cudaFuncGetAttributes(&kernels, norm_tokens);  // other errors come again in device_open()
    if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction)
        return set_error(e, "this program has no code for a GPU of compute capability %d.%d: build it with make cuda ARCHS=%d%d", major, minor,
                         major, minor);
    return true;
}

bool device_runs(const struct model *m, struct error *e) {
    bool plain = !m->c.n_pools && !m->c.layer_norm && !m->c.zoh && !m->head_b;
    for (int i = 0; i < m->c.n_layer; i++) plain &= !m->layers[i].s4 && !m->layers[i].is_complex;
    if (!plain) return set_error(e, "audio U-Nets run on the CPU alone");
    if (m->c.d_state > 256) return set_error(e, "d_state is %d; the GPU takes up to 256", m->c.d_state);
    if (m->c.n_vocab > 1000000 || m->c.d_inner > 500000 || m->c.dt_rank > 500000 || m->c.d_model > 250000)
        return set_error(e, "a matrix is too large for the GPU: more than a million rows, or 250000 columns of the residual stream");
    return true;
}

void device_close(struct device *d) {
    if (!d) return;
    for (const auto &g : d->graphs)
        if (g.exec) cudaGraphExecDestroy(g.exec);
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
    const auto whole_chunks = [](int n) { return ceil_div(n, CHUNK) * CHUNK; };
    const char *graphs = getenv("MAMBA_CUDA_GRAPHS");  // 0: none, to look for errors
    int driver = 0, clock = 0, width = 0;
    cudaDeviceProp properties;
    cudaFuncAttributes kernels;  // what they were compiled for, which may be older than the GPU
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
    d->slot_conv = c->conv_floats;
    d->slot_ssm = c->ssm_floats;
    for (int i = 0; i < shape.max_sequences; i++) d->free_slots.push_back(i);  // taken from the end: what is read behind a state is seen
    if (ok(cudaSetDevice(0), "being started", e) && ok(cudaStreamCreate(&d->stream), "being started", e) &&
        ok(cudaGetDeviceProperties(&properties, 0), "being asked for its name", e) &&
        ok(cudaDeviceGetAttribute(&d->n_processors, cudaDevAttrMultiProcessorCount, 0), "being asked for its size", e) &&
        ok(cudaFuncGetAttributes(&kernels, norm_tokens), "being asked for its kernels", e)) {
        d->no_bf16 = kernels.ptxVersion < 80;
        cudaDriverGetVersion(&driver);
        d->early_start = kernels.ptxVersion >= 90 && driver >= 12030;  // inputs_ready() waits; graphs of older drivers do not know it
        if (take_memory(d, unpack, e)) {
            cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, 0);  // kHz; twice that many transfers
            cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, 0);
            cudaGetLastError();  // without them a figure is missing; kernels do not fail for it
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
    if (!ok(cudaStreamSynchronize(d->stream), "running the model", e)) return false;  // the last forward may still read its batch
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
    if (!ok(cudaMemcpyAsync(d->batch, d->host_batch, (5 * (size_t)max_tokens + (size_t)d->shape.max_rows) * sizeof(int), cudaMemcpyHostToDevice,
                            d->stream), "copying a batch", e) ||
        !ok(cudaMemcpyAsync(d->x, d->host_rows, (size_t)n_tokens * d->ld_model * sizeof(float), cudaMemcpyHostToDevice, d->stream),
            "copying a batch", e))
        return false;
    if (n_layers == d->m->c.n_layer) run_forward(d, n_tokens, n_segments, n_rows);
    else run_layers(d, n_tokens, n_segments, n_layers, n_rows);
    return fetch_logits(d, logits ? n_rows : 0, logits, ld_logits, e);
}

bool device_choose(struct device *d, int n_rows, struct device_choice *choices, struct error *e) {
    LAUNCH(choose_rows, dim3((unsigned)n_rows), dim3(CHOOSE_THREADS), CHOOSE_WARPS * 4 * sizeof(float), d, d->logits, d->banned, d->choices,
           d->m->c.n_vocab);
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
    if (!ok(cudaStreamSynchronize(d->stream), "running the model", e)) return false;  // as in device_forward
    memcpy(d->host_batch + at, tokens, (size_t)n * sizeof(int));
    if (!ok(cudaMemcpyAsync(d->batch + at, d->host_batch + at, (size_t)n * sizeof(int), cudaMemcpyHostToDevice, d->stream), "copying a batch", e))
        return false;
    run_head(d, n);
    return fetch_logits(d, n, logits, ld_logits, e);
}

bool device_hidden(struct device *d, bool normed, float *rows, int ld, struct error *e) {
    const struct config *c = &d->m->c;
    const size_t n = (size_t)d->n_tokens * (size_t)d->ld_model;
    if (normed)
        LAUNCH(norm_tokens, dim3((unsigned)d->n_tokens), dim3(32), 0, d, d->x, d->norm, d->normed, c->d_model, d->ld_model, c->norm_eps);
    if (!ok(cudaGetLastError(), "starting a kernel", e) ||
        !ok(cudaMemcpyAsync(d->host_rows, normed ? d->normed : d->x, n * sizeof(float), cudaMemcpyDeviceToHost, d->stream), "copying rows", e) ||
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
