"""An SDXL pipeline's tensors under the names of LDM and ComfyUI single files, written out by hand."""

from __future__ import annotations

import re

import torch

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"down_blocks\.(\d)\.resnets\.": r"down.\1.block.",
    r"down_blocks\.(\d)\.downsamplers\.0\.": r"down.\1.downsample.",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
}
_CLIP = {
    r"embeddings\.token_embedding": "token_embedding",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"encoder\.layers\.": "transformer.resblocks.",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"final_layer_norm": "ln_final",
}


def unet_name(name: str) -> str:
    """Of SDXL's form: three levels of two layers, attention at the lower two."""
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    if name.startswith("mid_block"):
        _, kind, index, rest = name.split(".", 3)
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(index)}"
    else:
        side, level, kind, index, rest = name.split(".", 4)
        level, index, down = int(level), int(index), side == "down_blocks"
        block = 3 * level + index + down
        if kind == "downsamplers":
            return f"input_blocks.{3 * (level + 1)}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.{2 if level < 2 else 1}.conv.{leaf}"
        place = f"{'input' if down else 'output'}_blocks.{block}.{int(kind == 'attentions')}"
        if kind == "attentions":
            return f"{place}.{rest}"
    if kind == "resnets":
        part, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{leaf}"
    return f"{place}.{rest}"


def vae_tensors(vae) -> dict[str, torch.Tensor]:
    out, levels = {}, len(vae.config.block_out_channels)
    for name, value in vae.state_dict().items():
        if "attentions" in name and name.endswith("weight") and "group_norm" not in name:
            value = value[:, :, None, None]
        for pattern, new in _VAE.items():
            name = re.sub(pattern, new, name)
        up = re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name)
        if up:
            inner = f"block.{up[3]}" if up[2] == "resnets" else "upsample"
            name = f"decoder.up.{levels - 1 - int(up[1])}.{inner}.{up[4]}"
        out[name] = value
    return out


def clip_tensors(encoder) -> dict[str, torch.Tensor]:
    """OpenCLIP's names, where query, key and value are one tensor."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {"text_projection": state.pop("text_projection.weight").T}
    for name, value in state.items():
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for pattern, new in _CLIP.items():
            name = re.sub(pattern, new, name)
        out[name] = value
    return out


def checkpoint(model) -> dict[str, torch.Tensor]:
    """UNet, VAE and both text encoders of a loaded ``sdxl.SDXL`` in one dictionary."""
    first = {k.removeprefix("text_model."): v for k, v in model.text_encoders[0].state_dict().items()}
    parts = {
        UNET: {unet_name(k): v for k, v in model.unet.state_dict().items()},
        VAE: vae_tensors(model.vae),
        "conditioner.embedders.0.transformer.text_model.": first,
        "conditioner.embedders.1.model.": clip_tensors(model.text_encoders[1]),
    }
    return {prefix + k: v.contiguous().clone() for prefix, part in parts.items() for k, v in part.items()}
