"""A run folder as a run leaves it: books, scores and the cluster from the code that makes them, curves from a formula."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from athanor.cluster.spec import ClusterSpec
from athanor.data.build import build
from athanor.evaluate.scores import Score, merge_scores, share
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, append_jsonl, read_jsonl, write_atomic
from athanor.ledger.attempts import book_of, roll_back
from athanor.ledger.book import Book, total

PEAK = 4.7e10
TOKENS_PER_STEP, STEPS = 4096, {"pretrain": 560, "chat": 90}
FLOPS_PER_TOKEN = {"pretrain": 6.1e6, "chat": 6.1e6}
RAN_ON: dict[str, Any] = {"devices": 2, "accelerator": "2 CPU threads", "peak_flops": PEAK, "layout": "dp_shard=2"}
RECIPE = Path(__file__).parents[2] / "recipes" / "stdlib.toml"


def stage_books(run: RunFolder, name: str, resumed: bool) -> tuple[Book, Book]:
    """The forecast of a stage, and its actual book from the lines that a meter writes, a fault and a restart included."""
    per_line, step_seconds, flops = 10, 0.41, FLOPS_PER_TOKEN[name]
    ledger = run.root / name / "ledger.jsonl"
    for first in range(0, STEPS[name], per_line):
        if resumed and first == 300:
            roll_back(ledger, 290, attempt=1)
            first = 290
        wall = per_line * step_seconds * (1.03 + 0.02 * math.sin(first))
        parts = {"compute": 0.83, "data_parallel": 0.055, "skew": 0.02, "optimizer": 0.06, "input": 0.004, "checkpoint": 0.01,
                 "evaluation": 0.012, "metering": 0.002}
        accounts = {key: 2 * wall * value for key, value in parts.items()}
        if first == 0 or (resumed and first == 290):
            accounts["startup"] = 7.0
            wall += 3.5
        append_jsonl(ledger, {
            "attempt": 0, "time": 0.0, "first_step": first, "last_step": first + per_line, "wall_seconds": wall,
            "device_seconds": 2 * wall, "tokens": TOKENS_PER_STEP * per_line, "model_flops": flops * TOKENS_PER_STEP * per_line,
            "model_flops_full": 1.03 * flops * TOKENS_PER_STEP * per_line, "accounts": accounts, **RAN_ON})
    actual = book_of(read_jsonl(ledger), **RAN_ON)
    forecast = Book("forecast", 2, "2 CPU threads", PEAK, wall_seconds=STEPS[name] * step_seconds + 6,
                    device_seconds=2 * (STEPS[name] * step_seconds + 6), tokens=actual.tokens, model_flops=actual.model_flops,
                    model_flops_full=actual.model_flops_full, layout="dp_shard=2")
    paid = 2 * STEPS[name] * step_seconds
    useful = actual.model_flops / PEAK
    for account, seconds in {"useful": useful, "kernel": 0.84 * paid - useful, "data_parallel": 0.06 * paid, "skew": 0.01 * paid,
                             "optimizer": 0.065 * paid, "input": 0.002 * paid, "checkpoint": 0.008 * paid,
                             "evaluation": 0.015 * paid, "startup": 12.0}.items():
        forecast.add(account, seconds, "planned")
    return forecast.close(), actual


def write_metrics(run: RunFolder, name: str) -> None:
    rng, spent = random.Random(0), 0.0
    start, end = (8.3, 2.3) if name == "pretrain" else (2.6, 1.9)
    for step in range(1, STEPS[name] + 1):
        seconds = 0.42 * (1 + 0.04 * rng.random()) + (2.2 if step == 1 else 0)
        spent += seconds
        loss = end + (start - end) * math.exp(-6 * step / STEPS[name]) + 0.05 * rng.random()
        row = {"step": step, "samples": 16 * step, "tokens": TOKENS_PER_STEP * step, "loss": loss, "grad_norm": 0.8,
               "learning_rate": 1e-3, "step_seconds": seconds, "input_seconds": 0.001, "skipped": False, "time": 1.79e9 + spent,
               "tokens_per_second": TOKENS_PER_STEP / seconds, "mfu": 0.55}
        if step % 80 == 0 or step == STEPS[name]:
            row["validation_loss"] = loss + 0.1
        append_jsonl(run.stage(name).metrics, row)


def write_stage(run: RunFolder, name: str, *, fault: bool) -> tuple[Book, Book]:
    forecast, actual = stage_books(run, name, fault)
    stage = run.stage(name)
    forecast.write(stage.forecast)
    actual.write(stage.actual)
    write_metrics(run, name)
    events = [("start", 0, 0.0, f"{name} starts on 2 ranks: dp_shard=2")]
    if fault:
        events += [("fault", 300, 130.4, "rank 1 was killed by signal 9 (SIGKILL) after step 300"),
                   ("restart", 290, 131.0, "goes on from step 290; 10 steps are done again")]
    events += [("checkpoint", step, 0.43 * step, f"checkpoint step-{step:08d} is complete, 5.3 MB, the loop waited 0.05 s")
               for step in range(50, STEPS[name], 50)]
    events.append(("done", STEPS[name], 0.43 * STEPS[name], "the model is complete"))
    for kind, step, at, sentence in sorted(events, key=lambda event: event[2]):
        append_jsonl(stage.events, {"time": 1.79e9 + at, "rank": 0, "host": "node", "attempt": int(kind == "restart"),
                                    "kind": kind, "step": step, "sentence": sentence})
    for step in range(0, STEPS[name] + 1, 30):
        append_jsonl(stage.samples, {"step": step, "prompt": 'def read_lines(path):\n    """Return the lines of a file."""\n',
                                     "text": "    with open(path) as file:\n        return file.readlines()\n"})
    return forecast, actual


def write_tables(run: RunFolder) -> None:
    """Recipe, plan, cluster, data and scores."""
    write_atomic(run.recipe, RECIPE.read_text())
    write_atomic(run.plan, """
[model]
architecture = "llama"
hidden_size = 128
num_hidden_layers = 4
vocab_size = 4096

[[stage]]
name = "pretrain"
steps = 560
[[stage]]
name = "chat"
steps = 90

[reason]
"model.hidden_size" = "the largest width whose planned loss at 2.29 M tokens is lowest within 4 minutes of step time"
"stage.pretrain.steps" = "85 % of the budget of 240 s at 0.41 s a step"

[scan]
bytes = 12150000

[forecast.pretrain]
step_seconds = 0.41
[forecast.chat]
step_seconds = 0.41
[forecast.chain]
check = 32.0
data = 40.0
evaluate = 25.0
""")
    ClusterSpec("CPU", "cpu", 2, 2, 1, 8e9, {"fp32": PEAK, "bf16": 2.1e10}, 9e9, host="node", date="2026-11-24",
                versions={"python": "3.11.9", "torch": "2.13.0", "athanor": "0.1.0"}).write(run.cluster)
    write_data(run)
    right = [1] * 60 + [0] * 240
    merge_scores(run.scores, {
        "pretrain": {"bits_per_byte": Score(1.349, 1.318, 1.381, 38, "bits per byte", False, {"xz": 1.682, "gzip": 2.171}),
                     "identifiers": share([1] * 700 + [0] * 1300), "python_parses": share(right)},
        "chat": {"bits_per_byte": Score(1.402, 1.369, 1.435, 38, "bits per byte", False, {"xz": 1.682, "gzip": 2.171}),
                 "identifiers": share([1] * 680 + [0] * 1320), "python_parses": share([1] * 138 + [0] * 162)}})


def write_data(run: RunFolder) -> None:
    """Funnel and manifest of a real build: 60 files, of which some are too short, exact and near duplicates."""
    words = [f"{verb}_{noun}" for verb in ("read", "write", "parse", "count") for noun in ("line", "row", "table", "key")]
    function = 'def {}_{}(path, limit={}):\n    """Handle {} of a file, {}."""\n    return [{!r}, limit + {}]\n\n\n'
    source = run.root.parent / "source"
    source.mkdir()
    for number in range(60):
        rng = random.Random(number)
        functions = [function.format(rng.choice(words), i, rng.randrange(99), rng.choice(words), rng.choice(words),
                                     rng.choice(words), rng.randrange(999)) for i in range(12 + number % 5)]
        (source / f"module_{number:02d}.py").write_text("".join(functions))
    (source / "copy.py").write_text((source / "module_07.py").read_text())
    (source / "empty.py").write_text("")
    (source / "short.py").write_text("x = 1\n")
    (source / "binary.py").write_bytes(bytes(range(256)) * 8)
    recipe = run.root.parent / "data.toml"
    recipe.write_text(f'name = "d"\n[data]\nvocab_size = 512\nevaluation_share = 0.2\n[[data.source]]\nname = "modules"\n'
                      f'kind = "python"\npath = "{source}"\n[[stage]]\nname = "pretrain"\n')
    build(load_recipe(recipe), run.data)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with a fault in its first stage."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "stdlib")
    write_tables(run)
    books = [write_stage(run, "pretrain", fault=True), write_stage(run, "chat", fault=False)]
    steps = {"check": (31.2, "check"), "plan": (0.8, "check"), "data": (36.4, "data"), "evaluate": (27.9, "evaluation"),
             "registry": (1.2, "publish"), "serve": (6.3, "publish")}
    sides: dict[str, list[Book]] = {"forecast": [pair[0] for pair in books], "actual": [pair[1] for pair in books]}
    for kind, scale in (("forecast", 1.05), ("actual", 1.0)):
        for seconds, account in steps.values():
            step = Book(kind, 2, "2 CPU threads", PEAK, wall_seconds=scale * seconds, device_seconds=2 * scale * seconds)
            step.add(account, 2 * scale * seconds)
            sides[kind].append(step.close())
        wall = sum(book.wall_seconds for book in sides[kind]) + 2.5
        total(sides[kind], kind, wall_seconds=wall, devices=2).write(run.root / f"{kind}.json")
    append_jsonl(run.chain, {"event": "begin", "time": 1.79e9 - 70, "devices": 2})
    seconds_of = {name: seconds for name, (seconds, _) in steps.items()}
    seconds_of |= {f"train {name}": actual.wall_seconds for name, (_, actual) in zip(STEPS, books, strict=True)}
    for name, seconds in seconds_of.items():
        append_jsonl(run.chain, {"event": "start", "step": name, "time": 1.79e9})
        append_jsonl(run.chain, {"event": "done", "step": name, "time": 1.79e9 + 400, "seconds": seconds, "devices": 2,
                                 "inputs": {}, "outputs": {}, "details": {}})
    return run
