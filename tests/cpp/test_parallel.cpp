// Tests of the thread pool that need no Python: ends with a non-zero code if a check fails.
//   test_parallel            all tests, a few seconds
//   test_parallel measure    prints what a call costs
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "numoe/parallel.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
[[maybe_unused]] constexpr bool kAddressSanitizer = true;
#else
[[maybe_unused]] constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace {

using numoe::Index;
using numoe::parallel_for;
using numoe::parallel_ranges;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void work_for(Clock::duration duration) {
  for (const auto end = Clock::now() + duration; Clock::now() < end;) {
  }
}

// The sum 0 + 1 + ... + n-1, every task writing its own place.
Index sum_in_parallel(Index n, int max_workers = numoe::num_threads()) {
  std::vector<Index> values(static_cast<std::size_t>(n), 0);
  parallel_for(n, [&](Index i) { values[static_cast<std::size_t>(i)] += i; }, max_workers);
  return std::accumulate(values.begin(), values.end(), Index{0});
}

// Two tasks that certainly run on two threads: each waits until both have begun. `on_helper` runs on the
// other one.
template <class OnCaller, class OnHelper>
void run_on_both(OnCaller on_caller, OnHelper on_helper) {
  std::atomic<int> begun{0};
  const auto caller = std::this_thread::get_id();
  parallel_for(
      2,
      [&](Index) {
        ++begun;
        while (begun < 2) std::this_thread::yield();
        std::this_thread::get_id() == caller ? on_caller() : on_helper();
      },
      2);
}

template <class Function>
std::string message_of(Function function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Runs `body` in a forked child and tells whether it came to its end within 10 s.
template <class Body>
bool child_succeeds(Body body) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(10);
    body();
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  return status == 0;
}

// ── Numbers of threads ───────────────────────────────────────────────────────────────────────────────────────────────

void test_thread_counts() {
  CHECK(numoe::available_cpus() >= 1);
  CHECK(numoe::num_threads() == numoe::available_cpus());
  numoe::set_default_num_threads(3);
  CHECK(numoe::num_threads() == 3);
  numoe::set_num_threads(2);
  numoe::set_default_num_threads(5);  // does not overrule
  CHECK(numoe::num_threads() == 2);
  for (const int bad : {0, -1, std::numeric_limits<int>::min()}) {
    const auto message = message_of([&] { numoe::set_num_threads(bad); });
    CHECK(message.find("num_threads is " + std::to_string(bad)) == 0);
    CHECK(!message_of([&] { numoe::set_default_num_threads(bad); }).empty());
  }
  CHECK(numoe::num_threads() == 2);  // a refused number changes nothing
  numoe::set_num_threads(std::numeric_limits<int>::max());
  CHECK(numoe::num_threads() == numoe::kMaxThreads);
}

// ── Every task once ──────────────────────────────────────────────────────────────────────────────────────────────────

void test_every_task_runs_once() {
  for (int threads = 1; threads <= 8; ++threads) {
    numoe::set_num_threads(threads);
    for (const Index n : {0, 1, 2, 3, 7, 8, 9, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
      parallel_for(n, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
      for (const auto& count : runs) CHECK(count == 1);
    }
  }
  parallel_for(-5, [](Index) { CHECK(false); });
  parallel_ranges(-5, 2, [](Index, Index) { CHECK(false); });
}

void test_worker_numbers_are_exclusive() {
  for (const int limit : {-1, 0, 1, 2, 3, 8}) {
    std::vector<std::atomic<bool>> taken(8);
    parallel_for(
        300,
        [&](Index, int worker) {
          CHECK(worker >= 0 && worker < std::max(limit, 1));
          CHECK(!taken[static_cast<std::size_t>(worker)].exchange(true));
          work_for(microseconds(2));
          taken[static_cast<std::size_t>(worker)] = false;
        },
        limit);
  }
}

void test_ranges() {
  constexpr Index kLargest = std::numeric_limits<Index>::max();
  for (const Index n : {0, 1, 2, 10, 97, 1000}) {
    for (const Index grain : {Index{-1}, Index{0}, Index{1}, Index{3}, Index{10}, Index{2000}, kLargest}) {
      const Index most = std::max<Index>(grain, 1);
      std::vector<std::atomic<int>> covered(static_cast<std::size_t>(n));
      std::atomic<Index> ranges{0}, shortest{n}, longest{0};
      parallel_ranges(n, grain, [&](Index begin, Index end, int) {
        CHECK(0 <= begin && begin < end && end <= n && end - begin <= most);
        for (Index i = begin; i < end; ++i) ++covered[static_cast<std::size_t>(i)];
        static std::mutex extremes;
        const std::lock_guard lock(extremes);
        ++ranges;
        shortest = std::min<Index>(shortest, end - begin);
        longest = std::max<Index>(longest, end - begin);
      });
      for (const auto& count : covered) CHECK(count == 1);
      CHECK(ranges == n / most + (n % most != 0));
      CHECK(longest - shortest <= 1);
    }
  }
  std::atomic<Index> items{0};
  parallel_ranges(kLargest, kLargest / 7, [&](Index begin, Index end) { items += end - begin; });
  CHECK(items == kLargest);
}

void test_both_threads_work() {
  std::atomic<int> on_caller{0}, on_helper{0};
  run_on_both([&] { ++on_caller; }, [&] { ++on_helper; });
  CHECK(on_caller == 1 && on_helper == 1);
}

void test_parked_helpers_are_woken() {
  for (int threads = 2; threads <= 4; ++threads) {  // the first pass wakes all helpers there are, the next ones some
    numoe::set_num_threads(threads);
    test_both_threads_work();
    std::this_thread::sleep_for(milliseconds(20));
    test_both_threads_work();
  }
}

void test_three_workers_have_three_numbers() {
  std::atomic<int> begun{0}, numbers{0};
  parallel_for(
      3,
      [&](Index, int worker) {
        numbers |= 1 << worker;
        ++begun;
        while (begun < 3) std::this_thread::yield();
      },
      3);
  CHECK(numbers == 0b111);
}

// The median of 100 times, in seconds.
template <class Body>
double median_seconds(Body body) {
  std::vector<double> times;
  for (int i = 0; i < 100; ++i) {
    const auto start = Clock::now();
    body();
    times.push_back(seconds_since(start));
  }
  std::sort(times.begin(), times.end());
  return times[50];
}

// By the last helper, not by its own look at the clock every 20 ms.  How long a wake-up takes beside the machine's other
// work, the operating system shows.
void test_waiting_caller_is_woken() {
  const auto task = [] { std::this_thread::sleep_for(milliseconds(1)); };
  const double join = median_seconds([&] { std::thread(task).join(); });
  CHECK(median_seconds([&] { run_on_both([] {}, task); }) < 2 * join + 0.012);
}

// ── Exceptions ───────────────────────────────────────────────────────────────────────────────────────────────────────

void test_exceptions_reach_the_caller() {
  const auto fail = [] { throw std::runtime_error("expert 3 is ill"); };
  const auto fine = [] {};
  for (int round = 0; round < 20; ++round) {
    CHECK(message_of([&] { run_on_both(fail, fine); }) == "expert 3 is ill");
    CHECK(message_of([&] { run_on_both(fine, fail); }) == "expert 3 is ill");
    CHECK(message_of([&] { run_on_both(fail, fail); }) == "expert 3 is ill");
    CHECK(sum_in_parallel(100) == 4950);
  }
}

void test_running_tasks_end_before_the_exception_arrives() {
  std::atomic<bool> ended{false};
  const auto slow = [&] {
    std::this_thread::sleep_for(milliseconds(20));
    ended = true;
  };
  CHECK(message_of([&] { run_on_both([] { throw std::runtime_error("early"); }, slow); }) == "early" && ended);
}

void test_exception_of_a_helper_stops_the_caller() {
  const auto caller = std::this_thread::get_id();
  std::atomic<Index> runs{0};
  const auto task = [&](Index) {
    ++runs;
    if (std::this_thread::get_id() != caller) throw std::runtime_error("helper");
    while (runs < 2) std::this_thread::yield();
    work_for(microseconds(10));
  };
  CHECK(message_of([&] { parallel_for(1'000'000, task, 2); }) == "helper" && runs < 100'000);
}

void test_tasks_after_an_exception_are_skipped() {
  for (const int threads : {1, 2, 4}) {
    std::atomic<Index> runs{0};
    const auto one_fails = [&](Index i) {
      ++runs;
      if (i == 10) throw std::bad_alloc();
      work_for(microseconds(10));
    };
    bool caught = false;
    try {
      parallel_for(1'000'000, one_fails, threads);
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    CHECK(caught && runs >= 11 && runs < 100'000);
    runs = 0;  // the largest count: the counter must not run over its end
    CHECK(!message_of([&] { parallel_for(std::numeric_limits<Index>::max(), one_fails, threads); }).empty());
  }
}

// ── Nesting, many callers, fork ──────────────────────────────────────────────────────────────────────────────────────

void test_nested_calls() {
  numoe::set_num_threads(4);
  std::vector<Index> sums(20, 0);
  parallel_for(20, [&](Index i) {
    const auto outer = std::this_thread::get_id();
    parallel_for(5, [&](Index j, int worker) {
      CHECK(std::this_thread::get_id() == outer && worker == 0);
      parallel_ranges(10, 3, [&](Index begin, Index end) { sums[static_cast<std::size_t>(i)] += j * (end - begin); });
    });
  });
  for (const Index sum : sums) CHECK(sum == 100);
  const auto nested_failure = [] { parallel_for(3, [](Index) { throw std::runtime_error("inner"); }); };
  CHECK(message_of([&] { run_on_both([] {}, nested_failure); }) == "inner");
}

void test_many_callers() {
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    for (int n = 1; !stop; n = n % 6 + 1) numoe::set_num_threads(n), std::this_thread::yield();
  });
  std::vector<std::thread> callers;
  for (int c = 0; c < 8; ++c) {
    callers.emplace_back([c] {
      for (int round = 0; round < 200; ++round) CHECK(sum_in_parallel(40 + c) == (40 + c) * (39 + c) / 2);
    });
  }
  for (auto& caller : callers) caller.join();
  stop = true;
  changer.join();
  numoe::set_num_threads(4);
}

void test_busy_pool_does_not_block() {
  std::atomic<bool> finished{false};
  const auto wait_for_the_other = [&] {
    while (!finished) std::this_thread::yield();
  };
  run_on_both(wait_for_the_other, [&] {
    std::thread second([] { CHECK(sum_in_parallel(50) == 1225); });  // returns although the pool is held all the time
    second.join();
    finished = true;
  });
}

void test_fork() {
  if (kThreadSanitizer || kAddressSanitizer) return;  // their own locks do not survive fork
  CHECK(sum_in_parallel(100) == 4950);
  const auto compute = [] {
    test_both_threads_work();
    CHECK(sum_in_parallel(100) == 4950);
    CHECK(child_succeeds([] { test_both_threads_work(); }));  // grandchild
  };
  CHECK(child_succeeds(compute));
  std::atomic<bool> stop{false};
  std::thread other([&] {  // in a call all the time, at whatever point the fork comes
    while (!stop) sum_in_parallel(100);
  });
  for (int round = 0; round < 20; ++round) CHECK(child_succeeds(compute));
  stop = true;
  other.join();
  CHECK(sum_in_parallel(100) == 4950);
}

void test_threads_refused() {
#ifdef __linux__
  if (kThreadSanitizer || kAddressSanitizer) return;  // they reserve address space themselves
  CHECK(child_succeeds([] {
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const auto size = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (40U << 20);  // room for some stacks
    const rlimit limit{size, size};
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    bool thread_refused = false;
    numoe::set_num_threads(64);
    for (int round = 0; round < 3; ++round) CHECK(sum_in_parallel(1000) == 499500);
    try {
      std::vector<std::jthread> more(64);
      for (auto& thread : more) thread = std::jthread([] { std::this_thread::sleep_for(milliseconds(50)); });
    } catch (const std::system_error&) {
      thread_refused = true;
    }
    CHECK(thread_refused);  // else this test proves nothing
  }));
#endif
}

// ── Interrupts ───────────────────────────────────────────────────────────────────────────────────────────────────────

struct Interrupted {};
std::atomic<bool> interrupt_now{false};
std::atomic<int> checks{0};
std::thread::id main_thread;

void check_interrupt() {
  CHECK(std::this_thread::get_id() == main_thread);
  ++checks;
  if (interrupt_now) throw Interrupted{};
}

// Seconds from the signal, 0.1 s after the start, to the exception, and whether it came at all.
template <class Body>
double interrupt_latency(Body body) {
  interrupt_now = false;
  checks = 0;
  Clock::time_point signal_time;
  std::thread signal([&] {
    std::this_thread::sleep_for(milliseconds(100));
    signal_time = Clock::now();
    interrupt_now = true;
  });
  bool caught = false;
  try {
    body();
  } catch (const Interrupted&) {
    caught = true;
  }
  const auto end = Clock::now();
  signal.join();
  interrupt_now = false;
  CHECK(caught);
  CHECK(checks >= 1 && checks <= 50);
  return std::chrono::duration<double>(end - signal_time).count();
}

void test_interrupt() {
  main_thread = std::this_thread::get_id();
  numoe::set_interrupt_check(check_interrupt);
  const auto task = [](Index) { std::this_thread::sleep_for(milliseconds(2)); };
  const auto long_task = [](Index) { std::this_thread::sleep_for(milliseconds(20)); };
  for (const int threads : {1, 2, 4}) {
    CHECK(interrupt_latency([&] { parallel_for(1'000'000, task, threads); }) < 0.3);
  }
  CHECK(interrupt_latency([&] {  // inside a nested call
          parallel_for(2, [&](Index) { parallel_for(60, long_task); }, 2);
        }) < 0.3);
  CHECK(interrupt_latency([&] {  // while a helper is inside one
          run_on_both([] {}, [&] { parallel_for(60, long_task); });
        }) < 0.3);
  CHECK(interrupt_latency([&] {  // in a row of short calls
          for (;;) parallel_for(4, task);
        }) < 0.3);
  CHECK(interrupt_latency([&] {  // while the caller only waits for a helper
          run_on_both([] {}, [] { std::this_thread::sleep_for(milliseconds(200)); });
        }) < 0.3);
  CHECK(sum_in_parallel(1000) == 499500);
}

// A handler that uses the library itself must not dead-lock.
void test_check_that_calls_the_pool() {
  static std::atomic<int> calls{0};
  numoe::set_interrupt_check([] {
    ++calls;
    CHECK(sum_in_parallel(30) == 435);
  });
  parallel_for(100, [](Index) { std::this_thread::sleep_for(milliseconds(2)); });
  CHECK(calls >= 1);
  numoe::set_interrupt_check(nullptr);
}

// Python ends daemon threads by pthread_exit inside the check: glibc unwinds the stack, which nobody may
// catch.
void test_thread_that_ends_in_the_check() {
#ifdef __GLIBC__
  numoe::set_interrupt_check([] { pthread_exit(nullptr); });
  std::thread daemon([] {
    parallel_for(100'000, [](Index) { work_for(milliseconds(1)); });
    CHECK(false);
  });
  daemon.join();
  numoe::set_interrupt_check(nullptr);
  test_both_threads_work();
#endif
}

// ── Floating point mode, stress ──────────────────────────────────────────────────────────────────────────────────────

void test_float_mode_follows_the_caller() {
#ifdef __SSE2__
  const unsigned usual = _mm_getcsr();
  for (const unsigned mode : {usual | 0x8000U, usual}) {  // flush denormals to zero, and not
    _mm_setcsr(mode);
    volatile float tiny = std::numeric_limits<float>::min();
    float on_caller = -1, on_helper = -1;
    run_on_both([&] { on_caller = tiny * 0.5F; }, [&] { on_helper = tiny * 0.5F; });
    CHECK(on_caller == on_helper && (on_caller == 0) == (mode != usual));
  }
#endif
}

void test_signals_stay_with_the_program() {
  const auto blocks_interrupts = [] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    return sigismember(&mask, SIGINT) == 1;
  };
  run_on_both([&] { CHECK(!blocks_interrupts()); }, [&] { CHECK(blocks_interrupts()); });
}

void test_many_tiny_calls() {
  for (const int threads : {2, 5}) {
    std::vector<Index> counts(5, 0);
    for (Index round = 0; round < 20'000; ++round) {
      parallel_for(5, [&](Index i) { ++counts[static_cast<std::size_t>(i)]; }, threads);  // a plain ++: tasks own it
      if (round % 1000 == 0) std::this_thread::sleep_for(microseconds(200));              // helpers park
    }
    for (const Index count : counts) CHECK(count == 20'000);
  }
}

// ── What a call costs ────────────────────────────────────────────────────────────────────────────────────────────────

// Median time of one call of `body`, in microseconds. Before each, the caller works alone for `gap`.
template <class Body>
double median_us(int rounds, Clock::duration gap, Body body) {
  std::vector<double> times;
  for (int round = 0; round < rounds; ++round) {
    work_for(gap);
    const auto start = Clock::now();
    body();
    times.push_back(1e6 * seconds_since(start));
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<std::size_t>(rounds / 2)];
}

void measure() {
  std::printf("available CPUs: %d\n", numoe::available_cpus());
  std::printf("counting them: %.1f us\n", median_us(100, {}, [] { numoe::available_cpus(); }));
  for (const int threads : {1, 2}) {
    const auto start = Clock::now();
    for (int i = 0; i < 200'000; ++i) parallel_for(2, [](Index) {}, threads);
    std::printf("2 empty tasks, back to back, %d threads: %.3f us per call\n", threads, 5 * seconds_since(start));
  }
  const auto tasks_of = [](microseconds duration, int threads) {
    return [=] { parallel_for(2, [=](Index) { work_for(duration); }, threads); };
  };
  for (const auto gap : {microseconds(0), microseconds(30), microseconds(200), microseconds(2000)}) {
    const char* state = gap < microseconds(50) ? "spinning" : "parked";
    std::printf("after %4d us alone (helper %s), 2 threads:\n", static_cast<int>(gap.count()), state);
    std::printf("  2 empty tasks             %7.2f us\n", median_us(300, gap, tasks_of(microseconds(0), 2)));
    std::printf("  2 tasks that met          %7.2f us\n", median_us(300, gap, [] { run_on_both([] {}, [] {}); }));
    std::printf("  2 tasks of 10 us          %7.2f us\n", median_us(300, gap, tasks_of(microseconds(10), 2)));
    std::printf("  2 tasks of 100 us         %7.2f us\n", median_us(300, gap, tasks_of(microseconds(100), 2)));
  }
  for (const int threads : {1, 2, 8, 64}) {
    const auto many = [&] { parallel_for(1000, [](Index) { work_for(microseconds(20)); }, threads); };
    std::printf("1000 tasks of 20 us, %2d threads: %.0f us\n", threads, median_us(9, {}, many));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "measure") == 0) {
    measure();
    return 0;
  }
  alarm(120);  // a dead-lock is a failure too
  test_thread_counts();
  test_parked_helpers_are_woken();  // early: it wants a pool with one helper
  test_every_task_runs_once();
  test_worker_numbers_are_exclusive();
  test_ranges();
  test_both_threads_work();
  test_three_workers_have_three_numbers();
  test_waiting_caller_is_woken();
  test_exceptions_reach_the_caller();
  test_running_tasks_end_before_the_exception_arrives();
  test_exception_of_a_helper_stops_the_caller();
  test_tasks_after_an_exception_are_skipped();
  test_nested_calls();
  test_many_callers();
  test_busy_pool_does_not_block();
  test_fork();
  test_threads_refused();
  test_interrupt();
  test_check_that_calls_the_pool();
  test_thread_that_ends_in_the_check();
  test_float_mode_follows_the_caller();
  test_signals_stay_with_the_program();
  test_many_tiny_calls();
  std::puts("parallel: all tests passed");
  return 0;
}
