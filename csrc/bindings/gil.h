// The GIL given back for the length of a block.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace numoe::bindings {

inline bool interpreter_is_going_away() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

// Runs take(), which waits for the GIL.  Until Python 3.13 a daemon thread that waits while the interpreter goes away is
// ended by pthread_exit, whose unwinding would terminate the process in a destructor.  Such a thread sleeps instead, until
// the process ends: what Python 3.14 does.
template <class Take>
void wait_for_gil(Take take) noexcept {
#ifdef __GLIBCXX__
  try {
    take();
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  take();
#endif
}

class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;
  ~ReleasedGil() {
    wait_for_gil([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* state_;
};

}  // namespace numoe::bindings
