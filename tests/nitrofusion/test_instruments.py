"""Each instrument against straight arithmetic, or transformers' own code, over checkpoints in the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from nitrofusion.errors import InputError
from nitrofusion.evaluate.instruments import EXTRACTORS, METRICS, pictures
from nitrofusion.evaluate.weights import WEIGHTS
from tests.nitrofusion import straight

TOKENIZER = Path(__file__).parents[2] / "nitrofusion" / "world" / "weights" / "teacher" / "tokenizer"
PROMPTS = ["a red circle left of a blue square", "stripes", "a very " * 60 + "long one"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def some_pictures(seed, n=3, size=(61, 47)):
    """Smooth and rough at once, as photographs are."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        rough = np.array(small).astype(int) + rng.integers(-20, 20, (size[1], size[0], 3))
        found.append(Image.fromarray(rough.clip(0, 255).astype(np.uint8)))
    return found


def close(found, expected, tolerance=1e-5):
    """Within ``tolerance`` of the largest number expected."""
    expected = expected.double().numpy().reshape(found.shape)
    assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max())
    assert found.dtype == np.float32


def one_by_one(extract, images, prompts=None):
    """A picture's row is its own, whatever is looked at with it, up to the rounding of larger products."""
    together = extract(images, prompts)
    alone = np.concatenate([extract([image], None if prompts is None else [prompts[i]])
                            for i, image in enumerate(images)])  # fmt: skip
    assert np.abs(together - alone).max() <= 1e-5 * max(1, np.abs(together).max())
    backwards = extract(images[::-1], None if prompts is None else prompts[::-1])
    assert np.abs(backwards[::-1] - together).max() <= 1e-5 * max(1, np.abs(together).max())


# --- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under pytorch-fid's names, 95 MB, as safetensors."""
    torch.manual_seed(torch.seed() % 2**31)
    state = straight.State()
    with torch.inference_mode():
        straight.inception(state, torch.zeros(1, 3, 299, 299, dtype=torch.float64))
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.safetensors"
    save_file(dict(state), path)
    yield path, state
    path.unlink()


def tf1_resize(x, size=299):
    """[h, w, 3] float64 by TensorFlow 1's bilinear rule, pixel by pixel."""
    height, width, _ = x.shape
    out = np.empty((size, size, 3))
    for i in range(size):
        for j in range(size):
            v, u = np.float32(i) * np.float32(height / size), np.float32(j) * np.float32(width / size)
            top, left = int(v), int(u)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dv, du = float(v) - top, float(u) - left
            upper = x[top, left] * (1 - du) + x[top, right] * du
            out[i, j] = upper * (1 - dv) + (x[below, left] * (1 - du) + x[below, right] * du) * dv
    return out


def test_inception_features_are_the_straight_lines(inception_file, seed):
    path, state = inception_file
    extract = EXTRACTORS["inception"].load({"inception": path}, "cpu")
    images = some_pictures(seed, 2, (340, 310))
    x = np.stack([tf1_resize(np.array(image).astype(np.float64)) for image in images])
    with torch.inference_mode():
        expected = straight.inception(state, torch.from_numpy((x - 128) / 128).permute(0, 3, 1, 2))
    close(extract(images, None), expected)
    one_by_one(extract, images)


def test_patch_features_are_those_of_the_middle(inception_file, seed):
    path, state = inception_file
    extract = EXTRACTORS["inception_patch"].load({"inception": path}, "cpu")
    image = some_pictures(seed, 1, (352, 300))[0]
    x = np.array(image)[0:299, 26:325].astype(np.float64)
    with torch.inference_mode():
        expected = straight.inception(state, torch.from_numpy((x - 128) / 128).permute(2, 0, 1)[None])
    close(extract([image], None), expected)
    with pytest.raises(InputError, match="299x299 or more, got 298x340"):
        extract(some_pictures(seed, 1, (298, 340)), None)


@pytest.mark.parametrize("size", [(299, 299), (640, 200), (32, 32), (1, 5)])
def test_tf1_resize_looks_at_two_pixels_a_side(seed, size):
    image = some_pictures(seed, 1, size)[0]
    found = pictures.resize_tf1(pictures.pixels(image)).permute(1, 2, 0).numpy()
    assert np.abs(found - tf1_resize(np.array(image).astype(np.float64))).max() < 1e-3  # of 255


def test_inception_equals_torch_fidelitys(inception_file, seed, tmp_path):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs torch-fidelity and a torchvision that imports beside this torch: {error}")
    path, state = inception_file
    torch.save(dict(state), tmp_path / "inception.pth")
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=tmp_path / "inception.pth")
    images = some_pictures(seed, 2, (340, 310))
    x = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    close(EXTRACTORS["inception"].load({"inception": path}, "cpu")(images, None), theirs(x)[0])


def test_inception_of_other_shapes_is_refused(inception_file, tmp_path):
    path, state = inception_file
    few = {k: v for k, v in state.items() if k.startswith("Conv2d")}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(InputError, match=r"Mixed_5b.branch1x1.conv.weight \(64, 192, 1, 1\), got nothing"):
        EXTRACTORS["inception"].load({"inception": tmp_path / "few.safetensors"}, "cpu")


# --- CLIP score and aesthetic ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the published layout with small random towers, and the world's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 20}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 30, "patch_size": 10}, projection_dim=24
    )
    model = CLIPModel(config)
    for value in model.parameters():  # transformers draws them so small that all pictures look alike
        value.data = value.data * 3 + 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = {"do_resize": True, "size": {"shortest_edge": 32}, "do_center_crop": True, "resample": 3}
    told |= {"crop_size": {"height": 30, "width": 30}, "do_normalize": True, "image_mean": CLIP_MEAN}
    told |= {"image_std": CLIP_STD, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True}
    told |= {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def image_processor(folder):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor  # before transformers 5 it is the one that uses PIL
    return Processor.from_pretrained(folder)


def test_clip_score_is_transformers_logits(clip_folder, seed):
    extract = EXTRACTORS["clip_score"].load({"clip-vit-base-patch32": clip_folder}, "cpu")
    images = some_pictures(seed)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = image_processor(clip_folder)(images, return_tensors="pt").pixel_values
    coded = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model(pixel_values=pixels, **coded).logits_per_image / model.logit_scale.exp()
    close(extract(images, PROMPTS), logits.diagonal())
    assert np.ptp(extract(images, PROMPTS)) > 1e-3  # the pictures are told apart
    one_by_one(extract, images, PROMPTS)
    with pytest.raises(InputError, match="one prompt for each of 3 pictures, got 2"):
        extract(images, PROMPTS[:2])
    with pytest.raises(InputError, match="got none"):
        extract(images, None)
    assert extract([], []).shape == (0, 1)


@pytest.mark.parametrize("size", [(30, 64), (64, 31), (33, 32), (200, 111)])
def test_preparation_is_transformers_own(clip_folder, seed, size):
    images = some_pictures(seed, 2, size)
    expected = image_processor(clip_folder)(images, return_tensors="pt").pixel_values
    found = torch.stack([pictures.resize_crop_of(clip_folder)(image) for image in images])
    assert torch.allclose(found, expected, atol=1e-5)


def test_aesthetic_is_the_head_on_normalised_embeddings(clip_folder, tmp_path, seed):
    state, width = {}, 24
    for number, out in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        state[f"layers.{number}.weight"] = torch.randn(out, width) / width**0.5
        state[f"layers.{number}.bias"] = torch.randn(out)
        width = out
    save_file(state, tmp_path / "head.safetensors")
    paths = {"clip-vit-large-patch14": clip_folder, "aesthetic": tmp_path / "head.safetensors"}
    extract, images = EXTRACTORS["aesthetic"].load(paths, "cpu"), some_pictures(seed)
    model = CLIPModel.from_pretrained(clip_folder).eval().double()
    pixels = image_processor(clip_folder)(images, return_tensors="pt").pixel_values.double()
    with torch.inference_mode():
        x = model.visual_projection(model.vision_model(pixels).pooler_output)
    x = x / (x**2).sum(1, keepdim=True).sqrt()
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    close(extract(images, None), x)
    one_by_one(extract, images)
    save_file({k: v for k, v in state.items() if k != "layers.6.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match="must hold layers.6.bias"):
        EXTRACTORS["aesthetic"].load(paths | {"aesthetic": tmp_path / "less.safetensors"}, "cpu")


# --- ImageReward -----------------------------------------------------------------------------------------------------

WORDS = "a red blue circle square left of stripes very long one ##s".split()


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return path


def torchvision_crop(image, size):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, in numpy."""
    width, height = image.size
    to = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    x = np.array(image.resize(to, Image.Resampling.BICUBIC)).astype(np.float64) / 255
    top, left = round((x.shape[0] - size) / 2.0), round((x.shape[1] - size) / 2.0)
    x = x[top : top + size, left : left + size]
    return torch.from_numpy((x - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).permute(2, 0, 1)


def test_image_reward_is_the_straight_lines(tmp_path, vocabulary, seed):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    prompts = ["A red CIRCLE, left of blue squares", "stripes [ENC] é", "a very " * 60 + "long one"]
    coded = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    images, state = some_pictures(seed), straight.State()
    sizes = 128, 2, 16, 64, 2, len(tokenizer), 40
    x = torch.stack([torchvision_crop(image, 32) for image in images])
    expected = straight.image_reward(state, x, coded.input_ids, coded.attention_mask, sizes)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ImageReward.safetensors")
    paths = {"image-reward": tmp_path / "ImageReward.safetensors", "bert-vocabulary": vocabulary}
    extract = EXTRACTORS["image_reward"].load(paths, "cpu")
    close(extract(images, prompts), expected)
    assert np.ptp(expected.numpy()) > 1e-2
    one_by_one(extract, images, prompts)
    for gone in ("blip.visual_encoder.blocks.1.attn.qkv.bias", "blip.text_encoder.embeddings.word_embeddings.weight"):
        save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "less.safetensors")
        with pytest.raises(InputError, match="1 missing|got none for"):
            EXTRACTORS["image_reward"].load(paths | {"image-reward": tmp_path / "less.safetensors"}, "cpu")


# --- HPS v2.1 --------------------------------------------------------------------------------------------------------


def padded(image, size):
    """The longer side to ``size`` by antialiased bicubic weights (a = -0.5), written out, and black around."""
    x = np.array(image).astype(np.float64) / 255
    scale = size / max(x.shape[:2])
    for axis in (0, 1):
        have = x.shape[axis]
        want = round(have * scale)
        step = have / want
        reach = 2 * max(step, 1)
        rows = np.zeros((want, have))
        for i in range(want):
            centre = (i + 0.5) * step
            for j in range(max(0, int(centre - reach + 0.5)), min(have, int(centre + reach + 0.5))):
                t = abs(j - centre + 0.5) / max(step, 1)
                near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
                rows[i, j] = near if t < 1 else far if t < 2 else 0
        rows /= rows.sum(1, keepdims=True)
        x = np.moveaxis(np.tensordot(rows, x, (1, axis)), 0, axis)
    out = np.zeros((size, size, 3))
    top, left = (size - x.shape[0]) // 2, (size - x.shape[1]) // 2
    out[top : top + x.shape[0], left : left + x.shape[1]] = x
    return torch.from_numpy((out - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(61, 47), (40, 83), (28, 28), (20, 13)])
def test_padding_keeps_the_whole_picture(seed, size):
    image = some_pictures(seed, 1, size)[0]
    assert torch.allclose(pictures.pad_square(image, 28).double(), padded(image, 28), atol=2e-5)


def test_hpsv2_is_the_straight_lines(tmp_path, seed):
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    length = 20
    ids = torch.zeros(len(PROMPTS), length, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        found = tokenizer(prompt, truncation=True, max_length=length).input_ids
        row[: len(found)] = torch.tensor(found)
    images, state = some_pictures(seed), straight.State()
    x = torch.stack([padded(image, 28) for image in images])
    expected = straight.open_clip(state, x, ids, (160, 2, 14, 128, 2, len(tokenizer), 48))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "HPS.safetensors")
    paths = {"hpsv2": tmp_path / "HPS.safetensors", "clip-tokenizer": TOKENIZER / "tokenizer.json"}
    extract = EXTRACTORS["hpsv2"].load(paths, "cpu")
    close(extract(images, PROMPTS), expected)
    assert np.ptp(expected.numpy()) > 1e-3
    one_by_one(extract, images, PROMPTS)
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match="got none for 'visual.proj'"):
        EXTRACTORS["hpsv2"].load(paths | {"hpsv2": tmp_path / "less.safetensors"}, "cpu")


def test_hpsv2_equals_open_clips(tmp_path, seed):
    try:
        from open_clip.model import CLIP
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs open_clip and a torchvision that imports beside this torch: {error}")
    vision = {"layers": 2, "width": 160, "head_width": 80, "mlp_ratio": 2, "patch_size": 14, "image_size": 28}
    text = {"context_length": 20, "vocab_size": len(CLIPTokenizer.from_pretrained(TOKENIZER)), "width": 128}
    theirs = CLIP(48, vision, text | {"heads": 2, "layers": 2, "mlp_ratio": 2}).eval()
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "HPS.safetensors")
    paths = {"hpsv2": tmp_path / "HPS.safetensors", "clip-tokenizer": TOKENIZER / "tokenizer.json"}
    images = some_pictures(seed)
    x = torch.stack([padded(image, 28) for image in images]).float()
    from nitrofusion.evaluate.instruments.hpsv2 import read_tokenizer

    ids = read_tokenizer(paths["clip-tokenizer"], 20)(PROMPTS)
    with torch.inference_mode():
        expected = (theirs.encode_image(x, normalize=True) * theirs.encode_text(ids, normalize=True)).sum(1)
    close(EXTRACTORS["hpsv2"].load(paths, "cpu")(images, PROMPTS), expected)


# --- what they share -------------------------------------------------------------------------------------------------


def test_every_metric_has_its_extractor_and_every_extractor_its_weights():
    assert {metric.extractor for metric in METRICS.values()} == set(EXTRACTORS)
    assert all(name == entry.name for table in (METRICS, EXTRACTORS, WEIGHTS) for name, entry in table.items())
    assert {name for extractor in EXTRACTORS.values() for name in extractor.weights} == set(WEIGHTS)
    assert all(metric.better in ("higher", "lower") for metric in METRICS.values())


def test_pictures_that_cannot_be_read_or_differ_in_size_are_refused(tmp_path, seed):
    good = some_pictures(seed, 3)
    for i, image in enumerate(good):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    assert [image.tobytes() for image in pictures.read_pictures(paths)] == [image.tobytes() for image in good]
    paths[1].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(InputError, match=r"1\.png must be a readable picture"):
        list(pictures.read_pictures(paths))
    paths[1].write_text("no picture")
    with pytest.raises(InputError, match=r"1\.png must be a readable picture"):
        list(pictures.read_pictures(paths))
    some_pictures(seed, 1, (60, 47))[0].save(paths[1])
    with pytest.raises(InputError, match=r"61x47 pixels, got 60x47 in .*1\.png"):
        list(pictures.read_pictures(paths))
    assert len(list(pictures.read_pictures(paths, same_size=False))) == 3


def test_what_is_no_picture_is_refused(clip_folder):
    extract = EXTRACTORS["clip_score"].load({"clip-vit-base-patch32": clip_folder}, "cpu")
    with pytest.raises(InputError, match="PIL pictures, got ndarray"):
        extract([np.zeros((8, 8, 3))], ["x"])


@pytest.mark.parametrize("change", [{"do_center_crop": False}, {"size": {"height": 30, "width": 40}}, {"resample": 9},
                                    {"image_mean": [0.5]}, {"crop_size": {"height": 30, "width": 28}}])  # fmt: skip
def test_another_preparation_is_refused(clip_folder, tmp_path, change):
    told = json.loads((clip_folder / "preprocessor_config.json").read_text()) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="must say: resize the shorter side"):
        pictures.resize_crop_of(tmp_path)


def test_exact_numbers_are_cudnns():
    """Which ``torch.backends.cudnn.flags`` turns off unless it is told not to."""
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with pictures.exact():
        assert cudnn.enabled and cudnn.deterministic and not cudnn.allow_tf32 and not product.allow_tf32
    assert before == (cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision())
