"""A worker and a scheduler that belong together, and their state in words."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from ..errors import NitroError
from .metrics import Metrics
from .orders import Drawer, Failed, Info, Order, Result
from .scheduler import Scheduler
from .worker import Worker

WATCH = 0.2  # seconds between looks at the worker
log = logging.getLogger(__name__)


class Service:
    """Everything behind the endpoints.

    Args:
        make: as for ``Worker``.
        max_queue, max_batch, idle_delay: as for ``Scheduler``; max_batch None is the model's own.
    """

    def __init__(
        self,
        make: Callable[[], Drawer],
        max_queue: int = 16,
        max_batch: int | None = None,
        idle_delay: float | None = None,
    ):
        self.metrics = Metrics()
        self.worker = Worker(make)
        options = {} if idle_delay is None else {"idle_delay": idle_delay}
        self.scheduler = Scheduler(self._draw, max_queue, max_batch or 1, metrics=self.metrics, **options)
        self._own_batch = max_batch is None
        self._reviving, self._watch, self._started = asyncio.Lock(), None, False
        self.fault = ""  # why nothing can be drawn
        self.began = time.time()

    @property
    def info(self) -> Info:
        return self.worker.info

    async def start(self) -> Info:
        """Loads the model; a second call does nothing.

        Raises:
            NitroError: it does not load.
        """
        if not self._started:
            try:
                await self.worker.start()
            except BaseException:
                await self.worker.stop()
                raise
            if self._own_batch:
                self.scheduler.max_batch = self.info.batch
            self.scheduler.start()
            self._watch = asyncio.get_running_loop().create_task(self._watch_worker())
            self._started = True
        return self.info

    async def stop(self) -> None:
        """Finishes what waits, then ends the worker."""
        if not self._started:
            return
        self._started = False
        await self.scheduler.close()
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        await self.worker.stop()

    def health(self) -> dict:
        return {
            "status": "failed" if self.fault else "ok" if self.worker.alive else "restarting",
            "model": self.info.model if self.info else None,
            "queue": self.scheduler.waiting,
            "drawing": self.scheduler.drawing,
            "sessions": self.scheduler.sessions,
            "worker_restarts": self.worker.restarts,
            "started": round(self.began, 3),
        }

    def metrics_text(self) -> str:
        gauges = {
            "queue": self.scheduler.waiting,
            "drawing": self.scheduler.drawing,
            "sessions": self.scheduler.sessions,
            "worker_restarts": self.worker.restarts,
            "worker_up": self.worker.alive,
        }
        return self.metrics.text(gauges)

    async def _draw(self, orders: list[Order]) -> list[Result]:
        if not await self._revive():
            return [Failed(self.fault)] * len(orders)
        results = await self.worker.draw(orders)
        for result in results:
            if isinstance(result, Failed):
                log.error("serve: %s", result)
        return results

    async def _revive(self) -> bool:
        """Whether the worker lives, started again if need be."""
        async with self._reviving:
            if self.worker.alive:
                return True
            try:
                await self.worker.revive()
                self.fault = ""
            except NitroError as error:
                self.fault = str(error)
                log.error("serve: %s", error)
        return not self.fault

    async def _watch_worker(self) -> None:
        while True:
            if not self.worker.alive:
                await self._revive()
            await asyncio.sleep(30.0 if self.fault else WATCH)
