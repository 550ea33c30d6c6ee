"""Grids and pixel rows as a caller hands them in: what is taken, and what is refused by name."""

import numpy as np
import pytest
import torch
from vitgraph.bench.towers_config import build_tower
from vitgraph.encoder import grids as grids_module
from vitgraph.encoder.grids import GridParser, parse_grids
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
    with pytest.raises(error, match=message):
        GridParser(spec)(grids)


def test_grids_are_checked_once(spec, monkeypatch):
    parser = GridParser(spec)
    table = torch.tensor([[1, 4, 6], [2, 2, 2]])
    first = parser(table)
    assert first == ((1, 4, 6), (2, 2, 2))
    monkeypatch.setattr(grids_module, "parse_grids", lambda *_: pytest.fail("checked again"))
    assert parser(table.clone()) is first


def test_grids_that_only_look_like_accepted_ones_are_refused(spec):
    """1.0 and True are equal to 1, and find what was kept under it."""
    parser = GridParser(spec)
    parser(torch.tensor([[1, 2, 2]]))
    assert parser(torch.zeros(0, 3, dtype=torch.int64)) == ()
    for shape in ((0,), (0, 5), (0, 2, 2)):
        with pytest.raises(ValueError, match=r"must be \[items, 3\]"):
            parser(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be an integer type"):
        parser(torch.tensor([[1.0, 2.0, 2.0]]))
    with pytest.raises(TypeError, match="must be three integers"):
        parser([(1.0, 2, 2)])
    table = torch.tensor([[1, 2, 2]])
    parser(table)
    table[0, 1] = 3  # the same tensor with other values
    with pytest.raises(ValueError, match=r"\(1, 3, 2\): height and width must be multiples"):
        parser(table)


def test_accepted_grids_do_not_pile_up(spec, monkeypatch):
    monkeypatch.setattr(grids_module, "_REMEMBERED", 4)
    parser = GridParser(spec)
    for frames in range(1, 20):
        assert parser(torch.tensor([[frames, 2, 2]])) == ((frames, 2, 2),)
        assert len(parser._accepted) <= 4


def test_pixels_in_the_place_of_grids_are_not_read(spec, monkeypatch):
    """They may be gigabytes, on a GPU."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("was read"))
    with pytest.raises(TypeError, match="must be an integer type"):
        parse_grids(torch.zeros(16, 1536), spec)
