// Softmax attention a tile of 64 queries and 64 keys at a time, forward and backward (Dao 2023, arXiv:2307.08691), for
// every mask that vectors can tell. Scores are held TRANSPOSED, a row a key and a lane a query: maxima, sums and masks are
// then plain vector arithmetic, nothing goes across lanes.
//
// All products are one: C (M, N) += A (M, D) * B (D, N). A lies in rows, B with STEP rows interleaved, so that one word of
// 32 bits of A meets a vector of such words of B: one fp32 product, or two of bf16 where the processor has them (the
// probabilities and their gradients are rounded to bf16 then, as on a GPU). Sums are fp32.
#include "../threads.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr i64 TILE = 64, WIDEST = 256;
#ifdef __AVX512F__
constexpr i64 LANES = 16, ROWS = 8;  // floats of a vector; rows of C that stay in registers, two vectors of each
#else
constexpr i64 LANES = 8, ROWS = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));

inline Vec splat(float x) { return x - Vec{}; }

template <class E>
inline Vec multiply_add(Vec sum, const void* a, Vec b);
template <>
inline Vec multiply_add<float>(Vec sum, const void* a, Vec b) {
  float x;
  std::memcpy(&x, a, 4);
  return sum + splat(x) * b;
}
#ifdef __AVX512BF16__
using Narrow = bf16;
template <>
inline Vec multiply_add<bf16>(Vec sum, const void* a, Vec b) {
  int32_t x;
  std::memcpy(&x, a, 4);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)b);
}
#else
using Narrow = float;
#endif

template <class E>
constexpr i64 STEP = 4 / i64(sizeof(E));
inline i64 padded(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Index of (depth d, column n) in an operand B of N columns.
template <class E>
inline i64 woven(i64 d, i64 n, i64 N) {
  return (d / STEP<E> * N + n) * STEP<E> + d % STEP<E>;
}

template <class E, int NR>
inline void block(const E* A, i64 lda, i64 D, const E* B, i64 ldb, float* C) {
  Vec sum[ROWS][NR];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < NR; ++n) std::memcpy(&sum[m][n], C + m * ldb + n * LANES, sizeof(Vec));
  for (i64 d = 0; d < D; d += STEP<E>) {
    Vec b[NR];
    for (int n = 0; n < NR; ++n) std::memcpy(&b[n], B + (d * ldb + n * LANES * STEP<E>), sizeof(Vec));
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < NR; ++n) sum[m][n] = multiply_add<E>(sum[m][n], A + m * lda + d, b[n]);
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < NR; ++n) std::memcpy(C + m * ldb + n * LANES, &sum[m][n], sizeof(Vec));
}

// C (M, N) += A (M, D) * B (D, N); lda numbers a row of A, ldb a row of B and of C. M a multiple of ROWS, N of LANES, D of STEP.
template <class E>
void product(const E* A, i64 lda, i64 D, const E* B, i64 ldb, float* C, i64 M, i64 N) {
  for (i64 n = 0; n < N;) {
    const bool wide = n + 2 * LANES <= N;
    for (i64 m = 0; m < M; m += ROWS)
      (wide ? block<E, 2> : block<E, 1>)(A + m * lda, lda, D, B + n * STEP<E>, ldb, C + m * ldb + n);
    n += (wide ? 2 : 1) * LANES;
  }
}

// `count` rows of `width` numbers, `stride` apart, zeros behind them, in each form that is asked for (null: not).
// rows: A (TILE, W). across: B, depth = the width, columns = the rows. down: B, depth = the rows, columns = W.
// turned: A (W, TILE).
template <class I, class E>
void pack(const I* from, i64 stride, i64 count, i64 width, i64 W, E* rows, E* across, E* down, E* turned) {
  for (E* to : {rows, across, down, turned})
    if (to && (count < TILE || width < W)) std::memset(static_cast<void*>(to), 0, TILE * W * sizeof(E));
  alignas(64) E line[WIDEST];
  std::memset(static_cast<void*>(line), 0, sizeof line);
  for (i64 i = 0; i < count; ++i) {
    const I* x = from + i * stride;
#pragma omp simd
    for (i64 d = 0; d < width; ++d) put(line[d], up(x[d]));
    if (rows) std::memcpy(static_cast<void*>(rows + i * W), line, width * sizeof(E));
    if (across)
      for (i64 d = 0; d < W; d += STEP<E>) std::memcpy(static_cast<void*>(across + woven<E>(d, i, TILE)), line + d, 4);
    if (down)
      for (i64 d = 0; d < width; ++d) down[woven<E>(i, d, W)] = line[d];
    if (turned)
      for (i64 d = 0; d < width; ++d) turned[d * TILE + i] = line[d];
  }
}

// What is known of the queries and keys of one row of the batch. Strides count numbers: of a token, of a head.
template <class I>
struct Row {
  const I *q, *k, *v;
  i64 q_t, q_h, k_t, k_h, v_t, v_h;
  const int32_t *document_q, *document_k, *prefix_q, *prefix_k;
  const float *fade_q, *fade_k;  // (T, H), (S, H)
};

struct Sizes {
  i64 R, T, S, H, G, K, V, causal, window;
  double scale, softcap;
};

struct Range {
  int32_t low, high;
  bool one() const { return low == high && low; }
};

inline Range range(const int32_t* x, i64 n) {
  const auto [low, high] = std::minmax_element(x, x + n);
  return {*low, *high};
}

// A tile of queries, what it may see, and its scores.
template <class I>
struct Tiles {
  const Sizes& z;
  const Row<I>& row;
  std::vector<Range> documents;  // of each tile of keys
  alignas(64) int32_t first[TILE], last[TILE], document[TILE], prefix[TILE];
  alignas(64) float fade[TILE];
  i64 t0 = 0, n = 0, lanes = 0, low = 0, high = 0;
  Range mine{0, 0};

  Tiles(const Sizes& z, const Row<I>& row) : z(z), row(row) {
    if (row.document_k)
      for (i64 s = 0; s < z.S; s += TILE) documents.push_back(range(row.document_k + s, std::min(TILE, z.S - s)));
  }

  // Queries `from` and behind of head `h`; keys low..high are those that any of them may see.
  void queries(i64 from, i64 h) {
    t0 = from, n = std::min(TILE, z.T - from), lanes = padded(n, LANES);
    const i64 ahead = z.S - z.T;
    for (i64 i = 0; i < TILE; ++i) {
      const i64 t = t0 + i + ahead;
      first[i] = int32_t(z.window ? std::max<i64>(0, t - z.window + 1) : 0);
      last[i] = int32_t(i >= n ? 0 : z.causal ? std::clamp<i64>(t + 1, 0, z.S) : z.S);
      document[i] = i < n && row.document_q ? row.document_q[t0 + i] : 0;
      prefix[i] = i < n && row.prefix_q ? row.prefix_q[t0 + i] : 0;
      fade[i] = i < n && row.fade_q ? row.fade_q[(t0 + i) * z.H + h] : 0;
    }
    low = first[0] / TILE * TILE;
    high = row.prefix_q && z.causal ? z.S : last[n - 1];
    if (row.document_q) mine = range(row.document_q + t0, n);
  }

  bool seen(i64 s0) const {
    if (documents.empty()) return true;
    const Range& their = documents[s0 / TILE];
    return mine.low <= their.high && their.low <= mine.high && their.high != 0;
  }

  // Products become scores: scaled, capped, faded, hidden ones -inf. `slope`: the cap's derivative.
  void finish(float* x, i64 s0, i64 count, i64 h, float* slope = nullptr) const {
    const float scale = float(z.scale), cap = float(z.softcap);
    for (i64 j = 0; j < count; ++j) {
      float* __restrict at = x + j * TILE;
      if (cap != 0) {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) {
          const float bent = 1.0f - 2.0f / (exponential(at[i] * (2.0f * scale / cap)) + 1.0f);  // tanh
          at[i] = cap * bent;
          if (slope) slope[j * TILE + i] = 1.0f - bent * bent;
        }
      } else {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) at[i] *= scale;
      }
      if (row.fade_k) {
        const float by = row.fade_k[(s0 + j) * z.H + h];
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) at[i] -= std::fabs(fade[i] - by);
      }
    }
    const bool together = documents.empty() || (mine.one() && documents[s0 / TILE].one());
    if (n == lanes && together && first[n - 1] <= s0 && s0 + count <= last[0]) return;
    for (i64 j = 0; j < count; ++j) {
      const int32_t s = int32_t(s0 + j), theirs = row.document_k ? row.document_k[s] : 0;
      const int32_t group = row.prefix_k && z.causal ? row.prefix_k[s] : 0;
      float* __restrict at = x + j * TILE;
      if (group) {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i)
          at[i] = (s < last[i] || prefix[i] == group) && s >= first[i] ? at[i] : -INFINITY;
      } else {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) at[i] = s < last[i] && s >= first[i] ? at[i] : -INFINITY;
      }
      if (row.document_k) {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) at[i] = document[i] == theirs && theirs ? at[i] : -INFINITY;
      }
    }
  }
};

// Rows of a tile (count, TILE) as an operand A (rows) or B (down), zeros to the next multiple of ROWS.
template <class E>
void round_off(float* x, i64 count, i64 lanes, E* rows, E* down) {
  const i64 end = padded(count, ROWS);
  std::memset(x + count * TILE, 0, (end - count) * TILE * sizeof(float));
  for (i64 j = 0; rows && j < end; ++j)
#pragma omp simd
    for (i64 i = 0; i < lanes; ++i) put(rows[j * TILE + i], x[j * TILE + i]);
  for (i64 j = 0; down && j < end; j += STEP<E>) {
    const float* __restrict at = x + j * TILE;
    E* __restrict to = down + j * TILE;
    if (STEP<E> == 1) {
#pragma omp simd
      for (i64 i = 0; i < lanes; ++i) put(to[i], at[i]);
    } else {  // two numbers are written as one word
#pragma omp simd
      for (i64 i = 0; i < lanes; ++i) {
        bf16 a, b;
        put(a, at[i]), put(b, at[TILE + i]);
        const uint32_t word = a.bits | uint32_t(b.bits) << 16;
        std::memcpy(static_cast<void*>(to + 2 * i), &word, 4);
      }
    }
  }
}

template <class I>
struct Given {
  Sizes z;
  Row<I> first;
  i64 q_r, k_r, v_r, threads;

  Row<I> row(i64 r) const {
    Row<I> x = first;
    x.q += r * q_r, x.k += r * k_r, x.v += r * v_r;
    if (x.document_q) x.document_q += r * z.T, x.document_k += r * z.S;
    if (x.prefix_q) x.prefix_q += r * z.T, x.prefix_k += r * z.S;
    if (x.fade_q) x.fade_q += r * z.T * z.H, x.fade_k += r * z.S * z.H;
    return x;
  }
};

template <class I>
Given<I> given_of(const I* q, const I* k, const I* v, const i64* sizes, double scale, double softcap, const int32_t* document_q,
               const int32_t* document_k, const int32_t* prefix_q, const int32_t* prefix_k, const float* fade_q,
               const float* fade_k) {
  const i64* s = sizes;
  const Sizes z{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], scale, softcap};
  const Row<I> row{q,     k,     v,          s[11],      s[12],    s[14],    s[15],  s[17],
                   s[18], document_q, document_k, prefix_q, prefix_k, fade_q, fade_k};
  return {z, row, s[10], s[13], s[16], s[9]};
}

// sizes: R, T, S, H, G, K, V, causal, window, threads, then the strides of a row, a token and a head of q, k and v.
#define SIDES(I)                                                                                                \
  const I *q, const I *k, const I *v, const i64 *sizes, double scale, double softcap, const int32_t *document_q, \
      const int32_t *document_k, const int32_t *prefix_q, const int32_t *prefix_k, const float *fade_q, const float *fade_k
#define GIVEN given_of(q, k, v, sizes, scale, softcap, document_q, document_k, prefix_q, prefix_k, fade_q, fade_k)

// y (R, T, H, V), lse (R, H, T): natural logarithms, 0 where a query sees nothing.
template <class I, class E>
void forward(SIDES(I), const float* sink, I* y, float* lse) {
  const Given<I> given = GIVEN;
  const Sizes& z = given.z;
  const i64 M = z.H / z.G, S = padded(z.S, TILE), K = padded(z.K, LANES), V = padded(z.V, LANES);
  share_out(z.R * z.G, given.threads, [&](i64 item) {
    const i64 r = item / z.G, g = item % z.G;
    const Row<I> row = given.row(r);
    Tiles<I> at(z, row);
    std::vector<E> keys(S * K), values(S * V), q(TILE * K), p(TILE * TILE);
    std::vector<float> s(TILE * TILE), o(V * TILE);
    alignas(64) float top[TILE], total[TILE], shrink[TILE], best[TILE], sum[TILE];
    E* const no = nullptr;
    for (i64 s0 = 0; s0 < z.S; s0 += TILE) {
      const i64 count = std::min(TILE, z.S - s0);
      pack(row.k + s0 * row.k_t + g * row.k_h, row.k_t, count, z.K, K, &keys[s0 * K], no, no, no);
      pack(row.v + s0 * row.v_t + g * row.v_h, row.v_t, count, z.V, V, no, no, no, &values[s0 * V]);
    }
    for (i64 h = g * M; h < (g + 1) * M; ++h)
      for (i64 t0 = 0; t0 < z.T; t0 += TILE) {
        at.queries(t0, h);
        pack(row.q + t0 * row.q_t + h * row.q_h, row.q_t, at.n, z.K, K, no, q.data(), no, no);
        std::fill(o.begin(), o.end(), 0.0f);
        std::fill(total, total + TILE, 0.0f);
        std::fill(top, top + TILE, -INFINITY);
        for (i64 s0 = at.low; s0 < at.high; s0 += TILE) {
          if (!at.seen(s0)) continue;
          const i64 count = std::min(TILE, z.S - s0), deep = padded(count, ROWS), lanes = at.lanes;
          std::memset(s.data(), 0, deep * TILE * sizeof(float));
          product(&keys[s0 * K], K, K, q.data(), TILE, s.data(), deep, lanes);
          at.finish(s.data(), s0, count, h);
          std::memcpy(best, top, sizeof best);
          for (i64 j = 0; j < count; ++j) {
            const float* __restrict x = &s[j * TILE];
#pragma omp simd
            for (i64 i = 0; i < lanes; ++i) best[i] = x[i] <= best[i] ? best[i] : x[i];
          }
          int moved = 0;
#pragma omp simd reduction(| : moved)
          for (i64 i = 0; i < lanes; ++i) {
            moved |= best[i] != top[i];
            const float base = best[i] == -INFINITY ? 0.0f : best[i];
            shrink[i] = exponential(top[i] - base);
            top[i] = best[i];
            best[i] = base;
            sum[i] = 0;
          }
          for (i64 j = 0; j < count; ++j) {
            float* __restrict x = &s[j * TILE];
#pragma omp simd
            for (i64 i = 0; i < lanes; ++i) {
              x[i] = exponential(x[i] - best[i]);
              sum[i] += x[i];
            }
          }
          for (i64 d = 0; d < V && moved; ++d) {
            float* __restrict x = &o[d * TILE];
#pragma omp simd
            for (i64 i = 0; i < lanes; ++i) x[i] *= shrink[i];
          }
#pragma omp simd
          for (i64 i = 0; i < lanes; ++i) total[i] = total[i] * shrink[i] + sum[i];
          round_off<E>(s.data(), count, lanes, nullptr, p.data());
          product(&values[s0 * V], TILE, deep, p.data(), TILE, o.data(), V, lanes);
        }
        for (i64 i = 0; i < at.n; ++i) {
          float most = top[i], all = total[i], keep = 1;
          if (sink) {  // one more key, of value zero
            const float more = sink[h], now = all == 0 ? more : std::max(most, more);
            keep = all == 0 ? 0 : std::exp(most - now);
            all = all * keep + std::exp(more - now);
            most = now;
          }
          lse[(r * z.H + h) * z.T + t0 + i] = all == 0 ? 0 : most + std::log(all);
          const float by = all == 0 ? 0 : keep / all;
          I* to = y + ((r * z.T + t0 + i) * z.H + h) * z.V;
          for (i64 d = 0; d < z.V; ++d) put(to[d], o[d * TILE + i] * by);
        }
      }
  });
}

// dq (R, T, H, K), dk (R, S, G, K), dv (R, S, G, V); delta (R, T, H): the dot products of y and dy.
template <class I, class E>
void backward(SIDES(I), const float* lse, const float* delta, const I* dy, I* dq, I* dk, I* dv, float* dfade_q,
              float* dfade_k) {
  const Given<I> given = GIVEN;
  const Sizes& z = given.z;
  const i64 M = z.H / z.G, S = padded(z.S, TILE), K = padded(z.K, LANES), V = padded(z.V, LANES);
  share_out(z.R * z.G, given.threads, [&](i64 item) {
    const i64 r = item / z.G, g = item % z.G;
    const Row<I> row = given.row(r);
    Tiles<I> at(z, row);
    std::vector<E> keys(S * K), turned(S * K), values(S * V);
    std::vector<E> q(TILE * K), q_down(TILE * K), d(TILE * V), d_down(TILE * V), rows(TILE * TILE), down(TILE * TILE);
    std::vector<float> s(TILE * TILE), dp(TILE * TILE), to_q(K * TILE), to_k(S * K), to_v(S * V);
    std::vector<float> slope(z.softcap != 0 ? TILE * TILE : 0);
    alignas(64) float ends[TILE], dots[TILE], to_fade[TILE];
    E* const no = nullptr;
    for (i64 s0 = 0; s0 < z.S; s0 += TILE) {
      const i64 count = std::min(TILE, z.S - s0);
      pack(row.k + s0 * row.k_t + g * row.k_h, row.k_t, count, z.K, K, &keys[s0 * K], no, no, &turned[s0 * K]);
      pack(row.v + s0 * row.v_t + g * row.v_h, row.v_t, count, z.V, V, &values[s0 * V], no, no, no);
    }
    for (i64 h = g * M; h < (g + 1) * M; ++h)
      for (i64 t0 = 0; t0 < z.T; t0 += TILE) {
        at.queries(t0, h);
        const i64 lanes = at.lanes;
        pack(row.q + t0 * row.q_t + h * row.q_h, row.q_t, at.n, z.K, K, no, q.data(), q_down.data(), no);
        pack(dy + ((r * z.T + t0) * z.H + h) * z.V, z.H * z.V, at.n, z.V, V, no, d.data(), d_down.data(), no);
        for (i64 i = 0; i < TILE; ++i) {
          ends[i] = i < at.n ? lse[(r * z.H + h) * z.T + t0 + i] : 0;
          dots[i] = i < at.n ? delta[(r * z.T + t0 + i) * z.H + h] : 0;
          to_fade[i] = 0;
        }
        std::fill(to_q.begin(), to_q.end(), 0.0f);
        for (i64 s0 = at.low; s0 < at.high; s0 += TILE) {
          if (!at.seen(s0)) continue;
          const i64 count = std::min(TILE, z.S - s0), deep = padded(count, ROWS);
          std::memset(s.data(), 0, deep * TILE * sizeof(float));
          std::memset(dp.data(), 0, deep * TILE * sizeof(float));
          product(&keys[s0 * K], K, K, q.data(), TILE, s.data(), deep, lanes);
          at.finish(s.data(), s0, count, h, slope.data());
          product(&values[s0 * V], V, V, d.data(), TILE, dp.data(), deep, lanes);
          for (i64 j = 0; j < count; ++j) {
            float* __restrict x = &s[j * TILE];
            float* __restrict dx = &dp[j * TILE];
#pragma omp simd
            for (i64 i = 0; i < lanes; ++i) {
              x[i] = exponential(x[i] - ends[i]);
              dx[i] = x[i] == 0 ? 0.0f : x[i] * (dx[i] - dots[i]);
            }
            if (dfade_q) {
              const float by = row.fade_k[(s0 + j) * z.H + h];
              float sum = 0;
#pragma omp simd reduction(+ : sum)
              for (i64 i = 0; i < lanes; ++i) {
                const float apart = at.fade[i] - by;
                const float part = apart > 0 ? dx[i] : (apart < 0 ? -dx[i] : 0.0f);
                to_fade[i] -= part;
                sum += part;
              }
              dfade_k[(r * z.S + s0 + j) * z.H + h] += sum;
            }
            for (i64 i = 0; i < lanes && z.softcap != 0; ++i) dx[i] *= slope[j * TILE + i];
          }
          round_off<E>(s.data(), count, lanes, rows.data(), nullptr);
          product(rows.data(), TILE, padded(at.n, STEP<E>), d_down.data(), V, &to_v[s0 * V], deep, V);
          round_off<E>(dp.data(), count, lanes, rows.data(), down.data());
          product(rows.data(), TILE, padded(at.n, STEP<E>), q_down.data(), K, &to_k[s0 * K], deep, K);
          product(&turned[s0 * K], TILE, deep, down.data(), TILE, to_q.data(), K, lanes);
        }
        for (i64 i = 0; i < at.n; ++i) {
          I* to = dq + ((r * z.T + t0 + i) * z.H + h) * z.K;
          for (i64 k = 0; k < z.K; ++k) put(to[k], to_q[k * TILE + i] * float(z.scale));
          if (dfade_q) dfade_q[(r * z.T + t0 + i) * z.H + h] = to_fade[i];
        }
      }
    for (i64 j = 0; j < z.S; ++j) {
      I* at_k = dk + ((r * z.S + j) * z.G + g) * z.K;
      I* at_v = dv + ((r * z.S + j) * z.G + g) * z.V;
      for (i64 k = 0; k < z.K; ++k) put(at_k[k], to_k[j * K + k] * float(z.scale));
      for (i64 v = 0; v < z.V; ++v) put(at_v[v], to_v[j * V + v]);
    }
  });
}

}  // namespace

EXPORT(flash_f32, float, float)
EXPORT(flash_bf16, bf16, Narrow)
