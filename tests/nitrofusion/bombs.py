"""Configurations and files that cost far more to read than they are worth, and what refusing them costs.

Offered by ``test_hostile.py`` in small numbers and by ``benchmarks/survival.py`` in large ones.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nitrofusion.engine import load

from .hostile import UNET, edit, folder_entries, linked, outcome, peak, put

SECONDS, BYTES = 1.0, 200 << 20  # a refusal takes less
_HUGE = {"unet": ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim",
                  "sample_size", "projection_class_embeddings_input_dim", "addition_time_embed_dim"),
         "vae": ("block_out_channels", "layers_per_block", "latent_channels"),
         "text_encoder": ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"),
         "text_encoder_2": ("intermediate_size", "projection_dim")}  # fmt: skip


def stacked(part: str, blocks: int, layers: int, inner: int = 1) -> dict:
    """A UNet's or VAE's configuration of so many blocks of so many layers of so many transformer layers."""
    down, up = {
        "unet": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
        "vae": ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"),
    }[part]
    sizes = {"block_out_channels": [32] * blocks, "down_block_types": [down] * blocks, "up_block_types": [up] * blocks}
    if part == "unet":
        sizes |= {"transformer_layers_per_block": inner, "sample_size": 1 << 12, "attention_head_dim": 8}
    return sizes | {"layers_per_block": layers, "norm_num_groups": 8}


def bombs(base: Path, root: Path, rng: random.Random, combined: int = 20) -> Iterator[tuple[str, Path]]:
    """Pipeline folders and files that cost far more to read than they are worth; ``combined`` of chance."""
    numbered = 0

    def made(change: Callable[[Path], None]) -> Path:
        nonlocal numbered
        numbered += 1
        folder = linked(base, root / f"bomb-{numbered:03d}")
        change(folder)
        return folder

    for part, keys in _HUGE.items():
        for i, key in enumerate(keys):
            was = json.loads((base / part / "config.json").read_text()).get(key)
            huge = (2**31, 10**6, 2**62)[i % 3]
            value = [huge] * len(was) if isinstance(was, list) else huge
            yield f"{part} {key} {huge}", made(lambda f, p=part, k=key, v=value: edit(f / p / "config.json", **{k: v}))
    unet, vae, scheduler = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
    spaces = lambda path, size: (put(path, b"{"), os.truncate(path, size))  # noqa: E731  a sparse file
    for name, change in {
        "many blocks": lambda f: edit(f / unet, block_out_channels=[32] * 10**5),
        "layers of layers": lambda f: edit(f / unet, layers_per_block=[99] * 3, transformer_layers_per_block=[99] * 3),
        "groups of none": lambda f: edit(f / unet, norm_num_groups=0, attention_head_dim=0),
        "widths that are words": lambda f: edit(f / vae, block_out_channels="wide"),
        "a scheduler of 2^31 steps": lambda f: edit(f / scheduler, num_train_timesteps=2**31),
        "a solver of order 50,000,000": lambda f: edit(f / scheduler, solver_order=5 * 10**7),
        "64 blocks of 64 layers": lambda f: edit(f / vae, **stacked("vae", 64, 64)),
        "64 blocks of 16 layers": lambda f: edit(f / vae, **stacked("vae", 64, 16)),
        "6 blocks of 4 layers of 8": lambda f: edit(f / unet, **stacked("unet", 6, 4, 8)),
        "12 blocks of 16 layers of 32": lambda f: edit(f / unet, **stacked("unet", 12, 16, 32)),
        "a way up that is longer": lambda f: edit(f / unet, reverse_transformer_layers_per_block=[99, [99] * 3, 99]),
        "betas without end": lambda f: edit(f / scheduler, trained_betas=[0.1] * 10**6),
        "deep JSON": lambda f: put(f / unet, "[" * 10**6),
        "deep objects": lambda f: put(f / unet, '{"a":' * 10**5 + "1" + "}" * 10**5),
        "a number of a million digits": lambda f: put(f / unet, '{"sample_size": ' + "9" * 10**6 + "}"),
        "100 MB of JSON": lambda f: spaces(f / unet, 100 << 20),
        "4 MB of lists": lambda f: put(f / vae, '{"a": [' + "[]," * (4 * 10**6 // 3) + "[]]}"),
        "0.5 MB of lists": lambda f: put(f / vae, '{"a": [' + "[]," * (500_000 // 3) + "[]]}"),
        "100 MB of tokenizer": lambda f: spaces(f / "tokenizer/tokenizer.json", 100 << 20),
        "a header of 99 MB": lambda f: _headed(f / UNET, 99 << 20),
        "a header of 2^63": lambda f: put(f / UNET, struct.pack("<Q", 2**63) + b"{}"),
        "a header of 70,000 tensors": lambda f: put(f / UNET, _crowded(70_000)),
    }.items():  # fmt: skip
        yield name, made(change)
    for _ in range(combined):
        blocks, layers, inner = (rng.choice((1, rng.randint(1, 8), rng.randint(1, 64))) for _ in range(3))
        of_unet, of_vae = stacked("unet", min(blocks, 13), layers, inner), stacked("vae", blocks, layers)
        changes = rng.choice(({unet: of_unet}, {vae: of_vae}, {unet: of_unet, vae: of_vae}))
        yield f"{sorted(changes)} {blocks} x {layers} x {inner}", made(
            lambda f, changes=changes: [edit(f / part, **values) for part, values in changes.items()]
        )


def _headed(path: Path, size: int) -> None:
    put(path, struct.pack("<Q", size) + b"{")
    os.truncate(path, size + 8)


def _crowded(count: int) -> bytes:
    text = json.dumps({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}).encode()
    return struct.pack("<Q", len(text)) + text


def measured(call: Callable[[], object], limit: float = 60.0) -> tuple[str, float, int]:
    """(outcome, CPU seconds, bytes of memory beyond those at the start) of a call in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.alarm(int(limit))  # ends what waits
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
            before, started = peak(), time.process_time()
            what = outcome(call)
            os.write(write, json.dumps((what[:2000], time.process_time() - started, peak() - before)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(said)) if said else ("crashed: the process died", limit, 0)


def defused(base: Path, root: Path, rng: random.Random, count: int | None = None) -> dict:
    """Bombs, each in a process of its own, whose CPU seconds and memory count from after the imports."""
    made = list(bombs(base, root / "bombs", rng))
    outcome(lambda: load(base, backend="ref"))  # what is imported late
    said = {
        "bombs": min(count or len(made), len(made)),
        "not refused": [],
        "too dear": [],
        "slowest_s": 0.0,
        "most_mb": 0,
    }
    for name, folder in rng.sample(made, said["bombs"]):
        entries = folder_entries(folder, base, root)
        for entry in ("load", "load on modules", "teacher"):
            what, seconds, size = measured(entries[entry])
            said["not refused"] += [] if what.startswith("refused") else [f"{name}, {entry}: {what}"]
            said["too dear"] += [f"{name}, {entry}: {seconds:.2f} s, {size >> 20} MB"] * (
                seconds > SECONDS or size > BYTES
            )
            said["slowest_s"] = max(said["slowest_s"], round(seconds, 3))
            said["most_mb"] = max(said["most_mb"], size >> 20)
    return said
