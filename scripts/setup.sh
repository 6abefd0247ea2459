#!/usr/bin/env bash
# Makes .venv and installs penstock into it. A second run with unchanged inputs touches no network.
#   TORCH_INDEX=URL   an extra package index for torch, e.g. PyTorch's CPU builds
#   PYTHON=python3.12 the interpreter to use
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.penstock-setup
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum) ${TORCH_INDEX:-} $(pwd)"
if [ -x .venv/bin/penstock ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
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

if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    if [ -z "$python" ]; then
        found="$("${PYTHON:-python3}" --version 2>/dev/null || echo none)"
        fail "penstock needs Python 3.11 or newer (${PYTHON:-python3}: $found); install one, or name it: make setup PYTHON=..."
    fi
    if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        fail "$python has no venv module; on Debian or Ubuntu: apt install python$version-venv"
    fi
fi

echo "Setting up penstock in .venv: some two minutes on a usual connection."
if [ -n "${TORCH_INDEX:-}" ]; then
    echo "  With torch from $TORCH_INDEX."
    echo "  Its CPU build means 0.3 GB of download and 1.4 GB of disk in all, a CUDA build several GB."
elif [ "$(uname -s)" = Linux ]; then
    echo "  PyPI's torch for Linux brings CUDA: several GB. The CPU build means 0.3 GB of download and 1.4 GB of disk in all:"
    echo "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
fi
free_mb="$(df -Pm . | awk 'NR == 2 { print $4 }')"
if [ "$free_mb" -lt 1800 ]; then
    echo "  warning: only $free_mb MB of disk are free here" >&2
fi

started=$(date +%s)
if [ -n "${python:-}" ]; then
    "$python" -m venv --clear .venv || fail "could not create .venv with $python"
    echo "  .venv made with $("$python" --version)"
fi
index=()
if [ -n "${TORCH_INDEX:-}" ]; then
    index=(--extra-index-url "$TORCH_INDEX")
fi
log=.venv/setup.log
# The whole of pip's output goes to the log; what takes long and what went wrong is shown.
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt ${index[@]+"${index[@]}"} \
    -e '.[dev]' 2>&1 | tee "$log" | awk '
        /^ *Downloading / && /[MG]B\)/ {
            n = split($2, path, "/"); split(path[n], name, "-"); size = $(NF - 1) " " $NF; gsub(/[()]/, "", size)
            if (size ~ /GB/ || size + 0 >= 10) { print "  downloading " name[1] " " name[2] ", " size; fflush() }
        }
        /^Installing collected/ { print "  installing"; fflush() }
        /^ *(ERROR|error)/ { print "  " $0 > "/dev/stderr"; fflush() }'; then
    fail "pip could not install penstock; the whole story is in $log"
fi
if ! command -v c++ >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1 && ! command -v clang++ >/dev/null 2>&1; then
    echo "  note: no C++ compiler found; penstock runs without one, native kernels cannot be built here"
fi
echo "$wanted" > $stamp
echo "Ready after $(($(date +%s) - started)) s. Next: make serve, or .venv/bin/penstock --help"
