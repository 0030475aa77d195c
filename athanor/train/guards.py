"""Guards: a step that would do harm is skipped; after too many in a row the stage goes back and passes over their data.

Whether a step is made is decided on the device before its update, alike on every rank; what the host does comes after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from athanor.foundation.errors import AthanorError
from athanor.foundation.intervals import interval
from athanor.train import checkpoint
from athanor.train.validate import whole

if TYPE_CHECKING:
    from athanor.train.loop import Progress, Run
    from athanor.train.spikes import Guard


def restore(guard: Guard, progress: Progress, meta: checkpoint.Meta) -> None:
    """Go on as after a checkpoint, and pass over what it or a later rollback says."""
    progress.step, progress.samples, progress.tokens = meta.step, meta.samples, meta.tokens
    progress.skipped_steps = meta.guards.get("skipped_steps", 0)
    progress.passed = [*(old := meta.guards.get("passed", [])), *(each for each in progress.passed if each not in old)]
    guard.restore(meta.guards)


def follow(run: Run, is_skipped: bool, first_sample: int) -> bool:
    """After each step, on every rank: tell which rows a skipped one had; after too many in a row go back, and say so by True."""
    progress = run.progress
    progress.skipped_steps = progress.skipped_steps + 1 if is_skipped else 0
    if is_skipped and run.mesh.rank == 0:
        with interval("metering"):
            (why, values), end = run.trainee.guard.reason(), progress.samples
            run.log("skip", f"step {progress.step} was skipped: {why}; its rows were samples {first_sample} to {end - 1}",
                    **values, samples=[first_sample, end], rows=run.job.rows.origins(first_sample, end - first_sample))
    is_enough = progress.skipped_steps >= run.job.settings.most_skipped_steps
    if is_enough:
        go_back(run)
    return is_enough


def go_back(run: Run) -> None:
    """Go on from the newest good checkpoint, in place, with the samples after those of the steps that were skipped.

    PaLM's remedy (Chowdhery et al. 2022, 5.1): with other data the same weights did not spike again. Raises AthanorError when
    there is no such checkpoint, or it was gone back to too often.
    """
    job, progress, meter = run.job, run.progress, run.meter
    end, last = progress.samples, progress.step
    told = f"{progress.skipped_steps} steps in a row were skipped, the last is step {last}"
    advice = f"lower learning_rate, or look at {job.folder.events}"
    meter.exchange()  # all steps so far must be in the ledger before it says that they are lost
    with whole("checkpoint", meter):
        run.saver.finish()
    with whole("startup", meter):
        found = run.mesh.share(find_good(run) if run.mesh.rank == 0 else None)
        if found is None:
            raise AthanorError(f"{told}, and there is no checkpoint from before them to go back to; {advice}")
        path, samples = found
        times = sum(first == samples for first, _ in progress.passed)
        if times >= job.settings.most_rollbacks:  # a limit may have come down meanwhile
            raise AthanorError(f"{told}, after {times} rollback{'' if times == 1 else 's'} to checkpoint {path.name}; {advice}")
        progress.passed.append([samples, end])
        restore(run.trainee.guard, progress, checkpoint.load(path, run.trainee.stages, run.trainee.optimizer))
    meter.roll_back(progress.step)
    run.log("rollback", f"{told}, so it goes on from checkpoint {path.name} and passes over samples {samples} to {end - 1}",
            from_step=last, passed=[samples, end])


def find_good(run: Run) -> tuple[Path, int] | None:
    """The newest intact checkpoint not written between skipped steps, and the samples before it; on one rank."""
    def on_damage(path: Path, reason: str) -> None:
        run.log("damaged", f"checkpoint {path.name} cannot be used: {reason}")

    path = checkpoint.find_intact(run.job.folder.checkpoints, on_damage,
                                  lambda path: not checkpoint.read_meta(path).guards.get("skipped_steps"))
    return None if path is None else (path, checkpoint.read_meta(path).samples)
