"""Initial weights as a function of (seed, parameter name) alone, so that they are the same for every layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from athanor.foundation.placement import Placement, placements
from athanor.models.decoder import Decoder

INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")  # these add to the residual stream, 2 x layers of them


@torch.no_grad()
def initialize(module: Decoder, seed: int) -> None:
    """Fill every parameter: biases with 0, other vectors with their module's `initial` or 1, matrices with normal noise.

    Its deviation is initializer_range, of matrices that add to the residual stream initializer_range / sqrt(2 layers)
    (GPT-2), so that depth does not change the stream's variance. Each parameter is drawn in full, in fp32 on the CPU, and
    this rank's part of it is kept.
    """
    shape, table = module.shape, placements(module)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            owner = module.get_submodule(name.rpartition(".")[0])
            parameter.fill_(0.0 if name.endswith("bias") else getattr(owner, "initial", 1.0))
            continue
        placement, deviation = table[name], shape.initializer_range
        if name.endswith(INTO_RESIDUAL):
            deviation /= math.sqrt(2 * shape.num_hidden_layers)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(placement.shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
        fill(parameter, placement, full)


@torch.no_grad()
def fill(parameter: Tensor, placement: Placement, full: Tensor) -> None:
    """Copy this rank's part of `full` into a parameter."""
    mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    mine.copy_(full[placement.box().slices()])
