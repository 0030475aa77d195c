"""The half-sentence about names that are allowed."""

from __future__ import annotations

import pytest

from athanor.foundation.errors import did_you_mean

MANY = [f"name-{number:02}" for number in range(30)]


@pytest.mark.parametrize(("name", "allowed", "said"), [
    ("tain", ["train", "plan"], "did you mean 'train'? allowed: plan, train"),
    ("xyz", ["train", "plan"], "allowed: plan, train"),
    ("name-7", MANY, "did you mean 'name-"),
    ("H100", ["H100-96", "H100-80", "H20-96"], "did you mean 'H100-80'?"),  # the first of two as close
    ("H200", ["GH200", "H100", "H200-141"], "did you mean 'H200-141'?"),
    ("fp16", ["fp64", "fp32", "bf16", "fp8"], "did you mean 'bf16'?"),
    ("zzz", MANY, "allowed: name-00, name-01, name-02, name-03, name-04, name-05 and 24 more")])
def test_whoever_is_refused_learns_what_is_allowed(name: str, allowed: list[str], said: str) -> None:
    assert did_you_mean(name, allowed).startswith(said)
