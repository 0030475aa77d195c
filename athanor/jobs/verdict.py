"""From what the ranks of a hanging stage say of themselves to a sentence: who holds up the others, and where.

What a rank says is a dump of `train/beat.py`: where its Python code stands, and its last collectives by process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOPPED = ("T", "t")  # states of a process in /proc
Dumps = Mapping[int, Mapping[str, Any]]


def judge(dumps: Dumps, silent: Mapping[int, str | None], host: Callable[[int], str | None]) -> tuple[list[int], str]:
    """Which ranks hold up the others, and a sentence about them without its subject, from what the ranks say.

    `silent` has the ranks that did not answer, with their process's state. A stopped process comes before all else, then a
    collective that some entered in place of another, then those who wait for nobody, then those who say nothing.
    """
    if stopped := sorted(rank for rank, state in silent.items() if state in STOPPED):
        return stopped, f"{_by(stopped, 'is', 'are')} stopped (SIGSTOP)"
    if (strayed := find_strayed(dumps)) is not None:
        return strayed
    missing = find_missing(dumps)
    inside = {rank for rank, dump in dumps.items() if dump["is_waiting"]}
    idle = sorted(set(dumps) - inside - {rank for found in missing for rank in found.waiting})
    if not idle and not silent and (0 < len(inside) < len(dumps) or len(dumps) == 1):
        idle = sorted(set(dumps) - inside) or sorted(dumps)  # gave their part early, and then stood still in their own code
    for found in missing:
        if ranks := [rank for rank in idle if rank in found.missing]:
            return ranks, f"never entered {found.name}; {_stand(ranks)} at {places(dumps, ranks)}"
    if idle:
        return idle, f"{_by(idle, 'goes', 'go')} no further than {places(dumps, idle)}"
    if ranks := sorted(rank for rank in silent if host(rank) is None):
        return ranks, "never began"
    if silent:
        states = ", ".join(sorted({state for state in silent.values() if state}))
        return sorted(silent), f"{_by([*silent], 'does', 'do')} not answer" + (f" (process state {states})" if states else "")
    told = []
    for rank, dump in sorted(dumps.items()):
        pending = next((found.name for found in missing if rank in found.waiting), last_pending(dump))
        told.append(f"{rank} in {pending or 'a message'} at {place(dump)}")
    return sorted(dumps), f"wait for each other: {', '.join(told)}"


@dataclass(frozen=True)
class Missing:
    """A collective that some ranks wait in and others never entered."""

    name: str
    waiting: frozenset[int]
    missing: frozenset[int]


def find_missing(dumps: Dumps) -> list[Missing]:
    """Of each group, the earliest collective that a rank waits in and not all have entered."""
    out = []
    for kind, members in _groups(dumps):
        last = {rank: max(entered, default=0) for rank, entered in members.items()}
        pending = {rank: min((number for number, (_, is_over) in entered.items() if not is_over), default=None)
                   for rank, entered in members.items()}
        numbers = sorted({number for number in pending.values() if number is not None and number > min(last.values())})
        if numbers:
            waiting = frozenset(rank for rank, number in pending.items() if number is not None and number >= numbers[0])
            missing = frozenset(rank for rank, number in last.items() if number < numbers[0])
            operation = next(entered[numbers[0]][0] for entered in members.values() if numbers[0] in entered)
            out.append(Missing(_collective(operation, numbers[0], kind), waiting, missing))
    return out


def find_strayed(dumps: Dumps) -> tuple[list[int], str] | None:
    """Ranks that entered another collective than most others of their group, or of groups of the same kind, at that point.

    Between two of which none is more frequent, that is right which has followed the same ones before.
    """
    groups = _groups(dumps)
    for kind, members in groups:
        for number in sorted(set.intersection(*(set(entered) for entered in members.values()))):
            mine = {rank: entered[number][0] for rank, entered in members.items()}
            if len(set(mine.values())) == 1:
                continue
            alike = Counter(entered[number][0] for other, others in groups if other == kind for entered in others.values()
                            if number in entered)
            (right, count), *rest = alike.most_common()
            if rest[0][1] == count:
                earlier = sorted(next(iter(members.values())).items())
                right = expected([operation for at, (operation, _) in earlier if at < number], set(mine.values())) or right
            ranks = sorted(rank for rank, operation in mine.items() if operation != right)
            others = [rank for rank in mine if rank not in ranks]
            rest_named = f"rank {others[0]}" if len(others) == 1 else "the others"
            return ranks, (f"entered {mine[ranks[0]]} as {_number(number, kind)} where {rest_named} entered {right}; "
                           f"{_stand(ranks)} at {places(dumps, ranks)}")
    return None


def expected(before: Sequence[str], choices: set[str]) -> str | None:
    """Which of `choices` has followed the longest end of a sequence when it occurred earlier in it, the last time."""
    found = [(next(k for k in range(i + 1) if k == i or before[i - 1 - k] != before[-1 - k]), i) for i in range(len(before))
             if before[i] in choices]
    return before[max(found)[1]] if found else None


def _groups(dumps: Dumps) -> list[tuple[str, dict[int, dict[int, tuple[str, bool]]]]]:
    """Of each process group its kind and, by rank and number, what each of its members that answered entered."""
    known = {(name, tuple(group["ranks"])): group["kind"] for dump in dumps.values() for name, group in dump["groups"].items()}
    return [(kind, {rank: {number: (operation, is_over) for number, operation, is_over in
                           dumps[rank]["groups"].get(name, {"entered": []})["entered"]} for rank in ranks if rank in dumps})
            for (name, ranks), kind in known.items()]


def last_pending(dump: Mapping[str, Any]) -> str | None:
    """The newest collective that a rank entered and did not leave."""
    names = [_collective(operation, number, group["kind"]) for group in dump["groups"].values()
             for number, operation, is_over in group["entered"] if not is_over]
    return names[-1] if names else None


def _number(number: int, kind: str) -> str:
    return f"#{number}" + ("" if kind in ("default_pg", "undefined", "") else f" of {kind.removeprefix('mesh_')}")


def _collective(operation: str, number: int, kind: str) -> str:
    return f"{operation} {_number(number, kind)}"


def place(dump: Mapping[str, Any]) -> str:
    """`data.py:88`, where a rank stands."""
    return "an unknown place" if dump["file"] is None else f"{Path(dump['file']).name}:{dump['line']}"


def places(dumps: Dumps, ranks: Sequence[int]) -> str:
    """Where ranks stand, each place once."""
    return " and ".join(dict.fromkeys(place(dumps[rank]) for rank in ranks))


def named(ranks: Sequence[int], host: Callable[[int], str | None]) -> str:
    """`rank 5 (node n2)` or `ranks 4 and 5 (node n2)`."""
    hosts = list(dict.fromkeys(name for rank in ranks if (name := host(rank)) is not None))
    numbers = str(ranks[0]) if len(ranks) == 1 else f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    where = f" ({'node' if len(hosts) == 1 else 'nodes'} {', '.join(hosts)})" if hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}{where}"


def _by(ranks: Sequence[int], one: str, several: str) -> str:
    return several if len(ranks) > 1 else one


def _stand(ranks: Sequence[int]) -> str:
    return _by(ranks, "it stands", "they stand")
