// What lies between the products of training in bf16, with float32 sums.
//
// Rows are summed in parts of a fixed number of them, whoever computes a part. Widths are whole vectors.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <algorithm>
#include <vector>

#include "heads.h"
#include "tiles.h"

namespace {

constexpr int64_t kValues = 256;  // of a byte
constexpr float kLog2E = 1.44269504f;

inline bool is_byte(int64_t value) { return value >= 0 && value < kValues; }

// e^(logit - top) / 2^log of 16 logits.
inline __m512 power_of_e(const float* logits, float top, float log) {
  const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(logits), _mm512_set1_ps(top));
  return power_of_two(_mm512_fmsub_ps(below, _mm512_set1_ps(kLog2E), _mm512_set1_ps(log)));
}

constexpr int64_t kLanes = 16;
constexpr int64_t kWide = 4;  // vectors of inputs that lie side by side
constexpr int64_t kDeep = 16;                    // pairs of rows that are packed at a time
constexpr int64_t kOutputs = 32, kInputs = 256;  // of the part of a weight that one thread takes at a time
#ifdef BUILT_FOR_TILES
constexpr int64_t kRows = 1024;  // whose pairs lie ready at a time
static_assert(kDeep == kPairs, "packed pairs fill whole tiles");
#else
constexpr int64_t kRows = 512;
constexpr int64_t kTall = 4;  // outputs whose sums stay in registers, with those of four vectors of inputs
#endif

struct Layer {
  const uint16_t *grad, *x;    // (rows, outputs) and (rows, inputs)
  float *of_weight, *of_bias;  // (outputs, inputs) and (outputs,)
  __m512i* room;               // for the pairs of `kRows` rows and for sums
  int64_t num_rows, num_outputs, num_inputs;

  static int64_t num_vectors(int64_t num_outputs, int64_t num_inputs) {
    return (kRows / 2 * (num_outputs + num_inputs) + kRows / 2 / kDeep * num_outputs) / kLanes;
  }
  __m512i* outputs_from(int64_t output) const { return room + kRows / 2 * output / kLanes; }  // pairs of 16 outputs
  __m512i* inputs_from(int64_t input) const {  // pairs of a vector of inputs, of which `kWide` alternate
    return outputs_from(num_outputs) + kRows / 2 * (input / (kWide * kLanes)) * kWide + input / kLanes % kWide;
  }
  __m512* sums_of(int64_t deep) const {  // of the rows that are packed together
    return reinterpret_cast<__m512*>(outputs_from(num_outputs + num_inputs)) + deep * num_outputs / kLanes;
  }
};

// Of 16 columns of the first two of some rows; what is behind the last is zero.
inline __m512i pair_of(const uint16_t* x, int64_t width, int64_t num_rows) {
  const auto load = [](const uint16_t* y) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)));
  };
  if (num_rows > 1) return _mm512_or_si512(load(x), _mm512_slli_epi32(load(x + width), 16));
  return num_rows > 0 ? load(x) : _mm512_setzero_si512();
}

// Packs 16 pairs of the rows from `first` on, and adds up their outputs.
void pack(const Layer& layer, int64_t first, int64_t deep) {
  const int64_t row = first + 2 * kDeep * deep, num_rows = layer.num_rows - row;
  for (int64_t o = 0; o < layer.num_outputs; o += kOutputs) {
    const int64_t num_groups = std::min(kOutputs, layer.num_outputs - o) / kLanes;  // one line of the memory, or half of one
    __m512i pairs[kOutputs / kLanes][kDeep];
    __m512 sums[kOutputs / kLanes] = {};
    for (int64_t i = 0; i < kDeep; ++i) {
      for (int64_t group = 0; group < num_groups; ++group) {
        const uint16_t* grad = layer.grad + (row + 2 * i) * layer.num_outputs + o + group * kLanes;
        const __m512i pair = pair_of(grad, layer.num_outputs, num_rows - 2 * i);
        const __m512 upper = (__m512)_mm512_and_si512(pair, _mm512_set1_epi32(int32_t(0xffff0000)));
        sums[group] = _mm512_add_ps(sums[group], _mm512_add_ps((__m512)_mm512_slli_epi32(pair, 16), upper));
        pairs[group][i] = pair;
      }
    }
    for (int64_t group = 0; group < num_groups; ++group) {
#ifdef BUILT_FOR_TILES
      transpose(pairs[group]);  // a tile of a left side: the pairs of one output after those of another
#endif
      std::copy_n(pairs[group], kDeep, layer.outputs_from(o + group * kLanes) + deep * kDeep);
      layer.sums_of(deep)[o / kLanes + group] = sums[group];
    }
  }
  for (int64_t i = 0; i < kDeep; ++i) {
    for (int64_t k = 0; k < layer.num_inputs; k += kLanes) {
      const __m512i pair = pair_of(layer.x + (row + 2 * i) * layer.num_inputs + k, layer.num_inputs, num_rows - 2 * i);
      layer.inputs_from(k)[(deep * kDeep + i) * kWide] = pair;
    }
  }
}

#ifdef BUILT_FOR_TILES

// What pairs say of 16 outputs, or of twice as many, and of 32 inputs; or that and what is there.
template <bool kAdds, bool kTwice>
inline void multiply_tiles(const __m512i* outputs, const __m512i* inputs, int64_t num_pairs, float* found, int64_t stride) {
  constexpr int64_t kOutputBytes = sizeof *outputs, kInputBytes = kWide * sizeof *inputs;
  const int64_t row_bytes = sizeof(float) * stride;
  float* below = found + kLanes * stride;
  asm volatile("" : : : "memory");  // as in `multiply_stack`
  if (kAdds) {
    _tile_loadd(0, found, row_bytes);
    _tile_loadd(1, found + kLanes, row_bytes);
    if (kTwice) _tile_loadd(2, below, row_bytes);
    if (kTwice) _tile_loadd(3, below + kLanes, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < num_pairs; i += kPairs) {
    _tile_loadd(4, outputs + i, kOutputBytes);
    _tile_loadd(6, inputs + i * kWide, kInputBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, inputs + i * kWide + 1, kInputBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (!kTwice) continue;
    _tile_loadd(5, outputs + kRows / 2 + i, kOutputBytes);  // the next 16
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, found, row_bytes);
  _tile_stored(1, found + kLanes, row_bytes);
  if (kTwice) _tile_stored(2, below, row_bytes);
  if (kTwice) _tile_stored(3, below + kLanes, row_bytes);
}

// Of a part of a weight.
template <bool kAdds>
void multiply_part(const Layer& layer, int64_t output, int64_t input, int64_t num_pairs) {
  const TileRegisters registers;
  const auto multiply = output + kLanes < layer.num_outputs ? multiply_tiles<kAdds, true> : multiply_tiles<kAdds, false>;
  for (int64_t k = input; k < std::min(input + kInputs, layer.num_inputs); k += 2 * kLanes) {
    float* found = layer.of_weight + output * layer.num_inputs + k;
    multiply(layer.outputs_from(output), layer.inputs_from(k), num_pairs, found, layer.num_inputs);
  }
}

#else

// What pairs say of 4 outputs and 64 inputs; or that and what is there.
template <bool kAdds>
inline void multiply_vectors(const uint32_t* outputs, const __m512i* inputs, int64_t num_pairs, float* found, int64_t stride) {
  __m512 sums[kTall][kWide] = {};
  if (kAdds) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kWide; ++v) sums[r][v] = _mm512_loadu_ps(found + r * stride + v * kLanes);
    }
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTall; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(outputs[i * kLanes + r]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kWide; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, (__m512bh)inputs[i * kWide + v]);
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kWide; ++v) _mm512_storeu_ps(found + r * stride + v * kLanes, sums[r][v]);
  }
}

// Of a part of a weight.
template <bool kAdds>
void multiply_part(const Layer& layer, int64_t output, int64_t input, int64_t num_pairs) {
  for (int64_t k = input; k < std::min(input + kInputs, layer.num_inputs); k += kWide * kLanes) {
    for (int64_t o = output; o < std::min(output + kOutputs, layer.num_outputs); o += kTall) {
      const uint32_t* outputs = reinterpret_cast<const uint32_t*>(layer.outputs_from(o / kLanes * kLanes)) + o % kLanes;
      float* found = layer.of_weight + o * layer.num_inputs + k;
      multiply_vectors<kAdds>(outputs, layer.inputs_from(k), num_pairs, found, layer.num_inputs);
    }
  }
}

#endif

// What the packed rows, the first ones or further ones, say of a part of a weight and, with its first inputs, of the bias.
template <bool kAdds>
void differentiate(const Layer& layer, int64_t output, int64_t input, int64_t num_deep) {
  multiply_part<kAdds>(layer, output, input, num_deep * kDeep);
  if (input > 0) return;
  for (int64_t o = output; o < std::min(output + kOutputs, layer.num_outputs); o += kLanes) {
    __m512 sum = kAdds ? _mm512_loadu_ps(layer.of_bias + o) : _mm512_setzero_ps();
    for (int64_t deep = 0; deep < num_deep; ++deep) sum = _mm512_add_ps(sum, layer.sums_of(deep)[o / kLanes]);
    _mm512_storeu_ps(layer.of_bias + o, sum);
  }
}

// A bijection of 32 bits that leaves no pattern of consecutive numbers (C. Wellons' "lowbias32").
inline __m512i mixed(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(int32_t(0x846ca68b)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

}  // namespace

extern "C" int64_t is_supported() { return TileRegisters::are_allowed(); }
extern "C" int64_t uses_tiles() { return kStack > kTile; }

// Numbers are dropped where 32 bits, made of their index and a seed, are below `threshold`; the others are scaled. What is
// dropped depends on nothing else, so that the gradient needs no memory of it.
extern "C" void drop(const uint16_t* x, uint64_t seed, uint32_t threshold, float scale, int64_t count, uint16_t* y,
                     int64_t num_threads) {
  const __m512i low = _mm512_set1_epi32(int32_t(seed)), high = _mm512_set1_epi32(int32_t(seed >> 32));
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(int32_t(i)), lanes);
    // The upper half of an index matters for a tensor of more than 4 billion numbers.
    const __m512i key = _mm512_xor_si512(high, mixed(_mm512_xor_si512(low, _mm512_set1_epi32(int32_t(i >> 32)))));
    const __m512i bits = mixed(_mm512_xor_si512(mixed(index), key));
    const __mmask16 is_kept = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(int32_t(threshold)));
    store_bf16(y + i, _mm512_maskz_mul_ps(is_kept, load_bf16(x + i), _mm512_set1_ps(scale)));
  }
}

// From the gradient of what came out of a ReLU, or of its square, in place that of what went in.
extern "C" void differentiate_relu(uint16_t* grad, const uint16_t* activated, int64_t squares, int64_t count,
                                   int64_t num_threads) {
  const __m512 least = _mm512_set1_ps(squares ? 1e-20f : 0.0f);  // squares of what was negative lie far below
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 y = load_bf16(activated + i);
    __m512 x = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, least, _CMP_NLE_UQ), load_bf16(grad + i));
    if (squares) x = _mm512_mul_ps(x, _mm512_mul_ps(_mm512_set1_ps(2.0f), _mm512_sqrt_ps(y)));
    store_bf16(grad + i, x);
  }
}

// Bytes of room that `differentiate_weight` takes.
extern "C" int64_t room_for_weight(int64_t num_outputs, int64_t num_inputs) {
  return sizeof(__m512i) * Layer::num_vectors(num_outputs, num_inputs);
}

// The gradients of a weight, whose outputs are whole vectors and inputs fours of them, and of its bias; of one row or more.
extern "C" void differentiate_weight(const uint16_t* grad, const uint16_t* x, int64_t num_rows, int64_t num_outputs,
                                     int64_t num_inputs, float* of_weight, float* of_bias, __m512i* room, int64_t num_threads) {
  const Layer layer = {grad, x, of_weight, of_bias, room, num_rows, num_outputs, num_inputs};
  const int64_t across = (num_inputs + kInputs - 1) / kInputs, down = (num_outputs + kOutputs - 1) / kOutputs;
#pragma omp parallel num_threads(num_threads)
  for (int64_t first = 0; first < num_rows; first += kRows) {
    const int64_t num_deep = (std::min(kRows, num_rows - first) + 2 * kDeep - 1) / (2 * kDeep);
#pragma omp for
    for (int64_t deep = 0; deep < num_deep; ++deep) pack(layer, first, deep);
    // The outputs pass by the same inputs, which stay near.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < across * down; ++i) {
      (first == 0 ? differentiate<false> : differentiate<true>)(layer, i % down * kOutputs, i / down * kInputs, num_deep);
    }
  }
}

// What elements (N, width) of rows of a level read: the embedding of the byte before, or the pad where that is -1, the position
// of their slot, unless there are none, and what their parents say.
extern "C" void embed(const int64_t* byte_ids, const float* embedding, const float* pad, const float* positions,
                      const uint16_t* from_parents, int64_t num_elements, int64_t row_length, int64_t width, uint16_t* found,
                      int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_elements; ++i) {
    const float* own = byte_ids[i] < 0 ? pad : embedding + byte_ids[i] * width;
    for (int64_t d = 0; d < width; d += 16) {
      __m512 value = _mm512_loadu_ps(own + d);
      if (positions != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(positions + i % row_length * width + d));
      store_bf16(found + i * width + d, _mm512_add_ps(value, load_bf16(from_parents + i * width + d)));
    }
  }
}

// From the gradient of what `embed` found those of embeddings, pad and positions, each part of the rows added up by itself; what
// parents say has the same as it.
extern "C" void differentiate_embedding(const uint16_t* grad, const int64_t* byte_ids, int64_t num_elements, int64_t row_length,
                                        int64_t width, int64_t part, float* of_embedding, float* of_pad, float* of_positions,
                                        int64_t num_threads) {
  const int64_t num_slots = of_positions == nullptr ? 0 : row_length;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t d = 0; d < width; d += 16) {  // each thread all bytes, for no two may add to the same number
    const auto clear = [](float* sum) { _mm512_storeu_ps(sum, _mm512_setzero_ps()); };
    const auto add = [](float* sum, __m512 x) { _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), x)); };
    for (int64_t value = 0; value < kValues; ++value) clear(of_embedding + value * width + d);
    for (int64_t slot = 0; slot < num_slots; ++slot) clear(of_positions + slot * width + d);
    clear(of_pad + d);
    std::vector<__m512> slots(num_slots);
    for (int64_t first = 0; first < num_elements; first += part) {
      __m512 pads = _mm512_setzero_ps();
      std::fill(slots.begin(), slots.end(), _mm512_setzero_ps());
      for (int64_t i = first; i < std::min(first + part, num_elements); ++i) {
        const __m512 own = load_bf16(grad + i * width + d);
        if (byte_ids[i] < 0) pads = _mm512_add_ps(pads, own);
        if (byte_ids[i] >= 0) add(of_embedding + byte_ids[i] * width + d, own);
        if (num_slots > 0) slots[i % row_length] = _mm512_add_ps(slots[i % row_length], own);
      }
      add(of_pad + d, pads);
      for (int64_t slot = 0; slot < num_slots; ++slot) add(of_positions + slot * width + d, slots[slot]);
    }
  }
}

// The sums over the rows of `x` (N, width), of each part of them.
extern "C" void sum_rows(const uint16_t* x, int64_t num_rows, int64_t width, int64_t part, float* sums, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < num_rows; first += part) {
    float* own = sums + first / part * width;
    std::fill_n(own, width, 0.0f);
    for (int64_t row = first; row < std::min(first + part, num_rows); ++row) {
      for (int64_t d = 0; d < width; d += 16) {
        _mm512_storeu_ps(own + d, _mm512_add_ps(load_bf16(x + row * width + d), _mm512_loadu_ps(own + d)));
      }
    }
  }
}

// A layer norm of rows (N, width) in bf16, first adding `y` to them, if there is one, and keeping the sum; of each row its mean
// and the factor that brings it to unit variance.
extern "C" void normalize(const uint16_t* x, const uint16_t* y, const float* weight, const float* bias, float epsilon,
                          int64_t num_rows, int64_t width, uint16_t* sum, float* means, float* scales, uint16_t* normed,
                          int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t row = 0; row < num_rows; ++row) {
    const uint16_t* own = x + row * width;
    __m512 total = _mm512_setzero_ps(), off_squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 16) {
      __m512 value = load_bf16(own + d);
      if (y != nullptr) {
        store_bf16(sum + row * width + d, _mm512_add_ps(value, load_bf16(y + row * width + d)));
        value = load_bf16(sum + row * width + d);
      }
      total = _mm512_add_ps(total, value);
    }
    if (y != nullptr) own = sum + row * width;
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / float(width));
    for (int64_t d = 0; d < width; d += 16) {
      const __m512 off = _mm512_sub_ps(load_bf16(own + d), mean);
      off_squares = _mm512_fmadd_ps(off, off, off_squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(off_squares) / float(width) + epsilon));
    for (int64_t d = 0; d < width; d += 16) {
      const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load_bf16(own + d), mean), scale);
      store_bf16(normed + row * width + d, _mm512_fmadd_ps(unit, _mm512_loadu_ps(weight + d), _mm512_loadu_ps(bias + d)));
    }
    means[row] = _mm512_cvtss_f32(mean);
    scales[row] = _mm512_cvtss_f32(scale);
  }
}

// From the gradient of what `normalize` made of `x` that of `x`, with what comes to it on other ways, if anything does; and of
// each part of the rows what its weight and bias get.
extern "C" void differentiate_norm(const uint16_t* grad, const uint16_t* others, const uint16_t* x, const float* means,
                                   const float* scales, const float* weight, int64_t num_rows, int64_t width, int64_t part,
                                   uint16_t* found, float* weight_sums, float* bias_sums, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < num_rows; first += part) {
    float *of_weight = weight_sums + first / part * width, *of_bias = bias_sums + first / part * width;
    std::fill(of_weight, of_weight + width, 0.0f);
    std::fill(of_bias, of_bias + width, 0.0f);
    for (int64_t row = first; row < std::min(first + part, num_rows); ++row) {
      const int64_t place = row * width;
      const __m512 mean = _mm512_set1_ps(means[row]), scale = _mm512_set1_ps(scales[row]);
      __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 16) {
        const __m512 g = load_bf16(grad + place + d), weighted = _mm512_mul_ps(g, _mm512_loadu_ps(weight + d));
        const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + place + d), mean), scale);
        total = _mm512_add_ps(total, weighted);
        along = _mm512_fmadd_ps(weighted, unit, along);
        _mm512_storeu_ps(of_weight + d, _mm512_fmadd_ps(g, unit, _mm512_loadu_ps(of_weight + d)));
        _mm512_storeu_ps(of_bias + d, _mm512_add_ps(g, _mm512_loadu_ps(of_bias + d)));
      }
      total = _mm512_set1_ps(_mm512_reduce_add_ps(total) / float(width));
      along = _mm512_set1_ps(_mm512_reduce_add_ps(along) / float(width));
      for (int64_t d = 0; d < width; d += 16) {
        const __m512 weighted = _mm512_mul_ps(load_bf16(grad + place + d), _mm512_loadu_ps(weight + d));
        const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + place + d), mean), scale);
        __m512 own = _mm512_mul_ps(_mm512_fnmadd_ps(unit, along, _mm512_sub_ps(weighted, total)), scale);
        if (others != nullptr) own = _mm512_add_ps(own, load_bf16(others + place + d));
        store_bf16(found + place + d, own);
      }
    }
  }
}

// -ln p of byte values by their logits (N, 256), or not a number for what is no byte; of each its highest logit, and to the base
// 2 the logarithm of the sum of e^(logit - highest).
extern "C" void nll(const float* logits, const int64_t* byte_ids, float* tops, float* logs, float* found, int64_t num_bytes,
                    int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_bytes; ++i) {
    const float* row = logits + i * kValues;
    __m512 highest = _mm512_loadu_ps(row), sum = _mm512_setzero_ps();
    for (int64_t v = 16; v < kValues; v += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(row + v));
    tops[i] = _mm512_reduce_max_ps(highest);
    for (int64_t v = 0; v < kValues; v += 16) sum = _mm512_add_ps(sum, power_of_e(row + v, tops[i], 0));
    logs[i] = std::log2(_mm512_reduce_add_ps(sum));
    found[i] = is_byte(byte_ids[i]) ? tops[i] - row[byte_ids[i]] + logs[i] / kLog2E : std::nanf("");
  }
}

// From the gradients (N,) of what `nll` found those of the logits.
extern "C" void differentiate_nll(const float* logits, const int64_t* byte_ids, const float* tops, const float* logs,
                                  const float* grad, float* found, int64_t num_bytes, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num_bytes; ++i) {
    const __m512 scale = _mm512_set1_ps(grad[i]);
    for (int64_t v = 0; v < kValues; v += 16) {
      const __m512 p = power_of_e(logits + i * kValues + v, tops[i], logs[i]);
      _mm512_storeu_ps(found + i * kValues + v, _mm512_mul_ps(p, scale));
    }
    if (is_byte(byte_ids[i])) found[i * kValues + byte_ids[i]] -= grad[i];
  }
}

#else

extern "C" int64_t is_supported() { return 0; }
extern "C" int64_t uses_tiles() { return 0; }

extern "C" void drop(const void*, uint64_t, uint32_t, float, int64_t, void*, int64_t) {}
extern "C" void differentiate_relu(void*, const void*, int64_t, int64_t, int64_t) {}
extern "C" int64_t room_for_weight(int64_t, int64_t) { return 0; }
extern "C" void differentiate_weight(const void*, const void*, int64_t, int64_t, int64_t, void*, void*, void*, int64_t) {}
extern "C" void embed(const void*, const void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, void*,
                      int64_t) {}
extern "C" void differentiate_embedding(const void*, const void*, int64_t, int64_t, int64_t, int64_t, void*, void*, void*,
                                        int64_t) {}
extern "C" void sum_rows(const void*, int64_t, int64_t, int64_t, void*, int64_t) {}
extern "C" void normalize(const void*, const void*, const void*, const void*, float, int64_t, int64_t, void*, void*, void*, void*,
                          int64_t) {}
extern "C" void differentiate_norm(const void*, const void*, const void*, const void*, const void*, const void*, int64_t, int64_t,
                                   int64_t, void*, void*, void*, int64_t) {}
extern "C" void nll(const void*, const void*, void*, void*, void*, int64_t, int64_t) {}
extern "C" void differentiate_nll(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t) {}

#endif
