import pytest
from vitgraph.bench.workloads import WORKLOADS, num_patches, random_mix, resolve

PATCHES = {
    "img224": 196,
    "img448": 784,
    "img1024": 4096,
    "img2048": 16384,
    "8ximg448": 6272,
    "16mixed": 17900,
    "video16f": 6272,
}


def test_the_seven_workloads():
    assert {name: num_patches(grids) for name, grids in WORKLOADS.items()} == PATCHES
    assert len(WORKLOADS["16mixed"]) == 16
    assert WORKLOADS["video16f"] == ((8, 28, 28),)


def test_random_mix_is_seeded_even_and_in_range():
    grids = random_mix(200, seed=3, max_side=48, video_share=0.3, max_frames=4)
    assert grids == random_mix(200, seed=3, max_side=48, video_share=0.3, max_frames=4)
    assert grids != random_mix(200, seed=4, max_side=48, video_share=0.3, max_frames=4)
    assert {h % 2 + w % 2 for _, h, w in grids} == {0}
    assert all(4 <= side <= 48 for _, h, w in grids for side in (h, w))
    assert {t for t, _, _ in grids} == {1, 2, 3, 4}
    assert all(t == 1 for t, _, _ in random_mix(50, seed=0))


@pytest.mark.parametrize(
    "arguments",
    [{"num_items": 0}, {"num_items": 1, "max_side": 2}, {"num_items": 1, "video_share": 1.5}],
)
def test_random_mix_refuses(arguments):
    with pytest.raises(ValueError, match="random_mix"):
        random_mix(seed=0, **arguments)


def test_resolve():
    found = resolve(["img224", "mix5"], seed=7)
    assert found == {"img224": ((1, 14, 14),), "mix5": random_mix(5, 7)}
    with pytest.raises(ValueError, match="'img' is not known"):
        resolve(["img"])
