"""A random tiny SDXL pipeline folder to test with, and the published scheduler to test against."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

from nitrofusion.models import sdxl
from nitrofusion.scheduler import TimestepShiftLCMScheduler
from nitrofusion.world import zoo

PROMPTS = ["a red circle on a navy background", "a green square left of a blue star on a white background", "a ring"]


NARROW = {"block_out_channels": (16, 32, 48), "norm_num_groups": 8}  # a training step takes half as long as the world's


def tiny_folder(folder: str | Path, seed: int = 0, loud: bool = False) -> Path:
    """Writes an untrained fp32 pipeline folder: 32x32 pictures, 16x16 latents, ten encoder taps.

    Args:
        loud: cross-attention counts as in a trained model; untrained, prompts hardly change a picture.
    """
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = zoo.new_pipeline(folder, zoo.new_vae())
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config | NARROW)
        if loud:
            for name, weight in pipeline.unet.named_parameters():
                if ".attn2." in name and weight.ndim == 2:
                    weight.data *= 3
        pipeline.save_pretrained(folder)
    return folder


def tiny_model(seed: int = 0) -> sdxl.SDXL:
    """That folder loaded, for tests that need no files."""
    with tempfile.TemporaryDirectory() as folder:
        return sdxl.load(tiny_folder(folder, seed))


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIPTextModel's weights under the names of published files, whichever transformers wrote them."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


def plain_pipeline(folder: str | Path, **parts) -> StableDiffusionXLPipeline:
    """The folder in plain diffusers."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class SnippetScheduler(LCMScheduler):
    """The scheduler of the authors' README, in their words: the independent reference."""

    def __init__(self, *args, shifted_timestep=250, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_to_config(shifted_timestep=shifted_timestep)

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.origin_timesteps = self.timesteps.clone()
        self.shifted_timesteps = (
            self.timesteps * self.config.shifted_timestep / self.config.num_train_timesteps
        ).long()
        self.timesteps = self.shifted_timesteps

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if self.step_index is None:
            self._init_step_index(timestep)
        self.timesteps = self.origin_timesteps
        output = super().step(model_output, timestep, sample, generator, return_dict)
        self.timesteps = self.shifted_timesteps
        return output


def sdxl_folder(folder: str | Path, seed: int = 0) -> Path:
    """A pipeline folder closer to SDXL's: text encoders of two widths, a VAE with attention, two transformer blocks.

    Loaders of single files tell SDXL's text encoders apart by their widths.
    """
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = [zoo.new_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        encoders = []
        for width, kind in ((32, CLIPTextModel), (64, CLIPTextModelWithProjection)):
            config = zoo.new_text_encoders(tokenizers[0])[0].config.to_dict()
            sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
            encoders.append(kind(CLIPTextConfig(**config | sizes)))
        shape = zoo.new_unet().config | {
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 96,
            "projection_class_embeddings_input_dim": 64 + 6 * 16,
        }
        vae = zoo.new_vae().config | {"mid_block_add_attention": True}
        StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config(vae),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel.from_config(shape),
            scheduler=zoo.new_scheduler(),
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def nudged(state: dict[str, torch.Tensor], seed: int, size: float = 0.02) -> dict[str, torch.Tensor]:
    """Every tensor moved by noise of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + size * torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in state.items()}


def rescheduled(folder: Path, copy: Path, scheduler) -> Path:
    """The same pipeline with another scheduler; the weights are links."""
    copy.mkdir()
    for item in folder.iterdir():
        if item.name != "scheduler":
            (copy / item.name).symlink_to(item)
    scheduler.save_pretrained(copy / "scheduler")
    return copy


def student_folder(folder: Path, copy: Path, shifted_timestep: int = 500) -> Path:
    """The same pipeline with the one-step student's scheduler."""
    return rescheduled(folder, copy, TimestepShiftLCMScheduler(shifted_timestep=shifted_timestep))


def tiny_features(folder: str | Path, model=Dinov2Model, config=Dinov2Config, **changes) -> str:
    """An untrained vision transformer's folder: 8x8 tokens of 32 channels, three blocks."""
    shape = dict(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = model(config(**shape | {"initializer_range": 0.2} | changes))
        network.save_pretrained(folder)
    return str(folder)
