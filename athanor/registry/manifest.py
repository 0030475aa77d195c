"""The card beside the weights: what a model is, from what it came, what it cost and how good it is."""

from __future__ import annotations

import datetime
import subprocess
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from athanor.foundation.errors import ModelError, UserError
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, hash_file, hash_value, read_json, read_jsonl
from athanor.ledger.book import read_book
from athanor.registry.model_folder import check_model_folder, hashes_by_part, model_files

SCHEMA = 1
VERSION_DIGITS = 12


@dataclass
class Manifest:
    """One model version. Its `version` is the first digits of a sha256 over `files`, so equal content is one version.

    `seal` is a sha256 over everything else here; what nobody knows is None.
    """

    model: str
    version: str
    created: str  # UTC, ISO 8601: when this content was first registered
    origin: str  # "run <name>, stage <name>" or "import of <folder>"
    architecture: str
    parameters: int
    files: dict[str, str]  # relative name -> sha256
    hashes: dict[str, str | None]  # of weights, config, tokenizer, template
    parents: list[dict[str, str | None]] = field(default_factory=list)
    stage: dict[str, Any] | None = None  # its configuration, origins aside
    recipe: dict[str, Any] | None = None
    data: dict[str, Any] | None = None  # manifest hash and sources
    steps: int | None = None
    tokens: float | None = None
    model_flops: float | None = None
    book: dict[str, Any] | None = None  # device_hours, money, energy_joules, accounts, derived
    scores: dict[str, Any] | None = None
    code: dict[str, Any] | None = None  # commit, whether files differed from it
    schema: int = SCHEMA
    seal: str = ""

    @property
    def reference(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def right_seal(self) -> str:
        return hash_value({key: value for key, value in asdict(self).items() if key != "seal"})

    def refreshed(self, new: Manifest) -> Manifest:
        """The card of the same content: newer facts win, unknown ones erase nothing, the first date and code stay."""
        merged = asdict(self)
        for key, value in asdict(new).items():
            if key not in ("created", "code", "seal") and value not in (None, [], {}):
                merged[key] = value
        if new.origin.startswith("import"):
            merged["origin"] = self.origin
        return Manifest(**merged)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError when the file is something else."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a model's manifest of schema {SCHEMA}")
    wrong = [f.name for f in fields(Manifest) if not _fits(raw.get(f.name), str(f.type))]
    if wrong:
        raise UserError(f"{path} is not a whole manifest: {', '.join(wrong)} missing or of another type")
    card = Manifest(**{f.name: raw[f.name] for f in fields(Manifest)})
    unsafe = [name for name in card.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if unsafe or card.reference != path.parent.name:
        what = f"the file '{unsafe[0]}', which lies outside" if unsafe else f"{card.reference}, which does not belong in"
        raise UserError(f"{path} is not to be trusted: it names {what} {path.parent}")
    return card


def _fits(value: object, kind: str) -> bool:
    """Whether a value read from JSON is of a field's type."""
    if value is None:
        return "None" in kind
    types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict, "list": list}
    if not isinstance(value, types[kind.partition("[")[0].partition(" ")[0]]):
        return False
    return not isinstance(value, list) or all(isinstance(entry, dict) for entry in value)


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of each file of a model, by relative name."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in model_files(folder)}


def content_version(files: dict[str, str]) -> str:
    return hash_value(files)[:VERSION_DIGITS]


def describe_folder(folder: Path, model: str, origin: str) -> Manifest:
    """The card of a folder that says nothing of its past. Raises ModelError when it is no whole model."""
    facts = check_model_folder(folder)
    files = hash_files(folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return Manifest(model, content_version(files), now, origin, facts.architecture, facts.parameters, files,
                    hashes_by_part(files), code=code_version())


def describe_stage(run: RunFolder, stage_name: str) -> Manifest:
    """The card of a finished stage of a run, from the files that the chain's other steps left."""
    recipe = load_recipe(run.recipe)
    stage = recipe.get_stage(stage_name)
    folder = run.stage(stage_name)
    if not folder.model.is_dir():
        raise ModelError(f"stage '{stage_name}' of {run.root} has no model yet; train it first")
    card = describe_folder(folder.model, f"{recipe.name}-{stage_name}", f"run {recipe.name}, stage {stage_name}")
    card.parents = [_parent(run, recipe, stage.start_from)] if stage.start_from else []
    card.recipe = {**tomllib.loads(run.recipe.read_text(encoding="utf-8")), "sha256": hash_file(run.recipe)}
    card.stage = tomllib.loads(folder.config.read_text(encoding="utf-8")) if folder.config.exists() else None
    manifest = run.data / "manifest.json"
    if manifest.exists():
        content = read_json(manifest)
        card.data = {key: content[key] for key in ("hash", "tokenizer_hash", "template_hash", "sources", "evaluation",
                                                   "bytes_per_token") if key in content}
    steps = [row["step"] for row in read_jsonl(folder.metrics) if isinstance(row.get("step"), int)]
    card.steps = max(steps) if steps else None
    if folder.actual.exists():
        book = read_book(folder.actual)
        price = recipe.cluster.price_per_device_hour
        hours = book.device_seconds / 3600
        card.tokens, card.model_flops = book.tokens, book.model_flops
        card.book = {"devices": book.devices, "layout": book.layout, "accelerator": book.accelerator,
                     "wall_seconds": book.wall_seconds, "device_seconds": book.device_seconds, "device_hours": hours,
                     "money": book.money if book.money is not None else price * hours if price is not None else None,
                     "energy_joules": book.energy_joules, "accounts": book.accounts, "derived": book.derived()}
    if run.scores.exists():
        card.scores = read_json(run.scores).get("models", {}).get(stage_name)
    return card


def _parent(run: RunFolder, recipe: Recipe, start_from: str) -> dict[str, str | None]:
    """Name and content of the model that a stage started from: an earlier stage, or a folder."""
    if any(stage.name == start_from for stage in recipe.stage):
        folder, model = run.stage(start_from).model, f"{recipe.name}-{start_from}"
    else:
        folder, model = Path(start_from), Path(start_from).name
    files = hash_files(folder) if folder.is_dir() else None
    return {"model": model, "version": content_version(files) if files else None,
            "weights": hashes_by_part(files)["weights"] if files else None}


def code_version() -> dict[str, Any] | None:
    """Commit of the checkout that this file is tracked in, and whether it differs; None outside a checkout or git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # an installed copy inside somebody else's repository
        return None
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "modified": bool(git("status", "--porcelain", "--untracked-files=no"))} if commit else None
