"""What `tune` measures: linear layers of every published tower, and attention by length class.

Layers of one shape and epilogue are one measurement, whichever towers they come from. Mergers work
on tokens, so a batch of so many patches gives them a quarter of its rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..capture.budgets import generate_budgets
from ..encoder.families import FAMILIES
from ..encoder.image_spec import ImageTowerSpec
from ..encoder.spec import EncoderSpec
from ..kernels import library_tuning
from ..kernels.gemm_tuning import GATED, RESIDUAL, ROTATED
from .internvl_contest import INTERNVL_TOWERS, internvl_spec
from .step_config import STEP_TOWERS
from .towers_config import TOWERS

# the rungs of the automatic ladder, four patches a token: which algorithm of the library is the
# fastest changes from one to the next
PATCHES = (128, *(4 * tokens for tokens in generate_budgets(64, 8192)), 65536)
# frames and rows of each: one small image, one and eight of 448 x 448, 1024 x 1024, 2048 x 2048,
# a long video; and those between which the rule changes from one kernel to another
_SEGMENTS = (
    *((1, 196), (1, 400), (1, 576), (1, 784), (1, 1296), (1, 1600), (1, 2304), (1, 3136)),
    *((1, 4096), (1, 5184), (1, 6144), (1, 9216), (1, 16384)),
    *((4, 576), (3, 784), (16, 256), (8, 784), (32, 196), (64, 256)),
    *((8, 2048), (8, 3072), (64, 1024)),
)


@dataclass(frozen=True)
class LinearShape:
    """weight [N, K] and its epilogue, a name of gemm_tuning.py; `patches_per_row` of a merger."""

    label: str
    N: int
    K: int
    epilogue: str
    patches_per_row: int = 1

    @property
    def key(self) -> tuple[int, int, str]:
        """As the launch table names it."""
        return self.N, self.K, self.epilogue

    @property
    def library_key(self) -> tuple[int, int, str]:
        """As library_tuning.py names it, by what the library itself does after the product."""
        in_library = self.epilogue in library_tuning.EPILOGUES
        return self.N, self.K, self.epilogue if in_library else ""

    def rows(self, patches: Iterable[int]) -> tuple[int, ...]:
        """M of this layer for batches of so many patches, ascending."""
        return tuple(sorted({max(1, count // self.patches_per_row) for count in patches}))


@dataclass(frozen=True)
class AttentionShape:
    """Attention over segments of `lengths` rows."""

    label: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int


def layers(spec: EncoderSpec | ImageTowerSpec) -> dict[str, LinearShape]:
    """Linear layers of a tower by name, as its prepared weights have them."""
    if isinstance(spec, ImageTowerSpec):
        return _image_layers(spec)
    D, F, group = spec.hidden_size, spec.padded_mlp_size, spec.patches_per_token
    is_gated = spec.mlp == "gated"
    # bounded gates are a kernel of their own
    gated = GATED if spec.gate_limit is None else ""
    found = {
        "qkv": (3 * D, D, "", 1),
        "proj": (D, D, RESIDUAL, 1),
        "up": (2 * F, D, gated, 1) if is_gated else (F, D, spec.activation, 1),
        "down": (D, F, RESIDUAL, 1),
    }
    if spec.rotates_neighbours:
        found["qkv+rope"] = (3 * D, D, ROTATED, 1)
    out = spec.out_size
    if spec.merger == "glm":
        found |= {
            "merger join": (out, group * D, "", group),
            "merger proj": (out, out, "", group),
            "merger up": (2 * spec.merger_size, out, gated, group),
            "merger down": (out, spec.merger_size, "", group),
        }
    elif spec.merger == "mlp":
        found |= {
            "merger fc1": (group * D, group * D, "gelu_erf", group),
            "merger fc2": (out, group * D, "", group),
        }
    return {name: LinearShape(name, *shape) for name, shape in found.items()}


def _image_layers(spec: ImageTowerSpec) -> dict[str, LinearShape]:
    """Of a tower of whole images: each convolution leaves a quarter of the rows before it."""
    D, F = spec.hidden_size, spec.mlp_size
    into = RESIDUAL if spec.block == "pre_norm" else ""
    found = {
        # norms of q and k stand behind products of their own
        "qkv": (D if spec.qk_norm else 3 * D, D, "", 1),
        "proj": (D, D, into, 1),
        "up": (F, D, spec.activation, 1),
        "down": (D, F, into, 1),
    }
    width, group = D, 1
    for j, conv in enumerate(spec.downsamples):
        group *= conv.stride**2
        found[f"convolution {j + 1}"] = (conv.width, conv.kernel**2 * width, "", group)
        width = conv.width
    if spec.merge_size:
        group, out = spec.merge_size**2, spec.out_size
        found["projector fc1"] = (out, group * width, spec.projector_activation, group)
        found["projector fc2"] = (out, out, "", group)
    else:
        found["projector"] = (spec.out_size, width, "", group)
    return {name: LinearShape(name, *shape) for name, shape in found.items()}


def tower_specs() -> dict[str, EncoderSpec | ImageTowerSpec]:
    """Specs of the published towers; without those that are made for trying out.

    The layers of SigLIP 2 are those of Qwen3.5-0.8B and Qwen3-VL-8B.
    """
    packed = {
        name: FAMILIES[config.family].spec(config.vision_config())
        for name, config in TOWERS.items()
        if not name.startswith("tiny-")
    }
    return {**packed, **STEP_TOWERS, **{name: internvl_spec(name) for name in INTERNVL_TOWERS}}


def linear_shapes(
    specs: Mapping[str, EncoderSpec | ImageTowerSpec] | None = None,
) -> list[LinearShape]:
    """Every shape of the linear layers of `specs`, of all published towers by default, once.

    Labels name the layer and the towers that have it.
    """
    found: dict[tuple[int, int, str], tuple[int, dict[str, list[str]]]] = {}
    for tower, spec in (tower_specs() if specs is None else specs).items():
        for name, shape in layers(spec).items():
            group, users = found.get(shape.key, (shape.patches_per_row, {}))
            users.setdefault(name, []).append(tower)
            # rows of the layer that sees more of them
            found[shape.key] = min(group, shape.patches_per_row), users
    return [
        LinearShape("; ".join(f"{name} {' '.join(t)}" for name, t in users.items()), *key, group)
        for key, (group, users) in found.items()
    ]


def attention_shapes(
    specs: Mapping[str, EncoderSpec | ImageTowerSpec] | None = None,
) -> list[AttentionShape]:
    """Every class of lengths with every number of heads and head dim of `specs`."""
    specs = tower_specs() if specs is None else specs
    heads = sorted({(spec.num_heads, spec.head_dim) for spec in specs.values()})
    return [
        AttentionShape(f"attention {H}x{D} {count}x{rows}", (rows,) * count, H, D)
        for H, D in heads
        for count, rows in _SEGMENTS
    ]


_Shape = TypeVar("_Shape", LinearShape, AttentionShape)


def select(shapes: Sequence[_Shape], texts: Sequence[str]) -> list[_Shape]:
    """Those whose label holds one of `texts`; all of them without texts."""
    return [s for s in shapes if not texts or any(text in s.label for text in texts)]
