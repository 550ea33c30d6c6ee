"""How the configs of the Step models describe their towers."""

from collections.abc import Mapping
from typing import Any

from .image_spec import Downsample, ImageTowerSpec, RopeAxes

GLOBAL, LOCAL = "global", "local"  # paths of a Step tower: whole images and crops
LOCAL_SIZE = 504  # pixels along a side of a crop
CLASS_ROWS = 4  # Step3 was trained with its class row four times in front of the patches


class _Fields:
    """A config by attribute, whether it is an object or a mapping, under any of several names."""

    def __init__(self, config: Any, what: str):
        self._config = config
        self._what = what

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if isinstance(self._config, Mapping):
                value = self._config.get(name)
            else:
                value = getattr(self._config, name, None)
            if value is not None:
                return value
        if default is None:
            raise ValueError(f"{self._what}: {' or '.join(names)} is missing; give a whole config")
        return default


def _check_activation(fields: _Fields, family: str) -> None:
    activation = fields.get("hidden_act", default="quick_gelu")
    if activation != "quick_gelu":
        raise ValueError(
            f"{family} vision config: hidden_act = {activation!r} is not supported, only "
            "'quick_gelu'"
        )


def step3p7_spec(
    vision: Any, out_size: int = 0, projector_bias: bool = False, rope_axes: RopeAxes = "wh"
) -> ImageTowerSpec:
    """The tower of a `Step3p7VisionConfig`, or of the vision config of Step3-VL-10B.

    Args:
        vision: The config, an object or a mapping.
        out_size: Width of the text model, 0 for a tower alone.
        projector_bias: Whether the projector has a bias.
        rope_axes: "wh" as released, "hw" as in transformers before 5.23.

    Raises:
        ValueError: a field is missing, or asks for what this tower does not have.
    """
    fields = _Fields(vision, "step3p7 vision config")
    _check_activation(fields, "step3p7")
    unlike = {"use_cls_token": False, "ues_cls_token": False, "use_ln_pre": True}
    unlike |= {"use_ln_post": False, "use_abs_posemb": True, "use_rope2d": True}
    for name, released in unlike.items():
        if bool(fields.get(name, default=released)) is not released:
            raise ValueError(
                f"step3p7 vision config: {name} = {not released} is not supported; released "
                f"towers have {released}"
            )
    D = fields.get("hidden_size", "width")
    rope = fields.get("rope_parameters", default={"rope_theta": 10000.0})
    return ImageTowerSpec(
        family="step3p7",
        hidden_size=D,
        num_heads=fields.get("num_attention_heads", "heads"),
        depth=fields.get("num_hidden_layers", "layers"),
        mlp_size=int(D * fields.get("mlp_ratio", default=8960 / 1536)),
        downsamples=(Downsample(3, 2, 1, 2 * D), Downsample(3, 2, 1, 4 * D)),
        out_size=out_size,
        block="pre_norm",
        position_sampling="bilinear",
        image_size=fields.get("image_size", default=728),
        patch_size=fields.get("patch_size", default=14),
        in_channels=fields.get("num_channels", default=3),
        eps=fields.get("layer_norm_eps", default=1e-5),
        layer_scale=True,
        embed_norm=True,
        projector_bias=projector_bias,
        rope_axes=rope_axes,
        rope_theta=rope.get("rope_theta", 10000.0),
    )


def step3_vl_spec(
    vision: Any, out_size: int, projector_bias: bool = False, projector_stride: int = 2
) -> ImageTowerSpec:
    """The tower of the vision config of Step3.

    Args:
        vision: The config, an object or a mapping.
        out_size: Width of the text model.
        projector_bias: Whether the projector has a bias.
        projector_stride: Stride of the first convolution.

    Raises:
        ValueError: a field is missing, or asks for what this tower does not have.
    """
    fields = _Fields(vision, "step3_vl vision config")
    _check_activation(fields, "step3_vl")
    width = fields.get("output_hidden_size")
    return ImageTowerSpec(
        family="step3_vl",
        hidden_size=fields.get("hidden_size"),
        num_heads=fields.get("num_attention_heads"),
        depth=fields.get("num_hidden_layers"),
        mlp_size=fields.get("intermediate_size"),
        downsamples=(Downsample(2, projector_stride, 0, width), Downsample(3, 2, 1, 2 * width)),
        out_size=out_size,
        block="post_norm",
        position_sampling="bicubic_antialias",
        image_size=fields.get("image_size", default=728),
        patch_size=fields.get("patch_size", default=14),
        in_channels=fields.get("num_channels", default=3),
        eps=fields.get("layer_norm_eps", default=1e-5),
        patch_bias=True,
        projector_bias=projector_bias,
        class_rows=CLASS_ROWS,
    )


def spec_of_model(config: Mapping[str, Any], rope_axes: RopeAxes = "wh") -> ImageTowerSpec:
    """The tower and projector of a full model's config.json.

    Raises:
        ValueError: another model type, or a field that is missing or not supported.
    """
    model_type = config.get("model_type")
    vision, text = config.get("vision_config"), config.get("text_config")
    bias = bool(config.get("projector_bias", False))
    if model_type not in MODEL_TYPES or vision is None:
        raise ValueError(
            f"model type {model_type!r} is no Step model with a vision_config; supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    hidden = _Fields(text or config, f"{model_type} text config").get("hidden_size")
    if MODEL_TYPES[model_type] == "step3p7":
        return step3p7_spec(vision, hidden, bias, rope_axes)
    stride = config.get("understand_projector_stride", 2)
    return step3_vl_spec(vision, config.get("hidden_size", hidden), bias, stride)


TOWER_CLASS = "Step3p7VisionModel"  # of transformers
# model_type of config.json, to the family of its tower
MODEL_TYPES = {
    "step3p7": "step3p7",
    "step_robotics": "step3p7",
    "step3_vl": "step3_vl",
}
