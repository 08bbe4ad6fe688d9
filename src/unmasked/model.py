"""`TextEncoder`: a decoder-only language model as a text encoder; the place where the rooms meet.

It is a `SentenceTransformer`, so prompts, similarity, evaluators, losses, trainers and every
library that takes a `SentenceTransformer` work with it. What differs is inside: the mask is open
and proved to be, each row's own instruction is left out of pooling exactly, forwards are filled by
tokens, and `save` writes a folder that stock loaders read to the same vectors.

Users get it as `unmasked.LLM2Vec` (`compat.llm2vec`), which adds the calls of the original package.
Cost of loading: reading the weights, and some thirty forwards of a few tokens (proof, packing).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from unmasked.checkpoint import adapters, folder, loading
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.fingerprint import fingerprint
from unmasked.errors import DataError, ModelError, unknown
from unmasked.forward import loop, quantization
from unmasked.forward.backbone import BY_TOKENS, Backbone, listed, split_pairs
from unmasked.forward.batches import token_budget
from unmasked.forward.packing import enable_packing
from unmasked.forward.pooling import TextPooling, check_mode
from unmasked.forward.precision import Precision, pick
from unmasked.forward.quantization import Quantization
from unmasked.forward.words import word_vectors
from unmasked.mask.opening import learned_positions
from unmasked.mask.proof import Proof, open_mask, prove, stock_loading
from unmasked.text.templates import Template, read_template
from unmasked.text.tokens import TextTokenizer, prepare_tokenizer

logger = logging.getLogger(__name__)


class TextEncoder(SentenceTransformer):
    """A bidirectional text encoder made from a decoder (LLM2Vec, arXiv 2404.05961).

    Args:
        model: a bare transformer (`AutoModel`, perhaps a `PeftModel`). A name or folder is passed
            on to `from_pretrained` with all other arguments.
        tokenizer: its tokenizer.
        pooling_mode: ``mean`` (default), ``weighted_mean``, ``last_token``, ``eos_token`` or
            ``bos_token``.
        max_length: maximum number of tokens of an input, instruction and special tokens included;
            512 by default.
        doc_max_length: maximum number of tokens of a text; None (default) for whatever
            `max_length` leaves.
        skip_instruction: pool only the text's own tokens; True by default.
        device: where to run; by default the best there is (CUDA, then MPS, then CPU).
        prompts: name → text put before every input encoded under that name.
        report: the proof, if it was made already. Otherwise the model is proved now, and a warning
            is logged if it is still causal.
        base_name: what the model card calls the base model.
        template: what stands around a text: a name in `templates.yaml`, ``none``, or the template.
        compat: name of another package's preprocessing rules; see `LLM2Vec`.
        enable_bidirectional: open the mask of a given `model`; False leaves it as it is.

    Raises:
        ModelError: a setting that does not exist, or that the tokenizer cannot serve.
    """

    quantization: Quantization | None = None  # set where it was loaded with 8-bit weights
    precision: Precision | None = None  # set where it was loaded by name

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None | EllipsisType = ...,
        skip_instruction: bool | None = None,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        report: Proof | None = None,
        base_name: str | None = None,
        template: Template | Mapping[str, Any] | str | None = None,
        compat: str | None = None,
        enable_bidirectional: bool = False,
    ) -> None:
        given = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
            "template": template,
            "compat": compat,
        }
        if isinstance(model, str | Path):
            same = self.from_pretrained(model, device=device, prompts=prompts, **given)
            self.__dict__.update(same.__dict__)
            return
        if tokenizer is None:
            raise TypeError("LLM2Vec needs the tokenizer of the model: LLM2Vec(model, tokenizer).")
        adapters.check_nested(model)
        settings = self.read_settings({}, given)
        self.settings = _within_positions(model, settings)
        self.base_name = base_name or str(model.config.name_or_path or "a decoder")  # type: ignore[union-attr]
        if enable_bidirectional and report is None:
            report = open_mask(model)
        self.report = report or prove(model)
        tokens = self.text_tokenizer(tokenizer, self.settings)
        tokens.check_mode(self.settings.pooling_mode)
        backbone = Backbone(model, tokens, self._pack(model))
        pooling = self.text_pooling(backbone.get_embedding_dimension(), self.settings)
        super().__init__(modules=[backbone, pooling], device=device, prompts=prompts)
        if report is None and self.report.verdict != "full":
            logger.warning(
                "This model is not bidirectional: %s Fix: "
                "LLM2Vec(model, tokenizer, enable_bidirectional=True), or load it with "
                "LLM2Vec.from_pretrained(...).",
                self.report.summary(),
            )
