"""Is this a Hugging Face folder that can be registered? Reads only JSON and safetensors headers, never a pickle."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import ModelError
from athanor.foundation.run_folder import hash_value, read_json
from athanor.registry.tokens import token_ids

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json"}
HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Facts:
    """What a model folder says of itself: its architecture's name and the number of stored parameters."""

    architecture: str
    parameters: int


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [begin, end) of a safetensors file, its dtype by that format's name, and its shape."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int
    end: int


def model_files(folder: Path) -> list[Path]:
    """The files of a model, sorted; hidden ones (a clone's .git, a downloader's cache) are no part of it."""
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def check_model_folder(folder: Path) -> Facts:
    """Read what `folder` is, or raise ModelError with the first thing that is missing, damaged or refused."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; a model is a Hugging Face folder with config.json, "
                         "safetensors weights and a tokenizer")
    inside = [str(file.parent) for file in sorted(folder.glob("*/model/config.json"))]
    if inside and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is a run folder; its model{'s are' if len(inside) > 1 else ' is'} {', '.join(inside)}")
    for file in model_files(folder):
        if file.suffix in PICKLES:
            raise ModelError(f"{file} may be a pickle, which can run code when it is loaded; save the weights as "
                             "safetensors and remove it")
    config = read_config(folder)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        options = ", or ".join(" with ".join(names) for names in TOKENIZERS)
        raise ModelError(f"{folder} has no tokenizer; expected {options}")
    tensors = read_tensors(folder)
    embedding = tensors.get("model.embed_tokens.weight")
    expected = [config.get("vocab_size"), config.get("hidden_size")]
    if embedding is not None and None not in expected and embedding.shape != expected:
        raise ModelError(f"{folder}: model.embed_tokens.weight has shape {embedding.shape}, but config.json says "
                         f"vocab_size, hidden_size = {expected}")
    blocks, layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}, config.get("num_hidden_layers")
    if blocks and isinstance(layers, int) and len(blocks) < layers:
        raise ModelError(f"{folder}: its weights are of {len(blocks)} layers, but config.json says num_hidden_layers = {layers}")
    largest = max(token_ids(folder).values(), default=-1)
    rows = embedding.shape[0] if embedding else config.get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise ModelError(f"{folder}: its tokenizer.json has ids up to {largest}, but its weights know only {rows} from 0 on; "
                         "it is the tokenizer of another model")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return Facts(str(name), sum(math.prod(entry.shape) for entry in tensors.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, which must name its architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; a model is a Hugging Face folder")
    config = read_json(path)
    if not isinstance(config, dict) or not ((isinstance(config.get("architectures"), list) and config["architectures"])
                                            or isinstance(config.get("model_type"), str)):
        raise ModelError(f"{path} names neither 'architectures' nor 'model_type'")
    return config


def read_tensors(folder: Path) -> dict[str, Entry]:
    """All tensors by name, from the headers of model.safetensors or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise ModelError(f"{folder} has no weights; expected model.safetensors, or model.safetensors.index.json with its shards")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} has no 'weight_map' that names a shard for each tensor")
    headers: dict[str, dict[str, Entry]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ModelError(f"{index} names the shard '{shard}', which is not in {folder}")
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise ModelError(f"{folder / shard} does not hold '{name}', which {index.name} says it does")
        tensors[name] = headers[shard][name]
    return tensors


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors by name of one safetensors file, whose length must be what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path} is a pointer of Git LFS, not the weights; `git lfs pull` fetches them")
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(HEADER_LIMIT_BYTES, size - 8):
            raise ModelError(f"{path} is not a safetensors file, or is cut short: {size} bytes with a header of {length}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: Entry(path, str(entry["dtype"]), [int(dim) for dim in entry["shape"]],
                                   *(8 + length + int(offset) for offset in entry["data_offsets"]))
                       for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise ModelError(f"{path} is not a safetensors file: its header cannot be read") from None
    end = max((entry.end for entry in tensors.values()), default=8 + length)
    if size != end:
        raise ModelError(f"{path} has {size} bytes, but its header describes {end}; the copy is incomplete")
    return tensors


def hashes_by_part(files: dict[str, str]) -> dict[str, str | None]:
    """One sha256 each for weights, config, tokenizer and template, from the sha256 of every file."""
    parts = {"weights": {n: h for n, h in files.items() if n.endswith((".safetensors", ".safetensors.index.json"))},
             "tokenizer": {n: h for n, h in files.items() if n in TOKENIZER_FILES}}
    return {"weights": hash_value(parts["weights"]), "config": files.get("config.json"),
            "tokenizer": hash_value(parts["tokenizer"]), "template": files.get("chat_template.jinja")}
