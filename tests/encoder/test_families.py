"""The families that share a tower with another: each against its own classes in transformers."""

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vitgraph.encoder import Embedder, VisionEncoder, swap_vision_tower
from vitgraph.encoder.preprocess import ImagePreprocessor
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

DATA = Path(__file__).parents[1] / "data"
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_num_value_heads": 2, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "hc_lowrank": 16,
}  # fmt: skip
ROPE = {"rope_type": "default"}
COMPASS_ROPE = {"full_attention": TEXT["rope_parameters"]}
BLOCKS = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
QWEN2 = {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64}
WINDOWS = {"depth": 4, **BLOCKS, "fullatt_block_indexes": [1, 3], "window_size": 112}
PLAIN = {"depth": 3, **BLOCKS, "num_position_embeddings": 64}
DEEPSTACK = {**PLAIN, "depth": 4, "deepstack_visual_indexes": [0, 2]}
IDS = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}  # fmt: skip
AUDIO = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "output_dim": 64, "num_mel_bins": 16,
}  # fmt: skip
OMNI_IDS = {"audio_token_id": 504, "audio_start_token_id": 505}


@dataclass(frozen=True)
class Case:
    """A full model of transformers, its config, and where its tower is.

    Attributes:
        home: Module of its classes, `modeling_` and `configuration_` left out.
        model, config: Names of the classes.
        arguments: Of the config.
        path: Of the tower.
        family: Whose entry serves it.
        published: Beginnings of the tower's tensors in published checkpoints.
    """

    home: str
    model: str
    config: str
    arguments: dict[str, Any]
    path: str
    family: str
    published: tuple[str, ...] = ("model.visual.",)

    def build(self) -> Any:
        """A boosted model, fp32, in eval mode."""
        torch.manual_seed(0)
        config = getattr(_module(self.home, "configuration"), self.config)(**self.arguments)
        model = getattr(_module(self.home, "modeling"), self.model)(config)
        boost(model)
        return model.eval()

    def tower(self, model: Any) -> Any:
        """The tower of `model`; newer thinkers keep it in an inner model, as other VLMs do."""
        for name in self.path.split("."):
            model = getattr(model if hasattr(model, name) else model.model, name)
        return model


def _module(home: str, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{home}.{kind}_{home}")


def _vlm(home: str, stem: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Case:
    arguments = {"text_config": text, "vision_config": vision, **IDS}
    return Case(
        home, f"{stem}ForConditionalGeneration", f"{stem}Config", arguments, "model.visual", **more
    )


def _col(vlm: str, vision: dict[str, Any]) -> Case:
    inner = {"model_type": vlm, "text_config": TEXT, "vision_config": vision, **IDS}
    return Case(
        "colqwen2", "ColQwen2ForRetrieval", "ColQwen2Config", {"vlm_config": inner}, "vlm.visual",
        vlm, published=("vlm.visual.", "vlm.model.visual."),
    )  # fmt: skip


def _thinker(home: str, stem: str, text: dict[str, Any], vision: dict[str, Any]) -> list[Case]:
    arguments = {"text_config": text, "vision_config": vision, "audio_config": AUDIO}
    ids = {"user_token_id": 507, **OMNI_IDS}
    if home == "qwen2_5_omni":
        ids |= {"image_token_index": 500, "video_token_index": 501, "audio_token_index": 504}
        ids |= {"vision_start_token_id": 502, "vision_end_token_id": 503}
    else:
        ids |= {**IDS, "position_id_per_seconds": 13}
    whole = {"thinker_config": arguments | ids, "enable_audio_output": False}
    family = home
    return [
        Case(
            home, f"{stem}ThinkerForConditionalGeneration", f"{stem}ThinkerConfig",
            arguments | ids, "visual", family, published=("visual.",),
        ),
        Case(
            home, f"{stem}ForConditionalGeneration", f"{stem}Config", whole, "thinker.visual",
            family, published=("thinker.visual.",),
        ),
    ]  # fmt: skip


CASES = {
    "qwen3_5": _vlm("qwen3_5", "Qwen3_5", TEXT | LINEAR, PLAIN, family="qwen3_5"),
    "qwen3_5_moe": _vlm(
        "qwen3_5_moe", "Qwen3_5Moe", TEXT | LINEAR | EXPERTS, PLAIN, family="qwen3_5"
    ),
    "qwen4_exp": _vlm(
        "qwen4_exp", "Qwen4Exp", TEXT | LINEAR | EXPERTS | INDEXER, PLAIN, family="qwen3_5"
    ),
    "cohere_compass": _vlm(
        "cohere_compass", "CohereCompass", TEXT | {"rope_parameters": COMPASS_ROPE},
        DEEPSTACK, family="cohere_compass",
    ),
    "cosmos3_omni": _vlm(
        "cosmos3_omni", "Cosmos3Omni", TEXT | {"model_type": "qwen3_vl_text"},
        DEEPSTACK | {"model_type": "qwen3_vl"}, family="qwen3_vl", published=("", "model.visual."),
    ),
    "colqwen2": _col("qwen2_vl", QWEN2),
    "colqwen2.5": _col("qwen2_5_vl", WINDOWS),
    "hyperclovax_vision_v2": Case(
        "hyperclovax_vision_v2", "HyperCLOVAXVisionV2ForConditionalGeneration",
        "HyperCLOVAXVisionV2Config",
        {
            "text_config": TEXT
            | {"model_type": "hyperclovax", "rope_parameters": {"rope_theta": 1e4, **ROPE}},
            "vision_config": WINDOWS | {"model_type": "qwen2_5_vl"},
            "image_token_id": 500, "video_token_id": 501,
        },
        "model.vision_model", "qwen2_5_vl", published=("model.vision_model.",),
    ),
    **dict(
        zip(
            ("qwen2_5_omni_thinker", "qwen2_5_omni"),
            _thinker("qwen2_5_omni", "Qwen2_5Omni", TEXT, WINDOWS),
            strict=True,
        )
    ),
    **dict(
        zip(
            ("qwen3_omni_moe_thinker", "qwen3_omni_moe"),
            _thinker("qwen3_omni_moe", "Qwen3OmniMoe", TEXT | EXPERTS, DEEPSTACK),
            strict=True,
        )
    ),
}  # fmt: skip
LAYOUTS = {
    "image": [(1, 8, 12)],
    "video": [(3, 6, 8)],
    "mixed": [(1, 4, 6), (4, 6, 4), (1, 2, 2), (1, 14, 2), (2, 10, 18)],
}


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a model shows in its output."""
    halves = ("qkv.weight", "q_proj.weight", "k_proj.weight", "attn.q.weight", "attn.k.weight")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            # a stack of experts [E, out, in] has the fan-in of one of them
            fan_in = p.shape[-1] if p.ndim <= 3 else p[0].numel()
            p.normal_(0, 0.3 if "pos_embed" in name else 1 / math.sqrt(fan_in))
            if name.endswith(halves):
                p.mul_(2)


@cache
def built(name: str) -> Any:
    """The model of a case; tests leave it as it was."""
    return CASES[name].build()


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every case in turn that the installed transformers has."""
    case = CASES[request.param]
    if not importlib.util.find_spec(f"transformers.models.{case.home}"):
        pytest.skip(f"this release of transformers has no {case.home}")
    return case


@pytest.fixture
def model(request: pytest.FixtureRequest, case: Case) -> Any:
    """The full model of `case`."""
    return built(request.node.callspec.params["case"])


def pixel_rows(tower: Any, grids: Any) -> torch.Tensor:
    config, count = tower.config, sum(math.prod(grid) for grid in grids)
    width = 3 * config.temporal_patch_size * config.patch_size**2
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def in_double(tower: Any) -> Any:
    """The tower in fp64: the oracle.

    HF keeps rope and RMSNorm in fp32 in any dtype, an error far below that of fp32 throughout.
    """
    return copy.deepcopy(tower).double()


def named(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output, HF's or ours."""
    outputs = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    features = getattr(output, "deepstack_features", None) or []
    return outputs | {f"deepstack_features[{j}]": x for j, x in enumerate(features)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_parity(case, model, layout):
    tower, grids = case.tower(model), LAYOUTS[layout]
    pixels, grid = pixel_rows(tower, grids), torch.tensor(grids)
    with torch.no_grad():
        oracle = named(in_double(tower)(pixels.double(), grid))
        theirs = named(tower(pixels, grid))
        ours = named(VisionEncoder.from_hf(tower)(pixels, grid))
    assert list(ours) == list(theirs)
    for name, exact in oracle.items():
        assert_as_accurate(ours[name], theirs[name], exact, name=name)


def test_weights_both_ways(case, model):
    tower = case.tower(model)
    encoder = VisionEncoder.from_hf(tower)
    assert encoder.spec.family == case.family
    ours, theirs = encoder.state_dict(), tower.state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    fresh = type(tower)(tower.config)
    fresh.load_state_dict(ours)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.5)
    encoder.load_weights(fresh)
    for name, value in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


@pytest.mark.parametrize("level", ["whole", "inner", "tower's holder"])
def test_swap_finds_the_tower(case, model, level):
    tower = case.tower(model)
    names = case.path.split(".")
    if level == "inner":
        for name in names[:-2]:
            model = getattr(model, name)
    elif level == "tower's holder":
        for name in names[:-1]:
            model = getattr(model, name)
    with swap_vision_tower(model, graphs=False) as handle:
        assert handle.tower is tower
    assert "forward" not in vars(tower)


def prompt(case: Case, tower: Any) -> dict[str, torch.Tensor]:
    """Two images in a prompt; their patches come as the model's own processor hands them over."""
    grids = [(1, 8, 12), (1, 4, 6)]
    runs = [(502, 1), (500, 24), (503, 1), (502, 1), (500, 6), (503, 1), (11, 2)]
    ids = torch.tensor([[token for token, count in runs for _ in range(count)]])
    rows = pixel_rows(tower, grids)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": rows,
        "image_grid_thw": torch.tensor(grids),
    }
    if case.home == "colqwen2":  # padded: one row of patches for each image
        parts = rows.split([math.prod(grid) for grid in grids])
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    elif "omni_moe" not in case.home and "2_5_omni" not in case.home:
        inputs["mm_token_type_ids"] = (ids == 500).long()
    return inputs


def test_a_swapped_model_answers_as_before(case, model):
    tower = case.tower(model)
    language = model.thinker if case.path == "thinker.visual" else model
    inputs = prompt(case, tower)

    def answer(**changes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = language(**(inputs | changes))
        return output.embeddings if case.home == "colqwen2" else output.logits

    before = answer()
    blind = answer(pixel_values=torch.zeros_like(inputs["pixel_values"]))
    assert rel_rms(blind, before) > 1e-2  # or the comparison would not see the tower
    with swap_vision_tower(model) as handle:
        swapped = answer()
        stats = handle.stats()
    assert stats.fused_calls == 1
    assert stats.hf_calls == {}
    assert torch.equal(answer(), before)

    def rounded(_tower: Any, _inputs: Any, output: Any) -> Any:
        for name, value in output.items():
            is_list = isinstance(value, list)
            output[name] = [x.float() for x in value] if is_list else value.float()
        return output

    # in fp64 alone: the text model is the same in all three
    hook = tower.double().register_forward_hook(rounded)
    try:
        oracle = answer()
    finally:
        hook.remove()
        tower.float()  # exact: the values were fp32
    assert_as_accurate(swapped, before, oracle, name="answer")


def test_features_of_images_and_videos(case, model):
    if case.home == "colqwen2":
        pytest.skip("ColQwen2 has no get_image_features")
    tower = case.tower(model)
    holder = model.thinker if case.path == "thinker.visual" else model
    kinds = {"image": [(1, 8, 12), (1, 4, 6)], "video": [(2, 4, 8)]}
    for kind, grids in kinds.items():
        method: Callable[..., Any] = getattr(holder, f"get_{kind}_features")
        pixels, grid = pixel_rows(tower, grids), torch.tensor(grids)
        with torch.no_grad():
            expected = method(pixels, grid)
            oracle = in_double(tower)(pixels.double(), grid).pooler_output
            with swap_vision_tower(model) as handle:
                actual = method(pixels, grid)
                assert handle.stats().fused_calls == 1
        assert type(actual) is type(expected)
        assert list(actual) == list(expected)
        ours, theirs = actual.pooler_output, expected.pooler_output
        assert [len(x) for x in ours] == [len(x) for x in theirs]
        if not isinstance(theirs, torch.Tensor):  # by item; omni of transformers 5.13 is not
            ours, theirs = torch.cat(tuple(ours)), torch.cat(tuple(theirs))
        assert_as_accurate(ours, theirs, oracle, name=kind)


def rewritten(folder: Path, tower: Any, prefix: str) -> None:
    """Give the tower's tensors in `folder` the names of a published checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    names = set(tower.state_dict())
    others = {k: v for k, v in tensors.items() if not any(k.endswith(name) for name in names)}
    state = {f"{prefix}{name}": value.contiguous() for name, value in tower.state_dict().items()}
    save_file(others | state, folder / "model.safetensors", metadata={"format": "pt"})


def test_from_pretrained(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    tower = case.tower(model)
    for prefix in (None, *case.published):
        if prefix is not None:
            rewritten(tmp_path, tower, prefix)
        encoder = VisionEncoder.from_pretrained(tmp_path, device="cpu")
        assert encoder.spec == VisionEncoder.from_hf(tower).spec
        for name, value in tower.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], value), (prefix, name)


def test_embedder_uses_the_processor_of_the_folder(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    tower = case.tower(model)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 20000, "longest_edge": 60000}, patch_size=tower.config.patch_size
    )
    processor.save_pretrained(tmp_path)
    image = Image.open(DATA / "coffee.jpg")
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        output = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    tokens = embedder.encode(image, pool="tokens")
    assert isinstance(embedder.preprocessor, ImagePreprocessor)
    assert rel_rms(torch.from_numpy(tokens), output.pooler_output) < 1e-4
    video = {"frames": np.zeros((4, 64, 96, 3), dtype=np.uint8), "fps": 2.0}
    assert embedder.encode(video).shape == (64,)
