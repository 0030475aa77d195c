"""How long the chain's other steps take: measuring, building data, evaluation, registry, serving, report."""

from __future__ import annotations

import math

from athanor.cluster.spec import ClusterSpec
from athanor.cost.coefficients import load, python_factor, text_factor

ACCOUNT = {"check": "check", "plan": "check", "data": "data", "evaluate": "evaluation", "registry": "publish",
           "serve": "publish", "report": "publish"}


def functions_in(evaluation_tokens: float) -> float:
    """Held-out functions that tasks which generate ask for."""
    return float(evaluation_tokens * load()["chain"]["functions_per_evaluation_token"])


def chain_seconds(cluster: ClusterSpec, *, source_bytes: float, evaluation_tokens: float, evaluation_documents: float,
                  models: int, tasks: list[str], step_forward_tokens_per_second: float, num_hidden_layers: int,
                  limit: int | None) -> dict[str, float]:
    """Wall seconds of each step besides training, for `models` models to be evaluated and registered."""
    constants = load()["chain"]
    slow, text = python_factor(cluster.python), text_factor(cluster.python)
    each = 0.0  # of one model; models are evaluated side by side, one per rank
    if "bits_per_byte" in tasks:
        read = min(1.0, (limit or math.inf) / max(evaluation_documents, 1.0))
        each += read * evaluation_tokens / step_forward_tokens_per_second * constants["score_factor"]
    for task in tasks:
        items = min(limit or math.inf, constants["generated_items"].get(task, functions_in(evaluation_tokens)))
        each += items * constants["generated_seconds_per_block"].get(task, 0.0) * num_hidden_layers * slow
    evaluate = constants["evaluate_seconds"] * slow + each * math.ceil(models / cluster.devices)
    return {"check": constants["check_seconds"], "plan": constants["plan_seconds"] * slow,
            "data": (constants["data_seconds"] + constants["data_seconds_per_byte"] * source_bytes) * text,
            "evaluate": evaluate, "registry": constants["registry_seconds_per_model"] * models * slow,
            "serve": constants["serve_seconds"] * slow, "report": constants["report_seconds"] * slow}
