"""What checkpoints cost the step loop: written while training goes on, against a loop that waits for them.

    python benchmarks/saving.py [--rounds N] [--ranks R …] [--json] [--quick]

Pairs of runs of the real trainer, which of a pair is first changes; on one rank, and sharded over two. Printed: how long the
loop is blocked by a save (all but a run's first, which may still wait for memory, and its last, which is waited for), alone
and as a share of the waiting loop's; and tokens per second of the steps that overlap with a save by at least half, as a share
of the others'. With 95 % bootstrap intervals over pairs. On a machine that does other things, too, nothing of it is true: the
writing thread's low priority counts among all that want its core, and steps on all cores wait for the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pairs import interval_text, ratio
from workload import prepare_run, train

from athanor.models.shapes.decoder import DecoderShape

SEQ_LEN, EVERY, SAVES = 64, 80, 4  # so far apart that a save is over before the next one begins
SHAPE = DecoderShape(vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
                     tie_word_embeddings=True)
SMALL = DecoderShape(vocab_size=1024, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
                     tie_word_embeddings=True)


def measure(recipe: Path, shape: DecoderShape, ranks: int, every: int, is_async: bool) -> dict[str, Any]:
    """One run: seconds that each save but the first and the last blocked, its bytes, and throughput while saving."""
    steps = every * SAVES
    found = train(recipe, shape, ranks, f"parallel.dp_shard={ranks}", f"stage.pretrain.steps={steps}",
                  f"stage.pretrain.seq_len={SEQ_LEN}", f"stage.pretrain.global_batch_tokens={2 * SEQ_LEN}",
                  "stage.pretrain.micro_batch_size=1", f"stage.pretrain.evaluate_every={steps}",
                  f"stage.pretrain.checkpoint_every={every}", f"stage.pretrain.save_async={str(is_async).lower()}")
    saves = [row for row in found["events"] if row["kind"] == "checkpoint"]
    seconds: dict[bool, list[float]] = {True: [], False: []}  # of steps, by whether a save is under way
    for row in found["metrics"][1:]:
        end, length = row["time"], row["step_seconds"]
        overlap = sum(max(0.0, min(end, save["time"]) - max(end - length, save["until"])) for save in saves)
        seconds[overlap >= length / 2].append(length)
    share = statistics.fmean(seconds[False]) / statistics.fmean(seconds[True]) if seconds[True] else None
    return {"blocked": statistics.median(row["seconds"] for row in saves[1:-1]), "first": saves[0]["seconds"],
            "total": statistics.median(row["total_seconds"] for row in saves[1:-1]), "size_bytes": saves[0]["size_bytes"],
            "throughput_share": share, "steps_while_saving": len(seconds[True]), "loop_seconds": found["loop_seconds"]}


def compare(recipe: Path, shape: DecoderShape, ranks: int, every: int, rounds: int) -> dict[str, Any]:
    """Pairs of both kinds of runs."""
    runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for number in range(rounds):
        for is_async in (True, False) if number % 2 else (False, True):
            runs[is_async].append(measure(recipe, shape, ranks, every, is_async))
    ours, others = runs[True], runs[False]
    shares = [run["throughput_share"] for run in ours if run["throughput_share"] is not None]
    return {"ranks": ranks, "size_bytes": ours[0]["size_bytes"],
            "blocked_seconds": {name: statistics.median(run["blocked"] for run in mine) for name, mine in
                                (("async", ours), ("sync", others))},
            "first_blocked_seconds": statistics.median(run["first"] for run in ours),
            "total_seconds": statistics.median(run["total"] for run in ours),
            "blocked_share": ratio([run["blocked"] for run in ours], [run["blocked"] for run in others]),
            "throughput_share": ratio(shares, [1.0] * len(shares)) if shares else None,
            "steps_while_saving": sum(run["steps_while_saving"] for run in ours),
            "loop_ratio": ratio([run["loop_seconds"] for run in ours], [run["loop_seconds"] for run in others])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, to see that everything runs")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    shape, every, rounds = (SMALL, 2, 1) if options.quick else (SHAPE, EVERY, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_run(Path(folder), shape.vocab_size, 4 if options.quick else 20)
        found = [compare(recipe, shape, ranks, every, rounds) for ranks in options.ranks]
    if options.json:
        print(json.dumps(found))
        return
    for each in found:
        blocked = each["blocked_seconds"]
        print(f"{each['ranks']} rank(s), {each['size_bytes'] / 1e6:,.0f} MB: blocked {blocked['async']:.3f} s of "
              f"{each['total_seconds']:.2f} (the first {each['first_blocked_seconds']:.3f}), waiting {blocked['sync']:.3f} s: "
              f"share {interval_text(each['blocked_share'])}; whole loop {interval_text(each['loop_ratio'])}")
        if each["throughput_share"] is not None:
            print(f"  throughput of {each['steps_while_saving']} steps while saving, of the others': "
                  f"{interval_text(each['throughput_share'])}")


if __name__ == "__main__":
    main()
