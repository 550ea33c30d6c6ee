"""What the tower benchmarks encode: patch grids (t, h, w) of packed images and videos."""

import random
from collections.abc import Mapping, Sequence

Grid = tuple[int, int, int]  # frames, rows and columns of patches, before the 2 x 2 merger

WORKLOADS: Mapping[str, tuple[Grid, ...]] = {
    "img224": ((1, 14, 14),),
    "img448": ((1, 28, 28),),
    "img1024": ((1, 64, 64),),
    "img2048": ((1, 128, 128),),
    "8ximg448": ((1, 28, 28),) * 8,
    # sixteen images of unequal size and shape, as a batch of user uploads has them
    "16mixed": (
        (1, 14, 14), (1, 28, 28), (1, 20, 46), (1, 64, 64), (1, 34, 58), (1, 16, 16),
        (1, 40, 30), (1, 22, 22), (1, 28, 28), (1, 48, 64), (1, 14, 20), (1, 36, 24),
        (1, 26, 38), (1, 18, 32), (1, 30, 30), (1, 44, 12),
    ),
    "video16f": ((8, 28, 28),),
}  # fmt: skip


def num_patches(grids: Sequence[Grid]) -> int:
    """Rows of `pixel_values` that `grids` need."""
    return sum(t * h * w for t, h, w in grids)


def random_mix(
    num_items: int,
    seed: int,
    *,
    max_side: int = 64,
    video_share: float = 0.0,
    max_frames: int = 8,
) -> tuple[Grid, ...]:
    """Draw `num_items` grids: sides log-uniform in [4, max_side] patches and even, some videos.

    The same arguments give the same grids on every machine. `video_share` is the chance that an
    item has 2 to `max_frames` frames instead of one.

    Raises:
        ValueError: an argument outside its range.
    """
    if num_items < 1:
        raise ValueError(f"random_mix: num_items = {num_items}; at least 1 is needed")
    if max_side < 4 or max_frames < 2 or not 0.0 <= video_share <= 1.0:
        raise ValueError(
            f"random_mix: max_side = {max_side} (at least 4), max_frames = {max_frames} (at least "
            f"2), video_share = {video_share} (0 to 1)"
        )
    rng = random.Random(seed)

    def side() -> int:
        return 2 * round(2 * (max_side / 4) ** rng.random())

    def item() -> Grid:
        is_video = rng.random() < video_share
        return (rng.randint(2, max_frames) if is_video else 1, side(), side())

    return tuple(item() for _ in range(num_items))


def resolve(names: Sequence[str], seed: int = 0) -> dict[str, tuple[Grid, ...]]:
    """Workloads by name; `mix<N>` is a random mix of N images drawn with `seed`.

    Raises:
        ValueError: a name that is neither listed nor a random mix.
    """
    found: dict[str, tuple[Grid, ...]] = {}
    for name in names:
        if name in WORKLOADS:
            found[name] = WORKLOADS[name]
        elif name.startswith("mix") and name[3:].isdigit():
            found[name] = random_mix(int(name[3:]), seed)
        else:
            raise ValueError(
                f"bench: workload {name!r} is not known; use one of {', '.join(WORKLOADS)}, or "
                "mix<N> for N random images"
            )
    return found
