"""One model as it is served: from what a body asks to rows of ids, and from states to vectors.

Texts become ids in `text.tokens`, and vectors come from `forward.loop`, as in `encode`; here is
only what a request may choose: the prompt, the most tokens, the numbers of a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unmasked.errors import DataError, ModelError, unknown
from unmasked.forward.compiling import LONG_WORK
from unmasked.forward.loop import running
from unmasked.model import TextEncoder
from unmasked.serve.wire import Body, ModelAnswer, Refusal, Texts
from unmasked.text.tokens import TextTokenizer, TokenRow

BY_TYPE = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names of prompts that `encode_query` and `encode_document` of sentence-transformers look for."""

FEW_IDS, OWN = 64, 0.9
"""Fewer ids than these are not judged; the share of own ids below which they are another's.

Over four Wikipedia sentences or more, English and Korean, the ids of three tokenizers kept 1.00 of
themselves; those of OpenAI's cl100k, read by these three, kept 0.84 in the median of English and
0.22 to 0.74 of Korean.
"""
AS_TEXTS = (
    "Fix: send texts, or ids of the model's own tokenizer (LangChain sends those of another one, "
    "unless it is told check_embedding_ctx_length=False)."
)


def own_share(tokens: TextTokenizer, several: Sequence[Sequence[int]]) -> float:
    """The share of ids that stay when the text they stand for is tokenised again; at most 1."""
    same = whole = 0
    for ids in several:
        text = tokens.backend.decode(ids, skip_special_tokens=False)
        again = tokens.backend.encode(text, add_special_tokens=False).ids
        same += (Counter(ids) & Counter(again)).total()
        whole += max(len(ids), len(again))
    return same / max(whole, 1)


class ServedModel:
    """A loaded encoder under the name that clients call it by.

    Args:
        name: that name.
        encoder: put into evaluation mode for good; its layers are compiled here, if
            that was asked for when it was loaded.
        max_tokens: most tokens of an input, if fewer than the model's own limit.
        truncate: whether a text that is too long is cut where a request does not say.
    """

    def __init__(
        self, name: str, encoder: TextEncoder, max_tokens: int | None = None, truncate: bool = False
    ) -> None:
        self.name, self.encoder, self.truncate = name, encoder.eval(), truncate
        own = encoder.backbone.tokens.max_length
        self.max_tokens = min(own, max_tokens or own)
        self.width = encoder.get_embedding_dimension() or 0
        config: Any = encoder.backbone.auto_model.config
        self._vocabulary = int(config.get_text_config().vocab_size)
        tokens = encoder.backbone.tokens
        known = tokens.backend.encode("Some words, as they are read.", add_special_tokens=False).ids
        self._decodes = own_share(tokens, [known]) >= OWN
        if encoder.backbone.compile_for(LONG_WORK, encoder.compiles):  # work without an end
            self._warm_up()

    def _warm_up(self) -> None:
        """Run one batch of each kind, so that no request waits while a graph is made for it."""
        long = "word " * self.max_tokens
        for texts in ([""], ["", ""], ["a", "b c", "d"], [long], [long, ""]):
            self.vectors(self.encoder.backbone.tokens(texts, max_length=self.max_tokens))

    def described(self, created: int) -> ModelAnswer:
        """What ``/v1/models`` says of it."""
        prompts = [name for name, prompt in self.encoder.prompts.items() if prompt]
        return ModelAnswer(
            id=self.name,
            created=created,
            dimensions=self.width,
            max_tokens=self.max_tokens,
            prompts=prompts,
        )

    def prompt(self, asked: Body) -> str:
        """The text before every input, as `encode` would choose it.

        Raises:
            Refusal: the model has no prompt of this name.
        """
        if asked.prompt is not None:
            return asked.prompt
        prompts, name = self.encoder.prompts, asked.prompt_name
        if name is not None and name not in prompts:
            raise Refusal(400, unknown("prompt", name[:64], prompts), "no_prompt", "prompt_name")
        if asked.input_type is not None:
            known = (name for name in BY_TYPE[asked.input_type] if name in prompts)
            name = next(known, self.encoder.default_prompt_name)
        name = name or self.encoder.default_prompt_name
        return (prompts[name] or "") if name is not None else ""

    def rows(self, inputs: Texts, asked: Body, prompt: str) -> list[TokenRow]:
        """Rows of ids of the inputs of a request; runs in a worker thread.

        Raises:
            Refusal: an input is too long, an id is not one of the model's, or the prompt leaves no
                room.
        """
        backbone = self.encoder.backbone
        try:
            if isinstance(inputs, str):
                rows = backbone.tokenize_inputs([inputs], prompt, self.max_tokens)
            elif isinstance(inputs[0], str):
                rows = backbone.tokenize_inputs(inputs, prompt, self.max_tokens)
            else:
                several: Any = inputs if isinstance(inputs[0], list) else [inputs]
                rows = [self._of_ids(ids, prompt) for ids in several]
                self._check_own([ids[: 8 * FEW_IDS] for ids in several[:FEW_IDS]])
        except DataError as error:
            raise Refusal(400, str(error), "invalid_input") from None
        truncate = self.truncate if asked.truncate is None else asked.truncate
        for index, row in enumerate(rows):
            if row.cut and not truncate:
                raise Refusal(
                    400,
                    f"input {index} has {len(row.ids) + row.cut} tokens, of which {row.cut} do not "
                    f"fit: {self.name} takes {len(row.ids)} of such an input. Fix: a shorter text, "
                    'or "truncate": true to have its end cut off.',
                    "context_length_exceeded",
                )
        return rows

    def _of_ids(self, ids: Sequence[int], prompt: str) -> TokenRow:
        most = max(ids, default=0)
        if most >= self._vocabulary:
            raise Refusal(
                400,
                f"token {most} is not one of the {self._vocabulary} of {self.name}. {AS_TEXTS}",
                "invalid_token",
            )
        return self.encoder.backbone.tokens.of_ids(ids, prompt, self.max_tokens)

    def _check_own(self, several: Sequence[Sequence[int]]) -> None:
        """Refuse ids of another tokenizer, whose vectors would be those of other words."""
        enough = self._decodes and sum(map(len, several)) >= FEW_IDS
        if enough and own_share(self.encoder.backbone.tokens, several) < OWN:
            said = f"these are not the ids that the tokenizer of {self.name} gives for their text."
            raise Refusal(400, f"{said} {AS_TEXTS}", "foreign_tokens")

    def vectors(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """(N, D) float32 vectors of N rows.

        Raises:
            ModelError: a number is not finite, as happens where float16 overflows.
        """
        encoder = self.encoder
        found = running.encode_rows(encoder, encoder.backbone, rows, encoder.device)
        if not torch.isfinite(found).all():
            raise ModelError("the model gave numbers that are not finite. Fix: --dtype bfloat16.")
        return np.asarray(found.numpy())

    def finish(self, vectors: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
        """Vectors of as many numbers as asked for, perhaps of length 1."""
        shorter = dimensions or self.encoder.truncate_dim
        return np.asarray(running.finish(torch.from_numpy(vectors), shorter, normalize).numpy())

    def check_dimensions(self, dimensions: int | None) -> None:
        """Refuse more numbers than a vector has."""
        if dimensions is not None and dimensions > self.width:
            said = f"dimensions is {dimensions}; {self.name} has {self.width}. Fix: give fewer."
            raise Refusal(400, said, "invalid_dimensions", "dimensions")
