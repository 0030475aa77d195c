"""What people are shown of two cards and of a lineage: what differs, on a screen, and sums of what is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cli.differences import MOST_KEYS, rows
from athanor.cli.models import SCREEN, command
from athanor.foundation.errors import ModelError
from athanor.foundation.run_folder import RunFolder
from athanor.registry.store import Registry, register


def call(registry: Registry, *arguments: str) -> Any:
    return CliRunner().invoke(command, [*arguments, "--registry", str(registry.root)], catch_exceptions=False)


def identity(**values: Any) -> dict[str, tuple[Any, Any]]:
    return {f"stage.identity.{key}": value for key, value in values.items()}


def test_each_difference_is_told_once_and_the_telling_ones_first() -> None:
    found = rows({"code.commit": ("a" * 40, "b" * 40), "created": ("1", "2"), "version": ("x", "y"),
                  "recipe.stage.pretrain.learning_rate": (0.1, 0.2), "stage.stage.pretrain.learning_rate": (0.1, 0.2),
                  **identity(learning_rate=(0.1, 0.2)), "scores.bits_per_byte.value": (1.23456789, 1.5),
                  "scores.bits_per_byte.details.examples.0.answer": ("long\n\n\ntext", "other"),
                  "book.accounts.kernel": (1.0, 2.0), "steps": (1, 2), **identity(steps=(1, 2))})
    assert found == [("learning_rate", "0.1", "0.2"), ("steps", "1", "2"), ("scores.bits_per_byte", "1.23457", "1.5"),
                     ("code.commit", "a" * 12, "b" * 12)]


def test_weights_come_first_and_changed_conversations_are_told() -> None:
    hashes, changed = ("a" * 64, "b" * 64), {"hash.rows": ("c" * 64, "d" * 64)}
    told = rows({"hashes.weights": hashes, "architecture": ("x", "y"), "tokens": (1, 2), **identity(**changed)})
    assert told == [("weights", "a" * 12, "b" * 12), ("architecture", "x", "y"), ("conversations", "c" * 12, "d" * 12),
                    ("tokens", "1", "2")]
    for key in ("data", "seq_len", "seed"):  # other rows of the same conversations, perhaps
        assert rows(identity(**changed, **{key: (1, 2)})) == [(key, "1", "2")]


def test_what_verify_and_export_say_can_be_followed(registry: Registry, model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("hf/mx")
    assert f"{source} is in {tmp_path / 'out'}" in call(registry, "export", str(source), str(tmp_path / "out")).stderr
    card = registry.import_folder(source, "m")
    assert f"{card.reference} is in {tmp_path / 'b'}" in call(registry, "export", "m", str(tmp_path / "b")).stderr
    (registry.folder(card) / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json has other bytes .*; `athanor models import FOLDER --name m`, of"):
        call(registry, "verify", "m")
    assert call(registry, "import", str(source), "--name", "m").exit_code == call(registry, "verify", "m").exit_code == 0
    manifest = registry.root / card.reference / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokens": 1e12}))
    with pytest.raises(ModelError, match=r"changed after it was written$"):  # which an import does not mend
        call(registry, "verify", "m")


def test_a_table_that_one_side_lacks_is_a_row() -> None:
    stage = {f"recipe.stage.chat.key_{number}": (number, None) for number in range(9)}
    assert rows(stage) == [("recipe.stage.chat", "9 values", "-")]
    few = {f"recipe.stage.chat.key_{number}": (number, None) for number in range(MOST_KEYS)}
    assert len(rows(few)) == MOST_KEYS
    assert rows(identity(**{f"key_{number}": (None, number) for number in range(40)})) == [("stage.identity", "-", "40 values")]
    both = identity(**{f"key_{number}": (1, number) for number in range(40)})
    assert len(rows(both)) == 40, "what two stages were trained with is never left out"


def test_the_verb_fits_a_screen_and_json_has_all(run: RunFolder, registry: Registry) -> None:
    for name, sign in (("pretrain", 1), ("chat", 2)):
        lines = "".join(f"key_{number} = {sign * number + 1}\n" for number in range(100))
        run.stage(name).config.write_text(f'[stage]\nname = "x"\n[identity]\n{lines}')
        register(run.root, name, registry.root)
    people = call(registry, "diff", "tiny-pretrain", "tiny-chat").stderr
    assert len(people.splitlines()) <= SCREEN and "more differ; --json has all" in people
    everything = json.loads(call(registry, "diff", "tiny-pretrain", "tiny-chat", "--json").stdout)["differences"]
    assert "stage.identity.key_99" in everything and "created" in everything
    assert "the cards are the same" in call(registry, "diff", "tiny-chat", "tiny-chat").stderr


def test_sums_are_of_what_is_known(run: RunFolder, registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(run.stage("pretrain").model, tmp_path / "elsewhere")
    given = registry.import_folder(tmp_path / "elsewhere", "given")
    run.recipe.write_text(run.recipe.read_text().replace('start_from = "pretrain"', f'start_from = "{tmp_path / "elsewhere"}"'))
    register(run.root, "chat", registry.root)
    tree = registry.lineage("tiny-chat")
    assert tree["cost"]["device_hours"] is None and tree["known_cost"]["device_hours"] == 0.5
    assert tree["unknown"]["device_hours"] == [given.reference]
    told = call(registry, "lineage", "tiny-chat").stderr
    assert f"device-hours at least 0.5 (not known of {given.reference})" in told and "money at least 1.50" in told
    assert "nobody knows energy" in told and " -," not in told


@pytest.mark.parametrize("is_known", [True, False])
def test_whole_sums_are_plain(run: RunFolder, registry: Registry, is_known: bool) -> None:
    for name in ("pretrain", "chat") if is_known else ("chat",):
        register(run.root, name, registry.root)
    told = call(registry, "lineage", "tiny-chat").stderr
    assert ("device-hours 1;" in told) == is_known
    assert ("device-hours at least 0.5 (not known of tiny-pretrain@" in told) != is_known
