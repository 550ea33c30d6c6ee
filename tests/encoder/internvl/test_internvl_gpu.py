"""InternVL towers of published width on a GPU: accuracy, captured tiles, padding, the swap.

Accuracy is measured against the same model in fp32; the bar is 1.3 times the error that it makes in
bf16.
"""

import copy
import gc

import pytest
import torch
from vitgraph.encoder import InternVLEncoder, swap_vision_tower
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

WIDTHS = {
    "300m": {
        "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "intermediate_size": 4096, "image_size": 448,
    },
    "6b": {
        "hidden_size": 3200, "num_hidden_layers": 4, "num_attention_heads": 25,
        "intermediate_size": 12800, "image_size": 448,
    },
}  # fmt: skip
COUNTS = [1, 7, 2, 13]
BUDGETS = [256, 2 * 256, 4 * 256, 7 * 256, 13 * 256]


class Case:
    """One model in fp32 and bf16, and ours."""

    def __init__(self, kind, build):
        with torch.device("cuda"):  # hundreds of millions of random numbers
            model = build.model(kind, **WIDTHS[kind])
        self.half = model.model.bfloat16()
        self.exact = copy.deepcopy(self.half).float()
        self.encoder = InternVLEncoder.from_hf(self.half)

    @torch.no_grad()
    def check(self, output, images):
        exact = self.exact.get_image_features(images.float())
        eager = self.half.get_image_features(images)
        for name in ("last_hidden_state", "pooler_output"):
            got, oracle = getattr(output, name), exact[name]
            assert got.isfinite().all()
            assert rel_rms(got, oracle) <= 1.3 * rel_rms(eager[name], oracle), name


@pytest.fixture(params=list(WIDTHS))
def case(request, build):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    case = Case(request.param, build)
    yield case
    case.encoder.release_graphs()
    del case
    gc.collect()
    torch.cuda.empty_cache()


def tiles_of(count, seed=0, side=448):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=g, device="cuda", dtype=torch.bfloat16)


def test_attention_needs_no_package(case):
    if torch.cuda.get_device_capability() == (9, 0):
        assert case.encoder.paths["tiles"].attention == "hopper"


@pytest.mark.parametrize("count", COUNTS)
def test_accuracy_eager(count, case):
    images = tiles_of(count)
    case.check(case.encoder(images), images)


@pytest.mark.parametrize("side", [224, 672])
def test_accuracy_of_other_sizes(side, case):
    images = tiles_of(2, side=side)
    case.check(case.encoder(images), images)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_accuracy_of_every_backend(backend, case):
    images = tiles_of(2)
    case.check(InternVLEncoder.from_hf(case.half, attention=backend)(images), images)


def test_fp32(case):
    images = tiles_of(1).float()
    got, want = InternVLEncoder.from_hf(case.exact)(images), case.exact.get_image_features(images)
    # wider sums; products in TF32 show above
    assert rel_rms(got.last_hidden_state, want.last_hidden_state) < 1e-4
    assert rel_rms(got.pooler_output, want.pooler_output) < 1e-4


def test_captured(case):
    """Replays are accurate, count as such, and leave nothing behind for the next."""
    case.encoder.capture({"token_budgets": BUDGETS})
    batches = [tiles_of(count, seed) for seed, count in enumerate((*COUNTS, 20))]
    first = []
    for images in batches:
        output = case.encoder(images)
        case.check(output, images)
        first.append((output.last_hidden_state.clone(), output.pooler_output.clone()))
    path = case.encoder.stats()["paths"]["tiles"]
    assert (path["items"], path["misses"]) == (sum(COUNTS) + 20, 0)
    for images, (state, tokens) in zip(batches, first, strict=True):
        case.encoder(torch.full_like(batches[-1], 1e4))
        again = case.encoder(images)
        assert torch.equal(again.last_hidden_state, state)
        assert torch.equal(again.pooler_output, tokens)


def test_replay_is_eager_bit_for_bit(case):
    """The same kernels on the same buffers."""
    manager = case.encoder.capture({"token_budgets": BUDGETS}).managers["tiles"]
    path = case.encoder.paths["tiles"]
    for seed, count in enumerate((1, 3, 4, 6, 13)):
        pixels, grids = path.pixel_rows(tiles_of(count, seed)), [path.fixed_grid] * count
        rung = next(r for r in manager.rungs if count <= r.max_items)
        got = manager.run_on(rung, pixels, grids)
        (graph,) = manager.ladder.rungs[rung].graphs
        fresh = {k: torch.full_like(v, float("nan")) for k, v in graph.outputs.items()}
        with torch.no_grad():
            path.graph_forward(graph.inputs, fresh, rung)
        for key, value in got.items():
            assert torch.equal(fresh[key][: len(value)], value), (key, count)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_replay_does_not_wait(case):
    case.encoder.capture({"token_budgets": BUDGETS})
    images = tiles_of(3)
    want = case.encoder(images).pooler_output
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = case.encoder(images).pooler_output
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@torch.no_grad()
def test_swapped_model(kind, build):
    with torch.device("cuda"):
        model = build.model(kind).bfloat16()
    images = tiles_of(3, side=build.side)
    want = model.get_image_features(images)
    with swap_vision_tower(model, graphs={"token_budgets": [32, 64]}) as handle:
        got = model.get_image_features(images)
        assert handle.encoder.stats()["total"]["hits"] == 3
        assert handle.stats().fused_calls == 1
        # a tower and a projector that move apart are captured apart
        model.model.multi_modal_projector.cpu()
        state = model.model.vision_tower(images).last_hidden_state
        assert rel_rms(state, want.last_hidden_state) < 0.1  # both round to bf16
        model.model.multi_modal_projector.cuda()
        assert torch.equal(model.get_image_features(images).pooler_output, got.pooler_output)
    for name in ("last_hidden_state", "pooler_output"):
        assert rel_rms(got[name], want[name]) < 0.1
    assert torch.equal(model.get_image_features(images).pooler_output, want.pooler_output)
