"""Random SDXL-form UNets: widths, depths, heads, with and without attention in the middle, uneven blocks."""

from __future__ import annotations

import random

import torch
from diffusers import UNet2DConditionModel


def random_unet(seed: int) -> tuple[UNet2DConditionModel, dict]:
    """A UNet and one call's inputs: sample [1, 4, h, w], encoder_hidden_states, text_embeds, time_ids."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    levels, groups = rng.choice([1, 2, 3]), rng.choice([2, 4, 8])
    dim = rng.choice([8, 16, 24])
    widths = [dim * rng.choice([1, 2, 3]) * (1 if groups <= 4 else 2) for _ in range(levels)]
    widths = [w - w % groups if w % groups == 0 or w > groups else groups for w in widths]
    widths = [w if w % dim == 0 else dim * groups for w in widths]
    cross = [rng.random() < 0.7 for _ in range(levels)]
    depth = [rng.choice([1, 2]) for _ in range(levels)]
    layers = rng.choice([1, 2])
    options = {}
    if rng.random() < 0.3 and layers == 2:  # blocks of one level with unlike depths, as SSD-1B has
        options["transformer_layers_per_block"] = [[rng.choice([1, 2]) for _ in range(layers)] for _ in range(levels)]
        options["reverse_transformer_layers_per_block"] = [
            [rng.choice([1, 2]) for _ in range(layers + 1)] for _ in range(levels)
        ]
        middle = None if rng.random() < 0.5 else "UNetMidBlock2D"
    else:
        options["transformer_layers_per_block"] = depth
        middle = rng.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])
    context, pooled, tokens = rng.choice([8, 24, 40]), rng.choice([8, 20]), rng.choice([1, 5, 77])
    added = rng.random() < 0.8
    if added:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + pooled,
        }
    height, width = (2 ** (levels - 1) * rng.choice([1, 2, 3, 4]) for _ in range(2))
    unet = UNet2DConditionModel(
        sample_size=max(height, width),
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        mid_block_type=middle,
        layers_per_block=layers,
        attention_head_dim=[w // dim for w in widths],
        norm_num_groups=groups,
        cross_attention_dim=context,
        use_linear_projection=rng.random() < 0.7,
        flip_sin_to_cos=rng.random() < 0.8,
        freq_shift=rng.choice([0, 1]),
        **options,
    ).eval()
    for p in unet.parameters():  # norms and biases too, which begin as ones and zeros
        p.data += 0.05 * torch.randn_like(p)
    inputs = {
        "sample": torch.randn(1, 4, height, width),
        "encoder_hidden_states": torch.randn(1, tokens, context),
        "text_embeds": torch.randn(1, pooled),
        "time_ids": torch.tensor([[64.0, 64, 0, 8, 64, 48]]),
    }
    return unet.requires_grad_(False), inputs
