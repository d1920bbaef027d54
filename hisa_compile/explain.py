"""Say what the backend would do with a model, without compiling it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from .bases import compile_aot_eager
from .config import parse_options
from .fingerprint import graph_modules
from .passes.report import Report, Site
from .passes.rewrite import rewrite_indexers
from .passes.settings import PassSettings

# The graphs met by the running call of `explain`: id of a graph -> its sites.
_met: ContextVar[dict[int, tuple[Site, ...]]] = ContextVar("hisa_compile_explain")


def explain(
    model: Callable[..., Any] | ExportedProgram,
    *args: Any,
    hisa_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Print and return what becomes of every top-k and sort in a model, or in a program that was exported from one.

    A model is run once, as ``model(*args, **kwargs)``.  Each graph that Dynamo makes of the call goes through
    AOTAutograd with Inductor's decompositions and the HISA pass, in the caller's grad mode; no code is generated,
    and what runs is the model's own, unchanged code.  The call therefore has the effects of one eager call (a
    cache passed in ``kwargs`` grows), and what the user has compiled stays compiled.

    An exported program has its inputs' shapes in it and is not run: ``explain(torch.export.export(model, inputs))``.
    A copy of it is decomposed as Inductor would and analysed, with the bodies of its higher-order operators,
    as a program for inference; the program itself is not changed.  Marks (:func:`hisa_compile.hisa`) are in programs
    exported with ``strict=True`` or under ``torch.fx.traceback.preserve_node_meta()``.  A ``torch.fx.GraphModule``
    of ATen operations that is given without inputs is analysed as it stands.

    Args:
        model: a module or function, compiled by ``torch.compile`` or not; an exported program; a graph.
        args, kwargs: a model's inputs; programs and graphs take none.
        hisa_options: ``options`` as for ``torch.compile``; only the ``hisa.`` keys count here.

    Returns:
        The sites of all graphs, in the order in which the graphs ran.

    Raises:
        ValueError, TypeError: ``hisa_options`` are not what they may be.
        TypeError: an exported program with inputs, or a graph of other operations than ATen's.
    """
    options = {key: value for key, value in (hisa_options or {}).items() if key.startswith("hisa.")}
    settings = parse_options({**options, "hisa.base": "inductor"}).settings
    if isinstance(model, ExportedProgram):
        if args or kwargs:
            raise TypeError("an exported program is explained without inputs: explain(program)")
        sites = _sites_of(_decomposed(model).graph_module, settings)
    elif isinstance(model, torch.fx.GraphModule) and not args and not kwargs and _takes_inputs(model):
        _check_operations(model)
        sites = _sites_of(model, settings)
    else:
        sites = _sites_of_call(model, args, kwargs, settings)
    report = Report(tuple(sites))
    print(report)
    return report


# Models ---------------------------------------------------------------------------------------------------------------


def _sites_of_call(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], settings: PassSettings
) -> list[Site]:
    backend = _Explainer(settings)
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
    return [site for sites in met.values() for site in sites]


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


# Programs and graphs --------------------------------------------------------------------------------------------------


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """A copy of the program with Inductor's decompositions, functional, module stacks, lines and marks kept."""
    # Some decompositions use this module without importing it.
    import torch._inductor.lowering
    from torch._inductor.decomposition import select_decomp_table

    gm = copy.deepcopy(program.graph_module)  # parameters are inputs of it
    for body in graph_modules(gm):
        if body is not gm:
            # The generated code of a body would be what its operations come from; an interpreter hands on the
            # provenance of each.
            body.forward = torch.fx.Interpreter(body).run
    given = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    # Compositions that are not in the table would be kept whole; in Inductor none gets past AOTAutograd.
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    compositions = {
        op: decomposition
        for op, decomposition in torch.export.default_decompositions().items()
        if isinstance(op, torch._ops.OpOverload) and op.has_kernel_for_dispatch_key(composite)
    }
    decomposed: ExportedProgram = given.run_decompositions({**compositions, **select_decomp_table()})
    return decomposed


def _sites_of(gm: torch.fx.GraphModule, settings: PassSettings) -> list[Site]:
    """The sites of a graph and of the bodies of its higher-order operators, found on copies of the graphs."""
    sites: list[Site] = []
    for module in graph_modules(gm):
        # The copy shares parameters and constants, which no rewrite touches.
        copied = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        sites.extend(rewrite_indexers(copied.graph, settings))
    return sites


def _takes_inputs(gm: torch.fx.GraphModule) -> bool:
    return any(node.op == "placeholder" for node in gm.graph.nodes)


def _check_operations(gm: torch.fx.GraphModule) -> None:
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            calls = node.op in ("call_method", "call_module")
            if calls or (node.op == "call_function" and "val" not in node.meta):
                raise TypeError(
                    f"a graph is explained without inputs where it has ATen operations with meta['val'] alone, and "
                    f"{node.name} is {node.op} {node.target}: give the model and its inputs, explain(model, *inputs), "
                    "or an exported program, explain(program)"
                )
