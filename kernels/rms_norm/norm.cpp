// y = x * rsqrt(mean(x^2) + eps) * w over the last dimension. x is (outer, inner, D) with free strides but the last.
#include "../simd.h"

namespace {

template <class X, class A>
void forward(const X* x, const A* w, double eps, X* y, A* scale, i64 outer, i64 inner, i64 D, i64 s_outer, i64 s_inner) {
  for (i64 o = 0; o < outer; ++o)
    for (i64 i = 0; i < inner; ++i) {
      const X* __restrict in = x + o * s_outer + i * s_inner;
      X* __restrict out = y + (o * inner + i) * D;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 d = 0; d < D; ++d) sum += up(in[d]) * up(in[d]);
      const A r = A(1) / std::sqrt(sum / A(D) + A(eps));
      scale[o * inner + i] = r;
#pragma omp simd
      for (i64 d = 0; d < D; ++d) put(out[d], up(in[d]) * r * w[d]);
    }
}

template <class X, class A>
void backward(const X* x, const A* w, const A* scale, const X* grad, X* dx, A* dw, i64 outer, i64 inner, i64 D, i64 s_outer,
              i64 s_inner) {
  for (i64 d = 0; d < D; ++d) dw[d] = 0;
  for (i64 o = 0; o < outer; ++o)
    for (i64 i = 0; i < inner; ++i) {
      const X* __restrict in = x + o * s_outer + i * s_inner;
      const X* __restrict g = grad + (o * inner + i) * D;
      X* __restrict out = dx + (o * inner + i) * D;
      A* __restrict acc = dw;
      const A r = scale[o * inner + i];
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (i64 d = 0; d < D; ++d) {
        const A n = up(in[d]) * r, h = up(g[d]);
        dot += n * h * w[d];
        acc[d] += n * h;
      }
      const A m = dot / A(D);
#pragma omp simd
      for (i64 d = 0; d < D; ++d) put(out[d], r * (up(g[d]) * w[d] - up(in[d]) * r * m));
    }
}

}  // namespace

EXPORT(norm_f32, float, float)
EXPORT(norm_f64, double, double)
EXPORT(norm_bf16, bf16, float)
