"""What a checkpoint holds, put together without the code that loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from athanor.foundation.run_folder import read_json


def assemble(path: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, put together by its index; every element must be there once."""
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    out = {}
    for key, entry in read_json(path / "index.json")["tensors"].items():
        whole = torch.full(entry["shape"], torch.nan, dtype=getattr(torch, entry["dtype"]))
        for part in entry["parts"]:
            place = whole[tuple(slice(a, a + n) for a, n in zip(part["offset"], part["shape"], strict=True))]
            assert place.isnan().all(), f"{key} is stored twice"
            place.copy_(files[part["file"]][key])
        assert not whole.isnan().any(), f"{key} is not stored in full"
        out[key] = whole
    return out
