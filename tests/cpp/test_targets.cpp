// The choice of a target on CPUs that this machine is not.
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "numoe/kernels/target.h"

namespace {

using numoe::choose_table;
using numoe::KernelTable;

bool yes() { return true; }
bool no() { return false; }

const KernelTable wide_here{"wide", "", yes, {}, {}}, wide_elsewhere{"wide", "", no, {}, {}};
const KernelTable middle{"middle", "", yes, {}, {}}, narrow{"narrow", "", yes, {}, {}};
const KernelTable pretended{"emulated-wide", "", yes, {}, {}};

const KernelTable* const new_cpu[] = {&wide_here, &middle, &narrow};
const KernelTable* const old_cpu[] = {&wide_elsewhere, &middle, &narrow};
const KernelTable* const emulated[] = {&pretended};

std::string refusal(const char* wanted) {
  try {
    choose_table(old_cpu, emulated, wanted);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "accepted";
}

void test_the_best_that_the_cpu_has_is_the_default() {
  for (const char* nothing : {static_cast<const char*>(nullptr), ""}) {
    CHECK(&choose_table(new_cpu, emulated, nothing) == &wide_here);
    CHECK(&choose_table(old_cpu, emulated, nothing) == &middle);
  }
}

void test_a_name_chooses() {
  CHECK(&choose_table(new_cpu, emulated, "narrow") == &narrow);
  CHECK(&choose_table(old_cpu, emulated, "middle") == &middle);
  CHECK(&choose_table(old_cpu, emulated, "emulated-wide") == &pretended);
}

void test_what_the_cpu_lacks_is_refused_with_what_it_has() {
  for (const char* name : {"wide", "Middle", "middle ", "emulated"}) {
    CHECK(refusal(name) == "NUMOE_TARGET='" + std::string(name) +
                               "' is not a target that this CPU and this build have; set it to one of: middle, narrow, "
                               "or unset it");
  }
}

// Every table of this build that this CPU supports computes: an illegal instruction would end the test here.
void test_supported_tables_run() {
  for (const auto tables : {numoe::kernel_tables(), numoe::emulated_tables()}) {
    for (const KernelTable* table : tables) {
      if (!table->supported()) continue;
      float x[37], y[37];
      for (int i = 0; i < 37; ++i) x[i] = y[i] = static_cast<float>(i);
      table->f32.axpy(37, 2.0f, x, y);
      for (int i = 0; i < 37; ++i) CHECK(y[i] == 3.0f * x[i]);
      CHECK(table->f32.dot(37, x, x) == 16206.0f);
    }
  }
  CHECK(std::strcmp(numoe::kernel_tables().back()->name, "portable") == 0);
  CHECK(numoe::kernel_tables().back()->supported());
}

}  // namespace

int main() {
  test_the_best_that_the_cpu_has_is_the_default();
  test_a_name_chooses();
  test_what_the_cpu_lacks_is_refused_with_what_it_has();
  test_supported_tables_run();
  return 0;
}
