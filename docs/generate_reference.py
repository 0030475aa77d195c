"""Writes docs/reference.md from the code: every verb, key of a recipe, objective, task and account. A test holds them equal.

    .venv/bin/python docs/generate_reference.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import click

import athanor
from athanor.cli.main import VERBS, program
from athanor.foundation.recipe import document
from athanor.ledger.accounts import ACCOUNTS

HEAD = """# Reference

Made by `docs/generate_reference.py`; do not edit by hand.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_verbs(), *_recipe(), *_found("Objectives", "objectives/zoo"), *_found("Tasks", "evaluate/tasks"),
                      *_accounts()]) + "\n"


def _verbs() -> list[str]:
    out = ["## Verbs", "", "People's output goes to standard error; `--json` prints one JSON document to standard output.", ""]
    context = click.Context(program, info_name="athanor")
    for verb in VERBS:
        command = program.get_command(context, verb)
        assert command is not None, verb
        out += _command(command, f"athanor {verb}")
    return out


def _command(command: click.Command, name: str) -> list[str]:
    parameters = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([name, *(p.make_metavar(click.Context(command)) for p in parameters)])
    out = [f"### `{usage}`", "", (command.help or "").strip(), ""]
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            out.append(f"- `{', '.join(option.opts)}`: {option.help or ''}")
    out.append("")
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in dict.fromkeys([*command.commands, *command.list_commands(context)]):
            child = command.get_command(context, sub)
            assert child is not None, sub
            if child.hidden:
                continue
            out += _command(child, f"{name} {sub}")
    return out


def _recipe() -> list[str]:
    out = ["## Recipe", "", "One TOML file; precedence is override > recipe > plan > default. `[]` marks a list of tables,",
           "whose entries an override names: `stage.pretrain.steps=100`.", "",
           "| key | type | default | meaning |", "|---|---|---|---|"]
    out += ["| `{}` | {} | {} | {} |".format(*(cell.replace("|", "\\|") for cell in row)) for row in document()]
    return [*out, ""]


def _found(title: str, folder: str) -> list[str]:
    """What goes by a file's name there, with the first line of its docstring."""
    out = [f"## {title}", "", "Or `package.module` of your own.", "", "| name | what it is |", "|---|---|"]
    for file in sorted((Path(athanor.__file__).parent / folder).glob("[!_]*.py")):
        out.append(f"| `{file.stem}` | {(ast.get_docstring(ast.parse(file.read_text())) or '').splitlines()[0]} |")
    return [*out, ""]


def _accounts() -> list[str]:
    out = ["## Accounts of a book", "", "| account | what stands in it |", "|---|---|"]
    return out + [f"| `{account.name}` | {account.meaning} |" for account in ACCOUNTS]


if __name__ == "__main__":
    (Path(__file__).parent / "reference.md").write_text(render())
