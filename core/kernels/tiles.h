// Tiles of products of bf16 with float32 sums, by the processor's products of pairs (AVX512-BF16).
//
// A block of the right side has 64 columns and 64 inputs: word c of input pair i holds inputs 2i and 2i + 1 of column c.
// A tile of the left side has 6 rows, whose words are pairs of inputs as they lie in memory. Its sums stay in registers, and
// the order in which a row is summed depends on nothing but the number of its inputs.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

constexpr int64_t kBlock = 64, kDepth = 32;  // columns, and pairs of inputs, of a block
constexpr int64_t kTile = 6, kVectors = 4;   // rows of a tile, and vectors of sums of each

using Block = __m512i[kDepth * kVectors];

// target += rows of pairs times a block.
inline void multiply(const uint32_t* const* rows, const __m512i* block, __m512 (*target)[kVectors]) {
  __m512 sums[kTile][kVectors];
  std::copy(&target[0][0], &target[0][0] + kTile * kVectors, &sums[0][0]);
  for (int64_t i = 0; i < kDepth; ++i) {
    const __m512i* b = block + i * kVectors;
#pragma GCC unroll 6
    for (int64_t r = 0; r < kTile; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(rows[r][i]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, (__m512bh)b[v]);
    }
  }
  std::copy(&sums[0][0], &sums[0][0] + kTile * kVectors, &target[0][0]);
}

// A row of a tile, scaled, as bf16.
inline void store(void* target, const __m512* values, __m512 scale) {
  for (int64_t v = 0; v < kVectors; v += 2) {
    const __m512 low = _mm512_mul_ps(values[v], scale), high = _mm512_mul_ps(values[v + 1], scale);
    _mm512_storeu_si512(static_cast<char*>(target) + 32 * v, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}
