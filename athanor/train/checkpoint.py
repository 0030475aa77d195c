"""Checkpoints of a stage: safetensors shards and a JSON index of global shapes, so that any layout reads its part of them.

`step-00000100/` holds rank-*.safetensors, index.json, meta.json and COMPLETE with the sha256 of every file. It is built
under another name and renamed last; a folder without an intact COMPLETE is no checkpoint.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from athanor.foundation.errors import CheckpointError, DiskError, UserError
from athanor.foundation.placement import Box, Placement
from athanor.foundation.run_folder import disk_errors, hash_file, read_json, sweep, write_json
from athanor.parallel.mesh import Mesh
from athanor.parallel.stages import Stages
from athanor.train.optimizer import Optimizer

FORMAT = 1
KEPT = 2  # checkpoints that stay
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself: how far the stage was, in which layout, and what it had read."""

    step: int
    samples: int
    tokens: int
    updates: int
    attempt: int
    data_shards: int
    layout: dict[str, int]
    hashes: dict[str, str]
    versions: dict[str, str]
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


def save(folder: Path, meta: Meta, stages: Stages, optimizer: Optimizer) -> Path:
    """Write `folder/step-N`, all ranks together, and remove all but it and the KEPT - 1 before it.

    Raises DiskError on every rank when one of them could not write; then nothing of the new checkpoint is left.
    """
    mesh, target = stages.mesh, folder / f"step-{meta.step:08d}"
    building = folder / f".{target.name}.building-{meta.attempt}"
    if mesh.rank == 0:
        shutil.rmtree(building, ignore_errors=True)
    _together(mesh, building, lambda: building.mkdir(parents=True) if mesh.rank == 0 else None)
    parts = _together(mesh, building, lambda: _write_shards(building, stages, optimizer))

    def finish() -> None:
        if mesh.rank == 0:
            _write_index(building, parts, meta)
            shutil.rmtree(target, ignore_errors=True)
            building.rename(target)

    _together(mesh, building, finish)
    if mesh.rank == 0:
        found = list_checkpoints(folder)
        kept = [path for path in found if path <= target][:KEPT]  # later ones were damaged, or we would have gone on from there
        for path in found:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
    return target


def _together(mesh: Mesh, building: Path, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on every rank; its results by rank, or the first rank's DiskError on all of them."""
    result, problem = None, None
    try:
        with disk_errors(building):
            result = work()
    except (DiskError, UserError) as error:
        problem = str(error)
    gathered = mesh.collect((result, problem))
    for rank, (_, found) in enumerate(gathered):
        if found is not None:
            if mesh.rank == 0:
                shutil.rmtree(building, ignore_errors=True)
            raise DiskError(f"rank {rank} could not save: {found}")
    return [value for value, _ in gathered]


def _write_shards(building: Path, stages: Stages, optimizer: Optimizer) -> dict[str, Any]:
    """Write this rank's file, if it has anything that no rank before it has. Returns its tensors, parts and hash."""
    tensors, described, parts = {}, {}, {}
    for entry in entries(stages, optimizer):
        described[entry.key] = {"dtype": str(entry.shard.dtype).removeprefix("torch."), "shape": list(entry.placement.shape),
                                "parts": []}
        if entry.is_owned and entry.shard.numel():
            tensors[entry.key] = entry.shard.contiguous()
            parts[entry.key] = asdict(entry.placement.box())
    if not tensors:
        return {"file": None, "tensors": described, "parts": {}, "hash": None}
    path = building / f"rank-{stages.mesh.rank:05d}.safetensors"
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise DiskError(f"{path} could not be written: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"file": path.name, "tensors": described, "parts": parts, "hash": hash_file(path)}


def _write_index(building: Path, written: list[dict[str, Any]], meta: Meta) -> None:
    tensors: dict[str, Any] = {}
    for rank in written:
        for key, description in rank["tensors"].items():
            tensors.setdefault(key, description)
    for rank in written:
        for key, box in rank["parts"].items():
            tensors[key]["parts"].append({"file": rank["file"], **box})
    write_json(building / "index.json", {"format": FORMAT, "tensors": tensors})
    write_json(building / "meta.json", asdict(meta))
    hashes = {rank["file"]: rank["hash"] for rank in written if rank["file"]}
    hashes |= {name: hash_file(building / name) for name in ("index.json", "meta.json")}
    write_json(building / "COMPLETE", hashes)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, the newest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def find_intact(folder: Path, on_damage: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint whose files are all there and have the hashes that COMPLETE says; None when there is none.

    `on_damage` is told of each newer one that is not intact, and why. What a killed save left half built is removed.
    """
    if folder.is_dir():
        sweep(folder)
    for path in list_checkpoints(folder):
        reason = find_damage(path)
        if reason is None:
            return path
        on_damage(path, reason)
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        hashes = read_json(path / "COMPLETE")
    except UserError:
        return "COMPLETE is missing or damaged, so it was not written to its end"
    if not isinstance(hashes, dict) or not {"index.json", "meta.json"} <= set(hashes):
        return "COMPLETE does not list its files"
    for name, expected in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if hash_file(path / name) != expected:
            return f"{name} does not have the content that was written"
    return None


def read_meta(path: Path) -> Meta:
    """The checkpoint's meta.json. Raises CheckpointError for a newer format."""
    raw = read_json(path / "meta.json")
    if not isinstance(raw, dict) or raw.get("format", 0) > FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}; use a newer Athanor")
    return Meta(**raw)


def load(path: Path, stages: Stages, optimizer: Optimizer) -> Meta:
    """Fill weights and optimizer state from a checkpoint of any layout; each rank reads only what it holds.

    Raises CheckpointError, before anything is changed, when its keys or shapes are another model's.
    """
    meta = read_meta(path)
    tensors = read_json(path / "index.json")["tensors"]
    wanted = list(entries(stages, optimizer))
    shapes = {entry.key: list(entry.placement.shape) for entry in wanted}
    for others in stages.mesh.collect(shapes) if stages.group is not None else ():
        shapes |= others
    _check_same_model(path, tensors, shapes)
    files: dict[str, Any] = {}
    for entry in wanted:
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
