"""The cost model that Yuan's authors published, kept to compare with. The planner's own forecasts do not use it.

Yuan 2.0 (arXiv:2311.15786), equations 1 to 4, appendices C and D, tables 5 and 6; table 5 is the run of Yuan 1.0
(arXiv:2110.04725). Forms and tables disagree in places, and here stands what reproduces the tables: appendix C prints 4 where
`pipeline` needs 8, and 24 and 2.501 s where `tensor` needs 48 and 2.602 s; equations 3 and 4 leave out the accumulation.
Table 5 was computed with 1 + 1/6H, as printed, for 1 + S/6H; `counts_attention = False` repeats that.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from athanor.foundation.errors import LayoutError


@dataclass(frozen=True)
class YuanRun:
    """A model, its layout and a machine. The paper's letters: A, B, L, S, H, V, Ps, Ts, Ds, F, n x BW_net, BW_link."""

    accumulation: int
    micro_batch_size: int
    num_hidden_layers: int
    seq_len: int
    hidden_size: int
    vocab_size: int
    pp: int
    tp: int
    dp: int
    flops_per_second: float  # a small model of the same kind reaches on one device
    network_bytes_per_second: float  # of a node
    link_bytes_per_second: float  # within a node
    has_lfa: bool = False  # localized filtering before attention

    @property
    def parameters(self) -> float:
        """P. For LFA it falls short of the real count: 16 H^2 a layer, where 18 H^2 are built."""
        per_layer, h = 16 if self.has_lfa else 12, self.hidden_size
        return self.num_hidden_layers * h * (per_layer * h + 13 * per_layer / 12) + self.vocab_size * h

    @property
    def hidden_elements(self) -> float:
        """A x B x S x H: the elements of hidden state that one data rank hands from layer to layer in a step."""
        return float(self.accumulation * self.micro_batch_size * self.seq_len * self.hidden_size)


@dataclass(frozen=True)
class YuanTerms:
    """Seconds of a step: T0, T1, T2, T3 of method 1, T3 of method 2, T4."""

    compute: float
    bubble: float
    pipeline: float
    tensor: float
    optimizer: float
    data_parallel: float

    @property
    def seconds(self) -> float:
        return math.fsum(astuple(self))


def method_1(run: YuanRun, *, counts_attention: bool = True, is_link_two_way: bool = False,
             shards_optimizer: bool = False) -> YuanTerms:
    """Tensor x pipeline x data parallelism.

    Table 6 agrees where the link's rate is meant as the sum of both directions, and where the optimizer is sharded as in
    method 2; the paper says neither.
    """
    ring = (run.tp - 1) / (run.pp * run.tp * run.link_bytes_per_second) * (2 if is_link_two_way else 1)
    tensor = (64 if run.has_lfa else 48) * run.num_hidden_layers * ring * run.hidden_elements
    return _terms(run, counts_attention, run.network_bytes_per_second, tensor, shards_optimizer)


def method_2(run: YuanRun) -> YuanTerms:
    """Pipeline stages of unequal size x data parallelism with a sharded optimizer. Raises LayoutError where tp is not 1."""
    if run.tp != 1:
        raise LayoutError(f"Yuan's method 2 has no tensor parallelism, but tp = {run.tp}; set tp = 1")
    return _terms(run, True, run.link_bytes_per_second, 0.0, True)


def _terms(run: YuanRun, counts_attention: bool, hop_rate: float, tensor: float, shards_optimizer: bool) -> YuanTerms:
    flops, depth = (128, 8) if run.has_lfa else (96, 6)
    attention = (run.seq_len if counts_attention else 1) / (depth * run.hidden_size)
    compute = (flops * run.num_hidden_layers * run.hidden_elements * run.hidden_size * (1 + attention)
               / (run.pp * run.tp * run.flops_per_second))
    exchange = run.parameters * (run.dp - 1) / run.dp / (run.pp * run.network_bytes_per_second)  # of a byte per parameter
    return YuanTerms(compute, compute * (run.pp - 1) / run.accumulation, 8 * run.hidden_elements / hop_rate, tensor,
                     8 * exchange if shards_optimizer else 0.0, 4 * exchange)
