"""The application: service, guard and endpoints put together."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from . import api, live, page
from .orders import Drawer
from .security import LOOPBACK, Guard, host_names, is_loopback
from .service import Service

log = logging.getLogger(__name__)


def engine(model: str | Path = "world", **how) -> Drawer:
    """Loads the model; runs in the worker's process, the only one that imports PyTorch."""
    from .drawing import EngineDrawer

    return EngineDrawer(model, **how)


def create_app(
    model: str | Path = "world",
    *,
    host: str = LOOPBACK[0],
    port: int = 7860,
    allowed_hosts: tuple[str, ...] = (),
    token: str | None = None,
    max_queue: int = 16,
    max_batch: int | None = None,
    make: Callable[[], Drawer] | None = None,
    **how,
) -> FastAPI:
    """The ASGI application, which loads the model in a process of its own when it starts.

    Args:
        model, how: as for ``nitrofusion.load``.
        host, port: where it is served, which decides what Host may say. On an address other than loopback every
            request but those for the page's files needs the token.
        allowed_hosts: further names it is reached by, ``name`` or ``name:port``.
        token: None makes one up.
        max_queue: pictures of HTTP requests that may wait; the next request gets 429.
        max_batch: pictures drawn at once; None is what suits the device.
        make: returns another ``Drawer`` than the engine's, in the worker's process; must be picklable.

    Returns:
        The application; ``app.state.service`` is its ``Service``, ``app.state.token`` the token.
    """
    service = Service(make or functools.partial(engine, model, **how), max_queue, max_batch)
    token = token or secrets.token_urlsafe(24)
    strict = not is_loopback(host)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="NitroFusion", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.service, app.state.token = service, token
    app.include_router(api.routes(service))
    app.include_router(live.routes(service))
    app.include_router(page.routes("" if strict else token))

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        return api.problem(400, f"generate: {live.first_fault(error.errors())}", "invalid_value")

    @app.exception_handler(HTTPException)
    async def other(_, error: HTTPException):
        return api.problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_, error: Exception):
        return api.problem(500, "an error of the server, which its log describes")

    app.add_middleware(
        Guard, hosts=host_names(host, port, allowed_hosts), token=token, strict=strict, metrics=service.metrics,
        any_address=host in ("0.0.0.0", "::"),
    )  # fmt: skip
    app.openapi = functools.partial(_openapi, app.openapi)
    return app


def _openapi(make: Callable[[], dict]) -> dict:
    """The schema as FastAPI writes it, but for 422: what is wrong with a request is a 400 here."""
    schema = make()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return schema
