#!/usr/bin/env bash
# Makes .venv: a link to a virtual environment that all clones with the same requirements and the same Python share.
#
#   make setup                          a few minutes the first time, a second afterwards
#   PYTHON=python3.12 make setup        choose the interpreter
#   CORES_CACHE=/big/disk make setup    where environments live (default: ~/.cache/cores)
#
# The stamp `.complete` is written last, so an interrupted build is started over, and a lock lets parallel builds wait.
set -euo pipefail

readonly NEEDED_PYTHON=3.11 # the pinned numpy has no wheel for anything older
readonly NEEDED_GB=9        # 6 GB installed, 3 GB of downloads while pip unpacks them

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$NEEDED_PYTHON'.split('.'))))" 2>/dev/null
}

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON was not found; set it to a Python >= $NEEDED_PYTHON"
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but Python >= $NEEDED_PYTHON is needed"
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.11 python3.12 python3.13 python; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    fail "Python >= $NEEDED_PYTHON is needed, but python3 is $(python3 --version 2>&1 || true);" \
        "install a newer one and run: PYTHON=/path/to/python$NEEDED_PYTHON make setup"
}

check_disk() { # folder
    local free_gb
    free_gb=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    if ((free_gb < NEEDED_GB)); then
        fail "$1 has $free_gb GB free, but the environment needs $NEEDED_GB GB;" \
            "free some space or choose another disk: CORES_CACHE=/big/disk make setup"
    fi
}

build() { # python, environment
    echo "setup: building $2 (a few minutes, about 3 GB to download)" >&2
    rm -rf "$2"
    "$1" -m venv "$2" || fail "$1 cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"
    "$2/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        fail "pip could not install requirements.txt (see above); check the network and run make setup again"
    touch "$2/.complete"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(find_python)
cache=${CORES_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cores}
interpreter=$("$python" -c 'import platform, sys; print(sys.implementation.name, *sys.version_info[:3], platform.machine())')
hash=$({ cat requirements.txt && echo "$interpreter"; } | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])')
environment=$cache/venv-$hash

if [[ -e .venv && ! -L .venv ]]; then
    fail "$PWD/.venv is not a link made by this script; rename or remove it and run make setup again"
fi
mkdir -p "$cache" || fail "$cache cannot be created; choose another folder: CORES_CACHE=/big/disk make setup"

if [[ ! -e $environment/.complete ]]; then
    exec 9>"$environment.lock"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' # flock(1) is not everywhere; the shell keeps the lock
    if [[ ! -e $environment/.complete ]]; then                 # nobody built it while we waited
        check_disk "$cache"
        build "$python" "$environment"
    fi
fi
ln -sfn "$environment" .venv
