"""Models to time and test with that nobody trained: SDXL's form at other sizes."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

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
