"""What went in, what was dropped and why, what is left: documents and bytes per stage, with samples to look at."""

from __future__ import annotations

import heapq
from typing import Any

from athanor.data.documents import Decision

SAMPLES = 3  # per reason, per filter and of what is kept
EXCERPT_CHARACTERS = 240
STAGES = ("read", "filter", "deduplicate")


class Funnel:
    """Counts what each stage drops. At each stage, in = kept + the sum of what was dropped."""

    def __init__(self) -> None:
        self._entered = {"documents": 0, "bytes": 0}
        self._sources: dict[str, dict[str, int]] = {}
        self._dropped: dict[str, dict[str, dict[str, int]]] = {stage: {} for stage in STAGES}
        self._by_source: dict[str, dict[str, int]] = {}
        self._samples: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def enter(self, source: str, size_bytes: int) -> None:
        """A document, or what might have been one, came in."""
        for counts in (self._entered, self._sources.setdefault(source, {"documents": 0, "bytes": 0})):
            counts["documents"] += 1
            counts["bytes"] += size_bytes

    def drop(self, stage: str, reason: str, source: str, size_bytes: int) -> None:
        counts = self._dropped[stage].setdefault(reason, {"documents": 0, "bytes": 0})
        counts["documents"] += 1
        counts["bytes"] += size_bytes
        reasons = self._by_source.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + 1

    def sample(self, kind: str, name: str, order: float, doc_id: str, facts: dict[str, Any], text: str) -> None:
        """Offer a sample: of each (kind, name) those with the smallest (order, doc_id) are shown."""
        heap = self._samples.setdefault((kind, name), [])
        entry = (_Reversed((order, doc_id)), {"doc_id": doc_id, **facts, "excerpt": text[:EXCERPT_CHARACTERS]})
        if len(heap) < SAMPLES:
            heapq.heappush(heap, entry)
        elif heap[0][0] < entry[0]:
            heapq.heapreplace(heap, entry)

    def sample_near(self, name: str, decision: Decision, doc_id: str, facts: dict[str, Any], text: str) -> None:
        """Offer what a filter kept, ordered by how little was missing; what was far from it is no sample."""
        distance = abs(decision.value - decision.threshold) / max(abs(decision.threshold), 1e-9)
        if distance < 0.75:
            self.sample("near_threshold", name, distance, doc_id,
                        {**facts, "value": decision.value, "threshold": decision.threshold}, text)

    def reasons(self, source: str) -> str:
        """Why documents of a source were dropped, as half a sentence; empty when none was."""
        reasons = sorted(self._by_source.get(source, {}).items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {reason}" for reason, count in reasons)

    def entered(self, source: str) -> dict[str, int]:
        return dict(self._sources.get(source, {"documents": 0, "bytes": 0}))

    def as_dict(self) -> dict[str, Any]:
        """`stages` in order, each with what came in, what was kept and what was dropped by reason; `samples`."""
        stages, incoming = [], dict(self._entered)
        for name in STAGES:
            dropped = {reason: dict(counts) for reason, counts in sorted(self._dropped[name].items())}
            kept = {unit: incoming[unit] - sum(counts[unit] for counts in dropped.values()) for unit in incoming}
            stages.append({"name": name, **incoming, "kept": kept, "dropped": dropped})
            incoming = dict(kept)
        samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for (kind, name), heap in sorted(self._samples.items()):
            samples.setdefault(kind, {})[name] = [facts for _, facts in sorted(heap, reverse=True)]
        return {"schema": 1, "stages": stages, "samples": samples}


class _Reversed:
    """Turns the smallest into the largest, so that a heap gives up the largest first."""

    def __init__(self, key: tuple[float, str]) -> None:
        self.key = key

    def __lt__(self, other: _Reversed) -> bool:
        return other.key < self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reversed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)
