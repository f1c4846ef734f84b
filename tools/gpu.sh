#!/bin/sh
# Everything there is for a machine with an NVIDIA GPU: build, tests, benchmarks. A step that fails takes no other along;
# what each prints and its records go to $OUT, and steps.txt there says how each ended. STEPS="build ops" runs only those.
# Uses $PYTHON as it is and no network: torch, triton, pybind11, ninja, pytest and nvcc must be there; wheels of what else
# is missing (diffusers, jsonargparse) may lie in wheels/.
set -u
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
STEPS=${STEPS:-wheels build kernels drawing ops heads world sdxl}
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
failed=0
mkdir -p "$OUT"

run() {
    name=$1
    shift
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    echo "== $name: $*"
    "$@" >"$OUT/$name.log" 2>&1
    code=$?
    tail -n 5 "$OUT/$name.log"
    echo "$name $code" >>"$OUT/steps.txt"
    [ "$code" -eq 0 ] || failed=1
}

[ ! -d wheels ] || run wheels "$PYTHON" -m pip install --no-index --no-deps wheels/*.whl
run build "$PYTHON" setup.py build_ext --inplace
run kernels "$PYTHON" -m pytest -q -m gpu tests/nitrokernels
run drawing "$PYTHON" -m pytest -q -m gpu tests/nitrofusion
run ops "$PYTHON" -m benchmarks.ops --dtype float32 bfloat16 --json "$OUT/ops-gpu.json"
run heads "$PYTHON" -m benchmarks.heads --json "$OUT/heads-gpu.json"
run world "$PYTHON" -m benchmarks.one_step --shape sdxl_tiny --json "$OUT/one-step-sdxl-tiny.json"
# 20 GB of disk and, for torch.compile's max-autotune, patience.
run sdxl "$PYTHON" -m benchmarks.one_step --shape sdxl --calls 40 --cold_starts 1 --threads 8 --json "$OUT/one-step-sdxl.json"
exit $failed
