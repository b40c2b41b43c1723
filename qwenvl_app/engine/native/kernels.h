// Arithmetic of a few registers: vectors, products of some rows, norms, activations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16, TILE = 6;  // TILE: rows whose sums stay in registers
#else
constexpr int LANES = 8, TILE = 2;
#endif
constexpr int BLOCK = 4 * LANES;  // columns of a weight that lie together
constexpr int DEPTH = 512;        // inputs of a block that are read while they are in a cache

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int Integers __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

static inline void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

static inline Vector all(float x) { return Vector{} + x; }

static inline float sum(Vector v) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  Half h = halves[0] + halves[1];
  float total = 0;
  for (int i = 0; i < LANES / 2; i++) total += h[i];
  return total;
}

// e to the x, to some 2 units in the last place, as Cephes' expf does it; 0 far below. Adding MAGIC
// rounds to a whole number, which stands in the lowest bits then.
static inline Vector exponential(Vector x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  Vector shifted = x * 1.44269504f + MAGIC;
  Vector whole = shifted - MAGIC;
  Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Integers bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vector power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

static inline Vector silu(Vector x) { return x / (exponential(-x) + 1.0f); }

// GELU's approximation by tanh, which is x times the logistic function of twice its argument.
static inline Vector gelu(Vector x) {
  return x / (exponential(x * (x * x * 0.044715f + 1.0f) * -1.5957691216f) + 1.0f);
}

// GELU itself, by the error function (Abramowitz and Stegun, 7.1.26, to 1.5e-7).
static inline Vector exact_gelu(Vector x) {
  const Vector z = (x < all(0) ? -x : x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
  Vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector outside = x * p * t * exponential(-z * z) * 0.5f;
  return x < all(0) ? outside : x - outside;
}

// ROWS of x times COLUMNS vectors of w; ``add``: to what y has.
template <int ROWS, int COLUMNS>
static inline void tile(const float* x, long x_row, long inputs, const float* w, long w_row,
                        float* y, long y_row, bool add) {
  Vector sums[ROWS][COLUMNS] = {};
  for (long i = 0; i < inputs; i++, w += w_row) {
    __builtin_prefetch(w + 16 * w_row);
    for (int c = 0; c < COLUMNS; c++) {
      Vector v = load(w + c * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sums[r][c] += v * x[r * x_row + i];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) {
      float* to = y + r * y_row + c * LANES;
      store(to, add ? load(to) + sums[r][c] : sums[r][c]);
    }
}

template <int COLUMNS>
static void product_of(const float* x, long x_row, long rows, long inputs, const float* w,
                       long w_row, float* y, long y_row, bool add) {
  for (; rows > 0; rows -= TILE, x += TILE * x_row, y += TILE * y_row) {
    switch (std::min<long>(TILE, rows)) {
      case 1: tile<1, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add); break;
      case 2: tile<2, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add); break;
      case 3: tile<3, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add); break;
      case 4: tile<4, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add); break;
      case 5: tile<5, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add); break;
      default: tile<6, COLUMNS>(x, x_row, inputs, w, w_row, y, y_row, add);
    }
  }
}

// x (rows, inputs) times w (inputs, columns), columns a multiple of LANES: y (rows, columns).
// ``_row``: from one row to the next.
static void product(const float* x, long x_row, long rows, long inputs, const float* w, long w_row,
                    long columns, float* y, long y_row, bool add = false) {
  for (long c = 0; c < columns; c += BLOCK) {
    for (long i = 0; i < inputs; i += DEPTH) {
      const long depth = std::min<long>(DEPTH, inputs - i);
      const float *from = x + i, *of = w + i * w_row + c;
      const bool more = add || i > 0;
      switch (std::min<long>(BLOCK, columns - c) / LANES) {
        case 1: product_of<1>(from, x_row, rows, depth, of, w_row, y + c, y_row, more); break;
        case 2: product_of<2>(from, x_row, rows, depth, of, w_row, y + c, y_row, more); break;
        case 3: product_of<3>(from, x_row, rows, depth, of, w_row, y + c, y_row, more); break;
        default: product_of<4>(from, x_row, rows, depth, of, w_row, y + c, y_row, more);
      }
    }
  }
}

// RMSNorm of a row, whose size is a multiple of LANES; y may be x.
static void rms_norm(const float* x, long size, const float* weight, float epsilon, float* y) {
  Vector squares = {};
  for (long i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
  float factor = 1 / std::sqrt(sum(squares) / size + epsilon);
  for (long i = 0; i < size; i += LANES) store(y + i, load(x + i) * factor * load(weight + i));
}

// LayerNorm of a row, likewise.
static void layer_norm(const float* x, long size, const float* weight, const float* bias,
                       float epsilon, float* y) {
  Vector total = {}, squares = {};
  for (long i = 0; i < size; i += LANES) total += load(x + i);
  float mean = sum(total) / size;
  for (long i = 0; i < size; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
  float factor = 1 / std::sqrt(sum(squares) / size + epsilon);
  for (long i = 0; i < size; i += LANES)
    store(y + i, (load(x + i) - mean) * factor * load(weight + i) + load(bias + i));
}

// Rotary position embedding of one head, in place; cosines and sines of half a head.
static inline void rotate(float* x, long half, const float* cosines, const float* sines) {
  for (long i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}
