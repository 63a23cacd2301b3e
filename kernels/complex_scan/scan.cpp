// h_t = a_t * h_{t-1} + b_t in complex numbers over (B, T, 2W) row-major tensors whose last dimension holds W real
// parts, then W imaginary ones; reset[b, t] starts again from b_t. With a constant, a is (2W) and read at every t; with
// `reverse` t - 1 is the token behind.
#include <vector>

#include "../simd.h"

namespace {

template <class F>
void forward(const F* a, const F* b, const uint8_t* reset, const F* initial, int64_t reverse, F* h, int64_t constant,
             int64_t B, int64_t T, int64_t D) {
  const int64_t W = D / 2;
  for (int64_t i = 0; i < B; ++i) {
    const F* before = initial ? initial + i * D : nullptr;
    for (int64_t s = 0; s < T; ++s) {
      const int64_t token = i * T + (reverse ? T - 1 - s : s), at = token * D;
      F* __restrict out = h + at;
      const F* __restrict d = constant ? a : a + at;
      const F* __restrict in = b + at;
      // A branch, not a product with zero: the other document's state may be inf.
      if (!before || (reset && reset[token])) {
        std::memcpy(out, in, D * sizeof(F));
      } else {
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) {
          const F r = before[w], m = before[W + w];
          out[w] = d[w] * r - d[W + w] * m + in[w];
          out[W + w] = d[w] * m + d[W + w] * r + in[W + w];
        }
      }
      before = out;
    }
  }
}

// The gradient of a real loss: dh = grad + conj(a_next) dh_next, da = dh conj(h_before).
template <class F>
void backward(const F* a, const F* h, const uint8_t* reset, const F* initial, int64_t reverse, const F* grad, F* da,
              F* db, F* dinitial, int64_t constant, int64_t B, int64_t T, int64_t D) {
  const int64_t W = D / 2, step = reverse ? -1 : 1;
  std::vector<F> row(constant ? D : 0);
  if (constant) std::memset(da, 0, D * sizeof(F));
  for (int64_t i = 0; i < B; ++i) {
    if (constant) std::memset(row.data(), 0, D * sizeof(F));
    const int64_t first = i * T + (reverse ? T - 1 : 0);
    for (int64_t s = T; s-- > 0;) {
      const int64_t token = first + step * s, at = token * D;
      F* __restrict dh = db + at;
      const F* __restrict g = grad + at;
      if (s + 1 < T && !(reset && reset[token + step])) {
        const F* __restrict n = dh + step * D;
        const F* __restrict d = constant ? a : a + at + step * D;
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) {
          dh[w] = g[w] + d[w] * n[w] + d[W + w] * n[W + w];
          dh[W + w] = g[W + w] + d[w] * n[W + w] - d[W + w] * n[w];
        }
      } else {
        std::memcpy(dh, g, D * sizeof(F));
      }
      const F* before = s ? h + at - step * D : (initial ? initial + i * D : nullptr);
      const bool cut = !before || (reset && reset[token]);
      F* __restrict out = constant ? row.data() : da + at;
      if (cut) {
        if (!constant) std::memset(out, 0, D * sizeof(F));
      } else if (constant) {
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) {
          out[w] += dh[w] * before[w] + dh[W + w] * before[W + w];
          out[W + w] += dh[W + w] * before[w] - dh[w] * before[W + w];
        }
      } else {
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) {
          out[w] = dh[w] * before[w] + dh[W + w] * before[W + w];
          out[W + w] = dh[W + w] * before[w] - dh[w] * before[W + w];
        }
      }
    }
    if (constant)
      for (int64_t w = 0; w < D; ++w) da[w] += row[w];
    if (dinitial) {
      F* out = dinitial + i * D;
      const F* dh = db + first * D;
      const F* d = constant ? a : a + first * D;
      if (T == 0 || (reset && reset[first])) {
        std::memset(out, 0, D * sizeof(F));
      } else {
        for (int64_t w = 0; w < W; ++w) {
          out[w] = d[w] * dh[w] + d[W + w] * dh[W + w];
          out[W + w] = d[w] * dh[W + w] - d[W + w] * dh[w];
        }
      }
    }
  }
}

}  // namespace

EXPORT(scan_f32, float)
EXPORT(scan_f64, double)
