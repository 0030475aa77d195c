"""The verb `data`: one JSON document on standard output, sentences on errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.data import command
from athanor.foundation.errors import DataError

RECIPE = """
name = "tiny"
[data]
evaluation_share = 0.2
[[data.source]]
name = "json"
kind = "python"
path = "{path}"
[[stage]]
name = "pretrain"
"""


def invoke(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout) if "--json" in arguments else {"people": result.stderr}


def test_build_takes_overrides_and_the_plan(tmp_path: Path, small_sources: list[dict[str, object]],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(path=Path(str(small_sources[0]["path"])).with_name("json")))
    built = invoke("build", recipe, "data.vocab_size=400", "--json")
    assert built["vocab_size"] == 400 and Path(str(built["folder"])) == tmp_path / "runs" / "tiny" / "data"
    (tmp_path / "runs" / "tiny" / "plan.toml").write_text("[data]\nvocab_size = 500\n")
    assert invoke("build", recipe, "--json", "--out", tmp_path / "other")["vocab_size"] == 500
    assert "500" in str(invoke("build", recipe)["people"])
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())["vocab_size"] == 500


def test_inspect_and_trace(data_folder: Path, tmp_path: Path) -> None:
    shown = invoke("inspect", data_folder, "--json")
    assert shown["damaged"] == [] and set(shown) == {"manifest", "funnel", "damaged"}
    found = invoke("trace", data_folder, 100, "--source", "email", "--json")
    assert found["document"]["uri"].endswith(".py")  # type: ignore[index]
    shutil.copytree(data_folder, tmp_path / "data")
    (tmp_path / "data" / "evaluation.bin").write_bytes(b"")
    result = CliRunner().invoke(command, ["inspect", str(tmp_path / "data"), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["damaged"] == ["evaluation.bin"]
    with pytest.raises(DataError, match="is not a data folder"):
        CliRunner().invoke(command, ["trace", str(tmp_path), "1"], catch_exceptions=False)
