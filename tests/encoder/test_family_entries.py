"""Entries of the table of families: how towers, configs, tensors and pixels are found with them."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from vitgraph.encoder import VisionEncoder, swap_vision_tower
from vitgraph.encoder.families import FAMILIES, WRAPPERS, family_of_model, family_of_tower
from vitgraph.encoder.preprocess import ImagePreprocessor
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

ROOT = Path(__file__).parents[2]
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
BLOCKS = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
PLAIN = {"depth": 3, **BLOCKS, "num_position_embeddings": 64}
WINDOWS = {"depth": 3, **BLOCKS, "fullatt_block_indexes": [1]}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VisionTransformerPretrainedModel,
        {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    ),
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, WINDOWS),
    "qwen2_5_omni": (Qwen2_5OmniVisionEncoder, WINDOWS),
    "qwen3_5": (Qwen3_5VisionModel, PLAIN),
}


def build(family: str, **changes: Any) -> Any:
    """A tower whose matrices are scaled by their fan-in, queries and keys doubled."""
    tower_class, arguments = TOWERS[family]
    torch.manual_seed(0)
    tower = tower_class._from_config(tower_class.config_class(**arguments | changes))
    with torch.no_grad():
        for name, p in tower.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5)
            if name.endswith(("qkv.weight", "attn.q.weight", "attn.k.weight")):
                p.mul_(2)
    return tower.eval()


@pytest.mark.parametrize(
    ("family", "image", "video_rule"),
    [
        # preprocessor_config.json of published models, and the defaults of Compass's own class
        ("qwen2_5_omni", {**CLIP, "min_pixels": 3136, "max_pixels": 12845056}, "qwen2"),
        ("qwen3_omni_moe", {**HALF, "min_pixels": 3136, "max_pixels": 12845056}, "qwen2"),
        ("qwen3_5", {**HALF, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}, "qwen3"),
        ("cohere_compass", None, "qwen3"),
    ],
)  # fmt: skip
def test_presets(family, image, video_rule):
    spec: Any = SimpleNamespace(family=family, patch_size=16, temporal_patch_size=2, merge_size=2)
    if image is None:
        home = pytest.importorskip(
            "transformers.models.cohere_compass.image_processing_pil_cohere_compass"
        )
        processor = home.CohereCompassImageProcessorPil
        image = {"size": processor.size}
        image |= {key: getattr(processor, key) for key in ("image_mean", "image_std", "resample")}
    preset = ImagePreprocessor.for_family(spec)
    read = ImagePreprocessor.from_configs(spec, image, {})
    assert read == preset
    assert preset.video_rule == video_rule


def test_a_tower_at_another_place_of_its_family():
    tower = build("qwen2_5_vl")
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.vision_model = tower  # as HyperCLOVAX-V2 has it
    for holder in (model, model.model):
        with swap_vision_tower(holder, graphs=False, tier="fused") as handle:
            assert handle.tower is tower
            assert handle.encoder.spec.family == "qwen2_5_vl"


def test_entries_are_consistent():
    names = [name for family in FAMILIES.values() for name in family.tower_classes]
    types = [name for family in FAMILIES.values() for name in family.model_types]
    assert len(names) == len(set(names))
    assert len(types) == len(set(types))
    assert not set(types) & set(WRAPPERS)
    for name, family in FAMILIES.items():
        assert family.name == name
        assert all(prefix.endswith(".") for prefix in (*family.prefixes, *family.bare_names))
        assert callable(family.preprocessor_class().for_family)
    for wrapper in WRAPPERS.values():
        assert wrapper.inner in types


@pytest.mark.parametrize(
    ("family", "key", "name"),
    [
        ("qwen3_5", "model.visual.blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("qwen3_5", "visual.merger.norm.bias", "merger.norm.bias"),
        ("qwen3_5", "model.language_model.visual.merger.norm.bias", None),
        ("qwen3_5", "blocks.0.norm1.weight", None),
        ("qwen3_5", "mtp.visual.norm.weight", None),
        ("qwen3_vl", "blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("qwen2_5_omni", "thinker.visual.blocks.0.attn.q.bias", "blocks.0.attn.q.bias"),
        ("qwen2_5_omni", "talker.visual.blocks.0.attn.q.bias", None),
        ("qwen2_vl", "vlm.model.visual.patch_embed.proj.weight", "patch_embed.proj.weight"),
        ("qwen2_5_vl", "model.vision_model.merger.ln_q.weight", "merger.ln_q.weight"),
    ],
)
def test_keys_of_checkpoints(family, key, name):
    assert FAMILIES[family].tower_key(key) == name


@pytest.mark.parametrize(
    ("config", "family", "path"),
    [
        ({"model_type": "qwen3_5_moe"}, "qwen3_5", ()),
        ({"model_type": "hyperclovax_vision_v2"}, "qwen2_5_vl", ()),
        ({"model_type": "colqwen2"}, "qwen2_vl", ("vlm_config",)),
        (
            {"model_type": "colqwen2", "vlm_config": {"model_type": "qwen2_5_vl"}},
            "qwen2_5_vl",
            ("vlm_config",),
        ),
        ({"model_type": "qwen3_omni_moe"}, "qwen3_omni_moe", ("thinker_config",)),
        (
            {"model_type": "qwen2_5_omni", "thinker_config": [1]},
            "qwen2_5_omni",
            ("thinker_config",),
        ),
    ],
)
def test_model_types(config, family, path):
    found, inner = family_of_model(config)
    assert (found.name, inner) == (family, path)


def test_an_unknown_inner_model_is_named():
    with pytest.raises(ValueError, match=r"'colpali' has no supported.*qwen3_5.*colqwen2"):
        family_of_model({"model_type": "colqwen2", "vlm_config": {"model_type": "colpali"}})


def test_deepstack_layers_in_a_config_of_a_tower_without_them():
    tower = build("qwen3_5")
    config = type(tower.config)(**PLAIN, deepstack_visual_indexes=[1])
    assert family_of_tower(tower).spec(config).deepstack_layers == ()


@pytest.mark.parametrize("family", list(TOWERS))
def test_the_base_of_the_rope_is_that_of_the_config(family):
    rope = {"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}
    plain, tower = build(family), build(family, **rope)
    grid = torch.tensor([[1, 8, 12]])
    width = 3 * 2 * tower.config.patch_size**2
    pixels = torch.randn(96, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (t(pixels, grid).pooler_output for t in (plain, tower))
        oracle = copy.deepcopy(tower).double()(pixels.double(), grid).pooler_output
        ours = VisionEncoder.from_hf(tower)(pixels, grid).pooler_output
    has_setting = hasattr(tower.config_class, "default_rope_type")  # not in 5.13
    assert (rel_rms(before, after) > 1e-2) == has_setting
    assert_as_accurate(ours, after, oracle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "qwen3_5_vision: hidden_act = 'gelu'"),
        ({"num_position_embeddings": 65}, "num_position_embeddings = 65 is not a square"),
    ],
)
def test_configs_that_are_refused(change, message):
    tower = build("qwen3_5")
    config = type(tower.config)(**(PLAIN | change))
    with pytest.raises(ValueError, match=message):
        family_of_tower(tower).spec(config)


def test_the_readme_lists_every_family():
    table = (ROOT / "README.md").read_text()
    for name in FAMILIES:
        assert f"\n| `{name}` |" in table, name


def test_code_of_the_guide_is_that_of_the_tree():
    guide = (ROOT / "docs/adding-a-family.md").read_text()
    blocks = re.findall(r"```python\n# (\S+)\n(.+?)```", guide, flags=re.DOTALL)
    assert len(blocks) == guide.count("```python") > 5
    for path, code in blocks:
        assert code in (ROOT / path).read_text(), path
    for link in re.findall(r"\]\((\.\./[^)#]+)", guide):
        assert (ROOT / "docs" / link).is_file(), link
