import pytest
import torch
from vitgraph.kernels.swiglu import swiglu, swiglu_op, swiglu_ref
from vitgraph.kernels.testing import assert_as_accurate

SHAPES = [
    pytest.param(1, 1, id="one"),
    pytest.param(7, 131, id="odd"),
    pytest.param(5, 3424, id="qwen2.5-vl"),
]


def make(device, T, F, dtype):
    g = torch.Generator(device).manual_seed(0)
    return (torch.randn(T, 2 * F, device=device, generator=g) * 2 + 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "F"), SHAPES)
@pytest.mark.parametrize("limit", [None, 1.5])
def test_matches_oracle(T, F, limit, dtype, device):
    gate_up = make(device, T, F, dtype)
    eager, oracle = swiglu_ref(gate_up, limit), swiglu_ref(gate_up.double(), limit)
    assert_as_accurate(swiglu(gate_up, limit=limit), eager, oracle)


def test_limit_bounds_gates_above_and_ups_on_both_sides(device):
    nan = float("nan")
    gate_up = torch.tensor([[9.0, -9.0, 1.0, 1.0, nan, 1.0, 1.0, 1.0, 9.0, -9.0, 1.0, nan]])
    gate, up = torch.tensor([[2.0, -9.0, 1.0, 1.0, nan, 1.0], [1.0, 1.0, 2.0, -2.0, 1.0, nan]])
    got = swiglu(gate_up.to(device), limit=2.0)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(got[0].cpu(), want, equal_nan=True)


@pytest.mark.parametrize("live", [0, 1, 5, 9, 100])
def test_rows_past_the_live_ones_are_untouched(live, device):
    gate_up = make(device, 9, 33, torch.bfloat16)
    num_live = min(live, 9)
    expected = swiglu(gate_up[:num_live])
    gate_up[num_live:] = float("nan")
    out = torch.full((9, 33), 7.0, dtype=torch.bfloat16, device=device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    assert swiglu(gate_up, out, live_rows) is out
    assert torch.equal(out[:num_live], expected)
    assert (out[num_live:] == 7.0).all()


def test_strided_rows(device):
    wide, out = make(device, 6, 40, torch.float32), torch.zeros(6, 64, device=device)
    gate_up = wide[:, 8:40]
    swiglu(gate_up, out[:, 16:32])
    torch.testing.assert_close(out[:, 16:32], swiglu_ref(gate_up))
    assert not out[:, :16].any()
    assert not out[:, 32:].any()


def test_empty(device):
    assert swiglu(torch.zeros(0, 8, device=device)).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5),), r"must be \[T, 2F\]"),
        ((torch.zeros(4, 2).T,), "adjacent elements"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), r"out must be \[2, 2\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 2).half()), "torch.float16"),
        ((torch.zeros(2, 4), None, torch.zeros(1)), "live_rows must be one int32"),
        ((torch.zeros(2, 4), None, None, 0.0), "limit = 0.0 must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*arguments)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    torch.library.opcheck(swiglu_op, (make(device, 3, 8, torch.float32), None), test_utils=check)
