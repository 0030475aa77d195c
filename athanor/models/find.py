"""Finds an architecture by its name: a file of the zoo, or a package.module from outside."""

from __future__ import annotations

import importlib
from types import ModuleType

from athanor.foundation.errors import ModelError
from athanor.models.shapes.find import check_architecture

OFFERS = ("build", "TENSOR_DIMS")


def load_architecture(name: str) -> ModuleType:
    """The module that offers build(shape, layers, is_first, is_last) and TENSOR_DIMS.

    Raises ModelError for an unknown name, with the nearest one, and for a module that lacks either.
    """
    check_architecture(name, "model.architecture")
    try:
        module = importlib.import_module(name if "." in name else f"athanor.models.zoo.{name}")
    except ModuleNotFoundError as error:
        raise ModelError(f"model.architecture = '{name}' cannot be imported: {error}") from error
    for offer in OFFERS:
        if not hasattr(module, offer):
            raise ModelError(f"the architecture '{name}' lacks '{offer}'; it must offer {' and '.join(OFFERS)}")
    return module
