// Qwen's dense language model.
#pragma once

#include "attention.h"
#include "layers.h"

extern "C" {

struct TextLayer {
  const float *before_attention, *qkv, *qkv_bias, *q_norm, *k_norm, *out;  // bias, q, k: or null
  const float *before_mlp, *gate_up, *down;  // a block of gate, then the same of up
};

struct TextModel {
  long layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
  float epsilon, scale;
  const float *norm, *head, *frequencies;  // frequencies: of half a head
  const long* axes;                        // of those, which position turns it
  const TextLayer* layer;
};

struct Chunk {
  long slot, start, width;  // tokens of a slot from a place on
};

// Tokens of some slots, those of each side by side.
struct TextCall {
  long threads, tokens, chunks, images, length;  // of the cache: (slots, kv_heads, length, head_dim)
  float* x;                            // (tokens, hidden): embeddings
  const long* positions;               // (tokens, 3)
  const Chunk* chunk;
  float* const* keys;  // of each layer
  float* const* values;
  const long* image;               // of each token, its row in what follows, or -1
  const float* const* deepstack;   // (..., hidden), to be added after so many first layers
  float* logits;                   // (chunks, vocabulary): after the last token of each
};

}  // extern "C"

class Text {
 public:
  Text(Team& team, const TextModel& model)
      : team_(team), m_(model), layers_(model.layer, model.layer + model.layers) {}

  void forward(const TextCall& call) {
    Team::Shift shift(team_, call.threads);
    call_ = &call;
    const long tokens = call.tokens, hidden = m_.hidden, intermediate = m_.intermediate;
    h_.resize(tokens * hidden);
    qkv_.resize(tokens * all());
    attended_.resize(tokens * width(m_.heads));
    inner_.resize(tokens * intermediate);
    plan();
    for (long l = 0; l < m_.layers; l++) {
      const TextLayer& layer = layers_[l];
      normalise(layer.before_attention);
      multiply(team_, h_.data(), tokens, hidden, layer.qkv, all(),
               [&](long r, long column, long count, const float* sums) {
                 float* y = std::copy_n(sums, count, &qkv_[r * all() + column]) - count;
                 for (long i = 0; layer.qkv_bias && i < count; i++)
                   y[i] += layer.qkv_bias[column + i];
               });
      for_rows(team_, tokens, [&](long r) { place(r, layer, call.keys[l], call.values[l]); });
      attention(call.keys[l], call.values[l]);
      add(attended_.data(), width(m_.heads), layer.out);
      normalise(layer.before_mlp);
      gate_and_up(layer.gate_up);
      add(inner_.data(), intermediate, layer.down);
      if (l < call.images) add_images(call.deepstack[l]);
    }
    logits();
  }

 private:
  struct Part {
    const Chunk* chunk;
    long token, head, first, count;  // the chunk's first token; queries
    long packed;                     // where the chunk's keys begin
  };

  long width(long heads) const { return heads * m_.head_dim; }
  long all() const { return width(m_.heads + 2 * m_.kv_heads); }

  // Who has which slot and place, what turns heads there, and the parts that attention has.
  void plan() {
    const long half = m_.head_dim / 2, tokens = call_->tokens;
    places_.clear(), single_.clear(), many_.clear(), blocks_.clear();
    long token = 0, packed = 0;
    for (long s = 0; s < call_->chunks; token += call_->chunk[s++].width) {
      const Chunk& chunk = call_->chunk[s];
      for (long i = 0; i < chunk.width; i++) places_.push_back({chunk.slot, chunk.start + i, 1});
      if (chunk.width == 1) {
        for (long g = 0; g < m_.kv_heads; g++) single_.push_back({&chunk, token, g, 0, 1, 0});
        continue;
      }
      const long length = chunk.start + chunk.width, padded = (length + BLOCK - 1) / BLOCK * BLOCK;
      for (long g = 0; g < m_.kv_heads; g++) {
        for (long k = 0; k < length; k += BLOCK)
          blocks_.push_back({&chunk, token, g, k, std::min<long>(BLOCK, length - k), packed});
        packed += padded * m_.head_dim;
      }
      packed -= m_.kv_heads * padded * m_.head_dim;
      for (long head = 0; head < m_.heads; head++)
        for (long q = 0; q < chunk.width; q += QUERIES)
          many_.push_back({&chunk, token, head, q, std::min<long>(QUERIES, chunk.width - q),
                           packed + head / group() * padded * m_.head_dim});
      packed += m_.kv_heads * padded * m_.head_dim;
    }
    packed_.resize(packed);
    cosines_.resize(tokens * half), sines_.resize(tokens * half);
    for_rows(team_, tokens, [&](long r) {
      for (long i = 0; i < half; i++) {
        float angle = call_->positions[3 * r + m_.axes[i]] * m_.frequencies[i];
        cosines_[r * half + i] = std::cos(angle), sines_[r * half + i] = std::sin(angle);
      }
    });
  }

  long group() const { return m_.heads / m_.kv_heads; }

  void normalise(const float* weight) {
    for_rows(team_, call_->tokens, [&](long r) {
      rms_norm(call_->x + r * m_.hidden, m_.hidden, weight, m_.epsilon, &h_[r * m_.hidden]);
    });
  }

  // To x, y times a weight.
  void add(const float* y, long inputs, const float* w) {
    multiply(team_, y, call_->tokens, inputs, w, m_.hidden,
             [&](long r, long column, long count, const float* sums) {
               float* x = call_->x + r * m_.hidden + column;
               for (long i = 0; i < count; i++) x[i] += sums[i];
             });
  }

  // A token's queries, keys and values are turned; the cache has them then.
  void place(long r, const TextLayer& layer, float* keys, float* values) {
    const long size = m_.head_dim, half = size / 2;
    const float *cosines = &cosines_[r * half], *sines = &sines_[r * half];
    float* q = &qkv_[r * all()];
    for (long head = 0; head < m_.heads + m_.kv_heads; head++, q += size) {
      const float* norm = head < m_.heads ? layer.q_norm : layer.k_norm;
      if (norm) rms_norm(q, size, norm, m_.epsilon, q);
      rotate(q, half, cosines, sines);
    }
    const float* k = &qkv_[r * all() + width(m_.heads)];
    const Chunk& place = places_[r];
    for (long g = 0; g < m_.kv_heads; g++, k += size) {
      const long to = ((place.slot * m_.kv_heads + g) * call_->length + place.start) * size;
      std::copy_n(k, size, keys + to);
      std::copy_n(k + width(m_.kv_heads), size, values + to);
    }
  }

  void attention(const float* keys, const float* values) {
    const long size = m_.head_dim;
    auto offset = [&](const Part& part, long g) {
      return (part.chunk->slot * m_.kv_heads + g) * call_->length * size;
    };
    team_.share(single_.size(), [&](long p) {
      const Part& part = single_[p];
      const long length = part.chunk->start + 1, from = offset(part, part.head);
      scores_of_thread().resize(length + LANES);
      for (long head = part.head * group(); head < (part.head + 1) * group(); head++)
        attend(size, &qkv_[part.token * all() + head * size], keys + from, values + from, length,
               m_.scale, scores_of_thread().data(),
               &attended_[part.token * width(m_.heads) + head * size]);
    });
    team_.share(blocks_.size(), [&](long p) {
      const Part& part = blocks_[p];
      transpose(keys + offset(part, part.head) + part.first * size, size, part.count, size,
                &packed_[part.packed + part.first * size]);
    });
    team_.share(many_.size(), [&](long p) {
      const Part& part = many_[p];
      const long from = offset(part, part.head / group()), token = part.token + part.first;
      Attention attend{size, &packed_[part.packed], values + from, size, size,
                       part.chunk->start + part.chunk->width, m_.scale};
      attend(&qkv_[token * all() + part.head * size], all(), part.count,
             part.chunk->start + part.first + 1,
             &attended_[token * width(m_.heads) + part.head * size], width(m_.heads));
    });
  }

  static std::vector<float>& scores_of_thread() {
    static thread_local std::vector<float> scores;
    return scores;
  }

  void gate_and_up(const float* w) {
    const long inputs = m_.hidden, rows = call_->tokens, blocks = m_.intermediate / BLOCK;
    const long panels = (rows + PANEL - 1) / PANEL;
    team_.share(panels * blocks, [&](long part) {
      float gate[PANEL * BLOCK], up[PANEL * BLOCK];
      const long first = part / blocks * PANEL, b = part % blocks;
      const long count = std::min<long>(PANEL, rows - first);
      const float *x = &h_[first * inputs], *from = w + 2 * b * BLOCK * inputs;
      product(x, inputs, count, inputs, from, BLOCK, BLOCK, gate, BLOCK);
      product(x, inputs, count, inputs, from + BLOCK * inputs, BLOCK, BLOCK, up, BLOCK);
      for (long r = 0; r < count; r++)
        for (long i = 0; i < BLOCK; i += LANES)
          store(&inner_[(first + r) * m_.intermediate + b * BLOCK + i],
                silu(load(gate + r * BLOCK + i)) * load(up + r * BLOCK + i));
    });
  }

  // DeepStack: to the tokens of pictures, what the tower's earlier layers made of them.
  void add_images(const float* features) {
    for_rows(team_, call_->tokens, [&](long r) {
      if (call_->image[r] < 0) return;
      const float* from = features + call_->image[r] * m_.hidden;
      for (long i = 0; i < m_.hidden; i++) call_->x[r * m_.hidden + i] += from[i];
    });
  }

  void logits() {
    long end = 0;
    for (long s = 0; s < call_->chunks; s++) {
      end += call_->chunk[s].width;
      rms_norm(call_->x + (end - 1) * m_.hidden, m_.hidden, m_.norm, m_.epsilon,
               &h_[s * m_.hidden]);
    }
    multiply(team_, h_.data(), call_->chunks, m_.hidden, m_.head, m_.vocabulary,
             [&](long r, long column, long count, const float* sums) {
               std::copy_n(sums, count, call_->logits + r * m_.vocabulary + column);
             });
  }

  Team& team_;
  const TextModel m_;
  const std::vector<TextLayer> layers_;
  const TextCall* call_ = nullptr;
  std::vector<Chunk> places_;
  std::vector<Part> single_, many_, blocks_;  // of one query; of many; of their keys
  std::vector<float> h_, qkv_, attended_, inner_, packed_, cosines_, sines_;
};
