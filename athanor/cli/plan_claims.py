"""`athanor plan claims`: which published figures of a run agree with each other, and by which way of counting."""

from __future__ import annotations

import json

import click

from athanor.cli.counts import COUNT, WHOLE
from athanor.foundation.progress import say


@click.command()
@click.option("--params", type=COUNT, help="parameters")
@click.option("--tokens", type=COUNT, help="tokens trained on")
@click.option("--devices", type=COUNT, help="accelerators")
@click.option("--accelerator", help="their name, such as A100-80; its dense bf16 peak counts")
@click.option("--days", type=float, help="days from start to end")
@click.option("--efficiency", type=float, help="share of the peak, MFU or HFU, up to 1")
@click.option("--pd", type=float, help="petaFLOP/s-days")
@click.option("--model", help="a published model's name, a model folder, config.json or recipe; gives the parameters")
@click.option("--seq-len", type=WHOLE, help="tokens of a document, for the model's attention")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(accelerator: str | None, model: str | None, as_json: bool, **figures: float | None) -> None:
    """Say which published figures of a run agree: 6ND or 8ND, MFU or HFU, and the goodput that is left."""
    from athanor.cluster.spec import load_accelerator
    from athanor.laws.claims import Claims, compare, verdict
    from athanor.models.shapes.find import find_shape

    peak = load_accelerator(accelerator)["peak_bf16_flops"]["value"] if accelerator is not None else None
    shape = find_shape(model) if model is not None else None
    claims = Claims(peak_flops=peak, shape=shape, **figures)  # type: ignore[arg-type]
    found = compare(claims)
    if as_json:
        click.echo(json.dumps({"verdict": verdict(claims, found), "findings": [finding.to_dict() for finding in found]}))
        return
    say(verdict(claims, found))
    words = {True: "agrees ", False: "differs", None: "       "}
    for finding in found:
        say(f"{words[finding.agrees]}  {finding.sentence}")
