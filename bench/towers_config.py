"""Published vision towers, built from Hugging Face's configurations with random weights.

The weights are *boosted*: with Hugging Face's own initialisation (standard deviation 0.02)
attention contributes so little that a tower without rotary embedding passes a comparison. Here
every matrix is scaled by its fan-in, q and k are doubled, norms and biases get noise, and layer
scales lie between 0.1 and 0.3, so that dropping the rotary embedding or a segment boundary changes
the output by tens of per cent.
"""

import importlib
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers.initialization import no_init_weights

from ..encoder.families import FAMILIES
from ..encoder.kimi_vl import vision_config as kimi_vl_config
from ..encoder.spec import EncoderSpec

# family: tower and configuration in the module of that name of transformers; imported when needed,
# as an older release may lack some
_FAMILIES = {
    "qwen2_vl": ("Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig"),
    "qwen2_5_vl": ("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig"),
    "qwen2_5_omni": ("Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig"),
    "qwen3_vl": ("Qwen3VLVisionModel", "Qwen3VLVisionConfig"),
    "qwen3_omni_moe": ("Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionEncoderConfig"),
    "qwen3_5": ("Qwen3_5VisionModel", "Qwen3_5VisionConfig"),
    "glm4v": ("Glm4vVisionModel", "Glm4vVisionConfig"),
    "glm_ocr": ("GlmOcrVisionModel", "GlmOcrVisionConfig"),
    "glm5_next": ("Glm5NextVisionModel", "Glm5NextVisionConfig"),
    "paddleocr_vl": ("PaddleOCRVisionModel", "PaddleOCRVisionConfig"),
    "kimi_k25": ("Kimi_K25VisionModel", "Kimi_K25VisionConfig"),
}
# projections that add to the residual stream, by the end of their path in each family
_INTO_STREAM = ("attn.proj", "attn.out_proj", "mlp.linear_fc2", "mlp.fc2", "mlp.down_proj")
_QUERY_KEY = ("qkv", "q_proj", "k_proj", "q", "k")  # projections that hold q or k
_LAYER_SCALES = ("lambda_1", "lambda_2")


@dataclass(frozen=True)
class TowerConfig:
    """A family and the arguments of its Hugging Face vision configuration.

    Attributes:
        family, arguments: As said.
        images_only: Whether its own forward takes no batches with videos of several lengths, so
            that only images are measured.
        spec: Of our encoder for a model without a class in transformers, where the tower of
            `family` is another one's that computes the same; None to read it from that tower.
    """

    family: str
    arguments: dict[str, Any]
    images_only: bool = False
    spec: EncoderSpec | None = None

    def vision_config(self) -> Any:
        """A fresh Hugging Face configuration (towers change theirs when attention is switched)."""
        home = f"transformers.models.{self.family}.configuration_{self.family}"
        return getattr(importlib.import_module(home), _FAMILIES[self.family][1])(**self.arguments)

    def tower_class(self) -> Any:
        """Its class in transformers."""
        home = f"transformers.models.{self.family}.modeling_{self.family}"
        return getattr(importlib.import_module(home), _FAMILIES[self.family][0])


def _qwen3(depth: int, hidden: int, mlp: int, out: int, deepstack: list[int]) -> TowerConfig:
    return TowerConfig(
        "qwen3_vl",
        {
            "depth": depth, "hidden_size": hidden, "num_heads": 16, "intermediate_size": mlp,
            "out_hidden_size": out, "deepstack_visual_indexes": deepstack,
            "num_position_embeddings": 2304, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        },
    )  # fmt: skip


def _qwen3_5(out: int, **sizes: int) -> TowerConfig:
    arguments = _qwen3(27, 1152, 4304, out, []).arguments | sizes
    del arguments["deepstack_visual_indexes"]
    return TowerConfig("qwen3_5", arguments)


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


def _glm4v(merger: int) -> TowerConfig:
    return TowerConfig(
        "glm4v",
        {
            "depth": 24, "hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096,
            "intermediate_size": merger, "image_size": 336, "patch_size": 14,
        },
    )  # fmt: skip


def _kimi_vl() -> TowerConfig:
    published = kimi_vl_config({})
    return TowerConfig(
        "kimi_k25",
        {
            "hidden_size": published.hidden_size, "intermediate_size": published.intermediate_size,
            "num_hidden_layers": published.num_hidden_layers,
            "num_attention_heads": published.num_attention_heads,
            "patch_size": published.patch_size, "merge_kernel_size": published.merge_kernel_size,
            "pos_emb_height": published.init_pos_emb_height,
            "pos_emb_width": published.init_pos_emb_width,
        },
        images_only=True,
        spec=FAMILIES["kimi_vl"].spec(published),
    )  # fmt: skip


_GLM_OCR = {
    "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 14,
}  # fmt: skip
_TINY = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}

TOWERS: dict[str, TowerConfig] = {
    "qwen3-vl-2b": _qwen3(24, 1024, 4096, 2048, [5, 11, 17]),
    "qwen3-vl-4b": _qwen3(24, 1024, 4096, 2560, [5, 11, 17]),
    "qwen3-vl-8b": _qwen3(27, 1152, 4304, 4096, [8, 16, 24]),
    "qwen3-vl-32b": _qwen3(27, 1152, 4304, 5120, [8, 16, 24]),
    "qwen3-omni-30b": replace(
        _qwen3(27, 1152, 4304, 2048, [8, 16, 24]), family="qwen3_omni_moe"
    ),
    "qwen3.5-0.8b": _qwen3_5(
        1024, depth=12, hidden_size=768, num_heads=12, intermediate_size=3072
    ),
    "qwen3.5-9b": _qwen3_5(4096),
    "qwen3.5-27b": _qwen3_5(5120),
    "qwen3.5-35b": _qwen3_5(2048),
    "qwen2.5-vl-3b": _qwen2_5(3420, 2048),
    "qwen2.5-vl-7b": _qwen2_5(3420, 3584),
    "qwen2.5-vl-32b": _qwen2_5(3456, 5120),
    "qwen2.5-vl-72b": _qwen2_5(3456, 8192),
    "qwen2.5-omni-7b": replace(_qwen2_5(3420, 3584), family="qwen2_5_omni"),
    "mimo-vl-7b": _qwen2_5(3456, 4096),
    "qwen2-vl-2b": _qwen2(1536),
    "qwen2-vl-7b": _qwen2(3584),
    "qwen2-vl-72b": _qwen2(8192),
    "glm-4.1v-9b": _glm4v(13696),
    "glm-4.5v": _glm4v(10944),
    "glm-ocr": TowerConfig("glm_ocr", {**_GLM_OCR, "out_hidden_size": 1536}),
    "glm-5.3-flash": TowerConfig(
        "glm5_next",
        {**_GLM_OCR, "out_hidden_size": 4096, "projection_intermediate_size": 10240},
    ),
    "paddleocr-vl": TowerConfig("paddleocr_vl", {"image_size": 384}),
    # no tiny one: those are tried on mixtures of images and videos
    "kimi-k2.5": TowerConfig("kimi_k25", {}, images_only=True),
    "kimi-vl": _kimi_vl(),
    # seconds on a CPU, for trying the benchmark itself
    "tiny-qwen3-vl": TowerConfig(
        "qwen3_vl",
        {**_TINY, "depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    ),
    "tiny-qwen3.5": TowerConfig(
        "qwen3_5", {**_TINY, "depth": 3, "num_position_embeddings": 64}
    ),
    "tiny-qwen3-omni": TowerConfig(
        "qwen3_omni_moe",
        {**_TINY, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
    "tiny-qwen2.5-omni": TowerConfig(
        "qwen2_5_omni", {**_TINY, "depth": 3, "fullatt_block_indexes": [1]}
    ),
    "tiny-qwen2.5-vl": TowerConfig(
        "qwen2_5_vl", {**_TINY, "depth": 4, "fullatt_block_indexes": [1, 3]}
    ),
    "tiny-qwen2-vl": TowerConfig(
        "qwen2_vl",
        {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    ),
    "tiny-glm-4v": TowerConfig("glm4v", {**_TINY, "depth": 3, "image_size": 112}),
    "tiny-glm-ocr": TowerConfig("glm_ocr", {**_TINY, "depth": 3}),
    "tiny-glm-5": TowerConfig(
        "glm5_next",
        {**_TINY, "depth": 3, "projection_intermediate_size": 96, "swiglu_limit": 0.5},
    ),
    "tiny-paddleocr": TowerConfig(
        "paddleocr_vl",
        {
            "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
            "intermediate_size": 96, "image_size": 112,
        },
    ),
}  # fmt: skip
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
        tower = config.tower_class()._from_config(
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

    def generator(device: torch.device) -> torch.Generator:
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return generators[device]

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        device = parameter.device
        return torch.randn(parameter.shape, device=device, generator=generator(device))

    for path, module in tower.named_modules():
        is_norm = "Norm" in type(module).__name__
        leaf = path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Embedding) or name == "position_embeddings":
                value = noise(parameter) * 0.3
            elif parameter.ndim >= 2:
                scale = parameter[0].numel() ** -0.5 * (2 if leaf in _QUERY_KEY else 1)
                value = noise(parameter) * scale
            elif name in _LAYER_SCALES:
                value = torch.empty(parameter.shape, device=parameter.device)
                value.uniform_(0.1, 0.3, generator=generator(parameter.device))
            else:
                value = noise(parameter) * 0.05 + (1 if is_norm and name == "weight" else 0)
            parameter.copy_(value)
    return tower


def hf_grid(tower: torch.nn.Module, grid_thw: torch.Tensor) -> torch.Tensor:
    """`grid_thw` as Hugging Face's tower takes it: for GLM-4V each frame an image of its own.

    That tower looks a frame's grid up by the number of the frame. The models that own one call it
    with such grids.
    """
    if type(tower).__name__ != "Glm4vVisionModel":
        return grid_thw
    frames = grid_thw.repeat_interleave(grid_thw[:, 0], 0)
    frames[:, 0] = 1
    return frames


def hf_pixels(tower: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Pixel rows as Hugging Face's tower takes them.

    For Kimi-K2.5 as patches, for PaddleOCR-VL as patches in a batch of one.
    """
    name, config = type(tower).__name__, cast(Any, tower.config)
    if name not in ("PaddleOCRVisionModel", "Kimi_K25VisionModel"):
        return rows
    patches = rows.view(len(rows), 3, config.patch_size, config.patch_size)
    return patches if name == "Kimi_K25VisionModel" else patches[None]


def hf_blocks(tower: torch.nn.Module) -> Any:
    """The blocks of Hugging Face's tower."""
    home: Any = tower
    for name in ("blocks", "layers"):
        if hasattr(home, name):
            return getattr(home, name)
    return home.vision_model.encoder.layers


def patch_values(config: Any) -> int:
    """Values in a row of pixels, by Hugging Face's vision configuration."""
    if config.model_type == "paddleocr_vl_vision":
        return config.num_channels * config.patch_size**2
    if config.model_type == "kimi_k25_vision":
        return 3 * config.patch_size**2
    return config.in_channels * config.temporal_patch_size * config.patch_size**2


@torch.no_grad()
def calm_(tower: torch.nn.Module) -> torch.nn.Module:
    """Turn boosted weights into ones that carry a rounding error on without amplifying it.

    With doubled queries and keys attention picks single patches, and a tower of published depth is
    chaotic: rounded to bf16 throughout, its own tokens fall under a cosine of 0.99. That is right
    for comparing kernels of one precision, and blind to what another precision loses. Here queries
    and keys are single again, and every branch is scaled by 1 / sqrt(2 * depth), with which deep
    networks start training, so that all of them together weigh as much as the patches.
    """
    blocks = hf_blocks(tower)
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
