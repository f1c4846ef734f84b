"""Pictures as the instruments look at them: read, checked, resized and normalised with PIL and torch alone.

torchvision is not needed. Each picture is prepared by itself, so a batch never changes what is seen of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...errors import InputError
from ...models.weights import read_json

# Of the channels in CLIP's training; here because importing them from transformers takes seconds.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_pictures(paths: Iterable[Path], same_size: bool = True) -> Iterator[Image.Image]:
    """RGB pictures of files, one after the other.

    Args:
        same_size: the first one's size is asked of all: a drawn set has one. Photographs of a reference need not.

    Raises:
        InputError: a file is no picture, is cut off, or has another size.
    """
    size = None
    for path in paths:
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")  # reads all of it
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's readers raise
            reason = " ".join(str(error).split())
            raise InputError(f"evaluate: {path} must be a readable picture, got {reason}") from error
        size = size or picture.size
        if same_size and picture.size != size:
            wanted, got = ("x".join(map(str, v)) for v in (size, picture.size))
            raise InputError(f"evaluate: all pictures must have the first one's {wanted} pixels, got {got} in {path}")
        yield picture


def check_call(name: str, images: list, prompts: list[str] | None, needs_prompt: bool = False) -> list[Image.Image]:
    """The pictures in RGB; raises InputError unless they are pictures, with as many prompts where those are needed."""
    for image in images:
        if not isinstance(image, Image.Image):
            raise InputError(f"evaluate: {name} must be given PIL pictures, got {type(image).__name__}")
    if needs_prompt and (prompts is None or len(prompts) != len(images)):
        got = "none" if prompts is None else str(len(prompts))
        raise InputError(f"evaluate: {name} must be given one prompt for each of {len(images)} pictures, got {got}")
    return [image.convert("RGB") for image in images]


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and float32 that is float32: convolutions and products on a GPU are TensorFloat-32 by default."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:  # what ``flags`` is not told it turns off, cuDNN itself too
        with torch.inference_mode(), cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def pixels(image: Image.Image) -> torch.Tensor:
    """[3, h, w] float32 in 0..255 of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def normalised(x: torch.Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> torch.Tensor:
    """[3, h, w] (x - mean) / std by channel."""
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class ResizeCrop:
    """The shorter side to ``size`` by PIL's filter (which looks at all pixels), the centre cut out, normalised.

    Attributes:
        rounded: where the cut is half a pixel off centre, torchvision rounds to even; else it goes up and left, as in
            transformers.
    """

    size: int = 224
    crop: int = 224
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rounded: bool = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """[3, crop, crop] of an RGB picture."""
        width, height = image.size
        short = min(width, height)
        to = [self.size if side == short else int(self.size * side / short) for side in (width, height)]
        image = image.resize(to, Image.Resampling(self.resample))
        left, top = (
            int(round((side - self.crop) / 2)) if self.rounded else (side - self.crop) // 2 for side in image.size
        )
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return normalised(pixels(image) / 255, self.mean, self.std)


def resize_crop_of(folder: Path) -> ResizeCrop:
    """What a model folder's preprocessor_config.json says; raises InputError if that is something else."""
    file = folder / "preprocessor_config.json"
    told = read_json(file)
    size, crop = told.get("size", 224), told.get("crop_size", 224)
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = set(crop.values()) if isinstance(crop, dict) else {crop}
    mean, std = (told.get(key, list(known)) for key, known in
                 (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)))  # fmt: skip
    resample = told.get("resample", 3)
    steps = [told.get(key, True) for key in ("do_resize", "do_center_crop", "do_normalize")]
    numbers = all(
        isinstance(v, list) and len(v) == 3 and all(isinstance(n, int | float) for n in v) for v in (mean, std)
    )
    whole = len(sides) == 1 and all(isinstance(v, int) and v > 0 for v in (size, *sides)) and size >= max(sides)
    if not (numbers and whole and all(steps) and resample in range(6)):
        raise InputError(
            f"evaluate: {file} must say: resize the shorter side, cut out a square, normalise; got {str(told)[:200]}"
        )
    return ResizeCrop(size, sides.pop(), resample, tuple(mean), tuple(std))


def pad_square(image: Image.Image, size: int = 224) -> torch.Tensor:
    """[3, size, size] of an RGB picture: the longer side to ``size``, black at both sides of the other, normalised.

    Bicubic with antialiasing on float pixels, which may overshoot 0..1, as torchvision's on tensors.
    """
    x = pixels(image) / 255
    height, width = x.shape[1:]
    scale = size / max(height, width)
    to = [round(side * scale) for side in (height, width)]
    if scale != 1:
        x = F.interpolate(x[None], to, mode="bicubic", antialias=True)[0]
    down, right = size - to[0], size - to[1]
    return normalised(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


def resize_tf1(x: torch.Tensor, size: int = 299) -> torch.Tensor:
    """[3, size, size] of x [3, h, w]: TensorFlow 1's bilinear resize, as the FID network was used with.

    Output pixel i lies at i * in / out, not at its middle, and only two pixels a side are looked at: large pictures
    alias. Both are part of the number.
    """
    for axis in (2, 1):
        have = x.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * torch.tensor(have / size, dtype=torch.float32)
        low = at.long()
        x_low, x_high = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=have - 1))
        x = x_low + (x_high - x_low) * (at - low).view(-1 if axis == 1 else 1, 1 if axis == 1 else -1)
    return x


def centre_crop(x: torch.Tensor, size: int = 299) -> torch.Tensor:
    """[3, size, size] of the middle of x [3, h, w]; raises InputError if it is smaller."""
    height, width = x.shape[1:]
    if min(height, width) < size:
        raise InputError(f"evaluate: patch_fid must be given pictures of {size}x{size} or more, got {width}x{height}")
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, top : top + size, left : left + size]
