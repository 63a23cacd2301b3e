// h_t = a_t * h_{t-1} + b_t over (B, T, D) row-major tensors; reset[b, t] starts again from b_t.
// Sequential in t, vectorised over d: three tensors of traffic forward, five backward.
#include <cstdint>
#include <cstring>

namespace {

template <class F>
void forward(const F* a, const F* b, const uint8_t* reset, const F* initial, F* h, int64_t B, int64_t T, int64_t D) {
  for (int64_t i = 0; i < B; ++i) {
    const F* before = initial ? initial + i * D : nullptr;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t at = (i * T + t) * D;
      F* __restrict out = h + at;
      const F* __restrict at_a = a + at;
      const F* __restrict at_b = b + at;
      // A branch, not a product with zero: the other document's state may be inf.
      if (!before || (reset && reset[i * T + t])) {
        std::memcpy(out, at_b, D * sizeof(F));
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) out[d] = at_a[d] * before[d] + at_b[d];
      }
      before = out;
    }
  }
}

template <class F>
void backward(const F* a, const F* h, const uint8_t* reset, const F* initial, const F* grad, F* da, F* db, F* dinitial,
              int64_t B, int64_t T, int64_t D) {
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t t = T; t-- > 0;) {
      const int64_t at = (i * T + t) * D;
      F* __restrict dh = db + at;
      const F* __restrict g = grad + at;
      if (t + 1 < T && !(reset && reset[i * T + t + 1])) {
        const F* __restrict next = dh + D;
        const F* __restrict next_a = a + at + D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) dh[d] = g[d] + next_a[d] * next[d];
      } else {
        std::memcpy(dh, g, D * sizeof(F));
      }
      const F* before = t ? h + at - D : (initial ? initial + i * D : nullptr);
      F* __restrict out = da + at;
      if (!before || (reset && reset[i * T + t])) {
        std::memset(out, 0, D * sizeof(F));
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) out[d] = dh[d] * before[d];
      }
    }
    if (dinitial) {
      F* out = dinitial + i * D;
      if (T == 0 || (reset && reset[i * T])) {
        std::memset(out, 0, D * sizeof(F));
      } else {
        for (int64_t d = 0; d < D; ++d) out[d] = a[i * T * D + d] * db[i * T * D + d];
      }
    }
  }
}

}  // namespace

#define EXPORT(NAME, F)                                                                                                   \
  extern "C" void NAME##_forward(const F* a, const F* b, const uint8_t* reset, const F* initial, F* h, int64_t B,         \
                                 int64_t T, int64_t D) {                                                                  \
    forward<F>(a, b, reset, initial, h, B, T, D);                                                                         \
  }                                                                                                                       \
  extern "C" void NAME##_backward(const F* a, const F* h, const uint8_t* reset, const F* initial, const F* grad, F* da,   \
                                  F* db, F* dinitial, int64_t B, int64_t T, int64_t D) {                                  \
    backward<F>(a, h, reset, initial, grad, da, db, dinitial, B, T, D);                                                   \
  }

EXPORT(scan_f32, float)
EXPORT(scan_f64, double)
