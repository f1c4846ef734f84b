"""Linear layers of a UNet's transformer blocks in fp8 (e4m3): weights and activations, all scales known beforehand.

A weight has a scale for each output channel, an activation one for each layer and timestep: a student is told four
timesteps at most, so a table that ``engine/calibrate.py`` measures once replaces a pass over every activation. Scales
are powers of two: scaling is exact, and only the rounding to e4m3 loses anything.

On CUDA the product is PyTorch's ``_scaled_mm`` with bf16 output (compute capability 8.9 and later; not yet run on a
GPU). ``emulated``, the same numbers are multiplied in fp32 on any device: the definition, for tests and for the record
of what quality it costs (``benchmarks/fp8.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nitrokernels import quantize_e4m3
from nitrokernels.ops.quantize_e4m3 import LARGEST

from ..errors import InputError
from .weights import read_json

E4M3 = torch.float8_e4m3fn
HEADROOM = 2.0  # an activation may be so many times the largest that calibration saw before it saturates
ROWS = 1 << 18  # of an activation whose ones are kept: 64 of SDXL's largest
FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """The largest activations of a model's linear layers, as a JSON file holds them.

    Attributes:
        weights: digest of the layers' weights (``fingerprint``): scales fit no others.
        timesteps: that the UNet is told.
        largest: by layer, the largest absolute input at each of them.
        skip: pieces of layers' names that stay as they are.
        pictures: how many were drawn, for the record.
    """

    weights: str
    timesteps: tuple[int, ...]
    largest: dict[str, list[float]]
    skip: tuple[str, ...]
    pictures: int

    def save(self, path: str | Path) -> None:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Raises InputError unless it is a file that ``save`` wrote."""
        values = read_json(Path(path))
        try:
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            made = Calibration(**values)
            largest = {name: [float(x) for x in row] for name, row in made.largest.items()}
            for row in largest.values():
                if len(row) != len(made.timesteps) or not all(0 <= x < float("inf") for x in row):
                    raise ValueError("a layer without a number for each timestep")
            timesteps, skip = tuple(map(int, made.timesteps)), tuple(map(str, made.skip))
            return Calibration(str(made.weights), timesteps, largest, skip, int(made.pictures))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"fp8: {path} must be a calibration (nitrofusion calibrate), got {error}") from error


def power_of_two(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """The smallest power of two that brings ``largest`` to at most ``limit``, elementwise; 1 for zeros."""
    mantissa, exponent = torch.frexp(largest.float() / limit)
    exponent = exponent - (mantissa == 0.5).int()  # frexp's mantissa is in [0.5, 1)
    # From its bits: ldexp multiplies by what pow returns, which CUDA does not promise to be exact.
    scale = (exponent.clamp(-100, 100) + 127 << 23).view(torch.float32)
    return torch.where(largest > 0, scale, 1.0)


def layers(unet: torch.nn.Module, skip: tuple[str, ...] = ()) -> dict[str, torch.nn.Linear]:
    """The linear layers that fp8 is for, by name: of transformer blocks, both sides multiples of 16."""
    return {
        name: module
        for name, module in unet.named_modules()
        if ".transformer_blocks." in name
        and isinstance(module, torch.nn.Linear)
        and not (module.in_features % 16 or module.out_features % 16)
        and not any(piece in name for piece in skip)
    }


def fingerprint(unet: torch.nn.Module) -> str:
    """12 hex digits of the layers' largest weights, rounded to bf16 so that the model's precision does not matter."""
    digest = hashlib.sha256()
    for name, layer in layers(unet).items():
        largest = layer.weight.detach().abs().amax(1).bfloat16()
        digest.update(name.encode() + largest.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


class Observer:
    """Inside ``with``, it sees the inputs of a UNet's linear layers; then ``calibration`` says how large they were."""

    def __init__(self, unet: torch.nn.Module, skip: tuple[str, ...] = ()):
        for piece in skip:
            if not piece or not any(piece in name for name in layers(unet)):
                raise InputError(f"fp8: skip must be pieces of the names of linear layers, got {piece!r}")
        self._unet, self._skip, self._linears = unet, skip, layers(unet, skip)
        if not self._linears:
            raise InputError("fp8: skip must leave a layer of transformer blocks, got none")
        self._seen: dict[int, dict[str, torch.Tensor]] = {}  # timestep -> layer -> largest
        self._hooks = []

    def __enter__(self) -> Observer:
        self._hooks.append(self._unet.register_forward_pre_hook(self._tell))
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: self._look(name, args[0])))
        return self

    def __exit__(self, *error) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _tell(self, unet, args) -> None:
        self._now = self._seen.setdefault(int(args[1].reshape(-1)[0]), {})

    def _look(self, name: str, x: torch.Tensor) -> None:
        largest = x.abs().amax().float()
        self._now[name] = torch.maximum(self._now[name], largest) if name in self._now else largest

    def calibration(self, pictures: int) -> Calibration:
        timesteps = tuple(sorted(self._seen, reverse=True))
        largest = {name: [float(self._seen[t][name]) for t in timesteps] for name in self._linears}
        return Calibration(fingerprint(self._unet), timesteps, largest, self._skip, pictures)


class Scales:
    """The scales of all quantised layers of a UNet, and which of them are in force.

    ``select`` is a handful of small kernels a call and reads the timestep where it lies, so it can be captured.
    """

    def __init__(self, calibration: Calibration, linears: dict[str, torch.nn.Linear], emulated: bool):
        device = next(iter(linears.values())).weight.device
        self.emulated = emulated
        self.timesteps = torch.tensor(calibration.timesteps, device=device)
        largest = torch.tensor([calibration.largest[name] for name in linears]).T.contiguous()
        self.table = power_of_two(largest, LARGEST / HEADROOM).to(device)  # [timesteps, layers]
        self.inverse = torch.ones(len(linears), device=device)  # of the timestep in force
        widths = torch.tensor([linear.out_features for linear in linears.values()])
        self.layer_of = torch.repeat_interleave(torch.arange(len(linears)), widths).to(device)
        self.weight = torch.ones(int(widths.sum()), device=device)  # by output channel, all layers
        self.out = torch.ones_like(self.weight)  # what a product is multiplied by: of weight and activation
        self._ones = torch.ones(ROWS, 1, device=device)

    def select(self, t: torch.Tensor) -> None:
        """Puts the scales of the calibrated timestep nearest to t [B] in force; a batch is told one timestep."""
        now = self.table.index_select(0, (self.timesteps - t[0]).abs().argmin()[None])[0]
        torch.reciprocal(now, out=self.inverse)
        torch.mul(self.weight, now[self.layer_of], out=self.out)

    def ones(self, rows: int) -> torch.Tensor:
        """[rows, 1]; the activation's scale is in ``out`` already. Of one tensor, because graphs go on reading it."""
        return self._ones[:rows] if rows <= ROWS else torch.ones(rows, 1, device=self.out.device)


class Fp8Linear(torch.nn.Linear):
    """x [..., K] -> [..., N] in x's dtype: both factors in e4m3, sums in fp32.

    A Linear becomes one by ``become``, in place; its weight [N, K] is then e4m3.
    """

    @staticmethod
    def become(linear: torch.nn.Linear, scales: Scales, at: int, first: int) -> None:
        """``at`` is its place among the layers, ``first`` that of its first channel among all channels."""
        weight, rows = linear.weight.detach(), slice(first, first + linear.out_features)
        linear.__class__, linear.scales = Fp8Linear, scales
        linear.inverse, linear.precision = scales.inverse[at : at + 1], weight.dtype
        linear.weight_scale, linear.out_scale = scales.weight[rows], scales.out[rows]
        linear.weight = torch.nn.Parameter(torch.empty_like(weight, dtype=E4M3), requires_grad=False)
        linear.write_weight_(weight)

    @torch.no_grad()
    def write_weight_(self, weight: torch.Tensor) -> None:
        """Quantises another weight into the same memory."""
        scale = power_of_two(weight.abs().amax(1), LARGEST)
        self.weight_scale.copy_(scale)
        self.weight.copy_((weight.float() / scale[:, None]).to(E4M3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = quantize_e4m3(x, self.inverse).view(E4M3).flatten(0, -2)
        if self.scales.emulated:
            out = (rows.float() @ self.weight.float().t()) * self.out_scale
            out = (out if self.bias is None else out + self.bias.float()).to(x.dtype)
        else:
            out = scaled_mm(rows, self.weight, self.scales.ones(len(rows)), self.out_scale[None], self.bias)
        return out.unflatten(0, x.shape[:-1])


def scaled_mm(rows, weight, ones, out_scale, bias) -> torch.Tensor:
    """bf16 [M, N] of e4m3 rows [M, K] and weight [N, K]; ones [M, 1], out_scale [1, N] fp32, bias [N] bf16."""
    # not torch.nn.functional.scaled_mm: PyTorch 2.11 cannot trace it, and torch.compile would break at every layer
    scales = {"scale_a": ones, "scale_b": out_scale}
    return torch._scaled_mm(rows, weight.t(), **scales, bias=bias, out_dtype=torch.bfloat16)


def quantize_(unet: torch.nn.Module, calibration: Calibration, emulated: bool, where: str | Path) -> Scales:
    """Turns the UNet's linear layers into ``Fp8Linear``; call ``Scales.select`` before each of its calls.

    Args:
        where: the calibration's file, for messages.

    Raises:
        InputError: the calibration is of another model.
    """
    linears = layers(unet, calibration.skip)
    if linears.keys() != calibration.largest.keys() or not linears:
        raise InputError(
            f"fp8: {where} must be of this model's {len(linears)} layers, got {len(calibration.largest)} of another's"
        )
    if (ours := fingerprint(unet)) != calibration.weights:
        raise InputError(f"fp8: {where} must be of this model's weights, {ours}, got {calibration.weights} (calibrate)")
    scales, first = Scales(calibration, linears, emulated), 0
    for at, linear in enumerate(linears.values()):
        Fp8Linear.become(linear, scales, at, first)
        first += linear.out_features
    return scales


def missing(device: torch.device) -> str | None:
    """Why ``scaled_mm`` cannot run there, or None."""
    if device.type != "cuda":
        return f"it must be on CUDA, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"it needs compute capability 8.9 or later, got {major}.{minor}"
    return None
