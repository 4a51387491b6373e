// Attention in bf16 with float32 sums, for heads of 64 channels: softmax(q k^T / 8) v by the processor's products of pairs
// of bf16; of whole rows, causally, and of single queries with the slots of a cache.
//
// Whole rows do not keep their scores (Dao et al., arXiv 2205.14135). Their keys and values are packed once, in blocks of 64.
// A row's sums are taken in the order of its keys and its weights depend on nothing behind it, whoever computes it and
// whatever finite numbers come later.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <omp.h>

#include <algorithm>

#include "tiles.h"

namespace {

constexpr int64_t kChannels = 64;
constexpr int64_t kRows = 96;  // for which a block is fetched once
constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(C), and powers of 2 instead of e
constexpr float kSlack = 32.0f;  // weights up to 2^6 are fine: the sums are rescaled only if a score exceeds that
constexpr int64_t kWorthSharing = 4096;  // slots of all heads, half a megabyte each of keys and values
constexpr float kNever = -1e30f;  // a score without weight

struct Tensor {
  const uint16_t* data;
  int64_t sequence, head, row;  // strides; channels are adjacent
};

struct Heads {
  Tensor q, k, v;
  uint16_t* out;  // (sequences, length, heads, 64)
  Block* packed;  // room for the keys, then the values: (2, sequences, heads, blocks)
  int64_t num_sequences, num_heads, length;

  int64_t num_blocks() const { return (length + kBlock - 1) / kBlock; }
  const uint16_t* row(const Tensor& tensor, int64_t index, int64_t row) const {
    return tensor.data + index / num_heads * tensor.sequence + index % num_heads * tensor.head + row * tensor.row;
  }
};

void pack_block(const Heads& heads, int64_t index, int64_t block, uint32_t* keys, uint32_t* values) {
  const int64_t first = block * kBlock, count = std::min(kBlock, heads.length - first);
  std::fill(keys, keys + kBlock * kDepth, 0);
  std::fill(values, values + kBlock * kDepth, 0);
  for (int64_t s = 0; s < count; ++s) {
    const uint32_t* key = reinterpret_cast<const uint32_t*>(heads.row(heads.k, index, first + s));
    for (int64_t c = 0; c < kDepth; ++c) keys[c * kBlock + s] = key[c];
    const uint16_t* value = heads.row(heads.v, index, first + s);
    for (int64_t d = 0; d < kChannels; ++d) values[s / 2 * kChannels + d] |= uint32_t(value[d]) << (s % 2 * 16);
  }
}

// 2^x to within 4e-6 of it, a small part of a bf16's rounding; 0 far below.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.66636852e-3f);
  for (float c : {5.59219758e-2f, 2.40223490e-1f, 6.93121045e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, whole);
}

// Rows [first, first + kRows) of one head.
struct Rows {
  alignas(64) __m512 sums[kRows][kVectors];
  __m512 totals[kRows];
  float highest[kRows];

  void attend(const Heads& heads, int64_t index, int64_t first, const Block* keys, const Block* values) {
    const int64_t count = std::min(kRows, heads.length - first);
    std::fill(&sums[0][0], &sums[0][0] + kRows * kVectors, _mm512_setzero_ps());
    std::fill(totals, totals + kRows, _mm512_setzero_ps());
    std::fill(highest, highest + kRows, kNever);
    for (int64_t block = 0; block * kBlock < first + count; ++block) {
      for (int64_t r = 0; r < count; r += kTile) {
        if (block * kBlock < first + r + kTile) attend_block(heads, index, first, r, count, block, keys[block], values[block]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(totals[r]));
      const int64_t sequence = index / heads.num_heads, head = index % heads.num_heads;
      uint16_t* out = heads.out + ((sequence * heads.length + first + r) * heads.num_heads + head) * kChannels;
      store(out, sums[r], scale);
    }
  }

  // The tile of rows from `r` on against one block of keys. Rows behind the last are computed as the last and not kept.
  void attend_block(const Heads& heads, int64_t index, int64_t first, int64_t r, int64_t count, int64_t block,
                    const __m512i* keys, const __m512i* values) {
    alignas(64) uint32_t weights[kTile][kDepth];  // pairs of bf16
    const uint32_t *queries[kTile], *pairs[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      queries[i] = reinterpret_cast<const uint32_t*>(heads.row(heads.q, index, first + std::min(r + i, count - 1)));
      pairs[i] = weights[i];
    }
    __m512 scores[kTile][kVectors] = {};
    multiply(queries, keys, scores);
    for (int64_t i = 0; i < kTile; ++i) weigh(first + r + i - block * kBlock, r + i, scores[i], weights[i]);
    multiply(pairs, values, sums + r);
  }

  // Weights of a row from its scores; the first `last + 1` keys of the block are not behind it.
  void weigh(int64_t last, int64_t row, __m512* scores, uint32_t* weights) {
    if (last + 1 < kBlock) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t num_seen = std::clamp<int64_t>(last + 1 - 16 * v, 0, 16);
        scores[v] = _mm512_mask_mov_ps(_mm512_set1_ps(kNever), __mmask16((1u << num_seen) - 1), scores[v]);
      }
    }
    const __m512 top = _mm512_max_ps(_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3]));
    if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(highest[row] + kSlack), _CMP_GT_OQ)) rescale(row, _mm512_reduce_max_ps(top));
    const __m512 scale = _mm512_set1_ps(kScale), zero = _mm512_set1_ps(highest[row] * kScale);
    for (int64_t v = 0; v < kVectors; ++v) {
      scores[v] = power_of_two(_mm512_fmsub_ps(scores[v], scale, zero));
      totals[row] = _mm512_add_ps(totals[row], scores[v]);
    }
    store(weights, scores, _mm512_set1_ps(1.0f));
  }

  void rescale(int64_t row, float now) {
    const __m512 scale = power_of_two(_mm512_set1_ps((highest[row] - now) * kScale));
    for (int64_t v = 0; v < kVectors; ++v) sums[row][v] = _mm512_mul_ps(sums[row][v], scale);
    totals[row] = _mm512_mul_ps(totals[row], scale);
    highest[row] = now;
  }
};

// One query of each head against the slots of its cache; a head's bits depend on no other's and on no masked slot.
struct Steps {
  Tensor q, keys, values;  // `row` is the stride of a slot
  const uint16_t* mask;    // bf16 (sequences, slots): 0, or minus infinity for a slot that is not attended to; null for none
  int64_t mask_stride;
  uint16_t* out;   // (sequences, heads, 64)
  float* weights;  // room for them: (threads, slots)
  int64_t num_sequences, num_heads, num_slots;
};

inline __m512i channels(const uint16_t* row, int64_t half) { return _mm512_loadu_si512(row + 32 * half); }
inline __m512 even(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 odd(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))); }

void attend_once(const Steps& steps, int64_t index, float* weights) {
  const int64_t sequence = index / steps.num_heads, head = index % steps.num_heads;
  const auto start = [&](const Tensor& tensor) { return tensor.data + sequence * tensor.sequence + head * tensor.head; };
  const uint16_t *query = start(steps.q), *keys = start(steps.keys), *values = start(steps.values);
  const uint16_t* mask = steps.mask == nullptr ? nullptr : steps.mask + sequence * steps.mask_stride;
  const __m512bh q0 = (__m512bh)channels(query, 0), q1 = (__m512bh)channels(query, 1);
  float highest = kNever;
  for (int64_t s = 0; s < steps.num_slots; ++s) {
    weights[s] = kNever;
    if (mask != nullptr && mask[s] != 0) continue;
    const uint16_t* key = keys + s * steps.keys.row;
    const __m512 first = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)channels(key, 0), q0);
    weights[s] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(first, (__m512bh)channels(key, 1), q1));
    highest = std::max(highest, weights[s]);
  }
  __m512 sums[kVectors] = {};
  float total = 0;
  for (int64_t s = 0; s < steps.num_slots; s += 16) {
    const int64_t count = std::min<int64_t>(16, steps.num_slots - s);
    const __m512 scores = _mm512_mask_loadu_ps(_mm512_set1_ps(kNever), __mmask16((1u << count) - 1), weights + s);
    alignas(64) float block[16];
    _mm512_store_ps(block, power_of_two(_mm512_mul_ps(_mm512_sub_ps(scores, _mm512_set1_ps(highest)), _mm512_set1_ps(kScale))));
    for (int64_t i = 0; i < count; ++i) {
      if (block[i] == 0) continue;
      const __m512 weight = _mm512_set1_ps(block[i]);
      const __m512i low = channels(values + (s + i) * steps.values.row, 0), high = channels(values + (s + i) * steps.values.row, 1);
      sums[0] = _mm512_fmadd_ps(weight, even(low), sums[0]);
      sums[1] = _mm512_fmadd_ps(weight, odd(low), sums[1]);
      sums[2] = _mm512_fmadd_ps(weight, even(high), sums[2]);
      sums[3] = _mm512_fmadd_ps(weight, odd(high), sums[3]);
      total += block[i];
    }
  }
  uint16_t* out = steps.out + index * kChannels;
  for (int64_t half = 0; half < 2; ++half) {
    const __m512 scale = _mm512_set1_ps(1.0f / total);
    const __m512i evens = (__m512i)_mm512_mul_ps(sums[2 * half], scale), odds = (__m512i)_mm512_mul_ps(sums[2 * half + 1], scale);
    // The two halves of a word again, each rounded to the nearest bf16.
    const __m256i rounded_evens = (__m256i)_mm512_cvtneps_pbh((__m512)evens), rounded_odds = (__m256i)_mm512_cvtneps_pbh((__m512)odds);
    const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(rounded_evens), _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded_odds), 16));
    _mm512_storeu_si512(out + 32 * half, words);
  }
}

}  // namespace

extern "C" int64_t attention_is_supported() { return 1; }

extern "C" void attend_causally(const Heads* heads, int64_t num_threads) {
  const int64_t num_blocks = heads->num_blocks(), num_heads = heads->num_sequences * heads->num_heads;
  const int64_t num_parts = (heads->length + kRows - 1) / kRows;
  Block* keys = heads->packed;
  Block* values = keys + num_heads * num_blocks;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_blocks; ++i) {
    pack_block(*heads, i / num_blocks, i % num_blocks, reinterpret_cast<uint32_t*>(keys[i]),
               reinterpret_cast<uint32_t*>(values[i]));
  }
  // The longest parts first, so that the threads end together.
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_parts; ++i) {
    Rows rows;
    const int64_t index = i % num_heads, part = num_parts - 1 - i / num_heads;
    rows.attend(*heads, index, part * kRows, keys + index * num_blocks, values + index * num_blocks);
  }
}

extern "C" void attend_to_slots(const Steps* steps, int64_t num_threads) {
  const int64_t num_heads = steps->num_sequences * steps->num_heads;
  const bool is_long = num_heads * steps->num_slots > kWorthSharing;
#pragma omp parallel for num_threads(num_threads) if (is_long)
  for (int64_t i = 0; i < num_heads; ++i) attend_once(*steps, i, steps->weights + omp_get_thread_num() * steps->num_slots);
}

#else

extern "C" int64_t attention_is_supported() { return 0; }

extern "C" void attend_causally(const void*, int64_t) {}
extern "C" void attend_to_slots(const void*, int64_t) {}

#endif
