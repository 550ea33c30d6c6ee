"""InternVL's tower and projector on tiles, beside Hugging Face's."""

from collections.abc import Callable
from typing import Any

import torch

from ..encoder import internvl
from ..encoder.image_spec import ImageTowerSpec
from ..encoder.internvl_encoder import InternVLEncoder, InternVLOutput
from .image_contest import Parts
from .towers_config import boost_

# vision config, and the width of the language model that the projector ends in
INTERNVL_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "internvl3-8b": (
        {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096, "attention_bias": True, "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        3584,
    ),
    "internvl3-38b": (
        {
            "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25,
            "intermediate_size": 12800, "norm_type": "rms_norm", "use_qk_norm": True,
            "image_size": [448, 448], "patch_size": [14, 14],
        },
        5120,
    ),
}  # fmt: skip
WORKLOADS: dict[str, int] = {"1tile": 1, "7tiles": 7, "13tiles": 13, "52tiles": 52}
_SLOW = {"internvl3-38b": ("52tiles",)}  # the fp32 oracle most of all


def workloads(tower: str) -> dict[str, int]:
    """Those of `WORKLOADS` that a tower is measured at."""
    return {name: n for name, n in WORKLOADS.items() if name not in _SLOW.get(tower, ())}


class InternVLContest:
    """Hugging Face's model in the dtype and in fp32, and ours, on one device."""

    def __init__(
        self,
        vision: dict[str, Any],
        out_size: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ):
        self.model = _hf_model(vision, out_size, device, dtype)
        self.exact = _hf_model(vision, out_size, device, torch.float32)
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        boost_(self.model.vision_tower, seed)
        boost_(self.model.multi_modal_projector, seed + 1)
        for part in ("vision_tower", "multi_modal_projector"):
            getattr(self.exact, part).load_state_dict(getattr(self.model, part).state_dict())
        self.encoder = InternVLEncoder.from_hf(self.model)

    def inputs(self, workload: int) -> torch.Tensor:
        """So many tiles, in the dtype."""
        spec = self.encoder.spec
        shape = workload, spec.in_channels, spec.image_size, spec.image_size
        return torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)

    def patches(self, inputs: torch.Tensor) -> int:
        """Patches of all tiles."""
        return len(inputs) * (self.encoder.spec.image_size // self.encoder.spec.patch_size) ** 2

    def theirs(self, inputs: torch.Tensor, *, exact: bool = False) -> Parts:
        """States of the tower, class row included, and projected tokens."""
        model = self.exact if exact else self.model
        output = model.get_image_features(inputs.to(torch.float32 if exact else self.dtype))
        return [output["last_hidden_state"], output["pooler_output"]]

    def theirs_without_host(self, inputs: torch.Tensor) -> Callable[[], Parts]:
        """The same: it reads nothing on the host."""
        return lambda: self.theirs(inputs)

    def recorded_parts(self, output: Parts, inputs: torch.Tensor) -> Parts:
        """They are those of `theirs` already."""
        return output

    def ours(self, inputs: torch.Tensor) -> InternVLOutput:
        """Tiles in, features out."""
        return self.encoder(inputs, check_finite=False)

    def parts(self, output: InternVLOutput, inputs: torch.Tensor) -> Parts:
        """States and projected tokens."""
        assert output.pooler_output is not None  # the model has its projector
        return [output.last_hidden_state, output.pooler_output]


def internvl_spec(name: str) -> ImageTowerSpec:
    """A tower of `INTERNVL_TOWERS`, with its projector, as its encoder has it."""
    return internvl.spec(_hf_config(*INTERNVL_TOWERS[name]))


def _hf_config(vision: dict[str, Any], out_size: int) -> Any:
    """Of a model with a language model of one small layer, which is not used."""
    from transformers import AutoConfig

    text = {
        "model_type": "qwen2", "hidden_size": out_size, "num_hidden_layers": 1,
        "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1,
        "vocab_size": 512,
    }  # fmt: skip
    return AutoConfig.for_model(
        "internvl", vision_config=vision, text_config=text, image_token_id=500
    )


def _hf_model(
    vision: dict[str, Any], out_size: int, device: torch.device, dtype: torch.dtype
) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    config = _hf_config(vision, out_size)
    with torch.device(device), no_init_weights():
        model = transformers.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)
