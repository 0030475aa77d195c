"""From a configuration to the shape that knows its arithmetic, found by the name of the architecture. No torch."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from athanor.foundation import pieces
from athanor.foundation.errors import ModelError, UserError, did_you_mean, nearest
from athanor.foundation.recipe import Recipe, load_recipe, read_plan
from athanor.foundation.run_folder import RunFolder, read_json, runs_root
from athanor.models.shapes.decoder import DecoderShape, fits

ZOO = Path(__file__).parents[1] / "zoo"
KNOWN = Path(__file__).with_name("known.toml")
AS_USUAL = ("head_dim", "moe_intermediate_size")  # where 0 says so; an architecture's default is that of a published model
VOCABULARY_MULTIPLE = 64  # a model's vocabulary is filled up to it, so that it can be cut into equal parts
ALIASES = {"gpt": "gpt2", "yuan2": "yuan"}  # model_type -> the architecture's file


def architectures() -> list[str]:
    """Names of the architectures in the zoo: those that can be trained."""
    return sorted(file.stem for file in ZOO.glob("*.py") if file.stem != "__init__")


def counted() -> list[str]:
    """Names of the architectures whose arithmetic is known: those in the zoo, and each file here that offers a `Shape`."""
    files = [file.stem for file in Path(__file__).parent.glob("*.py") if file.stem != "__init__"]
    return sorted({*architectures(), *(name for name in files if hasattr(_module(name), "Shape"))})


def check_architecture(name: str, where: str) -> None:
    """Refuse a name that is neither in the zoo nor a package.module, with the nearest valid one."""
    if name in architectures() or ("." in name and all(part.isidentifier() for part in name.split("."))):
        return
    if name in counted():
        raise ModelError(f"{where}: the arithmetic of '{name}' is known, but there is no module of it, so it can be estimated "
                         f"and not trained; those that can: {', '.join(architectures())}")
    raise ModelError(f"{where}: unknown architecture '{name}'; {did_you_mean(name, architectures())}")


def shape_class(architecture: str) -> type[DecoderShape]:
    """The arithmetic of an architecture: `shapes/<name>.py: Shape` where there is such a file, and the decoder's otherwise."""
    if "." in architecture or not Path(__file__).with_name(f"{architecture}.py").exists():
        return DecoderShape
    found: type[DecoderShape] = _module(architecture).Shape
    return found


def new_shape(architecture: str, **sizes: Any) -> DecoderShape:
    """The shape of a new model. Raises ModelError for a size that its architecture does not have, or not of this type."""
    shape = shape_class(architecture)
    known = {field.name: str(field.type) for field in fields(shape) if field.name != "rope_scaling"}
    for key, value in sizes.items():
        if key not in known:
            having = [name for name in architectures() if key in {field.name for field in fields(shape_class(name))}]
            raise ModelError(f"model.{key} is no size of the architecture '{architecture}'; "
                             + (f"it is one of {', '.join(having)}" if having else did_you_mean(key, known)))
        if not fits(value, known[key]):
            raise ModelError(f"model.{key} = {value!r} is not of type {known[key]}")
    usual = dict.fromkeys(AS_USUAL, 0) | {"first_k_dense_replace": min(3, max(0, sizes.get("num_hidden_layers", 0) - 1))}
    made = shape(**{**{key: value for key, value in usual.items() if key in known}, **sizes})
    for key, value in sizes.items():
        if shape.KEYS.get(key, key) is None and value not in (0, getattr(made, key)):
            raise ModelError(f"model.{key} = {value}, but other sizes make it {getattr(made, key)}; leave it out")
    return made


def read_config(source: Path) -> dict[str, Any]:
    """A config.json, or that of a model folder, as it is. Raises ModelError when there is none."""
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise ModelError(f"{file} does not exist, so {source} is not a model folder")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a table of keys and values")
    return config


def load_shape(source: Path | dict[str, Any], for_training: bool = True, where: str = "the configuration") -> DecoderShape:
    """The shape that a model folder, a config.json or its content describes.

    Raises ModelError for an unknown model_type or a variant that is not supported; with `for_training` also for those that
    are counted and not computed.
    """
    if isinstance(source, Path):
        where = str(source / "config.json" if source.is_dir() else source)
        source = read_config(source)
    allowed = architectures() if for_training else counted()
    if not isinstance(source.get("model_type"), str):
        raise ModelError(f"{where} has no 'model_type'; allowed: {', '.join(allowed)}")
    kind: str = ALIASES.get(source["model_type"], source["model_type"])
    if "." in kind:  # a folder from elsewhere must not choose what is imported; only a recipe names a package.module
        raise ModelError(f"{where}: unknown model_type '{kind}'; allowed: {', '.join(allowed)}")
    if for_training:
        check_architecture(kind, f"{where}, model_type")
    elif kind not in allowed:
        raise ModelError(f"{where}: unknown model_type '{kind}'; {did_you_mean(kind, allowed)}")
    return shape_class(kind).from_config(source, where, for_training)


def known_shapes() -> dict[str, dict[str, Any]]:
    """Published configurations by name, each with its `source`."""
    return tomllib.loads(KNOWN.read_text(encoding="utf-8"))


def find_shape(name_or_path: str | Path) -> DecoderShape:
    """The shape of a published model by its name, or of a model folder, config.json or recipe, trainable or not.

    Raises ModelError with the nearest name for what is neither.
    """
    name, known = str(name_or_path), known_shapes()
    if name.lower() in known:
        return load_shape(known[name.lower()], for_training=False)
    if Path(name).suffix == ".toml":
        return _of_recipe(load_recipe(name), name)
    if Path(name).exists():
        return load_shape(Path(name), for_training=False)
    guess = nearest(name.lower(), known)
    raise ModelError(f"'{name}' is neither a known model nor a model folder, config.json or recipe; "
                     + (f"did you mean '{guess}'? " if guess else "") + f"known: {', '.join(known)}")


def _of_recipe(recipe: Recipe, name: str) -> DecoderShape:
    """The shape that a recipe describes, or the plan that it has; ModelError with what to write when sizes are left open."""
    plan = RunFolder(runs_root() / recipe.name).plan if recipe.plan.file == "auto" else Path(recipe.plan.file)
    if plan.is_file():
        recipe = recipe.with_plan(read_plan(plan), str(plan))
    keys: dict[str, Any] = recipe.model.given()
    if recipe.data.vocab_size or recipe.data.tokenizer:
        keys["vocab_size"] = filled_up(recipe.data.vocab_size or tokenizer_size(recipe.data.tokenizer or ""))
    needed = [f.name for f in fields(shape_class(recipe.model.architecture)) if f.default is MISSING]
    if missing := [f"{'data' if key == 'vocab_size' else 'model'}.{key}" for key in needed if key not in keys]:
        raise ModelError(f"{name} leaves {', '.join(missing)} open, and there is no plan in {plan}: write them, or let "
                         f"`athanor plan {name}` choose them, or name a published model")
    return load_shape(keys | {"model_type": recipe.model.architecture}, False, f"{name}, [model] and data")


def filled_up(vocabulary: int) -> int:
    """The vocabulary of a model for a tokenizer of so many entries."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def tokenizer_size(path: str) -> int:
    """Entries of a tokenizer.json, or of a folder's (a SentencePiece model's own, none added). Raises UserError otherwise."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.exists() and (held := file.with_name(pieces.FILE)).is_file():
        return len(pieces.read_pieces(held).pieces)
    try:
        raw = read_json(file)
        ids = [token["id"] for token in raw.get("added_tokens", [])]
        ids += range(len(vocab)) if isinstance(vocab := raw["model"]["vocab"], list) else vocab.values()  # of unigrams, or pairs
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"data.tokenizer: {file} is not a tokenizer.json that can be read: {error}") from None


def _module(name: str) -> Any:
    return importlib.import_module(f"athanor.models.shapes.{name}")
