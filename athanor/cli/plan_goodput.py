"""`athanor plan goodput`: how often to save, what faults will take, when a run will be finished, what would bring it further."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.counts import COUNT, WHOLE
from athanor.foundation.progress import console, say
from athanor.foundation.units import format_seconds, format_share

if TYPE_CHECKING:
    from athanor.laws.goodput import Job, Lever

QUANTILES = {"p10": 10, "p50": 50, "p90": 90}


@click.command()
@click.option("--devices", type=WHOLE, required=True, help="devices that step together")
@click.option("--days-of-steps", type=float, help="days of steps that must be kept; or --days")
@click.option("--days", type=float, help="days of the calendar: how many of them are steps that are kept")
@click.option("--checkpoint-seconds", type=float, help="seconds of a save that is waited for; or --params and --write-rate")
@click.option("--params", type=COUNT, help="parameters, saved with 14 bytes each")
@click.option("--write-rate", type=COUNT, help="bytes a second that all devices together write")
@click.option("--save-async", is_flag=True, help="steps go on while a copy is written, as in a recipe unless it says otherwise")
@click.option("--blocked-seconds", type=float, help="with --save-async: seconds that the copy blocks steps; 8 % "
              "of a save unless given")
@click.option("--slowed", type=float, help="with --save-async: share that steps lose during a write; 0.1 unless given")
@click.option("--restart-seconds", type=float, default=600.0, show_default=True, help="from new processes to the first step")
@click.option("--detect-seconds", type=float, default=300.0, show_default=True, help="from a fault to new processes")
@click.option("--hang-seconds", type=float, help="the same of faults that nobody sees but a watchdog, if they take longer")
@click.option("--hang-share", type=float, help="how many of all these are; when left out, as in Llama 3 405B's run")
@click.option("--failures-per-1000-device-days", type=float, help="all faults; when left out, those of Llama 3 405B, "
              "whose software's do not grow with the devices")
@click.option("--target", type=float, help="a goodput, such as 0.97: what each improvement would have to bring for it")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the simulation behind the finish")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(devices: int, target: float | None, seed: int, as_json: bool, **given: Any) -> None:
    """Say how often to save, what faults will take, when the run will be finished, and what would bring it to a goodput."""
    import numpy as np

    from athanor.laws import goodput

    job, waiting_seconds = job_of(devices, given)
    levers = [] if target is None else goodput.levers(job, target)
    wall = job.simulate(seed=seed)["wall"]
    finish = {name: float(np.percentile(wall, share)) for name, share in QUANTILES.items()}
    if not as_json:
        show(job, devices, finish)
        if target is not None:
            show_levers(levers, target)
        return
    saving, young = job.saving, goodput.young_interval(job.saving.cost_seconds, job.faults)
    click.echo(json.dumps({
        "devices": devices, "faults_per_day": job.faults * goodput.DAY, "mean_seconds_between_faults": 1 / job.faults,
        "save_seconds": waiting_seconds, "blocked_seconds": saving.blocked_seconds, "write_seconds": saving.write_seconds,
        "slowed": saving.slowed, "detect_seconds": job.detect_seconds, "restart_seconds": job.restart_seconds,
        "interval_seconds": job.interval, "young_interval_seconds": young,
        "goodput": job.goodput, "goodput_at_young_interval": job.at_interval(young).goodput, "wall_seconds": job.wall_seconds,
        "finish_seconds": {**finish, "mean": float(wall.mean())}, "device_seconds": job.wall_seconds * devices,
        "stepping_device_seconds": job.stepping_seconds * devices,
        "accounts": {name: seconds * devices for name, seconds in job.expect().items()},
        "target": target, "levers": [asdict(lever) for lever in levers]}))


def job_of(devices: int, given: dict[str, Any]) -> tuple[Job, float]:
    """The job that the options describe, and the seconds of one of its saves if it were waited for."""
    from athanor.foundation.errors import UserError
    from athanor.foundation.units import check_positive
    from athanor.laws import goodput

    each, save = given["failures_per_1000_device_days"], given["checkpoint_seconds"]
    days, of_steps = given["days"], given["days_of_steps"]
    check_positive(devices=devices, days_of_steps=of_steps, days=days, checkpoint_seconds=save,
                   failures_per_1000_device_days=each)
    if save is None:
        if given["params"] is None or given["write_rate"] is None:
            raise UserError("give --checkpoint-seconds, or --params and --write-rate")
        save = goodput.saving_seconds(given["params"], given["write_rate"])
    if (of_steps is None) == (days is None):
        raise UserError("give either --days-of-steps, or --days of the calendar")
    blocked, slowed = given["blocked_seconds"], given["slowed"]
    if not given["save_async"] and (blocked, slowed) != (None, None):
        raise UserError("--blocked-seconds and --slowed are of a save beside which steps go on; give --save-async, too")
    saving = goodput.typical_saving(save, given["save_async"])
    if given["save_async"]:
        saving = goodput.Saving(saving.blocked_seconds if blocked is None else blocked, saving.write_seconds,
                                saving.slowed if slowed is None else slowed)
    faults = goodput.faults_per_second(devices, per_device_day=None if each is None else each / 1000)
    detect = goodput.mean_detection(given["detect_seconds"], given["hang_seconds"], given["hang_share"])
    if days is not None:
        return goodput.within(days * goodput.DAY, saving, faults, detect, given["restart_seconds"]), save
    return goodput.Job(of_steps * goodput.DAY, saving, detect, given["restart_seconds"], faults), save


def show(job: Job, devices: int, finish: dict[str, float]) -> None:
    """Interval, goodput, accounts, and the range of the finish."""
    from rich.table import Table

    from athanor.laws.goodput import DAY, young_interval

    young = format_seconds(young_interval(job.saving.cost_seconds, job.faults))
    say(f"{devices:,} devices: {job.faults * DAY:.3g} faults a day, one every {format_seconds(1 / job.faults)}; {job.saving}. "
        f"Save every {format_seconds(job.interval)} (Young's square root: {young})")
    say(f"Counted with {1000 * job.faults * DAY / devices:.3g} faults in 1,000 device-days (Llama 3 405B's unless given), "
        f"{format_seconds(job.detect_seconds)} from a fault to new processes, and {format_seconds(job.restart_seconds)} from "
        "these to the first step")
    say(f"Goodput {format_share(job.goodput)}: {format_seconds(job.stepping_seconds)} of steps in "
        f"{format_seconds(job.wall_seconds)}")
    table = Table(box=None)
    for column in ("account", "time", "share"):
        table.add_column(column, justify="left" if column == "account" else "right")
    names = {"kernel": "kernel, beside a write"}
    for name, seconds in {"kept steps": job.stepping_seconds, **job.expect()}.items():
        if seconds or name != "kernel":
            table.add_row(names.get(name, name), format_seconds(seconds), format_share(seconds / job.wall_seconds))
    console.print(table)
    for factor, words in ((0.25, "four times as often"), (4.0, "a quarter as often")):
        say(f"saving {words}: goodput {format_share(job.at_interval(factor * job.interval).goodput)}")
    start = datetime.date.today()
    last = (datetime.date.max - start).days
    days = ", ".join(f"{name.upper()} {f'{seconds / 3600:.1f} h' if seconds < 7 * DAY else f'{seconds / DAY:.1f} days'} ("
                     + (f"{start + datetime.timedelta(seconds=seconds)})" if seconds / DAY < last else "after the year 9999)")
                     for name, seconds in finish.items())
    say(f"finish, when started today: {days}")


def show_levers(levers: list[Lever], target: float) -> None:
    """For each lever what it is, and what it would have to be."""
    from rich.table import Table

    if not levers:
        say(f"a goodput of {format_share(target)} is reached already")
        return
    say(f"What would bring a goodput of {format_share(target)}, alone and at the best interval each time:")
    table = Table(box=None)
    for column in ("", "now", "needed", "share of now"):
        table.add_column(column, justify="right" if column else "left")
    for lever in levers:
        cells = ["–", f"cannot: {format_share(lever.goodput_without)} with none"]
        if lever.needed is not None:
            cells = [_amount(lever.unit, lever.needed), format_share(lever.needed / lever.now)]
        table.add_row(lever.name, _amount(lever.unit, lever.now), *cells)
    console.print(table)


def _amount(unit: str, amount: float) -> str:
    if unit == "seconds":
        return format_seconds(amount)
    return format_share(amount) if unit == "of each" else f"{amount:.3g} {unit}"
