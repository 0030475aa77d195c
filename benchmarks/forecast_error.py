"""How far forecasts are from what happened: plans short recipes, trains each several times in turns, and sets the books beside.

    python benchmarks/forecast_error.py [--rounds 5] [--seconds 6] [--runs FOLDER] [--skip-check] [--only WORD]

Each recipe has another shape, micro-batch or layout; the machine is measured right before, and nothing else is known of it.
Printed per recipe: step time forecast and the median of all rounds' medians, and every account above a tenth of the step, by
the median of its rounds; then the median error of step time, and how many of those accounts are within 30 %. Forecast memory
stands beside a rehearsal's. A line per recipe goes to results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPE_64 = ["model.hidden_size=64", "model.num_hidden_layers=4"]
SHAPE_128 = ["model.hidden_size=128", "model.num_hidden_layers=6"]
SHAPE_96 = ["model.hidden_size=96", "model.num_hidden_layers=8"]
SHAPE_256 = ["model.hidden_size=256", "model.num_hidden_layers=3"]
SHAPE_192 = ["model.hidden_size=192", "model.num_hidden_layers=4", "stage.pretrain.seq_len=128"]
ROWS_16, SMALL = ["stage.pretrain.global_batch_tokens=4096"], ["stage.pretrain.micro_batch_size=2"]
RECIPES = {
    "one rank, width 64": [*SHAPE_64, *ROWS_16, "cluster.devices=1"],
    "one rank, width 128, micro-batches of 2": [*SHAPE_128, *ROWS_16, *SMALL, "cluster.devices=1"],
    "dp_shard 2, width 192": [*SHAPE_192, *ROWS_16, "parallel.dp_shard=2"],
    "dp_shard 2, width 128, rows of 512": [*SHAPE_128, "stage.pretrain.seq_len=512", "stage.pretrain.global_batch_tokens=8192",
                                           "parallel.dp_shard=2"],
    "tp 2, width 128": [*SHAPE_128, *ROWS_16, "parallel.tp=2"],
    "pp 2, width 128": [*SHAPE_128, *ROWS_16, *SMALL, "parallel.pp=2"],
    "pp 2, width 192, GPipe": [*SHAPE_192, *ROWS_16, "parallel.pp=2", "parallel.pipeline_schedule=GPipe"],
    "cp 2, width 128, full recomputation": [*SHAPE_128, *ROWS_16, "parallel.cp=2", "parallel.recompute=full"],
    # no constant was ever set on these
    "new: one rank, width 96, rows of 384": [*SHAPE_96, "stage.pretrain.seq_len=384", "stage.pretrain.global_batch_tokens=6144",
                                             "cluster.devices=1"],
    "new: one rank, width 256, qwen3": [*SHAPE_256, *ROWS_16, "model.architecture='qwen3'", "cluster.devices=1"],
    "new: dp_shard 2, width 96, micro-batches of 2": [*SHAPE_96, *ROWS_16, *SMALL, "parallel.dp_shard=2"],
    "new: dp_replicate 2, width 256": [*SHAPE_256, *ROWS_16, "parallel.dp_replicate=2"],
    "new: tp 2, width 256": [*SHAPE_256, *ROWS_16, "parallel.tp=2"],
    "new: pp 2, width 96": [*SHAPE_96, *ROWS_16, *SMALL, "parallel.pp=2"],
    "new: cp 2, width 96": [*SHAPE_96, *ROWS_16, "parallel.cp=2"],
}
RECIPE = """
name = "{name}"
[data]
vocab_size = 4096
[[data.source]]
name = "stdlib"
kind = "python"
[[stage]]
name = "pretrain"
optimizer = "{optimizer}"
steps = {steps}
"""
LARGE = 0.1  # share of a step from which an account is judged
ONCE = ("startup", "checkpoint", "evaluation", "metering", "unattributed")


def athanor(*arguments: str, runs: Path) -> Any:
    """Run a verb with --json and return its document."""
    environment = {**os.environ, "ATHANOR_RUNS": str(runs)}
    start = "from athanor.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", start, *arguments, "--json"], capture_output=True, text=True,
                          env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"athanor {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


class Contestant:
    """A recipe with its forecast and what its rounds took."""

    def __init__(self, number: int, title: str, options: argparse.Namespace) -> None:
        self.title, self.runs, self.name = title, options.runs, f"recipe-{number}"
        self.recipe = options.runs / f"{self.name}.toml"
        self.overrides = [*RECIPES[title], f"cluster.file={options.runs / 'cluster.toml'}"]
        self._write(steps=10)
        planned = athanor("plan", str(self.recipe), *self.overrides, runs=options.runs)
        self.forecast: dict[str, Any] = planned["forecast"]["pretrain"]
        self._write(steps=max(10, round(options.seconds / self.forecast["step_seconds"])))
        self.memory = json.loads((options.runs / self.name / "pretrain" / "forecast.json").read_text())["memory_bytes"]
        self.medians: list[float] = []
        self.accounts: list[dict[str, float]] = []

    def _write(self, steps: int) -> None:
        optimizer = "muon" if int(self.name[-1]) % 2 else "adamw"
        self.recipe.write_text(RECIPE.format(name=self.name, steps=steps, optimizer=optimizer))

    def train(self, number: int) -> None:
        runs = self.runs / f"round-{number}"
        (runs / self.name).mkdir(parents=True, exist_ok=True)
        plan = f"plan.file={(self.runs / self.name / 'plan.toml').resolve()}"
        athanor("train", str(self.recipe), "--stage", "pretrain", "--data", str((self.runs / "recipe-0" / "data").resolve()),
                *self.overrides, plan, runs=runs)
        stage = runs / self.name / "pretrain"
        steps = [json.loads(line)["step_seconds"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
        self.medians.append(statistics.median(steps[2:]))
        book = json.loads((stage / "actual.json").read_text())
        # like the forecast's: device-seconds of a median step, by the shares that accounts have in all steps
        stepping = {name: value for name, value in book["accounts"].items() if name not in ONCE}
        whole = sum(stepping.values())
        self.accounts.append({name: value / whole * self.medians[-1] * book["devices"] for name, value in stepping.items()})

    def judge(self) -> dict[str, Any]:
        """Errors of step time and of each account of a tenth of the step or more."""
        median = statistics.median(self.medians)
        devices = 1 if "cluster.devices=1" in self.overrides else 2
        names = {name for accounts in (self.forecast["accounts"], *self.accounts) for name in accounts}
        found = {name: statistics.median(accounts.get(name, 0.0) for accounts in self.accounts) for name in names}
        wanted = {name: self.forecast["accounts"].get(name, 0.0) for name in names}
        large = {name: wanted[name] / found[name] - 1 for name in names
                 if max(found[name], wanted[name]) > LARGE * median * devices and found[name]}
        rehearsed = athanor("rehearse", str(self.recipe), *self.overrides, "--stage", "pretrain",
                            f"plan.file={(self.runs / self.name / 'plan.toml').resolve()}", runs=self.runs)
        return {"title": self.title, "time": time.time(), "step_seconds": self.forecast["step_seconds"], "median": median,
                "medians": self.medians, "error": self.forecast["step_seconds"] / median - 1, "forecast": wanted,
                "actual": found, "large": large, "memory": self.memory, "rehearsed": rehearsed.get("memory_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of steps in a round")
    parser.add_argument("--runs", type=Path, default=Path("runs/forecast_error"))
    parser.add_argument("--skip-check", action="store_true", help="use the cluster.toml that is there")
    parser.add_argument("--only", help="recipes whose title has this in it")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    cluster = options.runs / "cluster.toml"
    if not (options.skip_check and cluster.exists()):
        athanor("check", "--out", str(cluster), runs=options.runs)
    titles = [title for title in RECIPES if not options.only or options.only in title]
    contestants = [Contestant(number, title, options) for number, title in enumerate(titles)]
    if not (options.runs / "recipe-0" / "data").exists():
        athanor("data", "build", str(contestants[0].recipe), runs=options.runs)
    for number in range(options.rounds):
        for contestant in contestants if number % 2 else contestants[::-1]:
            contestant.train(number)
    results = [contestant.judge() for contestant in contestants]
    with (options.runs / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    for result in results:
        show(result)
    errors = [abs(result["error"]) for result in results]
    large = [error for result in results for error in result["large"].values()]
    print(f"\nstep time: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}; "
          f"{sum(abs(error) <= 0.3 for error in large)} of {len(large)} large accounts within 30 %")


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['title']}: step {1e3 * result['step_seconds']:.1f} ms forecast, {1e3 * result['median']:.1f} ms median of "
          f"rounds ({1e3 * min(result['medians']):.1f} to {1e3 * max(result['medians']):.1f}): {result['error']:+.1%}")
    for name in sorted(result["actual"], key=lambda n: -result["actual"][n]):
        wanted, got = result["forecast"][name], result["actual"][name]
        mark = f"  {result['large'][name]:+.0%}" if name in result["large"] else ""
        print(f"  {name:14s} {1e3 * wanted:9.2f} {1e3 * got:9.2f} device-ms{mark}")


if __name__ == "__main__":
    main()
