"""Kimi-VL's tower, which transformers has no class for, against a plain MoonViT written here.

And against transformers' tower of Kimi-K2.5, which computes the same for one frame.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.models.kimi_k25 import modeling_kimi_k25 as home
from typer.testing import CliRunner
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.encoder import (
    Embedder,
    MediaError,
    VisionEncoder,
    encoder_for,
    load_encoder,
    swap_vision_tower,
)
from vitgraph.encoder.checkpoint import Checkpoint
from vitgraph.encoder.cli import app
from vitgraph.encoder.families import FAMILIES
from vitgraph.encoder.kimi_vl import vision_config
from vitgraph.encoder.kimi_vl_preprocess import MoonViTPreprocessor
from vitgraph.encoder.load import tower_spec
from vitgraph.encoder.media import Video
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

DATA = Path(__file__).parents[1] / "data"
SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
}  # fmt: skip
FULL_WIDTH: dict[str, Any] = {
    "hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 1,
    "intermediate_size": 4304,
}  # fmt: skip
# as the files of published checkpoints have them
RELEASED = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor",
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
    },
    "in_token_limit": 4096, "patch_size": 14, "num_pooled_tokens": 1024, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "pad_input": True,
}  # fmt: skip
CONFIG = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
        "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration",
    },
    "model_type": "kimi_vl",
    "text_config": {"model_type": "deepseek_v3", "hidden_size": 48},
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3)).astype(np.uint8))
GRIDS = [(1, 8, 12), (1, 4, 6), (1, 2, 2), (1, 34, 6), (1, 8, 8), (1, 6, 20)]
Tensors = dict[str, torch.Tensor]


def build_tower(side: int = 8, **sizes: Any) -> Any:
    """Kimi-K2.5's, boosted."""
    torch.manual_seed(0)
    cls: Any = home.Kimi_K25VisionModel
    sizes = (sizes or SMALL) | {"pos_emb_height": side, "pos_emb_width": side}
    tower = cls._from_config(cls.config_class(**sizes))
    with torch.no_grad():
        for name, p in tower.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            p.normal_(0, 0.3 if "position_embeddings" in name else p[0].numel() ** -0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(2)
    return tower.eval()


def published(tower: Any) -> Tensors:
    """The weights of `tower` as Kimi-VL's checkpoints name and order them."""
    state, heads = tower.state_dict(), tower.config.num_attention_heads
    renamed = {
        "patch_embed.proj.weight": state["patch_embed.proj.weight"],
        "patch_embed.proj.bias": state["patch_embed.proj.bias"],
        "patch_embed.pos_emb.weight": state["patch_embed.pos_emb.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        renamed[f"encoder.final_layernorm.{kind}"] = state[f"final_layernorm.{kind}"]
        for i in range(tower.config.num_hidden_layers):
            ours, theirs = f"encoder.blocks.{i}", f"layers.{i}"
            for name, hf in (
                ("norm0", "norm1"), ("norm1", "norm2"), ("wo", "attn.proj"), ("mlp.fc0", "mlp.fc1"),
                ("mlp.fc1", "mlp.fc2"),
            ):  # fmt: skip
                renamed[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{hf}.{kind}"]
            q, k, v = (state[f"{theirs}.attn.{part}_proj.{kind}"] for part in "qkv")
            # halves of a head back to neighbours
            q, k = (x.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(x.shape) for x in (q, k))
            renamed[f"{ours}.wqkv.{kind}"] = torch.cat((q, k, v))
    return {f"vision_tower.{name}": value.contiguous() for name, value in renamed.items()}


def write_folder(folder: Path, tensors: Tensors, config: Any = None, **processor: Any) -> Path:
    """A checkpoint in two files, of the tower `tensors` and a piece of the rest."""
    folder.mkdir(exist_ok=True)
    vision = {"model_type": "moonvit", "init_pos_emb_height": 8, "init_pos_emb_width": 8, **SMALL}
    raw = CONFIG | {"vision_config": vision} | (config or {})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps(RELEASED | processor))
    rest = {
        "multi_modal_projector.pre_norm.weight": torch.ones(64),
        "multi_modal_projector.linear_1.weight": torch.ones(256, 256),
        "language_model.model.norm.weight": torch.ones(48),
    }
    names = sorted(tensors)
    shards = [
        {name: tensors[name] for name in names[::2]},
        {name: tensors[name] for name in names[1::2]},
    ]
    shards[1] |= rest
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", published(build_tower()))


def patches(grids: Any, seed: int = 1) -> torch.Tensor:
    """[T, 3, 14, 14], as the processor hands them over."""
    count = sum(math.prod(grid) for grid in grids)
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def plain_moonvit(
    tensors: Tensors, pixels: torch.Tensor, grids: Any, heads: int, *, mode: str = "bicubic",
    swap_axes: bool = False, theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """States behind the last norm, and patches of a token side by side, by published names."""
    w = {name.removeprefix("vision_tower."): value.to(pixels) for name, value in tensors.items()}
    states, tokens = [], []
    depth = 1 + max(int(n.split(".")[2]) for n in w if n.startswith("encoder.blocks."))
    for image, (_, rows, columns) in zip(
        pixels.split([math.prod(grid) for grid in grids]), grids, strict=True
    ):
        x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
        table = w["patch_embed.pos_emb.weight"].permute(2, 0, 1)[None]
        x = x.flatten(1) + F.interpolate(table, (rows, columns), mode=mode)[0].flatten(1).T
        # of the pairs of neighbours in a head, the even ones turn by column, the odd ones by row
        size = x.shape[1] // heads
        speed = theta ** (-torch.arange(0, size, 4, dtype=x.dtype, device=x.device) / size)
        column, row = (i.to(x)[:, None] * speed for i in (
            torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)
        ))  # fmt: skip
        pair = (row, column) if swap_axes else (column, row)
        angle = torch.stack(pair, -1).flatten(1)[:, None]

        def turned(y: torch.Tensor, angle: torch.Tensor = angle) -> torch.Tensor:
            a, b = y[..., 0::2], y[..., 1::2]
            sin, cos = angle.sin(), angle.cos()
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        for i in range(depth):

            def layer(name: str, y: torch.Tensor, i: int = i) -> torch.Tensor:
                stem = f"encoder.blocks.{i}.{name}"
                weight, bias = w[f"{stem}.weight"], w[f"{stem}.bias"]
                if "norm" in name:
                    return F.layer_norm(y, y.shape[-1:], weight, bias, 1e-5)
                return F.linear(y, weight, bias)

            q, k, v = layer("wqkv", layer("norm0", x)).view(len(x), 3, heads, size).unbind(1)
            q, k = turned(q), turned(k)
            scores = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + layer("wo", mixed)
            hidden = F.gelu(layer("mlp.fc0", layer("norm1", x)), approximate="tanh")
            x = x + layer("mlp.fc1", hidden)
        stem = "encoder.final_layernorm"
        x = F.layer_norm(x, x.shape[-1:], w[f"{stem}.weight"], w[f"{stem}.bias"], 1e-5)
        states.append(x)
        blocks = x.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2)
        tokens.append(blocks.reshape(rows * columns // 4, -1))
    return torch.cat(states), torch.cat(tokens)


def both(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return output.last_hidden_state, output.pooler_output.flatten(1)


def check(encoder: Any, tower: Any, grids: Any) -> None:
    """Ours against both oracles: the plain one, and transformers'."""
    tensors, heads, pixels = published(tower), tower.config.num_attention_heads, patches(grids)
    oracle = plain_moonvit(tensors, pixels.double(), grids, heads)
    theirs = plain_moonvit(tensors, pixels, grids, heads)
    ours = both(encoder(pixels, grids))
    with torch.no_grad():
        hf = both(tower(pixels, torch.tensor(grids)))
    for name, *values in zip(("last", "pooled"), ours, theirs, oracle, strict=True):
        assert_as_accurate(*values, factor=2.0, name=name)
    for ours_, hf_ in zip(ours, hf, strict=True):
        assert ours_.shape == hf_.shape
        assert rel_rms(ours_, hf_) < 3e-5


def test_a_folder_with_published_names(folder):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    assert encoder.spec.family == "kimi_vl"
    check(encoder, build_tower(), GRIDS)


def test_full_width_block(tmp_path):
    tower = build_tower(64, **FULL_WIDTH)
    config = {"vision_config": {"model_type": "moonvit", **FULL_WIDTH}}
    folder = write_folder(tmp_path, published(tower), config)
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    assert (encoder.spec.position_grid, encoder.spec.head_dim) == (64, 72)
    check(encoder, tower, [(1, 8, 12), (1, 2, 6)])


@pytest.mark.parametrize(
    "change", [{"theta": 1e9}, {"swap_axes": True}, {"mode": "bilinear"}], ids=str
)
def test_the_weights_are_not_blind(change, folder):
    ours = both(VisionEncoder.from_pretrained(folder, device="cpu")(patches(GRIDS), GRIDS))[1]
    tensors = published(build_tower())
    assert rel_rms(ours, plain_moonvit(tensors, patches(GRIDS), GRIDS, 2)[1]) < 3e-5
    assert rel_rms(ours, plain_moonvit(tensors, patches(GRIDS), GRIDS, 2, **change)[1]) > 1e-2


def test_names_both_ways(folder, tmp_path):
    """Published ones come in, transformers' of Kimi-K2.5's tower go out, and come in again."""
    state = build_tower().state_dict()
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    assert encoder.state_dict().keys() == state.keys()
    for prefix in ("vision_tower.", "model.vision_tower."):
        tensors = {prefix + name: x.contiguous() for name, x in encoder.state_dict().items()}
        encoder = VisionEncoder.from_pretrained(write_folder(tmp_path, tensors), device="cpu")
        for name, value in state.items():
            assert torch.equal(encoder.state_dict()[name], value), name


def test_transformers_is_not_asked(folder, monkeypatch):
    """It would ask for the code that comes with the checkpoint."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("asked")

    for name in ("AutoConfig", "AutoModel", "AutoProcessor"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    encoder = load_encoder(folder, device="cpu")
    assert isinstance(encoder, VisionEncoder)
    assert encoder.spec == tower_spec(Checkpoint.open(folder))
    assert Embedder.from_pretrained(folder, device="cpu").encoder.spec == encoder.spec


def test_defaults_are_those_of_the_released_towers():
    released = {
        "model_type": "moonvit", "patch_size": 14, "num_attention_heads": 16,
        "num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304,
        "init_pos_emb_height": 64, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    spec = FAMILIES["kimi_vl"].spec(vision_config({"vision_config": released}))
    assert (spec.family, spec.depth, spec.hidden_size) == ("kimi_vl", 27, 1152)
    assert (spec.num_heads, spec.mlp_size, spec.out_size) == (16, 4304, 4608)
    assert (spec.patch_size, spec.merge_size, spec.position_grid) == (14, 2, 64)
    assert spec.images_only
    for missing in ({}, {"vision_config": {}}):
        assert FAMILIES["kimi_vl"].spec(vision_config(missing)) == spec
    for bad in (None, [], "moonvit"):
        with pytest.raises(ValueError, match=r"vision_config = .* must be an object; correct"):
            vision_config({"model_type": "kimi_vl", "vision_config": bad})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "kimi_k25_vision"}, "tower of type 'kimi_k25_vision' here; only 'moonvit'"),
        ({"init_pos_emb_width": 9}, "init_pos_emb_height, init_pos_emb_width = 8, 9 is not suppor"),
        ({"merge_kernel_size": [2, 1]}, "moonvit: merge_kernel_size = 2, 1 is not supported"),
        ({"merge_kernel_size": 2}, "merge_kernel_size = 2 must be two positive integers; correct"),
        ({"merge_kernel_size": [2]}, r"merge_kernel_size = \[2\] must be two positive integers"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be a positive integer; correct vision_co"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive integer"),
        ({"patch_size": None}, "patch_size = None must be a positive integer"),
        ({"num_hidden_layers": 4}, "tensor 'layers.3.norm1.weight' is missing"),
        ({"hidden_size": 32}, r"wqkv\.\w+' has shape \[192.* expected 96 rows of q, k and v"),
    ],
)
def test_configs_that_are_refused(change, message, folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["vision_config"] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_pretrained(folder, device="cpu")


def test_frames_are_refused(folder):
    encoder, grids = VisionEncoder.from_pretrained(folder, device="cpu"), [(1, 2, 2), (2, 2, 2)]
    message = r"grid_thw\[1\] = \(2, 2, 2\): 2 frames, but a tower of kimi_vl reads images, whi"
    for given in (grids, torch.tensor(grids), [list(grid) for grid in grids]):
        with pytest.raises(ValueError, match=message):
            encoder(patches(grids), given)
    with pytest.raises(ValueError, match="drops tokens of videos, and a tower of kimi_vl rea"):
        encoder(patches(grids[:1]), grids[:1], pruning_rate=0.5)


def test_replays_of_padded_graphs(folder, rerun_recorder):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu", dtype=torch.float64)
    batches = [[(1, 8, 12), (1, 2, 6)], [(1, 4, 4), (1, 2, 2), (1, 2, 4)], [(1, 2, 4)]]
    eager = [encoder(patches(grids, i), grids) for i, grids in enumerate(batches)]
    config = {"token_budgets": [12, 40], "max_vision_items_per_batch": 4}
    encoder.graphs = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    encoder.graphs.capture()
    for i in (0, 1, 2, 0, 2):  # each finds the rows of the one before in its buffers
        replayed = encoder(patches(batches[i], i), batches[i])
        for ours, exact in zip(both(replayed), both(eager[i]), strict=True):
            assert ours.shape == exact.shape
            assert rel_rms(ours, exact) < 1e-12
    assert encoder.graphs.stats()["misses"] == 0


# a live model that came with its own code: no more than what is looked at
class MoonVitPretrainedModel(torch.nn.Module):
    def forward(self, pixel_values: torch.Tensor, grid_hws: torch.Tensor) -> torch.Tensor:
        return pixel_values + grid_hws


def test_a_live_model_is_told_what_to_do():
    model = torch.nn.Module()
    model.vision_tower = MoonVitPretrainedModel()
    for tier in ("auto", "fused", "generic"):
        with pytest.raises(
            ValueError, match=r"no class for: it .*pretrained\(folder or .*unflatten"
        ):
            swap_vision_tower(model, tier=tier)
    for make in (encoder_for, VisionEncoder.from_hf):
        with pytest.raises(ValueError, match=r"came with its .*from_pretrained\(folder or Hub id"):
            make(model.vision_tower)
    model.vision_tower = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="its vision tower is a Linear; supported") as error:
        swap_vision_tower(model)
    assert "Kimi-VL" not in str(error.value)


def test_the_projector_of_a_live_model_takes_what_the_error_names(folder):
    """It joins a list of [tokens, patches, hidden_size], and normalises each patch."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    tokens = encoder(patches(GRIDS), GRIDS).pooler_output
    hidden_size = encoder.spec.hidden_size
    joined = torch.cat([tokens.unflatten(1, (-1, hidden_size))])
    normed = F.layer_norm(joined, (hidden_size,)).view(-1, 4 * hidden_size)
    oracle = plain_moonvit(published(build_tower()), patches(GRIDS), GRIDS, 2)[1]
    wanted = F.layer_norm(oracle.unflatten(1, (4, hidden_size)), (hidden_size,)).flatten(1)
    assert rel_rms(normed, wanted) < 3e-5


def test_embedder(folder):
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert isinstance(embedder.preprocessor, MoonViTPreprocessor)
    images = [DATA / "coffee.jpg", NOISE, DATA / "chelsea.png"]
    tokens = embedder.encode(images, pool="tokens", batch_size=2)
    tensors = published(build_tower())
    expected = []
    for image, ours in zip(images, tokens, strict=True):
        rows, grid = embedder.preprocessor(image)
        pixels = torch.from_numpy(rows).view(-1, 3, 14, 14)
        oracle = plain_moonvit(tensors, pixels, [grid], 2)[1]
        assert rel_rms(torch.from_numpy(ours), oracle) < 1e-4
        expected.append(oracle.mean(0))
    assert rel_rms(torch.from_numpy(embedder.encode(images)), torch.stack(expected)) < 1e-4
    for video in (DATA / "pan.mp4", Video(np.stack([np.array(NOISE)] * 2))):
        with pytest.raises(MediaError, match="is a video, and this model reads images"):
            embedder.encode([video])
    with pytest.raises(ValueError, match="a tower of kimi_vl reads images; leave pruning_rate"):
        embedder.encode(images, pruning_rate=0.5)


def test_command_line(folder, tmp_path):
    output = tmp_path / "out.safetensors"
    arguments = ["embed", folder, DATA / "rocket.jpg", DATA / "pan.mp4", "-o", output]
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu", "-q"])
    assert result.exit_code == 1, result.output
    assert "pan.mp4: is a video, and this model reads images" in result.stderr
    with safe_open(output, "np") as file:
        assert file.get_tensor("embeddings").shape == (1, 256)
    result = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["families"]["kimi_vl"] == "Kimi-VL"
    assert report["spec"]["family"] == "kimi_vl"
    assert report["spec"]["images_only"] is True


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(tmp_path):
    """In bf16 as accurate as transformers' tower of Kimi-K2.5, eagerly and replayed."""
    sizes = FULL_WIDTH | {"num_hidden_layers": 3}
    tower = build_tower(64, **sizes)
    for p in tower.parameters():  # not the frequencies of the rope
        p.data = p.data.bfloat16()
    config = {"vision_config": {"model_type": "moonvit", **sizes}}
    folder = write_folder(tmp_path, published(tower), config)
    encoder = VisionEncoder.from_pretrained(folder, dtype="bfloat16", device="cuda")
    pixels = patches(GRIDS).cuda().bfloat16()
    oracle = plain_moonvit(published(tower), pixels.double(), GRIDS, 16)
    theirs = both(tower.cuda()(pixels, torch.tensor(GRIDS, device="cuda")))
    for is_captured in (False, True):
        if is_captured:
            encoder.capture({"token_budgets": [len(pixels) // 4]})
        ours = both(encoder(pixels, GRIDS))
        for name, *values in zip(("last", "pooled"), ours, theirs, oracle, strict=True):
            assert_as_accurate(*values, factor=1.3, name=name)
    assert encoder.graphs.stats()["misses"] == 0
