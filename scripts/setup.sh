#!/usr/bin/env bash
# Makes .venv, installs penstock into it and compiles its native library. A second run with unchanged inputs does
# nothing; after a change under native/, or of the compiler, it only compiles, which needs no network.
#   TORCH_INDEX=URL   an extra package index for torch, e.g. PyTorch's CPU builds
#   PYTHON=python3.12 the interpreter to use
#   CXX=g++-13        the compiler to use
set -euo pipefail
cd "$(dirname "$0")/.."

first_of() {
    local name
    for name in "$@"; do
        if command -v "$name"; then return; fi
    done
}

# Two stamps, because a changed kernel is no reason to ask a package index anything.
stamp=.venv/.penstock-setup native_stamp=.venv/.penstock-native
compiler="${CXX:-$(first_of c++ g++ clang++)}"
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum) ${TORCH_INDEX:-} $(pwd)"
native_wanted="$compiler
$(cksum native/CMakeLists.txt native/src/*)"
if [ -x .venv/bin/penstock ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    if [ "$(cat $native_stamp 2>/dev/null)" = "$native_wanted" ]; then
        exit 0
    fi
    installed=yes
fi

fail() { echo "setup: $*" >&2; exit 1; }

# The first Python from 3.11 on that really runs: names on PATH may be shims of versions that are not installed.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        if new_enough "$PYTHON"; then echo "$PYTHON"; fi
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.14 python "$HOME"/.pyenv/versions/3.1[1-4]*/bin/python3; do
        if command -v "$name" >/dev/null 2>&1 && new_enough "$name"; then
            echo "$name"
            return
        fi
    done
}

pip_install() { .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@" 2>&1; }

make_environment() {
    local python="" found version free_mb index=()
    if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1
    then
        python="$(find_python)"
        if [ -z "$python" ]; then
            found="$("${PYTHON:-python3}" --version 2>/dev/null || echo none)"
            fail "penstock needs Python 3.11 or newer (${PYTHON:-python3}: $found);" \
                "install one, or name it: make setup PYTHON=..."
        fi
        if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
            fail "$python has no venv module; on Debian or Ubuntu: apt install python$version-venv"
        fi
    fi

    echo "Setting up penstock in .venv: some two minutes on a usual connection."
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "  With torch from $TORCH_INDEX."
        echo "  Its CPU build means 0.3 GB of download and 1.5 GB of disk in all, a CUDA build several GB."
    elif [ "$(uname -s)" = Linux ]; then
        echo "  PyPI's torch for Linux brings CUDA: several GB. The CPU build means 0.3 GB of download, 1.5 GB of disk:"
        echo "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    fi
    free_mb="$(df -Pm . | awk 'NR == 2 { print $4 }')"
    if [ "$free_mb" -lt 1900 ]; then
        echo "  warning: only $free_mb MB of disk are free here" >&2
    fi

    if [ -n "$python" ]; then
        "$python" -m venv --clear .venv || fail "could not create .venv with $python"
        echo "  .venv made with $("$python" --version)"
    fi
    if [ -n "${TORCH_INDEX:-}" ]; then
        index=(--extra-index-url "$TORCH_INDEX")
    fi
    # The constraints hold for pip's temporary build environment too: pips before 25.3 take them from the first
    # variable, later ones from the second. compile_library builds the library, with a log of its own.
    # The whole of pip's output goes to the log; what takes long and what went wrong is shown.
    if ! PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
        pip_install ${index[@]+"${index[@]}"} -e '.[dev]' \
        --config-settings=wheel.cmake=false --config-settings=wheel.py-api=py3 \
        | tee .venv/setup.log | awk '
            /^ *Downloading / && /[MG]B\)/ {
                n = split($2, path, "/"); split(path[n], name, "-"); size = $(NF - 1) " " $NF; gsub(/[()]/, "", size)
                if (size ~ /GB/ || size + 0 >= 10) { print "  downloading " name[1] " " name[2] ", " size; fflush() }
            }
            /^Installing collected/ { print "  installing"; fflush() }
            /^ *(ERROR|error)/ { print "  " $0 > "/dev/stderr"; fflush() }'
    then
        fail "pip could not install penstock; the whole story is in .venv/setup.log"
    fi
}

# Compiles what has changed. penstock works without the library, so that a failure is told and no more.
compile_library() {
    local log=.venv/native.log without="penstock runs without its native kernels, slower on a CPU"
    # CMake remembers the compiler, the Python and the folder that it once found.
    if [ -z "${installed:-}" ] || [ "$(head -n 1 $native_stamp 2>/dev/null)" != "$compiler" ]; then
        rm -rf build/native-*
    fi
    if [ -n "$compiler" ]; then
        echo "  compiling the native kernels"
    fi
    # Also without a compiler: a library of older sources must not stay.
    pip_install -v --no-index --no-deps --no-build-isolation -e . >$log || true
    if .venv/bin/python -c 'import penstock._native' >>$log 2>&1; then
        return
    elif [ -z "$compiler" ]; then
        echo "  note: no C++ compiler found; $without"
    else
        grep -m 3 -E ' error: |CMake Error' $log | sed 's/^ */    /' >&2 || true
        echo "  note: $compiler could not compile the native kernels, see $log; $without"
    fi
}

started=$(date +%s)
if [ -z "${installed:-}" ]; then
    rm -f $stamp $native_stamp
    make_environment
    echo "$wanted" >$stamp
fi
compile_library
echo "$native_wanted" >$native_stamp
echo "Ready after $(($(date +%s) - started)) s. Next: make serve, or .venv/bin/penstock --help"
