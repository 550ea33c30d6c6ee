"""Scales known before their values: that they bound them, and what they cost in accuracy."""

import pytest
import torch
from vitgraph.kernels.activation import activation_ref
from vitgraph.kernels.aligned_rows import aligned_rows
from vitgraph.kernels.bounded_fp8 import (
    EXPONENTS,
    bound_norms,
    quantize_bounded,
    quantize_bounded_ref,
    value_factors,
)
from vitgraph.kernels.linear_fp8 import linear_fp8
from vitgraph.kernels.quantize import (
    FP8,
    FP8_MAX,
    Bounds,
    bound_ref,
    dequantize,
    quantize_ref,
)
from vitgraph.kernels.testing import rel_rms

ACTIVATIONS = [None, "gelu_tanh", "gelu_erf", "quick_gelu", "silu"]
NAN = float("nan")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Product:
    """x and weight as quantised, with the bounds of f(x @ weight.T + bias)."""

    def __init__(self, x, weight, bias, activation):
        self.activation = activation
        self.x, self.x_scale = quantize_ref(x)
        self.weight, self.w_scale = quantize_ref(weight)
        self.bias = bias
        self.norms = bound_norms(self.weight, self.w_scale, bias)
        self.bound = bound_ref(x, Bounds(self.x_scale, self.norms))

    def exact(self):
        x, weight = dequantize(self.x, self.x_scale), dequantize(self.weight, self.w_scale)
        y = x.double() @ weight.double().t()
        y = y if self.bias is None else y + self.bias.double()
        return y if self.activation is None else activation_ref(y, self.activation)

    def scaled(self):
        """What the exact result is in units of its bound: at most 448."""
        return self.exact() / self.bound.double()[:, None]

    def quantized(self):
        out = aligned_rows(self.x, len(self.x), len(self.weight), dtype=FP8)
        return linear_fp8(
            self.x, self.x_scale, self.weight, self.w_scale, self.bias,
            transform=self.activation, bound=self.bound, out=out,
        )  # fmt: skip


def check_bounded(product):
    # sums in fp32 of what is bounded exactly
    assert product.scaled().abs().max() <= FP8_MAX * (1 + 1e-5)
    assert product.quantized().float().isfinite().all()


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_hold_at_any_scale(activation, has_bias):
    for seed in range(12):
        x = draw(24, 48, seed=seed) * torch.logspace(-6, 6, 24)[:, None]
        weight = draw(64, 48, seed=seed + 100) * torch.logspace(-4, 4, 64).roll(seed)[:, None]
        bias = draw(64, seed=seed + 200) * torch.logspace(5, -5, 64) if has_bias else None
        x[3], weight[5], weight[40] = 0, 0, 0
        check_bounded(Product(x, weight, bias, activation))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_hold_and_are_nearly_met_by_rows_along_those_of_the_weight(activation, sign):
    weight = draw(16, 48, seed=1)
    weight /= weight.norm(dim=1, keepdim=True)
    product = Product(1e4 * sign * weight, weight, None, activation)
    check_bounded(product)
    met = product.scaled().diagonal()
    # quantised rows are up to 7 per cent shorter than the slope of the bound takes them to be, and
    # none is longer than the largest
    if activation is None or sign > 0:
        assert (met * sign > 0.88 * FP8_MAX).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_hold_where_the_bias_is_all_there_is(activation):
    """Rows of zeros, columns of zeros, and biases that are far over the products."""
    x, weight = draw(4, 32, seed=1), draw(32, 32, seed=2)
    x[:2] = 0
    weight[::2] = 0
    product = Product(x, weight, torch.full((32,), 1e6), activation)
    check_bounded(product)
    # met where nothing is added to the bias
    assert (product.scaled()[:2] > 0.999 * FP8_MAX).all()


def test_bounds_hold_where_product_and_bias_are_of_one_size():
    """Neither |x| |w| nor |b| alone would do."""
    weight = draw(16, 48, seed=1)
    weight /= weight.norm(dim=1, keepdim=True)
    product = Product(weight, weight, torch.ones(16), None)
    check_bounded(product)
    assert product.scaled().diagonal().min() > 0.94 * FP8_MAX


def test_norms_are_the_largest():
    weight, scale = quantize_ref(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [3.0, 4.0]]))
    bias = torch.tensor([1.0, -7.0, -2.0, 0.5], dtype=torch.bfloat16)
    lengths = dequantize(weight, scale).norm(dim=1)
    norms = bound_norms(weight, scale, bias)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms * FP8_MAX, torch.tensor([lengths[2], 7.0]))
    without = bound_norms(weight, scale, None) * FP8_MAX
    torch.testing.assert_close(without[0], lengths[2])
    assert 0 < without[1] < 1e-20


@pytest.mark.parametrize("bias", [None, 0.0, 1e-20, 1e-40], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_as_finite_as_something(activation, bias):
    """Rows of zeros, as padding is, and weights of zeros: bounds stay above zero."""
    x, weight = draw(4, 32, seed=1), draw(32, 32, seed=2)
    x[2:] = 0
    biases = None if bias is None else torch.full((32,), bias)
    for factor in (1, 0):
        product = Product(x, weight * factor, biases, activation)
        assert (product.bound > 0).all()
        assert (1 / product.bound).isfinite().all()
        check_bounded(product)
        if not bias:
            zeros = product.quantized().float()[2 if factor else 0 :]
            assert (zeros == 0).all()


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so_through_both_products_and_in_its_row(activation, bad):
    x, weight = draw(5, 32, seed=1), draw(64, 32, seed=2)
    clean = Product(x.clone(), weight, None, activation)
    x[2, 7] = bad
    product = Product(x, weight, None, activation)
    hidden, want = product.quantized(), clean.quantized()
    w, ws = quantize_ref(draw(16, hidden.shape[1], seed=3))
    out = linear_fp8(hidden, product.bound, w, ws, out=torch.empty(5, 16))
    rest = [0, 1, 3, 4]
    assert torch.equal(hidden.view(torch.uint8)[rest], want.view(torch.uint8)[rest])
    assert out[rest].isfinite().all()
    assert not out[2].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_those_of_three_bits(activation):
    product = Product(draw(40, 160, seed=1), draw(96, 160, seed=2), draw(96, seed=3), activation)
    exact, step = product.exact(), product.bound[:, None]
    got = product.quantized().double() * step
    # half a step is 2**-4 of a value at most, and below 2**-6 it is 2**-10
    limit = torch.maximum(exact.abs() * 2**-4, step.double() * 2**-10)
    assert ((got - exact).abs() <= limit * 1.001).all()


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_next_product_is_that_of_the_values(activation, has_bias):
    """What it reads are quantised rows, and bounds as their scales."""
    bias = draw(96, seed=3) if has_bias else None
    product = Product(draw(40, 160, seed=1), draw(96, 160, seed=2), bias, activation)
    hidden = product.quantized()
    weight = draw(32, hidden.shape[1], seed=4)
    w, ws = quantize_ref(weight)
    out = linear_fp8(hidden, product.bound, w, ws, out=torch.empty(40, 32))
    rows = dequantize(hidden, product.bound).double()
    assert rel_rms(out, rows @ dequantize(w, ws).double().t()) < 1e-6
    # of the weight as it was: three bits of either operand, which are 2**-5 or so in the mean
    assert rel_rms(out, product.exact() @ weight.double().t()) < 0.06


def spread(kind, x, weight):
    """x and weight with unlike rows or columns, as trained towers have them."""
    if kind == "row":
        weight[3] *= 30
    elif kind == "rows":
        weight *= torch.exp(0.5 * draw(len(weight), seed=6))[:, None]
    elif kind == "column":
        x[:, 7], weight[:, 7] = x[:, 7] * 100, weight[:, 7] / 100
    return x, weight


@pytest.mark.parametrize("kind", ["alike", "row", "rows", "column"])
@pytest.mark.parametrize(("K", "F"), [(256, 512), (1152, 768)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_about_that_of_scaling_by_the_largest_value(activation, K, F, kind):
    x, first = spread(kind, draw(48, K, seed=1), draw(F, K, seed=2) * K**-0.5)
    product = Product(x, first, 0.3 * draw(F, seed=3), activation)
    exact, weight = product.exact(), draw(96, F, seed=4) * F**-0.5
    want = exact @ weight.double().t()
    w, ws = quantize_ref(weight)
    bounded = linear_fp8(product.quantized(), product.bound, w, ws, out=torch.empty(48, 96))
    by_largest = linear_fp8(
        *quantize_ref(exact.float()), *quantize_ref(weight), out=torch.empty(48, 96)
    )
    assert rel_rms(bounded, want) < 1.3 * rel_rms(by_largest, want)


def test_how_wide_the_bound_is_and_why_gates_have_none():
    """The figures of docs/fp8.md, at the widths of Qwen2.5-VL."""
    K, F = 1280, 3456
    x, gate, up, weight = (
        draw(T, width, seed=i) * width**-0.5
        for i, (T, width) in enumerate(((48, K), (F, K), (F, K), (96, F)))
    )
    x *= K**0.5

    def width_and_errors(gate, up):
        products = Product(x, gate, None, "silu"), Product(x, up, None, None)
        y = products[0].exact() * products[1].exact()
        bound = products[0].bound * products[1].bound * FP8_MAX  # each is over 448
        w, ws = quantize_ref(weight)
        want = y @ weight.double().t()
        errors = [
            rel_rms(linear_fp8(q, scale, w, ws, out=torch.empty(48, 96)), want)
            for q, scale in ((quantize_bounded_ref(y, bound), bound), quantize_ref(y.float()))
        ]
        return (FP8_MAX * bound / y.abs().amax(1)).median(), errors

    alone = Product(x, gate, None, "gelu_erf")
    assert 10 < (FP8_MAX / alone.scaled().abs().amax(1)).median() < 14
    wide, (bounded, by_largest) = width_and_errors(gate, up)
    assert 220 < wide < 300
    assert bounded < 1.1 * by_largest
    gate[3], up[7] = gate[3] * 8, up[7] * 8
    wide, (bounded, by_largest) = width_and_errors(gate, up)
    assert wide > 5000
    assert 0.15 < bounded < 0.25
    assert by_largest < 0.045


# the kernel


def steps(q, want):
    """Signed distances between fp8 values, in steps of that format."""

    def place(values):
        bits = values.view(torch.uint8).int()
        return torch.where(bits > 127, 128 - bits, bits)  # -0 and 0 are one

    return place(q) - place(want)


def assert_quantized_alike(q, want):
    """Activations differ in their last bits, which turns some roundings, each by one step."""
    difference = steps(q, want)
    assert difference.abs().max() <= 1
    assert (difference != 0).double().mean() < 0.01


def arguments(T, F, activation, device, dtype=torch.bfloat16):
    y = draw(T, F, seed=T * F) * 3
    # bounds of a power of ten each way, and some so small that values pass them
    bound = torch.logspace(-3, 0, T).roll(T // 3)
    return y.to(device, dtype), bound.to(device)


def outputs(T, F, device):
    """[T, F] within wider rows, all of it a pattern."""
    wide = torch.full((T, F + 37), 13.0, device=device).to(FP8)
    return wide, wide[:, 5 : 5 + F]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("T", "F"),
    [
        pytest.param(1, 16, id="one"),
        pytest.param(7, 131, id="odd"),
        pytest.param(70, 520, id="more-blocks-than-programs"),
    ],
)
def test_kernel_matches_its_definition(T, F, activation, dtype, device):
    y, bound = arguments(T, F, activation, device, dtype)
    wide, out = outputs(T, F, device)
    assert quantize_bounded(y, bound, activation, out=out) is out
    want = quantize_bounded_ref(y, bound, activation)
    assert_quantized_alike(out, want)
    assert out.float().abs().max() <= FP8_MAX
    assert (wide[:, :5].float() == 13).all()
    assert (wide[:, 5 + F :].float() == 13).all()


def test_kernel_without_a_function_has_the_bits_of_its_definition(device):
    y, bound = arguments(9, 40, None, device)
    bound = 2.0 ** bound.log2().round()  # of which the inverse is exact on any device
    out = torch.empty(9, 40, device=device, dtype=FP8)
    quantize_bounded(y, bound, out=out)
    assert not steps(out, quantize_bounded_ref(y, bound)).any()


def test_kernel_saturates_and_keeps_nan(device):
    y = torch.tensor([[900.0, -900.0, 464.0, NAN], [1.0, 2.0, 3.0, 4.0]], device=device)
    out = torch.empty(2, 4, device=device, dtype=FP8)
    quantize_bounded(y, torch.ones(2, device=device), out=out)
    assert out.float()[0, :3].tolist() == [448.0, -448.0, 448.0]
    assert out.float()[0, 3].isnan()
    assert out.float()[1].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_with_a_nan_bound_is_nan(activation, device):
    y, bound = arguments(5, 48, activation, device)
    clean = torch.empty(5, 48, device=device, dtype=FP8)
    quantize_bounded(y, bound, activation, out=clean)
    bound[2] = NAN
    out = quantize_bounded(y, bound, activation, out=torch.empty_like(clean))
    assert out[2].float().isnan().all()
    for t in (0, 1, 3, 4):
        assert not steps(out[t], clean[t]).any()


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("live", [0, 1, 5, 9, 100])
def test_rows_past_the_live_ones_are_zeros_and_never_read(
    live, activation, kernel, device, monkeypatch
):
    if not kernel:
        monkeypatch.setattr("vitgraph.kernels.bounded_fp8.use_reference", lambda tensor: True)
    y, bound = arguments(9, 48, activation, device)
    n = min(live, 9)
    clean = torch.empty(9, 48, device=device, dtype=FP8)
    quantize_bounded(y, bound, activation, out=clean)
    y[n:], bound[n:] = NAN, NAN
    wide, out = outputs(9, 48, device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    quantize_bounded(y, bound, activation, live_rows, out=out)
    assert not steps(out[:n], clean[:n]).any()
    assert not out[n:].contiguous().view(torch.uint8).any()
    assert (wide[:, :5].float() == 13).all()
    assert (wide[:, 5 + 48 :].float() == 13).all()


def test_strided_products(device):
    y, bound = arguments(6, 96, None, device)
    out = torch.empty(6, 48, device=device, dtype=FP8)
    quantize_bounded(y[:, 16:64], bound, out=out)
    assert_quantized_alike(out, quantize_bounded_ref(y[:, 16:64], bound))


def test_no_rows(device):
    out = torch.empty(0, 8, device=device, dtype=FP8)
    empty = torch.empty(0, device=device)
    assert quantize_bounded(torch.empty(0, 8, device=device), empty, out=out) is out


GOOD = {
    "y": torch.zeros(4, 8), "bound": torch.ones(4), "out": torch.zeros(4, 8).to(FP8),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is not None or one of"),
        ({"y": torch.zeros(8, 4).t()}, r"y must be .* adjacent elements .* strides \(1, 4\)"),
        ({"y": torch.zeros(3, 8)}, r"y must be torch.float32 \[4, 8\]"),
        ({"bound": torch.ones(4).double()}, r"bound must be torch.float32 \[4\]"),
        ({"bound": torch.ones(4, 1)}, r"bound must be .* got torch.float32 \[4, 1\]"),
        ({"bound": torch.ones(8)[::2]}, r"bound must be .* with strides \(2,\)"),
        ({"bound": torch.ones(1).expand(4)}, r"bound must be .* with strides \(0,\)"),
        ({"out": torch.zeros(4, 8)}, r"out must be torch.float8_e4m3fn \[4, 8\]"),
        ({"out": torch.zeros(8, 4).to(FP8).t()}, r"out must be .* strides \(1, 4\)"),
        ({"live_rows": torch.zeros(1)}, "live_rows must be one int32"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_bounded(**GOOD | change)


# v, whose factors are known before any input


class Values:
    """v of rows behind a norm with weight and bias, as it is computed, times its factors."""

    def __init__(self, weight, bias, norm_weight, norm_bias):
        self.weight, self.w_scale = quantize_ref(weight)
        self.bias, self.norm_weight, self.norm_bias = bias, norm_weight, norm_bias
        self.factors = value_factors(self.weight, self.w_scale, bias, norm_weight, norm_bias)

    def of(self, x, kind):
        """[T, N] in fp64, from rows of any size."""
        x = x.double()
        if kind == "layer":
            x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-12).sqrt() * self.norm_weight.double()
        x = x if self.norm_bias is None else x + self.norm_bias.double()
        q, scale = quantize_ref(x)
        v = dequantize(q, scale).double() @ dequantize(self.weight, self.w_scale).double().t()
        v = v if self.bias is None else v + self.bias.double()
        return v * self.factors.double()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("has_biases", [True, False], ids=["biases", "no-biases"])
def test_no_input_takes_v_past_448(has_biases, kind):
    for seed in range(12):
        weight = draw(64, 48, seed=seed) * torch.logspace(-6, 6, 64).roll(seed)[:, None]
        norm_weight = draw(48, seed=seed + 1) * torch.logspace(-3, 3, 48)
        bias, norm_bias = draw(64, seed=seed + 2) * 1e3, draw(48, seed=seed + 3)
        weight[5], weight[:, 7] = 0, 0
        values = Values(
            weight, bias if has_biases else None, norm_weight, norm_bias if has_biases else None
        )
        x = draw(40, 48, seed=seed + 4) * torch.logspace(-3, 6, 40)[:, None]
        x[0], x[1], x[2, 9] = 0, 1, 1e6
        along = dequantize(values.weight, values.w_scale) * norm_weight  # the worst there is
        for rows in (x, along, -along):
            v = values.of(rows.nan_to_num(), kind)
            assert v.abs().max() <= FP8_MAX


@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_of_v_is_met_but_for_its_slope(sign):
    """Else three bits would be lost for nothing: factors are powers of two, so up to half is."""
    weight, norm_weight = draw(16, 48, seed=1), draw(48, seed=2)
    values = Values(weight, None, norm_weight, None)
    rows = dequantize(values.weight, values.w_scale) * norm_weight
    met = values.of(sign * rows, "rms").diagonal() * sign
    assert (met > FP8_MAX / 2 / 1.07 * 0.94).all()
    assert (met <= FP8_MAX).all()
    exponents = values.factors.log2()
    assert torch.equal(exponents, exponents.round())
    # scaled by 3, some channels need the next power of two and some another
    assert set((value_factors(values.weight, values.w_scale * 3, None, norm_weight, None)
                / values.factors).tolist()) == {0.25, 0.5}  # fmt: skip


def test_every_part_counts_in_the_limit_of_v():
    weight, scale = quantize_ref(torch.eye(4) * 4)
    ones, zeros = torch.ones(4), torch.zeros(4)

    def limit(bias, norm_weight, norm_bias):
        """Of the first channel, from the powers of two that rises of the scale make it pass."""
        steps = torch.logspace(0, 1, 2000, base=2.0)
        factors = torch.stack([
            value_factors(weight, scale * r, None if bias is None else bias * r,
                          norm_weight, norm_bias)[0] for r in steps
        ])  # fmt: skip
        passed = steps[(factors != factors[0]).nonzero()[0, 0]]
        return FP8_MAX / factors[0] / passed

    # sqrt(4) |w g|, then |w| |c|, both with the slope; |b| as it is
    torch.testing.assert_close(limit(None, ones, None), torch.tensor(1.07 * 8), rtol=1e-3, atol=0)
    three = ones * 3
    torch.testing.assert_close(
        limit(None, three, zeros), torch.tensor(1.07 * 24), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        limit(None, ones, -three), torch.tensor(1.07 * 20), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(limit(-three, ones, None), torch.tensor(1.07 * 8 + 3), rtol=1e-3,
                               atol=0)  # fmt: skip


def test_channels_without_a_limit_have_the_largest_factor():
    weight, scale = quantize_ref(torch.zeros(2, 16))
    factors = value_factors(weight, scale, None, torch.ones(16), None)
    assert factors.tolist() == [2.0**EXPONENTS] * 2
    assert factors.dtype == torch.float32
