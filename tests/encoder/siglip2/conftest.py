"""Tiny SigLIP 2 towers and batches of images of several sizes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_patches": 64, "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 16, "projection_size": 64,
}  # fmt: skip


def boost(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which every part shows in the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "position" in name:
                p.normal_(0, 0.3)
            elif name.endswith("probe"):
                p.normal_()
            elif p.ndim >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p) * 0.05)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(2)
            if name.endswith("in_proj_weight"):
                p[: 2 * p.shape[1]].mul_(2)


def hf_tower(seed: int = 0, with_head: bool = True, **overrides: Any) -> Any:
    config = transformers.Siglip2VisionConfig(**VISION | overrides)
    config.vision_use_head = with_head
    tower = Siglip2VisionModel._from_config(config).eval()
    boost(tower, seed)
    return tower


def lfm2(seed: int = 0) -> Any:
    text = {
        "model_type": "lfm2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128,
        "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    vision = VISION | {"model_type": "siglip2_vision_model", "vision_use_head": False}
    config = transformers.Lfm2VlConfig(
        vision_config=vision, text_config=text, projector_hidden_size=64, image_token_id=100
    )
    model = transformers.Lfm2VlForConditionalGeneration(config).eval()
    boost(model, seed)
    return model


def hf_model(seed: int = 0) -> Any:
    config = transformers.Siglip2Config(vision_config=VISION, text_config=TEXT)
    model = transformers.Siglip2Model(config).eval()
    boost(model, seed)
    return model


@pytest.fixture
def build() -> SimpleNamespace:
    """`build.tower(...)`, `build.model(...)`, `build.lfm2(...)`: boosted, in eval mode."""
    return SimpleNamespace(tower=hf_tower, model=hf_model, lfm2=lfm2, vision=VISION, text=TEXT)


@pytest.fixture
def batch():
    """`batch(shapes, length=None, seed=1)`: arguments of Hugging Face's forward."""

    def make(shapes, length=None, seed=1, values=48) -> dict[str, torch.Tensor]:
        sizes = torch.tensor(shapes).reshape(-1, 2)
        counts = sizes.prod(1)
        length = length or int(counts.max())
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(len(sizes), length, values, generator=generator),
            "pixel_attention_mask": (torch.arange(length) < counts[:, None]).long(),
            "spatial_shapes": sizes,
        }

    return make
