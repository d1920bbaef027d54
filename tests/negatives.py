"""Selections of real models and methods that are no DSA indexers.

Each case builds a callable and its inputs; it runs a top-k or a sort, and a rewrite of any of them would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F


class Case(NamedTuple):
    """run(*args, **kwargs) gives a tensor, or a nest of tuples and dicts of tensors."""

    run: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never changed


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# Mixture-of-experts routers of transformers -----------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
}
_SHARED: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}

# name -> (config, model, overrides)
ROUTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "head_dim": 6, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_MLA, **_SHARED, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_MLA, **_SHARED, "first_k_dense_replace": 1}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_SHARED, "head_dim": 6, "first_k_dense_replace": 1}),
    "dots1": ("Dots1Config", "Dots1ForCausalLM", {**_SHARED, "head_dim": 6, "first_k_dense_replace": 1}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "head_dim": 6, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1},
    ),
    "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"num_local_experts": 8, "head_dim": 6}),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **_MLA,
            "n_routed_experts": 8,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 12,
            "ffn_hidden_size": 20,
            "moe_topk": 2,
            "num_layers": 1,
            "head_dim": 4,
        },
    ),
    # Its indexer scores blocks: no ReLU, no sum over heads, a maximum over a block, one selection a head.
    "minimax_m3_vl": (
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLTextModel",
        {
            "num_local_experts": 8,
            "head_dim": 8,
            "rotary_dim": 4,
            "dense_intermediate_size": 20,
            "shared_intermediate_size": 12,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 3,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
        },
    ),
}


def router(name: str) -> Case:
    config_class, model_class, overrides = ROUTERS[name]
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[model_class])
    config = getattr(transformers, config_class, None) or getattr(
        __import__(f"transformers.models.{name}.configuration_{name}", fromlist=[config_class]), config_class
    )
    torch.manual_seed(0)
    model = getattr(module, model_class)(config(**{**_TEXT, **overrides})).eval()
    return Case(model, (whole(2, 61, 2, 23),), {"use_cache": False})


# Query selection of detection models ----------------------------------------------------------------------------------


def _resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 10, 12, 14],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def _image(side: int = 64) -> Tensor:
    return numbers(1, 3, side, side, seed=3)


_QUERIES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "num_queries": 9,
    "num_labels": 5,
}


def deformable_detr() -> Case:
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        **_QUERIES,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet(),
        two_stage=True,
        two_stage_num_proposals=9,
        with_box_refine=True,
        num_feature_levels=3,
    )
    return Case(transformers.DeformableDetrForObjectDetection(config).eval(), (_image(),))


def _rt_detr_like(prefix: str) -> Case:
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 10, 12, 14],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = getattr(transformers, f"{prefix}Config")(
        **_QUERIES,
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[10, 12, 14],
        decoder_in_channels=[32, 32, 32],
        num_denoising=0,
        anchor_image_size=None,
    )
    return Case(getattr(transformers, f"{prefix}ForObjectDetection")(config).eval(), (_image(),))


def grounding_dino() -> Case:
    """Its queries are the image tokens that match some text token best."""
    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        **{name: value for name, value in _QUERIES.items() if name != "num_labels"},
        use_timm_backbone=False,
        backbone=None,
        backbone_config=transformers.SwinConfig(
            image_size=128,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(
            vocab_size=2000,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=32,
        ),
        max_text_len=16,
        num_feature_levels=4,
    )
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    text = torch.tensor([[101, 1050, 1060, 1012, 1070, 1012, 102]])
    return Case(model, (_image(128), text), {"attention_mask": torch.ones_like(text)})


# Decoding ----------------------------------------------------------------------------------


def beam_search_step(logits: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 x beams candidates among all continuations of all beams."""
    batch, beams, words = logits.shape
    total = F.log_softmax(logits, -1) + running[..., None]
    best, at = total.view(batch, beams * words).topk(2 * beams, dim=-1)
    return best, at // words, at % words


def sampler(logits: Tensor, topk: int = 12, topp: float = 0.8) -> Tensor:
    """Top-k, then top-p over the sorted rest."""
    kept = logits.masked_fill(logits < logits.topk(topk).values[..., -1:], float("-inf"))
    ordered, at = kept.sort(descending=True)
    cumulative = ordered.softmax(-1).cumsum(-1)
    hidden = (cumulative - ordered.softmax(-1) > topp).scatter(-1, at, cumulative - ordered.softmax(-1) > topp)
    return kept.masked_fill(hidden, float("-inf")).softmax(-1)


# Retrieval and memories ----------------------------------------------------------------------------------


class Retrieval(nn.Module):
    """Documents by their product with a query, optionally with a ReLU'd layer before it."""

    def __init__(self, hidden: bool, documents: int = 40) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encode = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) if hidden else nn.Identity()
        self.documents = nn.Parameter(numbers(documents, 12, seed=5))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        values, at = (self.encode(queries) @ self.documents.T).topk(6)
        return values, at


class LateInteraction(nn.Module):
    """ColBERT: the best document token of each query token, summed; a ReLU'd projection on both sides."""

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        product = torch.einsum("qsd,ntd->qnst", queries.relu(), documents.relu())
        return product.amax(-1).sum(-1).topk(4).indices


class ProductKeys(nn.Module):
    """A memory layer: the best half keys twice, then the best of their sums, and the values' weighted sum."""

    def __init__(self, half: int = 16, dim: int = 12, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.query = nn.Linear(dim, heads * dim)
        self.keys = nn.Parameter(numbers(2, heads, half, dim // 2, seed=6))
        self.values = nn.EmbeddingBag(half * half, dim, mode="sum")
        self.half, self.heads = half, heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        query = self.query(x).view(batch * length, self.heads, 2, dim // 2)
        first, at_first = torch.einsum("nhd,hkd->nhk", query[:, :, 0], self.keys[0]).topk(4)
        second, at_second = torch.einsum("nhd,hkd->nhk", query[:, :, 1], self.keys[1]).topk(4)
        score, at = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(4)
        slot = at_first.gather(-1, at // 4) * self.half + at_second.gather(-1, at % 4)
        weight = score.softmax(-1)
        flat = self.values(slot.flatten(1), per_sample_weights=weight.flatten(1))
        return flat.view(batch, length, dim)


def relu_memory(x: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """A feed-forward layer whose strongest ReLU'd neurons alone are kept: a ReLU and a top-k, no sum over heads."""
    values, at = F.relu(x @ keys.T).topk(5)
    return torch.einsum("bsk,bskd->bsd", values, out[at])


# Vision ----------------------------------------------------------------------------------


def token_pruning(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """EViT: the patches that the class token attends to most, averaged over the heads."""
    attention = (q[:, :, :1] @ k.transpose(-1, -2) * 0.3).softmax(-1)
    keep = attention[:, :, 0, 1:].mean(1).topk(7, dim=-1).indices
    return x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def heavy_hitters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """H2O: the keys with the largest attention mass over queries and heads."""
    attention = (q @ k.transpose(-1, -2)).softmax(-1)
    keep = attention.sum((1, 2)).topk(8, dim=-1).indices.sort(-1).values
    return v.gather(2, keep[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[-1]))


def block_selection(q: Tensor, k: Tensor) -> Tensor:
    """MoBA, NSA: the mean key of each block, one selection a head."""
    means = k.unflatten(2, (-1, 4)).mean(3)
    scores = q @ means.transpose(-1, -2)
    future = torch.arange(means.shape[2]) > torch.arange(q.shape[2])[:, None] // 4
    return scores.masked_fill(future, float("-inf")).topk(3).indices


class Classifier(nn.Module):
    """ReLU layers and the best classes; a bias of the last one is a bias over the keys."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 30, bias=bias), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, at = self.layers(x).topk(5)
        return values, at


def suppression(boxes: Tensor, scores: Tensor) -> Tensor:
    """Matrix NMS: sorted by score, decayed by the overlap with a better box, the best of what is left."""
    ordered, at = scores.sort(descending=True)
    corner, far = boxes[at].chunk(2, -1)
    far = corner + far.abs()
    overlap = (torch.minimum(far[:, None], far[None]) - torch.maximum(corner[:, None], corner[None])).relu().prod(-1)
    area = (far - corner).prod(-1)
    ratio = (overlap / (area[:, None] + area[None] - overlap).clamp_min(1e-6)).triu(1)
    return at[(ordered * (1 - ratio.amax(0))).topk(6).indices]


# The table ----------------------------------------------------------------------------------

CASES: dict[str, Callable[[], Case]] = {
    **{f"router of {name}": lambda name=name: router(name) for name in ROUTERS},
    "deformable_detr, two stages": deformable_detr,
    "rt_detr": lambda: _rt_detr_like("RTDetr"),
    "rt_detr_v2": lambda: _rt_detr_like("RTDetrV2"),
    "d_fine": lambda: _rt_detr_like("DFine"),
    "grounding_dino": grounding_dino,
    "beam search": lambda: Case(beam_search_step, (numbers(2, 3, 17), numbers(2, 3, seed=1))),
    "sampler": lambda: Case(sampler, (numbers(3, 40),)),
    "retrieval": lambda: Case(Retrieval(hidden=False), (numbers(7, 12),)),
    "retrieval after a ReLU": lambda: Case(Retrieval(hidden=True), (numbers(2, 7, 12),)),
    "late interaction": lambda: Case(LateInteraction(), (numbers(3, 5, 8), numbers(9, 7, 8, seed=1))),
    "product keys": lambda: Case(ProductKeys(), (numbers(2, 5, 12),)),
    "ReLU memory": lambda: Case(relu_memory, (numbers(2, 5, 8), numbers(30, 8, seed=1), numbers(30, 8, seed=2))),
    "token pruning": lambda: Case(
        token_pruning, (numbers(2, 3, 17, 8), numbers(2, 3, 17, 8, seed=1), numbers(2, 17, 24, seed=2))
    ),
    "heavy hitters": lambda: Case(
        heavy_hitters, (numbers(2, 3, 20, 8), numbers(2, 3, 20, 8, seed=1), numbers(2, 3, 20, 8, seed=2))
    ),
    "blocks, one selection a head": lambda: Case(block_selection, (numbers(2, 3, 24, 8), numbers(2, 3, 24, 8, seed=1))),
    "classifier": lambda: Case(Classifier(bias=True), (numbers(2, 4, 12),)),
    "classifier without biases": lambda: Case(Classifier(bias=False), (numbers(2, 4, 12),)),
    "suppression": lambda: Case(suppression, (numbers(20, 4), numbers(20, seed=1))),
}
