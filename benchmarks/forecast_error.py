"""How far forecasts are from what happened: plans and trains short recipes and sets their books side by side.

    python benchmarks/forecast_error.py [--minutes 0.5] [--runs FOLDER] [--skip-check]

Each recipe has another width or sequence length; the machine is measured right before. Prints forecast and actual seconds
of every account, their step times, and the largest error of step time; a line per recipe goes to results.jsonl.
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

RECIPES = {
    "as planned": [],
    "width 64, 4 blocks": ["model.hidden_size=64", "model.num_hidden_layers=4"],
    "width 192, rows of 128": ["model.hidden_size=192", "model.num_hidden_layers=4", "stage.pretrain.seq_len=128"],
    "width 128, rows of 512": ["model.hidden_size=128", "model.num_hidden_layers=6", "stage.pretrain.seq_len=512"],
    "tensor parallel": ["model.hidden_size=128", "model.num_hidden_layers=4", "parallel.tp=2"],
}
RECIPE = """
name = "{name}"
[budget]
minutes = {minutes}
[data]
vocab_size = 4096
[[data.source]]
name = "stdlib"
kind = "python"
[[stage]]
name = "pretrain"
"""


def athanor(*arguments: str, runs: Path) -> Any:
    """Run a verb with --json and return its document."""
    environment = {**os.environ, "ATHANOR_RUNS": str(runs)}
    start = "from athanor.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", start, *arguments, "--json"], capture_output=True, text=True,
                          env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"athanor {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--runs", type=Path, default=Path("runs/forecast_error"))
    parser.add_argument("--skip-check", action="store_true", help="use the cluster.toml that is there")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    cluster = options.runs / "cluster.toml"
    if not (options.skip_check and cluster.exists()):
        athanor("check", "--out", str(cluster), runs=options.runs)
    data, errors = None, []
    for number, (title, overrides) in enumerate(RECIPES.items()):
        name = f"recipe-{number}"
        recipe = options.runs / f"{name}.toml"
        recipe.write_text(RECIPE.format(name=name, minutes=options.minutes))
        overrides = [*overrides, f"cluster.file={cluster}"]
        planned = athanor("plan", str(recipe), *overrides, runs=options.runs)
        run = options.runs / name
        if data is None:
            athanor("data", "build", str(recipe), runs=options.runs)
            data = run / "data"
        elif not (run / "data").exists():
            (run / "data").symlink_to(data.resolve())
        begin = time.perf_counter()
        athanor("train", str(recipe), "--stage", "pretrain", *overrides, runs=options.runs)
        seconds = time.perf_counter() - begin
        errors.append(compare(title, run / "pretrain", planned["forecast"]["pretrain"]["step_seconds"], seconds, options.runs))
    print(f"\nlargest error of step time {max(map(abs, errors)):+.1%}, median {statistics.median(map(abs, errors)):.1%}")


def compare(title: str, stage: Path, step_seconds: float, seconds: float, results: Path) -> float:
    """Print both books of a stage; return the relative error of the step time, by medians."""
    forecast, actual = (json.loads((stage / f"{kind}.json").read_text()) for kind in ("forecast", "actual"))
    steps = [json.loads(line)["step_seconds"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    median = statistics.median(steps)
    error = step_seconds / median - 1.0
    print(f"\n{title}: step {1e3 * step_seconds:.1f} ms forecast, {1e3 * median:.1f} ms median, "
          f"{1e3 * statistics.fmean(steps):.1f} ms mean of {len(steps)}: {error:+.1%}; stage "
          f"{forecast['wall_seconds']:.1f} s forecast, {actual['wall_seconds']:.1f} s actual, {seconds:.1f} s with the launch")
    names = sorted({*forecast["accounts"], *actual["accounts"]}, key=lambda n: -actual["accounts"].get(n, 0.0))
    for name in names:
        wanted, got = forecast["accounts"].get(name, 0.0), actual["accounts"].get(name, 0.0)
        print(f"  {name:14s} {wanted:9.2f} {got:9.2f} device-seconds  {wanted - got:+8.2f}")
    with (results / "results.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "title": title, "step_seconds": step_seconds, "median": median,
                               "forecast": forecast["accounts"], "actual": actual["accounts"]}) + "\n")
    return error


if __name__ == "__main__":
    main()
