"""The arguments of a drawing, checked before any weight is read: one clear error each, or one ``Call``."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .. import schedule
from ..errors import InputError
from .negative import Guidance
from .source import Source

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NEGATIVES = ("nag", "nasa", "cfg")
MAX_PROMPT = 5000  # characters; CLIP reads the first 77 tokens, and a picture's settings hold two prompts
MAX_SIDE = 8192  # pixels
MAX_SCALE = 100
STRENGTH = 0.6
NAG_SCALE, NAG_TAU, NAG_ALPHA = 2.0, 2.5, 0.5  # the paper's for SDXL
NASA_SCALE = 0.3  # nothing bounds it; published values for U-Nets go from 0.04 to 0.5
MAX_IMAGES = 10_000  # of a prompt in one call


@dataclass(frozen=True)
class Call:
    """What to draw, nothing left to default.

    Attributes:
        prompts, negative_prompts, seeds: one for each picture; no negative prompt is None.
        num_inference_steps, guidance_scale: of the call or else of the source.
        negative: what the negative prompts act through, one of NEGATIVES; None without any.
        guidance: of ``nag`` and ``nasa``, which both act in attention.
        images: to start from, one or one for each prompt; None is pure noise.
        image_of: for each picture the index of its image.
        strength: of image-to-image.
        height, width: in pixels; None is the model's or the image's own.
    """

    prompts: list[str]
    negative_prompts: list[str | None]
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    negative: str | None
    guidance: Guidance | None
    images: list[Image.Image | torch.Tensor] | None
    image_of: list[int]
    strength: float
    height: int | None
    width: int | None

    def __len__(self) -> int:
        return len(self.prompts)


def check_call(
    source: Source,
    prompt,
    num_inference_steps=None,
    seed=0,
    negative_prompt=None,
    *,
    image=None,
    strength=STRENGTH,
    height=None,
    width=None,
    num_images_per_prompt=1,
    guidance_scale=None,
    negative=None,
    nag_scale=NAG_SCALE,
    nag_tau=NAG_TAU,
    nag_alpha=NAG_ALPHA,
    nasa_scale=NASA_SCALE,
    nag_steps=None,
) -> Call:
    """The arguments of ``Engine.generate``, which describes them, checked.

    Raises:
        InputError: ``generate: X must be ..., got ...``.
    """
    prompts, seeds = check_pictures(prompt, num_images_per_prompt, seed)
    steps, guidance_scale = check_sampling(source, num_inference_steps, guidance_scale)
    count = len(prompts) // num_images_per_prompt
    negatives = [n for n in _check_negatives(negative_prompt, count) for _ in range(num_images_per_prompt)]
    images = None if image is None else _check_images(image, count)
    each = images is not None and len(images) > 1
    image_of = [i // num_images_per_prompt if each else 0 for i in range(len(prompts))]
    if not _is_number(strength) or not 0 < strength <= 1:
        fail("strength", "above 0 and at most 1", _short(strength))
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            _check_count(name, side, MAX_SIDE)

    # Checked whether it is used or not: what is wrong with a prompt was wrong without it.
    guided = guidance_scale > 1
    if negative is None:
        negative = "cfg" if guided else "nag"
    if negative not in NEGATIVES:
        fail("negative", f"one of {', '.join(NEGATIVES)}", _short(negative))
    if negative == "cfg" and not guided:
        fail("negative", "nag or nasa without guidance (guidance_scale 1 or less)", _short(negative))
    for name, value in (("nag_scale", nag_scale), ("nasa_scale", nasa_scale)):
        if not _is_number(value) or not 0 <= value <= MAX_SCALE:
            fail(name, f"in 0..{MAX_SCALE}", _short(value))
    if not _is_number(nag_tau) or not nag_tau > 0:
        fail("nag_tau", "above 0", _short(nag_tau))
    if not _is_number(nag_alpha) or not 0 <= nag_alpha <= 1:
        fail("nag_alpha", "in 0..1", _short(nag_alpha))
    if nag_steps is not None and not (_is_integer(nag_steps) and nag_steps >= 0):
        fail("nag_steps", "an integer >= 0", _short(nag_steps))
    nag_steps, height, width = (None if n is None else int(n) for n in (nag_steps, height, width))
    guidance = None
    if all(n is None for n in negatives):
        negative = None
    elif negative == "nag":
        guidance = Guidance("nag", float(nag_scale), float(nag_tau), float(nag_alpha), nag_steps)
    elif negative == "nasa":
        guidance = Guidance("nasa", float(nasa_scale), math.inf, 1.0, nag_steps)
    return Call(
        prompts, negatives, seeds, steps, guidance_scale, negative, guidance, images, image_of, float(strength),
        height, width,
    )  # fmt: skip


_OPTIONS = tuple(inspect.signature(check_call).parameters)[2:]  # without source and prompt


def check_pictures(prompt, num_images_per_prompt, seed) -> tuple[list[str], list[int]]:
    """A prompt and a seed for each picture, or InputError; needs no model."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        fail("prompt", "a string or a list of at least one", _short(prompt))
    for text in prompts:
        _check_text("prompt", text)
    _check_count("num_images_per_prompt", num_images_per_prompt, MAX_IMAGES)
    prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
    return prompts, _check_seeds(seed, len(prompts))


def check_sampling(source: Source, num_inference_steps, guidance_scale, what: str = "generate") -> tuple[int, float]:
    """Steps and guidance of a call, the source's where None, or InputError in the name of ``what``."""
    steps = source.num_inference_steps if num_inference_steps is None else num_inference_steps
    _check_count("num_inference_steps", steps, max(source.steps or (schedule.NUM_TRAIN_TIMESTEPS,)), what)
    if source.steps is not None and steps not in source.steps:
        fail("num_inference_steps", f"one of {', '.join(map(str, source.steps))} for {source.name}", str(steps), what)
    scale = source.guidance_scale if guidance_scale is None else guidance_scale
    most = 1 if source.is_student else MAX_SCALE
    if not _is_number(scale) or not 0 <= scale <= most:
        reason = " (a student draws without guidance)" if source.is_student else ""
        fail("guidance_scale", f"in 0..{most}{reason}", _short(scale), what)
    return int(steps), float(scale)


def check_names(function: str, options: dict) -> None:
    """Raises TypeError, as Python does, for an option that ``function`` does not hand to ``check_call``."""
    for name in options:
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def check_output(output_type, batch_size) -> None:
    if output_type not in OUTPUT_TYPES:
        fail("output_type", f"one of {', '.join(OUTPUT_TYPES)}", _short(output_type))
    _check_count("batch_size", batch_size)


def fail(name: str, wanted: str, got: str, what: str = "generate"):
    raise InputError(f"{what}: {name} must be {wanted}, got {got}")


def _short(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"{type(value).__name__} that is too long to show"
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"


def _is_integer(value) -> bool:
    """Python's or numpy's; ``int`` makes it the former, which JSON holds."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Whether it is one that float() takes and that is finite."""
    value = value.item() if isinstance(value, np.floating) else value  # whose largest may be smaller
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_PROMPT:
        fail(name, f"at most {MAX_PROMPT} characters (77 tokens are read)", str(len(text)))
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that were no UTF-8
        raise InputError(f"generate: {name} must be valid Unicode, got {text!a}") from error


def _check_negatives(negative_prompt, count: int) -> list[str | None]:
    """One for each prompt."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt] * count
    elif isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) == count:
        negatives = list(negative_prompt)
    else:
        fail("negative_prompt", f"a string or a list of one for each of the {count} prompts", _short(negative_prompt))
    for text in negatives:
        if text is not None and not isinstance(text, str):
            fail("negative_prompt", "a string or None for each prompt", _short(text))
        if text is not None:
            _check_text("negative_prompt", text)
    return negatives


def _check_images(image, count: int) -> list[Image.Image | torch.Tensor]:
    if isinstance(image, torch.Tensor) and image.ndim == 4:
        images = list(image)
    else:
        images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) not in (1, count):
        fail("image", f"one or one for each of the {count} prompts", str(len(images)))
    for one in images:
        if isinstance(one, torch.Tensor):
            _check_tensor(one)
        elif not isinstance(one, Image.Image):
            fail("image", "a PIL image or a tensor, or a list of them", _short(one))
    return images


def _check_tensor(image: torch.Tensor) -> None:
    if image.layout != torch.strided or image.is_meta:
        fail("image", "a dense tensor with data", "a meta tensor" if image.is_meta else str(image.layout))
    if image.ndim != 3 or image.shape[0] not in (3, 4) or image.numel() == 0:
        fail("image", "[3, H, W] pixels or [4, h, w] latents, alone or with a batch axis", str(list(image.shape)))
    if not image.is_floating_point():
        fail("image", "a floating point tensor", str(image.dtype))
    image = image.detach().float()  # what has 8 bits cannot be looked at
    if not image.isfinite().all():
        fail("image", "finite", f"NaN or infinity in {'latents' if len(image) == 4 else 'pixels'}")
    if len(image) == 3 and image.abs().max() > 1:
        fail("image", "pixels in -1..1", f"{image.min():.4g}..{image.max():.4g}")


def _check_count(name: str, value, most: int | None = None, what: str = "generate") -> None:
    if not _is_integer(value) or value < 1 or (most is not None and value > most):
        fail(name, "an integer >= 1" if most is None else f"an integer in 1..{most}", _short(value), what)


def _check_seeds(seed, count: int) -> list[int]:
    seed = seed.tolist() if isinstance(seed, np.ndarray) and seed.ndim == 1 else seed
    seeds = list(seed) if isinstance(seed, (list, tuple, range)) else [seed]
    if not all(_is_integer(s) and 0 <= s < 2**63 for s in seeds):
        fail("seed", "an integer in 0..2**63-1 or a list of them", _short(seed))
    if not isinstance(seed, (list, tuple, range)):
        if int(seed) + count > 2**63:
            fail("seed", f"at most 2**63-{count} for {count} pictures", _short(seed))
        return [int(seed) + i for i in range(count)]
    if len(seeds) != count:
        fail("seed", f"one integer or one for each of the {count} pictures", str(len(seeds)))
    return [int(s) for s in seeds]
