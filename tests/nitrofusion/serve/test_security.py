"""Who is refused: hosts, origins, tokens, sizes, slow clients; in raw bytes where a library would be too polite."""

import http.client
import io
import json
import os
import socket
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from nitrofusion.serve.drawing import EngineDrawer
from nitrofusion.serve.live import MAX_IMAGE, pack, unpack
from nitrofusion.serve.orders import Order, Refused

from .fake import running

LARGE = "x" * 20


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


def raw(server, head: str, body: bytes = b"", timeout: float = 10) -> tuple[int, bytes]:
    """(status, everything) that comes back for these bytes; 0 for a connection that is hung up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as sock:
        try:
            sock.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
            answer = b""
            while block := sock.recv(65536):
                answer += block
        except ConnectionError:
            pass
    return (int(answer.split()[1]) if answer else 0), answer


def get(server, host: str | None, path: str = "/health", **headers) -> int:
    lines = "" if host is None else f"Host: {host}\n"
    lines += "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in headers.items())
    return raw(server, f"GET {path} HTTP/1.1\n{lines}Connection: close\n\n")[0]


def test_only_the_servers_own_names_are_served(server):
    port = server.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert get(server, host) == 200, host
    strangers = [
        "evil.example", "rebind.network", "127.0.0.1.evil.example", "localhost.evil.example", "evil-127.0.0.1",
        "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.1", "127.0.1", "0.0.0.0", "0", "localhost.",
        "127.0.0.1.", "[::]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "::1", "user@127.0.0.1",
        "127.0.0.1@evil.example", "127.0.0.2", "192.168.0.1", "localhost\t", "local host", "", "*", "null",
        "xn--localhost", "ℓocalhost".encode().decode("latin-1"), "127.0.0.1,evil.example", "http://127.0.0.1",
    ]  # fmt: skip
    cases = [f"{name}:{port}" for name in strangers]
    cases += [
        "127.0.0.1",
        "localhost",
        f"127.0.0.1:{port + 1}",
        "127.0.0.1:80",
        f"127.0.0.1:0{port}",
        f"127.0.0.1:{port}:1",
    ]
    cases += [f"127.0.0.1:{port}/", f"localhost:{port}#", f"localhost:{port}?"]
    assert len(cases) >= 40
    for host in cases:
        assert get(server, host) == 400, host
    assert get(server, None) == 400
    assert raw(server, f"GET /health HTTP/1.1\nHost: localhost:{port}\nHost: evil.example\n\n")[0] == 400
    assert raw(server, "GET /health HTTP/1.0\n\n")[0] == 400


ORIGINS = [
    "null", "http://evil.example", "https://evil.example", "http://127.0.0.1", "http://localhost",
    "https://127.0.0.1:1", "http://127.0.0.1:{other}", "http://localhost:{port}", "http://[::1]:{port}",
    "http://127.0.0.1:{port}.evil.example", "http://127.0.0.1.evil.example:{port}", "http://evil.example:{port}",
    "http://user@127.0.0.1:{port}", "file://", "chrome-extension://abc", "moz-extension://abc", "data:",
    "about:blank", "", "*", "http://", "127.0.0.1:{port}", "ws://127.0.0.1:{port}", "http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port} http://evil.example", "http://evil.example, http://127.0.0.1:{port}",
    "http://127.0.0.2:{port}", "http://0.0.0.0:{port}", "javascript:1", "http://2130706433:{port}", "undefined",
]  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_foreign_origins_are_refused_everywhere(server, origin):
    origin = origin.format(port=server.port, other=server.port + 1)
    host = f"127.0.0.1:{server.port}"
    drawn = server.drawn()
    with httpx.Client(headers={"origin": origin, "authorization": f"Bearer {server.token}"}) as client:
        assert client.get(f"{server.url}/health").status_code == 403
        assert client.get(f"{server.url}/").status_code == 403
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            body = json.dumps({"prompt": "a"})
            url = f"{server.url}/v1/images/generations"
            assert client.post(url, content=body, headers={"content-type": kind}).status_code == 403
        assert "access-control-allow-origin" not in client.options(f"{server.url}/health").headers
    with pytest.raises(InvalidStatus) as refused:
        connect(
            f"ws://{host}/live",
            additional_headers={"Origin": origin},
            subprotocols=["nitrofusion.v1", f"token.{server.token}"],
        )
    assert refused.value.response.status_code == 403
    assert server.drawn() == drawn


def test_our_own_page_needs_its_token_and_others_on_loopback_do_not(server):
    url, own = f"{server.url}/v1/images/generations", {"origin": server.url}
    body = {"prompt": "a"}
    assert httpx.post(url, json=body).status_code == 200
    assert httpx.post(url, json=body, headers=own).status_code == 401
    assert httpx.post(url, json=body, headers=own | {"authorization": "Bearer wrong"}).status_code == 401
    assert httpx.post(url, json=body, headers=own | {"authorization": f"Bearer {server.token}"}).status_code == 200
    assert httpx.post(url, json=body, headers=own | {"authorization": f"bearer {server.token}"}).status_code == 200
    page = httpx.get(server.url).text
    assert server.token in page
    live = f"ws://127.0.0.1:{server.port}/live"
    for offered in (["nitrofusion.v1"], ["nitrofusion.v1", "token.wrong"]):
        with pytest.raises(InvalidStatus):
            connect(live, origin=server.url, subprotocols=offered)
    with connect(live, origin=server.url, subprotocols=["nitrofusion.v1", f"token.{server.token}"]) as socket:
        assert socket.subprotocol == "nitrofusion.v1" and "hello" in socket.recv(timeout=5)


def test_what_browsers_say_of_cross_site_requests(server):
    for site in ("cross-site", "same-site"):
        headers = {"sec-fetch-site": site}
        assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 403
        assert (
            httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a"}, headers=headers).status_code == 403
        )
        assert httpx.get(server.url, headers=headers | {"sec-fetch-mode": "no-cors"}).status_code == 403
        assert httpx.get(server.url, headers=headers | {"sec-fetch-mode": "navigate"}).status_code == 200
    assert httpx.get(f"{server.url}/metrics", headers={"sec-fetch-site": "none"}).status_code == 200


def test_beyond_loopback_everything_but_the_page_asks_for_the_token():
    with running(host="0.0.0.0", token=LARGE, allowed_hosts=("studio.local",)) as server:
        strict = {"authorization": f"Bearer {LARGE}"}
        assert httpx.get(server.url).status_code == 200 and LARGE not in httpx.get(server.url).text
        assert httpx.get(f"{server.url}/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
            assert httpx.get(f"{server.url}{path}", headers=strict).status_code == 200
        assert httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a"}).status_code == 401
        assert get(server, f"studio.local:{server.port}") == 200
        assert get(server, f"evil.example:{server.port}") == 400
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{server.port}/live")


def test_traversal_finds_nothing(server):
    names = [
        "..", "../", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
        "..%252f..%252fetc%252fpasswd", "....//....//etc/passwd", "..\\..\\windows\\win.ini", "..%5c..%5cwin.ini",
        "%2e%2e%5c", "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "C:\\windows\\win.ini", "C%3A%5Cwindows",
        "\\\\server\\share", "%5c%5cserver%5cshare", "CON", "NUL", "COM1", "app.js%00.png", "%00", "app.js/",
        "app.js/..", "./app.js", "app.js%20", "app.js.", "APP.JS", "app.js::$DATA", "__init__.py", "../app.py",
        "..%2fapp.py", "%c0%ae%c0%ae/", "%uff0e%uff0e/", "..;/", "..;/..;/etc/passwd", "~", "~root",
        "file:///etc/passwd", "http://evil.example/", "index.html", ".", "%2e", "%252e%252e%252f", "..%c0%af",
        "..%ef%bc%8f", "static", "static/app.js", "*", "?", "app.js%0d%0aX: y", "%0a", "a" * 3000, ".git/config",
        "..%00/", "%ff%fe", "{name}", "proc/self/environ", "..%2f..%2f..%2fproc%2fself%2fenviron",
        "app.js%2f..%2fstyle.css",
    ]  # fmt: skip
    assert len(names) >= 60
    for name in names:
        for prefix in ("/static/", "/"):
            target = prefix + name.replace(" ", "%20")
            if target in ("/static/app.js", "/?", "/."):
                continue
            status = get(server, f"127.0.0.1:{server.port}", target.encode().decode("latin-1"))
            assert status in (400, 404, 405, 414), (target, status)


def test_headers_of_every_answer(server):
    for method, path in (
        ("GET", "/"),
        ("GET", "/static/app.js"),
        ("GET", "/nowhere"),
        ("PUT", "/health"),
        ("GET", "/health"),
    ):
        answer = httpx.request(method, server.url + path)
        headers = answer.headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers and "server" not in headers
    assert httpx.get(server.url + "/health", headers={"host": "evil"}).headers["x-content-type-options"] == "nosniff"


def test_the_page_asks_nobody_else_for_anything():
    from importlib import resources

    for file in (resources.files("nitrofusion.serve") / "static").iterdir():
        text = file.read_text()
        for word in ("http://", "https://", "//cdn", "@import", "innerHTML", "eval(", "document.write"):
            assert word not in text.replace("http://www.w3.org/2000/svg", ""), (file.name, word)


def soonest(ask) -> float:
    """Seconds of the quickest of three requests, all of which are answered: the machine may be busy."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert ask().status_code == 200
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_oversize_and_slow_clients(server):
    head = f"POST /v1/images/generations HTTP/1.1\nHost: 127.0.0.1:{server.port}\nContent-Type: application/json\n"
    assert raw(server, f"{head}Content-Length: 10000000\n\n", b"{")[0] == 413
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert raw(server, f"{head}Transfer-Encoding: chunked\n\n", chunk * 3)[0] in (413, 0)
    assert raw(server, f"{head}Content-Length: -1\n\n", b"")[0] == 400
    assert raw(server, f"{head}Content-Length: abc\n\n", b"")[0] == 400
    many = "".join(f"X-{i}: y\n" for i in range(10_000))
    assert raw(server, f"GET /health HTTP/1.1\nHost: 127.0.0.1:{server.port}\nConnection: close\n{many}\n")[0] == 431
    assert raw(server, f"GET /{'a' * 100_000} HTTP/1.1\nHost: 127.0.0.1:{server.port}\nConnection: close\n\n")[0] == 414
    ranges = ",".join(f"{i}-{i}" for i in range(1000))
    assert soonest(lambda: httpx.get(f"{server.url}/static/app.js", headers={"range": f"bytes={ranges}"})) < 0.5

    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for sock in slow:
        sock.sendall(b"GET /health HT")
    assert soonest(lambda: httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a"})) < 1.0
    for sock in slow:
        sock.close()


def test_slow_clients_are_hung_up_on(monkeypatch):
    monkeypatch.setattr("nitrofusion.serve.run.HEADER_TIMEOUT", 0.3)
    monkeypatch.setattr("nitrofusion.serve.security.BODY_TIMEOUT", 0.3)
    with running() as server:
        host = f"Host: 127.0.0.1:{server.port}\n"
        start = time.perf_counter()
        assert raw(server, f"GET /health HTTP/1.1\n{host}")[0] == 0
        post = f"POST /v1/images/generations HTTP/1.1\n{host}Content-Length: 50\n\n"
        assert raw(server, post, b'{"prompt"')[0] == 408
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        connection.sock.sendall(b"GET /hea")  # slow the second time
        connection.sock.settimeout(5)
        assert connection.sock.recv(100) == b""
        assert time.perf_counter() - start < 5
        with server.live() as live:  # a WebSocket may be silent
            time.sleep(0.5)
            live.send(json.dumps({"type": "draw", "seq": 1, "prompt": "a"}))
            assert unpack(live.recv(timeout=5))[0]["seq"] == 1


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def hostile_images() -> dict[str, bytes]:
    """Name to bytes of images that nobody should decode."""
    signature, end = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")

    def header(width, height, depth=8, color=2):
        return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))

    def real(kind, size=(64, 64), **options):
        file = io.BytesIO()
        Image.effect_noise(size, 60).convert("RGB").save(file, kind, **options)
        return file.getvalue()

    good = real("PNG")
    zeros, large = zlib.compress(bytes(10_000_000), 9), zlib.compress(bytes(80_000_000), 9)
    pixels = chunk(b"IDAT", zlib.compress(bytes(200)))
    images = {
        "empty": b"", "text": b"hello", "zeros": bytes(5000), "random": os.urandom(5000), "signature": signature,
        "header_only": signature + header(8, 8), "no_data": signature + header(8, 8) + end,
        "bomb_20000": signature + header(20_000, 20_000) + chunk(b"IDAT", zeros) + end,
        "bomb_max": signature + header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", zeros) + end,
        "bomb_wide": signature + header(2**31 - 1, 1) + chunk(b"IDAT", zeros) + end,
        "nine_megapixels": signature + header(3000, 3000) + chunk(b"IDAT", zeros) + end,
        "zero_size": signature + header(0, 0) + chunk(b"IDAT", zeros) + end,
        "odd_depth": signature + header(8, 8, 77, 9) + chunk(b"IDAT", zeros) + end,
        "bad_crc": signature + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), 1) + end,
        "text_bomb": signature + header(8, 8) + chunk(b"zTXt", b"a\0\0" + large) + pixels + end,
        "itxt_bomb": signature + header(8, 8) + chunk(b"iTXt", b"a\0\1\0\0\0" + large) + pixels + end,
        "icc_bomb": signature + header(8, 8) + chunk(b"iCCP", b"a\0\0" + large) + end,
        "huge_chunk": signature + header(8, 8) + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(50),
        "cut": good[: len(good) // 2], "cut_jpeg": real("JPEG")[:200], "cut_webp": real("WEBP")[:100],
        "gif": real("GIF"), "bmp": real("BMP"), "tiff": real("TIFF"), "ico": real("ICO"), "ppm": real("PPM"),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "pdf": b"%PDF-1.4\n1 0 obj\n",
        "html": b"<html><script>alert(1)</script></html>",
        "jpeg_huge": real("JPEG")[:-2].replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65500, 65500)),
        "apng": signature + header(8, 8) + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + end,
    }  # fmt: skip
    return images


def test_hostile_images_are_refused_quickly_and_the_worker_lives():
    import psutil

    images = hostile_images()
    assert len(images) >= 30
    drawer = EngineDrawer("world")
    memory = psutil.Process().memory_info().rss
    for name, data in images.items():
        start = time.process_time()
        (result,) = drawer.draw([Order("a red ring", image=data, strength=0.5)])
        assert isinstance(result, Refused) and "image must" in str(result), (name, result)
        assert time.process_time() - start < 1.0, name  # 0.2 s: benchmarks.serve
    assert psutil.Process().memory_info().rss - memory < 100e6


def test_hostile_images_by_way_of_the_socket(server):
    with server.live() as live:
        live.send(pack({"type": "draw", "seq": 1, "prompt": "a", "image": True}, os.urandom(1000)))
        assert unpack(live.recv(timeout=5))[0]["seq"] == 1  # the fake does not look at it
        live.send(pack({"type": "draw", "seq": 2, "prompt": "a", "image": True}, bytes(MAX_IMAGE + 1)))
        assert "at most" in json.loads(live.recv(timeout=5))["message"]


def test_random_requests_never_end_in_an_unhandled_error(server, caplog):
    """The schema's own fuzzer: every answer is one that the schema has."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (the dev extra)")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = {}

    def try_all(operation):
        @settings(
            max_examples=40, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def run(case):
            answer = case.call(timeout=10)
            documented = operation.definition.raw["responses"]
            assert str(answer.status_code) in documented, (case, answer.status_code)
            assert answer.status_code < 500, answer.text
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1

        run()

    for result in schema.get_all_operations():
        try_all(result.ok())
    assert seen.get(200, 0) > 10 and not [r for r in caplog.records if r.exc_info]
