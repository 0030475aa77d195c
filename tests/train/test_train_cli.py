"""The verb `train`: one JSON document, started here or by torchrun, and ended by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.train import command
from athanor.foundation.errors import RecipeError, UserError
from athanor.foundation.events import EXIT_REQUEUE

ATHANOR = Path(sys.executable).with_name("athanor")


def test_json_is_one_document(recipe_file: Path, run_folder: Path) -> None:
    arguments = [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder), "--json", "stage.pretrain.steps=2",
                 "parallel.dp_shard=1"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and len(found["loss"]) == len(found["grad_norm"]) == 2
    assert found["tokens_per_second"] > 0 and Path(found["run"], "model", "config.json").is_file()
    Path(found["run"], "metrics.jsonl").unlink()
    told = CliRunner().invoke(command, [argument for argument in arguments if argument != "--json"], catch_exceptions=False)
    assert told.exit_code == 0
    with pytest.raises(RecipeError, match="has no stage 'pretrian'; did you mean 'pretrain'"):
        CliRunner().invoke(command, [str(recipe_file), "--stage", "pretrian"], catch_exceptions=False)


def test_runs_share_a_data_folder(recipe_file: Path, run_folder: Path, tmp_path: Path) -> None:
    arguments = [str(recipe_file), "--stage", "pretrain", "--json", "stage.pretrain.steps=1", "parallel.dp_shard=1"]
    other = ["--run", str(tmp_path / "other"), "--data", str((run_folder / "data").resolve())]
    with pytest.raises(UserError, match=r"--data nowhere is not a data folder: it has no manifest.json"):
        CliRunner().invoke(command, [*arguments, *other[:2], "--data", "nowhere"], catch_exceptions=False)
    assert not (tmp_path / "other" / "data").is_symlink(), "nothing is left of a wrong folder"
    assert len(json.loads(CliRunner().invoke(command, [*arguments, *other], catch_exceptions=False).stdout)["loss"]) == 1
    own = tmp_path / "own"
    own.mkdir()
    (own / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"exists already, so --data .* would not be used; give the run another name"):
        CliRunner().invoke(command, [*arguments, *other[:2], "--data", str(own)], catch_exceptions=False)


def test_a_plan_that_the_recipe_names_is_followed(recipe_file: Path, run_folder: Path, tmp_path: Path) -> None:
    arguments = [str(recipe_file), "--stage", "pretrain", "--json", "--run", str(run_folder), "stage.pretrain.steps=1",
                 "parallel.dp_shard=1", "--fresh"]
    for plan, decay in ((tmp_path / "named.toml", 0.3), (run_folder / "plan.toml", 0.2)):  # of the run's own there is none first
        plan.write_text(f'[[stage]]\nname = "pretrain"\nsteps = 50\nweight_decay = {decay}\n')
        CliRunner().invoke(command, [*arguments, f"plan.file={tmp_path / 'named.toml'}"], catch_exceptions=False)
        trained = tomllib.loads((run_folder / "pretrain" / "config.toml").read_text())["identity"]
        assert (trained["weight_decay"], trained["steps"]) == (0.3, 1)
    with pytest.raises(RecipeError, match=r"plan none\.toml does not exist"):
        CliRunner().invoke(command, [*arguments, "plan.file=none.toml"], catch_exceptions=False)


@pytest.mark.slow
def test_under_torchrun_it_is_a_rank(recipe_file: Path, run_folder: Path, tmp_path: Path) -> None:
    own = subprocess.run([ATHANOR, "train", recipe_file, "--stage", "pretrain", "--json", "--run", run_folder,
                          "parallel.dp_shard=2"], capture_output=True, text=True, timeout=200, check=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").symlink_to(run_folder / "data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "--"]
    given = subprocess.run([*torchrun, ATHANOR, "train", recipe_file, "--stage", "pretrain", "--json", "--run", outside],
                           capture_output=True, text=True, timeout=200, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads(given.stdout)["loss"] == json.loads(own.stdout)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
                         ids=["to the command", "to its whole process group", "Ctrl-C"])
def test_a_signal_saves_and_asks_to_be_queued_again(recipe_file: Path, run_folder: Path, number: signal.Signals,
                                                    to_all: bool) -> None:
    arguments = [ATHANOR, "train", recipe_file, "--stage", "pretrain", "--json", "--run", run_folder, "parallel.dp_shard=2",
                 "stage.pretrain.steps=2000", "stage.pretrain.evaluate_every=2000", "stage.pretrain.checkpoint_every=2000"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = run_folder / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, errors
    assert output == "" and "as asked" in errors and ("Ctrl-C once more ends at once" in errors) == (number == signal.SIGINT)
    (saved,) = (run_folder / "pretrain" / "checkpoints").iterdir()
    assert (saved / "COMPLETE").is_file() and not (run_folder / "pretrain" / "model").exists()


def test_a_run_in_use_and_a_damaged_plan_are_refused(recipe_file: Path, run_folder: Path) -> None:
    import fcntl

    arguments = [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder)]
    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working in"):
            CliRunner().invoke(command, arguments, catch_exceptions=False)
        told = CliRunner().invoke(command, [*arguments, "budget.minutes=2", "name=b4"]).stderr
        assert f"so `athanor plan {recipe_file} budget.minutes=2 name=b4` comes first" in told
    (run_folder / "plan.toml").write_text("[model")
    with pytest.raises(RecipeError, match=r"plan\.toml is not valid TOML"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_what_comes_before_the_clock_of_start_up_loads_no_torch() -> None:
    """Importing torch takes seconds, which belong to a stage's start-up and not to nobody."""
    code = "import athanor.cli.train, athanor.train.settings, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
