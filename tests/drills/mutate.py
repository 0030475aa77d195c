"""Deliberate mistakes in the parallel code, each of which the parity tests must find.

    python tests/drills/mutate.py [--only NUMBER …] [--write docs/mutants.md]

A mutant is one change of the syntax tree: in a function, a node that reads `old` becomes `new`. The package and its tests are
copied, the mutant is put into the copy, and the parity test of a layout that should find it runs there.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300  # that the tests may take before the mutant counts as hung, which kills it too


@dataclass(frozen=True)
class Mutant:
    """What is wrong, where, and the layout that should notice."""

    mistake: str
    file: str
    function: str
    old: str
    new: str
    layout: str


def m(mistake: str, place: str, old: str, new: str, layout: str) -> Mutant:
    file, _, function = place.partition(":")
    return Mutant(mistake, f"athanor/{file}.py", function, old, new, layout)


TP = "untied-tp=2"
DP = "dense-dp_shard=2"
CP = "dense-cp=2"
PP = "dense-pp=2"
MUTANTS = (
    m("the gradient of gathered tokens is not summed over ranks", "models/collectives:_Gather.backward",
      "reduce_scatter(_padded(gradient, ctx.group), ctx.group, ctx.account)",
      "gradient.chunk(size(ctx.group))[rank(ctx.group)]", TP),
    m("the sum of partial results is scaled by the degree", "models/collectives:_Scatter.forward",
      "reduce_scatter(_padded(x, group), group)", "reduce_scatter(_padded(x, group), group) / size(group)", TP),
    m("the gradient of scattered tokens is not gathered", "models/collectives:_Scatter.backward",
      "all_gather(gradient, ctx.group)", "gradient.repeat(size(ctx.group), 1)", TP),
    m("a reduction takes the maximum for the sum", "models/collectives:all_reduce",
      "dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM", "dist.ReduceOp.MAX", TP),
    m("tokens of another rank's vocabulary are embedded too", "models/decoder:Decoder.embed",
      "(row >= 0) & (row < weight.shape[0])", "row < weight.shape[0]", TP),
    m("the loss' denominator is this rank's part of the vocabulary", "models/loss:_normalise",
      "all_reduce(torch.cat([logits.sum(1, keepdim=True), wanted], 1), group)",
      "torch.cat([logits.sum(1, keepdim=True), wanted], 1)", TP),
    m("heads come back from the exchange in another order", "models/attention:attention",
      "back.transpose(0, 1).flatten(1)", "back.flatten(0, 1).flatten(1).view(qkv.shape[0], -1)", CP),
    m("gradients are not exchanged back", "models/collectives:_AllToAll.backward",
      "_AllToAll.apply(gradient, ctx.group, ctx.account)", "gradient", CP),
    m("context-parallel ranks take each other's tokens", "train/step:to_device",
      "value[part * size:(part + 1) * size]", "value[(parts - 1 - part) * size:(parts - part) * size]", CP),
    m("what tensor-parallel ranks hold in full is not summed", "parallel/tensor:sum_copies",
      "dist.all_reduce(flat, group=group)", "None", TP),
    m("gradients are averaged over data ranks", "parallel/fully_shard:apply",
      "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)", DP),
    m("gradients of replicas are not summed", "parallel/fully_shard:Replicas.hook",
      "dist.all_reduce(gradient, group=self.group)", "None", "muon-dp_replicate=2"),
    m("replicas forget the gradients of earlier micro-batches", "parallel/fully_shard:Replicas.hook",
      "gradient.add_(held)", "gradient", "dense-dp_replicate=2 keep_whole=false"),
    m("every micro-batch counts as the last one", "parallel/fully_shard:DataParallel.begin",
      "self.model.set_requires_gradient_sync(is_reduced)", "self.model.set_requires_gradient_sync(False)", DP),
    m("tied embeddings learn from the last stage alone", "parallel/stages:Stages.complete",
      "grads[0] + theirs if first in self.parts else theirs + grads[0]", "theirs if first in self.parts else grads[0]", PP),
    m("tied embeddings within one rank are not added up", "parallel/stages:Stages.complete",
      "grads[0] + grads[1]", "grads[0]", "dense-pp=2 pipeline_schedule=ZBVZeroBubble recompute=full"),
    m("tied embeddings count twice in the gradient's norm", "parallel/stages:Stages.owned",
      "self.holders[name][0] == number and placements(part)[name].is_first_copy()", "placements(part)[name].is_first_copy()", PP),
    m("a stage skips its first block", "foundation/schedules:cut",
      "range(begin, end)", "range(begin + (begin > 0), end)", PP),
    m("a stage computes a block of the one before again", "foundation/schedules:cut",
      "range(begin, end)", "range(begin - (begin > 0), end)", PP),
    m("micro-batches' targets are swapped", "parallel/pipeline:Runner.step",
      "dict(columns)", "{**columns, 'targets': columns['targets'].flip(0)}", PP),
    m("micro-batches get the first one's document boundaries", "parallel/pipeline:_Stage.forward_maybe_with_nosync",
      "{**columns, **self.constants}", "{**columns, **self.constants, 'cu_seqlens': _first(self, columns)}", PP),
    m("gradients are averaged over micro-batches", "parallel/pipeline:Runner.schedule",
      "scale_grads=False", "scale_grads=True", PP),
    m("rows of a context-parallel rank count as its own", "parallel/mesh:Mesh.counts_rows",
      "place['tp'] == place['cp'] == place['pp'] == 0", "place['tp'] == place['pp'] == 0", CP),
    m("rows count once per pipeline stage", "parallel/mesh:Mesh.counts_rows",
      "place['tp'] == place['cp'] == place['pp'] == 0", "place['tp'] == place['cp'] == 0", PP),
    m("the loss of every tensor-parallel rank is added, and divided by the tokens of one", "train/step:Trainee.report",
      "sums.mul_(0.0)", "sums[2::2].mul_(0.0)", TP),
    m("replicas read the same rows", "parallel/mesh:Mesh.data_rank",
      "place['dp_replicate'] * self.layout.dp_shard + place['dp_shard']", "place['dp_shard']", "muon-dp_replicate=2"),
    m("replicas count each shard in the gradient's norm", "parallel/mesh:Mesh.counts_parameters",
      "self.coordinates['dp_replicate'] == 0", "True", "muon-dp_replicate=2"),
    m("ranks clip by their own part of the norm", "train/step:run_step",
      "optimizer.step(learning_rate, sums[0], sums[2], gradient_clip, is_usual)",
      "optimizer.step(learning_rate, optimizer.squared_norm(), sums[2], gradient_clip, is_usual)", DP),
    m("the tally keeps the last micro-batch alone", "train/step:Tally.add",
      "before[0] + value.detach().double()", "value.detach().double()", DP),
    m("a shard of a matrix is orthogonalised for the whole", "train/muon:Orthogonaliser.__call__",
      "self.world_size == 1", "True", "muon-pp=2 dp_shard=2"),
    m("a matrix comes back to the wrong ranks", "train/muon:Orthogonaliser.__call__",
      "factors[m][self.boxes[r][m].slices()]", "factors[m][self.boxes[0][m].slices()]", "muon-pp=2 dp_shard=2"),
    m("experts take the number of rows sent for that of rows arriving", "models/experts:Mixture.travel",
      "arriving.sum(0).cumsum(0, dtype=torch.int32)", "counts.sum(0).cumsum(0, dtype=torch.int32)", "mixture-dp_shard=2 ep=2"),
    m("rows come back from the experts in the order they left", "models/experts:Mixture.travel",
      "take_rows(answers, back, order, 1)", "answers", "mixture-dp_shard=2 ep=2"),
    m("context-parallel ranks look ahead in their own part alone", "models/prediction:ahead",
      "own(gather(column, cp, len(positions), 'context').roll(-1) * goes_on, cp)", "column.roll(-1) * own(goes_on, cp)",
      "mtp-cp=2 micro_batch_size=1"),
    m("a context-parallel rank's queries take the places of the first one's", "models/attention:_gathered",
      "rank(cp) * tokens", "0", "one key head-cp=2 micro_batch_size=1"),
    m("a filter reads its own last token for the one before", "models/filtered:Filter.moved",
      "gather(x[-1:], cp, size(cp), 'context')[rank(cp) - 1]", "x[-1]", "yuan reading on-cp=2 micro_batch_size=1"),
    m("padding stays where tokens are gathered", "models/collectives:_cut", "x[:rows]", "x[-rows:]",
      "gpt2-tp=2 seq_len=21 global_batch_tokens=336 micro_batch_size=1"),
    m("experts are balanced by the tokens of one rank", "train/balance:Balancer.step",
      "dist.all_reduce(loads, group=mesh.stage)", "None", "deepseek-cp=2"),
)
HELPER = '''

def _first(stage, columns):
    kept = stage.__dict__.setdefault("kept", columns["cu_seqlens"])
    return kept
'''


class Replace(ast.NodeTransformer):
    """Puts `new` for every node that reads `old`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.count = old, ast.parse(new, mode="eval").body, 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and ast.unparse(node) == self.old and not isinstance(getattr(node, "ctx", None), ast.Store):
            self.count += 1
            return self.new
        return super().generic_visit(node)


class Keyword(ast.NodeTransformer):
    """The same for a keyword argument, `name=value`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.value, self.count = old, ast.parse(new.partition("=")[2], mode="eval").body, 0

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if f"{node.arg}={ast.unparse(node.value)}" == self.old:
            self.count += 1
            return ast.keyword(node.arg, self.value)
        return self.generic_visit(node)


def mutate(mutant: Mutant, root: Path) -> None:
    """Put a mutant into a copy of the package. Raises LookupError when its place is not there."""
    path = root / mutant.file
    tree = ast.parse(path.read_text())
    body: list[ast.stmt] = tree.body
    found: ast.AST | None = None
    for name in mutant.function.split("."):
        found = next((node for node in body if getattr(node, "name", None) == name), None)
        if found is None:
            raise LookupError(f"{mutant.file} has no {mutant.function}")
        body = found.body  # type: ignore[attr-defined]
    is_keyword = "=" in mutant.old and mutant.old.split("=")[0].isidentifier() and "==" not in mutant.old
    change: Replace | Keyword = (Keyword if is_keyword else Replace)(mutant.old, mutant.new)
    change.visit(found)
    if not change.count:
        raise LookupError(f"nothing in {mutant.file}:{mutant.function} reads {mutant.old}")
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)) + (HELPER if "_first(" in mutant.new else ""))


def run(mutant: Mutant | None, layout: str) -> tuple[bool, float, str]:
    """Whether the parity test passes with a mutant (None: as the code is), the seconds, and what failed first."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("athanor", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        if mutant is not None:
            mutate(mutant, root)
        test = f"tests/parity/test_parity_layouts.py::test_layouts_train_the_same[{layout}]"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
        begin = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS, check=False,
                                  env={**os.environ, "PYTHONPATH": str(root)})
        except subprocess.TimeoutExpired:
            return False, time.perf_counter() - begin, "hung"
        lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
        found = next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest could not run {layout}: {lines[-1]}")
        return done.returncode == 0, time.perf_counter() - begin, found[:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants, from 1")
    parser.add_argument("--write", type=Path, help="a Markdown file for the list")
    options = parser.parse_args()
    rows, survivors = [], 0
    for number, mutant in enumerate(MUTANTS, 1):
        if options.only and number not in options.only:
            continue
        is_alive, seconds, said = run(mutant, mutant.layout)
        survivors += is_alive
        fate = "SURVIVED" if is_alive else "killed"
        rows.append(f"| {number} | {mutant.mistake} | `{mutant.file.removeprefix('athanor/')}`: `{mutant.function}` | {fate} |")
        print(f"{number:3} {fate:9} {seconds:5.0f} s  {mutant.mistake} ({said})", flush=True)
    if options.write:
        text = [f"# Mutants\n\nDeliberate mistakes in the parallel code, put in one at a time; `tests/parity` must find each "
                f"(`python tests/drills/mutate.py`).\nLast run: {datetime.date.today()}, {len(rows) - survivors} of {len(rows)} "
                "killed.\n", "| | mistake | where | fate |", "|---|---|---|---|", *rows]
        options.write.write_text("\n".join(text) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
