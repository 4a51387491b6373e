// One byte of a MegaByte at batch 1: what `MegaByte.step` does, without an operator call per matrix.
//
// At batch 1 every weight is read once per byte and used once, so the time is the time to read the weights. They are
// bf16 here (the exported models are, so nothing is lost); everything that is computed is float32.
//
// Layout. A matrix of R rows (outputs) and C columns (inputs) is cut into panels of 64 rows, the last one filled up with
// zeros. A panel is stored column by column, 128 bytes each, as two vectors of 16 words of 32 bits; word j of vector v
// holds row 32 v + j in its low half and row 32 v + 16 + j in its high half. A bf16 is the upper half of a float32, so
// one shift and one mask turn such a vector into 32 rows, and a product is a single forward walk through memory whose
// sums stay in registers. A column whose input is zero can be left out; behind a ReLU that is most of them.
//
// The decoding state is the caller's `core.cache.Cache`, read and written in place: Python may run any step instead.
//
// One thread does it all: between two barriers lies less than a microsecond of work, and a helper that the system puts
// aside in the middle of it costs more than it brings. Several sequences may be stepped in parallel.
//
// The structs are mirrored in __init__.py. Vectors are those of GCC and Clang, which lower them to whatever the
// processor has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));

constexpr int64_t kPanelRows = 64;
constexpr int64_t kLanes = 16;
constexpr int64_t kColumnVectors = kPanelRows / (2 * kLanes);

}  // namespace

extern "C" {

struct Matrix {
  const uint32_t* panels;  // null if the model has no such matrix
  const float* bias;       // null for none
  int64_t rows, columns;
};

struct Norm {
  const float *weight, *bias;
  double epsilon;
};

struct Block {
  Norm attention_norm;
  Matrix qkv, out;
  Norm ffn_norm;
  Matrix ffn_in, ffn_out;
};

struct Level {
  int64_t dim, num_layers, num_heads, head_dim, ffn_dim;
  int64_t span, row_length, memory;
  const float* embedding;  // (256, byte_dim)
  int64_t byte_dim;
  const float* byte_positions;  // (context, byte_dim), on the first level with learned positions
  const float* pad;             // (dim)
  const float* row_positions;   // (row_length, dim), below the first level with learned positions
  const float *cos, *sin;       // (memory + row_length, head_dim), with rotary positions
  Matrix project;               // span * byte_dim to dim, if the embedder projects
  const Block* blocks;
  Norm norm;
};

struct Model {
  const Level* levels;
  int64_t num_levels;
  int64_t patch_size;
  int64_t real_previous;
  int64_t slices;     // the unembedder maps one slice per child
  Matrix unembedder;  // to the second level
  Matrix head;
};

// The buffers of a Cache of one row, and where the result goes.
struct LevelState {
  float *keys, *values;  // (num_layers, num_heads, num_slots, head_dim)
  int64_t num_slots;
  float* from_parent;  // (row_length, dim); null on the first level
};

struct State {
  LevelState levels[2];
  int64_t* patch_bytes;  // (patch_size)
  int64_t* position;     // bytes read so far
  float* logits;         // (256), of the next byte
};

}  // extern "C"

namespace {

// --- Products --------------------------------------------------------------------------------------------------------

inline Floats low_halves(Words words) { return (Floats)(words << 16); }
inline Floats high_halves(Words words) { return (Floats)(words & 0xffff0000u); }

inline int64_t num_panels(const Matrix& matrix) { return (matrix.rows + kPanelRows - 1) / kPanelRows; }

// The vectors of one panel, `kColumnVectors` for each column.
inline const Words* panel_words(const Matrix& matrix, int64_t panel) {
  return reinterpret_cast<const Words*>(matrix.panels) + panel * matrix.columns * kColumnVectors;
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

// One panel of W x, as emit(row, value) for each of its rows; only the given columns are read.
template <class Columns, class Emit>
inline void multiply_panel(const Matrix& matrix, int64_t panel, const float* x, Columns columns, Emit emit) {
  const Words* words = panel_words(matrix, panel);
  // Two columns at a time, summed apart: an addition has to wait for the one before it.
  Floats sums[2][2 * kColumnVectors] = {};
  auto add = [&](Floats* sum, int64_t column) {
    for (int64_t v = 0; v < kColumnVectors; ++v) {
      const Words both = words[column * kColumnVectors + v];
      sum[2 * v] += low_halves(both) * x[column];
      sum[2 * v + 1] += high_halves(both) * x[column];
    }
  };
  int64_t i = 0;
  for (; i + 2 <= columns.count; i += 2) {
    add(sums[0], columns[i]);
    add(sums[1], columns[i + 1]);
  }
  if (i < columns.count) add(sums[0], columns[i]);

  alignas(64) float values[kPanelRows];
  for (int64_t v = 0; v < 2 * kColumnVectors; ++v) reinterpret_cast<Floats*>(values)[v] = sums[0][v] + sums[1][v];
  const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, matrix.rows - first);
  if (matrix.bias != nullptr) {
    for (int64_t r = 0; r < count; ++r) values[r] += matrix.bias[first + r];
  }
  for (int64_t r = 0; r < count; ++r) emit(first + r, values[r]);
}

template <class Columns, class Emit>
void multiply(const Matrix& matrix, const float* x, Columns columns, Emit emit) {
  for (int64_t panel = 0; panel < num_panels(matrix); ++panel) multiply_panel(matrix, panel, x, columns, emit);
}

template <class Emit>
void multiply(const Matrix& matrix, const float* x, Emit emit) {
  multiply(matrix, x, AllColumns{matrix.columns}, emit);
}

// Asks for a column before it is needed: columns that are far apart are not foreseen by the processor.
void prefetch_column(const Matrix& matrix, int64_t column) {
  for (int64_t panel = 0; panel < num_panels(matrix); ++panel) {
    const Words* words = panel_words(matrix, panel) + column * kColumnVectors;
    for (int64_t v = 0; v < kColumnVectors; ++v) __builtin_prefetch(words + v, 0, 2);
  }
}

// --- Small parts -----------------------------------------------------------------------------------------------------

inline float sum_of(Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

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

void normalize(const Norm& norm, const float* x, float* y, int64_t n) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / n + float(norm.epsilon));
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

// e^x for x <= 0, to within 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. The library's is not vectorised.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it off rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// Weights e^(score - highest) in place of the scores; their sum.
float softmax_weights(float* scores, int64_t n) {
  float highest = scores[0], sum = 0;
  for (int64_t i = 1; i < n; ++i) highest = std::max(highest, scores[i]);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = exp_of(scores[i] - highest);
    sum += scores[i];
  }
  return sum;
}

// The two halves of a head turned against each other by its slot's angles.
void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + x[i + half] * sin[i];
  for (int64_t i = half; i < n; ++i) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
}

// Where a step writes its key and value, and from which slot on it reads.
struct Slots {
  int64_t first, own;
};

// --- A sequence ------------------------------------------------------------------------------------------------------

struct Scratch {
  std::vector<float> x, normed, qkv, attended, hidden, scores, words;
  std::vector<int32_t> active;
};

struct Sequence {
  const Model& model;
  State state;
  Scratch scratch;

  Sequence(const Model& model, const State& state) : model(model), state(state) {
    int64_t dim = 0, ffn_dim = 0, scores = 0, inputs = 0;
    for (int64_t i = 0; i < model.num_levels; ++i) {
      const Level& level = model.levels[i];
      dim = std::max(dim, level.dim);
      ffn_dim = std::max(ffn_dim, level.ffn_dim);
      scores = std::max(scores, level.num_heads * state.levels[i].num_slots);
      inputs = std::max(inputs, level.span * level.byte_dim);
    }
    scratch.x.resize(dim);
    scratch.normed.resize(dim);
    scratch.qkv.resize(3 * dim);
    scratch.attended.resize(dim);
    scratch.hidden.resize(ffn_dim);
    scratch.active.resize(ffn_dim);
    scratch.scores.resize(scores);
    scratch.words.resize(inputs);
  }

  void step(int64_t byte) {
    state.patch_bytes[*state.position % model.patch_size] = byte;
    ++*state.position;
    if (*state.position % model.patch_size == 0) step_level(0);
    if (model.num_levels == 2) step_level(1);
    multiply(model.head, scratch.normed.data(), [&](int64_t row, float value) { state.logits[row] = value; });
  }

  // Runs the element of a level that begins at the position; leaves its output in `normed` and tells its children.
  void step_level(int64_t index) {
    const Level& level = model.levels[index];
    const LevelState& kept = state.levels[index];
    const bool is_top = index == 0;
    const int64_t in_row = *state.position / level.span % level.row_length;
    if (!is_top && in_row == 0) begin_row(level, kept);
    embed(level, is_top, in_row);
    add(level.row_positions, in_row, level.dim);
    add(kept.from_parent, in_row, level.dim);
    const bool has_memory = *state.position >= level.span * level.row_length;
    const Slots slots = {is_top || has_memory ? 0 : level.memory, level.memory + in_row};
    for (int64_t layer = 0; layer < level.num_layers; ++layer) {
      attend(level, level.blocks[layer], kept, layer, slots);
      feed_forward(level, level.blocks[layer]);
    }
    normalize(level.norm, scratch.x.data(), scratch.normed.data(), level.dim);
    if (index + 1 < model.num_levels) tell_children();
  }

  // x = what the level has read before this element: the previous element, or the pad.
  void embed(const Level& level, bool is_top, int64_t in_row) {
    float* x = scratch.x.data();
    if (!is_top && in_row == 0 && !model.real_previous) {
      std::memcpy(x, level.pad, level.dim * sizeof(float));
      return;
    }
    const int64_t first = *state.position - level.span;  // of the bytes of the previous element
    float* words = level.project.panels == nullptr ? x : scratch.words.data();
    for (int64_t i = 0; i < level.span; ++i) {
      const int64_t byte = state.patch_bytes[(first + i) % model.patch_size];
      float* word = words + i * level.byte_dim;
      std::memcpy(word, level.embedding + byte * level.byte_dim, level.byte_dim * sizeof(float));
      if (level.byte_positions == nullptr) continue;
      const float* position = level.byte_positions + (first + i) * level.byte_dim;
      for (int64_t c = 0; c < level.byte_dim; ++c) word[c] += position[c];
    }
    if (level.project.panels != nullptr) {
      multiply(level.project, words, [&](int64_t row, float value) { x[row] = value; });
    }
  }

  void add(const float* rows, int64_t row, int64_t dim) {
    if (rows == nullptr) return;
    for (int64_t i = 0; i < dim; ++i) scratch.x[i] += rows[row * dim + i];
  }

  // x += attention(norm(x))
  void attend(const Level& level, const Block& block, const LevelState& kept, int64_t layer, Slots slots) {
    float *x = scratch.x.data(), *qkv = scratch.qkv.data();
    normalize(block.attention_norm, x, scratch.normed.data(), level.dim);
    multiply(block.qkv, scratch.normed.data(), [&](int64_t row, float value) { qkv[row] = value; });
    for (int64_t head = 0; head < level.num_heads; ++head) attend_head(level, kept, layer, head, slots);
    multiply(block.out, scratch.attended.data(), [&](int64_t row, float value) { x[row] += value; });
  }

  void attend_head(const Level& level, const LevelState& kept, int64_t layer, int64_t head, Slots slots) {
    const int64_t C = level.head_dim, num_slots = slots.own + 1 - slots.first;
    const int64_t offset = (layer * level.num_heads + head) * kept.num_slots * C;
    const float* keys = kept.keys + offset + slots.first * C;
    const float* values = kept.values + offset + slots.first * C;
    const float* query = scratch.qkv.data() + head * C;
    float* own_key = kept.keys + offset + slots.own * C;
    float* turned_query = scratch.attended.data() + head * C;  // read before the result takes its place
    turn(level, slots.own, query, turned_query);
    turn(level, slots.own, query + level.dim, own_key);
    std::memcpy(kept.values + offset + slots.own * C, query + 2 * level.dim, C * sizeof(float));

    float* weights = scratch.scores.data() + head * kept.num_slots;
    const float scale = 1.0f / std::sqrt(float(C));
    for (int64_t s = 0; s < num_slots; ++s) weights[s] = scale * dot(turned_query, keys + s * C, C);
    const float total = softmax_weights(weights, num_slots);
    blend(values, weights, num_slots, 1.0f / total, scratch.attended.data() + head * C, C);
  }

  void turn(const Level& level, int64_t slot, const float* x, float* y) {
    const int64_t C = level.head_dim;
    if (level.cos == nullptr) {
      std::memcpy(y, x, C * sizeof(float));
    } else {
      rotate(x, level.cos + slot * C, level.sin + slot * C, y, C);
    }
  }

  // y = scale * sum of weights[s] * values[s]
  static void blend(const float* values, const float* weights, int64_t num_slots, float scale, float* y, int64_t C) {
    std::fill(y, y + C, 0.0f);
    int64_t s = 0;
    for (; s + 4 <= num_slots; s += 4) {
      const float *v = values + s * C, *w = weights + s;
      for (int64_t c = 0; c < C; ++c) {
        y[c] += (w[0] * v[c] + w[1] * v[C + c]) + (w[2] * v[2 * C + c] + w[3] * v[3 * C + c]);
      }
    }
    for (; s < num_slots; ++s) {
      for (int64_t c = 0; c < C; ++c) y[c] += weights[s] * values[s * C + c];
    }
    for (int64_t c = 0; c < C; ++c) y[c] *= scale;
  }

  // x += ffn_out(relu(ffn_in(norm(x))))
  void feed_forward(const Level& level, const Block& block) {
    float *x = scratch.x.data(), *hidden = scratch.hidden.data();
    normalize(block.ffn_norm, x, scratch.normed.data(), level.dim);
    int64_t num_active = 0;
    for (int64_t panel = 0; panel < num_panels(block.ffn_in); ++panel) {
      multiply_panel(block.ffn_in, panel, scratch.normed.data(), AllColumns{level.dim},
                     [&](int64_t row, float value) { hidden[row] = value > 0.0f ? value : 0.0f; });
      num_active = note_active(block.ffn_out, panel, num_active);
    }
    multiply(block.ffn_out, hidden, SomeColumns{num_active, scratch.active.data()},
             [&](int64_t row, float value) { x[row] += value; });
  }

  // Adds the rows of a panel that are not zero to the list of active columns of the next matrix.
  int64_t note_active(const Matrix& next, int64_t panel, int64_t num_active) {
    const int64_t first = panel * kPanelRows, end = std::min(first + kPanelRows, next.columns);
    const int64_t before = num_active;
    for (int64_t i = first; i < end; ++i) {
      scratch.active[num_active] = int32_t(i);
      num_active += scratch.hidden[i] != 0.0f;
    }
    for (int64_t i = before; i < num_active; ++i) prefetch_column(next, scratch.active[i]);
    return num_active;
  }

  void tell_children() {
    const Level& child = model.levels[1];
    float* words = state.levels[1].from_parent;
    const int64_t times = model.slices ? child.row_length : 1;
    for (int64_t i = 0; i < times; ++i) {
      const float* slice = scratch.normed.data() + i * model.unembedder.columns;
      multiply(model.unembedder, slice,
               [&](int64_t row, float value) { words[i * child.dim + row] = value; });
    }
  }

  // Moves the last elements of the finished row into the memory slots, with keys turned back by the row's length.
  static void begin_row(const Level& level, const LevelState& kept) {
    const int64_t C = level.head_dim, L = level.row_length;
    for (int64_t head = 0; head < level.num_layers * level.num_heads; ++head) {
      float *keys = kept.keys + head * kept.num_slots * C, *values = kept.values + head * kept.num_slots * C;
      std::memcpy(values, values + L * C, level.memory * C * sizeof(float));
      for (int64_t slot = 0; slot < level.memory; ++slot) {
        turn_back(level, keys + (L + slot) * C, keys + slot * C);
      }
    }
  }

  static void turn_back(const Level& level, const float* x, float* y) {
    const int64_t C = level.head_dim, half = C / 2;
    if (level.cos == nullptr) {
      std::memcpy(y, x, C * sizeof(float));
      return;
    }
    const float *cos = level.cos + level.row_length * C, *sin = level.sin + level.row_length * C;
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    for (int64_t i = half; i < C; ++i) y[i] = x[i] * cos[i] - x[i - half] * sin[i];
  }
};

}  // namespace

extern "C" {

Sequence* sequence_open(const Model* model, const State* state) {
  return new Sequence(*model, *state);
}

void sequence_close(Sequence* sequence) { delete sequence; }

void sequence_step(Sequence* sequence, int64_t byte) { sequence->step(byte); }

}  // extern "C"
