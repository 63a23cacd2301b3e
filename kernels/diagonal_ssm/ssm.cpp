// h_t = a * h_{t-1} + u_t, y_t = sum over n of Re(c * h_t): D channels with N complex states each, a and c constant.
// u, y: (B, T, D); a, c: (2, D, N), real parts first; states: (B, 2, D, N). Row b has length[b] tokens (T if null):
// later outputs are 0. States never go to memory but every STRIDE tokens, from where the backward makes them again.
#include <algorithm>
#include <vector>

#include "../simd.h"

namespace {

constexpr int64_t STRIDE = 64;  // tokens between kept states
constexpr int64_t BLOCK = 8;    // channels done together: a cache line of u

template <class F>
inline void step(const F* __restrict ar, const F* __restrict ai, F u, F* __restrict hr, F* __restrict hi, int64_t N) {
#pragma omp simd
  for (int64_t n = 0; n < N; ++n) {
    const F r = hr[n], m = hi[n];
    hr[n] = ar[n] * r - ai[n] * m + u;
    hi[n] = ar[n] * m + ai[n] * r;
  }
}

template <class F>
void start(const F* initial, int64_t i, int64_t d, int64_t D, int64_t N, F* hr, F* hi) {
  if (initial) {
    std::memcpy(hr, initial + ((i * 2) * D + d) * N, N * sizeof(F));
    std::memcpy(hi, initial + ((i * 2 + 1) * D + d) * N, N * sizeof(F));
  } else {
    std::memset(hr, 0, N * sizeof(F));
    std::memset(hi, 0, N * sizeof(F));
  }
}

template <class F>
void forward(const F* u, const F* a, const F* c, const uint8_t* reset, const F* initial, const int64_t* length, F* y,
             F* last, int64_t B, int64_t T, int64_t D, int64_t N) {
  std::vector<F> state(BLOCK * 2 * N);
  const int64_t half = D * N;
  for (int64_t i = 0; i < B; ++i) {
    const int64_t end = length ? length[i] : T;
    for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
      const int64_t K = std::min(BLOCK, D - d0);
      for (int64_t k = 0; k < K; ++k) start(initial, i, d0 + k, D, N, &state[k * 2 * N], &state[k * 2 * N + N]);
      for (int64_t t = 0; t < T; ++t) {
        F* out = y + (i * T + t) * D + d0;
        if (t >= end) {
          std::memset(out, 0, K * sizeof(F));
          continue;
        }
        const F* in = u + (i * T + t) * D + d0;
        // A branch, not a product with zero: the other document's state may be inf.
        if (reset && reset[i * T + t]) std::fill(state.begin(), state.end(), F(0));
        for (int64_t k = 0; k < K; ++k) {
          F* __restrict hr = &state[k * 2 * N];
          F* __restrict hi = hr + N;
          const int64_t at = (d0 + k) * N;
          step(a + at, a + half + at, in[k], hr, hi, N);
          const F* __restrict cr = c + at;
          const F* __restrict ci = c + half + at;
          F sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t n = 0; n < N; ++n) sum += cr[n] * hr[n] - ci[n] * hi[n];
          out[k] = sum;
        }
      }
      for (int64_t k = 0; k < K; ++k) {
        std::memcpy(last + ((i * 2) * D + d0 + k) * N, &state[k * 2 * N], N * sizeof(F));
        std::memcpy(last + ((i * 2 + 1) * D + d0 + k) * N, &state[k * 2 * N + N], N * sizeof(F));
      }
    }
  }
}

template <class F>
void backward(const F* u, const F* a, const F* c, const uint8_t* reset, const F* initial, const int64_t* length,
              const F* dy, const F* dlast, F* du, F* da, F* dc, F* dinitial, int64_t B, int64_t T, int64_t D,
              int64_t N) {
  const int64_t half = D * N, S = 2 * N;
  std::memset(da, 0, 2 * half * sizeof(F));
  std::memset(dc, 0, 2 * half * sizeof(F));
  std::vector<F> kept((T / STRIDE + 1) * S), states((STRIDE + 1) * S), dh(S), sums(2 * S), state(S);
  for (int64_t i = 0; i < B; ++i) {
    const int64_t end = length ? length[i] : T;
    const uint8_t* cut = reset ? reset + i * T : nullptr;
    for (int64_t d = 0; d < D; ++d) {
      const F* __restrict ar = a + d * N;
      const F* __restrict ai = ar + half;
      const F* __restrict cr = c + d * N;
      const F* __restrict ci = cr + half;
      start(initial, i, d, D, N, &state[0], &state[N]);
      for (int64_t t = 0; t < end; ++t) {
        if (t % STRIDE == 0) std::memcpy(&kept[t / STRIDE * S], &state[0], S * sizeof(F));
        if (cut && cut[t]) std::fill(state.begin(), state.end(), F(0));
        step(ar, ai, u[(i * T + t) * D + d], &state[0], &state[N], N);
      }
      std::memcpy(&dh[0], dlast + ((i * 2) * D + d) * N, N * sizeof(F));
      std::memcpy(&dh[N], dlast + ((i * 2 + 1) * D + d) * N, N * sizeof(F));
      std::fill(sums.begin(), sums.end(), F(0));
      for (int64_t t = T; t-- > end;) du[(i * T + t) * D + d] = 0;
      for (int64_t s0 = (end - 1) / STRIDE * STRIDE; end && s0 >= 0; s0 -= STRIDE) {
        const int64_t K = std::min(STRIDE, end - s0);
        std::memcpy(&states[0], &kept[s0 / STRIDE * S], S * sizeof(F));
        for (int64_t k = 0; k < K; ++k) {
          F* now = &states[(k + 1) * S];
          if (cut && cut[s0 + k]) {
            std::memset(now, 0, S * sizeof(F));
          } else {
            std::memcpy(now, now - S, S * sizeof(F));
          }
          step(ar, ai, u[(i * T + s0 + k) * D + d], now, now + N, N);
        }
        for (int64_t k = K; k-- > 0;) {
          const int64_t t = s0 + k;
          const F g = dy[(i * T + t) * D + d];
          const F* __restrict now = &states[(k + 1) * S];
          F* __restrict er = &dh[0];
          F* __restrict ei = &dh[N];
          F* __restrict sar = &sums[0];
          F* __restrict sai = &sums[N];
          F* __restrict scr = &sums[2 * N];
          F* __restrict sci = &sums[3 * N];
          F sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t n = 0; n < N; ++n) {
            er[n] += g * cr[n];
            ei[n] -= g * ci[n];
            scr[n] += g * now[n];
            sci[n] -= g * now[N + n];
            sum += er[n];
          }
          du[(i * T + t) * D + d] = sum;
          if (cut && cut[t]) {
            std::fill(dh.begin(), dh.end(), F(0));
          } else {
            const F* __restrict old = now - S;
#pragma omp simd
            for (int64_t n = 0; n < N; ++n) {
              const F r = er[n], m = ei[n];
              sar[n] += r * old[n] + m * old[N + n];
              sai[n] += m * old[n] - r * old[N + n];
              er[n] = ar[n] * r + ai[n] * m;
              ei[n] = ar[n] * m - ai[n] * r;
            }
          }
        }
      }
      for (int64_t n = 0; n < N; ++n) {
        da[d * N + n] += sums[n];
        da[half + d * N + n] += sums[N + n];
        dc[d * N + n] += sums[2 * N + n];
        dc[half + d * N + n] += sums[3 * N + n];
      }
      if (dinitial) {
        std::memcpy(dinitial + ((i * 2) * D + d) * N, &dh[0], N * sizeof(F));
        std::memcpy(dinitial + ((i * 2 + 1) * D + d) * N, &dh[N], N * sizeof(F));
      }
    }
  }
}

}  // namespace

EXPORT(ssm_f32, float)
EXPORT(ssm_f64, double)
