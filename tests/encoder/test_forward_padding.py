"""Padding rows of a padded batch, where matrix products compute live rows only.

A stand-in for such products writes live rows rounded up to a tile and nothing else; fresh memory
is NaN. Every row that a product or the attention may read has to be finite all the same.
"""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import RungLimits
from vitgraph.encoder import VisionEncoder, forward, glm_merger, stream
from vitgraph.kernels import linear as native
from vitgraph.kernels import rotary_linear
from vitgraph.kernels.gemm_tuning import SQUARE

GRIDS = [(1, 4, 6), (2, 2, 4)]
LIVE = 40
TILE = 12  # rows: 48 of 88 patches and 12 of 22 tokens are written
LIMITS = RungLimits(token_budget=22, max_patches=88, max_items=3, max_frames=4, max_windows=4)


@pytest.fixture(params=[name for name in towers.TOWERS if name.startswith("tiny")])
def encoder(request):
    hf = towers.empty_tower(towers.tower_config(request.param), device="cpu", dtype=torch.float32)
    return VisionEncoder.from_hf(towers.boost_(hf, seed=0))


def rows_read(live_rows, total):
    return min(total, -(-int(live_rows) // TILE) * TILE)


def partial_linear(
    x, weight, bias=None, *, live_rows, residual=None, out=None, activation=None, backend="auto"
):
    read = rows_read(live_rows, len(x))
    assert x[:read].isfinite().all()
    y = forward_linear(x[:read], weight, bias, activation=activation)
    if residual is None:
        out = x.new_full((len(x), len(weight)), torch.nan) if out is None else out
        out[:read] = y
        return out
    residual[:read] += y
    assert residual.isfinite().all()
    return residual


def library_linear(x, weight, bias=None, *, live_rows, **epilogue):
    assert x.isfinite().all()
    return forward_linear(x, weight, bias, **epilogue)


def checked_attention(q, k, v, *arguments, **options):
    for tensor in (q, k, v):
        assert tensor.isfinite().all()
    forward_attention(q, k, v, *arguments, **options)


forward_linear = forward.linear
forward_attention = forward.varlen_attention


@pytest.mark.parametrize("by_tiles", ["all", "all but into the stream", "q, k and v"])
def test_padding_stays_finite(encoder, by_tiles, monkeypatch, poison_empty):
    rows = torch.Generator().manual_seed(0)
    pixels = torch.full((LIMITS.max_patches, encoder.spec.patch_values), torch.nan)
    pixels[:LIVE] = torch.randn(LIVE, encoder.spec.patch_values, generator=rows)
    want = encoder.eager_forward(pixels[:LIVE], GRIDS)

    def linear(x, weight, bias=None, **options):
        into_stream = options.get("residual") is not None
        by_library = by_tiles == "q, k and v" or (by_tiles != "all" and into_stream)
        return (library_linear if by_library else partial_linear)(x, weight, bias, **options)

    for module in (forward, stream, glm_merger):
        monkeypatch.setattr(module, "linear", linear)
    # of the product that rotates, whose tile is chosen apart from that of others
    monkeypatch.setattr(rotary_linear, "linear", partial_linear)
    monkeypatch.setattr(forward, "rotating_tile", lambda *_: SQUARE)
    monkeypatch.setattr(forward, "varlen_attention", checked_attention)
    backend = "library" if by_tiles == "q, k and v" else "hopper"
    monkeypatch.setattr(native, "choose_backend", lambda *_, **__: (backend, None))
    poison_empty()
    grid = torch.tensor([*GRIDS, (0, 0, 0)], dtype=torch.int32)
    outputs = {
        name: torch.full(shape, torch.nan)
        for name, shape in forward.output_shapes(encoder.spec, LIMITS.max_patches).items()
    }
    encoder.graph_forward({"pixel_values": pixels, "grid": grid}, outputs, LIMITS)
    for name, value in want.items():
        got = outputs[name][: len(value)]
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
    if encoder.spec.merger != "glm":
        assert outputs["last_hidden_state"].isfinite().all()
    if encoder.spec.merger != "none" and by_tiles != "q, k and v":
        # 10 live tokens, one tile
        assert outputs["pooler_output"][TILE:].isnan().all()
