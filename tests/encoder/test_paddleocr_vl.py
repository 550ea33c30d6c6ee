"""PaddleOCR-VL's tower against Hugging Face's: patches row by row, a norm instead of a merger."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as home
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from typer.testing import CliRunner
from vitgraph.bench.towers_config import calm_
from vitgraph.capture import EncoderCudaGraphManager, Pruning
from vitgraph.encoder import Embedder, VisionEncoder, swap_vision_tower
from vitgraph.encoder.cli import app
from vitgraph.encoder.fp8 import Fp8Plan
from vitgraph.encoder.media import MediaError, Video
from vitgraph.encoder.raster_preprocess import RasterPreprocessor
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

DATA = Path(__file__).parents[1] / "data"
VISION: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
    "image_size": 112,
}  # fmt: skip
FULL_SIZE = {
    "hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 1,
    "intermediate_size": 4304, "image_size": 384,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
IDS = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}  # fmt: skip
LAYOUTS = {
    "single": [(1, 8, 12)],
    "ragged": [(1, 8, 12), (1, 4, 6), (1, 14, 2), (1, 6, 6)],
    "odd": [(1, 5, 7), (1, 1, 1), (1, 3, 4), (1, 1, 9)],
    "video": [(3, 6, 8), (1, 4, 6)],
    "larger than the table": [(1, 10, 18), (1, 34, 6)],
}


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            p.normal_(0, 0.3 if "position_embedding" in name else p[0].numel() ** -0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(2)


def build_tower(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    torch.manual_seed(0)
    cls = home.PaddleOCRVisionModel
    tower = cls._from_config(cls.config_class(**VISION | overrides))
    boost(tower)
    return tower.to(dtype).eval()


def build_model() -> Any:
    torch.manual_seed(0)
    config = transformers.PaddleOCRVLConfig(text_config=TEXT, vision_config=VISION, **IDS)
    model = transformers.PaddleOCRVLForConditionalGeneration(config)
    boost(model)
    return model.eval()


def patches(grids: Any, seed: int = 1) -> torch.Tensor:
    """[T, 3, 14, 14], as the processor hands them over."""
    count = sum(math.prod(grid) for grid in grids)
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def states(grids: Any, dtype: torch.dtype, **overrides: Any) -> tuple[torch.Tensor, ...]:
    """(ours, HF's in the same dtype, HF's in fp64): last hidden states.

    HF keeps rope and the weights of positions in fp32 in any dtype, an error far below that of
    fp32 throughout.
    """
    tower, grid = build_tower(dtype, **overrides), torch.tensor(grids)
    pixels = patches(grids).to(dtype)
    with torch.no_grad():
        oracle = copy.deepcopy(tower).double()(pixels.double()[None], grid).last_hidden_state
        theirs = tower(pixels[None], grid).last_hidden_state
    return VisionEncoder.from_hf(tower)(pixels, grid).last_hidden_state, theirs, oracle


@pytest.fixture(params=[True, False], ids=["corners", "edges"])
def sampled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Positions as transformers 5.17 resamples them, and as 5.23 does."""
    build = home.PaddleOCRVisionEmbeddings.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        if not request.param and not hasattr(self, "interpolation_align_corners"):
            pytest.skip("this release of transformers resamples in one way")
        self.interpolation_align_corners = request.param

    monkeypatch.setattr(home.PaddleOCRVisionEmbeddings, "__init__", init)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(layout, sampled):
    encoder = VisionEncoder.from_hf(build_tower())
    assert encoder.spec.position_sampling == ("bilinear_corners" if sampled else "bilinear")
    assert_as_accurate(*states(LAYOUTS[layout], torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    grids = LAYOUTS["ragged"] + LAYOUTS["larger than the table"]
    assert_as_accurate(*states(grids, dtype), factor=1.3)


def test_full_width_block():
    assert_as_accurate(*states([(1, 8, 12), (1, 5, 9)], torch.float32, **FULL_SIZE))


def without_rope(tower: Any) -> None:
    tower.vision_model.encoder.rotary_pos_emb.inv_freq.zero_()


def without_positions(tower: Any) -> None:
    tower.vision_model.embeddings.position_embedding.weight.zero_()


def with_positions_by_edges(tower: Any) -> None:
    embeddings = tower.vision_model.embeddings
    embeddings.interpolation_align_corners = not embeddings.interpolation_align_corners


def _resamples_by_choice(tower: Any) -> bool:
    return hasattr(tower.vision_model.embeddings, "interpolation_align_corners")


def without_the_last_norm(tower: Any) -> None:
    tower.vision_model.post_layernorm.weight.fill_(0.5)


@pytest.mark.parametrize(
    "cripple",
    [without_rope, without_positions, with_positions_by_edges, without_the_last_norm],
    ids=lambda f: f.__name__,
)
def test_the_weights_are_not_blind(cripple):
    tower, grids = build_tower(), LAYOUTS["ragged"]
    if cripple is with_positions_by_edges and not _resamples_by_choice(tower):
        pytest.skip("this release of transformers resamples in one way")
    pixels, grid = patches(grids), torch.tensor(grids)
    ours = VisionEncoder.from_hf(build_tower())(pixels, grid).last_hidden_state
    with torch.no_grad():
        assert rel_rms(ours, tower(pixels[None], grid).last_hidden_state) < 1e-4
        cripple(tower)
        assert rel_rms(ours, tower(pixels[None], grid).last_hidden_state) > 1e-2


def test_weights_both_ways():
    tower = build_tower()
    encoder = VisionEncoder.from_hf(tower)
    for value in (1.0, 1.5):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.mul_(value)
        encoder.load_weights(tower)
        state = encoder.state_dict()
        assert state.keys() == tower.state_dict().keys()
        for key, expected in tower.state_dict().items():
            assert torch.equal(state[key], expected), key


def test_patches_as_rows_and_as_images():
    encoder, grids = VisionEncoder.from_hf(build_tower()), LAYOUTS["ragged"]
    pixels = patches(grids)
    rows = encoder(pixels.flatten(1), grids)
    for shape in (pixels, pixels[None], pixels.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(encoder(shape, grids).last_hidden_state, rows.last_hidden_state)
    assert rows.pooler_output is rows.last_hidden_state
    assert rows.tokens_per_item == (96, 24, 28, 36)
    assert encoder.row_order(grids) is None
    for wrong in (pixels[:, None], pixels.reshape(2, -1, 3, 14, 14), pixels[:, :2]):
        with pytest.raises(ValueError, match=r"must be \[patches, 588\]: 3 channels x 1 frames"):
            encoder(wrong, grids)
    with pytest.raises(ValueError, match="183 rows, but grid_thw describes 184 patches"):
        encoder(pixels[1:], grids)


def test_hidden_states_of_layers():
    tower, grids = build_tower(), LAYOUTS["ragged"]
    pixels, grid = patches(grids), torch.tensor(grids)
    with torch.no_grad():
        theirs = tower(pixels[None], grid, output_hidden_states=True).hidden_states
    output = VisionEncoder.from_hf(tower)(pixels, grids, layers=(0, -1))
    for layer, state in output.hidden_states.items():
        assert rel_rms(state, theirs[layer + 1]) < 3e-5


def test_tokens_are_not_pruned():
    encoder, grids = VisionEncoder.from_hf(build_tower()), [(2, 4, 6)]
    with pytest.raises(ValueError, match="paddleocr_vl has no merger"):
        encoder(patches(grids), grids, pruning_rate=0.5)
    with pytest.raises(ValueError, match="paddleocr_vl has no merger"):
        encoder.eager_forward(patches(grids).flatten(1), grids, Pruning((24,), (False,)))
    with pytest.raises(ValueError, match="paddleocr_vl has no merger"):
        Embedder(encoder).encode([DATA / "coffee.jpg"], pruning_rate=0.5)


def test_the_command_refuses_to_prune(tmp_path):
    build_model().save_pretrained(tmp_path)
    arguments = ["embed", str(tmp_path), str(DATA / "coffee.jpg"), "--device", "cpu"]
    output = ["-o", str(tmp_path / "out.npy")]
    result = CliRunner().invoke(app, [*arguments, *output, "--pruning-rate", "0.5"])
    assert result.exit_code == 2
    assert "paddleocr_vl has no merger" in result.output


def test_fp8():
    # boosted queries and keys would amplify what fp8 loses
    tower, grids = calm_(build_tower(num_hidden_layers=6)), LAYOUTS["ragged"]
    exact = VisionEncoder.from_hf(tower)(patches(grids), grids).last_hidden_state
    encoder = VisionEncoder.from_hf(tower, precision="fp8")
    error = rel_rms(encoder(patches(grids), grids).last_hidden_state, exact)
    # 3 bits of mantissa, in four of six blocks
    assert 1e-3 < error < 0.1
    with pytest.raises(ValueError, match=r"paddleocr_vl has no merger; use Fp8Plan\(mergers=Fal"):
        VisionEncoder.from_hf(tower, precision=Fp8Plan(mergers=True))


def test_replays_of_padded_graphs(rerun_recorder):
    encoder = VisionEncoder.from_hf(build_tower(torch.float64))
    assert encoder.budget_range() == (64, 65536)
    batches = {seed: [(1, 7, 12), (2, 4, 5)][seed:] for seed in (0, 1)}
    eager = {s: encoder(patches(g, s), g).last_hidden_state for s, g in batches.items()}
    config = {
        "token_budgets": [48, 160], "max_vision_items_per_batch": 4, "max_frames_per_batch": 4,
    }  # fmt: skip
    encoder.graphs = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    encoder.graphs.capture()
    for seed in (0, 1, 0):  # the second finds the rows of the first in its buffers
        replayed = encoder(patches(batches[seed], seed)[None], batches[seed])
        assert replayed.last_hidden_state.shape == eager[seed].shape
        assert rel_rms(replayed.last_hidden_state, eager[seed]) < 1e-12
    stats = encoder.graphs.stats()
    assert (stats["hits"], stats["misses"]) == (5, 0)


def prompt() -> dict[str, torch.Tensor]:
    grids = [(1, 8, 12), (1, 4, 6)]
    ids = torch.tensor([[502, *[500] * 24, 503, 502, *[500] * 6, 503, 11, 12]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 500).long(),
        "pixel_values": patches(grids),
        "image_grid_thw": torch.tensor(grids),
    }


def test_a_swapped_model_answers_as_before():
    model, inputs = build_model(), prompt()
    features = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        before = model(**inputs).logits
        blind = model(**inputs | {"pixel_values": torch.zeros_like(features[0])}).logits
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected = model.get_image_features(*features)
        with swap_vision_tower(model) as handle:
            assert handle.encoder.spec.family == "paddleocr_vl"
            swapped = model(**inputs).logits
            swapped_text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            actual = model.get_image_features(*features)
        after = model(**inputs).logits
    assert rel_rms(blind, before) > 1e-2  # or the comparison would not see the tower
    assert rel_rms(swapped, before) < 1e-4
    assert torch.equal(swapped_text, text)
    assert torch.equal(after, before)
    assert handle.stats().fused_calls == 3
    assert handle.stats().hf_calls == {}
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert rel_rms(actual.last_hidden_state, expected.last_hidden_state) < 3e-5
    for ours, theirs in zip(actual.pooler_output, expected.pooler_output, strict=True):
        assert rel_rms(ours, theirs) < 3e-5


@pytest.mark.parametrize("level", ["model", "inner"])
def test_a_swapped_tower_returns_what_it_did(level):
    model = build_model()
    tower, inputs = model.model.visual, prompt()
    call = {"pixel_values": inputs["pixel_values"][None], "grid_thw": inputs["image_grid_thw"]}
    holder = model if level == "model" else model.model
    with torch.no_grad():
        expected, pair = tower(**call), tower(**call, return_dict=False)
        with swap_vision_tower(holder, graphs=False) as handle:
            assert handle.tower is tower
            actual, ours = tower(**call), tower(**call, return_dict=False)
            assert handle.stats().fused_calls == 2
    assert type(actual) is type(expected)
    assert list(actual) == list(expected) == ["last_hidden_state"]
    assert actual.pooler_output is expected.pooler_output is None
    assert type(ours) is type(pair) is tuple
    assert len(ours) == len(pair) == 1
    assert rel_rms(ours[0], pair[0]) < 3e-5


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_from_pretrained(prefix, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    tower, grids = model.model.visual, LAYOUTS["ragged"]
    stored = load_file(tmp_path / "model.safetensors")
    tensors = {k: v for k, v in stored.items() if "visual." not in k}
    tensors |= {f"{prefix}{k}": v.contiguous() for k, v in tower.state_dict().items()}
    # published, and not used by transformers either
    tensors[f"{prefix}vision_model.head.probe"] = torch.zeros(1, 1, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = VisionEncoder.from_pretrained(tmp_path, device="cpu")
    assert encoder.spec == VisionEncoder.from_hf(tower).spec
    with torch.no_grad():
        expected = tower(patches(grids)[None], torch.tensor(grids)).last_hidden_state
    assert rel_rms(encoder(patches(grids), grids).last_hidden_state, expected) < 3e-5


@pytest.mark.parametrize("merge_size", [2, 4])
def test_embedder_uses_the_processor_of_the_folder(merge_size, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    limits = {"shortest_edge": 20000, "longest_edge": 60000}
    processor = PaddleOCRVLImageProcessorPil(size=limits, merge_size=merge_size)
    processor.save_pretrained(tmp_path)
    image = Image.open(DATA / "coffee.jpg")
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        output = model.model.visual(inputs["pixel_values"][None], inputs["image_grid_thw"])
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    tokens = embedder.encode(image, pool="tokens")
    assert rel_rms(torch.from_numpy(tokens), output.last_hidden_state) < 1e-4
    assert embedder.encode([image, image]).shape == (2, 64)


def preprocessor(**config: Any) -> RasterPreprocessor:
    return RasterPreprocessor.from_configs(_spec(), config, {})


def _spec() -> Any:
    return VisionEncoder.from_hf(build_tower()).spec


@pytest.mark.parametrize(
    "size",
    [(56, 84), (61, 97), (29, 400), (7, 9), (213, 320), (1, 190), (190, 1), (27, 28), (400, 13)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
@pytest.mark.parametrize("limits", [(384 * 384, 1536 * 1536), (3136, 50176)])
def test_pixels_equal_hugging_face_bit_for_bit(size, limits):
    config: Any = {"size": {"shortest_edge": limits[0], "longest_edge": limits[1]}}
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    expected = PaddleOCRVLImageProcessorPil(**config)(images=[image], return_tensors="np")
    rows, grid = preprocessor(**config)(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected["pixel_values"].reshape(len(rows), -1))


def test_settings_without_files_are_those_of_the_class():
    names = ("size", "image_mean", "image_std", "resample", "patch_size", "merge_size")
    own = {name: getattr(PaddleOCRVLImageProcessorPil, name) for name in names}
    assert preprocessor(**own) == RasterPreprocessor.for_family(_spec())


def test_videos_are_refused():
    frames = np.zeros((4, 64, 96, 3), dtype=np.uint8)
    with pytest.raises(MediaError, match="is a video, and this model reads images"):
        preprocessor()(Video(frames, fps=2.0))


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="paddleocr_vl_vision: hidden_act = 'gelu' is not"):
        VisionEncoder.from_hf(build_tower(hidden_act="gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_size": 2}, "merge_size = 2 and out_size = 64 with merger = 'none'"),
        ({"out_size": 96}, "merge_size = 1 and out_size = 96 with merger = 'none'"),
        ({"deepstack_layers": (0,)}, r"deepstack_layers = \(0,\) need merger = 'mlp'"),
        ({"window_size": 8}, "together with merger = 'none' is not supported"),
    ],
)
def test_specs_that_no_kernel_can_run(change, message):
    with pytest.raises(ValueError, match=message):
        replace(_spec(), **change)
