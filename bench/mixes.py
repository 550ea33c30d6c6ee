"""The mixes W1 to W9: what servers of vision models are benchmarked with, as calls of grids.

Sizes are in pixels, as the benchmarks give them; a family turns them into patches. Draws are
seeded, so a mix is the same on every machine.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..capture.config import automatic_slots
from ..capture.protocol import EncoderItemSpec, RungLimits
from ..encoder.frame_rules import resized_image
from ..kernels.layout import num_windows
from .workloads import Grid

SEED = 42
LARGEST_IMAGE_TOKENS = 16384
_MERGE = 2

Call = tuple[Grid, ...]
Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Family:
    """How a family of towers cuts pixels: patch side in pixels, window side in patches or 0."""

    name: str
    patch: int
    window: int = 0

    def grid(self, size: Size, frames: int = 1) -> Grid:
        """(t, h, w) in patches of an image, or of a video of so many temporal patches."""
        factor = self.patch * _MERGE
        most = LARGEST_IMAGE_TOKENS * factor**2
        height, width = resized_image(*size, factor, factor**2, most)
        return frames, height // self.patch, width // self.patch

    def item(self, grid: Grid) -> EncoderItemSpec:
        """What an item takes of a rung."""
        t, h, w = grid
        windows = t * num_windows(h, w, self.window)
        return EncoderItemSpec(t * h * w, t * h * w // _MERGE**2, t, windows, t * (h * w) ** 2)

    def rung(self, budget: int) -> RungLimits:
        """The rung of `budget` tokens of an automatic ladder, with the room a tower gives it."""
        items, frames = automatic_slots(budget)
        full = (self.window // _MERGE) ** 2
        windows = -(-2 * budget // full) + frames if full else 0
        return RungLimits(budget, budget * _MERGE**2, items, frames, windows)


FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (Family("qwen3-vl", 16), Family("qwen2.5-vl", 14, window=8))
}

# A stand-in for the images of a chat arena, whose histogram is not published: phone and desktop
# screenshots, camera pictures scaled for upload, web images, icons.
_ARENA: Mapping[Size, float] = {
    (2556, 1179): 0.08, (1920, 1080): 0.06, (1080, 1920): 0.14, (900, 1440): 0.08,
    (1024, 768): 0.10, (768, 1024): 0.10, (1024, 1024): 0.12, (720, 1280): 0.08,
    (480, 640): 0.10, (512, 512): 0.08, (224, 224): 0.06,
}  # fmt: skip
_VARIED: Mapping[Size, float] = {
    (224, 224): 0.2, (336, 336): 0.3, (448, 448): 0.2, (672, 672): 0.2, (1008, 1008): 0.1,
}  # fmt: skip
_HALVES: Mapping[Size, float] = {(256, 256): 0.5, (720, 1280): 0.5}


def mixes(family: Family, seed: int = SEED) -> dict[str, list[Call]]:
    """The calls of each mix, by name."""
    return {name: build(family, random.Random(seed)) for name, build in _BUILDERS.items()}


def _drawn(family: Family, rng: random.Random, sizes: Mapping[Size, float], count: int) -> Call:
    chosen = rng.choices(list(sizes), list(sizes.values()), k=count)
    return tuple(family.grid(size) for size in chosen)


def _arena(family: Family, rng: random.Random) -> list[Call]:
    return [_drawn(family, rng, _ARENA, 1) for _ in range(100)]


def _squares(family: Family, _: random.Random) -> list[Call]:
    return [(family.grid((336, 336)),) * count for count in (20, 5)]


def _varied(family: Family, rng: random.Random) -> list[Call]:
    return [_drawn(family, rng, _VARIED, rng.randint(10, 30)) for _ in range(50)]


def _halves(family: Family, rng: random.Random) -> list[Call]:
    return [_drawn(family, rng, _HALVES, count) for count in (1, 8) for _ in range(50)]


def _kernel_grids(_: Family, __: random.Random) -> list[Call]:
    grids = ((1, 8, 8), (1, 16, 16), (1, 32, 32), (1, 48, 48), (4, 16, 16), (8, 16, 16))
    return [(grid,) for grid in grids]


def _concurrent(family: Family, _: random.Random) -> list[Call]:
    sizes = (family.grid((560, 560)), family.grid((448, 448)))
    return [(grid,) * count for grid in sizes for count in (1, 16, 32)]


def _videos(family: Family, rng: random.Random) -> list[Call]:
    film = family.grid((720, 1280), frames=8)  # 16 frames, two to a temporal patch
    clips = [family.grid((224, 224), frames=frames) for frames in (2, 4, 32)]
    mixed = [(*_drawn(family, rng, _VARIED, 6), rng.choice(clips), clips[0]) for _ in range(20)]
    return [(film,), *((clip,) for clip in clips), *mixed, (film, *_drawn(family, rng, _VARIED, 4))]


def _small(family: Family, _: random.Random) -> list[Call]:
    return [(family.grid((224, 224)),)]


def _adversarial(_: Family, __: random.Random) -> list[Call]:
    """Tokens just above, at and far below budgets, and one image that no budget holds."""

    def image(rows: int, columns: int) -> Grid:
        return 1, _MERGE * rows, _MERGE * columns

    above = [image(1, 65), image(1, 257), image(25, 41), image(17, 241)]  # 65, 257, 1025, 4097
    exact = [image(8, 8), image(16, 16), image(32, 32), image(64, 64)]
    many_small = (image(2, 2),) * 40
    calls = [(grid,) for grid in (image(11, 16), *above, *exact, image(130, 130))]
    return [*calls, many_small, (image(64, 64), image(8, 8)), (*above, *exact)]


_BUILDERS: Mapping[str, Callable[[Family, random.Random], list[Call]]] = {
    "W1": _arena,
    "W2": _squares,
    "W3": _varied,
    "W4": _halves,
    "W5": _kernel_grids,
    "W6": _concurrent,
    "W7": _videos,
    "W8": _small,
    "W9": _adversarial,
}
