"""Towers of related families at published size on a GPU: accuracy eager and replayed, in bf16.

Accuracy is measured against Hugging Face's tower in fp32; the bar is 1.3 times the error that the
same tower makes in bf16. What capture does beyond that is in test_tower_gpu.py.
"""

import gc

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder import VisionEncoder
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

NAMES = [
    "qwen3.5-0.8b",
    "qwen3.5-9b",
    "qwen3-omni-30b",
    "qwen2.5-omni-7b",
    "mimo-vl-7b",
    "paddleocr-vl",
    "kimi-k2.5",
]
LAYOUTS = {
    "image": [(1, 28, 28)],
    "ragged": [(1, 16, 22), (1, 40, 6), (1, 2, 2), (1, 34, 34)],
    "image-and-video": [(1, 28, 28), (4, 16, 20), (1, 10, 46), (3, 34, 6)],
}


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(HF in bf16, the same weights in fp32, our encoder)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    half = towers.build_tower(request.param, device="cuda", dtype=torch.bfloat16)
    exact = towers.fp32_copy(request.param, half)
    encoder = VisionEncoder.from_hf(half)
    yield half, exact, encoder
    encoder.release_graphs()
    del half, exact, encoder
    gc.collect()
    torch.cuda.empty_cache()


def tensors(output):
    features = getattr(output, "deepstack_features", None) or ()
    pooled = output.pooler_output
    # towers without a merger: ours is the last hidden state again, transformers leaves it empty
    pooled = output.last_hidden_state if pooled is None else pooled
    # Kimi's has the patches of a token on an axis of their own
    return [output.last_hidden_state, pooled.flatten(1), *features]


def run(tower, rows, grid):
    """Hugging Face's outputs; Kimi's item by item, as it takes one number of frames at a time."""
    parts, grids = [rows], [grid]
    if type(tower).__name__ == "Kimi_K25VisionModel":
        parts, grids = rows.split(grid.prod(1).tolist()), grid.split(1)
    with torch.no_grad():
        outputs = [
            tensors(tower(towers.hf_pixels(tower, part), grid_thw=one))
            for part, one in zip(parts, grids, strict=True)
        ]
    return [torch.cat(part) for part in zip(*outputs, strict=True)]


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy(case, layout, is_captured):
    half, exact, encoder = case
    grids = LAYOUTS[layout]
    if is_captured and encoder.graphs is None:
        per_token = encoder.spec.patches_per_token
        encoder.capture({"token_budgets": [n // per_token for n in (784, 2048, 4352)]})
    elif not is_captured:
        encoder.release_graphs()
    rows = sum(t * h * w for t, h, w in grids)
    g = torch.Generator("cuda").manual_seed(rows)
    shape = rows, encoder.spec.patch_values
    pixels = torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)
    grid = torch.tensor(grids, device="cuda")
    oracle, eager = run(exact, pixels.float(), grid), run(half, pixels, grid)
    ours = tensors(encoder(pixels, grids))
    if is_captured:
        assert encoder.graphs.stats()["hits"] >= len(grids)
    assert len(ours) == len(oracle)
    for got, theirs, want in zip(ours, eager, oracle, strict=True):
        assert got.isfinite().all()
        assert rel_rms(got, want) <= 1.3 * rel_rms(theirs, want)
