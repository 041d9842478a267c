// The threads of csrc/team.h alone, without torch, so that a sanitizer sees every access to memory. A case a name.
#include "team.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include <ATen/Parallel.h>

using namespace ldalign::cpu;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// A number that a thread may read while another writes it: what claimed pieces do, whose late thread gets false.
struct Cell {
  std::atomic<int64_t> value{0};
  Cell() = default;
  Cell(const Cell&) {}
  operator int64_t() const { return value.load(std::memory_order_relaxed); }
  void operator=(int64_t to) { value.store(to, std::memory_order_relaxed); }
};

// Sums of sums: every part reads all that the part before it has written, as a layer does. Parts of 0, 1, 2, 5 and 40
// pieces, of all four kinds; with `sleeps` some pieces are slow, as where the system puts a thread aside.
void chain(int regions, int parts, bool sleeps) {
  constexpr int64_t kCounts[] = {40, 0, 1, 5, 2};
  for (int region = 0; region < regions; ++region) {
    std::vector<std::vector<Cell>> values(parts), done(parts);
    for (int part = 0; part < parts; ++part) values[part].resize(kCounts[part % 5]), done[part].resize(kCounts[part % 5]);
    together(parts, [&](Member& member) {
      const std::vector<Cell>* before = nullptr;  // what the last part that had pieces has written
      for (int part = 0; part < parts; ++part) {
        const int64_t count = kCounts[part % 5];
        const auto sum = [&](int64_t i) {
          if (sleeps && (part * 7 + i) % 97 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          int64_t all = i;
          if (before) {
            for (const int64_t value : *before) all += value;
          }
          return all % 1000003;
        };
        const auto move = [&](int64_t i, int64_t result) {
          values[part][i] = result;
          ++done[part][i].value;
        };
        const auto claimed = [&](int64_t i, const auto& claim) {
          const int64_t result = sum(i);
          if (claim()) move(i, result);
        };
        const auto once = [&](int64_t i) { move(i, sum(i)); };
        if (part % 4 == 0) member.by_turns(count, once);
        else if (part % 4 == 1) member.by_turns_claimed(count, claimed);
        else if (part % 4 == 2) member.by_shares(count, once);
        else member.by_shares_claimed(count, claimed);
        if (count > 0) before = &values[part];
      }
    });
    int64_t all = 0;
    for (int part = 0; part < parts; ++part) {
      for (size_t i = 0; i < values[part].size(); ++i) {
        expect(done[part][i] == 1, "a result was moved twice, or not at all");
        expect(values[part][i] == (all + int64_t(i)) % 1000003, "a part began before the one before it was done");
      }
      if (values[part].empty()) continue;
      all = 0;
      for (const int64_t value : values[part]) all += value;
    }
  }
}

// A thread that is put aside within a piece: others do it again, and go on to the next part, which lets the first go on.
void late() {
  for (int i = 0; i < 30; ++i) {
    std::atomic<bool> begun{false}, later{false};
    std::atomic<int> moved{0};
    together(2, [&](Member& member) {
      const auto piece = [&](int64_t number, const auto& claim) {
        if (number == 3 && !begun.exchange(true) && at::threads > 1) {
          while (!later) std::this_thread::yield();
        }
        if (claim()) ++moved;
      };
      if (i % 2) member.by_shares_claimed(7, piece);
      else member.by_turns_claimed(7, piece);
      member.by_turns(2, [&](int64_t) { later = true; });
    });
    expect(moved == 7, "a result was moved twice, or not at all");
  }
}

// The first error comes out, all pieces are gone through, and the team goes on.
void errors() {
  for (int i = 0; i < 50; ++i) {
    std::atomic<int64_t> seen{0};
    std::atomic<int> done{0};
    bool thrown = false;
    try {
      together(2, [&](Member& member) {
        member.by_shares_claimed(20, [&](int64_t piece, const auto& claim) {
          seen |= int64_t(1) << piece;
          if (piece % 7 == 3) throw std::runtime_error("piece");
          if (claim() && piece == 19) throw std::runtime_error("piece");
        });
        member.by_turns(5, [&](int64_t) { ++done; });
      });
    } catch (const std::runtime_error& error) {
      thrown = std::strcmp(error.what(), "piece") == 0;
    }
    expect(thrown, "the error of a piece was lost");
    expect(seen == (1 << 20) - 1 && done == 5, "pieces were left out after an error");
  }
  chain(20, 20, false);
}

// Two callers at once: one has the team, the other works alone. A whole region of one within a piece of the other, and
// both at random.
void callers() {
  std::atomic<bool> begun{false}, done{false};
  std::thread within([&] {
    while (!begun) std::this_thread::yield();
    chain(5, 30, false);
    done = true;
  });
  std::atomic<int> pieces{0};
  together(2, [&](Member& member) {
    for (int part = 0; part < 2; ++part) {
      member.by_turns(5, [&](int64_t) {
        begun = true;
        while (!done) std::this_thread::yield();
        ++pieces;
      });
    }
  });
  within.join();
  expect(pieces == 10, "a region lost its pieces to another");
  std::thread other([] { chain(200, 30, false); });
  chain(200, 30, false);
  other.join();
}

// The threads that come to a region, which waits for a second one where torch may use more.
int come() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::atomic<int> came{0};
  together(1, [&](Member& member) {
    ++came;
    member.by_turns(1, [&](int64_t) {
      while (at::threads > 1 && came < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    });
  });
  return came;
}

// A fork of a process whose team has run, and sleeps, has one of its own.
void forks() {
  chain(20, 20, false);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const pid_t child = fork();
  if (child == 0) {
    chain(20, 20, false);
    expect(at::threads == 1 || come() > 1, "the fork has no threads of its own");
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the fork did not work");
  chain(20, 20, false);
}

// Regions of more and fewer threads.
void widths() {
  for (const int threads : {8, 2, 1, 8, 3}) {
    at::threads = threads;
    const int came = come();
    expect(came <= threads && (came > 1) == (threads > 1), "not the threads that torch may use");
    chain(10, 20, false);
  }
}

}  // namespace

int main(int, char** arguments) {
  at::threads = std::atoi(arguments[2]);
  const std::string name = arguments[1];
  if (name == "chain") chain(300, 60, false);
  else if (name == "sleeps") chain(10, 60, true);
  else if (name == "late") late();
  else if (name == "errors") errors();
  else if (name == "callers") callers();
  else if (name == "forks") forks();
  else if (name == "widths") widths();
  else expect(false, "no such case");
  std::puts("held");
}
