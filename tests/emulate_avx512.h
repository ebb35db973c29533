// The intrinsics of AVX-512 and AVX-VNNI that mamba.c uses, computed with AVX2: so that its kernels for them can be tested, bit by bit,
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
static inline __m256 emulated_extractf32x8_ps(simde__m512 a, int which) {
    emulated v = {.ps = a};
    return v.half[which];
}
static inline simde__m512i emulated_srai_epi32(simde__m512i a, int n) {
    emulated v = {.si = a};
    for (int i = 0; i < 16; i++) v.i[i] >>= n;
    return v.si;
}
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
