"""Thirty ways in which captured encoders have gone wrong elsewhere, by number: the bookkeeping.

Classes that need a tower are in tests/encoder/test_bug_classes_encoder.py.
"""

import gc
import json
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vitgraph.capture import (
    BufferSpec,
    EncoderCudaGraphConfig,
    EncoderCudaGraphManager,
    MultiPathManager,
    Pruning,
)

CONFIG = {
    "token_budgets": [16, 64, 128],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 32,
}
ONE, SMALL, IMAGE = (1, 2, 2), (1, 4, 4), (1, 8, 8)  # 1, 4 and 16 tokens
VIDEO, LARGE, HUGE = (3, 4, 6), (1, 16, 32), (1, 32, 32)  # 18, 128 and 256 tokens
LONG_VIDEO = (40, 2, 2)  # 40 tokens, but more frames than any rung has slots
RANKS = Path(__file__).with_name("data_parallel_ranks.py")
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def captured(rerun_recorder):
    """`captured(encoder, config)`: a manager that has captured, on the encoder's device."""

    def capture(encoder, config=CONFIG, recorder=None):
        if encoder.device.type != "cuda":
            recorder = recorder or rerun_recorder
        manager = EncoderCudaGraphManager(encoder, config, recorder=recorder)
        manager.capture()
        return manager

    return capture


@pytest.fixture
def check(pixels_for):
    """`check(manager, encoder, grid)`: execute is the eager forward, bit for bit."""

    def check(manager, encoder, grid, seed=0):
        pixels = pixels_for(grid, seed)
        assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))

    return check


def poison(manager, value=float("nan")):
    """Overwrite everything that a graph addresses, as a neighbour in its memory might."""
    for rung in manager.ladder.rungs.values():
        for graph in rung.graphs:
            graph.inputs["pixel_values"].fill_(value)
            for buffer in graph.outputs.values():
                buffer.fill_(value)


@pytest.mark.parametrize("budgets", [None, [24, 64]])
@pytest.mark.parametrize("items", [None, 24])
def test_bug_01_more_items_than_the_smallest_budget(encoder, captured, check, budgets, items):
    """vLLM #38040: the share of an item was budget // items = 0, and its buffer could not be."""
    config = {"token_budgets": budgets, "max_vision_items_per_batch": items}
    manager = captured(encoder, config)
    for rung in manager.rungs:
        assert 1 <= rung.max_items <= rung.token_budget
    for count in (1, 23, 24, 25):
        check(manager, encoder, [ONE] * count)
    assert manager.stats()["misses"] == 0
    with pytest.raises(ValueError, match=r"max_vision_items_per_batch=25 exceeds the smallest"):
        EncoderCudaGraphConfig(token_budgets=(24, 64), max_vision_items_per_batch=25)


@pytest.mark.parametrize(
    ("budget", "item"), [(17, (1, 2, 34)), (51, (1, 6, 34)), (99, (1, 18, 22))]
)
def test_bug_02_one_item_that_is_the_whole_budget(encoder, captured, check, budget, item):
    """vLLM #42639: budget // items * items is less than the budget, and a full item overran it."""
    manager = captured(encoder, CONFIG | {"token_budgets": [17, 51, 99]})
    check(manager, encoder, [item])
    check(manager, encoder, [ONE] * 7 + [(1, 2, 2 * min(budget - 7, 32))])
    rungs = {rung["token_budget"]: rung for rung in manager.stats()["rungs"]}
    assert rungs[budget]["live_tokens"] >= budget
    assert manager.stats()["misses"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bug_03_what_lies_in_padding_rows(encoder, captured, check, value):
    """vLLM #57136: NaN that another budget had left in the pool reached real tokens."""
    manager = captured(encoder)
    for seed, grid in enumerate([[SMALL], [LARGE], [SMALL], [IMAGE, VIDEO], [SMALL]]):
        poison(manager, value)
        check(manager, encoder, grid, seed)


def test_bug_04_tail_of_the_tables(encoder, captured, check):
    """vLLM #42796: entries past the live ones were zero or stale, so that offsets went down."""
    manager = captured(encoder)
    (limits,) = [rung for rung in manager.rungs if rung.token_budget == 64]
    table = manager.ladder.rungs[limits].graphs[0].inputs["grid"]
    for grid in ([VIDEO] * 3, [IMAGE] * 2, [(30, 2, 2)], [SMALL] * 5, [(1, 8, 10)]):
        check(manager, encoder, grid)
        assert table.tolist() == [list(row) for row in grid] + [[0, 0, 0]] * (8 - len(grid))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 62, 63])
def test_bug_05_any_number_of_segments(encoder, captured, check, count):
    """sglang-omni #1624: empty segments in unused slots were refused, or went unwritten."""
    slots = {"max_vision_items_per_batch": 63, "max_frames_per_batch": 63}
    manager = captured(encoder, {"token_budgets": [128]} | slots)
    if count:
        check(manager, encoder, [ONE] * count)
        check(manager, encoder, [(count, 2, 2)])
    else:
        assert manager.execute(torch.empty(0, 6), [])["pooler_output"].shape == (0, 6)
    assert manager.stats()["replays"] == (2 if count else 0)


@pytest.mark.parametrize("video", [LONG_VIDEO, (33, 2, 2)])
def test_bug_07_more_frames_than_slots(encoder, captured, check, video):
    """vLLM #43403: packing ignored frames, and a long video raised instead of running eagerly."""
    manager = captured(encoder)
    check(manager, encoder, [SMALL, video, SMALL])
    stats = manager.stats()
    assert stats["eager_reasons"] == {"frames": 1}
    assert (stats["hits"], stats["misses"]) == (2, 1)
    check(manager, encoder, [(20, 2, 2)] * 3)
    assert manager.stats()["replays"] == stats["replays"] + 3
    assert manager.stats()["misses"] == 1


def test_bug_09_untiled_images_among_tiled_ones(fake_encoder, rerun_recorder, pixels_for):
    """vLLM #46034: an image too large for the local graph, or without local tiles, raised."""
    paths = {"global": fake_encoder(), "tiles": fake_encoder()}
    manager = MultiPathManager(
        paths, {"global": CONFIG, "tiles": {"token_budgets": [16]}}, recorder=rerun_recorder
    )
    manager.capture()
    mixes = [([IMAGE], [SMALL] * 4), ([IMAGE], []), ([IMAGE, HUGE], [SMALL] * 99 + [LARGE])]
    for grids in mixes:
        calls = {path: (pixels_for(g), g) for path, g in zip(paths, grids, strict=True) if g}
        results = manager.execute(calls)
        assert [len(out["pooler_output"]) for out in results.values()] == [
            sum(t * h * w // 4 for t, h, w in grid) for grid in grids
        ]
        for path, (pixels, grid) in calls.items():
            assert_same(results[path], paths[path].eager_forward(pixels, grid))


@pytest.mark.parametrize("grid", [[IMAGE], [HUGE], [SMALL, HUGE]])
def test_bug_10_pixels_that_were_not_normalised(encoder, captured, pixels_for, grid):
    """vLLM #55370: raw pixels were normalised by the eager path only, and graphs gave gibberish."""
    manager = captured(encoder)
    pixels = pixels_for(grid)
    for dtype in (torch.uint8, torch.int32):
        with pytest.raises(TypeError, match="preprocess"):
            manager.execute(pixels.to(dtype), grid)
    assert manager.stats()["items"] == 0
    expected = encoder.eager_forward(pixels, grid)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same(manager.execute(pixels.to(dtype), grid), expected)


def test_bug_11_pruning_that_no_graph_holds(fake_encoder, captured, pixels_for):
    """vLLM #38040: pruning was done after the eager forward only, and replays skipped it."""

    class PrunesEagerly(fake_encoder):
        def eager_forward(self, pixel_values, grid_thw, pruning=None):
            outputs = super().eager_forward(pixel_values, grid_thw)
            if pruning is not None:
                pieces = outputs["pooler_output"].split([t * h * w // 4 for t, h, w in grid_thw])
                kept = [piece[:keep] for piece, keep in zip(pieces, pruning.keep, strict=True)]
                outputs["pooler_output"] = torch.cat(kept)
            return outputs

    encoder = PrunesEagerly()
    manager = captured(encoder)
    grid, pixels = [IMAGE, SMALL], pixels_for([IMAGE, SMALL])
    whole = manager.execute(pixels, grid)["pooler_output"]
    pruned = manager.execute(pixels, grid, pruning=Pruning((5, 2), (False, False)))
    assert torch.equal(pruned["pooler_output"], torch.cat([whole[:5], whole[16:18]]))
    with manager.lease(pixels, grid, pruning=Pruning((5, 2), (False, False))) as lease:
        assert len(lease.outputs["pooler_output"]) == 7
    stats = manager.stats()
    assert stats["eager_reasons"] == {"pruning": 4}
    assert stats["hits"] == 2


def test_bug_12_buffers_that_moved_after_capture(encoder, captured, check, pixels_for):
    """SGLang #29216: a shared workspace grew, and graphs went on using the freed one."""
    manager = captured(encoder)
    for seed, grid in enumerate([[SMALL], [LARGE], [SMALL]]):
        check(manager, encoder, grid, seed)
    for histogram, rows in (({4: 1}, 128), ({4: 1, 128: 1}, 512)):
        manager.refit(histogram, background=False).result()
        assert len(manager.ladder.ring.slots[0].inputs["pixel_values"]) == rows
        check(manager, encoder, [SMALL])
    for rung in manager.ladder.rungs.values():
        for graph, slot in zip(rung.graphs, manager.ladder.ring.slots, strict=True):
            for name, buffer in (slot.inputs | slot.outputs).items():
                assert (graph.inputs | graph.outputs)[name].data_ptr() == buffer.data_ptr()
    for seed, grid in enumerate([[SMALL], [LARGE], [SMALL]]):
        check(manager, encoder, grid, seed)
    for rung in manager.ladder.rungs.values():
        rung.graphs[0].outputs["pooler_output"] = rung.graphs[0].outputs["pooler_output"].clone()
    with pytest.raises(RuntimeError, match=r"rebound after capture.*call capture\(\) again"):
        manager.execute(pixels_for([SMALL]), [SMALL])


@pytest.mark.parametrize("kind", ["images", "video", "two replays"])
def test_bug_13_equal_sums_of_other_segments(encoder, captured, pixels_for, kind):
    """SGLang #16902: graphs were found by the number of rows, with segments of an earlier call."""
    layouts = [
        [(1, 2, 8), (1, 2, 12), (1, 2, 16)],
        [(1, 2, 10), (1, 2, 10), (1, 2, 16)],
        [(1, 2, 16), (1, 2, 12), (1, 2, 8)],
        [(1, 4, 4), (1, 12, 2), (1, 4, 8)],
    ]
    if kind == "two replays":
        layouts = [[(1, 16, 28), (1, 16, 16), SMALL], [SMALL, (1, 16, 16), (1, 28, 16)]]
    if kind == "video":
        layouts = [[(6, 2, 4)], [(4, 2, 6)], [(2, 2, 12)], [(1, 4, 12)], [(6, 4, 2)]]
    manager = captured(encoder)
    pixels, seen = pixels_for(layouts[0]), []
    for grid in layouts * 2:
        results = manager.execute(pixels, grid)
        assert_same(results, encoder.eager_forward(pixels, grid))
        seen.append(results["pooler_output"])
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))
    assert manager.stats()["misses"] == 0


def test_bug_14_buffers_that_only_a_graph_knows(encoder, captured, check):
    """vLLM Ascend #16794: outputs were held by weak references, and a collection freed them."""
    manager = captured(encoder, CONFIG | {"num_slots": 2})
    buffers = [
        StorageWeakRef(buffer.untyped_storage())
        for rung in manager.ladder.rungs.values()
        for graph in rung.graphs
        for buffer in (*graph.inputs.values(), *graph.outputs.values())
    ]
    for seed, grid in enumerate([[SMALL], [LARGE], [VIDEO, SMALL]] * 2):
        gc.collect()
        churn = [torch.full((2048, 6), torch.nan) for _ in range(8)]
        assert not any(buffer.expired() for buffer in buffers)
        check(manager, encoder, grid, seed)
        del churn
    lease = manager.lease(torch.zeros(16, 6), [SMALL])
    manager.clear()
    gc.collect()
    assert all(buffer.expired() for buffer in buffers)
    assert not lease.valid


@pytest.mark.parametrize("grid", [[IMAGE], [IMAGE] * 9, [HUGE], [SMALL, HUGE]])
@pytest.mark.parametrize("names", [None, ["pooler_output"]])
def test_bug_15_results_that_alias_static_buffers(encoder, captured, pixels_for, grid, names):
    """sam2 #775: the static output itself was returned, and the next call overwrote it."""
    manager = captured(encoder)
    first = manager.execute(pixels_for(grid, 1), grid, names=names)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    manager.execute(pixels_for(grid, 2), grid, names=names)
    poison(manager)
    assert_same(first, kept)
    lease = manager.lease(pixels_for([IMAGE]), [IMAGE])
    assert lease.zero_copy
    manager.execute(pixels_for([IMAGE], 3), [IMAGE])
    with pytest.raises(RuntimeError, match="its slot was taken by a later call"):
        _ = lease.outputs


def test_bug_16_compiling_inside_a_capture(fake_encoder, rerun_recorder, captured, check):
    """SGLang #17871: kernels were compiled for the first time while a graph was being recorded."""

    class Compiling(fake_encoder):
        def __init__(self):
            super().__init__()
            self.compiled = set()
            self.recording = False

        def graph_forward(self, inputs, outputs, limits):
            assert not self.recording or limits in self.compiled, limits
            self.compiled.add(limits)
            super().graph_forward(inputs, outputs, limits)

    encoder = Compiling()

    class Strict(type(rerun_recorder)):
        def record(self, work, pool):
            encoder.recording = True
            work()
            encoder.recording = False
            return super().record(work, pool)

    manager = captured(encoder, recorder=Strict())
    for histogram in ({30: 5, 128: 1}, {10: 1}):  # over the same buffers, and over others
        before = set(manager.rungs)
        manager.refit(histogram, background=False).result()
        assert set(manager.rungs) - before
        check(manager, encoder, [IMAGE, VIDEO, SMALL])


def test_bug_18_rows_on_another_axis_than_the_first(fake_encoder, captured):
    """vLLM: a copier that assumed rows on axis 0 cut the planes of a (3, rows, width) input."""

    class Planes(fake_encoder):
        def output_specs(self, limits):
            planes = BufferSpec((3, limits.max_patches, 6), torch.float32, "patches")
            return super().output_specs(limits) | {"planes": planes}

    with pytest.raises(ValueError, match=r"gives planes \[3, .*its leading axis must have a row"):
        captured(Planes())


@pytest.mark.parametrize("counts", [[1], [2, 0, 1]])
def test_bug_19_a_rank_without_items(tmp_path, counts):
    """SGLang: ranks that captured unevenly, or had no item, left the others waiting."""
    grids = [[SMALL] * count for count in counts]
    work = json.dumps(["mix", {"grids": grids, "uneven": True}])
    commands = [[sys.executable, RANKS, str(rank), "2", "cpu", tmp_path] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdin=subprocess.PIPE, text=True) for c in commands]
    try:
        for rank in ranks:
            rank.stdin.write(work + "\n")
            rank.stdin.close()
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdin.close()
    first, second = (torch.load(tmp_path / f"0.{rank}.pt") for rank in range(2))
    assert [[len(own) for own, _ in results] for results in (first, second)] == [
        [(count + 1) // 2 for count in counts],
        [count // 2 for count in counts],
    ]
    for count, (_, a), (_, b) in zip(counts, first, second, strict=True):
        assert len(a["pooler_output"]) == 4 * count
        assert_same(a, b)


def test_bug_21_sizes_that_no_graph_has(encoder, captured, check):
    """vLLM-Omni #7650: looking up a graph that had not been captured failed an assertion."""
    manager = captured(encoder)
    grid = [LARGE, SMALL, HUGE, LONG_VIDEO, *[ONE] * 20]
    check(manager, encoder, grid)
    assert manager.stats()["eager_reasons"] == {"tokens": 1, "frames": 1}
    for budget in (128, 16):
        assert manager.evict(budget) == budget
        before = manager.stats()["misses"]
        check(manager, encoder, grid)
        assert manager.stats()["misses"] == before + 3


@pytest.mark.parametrize("modality", ["image", "video", "image+video"])
def test_bug_22_the_other_modality(encoder, captured, check, modality):
    """vLLM #58122: graphs captured for images took videos, or calls without either, for images."""
    manager = captured(encoder, {"token_budgets": [16, 64], "modality": modality})
    for grid in ([IMAGE] * 3, [VIDEO], [IMAGE, VIDEO, IMAGE], [LONG_VIDEO], [SMALL] * 12):
        check(manager, encoder, grid)
    assert len(manager.execute(torch.empty(0, 6), [])["pooler_output"]) == 0
    assert manager.stats()["items"] == 3 + 1 + 3 + 1 + 12


@pytest.mark.parametrize("budgets", [[0], [-16], [16, 0], [], [True], [16.0], "16", 16, [None]])
def test_bug_24_budgets_that_are_none(budgets):
    """vLLM #41714: a budget of 0 or an empty list failed much later, by a division by zero."""
    with pytest.raises(ValueError, match=r"^EncoderCudaGraphConfig: .*token_budgets.*(pass|at l)"):
        EncoderCudaGraphConfig.from_any({"token_budgets": budgets})


def test_bug_24_budgets_out_of_order(encoder, captured, check):
    """vLLM #38040: budgets were taken to ascend, and the first that fitted was not the best."""
    manager = captured(encoder, CONFIG | {"token_budgets": [128, 16, 64, 16]})
    check(manager, encoder, [SMALL])
    stats = manager.stats()
    assert [rung["token_budget"] for rung in stats["rungs"]] == [16, 64, 128]
    assert stats["padded_tokens"] == 16


def test_bug_26_a_forward_that_empties_its_inputs(fake_encoder, captured, check):
    """vLLM: a model popped names from the inputs kept with the graph, and the next use failed."""

    class Popping(fake_encoder):
        def graph_forward(self, inputs, outputs, limits):
            taken = [{name: part.pop(name) for name in list(part)} for part in (inputs, outputs)]
            super().graph_forward(*taken, limits)

    encoder = Popping()
    manager = captured(encoder)
    for _ in range(2):
        check(manager, encoder, [IMAGE, SMALL])
        check(manager, encoder, [LARGE])
        manager.capture()
    manager.refit({50: 1, 100: 1}, background=False).result()
    check(manager, encoder, [IMAGE, SMALL])


def test_bug_30_counters_that_do_not_add_up(encoder, captured, check, pixels_for):
    """vLLM-Omni #523: a fallback gave a reason but no count, or an item counted on every path."""
    manager = captured(encoder, CONFIG | {"num_slots": 2})
    calls = [[IMAGE] * 9, [SMALL, HUGE, LONG_VIDEO], [HUGE], [LARGE, SMALL], [VIDEO]]
    served, stats = 0, {}
    for grid in calls:
        check(manager, encoder, grid)
        manager.lease(pixels_for(grid), grid).release()
        with pytest.raises(ValueError, match="pixel_values is"):
            manager.execute(pixels_for(grid)[1:], grid)
        served += 2 * len(grid)
        stats = manager.stats()
        assert stats["hits"] + stats["misses"] == stats["items"] == served
        assert sum(stats["eager_reasons"].values()) == stats["misses"]
        for name in ("replays", "live_tokens"):
            assert sum(rung[name] for rung in stats["rungs"]) == stats[name]
        assert sum(rung["items"] for rung in stats["rungs"]) == stats["hits"]
    assert sum(stats["histogram"].values()) == 2 * len(calls)
    assert stats["misses"] == 2 * 3


def test_every_class_has_a_test():
    tests = Path(__file__).parents[1]
    files = [Path(__file__), tests / "encoder" / "test_bug_classes_encoder.py"]
    found = re.findall(r"^def test_bug_(\d\d)_", "".join(f.read_text() for f in files), re.M)
    assert {int(number) for number in found} == set(range(1, 31))
