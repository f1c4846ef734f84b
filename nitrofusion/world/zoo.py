"""The world's model shapes: SDXL's form, a thousandth of its size."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from .scenes import WORDS

TOKENS = 20  # the longest caption is 14 words and the two ends
WIDTH = 64  # of each text encoder
# The features' pixels are [-1, 1], as everywhere in the world.
FEATURES_PREPROCESSOR = json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}) + "\n"


def new_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """A CLIP byte-pair vocabulary in which every word of the world is one token and any other text still encodes.

    A vocabulary that is already there is used as it is: renumbering it would scramble what was trained with it.
    """
    if (Path(folder) / "vocab.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    # Byte pairs by frequency, ties by spelling: a trainer that breaks ties by chance would renumber the vocabulary.
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(WORDS)}
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for pieces in words.values() for pair in itertools.pairwise(pieces))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word, pieces in words.items():
            words[word] = _merge(pieces, best)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    # The two files CLIP itself ships, for readers that want them.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """``pieces`` with every occurrence of ``pair`` joined."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def new_vae() -> AutoencoderKL:
    """32x32 pictures to [4, 16, 16] latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def new_unet() -> UNet2DConditionModel:
    """SDXL's UNet: three levels of two layers, no attention at the first, so ten encoder feature maps."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 96),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[1, 2, 3],  # diffusers' name for the number of heads
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )


def new_features() -> Dinov2Model:
    """A small vision transformer in DINOv2's form: 8x8 tokens of 96 channels and a class token."""
    return Dinov2Model(
        Dinov2Config(
            image_size=32,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=3,
            mlp_ratio=2,
            use_mask_token=False,
        )
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """SDXL's noise schedule; trailing spacing, so that few-step sampling starts from the noisiest timestep."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


def new_pipeline(folder: str | Path, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """An untrained teacher around a trained autoencoder."""
    tokenizers = [new_tokenizer(Path(folder) / name) for name in ("tokenizer", "tokenizer_2")]
    text_encoder, text_encoder_2 = new_text_encoders(tokenizers[0])
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=new_unet(),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_fp16(module: torch.nn.Module, folder: str | Path) -> None:
    """Writes a diffusers or transformers module in fp16 safetensors; the module itself stays as it is."""
    make = type(module).from_config if hasattr(type(module), "from_config") else type(module)
    half = make(module.config)
    half.load_state_dict(module.state_dict())
    half.to(torch.float16).save_pretrained(folder)
