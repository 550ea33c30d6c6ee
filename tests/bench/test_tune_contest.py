"""What tuning measures, and that only accurate candidates are timed; with made-up times."""

from types import SimpleNamespace

import pytest
import torch
from vitgraph.bench import tune_contest, tune_library, tune_shapes
from vitgraph.bench.tune_contest import (
    Candidate,
    LinearOperands,
    contest,
    contest_attention,
    contest_linear,
    tile_name,
    worst,
)
from vitgraph.bench.tune_library import algorithm_name
from vitgraph.bench.tune_shapes import (
    AttentionShape,
    LinearShape,
    attention_shapes,
    layers,
    linear_shapes,
    select,
    tower_specs,
)
from vitgraph.kernels import pdl
from vitgraph.kernels.attention_fa4 import Tile
from vitgraph.kernels.attention_hopper import CANDIDATES, usable_configs
from vitgraph.kernels.cublaslt import Algorithm
from vitgraph.kernels.few_rows_tuning import FewRowsConfig, shipped_few_rows
from vitgraph.kernels.gated_linear import gated_linear_ref
from vitgraph.kernels.gemm import hopper_reason
from vitgraph.kernels.gemm_few_rows import partials_ref
from vitgraph.kernels.gemm_tuning import GATED, RESIDUAL, ROTATED, SQUARE, TABLE, WIDE
from vitgraph.kernels.library_linear import library_linear
from vitgraph.kernels.linear import linear_ref

CPU = torch.device("cpu")
SQUARE_NAME, WIDE_NAME = tile_name(SQUARE), tile_name(WIDE)
NAN = float("nan")

# shapes


def test_shapes_are_those_of_the_prepared_weights():
    from vitgraph.bench.towers_config import TOWERS, empty_tower, tower_config
    from vitgraph.encoder import VisionEncoder
    from vitgraph.encoder.families import FAMILIES

    for name in (n for n in TOWERS if n.startswith("tiny-")):
        config = tower_config(name)
        found = layers(FAMILIES[config.family].spec(config.vision_config()))
        weights = VisionEncoder.from_hf(
            empty_tower(config, device="cpu", dtype=torch.float32)
        ).weights
        block = weights.blocks[0]
        matrices = {
            "qkv": block.qkv_weight, "proj": block.proj_weight, "up": block.up_weight,
            "down": block.down_weight,
        }  # fmt: skip
        if weights.final_norm is not None:
            parts, merger = (), None
        elif weights.glm_merger is not None:
            parts, merger = ("join", "proj", "up", "down"), weights.glm_merger
        else:
            parts, merger = ("fc1", "fc2"), weights.merger
        matrices |= {f"merger {part}": getattr(merger, f"{part}_weight") for part in parts}
        if weights.turns is not None:
            matrices["qkv+rope"] = block.qkv_weight
        assert {n: (s.N, s.K) for n, s in found.items()} == {
            n: tuple(w.shape) for n, w in matrices.items()
        }


def test_every_layer_of_every_tower_is_measured_once():
    shapes = linear_shapes()
    keys = [shape.key for shape in shapes]
    assert len(keys) == len(set(keys))
    assert set(TABLE) <= set(keys)
    for tower, spec in tower_specs().items():
        for name, layer in layers(spec).items():
            (shape,) = (s for s in shapes if s.key == layer.key)
            assert name in shape.label
            assert tower in shape.label
            of_images = {"convolution 1": 4, "convolution 2": 16, "projector": 16}
            of_images |= {"projector fc1": 4, "projector fc2": 4}
            group = of_images.get(name, 4 if name.startswith("merger") else 1)
            assert layer.patches_per_row == group
            # two layers of one shape: rows of the one that sees more
            assert shape.patches_per_row == group or ";" in shape.label
            assert shape.patches_per_row <= group
    assert layers(tower_specs()["internvl3-8b"]).keys() == {
        "qkv", "proj", "up", "down", "projector fc1", "projector fc2"
    }  # fmt: skip
    assert layers(tower_specs()["internvl3-8b"])["up"].key == (4096, 1024, "gelu_erf")
    # an MLP of 3,420 is padded
    assert layers(tower_specs()["qwen2.5-vl-7b"])["down"].key == (1280, 3456, RESIDUAL)
    (fc1,) = (s for s in shapes if s.key == (4608, 4608, "gelu_erf"))
    assert fc1.rows([16384, 784, 784, 2]) == (1, 196, 4096)


def test_a_shape_of_two_layers_is_measured_at_the_rows_of_both(monkeypatch):
    spec = tower_specs()["qwen2-vl-7b"]
    same = {
        "a": LinearShape("a", 8, 8, "", 4),
        "b": LinearShape("b", 8, 8, "", 1),
    }
    monkeypatch.setattr(tune_shapes, "layers", lambda spec: same)
    assert linear_shapes({"x": spec, "y": spec}) == [LinearShape("a x y; b x y", 8, 8, "", 1)]


def test_attention_has_every_head_dim_once():
    shapes = attention_shapes()
    assert {shape.head_dim for shape in shapes} == {64, 72, 80, 96, 112, 128}
    kinds = {(shape.heads, shape.head_dim) for shape in shapes}
    assert len({shape.label for shape in shapes}) == len(shapes) == 22 * len(kinds)
    assert [s.lengths for s in select(shapes, ["72 8x784"])] == [(784,) * 8]
    assert select(shapes, []) == shapes
    assert select(shapes, ["nothing"]) == []


# the contest


def made_up(times):
    """A timer that knows the times, and remembers whom it was asked for."""
    asked = []

    def time(works):
        asked.append(list(works))
        for calls in works.values():
            for call in calls:
                call()
        return {name: times.get(name, 1.0) for name in works}

    return time, asked


def test_only_accurate_candidates_are_timed():
    def fail():
        raise RuntimeError("not here\nat all")

    ran = []
    checks = {"good": lambda: 1.9, "bad": lambda: 2.1, "nan": lambda: NAN, "failing": fail}
    candidates = {n: Candidate(c, [lambda n=n: ran.append(n)]) for n, c in checks.items()}
    time, asked = made_up({"good": 7.0})
    outcome = contest(candidates, time)
    assert asked == [["good"]]
    assert ran == ["good"]
    assert outcome.us == {"good": 7.0}
    assert outcome.err_ratio["bad"] == 2.1
    assert outcome.reasons == {
        "bad": "error is 2.1 times plain PyTorch's own",
        "nan": "error is nan times plain PyTorch's own",
        "failing": "RuntimeError: not here",
    }
    assert contest({"bad": candidates["bad"]}, time).us == {}
    assert len(asked) == 1


def test_a_timer_that_fails_leaves_no_times():
    def broken(works):
        raise RuntimeError("no graph")

    outcome = contest({"a": Candidate(lambda: 1.0, [])}, broken)
    assert outcome.us == {}
    assert outcome.reasons == {"a": "RuntimeError: no graph"}


def test_the_worst_ratio_is_nan_if_one_is():
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert worst([]) == 0.0
    for ratios in ([NAN, 1.0], [1.0, NAN, 5.0]):
        assert worst(ratios) != worst(ratios)


SMALL = LinearShape("up tiny", 16, 24, "silu")


@pytest.mark.parametrize("epilogue", ["", "silu", "gelu_erf", RESIDUAL])
def test_a_layer_is_checked_and_timed_by_its_own_operands(epilogue):
    time, asked = made_up({"library": 3.0, SQUARE_NAME: 2.0})
    shape = LinearShape("tiny", 16, 24, epilogue)
    outcome = contest_linear(shape, 20, device=CPU, time=time, dtype=torch.float32)
    assert asked == [["library", SQUARE_NAME, WIDE_NAME]]
    assert outcome.us["library"] == 3.0
    assert outcome.reasons == {}
    assert all(ratio <= 2 for ratio in outcome.err_ratio.values())


def test_a_rotated_product_is_held_against_product_and_pass(monkeypatch):
    right, backends = tune_contest.rotary_linear, []

    def rotary_linear(*args, backend, **options):
        backends.append(backend)
        return right(*args, backend="library", **options)

    monkeypatch.setattr(tune_contest, "rotary_linear", rotary_linear)
    time, asked = made_up({"library": 3.0, SQUARE_NAME: 2.0})
    shape = LinearShape("tiny", 3 * 16 * 8, 24, ROTATED)
    place = {"device": CPU, "time": time, "dtype": torch.float32}
    for rows in (20, 600):
        outcome = contest_linear(shape, rows, **place)
        assert outcome.us == {"library": 3.0, SQUARE_NAME: 2.0}
        assert outcome.reasons == {}
    assert asked == [["library", SQUARE_NAME]] * 2
    assert set(backends) == {"library", "hopper"}

    def unrotated(x, weight, bias, *, rotation, out, live_rows, backend):
        out.copy_(linear_ref(x, weight, bias).view_as(out))

    monkeypatch.setattr(tune_contest, "rotary_linear", unrotated)
    outcome = contest_linear(shape, 100, **place)
    assert set(outcome.reasons) == {"library", SQUARE_NAME}


@pytest.fixture
def few_rows(monkeypatch):
    """The kernel of few rows computed by its definition; whether each call may start early."""
    early = []

    def note():
        early.append(pdl._in_chain.get())

    def linear_partials(x, weight, *, config, live_rows):
        note()
        return partials_ref(x, weight, config.splits)

    def launch(x, weight, bias, out, live_rows, *, config, activation=None, rotation=None):
        note()
        y = linear_ref(x, weight, bias, activation=activation)
        if rotation is not None:
            position, turns = rotation
            angle = 2 * torch.pi * position[:, :2].double() @ turns.double()
            one, other = y.double().view(len(y), -1, 2).unbind(2)
            turned = (
                one * angle.cos() - other * angle.sin(),
                other * angle.cos() + one * angle.sin(),
            )
            y = torch.stack(turned, 2).flatten(1)
        out.copy_(y)

    def gated(x, weight, bias, *, out, live_rows, backend, config=None):
        note()
        assert isinstance(config, FewRowsConfig) == (backend == "few_rows")
        out.copy_(gated_linear_ref(x, weight, bias))

    for name, stand_in in (
        ("linear_partials", linear_partials), ("launch", launch), ("gated_linear", gated),
        ("hopper_reason", lambda device, dtype: None),
    ):  # fmt: skip
        monkeypatch.setattr(tune_contest, name, stand_in)
    return early


@pytest.mark.parametrize("epilogue", ["", "gelu_tanh", GATED, RESIDUAL, ROTATED])
def test_tiles_of_few_rows_take_part_where_rows_are_few(epilogue, few_rows, monkeypatch):
    right, is_rotated = tune_contest.rotary_linear, epilogue == ROTATED

    def on_cpu(*args, backend, **options):
        right(*args, backend="library", **options)

    monkeypatch.setattr(tune_contest, "rotary_linear", on_cpu)
    time, asked = made_up({})
    shape = LinearShape("tiny", 3 * 16 * 8 if is_rotated else 16, 192, epilogue)
    few = [tile_name(tile) for tile in shipped_few_rows(epilogue, 192)]
    assert few
    # angles of their own are as good as fp32, and would be found to differ from others in it
    dtype = torch.bfloat16 if is_rotated else torch.float32
    place = {"device": CPU, "time": time, "dtype": dtype}
    outcome = contest_linear(shape, 1024, **place)
    assert asked[0][0] == "library"
    assert asked[0][-len(few) :] == few
    assert outcome.reasons == {}
    assert few_rows
    assert all(few_rows)
    contest_linear(shape, 1025, **place)
    assert asked[1] == asked[0][: -len(few)]


ONE, OTHER = Algorithm(183, 2, 7), Algorithm(24, 5, 3)


@pytest.mark.parametrize("epilogue", ["", "silu", RESIDUAL])
def test_the_library_takes_part_by_its_choice_and_by_algorithms(epilogue, monkeypatch):
    used = []

    def layer(*operands, algorithm=None, **options):
        used.append(algorithm)
        return library_linear(*operands, **options)

    monkeypatch.setattr(tune_contest, "library_linear", layer)
    monkeypatch.setattr(LinearOperands, "algorithms", lambda operands: [ONE, OTHER])
    time, asked = made_up({})
    shape = LinearShape("tiny", 16, 192, epilogue)
    outcome = contest_linear(shape, 600, device=CPU, time=time, dtype=torch.float32)
    assert asked[0][:3] == ["library", algorithm_name(ONE), algorithm_name(OTHER)]
    assert set(used) == {None, ONE, OTHER}
    assert outcome.reasons == {}


def test_a_gate_has_no_algorithms(monkeypatch):
    monkeypatch.delattr(LinearOperands, "algorithms")
    time, asked = made_up({})
    shape = LinearShape("tiny", 16, 192, GATED)
    contest_linear(shape, 600, device=CPU, time=time, dtype=torch.float32)
    assert asked[0][0] == "library"


def test_all_products_into_the_stream_are_timed_with_its_norm(few_rows, monkeypatch):
    """Parts wait for the norm, so the others have to have it too."""
    right, parts = tune_contest.norm, []

    def norm(stream, *args, partials=None, **options):
        parts.append(partials)
        return right(stream, *args, partials=partials, **options)

    monkeypatch.setattr(tune_contest, "norm", norm)
    counts = {}

    def time(works):
        for name, (work, *_) in works.items():
            parts.clear()
            work()
            counts[name] = [0 if p is None else len(p) for p in parts]
        return dict.fromkeys(works, 1.0)

    shape = LinearShape("tiny", 16, 192, RESIDUAL)
    contest_linear(shape, 20, device=CPU, time=time, dtype=torch.float32)
    few = {tile_name(tile): [tile.splits] for tile in shipped_few_rows(RESIDUAL, 192)}
    assert counts == {"library": [0], SQUARE_NAME: [0], WIDE_NAME: [0], **few}


def test_a_wrong_tile_of_few_rows_gets_no_time(few_rows, monkeypatch):
    monkeypatch.setattr(tune_contest, "launch", lambda *args, **options: None)
    time, asked = made_up({})
    outcome = contest_linear(SMALL, 20, device=CPU, time=time, dtype=torch.float32)
    assert asked == [["library", SQUARE_NAME, WIDE_NAME]]
    assert all("error is nan" in outcome.reasons[n] for n in outcome.reasons)
    assert len(outcome.reasons) == len(shipped_few_rows("silu", 24))


@pytest.mark.parametrize("live_only", [False, True])
def test_a_wrong_tile_gets_no_time(live_only, monkeypatch):
    """Wrong in the last row of all rows, or of fewer live ones."""
    right = tune_contest.gemm

    def wrong(x, weight, bias, *, live_rows, config, out, **options):
        right(x, weight, bias, live_rows=live_rows, config=config, out=out, **options)
        live = int(live_rows)
        if config == WIDE and (live < len(x)) == live_only:
            out[live - 1, 0] += 1

    monkeypatch.setattr(tune_contest, "gemm", wrong)
    monkeypatch.setattr(tune_contest, "_CHECKED_ROWS", 6)
    time, asked = made_up({})
    outcome = contest_linear(SMALL, 20, device=CPU, time=time, dtype=torch.float32)
    assert asked == [["library", SQUARE_NAME]]
    assert "error is" in outcome.reasons[WIDE_NAME]


def test_rows_that_a_tile_does_not_write_show(monkeypatch):
    monkeypatch.setattr(tune_contest, "gemm", lambda *args, **options: None)
    time, asked = made_up({})
    outcome = contest_linear(SMALL, 20, device=CPU, time=time, dtype=torch.float32)
    assert asked == [["library"]]
    assert "error is nan" in outcome.reasons[SQUARE_NAME]


def test_weights_rotate_beyond_l2(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=50)
    )
    cuda = torch.device("cuda", 0)
    count = tune_contest.num_calls_and_weights
    assert count(100, 30, cuda) == (48, 4)
    assert count(100, 1, cuda) == (48, 48)
    assert count(100, 1000, cuda) == (48, 1)
    assert count(16384, 30, cuda) == (10, 4)


def test_attention_against_its_definition(monkeypatch):
    shape = AttentionShape("attention tiny", (5, 3), 2, 16)
    time, asked = made_up({})
    outcome = contest_attention(shape, device=CPU, time=time, dtype=torch.float32)
    assert asked == [["triton"]]
    assert outcome.err_ratio["triton"] <= 2
    ours = tune_contest.varlen_attention_triton
    monkeypatch.setattr(tune_contest, "hopper_attention_reason", lambda *args: None)
    seen = {}  # in order

    def hopper(*operands, tickets, config, **options):
        seen[config] = str(config)
        ours(*operands, **options)

    monkeypatch.setattr(tune_contest, "varlen_attention_hopper", hopper)
    good, bad = Tile(64, 112, True), Tile(128, 128, True)
    monkeypatch.setattr(tune_contest, "usable_tiles", lambda *args: (good, bad))

    def fa4(q, k, v, ends, *, max_seqlen, tile, scale, out):
        assert max_seqlen == 5
        tune_contest.attention_ref(q, k, v, ends, scale=scale, out=out)
        if tile == bad:
            out[-1, -1] += 1

    monkeypatch.setattr(tune_contest, "varlen_attention_fa4", fa4)
    outcome = contest_attention(shape, device=CPU, time=time, dtype=torch.float32)
    assert tuple(seen) == CANDIDATES
    assert len(set(seen.values())) == len(seen)
    assert asked[1] == ["triton", *(f"hopper {name}" for name in seen.values()), "fa4 64x112_rs"]
    assert list(outcome.reasons) == ["fa4 128x128_rs"]


# on a GPU


@pytest.mark.gpu
def test_a_rotated_layer_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        pytest.skip(reason)
    outcome = contest_linear(LinearShape("qkv+rope", 3456, 1152, ROTATED), 1568, device=device)
    assert set(outcome.us) == {"library", SQUARE_NAME}


@pytest.mark.gpu
def test_a_layer_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    outcome = contest_linear(LinearShape("proj", 1152, 1152, RESIDUAL), 3136, device=device)
    assert outcome.us["library"] > 0
    if hopper_reason(device, torch.bfloat16) is None:
        assert outcome.reasons == {}
        algorithms = [name for name in outcome.us if tune_library.algorithm_of(name)]
        assert len(algorithms) == tune_library.MOST_ALGORITHMS
        assert set(outcome.us) == {"library", SQUARE_NAME, WIDE_NAME, *algorithms}
    else:
        assert set(outcome.reasons) == {SQUARE_NAME, WIDE_NAME}


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["", GATED, RESIDUAL])
def test_few_rows_on_a_gpu(epilogue):
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        pytest.skip(reason)
    outcome = contest_linear(LinearShape("layer", 1152, 1152, epilogue), 256, device=device)
    assert {tile_name(tile) for tile in shipped_few_rows(epilogue, 1152)} <= outcome.us.keys()
    assert outcome.reasons == {}


@pytest.mark.gpu
def test_attention_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    outcome = contest_attention(AttentionShape("attention", (784,) * 2, 16, 72), device=device)
    assert outcome.us["triton"] > 0
    has_hopper = tune_contest.hopper_attention_reason(device, 72, torch.bfloat16) is None
    configs = usable_configs(72) if has_hopper else []
    assert [name for name in outcome.us if "hopper" in name] == [f"hopper {c}" for c in configs]
    assert all(us > 0 for us in outcome.us.values())


@pytest.mark.parametrize(("epilogue", "stride"), [(RESIDUAL, 4352), ("", 4304)])
def test_rows_of_down_lie_as_towers_keep_them(epilogue, stride):
    operands = LinearOperands(LinearShape("down", 16, 4304, epilogue), 6, CPU, torch.bfloat16)
    assert {x.stride(0) for x in (*operands.xs, *operands.weights)} == {stride}
