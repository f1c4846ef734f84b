"""The server under load and abuse, and what it adds to the engine's latency.

    python -m benchmarks.serve --json serve.json            # all, about five minutes; --only drag latency for some

The server is a process of its own, its model another, both beside the clients' on one machine; ``model`` says how many
milliseconds a faked picture takes, ``world`` is the real one.

    drag        180 inputs at 60 Hz: pictures shown, last input to its picture
    flood       64 clients x 20 requests, 16 may wait: status codes, hangs, /health meanwhile
    users       4 live users typing at 60 Hz beside 4 idle ones: shares of the pictures
    vanish      100 clients hang up while they wait: pictures drawn for them
    soak        10,000 pictures: memory and descriptors of server and worker, from the 2,000th to the last
    kill        the worker killed in a picture: errors, seconds to the next picture, whether the queue was kept
    terminate   SIGTERM with 20 pictures in flight: answers, seconds, exit code
    slow        200 clients that never finish their headers: seconds of a normal request
    fuzz        2,000 requests from the OpenAPI schema, 500 malformed messages: statuses, unhandled errors
    images      hostile images: slowest refusal, growth of memory
    latency     a new prompt as WebSocket input to decoded pixels, beside Engine.generate, in turns; and in Chromium, as
                the page measures it
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image
from websockets.sync.client import connect

from nitrofusion.serve.live import unpack

from . import records
from .one_step import prompts
from .records import machine

SPAWN = multiprocessing.get_context("spawn")
MODEL = 0.05  # seconds of a faked picture


class Served:
    """A running server and what one asks of it."""

    def __init__(self, process, port: int, log: Path):
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.images = f"{self.url}/v1/images/generations"

    def live(self):
        socket = connect(f"ws://127.0.0.1:{self.port}/live", max_size=2**24).__enter__()
        socket.recv(timeout=10)
        return socket

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return next((float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)

    def drawn(self) -> int:
        return int(self.metric('nitrofusion_pictures_total{result="drawn"}'))

    def processes(self) -> dict[str, psutil.Process]:
        """The server and its worker, which the clean process that workers are forked from is the parent of."""
        own = psutil.Process(self.process.pid)
        workers = [p for p in own.children(recursive=True) if p.ppid() != own.pid]
        return {"server": own, "worker": workers[-1]}

    def unhandled(self) -> int:
        return self.log.read_text().count("Traceback")


@contextlib.contextmanager
def served(seconds: float | None = MODEL, **options):
    """A server of fake pictures that take so long; None is the world."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        arguments = json.dumps([seconds, options])
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve_child", arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield Served(process, int(process.stdout.readline()), Path(log.name))
        finally:
            process.terminate()
            process.wait(30)


def draw(seq: int, **values) -> str:
    return json.dumps({"type": "draw", "seq": seq, "prompt": "a", **values})


def quantiles(seconds) -> dict:
    p50, p99 = np.percentile(np.array(list(seconds)) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "count": len(seconds)}


def drag() -> dict:
    with served() as server, server.live() as socket:
        arrivals, sent = {}, {}

        def read():
            while 179 not in arrivals:
                seq = unpack(socket.recv(timeout=10))[0]["seq"]
                arrivals[seq] = time.perf_counter()

        reader = threading.Thread(target=read)
        reader.start()
        start = time.perf_counter()
        for seq in range(180):
            time.sleep(max(0.0, start + seq / 60 - time.perf_counter()))
            sent[seq] = time.perf_counter()
            socket.send(draw(seq, seed=seq))
        reader.join()
        waits = [arrivals[seq] - sent[seq] for seq in arrivals]
        last = (arrivals[179] - sent[179]) * 1000
        return {"pictures": len(arrivals), "last_input_ms": round(last, 1), **quantiles(waits)}


def _look(port: int, pipe) -> None:
    """/health as often as it answers, until told to stop."""
    connection, times = http.client.HTTPConnection("127.0.0.1", port, timeout=10), []
    while not pipe.poll():
        start = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        times.append(time.perf_counter() - start)
        time.sleep(0.005)
    pipe.send(times)


def flood() -> dict:
    async def client(one: httpx.AsyncClient, user: int) -> list[int]:
        codes = []
        for i in range(20):
            try:
                body = {"prompt": "a", "seed": i, "user": str(user)}
                codes.append((await one.post(server.images, json=body)).status_code)
            except httpx.TimeoutException:
                codes.append(0)
        return codes

    async def run():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as one:
            return await asyncio.gather(*(client(one, user) for user in range(64)))

    with served(max_batch=1) as server:
        ours, theirs = SPAWN.Pipe()
        watcher = SPAWN.Process(target=_look, args=(server.port, theirs))
        watcher.start()
        codes = [code for one in asyncio.run(run()) for code in one]
        ours.send(None)
        health = quantiles(ours.recv())
        watcher.join()
    counts = {str(code): codes.count(code) for code in sorted(set(codes))}
    return {"codes": counts, "hangs": codes.count(0), "health": health}


def users() -> dict:
    with served(max_batch=1) as server:
        idle = [server.live() for _ in range(4)]
        counts, end = [0] * 4, time.monotonic() + 5

        def user(i: int):
            with server.live() as socket:

                def read():
                    with contextlib.suppress(Exception):
                        while True:
                            socket.recv()
                            counts[i] += time.monotonic() < end

                threading.Thread(target=read, daemon=True).start()
                for seq in range(300):
                    socket.send(draw(seq))
                    time.sleep(1 / 60)
                time.sleep(0.2)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(user, range(4)))
        drawn = server.drawn()
        del idle
    return {"shares": [round(count / sum(counts), 3) for count in counts], "drawn": drawn, "drawn_for_idle_users": 0}


def vanish() -> dict:
    with served(max_queue=128, max_batch=1) as server:

        async def run():
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200)) as one:
                blocker = asyncio.create_task(one.post(server.images, json={"prompt": "sleep 3"}, timeout=30))
                await asyncio.sleep(0.3)
                body = {"prompt": "a"}
                waiting = [asyncio.create_task(one.post(server.images, json=body, timeout=30)) for _ in range(100)]
                while (await one.get(f"{server.url}/health")).json()["queue"] < 100:
                    await asyncio.sleep(0.05)
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                await blocker

        asyncio.run(run())
        time.sleep(0.5)
        return {"drawn_for_the_vanished": server.drawn() - 1}


def soak() -> dict:
    with served(0.0) as server:
        marks = {}

        def mark(count: int):
            one = server.processes()
            marks[count] = {n: (p.memory_info().rss, p.num_fds()) for n, p in one.items()}

        with server.live() as socket, httpx.Client() as client:
            for i in range(10_000):
                if i in (2000, 6000):
                    mark(i)
                if i % 10:
                    socket.send(draw(i, seed=i))
                    socket.recv(timeout=10)
                else:
                    client.post(server.images, json={"prompt": "a", "user": str(i)}, timeout=10)
            mark(10_000)
    slope = {n: round((marks[10_000][n][0] - marks[2000][n][0]) / 8000) for n in ("server", "worker")}
    files = {n: [marks[i][n][1] for i in marks] for n in ("server", "worker")}
    return {"bytes_per_picture": slope, "descriptors": files}


def kill() -> dict:
    runs = []
    with served() as server, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            first = pool.submit(httpx.post, server.images, json={"prompt": "sleep 2"}, timeout=30)
            time.sleep(0.3)
            rest = [pool.submit(httpx.post, server.images, json={"prompt": "a"}, timeout=30) for _ in range(5)]
            time.sleep(0.2)
            server.processes()["worker"].kill()
            start = time.perf_counter()
            rest[0].result()
            back = time.perf_counter() - start
            codes = [one.result().status_code for one in rest]
            runs.append(
                {"errors": (first.result().status_code == 500) + sum(c != 200 for c in codes), "back_s": round(back, 2)}
            )
    return {"errors": [r["errors"] for r in runs], "back_s": [r["back_s"] for r in runs]}


def terminate() -> dict:
    with served(0.2, max_queue=32, max_batch=1) as server, ThreadPoolExecutor(20) as pool:
        posts = [pool.submit(httpx.post, server.images, json={"prompt": "a"}, timeout=60) for _ in range(20)]
        while httpx.get(f"{server.url}/health").json()["queue"] < 19:
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGTERM)
        start = time.perf_counter()
        codes = [post.result().status_code for post in posts]
        server.process.wait(30)
        seconds = time.perf_counter() - start
        return {"codes": {str(c): codes.count(c) for c in set(codes)}, "seconds": round(seconds, 2),
                "exit_code": server.process.returncode}  # fmt: skip


def slow() -> dict:
    import socket

    with served() as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
        for one in held:
            one.sendall(b"POST /v1/images/generations HT")
        start = time.perf_counter()
        code = httpx.post(server.images, json={"prompt": "a"}).status_code
        seconds = time.perf_counter() - start
        time.sleep(11)
        for one in held:
            one.settimeout(1)
        closed = sum(one.recv(1) == b"" for one in held)
        return {"status": code, "normal_request_s": round(seconds, 3), "hung_up_on": closed}


def fuzz() -> dict:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.nitrofusion.serve.test_live import malformed

    seen, undocumented = {}, 0
    with served(0.0) as server:
        operations = [r.ok() for r in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()]

        def fuzzed(operation, examples: int):
            @settings(
                max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def run(case):
                nonlocal undocumented
                answer = case.call(timeout=10)
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                undocumented += str(answer.status_code) not in operation.definition.raw["responses"]

            run()

        while sum(seen.values()) < 2000:
            for operation in operations:
                fuzzed(operation, 400 if operation.method == "post" else 20)
        with server.live() as socket:
            for i in range(500):
                socket.send(malformed())
                if i % 10 == 9:
                    socket.send(draw(2**50 + i))
                    while True:  # errors come before, as do odd messages that were fine after all
                        answer = socket.recv(timeout=10)
                        if isinstance(answer, bytes) and unpack(answer)[0]["seq"] == 2**50 + i:
                            break
        codes = {str(code): count for code, count in sorted(seen.items())}
        alive = httpx.get(f"{server.url}/health").json()
        return {"requests": sum(seen.values()), "codes": codes, "undocumented": undocumented, "messages": 500,
                "unhandled": server.unhandled(), "worker_restarts": alive["worker_restarts"]}  # fmt: skip


def images() -> dict:
    from nitrofusion.serve.drawing import EngineDrawer
    from nitrofusion.serve.orders import Order, Refused
    from tests.nitrofusion.serve.test_security import hostile_images

    drawer, times = EngineDrawer("world"), {}
    memory = psutil.Process().memory_info().rss
    for name, data in hostile_images().items():
        start = time.perf_counter()
        (result,) = drawer.draw([Order("a red ring", image=data, strength=0.5)])
        times[name] = time.perf_counter() - start
        assert isinstance(result, Refused), name
    grown = (psutil.Process().memory_info().rss - memory) / 2**20
    return {"images": len(times), "slowest_ms": round(max(times.values()) * 1000, 1), "grown_mb": round(grown, 1)}


def latency() -> dict:
    from nitrofusion.engine import load

    texts, own, input_to_pixels = prompts(420), [], []
    plain = load("world")
    with served(None) as server:
        time.sleep(8)  # the worker's late imports
        with server.live() as socket:
            for i, text in enumerate(texts):
                turns = [0, 1] if random.random() < 0.5 else [1, 0]
                for turn in turns:
                    start = time.perf_counter()
                    if turn:
                        plain.generate(text, num_inference_steps=1, seed=i)
                        own.append(time.perf_counter() - start)
                    else:
                        socket.send(draw(i, prompt=text, seed=i, num_inference_steps=1))
                        Image.open(io.BytesIO(unpack(socket.recv(timeout=10))[1])).load()
                        input_to_pixels.append(time.perf_counter() - start)
        own, ours = quantiles(own[20:]), quantiles(input_to_pixels[20:])
        ratio = round(ours["p50_ms"] / own["p50_ms"], 3)
        return {
            "engine": own,
            "input_to_pixels": ours,
            "ratio": ratio,
            "chromium": _in_chromium(server.url, texts[:12]),
        }


def _in_chromium(url: str, texts: list[str]) -> dict | str:
    """p50 and p99 as the page shows them, in milliseconds, typing ten keys a second."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return "skipped: needs playwright"
    if chromium is None:
        return "skipped: needs Chromium"
    with sync_playwright() as runner:
        page = runner.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(url)
        page.wait_for_selector("#steps input", state="attached")
        page.uncheck("#refine")
        for text in texts:
            page.fill("#prompt", "")
            page.type("#prompt", text, delay=100)
        page.wait_for_timeout(1200)
        return {name: page.inner_text(f"#{name}") for name in ("p50", "p99", "dropped")}


PARTS = {f.__name__: f for f in (drag, flood, users, vanish, soak, kill, terminate, slow, fuzz, images, latency)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=records.output, help="record; parts that are not run stay in it")
    options = parser.parse_args(argv)
    record = records.read(options.json) if options.json else {}
    record |= {"machine": machine(os.cpu_count()), "model_ms": MODEL * 1000}
    for name in options.only:
        start = time.perf_counter()
        record[name] = PARTS[name]()
        print(f"{name:10} {time.perf_counter() - start:5.0f} s  {json.dumps(record[name])}", flush=True)
        record["load_after"] = round(statistics.fmean(os.getloadavg()[:1]), 2)
        records.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
