"""What the ranks of the rehearsal's tests do: the real program under the same observer, beside rehearsals of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def observe_real(channel: Callable[..., None], job: Any) -> Any:
    """Two real steps over gloo, the last of which is counted (in the first, torch's schedules vote)."""
    from athanor.parallel.apply import compute_dtype
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train.loop import build, fetch, keeps_masters
    from athanor.train.observe import observe
    from athanor.train.step import run_step

    mesh = make_mesh(job.layout, "cpu", is_mixed=compute_dtype(job.settings.precision) is not None and not keeps_masters(job))
    trainee = build(job, mesh)

    def step(number: int) -> None:
        run_step(trainee, fetch(job, mesh, trainee, number), job.settings.learning_rate, job.settings.gradient_clip)

    seen = observe(trainee, job.shape.vocab_size // job.layout.tp, step, steps=2)
    leave()
    assert os.environ["RANK"]
    return seen
