"""`VisionEncoder` against Hugging Face's towers, which are the definition of what we compute."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import vision_utils
from vitgraph.encoder import VisionEncoder
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
LAYOUTS = {
    "single": [(1, 8, 12)],
    "ragged": [(1, 8, 12), (1, 4, 6), (1, 14, 2), (1, 6, 6)],
    "one-token": [(1, 2, 2)],
    "video": [(3, 6, 8)],
    "image-and-video": [(1, 4, 6), (4, 6, 4), (1, 2, 2), (2, 2, 2)],
    "odd-windows": [(1, 10, 18), (3, 34, 6)],
    "divided-windows": [(1, 16, 8), (1, 8, 8)],
    "thin": [(1, 2, 60), (1, 60, 2)],
}
# One block each of the published widths.
FULL_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl-7b": (
        "qwen2_vl",
        {"depth": 1, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584},
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "depth": 1,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [],
        },
    ),
    "qwen3-vl-2b": (
        "qwen3_vl",
        {
            "depth": 1,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [],
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "depth": 1,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0],
        },
    ),
}


@contextmanager
def exact_hf(tower: torch.nn.Module) -> Iterator[None]:
    """Lift the three places where HF's towers compute in fp32 whatever their dtype."""

    def rope(q, k, cos, sin):
        cos, sin = cos[:, None].double(), sin[:, None].double()
        turned = [
            torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) for x in (q, k)
        ]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    def rms_norm(self, x):
        return self.weight * (
            x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        )

    def taps_and_weights(index, size, side, *_):
        at = index.double() * (side - 1) / (size - 1).clamp(min=1)
        low = at.floor().long()
        taps = torch.stack([low, (low + 1).clamp(max=side - 1)], 1)
        return taps, torch.stack([1 - (at - low), at - low], 1)

    home = sys.modules[type(tower).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "apply_rotary_pos_emb_vision", rope)
        patch.setattr(vision_utils, "_interpolation_axis_taps_weights", taps_and_weights)
        if hasattr(home, "Qwen2_5_VLRMSNorm"):
            patch.setattr(home.Qwen2_5_VLRMSNorm, "forward", rms_norm)
        yield


def named(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output, HF's or ours."""
    outputs = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    features = getattr(output, "deepstack_features", None) or []
    return outputs | {f"deepstack_features[{j}]": x for j, x in enumerate(features)}


@pytest.fixture
def results(build_tower, pixel_rows) -> Callable[..., Any]:
    """(ours, HF's in the same dtype, HF's exact in fp64), each a dict of tensors."""

    def compute(
        family: str, grids: Any, dtype: torch.dtype, device: str = "cpu", **config: Any
    ) -> tuple[dict[str, torch.Tensor], ...]:
        # the weights and pixels of all three are the same numbers
        tower = build_tower(family, dtype, **config)
        pixels, grid = pixel_rows(family, grids).to(dtype), torch.tensor(grids)
        with torch.no_grad():
            oracle = build_tower(family, dtype, **config).double()
            with exact_hf(oracle):
                exact = named(oracle(pixels.double(), grid))
            tower.to(device)
            theirs = named(tower(pixels.to(device), grid.to(device)))
            ours = named(VisionEncoder.from_hf(tower)(pixels.to(device), grid))
        assert list(ours) == list(theirs) == list(exact)
        return tuple({k: x.cpu() for k, x in outs.items()} for outs in (ours, theirs, exact))

    return compute


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(results, family, layout):
    ours, theirs, exact = results(family, LAYOUTS[layout], torch.float32)
    for name, oracle in exact.items():
        assert_as_accurate(ours[name], theirs[name], oracle, name=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64(results, family, layout):
    # a wrong formula cannot hide here: only the order of summation differs
    _, single, exact = results(family, LAYOUTS[layout], torch.float32)
    ours, _, double = results(family, LAYOUTS[layout], torch.float64)
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for name, oracle in double.items():
        assert ours[name].dtype == torch.float64
        bar = max(
            4 * scale * rel_rms(single[name], exact[name]), 8 * torch.finfo(torch.float64).eps
        )
        assert rel_rms(ours[name], oracle) <= bar, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(results, family, dtype, device):
    grids = LAYOUTS["ragged"] + LAYOUTS["video"] + LAYOUTS["odd-windows"]
    ours, theirs, exact = results(family, grids, dtype, device)
    for name, oracle in exact.items():
        assert_as_accurate(ours[name], theirs[name], oracle, factor=1.3, name=name)


@pytest.mark.parametrize("model", FULL_SIZE)
def test_full_width_block(results, model):
    family, config = FULL_SIZE[model]
    ours, theirs, exact = results(family, [(1, 8, 12), (2, 4, 10)], torch.float32, **config)
    for name, oracle in exact.items():
        assert_as_accurate(ours[name], theirs[name], oracle, name=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_layers(build_tower, pixel_rows, family):
    tower, grids = build_tower(family, torch.float64), LAYOUTS["odd-windows"]
    pixels, last = pixel_rows(family, grids), tower.config.depth - 1
    encoder = VisionEncoder.from_hf(tower)
    with torch.no_grad(), exact_hf(tower):
        expected = tower(pixels, torch.tensor(grids), output_hidden_states=True).hidden_states
        output = encoder(pixels, grids, layers=(1, 0, -1))
        plain = encoder(pixels, grids)
    assert set(output.hidden_states) == {0, 1, last}
    for layer, state in output.hidden_states.items():
        # Hugging Face's list begins with the input of block 0
        assert rel_rms(state, expected[layer + 1]) <= 1e-12
    assert torch.equal(output.hidden_states[last], output.last_hidden_state)
    assert torch.equal(output.pooler_output, plain.pooler_output)
    assert plain.hidden_states == {}
    with pytest.raises(ValueError, match=str(last + 1)):
        encoder(pixels, grids, layers=[last + 1])


def mutilations(tower: Any, rows: int) -> dict[str, dict[str, torch.Tensor]]:
    """Arguments that take one thing away from a tower."""
    whole = torch.tensor([0, rows], dtype=torch.int32)
    cases = {"rope": {"position_ids": torch.zeros(rows, 2)}, "frames": {"cu_seqlens": whole}}
    if hasattr(tower, "window_size"):
        cases["order of windows"] = {
            "window_index": torch.arange(rows // 4),
            "cu_window_seqlens": torch.arange(0, rows + 1, 4, dtype=torch.int32),
        }
    if hasattr(tower, "pos_embed"):
        cases["position table"] = {
            "interp_indices": torch.zeros(rows, 4, dtype=torch.long),
            "interp_weights": torch.zeros(rows, 4),
        }
    return cases


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_not_blind(build_tower, pixel_rows, family):
    tower, grids = build_tower(family), LAYOUTS["image-and-video"] + LAYOUTS["single"]
    pixels, grid = pixel_rows(family, grids), torch.tensor(grids)
    with torch.no_grad():
        ours = VisionEncoder.from_hf(tower)(pixels, grid).pooler_output
        assert rel_rms(ours, tower(pixels, grid).pooler_output) < 1e-4
        for what, arguments in mutilations(tower, len(pixels)).items():
            crippled = tower(pixels, grid, **arguments).pooler_output
            assert rel_rms(ours, crippled) > 1e-2, f"{what} does not show"


def test_row_order_undoes_windows(build_tower, pixel_rows):
    tower = build_tower("qwen2_5_vl")
    grids = LAYOUTS["odd-windows"] + LAYOUTS["image-and-video"]
    window_index, _ = vision_utils.get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    patches = (4 * window_index[:, None] + torch.arange(4)).flatten()
    encoder = VisionEncoder.from_hf(tower)
    order = encoder.row_order(grids)
    assert order is not None
    assert torch.equal(patches[order], torch.arange(len(patches)))
    # and by what it is for: an item's rows are the same numbers wherever the item lies in a batch
    pixels = pixel_rows("qwen2_5_vl", grids)
    first = encoder(pixels, grids).last_hidden_state[order][: 10 * 18]
    moved = encoder(pixels.roll(-10 * 18, 0), grids[1:] + grids[:1])
    last = moved.last_hidden_state[encoder.row_order(grids[1:] + grids[:1])][-10 * 18 :]
    assert rel_rms(last, first) < 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_rows_of_other_families_keep_their_order(build_tower, family):
    assert VisionEncoder.from_hf(build_tower(family)).row_order([(1, 8, 12)]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_item_does_not_depend_on_its_neighbours(build_tower, pixel_rows, family):
    encoder, grids = VisionEncoder.from_hf(build_tower(family)), LAYOUTS["image-and-video"]
    pixels = pixel_rows(family, grids)
    packed = encoder(pixels, grids).pooler_output
    others = pixels.clone()
    others[4 * 6 :] = 0.5
    changed = encoder(others, grids).pooler_output
    assert torch.equal(packed[:6], changed[:6])
    assert not torch.equal(packed[6:], changed[6:])
