"""From a configuration to the shape that knows its arithmetic, found by the name of the architecture. No torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from athanor.foundation.errors import ModelError, did_you_mean
from athanor.foundation.run_folder import read_json
from athanor.models.shapes.decoder import DecoderShape

ZOO = Path(__file__).parents[1] / "zoo"


def architectures() -> list[str]:
    """Names of the architectures in the zoo."""
    return sorted(file.stem for file in ZOO.glob("*.py") if file.stem != "__init__")


def check_architecture(name: str, where: str) -> None:
    """Refuse a name that is neither in the zoo nor a package.module, with the nearest valid one."""
    if name not in architectures() and ("." not in name or not all(part.isidentifier() for part in name.split("."))):
        raise ModelError(f"{where}: unknown architecture '{name}'; {did_you_mean(name, architectures())}")


def shape_class(architecture: str) -> type[DecoderShape]:
    """The arithmetic of an architecture: `shapes/<name>.py: Shape` where there is such a file, and the decoder's otherwise."""
    if "." in architecture or not Path(__file__).with_name(f"{architecture}.py").exists():
        return DecoderShape
    found: type[DecoderShape] = importlib.import_module(f"athanor.models.shapes.{architecture}").Shape
    return found


def load_shape(source: Path | dict[str, Any]) -> DecoderShape:
    """The shape that a model folder, a config.json or its content describes.

    Raises ModelError for an unknown model_type or a variant that is not supported.
    """
    where = "the configuration"
    if isinstance(source, Path):
        file = source / "config.json" if source.is_dir() else source
        where = str(file)
        if not file.is_file():
            raise ModelError(f"{file} does not exist, so {source} is not a model folder")
        source = read_json(file)
    if not isinstance(source, dict) or not isinstance(source.get("model_type"), str):
        raise ModelError(f"{where} has no 'model_type'; allowed: {', '.join(architectures())}")
    kind = source["model_type"]
    if "." in kind:  # a folder from elsewhere must not choose what is imported; only a recipe names a package.module
        raise ModelError(f"{where}: unknown model_type '{kind}'; allowed: {', '.join(architectures())}")
    check_architecture(kind, f"{where}, model_type")
    return shape_class(kind).from_config(source, where)
