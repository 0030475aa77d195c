"""Greedy answers, logits and token ids of llama.cpp from a GGUF file; runs in its own environment.

    python ask_llama_cpp.py FOLDER    # reads job.json there and writes answers.json, logits.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def plain_parameters() -> llama_cpp.llama_model_params:
    """Weights stay as the file has them: the kernels for AMX, which repack Q8_0, crash on a processor that has it (0.3.36)."""
    parameters = DEFAULTS()
    parameters.use_extra_bufts = False
    return parameters


DEFAULTS = llama_cpp.llama_model_default_params
llama_cpp.llama_cpp.llama_model_default_params = plain_parameters


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False, "logits_all": True}
    model = llama_cpp.Llama(job["model"], vocab_only=not job["prompts"], n_ctx=job["context_tokens"], n_threads=1,
                            n_threads_batch=1, use_mmap=True, verbose=bool(job.get("verbose")), **exact)

    def evaluate(ids: list[int]) -> np.ndarray:
        before = model.n_tokens
        model.eval(ids)
        return np.array(model.scores[before:model.n_tokens])

    answers, rows = [], []
    for prompt, sequence in zip(job["prompts"], job["sequences"], strict=True):
        model.reset()
        answer, ids = [], prompt
        for _ in range(job["new_tokens"]):
            answer.append(int(evaluate(ids)[-1].argmax()))
            ids = answer[-1:]
        answers.append(answer)
        model.reset()
        rows.append(evaluate(sequence))
    encoded = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
    begun = [model.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"][:8]]
    np.save(folder / "logits.npy", np.concatenate(rows) if rows else np.zeros(0))
    (folder / "answers.json").write_text(json.dumps({"answers": answers, "encoded": encoded, "begun": begun}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
