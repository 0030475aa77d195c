"""`athanor check`: measure this machine and write cluster.toml."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from athanor.cli.counts import POSITIVE
from athanor.cluster.spec import ClusterSpec, busy_note
from athanor.foundation.layout import Layout
from athanor.foundation.progress import Bar, console, say
from athanor.foundation.units import format_bytes, format_rate, format_seconds, format_share

STEPS_SECONDS = 5.0  # of timing whole steps


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("cluster.toml"), show_default=True,
              help="where to write what was found")
@click.option("--devices", type=POSITIVE, help="measure this many devices; all of them when left out")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(out: Path, devices: int | None, as_json: bool) -> None:
    """Measure this machine and write cluster.toml: matmuls, attention, element-wise work, collectives, disk."""
    spec, seconds = check(out, devices)
    if as_json:
        click.echo(json.dumps({"file": str(out), "seconds": seconds, **asdict(spec)}))
    else:
        show(spec)
        say(f"measured in {format_seconds(seconds)}, written to {out}")


def check(out: Path, devices: int | None = None) -> tuple[ClusterSpec, float]:
    """Measure, write `out`, and return what was found with the seconds it took."""
    from athanor.cluster.probe import measure
    from athanor.foundation.launch import run_ranks

    begin, done = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory(dir=_existing(out.parent), prefix=".check-") as logs, Bar("check", 2.0) as bar:
        def advance(part: str, share: float) -> None:
            nonlocal done
            bar.advance(share - done, part)
            done = share

        spec = measure(Path(logs), devices, on_progress=advance)
        had: list[float] = []

        def hear(message: dict[str, Any]) -> None:
            advance(message["part"], 1.0 + message["share"])
            had.extend([message["had"]] if message["share"] >= 1.0 else [])

        spec.steps = run_ranks("athanor.train.step_times:time_steps", {"seconds": STEPS_SECONDS}, spec.devices,
                               log_folder=Path(logs) / "steps", timeout=STEPS_SECONDS * 4 + 120, on_message=hear)[0]
    if spec.processor_share is not None:
        spec.processor_share = min([spec.processor_share, *had])
    spec.write(out)
    if (note := busy_note(spec)) is not None:
        say(note)
    return spec, time.perf_counter() - begin


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show(spec: ClusterSpec) -> None:
    """A table for people."""
    from rich.table import Table

    table = Table(title=f"{spec.devices} x {spec.accelerator} ({spec.threads_per_device} threads each) on {spec.host}", box=None,
                  title_justify="left", show_header=False)
    rows = [(f"matmul, best, {dtype}", format_rate(rate)) for dtype, rate in spec.peak_flops.items()]
    rows += [("memory copy", f"{format_bytes(spec.memory_bytes_per_second)}/s"),
             ("memory per device", format_bytes(spec.memory_bytes))]
    for name, curve in spec.collectives.items():
        size, seconds = curve[-1]
        rows.append((name.replace("_", "-"), f"{format_seconds(curve[0][1])} for {format_bytes(curve[0][0])}, "
                     f"{format_bytes(size / seconds)}/s for {format_bytes(size)}"))
    rows += [("launch of an op", format_seconds(spec.overhead_seconds["forward"])),
             ("slowest rank", ", ".join(f"+{format_share(more)} of {format_seconds(work)}" for work, more in spec.jitter)),
             ("disk write + fsync, read", f"{format_bytes(spec.disk['write_bytes_per_second'])}/s, "
              f"{format_bytes(spec.disk['read_bytes_per_second'])}/s per rank"),
             ("Python", f"{spec.python['loops_per_second'] / 1e6:.1f} M loops/s, "
              f"{format_bytes(spec.python['text_bytes_per_second'])}/s of text")]
    rows += [(f"step of {int(tokens):,} tokens, {int(hidden)} wide, {int(layers)} blocks, {Layout(dp_shard=shard, tp=tp)}",
              format_seconds(seconds)) for _, _, hidden, _, layers, _, tokens, _, shard, tp, seconds, _ in spec.steps]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
