"""A model's weights in the order in which ``native.cpp`` reads them."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionBlock
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionBlock
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionBlock
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionBlock

from qwenvl_app.engine.geometry import patch_kernel
from qwenvl_app.engine.native.structs import Merger, TextLayer, TextModel, TowerLayer, TowerModel

_BLOCKS = Qwen3VLVisionBlock, Qwen3VLMoeVisionBlock, Qwen3_5VisionBlock, Qwen3_5MoeVisionBlock
_LANES = 16  # of the widest registers: sizes are multiples of it
_PRODUCTS = 7  # of a layer
_CHUNK = 2**25  # bytes that are asked for at once
_HEADS = (16, 32, 64, 128)  # sizes that there is code for; the tower may have any up to the last


class Packer:
    """Lays weights out for ``native.cpp``, in memory of huge pages.

    With pages of the usual size a processor looks up so many that it reads a third slower, on a
    virtual machine more than that. ``block``: columns that lie together.
    """

    def __init__(self, block: int):
        self._block = block
        self._free = torch.empty(0)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` (columns, inputs) as (columns / block, inputs, block), padded with zeros."""
        columns, inputs = weight.shape
        blocks = -(-columns // self._block)
        packed = self._take((blocks, inputs, self._block))
        whole = columns // self._block
        packed[:whole] = weight[: whole * self._block].view(-1, self._block, inputs).mT
        if blocks > whole:
            packed[whole].zero_()
            packed[whole, :, : columns % self._block] = weight[whole * self._block :].T
        return packed

    def interleave(self, *weights: torch.Tensor) -> torch.Tensor:
        """Weights of one shape: a block of the first, then the same of the second, and so on."""
        return self.pack(
            torch.stack([w.view(-1, self._block, w.shape[1]) for w in weights], 1).flatten(0, 2)
        )

    def padded(self, number: int) -> int:
        """Up to whole blocks."""
        return -(-number // self._block) * self._block

    def _take(self, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        if size > len(self._free):
            pages = mmap.mmap(-1, max(_CHUNK, 4 * size), mmap.MAP_PRIVATE)
            pages.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(pages, dtype=torch.float32)
        taken, self._free = self._free[:size], self._free[size:]
        return taken.view(shape)


def fits(text: Any) -> bool:
    """Whether the code is that of ``text``, a language model."""
    config, layers = text.config, text.layers
    return (
        type(text) in (Qwen3VLTextModel, Qwen2_5_VLTextModel)
        and _plain(text, layers, _PRODUCTS)
        and config.rope_parameters["rope_type"] == "default"
        and config.hidden_act == "silu"
        and layers[0].self_attn.head_dim in _HEADS
        and config.hidden_size % _LANES == 0
        and not any(getattr(layer.self_attn, "sliding_window", None) for layer in layers)
    )


def mergers(visual: Any) -> list[Any]:
    """What makes tokens of patches: after the last layer, and for DeepStack, if it has that."""
    return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]


def tower_fits(visual: Any) -> bool:
    """Whether the code is that of ``visual``, a vision tower."""
    config, blocks = visual.config, visual.blocks
    return (
        type(blocks[0]) in _BLOCKS
        and _plain(visual, blocks, 4)
        and all(type(each.act_fn) is nn.GELU for each in mergers(visual))
        and hasattr(visual, "pos_embed")
        and config.hidden_act == "gelu_pytorch_tanh"
        and blocks[0].attn.head_dim <= _HEADS[-1]
        and blocks[0].attn.head_dim % 2 == 0
        and config.hidden_size % _LANES == config.intermediate_size % _LANES == 0
    )


def _plain(model: nn.Module, layers: Any, products: int) -> bool:
    """In float32 on a CPU, its products neither packed nor quantised."""
    linear = [each for each in layers.modules() if type(each) is nn.Linear]
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    return kinds == {("cpu", torch.float32)} and len(linear) == products * len(layers)


def text_of(model: Any, packer: Packer) -> TextModel:
    """That of ``model``; its products are copied."""
    text, head = model.model.language_model, model.lm_head.weight.detach()
    attention = text.layers[0].self_attn
    layers = [_text_layer(layer, packer) for layer in text.layers]
    intermediate = text.layers[0].mlp.down_proj.weight.shape[1]
    made = TextModel(
        layers=len(layers),
        hidden=text.config.hidden_size,
        heads=text.config.num_attention_heads,
        kv_heads=text.config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=packer.padded(intermediate),
        vocabulary=len(head),
        epsilon=text.config.rms_norm_eps,
        scale=attention.scaling,
        norm=text.norm.weight.detach(),
        head=packer.pack(head),
        frequencies=text.rotary_emb.inv_freq.float(),
        axes=_axes(text),
        layer=ctypes.addressof(array := (TextLayer * len(layers))(*layers)),
    )
    made.kept += [array, layers]
    return made


def tower_of(visual: Any, packer: Packer) -> TowerModel:
    """That of ``visual``, likewise."""
    attention = visual.blocks[0].attn
    layers = [_tower_layer(layer, packer) for layer in visual.blocks]
    merging = [_merger(each, packer) for each in mergers(visual)]
    out, merged = visual.merger.linear_fc2.weight.shape
    kernel = patch_kernel(visual)
    made = TowerModel(
        layers=len(layers),
        mergers=len(merging),
        inputs=kernel.shape[1],
        hidden=visual.config.hidden_size,
        heads=attention.num_heads,
        head_dim=attention.head_dim,
        intermediate=visual.config.intermediate_size,
        merged=merged,
        out=out,
        epsilon=visual.blocks[0].norm1.eps,
        scale=attention.scaling,
        embed=packer.pack(kernel),
        embed_bias=visual.patch_embed.proj.bias,
        layer=ctypes.addressof(array := (TowerLayer * len(layers))(*layers)),
        merger=ctypes.addressof(others := (Merger * len(merging))(*merging)),
    )
    made.kept += [array, layers, others, merging]
    return made


def _axes(text: Any) -> torch.Tensor:
    """Which of a token's three positions turns each pair of a head: what a 1 there alone turns."""
    positions = torch.eye(3, dtype=torch.long)[:, None]  # (axes, rows, tokens)
    _, sines = text.rotary_emb(torch.empty(0), positions)
    axes: torch.Tensor = sines[0, :, : sines.shape[-1] // 2].abs().argmax(0)
    return axes


def _text_layer(layer: Any, packer: Packer) -> TextLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    biased = attention.q_proj.bias is not None
    down = mlp.down_proj.weight.detach()
    missing = packer.padded(down.shape[1]) - down.shape[1]
    gate, up = (
        F.pad(each.weight.detach(), (0, 0, 0, missing)) for each in (mlp.gate_proj, mlp.up_proj)
    )
    normed = hasattr(attention, "q_norm")
    return TextLayer(
        before_attention=layer.input_layernorm.weight.detach(),
        qkv=packer.pack(torch.cat([each.weight.detach() for each in projections])),
        qkv_bias=torch.cat([each.bias.detach() for each in projections]) if biased else None,
        q_norm=attention.q_norm.weight.detach() if normed else None,
        k_norm=attention.k_norm.weight.detach() if normed else None,
        out=packer.pack(attention.o_proj.weight.detach()),
        before_mlp=layer.post_attention_layernorm.weight.detach(),
        gate_up=packer.interleave(gate, up),
        down=packer.pack(F.pad(down, (0, missing))),
    )


def _tower_layer(layer: Any, packer: Packer) -> TowerLayer:
    attention, mlp = layer.attn, layer.mlp
    products = {"qkv": attention.qkv, "out": attention.proj}
    products |= {"up": mlp.linear_fc1, "down": mlp.linear_fc2}
    return TowerLayer(
        **_affine(norm1=layer.norm1, norm2=layer.norm2), **_products(packer, **products)
    )


def _merger(merger: Any, packer: Packer) -> Merger:
    products = _products(packer, up=merger.linear_fc1, down=merger.linear_fc2)
    return Merger(**_affine(norm=merger.norm), **products, normed=len(merger.norm.weight))


def _affine(**norms: Any) -> dict[str, torch.Tensor]:
    named = {name: norm.weight for name, norm in norms.items()}
    return named | {f"{name}_bias": norm.bias for name, norm in norms.items()}


def _products(packer: Packer, **linear: Any) -> dict[str, torch.Tensor]:
    named = {name: packer.pack(each.weight.detach()) for name, each in linear.items()}
    return named | {f"{name}_bias": each.bias for name, each in linear.items()}
