// The two passes of linear_cross_entropy over a chunk of logits (P, C) of classes at .. at + C, a row at a time.
#include "../threads.h"

namespace {

constexpr i64 ROWS = 16;  // of one piece of work

template <class A>
inline A bent(A x, A cap) {  // tanh(x / cap)
  return A(1) - A(2) / (exponential(A(2) / cap * x) + A(1));
}

// lse and own (P): log-sum-exp and the target's logit of the chunks so far.
template <class I, class A>
void absorb(I* logits, const i64* target, A* lse, A* own, i64 P, i64 C, i64 at, double softcap, i64 threads) {
  const A cap = A(softcap);
  share_out((P + ROWS - 1) / ROWS, threads, [&](i64 piece) {
    for (i64 p = piece * ROWS; p < std::min(P, (piece + 1) * ROWS); ++p) {
      I* __restrict x = logits + p * C;
      if (cap != 0) {
#pragma omp simd
        for (i64 c = 0; c < C; ++c) put(x[c], cap * bent(A(up(x[c])), cap));
      }
      const i64 t = target[p] - at;
      if (0 <= t && t < C) own[p] = up(x[t]);
      A top = lse[p];
#pragma omp simd reduction(max : top)
      for (i64 c = 0; c < C; ++c) top = A(up(x[c])) > top ? A(up(x[c])) : top;
      const A base = top == -INFINITY ? A(0) : top;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 c = 0; c < C; ++c) sum += exponential(A(up(x[c])) - base);
      lse[p] = top + std::log(sum + exponential(lse[p] - base));
    }
  });
}

// out = all * softmax - own * one_hot, through the cap; out may be the logits.
template <class I, class A>
void gradient(const I* logits, const i64* target, const A* lse, const A* all, const A* own, I* out, i64 P, i64 C, i64 at,
              double softcap, i64 threads) {
  const A cap = A(softcap);
  share_out((P + ROWS - 1) / ROWS, threads, [&](i64 piece) {
    for (i64 p = piece * ROWS; p < std::min(P, (piece + 1) * ROWS); ++p) {
      const I* x = logits + p * C;
      I* y = out + p * C;
      const A end = lse[p], whole = all[p];
      const i64 t = target[p] - at;
      const bool here = 0 <= t && t < C;
      const A raw = here ? A(up(x[t])) : A(0), slope = cap != 0 ? bent(raw, cap) : A(0);
      const A mine = whole * exponential((cap != 0 ? cap * slope : raw) - end) - own[p];
      if (cap != 0) {
#pragma omp simd
        for (i64 c = 0; c < C; ++c) {
          const A b = bent(A(up(x[c])), cap);
          put(y[c], whole * exponential(cap * b - end) * (A(1) - b * b));
        }
      } else {
#pragma omp simd
        for (i64 c = 0; c < C; ++c) put(y[c], whole * exponential(A(up(x[c])) - end));
      }
      if (here) put(y[t], mine * (A(1) - slope * slope));
    }
  });
}

}  // namespace

#define EXPORT_ROWS(...) EXPORT_AS(absorb, __VA_ARGS__) EXPORT_AS(gradient, __VA_ARGS__)

EXPORT_ROWS(rows_f32, float, float)
EXPORT_ROWS(rows_f64, double, double)
EXPORT_ROWS(rows_bf16, bf16, float)
