"""Padding rows of towers in fp8: stale pixels and fresh memory are NaN, fp8 memory too.

The stand-in `products` looks at every operand. Without tiles its products write all rows, as the
library does; with tiles, live rows rounded up and no others, as the kernels of a GPU do. Live rows
must not tell the difference, nor whether the memory was NaN before.
"""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import RungLimits
from vitgraph.encoder import VisionEncoder
from vitgraph.encoder.fp8 import Fp8Plan

LIMITS = RungLimits(token_budget=22, max_patches=88, max_items=3, max_frames=4, max_windows=4)
GRIDS = [(1, 4, 6), (2, 2, 4)]
LIVE = 40
TILE = 12  # 48 of 88 patches and 12 of 22 tokens are written
ALL = Fp8Plan(0, 0)
CASES = [
    *(
        (name, plan)
        for name in ("tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl")
        for plan in (Fp8Plan(), Fp8Plan(0, 0, mergers=True))
    ),
    # a gate whose rows the next kernel quantises, and one that is read in fp8 as it is written
    *(("tiny-qwen2.5-vl", Fp8Plan(0, 0, layers=(layer,))) for layer in ("up", "down", "qkv")),
    *(("tiny-qwen3-vl", Fp8Plan(0, 0, layers=(layer,))) for layer in ("up", "down")),
    ("tiny-qwen2-vl", Fp8Plan(0, 0, layers=("up", "down"))),
    ("tiny-glm-4v", ALL),
    ("tiny-glm-ocr", ALL),
    ("tiny-glm-5", ALL),
    *(("tiny-glm-5", Fp8Plan(0, 0, layers=(layer,))) for layer in ("up", "down")),
    ("tiny-paddleocr", ALL),
]


def padded_forward(encoder, pixels):
    rows = torch.full((LIMITS.max_patches, pixels.shape[1]), torch.nan, dtype=encoder.dtype)
    rows[:LIVE] = pixels
    grid = torch.tensor([*GRIDS, (0, 0, 0)], dtype=torch.int32)
    outputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in encoder.output_specs(LIMITS).items()
    }
    encoder.graph_forward({"pixel_values": rows, "grid": grid}, outputs, LIMITS)
    return outputs


@pytest.mark.parametrize("tile", [None, TILE])
@pytest.mark.parametrize(
    ("name", "plan"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "+".join(value.layers),
)
def test_poisoned_padding_stays_out(name, plan, tile, products, poison_empty):
    config = towers.tower_config(name)
    hf = towers.boost_(towers.empty_tower(config, device="cpu", dtype=torch.float32), 0)
    encoder = VisionEncoder.from_hf(hf.bfloat16(), precision=plan)
    drawn = torch.randn(
        LIVE, encoder.spec.patch_values, generator=torch.Generator().manual_seed(0)
    ).to(encoder.dtype)
    alone = encoder.eager_forward(drawn, GRIDS)
    whole = padded_forward(encoder, drawn)
    products.used.clear()
    poison_empty()
    products.tile = tile
    outputs = padded_forward(encoder, drawn)
    assert len(products.used) == len(plan.names(encoder.spec))
    for key, value in alone.items():
        live = outputs[key][: len(value)]
        assert torch.equal(live, whole[key][: len(value)]), key
        # sums of other row counts may take another order
        torch.testing.assert_close(live, value, rtol=0.02, atol=0.02)
        assert outputs[key].isfinite().all(), key
