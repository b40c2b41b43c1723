// Qwen3-VL's vision tower.
#pragma once

#include "attention.h"
#include "layers.h"

extern "C" {

struct TowerLayer {
  const float *norm1, *norm1_bias, *qkv, *qkv_bias, *out, *out_bias;
  const float *norm2, *norm2_bias, *up, *up_bias, *down, *down_bias;
};

struct Merger {
  const float *norm, *norm_bias, *up, *up_bias, *down, *down_bias;
  long normed;  // numbers that are normalised together: a patch's, or those of a token's patches
};

struct TowerModel {
  long layers, mergers, inputs, hidden, heads, head_dim, intermediate;
  long merged, out;  // numbers of a token, before and after a merger
  float epsilon, scale;
  const float *embed, *embed_bias;
  const TowerLayer* layer;
  const Merger* merger;
};

struct TowerCall {
  long threads, number, patches, pictures;
  float* x;                        // (patches, hidden), in place
  const float *cosines, *sines;    // (patches, head_dim)
  const int* starts;               // (pictures + 1): patches look at those of their own
};

struct EmbedCall {
  long threads, patches;
  const float *pixels, *places;  // (patches, inputs); (patches, hidden)
  float* y;                      // (patches, hidden)
};

struct MergerCall {
  long threads, number, patches;
  const float* x;  // (patches, hidden)
  float* y;        // (tokens, out)
};

}  // extern "C"

class Tower {
 public:
  Tower(Team& team, const TowerModel& model)
      : team_(team),
        m_(model),
        layers_(model.layer, model.layer + model.layers),
        mergers_(model.merger, model.merger + model.mergers) {}

  void embed(const EmbedCall& call) {
    Team::Shift shift(team_, call.threads);
    multiply(team_, call.pixels, call.patches, m_.inputs, m_.embed, m_.hidden,
             [&](long r, long column, long count, const float* sums) {
               const float* place = call.places + r * m_.hidden + column;
               float* y = call.y + r * m_.hidden + column;
               for (long i = 0; i < count; i++)
                 y[i] = sums[i] + m_.embed_bias[column + i] + place[i];
             });
  }

  void layer(const TowerCall& call) {
    Team::Shift shift(team_, call.threads);
    call_ = &call;
    const TowerLayer& layer = layers_[call.number];
    grow(h_, call.patches * m_.hidden);
    grow(qkv_, call.patches * 3 * m_.hidden);
    grow(inner_, call.patches * m_.intermediate);
    normalise(layer.norm1, layer.norm1_bias);
    linear(h_.data(), call.patches, m_.hidden, layer.qkv, layer.qkv_bias, qkv_.data(),
           3 * m_.hidden);
    attention();
    add(h_.data(), m_.hidden, layer.out, layer.out_bias);
    normalise(layer.norm2, layer.norm2_bias);
    activated<gelu>(call.patches, m_.hidden, layer.up, layer.up_bias, m_.intermediate);
    add(inner_.data(), m_.intermediate, layer.down, layer.down_bias);
  }

  void merge(const MergerCall& call) {
    Team::Shift shift(team_, call.threads);
    const Merger& merger = mergers_[call.number];
    const long size = call.patches * m_.hidden, tokens = size / m_.merged;
    grow(h_, size), grow(inner_, size);
    for_rows(team_, size / merger.normed, [&](long r) {
      layer_norm(call.x + r * merger.normed, merger.normed, merger.norm, merger.norm_bias,
                 m_.epsilon, &h_[r * merger.normed]);
    });
    activated<exact_gelu>(tokens, m_.merged, merger.up, merger.up_bias, m_.merged);
    linear(inner_.data(), tokens, m_.merged, merger.down, merger.down_bias, call.y, m_.out);
  }

 private:
  struct Part {
    long head, first, count, length, packed;  // patches; the picture's; where its keys begin
  };

  // To at least that; what grows again and again would be zeroed each time.
  static void grow(std::vector<float>& v, long size) {
    if (long(v.size()) < size) v.resize(size);
  }

  // y (rows, columns): x (rows, inputs) times a weight, and a bias.
  void linear(const float* x, long rows, long inputs, const float* w, const float* bias, float* y,
              long columns) {
    multiply(team_, x, rows, inputs, w, columns,
             [&](long r, long column, long count, const float* sums) {
               float* to = y + r * columns + column;
               for (long i = 0; i < count; i++) to[i] = sums[i] + bias[column + i];
             });
  }

  // inner_ (rows, columns): the same of h_, and an activation; columns are a multiple of LANES.
  template <Vector (*activation)(Vector)>
  void activated(long rows, long inputs, const float* w, const float* bias, long columns) {
    multiply(team_, h_.data(), rows, inputs, w, columns,
             [&](long r, long column, long count, const float* sums) {
               float* to = &inner_[r * columns + column];
               for (long i = 0; i < count; i += LANES)
                 store(to + i, activation(load(sums + i) + load(bias + column + i)));
             });
  }

  void normalise(const float* weight, const float* bias) {
    for_rows(team_, call_->patches, [&](long r) {
      layer_norm(call_->x + r * m_.hidden, m_.hidden, weight, bias, m_.epsilon,
                 &h_[r * m_.hidden]);
    });
  }

  // To x, y times a weight.
  void add(const float* y, long inputs, const float* w, const float* bias) {
    multiply(team_, y, call_->patches, inputs, w, m_.hidden,
             [&](long r, long column, long count, const float* sums) {
               float* x = call_->x + r * m_.hidden + column;
               for (long i = 0; i < count; i++) x[i] += sums[i] + bias[column + i];
             });
  }

  // Of each picture and head: keys in blocks, values in rows of a multiple of LANES.
  void attention() {
    const long size = m_.head_dim, row = 3 * m_.hidden;
    const long wide = (size + LANES - 1) / LANES * LANES;
    blocks_.clear(), parts_.clear();
    long packed = 0;
    for (long p = 0; p < call_->pictures; p++) {
      const long start = call_->starts[p], length = call_->starts[p + 1] - start;
      for (long head = 0; head < m_.heads; head++) {
        for (long k = 0; k < length; k += BLOCK)
          blocks_.push_back({head, start + k, std::min<long>(BLOCK, length - k), length,
                             packed + k});
        for (long q = 0; q < length; q += QUERIES)
          parts_.push_back({head, start + q, std::min<long>(QUERIES, length - q), length, packed});
        packed += (length + BLOCK - 1) / BLOCK * BLOCK;
      }
    }
    keys_.resize(packed * size), values_.resize(packed * wide);
    team_.share(blocks_.size(), [&](long b) { pack(blocks_[b], wide); });
    team_.share(parts_.size(), [&](long p) {
      const Part& part = parts_[p];
      Attention attend{size, &keys_[part.packed * size], &values_[part.packed * wide], wide, wide,
                       part.length, m_.scale};
      attend(&qkv_[part.first * row + part.head * size], row, part.count, part.length,
             &h_[part.first * m_.hidden + part.head * size], m_.hidden);
    });
  }

  void pack(const Part& block, long wide) {
    const long size = m_.head_dim, half = size / 2, row = 3 * m_.hidden;
    float* q = &qkv_[block.first * row + block.head * size];
    for (long t = 0; t < block.count; t++) {
      const float* cosines = call_->cosines + (block.first + t) * size;
      const float* sines = call_->sines + (block.first + t) * size;
      rotate(q + t * row, half, cosines, sines);
      rotate(q + m_.hidden + t * row, half, cosines, sines);
      float* value = &values_[(block.packed + t) * wide];
      std::fill(std::copy_n(q + 2 * m_.hidden + t * row, size, value), value + wide, 0.0f);
    }
    transpose(q + m_.hidden, row, block.count, size, &keys_[block.packed * size]);
  }

  Team& team_;
  const TowerModel m_;
  const std::vector<TowerLayer> layers_;
  const std::vector<Merger> mergers_;
  const TowerCall* call_ = nullptr;
  std::vector<Part> blocks_, parts_;  // of keys; of queries
  std::vector<float> h_, qkv_, inner_, keys_, values_;
};
