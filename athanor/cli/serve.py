"""`athanor serve`: a model behind an OpenAI-compatible API, with a chat page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from athanor.cli.counts import POSITIVE
from athanor.foundation.errors import UserError
from athanor.foundation.progress import say

if TYPE_CHECKING:
    from athanor.foundation.recipe import Serve


@click.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--port", type=click.IntRange(0, 65535), help="port to listen on (serve.port, 8000); 0 takes a free one")
@click.option("--host", help="address to listen on (serve.host, 127.0.0.1)")
@click.option("--api-key", envvar="ATHANOR_API_KEY", help="ask clients for this key (serve.api_key, or $ATHANOR_API_KEY)")
@click.option("--cache-tokens", type=POSITIVE, help="tokens of keys and values to keep, over all requests")
@click.option("--json", "as_json", is_flag=True, help="print one line of JSON when ready")
def command(model: str, overrides: tuple[str, ...], port: int | None, host: str | None, api_key: str | None,
            cache_tokens: int | None, as_json: bool) -> None:
    """Serve MODEL (a model or run folder, a recipe, or a name in the registry) over OpenAI's API, with a chat page.

    Overrides such as serve.port=8001 go with a recipe.
    """
    chosen = settings(model, list(overrides))
    from athanor.serve.address import Address, listen, url_of
    from athanor.serve.target import find_target

    target = find_target(model)
    address = Address(host or chosen.host, chosen.port if port is None else port)
    key = api_key or chosen.api_key
    if not address.is_local and key is None:
        say(f"warning: {address.host} can be reached by others, and no API key is asked for; set one with --api-key")
    with listen(address) as listener:
        from athanor.serve.server import make_server  # loads torch, which takes a while

        server, api = make_server(target, key, cache_tokens=cache_tokens)
        url = url_of(listener)
        say(f"{target.reference}: chat at {url}/ and OpenAI's API at {url}/v1; Ctrl-C stops")
        if as_json:
            ready = {"url": url, "model": target.name, "version": target.version, "folder": str(target.folder),
                     "context_tokens": api.context_tokens}
            click.echo(json.dumps(ready))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            say("stopped")


def settings(model: str, overrides: list[str]) -> Serve:
    """The recipe's [serve] table; the defaults when MODEL is no recipe."""
    from athanor.foundation.recipe import Serve, load_recipe

    if model.endswith(".toml"):
        return load_recipe(model, overrides).serve
    if overrides:
        raise UserError(f"'{overrides[0]}' overrides a recipe, and '{model}' is none; use --port, --host or --api-key")
    return Serve()
