"""Records of evaluations: what was measured and how, and whether two may be compared.

A record is JSON: ``protocol`` (the pictures' side of it), ``results`` (each stands alone: value, interval and every
field of its protocol), ``subject`` (what drew), ``errors``, and ``run`` (machine, dates, latency: all that may differ
when the same evaluation is done again; nothing else does).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from ..errors import InputError
from ..report.pictures import write_atomic
from .suites import digest_of

FORMAT = "nitrofusion-evaluation-1"
SAMPLE = ("n", "prompts_digest", "seed_rule", "resolution", "format")  # of the pictures
# Two values compare where all of these agree; the order is that in which differences are told.
PROTOCOL = (
    "metric", *SAMPLE, "reference_digest", "reference_n", "implementation", "extractor", "extractor_digest", "resize",
)  # fmt: skip
_MEASURED = ("title", "better", "value", "interval", "noise_floor", "version")
_BETTER = ("higher", "lower", "real")
_LONGEST = 1e9  # seconds: no picture took thirty years


def make_result(sample: dict, metric: dict, measured: dict) -> dict:
    """One result with its protocol's digest.

    Args:
        sample: values of ``SAMPLE``. metric: the other values of ``PROTOCOL``.
        measured: title, better, value, interval, noise_floor, version, and maybe target, what real pictures score.
    """
    fields = {name: (sample | metric)[name] for name in PROTOCOL}
    return {**fields, **measured, "protocol_digest": digest_of(fields)}


def make_record(suite: str, sample: dict, results: list[dict], subject: dict, run: dict, errors: list[dict]) -> dict:
    """The record of one evaluation."""
    protocol = {"suite": suite, **{name: sample[name] for name in SAMPLE}}
    digests = {result["metric"]: result["protocol_digest"] for result in results}
    return {
        "record": FORMAT,
        "protocol": protocol,
        "protocol_digest": digest_of({**protocol, "metrics": digests}),
        "results": results,
        "subject": subject,
        "errors": errors,
        "run": run,
    }


def write_record(path: str | Path, record: dict) -> None:
    """The file appears complete or not at all; reading it gives the same record."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_record(path: str | Path) -> dict:
    """A record as ``write_record`` wrote it.

    Raises:
        InputError: it is no record, or a protocol does not have the digest it says.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise InputError(f"record: {path} must be a file that can be read, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"record: {path} must be JSON, got {error}") from error
    return check_record(record, path)


def check_record(record, where="record") -> dict:
    """The record itself, or InputError."""
    found = record.get("record") if isinstance(record, dict) else type(record).__name__
    if found != FORMAT:
        raise InputError(f"record: {where} must be a record of {FORMAT}, got {str(found)[:60]!r}")
    for name, kind in (("protocol", dict), ("results", list), ("subject", dict), ("errors", list), ("run", dict)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"record: {where} must have {name}, got {type(record.get(name)).__name__}")
    _check_about(record, where)
    known: set[str] = set()
    for result in record["results"]:
        missing = [n for n in (*PROTOCOL, *_MEASURED) if not isinstance(result, dict) or n not in result]
        if missing:
            raise InputError(f"record: every result of {where} must have {missing[0]}, got one without")
        for name in ("metric", "title"):
            if not isinstance(result[name], str):
                raise InputError(f"record: {name} of every result of {where} must be text, got {result[name]!r:.60}")
        if result["metric"] in known:
            raise InputError(f"record: {where} must have every metric once, got {result['metric'][:60]} twice")
        known.add(result["metric"])
        if result["noise_floor"] is not None and not _finite(result["noise_floor"]):
            raise InputError(f"record: noise_floor of {where} must be a number, got {result['noise_floor']!r:.60}")
        if result.get("target") is not None and not _finite(result["target"]):
            raise InputError(f"record: target of {where} must be a number, got {result['target']!r:.60}")
        numbers = [result["value"], *(result["interval"] if isinstance(result["interval"], list) else [None])]
        sound = len(numbers) == 3 and all(map(_finite, numbers)) and numbers[1] <= numbers[2]
        if not sound or result["better"] not in _BETTER:
            raise InputError(f"record: {result['metric']} of {where} must have a value and an interval, got {numbers}")
        if result.get("protocol_digest") != digest_of({name: result[name] for name in PROTOCOL}):
            raise InputError(f"record: the protocol of {result['metric']} in {where} must have its digest, got another")
    return record


def _check_about(record: dict, where) -> None:
    """What reports read beside the results, or InputError."""
    protocol, size = record["protocol"], record["protocol"].get("resolution")
    sized = isinstance(size, list) and len(size) == 2
    steps, seconds = record["subject"].get("num_inference_steps"), record["run"].get("seconds_per_image")
    sound = {
        "protocol_digest": isinstance(record.get("protocol_digest"), str),
        "suite": isinstance(protocol.get("suite"), str),
        "n": _count(protocol.get("n")),
        "resolution": sized and all(map(_count, size)),
        "prompts_digest": isinstance(protocol.get("prompts_digest", 0), (str, type(None))),
        "seed_rule": isinstance(protocol.get("seed_rule", 0), (str, type(None))),
        "num_inference_steps": steps is None or _count(steps),
        "seconds_per_image": seconds is None or (_finite(seconds) and 0 <= seconds <= _LONGEST),
        "errors": all(isinstance(e, dict) and isinstance(e.get("metric"), str) and isinstance(e.get("error"), str)
                      for e in record["errors"]),
    }  # fmt: skip
    for name, whether in sound.items():
        if not whether:
            raise InputError(f"record: {where} must have {name} as write_record wrote it, got another")


def timeless(record: dict) -> dict:
    """The record without ``run``: equal, to the byte, for equal evaluations."""
    return {name: value for name, value in record.items() if name != "run"}


def compare_records(a: dict | str | Path, b: dict | str | Path) -> list[dict]:
    """Differences b - a of the metrics both have.

    Intervals of differences take both samples as independent (MOVER: distances to the intervals' ends, added in
    quadrature); pictures of the same prompts and seeds vary together, so they are on the safe side.

    Args:
        a, b: records or their files.

    Returns:
        For each metric: metric, title, better, a, b, a_interval, b_interval, difference, interval, noise_floor, and
        ``says``: "within the noise floor", "within the intervals", "better" or "worse" (b than a), or "different".

    Raises:
        InputError: one is no record, none of the metrics is shared, or their protocols differ; names the fields.
    """
    a, b = (check_record(r) if isinstance(r, dict) else read_record(r) for r in (a, b))
    ours, theirs = ({result["metric"]: result for result in r["results"]} for r in (a, b))
    shared = [name for name in ours if name in theirs]
    if not shared:
        names = [", ".join(r) or "none" for r in (ours, theirs)]
        raise InputError(f"compare-records: records must share a metric, got {names[0]} and {names[1]}")
    for name in shared:
        check_alike(ours[name], theirs[name])
    return [_difference(ours[name], theirs[name]) for name in shared]


def check_comparable(records) -> None:
    """Raises InputError unless every metric is of one protocol wherever it was measured."""
    known: dict[str, dict] = {}
    for result in (result for record in records for result in record["results"]):
        check_alike(known.setdefault(result["metric"], result), result)


def check_alike(a: dict, b: dict) -> None:
    """Raises InputError with the fields in which the protocols of two results differ."""
    unlike = [field for field in PROTOCOL if a[field] != b[field]]
    if unlike:
        told = "; ".join(f"{field} {_short(a[field])} and {_short(b[field])}" for field in unlike)
        raise InputError(f"compare-records: {a['metric']} must be measured by one protocol, got {told}")


def _difference(a: dict, b: dict) -> dict:
    x, y = a["value"], b["value"]
    (a_low, a_high), (b_low, b_high) = a["interval"], b["interval"]
    difference = y - x
    interval = [difference - math.hypot(a_high - x, y - b_low), difference + math.hypot(x - a_low, b_high - y)]
    floor = a["noise_floor"]
    if floor is not None and abs(difference) <= floor:
        says = "within the noise floor"
    elif interval[0] <= 0 <= interval[1]:
        says = "within the intervals"
    elif a["better"] == "real":
        says = "different"
    else:
        says = "better" if (difference > 0) == (a["better"] == "higher") else "worse"
    return {
        "metric": a["metric"],
        "title": a["title"],
        "better": a["better"],
        "a": x,
        "b": y,
        "a_interval": a["interval"],
        "b_interval": b["interval"],
        "difference": difference,
        "interval": interval,
        "noise_floor": floor,
        "says": says,
    }


def _finite(value) -> bool:
    # Compared, not converted: an integer of hundreds of digits is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _count(value) -> bool:
    return isinstance(value, int) and _finite(value) and value >= 0


def _no_constant(name: str):
    raise ValueError(f"{name}, which JSON does not have")


def _short(value) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text[:60]  # digests are named by their beginnings
