"""The page's settings: what the history, a PNG and another model's server set them to, and what is text."""

import io

import pytest
from PIL import Image

from nitrofusion.engine.png import encode_png
from nitrofusion.serve.orders import Info

from .fake import INFO, running, wait
from .test_page import CHROMIUM, browser, drop, newest, opened, page, playwright, seen, server  # noqa: F401  fixtures
from .test_page_waits import drawing  # noqa: F401

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`chromium` on the PATH)")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def entries(page):  # noqa: F811
    return page.locator("#strip button").evaluate_all("all => all.map(one => one.title)")


def test_pictures_of_other_steps_are_other_entries_and_return_as_they_were(page):  # noqa: F811
    page.uncheck("#refine")
    page.fill("#prompt", "abc")
    page.wait_for_selector("#strip li:nth-child(1)")
    page.check("#steps input[value='2']", force=True)
    page.wait_for_selector("#strip li:nth-child(2)")
    assert entries(page) == ["abc, seed 0, 2 steps", "abc, seed 0, 1 step"]
    page.check("#refine")
    page.wait_for_selector("#strip li:nth-child(3) >> nth=0")
    newest(page, int(page.get_attribute("body", "data-seq")), 4)
    page.click("#strip li:nth-child(3) button")
    assert not page.is_checked("#refine") and page.is_checked("#steps input[value='1']")
    assert wait(lambda: seen(page)[1] == 60)
    page.wait_for_timeout(900)
    assert seen(page)[1] == 60 and entries(page)[1:] == ["abc, seed 0, 2 steps", "abc, seed 0, 1 step"]


def test_comparing_keeps_the_steps_that_were_chosen(page):  # noqa: F811
    page.check("#steps input[value='3']", force=True)
    page.fill("#prompt", "abc")
    page.wait_for_selector("#strip li")
    page.click("#compare")
    page.wait_for_timeout(900)
    page.click("#strip li:nth-child(1) button")
    assert page.is_checked("#steps input[value='3']")


def test_another_models_server_has_its_own_steps_and_examples(browser):  # noqa: F811
    values = {**vars(INFO), "model": "other", "steps": (1,), "examples": ("another example",)}
    with running() as first:
        port = first.port
        page = (keeper := opened(browser, first, quiet=False)).__enter__()  # noqa: F811
        page.wait_for_selector("#examples button:has-text('an example')")
        page.check("#steps input[value='3']", force=True)
        page.fill("#prompt", "abc")
        page.wait_for_selector("#strip li")
        page.click("#compare")
    with running(port=port, info=Info(**values)):
        page.wait_for_selector("#model:has-text('other')", timeout=15_000)
        assert page.is_hidden("#split"), "there is nothing to compare"
        page.locator("h1").click()
        page.keyboard.press("c")
        assert page.is_hidden("#split")
        page.wait_for_selector("#strip li:nth-child(2)")  # the other model's picture is another one
        page.click("#strip li:nth-child(2) button")
        assert page.is_checked("#steps input[value='1']")
        page.fill("#prompt", "")
        assert page.locator("#examples button").all_inner_texts() == ["another example"]
        keeper.__exit__(None, None, None)


def test_what_is_transparent_does_not_show_the_image_before(page, drawing):  # noqa: F811
    orders, _ = drawing
    page.fill("#prompt", "abc")
    drop(page, png(Image.new("RGB", (50, 50), "red")))
    assert wait(lambda: orders and orders[-1].image)
    first = orders[-1].image
    drop(page, png(Image.new("RGBA", (50, 50))))
    assert wait(lambda: orders[-1].image != first)
    assert Image.open(io.BytesIO(orders[-1].image)).convert("RGBA").getextrema()[3] == (0, 0)
    thumb = "() => [...document.getElementById('thumb').getContext('2d').getImageData(48, 48, 1, 1).data]"
    assert page.evaluate(thumb) == [0, 0, 0, 0]


def test_settings_of_a_picture_without_an_image_are_drawn_without_one(page, drawing):  # noqa: F811
    orders, _ = drawing
    page.fill("#prompt", "abc")
    drop(page, png(Image.new("RGB", (32, 32), "red")))
    assert wait(lambda: orders and orders[-1].image)
    drop(page, encode_png(Image.new("RGB", (8, 8)), {"prompt": "from words", "seed": 3}))
    page.click("#loaded-apply")
    assert wait(lambda: orders[-1].prompt == "from words")
    assert orders[-1].image is None and page.is_hidden("#thumb")


def test_settings_are_loaded_as_they_are_or_noted(page, drawing):  # noqa: F811
    orders, _ = drawing
    page.fill("#prompt", "abc")
    drop(page, png(Image.new("RGB", (32, 32), "red")))
    assert wait(lambda: orders and orders[-1].image)
    drop(page, encode_png(Image.new("RGB", (8, 8)), {"prompt": "a", "seed": 3, "image": "digest", "strength": 0.62}))
    page.click("#loaded-apply")
    assert wait(lambda: orders[-1].prompt == "a")
    assert orders[-1].strength == 0.62
    odd = {"prompt": "a######", "seed": -3, "image": "digest", "strength": 0.01}
    drop(page, encode_png(Image.new("RGB", (8, 8)), odd).replace(b"######", rb"\ud83d"))
    page.wait_for_selector("#loaded[open]")
    note = page.inner_text("#loaded-note")
    assert "its seed is no whole number" in note and "its strength is not from 0.05 to 1" in note
    page.click("#loaded-apply")
    assert wait(lambda: orders[-1].prompt == "a\ufffd"), "half a character cannot be sent"


@pytest.mark.parametrize("text", [b'{"x": 1{', b'{"\xff": 1}'])
def test_settings_that_cannot_be_read_are_called_damaged(page, text):  # noqa: F811
    drop(page, encode_png(Image.new("RGB", (8, 8)), {"x": 1}).replace(b'{"x": 1}', text), "old.png")
    page.wait_for_selector("#alert:text-is('old.png: its settings are damaged')")


def test_text_that_is_dropped_or_pasted_is_the_fields(page, drawing):  # noqa: F811
    orders, _ = drawing
    prevented = page.evaluate("""() => ["dragover", "drop"].map((type) => {
        const dataTransfer = new DataTransfer();
        dataTransfer.setData("text/plain", "words");
        const event = new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true});
        document.getElementById("prompt").dispatchEvent(event);
        return event.defaultPrevented;
    })""")
    assert prevented == [False, False] and page.is_hidden("#drop")
    page.fill("#prompt", "abc")
    paste = """([id, bytes]) => {
        const clipboardData = new DataTransfer();  // as word processors fill it
        clipboardData.setData("text/plain", "words");
        clipboardData.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
        document.getElementById(id).dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
    }"""
    picture = list(png(Image.new("RGB", (8, 8))))
    page.evaluate(paste, ["prompt", picture])
    page.wait_for_timeout(300)
    assert page.is_hidden("#thumb")
    page.evaluate(paste, ["stage", picture])
    page.wait_for_selector("#thumb:visible")


def test_odd_seeds_are_shown_as_they_are_drawn_with(page, drawing):  # noqa: F811
    orders, _ = drawing
    page.fill("#prompt", "abc")
    for text, seed in (("-5", 0), ("1.5", 1), ("1e5", 100_000), ("99999999999999999999", 2**53 - 1), ("", 0)):
        page.fill("#seed", text)
        page.keyboard.press("Tab")
        assert page.input_value("#seed") == str(seed)
        assert wait(lambda seed=seed: orders[-1].seed == seed)


def test_keys_for_what_is_not_there_do_nothing(page):  # noqa: F811
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("c")
    assert page.is_hidden("#split")
    page.keyboard.press("d")
    page.wait_for_selector("#alert:has-text('no picture yet')")


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("हिन्दी में, एक घर", "हिन्दी-में-एक-घर"),
        ("cafe\u0301 à la carte!", "cafe\u0301-à-la-carte"),
        ("𠮷" * 70, "𠮷" * 60),
        ("🙂", "nitrofusion"),
    ],
)
def test_downloads_have_names_in_any_script(page, prompt, name):  # noqa: F811
    page.fill("#prompt", prompt)
    page.wait_for_selector("body[data-seq]")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == f"{name}.png"


def test_text_runs_in_its_own_direction(page):  # noqa: F811
    direction = "id => getComputedStyle(document.getElementById(id)).direction"
    for text, wanted in (("חתול אדום", "rtl"), ("a red cat", "ltr")):
        page.fill("#prompt", text)
        page.fill("#negative", text)
        assert [page.evaluate(direction, one) for one in ("prompt", "negative")] == [wanted] * 2
    drop(page, encode_png(Image.new("RGB", (8, 8)), {"prompt": "قطة حمراء"}))
    page.wait_for_selector("#loaded[open]")
    assert page.locator("#loaded-rows td").first.evaluate("one => getComputedStyle(one).direction") == "rtl"


def test_pixels_stay_whole_after_zooming(page):  # noqa: F811
    side = "() => document.getElementById('stage').style.getPropertyValue('--pixels')"
    session = page.context.new_cdp_session(page)
    for ratio in (1.25, 2):
        size = {"width": int(1440 / ratio), "height": int(900 / ratio), "deviceScaleFactor": ratio, "mobile": False}
        session.send("Emulation.setDeviceMetricsOverride", size)
        assert wait(lambda ratio=ratio: float(page.evaluate(side).removesuffix("px")) == pytest.approx(32 / ratio))
