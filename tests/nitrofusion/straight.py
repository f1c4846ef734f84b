"""The instruments' networks as straight lines of arithmetic in float64, over checkpoints in the published layouts.

Each function both writes a layout and computes with it: asked for a tensor that is not there, ``State`` draws it. So
the names in the files are those of the published ones, and the sizes are the test's.
"""

import math

import torch
import torch.nn.functional as F


class State(dict):
    """Tensors by name; ``get`` draws those that are missing."""

    def draw(self, name, *shape, scale=None, offset=0.0):
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            scale = (1 / fan) ** 0.5 if scale is None else scale
            self[name] = torch.randn(*shape) * scale + offset
        return self[name].double()

    def linear(self, x, name, out):
        weight = self.draw(f"{name}.weight", out, x.shape[-1])
        return x @ weight.T + self.draw(f"{name}.bias", out, scale=0.1)

    def norm(self, x, name, eps):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        weight = self.draw(f"{name}.weight", x.shape[-1], scale=0.1, offset=1.0)
        return (x - mean) / (variance + eps).sqrt() * weight + self.draw(f"{name}.bias", x.shape[-1], scale=0.1)


def attend(q, k, v, heads, mask=None):
    """softmax(q k' / sqrt(width)) v, one head and one picture at a time."""
    batch = []
    for b in range(len(q)):
        parts = []
        for q_, k_, v_ in zip(q[b].chunk(heads, -1), k[b].chunk(heads, -1), v[b].chunk(heads, -1), strict=True):
            scores = q_ @ k_.T / math.sqrt(q_.shape[-1])
            scores = scores if mask is None else scores + mask[b]
            parts.append(scores.softmax(-1) @ v_)
        batch.append(torch.cat(parts, -1))
    return torch.stack(batch)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# --- FID's Inception -------------------------------------------------------------------------------------------------


def inception(state, x):
    """Features [n, 2048] of x [n, 3, 299, 299] in [-1, 1]: pytorch-fid's names, TensorFlow's network."""

    def conv(x, name, out, kernel, stride=1, pad=(0, 0)):
        h, w = kernel
        weight = state.draw(f"{name}.conv.weight", out, x.shape[1], h, w, scale=(2 / (x.shape[1] * h * w)) ** 0.5)
        x = F.conv2d(x, weight, None, stride, pad)
        gain = state.draw(f"{name}.bn.weight", out, scale=0.1, offset=1.0)
        shift = state.draw(f"{name}.bn.bias", out, scale=0.1)
        mean = state.draw(f"{name}.bn.running_mean", out, scale=0.1)
        if f"{name}.bn.running_var" not in state:
            state[f"{name}.bn.running_var"] = torch.rand(out) + 0.5
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        variance = state[f"{name}.bn.running_var"].double()
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 0.001).sqrt()
        return (x * gain[:, None, None] + shift[:, None, None]).clamp(min=0)

    def mean_pool(x):
        around = F.pad(x, (1, 1, 1, 1))
        ones = F.pad(torch.ones_like(x), (1, 1, 1, 1))
        return F.avg_pool2d(around, 3, 1) / F.avg_pool2d(ones, 3, 1)

    one, three, five = (1, 1), (3, 3), (5, 5)
    row, column, row3, column3 = (1, 7), (7, 1), (1, 3), (3, 1)
    x = conv(x, "Conv2d_1a_3x3", 32, three, 2)
    x = conv(x, "Conv2d_2a_3x3", 32, three)
    x = conv(x, "Conv2d_2b_3x3", 64, three, pad=(1, 1))
    x = F.max_pool2d(x, 3, 2)
    x = conv(x, "Conv2d_3b_1x1", 80, one)
    x = conv(x, "Conv2d_4a_3x3", 192, three)
    x = F.max_pool2d(x, 3, 2)
    for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        a = conv(x, f"{name}.branch1x1", 64, one)
        b = conv(x, f"{name}.branch5x5_1", 48, one)
        b = conv(b, f"{name}.branch5x5_2", 64, five, pad=(2, 2))
        c = conv(x, f"{name}.branch3x3dbl_1", 64, one)
        c = conv(c, f"{name}.branch3x3dbl_2", 96, three, pad=(1, 1))
        c = conv(c, f"{name}.branch3x3dbl_3", 96, three, pad=(1, 1))
        x = torch.cat([a, b, c, conv(mean_pool(x), f"{name}.branch_pool", pool, one)], 1)
    a = conv(x, "Mixed_6a.branch3x3", 384, three, 2)
    b = conv(x, "Mixed_6a.branch3x3dbl_1", 64, one)
    b = conv(b, "Mixed_6a.branch3x3dbl_2", 96, three, pad=(1, 1))
    b = conv(b, "Mixed_6a.branch3x3dbl_3", 96, three, 2)
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        a = conv(x, f"{name}.branch1x1", 192, one)
        b = conv(x, f"{name}.branch7x7_1", inner, one)
        b = conv(b, f"{name}.branch7x7_2", inner, row, pad=(0, 3))
        b = conv(b, f"{name}.branch7x7_3", 192, column, pad=(3, 0))
        c = conv(x, f"{name}.branch7x7dbl_1", inner, one)
        c = conv(c, f"{name}.branch7x7dbl_2", inner, column, pad=(3, 0))
        c = conv(c, f"{name}.branch7x7dbl_3", inner, row, pad=(0, 3))
        c = conv(c, f"{name}.branch7x7dbl_4", inner, column, pad=(3, 0))
        c = conv(c, f"{name}.branch7x7dbl_5", 192, row, pad=(0, 3))
        x = torch.cat([a, b, c, conv(mean_pool(x), f"{name}.branch_pool", 192, one)], 1)
    a = conv(x, "Mixed_7a.branch3x3_1", 192, one)
    a = conv(a, "Mixed_7a.branch3x3_2", 320, three, 2)
    b = conv(x, "Mixed_7a.branch7x7x3_1", 192, one)
    b = conv(b, "Mixed_7a.branch7x7x3_2", 192, row, pad=(0, 3))
    b = conv(b, "Mixed_7a.branch7x7x3_3", 192, column, pad=(3, 0))
    b = conv(b, "Mixed_7a.branch7x7x3_4", 192, three, 2)
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    for name in ("Mixed_7b", "Mixed_7c"):
        a = conv(x, f"{name}.branch1x1", 320, one)
        b = conv(x, f"{name}.branch3x3_1", 384, one)
        b = [conv(b, f"{name}.branch3x3_2a", 384, row3, pad=(0, 1)),
             conv(b, f"{name}.branch3x3_2b", 384, column3, pad=(1, 0))]  # fmt: skip
        c = conv(x, f"{name}.branch3x3dbl_1", 448, one)
        c = conv(c, f"{name}.branch3x3dbl_2", 384, three, pad=(1, 1))
        c = [conv(c, f"{name}.branch3x3dbl_3a", 384, row3, pad=(0, 1)),
             conv(c, f"{name}.branch3x3dbl_3b", 384, column3, pad=(1, 0))]  # fmt: skip
        pool = mean_pool(x) if name == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([a, *b, *c, conv(pool, f"{name}.branch_pool", 192, one)], 1)
    state.draw("fc.weight", 1008, 2048)
    state.draw("fc.bias", 1008)
    return x.mean((2, 3))


# --- ImageReward's BLIP ----------------------------------------------------------------------------------------------


def image_reward(state, x, ids, mask, sizes):
    """Rewards [n] of pictures x [n, 3, s, s] and tokens ids, mask [n, l], in ImageReward.pt's names.

    sizes: vision width and blocks, patch; text width and blocks, words, positions.
    """
    width, blocks, patch, text_width, text_blocks, words, positions = sizes
    n, at = len(x), "blip.visual_encoder."
    weight = state.draw(f"{at}patch_embed.proj.weight", width, 3, patch, patch)
    x = F.conv2d(x, weight, state.draw(f"{at}patch_embed.proj.bias", width, scale=0.1), patch).flatten(2).mT
    x = torch.cat([state.draw(f"{at}cls_token", 1, 1, width, scale=0.5).expand(n, 1, width), x], 1)
    x = x + state.draw(f"{at}pos_embed", 1, x.shape[1], width, scale=0.5)
    for i in range(blocks):
        b = f"{at}blocks.{i}."
        q, k, v = state.linear(state.norm(x, f"{b}norm1", 1e-6), f"{b}attn.qkv", 3 * width).chunk(3, -1)
        x = x + state.linear(attend(q, k, v, width // 64), f"{b}attn.proj", width)
        inner = gelu(state.linear(state.norm(x, f"{b}norm2", 1e-6), f"{b}mlp.fc1", 2 * width))
        x = x + state.linear(inner, f"{b}mlp.fc2", width)
    seen = state.norm(x, f"{at}norm", 1e-6)
    at = "blip.text_encoder."
    state[f"{at}embeddings.position_ids"] = torch.arange(positions)[None]
    x = state.draw(f"{at}embeddings.word_embeddings.weight", words, text_width, scale=1.0)[ids]
    x = x + state.draw(f"{at}embeddings.position_embeddings.weight", positions, text_width, scale=1.0)[: ids.shape[1]]
    x = state.norm(x, f"{at}embeddings.LayerNorm", 1e-12)
    hidden = (1 - mask.double())[:, None, :] * -1e9
    for i in range(text_blocks):
        for kind, over in (("attention", None), ("crossattention", seen)):
            b = f"{at}encoder.layer.{i}.{kind}."
            source = x if over is None else over
            q = state.linear(x, f"{b}self.query", text_width)
            k, v = (state.linear(source, f"{b}self.{name}", text_width) for name in ("key", "value"))
            found = attend(q, k, v, text_width // 64, hidden if over is None else None)
            x = state.norm(state.linear(found, f"{b}output.dense", text_width) + x, f"{b}output.LayerNorm", 1e-12)
        b = f"{at}encoder.layer.{i}."
        inner = gelu(state.linear(x, f"{b}intermediate.dense", 2 * text_width))
        x = state.norm(state.linear(inner, f"{b}output.dense", text_width) + x, f"{b}output.LayerNorm", 1e-12)
    for name, of in (("vision_proj", width), ("text_proj", text_width)):  # in the file, not in the score
        state.draw(f"blip.{name}.weight", 256, of)
        state.draw(f"blip.{name}.bias", 256)
    x = x[:, 0]
    for number, out in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        x = state.linear(x, f"mlp.layers.{number}", out)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


# --- open_clip's CLIP, which HPS v2.1 is -----------------------------------------------------------------------------


def open_clip(state, x, ids, sizes):
    """Cosines [n] of pictures x [n, 3, s, s] and tokens ids [n, l], in open_clip's names for ViT-H-14.

    sizes: vision width and blocks, patch; text width and blocks, words; width of the embeddings.
    """
    width, blocks, patch, text_width, text_blocks, words, dim = sizes

    def block(x, name, heads, mask=None):
        inner = state.norm(x, f"{name}.ln_1", 1e-5)
        weight = state.draw(f"{name}.attn.in_proj_weight", 3 * x.shape[-1], x.shape[-1])
        bias = state.draw(f"{name}.attn.in_proj_bias", 3 * x.shape[-1], scale=0.1)
        q, k, v = (inner @ weight.T + bias).chunk(3, -1)
        x = x + state.linear(attend(q, k, v, heads, mask), f"{name}.attn.out_proj", x.shape[-1])
        inner = gelu(state.linear(state.norm(x, f"{name}.ln_2", 1e-5), f"{name}.mlp.c_fc", 2 * x.shape[-1]))
        return x + state.linear(inner, f"{name}.mlp.c_proj", x.shape[-1])

    n = len(x)
    x = F.conv2d(x, state.draw("visual.conv1.weight", width, 3, patch, patch), None, patch).flatten(2).mT
    x = torch.cat([state.draw("visual.class_embedding", width, scale=0.5).expand(n, 1, width), x], 1)
    x = x + state.draw("visual.positional_embedding", x.shape[1], width, scale=0.5)
    x = state.norm(x, "visual.ln_pre", 1e-5)
    for i in range(blocks):
        x = block(x, f"visual.transformer.resblocks.{i}", width // 80)
    seen = state.norm(x[:, 0], "visual.ln_post", 1e-5) @ state.draw("visual.proj", width, dim)
    length = ids.shape[1]
    x = state.draw("token_embedding.weight", words, text_width, scale=1.0)[ids]
    x = x + state.draw("positional_embedding", length, text_width, scale=0.5)
    mask = torch.full((n, length, length), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(text_blocks):
        x = block(x, f"transformer.resblocks.{i}", text_width // 64, mask)
    x = state.norm(x, "ln_final", 1e-5)
    told = torch.stack([row[i] for row, i in zip(x, ids.argmax(1), strict=True)])
    told = told @ state.draw("text_projection", text_width, dim)
    state["logit_scale"] = torch.tensor(math.log(1 / 0.07))
    return (seen * told).sum(1) / seen.norm(dim=1) / told.norm(dim=1)
