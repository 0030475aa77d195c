"""Tensor-parallel ranks keep one schedule and give the answers of one rank."""

from __future__ import annotations

from pathlib import Path

import inference_ranks
import models_ranks
import pytest

from athanor.foundation.launch import run_ranks
from athanor.inference.engine import generate


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "yuan", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_answer_as_one_does(tmp_path: Path, architecture: str) -> None:
    model = models_ranks.build(False, architecture)
    models_ranks.initialize(model, 7)
    wanted = generate(model, inference_ranks.PROMPTS, **inference_ranks.ASKED)
    assert len({tuple(answer) for answer in wanted}) == len(wanted)
    found = run_ranks("inference_ranks:tensor_parallel_answers", {"architecture": architecture}, 2, log_folder=tmp_path,
                      threads=1, timeout=60)
    assert found == [wanted, wanted]
