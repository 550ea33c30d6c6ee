"""Tiny InternVL and Qianfan-OCR models of transformers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

SIDE = 112  # 8 x 8 patches, 16 tokens
VISION: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
    "image_size": [SIDE, SIDE], "patch_size": [14, 14],
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# model type and what its vision config has unlike the others
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "300m": ("internvl", {"attention_bias": True}),  # as InternViT-300M
    "6b": ("internvl", {"use_qk_norm": True, "norm_type": "rms_norm"}),  # as InternViT-6B
    "biased": ("internvl", {"use_qk_norm": True, "attention_bias": True}),
    "pooled": ("internvl", {"use_mean_pooling": False, "hidden_act": "gelu_pytorch_tanh"}),
    "qianfan": ("qianfan_ocr", {}),
}


def boost(module: nn.Module, seed: int = 0) -> None:
    """Weights under which every part shows in the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "position" in name or "cls_token" in name:
                p.normal_(0, 0.3)
            elif p.ndim >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            elif "lambda" in name:
                p.uniform_(0.4, 1.2)
            elif "norm" in name:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.add_(torch.randn_like(p) * 0.05)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(2)


def hf_model(kind: str = "300m", seed: int = 0, top: Any = None, **overrides: Any) -> Any:
    model_type, vision = KINDS[kind]
    config = transformers.AutoConfig.for_model(
        model_type, vision_config=VISION | vision | overrides, text_config=dict(TEXT),
        image_token_id=500, **(top or {}),
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    boost(model, seed)
    return model


@pytest.fixture
def build() -> SimpleNamespace:
    """Builder of boosted models, and the sizes that they have."""
    return SimpleNamespace(model=hf_model, boost=boost, side=SIDE, vision=VISION, text=TEXT)


@pytest.fixture
def tiles() -> Callable[..., torch.Tensor]:
    """`tiles(count, height, width=height, seed=1)`: random normalised tiles."""

    def make(count: int, height: int, width: int | None = None, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, height, width or height, generator=generator)

    return make


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tower."""
    return request.param
