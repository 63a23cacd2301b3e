// h_t = exp(dt_t * A) * h_{t-1} + dt_t * u_t * b_t,  y_t = sum_n c_t[n] * h_t[n] + skip * u_t.
// u, dt, y are (R, T, D); A is (N, D); b, c are (R, T, N); states are (R, N, D). reset[r, t] forgets what came before t.
// A block of channels keeps its N states in the first cache and goes through all of T: the states of all tokens are never
// in memory. Every EVERY tokens the state is kept; the backward runs each stretch again from there, then back.
#include <algorithm>
#include <vector>

#include "../simd.h"

namespace {

constexpr i64 EVERY = 64, WIDTH = 32;

inline i64 stretches(i64 T) { return (T + EVERY - 1) / EVERY; }

// One token of one block: from `before` (null = zeros) to `after`; `decay` may be null.
template <class F>
inline void advance(const F* A, const F* u, const F* dt, const F* b, const F* before, F* after, F* decay, i64 N, i64 D, i64 w) {
  F x[WIDTH];
  for (i64 d = 0; d < w; ++d) x[d] = dt[d] * u[d];
  for (i64 n = 0; n < N; ++n) {
    const F* __restrict a = A + n * D;
    F* to = after + n * WIDTH;  // may be `before` itself
    const F bn = b[n];
    if (!before) {  // a branch, not a product with zero: the other document's state may be inf
#pragma omp simd
      for (i64 d = 0; d < w; ++d) to[d] = bn * x[d];
      continue;
    }
    const F* from = before + n * WIDTH;
    if (decay) {
      F* __restrict keep = decay + n * WIDTH;
#pragma omp simd
      for (i64 d = 0; d < w; ++d) {
        keep[d] = exponential(dt[d] * a[d]);
        to[d] = keep[d] * from[d] + bn * x[d];
      }
    } else {
#pragma omp simd
      for (i64 d = 0; d < w; ++d) to[d] = exponential(dt[d] * a[d]) * from[d] + bn * x[d];
    }
  }
}

template <class F>
void load(const F* from, F* to, i64 N, i64 D, i64 w) {
  for (i64 n = 0; n < N; ++n) std::memcpy(to + n * WIDTH, from + n * D, w * sizeof(F));
}

template <class F>
void store(const F* from, F* to, i64 N, i64 D, i64 w) {
  for (i64 n = 0; n < N; ++n) std::memcpy(to + n * D, from + n * WIDTH, w * sizeof(F));
}

// kept: (R, stretches, N, D), the state before each stretch.
template <class F>
void forward(const F* u, const F* dt, const F* A, const F* b, const F* c, const F* skip, const uint8_t* reset, const F* initial,
             F* y, F* last, F* kept, i64 R, i64 T, i64 D, i64 N) {
  std::vector<F> state(N * WIDTH);
  for (i64 r = 0; r < R; ++r)
    for (i64 d0 = 0; d0 < D; d0 += WIDTH) {
      const i64 w = std::min(WIDTH, D - d0);
      std::fill(state.begin(), state.end(), F(0));
      if (initial) load(initial + r * N * D + d0, state.data(), N, D, w);
      for (i64 t = 0; t < T; ++t) {
        if (t % EVERY == 0) store(state.data(), kept + ((r * stretches(T) + t / EVERY) * N) * D + d0, N, D, w);
        const i64 at = (r * T + t) * D + d0, s = (r * T + t) * N;
        const bool forget = reset && reset[r * T + t];
        advance(A + d0, u + at, dt + at, b + s, forget ? (const F*)nullptr : state.data(), state.data(), (F*)nullptr, N, D, w);
        F sum[WIDTH];
        for (i64 d = 0; d < w; ++d) sum[d] = skip[d0 + d] * u[at + d];
        for (i64 n = 0; n < N; ++n) {
          const F cn = c[s + n];
          const F* h = state.data() + n * WIDTH;
#pragma omp simd
          for (i64 d = 0; d < w; ++d) sum[d] += cn * h[d];
        }
        std::memcpy(y + at, sum, w * sizeof(F));
      }
      store(state.data(), last + r * N * D + d0, N, D, w);
    }
}

// dA (N, D), db, dc (R, T, N) and dskip (D) are sums over blocks: zero on entry here, then added to.
template <class F>
void backward(const F* u, const F* dt, const F* A, const F* b, const F* c, const F* skip, const uint8_t* reset, const F* kept,
              const F* /*initial*/, const F* gy, const F* glast, F* du, F* ddt, F* dA, F* db, F* dc, F* dskip, F* dinitial, i64 R, i64 T, i64 D, i64 N) {
  const FlushSubnormals flush;  // gradients decay on their way back
  std::memset(dA, 0, N * D * sizeof(F));
  std::memset(db, 0, R * T * N * sizeof(F));
  std::memset(dc, 0, R * T * N * sizeof(F));
  std::memset(dskip, 0, D * sizeof(F));
  const i64 size = N * WIDTH;
  std::vector<F> states((EVERY + 1) * size), decays(EVERY * size), carry(size);
  for (i64 r = 0; r < R; ++r)
    for (i64 d0 = 0; d0 < D; d0 += WIDTH) {
      const i64 w = std::min(WIDTH, D - d0);
      std::fill(carry.begin(), carry.end(), F(0));
      if (glast) load(glast + r * N * D + d0, carry.data(), N, D, w);
      for (i64 part = stretches(T); part-- > 0;) {
        const i64 begin = part * EVERY, end = std::min(T, begin + EVERY);
        load(kept + ((r * stretches(T) + part) * N) * D + d0, states.data(), N, D, w);
        for (i64 t = begin; t < end; ++t) {
          const i64 at = (r * T + t) * D + d0;
          F* h = states.data() + (t - begin) * size;
          const bool forget = reset && reset[r * T + t];
          advance(A + d0, u + at, dt + at, b + (r * T + t) * N, forget ? (const F*)nullptr : h, h + size,
                  decays.data() + (t - begin) * size, N, D, w);
        }
        for (i64 t = end; t-- > begin;) {
          const i64 at = (r * T + t) * D + d0, s = (r * T + t) * N;
          const bool forget = reset && reset[r * T + t];
          F g[WIDTH], x[WIDTH], dx[WIDTH], slow[WIDTH];
          for (i64 d = 0; d < w; ++d) {
            g[d] = gy ? gy[at + d] : F(0);
            x[d] = dt[at + d] * u[at + d];
            dx[d] = slow[d] = F(0);
          }
          for (i64 n = 0; n < N; ++n) {
            const F bn = b[s + n], cn = c[s + n];
            const F* __restrict before = states.data() + (t - begin) * size + n * WIDTH;
            const F* __restrict h = before + size;
            const F* __restrict decay = decays.data() + (t - begin) * size + n * WIDTH;
            const F* __restrict a = A + n * D + d0;
            const F* __restrict step = dt + at;
            F* __restrict dh = carry.data() + n * WIDTH;
            F* __restrict to = dA + n * D + d0;
            F sum_b = 0, sum_c = 0;
            if (forget) {
#pragma omp simd reduction(+ : sum_b, sum_c)
              for (i64 d = 0; d < w; ++d) {
                const F here = dh[d] + g[d] * cn;
                sum_c += g[d] * h[d];
                sum_b += here * x[d];
                dx[d] += here * bn;
                dh[d] = F(0);
              }
            } else {
#pragma omp simd reduction(+ : sum_b, sum_c)
              for (i64 d = 0; d < w; ++d) {
                const F here = dh[d] + g[d] * cn;
                sum_c += g[d] * h[d];
                sum_b += here * x[d];
                dx[d] += here * bn;
                const F back = here * decay[d];
                const F rate = back * before[d];  // gradient of dt * A
                slow[d] += rate * a[d];
                to[d] += rate * step[d];
                dh[d] = back;
              }
            }
            db[s + n] += sum_b;
            dc[s + n] += sum_c;
          }
          for (i64 d = 0; d < w; ++d) {
            du[at + d] = dx[d] * dt[at + d] + g[d] * skip[d0 + d];
            ddt[at + d] = slow[d] + dx[d] * u[at + d];
            dskip[d0 + d] += g[d] * u[at + d];
          }
        }
      }
      if (dinitial) store(carry.data(), dinitial + r * N * D + d0, N, D, w);
    }
}

}  // namespace

EXPORT(scan_f32, float)
EXPORT(scan_f64, double)
