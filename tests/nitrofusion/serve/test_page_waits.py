"""The page while something is on its way: permission for the webcam, a picture that fails, a download."""

import asyncio
import io

import pytest
from PIL import Image

from nitrofusion.serve.orders import Refused

from .fake import wait
from .test_page import CHROMIUM, browser, drop, newest, page, playwright, server  # noqa: F401  fixtures among them

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`chromium` on the PATH)")

SLOW_PERMISSION = """() => {
  const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
  window.given = [];
  media.getUserMedia = async (wanted) => {
    await new Promise((done) => setTimeout(done, 300));
    given.push(await real(wanted));
    return given.at(-1);
  };
}"""
LIVE = "() => [given.length, given.filter((m) => m.getTracks().some((t) => t.readyState === 'live')).length]"


@pytest.fixture
def drawing(server):  # noqa: F811
    """The orders that were drawn, and a list of what to do instead of drawing the next ones."""
    orders, instead, draw = [], [], server.service.scheduler._draw

    async def spy(batch):
        orders.extend(batch)
        return await (instead.pop(0)(draw, batch) if instead else draw(batch))

    server.service.scheduler._draw = spy
    yield orders, instead
    server.service.scheduler._draw = draw


def test_the_camera_is_off_when_it_was_switched_off_before_it_was_allowed(page):  # noqa: F811
    page.evaluate(SLOW_PERMISSION)
    page.click("#camera")
    page.click("#camera")
    assert wait(lambda: page.evaluate(LIVE) == [2, 1]), "the second is the one that is shown"
    page.click("#camera")
    assert page.evaluate(LIVE) == [2, 0]
    page.click("#camera")
    file = io.BytesIO()
    Image.effect_noise((32, 32), 90).convert("RGB").save(file, "JPEG")
    drop(page, file.getvalue(), "photo.jpg", "image/jpeg")
    assert wait(lambda: page.evaluate(LIVE) == [3, 0]), "a file took its place"
    assert page.get_attribute("#camera", "aria-pressed") == "false"


def test_a_picture_that_fails_does_not_end_the_webcam(page, drawing):  # noqa: F811
    orders, instead = drawing

    async def refuse(draw, batch):
        return [Refused("generate: not this one")] * len(batch)

    page.fill("#prompt", "abc")
    newest(page, 1)
    page.click("#camera")
    assert wait(lambda: len(orders) > 6 and orders[-1].image)
    instead += [refuse] * 3  # as many as may be on their way
    page.wait_for_selector("#alert:has-text('not this one')")
    page.wait_for_timeout(1500)
    count = len(orders)
    assert wait(lambda: len(orders) > count + 4)


def test_a_download_is_named_after_its_own_prompt(page, drawing):  # noqa: F811
    _, instead = drawing

    async def late(draw, batch):
        await asyncio.sleep(0.5)
        return await draw(batch)

    page.fill("#prompt", "abc")
    newest(page, 1)
    instead.append(late)
    with page.expect_download() as download:
        page.click("#save")
        page.fill("#prompt", "another one")
    assert download.value.suggested_filename == "abc.png"
