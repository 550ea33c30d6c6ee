"""Layouts made up to fill a rung, for checks and measurements."""

from collections.abc import Iterator
from math import isqrt

from .packing import fits
from .protocol import EncoderItemSpec, HasFixedGrid, RungLimits, SupportsEncoderCudaGraph
from .staging import Grid


def full_item(encoder: SupportsEncoderCudaGraph, limits: RungLimits) -> Grid:
    """(t, h, w) of one image that fills the rung as far as the encoder allows, squarest first.

    Raises:
        ValueError: the rung holds no image at all.
    """
    for grid, item in _images(encoder, limits, limits.token_budget):
        if fits(item, limits):
            return grid
    raise ValueError(
        f"capture: the rung of {limits.token_budget} tokens holds no image ({limits}); "
        f"raise or remove the token budget {limits.token_budget}"
    )


def equal_images(
    encoder: SupportsEncoderCudaGraph, limits: RungLimits, tokens: int, count: int
) -> list[Grid]:
    """`count` equal images, or as many as fit, of at most `tokens` tokens together.

    Empty if not even one image is that small.
    """
    for grid, item in _images(encoder, limits, max(1, tokens // count)):
        if fits(item, limits):
            room = min(
                tokens // item.output_tokens,
                limits.max_patches // item.input_size,
                limits.max_frames // item.num_frames,
                limits.max_windows // item.num_windows if item.num_windows else count,
                limits.max_items,
                count,
            )
            return [grid] * room
    return []


def _images(
    encoder: SupportsEncoderCudaGraph, limits: RungLimits, tokens: int
) -> Iterator[tuple[Grid, EncoderItemSpec]]:
    """Images of at most `tokens` tokens that the encoder takes, the fullest and squarest first."""
    if isinstance(encoder, HasFixedGrid):
        (item,) = encoder.item_specs([encoder.fixed_grid])
        if item.output_tokens <= tokens:
            yield encoder.fixed_grid, item
        return
    # The side of a token in patches; max_patches may have been rounded up, so smaller ones follow.
    for side in range(isqrt(limits.max_patches // limits.token_budget), 0, -1):
        for height in range(isqrt(tokens), 0, -1):
            for width in (tokens // height, height):
                grid = (1, side * height, side * width)
                try:
                    (item,) = encoder.item_specs([grid])
                except ValueError:
                    continue  # no whole number of tokens, or a side that the encoder refuses
                if item.output_tokens <= tokens:
                    yield grid, item
