"""Every figure of published runs that arithmetic can check, under the convention it was counted with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cli.plan import command
from athanor.cluster.spec import load_accelerator
from athanor.foundation.errors import AthanorError, UserError
from athanor.foundation.units import PD_FLOP
from athanor.laws.claims import Claims, Finding, compare, verdict
from athanor.models.shapes.find import find_shape

A100 = 312e12


def found(model: str | None = None, **figures: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in compare(Claims(shape=find_shape(model) if model else None, **figures))}


def test_yuan_1_reports_hfu_and_counts_8nd() -> None:
    run = found(params=245.7e9, tokens=180e9, devices=2128, peak_flops=A100, days=15, efficiency=0.45, pd=4095)
    assert run["pd_8ND"].computed == pytest.approx(4095, rel=1e-4) and run["pd_8ND"].agrees is True
    assert run["pd_6ND"].computed == pytest.approx(3071, rel=2e-4) and run["pd_6ND"].agrees is False
    assert run["days_8ND"].agrees is True and run["days_6ND"].agrees is False
    assert run["days_8ND"].computed / 15 == pytest.approx(8 * 245.7e9 * 180e9 / (0.45 * 2128 * A100 * 15 * 86400))
    assert run["mfu_of_hfu"].computed == pytest.approx(0.3375)
    for words in ("HFU", "91.4 %", "13.7 of the 15"):
        assert words in run["days_8ND"].sentence
    assert "4,095 PD agrees with 8ND" in run["pd_8ND"].sentence and "3,071 PD (+33.3 %)" in run["pd_6ND"].sentence
    named = found(model="yuan-1.0", params=245.7e9, tokens=180e9)
    assert named["parameters"].agrees is True and named["parameters"].computed == pytest.approx(245.73e9, rel=1e-4)
    assert named["pd_6ND"].computed == pytest.approx(3072, abs=0.5)
    assert named["pd_8ND"].computed == pytest.approx(4095.5, abs=0.5)


def test_days_follow_from_efficiency_and_efficiency_from_days() -> None:
    assert found(pd=4095, devices=2128, peak_flops=A100, efficiency=0.448)["days_pd"].computed == pytest.approx(13.8, abs=0.06)
    # 26,158 steps of 46.20 s
    pure = found(params=245.7e9, tokens=180e9, devices=2128, peak_flops=A100, days=26158 * 46.20 / 86400)
    assert pure["share_8ND"].computed == pytest.approx(0.44, abs=2e-3)
    assert pure["share_6ND"].computed == pytest.approx(0.331, abs=1e-3)
    # 25,000 A100 for 90 to 100 days at an MFU of 32 to 36 %
    assert 0.32 < found(pd=248842, devices=25000, peak_flops=A100, days=95)["share_pd"].computed < 0.36
    assert found(efficiency=0.535)["mfu_of_hfu"].computed == pytest.approx(0.401, abs=1e-3)


@pytest.mark.parametrize(("efficiency", "words"), [(0.3, "more than there was"), (0.95, "less than runs that end well keep")])
def test_a_goodput_that_cannot_be_is_said(efficiency: float, words: str) -> None:
    reading = found(params=245.7e9, tokens=180e9, devices=2128, peak_flops=A100, days=15, efficiency=efficiency)["days_8ND"]
    assert reading.agrees is False and words in reading.sentence


def test_gpt_3_counts_6nd() -> None:
    run = found(params=174.6e9, tokens=300e9, pd=3640)
    assert run["pd_6ND"].agrees is True and run["pd_8ND"].agrees is False
    assert found(pd=3640, params=174.6e9)["tokens_6ND"].computed == pytest.approx(300e9, rel=1e-3)
    assert found(pd=3640, tokens=300e9)["parameters_6ND"].computed == pytest.approx(174.6e9, rel=2e-3)
    assert run["tokens_per_parameter"].computed == pytest.approx(1.72, abs=0.01)
    assert "11.6 x as many" in run["tokens_per_parameter"].sentence


def test_gpt_4_is_68_times_gpt_3() -> None:
    run = found(pd=248842)
    assert run["times GPT-3"].computed == pytest.approx(68.4, abs=0.05)
    assert run["times Yuan 1.0"].computed == pytest.approx(60.8, abs=0.05)
    assert run["times GPT-3"].computed * 3640 * PD_FLOP == pytest.approx(2.15e25, rel=1e-5)
    assert 248842 / found(params=245.7e9, tokens=180e9)["pd_6ND"].computed == pytest.approx(81, abs=0.1)


@pytest.mark.parametrize(("params", "tokens", "ratio"), [
    (70e9, 1.4e12, 20.0), (175e9, 300e9, 1.71), (245.7e9, 180e9, 0.73), (102.6e9, 288e9, 2.8)])
def test_tokens_per_parameter(params: float, tokens: float, ratio: float) -> None:
    assert found(params=params, tokens=tokens)["tokens_per_parameter"].computed == pytest.approx(ratio, rel=5e-3)


def test_twice_the_model_on_half_the_tokens_costs_the_same() -> None:
    large, long = found(params=200e9, tokens=100e9), found(params=100e9, tokens=200e9)
    assert large["pd_6ND"].computed == long["pd_6ND"].computed == pytest.approx(1389, abs=0.5)


def test_m32_uses_a_tenth_of_itself() -> None:
    run = found(model="yuan2-m32", tokens=2e12, params=40e9, seq_len=4096)
    assert run["parameters"].agrees is True and run["active_parameters"].claimed is None
    assert run["active_share"].computed == pytest.approx(3.7 / 40, rel=3e-3)  # printed as 9.25 %
    assert run["forward_flops_per_token"].computed == pytest.approx(7.4e9, rel=2e-3)
    assert found(model="llama-3-70b")["forward_flops_per_token"].computed / run["forward_flops_per_token"].computed == (
        pytest.approx(19, abs=0.1))  # "1/19 of Llama-3-70B"
    assert run["tokens_per_parameter"].computed == pytest.approx(50, rel=3e-3)
    assert run["tokens_per_active_parameter"].computed == pytest.approx(540, rel=1e-3)
    assert run["pd_6ND"].computed == pytest.approx(6 * 3.704e9 * 2e12 / 8.64e19, rel=1e-4)
    shape = find_shape("yuan2-m32")
    assert run["model_flops_causal"].computed == pytest.approx(shape.flops(1, 2048.5) / 6 / 3.704e9, rel=1e-4)
    assert run["model_flops_causal"].computed < run["model_flops_full"].computed
    assert found(model="yuan2-m32", params=3.7e9)["active_parameters"].agrees is True


YUAN = {"params": 245.7e9, "tokens": 180e9, "devices": 2128, "peak_flops": A100, "days": 15}


@pytest.mark.parametrize(("figures", "words"), [
    (YUAN | {"efficiency": 0.45, "pd": 4095}, ["4,095 PD is 8ND (6ND would be 3,071)", "45.0 % is HFU with recomputation",
                                                "MFU is 33.8 %", "fits the 15 days"]),
    (YUAN | {"efficiency": 0.338, "pd": 3071}, ["3,071 PD is 6ND (8ND would be 4,095)", "33.8 % is MFU"]),
    (YUAN | {"efficiency": 0.9, "pd": 5000}, ["5,000 PD is neither 6ND nor 8ND (6ND would be 3,071 and 8ND would be 4,095)",
                                              "fits as neither MFU nor HFU"]),
    ({"params": 175e9, "tokens": 300e9, "pd": 3640}, ["3,640 PD is 6ND"]),
    ({"pd": 248842}, ["no published figure is there twice"]),
    ({"model": "llama-3-8b", "params": 9e9}, ["9e+09 parameters are not the model's 8,030,261,248"])])
def test_the_verdict_says_which_figures_agree_and_how(figures: dict[str, Any], words: list[str]) -> None:
    """Yuan 1.0 (arXiv:2110.04725): 4,095 PD counts recomputation, and so does its 45 %."""
    shape = find_shape(figures.pop("model")) if "model" in figures else None
    claims = Claims(shape=shape, **figures)
    said = verdict(claims, compare(claims))
    assert all(word in said for word in words), said


def test_the_command_prints_sentences_or_one_document(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["claims", "--params", "245.7e9", "--tokens", "180e9", "--devices", "2128", "--accelerator", "A100-80",
                 "--days", "15", "--efficiency", "0.45", "--pd", "4095"]
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    findings = {finding["name"]: finding for finding in printed["findings"]}
    assert printed["verdict"].startswith("4,095 PD is 8ND")
    assert {name: findings[name]["agrees"] for name in ("pd_6ND", "pd_8ND", "days_6ND", "days_8ND")} == {
        "pd_6ND": False, "pd_8ND": True, "days_6ND": False, "days_8ND": True}
    assert findings["pd_6ND"]["difference"] == pytest.approx(1 / 3, rel=1e-3)
    assert load_accelerator("A100-80")["peak_bf16_flops"]["value"] == A100
    said = CliRunner().invoke(command, arguments)
    assert said.stdout == "" and said.stderr.startswith("4,095 PD is 8ND")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--days", "3"], "say nothing of each other"), (["--efficiency", "45"], "0.45"), (["--params", "nan"], "--params is nan"),
    (["--seq-len", "-3", "--model", "gpt2"], "--seq-len is -3"), (["--accelerator", "A100-8"], "did you mean 'A100-80'"),
    (["--model", "llama-3-9b"], "did you mean 'llama-3-8b'"), (["--devices", "inf", "--pd", "3"], "--devices is inf"),
    (["--params", "1e300", "--tokens", "1e300"], "below 1e")])
def test_figures_that_cannot_be_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(command, ["claims", *arguments], catch_exceptions=False)


def test_a_recipe_needs_no_subcommand() -> None:
    for arguments in (["no/such.toml"], ["recipe", "no/such.toml"], ["--json", "no/such.toml"], ["no/such.toml", "seed=1"]):
        with pytest.raises(AthanorError, match=r"no/such\.toml does not exist"):
            CliRunner().invoke(command, arguments, catch_exceptions=False)
    wrong = CliRunner().invoke(command, ["clams", "--pd", "3"])
    assert wrong.exit_code == 2 and "did you mean 'claims'" in wrong.stderr
    listed = CliRunner().invoke(command, ["--help"]).stdout
    assert "claims" in listed and "recipe" in listed
