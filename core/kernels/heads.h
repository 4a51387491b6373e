// Heads of 64 channels in bf16, as attention takes them.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

constexpr int64_t kChannels = 64, kParts = kChannels / 16;
constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(C), and powers of 2 instead of e
constexpr float kNever = -1e30f;                // a score without weight

inline __m512 widened(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

inline __m512 load_bf16(const uint16_t* x) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

inline void store_bf16(uint16_t* y, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(x));
}

// A query or key at unit root mean square, unless epsilon is 0, and with its halves turned against each other by its slot's
// angles, if there are any. Rounded once, at the end.
inline void place_head(const uint16_t* x, float epsilon, const float* cos, const float* sin, uint16_t* y) {
  __m512 parts[kParts];
  for (int64_t v = 0; v < kParts; ++v) parts[v] = load_bf16(x + 16 * v);
  if (epsilon != 0) {
    __m512 squares = _mm512_setzero_ps();
    for (const __m512& part : parts) squares = _mm512_fmadd_ps(part, part, squares);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / kChannels + epsilon));
    for (__m512& part : parts) part = _mm512_mul_ps(part, scale);
  }
  for (int64_t v = 0; v < kParts; ++v) {
    __m512 turned = parts[v];
    if (cos != nullptr) {
      turned = _mm512_mul_ps(turned, _mm512_loadu_ps(cos + 16 * v));
      turned = _mm512_fmadd_ps(parts[(v + kParts / 2) % kParts], _mm512_loadu_ps(sin + 16 * v), turned);
    }
    store_bf16(y + 16 * v, turned);
  }
}
