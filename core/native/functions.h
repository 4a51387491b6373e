// e^x and what is made from it, as compilers can vectorise it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// e^x for x <= 0, to within 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. The library's is not vectorised.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it off rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// The same in float64, and 0 below 1e-307.
inline double exp_of(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding and taking it off rounds to an integer
  const double within = x < -707.0 ? -707.0 : x;
  const double n = (within * 1.4426950408889634 + kRound) - kRound;
  const double r = (within - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double series = 1.0;
  for (int k = 13; k > 0; --k) series = series * (r * (1.0 / k)) + 1.0;
  const int64_t power = (int64_t(n) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -707.0 ? 0.0 : series * scale;
}

inline float tanh_of(float x) {
  const float e = exp_of(-2.0f * std::fabs(x));
  return std::copysign((1.0f - e) / (1.0f + e), x);
}

// Bounds logits to +-cap, unless it is 0.
inline void cap_softly(float* logits, int64_t n, float cap) {
  if (cap == 0) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) logits[i] = cap * tanh_of(logits[i] / cap);
}
