"""The tower families that vitgraph knows: names, places, readers of configs and weights."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import (
    glm4v,
    internvl,
    kimi_k25,
    kimi_vl,
    paddleocr_vl,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    siglip2,
    step_spec,
)
from .presets import (
    COMPASS,
    GLM4V,
    GLM5,
    GLM46V,
    KIMI,
    KIMI_VL,
    PADDLEOCR,
    QWEN2,
    QWEN3,
    QWEN3_OMNI,
    PixelPreset,
)
from .spec import EncoderSpec
from .weight_map import Rule

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How the towers of one family are found, read and fed.

    Attributes:
        name: As `EncoderSpec.family` holds it.
        models: What people call the models, for messages and lists.
        model_types: `model_type` of the configs of full models, as in config.json.
        tower_classes: Names of the tower's classes in transformers; none where it has no such
            class, and checkpoints are all there is.
        read_spec: Vision config to spec; `spec` calls it.
        weight_map: Spec to the rules of its weights.
        preset: Settings of the preprocessing without files of a model folder.
        tower_paths: Attributes that lead from a live model to the tower, in the order tried.
        prefixes: Beginnings of the tower's tensors in checkpoints, each ending with a dot.
        bare_names: The same for checkpoints that write the tower's tensors without any prefix:
            beginnings of Hugging Face's own names.
        preprocessor: "module:class" in this package of what turns inputs into pixel rows; see
            `preprocess.Preprocessor`.
        published: Tensors of a checkpoint, without the prefix, to those of the live tower; None
            where checkpoints have Hugging Face's names and layout.
        read_config: config.json of a full model to its vision config; None where transformers has
            classes for both.
    """

    name: str
    models: str
    model_types: tuple[str, ...]
    tower_classes: tuple[str, ...]
    read_spec: Callable[[Any], EncoderSpec]
    weight_map: Callable[[EncoderSpec], list[Rule]]
    preset: PixelPreset
    tower_paths: tuple[str, ...] = ("model.visual", "visual")
    prefixes: tuple[str, ...] = ("model.visual.", "visual.")
    bare_names: tuple[str, ...] = ()
    preprocessor: str = "preprocess:ImagePreprocessor"
    published: Callable[[Tensors, EncoderSpec], Tensors] | None = None
    read_config: Callable[[Mapping[str, Any]], Any] | None = None

    def spec(self, config: Any) -> EncoderSpec:
        """The tower that a vision config describes.

        Raises:
            ValueError: the config asks for something that the tower does not have.
        """
        return replace(self.read_spec(config), family=self.name)

    def hf_tensors(self, tensors: Tensors, spec: EncoderSpec) -> Tensors:
        """Tensors of a checkpoint, without the prefix, by the names of the live tower.

        Raises:
            ValueError: a tensor of another shape than it must have to be converted.
        """
        return tensors if self.published is None else self.published(tensors, spec)

    def preprocessor_class(self) -> Any:
        """The class that `preprocessor` names."""
        module, _, name = self.preprocessor.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)

    def tower_key(self, key: str) -> str | None:
        """The name of a checkpoint's tensor without the tower's prefix; None for other tensors."""
        inner = [key] + [key.removeprefix(f"{w.attribute}.") for w in WRAPPERS.values()]
        for name in inner:
            for prefix in self.prefixes:
                if name.startswith(prefix):
                    return name[len(prefix) :]
        return key if key.startswith(self.bare_names) else None


@dataclass(frozen=True)
class Wrapper:
    """A model type whose tower belongs to a model inside.

    Attributes:
        config: Attribute of its config that holds the config of the model inside.
        attribute: Attribute of a live model, and beginning of tensor names.
        inner: `model_type` of the model inside where its config names none.
    """

    config: str
    attribute: str
    inner: str


WRAPPERS = {
    "colqwen2": Wrapper("vlm_config", "vlm", "qwen2_vl"),
    "qwen2_5_omni": Wrapper("thinker_config", "thinker", "qwen2_5_omni_thinker"),
    "qwen3_omni_moe": Wrapper("thinker_config", "thinker", "qwen3_omni_moe_thinker"),
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "qwen2_vl",
            "Qwen2-VL, ColQwen2",
            ("qwen2_vl",),
            ("Qwen2VisionTransformerPretrainedModel",),
            qwen2_vl.spec,
            qwen2_vl.weight_map,
            QWEN2,
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL, HyperCLOVAX-V2",
            ("qwen2_5_vl", "hyperclovax_vision_v2"),
            ("Qwen2_5_VisionTransformerPretrainedModel",),
            qwen2_5_vl.spec,
            qwen2_5_vl.weight_map,
            QWEN2,
            tower_paths=("model.visual", "visual", "model.vision_model", "vision_model"),
            prefixes=("model.visual.", "visual.", "model.vision_model."),
        ),
        Family(
            "qwen2_5_omni",
            "Qwen2.5-Omni",
            ("qwen2_5_omni_thinker",),
            ("Qwen2_5OmniVisionEncoder",),
            qwen2_5_vl.spec,
            qwen2_5_omni.weight_map,
            QWEN2,
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL, Cosmos3-Omni",
            ("qwen3_vl", "cosmos3_omni"),
            ("Qwen3VLVisionModel",),
            qwen3_vl.spec,
            qwen3_vl.weight_map,
            QWEN3,
            # as Cosmos3-Omni is published
            bare_names=(
                "patch_embed.",
                "pos_embed.",
                "blocks.",
                "merger.",
                "deepstack_merger_list.",
            ),
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3-VL-MoE",
            ("qwen3_vl_moe",),
            ("Qwen3VLMoeVisionModel",),
            qwen3_vl.spec,
            qwen3_vl.weight_map,
            QWEN3,
        ),
        Family(
            "qwen3_omni_moe",
            "Qwen3-Omni",
            ("qwen3_omni_moe_thinker",),
            ("Qwen3OmniMoeVisionEncoder",),
            qwen3_vl.spec,
            partial(
                qwen3_vl.weight_map,
                merger_parts=("ln_q", "mlp.0", "mlp.2"),
                deepstack="merger_list",
            ),
            QWEN3_OMNI,
        ),
        Family(
            "qwen3_5",
            "Qwen3.5, Qwen3.6, Qwen4-Exp",
            ("qwen3_5", "qwen3_5_moe", "qwen4_exp"),
            ("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Qwen4ExpVisionModel"),
            qwen3_5.spec,
            qwen3_vl.weight_map,
            QWEN3,
        ),
        Family(
            "cohere_compass",
            "Cohere Compass",
            ("cohere_compass",),
            ("CohereCompassVisionModel",),
            qwen3_vl.spec,
            qwen3_vl.weight_map,
            COMPASS,
        ),
        Family(
            "glm4v",
            "GLM-4.1V, GLM-4.5V, GLM-4.6V",
            ("glm4v", "glm4v_moe", "glm46v"),
            ("Glm4vVisionModel", "Glm4vMoeVisionModel"),
            glm4v.spec,
            glm4v.weight_map,
            GLM4V,
        ),
        Family(
            "glm_ocr",
            "GLM-OCR",
            ("glm_ocr",),
            ("GlmOcrVisionModel",),
            glm4v.ocr_spec,
            glm4v.weight_map,
            GLM46V,
        ),
        Family(
            "glm5_next",
            "GLM-5",
            ("glm5_next",),
            ("Glm5NextVisionModel",),
            glm4v.glm5_spec,
            glm4v.weight_map,
            GLM5,
            preprocessor="glm5_preprocess:CanvasPreprocessor",
        ),
        Family(
            "paddleocr_vl",
            "PaddleOCR-VL",
            ("paddleocr_vl",),
            ("PaddleOCRVisionModel",),
            paddleocr_vl.spec,
            paddleocr_vl.weight_map,
            PADDLEOCR,
            preprocessor="raster_preprocess:RasterPreprocessor",
        ),
        Family(
            "kimi_k25",
            "Kimi-K2.5, Kimi-K2.6",
            ("kimi_k25",),
            ("Kimi_K25VisionModel",),
            kimi_k25.spec,
            kimi_k25.weight_map,
            KIMI,
            tower_paths=("model.vision_tower", "vision_tower"),
            prefixes=("model.vision_tower.", "vision_tower."),
            preprocessor="kimi_preprocess:NavitPreprocessor",
            published=kimi_k25.to_hf_names,
        ),
        Family(
            "kimi_vl",
            "Kimi-VL",
            ("kimi_vl",),
            (),
            kimi_vl.spec,
            kimi_k25.weight_map,
            KIMI_VL,
            prefixes=("model.vision_tower.", "vision_tower."),
            preprocessor="kimi_vl_preprocess:MoonViTPreprocessor",
            published=kimi_k25.to_hf_names,
            read_config=kimi_vl.vision_config,
        ),
    )
}


def family_of_model(config: Mapping[str, Any]) -> tuple[Family, tuple[str, ...]]:
    """The family of a full model's config.json, and the attributes to the inner model's config.

    Raises:
        ValueError: the type is not supported; the message lists the supported ones.
    """
    path: tuple[str, ...] = ()
    model_type = config.get("model_type")
    while (wrapper := WRAPPERS.get(str(model_type))) is not None:
        path += (wrapper.config,)
        inside = config.get(wrapper.config)
        config = inside if isinstance(inside, Mapping) else {}
        model_type = config.get("model_type", wrapper.inner)
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family, path
    if str(model_type) in step_spec.MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has a tower for whole images of one size, not for packed "
            "patches; use vitgraph.encoder.StepEncoder"
        )
    if model_type in siglip2.MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has a tower that takes spatial_shapes, not grid_thw; use "
            "vitgraph.encoder.Siglip2Encoder"
        )
    if model_type in (*internvl.MODEL_TYPES, internvl.FIRST_FORMAT):
        hint = ""
        if model_type == internvl.FIRST_FORMAT:
            hint = " with the repository that ends in -hf (transformers' own format)"
        raise ValueError(
            f"model type {model_type!r} has a tower that takes tiles of one size, not packed "
            f"patches; use vitgraph.encoder.InternVLEncoder{hint}"
        )
    supported = [t for family in FAMILIES.values() for t in family.model_types]
    raise ValueError(
        f"model type {model_type!r} has no supported vision tower; supported: "
        f"{', '.join((*supported, *WRAPPERS))}"
    )


def family_of_tower(tower: object) -> Family:
    """The family of a live Hugging Face tower.

    Raises:
        ValueError: the tower's class is not supported; the message lists the supported ones.
    """
    name = type(tower).__name__
    for family in FAMILIES.values():
        if name in family.tower_classes:
            return family
    if name == step_spec.TOWER_CLASS:
        raise ValueError(
            f"vision tower {name!r} takes whole images of one size, not packed patches; use "
            "vitgraph.encoder.StepEncoder, or swap_vision_tower for its model"
        )
    if name == siglip2.TOWER_CLASS:
        raise ValueError(
            f"vision tower {name!r} takes spatial_shapes, not grid_thw; use "
            "vitgraph.encoder.Siglip2Encoder, or swap_vision_tower for its model"
        )
    if name in internvl.TOWER_CLASSES:
        raise ValueError(
            f"vision tower {name!r} takes tiles of one size, not packed patches; use "
            "vitgraph.encoder.InternVLEncoder, or swap_vision_tower for its model"
        )
    if name == kimi_vl.REMOTE_TOWER:
        raise ValueError(
            f"vision tower {name!r} runs by code that came with its checkpoint; load the tower "
            "without it: vitgraph.encoder.VisionEncoder.from_pretrained(folder or Hub id)"
        )
    supported = ", ".join(name for f in FAMILIES.values() for name in f.tower_classes)
    raise ValueError(f"vision tower {name!r} is not supported; supported: {supported}")
