"""The options of a command that say whether and how CUDA graphs are captured.

The types below are the options' declarations for typer; `graph_choice` makes one value of theirs.
torch is imported when that is called, not by `--help`.
"""

import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..capture import EncoderCudaGraphConfig

ENABLE = "--enable-vit-cuda-graph"
DISABLE = "--no-enable-vit-cuda-graph"
# Options by the configuration's keys, which are not read from it: that would import torch.
FLAGS = {
    key: f"--encoder-cudagraph-{key.replace('_', '-')}"
    for key in (
        "token_budgets",
        "max_vision_items_per_batch",
        "max_frames_per_batch",
        "modality",
        "num_slots",
        "calibrate",
        "max_bytes",
        "nvtx",
    )
}


def _option(key: str, description: str, **more: Any) -> Any:
    """The declaration of the option for one key; a default is told by the description."""
    return typer.Option(FLAGS[key], help=description, show_default=False, **more)


GraphsOption = Annotated[
    bool | None,
    typer.Option(
        f"{ENABLE}/{DISABLE}",
        "--graphs/--no-graphs",
        help="CUDA graphs. [default: on a GPU, unless --layers]",
        show_default=False,
    ),
]
BudgetsOption = Annotated[
    list[str] | None,
    _option(
        "token_budgets",
        "Tokens of each graph, such as 512,1024. [default: a dense ladder]",
        metavar="LIST",
    ),
]
ItemsOption = Annotated[
    int | None,
    _option(
        "max_vision_items_per_batch",
        "Images and videos in one replay. [default: by budget]",
        min=1,
    ),
]
FramesOption = Annotated[
    int | None,
    _option("max_frames_per_batch", "Frames in one replay. [default: by budget]", min=1),
]
ModalityOption = Annotated[
    str | None, _option("modality", "image, video or image+video. [default: image+video]")
]
SlotsOption = Annotated[
    int | None,
    _option("num_slots", "Sets of buffers: 2 stage a batch during a replay. [default: 1]"),
]
CalibrateOption = Annotated[
    bool, _option("calibrate", "Measure what replays and eager calls cost, and go by it.")
]
BytesOption = Annotated[
    str | None,
    _option(
        "max_bytes",
        "Memory of all graphs, such as 8GiB; the largest are left out. [default: no limit]",
        metavar="SIZE",
    ),
]
NvtxOption = Annotated[bool, _option("nvtx", "NVTX ranges around staging and replays.")]


def graph_choice(
    enable: bool | None, *, device: str | None = None, layers: bool = False, **options: Any
) -> "bool | EncoderCudaGraphConfig | None":
    """What `Embedder.from_pretrained` takes as `graphs`; any option but `enable` asks for graphs.

    Args:
        enable: None where neither graphs nor their absence is asked for.
        device: where the tower goes; None for a GPU if there is one.
        layers: blocks are asked for, whose calls run eagerly.
        options: values of the options by keys of `FLAGS`, as typer gives them; None, False and an
            empty list are those of an option that was not given.

    Raises:
        ValueError: graphs are asked for and cannot be had, or an option has no such value; the
            message names the option.
    """
    given = {
        key: value
        for key, value in options.items()
        if value is not None and value is not False and value != []
    }
    asking = ENABLE if enable else FLAGS[next(iter(given))] if given else None
    if enable is False and asking is not None:
        raise ValueError(f"{asking}: there are no graphs with {DISABLE}; leave one of them out")
    if asking is None:
        return False if layers else enable
    if layers:
        raise ValueError(
            f"{asking}: calls that return --layers run without CUDA graphs; leave one of them out"
        )
    from .vision_encoder import pick_device

    place = pick_device(device)
    if place.type != "cuda":
        raise ValueError(
            f"{asking}: CUDA graphs need a CUDA device, the tower goes to {place}; leave it out"
        )
    if not given:
        return True
    for key, parse in _PARSERS.items():
        if key in given:
            given[key] = parse(given[key])
    from ..capture import EncoderCudaGraphConfig

    try:
        return EncoderCudaGraphConfig.from_any(given)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error


def in_options(message: str) -> str:
    """A message of the configuration or of a capture in the words of the command line.

    Messages of anything else stay as they are.
    """
    if not message.startswith(("EncoderCudaGraphConfig: ", "capture: ")):
        return message
    message = message.removeprefix("EncoderCudaGraphConfig: ")
    return re.sub(rf"\b({'|'.join(FLAGS)})\b", lambda key: FLAGS[key[0]], message)


def _parse_budgets(texts: Sequence[str]) -> list[int]:
    """All budgets of comma-separated or JSON lists."""
    budgets: list[int] = []
    for text in texts:
        try:
            parts = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
            numbers = [int(part) for part in parts if not isinstance(part, float | bool)]
        except (ValueError, TypeError):
            numbers = parts = []
        if not numbers or len(numbers) < len(parts) or min(numbers) < 1:
            raise ValueError(
                f"{FLAGS['token_budgets']} {text}: give whole numbers of at least 1, such as "
                "512,1024 or [512, 1024], or leave it out for an automatic ladder"
            )
        budgets += numbers
    return budgets


def _parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB (of 1024), 500MB (of 1000), or a whole number of them."""
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I)?)?(B)?\s*", text.upper())
    number = 0
    if size is not None:
        amount, prefix, binary, unit = size.groups()
        if prefix is None or unit is not None:  # 8G could be either
            power = " KMGT".index(prefix or " ")
            exact = Fraction(amount) * (1024 if binary else 1000) ** power
            number = int(exact) if prefix or exact.denominator == 1 else 0
    if number < 1:
        raise ValueError(
            f"{FLAGS['max_bytes']} {text}: give a whole number of bytes of at least 1, or a size "
            "such as 8GiB or 500MB, or leave it out for no limit"
        )
    return number


# Options whose values typer leaves as text.
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "token_budgets": _parse_budgets,
    "max_bytes": _parse_bytes,
}
