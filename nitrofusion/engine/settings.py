"""What a picture's PNG says of how it was drawn."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..presets import MODELS
from ..published import VAES
from . import images
from .arguments import Call
from .files import LoadedFiles
from .hub import cached_folder
from .source import Source


def settings_of(call: Call, size: tuple[int, int], source: Source, executor, files: LoadedFiles) -> dict:
    """JSON values: the picture of a call at (height, width). What a plain picture lacks is left out."""
    settings = {
        "prompt": call.prompts[0],
        "model": source.name,
        "seed": call.seeds[0],
        "num_inference_steps": call.num_inference_steps,
        "guidance_scale": call.guidance_scale,
        "height": size[0],
        "width": size[1],
        "version": __version__,
        "unet": files.digest(*files.parts["unet"], *files.loras),
        "device": executor.device.type,
        "dtype": str(executor.dtype).removeprefix("torch.") + "+fp8" * (executor.fp8 is not None),
    }
    if call.negative is not None:
        settings |= {"negative_prompt": call.negative_prompts[0], "negative": call.negative}
    if (guidance := call.guidance) is not None:
        settings |= {f"{guidance.method}_scale": guidance.scale, "nag_steps": guidance.steps}
        if guidance.method == "nag":
            settings |= {"nag_tau": guidance.tau, "nag_alpha": guidance.alpha}
    if call.images is not None:
        settings |= {"image": images.digest(call.images[0]), "strength": call.strength}
    if given := source.loras[source.preset_loras :]:
        settings["loras"] = [{"name": f.name, "digest": files.digest(f), "scale": scale} for f, scale in given]
    if not _is_own_vae(source):
        settings["vae"] = files.digest(*files.parts["vae"])
    return settings


def _is_own_vae(source: Source) -> bool:
    """Whether the decoder is the folder's or the preset's; nothing is downloaded to find out."""
    if source.vae is None:
        return True
    own = MODELS[source.name].vae if source.name in MODELS else None
    if own is None:
        return False
    path = Path(VAES.get(own, own)).expanduser()
    return source.vae == (path if path.exists() else cached_folder(str(path), (".",)))
