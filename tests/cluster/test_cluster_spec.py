from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.check import show
from athanor.cluster.probe import average_rows, disk_rates, measure, python_speed
from athanor.cluster.spec import (
    ACCELERATORS,
    ClusterSpec,
    accelerator_names,
    from_dict,
    load_accelerator,
    read_cluster,
    to_toml,
    with_devices,
)
from athanor.foundation.errors import UserError


def small_spec() -> ClusterSpec:
    return ClusterSpec(
        accelerator="Test CPU", device_type="cpu", devices=2, per_node=2, threads_per_device=1, memory_bytes=8e9,
        peak_flops={"fp32": 1e11}, memory_bytes_per_second=1e10, matmul=[["fp32", "forward", 512, 64, 64, 5e10]],
        collectives={"all_reduce": [[4096.0, 1e-4], [1048576.0, 1e-3]]}, jitter=[[0.02, 0.01]],
        overhead_seconds={"forward": 1e-6}, host="here", date="2026-01-01T00:00:00+00:00", versions={"torch": "2"})


def test_cluster_file_round_trip(tmp_path: Path) -> None:
    spec = small_spec()
    spec.write(tmp_path / "cluster.toml")
    assert read_cluster(tmp_path / "cluster.toml") == spec


def test_timed_steps_are_shown_and_read_as_the_first_schema_had_them(capsys: pytest.CaptureFixture[str]) -> None:
    alone, cut = (["fp32", 4096, 128, 320, 3, 4, 1024, 256, 1, tp, 0.5, 0.1] for tp in (1, 2))
    spec = replace(small_spec(), disk={"write_bytes_per_second": 1e8, "read_bytes_per_second": 1e8}, steps=[alone, cut],
                   python={"loops_per_second": 1e7, "text_bytes_per_second": 1e7})
    show(spec)
    told = capsys.readouterr().err
    assert "step of 1,024 tokens, 128 wide, 3 blocks, one rank" in told and "3 blocks, tp=2" in told
    raw = tomllib.loads(to_toml(spec))
    former = {**raw, "schema": 1, "steps": [[*row[:9], *row[10:]] for row in raw["steps"]]}
    assert from_dict(former, "cluster.toml") == replace(spec, steps=[alone, alone])


@pytest.mark.parametrize(("change", "words"), [
    ({"schema": 1, "steps": [["fp32", 4096]]}, ["steps", "row 1"]),
    ({"devises": 2}, ["devises", "devices"]),
    ({"schema": 99}, ["schema", "99"]),
    ({"devices": "two"}, ["devices", "whole number"]),
    ({"memory_bytes": -1.0}, ["memory_bytes", "at least 0"]),
    ({"matmul": [["fp32", "forward", 512, 64, 5e10]]}, ["matmul", "row 1", "FLOP/s"]),
    ({"peak_flops": {"fp32": float("nan")}}, ["peak_flops.fp32"]),
    ({"collectives": {"all_reduce": [[1.0]]}}, ["collectives.all_reduce", "bytes"]),
    ({"device_type": "gpu"}, ["device_type", "cpu"]),
    ({"steps": [["fp32", 4096, 64, 160, 4, 2, 1024, 256, 1, 1, 0.0, 0.0]]}, ["steps[1].s", "above 0"]),
    ({"steps": [["fp32", 4096, 64, 160, 4, 2, 1024, 0, 1, 1, 0.1, 0.0]]}, ["steps[1].seq_len", "above 0"]),
])
def test_wrong_cluster_file_is_one_sentence(change: dict[str, object], words: list[str]) -> None:
    raw = tomllib.loads(to_toml(small_spec()))
    with pytest.raises(UserError) as error:
        from_dict({**raw, **change}, "cluster.toml")
    assert all(word in str(error.value) for word in ["cluster.toml", *words]) and "\n" not in str(error.value)


def test_missing_key_and_missing_file_are_named(tmp_path: Path) -> None:
    raw = tomllib.loads(to_toml(small_spec()))
    del raw["peak_flops"]
    with pytest.raises(UserError, match="'peak_flops' is missing"):
        from_dict(raw, "cluster.toml")
    with pytest.raises(UserError, match="athanor check"):
        read_cluster(tmp_path / "none.toml")


def test_every_known_accelerator_has_a_source_for_each_number() -> None:
    files = sorted(ACCELERATORS.glob("*.toml"))
    assert files
    for file in files:
        facts = load_accelerator(file.stem)
        assert {"memory_bytes", "peak_bf16_flops"} <= set(facts), file
        for key, fact in facts.items():
            assert key == "name" or (fact["source"] and fact["value"]), (file, key)
    stems = {file.stem for file in files}
    assert not {alias for alias, stem in accelerator_names().items() if alias != stem} & stems, "an alias hides a file"


def test_accelerators_by_alias_and_nearest_name() -> None:
    assert load_accelerator("h100-sxm-80")["name"] == "H100-80"
    assert load_accelerator("A100-80")["peak_bf16_flops"]["value"] == 3.12e14
    with pytest.raises(UserError, match="did you mean 'H100-80'"):
        load_accelerator("H100-8O")


def test_fewer_devices_may_be_used_but_not_more() -> None:
    assert with_devices(small_spec(), 1) == replace(small_spec(), devices=1, per_node=1)
    with pytest.raises(UserError, match="2 were measured"):
        with_devices(small_spec(), 3)


def test_ranks_are_averaged_row_by_row() -> None:
    assert average_rows([[["a", 2.0]], [["a", 6.0]]], labels=1) == [["a", 4.0]]
    assert average_rows([[["a", 2.0]], [["a", 6.0]]], labels=1, harmonic=True) == [["a", 3.0]]


def test_host_rates_are_of_this_machine(tmp_path: Path) -> None:
    assert python_speed(0.02)["loops_per_second"] > 1e5
    assert disk_rates(tmp_path, 0.01)["write"] > 1e5
    assert not list(tmp_path.iterdir())


def test_more_devices_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this machine has"):
        measure(tmp_path, devices=100_000)


@pytest.mark.slow
def test_check_measures_two_ranks_and_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from athanor.cli import check
    from athanor.cluster import operators, probe

    monkeypatch.setattr(probe.measure, "__defaults__", (None, 1.0, None))
    monkeypatch.setattr(check, "STEPS_SECONDS", 0.4)
    result = CliRunner().invoke(check.command, ["--out", str(tmp_path / "cluster.toml"), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    spec = read_cluster(tmp_path / "cluster.toml")
    assert printed["accelerator"] == spec.accelerator and printed["devices"] == spec.devices
    rates = {tuple(row[:5]): row[5] for row in spec.matmul}
    assert all(rate <= spec.peak_flops[row[0]] * 1.001 for row, rate in rates.items()), "the peak is the best rate seen"
    assert spec.peak_flops["fp32"] > 1e8
    assert {row[1] for row in spec.elementwise} == set(operators.OPERATIONS)
    seconds = {(row[2], *row[8:10]): row[10] for row in spec.steps}
    waited = {(row[2], *row[8:10]): row[11] for row in spec.steps}
    assert seconds[256, 1, 1] > seconds[64, 1, 1] > 0 and waited[256, 1, 1] == 0.0
    if spec.devices > 1:
        for layout in ((spec.devices, 1), (1, spec.devices)):
            assert 0 < waited[128, *layout] < seconds[128, *layout]
        curve = spec.collectives["all_reduce"]
        assert curve[-1][1] > curve[0][1] > 0, "a large all-reduce takes longer than a small one"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".check")]
