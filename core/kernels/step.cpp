// The next byte of every row of a batch through a MegaByte, in bf16 with float32 sums: what is done with few rows takes the
// time of reading the weights, so they lie packed in blocks, and a byte is one call.
//
// A row's bits depend on no other row, on no slot behind its own, and on no number of threads.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "../native/functions.h"
#include "../native/law.h"
#include "heads.h"
#include "tiles.h"

namespace {

constexpr int64_t kHalf = kChannels / 2;
constexpr int64_t kGroup = 16, kFew = 4;    // rows that are multiplied while blocks are near, and rows of a tile
constexpr int64_t kNear = 4;                // blocks
constexpr int64_t kWorthSharing = 1 << 20;  // multiplications of a layer

struct Norm {
  const float *weight, *bias;
  double epsilon;
};

struct Linear {
  const Block* weight;  // (outputs / 64, inputs / 64); null if there is no such layer
  const float* bias;    // (outputs)
  int64_t num_inputs, num_outputs;  // filled up to multiples of 64
};

struct Layer {
  Norm attention_norm;
  Linear qkv, out;
  Norm ffn_norm;
  Linear ffn_in, ffn_out;
  double of_before, of_input;  // what it reads of the layer before, and of the input of them all
};

struct Conv {
  Linear windows;  // of `kernel` bytes one after another
  int64_t kernel;
};

struct Level {
  const Layer* layers;
  Norm norm;
  int64_t num_layers, dim, ffn_dim, num_heads;
  int64_t span, row_length, memory;
  const float *cos, *sin;           // (memory + row_length, 64), or null
  const uint16_t* embedding;        // (256, byte_dim)
  int64_t byte_dim;
  const uint16_t* byte_positions;   // (context, byte_dim), or null
  const uint16_t *pad, *positions;  // (dim), (row_length, dim) or null
  const Conv* convs;
  int64_t num_convs;
  Linear project, unembedder;
  int64_t num_slices;               // of an element, each unembedded on its own
};

struct Model {
  const Level* levels;
  int64_t num_levels, patch_size, real_previous, relu_squared;
  double qk_epsilon;  // of the norm of queries and keys; 0 without
  double logit_softcap;
  Linear head;
};

struct LevelState {
  uint16_t *keys, *values;  // (layers, rows, heads, slots, 64)
  int64_t num_slots;
  uint16_t* from_parent;        // (rows, row_length, dim); null on the first level
  uint16_t* const* conv_tails;  // (rows, kernel - 1, byte_dim) each
};

struct Rows {
  const Model* model;
  const LevelState* levels;
  int64_t num_rows, round_size;
  int64_t *positions, *patch_bytes;  // (rows), (rows, patch_size)
  const int64_t* started;            // where the rows stood when the round began
  const double* uniforms;            // (rows, round_size), as all that is of a round
  const int64_t* given;              // bytes to be taken instead, -1 for none
  const double* temperatures;
  const int64_t* top_ks;
  const double* top_ps;
  float* logits;  // (rows, 256)
  int64_t* bytes;
  float* bits;
  // What parts of a level hand to each other, with room for the widest level.
  float *x, *input;                                    // (rows, dim)
  uint16_t *words, *windows, *normalized, *qkv, *attended, *hidden;
  float* convolved;
  float* weights;  // (threads, num_weights), as many as the most slots
  int64_t num_weights;
};

// One level at work.
struct Element {
  const Rows& rows;
  const Level& level;
  const LevelState& kept;
  bool is_top;

  Element(const Rows& rows, int64_t index)
      : rows(rows), level(rows.model->levels[index]), kept(rows.levels[index]), is_top(index == 0) {}

  int64_t in_row(int64_t row) const { return rows.positions[row] / level.span % level.row_length; }
};

void normalize(const Norm& norm, const float* x, uint16_t* y, int64_t n) {
  __m512 sum = _mm512_setzero_ps(), squares = sum;
  for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / n + float(norm.epsilon)));
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), scale);
    store_bf16(y + i, _mm512_fmadd_ps(unit, _mm512_loadu_ps(norm.weight + i), _mm512_loadu_ps(norm.bias + i)));
  }
}

// 64 outputs of all rows, as emit(row, first output, four vectors).
template <class Emit>
void multiply_panel(const Linear& linear, int64_t panel, const uint16_t* x, int64_t num_rows, Emit emit) {
  const int64_t num_blocks = linear.num_inputs / kBlock;
  for (int64_t first = 0; first < num_rows; first += kGroup) {
    const int64_t count = std::min(kGroup, num_rows - first);
    const uint32_t* rows[kGroup];
    __m512 sums[kGroup][kVectors];
    for (int64_t i = 0; i < kGroup; ++i) {  // behind the last row it is computed again, and not kept
      rows[i] = reinterpret_cast<const uint32_t*>(x + (first + std::min(i, count - 1)) * linear.num_inputs);
      for (int64_t v = 0; v < kVectors; ++v) sums[i][v] = _mm512_loadu_ps(linear.bias + panel * kBlock + 16 * v);
    }
    const __m512i* weights = linear.weight[panel * num_blocks];
    for (int64_t done = 0; done < num_blocks; done += kNear) {
      const int64_t depth = kDepth * std::min(kNear, num_blocks - done);
      const __m512i* next = weights + depth * kVectors;  // what the tiles fetch in four parts
      for (int64_t i = 0; i < count; i += kFew) multiply<kFew>(rows + i, weights, sums + i, depth, next + depth * (i / kFew));
      for (const uint32_t*& row : rows) row += depth;
      weights = next;
    }
    for (int64_t i = 0; i < count; ++i) emit(first + i, panel * kBlock, sums[i]);
  }
}

inline __m512i channels(const uint16_t* row, int64_t half) { return _mm512_loadu_si512(row + kHalf * half); }
inline __m512 even(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 odd(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))); }

// y += x, as x(place, mask of 16 lanes)
template <class X>
void add(int64_t n, uint16_t* y, X x) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = __mmask16((1u << std::min<int64_t>(16, n - i)) - 1);
    const __m512 sum = _mm512_add_ps(widened(_mm256_maskz_loadu_epi16(mask, y + i)), x(i, mask));
    _mm256_mask_storeu_epi16(y + i, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

// softmax(q k^T / 8) v of one head of one row, over slots that lie one after another.
void attend(const uint16_t* query, const uint16_t* keys, const uint16_t* values, int64_t num_slots, float* weights, uint16_t* out) {
  const __m512bh q0 = (__m512bh)channels(query, 0), q1 = (__m512bh)channels(query, 1);
  float highest = kNever;
  for (int64_t s = 0; s < num_slots; ++s) {
    const uint16_t* key = keys + s * kChannels;
    const __m512 first = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)channels(key, 0), q0);
    weights[s] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(first, (__m512bh)channels(key, 1), q1));
    highest = std::max(highest, weights[s]);
  }
  __m512 sums[kVectors] = {};
  float total = 0;
  for (int64_t s = 0; s < num_slots; s += 16) {
    const int64_t count = std::min<int64_t>(16, num_slots - s);
    const __m512 scores = _mm512_mask_loadu_ps(_mm512_set1_ps(kNever), __mmask16((1u << count) - 1), weights + s);
    alignas(64) float block[16];
    _mm512_store_ps(block, power_of_two(_mm512_mul_ps(_mm512_sub_ps(scores, _mm512_set1_ps(highest)), _mm512_set1_ps(kScale))));
    for (int64_t i = 0; i < count; ++i) {
      if (block[i] == 0) continue;
      const __m512 weight = _mm512_set1_ps(block[i]);
      const uint16_t* value = values + (s + i) * kChannels;
      const __m512i low = channels(value, 0), high = channels(value, 1);
      sums[0] = _mm512_fmadd_ps(weight, even(low), sums[0]);
      sums[1] = _mm512_fmadd_ps(weight, odd(low), sums[1]);
      sums[2] = _mm512_fmadd_ps(weight, even(high), sums[2]);
      sums[3] = _mm512_fmadd_ps(weight, odd(high), sums[3]);
      total += block[i];
    }
  }
  const __m512 scale = _mm512_set1_ps(1.0f / total);
  for (int64_t half = 0; half < 2; ++half) {
    // The two halves of a word again, each rounded to the nearest bf16.
    const __m256i evens = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[2 * half], scale));
    const __m256i odds = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[2 * half + 1], scale));
    _mm512_storeu_si512(out + kHalf * half, _mm512_or_si512(_mm512_cvtepu16_epi32(evens), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odds), 16)));
  }
}

// Writes the keys and values of one head of one row into their slot, and attends.
void attend_head(const Element& element, int64_t layer, int64_t index, float* weights) {
  const Rows& rows = element.rows;
  const Level& level = element.level;
  const LevelState& kept = element.kept;
  const int64_t row = index / level.num_heads, head = index % level.num_heads;
  const int64_t slot = level.memory + element.in_row(row);
  const bool has_memory = element.is_top || rows.positions[row] >= level.span * level.row_length;
  const int64_t first = has_memory ? 0 : level.memory;
  const uint16_t* own = rows.qkv + row * 3 * level.dim + head * kChannels;
  const int64_t start = (layer * rows.num_rows * level.num_heads + index) * kept.num_slots * kChannels;
  uint16_t *keys = kept.keys + start, *values = kept.values + start;
  alignas(64) uint16_t query[kChannels];
  const float epsilon = float(rows.model->qk_epsilon);
  const float* cos = level.cos == nullptr ? nullptr : level.cos + slot * kChannels;
  const float* sin = level.sin == nullptr ? nullptr : level.sin + slot * kChannels;
  place_head(own, epsilon, cos, sin, query);
  place_head(own + level.dim, epsilon, cos, sin, keys + slot * kChannels);
  std::copy(own + 2 * level.dim, own + 2 * level.dim + kChannels, values + slot * kChannels);
  attend(query, keys + first * kChannels, values + first * kChannels, slot + 1 - first, weights,
         rows.attended + row * level.dim + head * kChannels);
}

// What follows is done by all threads of a team together; they meet at the end of each loop.

// Products of rows as they lie in memory.
template <class Emit>
void multiply_rows(const Linear& linear, const uint16_t* x, int64_t num_rows, Emit emit) {
#pragma omp for
  for (int64_t i = 0; i < linear.num_outputs / kBlock; ++i) multiply_panel(linear, i, x, num_rows, emit);
}

auto to_bf16(uint16_t* target, int64_t width) {
  return [=](int64_t row, int64_t first, const __m512* sums) { store(target + row * width + first, sums, _mm512_set1_ps(1.0f)); };
}

auto to_floats(float* target, int64_t width) {
  return [=](int64_t row, int64_t first, const __m512* sums) {
    for (int64_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(target + row * width + first + 16 * v, sums[v]);
  };
}

// Moves the last elements of the finished row into the memory slots, with keys turned back by the row's length.
void begin_row(const Element& element) {
  const Rows& rows = element.rows;
  const Level& level = element.level;
  const LevelState& kept = element.kept;
  alignas(64) float back[kChannels];
  const float* cos = level.cos == nullptr ? nullptr : level.cos + level.row_length * kChannels;
  for (int64_t c = 0; cos != nullptr && c < kChannels; ++c) back[c] = -level.sin[level.row_length * kChannels + c];
#pragma omp for
  for (int64_t head = 0; head < level.num_layers * rows.num_rows * level.num_heads; ++head) {
    uint16_t *keys = kept.keys + head * kept.num_slots * kChannels, *values = kept.values + head * kept.num_slots * kChannels;
    for (int64_t slot = 0; slot < level.memory; ++slot) {
      place_head(keys + (level.row_length + slot) * kChannels, 0, cos, back, keys + slot * kChannels);
    }
    std::copy_n(values + level.row_length * kChannels, level.memory * kChannels, values);
  }
}

// Convolves the embeddings of each row's bytes behind its tail, and moves the tail on.
void convolve(const Element& element, const Conv& conv, uint16_t* tails, int64_t num_words) {
  const Rows& rows = element.rows;
  const int64_t span = element.level.span, dim = element.level.byte_dim, num_kept = conv.kernel - 1;
#pragma omp for
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    uint16_t *words = rows.words + row * num_words, *tail = tails + row * num_kept * dim;
    const auto byte = [=](int64_t i) { return i < 0 ? tail + (num_kept + i) * dim : words + i * dim; };
    for (int64_t i = 0; i < span; ++i) {
      uint16_t* window = rows.windows + (row * span + i) * conv.windows.num_inputs;
      for (int64_t k = 0; k < conv.kernel; ++k) std::copy_n(byte(i + k - num_kept), dim, window + k * dim);
      std::fill(window + conv.kernel * dim, window + conv.windows.num_inputs, 0);
    }
    for (int64_t k = 0; k < num_kept; ++k) std::copy_n(byte(span + k - num_kept), dim, tail + k * dim);
    if (rows.positions[row] == 0) std::fill_n(tail, num_kept * dim, 0);
  }
  multiply_rows(conv.windows, rows.windows, rows.num_rows * span, to_floats(rows.convolved, conv.windows.num_outputs));
#pragma omp for
  for (int64_t i = 0; i < rows.num_rows * span; ++i) {
    const float* convolved = rows.convolved + i * conv.windows.num_outputs;
    add(dim, rows.words + i / span * num_words + i % span * dim, [=](int64_t c, __mmask16 mask) {
      return _mm512_max_ps(_mm512_maskz_loadu_ps(mask, convolved + c), _mm512_setzero_ps());
    });
  }
}

// What the level reads: the embedding of the element before, or the pad where there is none to show; where it stands; and what
// its parent says.
void enter(const Element& element) {
  const Rows& rows = element.rows;
  const Level& level = element.level;
  const LevelState& kept = element.kept;
  const Model& model = *rows.model;
  const int64_t dim = level.dim, num_words = level.project.weight ? level.project.num_inputs : dim;
#pragma omp for
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int64_t start = std::max<int64_t>(0, rows.positions[row] - level.span);
    uint16_t* word = rows.words + row * num_words;
    for (int64_t i = start; i < start + level.span; ++i, word += level.byte_dim) {
      const int64_t byte = rows.patch_bytes[row * model.patch_size + i % model.patch_size];
      std::copy_n(level.embedding + byte * level.byte_dim, level.byte_dim, word);
      if (level.byte_positions == nullptr) continue;
      const uint16_t* place = level.byte_positions + i * level.byte_dim;
      add(level.byte_dim, word, [=](int64_t c, __mmask16 mask) { return widened(_mm256_maskz_loadu_epi16(mask, place + c)); });
    }
    std::fill(word, rows.words + (row + 1) * num_words, 0);
  }
  for (int64_t i = 0; i < level.num_convs; ++i) convolve(element, level.convs[i], kept.conv_tails[i], num_words);
  if (level.project.weight) multiply_rows(level.project, rows.words, rows.num_rows, to_floats(rows.x, dim));
#pragma omp for
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int64_t in_row = element.in_row(row);
    const bool shows_pad = element.is_top || model.real_previous ? rows.positions[row] == 0 : in_row == 0;
    const uint16_t* place = level.positions == nullptr ? nullptr : level.positions + in_row * dim;
    const uint16_t* parent = kept.from_parent == nullptr ? nullptr : kept.from_parent + (row * level.row_length + in_row) * dim;
    for (int64_t c = 0, i = row * dim; c < dim; c += 16, i += 16) {
      __m512 sum = shows_pad ? load_bf16(level.pad + c) : level.project.weight ? _mm512_loadu_ps(rows.x + i) : load_bf16(rows.words + i);
      if (place != nullptr) sum = _mm512_add_ps(sum, load_bf16(place + c));
      if (parent != nullptr) sum = _mm512_add_ps(sum, load_bf16(parent + c));
      _mm512_storeu_ps(rows.x + i, sum);
      _mm512_storeu_ps(rows.input + i, sum);
    }
  }
}

void run_layers(const Element& element) {
  const Rows& rows = element.rows;
  const Level& level = element.level;
  const int64_t dim = level.dim, num_rows = rows.num_rows;
  float* weights = rows.weights + omp_get_thread_num() * rows.num_weights;
  const auto to_sum = [&](int64_t row, int64_t first, const __m512* sums) {
    float* x = rows.x + row * dim + first;
    for (int64_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(x + 16 * v, _mm512_add_ps(_mm512_loadu_ps(x + 16 * v), sums[v]));
  };
  const auto to_hidden = [&](int64_t row, int64_t first, __m512* sums) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[v] = _mm512_max_ps(sums[v], _mm512_setzero_ps());
      if (rows.model->relu_squared) sums[v] = _mm512_mul_ps(sums[v], sums[v]);
    }
    store(rows.hidden + row * level.ffn_dim + first, sums, _mm512_set1_ps(1.0f));
  };
  for (int64_t l = 0; l < level.num_layers; ++l) {
    const Layer& layer = level.layers[l];
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) {
      float* x = rows.x + row * dim;
      if (layer.of_before != 1 || layer.of_input != 0) {
        const __m512 of_before = _mm512_set1_ps(float(layer.of_before)), of_input = _mm512_set1_ps(float(layer.of_input));
        for (int64_t i = 0; i < dim; i += 16) {
          const __m512 input = _mm512_mul_ps(of_input, _mm512_loadu_ps(rows.input + row * dim + i));
          _mm512_storeu_ps(x + i, _mm512_fmadd_ps(of_before, _mm512_loadu_ps(x + i), input));
        }
      }
      normalize(layer.attention_norm, x, rows.normalized + row * dim, dim);
    }
    multiply_rows(layer.qkv, rows.normalized, num_rows, to_bf16(rows.qkv, 3 * dim));
#pragma omp for
    for (int64_t i = 0; i < num_rows * level.num_heads; ++i) attend_head(element, l, i, weights);
    multiply_rows(layer.out, rows.attended, num_rows, to_sum);
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) normalize(layer.ffn_norm, rows.x + row * dim, rows.normalized + row * dim, dim);
    multiply_rows(layer.ffn_in, rows.normalized, num_rows, to_hidden);
    multiply_rows(layer.ffn_out, rows.hidden, num_rows, to_sum);
  }
#pragma omp for
  for (int64_t row = 0; row < num_rows; ++row) normalize(level.norm, rows.x + row * dim, rows.normalized + row * dim, dim);
}

void tell_children(const Element& element, uint16_t* from_parent) {
  const Rows& rows = element.rows;
  const Level& level = element.level;
  const int64_t width = level.dim / level.num_slices, num_words = level.unembedder.num_inputs, count = rows.num_rows * level.num_slices;
#pragma omp for
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* word = rows.words + i * num_words;
    std::copy_n(rows.normalized + i * width, width, word);
    std::fill(word + width, word + num_words, 0);
  }
  multiply_rows(level.unembedder, rows.words, count, to_bf16(from_parent, level.unembedder.num_outputs));
}

// Draws a byte of every row from its logits, unless it is given, and appends it.
void append_bytes(const Rows& rows) {
  const int64_t patch_size = rows.model->patch_size;
#pragma omp for
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    float* logits = rows.logits + row * kNumByteValues;
    cap_softly(logits, kNumByteValues, float(rows.model->logit_softcap));
    const int64_t position = rows.positions[row]++, place = row * rows.round_size + position - rows.started[row];
    const Law law = {rows.temperatures[row], rows.top_ks[row], rows.top_ps[row]};
    int64_t& byte = rows.bytes[place] = rows.given[place];
    rows.bits[place] = choose(logits, law, rows.uniforms[place], byte);
    rows.patch_bytes[row * patch_size + position % patch_size] = byte;
  }
}

// At a place where the levels from `first` on wake.
void make_byte(const Rows& rows, int64_t first) {
  const Model& model = *rows.model;
  for (int64_t index = first; index < model.num_levels; ++index) {
    const Element element(rows, index);
    if (index > first && element.level.memory > 0) begin_row(element);
    enter(element);
    run_layers(element);
    if (index + 1 < model.num_levels) tell_children(element, rows.levels[index + 1].from_parent);
  }
  multiply_rows(model.head, rows.normalized, rows.num_rows, to_floats(rows.logits, kNumByteValues));
  append_bytes(rows);
}

}  // namespace

extern "C" int64_t is_supported() { return 1; }

extern "C" void step_rows(const Rows* rows, int64_t first, int64_t num_threads) {
  const Level& level = rows->model->levels[first];
  const bool is_large = rows->num_rows * level.dim * (4 * level.dim + 2 * level.ffn_dim) > kWorthSharing;
#pragma omp parallel num_threads(num_threads) if (is_large)
  make_byte(*rows, first);
}

#else

extern "C" int64_t is_supported() { return 0; }
extern "C" void step_rows(const void*, int64_t, int64_t) {}

#endif
