"""One-step drawing end to end: our backends and the peers of ``benchmarks.peers``, in turns.

    python -m benchmarks.one_step --shape world --threads 1 --json one_step.json

Every round calls each variant once, in a fresh random order, so a busy machine slows all alike; figures are medians.

    p50_ms, p99_ms         a picture of a new prompt, prompt to uint8 pixels, warm (sdxl30m: one UNet step)
    cpu_ms                 processor time of the same, all threads; what a busy machine changes least
    same_prompt_p50_ms     another seed of one prompt, its embeddings kept
    image_p50_ms           one model call from a new PIL image, from t = 499 (world; of the variants that take images)
    text_ms, unet_ms, decoder_ms   the parts alone
    cold_s                 process start to the first PNG on disk, with the files a variant keeps from earlier starts
    first_cold_s           without those files (torch.compile's cache, OpenVINO's converted graphs)
    peak_mb                most resident memory of that process, which then draws three more pictures
    picture_digest         SHA-256, first 12 digits, of two pictures' pixels
    max_diff_to_eager      of those: grey levels of 255 (sdxl30m: of the largest |x0|)
    switch_ms              until a LoRA of every attention layer is in, or out (sdxl)

``sdxl`` needs an NVIDIA GPU and is what ``make gpu`` runs; without one its variants are skipped, and say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from . import records
from .peers import CACHED, SHAPES, Skip, build

SIDES = {"world": 16, "sdxl30m": 32, "sdxl": 128, "sdxl_tiny": 8}  # of latents
PROMPT = "a striped red circle left of a blue ring on an olive background"


def prompts(count: int) -> list[str]:
    """Captions of the world, no two alike."""
    from nitrofusion.world.scenes import sample_scenes

    captions = dict.fromkeys(sample_scenes(4 * count + 100, seed=2026).captions())
    return list(captions)[:count]


def in_turns(
    calls: dict[str, Callable[[int], object]], rounds: int, seed: int = 0, failed: dict[str, str] | None = None
) -> dict[str, np.ndarray]:
    """[rounds, 2] milliseconds of each ``call(i)``, i from 0: wall clock, processor; warm-up rounds before (-1).

    A variant that fails goes to ``failed`` with its reason, where given, and the others go on.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    shuffle = random.Random(seed).shuffle

    def call(name: str, i: int) -> None:
        try:
            calls[name](i)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = records.failure(error)
            del times[name]

    for name in calls:
        for _ in range(3):  # torch.compile records its CUDA graphs at the second
            if name in times:
                call(name, -1)
    names = list(times)
    for i in range(rounds):
        shuffle(names)
        for name in [name for name in names if name in times]:
            start, spent = time.perf_counter(), time.process_time()
            call(name, i)
            if name in times:
                times[name].append((1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - spent)))
    return {name: np.array(rows) for name, rows in times.items()}


def warm(shape: str, variants: dict, calls: int, rows: dict[str, dict], skipped: dict[str, str], save: Callable):
    """The warm figures of every variant, into ``rows``; ``save()`` after each stage.

    A variant that fails leaves ``variants`` for ``skipped``, and keeps in ``rows`` what it has.
    """
    texts = [*prompts(calls), PROMPT]
    whole = shape != "sdxl30m"
    rows |= {name: {} for name in variants}

    def drop(failed: dict[str, str], stage: str) -> None:
        for name, reason in failed.items():
            skipped[name] = f"{reason} ({stage})"
            del variants[name]
        save()

    def each(stage: str, make: Callable) -> dict[str, object]:
        done, failed = {}, {}
        for name, variant in variants.items():
            try:
                done[name] = make(variant)
            except Exception as error:
                failed[name] = records.failure(error)
        drop(failed, stage)
        return done

    def record(key: str, make: Callable, rounds: int) -> dict[str, np.ndarray]:
        failed = {}
        times = in_turns({n: call for n, v in variants.items() if (call := make(v))}, rounds, failed=failed)
        for name, spent in times.items():
            rows[name][key] = round(float(np.median(spent[:, 0])), 3)
        drop(failed, key)
        return times

    if not whole:
        each("text", lambda v: [v.text(text) for text in texts])
    for name, times in record("p50_ms", lambda v: lambda i: v.draw(texts[i], i + 1), calls).items():
        rows[name]["p99_ms"] = round(float(np.quantile(times[:, 0], 0.99)), 3)
        rows[name]["cpu_ms"] = round(float(np.median(times[:, 1])), 3)
    record("same_prompt_p50_ms", lambda v: lambda i: v.redraw(PROMPT, i + 1), calls)
    if shape == "world":
        frames = [Image.effect_noise((2 * SIDES[shape],) * 2, 60).convert("RGB") for _ in texts]
        takes = [v for v in variants.values() if hasattr(v, "from_image")]
        record("image_p50_ms", lambda v: v in takes and (lambda i: v.from_image(PROMPT, frames[i], i + 1)), calls)
    few = max(5, calls // 3)
    conds = each("text", lambda v: (v, v.text(PROMPT)))
    conds = {id(v): cond for v, cond in conds.values()}
    side = SIDES[shape]
    noise = np.random.default_rng(0).standard_normal((1, 4, side, side), np.float32)
    record("unet_ms", lambda v: lambda i: v.unet(noise, conds[id(v)]), few)
    if whole:
        record("text_ms", lambda v: lambda i: v.text(texts[i]), few)
        record("decoder_ms", lambda v: lambda i: v.decode(noise), few)
    pictures = each("pictures", lambda v: [v.draw(PROMPT, s) for s in (0, 1)])
    switches = each("switch_ms", lambda v: [v.switch(i) for i in range(10)][2:] if hasattr(v, "switch") else [])
    for name, spent in switches.items():
        if spent:
            rows[name]["switch_ms"] = round(statistics.median(spent), 3)
    eager = pictures.get("diffusers_eager")
    for name, drawn in pictures.items():
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in drawn)).hexdigest()
        rows[name]["picture_digest"] = digest[:12]
        if eager is not None:
            pairs = zip(drawn, eager, strict=True)
            worst = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)
            worst /= 1.0 if whole else max(float(np.abs(p).max()) for p in eager)
            rows[name]["max_diff_to_eager"] = float(f"{worst:.3g}")
    save()


def start(shape: str, variant: str, folder: Path, threads: int) -> tuple[float, float]:
    """(seconds from process start to the first picture on disk, peak MB) of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.one_step", "--shape", shape, "--threads", str(threads)]
    began = time.monotonic()
    done = subprocess.run([*command, "--cold", variant, "--folder", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"one_step: {variant} must draw in a process of its own, got {done.stderr.strip()[-500:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["done"] - began, result["peak_mb"]


def cold(shape: str, variant: str, folder: Path, threads: int) -> None:
    """The process that ``start`` times. CLOCK_MONOTONIC is the machine's, so both may read it."""
    options = {"torch_noise": False} if (shape, variant) == ("world", "openvino") else {}
    model = build(shape, variant, folder, threads, **options)
    if shape == "sdxl30m":
        model.text(PROMPT)
    picture = model.draw(PROMPT, 0)
    if shape != "sdxl30m":
        with open(folder / "cold.png", "wb") as file:
            Image.fromarray(picture).save(file, "png")
    finished = time.monotonic()
    for seed in (1, 2, 3):
        model.draw(PROMPT, seed)
    print(json.dumps({"done": finished, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    """Most resident memory of this process. getrusage's figure begins with that of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def measure(
    shape: str,
    threads: int,
    calls: int,
    cold_starts: int,
    only: list[str] | None,
    folder: Path,
    json_path: str | Path | None = None,
) -> dict:
    """The whole record, written after every stage; prints a line per variant."""
    from nitrofusion.engine.export import export

    if shape == "world" and not (folder / "model").exists():
        export("world", folder / "model")
    skipped, starts, firsts, variants, warmed = {}, {}, {}, {}, {}
    info = records.machine(threads)
    record = {"machine": info, "calls": calls, "cold_starts": cold_starts, "skipped": skipped, "rows": []}

    def save() -> None:
        record["rows"] = [row(shape, name, figures, starts, firsts) for name, figures in warmed.items() if figures]
        info["load_after"] = round(os.getloadavg()[0], 2)
        records.write(json_path, record)

    def drop(name: str, error: Exception, stage: str) -> None:
        """Whatever one variant fails of must not take the others' record along."""
        variants.pop(name, None)
        _, skip, reason = str(error).rpartition("Skip: ")  # of the other process: it is in what that printed
        skipped[name] = str(error) if isinstance(error, Skip) else reason if skip else records.failure(error)
        print(f"{shape:8} {name:29} {stage}: {skipped[name]}", flush=True)
        save()

    for name in SHAPES[shape]:
        if only and name not in only and name != "diffusers_eager":
            continue
        try:
            if cold_starts and name in CACHED and shape != "sdxl30m":
                firsts[name] = start(shape, name, folder, threads)[0]
            variants[name] = build(shape, name, folder, threads)
            if shape != "sdxl30m":
                variants[name].draw(PROMPT, 0)
        except Exception as error:
            drop(name, error, "building")
    if variants:
        warm(shape, variants, calls, warmed, skipped, save)
    for _ in range(cold_starts):
        for name in list(variants):
            try:
                starts.setdefault(name, []).append(start(shape, name, folder, threads))
            except Exception as error:
                drop(name, error, "cold start")
        save()
    save()
    for figures in record["rows"]:
        print(line(figures), flush=True)
    for name, reason in skipped.items():
        print(f"{shape:8} {name:29} skipped: {reason}")
    return record


def row(shape: str, name: str, figures: dict, starts: dict[str, list], firsts: dict[str, float]) -> dict:
    """A variant's line of the record, as far as it is known."""
    made = {"shape": shape, "variant": name, "text_ms": None, "decoder_ms": None, "cold_s": None, "peak_mb": None}
    made |= figures
    if starts.get(name):
        made["peak_mb"] = round(statistics.median(m for _, m in starts[name]), 1)
        if shape != "sdxl30m":
            made["cold_s"] = round(statistics.median(s for s, _ in starts[name]), 2)
            made["first_cold_s"] = round(firsts[name], 2) if name in firsts else None
    return made


def line(row: dict) -> str:
    """One variant of a record in text."""
    numbers = [("p50_ms", 8), ("p99_ms", 8), ("cpu_ms", 8), ("same_prompt_p50_ms", 8), ("text_ms", 7), ("unet_ms", 8)]
    numbers += [("decoder_ms", 7), ("cold_s", 6), ("peak_mb", 7), ("max_diff_to_eager", 8)]
    cells = [f"{row[key]:{width}.4g}" if row.get(key) is not None else f"{'-':>{width}}" for key, width in numbers]
    return f"{row['shape']:8} {row['variant']:29}" + " ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="world")
    parser.add_argument("--threads", type=records.count, default=1)
    parser.add_argument("--calls", type=records.count, default=120, help="of each variant; stages get a third")
    parser.add_argument("--cold_starts", type=int, default=5, help="of each variant")
    parser.add_argument("--variant", nargs="*", help="only these, beside diffusers_eager")
    parser.add_argument("--json", type=records.output, help="file to write")
    parser.add_argument("--folder", help="keeps exported and converted models between runs; else a temporary one")
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = SHAPES[args.shape]
    if unknown := [name for name in args.variant or () if name not in known]:
        parser.error(f"--variant must be of {', '.join(known)} for {args.shape}, got {', '.join(unknown)}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if args.cold:
        cold(args.shape, args.cold, Path(args.folder), args.threads)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        record = measure(args.shape, args.threads, args.calls, args.cold_starts, args.variant, folder, args.json)
    return int(any(reason.startswith("failed: ") for reason in record["skipped"].values()))


if __name__ == "__main__":
    sys.exit(main())
