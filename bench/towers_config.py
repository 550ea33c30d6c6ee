"""Published vision towers, built from Hugging Face's configurations with random weights.

The weights are *boosted*: with Hugging Face's own initialisation (standard deviation 0.02)
attention contributes so little that a tower without rotary embedding passes a comparison. Here
every matrix is scaled by its fan-in, q and k are doubled, and norms and biases get noise, so that
dropping the rotary embedding or a segment boundary changes the output by tens of per cent.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig),
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig),
    "qwen3_vl": (Qwen3VLVisionModel, Qwen3VLVisionConfig),
}
# projections that add to the residual stream, by the end of their path in each family
_INTO_STREAM = ("attn.proj", "mlp.linear_fc2", "mlp.fc2", "mlp.down_proj")
_QUERY_KEY = ("qkv", "q_proj", "k_proj", "q", "k")  # projections that hold q or k


@dataclass(frozen=True)
class TowerConfig:
    """A family and the arguments of its Hugging Face vision configuration."""

    family: str
    arguments: dict[str, Any]

    def vision_config(self) -> Any:
        """A fresh Hugging Face configuration (towers change theirs when attention is switched)."""
        return _FAMILIES[self.family][1](**self.arguments)


def _qwen3(depth: int, hidden: int, mlp: int, out: int, deepstack: list[int]) -> TowerConfig:
    return TowerConfig(
        "qwen3_vl",
        {
            "depth": depth, "hidden_size": hidden, "num_heads": 16, "intermediate_size": mlp,
            "out_hidden_size": out, "deepstack_visual_indexes": deepstack,
            "num_position_embeddings": 2304, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        },
    )  # fmt: skip


def _qwen2_5(mlp: int, out: int) -> TowerConfig:
    return TowerConfig(
        "qwen2_5_vl",
        {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": mlp,
            "out_hidden_size": out, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
            "patch_size": 14,
        },
    )  # fmt: skip


def _qwen2(out: int) -> TowerConfig:
    return TowerConfig(
        "qwen2_vl",
        {
            "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": out,
            "patch_size": 14,
        },
    )  # fmt: skip


_TINY = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}

TOWERS: dict[str, TowerConfig] = {
    "qwen3-vl-2b": _qwen3(24, 1024, 4096, 2048, [5, 11, 17]),
    "qwen3-vl-4b": _qwen3(24, 1024, 4096, 2560, [5, 11, 17]),
    "qwen3-vl-8b": _qwen3(27, 1152, 4304, 4096, [8, 16, 24]),
    "qwen3-vl-32b": _qwen3(27, 1152, 4304, 5120, [8, 16, 24]),
    "qwen2.5-vl-3b": _qwen2_5(3420, 2048),
    "qwen2.5-vl-7b": _qwen2_5(3420, 3584),
    "qwen2.5-vl-32b": _qwen2_5(3456, 5120),
    "qwen2.5-vl-72b": _qwen2_5(3456, 8192),
    "qwen2-vl-2b": _qwen2(1536),
    "qwen2-vl-7b": _qwen2(3584),
    "qwen2-vl-72b": _qwen2(8192),
    # seconds on a CPU, for trying the benchmark itself
    "tiny-qwen3-vl": TowerConfig(
        "qwen3_vl",
        {**_TINY, "depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    ),
    "tiny-qwen2.5-vl": TowerConfig(
        "qwen2_5_vl", {**_TINY, "depth": 4, "fullatt_block_indexes": [1, 3]}
    ),
    "tiny-qwen2-vl": TowerConfig(
        "qwen2_vl",
        {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    ),
}
DEFAULT_TOWERS = ("qwen3-vl-8b", "qwen2.5-vl-7b", "qwen2-vl-7b")


def tower_config(name: str) -> TowerConfig:
    """Configuration of a tower by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TOWERS:
        raise ValueError(f"bench: tower {name!r} is not known; use one of {', '.join(TOWERS)}")
    return TOWERS[name]


def empty_tower(
    config: TowerConfig, *, device: torch.device | str, dtype: torch.dtype
) -> torch.nn.Module:
    """The tower on `device` in `dtype`, its parameters not yet written; attention is sdpa.

    It is built where it will run: buffers that no checkpoint holds (rotary frequencies, fp32 in
    every dtype of the tower) are computed by the constructor, while weights cost no time.
    """
    with torch.device(device), no_init_weights():
        model_class = _FAMILIES[config.family][0]
        tower = model_class._from_config(
            config.vision_config(), dtype=dtype, attn_implementation="sdpa"
        )
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def boost_(tower: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Overwrite every parameter with the boosted initialisation of the module docstring.

    Values are drawn in fp32 on the device of each parameter and rounded to its dtype; one seed
    gives the same weights on the same kind of device.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return torch.randn(parameter.shape, device=device, generator=generators[device])

    for path, module in tower.named_modules():
        is_norm = "Norm" in type(module).__name__
        leaf = path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Embedding):
                value = noise(parameter) * 0.3
            elif parameter.ndim >= 2:
                scale = parameter[0].numel() ** -0.5 * (2 if leaf in _QUERY_KEY else 1)
                value = noise(parameter) * scale
            else:
                value = noise(parameter) * 0.05 + (1 if is_norm and name == "weight" else 0)
            parameter.copy_(value)
    return tower


@torch.no_grad()
def calm_(tower: torch.nn.Module) -> torch.nn.Module:
    """Turn boosted weights into ones that carry a rounding error on without amplifying it.

    With doubled queries and keys attention picks single patches, and a tower of published depth is
    chaotic: rounded to bf16 throughout, its own tokens fall under a cosine of 0.99. That is right
    for comparing kernels of one precision, and blind to what another precision loses. Here queries
    and keys are single again, and every branch is scaled by 1 / sqrt(2 * depth), with which deep
    networks start training, so that all of them together weigh as much as the patches.
    """
    blocks: Any = tower.blocks
    for path, module in blocks.named_modules():
        if path.endswith(_INTO_STREAM):
            module.weight.mul_((2 * len(blocks)) ** -0.5)
        elif path.rpartition(".")[2] in _QUERY_KEY and hasattr(module, "weight"):
            module.weight.mul_(0.5)
    return tower


def build_tower(
    name: str, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> torch.nn.Module:
    """Hugging Face's tower `name` with boosted weights; see `empty_tower` and `boost_`."""
    return boost_(empty_tower(tower_config(name), device=device, dtype=dtype), seed)


@torch.no_grad()
def fp32_copy(name: str, tower: torch.nn.Module) -> torch.nn.Module:
    """The same tower with the same (already rounded) weights, computing in fp32: the oracle."""
    device = next(tower.parameters()).device
    wide = empty_tower(tower_config(name), device=device, dtype=torch.float32)
    wide.load_state_dict(tower.state_dict())
    return wide
