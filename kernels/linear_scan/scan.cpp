// h_t = a_t * h_{t-1} + b_t over (B, T, D) row-major tensors; reset[b, t] starts again from b_t. With `reverse` t - 1 is
// the token behind; with LOG all numbers are logarithms. Sequential in t, vectorised over d: three tensors of traffic
// forward, five backward.
#include <cstdint>
#include <cstring>
#include <vector>

#include "../simd.h"

namespace {

// log(1 + y) for y in [0, 1] as 2 atanh(y / (2 + y)): vectorises, relative error below 1e-7.
inline float log_one_plus(float y) {
  const float s = y / (2.0f + y), q = s * s;
  float p = 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2 * s * (p * q + 1);
}
inline double log_one_plus(double y) { return std::log1p(y); }

// Of equal numbers, infinite ones too, the difference is 0.
template <class F>
inline F log_add(F x, F y) {
  const F apart = x == y ? F(0) : (x < y ? x - y : y - x);
  return (x < y ? y : x) + log_one_plus(exponential(apart));
}

// exp(part - whole): the share of a sum.
template <class F>
inline F share(F part, F whole) {
  return exponential(part == whole ? F(0) : part - whole);
}

template <bool LOG, class F>
void states(const F* a, const F* b, const uint8_t* reset, const F* initial, i64 reverse, F* h, i64 B, i64 T, i64 D) {
  for (i64 i = 0; i < B; ++i) {
    const F* before = initial ? initial + i * D : nullptr;
    for (i64 s = 0; s < T; ++s) {
      const i64 token = i * T + (reverse ? T - 1 - s : s), at = token * D;
      F* __restrict out = h + at;
      const F* __restrict at_a = a + at;
      const F* __restrict at_b = b + at;
      // A branch, not a product with zero: the other document's state may be inf.
      if (!before || (reset && reset[token])) {
        std::memcpy(out, at_b, D * sizeof(F));
      } else {
#pragma omp simd
        for (i64 d = 0; d < D; ++d)
          out[d] = LOG ? log_add(at_a[d] + before[d], at_b[d]) : at_a[d] * before[d] + at_b[d];
      }
      before = out;
    }
  }
}

// dh = grad + (share of h_t in h_{t+1}) dh_{t+1}: a linear scan the other way, in logarithms too. `sum` (D) holds dh.
template <bool LOG, class F>
void gradients(const F* a, const F* b, const F* h, const uint8_t* reset, const F* initial, i64 reverse, const F* grad,
              F* da, F* db, F* dinitial, i64 B, i64 T, i64 D) {
  std::vector<F> sum(D);
  const i64 step = reverse ? -D : D;
  for (i64 i = 0; i < B; ++i) {
    std::memset(sum.data(), 0, D * sizeof(F));
    bool linked = false;  // the token read next goes on from this one
    for (i64 s = T; s-- > 0;) {
      const i64 token = i * T + (reverse ? T - 1 - s : s), at = token * D;
      F* __restrict dh = sum.data();
      const F* __restrict g = grad + at;
      if (linked) {
#pragma omp simd
        for (i64 d = 0; d < D; ++d) dh[d] += g[d];
      } else {
        std::memcpy(dh, g, D * sizeof(F));
      }
      F* __restrict out_a = da + at;
      F* __restrict out_b = db + at;
      const F* __restrict at_a = a + at;
      const F* __restrict at_h = h + at;
      const F* before = s ? at_h - step : (initial ? initial + i * D : nullptr);
      linked = before && !(reset && reset[token]);
      if (!linked) {
        std::memcpy(out_b, dh, D * sizeof(F));
        std::memset(out_a, 0, D * sizeof(F));
      } else if (LOG) {
        const F* __restrict at_b = b + at;
#pragma omp simd
        for (i64 d = 0; d < D; ++d) {
          out_b[d] = dh[d] * share(at_b[d], at_h[d]);
          dh[d] *= share(at_a[d] + before[d], at_h[d]);
          out_a[d] = dh[d];
        }
      } else {
#pragma omp simd
        for (i64 d = 0; d < D; ++d) {
          out_b[d] = dh[d];
          out_a[d] = dh[d] * before[d];
          dh[d] *= at_a[d];
        }
      }
    }
    if (dinitial) {
      F* out = dinitial + i * D;
      if (linked) {
        std::memcpy(out, sum.data(), D * sizeof(F));
      } else {
        std::memset(out, 0, D * sizeof(F));
      }
    }
  }
}

template <class F>
void forward(const F* a, const F* b, const uint8_t* reset, const F* initial, i64 reverse, i64 log, F* h, i64 B, i64 T, i64 D) {
  (log ? states<true, F> : states<false, F>)(a, b, reset, initial, reverse, h, B, T, D);
}

template <class F>
void backward(const F* a, const F* b, const F* h, const uint8_t* reset, const F* initial, i64 reverse, i64 log, const F* grad,
              F* da, F* db, F* dinitial, i64 B, i64 T, i64 D) {
  (log ? gradients<true, F> : gradients<false, F>)(a, b, h, reset, initial, reverse, grad, da, db, dinitial, B, T, D);
}

}  // namespace

EXPORT(scan_f32, float)
EXPORT(scan_f64, double)
