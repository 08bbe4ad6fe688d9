"""`LLM2Vec`: the public encoder, with the argument names, order and defaults of the original.

It is `model.TextEncoder` with the calls that scripts of the `llm2vec` package make
(`docs/migrating.md`), and it reads the checkpoints that the original package and the seed system
wrote: with their own template and, with ``compat="llm2vec-0.2"``, with the original's rules for
finding and cutting the text. Nothing below this room depends on it.

Cost: with ``compat`` each text is tokenised twice, as in the original.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as stock_logging

from unmasked.checkpoint.folder import SETTINGS_NAME, Settings, check_count, read_settings
from unmasked.checkpoint.loading import Found
from unmasked.compat.counting import CountingPooling, CountingTokenizer, pool_padded
from unmasked.compat.original import (
    DOC_MAX_LENGTH,
    PUBLISHED,
    NamesItsBase,
    check_compat,
    is_original,
    loading_options,
    settings_for_name,
    stock_options,
    without_blank_mask,
)
from unmasked.forward.pooling import TextPooling
from unmasked.mask.proof import Proof, open_mask
from unmasked.model import TextEncoder
from unmasked.text.templates import Template, detect
from unmasked.text.tokens import TextTokenizer

logger = logging.getLogger(__name__)


class LLM2Vec(TextEncoder, metaclass=NamesItsBase):
    """A bidirectional text encoder made from a decoder (LLM2Vec, arXiv 2404.05961).

    >>> model = LLM2Vec.from_pretrained("nano")
    >>> model.encode(["a text", "another"]).shape
    (2, 256)

    Args:
        model: a bare transformer (`AutoModel`, perhaps a `PeftModel`). A name or folder is passed
            to `from_pretrained`, together with all other arguments.
        tokenizer: its tokenizer.
        pooling_mode: ``mean`` (default), ``weighted_mean``, ``last_token``, ``eos_token`` or
            ``bos_token``.
        max_length: maximum number of tokens of an input, instruction and special tokens included;
            512 by default.
        doc_max_length: maximum number of tokens of a text, 400 by default; None for whatever
            `max_length` leaves.
        skip_instruction: pool only the text's own tokens; True by default.
        template: the chat template around a text: a `Template`, a name in `templates.yaml`, or
            ``none``.
        compat: ``llm2vec-0.2`` for exactly the preprocessing of the original package.
        enable_bidirectional: open the mask of `model`; otherwise it stays as it is. For a name: as
            in `from_pretrained`.
        settings: all of the settings above in one object; those given by name take precedence.
        report: the proof, if `model` has been proved already. Otherwise it is proved now, and a
            warning is logged if it is still causal.
        options: ``device``, ``prompts``, ``base_name`` and other arguments of `TextEncoder`. If
            `model` is a name: arguments of `from_pretrained` and `SentenceTransformer`; weights
            then keep their precision on disk, as stock code reloads by ``type(model)(path)``.

    Raises:
        ModelError: `model` is a name, and a tokenizer or a proof was given with it.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | EllipsisType | None = ...,
        skip_instruction: bool | None = None,
        *,
        template: Template | Mapping[str, Any] | str | None = None,
        compat: str | None = None,
        enable_bidirectional: bool | None = None,
        settings: Settings | None = None,
        report: Proof | None = None,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
            "template": template,
            "compat": compat,
        }
        if isinstance(model, str | Path):
            given = settings_for_name(model, given, settings, tokenizer=tokenizer, report=report)
            options = {"dtype": "checkpoint", **options}
            options["enable_bidirectional"] = enable_bidirectional
            vars(self).update(vars(self.from_pretrained(model, **given, **options)))
            return
        if tokenizer is None:
            raise TypeError("no tokenizer was given. Fix: LLM2Vec(model, tokenizer).")
        saved = {"doc_max_length": DOC_MAX_LENGTH} if settings is None else vars(settings)
        settings = read_settings(saved, given)
        if enable_bidirectional and report is None:
            report = open_mask(model)
        super().__init__(model, tokenizer, settings, report=report, **options)
        if report is None and self.report.verdict != "full":
            logger.warning(
                "This model is not bidirectional: %s Fix: "
                "LLM2Vec(model, tokenizer, enable_bidirectional=True), or load it with "
                "LLM2Vec.from_pretrained(...).",
                self.report.summary(),
            )

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        peft_model_name_or_path: str | Path | list[str | Path] | None = None,
        merge_peft: bool = True,
        enable_bidirectional: bool | None = None,
        *,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | EllipsisType | None = ...,
        skip_instruction: bool | None = None,
        template: Template | Mapping[str, Any] | str | None = None,
        compat: str | None = None,
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        compile: str = "auto",
        attn_implementation: str | None = None,
        allow_partial: bool = False,
        device: str | None = None,
        base: str | Path | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Self:
        """Load a decoder, open its mask, prove it, and merge adapters.

        Args:
            base_model_name_or_path: a hub name, a folder (of a decoder, an adapter, or one that
                `save` or the original package wrote), or ``nano``, the bundled decoder.
            peft_model_name_or_path: one or more adapters to merge into it, in this order; hub names
                may end in ``@REVISION``.
            merge_peft: ignored: adapters are always merged. The original has this argument.
            enable_bidirectional: False keeps the causal mask; None opens it, except in an encoder
                that was saved with a causal mask.
            pooling_mode: this and the next five arguments are as in the constructor. Defaults are
                those of the folder, or else ``mean``, 512, no limit and True; the tokenizer of an
                original checkpoint determines its template.
            dtype: ``auto`` (fast on this device, see `precision.pick`), ``checkpoint`` (the same,
                but at least the checkpoint's precision), or a torch dtype or its name.
            quantize: ``int8`` (on a CPU): 8-bit weights in linear layers, faster and slightly less
                exact; `quantization` says how much. Such a model can only encode.
            compile: whether `encode` compiles the decoder layers: ``auto`` (on a GPU, for work long
                enough to pay for some 20 s), ``always`` or ``never``.
            attn_implementation: as in transformers, which chooses by default.
            allow_partial: accept a model some of whose layers stay causal by construction.
            device: where to run.
            base: where an adapter's base is, if not where the adapter says.
            allow_pickle: read weights that exist only as pickles (tensors only, no code).
            options: ``layers`` (how many first layers to keep), ``revision`` (of the first name),
                ``token``, ``cache_dir``, ``local_files_only``; ``torch_dtype`` and ``device_map``;
                ``prompts`` (added to those of the folder), ``default_prompt_name``,
                ``similarity_fn_name``, ``truncate_dim`` and others of `SentenceTransformer`.

        Raises:
            ModelError: the model cannot be loaded or quantized.
            NotBidirectionalError: the proof failed.
        """
        stock, options = stock_options(options)
        attention = options.pop("attn_implementation", attn_implementation)
        dtype, device, hub = loading_options(dtype, device, options)
        given = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
            "template": template,
            "compat": compat,
        }
        return cls.load_encoder(
            base_model_name_or_path,
            peft_model_name_or_path,
            given,
            enable_bidirectional=enable_bidirectional,
            dtype=dtype,
            quantize=quantize,
            compile=compile,
            attention=attention,
            allow_partial=allow_partial,
            device=device,
            stock=stock,
            base=base,
            allow_pickle=allow_pickle,
            **hub,
        )

    @classmethod
    def read_checkpoint(
        cls, found: Found, given: Mapping[str, Any]
    ) -> tuple[PreTrainedTokenizerBase, Settings]:
        """Tokenizer and settings; for an original checkpoint, as the original package had them."""
        check_compat(given.get("compat"))
        tokenizer, saved = found.tokenizer, dict(found.settings)
        if is_original(found.given) or any(map(is_original, found.added)):
            if given.get("compat") is None:
                tokenizer = without_blank_mask(tokenizer)
            saved = {"doc_max_length": DOC_MAX_LENGTH} | saved
            if saved.get("template") is None:
                known = detect(tokenizer.chat_template, tokenizer.get_vocab())
                saved["template"] = known or PUBLISHED
                logger.info("original checkpoint %s: %s", found.given.name, saved["template"])
        return tokenizer, read_settings(saved, given)

    @classmethod
    def text_rules(cls, settings: Settings) -> tuple[type[TextTokenizer], type[TextPooling]]:
        """The original's classes for finding and pooling a text with ``compat``, else our own."""
        if check_compat(settings.compat) is None:
            return TextTokenizer, TextPooling
        return CountingTokenizer, CountingPooling

    def encode(  # type: ignore[override]
        self,
        inputs: Any = None,
        prompt_name: Any = None,
        prompt: Any = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `TextEncoder.encode`, but also accepts the original's order of arguments.

        Its second and third are ``batch_size`` and ``show_progress_bar``, here `prompt_name` and
        `prompt`. Like the original, an encoder with ``compat`` returns a tensor on the CPU.
        """
        if not isinstance(prompt_name, str | None):
            batch_size, prompt_name = prompt_name, None
        if isinstance(prompt, bool):
            kwargs["show_progress_bar"], prompt = prompt, None
        if self.rules and not kwargs.get("convert_to_numpy"):
            kwargs["convert_to_tensor"] = True
        vectors = super().encode(inputs, prompt_name, prompt, batch_size, **kwargs)
        return vectors.cpu() if self.rules and isinstance(vectors, Tensor) else vectors

    def forward(self, input: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """As in `SentenceTransformer`; ``embed_mask`` is the original's name for ``text_mask``."""
        if "text_mask" not in input and "embed_mask" in input:
            input = {**input, "text_mask": input["embed_mask"]}
        features: dict[str, Tensor] = super().forward(input, **kwargs)
        return features

    def save(
        self, path: str | Path | None, *args: Any, merge_before_save: bool = True, **options: Any
    ) -> None:
        """As `TextEncoder.save`, but also accepts the original's order of arguments.

        Its ``merge_before_save`` is always True here. It and ``save_config`` come where
        `SentenceTransformer` has the model's name and whether to write a card.
        """
        if args and isinstance(args[0], bool):
            options.update(zip(("save_config",), args[1:], strict=False))
            args = ()
        super().save(path, *args, **options)

    # Attributes and methods of the original's class that `TextEncoder` lacks

    @property
    def model(self) -> Any:
        """The transformer, perhaps a `PeftModel`."""
        return self.backbone.auto_model

    @property
    def pooling_mode(self) -> str:
        """How token states become a vector."""
        return self.settings.pooling_mode

    @property
    def skip_instruction(self) -> bool:
        """Whether only the tokens of the text are pooled."""
        return self.backbone.tokens.skip_instruction

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of an input."""
        return self.backbone.tokens.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self.backbone.max_seq_length = value

    @property
    def doc_max_length(self) -> int | None:
        """Maximum number of tokens of a text; None for whatever `max_length` leaves."""
        return self.backbone.tokens.doc_max_length

    @doc_max_length.setter
    def doc_max_length(self, value: int | None) -> None:
        if value is not None:
            check_count("doc_max_length", value, "tokens", SETTINGS_NAME)
        self.backbone.tokens.doc_max_length = value

    def prepare_for_tokenization(self, text: str) -> str:
        """A text in its template."""
        template = self.backbone.tokens.template
        return template.prefix + text + template.suffix

    def tokenize(self, texts: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The tensors of `preprocess`, with ``text_mask`` also as the original's ``embed_mask``.

        As in `SentenceTransformer`, this name is deprecated in favour of `preprocess`.
        """
        stock_logging.get_logger(__name__).warning_once(
            "The `tokenize` method is deprecated, please use `preprocess` instead."
        )
        features = self.preprocess(texts, **kwargs)
        features.pop("prompt_length", None)  # a number, but the original returns only tensors
        return {**features, "embed_mask": features["text_mask"]} if features else {}

    def get_pooling(self, features: dict[str, Tensor], last_hidden_states: Tensor) -> Tensor:
        """Pool padded states, with padding on either side; the arguments are not changed.

        Args:
            features: ``attention_mask`` and optionally the tokens to pool, ``embed_mask``: (B, T).
            last_hidden_states: (B, T, D).

        Returns:
            (B, D).
        """
        how = (self.pooling_mode, not self.skip_instruction, self.rules is not None)
        return pool_padded(features, last_hidden_states, *how)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method of the transformer."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Calls the method of the transformer."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)
