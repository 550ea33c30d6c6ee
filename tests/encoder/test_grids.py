"""Grids and pixel rows as a caller hands them in: what is taken, and what is refused by name."""

import numpy as np
import pytest
import torch
from vitgraph.bench.towers_config import build_tower
from vitgraph.encoder.grids import parse_grids
from vitgraph.encoder.vision_encoder import VisionEncoder


@pytest.fixture(scope="module")
def spec():
    tower = build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float32)
    return VisionEncoder.from_hf(tower).spec


@pytest.mark.parametrize(
    "grids",
    [
        torch.tensor([[1, 4, 6], [2, 2, 2]]),
        torch.tensor([[1, 4, 6], [2, 2, 2]], dtype=torch.uint8),
        [(1, 4, 6), [2, 2, 2]],
        [(True, 4, 6), (np.int64(2), 2, 2)],
        np.array([[1, 4, 6], [2, 2, 2]]),
        [iter((1, 4, 6)), torch.tensor([2, 2, 2])],
    ],
    ids=["tensor", "uint8", "lists", "other integers", "array", "other rows"],
)
def test_grids_in_any_form(spec, grids):
    found = parse_grids(grids, spec)
    assert found == [(1, 4, 6), (2, 2, 2)]
    assert {type(size) for grid in found for size in grid} == {int}


@pytest.mark.parametrize(
    ("grids", "error", "message"),
    [
        (torch.ones(1, 3), TypeError, "must be an integer type"),
        (torch.ones(1, 3, dtype=torch.bool), TypeError, "must be an integer type"),
        (torch.ones(0, 3), TypeError, "must be an integer type"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"shape \[3\] must be \[items, 3\]"),
        (torch.tensor(3), ValueError, r"shape \[\] must be \[items, 3\]"),
        (torch.ones(0, 2, dtype=torch.int64), ValueError, r"shape \[0, 2\] must be"),
        (torch.ones(2, 1, 3, dtype=torch.int64), ValueError, r"shape \[2, 1, 3\] must be"),
        ([(1, 4, 4), (1, 4)], ValueError, r"grid_thw\[1\] = \(1, 4\) must be three integers"),
        ([(1, 4, 4, 4)], ValueError, "must be three integers"),
        ([5], TypeError, r"grid_thw\[0\] = 5 must be three integers"),
        ([(1, 4.0, 4)], TypeError, "must be three integers"),
        ([("1", 4, 4)], TypeError, "must be three integers"),
        ([(1, 4, 4), (0, 4, 4)], ValueError, r"grid_thw\[1\] = \(0, 4, 4\): every side"),
        ([(1, -4, 4)], ValueError, "every side must be at least 1"),
        ([(1, 5, 4)], ValueError, r"\(1, 5, 4\): height and width must be multiples"),
        ([(1, 4, 7)], ValueError, "multiples of the merge size 2"),
    ],
)
def test_grids_refused(spec, grids, error, message):
    with pytest.raises(error, match=message):
        parse_grids(grids, spec)


def test_pixels_in_the_place_of_grids_are_not_read(spec, monkeypatch):
    """They may be gigabytes, on a GPU."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("was read"))
    with pytest.raises(TypeError, match="must be an integer type"):
        parse_grids(torch.zeros(16, 1536), spec)
