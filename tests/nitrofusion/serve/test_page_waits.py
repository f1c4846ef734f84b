"""The page while something is on its way: permission for the webcam, a picture that fails, a download."""

import asyncio
import io

import pytest
from PIL import Image

from nitrofusion.serve import live
from nitrofusion.serve.orders import Refused

from .fake import running, wait
from .test_page import CHROMIUM, browser, drop, newest, opened, page, playwright, server  # noqa: F401  fixtures among them

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
    page.wait_for_selector("#camera[aria-pressed=true]")
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


def test_the_bar_of_waiting_ends_with_an_error(page):  # noqa: F811
    page.fill("#prompt", "refuse")
    page.wait_for_selector("#alert:has-text('prompt must be another')")
    page.wait_for_timeout(400)
    assert page.is_hidden("#wait"), "no picture comes"


SLOW_ENCODING = """() => {
  const encode = HTMLCanvasElement.prototype.toBlob;
  window.encoding = 0;
  HTMLCanvasElement.prototype.toBlob = function (done, ...how) {
    window.encoding += 1;
    setTimeout(() => encode.call(this, done, ...how), 200);
  };
}"""


def test_a_frame_on_its_way_does_not_bring_back_a_webcam_that_was_removed(page):  # noqa: F811
    page.evaluate(SLOW_ENCODING)
    page.click("#camera")
    page.wait_for_selector("#thumb:visible")
    page.fill("#prompt", "abc")
    count = page.evaluate("encoding")
    page.wait_for_function("count => window.encoding > count", arg=count)
    page.click("#remove")
    page.wait_for_timeout(400)
    assert page.is_hidden("#thumb")


def test_a_webcam_that_is_unplugged_is_off(page):  # noqa: F811
    page.evaluate(SLOW_PERMISSION)
    page.fill("#prompt", "abc")
    page.click("#camera")
    page.wait_for_selector("#camera[aria-pressed=true]")
    page.evaluate("() => given[0].getTracks()[0].dispatchEvent(new Event('ended'))")
    page.wait_for_selector("#alert:has-text('unplugged')")
    assert page.get_attribute("#camera", "aria-pressed") == "false"
    page.wait_for_selector("body[data-steps='4']")  # refined like any other image


SLOW_DECODING = """() => {
  const decode = window.createImageBitmap, waits = [400];
  window.createImageBitmap = async (blob) => {
    if (!blob.type) await new Promise((done) => setTimeout(done, waits.shift() ?? 0));
    return decode(blob);
  };
}"""


def test_history_draws_what_it_shows_and_the_newest_choice_counts(page, drawing):  # noqa: F811
    orders, _ = drawing
    file = io.BytesIO()
    Image.effect_noise((32, 32), 90).convert("RGB").save(file, "PNG")
    page.fill("#prompt", "first")
    drop(page, file.getvalue())
    page.wait_for_selector("#strip li")
    page.click("#remove")
    page.fill("#prompt", "second")
    page.wait_for_selector("#strip li:nth-child(2)")
    page.wait_for_timeout(300)
    orders.clear()
    page.click("#strip li:nth-child(2) button")
    assert wait(lambda: orders)
    page.wait_for_selector("#thumb:visible")
    page.wait_for_timeout(200)
    assert {(order.prompt, order.image) for order in orders} == {("first", file.getvalue())}

    page.evaluate(SLOW_DECODING)  # of what is not on its way to the screen
    page.click("#strip li:nth-child(2) button")
    page.click("#strip li:nth-child(1) button")
    page.wait_for_timeout(600)
    assert page.input_value("#prompt") == "second" and page.is_hidden("#thumb")
    assert orders[-1].image is None


def test_a_server_away_is_told_once_and_then_that_it_is_back(browser):  # noqa: F811
    with running() as first:
        port = first.port
        page = (keeper := opened(browser, first, quiet=False)).__enter__()  # noqa: F811
        page.evaluate("""() => {
            const node = document.getElementById("status");
            window.told = [];
            new MutationObserver(() => told.push(node.textContent)).observe(node, {childList: true});
        }""")
    page.wait_for_selector("#model.off")
    page.wait_for_timeout(1500)
    assert page.evaluate("told") == ["The server is away, reconnecting"]
    with running(port=port):
        page.wait_for_selector("#model:not(.off)")
        assert page.evaluate("told").count("Connected") == 1
        keeper.__exit__(None, None, None)


def test_a_page_without_the_token_says_so_and_takes_it_from_the_address(browser):  # noqa: F811
    token = "t" * 24
    with running(host="0.0.0.0", token=token) as server:  # noqa: F811
        context = browser.new_context()
        page = context.new_page()  # noqa: F811
        page.goto(f"{server.url}/#token=not%20this")
        page.wait_for_selector("#model:has-text('token needed')")
        assert "open the address that it printed" in page.inner_text("#notice")
        page.evaluate("token => { location.hash = `#token=${token}` }", token)
        page.wait_for_selector("#model:not(.off)")
        assert "#" not in page.url and "token" not in page.inner_text("#notice")
        context.close()


def test_a_full_server_is_called_full(browser, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(live, "MAX_SESSIONS", 0)
    context = browser.new_context()
    page = context.new_page()  # noqa: F811
    page.goto(server.url)
    page.wait_for_selector("#model:has-text('server full')")
    monkeypatch.undo()
    page.wait_for_selector("#model:not(.off)")
    context.close()
