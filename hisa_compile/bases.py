"""The backends underneath that generate no code: for debugging, and for ``explain``.

Each takes Dynamo's torch-level graph, runs the rewriting pass on the graph it makes of it and returns
(callable, sites).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .fingerprint import graph_modules
from .passes import rewrite
from .passes.report import Site
from .passes.settings import PassSettings

Compiled = Callable[..., Any]


def compile_aot_eager(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: PassSettings
) -> tuple[Compiled, list[Site]]:
    """AOTAutograd with Inductor's decompositions; the rewritten graphs run in eager mode.

    The pass sees what it sees in Inductor's ``joint_custom_pre_pass``: the joint graph where gradients are
    needed, the forward graph where not.
    """
    # Imported here: importing this package must not import Inductor.
    import torch._functorch.config as functorch_config

    # Some decompositions use this module without importing it.
    import torch._inductor.lowering  # noqa: F401
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import default_partition
    from torch._inductor.decomposition import select_decomp_table

    sites: list[Site] = []

    def inference(graph: torch.fx.GraphModule, inputs: list[Any]) -> Compiled:
        sites.extend(_rewrite(graph, settings))
        compiled: Compiled = boxed_nop(graph, inputs)
        return compiled

    def partition(joint: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        sites.extend(_rewrite(joint, settings))
        return default_partition(joint, inputs, **kwargs)

    backend = aot_autograd(
        fw_compiler=boxed_nop,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    # AOTAutograd's cache knows of Inductor's passes only, not of ours.
    with functorch_config.patch(force_autograd_cache=False, bundled_autograd_cache=False):
        return backend(gm, example_inputs), sites


def compile_eager(gm: torch.fx.GraphModule, settings: PassSettings) -> tuple[Compiled, list[Site]]:
    """The graph in ATen operators above autograd, rewritten, run in eager mode.

    Nothing is functionalised and next to nothing decomposed, so gradients, random numbers and in-place
    updates are eager mode's own; an indexer that is updated in place is left alone by the pass.  Activation
    checkpoints are dropped: they change the memory a program needs, not its values.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    inputs = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    # The inputs' own mode: while a backend runs, the one that torch._guards would find is another.
    fake = next((value for value in inputs if isinstance(value, FakeTensor)), None)
    fake_mode = FakeTensorMode() if fake is None else fake.fake_mode
    # Spellings that no later decomposition would take apart in this base.
    table = {op: op.decompose for op in (torch.ops.aten.einsum.default, torch.ops.aten.matmul.default)}

    def interpret(*args: Any) -> Any:
        # The interpreter hands module stacks, source lines and marks on to the new nodes.
        return _Inliner(gm).run(*args)

    allowed = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True  # constants are real tensors
    try:
        with fake_mode, enable_python_dispatcher(), preserve_node_meta():
            traced = make_fx(interpret, decomposition_table=table, pre_dispatch=True)(*inputs)
    finally:
        fake_mode.allow_non_fake_inputs = allowed
    for node in reversed(traced.graph.nodes):
        # Tracing unpacks every result, also those that nobody reads: they would keep a flat selection alive.
        if node.target is operator.getitem and not node.users:
            traced.graph.erase_node(node)
    differentiated = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    sites = _rewrite(traced, settings, under_autograd=differentiated)
    return traced.forward, sites


class _Inliner(torch.fx.Interpreter):
    """Runs the body of an activation checkpoint in its place; the operator itself can't be traced above autograd."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *inputs = args
            return _Inliner(body).run(*inputs)
        return super().call_function(target, args, kwargs)


def _rewrite(gm: torch.fx.GraphModule, settings: PassSettings, under_autograd: bool = False) -> list[Site]:
    sites: list[Site] = []
    for module in graph_modules(gm):
        sites.extend(rewrite.rewrite_indexers(module.graph, settings, under_autograd=under_autograd))
        module.recompile()
    return sites
