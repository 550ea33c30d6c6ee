"""A global image and its local crops, each on its own ladder; recordings rerun on the CPU."""

import threading

import pytest
import torch
from vitgraph.capture import BufferSpec, Pruning
from vitgraph.capture.multi_path import MultiPathManager

WHOLE, WIDE = (1, 16, 16), (1, 8, 32)  # 64 tokens each
TILE = (1, 8, 8)  # 16 tokens
HUGE = (1, 32, 32)  # 256 tokens, more than any rung of either path
CROP_WIDTH = 4
CONFIGS = {
    "image": {"token_budgets": [64, 128], "max_vision_items_per_batch": 2},
    "crops": {"token_budgets": [16, 32, 96], "max_vision_items_per_batch": 6},
}
NAMES = ["last_hidden_state", "pooler_output"]


@pytest.fixture
def paths(fake_encoder):
    """Crops pool to fewer columns in half precision, and refuse videos."""

    class Crops(fake_encoder):
        def item_specs(self, grid_thw):
            if any(t > 1 for t, _, _ in grid_thw):
                raise ValueError("item_specs: crops are no videos")
            return super().item_specs(grid_thw)

        def output_specs(self, limits):
            specs = super().output_specs(limits)
            shape = (limits.token_budget, CROP_WIDTH)
            return specs | {"pooler_output": BufferSpec(shape, torch.bfloat16, "tokens")}

        def _forward(self, pixels, grid, outputs, frames):
            pooled = torch.empty(len(outputs["pooler_output"]), 6)
            super()._forward(pixels, grid, outputs | {"pooler_output": pooled}, frames)
            width = outputs["pooler_output"].shape[1]
            outputs["pooler_output"].copy_(pooled[:, :width])

        def eager_forward(self, pixel_values, grid_thw, pruning=None):
            outputs = super().eager_forward(pixel_values, grid_thw)
            pooled = outputs["pooler_output"][:, :CROP_WIDTH].bfloat16()
            return outputs | {"pooler_output": pooled}

    return {"image": fake_encoder(), "crops": Crops()}


@pytest.fixture
def manager(paths, rerun_recorder):
    manager = MultiPathManager(paths, CONFIGS, recorder=rerun_recorder)
    manager.capture()
    return manager


@pytest.fixture
def inputs_for(pixels_for):
    def make(seed=0, **grids):
        return {
            path: (pixels_for(grid, seed + k), torch.tensor(grid))
            for k, (path, grid) in enumerate(grids.items())
        }

    return make


def check(paths, results, inputs):
    assert list(results) == list(paths)
    for path, encoder in paths.items():
        outputs = results[path]
        assert list(outputs) == NAMES
        if path not in inputs or not len(inputs[path][1]):
            width, dtype = (CROP_WIDTH, torch.bfloat16) if path == "crops" else (6, torch.float32)
            assert outputs["last_hidden_state"].shape == (0, 6)
            assert outputs["last_hidden_state"].dtype == torch.float32
            assert outputs["pooler_output"].shape == (0, width)
            assert outputs["pooler_output"].dtype == dtype
            continue
        pixels, grid = inputs[path]
        expected = encoder.eager_forward(pixels, grid.tolist())
        for name in NAMES:
            assert outputs[name].dtype == expected[name].dtype
            assert torch.equal(outputs[name], expected[name]), (path, name)


# bug class 9: a large image comes without local tiles, or with more than any rung holds
MIXES = [
    {"image": [WHOLE], "crops": [TILE] * 4},
    {"image": [WHOLE, WIDE]},
    {"crops": [TILE] * 13, "image": [WIDE]},
    {"crops": [TILE]},
    {"image": [HUGE, WHOLE], "crops": [TILE, HUGE, TILE]},
    {},
]


def test_tiled_and_untiled_in_turn(paths, manager, inputs_for):
    for turn in (1, 2):
        for seed, grids in enumerate(MIXES):
            inputs = inputs_for(10 * seed * turn, **grids)
            check(paths, manager.execute(inputs), inputs)


@pytest.mark.parametrize("grid", [[], torch.empty(0, 3, dtype=torch.int64)])
@pytest.mark.parametrize("pixels", [torch.empty(0), torch.empty(0, 6)])
def test_path_given_without_items(paths, manager, inputs_for, grid, pixels):
    inputs = inputs_for(image=[WHOLE])
    results = manager.execute(inputs | {"crops": (pixels, grid)})
    check(paths, results, inputs)


def test_results_belong_to_the_caller(manager, inputs_for):  # bug class 15
    grids = {"image": [WHOLE], "crops": [TILE] * 3}
    held = manager.execute(inputs_for(1, **grids))
    copies = {p: {n: t.clone() for n, t in outputs.items()} for p, outputs in held.items()}
    second = manager.execute(inputs_for(2, **grids))
    for path, outputs in copies.items():
        for name, copy in outputs.items():
            assert torch.equal(held[path][name], copy)
            assert not torch.equal(second[path][name], copy)


def test_names_and_out_by_path(paths, manager, inputs_for):
    inputs = inputs_for(image=[WHOLE, WIDE], crops=[TILE] * 3)
    expected = {p: e.eager_forward(*_listed(inputs[p])) for p, e in paths.items()}
    results = manager.execute(inputs, names={"crops": ["pooler_output"]})
    assert list(results["image"]) == NAMES
    assert list(results["crops"]) == ["pooler_output"]
    assert torch.equal(results["crops"]["pooler_output"], expected["crops"]["pooler_output"])
    out = {"image": {"pooler_output": torch.full((128, 6), 77.0)}}
    results = manager.execute(inputs, out=out, names={"crops": ["last_hidden_state"]})
    assert results["image"]["pooler_output"] is out["image"]["pooler_output"]
    assert list(results["image"]) == ["pooler_output"]
    assert list(results["crops"]) == ["last_hidden_state"]
    assert torch.equal(out["image"]["pooler_output"], expected["image"]["pooler_output"])


def _listed(given):
    return given[0], given[1].tolist()


@pytest.fixture
def pruned(pruning_encoder, rerun_recorder):
    """Image and crops that prune, and a path with pruning in no graph."""
    paths = {path: pruning_encoder() for path in CONFIGS}
    paths["tiny"] = pruning_encoder(announces=False)
    manager = MultiPathManager(paths, CONFIGS, recorder=rerun_recorder)
    manager.capture()
    return paths, manager


PRUNED = ["last_hidden_state", "pooler_output", "kept_index"]


def test_pruning_by_path(pruned, pruning_for, inputs_for):
    paths, manager = pruned
    for seed in range(4):
        grids = {"image": [WHOLE, WIDE], "crops": [TILE] * 4 + [HUGE], "tiny": [TILE, TILE]}
        inputs = inputs_for(seed, **grids)
        pruning = {p: pruning_for(grids[p], seed) for p in ("image", "tiny")}
        results = manager.execute(inputs, pruning=pruning)
        with manager.lease(inputs, pruning=pruning) as leases:
            for path, encoder in paths.items():
                expected = encoder.eager_forward(*_listed(inputs[path]), pruning.get(path))
                for outputs in (results[path], leases[path].outputs):
                    assert list(outputs) == PRUNED
                    for name in PRUNED:
                        assert torch.equal(outputs[name], expected[name]), (path, name)
        # every item of crops keeps its tokens
        assert len(results["crops"]["pooler_output"]) == 4 * 16 + 256


def test_a_path_without_items_prunes_nothing(pruned, pruning_for, inputs_for):
    _, manager = pruned
    results = manager.execute(inputs_for(crops=[TILE]), pruning={"image": Pruning((), ())})
    assert results["image"]["kept_index"].shape == (0,)
    with pytest.raises(ValueError, match="pruning speaks of 1 items, grid_thw has 0") as caught:
        manager.execute(inputs_for(crops=[TILE]), pruning={"image": Pruning((1,), (False,))})
    assert caught.value.__notes__ == ["in the path image"]


def test_leases_by_path(paths, rerun_recorder, inputs_for):
    two = CONFIGS | {"crops": CONFIGS["crops"] | {"num_slots": 2}}
    manager = MultiPathManager(paths, two, recorder=rerun_recorder)
    manager.capture()
    inputs = inputs_for(image=[WHOLE], crops=[TILE] * 2)
    first = manager.lease(inputs)
    assert all(lease.zero_copy and lease.valid for lease in first.values())
    check(paths, {path: lease.outputs for path, lease in first.items()}, inputs)
    # a path without items takes no slot
    more = inputs_for(9, crops=[TILE] * 3)
    second = manager.lease(more)
    assert not second["image"].zero_copy
    assert first["image"].valid
    check(paths, {path: lease.outputs for path, lease in second.items()}, more)
    check(paths, {path: lease.outputs for path, lease in first.items()}, inputs)
    # nor does a call of one path's items overtake the other
    manager.execute(inputs_for(image=[WIDE]))
    assert first["crops"].valid
    with pytest.raises(RuntimeError, match="its slot was taken by a later call"):
        _ = first["image"].outputs
    first.release()
    assert not first["crops"].valid
    with manager.lease(inputs) as third:
        assert third["crops"].valid
    assert not any(lease.valid for lease in third.values())
    manager.clear()
    assert not second["crops"].valid


def test_a_refused_lease_leaves_none(paths, manager, inputs_for, monkeypatch):
    leases = []
    lease = manager.managers["image"].lease
    monkeypatch.setattr(
        manager.managers["image"],
        "lease",
        lambda *a, **k: leases.append(lease(*a, **k)) or leases[-1],
    )
    with pytest.raises(ValueError, match="crops are no videos") as caught:
        manager.lease(inputs_for(image=[WHOLE], crops=[(2, 8, 8)]))
    assert caught.value.__notes__ == ["in the path crops"]
    assert [lease.valid for lease in leases] == [False]


def test_stats_count_an_item_once(manager, inputs_for):  # bug class 30
    # Hits and misses on both paths; an untiled image is no miss of the crops.
    manager.execute(inputs_for(image=[WHOLE], crops=[TILE] * 3))
    manager.execute(inputs_for(image=[HUGE]))
    manager.execute(inputs_for(crops=[TILE, HUGE]))
    manager.execute({})
    stats = manager.stats()
    image, crops, total = stats["paths"]["image"], stats["paths"]["crops"], stats["total"]
    assert list(stats["paths"]) == ["image", "crops"]
    assert (image["hits"], image["misses"]) == (1, 1)
    assert (crops["hits"], crops["misses"]) == (4, 1)
    assert (total["hits"], total["misses"], total["items"]) == (5, 2, 7)
    assert total["replays"] == image["replays"] + crops["replays"] == 3
    assert total["live_tokens"] == 64 + 4 * 16


def test_total_adds_up_reasons(manager, inputs_for):
    manager.execute(inputs_for(image=[HUGE], crops=[HUGE, TILE, HUGE]))
    stats = manager.stats()
    own = [path["eager_reasons"] for path in stats["paths"].values()]
    reasons = stats["total"]["eager_reasons"]
    assert sum(reasons.values()) == stats["total"]["misses"] == 3
    assert reasons == {key: sum(o.get(key, 0) for o in own) for key in set().union(*own)}


class Log:
    """Notes the pool of every recording."""

    def __init__(self, recorder):
        self.recorder = recorder
        self.pools = []
        self.new = 0

    def new_pool(self):
        self.new += 1
        return f"pool {self.new}"

    def record(self, work, pool):
        self.pools.append(pool)
        return self.recorder.record(work, pool)

    def __getattr__(self, name):
        return getattr(self.recorder, name)


def test_one_pool_and_the_largest_path_first(paths, rerun_recorder):
    log = Log(rerun_recorder)
    order = []

    def noting(path, forward):
        def graph_forward(*args):
            order.append(path)
            forward(*args)

        return graph_forward

    for path, encoder in paths.items():
        encoder.graph_forward = noting(path, encoder.graph_forward)
    small_first = {"crops": paths["crops"], "image": paths["image"]}
    manager = MultiPathManager(small_first, CONFIGS, recorder=log)
    assert manager.get_num_graphs_to_capture() == 5
    manager.capture()
    assert log.pools == ["pool 1"] * 5
    assert list(dict.fromkeys(order)) == ["image", "crops"]
    assert order == sorted(order, reverse=True)
    assert manager.graph_pool == "pool 1"
    manager.capture("mine")
    assert log.pools[5:] == ["mine"] * 5
    assert manager.graph_pool == "mine"


def test_default_configuration(paths, rerun_recorder, inputs_for):
    manager = MultiPathManager(paths, {"crops": CONFIGS["crops"]}, recorder=rerun_recorder)
    budgets = [rung.token_budget for rung in manager.managers["image"].rungs]
    assert (budgets[0], budgets[-1]) == (16, 128)
    manager.capture()
    inputs = inputs_for(image=[WHOLE], crops=[TILE])
    check(paths, manager.execute(inputs), inputs)


@pytest.mark.parametrize("broken", ["image", "crops"])
def test_failed_path_leaves_nothing(paths, rerun_recorder, inputs_for, broken):
    manager = MultiPathManager(paths, CONFIGS, recorder=rerun_recorder)
    manager.capture()
    paths[broken].fail_at = {"image": 64, "crops": 16}[broken]
    with pytest.raises(FloatingPointError) as caught:
        manager.capture()
    assert f"while capturing the path {broken}" in caught.value.__notes__
    assert manager.graph_pool is None
    assert all(own.graph_pool is None for own in manager.managers.values())
    for call in (manager.execute, manager.lease):
        with pytest.raises(RuntimeError, match="nothing is captured"):
            call(inputs_for(image=[WHOLE]))
    paths[broken].fail_at = None
    manager.capture()
    inputs = inputs_for(image=[WHOLE], crops=[TILE])
    check(paths, manager.execute(inputs), inputs)


def test_before_capture_and_after_clear(paths, rerun_recorder, inputs_for):
    manager = MultiPathManager(paths, CONFIGS, recorder=rerun_recorder)
    inputs = inputs_for(image=[WHOLE])
    for _ in range(2):
        for given in (inputs, {}):
            with pytest.raises(RuntimeError, match=r"nothing is captured; call capture\(\) first"):
                manager.execute(given)
        manager.capture()
        manager.execute(inputs)
        manager.clear()
        assert manager.graph_pool is None
        assert manager.stats()["total"]["hits"] == 0


def test_refuses_unknown_paths(paths, manager, inputs_for, rerun_recorder):
    with pytest.raises(ValueError, match="unknown path global; the paths are image, crops"):
        manager.execute({"global": inputs_for(image=[WHOLE])["image"]})
    for call, options, argument in (
        (manager.lease, {}, "inputs"),
        (manager.execute, {"pruning": {"global": Pruning((), ())}}, "pruning"),
        (manager.lease, {"pruning": {"global": Pruning((), ())}}, "pruning"),
        (manager.execute, {"out": {"global": {}}}, "out"),
        (manager.execute, {"names": {"global": ["pooler_output"]}}, "names"),
    ):
        inputs = inputs_for(image=[WHOLE])
        if argument == "inputs":
            inputs["global"] = inputs["image"]
        with pytest.raises(ValueError, match=f"{argument} names unknown path global; the paths"):
            call(inputs, **options)
    assert manager.stats()["total"]["hits"] == 0
    with pytest.raises(ValueError, match="configs names unknown path tiles; the paths are image"):
        MultiPathManager(paths, {"tiles": None}, recorder=rerun_recorder)


def test_refuses_no_path_and_several_devices(fake_encoder, rerun_recorder):
    with pytest.raises(ValueError, match="encoders is empty"):
        MultiPathManager({}, recorder=rerun_recorder)
    paths = {"image": fake_encoder(), "crops": fake_encoder("meta")}
    with pytest.raises(ValueError, match=r"several devices \(image: cpu, crops: meta\)"):
        MultiPathManager(paths, recorder=rerun_recorder)


def test_refusal_of_a_path_is_its_own(manager, inputs_for):
    with pytest.raises(ValueError, match="crops are no videos"):
        manager.execute(inputs_for(image=[WHOLE], crops=[(2, 8, 8)]))


def test_capture_needs_cuda(paths):
    with pytest.raises(RuntimeError, match="on cpu, and CUDA graphs need a CUDA device"):
        MultiPathManager(paths, CONFIGS).capture()


def test_calls_of_several_threads_do_not_mix(paths, manager, inputs_for):
    failures = []

    def call(seed):
        try:
            for turn in range(10):
                grids = MIXES[(seed + turn) % len(MIXES)]
                inputs = inputs_for(100 * seed + turn, **grids)
                check(paths, manager.execute(inputs), inputs)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_graphs_in_one_pool_on_alternating_streams(fake_encoder, inputs_for):
    paths = {"image": fake_encoder("cuda"), "crops": fake_encoder("cuda")}
    manager = MultiPathManager(paths, CONFIGS)
    manager.capture()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    calls = []
    for turn in range(40):
        grids = MIXES[turn % 4]
        inputs = inputs_for(turn, **grids)
        with torch.cuda.stream(streams[turn % 2]):
            calls.append((inputs, manager.execute(inputs)))
    torch.cuda.synchronize()
    for inputs, results in calls:
        for path, (pixels, grid) in inputs.items():
            expected = paths[path].eager_forward(pixels, grid.tolist())
            for name in NAMES:
                assert torch.equal(results[path][name], expected[name])
    manager.clear()
