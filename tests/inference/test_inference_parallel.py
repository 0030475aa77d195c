"""Tensor-parallel ranks keep one schedule and give the answers of one rank."""

from __future__ import annotations

from pathlib import Path

import inference_ranks
import models_ranks

from athanor.foundation.launch import run_ranks
from athanor.inference.engine import Sampling, generate
from athanor.models.initialize import initialize


def test_tensor_parallel_ranks_answer_as_one_does(tmp_path: Path) -> None:
    model = models_ranks.build(False)
    initialize(model, 7)
    wanted = generate(model, inference_ranks.PROMPTS, Sampling(**inference_ranks.ASKED))
    assert len({tuple(answer) for answer in wanted}) == len(wanted)
    found = run_ranks("inference_ranks:tensor_parallel_answers", {}, 2, log_folder=tmp_path, threads=1, timeout=60)
    assert found == [wanted, wanted]
