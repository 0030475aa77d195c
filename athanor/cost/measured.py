"""Rates of a machine that `athanor check` measured: seconds by interpolation between the rows of its cluster.toml."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from athanor.cluster.spec import ClusterSpec
from athanor.cost.case import FULL, NONE, PIECES, Array, Case, case_of
from athanor.cost.coefficients import load, python_factor
from athanor.cost.rates import Work
from athanor.foundation.errors import UserError, did_you_mean
from athanor.models.shapes.decoder import DecoderShape

QUERY_BLOCK, MOST_BLOCKS = 128, 8  # queries taken together on a CPU (models/cpu_attention.py)
LOGITS_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # of a chunk of logits in fp32 (models/loss.py)
TRUSTED = 1 / 3, 3.0  # a factor beyond is a disturbed measurement
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

    def __call__(self, *sizes: ArrayLike) -> Array:
        """The quantity at arrays of sizes, which may have different shapes."""
        corners: list[tuple[tuple[Array, ...], Array | float]] = [((), 1.0)]
        for axis, size in zip(self.logs, sizes, strict=True):
            x = np.log(np.maximum(np.asarray(size, dtype=float), 1e-12))
            x = x if self.extrapolate else np.clip(x, axis[0], axis[-1])
            low = np.clip(np.searchsorted(axis, x) - 1, 0, max(len(axis) - 2, 0))
            if len(axis) == 1:
                corners = [((*index, low), weight) for index, weight in corners]
                continue
            share = (x - axis[low]) / (axis[low + 1] - axis[low])
            corners = [((*index, low + up), weight * (share if up else 1 - share)) for index, weight in corners for up in (0, 1)]
        return np.asarray(np.exp(sum(self.values[index] * weight for index, weight in corners)))


class Measured:
    """Seconds of operations among the ranks of one machine in one dtype, as if no communication were hidden.

    Raises UserError when the cluster was not measured in that dtype.
    """

    def __init__(self, cluster: ClusterSpec, dtype: str, optimizer: str = "adamw") -> None:
        measured = {row[0] for row in cluster.matmul}
        if dtype not in measured:
            raise UserError(f"matmuls in {dtype} were not measured on {cluster.host or cluster.accelerator}; "
                            + (did_you_mean(dtype, measured) if measured else "run `athanor check`"))
        self.cluster, self.dtype, self.optimizer = cluster, dtype, optimizer
        self.constants, self.slow = load()["step"], python_factor(cluster.python)
        self.peak_flops = np.full(1, cluster.peak_flops[dtype])
        forms = ("forward", "input_gradient", "weight_gradient")
        self._matmul = {form: Table([row[2:] for row in cluster.matmul if row[:2] == [dtype, form]], False) for form in forms}
        self._attention = [Table([[row[2], row[3], row[column] / row[1]] for row in cluster.attention], True)
                           for column in (4, 5)]
        self._passes = {name: Table([row[2:] for row in cluster.elementwise if row[1] == name], True)
                        for name in {row[1] for row in cluster.elementwise}}
        self._curves = {name: Table(rows, True) for name, rows in cluster.collectives.items()}
        updates = np.asarray(cluster.optimizer, dtype=float)
        relative = updates[:, :2] / updates[:, 2:]  # errors count in proportion
        costs, *_ = np.linalg.lstsq(relative, np.ones(len(updates)), rcond=None)
        self._per_tensor, self._per_element = (max(0.0, float(cost)) for cost in costs)
        other = cluster.elementwise[0][0]
        self._bytes_ratio = WIDTH_BYTES[dtype] / WIDTH_BYTES[other]
        self._flops_ratio = cluster.peak_flops[other] / cluster.peak_flops[dtype]
        self._computing, self._gathering, self._meeting, self._hook_seconds = 1.0, 1.0, self.constants["collective_factor"], 0.0
        self._learn([row for row in cluster.steps if row[0] == dtype and (row[-3] == 1 or cluster.device_type == "cpu")])

    def _learn(self, rows: Sequence[Sequence[Any]]) -> None:
        """From steps: factors of computing, gathers, collectives in blocks (not of GPUs, whose hosts go on); sharding's cost."""
        alone, logs = dict[tuple[Any, ...], float](), list[float]()
        for _, *sizes, shard, tp, seconds, waited in sorted(rows, key=lambda row: row[-4]):
            case = _measured_step(sizes, shard, tp, self.dtype)
            if tp > 1:
                block, ends = self.tensor(case)
                self._meeting *= float(np.clip(waited / (case.layers * block + ends)[0], *TRUSTED))
            elif shard == 1:
                alone[tuple(sizes)] = seconds
                work = self.work(case)
                predicted = case.layers * sum(work.seconds("block")) + sum(work.seconds("ends"))
                logs.append(float(np.log(seconds / predicted[0])))
            elif tuple(sizes) in alone:
                self._gathering = float(np.clip(waited / self.data_parallel(case, np.zeros(1))[0], *TRUSTED))
                self._hook_seconds = max(0.0, seconds - alone[tuple(sizes)] - waited) / (float(case.layers[0]) + 1)
        if logs:
            self._computing = float(np.clip(np.exp(np.mean(logs)), *TRUSTED))

    def matmul(self, form: str, m: ArrayLike, k: ArrayLike, n: ArrayLike) -> Array:
        """Seconds of one of the products of a linear layer from k to n features over m tokens."""
        m, k, n = (np.asarray(size, dtype=float) for size in (m, k, n))
        return np.asarray(2.0 * m * k * n / self._matmul[form](m, k, n))

    def linear(self, m: ArrayLike, k: ArrayLike, n: ArrayLike) -> tuple[Array, Array]:
        """Seconds of a linear layer forward and backward (both gradients)."""
        return (self.matmul("forward", m, k, n),
                self.matmul("input_gradient", m, k, n) + self.matmul("weight_gradient", m, k, n))

    def passes(self, elements: ArrayLike, **counts: float) -> Array:
        """Seconds of single passes over so many elements, such as multiply=2, copy=1."""
        return np.asarray(self._bytes_ratio * sum(self._passes[name](elements) * count for name, count in counts.items()))

    def launch(self, operations: ArrayLike) -> Array:
        """Seconds of launching operations whose work is too small to measure, forward and backward together."""
        return np.asarray(np.asarray(operations) * self.cluster.overhead_seconds["forward_backward"])

    def collective(self, name: str, full_bytes: ArrayLike) -> Array:
        """`full_bytes` is the whole tensor, not one rank's part. Below the smallest size measured the latency counts."""
        if name not in self._curves:
            raise UserError(f"{name} was not measured on {self.cluster.host or self.cluster.accelerator}; "
                            "run `athanor check` again")
        table = self._curves[name]
        return table(np.maximum(full_bytes, float(table.axes[0][0])))

    def work(self, case: Case) -> Work:
        """A micro-batch's computing. Counts of passes follow `models/fused.py` and `models/cpu_attention.py`."""
        work, c, tokens = Work(), self.constants, case.tokens
        hidden, query = case.hidden / case.tp, case.heads * case.key_size / case.tp
        key = case.key_value_heads * case.key_size / case.tp
        is_expert = case.copies > 1
        cut = np.where(is_expert | (case.is_whole > 0), 1.0, case.tp)  # experts are cut too, but so are the tokens they get
        rows = np.where(is_expert, tokens * case.top_k * case.ep / case.copies, tokens)
        inputs, outputs = np.where(case.is_row > 0, case.inputs / cut, case.inputs), np.where(
            case.is_row > 0, case.outputs, case.outputs / cut)
        number = np.where(is_expert, case.copies / case.ep * case.moe_layers, case.uses) / case.layers
        products = self.linear(np.maximum(rows, 1.0), np.maximum(inputs, 1.0), np.maximum(outputs, 1.0))
        forward, backward = ((time * number).sum(axis=0) for time in products)
        work.add("matmul", forward, backward)
        length = np.maximum(8.0, 2 * case.mean_context - 1)  # equally long documents with as many keys per query
        matrices = tokens / length * case.heads / case.tp
        square = self._square_share(length)
        forward, backward = (table(length, case.key_size) * matrices * self._flops_ratio * square for table in self._attention)
        work.add("attention", forward, backward)
        turned = query + 2 * key
        work.add("attention", self.passes(tokens * turned, multiply=1, copy=1) + self.passes(tokens * query, copy=1),
                 self.passes(tokens * turned, multiply=1, copy=2))
        norm = tokens * hidden
        work.add("elementwise", 2 * self.passes(norm, copy=1, multiply=3), 2 * self.passes(norm, multiply=8))
        inner, gate = tokens * case.inner / case.tp, (case.pieces == PIECES["gate_up"]).any(axis=0)  # GELU takes what SiLU does
        work.add("elementwise", self.passes(inner, silu=1) + gate * self.passes(inner, multiply=1),
                 self.passes(inner, silu_backward=1) + gate * self.passes(inner, multiply=2, silu=1, copy=1))
        fused = case.hidden * (turned + 2 * gate * case.inner / case.tp)
        work.add("elementwise", self.passes(fused, copy=1), self.passes(fused, copy=1))
        documents = 1.0 + 2.0 * tokens / case.document_tokens  # a boundary cuts a run of equally long ones in two
        launches = self.launch(c["operations_per_block"] + c["operations_per_document"] * documents)
        work.add("launch", launches / 3, launches * 2 / 3)
        self._add_ends(work, case)
        for kinds in (work.block, work.ends):
            for kind, (forward, backward) in kinds.items():
                factor = c["matmul_factor" if kind == "matmul" else "pass_factor"]
                kinds[kind] = factor * self._computing * forward, factor * self._computing * backward
        work.recomputed = np.where(case.recompute == FULL, work.seconds("block")[0],
                                   np.where(case.recompute == NONE, 0.0, work.block["attention"][0]))
        return work

    def _square_share(self, length: Array) -> Array:
        """What is left of a square of scores when queries are taken by blocks, each with the keys up to its end."""
        if self.cluster.device_type != "cpu" or WIDTH_BYTES[self.dtype] < 4:
            return np.ones(1)
        blocks = np.minimum(np.maximum(1, np.round(length / QUERY_BLOCK)), MOST_BLOCKS)
        return np.asarray((blocks + 1) / (2 * blocks))

    def chunk(self, case: Case) -> Array:
        """Tokens whose logits exist at one time."""
        most = LOGITS_BYTES[self.cluster.device_type] / 4 / (case.vocab / case.tp)
        return np.asarray(np.minimum(case.tokens, np.maximum(64.0, most)))

    def _add_ends(self, work: Work, case: Case) -> None:
        """Embedding, last norm, head and loss; the loss works by chunks.

        (It makes its gradients in the forward pass; here they count as backward, which validation does not do.)
        """
        c, tokens, chunk, vocabulary = self.constants, case.tokens, self.chunk(case), case.vocab / case.tp
        elements, part, times = tokens * case.hidden, tokens * case.hidden / case.tp, tokens / chunk
        work.add("elementwise", self.passes(elements, embedding=1), self.passes(elements, embedding_backward=1), "ends")
        work.add("elementwise", self.passes(part, copy=1, multiply=2), self.passes(part, multiply=7), "ends")
        forward, backward = self.linear(chunk, case.hidden, vocabulary)
        work.add("matmul", times * forward, times * backward, "ends")
        logits = chunk * vocabulary
        work.add("cross_entropy", times * self.passes(logits, log_softmax=1), times * self.passes(logits, exp=1)
                 + self.passes(elements, multiply=3) + self.passes(vocabulary * case.hidden, multiply=1), "ends")
        launches = self.launch(c["operations_ends"] + c["operations_per_chunk"] * times)
        work.add("launch", launches / 3, launches * 2 / 3, "ends")

    def tensor(self, case: Case) -> tuple[Array, Array]:
        """Two gathers and two scatters a block, forward; each is the other's backward. Embedding and head add one of each, and
        every chunk of the loss reduces its rows' largest logits, then their sums and targets.
        """
        size = case.tokens * case.hidden * case.weight_bytes
        pair = 2 * (self.collective("all_gather", size) + self.collective("reduce_scatter", size))
        chunk = self.chunk(case)
        loss = 2 * case.tokens / chunk * self.collective("all_reduce", chunk * case.weight_bytes)
        is_cut = case.tp > 1
        pair, loss = (self._meeting * seconds for seconds in (pair, loss))
        return np.where(is_cut, pair * (2 + (case.recompute == FULL)), 0.0), np.where(is_cut, pair + loss, 0.0)

    def context(self, case: Case) -> Array:
        """Ulysses: queries, keys and values exchanged before attention, its result after it, and back in the backward pass.

        Where heads do not divide, keys and values are gathered, and their gradients scattered (models/attention.py).
        """
        heads, keys = case.heads / case.tp, case.key_value_heads / case.tp
        again, token = case.recompute == FULL, case.tokens * case.key_size * case.weight_bytes
        divides = (heads % case.cp == 0) & (keys % case.cp == 0)
        exchanged = self._where((case.cp > 1) & divides, "all_to_all", 2 * (heads + keys) * token)  # what a rank sends in all
        whole = 2 * keys * token * case.cp
        gathered, scattered = (self._where((case.cp > 1) & ~divides, name, whole) for name in ("all_gather", "reduce_scatter"))
        return np.asarray(self._meeting * ((2 + again) * exchanged + (1 + again) * gathered + scattered))

    def expert(self, case: Case) -> Array:
        """Tokens to their experts and back, and the same for gradients; as many for each rank."""
        size = case.tokens / case.tp * case.top_k * case.hidden * case.weight_bytes
        once = self._where(case.ep > 1, "all_to_all", size)
        return np.asarray(case.moe_layers / case.layers * (4 + 2 * (case.recompute == FULL)) * once)

    def hop(self, case: Case) -> Array:
        sent = self._where(case.pp > 1, "send", case.tokens * case.hidden / case.tp * case.weight_bytes)
        return np.asarray(sent + self.constants["hop_seconds"] * self.slow)

    def _where(self, is_needed: NDArray[np.bool_], name: str, size: Array) -> Array:
        return np.where(is_needed, self.collective(name, size), 0.0) if np.any(is_needed) else np.zeros(1)

    def data_parallel(self, case: Case, computing: Array) -> Array:
        """Block by block, gathers and reductions or (not sharded) one reduction; nothing of it is hidden."""
        stored = np.maximum(case.weight_bytes, 4.0)
        ends = stored * case.end_parameters / case.tp / np.where(case.pp > 1, 2.0, 1.0)
        block, blocks = stored * case.block_parameters / case.tp / case.layers, case.layers / case.pp
        is_whole = case.zero < 3
        times = np.where(is_whole, 1.0, case.num_microbatches)
        out = 2 * self.collective("all_reduce", 8.0)  # the global token count, and the gradient's norm
        for size, count in ((block, blocks), (ends, 1.0)):
            again = np.where(is_whole | (size is ends), 1.0, 2.0)  # gathered once more for the backward pass
            sharded = again * self.collective("all_gather", size) + self.collective("reduce_scatter", size)
            out = out + times * count * np.where(case.shard > 1, sharded, self.collective("all_reduce", size))
        return np.asarray(self._gathering * out)

    def update(self, case: Case) -> tuple[Array, Array]:
        """AdamW for what is no block's matrix under Muon, whose matrices are shared out over all ranks (train/muon.py)."""
        c, held = self.constants, np.where(case.copies > 1, case.moe_layers, case.uses)  # layers that hold a product
        is_there = case.inputs > 0
        matrices = np.where(is_there, held * case.pieces, 0.0) / case.pp
        tensors = matrices.sum(axis=0) + 2 * case.layers / case.pp + np.where(case.pp > 1, 1.5, 3.0)
        elements = (case.block_parameters + case.end_parameters) / case.pp
        seconds, messages = self.launch(c["operations_per_update"] * tensors), np.zeros(1)
        if self.optimizer == "muon":
            rows, columns = np.maximum(case.inputs, 1.0), np.maximum(case.outputs / case.pieces, 1.0)
            each = np.where(is_there, self._newton_schulz(rows, columns) * case.copies * held * case.pieces, 0.0)
            seconds = seconds + c["muon_factor"] * each.sum(axis=0) / case.devices
            sizes = (case.inputs * case.outputs * case.copies * held).sum(axis=0)
            if np.any(case.devices > case.pp):
                each_way = self.collective("all_gather", 4.0 * sizes / case.devices)
                messages = np.where(case.devices > case.pp, 2 * each_way, 0.0)
            tensors, elements = tensors - matrices.sum(axis=0), elements - sizes / case.pp
        return np.asarray(seconds + self._per_tensor * tensors + self._per_element * elements / (case.shard * case.tp)), messages

    def _newton_schulz(self, rows: Array, columns: Array) -> Array:
        """Muon's orthogonalisation of a matrix: five times two products of r x r x c, one of r x r x r and four passes."""
        small, large = np.minimum(rows, columns), np.maximum(rows, columns)
        products = 2 * self.matmul("forward", small, large, small) + self.matmul("forward", small, small, small)
        return np.asarray(5 * (products + self.passes(small * large, multiply=2) + self.passes(small * small, multiply=3)))

    def host(self, case: Case) -> tuple[Array, Array]:
        c, rows = self.constants, case.micro_batch_size * case.num_microbatches
        hooks = np.where(case.shard > 1, self._hook_seconds * (case.layers / case.pp + 1), 0.0)
        return c["python_seconds"] * self.slow + hooks, np.asarray(c["input_seconds_per_row"] * rows * self.slow)

    def skew(self, case: Case, total: Array, computing: Array) -> Array:
        """The spread between two collectives, which shrinks as the work between them grows."""
        between = computing / (case.num_microbatches * 3 * (case.layers + 1))
        share = np.full(between.shape, float(self.constants["least_skew"]))
        if self.cluster.jitter:
            rows = np.array(self.cluster.jitter, dtype=float)
            nearest = np.argmin(np.abs(np.log(rows[:, :1] / np.maximum(between, 1e-6))), axis=0)
            share = np.maximum(share, rows[nearest, 1])
        return np.where(case.dp * case.cp * case.tp > 1, computing * share, 0.0)  # pipeline ranks wait in their bubble

    def own(self) -> Array:
        return np.ones(1)  # `own.py` corrects each account


def _measured_step(sizes: Sequence[int], shard: int, tp: int, dtype: str) -> Case:
    """The case of a row of `steps`: one micro-batch of whole rows, each a document, on each of `shard` sharding ranks."""
    vocab, hidden, inner, layers, heads, tokens, seq_len = sizes
    width = WIDTH_BYTES[dtype]
    return case_of([DecoderShape(vocab, hidden, inner, layers, heads, tie_word_embeddings=True)], {
        "pp": 1, "chunks": 1, "dp": shard, "shard": shard, "cp": 1, "tp": tp, "ep": 1, "zero": 2 if shard > 1 else 0,
        "is_sequence_parallel": tp > 1, "is_scattered": tp > 1, "seq_len": seq_len, "micro_batch_size": tokens / seq_len,
        "num_microbatches": 1, "recompute": NONE, "weight_bytes": max(2, width), "product_bytes": width})
