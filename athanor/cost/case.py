"""Configurations side by side: what the planner prices, as arrays with one entry per configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from athanor.foundation.schedules import DEFAULT_SCHEDULE, SCHEDULES
from athanor.models.shapes.products import Counted

Array = NDArray[np.float64]
PIECES = {"qkv": 3, "gate_up": 2}  # parameters that are multiplied together
SHORT = 1e-6  # of a row in its documents' length: below it the difference of nearly equal numbers would be taken
NO_END = 1e13  # tokens of a document that no row sees the end of
NONE, FULL, SELECTIVE = 0.0, 1.0, 2.0  # recomputation
PLACES = {name: float(place) for place, name in enumerate(SCHEDULES)}  # of pipeline schedules, as a configuration has them


@dataclass(frozen=True)
class Case:
    """C configurations of models, layouts and runs. Arrays are [C], those of products [P, C]; a first dim of 1 holds for all.

    Products are the matrices that a token is multiplied with, the head's apart; sizes are the model's, before any cut.
    """

    # the model; counts of products and of attention are of all layers together
    layers: Array
    hidden: Array
    vocab: Array
    inputs: Array  # [P, C]
    outputs: Array  # [P, C]
    uses: Array  # [P, C] how often a token meets such a matrix: layers x times
    copies: Array  # [P, C] matrices of this kind in a layer; more than one: experts, shared out over ep
    is_row: Array  # [P, C] 1: tensor parallelism cuts the inputs; 0: the outputs
    is_whole: Array  # [P, C] 1: not cut
    pieces: Array  # [P, C] parameters of a layer that a product is made of
    inner: Array  # width of the feed-forward layers that a token passes, of an average layer
    heads: Array
    key_value_heads: Array
    key_size: Array  # of one head
    value_size: Array
    block_parameters: Array  # of all layers together, all experts
    expert_parameters: Array  # of them, in routed experts
    end_parameters: Array  # embedding and head; a tied head counts once
    moe_layers: Array
    top_k: Array
    heads_of_loss: Array  # how often a token meets the head
    scanned: Array  # numbers of a token that recurrences (Mamba) read, in all layers
    # the layout
    pp: Array
    chunks: Array  # stages per pipeline rank
    schedule: Array  # its place in PLACES; 1F1B stands for its interleaved form too
    dp: Array  # data ranks: dp_replicate x dp_shard
    shard: Array  # ranks that share out optimizer state (and more, by zero)
    cp: Array
    tp: Array
    ep: Array
    zero: Array  # 0: all on each rank; 1: optimizer state sharded, 2: gradients too, 3: parameters too
    is_sequence_parallel: Array
    is_cut_by_cost: Array  # 1: the last stage has fewer blocks, for its head; 0: all have as many
    is_scattered: Array  # whether tensor ranks share out what a pipeline rank sends to the next
    # the run
    seq_len: Array
    mean_context: Array  # keys that a query sees on average
    document_tokens: Array  # mean length of what attention may not leave
    micro_batch_size: Array
    num_microbatches: Array
    recompute: Array
    weight_bytes: Array  # of a number as computed with: 2, 4, 8
    product_bytes: Array  # of a number in the blocks' products: 0.5, 1, 2, 4, 8

    @property
    def tokens(self) -> Array:
        """Tokens of a micro-batch on one rank, before tensor parallelism shares them out."""
        return self.micro_batch_size * self.seq_len / self.cp

    @property
    def held_parameters(self) -> Array:
        """Parameters of a rank before data parallelism shards them; in a pipeline the ends are those of its ends' ranks."""
        ends = self.end_parameters / self.tp / np.where(self.pp > 1, 2.0, 1.0)
        return ((self.block_parameters - self.expert_parameters) / self.tp + self.expert_parameters / self.ep) / self.pp + ends

    @property
    def devices(self) -> Array:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def global_batch_tokens(self) -> Array:
        return self.micro_batch_size * self.num_microbatches * self.seq_len * self.dp

    def multiplications(self) -> tuple[Array, Array, Array]:
        """Of one token: in the blocks' products, in causal attention, in the head; each costs 2 FLOPs forward, 4 backward."""
        return ((self.inputs * self.outputs * self.uses).sum(axis=0),
                self.layers * self.heads * (self.key_size + self.value_size) * self.mean_context,
                self.hidden * self.vocab * self.heads_of_loss)

    def model_flops(self) -> Array:
        """FLOPs of a step: products and causal attention, forward and backward, nothing recomputed."""
        return np.asarray(6.0 * self.global_batch_tokens * sum(self.multiplications()))

    def computed_flops(self) -> Array:
        """The same with what is computed again."""
        matrices, attention, _ = self.multiplications()
        again = np.select([self.recompute == FULL, self.recompute == SELECTIVE], [matrices + attention, attention], 0.0)
        return np.asarray(self.model_flops() + 2.0 * self.global_batch_tokens * again)

    def take(self, index: Any) -> Case:
        """Some of the configurations."""
        return Case(**{f.name: _taken(getattr(self, f.name), index) for f in fields(self)})


def _taken(values: Array, index: Any) -> Array:
    return values if values.shape[-1] == 1 else values[..., index]


def case_of(shapes: Sequence[Counted], run: Mapping[str, ArrayLike]) -> Case:
    """The configurations of some models (one for all, or one each) under layouts and runs, by the names of `Case`."""
    columns = {name: np.atleast_1d(np.asarray(values, dtype=np.float64)) for name, values in run.items()}
    models: dict[str, Array] = {}
    columns = {"document_tokens": np.full(1, NO_END), "is_cut_by_cost": np.zeros(1),
               "schedule": np.full(1, PLACES[DEFAULT_SCHEDULE]), **columns}
    each = {id(shape): _model_columns(shape) for shape in shapes}
    most = max(len(found["uses"]) for found in each.values())
    for name in next(iter(each.values())):
        rows = [each[id(shape)][name] for shape in shapes]
        models[name] = (np.stack([np.pad(row, (0, most - len(row)), constant_values=float(name == "copies")) for row in rows],
                                  axis=-1) if np.ndim(rows[0]) else np.array(rows))
    keys_seen = mean_context(columns["seq_len"], columns["document_tokens"])
    seen = np.broadcast_to(keys_seen, np.broadcast_shapes(keys_seen.shape, (len(shapes),)))
    windows = [any(part.window for part in shape.attended()) for shape in shapes]
    if any(windows):
        seen = np.array([_mean_keys(shapes[i % len(shapes)], float(keys)) for i, keys in enumerate(seen)])
    return Case(**{"mean_context": np.asarray(seen, dtype=np.float64), **models, **columns})


def mean_context(seq_len: ArrayLike, document_tokens: ArrayLike) -> Array:
    """Keys that a query sees on average in a row of `seq_len` when documents end at random every `document_tokens`.

    Position j of a row sees d (1 - exp(-j / d)) keys, averaged over the row.
    """
    length = np.asarray(document_tokens, dtype=np.float64)
    ratio = np.asarray(seq_len) / length
    return np.asarray(length * np.where(ratio < SHORT, ratio / 2, 1.0 + np.expm1(-ratio) / ratio) + 0.5)


def _mean_keys(shape: Counted, mean_context: float) -> float:
    parts = shape.attended()
    return sum(part.multiplications(part.keys(mean_context)) for part in parts) / sum(part.multiplications(1.0) for part in parts)


def _model_columns(shape: Counted) -> dict[str, Any]:
    *products, head = shape.products()
    attended = shape.attended()
    layers = sum(part.layers for part in attended)
    experts = [product for product in products if product.name.startswith("experts_")]
    first = max(attended, key=lambda part: part.heads * part.layers * (not part.window))
    heads = sum(part.multiplications(1.0) for part in attended) / (layers * (first.key_size + first.value_size))
    tied = shape.tie_word_embeddings
    return {
        "layers": float(layers), "hidden": float(head.inputs), "vocab": float(head.outputs), "heads_of_loss": head.times,
        "inputs": np.array([p.inputs for p in products], float), "outputs": np.array([p.outputs for p in products], float),
        "uses": np.array([p.layers * p.times for p in products], float),
        "copies": np.array([p.copies if p in experts else 1 for p in products], float),
        "is_row": np.array([p.cut == "inputs" for p in products], float),
        "is_whole": np.array([p.cut == "" for p in products], float),
        "pieces": np.array([PIECES.get(p.name.rpartition("gate_up")[1] or p.name, 1) for p in products], float),
        "inner": sum(p.inputs * p.times * p.layers for p in products if p.cut == "inputs" and p.name != "attention_out") / layers,
        "heads": heads, "key_value_heads": float(first.key_value_heads), "key_size": float(first.key_size),
        "value_size": float(first.value_size), "block_parameters": float(sum(p.parameters for p in products)),
        "expert_parameters": float(sum(p.parameters for p in experts)),
        "end_parameters": float(head.inputs * head.outputs + (0 if tied else shape.embedding_parameters())),
        "moe_layers": float(max((p.layers for p in experts), default=0)),
        "top_k": float(max((p.times for p in experts), default=0)),
        "scanned": float(sum(p.outputs * p.layers for p in products if p.name == "mamba_in"))}
