"""The networks as static plans: the CPU in fp32, one native call a network.

Nothing of diffusers or transformers is imported, nor a module built, unless something asks for what plans lack.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from nitrokernels import plan

from ...errors import InputError, out_of_memory
from ...models.conditioning import Conditioning
from ...models.folder import betas, config_of, scheduler_config
from ...models.weights import PICKLES, Weights, check, is_finite, read_json
from ...schedule import make_alphas_cumprod
from .. import images
from ..files import LoadedFiles
from ..source import Source
from .clip import TextPlan
from .unet import UNetPlan
from .vae import DecoderPlan, EncoderPlan, TinyDecoderPlan, TinyEncoderPlan
from .weights import Unsupported

_SIZES = 4  # plans kept for each network; they share its packed weights
_END = "<|endoftext|>"
_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END}  # CLIP's own
_MORE_TOKENS = "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"


class Plans:
    """What ``Engine`` asks of an executor (``modules.Modules`` describes it), one image at a time.

    Autoencoders of another form run on modules, which are loaded then.

    Attributes:
        files: what the weights are read from, again for other sizes and for modules.

    Raises:
        Unsupported: the UNet or a text encoder has parts that plans do not cover.
    """

    device, dtype, fp8 = torch.device("cpu"), torch.float32, None

    def __init__(self, source: Source):
        if (reason := plan.missing()) is not None:
            raise Unsupported(reason)
        self._source, folder, self.files = source, source.folder, LoadedFiles(source)
        self._unet_config, self._vae_config = (config_of(folder, f"{p}/config.json") for p in ("unet", "vae"))
        self.in_channels = self._unet_config["in_channels"]
        self.vae_scale = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        self.scaling_factor = self._vae_config.get("scaling_factor", 0.18215)  # diffusers' own default
        self.resolution = self._unet_config["sample_size"] * self.vae_scale
        self.alphas_cumprod = make_alphas_cumprod(**betas(scheduler_config(folder)))
        self._tokenizers = [read_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        self._tokens = self._tokenizers[0].truncation["max_length"]
        self._packed: dict[str, dict] = {"unet": {}, "vae": {}}
        parts = ("text_encoder", "text_encoder_2")
        self._texts = [
            build(TextPlan, config_of(folder, f"{part}/config.json"), self._state(part), i == 1)
            for i, part in enumerate(parts)
        ]
        self._unets: dict[tuple, UNetPlan | None] = {}
        self._decoders: dict[tuple, DecoderPlan | TinyDecoderPlan | None] = {}
        self._encoders: dict[tuple, EncoderPlan | TinyEncoderPlan | None] = {}
        self._vae_kinds, self._vae_config, self._vae_state = self._open_vae()
        side = self._unet_config["sample_size"]
        self._unets[side, side] = self._make_unet(side, side)
        if self._decoder(side, side) is None:
            _ = self.modules  # they will decode; what is wrong with them is to be said now
        self.loras = self.modules.loras if source.loras else ()
        if self._decoder(side, side) is not None:
            self.__dict__.pop("modules", None)  # plans have copies of its weights

    def become(self, source: Source, now: Source) -> tuple[None, None]:
        """As ``Modules.become``, but all weights are packed anew."""
        if source.with_lora(None) == now.with_lora(None):
            self.files.check(file for files in self.files.parts.values() for file in files)
        try:
            self.__dict__ = dict(vars(build(Plans, source)))  # a copy: Python 3.13.0 frees what two objects share
        except Unsupported as reason:
            if isinstance(reason.__cause__, InputError):
                raise reason.__cause__ from None
            raise InputError(f"switch: {source.name} must be a model that plans cover, got: {reason}") from reason
        return None, None

    def __deepcopy__(self, memo: dict) -> Plans:
        """Packed anew: a plan's code holds addresses, which in a copy would be the original's memory, or freed."""
        self.files.check()
        return Plans(self._source)

    @functools.cached_property
    def modules(self):
        """The same networks as modules, loaded at first use."""
        from ..modules import Modules

        self.files.check()
        return Modules(self._source.read("cpu", torch.float32, fused=True))

    @property
    def model(self):
        return self.modules.model

    def encode(self, prompt: str) -> Conditioning:
        embeds, pooled = [], None
        for tokenizer, text in zip(self._tokenizers, self._texts, strict=True):
            states, pooled = text(tokenizer.encode(prompt).ids)
            embeds.append(states)
        size = self.resolution
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=self.dtype, device=self.device)
        return Conditioning(torch.cat(embeds, -1)[None], pooled[None], time_ids)

    def encode_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoder = self._encoder(*(side // self.vae_scale for side in image.shape[2:]))
        return (self.modules.encode_image if encoder is None else encoder)(image)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning, negative=None) -> torch.Tensor:
        unet = self._unet(*x_t.shape[2:])
        if unet is None:
            return self.modules.denoise(x_t, t, cond, negative)
        eps, times, against = torch.empty_like(x_t), t.tolist(), {}
        if negative is not None:
            against = dict(zip(negative.rows, negative.prompt_embeds, strict=True))
        for i in range(len(x_t)):
            told = x_t[i], times[i], cond.prompt_embeds[i], cond.pooled_prompt_embeds[i], cond.time_ids[i]
            eps[i] = unet(*told, against[i], negative.guidance.numbers) if i in against else unet(*told)
        return eps

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        decoder = self._decoder(*latents.shape[2:])
        if decoder is None:
            return self.modules.decode(latents)
        latents = latents / self.scaling_factor
        return torch.stack([decoder(one).clamp(-1, 1) for one in latents])

    def decode_rgb(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool | torch.Tensor]:
        decoder = self._decoder(*latents.shape[2:])
        if not isinstance(decoder, DecoderPlan):
            return images.rgb_and_finite(self.decode(latents))
        latents = latents / self.scaling_factor
        pictures, sound = [], True
        for one in latents:
            picture, numbers = decoder.rgb(one)
            pictures.append(picture.clone())
            sound = sound and numbers
        return torch.stack(pictures), sound

    def _make_unet(self, height: int, width: int) -> UNetPlan:
        size, packed = (height, width, self._tokens), self._packed["unet"]
        with self._modules_lent():
            return build(UNetPlan, self._unet_config, self._state("unet"), *size, packed)

    def _unet(self, height: int, width: int) -> UNetPlan | None:
        return _newest(self._unets, (height, width), self._make_unet)

    def _decoder(self, height: int, width: int) -> DecoderPlan | TinyDecoderPlan | None:
        return _newest(self._decoders, (height, width), functools.partial(self._make_vae, self._vae_kinds[0]))

    def _encoder(self, height: int, width: int) -> EncoderPlan | TinyEncoderPlan | None:
        return _newest(self._encoders, (height, width), functools.partial(self._make_vae, self._vae_kinds[1]))

    def _make_vae(self, kind: type, height: int, width: int):
        self.files.check(self.files.parts["vae"])
        with self._modules_lent():
            return build(kind, self._vae_config, self._vae_state(), height, width, self._packed["vae"])

    @contextlib.contextmanager
    def _modules_lent(self) -> Iterator[None]:
        """Modules that are loaded inside, for weights that no file has as they are, are let go afterwards."""
        kept = not hasattr(self, "loras") or "modules" in self.__dict__  # while loading all plans are made of them
        yield
        if not kept:
            self.__dict__.pop("modules", None)

    def _open_vae(self) -> tuple[tuple[type, type], dict, Callable]:
        """The plans of decoder and encoder, the configuration, and what reads the weights."""
        path = self._source.vae
        if path is None:
            return (DecoderPlan, EncoderPlan), self._vae_config, lambda: self._state("vae")
        from ...models import vaes  # needs diffusers

        module, stored = vaes.open_vae(path, self._vae_config, self._source.allow_pickle)
        tensors = vaes.named(module, stored)
        check(module, tensors, path, "vae")
        _check_finite(tensors)
        stored.release()
        tiny = type(module).__name__ == "AutoencoderTiny"
        self.scaling_factor = module.config.scaling_factor
        kinds = (TinyDecoderPlan, TinyEncoderPlan) if tiny else (DecoderPlan, EncoderPlan)
        return kinds, module.config, lambda: tensors

    def _state(self, part: str) -> dict[str, torch.Tensor]:
        """A part's tensors under diffusers' names: mapped files as they are, or those of modules."""
        source, files = self._source, self.files.parts[part]
        self.files.check(files)
        if source.checkpoint is None and not source.loras and not any(f.suffix in PICKLES for f in files):
            state = Weights(files)
            if part != "unet" or "conv_in.weight" in state:
                if not self._packed.get(part):  # once
                    _check_finite(state)
                state.release()
                return state
        model = self.modules.model
        encoders = dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=True))
        return {"unet": model.unet, "vae": model.vae, **encoders}[part].state_dict()


def build(kind: type, *args):
    """A plan; weights that do not fit together are Unsupported too, and whoever loads modules says what is wrong."""
    try:
        made = kind(*args)
        for state in args:
            if isinstance(state, Weights):
                state.release()
        return made
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):  # modules would need still more
            raise
        raise Unsupported(f"it does not fit its configuration ({error})") from error


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise Unsupported(f"its {name} has NaN or infinity")


def _newest(made: dict, size: tuple, make):
    """The plan for ``size``; None where there can be none. The one used longest ago makes room for another."""
    if size in made:
        made[size] = made.pop(size)
    else:
        if len(made) == _SIZES:
            made.pop(next(iter(made)))
        try:
            made[size] = make(*size)
        except Unsupported:
            made[size] = None
    return made[size]


def read_tokenizer(folder: Path):
    """A CLIP tokenizer that cuts and pads to the model's length, as transformers' does.

    Raises:
        Unsupported: it has no length, or cuts or pads on the left.
    """
    from tokenizers import Tokenizer

    config = read_json(folder / "tokenizer_config.json")
    file, length = folder / "tokenizer.json", config.get("model_max_length")
    if not isinstance(length, int) or not 2 < length <= 1024:
        raise Unsupported(f"its tokenizer's model_max_length is {length!r}")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise Unsupported(f"its tokenizer's {side} is {config[side]!r}")
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        if tokenizer is not None and _is_whole(folder, config, tokenizer):
            pad = config.get("pad_token", _TOKENS["pad_token"])
            pad_id = tokenizer.token_to_id(pad)
        else:
            from transformers import CLIPTokenizer

            made = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            tokenizer, pad, pad_id = made.backend_tokenizer, made.pad_token, made.pad_token_id
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise Unsupported(f"its tokenizer cannot be read ({error})") from error
    if pad_id is None or pad_id >= tokenizer.get_vocab_size(with_added_tokens=False):
        raise Unsupported(f"its tokenizer pads with {pad!r}, which is not in its vocabulary")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=pad_id)
    return tokenizer


def _is_whole(folder: Path, config: dict, tokenizer) -> bool:
    """Whether tokenizer.json holds all special tokens: of others transformers knows where they are and what they do."""
    known = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    named = [value for key, value in (_TOKENS | config).items() if key.endswith("_token")]
    elsewhere = any((folder / f"{name}.json").is_file() for name in ("special_tokens_map", "added_tokens"))
    return not elsewhere and not any(map(config.get, _MORE_TOKENS)) and all(value in known for value in named)
