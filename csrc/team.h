// Threads that go through a step of generation together.
//
// OpenMP's threads meet at the end of every loop, and a step has some 270 of them: on a machine with other work all
// wait, every time, for whichever thread the system has put aside. Here a step is one region. Each thread runs the same
// body and comes to the same parts of it in the same order; a part is cut into pieces, taken by whoever is free, and is
// over when its pieces are done, whoever did them. A thread that comes late finds what it would have done done. What it
// had begun another does again, where results are moved to their place in the end and only once. A thread that waits
// all the same sleeps after a while, so that the system gives its core to the late one.
//
// Which thread does a piece, and how often, must make no difference to its result.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <vector>

namespace ldalign::cpu {

// One part of a region, as its threads share it.
struct Part {
  std::atomic<int64_t> finished{0};  // pieces
};

// Of one thread in one part.
struct alignas(64) Share {
  std::atomic<int64_t> taken{0};   // pieces of those that the thread begins with
  std::atomic<int64_t> doing{-1};  // the piece that it is at, until its result is claimed
};

class Member;

// What the threads of one region share.
struct Region {
  Region(int64_t count, int threads, const std::function<void(Member&)>& body)
      : threads(threads), parts(count), shares(count * threads), body(body) {}

  const int threads;
  std::vector<Part> parts;
  std::vector<Share> shares;  // (parts, threads)
  const std::function<void(Member&)>& body;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the piece that failed first
};

// A thread within a region.
class Member {
 public:
  Member(Region& region, int index) : region_(region), index_(index) {}

  // The thread that asked for the region: there is always one.
  bool caller() const { return index_ == 0; }

  // Threads of the region, the same in each; what torch says of their number differs between them.
  int threads() const { return region_.threads; }

  // piece(i) for i < count, each thread taking the next when it is free; returns when all are done.
  template <class Piece>
  void by_turns(int64_t count, const Piece& piece) { unclaimed(count, 1, piece); }

  // The same, each thread going through a share of its own in order, then through what others have left.
  template <class Piece>
  void by_shares(int64_t count, const Piece& piece) { unclaimed(count, region_.threads, piece); }

  // piece(i, claim) for i < count, each taking the next, and when there is none, what others are still at. A piece
  // computes in memory of its thread's own and, if claim() is true, moves the result to its place. It may read what is
  // being written meanwhile, and then gets false: what a late thread was at has been done, and the others have gone on.
  template <class Piece>
  void by_turns_claimed(int64_t count, const Piece& piece) { claimed(count, 1, piece); }

  // The same by shares.
  template <class Piece>
  void by_shares_claimed(int64_t count, const Piece& piece) { claimed(count, region_.threads, piece); }

 private:
  template <class Piece>
  void unclaimed(int64_t count, int64_t owners, const Piece& piece) {
    Share* shares = shares_of_part();
    Part& part = begin();
    int64_t did = 0;
    take(shares, count, owners, [&](int64_t i) {
      attempt([&] { piece(i); });
      ++did;
    });
    add(part, did, count);
    wait(part, count);
  }

  template <class Piece>
  void claimed(int64_t count, int64_t owners, const Piece& piece) {
    Share* shares = shares_of_part();
    Part& part = begin();
    take(shares, count, owners, [&](int64_t i) {
      shares[index_].doing = i;
      claimed_piece(part, count, shares[index_], i, piece);
    });
    if (soon(part, count)) return;
    for (int other = 1; other < region_.threads; ++other) {
      Share& late = shares[(index_ + other) % region_.threads];
      const int64_t i = late.doing;
      if (i >= 0) claimed_piece(part, count, late, i, piece);
    }
    wait(part, count);
  }

  // work(i) for the pieces that this thread gets, of shares that `owners` threads begin with.
  template <class Work>
  void take(Share* shares, int64_t count, int64_t owners, const Work& work) {
    for (int64_t other = 0; other < owners; ++other) {
      const int64_t owner = (index_ + other) % owners;
      const int64_t first = count * owner / owners, last = count * (owner + 1) / owners;
      std::atomic<int64_t>& taken = shares[owner].taken;
      for (int64_t i; (i = first + taken.fetch_add(1, std::memory_order_relaxed)) < last;) work(i);
    }
  }

  // Piece i, which the share's thread is at: by that thread, or another.
  template <class Piece>
  void claimed_piece(Part& part, int64_t count, Share& share, int64_t i, const Piece& piece) {
    bool first = false;
    const auto claim = [&] {
      int64_t expected = i;
      return first = share.doing.compare_exchange_strong(expected, -1);
    };
    attempt([&] { piece(i, claim); });
    if (first || claim()) add(part, 1, count);  // unclaimed by an error: done all the same, the others wait for it
  }

  template <class Work>
  void attempt(const Work& work) {
    try {
      work();
    } catch (...) {
      if (!region_.failed.exchange(true)) region_.error = std::current_exception();
    }
  }

  Share* shares_of_part() { return region_.shares.data() + part_ * region_.threads; }
  Part& begin();
  static void add(Part& part, int64_t did, int64_t count);
  static bool soon(const Part& part, int64_t count);  // whether a part is over in some microseconds
  static void wait(const Part& part, int64_t count);

  Region& region_;
  const int index_;
  int64_t part_ = 0;  // the next one
};

// Threads of a region begun here.
int threads_of_a_region();

// Runs body in every thread that torch may use, and returns when all of its parts are done, of which there are at most
// `parts`. Throws what the first failed piece has thrown. Within a parallel region of OpenMP, and while another thread
// has the team, the caller goes through the parts alone.
void together(int64_t parts, const std::function<void(Member&)>& body);

}  // namespace ldalign::cpu
