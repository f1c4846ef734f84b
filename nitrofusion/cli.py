"""The command line: a thin cover over library functions.

Exit codes: 0 done; 1 doctor found a fault, a model to serve did not load, or memory did not suffice; 2 bad input;
3 storage; 4 no usable checkpoint; 5 training diverged; 6 a metric failed; 75 stopped by a signal after saving, run the
same command again; 130 interrupted.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from pathlib import Path

from .errors import InputError, NitroError, StorageError, out_of_memory
from .options import check_output, make_parser, parse, train_config
from .processes import settle

_HOME = re.compile(r"^(--[\w.-]+=)~(?=/|$)")  # --output=~/ring.png: shells leave this one as it is
_TOGETHER = 4  # pictures drawn at a time; never changes one
BACKENDS = ("cuda", "triton", "cpu", "ref")  # nitrokernels', whose import is torch's

USAGE = """usage: nitrofusion COMMAND [options]

  generate   draw pictures from prompts
  reproduce  draw a picture again from what its PNG says, and compare
  train      distil a teacher into a one-step student, or resume
  plan       what a training run would take: memory, disk and hours
  prepare    draw the teacher samples that training reads
  evaluate   measure a model or a folder of pictures
  compare-records  what differs between evaluations, if they may be compared
  compare    train recipes and ablations for equal time, measure all, with a report
  export     write a model for diffusers or ComfyUI, or as a LoRA
  calibrate  measure what a model's fp8 scales are made of
  graft      give another SDXL checkpoint a student's one-step ability
  doctor     what this machine has, and whether the ops are right on it
  serve      the real-time app in the browser, and an HTTP service
  demo       the whole job on the embedded world, with a report to look at

`nitrofusion COMMAND --help` lists a command's options.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; every expected failure is one line on stderr and a documented exit code."""
    given = sys.argv[1:] if argv is None else argv
    args = [_HOME.sub(lambda option: option[1] + os.path.expanduser("~"), word) for word in given]
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no work
    try:
        code = _run(args)
        sys.stdout.flush()  # here, where a full disk can still be told
        return code
    except NitroError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        what = error.filename or "standard output, or a file that was open,"  # an error of these names nothing
        print(f"nitrofusion: {what} must be readable and writable, got {error.strerror}", file=sys.stderr)
        _drop_output()
        return StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"
        print(f"nitrofusion: there must be enough free memory, got {got}", file=sys.stderr)
        return NitroError.exit_code
    except KeyboardInterrupt:
        return 130


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else InputError.exit_code
    if args[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    settle()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells what it lacks
    if (named := os.environ.get("NITROKERNELS_BACKEND")) and not {n.strip() for n in named.split(",")} <= {*BACKENDS}:
        known = ", ".join(BACKENDS)
        raise InputError(f"nitrofusion: NITROKERNELS_BACKEND must be one of {known}, got {named!r}")
    command = COMMANDS.get(args[0])
    if command is None:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"nitrofusion: command must be one of {', '.join(COMMANDS)}, got {args[0]!r}{hint}")
    return command(args[1:]) or 0


def _drop_output() -> None:
    """Output that cannot be written is dropped, or Python complains once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(args: list[str]) -> int:
    from .train import plan, train
    from .train.plan import format_plan

    config, values = train_config("train", args, "Distil a teacher into a one-step student; the same command resumes.")
    if values.dry_run:
        print(format_plan(plan(config)))
        return 0
    folder = train(config, values.allow_inexact)
    if os.environ.get("RANK", "0") == "0":
        print(f"trained: {folder} (draw with: nitrofusion generate PROMPT --model {folder})")
    return 0


def _plan(args: list[str]) -> int:
    from .train.plan import format_plan, plan

    config, values = train_config("plan", args, "What a training run would take: memory, disk and hours.")
    found = plan(config, values.processes)
    print(json.dumps(found, indent=1) if values.json else format_plan(found))
    return 0


def _prepare(args: list[str]) -> int:
    from .train import prepare
    from .train.plan import format_samples, plan_samples

    config, values = train_config("prepare", args, "Draw the teacher samples that training reads.")
    match = re.fullmatch(r"(\d+)/(\d+)", values.part)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"prepare: part must be k/n with k < n, got {values.part!r}")
    if values.dry_run:
        print(format_samples(plan_samples(config)))
        return 0
    how = {name: getattr(values, name) for name in ("engine", "verify", "num_cpus", "num_gpus")}
    print(f"prepared: {prepare(config, (int(match[1]), int(match[2])), **how)}")
    return 0


def _generate(args: list[str]) -> int:
    from .engine import check_call, load
    from .engine.images import open_image
    from .engine.png import save_png
    from .engine.source import find

    parser = make_parser("generate", "Draw pictures from prompts.")
    parser.add_argument("prompt", nargs="+", help="one picture each")
    parser.add_argument("--model", default="world", help="preset, folder, .safetensors file, run folder or hub id")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="1 to 4 for a student")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--num_images_per_prompt", type=int, default=1)
    parser.add_argument("--height", type=int, default=None, help="in pixels; the model's own unless given")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--image", default=None, help="picture file to start from")
    parser.add_argument("--strength", type=float, default=0.6, help="of the change to it, up to 1")
    parser.add_argument("--guidance_scale", type=float, default=None, help="of a multi-step teacher")
    parser.add_argument("--negative_prompt", default=None, help="what not to draw, at any number of steps")
    parser.add_argument("--negative", default=None, help="how: nag, nasa, or cfg beside guidance")
    parser.add_argument("--nag_scale", type=float, default=2.0, help="the paper's phi; 0 is off")
    parser.add_argument("--nag_tau", type=float, default=2.5, help="largest growth")
    parser.add_argument("--nag_alpha", type=float, default=0.5, help="share of the result")
    parser.add_argument("--nasa_scale", type=float, default=0.3)
    parser.add_argument("--nag_steps", type=int, default=None, help="act in the first so many steps only")
    parser.add_argument("--stream", action="store_true", help="1 step at once, then 2, 3, 4: -1.png, -2.png, ...")
    parser.add_argument("--output", default="nitrofusion.png", help="PNG file; several get -000, -001, ...")
    parser.add_argument("--device", default=None)
    parser.add_argument("--backend", default="auto", help="plan, graph, openvino, ref, cpu, triton, cuda; see load")
    parser.add_argument("--fp8", default=None, help="file of calibrate: 8-bit linear layers, on recent GPUs")
    parser.add_argument("--compile", action="store_true", help="torch.compile of UNet and decoder")
    parser.add_argument("--lossless", action="store_true", help="bit-equal to eager PyTorch in float32")
    parser.add_argument("--lora", nargs="+", default=None, help="safetensors files to merge; FILE:0.8 scales one")
    parser.add_argument("--vae", default=None, help="another decoder: taesdxl, a folder or a file")
    parser.add_argument("--allow_pickle", action="store_true", help="read a .bin file that you trust, tensors only")
    values = parse(parser, args)
    output = Path(values.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"generate: output must be a .png file, got {output}")
    if not all(prompt.strip() for prompt in values.prompt):
        raise InputError("generate: prompt must have at least one word, got an empty one")
    options = {
        name: getattr(values, name)
        for name in (
            "num_inference_steps", "height", "width", "strength", "guidance_scale", "negative_prompt", "negative",
            "nag_scale", "nag_tau", "nag_alpha", "nasa_scale", "nag_steps",
        )
    }  # fmt: skip
    if values.image is not None:
        options["image"] = open_image(values.image)
    if values.stream and options["num_inference_steps"] is None:
        options["num_inference_steps"] = 4
    check_output("generate", output)
    counts = {"seed": values.seed, "num_images_per_prompt": values.num_images_per_prompt}
    choices = {"lora": _scaled(values.lora), "vae": values.vae, "allow_pickle": values.allow_pickle}
    call = check_call(find(values.model, **choices), values.prompt, **counts, **options)
    how = {name: getattr(values, name) for name in ("device", "backend", "compile", "lossless", "fp8")}
    engine = load(values.model, **how, **choices)
    print("; ".join([engine.source.notice(), *map(str, engine.loras)]), file=sys.stderr)

    def write(i: int, image, suffix: str = "", **changes) -> Path:
        name = f"{output.stem}-{i:03d}" if len(call) > 1 else output.stem
        settings = engine.settings(call.prompts[i], seed=call.seeds[i], **{**options, **changes})
        return save_png(image, output.with_name(f"{name}{suffix}{output.suffix}"), settings)

    if values.stream:
        for i, prompt in enumerate(call.prompts):
            for drawn in engine.stream(prompt, seed=call.seeds[i], **options):
                steps = drawn.num_inference_steps
                path = write(i, drawn.image, f"-{steps}", num_inference_steps=steps)
                print(f"{path}   after {drawn.latency:.3f} s", flush=True)
        return 0
    for start in range(0, len(call), _TOGETHER):  # each written before the next are drawn
        some = slice(start, start + _TOGETHER)
        pictures = engine.generate(call.prompts[some], seed=call.seeds[some], batch_size=_TOGETHER, **options)
        for i, image in enumerate(pictures, start):
            print(write(i, image), flush=True)
    return 0


def _reproduce(args: list[str]) -> int:
    from .engine.reproduce import reproduce

    parser = make_parser("reproduce", "Draw a picture again from what its PNG says, and compare.")
    parser.add_argument("picture", help="PNG that generate wrote")
    parser.add_argument("--output", default=None, help="PNG file for the new picture")
    parser.add_argument("--image", default=None, help="what the picture was drawn from, if from an image")
    parser.add_argument("--model", default=None, help="where its model lies now")
    parser.add_argument("--lora", nargs="+", default=None, help="those it was drawn with; FILE:0.8 scales one")
    parser.add_argument("--vae", default=None, help="the decoder it was drawn with, if not the model's own")
    parser.add_argument("--device", default=None)
    values = parse(parser, args)
    if values.output is not None:
        check_output("reproduce", Path(values.output))
    options = {name: getattr(values, name) for name in ("image", "model", "device", "vae")}
    options["lora"] = _scaled(values.lora, "reproduce")
    print(reproduce(values.picture, values.output, **options).report())
    return 0


def _scaled(files: list[str] | None, what: str = "generate") -> list[tuple[str, float]] | None:
    """(file, scale) of each FILE or FILE:SCALE."""
    found = [re.fullmatch(r"(?s)(.+?)(?::(-?[\d.]+))?", file) for file in files or ()]
    try:
        return [(match[1], float(match[2] or 1)) for match in found] or None
    except (ValueError, TypeError) as error:  # no number; nothing at all
        raise InputError(f"{what}: lora must be FILE or FILE:SCALE, got {' '.join(files)!r}") from error


def _evaluate(args: list[str]) -> int:
    from .evaluate import evaluate
    from .evaluate.options import OPTIONS

    parser = make_parser("evaluate", "Measure a model or a folder of pictures; the same command resumes.")
    for name, (kind, default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--model", default="world", help="preset, diffusers folder, run folder, or folder of pictures")
    parser.add_argument("--metrics", nargs="+", default=None, help="the suite's by default")
    parser.add_argument("--list-weights", "--list_weights", action="store_true", help="which files, and where from")
    parser.add_argument("--allow_unknown_digest", action="store_true", help="of weights that you trust")
    parser.add_argument("--json", default=None, help="also write the result here")
    values = parse(parser, args)
    if values.list_weights:
        from .evaluate.weights import list_weights

        print(list_weights(None if values.weights is None else Path(values.weights)))
        return 0
    if values.json is not None:
        check_output("evaluate", Path(values.json))
    chosen = {name: getattr(values, name) for name in (*OPTIONS, "allow_unknown_digest")}
    metrics = None if values.metrics is None else tuple(values.metrics)
    result = evaluate(values.model, json_path=values.json, metrics=metrics, **chosen)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if values.suite == "world":
        for name in ("accuracy", "frechet", "sharpness", "diversity", "grain_rate", "structure_rate"):
            _print_value(name, result[name], result[f"{name}_interval"])
    for found in result.get("results", ()):
        _print_value(found["metric"], found["value"], found["interval"])
    if values.output is not None:
        print(f"Look at {Path(values.output) / 'report.html'}")
    return 0


def _print_value(name: str, value: float, interval: list[float]) -> None:
    print(f"{name:14} {value:8.4f}   95 % [{interval[0]:.4f}, {interval[1]:.4f}]")


def _compare_records(args: list[str]) -> int:
    from .evaluate import compare_records, read_record

    parser = make_parser("compare-records", "Differences of evaluations to the first one, if they are of one protocol.")
    parser.add_argument("records", nargs="+", help="two or more record.json")
    parser.add_argument("--output", default=None, help="HTML page of all of them, with plots; Markdown beside it")
    values = parse(parser, args)
    if len(values.records) < 2:
        raise InputError(f"compare-records: records must be at least two, got {len(values.records)}")
    if values.output is not None:
        if Path(values.output).suffix.lower() not in ("", ".html", ".htm"):  # Markdown goes beside it, as .md
            raise InputError(f"compare-records: output must be the name of an .html page, got {values.output}")
        check_output("compare-records", Path(values.output))
    records = [read_record(path) for path in values.records]
    compared = [compare_records(records[0], record) for record in records[1:]]
    for path, differences in zip(values.records[1:], compared, strict=True):
        print(f"{path} - {values.records[0]}")
        for d in differences:
            low, high = d["interval"]
            print(f"  {d['metric']:14} {d['difference']:+9.4f}   95 % [{low:+.4f}, {high:+.4f}]   {d['says']}")
    if values.output is not None:
        from .report.records import write_records

        folders = [Path(path).parent for path in values.records]
        print(f"Look at {write_records(values.output, records, folders)}")
    return 0


def _compare(args: list[str]) -> int:
    from .compare import EVALUATION_SEED, compare

    parser = make_parser("compare", "Train recipes and ablations for equal time from one start, and measure all.")
    parser.add_argument("--suite", default="world")
    parser.add_argument("--recipes", nargs="+", default=["all"], help="names of recipes and ablations, or all")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of each run")
    parser.add_argument("--output", default="runs/compare", help="folder; the same command resumes it")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each run and seed")
    parser.add_argument("--num_images", type=int, default=2000, help="pictures of each evaluation")
    parser.add_argument("--jobs", type=int, default=None, help="processes side by side; the number of cores by default")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="inference steps to measure at")
    parser.add_argument("--evaluation_seed", type=int, default=EVALUATION_SEED, help="of the first seed's prompts")
    parser.add_argument("--start", default=None, help="what all runs begin from: model preset, UNet file or run folder")
    parser.add_argument("--json", default=None, help="also write the record here")
    values = parse(parser, args)
    if values.json is not None:
        check_output("compare", Path(values.json))
    names = ("suite", "seeds", "minutes", "num_images", "jobs", "evaluation_seed", "start")
    options = {name: getattr(values, name) for name in names}
    report = compare(
        values.output, recipes=tuple(values.recipes), steps=tuple(values.steps), json_path=values.json, **options
    )
    print(f"Look at {report}  (also {report.with_suffix('.png')} and {report.parent / 'compare-world.json'})")
    return 0


def _export(args: list[str]) -> int:
    from .engine.export import FORMATS, LORA_REPORT, export

    parser = make_parser("export", "Write a model as a diffusers folder, a ComfyUI file or a LoRA, with its card.")
    parser.add_argument("--model", default="world", help="preset, diffusers folder or run folder")
    parser.add_argument("--format", default="diffusers", help=", ".join(FORMATS))
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--dtype", default=None, help="float16, bfloat16, float32; as stored by default")
    parser.add_argument("--rank", type=int, default=64, help="of a LoRA")
    parser.add_argument("--base", default=None, help="what a LoRA is for: preset, folder or UNet file")
    parser.add_argument("--full", action="store_true", help="comfyui: text encoders and VAE too")
    values = parse(parser, args)
    options = {name: getattr(values, name) for name in ("format", "dtype", "rank", "base", "full")}
    folder = export(values.model, Path(values.output), **options)
    print(folder)
    if (folder / LORA_REPORT).is_file():
        report = json.loads((folder / LORA_REPORT).read_text())
        adapted = sum(layer["rank"] > 0 for layer in report["layers"])
        print(f"rank {report['rank']}: {report['energy_kept']:.1%} of the difference kept in {adapted} layers")
    return 0


def _calibrate(args: list[str]) -> int:
    from .engine.calibrate import PROMPTS, calibrate
    from .prompts import read_prompts

    parser = make_parser("calibrate", "Measure a student's activations, for --fp8; takes 64 pictures.")
    parser.add_argument("--model", default="world", help="preset, diffusers folder or run folder")
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--prompts", default=None, help="text, CSV, JSONL or Parquet; eight of ours by default")
    parser.add_argument("--seeds", type=int, default=2, help="of each prompt")
    parser.add_argument("--skip", nargs="+", default=[], help="pieces of names of layers to leave as they are")
    parser.add_argument("--device", default=None)
    values = parse(parser, args)
    prompts = PROMPTS if values.prompts is None else read_prompts(values.prompts)
    made = calibrate(values.model, values.output, prompts, values.seeds, tuple(values.skip), values.device)
    print(f"{values.output}: {len(made.largest)} layers at {len(made.timesteps)} timesteps")
    return 0


def _graft(args: list[str]) -> int:
    from .engine.graft import graft

    parser = make_parser("graft", "Give another SDXL checkpoint a student's one-step ability, by adding weights.")
    parser.add_argument("--custom", required=True, help="checkpoint to adapt: folder or safetensors file")
    parser.add_argument("--output", required=True, help="new pipeline folder, or .safetensors file of the UNet alone")
    parser.add_argument("--student", default="nitrosd-realism", help="preset, folder or safetensors file")
    parser.add_argument("--base", default=None, help="what the student was distilled from; known for presets")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--dtype", default=None, help="float16, bfloat16, float32; as stored by default")
    parser.add_argument("--shifted_timestep", type=int, default=None, help="known for presets and exported models")
    values = parse(parser, args)
    names = ("custom", "output", "student", "base", "strength", "dtype", "shifted_timestep")
    print(graft(**{name: getattr(values, name) for name in names}))
    print(values.output)
    return 0


def _serve(args: list[str]) -> int:
    from .serve import serve

    parser = make_parser("serve", "Serve the real-time app and OpenAI's images API until Ctrl-C.")
    parser.add_argument("--model", default="world", help="preset, folder, .safetensors file, run folder or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs --token")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--token", default=None, help="what every client has to send")
    parser.add_argument("--allowed_hosts", nargs="+", default=[], help="further names it is reached by, NAME[:PORT]")
    parser.add_argument("--max_queue", type=int, default=16, help="pictures that may wait; then requests get 429")
    parser.add_argument("--device", default=None)
    parser.add_argument("--backend", default="auto", help="as for generate")
    parser.add_argument("--lora", nargs="+", default=None, help="safetensors files to merge; FILE:0.8 scales one")
    parser.add_argument("--vae", default=None, help="another decoder: taesdxl, a folder or a file")
    parser.add_argument("--allow_pickle", action="store_true", help="read a .bin file that you trust, tensors only")
    values = parse(parser, args)
    names = ("host", "port", "token", "max_queue", "device", "backend", "vae", "allow_pickle")
    options = {name: getattr(values, name) for name in names} | {"lora": _scaled(values.lora)}
    serve(values.model, open_page=values.open, allowed_hosts=tuple(values.allowed_hosts), **options)
    return 0


def _doctor(args: list[str]) -> int:
    from .doctor import diagnose, format_report

    parser = make_parser("doctor", "Show versions, device, op backends with errors and speeds, and models found.")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    values = parse(parser, args)
    report = diagnose(values.device)
    print(json.dumps(report, indent=1) if values.json else format_report(report))
    return 1 if report["faults"] else 0


def _demo(args: list[str]) -> int:
    from .demo import demo

    parser = make_parser("demo", "Train on the embedded world, evaluate, and write a report.")
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument("--preset", default="world")
    parser.add_argument("--num_images", type=int, default=300, help="pictures of each evaluation")
    values = parse(parser, args)
    demo(Path(values.output), preset=values.preset, num_images=values.num_images)
    return 0


COMMANDS = {
    "generate": _generate,
    "reproduce": _reproduce,
    "train": _train,
    "plan": _plan,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "compare": _compare,
    "compare-records": _compare_records,
    "export": _export,
    "calibrate": _calibrate,
    "graft": _graft,
    "doctor": _doctor,
    "serve": _serve,
    "demo": _demo,
}
