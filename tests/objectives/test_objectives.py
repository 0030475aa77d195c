"""Batches and objectives: documents never touch, what does not count weighs nothing, and sums are over global counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from athanor.foundation.errors import RecipeError
from athanor.models.context import Scored
from athanor.objectives.batch import collate, count_kept, empty_row, most_documents
from athanor.objectives.find import MEMBERS, load_objective, names

SEQ_LEN = 8


def row(tokens: list[int], starts: list[int], weight: list[float]) -> dict[str, Any]:
    return {"tokens": np.array(tokens, dtype=np.int32), "starts": np.array(starts, dtype=np.int32),
            "weight": np.array(weight, dtype=np.float32)}


ROWS = [row(list(range(10, 19)), [0, 3], [1, 1, 0, 1, 1, 1, 1, 1]),
        row(list(range(20, 29)), [0, 1, 5], [0, 0, 1, 1, 1, 0, 0, 0])]


def test_columns_stand_side_by_side_and_positions_begin_anew() -> None:
    batch = collate(ROWS, SEQ_LEN)
    assert batch["tokens"].tolist() == [*range(10, 18), *range(20, 28)]
    assert batch["targets"].tolist() == [*range(11, 19), *range(21, 29)]
    assert batch["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 1, 2]
    assert batch["cu_seqlens"][:6].tolist() == [0, 3, 8, 9, 13, 16] and set(batch["cu_seqlens"][6:].tolist()) == {16}
    assert {key: value.dtype.name for key, value in batch.items() if isinstance(value, np.ndarray)} == {
        "tokens": "int64", "targets": "int64", "weight": "float32", "positions": "int64", "cu_seqlens": "int32"}


def test_rows_of_one_document_each_are_even() -> None:
    assert not collate(ROWS, SEQ_LEN)["is_even"] and not collate([empty_row(SEQ_LEN), ROWS[0]], SEQ_LEN)["is_even"]
    assert collate([empty_row(SEQ_LEN)] * 2, SEQ_LEN)["is_even"]


def test_the_form_of_a_batch_depends_on_its_size_alone() -> None:
    fullest = row(list(range(9)), [0, 1, 3, 5, 7], [1] * 8)  # the end of one document, then documents of two tokens
    assert most_documents(2, SEQ_LEN) == 2 * len(fullest["starts"])
    crowded, sparse = collate([fullest, fullest], SEQ_LEN), collate([ROWS[0], empty_row(SEQ_LEN)], SEQ_LEN)
    assert {k: np.shape(v) for k, v in crowded.items()} == {k: np.shape(v) for k, v in sparse.items()}


def test_padding_is_no_work() -> None:
    tokens, keys = count_kept(collate(ROWS, SEQ_LEN))
    lengths = [3, 5, 4]  # the second row's first token and its last document carry no weight
    assert tokens == sum(lengths) and keys == sum(n * (n + 1) // 2 for n in lengths)
    assert count_kept(collate([empty_row(SEQ_LEN)], SEQ_LEN)) == (0, 0)


@pytest.mark.parametrize("name", names())
def test_every_objective_keeps_the_contract(name: str) -> None:
    objective = load_objective(name)
    batch = objective.collate(ROWS, SEQ_LEN)
    counts = objective.count(batch)
    assert counts["tokens"] == 10.0
    logits = torch.randn(16, 40, dtype=torch.float64, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["targets"]), reduction="none")
    scored = Scored((nll * torch.from_numpy(batch["weight"])).sum(), -nll, torch.logsumexp(logits, 1))
    value, metrics = objective.loss(scored, batch, {key: 4 * count for key, count in counts.items()})
    by_hand = sum(w * -torch.log_softmax(logits[i], 0)[t] for i, (t, w) in enumerate(zip(batch["targets"], batch["weight"],
                                                                                        strict=True)))
    torch.testing.assert_close(value, by_hand / 40.0)
    summed, count = metrics["loss"]
    assert count == 10.0 and not summed.requires_grad
    value.backward()
    assert logits.grad is not None and not logits.grad[batch["weight"] == 0].any()


def test_an_unknown_objective_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"objective 'pretrian' is unknown; did you mean 'pretrain'\?"):
        load_objective("pretrian")
    with pytest.raises(RecipeError, match=r"'json.decoder' lacks NEEDS, METRICS, collate"):
        load_objective("json.decoder")
    assert all(hasattr(load_objective("athanor.objectives.zoo.sft"), member) for member in MEMBERS)
