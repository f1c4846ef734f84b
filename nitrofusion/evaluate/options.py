"""Options of the command line that are arguments of ``evaluate`` of the same name: (type, default, help)."""

from . import SUITES

OPTIONS = {
    "suite": (str, "world", ", ".join(SUITES)),
    "output": (str, None, "folder of pictures, features, record and report"),
    "prompts": (str, None, "captions_val2017.json for coco5k, else a prompt file"),
    "reference": (str, None, "folder of real pictures, val2017 for coco5k"),
    "weights": (str, None, "folder of the metrics' weights"),
    "num_images": (int, None, "the suite's, or all prompts, by default"),
    "seed": (int, 0, "of the first picture; the next ones count up"),
    "seed_rule": (str, None, "how given pictures were seeded, such as 'seed = index'"),
    "num_inference_steps": (int, None, "the model's own unless given"),
    "guidance_scale": (float, None, "of a multi-step teacher"),
    "height": (int, None, "in pixels; the model's own unless given"),
    "width": (int, None, "in pixels"),
    "batch_size": (int, None, "pictures drawn at a time"),
    "device": (str, None, "of drawing and metrics"),
    "backend": (str, "auto", "as for generate"),
    "jobs": (int, None, "processes that look at pictures side by side"),
    "cache": (str, None, "folder of references' features; ~/.cache/nitrofusion by default"),
}
