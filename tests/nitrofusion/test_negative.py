"""Negative prompts in attention against the papers' equations in a plain diffusers processor; what is left behind."""

import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from nitrofusion.engine import load
from nitrofusion.errors import InputError
from nitrofusion.evaluate.world import load_judge
from nitrofusion.scheduler import TimestepShiftLCMScheduler
from nitrofusion.world.scenes import ATTRIBUTES, SHAPES
from nitrokernels import plan

from .tiny import PROMPTS, generators, plain_pipeline, student_folder, tiny_folder

NEGATIVE = "a green square"


class Equations:
    """Attention with a negative prompt, head by head and token by token as the papers write it, in float64."""

    def __init__(self, negative_embeds, method, scale, tau=math.inf, alpha=1.0):
        self.negative, self.method, self.scale, self.tau, self.alpha = negative_embeds, method, scale, tau, alpha

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        z_pos = self.attention(attn, hidden_states, encoder_hidden_states)
        # Under guidance the second half of the batch is the one that sees the prompt.
        context = self.negative.repeat(len(hidden_states) // len(self.negative), 1, 1)
        z_neg = self.attention(attn, hidden_states, context)
        if self.method == "nasa":
            z = z_pos - self.scale * z_neg
        else:
            z_tilde = z_pos + self.scale * (z_pos - z_neg)
            ratio = z_tilde.norm(p=1, dim=-1, keepdim=True) / z_pos.norm(p=1, dim=-1, keepdim=True)
            z_hat = z_tilde * ratio.clamp(max=self.tau) / ratio
            z = self.alpha * z_hat + (1 - self.alpha) * z_pos
        half = len(z) // 2
        if len(z) > len(self.negative):
            z = torch.cat([z_pos[:half], z[half:]])
        return attn.to_out[0](z.to(hidden_states.dtype))

    @staticmethod
    def attention(attn, x, context):
        q, k, v = attn.to_q(x).double(), attn.to_k(context).double(), attn.to_v(context).double()
        heads = zip(*(t.chunk(attn.heads, -1) for t in (q, k, v)), strict=True)
        return torch.cat([torch.softmax(a @ b.mT / math.sqrt(a.shape[-1]), -1) @ c for a, b, c in heads], -1)


def install(pipeline, prompts, *equations):
    """The pipeline with those equations in every cross-attention layer."""
    embeds = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    processors = dict(pipeline.unet.attn_processors)
    for name in processors:
        if ".attn2." in name:
            processors[name] = Equations(embeds, *equations)
    pipeline.unet.set_attn_processor(processors)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"), loud=True)


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


@pytest.fixture(scope="module")
def plain_student(folder, tmp_path_factory):
    return student_folder(folder, tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module", params=["auto", "ref"])
def student(plain_student, request):
    return load(plain_student, backend=request.param)


METHODS = {
    "nag": (("nag", 2.0, 2.5, 0.5), {}),
    "nag, strong and bounded": (("nag", 6.0, 1.2, 0.8), {"nag_scale": 6.0, "nag_tau": 1.2, "nag_alpha": 0.8}),
    "nasa": (("nasa", 0.3), {"negative": "nasa"}),
    "nasa, stronger": (("nasa", 0.7), {"negative": "nasa", "nasa_scale": 0.7}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 3])
def test_student_equals_the_equations(plain_student, student, method, steps):
    equations, options = METHODS[method]
    scheduler = TimestepShiftLCMScheduler.from_pretrained(plain_student, subfolder="scheduler")
    pipeline = install(plain_pipeline(plain_student, scheduler=scheduler), [NEGATIVE] * 2, *equations)
    theirs = pipeline(
        PROMPTS[:2], num_inference_steps=steps, guidance_scale=0, generator=generators([5, 6]), output_type="latent"
    ).images
    options = options | {"seed": 5, "output_type": "latent"}
    ours = student.generate(PROMPTS[:2], steps, negative_prompt=NEGATIVE, **options)
    without = student.generate(PROMPTS[:2], steps, seed=5, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - without).abs().max() > 1e-2


def test_beside_a_teachers_guidance(folder, teacher):
    pipeline = install(plain_pipeline(folder), [NEGATIVE] * 2, "nag", 2.0, 2.5, 0.5)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    theirs = pipeline(
        PROMPTS[:2], negative_prompt=[NEGATIVE] * 2, **options, generator=generators([3, 4]), output_type="latent"
    ).images
    ours = teacher.generate(
        PROMPTS[:2], negative_prompt=NEGATIVE, negative="nag", seed=3, output_type="latent", **options
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("negative_prompt", [NEGATIVE, "", None, [NEGATIVE, "a blue star"]])
def test_of_a_guided_teacher_it_means_what_diffusers_means(folder, teacher, negative_prompt):
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "negative_prompt": negative_prompt}
    ours = teacher.generate(PROMPTS[:2], seed=3, output_type="latent", **options)
    if isinstance(negative_prompt, str):
        options["negative_prompt"] = [negative_prompt] * 2
    theirs = plain_pipeline(folder)(PROMPTS[:2], generator=generators([3, 4]), output_type="latent", **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_batch_with_and_without(student, teacher, which, batch_size):
    engine = {"student": student, "teacher": teacher}[which]
    options = {"output_type": "latent", "num_inference_steps": 2}
    negatives = [None, NEGATIVE, None, "a blue star"]
    for negative in ("nag", "nasa") if which == "student" else ("cfg", "nag"):
        together = engine.generate(
            PROMPTS[:1] * 4,
            seed=[7] * 4,
            negative_prompt=negatives,
            negative=negative,
            batch_size=batch_size,
            **options,
        )
        for one, text in zip(together, negatives, strict=True):
            alone = engine.generate(PROMPTS[0], seed=7, negative_prompt=text, negative=negative, **options)[0]
            torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)
        assert (together[0] - together[1]).abs().max() > 1e-2 < (together[1] - together[3]).abs().max()


@pytest.mark.parametrize(
    "neutral",
    [{"nag_scale": 0}, {"nag_alpha": 0}, {"negative": "nasa", "nasa_scale": 0}, {"nag_steps": 0}],
    ids=str,
)
def test_neutral_values_change_nothing(student, neutral):
    ours = student.generate(PROMPTS[0], 2, negative_prompt=NEGATIVE, output_type="latent", **neutral)
    assert torch.equal(ours, student.generate(PROMPTS[0], 2, output_type="latent"))


def test_its_own_prompt_as_a_negative_changes_nothing_by_nag(student):
    ours = student.generate(PROMPTS[0], 2, negative_prompt=PROMPTS[0], output_type="latent")
    torch.testing.assert_close(ours, student.generate(PROMPTS[0], 2, output_type="latent"), rtol=1e-4, atol=1e-4)


def test_steps_are_counted(student, monkeypatch):
    """Whatever the model is told of time, the first calls are the first calls."""
    seen = []
    original = type(student)._denoise

    def watched(self, x_t, t, cond, negative, step):
        processors = {type(p) for n, p in student.model.unet.attn_processors.items() if ".attn2." in n}
        assert processors == {AttnProcessor2_0}
        seen.append((step, negative.guidance.acts(step)))
        return original(self, x_t, t, cond, negative, step)

    monkeypatch.setattr(type(student), "_denoise", watched)
    one = student.generate(PROMPTS[0], 4, negative_prompt=NEGATIVE, nag_steps=1, output_type="latent")
    assert seen == [(0, True), (1, False), (2, False), (3, False)]
    every = student.generate(PROMPTS[0], 4, negative_prompt=NEGATIVE, output_type="latent")
    none = student.generate(PROMPTS[0], 4, negative_prompt=NEGATIVE, nag_steps=0, output_type="latent")
    assert min((a - b).abs().max() for a, b in ((one, every), (one, none), (every, none))) > 1e-3


def test_cross_attention_alone_is_changed_and_restored(plain_student, monkeypatch):
    student = load(plain_student, backend="ref")
    unet = student.model.unet
    before = dict(unet.attn_processors)
    during, rows = {}, []
    forward = type(unet).forward

    def watched(self, sample, timestep, encoder_hidden_states, *args, **options):
        during.update(self.attn_processors)
        rows.append((len(sample), len(encoder_hidden_states)))
        if failing:
            raise RuntimeError("in the middle")
        return forward(self, sample, timestep, encoder_hidden_states, *args, **options)

    monkeypatch.setattr(type(unet), "forward", watched)
    failing = False
    student.generate([PROMPTS[0]] * 3, negative_prompt=[NEGATIVE, None, NEGATIVE])
    assert rows == [(3, 5)]
    for name, processor in during.items():
        assert (processor is before[name]) == (".attn1." in name)
    assert dict(unet.attn_processors) == before
    failing = True
    with pytest.raises(RuntimeError, match="in the middle"):
        student.generate(PROMPTS[0], negative_prompt=NEGATIVE)
    assert dict(unet.attn_processors) == before


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"negative_prompt": ["a", "b"]},
            "negative_prompt must be a string or a list of one for each of the 1 prompts",
        ),
        ({"negative_prompt": 3}, "negative_prompt must be a string or a list"),
        ({"negative_prompt": [3]}, "negative_prompt must be a string or None for each prompt, got 3"),
        ({"negative_prompt": "x" * 10**6}, "negative_prompt must be at most 5000 characters .*, got 1000000"),
        ({"negative_prompt": "\udcff"}, "negative_prompt must be valid Unicode"),
        ({"negative": "slg"}, "negative must be one of nag, nasa, cfg, got 'slg'"),
        ({"negative": "cfg"}, "negative must be nag or nasa without guidance"),
        ({"nag_scale": -1}, "nag_scale must be in 0..100, got -1"),
        ({"nag_scale": float("nan")}, "nag_scale must be in 0..100, got nan"),
        ({"nag_tau": 0}, "nag_tau must be above 0, got 0"),
        ({"nag_alpha": 1.5}, "nag_alpha must be in 0..1, got 1.5"),
        ({"nasa_scale": "x"}, "nasa_scale must be in 0..100, got 'x'"),
        ({"nag_steps": 0.5}, "nag_steps must be an integer >= 0, got 0.5"),
    ],
)
def test_bad_calls(student, options, words):
    with pytest.raises(InputError, match=f"^generate: {words}") as error:
        student.generate("a ring", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"negative": "nasa", "nasa_scale": 0.5}], ids=["nag", "nasa"])
def test_the_worlds_student_avoids_what_it_is_told_to(options):
    """Asked for just an object it mostly draws rings, in the judge's eyes; hardly with rings as the negative prompt."""
    judge, engine = load_judge(), load("world")
    prompt, negative = "an object on a navy background", "a white ring on a navy background"

    def rings(**options):
        images = engine.generate(prompt, seed=0, num_images_per_prompt=24, output_type="pt", **options)
        with torch.no_grad():
            shape = judge(images)[0].split(list(ATTRIBUTES.values()), 1)[list(ATTRIBUTES).index("shape_1")]
        return (shape.argmax(1) == SHAPES.index("ring")).float().mean()

    assert rings() > 0.6 and rings(negative_prompt=negative, **options) < 0.2


@pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")
def test_a_named_backend_that_cannot_is_refused_in_one_line(plain_student):
    engine = load(plain_student, "cpu", backend="cpu")
    engine.generate(PROMPTS[0], 1)
    for draw in (engine.generate, lambda *args, **options: next(engine.stream(*args, **options))):
        with pytest.raises(InputError, match="^generate: backend must be .*, got nag_combine: a backend among"):
            draw(PROMPTS[0], 1, negative_prompt=NEGATIVE)
    with pytest.raises(InputError, match="^generate: backend must be .*, got group_norm_silu: .* got torch.float64"):
        load(plain_student, "cpu", torch.float64, "cpu").generate(PROMPTS[0], 1)
