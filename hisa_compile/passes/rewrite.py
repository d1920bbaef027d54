"""The pass: every selection of a graph is read, and those that are proved to be indexers are rewritten.

Works in place on a graph of ATen operations whose nodes carry ``meta["val"]``, functional (Inductor's joint
graph hook, AOTAutograd, a decomposed exported program) or not (then a mutation in between rules a site out).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ..ops.budget import Budget, resolve_budget
from .axes import product_of_sizes
from .chunks import Chunks, find_chunks, join_queries, join_visibility
from .consumers import order_matters
from .emit import Emitter, UnknownSizeError
from .emit_indexer import Shadow, indexer_call, outputs_of, take_sizes_elsewhere
from .emit_visibility import visibility_arguments
from .errors import NotAnIndexer, describe
from .form import IndexerForm
from .normal_form import describe_indexer
from .notation import in_index_notation
from .obligations import GraphFacts, check_obligations
from .report import Site, site_name
from .selection import TAKES_PART, TOPK, Selection, module_path, selections, source_location
from .settings import Mark, PassSettings, mark_of
from .terms import signature
from .visibility import Vectors, take_apart

log = logging.getLogger("hisa_compile")


@dataclass
class Proof:
    """A selection that is proved to be an indexer's, and how it will be called."""

    selection: Selection
    form: IndexerForm
    vectors: Vectors
    budget: Budget
    coarse: str | None
    shadow: int | None


def rewrite_indexers(graph: Graph, settings: PassSettings, *, under_autograd: bool = False) -> list[Site]:
    """Rewrite every proved indexer of ``graph`` to ``hisa::indexer_topk``; one :class:`Site` a selection.

    ``under_autograd``: the graph itself will be differentiated when it runs, as a joint graph is not.
    A graph in which nothing is rewritten comes back untouched, node for node.
    """
    found = selections(graph)
    if not found:
        return []
    return _Rewriting(graph, found, settings, GraphFacts(graph, under_autograd)).run()


class _Rewriting:
    def __init__(self, graph: Graph, found: list[Node], settings: PassSettings, facts: GraphFacts) -> None:
        self.graph = graph
        self.found = found
        self.settings = settings
        self.facts = facts
        self.sites: dict[Node, Site] = {}
        # Visibility arguments that are in the graph already, by what they are made of; those of the site at hand.
        self.visible: dict[Any, dict[str, Node]] = {}
        self.pending: list[Any] = []
        # Who may tell the order of the entries of the selection at hand; None: nobody.
        self.asks_for_order: Node | None = None

    def run(self) -> list[Site]:
        chunked: dict[Node, Chunks] = {}
        for group in find_chunks([_read(node) for node in self.found]):
            chunked.update({self.found[number]: group for number in group.numbers})
        places = {node: (module_path(node), source_location(node)) for node in self.found}
        for node in self.found:
            if node in self.sites:
                continue
            chunks = chunked.get(node)
            if chunks is not None and not self.rewrite_chunks(chunks):
                for number in chunks.numbers:
                    chunked.pop(self.found[number], None)
            if node not in self.sites:
                self.rewrite_one(node)
        if any(site.rewritten for site in self.sites.values()):
            self.graph.lint()
        return [
            replace(self.sites[node], module=module, location=location) for node, (module, location) in places.items()
        ]

    def rewrite_one(self, node: Node) -> None:
        site = self.attempt(node)
        if isinstance(site, Proof):
            proof = site
            site = self.site(proof)
            try:
                self.replace([proof], None)
            except NotAnIndexer as reason:
                site = replace(site, reason=str(reason), form="", budget=None, coarse=None, shadow=None)
            except Exception as error:
                site = replace(_internal_error(node, error), topk=site.topk)
            else:
                site = self.kept(site, proof.form)
        self.sites[node] = site

    def rewrite_chunks(self, chunks: Chunks) -> bool:
        """One call for all chunks; False, and nothing changed, where that can't be."""
        nodes = [self.found[number] for number in chunks.numbers]
        if any(min(nodes) < node < max(nodes) for node in self.facts.writes):
            # The one call stands where the last chunk stood, and would see what was written in between.
            return False
        proofs = [self.attempt(node, in_chunks=True) for node in nodes]
        proved = [proof for proof in proofs if isinstance(proof, Proof)]
        if len(proved) != len(proofs) or len({(proof.budget, proof.coarse, proof.shadow) for proof in proved}) != 1:
            return False
        try:
            if not self.replace(proved, chunks):
                return False
        except NotAnIndexer:
            return False
        except Exception as error:
            log.warning("the chunks at %s are rewritten one by one: %s", nodes[0].name, error, exc_info=True)
            return False
        note = f"one call for {len(nodes)} chunks of queries"
        for node, proof in zip(nodes, proved, strict=True):
            site = self.kept(self.site(proof), proof.form)
            # What shadow mode finds of the one call goes by the first chunk's name.
            shadow = proof.shadow if node is nodes[0] else None
            self.sites[node] = replace(site, notes=(note, *site.notes), shadow=shadow)
        return True

    # Proving ----------------------------------------------------------------------------------------------------

    def attempt(self, node: Node, in_chunks: bool = False) -> Proof | Site:
        mark = mark_of(node)
        topk = form = None
        try:
            selection = Selection.read(node)
            topk = selection.topk
            form = describe_indexer(selection.score, selection.dim, selection.smallest)
            vectors = take_apart(form.conditions, form.queries, form.keys, in_chunks)
            check_obligations(self.facts, selection, form, vectors)
            return Proof(selection, form, vectors, *self.budget(topk, mark), self.settings.shadow_at(mark))
        except NotAnIndexer as reason:
            heads, head_dim = (None, None) if form is None else _sizes(form)
            return Site(
                _op(node),
                reason=str(reason),
                at="" if reason.node is None else place_of(reason.node),
                suggestion=reason.suggestion,
                topk=topk,
                heads=heads,
                head_dim=head_dim,
            )
        except Exception as error:
            return _internal_error(node, error)

    def budget(self, topk: int, mark: Mark | None) -> tuple[Budget, str | None]:
        """The budget, and the coarse stage where one is asked for; else each call chooses its own."""
        if mark is not None and not mark.enabled:
            raise NotAnIndexer("an indexer, opted out by its mark (enabled=False)")
        if mark is None and self.settings.scope == "marked":
            raise NotAnIndexer(
                'an indexer, not in a marked region while hisa.scope is "marked"',
                suggestion='decorate the module or function with @hisa_compile.hisa, or set hisa.scope to "all"',
            )
        block_size, block_topk, coarse = self.settings.budget_at(mark)
        try:
            return resolve_budget(topk, block_size, block_topk), coarse
        except ValueError as error:
            enough = "" if block_size is None else f" to at least {-(-topk // block_size)}"
            raise NotAnIndexer(
                f"an indexer, but the budget does not fit: {error}", suggestion=f"raise hisa.block_topk{enough}"
            ) from None

    # Replacing --------------------------------------------------------------------------------------------------

    def replace(self, proofs: list[Proof], chunks: Chunks | None) -> bool:
        """Put the call in the place of the selections.  False, and nothing changed, where chunks don't join."""
        last = max(proof.selection.node for proof in proofs)
        accesses = [access for proof in proofs for access in proof.form.operands()]
        sources = [access.node for access in accesses]
        fakes = (source.meta["val"] for source in sources)
        fake_mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), None)
        emit = Emitter(self.graph, last, sources, self.facts.sizes, fake_mode)
        try:
            found = self.emit(emit, proofs, chunks)
        except Exception as error:
            self.roll_back(emit)
            if isinstance(error, UnknownSizeError):
                raise NotAnIndexer(f"an indexer, but {error}") from None
            raise
        if found is None:
            self.roll_back(emit)
            return False
        self.pending.clear()
        for getter, replacement in found:
            getter.replace_all_uses_with(replacement)
        for proof in proofs:
            take_sizes_elsewhere(proof.form)
        ends = [node for proof in proofs for node in (proof.selection.node, *_unread(proof.selection.node))]
        self.erase_unused([*emit.added, *(getter for getter, _ in found), *ends])
        return True

    def roll_back(self, emit: Emitter) -> None:
        emit.roll_back()
        for key in self.pending:
            del self.visible[key]
        self.pending.clear()

    def emit(self, emit: Emitter, proofs: list[Proof], chunks: Chunks | None) -> list[tuple[Node, Node]] | None:
        selection, form = proofs[0].selection, proofs[0].form
        device = selection.score.meta["val"].device
        visibility = [self.visibility(emit, proof, device) for proof in proofs]
        arguments = visibility[0]
        dim = selection.dim % len(form.score.index)
        if chunks is not None:
            forms = [proof.form for proof in proofs]
            joined, together = join_queries(emit, chunks, forms), join_visibility(emit, forms, visibility)
            if joined is None or together is None:
                return None
            form, arguments = joined, together
            selection = replace(selection, values=chunks.values, indices=chunks.indices)
        self.asks_for_order = _asks_for_order(selection, dim) if selection.sorted else None
        in_order = self.asks_for_order is not None
        budget, coarse = proofs[0].budget, proofs[0].coarse
        shadow = None
        if proofs[0].shadow is not None:
            node = selection.node
            name = site_name(module_path(node), source_location(node))
            shadow = Shadow(name, proofs[0].shadow, self.settings.shadow_every)
        call = indexer_call(emit, form, selection.topk, budget, coarse, in_order, arguments, shadow)
        return outputs_of(emit, selection, form, call, dim)

    def visibility(self, emit: Emitter, proof: Proof, device: torch.device) -> dict[str, Node]:
        """The visibility arguments; layers that share a mask share what is made of it."""
        form = proof.form
        roles = (form.batch, form.queries, form.keys)
        labels = {axis: (role, number) for role, axes in enumerate(roles) for number, axis in enumerate(axes)}
        sizes = tuple(axis.size for axes in roles for axis in axes)
        key = (*(signature(condition, labels) for condition in form.conditions), sizes, device)
        known = self.visible.get(key)
        # What a joined call did not need is erased; a later selection may have been rewritten first, with its chunks.
        if known is None or any(node._erased or not node < emit.before for node in known.values()):
            self.visible[key] = visibility_arguments(emit, proof.vectors, *roles, device)
            self.pending.append(key)
        return self.visible[key]

    def erase_unused(self, nodes: list[Node]) -> None:
        """Erase the nodes that nobody uses any more, and what only they used."""
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node.op == "call_function" and not node._erased and not node.users and not node.is_impure():
                todo.extend(node.all_input_nodes)
                self.graph.erase_node(node)

    # Reporting --------------------------------------------------------------------------------------------------

    def site(self, proof: Proof) -> Site:
        heads, head_dim = _sizes(proof.form)
        return Site(
            _op(proof.selection.node),
            topk=proof.selection.topk,
            heads=heads,
            head_dim=head_dim,
            budget=proof.budget,
            form=in_index_notation(proof.form, proof.vectors),
            coarse=proof.coarse,
            shadow=proof.shadow,
        )

    def kept(self, site: Site, form: IndexerForm) -> Site:
        """With notes on who needs the order, and who still needs the scores."""
        notes = list(site.notes)
        order = self.asks_for_order
        notes.append("not sorted: nobody can tell the order" if order is None else f"sorted, for {describe(order)}")
        alive = [node for node in form.chain if not node._erased]
        others = sorted({user.name for node in alive for user in node.users if user not in form.chain})
        if others:
            notes.append(f"the scores are still computed for {', '.join(others)}: no memory is saved")
        return replace(site, notes=tuple(notes))


def _asks_for_order(selection: Selection, dim: int) -> Node | None:
    """The first node that may tell the order of what was selected; a sort was written for its order."""
    if selection.node.target not in TOPK:
        return selection.node
    values, indices = ([output.node for output in outputs] for outputs in (selection.values, selection.indices))
    return order_matters(values, indices, dim)


def _unread(node: Node) -> list[Node]:
    """The nodes at the ends of what is taken from a selection without being used."""
    found, todo = [], [node]
    while todo:
        node = todo.pop()
        if not node.users:
            found.append(node)
        # Whatever else uses it is not this pass's to look through.
        todo.extend(user for user in node.users if user.target in TAKES_PART)
    return found


def _read(node: Node) -> Selection | None:
    try:
        return Selection.read(node)
    except Exception:  # whatever it is, it is met again, and reported, when the selection is visited by itself
        return None


def _op(node: Node) -> str:
    return "topk" if "topk" in str(node.target) else "sort"


def place_of(node: Node) -> str:
    """A node, with its module and source line where the graph has them."""
    return " ".join(part for part in (describe(node), module_path(node), source_location(node)) if part)


def _sizes(form: IndexerForm) -> tuple[int | None, int | None]:
    """H and D, None where they are not plain numbers."""
    heads = sympy.Add(*(product_of_sizes(part.heads) for part in form.parts))
    dim = product_of_sizes(form.key_features)
    return tuple(int(size) if size.is_Integer else None for size in (heads, dim))  # type: ignore[return-value]


def _internal_error(node: Node, error: Exception) -> Site:
    # A bug in here, or a graph that nobody thought of, must not cost the user the compile.
    log.warning("a selection at %s could not be analysed and stays flat", node.name, exc_info=error)
    return Site(_op(node), reason=f"internal error: {type(error).__name__}: {error}")
