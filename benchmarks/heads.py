"""Discriminator heads, D and G step: nitrokernels against eager PyTorch and against the sgemm of equal FLOPs.

    python -m benchmarks.heads --threads 1 --json heads.json    # on a GPU where there is one: --device

Variants take turns inside one run, so a busy machine slows all alike; medians are of wall-clock time.
A D step is forward + gradients to the stacks, a G step forward + gradients to the maps; a D update is a D step + AdamW,
torch's own (as it comes, and fused) for the others. The eager loop owns its heads as separate tensors, as separate
modules would; the stacks hold the sampled rows only, so that none pays for idle ones.
All multiply in fp32: TF32 is off, for matrix products and for cuDNN, whose convolutions use it unless told otherwise.
A variant that fails is in the record's ``skipped`` with its reason.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nitrokernels import head_pool, indexed_adamw_, use
from nitrokernels.ops.head_pool import LevelParams
from nitrokernels.testing import map_tensors

from . import records
from .ops import synchronize, that_run


@dataclass(frozen=True)
class Workload:
    """Maps (channels, side) of the smallest input, and how its heads look; nitrofusion/pool.py sets the depths."""

    maps: tuple[tuple[int, int], ...]
    scales: tuple[int, ...]  # one input a task, its maps this many times larger
    batch: int
    heads: int
    width: int
    max_depth: int
    compiled: bool = False  # torch.compile of thirty small maps takes minutes
    on: str | None = None  # a device; None is any

    def make(self, device: str = "cpu") -> tuple:
        """Positional arguments of ``head_pool``; task t owns rows [t * heads, (t + 1) * heads)."""
        rows, params = len(self.scales) * self.heads, []
        for channels, side in self.maps:
            depth = max(1, min(self.max_depth, int(math.log2(side)) - 1))
            ins = [channels] + [self.width] * (depth - 1)
            params.append(
                LevelParams(
                    tuple(torch.randn(rows, self.width, c, 4, 4) * (16 * c) ** -0.5 for c in ins),
                    tuple(torch.ones(rows, self.width) for _ in ins),
                    tuple(torch.zeros(rows, self.width) for _ in ins),
                    torch.randn(rows, self.width) * self.width**-0.5,
                    torch.zeros(rows),
                )
            )
        features = [torch.randn(self.batch, c, k * s, k * s) for k in self.scales for c, s in self.maps]
        levels = list(range(len(self.maps))) * len(self.scales)
        index = torch.arange(rows).view(-1, 1, self.heads).expand(-1, len(self.maps), -1).reshape(-1, self.heads)
        args = features, levels, index, params, max(1, min(32, self.width // 8))
        return args if device == "cpu" else map_tensors(lambda t: t.to(device), args)


_SDXL = ((320, 32),) * 3 + ((320, 16),) + ((640, 16),) * 2 + ((640, 8),) + ((1280, 8),) * 3
_WORLD = ((48, 8),) * 3 + ((48, 4),) + ((64, 4),) * 2 + ((64, 2),) + ((96, 2),) * 3
_SDXL_WHOLE = tuple((channels, 4 * side) for channels, side in _SDXL)
WORKLOADS = {
    "sdxl quarter scale": Workload(_SDXL, (1,), batch=2, heads=4, width=64, max_depth=4, compiled=True),
    "world, 30 heads": Workload(_WORLD, (2, 1, 1), batch=32, heads=1, width=16, max_depth=2),
    "world, 480 heads": Workload(_WORLD, (2, 1, 1), batch=32, heads=16, width=16, max_depth=2),
    "sdxl, 30 heads": Workload(_SDXL_WHOLE, (1,), batch=5, heads=3, width=64, max_depth=4, compiled=True, on="cuda"),
}


def _head(x, conv, norm_weight, norm_bias, logit_weight, logit_bias, num_groups):
    for c, weight, bias in zip(conv, norm_weight, norm_bias, strict=True):
        x = F.silu(F.group_norm(F.conv2d(x, c, stride=2, padding=1), num_groups, weight, bias))
    return x.mean((2, 3)) @ logit_weight + logit_bias


def _parts(p: LevelParams) -> tuple:
    return p.conv, p.norm_weight, p.norm_bias, p.logit_weight, p.logit_bias


def _tensors(p: LevelParams) -> list[torch.Tensor]:
    return [*p.conv, *p.norm_weight, *p.norm_bias, p.logit_weight, p.logit_bias]


def eager_loop(args, channels_last: bool) -> tuple[Callable, list[torch.Tensor]]:
    """(forward, parameters) of one module-like head after the other."""
    features, levels, index, params, num_groups = args
    pick = lambda value, row: (  # noqa: E731
        tuple(t[row].detach().clone() for t in value) if isinstance(value, tuple) else value[row].detach().clone()
    )
    heads = [
        (entry, tuple(pick(part, row) for part in _parts(params[levels[entry]])))
        for entry, rows in enumerate(index.tolist())
        for row in rows
    ]
    if channels_last:
        last = lambda ts: tuple(t.contiguous(memory_format=torch.channels_last) for t in ts)  # noqa: E731
        heads = [(entry, (last(parts[0]), *parts[1:])) for entry, parts in heads]

    def forward(features):
        return torch.stack([_head(features[entry], *parts, num_groups) for entry, parts in heads], 1)

    return forward, [t for _, parts in heads for p in parts for t in (p if isinstance(p, tuple) else (p,))]


def vmapped(args) -> tuple[Callable, list[torch.Tensor]]:
    """The heads of each map through torch.func.vmap."""
    features, levels, index, params, num_groups = args
    every_head = torch.func.vmap(_head, in_dims=(None, 0, 0, 0, 0, 0, None), out_dims=1)

    def forward(features):
        rows = [params[level].rows(at) for level, at in zip(levels, index, strict=True)]
        return torch.cat([every_head(x, *_parts(p), num_groups) for x, p in zip(features, rows, strict=True)], 1)

    return forward, [t for p in params for t in _tensors(p)]


def stacked(args, backend: str) -> tuple[Callable, list[torch.Tensor]]:
    """head_pool itself on one backend; ``ref`` is the heads of a map concatenated."""

    def forward(features):
        with use(backend):
            return head_pool(features, *args[1:])

    return forward, [t for p in args[3] for t in _tensors(p)]


def sgemm(args) -> Callable[[], None]:
    """torch.mm of the FLOPs of a step: each conv as one matrix product forward and one backward."""
    features, levels, index, params, _ = args
    pairs = []
    for x, level in zip(features, levels, strict=True):
        height, width = x.shape[2:]
        for depth, conv in enumerate(params[level].conv):
            height, width = height // 2, width // 2
            heads, m, k = index.shape[1], len(x) * height * width, conv[0, 0].numel()
            products, n = (1, heads * len(conv[0])) if depth == 0 else (heads, len(conv[0]))
            pairs += [(torch.randn(m, k, device=x.device), torch.randn(k, n, device=x.device))] * products

    def run():
        for _ in range(2):
            for a, b in pairs:
                torch.mm(a, b)

    return run


def step(forward, parameters, features, kind: str, update: Callable | None = None) -> Callable[[], None]:
    """One D or G step; ``update`` takes the gradients of a D step."""
    asked = "maps" if kind == "G step" else "parameters"

    def run():
        for p in parameters:  # variants may share them
            p.requires_grad_(asked == "parameters")
        maps = [x.detach().requires_grad_(asked == "maps") for x in features]
        out = forward(maps)
        grads = torch.autograd.grad(out.sum(), parameters if asked == "parameters" else maps)
        if update is not None:
            update(grads)

    return run


def torch_adamw(parameters, fused: bool) -> Callable[[tuple], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.5, 0.99), fused=fused)

    def update(grads):
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        optimizer.step()

    return update


def rows_adamw(parameters, backend: str) -> Callable[[tuple], None]:
    """indexed_adamw_ of all rows of the stacks, which hold the sampled ones only."""
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    rows = [torch.arange(len(p), device=p.device) for p in parameters]
    steps = [torch.zeros(len(p), dtype=torch.int64, device=p.device) for p in parameters]

    def update(grads):
        with use(backend):
            indexed_adamw_(
                parameters, grads, first, second, steps, rows,
                lr=1e-4, beta1=0.5, beta2=0.99, eps=1e-8, weight_decay=0.01,
            )  # fmt: skip

    return update


def ours(args) -> tuple[str, ...]:
    """The backends of head_pool where the maps are."""
    return ("cuda", "triton") if args[0][0].is_cuda else ("cpu",)


def updates(args) -> dict[str, Callable[[], None]]:
    """D updates: the loop and the stacks with torch's AdamW, ours with its own."""
    loop, vmap, concatenated = eager_loop(args, False), vmapped(args), stacked(args, "ref")
    pools = {backend: stacked(args, backend) for backend in ours(args)}
    adamw = ours(args)[-1]  # there is none in CUDA C++
    with_adamw = lambda pair, update: step(*pair, args[0], "D update", update)  # noqa: E731
    return {
        "eager_loop": with_adamw(loop, torch_adamw(loop[1], False)),
        "eager_loop_fused_adamw": with_adamw(loop, torch_adamw(loop[1], True)),
        "concatenated_fused_adamw": with_adamw(concatenated, torch_adamw(concatenated[1], True)),
        "vmap_fused_adamw": with_adamw(vmap, torch_adamw(vmap[1], True)),
        "sgemm": sgemm(args),
        **{f"nitrokernels_{b}": with_adamw(pool, rows_adamw(pool[1], adamw)) for b, pool in pools.items()},
    }


def variants(args, kind: str, with_compile: bool) -> dict[str, Callable[[], None]]:
    if kind == "D update":
        return updates(args)
    last = [x.contiguous(memory_format=torch.channels_last) for x in args[0]]
    runs = {
        "eager_loop": step(*eager_loop(args, False), args[0], kind),
        "eager_loop_channels_last": step(*eager_loop(args, True), last, kind),
        "concatenated": step(*stacked(args, "ref"), args[0], kind),
        "concatenated_channels_last": step(*stacked(args, "ref"), last, kind),
        "vmap": step(*vmapped(args), args[0], kind),
        "sgemm": sgemm(args),
        **{f"nitrokernels_{backend}": step(*stacked(args, backend), args[0], kind) for backend in ours(args)},
    }
    if with_compile:
        forward, parameters = stacked(args, "ref")
        runs["compile"] = step(torch.compile(forward), parameters, args[0], kind)
    return runs


def measure(name: str, workload: Workload, device: str, threads: int, repeats: int, with_compile: bool):
    """Yields (a row per variant, what was skipped and why) of each step; ratios are > 1 where the variant is faster."""
    args = workload.make(device)
    for kind in ("D step", "G step", "D update"):
        shape = f"{name}, {kind}"
        runs, failed = that_run(variants(args, kind, with_compile), device)  # which warms up, too
        times: dict[str, list[float]] = {variant: [] for variant in runs}
        for _ in range(repeats):
            for variant, run in runs.items():
                start = time.perf_counter()
                run()
                synchronize(device)
                times[variant].append((time.perf_counter() - start) * 1e3)
        median = {variant: statistics.median(t) for variant, t in times.items()}
        loop = min((value for variant, value in median.items() if variant.startswith("eager_loop")), default=None)
        references = {"ratio_to_eager_loop": loop, "ratio_to_sgemm": median.get("sgemm")}
        rows = []
        for variant, value in median.items():
            rows.append(
                {
                    "shape": shape,
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "threads": threads,
                    "load_average": round(os.getloadavg()[0], 2),
                    "variant": variant,
                    "median_ms": round(value, 3),
                    **{ratio: round(base / value, 3) if base else None for ratio, base in references.items()},
                }
            )
            print("{shape:28} {variant:27} {median_ms:9.2f} ms  {ratio_to_eager_loop!s:>6}x loop  "
                  "{ratio_to_sgemm!s:>6}x sgemm".format(**rows[-1]), flush=True)  # fmt: skip
        skipped = [{"shape": shape, "variant": variant, "reason": reason} for variant, reason in failed.items()]
        for row in skipped:
            print("{shape:28} {variant:27} {reason}".format(**row), flush=True)
        yield rows, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=records.count, default=1)
    parser.add_argument("--repeats", type=records.count, default=11)
    parser.add_argument("--json", type=records.output)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the concatenated heads out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    record = {"machine": records.machine(options.threads), "rows": [], "skipped": []}
    for name, workload in WORKLOADS.items():
        if workload.on not in (None, options.device):
            continue
        compiled = workload.compiled and not options.no_compile
        for rows, skipped in measure(name, workload, options.device, options.threads, options.repeats, compiled):
            record["rows"] += rows
            record["skipped"] += skipped
            records.write(options.json, record)


if __name__ == "__main__":
    main()
