#!/bin/sh
# Creates $VENV and installs the package with the versions in $CONSTRAINTS; does nothing when that was done before.
# PyTorch first: CUDA's only where there is an NVIDIA GPU, else the CPU build, and never gigabytes by surprise.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
CONSTRAINTS=${CONSTRAINTS:-constraints.txt} # versions to install
TORCH=$(sed -n 's/^torch==//p' "$CONSTRAINTS")
CPU_INDEX=https://download.pytorch.org/whl/cpu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: Python must be >= 3.11, got $("$PYTHON" --version 2>&1)" >&2
    exit 2
}
want=$(find pyproject.toml setup.py "$CONSTRAINTS" tools/install.sh csrc -type f | sort | xargs cat | cksum)
[ "$(cat "$VENV/.installed" 2>/dev/null || true)" = "$want" ] && exit 0
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "install: an NVIDIA GPU is here, installing PyTorch with CUDA"
        pip install -q "torch>=2.10"
    elif [ "$(uname -s)" != Linux ]; then
        pip install -q "torch==$TORCH" # only Linux wheels bring CUDA along
    else
        # What would pip take? A CPU build names no nvidia or cuda package among its needs.
        report=$(mktemp)
        pip install -q --dry-run --ignore-installed --report "$report" "torch==$TORCH" >/dev/null 2>&1 || : >"$report"
        if [ -s "$report" ] && ! grep -qiE '"name": "(nvidia-|cuda-|triton)' "$report"; then
            echo "install: PyTorch $TORCH, CPU build"
            pip install -q "torch==$TORCH"
        else
            echo "install: PyTorch $TORCH, CPU build from $CPU_INDEX"
            pip install -q --index-url "$CPU_INDEX" "torch==$TORCH" || {
                echo "install: no CPU build of PyTorch $TORCH is offered here; install torch>=2.10 into $VENV yourself" >&2
                echo "install: ($VENV/bin/python -m pip install torch) and run this again" >&2
                exit 2
            }
        fi
        rm -f "$report"
    fi
fi
echo "install: nitrofusion and what it needs"
if "$VENV/bin/python" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("'"$TORCH"'"))'; then
    constraints=$CONSTRAINTS
else # another torch was here first: keep it
    constraints=$VENV/constraints.txt
    grep -v '^torch==' "$CONSTRAINTS" >"$constraints"
fi
pip install -q -c "$constraints" -e '.[dev,train]'
printf '%s\n' "$want" >"$VENV/.installed"
