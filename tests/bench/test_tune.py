"""The launch table from made-up times: what it names, how it is printed, stored and read."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner
from vitgraph.bench import tune
from vitgraph.bench.__main__ import main
from vitgraph.bench.registry import REGISTRY
from vitgraph.bench.timing import TimeBudget
from vitgraph.bench.tune_contest import Outcome, tile_name
from vitgraph.bench.tune_library import algorithm_literal, algorithm_name, algorithm_of
from vitgraph.bench.tune_shapes import PATCHES, AttentionShape, LinearShape, linear_shapes
from vitgraph.bench.tune_table import (
    few_rows_classes,
    library_classes,
    literal,
    measured_library,
    measured_table,
    row_classes,
    runs,
)
from vitgraph.encoder.cli import app
from vitgraph.kernels import gemm_tuning, tables
from vitgraph.kernels.attention_fa4 import Tile
from vitgraph.kernels.cublaslt import Algorithm
from vitgraph.kernels.few_rows_tuning import FewRowsConfig, few_rows_from_json
from vitgraph.kernels.gemm import hopper_reason
from vitgraph.kernels.gemm_tuning import (
    GATED,
    RESIDUAL,
    SQUARE,
    TABLE,
    WIDE,
    HopperConfig,
    table_from_json,
)
from vitgraph.kernels.library_tuning import library_from_json
from vitgraph.kernels.tuning_cache import read_tuning

SQUARE_NAME, WIDE_NAME = tile_name(SQUARE), tile_name(WIDE)
TILES = {SQUARE_NAME: SQUARE, WIDE_NAME: WIDE}
GPU = "NVIDIA Imaginary"


def us(library, square, wide):
    return {"library": library, SQUARE_NAME: square, WIDE_NAME: wide}


# what the table says of made-up times


def test_a_tile_is_named_from_the_first_m_on_at_which_it_is_faster():
    times = {
        100: us(9.0, 10.0, 12.0),
        200: us(10.0, 9.5, 11.0),
        300: us(20.0, 12.0, 11.0),
        400: us(30.0, 12.0, 11.0),
        500: us(40.0, 39.0, 41.0),
    }
    assert row_classes(times, TILES) == ((200, SQUARE), (300, WIDE), (500, SQUARE))


def test_a_class_goes_on_while_its_choice_is_as_fast_as_can_be_told():
    times = {100: us(10.0, 9.0, 9.05), 200: us(10.0, 9.08, 9.0), 300: us(9.0, 9.08, 9.2)}
    assert row_classes(times, TILES) == ((100, SQUARE),)
    times[300] = us(9.0, 9.2, 9.05)
    assert row_classes(times, TILES) == ((100, WIDE),)
    times[300] = us(8.9, 9.1, 9.05)
    assert row_classes(times, TILES) == ((100, WIDE), (300, None))
    assert runs({1: {"a": 1.0, "b": 1.0}, 2: {"a": 1.0}, 3: {"b": 1.0}}) == [
        (1, 2, "a"),
        (3, 3, "b"),
    ]
    assert runs({}) == []


ONE, OTHER = Algorithm(183, 2, 7), Algorithm(24, 5, 3, kind=21, splits=2)


def lib(own, **algorithms):
    return {"library": own} | {algorithm_name(globals()[n]): us for n, us in algorithms.items()}


def test_the_library_counts_by_its_fastest_algorithm():
    times = {100: {**us(9.0, 8.0, 9.0), **lib(9.0, ONE=7.5)}, 200: us(9.0, 8.0, 9.0)}
    assert row_classes(times, TILES) == ((200, SQUARE),)


def test_an_algorithm_is_named_up_to_the_last_m_at_which_it_is_the_fastest():
    times = {
        100: lib(5.0, ONE=4.0),
        200: lib(5.0, ONE=4.0, OTHER=4.5) | {SQUARE_NAME: 1.0},
        300: lib(5.0, ONE=5.5, OTHER=4.0),
        400: lib(5.0),
    }
    assert library_classes(times) == ((200, ONE), (300, OTHER))
    assert library_classes({500: lib(1.0, ONE=2.0)}) == ()
    times[50] = lib(3.0, ONE=4.0)
    assert library_classes(times) == ((50, None), (200, ONE), (300, OTHER))


def test_algorithms_go_as_far_up_as_the_library_does():
    shape = LinearShape("qkv", 8, 8, "")
    rows = [row(shape, M, {**us(9.0, own, 12.0), **lib(9.0, ONE=8.0)}) for M, own in TIMES]
    table = measured_table(rows, [shape], [M for M, _ in TIMES])
    assert table == {shape.key: ((10, SQUARE), (20, None), (40, SQUARE))}
    assert measured_library(rows, [shape], table) == {shape.key: ((30, ONE),)}
    assert measured_library(rows, [shape], {}) == {}
    # the library's own choice everywhere is a finding too
    own = [row(shape, 10, us(8.0, 9.0, 9.0))]
    assert measured_library(own, [shape], {shape.key: ()}) == {shape.key: ()}


TIMES = ((10, 7.0), (20, 9.0), (30, 9.0), (40, 7.0))


def test_a_product_before_a_pass_goes_by_the_one_without_it():
    plain, passed = LinearShape("fc2", 8, 8, ""), LinearShape("fc1", 8, 8, "gelu_erf")
    gate = LinearShape("gate", 16, 8, GATED)
    rows = [row(passed, 10, lib(9.0, ONE=8.0)), row(gate, 10, lib(9.0, ONE=8.0))]
    table = {shape.key: () for shape in (passed, plain, gate)}
    assert measured_library(rows, [passed, gate], table) == {plain.key: ((10, ONE),)}
    rows.append(row(plain, 10, lib(9.0, OTHER=8.0)))
    assert measured_library(rows, [passed, gate, plain], table) == {plain.key: ((10, OTHER),)}


def test_names_of_algorithms_lead_back_to_them():
    for algorithm in (ONE, OTHER):
        assert algorithm_of(algorithm_name(algorithm)) == algorithm
        assert eval(algorithm_literal(algorithm)) == algorithm
    assert algorithm_name(ONE) == "library tile=183 custom=2 cluster=7"
    assert [algorithm_of(name) for name in ("library", SQUARE_NAME, "few 64x64s6p3")] == [None] * 3


def test_the_library_is_charged_for_rows_that_are_not_live():
    assert row_classes({4096: us(9.0, 9.3, 9.5)}, TILES) == ((4096, SQUARE),)
    assert row_classes({4096: us(9.0, 9.5, 9.5)}, TILES) == ()
    assert row_classes({3840: us(9.0, 9.3, 9.5)}, TILES) == ()  # too few to fill a tile


def test_the_library_comes_back_where_it_is_faster_again():
    times = {200: us(9.0, 8.0, 9.0), 300: us(9.0, 10.0, 11.0), 100: us(9.0, 8.5, 10.0)}
    assert row_classes(times, TILES) == ((100, SQUARE), (300, None))
    assert row_classes({100: us(9.0, 10.0, 10.0)}, TILES) == ()
    assert row_classes({100: {"library": 1.0}}, TILES) == ()
    assert row_classes({100: us(1.0, 1.0, 1.0)}, {}) == ()


def test_a_tile_that_failed_at_one_m_is_named_at_none():
    times = {100: us(9.0, 8.0, 7.0), 200: {"library": 9.0, SQUARE_NAME: 8.5}}
    assert row_classes(times, TILES) == ((100, SQUARE),)


FEW = FewRowsConfig(64, 64, num_stages=6)
FEW_PARTS = FewRowsConfig(64, 64, num_stages=6, splits=3)
FEW_TILES = {tile_name(FEW): FEW, tile_name(FEW_PARTS): FEW_PARTS}


def few_us(library, few, parts):
    return {"library": library, SQUARE_NAME: 5.0, tile_name(FEW): few, tile_name(FEW_PARTS): parts}


def test_few_rows_take_their_own_tiles_as_far_as_those_are_the_fastest():
    times = {
        32: few_us(3.0, 2.0, 2.5),
        64: few_us(3.0, 2.0, 2.5),
        128: few_us(1.0, 2.0, 2.5),
        256: few_us(3.0, 2.0, 1.5),
        512: few_us(6.0, 5.5, 5.5),
        832: few_us(6.0, 4.5, 4.8),
        1280: few_us(6.0, 1.0, 1.0),  # too many to be tried
    }
    classes = ((64, FEW), (128, None), (256, FEW_PARTS), (512, None), (832, FEW))
    assert few_rows_classes(times, FEW_TILES) == classes
    assert few_rows_classes({128: us(1.0, 2.0, 3.0)}, FEW_TILES) == ()
    assert few_rows_classes({}, FEW_TILES) == ()


def row(shape, M, times):
    key = {"N": shape.N, "K": shape.K, "epilogue": shape.epilogue}
    return {"kind": "linear", "label": shape.label, "M": M, **key, "us": times}


def test_only_shapes_measured_in_full_get_an_entry():
    full, part, failed = (LinearShape(f"{n}", n, 8, "") for n in (8, 16, 24))
    rows = [row(full, 10, us(2, 1, 3)), row(full, 20, us(1, 2, 3)), row(part, 10, us(2, 1, 3))]
    rows += [row(failed, 10, {}), row(failed, 20, us(2, 1, 3))]
    table = measured_table(rows, [full, part, failed], [20, 10])
    assert table == {(8, 8, ""): ((10, SQUARE), (20, None))}


def test_a_tile_that_the_epilogue_cannot_have_is_never_named():
    shape = LinearShape("gate", 8, 8, GATED)
    table = measured_table([row(shape, 10, us(9, 2, 1))], [shape], [10])
    assert table == {(8, 8, GATED): ((10, SQUARE),)}


def evaluated(text):
    body = text.partition(" = ")[2]
    names = {name: value for name, value in vars(gemm_tuning).items() if name.isupper()}
    return eval(body, {**names, "HopperConfig": HopperConfig, "Algorithm": Algorithm})


def both(text):
    ours, library = text.strip().split("\n\n")
    return evaluated(ours), evaluated(library)


def test_the_literal_is_the_table():
    table = {
        **TABLE,
        (8, 16, RESIDUAL): (),
        (8, 24, "silu"): ((1, SQUARE), (2, None), (3, HopperConfig(64, 64, 2))),
    }
    text = literal(table, {(8, 16, RESIDUAL): "proj tiny"}, "NVIDIA Imaginary, 2026-01-01")
    assert evaluated(text) == table
    lines = text.splitlines()
    assert lines[0] == "# NVIDIA Imaginary, 2026-01-01"
    assert lines[lines.index("    (8, 16, RESIDUAL): (),") - 1] == "    # proj tiny"
    assert max(map(len, lines)) <= 100
    labels = {shape.key: shape.label for shape in linear_shapes()}
    lines = literal(dict.fromkeys(labels, ()), labels, "note").splitlines()
    assert max(map(len, lines)) <= 100
    told = " ".join(line.removeprefix("    # ") for line in lines if line.startswith("    # "))
    assert told == " ".join(labels.values())


# a run


def outcome_of(times):
    return Outcome(times, dict.fromkeys(times, 1.0), {})


class Hurried(TimeBudget):
    """Time for so many shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.left = shapes

    def allows(self, label):
        self.left -= 1
        return self.left >= 0


def run(shapes, attentions=(), budget=None):
    asked, log = [], []

    def measure_linear(shape, M):
        asked.append((shape.N, M))
        return outcome_of(us(10.0, 9.0 if M >= 100 else 11.0, 12.0))

    def measure_attention(shape):
        asked.append(shape.label)
        return outcome_of({"triton": 5.0, "fa4 64x112_rs": 4.0}), "triton"

    result = tune.run(
        shapes, attentions, [40, 400],
        measure_linear=measure_linear, measure_attention=measure_attention,
        time_budget=budget, log=log.append,
    )  # fmt: skip
    return result, asked, log


BLOCK, MERGER = LinearShape("qkv tiny", 8, 8, ""), LinearShape("fc1 tiny", 16, 16, "gelu_erf", 4)
FRAMES = AttentionShape("attention 2x16 2x9", (9, 9), 2, 16)


def test_a_run_measures_every_shape_at_its_rows():
    result, asked, log = run([BLOCK, MERGER], [FRAMES])
    assert asked == [(8, 40), (8, 400), (16, 10), (16, 100), FRAMES.label]
    assert result.table == {BLOCK.key: ((400, SQUARE),), MERGER.key: ((100, SQUARE),)}
    assert result.unmeasured == []
    assert len(log) == len(result.rows) == 5
    text = tune.summary(result)
    assert "8x8 bias" in text
    line = next(line for line in text.splitlines() if line.startswith(FRAMES.label))
    assert line.split()[-3:] == ["fa4", "64x112_rs", "triton"]
    assert both(tune.printed_table(result)) == (result.table, result.library)


def test_without_time_the_rest_is_left_out_and_named():
    result, asked, _ = run([BLOCK, MERGER], [FRAMES], Hurried(1))
    assert asked == [(8, 40), (8, 400)]
    assert list(result.table) == [BLOCK.key]
    assert result.unmeasured == [MERGER.label, FRAMES.label]
    assert f"not measured in full: {MERGER.label}" in tune.summary(result)


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITGRAPH_COMMIT", raising=False)
    return tmp_path / "cache"


def test_tiles_of_few_rows_are_stored_beside_the_others(user_cache):
    proj, down = (LinearShape(name, 64, K, RESIDUAL) for name, K in (("proj", 64), ("down", 192)))
    times = few_us(3.0, 2.0, 1.0)

    def measure(shape, M):
        return outcome_of(times if M <= 256 else us(9.0, 8.0, 9.0))

    result = tune.run([proj, down], [], [256, 1568], measure_linear=measure, measure_attention=None)
    assert result.table == {s.key: ((1568, SQUARE),) for s in (proj, down)}
    # 64 columns have no three parts
    assert result.few_rows == {proj.key: (), down.key: ((256, FEW_PARTS),)}
    content = json.loads(tune.store(result, GPU).read_text())
    assert few_rows_from_json(content["few_rows"]) == result.few_rows
    assert few_rows_from_json(tune.settings(result, [256])["few_rows"]) == result.few_rows


def test_algorithms_of_the_library_are_stored_beside_the_tiles(user_cache):
    def measure(shape, M):
        tiles = us(9.0, 8.0 if M > 300 else 9.0, 9.0)
        return outcome_of({**tiles, **lib(9.0, ONE=8.5, OTHER=8.7)})

    shape = LinearShape("qkv", 64, 64, "")
    result = tune.run([shape], [], [256, 512], measure_linear=measure, measure_attention=None)
    assert result.table == {shape.key: ((512, SQUARE),)}
    assert result.library == {shape.key: ((256, ONE),)}
    content = json.loads(tune.store(result, GPU).read_text())
    assert library_from_json(content["library"]) == result.library
    assert library_from_json(tune.settings(result, [256])["library"]) == result.library
    assert both(tune.printed_table(result)) == (result.table, result.library)
    head, first, *_ = (line.split() for line in tune.summary(result).splitlines())
    assert first[first.index("256") :][:5] == ["256", "9", "9", "9", "8.5"]
    columns = ["library", SQUARE_NAME, WIDE_NAME, "its algorithms"]
    assert " ".join(head) == f"linear M {' us '.join(columns)} us fastest"


def test_the_table_is_stored_for_this_gpu(user_cache):
    result, *_ = run([BLOCK, MERGER])
    path = tune.store(result, GPU)
    assert path.is_relative_to(user_cache)
    content = read_tuning(GPU)
    assert content is not None
    assert table_from_json(content["gemm"]) == result.table
    assert content["conditions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="none of 2 shapes was measured in full"):
        tune.store(run([BLOCK, MERGER], budget=Hurried(0))[0], GPU)


# the commands


@pytest.fixture
def imaginary_gpu(monkeypatch, user_cache):
    """A GPU for everything that only asks for one; measurements have made-up times."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tune, "hopper_reason", lambda device, dtype: None)
    made = {"gpu": GPU, "torch": "2", "cuda": "13", "date": "2026-01-01T00"}
    monkeypatch.setattr(tune, "conditions", lambda made_of=None: made)
    measured = []

    def linear(shape, M, *, device):
        measured.append((shape, M))
        return outcome_of(us(10.0, 9.0, 8.0))

    monkeypatch.setattr(tune, "contest_linear", linear)
    monkeypatch.setattr(
        tune, "contest_attention", lambda shape, *, device: outcome_of({"triton": 1.0})
    )
    monkeypatch.setattr(tune, "choose_backend", lambda *args: "triton")
    return measured


@pytest.mark.parametrize(
    ("backend", "tiles", "taken"),
    [
        ("hopper", (Tile(192, 144, False),), "hopper 128/64x5 by 1"),
        ("triton", (), "triton"),
        ("fa4", (Tile(192, 144, False),), "fa4 192x144"),
        ("fa4", (), None),  # no tile can be asked for
    ],
)
def test_what_the_rules_take(monkeypatch, backend, tiles, taken):
    asked = []
    monkeypatch.setattr(tune, "choose_backend", lambda *args: asked.append(args) or backend)
    monkeypatch.setattr(tune, "usable_tiles", lambda device, head_dim: tiles)
    monkeypatch.setattr(tune, "num_sms", lambda device: 132)
    shape = AttentionShape("a", (3000, 1000), 16, 72)
    assert tune._by_rule(shape, torch.device("cpu")) == taken
    assert asked == [(torch.device("cpu"), torch.bfloat16, 72)]


def test_bench_tune(imaginary_gpu, tmp_path, capsys, monkeypatch):
    from vitgraph.bench import report

    monkeypatch.setattr(report, "_query_gpu", dict)
    path = tmp_path / "tune.json"
    command = ["tune", "--rows", "3136", "784", "--json", str(path), "--shapes"]
    assert main([*command, "qkv qwen3-vl-2b", "attention 16x72"]) == 0
    assert [M for _, M in imaginary_gpu] == [784, 3136]
    content = json.loads(path.read_text())
    assert content["meta"]["patches"] == [3136, 784]
    assert content["meta"]["gpu"] == GPU
    assert table_from_json(content["meta"]["table"]) == {(3072, 1024, ""): ((784, WIDE),)}
    assert [r["kind"] for r in content["rows"]] == ["linear"] * 2 + ["attention"] * 22
    assert "3072x1024 bias" in capsys.readouterr().out
    assert main([*command, "qkv qwen3-vl-2b", "--print"]) == 0
    assert both(capsys.readouterr().out) == (
        {(3072, 1024, ""): ((784, WIDE),)},
        {(3072, 1024, ""): ()},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "rows [0] must be at least 1"),
        (["--shapes", "gpt"], "no shape has gpt in its label; labels: qkv qwen3-vl-2b"),
        (["--budget-s", "0"], "must be more than 0"),
        ([], "needs a CUDA device, and there is none"),
    ],
)
def test_bench_tune_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_vitgraph_tune_stores_what_the_kernels_read(imaginary_gpu, monkeypatch):
    monkeypatch.delattr(tune, "contest_attention")  # nothing of it would be stored
    tables._tuning_of_device.cache_clear()
    tables._tuning_of_gpu.cache_clear()
    try:
        result = CliRunner().invoke(app, ["tune", "--shapes", "qwen3-vl-8b", "--shapes", "16x72"])
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith(": 7 layers\n")
        assert {M for s, M in imaginary_gpu if s.patches_per_row == 1} == set(PATCHES)
        active = tables.tuning(torch.device("cuda"))
        assert str(active.path) in result.stdout
        assert active.table[3456, 1152, ""] == ((128, WIDE),)
        assert active.table[4608, 4608, "gelu_erf"] == ((32, WIDE),)
        assert active.table[3840, 1280, ""] == TABLE[3840, 1280, ""]
    finally:
        tables._tuning_of_device.cache_clear()
        tables._tuning_of_gpu.cache_clear()


def test_vitgraph_tune_refuses_where_there_is_no_choice(imaginary_gpu, monkeypatch):
    monkeypatch.setattr(tune, "hopper_reason", lambda device, dtype: "it needs 9.0")
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert "the library is the only choice here, as our kernel: it needs 9.0" in result.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CliRunner().invoke(app, ["tune"]).exit_code == 2
    assert imaginary_gpu == []


def test_kernel_bench_knows_every_backend_of_a_linear_layer():
    for case in ("linear", "linear_residual"):
        assert {"library", "triton", "hopper", "auto"} <= set(REGISTRY[case].providers)
    for case in ("linear", "gated_linear"):
        assert {"library", "hopper", "few_rows", "auto"} <= set(REGISTRY[case].providers)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, bias = draw(6, 24), draw(16, 24), draw(16)
    auto = REGISTRY["linear"].providers["auto"](x, weight, bias, "silu")
    torch.testing.assert_close(auto, REGISTRY["linear"].reference(x, weight, bias, "silu"))
    for case, arguments in (
        ("linear", (x, weight, bias, "silu")),
        ("linear_residual", (draw(6, 16), x, weight)),
    ):
        with pytest.raises(ValueError, match="backend='hopper' cannot run here"):
            REGISTRY[case].providers["hopper"](*arguments)


# on a GPU


@pytest.mark.gpu
@pytest.mark.slow
def test_tune_and_use_on_a_gpu(user_cache):
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        pytest.skip(reason)
    path, result = tune.tune_this_gpu(["merger fc2 qwen2-vl-2b"], log=sys.stderr.write)
    assert list(result.table) == [(1536, 5120, "")]
    assert path.is_file()
    tables._tuning_of_device.cache_clear()
    tables._tuning_of_gpu.cache_clear()
    try:
        assert tables.tuning(device).table[1536, 5120, ""] == result.table[1536, 5120, ""]
    finally:
        tables._tuning_of_device.cache_clear()
        tables._tuning_of_gpu.cache_clear()
