// Attention of whole rows in bf16 with float32 sums, causally, for heads of 64 channels: softmax(q k^T / 8) v by the
// processor's products of pairs of bf16.
//
// Scores are not kept (Dao et al., arXiv 2205.14135). Keys and values are packed once, in blocks of 64.
// A row's sums are taken in the order of its keys and its weights depend on nothing behind it, whoever computes it and
// whatever finite numbers come later.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <algorithm>

#include "heads.h"
#include "tiles.h"

namespace {

constexpr int64_t kRows = 96;  // for which a block is fetched once
constexpr float kSlack = 32.0f;  // weights up to 2^6 are fine: the sums are rescaled only if a score exceeds that

struct Tensor {
  const uint16_t* data;
  int64_t sequence, head, row;  // strides; channels are adjacent
};

// Queries or keys that are to be normalised and turned.
struct Places {
  Tensor x;
  uint16_t* y;             // (sequences, heads, length, 64)
  const float *cos, *sin;  // (length, 64), or null
  int64_t num_sequences, num_heads, length;
  double epsilon;
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

extern "C" void place(const Places* places, int64_t num_threads) {
  const int64_t num_heads = places->num_heads, length = places->length;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < places->num_sequences * length; ++i) {
    const int64_t sequence = i / length, row = i % length;
    const float* cos = places->cos == nullptr ? nullptr : places->cos + row * kChannels;
    const float* sin = places->sin == nullptr ? nullptr : places->sin + row * kChannels;
    const uint16_t* x = places->x.data + sequence * places->x.sequence + row * places->x.row;
    uint16_t* y = places->y + (sequence * num_heads * length + row) * kChannels;
    for (int64_t head = 0; head < num_heads; ++head) {
      place_head(x + head * places->x.head, float(places->epsilon), cos, sin, y + head * length * kChannels);
    }
  }
}

#else

extern "C" int64_t attention_is_supported() { return 0; }

extern "C" void attend_causally(const void*, int64_t) {}
extern "C" void place(const void*, int64_t) {}

#endif
