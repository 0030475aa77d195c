"""The verb `rehearse`: one JSON document or tables, a book beside the forecast, and a verdict about the accelerator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.rehearse import command
from athanor.foundation.errors import LayoutError
from athanor.ledger.book import read_book

ARGUMENTS = ["data.vocab_size=320", "--world", "2"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path))
    return tmp_path


def test_a_rehearsal_writes_its_book_and_says_what_fits(recipe_file: Path, runs: Path) -> None:
    result = CliRunner().invoke(command, [str(recipe_file), *ARGUMENTS, "cluster.accelerator=H100-80", "--json",
                                          "stage.pretrain.precision=bf16"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["fits"] and found["capacity_bytes"] == 8e10 and found["devices"] == 2 and found["layout"] == "dp_shard=2"
    book = read_book(runs / "tiny" / "pretrain" / "rehearsal.json")
    assert book.kind == "rehearsal" and book.tokens == 4 * 512 and book.peak_flops == 9.89e14 and not book.accounts
    assert sum(sizes[0] for sizes in book.memory_bytes.values()) == found["peak_bytes"] == book.rehearsed[0]["peak_bytes"]
    kinds = {(row["axis"], row["kind"]) for row in book.rehearsed[0]["collectives"]}
    assert {("shard", "all_gather"), ("shard", "reduce_scatter")} <= kinds
    per_rank = book.rehearsed[0]["flops"]["model"]
    assert per_rank * 2 * 4 == pytest.approx(book.model_flops, rel=0.01), "four steps on two ranks"


def test_people_get_tables_and_a_verdict(recipe_file: Path, runs: Path) -> None:
    result = CliRunner().invoke(command, [str(recipe_file), *ARGUMENTS], catch_exceptions=False)
    assert result.stdout == "" and "whether that fits is unknown" in result.stderr
    for word in ("parameters", "activations", "together", "all_gather", "shard", "model FLOPs of a step", "written to"):
        assert word in result.stderr, word


def test_what_does_not_fit_is_told_with_remedies(recipe_file: Path, runs: Path) -> None:
    from athanor.cluster.spec import SCHEMA, from_dict

    spec = from_dict({"schema": SCHEMA, "accelerator": "tiny", "device_type": "cpu", "devices": 2, "per_node": 2,
                      "memory_bytes": 1e5, "threads_per_device": 1, "peak_flops": {"fp32": 1e9},
                      "memory_bytes_per_second": 1e9}, "cluster.toml")
    spec.write(runs / "cluster.toml")
    result = CliRunner().invoke(command, [str(recipe_file), *ARGUMENTS, f"cluster.file={runs / 'cluster.toml'}"],
                                catch_exceptions=False)
    assert "It would not fit: rank 0 takes" in result.stderr and "Cheapest first:" in result.stderr
    assert result.stderr.count("saves about") == 3


def test_a_world_that_cannot_be_laid_out_is_refused_with_layouts_that_work(recipe_file: Path, runs: Path) -> None:
    """Of a model with two key heads and two blocks, in a stage of 16 rows a step unless more are asked for."""
    def refused(*arguments: str) -> str:
        with pytest.raises(LayoutError) as caught:
            CliRunner().invoke(command, [str(recipe_file), "data.vocab_size=320", *arguments], catch_exceptions=False)
        return str(caught.value)

    told = refused("parallel.tp=2", "--world", "7", "stage.pretrain.global_batch_tokens=3584")  # 112 rows
    assert "does not divide the 7 ranks" in told and told.endswith("; on 7 ranks these layouts work: dp_shard=7; dp_replicate=7")
    assert "does not divide the 4 ranks" in refused("parallel.tp=3", "--world", "4", "--stage", "chat")
    assert "these layouts work: dp_shard=2 tp=2" in refused("parallel.tp=3", "--world", "4", "--stage", "chat")
    (runs / "tiny").mkdir(exist_ok=True)
    (runs / "tiny" / "plan.toml").write_text("[parallel]\npp = 2\ntp = 2\ndp_shard = 1\n")
    begin = "pp 2 x dp_replicate 1 x dp_shard 1 x cp 1 x tp 2 = 4, but there are 6 ranks; pp = 2 and tp = 2 from the plan; "
    assert refused("--world", "6") == f"{begin}no layout of 6 ranks was found that works", "16 rows are not for three"
    told = refused("--world", "6", "stage.pretrain.global_batch_tokens=3072")
    assert told.startswith(f"{begin}on 6 ranks these layouts work: ") and "tp=3" not in told
