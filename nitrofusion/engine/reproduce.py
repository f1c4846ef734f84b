"""Drawing a picture again from what its PNG says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import __version__
from ..errors import InputError
from ..models.folder import PARTS
from ..pil import UNREADABLE
from ..presets import MODELS
from . import load
from .arguments import MAX_SIDE, NEGATIVES
from .hub import cached_folder, is_hub_id
from .images import digest, open_image
from .png import read_settings, save_png
from .source import Loras

_OPTIONS = (  # of ``Engine.generate``
    "prompt", "num_inference_steps", "seed", "negative_prompt", "height", "width", "strength", "guidance_scale",
    "negative", "nag_scale", "nag_tau", "nag_alpha", "nasa_scale", "nag_steps",
)  # fmt: skip
_COMPARED = {"version": "version", "unet": "weights", "device": "device", "dtype": "precision"}
_REQUIRED = ("prompt", "model", "seed", "num_inference_steps", "guidance_scale", "height", "width")
_INTEGERS = ("seed", "num_inference_steps", "height", "width", "nag_steps")
_NUMBERS = ("guidance_scale", "strength", "nag_scale", "nag_tau", "nag_alpha", "nasa_scale")
_TEXTS = ("prompt", "negative_prompt", "negative", "model", "version", "unet", "vae", "device", "dtype", "image")
_LORA = {"name": str, "digest": str, "scale": (int, float)}  # of each of ``loras``


@dataclass(frozen=True)
class Reproduction:
    """A picture drawn again.

    Attributes:
        image: what was drawn now.
        settings: of the original; ``settings_now`` of the new one.
        changed: one line for whatever differs besides pixels: version, weights, device, precision, LoRAs, VAE.
        pixels_different: how many of them, in any channel.
        largest_difference: of any channel, in 0..255.
    """

    image: Image.Image
    settings: dict
    settings_now: dict
    changed: list[str]
    pixels_different: int
    largest_difference: int

    @property
    def is_exact(self) -> bool:
        return self.pixels_different == 0

    def report(self) -> str:
        """What a person wants to know, one fact a line."""
        if self.is_exact:
            pixels = "every pixel is the same"
        else:
            total, count = self.image.width * self.image.height, self.pixels_different
            pixels = f"{count} of {total} pixels differ, by at most {self.largest_difference} of 255"
        return "\n".join([pixels, *self.changed])


def reproduce(
    path: str | Path,
    output: str | Path | None = None,
    image: Image.Image | torch.Tensor | str | Path | None = None,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora: Loras = None,
    vae: str | Path | None = None,
) -> Reproduction:
    """Draws the picture of a PNG that ``nitrofusion generate`` wrote once more, and compares.

    Args:
        path: the PNG.
        output: PNG to write the new picture to, with its own settings.
        image: what an image-to-image picture was drawn from; the PNG holds only its digest.
        model: where the model lies now; None is where the PNG says: a preset, a folder or a safetensors file, or a hub
            id in the local cache.
        device, dtype, lora, vae: as for ``load``. Of LoRAs and VAE the PNG holds only names and digests, so what the
            picture was drawn with has to be given again; ``changed`` says what is not the same.

    Raises:
        InputError: the file is no PNG of ours, or what it says is not what a picture can be drawn from, or ``image`` is
            missing or another one.
    """
    settings = check_settings(read_settings(path), path)
    original = _pixels(path, settings)
    if output is not None and Path(output).suffix.lower() != ".png":
        raise InputError(f"reproduce: output must be a .png file, got {output}")
    image = _source_image(image, settings.get("image"))
    if model is None and not _is_here(model := settings["model"]):
        got = f"{_short(model)} from the picture; name it"
        raise InputError(f"reproduce: model must be a preset or a folder on this machine, got {got}")
    engine = load(model, device=device, dtype=dtype, lora=lora, vae=vae)
    options = {key: settings[key] for key in _OPTIONS if key in settings}
    if image is not None:
        options["image"] = image
    (drawn,) = engine.generate(**options)
    now = engine.settings(**options)
    changed = [
        f"{label}: {_plain(settings[key])} then, {now[key]} now"
        for key, label in _COMPARED.items()
        if key in settings and settings[key] != now[key]
    ]
    changed += _other_loras(settings.get("loras", []), now.get("loras", []), lora is None)
    changed += _other_vae(settings.get("vae"), now.get("vae"), vae is None)
    difference = np.abs(np.asarray(drawn, dtype=np.int16) - original).max(-1)
    if output is not None:
        save_png(drawn, output, now)
    return Reproduction(drawn, settings, now, changed, int((difference > 0).sum()), int(difference.max()))


def check_settings(settings: dict, path: str | Path) -> dict:
    """The settings of a picture from anywhere, each of its type and none unknown, or InputError.

    Ranges are those of ``Engine.generate``, which checks them.
    """

    def fail(wanted: str, got: str):
        raise InputError(f"reproduce: the settings in {path} must {wanted}, got {got}")

    for key in _REQUIRED:
        if key not in settings:
            fail(f"have {key}", "none")
    for key, value in settings.items():
        known = key in (*_INTEGERS, *_NUMBERS, *_TEXTS, "loras")
        if not known:
            fail(f"be those of nitrofusion {__version__} or earlier", f"{key[:40]!r}")
        if value is None and key not in _REQUIRED:
            continue
        if key in _TEXTS and not isinstance(value, str):
            fail(f"have text as {key}", _short(value))
        if key in _INTEGERS and (not isinstance(value, int) or isinstance(value, bool)):
            fail(f"have an integer as {key}", _short(value))
        if key in _NUMBERS and (not isinstance(value, (int, float)) or isinstance(value, bool) or not _finite(value)):
            fail(f"have a number as {key}", _short(value))
        if key == "loras" and not (isinstance(value, list) and all(map(_is_lora, value))):
            fail(f"have a list of objects with {', '.join(_LORA)} as loras", _short(value))
        if key == "negative" and value not in NEGATIVES:
            fail(f"have one of {', '.join(NEGATIVES)} as negative", _short(value))
    if ("image" in settings) != ("strength" in settings):
        fail("have both image and strength or neither", "one")
    return {key: value for key, value in settings.items() if value is not None}


def _is_lora(value) -> bool:
    if not isinstance(value, dict) or value.keys() != _LORA.keys():
        return False
    scale = value["scale"]
    return all(isinstance(value[k], kind) for k, kind in _LORA.items()) and scale is not True and scale is not False


def _other_loras(then: list[dict], now: list[dict], none_given: bool) -> list[str]:
    """The line about LoRAs, if they are others; a file may have another name."""

    def told(loras: list[dict]) -> str:
        texts = [f"{_plain(one['name'])} x {_number(one['scale'])} ({_plain(one['digest'])})" for one in loras]
        return ", ".join(texts) or "none named"

    if [(one["digest"], one["scale"]) for one in then] == [(one["digest"], one["scale"]) for one in now]:
        return []
    hint = ""
    if then and none_given:
        files = " ".join(f"{_plain(one['name'])}:{_number(one['scale'])}" for one in then)
        hint = f" (give them: --lora {files}, or lora=[(file, scale), ...])"
    return [f"LoRAs: {told(then)} then, {told(now)} now{hint}"]


def _other_vae(then: str | None, now: str | None, none_given: bool) -> list[str]:
    if then == now:
        return []
    hint = " (give it: --vae FILE, or vae=...)" if then and none_given else ""
    return [f"VAE: {'none named' if then is None else _plain(then)} then, {now or 'none named'} now{hint}"]


def _is_here(model: str) -> bool:
    """A picture may come from anywhere: what it names is looked for on this machine only."""
    try:
        path = Path(model).expanduser()
        if model in MODELS or path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
            return True
        return is_hub_id(model) and cached_folder(model, PARTS) is not None
    except (OSError, RuntimeError, ValueError):  # a name too long for a path, or of a user who does not exist
        return False


def _plain(text: str) -> str:
    """A text of the file as a terminal may show it."""
    return text if text.isprintable() and len(text) <= 60 else _short(text)


def _number(value: int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else _short(value)


def _finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _pixels(path: str | Path, settings: dict) -> np.ndarray:
    """[H, W, 3] int16, of the size the settings say."""
    wanted = (settings["width"], settings["height"])
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Before the pixels: a small file may unpack to gigabytes.
            if image.size != wanted or max(wanted) > MAX_SIDE:
                size, said = f"{image.width}x{image.height}", f"{wanted[0]}x{wanted[1]}"
                raise InputError(f"reproduce: {path} must be as large as its settings say ({said:.40}), got {size}")
            return np.asarray(image.convert("RGB"), dtype=np.int16)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"reproduce: {path} must be a whole PNG file, got {error}") from error


def _source_image(image, wanted: str | None):
    """The image an image-to-image picture was drawn from, or None of one that was drawn from noise."""
    if wanted is None:
        if image is not None:
            raise InputError("reproduce: image must be left out, got one for a picture that was drawn from noise")
        return None
    if image is None:
        raise InputError(
            f"reproduce: image must be the one this picture was drawn from (digest {_plain(wanted)}), which it does "
            "not hold, got none"
        )
    if isinstance(image, (str, Path)):
        image = open_image(image, "reproduce")
    if not isinstance(image, (Image.Image, torch.Tensor)):
        raise InputError(f"reproduce: image must be a PIL image, a tensor or a file, got {type(image).__name__}")
    if (got := digest(image)) != wanted:
        raise InputError(f"reproduce: image must be the one with digest {_plain(wanted)}, got another ({got})")
    return image
