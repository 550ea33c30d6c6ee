"""What the capture machinery and an encoder say to each other.

Patch: a row before the merger. Token: a row after it. Item: one image or video. Frame: one temporal
patch of an item, which is one attention segment. Window: one segment of a windowed layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

Rows = Literal["patches", "tokens", "kept", "items", "frames", "windows"]


@dataclass(frozen=True)
class EncoderItemSpec:
    """The size of one item: one image or one video.

    Attributes:
        input_size: patches (rows of `pixel_values`).
        output_tokens: tokens (rows of `pooler_output`).
        num_frames: attention segments of the full-attention layers.
        num_windows: attention segments of the windowed layers; 0 in a tower without windows.
        attention_pairs: query-key pairs of a full-attention layer, the sum over frames of their
            squared patches: what attention costs beyond its rows. 0 if the encoder does not say.
    """

    input_size: int
    output_tokens: int
    num_frames: int = 1
    num_windows: int = 0
    attention_pairs: int = 0


@dataclass(frozen=True)
class RungLimits:
    """What one rung of a ladder can hold; every field is an inclusive upper limit.

    Attributes:
        token_budget: tokens; also the name of the rung.
        max_patches: rows of `pixel_values`.
        max_items: rows of the grid table.
        max_frames: attention segments of the full-attention layers.
        max_windows: attention segments of the windowed layers; 0 in a tower without windows.
    """

    token_budget: int
    max_patches: int
    max_items: int
    max_frames: int
    max_windows: int


@dataclass(frozen=True)
class BufferSpec:
    """Shape and dtype of one static buffer; `rows` says what its leading axis counts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Rows


@dataclass(frozen=True)
class Pruning:
    """Which tokens the items of a call keep; the others are dropped inside the graph.

    Attributes:
        keep: tokens that each item keeps.
        masked: which items keep the tokens that `mask` names; the encoder ranks those of the rest.
        mask: [tokens of all items] uint8 on the CPU, 1 for a token to keep, read for masked items
            only; None if there are none.
    """

    keep: tuple[int, ...]
    masked: tuple[bool, ...]
    mask: torch.Tensor | None = None


class SupportsEncoderCudaGraph(Protocol):
    """An encoder whose whole forward can be recorded once per rung and replayed."""

    @property
    def device(self) -> torch.device:
        """Where the static buffers live."""
        ...

    def budget_range(self) -> tuple[int, int]:
        """(smallest, largest) token budget of an automatic ladder."""
        ...

    def item_specs(self, grid_thw: Sequence[tuple[int, int, int]]) -> list[EncoderItemSpec]:
        """The size of every item from its (t, h, w) in patches; ValueError on a grid it refuses."""
        ...

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        """Limits of the rung of `token_budget` tokens; none may shrink as the arguments grow."""
        ...

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static inputs of a rung; only the leading axis may depend on `limits`.

        `pixel_values` [max_patches, width] (rows: patches) and `grid` int32 [max_items, 3] (rows:
        items), whose rows past the live items are zero. An encoder that prunes names two more:
        `keep` int32 [max_items] (rows: items), how many tokens to keep or -1 for those of the mask,
        and `keep_mask` uint8 [token_budget] (rows: tokens).
        """
        ...

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static outputs of a rung; only the leading axis may depend on `limits`.

        Rows of kind "kept" are the tokens left after pruning, packed in order.
        """
        ...

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """The recorded work: read `inputs`, write `outputs`, never wait for the device.

        Of an encoder that `RecordsVariants` these are recorded instead.

        Rows of `pixel_values` past the live patches hold whatever an earlier replay left there.
        Rows of `outputs` past the live ones may hold anything.
        """
        ...

    def compile_kernels(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        rungs: Sequence[RungLimits],
    ) -> None:
        """Called before `rungs` (ascending) are warmed up one by one: compile what they launch.

        `inputs` and `outputs` are the buffers of the largest. An encoder whose kernels need no
        compilation, or cannot be compiled several at a time, does nothing.
        """
        ...

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        """The same work on the exact layout: fresh tensors under the names of `output_specs`."""
        ...

    def fingerprint(self) -> str:
        """What determines this encoder's speed, besides machine and versions: names a cache."""
        ...


@runtime_checkable
class HasFixedGrid(Protocol):
    """An encoder all of whose items have one grid, such as a path for images of one size."""

    @property
    def fixed_grid(self) -> tuple[int, int, int]:
        """That grid, (t, h, w) in patches."""
        ...


@runtime_checkable
class RecordsVariants(Protocol):
    """An encoder that records a rung in several ways and picks one for each batch.

    Other kernels may suit other batches of as many tokens.
    """

    def variants(self, limits: RungLimits) -> tuple[str, ...]:
        """Names of the ways to record a rung."""
        ...

    def variant_of(self, limits: RungLimits, items: Sequence[EncoderItemSpec]) -> str:
        """Which of `variants(limits)` serves a batch of these items."""
        ...

    def variant_forward(
        self,
        variant: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """`graph_forward` in one of these ways."""
        ...


@runtime_checkable
class StagesInputs(Protocol):
    """An encoder whose static inputs, but for the pixels, are not the grid table.

    `input_specs` may then name any tensors beside `pixel_values`.
    """

    def stage(
        self, grid_thw: Sequence[tuple[int, int, int]], limits: RungLimits
    ) -> Mapping[str, torch.Tensor]:
        """These inputs of a rung for the items of one batch: whole tables, padding included.

        On the host, and pinned where the encoder is on a GPU. They are copied without waiting and
        must not be written afterwards, so an encoder may keep and return them again.
        """
        ...
