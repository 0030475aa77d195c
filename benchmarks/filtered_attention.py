"""Yuan 2.0's filtered attention against plain attention: the same tokens and as many parameters, several seeds.

    python benchmarks/filtered_attention.py [--seeds 5] [--steps 300] [--hidden 96] [--runs FOLDER] [--optimizer muon]

A filter holds 2 H^2 weights a block; without it the feed-forward layer is 2 H / 3 wider instead. Both train on Python's standard
library, in turns, with the same optimizer, batches and seeds (which draw weights and the order of rows). Printed: held-out loss
of each seed, the mean of the paired differences with its 95 % interval (Student's t), and tokens per second.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from forecast_error import athanor

RECIPE = """
name = "{name}"
seed = {seed}
[data]
vocab_size = 4096
[[data.source]]
name = "stdlib"
kind = "python"
[model]
architecture = "{architecture}"
hidden_size = {hidden}
intermediate_size = {width}
num_hidden_layers = 4
num_attention_heads = {heads}
tie_word_embeddings = true
[parallel]
dp_shard = 1
[[stage]]
name = "pretrain"
optimizer = "{optimizer}"
learning_rate = {rate}
steps = {steps}
seq_len = 256
global_batch_tokens = 2048
micro_batch_size = 8
precision = "fp32"
evaluate_every = {steps}
checkpoint_every = {steps}
"""
T_975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees of freedom


def train(architecture: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: parameters, held-out loss at its end, tokens per second of the median step."""
    hidden = options.hidden
    width = 8 * hidden // 3 // 32 * 32 + (0 if architecture == "yuan" else 2 * hidden // 3)
    name = f"{architecture}-{seed}"
    file = options.runs / f"{name}.toml"
    file.write_text(RECIPE.format(name=name, seed=seed, architecture=architecture, hidden=hidden, width=width, heads=hidden // 32,
                                  steps=options.steps, optimizer=options.optimizer, rate=options.learning_rate))
    data = options.runs / "data"
    if not data.exists():
        athanor("data", "build", str(file), runs=options.runs)
        data.symlink_to((options.runs / name / "data").resolve())
    athanor("train", str(file), "--stage", "pretrain", "--data", str(data.resolve()), runs=options.runs)
    stage = options.runs / name / "pretrain"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    seconds = statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)
    config = json.loads((stage / "model" / "config.json").read_text())
    return {"architecture": architecture, "seed": seed, "loss": losses[-1], "tokens_per_second": 2048 / seconds,
            "intermediate_size": config["intermediate_size"], "parameters": parameters(stage / "model")}


def parameters(folder: Path) -> int:
    from athanor.models.huggingface import read_shape

    return read_shape(folder).parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--runs", type=Path, default=Path("runs/filtered_attention"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {"llama": [], "yuan": []}
    for seed in range(options.seeds):
        for architecture in sorted(found, reverse=bool(seed % 2)):
            result = train(architecture, seed, options)
            found[architecture].append(result)
            print(f"{architecture:6} seed {seed}: {result['parameters']:,} parameters, held-out loss {result['loss']:.4f}, "
                  f"{result['tokens_per_second']:,.0f} tokens/s", flush=True)
    gains = [plain["loss"] - filtered["loss"] for plain, filtered in zip(found["llama"], found["yuan"], strict=True)]
    print(f"loss without the filter - with it: {statistics.mean(gains):+.4f}", end="")
    if len(gains) > 1:
        half = T_975[min(9, len(gains) - 1)] * statistics.stdev(gains) / math.sqrt(len(gains))
        low, high = statistics.mean(gains) - half, statistics.mean(gains) + half
        print(f" (95 %: {low:+.4f} to {high:+.4f}), {len(gains)} pairs", end="")
    speed = statistics.median(filtered["tokens_per_second"] / plain["tokens_per_second"]
                              for plain, filtered in zip(found["llama"], found["yuan"], strict=True))
    print(f"\ntokens/s with the filter / without: {speed:.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
