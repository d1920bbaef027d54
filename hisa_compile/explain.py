"""Say what the backend would do with a model, without compiling it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .bases import compile_aot_eager
from .config import parse_options
from .passes.report import Report, Site
from .passes.settings import PassSettings

# The graphs met by the running call of `explain`: id of a graph -> its sites.
_met: ContextVar[dict[int, tuple[Site, ...]]] = ContextVar("hisa_compile_explain")


def explain(
    model: Callable[..., Any], *args: Any, hisa_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Run ``model(*args, **kwargs)`` once; print and return what became of every top-k and sort in it.

    Each graph that Dynamo makes of the call goes through AOTAutograd with Inductor's decompositions and the
    HISA pass, in the caller's grad mode; no code is generated, and what runs is the model's own, unchanged
    code.  The call therefore has the effects of one eager call (a cache passed in ``kwargs`` grows), and
    what the user has compiled stays compiled.

    Args:
        model: a module or function, compiled by ``torch.compile`` or not.
        args, kwargs: its inputs.
        hisa_options: ``options`` as for ``torch.compile``; only the ``hisa.`` keys count here.

    Returns:
        The sites of all graphs, in the order in which the graphs ran.

    Raises:
        ValueError, TypeError: ``hisa_options`` are not what they may be.
    """
    options = {key: value for key, value in (hisa_options or {}).items() if key.startswith("hisa.")}
    backend = _Explainer(parse_options({**options, "hisa.base": "inductor"}).settings)
    # A code object of its own keeps Dynamo's entry for the outermost frame apart from all others, and lets
    # it go when this call is over.
    function = types.FunctionType(_call.__code__.replace(), globals())
    compiled = torch.compile(function, backend=backend)
    met: dict[int, tuple[Site, ...]] = {}
    token = _met.set(met)
    try:
        # Entries of earlier compiles of the same frames must not make Dynamo give up here.
        with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
            compiled(_uncompiled(model), args, kwargs)
    finally:
        _met.reset(token)
    report = Report(tuple(site for sites in met.values() for site in sites))
    print(report)
    return report


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` was called on, or ``model`` itself."""
    attribute = "_orig_mod" if isinstance(model, torch.nn.Module) else "_torchdynamo_orig_callable"
    original: Callable[..., Any] = getattr(model, attribute, model)
    return original


@dataclass(frozen=True)
class _Explainer:
    """A backend that keeps the report of each graph and runs the graph as it is.

    Where the model has graph breaks, Dynamo keeps code for its inner frames.  Equal settings compare equal, so
    that a second call finds the first one's code instead of adding to it; sites are therefore handed over when
    a graph runs, not when it is compiled.
    """

    settings: PassSettings

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        _, found = compile_aot_eager(gm, example_inputs, self.settings)
        sites = tuple(found)
        forward = gm.forward

        def run(*inputs: Any) -> Any:
            _met.get().setdefault(id(sites), sites)
            return forward(*inputs)

        return run
