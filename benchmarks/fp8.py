"""What fp8 costs in quality, emulated on any machine; speed is ``benchmarks.one_step``'s, on a GPU.

    python -m benchmarks.fp8 --json fp8.json --pictures fp8.png

``x0`` is the relative L2 error of each step's x0 against fp32 from the same x_t and prompt, on the world's student and
on ``shapes.sdxl30m``. ``world`` is ``evaluate_world`` of the student, the same prompts and noises for every variant.

    fp32       the reference
    bf16       the whole UNet in bf16
    fp8        linears of transformer blocks in fp8, the rest in bf16
    fp8_ff_out the same, the layer behind each gate left in bf16
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch

from nitrofusion import sampling, schedule
from nitrofusion.engine import load, pipeline
from nitrofusion.engine.calibrate import calibrate
from nitrofusion.engine.modules import Modules
from nitrofusion.evaluate.world import evaluate_world
from nitrofusion.models import fp8, sdxl
from nitrofusion.models.conditioning import Conditioning, denoise

from . import records
from .one_step import prompts
from .records import machine
from .shapes import POOLED, SDXL30M, TOKENS, sdxl30m

VARIANTS: dict[str, tuple[str, ...] | None] = {"fp32": None, "bf16": None, "fp8": (), "fp8_ff_out": (".ff.net.2",)}
SHIFT = 500


def world(folder: Path) -> dict[str, Modules]:
    """The world's student in every variant."""
    made = {}
    for name, skip in VARIANTS.items():
        dtype, file = torch.float32 if name == "fp32" else torch.bfloat16, None
        if skip is not None:
            file = folder / f"{name}.json"
            calibrate("world", file, skip=skip, device="cpu")
        made[name] = load("world", "cpu", dtype, backend="ref", fp8=file).executor
    return made


def random_unets(seed: int = 0) -> dict[str, torch.nn.Module]:
    """``sdxl30m`` in every variant; its scales come from embeddings and noises that the errors are not measured on."""
    made, plain = {}, sdxl30m()
    for name, skip in VARIANTS.items():
        unet = copy.deepcopy(plain)
        if skip is not None:
            with torch.inference_mode(), fp8.Observer(plain, skip) as observer:
                for i in range(4):
                    x_t, cond = inputs(1000 + i)
                    for _ in steps(lambda x, t, c, i: denoise(plain, x, t, c), x_t, cond, 4, 1000 + i):
                        pass
            unet = unet.bfloat16()
            unet.fp8 = fp8.quantize_(unet, observer.calibration(4), True, "sdxl30m")
        made[name] = unet if name == "fp32" else unet.bfloat16() if skip is None else unet
    return made


def inputs(seed: int) -> tuple[torch.Tensor, Conditioning]:
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(1, 4, 32, 32, generator=g)
    embeds = torch.randn(1, TOKENS, SDXL30M["cross_attention_dim"], generator=g)
    time_ids = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    return x_t, Conditioning(embeds, torch.randn(1, POOLED, generator=g), time_ids)


def steps(call, noise: torch.Tensor, cond: Conditioning, count: int, seed: int):
    """x0 after each step of a student's trajectory."""
    g, alphas = torch.Generator().manual_seed(seed), schedule.make_alphas_cumprod()
    fresh = lambda: torch.randn(noise.shape, generator=g)  # noqa: E731
    return sampling.student_steps(call, noise, cond, alphas, schedule.origin_timesteps(count), SHIFT, fresh)


def x0_errors(calls: dict, cases: list[tuple[torch.Tensor, Conditioning]], count: int) -> list[dict]:
    """For each step {timestep, variant: relative error of x0}: every variant is asked at the fp32 trajectory's x_t."""
    alphas, rows = schedule.make_alphas_cumprod(), []
    told: dict[int, dict[str, list[float]]] = {}

    def call(x_t, t, cond, step):
        eps = {name: each(x_t, t, cond).float() for name, each in calls.items()}
        exact = schedule.to_x0(x_t, eps["fp32"], t, alphas)
        for name in calls:
            error = (schedule.to_x0(x_t, eps[name], t, alphas) - exact).norm() / exact.norm()
            told.setdefault(int(t[0]), {}).setdefault(name, []).append(float(error))
        return eps["fp32"]

    for i, (noise, cond) in enumerate(cases):
        for _ in steps(call, noise, cond, count, i):
            pass
    for t, errors in told.items():
        means = {name: float(f"{sum(e) / len(e):.3g}") for name, e in errors.items() if name != "fp32"}
        rows.append({"steps": count, "timestep": t} | means)
    return rows


def drawer(networks: Modules, count: int):
    """A ``draw`` for ``evaluate_world``: the same fp32 noises whatever the precision."""

    def draw(texts: list[str], seeds: list[int]) -> torch.Tensor:
        generators = sampling.seed_generators(seeds)
        noises = torch.stack([sampling.randn((4, 16, 16), generators) for _ in range(count)])
        ids, time_ids = sdxl.tokenize(networks.model, texts), networks.model.time_ids(len(texts))
        with torch.inference_mode():
            embeds, pooled = sdxl.embed_tokens(networks.model, ids)
            timesteps = tuple(schedule.origin_timesteps(count))
            return pipeline.draw(networks, timesteps, SHIFT, noises, time_ids, embeds, pooled).pixels

    return draw


def measure(folder: Path, num_images: int, cases: int, pictures: Path | None) -> dict:
    """The whole record; prints a line per figure."""
    executors, record = world(folder), {"machine": machine(torch.get_num_threads()), "x0": [], "world": []}
    exact = executors["fp32"].model
    texts = prompts(cases)
    with torch.inference_mode():
        told = [sdxl.encode_prompt(exact, [text]) for text in texts]
        noises = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(cases)]

        def through(networks):
            def call(x_t, t, cond):
                parts = (cond.prompt_embeds, cond.pooled_prompt_embeds)
                own = Conditioning(*(p.to(networks.dtype) for p in parts), cond.time_ids)
                return networks.denoise(x_t, t, own, None)

            return call

        def through_unet(unet):
            def call(x_t, t, cond):
                if hasattr(unet, "fp8"):
                    unet.fp8.select(t)
                dtype = unet.conv_in.weight.dtype
                parts = (cond.prompt_embeds.to(dtype), cond.pooled_prompt_embeds.to(dtype), cond.time_ids)
                return denoise(unet, x_t.to(dtype), t, Conditioning(*parts))

            return call

        models = {
            "world": ({n: through(e) for n, e in executors.items()}, list(zip(noises, told, strict=True))),
            "sdxl30m": ({n: through_unet(u) for n, u in random_unets().items()}, [inputs(i) for i in range(cases)]),
        }
        for model, (calls, given) in models.items():
            for count in (1, 4):
                rows = [{"model": model} | row for row in x0_errors(calls, given, count)]
                record["x0"] += rows
                print(*rows, sep="\n", flush=True)
    for count in (1, 4):
        for name, networks in executors.items():
            result = evaluate_world(drawer(networks, count), num_images, num_inference_steps=count)
            record["world"].append({"variant": name} | result)
            print(name, count, *(f"{k} {result[k]:.4f}" for k in ("accuracy", "frechet", "sharpness")), flush=True)
    if pictures is not None:
        _grid(executors, prompts(8), pictures)
    return record


def _grid(executors: dict[str, Modules], texts: list[str], path: Path) -> None:
    """Rows are variants at 1 step, then at 4; columns are prompts."""
    from PIL import Image

    rows = [drawer(e, count)(texts, list(range(8))) for count in (1, 4) for e in executors.values()]
    levels = ((torch.stack(rows) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    tiles = levels.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(tiles.numpy()).resize((tiles.shape[1] * 4, tiles.shape[0] * 4), Image.NEAREST).save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=records.count, default=500)
    parser.add_argument("--cases", type=records.count, default=16, help="prompts and noises of the x0 errors")
    parser.add_argument("--json", type=records.output, help="file to write")
    parser.add_argument("--pictures", type=records.output, help="PNG of eight prompts in every variant, 1 step and 4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder), args.num_images, args.cases, args.pictures)
    records.write(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
