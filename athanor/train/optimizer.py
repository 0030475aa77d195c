"""Updates: AdamW, and Muon for the blocks' matrices, both on the shards that a rank holds; and the global gradient norm.

Nothing here waits for the device: clipping, and skipping a step whose gradient is not finite, are decided there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from athanor.parallel.exact import join, take_apart
from athanor.parallel.stages import Stages
from athanor.parallel.tensor import local
from athanor.train.groups import Group, group_of
from athanor.train.masters import Masters
from athanor.train.muon import Orthogonaliser

BETAS = (0.9, 0.95)
EPSILON = 1e-8
MUON_MOMENTUM = 0.95
CHUNK = 1 << 24  # elements that are updated at a time, which bounds what is widened to fp32
STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: that of the weights


@dataclass(frozen=True)
class Piece:
    """A parameter as the update sees it: its name, the parameter, this rank's part of the weights, and how it learns.

    `slots` are the state of its update rule, by name. `masters` keep the weights when the parameter is a copy of them.
    """

    name: str
    parameter: nn.Parameter
    shard: torch.Tensor
    slots: dict[str, torch.Tensor]
    rate_factor: float
    weight_decay: float
    masters: Masters | None

    @property
    def gradient(self) -> torch.Tensor | None:
        """This rank's part of the gradient, maybe in a narrower dtype than the weights."""
        if self.masters is not None:
            return self.masters.gradient(self.parameter)
        return None if self.parameter.grad is None else local(self.parameter.grad)

    def give(self, gradient: torch.Tensor) -> None:
        """Let this be the gradient of a parameter that is not sharded."""
        if self.masters is not None:
            self.masters.sums[self.parameter] = gradient
        else:
            self.parameter.grad = gradient


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to the embedding, whose rare rows would only ever shrink."""
    return parameter.ndim >= 2 and "embed" not in name


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon may update it: a matrix between two hidden layers, so neither embedding nor head."""
    return parameter.ndim >= 2 and ".layers." in name


class Optimizer:
    """One update rule per parameter, by name. `kind` is `adamw`, or `muon` (AdamW for what is no block's matrix).

    State has one tensor per slot and parameter, of the shape of its shard: exp_avg and exp_avg_sq (AdamW),
    momentum (Muon), kept in `state_dtype` (None: that of the weights), computed with in that of the weights. With `masters`
    those are what is updated, and the model gets copies of them. `is_exact`: no bit depends on how weights are sharded.

    State is rounded to the nearest: both moments change by a twentieth or more of what is new, far above bf16's 1/256. After
    500 steps of 1,024 bytes of Python (width 64, two orders of data) the held-out loss with bf16 state differed from that with
    fp32 by +0.020 and +0.014 of 1.92 (AdamW), -0.001 and -0.002 of 1.55 (Muon); stochastic rounding by +0.014; fp32 begun from
    weights that differ by 0.2 % by +0.007 to +0.032, so that this is what any disturbance does.
    """

    def __init__(self, stages: Stages, kind: str, weight_decay: float, *, groups: Sequence[Group] = (),
                 state_dtype: torch.dtype | None = None, masters: Masters | None = None, is_exact: bool = False) -> None:
        self.stages, self.device, self.masters, self.is_exact = stages, stages.mesh.device, masters, is_exact
        self.owned, self.placed = stages.owned(), stages.placed()
        self.adamw: list[Piece] = []
        self.muon: list[Piece] = []
        for name, parameter in stages.named_parameters():
            if parameter.requires_grad:
                is_muon = kind == "muon" and is_block_matrix(name, parameter)
                shard, group = self._weight(parameter), group_of(name, groups) or Group("*")
                decay = group.weight_decay
                if decay is None:
                    decay = weight_decay if is_decayed(name, parameter) else 0.0
                slots = {slot: torch.zeros_like(shard, dtype=state_dtype, memory_format=torch.contiguous_format)
                         for slot in (("momentum",) if is_muon else ("exp_avg", "exp_avg_sq"))}
                piece = Piece(name, parameter, shard, slots, group.learning_rate_factor, decay, masters)
                (self.muon if is_muon else self.adamw).append(piece)
        self.pieces = [*self.adamw, *self.muon]
        self.by_parameter = {piece.parameter: piece for piece in self.pieces}
        self.orthogonaliser: Orthogonaliser | None = None
        if self.muon:
            self.orthogonaliser = Orthogonaliser([self.placed[piece.parameter] for piece in self.muon], self.stages.mesh)
        self.counted = torch.zeros((), dtype=torch.float32, device=self.device)
        self.copied: torch.cuda.Event | None = None  # when a checkpoint has its copy of what the next update changes

    @property
    def updates(self) -> int:
        """Steps that were not skipped; asking waits for the device."""
        return int(self.counted)

    def complete(self) -> None:
        """Make this rank's gradients those of all ranks, after the last micro-batch."""
        self.stages.complete(lambda parameter: self.by_parameter[parameter].gradient if parameter.requires_grad else None)

    def squared_norm(self) -> torch.Tensor:
        """The sum of squares of this rank's part of the gradient, in fp64; each part is counted on one rank only."""
        return self._squares(True) + self.faulty_copies()

    def faulty_copies(self) -> torch.Tensor:
        """0, and not a number when a part of the gradient that another rank counts is not finite here, where it would do harm."""
        return 0.0 * self._squares(False)

    @torch.no_grad()
    def step(self, learning_rate: float, squared_norm: torch.Tensor, loss: torch.Tensor, clip: float,
             is_usual: torch.Tensor | bool = True) -> torch.Tensor:
        """Update the weights from their gradients, clipped to a global norm of `clip`; gradients may be overwritten.

        `squared_norm` and `loss` are scalars over all ranks. When one of them is not finite, or `is_usual` is false, weights and
        state keep their bits and the step does not count. Returns whether it was made, as a scalar on the device.
        """
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        norm = squared_norm.sqrt()
        is_made = norm.isfinite() & loss.isfinite() & is_usual
        factor = torch.where(norm > clip, clip / (norm + 1e-6), 1.0)
        self._step_adamw(learning_rate, factor, is_made)
        if self.orthogonaliser is not None:
            self._step_muon(learning_rate, factor, is_made, self.orthogonaliser)
        self.counted.add_(is_made)
        if self.masters is not None:
            self.masters.publish()
        return is_made

    def clear(self) -> None:
        """Forget the gradients."""
        if self.masters is not None:
            self.masters.sums.clear()
        for piece in self.pieces:
            piece.parameter.grad = None

    def weights(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        """Each weight as (name, the parameter that lays it out, this rank's part of its exact values)."""
        for name, parameter in self.stages.named_parameters():
            yield name, parameter, self._weight(parameter)

    def state(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        """Each slot as (key, the parameter it belongs to, the shard)."""
        for piece in self.pieces:
            for slot, tensor in piece.slots.items():
                yield f"optimizer.{piece.name}.{slot}", piece.parameter, tensor

    def set_updates(self, updates: int) -> None:
        """Go on as after this many updates, with what `weights` and `state` were filled with."""
        self.counted.fill_(updates)
        if self.masters is not None:
            self.masters.publish()

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts the model's parameters are the weights that are updated, not copies of them."""
        return contextlib.nullcontext() if self.masters is None else self.masters.in_place()

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        if self.masters is not None and parameter in self.masters.exact:
            return self.masters.exact[parameter]
        return local(parameter.detach())

    def _squares(self, is_owned: bool) -> torch.Tensor:
        found = [piece.gradient for piece in self.pieces if (piece.parameter in self.owned) == is_owned]
        held = [gradient for gradient in found if gradient is not None and gradient.numel()]
        if not held:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        wide = torch.promote_types(held[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(held, 2, wide)).double().square().sum()

    def _step_adamw(self, learning_rate: float, factor: torch.Tensor, is_made: torch.Tensor) -> None:
        """AdamW by torch's fused kernel, in the dtype of the weights; it does nothing where found_inf is 1."""
        step, is_skipped = self.counted + 1, (~is_made).float()
        for rate, decay in sorted({(piece.rate_factor, piece.weight_decay) for piece in self.adamw}):
            alike = [piece for piece in self.adamw if (piece.rate_factor, piece.weight_decay) == (rate, decay)]
            for chunk in self._chunks(alike):
                weights, gradients, *moments = map(list, zip(*chunk, strict=True))
                wide = weights[0].dtype
                gradients = [gradient.to(wide) for gradient in gradients]
                torch._foreach_mul_(gradients, factor.to(wide))
                first, second = ([moment.to(wide) for moment in kept] for kept in moments)
                used = [weights, gradients, first, second]
                if self.is_exact:
                    used = [[join(tensors)] for tensors in used]
                torch._fused_adamw_(
                    used[0], used[1], used[2], used[3], [], [step] * len(used[0]), lr=learning_rate * rate, beta1=BETAS[0],
                    beta2=BETAS[1], weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False, found_inf=is_skipped)
                if self.is_exact:
                    used = [take_apart(row[0], weights) for row in used]
                for kept, found in zip((weights, *moments), (used[0], *used[2:]), strict=True):
                    if kept[0] is not found[0]:  # widened, or joined
                        torch._foreach_copy_(kept, found)

    def _chunks(self, pieces: Sequence[Piece]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
        """(weight, gradient, exp_avg, exp_avg_sq) of about CHUNK elements together; what has no gradient is left out."""
        chunk: list[tuple[torch.Tensor, ...]] = []
        elements = 0
        for piece in pieces:
            gradient = piece.gradient
            if gradient is None or not gradient.numel():
                continue
            whole = (piece.shard, gradient.contiguous(), *piece.slots.values())
            parts: Iterable[tuple[torch.Tensor, ...]] = [whole]
            if gradient.numel() > CHUNK:
                parts = zip(*(tensor.view(-1).split(CHUNK) for tensor in whole), strict=True)
            for part in parts:
                if chunk and elements + part[0].numel() > CHUNK:
                    yield chunk
                    chunk, elements = [], 0
                chunk.append(part)
                elements += part[0].numel()
        if chunk:
            yield chunk

    def _step_muon(self, learning_rate: float, factor: torch.Tensor, is_made: torch.Tensor,
                   orthogonaliser: Orthogonaliser) -> None:
        """Orthogonalised momentum (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025)."""
        wanted = []
        for piece in self.muon:
            gradient, kept = piece.gradient, piece.slots["momentum"]
            assert gradient is not None, f"{piece.name} has no gradient"
            gradient = gradient.to(piece.shard.dtype) * factor
            momentum = kept.to(gradient.dtype).lerp(gradient, 1 - MUON_MOMENTUM)
            kept.copy_(torch.where(is_made, momentum, kept))
            wanted.append(gradient.lerp_(momentum, MUON_MOMENTUM))
        for piece, update in zip(self.muon, orthogonaliser(wanted), strict=True):
            rate = learning_rate * piece.rate_factor
            scale = 0.2 * max(self.placed[piece.parameter].shape[-2:]) ** 0.5
            moved = piece.shard.mul(1 - rate * piece.weight_decay).add_(update, alpha=-rate * scale)
            piece.shard.copy_(torch.where(is_made, moved, piece.shard))
