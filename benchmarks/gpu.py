"""What one card does and what the trainer makes of it: python benchmarks/gpu.py matmul|attention|block|train|peers --out DIR

From the repository's root, with PYTHONPATH=. where athanor is not installed. Each part takes under 8 minutes on an H100 or
H200 with torch 2.11 to 2.13, writes DIR/<part>.json and prints a table; `train` reads the sustained rate that `matmul` left
there. Clocks are read, never set. With --dry everything runs on a CPU with toys, which shows that the script works and
measures nothing. Exits with 1 when a measurement contradicts itself or gradients are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_measure
import gpu_train
import torch
from gpu_measure import Bench

Row = dict[str, Any]
PARTS = ("matmul", "attention", "block", "train", "peers")


def versions(bench: Bench) -> Row:
    found: Row = {"torch": torch.__version__, "cuda": torch.version.cuda, "dry": bench.is_dry}
    if not bench.is_dry:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_bytes": card.total_memory, "capability": list(torch.cuda.get_device_capability()),
                  "cudnn": torch.backends.cudnn.version()}
    return found


def matmul(bench: Bench, folder: Path) -> Row:
    return {"sustained": gpu_measure.sustained(bench), "products": gpu_measure.products(bench)}


def attention(bench: Bench, folder: Path) -> Row:
    return {"attention": gpu_measure.attention_table(bench), "element_wise": gpu_measure.element_wise(bench)}


def block(bench: Bench, folder: Path) -> Row:
    return {"gradients": gpu_train.close_to_exact(bench), "layers": gpu_train.layer_times(bench)}


def train(bench: Bench, folder: Path) -> Row:
    rate = None
    if (folder / "matmul.json").is_file():
        rate = json.loads((folder / "matmul.json").read_text())["sustained"]["sustained_flops"]
    return {"train": gpu_train.train(bench, rate)}


def peers(bench: Bench, folder: Path) -> Row:
    return {"peers": gpu_train.peers(bench)}


RUN: dict[str, Callable[[Bench, Path], Row]] = {"matmul": matmul, "attention": attention, "block": block, "train": train,
                                                "peers": peers}


def show(name: str, result: Row) -> None:
    """One line per measurement: what tells it apart, and what was found."""
    for table, rows in result.items():
        for row in rows if isinstance(rows, list) else [rows] if isinstance(rows, dict) else []:
            words = []
            for key, value in row.items():
                if key.endswith(("flops_per_second", "_flops")):
                    words.append(f"{key} {value / 1e12:.1f} T" if value else f"{key} -")
                elif key.endswith("bytes_per_second") and value:
                    words.append(f"{key} {value / 1e12:.2f} T")
                elif key.endswith("seconds") and isinstance(value, float):
                    words.append(f"{key} {value * 1e3:.3f} ms")
                elif isinstance(value, float):
                    words.append(f"{key} {value:.4g}")
                elif isinstance(value, (str, int)) and key != "of":
                    words.append(f"{key} {value}")
                elif key == "predicted_bytes":
                    words.append(f"predicted {sum(value.values()) / 2**30:.2f} GiB")
            print(f"{name:9} {table:12} {'  '.join(words)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure one card, and the trainer on it.")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="run everything at toy sizes on a CPU")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch sees none; --dry tries the script on a CPU.", file=sys.stderr)
        return 2
    bench = Bench(given.dry)
    torch.manual_seed(0)
    if given.dry:
        torch.set_num_threads(1)
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    given.out.mkdir(parents=True, exist_ok=True)
    problems = 0
    for name in given.parts:
        begin = time.perf_counter()
        bench.problems.clear()
        result = RUN[name](bench, given.out)
        show(name, result)
        for sentence in bench.problems:
            print(f"{name:9} PROBLEM      {sentence}")
        problems += len(bench.problems)
        whole = {"part": name, "versions": versions(bench), "seconds": time.perf_counter() - begin,
                 "problems": list(bench.problems), **result}
        (given.out / f"{name}.json").write_text(json.dumps(whole, indent=1))
        print(f"{name:9} {whole['seconds']:.1f} s in all")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
