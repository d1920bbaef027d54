"""A call like one before it: the same launches with the pointers of its own tensors, in a fraction of the host's time.

What a call launches follows from its options, and from its tensors' shapes, strides, dtypes, devices and alignments.
The first call of a kind is checked, planned and handed to Triton, which takes Python half a millisecond, several times
what the kernels need for 1024 queries; it leaves a :class:`Record`.  A later one of that kind allocates, puts
its pointers in their places and launches.

Only calls of ``hisa::indexer_topk`` come through here.  Whoever changes what calls launch while the process runs, the
table of configurations say, calls :func:`forget`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .descriptor import WEIGHTS_ALIGNED
from .gpu import Repeatable

# Kinds of calls that are kept, the latest; sequences that grow make a new one with every token.
MOST_RECORDS = 256
# Launches of one call.  A longer one has more to do on the device than on the host.
MOST_STEPS = 512
# Bytes.  Buffers begin at multiples of it, as torch's allocator has them.
ALIGNED = 512
# Which argument of the schema, by its place, kernels know by these names, where they read it in place.
_PLACES = {
    "q_ptr": 0,
    "q_desc": 0,
    "k_ptr": 1,
    "k_desc": 1,
    "w_ptr": 2,
    "w_desc": 2,
    "start_ptr": 6,
    "end_ptr": 7,
    "valid_ptr": 8,
    "mask_ptr": 9,
    "scale_ptr": 10,
    "q_segment_ptr": 13,
    "k_segment_ptr": 14,
    "k_weight_ptr": 15,
    "means_ptr": 16,
}
# Behind the schema's arguments: the results, then the memory of everything else.
_INDICES, _SCORES, _MEMORY = 18, 19, 20
WEIGHTS = 2

# Where a pointer goes among a launch's arguments, what it points into, and how many bytes in.
Slot = tuple[int, int, int]


class Base(NamedTuple):
    """What a descriptor needs of the tensor that it describes."""

    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


class Launched(NamedTuple):
    """A launch; None in ``arguments`` where pointers go."""

    run: Callable[..., None]
    arguments: list[Any]
    pointers: list[Slot]
    descriptors: list[tuple[Slot, dict[str, Any]]]

    def again(self, given: Sequence[Any], starts: list[int], memory: Tensor) -> None:
        arguments = self.arguments.copy()
        for place, source, offset in self.pointers:
            arguments[place] = starts[source] + offset
        for (place, source, offset), fields in self.descriptors:
            arguments[place] = SimpleNamespace(base=Base(starts[source] + offset), **fields)
        self.run(*arguments)


class Copied(NamedTuple):
    """Weights of some rows, converted on their way to ``offset`` in the memory."""

    rows: tuple[slice, slice]
    offset: int
    size: int
    shape: tuple[int, ...]

    def again(self, given: Sequence[Any], starts: list[int], memory: Tensor) -> None:
        into = memory[self.offset : self.offset + self.size].view(torch.float32)
        into.view(self.shape).copy_(given[WEIGHTS][self.rows])


class Record:
    """What a call allocates and launches, as it tells of it.

    ``given``: the operator's arguments in the schema's order.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = given
        self.results: tuple[Tensor, ...] = ()
        self.buffers: list[tuple[Tensor, int]] = []
        self.size = 0
        self.steps: list[Launched | Copied] = []
        self.complete = True

    def allocated(self, buffer: Tensor) -> None:
        self.buffers.append((buffer, self.size))
        self.size += -(-buffer.nbytes // ALIGNED) * ALIGNED

    def copied(self, rows: tuple[slice, slice], into: Tensor) -> None:
        _, offset = self._locate("w_ptr", into)
        self._add(Copied(rows, offset, into.nbytes, tuple(into.shape)))

    def launched(self, one: Repeatable | None) -> None:
        """``one``: None where no compiled kernel is in hand, under the interpreter say."""
        if one is None:
            self.complete = False
            return
        arguments = list(one.arguments)
        pointers, descriptors = [], []
        for name, place in one.place.items():
            value = arguments[place]
            if isinstance(value, Tensor):
                pointers.append((place, *self._locate(name, value)))
            elif hasattr(value, "base"):
                # What else it says was checked when it was made; versions of Triton differ in what that is.
                fields = {field: x for field, x in vars(value).items() if field != "base"}
                descriptors.append(((place, *self._locate(name, value.base)), fields))
            else:
                continue
            arguments[place] = None
        self._add(Launched(one.run, arguments, pointers, descriptors))

    def _add(self, step: Launched | Copied) -> None:
        self.complete = self.complete and len(self.steps) < MOST_STEPS
        if self.complete:
            self.steps.append(step)

    def _locate(self, name: str, x: Tensor) -> tuple[int, int]:
        """What ``x`` is a part of.  By address, if the call made it: nothing else lies there.

        Arguments may overlap, the same tensor may be two of them: only the kernel's name for ``x`` tells which it is.
        """
        address = x.data_ptr()
        made = [(x, _INDICES + place, 0) for place, x in enumerate(self.results)]
        for buffer, source, offset in made + [(buffer, _MEMORY, offset) for buffer, offset in self.buffers]:
            within = address - buffer.data_ptr()
            if 0 <= within < buffer.nbytes:
                return source, offset + within
        if x.numel() == 0:
            # Nothing of it is read or written.
            return _MEMORY, 0
        place = _PLACES[name]
        return place, address - self.given[place].data_ptr()

    def finish(self) -> None:
        """Keeps no tensor alive."""
        self.shape = tuple(self.results[0].shape)
        self.given, self.results, self.buffers = (), (), []

    def again(self, given: Sequence[Any]) -> tuple[Tensor, Tensor]:
        device = given[0].device
        with torch.cuda.device_of(given[0]):
            indices = torch.empty(self.shape, dtype=torch.int32, device=device)
            scores = torch.empty(self.shape, dtype=torch.float32, device=device)
            memory = torch.empty(self.size, dtype=torch.uint8, device=device)
            starts = [x.data_ptr() if isinstance(x, Tensor) else 0 for x in given]
            starts += [indices.data_ptr(), scores.data_ptr(), memory.data_ptr()]
            for step in self.steps:
                step.again(given, starts, memory)
        return indices, scores


_records: dict[Hashable, Record] = {}
_changing = threading.Lock()


def forget() -> None:
    """Calls that come are made anew."""
    with _changing:
        _records.clear()


def _kind(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % WEIGHTS_ALIGNED
    return x  # type: ignore[no-any-return]


def indexer_topk(given: Sequence[Any], checked: Callable[..., tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """``hisa::indexer_topk`` on a GPU.

    Args:
        given: its arguments in the schema's order, unchecked.
        checked: what makes the arguments of :func:`.launch.indexer_topk_triton` of them, or refuses them.
    """
    kind = tuple(map(_kind, given))
    known = _records.get(kind)
    if known is not None:
        return known.again(given)
    record = Record(given)
    results = launch.indexer_topk_triton(*(*checked(*given), record))
    if record.complete:
        record.finish()
        with _changing:
            _records[kind] = record
            while len(_records) > MOST_RECORDS:
                del _records[next(iter(_records))]
    return results
