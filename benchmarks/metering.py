"""What the ledger costs: steps whose intervals are recorded and compared between ranks, against steps that do neither.
And what the watchdog costs: signs of life, time without a processor and comparison of ranks, against none of them.
And, as a control, what comes out when there is no difference.

    python benchmarks/metering.py [--steps N] [--json] [--quick]

One run of the real trainer for each contest, on one rank and sharded over two, which switches between both kinds every
`BLOCK` steps: neighbours on the machine then disturb both alike. Which of a pair of blocks comes first is drawn. Printed: what a
step takes by the clock, and of rank 0's processor time, metered / unmetered and watched / unwatched, with 95 % bootstrap
intervals over the pairs. Writing metrics.jsonl, and what torch's flight recorder notes of collectives, is in both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pairs import CONFIDENCE, DRAWS, Stopwatch, Turn, interval_text
from workload import prepare_run, train

from athanor.models.shapes.decoder import DecoderShape

SEQ_LEN, ROWS = 128, 8
BLOCK = 10  # steps of one kind
CONTESTS = {"metering:train_metered": "metered / unmetered", "metering:train_watched": "watched / unwatched",
            "metering:train_alike": "both alike, to tell the noise"}
SHAPE = DecoderShape(vocab_size=1024, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2,
                     tie_word_embeddings=True)


@dataclass
class Blocks:
    """Switches between two kinds of steps, the same on all ranks, and times each block."""

    switch: Callable[[bool], None]
    seed: int
    is_on: bool = True
    steps: int = 0
    order: list[bool] = field(default_factory=lambda: [True])  # blocks still to come; the first warms up
    turns: dict[bool, list[Turn]] = field(default_factory=lambda: {True: [], False: []})

    def __post_init__(self) -> None:
        self.watch, self.draw = Stopwatch(), random.Random(self.seed)

    def end_step(self) -> None:
        self.steps += 1
        if self.steps % BLOCK:
            return
        if self.order:
            self.order.pop()  # the block that warmed up
        else:
            self.turns[self.is_on].append(self.watch.read())
            self.is_on = not self.is_on
        if len(self.turns[True]) == len(self.turns[False]):
            self.is_on = self.draw.random() < 0.5
        self.switch(self.is_on)
        self.watch = Stopwatch()

    def found(self) -> dict[str, Any]:
        """Seconds of both kinds of blocks, pair by pair."""
        pairs = list(zip(self.turns[True], self.turns[False], strict=False))  # the last pair may lack one
        return {clock: [[getattr(turn, clock) for turn in pair] for pair in pairs] for clock in ("wall_seconds", "cpu_seconds")}


def train_metered(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer, with its meter in every other block."""
    from athanor.foundation import intervals
    from athanor.train import loop, meter

    metered: list[meter.Meter] = []
    blocks = Blocks(lambda is_on: intervals.activate(metered[0].recorder if is_on else None), seed=1)
    end_step = meter.Meter.end_step

    def count(self: meter.Meter, **counted: Any) -> None:
        metered[:] = [self]
        if blocks.is_on:
            end_step(self, **counted)
        blocks.end_step()

    meter.Meter.end_step = count  # type: ignore[assignment, method-assign]
    return {**loop.train_stage(channel, **arguments), "blocks": blocks.found()}


def train_watched(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer, whose watchdog sleeps in every other block."""
    from athanor.train import beat, loop, meter, straggler

    metered: list[meter.Meter] = []

    def switch(is_on: bool) -> None:
        metered[0].recorder.delay = metered[0].pace.delay if is_on else float

    blocks = Blocks(switch, seed=2)
    end_step, write, answer, take, add = (meter.Meter.end_step, beat.Beat.write, beat.Beat.answer, straggler.Pace.take,
                                          straggler.Stragglers.add)

    def count(self: meter.Meter, **counted: Any) -> None:
        metered[:] = [self]
        end_step(self, **counted)
        blocks.end_step()

    def take_nothing(self: straggler.Pace) -> list[float]:
        if blocks.is_on:
            return take(self)
        self.recorder.rows.clear()
        self.ends.clear()
        self.ends.append(0)
        return []

    meter.Meter.end_step = count  # type: ignore[assignment, method-assign]
    beat.Beat.write = lambda self: write(self) if blocks.is_on else None  # type: ignore[method-assign]
    beat.Beat.answer = lambda self: answer(self) if blocks.is_on else None  # type: ignore[method-assign]
    straggler.Pace.take = take_nothing  # type: ignore[method-assign]
    straggler.Stragglers.add = lambda self, *told: add(self, *told) if blocks.is_on else None  # type: ignore[method-assign]
    return {**loop.train_stage(channel, **arguments), "blocks": blocks.found()}


def train_alike(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer as it is in all blocks, which should come out as 1."""
    from athanor.train import loop, meter

    blocks = Blocks(lambda is_on: None, seed=3)
    end_step = meter.Meter.end_step

    def count(self: meter.Meter, **counted: Any) -> None:
        end_step(self, **counted)
        blocks.end_step()

    meter.Meter.end_step = count  # type: ignore[assignment, method-assign]
    return {**loop.train_stage(channel, **arguments), "blocks": blocks.found()}


def ratio(pairs: list[list[float]]) -> tuple[float, float, float]:
    """All blocks that are on / all that are off, with its bootstrap interval; rare costs, as of an exchange, count in full."""
    seconds = np.asarray(pairs)  # [pairs, (on, off)]
    drawn = seconds[np.random.default_rng(0).integers(0, len(seconds), (DRAWS, len(seconds)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [(100.0 - CONFIDENCE) / 2, (100.0 + CONFIDENCE) / 2])
    on, off = seconds.sum(axis=0)
    return float(on / off), float(low), float(high)


def contest(recipe: Path, target: str, ranks: int, steps: int) -> dict[str, Any]:
    """One run that switches between both kinds of steps."""
    found = train(recipe, SHAPE, ranks, f"parallel.dp_shard={ranks}", f"stage.pretrain.steps={steps}",
                  f"stage.pretrain.seq_len={SEQ_LEN}", f"stage.pretrain.global_batch_tokens={ROWS * SEQ_LEN}",
                  f"stage.pretrain.micro_batch_size={ROWS // 2}", f"stage.pretrain.evaluate_every={steps}",
                  f"stage.pretrain.checkpoint_every={steps}", target=target)["blocks"]
    return {"contest": CONTESTS[target], "ranks": ranks, "steps": steps, "pairs": len(found["wall_seconds"]),
            "ratio": ratio(found["wall_seconds"]), "processor_ratio": ratio(found["cpu_seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each run, half of them of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that everything runs")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    steps = 5 * BLOCK if options.quick else options.steps
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_run(Path(folder), SHAPE.vocab_size, 4 if options.quick else 40)
        found = [contest(recipe, target, ranks, steps) for target in CONTESTS for ranks in (1, 2)]
    if options.json:
        print(json.dumps(found))
        return
    for each in found:
        print(f"{each['ranks']} rank(s), {each['pairs']} pairs of {BLOCK} steps: {each['contest']} "
              f"{interval_text(each['ratio'])} by the clock, {interval_text(each['processor_ratio'])} of processor time")


if __name__ == "__main__":
    main()
