"""Time of one device's operations, by interpolation between what `athanor check` measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import UserError, did_you_mean

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
        self._attention = [Table([[row[3], row[4], row[column] / row[2]] for row in cluster.attention if row[1] == "documents"],
                                 True) for column in (5, 6)]
        chains = {row[1] for row in cluster.elementwise}
        self._chains = {name: [Table([[row[2], row[column]] for row in cluster.elementwise if row[1] == name], True)
                               for column in (3, 4)] for name in chains}
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
        """Seconds of masked attention forward and backward; `matrices` is rows x heads."""
        forward, backward = (table(seq_len, head_dim) * matrices * self._flops_ratio for table in self._attention)
        return forward, backward

    def chain(self, name: str, elements: float) -> tuple[float, float]:
        """Seconds of element-wise work (`add`, `rms_norm`, …) on so many elements, forward and backward."""
        forward, backward = (table(elements) * self._bytes_ratio for table in self._chains[name])
        return forward, backward

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


def block_work(rates: Rates, shape: Any, rows: int, seq_len: int, tp: int, operations: float) -> Work:
    """One decoder block over `rows` rows of `seq_len` tokens; `operations` are its launches beside the measured ones."""
    work, tokens = Work(), float(rows * seq_len)
    hidden, inner = shape.hidden_size, shape.intermediate_size / tp
    query = shape.num_attention_heads * shape.head_dim / tp
    key = shape.num_key_value_heads * shape.head_dim / tp
    projections = ((hidden, query), (hidden, key), (hidden, key), (query, hidden))
    for k, n in (*projections, (hidden, inner), (hidden, inner), (inner, hidden)):
        work.add("matmul", rates.linear(tokens, k, n))
    work.add("attention", rates.attention(rows * shape.num_attention_heads / tp, seq_len, shape.head_dim))
    work.add("elementwise", rates.chain("rms_norm", tokens * hidden / tp), 2)
    work.add("elementwise", rates.chain("add", tokens * hidden / tp), 2)
    work.add("elementwise", rates.chain("silu_mul", tokens * inner))
    work.add("elementwise", rates.chain("rotary", tokens * (query + key)))
    launches = rates.launch(operations)
    work.add("launch", (launches / 3, launches * 2 / 3))
    return work


def ends_work(rates: Rates, shape: Any, tokens: float, tp: int, operations: float) -> Work:
    """Embedding, last norm, head and cross-entropy over `tokens` tokens."""
    work = Work()
    vocabulary = shape.vocab_size / tp
    work.add("elementwise", rates.chain("embedding", tokens * shape.hidden_size))
    work.add("elementwise", rates.chain("rms_norm", tokens * shape.hidden_size / tp))
    work.add("matmul", rates.linear(tokens, shape.hidden_size, vocabulary))
    work.add("cross_entropy", rates.chain("cross_entropy", tokens * vocabulary))
    launches = rates.launch(operations)
    work.add("launch", (launches / 3, launches * 2 / 3))
    return work
