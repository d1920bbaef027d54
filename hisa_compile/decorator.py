"""Mark a region of a model: give it a budget of its own, opt it in, or opt it out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.fx.traceback import annotate

from .config import check_budget, check_count
from .fingerprint import graph_modules
from .passes.settings import MARK_KEY, Mark

T = TypeVar("T", bound=Callable[..., Any])


@overload
def hisa(target: T, /) -> T: ...


@overload
def hisa(
    *,
    block_size: int | None = None,
    block_topk: int | None = None,
    coarse: str | None = None,
    shadow: int | None = None,
    enabled: bool = True,
) -> Callable[[T], T]: ...


def hisa(
    target: Any = None,
    /,
    *,
    block_size: int | None = None,
    block_topk: int | None = None,
    coarse: str | None = None,
    shadow: int | None = None,
    enabled: bool = True,
) -> Any:
    """Mark everything a function, or a module class's ``forward``, computes when compiled.

    Use it bare or with arguments, on a function, on an ``nn.Module`` class (its ``forward`` is marked, the class
    stays the same object) or on a ``forward`` method::

        @hisa_compile.hisa(block_size=64, block_topk=32)
        class Indexer(nn.Module): ...

    Args:
        block_size, block_topk, coarse: the budget of indexers in the region, and what blocks are ranked by, "paper",
            "spread", "probe" or "two-level"; None = as the backend's options say.
        shadow: how many queries a call of indexers in the region are compared with the flat selection, at least 1
            (see :func:`hisa_compile.shadow_report`); None = as the backend's options say.
        enabled: False leaves the region's indexers flat.

    The backend honours marks always; with ``hisa.scope="marked"`` it rewrites nothing else.  Where regions
    nest, the innermost mark counts alone.  A mark adds no graph break; where the region has one of its own, its
    parts are compiled one by one and keep the mark.  Called without compilation, the decorated thing runs
    unchanged.

    Raises:
        TypeError: the target is not one of the above (a module instance, a compiled function, a generator,
            ...), or an argument has the wrong type.
        ValueError: a budget value or ``shadow`` is out of range, or ``coarse`` is no stage.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"hisa: enabled: got {enabled!r} ({type(enabled).__name__}), expected True or False")
    check_budget(block_size, block_topk, coarse, prefix="hisa: ")
    check_count("hisa: shadow", shadow)
    mark = Mark(enabled, block_size, block_topk, coarse, shadow)
    if target is None:
        return functools.partial(_decorate, mark=mark)
    return _decorate(target, mark)


def _decorate(target: Any, mark: Mark) -> Any:
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _mark_class(target, mark)
    if isinstance(target, torch.nn.Module):
        raise TypeError(
            f"hisa: got an instance of {type(target).__name__}, expected a function, an nn.Module class or its "
            f"forward method; decorate the class, or its method: {type(target).__name__}.forward = "
            f"hisa({type(target).__name__}.forward)"
        )
    if hasattr(target, "_torchdynamo_orig_callable"):
        raise TypeError("hisa: got a function compiled by torch.compile; mark it first, then compile it")
    if isinstance(target, (staticmethod, classmethod)):
        kind = type(target).__name__
        raise TypeError(f"hisa: got a {kind}; put @{kind} above @hisa")
    if not (inspect.isfunction(target) or inspect.ismethod(target)):
        raise TypeError(
            f"hisa: got {target!r} ({type(target).__name__}), expected a function, an nn.Module class or its forward "
            "method; settings are keyword arguments: @hisa(block_size=64)"
        )
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise TypeError(f"hisa: got {target.__qualname__}, a generator or coroutine function, expected a plain one")
    return _mark_function(target, mark)


def _mark_function(function: Callable[..., Any], mark: Mark) -> Callable[..., Any]:
    annotation = {MARK_KEY: mark.to_annotation()}

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with annotate(annotation):
                return function(*args, **kwargs)
        callback = get_eval_frame_callback()
        if not callback:
            return function(*args, **kwargs)
        return torch.compiler.disable(_run_broken)(callback, function, mark, args, kwargs)

    # Dynamo remembers by code object that it gave up on a frame; one region must not do so for another.  (While
    # it traces this very line, as for a function that is decorated inside a model, there is no such frame.)
    if not torch.compiler.is_compiling():
        marked.__code__ = marked.__code__.replace()  # type: ignore[attr-defined]
    return marked


def _run_broken(
    callback: Callable[..., Any],
    function: Callable[..., Any],
    mark: Mark,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a region that Dynamo could not trace as one: its frames are compiled one by one, each with the mark.

    An annotation reaches only what is traced inside it, and a graph break inside an annotation makes Dynamo
    leave the annotating frame to Python.  Then the mark goes into a backend around the user's.  Dynamo keeps
    compiled frames by backend, so a function that is also called elsewhere is not shared with the region.
    """
    from torch._dynamo.eval_frame import innermost_backend

    backend = innermost_backend(callback)
    compiled = torch.compile(
        function, backend=_MarkingBackend(backend, mark), dynamic=getattr(backend, "dynamic", None)
    )
    return compiled(*args, **kwargs)


@dataclass(frozen=True)
class _MarkingBackend:
    """``backend`` for graphs that lie inside the region of ``mark``; marks of regions further in stay."""

    backend: Callable[..., Any]
    mark: Mark

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        for module in graph_modules(gm):
            for node in module.graph.nodes:
                node.meta["custom"] = {MARK_KEY: self.mark.to_annotation(), **node.meta.get("custom", {})}
        return self.backend(gm, example_inputs)


def _mark_class(cls: type[torch.nn.Module], mark: Mark) -> type[torch.nn.Module]:
    if cls.forward is torch.nn.Module.forward:
        raise TypeError(f"hisa: class {cls.__qualname__} defines no forward to mark")
    forward = cls.__dict__.get("forward")
    if forward is None:
        # An inherited forward is marked for this class only, and found anew by the usual resolution order.
        @functools.wraps(cls.forward)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return super(cls, self).forward(*args, **kwargs)  # type: ignore[misc]

    cls.forward = _decorate(forward, mark)
    return cls
