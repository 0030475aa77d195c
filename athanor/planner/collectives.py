"""Time of collectives by size, from the measured curves of the ranks of one machine."""

from __future__ import annotations

from athanor.cluster.spec import ClusterSpec
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.operators import WIDTH_BYTES, Table


class Curves:
    """Seconds of a collective among the ranks that were measured together."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self._tables = {name: Table(rows, True) for name, rows in cluster.collectives.items()}

    def __call__(self, name: str, full_bytes: float) -> float:
        """`full_bytes` is the whole tensor, not one rank's part. Below the smallest size measured the latency counts."""
        table = self._tables[name]
        return table(max(full_bytes, float(table.axes[0][0])))


def fully_shard_seconds(curves: Curves, unit_bytes: float, reshard: bool) -> float:
    """Gather a unit's parameters for forward (and again for backward when resharded), reduce its gradients."""
    return (2 if reshard else 1) * curves("all_gather", unit_bytes) + curves("reduce_scatter", unit_bytes)


def tensor_seconds(curves: Curves, shape: DecoderShape, tokens: float, chunk_tokens: float, dtype: str) -> float:
    """Two gathers and two scatters a block, forward; each is the other's backward. Embedding and head add one of each.

    Every chunk of the loss reduces its rows' largest logits, then their sums and targets.
    """
    size = tokens * shape.hidden_size * WIDTH_BYTES[dtype]
    pairs = 2 * shape.num_hidden_layers + 1
    reductions = 2 * tokens / chunk_tokens * curves("all_reduce", chunk_tokens * WIDTH_BYTES[dtype])
    return 2 * pairs * (curves("all_gather", size) + curves("reduce_scatter", size)) + reductions
