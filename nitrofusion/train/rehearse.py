"""A training step on the meta device: tensors have shapes and no memory; what they and the work would take is counted.

The step is the recipe's own code. What differs from a real device is put in its place: autocast, which meta tensors do
not know; attention, which keeps no matrix of scores; fused ops, which are described to PyTorch by ``register_fake``.
"""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from nitrokernels import dispatch
from nitrokernels.dispatch import Impl

from .. import recipes, sampling
from ..config import TrainConfig
from ..data import teacher_scheduler
from ..device import absent, planned_device
from ..models import sdxl
from ..models.folder import config_of
from ..models.recompute import recompute_
from ..models.stored import on_meta
from ..student import make_student, trainable, trajectories

# What autocast runs in bfloat16, on a CPU and on CUDA alike, and what it runs in fp32 on CUDA alone.
_LOW = {
    torch._C._nn.linear, F.linear, F.conv2d, torch.conv2d, F.conv1d, torch.conv1d, torch.matmul, torch.Tensor.matmul,
    torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.mm, torch.addmm,
}  # fmt: skip
_HIGH_ON_CUDA = {
    F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, F.interpolate, F.normalize, F.softplus,
    torch.softmax, torch.Tensor.softmax, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss, F.smooth_l1_loss,
    F.cosine_similarity, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow,
    torch.Tensor.__pow__, torch.square, torch.Tensor.square, torch.rsqrt, torch.Tensor.rsqrt, torch.sum,
    torch.Tensor.sum, torch.norm, torch.Tensor.norm, torch.linalg.vector_norm,
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts bytes of the storages that ops make, for as long as anything holds them, and floating-point operations.

    ``FlopCounterMode`` puts hooks on modules, which a gradient of a gradient does not allow.

    Attributes:
        now, peak: bytes.
        flops: of matrix products and convolutions, two for a multiplication and an addition; of fused ops none.
    """

    def __init__(self, known: Iterator[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._hold(tensor.untyped_storage())
        return out

    def add_flops(self, count: int) -> None:
        self.flops += count

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._held:
            return

        def free(_) -> None:
            self.now -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Attention(torch.autograd.Function):
    """Shapes of attention that keeps queries, keys, values, its result and a number a row."""

    @staticmethod
    def forward(ctx, q, k, v, add_flops):
        ctx.add_flops = add_flops
        add_flops(sdpa_flop_count(q.shape, k.shape, v.shape))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[:3]
        ctx.add_flops(sdpa_backward_flop_count(grad.shape, *(t.shape for t in inputs)))
        return *(torch.empty_like(t) for t in inputs), None


class OnMeta(TorchFunctionMode):
    """What meta tensors lack: autocast as on ``device``, attention without a matrix, a value where one is read.

    They know no autocast of their own, whichever is on; here the CPU's is meant by it.
    """

    def __init__(self, device: torch.device, add_flops: Callable[[int], None]):
        super().__init__()
        self._high, self._add_flops = _HIGH_ON_CUDA if device.type == "cuda" else set(), add_flops
        self._casts: dict[int, torch.Tensor] | None = None  # of weights

    @contextlib.contextmanager
    def autocast(self, enabled: bool) -> Iterator[None]:
        """What is called within is computed in bfloat16; casts of weights are kept to its end, as autocast does."""
        self._casts = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            yield
        self._casts = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, autocast = kwargs or {}, torch.is_autocast_enabled("cpu")
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._low(t) if autocast else t for t in args[:3])
            return _Attention.apply(q, k, v, self._add_flops) if q.is_meta else func(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist) and args[0].is_meta:
            value = torch.zeros(args[0].shape, dtype=args[0].dtype)
            return value if func is torch.Tensor.cpu else func(value)
        if autocast and (func in _LOW or func in self._high):
            cast = self._low if func in _LOW else _high
            args, kwargs = [cast(a) for a in args], {k: cast(a) for k, a in kwargs.items()}
        return func(*args, **kwargs)

    def _low(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or not x.is_meta:
            return x
        if self._casts is None or not (x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if id(x) not in self._casts:
            self._casts[id(x)] = x.bfloat16()
        return self._casts[id(x)]


def _high(x):
    low = isinstance(x, torch.Tensor) and x.is_meta and x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if low else x


@contextlib.contextmanager
def _ops_as_on(device: torch.device) -> Iterator[None]:
    """Ops choose for meta tensors as for those of ``device``; one that is not here is taken to have what it needs."""
    kept = {name: op.impls for name, op in dispatch.OPS.items()}
    if absent(device):
        reasons = dict.fromkeys(("cuda", "triton")) | {"cpu": "tensors must be on cpu, got cuda"}
    else:
        there = torch.empty(0, device=device)
        reasons = {backend: dispatch.missing(backend, there) for backend in ("cuda", "triton", "cpu")}
    try:
        for op in dispatch.OPS.values():
            if "cpu" in op.impls:  # what it returns and keeps for gradients is described to meta tensors, for all alike
                run = op.impls["cpu"].run
                ours = {b: Impl(run, lambda *_, b=b: reasons[b], i.slower) for b, i in op.impls.items() if b != "ref"}
                op.impls = ours | {"ref": op.impls["ref"]}
        yield
    finally:
        for name, impls in kept.items():
            dispatch.OPS[name].impls = impls


@dataclass(frozen=True)
class Rehearsal:
    """What a training step takes in one process.

    Attributes:
        moments: bytes held at the highest beside weights and the optimizers' state, by what the step does; gradients
            are in them.
        gradients: bytes of those that stay from one micro-batch to the next.
        flops: of an optimizer step, without online teacher samples; mean over all stages, and over steps in which not
            every phase is due. Of the heads none, where they are fused.
    """

    moments: dict[str, int]
    gradients: int
    flops: float


def rehearse(config: TrainConfig, folder: Path, unet, backbone=None) -> Rehearsal:
    """One training step of ``config``, as its device would do it.

    Args:
        unet: the teacher's, on the meta device.
        backbone: another one that gives the features.
    """
    device = planned_device(config.device)
    quiet = config.__class__.from_json(
        config.to_json() | {"pool_offload": False, "optimizer": "adamw", "init": None, "backbone": None}
        | {"stages": [1, 1], "first_step_weight": [1.0, 1e-9]}  # step 0 has trajectories of one call, step 1 of two
    )
    frozen = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with contextlib.ExitStack() as stack:
        if config.backend != "ref":
            stack.enter_context(_ops_as_on(device))
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(json.loads((folder / "vae" / "config.json").read_text()))
            vae = torch.nn.Module.to(vae, frozen).requires_grad_(False)
            model = sdxl.SDXL(folder, _frozen(unet, frozen), vae, (), (), torch.empty(1000))
            student = make_student(quiet, model, config.backend != "ref")
            if backbone is not None:
                model.unet = _frozen(backbone, frozen)
            if config.gradient_checkpointing:
                recompute_(model.unet)
            recipe = recipes.build(quiet, model, student)
        modules = [model.unet, vae, student, *(phase.module for phase in recipe.phases)]
        known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        counted = Counted([*known, model.alphas_cumprod])
        mode = OnMeta(device, counted.add_flops)
        bf16 = config.precision == "bf16"
        stack.enter_context(mode)
        stack.enter_context(counted)
        found, flops, walks, due, calls = {}, {}, Counter(), _due(recipe.phases), _calls(config, folder)
        # All phases first, once more with the gradients that stay, then as they run without one another.
        first = [next(iter(due))] * (min(2, config.accumulation) - 1)
        turns = [(names, 0) for names in (*first, *due)] + [(names, 1) for names in due if calls.student > 1]
        for micro, (names, step) in enumerate(turns):
            before, batch = counted.flops, _batch(quiet, model, micro, step)
            for phase in (phase for phase in recipe.phases if phase.name in names):
                for other in recipe.phases:
                    other.module.requires_grad_(other is phase)
                counted.peak = counted.now
                with mode.autocast(bf16):
                    terms = recipe.loss(phase.name, batch)
                loss = sum(term.float().mean() for term in terms.values())
                _backward(loss)
                del terms, loss
                if step == 0:  # the call before takes less than the graph of the last
                    found[phase.name] = max(counted.peak, found.get(phase.name, 0))
            walks[names] += "teacher_walks" in batch.shared
            flops[names, step] = counted.flops - before
            del batch
        gradients = sum(
            p.grad.nbytes for phase in recipe.phases for p in phase.module.parameters() if p.grad is not None
        )
        with torch.no_grad():
            before, counted.peak = counted.flops, counted.now
            _teacher_call(config, model)
            teacher_call = counted.flops - before
            if config.teacher_samples == "online":
                found["teacher samples"] = counted.peak
            for phase in recipe.phases:
                for p in phase.module.parameters():
                    p.grad = None
            counted.peak = counted.now
            if config.num_previews:
                _preview(config, model, student, mode)
            found["previews"] = counted.peak
    total = 0.0
    for names, steps in due.items():
        further = flops.get((names, 1), flops[names, 0]) - flops[names, 0]
        total += steps * (flops[names, 0] + (calls.student - 1) * further + walks[names] * calls.teacher * teacher_call)
    return Rehearsal(found, gradients, total / due.total() * config.accumulation)


@dataclass(frozen=True)
class _Calls:
    """How often a micro-batch calls the student to draw once, and the teacher to end what it began; means of a run."""

    student: float
    teacher: float


def _calls(config: TrainConfig, folder: Path) -> _Calls:
    scheduler, student, teacher = teacher_scheduler(folder, config.teacher_scheduler), 0.0, 0.0
    scheduler.set_timesteps(config.teacher_steps)
    for stage, steps in enumerate(config.stages, start=1):
        for share, timesteps in trajectories(config, stage):
            share *= steps / config.total_steps
            student += share * len(timesteps)
            if len(timesteps) > 1:
                teacher += share * max(1, int((scheduler.timesteps <= timesteps[-1]).sum()))
    return _Calls(student, teacher)


def _due(phases: tuple[recipes.Phase, ...]) -> Counter[tuple[str, ...]]:
    """In how many steps of a round which phases run, once all have started; all of them come first."""
    steps = range(math.lcm(*(phase.interval for phase in phases)))
    return Counter(tuple(phase.name for phase in phases if step % phase.interval == 0) for step in steps)


def sample_flops(config: TrainConfig, folder: Path, unet) -> float:
    """Floating-point operations of one teacher sample; of the decoder, which drawing it does not need, none.

    Args:
        unet: the teacher's, on the meta device.
    """
    with torch.device("meta"):
        model = sdxl.SDXL(folder, _frozen(unet, torch.float32), None, (), (), torch.empty(1000))
    counted = Counted()
    with torch.no_grad(), OnMeta(torch.device("cpu"), counted.add_flops), counted:
        _teacher_call(config, model)
    return counted.flops / config.batch_size * config.teacher_steps


def _teacher_call(config: TrainConfig, model: sdxl.SDXL) -> None:
    """What a step of the online teacher holds, which is called outside autocast."""
    doubled = config.batch_size * (2 if config.guidance_scale > 1 else 1)
    batch = _inputs(model, doubled)
    sampling.with_unet(model.unet)(batch["noise"], torch.empty(doubled, device="meta"), batch["cond"], 0)


def _preview(config: TrainConfig, model: sdxl.SDXL, student, mode: OnMeta) -> None:
    """The averaged student draws pictures while the weights in training wait in a copy."""
    waiting = [p.clone() for p in trainable(student).parameters()]
    batch, t = _inputs(model, config.num_previews), torch.empty(config.num_previews, device="meta")
    with mode.autocast(config.precision == "bf16"):
        x0 = sampling.with_unet(student)(batch["noise"], t, batch["cond"], 0)
    sdxl.decode_each(model, x0.float())
    del waiting


def _backward(loss: torch.Tensor) -> None:
    """``loss.backward()`` rests the function mode, which what is recomputed for checkpointing needs as much."""
    engine, one = torch.autograd.Variable._execution_engine, torch.ones((), device="meta")
    engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def meta_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, without weights."""
    return on_meta("unet", config_of(folder, "unet/config.json"), folder)


def _frozen(unet, dtype: torch.dtype):
    made = type(unet).from_config(unet.config)
    return torch.nn.Module.to(made, dtype).requires_grad_(False)  # diffusers' own would warn of what is not there


def _batch(config: TrainConfig, model: sdxl.SDXL, micro: int, step: int) -> recipes.Batch:
    values = _inputs(model, config.batch_size)
    plan = torch.Generator().manual_seed(micro)
    image = torch.empty_like(values["noise"]) if config.images else None
    target = None if config.teacher_samples == "none" else torch.empty_like(values["noise"])
    prompts = ["a picture"] * config.batch_size
    return recipes.Batch(**values, target=target, step=step, plan=plan, image=image, prompts=prompts)


def _inputs(model: sdxl.SDXL, batch: int) -> dict:
    """Noise and conditioning as the teacher's text encoders make it."""
    unet, side = model.unet, model.latent_size
    tokens = json.loads((model.folder / "tokenizer" / "tokenizer_config.json").read_text()).get("model_max_length", 77)
    low = {"device": "meta", "dtype": unet.dtype}
    cond = sdxl.Conditioning(
        torch.empty(batch, tokens, unet.config.cross_attention_dim, **low),
        torch.empty(batch, sdxl.pooled_width(unet), **low),
        torch.empty(batch, 6, device="meta"),
    )
    return {"noise": torch.empty(batch, unet.config.in_channels, side, side, device="meta"), "cond": cond}
