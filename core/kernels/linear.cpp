// x W^T + b of a few rows in bf16 with float32 sums. At so few rows the time is that of reading W, which lies packed in
// blocks of 64 outputs and 64 inputs.

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512F__)

#include "tiles.h"

namespace {

constexpr int64_t kWorthSharing = 1 << 20;  // multiplications

struct Linear {
  const uint16_t* x;     // (rows, inputs)
  const Block* weight;   // (outputs / 64, inputs / 64)
  const float* bias;     // (outputs), or null
  uint16_t* y;           // (rows, outputs)
  int64_t num_rows, num_inputs, num_outputs;
};

// All rows of 64 outputs.
void multiply_panel(const Linear& linear, int64_t panel) {
  const int64_t num_blocks = linear.num_inputs / kBlock;
  for (int64_t first = 0; first < linear.num_rows; first += kTile) {
    const uint32_t* rows[kTile];
    for (int64_t i = 0; i < kTile; ++i) {  // behind the last row it is computed again, and not kept
      const int64_t row = std::min(first + i, linear.num_rows - 1);
      rows[i] = reinterpret_cast<const uint32_t*>(linear.x + row * linear.num_inputs);
    }
    __m512 sums[kTile][kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      const __m512 bias = linear.bias ? _mm512_loadu_ps(linear.bias + panel * kBlock + 16 * v) : _mm512_setzero_ps();
      for (int64_t i = 0; i < kTile; ++i) sums[i][v] = bias;
    }
    for (int64_t block = 0; block < num_blocks; ++block) {
      multiply(rows, linear.weight[panel * num_blocks + block], sums);
      for (const uint32_t*& row : rows) row += kDepth;
    }
    for (int64_t i = 0; i < std::min(kTile, linear.num_rows - first); ++i) {
      store(linear.y + (first + i) * linear.num_outputs + panel * kBlock, sums[i], _mm512_set1_ps(1.0f));
    }
  }
}

}  // namespace

extern "C" int64_t linear_is_supported() { return 1; }

extern "C" void apply_linear(const Linear* linear, int64_t num_threads) {
  const bool is_large = linear->num_rows * linear->num_inputs * linear->num_outputs > kWorthSharing;
#pragma omp parallel for num_threads(num_threads) if (is_large)
  for (int64_t panel = 0; panel < linear->num_outputs / kBlock; ++panel) multiply_panel(*linear, panel);
}

#else

extern "C" int64_t linear_is_supported() { return 0; }
extern "C" void apply_linear(const void*, int64_t) {}

#endif
