// Attention of whole rows in bf16 with float32 sums, causally, for heads of 64 channels: softmax(q k^T / 8) v by the
// processor's products of pairs of bf16, or of tiles of them (AMX).
//
// Scores are not kept (Dao et al., arXiv 2205.14135): the gradients are made from scores that are computed again. Keys and
// values are packed once, in blocks of 64.
// A row's sums are taken in the order of its keys and its weights depend on nothing behind it, whoever computes it and
// whatever finite numbers come later. A sequence of a few rows would leave most of a block empty: it is attended to in float32,
// the scores of a row in one vector.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <algorithm>
#include <cstring>

#include "heads.h"
#include "tiles.h"

namespace {

constexpr int64_t kRows = 96;  // for which a block is fetched once
static_assert(kRows % kStack == 0, "rows behind the last have room");
constexpr int64_t kShort = 16;  // rows of a sequence whose scores of one row are one vector
constexpr float kSlack = 32.0f;  // weights up to 2^6 are fine: the sums are rescaled only if a score exceeds that

struct Tensor {
  const uint16_t* data;
  int64_t sequence, head, row;  // strides; channels are adjacent
};

// How queries and keys are placed.
struct Places {
  const float *cos, *sin;  // (length, 64), or null
  double epsilon;

  const float* cos_of(int64_t row) const { return cos == nullptr ? nullptr : cos + row * kChannels; }
  const float* sin_of(int64_t row) const { return sin == nullptr ? nullptr : sin + row * kChannels; }
};

// What has `num_heads` heads in each of its sequences.
struct Shape {
  int64_t num_sequences, num_heads, length;

  int64_t num_blocks() const { return (length + kBlock - 1) / kBlock; }
  int64_t num_all_blocks() const { return num_sequences * num_heads * num_blocks(); }
  const uint16_t* row(const Tensor& x, int64_t index, int64_t row) const {
    return x.data + index / num_heads * x.sequence + index % num_heads * x.head + row * x.row;
  }
  // Of a tensor (sequences, length, parts, heads, 64).
  int64_t place(int64_t index, int64_t row, int64_t part = 0, int64_t num_parts = 1) const {
    return (((index / num_heads * length + row) * num_parts + part) * num_heads + index % num_heads) * kChannels;
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
  for (int64_t s = 0; s < kBlock; s += 16) {
    for (int64_t c = 0; c < kDepth; c += 16) {
      __m512i words[16];
      for (int64_t r = 0; r < 16; ++r) {
        words[r] = s + r < count ? _mm512_loadu_si512(shape.row(x, index, first + s + r) + 2 * c) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int64_t i = 0; i < 16; ++i) packed[(c + i) * kVectors + s / 16] = words[i];
    }
  }
}

// Rows as inputs of a right side: pairs of rows.
void pack_rows(const Shape& shape, const Tensor& x, int64_t index, int64_t block, Block& packed) {
  const int64_t first = block * kBlock, count = std::min(kBlock, shape.length - first);
  for (int64_t s = 0; s < kBlock; s += 2) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto load = [&](int64_t row) {
        const uint16_t* channels = shape.row(x, index, first + row) + 16 * v;
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels)));
      };
      __m512i pair = s < count ? load(s) : _mm512_setzero_si512();
      if (s + 1 < count) pair = _mm512_or_si512(pair, _mm512_slli_epi32(load(s + 1), 16));
      packed[s / 2 * kVectors + v] = pair;
    }
  }
}

// How many pairs of a block hold its first `end` rows; more than there are fill it.
int64_t pairs_until(int64_t end) { return std::min(kDepth, (end + 1) / 2); }

// What is worked on: `kStack` of some rows, from `row` on, and one block of the others, which one of them sees or is seen by.
struct Stack {
  int64_t block, row, turn;
};

template <bool kSeesLater = false>
Stack after(const Stack& stack, int64_t first, int64_t count) {
  const int64_t end = kSeesLater ? std::min(count, (stack.block + 1) * kBlock - first) : count;
  if (stack.row + kStack < end) return {stack.block, stack.row + kStack, 1 - stack.turn};
  const int64_t block = stack.block + 1;
  return {block, kSeesLater ? 0 : std::max<int64_t>(0, (block * kBlock - first) / kStack * kStack), 1 - stack.turn};
}

// Rows [first, first + kRows) of one head.
struct Rows {
  alignas(64) __m512 sums[kRows][kVectors];
  __m512 totals[kRows];
  float highest[kRows];
  alignas(64) uint32_t queries[kRows][kDepth], weights[kStack][kDepth];  // pairs of bf16

  void attend(const Heads& heads, int64_t index, int64_t first, const Block* keys, const Block* values) {
    const TileRegisters registers;
    const int64_t count = std::min(kRows, heads.shape.length - first), end = first + count;
    std::fill(&sums[0][0], &sums[0][0] + kRows * kVectors, _mm512_setzero_ps());
    std::fill(totals, totals + kRows, _mm512_setzero_ps());
    std::fill(highest, highest + kRows, kNever);
    for (int64_t r = 0; r < kRows; ++r) {  // rows behind the last are computed as the last and not kept
      std::memcpy(queries[r], heads.shape.row(heads.q, index, first + std::min(r, count - 1)), sizeof *queries);
    }
    // A stack of rows against one block of keys after another. What a tile stores can be read only a while later: the scores of
    // the stack after the next are made between the weights of this one and their products.
    alignas(64) __m512 scores[2][kStack][kVectors];
    const auto score = [&](const Stack& stack) {
      if (stack.block * kBlock < end) multiply_stack<false>(queries + stack.row, keys[stack.block], scores[stack.turn]);
    };
    Stack stack = {0, 0, 0}, next = after(stack, first, count);
    score(stack);
    score(next);
    while (stack.block * kBlock < end) {
      const int64_t seen = first + stack.row - stack.block * kBlock;  // of the block's keys, by the first row, besides its own
      for (int64_t i = 0; i < kStack; ++i) weigh(seen + i, stack.row + i, scores[stack.turn][i], weights[i]);
      const Stack later = after(next, first, count);
      score(later);
      multiply_stack<true>(weights, values[stack.block], sums + stack.row, pairs_until(seen + kStack));
      stack = next;
      next = later;
    }
    for (int64_t r = 0; r < count; ++r) {
      const float total = _mm512_reduce_add_ps(totals[r]);
      store(heads.out + heads.shape.place(index, first + r), sums[r], _mm512_set1_ps(1.0f / total));
      if (heads.logs == nullptr) continue;
      heads.logs[index * heads.shape.num_blocks() * kBlock + first + r] = highest[r] * kScale + std::log2(total);
    }
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
      scores[v] = coarse_power_of_two(_mm512_fmsub_ps(scores[v], scale, zero));
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
  Tensor q, k, v, out, grad;        // the last of `out`
  const float* logs;                // of `Heads`
  float* dots;                      // room, as the logs: of the rows of `out` and `grad`
  uint16_t* found;                  // (sequences, length, 3, heads, 64): of queries, keys and values before they were placed
  Block* packed;                    // room: (7, sequences, heads, blocks)
  Tensor unplaced_q, unplaced_k;
  Places places;
  Shape shape;

  uint16_t* found_of(int64_t part, int64_t index, int64_t row) const { return found + shape.place(index, row, part, 3); }
  void store_query(int64_t index, int64_t row, const __m512* grads) const { store_placed(0, unplaced_q, index, row, grads); }
  void store_key(int64_t index, int64_t row, const __m512* grads) const { store_placed(1, unplaced_k, index, row, grads); }
  void store_value(int64_t index, int64_t row, const __m512* grads) const {
    store(found_of(2, index, row), grads, _mm512_set1_ps(1.0f));
  }
  void store_placed(int64_t part, const Tensor& x, int64_t index, int64_t row, const __m512* grads) const {
    const float *cos = places.cos_of(row), *sin = places.sin_of(row);
    place_head_back(shape.row(x, index, row), float(places.epsilon), cos, sin, grads, found_of(part, index, row));
  }
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

// The gradients of rows [first, first + kRows) of queries, or of keys and their values: the same products with their sides
// exchanged. A weight w of a score s has the slope w (grad . v - grad . out), for its row's weights add up to 1.
template <bool kOfKeys>
struct RowGradients {
  alignas(64) uint32_t own[kRows][kDepth], with[kRows][kDepth];  // keys and values, or queries and their gradients
  alignas(64) __m512 sums[kRows][kVectors], value_sums[kOfKeys ? kRows : 1][kVectors];
  alignas(64) __m512 scores[2][kStack][kVectors], products[2][kStack][kVectors];
  alignas(64) uint32_t weights[kStack][kDepth], slopes[kStack][kDepth];  // pairs of bf16

  void differentiate(const Gradients& g, int64_t index, int64_t first) {
    const TileRegisters registers;
    const int64_t count = std::min(kRows, g.shape.length - first), start = index * g.shape.num_blocks();
    const int64_t end = kOfKeys ? g.shape.num_blocks() : (first + count - 1) / kBlock + 1;
    for (int64_t r = 0; r < kRows; ++r) {  // rows behind the last are computed as the last and not kept
      const int64_t row = first + std::min(r, count - 1);
      std::memcpy(own[r], g.shape.row(kOfKeys ? g.k : g.q, index, row), sizeof *own);
      std::memcpy(with[r], g.shape.row(kOfKeys ? g.v : g.grad, index, row), sizeof *with);
    }
    std::fill(&sums[0][0], &sums[0][0] + sizeof sums / sizeof(__m512), _mm512_setzero_ps());
    std::fill(&value_sums[0][0], &value_sums[0][0] + sizeof value_sums / sizeof(__m512), _mm512_setzero_ps());
    // As in `Rows`: what a tile stores is read a while later.
    const auto score = [&](const Stack& stack) {
      if (stack.block >= end) return;
      multiply_stack<false>(own + stack.row, g.columns(kOfKeys ? kQueries : kKeys)[start + stack.block], scores[stack.turn]);
      multiply_stack<false>(with + stack.row, g.columns(kOfKeys ? kGrads : kValues)[start + stack.block], products[stack.turn]);
    };
    Stack stack = {kOfKeys ? first / kBlock : 0, 0, 0};
    score(stack);
    while (stack.block < end) {
      const Stack next = after<kOfKeys>(stack, first, count);
      score(next);
      const int64_t row = first + stack.row - stack.block * kBlock;  // as seen from the block
      for (int64_t i = 0; i < kStack; ++i) weigh(g, start + stack.block, row + std::min(i, count - 1 - stack.row), stack, i);
      // Neither weights nor slopes beyond the diagonal.
      const int64_t from = kOfKeys ? std::max<int64_t>(0, row) / 2 : 0, to = kOfKeys ? kDepth : pairs_until(row + kStack);
      multiply_stack<true>(slopes, g.rows(kOfKeys ? kQueries : kKeys)[start + stack.block], sums + stack.row, to, from);
      if (kOfKeys) multiply_stack<true>(weights, g.rows(kGrads)[start + stack.block], value_sums + stack.row, to, from);
      stack = next;
    }
    for (int64_t r = 0; r < count; ++r) {
      if (kOfKeys) {
        g.store_key(index, first + r, sums[r]);
        g.store_value(index, first + r, value_sums[r]);
      } else {
        g.store_query(index, first + r, sums[r]);
      }
    }
  }

  // Weights and slopes of row i of a stack, which is row `row` as seen from the block; of all heads' blocks it is `block`.
  void weigh(const Gradients& g, int64_t block, int64_t row, const Stack& stack, int64_t i) {
    const auto ones = [](int64_t end) { return end >= kBlock ? ~uint64_t(0) : (uint64_t(1) << std::max<int64_t>(end, 0)) - 1; };
    const uint64_t seen = kOfKeys ? ones(g.shape.length - stack.block * kBlock) & ~ones(row) : ones(row + 1);
    __m512 *own_scores = scores[stack.turn][i], *own_products = products[stack.turn][i];
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t column = block * kBlock + (kOfKeys ? 16 * v : row);
      const __m512 log = kOfKeys ? _mm512_loadu_ps(g.logs + column) : _mm512_set1_ps(g.logs[column]);
      const __m512 dot = kOfKeys ? _mm512_loadu_ps(g.dots + column) : _mm512_set1_ps(g.dots[column]);
      const __mmask16 is_seen = __mmask16(seen >> (16 * v));
      const __m512 weight = coarse_power_of_two(_mm512_fmsub_ps(own_scores[v], _mm512_set1_ps(kScale), log));
      own_scores[v] = _mm512_maskz_mov_ps(is_seen, weight);
      own_products[v] = _mm512_maskz_mul_ps(is_seen, weight, _mm512_sub_ps(own_products[v], dot));
    }
    if (kOfKeys) store(weights[i], own_scores, _mm512_set1_ps(1.0f));
    store(slopes[i], own_products, _mm512_set1_ps(0.125f));
  }
};

using Head = __m512[kParts];

// Products of one head with each of the first `kMost` of others, in as many lanes.
template <int64_t kMost>
inline __m512 dots(const __m512* head, const Head* others) {
  __m512 sums[kMost];
#pragma GCC unroll 16
  for (int64_t j = 0; j < kMost; ++j) {
    sums[j] = _mm512_mul_ps(head[0], others[j][0]);
#pragma GCC unroll 4
    for (int64_t v = 1; v < kParts; ++v) sums[j] = _mm512_fmadd_ps(head[v], others[j][v], sums[j]);
  }
  // Lanes are added up while they are brought together: of two vectors, then of four, then the quarters of a vector.
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int64_t j = 0; j < kMost; j += 4) {
    __m512 twos[2];
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i) {
      const __m512 a = sums[j + 2 * i], b = sums[j + 2 * i + 1];
      twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(twos[0]), b = _mm512_castps_pd(twos[1]);
    quarters[j / 4] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto add_quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 low = add_quarters(quarters[0], quarters[1]);
  return add_quarters(low, kMost > 8 ? add_quarters(quarters[kMost > 8 ? 2 : 0], quarters[kMost > 8 ? 3 : 1]) : low);
}

inline __mmask16 lanes_until(int64_t row) { return __mmask16((2u << row) - 1); }

// One head of a sequence of at most `kMost` rows, 8 or 16.
template <int64_t kMost>
struct ShortHead {
  Head q[kMost], k[kMost], v[kMost];
  alignas(64) float weights[kMost][kShort];

  ShortHead(const Shape& shape, const Tensor& queries, const Tensor& keys, const Tensor& values, int64_t index) {
    for (int64_t i = 0; i < shape.length; ++i) {
      load_head(shape.row(queries, index, i), 0, q[i]);
      load_head(shape.row(keys, index, i), 0, k[i]);
      load_head(shape.row(values, index, i), 0, v[i]);
    }
    // What is read of the others has no weight; in what lies there by chance are numbers that processors are slow with.
    for (int64_t i = shape.length; i < kMost; ++i) std::fill_n(k[i], kParts, _mm512_setzero_ps());
    for (int64_t i = shape.length; i < kMost; ++i) std::fill_n(v[i], kParts, _mm512_setzero_ps());
    for (int64_t i = 0; i < shape.length; ++i) weigh(i);
  }

  void weigh(int64_t row) {
    const __mmask16 seen = lanes_until(row);
    const __m512 scores = _mm512_maskz_mul_ps(seen, dots<kMost>(q[row], k), _mm512_set1_ps(kScale));
    const __m512 powers = power_of_two(_mm512_sub_ps(scores, _mm512_set1_ps(_mm512_mask_reduce_max_ps(seen, scores))));
    const float total = _mm512_mask_reduce_add_ps(seen, powers);
    _mm512_store_ps(weights[row], _mm512_maskz_mul_ps(seen, powers, _mm512_set1_ps(1.0f / total)));
  }
};

inline void add_scaled(__m512* sums, float factor, const __m512* head) {
  for (int64_t v = 0; v < kParts; ++v) sums[v] = _mm512_fmadd_ps(_mm512_set1_ps(factor), head[v], sums[v]);
}

template <int64_t kMost>
void attend_short(const Heads& heads, int64_t index) {
  const ShortHead<kMost> head(heads.shape, heads.q, heads.k, heads.v, index);
  for (int64_t i = 0; i < heads.shape.length; ++i) {
    Head sums = {};
    for (int64_t j = 0; j <= i; ++j) add_scaled(sums, head.weights[i][j], head.v[j]);
    store(heads.out + heads.shape.place(index, i), sums, _mm512_set1_ps(1.0f));
  }
}

template <int64_t kMost>
void differentiate_short(const Gradients& g, int64_t index) {
  const ShortHead<kMost> head(g.shape, g.q, g.k, g.v, index);
  Head grads[kMost];
  alignas(64) float slopes[kMost][kShort];
  for (int64_t i = 0; i < g.shape.length; ++i) {
    load_head(g.shape.row(g.grad, index, i), 0, grads[i]);
    const __m512 weights = _mm512_load_ps(head.weights[i]);
    const __m512 products = _mm512_maskz_mov_ps(lanes_until(i), dots<kMost>(grads[i], head.v));
    const float mean = _mm512_reduce_add_ps(_mm512_mul_ps(weights, products));
    const __m512 rest = _mm512_sub_ps(products, _mm512_set1_ps(mean));
    _mm512_store_ps(slopes[i], _mm512_mul_ps(_mm512_mul_ps(weights, rest), _mm512_set1_ps(0.125f)));
    Head dq = {};
    for (int64_t j = 0; j <= i; ++j) add_scaled(dq, slopes[i][j], head.k[j]);
    g.store_query(index, i, dq);
  }
  for (int64_t j = 0; j < g.shape.length; ++j) {
    Head dk = {}, dv = {};
    for (int64_t i = j; i < g.shape.length; ++i) {
      add_scaled(dk, slopes[i][j], head.q[i]);
      add_scaled(dv, head.weights[i][j], grads[i]);
    }
    g.store_key(index, j, dk);
    g.store_value(index, j, dv);
  }
}

}  // namespace

extern "C" int64_t is_supported() { return TileRegisters::are_allowed(); }
extern "C" int64_t uses_tiles() { return kStack > kTile; }

extern "C" void attend_causally(const Heads* heads, int64_t num_threads) {
  const Shape& shape = heads->shape;
  const int64_t num_blocks = shape.num_blocks(), num_heads = shape.num_sequences * shape.num_heads;
  if (shape.length <= kShort) {
#pragma omp parallel for num_threads(num_threads)
    for (int64_t i = 0; i < num_heads; ++i) (shape.length <= 8 ? attend_short<8> : attend_short<kShort>)(*heads, i);
    return;
  }
  const int64_t num_parts = (shape.length + kRows - 1) / kRows;
  Block* keys = heads->packed;
  Block* values = keys + num_heads * num_blocks;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_blocks; ++i) {
    pack_columns(shape, heads->k, i / num_blocks, i % num_blocks, keys[i]);
    pack_rows(shape, heads->v, i / num_blocks, i % num_blocks, values[i]);
  }
  // Head by head, whose keys and values stay near; its longest parts first, so that the threads end together.
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t i = 0; i < num_heads * num_parts; ++i) {
    Rows rows;
    const int64_t index = i / num_parts, part = num_parts - 1 - i % num_parts;
    rows.attend(*heads, index, part * kRows, keys + index * num_blocks, values + index * num_blocks);
  }
}

extern "C" void differentiate_attention(const Gradients* g, int64_t num_threads) {
  const Shape& shape = g->shape;
  const int64_t num_parts = (shape.length + kRows - 1) / kRows;
  if (shape.length <= kShort) {
#pragma omp parallel for num_threads(num_threads)
    for (int64_t i = 0; i < shape.num_sequences * shape.num_heads; ++i) {
      (shape.length <= 8 ? differentiate_short<8> : differentiate_short<kShort>)(*g, i);
    }
    return;
  }
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < shape.num_all_blocks(); ++i) pack_for_gradients(*g, i);
  // The last queries see the most keys, and the first keys are seen by the most: both together are as much work everywhere.
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t i = 0; i < shape.num_sequences * shape.num_heads * num_parts; ++i) {
    const int64_t index = i / num_parts, first = i % num_parts * kRows;
    RowGradients<false> queries;
    queries.differentiate(*g, index, first);
    RowGradients<true> keys;
    keys.differentiate(*g, index, first);
  }
}

// From `x` to `y` (sequences, heads, length, 64).
extern "C" void place(const Tensor* x, uint16_t* y, const Places* places, const Shape* shape, int64_t num_threads) {
  const int64_t num_heads = shape->num_heads, length = shape->length;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < shape->num_sequences * length; ++i) {
    const int64_t first = i / length * num_heads, row = i % length;
    for (int64_t index = first; index < first + num_heads; ++index) {
      uint16_t* placed = y + (index * length + row) * kChannels;
      place_head(shape->row(*x, index, row), float(places->epsilon), places->cos_of(row), places->sin_of(row), placed);
    }
  }
}

#else

extern "C" int64_t is_supported() { return 0; }
extern "C" int64_t uses_tiles() { return 0; }

extern "C" void attend_causally(const void*, int64_t) {}
extern "C" void differentiate_attention(const void*, int64_t) {}
extern "C" void place(const void*, void*, const void*, const void*, int64_t) {}

#endif
