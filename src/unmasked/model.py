"""`LLM2Vec`: a decoder-only language model as a text encoder.

It is a `SentenceTransformer`, so prompts, similarity, quantisation, evaluators, losses, trainers
and every library that takes a `SentenceTransformer` work with it. What differs is inside: the mask
is open and proved to be, each row's own instruction is left out of pooling exactly, batches are cut
by tokens, and `save` writes a folder that stock loaders read to the same vectors.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, get_device_name, truncate_embeddings
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from unmasked import adapters, folder, loading
from unmasked.batches import plan_batches, token_budget
from unmasked.bidirectional import Report, prove, stock_loading
from unmasked.encoder import Backbone, split_pairs
from unmasked.packing import enable_packing
from unmasked.pooling import TextPooling, check_mode
from unmasked.tokens import TextTokenizer, prepare_tokenizer

logger = logging.getLogger(__name__)

_BY_TOKENS = sys.maxsize  # stands for "no batch_size given" in the signature we inherit


class LLM2Vec(SentenceTransformer):
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
    """

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
        report: Report | None = None,
        base: str | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            loaded = loading.load(model)
            base = base or str(model)
            model, tokenizer, report = loaded.model, loaded.tokenizer, loaded.report
        if tokenizer is None:
            raise TypeError("LLM2Vec needs the tokenizer of the model: LLM2Vec(model, tokenizer)")
        settings = folder.Settings(
            check_mode(pooling_mode), max_length, doc_max_length, skip_instruction
        )
        append_eos = pooling_mode == "eos_token"
        tokens = TextTokenizer(
            prepare_tokenizer(tokenizer, append_eos),
            max_length,
            doc_max_length,
            skip_instruction,
            append_eos,
        )
        tokens.check_mode(pooling_mode)
        self.report = report or prove(model)
        backbone = Backbone(model, tokens, self._pack(model))
        pooling = TextPooling(backbone.get_embedding_dimension(), pooling_mode, skip_instruction)
        super().__init__(modules=[backbone, pooling], device=device, prompts=prompts)
        self.settings = settings
        self.base = base or str(getattr(model.config, "_name_or_path", "") or "a decoder")
        if report is None and self.report.verdict != "full":
            logger.warning(
                "This model is not bidirectional: %s Fix: load it with "
                "LLM2Vec.from_pretrained(...), or set config.is_causal = False before loading it.",
                self.report.summary(),
            )

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        peft_model_name_or_path: str | Path | list[str | Path] | None = None,
        *,
        enable_bidirectional: bool = True,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None = None,
        skip_instruction: bool | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        allow_partial: bool = False,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        **hub: Any,
    ) -> LLM2Vec:
        """Load a decoder, open its mask, prove it, merge adapters.

        Args:
            base_model_name_or_path: a hub name, a folder (a decoder's, an adapter's, or one that
                `save` wrote), or ``nano``, the decoder that comes with the package.
            peft_model_name_or_path: adapter or adapters to merge into it, in this order.
            enable_bidirectional: False keeps the causal mask (a baseline).
            pooling_mode: and the three after it, as in the constructor; by default what the folder
                says, else ``mean``, 512, no limit of its own, True.
            dtype: ``auto`` (bfloat16 on GPU, float32 on CPU), or a torch dtype's name.
            attn_implementation: as in transformers; chosen by default.
            allow_partial: accept a model some of whose layers stay causal by construction.
            device: where to run.
            prompts: added to those of the folder.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            ModelError: it cannot be loaded; NotBidirectionalError: the proof failed.
        """
        device = device or get_device_name()
        loaded = loading.load(
            base_model_name_or_path,
            peft_model_name_or_path,
            enable_bidirectional,
            loading.pick_dtype(dtype, torch.device(device)),
            attn_implementation,
            allow_partial,
            **hub,
        )
        given = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
        }
        path = Path(loading.resolve_base(base_model_name_or_path))
        settings = asdict(folder.Settings()) | _saved_settings(path)
        settings |= {key: value for key, value in given.items() if value is not None}
        return cls(
            loaded.model,
            loaded.tokenizer,
            **settings,
            device=device,
            prompts=folder.read_prompts(path) | (prompts or {}),
            report=loaded.report or prove(loaded.model),
            base=str(base_model_name_or_path),
        )

    def _pack(self, model: nn.Module) -> str | None:
        """Switch on packed attention; returns why not, if not."""
        if self.report.verdict != "full":
            return f"the model is not bidirectional throughout ({self.report.verdict})"
        reason = enable_packing(model.get_base_model() if isinstance(model, PeftModel) else model)
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
        inputs: Any,
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
            DataError: an input is no string and no pair, or both kinds are mixed.
        """
        if not isinstance(inputs, str):
            inputs = list(inputs)
            split_pairs(inputs)  # names the faulty index before any work is done
        rows = _BY_TOKENS if batch_size is None else batch_size
        stock: Any = super().encode
        vectors = stock(inputs, prompt_name=prompt_name, prompt=prompt, batch_size=rows, **kwargs)
        if isinstance(inputs, list) and not inputs and not isinstance(vectors, list):
            width = kwargs.get("truncate_dim") or self.get_embedding_dimension()
            return vectors.reshape(0, width)
        return vectors

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
        target = self._resolve_inference_device(device)
        rows = self.backbone.tokenize_inputs(inputs, prompt)
        by_tokens = batch_size == _BY_TOKENS
        batches = plan_batches(
            [len(row.ids) for row in rows],
            token_budget(target) if by_tokens else None,
            None if by_tokens else batch_size,
        )
        results: list[Any] = [None] * len(rows)
        was_training = self.training
        self.eval()
        try:
            with tqdm(total=len(rows), unit="text", disable=not show_progress_bar) as bar:
                for batch in batches:
                    features: dict[str, Any] = self.backbone.collate([rows[i] for i in batch])
                    features["repad"] = output_value != "sentence_embedding"
                    outputs = self(batch_to_device(features, target))
                    if output_value == "sentence_embedding":
                        values = outputs["sentence_embedding"].float()
                        if truncate_dim is not None:
                            values = truncate_embeddings(values, truncate_dim)
                        if normalize_embeddings:
                            values = nn.functional.normalize(values, dim=1)
                        values = values.cpu() if save_to_cpu else values
                    else:
                        values = _per_row(outputs, [len(rows[i].ids) for i in batch], output_value)
                    for index, value in zip(batch, values, strict=True):
                        results[index] = value
                    bar.update(len(batch))
        finally:
            self.train(was_training)
        if output_value == "sentence_embedding":
            return torch.stack(results) if results else torch.empty(0, device=target)
        return results

    def merged_model(self) -> nn.Module:
        """The bare transformer with an attached adapter, if any, merged into a copy."""
        model = self.backbone.auto_model
        if isinstance(model, PeftModel):
            return adapters.merge_attached(copy.deepcopy(model))
        return model

    def save(self, path: str | Path, *_: Any, card: folder.Card | None = None, **__: Any) -> None:
        """Write a folder that stock sentence-transformers and transformers load (see `folder`).

        An attached adapter is merged into the copy that is written. An existing folder is
        replaced file by file.

        Args:
            path: where to write.
            card: what the model card says; options of `SentenceTransformer.save` are accepted and
                ignored, weights are always safetensors.
        """
        tokens = self.backbone.tokens
        model = self.merged_model()
        stock = stock_loading(model)
        if stock == "causal":
            logger.warning("Only unmasked opens the mask of this family; stock loaders do not.")
        folder.write_folder(
            path,
            model,
            tokens.tokenizer,
            self.settings,
            {name: prompt for name, prompt in self.prompts.items() if prompt is not None},
            fixed_tokens=len(tokens.prefix) + len(tokens.suffix),
            needs_eager=stock == "eager",
            card=card or folder.Card(self.base, self.report.summary()),
        )

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """The same as `save`."""
        self.save(path, *args, **kwargs)


def _saved_settings(path: Path) -> dict[str, Any]:
    file = path / folder.SETTINGS_NAME
    if not file.is_file():
        return {}
    saved = json.loads(file.read_text(encoding="utf-8"))
    return {key: saved[key] for key in asdict(folder.Settings()) if key in saved}


def _per_row(outputs: dict[str, Any], lengths: list[int], name: str | None) -> list[Any]:
    """Token states (T, D) of each row without padding, or every output of each row."""
    if name == "token_embeddings":
        return [
            states[:length].float() for states, length in zip(outputs[name], lengths, strict=True)
        ]
    per_row = {k: v for k, v in outputs.items() if not k.startswith("packed_")}
    return [{k: v[i] for k, v in per_row.items()} for i in range(len(lengths))]
