"""Counters and histograms in Prometheus' text format, which is all of it that the server needs."""

from __future__ import annotations

from collections import defaultdict

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HELP = {
    "pictures": "Pictures by result: drawn, refused, failed.",
    "refused": "Requests refused, by reason.",
    "dropped_inputs": "Live inputs that a newer one replaced before they were drawn.",
    "requests": "HTTP responses by status.",
    "draw_seconds": "Seconds of a batch in the worker.",
    "queue": "Pictures that wait for the worker.",
    "drawing": "Pictures in the worker.",
    "sessions": "Live sessions.",
    "worker_restarts": "Times the worker was started again.",
    "worker_up": "1 while the worker can draw.",
}
COUNTERS = {  # with the labels that are known beforehand: a rate needs the zero that it starts from
    "pictures": [{"result": result} for result in ("drawn", "refused", "failed")],
    "refused": [{"reason": reason} for reason in ("host", "origin", "token", "size", "path", "time", "queue")],
    "dropped_inputs": [{}],
    "requests": [],
}


class Metrics:
    """All values by name and labels; ``text`` is what a scrape gets, every family of ``HELP`` from the first on."""

    def __init__(self):
        self._counts: defaultdict[str, defaultdict[tuple, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: defaultdict[str, list] = defaultdict(lambda: [[0] * len(BUCKETS), 0, 0.0])
        for name, labels in COUNTERS.items():
            self._counts[name] = defaultdict(float, {tuple(each.items()): 0.0 for each in labels})
        self._histograms["draw_seconds"]  # made by being looked up

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self._counts[name][tuple(labels.items())] += amount

    def observe(self, name: str, value: float) -> None:
        buckets, count, total = self._histograms[name]
        for i, bound in enumerate(BUCKETS):
            buckets[i] += value <= bound
        self._histograms[name] = [buckets, count + 1, total + value]

    def value(self, name: str, **labels: str) -> float:
        return self._counts[name][tuple(labels.items())]

    def text(self, gauges: dict[str, float]) -> str:
        lines = []

        def family(name: str, kind: str, samples: list[tuple[str, float]]) -> None:
            full = f"nitrofusion_{name}" + "_total" * (kind == "counter")
            lines.append(f"# HELP {full} {HELP[name]}\n# TYPE {full} {kind}")
            lines.extend(f"{full}{suffix} {value:.10g}" for suffix, value in samples)

        for name, values in self._counts.items():
            family(name, "counter", [(_labels(labels), value) for labels, value in values.items()])
        for name, (buckets, count, total) in self._histograms.items():
            samples = [(f'_bucket{{le="{bound:g}"}}', n) for bound, n in zip(BUCKETS, buckets, strict=True)]
            family(name, "histogram", [*samples, ('_bucket{le="+Inf"}', count), ("_sum", total), ("_count", count)])
        for name, value in gauges.items():
            family(name, "gauge", [("", value)])
        return "\n".join(lines) + "\n"


def _labels(labels: tuple) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
