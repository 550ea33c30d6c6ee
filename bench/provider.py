"""A contender in the tower benchmark, and what it is asked to do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .workloads import Grid


class UnavailableError(Exception):
    """A contender cannot run here; the message is the reason printed in its row."""


@dataclass(frozen=True)
class Job:
    """One workload on one tower.

    Attributes:
        grids: Items (t, h, w) in patches.
        grid_thw: The same as an int64 tensor [N, 3] on the tower's device.
        pixel_values: [T, P] in the tower's dtype, on its device.
    """

    grids: tuple[Grid, ...]
    grid_thw: torch.Tensor
    pixel_values: torch.Tensor


@dataclass(frozen=True)
class Provider:
    """A contender made ready for one job.

    Attributes:
        call: What is timed.
        features: Runs the same computation and returns what `features_of` does.
        padded_patches: Rows of pixels that it computes on, padding included.
        attention: Backend of ours over whole frames; None for the others.
        replays: CUDA graphs of ours that one call replays; None for the others.
        holds: What `call` reads by address, and nothing else keeps alive: a graph's inputs.
        criterion: What it must meet instead of the error ratio, in words; None for the ratio.
        failure: Says why it misses `criterion`, or None if it meets it.
    """

    call: Callable[[], object]
    features: Callable[[], list[torch.Tensor]]
    padded_patches: int
    attention: str | None = None
    replays: int | None = None
    holds: tuple[Any, ...] = ()
    criterion: str | None = None
    failure: Callable[[], str | None] | None = None


Builder = Callable[[Job], Provider]
Builders = Mapping[str, Builder]


def features_of(output: Any) -> list[torch.Tensor]:
    """[pooler_output, *deepstack_features] of a Hugging Face output or a `VisionOutput`.

    Of a tower without a merger, whose `pooler_output` is None, the last hidden state. Patches of a
    token on an axis of their own (Kimi) are brought side by side.
    """
    pooled = output.pooler_output
    pooled = output.last_hidden_state if pooled is None else pooled
    return [pooled.flatten(1), *(getattr(output, "deepstack_features", None) or [])]


def make_job(
    grids: Sequence[Grid], patch_values: int, *, device: torch.device, dtype: torch.dtype, seed: int
) -> Job:
    """Unit-normal pixels for `grids`, drawn in fp32 on the CPU: the same on every device."""
    rows = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(rows, patch_values, generator=torch.Generator().manual_seed(seed))
    table = torch.tensor(grids, dtype=torch.int64, device=device)
    return Job(tuple(grids), table, pixels.to(device=device, dtype=dtype))


def require_cuda(device: torch.device, name: str) -> None:
    """Raise `UnavailableError` unless `device` is a CUDA device."""
    if device.type != "cuda":
        raise UnavailableError(f"{name} needs a CUDA device, the tower is on {device}")
