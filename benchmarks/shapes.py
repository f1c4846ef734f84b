"""Models to time and test with that nobody trained: SDXL's form at other sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nitrofusion.models import fp8
from nitrofusion.scheduler import TimestepShiftLCMScheduler
from nitrofusion.world import zoo

TOKENS = 77  # of SDXL's prompts

# 32.9 M parameters: SDXL's three levels, transformers where it has them, heads of 64, a fifth of its width.
SDXL30M = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),  # diffusers' name for the number of heads
    "cross_attention_dim": 256,
    "use_linear_projection": True,
    "norm_num_groups": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 256,
}
POOLED = SDXL30M["projection_class_embeddings_input_dim"] - 6 * SDXL30M["addition_time_embed_dim"]


def sdxl30m(seed: int = 0) -> UNet2DConditionModel:
    """The UNet above with random weights, fp32, in eval mode; the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**SDXL30M).eval().requires_grad_(False)


SDXL = SDXL30M | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # as SDXL's is run where it is repaired for half precision
}
TEXT = (  # of CLIP-L and OpenCLIP-bigG: hidden size, layers, heads, activation
    (768, 12, 12, "quick_gelu"),
    (1280, 32, 20, "gelu"),
)
LORA_RANK = 16


def write_sdxl(folder: Path, device: torch.device, tiny: bool = False) -> None:
    """A student of SDXL's form with random weights in bf16, fp32 on the CPU.

    ``model`` is its diffusers folder, ``taesd`` another decoder, ``lora.safetensors`` a LoRA of every attention layer.

    Args:
        tiny: the same with a thousandth of the weights and pictures of 64x64, to see that all of it runs.
    """
    unet, vae, text = SDXL, VAE, TEXT
    if tiny:
        narrow = {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "sample_size": 8}
        depth = {"transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 16}
        unet = SDXL | narrow | depth | {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 6 * 16 + 32}
        vae = VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 64}
        text = ((32, 2, 2, "quick_gelu"), (32, 2, 2, "gelu"))
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            parts = {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae)}
            tokenizers = [_tokenizer(folder / "model" / name) for name in ("tokenizer", "tokenizer_2")]
            for name, tokenizer, kind, (width, layers, heads, act) in zip(
                ("text_encoder", "text_encoder_2"), tokenizers, (CLIPTextModel, CLIPTextModelWithProjection), text,
                strict=True,
            ):  # fmt: skip
                config = CLIPTextConfig(
                    vocab_size=1024 if tiny else 49408, hidden_size=width, intermediate_size=4 * width,
                    projection_dim=width, num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act,
                    max_position_embeddings=TOKENS, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                parts[name] = kind(config)
            taesd = AutoencoderTiny(scaling_factor=VAE["scaling_factor"])
    finally:
        torch.set_default_dtype(before)
    StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], add_watermarker=False,
        scheduler=zoo.new_scheduler(),
    ).save_pretrained(folder / "model")  # fmt: skip
    TimestepShiftLCMScheduler(shifted_timestep=500).save_pretrained(folder / "model" / "scheduler")
    taesd.save_pretrained(folder / "taesd")
    tensors = {}
    for name, layer in fp8.layers(parts["unet"], (".ff.",)).items():
        for side, shape in (("A", (LORA_RANK, layer.in_features)), ("B", (layer.out_features, LORA_RANK))):
            tensors[f"unet.{name}.lora_{side}.weight"] = 0.01 * torch.randn(shape)
    save_file(tensors, folder / "lora.safetensors")


def _tokenizer(folder: Path) -> CLIPTokenizer:
    zoo.new_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer
