"""The same service on Ray Serve: a replica for each GPU, backpressure in front (extra ``[ray]``).

    serve run nitrofusion.serve.ray_app:app                         # the world, from Ray's command line
    >>> ray.serve.run(build("nitrosd-vibrant", replicas=8, num_gpus=1))

Each replica is the whole application, page and API, with an engine in a process of its own; the page's WebSocket stays
with one replica. Ray's proxy listens on 127.0.0.1:8000 unless Ray is told otherwise; names other than that are refused
here as everywhere, see ``allowed_hosts``.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from ..errors import InputError
from .security import LOOPBACK

ARGUMENTS = {
    "model": str, "replicas": int, "num_cpus": float, "num_gpus": float, "max_queue": int, "port": int, "token": str,
}  # fmt: skip


def build(
    model: str | Path = "world",
    *,
    replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_queue: int = 16,
    port: int = 8000,
    allowed_hosts: tuple[str, ...] = (),
    token: str | None = None,
    make=None,
    **how,
):
    """A Ray Serve application, for ``ray.serve.run``.

    Args:
        model, how, allowed_hosts, make: as for ``create_app``.
        replicas: engines; each has ``num_cpus`` and ``num_gpus`` of the cluster to itself.
        max_queue: pictures that wait in one replica, before it says 429. As many requests again may wait at Ray's
            proxy, which then says 503.
        port: of Ray's proxy.
        token: of the page; one for all replicas, so that any of them may answer.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise InputError("serve: ray must be installed (pip install 'nitrofusion[serve,ray]'), got no ray") from error
    token = token or secrets.token_urlsafe(24)
    options = {
        "port": port,
        "allowed_hosts": tuple(allowed_hosts),
        "token": token,
        "max_queue": max_queue,
        "make": make,
    }

    def application():
        from .app import create_app

        return create_app(model, host=LOOPBACK[0], **options, **how)

    # What a replica works on at once: requests that wait in its own queue, live sessions, and some that only look.
    limits = {"max_ongoing_requests": 2 * max_queue + 64, "max_queued_requests": max_queue}
    resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    @serve.deployment(name="nitrofusion", num_replicas=replicas, ray_actor_options=resources, **limits)
    @serve.ingress(application)
    class NitroFusion:
        """A replica."""

    return NitroFusion.bind()


def app(args: dict):
    """What ``serve run nitrofusion.serve.ray_app:app model=world replicas=2`` builds.

    Raises:
        InputError: an argument has another name or is no number; Ray is not installed.
    """
    options = {}
    for name, value in args.items():
        kind = ARGUMENTS.get(name)
        if kind is None:
            raise InputError(f"serve: arguments must be among {', '.join(ARGUMENTS)}, got {name}")
        try:
            options[name] = kind(str(value))  # as text: int(2.5) would be 2
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"serve: {name} must be {what}, got {value}") from error
    return build(**options)
