"""Updates: AdamW, and Muon for the blocks' matrices, both on the shards that a rank holds; and the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from athanor.parallel.stages import Stages
from athanor.parallel.tensor import local
from athanor.train.muon import Orthogonaliser

BETAS = (0.9, 0.95)
EPSILON = 1e-8
MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class Piece:
    """A parameter as the update sees it: its name, the parameter, and this rank's part of it."""

    name: str
    parameter: nn.Parameter
    shard: torch.Tensor

    @property
    def gradient(self) -> torch.Tensor | None:
        return None if self.parameter.grad is None else local(self.parameter.grad)


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to the embedding, whose rare rows would only ever shrink."""
    return parameter.ndim >= 2 and "embed" not in name


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon may update it: a matrix between two hidden layers, so neither embedding nor head."""
    return parameter.ndim >= 2 and ".layers." in name


class Optimizer:
    """One update rule per parameter, by name. `kind` is `adamw`, or `muon` (AdamW for what is no block's matrix).

    State has one tensor per slot and parameter, of the shape of its shard: exp_avg and exp_avg_sq (AdamW),
    momentum (Muon). `updates` counts the steps that were not skipped.
    """

    def __init__(self, stages: Stages, kind: str, weight_decay: float) -> None:
        self.device, self.weight_decay, self.updates = stages.mesh.device, weight_decay, 0
        self.owned = stages.owned()
        self.pieces = [Piece(name, p, local(p.detach())) for name, p in stages.named_parameters() if p.requires_grad]
        self.muon = [piece for piece in self.pieces if kind == "muon" and is_block_matrix(piece.name, piece.parameter)]
        names = {piece.name for piece in self.muon}
        self.adamw = [piece for piece in self.pieces if piece.name not in names]
        self.momentum = {piece.name: torch.zeros_like(piece.shard) for piece in self.muon}
        self.orthogonaliser = Orthogonaliser([piece.parameter for piece in self.muon], stages) if self.muon else None
        groups = [{"params": [p.shard for p in self.adamw if is_decayed(p.name, p.parameter) == decayed],
                   "weight_decay": weight_decay if decayed else 0.0} for decayed in (True, False)]
        self.inner = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=BETAS, eps=EPSILON,
                                       fused=True)
        for piece in self.adamw:
            self.inner.state[piece.shard] = {"step": torch.zeros((), dtype=torch.float32, device=piece.shard.device),
                                             "exp_avg": torch.zeros_like(piece.shard),
                                             "exp_avg_sq": torch.zeros_like(piece.shard)}

    def squared_norm(self) -> torch.Tensor:
        """The sum of squares of this rank's part of the gradient, in fp64; each part is counted on one rank only."""
        mine = [piece.gradient for piece in self.pieces if piece.parameter in self.owned]
        held = [gradient for gradient in mine if gradient is not None and gradient.numel()]
        if not held:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(torch._foreach_norm(held)).double().square().sum()

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient, in place."""
        torch._foreach_mul_([g for piece in self.pieces if (g := piece.gradient) is not None], factor)

    def step(self, learning_rate: float) -> None:
        """Update the weights from their gradients."""
        self.updates += 1
        for piece in self.adamw:
            piece.shard.grad = piece.gradient
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        if self.orthogonaliser is not None:
            self._step_muon(learning_rate, self.orthogonaliser)

    def clear(self) -> None:
        """Forget the gradients."""
        for piece in self.pieces:
            piece.parameter.grad = piece.shard.grad = None

    def state(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        """Each slot as (key, the parameter it belongs to, the shard)."""
        for piece in self.adamw:
            for slot in ("exp_avg", "exp_avg_sq"):
                yield f"optimizer.{piece.name}.{slot}", piece.parameter, self.inner.state[piece.shard][slot]
        for piece in self.muon:
            yield f"optimizer.{piece.name}.momentum", piece.parameter, self.momentum[piece.name]

    def set_updates(self, updates: int) -> None:
        """Go on as after this many updates."""
        self.updates = updates
        for piece in self.adamw:
            self.inner.state[piece.shard]["step"].fill_(updates)

    @torch.no_grad()
    def _step_muon(self, learning_rate: float, orthogonaliser: Orthogonaliser) -> None:
        """Orthogonalised momentum (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025)."""
        wanted = []
        for piece in self.muon:
            gradient, momentum = piece.gradient, self.momentum[piece.name]
            assert gradient is not None, f"{piece.name} has no gradient"
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            wanted.append(gradient.lerp(momentum, MUON_MOMENTUM))
        for piece, update in zip(self.muon, orthogonaliser(wanted), strict=True):
            rate = 0.2 * max(piece.parameter.shape[-2:]) ** 0.5
            piece.shard.mul_(1 - learning_rate * self.weight_decay).add_(update, alpha=-learning_rate * rate)
