"""The recipe: every setting of a run, in one schema.

A recipe is a YAML file with one section per stage. A key that is not in the schema is an error
that names the line, because a misspelt learning rate costs a day of GPU time. Paths in a recipe
are relative to the folder the command runs in, not to the recipe's own.

Defaults are the numbers of the LLM2Vec paper (arXiv 2404.05961) and its published configurations.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: object) -> object:
    """PyYAML reads ``2e-4`` as text, and pydantic takes ``true`` for 1."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if isinstance(value, str | bool):
        raise ValueError("should be a number")
    return value


def _listed(value: object) -> object:
    """One path stands for a list of one."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if isinstance(value, list | tuple):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    return value


def _data_sets(value: object) -> object:
    """A path stands for a data set with every other setting at its default."""
    listed = _listed(value)
    items = listed if isinstance(listed, list) else [listed]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), BeforeValidator(_number)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Dropout = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Strings = Annotated[list[str], BeforeValidator(_listed)]

Instructions = Annotated[list[str], BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(_Section):
    """The decoder to start from and how it encodes."""

    base: Annotated[str, Field(min_length=1)]
    """A hub name, a folder, or ``nano`` for the bundled decoder."""
    adapters: Strings = []
    """Adapters merged into the base before the first stage, in this order."""
    bidirectional: bool = True
    """Open the causal mask; False trains and saves the decoder with its mask."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; ``auto`` keeps that of the checkpoint where the device can."""
    attention: str | None = None
    """Attention implementation as transformers names it (``sdpa``, ``eager``, ...)."""
    pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] = "mean"
    """From token states to one vector; the paper finds ``mean`` best without the causal mask."""
    max_length: Annotated[Count, Field(ge=2)] = 512
    """Longest input of the saved encoder, in tokens, instruction included."""
    allow_partial: bool = False
    """Accept a model in which some layers provably stay causal, such as hybrids."""


class Lora(_Section):
    """What trains: low-rank adapters, unless ``method`` says otherwise."""

    method: Literal["lora", "dora", "qlora", "full"] = "lora"
    """``dora`` also trains the length of each row; ``qlora`` keeps the weights below in 4 bits
    (needs bitsandbytes); ``full`` trains every weight and no adapter, best in float32."""
    start: Literal["new", "continue"] = "new"
    """``continue`` trains on from the adapter of the stage before, as the paper does from SimCSE
    to supervised; ``new`` merges that one first."""
    rank: Count = 16
    """Rank of the two matrices."""
    alpha: Count = 32
    """The update is scaled by alpha / rank; the paper uses twice the rank."""
    dropout: Dropout = 0.05
    """Dropout on the adapter's input."""
    targets: Strings | None = None
    """Names of the linear layers; None is every one of attention and MLP, as in the paper."""


class Training(_Section):
    """What the stages have in common: optimiser (AdamW), schedule and how often to report."""

    held_out: Whole = 200
    """Texts, or rows of a data set, kept out of training to measure the loss on; 0 is none."""
    steps: Count = 1000
    """Optimiser steps."""
    gradient_accumulation: Count = 1
    """Batches per optimiser step."""
    learning_rate: Positive = 5e-5
    """Highest learning rate, after warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after warm-up."""
    schedule_steps: Count | None = None
    """Step at which the decay would reach zero; None is ``steps``. The paper decays over three
    epochs and stops at step 1000, when the rate has hardly fallen."""
    warmup_steps: Whole = 0
    """Steps in which the rate climbs from zero."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients longer than this are scaled down to it."""
    lora: Lora = Lora()
    """The adapter this stage trains."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_steps: Count = 10
    """Steps between two lines of metrics."""
    eval_steps: Count = 100
    """Steps between two held-out losses."""
    save_steps: Count = 200
    """Steps between two checkpoints, the points an interrupted run continues from."""
    trainer: dict[str, Any] = {}
    """Further arguments of transformers' ``TrainingArguments``, by name; they win."""

    @model_validator(mode="after")
    def _horizon(self) -> Training:
        horizon = self.schedule_steps or self.steps
        if horizon < self.steps and self.schedule != "constant":
            raise ValueError(
                f"schedule_steps {horizon} should be null or at least the {self.steps} steps, "
                "or the learning rate would be zero for the rest"
            )
        if self.warmup_steps >= horizon:
            raise ValueError(f"warmup_steps {self.warmup_steps} should be less than {horizon}")
        return self


class TextTraining(Training):
    """A stage that trains on plain texts."""

    data: Strings = []
    """Files of texts (.txt, .jsonl, .csv, perhaps .gz or .zst; .parquet), folders of them, or data
    sets on the hub (hf:NAME); one may stand for the list. MNTP's may be larger than memory."""
    max_texts: Count | None = None
    """Read no more texts than this; None reads all."""


class MNTP(TextTraining):
    """Masked next token prediction (paper section 2.1): the state at i-1 predicts token i."""

    batch_size: Count = 32
    """Blocks per batch, shared among the devices."""
    block_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens per block, cut from the concatenated texts."""
    documents: Literal["joined", "apart"] = "joined"
    """Whether the texts that share a block see each other (``joined``, the paper's way), or each
    itself alone with positions from 0, as when it is encoded (``apart``)."""
    micro_batch_tokens: Count | None = None
    """Tokens of a forward. A larger batch is cut into equal parts, to the same gradient in less
    memory, so that gradient checkpointing is seldom needed; None is 2048 on a CPU, 16384 on a
    GPU."""
    mask_token: Literal["blank", "eos", "mask"] = "blank"
    """What stands for a masked token where the tokenizer has no mask token: ``_`` (the paper's),
    the end-of-text token, or a new one."""
    mask_style: Literal["bert", "all"] = "bert"
    """Of the chosen tokens, mask 80 %, replace 10 % and keep 10 % (``bert``), or mask all."""
    mask_probability: Share = 0.2
    """Share of tokens chosen; the paper takes 0.2, and 0.8 with ``all`` for Mistral."""

    @model_validator(mode="after")
    def _own_mask(self) -> MNTP:
        if self.mask_token == "mask" and self.lora.method == "full":
            raise ValueError(
                "mask_token mask adds an embedding, which lora.method full would save. "
                "Fix: mask_token: blank"
            )
        return self


class SimCSE(TextTraining):
    """Unsupervised contrastive training (paper section 2.1): the same text twice, two dropouts."""

    batch_size: Annotated[Count, Field(ge=2)] = 128
    """Texts per batch, shared among the devices; all the others are a text's negatives."""
    max_length: Annotated[Count, Field(ge=2)] = 128
    """Texts are cut to this many tokens."""
    learning_rate: Positive = 3e-5
    """Highest learning rate, after warm-up."""
    temperature: Positive = 0.05
    """Cosines are divided by this before the softmax."""
    attention_dropout: Dropout = 0.3
    """Dropout on the attention weights: the noise that makes the two views differ."""
    embedding_dropout: Dropout = 0.0
    """Dropout on the embeddings of the tokens: noise for where attention has none. That of the
    adapter is ``lora.dropout``, and acts once the adapter does."""
    log_steps: Count = 50
    """Steps between two lines of metrics."""
    eval_steps: Count = 200
    """Steps between two held-out losses."""

    @model_validator(mode="after")
    def _noise(self) -> SimCSE:
        lora = 0.0 if self.lora.method == "full" else self.lora.dropout
        if not (self.attention_dropout or self.embedding_dropout or lora):
            raise ValueError(
                "no dropout, so the two views would be one. Fix: attention_dropout: 0.3"
            )
        return self


class Pairs(_Section):
    """A data set of queries and what answers them, and how its texts are asked for."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl, .csv (each perhaps .gz or .zst) or .parquet file, a folder of such, or a data set
    on the hub: ``OWNER/NAME``, ``hf:NAME``, or ``hf:NAME:SUBSET:SPLIT``, streamed."""
    subset: str | None = None
    """Configuration of a data set on the hub, where the path names none; None is its only one."""
    split: str = "train"
    """Split of a data set on the hub, where the path names none."""
    query: str = "query"
    """Column of the query."""
    positive: str = "positive"
    """Column of the text that answers it."""
    negative: str = "negative"
    """Column of one text that does not, or of a list of such; a file without it has none.
    ``negatives`` is looked for as well."""
    instruction: Instructions = []
    """Put before every query, never pooled. Of several, row i takes the i-th, round and round."""
    document_instruction: Instructions = []
    """Put before every positive and negative; retrieval has none."""
    symmetric: bool = False
    """Both sides are the same kind of text, so documents take the instruction of their query."""
    weight: Positive = 1.0
    """How often its rows are passed in an epoch: 0.5 takes another half of them each time."""
    max_rows: Count | None = None
    """Read no more rows than this; None reads all."""

    @model_validator(mode="after")
    def _one_side(self) -> Pairs:
        if self.symmetric and self.document_instruction:
            raise ValueError("symmetric and document_instruction exclude each other")
        return self


class Supervised(Training):
    """Contrastive training on pairs, with hard negatives where there are (paper section 3.2)."""

    data: Annotated[list[Pairs], BeforeValidator(_data_sets)] = []
    """Data sets; a path may stand for one, and one for the list. A batch is of one of them."""
    batch_size: Annotated[Count, Field(ge=2)] = 512
    """Rows per batch, shared among the devices; the documents of all other rows are a query's
    negatives."""
    hard_negatives: Whole = 1
    """Negatives of its own that a query is shown, where its row has them."""
    max_length: Annotated[Count, Field(ge=2)] = 512
    """Texts are cut to this many tokens, instruction included."""
    learning_rate: Positive = 2e-4
    """Highest learning rate, after warm-up."""
    warmup_steps: Whole = 300
    """Steps in which the rate climbs from zero."""
    temperature: Positive = 0.02
    """Cosines are divided by this before the softmax."""
    mini_batch_tokens: Count | None = None
    """Tokens of a forward. A larger batch is embedded twice, once without gradients (GradCache,
    arXiv 2101.06983), in the memory of one such forward; None runs it at once."""
    false_negative_margin: NotNegative | None = None
    """Leave out negatives more than this closer to the query than its positive is (cosine); None
    leaves out only texts that are the positive or the query itself."""
    matryoshka: list[Count] = []
    """Also train the first so many dimensions of the vector (arXiv 2205.13147)."""
    log_steps: Count = 50
    """Steps between two lines of metrics."""
    eval_steps: Count = 200
    """Steps between two held-out losses."""


class Evaluate(_Section):
    """What is scored before the first stage and after each."""

    tasks: Strings = []
    """Task files and folders."""
    bootstrap: Whole = 1000
    """Resamples behind every confidence interval; 0 gives none."""


class Recipe(_Section):
    """Every setting of a run. Without a stage the model is converted and evaluated only."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Names the run folder: letters, digits, ``.``, ``_`` and ``-``."""
    seed: Seed = 42
    """Seed of data order, masking, dropout and adapter initialisation."""
    model: Model
    """The decoder to start from."""
    mntp: MNTP | None = None
    """First stage; None leaves it out."""
    simcse: SimCSE | None = None
    """Second stage; None leaves it out."""
    supervised: Supervised | None = None
    """Third stage; None leaves it out."""
    evaluate: Evaluate = Evaluate()
    """What is scored."""
    trackers: list[Literal["wandb", "trackio"]] = []
    """Where metrics go besides ``metrics.jsonl`` and TensorBoard, which are always written."""

    @model_validator(mode="after")
    def _continued(self) -> Recipe:
        before: Lora | None = None
        for name, stage in self.stages():
            lora, same = stage.lora, {"start": "continue"}
            if lora.start == "continue" and lora != (before and before.model_copy(update=same)):
                given = "is of another shape" if before else "does not exist"
                raise ValueError(
                    f"{name}.lora.start continue: the adapter of the stage before {given}. "
                    "Fix: the same lora settings in both, or start: new"
                )
            before = lora
        return self

    def stages(self) -> list[tuple[str, MNTP | SimCSE | Supervised]]:
        """Name and settings of the stages that are not left out, in the order they run."""
        named = {"mntp": self.mntp, "simcse": self.simcse, "supervised": self.supervised}
        return [(name, stage) for name, stage in named.items() if stage is not None]
