"""`athanor plan design`: the shape of a model of some size, chosen for loss and speed together."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.counts import COUNT, WHOLE
from athanor.foundation.progress import Bar, console, say

if TYPE_CHECKING:
    from athanor.laws.codesign import Design

PER_NODE = 8  # devices, unless the cluster says so


@click.command()
@click.option("--params", type=COUNT, required=True, help="parameters of the model")
@click.option("--cluster", required=True, help='an accelerator and what belongs to it: "H100-80 devices=1024 nic_gbps=400"')
@click.option("--global-batch-tokens", type=WHOLE, required=True, help="tokens of a step")
@click.option("--pd", type=float, help="budget of compute, in PD of model FLOPs")
@click.option("--device-days", type=float, help="budget of device time; instead of --pd")
@click.option("--vocab-size", type=WHOLE, default=128256, show_default=True, help="entries of the tokenizer")
@click.option("--seq-len", type=WHOLE, default=4096, show_default=True, help="tokens of a row")
@click.option("--precision", default="bf16", show_default=True, help="bf16, fp16 or fp8")
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="tensor-parallel ranks that heads and FFN "
              "can be cut for")
@click.option("--coefficients", type=click.Path(path_type=Path), help="what `athanor plan calibrate` wrote; else ours")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the best shape there, as a config.json")
@click.option("--top", type=click.IntRange(min=1), default=8, show_default=True, help="shapes to show")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(params: float, cluster: str, global_batch_tokens: int, vocab_size: int, seq_len: int, precision: str, tp: int,
            coefficients: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Set shapes of equal size side by side, each on its fastest layout, at an equal budget."""
    from athanor.foundation.errors import UserError
    from athanor.foundation.run_folder import write_atomic
    from athanor.laws.codesign import explain, family, rank_designs
    from athanor.models.shapes.decoder import DecoderShape
    from athanor.planner.estimate import read_cluster_words
    from athanor.planner.search import Task, least_seconds

    machines = read_cluster_words(cluster)
    if machines.devices is None:
        raise UserError(f"on how many {machines.accelerator}? Give devices=… with the cluster")
    devices, per_node = machines.devices, int(machines.facts.get("per_node", PER_NODE))
    shapes = family(params, vocab_size, tp=tp)
    with contextlib.suppress(UserError):  # not every size has shapes whose heads a whole node can share
        shapes = list(dict.fromkeys([*shapes, *family(params, vocab_size, tp=math.lcm(tp, per_node))]))
    first = Task(shapes[0], machines, devices, global_batch_tokens, seq_len, precision=precision, coefficients=coefficients)
    first.check()
    tasks = [replace(first, shape=replace(shape, max_position_embeddings=seq_len)) for shape in shapes]
    seconds: dict[DecoderShape, float] = {}
    with Bar("shapes", len(shapes)) as bar:
        for task in tasks:
            if (step := least_seconds(task)) is not None:
                seconds[task.shape] = step * devices / global_batch_tokens
            bar.advance()
    if not seconds:
        raise UserError(f"none of {len(shapes)} shapes of {params:,.3g} parameters fits on {devices:,} {machines.accelerator}; "
                        "take more devices, or a smaller model")
    ranked = rank_designs(seconds, seconds.__getitem__, pd=options["pd"], device_days=options["device_days"],
                          mean_context=(seq_len + 1) / 2, per_node=per_node)
    if out:
        write_atomic(out, json.dumps(ranked[0].shape.to_config(), indent=2) + "\n")
    if as_json:
        click.echo(json.dumps({"shapes": len(shapes), "fitting": len(seconds), "why": explain(ranked), "designs": [
            {**one.shape.to_config(), "parameters": one.shape.parameters(), "tokens": one.tokens, "device_days": one.device_days,
             "seconds_per_token": seconds[one.shape], "losses": one.losses, "penalty": one.penalty, "cost": one.cost}
            for one in ranked[:options["top"]]]}))
        return
    show(ranked[:options["top"]])
    say(explain(ranked))
    asked = "" if precision == "bf16" else f" --precision {precision}"
    say(f'{"" if out else "with --out FILE the best is written for: "}athanor plan search --model {out or "FILE"} --cluster '
        f'"{cluster}" --global-batch-tokens {global_batch_tokens} --seq-len {seq_len}{asked}')


def show(ranked: list[Design]) -> None:
    from rich.table import Table

    from athanor.laws.codesign import COLUMNS, table

    shown = Table(box=None, title="Shapes of equal size at an equal budget, the best first", title_justify="left")
    for column in (*COLUMNS, *ranked[0].losses):
        shown.add_column(column, justify="right")
    for row in table(ranked):
        shown.add_row(*row)
    console.print(shown)
