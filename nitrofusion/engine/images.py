"""Pictures as the engine takes and gives them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..pil import UNREADABLE, upright
from .arguments import MAX_SIDE, fail


def open_image(path: str | Path, what: str = "generate") -> Image.Image:
    """A picture file as RGB, turned as its EXIF orientation says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if max(image.size) > MAX_SIDE:
                    fail("image", f"at most {MAX_SIDE} pixels a side", f"{image.width}x{image.height}", what)
                return upright(image)
    except InputError:
        raise
    except UNREADABLE as error:
        fail("image", "a picture file that can be read", f"{path}: {error}", what)


def rgb(image: Image.Image, what: str = "generate") -> Image.Image:
    """The picture as RGB, turned as its EXIF orientation says."""
    try:
        return upright(image)
    except (*UNREADABLE, AttributeError) as error:  # the latter of a file that was closed
        fail("image", "a picture that can be read and made RGB", f"one of mode {image.mode}: {error}", what)


def prepare(
    images: list[Image.Image | torch.Tensor], height: int | None, width: int | None, scale: int
) -> list[torch.Tensor]:
    """Each as [3, H, W] pixels in [-1, 1] or [4, h, w] latents, float32 and all of one size.

    A PIL image is turned as its EXIF orientation says and then, as diffusers' VaeImageProcessor does, resized (Lanczos)
    to ``height`` and ``width``, by default to its own rounded down to a multiple of ``scale``. A tensor is taken
    as it is.
    """
    ready = []
    for image in images:
        if isinstance(image, Image.Image):
            if min(image.size) < scale:
                fail("image", f"at least {scale} pixels a side", f"{image.width}x{image.height}")
            if max(image.size) > MAX_SIDE:
                fail("image", f"at most {MAX_SIDE} pixels a side", f"{image.width}x{image.height}")
            image = rgb(image)
            sides = [side - side % scale for side in (width or image.width, height or image.height)]
            levels = np.asarray(image.resize(sides, Image.Resampling.LANCZOS)).astype(np.float32) / 255
            ready.append(2 * torch.from_numpy(levels.transpose(2, 0, 1)) - 1)
            continue
        latents = len(image) == 4
        size = [side * scale if latents else side for side in image.shape[1:]]
        wanted = [height or size[0], width or size[1]]
        if size != wanted or size[0] % scale or size[1] % scale or max(size) > MAX_SIDE:
            if size == wanted:
                fail("image", f"a tensor whose sides are multiples of {scale} up to {MAX_SIDE}", f"{size[1]}x{size[0]}")
            fail("image", f"a tensor of {wanted[1]}x{wanted[0]} pixels (only PIL images are resized)",
                 f"{size[1]}x{size[0]}")  # fmt: skip
        ready.append(image.detach().to(torch.float32, copy=True))  # which stays what it is when its owner writes to it
    shapes = sorted({tuple(image.shape) for image in ready})
    if len(shapes) > 1:
        fail("image", "pictures of one size, or height and width given", f"{shapes[0]} and {shapes[1]}")
    return ready


class Newest:
    """What was made of the newest few images, so that typing over one encodes it once."""

    def __init__(self, count: int = 4):
        self._count, self._made = count, []

    def get(self, image: torch.Tensor, make: Callable):
        """make(image), or what it returned for one of the same pixels; nobody may write to either."""
        for i, (seen, made) in enumerate(self._made):
            if (seen.shape, seen.device) == (image.shape, image.device) and torch.equal(seen, image):
                self._made.insert(0, self._made.pop(i))  # the one used longest ago goes first
                return made
        made = make(image)
        self._made = [(image, made), *self._made[: self._count - 1]]
        return made

    def clear(self) -> None:
        self._made.clear()


def digest(image: Image.Image | torch.Tensor) -> str:
    """First 12 hex digits of the SHA-256 of an image's size and RGB bytes, or of a tensor's shape and float32 bytes."""
    if isinstance(image, Image.Image):
        image = rgb(image)
        kind, data = f"{image.width}x{image.height}", image.tobytes()
    else:
        kind, data = "x".join(map(str, image.shape)), image.detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(f"{kind}\n".encode() + data).hexdigest()[:12]


def to_np(images: torch.Tensor) -> np.ndarray:
    """[n, H, W, 3] float32 in [0, 1] of a float tensor [n, 3, H, W] in [-1, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """[n, H, W, 3] uint8 of a float tensor [n, 3, H, W] in [-1, 1], rounded as diffusers does; on its device."""
    levels = (images.float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def finite(x: torch.Tensor) -> torch.Tensor:
    """[] bool, on x's device: whether it holds neither NaN nor infinity, which its sum then would be too."""
    return x.sum().isfinite()


def rgb_and_finite(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of pixels."""
    return to_rgb(images), finite(images)


def to_pil(rgb: torch.Tensor) -> list[Image.Image]:
    """PIL images of what ``to_rgb`` returns, on the CPU."""
    size = rgb.shape[2], rgb.shape[1]
    return [Image.frombytes("RGB", size, picture.data) for picture in rgb.numpy()]


def to_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` on the CPU, from CUDA by way of pinned memory."""
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host
