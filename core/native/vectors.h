// Products of packed matrices with vectors, and the other arithmetic of a layer, in float32.
//
// Vectors are those of GCC and Clang, which lower them to whatever the processor has.
//
// Layout of a matrix. R rows (outputs) and C columns (inputs) are cut into panels of four vectors of rows, of L floats each,
// the last one filled up with zeros. A panel is stored column by column as two vectors of L words of 32 bits; word j of vector
// v holds row 2 L v + j in its low half and row 2 L v + L + j in its high half. A bf16 is the upper half of a float32, so
// one shift and one mask turn such a vector into 2 L rows, and a product is a single forward walk through memory whose
// sums stay in registers.
//
// A matrix of int8 has the same panels with one vector of L words a column; byte k of word j belongs to row L k + j
// and holds 128 + q, where q times the row's scale is the weight. Put into the upper bits of a mantissa it makes
// the float 1 + (128 + q) / 256 without a conversion; what is too much is the same multiple of the sum of x in all rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "functions.h"
#include "model.h"

// L. Of an x86 processor's registers: a vector that takes two is kept in memory by the compiler.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 16;
#endif
constexpr int64_t kPanelRows = 4 * kLanes;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

inline Floats low_halves(Words words) { return (Floats)(words << 16); }
inline Floats high_halves(Words words) { return (Floats)(words & 0xffff0000u); }

inline int64_t num_panels(const Matrix& matrix) { return (matrix.rows + kPanelRows - 1) / kPanelRows; }

inline int64_t num_bytes(const Matrix& matrix) {
  return matrix.rows * matrix.columns * (matrix.scales == nullptr ? 2 : 1);
}

// The vectors of one panel, `per_column` for each column.
inline const Words* panel_words(const Matrix& matrix, int64_t panel, int64_t per_column) {
  return reinterpret_cast<const Words*>(matrix.panels) + panel * matrix.columns * per_column;
}

struct AllColumns {
  int64_t count;
  int64_t operator[](int64_t i) const { return i; }
};

struct SomeColumns {
  int64_t count;
  const int32_t* columns;
  int64_t operator[](int64_t i) const { return columns[i]; }
};

// Adds one column times x to the sums of a panel's rows.
struct Bf16Column {
  static constexpr int64_t kVectors = kPanelRows / (2 * kLanes);
  static void add(const Words* column, float x, Floats* sums) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[2 * v] += low_halves(column[v]) * x;
      sums[2 * v + 1] += high_halves(column[v]) * x;
    }
  }
};

struct Int8Column {
  static constexpr int64_t kVectors = kPanelRows / (4 * kLanes);
  static void add(const Words* column, float x, Floats* sums) {
    constexpr uint32_t kByte = 0xffu << 15, kOne = 0x3f800000u;
    const Words word = *column;
    sums[0] += (Floats)(((word << 15) & kByte) | kOne) * x;
    sums[1] += (Floats)(((word << 7) & kByte) | kOne) * x;
    sums[2] += (Floats)(((word >> 1) & kByte) | kOne) * x;
    sums[3] += (Floats)(((word >> 9) & kByte) | kOne) * x;
  }
};

inline float sum_of(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// One panel of W x, as emit(row, value) for each of its rows; only the given columns are read. `sum` is that of x.
template <class Column, class Columns, class Emit>
inline void multiply_panel(const Matrix& matrix, int64_t panel, const float* x, float sum, Columns columns, Emit emit) {
  const Words* words = panel_words(matrix, panel, Column::kVectors);
  constexpr int64_t kSums = kPanelRows / kLanes;
  // Two columns at a time, summed apart: an addition has to wait for the one before it.
  Floats sums[2][kSums] = {};
  int64_t i = 0;
  for (; i + 2 <= columns.count; i += 2) {
    Column::add(words + columns[i] * Column::kVectors, x[columns[i]], sums[0]);
    Column::add(words + columns[i + 1] * Column::kVectors, x[columns[i + 1]], sums[1]);
  }
  if (i < columns.count) Column::add(words + columns[i] * Column::kVectors, x[columns[i]], sums[0]);

  alignas(64) float values[kPanelRows];
  for (int64_t v = 0; v < kSums; ++v) reinterpret_cast<Floats*>(values)[v] = sums[0][v] + sums[1][v];
  const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, matrix.rows - first);
  if (matrix.scales != nullptr) {
    for (int64_t r = 0; r < count; ++r) values[r] = matrix.scales[first + r] * (256.0f * values[r] - 384.0f * sum);
  }
  if (matrix.bias != nullptr) {
    for (int64_t r = 0; r < count; ++r) values[r] += matrix.bias[first + r];
  }
  for (int64_t r = 0; r < count; ++r) emit(first + r, values[r]);
}

// The panels [begin, end) of W x.
template <class Columns, class Emit>
void multiply(const Matrix& matrix, int64_t begin, int64_t end, const float* x, Columns columns, Emit emit) {
  const float sum = matrix.scales == nullptr ? 0.0f : sum_of(x, matrix.columns);
  for (int64_t panel = begin; panel < end; ++panel) {
    if (matrix.scales == nullptr) {
      multiply_panel<Bf16Column>(matrix, panel, x, sum, columns, emit);
    } else {
      multiply_panel<Int8Column>(matrix, panel, x, sum, columns, emit);
    }
  }
}

template <class Emit>
void multiply(const Matrix& matrix, const float* x, Emit emit) {
  multiply(matrix, 0, num_panels(matrix), x, AllColumns{matrix.columns}, emit);
}

// The lower and the upper half of a vector added.
template <class Half, class Whole>
inline Half folded(Whole v) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
}

using Four = float __attribute__((vector_size(16)));
using Eight = float __attribute__((vector_size(32)));
using Sixteen = float __attribute__((vector_size(64)));

inline float sum_of(Four v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline float sum_of(Eight v) { return sum_of(folded<Four>(v)); }
inline float sum_of(Sixteen v) { return sum_of(folded<Eight>(v)); }

inline float dot(const float* a, const float* b, int64_t n) {
  Floats sums = {}, x, y;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    std::memcpy(&x, a + i, sizeof x);
    std::memcpy(&y, b + i, sizeof y);
    sums += x * y;
  }
  float rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of(sums) + rest;
}

inline void normalize(const Norm& norm, const float* x, float* y, int64_t n) {
  float squares = 0;
  const float mean = sum_of(x, n) / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / n + float(norm.epsilon));
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

// Weights e^(score - highest) in place of the scores; their sum.
inline float softmax_weights(float* scores, int64_t n) {
  float highest = scores[0], sum = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 1; i < n; ++i) highest = scores[i] > highest ? scores[i] : highest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = exp_of(scores[i] - highest);
    sum += scores[i];
  }
  return sum;
}

// y = scale * sum of weights[s] * rows[s], for some vectors of rows of `width` floats.
template <int64_t kVectors>
inline void blend_vectors(const float* rows, const float* weights, int64_t n, int64_t width, float scale, float* y) {
  const auto add = [=](int64_t s, Floats* sums) {
    for (int64_t v = 0; v < kVectors; ++v) {
      Floats x;
      std::memcpy(&x, rows + s * width + v * kLanes, sizeof x);
      sums[v] += weights[s] * x;
    }
  };
  Floats sums[2][kVectors] = {};  // of rows in turn: an addition has to wait for the one before it
  int64_t s = 0;
  for (; s + 2 <= n; s += 2) {
    add(s, sums[0]);
    add(s + 1, sums[1]);
  }
  if (s < n) add(s, sums[0]);
  for (int64_t v = 0; v < kVectors; ++v) {
    const Floats sum = (sums[0][v] + sums[1][v]) * scale;
    std::memcpy(y + v * kLanes, &sum, sizeof sum);
  }
}

inline void blend(const float* rows, const float* weights, int64_t n, int64_t width, float scale, float* y) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) blend_vectors<4>(rows + c, weights, n, width, scale, y + c);
  for (; c + kLanes <= width; c += kLanes) blend_vectors<1>(rows + c, weights, n, width, scale, y + c);
  for (; c < width; ++c) {
    float sum = 0;
    for (int64_t s = 0; s < n; ++s) sum += weights[s] * rows[s * width + c];
    y[c] = sum * scale;
  }
}

// The two halves of a head turned against each other by its slot's angles.
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + x[i + half] * sin[i];
  for (int64_t i = half; i < n; ++i) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
}

// Scales x to unit root mean square.
inline void normalize_rms(float* x, int64_t n, float epsilon) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) / n + epsilon);
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}
