"""The page on small and low screens, and in colours that the system forces: nothing sticks out, covers or vanishes."""

import pytest
from PIL import Image

from nitrofusion.engine.png import encode_png

from .test_page import CHROMIUM, browser, drop, newest, playwright, server  # noqa: F401  fixtures among them

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`chromium` on the PATH)")

BOXES = """() => Object.fromEntries(["under", "caption", "compare", "save", "panel", "prompt", "remove"].map((id) => {
  const {left, top, right, bottom} = document.getElementById(id).getBoundingClientRect();
  return [id, {left, top, right, bottom}];
}))"""
COVERED = """() => {
  const one = document.activeElement, {left, top, right, bottom} = one.getBoundingClientRect();
  const seen = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
  return one === document.body || one.contains(seen) || seen?.closest("label")?.contains(one) ? null : one.outerHTML;
}"""


@pytest.fixture
def sized(browser, server):  # noqa: F811
    """A page of a size in which a picture was drawn."""
    contexts = []

    def make(width, height, **how):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **how))
        page = contexts[-1].new_page()
        page.goto(server.url)
        page.wait_for_selector("#steps input", state="attached")
        page.fill("#prompt", "an extremely detailed oil painting of a lighthouse " * 40)
        newest(page, 1)
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width, height", [(320, 568), (360, 740), (768, 1024), (844, 390), (900, 500), (1400, 900)])
def test_nothing_sticks_out_or_overlaps(sized, width, height):
    page = sized(width, height)
    drop(page, encode_png(Image.new("RGB", (8, 8))))
    page.wait_for_selector("#remove:visible")
    page.click("#compare")
    page.evaluate("() => { document.getElementById('caption').textContent = '4 steps · 12345.6 ms' }")  # a slow model
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(BOXES)
    assert boxes["save"]["right"] <= boxes["under"]["right"] + 1 <= width
    assert boxes["remove"]["right"] <= boxes["panel"]["right"] + 1
    assert boxes["prompt"]["right"] <= boxes["panel"]["right"] + 1 <= width
    beside = boxes["save"]["right"] <= boxes["panel"]["left"]
    assert beside or boxes["save"]["bottom"] <= boxes["panel"]["top"], "buttons under the picture cover no controls"


def test_the_picture_that_stays_on_a_phone_covers_nothing_that_has_the_focus(sized):
    page = sized(360, 740)
    page.focus("#camera")
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(COVERED) is None


def test_switches_are_seen_in_forced_colours(sized):
    page = sized(900, 700, forced_colors="active")
    looks = []
    for _ in range(2):
        looks.append(page.locator(".switch").first.screenshot())
        page.click("#refine")
        page.wait_for_timeout(200)  # the switch slides
    assert looks[0] != looks[1]
    pips = "() => [...document.querySelectorAll('#pips li')].map((pip) => getComputedStyle(pip).backgroundColor)"
    assert len({*page.evaluate(pips), page.evaluate("() => getComputedStyle(document.body).backgroundColor")}) > 1
