#!/usr/bin/env bash
# What a GPU says of this program, in ten minutes: benchmarks/gpu_check.py, with the flags given here.
#
#   scripts/gpu_check.sh                        on a machine with .venv or with the packages in `python3`
#   scripts/gpu_check.sh --minutes 4 --only step answer
#   WHEELS=wheels scripts/gpu_check.sh          packages that lack there, for a machine without a network
#
# For WHEELS, fill a folder elsewhere, for the Python of the machine (pip builds what is no wheel yet):
#   python3 -m pip wheel --no-deps -w wheels segment-anything==1.0 pycocotools==2.0.11 deepspeed==0.19.8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
if [[ -n "${WHEELS:-}" ]]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$packages" "$WHEELS"/*.whl
    export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m benchmarks.gpu_check "$@"
