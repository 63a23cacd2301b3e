// Depthwise causal convolution inside documents: y_t = bias + sum_j w[C - 1 - j] * u[t - j] while document[t - j] == document[t].
// u is (B, T, D) with a free row stride; weights (C, D), oldest tap first.
#include "../simd.h"

namespace {

// How many of the last C tokens up to t lie in its document.
inline i64 reach(const int32_t* document, i64 t, i64 C) {
  i64 n = 1;
  while (n < C && n <= t && document[t - n] == document[t]) ++n;
  return n;
}

template <class X, class A>
void forward(const X* u, const A* w, const A* bias, const int32_t* document, X* y, i64 B, i64 T, i64 D, i64 C, i64 stride) {
  A* acc = new A[D];
  for (i64 b = 0; b < B; ++b)
    for (i64 t = 0; t < T; ++t) {
      const X* in = u + (b * T + t) * stride;
      X* __restrict out = y + (b * T + t) * D;
      const i64 width = reach(document + b * T, t, C);
      std::memcpy(acc, bias, D * sizeof(A));
      for (i64 j = 0; j < width; ++j) {
        const X* __restrict x = in - j * stride;
        const A* __restrict k = w + (C - 1 - j) * D;
        A* __restrict to = acc;
#pragma omp simd
        for (i64 d = 0; d < D; ++d) to[d] += k[d] * up(x[d]);
      }
#pragma omp simd
      for (i64 d = 0; d < D; ++d) put(out[d], acc[d]);
    }
  delete[] acc;
}

template <class X, class A>
void backward(const X* u, const A* w, const A* /*bias*/, const int32_t* document, const X* grad, X* du, A* dw, A* dbias, i64 B, i64 T, i64 D, i64 C,
              i64 stride) {
  A* acc = new A[D];
  std::memset(dw, 0, C * D * sizeof(A));
  std::memset(dbias, 0, D * sizeof(A));
  for (i64 b = 0; b < B; ++b)
    for (i64 t = 0; t < T; ++t) {
      const int32_t* doc = document + b * T;
      const X* __restrict in = u + (b * T + t) * stride;
      const X* g = grad + (b * T + t) * D;
      X* __restrict out = du + (b * T + t) * D;
      std::memset(acc, 0, D * sizeof(A));
      for (i64 j = 0; j < C && t + j < T && doc[t + j] == doc[t]; ++j) {
        const X* __restrict h = g + j * D;
        const A* __restrict k = w + (C - 1 - j) * D;
        A* __restrict dk = dw + (C - 1 - j) * D;
        A* __restrict to = acc;
#pragma omp simd
        for (i64 d = 0; d < D; ++d) {
          to[d] += k[d] * up(h[d]);
          dk[d] += up(in[d]) * up(h[d]);
        }
      }
      A* __restrict db = dbias;
#pragma omp simd
      for (i64 d = 0; d < D; ++d) {
        db[d] += up(g[d]);
        put(out[d], acc[d]);
      }
    }
  delete[] acc;
}

}  // namespace

EXPORT(conv_f32, float, float)
EXPORT(conv_f64, double, double)
EXPORT(conv_bf16, bf16, float)
