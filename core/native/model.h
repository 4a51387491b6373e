// What Python hands over: weights, and the buffers of a cache. Mirrored field by field in structures.py.

#pragma once

#include <cstdint>

extern "C" {

struct Matrix {
  const uint32_t* panels;  // null if the model has no such matrix
  const float* scales;     // of the rows of an int8 matrix; null for bf16
  const float* bias;       // null for none
  int64_t rows, columns;
};

struct Norm {
  const float *weight, *bias;
  double epsilon;
};

// What one of two threads does of a block: some heads and hidden channels, from reading x to their terms of the sums that
// are added to x.
struct Half {
  int64_t first_head, num_heads, first_channel;
  Matrix qkv, out;  // rows: the heads' queries, keys and values; columns: what they attended to
  Matrix ffn_in, ffn_out;
};

struct Block {
  Norm attention_norm, ffn_norm;
  Half halves[2];
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
  const float* residual_scalars;  // (num_layers, 2), if layers mix in the level's input
  Norm norm;
};

struct Model {
  const Level* levels;
  int64_t num_levels;
  int64_t patch_size;
  int64_t real_previous;
  int64_t slices;     // the unembedder maps one slice per child
  int64_t relu_squared;
  double qk_epsilon;     // of the norm of queries and keys; 0 without
  double logit_softcap;  // 0 for none
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
  int64_t* woken;        // the position last predicted from
  float* logits;         // (256), of the next byte
};

}  // extern "C"
