// One more element of every row of a batch through all layers of a level, in bf16 with float32 sums: what is done with few
// rows takes the time of reading the weights, so they lie packed in blocks, and all of it is one call.
//
// A row's bits depend on no other row, on no slot that its mask hides, and on no number of threads.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "heads.h"
#include "tiles.h"

namespace {

constexpr int64_t kHalf = kChannels / 2;
constexpr int64_t kGroup = 16, kFew = 4;        // rows that are multiplied while a block is near, and rows of a tile
constexpr int64_t kWorthSharing = 1 << 20;      // multiplications of a layer

struct Norm {
  const float *weight, *bias;
  double epsilon;
};

struct Linear {
  const Block* weight;  // (outputs / 64, inputs / 64)
  const float* bias;    // (outputs)
  int64_t num_inputs, num_outputs;
};

struct Layer {
  Norm attention_norm;
  Linear qkv, out;
  Norm ffn_norm;
  Linear ffn_in, ffn_out;
  double of_before, of_input;  // what it reads of the layer before, and of the input of them all
};

struct Step {
  const Layer* layers;
  Norm norm;
  int64_t num_layers, dim, ffn_dim, num_heads;
  int64_t relu_squared;
  double qk_epsilon;  // of the norm of queries and keys; 0 without
  const float *cos, *sin;  // (slots, 64), or null
  int64_t num_rows, num_slots;
  uint16_t *keys, *values;  // (layers, rows, heads, slots, 64)
  const int64_t* slots;     // (rows): where each writes
  const uint16_t* mask;     // (rows, num_read): 0, or minus infinity for a slot that is not attended to
  int64_t num_read;
  const uint16_t* x;  // (rows, dim)
  uint16_t* y;        // (rows, dim)
  float* room;        // for what lies between: see `Between`
};

// What one layer hands to the next, and its parts to each other.
struct Between {
  float *x, *weights;  // (rows, dim), (threads, num_read)
  uint16_t *normalized, *qkv, *attended, *hidden;

  explicit Between(const Step& step) {
    x = step.room;
    normalized = reinterpret_cast<uint16_t*>(x + step.num_rows * step.dim);
    qkv = normalized + step.num_rows * step.dim;
    attended = qkv + 3 * step.num_rows * step.dim;
    hidden = attended + step.num_rows * step.dim;
    weights = reinterpret_cast<float*>(hidden + step.num_rows * step.ffn_dim);
  }
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
    for (int64_t block = 0; block < num_blocks; ++block) {
      for (int64_t i = 0; i < count; i += kFew) multiply<kFew>(rows + i, linear.weight[panel * num_blocks + block], sums + i);
      for (const uint32_t*& row : rows) row += kDepth;
    }
    for (int64_t i = 0; i < count; ++i) emit(first + i, panel * kBlock, sums[i]);
  }
}

inline __m512i channels(const uint16_t* row, int64_t half) { return _mm512_loadu_si512(row + kHalf * half); }
inline __m512 even(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 odd(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))); }

// softmax(q k^T / 8) v of one head of one row, over the slots that its mask shows.
void attend(const Step& step, const uint16_t* query, const uint16_t* keys, const uint16_t* values, const uint16_t* mask,
            float* weights, uint16_t* out) {
  const __m512bh q0 = (__m512bh)channels(query, 0), q1 = (__m512bh)channels(query, 1);
  float highest = kNever;
  for (int64_t s = 0; s < step.num_read; ++s) {
    weights[s] = kNever;
    if (mask[s] != 0) continue;
    const uint16_t* key = keys + s * kChannels;
    const __m512 first = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)channels(key, 0), q0);
    weights[s] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(first, (__m512bh)channels(key, 1), q1));
    highest = std::max(highest, weights[s]);
  }
  __m512 sums[kVectors] = {};
  float total = 0;
  for (int64_t s = 0; s < step.num_read; s += 16) {
    const int64_t count = std::min<int64_t>(16, step.num_read - s);
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
void attend_head(const Step& step, const Between& between, int64_t layer, int64_t index, float* weights) {
  const int64_t row = index / step.num_heads, head = index % step.num_heads, slot = step.slots[row];
  const uint16_t* own = between.qkv + row * 3 * step.dim + head * kChannels;
  const int64_t start = (layer * step.num_rows * step.num_heads + index) * step.num_slots * kChannels;
  uint16_t *keys = step.keys + start, *values = step.values + start;
  alignas(64) uint16_t query[kChannels];
  const float* cos = step.cos == nullptr ? nullptr : step.cos + slot * kChannels;
  const float* sin = step.sin == nullptr ? nullptr : step.sin + slot * kChannels;
  place_head(own, float(step.qk_epsilon), cos, sin, query);
  place_head(own + step.dim, float(step.qk_epsilon), cos, sin, keys + slot * kChannels);
  std::copy(own + 2 * step.dim, own + 2 * step.dim + kChannels, values + slot * kChannels);
  attend(step, query, keys, values, step.mask + row * step.num_read, weights, between.attended + row * step.dim + head * kChannels);
}

// All layers, by all threads of a team together; they meet at the end of each loop.
void run_layers(const Step& step, const Between& between) {
  const int64_t dim = step.dim, num_rows = step.num_rows;
  float* weights = between.weights + omp_get_thread_num() * step.num_read;
  const auto to_bf16 = [](uint16_t* target, int64_t width) {
    return [=](int64_t row, int64_t first, const __m512* sums) { store(target + row * width + first, sums, _mm512_set1_ps(1.0f)); };
  };
  const auto to_sum = [&](int64_t row, int64_t first, const __m512* sums) {
    float* x = between.x + row * dim + first;
    for (int64_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(x + 16 * v, _mm512_add_ps(_mm512_loadu_ps(x + 16 * v), sums[v]));
  };
  const auto to_hidden = [&](int64_t row, int64_t first, __m512* sums) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[v] = _mm512_max_ps(sums[v], _mm512_setzero_ps());
      if (step.relu_squared) sums[v] = _mm512_mul_ps(sums[v], sums[v]);
    }
    store(between.hidden + row * step.ffn_dim + first, sums, _mm512_set1_ps(1.0f));
  };
  const auto panels = [](const Linear& linear) { return linear.num_outputs / kBlock; };
#pragma omp for
  for (int64_t i = 0; i < num_rows * dim / 16; ++i) _mm512_storeu_ps(between.x + 16 * i, load_bf16(step.x + 16 * i));
  for (int64_t l = 0; l < step.num_layers; ++l) {
    const Layer& layer = step.layers[l];
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) {
      float* x = between.x + row * dim;
      if (layer.of_before != 1 || layer.of_input != 0) {
        const __m512 of_before = _mm512_set1_ps(float(layer.of_before)), of_input = _mm512_set1_ps(float(layer.of_input));
        for (int64_t i = 0; i < dim; i += 16) {
          const __m512 input = _mm512_mul_ps(of_input, load_bf16(step.x + row * dim + i));
          _mm512_storeu_ps(x + i, _mm512_fmadd_ps(of_before, _mm512_loadu_ps(x + i), input));
        }
      }
      normalize(layer.attention_norm, x, between.normalized + row * dim, dim);
    }
#pragma omp for
    for (int64_t i = 0; i < panels(layer.qkv); ++i) {
      multiply_panel(layer.qkv, i, between.normalized, num_rows, to_bf16(between.qkv, 3 * dim));
    }
#pragma omp for
    for (int64_t i = 0; i < num_rows * step.num_heads; ++i) attend_head(step, between, l, i, weights);
#pragma omp for
    for (int64_t i = 0; i < panels(layer.out); ++i) multiply_panel(layer.out, i, between.attended, num_rows, to_sum);
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) {
      normalize(layer.ffn_norm, between.x + row * dim, between.normalized + row * dim, dim);
    }
#pragma omp for
    for (int64_t i = 0; i < panels(layer.ffn_in); ++i) multiply_panel(layer.ffn_in, i, between.normalized, num_rows, to_hidden);
#pragma omp for
    for (int64_t i = 0; i < panels(layer.ffn_out); ++i) multiply_panel(layer.ffn_out, i, between.hidden, num_rows, to_sum);
  }
#pragma omp for
  for (int64_t row = 0; row < num_rows; ++row) normalize(step.norm, between.x + row * dim, step.y + row * dim, dim);
}

}  // namespace

extern "C" int64_t step_is_supported() { return 1; }

// Floats of `Step::room`.
extern "C" int64_t step_room(const Step* step, int64_t num_threads) {
  return step->num_rows * (step->dim + (5 * step->dim + step->ffn_dim) / 2) + num_threads * step->num_read;
}

extern "C" void step_layers(const Step* step, int64_t num_threads) {
  const Between between(*step);
  const bool is_large = step->num_rows * step->dim * (4 * step->dim + 2 * step->ffn_dim + 2 * step->num_read) > kWorthSharing;
#pragma omp parallel num_threads(num_threads) if (is_large)
  run_layers(*step, between);
}

#else

extern "C" int64_t step_is_supported() { return 0; }
extern "C" int64_t step_room(const void*, int64_t) { return 0; }
extern "C" void step_layers(const void*, int64_t) {}

#endif
