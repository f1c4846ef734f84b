"""Static plans: a whole network as one native call.

A ``Builder`` writes instructions over maps of fixed shape, one image at a time, channels last; ``finish`` packs the
weights, lays the maps out in one arena and returns a ``Plan``. Running it costs one call, whatever the number of
instructions: no dispatch, no allocation, one parallel region.

    >>> b = Builder()
    >>> x = b.map(16, 16, 4, keep=True)
    >>> y = b.matmul(b.copy(x, border=True), weight, bias)     # conv 3x3, weight [N, 4, 3, 3]
    >>> b.keep(y)
    >>> plan = b.finish()
    >>> plan.read(x).copy_(latents); plan.run(); plan.read(y)

Everything is fp32 on the CPU. The instructions and their fields are those of csrc/plan.h.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _native
from ._arena import Buffer, lay_out

WORDS = 24
MATMUL, NORM, MAP, LAYER_NORM, KEYS, ATTENTION, COMBINE, CONV3, LEVELS = range(9)
_MATMUL = (
    "*a rows line x_step y_step kernel x_tap y_tap channels *b units panels *bias *residual residual_step "
    "*c c_step columns activation row_block tile"
)
# The fields of csrc/plan.h's structs, behind kind and tasks: * an address, . a double, all others counts.
FIELDS = {
    MATMUL: _MATMUL,
    NORM: "*x x_step rows channels groups .eps *weight *bias *scale *shift",
    MAP: "*x x_step height width channels zoom *scale *shift activation *out out_x out_y border",
    LAYER_NORM: "*x x_step rows channels .eps *weight *bias *out out_step",
    KEYS: "*k *v k_step v_step keys heads dim *packed_k *packed_v",
    ATTENTION: "*q q_step rows *packed_k *packed_v keys heads dim .scale causal *out out_step row_block",
    COMBINE: "*positive *negative rows channels *how *out",
    CONV3: _MATMUL,
    LEVELS: "*x count *out *wrong",
}
_FIELDS = {kind: ("kind", "tasks", *names.split()) for kind, names in FIELDS.items()}
_FORMATS = {kind: "".join("d" if name[0] == "." else "q" for name in names) for kind, names in _FIELDS.items()}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "quick_gelu": 3, "geglu": 4, "relu": 5}
TILE_ROWS = {1: 12, 2: 12, 3: 8, 4: 6}  # rows of a register tile of that many vectors
# Said wherever memory is made: its user may have set other defaults, and code reads it by address.
_FLOATS = {"dtype": torch.float32, "device": "cpu"}
_SPEED = {1: 0.6, 2: 0.85, 3: 1.0, 4: 1.0}


def missing() -> str | None:
    """Why plans cannot run here, or None."""
    return _native.missing("cpu")


@dataclass(frozen=True, eq=False)
class Map:
    """[height, width, channels] floats somewhere in the arena; a matrix of n rows is an [n, 1, channels] map."""

    buffer: Buffer
    offset: int
    height: int
    width: int
    channels: int
    step: int  # floats between neighbours in x
    line: int  # and in y
    border: bool = False

    @property
    def rows(self) -> int:
        return self.height * self.width

    def columns(self, first: int, count: int) -> Map:
        """The same rows, channels ``first`` to ``first + count``."""
        return Map(self.buffer, self.offset + first, self.height, self.width, count, self.step, self.line, self.border)

    @property
    def dense(self) -> bool:
        return self.line == self.width * self.step


Packed = dict[str, tuple[torch.Tensor, int, tuple[int, ...]]]  # name to packed weights, units, original shape


class Builder:
    """Writes a plan; see the module. Maps live from their first to their last use unless kept.

    Args:
        packed: named weights of an earlier plan of the same network; those of this one are added.
    """

    def __init__(self, packed: Packed | None = None):
        self._code: list[list] = []
        self._segments: dict[str, int] = {}
        self._buffers: list[Buffer] = []
        self._packed: Packed = {} if packed is None else packed

    def segment(self, name: str) -> None:
        """What follows can be run on its own as ``plan.run(name)``; maps that segments share are kept."""
        self._segments[name] = len(self._code)

    def map(self, height: int, width: int, channels: int, keep: bool = False, border: bool = False) -> Map:
        for name, value in (("height", height), ("width", width), ("channels", channels)):
            _check_count(f"map {name}", value, 1)
        edge = 2 if border else 0
        line = (width + edge) * channels
        self._buffers.append(Buffer((height + edge) * line, keep))
        return Map(
            self._buffers[-1], (line + channels) * (edge // 2), height, width, channels, channels, line, border
        )

    def keep(self, x: Map) -> Map:
        x.buffer.keep = True
        return x

    def matmul(
        self,
        x: Map,
        weight: torch.Tensor | Callable[[], torch.Tensor],
        bias: torch.Tensor | Map | None = None,
        residual: Map | None = None,
        activation: str | None = None,
        stride: int = 1,
        padding: int = 1,
        name: str | None = None,
    ) -> Map:
        """A linear layer (weight [N, C]) or a conv (weight [N, C, k, k], k 1 or 3): act(x w + bias) + residual.

        A conv with k = 3 reads a map with a border; most run by Winograd's tiles. ``padding`` 0 pads below and right
        only. GEGLU takes N / 2 values, then N / 2 gates. A bias that is a map [1, 1, N] is read when the plan runs.
        Weights of one name are packed once, however many instructions read them; of those that follow the first, only
        the name is looked at.
        """
        gated = activation == "geglu"
        packed, units, (outputs, inputs, *kernels) = self._weights(weight, gated, name, x.rows)
        kernel = (*kernels, 1)[0]
        if kernels not in ([], [1, 1], [3, 3]) or inputs != x.channels or (kernel > 1 and not x.border):
            got = (outputs, inputs, *kernels)
            raise ValueError(f"plan: weight must fit {x.channels} channels of a map, got {got}")
        height, width = ((n + 1 + padding - kernel) // stride + 1 if kernel > 1 else n for n in (x.height, x.width))
        columns = outputs // 2 if gated else outputs
        out = self.map(height, width, columns)
        panels, rows = packed.shape[0], height * width
        if isinstance(bias, torch.Tensor):
            _check_size("bias", bias, outputs)
            bias = _pack(bias[:, None], units, gated).view(-1)  # padded, and gates beside their values
        elif bias is not None:
            if gated:
                raise ValueError("plan: bias must be a tensor beside geglu, got a map")
            _check_shape("matmul bias", bias, 1, 1, outputs)
        if residual is not None:
            _check_shape("matmul residual", residual, height, width, columns)
            _check_dense("matmul residual", residual)
        tile = _tile(x) if (kernel, stride, padding, gated) == (3, 1, 1, False) else 0
        work = rows // (2 * tile) if tile else rows
        if tile:
            row_block = _tile_block(work, TILE_ROWS[units], panels)
        else:
            row_block = _row_block(rows, TILE_ROWS[units], 120, panels, 2 * rows * outputs * inputs * kernel**2)
        origin = x.offset - (x.line + x.step) * (kernel > 1 and padding)
        self._emit(
            CONV3 if tile else MATMUL,
            panels * -(-work // row_block),
            (x.buffer, origin),
            *(rows, width, stride * x.step, stride * x.line),
            *(kernel, x.step, x.line, inputs),
            *(packed, units, panels),
            bias if bias is None or isinstance(bias, torch.Tensor) else self._at(bias),
            *((self._at(residual), residual.step) if residual else (None, 0)),
            *(self._at(out), out.step, columns, ACTIVATIONS[activation], row_block, tile),
        )
        return out

    def group_norm(
        self,
        x: Map,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
        silu: bool = False,
        border: bool = False,
    ) -> Map:
        for name, value in (("weight", weight), ("bias", bias)):
            _check_size(name, value, x.channels)
        _check_divides("group_norm groups", groups, x.channels)
        _check_dense("group_norm x", x)
        scale, shift = self.map(1, 1, x.channels), self.map(1, 1, x.channels)
        tasks = min(groups, _tasks(x), max(1, x.channels // 16))  # of a vector and more
        out = self._at(scale), self._at(shift)
        self._emit(NORM, tasks, self._at(x), x.step, x.rows, x.channels, groups, eps, weight, bias, *out)
        return self.copy(x, border=border, scale=scale, shift=shift, activation="silu" if silu else None)

    def copy(
        self,
        x: Map,
        border: bool = False,
        zoom: int = 1,
        size: tuple[int, int] | None = None,
        scale: Map | None = None,
        shift: Map | None = None,
        activation: str | None = None,
        out: Map | None = None,
    ) -> Map:
        """``x``, each position ``zoom`` x ``zoom`` times, times scale plus shift, with a border of zeros if wanted.

        ``size`` leaves out some of the last line or column of copies: torch's nearest neighbours for that size.
        """
        _check_dense("copy x", x)
        height, width = (x.height * zoom, x.width * zoom) if size is None else size
        if (-(-height // zoom), -(-width // zoom)) != (x.height, x.width):
            raise ValueError(f"plan: copy size must be of {zoom} times {x.height}x{x.width}, got {height}x{width}")
        if out is None:
            out = self.map(height, width, x.channels, border=border)
        _check_shape("copy out", out, height, width, x.channels)
        for name, value in (("scale", scale), ("shift", shift)):
            if value is not None:
                _check_shape(f"copy {name}", value, 1, 1, x.channels)
        self._emit(
            MAP,
            min(out.height, _tasks(out)),
            *(self._at(x), x.step, out.height, out.width, out.channels, zoom),
            *(self._at(scale) if scale else None, self._at(shift) if shift else None, ACTIVATIONS[activation]),
            *(self._at(out), out.step, out.line, int(border)),
        )
        return out

    def concat(self, *maps: Map) -> Map:
        """Along channels."""
        out = self.map(maps[0].height, maps[0].width, sum(m.channels for m in maps))
        first = 0
        for m in maps:
            self.copy(m, out=out.columns(first, m.channels))
            first += m.channels
        return out

    def layer_norm(self, x: Map, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Map:
        for name, value in (("weight", weight), ("bias", bias)):
            _check_size(name, value, x.channels)
        _check_dense("layer_norm x", x)
        out = self.map(x.height, x.width, x.channels)
        tasks = min(x.rows, _tasks(x))
        self._emit(
            LAYER_NORM, tasks, self._at(x), x.step, x.rows, x.channels, eps, weight, bias, self._at(out), out.step
        )
        return out

    def keys(self, k: Map, v: Map, heads: int) -> tuple[Map, Map]:
        """Keys and values [rows, heads * dim] as ``attention`` reads them."""
        _check_divides("keys heads", heads, k.channels)
        _check_shape("keys v", v, k.height, k.width, k.channels)
        _check_dense("keys k", k)
        _check_dense("keys v", v)
        dim = k.channels // heads
        packed_k = self.map(heads, -(-k.rows // 64) * dim, 64)
        packed_v = self.map(heads, k.rows, -(-dim // 16) * 16)
        out = self._at(packed_k), self._at(packed_v)
        self._emit(KEYS, heads, self._at(k), self._at(v), k.step, v.step, k.rows, heads, dim, *out)
        return packed_k, packed_v

    def attention(self, q: Map, packed: tuple[Map, Map], heads: int, causal: bool = False) -> Map:
        """softmax(q k^T / sqrt(dim)) v, heads side by side: [rows, heads * dim]."""
        _check_divides("attention heads", heads, q.channels)
        _check_dense("attention q", q)
        out, dim = self.map(q.height, q.width, q.channels), q.channels // heads
        keys = packed[1].width
        _check_shape("attention keys", packed[0], heads, -(-keys // 64) * dim, 64)
        row_block = _row_block(q.rows, 12, 60, heads, 4 * q.rows * keys * q.channels)
        self._emit(
            ATTENTION,
            heads * -(-q.rows // row_block),
            *(self._at(q), q.step, q.rows, self._at(packed[0]), self._at(packed[1]), keys, heads, dim, dim**-0.5),
            *(int(causal), self._at(out), out.step, row_block),
        )
        return out

    def combine(self, positive: Map, negative: Map, how: Map) -> Map:
        """``nag_combine`` of two attention outputs; ``how`` [1, 1, 4] is (scale, tau, alpha, keep), read when run."""
        _check_shape("combine negative", negative, positive.height, positive.width, positive.channels)
        _check_shape("combine how", how, 1, 1, 4)
        for name, x in (("positive", positive), ("negative", negative)):
            _check_dense(f"combine {name}", x)
            if x.step != x.channels:
                raise ValueError(f"plan: combine {name} must be a map of its own, got columns")
        out = self.map(positive.height, positive.width, positive.channels)
        both = self._at(positive), self._at(negative)
        tasks = min(out.rows, _tasks(out))
        self._emit(COMBINE, tasks, *both, out.rows, out.channels, self._at(how), self._at(out))
        return out

    def levels(self, x: Map) -> tuple[Map, Map]:
        """Bytes 0 to 255 of values in [-1, 1], four to a float and as torch rounds them; how many are NaN.

        The first is for ``Plan.read_bytes``; the second holds some counts, to be added up.
        """
        if not x.dense or x.step != x.channels:
            raise ValueError("plan: levels must be of a dense map, got columns or a border")
        count, tasks = x.rows * x.channels, _tasks(x)
        out, wrong = self.map(1, 1, -(-count // 4)), self.map(1, 1, tasks)
        self._emit(LEVELS, tasks, self._at(x), count, self._at(out), self._at(wrong))
        return out, wrong

    def finish(self) -> Plan:
        """Lays out the arena. The builder is used up."""
        self._segments["end"] = len(self._code)
        lay_out(self._buffers, sorted(self._segments.values()))
        size = max((b.offset + b.size for b in self._buffers), default=0)
        with torch.inference_mode(False):  # or it could not be written to outside of it
            # More, to begin on a cache line and for vectors that read beyond a last bias or row.
            arena = torch.empty(size + 128, **_FLOATS)
        start = _native.address(arena)
        base = start + -start % 64
        code, kept = bytearray(), {}
        for fields in self._code:
            values = []
            for value in fields:
                if isinstance(value, tuple):
                    value = base + 4 * (value[0].offset + value[1])
                elif isinstance(value, torch.Tensor):
                    value = value.detach().to(torch.float32).contiguous()
                    kept[_native.address(value)] = value
                    value = _native.address(value)
                values.append(0 if value is None else value)
            code += struct.pack(_FORMATS[fields[0]], *values) + bytes(8 * (WORDS - len(fields)))
        first = (base - start) // 4
        return Plan(torch.frombuffer(code, dtype=torch.int64), self._segments, arena, first, list(kept.values()))

    def _weights(self, weight, gated: bool, name: str | None, rows: int) -> tuple[torch.Tensor, int, tuple[int, ...]]:
        """(packed, units, original shape); ``rows`` of the map they are first for."""
        if name in self._packed:
            return self._packed[name]
        weight = weight() if callable(weight) else weight
        units = _units(len(weight) // 2 if gated else len(weight), gated)
        if weight.ndim == 4 and weight.shape[-1] == 3 and len(weight) == 64 and rows <= 64:
            units = 2  # of so few tiles each task would transform all weights: two tasks transform half of them each
        made = _pack(weight, units, gated), units, tuple(weight.shape)
        if name is not None:
            self._packed[name] = made
        return made

    def _at(self, x: Map) -> tuple[Buffer, int]:
        return x.buffer, x.offset

    def _emit(self, kind: int, tasks: int, *fields) -> None:
        fields = kind, tasks, *fields
        for name, value in zip(_FIELDS[kind], fields, strict=True):
            if name[0] == "*":
                if isinstance(value, tuple):
                    value[0].uses.append(len(self._code))
            elif name[0] != ".":
                _check_count(name, value)
            elif not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"plan: {name[1:]} must be a number, got {value!r}")
        self._code.append(list(fields))


class Plan:
    """Instructions, packed weights and memory; make one with a ``Builder``. Not for two threads at a time."""

    def __init__(self, code, segments: dict[str, int], arena: torch.Tensor, first: int, weights: list[torch.Tensor]):
        self._code, self._segments, self._arena, self._first, self._weights = code, segments, arena, first, weights
        self._views: dict[Map | tuple, torch.Tensor] = {}

    def __reduce_ex__(self, protocol):
        raise TypeError("a Plan cannot be copied or pickled, as its code holds addresses: build it again")

    @property
    def nbytes(self) -> int:
        """Of weights and arena."""
        return 4 * (self._arena.numel() + sum(w.numel() for w in self._weights))

    def read(self, x: Map) -> torch.Tensor:
        """A kept map as a tensor [height, width, channels] that shares its memory, the same one at every call."""
        if x not in self._views:
            shape, strides = (x.height, x.width, x.channels), (x.line, x.step, 1)
            self._views[x] = self._arena.as_strided(shape, strides, self._first + x.buffer.offset + x.offset)
        return self._views[x]

    def image(self, x: Map) -> torch.Tensor:
        """``read`` with channels first: [channels, height, width]."""
        if (x, "image") not in self._views:
            self._views[x, "image"] = self.read(x).permute(2, 0, 1)
        return self._views[x, "image"]

    def read_bytes(self, x: Map, *shape: int) -> torch.Tensor:
        """A kept map of bytes as a uint8 tensor of this shape that shares its memory, the same one at every call."""
        if (x, shape) not in self._views:
            self._views[x, shape] = self.read(x).view(torch.uint8).flatten()[: math.prod(shape)].view(shape)
        return self._views[x, shape]

    def run(self, segment: str | None = None) -> None:
        """Runs one segment, or everything."""
        names = list(self._segments)
        begin = 0 if segment is None else self._segments[segment]
        end = len(self._code) // WORDS if segment is None else self._segments[names[names.index(segment) + 1]]
        _native.launch("plan_cpu", self._code, begin, end)


def _units(columns: int, gated: bool) -> int:
    """Vectors of 16 columns in a panel: as little padding as fast panels allow. Half of them are gates if ``gated``."""
    count = -(-columns // 16)
    if gated:
        return 4 if count % 2 == 0 else 2
    return min((4, 3, 2, 1), key=lambda u: -(-count // u) * u / _SPEED[u])


def _check_size(name: str, value: torch.Tensor, count: int) -> None:
    if value.shape != (count,):
        got = len(value) if value.ndim == 1 else tuple(value.shape)
        raise ValueError(f"plan: {name} must have {count} elements, got {got}")


def _check_count(name: str, value: int, least: int = 0) -> None:
    """A float's bits would be read as an integer."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise ValueError(f"plan: {name} must be an integer >= {least}, got {value!r}")


def _check_divides(name: str, value: int, channels: int) -> None:
    _check_count(name, value, 1)
    if channels % value:
        raise ValueError(f"plan: {name} must divide {channels} channels, got {value}")


def _check_shape(name: str, x: Map, *shape: int) -> None:
    if (got := (x.height, x.width, x.channels)) != shape:
        raise ValueError(f"plan: {name} must be a map {shape}, got {got}")


def _check_dense(name: str, x: Map) -> None:
    if not x.dense:
        raise ValueError(f"plan: {name} must be a dense map, got one with a border")


def _tile(x: Map) -> int:
    """Columns of the tiles by which a conv 3x3 over ``x``, stride 1, runs; 0 is none: few do not pay for transforms."""
    if x.height % 2 or x.width % 2 or x.channels % 16 or x.rows < 64:
        return 0
    return 2 if x.width % 4 else 4


def _pack(weight: torch.Tensor, units: int, gated: bool) -> torch.Tensor:
    """[N, C, k, k] or [N, C], any precision, to [panels, k * k * C, 16 * units] fp32, columns padded with zeros.

    One copy: a large network's weights are most of the memory there is.
    """
    weight = weight.detach()
    kernel = tuple(weight.shape[2:]) or (1, 1)
    halves = weight.view(*weight.shape[:2], *kernel).chunk(1 + gated)
    outputs, inputs = halves[0].shape[:2]
    width = 16 * units // len(halves)
    packed = torch.zeros(-(-outputs // width), *kernel, inputs, 16 * units, **_FLOATS)
    whole = outputs // width
    for i, half in enumerate(halves):
        columns = packed[..., i * width : (i + 1) * width]
        columns[:whole] = half[: whole * width].unflatten(0, (whole, width)).permute(0, 3, 4, 2, 1)
        if whole < len(packed):
            columns[whole, ..., : outputs - whole * width] = half[whole * width :].permute(2, 3, 1, 0)
    return packed.flatten(1, 3)


def _row_block(rows: int, tile: int, most: int, others: int, flops: float) -> int:
    """Rows of a task: some microseconds of work, and an even number of tasks."""
    blocks = 1
    while math.ceil(rows / blocks) > most or (blocks * others < flops / 3e5 and rows // (2 * blocks) >= tile):
        blocks *= 2
    return math.ceil(math.ceil(rows / blocks) / tile) * tile


def _tile_block(tiles: int, multiple: int, panels: int) -> int:
    """Tiles of a task: many, as it transforms its weights; an even number of tasks where they stay large."""
    blocks = -(-tiles // 60)
    if blocks * panels % 2 and tiles // (blocks + 1) >= 16:
        blocks += 1
    return math.ceil(math.ceil(tiles / blocks) / multiple) * multiple


def _tasks(x: Map) -> int:
    return max(1, min(16, x.rows * x.channels // 2048))
