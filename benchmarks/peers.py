"""Our training step beside Hugging Face Trainer's and a hand-written plain-torch loop of nanoGPT's kind.

    python benchmarks/peers.py [--rounds N] [--json] [--threads 2] [--only 64 128] [--quick]

Same shape, initial weights, rows, batch, dtype (fp32), threads, attention (SDPA) and AdamW; each reads its rows, clips and
updates; nobody logs, saves or evaluates. They take turns in one process, Trainer's loop being the host, and train to the
same loss, which is checked. Printed: medians; ratios of neighbouring turns with 95 % bootstrap intervals, by the clock and
by processor time; and the share of the matmul rate, measured in the same run, that model FLOPs by the clock come to.
In packed rows documents are apart for ours and for Trainer (position_ids); the plain loop has no such thing.
At the end the whole trainer (`train_stage`: metrics, meter and all) runs on the packed rows of the last case.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_speed import Plain
from pairs import Stopwatch, Turn, compare, interval_text, timed
from torch import nn
from workload import equal_rows, prepare_run, train

from athanor.cluster.operators import matmul_rows
from athanor.cluster.timing import Clock
from athanor.data.rows import Row, Rows, open_rows
from athanor.foundation.intervals import Recorder, activate
from athanor.models.context import Scored
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.objectives.batch import collate
from athanor.objectives.find import load_objective
from athanor.parallel.stages import Stages
from athanor.train.optimizer import BETAS, EPSILON, Optimizer, is_decayed
from athanor.train.step import Trainee, run_step

SEQ_LEN, VOCABULARY, MODULES = 256, 4096, 120
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
LOSS_TOLERANCE = 2e-2  # between contestants after all their steps
OURS, PLAIN, TRAINER = "athanor", "plain torch", "Trainer"


@dataclass(frozen=True)
class Case:
    """A shape, the rows of a step, and the steps of a turn."""

    hidden_size: int
    intermediate_size: int
    layers: int
    rows: int
    steps: int
    is_packed: bool = False

    @property
    def shape(self) -> DecoderShape:
        return DecoderShape(vocab_size=VOCABULARY, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
                            num_hidden_layers=self.layers, num_attention_heads=max(2, self.hidden_size // 64),
                            tie_word_embeddings=True)

    @property
    def title(self) -> str:
        return f"hidden {self.hidden_size}, {self.rows * SEQ_LEN} tokens a step{', packed' if self.is_packed else ''}"


CASES = (Case(512, 1376, 2, 16, 1), Case(256, 704, 4, 16, 1), Case(128, 352, 4, 16, 2), Case(64, 192, 4, 2, 20),
         Case(128, 352, 4, 16, 2, is_packed=True), Case(64, 192, 4, 2, 20, is_packed=True))
QUICK = (Case(16, 32, 1, 2, 1), Case(16, 32, 1, 2, 1, is_packed=True))


def initial_weights(shape: DecoderShape) -> dict[str, torch.Tensor]:
    model = build(shape)
    initialize(model, 0)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def adamw(named: list[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """What our Optimizer does, for the others."""
    groups = [{"params": [p for n, p in named if is_decayed(n, p) == decayed], "weight_decay": WEIGHT_DECAY * decayed}
              for decayed in (True, False)]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


class Ours:
    """The trainer's own step on one rank, its intervals recorded as they are in a run."""

    def __init__(self, case: Case, rows: Rows) -> None:
        self.case, self.rows, self.step = case, rows, 0
        self.model = build(case.shape)
        self.model.load_state_dict(initial_weights(case.shape))
        stages = Stages.alone(self.model)
        self.trainee = Trainee(stages, stages.mesh, load_objective("pretrain"), Optimizer(stages, "adamw", WEIGHT_DECAY))

    def turn(self) -> None:
        activate(Recorder())
        for _ in range(self.case.steps):
            batch = self.trainee.objective.collate(self.rows.take(self.step * self.case.rows, self.case.rows), SEQ_LEN)
            run_step(self.trainee, [batch], LEARNING_RATE, CLIP)
            self.step += 1
        activate(None)

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())


class PlainLoop:
    """get_batch, forward, backward, clip, update: what fits on a page."""

    def __init__(self, case: Case, rows: Rows) -> None:
        self.case, self.rows, self.step = case, rows, 0
        self.model = Plain(case.shape, initial_weights(case.shape))
        self.optimizer = adamw([(name.replace("/", "."), p) for name, p in self.model.w.named_parameters()])

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        taken = self.rows.take(self.step * self.case.rows, self.case.rows)
        tokens = torch.from_numpy(np.stack([row["tokens"] for row in taken]).astype(np.int64))
        tokens, targets = tokens[:, :-1], tokens[:, 1:].clone()
        targets[:, -1] = -100  # of the next document
        return tokens, targets

    def turn(self) -> None:
        for _ in range(self.case.steps):
            loss = self.model(*self.get_batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): p for name, p in self.model.w.named_parameters()}


class TrainerRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same rows as transformers wants them: labels are the inputs, the first token of a document is not predicted."""

    def __init__(self, rows: Rows, count: int, is_packed: bool) -> None:
        self.rows, self.count, self.is_packed = rows, count, is_packed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (row,) = self.rows.take(index, 1)
        tokens = torch.from_numpy(row["tokens"][:-1].astype(np.int64))
        labels = tokens.clone()
        labels[torch.from_numpy(row["starts"].astype(np.int64))] = -100
        found = {"input_ids": tokens, "labels": labels}
        return {**found, "position_ids": torch.from_numpy(positions(row))} if self.is_packed else found


def positions(row: Row) -> np.ndarray[Any, Any]:
    """Each token's number in its document."""
    starts = row["starts"].astype(np.int64)
    return np.arange(SEQ_LEN) - np.repeat(starts, np.diff(np.append(starts, SEQ_LEN)))


def host(case: Case, rows: Rows, rounds: int, folder: Path,
         others: Callable[[int], None]) -> tuple[list[Turn], dict[str, torch.Tensor]]:
    """Run Trainer for `rounds` turns and one to warm up; after each of its turns the others take theirs."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = LlamaForCausalLM(LlamaConfig(**{**case.shape.to_config(), "use_cache": False}))
    missing = model.load_state_dict(initial_weights(case.shape), strict=False).missing_keys
    assert missing == ["lm_head.weight"], f"weights that only the peer has: {missing}"
    turns: list[Turn] = []

    class Host(TrainerCallback):
        watch = Stopwatch()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % case.steps == 0:
                turns.append(self.watch.read())
                others(len(turns) - 1)
                self.watch = Stopwatch()

    steps = (rounds + 1) * case.steps
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, max_steps=steps, per_device_train_batch_size=case.rows,
        train_sampling_strategy="sequential", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=CLIP,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        logging_nan_inf_filter=False, dataloader_pin_memory=False)
    trainer = Trainer(model, arguments, train_dataset=TrainerRows(rows, steps * case.rows, case.is_packed),
                      optimizers=(adamw(list(model.named_parameters())), None), callbacks=[Host()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return turns[1:], dict(model.named_parameters())


def run_case(case: Case, rows: Rows, rounds: int, folder: Path) -> dict[str, Any]:
    """All turns of one case; each contestant has then made the same steps on the same rows."""
    contestants: dict[str, Any] = {OURS: Ours(case, rows)}
    if not case.is_packed:
        contestants[PLAIN] = PlainLoop(case, rows)
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}

    def others(number: int) -> None:
        order = list(contestants) if number % 2 else list(contestants)[::-1]
        for name in order:
            turn = timed(contestants[name].turn)
            if number:
                turns[name].append(turn)

    theirs, weights = host(case, rows, rounds, folder, others)
    turns[TRAINER] = theirs
    check_losses(case, rows, {TRAINER: weights, **{name: c.weights() for name, c in contestants.items()}})
    taken = [collate(rows.take(step * case.rows, case.rows), SEQ_LEN) for step in range(8)]
    flops = case.shape.flops(case.rows * SEQ_LEN, float(np.mean([batch["positions"] + 1 for batch in taken]))) * case.steps
    return {"case": case.title, "tokens": case.rows * SEQ_LEN * case.steps, "flops": flops, 
        "contestants": compare(turns, OURS)}


@torch.no_grad()
def check_losses(case: Case, rows: Rows, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Every contestant's weights, scored by our model on fresh rows, have learned the same."""
    batch = collate(rows.take(10**6, 8), SEQ_LEN)
    columns = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}
    model, found = Ours(case, rows), {}
    for name, state in weights.items():
        model.model.load_state_dict(state)
        scored = model.trainee.score(model.model, columns["tokens"], columns)
        assert isinstance(scored, Scored)
        found[name] = float(scored.weighted_sum / columns["weight"].sum())
    assert max(found.values()) - min(found.values()) < LOSS_TOLERANCE, f"{case.title}: unequal losses {found}"


def print_case(found: dict[str, Any], peak_flops: float) -> None:
    print(f"\n{found['case']}", file=sys.stderr)
    for name, row in found["contestants"].items():
        row["tokens_per_second"] = found["tokens"] / row["wall_seconds"]
        row["share_of_matmul_rate"] = found["flops"] / row["wall_seconds"] / peak_flops
        print(f"  {name:12} {row['tokens_per_second']:8.0f} tokens/s, {row['share_of_matmul_rate']:5.1%} of the matmul rate"
              + ("" if name == OURS else f"; its time / ours: {interval_text(row['wall_ratio'])} by the clock, "
                 f"{interval_text(row['cpu_ratio'])} of processor time"), file=sys.stderr)


def results(cases: Sequence[Case], rounds: int, is_quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Each case's result, and last the whole trainer's (on all cores)."""
    recipe = prepare_run(folder, 320 if is_quick else VOCABULARY, 4 if is_quick else MODULES)
    packed = open_rows(folder / "data", "documents", SEQ_LEN, 0)
    equal = equal_rows(folder, VOCABULARY, SEQ_LEN, 64 if is_quick else 2048)
    for case in cases:
        yield run_case(case, packed if case.is_packed else equal, rounds, folder)
    steps = 4 if is_quick else 200
    whole = train(recipe, cases[-1].shape, 1, f"stage.pretrain.steps={steps}", f"stage.pretrain.seq_len={SEQ_LEN}",
                  f"stage.pretrain.global_batch_tokens={cases[-1].rows * SEQ_LEN}",
                  f"stage.pretrain.micro_batch_size={cases[-1].rows}", f"stage.pretrain.learning_rate={LEARNING_RATE}",
                  f"stage.pretrain.evaluate_every={steps}", f"stage.pretrain.checkpoint_every={steps}")
    yield {"case": f"train_stage, {cases[-1].title}", "tokens_per_second": whole["tokens_per_second"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", metavar="HIDDEN", help="cases of these hidden sizes")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    rounds = 2 if options.quick else options.rounds
    _, peak_flops = matmul_rows(Clock(torch.device("cpu")), "fp32", 0.2 if options.quick else 6.0)
    print(f"{torch.get_num_threads()} threads, matmul rate {peak_flops / 1e9:.0f} GFLOP/s, {rounds} rounds", file=sys.stderr)
    cases = QUICK if options.quick else [case for case in CASES if not options.only or case.hidden_size in options.only]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for result in results(cases, rounds, options.quick, Path(folder)):
            found.append(result)
            if "contestants" in result:
                print_case(result, peak_flops)
            else:
                print(f"\n{result['case']}: {result['tokens_per_second']:.0f} tokens/s by the clock", file=sys.stderr)
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "matmul_flops": peak_flops, "rounds": rounds, "cases": found}))


if __name__ == "__main__":
    main()
