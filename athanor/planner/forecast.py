"""From shape, layout and cluster to a book: every second of a step, and of a stage, in exactly one account."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.layout import Layout, keeps_whole
from athanor.ledger.book import Book
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.coefficients import load, python_factor
from athanor.planner.collectives import Curves, fully_shard_seconds, tensor_seconds
from athanor.planner.memory import peak_memory
from athanor.planner.operators import Rates, Work, block_work, ends_work, loss_chunk, mean_context, newton_schulz_seconds


@dataclass(frozen=True)
class StageChoice:
    """What a stage will do; steps of `rows` rows of `seq_len` tokens, in micro-batches of `micro_batch_size` rows a rank."""

    name: str
    seq_len: int
    micro_batch_size: int
    num_microbatches: int
    steps: int
    precision: str
    checkpoint_every: int
    evaluate_every: int
    optimizer: str
    document_tokens: float  # mean length of what attention may not leave
    evaluation_tokens: float = 0.0

    def global_batch_tokens(self, layout: Layout) -> int:
        return self.seq_len * self.micro_batch_size * self.num_microbatches * layout.data_ranks


@dataclass(frozen=True)
class Step:
    """One training step: wall seconds, device-seconds by account, and the forward seconds of one micro-batch."""

    seconds: float
    accounts: dict[str, float]
    parts: dict[str, float]  # device-seconds of computing, by kind of work
    forward_seconds: float


class Forecaster:
    """Forecasts on one cluster; tables are prepared once per dtype."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster, self.curves, self._rates = cluster, Curves(cluster), dict[str, Rates]()
        self._work: dict[Any, tuple[Work, Work]] = {}  # of a block and of the ends, by what they depend on

    def rates(self, dtype: str) -> Rates:
        if dtype not in self._rates:
            self._rates[dtype] = Rates(self.cluster, dtype)
        return self._rates[dtype]

    def step(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> Step:
        """One step of a stage."""
        constants, rates, slow = load()["step"], self.rates(stage.precision), python_factor(self.cluster.python)
        work, times, devices = self._micro_batch(shape, layout, stage), stage.num_microbatches, layout.world_size
        compute = times * work.seconds + constants["python_seconds"] * slow
        data_parallel, tensor = self._traffic(shape, layout, stage)
        update, exchange = self._update(shape, layout, stage.optimizer)
        entry = constants["input_seconds_per_row"] * stage.micro_batch_size * times * slow
        skew = self._skew(compute, shape, times) if devices > 1 else 0.0
        seconds = {"data_parallel": data_parallel + exchange, "tensor": tensor, "skew": skew, "optimizer": update,
                   "input": entry}
        tokens = stage.global_batch_tokens(layout)
        useful = shape.flops(tokens, mean_context(stage.seq_len, stage.document_tokens)) / rates.peak_flops
        accounts = {"useful": useful, "kernel": compute * devices - useful}
        accounts |= {name: value * devices for name, value in seconds.items() if value}
        parts = {kind: times * devices * (work.forward[kind] + work.backward[kind]) for kind in work.forward}
        return Step(compute + math.fsum(seconds.values()), accounts, parts, work.forward_seconds)

    def stage(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> Book:
        """The book of a whole stage: its steps, and start, checkpoints, validations and metering."""
        constants, step = load()["stage"], self.step(shape, layout, stage)
        slow, devices = python_factor(self.cluster.python), layout.world_size
        once = {"startup": (constants["startup_seconds"] + constants["startup_seconds_per_parameter"] * shape.parameters()) * slow
                + self.cluster.startup_seconds.get("join", 0.0)}
        saves = math.ceil(stage.steps / stage.checkpoint_every) + 1  # and the model's folder
        once["checkpoint"] = saves * self.save_seconds(shape, layout)
        checks = math.ceil(stage.steps / stage.evaluate_every)
        once["evaluation"] = checks * self.validation_seconds(step, shape, layout, stage)
        once["metering"] = constants["metering_seconds"] * slow * stage.steps * step.seconds / constants["metering_every_seconds"]
        book = Book("forecast", devices, self.cluster.accelerator, self.rates(stage.precision).peak_flops)
        for name, value in step.accounts.items():
            book.add(name, value * stage.steps, "planned")
        for name, value in once.items():
            book.add(name, value * devices, "planned")
        book.wall_seconds = stage.steps * step.seconds + math.fsum(once.values())
        book.device_seconds = book.wall_seconds * devices
        book.tokens = float(stage.steps * stage.global_batch_tokens(layout))
        book.model_flops = shape.flops(book.tokens, mean_context(stage.seq_len, stage.document_tokens))
        book.model_flops_full = shape.flops_full(book.tokens, stage.seq_len)
        memory = peak_memory(shape, layout, rows=stage.micro_batch_size, seq_len=stage.seq_len, dtype=stage.precision)
        book.memory_bytes = {kind: [value] for kind, value in memory.items()}
        return book.close()

    def save_seconds(self, shape: DecoderShape, layout: Layout) -> float:
        """One checkpoint: weights and both moments of this rank's shards, written and synced."""
        size = 12.0 * shape.parameters() / (layout.dp_shard * layout.tp)
        disk = self.cluster.disk
        written = size / disk["write_bytes_per_second"] + disk.get("sync_seconds", 0.0)
        return float(load()["stage"]["checkpoint_seconds"] + written)

    def validation_seconds(self, step: Step, shape: DecoderShape, layout: Layout, stage: StageChoice) -> float:
        """One validation: forward over the held-out tokens, split over data ranks, and a generated sample."""
        constants = load()["stage"]
        batch = stage.seq_len * stage.micro_batch_size * layout.data_ranks
        sample = constants["sample_tokens"] * constants["decode_seconds_per_block"] * shape.num_hidden_layers
        return float(math.ceil(stage.evaluation_tokens / batch) * step.forward_seconds
                     + sample * python_factor(self.cluster.python))

    def _micro_batch(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> Work:
        rates, rows, seq_len = self.rates(stage.precision), stage.micro_batch_size, stage.seq_len
        key = (replace(shape, num_hidden_layers=1), layout.tp, rows, seq_len, stage.precision, stage.document_tokens)
        if key not in self._work:
            self._work[key] = (block_work(rates, shape, rows, seq_len, stage.document_tokens, layout.tp),
                               ends_work(rates, shape, rows * seq_len, layout.tp))
        block, ends = self._work[key]
        total = Work()
        factor = load()["step"]["compute_factor"]
        for work, times in ((ends, factor), (block, factor * shape.num_hidden_layers)):
            for kind in work.forward:
                total.add(kind, (work.forward[kind], work.backward[kind]), times)
        return total

    def _traffic(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> tuple[float, float]:
        """Seconds of a step in data-parallel and in tensor-parallel collectives."""
        data = tensor = 0.0
        if layout.data_ranks > 1:
            ends = 4.0 * shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2) / layout.tp
            block = (4.0 * shape.parameters() / layout.tp - ends) / shape.num_hidden_layers
            wait = self.cluster.overhead_seconds["sharded_block"] * load()["step"]["sharded_block_factor"]
            is_whole = keeps_whole(layout, shape.parameters())
            data = (1 if is_whole else stage.num_microbatches) * (
                shape.num_hidden_layers * fully_shard_seconds(self.curves, block, reshard=not is_whole)
                + fully_shard_seconds(self.curves, ends, reshard=False) + wait * (shape.num_hidden_layers + 1))
            data += 2 * self.curves("all_reduce", 8.0)  # the global token count, and the gradient's norm
        if layout.tp > 1:
            tokens = stage.micro_batch_size * stage.seq_len
            chunk = loss_chunk(tokens, shape.vocab_size / layout.tp, self.cluster.device_type)
            tensor = stage.num_microbatches * tensor_seconds(self.curves, shape, tokens, chunk, stage.precision)
        return data, tensor

    def _update(self, shape: DecoderShape, layout: Layout, optimizer: str) -> tuple[float, float]:
        """Seconds of an update, and of the messages that Muon needs for it (see train/optimizer.py, train/muon.py)."""
        rates = self.rates("fp32") if any(row[0] == "fp32" for row in self.cluster.matmul) else next(iter(self._rates.values()))
        hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.key_value_size
        matrices = [(shape.query_size, hidden)] * 2 + [(kv, hidden)] * 2 + [(inner, hidden)] * 3
        tensors = 9 * shape.num_hidden_layers + (2 if shape.tie_word_embeddings else 3)
        elements, seconds, exchange = float(shape.parameters()), 0.0, 0.0
        seconds += rates.launch(load()["step"]["operations_per_update"] * tensors)
        if optimizer == "muon":
            sizes = shape.num_hidden_layers * sum(rows * columns for rows, columns in matrices)
            tensors, elements = tensors - 7 * shape.num_hidden_layers, elements - sizes
            each = shape.num_hidden_layers * sum(newton_schulz_seconds(rates, *size) for size in matrices)
            seconds += load()["step"]["muon_factor"] * each / layout.world_size
            if layout.world_size > 1:
                exchange = 2 * self.curves("all_gather", 4.0 * sizes / layout.world_size)
        return seconds + rates.update(tensors, elements / (layout.dp_shard * layout.tp)), exchange

    def _skew(self, compute: float, shape: DecoderShape, micro_batches: int) -> float:
        """Waiting for the slowest rank between two collectives, whose spread shrinks as the work between them grows."""
        least = float(load()["step"]["least_skew"])
        between = compute / (micro_batches * 3 * (shape.num_hidden_layers + 1))
        found = [row[1] for row in sorted(self.cluster.jitter, key=lambda row: abs(math.log(row[0] / max(between, 1e-6))))]
        return compute * max([least, *map(float, found[:1])])
