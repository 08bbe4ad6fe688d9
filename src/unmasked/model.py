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
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from unmasked.checkpoint import adapters, folder, loading
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.fingerprint import fingerprint
from unmasked.errors import DataError, ModelError, unknown
from unmasked.forward import quantization
from unmasked.forward.backbone import BY_TOKENS, Backbone, listed, split_pairs
from unmasked.forward.compiling import check_choice
from unmasked.forward.loop import preparing, running
from unmasked.forward.pooling import TextPooling, check_mode
from unmasked.forward.precision import Precision, pick
from unmasked.forward.quantization import Quantization
from unmasked.forward.words import word_vectors
from unmasked.mask.opening import learned_positions
from unmasked.mask.proof import Proof, prove, stock_loading
from unmasked.text.tokens import TextTokenizer, prepare_tokenizer

logger = logging.getLogger(__name__)


class TextEncoder(SentenceTransformer):
    """A bidirectional text encoder made from a decoder (LLM2Vec, arXiv 2404.05961).

    Args:
        model: a bare transformer (`AutoModel`, perhaps a `PeftModel`).
        tokenizer: its tokenizer.
        settings: pooling, lengths and template.
        device: where to run; by default the best there is (CUDA, then MPS, then CPU).
        prompts: name → text put before every input encoded under that name.
        report: the proof, if it was made already; otherwise the model is proved now.
        base_name: what the model card calls the base model.

    Attributes:
        settings: as given, with the lengths that the model can take.
        report: the proof of the open mask.
        precision: dtype of the weights and why, where it was loaded by name.
        quantization: what 8-bit weights do to the vectors, where it was loaded with such.

    Raises:
        ModelError: a pooling mode that does not exist, or that the tokenizer cannot serve.
    """

    precision: Precision | None = None
    compiles: str = "auto"  # when `encode` compiles the decoder layers (`forward.compiling`)
    quantization: Quantization | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: folder.Settings,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        report: Proof | None = None,
        base_name: str | None = None,
    ) -> None:
        adapters.check_nested(model)
        check_mode(settings.pooling_mode)
        self.settings = folder.within_positions(settings, learned_positions(model))
        self.base_name = base_name or str(model.config.name_or_path or "a decoder")  # type: ignore[union-attr]
        find, pool = self.text_rules(settings)
        tokens = find(
            prepare_tokenizer(tokenizer, append_eos=settings.pooling_mode == "eos_token"),
            self.settings.max_length,
            settings.doc_max_length,
            settings.skip_instruction,
            settings.template,
        )
        tokens.check_mode(settings.pooling_mode)
        self.report = report or prove(model)
        backbone = Backbone(model, tokens)
        width = backbone.get_embedding_dimension()
        pooling = pool(width, settings.pooling_mode, settings.skip_instruction)
        super().__init__(modules=[backbone, pooling], device=device, prompts=prompts)
        if (verdict := self.report.verdict) != "full":
            backbone.unpackable = f"it is not bidirectional throughout ({verdict})"
        backbone.packs_here()  # on the device and in the precision that it will run in

    @classmethod
    def load_encoder(
        cls,
        name: str | Path,
        peft: str | Path | list[str | Path] | None = None,
        given: Mapping[str, Any] = MappingProxyType({}),
        *,
        enable_bidirectional: bool = True,
        dtype: str = "auto",
        quantize: str | None = None,
        compile: str = "auto",
        attention: str | None = None,
        allow_partial: bool = False,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        base: str | Path | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load a decoder, open its mask, prove it, and merge adapters.

        Args:
            name, peft, base, hub: what to load, as in `loading.find`.
            given: fields of `Settings` by name that go before what the folder says.
            enable_bidirectional, attention, allow_partial, allow_pickle: how, as in
                `loading.load_transformer`.
            dtype: see `precision.pick`.
            quantize: ``int8`` (CPU) or ``fp8`` (GPU); see `quantization.quantize`.
            compile: ``auto`` (a GPU and long work), ``always``, ``never``: see `compiling`.
            device, prompts: as in the constructor; prompts are added to those of the folder.

        Raises:
            ModelError: it cannot be loaded or quantized, or the proof failed.
        """
        device, compile = device or get_device_name(), check_choice(compile)
        if quantize is not None:
            quantization.check(quantize, torch.device(device))
        found = loading.find(name, peft, base, **hub)
        folder.check_length(given.get("max_length"), found.config)
        precision = pick(dtype, torch.device(device), found.config)
        tokenizer, settings = cls.read_checkpoint(found, given)
        model, report = loading.load_transformer(
            found, precision.dtype, attention, enable_bidirectional, allow_partial, allow_pickle
        )
        encoder = cls(
            model,
            tokenizer,
            settings=settings,
            device=device,
            prompts=folder.read_prompts(found.prompts, settings.template) | (prompts or {}),
            report=report or prove(model),
            base_name=str(name),
        )
        encoder.precision, encoder.compiles = precision, compile
        if quantize is not None:
            encoder.quantization = quantization.quantize(encoder, model, quantize)
        return encoder

    @classmethod
    def read_checkpoint(
        cls, found: loading.Found, given: Mapping[str, Any]
    ) -> tuple[PreTrainedTokenizerBase, folder.Settings]:
        """Tokenizer and settings of a checkpoint; what is given goes before what it says.

        A subclass may read checkpoints of another package (`compat`).
        """
        return found.tokenizer, folder.read_settings(found.settings, given)

    @classmethod
    def text_rules(cls, settings: folder.Settings) -> tuple[type[TextTokenizer], type[TextPooling]]:
        """The classes that find and pool a text; a subclass may know other rules (`compat`).

        Raises:
            ModelError: the settings name rules that this class does not know.
        """
        if settings.compat is not None:
            raise ModelError(f"compat {settings.compat}: only unmasked.LLM2Vec has these rules.")
        return TextTokenizer, TextPooling

    @property
    def backbone(self) -> Backbone:
        """The first module: tokenizer and transformer."""
        module = self[0]
        assert isinstance(module, Backbone)
        return module

    @property
    def tokens_encoded(self) -> int:
        """Number of real tokens that went through `encode` so far, for measuring speed."""
        return self.backbone.tokens_encoded

    def fingerprint(self) -> str:
        """A digest of weights, tokenizer and settings; equal for models that encode alike."""
        settings = [asdict(self.settings), self.settings.compat is not None]
        return fingerprint(self.state_dict(), self.tokenizer, settings)

    def train(self, mode: bool = True) -> Self:
        """As in torch.

        Raises:
            ModelError: to train a quantized model.
        """
        if mode:
            self._require_full_precision("trained")
        return super().train(mode)

    def _require_full_precision(self, done: str) -> None:
        if self.quantization is not None:
            kind = self.quantization.name
            raise ModelError(f"{kind} weights cannot be {done}. Fix: load without quantize.")

    def preprocess(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Backbone.preprocess`, which takes ``[instruction, text]`` pairs too."""
        return self.backbone.preprocess(inputs, *args, **kwargs)

    def encode(  # type: ignore[override]
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        compile: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Vectors of texts; every option of `SentenceTransformer.encode` works.

        Args:
            inputs: a string, a list of strings, or a list of ``[instruction, text]`` pairs.
            prompt_name, prompt: the prompt put before every input, by its name or as text.
            batch_size: maximum number of rows of a forward; by default a forward is filled up to a
                number of tokens.
            compile: as `load_encoder` has it; None takes what was given there.
            kwargs: as in `SentenceTransformer.encode` (``show_progress_bar``, ``output_value``,
                ``precision``, ``convert_to_tensor``, ``device``, ``normalize_embeddings``,
                ``truncate_dim``).

        Returns:
            (N, D) float32 array; (D,) for a single string; (0, D) for an empty list.

        Raises:
            DataError: an input is neither a string nor a pair, or both kinds are mixed; or an
                ``output_value`` that does not exist.
        """
        inputs = kwargs.pop("sentences", inputs)
        if not isinstance(inputs, str):
            inputs = listed(inputs)
            split_pairs(inputs)  # names the faulty index before any work is done
        if (output := kwargs.get("output_value", preparing.SENTENCE)) not in preparing.OUTPUTS:
            raise DataError(unknown("output_value", str(output), map(str, preparing.OUTPUTS)))
        self.backbone.prepare_for(inputs, check_choice(compile or self.compiles))
        rows = {BY_TOKENS: True} if batch_size is None else {"batch_size": batch_size}
        stock: Any = super().encode
        vectors = stock(inputs, prompt_name=prompt_name, prompt=prompt, **rows, **kwargs)
        if isinstance(inputs, list) and not inputs and not isinstance(vectors, list):
            width = self.backbone.get_embedding_dimension()
            vectors = running.no_vectors(vectors, width, kwargs)
        return vectors

    def encode_words(
        self, sentences: Sequence[Sequence[str]], previous: bool = False
    ) -> list[np.ndarray]:
        """Vectors (W, D) of the W words of each sentence; see `words.word_vectors`."""
        return word_vectors(self, self.backbone.tokens, sentences, previous)

    # The loop of `SentenceTransformer.encode` and of its worker processes, replaced by ours. If a
    # release renamed this method, `encode` would run the stock loop in batches of 32: slower, with
    # the same vectors. `docs/upstream.md` lists it, and a test fails then.
    @torch.inference_mode()
    def _inference(
        self, inputs: list[Any], *, device: str | torch.device | None = None, **options: Any
    ) -> Any:
        target = torch.empty(0, device=device or self.device).device
        if any(weight.device != target for weight in self.parameters()):
            self.to(target)
        return running.run(self, self.backbone, inputs, preparing.Request.of(target, options))

    def merged_model(self) -> nn.Module:
        """The bare transformer with an attached adapter, if any, merged into a copy.

        Raises:
            ModelError: it is quantized.
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
        card: Card | None = None,
        **__: Any,
    ) -> None:
        """Write a folder that stock sentence-transformers and transformers load (see `folder`).

        An attached adapter is merged into the copy that is written; an existing folder is replaced
        file by file.

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
        pooling: Any = self[1]
        prefix = tokens.template.prefix
        named = {"default": "", "query": "", "document": "", **self.prompts}
        folder.write_folder(
            path,
            model,
            tokenizer,
            self.settings,
            pooling.get_config_dict(),
            {name: prefix + prompt for name, prompt in named.items() if prompt is not None},
            fixed_tokens=tokens.fixed_tokens,
            needs_eager=stock == "eager",
            card=card or Card(self.base_name, self.report.summary()),
        )
        if not save_config:
            (Path(path) / folder.SETTINGS_NAME).unlink()

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """The same as `save`."""
        self.save(path, *args, **kwargs)
