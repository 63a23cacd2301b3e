// y = act(g) * u; act is silu (kind 0) or the tanh form of gelu (kind 1), which is x * sigmoid(2 * k * (x + c * x^3)).
// g and u are rows of D with free row strides.
#include "../simd.h"

namespace {

constexpr double K = 1.5957691216057308, C = 0.044715;  // 2 * sqrt(2 / pi)

template <int kind, class A>
inline A inner(A x) {
  return kind == 0 ? x : A(K) * (x + A(C) * x * x * x);
}

template <int kind, class A>
inline A slope(A x) {
  return kind == 0 ? A(1) : A(K) * (A(1) + A(3 * C) * x * x);
}

template <int kind, class G, class U, class A>
void values(const G* g, const U* u, G* y, i64 rows, i64 D, i64 s_g, i64 s_u) {
  for (i64 r = 0; r < rows; ++r) {
    const G* __restrict a = g + r * s_g;
    const U* __restrict b = u + r * s_u;
    G* __restrict out = y + r * D;
#pragma omp simd
    for (i64 d = 0; d < D; ++d) {
      const A x = up(a[d]);
      put(out[d], x * sigmoid(inner<kind, A>(x)) * A(up(b[d])));
    }
  }
}

template <int kind, class G, class U, class A>
void gradients(const G* g, const U* u, const G* grad, G* dg, U* du, i64 rows, i64 D, i64 s_g, i64 s_u) {
  for (i64 r = 0; r < rows; ++r) {
    const G* __restrict a = g + r * s_g;
    const U* __restrict b = u + r * s_u;
    const G* __restrict dy = grad + r * D;
    G* __restrict out_g = dg + r * D;
    U* __restrict out_u = du + r * D;
#pragma omp simd
    for (i64 d = 0; d < D; ++d) {
      const A x = up(a[d]), h = up(dy[d]);
      const A s = sigmoid(inner<kind, A>(x));
      put(out_u[d], h * x * s);
      put(out_g[d], h * A(up(b[d])) * s * (A(1) + x * (A(1) - s) * slope<kind, A>(x)));
    }
  }
}

template <class G, class U, class A>
void forward(i64 kind, const G* g, const U* u, G* y, i64 rows, i64 D, i64 s_g, i64 s_u) {
  (kind == 0 ? values<0, G, U, A> : values<1, G, U, A>)(g, u, y, rows, D, s_g, s_u);
}

template <class G, class U, class A>
void backward(i64 kind, const G* g, const U* u, const G* grad, G* dg, U* du, i64 rows, i64 D, i64 s_g, i64 s_u) {
  (kind == 0 ? gradients<0, G, U, A> : gradients<1, G, U, A>)(g, u, grad, dg, du, rows, D, s_g, s_u);
}

}  // namespace

EXPORT(glu_f32_f32, float, float, float)
EXPORT(glu_f64_f64, double, double, double)
EXPORT(glu_bf16_bf16, bf16, bf16, float)
EXPORT(glu_bf16_f32, bf16, float, float)
