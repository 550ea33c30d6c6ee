"""The search for products: what is tried, by a made-up clock, and what is said of it."""

import json
from dataclasses import replace

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.bench import deferred_contest, products, report
from vitgraph.bench.__main__ import main
from vitgraph.bench.deferred_contest import DeferredOperands
from vitgraph.bench.product_search import (
    Sweep,
    candidate_name,
    candidates,
    deferred_candidates,
    descend,
)
from vitgraph.bench.products import CapturedTower, image_of, row_of, summary
from vitgraph.bench.timing import TimeBudget
from vitgraph.bench.tune_contest import LinearOperands
from vitgraph.bench.tune_shapes import LinearShape, layers, tower_specs
from vitgraph.encoder import VisionEncoder
from vitgraph.kernels import gemm_tuning, library_tuning
from vitgraph.kernels.cublaslt import Algorithm
from vitgraph.kernels.few_rows_tuning import (
    DEFERRED,
    GATED_BLOCKS_N,
    TABLE,
    FewRowsConfig,
    deferred_tiles,
    few_rows_tile,
)
from vitgraph.kernels.gated_linear import gated_linear_ref
from vitgraph.kernels.gemm_few_rows import partials_ref
from vitgraph.kernels.gemm_tuning import (
    GATED,
    RESIDUAL,
    ROTATED,
    SQUARE,
    HopperConfig,
    shipped_tiles,
)
from vitgraph.kernels.gemm_tuning import WIDE as TALL
from vitgraph.kernels.linear import linear_ref
from vitgraph.kernels.tables import tuning

BF16 = torch.bfloat16
ALGORITHM = Algorithm(183, 2, 7)
SMALL = FewRowsConfig(64, 64, 4)
WIDE = FewRowsConfig(64, 128, 4)
PARTS = FewRowsConfig(64, 64, 4, splits=3)

# what is tried

SHAPES = [
    (name, layers(spec)[layer])
    for name, spec in tower_specs().items()
    for layer in products.LAYERS
    if name in ("qwen3-vl-8b", "qwen2.5-vl-7b", "qwen2-vl-7b")
]


@pytest.mark.parametrize("rows", [64, 128, 256, 512])
@pytest.mark.parametrize(
    "shape", [shape for _, shape in SHAPES], ids=[f"{n} {s.label}" for n, s in SHAPES]
)
def test_candidates_can_run(shape, rows):
    tried = candidates(shape, rows, 132, [ALGORITHM])
    assert tried[:2] == [None, ALGORITHM]
    assert len(tried) == len(set(tried))
    assert few_rows_tile(rows, *shape.key) in tried
    assert [t for t in tried if isinstance(t, HopperConfig)] == list(shipped_tiles(shape.epilogue))
    few = [tile for tile in tried if isinstance(tile, FewRowsConfig)]
    assert few
    for tile in few:
        assert tile.block_m in (64, 128)
        assert rows > 64 or tile.block_m == 64
        assert tile.splits == 1 or shape.epilogue == RESIDUAL
        assert tile.splits <= -(-shape.K // 64)
        assert shape.epilogue != GATED or tile.block_n in GATED_BLOCKS_N
        assert tile.num_stages * (tile.block_m + tile.block_n) * 64 * 2 < 227 << 10
    assert {tile.block_m for tile in few} == ({64} if rows == 64 else {64, 128})
    assert candidates(shape, 2048, 132) == [None, *shipped_tiles(shape.epilogue)]


def test_pipelines_leave_room_for_what_is_resident():
    def depths(N, rows, block_m, block_n):
        tried = candidates(LinearShape("", N, 1152, ""), rows, num_sms=132)
        few = [tile for tile in tried if isinstance(tile, FewRowsConfig)]
        return {t.num_stages for t in few if (t.block_m, t.block_n) == (block_m, block_n)}

    # 112 programs: one on each multiprocessor, or one of the next kernel beside it; 8 is shipped
    assert depths(3456, 256, 64, 128) == {9, 8, 4}
    # 216: two at a time, or three
    assert depths(3456, 512, 64, 128) == {4, 3}
    # 140: two at a time would have one stage each, so one after the other
    assert depths(5120, 832, 128, 256) == {4}


def test_k_is_cut_where_tiles_are_few():
    def parts(N, K, rows):
        tried = candidates(LinearShape("", N, K, RESIDUAL), rows, num_sms=132)
        few = [tile for tile in tried if isinstance(tile, FewRowsConfig)]
        return {tile.splits for tile in few if (tile.block_m, tile.block_n) == (64, 64)}

    # 18 tiles for 132 multiprocessors, in 19 steps along K: three steps a part at least
    assert parts(1152, 1216, 64) == {4, 6}
    assert parts(1152, 4304, 256) == {1, 2, 3}
    assert parts(8192, 4304, 256) == {1}


def test_a_product_of_many_waves_is_left_alone():
    shape = LinearShape("", 65536, 1152, "")
    assert candidates(shape, 256, num_sms=132) == [None, SQUARE, TALL]


@pytest.mark.parametrize("rows", [64, 256, 832])
@pytest.mark.parametrize(
    "shape", [s for _, s in SHAPES if s.label == "up"], ids=lambda s: str(s.key)
)
def test_pairs_around_a_norm_can_run(shape, rows):
    tried = deferred_candidates(shape, rows, 132)
    assert tried[0] is None
    assert len(tried) == len(set(tried))
    assert deferred_tiles(rows, *shape.key) in tried
    pairs = tried[1:] if tried[1] is not None else tried[2:]
    assert len(pairs) > 4
    for first, second in pairs:
        assert first.splits == second.splits == 1
        assert shape.epilogue != GATED or second.block_n in GATED_BLOCKS_N
        # a ring, and the tile of the stream or two vectors
        shared = first.num_stages * (first.block_m + first.block_n) * 128
        assert shared + first.block_m * first.block_n * 2 < 227 << 10
        shared = second.num_stages * (second.block_m + second.block_n) * 128
        assert shared + 8 * second.block_n < 227 << 10
    assert deferred_candidates(shape, 2048, 132) == [None]


# the descent


US = {
    ("qkv", None): 30.0, ("qkv", SMALL): 25.0, ("qkv", WIDE): 24.0,
    ("proj", None): 10.0, ("proj", SMALL): 11.0, ("proj", PARTS): 12.0,
}  # fmt: skip


class Clock:
    """A tower whose layers take what a table says; `proj` is faster beside a wide `qkv`."""

    def __init__(self):
        self.asked = []

    def __call__(self, choice):
        self.asked.append(dict(choice))
        if choice["qkv"] == SMALL and choice["proj"] == PARTS:
            raise RuntimeError("does not fit\nand more")
        gain = 4.0 if choice["qkv"] == WIDE and choice["proj"] == PARTS else 0.0
        return sum(US[layer, tile] for layer, tile in choice.items()) - gain


LAYERS = {"qkv": [None, SMALL, WIDE], "proj": [None, SMALL, PARTS]}


def test_one_layer_after_another_takes_its_best():
    clock = Clock()
    logged = []
    sweeps = descend(LAYERS, clock, turns=2, time_budget=TimeBudget(), log=logged.append)
    assert [(s.layer, s.turn, s.chosen) for s in sweeps] == [
        ("qkv", 1, WIDE), ("proj", 1, PARTS), ("qkv", 2, WIDE), ("proj", 2, PARTS),
    ]  # fmt: skip
    assert logged == sweeps
    assert sweeps[0].us == {None: 40.0, SMALL: 35.0, WIDE: 34.0}
    assert sweeps[1].us == {None: 34.0, SMALL: 35.0, PARTS: 32.0}
    # the others stay as they are meanwhile
    assert clock.asked[:2] == [{"qkv": None, "proj": None}, {"qkv": SMALL, "proj": None}]
    assert clock.asked[3] == {"qkv": WIDE, "proj": None}
    assert sweeps[2].reasons == {SMALL: "RuntimeError: does not fit"}


def test_a_layer_without_any_time_stays():
    def fails(choice):
        raise ValueError("no GPU today")

    (sweep,) = descend({"qkv": [None, WIDE]}, fails, turns=1, time_budget=TimeBudget())
    assert sweep.us == {}
    assert sweep.chosen is None
    assert set(sweep.reasons) == {None, WIDE}


class Hurried(TimeBudget):
    """Time for so many turns of a layer."""

    def __init__(self, left):
        super().__init__(1.0)
        self.left = left

    def allows(self, label):
        self.left -= 1
        if self.left < 0:
            self.skipped.append(label)
        return self.left >= 0


def test_without_time_the_rest_is_named():
    budget = Hurried(3)
    sweeps = descend(LAYERS, Clock(), turns=2, time_budget=budget, label="tower 64 rows")
    assert len(sweeps) == 3
    assert budget.skipped == ["tower 64 rows proj turn 2"]


# the tower


@pytest.mark.parametrize(
    ("rows", "grid"), [(256, (1, 16, 16)), (128, (1, 8, 16)), (4, (1, 2, 2)), (28, (1, 2, 14))]
)
def test_one_image_fills_the_rows(rows, grid):
    assert image_of(rows, 2) == grid


@pytest.fixture
def encoder():
    config = towers.tower_config("tiny-qwen2.5-vl")
    hf = towers.empty_tower(config, device="cpu", dtype=torch.bfloat16)
    return VisionEncoder.from_hf(towers.boost_(hf, seed=0))


@pytest.fixture
def tower(encoder, rerun_recorder):
    return CapturedTower(encoder, rerun_recorder, rows=32, images=2, seed=0)


def test_an_image_too_thin_for_its_graph_is_refused(encoder, rerun_recorder):
    for images in (1, 2):
        told = rf"{images} x 2036 patches, 2 x 1018, have {128 * images} windows, .* holds \d+"
        with pytest.raises(ValueError, match=told):
            CapturedTower(encoder, rerun_recorder, rows=2036 * images, images=images, seed=0)


@pytest.fixture
def stand_ins(rerun_recorder, monkeypatch):
    """The kernel by its definition, and a clock that shows what table the tower was run with."""
    seen = []

    def linear_partials(x, weight, *, config, live_rows):
        return partials_ref(x, weight, config.splits)

    def launch(x, weight, bias, out, live_rows, *, activation, config):
        out.copy_(linear_ref(x, weight, bias, activation=activation))

    def gated_linear(x, weight, bias, *, out, live_rows, backend, config):
        assert backend == ("hopper" if isinstance(config, HopperConfig) else "few_rows")
        # `SMALL` stands for a tile that computes something else
        out.copy_(gated_linear_ref(x, weight, bias) * (2 if config == SMALL else 1))

    def gemm(x, weight, bias, *, live_rows, config, out=None, residual=None, activation=None):
        y = linear_ref(x, weight, bias, activation=activation, residual=residual)
        (out if residual is None else residual).copy_(y)

    def record(work, pool):
        seen.append(replace(tuning(torch.device("cpu"))))
        work()

    class Ms:
        ms = 0.25

    monkeypatch.setattr(products, "linear_partials", linear_partials)
    monkeypatch.setattr(products, "launch", launch)
    monkeypatch.setattr(products, "gemm", gemm)
    monkeypatch.setattr(products, "gated_linear", gated_linear)
    monkeypatch.setattr(rerun_recorder, "record", record)
    monkeypatch.setattr(products, "time_graphs", lambda graphs, effort: {"tower": Ms})
    return seen


def test_a_choice_stands_in_for_the_shipped_table(tower, stand_ins):
    keys = {name: shape.key for name, shape in tower.shapes.items()}
    choice = {"qkv": WIDE, "proj": PARTS, "up": None, "down": None}
    assert tower.us(choice) == 250.0
    (tables,) = stand_ins
    assert {layer: [tile for _, tile in tables.few_rows[key]] for layer, key in keys.items()} == {
        "qkv": [WIDE], "proj": [PARTS], "up": [], "down": [],
    }  # fmt: skip
    assert tables.few_rows[(*keys["qkv"][:2], ROTATED)] == ((32, WIDE),)
    assert [tables.table[key] for key in keys.values()] == [()] * 4
    assert [tables.library[keys[layer]] for layer in ("qkv", "proj", "down")] == [()] * 3
    assert_shipped()
    tower.compile({"qkv": [None, WIDE]})
    assert_shipped()


def assert_shipped():
    tables = tuning(torch.device("cpu"))
    assert tables.few_rows is TABLE
    assert tables.deferred is DEFERRED
    assert tables.table is gemm_tuning.TABLE
    assert tables.library is library_tuning.TABLE


def test_algorithms_and_tiles_of_many_rows_stand_in_as_well(tower, stand_ins):
    choice = {"qkv": SQUARE, "proj": ALGORITHM, "up": SQUARE, "down": TALL}
    tower.us(choice)
    (tables,) = stand_ins
    keys = {name: shape.key for name, shape in tower.shapes.items()}
    assert {layer: tables.table[key] for layer, key in keys.items()} == {
        "qkv": ((1, SQUARE),), "proj": (), "up": ((1, SQUARE),), "down": ((1, TALL),),
    }  # fmt: skip
    assert tables.table[(*keys["qkv"][:2], ROTATED)] == ((1, SQUARE),)
    assert tables.library[keys["proj"]] == ((32, ALGORITHM),)
    assert tables.library[keys["down"]] == ()
    assert all(tables.few_rows[key] == () for key in keys.values())
    assert_shipped()
    tower.us({"qkv": TALL})  # with which nothing rotates
    assert stand_ins[1].table[(*keys["qkv"][:2], ROTATED)] == ()
    tower.us({"qkv": ALGORITHM, "up": None})
    assert stand_ins[2].library[keys["qkv"]] == ((32, ALGORITHM),)


def test_a_norm_is_a_kernel_while_layers_are_exchanged(tower, stand_ins):
    key, pair = tower.shapes["up"].key, (SMALL, WIDE)
    for choice in ({"qkv": WIDE}, {products.NORM: None}, {products.NORM: pair}, {}):
        tower.us(choice)
    found = [tables.deferred.get(key) for tables in stand_ins]
    assert found == [(), (), ((32, pair),), None]
    assert_shipped()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("epilogue", ["gelu_tanh", GATED])
def test_a_pair_is_held_against_all_three(kind, epilogue, monkeypatch):
    def operands(N, K, epilogue):
        return LinearOperands(LinearShape("", N, K, epilogue), 48, torch.device("cpu"), BF16)

    first, second = operands(64, 64, RESIDUAL), operands(128, 64, epilogue)
    contest = DeferredOperands(first, second, kind, 1e-6)
    assert 0 < contest.check((SMALL, WIDE)) < 1.5
    add = deferred_contest.add_linear_scaled

    def without_offset(x, weight, stream, norm, offset, **options):
        add(x, weight, stream, norm, None, **options)

    monkeypatch.setattr(deferred_contest, "add_linear_scaled", without_offset)
    assert contest.check((SMALL, WIDE)) > 2


def test_a_gate_has_no_algorithms(tower, monkeypatch):
    assert tower.algorithms("proj") == []  # on a CPU
    monkeypatch.setattr(LinearOperands, "algorithms", lambda operands: [ALGORITHM])
    assert tower.algorithms("proj") == [ALGORITHM]
    assert tower.algorithms("up") == []


def test_layers_that_are_not_exchanged_keep_their_tiles(tower, stand_ins, monkeypatch):
    key = tower.shapes["down"].key
    monkeypatch.setattr(tuning(torch.device("cpu")), "few_rows", {key: ((512, PARTS),)})
    tower.us({"qkv": WIDE})
    (tables,) = stand_ins
    assert tables.few_rows[key] == ((512, PARTS),)
    assert [tile for _, tile in tables.few_rows[tower.shapes["qkv"].key]] == [WIDE]
    # the library is a choice as well
    tower.us({"down": None})
    assert stand_ins[1].few_rows[key] == ()


def test_the_shipped_table_is_back_after_an_error(tower, stand_ins, rerun_recorder, monkeypatch):
    def fails(work, pool):
        raise RuntimeError("no memory")

    monkeypatch.setattr(rerun_recorder, "record", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        tower.us({"qkv": WIDE})
    assert_shipped()


def test_a_wrong_tile_gets_no_time(tower, stand_ins):
    assert tower.us({"up": WIDE}) == 250.0
    with pytest.raises(ValueError, match=r"error is .* times plain PyTorch's own"):
        tower.us({"up": SMALL})
    assert len(stand_ins) == 1


# the command


def measured_rows():
    shape = LinearShape("proj", 1152, 1152, RESIDUAL)
    first = Sweep("proj", 1, {None: 400.0, SMALL: 390.0}, {}, SMALL)
    last = Sweep("proj", 2, {None: 380.0, SMALL: 371.0, PARTS: 360.0}, {WIDE: "too wide"}, PARTS)
    return [row_of("qwen3-vl-8b", 128, 1, 390.0, shape, sweep) for sweep in (first, last)]


def test_the_last_turn_of_a_layer_is_told():
    lines = summary(measured_rows()).splitlines()
    assert len(lines) == 3
    cells = lines[1].split()
    assert cells[:7] == ["qwen3-vl-8b", "128", "rows", "390", "proj", "2", "380"]
    assert lines[1].index("64x64 s4 in 3") < lines[1].index("360") < lines[1].rindex("64x64 s4")
    assert lines[2] == "qwen3-vl-8b 128 rows proj 64x128 s4: too wide"


def test_rows_are_plain_data():
    row = json.loads(json.dumps(measured_rows()[1]))
    assert row["us"] == {"library": 380.0, "64x64 s4": 371.0, "64x64 s4 in 3": 360.0}
    assert FewRowsConfig(**row["config"]) == PARTS
    assert row["chosen"] == candidate_name(PARTS)
    assert (row["N"], row["K"], row["epilogue"]) == (1152, 1152, RESIDUAL)
    assert row["tables_us"] == 390.0


def test_a_row_of_a_norm_names_both_tiles():
    shape = LinearShape("up", 4304, 1152, "gelu_tanh")
    sweep = Sweep(products.NORM, 1, {None: 400.0, (SMALL, WIDE): 390.0}, {}, (SMALL, WIDE))
    row = json.loads(json.dumps(row_of("qwen3-vl-8b", 256, 1, 390.0, shape, sweep)))
    assert row["us"] == {"library": 400.0, "64x64 s4 + 64x128 s4": 390.0}
    assert [FewRowsConfig(**tile) for tile in row["config"]] == [SMALL, WIDE]
    assert "64x64 s4 + 64x128 s4" in summary([row])


def test_bench_products(monkeypatch, tmp_path, capsys):
    asked = []

    def run(towers, rows, *, images, only, turns, seed, time_budget):
        asked.append((towers, rows, images, only, turns, seed))
        assert not Hurried(0).allows("x")
        time_budget.skipped.append("qwen2-vl-7b 128 rows qkv turn 1")
        return measured_rows()

    monkeypatch.setattr(products, "run", run)
    monkeypatch.setattr(report, "_query_gpu", dict)
    monkeypatch.delenv("VITGRAPH_COMMIT", raising=False)
    path = tmp_path / "few.json"
    command = ["products", "--towers", "qwen3-vl-8b", "--rows", "128", "--budget-s", "60"]
    command += ["--turns", "3", "--layers", "up", "qkv", "--images", "2"]
    assert main([*command, "--json", str(path)]) == 0
    assert asked == [(["qwen3-vl-8b"], [128], 2, ["up", "qkv"], 3, 0)]
    content = json.loads(path.read_text())
    assert content["rows"] == measured_rows()
    assert content["meta"]["budget_s"] == 60
    assert content["meta"]["not_run"] == ["qwen2-vl-7b 128 rows qkv turn 1"]
    assert {"gpu", "torch", "date"} <= set(content["meta"])
    out = capsys.readouterr().out
    assert "64x64 s4 in 3" in out
    assert "not run: qwen2-vl-7b 128 rows qkv turn 1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "130", "128"], "rows [130] must be multiples of 4 for each of 1 images"),
        (["--rows", "0"], "rows [0] must be multiples of 4"),
        (["--rows", "128", "132", "--images", "8"], "rows [132] must be multiples of 4 for each"),
        (["--images", "0"], "rows [128, 256] must be multiples of 4 for each of 0 images"),
        (["--turns", "0"], "turns = 0 must be at least 1"),
        (["--layers", "qkv", "fc1"], "layer fc1 is not known; use qkv, proj, up, down or norm2"),
        (["--towers", "gpt"], "tower 'gpt' is not known"),
        (["--budget-s", "0"], "must be more than 0"),
        (
            ["--layers", "up", "norm2"],
            "norm2 has the tiles of proj and up, so it is exchanged alone",
        ),
        ([], "products: measuring needs a CUDA device, and there is none"),
    ],
)
def test_bench_products_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["products", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match="nothing to measure here, as our kernel: it needs"):
        products.run(["qwen3-vl-8b"])


@pytest.mark.gpu
@pytest.mark.slow
def test_one_tower_on_a_gpu(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := products.hopper_reason(device, torch.bfloat16):
        pytest.skip(reason)
    monkeypatch.setattr(products, "candidates", lambda *_: [None, WIDE])
    monkeypatch.setattr(products, "deferred_candidates", lambda *_: [None, (SMALL, WIDE)])
    rows = products.run(["qwen3-vl-2b"], [128], only=["proj", "up"], turns=1)
    rows += products.run(["qwen3-vl-2b"], [128], only=[products.NORM], turns=1)
    assert [row["layer"] for row in rows] == ["proj", "up", products.NORM]
    for row, tried in zip(rows, (WIDE, WIDE, (SMALL, WIDE)), strict=True):
        assert set(row["us"]) == {candidate_name(None), candidate_name(tried)}, summary(rows)
    assert tuning(device).few_rows is not TABLE or tuning(device).path is None
