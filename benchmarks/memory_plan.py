"""The memory plan against measured peaks: bytes that PyTorch's allocator reports of a training step, at small sizes.

    python -m benchmarks.memory_plan --json memory.json

Each case is a process of its own. What lies in memory between steps is summed over the storages of all tensors alive;
what a step adds is the highest running total of the profiler's allocator events; on a GPU its allocator knows both.
Neither is what the plan counts with.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nitrofusion import data
from nitrofusion.config import TrainConfig
from nitrofusion.pool import PoolConfig
from nitrofusion.presets import MODELS, RUNS
from nitrofusion.train.memory import device_bytes, disk_bytes, host_bytes, samples_bytes
from nitrofusion.train.plan import plan, use_backend
from nitrofusion.train.rehearse import meta_unet, sample_flops

from . import records
from .shapes import SDXL, TEXT, VAE


def alive() -> list[torch.Tensor]:
    """Tensors with numbers that anything in this process holds."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]


def bytes_of(tensors: list[torch.Tensor], besides: list[torch.Tensor]) -> int:
    """Of the storages of ``tensors`` that no tensor of ``besides`` lies on."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes[key] for key in sizes.keys() - {t.untyped_storage().data_ptr() for t in besides})


def peak_of(call, device: str = "cpu") -> int:
    """Highest running total of the allocator's events while ``call`` runs."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(config: TrainConfig) -> dict:
    """Bytes of a training step of ``config`` on its device, and what its plan says."""
    from nitrofusion.train.loop import Trainer

    planned, others = plan(config), alive()  # held from here on, so that no address is used again
    cuda = config.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    trainer = Trainer(config)
    with use_backend(config):
        trainer._train_step()  # makes the optimizers' state
        between = torch.cuda.memory_allocated() - before if cuda else bytes_of(alive(), others)
        peak = peak_of(trainer._train_step, config.device)
    measured = between + peak
    phases = [phase.name for phase in trainer.recipe.phases]
    step = max(planned["moments_bytes"][name] for name in phases)
    stays = (
        planned["memory_total_bytes"] - planned["memory_bytes"]["gradients"] - planned["memory_bytes"]["activations"]
    )
    return {
        "planned_bytes": stays + step,
        "measured_bytes": measured,
        "ratio": (stays + step) / measured,
        "planned_between_steps": stays,
        "measured_between_steps": between,
        "planned_step": step,
        "measured_step": peak,
        "step_ratio": step / peak,
        "planned_moments": planned["moments_bytes"],
        "planned": planned["memory_bytes"],
        "process_peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def wide_folder(folder: Path, factor: int = 2) -> Path:
    """The world's teacher with ``factor`` times its channels, untrained."""
    from diffusers import UNet2DConditionModel

    world = Path(MODELS["world-teacher"].folder)
    folder.mkdir()
    for item in world.iterdir():
        if item.name != "unet":
            (folder / item.name).symlink_to(item.resolve())
    values = json.loads((world / "unet" / "config.json").read_text())
    channels = [factor * c for c in values["block_out_channels"]]
    UNet2DConditionModel.from_config(values | {"block_out_channels": channels}).save_pretrained(folder / "unet")
    return folder


def cases(folder: Path, device: str) -> dict[str, TrainConfig]:
    """Sizes and ways of training, by name."""
    from tests.nitrofusion.tiny import tiny_folder

    base = dataclasses.replace(
        RUNS["world"], init=None, num_teacher_samples=64, teacher_steps=1, device=device, images=None,
        discriminator_warmup=0, accumulation=2,
    )  # fmt: skip
    tiny = dataclasses.replace(
        base, teacher=str(tiny_folder(folder / "tiny")), batch_size=4, pool=PoolConfig(width=8, max_depth=2)
    )
    wide = dataclasses.replace(base, teacher=str(wide_folder(folder / "wide")), batch_size=8)
    sizes = {"tiny, batch 4": tiny, "world, batch 32": base, "wide, batch 8": wide}
    ways = {
        "full": {},
        "lora": {"lora_rank": 8},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"precision": "bf16"},
        "eager": {"backend": "ref"},
        "eager, bf16": {"precision": "bf16", "backend": "ref"},
        "eager, bf16, checkpointing": {"precision": "bf16", "backend": "ref", "gradient_checkpointing": True},
    }
    made = {}
    for size, config in sizes.items():
        for way, changes in ways.items():
            if way.startswith(("bf16", "eager")) and config is not base:
                continue
            name = f"{size}, {way}"
            cache = str(folder / f"samples of {size}, {changes.get('precision', config.precision)}")
            output = str(folder / name.replace(", ", "-").replace(" ", "-"))
            made[name] = dataclasses.replace(config, output=output, cache=cache, **changes)
    return made


def sdxl_folder(folder: Path) -> Path:
    """SDXL's shapes as a pipeline folder whose weight files have headers and holes: nothing can be drawn with it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    world = Path(MODELS["world-teacher"].folder)
    folder.mkdir()
    for item in world.iterdir():
        if item.name not in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer"):
            (folder / item.name).symlink_to(item.resolve())
    shutil.copytree(world / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL)
        vae = AutoencoderKL(**VAE)
        encoders = {}
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        for (name, kind), (width, layers, heads, act) in zip(kinds.items(), TEXT, strict=True):
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
            depth = {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 49408}
            encoders[name] = kind(CLIPTextConfig(**sizes, **depth, hidden_act=act))
    for name, module in {"unet": unet, "vae": vae, **encoders}.items():
        file = "model.safetensors" if name in encoders else "diffusion_pytorch_model.safetensors"
        (folder / name).mkdir()
        if name in encoders:
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
        _hollow(folder / name / file, module)
    return folder


def _hollow(path: Path, module: torch.nn.Module) -> None:
    """A half-precision safetensors file of the module's shapes; its data is a hole and takes no disk."""
    header, at = {}, 0
    for name, tensor in module.state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


# What is planned on paper for cards that were not measured; changes to a preset.
SDXL_RUNS = {
    "nitrosd-realism, 80 GB": ("nitrosd-realism", {}),
    "nitrosd-realism, 80 GB, 8-bit AdamW, pool state offloaded": (
        "nitrosd-realism", {"optimizer": "adamw8bit", "pool_offload": True},
    ),
    "nitrosd-realism, 24 GB, LoRA 64, pool state offloaded, batch 1": (
        "nitrosd-realism", {"lora_rank": 64, "pool_offload": True, "batch_size": 1, "accumulation": 100},
    ),
    "nitrosd-realism, 24 GB, LoRA 64, pool state offloaded, batch 1, cached samples": (
        "nitrosd-realism",
        {"lora_rank": 64, "pool_offload": True, "batch_size": 1, "accumulation": 100, "teacher_samples": "cache"},
    ),
    "nitrosd-realism, 24 GB, 8-bit AdamW, pool state offloaded, batch 1": (
        "nitrosd-realism", {"optimizer": "adamw8bit", "pool_offload": True, "batch_size": 1, "accumulation": 100},
    ),
    "dmd2-sdxl, 80 GB": ("dmd2-sdxl", {}),
    "pgsb-sdxl, 80 GB": ("pgsb-sdxl", {}),
}  # fmt: skip


SAMPLES = "1,000,000 teacher samples of SDXL"


def on_paper(folder: Path, name: str) -> dict:
    """What ``plan`` counts for SDXL on CUDA; nothing of it was measured."""
    unet = meta_unet(folder)
    if name == SAMPLES:
        config = dataclasses.replace(RUNS["nitrosd-realism"], num_teacher_samples=1_000_000)
        flops = sample_flops(config, folder, unet)
        shards = -(-1_000_000 // data.SHARD)
        return {"bytes": samples_bytes(config, unet), "shards": shards, "flops_per_sample": flops}
    preset, changes = SDXL_RUNS[name]
    changes = changes | {"teacher": str(folder), "teacher_unet": None, "init": None, "prompts": None, "device": "cuda"}
    config = dataclasses.replace(RUNS[preset], **changes)
    memory, rehearsed = device_bytes(config, folder, unet)
    return {
        "device_bytes": memory,
        "device_total_bytes": sum(memory.values()),
        "moments_bytes": rehearsed.moments,
        "host_bytes": host_bytes(config, unet),
        "disk_bytes": disk_bytes(config, unet),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=records.output, required=True)
    parser.add_argument("--case", type=Path, help="measure this configuration alone and print JSON")
    parser.add_argument("--only", default="", help="cases whose name has this in it; the record keeps the others'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the steps are measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        args.json.write_text(json.dumps(measure(TrainConfig.from_json(json.loads(args.case.read_text())))))
        return
    record = {
        "machine": {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
            "torch": torch.__version__,
        },
        "measured": {},
        "arithmetic, not measured": {},
    }
    record |= records.read(args.json)

    def keep(part: str, name: str, found: dict) -> None:
        record[part][name] = found
        records.write(args.json, record)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, config in cases(folder, args.device).items():
            if name in record["measured"] or args.only not in name:
                continue
            case, result = folder / "case.json", folder / "result.json"
            case.write_text(json.dumps(config.to_json()))
            command = [sys.executable, "-m", "benchmarks.memory_plan", "--case", str(case), "--json", str(result)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
            found = json.loads(result.read_text())
            keep("measured", name, found)
            print(f"{name:32} planned {found['planned_bytes'] / 1e6:8.1f} MB, measured "
                  f"{found['measured_bytes'] / 1e6:8.1f} MB, ratio {found['ratio']:.3f}; "
                  f"of the step alone {found['step_ratio']:.3f}", flush=True)  # fmt: skip
        paper = sdxl_folder(folder / "sdxl")
        for name in (*SDXL_RUNS, SAMPLES):
            if name not in record["arithmetic, not measured"] and args.only in name:
                found = on_paper(paper, name)
                keep("arithmetic, not measured", name, found)
                total = found.get("device_total_bytes", found.get("bytes"))
                print(f"{name}: {total / 1e9:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
