#!/usr/bin/env bash
# Runs tests against a native library built with the address and undefined-behaviour sanitizers, in build/sanitize.
#   scripts/sanitize.sh                          all tests of the native kernels
#   scripts/sanitize.sh tests/native -k gemm -x  pytest's own arguments
# Processes that a test starts load the installed library: only what runs in the test's own process is watched.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
build=$PWD/build/sanitize
compiler="${CXX:-c++}"
if ! "$python" -c 'import cmake, nanobind, ninja' 2>/dev/null; then
    echo "sanitize: needs cmake, nanobind and ninja in .venv; make setup installs them" >&2
    exit 1
fi

if [ ! -e "$("$compiler" -print-file-name=libasan.so)" ]; then
    echo "sanitize: $compiler has no address sanitizer here (libasan of its own version); nothing is checked" >&2
    exit 1
fi

if ! {
    "$python" -m cmake -S native -B "$build" -G Ninja -DSANITIZE=ON -DEMULATE_AMX=ON -DCMAKE_CXX_COMPILER="$compiler" \
        -DPython_EXECUTABLE="$python" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" \
        -DCMAKE_MAKE_PROGRAM="$("$python" -c 'import ninja; print(ninja.BIN_DIR)')/ninja"
    "$python" -m cmake --build "$build"
} >"$build.log" 2>&1; then
    tail -n 30 "$build.log" >&2
    exit 1
fi

# libasan has to come before all else; libstdc++ with it, or its hook on exceptions finds nothing to call.
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
# Python never frees what lives as long as the process, so leaks say nothing. malloc: out-of-bounds reads of bytes and
# arrays are seen only where Python's own pools are out of the way.
export ASAN_OPTIONS="detect_leaks=0:strict_string_checks=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
[ $# -gt 0 ] || set -- -q tests/native tests/nn/kernels/test_native*.py tests/nn/kernels/test_outputs.py \
    tests/nn/kernels/test_*_kv.py tests/nn/kernels/test_bf12.py tests/nn/weights/test_packed_load.py \
    tests/nn/weights/test_quantized.py tests/runner/test_step_words.py
exec env LD_PRELOAD="$preload" PYTHONMALLOC=malloc "$python" - "$build" "$@" <<'PROGRAM'
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import penstock
import pytest

# Before any test can import the installed one.
spec = PathFinder.find_spec("penstock._native", [sys.argv[1]])
assert spec is not None, f"no _native in {sys.argv[1]}"
penstock._native = sys.modules["penstock._native"] = module_from_spec(spec)
spec.loader.exec_module(penstock._native)
sys.exit(pytest.main(sys.argv[2:]))
PROGRAM
