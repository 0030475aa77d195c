"""How many rows a step has, as a pure function of the samples before it: a batch that grows while a stage is young."""

from __future__ import annotations

from dataclasses import dataclass

from athanor.foundation.errors import LayoutError, RecipeError


@dataclass(frozen=True)
class Ramp:
    """Rows grow from `start_rows` by `increment_rows` after every equal part of `samples`, until they are `rows`.

    The rule of Megatron-LM's --rampup-batch-size (Narayanan et al. 2021); Yuan 1.0 was trained with 448 448 488280.
    """

    start_rows: int
    increment_rows: int
    samples: int
    rows: int

    @property
    def rungs(self) -> list[int]:
        """Every number of rows that a step may have, ascending."""
        return [*range(self.start_rows, self.rows, self.increment_rows), self.rows]

    def rows_of_step(self, samples: int) -> int:
        """Rows of the step that follows `samples` samples."""
        increments = len(self.rungs) - 1
        done = samples * increments // self.samples
        return self.start_rows + min(done, increments) * self.increment_rows

    def steps(self, samples: float) -> int:
        """The number of steps, at least one, whose samples are nearest to `samples`."""
        count, before = 0, 0
        while before < self.samples:  # each rung is a few steps
            rows = self.rows_of_step(before)
            if before + rows / 2 > samples:
                return max(1, count)
            count, before = count + 1, before + rows
        return max(1, count + round((samples - before) / self.rows))


def read_ramp(given: list[int], rows: int, unit: int, data_shards: int | None, key: str) -> Ramp:
    """The ramp of a recipe to a global batch of `rows`; `unit` rows are one micro-batch on every data rank.

    Raises RecipeError for numbers that are no ladder, LayoutError for a rung that does not split.
    """
    start, increment, samples = given
    if min(given) < 1 or start >= rows:
        raise RecipeError(f"{key} = {given}: all three must be at least 1, and the first less than the {rows} rows of a step")
    if (rows - start) % increment:
        near = [size for size in range(1, rows - start + 1) if (rows - start) % size == 0]
        raise RecipeError(f"{key} = {given}: {increment} rows a time do not lead from {start} to {rows} rows; the nearest "
                          f"increment is {min(near, key=lambda size: abs(size - increment))}")
    ramp = Ramp(start, increment, samples, rows)
    for name, divisor in (("micro_batch_size x data ranks", unit), ("data_shards", data_shards or 1)):
        bad = [rung for rung in ramp.rungs if rung % divisor]
        if bad:
            raise LayoutError(f"{key} = {given} leads over {', '.join(map(str, bad[:4]))} rows, which {name} = {divisor} does "
                              f"not divide; start and increment must be multiples of {divisor}")
    return ramp
