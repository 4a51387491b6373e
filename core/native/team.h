// Two threads for work of microseconds: the caller, and a helper that spins for jobs while bytes are being made.
//
// The helper is waited for only if it has taken a job. One that it has not taken when the caller is done with the other
// half is the caller's again, so a helper that sleeps, comes late or was put aside by the system costs nothing. Only
// being put aside in the middle of a job costs time; the helper then rests for some rounds, longer after every such
// stall, so a busy machine is soon left to one thread and tried again later.
//
// Every output is computed by one thread and in one order: who does what never changes a bit of it.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

class Team {
 public:
  explicit Team(bool has_helper) {
    if (!has_helper) return;
    try {
      helper_ = std::thread([this] { help(); });
    } catch (const std::system_error&) {
      // The system gives no thread: the caller works alone.
    }
  }

  ~Team() {
    if (!helper_.joinable()) return;
    set_wanted(false, true);
    helper_.join();
  }

  // Between begin and end the helper spins for jobs; one round makes a few bytes.
  void begin_round() {
    if (num_resting_ > 0) {
      --num_resting_;
    } else if (helper_.joinable()) {
      set_wanted(true, false);
    }
  }

  void end_round() {
    if (is_wanted_.exchange(false) && next_rest_ > 1) --next_rest_;
  }

  // Runs work(begin, end) over all of [0, count); `num_bytes` is what it reads, counted for each row.
  template <class Work>
  void share(int64_t count, int64_t num_bytes, Work work) {
    if (count < 2 || num_bytes < kWorthSharing || !is_spinning_.load(std::memory_order_acquire)) {
      work(int64_t(0), count);
      return;
    }
    const int64_t half = (count + 1) / 2;
    run_ = [](void* context, int64_t begin, int64_t end) { (*static_cast<Work*>(context))(begin, end); };
    context_ = &work;
    begin_ = half;
    end_ = count;
    job_.store(kOpen, std::memory_order_release);
    work(int64_t(0), half);
    if (claim(kDone)) {
      work(half, count);
    } else if (!spin_until([this] { return job_.load(std::memory_order_acquire) == kDone; }, longest_wait(num_bytes))) {
      sit_out_a_stall();
    }
  }

 private:
  using Microseconds = std::chrono::microseconds;
  enum { kDone, kOpen, kTaken };

  static constexpr int64_t kWorthSharing = 1 << 14;  // bytes; handing over takes as long as reading this much
  static constexpr Microseconds kStall{200};         // no small job takes so long unless its thread was put aside
  static constexpr int64_t kStallBytes = 1 << 14;    // and of a large one each microsecond has done so many
  static constexpr Microseconds kLinger{100};        // between two rounds; waking up takes longer
  static constexpr int64_t kLongestRest = 1024;      // rounds

  void help() {
    while (true) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return is_wanted_ || is_closing_; });
        if (is_closing_) return;
      }
      is_spinning_.store(true, std::memory_order_release);
      do {
        while (is_wanted_.load(std::memory_order_relaxed)) {
          take_job();
          pause();
        }
      } while (spin_until([this] { return is_wanted_.load(std::memory_order_relaxed); }, kLinger));
      is_spinning_.store(false, std::memory_order_release);
    }
  }

  void take_job() {
    if (!claim(kTaken)) return;
    run_(context_, begin_, end_);
    job_.store(kDone, std::memory_order_release);
  }

  static Microseconds longest_wait(int64_t num_bytes) { return kStall + Microseconds(num_bytes / 2 / kStallBytes); }

  // Only one side gets an open job.
  bool claim(int mine) {
    int expected = kOpen;
    return job_.load(std::memory_order_relaxed) == kOpen &&
           job_.compare_exchange_strong(expected, mine, std::memory_order_acquire);
  }

  void sit_out_a_stall() {
    is_wanted_ = false;
    is_spinning_.store(false, std::memory_order_release);  // for the caller, who shares nothing more in this round
    num_resting_ = next_rest_;
    next_rest_ = next_rest_ < kLongestRest ? 2 * next_rest_ : kLongestRest;
    while (job_.load(std::memory_order_acquire) != kDone) std::this_thread::yield();
  }

  void set_wanted(bool is_wanted, bool is_closing) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_wanted_ = is_wanted;
      is_closing_ = is_closing;
    }
    wake_.notify_one();
  }

  template <class Condition>
  static bool spin_until(Condition holds, Microseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
      for (int i = 0; i < 64; ++i) {
        if (holds()) return true;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // A job goes over in one cache line, and what one side writes while the other spins lies in another.
  alignas(64) std::atomic<int> job_{kDone};
  void (*run_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
  alignas(64) std::atomic<bool> is_wanted_{false};
  alignas(64) std::atomic<bool> is_spinning_{false};
  alignas(64) int64_t num_resting_ = 0, next_rest_ = 1;  // rounds
  bool is_closing_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread helper_;  // last: it uses all of the above
};
