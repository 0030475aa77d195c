"""What a rank's steps take, seen operator by operator: storages that live, collectives, FLOPs. Real or rehearsed alike.

A storage counts from the operator that makes it, or first uses it, until nothing refers to it. What kernels allocate
within themselves is not seen, nor what an allocator keeps beyond what is asked of it.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from athanor.foundation.intervals import Recorder, activate
from athanor.parallel.mesh import Mesh
from athanor.parallel.tensor import local
from athanor.train import flops
from athanor.train.step import Trainee

KINDS = {
    "parameters": "this rank's parts of the weights, in the dtype they are kept in", "gradients": "gradients, sharded and whole",
    "optimizer": "state of the update rule",
    "gathered": "weights gathered over the ranks that share them, in the dtype they are computed in",
    "activations": "what the forward pass leaves for the backward pass, and the columns of batches",
    "logits": "chunks of logits and their gradients", "communication": "buffers of collectives, and of messages between stages",
    "temporary": "what the backward pass and the update make and drop",
}


@dataclass(frozen=True)
class Collective:
    """Equal messages of one step: `size_bytes` is the larger of what one puts in and takes out on this rank."""

    axis: str
    kind: str
    size_bytes: int
    count: int


@dataclass(frozen=True)
class Observed:
    """One rank's steps: memory at their peak by kind; collectives and FLOPs of the last step.

    `flops` has "model" (nothing computed again, without the update), "recompute" and "optimizer".
    """

    memory_bytes: dict[str, int]
    collectives: list[Collective]
    flops: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())


class Storages:
    """Which storages lived when. Each has a number; `events` are (number, bytes more) in order of time."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # of living storages, by address
        self.sizes: dict[int, int] = {}  # of living storages, by number
        self.watches: dict[int, Any] = {}
        self.events: list[tuple[int, int]] = []
        self.kinds: list[str] = []  # by number; unless `marks` knows better
        self.phases: list[str] = []  # by number
        self.marks: dict[str, set[int]] = defaultdict(set)

    def see(self, tensor: Tensor, kind: str, phase: str = "") -> int:
        """The number of a tensor's storage, which is `kind` and was made in `phase` if it was not known."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        number = self.numbers.get(address)
        if number is None:
            number = self.numbers[address] = len(self.kinds)
            self.kinds.append(kind)
            self.phases.append(phase)
            self.sizes[number] = 0
            self.watches[number] = weakref.ref(storage, lambda _, address=address: self._forget(address))  # type: ignore[misc]
            self._resized(number, storage.nbytes())
        return number

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage may have another size than before."""
        if (number := self.numbers.get(storage._cdata)) is not None:
            self._resized(number, storage.nbytes())

    def read_by_update(self, numbers: Iterable[int]) -> None:
        """What the update reads, and neither made nor keeps, are gradients."""
        kept = self.marks["parameters"] | self.marks["optimizer"]
        self.marks["gradients"].update(number for number in numbers if self.phases[number] != "optimizer" and number not in kept)

    def peak(self) -> dict[str, int]:
        """Bytes by kind when most bytes lived."""
        total = most = when = 0
        for place, (_, more) in enumerate(self.events, 1):
            total += more
            if total > most:
                most, when = total, place
        living: dict[int, int] = defaultdict(int)
        for number, more in self.events[:when]:
            living[number] += more
        out = dict.fromkeys(KINDS, 0)
        for number, size in living.items():
            out[self._kind(number)] += size
        return out

    def _kind(self, number: int) -> str:
        return next((kind for kind in KINDS if number in self.marks[kind]), self.kinds[number])

    def _resized(self, number: int, size: int) -> None:
        if more := size - self.sizes[number]:
            self.sizes[number] = size
            self.events.append((number, more))

    def _forget(self, address: int) -> None:
        number = self.numbers.pop(address)
        self._resized(number, 0)
        del self.sizes[number], self.watches[number]


class Observer(TorchDispatchMode):
    """Watches every operator while it is entered; also the recorder of intervals, which tell what is being done.

    `answers`: tensors have no values, so a number that the host asks for is answered with 1, and a truth value with yes:
    the step goes the way of a finite gradient that needs no clipping.
    """

    def __init__(self, axes: Mapping[str, str], vocabulary: int, answers: bool = False) -> None:
        super().__init__()
        self.axes, self.vocabulary, self.answers = axes, vocabulary, answers
        self.storages, self.recorder = Storages(), Recorder()
        self.collectives: Counter[tuple[str, str, int]] = Counter()
        self.flops: Counter[str] = Counter()

    def register(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there before the first operator."""
        for tensor in tensors:
            self.storages.marks[kind].add(self.storages.see(tensor, kind))

    def __enter__(self) -> Self:
        activate(self.recorder)
        self._resize = resize = torch.UntypedStorage.resize_  # no operator: fully_shard frees what it gathered with it

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self.storages.resized(storage)

        torch.UntypedStorage.resize_ = watched  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        activate(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a tensor without memory is asked about itself
            return func(*args, **kwargs)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again for the part that this rank holds
        if self.answers and func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        out = func(*args, **kwargs)
        phase, given = self._phase(), [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        used = [self.storages.see(tensor, self._kind(tensor, phase), phase) for tensor in (*given, *made)]
        if func.namespace == "c10d":
            self._communicated(func, args, used)
        elif func.namespace == "fsdp":
            self._sharded(func, args, kwargs)
        elif phase == "optimizer":
            self.storages.read_by_update(number for number, tensor in zip(used, given, strict=False) if tensor.ndim)
        if count := flops.count(func._overloadpacket, args, kwargs, out):
            self.flops[phase if phase in ("recompute", "optimizer") else "model"] += count
        return out

    def _phase(self) -> str:
        names = self.recorder.names
        if "recompute" in names:
            return "recompute"
        if names[:1] == ["optimizer"]:
            return "optimizer"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def _kind(self, tensor: Tensor, phase: str) -> str:
        if tensor.ndim == 2 and tensor.shape[1] == self.vocabulary:
            return "logits"
        return "temporary" if phase in ("backward", "optimizer") else "activations"

    def _sharded(self, func: Any, args: Any, kwargs: Any) -> None:
        """What fully_shard's own operators move are gathered weights and whole gradients."""
        name = func._schema.name.removeprefix("fsdp::")
        marks = {"split_with_sizes_copy": ("gathered", kwargs.get("out", ())), "chunk_cat": ("gradients", args[:1]),
                 "all_gather_copy_in": ("communication", args[1:2])}
        if name in marks:
            kind, tensors = marks[name]
            self.storages.marks[kind].update(self.storages.see(tensor, kind) for tensor in tree_leaves(tensors))

    def _communicated(self, func: Any, args: Any, used: Sequence[int]) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
                     and "ProcessGroup" in str(arg._type()))
        axis = self.axes.get(group.group_name, "other")
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args]
        kind = func._schema.name.removeprefix("c10d::").strip("_")
        self.collectives[axis, MESSAGES.get(kind, kind), max(sizes)] += 1
        if axis in ("shard", "expert_shard") or kind == "recv":
            self.storages.marks["communication"].update(used)


MESSAGES = {"allgather_base": "all_gather", "allgather": "all_gather", "reduce_scatter_base": "reduce_scatter",
            "allreduce": "all_reduce", "alltoall_base": "all_to_all", "recv": "receive"}


def _answer(asked: Tensor) -> float | bool:
    if asked.dtype == torch.bool:
        return True
    if asked.is_floating_point():
        return 1.0
    raise AssertionError("a whole number decides what is computed next; a rehearsal has to be told it (models/rehearsed.py)")


def name_groups(mesh: Mesh) -> dict[str, str]:
    """Names of process groups -> the axis whose ranks they join; `stage` and `world` are those of no axis."""
    found = {} if mesh.devices is None else {dist.group.WORLD.group_name: "world"}  # type: ignore[union-attr]
    if mesh.stage is not None:
        found[mesh.stage.group_name] = "stage"
    return found | {group.group_name: axis for axis, group in mesh.groups.items()}


def observe(trainee: Trainee, vocabulary: int, step: Callable[[int], Any], steps: int, answers: bool = False) -> Observed:
    """Watch a rank do `step(0)`, `step(1)`, …. `vocabulary`: columns of its logits."""
    observer = Observer(name_groups(trainee.mesh), vocabulary, answers)
    observer.register("parameters", [local(p.detach()) for _, p in trainee.stages.named_parameters()])
    observer.register("parameters", [tensor for _, _, tensor in trainee.optimizer.weights()])
    observer.register("optimizer", [tensor for _, _, tensor in trainee.optimizer.state()])
    with observer:
        for number in range(steps):
            observer.collectives.clear()
            observer.flops.clear()
            step(number)
    collectives = [Collective(*key, count) for key, count in sorted(observer.collectives.items())]
    found = {kind: observer.flops[kind] for kind in ("model", "recompute", "optimizer")}
    return Observed(observer.storages.peak(), collectives, found)
