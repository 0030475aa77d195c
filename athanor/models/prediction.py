"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): blocks after the last one that predict further tokens.

Block k of D takes what block k - 1, or the model itself, made of token i after its norm, and the embedding of token i + k; with
the model's head it predicts token i + k + 1. Training alone asks for that: generation and evaluation leave these blocks out. In
a folder they are the blocks num_hidden_layers, …, each with a copy of the embedding and of the head beside it.
Legend: T tokens, t this tensor-parallel rank's tokens, H hidden_size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.collectives import gather, own
from athanor.models.context import Context, Packed, Scored
from athanor.models.decoder import Block, Decoder, new_norm
from athanor.models.loss import score
from athanor.models.pieces import Linear, Matrix
from athanor.models.shapes.decoder import DecoderShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class PredictionBlock(Block):
    """A block that first joins two streams: [t, H] of the depth before and [t, H] of embeddings -> [t, H], normed for the head.

    Tensor-parallel ranks join their own tokens. The embedding's half stands first in the published matrix.
    """

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__(shape, layer)
        self.linear: Linear = F.linear
        self.enorm, self.hnorm = new_norm(shape), new_norm(shape)
        self.eh_proj = Matrix(shape.hidden_size, 2 * shape.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": new_norm(shape)})

    def forward(self, x: Tensor, context: Context, embedded: Tensor) -> Tensor:  # type: ignore[override]
        both = torch.cat([self.enorm(embedded, context), self.hnorm(x, context)], 1)
        hidden = super().forward(self.linear(both, self.eh_proj.weight), context)
        return self.shared_head["norm"](hidden, context)  # type: ignore[no-any-return]


class Predicting(Decoder):
    """A decoder with `prediction_blocks` of these on its last stage, which then has the embedding too."""

    def __init__(self, shape: DecoderShape, layers: range | None = None, is_first: bool = True, is_last: bool = True,
                 on_disk: Mapping[str, str] | None = None) -> None:
        super().__init__(shape, layers, is_first, is_last, on_disk)
        first, count = shape.num_hidden_layers, shape.prediction_blocks()
        copies: dict[str, list[str]] = defaultdict(list)
        for number in range(first, first + count):
            copies[EMBEDDING].append(f"model.layers.{number}.embed_tokens.weight")
            copies[EMBEDDING if shape.tie_word_embeddings else HEAD].append(f"model.layers.{number}.shared_head.head.weight")
            if is_last:
                self.model.layers[str(number)] = PredictionBlock(shape, number)  # type: ignore[index, operator, assignment]
        self.copies = copies
        if is_last and count and not hasattr(self.model, "embed_tokens"):
            self.model.embed_tokens = Matrix(shape.vocab_size, shape.hidden_size)

    @property
    def blocks(self) -> dict[str, Block]:
        return {number: block for number, block in super().blocks.items() if not isinstance(block, PredictionBlock)}

    @property
    def further(self) -> list[PredictionBlock]:
        """The blocks that predict further tokens, in order."""
        return [block for block in super().blocks.values() if isinstance(block, PredictionBlock)]

    def score(self, hidden: Tensor, context: Context, targets: Tensor, weights: Tensor | None) -> Scored:
        """As any decoder's, plus mtp_weight / D x the summed losses of all depths, where the context asks for them.

        A label counts as it does for the token before it, and not beyond the end of its document.
        """
        scored = super().score(hidden, context, targets, weights)
        if not isinstance(context, Packed) or not context.mtp_weight or weights is None or not self.further:
            return scored
        tp, made, labels, kept = context.groups.tp, [], [targets], [weights]
        for block in self.further:
            hidden = block(hidden, context, self.embed(labels[-1], context))
            made.append(gather(hidden, tp, context.tokens))
            labels.append(ahead(labels[-1], context))
            kept.append(ahead(kept[-1], context))
        counted = torch.cat(kept[1:])
        summed = score(torch.cat(made), self.head, torch.cat(labels[1:]), counted, tp).weighted_sum
        total = scored.weighted_sum + context.mtp_weight / len(made) * summed
        return scored._replace(weighted_sum=total, mtp=(summed.detach(), counted.sum(dtype=torch.float64)))


def ahead(column: Tensor, context: Packed) -> Tensor:
    """What a column [T] of this context-parallel rank says of the next token of the same document; 0 after the last one."""
    positions, cp = context.positions, context.groups.cp
    goes_on = positions.diff(append=positions.new_zeros(1)) == 1
    return own(gather(column, cp, len(positions), "context").roll(-1) * goes_on, cp)
