"""Drawing an evaluation's pictures: in fixed batches, each written whole or not at all, so that any process may go on.

A picture's last bits may depend on what else is in its batch. Batches are therefore fixed ranges of the index,
whoever draws them; a batch is encoded in ``.staging``, renamed to ``.ready`` and only then moved to ``images``, so a
picture that is there is never drawn again.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.png import save_png
from .suites import Plan

ALONE = 4  # batches drawn before other processes are started: what latency is read from
_TAIL = b"IEND\xaeB`\x82"  # the end of every whole PNG
_ENCODERS = 8  # threads that compress PNGs, at most


@dataclass(frozen=True)
class Pictures:
    """The drawn pictures of an output folder."""

    folder: Path

    def path(self, i: int) -> Path:
        return self.folder / "images" / f"{i:06d}.png"

    def finished(self, i: int) -> bool:
        """Whether picture i is there and whole: a machine that lost power may have left one short."""
        try:
            with open(self.path(i), "rb") as file:
                file.seek(-len(_TAIL), os.SEEK_END)
                return file.read() == _TAIL
        except OSError:
            return False

    def recover(self) -> None:
        """Moves what a killed process had ready, and drops what it had not."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for batch in sorted((self.folder / ".ready").glob("*")):
            self.publish(batch)
        shutil.rmtree(self.folder / ".staging", ignore_errors=True)

    def publish(self, batch: Path) -> None:
        for path in sorted(batch.iterdir()):
            os.replace(path, self.folder / "images" / path.name)
        batch.rmdir()

    def seconds_per_image(self) -> float | None:
        """Median over the batches that were drawn alone, without the first of each process while there are others."""
        lines = self.log()
        for chosen in ([x for x in lines if x["alone"] and not x["first"]], [x for x in lines if x["alone"]], lines):
            if chosen:
                return statistics.median(x["seconds"] / x["images"] for x in chosen)
        return None

    def log(self) -> list[dict]:
        """One line for each batch that was drawn; a line cut short by a kill is left out."""
        lines = []
        for path in sorted(self.folder.glob("drawing-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return lines


def batches(plan: Plan, shards: Iterable[int], shard_size: int, batch_size: int) -> list[range]:
    """The batches of some shards; none reaches over a shard's end."""
    found = []
    for shard in shards:
        end = min((shard + 1) * shard_size, plan.n)
        found += [range(i, min(i + batch_size, end)) for i in range(shard * shard_size, end, batch_size)]
    return found


def draw(
    plan: Plan, pictures: Pictures, engine, todo: list[range], options: dict, rank: int,
    drawn: Callable[[int], None], processes: int = 1,
) -> None:  # fmt: skip
    """Draws and writes the batches ``todo``; encoding PNGs happens on threads beside it.

    Args:
        options: of ``Engine.generate``.
        drawn: called after each batch with the number of batches that this process has drawn.
        processes: that share this machine's cores.
    """
    batch_size = options["batch_size"]
    saved = {name: value for name, value in options.items() if name != "batch_size"}
    encoders = max(1, min(_ENCODERS, (os.cpu_count() or 1) // processes))
    most = 1 + -(-2 * encoders // batch_size)  # batches waiting to be encoded: bounds memory, keeps encoders busy
    waiting: deque[tuple[range, dict, list[Future]]] = deque()

    def commit() -> None:
        at, line, written = waiting.popleft()
        for future in written:
            future.result()
        staged = pictures.folder / ".staging" / f"{at.start:06d}"
        ready = pictures.folder / ".ready" / staged.name
        ready.parent.mkdir(exist_ok=True)
        os.replace(staged, ready)
        pictures.publish(ready)
        with open(pictures.folder / f"drawing-{rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    with ThreadPoolExecutor(encoders) as pool:
        for count, at in enumerate(todo, start=1):
            prompts, seeds = [plan.prompts[i] for i in at], [plan.seeds[i] for i in at]
            began = time.perf_counter()
            images = engine.generate(prompts, seed=seeds, output_type="pil", **options)
            line = {
                "start": at.start,
                "images": len(at),
                "seconds": time.perf_counter() - began,
                "first": count == 1,
                "alone": count <= ALONE,
                "threads": torch.get_num_threads(),
            }
            staged = pictures.folder / ".staging" / f"{at.start:06d}"
            staged.mkdir(parents=True, exist_ok=True)
            written = [
                pool.submit(
                    save_png, image, staged / pictures.path(i).name, engine.settings(prompt, seed=seed, **saved)
                )
                for i, image, prompt, seed in zip(at, images, prompts, seeds, strict=True)
            ]
            waiting.append((at, line, written))
            while waiting and (len(waiting) > most or all(future.done() for future in waiting[0][2])):
                commit()
            drawn(count)
        while waiting:
            commit()
