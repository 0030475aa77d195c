"""What to change in a layout that runs out of memory: its neighbours that fit, priced like it, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor.cost.memory import GIB
from athanor.foundation.errors import LayoutError
from athanor.foundation.remedy import Remedy
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.estimate import RECOMPUTE, estimate

MOST_ODDS = 0.1  # of running out of memory that are accepted, as in a search
MOST_CHANGES, KEPT, SHOWN = 3, 12, 3  # choices changed at once; layouts that a next change is tried on; remedies told
Words = dict[str, Any]


def remedies(shape: DecoderShape, cluster: str, found: dict[str, Any], file: Path | None = None) -> list[Remedy]:
    """The cheapest changes of an estimate's layout that fit, on as many devices and with the same global batch.

    Of one choice where one is enough, else of two, else of three; none when the layout fits already, or nothing helps.
    """
    if found["out_of_memory_probability"] <= MOST_ODDS:
        return []
    first = {key: value for key, value in found["layout"].items() if key != "num_microbatches"}  # which follow the batch
    peak, edge, seen = max(found["memory_gib"]), [first], {_line(first)}
    for _ in range(MOST_CHANGES):
        fitting, beyond = list[Remedy](), list[tuple[float, Words]]()
        for layout in (near for known in edge for near in _neighbours(known)):
            line = _line(layout)
            if line in seen:
                continue
            seen.add(line)
            try:
                tried = estimate(shape, cluster, line, file)
            except LayoutError:  # these degrees or this batch do not divide
                continue
            memory = max(tried["memory_gib"])
            beyond.append((memory, layout))
            if tried["out_of_memory_probability"] <= MOST_ODDS:
                changes = tuple(f"{key}={value}" for key, value in layout.items() if first.get(key) != value)
                fitting.append(Remedy(changes, (peak - memory) * GIB, tried["step_seconds"] / found["step_seconds"] - 1))
        if fitting:
            return sorted(fitting, key=lambda each: each.costs)[:SHOWN]
        edge = [layout for memory, layout in sorted(beyond, key=lambda one: one[0])[:KEPT] if memory < peak]
    return []


def _line(layout: Words) -> str:
    return " ".join(f"{key}={','.join(map(str, value)) if key == 'split' else value}" for key, value in layout.items())


def _neighbours(layout: Words) -> Iterator[Words]:
    """One choice changed, with what must follow it; not all are legal."""
    yield from (layout | {"recompute": name} for name in RECOMPUTE if RECOMPUTE[name] > RECOMPUTE[layout["recompute"]])
    if layout["micro_batch_size"] > 1:
        yield layout | {"micro_batch_size": layout["micro_batch_size"] // 2}
    if layout["tp"] > 1 and not layout["sequence_parallel"]:
        yield layout | {"sequence_parallel": 1}
    if layout["dp_shard"] * layout["cp"] > 1:
        yield from (layout | {"zero": zero} for zero in range(layout["zero"] + 1, 4))
    if layout["dp_replicate"] > 1:
        wide = layout["dp_shard"] * layout["dp_replicate"]
        yield from (layout | {"dp_replicate": 1, "dp_shard": wide, "zero": zero} for zero in range(max(1, layout["zero"]), 4))
    yield layout | {"ep": 2 * layout["ep"]}
    for given in ("dp_shard", "dp_replicate"):
        if layout[given] % 2 == 0:
            fewer = layout | {given: layout[given] // 2}
            yield from (fewer | {axis: 2 * layout[axis]} for axis in ("tp", "cp"))
            yield fewer | {"tp": 2 * layout["tp"], "sequence_parallel": 1}
            yield _deeper(fewer)


def _deeper(layout: Words) -> Words:
    """Twice the pipeline's ranks, with half the stages on each, cut anew."""
    loops = max(1, layout["stages_per_rank"] // 2)
    kept = {key: value for key, value in layout.items() if key != "split"}
    return kept | {"pp": 2 * layout["pp"], "stages_per_rank": loops,
                   "pipeline_schedule": layout["pipeline_schedule"] if layout["stages_per_rank"] == loops else
                   "Interleaved1F1B" if loops > 1 else "1F1B"}
