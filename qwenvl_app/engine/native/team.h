// Threads that share work: whoever is free takes the next part, so that one which the system lets
// wait holds up no more than the part that it has.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

constexpr int SPINS = 4000;  // before a thread sleeps: some 50 microseconds

static inline void relax() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  explicit Team(int threads) {
    for (int t = 1; t < threads; t++) helpers_.emplace_back([this, t] { help(t); });
  }

  ~Team() {
    ended_ = true;
    begin(0);
    for (auto& helper : helpers_) helper.join();
  }

  // While one lives so many threads, the caller's included, wait for parts without sleeping.
  class Shift {
   public:
    Shift(Team& team, int threads) : team_(team) {
      if (threads > 1 && !team.helpers_.empty()) team.begin(threads);
    }
    ~Shift() { team_.on_ = 0; }

   private:
    Team& team_;
  };

  // Calls ``part(i)`` for each i below ``parts``, in any order, and returns after the last.
  template <class Part>
  void share(long parts, const Part& part) {
    if (!on_ || parts < 2) {
      for (long i = 0; i < parts; i++) part(i);
      return;
    }
    call_ = [](const void* part, long i) { (*static_cast<const Part*>(part))(i); };
    part_ = &part;
    done_.store(0, std::memory_order_relaxed);
    left_.store(parts, std::memory_order_release);
    long mine = 0;
    while (take()) mine++;
    long others = parts - mine;
    for (int i = 0; i < SPINS; i++, relax())
      if (done_.load(std::memory_order_acquire) == others) return;
    for (long done; (done = done_.load(std::memory_order_acquire)) != others;) done_.wait(done);
  }

 private:
  void begin(int threads) {
    on_ = threads;
    turn_++;
    turn_.notify_all();
  }

  // One part, if there is one left. What it is does not change before all of them are done.
  bool take() {
    long left = left_.load(std::memory_order_acquire);
    while (left > 0)
      if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
        call_(part_, left - 1);
        return true;
      }
    return false;
  }

  void help(int number) {
    for (int seen = 0; !ended_; seen = turn_) {
      while (number < on_) {
        if (take()) {
          done_.fetch_add(1, std::memory_order_release);
          done_.notify_one();
        } else {
          relax();
        }
      }
      turn_.wait(seen);
    }
  }

  std::atomic<long> left_{0}, done_{0};
  std::atomic<int> turn_{0}, on_{0};  // on_: threads that are at work
  std::atomic<bool> ended_{false};
  void (*call_)(const void*, long) = nullptr;
  const void* part_ = nullptr;
  std::vector<std::thread> helpers_;  // last: they use all of the above
};
