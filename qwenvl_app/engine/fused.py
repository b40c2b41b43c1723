"""What makes a step of a few rows quick: fewer calls, and on a CPU weights laid out once.

A norm is 145 times in a step of the 8B model, and six kernels each time. As one it is 1.5 of 10.6
milliseconds less on an H100, with CUDA graphs; without them each kernel costs a launch besides.

On a CPU the usual product of a few rows with a weight lays the weight out anew in every call, which
takes longer than the product itself. oneDNN does that once, at load, with the calls that
torch.compile makes for a frozen model (torch/_inductor/mkldnn_lowerings.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.activations import GELUTanh, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRMSNorm

# Rows that the layout is chosen for. Any number of rows may come; measured with 1 to 512, a layout
# for 64 was never behind one for fewer.
_ROWS = 64
# Elements below which the plain product, whose every call costs less, is no slower.
LEAST = 2**16
# What oneDNN applies on the way: the activation costs next to nothing then. In transformers' MLPs
# it is ``act_fn``, and follows one of these layers and no other.
_FUSED = {
    nn.GELU: ("gelu", "none"),
    GELUTanh: ("gelu", "tanh"),
    SiLUActivation: ("swish", ""),
}
_BEFORE = ("linear_fc1", "gate_proj")
# Not Qwen3.5's, which adds one to its weight, or has a gate.
_NORMS = (Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm, Qwen3VLMoeTextRMSNorm)


class PackedLinear(nn.Module):
    """``nn.Linear`` in float32 on a CPU, for inference. ``weight`` is opaque: it can't be read.

    ``then`` is the activation after it, one of oneDNN's.
    """

    def __init__(self, linear: nn.Linear, then: tuple[str, str] = ("none", "")):
        super().__init__()
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _ROWS
        )
        self.bias = linear.bias
        self._then, self._algorithm = then
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., in) to (..., out)."""
        y: torch.Tensor = self._multiply(x, self.weight, self.bias, self._then, [], self._algorithm)
        return y


class Norm(nn.Module):
    """transformers' RMSNorm, which makes six calls, in one: on a CPU the same to the last bit.

    On a GPU it is rounded once, after the weight, and not before it too.
    """

    def __init__(self, norm: Any):
        super().__init__()
        self.weight: torch.Tensor = norm.weight
        self._epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


def fuse(model: nn.Module) -> None:
    """Replace norms on a GPU, norms and large linear layers in float32 on a CPU; others stay.

    Memory is taken for one layer at a time, unless a weight is shared (the embeddings').
    """
    with torch.inference_mode():
        # No list of the layers themselves: it would keep the old weights until its end.
        for parent in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
            for name in [name for name, _ in parent.named_children()]:
                child = parent.get_submodule(name)
                if isinstance(child, _NORMS) and (child.weight.is_cuda or _plain(child.weight)):
                    setattr(parent, name, Norm(child))
                elif type(child) is nn.Linear and _fits(child.weight):
                    then = _FUSED.get(type(getattr(parent, "act_fn", None)))
                    if then and name in _BEFORE:
                        parent.act_fn = nn.Identity()
                        setattr(parent, name, PackedLinear(child, then))
                    else:
                        setattr(parent, name, PackedLinear(child))


def _plain(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32


def _fits(weight: torch.Tensor) -> bool:
    return torch._C._has_mkldnn and _plain(weight) and weight.numel() >= LEAST


def _packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What ``sdpa`` is in transformers, but heads share keys and values when compiled, too.

    For one query token it takes the heads that share them for as many tokens of one head; but under
    torch.compile it copies keys and values for every head, which may be more than all weights.
    """
    rows, heads, width, size = query.shape
    if width > 1:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
        return result
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(packed, key, value, attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, size), None


ATTENTION = "sdpa_packed"
AttentionInterface.register(ATTENTION, _packed_attention)
