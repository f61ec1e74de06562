// The one thread pool of the library: numbered tasks, run by a few threads that outlive the call.
//
//   parallel_for(num_tasks, [&](Index task) { ... });                     every task once, in no particular order
//   parallel_for(num_tasks, [&](Index task, int worker) { ... }, limit);  worker in 0..limit-1 names scratch memory
//   parallel_ranges(n, grain, [&](Index begin, Index end) { ... });       0..n-1 in pieces of at most grain items
//
// Which thread runs a task, and when, is unspecified. A task must therefore own what it writes; if it also computes it
// in a fixed order, the bits of the result depend neither on the number of threads nor on other callers. Two tasks of
// one call never run at the same time with the same worker number.
//
// - A call returns, or throws, only after its last running task has ended. If tasks throw, one of their exceptions
//   reaches the caller, tasks not yet begun are skipped, and the pool stays usable.
// - The caller works too (worker 0) and never waits for a sleeping thread: whoever wakes too late is not needed.
// - From inside a task, while another thread uses the pool, or when no thread can be started, the tasks run on the
//   calling thread, in order, as worker 0. The results are the same.
// - After fork() the child starts a pool of its own. (Forking inside a task or the interrupt check is not supported.)
// - Tasks run in the caller's floating point mode (rounding, denormals), whichever thread runs them.
//
// A task should last between 5 us (less is not worth handing out) and 50 ms (Ctrl-C waits for its end), or consist of nested
// calls whose tasks do.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "numoe/view.h"

namespace numoe {

inline constexpr int kMaxThreads = 1024;

// CPUs this process may use: its affinity mask, limited by the cgroup's quota (rounded up). Reads the system: 50 us.
int available_cpus();

// Threads a call may use, its own included: the last set_num_threads, else the default, else available_cpus() as it
// was at the first question.
int num_threads();

// n >= 1, else std::invalid_argument; more than kMaxThreads means kMaxThreads. More threads than CPUs are obeyed: never
// wrong, seldom faster (nobody spins then). Calls that are already running keep their number.
void set_num_threads(int n);
void set_default_num_threads(int n);  // same rules; what the environment asks for, overruled by set_num_threads

// `check` is called about every 20 ms, on calling threads only, between tasks and at the end of a call. If it throws
// (Python: KeyboardInterrupt), tasks not yet begun are skipped and the caller gets that exception. nullptr: no check.
void set_interrupt_check(void (*check)());

namespace detail {

using RunTask = void (*)(void* context, Index task, int worker);
void run_tasks(Index num_tasks, int max_workers, RunTask run, void* context);

}  // namespace detail

// Runs task(i) or task(i, worker) for every i in 0..num_tasks-1 on at most max_workers threads. No allocation. Whoever
// keeps scratch per worker passes the number it allocated for: num_threads() may change in between.
template <class Task>
void parallel_for(Index num_tasks, Task&& task, int max_workers = num_threads()) {
  using Body = std::remove_reference_t<Task>;
  const detail::RunTask run = [](void* context, Index i, int worker) {
    Body& body = *static_cast<Body*>(context);
    if constexpr (std::is_invocable_v<Body&, Index, int>) {
      body(i, worker);
    } else {
      static_cast<void>(worker);
      body(i);
    }
  };
  detail::run_tasks(num_tasks, max_workers, run, const_cast<void*>(static_cast<const void*>(std::addressof(task))));
}

// Runs fn(begin, end) or fn(begin, end, worker) on nearly equal contiguous ranges of at most `grain` items that cover
// 0..n-1. The cuts depend on n and grain alone, so partial sums per range are the same for any number of threads.
template <class Fn>
void parallel_ranges(Index n, Index grain, Fn&& fn, int max_workers = num_threads()) {
  if (n <= 0) return;
  const Index parts = (n - 1) / std::max<Index>(grain, 1) + 1;
  const Index length = n / parts, longer = n % parts;  // the first `longer` ranges have one item more
  const auto run_part = [&](Index part, int worker) {
    const Index begin = part * length + std::min(part, longer);
    const Index end = begin + length + (part < longer ? 1 : 0);
    if constexpr (std::is_invocable_v<Fn&, Index, Index, int>) {
      fn(begin, end, worker);
    } else {
      static_cast<void>(worker);
      fn(begin, end);
    }
  };
  parallel_for(parts, run_part, max_workers);
}

}  // namespace numoe
