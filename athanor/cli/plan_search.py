"""`athanor plan search`: the best layouts of a model on a cluster, and why."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.counts import COUNT, WHOLE
from athanor.cli.plan_estimate import priced_as
from athanor.foundation.progress import console, say
from athanor.foundation.units import format_count, format_seconds, format_share

if TYPE_CHECKING:
    from athanor.planner.finalists import Finalist

ALWAYS = ("seq_len", "zero")  # what `athanor plan estimate` would take to be something else
LAYOUT_KEYS = ("seq_len", "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "micro_batch_size", "num_microbatches",
               "stages_per_rank", "zero", "recompute", "sequence_parallel")


@click.command()
@click.option("--model", required=True, help="a published model's name, a model folder, config.json or recipe")
@click.option("--cluster", required=True, help='a cluster.toml, or an accelerator: "H100-80 per_node=8 nic_gbps=400"')
@click.option("--devices", type=WHOLE, help="devices to use; the cluster's when left out")
@click.option("--global-batch-tokens", type=WHOLE, required=True, help="tokens of a step")
@click.option("--seq-len", type=WHOLE, help="tokens of a row; the model's longest, at most 8192, when left out")
@click.option("--recompute", multiple=True, help="none, selective or full; may be repeated; all three when left out")
@click.option("--schedule", multiple=True, help="GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble, "
              "DualPipeV; may be repeated; 1F1B and Interleaved1F1B when left out")
@click.option("--precision", default="bf16", show_default=True, help="bf16, fp16 or fp8")
@click.option("--program", default="megatron-core", show_default=True, help="family of training programs whose speed counts")
@click.option("--kernel", default="", help="of attention: flash, flash2, flash1, fused, eager; the program's usual when left out")
@click.option("--most-oom", type=float, default=0.1, show_default=True, help="greatest probability of running out of memory")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="layouts to show")
@click.option("--compare", is_flag=True, help="also TP x PP x DP, PP x DP with unequal stages, and FSDP, each at its best")
@click.option("--tokens", type=COUNT, help="a budget in tokens: days, PD, money and energy for it")
@click.option("--price", type=float, help="money per device and hour")
@click.option("--coefficients", type=click.Path(path_type=Path), help="what `athanor plan calibrate` wrote; else ours")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="also write a page")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(model: str, cluster: str, html: Path | None, as_json: bool, **options: Any) -> None:
    """Find the fastest layout that fits, price its alternatives, and say where the time of a step goes."""
    found = search(model, cluster, **options)
    if html:
        from athanor.report.search_page import write_search

        write_search(found, html)
    if as_json:
        click.echo(json.dumps(found))
        return
    show(found)
    if html:
        say(f"written to {html}")


def search(model: str, cluster: str, *, devices: int | None, global_batch_tokens: int, seq_len: int | None, compare: bool,
           top: int, tokens: float | None, price: float | None, **choices: Any) -> dict[str, Any]:
    """All answers as one document. Raises UserError when nothing fits, with what would be needed."""
    from athanor.foundation.errors import UserError
    from athanor.foundation.units import check_positive
    from athanor.models.shapes.find import find_shape
    from athanor.planner import answers, explain
    from athanor.planner.estimate import RECOMPUTE, read_cluster_words
    from athanor.planner.finalists import finalists
    from athanor.planner.search import Task, sweep

    check_positive(tokens=tokens, price=price)
    shape, machines = find_shape(model), read_cluster_words(cluster)
    devices = devices if devices is not None else machines.devices
    if devices is None:
        raise UserError(f"on how many {machines.accelerator}? Give --devices, or devices=… with the cluster")
    task = Task(shape, machines, devices, global_batch_tokens,
                seq_len if seq_len is not None else min(8192, shape.max_position_embeddings),
                recompute=choices["recompute"] or tuple(RECOMPUTE), precision=choices["precision"], program=choices["program"],
                kernel=choices["kernel"], most_odds=choices["most_oom"],
                schedules=choices["schedule"] or Task.schedules, coefficients=choices["coefficients"])
    task.check()
    started = time.perf_counter()
    grid = sweep(task)
    best = finalists(grid)
    seconds = time.perf_counter() - started
    if not best:
        raise UserError(answers.needed(grid))
    first = best[0]
    changes = explain.what_if(grid, first)
    others = [(other, answers.best_of(other)) for other in answers.with_devices(task)]
    sizes = sorted([(grid, first), *others], key=lambda one: one[0].task.devices)
    found: dict[str, Any] = {
        "model": model, "cluster": machines.accelerator, "devices": task.devices, "global_batch_tokens": global_batch_tokens,
        "seq_len": task.seq_len, "configurations": len(grid), "fitting": int(grid.fits.sum()), "seconds": seconds,
        "sweep_seconds": grid.took, "program": task.program, "layouts": [one.to_dict(task) for one in distinct(best)[:top]],
        "waterfall": [dict(zip(explain.WATERFALL, row, strict=True)) for row in explain.waterfall(first)],
        "what_if": [change.to_dict() for change in changes], "reasons": explain.reasons(grid, first.index, changes),
        "reasons_hold": explain.HELD,
        "worth": answers.devices_worth(sizes), "network_twice": answers.network_twice(grid, first),
        "pareto": answers.front(sizes)}
    if compare:
        found["compare"] = answers.compare_methods(grid)
    if tokens:
        found["cost"] = answers.cost(task, first.seconds, tokens, price)
    return found


def distinct(best: list[Finalist]) -> list[Finalist]:
    """Without those that differ from a better one only in which data ranks share out the states."""
    seen: dict[tuple[Any, ...], Finalist] = {}
    for one in best:
        seen.setdefault((one.layout.sizes()[0], one.layout.sizes()[3:], one.layout.ep, one.schedule, *one.values.values()), one)
    return list(seen.values())


def layout_words(layout: dict[str, Any]) -> str:
    """A layout on a line as `athanor plan estimate` reads it, what is 1 or 0 left out, with its split where stages
    differ (14x8 is 14 stages of 8 blocks)."""
    words = [f"{key}={layout[key]}" for key in LAYOUT_KEYS if key in ALWAYS or layout[key] not in (0, 1, "none")]
    usual = "Interleaved1F1B" if layout["stages_per_rank"] > 1 else "1F1B"
    words += [f"pipeline_schedule={layout['pipeline_schedule']}"] if layout["pipeline_schedule"] != usual else []
    if len(set(layout["split"])) > 1:
        runs = ((blocks, len(list(equal))) for blocks, equal in itertools.groupby(layout["split"]))
        words.append("split=" + ",".join(f"{count}x{blocks}" if count > 1 else str(blocks) for blocks, count in runs))
    return " ".join(words)


def show(found: dict[str, Any]) -> None:
    """Best layouts, waterfall, neighbours, and the answers."""
    first = found["layouts"][0]
    say(f"{found['configurations']:,} layouts of {found['model']} on {found['devices']:,} {found['cluster']} priced in "
        f"{format_seconds(found['seconds'])}; {found['fitting']:,} fit")
    rows = [[step(one["step_seconds"]), format_share(one["mfu"]), format_share(one["hfu"]),
             f"{max(one['memory_gib']):.1f}", format_share(one["out_of_memory_probability"]), layout_words(one["layout"])]
            for one in found["layouts"]]
    table("Best layouts", ("step", "MFU", "HFU", "GiB", "OOM", "layout"), rows)
    table("From the ideal step to this one", ("account", "time", "share", "up to here"), [
        [row["account"], step(row["seconds"]), format_share(row["share"]), step(row["up_to"])]
        for row in found["waterfall"]])
    table("Why", ("choice", "and its alternatives"), [[name, sentence] for name, sentence in found["reasons"].items()])
    say(found["reasons_hold"])
    table("Devices", ("devices", "step", "device-seconds per M tokens", "GiB"), [
        [f"{row['devices']:,}", *((step(row["step_seconds"]), f"{row['device_seconds_per_token'] * 1e6:,.1f}",
                                   f"{row['memory_gib']:.1f}") if row["step_seconds"] else ("nothing fits", "", ""))]
        for row in found["worth"]])
    twice = found["network_twice"]
    say(f"twice the network ({twice['nic_gbps']:,.0f} Gbit/s a device): {format_share(twice['saved'])} off the step")
    for entry in found.get("compare", []):
        what = (f"{step(entry['step_seconds'])}, {layout_words(entry['layout'])}" if "step_seconds" in entry else
                f"nothing fits, the least is {entry['least_memory_gib']:.0f} GiB" if entry["configurations"] else
                "no such layout splits this batch over these devices")
        say(f"{entry['method']}: {what}")
    if cost := found.get("cost"):
        money = "" if cost["money"] is None else f", {cost['money']:,.0f} in money"
        joules = cost["most_energy_joules"]
        energy = "" if joules is None else f", at most {joules / 3.6e9:,.0f} MWh in the devices"
        say(f"{format_count(cost['tokens'])} tokens: {cost['days']:.1f} days of steps, {cost['pd_6nd']:,.0f} PD (6ND), "
            f"{cost['device_hours']:,.0f} device-hours{money}{energy}")
    say(priced_as(found["program"], "--program ", found["cluster"]))
    say(f"the best, {layout_words(first['layout'])}: {first['tokens_per_second_per_device']:,.0f} tokens/s a device")


def step(seconds: float) -> str:
    """With digits enough to tell layouts apart."""
    return f"{seconds:,.2f} s" if 0.995 <= seconds < 1000 else format_seconds(seconds)


def table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.table import Table

    out = Table(title=title, box=None, title_justify="left")
    for column in columns:
        out.add_column(column, justify="left" if column in ("account", "layout", "choice", "and its alternatives") else "right")
    for row in rows:
        out.add_row(*row)
    console.print(out)
