// r = sigmoid(gate_r + bias_r), i = sigmoid(gate_i + bias_i), a = exp(-rate * r), b = sqrt(1 - a^2) * i * u.
// gates are (H, R, 2K): head by head, first the K recurrence gates, then the K input gates. u, a, b are (R, H * K).
#include "../simd.h"

namespace {

inline double one_minus_exp(double x) { return -std::expm1(x); }
// 1 - exp(x) for x <= 0: near 0 by its series, because the difference would lose every digit.
inline float one_minus_exp(float x) {
  const float series = -x * (1.0f + x * (0.5f + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720))))));
  return x > -0.25f ? series : 1.0f - exponential(x);
}

template <class X, class A>
void forward(const X* gates, const A* bias, const A* rate, const X* u, A* a, A* b, i64 H, i64 R, i64 G) {
  const i64 K = G / 2;
  for (i64 r = 0; r < R; ++r)
    for (i64 h = 0; h < H; ++h) {
      const X* __restrict g = gates + (h * R + r) * 2 * K;
      const A* __restrict c = bias + h * 2 * K;
      const i64 at = r * H * K + h * K;
      const X* __restrict in = u + at;
      const A* __restrict speed = rate + h * K;
      A* __restrict to_a = a + at;
      A* __restrict to_b = b + at;
#pragma omp simd
      for (i64 k = 0; k < K; ++k) {
        const A log_a = -speed[k] * sigmoid(up(g[k]) + c[k]);
        const A rest = one_minus_exp(A(2) * log_a);
        to_a[k] = exponential(log_a);
        to_b[k] = std::sqrt(rest < A(1e-12) ? A(1e-12) : rest) * sigmoid(up(g[K + k]) + c[K + k]) * up(in[k]);
      }
    }
}

template <class X, class A>
void backward(const X* gates, const A* bias, const A* rate, const X* u, const A* da, const A* db, X* dgates, A* dbias, A* drate,
              X* du, i64 H, i64 R, i64 G) {
  const i64 K = G / 2;
  std::memset(dbias, 0, 2 * H * K * sizeof(A));
  std::memset(drate, 0, H * K * sizeof(A));
  for (i64 r = 0; r < R; ++r)
    for (i64 h = 0; h < H; ++h) {
      const X* __restrict g = gates + (h * R + r) * 2 * K;
      const A* __restrict c = bias + h * 2 * K;
      const i64 at = r * H * K + h * K;
      const X* __restrict in = u + at;
      const A* __restrict speed = rate + h * K;
      const A* __restrict ga = da + at;
      const A* __restrict gb = db + at;
      X* __restrict dg = dgates + (h * R + r) * 2 * K;
      A* __restrict dc = dbias + h * 2 * K;
      A* __restrict dspeed = drate + h * K;
      X* __restrict out = du + at;
#pragma omp simd
      for (i64 k = 0; k < K; ++k) {
        const A x = up(in[k]);
        const A rec = sigmoid(up(g[k]) + c[k]), inp = sigmoid(up(g[K + k]) + c[K + k]);
        const A log_a = -speed[k] * rec;
        const A rest = one_minus_exp(A(2) * log_a);
        const A decay = exponential(log_a);
        const A m = std::sqrt(rest < A(1e-12) ? A(1e-12) : rest);
        // d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2); nothing flows where the floor holds.
        const A slope = rest < A(1e-12) ? A(0) : -decay * decay / m;
        const A dlog = ga[k] * decay + gb[k] * inp * x * slope;
        const A dr = -dlog * speed[k] * rec * (A(1) - rec);
        const A di = gb[k] * m * x * inp * (A(1) - inp);
        put(dg[k], dr);
        put(dg[K + k], di);
        put(out[k], gb[k] * m * inp);
        dc[k] += dr;
        dc[K + k] += di;
        dspeed[k] -= dlog * rec;
      }
    }
}

}  // namespace

EXPORT(gates_f32, float, float)
EXPORT(gates_f64, double, double)
EXPORT(gates_bf16, bf16, float)
