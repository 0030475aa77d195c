"""Block matrices multiplied in 8-bit floats: e4m3 forward, e5m2 for gradients, one scale per tensor (arXiv:2209.05433).

Embedding, norms, attention's scores and the head stay in the dtype of the rest. Nothing here asks the device for a number,
so that a compiler fuses scaling and rounding into what makes the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.foundation.errors import ModelError
from athanor.models.collectives import local
from athanor.models.decoder import Decoder

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16  # what accelerators ask of both dims of a matrix in 8 bits
SMALLEST = 1e-12  # of a tensor's largest entry, so that a tensor of zeros has a scale


def convert(model: Decoder) -> None:
    """Let the blocks multiply in fp8 from now on, in place; parameters may be on the meta device, or this rank's parts.

    Raises ModelError for a matrix of which a dim is no multiple of 16.
    """
    for number, block in model.blocks.items():
        for path, part in block.named_modules():
            if hasattr(part, "linear"):
                _check(part, f"block {number}'s {path}")
                part.linear = linear  # type: ignore[assignment]


def _check(module: nn.Module, where: str) -> None:
    for name, parameter in module.named_parameters():
        shape = local(parameter).shape
        if any(size % ALIGNMENT for size in shape):
            raise ModelError(f"precision fp8 needs matrices whose dims are multiples of {ALIGNMENT}, but {name} of {where} is "
                             f"{' x '.join(map(str, shape))} on each rank; train in bf16, or choose other sizes")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, columns] times weight [rows, columns] transposed, in the dtype of x; gradients are products in fp8 too."""
    return _Linear.apply(x, weight)  # type: ignore[no-any-return]


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, and the scale: x's largest entry becomes the largest that the dtype has."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=SMALLEST) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (small, scale), (small_weight, weight_scale) = quantise(x, FORWARD), quantise(weight, FORWARD)
        ctx.save_for_backward(small, scale, small_weight, weight_scale)
        ctx.weight_dtype = weight.dtype
        # sums of fewer bits are faster on Hopper, and good enough forward
        return torch._scaled_mm(small, small_weight.t(), scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        small, scale, small_weight, weight_scale = ctx.saved_tensors
        flowing, flowing_scale = quantise(gradient, BACKWARD)
        to_x = torch._scaled_mm(flowing, _column_major(small_weight), flowing_scale, weight_scale, out_dtype=gradient.dtype)
        if lacking := -small.shape[0] % ALIGNMENT:
            small, flowing = (F.pad(part.view(torch.uint8), (0, 0, 0, lacking)).view(part.dtype) for part in (small, flowing))
        to_weight = torch._scaled_mm(flowing.t().contiguous(), _column_major(small), flowing_scale, scale,
                                     out_dtype=ctx.weight_dtype)
        return to_x, to_weight


def _column_major(x: Tensor) -> Tensor:
    """The same matrix as accelerators want the second factor of a product: each column in one piece."""
    return x.t().contiguous().t()
