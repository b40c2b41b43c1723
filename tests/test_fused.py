"""Packed weights change how fast an answer comes, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import random
import weakref

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from qwenvl_app.engine import fused
from qwenvl_app.loading.load import load
from tests.engines import generate, judge, random_request, running, spread, together


@pytest.mark.parametrize("shape", [(1, 512), (4, 1, 512), (2, 300, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_layer(shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 768, bias=bias))
    plain = copy.deepcopy(model)
    fused.fuse(model)
    assert isinstance(model[0], fused.PackedLinear)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("norm", fused._NORMS)
def test_a_norm_in_one_call_is_the_norm_to_the_last_bit(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(192, eps=1e-6))
    nn.init.normal_(model[0].weight)
    plain = copy.deepcopy(model)
    fused.fuse(model)
    assert isinstance(model[0], fused.Norm)
    for shape in ((1, 1, 192), (4, 1, 192), (3, 70, 6, 192)):
        x = torch.randn(shape) * 10
        with torch.inference_mode():
            assert torch.equal(model(x), plain(x))


def test_a_norm_of_another_kind_stays():
    """Qwen3.5's adds one to its weight."""
    model = nn.Sequential(Qwen3_5RMSNorm(192))
    fused.fuse(model)
    assert type(model[0]) is Qwen3_5RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gains_nothing_stays(dtype):
    size = 64 if dtype is torch.float32 else 512
    model = nn.Sequential(nn.Linear(size, size, dtype=dtype))
    fused.fuse(model)
    assert type(model[0]) is nn.Linear


def test_one_layer_at_a_time(monkeypatch):
    """The list of modules that was gone through kept all old weights, and so all twice."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    old = [weakref.ref(layer) for layer in model]
    alive: list[int] = []
    real = fused.PackedLinear

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, linear: nn.Linear):
            alive.append(sum(layer() is not None for layer in old))
            super().__init__(linear)

    monkeypatch.setattr(fused, "PackedLinear", Watched)
    fused.fuse(model)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("count", [6, pytest.param(16, marks=pytest.mark.slow)])
def test_packed_tokens_are_those_of_generate_on_the_plain_model(monkeypatch, count: int):
    monkeypatch.setattr(fused, "LEAST", 0)  # every layer of the small test model too
    wild = spread(load("demo"))
    rng = random.Random(7)
    asked = [(each, generate(wild, each)) for each in (random_request(rng) for _ in range(count))]
    packed = dataclasses.replace(wild, model=copy.deepcopy(wild.model))
    fused.fuse(packed.model)
    assert isinstance(packed.model.model.language_model.layers[0].mlp.up_proj, fused.PackedLinear)
    assert isinstance(packed.model.lm_head, fused.PackedLinear)
    with running(packed) as engine:
        pairs = together(engine, asked)
    judge(pairs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_an_activation_is_applied_with_the_product_and_once(activation):
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2 = nn.Linear(512, 768), nn.Linear(768, 512)
            self.act_fn = nn.GELU() if activation == "gelu" else ACT2FN[activation]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear_fc2(self.act_fn(self.linear_fc1(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Mlp())
    plain = copy.deepcopy(model)
    fused.fuse(model)
    assert isinstance(model[0].act_fn, nn.Identity)
    x = torch.randn(3, 512)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), atol=1e-4, rtol=1e-5)
