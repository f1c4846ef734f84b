"""The WebSocket: newest input first, and nothing a client sends can break it."""

import asyncio
import json
import random
import socket as sockets
import string
import struct
import threading
import time

import pytest
from websockets.exceptions import ConnectionClosed

from nitrofusion.serve.live import Malformed, pack, unpack
from nitrofusion.serve.orders import Drawn

from .fake import FakeDrawer, color, png, running, wait


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


def draw(seq=0, **values):
    return json.dumps({"type": "draw", "seq": seq, "prompt": "a", **values})


def picture(socket, timeout=10):
    message = socket.recv(timeout=timeout)
    return (json.loads(message), b"") if isinstance(message, str) else unpack(message)


def test_messages_pack_and_unpack():
    for _ in range(50):
        header = {"seq": random.randrange(2**53), "text": "".join(random.choices(string.printable + "äλ🙂", k=30))}
        payload = random.randbytes(random.randrange(100))
        assert unpack(pack(header, payload)) == (header, payload)
    for message in (b"", b"\0\0\0", b"\0\0\0\5{}", b"\0\0\0\2[]", b"\0\0\0\2{{", struct.pack(">I", 2**32 - 1) + b"{}"):
        with pytest.raises(Malformed):
            unpack(message)


def test_a_picture_for_an_input_and_refinements_when_idle(server):
    with server.live() as socket:
        socket.send(draw(1, seed=77, num_inference_steps=1, refine=4))
        got = [picture(socket) for _ in range(4)]
        assert [header["steps"] for header, _ in got] == [1, 2, 3, 4]
        assert all(header["seq"] == 1 and color(data)[:2] == (77, 60 * header["steps"]) for header, data in got)
        socket.send(draw(2, save=True, num_inference_steps=3))
        header, data = picture(socket)
        assert header["type"] == "saved" and header["seq"] == 2 and color(data)[1] == 180
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.5)


def test_dragging_a_slider_ends_with_its_last_value():
    with running(0.03) as server, server.live() as socket:
        got = []

        def read():
            while not got or got[-1][0]["seq"] < 59:
                got.append(picture(socket))

        reader = threading.Thread(target=read)
        reader.start()
        for seq in range(60):
            socket.send(draw(seq, seed=seq))
            time.sleep(1 / 120)
        reader.join(10)
        seqs = [header["seq"] for header, _ in got]
        assert seqs == sorted(set(seqs)) and seqs[-1] == 59
        assert all(color(data)[0] == header["seq"] for header, data in got)
        assert got[-1][0]["dropped"] == 60 - len(seqs)


def test_four_users_share_and_idle_ones_cost_nothing():
    with running(0.01) as server:
        idle = [server.live() for _ in range(4)]
        server.service.scheduler.max_batch = 1
        counts, end = [0] * 4, time.monotonic() + 1.5

        def user(i):
            with server.live() as socket:
                for seq in range(10_000):
                    if time.monotonic() > end:
                        return
                    socket.send(draw(seq))
                    picture(socket)
                    counts[i] += 1

        threads = [threading.Thread(target=user, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = server.drawn()
        assert before == sum(counts), "nothing was drawn for those who asked for nothing"
        assert all(0.15 <= count / sum(counts) <= 0.35 for count in counts), counts
        for socket in idle:
            socket.close()
        assert wait(lambda: server.service.scheduler.sessions == 0)


def test_images_stay_the_sessions(server):
    with server.live() as socket:
        socket.send(draw(1, image=True))
        assert "image must be sent before it is used" in picture(socket)[0]["message"]
        header = json.loads(draw(2, image=True, strength=0.5))
        socket.send(pack(header, b"picture"))
        assert picture(socket)[0]["seq"] == 2
        socket.send(draw(3, image=True))
        assert picture(socket)[0]["seq"] == 3
        socket.send(pack({"type": "image"}, b"x" * (4 * 1024 * 1024 + 1)))
        assert "image must be at most" in picture(socket)[0]["message"]


def test_errors_of_the_model_are_told_and_the_session_goes_on(server):
    with server.live() as socket:
        for prompt, words in (("refuse", "prompt must be another"), ("fail", "did not work"), ("die", "SIGKILL")):
            socket.send(draw(5, prompt=prompt, refine=4))
            error, _ = picture(socket)
            assert error["type"] == "error" and error["seq"] == 5 and words in error["message"]
        socket.send(draw(6))
        assert picture(socket)[0]["seq"] == 6


def malformed() -> str | bytes:
    """A random message that is not quite right."""
    kind = random.randrange(8)
    if kind == 0:
        return random.randbytes(random.randrange(200))
    if kind == 1:
        return struct.pack(">I", random.randrange(2**32)) + random.randbytes(50)
    if kind == 2:
        return "".join(random.choices(string.printable + "\0\ufffd🙂", k=random.randrange(300)))
    if kind == 3:
        return random.choice(
            ["", "null", "[]", "1e999", "NaN", '"', "{" * 5000, "[" * 60_000, "9" * 5000, '{"type":"draw"}']
        )
    values = {
        "type": "draw",
        "seq": 1,
        "prompt": "a",
        "seed": 1,
        "num_inference_steps": 1,
        "refine": 4,
        "strength": 0.5,
    }
    name = random.choice([*values, "image", "save", "negative_prompt", "path", "url", "__proto__"])
    odd = [
        None,
        -1,
        2**60,
        2**200,
        1.5,
        "",
        "\ud800",
        "x" * 6000,
        [],
        {},
        True,
        [[[[]]]],
        "../../etc/passwd",
        float("nan"),
        float("inf"),
    ]
    values[name] = random.choice(odd)
    text = json.dumps(values)
    if kind == 4:
        return text[: random.randrange(len(text))]
    if kind == 5:
        return pack(values, random.randbytes(20))
    return text


def test_malformed_messages_are_answered_and_harm_nobody(server, caplog):
    with server.live() as socket:
        for i in range(250):
            socket.send(malformed())
            if i % 10 == 0:
                seq = 2**50 + i
                socket.send(draw(seq))
                while True:  # errors and odd messages that were fine after all come before
                    header, _ = picture(socket)
                    if header.get("seq") == seq:
                        assert header["type"] == "picture"
                        break
    assert not [r for r in caplog.records if r.exc_info], "no unhandled error"
    assert server.service.worker.alive


def test_messages_too_large_close_the_connection(server):
    with server.live() as socket:
        socket.send(json.dumps({"type": "draw", "seq": 1, "prompt": "x" * 70_000}))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
        assert closed.value.rcvd.code == 1009
    with server.live() as socket:
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(3):
                socket.send(b"\0" * (5 * 1024 * 1024))
                socket.recv(timeout=5)
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def test_sessions_are_bounded(server):
    sockets = [server.live() for _ in range(64)]
    with pytest.raises(ConnectionClosed) as closed:
        server.live()
    assert closed.value.rcvd.code == 1013
    for socket in sockets:
        socket.close()
    assert wait(lambda: server.service.scheduler.sessions == 0)
    with server.live() as socket:
        socket.send(draw(1))
        assert picture(socket)[0]["seq"] == 1


def test_a_client_that_vanishes_leaves_nothing(server):
    for _ in range(30):
        socket = server.live()
        socket.send(draw(1, refine=4))
        socket.socket.close()
    scheduler = server.service.scheduler
    assert wait(lambda: scheduler.sessions == 0 and not scheduler.drawing), "what was begun may end"
    drawn = server.drawn()
    time.sleep(0.6)
    assert server.drawn() == drawn, "no refinement for who is gone"


def test_fake_pictures_are_what_the_tests_take_them_for():
    from nitrofusion.serve.orders import Order

    assert color(png(Order("a", seed=300, num_inference_steps=2), 3)) == (44, 120, 3)


def test_clients_that_leave_before_the_greeting_hold_no_session():
    from starlette.websockets import WebSocketDisconnect

    from nitrofusion.serve.live import Session
    from nitrofusion.serve.service import Service

    from .fake import INFO

    class Gone:
        async def send_text(self, text):
            raise WebSocketDisconnect(1006)

    async def run():
        service = Service(FakeDrawer)
        service.worker.info = INFO
        await Session(Gone(), service).run()
        assert service.scheduler.sessions == 0

    asyncio.run(run())


def narrow(server):
    """A connection whose client has next to no buffer of its own."""
    socket = sockets.socket()
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    socket.connect(("127.0.0.1", server.port))
    return socket


def raw(server):
    """A WebSocket's bare connection, accepted."""
    socket = narrow(server)
    lines = [
        "GET /live HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
    ]  # fmt: skip
    socket.sendall("\r\n".join([*lines, "", ""]).encode())
    assert socket.recv(12).endswith(b"101")
    return socket


def frame(opcode: int, payload: bytes) -> bytes:
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


def test_text_that_is_no_utf8_closes_the_connection_without_a_traceback(server, caplog):
    with raw(server) as socket:
        socket.sendall(frame(1, b"\xff\xfe"))
        data = b""
        while more := socket.recv(4096):
            data += more
    assert data.endswith(struct.pack(">BBH", 0x88, 2, 1007))
    assert not [record for record in caplog.records if record.exc_info]


def test_pings_of_a_client_that_does_not_read_are_not_hoarded(server):
    with raw(server) as socket:
        (connection,) = [one for one in server.server.server_state.connections if hasattr(one, "writable")]
        connection.transport.get_extra_info("socket").setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4096)
        socket.sendall(frame(9, b"p" * 125) * 20_000)
        assert not wait(lambda: connection.transport.get_write_buffer_size() > 500_000, 1)


class Large(FakeDrawer):
    """Its pictures do not fit a connection's buffers."""

    def _one(self, order, batch):
        return Drawn(bytes(300_000), "image/jpeg", 32, 32, 1, self.seconds)


def test_a_slow_connection_gets_fewer_pictures_not_older_ones():
    with running(make=Large) as server, narrow(server) as sock, server.live(sock=sock, max_queue=1) as socket:
        for seq in range(100):
            socket.send(draw(seq))
            time.sleep(0.01)
        time.sleep(0.2)
        assert server.drawn() < 8, "what is drawn for one who does not read is old when it is read"
        sock.shutdown(sockets.SHUT_RDWR)  # no closing handshake with what is still to be read before it


def test_pictures_are_not_compressed_once_more(server):
    with server.live() as socket:
        assert socket.protocol.extensions == []


def test_messages_that_come_together_leave_others_their_turn():
    from nitrofusion.serve.live import Session
    from nitrofusion.serve.service import Service

    from .fake import INFO

    class Crowd:
        left = 1000

        async def send_text(self, text):
            pass

        async def receive(self):
            self.left -= 1
            return {"type": "websocket.receive", "text": "x"} if self.left else {"type": "websocket.disconnect"}

    async def run():
        service, turns = Service(FakeDrawer), 0
        service.worker.info = INFO
        session = asyncio.create_task(Session(Crowd(), service).run())
        while not session.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(run()) >= 1000
