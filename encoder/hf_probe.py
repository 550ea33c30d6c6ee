"""Finding out, from a live tower, how it can be run over static buffers, or why it cannot.

Nothing is known of a tower beforehand. It runs its own forward on two small images while we listen
to what it computes from their grid (`hf_metadata`). Then it runs with all of that handed in and our
attention, on tensors without values: an operation that needs a value fails there, and is named.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from ..capture.protocol import Rows
from .hf_attention import SHAPES_ONLY, AttentionSwitch, NotPackedError
from .hf_metadata import Grid, Metadata, TowerRefusedError, describe_metadata, hear_metadata

_SEED = 20  # of the pixels of trial runs


@dataclass(frozen=True)
class OutputField:
    """One tensor of a tower's output.

    Attributes:
        field: Its field of the output.
        place: Its place in the field, None if the field is the tensor.
        rows: What its rows count.
        width: Its other axes.
        dtype: Its dtype.
        batched: Whether the forward returns it as [1, rows, ...].
        container: Class of the field, a list or tuple, if it is not the tensor.
    """

    field: str
    place: int | None
    rows: Rows
    width: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    container: type | None

    @property
    def name(self) -> str:
        """Its name among static outputs."""
        return self.field if self.place is None else f"{self.field}_{self.place}"


@dataclass(frozen=True)
class TowerFacts:
    """How a tower runs over static buffers.

    Attributes:
        merge: Patches along a side of a token.
        pixel_shape: One patch, as the forward takes it.
        batched: Whether it takes pixels as [1, patches, ...].
        metadata: What it computes from the grid.
        reads_grid: Whether it reads `grid_thw` itself, a row for each frame.
        max_frames_per_item: The most frames of an item that its own forward takes, None for any.
        pools_frames: Whether the frames of a video become one frame of tokens.
        outputs: Its output's tensors.
        empty_fields: Fields of its output that are empty lists, with their class.
        output_class: Its output's class.
        head_dim: Width of its attention heads.
    """

    merge: int
    pixel_shape: tuple[int, ...]
    batched: bool
    metadata: Metadata
    reads_grid: bool
    max_frames_per_item: int | None
    pools_frames: bool
    outputs: tuple[OutputField, ...]
    empty_fields: Mapping[str, type]
    output_class: type[ModelOutput]
    head_dim: int

    def tokens(self, grid: Grid) -> int:
        """Tokens of one item."""
        t, h, w = grid
        return (1 if self.pools_frames else t) * h * w // self.merge**2


def hf_forward(tower: torch.nn.Module) -> Callable[..., Any]:
    """The forward of the tower's class, whatever its instance was given since."""
    return type(tower).forward.__get__(tower)


@contextmanager
def evaluating(tower: torch.nn.Module) -> Iterator[None]:
    """Every module of `tower` in eval mode, for the time of a call."""
    training = [module for module in tower.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def trial_pixels(
    shape: Sequence[int], grids: Sequence[Grid], like: torch.Tensor, batched: bool
) -> torch.Tensor:
    """Random pixels for `grids`, patches of `shape`, with the device and dtype of `like`."""
    rows = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(_SEED)
    pixels = torch.randn(rows, *shape, generator=generator).to(like)
    return pixels[None] if batched else pixels


def trial_grids(merge: int) -> list[Grid]:
    """Two small images; the second has two of the windows that released towers use."""
    return [(1, 2 * merge, 3 * merge), (1, 4 * merge, 5 * merge)]


def probe(tower: torch.nn.Module, switch: AttentionSwitch) -> TowerFacts:
    """How `tower` runs over static buffers.

    Raises:
        TowerRefusedError: it cannot; the message says why.
    """
    _check_signature(tower)
    parameter = next(tower.parameters())
    merge = _merge_size(tower)
    grids = trial_grids(merge)
    with evaluating(tower), torch.inference_mode(False), torch.no_grad():
        with hear_metadata(tower, grids) as heard, switch.split():
            shape, batched, output = _first_forward(tower, grids, parameter)
        calls, lengths = heard()
        # windows outnumber images here
        large: list[Grid] = [(1, 48 * merge, 32 * merge), (1, 34 * merge, 46 * merge)]
        metadata = describe_metadata(calls, lengths, large, merge)
        outputs = _outputs(output, grids, merge)
        reads_grid, head_dim = _run_without_values(
            tower, switch, metadata, grids, trial_pixels(shape, grids, parameter, batched)
        )
        max_frames, pools = 1, False
        if not reads_grid:
            with switch.split():
                max_frames, pools = _videos(tower, outputs, shape, batched, merge, parameter)
    return TowerFacts(
        merge, shape, batched, metadata, reads_grid, max_frames, pools, outputs,
        {name: type(value) for name, value in output.items() if len(value) == 0}, type(output),
        head_dim,
    )  # fmt: skip


def _check_signature(tower: torch.nn.Module) -> None:
    parameters = inspect.signature(type(tower).forward).parameters
    if "grid_thw" not in parameters:
        raise TowerRefusedError(
            f"its forward takes ({', '.join(list(parameters)[1:])}), not packed pixel rows with "
            "their grid_thw"
        )
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise TowerRefusedError("its forward takes no tensors computed beforehand (**kwargs)")
    required = [
        name
        for name, p in list(parameters.items())[2:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := [name for name in required if name != "grid_thw"]:
        raise TowerRefusedError(f"its forward needs {', '.join(missing)} beside grid_thw")


def _merge_size(tower: torch.nn.Module) -> int:
    config: Any = tower.config
    for name in ("spatial_merge_size", "merge_size"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    kernel = getattr(config, "merge_kernel_size", 1)
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    if height != width:
        raise TowerRefusedError(f"it merges {height} x {width} patches, not a square")
    return height


def _pixel_shapes(config: Any) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes that a patch may have, and whether patches lie in a batch of one."""

    def read(*names: str, default: int | None = None) -> int:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, (tuple, list)) and len(set(value)) == 1:
                value = value[0]
            if isinstance(value, int):
                return value
        if default is None:
            raise TowerRefusedError(f"its config has none of {', '.join(names)}")
        return default

    channels = read("in_channels", "num_channels", "in_chans", default=3)
    side = read("patch_size", "spatial_patch_size")
    frames = read("temporal_patch_size", "patch_temporal", default=1)
    square = (channels, side, side)
    return [((channels * frames * side**2,), False), (square, False), (square, True)]


def _first_forward(
    tower: torch.nn.Module, grids: Sequence[Grid], parameter: torch.Tensor
) -> tuple[tuple[int, ...], bool, ModelOutput]:
    """Shape of a patch, whether patches are batched, and the output of the tower's own forward."""
    table = torch.tensor(grids, device=parameter.device)
    errors = []
    for shape, batched in _pixel_shapes(tower.config):
        pixels = trial_pixels(shape, grids, parameter, batched)
        try:
            output = hf_forward(tower)(pixels, grid_thw=table)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            errors.append(f"pixels {list(pixels.shape)}: {_place(error)} {_first_line(error)}")
            continue
        if not isinstance(output, ModelOutput):
            raise TowerRefusedError(
                f"its forward returns a {type(output).__name__}, no ModelOutput"
            )
        return shape, batched, output
    raise TowerRefusedError(f"its own forward fails on two images ({'; '.join(errors)})")


def _outputs(output: ModelOutput, grids: Sequence[Grid], merge: int) -> tuple[OutputField, ...]:
    patches = sum(t * h * w for t, h, w in grids)
    counts: dict[int, Rows] = {patches // merge**2: "tokens", patches: "patches"}
    fields = []
    for field, value in output.items():
        parts = [(None, value)] if isinstance(value, torch.Tensor) else list(enumerate(value))
        for place, tensor in parts:
            if not isinstance(tensor, torch.Tensor):
                raise TowerRefusedError(f"its {field} holds a {type(tensor).__name__}")
            batched = tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[1] in counts
            rows = tensor[0] if batched else tensor
            if rows.ndim == 0 or len(rows) not in counts:
                raise TowerRefusedError(
                    f"its {field} is {list(tensor.shape)}: {len(rows) if rows.ndim else 0} rows "
                    f"are neither the {patches} patches nor the {patches // merge**2} tokens of "
                    "two images"
                )
            width, kind = tuple(rows.shape[1:]), counts[len(rows)]
            container = None if place is None else type(value)
            fields.append(OutputField(field, place, kind, width, rows.dtype, batched, container))
    return tuple(fields)


class _Reads(TorchFunctionMode):
    """Notices whether an operation takes the tensor `watched`."""

    def __init__(self, watched: torch.Tensor):
        super().__init__()
        self.watched = watched
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # attributes (shape, device, ...) are not its values
        if getattr(func, "__name__", "") != "__get__":
            leaves = tree_leaves((args, kwargs or {}))
            self.seen |= any(leaf is self.watched for leaf in leaves)
        return func(*args, **(kwargs or {}))


class _Caller(torch.nn.Module):
    """A module that calls the class's forward of its tower: `functional_call` needs a module."""

    def __init__(self, tower: torch.nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return hf_forward(self.tower)(*args, **kwargs)


def _run_without_values(
    tower: torch.nn.Module,
    switch: AttentionSwitch,
    metadata: Metadata,
    grids: Sequence[Grid],
    pixels: torch.Tensor,
) -> tuple[bool, int]:
    """Whether the forward reads the grid, and its head dim.

    Raises:
        TowerRefusedError: it needs the value of a tensor, or attends without offsets.
    """
    device = pixels.device
    values = metadata.compute(grids)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    fakes: dict[str, torch.Tensor] = {
        f"tower.{name}": mode.from_tensor(tensor.detach()) for name, tensor in state.items()
    }
    given: dict[str, Any] = {
        name: mode.from_tensor(value.to(device)) for name, value in values.items()
    }
    given |= metadata.longest(values)
    grid = mode.from_tensor(torch.tensor(grids, device=device))
    reads = _Reads(grid)
    fake_pixels = mode.from_tensor(pixels)
    with switch.observing_head_dim() as seen, switch.using(SHAPES_ONLY):
        try:
            with mode, reads:
                functional_call(_Caller(tower), fakes, (fake_pixels,), {"grid_thw": grid, **given})
        except NotPackedError as error:
            raise TowerRefusedError(str(error)) from error
        except Exception as error:
            needs = getattr(error, "func", None)
            reason = f"needs values ({needs})" if needs is not None else _first_line(error)
            raise TowerRefusedError(
                f"with everything computed from the grid handed in, its forward {_place(error)} "
                f"still fails on tensors without values: {reason}"
            ) from error
    if not seen[0]:
        raise TowerRefusedError(
            "its attention does not go through transformers' attention functions"
        )
    return reads.seen, seen[0]


def _videos(
    tower: torch.nn.Module,
    outputs: Sequence[OutputField],
    shape: Sequence[int],
    batched: bool,
    merge: int,
    parameter: torch.Tensor,
) -> tuple[int | None, bool]:
    """The most frames of an item (None: any), and whether frames are pooled."""
    grids: list[Grid] = [(2, 2 * merge, 3 * merge)]
    pixels = trial_pixels(shape, grids, parameter, batched)
    try:
        output = hf_forward(tower)(pixels, grid_thw=torch.tensor(grids, device=parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return 1, False  # an image model: its own forward takes no second frame
    patches = len(pixels[0] if batched else pixels)
    tokens = set()
    for spec in outputs:
        tensor = output[spec.field]
        tensor = tensor if spec.place is None else tensor[spec.place]
        rows = tensor.shape[1] if spec.batched else len(tensor)
        if spec.rows == "patches" and merge > 1:
            if rows != patches:
                raise TowerRefusedError(
                    f"its {spec.name} has {rows} rows for {patches} video patches"
                )
        else:
            tokens.add(rows)
    whole = patches // merge**2
    if not tokens <= {whole} and tokens != {whole // 2}:
        raise TowerRefusedError(f"two frames of {whole // 2} tokens become {sorted(tokens)} rows")
    return None, tokens == {whole // 2}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _place(error: BaseException) -> str:
    """Where in a modeling file an error arose."""
    ours, torchs = Path(__file__).parent, Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if ours not in path.parents and torchs not in path.parents:
            return f"at {path.name}:{frame.lineno}"
    return "itself"


def pack_outputs(facts: TowerFacts, tensors: Mapping[str, torch.Tensor]) -> ModelOutput:
    """The tower's own kind of output, new, with these tensors."""
    parts: dict[str, Any] = {name: [] for name in facts.empty_fields}
    for spec in facts.outputs:
        tensor = tensors[spec.name]
        tensor = tensor[None] if spec.batched else tensor
        if spec.place is None:
            parts[spec.field] = tensor
        else:
            parts.setdefault(spec.field, []).append(tensor)
    classes = {spec.field: spec.container for spec in facts.outputs if spec.container is not None}
    for name, container in {**classes, **facts.empty_fields}.items():
        parts[name] = container(parts[name])
    return facts.output_class(**parts)


def read_outputs(
    output: Mapping[str, Any], outputs: Sequence[OutputField]
) -> dict[str, torch.Tensor]:
    """The tensors of a tower's output by name, without the axis of a batch of one."""
    tensors = {}
    for spec in outputs:
        value = output[spec.field]
        tensor = value if spec.place is None else value[spec.place]
        tensors[spec.name] = tensor[0] if spec.batched else tensor
    return tensors
