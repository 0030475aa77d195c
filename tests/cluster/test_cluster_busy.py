"""A machine that others kept busy while it was measured: `check` says so, cluster.toml keeps it, `plan` repeats it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cluster_spec import small_spec

from athanor.cli import check as verb
from athanor.cluster import probe
from athanor.cluster.spec import QUIET, busy_note, read_cluster
from athanor.foundation import launch


@pytest.mark.parametrize(("probed", "stepped", "kept"), [(0.97, [0.99, 0.96], 0.96), (0.97, [0.99, 0.4], 0.4),
                                                         (0.5, [0.99, 0.99], 0.5)])
def test_check_says_what_it_did_not_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                        probed: float, stepped: list[float], kept: float) -> None:
    def ranks(target: str, arguments: dict[str, Any], count: int, *, on_message: Any, **rest: Any) -> list[Any]:
        for had in stepped:
            on_message({"part": "steps", "share": 0.5, "had": 0.1})  # half-way, which proves little
            on_message({"part": "steps", "share": 1.0, "had": had})
        return [[]]

    monkeypatch.setattr(probe, "measure", lambda *arguments, **rest: replace(small_spec(), processor_share=probed))
    monkeypatch.setattr(launch, "run_ranks", ranks)
    verb.check(tmp_path / "cluster.toml")
    assert read_cluster(tmp_path / "cluster.toml").processor_share == kept
    assert ("the machine was busy when it was measured" in capsys.readouterr().err) == (kept < QUIET)


def test_the_note_has_the_share_of_the_others() -> None:
    assert busy_note(replace(small_spec(), processor_share=0.36)) == (
        "the machine was busy when it was measured: other processes had 64 % of the processor time that was wanted, so rates and "
        "forecasts may be far off; `athanor check` again when it is quiet")
    assert busy_note(small_spec()) is None and busy_note(replace(small_spec(), processor_share=0.95)) is None
