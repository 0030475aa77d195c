"""From the death of ranks to the first new step on this machine, split into what takes the time.

    python benchmarks/restart.py [--rounds N] [--json] [--quick]

A stage on two ranks under its agent; in step 10 one rank or both are killed (-9) or one raises an exception, and the ranks go
on from the checkpoint of step 8. Printed are medians of seconds: detect (until the agent knows), settle (until it starts new
ranks), start (until they have a model), load (the checkpoint), step (until the first new step is done).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import MODEL_KEYS, prepare_run, toml

from athanor.foundation.launch import start_server
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, read_jsonl
from athanor.jobs.agent import Agent
from athanor.models.shapes.decoder import DecoderShape

SHAPES = {width: DecoderShape(vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
                              num_attention_heads=width // 32, tie_word_embeddings=True) for width in (64, 512)}
FAULTS = ("one killed", "all killed", "an exception")
PARTS = ("detect", "settle", "start", "load", "step")
AT_STEP = 10


def train_and_die(channel: Callable[..., None], fault: str, **arguments: Any) -> dict[str, Any]:
    """Rank function: train, and end badly in one step, once."""
    from athanor.train import loop

    inner, steps = loop.run_step, iter(range(10**9))
    mark = Path(arguments["run_folder"], f"died-{os.environ['RANK']}")

    def run_step(*given: Any) -> Any:
        if next(steps) == AT_STEP and (fault == "all killed" or os.environ["RANK"] == "1") and not mark.exists():
            mark.write_text(str(time.time()))
            if fault == "an exception":
                raise ZeroDivisionError("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given)

    loop.run_step = run_step
    return loop.train_stage(channel, **arguments)


def measure(recipe_file: Path, shape: DecoderShape, fault: str, number: int) -> list[float]:
    """Seconds of PARTS of one fault."""
    run = recipe_file.parent / f"{shape.hidden_size}-{fault}-{number}"
    run.mkdir()
    (run / "data").symlink_to(recipe_file.parent / "data")
    recipe = load_recipe(recipe_file, [*(f"model.{key}={toml(getattr(shape, key))}" for key in MODEL_KEYS), "parallel.dp_shard=2",
                                       "stage.pretrain.steps=16", "stage.pretrain.checkpoint_every=8",
                                       "stage.pretrain.evaluate_every=1000", "stage.pretrain.seq_len=128",
                                       "stage.pretrain.global_batch_tokens=1024", "stage.pretrain.micro_batch_size=4"])
    stage = RunFolder(run).stage("pretrain")
    Agent(stage, 2).run("restart:train_and_die", {"run_folder": str(run), "recipe": recipe, "stage": "pretrain", "fault": fault})
    events = read_jsonl(stage.events)
    died = min(float(file.read_text()) for file in run.glob("died-*"))
    (told,) = [row["time"] for row in events if row["kind"] == "fault"]
    (launched,) = [row["time"] for row in read_jsonl(stage.root / "ledger.jsonl") if "down" in row.get("accounts", {})]
    begun = [row for row in events if row["kind"] == "start"][1]
    stepped = min(row["time"] for row in read_jsonl(stage.metrics) if row["time"] > begun["time"])
    load = begun["load_seconds"]
    return [told - died, launched - told, begun["time"] - load - launched, load, stepped - begun["time"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="faults of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="one fault of each kind, in the smaller model")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_run(Path(folder), 1024, 12 if options.quick else 40)
        start_server("athanor.train.loop")
        for width, shape in SHAPES.items():
            for fault in FAULTS:
                if options.quick and width != min(SHAPES):
                    continue
                rows = [measure(recipe, shape, fault, number) for number in range(1 if options.quick else options.rounds)]
                parts = {name: statistics.median(column) for name, column in zip(PARTS, zip(*rows, strict=True), strict=True)}
                after = sorted(sum(row[1:]) for row in rows)
                found.append({"hidden_size": width, "fault": fault, **parts, "after_detection": statistics.median(after),
                              "after_detection_most": after[-1]})
                if not options.json:
                    print(f"hidden {width}, {fault}: " + ", ".join(f"{name} {parts[name]:.3f}" for name in PARTS)
                          + f"; after detection {statistics.median(after):.2f} s, at most {after[-1]:.2f}", flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
