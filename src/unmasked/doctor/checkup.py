"""Look at a model: with its weights, or at the shape that its config describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unmasked.doctor import memory
from unmasked.doctor.engines import engines
from unmasked.doctor.machine import Facts
from unmasked.errors import ModelError, NotBidirectionalError
from unmasked.mask.opening import learned_positions

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.mask.proof import Proof

SHRINKING = (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError)


def examine(name: str, load: bool | None = None) -> Facts:
    """Look at a model.

    Args:
        name: `nano`, a folder or a hub name.
        load: look at the weights; by default those of a local folder only.

    Returns:
        Facts; ``bidirectional`` is whether it can be used.

    Raises:
        ModelError: it cannot be read at all.
    """
    from unmasked.checkpoint.location import locate

    local = Path(locate(name).name).is_dir()
    return _weights(name) if (local if load is None else load) else _shape(name)


def _weights(name: str) -> Facts:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.mask.proof import stock_loading

    examined = {"model": name, "examined": "the weights"}
    try:
        model = LLM2Vec.from_pretrained(name, allow_partial=True)
        report = model.report
    except NotBidirectionalError as error:
        report = error.report
        try:
            model = LLM2Vec.from_pretrained(name, enable_bidirectional=False)
        except (ModelError, RuntimeError):  # it fails even as it is: the report says how
            return {**examined, **_proof(report)}
    decoder: Any = model.backbone.auto_model
    parameters = list(decoder.parameters())
    return {
        **examined,
        **_proof(report, decoder),
        **_sizes(decoder, decoder.config, sum(p.numel() for p in parameters)),
        "packed": model.backbone.unpackable or "yes: packed and single forwards agree",
        "device": str(model.device),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "dtype_why": model.precision.reason if model.precision else "as given",
        "pooling": model.settings.pooling_mode,
        "max_length": model.settings.max_length,
        **_tokens(model),
        "engine": engines(report, decoder.config, stock_loading(decoder)),
        **_memory(name, decoder, parameters[0].dtype, model.device),
    }


def _shape(name: str) -> Facts:
    """Config and tokenizer only; what is proved is a random miniature of the config."""
    from transformers import AutoModel

    from unmasked.checkpoint import loading
    from unmasked.doctor.miniature import miniature
    from unmasked.doctor.tokenizer import describe
    from unmasked.forward import precision
    from unmasked.forward.packing import enable_packing
    from unmasked.mask.proof import stock_loading
    from unmasked.text.tokens import TextTokenizer, prepare_tokenizer

    config = loading.load_config(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = precision.pick("auto", device, config)
    with torch.device("meta"):  # no memory for weights
        whole = AutoModel.from_config(config)
    try:
        decoder, report = _random(miniature(config))
    except SHRINKING as error:
        raise ModelError(
            f"{name}: no miniature of this {config.model_type} can be built ({error}). "
            "Fix: --load, to look at the weights themselves."
        ) from error
    stock = stock_loading(decoder)
    packed = enable_packing(decoder) if report.verdict == "full" else f"it is {report.verdict}"
    tokenizer = prepare_tokenizer(loading.load_tokenizer(name))
    return {
        "model": name,
        "examined": "the shape: a random miniature of its config; --load looks at the weights",
        **_proof(report, decoder),
        **_sizes(decoder, config, sum(p.numel() for p in whole.parameters())),
        "packed": packed or "yes: packed and single forwards agree",
        "device": str(device),
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "dtype_why": chosen.reason,
        **describe(TextTokenizer(tokenizer, 512), {}),
        "engine": engines(report, config, stock),
        **_memory(name, whole, chosen.dtype, device),
    }


def _random(config: Any) -> tuple[Any, Proof]:
    """A random model of a config, opened as `loading.load` does, and the proof."""
    from transformers import AutoModel

    from unmasked.mask.opening import open_config
    from unmasked.mask.proof import open_mask

    report = None
    for attention in ({}, {"attn_implementation": "eager"}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModel.from_config(open_config(config), **attention).eval()
        report = open_mask(model)
        if report.verdict != "impossible" or report.attention == "eager":
            break
    assert report is not None
    return model, report


def _proof(report: Proof, decoder: nn.Module | None = None) -> Facts:
    found = report.as_dict()
    sdpa = getattr(decoder, "_supports_sdpa", True)
    why = "what transformers picks for it"
    if report.attention == "eager":
        why = "sdpa stays causal here" if sdpa else "the family has no sdpa"
    return {
        "model_type": found["model_type"],
        "bidirectional": report.verdict != "impossible",
        "verdict": report.verdict,
        "reason": report.reason,
        "causal_layers": found["causal_layers"],
        "padding_drift": found["padding_drift"],
        "attention": report.attention,
        "attention_why": why,
        "window_to_each_side": report.window,
    }


def _sizes(decoder: Any, config: Any, parameters: int) -> Facts:
    text = config.get_text_config()
    return {
        "parameters": parameters,
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "sliding_window": getattr(text, "sliding_window", None),
        "max_positions": getattr(text, "max_position_embeddings", None),
        "positions": _positions(decoder),
    }


def _positions(decoder: Any) -> str:
    """How a model knows where a token stands, by the modules it has."""
    text = decoder.config.get_text_config()
    if learned_positions(decoder) is not None:
        return "learned, absolute: no longer texts"
    if getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None):
        return "rotary"
    return "neither learned nor rotary (ALiBi, or none)"


def _tokens(model: LLM2Vec) -> Facts:
    from unmasked.doctor.tokenizer import describe

    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    return describe(model.backbone.tokens, prompts)


def _memory(name: str, decoder: Any, dtype: torch.dtype, device: torch.device) -> Facts:
    parameters = sum(p.numel() for p in decoder.parameters())
    return {
        "memory_to_encode": memory.to_encode(decoder.config, parameters, dtype, device),
        "memory_to_train": memory.to_train(name),
    }
