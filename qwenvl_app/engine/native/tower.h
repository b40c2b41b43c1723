// The layers of Qwen3-VL's vision tower, and what makes tokens of its patches.
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
  long layers, mergers, inputs, hidden, heads, head_dim, intermediate, merged, out;  // merged: of
  float epsilon, scale;                                                               // a token
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
    h_.resize(call.patches * m_.hidden);
    qkv_.resize(call.patches * 3 * m_.hidden);
    inner_.resize(call.patches * m_.intermediate);
    normalise(layer.norm1, layer.norm1_bias);
    multiply(team_, h_.data(), call.patches, m_.hidden, layer.qkv, 3 * m_.hidden,
             [&](long r, long column, long count, const float* sums) {
               float* y = &qkv_[r * 3 * m_.hidden + column];
               for (long i = 0; i < count; i++) y[i] = sums[i] + layer.qkv_bias[column + i];
             });
    attention();
    add(h_.data(), m_.hidden, layer.out, layer.out_bias);
    normalise(layer.norm2, layer.norm2_bias);
    multiply(team_, h_.data(), call.patches, m_.hidden, layer.up, m_.intermediate,
             [&](long r, long column, long count, const float* sums) {
               float* y = &inner_[r * m_.intermediate + column];
               for (long i = 0; i < count; i += LANES)
                 store(y + i, gelu(load(sums + i) + load(layer.up_bias + column + i)));
             });
    add(inner_.data(), m_.intermediate, layer.down, layer.down_bias);
  }

  void merge(const MergerCall& call) {
    Team::Shift shift(team_, call.threads);
    const Merger& merger = mergers_[call.number];
    const long size = call.patches * m_.hidden, tokens = size / m_.merged;
    h_.resize(size), inner_.resize(size);
    for_rows(team_, size / merger.normed, [&](long r) {
      layer_norm(call.x + r * merger.normed, merger.normed, merger.norm, merger.norm_bias,
                 m_.epsilon, &h_[r * merger.normed]);
    });
    multiply(team_, h_.data(), tokens, m_.merged, merger.up, m_.merged,
             [&](long r, long column, long count, const float* sums) {
               float* y = &inner_[r * m_.merged + column];
               for (long i = 0; i < count; i += LANES)
                 store(y + i, exact_gelu(load(sums + i) + load(merger.up_bias + column + i)));
             });
    multiply(team_, inner_.data(), tokens, m_.merged, merger.down, m_.out,
             [&](long r, long column, long count, const float* sums) {
               float* y = call.y + r * m_.out + column;
               for (long i = 0; i < count; i++) y[i] = sums[i] + merger.down_bias[column + i];
             });
  }

 private:
  struct Part {
    long head, first, count, length, packed;  // patches; the picture's; where its keys begin
  };

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
