"""Who may ask what: hosts, origins, tokens, sizes and times, checked before any endpoint runs.

A web page that a user happens to visit can reach a server on that user's machine. So only known names are served (a
name that an attacker points at 127.0.0.1 is not one), requests that a browser sends for another site are refused, and
the page proves that it is ours with a token that no other page can read.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json

from .metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_HEADERS = 16 * 1024  # bytes, and a hundred of them
MAX_TARGET = 2048  # characters of path and query
MAX_BODY = 128 * 1024  # bytes; two prompts of 5,000 characters, however they are escaped
BODY_TIMEOUT = 10.0  # seconds
PROTOCOL = "nitrofusion.v1"  # of the WebSocket; the token travels as a second one, "token.<token>"
PUBLIC = ("/", "/health")  # beside /static/: what anyone may get who reaches the server at all
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_names(host: str, port: int, more: tuple[str, ...] = ()) -> frozenset[str]:
    """The values of Host that are served.

    Args:
        host: address the server is bound to. A loopback address brings its other names along; one that stands for all
            addresses (0.0.0.0, ::) brings none, and the address a connection came in on is then served too.
        more: further names, with their port where it differs from ``port``.
    """
    names = {host, *(LOOPBACK if is_loopback(host) else ())} - {"0.0.0.0", "::"}
    found = set()
    for name in names:
        bare = f"[{name}]" if ":" in name else name
        found |= {f"{bare}:{port}"} | ({bare} if port == 80 else set())
    for name in more:
        found.add(name if ":" in name else f"{name}:{port}")
        if ":" not in name and port in (80, 443):
            found.add(name)
    return frozenset(name.lower() for name in found)


class Guard:
    """ASGI middleware: refuses what must not come in, and puts the security headers on all that goes out.

    Args:
        hosts: allowed values of Host, as ``host_names`` gives them.
        token: what the page shows, or every client where ``strict``.
        strict: everything but the page's own files and /health asks for the token; otherwise a client without an
            Origin (curl, the OpenAI client) needs none.
        any_address: serve the address a connection came in on, for servers bound to all of them.
    """

    def __init__(
        self, app, hosts: frozenset[str], token: str, strict: bool, metrics: Metrics, any_address: bool = False
    ):
        self.app, self.hosts, self.token, self.strict = app, hosts, token, strict
        self.metrics, self.any_address = metrics, any_address

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            fault = self._fault(scope)
            if fault is None:
                await self.app(scope, receive, send)
            else:
                self.metrics.count("refused", reason=fault[1])
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": fault[2]})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def safe_send(message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", ())}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
                self.metrics.count("requests", status=str(message["status"]))
            await send(message)

        fault = self._fault(scope)
        if fault is None:
            body = await _read(scope, receive)
            if isinstance(body, bytes):
                await self.app(scope, _replay(body, receive), safe_send)
                return
            if body is None:  # the client is gone
                return
            fault = body
        self.metrics.count("refused", reason=fault[1])
        await _refuse(safe_send, *fault)

    def _fault(self, scope) -> tuple[int, str, str] | None:
        """Status, reason and message of a refusal."""
        if len(scope["headers"]) > 100 or sum(len(n) + len(v) for n, v in scope["headers"]) > MAX_HEADERS:
            return 431, "size", f"headers must be at most {MAX_HEADERS} bytes and 100, got more"
        if len(scope["path"]) + len(scope["query_string"]) > MAX_TARGET:
            return 414, "size", f"the path must be at most {MAX_TARGET} characters, got more"
        if not scope["path"].isprintable():
            return 400, "path", "the path must be printable, got control characters"
        values: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name, []).append(value.decode("latin-1"))
        hosts, origins = values.get(b"host", []), values.get(b"origin", [])
        if len(hosts) != 1 or not self._serves(hosts[0].lower(), scope):
            return 400, "host", "Host must be a name this server has, got another (see --allowed_hosts)"
        same = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
        if origins and (len(origins) > 1 or origins[0].lower() not in same):
            return 403, "origin", "Origin must be this server's own, got another"
        site = values.get(b"sec-fetch-site", ["none"])[0]
        opens_page = scope["path"] == "/" and values.get(b"sec-fetch-mode") == ["navigate"]
        if site not in ("none", "same-origin") and not (opens_page and scope.get("method") == "GET"):
            return 403, "origin", "a request must come from this server's own page, got one from another site"
        harmless = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        public = harmless and (scope["path"] in PUBLIC or scope["path"].startswith("/static/"))
        wanted = not public if self.strict else bool(origins) and not harmless
        if wanted and not self._has_token(values):
            return 401, "token", "the token must be sent as `Authorization: Bearer TOKEN`, got none or another"
        return None

    def _serves(self, host: str, scope) -> bool:
        if host in self.hosts:
            return True
        if not self.any_address or not scope.get("server"):
            return False
        address, port = scope["server"][:2]
        return host == (f"[{address}]:{port}" if ":" in address else f"{address}:{port}")

    def _has_token(self, values: dict[bytes, list[str]]) -> bool:
        sent = [value.partition(" ") for value in values.get(b"authorization", [])]
        given = [value.strip() for scheme, _, value in sent if scheme.lower() == "bearer"]  # RFC 9110: in any case
        for value in values.get(b"sec-websocket-protocol", []):
            given += [p.strip().removeprefix("token.") for p in value.split(",") if p.strip().startswith("token.")]
        return any(hmac.compare_digest(one.encode(), self.token.encode()) for one in given)


async def _read(scope, receive) -> bytes | tuple[int, str, str] | None:
    """The whole body, a fault, or None for a client that left."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    too_large = 413, "size", f"the body must be at most {MAX_BODY} bytes, got more"
    if lengths and (not lengths[0].isdigit() or int(lengths[0]) > MAX_BODY):
        return too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    return too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        return 408, "time", f"the body must arrive within {BODY_TIMEOUT:.0f} s, got a part of it"


def _replay(body: bytes, receive):
    given = False

    async def replayed():
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def _refuse(send, status: int, reason: str, text: str) -> None:
    body = json.dumps(error_body(text, "invalid_request_error", reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(text: str, kind: str, code: str | None = None, param: str | None = None) -> dict:
    """An error as OpenAI's API writes them."""
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}
