"""The options of a command that say whether and how CUDA graphs are captured.

The types below are the options' declarations for typer; `graph_choice` makes one value of theirs.
torch is imported when that is called, not by `--help`.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..capture import EncoderCudaGraphConfig

ENABLE = "--enable-vit-cuda-graph"
DISABLE = "--no-enable-vit-cuda-graph"
# Options by the configuration's keys.
FLAGS = {
    "token_budgets": "--encoder-cudagraph-token-budgets",
    "max_vision_items_per_batch": "--encoder-cudagraph-max-vision-items-per-batch",
    "max_frames_per_batch": "--encoder-cudagraph-max-frames-per-batch",
    "modality": "--encoder-cudagraph-modality",
}

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
    typer.Option(
        FLAGS["token_budgets"],
        metavar="LIST",
        help="Tokens of each graph, such as 512,1024. [default: a dense ladder]",
        show_default=False,
    ),
]
ItemsOption = Annotated[
    int | None,
    typer.Option(
        FLAGS["max_vision_items_per_batch"],
        min=1,
        help="Images and videos in one replay. [default: by budget]",
        show_default=False,
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        FLAGS["max_frames_per_batch"],
        min=1,
        help="Frames in one replay. [default: by budget]",
        show_default=False,
    ),
]
ModalityOption = Annotated[
    str | None,
    typer.Option(
        FLAGS["modality"],
        help="image, video or image+video. [default: image+video]",
        show_default=False,
    ),
]


def graph_choice(
    enable: bool | None,
    token_budgets: Sequence[str] | None = None,
    max_vision_items_per_batch: int | None = None,
    max_frames_per_batch: int | None = None,
    modality: str | None = None,
    *,
    device: str | None = None,
    layers: bool = False,
) -> "bool | EncoderCudaGraphConfig | None":
    """What `Embedder.from_pretrained` takes as `graphs`; any option but `enable` asks for graphs.

    Args:
        enable: None where neither graphs nor their absence is asked for.
        token_budgets: lists such as "512,1024" or "[512, 1024]", joined; None if not given.
        max_vision_items_per_batch, max_frames_per_batch, modality: None if not given.
        device: where the tower goes; None for a GPU if there is one.
        layers: blocks are asked for, whose calls run eagerly.

    Raises:
        ValueError: graphs are asked for and cannot be had, or an option has no such value; the
            message names the option.
    """
    options = {
        "token_budgets": token_budgets or None,
        "max_vision_items_per_batch": max_vision_items_per_batch,
        "max_frames_per_batch": max_frames_per_batch,
        "modality": modality,
    }
    given = {key: value for key, value in options.items() if value is not None}
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
    if token_budgets:
        given["token_budgets"] = _parse_budgets(token_budgets)
    from ..capture import EncoderCudaGraphConfig

    try:
        return EncoderCudaGraphConfig.from_any(given)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from error


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


def _in_options(message: str) -> str:
    """An error of the configuration in the words of the command line."""
    message = message.removeprefix("EncoderCudaGraphConfig: ")
    return re.sub(rf"\b({'|'.join(FLAGS)})\b", lambda key: FLAGS[key[0]], message)
