// Tiles of products of bf16 with float32 sums, by the processor's products of pairs (AVX512-BF16) or of tiles of them (AMX).
//
// A block of the right side has 64 columns and 64 inputs: word c of input pair i holds inputs 2i and 2i + 1 of column c.
// A tile of the left side has 6 rows or 4, whose words are pairs of inputs as they lie in memory, or 16 that lie together. Its
// sums stay in registers, and the order in which a row is summed depends on nothing but the number of its inputs.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define BUILT_FOR_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int64_t kBlock = 64, kDepth = 32;  // columns, and pairs of inputs, of a block
constexpr int64_t kTile = 6, kVectors = 4;   // rows of a tile, and vectors of sums of each

using Block = __m512i[kDepth * kVectors];

// Unrolled: between registers and memory. By std::copy the sums go a second way, over the stack.
template <int64_t kRows>
inline void copy(const __m512 (*from)[kVectors], __m512 (*to)[kVectors]) {
#pragma GCC unroll 6
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) to[r][v] = from[r][v];
  }
}

// target += rows of pairs times a block, or several one after another; or = without what was there. Meanwhile a line of memory
// for each pair is fetched from `ahead`, unless it is null.
template <int64_t kRows = kTile, bool kAdds = true>
inline void multiply(const uint32_t* const* rows, const __m512i* block, __m512 (*target)[kVectors], int64_t depth = kDepth,
                     const __m512i* ahead = nullptr) {
  __m512 sums[kRows][kVectors] = {};
  if (kAdds) copy<kRows>(target, sums);
  for (int64_t i = 0; i < depth; ++i) {
    const __m512i* b = block + i * kVectors;
    if (ahead != nullptr) _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
#pragma GCC unroll 6
    for (int64_t r = 0; r < kRows; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(rows[r][i]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, (__m512bh)b[v]);
    }
  }
  copy<kRows>(sums, target);
}

// The same for a stack of rows that lie one after another, by tiles where the processor has them, of some pairs of inputs.
#ifdef BUILT_FOR_TILES

constexpr int64_t kStack = 16, kPairs = 16;  // rows of a tile, and pairs of inputs
static_assert(kDepth % kPairs == 0, "a block is made of whole tiles");

// Registers of 16 rows of 16 words, which a thread has for as long as this lives.
class TileRegisters {
 public:
  TileRegisters() {
    // Constant: a compiler does not know how much of it is read.
    struct alignas(64) Config {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64, "as the processor reads it");
    static constexpr Config config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Asks the system for them, for all threads of the process (Linux's arch_prctl).
  static bool are_allowed() {
    constexpr long kRequestState = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
  }
};

template <bool kAdds>
inline void multiply_stack(const uint32_t (*rows)[kDepth], const __m512i* block, __m512 (*target)[kVectors],
                           int64_t end = kDepth, int64_t begin = 0) {
  constexpr int64_t kRowBytes = sizeof *rows, kSumBytes = sizeof *target, kPairBytes = kVectors * sizeof *block;
  asm volatile("" : : : "memory");  // compilers do not know that loading a tile reads memory
  if (kAdds) {
    _tile_loadd(0, target[0] + 0, kSumBytes);
    _tile_loadd(1, target[0] + 1, kSumBytes);
    _tile_loadd(2, target[0] + 2, kSumBytes);
    _tile_loadd(3, target[0] + 3, kSumBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = begin / kPairs * kPairs; i < end; i += kPairs) {  // pairs before the first and behind the last have no weight
    const __m512i* b = block + i * kVectors;
    _tile_loadd(4, rows[0] + i, kRowBytes);
    _tile_loadd(5, b + 0, kPairBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 1, kPairBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 2, kPairBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 3, kPairBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, target[0] + 0, kSumBytes);
  _tile_stored(1, target[0] + 1, kSumBytes);
  _tile_stored(2, target[0] + 2, kSumBytes);
  _tile_stored(3, target[0] + 3, kSumBytes);
}

#else

constexpr int64_t kStack = kTile;

struct TileRegisters {
  TileRegisters() {}  // else a compiler finds it unused
  static bool are_allowed() { return true; }
};

template <bool kAdds>
inline void multiply_stack(const uint32_t (*rows)[kDepth], const __m512i* block, __m512 (*target)[kVectors],
                           int64_t end = kDepth, int64_t begin = 0) {
  const uint32_t* each[kStack];
  for (int64_t r = 0; r < kStack; ++r) each[r] = rows[r] + begin;
  multiply<kStack, kAdds>(each, block + begin * kVectors, target, end - begin);
}

#endif

// 16 words of 16 rows, as columns.
inline void transpose(__m512i* rows) {
  __m512i pairs[16], fours[16];
  for (int64_t r = 0; r < 16; r += 2) {
    pairs[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
  }
  for (int64_t r = 0; r < 16; r += 4) {  // lane l of fours[r + c]: column 4l + c of rows r to r + 3
    for (int64_t c = 0; c < 4; c += 2) {
      fours[r + c] = _mm512_unpacklo_epi64(pairs[r + c / 2], pairs[r + c / 2 + 2]);
      fours[r + c + 1] = _mm512_unpackhi_epi64(pairs[r + c / 2], pairs[r + c / 2 + 2]);
    }
  }
  for (int64_t c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
}

// A row of a tile, scaled, as bf16.
inline void store(void* target, const __m512* values, __m512 scale) {
  for (int64_t v = 0; v < kVectors; v += 2) {
    const __m512 low = _mm512_mul_ps(values[v], scale), high = _mm512_mul_ps(values[v + 1], scale);
    _mm512_storeu_si512(static_cast<char*>(target) + 32 * v, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// 2^x to within 8e-5 of it, a small part of a bf16's rounding; 0 far below.
inline __m512 coarse_power_of_two(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1)
  __m512 p = _mm512_set1_ps(7.802452e-2f);
  for (float c : {2.2606716e-1f, 6.9583356e-1f, 9.999252e-1f}) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);  // times 2 to the power of x rounded down
}

// The same to within 4e-6.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.66636852e-3f);
  for (float c : {5.59219758e-2f, 2.40223490e-1f, 6.93121045e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, whole);
}
