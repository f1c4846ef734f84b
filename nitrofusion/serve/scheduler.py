"""Who draws next: plain asyncio, without HTTP and without a model.

Live users have one slot each: the newest input wins, older ones are never drawn. HTTP requests wait in a bounded queue.
Whoever has been drawn for least goes next, measured in seconds of drawing; when nobody waits, pictures whose users
stopped typing are refined.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from .metrics import Metrics
from .orders import Drawn, Failed, Order, Refused, Result

log = logging.getLogger(__name__)
IDLE_DELAY = 0.25  # seconds without input before a picture is refined


class Busy(Exception):
    """The queue is full; ``retry_after`` is in seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is stopping."""


class Share:
    """What one session has waiting, and how many seconds were drawn for it."""

    used = 0.0

    def peek(self) -> Order | None:
        """The next order, if it may be drawn now."""
        raise NotImplementedError

    def take(self) -> Callable[[Result], None]:
        """Takes the order that ``peek`` showed; the result goes to what is returned."""
        raise NotImplementedError


class Queue(Share):
    """The requests of one HTTP client, first come first served."""

    def __init__(self):
        self.waiting: deque[tuple[Order, asyncio.Future]] = deque()
        self.drawing = 0  # taken and not answered

    def peek(self) -> Order | None:
        while self.waiting and self.waiting[0][1].done():  # its client went away
            self.waiting.popleft()
        return self.waiting[0][0] if self.waiting else None

    def take(self) -> Callable[[Result], None]:
        _, future = self.waiting.popleft()
        self.drawing += 1

        def done(result: Result) -> None:
            self.drawing -= 1
            if not future.done():
                future.set_result(result)

        return done


class Live(Share):
    """One live user: a slot for the newest input, and its refinements while the user is idle.

    Args:
        deliver: gets (tag, result) of every picture. The next one is drawn after ``sent``, so a slow connection gets
            fewer pictures, not older ones.

    Attributes:
        dropped: inputs that a newer one replaced before they were drawn.
    """

    def __init__(self, scheduler: Scheduler, deliver: Callable[[int, Result], None]):
        self._scheduler, self._deliver = scheduler, deliver
        self._tag, self._orders = 0, deque()
        self._fresh = self._drawing = self._unsent = False
        self._timer: asyncio.TimerHandle | None = None
        self.dropped = 0
        self.due = False

    def put(self, tag: int, orders: Sequence[Order]) -> None:
        """Replaces whatever waits: the first order is drawn at once, the rest one by one while nobody else waits."""
        if self._fresh:
            self.dropped += 1
            self._scheduler.metrics.count("dropped_inputs")
        self._rest()
        self._tag, self._orders, self._fresh = tag, deque(orders), True
        self._scheduler.wake(self)

    def sent(self) -> None:
        """The picture last delivered has left."""
        self._unsent = False
        self._scheduler.wake(self)

    def close(self) -> None:
        self._rest()
        self._orders.clear()
        self._fresh = False
        self._scheduler.leave(self)

    def peek(self) -> Order | None:
        return self._orders[0] if self._fresh and not self._drawing and not self._unsent else None

    def peek_idle(self) -> Order | None:
        return self._orders[0] if self.due and self._orders and not self._drawing and not self._unsent else None

    def take(self) -> Callable[[Result], None]:
        self._orders.popleft()
        tag, first = self._tag, self._fresh
        self._fresh, self._drawing = False, True
        if first:
            self._rest()

        def done(result: Result) -> None:
            self._drawing = False
            if tag != self._tag and not first:
                return  # a refinement that was overtaken; an overtaken input is still newer than what is shown
            self._unsent = True
            if not isinstance(result, Drawn):
                self._orders = self._orders if self._fresh else deque()
            elif self._orders and not self._fresh:
                self._timer = asyncio.get_running_loop().call_later(
                    self._scheduler.idle_delay if first else 0.0, self._idle
                )
            self._deliver(tag, result)

        return done

    def _idle(self) -> None:
        self.due = True
        self._scheduler.wake(None)

    def _rest(self) -> None:
        self.due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Scheduler:
    """Hands batches to ``draw``, one at a time.

    Args:
        draw: coroutine function, one result for each order; it does not raise.
        max_queue: HTTP pictures that may wait. When the queue is full, the newest of the client that holds most makes
            room for one of a client that holds fewer; any other is refused.
        max_batch: orders of one ``shape`` that are drawn together.
        idle_delay: seconds before refinement.
    """

    def __init__(
        self,
        draw: Callable[[list[Order]], Awaitable[list[Result]]],
        max_queue: int = 16,
        max_batch: int = 1,
        idle_delay: float = IDLE_DELAY,
        metrics: Metrics | None = None,
    ):
        self._draw, self.max_queue, self.max_batch, self.idle_delay = draw, max_queue, max_batch, idle_delay
        self.metrics = metrics or Metrics()
        self._queues: dict[str, Queue] = {}
        self._live: dict[Live, None] = {}
        self._floor = 0.0
        self._work, self._task = asyncio.Event(), None
        self._busy, self._closed = 0, False
        self._mean = 0.1  # seconds of a batch, smoothed

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def refuse(self) -> None:
        """Takes no new requests from now on."""
        self._closed = True

    async def close(self) -> None:
        """Finishes what waits, then stops."""
        self._closed = True
        self._work.set()
        if self._task is not None:
            await self._task

    @property
    def waiting(self) -> int:
        """Pictures that would be drawn next if the worker were free; refinements are not among them."""
        return self.queued + sum(live.peek() is not None for live in self._live)

    @property
    def queued(self) -> int:
        """HTTP pictures in the queue."""
        return sum(not future.done() for queue in self._queues.values() for _, future in queue.waiting)

    @property
    def drawing(self) -> int:
        return self._busy

    @property
    def sessions(self) -> int:
        return len(self._live)

    def join(self, deliver: Callable[[int, Result], None]) -> Live:
        """A new live user."""
        live = Live(self, deliver)
        self._live[live] = None
        return live

    def leave(self, live: Live) -> None:
        self._live.pop(live, None)

    async def submit(self, client: str, orders: Sequence[Order]) -> list[Drawn]:
        """Draws all ``orders``; a caller that is cancelled takes its waiting orders along.

        Raises:
            Busy, Closed: at once.
            Refused, Failed: of the first order that was.
        """
        if self._closed:
            raise Closed("the server is stopping")
        queue, futures = self._queues.setdefault(client, Queue()), []
        try:
            for _ in range(len(orders) + self.queued - self.max_queue):
                self._make_room(queue, len(orders))
            futures = [asyncio.get_running_loop().create_future() for _ in orders]
            queue.waiting.extend(zip(orders, futures, strict=True))
            self.wake(queue)
            results = [await future for future in futures]
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen: one failure is raised for all
            self._forget()
        for result in results:
            if not isinstance(result, Drawn):
                raise result
        return results

    def wake(self, share: Share | None) -> None:
        """Something may be drawable now. A share that rested did not save up: it begins level with the others."""
        if share is not None:
            share.used = max(share.used, self._floor)
        self._work.set()

    def _make_room(self, queue: Queue, count: int) -> None:
        fullest = max(self._queues.values(), key=lambda q: len(q.waiting), default=queue)
        if fullest is queue or len(fullest.waiting) <= len(queue.waiting) + count:
            self.metrics.count("refused", reason="queue")
            raise Busy(max(1, math.ceil(self._mean * self.queued / self.max_batch)))
        _, future = fullest.waiting.pop()
        if not future.done():
            self.metrics.count("refused", reason="queue")
            future.set_exception(Busy(max(1, math.ceil(self._mean * self.queued / self.max_batch))))

    def _pick(self) -> list[tuple[Share, Order]]:
        """The next batch: the neediest share's order, and others of its shape; refinements when nobody waits."""
        ready = [(share, order) for share in self._shares() if (order := share.peek()) is not None]
        if not ready:
            idle = [(live, order) for live in self._live if (order := live.peek_idle()) is not None]
            return [min(idle, key=lambda pair: pair[0].used)] if idle else []
        ready.sort(key=lambda pair: pair[0].used)
        first = ready[0]
        return [pair for pair in ready if pair[1].shape == first[1].shape][: self.max_batch]

    def _forget(self) -> None:
        """Drops clients that wait for nothing and have no more behind them than one who begins now."""
        for client, queue in list(self._queues.items()):
            if queue.peek() is None and not queue.drawing and queue.used <= self._floor:
                del self._queues[client]

    def _shares(self):
        return itertools.chain(self._live, self._queues.values())

    async def _run(self) -> None:
        while True:
            self._work.clear()
            picked = self._pick()
            if not picked:
                if self._closed:
                    return
                await self._work.wait()
                continue
            shares = [share for share, _ in picked]
            jobs = [(order, share.take()) for share, order in picked]
            for share in shares:  # further requests of the same clients
                while len(jobs) < self.max_batch and isinstance(share, Queue):
                    order = share.peek()
                    if order is None or order.shape != jobs[0][0].shape:
                        break
                    jobs.append((order, share.take()))
                    shares.append(share)
            await self._finish(shares, jobs)

    async def _finish(self, shares: list[Share], jobs: list[tuple[Order, Callable]]) -> None:
        self._busy = len(jobs)
        start = time.perf_counter()
        results = await self._draw([order for order, _ in jobs])
        seconds = time.perf_counter() - start
        self._busy = 0
        self._mean += 0.2 * (seconds - self._mean)
        self.metrics.observe("draw_seconds", seconds)
        for share in shares:
            share.used += seconds / len(jobs)
        waiting = (share.used for share in self._shares() if share.peek() is not None)
        self._floor = max(self._floor, min([*waiting, *(share.used for share in shares)]))
        for (_, done), result in zip(jobs, results, strict=True):
            kind = {Drawn: "drawn", Refused: "refused", Failed: "failed"}[type(result)]
            self.metrics.count("pictures", result=kind)
            done(result)
        self._forget()
