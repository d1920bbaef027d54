"""The backend: ``torch.compile(model, backend="hisa", options={"hisa.block_size": 64, ...})``.

Logging: logger ``hisa_compile``.  INFO has one line per compiled graph, DEBUG adds the whole report.  Use
``logging.getLogger("hisa_compile").setLevel("INFO")`` or, with torch's own handler, the environment variable
``TORCH_LOGS="+hisa_compile"`` (DEBUG) or ``TORCH_LOGS="hisa_compile"`` (INFO).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from . import history, shadow
from .bases import compile_aot_eager, compile_eager
from .config import Options, parse_options
from .fingerprint import graph_modules, report_key, rewrite_id
from .passes.report import Report, Site

log = logging.getLogger("hisa_compile")

# Torch-level operations that hold a top-k or a sort.
_SELECTIONS = ("topk", "sort", "quantile")


def hisa_backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A ``torch.compile`` backend that rewrites flat indexers to ``hisa::indexer_topk``.

    Args:
        gm, example_inputs: Dynamo's graph and its inputs.
        mode: a mode of Inductor ("reduce-overhead", "max-autotune", ...).  ``torch.compile`` takes mode or
            options, not both; ``{**torch._inductor.list_mode_options(mode), "hisa.block_size": 64}`` are both.
        options: HISA's and Inductor's, see :func:`hisa_compile.config.parse_options`.

    A rewritten selection is exact up to ``block_size * block_topk`` visible tokens and approximate beyond.
    What was done is logged, kept in :func:`hisa_compile.reports`, and told beforehand by
    :func:`hisa_compile.explain`.

    Raises:
        ValueError, TypeError: ``mode`` or ``options`` are not what they may be; the message says what.
    """
    parsed = parse_options(options)
    if mode is not None and parsed.base != "inductor":
        raise ValueError(f"mode={mode!r} is Inductor's and has no effect with hisa.base={parsed.base!r}")
    selects = _has_selection(gm)
    if parsed.base == "inductor":
        compiled, sites = _compile_inductor(gm, example_inputs, mode, parsed, selects)
    elif parsed.base == "aot_eager":
        compiled, sites = compile_aot_eager(gm, example_inputs, parsed.settings)
    else:
        compiled, sites = compile_eager(gm, parsed.settings) if selects else (gm.forward, [])
    report = Report(tuple(sites))
    shadow.prepare(report, itertools.chain(example_inputs, gm.parameters(), gm.buffers()))
    history.remember(report)
    log.info("%s (base %s, %s)", report.summary(), parsed.base, parsed.settings)
    log.debug("%s", report)
    return compiled


def _compile_inductor(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Options, selects: bool
) -> tuple[Callable[..., Any], Sequence[Site]]:
    # Imported here: importing this package must not import Inductor.
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from .passes.inductor_pass import RewritePass, compose

    # torch.compile's own wrapper checks the options and translates the mode.
    patches = dict(torch._TorchCompileInductorWrapper(mode, options.inductor, None).config)
    if not selects:
        return _compile_fx(gm, example_inputs, patches), ()

    ours = RewritePass(options.settings, rewrite_id(gm, options.settings))
    composed = compose(patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass), ours)
    patches["joint_custom_pre_pass"] = composed
    key = report_key(gm, example_inputs, [repr(composed.uuid()), *_configuration(patches)])
    reports = Path(cache_dir()) / "hisa_compile"

    compiled = _compile_fx(gm, example_inputs, patches)
    if not ours.ran:
        stored = history.load(reports, key)
        if stored is not None:
            return compiled, stored
        # Cached code without a report: the model's code has moved in its file, or the cached code came from
        # elsewhere (a remote cache, saved artifacts).  Compiling again says what is in it; guessing does not.
        compiled = _compile_fx(gm, example_inputs, {**patches, "force_disable_caches": True})
    cached = composed.uuid() is not None and not config.force_disable_caches
    if ours.ran and cached:
        with contextlib.suppress(OSError):  # a report that can't be written costs a compile later, no more
            history.store(reports, key, ours.sites)
    elif not ours.ran:
        log.warning("the HISA pass did not run: is joint_custom_pre_pass in Inductor's disabled_passes?")
    return compiled, ours.sites


def _compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    # The other kinds of result in its type are those of ahead-of-time compilation.
    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=patches))


def _configuration(patches: dict[str, Any]) -> list[str]:
    """Inductor's and AOTAutograd's configuration: it can change the graph that the pass sees."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    with config.patch(patches):
        inductor = config.save_config_portable(ignore_private_configs=False)
    return [repr(sorted(each.items())) for each in (inductor, functorch_config.save_config_portable())]


def _has_selection(gm: torch.fx.GraphModule) -> bool:
    """Whether a node of the torch-level graph could become a top-k or a sort."""
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            name = getattr(node.target, "__name__", str(node.target))
            if any(selection in name for selection in _SELECTIONS) or _is_opaque(module, node):
                return True
    return False


def _is_opaque(gm: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether ``node`` calls Python code that Dynamo did not look into (``allow_in_graph``, a leaf module)."""
    if node.op == "call_module":
        return not isinstance(gm.get_submodule(str(node.target)), torch.fx.GraphModule)
    module = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_function" and module.partition(".")[0] not in ("torch", "_operator", "math", "builtins")
