"""Two ranks of fully_shard, one thread each, against one rank with two threads, on the same cores: the real trainer.

    python benchmarks/sharding.py [--rounds N] [--json] [--quick]

Both train the same stage (same rows, same batch; the sharded ranks have half of it each) and take turns. Printed: tokens per
second of the steps after the first, the ratio of neighbouring runs with its 95 % bootstrap interval, and in which accounts of
their books the device-seconds of a step stand (no peak is given, so `kernel` is all computing). Gloo sends through loopback
sockets, so `data_parallel` is processor work too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pairs import interval_text, ratio
from workload import prepare_run, train

from athanor.models.shapes.decoder import DecoderShape

SEQ_LEN = 256
ONE, TWO = "1 rank, 2 threads", "2 ranks (dp_shard = 2)"
STEPPING = ("kernel", "data_parallel", "skew", "optimizer", "input", "metering")
SHAPES = {width: DecoderShape(vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
                              num_attention_heads=max(2, width // 64), tie_word_embeddings=True) for width in (64, 256)}
QUICK = {16: DecoderShape(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          tie_word_embeddings=True)}


def run(recipe: Path, shape: DecoderShape, ranks: int, rows: int, steps: int) -> dict[str, Any]:
    """Tokens per second, and device-seconds of a step by account."""
    found = train(recipe, shape, ranks, f"parallel.dp_shard={ranks}", f"stage.pretrain.steps={steps}",
                  f"stage.pretrain.seq_len={SEQ_LEN}", f"stage.pretrain.global_batch_tokens={rows * SEQ_LEN}",
                  f"stage.pretrain.micro_batch_size={rows // 2}", f"stage.pretrain.evaluate_every={steps}",
                  f"stage.pretrain.checkpoint_every={steps}")
    accounts = found["book"]["accounts"]
    named = {name: accounts.get(name, 0.0) / steps for name in STEPPING}
    return {"tokens_per_second": found["tokens_per_second"], "loss": found["loss"][-1], "accounts": named}


def compare(recipe: Path, shape: DecoderShape, rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """Both layouts in turns, the second of a pair first in every other round."""
    runs: dict[str, list[dict[str, Any]]] = {ONE: [], TWO: []}
    for number in range(rounds):
        for name, ranks in ((ONE, 1), (TWO, 2)) if number % 2 else ((TWO, 2), (ONE, 1)):
            runs[name].append(run(recipe, shape, ranks, rows, steps))
    losses = [each["loss"] for mine in runs.values() for each in mine]
    assert max(losses) - min(losses) < 1e-2, f"the layouts learn differently: {losses}"
    speeds = {name: [each["tokens_per_second"] for each in mine] for name, mine in runs.items()}
    return {"hidden_size": shape.hidden_size, "tokens_per_step": rows * SEQ_LEN, "speed_ratio": ratio(speeds[TWO], speeds[ONE]),
            "layouts": {name: {"tokens_per_second": statistics.median(speeds[name]),
                               "accounts": {account: statistics.median(each["accounts"][account] for each in mine)
                                            for account in STEPPING}} for name, mine in runs.items()}}


def show(found: dict[str, Any]) -> None:
    print(f"\nhidden {found['hidden_size']}, {found['tokens_per_step']} tokens a step: 2 ranks / 1 rank in tokens/s "
          f"{interval_text(found['speed_ratio'])}")
    one, two = (found["layouts"][name] for name in (ONE, TWO))
    print(f"  {'':16}{ONE:>20}{TWO:>26}\n  {'tokens/s':16}{one['tokens_per_second']:20.0f}{two['tokens_per_second']:26.0f}")
    for account in STEPPING:
        print(f"  {account:16}{1e3 * one['accounts'][account]:17.2f} ms{1e3 * two['accounts'][account]:23.2f} ms a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    options = parser.parse_args()
    shapes, rounds, steps, files = (QUICK, 1, 4, 4) if options.quick else (SHAPES, options.rounds, 30, 60)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_run(Path(folder), next(iter(shapes.values())).vocab_size, files)
        found = [compare(recipe, shape, 16, steps, rounds) for shape in shapes.values()]
    if options.json:
        print(json.dumps(found))
        return
    for each in found:
        show(each)


if __name__ == "__main__":
    main()
