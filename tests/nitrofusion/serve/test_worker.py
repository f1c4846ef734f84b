"""The worker's process: it draws, dies, comes back, and says why it cannot start."""

import asyncio
import functools
import io
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from nitrofusion.engine import load
from nitrofusion.engine.png import read_settings
from nitrofusion.errors import InputError
from nitrofusion.serve.app import engine
from nitrofusion.serve.orders import PNG, Drawn, Failed, Order, Refused
from nitrofusion.serve.service import Service
from nitrofusion.serve.worker import ServeError, Worker

from ...native import LEVELS_BY_BATCH
from .fake import FakeDrawer, color, dies_while_loading, no_memory, no_model


def drawing(test, make=FakeDrawer, **options):
    async def run():
        service = Service(make, **options)
        await service.start()
        try:
            return await test(service)
        finally:
            await service.stop()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "make,error,words",
    [
        (no_model, InputError, "model: nowhere must be a preset"),
        (no_memory, ServeError, "serve: there must be enough free memory, got MemoryError"),
        (dies_while_loading, ServeError, "serve: the model must load, got a worker that died of SIGKILL"),
    ],
)
def test_a_model_that_does_not_load_is_one_line(make, error, words):
    with pytest.raises(error) as raised:
        drawing(None, make)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_killed_in_a_picture_one_error_and_the_queue_is_kept():
    async def test(service):
        orders = [Order("sleep 0.4"), *(Order("a", num_inference_steps=2, seed=i) for i in range(5))]
        tasks = [asyncio.create_task(service.scheduler.submit(f"c{i}", [order])) for i, order in enumerate(orders)]
        await asyncio.sleep(0.15)
        assert service.scheduler.drawing == 1 and service.scheduler.queued == 5
        os.kill(service.worker.pid, signal.SIGKILL)
        killed = time.perf_counter()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.perf_counter() - killed
        assert isinstance(results[0], Failed) and "SIGKILL" in str(results[0])
        assert [color(drawn.data)[0] for (drawn,) in results[1:]] == [0, 1, 2, 3, 4]
        assert seconds < 2.0 and service.worker.restarts == 1
        assert service.health()["status"] == "ok"

    drawing(test)


def test_killed_while_idle_it_comes_back_unasked():
    async def test(service):
        pid = service.worker.pid
        os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        while not (service.worker.alive and service.worker.pid != pid and service.worker.restarts == 1):
            await asyncio.sleep(0.01)
            assert time.perf_counter() - killed < 2.0
        (drawn,) = await service.scheduler.submit("c", [Order("a", seed=9)])
        assert color(drawn.data)[0] == 9

    drawing(test)


def test_an_order_that_kills_is_not_tried_again():
    async def test(service):
        with pytest.raises(Failed):
            await service.scheduler.submit("c", [Order("die")])
        await service.scheduler.submit("c", [Order("a")])
        assert service.worker.restarts == 1

    drawing(test)


def test_a_picture_that_takes_too_long_is_given_up():
    async def run():
        worker = Worker(FakeDrawer, timeout=0.3)
        await worker.start()
        (result,) = await worker.draw([Order("sleep 30")])
        assert isinstance(result, Failed) and "at most 0.3 s" in str(result)
        assert await worker.revive() and isinstance((await worker.draw([Order("a")]))[0], Drawn)
        await worker.stop()

    asyncio.run(run())


def test_stopping_in_the_middle_of_loading_does_not_hang():
    async def run():
        worker = Worker(functools.partial(time.sleep, 60))
        start = asyncio.create_task(worker.start())
        await asyncio.sleep(0.3)
        await asyncio.wait_for(worker.stop(), 5)
        with pytest.raises(ServeError):
            await start

    asyncio.run(run())


def assert_same(drawn, wanted):
    one, other = (np.asarray(image).astype(int) for image in (Image.open(io.BytesIO(drawn.data)), wanted))
    assert np.abs(one - other).max() <= LEVELS_BY_BATCH


def test_the_engine_draws_what_it_draws_without_a_server():
    """Every picture equals ``Engine.generate``'s, by itself and among others; a wrong order spoils only itself."""
    seeds = random.sample(range(2**31), 5)
    plain = load("world")
    noise = io.BytesIO()
    Image.effect_noise((48, 40), 80).convert("RGB").save(noise, "PNG")
    square = Image.open(noise).resize((32, 32), Image.Resampling.LANCZOS, (4, 0, 44, 40))

    async def test(service):
        prompt = "a striped red circle left of a blue ring on an olive background"
        together = [Order(prompt, seed=seed, format=PNG, num_inference_steps=2) for seed in seeds]
        drawn = await service.scheduler.submit("c", together)
        for seed, one in zip(seeds, drawn, strict=True):
            wanted = plain.generate(prompt, seed=seed, num_inference_steps=2)[0]
            assert_same(one, wanted)
            assert read_settings(io.BytesIO(one.data))["seed"] == seed

        name = str(random.random())
        for steps in (2, 3, 4):  # stages share model calls, and are the same pictures
            order = Order(prompt, seed=seeds[0], num_inference_steps=steps, stream=name, negative_prompt="a ring")
            (one,) = await service.worker.draw([order])
            wanted = plain.generate(prompt, seed=seeds[0], num_inference_steps=steps, negative_prompt="a ring")[0]
            assert_same(one, wanted)

        bad = Order(prompt, image=b"GIF89a", strength=0.7)
        good = Order(prompt, image=noise.getvalue(), strength=0.7)
        refused, one = await service.worker.draw([bad, good])
        assert isinstance(refused, Refused) and "image must be a readable PNG, JPEG, WEBP" in str(refused)
        wanted = plain.generate(prompt, image=square, strength=0.7)[0]
        assert_same(one, wanted)
        (refused,) = await service.worker.draw([Order(prompt, num_inference_steps=7)])
        assert "num_inference_steps must be" in str(refused)
        (refused,) = await service.worker.draw([Order(prompt, height=31)])
        assert "height must be a multiple" in str(refused)

    drawing(test, functools.partial(engine, "world"), max_batch=5)


def test_an_image_of_16_bits_keeps_its_levels():
    from nitrofusion.serve import drawing

    eight = Image.linear_gradient("L")
    sixteen = Image.frombytes("I;16", eight.size, bytes(byte for level in eight.tobytes() for byte in (level, level)))
    for image in (sixteen, eight.convert("RGBA")):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert drawing._open(file.getvalue()).tobytes() == eight.convert("RGB").tobytes()
    with pytest.raises(Refused, match="must be a readable PNG, JPEG, WEBP file"):
        drawing._open(file.getvalue()[:100])
    with pytest.raises(Refused, match="file, got no picture of these$"):
        drawing._open(b"GIF89a")


@pytest.mark.parametrize("text", ["", "\n", "no memory\nat all"])
def test_an_error_without_words_fails_the_order_not_the_worker(text):
    from nitrofusion.serve.drawing import EngineDrawer

    class Short(EngineDrawer):
        def __init__(self):  # no model
            pass

        def _generate(self, orders):
            raise MemoryError(text)

    (result,) = Short().draw([Order("a")])
    assert isinstance(result, Failed) and str(result).startswith("MemoryError")
    assert "\n" not in str(result)


def test_a_worker_looked_at_while_it_is_put_away_is_dead():
    worker, seen = Worker(FakeDrawer), []

    class Process:  # as multiprocessing's: nothing may be asked of one that is closed
        closed = False

        def is_alive(self):
            if self.closed:
                raise ValueError("process object is closed")
            return True

        def close(self):
            self.closed = True
            seen.append(worker.alive)  # the event loop looks in at this moment

        def kill(self):
            pass

        join = kill

    worker._process, worker._pipe = Process(), open(os.devnull)
    worker._kill()
    assert seen == [False]


@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), OSError(5, "disk"), KeyError("x"), RuntimeError("shape")])
def test_whatever_a_library_raises_one_order_fails_and_is_logged(error, caplog):
    from nitrofusion.serve.drawing import EngineDrawer

    class One(EngineDrawer):
        def __init__(self):  # no model
            pass

        def _generate(self, orders):
            if any(order.prompt == "bad" for order in orders):
                raise error
            return [order.prompt for order in orders]

    first, failed, last = One().draw([Order("a"), Order("bad"), Order("b")])
    assert (first, last) == ("a", "b")
    assert isinstance(failed, Failed) and str(failed).startswith(type(error).__name__) and "\n" not in str(failed)
    assert [record.exc_info[1] for record in caplog.records] == [error]


def test_a_device_that_is_lost_ends_the_worker():
    from nitrofusion.serve.drawing import EngineDrawer

    class Lost(EngineDrawer):
        def __init__(self):  # no model
            pass

        def _generate(self, orders):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Lost().draw([Order("a")])


class Context:
    """Stands in for multiprocessing's: ``during`` happens while a process, which then loads for ever, is started."""

    def __init__(self, during):
        self.during, self.process = during, None

    def Pipe(self):  # noqa: N802
        return multiprocessing.Pipe()

    def Process(self, **options):  # noqa: N802
        self.process = Starting(self.during)
        return self.process


class Starting:
    def __init__(self, during):
        self.during = during
        self.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)

    def start(self):
        self.during()
        self.process.start()
        self.number = self.process.pid

    def __getattr__(self, name):
        return getattr(self.process, name)


def test_a_stop_while_a_process_is_being_started_leaves_none():
    async def run():
        worker = Worker(FakeDrawer)
        loop = asyncio.get_running_loop()
        stops = []

        def stop():  # in the worker's thread; the loop has begun to stop before the process is there
            stops.append(asyncio.run_coroutine_threadsafe(worker.stop(), loop))
            time.sleep(0.2)

        worker._context = Context(stop)
        with pytest.raises(ServeError, match="stopped"):
            await asyncio.wait_for(worker.start(), 5)
        await asyncio.wait_for(asyncio.wrap_future(stops[0]), 5)
        await worker.stop()  # again: nothing
        with pytest.raises(ProcessLookupError):
            os.kill(worker._context.process.number, 0)
        assert not worker.alive

    asyncio.run(run())


def test_a_process_that_cannot_be_started_is_one_line():
    def none():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    async def run():
        worker = Worker(FakeDrawer)
        worker._context = Context(none)
        with pytest.raises(ServeError, match="the worker must start, got BlockingIOError"):
            await worker.start()
        await worker.stop()

    asyncio.run(run())


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="needs real-time signals")
def test_a_real_time_signal_has_no_name_and_is_told_by_its_number():
    async def run():
        worker = Worker(FakeDrawer)
        await worker.start()
        os.kill(worker.pid, signal.SIGRTMIN + 3)
        (failed,) = await worker.draw([Order("a")])
        assert isinstance(failed, Failed) and f"died of signal {signal.SIGRTMIN + 3}" in str(failed)
        await worker.stop()

    asyncio.run(run())
