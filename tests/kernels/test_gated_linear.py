from dataclasses import replace

import pytest
import torch
from vitgraph.kernels import gated_linear as module
from vitgraph.kernels.few_rows_tuning import FewRowsConfig, few_rows_tile
from vitgraph.kernels.gated_linear import (
    choose_gated_backend,
    gated_linear,
    gated_linear_op,
    gated_linear_ref,
)
from vitgraph.kernels.gemm_tuning import GATED, SQUARE, TABLE, WIDE, HopperConfig
from vitgraph.kernels.linear import linear
from vitgraph.kernels.testing import assert_as_accurate

FEW = FewRowsConfig(64, 128, num_stages=4)


def operands(device, dtype, T=19, F=24, K=40):
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *s: torch.randn(*s, device=device, generator=g).to(dtype)  # noqa: E731
    return draw(T, K), draw(2 * F, K) / K**0.5, draw(2 * F)


def check(actual, x, weight, bias):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    assert_as_accurate(actual, gated_linear_ref(x, weight, bias), gated_linear_ref(*wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_matches_oracle(has_bias, dtype, device):
    x, weight, bias = operands(device, dtype)
    bias = bias if has_bias else None
    check(gated_linear(x, weight, bias), x, weight, bias)
    out = torch.empty(19, 24, dtype=dtype, device=device)
    scratch = torch.empty(19, 48, dtype=dtype, device=device)
    assert gated_linear(x, weight, bias, out=out, scratch=scratch) is out
    check(out, x, weight, bias)
    assert torch.equal(scratch, linear(x, weight, bias))


def test_gate_and_up_are_not_exchanged(device):
    x = torch.ones(1, 8, device=device)
    weight = torch.cat([torch.full((8, 8), 2.0), torch.full((8, 8), -1.0)]).to(device)
    expected = torch.nn.functional.silu(torch.tensor(16.0)) * -8
    assert torch.allclose(gated_linear(x, weight).cpu(), expected)


def test_rows_past_the_live_ones_are_left_alone(device):
    x, weight, bias = operands(device, torch.float32)
    live = torch.tensor([5], dtype=torch.int32, device=device)
    out = torch.full((19, 24), 7.0, device=device)
    gated_linear(x, weight, bias, out=out, live_rows=live, backend="library")
    assert (out[5:] == 7).all()
    check(out[:5], x[:5], weight, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "not one of"),
        ({"backend": "hopper"}, "cannot run here"),
        ({"config": SQUARE}, "needs backend='hopper'"),
        ({"config": WIDE, "backend": "hopper"}, "no two halves"),
        ({"backend": "few_rows"}, "cannot run here"),
        ({"config": FEW}, "needs backend='few_rows', not 'auto'"),
        ({"config": FEW, "backend": "hopper"}, "needs backend='few_rows'"),
        ({"config": SQUARE, "backend": "few_rows"}, "needs backend='hopper'"),
        ({"config": replace(FEW, block_n=192), "backend": "few_rows"}, "no two halves"),
        ({"config": HopperConfig(128, 384, 3), "backend": "hopper"}, "no two halves"),
        ({"config": replace(FEW, splits=3), "backend": "few_rows"}, "cuts K into 3 parts"),
        ({"weight": torch.zeros(7, 8)}, r"must be \[2F, K\]"),
        ({"weight": torch.zeros(8, 9)}, "must share K"),
        ({"weight": torch.zeros(8)}, r"must be \[2F, K\]"),
        ({"out": torch.zeros(2, 8)}, r"gated_linear: out must be \[2, 4\]"),
        ({"out": torch.zeros(2, 4).half()}, r"gated_linear: out must be .* torch.float32 on cpu"),
        ({"scratch": torch.zeros(2, 4)}, r"out must be \[2, 8\]"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8, 8)} | change
    with pytest.raises(ValueError, match=message):
        gated_linear(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_backend_by_measurement(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "num_sms", lambda device: 132)
    monkeypatch.setattr(module, "hopper_reason", lambda device, dtype: None)
    choose = lambda M, N=6912: choose_gated_backend(M, N, 1280, torch.bfloat16, cuda)  # noqa: E731
    assert (6912, 1280, GATED) in TABLE
    assert choose(257) == ("hopper", SQUARE)
    assert choose(256) == ("few_rows", few_rows_tile(256, 6912, 1280, GATED))
    assert choose(256) != choose(128)
    assert choose(257, N=6840) == choose(256, N=6840) == ("library", None)
    monkeypatch.setattr(module, "hopper_reason", lambda device, dtype: "no")
    assert choose(257) == choose(256) == ("library", None)


@pytest.mark.parametrize(
    ("N", "K", "place", "backend"),
    [
        (6912, 1280, "cuda", "hopper"),
        (6904, 1280, "cuda", "library"),
        (6912, 1276, "cuda", "library"),
        (6912, 1280, "cpu", "library"),
    ],
)
def test_shapes_and_devices_of_the_one_kernel(N, K, place, backend, monkeypatch):
    monkeypatch.setattr(module, "num_sms", lambda device: 132)
    monkeypatch.setattr(module, "hopper_reason", lambda device, dtype: None)
    monkeypatch.setattr(module, "hopper_tile", lambda *_: SQUARE)
    chosen, _ = choose_gated_backend(257, N, K, torch.bfloat16, torch.device(place))
    assert chosen == backend
    monkeypatch.setattr(module, "few_rows_tile", lambda *_: FewRowsConfig(64, 128, 4))
    chosen, _ = choose_gated_backend(257, N, K, torch.bfloat16, torch.device(place))
    assert chosen == backend.replace("hopper", "few_rows")


def test_rows_that_start_anywhere(monkeypatch):
    x, weight, bias = operands("cpu", torch.float32)
    x = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    monkeypatch.setattr(module, "choose_gated_backend", lambda *_: ("hopper", SQUARE))
    check(gated_linear(x, weight, bias), x, weight, bias)
    monkeypatch.setattr(module, "hopper_reason", lambda device, dtype: None)
    with pytest.raises(ValueError, match="rows that start at multiples of 16 bytes"):
        gated_linear(x, weight, bias, backend="hopper")


def test_operator(device):
    x, weight, bias = operands(device, torch.float32)
    live = torch.tensor([5], dtype=torch.int32, device=device)
    y = gated_linear_op(x, weight, bias, live)
    check(y[:5], x[:5], weight, bias)
    assert y[5:].isnan().all()  # not written
    with pytest.raises(ValueError, match="backend='fast'"):
        gated_linear_op(x, weight, bias, backend="fast")


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x, weight, bias = operands(device, torch.float32)
    torch.library.opcheck(gated_linear_op, (x, weight, bias, None), test_utils=check)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("T", "F", "K"), [(1, 3456, 1280), (300, 3456, 1280), (1000, 200, 128), (129, 72, 72)]
)
def test_one_kernel(T, F, K, has_bias, dtype):
    device = torch.device("cuda")
    if reason := module.hopper_reason(device, dtype):
        pytest.skip(reason)
    x, weight, bias = operands(device, dtype, T, F, K)
    bias = bias if has_bias else None
    for live in (T, -(-T // 2), 0):
        out = torch.full((T, F), float("nan"), device=device, dtype=dtype)
        rows = torch.tensor([live], dtype=torch.int32, device=device)
        gated_linear(x, weight, bias, out=out, live_rows=rows, backend="hopper")
        written = min(T, -(-live // SQUARE.block_m) * SQUARE.block_m)
        assert out[written:].isnan().all()
        if live:
            check(out[:live], x[:live], weight, bias)
