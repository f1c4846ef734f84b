"""Adversarial and regression losses as pure functions; every one returns one value per image, [B].

Logits are [B, heads]. Heads are averaged, not summed, so that sampling more of them does not change the step size.
The signs follow the papers the field builds on (ADD eq. 4, StyleGAN); NitroFusion's own digest prints L_D without
fakes, which cannot train a critic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def discriminator_loss(kind: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """[B] loss of the heads. real, fake: [B, heads] logits.

    hinge: relu(1 - real) + relu(1 + fake).  wgan: fake - real.  ns: softplus(-real) + softplus(fake).
    """
    return fake_loss(kind, -real) + fake_loss(kind, fake)


def fake_loss(kind: str, fake: torch.Tensor) -> torch.Tensor:
    """[B] the share of fakes in ``discriminator_loss``; that of real samples is the same of minus their logits."""
    if kind == "hinge":
        return F.relu(1 + fake).mean(1)
    if kind == "wgan":
        return fake.mean(1)
    if kind == "ns":
        return F.softplus(fake).mean(1)
    raise ValueError(f"discriminator_loss: kind must be hinge, wgan or ns, got {kind!r}")


def r1_penalty(logits: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """[B] squared gradient, in the heads' inputs [B, ...], of each image's logits [B, heads] averaged over heads.

    ADD section 3.2: on the features, not the pixels.
    """
    gradients = torch.autograd.grad(logits.mean(1).sum(), inputs, create_graph=True)
    precise = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return sum(g.square().flatten(1).sum(1) for g in precise)


def generator_loss(kind: str, fake: torch.Tensor) -> torch.Tensor:
    """[B] loss of the student. fake: [B, heads] logits. hinge, wgan: -fake.  ns: softplus(-fake)."""
    if kind in ("hinge", "wgan"):
        return -fake.mean(1)
    if kind == "ns":
        return F.softplus(-fake).mean(1)
    raise ValueError(f"generator_loss: kind must be hinge, wgan or ns, got {kind!r}")


def regression_loss(x0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B] mean square error of x0 [B, ...] to the teacher's."""
    return (x0.float() - target.float()).square().flatten(1).mean(1)
