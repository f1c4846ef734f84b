"""Builds the embedded world's models from nothing: vae, judge, features, teacher.

Each stage checkpoints every two minutes and goes on where it stopped when the same command runs again::

    torchrun --nproc_per_node 2 -m nitrofusion.world.build vae --output runs/world --steps 1500
    torchrun --nproc_per_node 2 -m nitrofusion.world.build teacher --output runs/world --steps 4000

Two single-thread processes train these small models about 1.6x as fast as one process with two threads.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from ..models.writing import name_as_published
from . import zoo
from .judge import Judge, judge_loss
from .render import render
from .scenes import ATTRIBUTES, COLORS, PATTERNS, SHAPES, sample_scenes

HELD_OUT_SEED = 7_000_000  # scenes no stage trains on: training seeds count up from 0


class Stage:
    """Data-parallel training of one module with a cosine schedule, EMA and resume."""

    def __init__(self, name, modules: dict, args, lr: float, ema_decay: float = 0.998, batch_size: int = 64):
        self.name, self.args, self.lr, self.batch_size = name, args, lr, batch_size
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.modules = torch.nn.ModuleDict(modules)
        self.params = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = [p.detach().clone() for p in self.params]
        self.ema_decay, self.step, self.seconds = ema_decay, 0, 0.0
        self.folder = Path(args.output) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _resume(self):
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        state = load_file(path)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        moments = {}
        for i, p in enumerate(self.params):
            p.data.copy_(state[f"p.{i}"])
            self.ema[i].copy_(state[f"ema.{i}"])
            moments[i] = {
                "step": torch.tensor(float(self.step)), "exp_avg": state[f"m.{i}"], "exp_avg_sq": state[f"v.{i}"],
            }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def save(self):
        if self.rank:
            return
        state = {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds)}
        for i, p in enumerate(self.params):
            s = self.optimizer.state[p]
            tensors = {f"p.{i}": p, f"ema.{i}": self.ema[i], f"m.{i}": s["exp_avg"], f"v.{i}": s["exp_avg_sq"]}
            state.update({k: v.detach().contiguous().clone() for k, v in tensors.items()})
        tmp = self.folder / "state.tmp"
        save_file(state, tmp)
        tmp.rename(self.folder / "state.safetensors")

    @torch.no_grad()
    def use_ema(self):
        """Swaps the averaged weights in (call twice to swap back)."""
        for p, e in zip(self.params, self.ema, strict=True):
            held = p.detach().clone()
            p.copy_(e)
            e.copy_(held)

    def run(self, loss_fn, evaluate, eval_every: int, warmup: int = 100):
        saved = started = time.monotonic()
        began, base = self.step, self.seconds
        while self.step < self.args.steps:
            seed = self.step * self.world_size + self.rank
            torch.manual_seed(seed)
            rate = min(1.0, (self.step - self.args.restart + 1) / warmup)
            progress = (self.step - self.args.restart) / (self.args.steps - self.args.restart)
            rate *= max(0.5 * (1 + math.cos(math.pi * progress)), 0.01)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.args.lr_scale * rate
            loss, parts = loss_fn(seed)
            self.optimizer.zero_grad(set_to_none=False)
            loss.backward()
            if self.world_size > 1:
                flat = torch.cat([p.grad.flatten() for p in self.params])
                dist.all_reduce(flat)
                grads = flat.div_(self.world_size).split([p.numel() for p in self.params])
                for p, g in zip(self.params, grads, strict=True):
                    p.grad.copy_(g.view_as(p))
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
            now = time.monotonic()
            self.seconds = base + now - started
            if self.step % 20 == 0 and self.rank == 0:
                left = (now - started) / (self.step - began) * (self.args.steps - self.step)
                line = {"step": self.step, "seconds": round(self.seconds), "left": round(left), "loss": loss.item()}
                line |= {k: float(v) for k, v in parts.items()}
                print(json.dumps(line), flush=True)
                with open(self.folder / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            if self.step % eval_every == 0 or self.step == self.args.steps:
                self.use_ema()
                if self.rank == 0:
                    line = {"step": self.step, "seconds": round(self.seconds), **evaluate()}
                    print(json.dumps(line), flush=True)
                    with open(self.folder / "eval.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
                self.use_ema()
            if now - saved > 120 or self.step == self.args.steps:
                self.save()
                saved = now


def build_vae(args):
    """Autoencoder: Gaussian likelihood with pixel noise 0.02, plus an L1 on image gradients for sharp edges."""
    vae = zoo.new_vae()
    stage = Stage("vae", {"vae": vae}, args, lr=2e-3, batch_size=48)
    held_out = render(sample_scenes(512, HELD_OUT_SEED))

    def gradients(x):
        return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()

    pictures = render(sample_scenes(8192, 0, start=stage.rank * 8192))

    def loss_fn(seed):
        x = pictures[torch.randint(len(pictures), (stage.batch_size,))]
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(x)).float()
            posterior = DiagonalGaussianDistribution(moments)
            y = vae.decode(posterior.sample()).sample.float()
        mse = (y - x).square().mean()
        kl = posterior.kl().mean() * (2 * 0.02**2 / x[0].numel())
        return mse + kl + 0.02 * gradients(y - x), {"psnr": 10 * math.log10(4 / mse.item()), "kl": kl}

    @torch.no_grad()
    def evaluate():
        z = vae.encode(held_out).latent_dist
        psnr = lambda y: 10 * math.log10(4 / (y - held_out).square().mean().item())  # noqa: E731
        result = {"psnr": psnr(vae.decode(z.mode()).sample), "psnr_sampled": psnr(vae.decode(z.sample()).sample)}
        std = z.mode().std()
        vae.register_to_config(scaling_factor=round(1 / std.item(), 5))
        if stage.rank == 0:
            zoo.save_fp16(vae, Path(args.output) / "teacher" / "vae")
        return result | {"scaling_factor": vae.config.scaling_factor}

    stage.run(loss_fn, evaluate, eval_every=200)


def build_judge(args):
    judge = Judge()
    stage = Stage("judge", {"judge": judge}, args, lr=2e-3, batch_size=96)
    held_out = sample_scenes(4000, HELD_OUT_SEED)
    pictures, truth = render(held_out), torch.from_numpy(held_out.attributes())

    def loss_fn(seed):
        scenes = sample_scenes(stage.batch_size, 1, start=seed * stage.batch_size)
        x = render(scenes)
        x = x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.1  # tolerate a little grain
        loss = judge_loss(judge(x)[0], torch.from_numpy(scenes.attributes()))
        return loss, {}

    def evaluate():
        right = torch.cat([judge.correct(x, a) for x, a in zip(pictures.split(500), truth.split(500), strict=True)])
        save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, Path(args.output) / "judge.safetensors")
        return {"all_right": right.all(1).float().mean().item(), "each": right.float().mean(0).tolist()}

    stage.run(loss_fn, evaluate, eval_every=200)


def build_features(args):
    """The feature network of ADD's heads: a vision transformer that says what is where.

    Its class token reads a scene's attributes, each patch what lies there: from attributes alone so small a transformer
    learns shapes slowly. It is not the judge, which measures: another architecture, another task, other scenes.
    """
    network = zoo.new_features()
    network.set_attn_implementation("eager")  # the faster one here in bfloat16
    width, looks = network.config.hidden_size, (len(SHAPES), len(COLORS), len(PATTERNS))
    whole = torch.nn.Linear(width, sum(ATTRIBUTES.values()))
    local = torch.nn.Linear(width, sum(looks) + len(looks))  # and for each, nothing
    stage = Stage("features_state", {"network": network, "whole": whole, "local": local}, args, lr=2e-3)
    held_out = sample_scenes(2000, HELD_OUT_SEED)
    held_out_pictures, truth = render(held_out), torch.from_numpy(held_out.attributes())
    count = 12_288
    scenes = sample_scenes(count, 4, start=stage.rank * count)
    cache = Path(args.output) / f"pictures-{stage.rank}.safetensors"
    if not cache.exists():  # drawing a picture costs more than learning from it
        save_file({"pictures": render(scenes).half()}, cache)
    pictures = load_file(cache)["pictures"]
    attributes = torch.from_numpy(scenes.attributes())
    side = network.config.image_size // network.config.patch_size

    def patch_labels(part, down, right):
        """Three of [n * patches]: shape, colour, pattern of the object around a patch's middle, 0 where none is."""
        axis = (torch.arange(side) + 0.5) / side
        at = torch.stack(torch.meshgrid(axis - right / 32, axis - down / 32, indexing="xy")).view(1, 1, 2, -1)
        away = (at - torch.from_numpy(part.center).float()[..., None]).norm(dim=2)  # [n, 2, patches]
        near = away < torch.from_numpy(part.radius).float()[..., None]
        near[:, 1] &= torch.from_numpy(part.relation >= 0)[:, None]
        labels = []
        for values in (part.shape, part.color, part.pattern):
            first, second = torch.from_numpy(values + 1).unbind(1)
            label = torch.where(near[:, 0], first[:, None], second[:, None] * near[:, 1])
            labels.append(label.flatten())
        return labels

    def loss_fn(seed):
        index = torch.randint(count, (stage.batch_size,))
        x, (down, right) = pictures[index].float(), torch.randint(-2, 3, (2,)).tolist()
        x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) + 0.05 * torch.randn(len(x), 3, 1, 1)  # contrast, tint
        x = x.roll((down, right), (2, 3)) + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = network(x).last_hidden_state
            from_class, from_patches = whole(tokens[:, 0]).float(), local(tokens[:, 1:]).float()
        first = judge_loss(from_class, attributes[index])
        parts = from_patches.flatten(0, 1).split([n + 1 for n in looks], 1)
        labels = patch_labels(scenes[index.numpy()], down, right)
        dense = sum(torch.nn.functional.cross_entropy(p, label) for p, label in zip(parts, labels, strict=True))
        return first + 3 * dense, {"class": first, "patches": dense}

    @torch.no_grad()
    def evaluate():
        logits = torch.cat([whole(network(x).last_hidden_state[:, 0]) for x in held_out_pictures.split(250)])
        guess = torch.stack([part.argmax(1) for part in logits.split(list(ATTRIBUTES.values()), 1)], 1)
        right = (guess == truth) | (truth < 0)
        folder = Path(args.output) / "features"
        zoo.save_fp16(network, folder)
        (folder / "preprocessor_config.json").write_text(zoo.FEATURES_PREPROCESSOR)
        return {"all_right": right.all(1).float().mean().item(), "each": right.float().mean(0).tolist()}

    stage.run(loss_fn, evaluate, eval_every=200)


def encode_prompts(pipeline, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, TOKENS] ids to prompt embeddings [n, TOKENS, 2 * WIDTH] and pooled [n, WIDTH], as the SDXL pipeline does."""
    first = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipeline.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


@torch.no_grad()
def draw(pipeline, captions, seed: int, steps: int, guidance_scale: float) -> torch.Tensor:
    """[n, 3, 32, 32] pictures of the pipeline, one generator per picture."""
    pictures = []
    for i in range(0, len(captions), 128):
        batch = captions[i : i + 128]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(batch))]
        out = pipeline(
            batch, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
            height=32, width=32, output_type="pt",
        )  # fmt: skip
        pictures.append(out.images * 2 - 1)
    return torch.cat(pictures)


def build_teacher(args):
    """The multi-step teacher: UNet and both text encoders, jointly.

    What made it follow prompts: text encoders first taught the attributes, 65 % of timesteps in [350, 1000), and
    a loss weight that counts x0 as well as eps. That settles layout, colours and shapes and then stops short of thin
    stripes, which are decided at little noise: hence a last cycle with ``--detail``. 15 % of the steps see 8x8 latent
    crops with their true crop micro-conditioning, so that the same weights can judge crops.
    """
    folder = Path(args.output) / "teacher"
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().requires_grad_(False)
    if dist.is_initialized() and dist.get_rank():
        dist.barrier()  # rank 0 writes the tokenizers first
    pipeline = zoo.new_pipeline(folder, vae)
    if dist.is_initialized() and not dist.get_rank():
        dist.barrier()
    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    heads = torch.nn.Linear(3 * zoo.WIDTH, sum(ATTRIBUTES.values()))
    modules = {"unet": unet, "te1": pipeline.text_encoder, "te2": pipeline.text_encoder_2, "heads": heads}
    stage = Stage("teacher_state", modules, args, lr=1.2e-3)
    for p in stage.params:
        p.grad = torch.zeros_like(p)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod

    count = 40_960
    cache = Path(args.output) / f"latents-{stage.rank}.safetensors"
    if not cache.exists():
        scenes = sample_scenes(count, 2, start=stage.rank * count)
        ids = tokenizer(scenes.captions(), padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = []
        with torch.no_grad():
            for i in range(0, count, 256):
                mean = vae.encode(render(scenes[i : i + 256])).latent_dist.mode()
                latents.append((mean * vae.config.scaling_factor).half())
        attributes = torch.from_numpy(scenes.attributes()).contiguous()
        save_file({"latents": torch.cat(latents), "ids": ids, "attributes": attributes}, cache)
    data = load_file(cache)

    def text_loss(embeds, pooled, attributes):
        return judge_loss(heads(torch.cat([embeds.mean(1), pooled], 1)), attributes)

    def loss_fn(seed):
        crop = torch.rand((), generator=torch.Generator().manual_seed(stage.step)) < 0.15  # equal on all ranks
        n, size = (2 * stage.batch_size, 8) if crop else (stage.batch_size, 16)
        index = torch.randint(count, (n,))
        embeds, pooled = encode_prompts(pipeline, data["ids"][index])
        aux = text_loss(embeds, pooled, data["attributes"][index])
        if stage.step < 300:
            return aux, {"text": aux}
        x0 = data["latents"][index].float()
        top, left = torch.randint(0, 17 - size, (2, n))
        if crop:
            x0 = torch.stack([x[:, t : t + size, s : s + size] for x, t, s in zip(x0, top, left, strict=True)])
        time_ids = torch.stack([torch.full((n,), 32)] * 2 + [2 * top, 2 * left] + [torch.full((n,), 2 * size)] * 2, 1)
        keep = (torch.rand(n) >= 0.1).float()
        t = torch.randint(0, 1000, (n,))
        if not args.detail:
            t = torch.where(torch.rand(n) < 0.65, torch.randint(350, 1000, (n,)), t)
        ab = alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(x0)
        cond = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, t, embeds * keep[:, None, None], added_cond_kwargs=cond)
        error = (out.sample.float() - eps).square().mean((1, 2, 3))
        weight = (1 / ab.flatten()).clamp(max=2 if args.detail else 5)  # 1 + 1/snr
        loss = (weight * error).mean() / (1.5 if args.detail else 2)
        return loss + 0.02 * aux, {"eps": error.mean(), "text": aux, "crop": float(crop)}

    judge = Judge().requires_grad_(False)
    held_out = sample_scenes(192, HELD_OUT_SEED)

    def evaluate():
        result = {}
        for module in (unet, pipeline.text_encoder, pipeline.text_encoder_2):
            module.eval()
        weights = Path(args.output) / "judge.safetensors"
        if weights.exists() and stage.step > 1000:
            judge.load_state_dict(load_file(weights))
            pictures = draw(pipeline, held_out.captions(), seed=0, steps=8, guidance_scale=2.5)
            right = judge.correct(pictures, torch.from_numpy(held_out.attributes()))
            result["accuracy"] = right.all(1).float().mean().item()
        zoo.save_fp16(unet, folder / "unet")
        for name in ("text_encoder", "text_encoder_2"):
            # fp32: transformers loads what the file says, diffusers fp32, and half a megabyte is no reason to differ
            getattr(pipeline, name).save_pretrained(folder / name)
        name_as_published(folder / "text_encoder")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)
        return result

    stage.run(loss_fn, evaluate, eval_every=500)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["vae", "judge", "features", "teacher"])
    parser.add_argument("--output", default="runs/world", help="folder for checkpoints and finished models")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--detail", action="store_true", help="teacher: all timesteps alike, for stripes and edges")
    parser.add_argument("--restart", type=int, default=0, help="first step of this cosine cycle")
    parser.add_argument("--lr_scale", type=float, default=1.0, help="of this cycle's peak")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if torch.distributed.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    builders = {"vae": build_vae, "judge": build_judge, "features": build_features, "teacher": build_teacher}
    builders[args.stage](args)


if __name__ == "__main__":
    main()
