// What the CPU kernels share: float types and an exponential that vectorises.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

using i64 = int64_t;

struct bf16 {
  uint16_t bits;
};

static inline float up(float x) { return x; }
static inline double up(double x) { return x; }
static inline float up(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

static inline void put(float& to, float x) { to = x; }
static inline void put(double& to, double x) { to = x; }
static inline void put(bf16& to, float x) {  // round to nearest even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  to.bits = uint16_t((wide & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline double exponential(double x) { return std::exp(x); }
// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, Taylor to the 7th power: relative error below 3e-7. NaN stays NaN, overflow is inf.
static inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  const float y = p * scale;
  return x > 88.0f ? INFINITY : (x < -87.0f ? 0.0f : (x == x ? y : x));
}

// While one of these is there, its thread takes subnormal numbers for zero, where the processor can be told so. A quantity that
// decays stays subnormal for good (the least of them times 0.9 is rounded to itself), and each step of it takes many times as long.
struct FlushSubnormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
};

template <class A>
static inline A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

// What Python calls: NAME_<way> points to the function template <way> of these types, which says the arguments.
#define EXPORT_AS(WAY, NAME, ...) \
  extern "C" {                           \
  auto* NAME##_##WAY = WAY<__VA_ARGS__>; \
  }
#define EXPORT(NAME, ...) EXPORT_AS(forward, NAME, __VA_ARGS__) EXPORT_AS(backward, NAME, __VA_ARGS__)
