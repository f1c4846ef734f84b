"""A drawer without a model, whose pictures take as long as a test wants; and a server around it."""

import asyncio
import contextlib
import functools
import io
import os
import signal
import threading
import time
from dataclasses import dataclass, field

from PIL import Image

from nitrofusion.errors import InputError
from nitrofusion.serve.orders import Drawn, Failed, Info, Order, Refused

INFO = Info("fake", "fake: licence none", "cpu", "0", (1, 2, 3, 4), 1, 32, 32, 8, 4, ("an example",))


@dataclass
class FakeDrawer:
    """Draws one colour, a function of seed and steps; its prompts can be orders to fail.

    Attributes:
        seconds: of a batch.
        info: what it says of itself.
    """

    seconds: float = 0.0
    info: Info = INFO
    _seen: list = field(default_factory=list)

    def draw(self, orders):
        time.sleep(self.seconds)
        for order in orders:
            if order.prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if order.prompt.startswith("sleep "):
                time.sleep(float(order.prompt.split()[1]))
        return [self._one(order, len(orders)) for order in orders]

    def _one(self, order, batch):
        if order.prompt == "refuse":
            return Refused("generate: prompt must be another, got 'refuse'")
        if order.prompt == "fail":
            return Failed("RuntimeError: it did not work")
        steps = order.num_inference_steps or 1
        return Drawn(png(order, batch), "image/png", 32, 32, steps, self.seconds)


def png(order: Order, batch: int = 1) -> bytes:
    file = io.BytesIO()
    color = (order.seed % 256, 60 * (order.num_inference_steps or 1), batch)
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def color(data: bytes) -> tuple[int, int, int]:
    """(seed mod 256, 60 x steps, size of the batch) of a fake picture."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").getpixel((5, 5))


def no_model():
    raise InputError("model: nowhere must be a preset or a folder, got neither")


def no_memory():
    return bytearray(1 << 60)  # MemoryError, whatever the machine


def dies_while_loading():
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def running(seconds: float = 0.0, info: Info = INFO, host: str = "127.0.0.1", port: int = 0, make=None, **options):
    """A server in a thread of this process, its worker in another; yields its ``Running``."""
    from nitrofusion.serve.app import create_app
    from nitrofusion.serve.run import bind, server

    sock = bind(host, port)
    make = make or functools.partial(FakeDrawer, seconds, info)
    app = create_app(make=make, host=host, port=sock.getsockname()[1], **options)
    one = server(app)
    thread = threading.Thread(target=asyncio.run, args=(one.serve(sockets=[sock]),), daemon=True)
    thread.start()
    try:
        assert wait(lambda: one.started or not thread.is_alive(), 60) and one.started
        yield Running(sock.getsockname()[1], app, one)
    finally:
        one.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


@dataclass
class Running:
    port: int
    app: object
    server: object

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def service(self):
        return self.app.state.service

    @property
    def token(self) -> str:
        return self.app.state.token

    def drawn(self) -> int:
        return int(self.service.metrics.value("pictures", result="drawn"))

    def live(self, **options):
        """A WebSocket client, greeted."""
        import json

        from websockets.sync.client import connect

        socket = connect(f"ws://127.0.0.1:{self.port}/live", max_size=2**24, **options).__enter__()
        assert json.loads(socket.recv(timeout=10))["type"] == "hello"
        return socket


def wait(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
