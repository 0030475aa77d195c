"""`athanor plan estimate`: what a step of one model takes on one cluster in one layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from athanor.foundation.progress import console, say
from athanor.foundation.units import format_seconds, format_share


@click.command()
@click.option("--model", required=True, help="a published model's name, a model folder or a config.json")
@click.option("--cluster", required=True, help=(
    'a cluster.toml, or an accelerator: "H100-80 devices=2048 per_node=8 nic_gbps=400"'))
@click.option("--layout", default="", help='"tp=8 pp=8 dp_shard=32 micro_batch_size=1 seq_len=8192 global_batch_tokens=..."')
@click.option("--coefficients", "file", type=click.Path(path_type=Path), help="what `athanor plan calibrate` wrote; else ours")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(model: str, cluster: str, layout: str, file: Path | None, as_json: bool) -> None:
    """Estimate the step time, its accounts and the memory of a layout.

    Keys of a layout: pp, dp_replicate, dp_shard, cp, tp, ep; micro_batch_size, num_microbatches or global_batch_tokens,
    seq_len; pipeline_schedule, stages_per_rank, split (blocks of each stage, 10,12,12,14 or 2x12,14);
    zero (0 to 3), recompute, precision, sequence_parallel, program, kernel.
    """
    from athanor.models.shapes.find import find_shape
    from athanor.planner.estimate import estimate
    from athanor.planner.remedies import MOST_ODDS, remedies

    shape = find_shape(model)
    found = estimate(shape, cluster, layout, file)
    helps = remedies(shape, cluster, found, file)
    if as_json:
        click.echo(json.dumps({**found, "remedies": [asdict(each) for each in helps]}))
        return
    from rich.table import Table

    table = Table(title=f"{format_seconds(found['step_seconds'])} a step on {found['devices']:,} {found['accelerator']}",
                  box=None, title_justify="left")
    for column in ("account", "time", "share"):
        table.add_column(column, justify="left" if column == "account" else "right")
    for name, seconds in sorted(found["accounts"].items(), key=lambda item: -item[1]):
        if seconds:
            table.add_row(name, format_seconds(seconds), format_share(seconds / found["step_seconds"]))
    console.print(table)
    say(f"{found['tokens_per_second_per_device']:,.0f} tokens/s a device, MFU {format_share(found['mfu'])}, HFU "
        f"{format_share(found['hfu'])}; {max(found['memory_gib']):.1f} GiB at most, out of memory with a probability of "
        f"{format_share(found['out_of_memory_probability'])}")
    say(", ".join(f"{key} {value}" for key, value in found["layout"].items()))
    say(priced_as(found["layout"]["program"], "program=", found["accelerator"]))
    if helps:
        say("What would fit, on as many devices and with the same global batch, cheapest first:")
    elif found["out_of_memory_probability"] > MOST_ODDS:
        say("No three changes of this layout make it fit; `athanor plan search` looks at every layout, and says how many devices "
            "would do")
    for each in helps:
        say(f"  {each}")


def priced_as(program: str, key: str, accelerator: str) -> str:
    """Whose kernels and memory stand in the figures, and where our own trainer's are."""
    return (f"Speed and memory are those of {program}, with its kernels and what it keeps; {key}fsdp is nearest to our trainer, "
            f"whose own `athanor plan RECIPE cluster.accelerator={accelerator}` forecasts and `athanor rehearse RECIPE` finds.")
