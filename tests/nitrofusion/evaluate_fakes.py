"""Small extractors and metrics, and the command line with them.

Workers import this module by its name and find them registered where FAKES is set; elsewhere a fixture does it.

python -m tests.nitrofusion.evaluate_fakes evaluate ...: an engine that writes down what it draws, and may be slow.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nitrofusion.errors import InputError
from nitrofusion.evaluate import instruments
from nitrofusion.evaluate.instruments import Extractor, Metric
from nitrofusion.evaluate.metrics import Frechet, bootstrap_interval

WIDTH = 12


@dataclass(frozen=True)
class FakeFrechet(Metric):
    def value(self, features, reference):
        return Frechet(reference)(features)

    def interval(self, features, reference, seed, resamples=20):
        statistic = lambda i: Frechet(reference)(features[i])  # noqa: E731
        return bootstrap_interval(statistic, len(features), self.value(features, reference), resamples, seed)


@dataclass(frozen=True)
class FakeMean(Metric):
    def value(self, features, reference):
        return float(features.astype(np.float64).mean())

    def interval(self, features, reference, seed, resamples=20):
        x = features.astype(np.float64).mean(1)
        return bootstrap_interval(lambda i: float(x[i].mean()), len(x), float(x.mean()), resamples, seed)


@dataclass(frozen=True)
class FakeFailure(FakeMean):
    def interval(self, features, reference, seed, resamples=20):
        raise ValueError("no interval today")


def locate(name, folder, allow_unknown_digest=False):
    """A weight is a text file here, and ``altered`` in it stands for another digest than the published one."""
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"weights: {path} must be a file, got nothing")
    if path.read_text() == "altered" and not allow_unknown_digest:
        raise InputError(f"weights: {path} must have digest 123, got another")
    return path


def note(**line):
    """One line in the file that NOTES names; O_APPEND keeps lines of several processes whole."""
    if "NOTES" in os.environ:
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps(line) + "\n")


def load_colors(paths, device):
    projection = np.random.default_rng(0).normal(size=(8 * 8 * 3, WIDTH))

    def look(images, prompts):
        assert prompts is None
        time.sleep(float(os.environ.get("SLOW_FEATURES", 0)))
        note(looked=len(images))
        pixels = np.stack([np.asarray(i.resize((8, 8)), np.float64).ravel() / 255 for i in images])
        return (10 + pixels @ projection).astype(np.float32)

    return look


def load_words(paths, device):
    (path,) = paths.values()
    scale = float(path.read_text())

    def look(images, prompts):
        bright = [np.asarray(i, np.float64).mean() / 255 for i in images]
        return np.array([[scale * b * len(p)] for b, p in zip(bright, prompts, strict=True)], np.float32)

    return look


def load_broken(paths, device):
    if os.environ.get("MENDED"):
        return load_colors(paths, device)
    print("about to fail", file=sys.stderr)
    os._exit(7)  # as a crash in native code does: nothing is caught


FAKE_EXTRACTORS = {
    e.name: e
    for e in (
        Extractor("colors", "fake colours 1", (), False, "8x8 bicubic", load_colors),
        Extractor("words", "fake words 1", ("words.txt",), True, "none", load_words),
        Extractor("broken", "fake crash 1", (), False, "none", load_broken),
    )
}
FAKE_METRICS = {
    m.name: m
    for m in (
        FakeFrechet("fid", "FID", "lower", "colors", True, 0.6, 4, None, None),
        FakeMean("colour", "Colour", "higher", "colors", False, None, 2, None, None),
        FakeMean("clip_score", "CLIP score", "higher", "words", False, 0.003, 2, None, None),
        FakeMean("crash", "Crash", "higher", "broken", False, None, 2, None, None),
        FakeFailure("failure", "Failure", "higher", "colors", False, None, 2, None, None),
    )
}
if "FAKES" in os.environ:
    instruments.EXTRACTORS.update(FAKE_EXTRACTORS)
    instruments.METRICS.update(FAKE_METRICS)


def wait_for_features(folder: Path) -> None:
    """Until something drawn has been looked at: never, if that began after the last was drawn."""
    deadline = time.monotonic() + 300
    while not list((folder / "features").glob("*/*.safetensors")):
        assert time.monotonic() < deadline, "pictures are only looked at when all are drawn"
        time.sleep(0.05)


def main(args):
    from nitrofusion import cli, engine
    from nitrofusion.evaluate import run, weights

    weights.locate, weights.digest = locate, lambda path: path.read_text()
    run.SHARD = int(os.environ.get("SHARD", run.SHARD))
    real = engine.load

    def load(*positional, **named):
        loaded = real(*positional, **named)
        generate = loaded.generate

        def slow(prompts, **options):
            time.sleep(float(os.environ.get("SLOW_DRAWING", 0)))
            if int(os.environ.get("LAST_WAITS", -1)) in options["seed"]:
                wait_for_features(Path(args[args.index("--output") + 1]))
            drawn = generate(prompts, **options)
            note(drawn=options["seed"], rank=os.environ.get("RANK"))
            return drawn

        loaded.generate = slow
        return loaded

    engine.load = load
    return cli.main(args)


def notes(path: Path, key: str) -> list:
    """What was written down under a name."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line[key] for line in lines if key in line]


if __name__ == "__main__":
    # The workers import this module by name; under __main__ the extractors would say they live there.
    from tests.nitrofusion import evaluate_fakes

    sys.exit(evaluate_fakes.main(sys.argv[1:]))
