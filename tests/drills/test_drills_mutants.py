"""That the parity tests can fail: every deliberate mistake in the parallel code is found."""

from __future__ import annotations

import pytest
from mutate import MUTANTS, run

pytestmark = pytest.mark.drill


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_a_mistake_is_found(mutant: object) -> None:
    is_alive, _, _ = run(mutant, mutant.layout)  # type: ignore[attr-defined, arg-type]
    assert not is_alive, f"no parity test notices that {mutant.mistake}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", sorted({mutant.layout for mutant in MUTANTS}))
def test_without_a_mistake_the_same_tests_pass(layout: str) -> None:
    is_passing, _, said = run(None, layout)
    assert is_passing, said
