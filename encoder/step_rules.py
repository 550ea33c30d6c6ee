"""Where the tensors of the Step towers are in a checkpoint, by Hugging Face's names."""

from .image_spec import ImageTowerSpec
from .weight_map import Rule, linear, norm


def step3p7(s: ImageTowerSpec) -> list[Rule]:
    """Rules for every tensor of the tower of Step-3.7 and Step3-VL-10B, and its projector."""
    D, F = s.hidden_size, s.mlp_size
    rules = _stem(s, s.position_grid**2)
    rules += norm("embed_norm", "vision_model.pre_layernorm", D, "layer")
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"vision_model.layers.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.layernorm_before", D, "layer")
        for part, shape in (("weight", (D, D)), ("bias", (D,))):
            sources = tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv")
            rules.append(Rule(f"{ours}.qkv.{part}", sources, shape))
        rules += linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj", D, D)
        rules.append(Rule(f"{ours}.scale1", (f"{theirs}.lambda_1",), (D,)))
        rules += norm(f"{ours}.norm2", f"{theirs}.layernorm_after", D, "layer")
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
        rules.append(Rule(f"{ours}.scale2", (f"{theirs}.lambda_2",), (D,)))
    convolutions = ("vision_model.downsampler1", "vision_model.downsampler2")
    return rules + _tail(s, convolutions, "multi_modal_projector")


def step3_vl(s: ImageTowerSpec) -> list[Rule]:
    """Rules for every tensor of the tower of Step3, and its projector."""
    D, F = s.hidden_size, s.mlp_size
    rules = _stem(s, s.position_grid**2 + 1)
    rules.append(Rule("class_row", ("vision_model.embeddings.class_embedding",), (1, D)))
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"vision_model.transformer.layers.{i}"
        rules += linear(f"{ours}.qkv", f"{theirs}.self_attn.qkv_proj", 3 * D, D)
        rules += linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj", D, D)
        rules += norm(f"{ours}.norm1", f"{theirs}.layer_norm1", D, "layer")
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
        rules += norm(f"{ours}.norm2", f"{theirs}.layer_norm2", D, "layer")
    return rules + _tail(s, ("vit_downsampler", "vit_downsampler2"), "vit_large_projector")


def _stem(s: ImageTowerSpec, rows: int) -> list[Rule]:
    theirs, kernel = "vision_model.embeddings", (s.hidden_size, s.in_channels) + 2 * (s.patch_size,)
    rules = [Rule("patch.weight", (f"{theirs}.patch_embedding.weight",), kernel)]
    if s.patch_bias:
        rules.append(Rule("patch.bias", (f"{theirs}.patch_embedding.bias",), (s.hidden_size,)))
    table = (f"{theirs}.position_embedding.weight",)
    return [*rules, Rule("position.table", table, (rows, s.hidden_size))]


def _tail(s: ImageTowerSpec, convolutions: tuple[str, str], projector: str) -> list[Rule]:
    rules: list[Rule] = []
    width = s.hidden_size
    for j, (conv, theirs) in enumerate(zip(s.downsamples, convolutions, strict=True)):
        shape = (conv.width, width, conv.kernel, conv.kernel)
        # the column order of `kernels.conv_rows`
        rules.append(Rule(f"down.{j}.weight", (f"{theirs}.weight",), shape, axes=(0, 2, 3, 1)))
        rules.append(Rule(f"down.{j}.bias", (f"{theirs}.bias",), (conv.width,)))
        width = conv.width
    if s.out_size:
        rules += linear("projector", projector, s.out_size, width, bias=s.projector_bias)
    return rules
