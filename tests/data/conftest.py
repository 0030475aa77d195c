"""A small data folder from two packages of the standard library, built once for all tests of this room."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from athanor.data.build import build
from athanor.foundation.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


def write_recipe(folder: Path, sources: list[dict[str, object]], **data: object) -> Recipe:
    """A recipe with these sources; `data` sets other keys of its table."""
    lines = ['name = "small"', "[data]"]
    lines += [f"{key} = {value!r}" for key, value in ({"vocab_size": 600, "evaluation_share": 0.2} | data).items()
              if value is not None]
    for source in sources:
        lines += ["[[data.source]]", *(f"{key} = {value!r}" for key, value in source.items())]
    lines += ["[[stage]]", 'name = "pretrain"']
    file = folder / "recipe.toml"
    file.write_text("\n".join(lines))
    return load_recipe(file)


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    return lambda sources, **data: write_recipe(tmp_path, sources, **data)


@pytest.fixture(scope="session")
def small_sources() -> list[dict[str, object]]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return [{"name": "asyncio", "kind": "python", "path": str(stdlib / "asyncio"), "weight": 3.0},
            {"name": "email", "kind": "python", "path": str(stdlib / "email")}]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, small_sources: list[dict[str, object]]) -> Path:
    folder = tmp_path_factory.mktemp("small")
    build(write_recipe(folder, small_sources), folder / "data")
    return folder / "data"
