"""Two replicas on a local Ray cluster of two CPUs."""

import base64
import functools
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from websockets.sync.client import connect

from nitrofusion.serve import ray_app
from nitrofusion.serve.live import unpack

from .fake import FakeDrawer, color, wait

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise, which a busy machine starves
    for what in ("READY_CHECK", "HEALTH_CHECK"):  # importing Ray may take a busy machine longer than 5 s
        os.environ.setdefault(f"RAY_SERVE_PROXY_{what}_TIMEOUT_S", "60")
    ray = pytest.importorskip("ray", reason="needs ray (the extra ray)")
    serve = pytest.importorskip("ray.serve", reason="needs ray[serve] (the extra ray)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        make = functools.partial(FakeDrawer, 0.05)
        app = ray_app.build(make=make, replicas=2, num_cpus=0.5, max_queue=4, port=port, token="t" * 24)
        serve.run(app, name="test", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_replicas_answer_push_back_and_refuse_strangers(url):
    images = f"{url}/v1/images/generations"
    one = httpx.post(images, json={"prompt": "a", "seed": 7}, timeout=30).json()["data"][0]
    assert color(base64.b64decode(one["b64_json"]))[0] == 7

    with ThreadPoolExecutor(24) as pool:
        post = lambda i: httpx.post(images, json={"prompt": "a", "num_inference_steps": 1 + i % 4}, timeout=60)  # noqa: E731
        codes = [answer.status_code for answer in pool.map(post, range(96))]
    assert codes.count(200) >= 20 and set(codes) <= {200, 429, 503} and set(codes) != {200}

    assert wait(lambda: len(replicas(url)) == 2, 20), "both replicas answer"
    assert httpx.post(images, json={"prompt": "a"}, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
    assert "NitroFusion" in httpx.get(url).text

    live = f"ws://{url.removeprefix('http://')}/live"
    with connect(live, origin=url, subprotocols=["nitrofusion.v1", f"token.{'t' * 24}"]) as client:
        assert json.loads(client.recv(timeout=10))["type"] == "hello"
        client.send(json.dumps({"type": "draw", "seq": 3, "prompt": "a", "seed": 9}))
        header, data = unpack(client.recv(timeout=10))
        assert header["seq"] == 3 and color(data)[0] == 9


def replicas(url):
    """When the replicas that answered were started."""
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{url}/health", timeout=10), range(12)))
    return {answer.json()["started"] for answer in answers if answer.status_code == 200}
