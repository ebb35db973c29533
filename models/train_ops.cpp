// Fused CPU training kernels for Mamba-1: a small shared library that train.py compiles on first use and calls through
// ctypes. It knows nothing of PyTorch, whose headers would take minutes to compile; train.py owns every buffer.
//
//   scan  y = (selective_scan(u, delta, A, B, C) + D*u) * silu(z),  delta = softplus(dt + dt_bias)
//   conv  y = silu(causal depthwise conv1d(x) + bias), width 4
//   norm  y = x * rsqrt(mean(x^2) + eps) * w
//   xent  softmax cross-entropy; the logits are overwritten by the loss gradient
//
// Each replaces a Python loop or a chain of PyTorch calls; the readable definitions are in train.py, and
// `train.py check-ops` compares values and gradients with float64 autograd of those definitions.
//
// Layout is [batch, time, channel]. A vec holds W neighbouring channels, so the recurrence over time needs
// no horizontal work, and the N states of those W channels stay in registers. The forward scan stores the
// state only every T steps; the backward scan recomputes T steps at a time, which fit in the L1/L2 cache.
//
// Activations are float or bfloat16 (template parameter S); states, sums and parameters are always float.
// Vectors are those of GCC and clang, not an instruction set's: the compiler maps a vec to one AVX-512 register or to
// several narrower ones. Sums over threads are added in thread order, so a run repeats bit for bit.
//
// Sections: 1 vectors, 2 tensors as rows, 3 scan, 4 convolution, 5 norm, 6 cross-entropy, 7 what is exported.
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// ---- 1. Vectors ------------------------------------------------------------------------------------------
#ifdef __AVX512F__
constexpr int W = 16;  // channels in a vec: one register. A vec of two registers is several times slower: gcc keeps it in memory
#else
constexpr int W = 8;
#endif
constexpr int T = 16;  // time steps between two stored states
constexpr int N = 16;  // d_state: states a channel
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
struct bf16 {
  uint16_t bits;
};
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

static inline vec splat(float x) { return vec{} + x; }
static inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec load(const bf16* p) {  // bfloat16 is the upper half of a float
  hvec h;
  memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}
static inline void store(bf16* p, vec v) {  // round to nearest, ties to even
  const uvec u = (uvec)v;
  const hvec h = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec);
  memcpy(p, &h, sizeof h);
}
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // rounds as the store of a vec does
  bf16 lanes[W];
  store(lanes, splat(x));
  *p = lanes[0];
}
static inline float sum(vec v) {
  float s[W];
  store(s, v);
  for (int w = W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) s[i] += s[i + w];
  return s[0];
}

// 2^x for x <= 0, relative error about 2e-7; below -126 it returns 2^-126, which every use here takes as zero.
static inline vec exp2_neg(vec x) {
  x = x < -126.f ? splat(-126.f) : x;  // written so that a NaN stays a NaN
  const vec n = (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer
  const vec f = x - n;
  vec p = splat(1.33335581e-3f);
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.f;
  return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}
static inline vec magnitude(vec x) { return (vec)((uvec)x & 0x7fffffffu); }
static inline vec sigmoid(vec x) {
  const vec e = exp2_neg(magnitude(x) * -LOG2E), r = 1.f / (1.f + e);
  return x < 0.f ? e * r : r;
}
// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|) in (0, 1]; log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3,
// by its series, which loses nothing when e is small.
static inline vec softplus(vec x) {
  const vec e = exp2_neg(magnitude(x) * -LOG2E), s = e / (2.f + e), q = s * s;
  vec p = splat(1.f / 13);
  p = p * q + 1.f / 11;
  p = p * q + 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  p = p * q + 1.f;
  return (x < 0.f ? splat(0.f) : x) + 2.f * s * p;
}

// ---- 2. Tensors as rows ----------------------------------------------------------------------------------
// A tensor of activations [batch, len, channels] as train.py describes it. Row (b, t) begins at (b*len + t)*stride, so that a
// slice of a wider tensor needs no copy. half: bfloat16, otherwise float.
struct Tensor {
  void* data;
  int64_t batch, len, channels, stride, half;
};
template <class S> struct Rows {
  S* p;
  int64_t stride;
  S* operator()(int64_t row) const { return p + row * stride; }
};
template <class S> static Rows<S> rows(const Tensor* x) { return {(S*)x->data, x->stride}; }

// Sums a [threads][n] buffer into out[n], in thread order.
static void add_threads(const std::vector<float>& partial, int threads, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) {
    float s = 0.f;
    for (int j = 0; j < threads; j++) s += partial[j * n + i];
    out[i] = s;
  }
}

#define DISPATCH_TYPE(x, ...)                  \
  if ((x)->half) { using S = bf16; __VA_ARGS__; } \
  else { using S = float; __VA_ARGS__; }
#define DISPATCH_SCAN(x, is_complex, ...)                              \
  DISPATCH_TYPE(x, if (is_complex) { using V = Complex; __VA_ARGS__; } \
                   else { using V = Real; __VA_ARGS__; })

// ---- 3. Selective scan -----------------------------------------------------------------------------------
// Shapes, R being 1 for real and 2 for complex states: u, dt, z [B, L, d_inner]; A [d_inner, N, R]; bc [B, L, 2, N, R], B then
// C of each step; D, dt_bias [d_inner]. states [B, chunks, d_inner/W, N, R, W] receives the state before each chunk of T steps.
//   h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t        y_t = C_t . h_t + D u_t       (Mamba, Algorithm 2)
// A complex state stands for itself and its conjugate: y_t = 2 Re(C_t . h_t) + D u_t.
struct ScanShape {
  int batch, len, chunks, blocks;  // blocks of W channels
  explicit ScanShape(const Tensor* u)
      : batch(u->batch), len(u->len), chunks((u->len + T - 1) / T), blocks(u->channels / W) {}
};

// The states of W channels, and what the scan does with them.
struct Real {
  static constexpr int R = 1;
  vec re;
};
struct Complex {
  static constexpr int R = 2;
  vec re, im;
};
static inline Real broadcast(const float* p, Real) { return {splat(p[0])}; }
static inline Complex broadcast(const float* p, Complex) { return {splat(p[0]), splat(p[1])}; }
static inline Real load_state(const float* p, Real) { return {load(p)}; }
static inline Complex load_state(const float* p, Complex) { return {load(p), load(p + W)}; }
static inline void store_state(float* p, Real a) { store(p, a.re); }
static inline void store_state(float* p, Complex a) { store(p, a.re), store(p + W, a.im); }
static inline Real operator+(Real a, Real b) { return {a.re + b.re}; }
static inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
static inline Real operator*(Real a, vec b) { return {a.re * b}; }
static inline Complex operator*(Complex a, vec b) { return {a.re * b, a.im * b}; }
static inline Real operator*(Real a, Real b) { return {a.re * b.re}; }
static inline Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
static inline Real conj(Real a) { return a; }
static inline Complex conj(Complex a) { return {a.re, -a.im}; }
// What C . h adds to y, and the real part of conj(a) b, which gradients of real numbers are sums of.
static inline vec output(Real c, Real h) { return c.re * h.re; }
static inline vec output(Complex c, Complex h) { return 2.f * (c.re * h.re - c.im * h.im); }
static inline vec inner(Real a, Real b) { return a.re * b.re; }
static inline vec inner(Complex a, Complex b) { return a.re * b.re + a.im * b.im; }

// exp(delta A). A is kept as the exponent of a power of two and an angle in turns; in radians and natural units again, a
// gradient with respect to it is multiplied by these.
constexpr float TURN = 6.28318531f;
static inline Real decay(Real a, vec delta) { return {exp2_neg(delta * a.re)}; }
static inline Complex decay(Complex a, vec delta) {
  // sine and cosine of half the angle, at most a quarter turn, by their series; then of the whole one
  const vec turns = delta * a.im, r = (turns - ((turns + 12582912.f) - 12582912.f)) * (TURN / 2), q = r * r;
  vec s = splat(-2.50521084e-8f), c = splat(2.08767570e-9f);
  s = s * q + 2.75573192e-6f, s = s * q - 1.98412698e-4f, s = s * q + 8.33333333e-3f, s = s * q - 1.66666667e-1f;
  s = s * q * r + r;
  c = c * q - 2.75573192e-7f, c = c * q + 2.48015873e-5f, c = c * q - 1.38888889e-3f, c = c * q + 4.16666667e-2f;
  c = c * q - 0.5f, c = c * q + 1.f;
  const vec size = exp2_neg(delta * a.re);
  return {size * (1.f - 2.f * s * s), size * (2.f * s * c)};
}
static inline vec inner_A(Real a, Real e) { return a.re * e.re * LN2; }
static inline vec inner_A(Complex a, Complex e) { return a.re * e.re * LN2 + a.im * e.im * TURN; }

// A in the units of decay(), as [block][N][R][W].
template <class V> static std::vector<float> tile_A(const float* a, int64_t d_inner) {
  constexpr int NR = N * V::R;
  std::vector<float> tiled(d_inner * NR);
  for (int64_t d = 0; d < d_inner; d++)
    for (int64_t i = 0; i < NR; i++) tiled[(d / W * NR + i) * W + d % W] = a[d * NR + i] * (i % V::R ? 1 / TURN : LOG2E);
  return tiled;
}

template <class S, class V>
static void scan_forward(const Tensor* u_, const Tensor* dt_, const float* A, const Tensor* bc_, const float* D,
                         const Tensor* z_, const float* bias, const Tensor* y_, float* states) {
  constexpr int R = V::R;
  const ScanShape s(u_);
  const auto u = rows<S>(u_), dt = rows<S>(dt_), z = rows<S>(z_), y = rows<S>(y_);
  const auto bc = rows<float>(bc_);
  const auto A2 = tile_A<V>(A, u_->channels);
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < s.batch; b++)
    for (int k = 0; k < s.blocks; k++) {
      const int d = k * W;
      const float* a2 = &A2[(size_t)k * N * R * W];
      const vec Dv = load(D + d), bv = load(bias + d);
      V h[N] = {};
      for (int t = 0; t < s.len; t++) {
        if (t % T == 0) {
          float* save = states + (((size_t)b * s.chunks + t / T) * s.blocks + k) * N * R * W;
          for (int n = 0; n < N; n++) store_state(save + n * R * W, h[n]);
        }
        const int64_t r = (int64_t)b * s.len + t;
        const vec uv = load(u(r) + d), delta = softplus(load(dt(r) + d) + bv), du = delta * uv;
        const float* BC = bc(r);
        vec yv = Dv * uv;
#pragma GCC unroll 16  // so that h stays in registers
        for (int n = 0; n < N; n++) {
          h[n] = decay(load_state(a2 + n * R * W, V{}), delta) * h[n] + broadcast(BC + n * R, V{}) * du;
          yv += output(broadcast(BC + (N + n) * R, V{}), h[n]);
        }
        const vec zv = load(z(r) + d);
        store(y(r) + d, yv * zv * sigmoid(zv));
      }
    }
}

// One chunk of T steps of one block of W channels, recomputed for the backward pass.
template <class V> struct Chunk {
  V h[T + 1][N];                         // states; h[0] is the one before the chunk
  V decay[T][N];                         // exp(delta A)
  vec delta[T], gate[T], u[T], dy[T];    // gate = sigmoid(dt + bias) = d delta / d dt; dy = dLoss / dy_t before the gate
};

// Gradients. With g_t = dLoss/dh_t = dy_t C_t* + decay_(t+1)* g_(t+1), where * conjugates and a gradient with respect to a
// complex number is that of its real part plus i times that of its imaginary part (dy_t counts twice for complex states):
//   dC_t = dy_t h_t*   dB_t = g_t delta_t u_t   du_t = Re(g_t* B_t) delta_t + D dy_t   dA = sum_t g_t (h_(t-1) decay_t)* delta_t
//   ddelta_t = Re(g_t* B_t) u_t + sum_n Re(g_t* h_(t-1) decay_t A)
template <class S, class V>
static void scan_backward(const Tensor* gy_, const Tensor* u_, const Tensor* dt_, const float* A, const Tensor* bc_,
                          const float* D, const Tensor* z_, const float* bias, const float* states, const Tensor* gu_,
                          const Tensor* gdt_, float* gA, const Tensor* gbc_, float* gD, const Tensor* gz_, float* gbias) {
  constexpr int R = V::R, NR = N * R;
  const ScanShape s(u_);
  const auto gy = rows<S>(gy_), u = rows<S>(u_), dt = rows<S>(dt_), z = rows<S>(z_);
  const auto gu = rows<S>(gu_), gdt = rows<S>(gdt_), gz = rows<S>(gz_);
  const auto bc = rows<float>(bc_), gbc = rows<float>(gbc_);
  const int64_t d_inner = u_->channels;
  const auto A2 = tile_A<V>(A, d_inner);
  const int max_threads = omp_get_max_threads();
  std::vector<float> all_A(max_threads * d_inner * NR), all_D(max_threads * d_inner), all_bias(max_threads * d_inner);
#pragma omp parallel num_threads(max_threads)
  {
    const int64_t me = omp_get_thread_num();
    // Sums over this thread's sequences (A in the order of A2), and g_t carried from chunk to chunk.
    float *sum_A = &all_A[me * d_inner * NR], *sum_D = &all_D[me * d_inner], *sum_bias = &all_bias[me * d_inner];
    std::vector<float> carried(d_inner * NR);
    static thread_local Chunk<V> c;
    static thread_local V dB[T][N], dC[T][N];  // per step, still one lane a channel
#pragma omp for schedule(static)
    for (int b = 0; b < s.batch; b++) {
      std::fill(carried.begin(), carried.end(), 0.f);
      for (int chunk = s.chunks - 1; chunk >= 0; chunk--) {
        const int t0 = chunk * T, len = std::min(T, s.len - t0);
        const int64_t r0 = (int64_t)b * s.len + t0;
        memset(dB, 0, sizeof dB), memset(dC, 0, sizeof dC);
        for (int k = 0; k < s.blocks; k++) {
          const int d = k * W;
          const float *a2 = &A2[(size_t)k * NR * W], *before = states + (((size_t)b * s.chunks + chunk) * s.blocks + k) * NR * W;
          const vec Dv = load(D + d), bv = load(bias + d);
          V h[N];
          for (int n = 0; n < N; n++) c.h[0][n] = h[n] = load_state(before + n * R * W, V{});
          for (int t = 0; t < len; t++) {  // recompute the states, and what the gate z needs
            const vec raw = load(dt(r0 + t) + d) + bv, uv = load(u(r0 + t) + d), delta = softplus(raw), du = delta * uv;
            const float* BC = bc(r0 + t);
            vec y = Dv * uv;
            for (int n = 0; n < N; n++) {
              const V a = decay(load_state(a2 + n * R * W, V{}), delta);
              c.decay[t][n] = a;
              h[n] = a * h[n] + broadcast(BC + n * R, V{}) * du;
              c.h[t + 1][n] = h[n];
              y += output(broadcast(BC + (N + n) * R, V{}), h[n]);
            }
            const vec zv = load(z(r0 + t) + d), g = load(gy(r0 + t) + d), sz = sigmoid(zv);
            c.delta[t] = delta, c.u[t] = uv, c.gate[t] = sigmoid(raw), c.dy[t] = g * zv * sz;
            store(gz(r0 + t) + d, g * y * sz * (1.f + zv * (1.f - sz)));
          }
          V g[N];
          for (int n = 0; n < N; n++) g[n] = load_state(&carried[((size_t)k * N + n) * R * W], V{});
          vec dD = load(sum_D + d), dbias = load(sum_bias + d);
          for (int t = len - 1; t >= 0; t--) {
            const vec delta = c.delta[t], dy = c.dy[t] * (float)R, du = delta * c.u[t];
            const float* BC = bc(r0 + t);
            vec gB = {}, ddelta = {};  // sums over n of Re(g* B) and of Re(g* h decay A)
            for (int n = 0; n < N; n++) {
              const V gn = g[n] + conj(broadcast(BC + (N + n) * R, V{})) * dy;
              dC[t][n] = dC[t][n] + conj(c.h[t + 1][n]) * dy;
              dB[t][n] = dB[t][n] + gn * du;
              gB += inner(gn, broadcast(BC + n * R, V{}));
              g[n] = conj(c.decay[t][n]) * gn;
              const V e = g[n] * conj(c.h[t][n]);
              ddelta += inner_A(load_state(a2 + n * R * W, V{}), e);
              float* acc = sum_A + ((size_t)k * N + n) * R * W;
              store_state(acc, load_state(acc, V{}) + e * delta);
            }
            const vec ddt = (ddelta + gB * c.u[t]) * c.gate[t];
            dbias += ddt, dD += c.dy[t] * c.u[t];
            store(gdt(r0 + t) + d, ddt);
            store(gu(r0 + t) + d, gB * delta + c.dy[t] * Dv);
          }
          for (int n = 0; n < N; n++) store_state(&carried[((size_t)k * N + n) * R * W], g[n]);
          store(sum_D + d, dD), store(sum_bias + d, dbias);
        }
        for (int t = 0; t < len; t++)  // dB and dC as rows of vecs, [N][R]
          for (int i = 0; i < NR; i++) gbc(r0 + t)[i] = sum(((vec*)dB[t])[i]), gbc(r0 + t)[NR + i] = sum(((vec*)dC[t])[i]);
      }
    }
  }
  add_threads(all_D, max_threads, d_inner, gD);
  add_threads(all_bias, max_threads, d_inner, gbias);
  std::vector<float> tiled(d_inner * NR);
  add_threads(all_A, max_threads, d_inner * NR, tiled.data());
  for (int64_t d = 0; d < d_inner; d++)
    for (int i = 0; i < NR; i++) gA[d * NR + i] = tiled[(d / W * NR + i) * W + d % W];
}

// ---- 4. Causal depthwise convolution of width 4, with SiLU -------------------------------------------------
// x, y [B, L, channels]; w [4, channels], the last tap is the present step; bias [channels].
constexpr int K = 4;
template <class S> static void conv_forward(const Tensor* x_, const float* w, const float* bias, const Tensor* y_) {
  const int64_t batch = x_->batch, len = x_->len, channels = x_->channels;
  const auto x = rows<S>(x_), y = rows<S>(y_);
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < batch; b++)
    for (int d = 0; d < channels; d += W) {
      vec x1 = {}, x2 = {}, x3 = {};  // the three steps before
      const vec w0 = load(w + d), w1 = load(w + channels + d), w2 = load(w + 2 * channels + d), w3 = load(w + 3 * channels + d);
      for (int t = 0; t < len; t++) {
        const int64_t r = (int64_t)b * len + t;
        const vec x0 = load(x(r) + d), v = load(bias + d) + w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0;
        store(y(r) + d, v * sigmoid(v));
        x3 = x2, x2 = x1, x1 = x0;
      }
    }
}
template <class S>
static void conv_backward(const Tensor* gy_, const Tensor* x_, const float* w, const float* bias, const Tensor* gx_, float* gw,
                          float* gbias) {
  const int64_t batch = x_->batch, len = x_->len, channels = x_->channels;
  const auto gy = rows<S>(gy_), x = rows<S>(x_), gx = rows<S>(gx_);
#pragma omp parallel for schedule(static)  // one thread owns a block of channels: no sums are shared
  for (int d = 0; d < channels; d += W) {
    vec wk[K], sum_w[K] = {}, sum_bias = {};
    for (int k = 0; k < K; k++) wk[k] = load(w + k * channels + d);
    for (int b = 0; b < batch; b++) {
      vec g1 = {}, g2 = {}, g3 = {};  // gradients of the three steps after
      for (int t = len - 1; t >= 0; t--) {
        const int64_t r = (int64_t)b * len + t;
        vec xs[K], v = load(bias + d);
        for (int k = 0; k < K; k++) {
          const int back = K - 1 - k;
          xs[k] = t < back ? vec{} : load(x(r - back) + d);
          v += wk[k] * xs[k];
        }
        const vec sv = sigmoid(v), g0 = load(gy(r) + d) * sv * (1.f + v * (1.f - sv));
        for (int k = 0; k < K; k++) sum_w[k] += g0 * xs[k];
        sum_bias += g0;
        store(gx(r) + d, wk[3] * g0 + wk[2] * g1 + wk[1] * g2 + wk[0] * g3);
        g3 = g2, g2 = g1, g1 = g0;
      }
    }
    for (int k = 0; k < K; k++) store(gw + k * channels + d, sum_w[k]);
    store(gbias + d, sum_bias);
  }
}

// ---- 5. RMSNorm --------------------------------------------------------------------------------------------
// x [rows, channels] is the float residual stream; y is float or bfloat16; scale [rows] = rsqrt(mean(x^2) + eps).
template <class S>
static void norm_forward(const float* x, const float* w, const Tensor* y_, float* scale, float eps) {
  const int64_t channels = y_->channels, count = y_->batch * y_->len;
  S* y = (S*)y_->data;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) {
    vec squares = {};
    for (int64_t d = 0; d < channels; d += W) {
      const vec v = load(x + i * channels + d);
      squares += v * v;
    }
    scale[i] = 1.f / std::sqrt(sum(squares) / channels + eps);
    for (int64_t d = 0; d < channels; d += W) store(y + i * channels + d, load(x + i * channels + d) * scale[i] * load(w + d));
  }
}
template <class S>
static void norm_backward(const Tensor* gy_, const float* x, const float* w, const float* scale, float* gx, float* gw) {
  const int64_t channels = gy_->channels, count = gy_->batch * gy_->len;
  const S* gy = (const S*)gy_->data;
  const int max_threads = omp_get_max_threads();
  std::vector<float> all(max_threads * channels);
#pragma omp parallel num_threads(max_threads)
  {
    float* sum_w = &all[omp_get_thread_num() * channels];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
      const float s = scale[i];
      vec dot = {};
      for (int64_t d = 0; d < channels; d += W) {
        const vec g = load(gy + i * channels + d), v = load(x + i * channels + d);
        dot += g * load(w + d) * v;
        store(sum_w + d, load(sum_w + d) + g * v * s);
      }
      const float c = sum(dot) / channels * s * s * s;
      for (int64_t d = 0; d < channels; d += W)
        store(gx + i * channels + d, load(gy + i * channels + d) * load(w + d) * s - load(x + i * channels + d) * c);
    }
  }
  add_threads(all, max_threads, channels, gw);
}

// ---- 6. Cross-entropy --------------------------------------------------------------------------------------
// logits [rows, vocab] become (softmax - onehot) * scale, the gradient of scale * (sum of losses); loss [rows] receives the
// losses. A negative target marks padding: its loss and gradient are zero.
template <class S> static void xent(const Tensor* logits, const int64_t* target, float scale, float* loss) {
  const int64_t vocab = logits->channels, count = logits->batch * logits->len;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) {
    S* p = (S*)logits->data + i * vocab;
    if (target[i] < 0) {
      loss[i] = 0.f;
      memset(p, 0, vocab * sizeof(S));
      continue;
    }
    vec top = load(p), total = {};
    for (int64_t v = W; v < vocab; v += W) {
      const vec x = load(p + v);
      top = x > top ? x : top;
    }
    float lanes[W];
    store(lanes, top);
    const float max = *std::max_element(lanes, lanes + W), own = to_float(p[target[i]]);
    for (int64_t v = 0; v < vocab; v += W) total += exp2_neg((load(p + v) - max) * LOG2E);
    const float z = sum(total), k = scale / z;
    loss[i] = std::log(z) + max - own;
    for (int64_t v = 0; v < vocab; v += W) store(p + v, exp2_neg((load(p + v) - max) * LOG2E) * k);
    put(p + target[i], (std::exp(own - max) / z - 1.f) * scale);
  }
}

// ---- 7. What is exported -----------------------------------------------------------------------------------
// Shapes as in the sections above; channels are a multiple of W, which train.py checks.
extern "C" {
void ops_scan(const Tensor* u, const Tensor* dt, const float* A, int64_t complex, const Tensor* bc, const float* D, const Tensor* z,
              const float* bias, const Tensor* y, float* states) {
  DISPATCH_SCAN(u, complex, scan_forward<S, V>(u, dt, A, bc, D, z, bias, y, states));
}
void ops_scan_grad(const Tensor* gy, const Tensor* u, const Tensor* dt, const float* A, int64_t complex, const Tensor* bc,
                   const float* D, const Tensor* z, const float* bias, const float* states, const Tensor* gu, const Tensor* gdt,
                   float* gA, const Tensor* gbc, float* gD, const Tensor* gz, float* gbias) {
  DISPATCH_SCAN(u, complex, scan_backward<S, V>(gy, u, dt, A, bc, D, z, bias, states, gu, gdt, gA, gbc, gD, gz, gbias));
}
void ops_conv(const Tensor* x, const float* w, const float* bias, const Tensor* y) {
  DISPATCH_TYPE(x, conv_forward<S>(x, w, bias, y));
}
void ops_conv_grad(const Tensor* gy, const Tensor* x, const float* w, const float* bias, const Tensor* gx, float* gw,
                   float* gbias) {
  DISPATCH_TYPE(x, conv_backward<S>(gy, x, w, bias, gx, gw, gbias));
}
void ops_norm(const float* x, const float* w, const Tensor* y, float* scale, float eps) {
  DISPATCH_TYPE(y, norm_forward<S>(x, w, y, scale, eps));
}
void ops_norm_grad(const Tensor* gy, const float* x, const float* w, const float* scale, float* gx, float* gw) {
  DISPATCH_TYPE(gy, norm_backward<S>(gy, x, w, scale, gx, gw));
}
void ops_xent(const Tensor* logits, const int64_t* target, float scale, float* loss) {
  DISPATCH_TYPE(logits, xent<S>(logits, target, scale, loss));
}
}
