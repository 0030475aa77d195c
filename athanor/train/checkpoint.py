"""Checkpoints of a stage: safetensors shards and a JSON index of global shapes, so that any layout reads its part of them.

`step-00000100/` holds rank-*.safetensors, index.json, meta.json and COMPLETE with the sha256 of every file. It is built
under another name and renamed last; a folder without an intact COMPLETE is no checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from athanor.foundation.errors import CheckpointError, UserError
from athanor.foundation.placement import Box, Placement
from athanor.foundation.run_folder import discard, hash_file, read_json, sweep, sync_folder, write_atomic, write_json
from athanor.parallel.stages import Stages
from athanor.train import beat
from athanor.train.optimizer import Optimizer

FORMAT = 1
CHUNK_BYTES = 1 << 26  # that are hashed and written at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors says
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself: how far the stage was, in which layout, what it had read, and its guards' state."""

    step: int
    samples: int
    tokens: int
    updates: int
    attempt: int
    data_shards: int
    layout: dict[str, int]
    hashes: dict[str, str]
    versions: dict[str, str]
    guards: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """One tensor to save or to fill: its key, where this rank's part of it lies, whether it is saved here, and the part."""

    key: str
    placement: Placement
    is_owned: bool
    shard: torch.Tensor


def entries(stages: Stages, optimizer: Optimizer) -> Iterator[Entry]:
    """Weights of this rank's stages under their Hugging Face names, then optimizer state."""
    placed, owned = stages.placed(), stages.owned()
    for key, parameter, shard in itertools.chain(optimizer.weights(), optimizer.state()):
        yield Entry(key, placed[parameter], parameter in owned, shard)


class Part:
    """What a rank adds to every checkpoint of its attempt: a safetensors file, if it has anything that no rank before it has.

    `shards` are what the file holds, in its order; `tensors` says of each which part of which global tensor it is.
    """

    def __init__(self, stages: Stages, optimizer: Optimizer) -> None:
        held = [entry for entry in entries(stages, optimizer) if entry.is_owned and entry.shard.numel()]
        held.sort(key=lambda entry: -entry.shard.element_size())  # so that each begins at a multiple of its element's size
        self.shards = [entry.shard for entry in held]
        self.name = f"rank-{stages.mesh.rank:05d}.safetensors" if held else None
        self.tensors: dict[str, Any] = {}
        described, self.size_bytes = {}, 0
        for entry in held:
            begin, self.size_bytes = self.size_bytes, self.size_bytes + entry.shard.nbytes
            described[entry.key] = {"dtype": DTYPES[entry.shard.dtype], "shape": list(entry.shard.shape),
                                    "data_offsets": [begin, self.size_bytes]}
            self.tensors[entry.key] = {"dtype": str(entry.shard.dtype).removeprefix("torch."), "parts": [
                {"file": self.name, **asdict(entry.placement.box())}], "shape": list(entry.placement.shape)}
        header = json.dumps(described).encode()
        header += b" " * (-len(header) % 8)
        self.header = len(header).to_bytes(8, "little") + header

    def write(self, folder: Path, content: Iterable[torch.Tensor]) -> str:
        """Write the file, with `content` as the bytes of its shards, to the disk itself. Returns its sha256.

        Hashing and writing of large chunks let other threads compute.
        """
        assert self.name is not None, "this rank has something to save"
        digest = hashlib.sha256(self.header)
        with (folder / self.name).open("wb") as file:
            file.write(self.header)
            for tensor in content:
                flat = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                for begin in range(0, len(flat), CHUNK_BYTES):
                    chunk = flat[begin:begin + CHUNK_BYTES]
                    digest.update(chunk)
                    file.write(chunk)
                    beat.tick()
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()


def join(parts: Sequence[Mapping[str, Any]]) -> str:
    """The text of index.json, from the `tensors` of every rank's part."""
    tensors: dict[str, Any] = {}
    for key, described in itertools.chain.from_iterable(part.items() for part in parts):
        if key in tensors:
            tensors[key]["parts"] += described["parts"]
        else:
            tensors[key] = {**described, "parts": list(described["parts"])}
    return json.dumps({"format": FORMAT, "tensors": tensors}, indent=1) + "\n"


def complete(building: Path, index: str, meta: Meta, hashes: Mapping[str, str]) -> None:
    """Add to the ranks' files, which have these hashes, what makes them a checkpoint; COMPLETE last."""
    write_atomic(building / "index.json", index)
    write_json(building / "meta.json", asdict(meta))
    written = {name: hash_file(building / name) for name in ("index.json", "meta.json")}
    write_json(building / "COMPLETE", {**hashes, **written})
    sync_folder(building)


def place(building: Path, target: Path) -> None:
    """Give a complete checkpoint its name; one that had it is replaced."""
    old = building.with_name(f"{building.name}-old")
    if os.path.lexists(target):
        target.rename(old)
    building.rename(target)
    sync_folder(target.parent)
    if os.path.lexists(old):
        discard(old)


def prune(found: Sequence[Path], newest: Path, keep_latest_k: int, keep_every: int) -> None:
    """Remove what need not stay of the checkpoints `found`, the newest first, now that there is a still newer one.

    Those stay that are among the latest (all if `keep_latest_k` is 0), and of steps that `keep_every` divides (none if 0).
    Later ones were damaged, or we would have gone on from there.
    """
    older = [path for path in found if path < newest]
    kept = older[:keep_latest_k - 1] if keep_latest_k else older
    kept += [path for path in older if keep_every and step_of(path) % keep_every == 0]
    for path in found:
        if path not in kept and path != newest:
            discard(path)


def claim(owner: Path, attempt: int) -> str:
    """Say in the file `owner` who saves from now on. An attempt that finds other text there than its own must not.

    What older attempts have begun to save is to be swept away after this: then none of them can complete it any more.
    """
    text = json.dumps({"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}) + "\n"
    write_atomic(owner, text)
    return text


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, the newest first."""
    try:
        return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {os.strerror(error.errno or 0).lower()}") from error


def find_intact(folder: Path, on_damage: Callable[[Path, str], None],
                is_wanted: Callable[[Path], bool] = lambda path: True) -> Path | None:
    """The newest checkpoint whose files are all there and have the hashes that COMPLETE says; None when there is none.

    `on_damage` is told of each newer one that is not intact, and why. What a killed save left half built is removed, and so
    are newer ones, damaged or not wanted: they would be gone on from, or stay in the place of good ones.
    """
    if folder.is_dir():
        sweep(folder)
    for number, path in enumerate(found := list_checkpoints(folder)):
        if (reason := find_damage(path)) is not None:
            on_damage(path, reason)
        elif is_wanted(path):
            for newer in found[:number]:
                discard(newer)
            return path
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        hashes = read_json(path / "COMPLETE")
    except UserError:
        return "COMPLETE is missing or damaged, so it was not written to its end"
    except OSError as error:
        return f"COMPLETE cannot be read: {os.strerror(error.errno or 0).lower()}"
    if not isinstance(hashes, dict) or not {"index.json", "meta.json"} <= set(hashes):
        return "COMPLETE does not list its files"
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = pool.map(lambda name: _find_damage(path / name, hashes[name]), hashes)
        return next((reason for reason in found if reason is not None), None)


def _find_damage(file: Path, expected: str) -> str | None:
    beat.tick()
    try:
        if hash_file(file) != expected:
            return f"{file.name} does not have the content that was written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {os.strerror(error.errno or 0).lower()}"
    return None


def read_meta(path: Path) -> Meta:
    """The checkpoint's meta.json. Raises CheckpointError for a newer format."""
    raw = read_json(path / "meta.json")
    if not isinstance(raw, dict) or raw.get("format", 0) > FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}; use a newer Athanor")
    try:
        return Meta(**raw)
    except TypeError:
        raise CheckpointError(f"{path / 'meta.json'} has the keys {', '.join(raw)}; it must have "
                              f"{', '.join(Meta.__dataclass_fields__)}") from None


def load(path: Path, stages: Stages, optimizer: Optimizer, hashes: Mapping[str, str] | None = None) -> Meta:
    """Fill weights and optimizer state from a checkpoint of any layout; each rank reads only what it holds.

    Raises CheckpointError, before anything is changed, when its keys or shapes are another model's, or it was not made from what
    has these `hashes`: config.toml, which tells the same, may be gone or another folder's.
    """
    meta = read_meta(path)
    if others := [name for name, value in meta.hashes.items() if hashes is not None and hashes.get(name) != value]:
        raise CheckpointError(f"{path} was made with other {', '.join(others)} than this stage has (hashes in its meta.json); "
                              "bring those back, or start anew with --fresh (of `train`, `run` or `jobs submit`)")
    tensors = read_json(path / "index.json")["tensors"]
    wanted = list(entries(stages, optimizer))
    shapes = {entry.key: list(entry.placement.shape) for entry in wanted}
    for others in stages.mesh.collect(shapes) if stages.group is not None else ():
        shapes |= others
    _check_same_model(path, tensors, shapes)
    files: dict[str, Any] = {}
    for entry in wanted:
        beat.tick()
        mine = entry.placement.box()
        for part in tensors[entry.key]["parts"]:
            box = Box(tuple(part["offset"]), tuple(part["shape"]))
            shared = box.overlap(mine)
            if shared is None:
                continue
            if part["file"] not in files:
                files[part["file"]] = safe_open(path / part["file"], framework="pt")
            piece = files[part["file"]].get_slice(entry.key)[shared.slices(box)] if box.shape else (
                files[part["file"]].get_tensor(entry.key))
            with torch.no_grad():
                entry.shard[shared.slices(mine)].copy_(piece)
    optimizer.set_updates(meta.updates)
    return meta


def _check_same_model(path: Path, found: Mapping[str, Any], wanted: Mapping[str, list[int]]) -> None:
    problems = [f"{key} is missing in it" for key in wanted if key not in found]
    problems += [f"{key} is not in the model" for key in found if key not in wanted]
    problems += [f"{key} is {found[key]['shape']} in it and {shape} in the model" for key, shape in wanted.items()
                 if key in found and found[key]["shape"] != shape]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(problems[:3])}{more}")
