"""Several processes, each a rank: gloo on the CPU, and NCCL where there are two GPUs.

The ranks of a fixture live through all its tests and run the scenarios of data_parallel_ranks.py.
Ranks that do not answer in time fail the test that waits for them, and are replaced for the next.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vitgraph.capture.data_parallel import DataParallelEncoder

SCRIPT = Path(__file__).with_name("data_parallel_ranks.py")
TIMEOUT = 60  # seconds
IMAGE, SMALL, VIDEO = (1, 8, 8), (1, 4, 4), (4, 4, 6)
HUGE = (1, 32, 32)  # more tokens than any budget of the scenarios


class Ranks:
    """Processes 0 to world - 1 of a process group."""

    def __init__(self, world, device, new_folder):
        self.world, self.device, self.new_folder = world, device, new_folder
        self.processes = []

    def run(self, name, **arguments):
        """What the scenario returns on each rank."""
        if not self.processes:
            self.start()
        for process in self.processes:
            process.stdin.write(json.dumps([name, arguments]) + "\n")
            process.stdin.flush()
        results = [self.folder / f"{self.count}.{rank}.pt" for rank in range(self.world)]
        self.count += 1
        deadline = time.monotonic() + TIMEOUT
        while not all(result.exists() for result in results):
            ended = [p.poll() is not None for p in self.processes]
            if time.monotonic() > deadline or any(ended):
                self.kill()
                logs = "".join(path.read_text() for path in sorted(self.folder.glob("log.*")))
                pytest.fail(f"{name}: ended: {ended}, else no answer in {TIMEOUT} s\n{logs}")
            time.sleep(0.005)
        return [torch.load(result) for result in results]

    def start(self):
        self.count, self.folder = 0, self.new_folder()
        # ranks compute as a user's do: on the CPU by the references
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        for rank in range(self.world):
            with open(self.folder / f"log.{rank}", "w") as log:
                command = [sys.executable, SCRIPT, rank, self.world, self.device, self.folder]
                process = subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.PIPE,
                    stderr=log,
                    stdout=log,
                    text=True,
                    env=environment,
                )
            self.processes.append(process)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
        self.processes = []

    def stop(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(TIMEOUT)
            finally:
                process.kill()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory):
    ranks = Ranks(request.param, "cpu", lambda: tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def gpu_ranks(tmp_path_factory):
    world = min(2, torch.cuda.device_count())
    if world < 2:
        pytest.skip(f"NCCL between GPUs needs 2, there are {world}")
    ranks = Ranks(world, "cuda", lambda: tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def random_mix(seed, items):
    rng = random.Random(seed)
    return [
        (rng.choice((1, 1, 3)), 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)) for _ in range(items)
    ]


def batches():
    """No item, fewer items than ranks, equal ones, and mixes of all sizes."""
    fixed = [[], [IMAGE], [SMALL, IMAGE], [IMAGE] * 7, [HUGE, SMALL, VIDEO, SMALL, HUGE, IMAGE]]
    return fixed + [random_mix(seed, items) for seed, items in enumerate((2, 5, 9, 17))] + [[SMALL]]


def pieces(tensor, counts, indices):
    split = tensor.split(counts)
    return torch.cat([tensor[:0], *(split[index] for index in indices)])


def check_mix(ranks, encoder, pixels_for, gather=True, pruning_for=None, **options):
    grids = batches()
    answers = ranks.run("mix", grids=grids, gather=gather, **options)
    assert all(isinstance(answer, list) for answer in answers), answers
    every = [gather] if isinstance(gather, list) else []
    every += [options[key] for key in ("names", "out") if key in options]
    for seed, grid in enumerate(grids):
        owned = [answer[seed][0] for answer in answers]
        assert sorted(sum(owned, ())) == list(range(len(grid)))
        patches = [t * h * w for t, h, w in grid]
        kept = [p // 4 for p in patches]
        pruning = [] if pruning_for is None else [pruning_for(grid, seed)]
        if pruning:
            kept = pruning[0].keep
        kinds = {"last_hidden_state": patches, "pooler_output": kept}
        if options.get("pruned"):
            kinds["kept_index"] = kept
        whole = encoder.eager_forward(pixels_for(grid, seed), grid, *pruning) if grid else {}
        for rank, answer in enumerate(answers):
            outputs = answer[seed][1]
            assert list(outputs) == (every[0] if every else list(kinds))
            for name, actual in outputs.items():
                if not grid:
                    assert actual.shape == ((0,) if name == "kept_index" else (0, 6))
                    continue
                expected = whole[name]
                if gather is False:
                    expected = pieces(expected, list(kinds[name]), owned[rank])
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected), (rank, grid, name)


OPTIONS = {
    "all replay": {},
    "one replays": {"uneven": True},
    "own pixels": {"shard": True},
    "unchecked": {"check": False, "uneven": True},
    "one output": {"gather": ["pooler_output"]},
    "not gathered": {"gather": False},
    "neither gathered nor checked": {"gather": False, "check": False, "shard": True},
    "one name": {"names": ["pooler_output"], "uneven": True},
    "one name, not gathered": {"names": ["last_hidden_state"], "gather": False},
}
on_each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@on_each_option
def test_equals_one_process(ranks, fake_encoder, pixels_for, options):
    check_mix(ranks, fake_encoder(), pixels_for, **options)


PRUNED = {
    "all replay": {"pruned": True},
    "one replays": {"pruned": True, "uneven": True},
    "own pixels": {"pruned": True, "shard": True, "check": False},
    "one output": {"pruned": True, "gather": ["pooler_output"]},
    "not gathered": {"pruned": True, "gather": False, "uneven": True},
    "in place": {"pruned": True, "gather": False, "out": ["pooler_output", "kept_index"]},
    "in no graph": {"pruned": False, "uneven": True},
    "in no graph, one name": {"pruned": False, "names": ["pooler_output"]},
    "in no graph, in place": {"pruned": False, "gather": False, "out": ["pooler_output"]},
}


@pytest.mark.parametrize("options", PRUNED.values(), ids=PRUNED.keys())
def test_pruned_equals_one_process(ranks, pruning_encoder, pruning_for, pixels_for, options):
    check_mix(ranks, pruning_encoder(), pixels_for, pruning_for=pruning_for, **options)


@pytest.mark.parametrize("uneven", [False, True])  # rank 0 writes by the manager, others by a copy
def test_written_in_place(ranks, fake_encoder, pixels_for, uneven):
    for out in (["pooler_output"], ["last_hidden_state", "pooler_output"]):
        check_mix(ranks, fake_encoder(), pixels_for, gather=False, out=out, uneven=uneven)


@pytest.mark.parametrize("announces", [True, False])
def test_what_the_function_is_told(ranks, announces):
    pooled = {"names": ["pooler_output"]}
    pruned = {"pruning": None}
    in_place = {"out": ["pooler_output"]}
    for seen in ranks.run("handed", announces=announces):
        assert seen == [
            {},
            pooled,
            pooled,
            pruned,
            # graphs without pruning serve pruned calls eagerly, with all outputs
            pruned | (pooled if announces else {}),
            pruned | (in_place if announces else {}),
            in_place,
        ]


def test_pruned_tower(ranks):
    grid = [(1, 8, 12), (4, 4, 6), (3, 4, 8), (1, 4, 4), (6, 4, 4)]
    for names, rows, kept, same in ranks.run("pruned_tower", grid=grid):
        assert names == ["deepstack_0", "deepstack_1", "last_hidden_state", "pooler_output"]
        assert rows == kept < sum(t * h * w for t, h, w in grid) // 4
        assert same


@pytest.mark.gpu
def test_pruned_tower_in_graphs(gpu_ranks):
    grid = [(1, 8, 12), (4, 4, 6), (3, 4, 8), (1, 4, 4), (6, 4, 4)]
    for names, rows, kept, same in gpu_ranks.run("pruned_tower", grid=grid):
        assert "kept_index" in names
        assert rows == kept < sum(t * h * w for t, h, w in grid) // 4
        assert same


@pytest.mark.gpu
@on_each_option
def test_equals_one_gpu(gpu_ranks, fake_encoder, pixels_for, options):
    check_mix(gpu_ranks, fake_encoder(), pixels_for, **options)


@pytest.mark.gpu
def test_tower_equals_one_gpu(gpu_ranks):
    grid = [(1, 8, 12), (1, 4, 6), (2, 4, 8), (1, 16, 16), (1, 4, 4), (1, 8, 12), (1, 30, 30)]
    for same, error in gpu_ranks.run("tower", grid=grid):
        assert same == [True, True]
        assert error < 2e-2  # other GEMM shapes in bf16


def test_gathers_bf16_and_integers(ranks, pixels_for, fake_encoder):
    grids = [grid for grid in batches() if grid]
    for answer in ranks.run("mix", grids=grids, half=True):
        for seed, (grid, (_, outputs)) in enumerate(zip(grids, answer, strict=True)):
            expected = fake_encoder().eager_forward(pixels_for(grid, seed), grid)
            assert torch.equal(outputs["last_hidden_state"], expected["last_hidden_state"])
            assert torch.equal(outputs["pooler_output"], expected["pooler_output"].bfloat16())
            assert outputs["frame"].tolist() == [h * w for t, h, w in grid for _ in range(t)]
            assert outputs["frame"].dtype == torch.int32


def check_failing(ranks, gather):
    grid = [IMAGE, SMALL, VIDEO, IMAGE]
    for bad in ([0], [1], [0, 1]):
        for rank, (first, second) in enumerate(
            ranks.run("failing", grid=grid, bad=bad, gather=gather)
        ):
            assert first["error"] == "RuntimeError"
            for other in range(ranks.world):
                text = f"rank {other} failed: FloatingPointError: kernel of {other} went wrong"
                assert (text in first["text"]) == (other in bad)
            assert first["cause"] == ("FloatingPointError" if rank in bad else None)
            assert set(second) == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize("gather", [True, False])
def test_every_rank_hears_of_a_failure(ranks, gather):
    check_failing(ranks, gather)


@pytest.mark.gpu
def test_every_gpu_hears_of_a_failure(gpu_ranks):
    check_failing(gpu_ranks, True)


def test_unchecked_failure_sends_nan_and_does_not_hang(ranks, fake_encoder, pixels_for):
    grid = [IMAGE] * 6  # 2 ranks: 3 each; 3 ranks: 2 each
    answers = ranks.run("failing", grid=grid, bad=[1], check=False)
    expected = fake_encoder().eager_forward(pixels_for(grid), grid)["pooler_output"].split(16)
    own = len(grid) // ranks.world
    for rank, (first, second) in enumerate(answers):
        assert torch.equal(second["pooler_output"], torch.cat(expected))
        if rank == 1:
            assert first["error"] == "FloatingPointError"
            continue
        for index, rows in enumerate(first["pooler_output"].split(16)):
            if own <= index < 2 * own:
                assert rows.isnan().all()
            else:
                assert torch.equal(rows, expected[index])


def test_unchecked_refusal_of_one_rank_does_not_hang(ranks):
    *alike, odd = ranks.run("differing", what="pixels", check=False)
    assert odd[0]["error"] == "ValueError"
    for first, second in alike:
        lost = first["pooler_output"].isnan().any(1)
        assert lost.any()
        assert torch.equal(first["pooler_output"][~lost], second["pooler_output"][~lost])


# what the ranks called alike raise, and what the odd one out, the last, raises itself
OTHER_GRID = ("ValueError", "grid_thw on rank {last} is not that on rank 0")
OTHER_SETUP = ("ValueError", "rank {last} and rank 0 share the same batch out differently")
MISMATCHES = {
    "grid": (OTHER_GRID, OTHER_GRID),
    "order": (OTHER_GRID, OTHER_GRID),
    "gather": (OTHER_SETUP, OTHER_SETUP),
    "names": (OTHER_SETUP, OTHER_SETUP),
    "one prunes": (OTHER_GRID, OTHER_GRID),
    "pruning": (OTHER_GRID, OTHER_GRID),
    "bad pruning": (
        ("RuntimeError", "rank {last} refused its input: ValueError: execute: pruning keeps 5"),
        ("ValueError", "execute: pruning keeps 5 tokens of item 0, which has 4; pass 0 to 4"),
    ),
    "costs": (OTHER_SETUP, OTHER_SETUP),
    "odd grid": (
        ("RuntimeError", "rank {last} refused its input: ValueError: item_specs: grid (1, 7, 8)"),
        ("ValueError", "item_specs: grid (1, 7, 8) is odd"),
    ),
    "pixels": (
        ("RuntimeError", "rank {last} refused its input: ValueError: execute: pixel_values is [14"),
        ("ValueError", "execute: pixel_values is [147, 6]"),
    ),
    "outputs": (
        ("RuntimeError", "rank {last} failed: RuntimeError: execute: last_hidden_state of"),
        ("RuntimeError", "rank {last} failed: RuntimeError: execute: last_hidden_state of"),
    ),
}


def check_differing(ranks, what):
    last = ranks.world - 1
    for rank, (first, second) in enumerate(ranks.run("differing", what=what)):
        error, text = MISMATCHES[what][rank == last]
        assert first["error"] == error
        assert text.format(last=last) in first["text"]
        assert second is None or set(second) == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_that_are_called_differently(ranks, what):
    check_differing(ranks, what)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["grid", "odd grid"])
def test_gpus_that_are_called_differently(gpu_ranks, what):
    check_differing(gpu_ranks, what)


REFUSED = {
    "odd": ({"grid": [[1, 3, 4]], "pixels": [12, 6]}, "ValueError", r"is odd"),
    "empty item": ({"grid": [[1, 0, 4]], "pixels": [0, 6]}, "ValueError", "at least 1 everywhere"),
    "fractions": ({"grid": [[1, 2.5, 4]], "pixels": [10, 6]}, "TypeError", "not of whole numbers"),
    "few pixels": ({"grid": [IMAGE], "pixels": [63, 6]}, "ValueError", "ask for [64, 6]"),
    "unknown output": (
        {"grid": [IMAGE], "pixels": [64, 6], "gather": ["pooled"]},
        "ValueError",
        "unknown output pooled in gather; the outputs are last_hidden_state, pooler_output",
    ),
    "unknown name": (
        {"grid": [IMAGE], "pixels": [64, 6], "names": ["pooled"]},
        "ValueError",
        "unknown output pooled in names; the outputs are last_hidden_state, pooler_output",
    ),
    "gather and names": (
        {
            "grid": [IMAGE],
            "pixels": [64, 6],
            "gather": ["last_hidden_state"],
            "names": ["pooler_output"],
        },
        "ValueError",
        "gather: last_hidden_state and names: pooler_output are different outputs; name the",
    ),
    "out and names": (
        {
            "grid": [],
            "pixels": [0, 6],
            "gather": False,
            "out": {"pooler_output": [0, 6]},
            "names": ["pooler_output", "last_hidden_state"],
        },
        "ValueError",
        "out: pooler_output and names: last_hidden_state, pooler_output are different",
    ),
    "out of all ranks": (
        {"grid": [IMAGE], "pixels": [64, 6], "out": {"pooler_output": [16, 6]}},
        "ValueError",
        "gather=True asks for those of all ranks; pass gather=False to have them written",
    ),
    "out of other rows": (
        {
            "grid": [],
            "pixels": [0, 6],
            "gather": False,
            "out": {"pooler_output": [16, 6]},
        },
        "ValueError",
        "execute: out['pooler_output'] is [16, 6] on cpu; pass [0, 6] on cpu",
    ),
    "pruning of other items": (
        {"grid": [IMAGE], "pixels": [64, 6], "keep": [3, 4]},
        "ValueError",
        "pruning speaks of 2 items, grid_thw has 1",
    ),
    "pruning that is not taken": (
        {"grid": [IMAGE], "pixels": [64, 6], "keep": [3], "plain": True},
        "ValueError",
        "the function that computes the items has no such parameter",
    ),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("arguments", "error", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_raises_alike_on_every_rank(ranks, arguments, error, text, check):
    answers = ranks.run("refused", check=check, **arguments)
    assert answers == [answers[0]] * ranks.world
    assert answers[0]["error"] == error
    assert text in answers[0]["text"]


def test_group_of_some_ranks(ranks, fake_encoder, pixels_for):
    grid = [IMAGE, VIDEO, SMALL]
    *inside, outside = ranks.run("subgroup", grid=grid)
    assert f"global rank {ranks.world - 1} is not in the group" in outside
    expected = fake_encoder().eager_forward(pixels_for(grid), grid)
    for outputs in inside:
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_needs_a_process_group(fake_encoder):
    encoder = fake_encoder()
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        DataParallelEncoder(encoder.eager_forward, encoder)
