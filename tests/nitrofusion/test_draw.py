"""Image-to-image and sizes against plain diffusers, streams against single calls, bad input."""

import json

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, LCMScheduler, PNDMScheduler, StableDiffusionXLImg2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from nitrofusion import sampling, schedule
from nitrofusion.engine import Engine, load
from nitrofusion.engine.images import digest, open_image, prepare, rgb
from nitrofusion.errors import InputError
from nitrofusion.scheduler import TimestepShiftLCMScheduler

from .tiny import PROMPTS, generators, plain_pipeline, student_folder, tiny_folder


def random_image(width=32, height=32, mode="RGB"):
    """Large blots, so that resizing is not all there is to see."""
    pixels = torch.rand(3, height // 4, width // 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).astype("uint8")).convert(mode)


def img2img(folder, **parts):
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shifted(folder):
    return TimestepShiftLCMScheduler.from_pretrained(folder, subfolder="scheduler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"), loud=True)


@pytest.fixture(scope="module")
def plain_student(folder, tmp_path_factory):
    return student_folder(folder, tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


@pytest.fixture(scope="module")
def student(plain_student):
    return load(plain_student)


@pytest.mark.parametrize("size", [(40, 24), (30, 34)])  # the latter's latents have odd sides
@pytest.mark.parametrize("steps, strength", [(4, 0.6), (4, 0.25), (3, 0.7), (2, 0.5), (2, 1.0), (1, 1.0)])
def test_student_redraws_an_image_as_diffusers_does(plain_student, student, steps, strength, size):
    image = random_image(64, 64).resize(size)
    options = {"num_inference_steps": steps, "strength": strength, "image": image, "output_type": "latent"}
    pipeline = img2img(plain_student, scheduler=shifted(plain_student))
    theirs = pipeline(PROMPTS[:2], guidance_scale=0, generator=generators([9, 10]), **options).images
    ours = student.generate(PROMPTS[:2], seed=9, **options)
    assert ours.shape == (2, 4, size[1] // 2, size[0] // 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [None, HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012)])
@pytest.mark.parametrize("steps, strength", [(6, 0.5), (5, 0.9), (4, 1.0)])
def test_teacher_redraws_an_image_as_diffusers_does(folder, teacher, scheduler, steps, strength, monkeypatch):
    options = {"num_inference_steps": steps, "strength": strength, "guidance_scale": 2.0, "output_type": "latent"}
    pipeline = img2img(folder, **({} if scheduler is None else {"scheduler": scheduler}))
    images = [random_image(), random_image()]
    theirs = pipeline(PROMPTS[:2], image=images, generator=generators([9, 10]), **options).images
    monkeypatch.setattr(teacher, "scheduler", scheduler or teacher.scheduler)
    ours = teacher.generate(PROMPTS[:2], image=images, seed=9, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, steps", [(PNDMScheduler, 3), (LCMScheduler, 60)])
def test_steps_that_a_scheduler_does_not_take(teacher, kind, steps, monkeypatch):
    monkeypatch.setattr(teacher, "scheduler", kind(beta_start=0.00085, beta_end=0.012))
    words = f"^generate: num_inference_steps must be a number that {kind.__name__} takes, got {steps}: "
    with pytest.raises(InputError, match=words):
        teacher.generate(PROMPTS[0], steps)


def test_one_step_begins_where_four_of_that_strength_would():
    assert [schedule.image_timesteps(1, s) for s in (0.1, 0.25, 0.6, 0.8, 1.0)] == [[249], [249], [499], [749], [999]]
    assert [schedule.image_timesteps(n, 0.6) for n in (1, 2, 3, 4)] == [[499], [499], [499], [499, 249]]
    assert schedule.image_timesteps(3, 0.2) == schedule.image_timesteps(4, 0.01) == [249]


def test_one_step_keeps_more_of_the_image_at_less_strength(student):
    image = random_image()
    latents = student.generate("a ring", image=image, strength=0.01, output_type="latent")
    eps = student._denoise
    seen = []
    student._denoise = lambda x_t, *rest: seen.append(x_t) or eps(x_t, *rest)
    try:
        for strength in (0.3, 0.6, 0.8, 1.0):
            student.generate("a ring", image=image, strength=strength)
    finally:
        del student._denoise
    likeness = [torch.corrcoef(torch.stack([x.flatten(), latents.flatten()]))[0, 1] for x in seen]
    assert len(seen) == 4 and likeness == sorted(likeness, reverse=True)


def test_forms_of_an_image(student):
    image = random_image()
    options = {"strength": 0.6, "num_inference_steps": 2, "output_type": "latent"}
    wanted = student.generate("a ring", image=image, **options)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    for same in (tensor, tensor[None], [tensor], tensor.double(), image.convert("RGBA")):
        torch.testing.assert_close(student.generate("a ring", image=same, **options), wanted, rtol=1e-5, atol=1e-5)
    drawn = student.generate("a ring", output_type="latent")
    again = student.generate("a ring", image=drawn, **options)
    assert torch.equal(again, student.generate("a ring", image=drawn[0], **options)) and again.shape == drawn.shape


def test_latents_are_noised_as_they_are(plain_student, student):
    latents = torch.randn(2, 4, 16, 16)
    options = {"num_inference_steps": 4, "strength": 0.75, "image": latents, "output_type": "latent"}
    pipeline = img2img(plain_student, scheduler=shifted(plain_student))
    theirs = pipeline(PROMPTS[:2], guidance_scale=0, generator=generators([9, 10]), **options).images
    torch.testing.assert_close(student.generate(PROMPTS[:2], seed=9, **options), theirs, rtol=1e-4, atol=1e-4)


def test_each_prompt_has_its_image_and_a_batch_changes_none(student):
    images = [random_image(), random_image()]
    options = {"num_inference_steps": 4, "output_type": "latent"}
    together = student.generate(PROMPTS[:2], seed=5, image=images, num_images_per_prompt=2, batch_size=3, **options)
    for i, one in enumerate(together):
        alone = student.generate(PROMPTS[i // 2], seed=5 + i, image=images[i // 2], **options)[0]
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(48, 24), (24, 40), (16, 64)])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_other_sizes_are_those_of_diffusers(request, folder, plain_student, which, height, width):
    engine, steps = request.getfixturevalue(which), {"student": 2, "teacher": 3}[which]
    options = {"height": height, "width": width, "num_inference_steps": steps}
    parts = {"scheduler": shifted(plain_student)} if which == "student" else {}
    pipeline = plain_pipeline(plain_student if which == "student" else folder, **parts)
    guidance = 0 if which == "student" else 2.0
    theirs = pipeline(PROMPTS[0], guidance_scale=guidance, generator=generators([4]), output_type="pt", **options)
    ours = engine.generate(PROMPTS[0], guidance_scale=guidance, seed=4, output_type="pt", **options)
    assert ours.shape == (1, 3, height, width)
    torch.testing.assert_close(ours / 2 + 0.5, theirs.images, rtol=0, atol=1e-3)


def test_the_unet_is_told_the_size(student, monkeypatch):
    told = []
    original = student._denoise
    monkeypatch.setattr(student, "_denoise", lambda x, t, c, *rest: told.append(c.time_ids) or original(x, t, c, *rest))
    student.generate(PROMPTS[:2], height=48, width=24)
    student.generate("a ring", image=random_image(40, 20))
    assert told[0].tolist() == [[48, 24, 0, 0, 48, 24]] * 2 and told[1].tolist() == [[20, 40, 0, 0, 20, 40]]


def test_an_image_is_resized_to_the_size_asked_for(student):
    image = random_image(64, 48)
    small = image.resize((32, 24), Image.Resampling.LANCZOS)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    asked = student.generate("a ring", image=image, height=24, width=32, **options)
    assert torch.equal(asked, student.generate("a ring", image=small, **options))
    assert student.generate("a ring", image=random_image(44, 28).crop((0, 0, 43, 27)))[0].size == (42, 26)


@pytest.mark.parametrize(
    "size,asked,mode", [((44, 29), (None, None), "RGB"), ((7, 90), (48, None), "L"), ((64, 64), (24, 40), "RGBA")]
)
def test_pixels_are_those_of_diffusers_processor(size, asked, mode):
    image = random_image(*size, mode)
    (ours,) = prepare([image], *asked, 4)
    theirs = VaeImageProcessor(vae_scale_factor=4).preprocess(rgb(image), *asked)[0]
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_an_image_is_encoded_once_while_it_stays_what_it_is(plain_student, monkeypatch):
    engine, forgetful = (load(plain_student, "cpu") for _ in range(2))
    monkeypatch.setattr(forgetful._images, "get", lambda image, make: make(image))
    count, encode = [], type(engine.executor).encode_image
    monkeypatch.setattr(type(engine.executor), "encode_image", lambda *args: (count.append(1), encode(*args))[1])

    def draw(prompt, image, wanted, **options):
        before = len(count)
        picture = engine.generate(prompt, image=image, output_type="pt", **options)
        assert len(count) - before == wanted
        assert torch.equal(picture, forgetful.generate(prompt, image=image, output_type="pt", **options))

    image, other = random_image(), random_image()
    draw("a ring", image, 1)
    draw("a cross", image.copy(), 0, seed=4)
    draw("a cross", image, 1, height=24, width=32)
    draw(["a ring", "a cross"], [other, image], 1)
    image.putpixel((3, 5), (255, 0, 0))
    draw("a ring", image, 1)
    pixels = torch.rand(3, 32, 32)
    draw("a ring", pixels, 1)
    pixels[0] += 0.1
    draw("a ring", pixels.clamp_(max=1), 1)
    engine.switch(plain_student)
    draw("a ring", pixels, 1)


def test_output_types_agree(student):
    (pil,) = student.generate("a ring", seed=3)
    pixels = student.generate("a ring", seed=3, output_type="np")
    tensor = student.generate("a ring", seed=3, output_type="pt")
    assert pixels.shape == (1, 32, 32, 3) and pixels.dtype == np.float32 and 0 <= pixels.min() <= pixels.max() <= 1
    assert np.array_equal((pixels[0] * 255).round().astype("uint8"), np.array(pil))
    assert np.allclose(pixels, tensor.permute(0, 2, 3, 1).numpy() / 2 + 0.5, atol=1e-6)
    several = student.generate(PROMPTS[:3], seed=3, output_type="np")
    for drawn, one in zip(student.generate(PROMPTS[:3], seed=3), several, strict=True):
        assert np.array_equal((one * 255).round().astype("uint8"), np.array(drawn))


@pytest.mark.parametrize(
    "options", [{}, {"negative_prompt": "a star"}, {"image": True}, {"image": True, "strength": 1.0}]
)
def test_a_stream_is_what_single_calls_draw(student, options):
    options = options | ({"image": random_image()} if "image" in options else {})
    seen = list(student.stream(PROMPTS[0], seed=11, output_type="latent", **options))
    assert [r.num_inference_steps for r in seen] == [1, 2, 3, 4]
    assert all(a.latency <= b.latency for a, b in zip(seen, seen[1:], strict=False)) and seen[0].latency > 0
    for refinement in seen:
        wanted = student.generate(PROMPTS[0], refinement.num_inference_steps, 11, output_type="latent", **options)[0]
        assert torch.equal(refinement.image, wanted) and not refinement.image.is_inference()


def test_a_stream_does_shared_work_once_and_stops_when_its_consumer_does(student, monkeypatch):
    calls = []
    original = student._denoise
    monkeypatch.setattr(student, "_denoise", lambda x, t, *rest: calls.append(int(t[0])) or original(x, t, *rest))
    stream = student.stream("a ring")
    assert calls == []
    first = next(stream)
    assert calls == [499] and isinstance(first.image, Image.Image)  # t' of 999
    assert not torch.is_inference_mode_enabled()
    next(stream)
    assert calls == [499, 249]
    stream.close()
    assert calls == [499, 249]
    list(student.stream("a ring"))
    assert calls[2:] == [499, 249, 374, 249, 124]
    assert [r.num_inference_steps for r in student.stream("a ring", 2)] == [1, 2]


def test_streams_are_for_students_and_one_picture(student, teacher):
    with pytest.raises(InputError, match="^stream: model must be a student, got the multi-step teacher"):
        teacher.stream("a ring")
    with pytest.raises(InputError, match="^stream: prompt must be one picture, got 2 pictures"):
        student.stream(["a ring", "a star"])
    with pytest.raises(InputError, match="^generate: num_inference_steps must be an integer in 1..4, got 5"):
        student.stream("a ring", 5)


def test_networks_are_reached_through_the_executor(student):
    """Another one can take its place."""

    class Fake:
        device, dtype, in_channels, vae_scale, resolution = torch.device("cpu"), torch.float32, 4, 2, 32
        scaling_factor, alphas_cumprod = 0.18215, student.executor.alphas_cumprod
        cond, calls = student.executor.encode("a ring"), 0

        def encode(self, prompt):
            return self.cond

        def encode_image(self, image):
            return image.new_zeros(1, 4, 16, 16), image.new_ones(1, 4, 16, 16)

        def denoise(self, x_t, t, cond, negative):
            assert negative is not None
            self.calls += 1
            return torch.sin(x_t) + self.calls - 1

        def decode(self, latents):
            return latents[:, :3].tanh()

    model = student.executor
    student = Engine(student.source, Fake())
    options = {"negative_prompt": "a star", "image": random_image(), "strength": 1.0, "output_type": "pt"}
    drawn = student.generate("a ring", 2, 7, **options)
    student.executor.calls = 0
    assert torch.equal(list(student.stream("a ring", 2, 7, **options))[-1].image, drawn[0])
    g = torch.Generator().manual_seed(7)
    latents = sampling.randn((4, 16, 16), [g]) * model.scaling_factor
    x_t = schedule.add_noise(latents, sampling.randn((4, 16, 16), [g]), torch.tensor([999]), model.alphas_cumprod)
    x0 = schedule.to_x0(x_t, torch.sin(x_t), torch.tensor([499]), model.alphas_cumprod)
    x_t = schedule.add_noise(x0, sampling.randn((4, 16, 16), [g]), torch.tensor([499]), model.alphas_cumprod)
    x0 = schedule.to_x0(x_t, torch.sin(x_t) + 1, torch.tensor([249]), model.alphas_cumprod)
    torch.testing.assert_close(drawn, x0[:, :3].tanh(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_model_that_draws_nan_says_so(student, monkeypatch, output_type):
    monkeypatch.setattr(student, "_denoise", lambda x_t, *rest: torch.full_like(x_t, float("nan")))
    with pytest.raises(InputError, match="^generate: (pixels|latents) must be finite .*, got NaN or infinity from"):
        student.generate("a ring", output_type=output_type)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_one_bad_picture_among_good_ones_is_told(student, monkeypatch, output_type):
    spoiled = torch.zeros(3, 4, 16, 16)
    spoiled[1, 2, 5, 7] = float("nan")
    monkeypatch.setattr(student, "_draw", lambda call, batch: spoiled)
    with pytest.raises(InputError, match="^generate: pixels must be finite"):
        student.generate(PROMPTS[:3], output_type=output_type)


def test_numbers_may_be_numpys(student):
    plain = {"num_inference_steps": 2, "height": 24, "width": 40, "strength": 0.5, "negative_prompt": "a star",
             "nag_steps": 1, "nag_scale": 1.5, "image": random_image()}  # fmt: skip
    integers = {key: np.int64(value) for key, value in plain.items() if isinstance(value, int)}
    given = plain | integers | {"strength": np.float32(0.5), "nag_scale": np.float32(1.5)}
    wanted = student.generate(["a ring", "a cross"], seed=[3, 2**40], output_type="latent", **plain)
    for seeds in (np.array([3, 2**40]), [np.int64(3), np.uint64(2**40)]):
        drawn = student.generate(
            ["a ring", "a cross"], seed=seeds, output_type="latent", num_images_per_prompt=np.int32(1), **given
        )
        assert torch.equal(drawn, wanted)
    settings = student.settings("a ring", seed=np.int64(3), **given)
    assert json.dumps(settings) == json.dumps(student.settings("a ring", seed=3, **plain))
    infinite = np.float32("inf")
    for bad in ({"seed": np.bool_(True)}, {"seed": np.array([[1]])}, {"nag_tau": infinite}):
        with pytest.raises(InputError):
            student.generate("a ring", **bad)


NAN = torch.full((4, 16, 16), float("nan"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompt": "x" * 10**6}, "prompt must be at most 5000 characters .77 tokens are read., got 1000000"),
        ({"prompt": ["x"] * 10**5 + [None]}, "prompt must be a string or a list of at least one, got .* characters."),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt must be an integer in 1..10000"),
        ({"seed": 10**5000}, "seed must be an integer in 0..2.*, got int that is too long to show"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed must be at most 2..63-2 for 2 pictures"),
        ({"strength": 10**5000}, "strength must be above 0 and at most 1"),
        ({"height": 33}, "height must be a multiple of 2, got 33"),
        ({"width": 0}, "width must be an integer in 1..8192, got 0"),
        ({"width": 10**9}, "width must be an integer in 1..8192, got 1000000000"),
        ({"height": 32.0}, "height must be an integer in 1..8192, got 32.0"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, "strength must be above 0 and at most 1, got 1.01"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"strength": True}, "strength must be above 0 and at most 1, got True"),
        ({"image": "ring.png"}, "image must be a PIL image or a tensor, or a list of them, got 'ring.png'"),
        ({"image": np.zeros((32, 32, 3))}, "image must be a PIL image or a tensor, or a list of them, got array"),
        ({"image": []}, "image must be one or one for each of the 1 prompts, got 0"),
        ({"image": torch.zeros(3, 3, 32, 32)}, "image must be one or one for each of the 1 prompts, got 3"),
        ({"image": torch.zeros(32, 32)}, r"image must be \[3, H, W\] pixels or .*, got \[32, 32\]"),
        ({"image": torch.zeros(3, 0, 4)}, r"image must be \[3, H, W\] pixels or .*, got \[3, 0, 4\]"),
        (
            {"image": torch.zeros(3, 32, 32, dtype=torch.uint8)},
            "image must be a floating point tensor, got torch.uint8",
        ),
        ({"image": torch.full((3, 32, 32), 255.0)}, "image must be pixels in -1..1, got 255..255"),
        ({"image": NAN}, "image must be finite, got NaN or infinity in latents"),
        ({"image": NAN[:3]}, "image must be finite, got NaN or infinity in pixels"),
        ({"image": NAN[:3].to(torch.float8_e4m3fn)}, "image must be finite, got NaN or infinity in pixels"),
        (
            {"image": torch.zeros(3, 32, 31)},
            "image must be a tensor whose sides are multiples of 2 up to 8192, got 31x32",
        ),
        ({"image": torch.zeros(3, 32, 32), "height": 16}, "image must be a tensor of 32x16 pixels .*, got 32x32"),
        ({"image": Image.new("RGB", (1, 9))}, "image must be at least 2 pixels a side, got 1x9"),
        ({"image": Image.new("L", (8200, 2))}, "image must be at most 8192 pixels a side, got 8200x2"),
        (
            {"prompt": ["a", "b"], "image": [Image.new("RGB", (32, 32)), Image.new("RGB", (16, 32))]},
            "image must be pictures of one size, or height and width given",
        ),
    ],
)
def test_bad_calls(student, options, words):
    with pytest.raises(InputError, match=f"^generate: {words}") as error:
        student.generate(**({"prompt": "a ring"} | options))
    assert len(str(error.value)) < 300


def test_picture_files(tmp_path):
    image = random_image(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright = open_image(tmp_path / "turned.jpg")
    assert upright.size == (16, 24)
    with Image.open(tmp_path / "turned.jpg") as turned:  # a picture says so too, not only its file
        assert digest(turned) == digest(upright)
        assert torch.equal(prepare([turned], None, None, 8)[0], prepare([upright], None, None, 8)[0])
        assert prepare([turned], None, None, 8)[0].shape == (3, 24, 16)
    image.convert("LA").save(tmp_path / "gray.png")
    assert open_image(tmp_path / "gray.png").mode == "RGB"
    Image.new("1", (12000, 9000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:300])
    for name in ("large.png", "text.png", "cut.jpg", "absent.png", ""):
        with pytest.raises(InputError, match="^generate: image must be .*, got ") as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_picture_of_16_bits_is_the_one_of_8(student, tmp_path, mode):
    levels = np.arange(32 * 32).reshape(32, 32) % 256
    eight = Image.fromarray(levels.astype(np.uint8))
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (32, 32), (levels * 257).astype(order).tobytes())
    for one in (rgb(image), rgb(image.copy())):
        assert one.tobytes() == eight.convert("RGB").tobytes()
    draws = [student.generate(PROMPTS[0], image=one, output_type="latent") for one in (eight, image)]
    assert torch.equal(*draws)
    if mode == "I;16":
        image.save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").tobytes() == eight.convert("RGB").tobytes()


def test_images_that_cannot_be_used(student, tmp_path):
    random_image(64, 64).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:120])
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    for bad in (
        Image.open(tmp_path / "cut.png"), closed, Image.new("La", (32, 32)), Image.new("I", (32, 32)),
        Image.new("F", (32, 32)), torch.zeros(3, 32, 32).to_sparse(), torch.zeros(3, 32, 32, device="meta"),
    ):  # fmt: skip
        for call in (student.generate, student.settings):
            with pytest.raises(InputError, match="^generate: image must be .*, got "):
                call("a ring", image=bad)
