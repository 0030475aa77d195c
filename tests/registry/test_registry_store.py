"""Versions by content, whole or not at all; a flipped byte is found; the index can always be built again."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import DiskError, ModelError, UserError
from athanor.foundation.run_folder import hash_folder
from athanor.registry.manifest import read_manifest
from athanor.registry.store import Registry, card_of, copy_model, diff

MakeModel = Callable[..., Path]


def test_same_content_is_one_version(registry: Registry, model: MakeModel) -> None:
    first = registry.import_folder(model("a"), "m")
    before = hash_folder(registry.root / first.reference)
    again = registry.import_folder(model("b"), "m")
    other = registry.import_folder(model("c", seed=1), "m")
    assert first.version == again.version != other.version
    assert (first.created, first.origin) == (again.created, again.origin)
    assert hash_folder(registry.root / first.reference) == before, "registering again changes nothing"
    assert [row["version"] for row in registry.rows()] == [other.version, first.version]


def test_one_flipped_byte_anywhere_is_found(registry: Registry, model: MakeModel) -> None:
    card = registry.import_folder(model(), "m")
    assert registry.verify("m") == []
    for file in sorted(p for p in (registry.root / card.reference).rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for at in (len(whole) // 3, len(whole) - 2):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
            try:
                problems = registry.verify("m")
            except UserError as error:  # the manifest itself is no JSON any more
                problems = [str(error)]
            assert len(problems) >= 1 and file.name in problems[0], (file, problems)
        file.write_bytes(whole)
    extra = registry.folder(card) / "more.txt"
    extra.write_text("x")
    assert registry.verify("m") == ["more.txt is not on the card"]
    extra.unlink()
    (registry.folder(card) / "config.json").unlink()
    assert registry.verify("m") == ["config.json is missing"]


def test_an_intact_copy_mends_a_damaged_version(registry: Registry, model: MakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are put back; a card that was changed is not sealed anew by that, and an intact version is left alone."""
    source = model()
    card = registry.import_folder(source, "m")
    weights, manifest = registry.folder(card) / "model.safetensors", registry.root / card.reference / "manifest.json"
    whole, before = weights.read_bytes(), weights.stat().st_ino
    registry.import_folder(source, "m")
    assert weights.stat().st_ino == before and "damaged" not in capsys.readouterr().err
    for damaged in (whole[:-2] + b"xy", None):
        weights.unlink()
        if damaged is not None:
            weights.write_bytes(damaged)
        assert len(registry.verify("m")) == 1
        registry.import_folder(source, "m")
        assert registry.verify("m") == [] and weights.read_bytes() == whole
        assert f"{card.reference} was damaged" in capsys.readouterr().err
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokens": 1e12}))
    weights.unlink()
    registry.import_folder(source, "m")
    assert weights.read_bytes() == whole and registry.verify("m") == ["manifest.json was changed after it was written"]


def test_a_changed_card_is_found(registry: Registry, model: MakeModel) -> None:
    card = registry.import_folder(model(), "m")
    path = registry.root / card.reference / "manifest.json"
    content = json.loads(path.read_text())
    content["tokens"] = 1e12
    path.write_text(json.dumps(content))
    assert registry.verify("m") == ["manifest.json was changed after it was written"]


def test_export_then_import_is_the_same_version(registry: Registry, model: MakeModel, tmp_path: Path) -> None:
    source = model()
    card = registry.import_folder(source, "m")
    copy_model(registry.folder(card), card, tmp_path / "out")
    assert hash_folder(tmp_path / "out") == hash_folder(source)
    assert registry.import_folder(tmp_path / "out", "n").version == card.version
    with pytest.raises(UserError, match="not an empty folder"):
        copy_model(registry.folder(card), card, tmp_path / "out")


def test_a_damaged_version_is_not_exported(registry: Registry, model: MakeModel, tmp_path: Path) -> None:
    card = registry.import_folder(model(), "m")
    weights = registry.folder(card) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DiskError, match=r"model\.safetensors does not have the bytes"):
        copy_model(registry.folder(card), card, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_names_find_versions(registry: Registry, model: MakeModel) -> None:
    old, new = registry.import_folder(model("a"), "m"), registry.import_folder(model("b", 1), "m")
    assert registry.get("m").version == registry.get("m@latest").version == new.version
    assert registry.get(f"m@{old.version[:6]}").version == old.version
    registry.set_alias(f"m@{old.version}", "good")
    assert registry.get("m@good").version == old.version
    registry.set_alias("m", "good")
    assert registry.get("m@good").version == new.version
    with pytest.raises(ModelError, match=r"no model 'mm'; did you mean 'm'\?"):
        registry.get("mm")
    with pytest.raises(ModelError, match=r"'m@god' does not exist; did you mean 'good'\?"):
        registry.get("m@god")
    for name in ("latest", "abc123", "a b", "../x"):
        with pytest.raises(UserError, match="cannot be an alias"):
            registry.set_alias("m", name)
    source = model("c", 2)
    for name in ("../m", "a/b", "", "m@x"):
        with pytest.raises(UserError, match="cannot be a model's name"):
            registry.import_folder(source, name)


@pytest.mark.parametrize("damage", ["remove", "garbage", "foreign row", "lost row"])
def test_the_index_is_rebuilt_equal(registry: Registry, model: MakeModel, damage: str) -> None:
    for seed in range(3):
        registry.import_folder(model(f"s{seed}", seed), f"m{seed % 2}")
    rows = registry.rows()
    assert len(rows) == 3
    if damage == "remove":
        registry.index.unlink()
    elif damage == "garbage":
        registry.index.write_bytes(b"not a database" * 1000)
    else:
        with sqlite3.connect(registry.index) as database:
            database.execute("update versions set version = 'feedbeef' where model = 'm1'" if damage == "foreign row"
                             else "delete from versions where model = 'm0'")
        database.close()
    assert registry.rows() == rows
    assert registry.reindex() == 3 and registry.rows() == rows


def test_ten_thousand_versions_are_listed_at_once(registry: Registry, model: MakeModel) -> None:
    card = registry.import_folder(model(), "m")
    with registry._database() as database:
        database.execute("delete from versions")
        database.executemany("insert into versions values ('m', ?, 'c', 'o', 'a', 1, 2, 3, 4, 5, 6)",
                             [(f"{i:012x}",) for i in range(10_000)])
    (registry.root / card.reference).rename(registry.root / f"m@{0:012x}")
    for i in range(1, 10_000):
        (registry.root / f"m@{i:012x}").mkdir()
    best = min(_seconds(registry.rows) for _ in range(3))
    assert len(registry.rows()) == 10_000 and best < 0.5, best  # about 0.05 s on an idle machine


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_a_kill_in_the_middle_leaves_nothing_or_all(registry: Registry, model: MakeModel) -> None:
    """Registering is killed while it copies; the next call sweeps up and succeeds."""
    source = model()
    code = ("import os, shutil, sys; from pathlib import Path; from athanor.registry import store\n"
            "copy = shutil.copyfile\n"
            "def dying(a, b):\n    copy(a, b)\n    os.kill(os.getpid(), 9)\n"
            "store.shutil.copyfile = dying\n"
            "store.Registry(Path(sys.argv[1])).import_folder(Path(sys.argv[2]), 'm')")
    done = subprocess.run([sys.executable, "-c", code, str(registry.root), str(source)], timeout=60)
    assert done.returncode == -9
    assert [n for n in os.listdir(registry.root) if n.startswith(".m@")], "the test did not kill it half-way"
    assert registry.rows() == []
    card = registry.import_folder(source, "m")
    assert registry.verify("m") == [] and not [n for n in os.listdir(registry.root) if n.startswith(".m@")]
    assert [row["version"] for row in registry.rows()] == [card.version]


def test_diff_names_what_differs(registry: Registry, model: MakeModel) -> None:
    first = registry.import_folder(model("a"), "m")
    second = replace(first, tokens=7.0, scores={"t": {"value": 0.5}}, parents=[{"model": "p", "version": "1"}])
    assert diff(first, first) == {}
    assert diff(first, second) == {"tokens": (None, 7.0), "scores.t.value": (None, 0.5), "parents.p.model": (None, "p"),
                                   "parents.p.version": (None, "1")}
    other = registry.import_folder(model("b", 1), "m")
    assert diff(first, other).keys() == {"created", "origin", "version", "hashes.weights"}


def test_nothing_is_made_by_looking(registry: Registry) -> None:
    assert registry.rows() == []
    with pytest.raises(ModelError, match="it is empty"):
        registry.get("m")
    assert not registry.root.exists()


def test_a_card_survives_reading_and_writing(registry: Registry, model: MakeModel) -> None:
    card = registry.import_folder(model(), "m")
    assert read_manifest(registry.root / card.reference / "manifest.json") == card
    assert card.parameters == 40 * 8 + 8 * 8 and card.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(("changes", "words"), [
    ({"files": [1]}, "files missing or of another type"), ({"parents": 7}, "parents missing"), ({"parents": [1]}, "parents"),
    ({"tokens": "many"}, "tokens"), ({"files": {"../../out": "0" * 64}}, "'../../out', which lies outside"),
    ({"files": {"/out": "0" * 64}}, "lies outside"), ({"model": "other"}, "does not belong in")])
def test_a_damaged_or_hostile_card_is_one_sentence(registry: Registry, model: Callable[..., Path],
                                                   changes: dict[str, Any], words: str) -> None:
    card = registry.import_folder(model(), "m")
    path = registry.root / card.reference / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for ask in (registry.get, registry.verify, lambda name: card_of(registry.folder(card), name)):
        with pytest.raises(UserError, match=words):
            ask("m")


def test_aliases_that_are_no_table_are_one_sentence(registry: Registry, model: Callable[..., Path]) -> None:
    registry.import_folder(model(), "m")
    registry.alias_file.write_text('{"m": []}')
    with pytest.raises(UserError, match="must be an object"):
        registry.get("m@x")
