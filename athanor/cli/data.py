"""`athanor data`: build training data from a recipe, look at it, and trace a token to its document."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from athanor.cli.chain import alone, locked
from athanor.cli.counts import INDEX
from athanor.cli.preflight import planned
from athanor.foundation.errors import DataError
from athanor.foundation.progress import Bar, console, say
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, read_json, runs_root
from athanor.foundation.units import format_bytes, format_count, format_seconds, format_share

as_json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")


@click.group()
def command() -> None:
    """Build, inspect and trace training data."""


@command.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), help="the data folder; runs/<name>/data when left out")
@as_json_option
def build(recipe: Path, overrides: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Read, filter and deduplicate the sources of RECIPE, train the tokenizer, and write token shards."""
    wanted = load_recipe(recipe, list(overrides))
    run = RunFolder(runs_root() / wanted.name)
    folder = out or run.data
    wanted = planned(wanted, run)
    with contextlib.ExitStack() as held:
        if out is None:
            held.enter_context(locked(run))
            held.enter_context(alone(run, "data", wanted))
        manifest = build_with_bar(wanted, folder)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **manifest}))
    else:
        show(folder, manifest, read_json(folder / "funnel.json"))


@command.command()
@click.argument("data_folder", type=click.Path(path_type=Path))
@as_json_option
def inspect(data_folder: Path, as_json: bool) -> None:
    """Show the funnel, samples and sizes of DATA_FOLDER, and whether its files are still what was built."""
    from athanor.data.lineage import damaged_files, open_manifest

    manifest = open_manifest(data_folder)
    funnel = _read_funnel(data_folder)
    damaged = damaged_files(data_folder)
    if as_json:
        click.echo(json.dumps({"manifest": manifest, "funnel": funnel, "damaged": damaged}))
    else:
        show(data_folder, manifest, funnel)
        _show_samples(funnel)
        say("all files are as they were built" if not damaged else f"damaged or missing: {', '.join(damaged)}")
    if damaged:
        raise SystemExit(1)


@command.command()
@click.argument("data_folder", type=click.Path(path_type=Path))
@click.argument("token_index", type=INDEX)
@click.option("--split", type=click.Choice(["train", "evaluation"]), default="train", show_default=True, help="which token file")
@click.option("--source", help="whose training tokens, when there are several sources")
@as_json_option
def trace(data_folder: Path, token_index: int, split: str, source: str | None, as_json: bool) -> None:
    """Say from which document and bytes token number TOKEN_INDEX of DATA_FOLDER comes."""
    from athanor.data import lineage

    found = lineage.trace(data_folder, token_index, split, source)
    if as_json:
        click.echo(json.dumps(found))
        return
    document, (start, end) = found["document"], found["bytes"]
    say(f"token {token_index} is {found['token']!r} (id {found['token_id']})")
    say(f"document {document['number']}: {document['uri']} of source {document['source']}, {document['length']} bytes "
        f"from {document['offset']}, doc_id {document['doc_id']}")
    say(f"bytes {start} to {end} of its text: {found['before'][-60:]!r} >{found['token']!r}< {found['after'][:60]!r}")


def build_with_bar(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Build a data folder with a progress bar for each step; returns the manifest."""
    from athanor.data.build import build as build_data

    bars: dict[str, Bar] = {}

    def progress(step: str, done: float, total: float) -> None:
        if step not in bars:
            for bar in bars.values():
                bar.__exit__(None, None, None)
            bars[step] = Bar(step, total).__enter__()
        bars[step].advance(done - bars[step].done, format_bytes(done))

    try:
        return build_data(recipe, folder, progress=progress)
    finally:
        for bar in bars.values():
            bar.__exit__(None, None, None)


def show(folder: Path, manifest: dict[str, Any], funnel: dict[str, Any]) -> None:
    """The funnel, the splits and the speed of each step, for people."""
    from rich.table import Table

    table = Table(title=f"{folder}", title_justify="left", box=None)
    for heading in ("", "documents", "bytes"):
        table.add_column(heading, justify="left" if not heading else "right")
    for stage in funnel["stages"]:
        table.add_row(f"into {stage['name']}", f"{stage['documents']:,}", format_bytes(stage["bytes"]))
        for reason, counts in stage["dropped"].items():
            table.add_row(f"    dropped: {reason}", f"{counts['documents']:,}", format_bytes(counts["bytes"]))
    for name, counts in funnel["splits"].items():
        table.add_row(f"{name}, {format_count(counts['tokens'])} tokens", f"{counts['documents']:,}",
                      format_bytes(counts["bytes"]))
    console.print(table)
    say(f"vocabulary {manifest['vocab_size']:,}, {manifest['bytes_per_token']:.2f} bytes per token; {manifest['pairs']:,} pairs "
        f"to learn answers from, {manifest['functions']:,} held-out functions")
    read_bytes = funnel["stages"][0]["bytes"]
    say("; ".join(f"{step} {format_seconds(seconds)} ({format_bytes(read_bytes / max(seconds, 1e-9))}/s)"
                  for step, seconds in manifest["seconds"].items()))
    kept = sum(counts["bytes"] for counts in funnel["splits"].values())
    say(f"kept {format_share(kept / max(1, read_bytes))} of {format_bytes(read_bytes)} in "
        f"{format_seconds(sum(manifest['seconds'].values()))}")


def _read_funnel(folder: Path) -> dict[str, Any]:
    funnel: dict[str, Any] = read_json(folder / "funnel.json")
    if not isinstance(funnel, dict) or not {"stages", "splits", "samples"} <= set(funnel):
        raise DataError(f"{folder / 'funnel.json'} is not the funnel of a build; build the data again (athanor data build)")
    return funnel


def _show_samples(funnel: dict[str, Any]) -> None:
    for kind, by_name in funnel["samples"].items():
        for name, samples in by_name.items():
            for sample in samples:
                value = f" ({sample['value']:.3g} against {sample['threshold']:.3g})" if "value" in sample else ""
                say(f"{kind.replace('_', ' ')}, {name}{value}: {sample['source']}/{sample['uri']}")
