// y = x * (draw >= lost - 32768 ? scale : 0), with scale = 65536 / (65536 - lost) rounded to the type of x.
#include "../simd.h"

namespace {

template <class X, class A>
void forward(const X* __restrict x, const int16_t* __restrict draws, i64 lost, X* __restrict y, i64 n) {
  X rounded;
  put(rounded, A(65536.0 / double(65536 - lost)));
  const A scale = up(rounded);
  const int32_t least = int32_t(lost) - 32768;
#pragma omp simd
  for (i64 i = 0; i < n; ++i) put(y[i], A(up(x[i])) * (draws[i] >= least ? scale : A(0)));
}

// The map is linear and its own transpose.
template <class X, class A>
void backward(const int16_t* draws, i64 lost, const X* grad, X* dx, i64 n) {
  forward<X, A>(grad, draws, lost, dx, n);
}

}  // namespace

EXPORT(dropout_f32, float, float)
EXPORT(dropout_f64, double, double)
EXPORT(dropout_bf16, bf16, float)
