"""`athanor plan goodput`: how often to save, what faults will take, and when a run will be finished."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING

import click

from athanor.cli.counts import COUNT, WHOLE
from athanor.foundation.progress import console, say
from athanor.foundation.units import format_seconds, format_share

if TYPE_CHECKING:
    from athanor.laws.goodput import Job

QUANTILES = {"p10": 10, "p50": 50, "p90": 90}


@click.command()
@click.option("--devices", type=WHOLE, required=True, help="devices that step together")
@click.option("--days-of-steps", type=float, help="days of steps that must be kept; or --days")
@click.option("--days", type=float, help="days of the calendar: how many of them are steps that are kept")
@click.option("--checkpoint-seconds", type=float, help="seconds that a save blocks; or --params and --write-rate")
@click.option("--params", type=COUNT, help="parameters, saved with 14 bytes each")
@click.option("--write-rate", type=COUNT, help="bytes a second that all devices together write")
@click.option("--restart-seconds", type=float, default=600.0, show_default=True, help="from new processes to the first step")
@click.option("--detect-seconds", type=float, default=300.0, show_default=True, help="from a fault to new processes")
@click.option("--failures-per-1000-device-days", type=float, help="all faults; when left out, those of Llama 3 405B, "
              "whose software's do not grow with the devices")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the simulation behind the finish")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(devices: int, days_of_steps: float | None, days: float | None, checkpoint_seconds: float | None, params: float | None,
            write_rate: float | None, restart_seconds: float, detect_seconds: float,
            failures_per_1000_device_days: float | None, seed: int, as_json: bool) -> None:
    """Say how often to save, what faults will take, and when the run will be finished."""
    import numpy as np

    from athanor.foundation.errors import UserError
    from athanor.foundation.units import check_positive
    from athanor.laws import goodput

    check_positive(days_of_steps=days_of_steps, days=days, checkpoint_seconds=checkpoint_seconds,
                   failures_per_1000_device_days=failures_per_1000_device_days)
    if checkpoint_seconds is None:
        if params is None or write_rate is None:
            raise UserError("give --checkpoint-seconds, or --params and --write-rate")
        checkpoint_seconds = goodput.saving_seconds(params, write_rate)
    each = None if failures_per_1000_device_days is None else failures_per_1000_device_days / 1000
    faults = goodput.faults_per_second(devices, per_device_day=each)
    if (days_of_steps is None) == (days is None):
        raise UserError("give either --days-of-steps, or --days of the calendar")
    if days is not None:
        job = goodput.within(days * goodput.DAY, checkpoint_seconds, faults, detect_seconds, restart_seconds)
    else:
        job = goodput.Job((days_of_steps or 0.0) * goodput.DAY, checkpoint_seconds, detect_seconds, restart_seconds, faults)
    wall = job.simulate(seed=seed)["wall"]
    finish = {name: float(np.percentile(wall, share)) for name, share in QUANTILES.items()}
    if not as_json:
        show(job, devices, finish)
        return
    young = goodput.young_interval(checkpoint_seconds, faults)
    click.echo(json.dumps({
        "devices": devices, "faults_per_day": faults * goodput.DAY, "mean_seconds_between_faults": 1 / faults,
        "save_seconds": checkpoint_seconds, "interval_seconds": job.interval, "young_interval_seconds": young,
        "goodput": job.goodput, "goodput_at_young_interval": job.at_interval(young).goodput, "wall_seconds": job.wall_seconds,
        "finish_seconds": {**finish, "mean": float(wall.mean())}, "device_seconds": job.wall_seconds * devices,
        "stepping_device_seconds": job.stepping_seconds * devices,
        "accounts": {name: seconds * devices for name, seconds in job.expect().items()}}))


def show(job: Job, devices: int, finish: dict[str, float]) -> None:
    """Interval, goodput, accounts, and the range of the finish."""
    from rich.table import Table

    from athanor.laws.goodput import DAY, young_interval

    say(f"{devices:,} devices: {job.faults * DAY:.3g} faults a day, one every {format_seconds(1 / job.faults)}. Save every "
        f"{format_seconds(job.interval)} (Young's square root: {format_seconds(young_interval(job.save_seconds, job.faults))})")
    say(f"Goodput {format_share(job.goodput)}: {format_seconds(job.stepping_seconds)} of steps in "
        f"{format_seconds(job.wall_seconds)}")
    table = Table(box=None)
    for column in ("account", "time", "share"):
        table.add_column(column, justify="left" if column == "account" else "right")
    for name, seconds in {"kept steps": job.stepping_seconds, **job.expect()}.items():
        table.add_row(name, format_seconds(seconds), format_share(seconds / job.wall_seconds))
    console.print(table)
    for factor, words in ((0.25, "four times as often"), (4.0, "a quarter as often")):
        say(f"saving {words}: goodput {format_share(job.at_interval(factor * job.interval).goodput)}")
    start = datetime.date.today()
    last = (datetime.date.max - start).days
    days = ", ".join(f"{name.upper()} {seconds / DAY:.1f} days ("
                     + (f"{start + datetime.timedelta(seconds=seconds)})" if seconds / DAY < last else "after the year 9999)")
                     for name, seconds in finish.items())
    say(f"finish, when started today: {days}")
