from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from athanor.cli.plan_scaling import command
from athanor.foundation.errors import UserError
from athanor.foundation.units import PD_FLOP
from athanor.laws import scaling
from athanor.laws.fit import fit_law, read_runs
from athanor.laws.scaling import Law

TRUE = Law("own", 1.7, 400.0, 0.34, 900.0, 0.31)


def made_up(law: Law, noise: float = 0.0, unique_tokens: float = math.inf) -> dict[str, np.ndarray]:
    sizes, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(3e7, 3e9, 6), np.geomspace(3e8, 1e11, 6)))
    wobble = np.exp(noise * np.random.default_rng(1).standard_normal(sizes.size))
    loss = np.array([law.loss(n, d, unique_tokens) for n, d in zip(sizes, tokens, strict=True)]) * wobble
    return {"params": sizes, "tokens": tokens, "loss": loss}


def huber(law: Law, runs: dict[str, np.ndarray]) -> float:
    errors = [abs(math.log(law.loss(n, d) / loss)) for n, d, loss in zip(*runs.values(), strict=True)]
    return sum(e**2 / 2 if e < 1e-3 else 1e-3 * (e - 5e-4) for e in errors)


def test_laws_give_the_figures_of_their_papers() -> None:
    printed = scaling.law("chinchilla")  # worked out by hand from the printed constants
    assert printed.loss(100e9, 200e9) == pytest.approx(2.045, abs=5e-4)
    assert printed.loss(200e9, 100e9) == pytest.approx(2.090, abs=5e-4)
    size, tokens = printed.optimum(1.2e23)
    assert size == pytest.approx(15.8e9, rel=5e-3) and tokens == pytest.approx(1.26e12, rel=5e-3)
    assert printed.loss(size, tokens) == pytest.approx(1.996, abs=5e-4)
    kaplan, compute, llama = scaling.law("kaplan"), *scaling.frontiers()
    for n, d in ((100e9, 200e9), (200e9, 100e9)):  # equation 1.5 as printed
        assert kaplan.loss(n, d) == pytest.approx(((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / d) ** 0.103, rel=1e-6)
    assert compute.optimum(1389 * PD_FLOP)[0] == pytest.approx(256e9, rel=5e-3)
    size, tokens = llama.optimum(3.8e25)  # printed: 402 B parameters on 16.55 T tokens, which is more than 3.8e25 as 6 N D
    assert size == pytest.approx(402e9, rel=0.01) and tokens == pytest.approx(16.55e12, rel=0.06)
    size, tokens = scaling.law("refit").optimum(6 * 70e9 * 1.4e12)
    assert tokens / size == pytest.approx(20, rel=0.15), "Chinchilla's twenty tokens per parameter"


@pytest.mark.parametrize("name", ["refit", "chinchilla", "kaplan"])
@pytest.mark.parametrize("unique_tokens", [math.inf, 1e11])
def test_optimum_is_where_a_search_finds_it(name: str, unique_tokens: float) -> None:
    law, flops = scaling.law(name), 1e23
    tried = np.geomspace(1e9, 1e12, 20_001)
    losses = [law.loss(n, flops / 6 / n, unique_tokens) for n in tried]
    size, tokens = law.optimum(flops, unique_tokens)
    assert 6 * size * tokens == pytest.approx(flops)
    assert law.loss(size, tokens, unique_tokens) == pytest.approx(min(losses), rel=1e-7)
    assert size == pytest.approx(tried[int(np.argmin(losses))], rel=5e-3)


def test_compute_for_a_loss_undoes_the_optimum() -> None:
    for law in scaling.published_laws():
        for flops in (1e20, 1e25):
            assert law.flops_for(law.loss(*law.optimum(flops))) == pytest.approx(flops, rel=1e-6)
    assert scaling.law("refit").flops_for(1.8) == math.inf


def test_comparison_names_what_overtraining_gives_up() -> None:
    opinions = {one.name: one for one in scaling.compare(8e9, 15e12)}
    assert set(opinions) == {"refit", "chinchilla", "kaplan", "kaplan_compute", "llama3"}
    refit = opinions["refit"]
    assert refit.loss is not None and refit.optimal_loss is not None and refit.excess is not None
    assert refit.excess == pytest.approx(refit.loss - refit.optimal_loss) and refit.excess > 0.04
    assert refit.enough_flops is not None and refit.enough_flops < 6 * 8e9 * 15e12
    assert opinions["llama3"].loss is None
    claim = scaling.compare(200e9, 100e9)
    assert scaling.disagreement(claim) == pytest.approx(256 / 15.8, rel=0.01), "Kaplan's compute law against Chinchilla's"
    fewer = {one.name: one for one in scaling.compare(8e9, 15e12, unique_tokens=1e12)}
    assert fewer["refit"].loss is not None and fewer["refit"].loss > refit.loss, "repeated tokens teach less"
    assert fewer["llama3"] == opinions["llama3"], "a frontier knows fresh tokens alone"


def test_fit_recovers_a_known_law(tmp_path: Path) -> None:
    exact = fit_law(made_up(TRUE), resamples=20)
    for name in scaling.NUMBERS:
        assert getattr(exact.law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert exact.largest_error < 1e-5
    (tmp_path / "law.toml").write_text(exact.to_toml())
    read = scaling.read_laws(tmp_path / "law.toml")[0]
    assert read.loss(1e9, 1e10) == pytest.approx(TRUE.loss(1e9, 1e10), rel=1e-5)


def test_fit_is_robust_and_its_intervals_hold_the_truth() -> None:
    runs = made_up(TRUE, noise=0.003)
    clean = fit_law(runs, seed=3)
    assert clean == fit_law(runs, seed=3), "seeded"
    covered = [low <= getattr(TRUE, name) <= high for name, (low, high) in clean.intervals.items()]
    assert sum(covered) >= 3, "of five intervals of 80 %"
    best, rng = huber(clean.law, runs), np.random.default_rng(2)
    assert best <= huber(TRUE, runs), "the truth is no better a fit of noisy runs"
    for _ in range(300):
        near = {name: getattr(clean.law, name) * (1 + 0.01 * rng.standard_normal()) for name in scaling.NUMBERS}
        assert best <= huber(Law("near", **near), runs)
    runs["loss"][[3, 17]] *= 1.5  # two runs that diverged
    spoiled = fit_law(runs, resamples=2)
    assert spoiled.law.loss(70e9, 1.4e12) == pytest.approx(clean.law.loss(70e9, 1.4e12), rel=0.01)
    assert spoiled.largest_error > 0.3


@pytest.mark.parametrize("loss", [
    lambda n, d: 3.0 + 0 * n, lambda n, d: 20 * n**-0.1, lambda n, d: 9 * d**-0.05 + 1e-3 * n**0.1,
    lambda n, d: np.random.default_rng(0).uniform(1, 9, n.size)])
def test_fit_of_runs_that_follow_no_such_law_still_ends(loss: Callable[..., np.ndarray]) -> None:
    runs = made_up(TRUE)
    found = fit_law(runs | {"loss": loss(runs["params"], runs["tokens"])}, resamples=20)
    assert all(0 <= getattr(found.law, name) < math.inf for name in scaling.NUMBERS)
    assert all(0 <= low <= high < math.inf for low, high in found.intervals.values())


def test_fit_counts_repeated_tokens_less() -> None:
    runs = made_up(TRUE, unique_tokens=5e9) | {"unique_tokens": np.full(36, 5e9)}
    found = fit_law(runs, resamples=2).law
    assert found.beta == pytest.approx(TRUE.beta, rel=1e-3) and found.b == pytest.approx(TRUE.b, rel=1e-2)


@pytest.mark.parametrize(("text", "message"), [
    ("params,token,loss\n1,2,3\n", "has no column 'tokens'; it has params, token, loss, and must"),
    ("params,tokens,loss\n1e6,2e6,3\n1e6,x,3\n", "line 3, column tokens: 'x' is not a number above 0"),
    ("params,tokens,loss\n1e6,2e6,nan\n", "line 2, column loss: 'nan'"),
    ("params,tokens,loss\n1e299,2e6,3\n", "'1e299' is not a number above 0 and below 1e+30"),
    ("params,tokens,loss\n1e6,2e6,3,1\n", "line 2 has more values than there are columns"),
    ("params,tokens,tokens,loss\n1e6,2e6,2e6,3\n", "2 columns 'tokens'"),
    ("params,tokens,loss\n1e6,2e6\n", "line 2, column loss: None"),
    ("params,tokens,loss\n1e6,2e6,3\n", "1 runs cannot tell the five constants of a law; at least 6"),
    ("params,tokens,loss\n" + "1e6,2e6,3\n" * 7, "1 different params; an exponent needs at least 3"),
    ("", "has no column 'params'; it has none")])
def test_runs_that_cannot_be_fitted_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(UserError) as error:
        fit_law(read_runs(tmp_path / "runs.csv"))
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("x = ", "is not a file of laws"), ("x = 1", "has no table"), ("law = 3", "has no table"),
    ("[law]\nown = 3", "law.own.irreducible"),
    ("[law.own]\nirreducible = 1\na = -2", "law.own.a = -2; it must be a number from"),
    ("[law.own]\nirreducible = 1\na = 400\nalpha = 300", "law.own.alpha = 300; it must be a number from 0.001 to 5")])
def test_damaged_laws_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "law.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        scaling.read_laws(tmp_path / "law.toml")


def test_verb_scaling_compares_fits_and_refuses(tmp_path: Path) -> None:
    runner, runs = CliRunner(), made_up(TRUE)
    lines = [",".join(map(str, row)) for row in zip(*runs.values(), strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join([",".join(runs), *lines]))
    law = str(tmp_path / "law.toml")
    done = runner.invoke(command, ["--fit", str(tmp_path / "runs.csv"), "--out", law, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["fit"]["law"]["beta"] == pytest.approx(0.31, rel=1e-3)
    done = runner.invoke(command, ["--params", "8e9", "--pd", "1000", "--law", law, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["tokens"] == pytest.approx(1000 * PD_FLOP / 6 / 8e9) and found["pd_6nd"] == pytest.approx(1000)
    assert [one["name"] for one in found["laws"]] == ["refit", "chinchilla", "kaplan", "own", "kaplan_compute", "llama3"]
    assert set(found["sources"]) == {one["name"] for one in found["laws"]}
    done = runner.invoke(command, ["--pd", "1000", "--unique-tokens", "1e11"], catch_exceptions=False)
    assert not done.stdout and "Chinchilla, refitted" in done.stderr and "epochs of 100 B tokens" in done.stderr
    Path(law).write_text("[law.own]\nirreducible = 1\na = 1e-9\nalpha = 5\nb = 1e-9\nbeta = 5")  # at its end already
    beyond = ["--params", "8e9", "--pd", "1000", "--law", law]
    found = json.loads(runner.invoke(command, [*beyond, "--json"], catch_exceptions=False).stdout, parse_constant=pytest.fail)
    assert found["laws"][3]["enough_flops"] is None
    assert "none is enough" in runner.invoke(command, beyond, catch_exceptions=False).stderr
    for arguments, message in ((["--params", "1"], "give --params and --tokens"), (["--pd", "nan"], "pd = nan; it must be"),
                               (["--params", "1e9", "--tokens", "2e9", "--pd", "3"], "one too many"),
                               (["--params", "1e300", "--tokens", "1"], "params = 1e+300"),
                               (["--pd", "1", "--unique-tokens", "-1"], "unique tokens = -1"),
                               (["--pd", "1", "--out", law], "give the runs with --fit"),
                               (["--law", str(tmp_path / "none.toml"), "--pd", "1"], "is not a file of laws")):
        error = runner.invoke(command, arguments).exception
        assert isinstance(error, UserError) and message in str(error), arguments


def test_a_size_that_no_law_was_fitted_to_is_told() -> None:
    told = [" ".join(CliRunner().invoke(command, ["--params", size, "--tokens", tokens], catch_exceptions=False).stderr.split())
            for size, tokens in (("13", "500"), ("13B", "500B"), ("13", "1e9"))]
    assert "did you mean --params 13B --tokens 500B?" in told[0] and "None of these laws" not in told[1]
    assert "did you mean --params 13B?" in told[2]
