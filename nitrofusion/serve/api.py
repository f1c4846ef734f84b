"""The HTTP service: OpenAI's images API, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from .orders import PNG, Failed, Order, Refused
from .scheduler import Busy, Closed
from .security import error_body
from .service import Service

MAX_PROMPT = 5000  # characters, the engine's own bound
MAX_PICTURES = 8  # of one request
WAIT = 120.0  # seconds a request may take, waiting included


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    error: ErrorDetail


class ImageRequest(BaseModel):
    """OpenAI's parameters and, beside them, ``seed``, ``num_inference_steps`` and ``negative_prompt``.

    ``quality``, ``style``, ``moderation``, ``safety_identifier`` and ``user`` are taken and change nothing but the
    queue: requests of one ``user`` share its turns. What would change the answer (``stream``, ``partial_images``, a
    transparent ``background``, other formats and compressions) is taken as its default only.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[StrictStr, Field(min_length=1, max_length=MAX_PROMPT)]
    model: Annotated[StrictStr | None, Field(max_length=500)] = None
    n: Annotated[StrictInt | None, Field(ge=1, le=MAX_PICTURES)] = 1
    size: Annotated[StrictStr | None, Field(pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")] = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    seed: Annotated[StrictInt | None, Field(ge=0, le=2**63 - 1 - MAX_PICTURES)] = None
    num_inference_steps: Annotated[StrictInt | None, Field(ge=1, le=1000)] = None
    negative_prompt: Annotated[StrictStr | None, Field(max_length=MAX_PROMPT)] = None
    user: Annotated[StrictStr | None, Field(max_length=500)] = None
    quality: Annotated[StrictStr | None, Field(max_length=50)] = None
    style: Annotated[StrictStr | None, Field(max_length=50)] = None
    moderation: Annotated[StrictStr | None, Field(max_length=50)] = None
    safety_identifier: Annotated[StrictStr | None, Field(max_length=500)] = None
    background: Literal["auto", "opaque"] | None = None
    output_compression: Literal[100] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None


class Image(BaseModel):
    """A PNG that carries its settings; ``url`` is a data: URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageResponse(BaseModel):
    created: int
    data: list[Image]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "restarting", "failed"]
    model: str | None
    queue: int
    drawing: int
    sessions: int
    worker_restarts: int
    started: float  # seconds since 1970


REFUSALS = {
    400: "Host is none of the server's, or the request is wrong",
    401: "the token is missing",
    403: "the request comes from another site",
    408: "the body came too slowly",
    413: "the body is too large",
    414: "the path is too long",
    431: "the headers are too large",
}
ERRORS = {status: {"model": Error, "description": text} for status, text in REFUSALS.items()}
DRAWING = ERRORS | {
    404: {"model": Error, "description": "another model than the one served"},
    429: {
        "model": Error,
        "description": "the queue is full",
        "headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}},
    },
    500: {"model": Error, "description": "the picture could not be drawn"},
    503: {"model": Error, "description": "the server is stopping, or took too long"},
}


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post("/v1/images/generations", response_model_exclude_none=True, responses=DRAWING)
    async def generate(request: Request, body: ImageRequest) -> ImageResponse:
        """Draws ``n`` pictures; picture i has seed + i. Without a seed one is drawn by lot, and returned."""
        info = service.info
        if body.model is not None and body.model != info.model:
            return problem(404, f"generate: model must be {info.model}, got {body.model}", "model_not_found", "model")
        orders = _orders(body)
        client = f"{request.client.host if request.client else ''} {body.user or ''}"
        try:
            async with asyncio.timeout(WAIT):
                drawn = await _unless_gone(request, service.scheduler.submit(client, orders))
        except Refused as error:
            return problem(400, str(error), "invalid_value")
        except Busy as error:
            return problem(429, str(error), "queue_full", headers={"retry-after": str(error.retry_after)})
        except (Closed, TimeoutError) as error:
            text = str(error) or f"a picture must be drawn within {WAIT:.0f} s"
            return problem(503, text, "unavailable", headers={"retry-after": "5"})
        except Failed as error:
            return problem(500, str(error), "not_drawn")
        if drawn is None:
            return problem(503, "the client went away", "gone")
        seed = orders[0].seed
        texts = [base64.b64encode(one.data).decode() for one in drawn]
        key, prefix = ("url", "data:image/png;base64,") if body.response_format == "url" else ("b64_json", "")
        data = [Image(seed=seed + i, **{key: prefix + text}) for i, text in enumerate(texts)]
        return ImageResponse(created=int(time.time()), data=data)

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[_model(service)])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=ERRORS | {503: {"model": Health, "description": "the worker cannot draw"}})
    async def health() -> Health:
        """Whether pictures can be drawn, and what waits. Never waits itself."""
        state = service.health()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics() -> PlainTextResponse:
        """Prometheus' text format."""
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")

    return router


def problem(
    status: int, text: str, code: str | None = None, param: str | None = None, headers: dict | None = None
) -> JSONResponse:
    """An error as OpenAI's API writes them."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(text, "rate_limit_error" if status == 429 else kind, code, param), status, headers)


def _orders(body: ImageRequest) -> list[Order]:
    seed = random.getrandbits(32) if body.seed is None else body.seed
    width, height = (None, None) if body.size in (None, "auto") else map(int, body.size.split("x"))
    negative = body.negative_prompt or None
    return [
        Order(body.prompt, negative, body.num_inference_steps, seed + i, height, width, format=PNG)
        for i in range(body.n or 1)
    ]


def _model(service: Service) -> Model:
    return Model(id=service.info.model, created=int(service.began), owned_by="nitrofusion")


async def _unless_gone(request: Request, drawing):
    """What ``drawing`` returns, or None once the client has hung up; what still waits is then not drawn."""
    job = asyncio.ensure_future(drawing)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        for task in (job, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Busy, Closed, Refused, Failed):
            await job


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
