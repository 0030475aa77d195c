"""That the parity tests can fail: every deliberate mistake in the parallel code is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mutate import MUTANTS, ROOT, Mutant, mutate, run


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_a_mistake_has_its_place(mutant: Mutant, tmp_path: Path) -> None:
    target = tmp_path / mutant.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, target)
    mutate(mutant, tmp_path)
    assert target.read_text() != (ROOT / mutant.file).read_text()


@pytest.mark.drill
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_a_mistake_is_found(mutant: Mutant) -> None:
    is_alive, _, _ = run(mutant, mutant.layout)
    assert not is_alive, f"no parity test notices that {mutant.mistake}"


@pytest.mark.drill
@pytest.mark.parametrize("layout", sorted({mutant.layout for mutant in MUTANTS}))
def test_without_a_mistake_the_same_tests_pass(layout: str) -> None:
    is_passing, _, said = run(None, layout)
    assert is_passing, said
