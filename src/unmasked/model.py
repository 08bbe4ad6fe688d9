"""`LLM2Vec`: a decoder-only language model as a text encoder.

It is a `SentenceTransformer`, so prompts, similarity, quantisation, evaluators, losses, trainers
and every library that takes a `SentenceTransformer` work with it. What differs is inside: the mask
is open and proved to be, each row's own instruction is left out of pooling exactly, batches are cut
by tokens, and `save` writes a folder that stock loaders read to the same vectors.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unmasked.checkpoint import adapters, folder, loading
from unmasked.compat import llm2vec as original
from unmasked.errors import DataError, ModelError, unknown
from unmasked.forward import quantization
from unmasked.forward.backbone import Backbone, listed, split_pairs
from unmasked.forward.batches import token_budget
from unmasked.forward.loop import (
    OUTPUTS,
    SENTENCE,
    Job,
    no_vectors,
    row_outputs,
    sentence_vectors,
)
from unmasked.forward.packing import enable_packing
from unmasked.forward.pooling import TextPooling, check_mode
from unmasked.forward.precision import Precision
from unmasked.forward.quantization import Quantization
from unmasked.forward.words import word_vectors
from unmasked.mask.opening import learned_positions
from unmasked.mask.proof import Proof, open_mask, prove, stock_loading
from unmasked.text.templates import Template, check_compat, read_template
from unmasked.text.tokens import TextTokenizer, prepare_tokenizer

logger = logging.getLogger(__name__)

_BY_TOKENS = sys.maxsize  # stands for "no batch_size given" in the signature we inherit


_DEFAULTS = {
    "pooling_mode": "mean",
    "max_length": 512,
    "doc_max_length": 400,
    "skip_instruction": True,
    "template": None,
    "compat": None,
}
"""Of the constructor: given a name, what is at its default is as the folder says."""


def _longest(model: nn.Module, max_length: int) -> int:
    """The longest input that a model can take, told where it is less than was asked for."""
    most = learned_positions(model)
    if most is None or max_length <= most:
        return max_length
    told = logger.info if max_length == _DEFAULTS["max_length"] else logger.warning
    told("max_length %d: this model has %d positions, texts are cut there.", max_length, most)
    return most


class LLM2Vec(original.OriginalNames, SentenceTransformer):
    """A bidirectional text encoder made from a decoder (LLM2Vec, arXiv 2404.05961).

    >>> model = LLM2Vec.from_pretrained("nano")
    >>> model.encode(["a text", "another"]).shape
    (2, 256)

    Args:
        model: a bare transformer (`AutoModel`, perhaps a `PeftModel`), or a name or folder, which
            is then loaded as `from_pretrained` does.
        tokenizer: its tokenizer.
        pooling_mode: ``mean``, ``weighted_mean``, ``last_token``, ``eos_token`` or ``bos_token``.
        max_length: most tokens of an input, instruction and special tokens included.
        doc_max_length: most tokens of a text; None for whatever `max_length` leaves.
        skip_instruction: pool only the text's own tokens.
        device: where to run; the best there is by default (CUDA, then MPS, then CPU).
        prompts: name → text put before every input encoded under that name.
        report: the proof, if it was made already; else the model is proved now, and a model that
            is still causal draws a warning.
        base: what the model card calls the base model.
        template: what stands around a text: a name in `templates.yaml`, ``none``, or the template.
        compat: ``llm2vec-0.2`` for the very preprocessing of the original package.
        enable_bidirectional: open the mask of a given `model`; False leaves it as it is.
    """

    quantization: Quantization | None = None  # where it was loaded with 8-bit weights

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pooling_mode: str = "mean",
        max_length: int = 512,
        doc_max_length: int | None = 400,
        skip_instruction: bool = True,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        report: Proof | None = None,
        base: str | None = None,
        template: Template | Mapping[str, Any] | str | None = None,
        compat: str | None = None,
        enable_bidirectional: bool = False,
    ) -> None:
        if isinstance(model, str | Path):
            device = device or get_device_name()
            loaded = loading.load(model, dtype="auto", device=device, compat=check_compat(compat))
            base = base or str(model)
            model, tokenizer, report = loaded.model, loaded.tokenizer, loaded.report
            here = (pooling_mode, max_length, doc_max_length, skip_instruction, template, compat)
            given = {k: v for (k, d), v in zip(_DEFAULTS.items(), here, strict=True) if v != d}
            found = folder.read_settings(loaded.settings, given)
            pooling_mode, max_length, doc_max_length, skip_instruction, template, compat = (
                found.values()
            )
            prompts = folder.read_prompts(loaded.prompts, read_template(template)) | (prompts or {})
        if tokenizer is None:
            raise TypeError("LLM2Vec needs the tokenizer of the model: LLM2Vec(model, tokenizer)")
        adapters.check_nested(model)
        max_length = _longest(model, max_length)
        settings = folder.Settings(
            check_mode(pooling_mode),
            max_length,
            doc_max_length,
            skip_instruction,
            read_template(template),
            check_compat(compat),
        )
        tokens = TextTokenizer(
            prepare_tokenizer(tokenizer, append_eos=pooling_mode == "eos_token"),
            max_length,
            doc_max_length,
            skip_instruction,
            settings.template,
            counted=compat is not None,
        )
        tokens.check_mode(pooling_mode)
        if enable_bidirectional and report is None:
            report = open_mask(model)
        self.report = report or prove(model)
        backbone = Backbone(model, tokens, self._pack(model))
        pooling = TextPooling(
            backbone.get_embedding_dimension(), pooling_mode, skip_instruction, tokens.counted
        )
        super().__init__(modules=[backbone, pooling], device=device, prompts=prompts)
        self.precision: Precision | None = None  # known where it was loaded by name
        self.tokens_encoded = 0  # real tokens that went through `encode`, for speeds
        self.settings = settings
        self.base = base or str(getattr(model.config, "_name_or_path", "") or "a decoder")
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
        enable_bidirectional: bool = True,
        *,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None = None,
        skip_instruction: bool | None = None,
        template: Template | Mapping[str, Any] | str | None = None,
        compat: str | None = None,
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        attn_implementation: str | None = None,
        allow_partial: bool = False,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        base: str | Path | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> LLM2Vec:
        """Load a decoder, open its mask, prove it, merge adapters.

        Args:
            base_model_name_or_path: a hub name, a folder (a decoder's, an adapter's, or one that
                `save` wrote, here or in the original package), or ``nano``, the bundled decoder.
            peft_model_name_or_path: adapter or adapters to merge into it, in this order; hub names
                may end in ``@revision``.
            merge_peft: accepted for the original's sake; adapters are always merged.
            enable_bidirectional: False keeps the causal mask (a baseline).
            pooling_mode: and the three after it, as in the constructor; by default what the folder
                says, else ``mean``, 512, no limit of its own, True.
            template: as in the constructor; by default what the folder says, or, for a checkpoint
                of the original package, what its tokenizer says.
            compat: as in the constructor.
            dtype: ``auto`` (what is fast here: `precision.pick`), ``checkpoint`` (the same, but
                never less than the checkpoint has), or a torch dtype's name.
            quantize: ``int8`` (CPU) or ``fp8`` (GPU): linear layers of 8-bit weights, faster and a
                little off; `quantization` says how much. Such a model is for encoding only.
            attn_implementation: as in transformers; chosen by default.
            allow_partial: accept a model some of whose layers stay causal by construction.
            device: where to run.
            prompts: added to those of the folder.
            base: where an adapter's base is, if not where the adapter says.
            allow_pickle: read weights that are there as pickles only (tensors only, no code).
            hub: ``revision`` (of the first name), ``token``, ``cache_dir``, ``local_files_only``;
                ``torch_dtype`` and ``device_map`` as the original took them.

        Raises:
            ModelError: it cannot be loaded or quantised; NotBidirectionalError: the proof failed.
        """
        name, device, hub = original.loading_options(dtype, device, hub)
        device = device or get_device_name()
        if quantize is not None:
            quantization.check(quantize, torch.device(device))
        loaded = loading.load(
            base_model_name_or_path,
            peft_model_name_or_path,
            enable_bidirectional,
            name,
            device,
            attn_implementation,
            allow_partial,
            base,
            allow_pickle,
            check_compat(compat),
            **hub,
        )
        given = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
            "template": template,
            "compat": compat,
        }
        settings = folder.read_settings(loaded.settings, given)
        encoder = cls(
            loaded.model,
            loaded.tokenizer,
            **settings,
            device=device,
            prompts=folder.read_prompts(loaded.prompts, read_template(settings["template"]))
            | (prompts or {}),
            report=loaded.report or prove(loaded.model),
            base=str(base_model_name_or_path),
        )
        encoder.precision = loaded.precision
        if quantize is not None:
            encoder.quantization = quantization.quantize(encoder, loaded.model, quantize)
        return encoder

    def train(self, mode: bool = True) -> LLM2Vec:
        """As in torch.

        Raises:
            ModelError: to train a quantised model.
        """
        if mode:
            self._require_full_precision("trained")
        return super().train(mode)

    def _require_full_precision(self, done: str) -> None:
        if self.quantization is not None:
            raise ModelError(
                f"a model of {self.quantization.name} weights cannot be {done}. "
                "Fix: load it without quantize."
            )

    def _pack(self, model: nn.Module) -> str | None:
        """Switch on packed attention; returns why not, if not."""
        if self.report.verdict != "full":
            return f"the model is not bidirectional throughout ({self.report.verdict})"
        reason = enable_packing(adapters.bare(model))
        if reason is not None:
            logger.warning("Batches are padded, which is slower: %s.", reason)
        return reason

    @property
    def backbone(self) -> Backbone:
        """The first module: tokenizer and transformer."""
        module = self[0]
        assert isinstance(module, Backbone)
        return module

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Padded features of texts or ``[instruction, text]`` pairs, as `forward` takes them.

        Returns:
            ``input_ids``, ``attention_mask`` and ``text_mask`` (what is pooled), each (B, T).
        """
        return self.backbone.preprocess(inputs, prompt, **kwargs)

    def encode(  # type: ignore[override]
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Vectors of texts; every option of `SentenceTransformer.encode` works.

        Args:
            inputs: a string, a list of strings, or a list of ``[instruction, text]`` pairs.
            prompt_name: which of the model's prompts stands before every input.
            prompt: that text itself.
            batch_size: most rows of a forward; by default a forward is filled by tokens.
            kwargs: as in `SentenceTransformer.encode` (``show_progress_bar``, ``output_value``,
                ``precision``, ``convert_to_tensor``, ``device``, ``normalize_embeddings``,
                ``truncate_dim``).

        Returns:
            (N, D) float32 array; (D,) for a single string; (0, D) for an empty list.

        Raises:
            DataError: an input is no string and no pair, or both kinds are mixed; or an
                ``output_value`` that there is not.
        """
        inputs = kwargs.pop("sentences", inputs)
        prompt_name, prompt, kwargs = original.encode_options(
            self.settings.compat, prompt_name, prompt, kwargs
        )
        batch_size = kwargs.pop("batch_size", batch_size)
        if not isinstance(inputs, str):
            inputs = listed(inputs)
            split_pairs(inputs)  # names the faulty index before any work is done
        if (output := kwargs.get("output_value", SENTENCE)) not in OUTPUTS:
            raise DataError(unknown("output_value", str(output), map(str, OUTPUTS)))
        rows = _BY_TOKENS if batch_size is None else batch_size
        stock: Any = super().encode
        vectors = stock(inputs, prompt_name=prompt_name, prompt=prompt, batch_size=rows, **kwargs)
        if isinstance(inputs, list) and not inputs and not isinstance(vectors, list):
            width = self.get_embedding_dimension() or 0
            width = min(kwargs.get("truncate_dim") or width, width)
            vectors = no_vectors(vectors, width, kwargs.get("precision"))
        return vectors.cpu() if self.settings.compat and isinstance(vectors, Tensor) else vectors

    def encode_words(
        self, sentences: Sequence[Sequence[str]], previous: bool = False
    ) -> list[np.ndarray]:
        """Vectors (W, D) of the words of each sentence; see `words.word_vectors`."""
        return word_vectors(self, self.backbone.tokens, sentences, previous)

    @torch.inference_mode()
    def _inference(  # type: ignore[override]
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: str | torch.device | None = None,
        **_: Any,
    ) -> Any:
        """The inner loop of `encode`, also run by the workers of multi-process encoding."""
        by_tokens = batch_size == _BY_TOKENS
        target = torch.device(self._resolve_inference_device(device))
        job = Job(
            target,
            prompt,
            token_budget(target) if by_tokens else None,
            None if by_tokens else batch_size,
            output_value,
            normalize_embeddings,
            truncate_dim,
            save_to_cpu,
            show_progress_bar,
        )
        was_training = self.training
        self.eval()
        try:
            run: Any = sentence_vectors if output_value == SENTENCE else row_outputs
            return run(self, inputs, job)
        finally:
            self.train(was_training)

    def merged_model(self) -> nn.Module:
        """The bare transformer with an attached adapter, if any, merged into a copy.

        Raises:
            ModelError: it is quantised, and no stock loader would read that.
        """
        self._require_full_precision("saved")
        model = self.backbone.auto_model
        if isinstance(model, PeftModel):
            return adapters.merge_attached(copy.deepcopy(model))
        return model

    def save(  # type: ignore[override]
        self,
        path: str | Path,
        merge_before_save: bool = True,
        save_config: bool = True,
        *_: Any,
        card: folder.Card | None = None,
        **__: Any,
    ) -> None:
        """Write a folder that stock sentence-transformers and transformers load (see `folder`).

        An attached adapter is merged into the copy that is written. An existing folder is
        replaced file by file.

        Args:
            path: where to write.
            merge_before_save: accepted for the original's sake; what is written is always merged.
            save_config: False leaves `llm2vec_config.json` out.
            card: what the model card says; options of `SentenceTransformer.save` are accepted and
                ignored, weights are always safetensors.
        """
        tokens = self.backbone.tokens
        tokenizer, exact = tokens.for_stock()
        if not exact:
            logger.warning(
                "Stock loaders cannot pool this template exactly (%r ... %r): load the folder with "
                "unmasked, or train and save without a template.",
                tokens.template.prefix,
                tokens.template.suffix,
            )
        model = self.merged_model()
        stock = stock_loading(model)
        if stock == "causal":
            logger.warning("Only unmasked opens the mask of this family; stock loaders do not.")
        prefix = tokens.template.prefix
        named = {"default": "", "query": "", "document": "", **self.prompts}
        folder.write_folder(
            path,
            model,
            tokenizer,
            self.settings,
            {name: prefix + prompt for name, prompt in named.items() if prompt is not None},
            fixed_tokens=tokens.fixed_tokens,
            needs_eager=stock == "eager",
            card=card or folder.Card(self.base, self.report.summary()),
        )
        if not save_config:
            (Path(path) / folder.SETTINGS_NAME).unlink()

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """The same as `save`."""
        self.save(path, *args, **kwargs)
