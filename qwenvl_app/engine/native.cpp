// A decode step of Qwen's dense text model in float32, without an interpreter: see native.py.
//
// All of a step is one call: embedding, layers, logits. What takes the time is to read the weights,
// so they lie as they are read: in blocks of BLOCK columns, (columns / BLOCK, inputs, BLOCK). Every
// thread has its share of the blocks; they meet after each product.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, TILE = 4;  // TILE: rows whose sums stay in registers
#else
constexpr int LANES = 8, TILE = 2;
#endif
constexpr int BLOCK = 4 * LANES;
constexpr int SPINS = 2000;  // before a thread sleeps: some 20 microseconds

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int Integers __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

static inline void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

static inline float sum(Vector v) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  Half h = halves[0] + halves[1];
  float total = 0;
  for (int i = 0; i < LANES / 2; i++) total += h[i];
  return total;
}

// e to the x, to some 2 units in the last place, as Cephes' expf does it; 0 far below.
static inline Vector exponential(Vector x) {
  Vector low = Vector{} - 87.0f, high = Vector{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  Vector scaled = x * 1.44269504f;
  Vector half = scaled < 0 ? Vector{} - 0.5f : Vector{} + 0.5f;
  Integers n = __builtin_convertvector(scaled + half, Integers);
  Vector whole = __builtin_convertvector(n, Vector);
  Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Integers bits = (n + 127) << 23;
  Vector power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Where threads meet. Between two products a sleep would take longer than the wait.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), missing_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    int turn = turn_.load();
    if (--missing_ == 0) {
      missing_ = threads_;
      turn_++;
      turn_.notify_all();
      return;
    }
    for (int i = 0; i < SPINS; i++) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
    turn_.wait(turn);
  }

 private:
  const int threads_;
  std::atomic<int> missing_, turn_{0};
};

extern "C" {

struct Layer {
  const float *before_attention, *qkv, *qkv_bias, *q_norm, *k_norm, *out;  // bias, q, k: or null
  const float *before_mlp, *gate_up, *down;  // a block of gate, then the same of up
};

struct Model {
  long layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
  float epsilon, scale;
  const float *embedding, *norm, *head, *frequencies;  // of half a head
  const Layer* layer;
};

struct Call {
  long rows, length;  // of the cache: (slots, kv_heads, length, head_dim), a pointer for each layer
  const long *ids, *positions, *starts;
  float* const* keys;
  float* const* values;
  float* logits;  // (rows, vocabulary)
};

}  // extern "C"

// A share of ``count`` for one of ``threads``.
struct Share {
  Share(long count, int thread, int threads)
      : first(count * thread / threads), last(count * (thread + 1) / threads) {}
  const long first, last;
};

template <int ROWS>
static void tile(const float* x, long inputs, const float* w, float* y) {
  Vector sums[ROWS][4] = {};
  for (long i = 0; i < inputs; i++, w += BLOCK) {
    __builtin_prefetch(w + 16 * BLOCK);
    for (int c = 0; c < 4; c++) {
      Vector v = load(w + c * LANES);
      for (int r = 0; r < ROWS; r++) sums[r][c] += v * x[r * inputs + i];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < 4; c++) store(y + r * BLOCK + c * LANES, sums[r][c]);
}

// x (rows, inputs) times a block of a weight (inputs, BLOCK): y (rows, BLOCK).
static void product(const float* x, long rows, long inputs, const float* w, float* y) {
  for (; rows > 0; rows -= TILE, x += TILE * inputs, y += TILE * BLOCK) {
    switch (std::min<long>(TILE, rows)) {
      case 1: tile<1>(x, inputs, w, y); break;
      case 2: tile<2>(x, inputs, w, y); break;
      case 3: tile<3>(x, inputs, w, y); break;
      default: tile<4>(x, inputs, w, y);
    }
  }
}

// RMSNorm of each row of x (rows, size); y may be x.
static void normalise(const float* x, long rows, long size, const float* weight, float epsilon,
                      float* y) {
  for (; rows--; x += size, y += size) {
    Vector squares = {};
    for (long i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1 / std::sqrt(sum(squares) / size + epsilon);
    for (long i = 0; i < size; i += LANES) store(y + i, load(x + i) * factor * load(weight + i));
  }
}

// Rotary position embedding of one head, in place.
static void rotate(float* x, long half, const float* cosines, const float* sines) {
  for (long i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

// One head's attention to ``length`` keys and values; scores has room for that many and LANES more.
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
  for (long t = 0; t < length; t += LANES) {
    Vector weights = exponential(load(scores + t) - most);
    store(scores + t, weights);
  }
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

class Decoder {
 public:
  Decoder(const Model& model, int threads)
      : m_(model),
        layers_(model.layer, model.layer + model.layers),
        threads_(threads),
        barrier_(threads) {
    for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
  }

  ~Decoder() {
    call_ = nullptr;
    begin();
    for (auto& worker : workers_) worker.join();
  }

  void decode(const Call& call) {
    call_ = &call;
    long rows = call.rows;
    x_.resize(rows * m_.hidden);
    qkv_.resize(rows * width(m_.heads + 2 * m_.kv_heads));
    attended_.resize(rows * width(m_.heads));
    inner_.resize(rows * m_.intermediate);
    begin();
    step(0);
  }

 private:
  long width(long heads) const { return heads * m_.head_dim; }

  void begin() {
    started_++;
    started_.notify_all();
  }

  void work(int thread) {
    for (int seen = 0;; seen++) {
      for (int i = 0; i < SPINS && started_.load(std::memory_order_acquire) == seen; i++) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      }
      started_.wait(seen);
      if (!call_) return;
      step(thread);
    }
  }

  // x (rows, inputs) times w, for this thread's blocks: ``write`` (row, first column, how many,
  // the sums) is called for each block.
  template <class Write>
  void multiply(int thread, const float* x, long inputs, const float* w, long columns,
                Write write) {
    long rows = call_->rows;
    std::vector<float> sums(rows * BLOCK);
    Share share((columns + BLOCK - 1) / BLOCK, thread, threads_);
    for (long b = share.first; b < share.last; b++) {
      product(x, rows, inputs, w + b * BLOCK * inputs, sums.data());
      long count = std::min<long>(BLOCK, columns - b * BLOCK);
      for (long r = 0; r < rows; r++) write(r, b * BLOCK, count, &sums[r * BLOCK]);
    }
  }

  void step(int thread) {
    const long rows = call_->rows, hidden = m_.hidden, all = width(m_.heads + 2 * m_.kv_heads);
    std::vector<float> h(rows * hidden);
    auto add_to_x = [&](long r, long column, long count, const float* sums) {
      float* x = &x_[r * hidden + column];
      for (long i = 0; i < count; i++) x[i] += sums[i];
    };
    if (thread == 0)
      for (long r = 0; r < rows; r++)
        std::copy_n(m_.embedding + call_->ids[r] * hidden, hidden, &x_[r * hidden]);
    barrier_.wait();
    for (long l = 0; l < m_.layers; l++) {
      const Layer& layer = layers_[l];
      normalise(x_.data(), rows, hidden, layer.before_attention, m_.epsilon, h.data());
      auto add_bias = [&](long r, long column, long count, const float* sums) {
        float* y = std::copy_n(sums, count, &qkv_[r * all + column]) - count;
        for (long i = 0; layer.qkv_bias && i < count; i++) y[i] += layer.qkv_bias[column + i];
      };
      multiply(thread, h.data(), hidden, layer.qkv, all, add_bias);
      barrier_.wait();
      attention(thread, layer, call_->keys[l], call_->values[l]);
      barrier_.wait();
      multiply(thread, attended_.data(), width(m_.heads), layer.out, hidden, add_to_x);
      barrier_.wait();
      normalise(x_.data(), rows, hidden, layer.before_mlp, m_.epsilon, h.data());
      gate_and_up(thread, h.data(), layer.gate_up);
      barrier_.wait();
      multiply(thread, inner_.data(), m_.intermediate, layer.down, hidden, add_to_x);
      barrier_.wait();
    }
    normalise(x_.data(), rows, hidden, m_.norm, m_.epsilon, h.data());
    auto copy = [&](long r, long column, long count, const float* sums) {
      std::copy_n(sums, count, call_->logits + r * m_.vocabulary + column);
    };
    multiply(thread, h.data(), hidden, m_.head, m_.vocabulary, copy);
    barrier_.wait();
  }

  void attention(int thread, const Layer& layer, float* keys, float* values) {
    const long size = m_.head_dim, half = size / 2, group = m_.heads / m_.kv_heads;
    const long all = width(m_.heads + 2 * m_.kv_heads);
    std::vector<float> cosines(half), sines(half), scores(call_->length + LANES);
    Share share(call_->rows * m_.kv_heads, thread, threads_);
    for (long each = share.first, turned = -1; each < share.last; each++) {
      const long r = each / m_.kv_heads, g = each % m_.kv_heads, start = call_->starts[r];
      if (r != turned) {
        for (long i = 0; i < half; i++) {
          float angle = call_->positions[r] * m_.frequencies[i];
          cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
        }
        turned = r;
      }
      float* q = &qkv_[r * all + g * group * size];
      float* k = &qkv_[r * all + width(m_.heads + g)];
      const float* v = k + width(m_.kv_heads);
      if (layer.q_norm) normalise(q, group, size, layer.q_norm, m_.epsilon, q);
      if (layer.k_norm) normalise(k, 1, size, layer.k_norm, m_.epsilon, k);
      rotate(k, half, cosines.data(), sines.data());
      float* key = keys + each * call_->length * size;
      float* value = values + each * call_->length * size;
      std::copy_n(k, size, key + start * size);
      std::copy_n(v, size, value + start * size);
      for (long head = 0; head < group; head++) {
        rotate(q + head * size, half, cosines.data(), sines.data());
        float* out = &attended_[r * width(m_.heads) + (g * group + head) * size];
        attend(size, q + head * size, key, value, start + 1, m_.scale, scores.data(), out);
      }
    }
  }

  void gate_and_up(int thread, const float* h, const float* w) {
    const long rows = call_->rows, inputs = m_.hidden;
    std::vector<float> gate(rows * BLOCK), up(rows * BLOCK);
    Share share(m_.intermediate / BLOCK, thread, threads_);
    for (long b = share.first; b < share.last; b++) {
      product(h, rows, inputs, w + 2 * b * BLOCK * inputs, gate.data());
      product(h, rows, inputs, w + (2 * b + 1) * BLOCK * inputs, up.data());
      for (long i = 0; i < rows * BLOCK; i += LANES) {
        Vector g = load(&gate[i]);
        float* to = &inner_[i / BLOCK * m_.intermediate + b * BLOCK + i % BLOCK];
        store(to, g / (exponential(-g) + 1.0f) * load(&up[i]));
      }
    }
  }

  const Model m_;
  const std::vector<Layer> layers_;
  const int threads_;
  Barrier barrier_;
  std::atomic<int> started_{0};
  const Call* call_ = nullptr;
  std::vector<float> x_, qkv_, attended_, inner_;
  std::vector<std::thread> workers_;  // last: they use all of the above
};

extern "C" {

int block() { return BLOCK; }

void* create(const Model* model, int threads) { return new Decoder(*model, threads); }

void decode(void* decoder, const Call* call) { static_cast<Decoder*>(decoder)->decode(*call); }

void destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }
}
