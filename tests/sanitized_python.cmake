# Python's tests with a sanitized module, as one more test of ctest.
#
# The module lies in a package of links to the sources, so that the one in python/numoe stays one that any interpreter
# can import.  The interpreter is not sanitized: LD_PRELOAD brings the sanitizer's library, and that of C++ with it, or
# the first exception would end the process.  Chosen are tests that stay in one process and that touch memory (address)
# or share it (thread).  The interpreter never frees all it has, so leaks are not looked for; tests/test_memory.py does.
set(stage ${CMAKE_BINARY_DIR}/python/numoe)
file(MAKE_DIRECTORY ${stage})
file(GLOB entries RELATIVE ${CMAKE_SOURCE_DIR}/python/numoe ${CMAKE_SOURCE_DIR}/python/numoe/*)
list(FILTER entries EXCLUDE REGEX "\\.so$|__pycache__")
foreach(entry IN LISTS entries)
  file(CREATE_LINK ${CMAKE_SOURCE_DIR}/python/numoe/${entry} ${stage}/${entry} SYMBOLIC)
endforeach()
set_target_properties(_core PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${stage})

# An editable install comes before every path, and what it has is not sanitized: false races, no bad memory found.
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env PYTHONPATH=${CMAKE_BINARY_DIR}/python
          ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('numoe').origin)"
  OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT found STREQUAL ${stage}/__init__.py)
  message(FATAL_ERROR "${Python_EXECUTABLE} finds numoe in ${found}, which is not sanitized, instead of ${stage}: "
                      "'pip uninstall numoe' there, or use an environment without it")
endif()
target_compile_options(_core PRIVATE -O1 -g1)  # the bindings: half the compile time

if(NUMOE_SANITIZE MATCHES "thread")
  set(runtime libtsan.so)
  set(chosen
    test_threads.py::test_eight_threads_on_one_layer_equal_serial
    test_threads.py::test_the_number_of_threads_may_change_while_others_compute
    test_threads.py::test_two_layers_in_two_threads_train_as_alone
    test_determinism.py::test_bits_do_not_depend_on_the_number_of_threads)
else()
  set(runtime libasan.so)
  set(chosen
    test_kernels.py
    test_packed.py
    test_backward_options.py::test_large_matrices_give_the_bits_of_small_steps
    test_dispatch.py
    test_errors.py
    test_fuzz.py
    test_determinism.py::test_odd_widths
    test_determinism.py::test_a_token_alone_has_the_bits_it_has_in_a_batch
    test_determinism.py::test_every_number_of_rows_gives_a_token_the_same_bits
    test_determinism.py::test_few_rows_read_weights_from_memory_to_the_same_bits
    test_gradients.py::test_expert
    test_gradients.py::test_shared_expert
    # AddressSanitizer ends a process that asks for too much memory, where everybody else throws std::bad_alloc.
    -k "not beyond_memory and not garbage_never_crashes[importance_loss]")
endif()
foreach(library ${runtime} libstdc++.so)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library} OUTPUT_VARIABLE path
                  OUTPUT_STRIP_TRAILING_WHITESPACE)
  list(APPEND preload ${path})
endforeach()
list(JOIN preload ":" preload)

# PYTHONMALLOC: a block of its own for every object, or the sanitizer would not see their ends.
add_test(NAME python COMMAND ${Python_EXECUTABLE} -m pytest -q -s -p no:cacheprovider --timeout 1200 ${chosen}
         WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}/tests)
set_tests_properties(python PROPERTIES ENVIRONMENT
  "PYTHONPATH=${CMAKE_BINARY_DIR}/python;LD_PRELOAD=${preload};PYTHONMALLOC=malloc;OPENBLAS_NUM_THREADS=1;\
ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0:allocator_may_return_null=1:max_allocation_size_mb=2000;UBSAN_OPTIONS=print_stacktrace=1;TSAN_OPTIONS=halt_on_error=1:suppressions=${CMAKE_SOURCE_DIR}/tests/tsan.supp")
