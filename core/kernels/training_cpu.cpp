// What lies between the products of training in bf16, with float32 sums.
//
// Rows are summed in parts of a fixed number of them, whoever computes a part. Widths are whole vectors.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include <algorithm>

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

constexpr int64_t kRows = 512;                        // that are summed while their pairs are in the cache
constexpr int64_t kOutputs = 128, kInputs = 256;      // of the part of a weight that one thread takes
constexpr int64_t kTall = 4, kWide = 4, kLanes = 16;  // outputs and vectors of inputs whose sums stay in registers

struct Layer {
  const uint16_t *grad, *x;    // (rows, outputs) and (rows, inputs)
  float *of_weight, *of_bias;  // (outputs, inputs) and (outputs,)
  int64_t num_rows, num_outputs, num_inputs;
};

// Pairs of rows, one or four vectors of columns after the other.
struct Pairs {
  alignas(64) __m512i outputs[kOutputs / kLanes][kRows / 2];
  alignas(64) __m512i inputs[kInputs / kLanes / kWide][kRows / 2][kWide];
};

// Of 16 columns of two rows; the second one is zero behind the last.
inline __m512i pair_of(const uint16_t* x, int64_t width, bool has_second) {
  const auto load = [](const uint16_t* y) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y))); };
  return has_second ? _mm512_or_si512(load(x), _mm512_slli_epi32(load(x + width), 16)) : load(x);
}

// Adds what `num_pairs` pairs say of 4 outputs and 64 inputs to what is there.
inline void add_tile(const uint32_t* outputs, const __m512i (*inputs)[kWide], int64_t num_pairs, float* found, int64_t stride) {
  __m512 sums[kTall][kWide];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kWide; ++v) sums[r][v] = _mm512_loadu_ps(found + r * stride + v * kLanes);
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTall; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(outputs[i * kLanes + r]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kWide; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, (__m512bh)inputs[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kWide; ++v) _mm512_storeu_ps(found + r * stride + v * kLanes, sums[r][v]);
  }
}

// The part of the gradients that begins with this output and input.
void differentiate(const Layer& layer, int64_t first_output, int64_t first_input) {
  static thread_local Pairs pairs;
  const int64_t num_outputs = std::min(kOutputs, layer.num_outputs - first_output);
  const int64_t num_inputs = std::min(kInputs, layer.num_inputs - first_input);
  float* found = layer.of_weight + first_output * layer.num_inputs + first_input;
  for (int64_t o = 0; o < num_outputs; ++o) std::fill_n(found + o * layer.num_inputs, num_inputs, 0.0f);
  __m512 sums[kOutputs / kLanes] = {};
  for (int64_t first = 0; first < layer.num_rows; first += kRows) {
    const int64_t num_pairs = (std::min(kRows, layer.num_rows - first) + 1) / 2;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const int64_t row = first + 2 * i;
      const bool has_second = row + 1 < layer.num_rows;
      const uint16_t* grad = layer.grad + row * layer.num_outputs + first_output;
      for (int64_t o = 0; o < num_outputs; o += kLanes) {
        const __m512i pair = pair_of(grad + o, layer.num_outputs, has_second);
        const __m512 upper = (__m512)_mm512_and_si512(pair, _mm512_set1_epi32(int32_t(0xffff0000)));
        sums[o / kLanes] = _mm512_add_ps(sums[o / kLanes], _mm512_add_ps((__m512)_mm512_slli_epi32(pair, 16), upper));
        pairs.outputs[o / kLanes][i] = pair;
      }
      const uint16_t* x = layer.x + row * layer.num_inputs + first_input;
      for (int64_t k = 0; k < num_inputs; k += kLanes) {
        pairs.inputs[k / kLanes / kWide][i][k / kLanes % kWide] = pair_of(x + k, layer.num_inputs, has_second);
      }
    }
    for (int64_t k = 0; k < num_inputs; k += kWide * kLanes) {
      for (int64_t o = 0; o < num_outputs; o += kTall) {
        const uint32_t* outputs = reinterpret_cast<const uint32_t*>(pairs.outputs[o / kLanes]) + o % kLanes;
        add_tile(outputs, pairs.inputs[k / kLanes / kWide], num_pairs, found + o * layer.num_inputs + k, layer.num_inputs);
      }
    }
  }
  if (first_input > 0) return;
  for (int64_t o = 0; o < num_outputs; o += kLanes) _mm512_storeu_ps(layer.of_bias + first_output + o, sums[o / kLanes]);
}

// A bijection of 32 bits that leaves no pattern of consecutive numbers (C. Wellons' "lowbias32").
inline __m512i mixed(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(int32_t(0x846ca68b)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

}  // namespace

extern "C" int64_t training_is_supported() { return 1; }

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
extern "C" void differentiate_relu(uint16_t* grad, const uint16_t* activated, int64_t squares, int64_t count, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 y = load_bf16(activated + i);
    __m512 x = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), load_bf16(grad + i));
    if (squares) x = _mm512_mul_ps(x, _mm512_mul_ps(_mm512_set1_ps(2.0f), _mm512_sqrt_ps(y)));
    store_bf16(grad + i, x);
  }
}

// The gradients of a weight, whose outputs are whole vectors and inputs fours of them, and of its bias.
extern "C" void differentiate_weight(const uint16_t* grad, const uint16_t* x, int64_t num_rows, int64_t num_outputs,
                                     int64_t num_inputs, float* of_weight, float* of_bias, int64_t num_threads) {
  const Layer layer = {grad, x, of_weight, of_bias, num_rows, num_outputs, num_inputs};
  const int64_t across = (num_inputs + kInputs - 1) / kInputs, down = (num_outputs + kOutputs - 1) / kOutputs;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t i = 0; i < across * down; ++i) differentiate(layer, i / across * kOutputs, i % across * kInputs);
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

// -ln p of byte values by their logits (N, 256), or not a number for what is no byte; of each its highest logit, and to the base 2
// the logarithm of the sum of e^(logit - highest).
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

extern "C" int64_t training_is_supported() { return 0; }

extern "C" void drop(const void*, uint64_t, uint32_t, float, int64_t, void*, int64_t) {}
extern "C" void differentiate_relu(void*, const void*, int64_t, int64_t, int64_t) {}
extern "C" void differentiate_weight(const void*, const void*, int64_t, int64_t, int64_t, void*, void*, int64_t) {}
extern "C" void sum_rows(const void*, int64_t, int64_t, int64_t, void*, int64_t) {}
extern "C" void normalize(const void*, const void*, const void*, const void*, float, int64_t, int64_t, void*, void*, void*, void*,
                          int64_t) {}
extern "C" void differentiate_norm(const void*, const void*, const void*, const void*, const void*, const void*, int64_t, int64_t,
                                   int64_t, void*, void*, void*, int64_t) {}
extern "C" void nll(const void*, const void*, void*, void*, void*, int64_t, int64_t) {}
extern "C" void differentiate_nll(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t) {}

#endif
