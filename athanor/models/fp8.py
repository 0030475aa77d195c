"""Block matrices multiplied in 8-bit floats: e4m3 forward, e5m2 for gradients, one scale per tensor (arXiv:2209.05433).

Embedding, norms, attention's scores and the head stay in the dtype of the rest. Nothing here asks the device for a number,
so that a compiler fuses scaling and rounding into what makes the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.foundation.errors import ModelError
from athanor.models.decoder import Decoder
from athanor.models.rehearsed import device_type
from athanor.models.shapes.decoder import DecoderShape

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16  # what accelerators ask of both dims of a matrix in 8 bits
NOT_IN_FP8 = ("router", "experts_", "lfa_")  # beginnings of products' names
SMALLEST = 1e-12  # of a tensor's largest entry, so that a tensor of zeros has a scale


def convert(model: Decoder, tp: int = 1) -> None:
    """Let the blocks multiply in fp8 from now on, in place, on `tp` tensor-parallel ranks; at any time before the first pass.

    Raises ModelError for sizes that the products do not take.
    """
    check(model.shape, tp)
    for part in model.modules():
        if hasattr(part, "linear"):  # parts of blocks have it
            part.linear = linear  # type: ignore[assignment]


def check(shape: DecoderShape, tp: int = 1) -> None:
    """Refuse a shape whose matrices have a dim that is no multiple of 16 on each of `tp` ranks. Raises ModelError."""
    sizes = {"hidden_size": shape.hidden_size, "num_attention_heads x head_dim / tp": shape.query_size // tp,
             "num_key_value_heads x head_dim / tp": shape.key_value_size // tp,
             "intermediate_size / tp": shape.intermediate_size // tp}
    for each in shape.products()[:-1]:
        if not each.name.startswith(NOT_IN_FP8):
            sizes |= {f"the height of {each.name}": each.outputs // (tp if each.cut == "outputs" else 1),
                      f"the width of {each.name}": each.inputs // (tp if each.cut == "inputs" else 1)}
    for name, size in sizes.items():
        if size % ALIGNMENT:
            raise ModelError(f"precision fp8 needs matrices whose dims are multiples of {ALIGNMENT} on each rank, but {name} "
                             f"is {size}; train in bf16, or choose other sizes")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, columns] times weight [rows, columns] transposed plus bias [rows], in x's dtype; gradients are fp8 products too."""
    out: Tensor = _Linear.apply(x, weight)
    return out if bias is None else out + bias


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
        if device_type(x) == "cpu":  # where torch takes a thousand times as long for two factors in e4m3
            return (small.float() @ small_weight.t().float() * (scale * weight_scale)).to(x.dtype)
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
