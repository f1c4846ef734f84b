"""The live WebSocket: settings in, pictures out, the newest input wins.

A client sends JSON as text, or a binary message: 4 bytes (big-endian) with the length of the JSON, the JSON, and the
bytes of an image, which stays the session's until the next one. ``{"type": "draw", "seq": 7, "prompt": ...}`` asks for
a picture; `DrawMessage` has the fields. The server greets with what it draws with, ``{"type": "hello", ...}``, and
answers in binary messages of the same form: ``seq`` says to which input a picture belongs, ``steps`` how far it is
refined. Errors are text: ``{"type": "error", "seq": ..., "message": ...}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import struct
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from .api import MAX_PROMPT
from .orders import PNG, Drawn, Failed, Order, Refused, Result
from .scheduler import Busy, Closed
from .security import PROTOCOL
from .service import Service

MAX_TEXT = 64 * 1024  # bytes of a message's JSON
MAX_IMAGE = 4 * 1024 * 1024  # bytes
MAX_SESSIONS = 64
MAX_NAME = 100  # characters of a field's name in an error
TOO_LARGE, TRY_LATER = 1009, 1013  # RFC 6455's close codes
_STREAMS = itertools.count()


class DrawMessage(BaseModel):
    """An input.

    Attributes:
        seq: counts the client's inputs; pictures carry it back.
        refine: draw more steps, up to so many, once no further input comes; 0 is off.
        image: whether to start from the session's image.
        save: answer with a PNG that carries its settings; unlike other inputs it waits its turn, and is not replaced.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["draw"]
    seq: Annotated[StrictInt, Field(ge=0, le=2**53)]
    prompt: Annotated[StrictStr, Field(min_length=1, max_length=MAX_PROMPT)]
    negative_prompt: Annotated[StrictStr | None, Field(max_length=MAX_PROMPT)] = None
    num_inference_steps: Annotated[StrictInt | None, Field(ge=1, le=1000)] = None
    refine: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    seed: Annotated[StrictInt, Field(ge=0, le=2**53)] = 0
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    image: StrictBool = False
    save: StrictBool = False


class Malformed(ValueError):
    """A message that cannot be understood; the text says why."""


def pack(header: dict, payload: bytes = b"") -> bytes:
    """A binary message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack(">I", len(text)) + text + payload


def unpack(message: bytes) -> tuple[dict, bytes]:
    """(header, payload) of a binary message, or Malformed."""
    if len(message) < 4:
        raise Malformed("a binary message must begin with the length of its JSON")
    (size,) = struct.unpack(">I", message[:4])
    if size > min(MAX_TEXT, len(message) - 4):
        raise Malformed(f"the JSON of a binary message must be at most {MAX_TEXT} bytes and all there, got {size}")
    return parse(message[4 : 4 + size]), message[4 + size :]


def parse(text: str | bytes) -> dict:
    """The JSON object of a message, or Malformed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a message must be JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise Malformed(f"a message must be a JSON object, got {type(value).__name__}")
    return value


class Session:
    """One connection."""

    def __init__(self, socket: WebSocket, service: Service):
        self._socket, self._service = socket, service
        self._share = service.scheduler.join(self._deliver)
        self._image: bytes | None = None
        self._saving: asyncio.Task | None = None
        self._outbox: asyncio.Queue[tuple[int, Result]] = asyncio.Queue()  # the scheduler waits for `sent`: holds one

    async def run(self) -> None:
        try:
            await self._socket.send_text(json.dumps({"type": "hello", **asdict(self._service.info)}))
        except BaseException as error:
            self._share.close()
            if isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
                return  # gone before it was greeted
            raise
        sender = asyncio.get_running_loop().create_task(self._send())
        receiver = asyncio.get_running_loop().create_task(self._receive())
        try:
            await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._share.close()
            tasks = [task for task in (sender, receiver, self._saving) if task is not None]
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError, OSError):
                    await task  # Starlette raises RuntimeError for a connection that closed in between

    def _deliver(self, tag: int, result: Result) -> None:
        self._outbox.put_nowait((tag, result))

    async def _send(self) -> None:
        while True:
            seq, result = await self._outbox.get()
            if isinstance(result, Drawn):
                await self._picture("picture", seq, result)
            else:
                await self._error(str(result), seq)
            self._share.sent()

    async def _picture(self, kind: str, seq: int, drawn: Drawn) -> None:
        header = {
            "type": kind, "seq": seq, "steps": drawn.num_inference_steps, "media_type": drawn.media_type,
            "width": drawn.width, "height": drawn.height, "seconds": round(drawn.seconds, 6),
            "queue": self._service.scheduler.waiting, "dropped": self._share.dropped,
        }  # fmt: skip
        await self._socket.send_bytes(pack(header, drawn.data))

    async def _save(self, seq: int, order: Order) -> None:
        try:
            (drawn,) = await self._service.scheduler.submit(f"live {id(self)}", [order])
            await self._picture("saved", seq, drawn)
        except (Busy, Closed, Refused, Failed) as error:
            await self._error(str(error), seq)

    async def _receive(self) -> None:
        while True:
            await asyncio.sleep(0)  # messages that came together would leave nobody else a turn
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text, data = message.get("text"), message.get("bytes")
            if text is not None and len(text) > MAX_TEXT or data is not None and len(data) > MAX_TEXT + MAX_IMAGE:
                await self._socket.close(TOO_LARGE, f"a message's JSON must be at most {MAX_TEXT} bytes")
                return
            try:
                self._take(text, data)
            except Malformed as error:
                await self._error(str(error))

    def _take(self, text: str | None, data: bytes | None) -> None:
        if data is None:
            header = parse(text)
        else:
            header, payload = unpack(data)
            if len(payload) > MAX_IMAGE:
                raise Malformed(f"image must be at most {MAX_IMAGE} bytes, got {len(payload)}")
            self._image = payload or None
        if header == {"type": "image"}:
            return
        try:
            message = DrawMessage.model_validate(header)
        except ValidationError as error:
            raise Malformed(first_fault(error.errors(include_url=False, include_context=False))) from error
        if message.image and self._image is None:
            raise Malformed("image must be sent before it is used, got none")
        if not message.save:
            self._share.put(message.seq, self._orders(message))
        elif self._saving is None or self._saving.done():
            (order,) = self._orders(message)
            self._saving = asyncio.get_running_loop().create_task(self._save(message.seq, order))
        else:
            raise Malformed("save must wait for the one before it")

    def _orders(self, message: DrawMessage) -> list[Order]:
        """The first picture, and one for each number of steps it is refined to."""
        info = self._service.info
        steps = message.num_inference_steps or info.default_steps
        options = {"image": self._image, "strength": message.strength} if message.image else {}
        common = {"negative_prompt": message.negative_prompt or None, "seed": message.seed, **options}
        if message.save:
            return [Order(message.prompt, num_inference_steps=steps, format=PNG, **common)]
        later = [s for s in info.steps if steps < s <= message.refine]
        first = Order(message.prompt, num_inference_steps=steps, **common)
        stream = str(next(_STREAMS))
        return [first, *(Order(message.prompt, num_inference_steps=s, stream=stream, **common) for s in later)]

    async def _error(self, text: str, seq: int | None = None) -> None:
        await self._socket.send_text(json.dumps({"type": "error", "seq": seq, "message": text}))


def first_fault(errors: list[dict]) -> str:
    """One of pydantic's errors as a line: which field, and what it must be."""
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "the request"
    where = where if len(where) <= MAX_NAME else where[:MAX_NAME] + "..."  # a client's own name for a field
    return f"{where}: {error['msg']}"


def routes(service: Service) -> APIRouter:
    """The WebSocket's endpoint."""
    router = APIRouter()

    @router.websocket("/live")
    async def live(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        if service.scheduler.sessions >= MAX_SESSIONS:
            await socket.close(TRY_LATER, f"at most {MAX_SESSIONS} live sessions")
            return
        await Session(socket, service).run()

    return router
