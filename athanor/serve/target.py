"""What MODEL means on a command line: a model's folder, a stage or run, a recipe, or a name in the registry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from athanor.foundation.errors import ModelError, UserError, did_you_mean
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, registry_root, runs_root
from athanor.registry.manifest import Manifest, content_version, hash_files, read_manifest
from athanor.registry.store import Registry


@dataclass(frozen=True)
class Target:
    """A model: its Hugging Face folder, the name it goes by, and the run and stage that it is from, where these are here."""

    folder: Path
    name: str
    run: RunFolder | None = None
    stage: str = ""

    @property
    def feedback(self) -> Path | None:
        """Where judgements are kept, if anywhere."""
        return None if self.run is None else self.run.feedback

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 of each file, made once: it takes a second for a gigabyte."""
        return hash_files(self.folder)

    @cached_property
    def version(self) -> str:
        """The registry's version of the same content."""
        return content_version(self.files)

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


def find_target(model: str, registry: Path | None = None) -> Target:
    """Resolve MODEL, with the registry in this folder if given. Raises UserError with what was tried and the nearest name, and
    ModelError for a registered version whose files are not as they were registered."""
    path = Path(model)
    if path.suffix == ".toml":
        return _of_run(runs_root() / load_recipe(path).name, f"'{model}' has not been trained yet: ")
    if (path / "config.json").is_file():
        return _of_folder(path.resolve())
    if (path / "model" / "config.json").is_file():
        return _of_folder((path / "model").resolve())
    if path.is_dir():
        return _of_run(path.resolve(), "")
    if "@" not in model and (runs_root() / model).is_dir():
        return _of_run((runs_root() / model).resolve(), "")
    return _of_registry(model, Registry(registry or registry_root()))


def _of_folder(folder: Path) -> Target:
    """A model's folder; inside a run (`<run>/<stage>/model`) it goes by the names of both."""
    stage, run = folder.parent, folder.parent.parent
    if folder.name == "model" and RunFolder(run).recipe.is_file():
        return Target(folder, f"{run.name}-{stage.name}", RunFolder(run), stage.name)
    if folder.name == "model" and "@" in stage.name and (stage / "manifest.json").is_file():
        card = read_manifest(stage / "manifest.json")
        return _intact(Target(folder, card.model), card)
    return Target(folder, folder.parent.name if folder.name == "model" else folder.name)


def _of_run(run: Path, before: str) -> Target:
    """The model of the run's newest stage."""
    models = [config.parent for config in run.glob("*/model/config.json")]
    if not models:
        raise ModelError(f"{before}{run} holds no model: neither config.json (a model's folder) nor <stage>/model/config.json "
                         "(a run)")
    newest = max(models, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)
    return Target(newest, f"{run.name}-{newest.parent.name}", RunFolder(run), newest.parent.name)


def _of_registry(model: str, registry: Registry) -> Target:
    names = {str(row["model"]) for row in registry.rows()}
    runs = [path.parent.name for path in runs_root().glob("*/recipe.toml")]
    if model.partition("@")[0] not in names:
        known = [*names, *runs]
        hint = "; " + did_you_mean(model.partition("@")[0], known) if known else ", and there are no runs here"
        raise UserError(f"'{model}' is no model folder, run folder, recipe, or name in {registry.root}{hint}")
    card = registry.get(model)
    run, _, stage = card.origin.removeprefix("run ").partition(", stage ")
    is_here = card.origin.startswith("run ") and (runs_root() / run).is_dir()
    return _intact(Target(registry.folder(card), card.model, RunFolder(runs_root() / run) if is_here else None, stage), card)


def _intact(target: Target, card: Manifest) -> Target:
    damaged = sorted(name for name, digest in card.files.items() if target.files.get(name) != digest)
    if damaged:
        raise ModelError(f"{card.reference} is damaged: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not as "
                         f"registered; `athanor models import FOLDER --name {card.model}`, of an intact copy, puts it back")
    return target
