"""A sweep over transformers' language models: nothing that is no DSA indexer is rewritten in any of them."""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

import hisa_compile

# Models with a DSA indexer or something close to it (qwen4_exp): a rewrite in them is no mistake.
INDEXERS = ("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "glm5_next", "hy_v4", "axk2", "qwen4_exp")
SECONDS = 480.0
LARGEST = 4_000_000  # parameters; what can't be shrunk below is skipped
PROMPT = 11

# Common fields and what they shrink to; a config gets those of them that it has as a number.
SMALL: dict[str, int] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "n_inner": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "sliding_window": 16,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}


def selects(model_class: type) -> bool:
    """Whether the model's own code has a top-k or a sort; those come first."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    return any(word in source for word in ("topk(", ".sort(", "argsort("))


def architectures() -> list[tuple[str, type]]:
    found = []
    for name, config_class in CONFIG_MAPPING.items():
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING and name not in INDEXERS:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            found.append((name, model_class[0] if isinstance(model_class, tuple) else model_class))
    return sorted(found, key=lambda each: (not selects(each[1]), each[0]))


def tiny(name: str, model_class: type) -> Any | None:
    """The model with random weights, None where its config can't be shrunk this way."""
    for dropped, changed in (((), {}), ((), {"num_key_value_heads": 4}), (("head_dim",), {"num_key_value_heads": 4})):
        try:
            config_class: type[PreTrainedConfig] = CONFIG_MAPPING[name]
            default = config_class()
            if getattr(default, "text_config", None) or getattr(default, "sub_configs", None):
                return None
            fields = {
                field: value
                for field, value in {**SMALL, **changed}.items()
                if type(getattr(default, field, None)) is int and field not in dropped
            }
            config = config_class(**fields, pad_token_id=None, bos_token_id=0, eos_token_id=1)
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                if sum(x.numel() for x in model_class(config).parameters()) > LARGEST:
                    continue
            torch.manual_seed(0)
            model = model_class(config).eval()
            with torch.no_grad():
                logits(model, prompt())
        except Exception:  # anything: an inconsistent config, an optional dependency that is missing
            continue
        return model
    return None


def prompt() -> Tensor:
    return torch.randint(2, 67, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def logits(run: Any, ids: Tensor) -> Tensor:
    result = run(ids, use_cache=False, return_dict=True).logits
    assert isinstance(result, Tensor)
    return result


def compiled_logits(model: Any, backend: str, **settings: Any) -> Tensor:
    torch._dynamo.reset()
    return logits(torch.compile(model, backend=backend, **settings), prompt())


def compiled_reports(model: Any) -> Iterator[hisa_compile.Report]:
    """Reports of the model's graphs, after its logits were compared with eager mode's.

    A model may trace to something else than it runs (doge does): then its traced graph in eager mode counts.
    """
    before = len(hisa_compile.reports())
    options = {"hisa.base": "aot_eager", "hisa.block_size": 4, "hisa.block_topk": 64}
    with torch.no_grad():
        want = logits(model, prompt())
        got = compiled_logits(model, "hisa", options=options)
        if not torch.allclose(got, want, rtol=1e-3, atol=1e-3, equal_nan=True):
            want = compiled_logits(model, "eager")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
    yield from hisa_compile.reports()[before:]


@pytest.mark.slow
def test_no_language_model_without_an_indexer_is_rewritten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many architectures as fit in the time, those with a top-k first: no rewrite, eager mode's logits."""
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    started, tried, selections, skipped, wrong = time.monotonic(), [], 0, [], []
    for name, model_class in architectures():
        if time.monotonic() - started > SECONDS:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny(name, model_class)
            if model is None:
                skipped.append(name)
                continue
            tried.append(name)
            try:
                reports = list(compiled_reports(model))
            except torch._dynamo.exc.TorchDynamoException as error:
                if "hisa" in str(error):
                    wrong.append(f"{name}: {error}")
                tried.remove(name)
                skipped.append(name)
                continue
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
                continue
        selections += sum(len(report.sites) for report in reports)
        wrong += [f"{name}: {site}" for report in reports for site in report.rewritten]
        wrong += [f"{name}: {site}" for report in reports for site in report.sites if "internal error" in site.reason]
    with capsys.disabled():
        print(f"\n{len(tried)} models tried, {selections} selections seen, {len(skipped)} not built: {skipped}")
    assert not wrong
    assert len(tried) >= 30
    assert selections >= 30
