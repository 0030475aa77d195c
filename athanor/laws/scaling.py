"""What loss a shape reaches after so many tokens, what published laws advise, and how batch and rate follow from size."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.units import check_positive
from athanor.laws.published import constants

NUMBERS = ("irreducible", "a", "alpha", "b", "beta")
ENDS = {"irreducible": (0.0, 1e6), "alpha": (1e-3, 5.0), "beta": (1e-3, 5.0)}  # of what a file may say


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """Tokens that count: repeated ones lose value with each epoch (Muennighoff et al. 2023, equation 5).

    D' = U + U R* (1 - exp(-R / R*)) with U unique tokens, R repetitions after the first epoch.
    """
    if tokens <= unique_tokens:
        return tokens
    half_life = float(constants()["repeat_half_life"])
    repeats = tokens / unique_tokens - 1.0
    return unique_tokens * (1.0 + half_life * (1.0 - math.exp(-repeats / half_life)))


def critical_batch_tokens(tokens: float) -> float:
    """Tokens of a step at which half of them are wasted: c sqrt(tokens), 10 M for fifteen trillion, a few k for millions."""
    return float(constants()["batch_coefficient"]) * math.sqrt(tokens)


@dataclass(frozen=True)
class Law:
    """Nats per held-out token: E + (A / N^alpha + B / D^beta)^power, N in decoder blocks.

    The form of Hoffmann et al. 2022 with power 1, and that of Kaplan et al. 2020 (equation 1.5) with E = 0.
    """

    name: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float
    power: float = 1.0
    title: str = ""
    source: str = ""
    confidence: str = ""

    def loss(self, block_parameters: float, tokens: float, unique_tokens: float = math.inf, batch_tokens: float = 0.0) -> float:
        """Repeated tokens count less, and so do those of large batches: D / (1 + batch / critical batch).

        That is the trade-off between steps and examples of McCandlish et al. 2018.
        """
        counted = effective_tokens(tokens, unique_tokens) / (1.0 + batch_tokens / critical_batch_tokens(tokens))
        return float(self.irreducible + (self.a / block_parameters**self.alpha + self.b / counted**self.beta) ** self.power)

    def optimum(self, flops: float, unique_tokens: float = math.inf) -> tuple[float, float]:
        """The (parameters, tokens) with the lowest loss of all with 6 N D = `flops`.

        In closed form (Hoffmann et al. 2022, equation 4), or searched where tokens must be repeated.
        """
        ratio = self.alpha * self.a / (self.beta * self.b)
        parameters = ratio ** (1 / (self.alpha + self.beta)) * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        if flops / 6 / parameters > unique_tokens:
            tried = parameters * np.geomspace(1.0, flops / 6 / parameters / unique_tokens, 2001)
            parameters = min(map(float, tried), key=lambda n: self.loss(n, flops / 6 / n, unique_tokens))
        return parameters, flops / 6 / parameters

    def flops_for(self, loss: float) -> float:
        """The least training FLOPs that reach `loss`, of tokens that are not repeated; infinite when no training does."""
        if loss <= self.irreducible:
            return math.inf
        optimal, _ = self.optimum(6.0)  # N = optimal (C / 6)^x and D = (C / 6)^(1 - x) / optimal, so both terms fall alike
        falls = self.alpha * self.beta / (self.alpha + self.beta)
        wanted = (loss - self.irreducible) ** (1 / self.power)
        return float(6.0 * ((self.a / optimal**self.alpha + self.b * optimal**self.beta) / wanted) ** (1 / falls))


@dataclass(frozen=True)
class Frontier:
    """A law that tells the compute-optimal size alone: `of` = coefficient (C / unit_flops)^exponent."""

    name: str
    of: str  # parameters or tokens
    coefficient: float
    exponent: float
    unit_flops: float
    title: str
    source: str
    confidence: str

    def optimum(self, flops: float) -> tuple[float, float]:
        """Its (parameters, tokens) for so many training FLOPs, with 6 N D = `flops`."""
        found = self.coefficient * (flops / self.unit_flops) ** self.exponent
        other = flops / 6 / found
        return (found, other) if self.of == "parameters" else (other, found)


def law(name: str) -> Law:
    """A law of `laws.toml` by its name. Raises UserError for a name that is not there."""
    laws = constants()["law"]
    if name not in laws:
        raise UserError(f"there is no law '{name}'; {did_you_mean(name, laws)}")
    return Law(name, **laws[name])


def law_for(flops: float) -> Law:
    """The law for a budget of so many training FLOPs: fitted to our own small models, or the published one for large ones."""
    return law("small" if flops <= constants()["small_until_flops"] else constants()["large"])


def published_laws(flops: float = math.inf) -> list[Law]:
    """All surfaces; that of small models, which knows nothing of large ones, for small compute alone."""
    return [law(name) for name in constants()["law"] if name != "small" or flops <= constants()["small_until_flops"]]


def frontiers() -> list[Frontier]:
    """All laws that tell a size and no loss."""
    return [Frontier(name, **values) for name, values in constants()["frontier"].items()]


def read_laws(path: Path) -> list[Law]:
    """Laws from a file such as `athanor plan scaling --fit` writes. Raises UserError naming what is wrong in it."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("law", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not a file of laws: {error}") from None
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{path} has no table [law.<name>]")
    for name, table in tables.items():
        for key in NUMBERS:
            value = table.get(key) if isinstance(table, dict) else None
            least, most = ENDS.get(key, (1e-60, 1e60))
            if not isinstance(value, (int, float)) or not least <= value <= most:
                raise UserError(f"{path}: law.{name}.{key} = {value!r}; it must be a number from {least:g} to {most:g}")
    return [Law(name, **{key: float(table[key]) for key in NUMBERS}, title=str(table.get("title", name)),
                source=str(table.get("source", path)), confidence="own") for name, table in tables.items()]


@dataclass(frozen=True)
class Opinion:
    """What one law says of (N, D); a frontier tells no loss.

    `excess` is the loss given up against `optimal_loss`, in nats; `enough_flops` what the law's own optimum needs for `loss`,
    None where no training reaches it.
    """

    name: str
    title: str
    optimal_parameters: float
    optimal_tokens: float
    loss: float | None = None
    optimal_loss: float | None = None
    excess: float | None = None
    enough_flops: float | None = None


def compare(parameters: float, tokens: float, unique_tokens: float = math.inf, own: list[Law] | None = None) -> list[Opinion]:
    """Every law's opinion of so many parameters and tokens and of the same compute, 6 N D, spent at its own optimum.

    Losses of different laws are of different text and tokenizers: compare sizes and differences, never the losses themselves.
    """
    check_positive(parameters=parameters, tokens=tokens, unique_tokens=None if unique_tokens == math.inf else unique_tokens)
    flops, out = 6.0 * parameters * tokens, []
    for one in [*published_laws(flops), *(own or [])]:
        best = one.optimum(flops, unique_tokens)
        loss, least = one.loss(parameters, tokens, unique_tokens), one.loss(*best, unique_tokens)
        enough = one.flops_for(loss)
        out.append(Opinion(one.name, one.title, *best, loss, least, max(0.0, loss - least),
                           enough if enough < math.inf else None))
    return out + [Opinion(one.name, one.title, *one.optimum(flops)) for one in frontiers()]


def disagreement(opinions: list[Opinion]) -> float:
    """By what factor the largest model that a law advises for the compute is larger than the smallest."""
    sizes = [opinion.optimal_parameters for opinion in opinions]
    return max(sizes) / min(sizes)


def learning_rate(hidden_size: int, optimizer: str, is_start: bool) -> float:
    """Peak rate at width 128, falling with the square root of the width; lower when training goes on from a model."""
    rates = constants()["learning_rate"]
    rate = min(rates["most"], rates[optimizer] * math.sqrt(128 / hidden_size))
    return float(f"{rate * (1.0 if is_start else rates['continued']):.2g}")
