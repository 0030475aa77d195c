"""The closed list of accounts: every device-second that was paid for stands in exactly one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    name: str
    meaning: str
    colour: str  # the same on every page and in the terminal


ACCOUNTS = (
    Account("useful", "model FLOPs of the kept tokens at the device's peak", "#c2570c"),
    Account("kernel", "computing slower than peak", "#e8944a"),
    Account("recompute", "activations computed twice", "#f4c38e"),
    Account("bubble", "a pipeline stage waiting for its turn", "#8b7bb8"),
    Account("tensor", "exposed tensor-parallel communication", "#2f6f9f"),
    Account("pipeline", "exposed pipeline communication", "#4a86b4"),
    Account("data_parallel", "exposed data-parallel communication", "#5b9bc8"),
    Account("context", "exposed context-parallel communication", "#7db0d4"),
    Account("expert", "exposed expert-parallel communication", "#8fbbda"),
    Account("skew", "waiting for a rank that came late", "#9cc3de"),
    Account("optimizer", "the update itself", "#3f8f6b"),
    Account("input", "waiting for the data loader", "#7fbf9e"),
    Account("rollout", "generating answers to learn from", "#a3c96b"),
    Account("reward", "scoring those answers", "#b5d486"),
    Account("reference", "log-probabilities of the reference", "#c7dfa2"),
    Account("weight_sync", "moving new weights to the generator", "#d6e8bd"),
    Account("checkpoint", "blocked by saving", "#b3b08a"),
    Account("evaluation", "validation and evaluation", "#cfcdb4"),
    Account("metering", "blocked by measuring", "#dddcca"),
    Account("check", "measuring the cluster and planning", "#8d8a6a"),
    Account("data", "building the data", "#a39f7d"),
    Account("publish", "export, registry, first answers, report", "#bdb99a"),
    Account("startup", "process start to first step", "#6b7280"),
    Account("lost", "steps computed and thrown away", "#b42318"),
    Account("down", "from a fault to new processes; devices given up", "#e0685c"),
    Account("spare", "devices held in reserve, or left over", "#9aa0aa"),
    Account("unattributed", "what no account explains", "#111827"),
)
BY_NAME = {account.name: account for account in ACCOUNTS}
NAMES = tuple(BY_NAME)
STEPPING = NAMES[:NAMES.index("checkpoint")]  # what a training step is made of
