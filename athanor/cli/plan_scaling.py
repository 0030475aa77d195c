"""`athanor plan scaling`: what each law of loss says of a size and its tokens, and a law of one's own runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from athanor.cli.counts import COUNT
from athanor.foundation.progress import console, say
from athanor.foundation.units import PD_FLOP, check_positive, format_count, format_flops, format_share

if TYPE_CHECKING:
    from athanor.laws.fit import Fit
    from athanor.laws.scaling import Opinion

LEAST_FITTED = 1e5  # parameters; those of the smallest runs behind any of the laws are 189 k


@click.command()
@click.option("--params", type=COUNT, help="parameters of the model")
@click.option("--tokens", type=COUNT, help="tokens it is trained on")
@click.option("--pd", type=float, help="compute, 6 N D in PD; instead of parameters, of tokens, or of both")
@click.option("--unique-tokens", type=COUNT, help="tokens there are; more than these are repeated")
@click.option("--fit", "runs", type=click.Path(path_type=Path), help="fit a law to a CSV with params, tokens, loss of finished "
              "runs, and unique_tokens where they repeat")
@click.option("--out", type=click.Path(path_type=Path), help="where to write the fitted law")
@click.option("--law", "laws", type=click.Path(path_type=Path), help="a file with laws of your own, as --fit writes")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the resampling behind the fit's intervals")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(params: float | None, tokens: float | None, pd: float | None, unique_tokens: float | None, runs: Path | None,
            out: Path | None, laws: Path | None, seed: int, as_json: bool) -> None:
    """Set the laws of loss side by side for --params and --tokens, or for --pd; fit one to your own runs."""
    from athanor.foundation.errors import UserError
    from athanor.foundation.run_folder import write_atomic
    from athanor.laws import scaling
    from athanor.laws.fit import fit_law, read_runs

    own, answer = scaling.read_laws(laws) if laws else [], dict[str, object]()
    if out and not runs:
        raise UserError("--out writes a fitted law; give the runs with --fit")
    if runs:
        fit = fit_law(read_runs(runs), seed=seed)
        own.append(fit.law)
        answer["fit"] = asdict(fit)
        if not as_json:
            show_fit(fit)
        if out:
            write_atomic(out, fit.to_toml())
            say(f"written to {out}")
    if not runs or (params, tokens, pd) != (None, None, None):
        unique = math.inf if unique_tokens is None else unique_tokens
        size, count = _size_and_tokens(params, tokens, pd, unique)
        opinions = scaling.compare(size, count, unique, own)
        answer |= {"parameters": size, "tokens": count, "tokens_per_parameter": count / size,
                   "pd_6nd": 6 * size * count / PD_FLOP, "effective_tokens": scaling.effective_tokens(count, unique),
                   "laws": [asdict(one) for one in opinions], "disagreement": scaling.disagreement(opinions),
                   "sources": {law.name: law.source for law in [*scaling.published_laws(6 * size * count), *own]}
                   | {law.name: law.source for law in scaling.frontiers()}}
        if not as_json:
            show(size, count, unique, opinions)
            if size < LEAST_FITTED:
                meant = " ".join(f"--{name} {value:g}B" for name, value in (("params", params), ("tokens", tokens))
                                 if value and value < LEAST_FITTED)
                say(f"None of these laws was fitted to models of fewer than about {format_count(LEAST_FITTED)} parameters, so "
                    "they say nothing here" + (f"; did you mean {meant}?" if meant else ""))
    if as_json:
        click.echo(json.dumps(answer))


def _size_and_tokens(params: float | None, tokens: float | None, pd: float | None, unique_tokens: float) -> tuple[float, float]:
    """Two of the three give the third; of PD alone, the optimum of the planner's law."""
    from athanor.foundation.errors import UserError
    from athanor.laws.scaling import law_for

    check_positive(params=params, tokens=tokens, pd=pd, unique_tokens=None if unique_tokens == math.inf else unique_tokens)
    if params and tokens:
        if pd:
            raise UserError("--params, --tokens and --pd are one too many; any two give the third (PD = 6 N D / 8.64e19)")
        return params, tokens
    if not pd:
        raise UserError("give --params and --tokens, or --pd, or --fit runs.csv")
    product = pd * PD_FLOP / 6
    if params:
        return params, product / params
    if tokens:
        return product / tokens, tokens
    law = law_for(6 * product)
    say(f"of {pd:,.4g} PD: the optimum of '{law.title}'")
    return law.optimum(6 * product, unique_tokens)


def show(parameters: float, tokens: float, unique_tokens: float, opinions: list[Opinion]) -> None:
    """The laws as a table, and how far they agree."""
    from rich.table import Table

    from athanor.laws.scaling import disagreement, effective_tokens

    flops = 6 * parameters * tokens
    say(f"{format_count(parameters)} parameters on {format_count(tokens)} tokens, {tokens / parameters:.3g} a parameter: "
        f"{format_flops(flops)} (6 N D)")
    table = Table(box=None)
    for column in ("law", "its optimum", "tokens", "ratio", "loss", "at its optimum", "given up", "compute for it"):
        table.add_column(column, justify="left" if column == "law" else "right")
    for one in opinions:
        cells = [format_count(one.optimal_parameters), format_count(one.optimal_tokens),
                 f"{one.optimal_tokens / one.optimal_parameters:.3g}"]
        if one.loss is not None and one.optimal_loss is not None:
            cells += [f"{one.loss:.3f}", f"{one.optimal_loss:.3f}", f"{one.excess:.3f}",
                      "none is enough" if one.enough_flops is None else format_share(one.enough_flops / flops)]
        table.add_row(one.title, *cells)
    console.print(table)
    if unique_tokens < tokens:
        say(f"{tokens / unique_tokens:.3g} epochs of {format_count(unique_tokens)} tokens count as "
            f"{format_count(effective_tokens(tokens, unique_tokens))} new ones")
    say(f"The advised sizes differ by a factor of {disagreement(opinions):.3g}. Losses of different laws are of other text: "
        "compare what each gives up.")


def show_fit(fit: Fit) -> None:
    """The fitted constants with their intervals."""
    from rich.table import Table

    say(f"Law of {fit.runs} runs: irreducible + a / N^alpha + b / D^beta")
    table = Table(box=None)
    for column in ("constant", "fitted", "10 %", "90 %"):
        table.add_column(column, justify="left" if column == "constant" else "right")
    for name, (low, high) in fit.intervals.items():
        table.add_row(name, *(f"{value:.4g}" for value in (getattr(fit.law, name), low, high)))
    console.print(table)
    say(f"typical error {format_share(fit.median_error, 2)} of the loss, largest {format_share(fit.largest_error, 2)}")
