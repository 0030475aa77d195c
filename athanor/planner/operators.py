"""Time of one device's operations, by interpolation between what `athanor check` measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import UserError, did_you_mean
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.coefficients import load

QUERY_BLOCK, MOST_BLOCKS = 128, 8  # queries taken together on a CPU (models/cpu_attention.py)
LOGITS_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}  # of a chunk of logits in fp32 (models/loss.py)
WIDTH_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 1}


class Table:
    """A positive quantity over a full grid of sizes; interpolated linearly between logarithms.

    Beyond the grid the nearest edge counts (`extrapolate` False, for rates that saturate) or the last slope goes on.
    """

    def __init__(self, rows: Sequence[Sequence[float]], extrapolate: bool) -> None:
        points = np.asarray(rows, dtype=float)
        self.axes = [np.unique(points[:, i]) for i in range(points.shape[1] - 1)]
        self.values = np.full([len(axis) for axis in self.axes], np.nan)
        for *sizes, value in points:
            self.values[tuple(int(np.searchsorted(axis, size)) for axis, size in zip(self.axes, sizes, strict=True))] = value
        if np.isnan(self.values).any():
            raise UserError("a measured table of cluster.toml lacks rows; run `athanor check` again")
        self.values = np.log(np.maximum(self.values, 1e-12))
        self.logs = [np.log(axis) for axis in self.axes]
        self.extrapolate = extrapolate

    def __call__(self, *sizes: float) -> float:
        values = self.values
        for axis, size in zip(self.logs, sizes, strict=True):
            x = math.log(max(size, 1e-12))
            if not self.extrapolate:
                x = min(max(x, float(axis[0])), float(axis[-1]))
            if len(axis) == 1:
                values = values[0]
                continue
            i = min(max(int(np.searchsorted(axis, x)) - 1, 0), len(axis) - 2)
            share = (x - axis[i]) / (axis[i + 1] - axis[i])
            values = values[i] * (1 - share) + values[i + 1] * share
        return math.exp(float(values))


class Rates:
    """Seconds of operations on one device in one dtype. Raises UserError when the cluster was not measured in it."""

    def __init__(self, cluster: ClusterSpec, dtype: str) -> None:
        self.cluster, self.dtype = cluster, dtype
        measured = {row[0] for row in cluster.matmul}
        if dtype not in measured:
            raise UserError(f"matmuls in {dtype} were not measured on {cluster.host or cluster.accelerator}; "
                            + (did_you_mean(dtype, measured) if measured else "run `athanor check`"))
        self.peak_flops = cluster.peak_flops[dtype]
        forms = ("forward", "input_gradient", "weight_gradient")
        self._matmul = {form: Table([row[2:] for row in cluster.matmul if row[:2] == [dtype, form]], False) for form in forms}
        self._attention = [Table([[row[2], row[3], row[column] / row[1]] for row in cluster.attention], True)
                           for column in (4, 5)]
        self._passes = {name: Table([row[2:] for row in cluster.elementwise if row[1] == name], True)
                        for name in {row[1] for row in cluster.elementwise}}
        updates = np.asarray(cluster.optimizer, dtype=float)
        relative = updates[:, :2] / updates[:, 2:]  # errors count in proportion
        costs, *_ = np.linalg.lstsq(relative, np.ones(len(updates)), rcond=None)
        self._per_tensor, self._per_element = (max(0.0, float(cost)) for cost in costs)
        other = cluster.elementwise[0][0]
        self._bytes_ratio = WIDTH_BYTES[dtype] / WIDTH_BYTES[other]
        self._flops_ratio = cluster.peak_flops[other] / self.peak_flops

    def matmul(self, form: str, m: float, k: float, n: float) -> float:
        """Seconds of one of the products of a linear layer from k to n features over m tokens."""
        return 2.0 * m * k * n / self._matmul[form](m, k, n)

    def linear(self, m: float, k: float, n: float) -> tuple[float, float]:
        """Seconds of a linear layer forward and backward (both gradients)."""
        return (self.matmul("forward", m, k, n),
                self.matmul("input_gradient", m, k, n) + self.matmul("weight_gradient", m, k, n))

    def attention(self, matrices: float, seq_len: float, head_dim: float) -> tuple[float, float]:
        """Seconds of causal attention forward and backward; `matrices` is rows x heads."""
        forward, backward = (table(seq_len, head_dim) * matrices * self._flops_ratio for table in self._attention)
        return forward, backward

    def passes(self, elements: float, **counts: float) -> float:
        """Seconds of single passes over so many elements, such as multiply=2, copy=1."""
        return self._bytes_ratio * sum(self._passes[name](elements) * count for name, count in counts.items())

    def update(self, tensors: int, elements: float) -> float:
        """Seconds of an AdamW step: a cost per tensor and a cost per element, both fitted to the measured rows."""
        return self._per_tensor * tensors + self._per_element * elements

    def launch(self, operations: float) -> float:
        """Seconds of launching operations whose work is too small to measure, forward and backward together."""
        return operations * self.cluster.overhead_seconds["forward_backward"]


@dataclass
class Work:
    """Seconds of one micro-batch on one device, by kind of work; `forward` and `backward` hold the same names."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, seconds: tuple[float, float], times: float = 1.0) -> None:
        self.forward[kind] = self.forward.get(kind, 0.0) + seconds[0] * times
        self.backward[kind] = self.backward.get(kind, 0.0) + seconds[1] * times

    @property
    def forward_seconds(self) -> float:
        return math.fsum(self.forward.values())

    @property
    def seconds(self) -> float:
        return self.forward_seconds + math.fsum(self.backward.values())


def block_work(rates: Rates, shape: DecoderShape, rows: int, seq_len: int, document_tokens: float, tp: int) -> Work:
    """One decoder block over `rows` rows of `seq_len` tokens in documents of `document_tokens`.

    Counts of passes follow `models/fused.py` and `models/cpu_attention.py`.
    """
    work, constants, tokens = Work(), load()["step"], float(rows * seq_len)
    hidden, inner = shape.hidden_size, shape.intermediate_size / tp
    query, key = shape.query_size / tp, shape.key_value_size / tp
    for k, n in ((hidden, query + 2 * key), (query, hidden), (hidden, 2 * inner), (inner, hidden)):
        work.add("matmul", rates.linear(tokens, k, n))
    length = max(8.0, 2 * mean_context(seq_len, document_tokens) - 1)  # equally long documents with as many keys per query
    work.add("attention", rates.attention(tokens / length * shape.num_attention_heads / tp, length, shape.head_dim),
             square_share(length, rates))
    work.add("attention", (rates.passes(tokens * (query + 2 * key), multiply=1, copy=1) + rates.passes(tokens * query, copy=1),
                           rates.passes(tokens * (query + 2 * key), multiply=1, copy=2)))
    work.add("elementwise", (rates.passes(tokens * hidden / tp, copy=1, multiply=2),
                             rates.passes(tokens * hidden / tp, multiply=7)), 2)  # the two norms
    work.add("elementwise", (rates.passes(tokens * hidden / tp, multiply=1), rates.passes(tokens * hidden / tp, multiply=1)), 2)
    work.add("elementwise", (rates.passes(tokens * inner, silu=1, multiply=1),
                             rates.passes(tokens * inner, multiply=2, silu=1, silu_backward=1, copy=1)))
    fused = hidden * (query + 2 * key + 2 * inner)
    work.add("elementwise", (rates.passes(fused, copy=1), rates.passes(fused, copy=1)))
    documents = 1.0 + 2.0 * tokens / document_tokens  # runs of equally long ones: a boundary cuts a run in two
    launches = rates.launch(constants["operations_per_block"] + constants["operations_per_document"] * documents)
    work.add("launch", (launches / 3, launches * 2 / 3))
    return work


def square_share(length: float, rates: Rates) -> float:
    """What is left of a square of scores when queries are taken by blocks, each with the keys up to its end."""
    if rates.cluster.device_type != "cpu" or WIDTH_BYTES[rates.dtype] < 4:
        return 1.0
    blocks = min(max(1, round(length / QUERY_BLOCK)), MOST_BLOCKS)
    return (blocks + 1) / (2 * blocks)


def ends_work(rates: Rates, shape: DecoderShape, tokens: float, tp: int) -> Work:
    """Embedding, last norm, head and loss over `tokens` tokens; the loss works by chunks.

    (It makes its gradients in the forward pass; here they count as backward, which validation does not do.)
    """
    work, constants = Work(), load()["step"]
    vocabulary, hidden = shape.vocab_size / tp, shape.hidden_size
    chunk = loss_chunk(tokens, vocabulary, rates.cluster.device_type)
    elements, part = tokens * hidden, tokens * hidden / tp
    work.add("elementwise", (rates.passes(elements, embedding=1), rates.passes(elements, embedding_backward=1)))
    work.add("elementwise", (rates.passes(part, copy=1, multiply=2), rates.passes(part, multiply=7)))
    work.add("matmul", rates.linear(chunk, hidden, vocabulary), tokens / chunk)
    work.add("cross_entropy", (rates.passes(chunk * vocabulary, log_softmax=1), rates.passes(chunk * vocabulary, exp=1)),
             tokens / chunk)
    work.add("cross_entropy", (0.0, rates.passes(elements, multiply=3) + rates.passes(vocabulary * hidden, multiply=1)))
    launches = rates.launch(constants["operations_ends"] + constants["operations_per_chunk"] * tokens / chunk)
    work.add("launch", (launches / 3, launches * 2 / 3))
    return work


def loss_chunk(tokens: float, vocabulary: float, device_type: str) -> float:
    """Tokens whose logits exist at one time."""
    return min(tokens, max(64.0, LOGITS_BYTES[device_type] / 4 / vocabulary))


def newton_schulz_seconds(rates: Rates, rows: int, columns: int) -> float:
    """Muon's orthogonalisation of one matrix: five times two products of r x r x c, one of r x r x r and four passes."""
    small, large = min(rows, columns), max(rows, columns)
    products = 2 * rates.matmul("forward", small, large, small) + rates.matmul("forward", small, small, small)
    return 5 * (products + rates.passes(small * large, multiply=2) + rates.passes(small * small, multiply=3))


def mean_context(seq_len: int, document_tokens: float) -> float:
    """Keys that a query sees on average in a row of `seq_len` when documents end at random every `document_tokens`.

    Position j of a row sees d (1 - exp(-j / d)) keys, averaged over the row.
    """
    ratio = seq_len / document_tokens
    return document_tokens * (1.0 - (1.0 - math.exp(-ratio)) / ratio) + 0.5
