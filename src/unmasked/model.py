"""`TextEncoder`: a decoder-only language model as a text encoder; the place where the rooms meet.

It is a `SentenceTransformer`, so prompts, similarity, evaluators, losses, trainers and every
library that takes a `SentenceTransformer` work with it. Inside, the causal mask is off, and proved
to be off; pooling leaves out exactly the instruction of each row; batches are filled by tokens; and
stock loaders compute the same vectors from the folder that `save` writes.

Users get it as `unmasked.LLM2Vec` (`compat.llm2vec`), which adds the original package's methods.
Cost of loading: reading the weights, and some thirty forwards of a few tokens (proof, packing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import nn
from transformers import PreTrainedTokenizerBase

from unmasked.checkpoint import adapters, folder, loading, snapshot
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.fingerprint import fingerprint
from unmasked.errors import ModelError
from unmasked.forward import quantization
from unmasked.forward.backbone import BY_TOKENS, Backbone
from unmasked.forward.compiling import check_choice
from unmasked.forward.loop import running
from unmasked.forward.loop.preparing import Request, check_options
from unmasked.forward.pooling import TextPooling, check_mode, own_pooling
from unmasked.forward.precision import Precision, on_device, pick
from unmasked.forward.quantization import Quantization
from unmasked.forward.words import word_vectors
from unmasked.mask.opening import learned_positions
from unmasked.mask.proof import Proof, prove
from unmasked.text.inputs import check_numbers, listed, split_pairs
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer


class TextEncoder(SentenceTransformer):
    """A bidirectional text encoder made from a decoder (LLM2Vec, arXiv 2404.05961).

    Args:
        model: a transformer without a head (from `AutoModel`), perhaps inside a `PeftModel`.
        tokenizer: its tokenizer.
        settings: pooling, lengths and template.
        device: where to run; by default the best available one (CUDA, then MPS, then CPU).
        report: the proof, if there is one already; otherwise the model is proved now.
        base_name: the name of the base model in the model card.
        behind: modules after the pooling, such as `Normalize`.
        stock: further arguments of `SentenceTransformer`: ``prompts``, ``default_prompt_name``,
            ``similarity_fn_name``, ``truncate_dim``, ``model_card_data``.

    Attributes:
        rules: the ``compat`` setting: the name of another package's rules for finding a text.
        report: the proof of the open mask.
        precision: dtype of the weights and the reason for it, if the model was loaded by name.
        quantization: the effect of 8-bit weights on the vectors, if the model was loaded with them.

    Raises:
        ModelError: an unknown pooling mode, or one that the tokenizer does not support.
    """

    precision: Precision | None = None
    loaded: tuple[str, Any] = ("", None)  # what was named to load, and its place
    compiles: str = "auto"  # whether `encode` compiles the decoder layers (`forward.compiling`)
    quantization: Quantization | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: folder.Settings,
        *,
        device: str | None = None,
        report: Proof | None = None,
        base_name: str | None = None,
        behind: Sequence[nn.Module] = (),
        **stock: Any,
    ) -> None:
        on_device(device or "cpu")
        adapters.check_nested(model)
        check_mode(settings.pooling_mode)
        settings = folder.within_positions(settings, learned_positions(model))
        self.base_name = base_name or str(model.config.name_or_path or "a decoder")  # type: ignore[union-attr]
        tokenizer_class, pooling_class = self.text_rules(settings)
        tokens = tokenizer_class(
            prepare_tokenizer(tokenizer, append_eos=settings.pooling_mode == "eos_token"),
            settings.max_length,
            settings.doc_max_length,
            settings.skip_instruction,
            settings.template,
        )
        tokens.check_mode(settings.pooling_mode)
        self.report = report or prove(model)
        backbone = Backbone(model, tokens)
        width = backbone.get_embedding_dimension()
        pooling = pooling_class(width, settings.pooling_mode, settings.skip_instruction)
        super().__init__(modules=[backbone, pooling, *behind], device=device, **stock)
        self.rules = settings.compat
        if (verdict := self.report.verdict) != "full":
            backbone.unpackable = f"it is not bidirectional throughout ({verdict})"
        backbone.packs_here()  # checks packing now, on the final device and in the final precision

    @classmethod
    def load_encoder(
        cls,
        name: str | Path,
        peft: str | Path | list[str | Path] | None = None,
        given: Mapping[str, Any] = MappingProxyType({}),
        *,
        enable_bidirectional: bool | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        compile: str = "auto",
        attention: str | None = None,
        allow_partial: bool = False,
        device: str | None = None,
        base: str | Path | None = None,
        allow_pickle: bool = False,
        stock: Mapping[str, Any] = MappingProxyType({}),
        **hub: Any,
    ) -> Self:
        """Load a decoder, open its mask, prove it, and merge adapters.

        Args:
            name, peft, base, hub: what to load (``layers`` is in `hub`); see `loading.find`.
            given: fields of `Settings` by name; they take precedence over those of the folder.
            enable_bidirectional, attention, allow_partial, allow_pickle: see
                `loading.load_transformer`.
            dtype: see `precision.pick`.
            quantize: ``int8``, on a CPU; see `quantization.quantize`.
            compile: ``auto`` (on a GPU, for long work), ``always`` or ``never``; see `compiling`.
            device, stock: as in the constructor; they take precedence over those of the folder,
                but prompts are added to its prompts.

        Raises:
            DataError: a number among the arguments of `SentenceTransformer` is not one.
            ModelError: the model cannot be loaded, quantized or run there, or the proof failed.
        """
        check_numbers(stock)
        device, compile = device or get_device_name(), check_choice(compile)
        if quantize is not None:
            quantization.check(quantize, on_device(device))
        found = loading.find(name, peft, base, **hub)
        precision = pick(dtype, on_device(device), found.config)
        tokenizer, settings = cls.read_checkpoint(found, given)
        loading.check_asked(found, given.get("max_length"))
        model, report = loading.load_transformer(
            found, precision.dtype, attention, enable_bidirectional, allow_partial, allow_pickle
        )
        options = snapshot.read_options(found.options, settings.template)
        prompts = options.pop("prompts") | (stock.get("prompts") or {})
        encoder = cls(
            model,
            tokenizer,
            settings=settings,
            device=device,
            report=report or prove(model),
            base_name=str(name),
            behind=snapshot.load_behind(found.encoder, allow_pickle),
            **{**options, **stock, "prompts": prompts},
        )
        encoder.precision, encoder.compiles = precision, compile
        encoder.loaded = (str(name), found.given)
        encoder.backbone.query_length, encoder.backbone.document_length = found.lengths
        adapters.remember(encoder, found.encoder)
        if quantize is not None:
            encoder.quantization = quantization.quantize(encoder, model, quantize)
        return encoder

    @classmethod
    def read_checkpoint(
        cls, found: loading.Found, given: Mapping[str, Any]
    ) -> tuple[PreTrainedTokenizerBase, folder.Settings]:
        """Tokenizer and settings of a checkpoint; `given` takes precedence over its settings.

        A subclass may read checkpoints of another package (`compat`).
        """
        return found.tokenizer, folder.read_settings(found.settings, given)

    @classmethod
    def text_rules(cls, settings: folder.Settings) -> tuple[type[TextTokenizer], type[TextPooling]]:
        """The classes that find and pool a text; a subclass may return others (`compat`).

        Raises:
            ModelError: the settings name rules that this class does not know.
        """
        if settings.compat is not None:
            raise ModelError(f"compat {settings.compat} is not known here. Fix: unmasked.LLM2Vec.")
        return TextTokenizer, TextPooling

    @property
    def backbone(self) -> Backbone:
        """The first module: tokenizer and transformer."""
        module = self[0]
        assert isinstance(module, Backbone)
        return module

    @property
    def settings(self) -> folder.Settings:
        """Pooling, lengths and template as they are now, with what was changed since loading."""
        return snapshot.settings_now(self.backbone.tokens, own_pooling(self), self.rules)

    @property
    def tokens_encoded(self) -> int:
        """Number of tokens, without padding, that `encode` has processed; for measuring speed."""
        return self.backbone.tokens_encoded

    def fingerprint(self) -> str:
        """A digest of weights, tokenizer, mask and settings; equal for models that encode alike."""
        return fingerprint(self.state_dict(), self.tokenizer, snapshot.deciding(self))

    def train(self, mode: bool = True) -> Self:
        """As in torch.

        Raises:
            ModelError: the model is quantized and `mode` is True.
        """
        if mode:
            self._require_full_precision("trained")
        return super().train(mode)

    def _require_full_precision(self, action: str) -> None:
        if self.quantization is not None:
            kind = self.quantization.name
            raise ModelError(f"{kind} weights cannot be {action}. Fix: load without quantize.")

    def preprocess(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Backbone.preprocess`: takes ``[instruction, text]`` pairs as well as strings."""
        return self.backbone.preprocess(inputs, *args, **kwargs) if len(inputs) else {}

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
            compile: as in `load_encoder`; None takes the value given there.
            kwargs: other options of `SentenceTransformer.encode`: ``show_progress_bar``,
                ``output_value``, ``precision``, ``device``, ``convert_to_tensor``,
                ``normalize_embeddings``, ``truncate_dim``.

        Returns:
            (N, D) float32 array; (D,) for a single string; (0, D) for an empty list.

        Raises:
            DataError: an input is neither a string nor a pair, or an option has no allowed value.
        """
        inputs = kwargs.pop("sentences", inputs)
        check_options({**kwargs, "prompt": prompt, "batch_size": batch_size})
        if not isinstance(inputs, str):
            inputs = listed(inputs)
            split_pairs(inputs)  # refuses a faulty input, with its index, before any work is done
        compiles = self.compiles if compile is None else check_choice(compile)
        self.backbone.prepare_for(inputs, compiles)
        batching = {BY_TOKENS: True} if batch_size is None else {"batch_size": batch_size}
        stock: Any = super().encode
        vectors = stock(inputs, prompt_name=prompt_name, prompt=prompt, **batching, **kwargs)
        if isinstance(inputs, list) and not inputs and not isinstance(vectors, list):
            return running.no_vectors(vectors, self, kwargs)
        return vectors

    def encode_words(
        self, sentences: Sequence[Sequence[str]], previous: bool = False
    ) -> list[np.ndarray]:
        """Vectors (W, D) of the W words of each sentence; see `words.word_vectors`."""
        return word_vectors(self, self.backbone.tokens, sentences, previous)

    # Overrides the inner loop of `SentenceTransformer.encode` and of its worker processes. If an
    # upgrade renames it there, `encode` gets slower and the vectors stay (`docs/upstream.md`).
    @torch.inference_mode()
    def _inference(
        self, inputs: list[Any], *, device: str | torch.device | None = None, **options: Any
    ) -> Any:
        target = on_device(device or self.device)
        if any(weight.device != target for weight in self.parameters()):
            self.to(target)
        options["stock_features"] = len(self) > 2 or not isinstance(self[1], TextPooling)
        return running.run(self, self.backbone, inputs, Request.of(target, options))

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """As in `SentenceTransformer`: whether BOS, template and prompt are pooled too."""
        self.backbone.tokens.skip_instruction = not include_prompt
        super().set_pooling_include_prompt(include_prompt or own_pooling(self).mode == "bos_token")

    def save(
        self,
        path: str | Path | None,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        *,
        card: Card | None = None,
        save_config: bool = True,
    ) -> None:
        """Write a folder that stock sentence-transformers and transformers load (see `folder`).

        Everything that was changed since loading is saved. Attached adapters are merged into a
        copy, unless they are disabled. Files that another model left in the folder are removed.

        Args:
            path: where to write (``~/`` is the home folder); None writes nothing.
            model_name: the name of the model in the model card.
            create_model_card: False leaves the README as it is.
            train_datasets: data sets that the model card names, after those of the loaded folder.
            safe_serialization: only True; weights are always safetensors.
            card: content of the model card, in place of `model_name` and `train_datasets`.
            save_config: False leaves `llm2vec_config.json` out.

        Raises:
            ModelError: the model is quantized, or has a module that cannot be saved.
            OutputError: the folder cannot be written.
        """
        self._require_full_precision("saved")
        snapshot.save_encoder(
            self,
            path,
            card or snapshot.own_card(self, model_name, train_datasets or ()),
            create_model_card,
            save_config,
            safe_serialization,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch; a saved folder is loaded into attached adapters and the weights below."""
        return super().load_state_dict(adapters.below_adapters(self, state_dict), strict, assign)

    def save_pretrained(self, path: str | Path | None, *args: Any, **kwargs: Any) -> None:
        """The same as `save`."""
        self.save(path, *args, **kwargs)
