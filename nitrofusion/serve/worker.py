"""The worker: a process of its own that holds the engine, is watched, and is started anew when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from ..errors import NitroError, out_of_memory
from .orders import Drawer, Failed, Info, Order, Result

LOAD_TIMEOUT = 3600.0  # seconds; a large model may have to be fetched first
DRAW_TIMEOUT = 300.0  # torch.compile's first picture takes minutes
STARTS = 5  # attempts in a row before the worker is given up


class ServeError(NitroError):
    """The server cannot start, or cannot draw any more."""

    exit_code = 1


class Worker:
    """Draws in another process, so that neither Python's lock nor a crash of the engine stops the server.

    Processes are forked from a clean one that has imported PyTorch already, where the system can: a restart then takes
    the time to load the weights.

    Args:
        make: called in the process, returns its ``Drawer``; it must be picklable, e.g. ``functools.partial``.
        timeout: seconds for one batch, after which the process is killed.

    Attributes:
        info: of the model; None before ``start``.
        restarts: how many times a dead process was replaced.
    """

    def __init__(self, make: Callable[[], Drawer], timeout: float = DRAW_TIMEOUT):
        self._make, self._timeout = make, timeout
        self._context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            self._context.set_forkserver_preload(["nitrofusion.serve.drawing"])
        self._process, self._pipe = None, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")  # waits, so that the event loop need not
        self._stopping = False
        self.info: Info | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.alive else None

    @property
    def alive(self) -> bool:
        process = self._process
        try:
            return process is not None and process.is_alive()
        except ValueError:  # the worker's thread has put it away in between
            return False

    async def start(self) -> Info:
        """Waits until the model is loaded.

        Raises:
            NitroError: it cannot be, in one line, with the exit code that the failure has elsewhere.
        """
        return await self._call(self._start)

    async def draw(self, orders: list[Order]) -> list[Result]:
        """One result for each order. A worker that dies of them fails them; the next call finds it alive again."""
        return await self._call(self._draw, orders)

    async def revive(self) -> bool:
        """Starts a dead worker again; returns whether it had died."""
        if self.alive or self._stopping:
            return False
        self.restarts += 1
        for attempt in range(STARTS):
            try:
                await self.start()
                return True
            except NitroError:
                if attempt == STARTS - 1 or self._stopping:
                    raise
                await asyncio.sleep(min(0.1 * 2**attempt, 5.0))
        return True

    async def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._stopping:
            return
        self._stopping = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ValueError):  # the worker's thread has put it away in between
                process.kill()  # a start that waits for it then ends too
        await self._call(self._kill)
        self._thread.shutdown(wait=False)

    async def _call(self, function: Callable, *args):
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _start(self) -> Info:
        self._kill()
        self._launch()
        try:
            if not self._pipe.poll(LOAD_TIMEOUT):
                self._kill()
                raise ServeError(f"serve: the model must load in {LOAD_TIMEOUT:.0f} s, got no answer")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ServeError(f"serve: the model must load, got {self._death()}") from error
        if isinstance(answer, NitroError):
            raise answer
        self.info = answer
        return answer

    def _launch(self) -> None:
        if self._stopping:
            raise ServeError("serve: the worker must not be stopped while it starts")
        try:
            ours, theirs = self._context.Pipe()
            with contextlib.ExitStack() as undo:
                undo.callback(ours.close)
                with theirs:
                    process = self._context.Process(
                        target=_run, args=(self._make, theirs, os.getpid()), name="nitrofusion-worker", daemon=True
                    )
                    process.start()
                undo.pop_all()
        except (EOFError, OSError) as error:  # no more processes, or files, or the clean one is gone
            raise ServeError(f"serve: the worker must start, got {type(error).__name__}: {error}") from error
        self._process, self._pipe = process, ours
        if self._stopping:  # and ``stop`` may have looked before there was a process
            self._kill()
            raise ServeError("serve: the worker must not be stopped while it starts")

    def _draw(self, orders: list[Order]) -> list[Result]:
        try:
            self._pipe.send(orders)
            if not self._pipe.poll(self._timeout):
                self._kill()
                return [Failed(f"drawing must take at most {self._timeout:g} s")] * len(orders)
            return self._pipe.recv()
        except (EOFError, OSError):
            return [Failed(f"{self._death()} while it drew")] * len(orders)

    def _death(self) -> str:
        """How the process ended, in words."""
        self._process.join(1.0)
        code = self._process.exitcode
        if code is None:
            self._kill()
            return "a worker that hung up"
        if code >= 0:
            return f"a worker that ended with code {code}"
        hint = " (is there enough free memory?)" if -code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT) else ""
        return f"a worker that died of {_name(-code)}{hint}"

    def _kill(self) -> None:
        if self._process is None:
            return
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None  # first: nothing may be asked of a process that is closed
        process.close()
        pipe.close()


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python names the first and the last real-time signal only
        return f"signal {number}"


def _run(make: Callable[[], Drawer], pipe: Connection, server: int) -> None:
    """The process: loads, then answers until the server hangs up. Ctrl-C is the server's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        drawer = make()
    except NitroError as error:
        pipe.send(error)
        return
    except Exception as error:  # whatever a library raises, the user gets one line
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        must = "there must be enough free memory" if out_of_memory(error) else "the model must load"
        pipe.send(ServeError(f"serve: {must}, got {text}"))
        return
    pipe.send(drawer.info)
    while True:
        try:
            orders = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(drawer.draw(orders))
