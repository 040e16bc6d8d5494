"""Layers with fp32 parameters that compute in the type of their input; linear layers in float8."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cjepa_fast import ops


class _Copy(torch.autograd.Function):
    """A parameter replaced by its rounded copy: forward gives the copy, backward the parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Rounding:
    """A module with fp32 weights that are rounded to the type of the input.

    Each forward pass casts the weights, unless `hold_copies` gave the module rounded copies.
    """

    weight: Tensor
    bias: Tensor | None
    weight_copy: Tensor | None = None
    bias_copy: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in `dtype`."""
        if self.weight_copy is None:
            return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        assert self.weight_copy.dtype == dtype, (self.weight_copy.dtype, dtype)
        if self.weight_copy.requires_grad or not self.weight.requires_grad:
            return self.weight_copy, self.bias_copy
        bias = None if self.bias is None else _Copy.apply(self.bias, self.bias_copy)
        return _Copy.apply(self.weight, self.weight_copy), bias  # pyright: ignore[reportReturnType]


class Linear(_Rounding, nn.Linear):
    """A linear layer in the type of its input. With `float8` set: in float8, without gradient.

    Args:
        width, out: numbers of inputs and outputs.
        kernels: the implementation of `cjepa_fast.ops.linear`.
    """

    float8: str | None = None  # the implementation of `cjepa_fast.ops.float8_linear`
    float8_weight: tuple[Tensor, Tensor] | None = None  # set within `quantised`

    def __init__(self, width: int, out: int, kernels: str) -> None:
        super().__init__(width, out)
        self.kernels = kernels

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        weight, bias = self.rounded(input.dtype)
        if self.float8 is None:
            return ops.linear(input, weight, bias, gelu=gelu, impl=self.kernels)
        assert bias is not None
        out = ops.float8_linear(input, *(self.float8_weight or ops.quantise_rows(weight)), bias, impl=self.float8)
        return F.gelu(out) if gelu else out

    def parts(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Compute consecutive parts of the outputs, `sizes` wide, each from its own input; not in float8."""
        weight, bias = self.rounded(inputs[0].dtype)
        assert bias is not None and self.float8 is None
        each = zip(inputs, weight.split(list(sizes)), bias.split(list(sizes)), strict=True)
        return [ops.linear(*part, impl=self.kernels) for part in each]


class LayerNorm(_Rounding, nn.LayerNorm):
    """Layer norm in the type of its input; torch's kernel computes the statistics in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, *self.rounded(input.dtype), self.eps)


def hold_copies(network: nn.Module, dtype: torch.dtype, *, rounded_grads: bool) -> dict[Tensor, Tensor]:
    """Give linear layers and layer norms rounded copies of their parameters, so that no pass casts them.

    The optimizer must update the copies with the parameters; `engine.optim.AdamW` does. Do not use copies with FSDP2,
    which makes its own.

    Args:
        dtype: type of the copies.
        rounded_grads: keep gradients in `dtype` instead of widening them to fp32. Only for one backward pass a step,
            because several would accumulate in `dtype`.

    Returns the copies by parameter.
    """
    copies = {}
    for module in network.modules():
        if isinstance(module, _Rounding):
            for name in ("weight", "bias"):
                if (parameter := getattr(module, name)) is not None:
                    copies[parameter] = parameter.detach().to(dtype)
                    setattr(module, f"{name}_copy", copies[parameter])
                    if rounded_grads and parameter.requires_grad:
                        # The copy is a leaf: a compiler, blind to `grad_dtype`, would widen a parameter's gradient.
                        parameter.grad_dtype = dtype
                        hand_on = functools.partial(_hand_on, parameter)
                        copies[parameter].requires_grad_().register_post_accumulate_grad_hook(hand_on)
    return copies


def _hand_on(parameter: Tensor, copy: Tensor) -> None:
    """Move the gradient of a copy to its parameter."""
    if parameter.grad is None:
        parameter.grad = copy.grad
    elif copy.grad is not None:  # zero_grad(set_to_none=False) keeps the gradient's memory
        parameter.grad += copy.grad
    copy.grad = None


def linear_layers(network: nn.Module) -> list[Linear]:
    """Return the layers of a network that can multiply in float8."""
    return [module for module in network.modules() if isinstance(module, Linear)]


@contextmanager
def quantised(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round the weights of float8 layers once for all passes in this context; the weights must not change meanwhile.

    Weights that FSDP2 shards are whole within a pass only, so each pass rounds them.

    Args:
        dtype: type of the activations.
    """
    layers = [layer for layer in linear_layers(network) if layer.float8 and not isinstance(layer.weight, DTensor)]
    for layer in layers:
        layer.float8_weight = ops.quantise_rows(layer.rounded(dtype)[0])
    try:
        yield
    finally:
        for layer in layers:
            layer.float8_weight = None
