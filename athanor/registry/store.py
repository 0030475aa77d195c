"""Versions on disk: `<model>@<version>/` with manifest.json and the model's folder, aliases, and an index of both.

The folders and aliases.json are the truth. index.sqlite only makes lists fast: it is rebuilt whenever it does not name
the same versions as the disk. Whoever writes holds a lock on the folder; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import DiskError, ModelError, UserError, did_you_mean
from athanor.foundation.progress import say
from athanor.foundation.run_folder import (
    RunFolder,
    disk_errors,
    folder_renamed_last,
    hash_file,
    read_json,
    registry_root,
    sweep,
    write_json,
)
from athanor.registry.manifest import Manifest, content_version, describe_folder, describe_stage, hash_files, read_manifest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
VERSION = re.compile(r"[0-9a-f]{4,}")
NAME_RULE = "letters, digits, '.', '_' and '-', beginning with a letter or digit"
COSTS = ("device_hours", "money", "energy_joules")  # of a card's book
INDEX_COLUMNS = ("model", "version", "created", "origin", "architecture", "parameters", "tokens", "model_flops",
                 *COSTS)


def register(run_folder: Path, stage: str, registry: Path | None = None) -> Manifest:
    """Put a finished stage's model into the registry, with its card; the same content twice is one version.

    Called again after more is known (scores, the book), the card is brought up to date.
    Raises ModelError when the stage has no whole model.
    """
    run = RunFolder(run_folder)
    return Registry(registry or registry_root()).add(run.stage(stage).model, describe_stage(run, stage))


@dataclass(frozen=True)
class Registry:
    """The registry that lies in `root`; made by the first `add`."""

    root: Path

    index = property(lambda self: self.root / "index.sqlite")
    alias_file = property(lambda self: self.root / "aliases.json")

    def folder(self, card: Manifest) -> Path:
        """The Hugging Face folder of a version."""
        return self.root / card.reference / "model"

    def add(self, source: Path, card: Manifest) -> Manifest:
        """Copy a described folder in; of content that is here, mend damaged files and refresh the card. Returns the card."""
        _check_name(card.model)
        with self._lock():
            sweep(self.root)
            target = self.root / card.reference
            old = read_manifest(target / "manifest.json") if target.exists() else None
            new = card if old is None else old.refreshed(card)
            if new != old:
                new.seal = new.right_seal
            if hash_files(self.folder(card)) != card.files:  # new here, or damaged since
                with folder_renamed_last(target) as building:
                    copy_files(source, building / "model", card.files)
                    write_json(building / "manifest.json", asdict(new))
                if old is not None:
                    say(f"{card.reference} was damaged; its files are again as they were registered")
            elif new != old:
                write_json(target / "manifest.json", asdict(new))
            self._put(new)
        return new

    def import_folder(self, source: Path, model: str) -> Manifest:
        """Register any Hugging Face folder with safetensors weights. Raises ModelError for a pickle or a missing part."""
        _check_name(model)
        return self.add(source, describe_folder(source, model, f"import of {source.resolve()}"))

    def get(self, reference: str) -> Manifest:
        """The card that `model`, `model@latest`, `model@alias` or `model@first-digits` names.

        Without more than the model's name it is the newest version. Raises ModelError with the nearest valid name.
        """
        model, _, wanted = reference.partition("@")
        rows = self.rows()
        versions = [row["version"] for row in rows if row["model"] == model]  # newest first
        if not versions:
            known = {row["model"] for row in rows}
            hint = did_you_mean(model, known) if known else "it is empty"
            raise ModelError(f"{self.root} has no model '{model}'; {hint}")
        if wanted in ("", "latest"):
            found = versions[:1]
        else:
            aliases = self.aliases().get(model, {})
            wanted = aliases.get(wanted, wanted)
            found = [version for version in versions if version.startswith(wanted)]
            if len(found) != 1:
                what = "is ambiguous" if found else "does not exist"
                raise ModelError(f"version '{reference}' {what}; {did_you_mean(wanted, [*versions, *aliases, 'latest'])}")
        return read_manifest(self.root / f"{model}@{found[0]}" / "manifest.json")

    def rows(self) -> list[dict[str, Any]]:
        """What the index holds, newest first; brought up to date when the disk holds other versions."""
        on_disk = self._on_disk()
        rows = self._read_index()
        if rows is None or {f"{row['model']}@{row['version']}" for row in rows} != on_disk:
            if not on_disk and not self.root.exists():
                return []
            self.reindex()
            rows = self._read_index() or []
        return rows

    def aliases(self) -> dict[str, dict[str, str]]:
        """{model: {alias: version}}."""
        found: dict[str, dict[str, str]] = read_json(self.alias_file) if self.alias_file.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(versions, dict) for versions in found.values()):
            raise UserError(f"{self.alias_file} must be an object of the form {{model: {{alias: version}}}}")
        return found

    def set_alias(self, reference: str, alias: str) -> Manifest:
        """Let `model@alias` mean this version from now on."""
        if not NAME.fullmatch(alias) or VERSION.fullmatch(alias) or alias == "latest":
            raise UserError(f"'{alias}' cannot be an alias: {NAME_RULE}; not 'latest', not a version's digits")
        card = self.get(reference)
        with self._lock():
            aliases = self.aliases()
            aliases.setdefault(card.model, {})[alias] = card.version
            write_json(self.alias_file, aliases)
        return card

    def verify(self, reference: str) -> list[str]:
        """What differs from the card, a sentence each; none when every byte is as it was registered."""
        card = self.get(reference)
        problems = []
        if card.seal != card.right_seal:
            problems.append("manifest.json was changed after it was written")
        if content_version(card.files) != card.version:
            problems.append(f"manifest.json's list of files does not belong to version {card.version}")
        found = hash_files(self.folder(card))
        for name in sorted(card.files.keys() | found.keys()):
            if name not in found:
                problems.append(f"{name} is missing")
            elif name not in card.files:
                problems.append(f"{name} is not on the card")
            elif found[name] != card.files[name]:
                problems.append(f"{name} has other bytes than when it was registered")
        return problems

    def lineage(self, reference: str) -> dict[str, Any]:
        """A version with its parents (as deep as the registry knows them) and the versions that started from it.

        `cost` sums what it and all of these parents took, each once; a figure that one of them does not know is None there,
        and stands in `known_cost` without those that `unknown` names.
        """
        card = self.get(reference)
        children = [self._card(row) for row in self.rows()]
        tree = self._ancestors(card, set())
        line = {node["reference"]: node.get("cost", {}) for node in _nodes(tree)}
        known = {key: [took[key] for took in line.values() if took.get(key) is not None] for key in tree["cost"]}
        unknown = {key: [name for name, took in line.items() if took.get(key) is None] for key in tree["cost"]}
        sums = {key: math.fsum(values) if values else None for key, values in known.items()}
        cost = {key: None if unknown[key] else sums[key] for key in sums}
        return {**tree, "cost": cost, "known_cost": sums, "unknown": unknown,
                "children": [c.reference for c in children if any(p["version"] == card.version for p in c.parents)]}

    def _ancestors(self, card: Manifest, seen: set[str]) -> dict[str, Any]:
        seen = seen | {card.version}
        parents = []
        by_version = {row["version"]: row for row in self.rows()}
        for parent in card.parents:
            row = by_version.get(parent["version"] or "")
            if row is None or row["version"] in seen:
                parents.append({"reference": f"{parent['model']}@{parent['version']}", "registered": False})
            else:
                parents.append(self._ancestors(self._card(row), seen))
        return {"reference": card.reference, "registered": True, "origin": card.origin, "steps": card.steps,
                "tokens": card.tokens, "data": (card.data or {}).get("hash"), "parents": parents,
                "cost": {"model_flops": card.model_flops, **{cost: (card.book or {}).get(cost) for cost in COSTS}}}

    def reindex(self) -> int:
        """Build index.sqlite anew from the manifests. Returns the number of versions."""
        with self._lock():
            self.index.unlink(missing_ok=True)
            cards = [read_manifest(self.root / name / "manifest.json") for name in sorted(self._on_disk())]
            with self._database() as database:
                for card in cards:
                    _insert(database, card)
        return len(cards)

    def _card(self, row: dict[str, Any]) -> Manifest:
        return read_manifest(self.root / f"{row['model']}@{row['version']}" / "manifest.json")

    def _on_disk(self) -> set[str]:
        names = os.listdir(self.root) if self.root.is_dir() else []
        return {name for name in names if "@" in name and not name.startswith(".")}

    def _read_index(self) -> list[dict[str, Any]] | None:
        if not self.index.exists():
            return None
        try:
            with self._database() as database:
                columns = ", ".join(INDEX_COLUMNS)
                rows = database.execute(f"select {columns} from versions order by created desc, version").fetchall()
        except sqlite3.DatabaseError:  # damaged, or from another release: it is only an index
            return None
        return [dict(zip(INDEX_COLUMNS, row, strict=True)) for row in rows]

    def _put(self, card: Manifest) -> None:
        try:
            with self._database() as database:
                _insert(database, card)
        except sqlite3.DatabaseError:  # a damaged index is noticed, and built anew, by the next reader
            self.index.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.index, timeout=30)
        try:
            with database:
                columns = ", ".join(INDEX_COLUMNS)
                database.execute(f"create table if not exists versions ({columns}, primary key (model, version))")
                yield database
        finally:
            database.close()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield


def diff(first: Manifest, second: Manifest) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two cards, with both values (None where one has no such key)."""
    left, right = ({key: value for name, content in asdict(card).items() if name not in ("seal", "files")
                    for key, value in _leaves(content, name)} for card in (first, second))
    return {key: (left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)}


def card_of(folder: Path, name: str) -> Manifest:
    """The card of a model's folder: the one beside it in a registry, or that of a folder which says nothing of its past."""
    card = folder.parent / "manifest.json"
    return read_manifest(card) if "@" in folder.parent.name and card.is_file() else describe_folder(folder, name, f"{folder}")


def copy_model(source: Path, card: Manifest, target: Path) -> None:
    """Copy a model's folder, checked against its card on the way; nothing half written is ever there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; export needs a new one")
    with folder_renamed_last(target) as building:
        copy_files(source, building, card.files)


def copy_files(source: Path, target: Path, expected: dict[str, str]) -> None:
    """Copy the named files; each copy must have the expected sha256. Raises DiskError naming the one that has not."""
    for name, digest in expected.items():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        if hash_file(copy) != digest:
            raise DiskError(f"{source / name} does not have the bytes that were registered (sha256 {digest[:12]}…)")


def _insert(database: sqlite3.Connection, card: Manifest) -> None:
    values = {**asdict(card), **{cost: (card.book or {}).get(cost) for cost in COSTS}}
    marks = ", ".join("?" * len(INDEX_COLUMNS))
    database.execute(f"insert or replace into versions values ({marks})", [values[column] for column in INDEX_COLUMNS])


def _nodes(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield tree
    for parent in tree.get("parents", []):
        yield from _nodes(parent)


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}")
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{prefix}.{entry.get('name', entry.get('model', number))}")
    elif value is not None:
        yield prefix, value


def _check_name(model: str) -> None:
    if not NAME.fullmatch(model):
        raise UserError(f"'{model}' cannot be a model's name: {NAME_RULE}")
