"""The structures that ``native.cpp`` takes, field by field as they stand there."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


class _Struct(ctypes.Structure):
    """Fields are set by name; a tensor gives its address, and is kept as long as this."""

    def __init__(self, **fields: Any):
        self.kept = list(fields.values())
        super().__init__()
        for name, value in fields.items():
            setattr(self, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def _longs(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_long) for name in names]


def _floats(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_float) for name in names]


class TextLayer(_Struct):
    """Where the source says ``or null``, a model may have none of it."""

    _fields_ = _pointers(
        *("before_attention", "qkv", "qkv_bias", "q_norm", "k_norm", "out"),
        *("before_mlp", "gate_up", "down"),
    )


class TextModel(_Struct):
    """Sizes and weights of a language model."""

    _fields_ = [
        *_longs("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"),
        *_floats("epsilon", "scale"),
        *_pointers("norm", "head", "frequencies", "axes", "layer"),
    ]


class TextCall(_Struct):
    """Tokens of some slots: their inputs, the cache's addresses, where logits go."""

    _fields_ = [
        *_longs("threads", "tokens", "chunks", "images", "length"),
        *_pointers("x", "positions", "chunk", "keys", "values", "image", "deepstack", "logits"),
    ]


class TowerLayer(_Struct):
    """A layer of the vision tower."""

    _fields_ = _pointers(
        *("norm1", "norm1_bias", "qkv", "qkv_bias", "out", "out_bias"),
        *("norm2", "norm2_bias", "up", "up_bias", "down", "down_bias"),
    )


class Merger(_Struct):
    """What makes tokens of patches."""

    _fields_ = [
        *_pointers("norm", "norm_bias", "up", "up_bias", "down", "down_bias"),
        *_longs("normed"),
    ]


class TowerModel(_Struct):
    """Sizes and weights of a vision tower."""

    _fields_ = [
        *_longs("layers", "mergers", "inputs", "hidden", "heads", "head_dim", "intermediate"),
        *_longs("merged", "out"),
        *_floats("epsilon", "scale"),
        *_pointers("embed", "embed_bias", "layer", "merger"),
    ]


class TowerCall(_Struct):
    """One layer for the patches of some pictures."""

    _fields_ = [
        *_longs("threads", "number", "patches", "pictures"),
        *_pointers("x", "cosines", "sines", "starts"),
    ]


class EmbedCall(_Struct):
    """The pixels of some pictures' patches."""

    _fields_ = [*_longs("threads", "patches"), *_pointers("pixels", "places", "y")]


class MergerCall(_Struct):
    """One merger for the patches of some pictures."""

    _fields_ = [*_longs("threads", "number", "patches"), *_pointers("x", "y")]
