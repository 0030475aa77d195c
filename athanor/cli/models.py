"""`athanor models`: what we have, from what it came, how good it is, what it cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from athanor.cli.differences import rows
from athanor.cli.models_compare import compare
from athanor.foundation.errors import ModelError, UserError
from athanor.foundation.progress import console, say
from athanor.foundation.run_folder import folder_renamed_last, registry_root
from athanor.foundation.units import format_count, format_flops
from athanor.registry.manifest import Manifest
from athanor.registry.model_folder import TOKENIZER_FILES
from athanor.registry.store import Registry, card_of, copy_model, diff
from athanor.registry.tokens import eos_notes

SCREEN = 40  # lines that are one screen where nobody knows better


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The two options that every one of these verbs takes."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)
    return click.option("--registry", type=click.Path(path_type=Path), default=None, help="The registry's folder.")(function)


@click.group(help=__doc__)
def command() -> None:
    pass


command.add_command(compare)


@command.command("list")
@options
def list_models(registry: Path | None, as_json: bool) -> None:
    """All versions, newest first."""
    store = _open(registry)
    rows, aliases = store.rows(), store.aliases()
    for row in rows:
        row["aliases"] = sorted(a for a, version in aliases.get(row["model"], {}).items() if version == row["version"])
    if as_json:
        click.echo(json.dumps({"registry": str(store.root), "models": rows}))
        return
    if not rows:
        say(f"{store.root} holds no model yet; `athanor run` and `athanor models import` add some")
    table = _table("model", "created", "architecture", "parameters", "tokens", "model FLOPs", "device-hours", "money",
                   "energy", "aliases")
    for row in rows:
        table.add_row(f"{row['model']}@{row['version']}", row["created"][:16], row["architecture"],
                      format_count(row["parameters"]), _known(row["tokens"], format_count),
                      *_costs(row).values(), " ".join(row["aliases"]))
    console.print(table)


@command.command()
@click.argument("reference")
@options
def show(reference: str, registry: Path | None, as_json: bool) -> None:
    """The card of one version, such as `stdlib-chat` or `stdlib-chat@3f9a`."""
    store = _open(registry)
    card = store.get(reference)
    if as_json:
        click.echo(json.dumps({**asdict(card), "folder": str(store.folder(card))}))
        return
    table = _table("", card.reference)
    for name, value in _card_lines(store, card):
        table.add_row(name, value)
    console.print(table)


@command.command()
@click.argument("reference")
@options
def verify(reference: str, registry: Path | None, as_json: bool) -> None:
    """Compare every byte of a version with its card."""
    store = _open(registry)
    card, problems = store.get(reference), store.verify(reference)
    if as_json:
        click.echo(json.dumps({"reference": card.reference, "problems": problems}))
    if problems:
        mend = "" if all(problem.startswith("manifest.json") for problem in problems) else (
            f"; `athanor models import FOLDER --name {card.model}`, of an intact copy, puts its files back")
        raise ModelError(f"{card.reference} is damaged: {'; '.join(problems)}{mend}")
    say(f"{card.reference}: all {len(card.files)} files are as they were registered")


@command.command()
@click.argument("reference")
@options
def lineage(reference: str, registry: Path | None, as_json: bool) -> None:
    """From what a version came, and what started from it."""
    tree = _open(registry).lineage(reference)
    if as_json:
        click.echo(json.dumps(tree))
        return
    _say_tree(tree, 0)
    say("all together: " + "; ".join(_sums(tree)))
    for child in tree["children"]:
        say(f"  -> {child}")


@command.command("diff")
@click.argument("first")
@click.argument("second")
@options
def diff_models(first: str, second: str, registry: Path | None, as_json: bool) -> None:
    """Where two cards differ, on one screen; --json has every value."""
    store = _open(registry)
    cards = store.get(first), store.get(second)
    differences = diff(*cards)
    if as_json:
        click.echo(json.dumps({"first": cards[0].reference, "second": cards[1].reference, "differences": differences}))
        return
    found = rows(differences)
    room = max(SCREEN, console.height if console.is_terminal else 0) - 4
    table = _table("", cards[0].reference, cards[1].reference)
    for row in found[:room]:
        table.add_row(*row)
    console.print(table)
    if len(found) > room or not found:
        say(f"{len(found) - room} more differ; --json has all" if found else
            f"what was trained is the same; {len(differences)} figures of the runs differ, which --json has" if differences else
            "the cards are the same")


@command.command()
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["huggingface", "gguf"]),
              help="A Hugging Face folder, or one file for llama.cpp (of Llama, Mistral, Mixtral, Qwen, Gemma, GPT-2, "
              "DeepSeek-V3); unless given, the latter for a TARGET that ends in .gguf.")
@click.option("--type", "kind", type=click.Choice(["f16", "q8_0"], case_sensitive=False), default="f16", show_default=True,
              help="How a GGUF file holds matrices.")
@options
def export(model: str, target: Path, form: str | None, kind: str, registry: Path | None, as_json: bool) -> None:
    """Copy a model's Hugging Face folder to a new folder TARGET, or write it as the GGUF file TARGET.

    MODEL is a name in the registry, a model's folder, or a run's, which stands for its newest stage.
    """
    from athanor.serve.target import find_target

    found = find_target(model, registry)
    card = card_of(found.folder, found.name)
    if (form or target.suffix.lower().lstrip(".")) == "gguf":
        from athanor.registry.to_gguf import write_gguf

        notes = write_gguf(found.folder, target, card.reference, kind)
        result: dict[str, Any] = {"reference": card.reference, "file": str(target), "type": kind, "notes": notes}
    else:
        copy_model(found.folder, card, target)
        notes, result = [], {"reference": card.reference, "folder": str(target), "files": card.files}
    if as_json:
        click.echo(json.dumps(result))
    known = card.reference if found.folder.parent.name == card.reference else found.folder  # by which it is found again
    for line in [f"{known} is in {target}", *notes]:
        say(line)


@command.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="The model's name; the folder's name unless given.")
@options
def import_model(folder: Path, name: str | None, registry: Path | None, as_json: bool) -> None:
    """Register any Hugging Face FOLDER with safetensors weights."""
    card = _open(registry).import_folder(folder, name or folder.resolve().name)
    notes = eos_notes(folder)
    if as_json:
        click.echo(json.dumps({**asdict(card), "notes": notes}))
    for line in [f"{folder} is registered as {card.reference}", *notes]:
        say(line)


@command.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def merge(base: Path, adapter: Path, folder: Path, as_json: bool) -> None:
    """Write the model of folder BASE with the LoRA of PEFT's folder ADAPTER in its weights to a new FOLDER."""
    from athanor.models.adapters import merge_adapter
    from athanor.models.huggingface import load_model, save_model
    from athanor.models.shapes.find import read_config

    if folder.exists():
        raise UserError(f"{folder} exists; the merged model needs a new folder")
    config = read_config(base)
    module = load_model(base, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    count = merge_adapter(module, adapter)
    with folder_renamed_last(folder) as building:
        save_model(module, building)
        for name in {*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"}:
            if (base / name).is_file():
                shutil.copyfile(base / name, building / name)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "base": str(base), "adapter": str(adapter), "matrices": count}))
    say(f"{folder} is {base} with {count} matrices of {adapter} added")


@command.command()
@click.argument("reference")
@click.argument("name")
@options
def alias(reference: str, name: str, registry: Path | None, as_json: bool) -> None:
    """Let MODEL@NAME mean this version from now on."""
    card = _open(registry).set_alias(reference, name)
    if as_json:
        click.echo(json.dumps({"reference": card.reference, "alias": f"{card.model}@{name}"}))
    say(f"{card.model}@{name} is now {card.reference}")


@command.command()
@options
def reindex(registry: Path | None, as_json: bool) -> None:
    """Build the index anew from the manifests."""
    store = _open(registry)
    count = store.reindex()
    if as_json:
        click.echo(json.dumps({"registry": str(store.root), "versions": count}))
    say(f"{store.index} lists {count} versions")


def _open(registry: Path | None) -> Registry:
    return Registry(registry or registry_root())


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _known(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def _costs(figures: dict[str, Any]) -> dict[str, str]:
    """What a model took, for people; a dash for what nobody knows."""
    return {"model FLOPs": _known(figures.get("model_flops"), format_flops),
            "device-hours": _known(figures.get("device_hours"), "{:.4g}".format),
            "money": _known(figures.get("money"), "{:.2f}".format),
            "energy": _known(figures.get("energy_joules"), lambda joules: f"{joules / 3.6e6:.4g} kWh")}


def _sums(tree: dict[str, Any]) -> list[str]:
    """What a version and all it came from took: of what only some of them know, at least how much, and who does not."""
    known, unknown = _costs(tree["known_cost"]), dict[str, list[str]]()
    for key, name in zip(tree["known_cost"], known, strict=True):
        unknown[name] = tree["unknown"][key]
    parts = [f"{name} {text}" if not unknown[name] else f"{name} at least {text} (not known of {', '.join(unknown[name])})"
             for name, text in known.items() if text != "-"]
    nobody = [name for name, text in known.items() if text == "-"]
    return [*parts, f"nobody knows {' and '.join(nobody)}"] if nobody else parts


def _card_lines(store: Registry, card: Manifest) -> list[tuple[str, str]]:
    aliases = sorted(name for name, version in store.aliases().get(card.model, {}).items() if version == card.version)
    lines = [("folder", str(store.folder(card))), ("aliases", " ".join(aliases) or "-"), ("origin", card.origin),
             ("created", card.created),
             ("architecture", card.architecture), ("parameters", format_count(card.parameters)),
             ("parents", ", ".join(f"{p['model']}@{p['version']}" for p in card.parents) or "-"),
             ("data", _known((card.data or {}).get("hash"), str)), ("steps", _known(card.steps, str)),
             ("tokens", _known(card.tokens, format_count)),
             ("layout", _known((card.book or {}).get("layout"), str)),
             *_costs({"model_flops": card.model_flops, **(card.book or {})}).items(),
             ("code", _known(card.code, lambda code: code["commit"][:12] + (" (modified)" if code["modified"] else "")))]
    for task, score in (card.scores or {}).items():
        interval = f"[{score['low']:.4g}, {score['high']:.4g}]"
        lines.append((task, f"{score['value']:.4g} {interval} {score['unit']}, n = {score['count']}"))
    return lines + [(part, _known(digest, str)) for part, digest in card.hashes.items()]


def _say_tree(node: dict[str, Any], depth: int) -> None:
    known = f"  {node['origin']}, tokens {_known(node['tokens'], format_count)}" if node["registered"] else "  (not registered)"
    say("  " * depth + ("<- " if depth else "") + node["reference"] + known)
    for parent in node.get("parents", []):
        _say_tree(parent, depth + 1)
