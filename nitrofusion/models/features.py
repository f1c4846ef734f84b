"""Frozen vision transformers as feature networks: what ADD's heads look at (arXiv 2311.17042, section 3.2).

A network is a transformers model with a class token, in a folder, or ``timm:<name>``. Of its hidden states five are
kept, as in StyleGAN-T: the patch embedding and four blocks at even distances, each a map of tokens to which the class
token was added.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..draws import ONE, Draws
from ..errors import InputError
from .folder import check_sizes
from .weights import read_json, weight_files

AUGMENTATIONS = ("color", "translation", "cutout")
TIMM = "timm:"
_PREPROCESSOR = "preprocessor_config.json"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALLEST_GRID = 3  # tokens on a side: the heads' convolution is over nine


@dataclass(frozen=True)
class Form:
    """What is known of a network before its weights are read.

    Attributes:
        size: side of the pictures it is given, in pixels.
        grid: tokens on a side.
        prefix: tokens before those of the patches; the first is the class token.
        width: channels.
        depths: which hidden states are kept; 0 is the patch embedding, i the output of block i.
    """

    size: int
    grid: int
    prefix: int
    width: int
    depths: tuple[int, ...]


def check(name: str, size: int = 0) -> Form:
    """The form of the network ``name``, a folder or ``timm:<name>``; reads no weight and fetches nothing.

    Args:
        size: of the pictures it is to be given; 0 is its own.

    Raises:
        InputError: there is no such network, its weights are missing or pickles, or it has no tokens to look at.
    """
    if name.startswith(TIMM):
        return _build_timm(name, size)[2]
    form = _meta_form(Path(name), size)
    _normalisation(Path(name))
    return form


def files(name: str) -> list[Path]:
    """What the network ``name`` is read from."""
    if name.startswith(TIMM):
        return [_timm_file(name)]
    folder = Path(name)
    own = [folder / part for part in ("config.json", _PREPROCESSOR)]
    return [*weight_files(folder, "model"), *(file for file in own if file.is_file())]


def load(name: str, size: int = 0, device: str | torch.device = "cpu") -> FeatureNetwork:
    """The network ``name`` in fp32, frozen, on the meta device without weights.

    Raises:
        InputError: as ``check``, and where weights do not fit.
    """
    weights = torch.device(device).type != "meta"
    if name.startswith(TIMM):
        network, normalisation, form = _build_timm(name, size, weights)
    else:
        folder = Path(name)
        form = check(name, size)
        network = _read(folder) if weights else _described(folder)
        network, normalisation = _Transformers(network, form.size), _normalisation(folder)
    return FeatureNetwork(network, form, *normalisation).to(device)


class FeatureNetwork(nn.Module):
    """Pictures to token maps; frozen, and differentiable in the pictures.

    Args:
        network: pixels [B, 3, size, size], normalised, to (hidden states [B, tokens, C], the last one normalised).
        mean, std: of each channel of pixels in [0, 1].
    """

    def __init__(self, network: nn.Module, form: Form, mean, std):
        super().__init__()
        self.network, self.form = network, form
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(
        self, pixels: torch.Tensor, augment: tuple[str, ...] = (), crop: float = 0.0, draws: Draws = ONE
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps and class embedding of pictures [B, 3, H, W] in [-1, 1].

        Args:
            augment: of ``AUGMENTATIONS``, drawn for each picture from torch's generator.
            crop: chance that the batch is cut to the network's size instead of resized to it.
            draws: of the pictures, where several processes share a batch.

        Returns:
            One map [B, C, grid, grid] fp32 of each of ``form.depths``, the class token added to every other, and the
            class embedding [B, C] fp32 of the last block.
        """
        size, grid = self.form.size, self.form.grid
        pixels = augmented(pixels.float(), augment, draws)
        if crop and min(pixels.shape[2:]) > size and torch.rand(()) < crop:
            top, left = (int(torch.randint(side - size + 1, ())) for side in pixels.shape[2:])
            pixels = pixels[:, :, top : top + size, left : left + size]
        pixels = ((resized(pixels, size) + 1) / 2 - self.mean) / self.std
        states, last = self.network(pixels)
        maps = []
        for depth in self.form.depths:
            tokens = states[depth][:, self.form.prefix :] + states[depth][:, :1]
            maps.append(tokens.float().transpose(1, 2).unflatten(2, (grid, grid)))
        return maps, last[:, 0].float()


def depths_of(blocks: int) -> tuple[int, ...]:
    """Hidden states to keep: the patch embedding and four blocks at even distances; 12 blocks give 0, 3, 6, 9, 12."""
    return tuple(sorted({0, *(math.ceil(blocks * k / 4) for k in range(1, 5))}))


def resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """[B, C, size, size]: the mean over each area where that is smaller, else bicubic."""
    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    if min(pixels.shape[2:]) >= size:
        return F.interpolate(pixels, (size, size), mode="area")
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)


def augmented(pixels: torch.Tensor, kinds: tuple[str, ...], draws: Draws = ONE) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], changed so that a gradient still passes (DiffAugment, arXiv 2006.10738).

    color: brightness, saturation and contrast. translation: by up to an eighth, gray comes in. cutout: a gray square
    of a fifth of the side.
    """
    batch, _, height, width = pixels.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * draws.rand(batch).view(-1, 1, 1, 1)).to(pixels.device)

    if "color" in kinds:
        pixels = pixels + uniform(-0.5, 0.5)
        gray = pixels.mean(1, keepdim=True)
        pixels = gray + (pixels - gray) * uniform(0, 2)
        level = pixels.mean((1, 2, 3), keepdim=True)
        pixels = level + (pixels - level) * uniform(0.5, 1.5)
    rows = torch.arange(height, device=pixels.device).view(1, 1, -1, 1)
    cols = torch.arange(width, device=pixels.device).view(1, 1, 1, -1)
    if "translation" in kinds:
        down, right = (_shift(batch, side, draws).to(pixels.device) for side in (height, width))
        from_row, from_col = rows - down, cols - right
        inside = (from_row >= 0) & (from_row < height) & (from_col >= 0) & (from_col < width)
        image = torch.arange(batch, device=pixels.device).view(-1, 1, 1)
        moved = pixels[image, :, from_row.clamp(0, height - 1)[:, 0], from_col.clamp(0, width - 1)[:, 0]]
        pixels = moved.permute(0, 3, 1, 2) * inside
    if "cutout" in kinds:
        half_height, half_width = height / 10, width / 10
        away_row = (rows + 0.5 - uniform(0, height)).abs()
        away_col = (cols + 0.5 - uniform(0, width)).abs()
        pixels = pixels * ~((away_row < half_height) & (away_col < half_width))
    return pixels


def _shift(batch: int, side: int, draws: Draws) -> torch.Tensor:
    most = int(side / 8 + 0.5)
    return draws.randint(-most, most + 1, batch).view(-1, 1, 1, 1)


class _Transformers(nn.Module):
    """A transformers model as ``FeatureNetwork`` calls it."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network = network
        takes = inspect.signature(network.forward).parameters
        foreign = size != _side(network.config.image_size) and "interpolate_pos_encoding" in takes
        self.options = {"interpolate_pos_encoding": True} if foreign else {}

    def forward(self, pixels: torch.Tensor):
        out = self.network(pixels, output_hidden_states=True, **self.options)
        return out.hidden_states, out.last_hidden_state


def _meta_form(folder: Path, size: int) -> Form:
    """Of the network in a folder, tried once on the meta device."""
    from transformers import AutoConfig, AutoModel

    if not (folder / "config.json").is_file():
        got = "a folder without config.json" if folder.is_dir() else "nothing"
        raise InputError(f"features: {folder} must be the folder of a vision transformer, got {got}")
    weight_files(folder, "model")
    check_sizes(read_json(folder / "config.json"), folder)
    wanted = "a vision transformer that transformers knows"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        own, patch = _side(config.image_size), _side(config.patch_size)
    except Exception as error:  # OSError, ValueError, AttributeError, and types of its own
        raise _refused(folder, wanted, error) from error
    size = size or own
    if size % patch:
        raise InputError(f"features: size must be a multiple of the patch of {folder}, {patch}, got {size}")
    try:
        with torch.device("meta"), torch.no_grad():
            network = AutoModel.from_config(config, trust_remote_code=False)
            states, last = _Transformers(network, size)(torch.empty(1, 3, size, size))
    except Exception as error:  # a network of another kind fails wherever it looks first
        raise _refused(folder, wanted, error) from error
    return _form(folder, states, last, size, patch)


def _form(where, states, last: torch.Tensor, size: int, patch: int) -> Form:
    """From the shapes of one call; raises InputError where there are no tokens to look at."""
    grid = size // patch
    shapes = {tuple(s.shape) for s in [*states, last]}
    prefix = last.shape[1] - grid**2 if last.ndim == 3 else 0
    if len(shapes) != 1 or prefix < 1 or len(states) < 2:
        raise InputError(
            f"features: {where} must give a class token and {grid}x{grid} tokens at every block, got {sorted(shapes)}"
        )
    if grid < _SMALLEST_GRID:
        raise InputError(
            f"features: {where} must give {_SMALLEST_GRID} x {_SMALLEST_GRID} tokens or more, got {grid} x {grid} "
            f"(use larger pictures or a network of smaller patches)"
        )
    return Form(size, grid, prefix, last.shape[2], depths_of(len(states) - 1))


def _described(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def _read(folder: Path) -> nn.Module:
    from transformers import AutoModel

    variant = "fp16" if ".fp16." in weight_files(folder, "model")[0].name else None
    try:
        network, info = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            variant=variant,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors and transformers have types of their own
        raise _refused(folder, "a network whose weights can be read", error) from error
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)  # whose output nobody asks for
    if missing:
        raise InputError(f"features: {folder} must hold all weights, got none for {len(missing)}, first {missing[0]}")
    return network


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation the network was trained with; ImageNet's where the folder does not say."""
    file = folder / _PREPROCESSOR
    values = read_json(file) if file.is_file() else {}
    found = [values.get(key, known) for key, known in zip(("image_mean", "image_std"), _IMAGENET, strict=True)]
    for value in found:
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
        if not numbers or len(value) != 3 or not all(math.isfinite(v) for v in value):
            raise InputError(f"features: {file} must have an image_mean and image_std of three numbers, got {value!r}")
    if min(found[1]) <= 0:
        raise InputError(f"features: {file} must have an image_std above 0, got {found[1]!r}")
    return tuple(found[0]), tuple(found[1])


def _side(value) -> int:
    """Of a square that a configuration gives as one number or two."""
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ValueError(f"{value} is not square")
        value = value[0]
    return int(value)


def _refused(where, wanted: str, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"features: {where} must be {wanted}, got {reason[:200]}")


class _Timm(nn.Module):
    """A timm VisionTransformer as ``FeatureNetwork`` calls it: its own ``forward_features``, every state kept."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor):
        net = self.network
        states = [net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(pixels))))]
        for block in net.blocks:
            states.append(block(states[-1]))
        return states, net.norm(states[-1])


def _timm_file(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    known = name.removeprefix(TIMM)
    file = try_to_load_from_cache(f"timm/{known}", "model.safetensors")
    if not isinstance(file, str):
        raise InputError(
            f"features: {name} must be a network in the local cache, got none (fetch it with: hf download timm/{known})"
        )
    return Path(file)


def _build_timm(name: str, size: int, weights: bool = False) -> tuple[nn.Module, tuple, Form]:
    """(network, (mean, std), form) of ``timm:<name>``; weights come from the hub's cache, never from the network."""
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        reason = str(error).splitlines()[0]
        raise InputError(f"features: {name} needs timm, got {reason} (pip install 'nitrofusion[timm]')") from error
    known, file = name.removeprefix(TIMM), str(_timm_file(name))
    options = {"img_size": size} if size else {}
    if weights:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    try:
        with torch.device("cpu" if weights else "meta"):
            network = timm.create_model(known, num_classes=0, **options)
    except Exception as error:  # timm raises RuntimeError, TypeError and AssertionError
        raise _refused(name, "a network of timm", error) from error
    if not isinstance(network, VisionTransformer):
        raise InputError(f"features: {name} must be a vision transformer, got {type(network).__name__}")
    side, patch = _side(network.patch_embed.img_size), _side(network.patch_embed.patch_size)
    device, adapter = next(network.parameters()).device, _Timm(network.eval())
    with torch.no_grad():
        form = _form(name, *adapter(torch.zeros(1, 3, side, side, device=device)), side, patch)
    return adapter, (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]), form
