#include "numoe/parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#else
#include <cfenv>
#endif

namespace numoe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpinTime = std::chrono::microseconds(50);  // about one wake-up of a parked thread
constexpr auto kCheckInterval = std::chrono::milliseconds(20);
constexpr auto kRetryInterval = std::chrono::seconds(1);
constexpr std::size_t kLine = 128;  // bytes; two cache lines on x86 (fetched in pairs), one on Apple's ARM

// ── How many threads ─────────────────────────────────────────────────────────────────────────────────────────────────

std::atomic<int> chosen_threads{0};   // 0: not set
std::atomic<int> default_threads{0};  // 0: not set
std::atomic<int> detected_cpus{0};    // 0: not yet counted

int cpu_count() {
  if (detected_cpus.load(std::memory_order_relaxed) == 0) detected_cpus = available_cpus();
  return detected_cpus.load(std::memory_order_relaxed);
}

int checked_count(int n) {
  if (n >= 1) return std::min(n, kMaxThreads);
  throw std::invalid_argument("num_threads is " + std::to_string(n) +
                              ", but at least one thread must do the work: pass 1 or more");
}

#ifdef __linux__

int affinity_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;  // fails beyond 1024 CPUs
}

// Quota over period, rounded up: one and a half CPUs keep two threads busy three quarters of the time.
int quota_cpus(double quota, double period) {
  if (!(quota > 0 && period > 0 && quota <= period * kMaxThreads)) return kMaxThreads;  // -1: no quota
  const int whole = static_cast<int>(quota / period);
  return quota > whole * period ? whole + 1 : whole;
}

int quota_of_directory(const std::string& directory) {
  double quota = -1, period = -1;
  std::ifstream(directory + "/cpu.max") >> quota >> period;  // version 2; "max 100000" leaves quota 0: no quota
  if (quota > 0) return quota_cpus(quota, period);
  std::ifstream(directory + "/cpu.cfs_quota_us") >> quota;  // version 1
  std::ifstream(directory + "/cpu.cfs_period_us") >> period;
  return quota_cpus(quota, period);
}

// The tightest quota of a group and its ancestors. Inside a container the path may be the host's and most of it
// invisible; files that do not exist do not limit.
int quota_of_group(const std::string& mount, std::string path) {
  int cpus = quota_of_directory(mount);
  while (path.size() > 1) {
    cpus = std::min(cpus, quota_of_directory(mount + path));
    path.resize(path.rfind('/'));
  }
  return cpus;
}

// /proc/self/cgroup has lines "id:controllers:/path"; version 2 names no controllers.
int cgroup_cpus() {
  int cpus = kMaxThreads;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line.compare(second + 1, 1, "/") != 0) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") cpus = std::min(cpus, quota_of_group("/sys/fs/cgroup", path));
    if (controllers.find(",cpu,") != std::string::npos) {
      cpus = std::min(cpus, quota_of_group("/sys/fs/cgroup/cpu", path));
    }
  }
  return cpus;
}

#else

int affinity_cpus() { return 0; }
int cgroup_cpus() { return kMaxThreads; }

#endif

// ── Waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────

void pause_cpu() {
#ifdef __SSE2__
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
  if (ready()) return true;
  for (const auto end = Clock::now() + kSpinTime; Clock::now() < end;) {
    for (int i = 0; i < 32; ++i) {
      pause_cpu();
      if (ready()) return true;
    }
  }
  return false;
}

// ── What a thread knows about itself ─────────────────────────────────────────────────────────────────────────────────

thread_local bool is_helper = false;          // started by the pool
thread_local Clock::time_point last_check{};  // outlives a call: many short calls in a row are checked too
std::atomic<void (*)()> interrupt_check{nullptr};

bool time_to_check() {
  const auto now = Clock::now();
  if (now - last_check < kCheckInterval) return false;
  last_check = now;
  return true;
}

void poll_interrupt() {
  const auto check = interrupt_check.load(std::memory_order_relaxed);
  if (check != nullptr && !is_helper && time_to_check()) check();
}

// Rounding mode and treatment of denormals.
class FloatMode {
 public:
#ifdef __SSE2__
  void read() { mode_ = _mm_getcsr(); }
  void apply() const { _mm_setcsr(mode_); }

 private:
  unsigned mode_ = 0;
#else
  void read() { std::fegetenv(&mode_); }
  void apply() const { std::fesetenv(&mode_); }

 private:
  std::fenv_t mode_;
#endif
};

// Signals that ask for something belong to the program's own threads: there they interrupt sleep() or read().
void leave_signals_to_others() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGCHLD, SIGUSR1, SIGUSR2, SIGWINCH}) {
    sigaddset(&set, signal);
  }
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

// ── The pool ─────────────────────────────────────────────────────────────────────────────────────────────────────────

struct Job {
  Index num_tasks = 0;
  detail::RunTask run = nullptr;
  void* context = nullptr;
};

// Leaves the inner loops of a helper's task: somebody's exception is on its way to the caller.
struct Skipped {};

// Takes a flag if it is free. A mutex would not do: a nested call may ask for what its own thread holds.
class Claim {
 public:
  explicit Claim(std::atomic<bool>& flag) : flag_(flag), mine_(!flag.exchange(true)) {}
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  ~Claim() {
    if (mine_) flag_ = false;
  }
  explicit operator bool() const { return mine_; }

 private:
  std::atomic<bool>& flag_;
  const bool mine_;
};

// Runs one job at a time. `door_` is all the state: its high half counts the seats that helpers may still take,
// its low half the helpers inside. Seats: come in. Zero: nobody is inside, the caller may write the next job.
// A helper that comes too late finds no seat and harms nobody, so the caller never waits for a sleeper.
// All atomics are sequentially consistent: a call makes about ten accesses to them, next to 5 us and more of work.
class Pool {
 public:
  // False: the pool is busy, or there is nobody to help.
  bool try_run(const Job& job, int max_workers);
  // A helper's stop between the inner tasks of its task, which may be many: it leaves if the rest is skipped, and now and
  // then wakes the caller, who may have to look for signals.
  void pause_inside();

 private:
  static constexpr std::uint32_t kSeat = 1U << 16, kInside = kSeat - 1;
  static_assert(kMaxThreads < kSeat);

  void open(const Job& job, int helpers);
  void take_tasks(int worker);
  void skip_the_rest() {
    skipped_ = true;
    next_ = static_cast<std::size_t>(job_.num_tasks);
  }
  void close_door() { door_ &= kInside; }
  template <class Meanwhile>
  void wait_for_helpers(Meanwhile meanwhile);
  int start_helpers(int wanted);
  void live_as_helper();
  void help(int worker);

  std::atomic<bool> busy_{false};  // claimed by the caller during its job
  int helpers_ = 0;                // threads started (they never end); guarded by busy_, as the next one
  Clock::time_point retry_at_{};   // after the system refused a thread
  std::atomic<bool> may_spin_{false};

  alignas(kLine) Job job_;
  FloatMode float_mode_;
  std::exception_ptr error_;  // the first exception of a helper
  std::atomic<bool> has_error_{false}, skipped_{false};
  alignas(kLine) std::atomic<std::size_t> next_{0};    // unsigned: may pass num_tasks by one per worker
  alignas(kLine) std::atomic<std::uint32_t> door_{0};  // helpers park on it
  std::atomic<std::uint32_t> news_{0};  // the last helper has left, or the caller should look around: it parks on it
};

bool Pool::try_run(const Job& job, int max_workers) {
  const Claim claim(busy_);
  if (!claim) return false;
  const int helpers = start_helpers(max_workers - 1);
  if (helpers == 0) return false;
  try {
    open(job, helpers);
    take_tasks(0);
    wait_for_helpers(poll_interrupt);
    poll_interrupt();
  } catch (...) {  // must rethrow: pthread_exit, by which Python ends daemon threads, passes here too
    skip_the_rest();
    wait_for_helpers([] {});
    throw;
  }
  if (has_error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return true;
}

void Pool::open(const Job& job, int helpers) {
  job_ = job;
  float_mode_.read();
  error_ = nullptr;
  has_error_ = false;
  skipped_ = false;
  next_ = 0;
  may_spin_ = helpers < cpu_count();
  door_ = static_cast<std::uint32_t>(helpers) * kSeat;
  if (helpers == helpers_) {
    door_.notify_all();  // costs a system call only if somebody is parked
  } else {
    for (int i = 0; i < helpers; ++i) door_.notify_one();
  }
}

void Pool::take_tasks(int worker) {
  const auto num_tasks = static_cast<std::size_t>(job_.num_tasks);
  for (;;) {
    poll_interrupt();
    const std::size_t task = next_++;
    if (task >= num_tasks) return;
    job_.run(job_.context, static_cast<Index>(task), worker);
  }
}

template <class Meanwhile>
void Pool::wait_for_helpers(Meanwhile meanwhile) {
  close_door();
  const auto all_left = [this] { return door_ == 0; };
  if (may_spin_ && spin_until(all_left)) return;
  for (;;) {
    const std::uint32_t seen = news_;  // before the look at the door: what comes later ends the wait
    if (all_left()) return;
    meanwhile();
    news_.wait(seen);
  }
}

int Pool::start_helpers(int wanted) {
  if (helpers_ < wanted && Clock::now() >= retry_at_) {
    try {
      for (; helpers_ < wanted; ++helpers_) std::thread(&Pool::live_as_helper, this).detach();
    } catch (const std::exception&) {  // a limit on threads or memory: go on with those that exist
      retry_at_ = Clock::now() + kRetryInterval;
    }
  }
  return std::min(helpers_, wanted);
}

void Pool::live_as_helper() {
  is_helper = true;
  leave_signals_to_others();
  const auto is_open = [this] { return door_ >= kSeat; };
  for (;;) {
    std::uint32_t door = door_;
    if (may_spin_ && spin_until(is_open)) door = door_;
    for (; door < kSeat; door = door_) door_.wait(door);
    while (door >= kSeat && !door_.compare_exchange_weak(door, door - kSeat + 1)) {
    }
    if (door >= kSeat) help(static_cast<int>(door / kSeat));  // the number of free seats is the worker's number
  }
}

void Pool::help(int worker) {
  float_mode_.apply();
  try {
    take_tasks(worker);
  } catch (const Skipped&) {  // has served its purpose
  } catch (...) {
    if (!has_error_.exchange(true)) error_ = std::current_exception();
    skip_the_rest();
  }
  close_door();  // before leaving: there is nothing left to come in for
  if (--door_ == 0) {
    ++news_;
    news_.notify_one();
  }
}

void Pool::pause_inside() {
  if (skipped_) throw Skipped{};
  if (!time_to_check()) return;
  ++news_;
  news_.notify_one();
}

// Never destroyed: its threads still sleep in it when the process ends. Without lock or guard, so that it is in
// order after fork, where only the forking thread lives on; the parent's pool is left behind in any state.
std::atomic<Pool*> the_pool{nullptr};
void forget_pool() { the_pool = nullptr; }
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, forget_pool);

Pool& pool() {
  Pool* existing = the_pool;
  if (existing != nullptr) return *existing;
  auto fresh = std::make_unique<Pool>();
  return the_pool.compare_exchange_strong(existing, fresh.get()) ? *fresh.release() : *existing;
}

}  // namespace

int available_cpus() {
  const int by_affinity = affinity_cpus();
  const int cpus = by_affinity > 0 ? by_affinity : static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(std::min(cpus, cgroup_cpus()), 1, kMaxThreads);
}

int num_threads() {
  if (const int chosen = chosen_threads.load(std::memory_order_relaxed)) return chosen;
  if (const int by_default = default_threads.load(std::memory_order_relaxed)) return by_default;
  return cpu_count();
}

void set_num_threads(int n) { chosen_threads = checked_count(n); }

void set_default_num_threads(int n) { default_threads = checked_count(n); }

void set_interrupt_check(void (*check)()) { interrupt_check = check; }

void detail::run_tasks(Index num_tasks, int max_workers, RunTask run, void* context) {
  const int workers = static_cast<int>(std::min<Index>(num_tasks, std::min(max_workers, kMaxThreads)));
  if (workers > 1 && !is_helper && pool().try_run({num_tasks, run, context}, workers)) return;
  for (Index task = 0; task < num_tasks; ++task) {
    is_helper ? pool().pause_inside() : poll_interrupt();
    run(context, task, 0);
  }
}

}  // namespace numoe
