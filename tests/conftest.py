from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.tiny import COMMON, save_random

for name in (
    "COLUMNS",
    "LINES",
):  # a process that shares the tests has them; tables would be wrapped
    os.environ.pop(name, None)

SENTENCES = [
    "The cat sat on the warm mat in the morning sun.",
    "A small dog ran across the wet street and barked.",
    "Masks hide the words to the right of the current one.",
    "한국어 문장도 문제없이 벡터가 됩니다.",
    "The quick brown fox jumps over the lazy dog again.",
    "She sells sea shells on the sea shore in summer.",
    "Reading a book in the library is a quiet pleasure.",
    "오늘은 날씨가 맑고 바람이 붑니다.",
]


def pytest_collection_modifyitems(items):
    """Slow tests may take an hour; the others have the limit of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE with BOS, EOS and no padding token, as many decoders have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama of two layers with its tokenizer. Large weights, so that inputs matter."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return save_random(tmp_path_factory.mktemp("models") / "tiny", config, tiny_tokenizer)


@pytest.fixture(scope="session")
def longrope_decoder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Phi-3 whose rotary positions are stretched in texts of more than 256 tokens."""
    from transformers import Phi3Config

    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8}
    own = {
        "vocab_size": len(tiny_tokenizer),
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    }
    config = Phi3Config(**COMMON | own)
    return save_random(tmp_path_factory.mktemp("models") / "longrope", config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_mamba(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Mamba: no attention, so nothing to open."""
    from transformers import MambaConfig

    config = MambaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2
    )
    return save_random(tmp_path_factory.mktemp("models") / "mamba", config, tiny_tokenizer)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder, as the installed script does: (exit code, out, err)."""
    from unmasked.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmasked", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return list(SENTENCES)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """A BPE in SentencePiece's manner: spaces become part of words, unknown bytes fall back."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
