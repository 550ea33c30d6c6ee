"""What a Hugging Face tower computes from its grid, computed beforehand on the host.

A tower's forward calls functions such as `get_vision_position_ids(grid_thw, ..., kwargs=kwargs)`.
Each takes its result from `kwargs` if that is there. So one listens to one forward: which functions
it calls, with which settings, and what they look for in `kwargs`. From then on the same functions
of the installed transformers are called on the CPU, and their results handed in.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, Literal

import torch

from ..capture.protocol import Rows, RungLimits

Grid = tuple[int, int, int]
Padding = Literal["last", "own", "zero"]


class TowerRefusedError(ValueError):
    """A tower cannot be captured; the message is the reason, without the tower's name."""


class _Asked(dict):
    """An empty `kwargs` that remembers what was looked for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def pop(self, key: str, default: Any = None) -> Any:
        self.names.append(key)
        return default


@dataclass(frozen=True)
class MetadataCall:
    """A function of the grid that a tower's forward calls, with its other arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, grid_thw: torch.Tensor) -> dict[str, Any]:
        """Its results by the names under which the forward looks for them."""
        asked = _Asked()
        result = self.function(grid_thw, *self.args, **self.kwargs, kwargs=asked)
        values = result if isinstance(result, tuple) else (result,)
        if len(values) != len(asked.names):
            raise TowerRefusedError(
                f"{self.function.__name__} looks for {', '.join(asked.names) or 'nothing'}, but "
                f"returns {len(values)} values"
            )
        return dict(zip(asked.names, values, strict=True))


@dataclass(frozen=True)
class MetadataInput:
    """One tensor computed from the grid, as a static input.

    Attributes:
        rows: What its leading axis counts.
        width: Its other axes.
        dtype: As transformers computes it.
        padding: What stands behind the rows of a batch: the last row again ("last", offsets whose
            tail names empty segments), the row's own index ("own", a permutation that leaves
            padding in its place), or zero (a valid index, a weight without effect).
    """

    rows: Rows
    width: tuple[int, ...]
    dtype: torch.dtype
    padding: Padding

    def num_rows(self, limits: RungLimits) -> int:
        """Rows of the static tensor."""
        if self.rows == "frames":
            return limits.max_frames + 1
        if self.rows == "windows":
            return limits.max_windows + 1
        return limits.max_patches if self.rows == "patches" else limits.token_budget

    def padded(self, value: torch.Tensor, num_rows: int, pin: bool) -> torch.Tensor:
        """`value` and the padding behind it, on the host."""
        table = torch.zeros((num_rows, *self.width), dtype=self.dtype, pin_memory=pin)
        table[: len(value)] = value
        if self.padding == "last":
            table[len(value) :] = value[-1]
        elif self.padding == "own":
            table[len(value) :] = torch.arange(len(value), num_rows)
        return table


@dataclass(frozen=True)
class Metadata:
    """All that a tower's forward looks for.

    Attributes:
        calls: The functions that compute the tensors.
        inputs: The tensors, by name.
        lengths: Names of the longest segment's rows, and the offsets that they belong to.
    """

    calls: tuple[MetadataCall, ...]
    inputs: Mapping[str, MetadataInput]
    lengths: Mapping[str, str]

    @property
    def frame_offsets(self) -> str:
        """The offsets of the longest segments: those of frames, or of whole clips."""
        return next(name for name, spec in self.inputs.items() if spec.rows == "frames")

    @property
    def window_offsets(self) -> str | None:
        """The offsets of windows, if there are any."""
        return next((n for n, spec in self.inputs.items() if spec.rows == "windows"), None)

    def compute(self, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        """The tensors of `inputs` for exactly these items, on the CPU."""
        table = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        values: dict[str, Any] = {}
        for call in self.calls:
            values |= call(table)
        return {name: values[name] for name in self.inputs}

    def longest(self, values: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """`lengths` of tensors that `compute` returned."""
        return {
            name: max((b - a for a, b in pairwise(values[offsets].tolist())), default=0)
            for name, offsets in self.lengths.items()
        }


# it replaces functions of modules that all towers share
_LISTENING = threading.RLock()


@contextmanager
def _listening(tower: torch.nn.Module, heard: list[tuple[FunctionType, tuple, dict]]):
    """Note the calls that the modules of `tower` make of functions that take a `kwargs`."""
    homes = {sys.modules[type(module).__module__] for module in tower.modules()}
    replaced: list[tuple[Any, str, FunctionType]] = []
    listener = threading.get_ident()

    def spy_on(function: FunctionType) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            is_mine = threading.get_ident() == listener
            if is_mine and kwargs.get("kwargs") is not None:
                own = {name: value for name, value in kwargs.items() if name != "kwargs"}
                heard.append((function, args, own))
            return function(*args, **kwargs)

        return spy

    try:
        for home in homes:
            if not home.__name__.startswith("transformers."):
                continue
            for name, value in list(vars(home).items()):
                if isinstance(value, FunctionType) and _takes_kwargs_dict(value):
                    replaced.append((home, name, value))
                    setattr(home, name, spy_on(value))
        yield
    finally:
        for home, name, value in replaced:
            setattr(home, name, value)


def _takes_kwargs_dict(function: FunctionType) -> bool:
    parameter = inspect.signature(function).parameters.get("kwargs")
    return parameter is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD


@contextmanager
def hear_metadata(
    tower: torch.nn.Module, grids: Sequence[Grid]
) -> Iterator[Callable[[], tuple[list[MetadataCall], list[str]]]]:
    """While the block runs one forward of `tower` on `grids`, note what it computes from them.

    The value is a function, to be called after the block: the calls, and the names of lengths.

    Raises (that function):
        TowerRefusedError: something is computed from other tensors than the grid.
    """
    heard: list[tuple[FunctionType, tuple, dict]] = []

    def result() -> tuple[list[MetadataCall], list[str]]:
        calls: list[MetadataCall] = []
        lengths: list[str] = []
        table = torch.tensor(grids)
        for function, args, kwargs in heard:
            bound = inspect.signature(function).bind(*args, **kwargs)
            (first, value), *others = bound.arguments.items()
            if function.__name__ == "get_max_seqlen":  # of offsets computed before
                lengths.append(bound.arguments.get("kwarg_name", "max_seqlen"))
                continue
            from_grid = isinstance(value, torch.Tensor) and torch.equal(value.cpu(), table)
            if not from_grid or any(isinstance(other, torch.Tensor) for _, other in others):
                raise TowerRefusedError(
                    f"{function.__name__} computes from other tensors than grid_thw "
                    f"({', '.join(bound.arguments)})"
                )
            kwargs = {name: other for name, other in kwargs.items() if name != first}
            call = MetadataCall(function, args[1:], kwargs)
            if call not in calls:
                calls.append(call)
        return calls, lengths

    with _LISTENING, _listening(tower, heard):
        yield result


def describe_metadata(
    calls: Sequence[MetadataCall], lengths: Sequence[str], grids: Sequence[Grid], merge: int
) -> Metadata:
    """What `calls` compute, told apart by their sizes for `grids`: single frames, all different.

    Raises:
        TowerRefusedError: there are no offsets, or a tensor counts something unknown.
    """
    table = torch.tensor(grids, dtype=torch.int64)
    patches = int(table.prod(1).sum())
    tokens = patches // merge**2
    values: dict[str, Any] = {}
    for call in calls:
        values |= call(table)
    inputs: dict[str, MetadataInput] = {}
    names = list(lengths)
    for name, value in values.items():
        if value is None or isinstance(value, int):
            names.append(name)
        elif isinstance(value, torch.Tensor) and value.ndim:
            inputs[name] = _describe(name, value, len(grids), patches, tokens)
        else:
            raise TowerRefusedError(f"its {name} is a {type(value).__name__}, not a tensor of rows")
    offsets = [name for name, spec in inputs.items() if spec.padding == "last"]
    pairs = {name: f"{name.replace('max_', 'cu_', 1)}s" for name in names}
    for name, of in pairs.items():
        if of not in offsets:
            raise TowerRefusedError(f"its {name} belongs to no offsets that are known ({offsets})")
    if [inputs[name].rows for name in offsets].count("frames") != 1:
        raise TowerRefusedError(
            "it computes no cu_seqlens that could be handed in, so items would see the padding"
        )
    return Metadata(tuple(calls), inputs, pairs)


def _describe(
    name: str, value: torch.Tensor, items: int, patches: int, tokens: int
) -> MetadataInput:
    rows, width = len(value), tuple(value.shape[1:])
    if name.startswith("cu_"):
        if int(value[-1]) != patches or int(value[0]) != 0:
            raise TowerRefusedError(
                f"its {name} ends at {int(value[-1])}, not at {patches} patches"
            )
        kind: Rows = "frames" if rows == items + 1 else "windows"
        return MetadataInput(kind, width, value.dtype, "last")
    if rows not in (patches, tokens):
        raise TowerRefusedError(
            f"its {name} has {rows} rows for {patches} patches and {tokens} tokens"
        )
    kind = "patches" if rows == patches else "tokens"
    is_order = value.ndim == 1 and torch.equal(value.sort().values, torch.arange(rows))
    return MetadataInput(kind, width, value.dtype, "own" if is_order else "zero")
