// Products of packed matrices with vectors, and the other arithmetic of a layer, in float32.
//
// A matrix is multiplied with one vector or, read once, with several; each product has the bits that it has alone.
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
constexpr int64_t kSums = kPanelRows / kLanes;

// The most vectors that a matrix is multiplied with at once.
constexpr int64_t kMostOperands = 16;

// So many of them share a weight that was made a float: their sums, of half a panel each, have to stay in registers.
#if defined(__AVX512F__)
constexpr int64_t kTogether = 4;
#elif defined(__x86_64__)
constexpr int64_t kTogether = 2;
#else
constexpr int64_t kTogether = 1;
#endif

// Columns of a panel that all of them are through with before the next, so that only the first of them waits for the memory.
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kBlocksAhead = 2;  // fetched meanwhile
constexpr int64_t kCacheLine = 64;   // bytes

// How far ahead of itself a walk with one vector fetches, in bytes; the processor's own fetching stops at the end of a 4 KB page.
constexpr int64_t kWalkBytesAhead = 1 << 13;

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
  static constexpr bool kIsWalk = false;
  int64_t count;
  int64_t operator[](int64_t i) const { return i; }
};

// All of them, read from memory for the first time: fetched ahead.
struct WalkedColumns : AllColumns {
  static constexpr bool kIsWalk = true;
};

struct SomeColumns {
  static constexpr bool kIsWalk = false;
  int64_t count;
  const int32_t* columns;
  int64_t operator[](int64_t i) const { return columns[i]; }
};

// One column of a panel: half of its rows as floats, in two vectors.
struct Bf16Column {
  static constexpr int64_t kVectors = kPanelRows / (2 * kLanes);
  template <int64_t kHalf>
  static void widen(const Words* column, Floats* weights) {
    weights[0] = low_halves(column[kHalf]);
    weights[1] = high_halves(column[kHalf]);
  }
};

struct Int8Column {
  static constexpr int64_t kVectors = kPanelRows / (4 * kLanes);
  template <int64_t kHalf>
  static void widen(const Words* column, Floats* weights) {
    constexpr uint32_t kByte = 0xffu << 15, kOne = 0x3f800000u;
    const Words word = *column;
    weights[0] = (Floats)(((kHalf == 0 ? word << 15 : word >> 1) & kByte) | kOne);
    weights[1] = (Floats)(((kHalf == 0 ? word << 7 : word >> 9) & kByte) | kOne);
  }
};

inline float sum_of(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// One of the vectors that a matrix is multiplied with.
struct Operand {
  const float* x;
  int64_t num_columns;     // that are read
  const int32_t* columns;  // null for all
  float sum;               // of x; int8 needs it
};

struct Operands {
  int64_t count = 0;
  Operand each[kMostOperands];

  void add(const Matrix& matrix, const float* x, int64_t num_columns, const int32_t* columns) {
    each[count++] = {x, num_columns, columns, matrix.scales == nullptr ? 0.0f : sum_of(x, matrix.columns)};
  }

  void add(const Matrix& matrix, const float* x) { add(matrix, x, matrix.columns, nullptr); }
};

// Of a panel's rows, even and odd columns apart: an addition has to wait for the one before it.
struct PanelSums {
  Floats of[2][kSums];
};

// Adds one column times x.
template <class Column>
inline void add_column(const Words* column, float x, Floats* sums) {
  Floats low[2], high[2];
  Column::template widen<0>(column, low);
  Column::template widen<1>(column, high);
  for (int64_t k = 0; k < 2; ++k) sums[k] += low[k] * x;
  for (int64_t k = 0; k < 2; ++k) sums[2 + k] += high[k] * x;
}

// Adds the columns [begin, end) of those given, from an even one on.
template <class Column, class Columns>
inline void add_columns(const Words* words, const float* x, Columns columns, int64_t begin, int64_t end, PanelSums& sums) {
  PanelSums local = sums;
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) {
    if constexpr (Columns::kIsWalk) {
      const char* ahead = reinterpret_cast<const char*>(words + i * Column::kVectors) + kWalkBytesAhead;
      for (int64_t line = 0; line < 2 * Column::kVectors * int64_t(sizeof(Words)); line += kCacheLine) {
        __builtin_prefetch(ahead + line);
      }
    }
    add_column<Column>(words + columns[i] * Column::kVectors, x[columns[i]], local.of[0]);
    add_column<Column>(words + columns[i + 1] * Column::kVectors, x[columns[i + 1]], local.of[1]);
  }
  if (i < end) add_column<Column>(words + columns[i] * Column::kVectors, x[columns[i]], local.of[0]);
  sums = local;
}

template <class Column, class Columns>
inline PanelSums sum_columns(const Words* words, const float* x, Columns columns) {
  PanelSums sums = {};
  add_columns<Column>(words, x, columns, 0, columns.count, sums);
  return sums;
}

// The same of all columns for half of the rows of some products, each column made floats once.
template <class Column, int64_t kHalf, int64_t kCount>
inline void add_block(const Words* words, int64_t begin, int64_t end, const float* const* xs, PanelSums* sums) {
  Floats block[kCount][2][2], weights[2];
  const float* x[kCount];
  for (int64_t n = 0; n < kCount; ++n) {
    x[n] = xs[n];
    for (int64_t parity = 0; parity < 2; ++parity) {
      for (int64_t k = 0; k < 2; ++k) block[n][parity][k] = sums[n].of[parity][2 * kHalf + k];
    }
  }
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) {
    for (int64_t parity = 0; parity < 2; ++parity) {
      Column::template widen<kHalf>(words + (i + parity) * Column::kVectors, weights);
      for (int64_t n = 0; n < kCount; ++n) {
        for (int64_t k = 0; k < 2; ++k) block[n][parity][k] += weights[k] * x[n][i + parity];
      }
    }
  }
  if (i < end) {
    Column::template widen<kHalf>(words + i * Column::kVectors, weights);
    for (int64_t n = 0; n < kCount; ++n) {
      for (int64_t k = 0; k < 2; ++k) block[n][0][k] += weights[k] * x[n][i];
    }
  }
  for (int64_t n = 0; n < kCount; ++n) {
    for (int64_t parity = 0; parity < 2; ++parity) {
      for (int64_t k = 0; k < 2; ++k) sums[n].of[parity][2 * kHalf + k] = block[n][parity][k];
    }
  }
}

// What `sum_columns` makes of all columns, for several x.
template <class Column>
inline void sum_together(const Words* words, int64_t num_columns, const float* const* xs, int64_t count, PanelSums* sums) {
  std::memset(sums, 0, count * sizeof *sums);
  const int64_t num_calls = 2 * (count / kTogether + count % kTogether);
  const int64_t lines_of_block = kBlockColumns * Column::kVectors * sizeof(Words) / kCacheLine;
  const int64_t lines_of_call = (lines_of_block + num_calls - 1) / num_calls;
  for (int64_t begin = 0; begin < num_columns; begin += kBlockColumns) {
    const int64_t end = std::min(begin + kBlockColumns, num_columns);
    const char* ahead = reinterpret_cast<const char*>(words + (begin + kBlocksAhead * kBlockColumns) * Column::kVectors);
    const auto fetch = [&] {
      for (int64_t line = 0; line < lines_of_call; ++line, ahead += kCacheLine) __builtin_prefetch(ahead);
    };
    int64_t n = 0;
    for (; kTogether > 1 && n + kTogether <= count; n += kTogether) {
      fetch();
      add_block<Column, 0, kTogether>(words, begin, end, xs + n, sums + n);
      fetch();
      add_block<Column, 1, kTogether>(words, begin, end, xs + n, sums + n);
    }
    for (; n < count; ++n) {
      fetch();
      fetch();
      add_columns<Column>(words, xs[n], AllColumns{num_columns}, begin, end, sums[n]);
    }
  }
}

// A panel's rows of a product. Compiled once: products that are made together must be rounded as one that is made alone.
__attribute__((noinline)) inline void finish_panel(const Matrix& matrix, int64_t first, int64_t count, const PanelSums& sums,
                                                   float sum_of_x, float* values) {
  for (int64_t v = 0; v < kSums; ++v) reinterpret_cast<Floats*>(values)[v] = sums.of[0][v] + sums.of[1][v];
  if (matrix.scales != nullptr) {
    for (int64_t r = 0; r < count; ++r) values[r] = matrix.scales[first + r] * (256.0f * values[r] - 384.0f * sum_of_x);
  }
  if (matrix.bias != nullptr) {
    for (int64_t r = 0; r < count; ++r) values[r] += matrix.bias[first + r];
  }
}

template <class Column, class Emit>
void multiply_panels(const Matrix& matrix, int64_t begin, int64_t end, const Operands& operands, const Emit& emit) {
  const float* xs[kMostOperands];  // of those that read all columns
  int64_t whole[kMostOperands], num_whole = 0;
  for (int64_t n = 0; n < operands.count; ++n) {
    if (operands.each[n].columns != nullptr) continue;
    whole[num_whole] = n;
    xs[num_whole++] = operands.each[n].x;
  }
  PanelSums together[kMostOperands];
  for (int64_t panel = begin; panel < end; ++panel) {
    const Words* words = panel_words(matrix, panel, Column::kVectors);
    const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, matrix.rows - first);
    const auto finish = [&](int64_t n, const PanelSums& sums) {
      alignas(64) float values[kPanelRows];
      finish_panel(matrix, first, count, sums, operands.each[n].sum, values);
      emit(n, first, values, count);
    };
    if (num_whole == 1) {
      finish(whole[0], sum_columns<Column>(words, xs[0], WalkedColumns{{matrix.columns}}));
    } else if (num_whole > 1) {
      sum_together<Column>(words, matrix.columns, xs, num_whole, together);
      for (int64_t i = 0; i < num_whole; ++i) finish(whole[i], together[i]);
    }
    if (num_whole == operands.count) continue;
    for (int64_t n = 0; n < operands.count; ++n) {
      const Operand& operand = operands.each[n];
      if (operand.columns == nullptr) continue;
      finish(n, sum_columns<Column>(words, operand.x, SomeColumns{operand.num_columns, operand.columns}));
    }
  }
}

// The panels [begin, end) of each W x, as emit(which x, first row, values, count).
template <class Emit>
void multiply(const Matrix& matrix, int64_t begin, int64_t end, const Operands& operands, const Emit& emit) {
  if (matrix.scales == nullptr) {
    multiply_panels<Bf16Column>(matrix, begin, end, operands, emit);
  } else {
    multiply_panels<Int8Column>(matrix, begin, end, operands, emit);
  }
}

template <class Emit>
void multiply(const Matrix& matrix, const Operands& operands, const Emit& emit) {
  multiply(matrix, 0, num_panels(matrix), operands, emit);
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
