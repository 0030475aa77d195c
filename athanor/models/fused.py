"""Element-wise pieces with hand-written gradients: fewer passes over memory than autograd would make of them.

Compiled code and accelerators with fused kernels of their own take the plain expressions instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.models.rehearsed import device_type
from athanor.models.shapes.rope import RopeScaling

ROWS = 512  # tokens at a time where several passes are made, so that what one leaves is still in the cache for the next


def _by_hand(x: Tensor) -> bool:
    return device_type(x) == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x weight, over the last dim; statistics in fp32 or wider. x [T, H], weight [H]."""
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # accelerators' keeps as much
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        wide, out = weight.to(scale.dtype), torch.empty_like(x)
        to_weight = torch.zeros_like(wide)
        for row in range(0, x.shape[0], ROWS):
            rows = slice(row, row + ROWS)
            flowing, normed = gradient[rows], x[rows] * scale[rows]
            product = flowing * normed
            to_weight += product.sum(0)
            mean = torch.mv(product, wide).div_(x.shape[-1]).unsqueeze_(-1)
            torch.mul(flowing, wide, out=product).addcmul_(normed, mean, value=-1)
            torch.mul(product, scale[rows], out=out[rows])
        return out, to_weight.to(weight.dtype), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) x up of [T, 2F] = gate beside up -> [T, F]."""
    if _by_hand(gate_up) and torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        for part, into, flowing in zip(gate_up.split(ROWS), out.split(ROWS), gradient.split(ROWS), strict=True):
            gate, up = part.chunk(2, -1)
            to_gate, to_up = into.chunk(2, -1)
            torch.mul(flowing, F.silu(gate), out=to_up)
            torch.ops.aten.silu_backward.grad_input(flowing * up, gate, grad_input=to_gate)
        return out


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None) -> Tensor:
    """Cosine and sine of each position's angles [T, 1, head_dim / 2, 2], in fp32 or wider.

    Angles are taken in fp32 whatever the dtype, as transformers does, so that all precisions turn by the same angle.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None and scaling.rope_type != "dynamic":
        frequencies = _slowed(frequencies, head_dim, theta, scaling)
    angles = torch.outer(positions.float(), frequencies)
    table = torch.stack([angles.cos(), angles.sin()], -1).unsqueeze_(1)
    if scaling is not None and scaling.attention_factor != 1.0:
        table *= scaling.attention_factor
    return table.to(torch.promote_types(dtype, torch.float32))


def beside_still(table: Tensor, channels: int) -> Tensor:
    """The table after `channels` more at the beginning of a head, which no position turns."""
    if not channels:
        return table
    still = table.new_zeros(*table.shape[:2], channels // 2, 2)
    still[..., 0] = 1.0
    return torch.cat([still, table], 2)


def _slowed(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Each pair's frequency [head_dim / 2], divided by the factor where the kind of scaling says so."""
    original, kept = scaling.original_max_position_embeddings, torch.zeros_like(frequencies)
    if scaling.rope_type == "llama3":
        turns = frequencies * original / (2 * math.pi)  # in the original context
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif scaling.rope_type == "yarn":
        first, last = (head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # pairs that turn so often
                       for turns in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
        kept = 1 - (pairs - first) / max(last - first, 0.001)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotate(x: Tensor, rope: Tensor | None, backwards: bool = False, out: Tensor | None = None) -> Tensor:
    """Turn pairs of neighbouring channels by their position's angle. x [T, heads, head_dim] -> the same; as it is without rope.

    Hugging Face weights pair channel i with i + head_dim/2; the decoder brings pairs together when it fuses the weights,
    which leaves the products of queries and keys as they are. Complex multiplication needs a single pass on the CPU.
    """
    if rope is None:
        return x if out is None else out.copy_(x)
    if not _by_hand(x):
        cos, sin = rope.unbind(-1)
        even, odd = x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        sin = -sin if backwards else sin
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
        return turned if out is None else out.copy_(turned)
    pairs, turn = _complex(x.to(rope.dtype)), torch.view_as_complex(rope)
    turn = turn.conj() if backwards else turn
    if out is not None and out.dtype == rope.dtype:
        torch.mul(pairs, turn, out=_complex(out))
        return out
    turned = torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    return turned if out is None else out.copy_(turned)


def _complex(x: Tensor) -> Tensor:
    """[..., 2n] -> a view [..., n] of complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
