"""MNTP's corpus: read once into a mapped file, cut into blocks, documents joined or apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.tiny import SMALL
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from unmasked.checkpoint import adapters
from unmasked.errors import DataError
from unmasked.forward.packing import enable_packing, pack_documents
from unmasked.mask.opening import open_config
from unmasked.mask.proof import open_mask
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer
from unmasked.train.data.texts import Blocks, token_file
from unmasked.train.losses import mntp

TEXTS = ["The cat sat.", "안녕하세요", "", "x" * 100, "The cat sat.", "A dog barked."]


@pytest.fixture
def tokens(tiny_tokenizer):
    return TextTokenizer(prepare_tokenizer(tiny_tokenizer))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path / "texts.txt"


@pytest.fixture
def stored(corpus, tokens, tmp_path):
    return token_file([corpus], None, tokens, tmp_path / "tokens")


def test_the_token_file_holds_every_text_behind_its_bos(stored, tokens, tiny_tokenizer):
    kept = [text for text in TEXTS if text]
    assert len(stored.ends) == len(kept) + 1
    for number, text in enumerate(kept):
        ids = stored.ids[stored.ends[number] : stored.ends[number + 1]]
        assert ids.tolist() == tiny_tokenizer(text)["input_ids"]
    assert isinstance(stored.ids, np.memmap)
    assert stored.keys[0] == stored.keys[3] != stored.keys[1]


def test_the_token_file_is_used_again_until_the_texts_change(stored, corpus, tokens, tmp_path):
    folder = tmp_path / "tokens"
    (made,) = folder.glob("*.bin")
    before = made.stat().st_mtime_ns
    token_file([corpus], None, tokens, folder)
    assert made.stat().st_mtime_ns == before
    corpus.write_text("another corpus", encoding="utf-8")
    assert len(token_file([corpus], None, tokens, folder).keys) == 1
    assert len(list(folder.glob("*.bin"))) == 2
    assert {file.suffix for file in folder.iterdir()} == {".bin", ".npz"}


def test_b42_every_kind_of_source_gives_the_same_tokens(stored, tokens, tmp_path):
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    lines = "\n".join(TEXTS).encode()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes(lines)
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(lines)
    with (tmp_path / "c.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    for name in ("folder", "b.txt.gz", "c.jsonl", "d.parquet"):
        again = token_file([tmp_path / name], None, tokens, tmp_path / "tokens")
        assert np.array_equal(again.ids, stored.ids), name
        assert np.array_equal(again.keys, stored.keys)
        assert again.source == stored.source
    assert len(token_file([tmp_path / "folder"], 2, tokens, tmp_path / "tokens").keys) == 2


def test_a_repeated_text_counts_once_and_is_never_on_both_sides(tokens, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(f"text {i % 40}" for i in range(100)))
    stored = token_file([tmp_path / "t.txt"], None, tokens, tmp_path)
    train, held_out = stored.split(200, seed=3)
    assert len(train) == 36 and len(held_out) == 4
    keys = stored.keys
    assert len({*keys[train]} | {*keys[held_out]}) == 40
    again = stored.split(200, seed=3)
    assert np.array_equal(train, again[0]) and np.array_equal(held_out, again[1])
    assert not np.array_equal(train, stored.split(200, seed=4)[0])


def test_b32_b47_blocks_lose_only_the_last_incomplete_one(stored, tiny_tokenizer):
    order = np.array([2, 0, 1])
    kept = [text for text in TEXTS if text]
    stream = [i for number in order for i in tiny_tokenizer(kept[number])["input_ids"]]
    blocks = Blocks(stored, order, 16)
    laid = [i for number in range(len(blocks)) for i in blocks[number].tolist()]
    assert laid == stream[: len(stream) // 16 * 16]
    assert blocks.dropped == len(stream) % 16
    with pytest.raises(DataError, match="less than one block of 1000"):
        Blocks(stored, order, 1000)


def test_a_block_says_where_its_documents_begin(stored, tiny_tokenizer):
    order = np.arange(len(stored.keys))
    blocks = Blocks(stored, order, 16)
    bos = tiny_tokenizer.bos_token_id
    for number in range(len(blocks)):
        expected = blocks[number] == bos
        expected[0] = True  # the rest of a document begins there
        assert np.array_equal(blocks.begins(number), expected)


def apart_model(config):
    """A trunk that packs, with a LoRA, and the head of its language model."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(open_config(config)).eval()
    trunk = language_model.base_model
    open_mask(trunk)
    assert enable_packing(trunk) is None
    return mntp.MaskedNextTokenModel(adapters.attach(trunk, rank=4, dropout=0.0), language_model)


CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gemma3_window": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTHS = [[5, 9, 2], [7, 9], [16]]


def blocks_of(lengths):
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (len(lengths), 16))
    begins = torch.zeros(len(lengths), 16, dtype=torch.bool)
    for row, sizes in enumerate(lengths):
        for start in np.cumsum([0, *sizes[:-1]]):
            begins[row, int(start)] = True
    return ids, begins


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_of_one_document_moves_no_state_of_another(name):
    model = apart_model(CONFIGS[name])
    ids, begins = blocks_of(LENGTHS)
    seen = []
    model.trunk.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state[0]))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 117 + 3  # in the second document of the first block
    labels = torch.full_like(ids, mntp.IGNORED)
    for batch in (ids, changed):
        model(batch, labels, begins=begins)
    packed = pack_documents(begins)
    moved = torch.zeros_like(begins)
    moved[packed.rows, packed.columns] = (seen[0] - seen[1]).abs().amax(dim=1) > 1e-6
    assert moved[0, 5:14].all()
    assert moved.sum() == 9


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_apart_is_that_of_each_document_alone(name):
    model = apart_model(CONFIGS[name])
    ids, begins = blocks_of(LENGTHS)
    batch = mntp.Masking(5, 120, (0, 1, 2), 0.5)(ids, None, begins)
    assert (batch["labels"][begins] == mntp.IGNORED).all()
    together = model(**batch, begins=begins)
    expected = torch.zeros(3)
    for row, sizes in enumerate(LENGTHS):
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            part = slice(int(end) - size, int(end))
            ids_alone, scored = (batch[k][row : row + 1, part] for k in ("input_ids", "labels"))
            one = model(ids_alone, scored)
            expected += one["totals"].sum(0)
    torch.testing.assert_close(together["totals"].sum(0), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together["loss"], expected[0] / expected[2])


def test_a_run_reports_its_data_and_keeps_documents_apart(tiny_decoder, tmp_path):
    from unmasked.recipe.schema import Recipe
    from unmasked.train.run import Run

    lines = [f"the cat sat on the mat and looked at dog {i % 150}" for i in range(200)]
    (tmp_path / "texts.txt").write_text("\n".join(["", *lines]), encoding="utf-8")
    section = {"data": str(tmp_path / "texts.txt"), "steps": 2, "batch_size": 4, "held_out": 10}
    recipe = {"name": "t", "model": {"base": str(tiny_decoder)}}
    weights = []
    for documents in ("apart", "joined"):
        run = tmp_path / documents
        mntp_section = {**section, "block_length": 16, "documents": documents, "log_steps": 1}
        Run(Recipe.model_validate({**recipe, "mntp": mntp_section}), run).run()
        weights.append((run / "mntp" / "adapter_model.safetensors").read_bytes())
        assert not (run / "tokens").exists()
    facts = json.loads((run / "mntp" / "data.json").read_text())
    assert (facts["texts"], facts["repeated"], facts["held_out"]) == (200, 50, 10)
    assert 0 <= facts["dropped_tokens"] < 16
    assert weights[0] != weights[1]
