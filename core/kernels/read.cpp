// Reads memory and does as little as can be done with it: how fast that goes is the limit of all work on it.

#include <cstdint>

using Words = uint64_t __attribute__((vector_size(64)));
using StoredWords = Words __attribute__((aligned(8), may_alias));

// All words joined by exclusive or, `num_passes` times over; each thread goes through its own part of them.
extern "C" uint64_t read_words(const uint64_t* data, int64_t num_words, int64_t num_passes, int64_t num_threads) {
  constexpr int64_t kLanes = sizeof(Words) / sizeof(uint64_t), kChains = 8;
  const int64_t num_steps = num_words / (kLanes * kChains);
  uint64_t found = 0;
#pragma omp parallel num_threads(num_threads) reduction(^ : found)
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    Words sums[kChains] = {};
#pragma omp for nowait
    for (int64_t step = 0; step < num_steps; ++step) {
      const StoredWords* words = reinterpret_cast<const StoredWords*>(data) + step * kChains;
      for (int64_t i = 0; i < kChains; ++i) sums[i] ^= words[i];
    }
    for (const Words& sum : sums) {
      for (int64_t i = 0; i < kLanes; ++i) found ^= sum[i];
    }
    asm volatile("" : : : "memory");  // what was read is not remembered
  }
  for (int64_t i = num_steps * kLanes * kChains; i < num_words; ++i) found ^= data[i];
  return found;
}
