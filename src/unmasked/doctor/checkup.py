"""The facts of a model, found with its weights or from its config alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModel

from unmasked.checkpoint import loading
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.doctor.machine import Facts
from unmasked.doctor.memory import estimates
from unmasked.doctor.miniature import miniature
from unmasked.doctor.requirements import requirements
from unmasked.doctor.tokenizer import describe
from unmasked.errors import ModelError, NotBidirectionalError
from unmasked.forward import precision
from unmasked.forward.packing import enable_packing
from unmasked.mask.opening import learned_positions, open_config
from unmasked.mask.proof import Proof, open_mask, stock_loading
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer


def examine_weights(name: str) -> Facts:
    """The facts of a model with its weights."""
    head = {"model": name, "examined": "the weights"}
    try:
        model = LLM2Vec.from_pretrained(name, allow_partial=True)
        report = model.report
    except NotBidirectionalError as error:
        report = error.report
        try:
            model = LLM2Vec.from_pretrained(name, enable_bidirectional=False)
        except (ModelError, RuntimeError):  # it fails even with its mask: the report says how
            return {**head, **_proof(report)}
    decoder: Any = model.backbone.auto_model
    tokens, pooling = model.backbone.tokens, model.settings.pooling_mode
    dtype = next(decoder.parameters()).dtype
    chosen = precision.Precision(dtype, model.precision.reason if model.precision else "as given")
    return {
        **head,
        **_proof(report, decoder),
        **_sizes(decoder, decoder, model.backbone.unpackable, model.device, chosen),
        "pooling": pooling,
        "max_length": model.settings.max_length,
        **describe(tokens, {key: prompt for key, prompt in model.prompts.items() if prompt}),
        "engine": requirements(report, decoder.config, stock_loading(decoder), tokens, pooling),
        **estimates(name, decoder, dtype, model.device),
    }


def examine_config(name: str) -> Facts:
    """The facts of config and tokenizer; the proof runs on a random miniature of the config."""
    config = loading.load_config(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = precision.pick("auto", device, config)
    whole = _without_weights(config)
    try:
        decoder, report = _random(miniature(config))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name}: a miniature of this {config.model_type} cannot be built ({error}). "
            "Fix: give --load, which examines the weights themselves."
        ) from error
    stock = stock_loading(decoder)
    unpacked = enable_packing(decoder) if report.verdict == "full" else f"it is {report.verdict}"
    tokens = TextTokenizer(prepare_tokenizer(loading.load_tokenizer(name)), 512)
    return {
        "model": name,
        "examined": "the shape: a random miniature of its config; --load examines the weights",
        **_proof(report, decoder),
        **_sizes(decoder, whole, unpacked, device, chosen),
        **describe(tokens, {}),
        "engine": requirements(report, config, stock, tokens, "mean"),
        **estimates(name, whole, chosen.dtype, device),
    }


def _without_weights(config: Any, **how: Any) -> Any:
    """A model on the meta device, which takes no memory."""
    with torch.device("meta"):
        return AutoModel.from_config(copy.deepcopy(config), **how)


def _random(config: Any) -> tuple[Any, Proof]:
    """A random model of a config, opened as `load_transformer` opens one, and its proof."""
    for attention in ({}, {"attn_implementation": "eager"}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModel.from_config(open_config(config), **attention).eval()
        report = open_mask(model)
        if report.verdict != "impossible" or report.attention == "eager":
            break  # eager attention would change nothing
    return model, report


def _proof(report: Proof, decoder: Any = None) -> Facts:
    found = report.as_dict()
    why = "what transformers chooses for it"
    if report.attention == "eager":
        why = "sdpa stays causal here"
        try:
            if decoder is not None:
                _without_weights(decoder.config, attn_implementation="sdpa")
        except ValueError:
            why = "the family has no sdpa"
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


def _sizes(
    decoder: Any,
    whole: Any,
    unpacked: str | None,
    device: torch.device,
    chosen: precision.Precision,
) -> Facts:
    """Sizes of the model, and how it runs.

    Args:
        decoder: the network that was proved, which may be a miniature.
        whole: the network in full size, perhaps on the meta device.
        unpacked: why batches are padded; None if they are packed.
        device, chosen: the device, and the number type with its reason.
    """
    text = whole.config.get_text_config()
    positions = "neither learned nor rotary (ALiBi, or none)"
    if learned_positions(decoder) is not None:
        positions = "learned, absolute: longer texts are impossible"
    elif getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None):
        positions = "rotary"
    return {
        "parameters": sum(p.numel() for p in whole.parameters()),
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "sliding_window": getattr(text, "sliding_window", None),
        "max_positions": getattr(text, "max_position_embeddings", None),
        "positions": positions,
        "packed": unpacked or "yes: packed and single forwards agree",
        "device": str(device),
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "dtype_why": chosen.reason,
    }
