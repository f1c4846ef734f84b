"""The engine as the worker's process sees it: orders in, files out."""

from __future__ import annotations

import functools
import io
import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .. import __version__
from ..engine import Engine, load
from ..engine.png import encode_png
from ..errors import InputError, out_of_memory
from ..pil import UNREADABLE, upright
from ..world.scenes import sample_scenes
from .orders import FAST, PNG, Drawn, Failed, Info, Order, Refused, Result

log = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 8_000_000  # of an image to start from, checked before it is decoded
LOSSLESS = 256 * 256  # pixels up to which PNG is quicker than it is large
STREAMS = 8  # pictures under refinement that are remembered
GENERAL = (
    "a lighthouse in a storm, oil painting",
    "portrait of an old fisherman, soft window light",
    "a glass teapot on a wooden table, macro photograph",
)


class EngineDrawer:
    """``Drawer`` of a loaded model, warm: its first picture is as quick as the others."""

    def __init__(self, model: str | Path = "world", **how):
        self.engine: Engine = load(model, **how)
        self._streams: OrderedDict[str, tuple[Iterator, int]] = OrderedDict()  # and the steps each has reached
        executor, source = self.engine.executor, self.engine.source
        world = executor.resolution <= 64
        self.info = Info(
            model=source.name,
            notice=source.notice(),
            device=executor.device.type,
            version=__version__,
            steps=tuple(sorted(source.steps or (source.num_inference_steps,))),
            default_steps=source.num_inference_steps,
            height=executor.resolution,
            width=executor.resolution,
            multiple=executor.vae_scale,
            # On a CPU a batch takes as long as its pictures one by one, and the first would wait for the last.
            batch=1 if executor.device.type == "cpu" else 4,
            examples=tuple(sample_scenes(4, 11).captions()) if world else GENERAL,
        )
        for _ in range(2):
            self.draw([Order(self.info.examples[0], format=PNG)])

    def draw(self, orders: list[Order]) -> list[Result]:
        """One result for each order. What one order does wrong is no other's loss."""
        try:
            if orders[0].stream:
                return [self._refine(order) for order in orders]
            return self._generate(orders)
        except (InputError, Refused) as error:
            if len(orders) > 1:
                return [self.draw([order])[0] for order in orders]
            return [Refused(str(error))]
        except Exception as error:  # whatever a library raises, one order fails and the model stays loaded
            short = out_of_memory(error)
            if "CUDA error" in str(error) and not short:
                raise  # the device's context is lost with all that is in it: only another process draws again
            if len(orders) > 1 and not short:
                return [self.draw([order])[0] for order in orders]
            if not short:
                log.exception("serve: an order could not be drawn")
            words = str(error).strip().split("\n", 1)[0][:300]  # Python's own MemoryError has none
            return [Failed(f"{type(error).__name__}: {words}" if words else type(error).__name__)] * len(orders)

    def _generate(self, orders: list[Order]) -> list[Drawn]:
        start = time.perf_counter()
        options = self._options(orders[0])
        if orders[0].image is not None:
            options["image"] = [self._image(order) for order in orders]
        negatives = [order.negative_prompt for order in orders]
        pictures = self.engine.generate(
            [order.prompt for order in orders],
            seed=[order.seed for order in orders],
            negative_prompt=None if negatives[0] is None else negatives,
            batch_size=len(orders),
            **options,
        )
        seconds = time.perf_counter() - start
        return [self._file(order, picture, seconds) for order, picture in zip(orders, pictures, strict=True)]

    def _refine(self, order: Order) -> Drawn:
        """The picture of so many steps, from what its earlier stages computed if they are remembered."""
        steps = order.num_inference_steps
        stages, at = self._streams.pop(order.stream, (None, steps))
        if at >= steps:
            if not self.engine.is_student:
                return self._generate([order])[0]
            options = self._options(order) | {"num_inference_steps": self.info.steps[-1]}
            if order.image is not None:
                options["image"] = self._image(order)
            stages = self.engine.stream(order.prompt, seed=order.seed, negative_prompt=order.negative_prompt, **options)
            at = 0
        start = time.perf_counter()
        while at < steps:
            picture, at = next(stages).image, at + 1
        seconds = time.perf_counter() - start
        if at < self.info.steps[-1]:
            self._streams[order.stream] = (stages, at)
            if len(self._streams) > STREAMS:
                self._streams.popitem(last=False)
        return self._file(order, picture, seconds)

    def _options(self, order: Order) -> dict:
        wanted = {name: getattr(order, name) for name in ("num_inference_steps", "height", "width", "strength")}
        return {name: value for name, value in wanted.items() if value is not None}

    def _image(self, order: Order) -> Image.Image:
        """The middle of the order's image, at the size of the picture."""
        size = (order.width or self.info.width, order.height or self.info.height)
        image = _open(order.image)
        return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)

    def _file(self, order: Order, picture: Image.Image, seconds: float) -> Drawn:
        steps = order.num_inference_steps or self.info.default_steps
        if order.format == FAST and picture.width * picture.height > LOSSLESS:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=92)
            return Drawn(file.getvalue(), "image/jpeg", *picture.size, steps, seconds)
        settings = None
        if order.format != FAST:
            options = self._options(order) | {"seed": order.seed, "negative_prompt": order.negative_prompt}
            if order.image is not None:
                options["image"] = self._image(order)
            settings = self.engine.settings(order.prompt, **options)
        return Drawn(encode_png(picture, settings), "image/png", *picture.size, steps, seconds)


@functools.lru_cache(8)  # typing over one image sends its bytes again and again
def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    got = f"{image.width}x{image.height}"
                    raise Refused(f"generate: image must have at most {MAX_PIXELS:,} pixels, got {got}")
                return upright(image)
    except InputError:
        raise
    except UNREADABLE as error:
        got = "no picture of these" if isinstance(error, UnidentifiedImageError) else error  # Pillow tells an address
        raise Refused(f"generate: image must be a readable {', '.join(FORMATS)} file, got {got}") from error
