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

inline float dot(const __m512* a, const __m512* b) {
  __m512 sum = _mm512_mul_ps(a[0], b[0]);
  for (int64_t v = 1; v < kParts; ++v) sum = _mm512_fmadd_ps(a[v], b[v], sum);
  return _mm512_reduce_add_ps(sum);
}

// A head, and the factor that brings it to unit root mean square; 1 if epsilon is 0.
inline float load_head(const uint16_t* x, float epsilon, __m512* parts) {
  for (int64_t v = 0; v < kParts; ++v) parts[v] = load_bf16(x + 16 * v);
  return epsilon == 0 ? 1.0f : 1.0f / std::sqrt(dot(parts, parts) / kChannels + epsilon);
}

// A query or key at unit root mean square, unless epsilon is 0, and with its halves turned against each other by its slot's
// angles, if there are any. Rounded once, at the end.
inline void place_head(const uint16_t* x, float epsilon, const float* cos, const float* sin, uint16_t* y) {
  __m512 parts[kParts];
  const __m512 scale = _mm512_set1_ps(load_head(x, epsilon, parts));
  for (__m512& part : parts) part = _mm512_mul_ps(part, scale);
  for (int64_t v = 0; v < kParts; ++v) {
    __m512 turned = parts[v];
    if (cos != nullptr) {
      turned = _mm512_mul_ps(turned, _mm512_loadu_ps(cos + 16 * v));
      turned = _mm512_fmadd_ps(parts[(v + kParts / 2) % kParts], _mm512_loadu_ps(sin + 16 * v), turned);
    }
    store_bf16(y + 16 * v, turned);
  }
}

// From the gradient of what `place_head` makes of `x` that of `x`.
inline void place_head_back(const uint16_t* x, float epsilon, const float* cos, const float* sin, const __m512* grad, uint16_t* y) {
  __m512 parts[kParts], turned[kParts];
  for (int64_t v = 0; v < kParts; ++v) {
    turned[v] = grad[v];
    if (cos == nullptr) continue;
    const int64_t other = (v + kParts / 2) % kParts;
    turned[v] = _mm512_mul_ps(grad[v], _mm512_loadu_ps(cos + 16 * v));
    turned[v] = _mm512_fmadd_ps(grad[other], _mm512_loadu_ps(sin + 16 * other), turned[v]);
  }
  const float scale = load_head(x, epsilon, parts);
  // What would only make the head longer or shorter changes nothing.
  const float along = epsilon == 0 ? 0.0f : dot(turned, parts) * scale * scale / kChannels;
  for (int64_t v = 0; v < kParts; ++v) {
    const __m512 across = _mm512_fnmadd_ps(parts[v], _mm512_set1_ps(along), turned[v]);
    store_bf16(y + 16 * v, _mm512_mul_ps(across, _mm512_set1_ps(scale)));
  }
}
