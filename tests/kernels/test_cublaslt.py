"""Products by a named algorithm of cuBLASLt, and the table that names them."""

import ctypes
import gc
import json
import re
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vitgraph.kernels import cublaslt, library_linear, library_tuning, tables
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.cublaslt import Algorithm, product_of, proposals
from vitgraph.kernels.gemm_tuning import RESIDUAL, table_to_json
from vitgraph.kernels.library_linear import library_epilogue
from vitgraph.kernels.library_tuning import TABLE, library_algorithm, library_from_json
from vitgraph.kernels.linear import linear, linear_ref

BF16, FP16 = torch.bfloat16, torch.float16
ONE = Algorithm(183, 2, 7)
OTHER = Algorithm(24, 5, 3, splits=2, reduction=1, swizzle=1, stages=4, inner=6)
UNKNOWN = Algorithm(65000, 7, 500)


# what a layer asks for


@pytest.mark.parametrize(
    ("activation", "has_bias", "has_residual", "dtype", "epilogue"),
    [
        (None, True, False, BF16, ""),
        (None, False, False, BF16, ""),
        ("gelu_erf", True, False, BF16, ""),
        ("gelu_tanh", True, False, BF16, "gelu_tanh"),
        ("gelu_tanh", True, False, FP16, "gelu_tanh"),
        ("gelu_tanh", False, False, BF16, ""),
        ("gelu_tanh", True, False, torch.float32, ""),
        (None, False, True, BF16, "residual"),
    ],
)
def test_what_the_library_does_after_its_product(
    activation, has_bias, has_residual, dtype, epilogue
):
    assert library_epilogue(activation, has_bias, has_residual, dtype) == epilogue


def test_an_entry_holds_up_to_its_last_row():
    table = {(8, 16, ""): ((10, ONE), (20, None), (30, OTHER))}
    found = [library_algorithm(M, 8, 16, "", table) for M in (1, 10, 11, 20, 21, 30, 31)]
    assert found == [ONE, ONE, None, None, OTHER, OTHER, None]
    assert library_algorithm(1, 8, 16, "residual", table) is None
    assert library_algorithm(1, 16, 8, "", table) is None


def test_shipped_entries_ascend_and_are_of_what_the_library_does():
    for (N, K, epilogue), classes in TABLE.items():
        assert epilogue in library_tuning.EPILOGUES
        assert N % 8 == K % 8 == 0
        bounds = [last for last, _ in classes]
        assert bounds == sorted(set(bounds))
        assert not classes or classes[-1][1] is not None
    assert library_from_json(json.loads(json.dumps(table_to_json(TABLE)))) == TABLE


def entry(algorithm, epilogue=""):
    return {"N": 8, "K": 8, "epilogue": epilogue, "tiles": [[10, algorithm]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "entries are a NoneType"),
        ([entry(asdict(ONE), "quick_gelu")], "epilogue 'quick_gelu' is not one of"),
        ([entry({"tile": 1})], "entry 0: algorithm {'tile': 1} does not have tile, custom"),
        ([entry([1])], "does not have tile, custom"),
        ([entry({**asdict(ONE), "cluster": -1})], "cluster = -1 of an algorithm"),
        ([entry({**asdict(ONE), "custom": True})], "custom = True of an algorithm"),
        ([entry(asdict(ONE)), entry(None)], "entry 1 repeats"),
    ],
)
def test_a_damaged_table_is_refused(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        library_from_json(content)


def test_a_table_survives_the_file():
    table = {(8, 16, "residual"): ((10, ONE), (20, None), (30, OTHER)), (8, 8, ""): ()}
    assert library_from_json(json.loads(json.dumps(table_to_json(table)))) == table
    assert library_tuning.table_digest(table) != library_tuning.table_digest({})


def test_a_layer_takes_the_algorithm_of_its_epilogue(monkeypatch):
    """Also where an activation follows in a pass of its own."""
    taken = []

    def product(x, weight, bias=None, *, algorithm, **options):
        taken.append(algorithm)
        return library_linear.library_linear(x, weight, bias, **options)

    table = {(8, 16, ""): ((4, ONE),), (16, 16, "residual"): ((4, OTHER),)}
    mine = tables.Tuning({}, {}, {}, table)
    monkeypatch.setattr(library_linear, "hopper_reason", lambda device, dtype: None)
    monkeypatch.setattr(library_linear, "tuning", lambda device: mine)
    monkeypatch.setattr(linear_module, "library_linear", product)
    x, weight, bias = torch.ones(4, 16), torch.ones(8, 16), torch.ones(8)
    for backend in ("auto", "library"):
        linear(x, weight, bias, backend=backend)
        linear(x, weight, bias, activation="silu", backend=backend)
        linear(torch.ones(5, 16), weight, bias, backend=backend)
        linear(x, torch.ones(16, 16), residual=torch.ones(4, 16), backend=backend)
    assert taken == [ONE, ONE, None, OTHER] * 2


def test_without_the_library_everything_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(cublaslt, "_library", lambda: None)
    product = cublaslt.Product(8, 8, 8, (8, 8, 8), BF16, "", True, 0)
    assert cublaslt.version() is None
    assert proposals(product) == []
    cublaslt._plan.cache_clear()
    assert not cublaslt.multiply(product, ONE, *[None] * 4)
    cublaslt._plan.cache_clear()


class Operand:
    """What `product_of` asks of a tensor on a GPU."""

    def __init__(self, *shape, strides=None, address=512, dtype=BF16):
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", 3)
        self.strides, self.address = strides or (*shape[1:], 1), address

    def stride(self, dim):
        return self.strides[dim]

    def data_ptr(self):
        return self.address


def test_which_operands_make_a_product():
    x, weight, bias, y = (
        Operand(6, 24, strides=(32, 1)),
        Operand(16, 24),
        Operand(16),
        Operand(6, 16),
    )
    found = product_of(x, weight, bias, y, "gelu_tanh")
    assert found == cublaslt.Product(6, 16, 24, (32, 24, 16), BF16, "gelu_tanh", True, 3)
    assert product_of(x, weight, None, y, "residual").has_bias is False
    for wrong in (
        Operand(6, 24, strides=(1, 8)), Operand(6, 24, strides=(36, 1)), Operand(0, 24),
        Operand(6, 24, strides=(0, 1)), Operand(6, 24, strides=(16, 1)),
        Operand(6, 24, address=528), Operand(6, 24, dtype=torch.float32),
    ):  # fmt: skip
        assert product_of(wrong, weight, bias, y, "") is None
    assert product_of(x, weight, Operand(16, address=528), y, "") is None
    assert product_of(x, weight, bias, Operand(6, 16, address=768 + 16), "") is None
    on_cpu = torch.ones(8, 8, dtype=BF16)
    assert product_of(on_cpu, on_cpu, None, on_cpu, "") is None


# the layer


class OnGpu(torch.Tensor):
    """Of a CPU, but does not say so."""

    is_cuda = True


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("path", ["algorithm", "refused", "no product", "own choice"])
def test_the_layer_by_an_algorithm_or_by_pytorch(path, has_residual, activation, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, before = (
        torch.randn(*size, generator=generator) for size in ((6, 24), (16, 24), (16,), (6, 16))
    )
    asked = []

    def multiply(product, algorithm, x, weight, bias, y):
        asked.append(algorithm)
        if path == "refused":
            return False
        options = {"residual": y.clone()} if has_residual else {}
        y.copy_(linear_ref(x, weight, bias, **options))
        return True

    product = None if path == "no product" else "product"
    monkeypatch.setattr(cublaslt, "product_of", lambda *operands: product)
    monkeypatch.setattr(cublaslt, "multiply", multiply)
    given = {"activation": None if has_residual else activation}
    if has_residual:
        bias, given["residual"] = None, before.clone()
    want = linear_ref(x, weight, bias, **given)
    algorithm = None if path == "own choice" else ONE
    by_layer = library_linear.library_linear(
        x.as_subclass(OnGpu), weight, bias, algorithm=algorithm, **given
    )
    torch.testing.assert_close(torch.Tensor(by_layer), want)
    assert asked == ([ONE] if path in ("algorithm", "refused") else [])
    out = torch.empty(6, 16)
    if not has_residual:
        layer = library_linear.library_linear
        layer(x.as_subclass(OnGpu), weight, bias, algorithm=algorithm, out=out, **given)
        torch.testing.assert_close(out, want)


def test_a_gelu_in_the_epilogue_is_not_followed_by_another(monkeypatch):
    monkeypatch.setattr(cublaslt, "product_of", lambda *operands: "product")
    monkeypatch.setattr(cublaslt, "multiply", lambda *operands: operands[-1].fill_(2.0) is not None)
    x = torch.ones(4, 8, dtype=BF16).as_subclass(OnGpu)
    y = library_linear.library_linear(
        x, torch.ones(8, 8, dtype=BF16), torch.ones(8), activation="gelu_tanh", algorithm=ONE
    )
    assert (y == 2.0).all()


def test_other_devices_have_no_algorithm(monkeypatch):
    mine = tables.Tuning({}, {}, {}, {(8, 16, ""): ((4, ONE),)})
    monkeypatch.setattr(library_linear, "tuning", lambda device: mine)
    x, weight = torch.ones(4, 16, dtype=BF16), torch.ones(8, 16, dtype=BF16)
    assert library_linear.choose_algorithm(x, weight, "") is None
    monkeypatch.setattr(library_linear, "hopper_reason", lambda device, dtype: None)
    assert library_linear.choose_algorithm(x, weight, "") == ONE


# what is handed to the library


class FakeLibrary:
    """Keeps what cuBLASLt would, and knows what is alive."""

    def __init__(self, proposed=()):
        self.proposed, self.statuses = proposed, {}
        self.workspace, self.data_type = 4, 14
        self.alive, self.made, self.multiplied = {}, 0, []

    def __getattr__(self, name):
        kind = name.removeprefix("cublasLt").removeprefix("Matmul")
        if not kind:
            return self.multiply
        for end, what in (("Create", self._create), ("Destroy", self._destroy)):
            if kind.endswith(end):
                return partial(what, kind.removesuffix(end))
        return getattr(self, re.sub("(?=[A-Z])", "_", kind).lower())

    def _create(self, kind, pointer, *settings):
        self.made += 1
        pointer._obj.value = self.made
        self.alive[self.made] = [kind, *(setting.value for setting in settings)]
        return 0

    def _destroy(self, kind, pointer):
        assert self.alive.pop(pointer.value)[0] == kind
        return 0

    def _get_version(self):
        return 130102

    def _desc_set_attribute(self, pointer, number, value, size):
        assert size.value == ctypes.sizeof(value._obj)
        self.alive[pointer.value].append((number.value, value._obj.value))
        return 0

    _preference_set_attribute = _desc_set_attribute

    def _algo_init(self, handle, *rest):
        *types, kind, words = rest
        assert [t.value for t in types] == [68, 0, *[self.data_type] * 4]
        words[0] = kind.value
        return self.statuses.get("init", 0)

    def _algo_config_set_attribute(self, words, number, value, size):
        assert size.value == ctypes.sizeof(value._obj)
        assert size.value == (2 if number.value in (7, 8) else 4)  # as cublasLt.h has them
        words[number.value % 8] += value._obj.value << (32 if number.value > 7 else 0)
        return self.statuses.get("set", 0)

    def _algo_config_get_attribute(self, words, number, value, size, written):
        assert size.value == ctypes.sizeof(value._obj)
        word = words[number.value % 8]
        value._obj.value = word >> 32 if number.value > 7 else word & 0xFFFFFFFF
        return 0

    def _operands(self, description, matrices):
        return [self.alive[pointer.value] for pointer in (description, *matrices)]

    def _algo_check(self, handle, description, a, b, c, d, words, found):
        self._operands(description, (a, b, c, d))
        found._obj.workspace = self.workspace
        return self.statuses.get("check", 0)

    def _algo_get_heuristic(self, handle, description, a, b, c, d, preference, *rest):
        self._operands(description, (a, b, c, d))
        assert self.alive[preference.value][1:] == [(1, 0)]  # no workspace
        _most, found, count = rest
        if not self.proposed:
            return 15
        for i, (algorithm, state) in enumerate(self.proposed):
            found[i].words[0], found[i].state = algorithm.kind, state
            for name, (number, kind) in cublaslt._ATTRIBUTES.items():
                if name != "kind":
                    value = kind(getattr(algorithm, name))
                    self._algo_config_set_attribute(
                        found[i].words, ctypes.c_int(number), ctypes.byref(value),
                        ctypes.c_size_t(ctypes.sizeof(value)),
                    )  # fmt: skip
        count._obj.value = len(self.proposed)
        return 0

    def multiply(self, handle, description, *rest):
        one, of_a, a, of_b, b, scale, of_c, c, of_d, d, words, workspace, size, stream = rest
        assert (one._obj.value, workspace, size.value, stream.value) == (1.0, None, 0, 7)
        assert self.device == 2
        made = cublaslt._described(words)
        addresses = [pointer.value for pointer in (of_a, of_b, of_c, of_d)]
        operands = self._operands(description, (a, b, c, d))
        self.multiplied.append((made, scale._obj.value, addresses, operands))
        return 0


@pytest.fixture
def fake(monkeypatch):
    made = FakeLibrary([(ONE, 0), (OTHER, 0), (UNKNOWN, 15)])
    monkeypatch.setattr(cublaslt, "_library", lambda: made)

    @contextmanager
    def device(index):
        made.device = index
        yield
        made.device = None

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    for cache in (cublaslt._plan, cublaslt._handle):
        cache.cache_clear()
    yield made
    for cache in (cublaslt._plan, cublaslt._handle):
        cache.cache_clear()


def product_like(epilogue, has_bias, dtype=BF16):
    return cublaslt.Product(6, 8, 24, (32, 24, 16), dtype, epilogue, has_bias, 2)


def test_proposals_are_those_that_the_library_can_do(fake):
    assert cublaslt.version() == "13.1.2"
    assert proposals(product_like("", True)) == [ONE, OTHER]
    assert [kind for kind, *_ in fake.alive.values()] == [""]  # the handle, which is kept
    fake.proposed = ()
    assert proposals(product_like("", True)) == []


@pytest.mark.parametrize(
    ("epilogue", "has_bias", "number", "scale"),
    [
        ("", False, 1, 0.0),
        ("", True, 4, 0.0),
        ("gelu_tanh", True, 36, 0.0),
        (RESIDUAL, False, 1, 1.0),
    ],
)
def test_what_the_library_is_told(epilogue, has_bias, number, scale, fake):
    x, weight, y = torch.ones(6, 24), torch.ones(8, 24), torch.ones(6, 8)
    bias = torch.ones(8) if has_bias else None
    for _ in range(2):
        assert cublaslt.multiply(product_like(epilogue, has_bias), OTHER, x, weight, bias, y)
    assert len(fake.multiplied) == 2
    made, factor, addresses, (description, *matrices) = fake.multiplied[1]
    assert made == OTHER
    assert factor == scale
    assert addresses == [m.data_ptr() for m in (weight, x, y, y)]
    asked = [(3, 1), (4, 0), (7, number)]
    if has_bias:
        asked.append((8, bias.data_ptr()))
    assert description == ["Desc", 68, 0, *asked]
    kinds = [["MatrixLayout", 14, *size] for size in ((24, 8, 24), (24, 6, 32), (8, 6, 16))]
    assert matrices == [*kinds, kinds[-1]]
    assert sorted(kind for kind, *_ in fake.alive.values()) == ["", *["MatrixLayout"] * 3]
    cublaslt._plan.cache_clear()
    gc.collect()
    assert [kind for kind, *_ in fake.alive.values()] == [""]


@pytest.mark.parametrize("refused", ["init", "set", "check", "workspace"])
def test_an_algorithm_that_the_library_refuses_is_not_run(refused, fake):
    if refused == "workspace":
        fake.workspace = 5
    else:
        fake.statuses[refused] = 15
    assert not cublaslt.multiply(product_like("", False), ONE, *[torch.ones(1)] * 2, None, None)
    assert fake.multiplied == []


def test_fp16_has_a_type_of_its_own(fake):
    fake.data_type = 2
    ones = torch.ones(1)
    assert cublaslt.multiply(product_like("", False, FP16), ONE, ones, ones, None, ones)
    _, _, _, (_, *matrices) = fake.multiplied[0]
    assert [matrix[1] for matrix in matrices] == [2] * 4


def test_structures_are_as_large_as_those_of_the_library():
    assert ctypes.sizeof(cublaslt._Found) == 96
    assert cublaslt._Found.state.offset == 72


def test_an_error_of_the_library_is_told(fake):
    fake.multiply = lambda *arguments: 14
    with pytest.raises(
        RuntimeError, match=r"cublasLtMatmul of cuBLASLt 13.1.2 failed with status 14"
    ):
        cublaslt.multiply(product_like("", False), ONE, *[torch.ones(1)] * 2, None, torch.ones(1))
