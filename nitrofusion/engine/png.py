"""Pictures that remember how they were drawn: PNG with the settings in it."""

from __future__ import annotations

import io
import json
import os
import uuid
import warnings
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import InputError
from ..pil import UNREADABLE

KEY = "nitrofusion"
MAX_SETTINGS = 64 * 1024  # characters of JSON, so that a crafted file cannot fill the memory of its reader


def save_png(image: Image.Image, path: str | Path, settings: dict) -> Path:
    """Writes the picture with its settings; the file appears complete or not at all.

    The settings go into the text chunk ``nitrofusion`` as JSON, which is what is read again, and into ``parameters`` as
    the text that web interfaces show. Parent folders are created.

    Args:
        settings: JSON values, as ``Engine.settings`` gives them.

    Raises:
        InputError: ``path`` does not end in .png or the settings are over 64 Ki characters.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"png: path must end in .png, got {path.name!r}")
    data = encode_png(image, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def encode_png(image: Image.Image, settings: dict | None = None) -> bytes:
    """The bytes of the file ``save_png`` writes; without settings, of a plain PNG, packed quickly."""
    file = io.BytesIO()
    if settings is None:
        image.save(file, format="PNG", compress_level=1)
        return file.getvalue()
    text = json.dumps(settings, ensure_ascii=False, sort_keys=True)
    if len(text) > MAX_SETTINGS:
        raise InputError(f"png: settings must be at most {MAX_SETTINGS} characters, got {len(text)}")
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    info.add_itxt("parameters", _parameters(settings))
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_settings(path: str | Path) -> dict:
    """The settings ``save_png`` wrote; pixels are not decoded.

    Raises:
        InputError: the file is no PNG, or holds no such settings, or more than 64 Ki characters of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                text = image.info.get(KEY)
    except UNREADABLE as error:
        raise InputError(f"png: {path} must be a readable PNG file, got {error}") from error
    if not isinstance(text, str) or len(text) > MAX_SETTINGS:
        found = "none" if text is None else f"{len(text)} characters"
        raise InputError(f"png: {path} must hold settings of at most {MAX_SETTINGS} characters, got {found}")
    try:
        settings = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"png: the settings in {path} must be JSON, got {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"png: the settings in {path} must be a JSON object, got {type(settings).__name__}")
    return settings


def _no_constant(name: str):
    raise ValueError(f"{name}, which JSON does not have")


_LABELS = {
    "num_inference_steps": "Steps",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "unet": "Model hash",
    "model": "Model",
    "vae": "VAE hash",
    "strength": "Denoising strength",
    "negative": "Negative guidance",
    "nag_scale": "NAG scale",
    "nag_tau": "NAG tau",
    "nag_alpha": "NAG alpha",
    "nasa_scale": "NASA scale",
    "version": "Version",
}


def _parameters(settings: dict) -> str:
    """Prompts and a line of names and values, as Stable Diffusion web interfaces write and read them."""
    values = dict(settings)
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    lines = [str(values.get("prompt", ""))]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    parts = [f"{label}: {_quoted(values[name])}" for name, label in _LABELS.items() if values.get(name) is not None]
    return "\n".join([*lines, ", ".join(parts)])


def _quoted(value) -> str:
    """A value that would read as several is a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text
