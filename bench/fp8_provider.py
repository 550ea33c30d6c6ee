"""The encoder with its linear layers in fp8, as a contender with a criterion of its own.

`ours-fp8` is the call that `ours` is, with `precision="fp8"`. It is not held to the error of bf16,
which fp8 cannot reach, but to the direction of every token: the cosine against Hugging Face's eager
tower in bf16 must be at least `MIN_MEAN` on average and `MIN_WORST` for each. It is checked and
timed on `towers_config.calm_` weights, because the boosted ones of the other contenders amplify any
rounding until bf16 itself fails this criterion. The work does not depend on the weights' values.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from .hf_providers import hf_builders
from .ours_providers import Budgets, OursTower
from .provider import Builders, Job, Provider, require_cuda
from .towers_config import build_tower, calm_, tower_config
from .workloads import Grid

MIN_MEAN, MIN_WORST = 0.999, 0.99
CRITERION = (
    f"cosine to bf16 of every token, mean >= {MIN_MEAN} and worst >= {MIN_WORST}, on calm weights"
)


def cosine_failure(features: Sequence[torch.Tensor], native: Sequence[torch.Tensor]) -> str | None:
    """Why `features` miss the criterion against those of bf16; None if they meet it.

    Both are lists of [tokens, out]; the worst feature counts. NaN misses it.

    Raises:
        ValueError: another number of features, or other shapes.
    """
    shapes, expected = ([tuple(x.shape) for x in group] for group in (features, native))
    if shapes != expected:
        raise ValueError(f"features have shapes {shapes} instead of {expected}")
    for index, (ours, theirs) in enumerate(zip(features, native, strict=True)):
        cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
        mean, worst = cosine.mean().item(), cosine.min().item()
        if not (mean >= MIN_MEAN and worst >= MIN_WORST):
            return (
                f"cosine to bf16 of feature {index} is {mean:.5f} on average and {worst:.5f} at "
                f"worst, under {MIN_MEAN} or {MIN_WORST}"
            )
    return None


class Fp8Tower:
    """The calm tower of one name in fp8, made when it is first needed.

    Args: as those of `contest.Contest`.
    """

    def __init__(
        self,
        name: str,
        workloads: Sequence[Sequence[Grid]],
        budgets: Budgets | tuple[int, ...] = "auto",
        attention: str | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ):
        self._name = name
        self._workloads = workloads
        self._budgets: Budgets | tuple[int, ...] = budgets
        self._attention = attention
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self._tower: torch.nn.Module | None = None
        self._ours: OursTower | None = None

    def builders(self) -> Builders:
        """The builder of `ours-fp8`."""
        return {"ours-fp8": self._build}

    def use_budgets(self, budgets: tuple[int, ...]) -> None:
        """Capture rungs of exactly these tokens from now on."""
        self.release()
        self._workloads, self._budgets = (), budgets

    def release(self) -> None:
        """Free graphs and weights."""
        if self._ours is not None:
            self._ours.release()
        self._tower = self._ours = None

    def _build(self, job: Job) -> Provider:
        require_cuda(self._device, "a CUDA graph")
        if self._tower is None or self._ours is None:
            self._tower = calm_(
                build_tower(self._name, device=self._device, dtype=self._dtype, seed=self._seed)
            )
            self._ours = OursTower(
                self._tower, self._workloads, self._budgets, self._attention, precision="fp8",
                spec=tower_config(self._name).spec,
            )  # fmt: skip
        tower, provider = self._tower, self._ours.builders()["ours"](job)

        def failure() -> str | None:
            native = hf_builders(tower)["hf-eager-sdpa"](job).features()
            return cosine_failure(provider.features(), native)

        return replace(provider, criterion=CRITERION, failure=failure)
