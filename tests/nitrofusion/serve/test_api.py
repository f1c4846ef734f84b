"""The HTTP service as its clients see it."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from nitrofusion.errors import InputError
from nitrofusion.serve import ray_app
from nitrofusion.serve.metrics import HELP, Metrics

from .fake import color, no_model, running, wait


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


def ask(server, **body):
    return httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a", **body}, timeout=20)


def test_the_openai_client_works_unchanged(server):
    openai = pytest.importorskip("openai", reason="needs openai (the dev extra)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["fake"]
    answer = client.images.generate(
        model="fake", prompt="a cat", n=3, size="auto", extra_body={"seed": 40, "num_inference_steps": 2}
    )
    assert [color(base64.b64decode(one.b64_json))[:2] for one in answer.data] == [(40, 120), (41, 120), (42, 120)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model="fake", prompt="a cat", n=99)
    assert refused.value.body["message"].startswith("generate: n: ")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="a cat")
    defaults = {
        "background": "auto", "moderation": "auto", "output_compression": 100, "output_format": "png",
        "partial_images": 0, "quality": "auto", "stream": False, "style": "vivid", "user": "u",
    }  # fmt: skip
    extra = {"safety_identifier": "s", "seed": 7}
    assert color(base64.b64decode(client.images.generate(prompt="a", **defaults, extra_body=extra).data[0].b64_json))
    url = client.images.generate(prompt="a cat", response_format="url").data[0].url
    assert url.startswith("data:image/png;base64,")


def test_seeds_are_given_or_drawn_by_lot_and_told(server):
    answers = [ask(server).json()["data"][0] for _ in range(3)]
    assert len({one["seed"] for one in answers}) == 3
    for one in answers:
        assert color(base64.b64decode(one["b64_json"]))[0] == one["seed"] % 256


@pytest.mark.parametrize(
    "body,words",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 5001}, "prompt"),
        ({"n": 0}, "n:"),
        ({"n": True}, "n:"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"size": "big"}, "size"),
        ({"size": "99999x8"}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"steps": 4}, "steps"),
        ({"response_format": "file"}, "response_format"),
        ({"stream": True}, "stream: Input should be False"),
        ({"partial_images": 2}, "partial_images"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "webp"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"image": "http://evil.example/"}, "image"),
        ({"prompt": "refuse"}, "prompt must be another"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_it(server, body, words):
    answer = ask(server, **body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_bodies_that_are_no_json(server):
    for body in (b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 50_000):
        answer = httpx.post(
            f"{server.url}/v1/images/generations", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:20]


def test_failures_are_500_and_the_next_request_is_served(server):
    assert ask(server, prompt="fail").status_code == 500
    assert ask(server).status_code == 200


def test_health_and_metrics(server):
    parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus_client (the dev extra)")
    state = httpx.get(f"{server.url}/health").json()
    assert state["status"] == "ok" and state["model"] == "fake" and state["queue"] == 0
    ask(server)
    text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["nitrofusion_worker_up"].samples[0].value == 1
    buckets = [s.value for s in families["nitrofusion_draw_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] > 0
    drawn = {s.labels["result"]: s.value for s in families["nitrofusion_pictures"].samples}
    assert drawn["drawn"] == server.drawn()


def test_every_answer_is_200_or_429():
    with running(0.02, max_queue=8) as server, ThreadPoolExecutor(24) as pool:
        server.service.scheduler.max_batch = 1
        with httpx.Client(timeout=30, limits=httpx.Limits(max_connections=32)) as client:
            url = f"{server.url}/v1/images/generations"
            answers = list(pool.map(lambda i: client.post(url, json={"prompt": "a", "user": str(i % 24)}), range(120)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"


def test_health_waits_for_no_picture():
    """How quick it is beside many clients, ``benchmarks.serve`` measures on a quiet machine."""
    with running() as server:
        slow = threading.Thread(target=ask, args=(server,), kwargs={"prompt": "sleep 5"})
        slow.start()
        assert wait(lambda: server.service.scheduler.drawing)
        for _ in range(20):
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
        assert server.service.scheduler.drawing, "twenty answers within one picture"
        slow.join()


def test_clients_that_vanish_while_they_wait_cost_one_generation_at_most():
    with running(max_queue=64) as server:
        server.service.scheduler.max_batch = 1
        blocker = threading.Thread(target=ask, args=(server,), kwargs={"prompt": "sleep 5"})
        blocker.start()
        assert wait(lambda: server.service.scheduler.drawing)

        def vanish(_):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{server.url}/v1/images/generations", json={"prompt": "a"}, timeout=httpx.Timeout(5, read=0.05)
                )

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(vanish, range(20)))
        assert wait(lambda: server.service.scheduler.queued == 0), "who went away waits no more"
        blocker.join()
        assert wait(lambda: not server.service.scheduler.drawing)
        assert server.drawn() <= 1 + 1


def test_shapes_that_agree_are_batched():
    with running(0.1) as server, ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda i: ask(server, seed=i, user=str(i)), range(9)))
        pictures = [color(base64.b64decode(a.json()["data"][0]["b64_json"])) for a in answers]
        assert [p[0] for p in pictures] == list(range(9))
        assert max(p[2] for p in pictures) == 4, "the model's own bound"


def test_world_pictures_carry_what_reproduces_them(tmp_path):
    from nitrofusion.engine.reproduce import reproduce

    with running(make=world) as server:
        answer = ask(
            server, prompt="a red ring on a navy background", seed=5, num_inference_steps=3, negative_prompt="x"
        )
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    (tmp_path / "a.png").write_bytes(data)
    assert reproduce(tmp_path / "a.png").report() == "every pixel is the same"
    assert Image.open(io.BytesIO(data)).size == (32, 32)


def world():
    from nitrofusion.serve.app import engine

    return engine("world")


# The command.


def serve(*args, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "nitrofusion", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_serves_and_sigterm_finishes_what_is_in_flight():
    process = serve("--port", "0")
    try:
        line = process.stdout.readline()
        assert "world on cpu at http://127.0.0.1:" in line, process.stderr.read()
        url = line.split(" at ")[1].split()[0]
        states = []

        def post(i):
            body = {"prompt": "a red ring on a navy background", "num_inference_steps": 4, "seed": i}
            try:
                return httpx.post(f"{url}v1/images/generations", json=body, timeout=30).status_code
            except httpx.ConnectError:
                return "too late"

        def busy():
            states.append(httpx.get(f"{url}health").json())
            return states[-1]["drawing"] > 0

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(post, i) for i in range(12)]
            assert wait(busy)
            process.send_signal(signal.SIGTERM)
            codes = [answer.result() for answer in answers]
        assert process.wait(15) == 0
        # all that was drawn or waited when it was told to stop; who came later may be refused
        assert codes.count(200) >= states[-1]["drawing"] + states[-1]["queue"], (codes, states[-1])
        assert set(codes) <= {200, 503, "too late"}
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_what_is_wrong_at_the_start_is_one_line_and_a_code(capsys, monkeypatch):
    from nitrofusion.cli import main

    def fails(*args, code=2, words=""):
        assert main(["serve", *args]) == code
        err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("nitrofusion: loading")]
        assert len(err) == 1 and words in err[0], err

    with running() as server:
        fails("--port", str(server.port), words=f"127.0.0.1:{server.port} must be free")
    fails("--port", "70000", words="port must be in 0..65535")
    fails("--host", "0.0.0.0", words="a token must be given for a host other than loopback")
    fails("--token", "short", words="token must be at least")
    fails("--host", "no.such.host.invalid", "--token", "ä" * 20, words="token must be at least 16 ASCII letters")
    fails("--host", "no.such.host.invalid", "--token", "x" * 20, words="host must be an address")
    fails("--model", "/nowhere", "--port", "0", words="/nowhere")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(words="pip install 'nitrofusion[serve]'")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_create_app_fails_to_start_as_serve_does():
    with pytest.raises(AssertionError), running(make=no_model):
        pass


def test_small_answers_are_not_held_back(server):
    """Nagle's algorithm and a delayed acknowledgement would make every answer of two writes take 40 ms."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    times = []
    for _ in range(40):
        start = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        times.append(time.perf_counter() - start)
    assert min(times[5:]) < 0.03


def test_schema_is_what_the_guard_and_the_endpoints_answer(server):
    schema = json.loads(httpx.get(f"{server.url}/openapi.json").text)
    responses = schema["paths"]["/v1/images/generations"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "414", "429", "431", "500", "503"}


@pytest.mark.parametrize("name", [r"\ud800", "k" * 100_000])
def test_a_field_of_any_name_is_refused_in_few_words(server, name):
    body = f'{{"prompt": "a", "{name}": 1}}'.encode()
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/images/generations", content=body, headers=headers, timeout=20)
    assert answer.status_code == 400 and len(answer.content) < 1000
    with server.live() as socket:
        if len(name) < 1000:
            socket.send(f'{{"type": "draw", "seq": 1, "prompt": "a", "{name}": 1}}')
            assert json.loads(socket.recv(timeout=5))["type"] == "error"


def test_head_is_answered_as_get_without_the_body(server):
    for path in ("/", "/static/app.js", "/health", "/v1/models", "/metrics"):
        head, get = httpx.head(server.url + path), httpx.get(server.url + path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == get.headers["content-type"], path
    assert httpx.head(f"{server.url}/static/nothing.js").status_code == 404


def test_every_metric_is_there_before_the_first_event():
    """Read by the rules of the text format, not by a library that could be lenient."""
    metrics = Metrics()
    text = metrics.text({name: 0 for name in ("queue", "drawing", "sessions", "worker_restarts", "worker_up")})
    types, samples = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name not in types, "a family is written once"
            types[name] = kind
        elif not line.startswith("#"):
            name, labels, value = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]*"\})? (\S+)', line).groups()
            samples[name + (labels or "")] = float(value)
    full = {name.removeprefix("nitrofusion_").removesuffix("_total") for name in types}
    assert full == set(HELP)
    assert samples['nitrofusion_pictures_total{result="failed"}'] == 0 == samples["nitrofusion_dropped_inputs_total"]
    assert samples["nitrofusion_draw_seconds_count"] == 0 == samples['nitrofusion_draw_seconds_bucket{le="+Inf"}']


@pytest.mark.parametrize(
    "args,words",
    [({"replica": "2"}, "got replica"), ({"replicas": "two"}, "replicas must be a whole number"),
     ({"replicas": 2.5}, "a whole number, got 2.5"), ({"num_gpus": "all"}, "num_gpus must be a number")],
)  # fmt: skip
def test_wrong_arguments_of_rays_command_are_refused(args, words):
    with pytest.raises(InputError, match=words):
        ray_app.app(args)
