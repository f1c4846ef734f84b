"""Running the application under uvicorn: the socket first, then the model, then requests, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import webbrowser
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..errors import InputError
from .app import create_app
from .live import MAX_IMAGE, MAX_TEXT
from .security import MAX_HEADERS, is_loopback

HEADER_TIMEOUT = 10.0  # seconds
MAX_CONNECTIONS = 512
GRACE = 10  # seconds for what is in flight when the server stops
MIN_TOKEN = 16  # characters
UNSENT = 64 * 1024  # bytes the system takes of a WebSocket beyond what is under way


class Protocol(H11Protocol):
    """uvicorn's, and a client whose headers do not come in time is hung up on."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._arm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._disarm()  # from here on the keep-alive timeout counts

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.get_protocol() is self:  # not a WebSocket by now
            self.transport.close()


class LiveProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, but what a client does not read piles up neither in the system's buffers nor, for pings, in ours."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):  # else 4 MB of old pictures go before a new one
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    def handle_ping(self) -> None:
        output = self.conn.data_to_send()
        if self.writable.is_set():
            self.transport.write(b"".join(output))


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not what a client did wrong and was told: uvicorn logs texts that are no UTF-8 with a traceback."""
    return "Invalid UTF-8" not in record.getMessage()


class Server(uvicorn.Server):
    """uvicorn's, for which SIGTERM is an order to stop that was carried out, not a way to die."""

    @contextlib.contextmanager
    def capture_signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame) -> None:
        self.config.app.state.service.scheduler.refuse()
        super().handle_exit(sig, frame)


def run(
    model: str | Path,
    host: str,
    port: int,
    open_page: bool = False,
    token: str | None = None,
    allowed_hosts: tuple[str, ...] = (),
    **options,
) -> None:
    """``nitrofusion.serve.serve``, which describes the arguments."""
    if not is_loopback(host) and not token:
        raise InputError(f"serve: a token must be given for a host other than loopback (--token), got none for {host}")
    # It travels as a WebSocket protocol, which has no other letters.
    if token is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{{MIN_TOKEN},}}", token):
        got = f"{len(token)} characters"
        raise InputError(f"serve: token must be at least {MIN_TOKEN} ASCII letters, digits, - or _, got {got}")
    sock = bind(host, port)
    port = sock.getsockname()[1]
    app = create_app(model, host=host, port=port, allowed_hosts=tuple(allowed_hosts), token=token, **options)
    with contextlib.closing(sock):
        asyncio.run(_serve(app, sock, host, port, open_page, model))


async def _serve(app, sock: socket.socket, host: str, port: int, open_page: bool, model) -> None:
    service = app.state.service
    loop = asyncio.get_running_loop()
    print(f"nitrofusion: loading {model}", file=sys.stderr, flush=True)
    try:
        with _cancelled_by_signals(loop):
            info = await service.start()
    except asyncio.CancelledError:
        return
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/"
    if not is_loopback(host):
        address += f"#token={app.state.token}"
    print(f"nitrofusion: {info.notice}", file=sys.stderr)
    print(f"nitrofusion: {info.model} on {info.device} at {address}  (Ctrl-C stops)", flush=True)
    if open_page:
        loop.call_later(0.3, lambda: threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start())
    try:
        await server(app).serve(sockets=[sock])
    finally:
        await service.stop()


def server(app) -> Server:
    """uvicorn with our limits."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(_worth_telling)
    config = uvicorn.Config(
        app, http=Protocol, ws=LiveProtocol, ws_max_size=MAX_TEXT + MAX_IMAGE + 4, ws_max_queue=4,
        ws_per_message_deflate=False,  # pictures are compressed: 20 ms for 400 KB, and bombs, for nothing
        h11_max_incomplete_event_size=MAX_HEADERS, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=15,
        timeout_graceful_shutdown=GRACE, server_header=False, access_log=False, log_config=None, lifespan="on",
    )  # fmt: skip
    return Server(config)


@contextlib.contextmanager
def _cancelled_by_signals(loop: asyncio.AbstractEventLoop):
    """SIGINT and SIGTERM cancel the current task, until uvicorn has handlers of its own."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    task, signals = asyncio.current_task(), (signal.SIGINT, signal.SIGTERM)
    for sig in signals:
        loop.add_signal_handler(sig, task.cancel)
    try:
        yield
    finally:
        for sig in signals:
            loop.remove_signal_handler(sig)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or InputError: before minutes go into loading a model."""
    if not 0 <= port <= 65535:
        raise InputError(f"serve: port must be in 0..65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"serve: host must be an address of this machine, got {host!r}: {error.strerror}") from error
    sock = socket.socket(family, kind, protocol)  # asyncio sends small answers at once where it sees that this is TCP
    try:
        if os.name == "posix":  # a port whose last server has just stopped is free
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise InputError(f"serve: {host}:{port} must be free to listen on, got {error.strerror}") from error
    return sock
