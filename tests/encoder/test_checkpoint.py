import json

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from vitgraph.encoder.checkpoint import Checkpoint, CheckpointError
from vitgraph.encoder.vision_encoder import VisionEncoder

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(text_config=TEXT, vision_config=VISION)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def compare(encoder, model):
    state = encoder.state_dict()
    for key, value in model.model.visual.state_dict().items():
        assert torch.equal(state[key], value), key


def test_single_file(folder, model):
    encoder = VisionEncoder.from_pretrained(folder)
    assert encoder.source == str(folder)
    assert encoder.revision is None
    compare(encoder, model)


def test_only_shards_of_the_tower_are_opened(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    tower = {shard for key, shard in index.items() if "visual" in key}
    others = set(index.values()) - tower
    assert others
    for shard in others:
        (tmp_path / shard).write_bytes(b"not a safetensors file")
    compare(VisionEncoder.from_pretrained(tmp_path, device="cpu"), model)


def test_both_key_styles(folder, model):
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("model."): v for k, v in load_file(file).items()}
    assert any(key.startswith("visual.") for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    compare(VisionEncoder.from_pretrained(folder, device="cpu"), model)


def test_the_language_model_is_never_built(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.Qwen3VLForConditionalGeneration, "__init__", refuse)
    monkeypatch.setattr(transformers.Qwen3VLTextModel, "__init__", refuse)
    VisionEncoder.from_pretrained(folder, device="cpu")


def test_a_missing_tensor_is_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.visual.blocks.1.attn.qkv.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.bias' is missing"):
        VisionEncoder.from_pretrained(folder, device="cpu")


def test_a_misshapen_tensor_is_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.visual.pos_embed.weight"] = torch.zeros(63, 64)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'pos_embed.weight' has shape \[63, 64\]"):
        VisionEncoder.from_pretrained(folder, device="cpu")


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors"):
        VisionEncoder.from_pretrained(folder, device="cpu")


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(shard for key, shard in index.items() if "visual" in key)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} is missing"):
        VisionEncoder.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "not a JSON object"),
        ({"config.json": "[1]"}, "not a JSON object but a list"),
        ({"config.json": '{"model_type": ["qwen3_vl"]}'}, "has no supported vision tower"),
        ({"config.json": '{"model_type": "llama"}'}, "'llama' has no supported vision tower"),
        ({"config.json": '{"model_type": "qwen3_vl"}'}, "neither model.safetensors nor"),
    ],
)
def test_broken_folders(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_pretrained(tmp_path, device="cpu")


def test_a_checkpoint_without_tower(folder):
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        VisionEncoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["no/such/folder", "bad name!", "no-owner/no-model"])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        Checkpoint.open(name, local_files_only=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"dtype": "nonsense"}, "use 'bfloat16'"),
        ({"device": "toaster"}, "device = 'toaster'"),
        ({"device": "meta"}, "not supported"),
        ({"attention": "fa9"}, "fa9"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_pretrained(folder, **({"device": "cpu"} | arguments))


def test_dtypes(folder):
    assert VisionEncoder.from_pretrained(folder, device="cpu").dtype == torch.float32
    half = VisionEncoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half(torch.randn(4, 1536), [(1, 2, 2)]).pooler_output.dtype == torch.bfloat16


def test_a_lost_connection_is_not_taken_for_a_missing_file(folder, monkeypatch):
    """Preprocessing settings that could not be fetched must not become the family's defaults."""

    def download(_repo, name, **_):
        if name == "preprocessor_config.json":
            raise LocalEntryNotFoundError("connection reset")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json could not be fetched"):
        Checkpoint.open("owner/model")


def test_files_of_a_hub_model_are_of_one_commit(folder, monkeypatch):
    asked = []

    def download(_repo, name, *, revision, **_):
        asked.append((name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    checkpoint = Checkpoint.open("owner/model", revision="main")
    VisionEncoder.from_checkpoint(checkpoint, device="cpu")
    assert asked[0] == ("config.json", "main")
    assert {revision for _, revision in asked[1:]} == {folder.name}
    assert checkpoint.revision == folder.name
