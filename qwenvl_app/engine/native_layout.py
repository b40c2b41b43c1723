"""What ``native.cpp`` takes: its structures, and weights laid out in the order of reading."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

_LANES = 16  # of the widest registers: sizes are multiples of it
_PRODUCTS = 7  # of a layer
_HEADS = (16, 32, 64, 128)  # sizes that there is code for


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


class _Layer(_Struct):
    _fields_ = _pointers(
        *("before_attention", "qkv", "qkv_bias", "q_norm", "k_norm", "out"),
        *("before_mlp", "gate_up", "down"),
    )


class Model(_Struct):
    """Sizes and weights. Where the source says ``or null``, a model may have none of it."""

    _fields_ = [
        *_longs("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        *_pointers("embedding", "norm", "head", "frequencies", "layer"),
    ]


class Call(_Struct):
    """One step: its inputs, the cache's addresses, where logits go."""

    _fields_ = [
        *_longs("rows", "length"),
        *_pointers("ids", "positions", "starts", "keys", "values", "logits"),
    ]


def fits(text: Any) -> bool:
    """Whether the code is that of ``text``, a language model."""
    config, layers = text.config, text.layers
    plain = [each for each in layers.modules() if type(each) is nn.Linear]  # not packed, quantised
    return (
        type(text) in (Qwen3VLTextModel, Qwen2_5_VLTextModel)
        and {(p.device.type, p.dtype) for p in text.parameters()} == {("cpu", torch.float32)}
        and len(plain) == _PRODUCTS * len(layers)
        and config.rope_parameters["rope_type"] == "default"
        and config.hidden_act == "silu"
        and layers[0].self_attn.head_dim in _HEADS
        and config.hidden_size % _LANES == 0
        and not any(getattr(layer.self_attn, "sliding_window", None) for layer in layers)
    )


def model_of(model: Any, block: int) -> Model:
    """That of ``model``; its products are copied, in blocks of so many columns."""
    text, head = model.model.language_model, model.lm_head.weight.detach()
    attention = text.layers[0].self_attn
    layers = [_layer(layer, block) for layer in text.layers]
    intermediate = text.layers[0].mlp.down_proj.weight.shape[1]
    made = Model(
        layers=len(layers),
        hidden=text.config.hidden_size,
        heads=text.config.num_attention_heads,
        kv_heads=text.config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=-(-intermediate // block) * block,
        vocabulary=len(head),
        epsilon=text.config.rms_norm_eps,
        scale=attention.scaling,
        embedding=text.embed_tokens.weight.detach(),
        norm=text.norm.weight.detach(),
        head=_blocks(head, block),
        frequencies=text.rotary_emb.inv_freq.float(),
        layer=ctypes.addressof(array := (_Layer * len(layers))(*layers)),
    )
    made.kept += [array, layers]
    return made


def _layer(layer: Any, block: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    biased = attention.q_proj.bias is not None
    gate, up = (_blocks(each.weight.detach(), block) for each in (mlp.gate_proj, mlp.up_proj))
    down = mlp.down_proj.weight.detach()
    normed = hasattr(attention, "q_norm")
    return _Layer(
        before_attention=layer.input_layernorm.weight.detach(),
        qkv=_blocks(torch.cat([each.weight.detach() for each in projections]), block),
        qkv_bias=torch.cat([each.bias.detach() for each in projections]) if biased else None,
        q_norm=attention.q_norm.weight.detach() if normed else None,
        k_norm=attention.k_norm.weight.detach() if normed else None,
        out=_blocks(attention.o_proj.weight.detach(), block),
        before_mlp=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.stack([gate, up], 1),
        down=_blocks(F.pad(down, (0, -down.shape[1] % block)), block),
    )


def _blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    """``weight`` (columns, inputs) as (columns / block, inputs, block), padded with zeros."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % block))
    return padded.view(-1, block, weight.shape[1]).transpose(1, 2).contiguous()
