"""The published Step towers, as specs: they take whole images, so `towers_config` has none."""

from ..encoder.image_spec import ImageTowerSpec
from ..encoder.step_spec import step3_vl_spec, step3p7_spec

STEP_TOWERS: dict[str, ImageTowerSpec] = {
    # also that of Step3-VL-10B
    "step-3.7": step3p7_spec(
        {"hidden_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 16}, out_size=4096
    ),
    "step3": step3_vl_spec(
        {
            "hidden_size": 1792, "num_hidden_layers": 63, "num_attention_heads": 16,
            "intermediate_size": 15360, "output_hidden_size": 4096,
        },
        out_size=7168,
    ),
}  # fmt: skip
