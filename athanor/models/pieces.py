"""What sub-layers are made of: matrices and norms, under the names that their weights have on disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.context import Context
from athanor.models.fused import rms_norm

Linear = Callable[..., Tensor]  # of x, weight and bias: how a block multiplies by its matrices; `fp8.convert` sets another


class Matrix(nn.Module):
    """A weight [rows, columns] and maybe a bias [rows], not yet initialised: `initialize` or `load_weights` fill them."""

    def __init__(self, rows: int, columns: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if has_bias else None


class Norm(nn.Module):
    """RMSNorm over the last dim, its weight `initial` at first; each tensor-parallel rank normalises its own tokens."""

    initial = 1.0

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with a shift; else as Norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
