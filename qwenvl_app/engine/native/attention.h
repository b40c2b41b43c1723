// Attention of queries to keys and values.
#pragma once

#include "kernels.h"

constexpr int QUERIES = 8 * TILE;  // of a part
constexpr int KEYS = 4 * BLOCK;    // whose weights are at hand at once
constexpr int WIDEST = 128;        // a head

// Copies a block of keys (up to BLOCK, size) to where ``product`` takes it: (size, BLOCK), zeros
// behind the last.
static inline void transpose(const float* keys, long key_row, long count, long size, float* to) {
  for (long i = 0; i < size; i++)
    for (long t = 0; t < BLOCK; t++) to[i * BLOCK + t] = t < count ? keys[t * key_row + i] : 0;
}

// One query of PARTS * LANES to ``length`` keys; scores has room for that many and LANES more.
template <int PARTS>
static void attend_in_parts(const float* q, const float* keys, const float* values, long length,
                            float scale, float* scores, float* out) {
  constexpr long size = PARTS * LANES;
  Vector query[PARTS], mixed[PARTS] = {}, totals = {};
  for (int p = 0; p < PARTS; p++) query[p] = load(q + p * LANES) * scale;
  float most = -INFINITY;
  for (long t = 0; t < length; t++) {
    Vector dot = query[0] * load(keys + t * size);
    for (int p = 1; p < PARTS; p++) dot += query[p] * load(keys + t * size + p * LANES);
    scores[t] = sum(dot);
    most = std::max(most, scores[t]);
  }
  std::fill(scores + length, scores + length + LANES, -INFINITY);
  for (long t = 0; t < length; t += LANES) store(scores + t, exponential(load(scores + t) - most));
  std::fill(scores + length, scores + length + LANES, 0.0f);
  for (long t = 0; t < length; t += LANES) totals += load(scores + t);
  for (long t = 0; t < length; t++)
    for (int p = 0; p < PARTS; p++) mixed[p] += load(values + t * size + p * LANES) * scores[t];
  float factor = 1 / sum(totals);
  for (int p = 0; p < PARTS; p++) store(out + p * LANES, mixed[p] * factor);
}

static void attend(long size, const float* q, const float* keys, const float* values, long length,
                   float scale, float* scores, float* out) {
  switch (size / LANES) {
    case 1: return attend_in_parts<1>(q, keys, values, length, scale, scores, out);
    case 2: return attend_in_parts<2>(q, keys, values, length, scale, scores, out);
    case 4: return attend_in_parts<4>(q, keys, values, length, scale, scores, out);
    case 8: return attend_in_parts<8>(q, keys, values, length, scale, scores, out);
    case 16: return attend_in_parts<16>(q, keys, values, length, scale, scores, out);
  }
}

// Up to QUERIES queries, some keys at a time, as FlashAttention does it (arXiv 2205.14135).
struct Attention {
  long size;         // of a head
  const float* keys;  // in blocks: ``transpose``
  const float* values;
  long value_row, value_size;  // a multiple of LANES
  long length;                 // of keys and values
  float scale;

  // ``first``: the keys that the first query looks at; each sees one more. Or ``length``: all.
  void operator()(const float* q, long q_row, long count, long first, float* out,
                  long out_row) const {
    float scores[QUERIES * KEYS], mixed[QUERIES * WIDEST];
    float most[QUERIES], totals[QUERIES];
    std::fill(most, most + count, -INFINITY);
    std::fill(totals, totals + count, 0.0f);
    std::fill(mixed, mixed + count * value_size, 0.0f);
    const long end = std::min(length, first + count - 1);
    for (long k = 0; k < end; k += KEYS) {
      const long here = std::min<long>(KEYS, end - k);
      for (long b = 0; b < here; b += BLOCK)
        product(q, q_row, count, size, keys + (k + b) * size, BLOCK, BLOCK, scores + b, KEYS);
      for (long r = 0; r < count; r++) {
        const long seen = std::min(here, first + r - k);
        weigh(scores + r * KEYS, here, seen, most[r], totals[r], mixed + r * value_size);
      }
      product(scores, KEYS, count, here, values + k * value_row, value_row, value_size, mixed,
              value_size, true);
    }
    for (long r = 0; r < count; r++)
      for (long i = 0; i < size; i++) out[r * out_row + i] = mixed[r * value_size + i] / totals[r];
  }

 private:
  // Scores to weights relative to the highest so far; those after ``seen`` are 0.
  void weigh(float* scores, long here, long seen, float& most, float& total, float* mixed) const {
    const long padded = (here + LANES - 1) / LANES * LANES;
    seen = std::max(seen, 0L);
    std::fill(scores + seen, scores + padded, -INFINITY);
    Vector highest = all(-INFINITY);
    for (long t = 0; t < padded; t += LANES) {
      Vector v = load(scores + t) * scale;
      highest = v > highest ? v : highest;
    }
    float now = most;
    for (int i = 0; i < LANES; i++) now = std::max(now, highest[i]);
    const float factor = std::exp(most - now);
    most = now;
    Vector totals = {};
    for (long t = 0; t < padded; t += LANES) {
      Vector weights = exponential(load(scores + t) * scale - now);
      totals += weights;
      store(scores + t, weights);
    }
    // What lies after ``seen`` is next to nothing, not nothing.
    std::fill(scores + seen, scores + padded, 0.0f);
    total = total * factor + sum(totals);
    for (long i = 0; i < value_size; i += LANES) store(mixed + i, load(mixed + i) * factor);
  }
};
