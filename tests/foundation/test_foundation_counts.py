"""Counts are read as they are printed and as people write them, in recipes, overrides and options alike."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from athanor.cli.counts import COUNT, INDEX, POSITIVE, WHOLE, Counted
from athanor.cli.plan_claims import command as claims
from athanor.cli.plan_estimate import command as estimate
from athanor.foundation.errors import RecipeError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.units import format_count, read_count

STDLIB = Path(__file__).parents[2] / "recipes" / "stdlib.toml"


@pytest.mark.parametrize(("text", "value"), [
    ("950", 950), ("1e6", 10**6), ("2.5B", 2_500_000_000), ("15T", 15 * 10**12), ("15t", 15 * 10**12), ("180e9", 180 * 10**9),
    ("245.7 B", 245_700_000_000), ("8,388,608", 8_388_608), ("4096", 4096), ("12.3 k", 12_300), ("1_000", 1000), (" 7 ", 7),
    ("1.5", 1.5), ("-1", -1)])
def test_counts(text: str, value: float) -> None:
    found = read_count(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["", ".", "B", "15TB", "1,00", "1.2.3", "1e", "1e999999999", "nan", "inf", "0x10", "1 2",
                                  "1e31"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 4096, 1e6, 2\.5B or 15T"):
        read_count(text)


@given(st.floats(min_value=1, max_value=1e15))
def test_what_is_printed_is_read(count: float) -> None:
    assert read_count(format_count(count)) == pytest.approx(count, rel=0.006, abs=0.5)  # printed to three digits


def test_in_recipes_and_overrides(tmp_path: Path) -> None:
    text = STDLIB.read_text().replace("minutes = 4 ", 'tokens = "15T" ').replace("vocab_size = 4096", 'vocab_size = "32k"')
    (tmp_path / "a.toml").write_text(text)
    recipe = load_recipe(tmp_path / "a.toml", ["stage.pretrain.global_batch_tokens=4M", "stage.chat.steps=1e3",
                                               "stage.chat.seq_len=1,024", "evaluate.limit=2k"])
    assert recipe.budget.tokens == 15e12 and recipe.data.vocab_size == 32_000
    pretrain, chat = recipe.stage
    assert (pretrain.global_batch_tokens, chat.steps, chat.seq_len, recipe.evaluate.limit) == (4_000_000, 1000, 1024, 2000)
    for override in ("stage.chat.steps=1.5", "stage.chat.steps=15X", "budget.tokens=lots", "evaluate.limit=0.5k2"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / "a.toml", [override])
        assert override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_on_the_command_line() -> None:
    printed = [CliRunner().invoke(claims, ["--params", params, "--tokens", tokens, "--devices", devices, "--json"])
               for params, tokens, devices in (("245.7B", "180B", "2,128"), ("245.7e9", "1.8e11", "2128"))]
    assert printed[0].exit_code == 0 and printed[0].stdout == printed[1].stdout
    found = CliRunner().invoke(estimate, ["--model", "llama-3-8b", "--cluster", "H100-80 devices=64", "--json", "--layout",
                                          "dp_shard=-1 seq_len=8192 global_batch_tokens=4,194,304"])
    assert json.loads(found.stdout)["layout"]["global_batch_tokens"] == 4_194_304
    wrong = CliRunner().invoke(claims, ["--params", "12X"])
    assert wrong.exit_code == 2 and "'12X': a number such as 4096" in wrong.output


@pytest.mark.parametrize(("kind", "text", "found"), [
    (COUNT, "2.5B", 2.5e9), (COUNT, "1e300", 1e300), (WHOLE, "4M", 4_000_000), (WHOLE, "-3", -3), (POSITIVE, "2k", 2000),
    (INDEX, "0", 0), (WHOLE, "1.5", None), (WHOLE, "nan", None), (WHOLE, "inf", None), (POSITIVE, "0", None), (INDEX, "-1", None),
    (COUNT, "many", None)])
def test_options(kind: Counted, text: str, found: float | None) -> None:
    if found is None:
        with pytest.raises(click.BadParameter, match=r"number .*is expected"):
            kind.convert(text, None, None)
    else:
        value = kind.convert(text, None, None)
        assert value == found and isinstance(value, float if kind is COUNT else int)
