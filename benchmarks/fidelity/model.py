"""SmolLM2-135M from its GGUF file in transformers' Llama, with an attention that can be looked into or replaced."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import sources

LAYERS, HEADS, GROUPS, DIM, HIDDEN = 30, 9, 3, 64, 576
NATIVE_LENGTH = 8192

# (layer, q [B, heads, S, D], k [B, groups, T, D], v [B, groups, T, D], scaling) -> [B, heads, S, D]; q and k rotated.
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
_NAME = "hisa_fidelity"
_attention: Attention | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention [B, heads, S, D]; mask bool [.., S, T], None for a causal one of as many queries as keys."""
    # Each head has keys of its own: the one CUDA kernel of float32 that does not keep all of S x T knows no groups.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    attention = nn.functional.scaled_dot_product_attention
    if mask is not None:
        return attention(q, k, v, attn_mask=mask, scale=scaling)
    # Should that kernel not be had, the S x S of one text is what there is room for.
    texts = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([attention(*text, is_causal=True, scale=scaling) for text in texts])


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Dense attention, what the model was trained with; the queries are the last tokens."""
    queries, tokens = q.shape[2], k.shape[2]
    mask = None
    if queries != tokens:
        position = torch.arange(tokens - queries, tokens, device=q.device)
        mask = torch.arange(tokens, device=q.device) <= position[:, None]
    return attend(q, k, v, mask, scaling)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    out = (_attention or causal)(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


@contextlib.contextmanager
def attention(replacement: Attention) -> Iterator[None]:
    """Inside it, models of :func:`load` attend by ``replacement``."""
    global _attention
    before, _attention = _attention, replacement
    try:
        yield
    finally:
        _attention = before


def _rows_as_transformers_has_them(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of a head that rotary embedding turns; transformers has one after the other."""
    out, inside = weight.shape
    return weight.view(heads, out // heads // 2, 2, inside).transpose(1, 2).reshape(out, inside)


def _state(path: str) -> dict[str, Tensor]:
    # Who tests the harness without a model does not need it.
    from gguf import GGUFReader, dequantize

    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in GGUFReader(path).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        first, _, rest = tensor.name.partition(".")
        if first == "blk":
            layer, part, _ = rest.split(".")
            if part in ("attn_q", "attn_k"):
                weight = _rows_as_transformers_has_them(weight, HEADS if part == "attn_q" else GROUPS)
            state[f"model.layers.{layer}.{names[part]}.weight"] = weight
        elif first == "token_embd":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
        elif first == "output_norm":
            state["model.norm.weight"] = weight
    return state


@contextlib.contextmanager
def normalised_inputs(lm: Any) -> Iterator[dict[int, Tensor]]:
    """Inside it, the normalised input [B, T, HIDDEN] of each layer by its number, from when the layer has it."""
    inputs: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: inputs.__setitem__(number, output)

    hooks = [layer.input_layernorm.register_forward_hook(keep(i)) for i, layer in enumerate(lm.model.layers)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def architecture(layers: int = LAYERS, vocabulary: int = 49152, stretch: float = 1) -> transformers.LlamaConfig:
    """stretch: read so many times the native length by interpolation of positions, YaRN's, which needs no training."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e5}
    if stretch != 1:
        rope |= {"rope_type": "yarn", "factor": stretch, "original_max_position_embeddings": NATIVE_LENGTH}
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=round(stretch * NATIVE_LENGTH),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=rope,
        attn_implementation=_NAME,
    )


def interpolate(lm: Any, stretch: float) -> None:
    """From now on the model's positions are those of :func:`architecture` with this ``stretch``."""
    config = architecture(stretch=stretch)
    # Its frequencies are no part of the model's state.
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config).to(lm.device)


def load(device: str = "cpu", stretch: float = 1) -> transformers.LlamaForCausalLM:
    """The model in float32."""
    config = architecture()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.load_state_dict(_state(str(sources.weights_file())), assign=True, strict=True)
    interpolate(model, stretch)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def tokenizer() -> Any:
    kept = sources.cache() / "tokenizer"
    if not kept.exists():
        path = sources.weights_file()
        # It takes longer to make than all else of a small measurement.  Kept only once it is whole.
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / kept.name
            transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(made)
            made.replace(kept)
    return transformers.AutoTokenizer.from_pretrained(kept)
