"""`athanor rehearse`: run some ranks of a stage without accelerators, peers or data, and say what they would take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.counts import POSITIVE
from athanor.foundation.progress import Bar, console, say
from athanor.foundation.units import format_bytes, format_count, format_flops, format_share

if TYPE_CHECKING:
    from athanor.foundation.recipe import Recipe
    from athanor.foundation.run_folder import RunFolder
    from athanor.ledger.book import Book
    from athanor.train.rehearse import Rehearsed
    from athanor.train.stage import Job

KEPT_FREE = 0.1  # of a device's memory, for its driver, libraries' buffers and what an allocator cannot use


@dataclass(frozen=True)
class Device:
    """What a rehearsal must know of a device: how models compute on it, and what it holds; None where nobody knows."""

    type: str
    accelerator: str
    memory_bytes: float | None
    peak_flops: float | None


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--world", type=POSITIVE, help="ranks; the product of the recipe's degrees or its devices if left out")
@click.option("--stage", help="the stage to rehearse; the first when left out")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(recipe: Path, overrides: tuple[str, ...], world: int | None, stage: str | None, as_json: bool) -> None:
    """Rehearse a stage of RECIPE on any number of ranks, here and without an accelerator.

    Runs the real program of one rank of the first, a middle and the last pipeline stage, with tensors that have no values:
    peak memory by kind, every collective and FLOPs of a step, and what would help where memory does not suffice. Written
    beside the stage's forecast as rehearsal.json.
    """
    from athanor.cli.nearest import with_nearest
    from athanor.cli.preflight import planned
    from athanor.foundation.errors import LayoutError
    from athanor.foundation.recipe import load_recipe
    from athanor.foundation.run_folder import RunFolder, runs_root
    from athanor.train.memory import remedies
    from athanor.train.rehearse import rehearsal_job
    from athanor.train.settings import world_size_of

    wanted = load_recipe(recipe, list(overrides))
    run = RunFolder(runs_root() / wanted.name)
    wanted = planned(wanted, run)
    name = stage or wanted.stage[0].name
    device = describe_device(wanted, run, name)
    ranks = world or wanted.cluster.devices or 1
    try:
        ranks = world or world_size_of(wanted, ranks)
        job = rehearsal_job(run, wanted, name, ranks)
    except LayoutError as error:
        raise with_nearest(error, wanted, run, name, ranks) from None
    found = rehearse_with_bar(job, device)
    book = make_book(job, device, found)
    book.write(job.folder.rehearsal)
    helps = remedies(max((each.seen for each in found), key=lambda seen: seen.peak_bytes).memory_bytes, job)[:3]
    if as_json:
        click.echo(json.dumps(describe(job, device, book, helps)))
    else:
        show(job, device, found, helps)
        say(f"written to {job.folder.rehearsal}")


def describe_device(recipe: Recipe, run: RunFolder, stage: str) -> Device:
    """From cluster.accelerator, a cluster.toml, or neither: then it is computed as on this machine, and what fits is unknown."""
    from athanor.cluster.spec import load_accelerator, read_cluster

    precision = recipe.get_stage(stage).precision or "fp32"
    file = run.cluster if recipe.cluster.file == "auto" else Path(recipe.cluster.file)
    if recipe.cluster.accelerator and recipe.cluster.file == "auto":
        facts = load_accelerator(recipe.cluster.accelerator)
        peak = facts.get(f"peak_{precision}_flops", {}).get("value")
        return Device("cuda", facts["name"], facts.get("memory_bytes", {}).get("value"), peak)
    if file.exists() or recipe.cluster.file != "auto":
        spec = read_cluster(file)
        return Device(spec.device_type, spec.accelerator, spec.memory_bytes or None, spec.peak_flops.get(precision))
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return Device(kind, kind, None, None)


def rehearse_with_bar(job: Job, device: Device) -> list[Rehearsed]:
    """Rehearse the chosen ranks, each in a process of its own."""
    from athanor.train.rehearse import chosen_ranks, rehearse

    ranks = chosen_ranks(job)
    with Bar(f"rehearse {job.settings.stage}", float(len(ranks))) as bar:
        done = dict.fromkeys(ranks, 0.0)

        def show_part(message: dict[str, Any]) -> None:
            bar.advance(message["done"] - done[message["rank"]], f"rank {message['rank']}")
            done[message["rank"]] = message["done"]

        return rehearse(job, device.type, ranks, job.folder.logs / "rehearse", show_part)


def make_book(job: Job, device: Device, found: list[Rehearsed]) -> Book:
    """The stage's book of kind "rehearsal": no times, memory of each rehearsed rank, model FLOPs of full rows."""
    from athanor.ledger.book import Book

    settings = job.settings
    book = Book("rehearsal", job.layout.world_size, device.accelerator, device.peak_flops)
    book.tokens = float(settings.steps * settings.global_batch_tokens)
    book.model_flops = job.shape.flops(book.tokens, (settings.seq_len + 1) / 2)
    book.model_flops_full = job.shape.flops_full(book.tokens, settings.seq_len)
    book.memory_bytes = {kind: [float(each.seen.memory_bytes[kind]) for each in found] for kind in found[0].seen.memory_bytes}
    book.evidence = dict.fromkeys(("memory_bytes", "model_flops", "rehearsed"), "derived")
    book.rehearsed = [{"rank": each.rank, "pp": each.pp_rank, "blocks": each.blocks, "peak_bytes": each.seen.peak_bytes,
                       "flops": each.seen.flops, "collectives": [asdict(row) for row in each.seen.collectives]}
                      for each in found]
    book.notes = [f"rows of one document of {settings.seq_len} tokens; blocks as they are written, not compiled; what kernels "
                  "allocate within themselves and what an allocator keeps is not in it"]
    return book


def describe(job: Job, device: Device, book: Book, helps: list[Any]) -> dict[str, Any]:
    """The rehearsal as one JSON document."""
    peak = max(row["peak_bytes"] for row in book.rehearsed)
    return {"file": str(job.folder.rehearsal), "stage": job.settings.stage, "devices": book.devices, "layout": str(job.layout),
            "accelerator": device.accelerator, "capacity_bytes": device.memory_bytes, "peak_bytes": peak,
            "fits": None if device.memory_bytes is None else peak <= (1 - KEPT_FREE) * device.memory_bytes,
            "memory_bytes": book.memory_bytes, "rehearsed": book.rehearsed, "model_flops": book.model_flops,
            "remedies": [{"changes": each.changes, "saves_bytes": each.saves_bytes, "costs": each.costs} for each in helps]}


def show(job: Job, device: Device, found: list[Rehearsed], helps: list[Any]) -> None:
    """Memory and FLOPs per stage, collectives by axis, and whether it fits."""
    from rich.table import Table

    titles = [f"rank {each.rank}" + (f", stage {each.pp_rank} of {job.layout.pp}" if job.layout.pp > 1 else "") for each in found]
    size = f"{format_count(job.shape.parameters())} parameters"
    table = Table(title=f"{job.settings.stage}, {size}, on {job.layout.world_size} ranks ({job.layout}): peak memory", box=None,
                  title_justify="left")
    table.add_column("kind")
    for title in titles:
        table.add_column(title, justify="right")
    for kind in found[0].seen.memory_bytes:
        table.add_row(kind, *(format_bytes(each.seen.memory_bytes[kind]) for each in found))
    table.add_row("together", *(format_bytes(each.seen.peak_bytes) for each in found))
    table.add_row("blocks", *(f"{each.blocks[0]} to {each.blocks[-1]}" for each in found))
    for kind, name in (("model", "model FLOPs of a step"), ("recompute", "computed again")):
        table.add_row(name, *(format_flops(each.seen.flops[kind]) if each.seen.flops[kind] else "0" for each in found))
    console.print(table)
    show_collectives(found, titles)
    say(verdict(device, found))
    for each in helps if not fits(device, found) else ():
        say(f"  {each}")


def show_collectives(found: list[Rehearsed], titles: list[str]) -> None:
    """Messages and bytes of a step, by axis and kind."""
    from rich.table import Table

    table = Table(title="Collectives of a step: messages, and bytes together", box=None, title_justify="left")
    table.add_column("axis")
    table.add_column("kind")
    for title in titles:
        table.add_column(title, justify="right")
    for axis, kind in sorted({(row.axis, row.kind) for each in found for row in each.seen.collectives}):
        cells = []
        for each in found:
            rows = [row for row in each.seen.collectives if (row.axis, row.kind) == (axis, kind)]
            size = sum(row.size_bytes * row.count for row in rows)
            cells.append(f"{sum(row.count for row in rows)}, {format_bytes(size)}" if rows else "")
        table.add_row(axis, kind, *cells)
    console.print(table)


def fits(device: Device, found: list[Rehearsed]) -> bool:
    """Whether the fullest rank leaves a device's share free; yes where nobody knows what it holds."""
    return device.memory_bytes is None or max(each.seen.peak_bytes for each in found) <= (1 - KEPT_FREE) * device.memory_bytes


def verdict(device: Device, found: list[Rehearsed]) -> str:
    """One sentence: whether it fits, or that nobody knows."""
    fullest = max(found, key=lambda each: each.seen.peak_bytes)
    peak = fullest.seen.peak_bytes
    if device.memory_bytes is None:
        return (f"The fullest rank takes {format_bytes(peak)}; whether that fits is unknown: name cluster.accelerator, or give a "
                "cluster.toml as cluster.file.")
    usable, holds = (1 - KEPT_FREE) * device.memory_bytes, format_bytes(device.memory_bytes)
    if fits(device, found):
        return (f"It fits: rank {fullest.rank} takes {format_bytes(peak)}, {format_share(peak / device.memory_bytes, 0)} of the "
                f"{holds} of a {device.accelerator}.")
    return (f"It would not fit: rank {fullest.rank} takes {format_bytes(peak)}, and of the {holds} of a {device.accelerator} "
            f"{format_bytes(usable)} are counted on; {format_bytes(peak - usable)} must go. Cheapest first:")
