"""Tiny towers of every packed family of transformers, and what a rung's static buffers are.

The default initialisation is blind to missing positions and segments; these weights are scaled by
their fan-in, with queries and keys doubled.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.encoder.hf_probe import read_outputs

BLOCKS: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 64,
}
LAYERS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TABLE = {"num_position_embeddings": 64}
DEEPSTACK = {"deepstack_visual_indexes": [0, 2]}
WINDOWS = {"fullatt_block_indexes": [1]}

# model type: (config class, tower class, config)
CAPTURABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        BLOCKS | WINDOWS,
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniVisionEncoderConfig",
        "Qwen2_5OmniVisionEncoder",
        BLOCKS | WINDOWS,
    ),
    "exaone4_5": (
        "Exaone4_5_VisionConfig",
        "Exaone4_5_VisionModel",
        BLOCKS | WINDOWS | {"num_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen3_vl": ("Qwen3VLVisionConfig", "Qwen3VLVisionModel", BLOCKS | TABLE | DEEPSTACK),
    "qwen3_vl_moe": ("Qwen3VLMoeVisionConfig", "Qwen3VLMoeVisionModel", BLOCKS | TABLE | DEEPSTACK),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeVisionEncoderConfig",
        "Qwen3OmniMoeVisionEncoder",
        BLOCKS | TABLE | DEEPSTACK,
    ),
    "cohere_compass": (
        "CohereCompassVisionConfig",
        "CohereCompassVisionModel",
        BLOCKS | TABLE | DEEPSTACK,
    ),
    "qwen3_5": ("Qwen3_5VisionConfig", "Qwen3_5VisionModel", BLOCKS | TABLE),
    "qwen3_5_moe": ("Qwen3_5MoeVisionConfig", "Qwen3_5MoeVisionModel", BLOCKS | TABLE),
    "qwen4_exp": ("Qwen4ExpVisionConfig", "Qwen4ExpVisionModel", BLOCKS | TABLE),
    "glm4v": ("Glm4vVisionConfig", "Glm4vVisionModel", BLOCKS | {"image_size": 112}),
    "glm4v_moe": ("Glm4vMoeVisionConfig", "Glm4vMoeVisionModel", BLOCKS | {"image_size": 112}),
    "glm_ocr": ("GlmOcrVisionConfig", "GlmOcrVisionModel", BLOCKS),
    "glm5_next": (
        "Glm5NextVisionConfig",
        "Glm5NextVisionModel",
        BLOCKS | {"projection_intermediate_size": 96},
    ),
    "glm_image": (
        "GlmImageVisionConfig",
        "GlmImageVisionModel",
        {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "image_size": 128},
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeVisionConfig",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
    ),
    "paddleocr_vl": ("PaddleOCRVisionConfig", "PaddleOCRVisionModel", LAYERS | {"image_size": 112}),
    "kimi_k25": (
        "Kimi_K25VisionConfig",
        "Kimi_K25VisionModel",
        LAYERS | {"pos_emb_height": 8, "pos_emb_width": 8},
    ),
}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minimax_m3_vl": ("MiniMaxM3VLVisionConfig", "MiniMaxM3VLVisionModel", LAYERS),
    "video_llama_3": (
        "VideoLlama3VisionConfig",
        "VideoLlama3VisionModel",
        LAYERS | {"patch_size": 14},
    ),
    "hunyuan_vl": (
        "HunYuanVLVisionConfig",
        "HunYuanVLVisionTransformer",
        LAYERS | {"num_key_value_heads": 2, "max_image_size": 128, "text_hidden_size": 64},
    ),
    "muse_glimmer": (
        "MuseGlimmerVisionConfig",
        "MuseGlimmerVisionModel",
        LAYERS
        | {
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "layer_types": ["window_attention", "full_attention", "window_attention"],
        },
    ),
    "cosmos3_edge": (
        "Cosmos3EdgeVisionConfig",
        "Cosmos3EdgeVisionModel",
        LAYERS | {"num_patches": 64},
    ),
    "minicpmv4_6": (
        "MiniCPMV4_6VisionConfig",
        "MiniCPMV4_6VisionModel",
        LAYERS | {"image_size": 128, "insert_layer_id": 1},
    ),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", LAYERS | {"num_patches": 64}),
    "step3p7": (
        "Step3p7VisionConfig",
        "Step3p7VisionModel",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 112},
    ),
}

LAYOUTS: dict[str, list[tuple[int, int, int]]] = {
    "images": [(1, 8, 12), (1, 4, 6), (1, 10, 18)],
    "one": [(1, 6, 4)],
    "videos": [(3, 4, 6), (3, 8, 4)],
    "mixed": [(1, 10, 18), (3, 8, 12), (1, 2, 2), (2, 4, 6)],
}


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a tower shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            fan_in = p.shape[-1] if p.ndim <= 3 else p[0].numel()
            p.normal_(0, 0.3 if "pos" in name else fan_in**-0.5)
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "q.weight")):
                p.mul_(2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Towers of width 64 are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build(model_type, dtype=torch.float32, **config)`: a boosted tower in eval mode."""

    def build(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        config_class, tower_class, settings = (CAPTURABLE | REFUSED)[model_type]
        home = f"transformers.models.{model_type}"
        configuration = importlib.import_module(f"{home}.configuration_{model_type}")
        modeling = importlib.import_module(f"{home}.modeling_{model_type}")
        torch.manual_seed(0)
        config = getattr(configuration, config_class)(**settings | overrides)
        tower = getattr(modeling, tower_class)._from_config(config)
        boost(tower)
        return tower.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def boosted() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """`boosted(module)`: the module, boosted and in eval mode."""

    def make(module: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        boost(module)
        return module.eval()

    return make


class Case:
    """A tower, its encoder, and its own forward in fp32 and fp64."""

    def __init__(self, tower: Any):
        self.tower = tower
        self.encoder = GenericEncoder(tower)
        self.twin = copy.deepcopy(tower).double()

    def takes(self, layout: str) -> bool:
        """Whether the tower's own forward takes the items of a layout."""
        frames = [t for t, _, _ in LAYOUTS[layout]]
        most = self.encoder.facts.max_frames_per_item
        if self.encoder.facts.pools_frames:
            return len(set(frames)) == 1  # its own forward refuses other batches
        return most is None or max(frames) <= most

    def pixels(self, grids: Sequence[tuple[int, int, int]], seed: int = 1) -> torch.Tensor:
        rows = sum(t * h * w for t, h, w in grids)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, *self.encoder.facts.pixel_shape, generator=generator)

    def own(self, pixels: torch.Tensor, grids: Any, tower: Any = None) -> dict[str, torch.Tensor]:
        """What Hugging Face's forward gives."""
        tower = self.tower if tower is None else tower
        pixels = pixels.to(next(tower.parameters()).dtype)
        with torch.no_grad():
            output = tower(
                pixels[None] if self.encoder.facts.batched else pixels,
                grid_thw=torch.tensor(grids),
            )
        return read_outputs(output, self.encoder.facts.outputs)

    def buffers(self, limits: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Static inputs and outputs of a rung, full of what should not be read."""

        def rubbish(spec: Any) -> torch.Tensor:
            if spec.dtype.is_floating_point:
                return torch.full(spec.shape, torch.nan, dtype=spec.dtype)
            return torch.full(spec.shape, -(2**30), dtype=spec.dtype)

        encoder = self.encoder
        inputs = {name: rubbish(spec) for name, spec in encoder.input_specs(limits).items()}
        outputs = {name: rubbish(spec) for name, spec in encoder.output_specs(limits).items()}
        return inputs, outputs

    def stage(
        self, inputs: Mapping[str, torch.Tensor], pixels: torch.Tensor, grids: Any, limits: Any
    ) -> None:
        """Put a batch into static inputs, as a replay does."""
        tables = self.encoder.stage(grids, limits)
        assert tables.keys() | {"pixel_values"} == inputs.keys()
        for name, table in tables.items():
            inputs[name].copy_(table)
        inputs["pixel_values"][: len(pixels)] = pixels

    def replayed(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        expected: Mapping[str, torch.Tensor],
        limits: Any,
    ) -> dict[str, torch.Tensor]:
        """The live rows of what a replay would compute."""
        with torch.no_grad():
            self.encoder.graph_forward(inputs, outputs, limits)
        return {name: outputs[name][: len(value)].clone() for name, value in expected.items()}


@pytest.fixture(scope="session")
def cases(build) -> Callable[[str], Case]:
    """`cases(model_type)`: the case, made once."""
    made: dict[str, Case] = {}

    def case(model_type: str) -> Case:
        if model_type not in made:
            made[model_type] = Case(build(model_type))
        return made[model_type]

    return case


class EagerRecorder:
    """A recorder without CUDA: a replay runs the work again on the same buffers."""

    class Recording:
        def __init__(self, work: Callable[[], None]):
            self.replay = work

    def new_pool(self) -> None:
        return None

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None], pool: Any) -> "EagerRecorder.Recording":
        return self.Recording(work)


@pytest.fixture
def recorder() -> EagerRecorder:
    """Records without CUDA."""
    return EagerRecorder()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        metafunc.parametrize("model_type", list(CAPTURABLE))
    if "refused_type" in metafunc.fixturenames:
        metafunc.parametrize("refused_type", list(REFUSED))
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", list(LAYOUTS))


@pytest.fixture
def grids(layout: str) -> list[tuple[int, int, int]]:
    """The items of a layout."""
    return LAYOUTS[layout]
