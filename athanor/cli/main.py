"""The command `athanor`: verbs are loaded when they are called, so that help is instant."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from athanor.foundation.errors import AthanorError, did_you_mean
from athanor.foundation.events import EXIT_REQUEUE

# verb -> one line for the help page; `athanor/cli/<verb>.py` holds a click command called `command`
VERBS = {
    "check": "Measure this machine and write cluster.toml.",
    "plan": "Choose shape, tokens and layout for a budget, say why, and write the forecast.",
    "data": "Build, inspect and trace training data.",
    "rehearse": "Run some ranks of a stage without accelerators: memory, messages, FLOPs.",
    "train": "Train one stage of a recipe (pretraining or alignment).",
    "jobs": "Train in the background: submit, list, show, logs, cancel, resume.",
    "evaluate": "Score a model, with confidence intervals.",
    "models": "List, show, verify, import and export registered models.",
    "serve": "Serve a model over an OpenAI-compatible API, with a chat page.",
    "chat": "Talk to a model in the terminal.",
    "report": "Set forecast and actual side by side on one page.",
    "run": "Walk a recipe's whole chain, skipping what is unchanged.",
}


class Verbs(click.Group):
    """A group whose commands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"athanor.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"there is no verb '{args[0]}'; {did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="athanor-llm")
def program() -> None:
    """From a bare cluster and raw text to a served, aligned language model, with every accelerator-second accounted for."""


def main() -> None:
    """Run the command line; what a user can cause ends in one sentence and a non-zero exit, never a traceback."""
    try:
        program(standalone_mode=False)
    except AthanorError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:  # a path that cannot be: too long, below a file, unreadable
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)


def _fail(sentence: str, code: int) -> None:
    if code == EXIT_REQUEUE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who asks twice to stop gets the same code
    print(f"athanor: {sentence}", file=sys.stderr)
    sys.exit(code)
