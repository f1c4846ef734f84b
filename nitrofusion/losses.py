"""Losses as pure functions: adversarial, regression, score distillation. A loss is one value per image, [B].

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


def score_gradient(eps_real: torch.Tensor, eps_fake: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, ...] w(t) (eps_real - eps_fake), weight [B]: variational score distillation's gradient in x0.

    With weight sigma_t^2 (SwiftBrush, and SNOOPI's PG-SB, which guides both predictions by one scale) its expectation
    is the gradient of sigma_t^3 / alpha_t times the KL divergence, at t, of fake from real.
    """
    return weight.view(-1, *[1] * (eps_real.ndim - 1)) * (eps_real.float() - eps_fake.float())


def distribution_matching_gradient(x0: torch.Tensor, x0_real: torch.Tensor, x0_fake: torch.Tensor) -> torch.Tensor:
    """[B, ...] (x0_fake - x0_real) / mean|x0 - x0_real|, the mean over each image (DMD, equation 8; DMD2).

    Args:
        x0: [B, ...] the student's samples. x0_real, x0_fake: where two models take them for having come from.

    A value that is not finite (the mean may be 0) becomes 0.
    """
    scale = (x0 - x0_real).abs().flatten(1).mean(1).view(-1, *[1] * (x0.ndim - 1))
    return torch.nan_to_num((x0_fake - x0_real) / scale, 0.0, 0.0, 0.0)


def gradient_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """[B] 0.5 mean (x0 - stopgrad(x0 - gradient))^2: its derivative in x0 [B, ...] is gradient / elements of an image.

    Written without the difference of two almost equal numbers.
    """
    return 0.5 * (x0 - x0.detach() + gradient.detach()).square().flatten(1).mean(1)


def epsilon_loss(eps: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """[B] mean square error of a predicted noise [B, ...], times weight [B] where there is one."""
    error = (eps.float() - noise.float()).square().flatten(1).mean(1)
    return error if weight is None else weight * error


def clamped_similarity_loss(images: torch.Tensor, texts: torch.Tensor, tau: float) -> torch.Tensor:
    """[B] max(0, tau - cos(images, texts)) of embeddings [B, D] (SwiftBrush v2, section 4.3)."""
    return F.relu(tau - F.cosine_similarity(images.float(), texts.float(), dim=1))


def distillation_weight(kind: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[B] c(t) of ADD's distillation (section 3.3, appendix A), from the noise schedule at t, each [B].

    exponential: alpha.  sds, nfsd: w alpha / (2 sigma) with DreamFusion's w = sigma^2, with which the gradient of
    c (x0 - target)^2 in x0 is w times the direction that ``distillation_target`` was given.
    """
    if kind == "exponential":
        return alpha
    if kind in ("sds", "nfsd"):
        return sigma.square() * alpha / (2 * sigma)
    raise ValueError(f"distillation_weight: kind must be exponential, sds or nfsd, got {kind!r}")


def distillation_target(
    x0: torch.Tensor, direction: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """[B, ...] x0 - (sigma / alpha) direction, without gradient; alpha, sigma [B].

    For the direction eps - noise that is the teacher's own x0 from x_t = alpha x0 + sigma noise.
    """
    ratio = (sigma / alpha).view(-1, *[1] * (x0.ndim - 1))
    return (x0 - ratio * direction).detach()


def nfsd_direction(
    eps_null: torch.Tensor, eps_text: torch.Tensor, eps_negative: torch.Tensor, t: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """[B, ...] delta_D + s delta_C of noise-free score distillation (arXiv 2310.17590, section 4); t [B].

    delta_C = eps_text - eps_null. delta_D, what leads to clean pictures, is eps_null below t = 200, where it holds
    hardly any noise, and eps_null - eps_negative above, where the noise cancels. The noise itself is never subtracted.
    """
    early = (t < 200).view(-1, *[1] * (eps_null.ndim - 1))
    clean = torch.where(early, eps_null, eps_null - eps_negative)
    return clean + guidance_scale * (eps_text - eps_null)
