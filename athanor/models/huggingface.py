"""Hugging Face folders in and out: config.json, generation_config.json and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from athanor.foundation.errors import ModelError, did_you_mean
from athanor.foundation.placement import placements
from athanor.foundation.run_folder import disk_errors, read_json, write_json
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.find import load_architecture
from athanor.models.initialize import fill
from athanor.models.prediction import Predicting
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import load_shape
from athanor.models.stored import stored

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = ("convert it where you trust it: from transformers import AutoModelForCausalLM as A; "
           "A.from_pretrained('FOLDER').save_pretrained('NEW', safe_serialization=True)")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER_ALIGNMENT = 8
SHOWN_PROBLEMS = 8
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # that old folders hold beside the weights


def read_shape(folder: Path) -> DecoderShape:
    """The shape that the folder's config.json describes.

    Without the blocks that predict further tokens where its weights have none of them: transformers leaves them out.
    """
    folder = Path(folder)
    shape = load_shape(folder)
    if shape.prediction_blocks() and any(folder.glob("model.safetensors*")):
        first = f"layers.{shape.num_hidden_layers}."
        if not any(first in name for name in _files_of_tensors(folder)):
            return shape.answering()
    return shape


def load_model(folder: Path, dtype: str = "float32") -> Decoder:
    """The model of a Hugging Face folder, ready to be called, on the CPU. Raises as `describe_model` does."""
    module = describe_model(folder, dtype).to_empty(device="cpu")
    load_weights(module, folder)
    return module.requires_grad_(False).eval()


def describe_model(folder: Path, dtype: str = "float32") -> Decoder:
    """The model of a Hugging Face folder that fits it, on the meta device: its weights take no memory yet.

    Raises ModelError for an unknown model_type, weights in a pickle, and tensors that are missing, surplus or mis-shaped.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown; {did_you_mean(dtype, DTYPES)}")
    shape, tensors = read_shape(folder), len(_files_of_tensors(folder))
    for key in ("num_hidden_layers", "num_experts", "num_nextn_predict_layers"):
        is_used = key != "num_experts" or any(product.name == "router" for product in shape.products())
        if is_used and getattr(shape, key, 0) > tensors:  # said before so many blocks are built, or names made
            raise ModelError(f"{folder}: the weights do not fit config.json: {key} = {getattr(shape, key)}, "
                             f"but there are {tensors} tensors")
    try:
        with torch.device("meta"):
            module: Decoder = load_architecture(shape.MODEL_TYPE).build(shape)
    except RuntimeError as error:
        raise ModelError(f"{folder / 'config.json'} describes a model of impossible size: {error}") from None
    _check_tensors(module, folder)
    return module.to(DTYPES[dtype])


def load_weights(module: Decoder, folder: Path) -> None:
    """Fill the parameters of a model, or of one stage, from a folder; sharded ones keep their part, tensor by tensor.

    Raises ModelError naming the tensors that are missing, surplus or mis-shaped, or no copies of what they should be copies of,
    before anything is changed.
    """
    folder = Path(folder)
    files = _check_tensors(module, folder)
    parameters, table = dict(module.named_parameters()), placements(module)
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file, _ in files.values()}

        def read(tensor: str) -> Any:
            file, name = files[tensor]
            return opened[file].get_slice(name)

        groups = stored(module)
        for group in groups:
            for copy in set(group.copies) & files.keys():
                if not (read(copy)[:] == read(group.tensors[0])[:]).all():
                    raise ModelError(f"{folder}: {copy} is no copy of {group.tensors[0]}, and only one weight is kept for both")
        for group in groups:
            for name in group.rows:
                fill(parameters[name], table[name], group.take(name, read))


def _shapes(module: Decoder) -> dict[str, tuple[int, ...]]:
    """The tensors that a folder has of a module, copies included, with their shapes."""
    return {tensor: group.shape for group in stored(module) for tensor in (*group.tensors, *group.copies)}


def _check_tensors(module: Decoder, folder: Path) -> dict[str, tuple[Path, str]]:
    """File and name there of each tensor; raises ModelError with every difference between the folder's and the module's."""
    wanted = _shapes(module)
    files = _as_causal_model({name: (file, name) for name, file in _files_of_tensors(folder).items()}, wanted)
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file, _ in files.values()}
        held = {file: set(part.keys()) for file, part in opened.items()}
        lost = [f"{own} is not in {file.name}" for file, own in files.values() if own not in held[file]]
        slices = {name: opened[file].get_slice(own) for name, (file, own) in files.items() if own in held[file]}
        problems = lost + _problems(module, wanted, {name: tuple(part.get_shape()) for name, part in slices.items()})
        problems += [f"{name} is of type {part.get_dtype()} and should be one of {', '.join(NAMES.values())}"
                     for name, part in slices.items() if part.get_dtype() not in NAMES.values()]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise ModelError(f"{folder}: the weights do not fit config.json: " + "; ".join(problems[:SHOWN_PROBLEMS])
                         + (f"; and {more} more" if more > 0 else ""))
    return files


def _as_causal_model(files: dict[str, tuple[Path, str]], wanted: Collection[str]) -> dict[str, tuple[Path, str]]:
    """The tensors under the names of a model with a head where a folder has those of its base, and without old buffers."""
    found = {name: place for name, place in files.items() if not name.endswith(BUFFERS)}
    base = next(iter(wanted)).split(".")[0] + "."
    if not any(name.startswith(base) for name in found) and any(base + name in wanted for name in found):
        return {base + name if base + name in wanted else name: place for name, place in found.items()}
    return found


def _problems(module: Decoder, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """Each difference between a module's tensors and a folder's; what other stages hold is no difference."""
    whole = set(wanted)
    if not (module.is_first and module.is_last and len(module.blocks) == module.shape.num_hidden_layers):
        with torch.device("meta"):
            whole = set(_shapes(Predicting(module.shape, on_disk=module.on_disk)))
    extra = {"lm_head.weight"} if module.shape.tie_word_embeddings else set()
    needless = {name for names in module.copies.values() for name in names}
    return ([f"{name} is missing" for name in wanted if name not in found and name not in needless]
            + [f"{name} is surplus" for name in sorted(set(found) - whole - extra)]
            + [f"{name} is {list(found[name])} and should be {list(wanted[name])}"
               for name in wanted if name in found and found[name] != wanted[name]])


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise ModelError(f"{index} has no 'weight_map' that names a file for each tensor")
        for file in sorted(set(named.values())):
            if "/" in file or not (folder / file).is_file():
                raise ModelError(f"{index} names '{file}', which is not in {folder}")
        return {name: folder / file for name, file in named.items()}
    single = folder / "model.safetensors"
    if single.exists():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read; {CONVERT}")
    raise ModelError(f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from error


def save_model(module: Decoder, folder: Path, whole: Callable[[str], Tensor | None] | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors into a folder.

    All ranks must call; rank 0 writes. The weights keep their dtype. `whole` gives each parameter in full on rank 0, where
    `module` only describes them, since ranks have parts of them.
    The folder is complete only when this returns: build it under `folder_renamed_last`.
    """
    folder = Path(folder)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    with _writing(folder / "model.safetensors") if writes else contextlib.nullcontext() as file:
        if file is not None:
            file.write(_header(module))
        for group in stored(module):
            full = [parameters[name].detach() if whole is None else whole(name) for name in group.rows]
            if file is not None:
                held = [part.cpu() for part in full if part is not None]
                assert len(held) == len(full), f"{', '.join(group.rows)}: whole on the rank that writes"
                content = group.join(held).contiguous().view(torch.uint8).numpy().data
                for _ in (*group.tensors[:1], *group.copies):
                    file.write(content)
    if writes:
        shape = module.shape
        name = next(key for key, value in DTYPES.items() if value == dtype)
        write_json(folder / "config.json", {**shape.to_config(), "dtype": name, "torch_dtype": name})
        write_json(folder / "generation_config.json", {key: id_ for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                                                       if (id_ := getattr(shape, key)) is not None})


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file


def _header(module: Decoder) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON with each tensor's dtype, shape and place."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, parameters = 0, dict(module.named_parameters())
    for group in stored(module):
        dtype = parameters[next(iter(group.rows))].dtype
        for name in (*group.tensors, *group.copies):
            start, end = end, end + math.prod(group.shape) * dtype.itemsize
            entries[name] = {"dtype": NAMES[dtype], "shape": list(group.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@torch.no_grad()
def logits(module: Decoder, token_ids: Sequence[int] | Tensor) -> Tensor:
    """[T, vocab] logits of one document. Raises ModelError for no token, and for one that the vocabulary has not."""
    ids = torch.as_tensor(token_ids)
    if ids.ndim != 1 or not len(ids) or not 0 <= ids.min() <= ids.max() < module.shape.vocab_size:
        raise ModelError(f"token ids of one document are expected, from 0 to {module.shape.vocab_size - 1}")
    found = module(ids, Packed.of([len(ids)]))
    assert isinstance(found, Tensor)
    return found
