"""Whether published figures of a training run agree with each other, and by which way of counting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.units import PD_FLOP, format_share
from athanor.models.shapes.products import Counted

DAY_SECONDS, MOST = 86400.0, 1e30
AGREES = 0.02  # what rounding of published figures explains
GOODPUT = (0.8, 1.02)  # kept stepping time / paid time that a run may claim; above 0.9 for Llama 3 and MegaScale (their papers)
TOKENS_PER_PARAMETER = 20.0  # Hoffmann et al. 2022: 1.4 T tokens for 70 B parameters
# FLOP per parameter and token: forward 2 and backward 4; and 2 more where every activation is computed again
COUNTS = {"6ND": ("MFU", 6.0), "8ND": ("HFU", 8.0)}
YARDSTICKS = {"GPT-3": (3640.0, "6ND; Brown et al. 2020, table D.1"), "Yuan 1.0": (4095.0, "8ND; Inspur 2023")}


@dataclass(frozen=True)
class Claims:
    """Figures of one run as published; None: not given. `pd` in petaFLOP/s-days, `efficiency` a share of the peak."""

    params: float | None = None
    tokens: float | None = None
    devices: float | None = None
    days: float | None = None
    efficiency: float | None = None
    pd: float | None = None
    peak_flops: float | None = None  # of one device
    seq_len: int | None = None
    shape: Counted | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not 1 / MOST < value < MOST:
                raise UserError(f"--{item.name.replace('_', '-')} is {value}; a number above 0 and below {MOST:g} is expected")
        if self.efficiency and self.efficiency > 1:
            raise UserError(f"--efficiency is {self.efficiency:g}; a share of the peak is expected, such as 0.45 for 45 %")

    @property
    def active(self) -> float | None:
        """Parameters that take part in each token: the model's, or those given."""
        return self.shape.active_parameters() if self.shape else self.params


@dataclass(frozen=True)
class Finding:
    """What one pair of figures comes to. `agrees` None: a figure that follows, with nothing to compare it to."""

    name: str
    sentence: str
    computed: float
    claimed: float | None = None
    agrees: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """With `difference`, claimed / computed - 1."""
        return asdict(self) | {"difference": None if self.claimed is None else self.claimed / self.computed - 1}


def compare(claims: Claims) -> list[Finding]:
    """All that can be said of the figures. Raises UserError when no two of them have to do with each other."""
    found = [finding for check in (_size, _compute, _time, _data) for finding in check(claims)]
    if not found:
        raise UserError("these figures say nothing of each other; give --model, --pd, or --params with --tokens "
                        "(and --devices, --accelerator, --days or --efficiency for the time)")
    return found


def verdict(claims: Claims, found: list[Finding]) -> str:
    """One sentence: which of the published figures agree with each other, under which convention, and which do not."""
    by, pd, days, share = {finding.name: finding for finding in found}, claims.pd, claims.days, claims.efficiency
    parts = [f"{claims.params:,.4g} parameters are {'' if size.agrees else 'not '}the model's {size.computed:,.0f}"
             for name in ("parameters", "active_parameters") if (size := by.get(name)) and size.claimed]
    if pd and "pd_6ND" in by:
        counted = [name for name in COUNTS if by[f"pd_{name}"].agrees]
        rest = (name for name in COUNTS if name not in counted)
        others = " and ".join(f"{name} would be {by[f'pd_{name}'].computed:,.0f}" for name in rest)
        parts.append(f"{pd:,.0f} PD is {counted[0]} ({others})" if counted else f"{pd:,.0f} PD is neither 6ND nor 8ND ({others})")
    if share and days and "days_6ND" in by:
        taken = {name: f"{format_share(share)} as {kind} leaves a goodput of "
                        f"{format_share(by[f'days_{name}'].computed / days)}" for name, (kind, _) in COUNTS.items()}
        likely = [name for name in COUNTS if by[f"days_{name}"].agrees]
        if likely == ["8ND"]:
            parts.append(f"{format_share(share)} is HFU with recomputation, which fits the {days:g} days ({taken['8ND']}); the "
                         f"same run's MFU is {format_share(share * 6 / 8)}, and {taken['6ND']}")
        elif likely == ["6ND"]:
            parts.append(f"{format_share(share)} is MFU, which fits the {days:g} days ({taken['6ND']}); {taken['8ND']}")
        else:
            parts.append(f"{format_share(share)} {'may be either MFU or HFU' if likely else 'fits as neither MFU nor HFU'} in "
                         f"the {days:g} days: {taken['6ND']}, and {taken['8ND']}")
    if not parts:
        return "no published figure is there twice, so none can contradict another; what follows from them is below"
    return "; ".join(parts)


def _against(name: str, what: str, claimed: float | None, computed: float, unit: str) -> Finding:
    if claimed is None:
        return Finding(name, f"{what} = {computed:,.0f}{unit}", computed)
    agrees = abs(claimed / computed - 1) <= AGREES
    return Finding(name, f"{claimed:,.0f}{unit} {'agrees with' if agrees else 'is not'} {what} = {computed:,.0f}{unit} "
                         f"({100 * (claimed / computed - 1):+.1f} %)", computed, claimed, agrees)


def _size(claims: Claims) -> Iterator[Finding]:
    if claims.shape is None:
        return
    total, active = claims.shape.parameters(), claims.shape.active_parameters()
    names = {"parameters": total} | ({"active_parameters": active} if active != total else {})
    meant = min(names, key=lambda name: abs(math.log((claims.params or total) / names[name])))
    for name, count in names.items():
        yield _against(name, f"the model's {name.replace('_', ' ')}", claims.params if name == meant else None, count, "")
    if active != total:
        yield Finding("active_share", f"each token uses {format_share(active / total, 2)} of the parameters", active / total)
    yield Finding("forward_flops_per_token", f"{2e-9 * active:,.4g} GFLOP a token forward, 2 for each parameter", 2.0 * active)
    length = claims.seq_len or 0
    for name, keys in {"causal": (length + 1) / 2, "full": length}.items() if length else ():
        ratio = (claims.shape.flops if name == "causal" else claims.shape.flops_full)(1.0, keys) / (6.0 * active)
        yield Finding(f"model_flops_{name}", f"{ratio:.3f} x 6ND with {name} attention over {length:,} tokens", ratio)


def _compute(claims: Claims) -> Iterator[Finding]:
    active, tokens, pd = claims.active, claims.tokens, claims.pd
    for name, (_, factor) in COUNTS.items():
        if active and tokens:
            yield _against(f"pd_{name}", f"{name}, {factor:g} x {active / 1e9:,.4g} B parameters x {tokens / 1e9:,.4g} B tokens",
                           pd, factor * active * tokens / PD_FLOP, " PD")
        elif pd and (known := active or tokens):
            other, left = pd * PD_FLOP / factor / known, "tokens" if active else "parameters"
            yield Finding(f"{left}_{name}", f"{pd:,.0f} PD as {name} come to {other / 1e9:,.4g} B {left}", other)
    for name, (other, source) in YARDSTICKS.items():
        if pd and pd != other:
            times = pd / other
            yield Finding(f"times {name}", f"{pd:,.0f} PD are {times:.3g} x the {other:,.0f} PD of {name} ({source})", times)


def _time(claims: Claims) -> Iterator[Finding]:
    """Days that the work takes, under each reading of the efficiency; or the share of the peak that the days leave."""
    days, efficiency = claims.days, claims.efficiency
    if efficiency:
        yield Finding("mfu_of_hfu", f"{format_share(efficiency)} HFU with everything computed again is "
                      f"{format_share(efficiency * 6 / 8)} MFU: 6 of 8 FLOP are the model's", efficiency * 6 / 8)
    if not (claims.peak_flops and claims.devices and (days or efficiency)):
        return
    work = {"pd": ("share", (claims.pd or 0.0) * PD_FLOP)}
    if claims.active and claims.tokens:
        work = {name: (kind, factor * claims.active * claims.tokens) for name, (kind, factor) in COUNTS.items()}
    for name, (kind, flops) in work.items():
        needed = flops / (claims.devices * claims.peak_flops * (efficiency or 1.0) * DAY_SECONDS)  # days
        share = needed / (days or math.inf)
        if not flops:
            continue
        if not efficiency:
            yield Finding(f"share_{name}", f"{name} in {days:g} days is {format_share(share)} of the peak, with pauses", share)
        elif not days:
            yield Finding(f"days_{name}", f"{name} at {format_share(efficiency)} of the peak takes {needed:.1f} days", needed)
        else:
            agrees = GOODPUT[0] <= share <= GOODPUT[1]
            verdict = "plausible" if agrees else "more than there was" if share > 1 else "less than runs that end well keep"
            yield Finding(f"days_{name}", f"{format_share(efficiency)} as {kind} ({name}) needs {needed:.1f} of the {days:g} days"
                          f": a goodput of {format_share(share)}, {verdict}", needed, days, agrees)


def _data(claims: Claims) -> Iterator[Finding]:
    total = claims.shape.parameters() if claims.shape else claims.params
    for name, params in {"parameter": total, "active_parameter": claims.active}.items():
        if params and claims.tokens and (name == "parameter" or params != total):
            ratio, most = claims.tokens / params, TOKENS_PER_PARAMETER
            yield Finding(f"tokens_per_{name}", f"{ratio:.3g} tokens per {name.replace('_', ' ')}; {most:g} (Hoffmann et al. 2022"
                          f") are {most * params / 1e9:,.4g} B tokens, {most / ratio:.3g} x as many", ratio)

