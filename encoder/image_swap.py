"""What swaps of towers that take images, not packed patches with grids, have in common."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .fp8 import Fp8Plan
from .hf_tower import GraphChoice, SwappedTower

# arguments that say nothing of the result
IGNORED = ("return_dict", "use_cache", "output_hidden_states", "output_attentions")


class SwappedImageTower(SwappedTower):
    """A tower of `towers.OWN_ENCODERS` whose calls go to its encoder; also the handle of the swap.

    Its encoder is fused, so every argument that says something of the result and is not served by
    name belongs to Hugging Face's forward, which runs with the attention that it has.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        *,
        graphs: GraphChoice,
        attention: str | None,
        precision: str | Fp8Plan = "native",
    ):
        # "generic": nothing is looked up among the families of packed patches
        super().__init__(
            tower, graphs=graphs, attention=attention, precision=precision, tier="generic"
        )

    def _own_attention(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _unserved_argument(self, kwargs: Mapping[str, Any]) -> str | None:
        return next((n for n, v in kwargs.items() if n not in IGNORED and v is not None), None)
