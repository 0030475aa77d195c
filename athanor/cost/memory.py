"""Peak memory of a rank, by kind, in bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from athanor.cost.case import FULL, PLACES, SELECTIVE, Array, Case
from athanor.cost.datasheet import KERNELS, Rated
from athanor.cost.pipeline import for_each_schedule, kept_microbatches
from athanor.foundation.schedules import SCHEDULES

GIB = 2.0**30
SHORT = 2025.0  # releases since which mixtures keep gradients and moments in 16 bits (Megatron-Bridge's recipes, DeepSeek-V3)
WITH_GRADIENTS = 1.5  # of a recomputed layer's scores, while their gradients exist as well
V_SHAPED = [PLACES[name] for name, row in SCHEDULES.items() if row.placement == "v"]


def is_v(case: Case) -> NDArray[np.bool_]:
    """Where the first rank of a pipeline holds both ends of the model."""
    return np.isin(case.schedule, V_SHAPED)


class Footprint(Rated):
    """Bytes of the pipeline ranks of each configuration, by the coefficients of `datasheet.toml` [memory].

    States as in ZeRO (Rajbhandari et al. 2020): weights, gradients and 12 bytes of optimizer a parameter, each whole or
    sharded. Activations as in Korthikanti et al. 2022: what every product reads and makes, per micro-batch in flight.
    """

    def states(self, case: Case, rank: Array) -> dict[str, Array]:
        """Parameters, gradients and optimizer of a rank of the pipeline, and what ZeRO-3 gathers of two layers."""
        layers = np.ceil(case.layers / case.pp - 1e-9) / case.layers
        dense = (case.block_parameters - case.expert_parameters) / case.tp * layers
        tables = case.end_parameters / (case.hidden * case.vocab)  # one when tied, which two ranks of a pipeline hold
        ends = case.hidden * case.vocab / case.tp * np.where(
            (case.pp == 1) | is_v(case), tables * (rank == 0), (rank == 0).astype(float) + (rank == case.pp - 1))
        experts = case.expert_parameters / case.ep * layers
        whole, inner = dense + ends, np.maximum(1.0, case.shard * case.tp / case.ep)  # ranks that hold the same experts
        is_master = self.machine.program == self.program("fsdp")  # weights are kept in fp32, and are the optimizer's own
        weight = np.where(is_master & (case.zero >= 3), 4.0, case.weight_bytes)
        is_core = self.machine.program == self.program("megatron-core")
        is_short = is_core & (case.moe_layers > 0) & (self.machine.release >= SHORT)
        each = {"parameters": (weight, 3), "gradients": (np.where(is_short, 2.0, self.coefficient("gradient_bytes")), 2),
                "optimizer": (np.where(is_short | (weight > 2), 8.0, 12.0), 1)}
        out = {name: size * np.where(case.zero >= zero, whole / case.shard + experts / np.where(case.zero >= zero, inner, 1.0),
                                     whole + experts) for name, (size, zero) in each.items()}
        layer = (dense + experts) / np.maximum(layers * case.layers, 1.0)
        out["gathered"] = np.where((case.zero >= 3) & (case.shard > 1), 2.0 * (2 * layer + ends), 0.0)
        return out

    def activations(self, case: Case, rank: Array) -> dict[str, Array]:
        """What the micro-batches in flight keep for their backward pass, and the head's logits, on a rank of the pipeline."""
        c, machine, tokens = self._c, self.machine, case.tokens
        shared = np.where(case.is_sequence_parallel > 0, 1 / case.tp, 1.0)
        is_expert, is_row = case.copies > 1, case.is_row > 0
        made = (np.where(is_row, case.inputs, case.outputs) * case.uses).sum(axis=0) / case.layers / case.tp
        own = np.where(is_expert, 1 / case.tp, shared)
        read = np.where(is_row, 0.0, case.inputs * case.uses * own).sum(axis=0) / case.layers
        norms = 2 * case.hidden * shared * np.where(machine.is_norm_fused > 0, 1.0, c["unfused_norms"])
        scores = np.select([machine.kernel == KERNELS.index("fused"), machine.kernel == KERNELS.index("eager")],
                           [c["scores_fused"], c["scores_eager"]], 0.0) * case.heads / case.tp * case.seq_len
        kept = self.coefficient("kept") * 2.0 * (made + read + norms)
        some = np.where(machine.program == self.program("fsdp"), c["selective"] * kept, kept)  # of others: attention only
        per = tokens * np.select([case.recompute == FULL, case.recompute == SELECTIVE],
                                 [2.0 * case.hidden * shared, some], kept + scores)
        # what a layer's recomputation takes finds no room in the pieces that logits left
        work = np.where(case.recompute > 0, tokens * (kept + WITH_GRADIENTS * scores), 0.0)
        flight = for_each_schedule(case.schedule, kept_microbatches, case.pp, case.chunks, case.num_microbatches, rank)
        layers = np.ceil(case.layers / case.pp - 1e-9)
        is_last = rank == np.where(is_v(case), 0, case.pp - 1)
        copies = np.where(machine.program == self.program("scaling"), 1 + c["gathered_logits"] * (case.tp > 1), 1 / case.tp)
        logits = np.where(is_last, self.coefficient("logit_bytes") * tokens * case.vocab * copies, 0.0)
        return {"activations": flight * layers * per,
                "logits": logits + work}

    def kinds(self, case: Case, rank: Array) -> dict[str, Array]:
        """All bytes of a rank of the pipeline by kind; `reserve` is what runtime, communication and fragments take."""
        out = self.states(case, rank) | self.activations(case, rank)
        alive = out["activations"] + out["logits"] + out["gathered"]
        out["reserve"] = self.coefficient("reserve_gib") * GIB + (self._c["fragments"] - 1) * alive
        return out

    def peak(self, case: Case) -> Array:
        """Bytes of the fullest of the first, a middle and the last rank of the pipeline."""
        ranks = (np.zeros(1), np.floor(case.pp / 2), case.pp - 1)
        return np.asarray(np.max([sum(self.kinds(case, rank).values(), np.zeros(1)) for rank in ranks], axis=0))

    def log_odds(self, peak: Array) -> Array:
        """Of running out of memory with a peak of so many bytes."""
        return np.asarray(np.log(peak / (self._c["usable"] * self.machine.memory_bytes)) / self._c["width"])

    def odds(self, peak: Array) -> Array:
        """Probability of running out of memory with a peak of so many bytes."""
        return np.asarray(1 / (1 + np.exp(np.clip(-self.log_odds(peak), -60, 60))))

    def out_of_memory(self, case: Case) -> Array:
        """Probability of running out of memory."""
        return self.odds(self.peak(case))
