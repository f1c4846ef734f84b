"""Every op at full size, every backend beside eager PyTorch and torch.compile; ``benchmarks.ops`` interleaves them."""

import pytest
import torch

from .ops import synchronize, variants, workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("eager", "compile", "nitrokernels_cuda", "nitrokernels_triton", "nitrokernels_cpu")
CALLS = [
    pytest.param(module, case, backward, id=f"{module.OP.name} {shape} forward{' + backward' * backward}")
    for module, shape, case in workloads()
    for backward in ((False, True) if case.grads else (False,))
]


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module, case, backward", CALLS)
def test_op(benchmark, module, case, backward, variant, request):
    benchmark.group = request.node.callspec.id.removesuffix(f"-{variant}")
    runs, skipped = variants(module, case, torch.float32, DEVICE, backward, compiled=variant == "compile")
    if variant not in runs:
        pytest.skip(skipped.get(variant, f"{module.OP.name} has no {variant} here"))

    def run():
        runs[variant]()
        synchronize(DEVICE)

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
