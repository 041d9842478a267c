#include "team.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include <ATen/Parallel.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace ldalign::cpu {
namespace {

// How often a thread looks at what it waits for before it does again what another is at, and before it sleeps: some 25
// and 70 microseconds. The first is what a piece takes; to fall asleep and be woken costs as much as the second.
constexpr int kLooks = 1000, kLooksAwake = 3000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Whether ready() was true in one of so many looks.
template <class Ready>
bool look(int times, const Ready& ready) {
  for (; times > 0; --times) {
    if (ready()) return true;
    pause();
  }
  return false;
}

// The threads of this process beside the caller's. They are never taken down: at the end of the process they sleep.
class Team {
 public:
  // False, and nothing done, where another thread has the team.
  bool run(Region& region) {
    if (busy_.exchange(true)) return false;
    grow(region.threads - 1);
    region_ = &region;
    number_ = number_ + 1;
    open_ = true;
    wake();
    Member member(region, 0);
    std::exception_ptr error;
    try {
      region.body(member);
    } catch (...) {
      error = std::current_exception();
    }
    open_ = false;  // a thread that has not come yet finds nothing left to do
    wait_until([&] { return inside_ == 0; });
    busy_ = false;
    if (error) std::rethrow_exception(error);
    return true;
  }

  // Returns when ready() does; whoever makes it so calls wake().
  template <class Ready>
  void wait_until(const Ready& ready) {
    if (look(kLooksAwake, ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    changed_.wait(lock, ready);
    --sleepers_;
  }

  // All of these atomics are of one order: either a sleeper counted itself before this looks, and is woken, or it looks
  // after the change, and does not fall asleep.
  void wake() {
    if (sleepers_ == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

 private:
  void grow(int threads) {
    try {
      for (; started_ < threads; ++started_) std::thread(&Team::work, this, started_ + 1).detach();
    } catch (const std::system_error&) {
      // No more threads are to be had: those that are there do the work.
    }
  }

  void work(int index) {
    int64_t last = 0;  // number of the region that this thread has been in
    for (;;) {
      wait_until([&] { return open_ && number_ != last; });
      // A region that is seen open from inside does not end before this thread has left.
      ++inside_;
      if (open_ && number_ != last) {
        last = number_;
        Region& region = *region_;
        if (index < region.threads) {
          Member member(region, index);
          region.body(member);
        }
      }
      if (--inside_ == 0) wake();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> busy_{false}, open_{false};
  std::atomic<int> sleepers_{0}, inside_{0};
  std::atomic<int64_t> number_{0};
  std::atomic<Region*> region_{nullptr};
  int started_ = 0;
};

Team* the_team = new Team;

// A fork has one thread, and perhaps a mutex that nobody will open: it gets a team of its own.
const int after_a_fork = pthread_atfork(nullptr, nullptr, [] { the_team = new Team; });

}  // namespace

Part& Member::begin() {
  TORCH_INTERNAL_ASSERT(part_ < int64_t(region_.parts.size()), "the region has more parts than were said");
  return region_.parts[part_++];
}

void Member::add(Part& part, int64_t did, int64_t count) {
  if (did > 0 && part.finished.fetch_add(did) + did == count) the_team->wake();
}

bool Member::soon(const Part& part, int64_t count) {
  return look(kLooks, [&] { return part.finished == count; });
}

void Member::wait(const Part& part, int64_t count) {
  if (part.finished != count) the_team->wait_until([&] { return part.finished == count; });
}

int threads_of_a_region() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void together(int64_t parts, const std::function<void(Member&)>& body) {
  const int threads = threads_of_a_region();
  Region region(parts, threads, body);
  if (threads == 1 || !the_team->run(region)) {
    Region alone(parts, 1, body);
    Member member(alone, 0);
    body(member);
    if (alone.error) std::rethrow_exception(alone.error);
  } else if (region.error) {
    std::rethrow_exception(region.error);
  }
}

}  // namespace ldalign::cpu
