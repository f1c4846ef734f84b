"""One evaluation from plan to report: draw and look at the same time, then measure, then write.

Everything lies in one folder: ``settings.json`` (which pictures these are), ``images/``, ``features/``, ``measured/``,
``logs/``, and at the end ``record.json``, ``report.md`` and ``report.html``. What is there is kept, so the same call
resumes; other metrics may be asked of the same pictures.
"""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from .. import __version__
from ..doctor import cpu_name
from ..engine.png import read_settings
from ..errors import InputError, MetricError, StorageError
from ..models.weights import read_json
from ..report.pictures import write_atomic
from ..storage import hold_alone
from . import instruments
from .drawing import ALONE, Pictures, batches, draw
from .group import Group
from .jobs import Workers
from .record import make_record, make_result, write_record
from .suites import Plan, digest_of
from .worker import shard_path, shard_range, whole

SHARD = 64  # pictures whose features lie in one file, and that one process draws
_SUBJECT = ("model", "unet", "num_inference_steps", "guidance_scale", "negative_prompt", "device", "dtype", "version")
_LATE = 0.5  # seconds between looks at the folder


class Evaluation:
    """What all steps know.

    Attributes:
        options: of ``Engine.generate``, with batch_size; empty where pictures are given.
        loading: of ``engine.load``. jobs: processes side by side; None is what the device allows.
    """

    def __init__(self, plan: Plan, output: Path, cache: Path, options: dict, loading: dict, jobs: int | None,
                 group: Group):  # fmt: skip
        self.plan, self.output, self.cache, self.group = plan, output, cache, group
        self.options, self.loading = options, loading
        self.device = group.device(loading.get("device"))
        self.pictures = Pictures(output)
        cores = os.cpu_count() or 1
        many = len(plan.extractors) if self.device.type == "cuda" else max(1, cores // 2)
        parallel = min(many, len(plan.extractors)) if jobs is None else jobs
        tag = "" if group.size == 1 else f"-{group.rank}"
        self.workers = Workers(output / "logs", tag, parallel, max(1, cores // parallel))

    def paths(self) -> list[Path]:
        """The pictures that are measured."""
        return list(self.plan.given.paths) if self.plan.given else [self.pictures.path(i) for i in range(self.plan.n)]

    def features(self, extractor: str) -> Path:
        return self.output / "features" / f"{extractor}-{self.plan.digests[extractor][:12]}"

    def reference_features(self, extractor: str) -> Path:
        """In the cache: the same for every model."""
        digest = self.plan.reference_for(extractor).digest
        return self.cache / "features" / digest[:16] / self.features(extractor).name

    # ---------------------------------------------------------------- steps

    def claim(self) -> None:
        """Creates the folder or accepts the one of these pictures."""
        plan, path = self.plan, self.output / "settings.json"
        settings = {
            "model": plan.model,
            "n": plan.n,
            "prompts_digest": plan.prompts_digest,
            "seed_rule": plan.seed_rule,
            "pictures_digest": plan.given and plan.given.digest,
            **self.options,
            "device": None if plan.given else self.device.type,
            "backend": None if plan.given else self.loading["backend"],
            "shard_size": SHARD,
        }
        if path.exists():
            found = read_json(path, "evaluate")
            for name, wanted in settings.items():
                if found.get(name) != wanted:
                    raise InputError(
                        f"evaluate: output must be a new folder or this evaluation's own, got {self.output} with "
                        f"{name} {found.get(name)!r} instead of {wanted!r}"
                    )
        elif self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(
                f"evaluate: output must be a new folder or an evaluation's own, got {self.output} with other files"
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
        except OSError as error:
            raise StorageError(
                f"evaluate: {self.output} must be a folder that can be written, got {error.strerror}"
            ) from error
        self.lock = hold_alone(self.output, "evaluate")
        if plan.given is None:
            self.pictures.recover()

    def look(self) -> None:
        """Draws this process's share and has it looked at."""
        todo = []
        if self.plan.given is None:
            every = batches(self.plan, self._own(self.plan.n), SHARD, self.options["batch_size"])
            todo = [at for at in every if not all(map(self.pictures.finished, at))]
        bars = _Bars(self)
        try:
            for extractor in self.plan.extractors:
                self.workers.add(f"extract-{extractor}", self._extraction(extractor))
            if todo:
                self._draw(todo, bars)
            while self.workers.poll():
                bars.update()
                time.sleep(_LATE / 5)
            bars.update(last=True)
        finally:
            self.workers.stop()
            bars.close()

    def _draw(self, todo: list[range], bars: _Bars) -> None:
        from ..engine import load

        engine = load(self.plan.model, **{**self.loading, "device": self.device})
        sides = {name: self.options[name] for name in ("height", "width")}
        told = engine.settings(self.plan.prompts[0], **sides)
        self.plan.check_size(told["width"], told["height"])
        known = next((i for i in range(self.plan.n) if self.pictures.finished(i)), None)
        if known is not None:
            before = read_settings(self.pictures.path(known)).get("unet")
            if before != engine.unet_digest:
                raise InputError(
                    f"evaluate: output must be of this model ({engine.unet_digest}), got {self.output} with pictures "
                    f"of {before}"
                )

        def drawn(count: int) -> None:
            if count >= ALONE:  # the first are drawn alone, so that their time is the model's
                self.workers.poll()
            bars.update()

        draw(self.plan, self.pictures, engine, todo, self.options, self.group.rank, drawn, self.group.local_size)

    def _own(self, n: int) -> list[int]:
        """The shards of n pictures that are this process's."""
        return list(range(-(-n // SHARD)))[self.group.rank :: self.group.size]

    def _extraction(self, extractor: str) -> dict:
        plan, sets = self.plan, []
        if (reference := plan.reference_for(extractor)) is not None:
            files, folder = [str(p.absolute()) for p in reference.paths], self.reference_features(extractor)
            sets.append({"pictures": files, "prompts": None, "shards": self._own(len(files)), "folder": str(folder)})
        prompts = plan.prompts if instruments.EXTRACTORS[extractor].needs_prompt else None
        files, folder = [str(p.absolute()) for p in self.paths()], self.features(extractor)
        sets.append({"pictures": files, "prompts": prompts, "shards": self._own(plan.n), "folder": str(folder)})
        return {
            "kind": "extract",
            "extractor": extractor,
            "modules": [instruments.EXTRACTORS[extractor].load.__module__],
            "weights": {name: str(path) for name, path in plan.weights[extractor].items()},
            "device": str(self.device),
            "polite": plan.given is None and self.device.type == "cpu",
            "shard_size": SHARD,
            "sets": sets,
        }

    def measure(self, errors: dict[str, str]) -> dict:
        """The record; rank 0 calls it when all pictures have been looked at.

        Args:
            errors: extractor to what its process said last.
        """
        sample, asked = self._sample(), {}
        for name in self.plan.metrics:
            if instruments.METRICS[name].extractor not in errors:
                fields = self._protocol(name)
                digest = digest_of(make_result(sample, fields, {}))
                asked[name] = (fields, self.output / "measured" / f"{name}-{digest[:12]}.json")
        for extractor in self.plan.extractors:
            files = {n: str(p) for n, (_, p) in asked.items() if instruments.METRICS[n].extractor == extractor}
            files = {n: file for n, file in files.items() if not _measured(Path(file))}
            if files:
                self.workers.add(f"measure-{extractor}", self._measurement(extractor, files))
        with tqdm(total=len(asked), desc="metrics", unit="metric", disable=None) as bar:
            while self.workers.poll():
                bar.update(sum(path.exists() for _, path in asked.values()) - bar.n)
                time.sleep(_LATE / 5)
            bar.update(sum(path.exists() for _, path in asked.values()) - bar.n)
        results, failed = [], []
        for name in self.plan.metrics:
            metric, extractor = instruments.METRICS[name], instruments.METRICS[name].extractor
            said = errors.get(extractor)
            if said is None:
                fields, path = asked[name]
                found = _measured(path)
                if found:
                    kept = {key: getattr(metric, key) for key in ("title", "better", "noise_floor")}
                    results.append(make_result(sample, fields, {**kept, **found, "version": __version__}))
                    continue
                ended = self.workers.errors.get(f"measure-{extractor}", "its process ended without a word")
                said = _said(path).get("error") or ended
            failed.append({"metric": name, "extractor": extractor, "error": said})
        return make_record(self.plan.suite, sample, results, self._subject(), self._run(), failed)

    def _measurement(self, extractor: str, files: dict[str, str]) -> dict:
        plan = self.plan
        shards = lambda folder, n: [str(shard_path(folder, k)) for k in range(-(-n // SHARD))]  # noqa: E731
        reference = plan.reference_for(extractor)
        if reference is not None:
            reference = shards(self.reference_features(extractor), len(reference))
        return {
            "kind": "measure",
            "modules": sorted({module for name in files for module in _modules(instruments.METRICS[name])}),
            "metrics": files,
            "features": shards(self.features(extractor), plan.n),
            "reference": reference,
        }

    def missing(self, extractor: str) -> str | None:
        """What says that not all pictures were looked at, None if they were."""
        sets = [(self.features(extractor), self.plan.n)]
        if (reference := self.plan.reference_for(extractor)) is not None:
            sets.append((self.reference_features(extractor), len(reference)))
        for folder, n in sets:
            if any(not whole(shard_path(folder, k), len(shard_range(k, SHARD, n))) for k in range(-(-n // SHARD))):
                return f"no features of some pictures in {folder}"
        return None

    # ---------------------------------------------------------------- what the record says

    def _sample(self) -> dict:
        plan, given = self.plan, self.plan.given
        if given:
            (size,), kind = given.sizes, given.format
        else:
            with Image.open(self.pictures.path(0)) as image:
                size, kind = image.size, "png"
        return {
            "n": plan.n,
            "prompts_digest": plan.prompts_digest,
            "seed_rule": plan.seed_rule,
            "resolution": list(size),
            "format": kind,
        }

    def _protocol(self, name: str) -> dict:
        metric = instruments.METRICS[name]
        extractor = instruments.EXTRACTORS[metric.extractor]
        reference = self.plan.reference_for(extractor.name) if metric.needs_reference else None
        return {
            "metric": name,
            "reference_digest": None if reference is None else reference.digest,
            "reference_n": None if reference is None else len(reference),
            "implementation": extractor.implementation,
            "extractor": extractor.name,
            "extractor_digest": self.plan.digests[extractor.name],
            "resize": extractor.resize,
        }

    def _subject(self) -> dict:
        if self.plan.given:
            return {"model": self.plan.model, "pictures_digest": self.plan.given.digest}
        found = read_settings(self.pictures.path(0))
        return {name: found[name] for name in _SUBJECT if name in found}

    def _run(self) -> dict:
        log = self.pictures.log()
        cuda = self.device.type == "cuda"
        return {
            "seconds_per_image": self.pictures.seconds_per_image(),
            "batch_size": self.options.get("batch_size"),
            "device": torch.cuda.get_device_name(self.device) if cuda else cpu_name(),
            "threads": log[-1]["threads"] if log else None,
            "processes": self.group.size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def run(evaluation: Evaluation) -> dict:
    """Does what is missing and writes record and reports; see ``evaluate`` for what it raises."""
    group, output = evaluation.group, evaluation.output
    group.first(evaluation.claim)
    group.check_shared(output)
    evaluation.look()
    errors: dict[str, str] = {}
    for each in group.gather(evaluation.workers.errors):
        errors = {name.removeprefix("extract-"): said for name, said in each.items()} | errors
    if group.rank == 0:
        for extractor in evaluation.plan.extractors:
            if extractor not in errors and (said := evaluation.missing(extractor)):
                errors[extractor] = said

    def write() -> dict:
        from ..report.records import write_records

        record = evaluation.measure(errors)
        write_record(output / "record.json", record)
        write_records(output / "report.html", [record], [None if evaluation.plan.given else output])
        return record

    record = group.first(write)
    if record["errors"]:
        first = record["errors"][0]
        raise MetricError(
            f"evaluate: all metrics must end well, got {len(record['errors'])} that failed, first {first['metric']} "
            f"({first['error']}); the others are in {output / 'record.json'}; the same command tries again"
        )
    return record


def _modules(metric: instruments.Metric) -> set[str]:
    """Where a metric is from: a process that is to know it imports them."""
    return {type(metric).__module__} | {f.__module__ for f in (metric.statistic, metric.spread) if f is not None}


def _measured(path: Path) -> dict | None:
    """{value, interval} of an earlier call; None without, or if it failed."""
    found = _said(path)
    return found if "value" in found else None


def _said(path: Path) -> dict:
    """What a process wrote; nothing if it did not, or a file was cut short since: then it is measured again."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Bars:
    """Two lines of progress, over all processes, read off the folder: pictures drawn and pictures looked at."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.last = evaluation, 0.0
        plan = evaluation.plan
        self.shards: dict[Path, int] = {}  # file to how many pictures it tells of
        for extractor in plan.extractors:
            sets = [(evaluation.features(extractor), plan.n)]
            if (reference := plan.reference_for(extractor)) is not None:
                sets.append((evaluation.reference_features(extractor), len(reference)))
            for folder, n in sets:
                for k in range(-(-n // SHARD)):
                    self.shards[shard_path(folder, k)] = len(shard_range(k, SHARD, n))
        quiet = None if evaluation.group.rank == 0 else True  # None: silent where nobody looks
        self.seen = {path for path, n in self.shards.items() if whole(path, n)}
        looked = sum(self.shards[path] for path in self.seen)
        drawn = plan.n if plan.given else self._drawn()
        self.pictures = tqdm(total=plan.n, initial=drawn, desc="pictures", unit="image", disable=quiet, position=0)
        total = sum(self.shards.values())
        self.features = tqdm(total=total, initial=looked, desc="features", unit="image", disable=quiet, position=1)

    def update(self, last: bool = False) -> None:
        if self.evaluation.group.rank or (not last and time.monotonic() - self.last < _LATE):
            return
        self.last = time.monotonic()
        if not self.evaluation.plan.given:
            self.pictures.update(self._drawn() - self.pictures.n)
        self.seen |= {path for path in self.shards if path not in self.seen and whole(path, self.shards[path])}
        self.features.update(sum(self.shards[path] for path in self.seen) - self.features.n)

    def close(self) -> None:
        self.pictures.close()
        self.features.close()

    def _drawn(self) -> int:
        folder = self.evaluation.output / "images"
        return sum(entry.name.endswith(".png") for entry in os.scandir(folder))
