// The intrinsics of AVX-512, AVX-VNNI and AMX that mamba.c uses, computed with AVX2: so that its kernels for them can be tested, bit by bit,
// on a machine without those instruction sets. SIMDe (Debian's libsimde-dev) does most of it; the others are here.
//
//   cc -D_GNU_SOURCE -DMAMBA_EMULATE_AVX512 -mavx2 -mfma -mf16c -include tests/emulate_avx512.h ... tests/unit.c
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

typedef union {
    float f[16];
    int32_t i[16];
    simde__m512 ps;
    simde__m512i si;
    __m256 half[2];
} emulated;

static inline simde__m512 emulated_maskz_loadu_ps(unsigned mask, const float *p) {
    emulated v;
    for (int i = 0; i < 16; i++) v.f[i] = mask >> i & 1 ? p[i] : 0;
    return v.ps;
}
static inline void emulated_mask_storeu_ps(float *p, unsigned mask, simde__m512 a) {
    emulated v = {.ps = a};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) p[i] = v.f[i];
}
static inline simde__m512 emulated_cvtph_ps(__m256i h) {
    emulated v;
    v.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    v.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
    return v.ps;
}
static inline __m128i emulated_cvtepi32_epi8(simde__m512i a) {
    emulated v = {.si = a};
    int8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = (int8_t)v.i[i];
    return _mm_loadu_si128((const __m128i *)bytes);
}
static inline __m256i emulated_cvtepi32_epi16(simde__m512i a) {
    emulated v = {.si = a};
    int16_t words[16];
    for (int i = 0; i < 16; i++) words[i] = (int16_t)v.i[i];
    return _mm256_loadu_si256((const __m256i *)words);
}
static inline simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
    emulated v = {.si = a};
    for (int i = 0; i < 16; i++) v.f[i] = (float)v.i[i];
    return v.ps;
}
static inline simde__m512i emulated_cvtps_epi32(simde__m512 a) {
    emulated v = {.ps = a};
    for (int i = 0; i < 16; i++) v.i[i] = _mm_cvtss_si32(_mm_set_ss(v.f[i]));
    return v.si;
}
static inline simde__m512i emulated_cvtepu16_epi32(__m256i a) {
    uint16_t words[16];
    emulated v;
    memcpy(words, &a, sizeof words);
    for (int i = 0; i < 16; i++) v.i[i] = words[i];
    return v.si;
}
static inline simde__m512 emulated_shuffle_ps(simde__m512 a, simde__m512 b, int which) {
    emulated v = {.ps = a}, w = {.ps = b}, to;
    for (int i = 0; i < 16; i++) to.f[i] = (i % 4 < 2 ? v : w).f[i / 4 * 4 + (which >> 2 * (i % 4) & 3)];
    return to.ps;
}
static inline __m256 emulated_extractf32x8_ps(simde__m512 a, int which) {
    emulated v = {.ps = a};
    return v.half[which];
}
static inline simde__m512i emulated_srai_epi32(simde__m512i a, int n) {
    emulated v = {.si = a};
    for (int i = 0; i < 16; i++) v.i[i] >>= n;
    return v.si;
}
#define _mm512_shuffle_ps emulated_shuffle_ps
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_srai_epi32 emulated_srai_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#undef _mm512_madd_epi16  // whose alias has the arguments of another function
#define _mm512_madd_epi16 simde_mm512_madd_epi16

// ---- AMX: eight tile registers a thread, and their shapes. What a program must not do ends it. ----

static _Thread_local struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} emulated_shapes;
static _Thread_local uint8_t emulated_tiles[8][16][64];
static _Thread_local long emulated_tile_products;

static inline void emulated_tile_need(int ok) {
    if (!ok) __builtin_trap();
}
static inline void emulated_tile_loadconfig(const void *config) {  // which is to be released after use
    emulated_tile_need(!emulated_shapes.palette);
    memcpy(&emulated_shapes, config, sizeof emulated_shapes);
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    emulated_tile_need(emulated_shapes.palette == 1 && !emulated_shapes.start_row);
    for (int i = 0; i < 16; i++)
        emulated_tile_need(emulated_shapes.row_bytes[i] <= (i < 8 ? 64 : 0) && emulated_shapes.rows[i] <= (i < 8 ? 16 : 0));
}
static inline void emulated_tile_release(void) { memset(&emulated_shapes, 0, sizeof emulated_shapes); }
static inline void emulated_tile_zero(int to) {
    emulated_tile_need(emulated_shapes.rows[to]);
    memset(emulated_tiles[to], 0, sizeof emulated_tiles[to]);
}
static inline void emulated_tile_loadd(int to, const void *from, int64_t stride) {
    emulated_tile_zero(to);
    for (int r = 0; r < emulated_shapes.rows[to]; r++)
        memcpy(emulated_tiles[to][r], (const uint8_t *)from + r * stride, emulated_shapes.row_bytes[to]);
}
static inline void emulated_tile_stored(int from, void *to, int64_t stride) {
    emulated_tile_need(emulated_shapes.rows[from]);
    for (int r = 0; r < emulated_shapes.rows[from]; r++)
        memcpy((uint8_t *)to + r * stride, emulated_tiles[from][r], emulated_shapes.row_bytes[from]);
}
static inline void emulated_tile_dpbssd(int to, int a, int b) {  // 32-bit sums of four products of signed bytes
    emulated_tile_products++;
    emulated_tile_need(emulated_shapes.rows[a] == emulated_shapes.rows[to] && emulated_shapes.row_bytes[b] == emulated_shapes.row_bytes[to] &&
                       emulated_shapes.row_bytes[a] == 4 * emulated_shapes.rows[b]);
    for (int m = 0; m < emulated_shapes.rows[to]; m++)
        for (int n = 0; n < emulated_shapes.row_bytes[to] / 4; n++) {
            int32_t sum;
            memcpy(&sum, &emulated_tiles[to][m][4 * n], 4);
            for (int k = 0; k < emulated_shapes.row_bytes[a]; k++)
                sum += (int8_t)emulated_tiles[a][m][k] * (int8_t)emulated_tiles[b][k / 4][4 * n + k % 4];
            memcpy(&emulated_tiles[to][m][4 * n], &sum, 4);
        }
}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbssd emulated_tile_dpbssd
