"""What a model is made of, for all who count: the products of each token, its attention, its vectors. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeVar

from athanor.foundation.errors import ModelError

MOST_BLOCKS = 10_000  # which take a tenth of a second; a wrong configuration must not take minutes


@dataclass(frozen=True)
class Product:
    """A matrix that each token is multiplied with: `inputs` numbers become `outputs`."""

    name: str  # qkv, attention_out, gate_up, down, router, experts_gate_up, experts_down, shared_gate_up, head, …
    inputs: int
    outputs: int
    cut: str  # which side tensor parallelism cuts: "outputs" (column), "inputs" (row), "" (whole on each rank)
    layers: int = 1  # how many blocks of the model hold it (the head: 1)
    times: float = 1.0  # how often a token is multiplied with such a matrix (top-k for routed experts)
    copies: int = 1  # matrices of this kind in a block (number of experts)

    @property
    def parameters(self) -> int:
        """Weights in all layers, all copies."""
        return self.inputs * self.outputs * self.copies * self.layers

    @property
    def multiplications(self) -> float:
        """Of one token in all layers; each costs 2 FLOP forward and 4 backward."""
        return self.inputs * self.outputs * self.times * self.layers


@dataclass(frozen=True)
class Attended:
    """Attention of some layers. Sizes are those of one head."""

    layers: int
    heads: int
    key_value_heads: int
    key_size: int
    value_size: int
    window: int = 0  # keys that a query may see, its own included; 0: all before it

    def multiplications(self, keys: float) -> float:
        """Of one query with so many keys and their values, in all layers."""
        return self.layers * self.heads * (self.key_size + self.value_size) * keys

    def keys(self, mean_context: float) -> float:
        """Keys that a query sees on average, when it would see `mean_context` of equally long documents without the window."""
        length = 2 * mean_context - 1
        if not self.window or length <= self.window:
            return mean_context
        return self.window - self.window * (self.window - 1) / (2 * length)


def feed_forward(hidden: int, inner: int, is_gated: bool = True, prefix: str = "", times: float = 1.0,
                 copies: int = 1) -> list[Product]:
    """The two products of a feed-forward layer; a gate and its values are one product."""
    first = Product(f"{prefix}gate_up" if is_gated else f"{prefix}up", hidden, inner * (2 if is_gated else 1), "outputs",
                    times=times, copies=copies)
    return [first, Product(f"{prefix}down", inner, hidden, "inputs", times=times, copies=copies)]


Part = TypeVar("Part", Product, Attended)


class Counted(ABC):
    """Counts of a model, all from what its blocks hold: a shape says what that is, block by block."""

    NORM_VECTORS: ClassVar[int] = 1  # of a norm: a scale; 2: with a shift

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool

    @abstractmethod
    def block_products(self, layer: int) -> list[Product]:
        """The products of one block."""

    @abstractmethod
    def block_attended(self, layer: int) -> Attended:
        """The attention of one block."""

    @abstractmethod
    def block_vectors(self, layer: int) -> int:
        """Parameters of one block that are no product's: norms and biases."""

    @abstractmethod
    def embedding_parameters(self) -> int:
        """Parameters of the table of tokens (and of positions); a tied head is this table."""

    def prediction_blocks(self) -> int:
        """Blocks after the last one that predict further tokens, each with the head once more."""
        return 0

    def embedding_uses(self) -> int:
        """How often what follows the last block uses the embedding: as the head, and for each block that predicts further."""
        return self.prediction_blocks() + self.tie_word_embeddings

    @cached_property
    def _blocks(self) -> range:
        blocks = self.num_hidden_layers + self.prediction_blocks()
        if blocks > MOST_BLOCKS:
            raise ModelError(f"the model has {blocks} blocks; at most {MOST_BLOCKS:,} are counted")
        return range(blocks)

    @cached_property
    def _products(self) -> list[Product]:
        head = Product("head", self.hidden_size, self.vocab_size, "outputs", times=1.0 + self.prediction_blocks())
        return [*_merged([product for layer in self._blocks for product in self.block_products(layer)]), head]

    @cached_property
    def _attended(self) -> list[Attended]:
        return _merged([self.block_attended(layer) for layer in self._blocks])

    def products(self) -> list[Product]:
        """The products of the whole model, the head last. The embedding is none."""
        return list(self._products)

    def attended(self) -> list[Attended]:
        """The attention of the whole model, one entry for each kind of it."""
        return list(self._attended)

    def vectors(self) -> int:
        """Parameters that are neither a product's nor the embedding's: norms and biases of all blocks, the last norm."""
        return sum(self.block_vectors(layer) for layer in self._blocks) + self.NORM_VECTORS * self.hidden_size

    def block_parameters(self, layer: int = 0) -> int:
        """Exact number of parameters of one block."""
        return sum(product.parameters for product in self.block_products(layer)) + self.block_vectors(layer)

    @cached_property
    def _parameters(self) -> int:
        tied = self.vocab_size * self.hidden_size if self.tie_word_embeddings else 0
        return self.embedding_parameters() + self.vectors() - tied + sum(product.parameters for product in self._products)

    def parameters(self) -> int:
        """Exact number of parameters; a tied head counts once."""
        return self._parameters

    def active_parameters(self) -> int:
        """Parameters that take part in one token: of the experts, those it is sent to."""
        unused = sum(p.inputs * p.outputs * p.layers * max(0.0, p.copies - p.times) for p in self._products)
        return self._parameters - round(unused)

    def flops(self, tokens: float, mean_context: float) -> float:
        """Model FLOPs of forward and backward, attention causal, nothing recomputed.

        `mean_context` is the mean number of keys a query sees: (L + 1) / 2 in a document of L tokens. Every matrix weight
        costs 2 FLOP forward and 4 backward per token, the embedding none; scores and values cost 4 FLOP forward per query,
        key and channel, and twice that backward.
        """
        return self._flops(tokens, lambda attended: attended.keys(mean_context))

    def flops_full(self, tokens: float, seq_len: float) -> float:
        """The same with full-square attention, as PaLM (appendix B) counts: every query sees `seq_len` keys, or its window."""
        return self._flops(tokens, lambda attended: min(seq_len, attended.window or seq_len))

    def block_costs(self, mean_context: float) -> list[float]:
        """FLOPs per token of each block, to balance pipeline stages; those of what follows the last block are the last one's."""
        costs = []
        for layer in self._blocks:
            attended = self.block_attended(layer)
            costs.append(6.0 * (sum(product.multiplications for product in self.block_products(layer))
                                + attended.multiplications(attended.keys(mean_context))))
        last = self.num_hidden_layers - 1
        return [*costs[:last], sum(costs[last:]) + 6.0 * self._products[-1].multiplications]

    def _flops(self, tokens: float, keys: Callable[[Attended], float]) -> float:
        matrices = sum(product.multiplications for product in self._products)
        attention = sum(attended.multiplications(keys(attended)) for attended in self._attended)
        return 6.0 * tokens * (matrices + attention)


def _merged(parts: list[Part]) -> list[Part]:
    """Equal parts of several blocks as one of so many layers, in order of the first of each."""
    return [replace(part, layers=layers) for part, layers in Counter(parts).items()]
