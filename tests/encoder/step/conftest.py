"""Tiny Step towers: Hugging Face's own of Step-3.7, and one of Step3 from its description."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.step3p7 import modeling_step3p7
from transformers.models.step3p7.modeling_step3p7 import Step3p7VisionModel
from vitgraph.encoder import StepEncoder
from vitgraph.encoder.image_weights import ImageTowerWeights
from vitgraph.encoder.step_spec import step3_vl_spec, step3p7_spec

IMAGE, CROP = 140, 84  # 10 x 10 and 6 x 6 patches; 9 and 4 tokens
VISION: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": IMAGE,
    "mlp_ratio": 1.5,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32,
    "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16,
    "mlp_layer_types": ["dense", "sparse"], "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
STEP3: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "output_hidden_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 14, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip


def boost(module: nn.Module, seed: int = 0) -> None:
    """Weights under which every part shows in the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "position" in name:
                p.normal_(0, 0.3)
            elif p.ndim >= 2:
                # a stack of experts [E, out, in] has the fan-in of one of them
                fan_in = p.shape[-1] if p.ndim == 3 else p[0].numel()
                p.normal_(0, fan_in**-0.5)
            elif "lambda" in name:
                p.uniform_(0.4, 1.2)
            else:
                p.add_(torch.randn_like(p) * 0.05)
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                p.mul_(2)


class Step3Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (D // self.heads) ** -0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, N, D))


class Step3Layer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        D, hidden = c["hidden_size"], c["intermediate_size"]
        self.self_attn = Step3Attention(D, c["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(D, eps=c["layer_norm_eps"])
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, hidden), "fc2": nn.Linear(hidden, D)})
        self.layer_norm2 = nn.LayerNorm(D, eps=c["layer_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_norm1(self.self_attn(x))
        h = self.mlp["fc1"](x)
        return x + self.layer_norm2(self.mlp["fc2"](h * torch.sigmoid(1.702 * h)))


class Step3Tower(nn.Module):
    """The tower of Step3 with its convolutions and projector, in the names of its checkpoint.

    A class row, four times over, in front of the patches; positions added to both before that.
    """

    def __init__(self, c: dict[str, Any], out: int, projector_bias: bool = False):
        super().__init__()
        D, W, P = c["hidden_size"], c["output_hidden_size"], c["patch_size"]
        self.side = c["image_size"] // P
        embeddings: Any = nn.Module()
        embeddings.class_embedding = nn.Parameter(torch.randn(1, D))
        embeddings.patch_embedding = nn.Conv2d(3, D, P, P)
        embeddings.position_embedding = nn.Embedding(self.side**2 + 1, D)
        layers = nn.ModuleList([Step3Layer(c) for _ in range(c["num_hidden_layers"])])
        self.vision_model: Any = nn.Module()
        self.vision_model.embeddings = embeddings
        self.vision_model.transformer = nn.ModuleDict({"layers": layers})
        self.vit_downsampler = nn.Conv2d(D, W, 2, 2)
        self.vit_downsampler2 = nn.Conv2d(W, 2 * W, 3, 2, 1)
        self.vit_large_projector = nn.Linear(2 * W, out, bias=projector_bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens before the projector, projected tokens), [N, tokens, width] each."""
        e = self.vision_model.embeddings
        patches = e.patch_embedding(images)
        h, w = patches.shape[2:]
        table = e.position_embedding.weight
        grid = table[1:].T.reshape(1, -1, self.side, self.side)
        if (h, w) != (self.side, self.side):
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True, align_corners=False)
        x = (patches + grid).flatten(2).mT
        first = (e.class_embedding + table[:1]).expand(len(x), 4, -1)
        x = torch.cat([first, x], 1)
        for layer in self.vision_model.transformer["layers"]:
            x = layer(x)
        x = x[:, 4:].mT.reshape(len(x), -1, h, w)
        tokens = self.vit_downsampler2(self.vit_downsampler(x)).flatten(2).mT
        return tokens, self.vit_large_projector(tokens)


def hf_tower(seed: int = 0, **overrides: Any) -> Any:
    config = Step3p7VisionModel.config_class(**VISION | overrides)
    tower = Step3p7VisionModel._from_config(config).eval()
    boost(tower, seed)
    return tower


def hf_model(seed: int = 0, **overrides: Any) -> Any:
    config = transformers.AutoConfig.for_model(
        "step3p7", vision_config=VISION | overrides, text_config=TEXT, image_token_id=500
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    boost(model, seed)
    return model


def step3(seed: int = 0, out: int = 48, **overrides: Any) -> Step3Tower:
    tower = Step3Tower(STEP3 | overrides, out).eval()
    boost(tower, seed)
    return tower


@pytest.fixture
def build() -> SimpleNamespace:
    """Builders of boosted towers, and of our weights and encoders of them."""

    def weights(
        tower: Any, dtype: torch.dtype = torch.float32, axes: Any = "hw"
    ) -> ImageTowerWeights:
        if isinstance(tower, Step3Tower):
            spec = step3_vl_spec(STEP3, tower.vit_large_projector.out_features)
            return ImageTowerWeights(
                spec, dict(tower.named_parameters()), torch.device("cpu"), dtype
            )
        state = {f"vision_model.{name}": p for name, p in tower.named_parameters()}
        spec = step3p7_spec(tower.config, rope_axes=axes)
        return ImageTowerWeights(spec, state, torch.device("cpu"), dtype)

    def encoder(tower: Any, **options: Any) -> StepEncoder:
        if isinstance(tower, Step3Tower):
            prepared = weights(tower, next(tower.parameters()).dtype)
            return StepEncoder(prepared.spec, prepared, local_size=CROP, **options)
        return StepEncoder.from_hf(tower, local_size=CROP, **options)

    return SimpleNamespace(
        hf_tower=hf_tower, hf_model=hf_model, step3=step3, weights=weights, encoder=encoder,
        boost=boost, image=IMAGE, crop=CROP, vision=VISION, text=TEXT, step3_config=STEP3,
    )  # fmt: skip


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    """`images(count, side, seed=1)`: random normalised images [count, 3, side, side]."""

    def make(count: int, side: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, side, side, generator=generator)

    return make


@pytest.fixture
def column_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers turn the lower pairs by the column, as the released weights need it.

    Before 5.23 it takes the row; from then on this is what it does by itself.
    """

    def recompose(self: Any, freq: torch.Tensor) -> torch.Tensor:
        halves = freq.flip(1).flatten(1)
        return torch.cat((halves, halves), -1)

    rotary = modeling_step3p7.Step3p7VisionRotaryEmbedding
    monkeypatch.setattr(rotary, "recomposition_frequencies", recompose)


@pytest.fixture
def row_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers turn the lower pairs by the row, as it does before 5.23."""

    def recompose(self: Any, freq: torch.Tensor) -> torch.Tensor:
        halves = freq.flatten(1)
        return torch.cat((halves, halves), -1)

    rotary = modeling_step3p7.Step3p7VisionRotaryEmbedding
    monkeypatch.setattr(rotary, "recomposition_frequencies", recompose)
