"""How the model does while it trains: the loss on held-out rows, and a few texts it writes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from athanor.data.rows import Row, Rows
from athanor.data.text.tokenizer import Tokenizer
from athanor.evaluate.subject import spread
from athanor.foundation.intervals import activate, interval
from athanor.inference.engine import Engine
from athanor.inference.scheduler import Sampling
from athanor.models.decoder import Decoder
from athanor.objectives.batch import empty_row
from athanor.parallel.exact import fold
from athanor.train import beat
from athanor.train.meter import Meter
from athanor.train.step import Trainee, to_device

PROMPTS = 2
MOST_ROWS = 64  # that are looked through for prompts
PROMPT_TOKENS = 24  # of a document, to be gone on with
SAMPLE_TOKENS = 64


@contextlib.contextmanager
def whole(account: str, meter: Meter) -> Iterator[None]:
    """Put all that happens inside into one account, waiting for other ranks included."""
    with interval(account):
        activate(None)
        try:
            yield
        finally:
            activate(meter.recorder)


@torch.no_grad()
def validate(trainee: Trainee, rows: Rows, seq_len: int, micro_batch_size: int, most_rows: int | None = None) -> float | None:
    """Mean loss per token over one pass of the held-out rows, over all ranks; None when there are none.

    Of more than `most_rows`, so many that are spread over all of them, the same in every layout.
    """
    mesh, objective = trainee.mesh, trainee.objective
    together, chosen = micro_batch_size * mesh.layout.data_ranks, spread(range(rows.count), most_rows)
    sums = torch.zeros(-(-len(chosen) // micro_batch_size), 2, dtype=torch.float64, device=mesh.device)  # of each micro-batch
    for first in range(0, len(chosen), together):
        beat.tick()
        begin = first + mesh.data_rank * micro_batch_size
        mine = [row for index in chosen[begin:begin + micro_batch_size] for row in rows.take(index, 1)]
        mine += [empty_row(seq_len)] * (micro_batch_size - len(mine))  # every rank makes as many forward passes
        batch = objective.collate(mine, seq_len)
        columns = to_device(batch, mesh)
        if trainee.runner is not None:
            scored = trainee.runner.forward(columns, trainee.score)
        else:
            scored = trainee.score(trainee.stages.last, columns["tokens"], columns)
        if scored is not None and begin < len(chosen):
            _, found = objective.loss(scored, columns, dict.fromkeys(objective.count(batch), 1.0))
            summed, count = found["loss"]
            sums[begin // micro_batch_size] = torch.stack([summed.double(), torch.full_like(summed, count, dtype=torch.float64)])
    for sharded in trainee.sharded:
        sharded.rest()
    if not mesh.counts_tokens:
        sums.zero_()
    loss, count = fold(mesh.sum(sums).t()).tolist() if len(sums) else (0.0, 0.0)
    return loss / count if count else None


class Sampler:
    """Lets the model go on with beginnings of held-out documents, or answer held-out questions, on rank 0.

    It keeps a whole copy of the model there, filled from the ranks' shards each time.
    """

    def __init__(self, trainee: Trainee, template: Decoder, rows: Rows, data: str, tokenizer: Path) -> None:
        self.trainee, self.copy = trainee, None
        if trainee.mesh.rank == 0:
            self.tokenizer = Tokenizer.load(tokenizer)
            self.prompts = choose_prompts(rows, data, self.tokenizer.bos_id)
            shape = template.shape
            self.copy = copy.deepcopy(template).to_empty(device=trainee.mesh.device).requires_grad_(False).eval()
            self.room = shape.max_position_embeddings
            self.engine = Engine(self.copy, cache_tokens=PROMPTS * self.room)

    @torch.no_grad()
    def __call__(self, step: int) -> list[dict[str, Any]]:
        """Rows for samples.jsonl on rank 0 (greedy, so that they can be compared over steps); every rank must call."""
        targets = dict(self.copy.named_parameters()) if self.copy is not None else {}
        with self.trainee.optimizer.exact():
            for name in self.trainee.stages.tensors:
                gathered = self.trainee.stages.whole(name)
                if gathered is not None:
                    targets[name].copy_(gathered)
        if self.copy is None:
            return []
        self.engine.load_weights(str(step))
        stop = (self.tokenizer.eos_id,)
        requests = [self.engine.submit(prompt, Sampling(max_new_tokens=min(SAMPLE_TOKENS, self.room - len(prompt)),
                                                        stop_token_ids=stop)) for prompt in self.prompts]
        self.engine.drain()
        return [{"step": step, "prompt": self.tokenizer.decode(prompt), "text": self.tokenizer.decode(request.token_ids)}
                for prompt, request in zip(self.prompts, requests, strict=True)]


def choose_prompts(rows: Rows, data: str, bos_id: int) -> list[list[int]]:
    """The first tokens of held-out documents, or the question of held-out conversations."""
    prompts: list[list[int]] = []
    for row in rows.take(0, min(rows.count, MOST_ROWS)) if rows.count else []:
        prompts += [prompt for prompt in _beginnings(row, data) if prompt[0] == bos_id]
    apart = max(1, len(prompts) // PROMPTS)
    return prompts[::apart][:PROMPTS]


def _beginnings(row: Row, data: str) -> list[list[int]]:
    """Prompts of the documents that begin in a row: up to the first token that is to be predicted, but for documents
    some tokens more."""
    out = []
    ends = [*row["starts"][1:], len(row["weight"])]
    for start, end in zip(row["starts"], ends, strict=True):
        wanted = row["weight"][start:end].nonzero()[0]
        if len(wanted) == 0 or (data == "documents" and end - start <= PROMPT_TOKENS):
            continue
        length = PROMPT_TOKENS if data == "documents" else int(wanted[0]) + 1
        out.append(row["tokens"][start:start + length].tolist())
    return out
