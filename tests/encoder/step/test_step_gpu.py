"""Step towers of published width on a GPU: accuracy, captured paths, padding.

Accuracy is measured against the same tower in fp32; the bar is 1.3 times the error that it makes in
bf16.
"""

import copy
import gc

import pytest
import torch
from vitgraph.encoder import StepEncoder
from vitgraph.encoder.image_tower import live_tensors, live_weights
from vitgraph.encoder.step_spec import step3_vl_spec, step3p7_spec
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

WIDTHS = {
    "step3p7": {
        "hidden_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 16, "image_size": 728,
        "mlp_ratio": 8960 / 1536,
    },
    "step3": {
        "hidden_size": 1792, "num_hidden_layers": 6, "num_attention_heads": 16, "image_size": 728,
        "intermediate_size": 15360, "output_hidden_size": 4096, "patch_size": 14,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
}  # fmt: skip
OUT = 1024
COUNTS = [[0], [2, 0, 3], [0, 0], [1, 7]]
CONFIG = {
    "global": {"token_budgets": [169, 2 * 169, 4 * 169]},
    "local": {"token_budgets": [81, 4 * 81, 8 * 81]},
}


class Case:
    """One tower in fp32 and bf16, with a projector, and ours."""

    def __init__(self, kind, build, attention=None):
        self.kind = kind
        if kind == "step3":
            with torch.device("cuda"):  # hundreds of millions of random numbers
                tower = type(build.step3())(WIDTHS[kind], OUT).eval()
            build.boost(tower)
            self.half = tower.bfloat16()
            spec, tensors = step3_vl_spec(WIDTHS[kind], OUT), dict(self.half.named_parameters())
        else:
            with torch.device("cuda"):
                tower = build.hf_tower(**WIDTHS[kind])
                projector = torch.nn.Linear(tower.config.hidden_size * 4, OUT, bias=False)
            self.half = torch.nn.ModuleDict({"tower": tower, "projector": projector})
            # not `.bfloat16()`: that rounds the buffer of rotary frequencies, too, which a loaded
            # model keeps in fp32
            for parameter in self.half.parameters():
                parameter.data = parameter.data.bfloat16()
            spec = step3p7_spec(tower.config, OUT)
            tensors = live_tensors(tower, self.half["projector"])
        self.exact = copy.deepcopy(self.half).float()
        self.encoder = StepEncoder(spec, live_weights(spec, tensors), attention=attention)

    @torch.no_grad()
    def oracle(self, module, images):
        """Projected tokens [N, tokens, OUT]."""
        images = images.to(next(module.parameters()).dtype)
        if self.kind == "step3":
            return module(images)[1]
        return module["projector"](module["tower"](images).last_hidden_state)


@pytest.fixture(params=list(WIDTHS))
def case(request, build, column_first):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    case = Case(request.param, build)
    yield case
    case.encoder.release_graphs()
    del case
    gc.collect()
    torch.cuda.empty_cache()


def inputs(counts, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def images(count, side):
        shape = count, 3, side, side
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    return images(len(counts), 728), images(sum(counts), 504) if sum(counts) else None, counts


def check(case, output, args):
    wholes, crops, counts = args
    for module, error in ((case.exact, None), (case.half, 1.3)):
        whole = case.oracle(module, wholes)
        parts = [()] * len(counts)
        if crops is not None:
            parts = case.oracle(module, crops).split(counts)
        want = [torch.cat([*part, w]) for part, w in zip(parts, whole, strict=True)]
        if error is None:
            exact = want
            continue
        for got, oracle, eager in zip(output.pooler_output, exact, want, strict=True):
            assert got.isfinite().all()
            assert rel_rms(got, oracle) <= error * rel_rms(eager, oracle)


def test_attention_needs_no_package(case):
    if torch.cuda.get_device_capability() == (9, 0):
        assert {path.attention for path in case.encoder.paths.values()} == {"hopper"}


@pytest.mark.parametrize("counts", COUNTS)
def test_accuracy_eager(counts, case):
    args = inputs(counts)
    check(case, case.encoder(*args), args)


@pytest.mark.parametrize("kind", list(WIDTHS))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_accuracy_of_every_backend(backend, kind, build, column_first):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    case = Case(kind, build, attention=backend)
    args = inputs([1, 0])
    check(case, case.encoder(*args), args)


def test_captured(case):
    """Replays are accurate, count as such, and leave nothing behind for the next."""
    case.encoder.capture(CONFIG)
    batches = [inputs(counts, seed) for seed, counts in enumerate(COUNTS)]
    first = []
    for args in batches:
        output = case.encoder(*args)
        check(case, output, args)
        first.append([rows.clone() for rows in output.pooler_output])
    assert case.encoder.stats()["total"]["misses"] == 0
    poison = [torch.full_like(x, 1e4) if x is not None else None for x in batches[1][:2]]
    for args, want in zip(batches, first, strict=True):
        case.encoder(*poison, batches[1][2])
        again = case.encoder(*args)
        assert all(map(torch.equal, again.pooler_output, want))


def test_a_call_may_exceed_the_ladder(case):
    case.encoder.capture(CONFIG)
    args = inputs([9] + [0] * 8)
    check(case, case.encoder(*args), args)
    totals = case.encoder.stats()["paths"]
    assert totals["global"]["items"] == totals["local"]["items"] == 9
