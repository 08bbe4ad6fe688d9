"""A tiny random model of every text decoder that transformers has, and what is seen of it.

The list is the library's own: whatever `AutoModelForCausalLM` knows is built from its config class
by rule (`unmasked.doctor.miniature`), so families that a later release adds are here by themselves.
`HINTS` helps where the defaults of a class alone build no model. Looking at one family takes about
a second, and this writes what is found of all of them:

    python tests/support/zoo.py > docs/models.md

Tests choose families by that page (`listed`) and hold it to what they find.
"""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from unmasked.doctor.miniature import WINDOW, small_fields
from unmasked.forward.packing import enable_packing, pack, run_packed
from unmasked.mask.opening import open_config
from unmasked.mask.proof import Proof, open_mask, prove, stock_loading

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 20_000_000  # weights; a family whose miniature has more is not built
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
SCHEDULES = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Fields that say for each layer of which kind it is."""
TEXTS = [[*range(20, 29)], [*range(40, 43)], [*range(60, 77)], [*range(90, 95)]]

HINTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_num_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "initializer_range": 0.05},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"layers": 3},
    "kimi_linear": {"linear_num_heads": 4},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "is_decoder": True},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 512,
        "hc_lowrank": 16,
        "split_ngram_parts": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


COLUMNS = (
    "verdict",
    "default",
    "attentions",
    "packed",
    "left padding",
    "window",
    "stock",
    "reason",
)


@cache
def table() -> dict[str, dict[str, str]]:
    """What `TABLE` says: family → column → cell."""
    text = TABLE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \|(.*)\|$", text, re.MULTILINE)
    cells = {family: [cell.strip() for cell in rest.split("|")] for family, rest in rows[1:]}
    return {family: dict(zip(COLUMNS, own, strict=True)) for family, own in cells.items()}


def listed(*verdicts: str, **columns: str) -> list[str]:
    """Families that the table gives one of these verdicts and these cells."""
    wanted = columns.items()
    return [
        family
        for family, cells in table().items()
        if cells["verdict"] in verdicts and all(cells[name] == cell for name, cell in wanted)
    ]


class NotADecoderError(Exception):
    """What a family is instead."""


@dataclass
class Findings:
    """What was seen of one family.

    Attributes:
        verdict: ``full``, ``partial``, ``impossible``; or why it is none of these.
        report: with the attention that is chosen by default; None if no model was built.
        attentions: verdict under eager and sdpa, or why there is none.
        closed: verdict with the flag off.
        right, left, order: relative differences of texts alone and in batches that are padded on
            the right or on the left, and in another order.
        unpacked: why batches are not packed; empty if they are.
        packed: largest difference of packed and padded vectors.
        gradient: whether the first state's gradient reaches the last token.
        stock: what a stock loader makes of it once it is saved.
    """

    family: str
    verdict: str
    report: Proof | None = None
    attentions: dict[str, str] = field(default_factory=dict)
    closed: str = ""
    right: float = 0.0
    left: float = 0.0
    order: float = 0.0
    unpacked: str = ""
    packed: float = 0.0
    gradient: bool = False
    stock: str = ""


def config(family: str) -> PretrainedConfig:
    """A tiny config of a family, of two layers or of one of each kind.

    Raises:
        NotADecoderError: it is something else, or no model can be built of it.
    """
    from transformers import CONFIG_MAPPING

    if family not in MODEL_MAPPING_NAMES or "assistant" in family:
        raise NotADecoderError("has no bare model that takes text alone")
    whole = CONFIG_MAPPING[family]()
    if whole.is_encoder_decoder:
        raise NotADecoderError("encoder-decoder")
    try:
        text = whole.get_text_config()
        if text is not whole:
            raise NotADecoderError(f"composite; its text trunk is {text.model_type}")
        hints = copy.deepcopy(HINTS.get(family, {}))
        fields = _shallow(whole, hints.pop("layers", 2))
        return type(whole).from_dict({**fields, **hints})
    except (AttributeError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
        raise NotADecoderError(f"not built: {_first_line(error)}") from error


def _shallow(whole: Any, count: int) -> dict[str, Any]:
    """The fields of a miniature of `count` layers, and of one of each kind in any case."""
    depth, fields = int(whole.num_hidden_layers), small_fields(whole)
    schedules = [s for s in (getattr(whole, name, None) for name in SCHEDULES) if s]
    kinds = list(zip(*(s for s in schedules if len(s) == depth), strict=False)) or [()] * depth
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [i for i in range(depth) if i not in firsts]
    kept = sorted((firsts + others)[: max(count, len(firsts))])
    for name, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == depth > 1:
            fields[name] = [value[layer] for layer in kept]
        elif isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
            fields[name] = {at: value[old] for at, old in enumerate(kept) if old in value}
        elif name in DEPTHS and value:
            fields[name] = max(1, round(value * len(kept) / depth))
    return fields


def build(source: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A random bare model, always the same one."""
    how = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    return AutoModel.from_config(copy.deepcopy(source), **how).eval()


def opened(source: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """As `loading.load_transformer` does it."""
    model = build(open_config(source), attention)
    open_mask(model)
    return model


@cache
def examine(family: str) -> Findings:
    """Build a family and look at it from all sides, in about a second."""
    try:
        small = config(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(small)).parameters())
        if size > LARGEST:
            raise NotADecoderError(f"not built: {size:,} weights at least")
        closed = prove(build(small))
    except NotADecoderError as other:
        return Findings(family, str(other))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        return Findings(family, f"not built: {_first_line(error)}")
    if closed.verdict == "full":
        return Findings(family, "encoder: bidirectional without this package", closed)
    model = opened(small)
    report = prove(model)
    found = Findings(family, report.verdict, report, closed=closed.verdict)
    for attention in ("eager", "sdpa"):
        try:
            other = prove(opened(small, attention))
            found.attentions[attention] = other.verdict
        except (ImportError, ValueError) as error:
            found.attentions[attention] = _first_line(error)
    if report.verdict == "impossible":
        return found
    found.gradient, found.stock = _gradient_flows(model), stock_loading(model)
    with torch.no_grad():
        alone = [_states(model, [text])[0] for text in TEXTS]
        found.right = _apart(_states(model, TEXTS), alone)
        found.order = _apart(_states(model, TEXTS[::-1])[::-1], alone)
        found.left = _apart(_states(model, TEXTS, left=True), alone)
        found.unpacked = enable_packing(model) or "" if report.verdict == "full" else report.verdict
        if not found.unpacked:
            found.packed = _apart(_packed_states(model), alone)
    return found


def _states(model: PreTrainedModel, texts: list[list[int]], left: bool = False) -> list[Tensor]:
    """Last states (T, D) of each text in one padded batch."""
    ids, mask = _batch(texts, left)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [row[keep.bool()] for row, keep in zip(states, mask, strict=True)]


def _packed_states(model: PreTrainedModel) -> list[Tensor]:
    ids, mask = _batch(TEXTS)
    packed = pack(mask)
    states = run_packed(model, ids, packed)
    return [states[packed.rows == row] for row in range(len(TEXTS))]


def _batch(texts: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([_pad(text, width, left) for text in texts])
    mask = torch.tensor([_pad([1] * len(text), width, left) for text in texts])
    return ids, mask


def _pad(row: list[int], width: int, left: bool) -> list[int]:
    pads = [0] * (width - len(row))
    return pads + row if left else row + pads


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of mean-pooled vectors and of states."""
    pairs = [*zip(found, expected, strict=True)]
    pairs += [(f.mean(0), e.mean(0)) for f, e in pairs]
    return max(float((f - e).norm() / e.norm()) for f, e in pairs)


def _gradient_flows(model: PreTrainedModel) -> bool:
    """Whether the first state of a short text depends on the last token's embedding."""
    embedded = []

    def keep(_: object, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # one family writes into it

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        state = _states(model, [TEXTS[3]])[0][0]
        (gradient,) = torch.autograd.grad(state.square().sum(), embedded[0])
    finally:
        hook.remove()
    return bool(gradient.flatten(0, -2)[-1].abs().max() > 0)


def row(found: Findings) -> str:
    """A family's line of the table."""
    report = found.report
    if report is None or not found.attentions:
        return f"| {found.family} | none | | | | | | | {found.verdict} |"
    usable = found.verdict != "impossible"
    causal = ", ".join(map(str, report.causal_layers))
    cells = [
        found.family,
        found.verdict,
        report.attention,
        ", ".join(n if v == found.verdict else f"not {n}" for n, v in found.attentions.items()),
        ("no" if found.unpacked else "yes") if usable else "",
        ("ok" if found.left < 1e-3 else "differs") if usable else "",
        str(report.window or "") if usable else "",
        found.stock,
        (f"left-to-right: {causal}" if causal else "") if usable else report.reason,
    ]
    return f"| {' | '.join(cells)} |"


def introduction(verdicts: list[str]) -> str:
    """What stands above the table."""
    import transformers

    counts = {kind: verdicts.count(kind) for kind in ("full", "partial", "impossible", "none")}
    return INTRODUCTION.format(version=transformers.__version__, size=WINDOW, **counts)


def document(rows: list[Findings]) -> str:
    """The text of `TABLE`."""
    verdicts = [found.verdict if found.attentions else "none" for found in rows]
    lines = "\n".join(row(found) for found in rows)
    return f"""{introduction(verdicts)}
| family | {" | ".join(COLUMNS)} |
|---|---|---|---|---|---|---|---|---|
{lines}
"""


INTRODUCTION = """# Families

The result of [the proof](concepts/proof.md) for every family that `AutoModelForCausalLM` of
transformers {version} knows: {full} full, {partial} partial, {impossible} impossible, {none} none.
Look up a model by the `model_type` in its config. The table is written by
`python tests/support/zoo.py > docs/models.md` from tiny random models (two layers, or one of each
kind), and `tests/mask/test_zoo.py` checks it.

* **verdict**: `full`: every layer is bidirectional. `partial`: attention is bidirectional, but
  other layers or parts of layers stay left-to-right; refused unless `allow_partial` is given.
  `impossible`: always refused. `none`: not a decoder of text alone, or not built.
* **default**: the attention implementation that transformers chooses. **attentions**: which of
  eager and sdpa reach the verdict.
* **packed**: `yes`: texts are concatenated, so padding is never computed
  ([packing](concepts/packing.md)). `no`: batches are padded, with the same vectors.
* **left padding**: whether left padding gives the same states without `position_ids`. This package
  pads on the right, where every family gives the same states.
* **window**: how many tokens to each side the sliding-window layers see in the tiny model, whose
  window is {size} if the family has one. `is_causal: false` keeps the reach to the left and mirrors
  it; the own key of Gemma 3 and 4 halves it.
* **stock**: what stock loaders compute from a saved folder. `same`: the same vectors. `eager`: the
  same vectors, because the config names eager attention. `causal`: only this package opens it.
"""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()[:160]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(document([examine(family) for family in FAMILIES]))
