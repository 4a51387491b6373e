// Choosing a byte from logits: `sampling_law`, `draw` and `surprisal` of core/law.py, in float64 as there.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "functions.h"

constexpr int kNumByteValues = 256;

extern "C" struct Law {
  double temperature;  // 0 takes the likeliest byte
  int64_t top_k;       // kNumByteValues for all
  double top_p;        // 1 for all
};

// The byte at which the cumulated law first exceeds `uniform` in [0, 1). Weights of bytes that the filters drop become 0.
inline int64_t draw(const float* logits, double* weights, const Law& law, double uniform) {
  if (law.top_k < kNumByteValues || law.top_p < 1) {
    int likeliest_first[kNumByteValues];
    std::iota(likeliest_first, likeliest_first + kNumByteValues, 0);
    std::stable_sort(likeliest_first, likeliest_first + kNumByteValues, [&](int a, int b) { return logits[a] > logits[b]; });
    int64_t num_kept = law.top_k;
    if (law.top_p < 1) {
      double total = 0, mass = 0;
      for (int64_t i = 0; i < num_kept; ++i) total += weights[likeliest_first[i]];
      int64_t i = 0;
      while (i < num_kept && (mass += weights[likeliest_first[i]]) < law.top_p * total) ++i;
      num_kept = std::min(num_kept, i + 1);
    }
    for (int64_t i = num_kept; i < kNumByteValues; ++i) weights[likeliest_first[i]] = 0;
  }

  const double total = std::accumulate(weights, weights + kNumByteValues, 0.0);
  double cumulated = 0;
  int64_t last_possible = 0;
  for (int b = 0; b < kNumByteValues; ++b) {
    if (weights[b] == 0) continue;
    cumulated += weights[b];
    last_possible = b;
    if (cumulated > uniform * total) break;
  }
  return last_possible;
}

// Draws a byte unless it is given, that is, not negative; -log2 p of it under the unfiltered law, in bits.
inline float choose(const float* logits, const Law& law, double uniform, int64_t& byte) {
  const float* likeliest = std::max_element(logits, logits + kNumByteValues);
  double weights[kNumByteValues];
  const auto weigh = [&](double temperature) {
    const double highest = *likeliest;
#pragma omp simd
    for (int b = 0; b < kNumByteValues; ++b) weights[b] = exp_of((logits[b] - highest) / temperature);
  };
  weigh(1);
  const double total = std::accumulate(weights, weights + kNumByteValues, 0.0);
  if (byte < 0 && law.temperature == 0) byte = likeliest - logits;
  if (byte < 0 && law.temperature != 1) weigh(law.temperature);
  if (byte < 0) byte = draw(logits, weights, law, uniform);
  return float((std::log(total) + *likeliest - logits[byte]) / std::log(2.0));
}
