"""A Stable Diffusion 1.5 model in diffusers' layout, and a tiny one of random weights where the real one is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from endpoint.plan import SCHEDULERS, Plan, Planner

__all__ = ["SCHEDULERS", "Compile", "Model", "save_tiny"]

Compile = Literal["off", "default", "max-autotune"]

# A compiled model knows these batches, in rows: a guided sample has two. Others are filled up.
UNET_ROWS = (1, 2, 4, 8, 16, 32)
DECODE_ROWS = (1, 2, 4)
# Each size and batch is a program of its own: the UNet has 24 in four sizes.
PROGRAMS = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts of the pipeline, on one device and in one number format.

    One thread may call what works on the device; `plan`, `tokens` and `flagged` are for any.
    """

    pipeline: Any
    planner: Planner
    device: torch.device
    dtype: torch.dtype
    unet: Any
    decoder: Any
    unet_rows: tuple[int, ...] = ()
    decode_rows: tuple[int, ...] = ()
    compiled: Compile = "off"
    # A tokenizer is for one thread at a time.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: Compile = "off",  # noqa: A002 (as torch calls it)
        safety_checker: bool = False,
    ) -> Self:
        """Load a folder or a hub name in diffusers' layout.

        Raises `OSError` when there is none, `ValueError` when it has not what is asked for.
        """
        without: dict[str, Any] = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
        pipeline: Any = StableDiffusionImg2ImgPipeline.from_pretrained(str(source), dtype=dtype, **without)
        if safety_checker and (pipeline.safety_checker is None or pipeline.feature_extractor is None):
            raise ValueError("the model has no safety checker")
        return cls.of(pipeline, device=device, compile=compile)

    @classmethod
    def of(
        cls,
        pipeline: Any,
        *,
        device: str = "cpu",
        compile: Compile = "off",  # noqa: A002
        backend: str | Callable[..., Any] = "inductor",
    ) -> Self:
        """Make a model of a pipeline; its number format stays. `compile` works at the first call of each size.

        Compiling takes minutes for each size and batch; TORCHINDUCTOR_CACHE_DIR names a folder that keeps what it made.
        `backend` is what compiles, as torch calls it: tests have cheaper ones.
        """
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        unet, vae = pipeline.unet, pipeline.vae
        if torch.device(device).type == "cuda":
            unet.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
        parts: dict[str, Any] = {"unet": unet, "decoder": vae.decode}
        if compile != "off":
            parts = _compiled(unet, vae, compile, backend)
        return cls(
            pipeline=pipeline,
            planner=Planner(_scheduler_config(pipeline.scheduler.config)),
            device=torch.device(device),
            dtype=unet.dtype,
            compiled=compile,
            **parts,
        )

    @property
    def uncompiled(self) -> Self:
        """The same model for sizes that are not worth compiling."""
        if self.compiled == "off":
            return self
        pipeline = self.pipeline
        return replace(
            self, unet=pipeline.unet, decoder=pipeline.vae.decode, unet_rows=(), decode_rows=(), compiled="off"
        )

    def plan(self, name: str, num_inference_steps: int, strength: float) -> Plan:
        """Return the steps of a sample. Raises `ValueError`."""
        return self.planner.plan(name, num_inference_steps, strength)

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Cut texts into tokens; what does not fit is left out, as the pipeline does."""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        with self._tokenizing:
            tokens: torch.Tensor = tokenizer(
                list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
        return tokens

    def embeds(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode tokens of the device."""
        embeds: torch.Tensor = self.pipeline.text_encoder(tokens)[0]
        return embeds.to(self.dtype)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures (samples, height, width, 3) of bytes, on the device: mean and deviation of their latents."""
        values = pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        found = self.pipeline.vae.encode(values.to(self.dtype)).latent_dist
        scale = self.pipeline.vae.config.scaling_factor
        return found.mean.float() * scale, found.std.float() * scale

    def noise(self, latents: torch.Tensor, steps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Call the UNet: one timestep and one text for each of the latents, all of the device, in float32."""
        rows = len(latents)
        if padding := bucket(rows, self.unet_rows) - rows:
            latents, steps, embeds = (_padded(tensor, padding) for tensor in (latents, steps, embeds))
        latents = latents.to(self.dtype)
        if self.device.type == "cuda":
            latents = latents.contiguous(memory_format=torch.channels_last)
        if self.compiled == "max-autotune":
            # CUDA graphs use the memory of the last call's output again.
            torch.compiler.cudagraph_mark_step_begin()
        predicted = self.unet(latents, steps, encoder_hidden_states=embeds, return_dict=False)[0][:rows]
        # A copy in any case: what comes of a CUDA graph is overwritten by the next call.
        return torch.empty(predicted.shape, device=self.device).copy_(predicted)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents of the device to pictures (samples, height, width, 3) from 0 to 1."""
        rows = len(latents)
        if padding := bucket(rows, self.decode_rows) - rows:
            latents = _padded(latents, padding)
        latents = (latents / self.pipeline.vae.config.scaling_factor).to(self.dtype)
        pictures: torch.Tensor = self.decoder(latents, return_dict=False)[0][:rows]
        return (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()

    def flagged(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        """Ask the safety checker, where there is one."""
        pipeline = self.pipeline
        if pipeline.safety_checker is None:
            return [False] * len(pictures)
        images = [picture(pixels) for pixels in pictures]
        inputs = pipeline.feature_extractor(images, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        # It blackens what it flags, in place.
        return list(map(bool, pipeline.safety_checker(images=np.stack(pictures), clip_input=inputs)[1]))


def picture(pixels: np.ndarray) -> Image.Image:
    """Round pixels from 0 to 1 to a picture, as diffusers does."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def bucket(rows: int, sizes: Sequence[int]) -> int:
    """Return how many rows a call with so many has; past the largest size, as without sizes, it has no more."""
    return next((size for size in sizes if size >= rows), rows)


def _padded(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1].expand(padding, *tensor.shape[1:])])


def _scheduler_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep what the model's own file says, for schedulers of every kind. Raises `ValueError`."""
    filled_in = config.get("_use_default_values", ())
    given = {name: value for name, value in config.items() if name not in (*filled_in, "_use_default_values")}
    if given.get("thresholding"):
        raise ValueError("the model's scheduler clips samples, which is not supported")
    # Two schedulers would clip where the file does not speak of it; the pipeline does not let its own do so either.
    given["clip_sample"] = False
    return given


def _compiled(unet: Any, vae: Any, mode: Compile, backend: str | Callable[..., Any]) -> dict[str, Any]:
    def compiled(work: Any, mode: str, **options: bool) -> Any:
        # All of it here: torch's own settings are those of one thread, and the engine compiles in another.
        return torch.compile(
            work,
            backend=backend,
            options={**torch._inductor.list_mode_options(mode), **options},  # noqa: SLF001
            fullgraph=True,
            dynamic=False,
            recompile_limit=PROGRAMS,
        )

    if mode == "max-autotune":
        options = {
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "epilogue_fusion": False,
        }
        # All CUDA graphs share their memory, and the decoder runs beside the UNet.
        parts = compiled(unet, mode, **options), compiled(vae.decode, "max-autotune-no-cudagraphs", **options)
    else:
        parts = compiled(unet, mode), compiled(vae.decode, mode)
    return {"unet": parts[0], "decoder": parts[1], "unet_rows": UNET_ROWS, "decode_rows": DECODE_ROWS}


def save_tiny(folder: Path, *, seed: int = 0) -> None:
    """Write a model of the real one's structure with random weights, small enough for tests. Its pictures are noise."""
    torch.manual_seed(seed)
    width = 32
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=512,
    )
    vocabulary = _vocabulary()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=len(vocabulary),
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )
    StableDiffusionImg2ImgPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=_tokenizer(folder, vocabulary),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _scheduler() -> PNDMScheduler:
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    # As in the real model's file: PNDM does not know it, DDIM and DDPM read it there.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def _tokenizer(folder: Path, vocabulary: dict[str, int]) -> Any:
    place = folder / "tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=77)
