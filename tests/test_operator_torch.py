"""The operator as a citizen of torch: opcheck, fake tensors, export, autograd, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import DTYPES, FLOAT8, LAYOUTS, Call, assert_equal, make_values, relayout
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from hisa_compile import indexer_topk
from hisa_compile.ops.reference import pooled_dtype

OPERATOR = torch.ops.hisa.indexer_topk.default


def sample(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int, int] = (2, 3, 40, 2, 8),
    layout: str = "contiguous",
    topk: int = 8,
    **options: Any,
) -> Call:
    q, k, weights = make_values(torch.Generator().manual_seed(1), shape, dtype, "gaussian")
    q, k, weights = (relayout(x, layout) for x in (q, k, weights))
    return Call(q, k, weights, topk, {"block_size": 4, "block_topk": 4} | options)


def every_option(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "window_start": torch.tensor([[2], [7]]).int(),
        "window_end": torch.tensor([1, 20, 45]).int(),
        "key_valid": torch.rand(2, 40, generator=generator) > 0.2,
        "mask": torch.rand(3, 40, generator=generator) > 0.2,
        "k_scale": torch.rand(2, 40, generator=generator),
        "sorted": False,
        "mark_hidden": True,
        "q_segment": torch.tensor([[0], [1]]),
        "k_segment": torch.randint(0, 2, (2, 40), generator=generator),
        "k_weight": torch.randn(2, 40, generator=generator),
        "k_pooled": torch.randn(2, 10, 8, generator=generator).to(pooled_dtype(dtype)),
    }


SAMPLES = {
    **{f"{dtype}": sample(dtype) for dtype in DTYPES},
    **{f"layout {layout}": sample(layout=layout) for layout in LAYOUTS[1:]},
    "every option": sample(**every_option()),
    "float8 with every option": sample(FLOAT8, layout="strided", **every_option(FLOAT8)),
    "segments": sample(q_segment=torch.arange(3).int(), k_segment=torch.arange(80).view(2, 40).int() % 3),
    "expanded segments": sample(q_segment=torch.tensor(4), k_segment=torch.arange(40)[None].expand(2, 40) // 9),
    "weighted keys": sample(k_weight=torch.arange(-40.0, 40.0).view(2, 40)),
    "given means": sample(k_pooled=torch.arange(160.0).view(2, 8, 10).mT),
    "given means of no token": sample(shape=(2, 3, 0, 2, 8), k_pooled=torch.zeros(2, 0, 8)),
    "given means that are not read": sample(shape=(2, 3, 16, 2, 8), k_pooled=torch.zeros(2, 4, 8)),
    "no token in segments": sample(
        shape=(2, 3, 0, 2, 8), q_segment=torch.arange(3), k_segment=torch.zeros(2, 0).long(), k_weight=torch.zeros(2, 0)
    ),
    "the paper's stage": sample(coarse="paper"),
    "probe": sample(coarse="probe"),
    "probe of float8": sample(FLOAT8, layout="strided", coarse="probe"),
    "probe with every option": sample(**{n: x for n, x in every_option().items() if n != "k_pooled"}, coarse="probe"),
    "two levels": sample(shape=(2, 3, 300, 2, 8), coarse="two-level"),
    "two levels with given means": sample(shape=(2, 3, 300, 2, 8), k_pooled=torch.ones(2, 19, 8), coarse="two-level"),
    "probe of no token": sample(shape=(2, 3, 0, 2, 8), coarse="probe"),
    "derived budget": Call(*sample()[:3], 5, {}),
    "no batch": sample(shape=(0, 3, 40, 2, 8)),
    "no query": sample(shape=(2, 0, 40, 2, 8)),
    "no token": sample(shape=(2, 3, 0, 2, 8)),
    "topk 0": sample(topk=0),
    "fewer tokens than topk": sample(shape=(2, 3, 5, 2, 8)),
}
cases = pytest.mark.parametrize("call", SAMPLES.values(), ids=SAMPLES.keys())


def test_positions_of_arguments_stay() -> None:
    """Graphs made by earlier versions pass them by position; what came later comes last."""
    names = [argument.name for argument in OPERATOR._schema.arguments]
    first = "q k weights topk block_size block_topk window_start window_end key_valid mask k_scale sorted mark_hidden"
    assert names == [*first.split(), "q_segment", "k_segment", "k_weight", "k_pooled", "coarse"]


@cases
def test_opcheck_passes(call: Call) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic sizes, as torch checks them."""
    checks: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if call.k.dtype != FLOAT8:
        # This one compares tensors before and after, which torch can't do in float8; for float8
        # test_no_argument_is_written_to does.
        checks = ("test_schema", *checks)
    torch.library.opcheck(OPERATOR, (call.q, call.k, call.weights, call.topk), call.options, test_utils=checks)


@cases
def test_fake_results_have_the_real_ones_metadata(call: Call) -> None:
    """Shape, stride, dtype and device, under FakeTensorMode and on the meta device."""
    real = call.run(indexer_topk)
    mode = FakeTensorMode()
    with mode:
        fake_call = tree_map_only(Tensor, mode.from_tensor, tuple(call))
        fake = Call(*fake_call).run(indexer_topk)
    meta = Call(*tree_map_only(Tensor, lambda x: x.to("meta"), tuple(call))).run(indexer_topk)
    for expected, one, other in zip(real, fake, meta, strict=True):
        assert one.shape == other.shape == expected.shape
        assert one.stride() == other.stride() == expected.stride()
        assert one.dtype == other.dtype == expected.dtype
        assert (one.device.type, other.device.type) == ("cpu", "meta")


class Module(torch.nn.Module):
    def __init__(self, topk: int = 8, **options: Any) -> None:
        super().__init__()
        self.topk, self.options = topk, {"block_size": 4, "block_topk": 4} | options

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, window_end: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q, k, weights, self.topk, window_end=window_end, **self.options)


def causal_inputs(tokens: int, queries: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (2, queries, tokens, 2, 8)
    q, k, weights = make_values(torch.Generator().manual_seed(tokens), shape, torch.float32, "gaussian")
    return q, k, weights, torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32)


def test_an_exported_program_runs_at_other_lengths() -> None:
    """torch.export keeps the operator as one node; T stays symbolic."""
    length = torch.export.Dim("tokens", min=16)
    shapes = ({}, {1: length}, {}, {})
    program = torch.export.export(Module(), causal_inputs(40), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OPERATOR) == 1
    for tokens in (16, 40, 77):
        inputs = causal_inputs(tokens)
        assert_equal(program.module()(*inputs), Module()(*inputs))


class SegmentModule(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, weights: Tensor, ids: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(
            q, k, weights, 8, q_segment=ids[:, -3:], k_segment=ids, k_weight=factor, block_size=4, block_topk=4
        )


def segment_inputs(tokens: int) -> tuple[Tensor, ...]:
    q, k, weights, _ = causal_inputs(tokens)
    return q, k, weights, torch.arange(2 * tokens).view(2, tokens) // 6 % 5, k.sum(-1)


def test_segments_and_weights_export_and_compile_at_any_length() -> None:
    """T symbolic without a guard on it, in an exported program and in one compiled graph."""
    length = torch.export.Dim("tokens", min=16)
    shapes = ({}, {1: length}, {}, {1: length}, {1: length})
    program = torch.export.export(SegmentModule(), segment_inputs(40), dynamic_shapes=shapes).module()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(SegmentModule(), backend=counter, fullgraph=True)
    for tokens in (16, 40, 77):
        inputs = segment_inputs(tokens)
        expected = SegmentModule()(*inputs)
        assert_equal(program(*inputs), expected)
        for x in (inputs[1], *inputs[3:]):
            torch._dynamo.mark_dynamic(x, 1)
        assert_equal(compiled(*inputs), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_do_not_change_the_result(context: Callable[[], Any]) -> None:
    """inference_mode, no_grad and grad mode, the last with inputs that require grad."""
    inputs = causal_inputs(40)
    expected = Module()(*inputs)
    with context():
        assert_equal(Module()(*inputs), expected)
        tracked = [x.detach().requires_grad_() for x in inputs[:3]]
        indices, scores = Module()(*tracked, inputs[3])
    assert torch.equal(indices, expected[0])
    assert not indices.requires_grad
    assert scores.requires_grad == (context is torch.enable_grad)


def test_a_gradient_through_scores_is_refused_with_advice() -> None:
    """The error says what to do instead."""
    inputs = causal_inputs(40)
    q = inputs[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"gradient.*scores.*[Dd]etach"):
        Module()(q, *inputs[1:])[1].sum().backward()


def test_a_gradient_of_a_keys_weight_is_refused_too() -> None:
    """k_weight multiplies the scores, which carry no gradient."""
    inputs = segment_inputs(40)
    weight = inputs[4].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"gradient.*scores"):
        SegmentModule()(*inputs[:4], weight)[1].sum().backward()


def test_a_compiled_training_graph_refuses_the_gradient_when_it_is_compiled() -> None:
    """AOTAutograd traces the backward pass ahead of time, so there the same words come with the first call."""
    inputs = causal_inputs(40)
    q = inputs[0].requires_grad_()
    with pytest.raises(BackendCompilerFailed, match=r"gradient.*scores.*[Dd]etach") as error:
        torch.compile(Module(), backend="aot_eager")(q, *inputs[1:])
    assert isinstance(error.value.inner_exception, NotImplementedError)


def test_a_loss_that_uses_only_the_indices_has_its_gradient() -> None:
    """Gathering at the selected positions is differentiable in the gathered values."""
    q, k, weights, end = causal_inputs(40)
    k.requires_grad_()
    indices, _ = Module()(q, k, weights, end)
    chosen = k[torch.arange(2)[:, None, None], indices.long()]
    chosen.sum().backward()
    assert k.grad is not None
    assert k.grad.sum() == chosen.numel()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_equals_the_eager_one(backend: str, dynamic: bool) -> None:
    """fullgraph=True, with and without dynamic sizes, between other operations."""

    def program(q: Tensor, k: Tensor, weights: Tensor, end: Tensor) -> Tensor:
        indices, scores = indexer_topk(q * 1.0, k, weights, 8, window_end=end, block_size=4, block_topk=4)
        return scores + indices

    inputs = causal_inputs(44)
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(*inputs), program(*inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_hands_over_any_layout(layout: str) -> None:
    """Views that the compiled program makes reach the operator in place; the result does not change."""

    def program(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q.transpose(1, 2).transpose(1, 2), k[:, ::2], weights, 8, block_size=4, block_topk=4)

    call = sample(layout=layout, shape=(2, 3, 80, 2, 8))
    compiled = torch.compile(program, fullgraph=True)
    assert_equal(compiled(*call[:3]), program(*call[:3]))


def test_growing_lengths_compile_once() -> None:
    """A decode loop with T marked dynamic: one graph from the exact regime into pruning."""
    counter = CompileCounterWithBackend("inductor")
    module = torch.compile(Module(), backend=counter, fullgraph=True)
    for tokens in (15, 16, 17, 18, 40, 41):
        inputs = causal_inputs(tokens)
        torch._dynamo.mark_dynamic(inputs[1], 1)
        assert_equal(module(*inputs), Module()(*inputs))
    assert counter.frame_count == 1


def test_a_symbolic_topk_is_accepted() -> None:
    """A selection width that follows a dynamic size, as ``min(topk, T)`` in model code gives."""

    def program(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q, k, weights, k.shape[1] // 4, block_size=8, block_topk=4)

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (40, 60, 80):
        inputs = causal_inputs(tokens)[:3]
        assert_equal(compiled(*inputs), program(*inputs))
