// The bytes of one or several rows of a MegaByte: what `MegaByte.step` and the sampler do, without an operator call per matrix;
// and what many rows draw from logits made elsewhere.
//
// With one row every weight is read once per byte and used once, so the time is the time to read the weights. They are
// bf16 here (the exported models are, so nothing is lost) or int8; everything that is computed is float32. Several rows
// step together: a weight comes from memory once for all of them, and every row has the bits that it has alone.
//
// The decoding state is the caller's `core.cache.Cache`, read and written in place: Python may run any step instead.
// Halves of a block, and panels of the other matrices, are shared between two threads (team.h). Several groups of rows may be
// worked on in parallel.

#include <cstdint>
#include <cstring>
#include <new>

#include "functions.h"
#include "law.h"
#include "model.h"
#include "sequence.h"
#include "team.h"
#include "vectors.h"

namespace {

// Columns whose inputs are zero, as most are behind a ReLU, can be left out. Leaping from column to column is slower than
// walking past all of them, so that is done if fewer than one in so many is left.
constexpr int64_t kSparse = 3;

// After a stall the helper is left out until the end of the round.
constexpr int64_t kRoundBytes = 16;

// Drawing a byte takes about as long as reading so many from memory.
constexpr int64_t kWorkOfDrawing = 1 << 14;

// At most as many as are worked on together. In cache lines of its own: one thread reads it while the other writes beside it.
template <class T>
struct alignas(64) Some {
  int64_t count = 0;
  T each[kMostOperands];

  void add(T one) { each[count++] = one; }
  const T* begin() const { return each; }
  const T* end() const { return each + count; }
};

// What is to be made of one sequence: the first `num_forced` of the bytes are given, the others are drawn. Mirrored field by
// field in structures.py.
struct Part {
  Sequence* sequence;
  int64_t count, num_forced;
  Law law;
  const double* uniforms;  // (count)
  int64_t* bytes;          // (count)
  float* bits;             // (count), the surprisal of each byte
};

using Rows = Some<Sequence*>;

float* normed(Sequence& row) { return row.scratch.normed.data(); }

template <class In>
Operands operands(const Matrix& matrix, const Rows& rows, In x_of) {
  Operands xs;
  for (Sequence* row : rows) xs.add(matrix, x_of(*row));
  return xs;
}

template <class Out>
Some<float*> outputs(const Rows& rows, Out y_of) {
  Some<float*> ys;
  for (Sequence* row : rows) ys.add(y_of(*row));
  return ys;
}

// Keeps the products.
template <class Out>
auto into(const Rows& rows, Out y_of) {
  return [ys = outputs(rows, y_of)](int64_t n, int64_t first, const float* values, int64_t count) {
    std::memcpy(ys.each[n] + first, values, count * sizeof(float));
  };
}

// Some rows of one model, and the threads that work on them. Elements of several rows are run together: every product walks
// through its matrix once for all rows.
class Group {
 public:
  Group(Team& team, const Model& model) : team_(team), model_(model) {}

  void draw(Part* parts, int64_t count) {
    int64_t done[kMostOperands] = {};
    for (int64_t step = 0;; ++step) {
      Some<int64_t> moving = next_to_move(parts, done, count);
      if (moving.count == 0) break;
      if (step % kRoundBytes == 0) team_.begin_round();
      Rows rows;
      for (int64_t n : moving) rows.add(parts[n].sequence);
      predict(rows);
      const int64_t work = moving.count * kWorkOfDrawing;
      team_.share(moving.count, work, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) draw_byte(parts[moving.each[i]], done[moving.each[i]]);
      });
      for (int64_t n : moving) ++done[n];
      if (step % kRoundBytes == kRoundBytes - 1) team_.end_round();
    }
    team_.end_round();
  }

  // The logits of the next byte of each row.
  void predict(const Rows& rows) {
    Rows beginning;
    for (Sequence* row : rows) {
      if (row->begins_patch()) beginning.add(row);
    }
    if (beginning.count > 0) step_level(0, beginning);
    if (model_.num_levels == 2) step_level(1, rows);
    for (Sequence* row : rows) *row->state.woken = *row->state.position;
    product(model_.head, rows, normed, [](Sequence& row) { return row.state.logits; });
    for (Sequence* row : rows) cap_softly(row->state.logits, kNumByteValues, float(model_.logit_softcap));
  }

 private:
  // The rows that stand inside a patch go first, until all can begin a patch together.
  static Some<int64_t> next_to_move(const Part* parts, const int64_t* done, int64_t count) {
    Some<int64_t> inside, all;
    for (int64_t n = 0; n < count; ++n) {
      if (done[n] == parts[n].count) continue;
      all.add(n);
      if (!parts[n].sequence->begins_patch()) inside.add(n);
    }
    return inside.count > 0 ? inside : all;
  }

  static void draw_byte(Part& part, int64_t i) {
    Sequence& row = *part.sequence;
    if (i >= part.num_forced) part.bytes[i] = -1;
    part.bits[i] = choose(row.state.logits, part.law, part.uniforms[i], part.bytes[i]);
    row.append(part.bytes[i]);
  }

  // Runs the element of a level that begins at each row's position; leaves its output in `normed` and tells its children.
  void step_level(int64_t index, const Rows& rows) {
    const Level& level = model_.levels[index];
    Rows to_project;
    for (Sequence* row : rows) {
      if (!row->enter(index)) to_project.add(row);
    }
    if (to_project.count > 0) {
      product(level.project, to_project, [](Sequence& row) { return row.scratch.words.data(); },
              [](Sequence& row) { return row.scratch.x.data(); });
    }
    for (Sequence* row : rows) row->place(index);
    for (int64_t layer = 0; layer < level.num_layers; ++layer) {
      for (Sequence* row : rows) row->mix_in_input(level, layer);
      attend(index, layer, rows);
      feed_forward(level, level.blocks[layer], rows);
    }
    for (Sequence* row : rows) row->normalize_x(level.norm, level.dim);
    if (index + 1 < model_.num_levels) tell_children(rows);
  }

  // y = W x of every row, by both threads.
  template <class In, class Out>
  void product(const Matrix& matrix, const Rows& rows, In x_of, Out y_of) {
    team_.share(num_panels(matrix), rows.count * num_bytes(matrix), [&](int64_t begin, int64_t end) {
      multiply(matrix, begin, end, operands(matrix, rows, x_of), into(rows, y_of));
    });
  }

  // x += what the halves of a block make of it, each by its own thread.
  template <class Work>
  void add_halves(const Level& level, const Block& block, const Rows& rows, int64_t num_bytes, Work work) {
    team_.share(2, rows.count * num_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        work(block.halves[i], [i](Sequence& row) { return row.scratch.terms[i].data(); });
      }
    });
    for (Sequence* row : rows) row->add_terms(level.dim);
  }

  // x += attention(norm(x))
  void attend(int64_t index, int64_t layer, const Rows& rows) {
    const Level& level = model_.levels[index];
    const Block& block = level.blocks[layer];
    for (Sequence* row : rows) row->normalize_x(block.attention_norm, level.dim);
    const int64_t num_read = num_bytes(block.halves[0].qkv) + num_bytes(block.halves[0].out);
    add_halves(level, block, rows, 2 * num_read, [&, index, layer](const Half& half, auto term_of) {
      const int64_t C = level.head_dim, width = half.num_heads * C;
      const auto qkv_of = [&](Sequence& row) { return row.scratch.qkv.data() + 3 * half.first_head * C; };
      const auto attended_of = [&](Sequence& row) { return row.scratch.attended.data() + half.first_head * C; };
      multiply(half.qkv, operands(half.qkv, rows, normed), into(rows, qkv_of));
      for (Sequence* row : rows) {
        for (int64_t i = 0; i < half.num_heads; ++i) {
          float* query = qkv_of(*row) + i * C;
          row->attend_head(level, row->state.levels[index], layer, half.first_head + i, query, query + width, query + 2 * width);
        }
      }
      multiply(half.out, operands(half.out, rows, attended_of), into(rows, term_of));
    });
  }

  // x += ffn_out(activation(ffn_in(norm(x))))
  void feed_forward(const Level& level, const Block& block, const Rows& rows) {
    for (Sequence* row : rows) row->normalize_x(block.ffn_norm, level.dim);
    const int64_t num_read = num_bytes(block.halves[0].ffn_in) + num_bytes(block.halves[0].ffn_out);
    add_halves(level, block, rows, 2 * num_read, [&](const Half& half, auto term_of) {
      const bool relu_squared = model_.relu_squared;
      const auto hidden_of = [&](Sequence& row) { return row.scratch.hidden.data() + half.first_channel; };
      const Some<float*> hiddens = outputs(rows, hidden_of);
      const auto activate = [&](int64_t n, int64_t first, const float* values, int64_t count) {
        float* hidden = hiddens.each[n] + first;
        for (int64_t i = 0; i < count; ++i) {
          const float positive = values[i] > 0.0f ? values[i] : 0.0f;
          hidden[i] = relu_squared ? positive * positive : positive;
        }
      };
      multiply(half.ffn_in, operands(half.ffn_in, rows, normed), activate);
      Operands activated;
      for (Sequence* row : rows) {
        const float* hidden = hidden_of(*row);
        int32_t* active = row->scratch.active.data() + half.first_channel;
        const int64_t num_channels = half.ffn_in.rows, num_active = Sequence::note_active(hidden, num_channels, active);
        if (num_active * kSparse < num_channels) {
          activated.add(half.ffn_out, hidden, num_active, active);
        } else {
          activated.add(half.ffn_out, hidden);
        }
      }
      multiply(half.ffn_out, activated, into(rows, term_of));
    });
  }

  void tell_children(const Rows& rows) {
    const Level& child = model_.levels[1];
    const Matrix& matrix = model_.unembedder;
    const int64_t times = model_.slices ? child.row_length : 1;
    team_.share(num_panels(matrix), times * rows.count * num_bytes(matrix), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < times; ++i) {
        const auto slice_of = [&](Sequence& row) { return normed(row) + i * matrix.columns; };
        const auto word_of = [&](Sequence& row) { return row.state.levels[1].from_parent + i * child.dim; };
        multiply(matrix, begin, end, operands(matrix, rows, slice_of), into(rows, word_of));
      }
    });
  }

  Team& team_;
  const Model& model_;
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
Sequence* sequence_open(const Model* model, const State* state) {
  try {
    return new Sequence(*model, *state);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void sequence_close(Sequence* sequence) { delete sequence; }

// Appends a byte and predicts the next, by this thread alone.
void sequence_step(Sequence* sequence, int64_t byte) {
  Team alone(false);
  Rows row;
  row.add(sequence);
  sequence->append(byte);
  Group(alone, sequence->model).predict(row);
}

// Null if there is no memory for it; without a helper if the system gives no thread.
Team* team_open(int64_t has_helper) {
  try {
    return new Team(has_helper != 0);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void team_close(Team* team) { delete team; }

// Draws bytes of up to `most_parts()` different sequences of one model together.
void team_draw(Team* team, Part* parts, int64_t count) { Group(*team, parts[0].sequence->model).draw(parts, count); }

int64_t most_parts() { return kMostOperands; }

// One byte of each row from its logits, by its own law; bytes that are not negative are taken as given.
void draw_rows(int64_t num_rows, const float* logits, const double* temperatures, const int64_t* top_ks, const double* top_ps,
               const double* uniforms, int64_t* bytes, float* bits) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const Law law = {temperatures[row], top_ks[row], top_ps[row]};
    bits[row] = choose(logits + row * kNumByteValues, law, uniforms[row], bytes[row]);
  }
}

}  // extern "C"
