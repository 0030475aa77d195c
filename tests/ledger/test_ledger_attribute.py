from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from athanor.foundation import intervals
from athanor.foundation.intervals import Interval, Recorder, activate, interval
from athanor.ledger.attribute import RankWindow, attribute, condense


def row(name: str, start: float, end: float, depth: int = 0, group: str | None = None,
        arrived: float | None = None) -> Interval:
    return Interval(name, start, end, depth, group, start if arrived is None else arrived)


def test_each_moment_belongs_to_the_innermost_interval() -> None:
    rows = [row("input", 0, 1), row("metering", 2, 3, 2), row("data_parallel", 2, 5, 1, "all"), row("compute", 1, 9),
            row("optimizer", 9, 10)]
    window = condense(rows)
    assert window.seconds == {"input": 1, "metering": 1, "compute": 5, "optimizer": 1}
    assert window.waits == {("data_parallel", "all"): [(2, 2, 5)]}


def test_siblings_and_depths_do_not_leak_into_later_parents() -> None:
    rows = [row("metering", 1, 2, 1), row("compute", 0, 4), row("optimizer", 5, 7),
            row("metering", 8, 9, 1), row("compute", 7, 10)]
    assert condense(rows).seconds == {"metering": 2, "compute": 5, "optimizer": 2}


def test_waiting_for_a_late_rank_is_skew_and_only_the_rest_is_communication() -> None:
    punctual = condense([row("data_parallel", 1.0, 4.0, 1, "all"), row("compute", 0.0, 5.0)])
    late = condense([row("data_parallel", 3.0, 4.0, 1, "all"), row("compute", 0.0, 5.0)])
    accounts = attribute([punctual, late])
    # rank 0 waits 2 s for rank 1, which computed 2 s longer than its peer; both transfer for 1 s
    assert accounts == pytest.approx({"skew": 4.0, "data_parallel": 2.0, "compute": 4.0})
    assert sum(accounts.values()) == pytest.approx(10.0)


def test_an_asynchronous_collective_counts_from_its_issue() -> None:
    early = condense([row("data_parallel", 5.0, 6.0, 0, "all", arrived=1.0)])
    late = condense([row("data_parallel", 5.0, 6.0, 0, "all", arrived=5.5)])
    assert attribute([early, late]) == pytest.approx({"skew": 1.0, "data_parallel": 1.0})


def test_ranks_with_unequal_work_are_not_peers() -> None:
    windows = [condense([row("compute", 0, 1)]), condense([row("compute", 0, 3)])]
    assert attribute(windows, peers=[[0], [1]]) == {"compute": 4}
    assert attribute(windows) == {"compute": 2, "skew": 2}


def test_windows_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="group all waited"):
        attribute([condense([row("tensor", 0, 1, 0, "all")] * 1), condense([row("tensor", 0, 1, 0, "all")] * 2)])


def test_recorded_intervals_cover_what_was_spent_and_nothing_is_recorded_without_a_recorder(
        monkeypatch: pytest.MonkeyPatch) -> None:
    now, recorder = 5.0, Recorder()
    monkeypatch.setattr(intervals, "time", SimpleNamespace(perf_counter=lambda: now))
    activate(recorder)
    try:
        with interval("compute"):
            now += 0.02
            with interval("data_parallel", "all"):
                now += 0.03
    finally:
        activate(None)
    with interval("compute"):
        pass
    window = condense(recorder.rows)
    assert window.seconds["compute"] == pytest.approx(0.02)
    ((arrived, start, end),) = window.waits["data_parallel", "all"]
    assert arrived == start and end - start == pytest.approx(0.03)


def test_nothing_is_lost_or_counted_twice_in_random_nests() -> None:
    import random

    chance = random.Random(3)
    rows: list[Interval] = []
    clock = itertools.count()

    def nest(depth: int) -> None:
        start = next(clock)
        for _ in range(chance.randrange(0, 3) if depth < 5 else 0):
            nest(depth + 1)
        rows.append(row(chance.choice("abc"), start, next(clock), depth))

    for _ in range(20):
        nest(0)
    assert sum(condense(rows).seconds.values()) == sum(r.end - r.start for r in rows if r.depth == 0)


def test_waiting_is_for_the_own_chain_first_and_for_others_then() -> None:
    """Two stages of two ranks meet: waiting for the other stage of one's own chain is bubble, for another chain skew."""
    arrivals = [0.0, 5.0, 2.0, 1.0]  # ranks 0 and 2 are a chain, 1 and 3 the other
    windows = [RankWindow(waits={("data_parallel", "world"): [(at, at, 6.0)]}) for at in arrivals]
    found = attribute(windows, [[0, 1], [2, 3]])
    # rank 0 waits 2 s for rank 2 and 3 s for rank 1; rank 2 waits 3 s for rank 1; rank 3 waits 4 s for rank 1, its own chain
    assert found == {"bubble": pytest.approx(6.0), "skew": pytest.approx(6.0), "data_parallel": pytest.approx(4.0)}
    assert attribute(windows) == {"skew": pytest.approx(12.0), "data_parallel": pytest.approx(4.0)}
