"""What the ledger costs: training that records every interval and compares notes, against training that does neither.
And what the watchdog costs: signs of life, torch's flight recorder and the comparison of ranks, against none of them.

    python benchmarks/metering.py [--rounds N] [--json] [--quick]

Pairs of runs of the real trainer, of 500 steps each, which of a pair is first changes; on one rank, and sharded over two.
Printed: time from the first step to the last, and processor time of rank 0 (which neighbours on the machine disturb less),
metered / unmetered and watched / unwatched, with their 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairs import interval_text, ratio
from workload import prepare_run, train

from athanor.models.shapes.decoder import DecoderShape

SEQ_LEN, ROWS = 128, 8
TRAIN, UNMETERED, UNWATCHED = "metering:train_metered", "metering:train_unmetered", "metering:train_unwatched"
CONTESTS = {UNMETERED: "metered / unmetered", UNWATCHED: "watched / unwatched"}
SHAPE = DecoderShape(vocab_size=1024, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2,
                     tie_word_embeddings=True)


def train_metered(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer as it is, with the processor time it took."""
    from athanor.train import loop

    begin = time.process_time()
    return {**loop.train_stage(channel, **arguments), "processor_seconds": time.process_time() - begin}


def train_unmetered(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer without its meter, which is asked for nothing but a book at the end."""
    from athanor.train import meter, validate

    def count(self: Any, **counted: float) -> None:
        self.step += 1

    meter.Meter.end_step = count  # type: ignore[method-assign]
    meter.activate = validate.activate = lambda recorder: None  # type: ignore[assignment]
    return train_metered(channel, **arguments)


def train_unwatched(channel: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    """Rank function: the trainer without signs of life, recorded collectives and comparison of ranks."""
    from athanor.train import beat, straggler

    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
    beat.start = lambda folder, step: None  # type: ignore[assignment]
    straggler.Pace.end_step = lambda self: None  # type: ignore[method-assign]
    straggler.Pace.take = lambda self: self.recorder.rows.clear() or []  # type: ignore[func-returns-value, method-assign]
    straggler.os.path.exists = lambda path: False
    straggler.Stragglers.add = lambda self, seconds, hosts: None  # type: ignore[method-assign]
    return train_metered(channel, **arguments)


def compare(recipe: Path, without: str, ranks: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of both kinds of runs in turns, by the clock and of the processor, and their ratios."""
    seconds: dict[str, list[float]] = {TRAIN: [], without: []}
    processor: dict[str, list[float]] = {TRAIN: [], without: []}
    overrides = [f"parallel.dp_shard={ranks}", f"stage.pretrain.steps={steps}", f"stage.pretrain.seq_len={SEQ_LEN}",
                 f"stage.pretrain.global_batch_tokens={ROWS * SEQ_LEN}", f"stage.pretrain.micro_batch_size={ROWS // 2}",
                 f"stage.pretrain.evaluate_every={steps}", f"stage.pretrain.checkpoint_every={steps}"]
    for number in range(rounds):
        for target in (TRAIN, without) if number % 2 else (without, TRAIN):
            found = train(recipe, SHAPE, ranks, *overrides, target=target)
            seconds[target].append(found["loop_seconds"])
            processor[target].append(found["processor_seconds"])
    return {"contest": CONTESTS[without], "ranks": ranks, "steps": steps, "seconds": seconds,
            "ratio": ratio(seconds[TRAIN], seconds[without]),
            "processor_ratio": ratio(processor[TRAIN], processor[without])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that everything runs")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    steps, rounds = (5, 1) if options.quick else (500, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_run(Path(folder), SHAPE.vocab_size, 4 if options.quick else 40)
        found = [compare(recipe, without, ranks, steps, rounds) for without in CONTESTS for ranks in (1, 2)]
    if options.json:
        print(json.dumps(found))
        return
    for each in found:
        print(f"{each['ranks']} rank(s), {each['steps']} steps: {each['contest']} {interval_text(each['ratio'])} by the clock, "
              f"{interval_text(each['processor_ratio'])} of processor time")


if __name__ == "__main__":
    main()
