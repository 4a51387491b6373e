// The bytes of one row of a MegaByte: what `MegaByte.step` and the sampler do, without an operator call per matrix; and what
// many rows draw from logits made elsewhere.
//
// With one row every weight is read once per byte and used once, so the time is the time to read the weights. They are
// bf16 here (the exported models are, so nothing is lost) or int8; everything that is computed is float32.
//
// The decoding state is the caller's `core.cache.Cache`, read and written in place: Python may run any step instead.
// Halves of a block, and panels of the other matrices, are shared between two threads (team.h). Several sequences may be worked
// on in parallel.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "functions.h"
#include "law.h"
#include "model.h"
#include "team.h"
#include "vectors.h"

namespace {

// Columns whose inputs are zero, as most are behind a ReLU, can be left out. Leaping from column to column is slower than
// walking past all of them, so that is done if fewer than one in so many is left.
constexpr int64_t kSparse = 3;

// After a stall the helper is left out until the end of the round.
constexpr int64_t kRoundBytes = 16;

// Where a step writes its key and value, and from which slot on it reads.
struct Slots {
  int64_t first, own;
};

struct Scratch {
  std::vector<float> x, input, normed, qkv, attended, hidden, scores, words, terms[2];
  std::vector<int32_t> active;
};

struct Sequence {
  const Model& model;
  State state;
  Scratch scratch;
  Team team;

  Sequence(const Model& model, const State& state, bool has_helper) : model(model), state(state), team(has_helper) {
    int64_t dim = 0, ffn_dim = 0, scores = 0, inputs = 0;
    for (int64_t i = 0; i < model.num_levels; ++i) {
      const Level& level = model.levels[i];
      dim = std::max(dim, level.dim);
      ffn_dim = std::max(ffn_dim, level.ffn_dim);
      scores = std::max(scores, level.num_heads * state.levels[i].num_slots);
      inputs = std::max(inputs, level.span * level.byte_dim);
    }
    scratch.x.resize(dim);
    for (auto& term : scratch.terms) term.resize(dim);
    scratch.input.resize(dim);
    scratch.normed.resize(dim);
    scratch.qkv.resize(3 * dim);
    scratch.attended.resize(dim);
    scratch.hidden.resize(ffn_dim);
    scratch.active.resize(ffn_dim);
    scratch.scores.resize(scores);
    scratch.words.resize(inputs);
  }

  // Takes the first `num_forced` of the bytes as given and draws the others; `bits` is the surprisal of each.
  void draw_bytes(int64_t count, int64_t num_forced, const Law& law, const double* uniforms, int64_t* bytes, float* bits) {
    for (int64_t i = 0; i < count; ++i) {
      if (i % kRoundBytes == 0) team.begin_round();
      predict();
      if (i >= num_forced) bytes[i] = -1;
      bits[i] = choose(state.logits, law, uniforms[i], bytes[i]);
      append(bytes[i]);
      if (i % kRoundBytes == kRoundBytes - 1 || i == count - 1) team.end_round();
    }
  }

  void append(int64_t byte) {
    state.patch_bytes[*state.position % model.patch_size] = byte;
    ++*state.position;
  }

  // The logits of the next byte.
  void predict() {
    if (*state.position % model.patch_size == 0) step_level(0);
    if (model.num_levels == 2) step_level(1);
    *state.woken = *state.position;
    float* logits = state.logits;
    product(model.head, scratch.normed.data(), [=](int64_t row, float value) { logits[row] = value; });
    cap_softly(logits, kNumByteValues, float(model.logit_softcap));
  }

  // W x by both threads.
  template <class Emit>
  void product(const Matrix& matrix, const float* x, Emit emit) {
    team.share(num_panels(matrix), num_bytes(matrix), [&](int64_t begin, int64_t end) {
      multiply(matrix, begin, end, x, AllColumns{matrix.columns}, emit);
    });
  }

  // x += what the halves of a block make of it, each by its own thread.
  template <class Work>
  void add_halves(const Block& block, int64_t dim, int64_t num_bytes, Work work) {
    team.share(2, num_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(block.halves[i], scratch.terms[i].data());
    });
    for (int64_t c = 0; c < dim; ++c) scratch.x[c] += scratch.terms[0][c] + scratch.terms[1][c];
  }

  // Runs the element of a level that begins at the position; leaves its output in `normed` and tells its children.
  void step_level(int64_t index) {
    const Level& level = model.levels[index];
    const LevelState& kept = state.levels[index];
    const bool is_top = index == 0;
    const int64_t in_row = *state.position / level.span % level.row_length;
    if (!is_top && in_row == 0 && *state.position > 0 && *state.woken != *state.position) begin_row(level, kept);
    embed(level, is_top, in_row);
    add(level.row_positions, in_row, level.dim);
    add(kept.from_parent, in_row, level.dim);
    const bool has_memory = *state.position >= level.span * level.row_length;
    const Slots slots = {is_top || has_memory ? 0 : level.memory, level.memory + in_row};
    scratch.input = scratch.x;
    for (int64_t layer = 0; layer < level.num_layers; ++layer) {
      mix_in_input(level, layer);
      attend(level, level.blocks[layer], kept, layer, slots);
      feed_forward(level, level.blocks[layer]);
    }
    normalize(level.norm, scratch.x.data(), scratch.normed.data(), level.dim);
    if (index + 1 < model.num_levels) tell_children();
  }

  // x = what the level has read before this element: the previous element, or the pad.
  void embed(const Level& level, bool is_top, int64_t in_row) {
    float* x = scratch.x.data();
    if (*state.position == 0 || (!is_top && in_row == 0 && !model.real_previous)) {
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
      product(level.project, words, [=](int64_t row, float value) { x[row] = value; });
    }
  }

  void add(const float* rows, int64_t row, int64_t dim) {
    if (rows == nullptr) return;
    for (int64_t i = 0; i < dim; ++i) scratch.x[i] += rows[row * dim + i];
  }

  void mix_in_input(const Level& level, int64_t layer) {
    if (level.residual_scalars == nullptr) return;
    const float a = level.residual_scalars[2 * layer], b = level.residual_scalars[2 * layer + 1];
    for (int64_t i = 0; i < level.dim; ++i) scratch.x[i] = a * scratch.x[i] + b * scratch.input[i];
  }

  // x += attention(norm(x))
  void attend(const Level& level, const Block& block, const LevelState& kept, int64_t layer, Slots slots) {
    normalize(block.attention_norm, scratch.x.data(), scratch.normed.data(), level.dim);
    const int64_t num_read = num_bytes(block.halves[0].qkv) + num_bytes(block.halves[0].out);
    add_halves(block, level.dim, 2 * num_read, [&](const Half& half, float* term) {
      const int64_t C = level.head_dim, width = half.num_heads * C;
      float *qkv = scratch.qkv.data() + 3 * half.first_head * C, *attended = scratch.attended.data() + half.first_head * C;
      multiply(half.qkv, scratch.normed.data(), [=](int64_t row, float value) { qkv[row] = value; });
      for (int64_t i = 0; i < half.num_heads; ++i) {
        float* query = qkv + i * C;
        attend_head(level, kept, layer, half.first_head + i, slots, query, query + width, query + 2 * width);
      }
      multiply(half.out, attended, [=](int64_t row, float value) { term[row] = value; });
    });
  }

  void attend_head(const Level& level, const LevelState& kept, int64_t layer, int64_t head, Slots slots, float* query,
                   float* key, const float* value) {
    const int64_t C = level.head_dim, num_slots = slots.own + 1 - slots.first;
    const int64_t offset = (layer * level.num_heads + head) * kept.num_slots * C;
    const float* keys = kept.keys + offset + slots.first * C;
    const float* values = kept.values + offset + slots.first * C;
    float* turned_query = scratch.attended.data() + head * C;  // read before the result takes its place
    if (model.qk_epsilon != 0) {
      normalize_rms(query, C, float(model.qk_epsilon));
      normalize_rms(key, C, float(model.qk_epsilon));
    }
    turn(level, slots.own, query, turned_query);
    turn(level, slots.own, key, kept.keys + offset + slots.own * C);
    std::memcpy(kept.values + offset + slots.own * C, value, C * sizeof(float));

    float* weights = scratch.scores.data() + head * kept.num_slots;
    const float scale = 1.0f / std::sqrt(float(C));
    for (int64_t s = 0; s < num_slots; ++s) weights[s] = scale * dot(turned_query, keys + s * C, C);
    const float total = softmax_weights(weights, num_slots);
    blend(values, weights, num_slots, C, 1.0f / total, turned_query);
  }

  void turn(const Level& level, int64_t slot, const float* x, float* y) {
    const int64_t C = level.head_dim;
    if (level.cos == nullptr) {
      std::memcpy(y, x, C * sizeof(float));
    } else {
      rotate(x, level.cos + slot * C, level.sin + slot * C, y, C);
    }
  }

  // x += ffn_out(activation(ffn_in(norm(x))))
  void feed_forward(const Level& level, const Block& block) {
    normalize(block.ffn_norm, scratch.x.data(), scratch.normed.data(), level.dim);
    const int64_t num_read = num_bytes(block.halves[0].ffn_in) + num_bytes(block.halves[0].ffn_out);
    add_halves(block, level.dim, 2 * num_read, [&](const Half& half, float* term) {
      float* hidden = scratch.hidden.data() + half.first_channel;
      const bool relu_squared = model.relu_squared;
      multiply(half.ffn_in, scratch.normed.data(), [=](int64_t row, float value) {
        const float positive = value > 0.0f ? value : 0.0f;
        hidden[row] = relu_squared ? positive * positive : positive;
      });
      const auto set_term = [=](int64_t row, float value) { term[row] = value; };
      int32_t* active = scratch.active.data() + half.first_channel;
      const int64_t num_channels = half.ffn_in.rows, num_active = note_active(hidden, num_channels, active);
      if (num_active * kSparse < num_channels) {
        multiply(half.ffn_out, 0, num_panels(half.ffn_out), hidden, SomeColumns{num_active, active}, set_term);
      } else {
        multiply(half.ffn_out, hidden, set_term);
      }
    });
  }

  // Lists the hidden values that are not zero; their number.
  static int64_t note_active(const float* hidden, int64_t num_channels, int32_t* active) {
    int64_t n = 0;
    for (int64_t i = 0; i < num_channels; ++i) {
      active[n] = int32_t(i);
      n += hidden[i] != 0.0f;
    }
    return n;
  }

  void tell_children() {
    const Level& child = model.levels[1];
    const Matrix& matrix = model.unembedder;
    float* words = state.levels[1].from_parent;
    const int64_t times = model.slices ? child.row_length : 1;
    team.share(num_panels(matrix), times * num_bytes(matrix), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < times; ++i) {
        float* word = words + i * child.dim;
        const auto set_word = [=](int64_t row, float value) { word[row] = value; };
        multiply(matrix, begin, end, scratch.normed.data() + i * matrix.columns, AllColumns{matrix.columns}, set_word);
      }
    });
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

// Floats in a vector; 0 on an x86 processor with neither AVX-512 nor AVX2, which leaves the work to torch.
int64_t num_lanes() {
#if defined(__x86_64__) && !defined(__AVX2__)
  return 0;
#else
  return kLanes;
#endif
}

// Null if there is no memory for it.
Sequence* sequence_open(const Model* model, const State* state, int64_t has_helper) {
  try {
    return new Sequence(*model, *state, has_helper != 0);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void sequence_close(Sequence* sequence) { delete sequence; }

void sequence_step(Sequence* sequence, int64_t byte) {
  sequence->append(byte);
  sequence->predict();
}

void sequence_draw(Sequence* sequence, int64_t count, int64_t num_forced, const Law* law, const double* uniforms,
                   int64_t* bytes, float* bits) {
  sequence->draw_bytes(count, num_forced, *law, uniforms, bytes, bits);
}

// One byte of each row from its logits, by its own law; bytes that are not negative are taken as given.
void draw_rows(int64_t num_rows, const float* logits, const double* temperatures, const int64_t* top_ks, const double* top_ps,
               const double* uniforms, int64_t* bytes, float* bits) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const Law law = {temperatures[row], top_ks[row], top_ps[row]};
    bits[row] = choose(logits + row * kNumByteValues, law, uniforms[row], bytes[row]);
  }
}

}  // extern "C"
