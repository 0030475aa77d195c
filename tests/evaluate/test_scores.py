"""Intervals cover what they promise, and scores.json keeps what it holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from athanor.evaluate.scores import (
    MOST_ITEMS,
    Score,
    bootstrap_ratio,
    items,
    merge_scores,
    paired_difference,
    read_scores,
    share,
    unchanged,
    wilson,
)
from athanor.foundation.errors import UserError


@pytest.mark.parametrize(("successes", "count", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)])
def test_wilson_equals_published_values(successes: int, count: int, low: float, high: float) -> None:
    """The last two are examples of Newcombe (1998), method 3."""
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    for truth in (0.1, 0.5, 0.97):
        intervals = [wilson(int(k), 60) for k in generator.binomial(60, truth, 4000)]
        coverage = np.mean([low <= truth <= high for low, high in intervals])
        assert 0.92 < coverage < 0.985, (truth, coverage)


def test_wilson_refuses_what_is_no_share() -> None:
    for successes, count in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(ValueError):
            wilson(successes, count)


def test_bootstrap_covers_the_truth_and_narrows() -> None:
    generator = np.random.default_rng(1)
    widths: dict[int, float] = {}
    for count in (25, 100):
        hits, width = 0, 0.0
        for trial in range(60):
            sizes = generator.lognormal(6, 1, count)
            bits = sizes * generator.normal(2.0, 0.4, count)
            low, high = bootstrap_ratio(list(bits), list(sizes), resamples=300, seed=trial)
            hits += low <= 2.0 <= high
            width += (high - low) / 60
        widths[count] = width
        assert hits >= 48, (count, hits)
    assert widths[100] < 0.7 * widths[25]


def test_bootstrap_of_equal_items_has_no_width_and_is_repeatable() -> None:
    assert bootstrap_ratio([3.0] * 5, [2.0] * 5) == (1.5, 1.5)
    args = ([1.0, 5.0, 2.0], [3.0, 3.0, 3.0])
    assert bootstrap_ratio(*args) == bootstrap_ratio(*args)


def test_share_counts_every_item() -> None:
    score = share([1, 0, 0, 1, 0])
    assert (score.value, score.count, score.unit) == (0.4, 5, "share")
    assert score.low < 0.4 < score.high


def test_the_bootstrap_interval_is_that_of_95_per_cent() -> None:
    values = np.random.default_rng(3).normal(10, 1, 400)
    low, high = bootstrap_ratio(values.tolist(), [1.0] * 400)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.07)  # one of 90 % is 16 % narrower
    assert low < values.mean() < high


def test_scores_merge_by_model_and_task(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    assert read_scores(path) == {}
    first, second = share([1, 0]), Score(1.5, 1.4, 1.6, 7, "bits per byte", False, {"xz": 1.7})
    merge_scores(path, {"pretrain": {"identifiers": first, "bits_per_byte": first}, "chat": {"identifiers": first}})
    merge_scores(path, {"pretrain": {"bits_per_byte": second}})
    models = json.loads(path.read_text())["models"]
    assert models == read_scores(path)
    assert set(models) == {"pretrain", "chat"} and set(models["pretrain"]) == {"identifiers", "bits_per_byte"}
    assert models["pretrain"]["bits_per_byte"] == {
        "value": 1.5, "low": 1.4, "high": 1.6, "count": 7, "unit": "bits per byte", "higher_is_better": False,
        "details": {"xz": 1.7}}
    assert models["chat"]["identifiers"]["value"] == 0.5


def test_a_score_is_known_by_what_it_was_made_from(tmp_path: Path) -> None:
    path, score = tmp_path / "scores.json", Score(1.5, 1.4, 1.6, 7, "share", True, {"counts": (1, 2), 3: 0.1})
    hashes = {"pretrain": {"identifiers": "a", "python_parses": "b"}}
    assert unchanged(path, hashes) == set(), "there is no file"
    merge_scores(path, {"pretrain": {"identifiers": score}}, hashes)
    assert unchanged(path, hashes) == {("pretrain", "identifiers")}
    assert unchanged(path, {"pretrain": {"identifiers": "c"}, "chat": {"identifiers": "a"}}) == set()
    merge_scores(path, {"pretrain": {"python_parses": score}})  # nobody said from what
    assert unchanged(path, hashes) == {("pretrain", "identifiers")}
    path.write_text(path.read_text().replace("1.4", "1.3", 1))
    assert unchanged(path, hashes) == set(), "not the score that was written"


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("[1]")
    with pytest.raises(UserError, match="is not a scores"):
        merge_scores(path, {})
    assert path.read_text() == "[1]"


def test_paired_differences_cover_the_truth_and_are_narrower_than_unpaired_ones() -> None:
    """Both models find the same items hard: their difference has far less spread than either."""
    generator, hits, widths = np.random.default_rng(2), 0, []
    for trial in range(100):
        ease = generator.uniform(0, 1, 200)
        draw = generator.uniform(0, 1, 200)
        first, second = (draw < ease * 0.8).astype(float), (draw < ease * 0.9).astype(float)  # expected shares 0.4 and 0.45
        scores = [asdict(share(list(values), identity="them")) for values in (first, second)]
        found = paired_difference(*scores, resamples=400, seed=trial)
        assert found is not None and found[0] == pytest.approx(second.mean() - first.mean())
        hits += found[1] <= 0.05 <= found[2]
        widths.append(found[2] - found[1])
    assert hits >= 88 and np.mean(widths) < 0.5 * 2 * 1.96 * np.sqrt(2 * 0.4 * 0.6 / 200)


def test_ratios_are_paired_with_their_denominators() -> None:
    sizes = [10.0, 30.0, 20.0]
    scores = [asdict(Score(sum(bits) / 60, 0, 9, 3, "bits per byte", False, items("text", bits, sizes)))
              for bits in ([20.0, 60.0, 40.0], [10.0, 30.0, 20.0])]
    assert paired_difference(*scores) == (-1.0, -1.0, -1.0), "one bit less of every byte, whichever documents are drawn"


def test_only_the_same_items_are_paired() -> None:
    first, second, other = (asdict(share([0.0, 1.0, 1.0], identity=which)) for which in ("a", "a", "b"))
    assert paired_difference(first, second) == (0.0, 0.0, 0.0)
    assert paired_difference(first, other) is None and paired_difference(first, asdict(share([1.0]))) is None
    assert paired_difference(first, {"value": 1.0}) is None
    assert items("too many", [1.0] * (MOST_ITEMS + 1)) == {}
