"""From shape, layout and cluster to a book: every second of a step, and of a stage, in exactly one account."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from athanor.cluster.spec import ClusterSpec
from athanor.cost.case import FULL, PLACES, Array, Case, case_of, mean_context
from athanor.cost.coefficients import load, python_factor
from athanor.cost.measured import WIDTH_BYTES, Measured
from athanor.cost.own import COMPUTING, corrected
from athanor.cost.rates import Rates
from athanor.cost.step import price
from athanor.foundation.layout import Layout, keeps_whole
from athanor.foundation.schedules import DEFAULT_SCHEDULE, stages_of
from athanor.laws.goodput import Saving, typical_saving
from athanor.ledger.book import Book
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.estimate import RECOMPUTE
from athanor.planner.memory import peak_memory
from athanor.planner.named import DATASHEET, caveat, datasheet_rates


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
    evaluation_tokens: float = 0.0  # of one validation
    evaluate_rows: int | None = None  # of a validation, where these are not all
    recompute: str = "none"
    schedule: str = DEFAULT_SCHEDULE
    save_async: bool = True

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
    """Forecasts on one cluster, corrected by the `factors` of its own finished runs; tables are prepared once per dtype."""

    def __init__(self, cluster: ClusterSpec, factors: Mapping[str, float] | None = None) -> None:
        self.cluster, self.factors, self._rates = cluster, factors or {}, dict[tuple[str, str], Rates]()

    def rates(self, dtype: str, optimizer: str = "adamw") -> Rates:
        if (dtype, optimizer) not in self._rates:
            self._rates[dtype, optimizer] = (datasheet_rates(self.cluster, dtype) if self.cluster.source == DATASHEET else
                                             Measured(self.cluster, dtype, optimizer))
        return self._rates[dtype, optimizer]

    def steps(self, shape: DecoderShape, layout: Layout, stages: Sequence[StageChoice]) -> list[Step]:
        """One step of each of some stages that agree in precision and optimizer."""
        rates = self.rates(stages[0].precision, stages[0].optimizer)
        case = case_for(shape, layout, stages)
        priced, devices = price(case, rates), layout.world_size
        block, ends = ({kind: case.num_microbatches * devices * share * (pair[0] + pair[1]) for kind, pair in kinds.items()}
                       for kinds, share in ((priced.work.block, case.layers / case.pp), (priced.work.ends, 1 / case.pp)))
        computing = self.factors.get(COMPUTING, 1.0)
        parts = {kind: computing * (block.get(kind, np.zeros(1)) + ends.get(kind, np.zeros(1))) for kind in {**block, **ends}}
        forward = computing * (case.layers / case.pp * priced.work.seconds("block")[0] + priced.work.seconds("ends")[0])
        accounts = {name: devices * value for name, value in priced.accounts.items() if np.any(value)}
        steps = []
        for i in range(len(stages)):
            each = corrected({name: at(value, i) for name, value in accounts.items()}, self.factors)
            steps.append(Step(math.fsum(each.values()) / devices, each, {kind: at(value, i) for kind, value in parts.items()},
                              at(forward, i)))
        return steps

    def step(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> Step:
        """One step of a stage."""
        return self.steps(shape, layout, [stage])[0]

    def stage(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> Book:
        """The book of a whole stage: its steps, and start, checkpoints, validations and metering."""
        constants, step = load()["stage"], self.step(shape, layout, stage)
        slow, devices = python_factor(self.cluster.python), layout.world_size
        once = {"startup": (constants["startup_seconds"] + constants["startup_seconds_per_parameter"] * shape.parameters()) * slow
                + self.cluster.startup_seconds.get("join", 0.0)}
        saves, apart = math.ceil(stage.steps / stage.checkpoint_every), stage.checkpoint_every * step.seconds
        saving, save_seconds = self.saving(shape, layout, stage.save_async), self.save_seconds(shape, layout)
        once |= saving.seconds(saves, saves - 1, apart)
        once["checkpoint"] += save_seconds - max(0.0, saving.write_seconds - save_seconds)  # the model; the last one, waited for
        once["evaluation"] = math.ceil(stage.steps / stage.evaluate_every) * self.validation_seconds(step, shape, layout, stage)
        once["metering"] = constants["metering_seconds"] * slow * stage.steps * step.seconds / constants["metering_every_seconds"]
        book = Book("forecast", devices, self.cluster.accelerator, self.cluster.peak_flops[stage.precision], layout=str(layout))
        for name, value in step.accounts.items():
            book.add(name, value * stage.steps, "planned")
        for name, value in once.items():
            book.add(name, value * devices, "planned")
        book.wall_seconds = stage.steps * step.seconds + math.fsum(once.values())
        book.device_seconds = book.wall_seconds * devices
        book.tokens = float(stage.steps * stage.global_batch_tokens(layout))
        book.model_flops = shape.flops(book.tokens, float(mean_context(stage.seq_len, stage.document_tokens)))
        book.model_flops_full = shape.flops_full(book.tokens, stage.seq_len)
        book.memory_bytes = self.memory(shape, layout, stage)
        book.notes += [caveat(self.cluster)] if self.cluster.source == DATASHEET else []
        return book.close()

    def memory(self, shape: DecoderShape, layout: Layout, stage: StageChoice) -> dict[str, list[float]]:
        """Peak bytes by kind of each pipeline rank."""
        return peak_memory(shape, layout, rows=stage.micro_batch_size, seq_len=stage.seq_len, dtype=stage.precision,
                           recompute=stage.recompute, num_microbatches=stage.num_microbatches, optimizer=stage.optimizer,
                           schedule=stage.schedule, device_type=self.cluster.device_type)

    def saving(self, shape: DecoderShape, layout: Layout, is_async: bool) -> Saving:
        """One checkpoint of the step loop."""
        return typical_saving(self.save_seconds(shape, layout), is_async, self.cluster.device_type)

    def save_seconds(self, shape: DecoderShape, layout: Layout) -> float:
        """One checkpoint that is waited for: weights and both moments of this rank's shards, written and synced."""
        size = 12.0 * shape.parameters() / (layout.dp_shard * layout.tp * layout.pp)
        disk = self.cluster.disk
        written = size / disk["write_bytes_per_second"] + disk.get("sync_seconds", 0.0)
        return float(load()["stage"]["checkpoint_seconds"] + written)

    def validation_seconds(self, step: Step, shape: DecoderShape, layout: Layout, stage: StageChoice) -> float:
        """One validation: forward over the held-out tokens, split over data ranks, stage after stage, and a generated sample."""
        constants = load()["stage"]
        batch = stage.seq_len * stage.micro_batch_size * layout.data_ranks
        sample = constants["sample_tokens"] * constants["decode_seconds_per_block"] * shape.num_hidden_layers
        return float(math.ceil(stage.evaluation_tokens / batch) * step.forward_seconds * layout.pp
                     + sample * python_factor(self.cluster.python))


def case_for(shape: DecoderShape, layout: Layout, stages: Sequence[StageChoice]) -> Case:
    """What our own trainer does in these stages: weights are whole during a step or sharded throughout, as it chooses."""
    zero = 0 if layout.dp_shard == 1 else 2 if keeps_whole(layout, shape.parameters()) else 3
    width = WIDTH_BYTES[stages[0].precision]
    return case_of([shape], {
        "pp": layout.pp, "chunks": stages_of(stages[0].schedule) if layout.pp > 1 else 1,
        "schedule": PLACES[stages[0].schedule],
        "dp": layout.data_ranks, "shard": layout.dp_shard * layout.cp, "cp": layout.cp, "tp": layout.tp, "ep": layout.ep,
        "zero": zero, "is_sequence_parallel": layout.tp > 1, "is_scattered": layout.tp > 1,
        "is_cut_by_cost": 1,
        "seq_len": [stage.seq_len for stage in stages],
        "document_tokens": [stage.document_tokens for stage in stages],
        "micro_batch_size": [stage.micro_batch_size for stage in stages],
        "num_microbatches": [stage.num_microbatches for stage in stages],
        "recompute": [RECOMPUTE.get(stage.recompute, FULL) for stage in stages],
        "weight_bytes": max(2, width), "product_bytes": width})


def at(values: Array, index: int) -> float:
    """The entry of one configuration, or the one that holds for all."""
    return float(values[index if len(values) > 1 else 0])
