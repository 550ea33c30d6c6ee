"""How Hugging Face's tensors become ours, and back: exact rules, one per prepared tensor.

Every rule is algebra on whole tensors (reshape, stack, reorder, zero padding), so
`unpack(pack(x)) == x` bit for bit. A rule that only reshapes returns a view: a tower taken from a
live module shares its memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rule:
    """One prepared tensor.

    Attributes:
        name: Our name.
        sources: Hugging Face's names, without the tower's prefix.
        shape: Shape of each source.
        pad_rows, pad_columns: Zero rows and columns appended to each source.
        axes: Order of the source's axes before all but the first are joined; () keeps it.
        row_axes: Leading axes that are joined to rows, the others to columns.
        row_orders: For each source, the order of the rows within every run of so many, such as a
            head; () keeps it. No entries keep that of all.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    pad_rows: int = 0
    pad_columns: int = 0
    axes: tuple[int, ...] = ()
    row_axes: int = 1
    row_orders: tuple[tuple[int, ...], ...] = ()

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The prepared tensor; sources are stacked along the rows.

        Raises:
            ValueError: a source is missing, has another shape, or is quantised.
        """
        parts = [self._source(tensors, name) for name in self.sources]
        for i, order in enumerate(self.row_orders):
            parts[i] = _reordered(parts[i], order)
        if self.pad_rows or self.pad_columns:
            # F.pad takes the last axis first
            pads = [0, self.pad_columns] if parts[0].ndim == 2 else []
            parts = [F.pad(p, [*pads, 0, self.pad_rows]) for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, prepared: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hugging Face's tensors, by name; contiguous, as files of tensors need them."""
        rows = prepared.shape[0] // len(self.sources)
        parts = {}
        for i, name in enumerate(self.sources):
            part = prepared[i * rows : (i + 1) * rows - self.pad_rows]
            if self.row_orders:
                order = self.row_orders[i]
                part = _reordered(part, tuple(sorted(range(len(order)), key=order.__getitem__)))
            if self.pad_columns:
                part = part[:, : -self.pad_columns]
            if self.axes:
                part = part.reshape([self.shape[axis] for axis in self.axes])
                back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
                part = part.permute(back)
            parts[name] = part.reshape(self.shape).contiguous()
        return parts

    def _source(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(
                f"weights: tensor {name!r} is missing (expected shape {list(self.shape)}); "
                "the checkpoint is incomplete or of another tower family"
            )
        if tuple(tensor.shape) != self.shape:
            raise ValueError(
                f"weights: tensor {name!r} has shape {list(tensor.shape)}, expected "
                f"{list(self.shape)}; the checkpoint does not match its config"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"weights: tensor {name!r} is {tensor.dtype}; quantised towers are not supported, "
                "use a checkpoint in bfloat16, float16 or float32"
            )
        if self.axes:
            tensor = tensor.permute(self.axes)
        tensor = tensor.flatten(0, self.row_axes - 1)
        # a convolution whose stride is its kernel is a matrix
        return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _reordered(rows: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if not order:
        return rows
    runs = rows.reshape(-1, len(order), *rows.shape[1:])
    return runs[:, list(order)].reshape(rows.shape)


def neighbour_rule(rule: Rule, num_heads: int) -> Rule:
    """`rule` of q, k and v, in one source or three, with pairs of q and k side by side.

    Pair i of a head of Hugging Face's is its elements i and i + half.
    """
    rows = rule.shape[0] * len(rule.sources) // 3
    half = rows // num_heads // 2
    pairs = tuple(place for i in range(half) for place in (i, i + half))
    if len(rule.sources) == 1:
        qk = [start + i for start in range(0, 2 * rows, 2 * half) for i in pairs]
        run = rule.row_orders[0] if rule.row_orders else (0,)
        before = [start + i for start in range(0, 3 * rows, len(run)) for i in run]
        return replace(
            rule, row_orders=(tuple(before[i] for i in [*qk, *range(2 * rows, 3 * rows)]),)
        )
    before = rule.row_orders or ((), (), ())
    qk = tuple(tuple(order[i] for i in pairs) if order else pairs for order in before[:2])
    return replace(rule, row_orders=(*qk, before[2]))


def linear(ours: str, theirs: str, rows: int, columns: int, *, bias: bool = True) -> list[Rule]:
    """Rules of an `nn.Linear`: its weight, and its bias if it has one."""
    rules = [Rule(f"{ours}.weight", (f"{theirs}.weight",), (rows, columns))]
    return [*rules, Rule(f"{ours}.bias", (f"{theirs}.bias",), (rows,))] if bias else rules


def norm(ours: str, theirs: str, width: int, kind: str) -> list[Rule]:
    """Rules of a LayerNorm (weight and bias) or an RMSNorm (weight)."""
    rules = [Rule(f"{ours}.weight", (f"{theirs}.weight",), (width,))]
    return (
        [*rules, Rule(f"{ours}.bias", (f"{theirs}.bias",), (width,))] if kind == "layer" else rules
    )


def merger(
    ours: str, theirs: tuple[str, str, str], norm_width: int, kind: str, joined: int, out: int
):
    """Rules of a merger: its norm and its two linear layers, named by `theirs`."""
    return [
        *norm(f"{ours}.norm", theirs[0], norm_width, kind),
        *linear(f"{ours}.fc1", theirs[1], joined, joined),
        *linear(f"{ours}.fc2", theirs[2], out, joined),
    ]
