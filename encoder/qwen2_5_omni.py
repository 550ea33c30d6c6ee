"""The thinker of Qwen2.5-Omni: the tower of Qwen2.5-VL, its q, k and v as three layers."""

from dataclasses import replace

from . import qwen2_5_vl
from .spec import EncoderSpec
from .weight_map import Rule


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower: those of Qwen2.5-VL, q, k and v stacked along rows."""
    return [_split(rule, s.hidden_size) for rule in qwen2_5_vl.weight_map(s)]


def _split(rule: Rule, rows: int) -> Rule:
    (source, *others) = rule.sources
    if others or ".attn.qkv." not in source:
        return rule
    parts = tuple(source.replace(".attn.qkv.", f".attn.{part}.") for part in "qkv")
    return replace(rule, sources=parts, shape=(rows, *rule.shape[1:]))
