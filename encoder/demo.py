"""A small tower with random weights: everything runs with it, without a network or a GPU."""

import torch

from .fp8 import Fp8Plan
from .vision_encoder import VisionEncoder, pick_device, pick_dtype

SEED = 20250917


def demo_encoder(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    attention: str | None = None,
    precision: str | Fp8Plan = "native",
) -> VisionEncoder:
    """A Qwen3-VL tower of four blocks, the same on every machine; its embeddings mean nothing.

    Weights are scaled by their fan-in, so that, unlike under the usual initialisation, the output
    depends on the pixels, on their positions and on which patches attend to which.

    Args:
        device: None is the current GPU if there is one, else the CPU.
        dtype: None or "auto" is bf16 on a GPU and fp32 on the CPU.
        attention, precision: As in `VisionEncoder.from_pretrained`.

    Raises:
        ValueError: an argument has no such value.
    """
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    place = pick_device(device)
    kind = pick_dtype(dtype, place, torch.bfloat16)
    config = Qwen3VLVisionConfig(
        depth=4,
        hidden_size=128,
        num_heads=2,
        intermediate_size=256,
        out_hidden_size=128,
        patch_size=16,
        num_position_embeddings=16**2,
        deepstack_visual_indexes=[1],
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        tower = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in tower.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.startswith("pos_embed"):
            parameter.copy_(0.3 * noise)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            # doubled, queries and keys make attention pick instead of average
            parameter.copy_(noise * ((2 if "qkv" in name else 1) * fan_in**-0.5))
        else:
            parameter.copy_(float(name.endswith("weight")) + 0.05 * noise)
    tower.to(device=place, dtype=kind)  # pyright: ignore[reportCallIssue] (transformers wraps it)
    encoder = VisionEncoder.from_hf(tower, attention=attention, precision=precision)
    encoder.source = "demo"
    return encoder
