"""Greedy answers of vLLM from a Hugging Face folder; runs in its own environment, which knows nothing of this project.

    python ask_vllm.py FOLDER    # reads job.json there and writes answers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    # latent attention: that for AMX takes no fp32, and the operator that turns queries on CPUs is wrong for the three dimensions
    # that it gives them (0.32.0), so that its own form in Python is taken
    latent = {"attention_backend": "CPU_MLA"} if job["is_latent"] else {}
    if job["is_latent"]:
        RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    engine = LLM(model=job["model"], dtype="float32", enforce_eager=True, max_model_len=job["context_tokens"],
                 skip_tokenizer_init=not job["texts"], disable_log_stats=True, enable_prefix_caching=False, **latent)
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=1, detokenize=False)
    outputs = [found.outputs[0] for found in engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling)]
    answers = [list(output.token_ids) for output in outputs]
    logprobs = [[step[token].logprob for token, step in zip(answer, output.logprobs, strict=True)]
                for answer, output in zip(answers, outputs, strict=True)]
    encoded = [engine.get_tokenizer().encode(text, add_special_tokens=False) for text in job["texts"]]
    (folder / "answers.json").write_text(json.dumps({"answers": answers, "logprobs": logprobs, "encoded": encoded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
