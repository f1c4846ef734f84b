"""Who draws next, in virtual seconds: no HTTP, no process, no model."""

import asyncio
import random

import pytest

from nitrofusion.serve.orders import Drawn, Failed, Order, Refused
from nitrofusion.serve.scheduler import Busy, Closed, Scheduler


class Model:
    """Draws for the scheduler; every batch waits for ``step`` when ``manual``."""

    def __init__(self, manual: bool = False, seconds: float = 0.0):
        self.batches, self.manual, self.seconds = [], manual, seconds
        self._gate = asyncio.Semaphore(0)

    async def draw(self, orders):
        self.batches.append(orders)
        if self.manual:
            await self._gate.acquire()
        await asyncio.sleep(self.seconds)
        kinds = {"refuse": Refused("no"), "fail": Failed("broken")}
        return [
            kinds.get(o.prompt) or Drawn(o.prompt.encode(), "", 1, 1, o.num_inference_steps or 1, 0) for o in orders
        ]

    async def step(self, count: int = 1):
        for _ in range(count):
            self._gate.release()
            await settle()

    @property
    def prompts(self):
        return [[order.prompt for order in batch] for batch in self.batches]


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def scheduled(test):
    """Runs an async test with ``(scheduler, model)``; whatever it leaves waiting is finished after it."""

    def decorate(**options):
        async def run():
            model = Model(options.pop("manual", False), options.pop("seconds", 0.0))
            scheduler = Scheduler(model.draw, **options)
            scheduler.start()
            await test(scheduler, model)
            model.manual = False
            for _ in range(100):
                model._gate.release()
            await asyncio.wait_for(scheduler.close(), 5)

        asyncio.run(run())

    return decorate


def live(scheduler, got):
    """A live user whose connection takes every picture at once."""

    def deliver(tag, result):
        got.append((tag, result))
        asyncio.get_running_loop().call_soon(share.sent)

    share = scheduler.join(deliver)
    return share


def test_the_newest_input_wins_and_the_one_being_drawn_is_shown():
    @scheduled
    async def run(scheduler, model):
        got = []
        share = live(scheduler, got)
        for tag in range(10):
            share.put(tag, [Order(str(tag))])
            await settle()
        await model.step(2)
        assert model.prompts == [["0"], ["9"]]
        assert [tag for tag, _ in got] == [0, 9] and share.dropped == 8
        await model.step(5)
        assert len(model.batches) == 2, "an idle user costs nothing"

    run(manual=True)


def test_refinement_waits_for_idleness_and_is_cancelled_by_input():
    stages = [Order("a", num_inference_steps=steps) for steps in (1, 2, 3, 4)]

    @scheduled
    async def run(scheduler, model):
        got = []
        share = live(scheduler, got)
        share.put(0, stages)
        await asyncio.sleep(0.01)
        assert len(model.batches) == 1, "not before the delay"
        assert len(got) == 1
        await asyncio.sleep(0.2)
        assert [r.num_inference_steps for _, r in got] == [1, 2, 3, 4]
        share.put(1, stages)
        await asyncio.sleep(0.01)
        share.put(2, stages[:1])
        await asyncio.sleep(0.2)
        assert [tag for tag, _ in got] == [0, 0, 0, 0, 1, 2]

    run(idle_delay=0.05)


def test_a_refinement_in_progress_that_was_overtaken_is_not_shown():
    @scheduled
    async def run(scheduler, model):
        got = []
        share = live(scheduler, got)
        share.put(0, [Order("a"), Order("a", num_inference_steps=2), Order("a", num_inference_steps=3)])
        await model.step()
        await asyncio.sleep(0.03)
        assert len(model.batches) == 2, "the second stage is being drawn"
        share.put(1, [Order("b")])
        await model.step(2)
        assert [tag for tag, _ in got] == [0, 1]
        await model.step(3)
        assert len(model.batches) == 3

    run(manual=True, idle_delay=0.01)


def test_requests_and_live_users_come_before_refinements():
    @scheduled
    async def run(scheduler, model):
        share = live(scheduler, [])
        share.put(0, [Order("a"), Order("refined", num_inference_steps=2)])
        await model.step()
        request = asyncio.create_task(scheduler.submit("c", [Order("x"), Order("y")]))
        await asyncio.sleep(0.03)  # the refinement is due by now
        await model.step(4)
        assert [p for batch in model.prompts for p in batch] == ["a", "x", "y", "refined"]
        await request

    run(manual=True, idle_delay=0.01)


def test_a_slow_connection_gets_fewer_pictures_not_older_ones():
    @scheduled
    async def run(scheduler, model):
        got = []
        share = scheduler.join(lambda tag, result: got.append(tag))  # nothing says it was sent
        for tag in range(5):
            share.put(tag, [Order(str(tag))])
            await settle()
        assert got == [0]
        share.sent()
        await settle()
        assert got == [0, 4]

    run()


def test_the_queue_is_bounded_and_says_when_to_come_back():
    @scheduled
    async def run(scheduler, model):
        tasks = [asyncio.create_task(scheduler.submit("c", [Order("0")]))]
        await settle()
        tasks += [asyncio.create_task(scheduler.submit("c", [Order(str(i))])) for i in range(1, 12)]
        await settle()
        done = [t for t in tasks if t.done()]
        assert len(done) == 12 - 1 - 4, "one is being drawn, four wait"
        for task in done:
            assert isinstance(task.exception(), Busy) and task.exception().retry_after >= 1
        with pytest.raises(Busy):
            await scheduler.submit("d", [Order("big")] * 5)
        assert scheduler.queued == 4, "who asks for too much displaces nobody"
        await model.step(5)
        assert sum(t.exception() is None for t in tasks if t.done()) == 5

    run(manual=True, max_queue=4)


def test_one_who_fills_the_queue_makes_room_for_others():
    @scheduled
    async def run(scheduler, model):
        hog = [asyncio.create_task(scheduler.submit("hog", [Order("h0")]))]
        await settle()
        hog += [asyncio.create_task(scheduler.submit("hog", [Order(f"h{i}")])) for i in range(1, 5)]
        await settle()
        guest = asyncio.create_task(scheduler.submit("guest", [Order("g")]))
        await settle()
        assert not guest.done() and scheduler.queued == 4
        assert [t.done() for t in hog] == [False] * 4 + [True], "the newest of the hog's went"
        await model.step(2)
        assert guest.done(), "and the guest did not wait for all of the hog's"

    run(manual=True, max_queue=4)


def test_shares_are_of_seconds_not_of_pictures():
    @scheduled
    async def run(scheduler, model):
        async def draw(orders):
            model.batches.append(orders)
            await asyncio.sleep(0.004 * orders[0].num_inference_steps)
            return [Drawn(b"", "", 1, 1, 1, 0) for _ in orders]

        scheduler._draw = draw
        end = asyncio.get_running_loop().time() + 0.8
        drawn = {1: 0, 4: 0}

        async def client(steps):
            while asyncio.get_running_loop().time() < end:
                await scheduler.submit(str(steps), [Order("a", num_inference_steps=steps)])
                drawn[steps] += 1

        await asyncio.gather(*(client(steps) for steps in (1, 4) for _ in range(3)))
        share = 4 * drawn[4] / (4 * drawn[4] + drawn[1])
        assert 0.35 < share < 0.65, drawn

    run()


def test_all_pictures_of_a_batch_count_for_their_client():
    @scheduled
    async def run(scheduler, model):
        end, drawn = asyncio.get_running_loop().time() + 0.6, {"four": 0, "one": 0}

        async def client(name, orders):
            while asyncio.get_running_loop().time() < end:
                await scheduler.submit(name, orders)
                drawn[name] += 1

        four = [Order("a", seed=seed) for seed in range(4)]
        ones = [[Order("b", num_inference_steps=steps)] for steps in (3, 4)]  # of other shapes: each alone in a batch
        pairs = [("four", four), ("four", four), ("one", ones[0]), ("one", ones[1])]
        await asyncio.gather(*(client(*pair) for pair in pairs))
        assert 0.35 < drawn["four"] / sum(drawn.values()) < 0.65, drawn

    run(seconds=0.004, max_batch=4)


def test_one_of_many_live_users_gets_a_fair_share():
    @scheduled
    async def run(scheduler, model):
        got = [[] for _ in range(6)]
        users = [live(scheduler, list_) for list_ in got]
        for i in range(300):
            for user in users[:4]:  # two are idle
                user.put(i, [Order("a", seed=i)])
            await asyncio.sleep(0.001)
        counts = [len(g) for g in got]
        assert counts[4:] == [0, 0]
        assert all(0.15 <= count / sum(counts) <= 0.35 for count in counts[:4]), counts

    run(seconds=0.002)


def test_requests_of_one_shape_are_drawn_together_and_others_are_not():
    @scheduled
    async def run(scheduler, model):
        steps = [1, 2, 1, 1, 2, 1, 1]
        tasks = [
            asyncio.create_task(scheduler.submit(f"c{i}", [Order(str(i), num_inference_steps=s)]))
            for i, s in enumerate(steps)
        ]
        await settle()
        await model.step(10)
        results = await asyncio.gather(*tasks)
        assert [r[0].data for r in results] == [str(i).encode() for i in range(7)]
        assert sorted(map(len, model.prompts)) == [1, 2, 4]
        for batch in model.batches:
            assert len({order.shape for order in batch}) == 1

    run(manual=True, max_batch=4)


def test_several_pictures_of_one_request_are_one_batch():
    @scheduled
    async def run(scheduler, model):
        drawn = await scheduler.submit("c", [Order(str(i), seed=i) for i in range(6)])
        assert [d.data for d in drawn] == [b"0", b"1", b"2", b"3", b"4", b"5"]
        assert list(map(len, model.batches)) == [4, 2]

    run(max_batch=4)


def test_who_goes_away_is_not_drawn_for():
    @scheduled
    async def run(scheduler, model):
        tasks = [asyncio.create_task(scheduler.submit(f"c{i}", [Order(str(i))])) for i in range(10)]
        await settle()
        keep = random.randrange(1, 10)
        for i, task in enumerate(tasks):
            if i != keep:
                task.cancel()
        await settle()
        await model.step(10)
        assert model.prompts == [["0"], [str(keep)]]
        assert tasks[keep].result()[0].data == str(keep).encode()
        while scheduler._queues:  # who left while drawn for is known until others have had as much
            late = asyncio.create_task(scheduler.submit("late", [Order("late")]))
            await settle()
            await model.step()
            await late

    run(manual=True)


def test_clients_that_are_gone_are_forgotten():
    @scheduled
    async def run(scheduler, model):
        for i in range(300):
            await scheduler.submit(f"c{i}", [Order(str(i))])
            assert len(scheduler._queues) <= 1
        tasks = [asyncio.create_task(scheduler.submit(f"d{i}", [Order(str(i))])) for i in range(100)]
        await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.submit("last", [Order("last")])
        assert len(scheduler._queues) <= 16

    run(seconds=0.0005)


def test_what_fails_fails_alone():
    @scheduled
    async def run(scheduler, model):
        got = []
        share = live(scheduler, got)
        share.put(0, [Order("fail"), Order("fail", num_inference_steps=2)])
        with pytest.raises(Refused):
            await scheduler.submit("c", [Order("fine"), Order("refuse"), Order("fail")])
        (drawn,) = await scheduler.submit("c", [Order("fine")])
        await asyncio.sleep(0.05)
        assert drawn.data == b"fine"
        assert [type(r) for _, r in got] == [Failed], "a picture that failed is not refined"

    run(idle_delay=0.01)


def test_close_finishes_what_waits_and_takes_no_more():
    async def run():
        model = Model(seconds=0.005)
        scheduler = Scheduler(model.draw)
        scheduler.start()
        tasks = [asyncio.create_task(scheduler.submit("c", [Order(str(i))])) for i in range(8)]
        await settle()
        await scheduler.close()
        assert len(await asyncio.gather(*tasks)) == 8
        with pytest.raises(Closed):
            await scheduler.submit("c", [Order("late")])

    asyncio.run(run())


def test_a_thousand_random_inputs_end_with_the_last_one():
    @scheduled
    async def run(scheduler, model):
        got = [[] for _ in range(5)]
        users, last = [live(scheduler, g) for g in got], [None] * 5
        for i in range(1000):
            user = random.randrange(5)
            count = random.choice((1, 1, 4))
            users[user].put(i, [Order(str(i), num_inference_steps=s + 1) for s in range(count)])
            last[user] = (i, count)
            if random.random() < 0.3:
                await asyncio.sleep(random.choice((0, 0, 0.001, 0.004)))
        await asyncio.sleep(0.2)
        for pictures, wanted in zip(got, last, strict=True):
            if wanted is not None:
                tag, result = pictures[-1]
                assert (tag, result.num_inference_steps) == wanted
            tags = [tag for tag, _ in pictures]
            assert tags == sorted(tags), "never back in time"

    run(idle_delay=0.002)
