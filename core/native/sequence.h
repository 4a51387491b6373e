// What is done for one row alone, whichever rows step with it: its state, what is computed with, attention.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "model.h"
#include "vectors.h"

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
  Slots slots = {};  // of the element that is being run

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

  bool begins_patch() const { return *state.position % model.patch_size == 0; }

  void append(int64_t byte) {
    state.patch_bytes[*state.position % model.patch_size] = byte;
    ++*state.position;
  }

  // Wakes the element of a level that begins at the position; x = what the level has read before it, the previous element
  // or the pad. False if x is still to be projected from `words`.
  bool enter(int64_t index) {
    const Level& level = model.levels[index];
    const bool is_top = index == 0;
    const int64_t in_row = this->in_row(level);
    if (!is_top && in_row == 0 && *state.position > 0 && *state.woken != *state.position) begin_row(level, state.levels[index]);
    const bool has_memory = *state.position >= level.span * level.row_length;
    slots = {is_top || has_memory ? 0 : level.memory, level.memory + in_row};
    if (*state.position == 0 || (!is_top && in_row == 0 && !model.real_previous)) {
      std::memcpy(scratch.x.data(), level.pad, level.dim * sizeof(float));
      return true;
    }
    const bool is_whole = level.project.panels == nullptr;
    embed(level, is_whole ? scratch.x.data() : scratch.words.data());
    return is_whole;
  }

  // The bytes of the previous element.
  void embed(const Level& level, float* words) {
    const int64_t first = *state.position - level.span;
    for (int64_t i = 0; i < level.span; ++i) {
      const int64_t byte = state.patch_bytes[(first + i) % model.patch_size];
      float* word = words + i * level.byte_dim;
      std::memcpy(word, level.embedding + byte * level.byte_dim, level.byte_dim * sizeof(float));
      if (level.byte_positions == nullptr) continue;
      const float* position = level.byte_positions + (first + i) * level.byte_dim;
      for (int64_t c = 0; c < level.byte_dim; ++c) word[c] += position[c];
    }
  }

  // x += where the element is, and what its parent says.
  void place(int64_t index) {
    const Level& level = model.levels[index];
    add(level.row_positions, in_row(level), level.dim);
    add(state.levels[index].from_parent, in_row(level), level.dim);
    scratch.input = scratch.x;
  }

  int64_t in_row(const Level& level) const { return *state.position / level.span % level.row_length; }

  void add(const float* rows, int64_t row, int64_t dim) {
    if (rows == nullptr) return;
    for (int64_t i = 0; i < dim; ++i) scratch.x[i] += rows[row * dim + i];
  }

  void mix_in_input(const Level& level, int64_t layer) {
    if (level.residual_scalars == nullptr) return;
    const float a = level.residual_scalars[2 * layer], b = level.residual_scalars[2 * layer + 1];
    for (int64_t i = 0; i < level.dim; ++i) scratch.x[i] = a * scratch.x[i] + b * scratch.input[i];
  }

  void add_terms(int64_t dim) {
    for (int64_t c = 0; c < dim; ++c) scratch.x[c] += scratch.terms[0][c] + scratch.terms[1][c];
  }

  void normalize_x(const Norm& norm, int64_t dim) { normalize(norm, scratch.x.data(), scratch.normed.data(), dim); }

  void attend_head(const Level& level, const LevelState& kept, int64_t layer, int64_t head, float* query, float* key,
                   const float* value) {
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

  // Lists the hidden values that are not zero; their number.
  static int64_t note_active(const float* hidden, int64_t num_channels, int32_t* active) {
    int64_t n = 0;
    for (int64_t i = 0; i < num_channels; ++i) {
      active[n] = int32_t(i);
      n += hidden[i] != 0.0f;
    }
    return n;
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
