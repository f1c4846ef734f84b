"""The processes of one run: what they agree on, what they average, and how a sharded student is taken apart.

Plain torch. torchrun, or whatever sets its variables, starts the processes. ``ddp`` averages gradients; ``fsdp2`` also
shards the student with its gradients, optimizer state and average. All else is replicated, and equal everywhere.

Checkpoints hold whole tensors in safetensors, however many processes there are, so that any number can go on from
them. torch.distributed.checkpoint's own format is not used: reading it unpickles its ``.metadata``, which can run code.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import TrainConfig
from ..draws import Draws
from ..errors import InputError, NitroError, Preempted, of_exit_code
from ..recipes import Phase
from ..torchrun import MOST_PROCESSES, told

BUCKET = 1 << 26  # gradients that travel together: what averaging takes in memory, 256 MB
_STORE = "nitrofusion/store"
_SOON = datetime.timedelta(seconds=2)
_TIMEOUT = datetime.timedelta(hours=1)  # one may draw a shard of teacher samples that the others wait for


class Processes:
    """Those that were started together, as one of them sees them."""

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        self.draws = Draws(rank, world_size)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Where one process fails or is told to stop, all end with its exit code: none is left waiting for it."""
        failure = None
        try:
            yield
        except (Exception, Preempted) as error:
            failure = error
        code = 0 if failure is None else getattr(failure, "exit_code", NitroError.exit_code)
        worst = int(max(self._all([code]), default=0)) if self.world_size > 1 else code
        if failure is not None:
            raise failure
        if worst == Preempted.exit_code:
            raise Preempted
        if worst:
            raise of_exit_code(worst)("train: all processes must go on, got a failure of another one")

    def any(self, flag: bool | int) -> bool:
        """Whether it is set anywhere."""
        return bool(flag) if self.world_size == 1 else any(self._all([flag]))

    def deal(self, numbers: list[int]) -> list[int]:
        """This process's share, every ``world_size``-th, of the numbers that rank 0 has: all are dealt, evenly."""
        if self.world_size == 1:
            return numbers
        dealt = torch.zeros(int(self._all([len(numbers)])[0]), dtype=torch.int64)
        if self.rank == 0:
            dealt.copy_(torch.tensor(numbers))
        dist.broadcast(dealt, 0)
        return dealt[self.rank :: self.world_size].tolist()

    def mean(self, values: list[float]) -> list[float]:
        """Of each value, over the processes; equal on all."""
        if self.world_size == 1:
            return values
        return torch.tensor(self._all(values), dtype=torch.float64).view(self.world_size, -1).mean(0).tolist()

    def _all(self, values: list[float]) -> list[float]:
        """The values of all processes, in their order; through the CPU, so that no device has to wait."""
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone).tolist()

    def average_gradients(self, phase: Phase) -> None:
        """Makes the gradients of ``phase`` the mean over the processes: of stacked heads, those of the sampled alone.

        Which rows those are, equal on all processes, the optimizer knows. Sharded gradients already are the mean.
        """
        if self.world_size == 1:
            return
        rows_of = getattr(phase.optimizer, "active_rows", lambda param: slice(None))
        params = [p for p in phase.module.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        bucket: list[tuple[torch.Tensor, torch.Tensor | slice]] = []
        size = 0
        for p in params:
            bucket.append((p.grad, rows_of(p)))
            size += p.grad[bucket[-1][1]].numel()
            if size >= BUCKET:
                self._average(bucket)
                bucket, size = [], 0
        if bucket:
            self._average(bucket)

    def _average(self, bucket: list[tuple[torch.Tensor, torch.Tensor | slice]]) -> None:
        parts = [grad[rows] for grad, rows in bucket]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        means = flat.div_(self.world_size).split([part.numel() for part in parts])
        for (grad, rows), part, mean in zip(bucket, parts, means, strict=True):
            grad[rows] = mean.view_as(part)

    def clip_gradients(self, module: torch.nn.Module, limit: float) -> float:
        """Scales the gradients of ``module`` to that norm at most; returns the norm they had, equal everywhere."""
        params = [p for p in module.parameters() if p.grad is not None]
        if not is_sharded(module):
            return torch.nn.utils.clip_grad_norm_(params, limit).item()
        grads = [local(p.grad) for p in params]
        norm = sum(n**2 for n in self._all([torch.nn.utils.get_total_norm(grads).item()])) ** 0.5
        torch._foreach_mul_(grads, min(1.0, limit / (norm + 1e-6)))
        return norm


def join(config: TrainConfig) -> Processes:
    """Joins the processes that torchrun started, each with a device of its own.

    Raises:
        InputError: there are several, and ``config.parallel`` or ``config.device`` is for one; or they were not all
            told which they are.
    """
    size = told("train", "WORLD_SIZE", 1, MOST_PROCESSES, otherwise=1)
    if config.parallel == "none" and size > 1:
        raise InputError(f"config: parallel must be ddp or fsdp2 in {size} processes, got 'none'")
    if size > 1 and str(config.device).startswith("cuda:"):  # all would be on that one, which NCCL refuses
        raise InputError(f"config: device must be cuda in {size} processes, got {config.device!r}: each has its own")
    if size == 1 and not dist.is_initialized():
        return Processes()
    if not dist.is_initialized():
        told("train", "RANK", 0, size - 1)  # the others would wait an hour for one that is none
        told("train", "MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise InputError("train: MASTER_ADDR must be a host, as torchrun sets it, got none")
        cuda = torch.cuda.is_available() and str(config.device or "cuda").startswith("cuda")
        if cuda:
            torch.cuda.set_device(told("train", "LOCAL_RANK", 0, size - 1, otherwise=0))
        where = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            where = dict(store=_own_store(), rank=int(os.environ["RANK"]), world_size=size)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT, **where)
    return Processes(dist.get_rank(), dist.get_world_size())


def _own_store() -> dist.Store:
    """A store of this attempt alone, held by rank 0.

    torchrun restarts processes with the store of the attempt before, where the addresses of those that died still
    stand (pytorch issues 135712, 167288). Here it only tells where rank 0's own is; a dead one does not answer.
    """
    host, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    board = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=_TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        board.set(_STORE, str(store.port))
        return store
    while True:
        try:
            store = dist.TCPStore(host, int(board.get(_STORE)), is_master=False, timeout=_SOON)
        except dist.DistNetworkError:
            continue  # that rank 0 is dead; the new one is about to write
        store.set_timeout(_TIMEOUT)
        return store


def shard_(student: torch.nn.Module) -> torch.nn.Module:
    """Shards a UNet's parameters over the processes, gathered one transformer block or ResNet at a time.

    fp32 as they are; computing is autocast's business, so that losses are those of ``ddp``. All is gathered anew for
    the backward pass and between calls, the rest of the UNet too: a run switches ``requires_grad`` between calls, which
    only counts while parameters are apart.
    """
    blocks = [*student.down_blocks, student.mid_block, *student.up_blocks]
    for block in blocks:
        for attention in getattr(block, "attentions", None) or ():
            for inner in attention.transformer_blocks:
                fully_shard(inner, reshard_after_forward=True)
        for resnet in getattr(block, "resnets", None) or ():
            fully_shard(resnet, reshard_after_forward=True)
    return fully_shard(student, reshard_after_forward=True)


def is_sharded(module: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``, for a sharded module on this process's parts alone, which the state consists of too.

    On the sharded tensors themselves torch takes seconds to work out what happens to a list of a thousand.
    """
    owned = [group["params"] for group in optimizer.param_groups]
    if not any(isinstance(p, DTensor) for params in owned for p in params):
        optimizer.step()
        return
    parts = {p: local(p) for params in owned for p in params}
    for p, part in parts.items():
        part.grad = None if p.grad is None else local(p.grad)
    optimizer.state = defaultdict(dict, {parts[p]: state for p, state in optimizer.state.items()})
    for group, params in zip(optimizer.param_groups, owned, strict=True):
        group["params"] = [parts[p] for p in params]
    try:
        optimizer.step()
    finally:
        optimizer.state = defaultdict(dict, {p: optimizer.state[part] for p, part in parts.items()})
        for group, params in zip(optimizer.param_groups, owned, strict=True):
            group["params"] = params
        for part in parts.values():
            part.grad = None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Sharded tensors gathered into host memory, one at a time, where ``keep``; others as they are.

    All processes have to take part.
    """
    made = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = tensor.full_tensor()
            if not keep:
                continue
            tensor = gathered.cpu()
        made[name] = tensor
    return made


def shard_like(tensors: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, of which each process keeps its part where the one of that name in ``like`` is sharded."""
    return {name: _shard_like(tensor, like.get(name)) for name, tensor in tensors.items()}


def optimizer_parts(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This process's parts of ``checkpoint.pack_optimizer``'s whole tensors: of those shaped like their parameter."""
    owners = _owners(tensors, optimizer)
    like = {name: p for name, p in owners.items() if p.shape == tensors[name].shape}
    return {name: local(tensor) for name, tensor in shard_like(tensors, like).items()}


def optimizer_whole(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The inverse, of what ``checkpoint.pack_optimizer`` finds in a process, for ``whole`` to gather."""
    made = dict(tensors)
    for name, p in _owners(tensors, optimizer).items():
        if isinstance(p, DTensor) and tensors[name].ndim and tensors[name].shape == local(p).shape:
            layout = dict(shape=p.shape, stride=p.stride(), run_check=False)
            made[name] = DTensor.from_local(tensors[name], p.device_mesh, p.placements, **layout)
    return made


def _owners(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    found = {name: params.get(int(name.split(".")[0])) for name in tensors}
    return {name: p for name, p in found.items() if p is not None}


def _shard_like(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # From its own copy: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
