#!/bin/sh
# Everything there is for a machine with an NVIDIA GPU: build, tests, benchmarks. A step that fails takes no other
# along. Logs, records (STEP.json) and steps.txt, which says how each step ended, gather in $WORK; after every step all
# of it is packed into $OUT/gpu.tar.gz, so that whatever ends the run loses that step only.
# STEPS="build ops sdxl-taesd" runs only those; "sdxl" is all that begin so. On a machine with a time limit, LIMIT=590
# ends the run before so many seconds.
# Uses $PYTHON as it is and no network: torch, triton, pybind11, ninja, pytest and nvcc must be there; wheels of what
# else is missing (diffusers, jsonargparse) may lie in wheels/.
set -u
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
WORK=${WORK:-build/gpu}
STEPS=${STEPS:-wheels build kernels drawing ops heads memory world sdxl}
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"
for step in $STEPS; do
    case " wheels build kernels drawing ops heads memory world sdxl " in
    *" ${step%%-*} "*) ;;
    *)
        echo "gpu.sh: STEPS must be among wheels build kernels drawing ops heads memory world sdxl, got $step"
        exit 2
        ;;
    esac
done
began=$(date +%s)
failed=0
mkdir -p "$OUT" "$WORK"

wanted() {
    case " $STEPS " in *" $1 "* | *" ${1%%-*} "*) ;; *) return 1 ;; esac
}

pack() {
    tar -czf "$OUT/gpu.tar.gz.part" -C "$WORK" . && mv "$OUT/gpu.tar.gz.part" "$OUT/gpu.tar.gz"
}

ended() { # NAME HOW
    echo "$1 $2, $(($(date +%s) - began)) s after the start" >>"$WORK/steps.txt"
    [ "$2" = 0 ] || failed=1
    pack
}

run() { # NAME COMMAND...
    name=$1
    shift
    wanted "$name" || return
    left=$((${LIMIT:-86400} - 15 - $(date +%s) + began)) # 15: to end it and to pack
    if [ "$left" -le 0 ]; then
        echo "== $name: no time left"
        ended "$name" "no time left"
        return
    fi
    echo "== $name: $*"
    rm -f "$WORK/$name.json" # of an earlier run
    timeout -k 5 "$left" "$@" >"$WORK/$name.log" 2>&1
    code=$?
    tail -n 5 "$WORK/$name.log"
    ended "$name" $code
}

[ ! -d wheels ] || run wheels "$PYTHON" -m pip install --no-index --no-deps wheels/*.whl
run build "$PYTHON" setup.py build_ext --inplace
if ! "$PYTHON" -c "from nitrokernels import _native; assert _native.missing('cuda') is None, _native.missing('cuda')" \
    >"$WORK/native.log" 2>&1; then
    tail -n 1 "$WORK/native.log"
    echo "gpu.sh: the native library must have CUDA (nvcc on the PATH, and the step build once); nothing else is run"
    ended native 1
    exit 1
fi

parallel=
! "$PYTHON" -c "import xdist" >"$WORK/xdist.log" 2>&1 || parallel="-n 8 --dist worksteal"
gpu_tests() { # NAME FOLDER OPTION...: a file that cannot be imported takes no other along
    group=$1 folder=$2
    shift 2
    run "$group" "$PYTHON" -m pytest -q -m gpu --continue-on-collection-errors "$@" "$folder"
}
# shellcheck disable=SC2086
gpu_tests kernels tests/nitrokernels $parallel
gpu_tests drawing tests/nitrofusion
case " $STEPS " in *" ops"*)
    # the fewest shapes first: torch.compile takes seconds for each, and the time may end
    ops=$("$PYTHON" -c "
from collections import Counter
from benchmarks.ops import workloads
shapes = Counter(module.OP.name for module, _, _ in workloads())
print(*sorted(shapes, key=shapes.get))" 2>"$WORK/ops.log") || ended ops 1
    for op in $ops; do
        run "ops-$op" "$PYTHON" -m benchmarks.ops --op "$op" --dtype float32 bfloat16 --seconds 0.3 \
            --json "$WORK/ops-$op.json"
    done
    ;;
esac
run heads "$PYTHON" -m benchmarks.heads --json "$WORK/heads.json"
run memory "$PYTHON" -m benchmarks.memory_plan --device cuda --only world --json "$WORK/memory.json"
world() { # NAME VARIANT...: of a model a thousandth of SDXL's size
    name=$1
    shift
    run "$name" "$PYTHON" -m benchmarks.one_step --shape sdxl_tiny --cold_starts 0 --calls 40 --variant "$@" \
        --json "$WORK/$name.json"
}
world world nitrofusion_accelerate nitrofusion_modules nitrofusion_graph nitrofusion_graph_ops diffusers_taesd \
    nitrofusion_taesd_graph nitrofusion_taesd_graph_ops nitrofusion_taesd_fp8_graph nitrofusion_taesd_fp8_graph_ops

sdxl() { # NAME COLD_STARTS VARIANT...: each beside diffusers_eager
    group=$1 starts=$2
    shift 2
    run "sdxl-$group" "$PYTHON" -m benchmarks.one_step --shape sdxl --calls 40 --cold_starts "$starts" --threads 8 \
        --folder "$WORK-models" --variant "$@" --json "$WORK/sdxl-$group.json"
}
# 20 GB of disk. In groups for ten minutes and the GPU's memory; what torch.compile takes minutes for is last.
sdxl pipeline 1 nitrofusion_accelerate nitrofusion_modules nitrofusion_graph nitrofusion_graph_ops
sdxl taesd 1 diffusers_taesd nitrofusion_taesd_graph nitrofusion_taesd_graph_ops
sdxl fp8 1 nitrofusion_taesd_fp8_graph nitrofusion_taesd_fp8_graph_ops
world world-compile nitrofusion_taesd_fp8_compile diffusers_taesd_compile diffusers_compile
sdxl taesd_compile 0 diffusers_taesd_compile
sdxl fp8_compile 0 nitrofusion_taesd_fp8_compile
sdxl compile 0 diffusers_compile
exit $failed
