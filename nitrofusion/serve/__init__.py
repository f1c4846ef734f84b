"""The real-time app and the HTTP service.

>>> nitrofusion.serve.serve("world", open_page=True)      # http://127.0.0.1:7860 until Ctrl-C
>>> app = nitrofusion.serve.create_app("world")           # for an ASGI server of your own
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

__all__ = ["create_app", "serve"]


def create_app(model: str | Path = "world", **options):
    """The ASGI application; ``nitrofusion.serve.app.create_app`` describes its options.

    Raises:
        InputError: the extra is not installed.
    """
    check_extra()
    from .app import create_app

    return create_app(model, **options)


def serve(
    model: str | Path = "world",
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    open_page: bool = False,
    token: str | None = None,
    allowed_hosts: tuple[str, ...] = (),
    max_queue: int = 16,
    **options,
) -> None:
    """Serves the page and the API until SIGINT or SIGTERM, then finishes what waits and returns.

    The engine is started in another process, so a script calls this under ``if __name__ == "__main__":``.

    Args:
        model: as for ``nitrofusion.load``, as are further ``options``.
        host: address to listen on; any but a loopback address needs a ``token``.
        port: 0 takes a free one.
        open_page: opens the page in the browser once it can be used.
        token: what every client has to send; on a loopback address only the page has one, new for each start.
        allowed_hosts, max_queue: as for ``create_app``.

    Raises:
        InputError: the extra is missing, an argument is wrong, the port is taken, there is no such model.
        ServeError: the model does not load, for want of memory for instance.
    """
    check_extra()
    from .run import run

    run(model, host, port, open_page, token, allowed_hosts, max_queue=max_queue, **options)


def check_extra() -> None:
    """Raises InputError unless the packages of the extra are here."""
    for name in ("fastapi", "uvicorn", "websockets"):
        try:
            __import__(name)
        except ImportError as error:
            raise InputError(
                f"serve: the extra must be installed (pip install 'nitrofusion[serve]'), got no {name}"
            ) from error
