#!/usr/bin/env bash
# Makes .venv: a link to a virtual environment that all clones with the same requirements and the same Python share.
#
#   make setup                          a few minutes the first time, a second afterwards
#   scripts/setup.sh app                .venv-app, too: the same with what the page needs
#   PYTHON=python3.12 make setup        choose the interpreter
#   CORES_CACHE=/big/disk make setup    where environments live (default: ~/.cache/cores)
#
# The page's packages ask for other versions of some that are pinned, so they have an environment of their own, which takes the rest
# from the shared one. The stamp `.complete` is written last, so an interrupted build is started over, and a lock lets parallel builds wait.
set -euo pipefail

readonly NEEDED_PYTHON=3.11 # the pinned numpy has no wheel for anything older
readonly NEEDED_GB=9        # 6 GB installed, 3 GB of downloads while pip unpacks them
readonly PAGE_GB=1

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

check_disk() { # folder, GB
    local free_gb
    free_gb=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    if ((free_gb < $2)); then
        fail "$1 has $free_gb GB free, but the environment needs $2 GB;" \
            "free some space or choose another disk: CORES_CACHE=/big/disk make setup"
    fi
}

new_environment() { # python, environment
    rm -rf "$2"
    "$1" -m venv "$2" || fail "$1 cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"
}

install() { # environment, what pip is to install …
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" ||
        fail "pip could not install ${*: -1} (see above); check the network and run this again"
    touch "$1/.complete"
}

build() { # environment
    echo "setup: building $1 (a few minutes, about 3 GB to download)" >&2
    new_environment "$python" "$1"
    install "$1" -r requirements.txt
}

build_page() { # environment
    echo "setup: building $1 for the page (a minute)" >&2
    new_environment "$python" "$1"
    local packages
    packages=$("$python" -c 'import sys; print("lib/python%d.%d/site-packages" % sys.version_info[:2])')
    mkdir -p "$1/$packages"
    echo "$environment/$packages" >"$1/$packages/shared.pth" # read after the environment's own packages
    install "$1" "$page"
}

ensure() { # environment, GB, what builds it
    [[ -e $1/.complete ]] && return
    exec 9>"$1.lock"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' # flock(1) is not everywhere; the shell keeps the lock
    [[ -e $1/.complete ]] && return                            # somebody built it while we waited
    check_disk "$cache" "$2"
    "$3" "$1"
}

name_of() { # what is to be installed, on standard input
    { cat && echo "$interpreter"; } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])'
}

refuse_folder() { # link
    if [[ -e $1 && ! -L $1 ]]; then
        fail "$PWD/$1 is not a link made by this script; rename or remove it and run this again"
    fi
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(find_python)
cache=${CORES_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cores}
interpreter=$("$python" -c 'import platform, sys; print(sys.implementation.name, *sys.version_info[:3], platform.machine())')
environment=$cache/venv-$(name_of <requirements.txt)

refuse_folder .venv
refuse_folder .venv-app
mkdir -p "$cache" || fail "$cache cannot be created; choose another folder: CORES_CACHE=/big/disk make setup"
ensure "$environment" "$NEEDED_GB" build
ln -sfn "$environment" .venv

case "${1:-}" in
"") ;;
app)
    page=$(grep '^gradio' requirements-optional.txt)
    page_environment=$cache/venv-$({ cat requirements.txt && echo "$page"; } | name_of)-app
    ensure "$page_environment" "$PAGE_GB" build_page
    ln -sfn "$page_environment" .venv-app
    ;;
*) fail "there is no '$1' to set up; give app, or nothing" ;;
esac
