"""Structure for loss and hardware together: shapes of equal size, each with what an equal budget makes of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from athanor.foundation.errors import UserError
from athanor.foundation.units import PD_FLOP, check_positive, format_count, format_share
from athanor.laws import scaling
from athanor.laws.published import constants
from athanor.models.shapes.decoder import DecoderShape

DEPTHS = (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
FFN_RATIOS = (8 / 3, 3.5, 4.0)  # intermediate_size / hidden_size
QUERY_GROUPS = (1, 4, 8)  # query heads of a key head
NEAR = 0.02  # of the wanted parameters
NEAR_RATIO = 0.15  # of the wanted ratio: the FFN takes up what rounding the heads left
AS_GOOD = 0.02  # of the cost, which is forecast no better
DAY = 86400.0


@dataclass(frozen=True)
class Design:
    """A shape with what the budget buys on it: tokens, device-days, and nats per token by law, with the aspect's `penalty`.

    `cost` is the device-days in which it would come as far as the first, loss being worth the compute that the planner's law
    asks for it.
    """

    shape: DecoderShape
    tokens: float
    device_days: float
    losses: dict[str, float]
    penalty: float
    cost: float = 0.0

    def __str__(self) -> str:
        shape = self.shape
        return (f"{shape.num_hidden_layers} layers of {shape.hidden_size} (FFN {shape.intermediate_size}, "
                f"{shape.num_attention_heads} query and {shape.num_key_value_heads} key heads)")


def aspect_penalty(shape: DecoderShape) -> float:
    """Relative loss that hidden_size / num_hidden_layers may cost, at most; laws of loss do not tell it (`laws.toml`)."""
    table, aspect = constants()["aspect"], shape.hidden_size / shape.num_hidden_layers
    beyond = max(math.log(aspect / table["free_to"]), math.log(table["free_from"] / aspect), 0.0)
    return float(table["measured_loss"] * (beyond / math.log(table["measured_at"] / table["free_to"])) ** 2)


def family(parameters: float, vocab_size: int, head_dim: int = 128, tp: int = 1, is_tied: bool = False) -> list[DecoderShape]:
    """Shapes within 2 % of `parameters`, of many depths, FFN ratios and query heads per key head, that `tp` ranks can cut.

    None has an aspect beyond what its penalty was measured for. Raises UserError when no whole number of heads comes near.
    """
    check_positive(parameters=parameters, vocab_size=vocab_size, head_dim=head_dim, tp=tp)
    out: dict[DecoderShape, None] = {}
    for layers, ratio, group in itertools.product(DEPTHS, FFN_RATIOS, QUERY_GROUPS):
        # layers (2 + 2 / group + 3 ratio) H^2 + ends H = parameters
        attention, ends = layers * (2 + 2 / group), vocab_size * (1 if is_tied else 2)
        square = attention + 3 * layers * ratio
        width = (math.sqrt(ends**2 + 4 * square * parameters) - ends) / (2 * square)
        heads = max(1, round(width / head_dim / group / tp)) * group * tp
        hidden = heads * head_dim
        left = parameters - ends * hidden - attention * hidden**2
        ffn = round(left / (3 * layers * hidden) / head_dim / tp) * head_dim * tp
        if abs(ffn / hidden / ratio - 1) > NEAR_RATIO:
            continue
        shape = DecoderShape(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                             num_key_value_heads=heads // group, head_dim=head_dim, tie_word_embeddings=is_tied,
                             intermediate_size=ffn)
        if (abs(shape.parameters() / parameters - 1) <= NEAR
                and aspect_penalty(shape) <= constants()["aspect"]["measured_loss"]):
            out[shape] = None
    if not out:
        raise UserError(f"no shape with heads of {head_dim} and a vocabulary of {vocab_size:,} comes within "
                        f"{format_share(NEAR, 0)} of {format_count(parameters)} parameters; take smaller heads, a smaller "
                        "vocabulary or another size")
    return list(out)


def rank_designs(shapes: Iterable[DecoderShape], seconds_per_token: Callable[[DecoderShape], float], *, pd: float | None = None,
                 device_days: float | None = None, mean_context: float = 2048.5, per_node: int = 1) -> list[Design]:
    """What an equal budget, either PD of model FLOPs or device-days, makes of each shape, best first.

    `seconds_per_token` gives device-seconds per trained token. Of equal device-days the lowest loss wins; of equal PD, loss
    and device-days are weighed by the compute that the planner's law asks for the difference in loss. Of those that cost as
    good as the least, shapes whose heads `per_node` devices can share come first.
    """
    check_positive(pd=pd, device_days=device_days)
    if (pd is None) == (device_days is None):
        raise UserError("a co-design needs one budget: pd or device_days")
    laws, judge, found = scaling.published_laws(), scaling.law(constants()["large"]), []
    for shape in shapes:
        each = seconds_per_token(shape)
        tokens = pd * PD_FLOP / shape.flops(1.0, mean_context) if pd is not None else (device_days or 0.0) * DAY / each
        penalty, blocks = aspect_penalty(shape), float(shape.num_hidden_layers * shape.block_parameters())
        losses = {law.name: law.loss(blocks, tokens) * (1 + penalty) for law in laws}
        worth = judge.flops_for(losses[judge.name])
        found.append((tokens * each / DAY / worth, worth, Design(shape, tokens, tokens * each / DAY, losses, penalty)))
    most = (1 + AS_GOOD) * min((cost for cost, *_ in found), default=0.0)
    found.sort(key=lambda one: (one[0] > most or one[2].shape.num_key_value_heads % per_node > 0, one[0]))
    return [replace(one, cost=cost * found[0][1]) for cost, _, one in found]


def explain(ranked: list[Design]) -> str:
    """Why the first, in words: against the deepest and the widest of them."""
    best, name = ranked[0], constants()["large"]
    parts = [f"{best}: predicted loss {best.losses[name]:.3f} after {format_count(best.tokens)} tokens"]
    by_aspect = sorted(ranked, key=lambda one: one.shape.hidden_size / one.shape.num_hidden_layers)
    for what, other in (("deepest", by_aspect[0]), ("widest", by_aspect[-1])):
        if other is not best:
            faster = other.device_days / other.tokens / (best.device_days / best.tokens) - 1
            parts.append(f"the {what}, {other}, is {format_share(abs(faster))} {'slower' if faster > 0 else 'faster'} per token, "
                         f"ends at {other.losses[name]:.3f} and costs {format_share(other.cost / best.cost - 1)} more for an "
                         "equal loss")
    return "; ".join(parts) + ". Laws of loss do not tell depth from width; a penalty of at most 3 % is for extreme aspects."


COLUMNS = ("depth", "width", "FFN", "query heads", "key heads", "parameters", "tokens", "device-days", "cost")


def table(ranked: list[Design]) -> list[list[str]]:
    """A row of text for each design, under COLUMNS and then the laws' names."""
    return [[str(one.shape.num_hidden_layers), str(one.shape.hidden_size), str(one.shape.intermediate_size),
             str(one.shape.num_attention_heads), str(one.shape.num_key_value_heads), format_count(one.shape.parameters()),
             format_count(one.tokens), f"{one.device_days:,.4g}", f"{one.cost:,.4g}",
             *(f"{loss:.3f}" for loss in one.losses.values())] for one in ranked]
