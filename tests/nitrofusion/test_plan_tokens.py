"""The plans' tokens and the place they pool at, against transformers."""

import json
import shutil

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from nitrofusion.engine.plans.clip import TextPlan
from nitrofusion.engine.plans.executor import read_tokenizer
from nitrofusion.engine.plans.weights import Unsupported
from nitrofusion.presets import WORLD
from nitrokernels import plan

PROMPTS = ("", "!", "wow! a ring", "wow!! a red ring on a navy background!", "a ring<|endoftext|>!", "[PAD] a")


def edit(path, **values):
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (told | values).items() if v is not ...}))


def saved_by_transformers(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(folder)


def without_a_file_of_its_own(folder):
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", pad_token="!")


BANG = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        saved_by_transformers,
        without_a_file_of_its_own,
        lambda folder: edit(folder / "tokenizer_config.json", pad_token="!"),
        lambda folder: edit(folder / "tokenizer_config.json", pad_token=...),
        lambda folder: edit(folder / "tokenizer_config.json", unk_token="!"),
        lambda folder: edit(folder / "tokenizer_config.json", added_tokens_decoder={"0": BANG}, pad_token="!"),
        lambda folder: edit(folder / "tokenizer_config.json", additional_special_tokens=["ring"]),
        lambda folder: edit(folder / "special_tokens_map.json", pad_token="!"),
        lambda folder: edit(folder / "special_tokens_map.json", pad_token=BANG),
        lambda folder: edit(folder / "added_tokens.json", ring=5),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path, change):
    folder = shutil.copytree(WORLD / "teacher/tokenizer_2", tmp_path / "tokenizer_2")
    change(folder)
    made, expected = read_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    length = expected.model_max_length
    for prompt in PROMPTS:
        ids = expected(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        assert made.encode(prompt).ids == ids, prompt


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_the_left_is_left_to_transformers(tmp_path, side):
    folder = shutil.copytree(WORLD / "teacher/tokenizer", tmp_path / "tokenizer")
    edit(folder / "tokenizer_config.json", **{side: "left"})
    with pytest.raises(Unsupported, match=f"{side} is 'left'"):
        read_tokenizer(folder)


@pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("ids", [[0, 60, 9, 49407, 60, 70], [0, 60, 49409, 9, 49407, 2], [0, 60, 49409, 9, 8, 7]])
def test_where_a_prompt_ends(ids, silent):
    """A configuration without eos_token_id means transformers' 49407, not the 2 that old ones had wrong."""
    torch.manual_seed(0)
    values = CLIPTextConfig(
        vocab_size=49410, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, projection_dim=8, eos_token_id=2,
    ).to_dict()  # fmt: skip
    if silent:
        del values["eos_token_id"]
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(values)).eval()
    with torch.no_grad():
        expected = encoder(torch.tensor([ids])).text_embeds[0]
    _, pooled = TextPlan(values, encoder.state_dict(), True)(ids)
    assert (pooled - expected).abs().max() <= 1e-5
