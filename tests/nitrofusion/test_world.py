"""Scenes, captions and renderer: deterministic, unlimited, and true to their attributes."""

import itertools

import numpy as np
import pytest
import torch

from nitrofusion.world.render import render
from nitrofusion.world.scenes import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    RELATIONS,
    SHAPES,
    parse_caption,
    sample_scenes,
)


def test_scene_i_does_not_depend_on_the_batch():
    whole = sample_scenes(40, seed=9)
    part = sample_scenes(7, seed=9, start=13)
    assert whole.captions()[13:20] == part.captions()
    assert torch.equal(render(whole)[13:20], render(part))
    assert whole.captions() != sample_scenes(40, seed=10).captions()


def test_captions_parse_back_to_the_attributes():
    scenes = sample_scenes(3000, seed=1)
    for caption, truth in zip(scenes.captions(), scenes.attributes(), strict=True):
        assert np.array_equal(parse_caption(caption), truth), caption


def test_every_value_occurs_about_equally():
    scenes = sample_scenes(6000, seed=2)
    for values, n in ((scenes.shape[:, 0], len(SHAPES)), (scenes.color[:, 1], len(COLORS)), (scenes.background, 5)):
        counts = np.bincount(values, minlength=n)
        assert counts.min() > 0.85 * 6000 / n
    assert 0.27 < (scenes.relation < 0).mean() < 0.33


def test_mirror_sentences_mean_the_same_picture():
    a = parse_caption("a red circle left of a striped blue ring on an olive background")
    b = parse_caption("a striped blue ring right of a plain red circle on an olive background")
    assert np.array_equal(a, b)


@pytest.mark.parametrize("caption", ["", "a cat", "a red circle", "a red ring under a blue ring on a gray background"])
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="caption must be"):
        parse_caption(caption)


def test_pictures_are_in_range_and_finite():
    pictures = render(sample_scenes(65, seed=3))
    assert pictures.shape == (65, 3, 32, 32) and pictures.dtype == torch.float32
    assert torch.isfinite(pictures).all() and pictures.min() >= -1 and pictures.max() <= 1
    assert render(sample_scenes(0, seed=3)).shape == (0, 3, 32, 32)


def test_objects_do_not_touch_and_stay_inside():
    scenes = sample_scenes(4000, seed=4)
    pair = scenes.relation >= 0
    gap = np.linalg.norm(scenes.center[pair, 0] - scenes.center[pair, 1], axis=-1) - scenes.radius[pair].sum(1)
    assert gap.min() > 0
    edge = np.minimum(scenes.center, 1 - scenes.center).min(-1) - scenes.radius
    assert edge[pair].min() > 0 and edge[~pair][:, 0].min() > 0


def test_attributes_change_the_picture():
    """Pictures that differ in one word differ where it matters: a brute-force check over colours and shapes."""
    base = sample_scenes(1, seed=5)
    seen = []
    for shape, color in itertools.product(range(len(SHAPES)), range(len(COLORS))):
        base.shape[0, 0], base.color[0, 0] = shape, color
        seen.append(render(base)[0].flatten())
    distance = torch.cdist(torch.stack(seen), torch.stack(seen))
    assert distance[~torch.eye(len(seen), dtype=torch.bool)].min() > 0.5


def test_words_used():
    text = " ".join(sample_scenes(500, seed=6).captions())
    for word in (*SHAPES, *COLORS, *PATTERNS, *RELATIONS, *BACKGROUNDS):
        assert word in text
