"""Stable Diffusion 1.5's networks at random weights: speed does not depend on their values, and none are downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def networks(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Make the three networks where they are to run; on the device `meta` they have shapes and no weights."""
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            sample_size=512,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.18215,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
            )
        )
    found = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {name: network.to(dtype).eval().requires_grad_(False) for name, network in found.items()}


def pipeline(tiny: Path, device: str, dtype: torch.dtype) -> Any:
    """Return the pipeline; its tokenizer and scheduler are those of the tiny model in that folder."""
    return StableDiffusionImg2ImgPipeline.from_pretrained(
        str(tiny), safety_checker=None, requires_safety_checker=False, **networks(device, dtype)
    )
