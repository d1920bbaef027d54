"""What explain prints: why a near miss is left alone and what would help, and the formula of a match."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from programs import Program
from test_explain_exported import SMALL, Spelled, exported, line_of
from torch.nn import functional as F

from hisa_compile import explain, hisa

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class NearMiss:
    """Indexers but for one thing; ``# here`` is the line that the report must point at."""

    @staticmethod
    def no_relu(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k) * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def gelu(q, k, w):
        scores = (F.gelu(torch.einsum("bshd,btd->bsht", q, k)) * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def smallest(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6, largest=False).indices  # here

    @staticmethod
    def finite_fill(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        scores = scores.masked_fill(torch.arange(21) > 9, -1.0)  # here
        return scores.topk(6).indices

    @staticmethod
    def float64(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q.double(), k.double()).relu() * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def mask_inside(q, k, w):
        per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
        per_head = per_head.masked_fill(torch.arange(21) > 9, float("-inf"))  # here
        return (per_head * w[..., None]).sum(2).topk(6).indices

    @staticmethod
    def weights_over_keys(q, k, w):
        weights = k.sum(-1)  # here
        per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
        return (per_head * weights[:, None, None]).sum(2).topk(6).indices

    @staticmethod
    def added(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        bias = w.sum(-1, keepdim=True) * torch.arange(21)  # here
        return (scores + bias).topk(6).indices

    @staticmethod
    def share_of_the_keys(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(k.shape[1] // 2).indices  # here

    @staticmethod
    def whole_sort(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        order = scores.sort(descending=True).indices
        return order * 2  # here

    @staticmethod
    def own_keys(q, k, w):
        keys = k[:, None] * w.sum(-1)[:, :, None, None]  # here
        scores = (torch.einsum("bshd,bstd->bsht", q, keys).relu() * w[..., None]).sum(2)
        return scores.topk(6).indices

    @staticmethod
    def values(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6).values  # here

    @staticmethod
    def plain(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6).indices  # here


# program, the reason, the node, the suggestion ("" where there is none), options
PRINTED: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "no ReLU": ("no_relu", "no ReLU around the product", r"at aten\.bmm", r"apply torch\.relu to the products", {}),
    "another activation": ("gelu", r"aten\.erf.* is applied instead", r"at aten\.erf", r"apply torch\.relu", {}),
    "smallest": ("smallest", "keeps the smallest scores", r"at aten\.sum", r"topk\(-score, largest=False\)", {}),
    "finite fill": (
        "finite_fill",
        "-1 in the place of scores .* hides no token",
        r"at aten\.gt",
        "-inf or torch.finfo",
        {},
    ),
    "float64": ("float64", r"computed in torch\.float64", r"at aten\.", "compute the score in float32", {}),
    "mask inside": ("mask_inside", "inside the sum over heads", r"at aten\.gt", "after the sum over heads", {}),
    "weights over keys": (
        "weights_over_keys",
        "vary over the keys",
        r"at aten\.sum",
        "weights must not vary over the keys",
        {},
    ),
    "added": ("added", "added to the score that is not provably a mask", r"at aten\.", r"masked_fill\(hidden", {}),
    "k is no number": ("share_of_the_keys", "neither a number nor min", "at .*floordiv", "select a fixed number", {}),
    "whole sort": ("whole_sort", "a full sort, not a top-k", r"at aten\.mul", "", {}),
    "own keys": ("own_keys", "each query has keys of its own", r"at aten\.", "", {}),
    "values in training": ("values", "a gradient may flow", "at .*getitem", r"under torch\.no_grad\(\)", {}),
    "opted out": ("plain", "opted out by its mark", "", "", {}),
    "scope": (
        "plain",
        "not in a marked region",
        "",
        r"@hisa_compile\.hisa, or set hisa\.scope",
        {"hisa.scope": "marked"},
    ),
    "budget": (
        "plain",
        "got 2 \\* 1 = 2 candidates, expected at least topk = 6",
        "",
        "",
        {"hisa.block_size": 1, "hisa.block_topk": 2},
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_near_miss_is_printed_with_reason_node_line_and_what_would_help(name: str, capsys) -> None:
    """The line is one of the user's own code."""
    function, reason, node, suggestion, options = PRINTED[name]
    run = getattr(NearMiss, function)
    line = line_of(run, "# here")
    q, k, w = torch.randn(2, 5, 3, 4), torch.randn(2, 21, 4), torch.randn(2, 5, 3)
    if name == "values in training":
        q.requires_grad_()
    if name == "k is no number":
        torch._dynamo.mark_dynamic(k, 1)
    report = explain(hisa(enabled=False)(run) if name == "opted out" else run, q, k, w, hisa_options=options)
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    assert report.summary().startswith("0 of 1 selections")
    first, *rest = printed.splitlines()[1:]
    place = f"test_explain_printed.py:{line}"
    assert re.search(f"left alone: .*{reason}", first), printed
    assert place in printed, printed
    at = [text for text in rest if text.startswith("    at ")]
    assert bool(at) == bool(node), printed
    assert not node or re.search(node, at[0]), printed
    help_ = [text for text in rest if text.startswith("    to be rewritten: ")]
    assert not suggestion or re.search(suggestion, help_[0]), printed


NOTATION = {
    "causal prefill": (
        Program(mask="visible"),
        "score[b,s,t] = sum_h weights[b,s,h] * relu(sum_d q[b,s,h,d] * k[b,t,d])",
        "visible where t <= unsqueeze[s,0]",
    ),
    "padded and packed": (
        Program(mask="everything", scale="negative"),
        "score[b,s,t] = sum_h weights[b,s,h] * relu(-0.5 * sum_d q[b,s,h,d] * k[b,t,d])",
        "visible where t >= sub[s,0] and t <= unsqueeze[s,0] and unsqueeze[b,s,0] == k_ids[b,t] and valid[b,t]",
    ),
    "loop over heads": (
        Program(head_sum="loop", heads=2),
        "score[b,s,t] = (select[b,s] * relu(sum_d slice[b,s,0,d] * k[b,t,d])"
        " + select[b,s] * relu(sum_d slice[b,s,0,d] * k[b,t,d]))",
    ),
    "two heads axes": (
        Program(layout="two_heads", mask="free"),
        "score[b,s,t] = sum_h0h1 weights[b,s,h0h1] * relu(sum_d q[b,s,h0h1,d] * k[b,t,d])",
        "visible where free[b,s,t]",
    ),
    "sequence first, key scales": (
        Program(layout="sbhd", scale="key_on_product", upcast=True),
        "score[b,s,t] = sum_h weights[s,b,h] * relu(key_scale[b,t] * sum_d q[s,b,h,d] * k[t,b,d])",
    ),
    "weights of the keys": (
        Program(scale="key_after"),
        "score[b,s,t] = key_scale[b,t] * sum_h weights[b,s,h] * relu(sum_d q[b,s,h,d] * k[b,t,d])",
    ),
    "heads of equal weight": (
        Program(head_sum="none", scale="after_relu"),
        "score[b,s,t] = 0.5 * sum_h relu(sum_d q[b,s,h,d] * k[b,t,d])",
    ),
}


@pytest.mark.parametrize("name", NOTATION)
def test_a_match_is_printed_in_index_notation(name: str, capsys) -> None:
    """The export's inputs keep their names; what the graph computes has ATen's, whose numbers are left out here."""
    program, *expected = NOTATION[name]
    explain(exported(Spelled(program), *program.inputs()), hisa_options=SMALL)
    summary, site, *lines = capsys.readouterr().out.splitlines()
    assert summary == "1 of 1 selections (top-k or sort) rewritten to hisa::indexer_topk"
    line = line_of(Spelled.Indexer.forward, "program.run")
    assert re.fullmatch(
        rf"indexer \(Indexer\) \S*test_explain_exported\.py:{line}: topk\(6\) rewritten, block_size=4 block_topk=3, "
        r"exact up to 12 visible tokens",
        site,
    )
    form = [text.strip() for text in lines if text.startswith(("    score", "    visible"))]
    assert [re.sub(r"\b([a-z]+)_\d+\[", r"\1[", text) for text in form] == expected
    assert [text for text in lines if "multiply-adds" in text]
    assert lines[-1] == "    note: sorted, for output (output)"
