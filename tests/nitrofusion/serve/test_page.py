"""The page in a real browser: typing, refinement, comparison, history, files, the keyboard, a server that restarts.

Screenshots go to $SCREENSHOTS, or runs/screenshots.
"""

import base64
import functools
import io
import os
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from nitrofusion.engine import load
from nitrofusion.engine.png import encode_png, read_settings
from nitrofusion.serve.app import engine

from .fake import color, running, wait

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`chromium` on the PATH)")

SHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[3] / "runs" / "screenshots"))
SIZES = {"phone": (390, 844), "laptop": (1440, 900), "4k": (3840, 2160)}
PROMPT = "a green ring above a striped yellow square on a pink background"
PIXELS = """id => {
  const canvas = document.getElementById(id), {width, height} = canvas;
  const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
  return [canvas.width, canvas.height, btoa(String.fromCharCode(...data))];
}"""
DROP = """([name, type, text]) => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), files = new DataTransfer();
  files.items.add(new File([bytes], name, {type}));
  document.body.dispatchEvent(new DragEvent("dragover", {dataTransfer: files, bubbles: true, cancelable: true}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
}"""
PASTE = """text => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), files = new DataTransfer();
  files.items.add(new File([bytes], "image.jpg", {type: "image/jpeg"}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as runner:
        one = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield one
        one.close()


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as one:
        yield one


class opened:
    """A page on ``server`` that fails the test if it logs an error, opens a dialog or asks another server."""

    def __init__(self, browser, server, size="laptop", scheme="light", quiet=True):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page, self.server, self.quiet, self.faults = self.context.new_page(), server, quiet, []

    def __enter__(self):
        page, url = self.page, self.server.url
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" and self.quiet else None)
        page.on("request", lambda r: r.url.startswith((url, "blob:")) or self.faults.append(f"request of {r.url}"))
        page.goto(url)
        page.wait_for_selector("#steps input", state="attached")
        return page

    def __exit__(self, *error):
        self.context.close()
        if error[0] is None:
            assert not self.faults, self.faults


def type_prompt(page, text, steps=4):
    before = int(page.get_attribute("body", "data-seq") or 0)
    page.fill("#prompt", "")
    page.type("#prompt", text)
    newest(page, before + len(text), steps)


def newest(page, seq, steps=4):
    """Waits for the picture of input ``seq`` at so many steps."""
    try:
        page.wait_for_selector(f'body[data-seq="{seq}"][data-steps="{steps}"]', timeout=15_000)
    except playwright.TimeoutError:
        got = page.get_attribute("body", "data-seq"), page.get_attribute("body", "data-steps")
        pytest.fail(f"input {seq} must be drawn at {steps} steps, got {got}")


def pixels(page, canvas="last"):
    width, height, text = page.evaluate(PIXELS, canvas)
    return Image.frombytes("RGBA", (width, height), base64.b64decode(text)).convert("RGB")


def seen(page, canvas="last"):
    return pixels(page, canvas).getpixel((5, 5))


def drop(page, data, name="a.png", kind="image/png"):
    page.evaluate(DROP, [name, kind, base64.b64encode(data).decode()])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_world_as_it_is_typed_at_every_size(browser, scheme):
    """What is on the screen at last is what the engine draws; screenshots show the rest."""
    plain = load("world")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with running(make=functools.partial(engine, "world")) as server:
        for size in SIZES:
            with opened(browser, server, size, scheme) as page:
                page.screenshot(path=SHOTS / f"{size}-{scheme}-empty.png")
                type_prompt(page, PROMPT)
                assert pixels(page).tobytes() == plain.generate(PROMPT, num_inference_steps=4)[0].tobytes()
                page.wait_for_selector("#strip button")
                assert re.fullmatch(r"[\d.]+ (ms|s)", page.inner_text("#p50"))
                if size != "phone":
                    page.click("#compare")
                    newest(page, len(PROMPT) + 1)
                    assert pixels(page, "first").tobytes() == plain.generate(PROMPT)[0].tobytes()
                page.screenshot(path=SHOTS / f"{size}-{scheme}.png")
                wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
                assert wide <= 0, "nothing sticks out"


def test_controls_change_the_picture(page, server):
    type_prompt(page, "abc")
    assert seen(page)[:2] == (0, 240)
    page.fill("#seed", "77")
    newest(page, 4)
    assert seen(page)[0] == 77
    page.uncheck("#refine")
    page.check("#steps input[value='2']", force=True)
    newest(page, 6, 2)
    assert seen(page)[:2] == (77, 120)
    page.click("#shuffle")
    newest(page, 7, 2)
    seed = int(page.input_value("#seed"))
    assert seed != 77 and seen(page)[0] == seed % 256
    page.click("#lock")
    page.type("#prompt", "d")
    newest(page, 8, 2)
    assert int(page.input_value("#seed")) != seed, "unlocked: another seed with every input"


def test_keystrokes_cancel_refinement(browser):
    with running(0.7) as server, opened(browser, server) as page:
        page.type("#prompt", "ab")
        newest(page, 2, 2)
        page.type("#prompt", "c")  # while the third stage is drawn
        newest(page, 3, 4)
        assert server.drawn() <= 1 + 3 + 4, "the fourth stage of `ab` is never drawn"


def test_a_stage_decoded_late_does_not_take_back_its_refinement(page):
    """The browser decodes side by side: here the fewer steps, the later."""
    page.evaluate("""() => {
        const decode = window.createImageBitmap, waits = [900, 600, 300, 0];  // of 1, 2, 3 and 4 steps
        window.createImageBitmap = async (blob) => {
            await new Promise((done) => setTimeout(done, waits.shift() ?? 0));
            const bitmap = await decode(blob);
            window.decoded = (window.decoded ?? 0) + 1;
            return bitmap;
        };
    }""")
    page.fill("#prompt", "abc")
    newest(page, 1)
    page.wait_for_function("() => window.decoded === 4")
    page.wait_for_timeout(300)  # for what was decoded last
    newest(page, 1)
    assert page.inner_text("#caption").startswith("4 steps") and seen(page, "last")[1] == 240
    page.wait_for_function("() => document.getElementById('status').textContent.endsWith('4 steps')")


def test_the_slider_compares_few_steps_with_many(page):
    type_prompt(page, "abc")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    newest(page, 4)
    assert seen(page, "first")[1] == 60 and seen(page, "last")[1] == 240
    sides = page.locator("#split .side").all_inner_texts()
    assert sides == ["1 step", "4 steps"]
    before = page.evaluate("() => document.getElementById('frame').style.getPropertyValue('--at')")
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    after = page.evaluate("() => document.getElementById('frame').style.getPropertyValue('--at')")
    assert after == "45%" and before != after
    box = page.locator("#frame").bounding_box()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 50)
    page.mouse.down()
    for i in range(45, 81, 5):
        page.mouse.move(box["x"] + i / 100 * box["width"], box["y"] + 50)
    page.mouse.up()
    at = float(page.evaluate("() => document.getElementById('frame').style.getPropertyValue('--at')").rstrip("%"))
    assert 75 <= at <= 85


def test_history_returns_to_exact_settings(page):
    page.fill("#negative", "nothing")
    page.fill("#seed", "5")
    type_prompt(page, "first")
    page.wait_for_selector("#strip li:nth-child(1)")
    page.fill("#seed", "6")
    page.fill("#negative", "")
    page.fill("#prompt", "second")
    page.wait_for_selector("#strip li:nth-child(2)")
    page.click("#strip li:nth-child(2) button")
    assert [page.input_value(f"#{name}") for name in ("prompt", "negative", "seed")] == ["first", "nothing", "5"]
    assert wait(lambda: seen(page)[0] == 5)
    page.locator("h1").click()
    page.keyboard.press("]")
    assert page.input_value("#prompt") == "second" and page.input_value("#seed") == "6"


def test_download_carries_the_settings_and_a_dropped_png_shows_them_first(browser):
    with running(make=functools.partial(engine, "world")) as server, opened(browser, server) as page:
        page.fill("#seed", "12")
        page.fill("#negative", "a ring")
        page.fill("#prompt", PROMPT)
        page.wait_for_selector('body[data-steps="4"]')
        with page.expect_download() as download:
            page.click("#save")
        data = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename.startswith("a-green-ring-above-a-striped")
        settings = read_settings(io.BytesIO(data))
        wanted = {"prompt": PROMPT, "negative_prompt": "a ring", "seed": 12, "num_inference_steps": 4, "model": "world"}
        assert {name: settings[name] for name in wanted} == wanted
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == pixels(page).tobytes()

        page.fill("#negative", "")
        page.fill("#seed", "1")
        page.fill("#prompt", "a white cross on a navy background")
        page.wait_for_selector('body[data-steps="4"]')
        page.wait_for_timeout(400)
        drawn, seq = server.drawn(), page.get_attribute("body", "data-seq")
        drop(page, data)
        page.wait_for_selector("#loaded[open]")
        assert PROMPT in page.inner_text("#loaded-rows")
        page.screenshot(path=SHOTS / "settings-of-a-png.png")
        page.wait_for_timeout(500)
        assert (server.drawn(), page.get_attribute("body", "data-seq")) == (drawn, seq), "nothing runs by itself"
        page.keyboard.press("Escape")
        assert page.input_value("#seed") == "1"
        drop(page, data)
        page.click("#loaded-apply")
        assert page.input_value("#prompt") == PROMPT and page.input_value("#negative") == "a ring"
        assert wait(lambda: pixels(page).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes())


XSS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "\"><script>alert(1)</script>", "'><img src=x onerror=alert(1)>", "javascript:alert(1)",
    "<iframe src=javascript:alert(1)>", "<body onload=alert(1)>", "<a href=javascript:alert(1)>x</a>",
    "<input autofocus onfocus=alert(1)>", "<details open ontoggle=alert(1)>", "<math><mi xlink:href=data:x,alert(1)>",
    "<object data=javascript:alert(1)>", "<embed src=javascript:alert(1)>",
    "<link rel=stylesheet href=//evil.example>", "<meta http-equiv=refresh content=0;url=//evil.example>", "{{7*7}}",
    "${7*7}", "<%= 7*7 %>", "`${alert(1)}`", "\\u003cscript\\u003ealert(1)", "&lt;script&gt;alert(1)",
    "&#60;script&#62;", "%3Cscript%3E", "<style>*{display:none}</style>", "<style>@import '//evil.example'</style>",
    "</textarea><script>alert(1)</script>", "</title><script>alert(1)</script>", "<!--<script>alert(1)//-->",
    "]]><script>alert(1)</script>", "<x onclick=alert(1)>x", "<base href=//evil.example>",
    "<form action=//evil.example><button>x", "<video><source onerror=alert(1)>", "<marquee onstart=alert(1)>",
    "<template><script>alert(1)</script></template>", "<noscript><p title='</noscript><img src=x>'>", "__proto__",
    "constructor", "\u202e<script>", "\0<script>alert(1)", "<scr\0ipt>", "<ſcript>alert(1)", "＜script＞",
    "-->\"'/><sCrIpT>alert(1)", "\"onmouseover=alert(1)//", "' autofocus onfocus='alert(1)",
    "data:text/html,<script>1</script>", "<img srcset=x onerror=alert(1)>", "<button popovertarget=x>",
    "[click](javascript:alert(1))",
]  # fmt: skip


def test_hostile_text_is_text(page, server):
    assert len(XSS) >= 50
    elements = "() => document.querySelectorAll('*').length"
    page.wait_for_timeout(100)
    page.fill("#prompt", "x")
    page.wait_for_selector("#strip button")
    for i in range(0, len(XSS), 10):
        text = " ".join(XSS[i : i + 10]).replace("\0", "")
        page.fill("#prompt", text)
        wait(lambda text=text: page.locator("#strip button").first.get_attribute("title").startswith(text.strip()[:20]))
        label = page.get_attribute("#last", "aria-label")
        assert label == text.strip()
    images = Image.new("RGB", (8, 8))
    for text in XSS:
        settings = {"prompt": text, "seed": 1, text[:50]: text, "model": text}
        count = page.evaluate(elements)
        drop(page, encode_png(images, settings))
        page.wait_for_selector("#loaded[open]")
        rows = page.locator("#loaded-rows tr").count()
        assert rows == len(settings)
        assert page.evaluate(elements) <= count + 3 * rows
        values = page.locator("#loaded-rows td").all_text_contents()
        assert text in values, text
        page.click("#loaded-cancel")
    drop(page, encode_png(images, {"prompt": "a", "seed": 2**60, "num_inference_steps": 99, "strength": "high"}))
    page.wait_for_selector("#loaded[open]")
    assert "seed is too large" in page.inner_text("#loaded-note") and "1, 2, 3, 4 steps" in page.inner_text(
        "#loaded-note"
    )
    page.click("#loaded-apply")


def test_images_and_the_webcam_are_what_a_picture_starts_from(page, server):
    orders = []
    take = server.service.scheduler._draw

    async def spy(batch):
        orders.extend(batch)
        return await take(batch)

    server.service.scheduler._draw = spy
    try:
        page.fill("#prompt", "abc")
        newest(page, 1)
        file = io.BytesIO()
        Image.effect_noise((80, 50), 90).convert("RGB").save(file, "JPEG")
        drop(page, file.getvalue(), "photo.jpg", "image/jpeg")
        page.wait_for_selector("#thumb:visible")
        assert wait(lambda: orders[-1].image is not None and orders[-1].strength == 0.6)
        assert Image.open(io.BytesIO(orders[-1].image)).size == (32, 32)
        page.fill("#strength", "0.3")
        assert wait(lambda: orders[-1].strength == 0.3 and orders[-1].image is not None)
        assert page.inner_text("#strength-value") == "0.30"
        page.click("#remove")
        assert wait(lambda: orders[-1].image is None)

        page.evaluate(PASTE, base64.b64encode(file.getvalue()).decode())
        page.wait_for_selector("#thumb:visible")
        assert wait(lambda: orders[-1].image is not None)
        page.click("#remove")
        assert wait(lambda: orders[-1].image is None)

        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        page.wait_for_selector("#alert:has-text('cannot be read')")

        page.click("#camera")
        count = len(orders)
        assert wait(lambda: len(orders) > count + 8 and all(order.image for order in orders[-6:]))
        assert len({order.image for order in orders[-6:]}) > 2, "frame after frame"
        assert {order.num_inference_steps for order in orders[-6:]} == {1}, "which are not refined"
        page.click("#camera")
        page.wait_for_timeout(300)
        count = len(orders)
        page.wait_for_timeout(600)
        assert len(orders) <= count + 3, "the webcam is off; what is left is refinement"
    finally:
        server.service.scheduler._draw = take


def test_the_page_survives_a_server_that_restarts(browser):
    with running() as first:
        port = first.port
        page = (keeper := opened(browser, first, quiet=False)).__enter__()
        type_prompt(page, "abc")
    page.wait_for_selector("#model.off")
    assert page.inner_text("#model") == "reconnecting"
    page.type("#prompt", "de")  # typed while it is away
    with running(port=port) as second:
        assert second.token != first.token
        page.wait_for_selector("#model:not(.off)", timeout=15_000)
        assert wait(lambda: page.get_attribute("#last", "aria-label") == "abcde")
        page.type("#prompt", "f")
        assert wait(lambda: page.get_attribute("#last", "aria-label") == "abcdef")
        assert page.input_value("#prompt") == "abcdef"
        keeper.__exit__(None, None, None)


def test_errors_are_announced_and_the_next_picture_comes(page):
    page.fill("#prompt", "refuse")
    page.wait_for_selector("#alert:has-text('prompt must be another')")
    page.fill("#prompt", "fine")
    assert wait(lambda: page.get_attribute("#last", "aria-label") == "fine")


def test_everything_by_keyboard_and_with_a_name(page):
    page.keyboard.press("Escape")
    page.fill("#prompt", "abc")
    newest(page, 1)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
            )
        )
    for name in (
        "help-open",
        "compare",
        "save",
        "prompt",
        "negative",
        "steps",
        "refine",
        "seed",
        "lock",
        "shuffle",
        "choose",
        "camera",
    ):
        assert name in reached, name
    page.keyboard.press("Escape")
    page.locator("h1").click()
    for key, steps in (("3", 3), ("2", 2)):
        page.keyboard.press(key)
        assert page.locator(f"#steps input[value='{steps}']").is_checked()
    seed = page.input_value("#seed")
    page.keyboard.press("s")
    assert page.input_value("#seed") != seed
    page.keyboard.press("l")
    assert page.get_attribute("#lock", "aria-pressed") == "false"
    page.keyboard.press("/")
    page.keyboard.type("c1s")
    assert page.input_value("#prompt") == "abcc1s", "keys are text where text is typed"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    page.uncheck("#keys")
    page.click("#help-close")
    page.locator("h1").click()
    page.keyboard.press("4")
    assert not page.locator("#steps input[value='4']").is_checked()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas[role], [role=img]")]
          .filter(e => !e.hidden && !e.closest("[hidden]") && e.getAttribute("aria-hidden") !== "true")
          .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title)).map(e => e.outerHTML)"""
    )
    assert nameless == []
    page.fill("#prompt", "settled")
    page.wait_for_selector("#status:has-text('Picture of settled')", state="attached")


def test_the_token_of_a_server_beyond_loopback_is_in_its_address(browser):
    token = "t" * 24
    with running(host="0.0.0.0", token=token) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/#token={token}")
        page.wait_for_selector("#steps input", state="attached")
        assert token not in page.url
        page.fill("#prompt", "abc")
        newest(page, 1)
        stranger = browser.new_context().new_page()
        stranger.goto(server.url)
        stranger.wait_for_selector("#model.off")
        context.close()


def luminance(text: str) -> float:
    parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_wcag_asks_for():
    css = (resources.files("nitrofusion.serve") / "static" / "style.css").read_text()
    schemes = css.split("@media (prefers-color-scheme: dark)")
    for text in schemes[:1] + [schemes[1].split("}\n}")[0]]:
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", text))
        assert len(colours) >= 9
        pairs = [(a, b, 4.5) for a in ("ink", "muted", "warm") for b in ("paper", "card")]
        pairs += [
            ("on-accent", "accent", 4.5),
            ("ink", "wash", 4.5),
            ("edge", "card", 3),
            ("edge", "field", 3),
            ("accent", "card", 3),
        ]
        for one, two, least in pairs:
            low, high = sorted(luminance(colours[name]) for name in (one, two))
            assert (high + 0.05) / (low + 0.05) >= least, (one, two)


def test_fakes_have_the_colours_that_these_tests_look_for(server):
    from nitrofusion.serve.orders import Order

    from .fake import png

    assert color(png(Order("a", seed=5, num_inference_steps=4)))[:2] == (5, 240)
