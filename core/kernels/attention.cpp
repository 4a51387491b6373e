// Attention of whole rows in bf16 with float32 sums, causally, for heads of 64 channels: softmax(q k^T / 8) v by the
// processor's products of pairs of bf16.
//
// Scores are not kept (Dao et al., arXiv 2205.14135): the gradients are made from scores that are computed again. Keys and
// values are packed once, in blocks of 64.
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

// What has `num_heads` heads in each of its sequences.
struct Shape {
  int64_t num_sequences, num_heads, length;

  int64_t num_blocks() const { return (length + kBlock - 1) / kBlock; }
  int64_t num_all_blocks() const { return num_sequences * num_heads * num_blocks(); }
  const uint16_t* row(const Tensor& x, int64_t index, int64_t row) const {
    return x.data + index / num_heads * x.sequence + index % num_heads * x.head + row * x.row;
  }
  // Of a tensor (sequences, length, heads, 64).
  int64_t place(int64_t index, int64_t row) const {
    return ((index / num_heads * length + row) * num_heads + index % num_heads) * kChannels;
  }
};

struct Heads {
  Tensor q, k, v;
  uint16_t* out;  // (sequences, length, heads, 64)
  float* logs;    // (sequences, heads, blocks, 64), or null: to the base 2, of the sums of weights
  Block* packed;  // room for the keys, then the values: (2, sequences, heads, blocks)
  Shape shape;
};

// Rows as columns of a right side: pairs of channels.
void pack_columns(const Shape& shape, const Tensor& x, int64_t index, int64_t block, Block& packed) {
  const int64_t first = block * kBlock, count = std::min(kBlock, shape.length - first);
  uint32_t* columns = reinterpret_cast<uint32_t*>(packed);
  std::fill(columns, columns + kBlock * kDepth, 0);
  for (int64_t s = 0; s < count; ++s) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(shape.row(x, index, first + s));
    for (int64_t c = 0; c < kDepth; ++c) columns[c * kBlock + s] = row[c];
  }
}

// Rows as inputs of a right side: pairs of rows.
void pack_rows(const Shape& shape, const Tensor& x, int64_t index, int64_t block, Block& packed) {
  const int64_t first = block * kBlock, count = std::min(kBlock, shape.length - first);
  uint32_t* rows = reinterpret_cast<uint32_t*>(packed);
  std::fill(rows, rows + kBlock * kDepth, 0);
  for (int64_t s = 0; s < count; ++s) {
    const uint16_t* row = shape.row(x, index, first + s);
    for (int64_t d = 0; d < kChannels; d += 16) {
      const __m512i channels = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
      uint32_t* pair = rows + s / 2 * kChannels + d;
      _mm512_storeu_si512(pair, s % 2 == 0 ? channels : _mm512_or_si512(_mm512_loadu_si512(pair), _mm512_slli_epi32(channels, 16)));
    }
  }
}

// Rows [first, first + kRows) of one head.
struct Rows {
  alignas(64) __m512 sums[kRows][kVectors];
  __m512 totals[kRows];
  float highest[kRows];

  void attend(const Heads& heads, int64_t index, int64_t first, const Block* keys, const Block* values) {
    const int64_t count = std::min(kRows, heads.shape.length - first);
    std::fill(&sums[0][0], &sums[0][0] + kRows * kVectors, _mm512_setzero_ps());
    std::fill(totals, totals + kRows, _mm512_setzero_ps());
    std::fill(highest, highest + kRows, kNever);
    for (int64_t block = 0; block * kBlock < first + count; ++block) {
      for (int64_t r = 0; r < count; r += kTile) {
        if (block * kBlock < first + r + kTile) attend_block(heads, index, first, r, count, block, keys[block], values[block]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const float total = _mm512_reduce_add_ps(totals[r]);
      store(heads.out + heads.shape.place(index, first + r), sums[r], _mm512_set1_ps(1.0f / total));
      if (heads.logs == nullptr) continue;
      heads.logs[index * heads.shape.num_blocks() * kBlock + first + r] = highest[r] * kScale + std::log2(total);
    }
  }

  // The tile of rows from `r` on against one block of keys. Rows behind the last are computed as the last and not kept.
  void attend_block(const Heads& heads, int64_t index, int64_t first, int64_t r, int64_t count, int64_t block,
                    const __m512i* keys, const __m512i* values) {
    alignas(64) uint32_t weights[kTile][kDepth];  // pairs of bf16
    const uint32_t *queries[kTile], *pairs[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      queries[i] = reinterpret_cast<const uint32_t*>(heads.shape.row(heads.q, index, first + std::min(r + i, count - 1)));
      pairs[i] = weights[i];
    }
    __m512 scores[kTile][kVectors];
    multiply<kTile, false>(queries, keys, scores);
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

struct Gradients {
  Tensor q, k, v, out, grad;  // the last of `out`
  const float* logs;          // of `Heads`
  float* dots;                // room, as the logs: of the rows of `out` and `grad`
  uint16_t *dq, *dk, *dv;     // (sequences, length, heads, 64)
  Block* packed;              // room: (7, sequences, heads, blocks)
  Shape shape;

  Block* columns(int64_t which) const { return packed + which * shape.num_all_blocks(); }
  Block* rows(int64_t which) const { return packed + (4 + which) * shape.num_all_blocks(); }
};

enum { kQueries, kGrads, kKeys, kValues };  // the order of the packed ones; values are needed as columns alone

void pack_for_gradients(const Gradients& g, int64_t i) {
  const int64_t index = i / g.shape.num_blocks(), block = i % g.shape.num_blocks();
  const Tensor* tensors[] = {&g.q, &g.grad, &g.k, &g.v};
  for (int64_t which : {kQueries, kGrads, kKeys, kValues}) {
    pack_columns(g.shape, *tensors[which], index, block, g.columns(which)[i]);
    if (which != kValues) pack_rows(g.shape, *tensors[which], index, block, g.rows(which)[i]);
  }
  for (int64_t row = block * kBlock; row < std::min((block + 1) * kBlock, g.shape.length); ++row) {
    const uint16_t *out = g.shape.row(g.out, index, row), *grad = g.shape.row(g.grad, index, row);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < kChannels; d += 16) sum = _mm512_fmadd_ps(load_bf16(out + d), load_bf16(grad + d), sum);
    g.dots[i * kBlock + row % kBlock] = _mm512_reduce_add_ps(sum);
  }
}

// The gradients of a tile of queries, or of keys and their values: the same products with their sides exchanged. A weight w of
// a score s has the slope w (grad . v - grad . out), for its row's weights add up to 1.
template <bool kOfKeys>
void differentiate(const Gradients& g, int64_t index, int64_t first) {
  const int64_t num_blocks = g.shape.num_blocks(), start = index * num_blocks, count = std::min(kTile, g.shape.length - first);
  const uint32_t *own[kTile], *with[kTile], *weight_pairs[kTile], *slope_pairs[kTile];
  alignas(64) uint32_t weights[kTile][kDepth], slopes[kTile][kDepth];
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t row = first + std::min(i, count - 1);
    own[i] = reinterpret_cast<const uint32_t*>(g.shape.row(kOfKeys ? g.k : g.q, index, row));
    with[i] = reinterpret_cast<const uint32_t*>(g.shape.row(kOfKeys ? g.v : g.grad, index, row));
    weight_pairs[i] = weights[i];
    slope_pairs[i] = slopes[i];
  }
  __m512 sums[kTile][kVectors] = {}, value_sums[kTile][kVectors] = {};
  const int64_t diagonal = (first + (kOfKeys ? 0 : count - 1)) / kBlock;
  for (int64_t block = kOfKeys ? diagonal : 0; block < (kOfKeys ? num_blocks : diagonal + 1); ++block) {
    __m512 scores[kTile][kVectors], products[kTile][kVectors];
    multiply<kTile, false>(own, g.columns(kOfKeys ? kQueries : kKeys)[start + block], scores);
    multiply<kTile, false>(with, g.columns(kOfKeys ? kGrads : kValues)[start + block], products);
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t row = first + std::min(i, count - 1) - block * kBlock;  // as seen from the block
      const auto ones = [](int64_t end) { return end >= kBlock ? ~uint64_t(0) : (uint64_t(1) << std::max<int64_t>(end, 0)) - 1; };
      const uint64_t seen = kOfKeys ? ones(g.shape.length - block * kBlock) & ~ones(row) : ones(row + 1);
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t column = start * kBlock + block * kBlock + (kOfKeys ? 16 * v : row);
        const __m512 log = kOfKeys ? _mm512_loadu_ps(g.logs + column) : _mm512_set1_ps(g.logs[column]);
        const __m512 dot = kOfKeys ? _mm512_loadu_ps(g.dots + column) : _mm512_set1_ps(g.dots[column]);
        const __mmask16 is_seen = __mmask16(seen >> (16 * v));
        const __m512 weight = power_of_two(_mm512_fmsub_ps(scores[i][v], _mm512_set1_ps(kScale), log));
        scores[i][v] = _mm512_maskz_mov_ps(is_seen, weight);
        products[i][v] = _mm512_maskz_mul_ps(is_seen, weight, _mm512_sub_ps(products[i][v], dot));
      }
      store(weights[i], scores[i], _mm512_set1_ps(1.0f));
      store(slopes[i], products[i], _mm512_set1_ps(0.125f));
    }
    multiply(slope_pairs, g.rows(kOfKeys ? kQueries : kKeys)[start + block], sums);
    if (kOfKeys) multiply(weight_pairs, g.rows(kGrads)[start + block], value_sums);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = g.shape.place(index, first + i);
    store((kOfKeys ? g.dk : g.dq) + place, sums[i], _mm512_set1_ps(1.0f));
    if (kOfKeys) store(g.dv + place, value_sums[i], _mm512_set1_ps(1.0f));
  }
}

}  // namespace

extern "C" int64_t attention_is_supported() { return 1; }

extern "C" void attend_causally(const Heads* heads, int64_t num_threads) {
  const Shape& shape = heads->shape;
  const int64_t num_blocks = shape.num_blocks(), num_heads = shape.num_sequences * shape.num_heads;
  const int64_t num_parts = (shape.length + kRows - 1) / kRows;
  Block* keys = heads->packed;
  Block* values = keys + num_heads * num_blocks;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_blocks; ++i) {
    pack_columns(shape, heads->k, i / num_blocks, i % num_blocks, keys[i]);
    pack_rows(shape, heads->v, i / num_blocks, i % num_blocks, values[i]);
  }
  // The longest parts first, so that the threads end together.
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_parts; ++i) {
    Rows rows;
    const int64_t index = i % num_heads, part = num_parts - 1 - i / num_heads;
    rows.attend(*heads, index, part * kRows, keys + index * num_blocks, values + index * num_blocks);
  }
}

extern "C" void differentiate_attention(const Gradients* g, int64_t num_threads) {
  const Shape& shape = g->shape;
  const int64_t num_tiles = (shape.length + kTile - 1) / kTile;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < shape.num_all_blocks(); ++i) pack_for_gradients(*g, i);
  // The last queries see the most keys, and the first keys are seen by the most: both together are as much work everywhere.
#pragma omp parallel for schedule(dynamic, 8) num_threads(num_threads)
  for (int64_t i = 0; i < shape.num_sequences * shape.num_heads * num_tiles; ++i) {
    differentiate<false>(*g, i / num_tiles, i % num_tiles * kTile);
    differentiate<true>(*g, i / num_tiles, i % num_tiles * kTile);
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
extern "C" void differentiate_attention(const void*, int64_t) {}
extern "C" void place(const void*, int64_t) {}

#endif
