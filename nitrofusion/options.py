"""Options of commands: parsers, presets and YAML, and one line for whatever is wrong with them."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tempfile
from pathlib import Path
from typing import Literal

from .errors import InputError, StorageError
from .storage import existing

# What commands on a training configuration have beside it: type, default and help; or help alone, of a switch.
FLAGS = {
    "prepare": {
        "part": (str, "0/1", "k/n: every n-th shard from the k-th, for an array of jobs"),
        "engine": (Literal["serial", "ray"], "serial", "serial, or ray for all workers of a cluster"),
        "num_cpus": (float, 1, "of each Ray worker"),
        "num_gpus": (float | None, None, "of each Ray worker; one by default where this machine has one"),
    },
    "plan": {"processes": (int, 1, "that share the run, as torchrun starts them")},
}
SWITCHES = {
    "train": {
        "dry_run": "check and estimate, train nothing",
        "allow_inexact": "resume with other processes, parallel or versions: last bits differ; or batch_size and "
        "accumulation: draws differ too",
    },
    "prepare": {
        "dry_run": "check and estimate, draw nothing",
        "verify": "compare digests of finished shards too, and draw altered ones again",
    },
    "plan": {"json": "print JSON"},
}


def make_parser(command: str, description: str):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"nitrofusion {command}", description=description, exit_on_error=False)
    return parser


def parse(parser, args: list[str]):
    """Parses, and turns the library's error into one line that names the closest known option."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        text = " ".join(str(error).split())
        names = {a.dest for a in parser._actions} | {o for a in parser._actions for o in a.option_strings}
        unknown = re.search(r"(?:does not accept option|[Uu]nrecognized arguments:|Option) ['\"]?([\w.\-]+)", text)
        close = difflib.get_close_matches(unknown.group(1), names, n=1, cutoff=0.5) if unknown else []
        raise InputError(f"{parser.prog}: {text}" + (f" (did you mean {close[0]}?)" if close else "")) from error


def train_config(command: str, args: list[str], description: str):
    """TrainConfig from preset, then --config YAML, then options; and the flags beside it."""
    from jsonargparse import ActionConfigFile

    from .config import TrainConfig
    from .presets import run_preset

    files = [name for name in map(_yaml_preset, _given(args, "config", "--co")) if name is not None]
    defaults = run_preset((_given(args, "preset", "--pres") or files or ["world"])[-1])
    parser = make_parser(command, description)
    parser.add_argument("--preset", default="world", help="defaults to start from: a name in presets.RUNS")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options")
    for name, (kind, default, text) in FLAGS.get(command, {}).items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, text in SWITCHES.get(command, {}).items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, action="store_true", help=text)
    parser.add_class_arguments(TrainConfig)
    flat = {}
    for key, value in dataclasses.asdict(defaults).items():
        nested = value if key == "pool" else None
        flat.update({f"{key}.{k}": v for k, v in nested.items()} if nested else {key: value})
    parser.set_defaults(flat)
    values = parse(parser, args)
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    plain = {name: getattr(values, name) for name in names if name != "pool"}
    pool = values.pool.as_dict() if hasattr(values.pool, "as_dict") else values.pool
    pool = dataclasses.asdict(pool) if dataclasses.is_dataclass(pool) else pool
    return TrainConfig.from_json({**plain, "pool": pool}).validate(), values


def check_output(command: str, path: Path) -> None:
    """Refuses a file that could not be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise InputError(f"{command}: output must be a file, got the folder {path}")
    folder = existing(path.absolute().parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"{command}: {folder} must be a folder that can be written, got {error.strerror}") from error


def _given(args: list[str], name: str, shortest: str) -> list[str]:
    """Values of ``--name value`` or ``--name=value``, before the parser that depends on them exists.

    Args:
        shortest: of the beginnings that the parser takes for the option.
    """
    found = []
    for i, word in enumerate(args):
        option, is_given, value = word.partition("=")
        if option.startswith(shortest) and f"--{name}".startswith(option) and (is_given or i + 1 < len(args)):
            found.append(value if is_given else args[i + 1])
    return found


def _yaml_preset(path: str) -> str | None:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config: {path} must be a readable YAML file, got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"config: {path} must hold `option: value` lines, got {type(values).__name__}")
    preset = values.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise InputError(f"config: preset must be a name, got {preset!r}")
    return preset
