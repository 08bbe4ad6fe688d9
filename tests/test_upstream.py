"""The libraries still have what docs/upstream.md says we use of them, and we use nothing else."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src" / "unmasked"
PAGE = Path(__file__).parents[1] / "docs" / "upstream.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table, for one name of it."""

    name: str
    library: str
    where: str
    why: str
    breaks: str


def rows() -> list[Row]:
    """The table, one row for each name."""
    lines = re.findall(r"^\| (`.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [
        Row(name, library, where.strip("`"), why, breaks)
        for names, library, where, why, breaks in cells
        for name in re.findall(r"`([^`]+)`", names)
    ]


# --- the libraries have what we use ---------------------------------------------------------------


def tiny_model():
    from support import tiny

    return tiny.model("llama")


def attention_can_be_read():
    model = tiny_model()
    model.set_attn_implementation("eager")
    return model.config._attn_implementation == "eager"


def mask_takes_lengths_and_offsets():
    from transformers.masking_utils import sdpa_mask, sliding_window_bidirectional_mask_function

    window = sliding_window_bidirectional_mask_function(1)
    found = sdpa_mask(
        batch_size=1, q_length=3, kv_length=3, q_offset=0, kv_offset=0,
        mask_function=window, attention_mask=None, allow_is_causal_skip=False,
    )  # fmt: skip
    return found[0, 0].tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def inference_is_the_loop_of_encode():
    from sentence_transformers import SentenceTransformer

    class Ours(SentenceTransformer):
        def _inference(self, inputs, **named):
            self.named = named
            return torch.zeros(len(inputs), 2)

    encoder = Ours(modules=[torch.nn.Identity()], device="cpu")
    encoder.encode(["a", "b"])
    expected = {"prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu"}
    return expected | {"normalize_embeddings", "truncate_dim"} <= set(encoder.named)


def adapter_layers_are_tuner_layers():
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return len(layers) == 2 and all(hasattr(m.get_base_layer(), "weight") for m in layers)


def wrappers_take_themselves_off():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    wrapped = get_peft_model(tiny_model(), config).get_base_model().norm
    taken = wrapped.unload_and_optionally_merge_module(True, False, None)
    return "weight" in dict(taken.named_parameters(recurse=False))


def loading_an_adapter_leaves_names(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = tiny_model()
    model.load_adapter(str(tmp_path))
    return "_weight_conversions" in vars(model)


def pruned_heads_are_kept_as_they_are(tmp_path: Path):
    config = tiny_model().config
    config.pruned_heads = {"a sentence": []}
    config.save_pretrained(tmp_path)
    return type(config).from_pretrained(tmp_path).pruned_heads == {"a sentence": []}


def says(error: type[Exception], text: str, call: Callable[[], object]) -> bool:
    try:
        call()
    except error as caught:
        return text in str(caught)
    return False


def dropout_on_experts_is_refused_by_name():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, MixtralConfig

    small = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModel.from_config(MixtralConfig(**small, **heads))
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    return says(ValueError, "lora_dropout", lambda: get_peft_model(model, lora))


def ranges_are_given_by_name():
    from sentence_transformers.base.losses.gradcache import CachedLossMixin

    return "ranges" in inspect.signature(CachedLossMixin.embed_minibatch_iter).parameters


def trainer_divides_by(tmp_path):
    """By the forwards of a step, which are fewer at the end of an epoch."""
    from transformers import Trainer, TrainingArguments

    seen = []

    class Ours(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(self.current_gradient_accumulation_steps)
            return model(inputs["x"]).sum()

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"x": torch.ones(1)} for _ in range(3)]
    Ours(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=rows).train()
    return seen == [2, 2, 1]


def trainer_measures_without_labels(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Ours(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return (model(inputs["x"]).sum() * 0 + 3, {})

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, label_names=[],
        prediction_loss_only=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Ours(model=torch.nn.Linear(1, 1), args=arguments)
    trainer.can_return_loss = True
    return trainer.evaluate([{"x": torch.ones(1)}])["eval_loss"] == 3


def other_shapes_are_a_size_mismatch():
    wide = torch.nn.Linear(2, 3).state_dict()
    return says(RuntimeError, "size mismatch", lambda: torch.nn.Linear(2, 2).load_state_dict(wide))


def pickled_weights_alone_name_safetensors(tmp_path: Path):
    from transformers import AutoModel

    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    load = lambda: AutoModel.from_pretrained(tmp_path, use_safetensors=True)  # noqa: E731
    return says(OSError, "safetensors", load)


def writer_gives_the_words_of_the_system(tmp_path: Path):
    import errno
    import os

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    save = lambda: save_file({"a": torch.zeros(1)}, tmp_path / "absent" / "a")  # noqa: E731
    return says(SafetensorError, os.strerror(errno.ENOENT), save)


def launch_asks_for_sharding():
    from accelerate.utils import launch

    return '["ACCELERATE_USE_FSDP"] = "true"' in inspect.getsource(launch)


def plugin_reads_its_variables(monkeypatch: pytest.MonkeyPatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    monkeypatch.setenv("FSDP_VERSION", "2")
    return FullyShardedDataParallelPlugin().fsdp_version == 2


def plugin_has(name: str) -> Callable[[], bool]:
    def has() -> bool:
        from accelerate.utils import FullyShardedDataParallelPlugin as Plugin

        return name in {field.name for field in dataclasses.fields(Plugin)}

    return has


def state_has_a_plugin():
    from accelerate.state import AcceleratorState

    return "fsdp_plugin" in inspect.signature(AcceleratorState.__init__).parameters


def integers_multiply_without_overflow():
    found = torch._int_mm(torch.full((32, 32), 100, dtype=torch.int8), torch.ones(32, 32).char())
    return found.dtype == torch.int32 and found.eq(3200).all()


def flash_attention_takes_offsets_and_dropout():
    from unmasked.forward.packing import dropout

    names = tuple(a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments)
    return names[: len(dropout.FLASH_ARGUMENTS)] == dropout.FLASH_ARGUMENTS


def a_compiled_module_can_be_put_back():
    module = torch.nn.Linear(2, 2)
    module.compile(backend="eager")
    compiled = module._compiled_call_impl is not None
    module._compiled_call_impl = None
    return compiled and module(torch.ones(1, 2)).shape == (1, 2)


def the_compiler_can_stop_after_its_division():
    from torch._dynamo import list_backends

    return "aot_eager_decomp_partition" in list_backends(exclude_tags=())


PROBES: dict[str, Callable[..., bool]] = {
    "_attn_implementation": attention_can_be_read,
    "q_offset": mask_takes_lengths_and_offsets,
    "kv_offset": mask_takes_lengths_and_offsets,
    "_inference": inference_is_the_loop_of_encode,
    "BaseTunerLayer": adapter_layers_are_tuner_layers,
    "unload_and_optionally_merge_module": wrappers_take_themselves_off,
    "_weight_conversions": loading_an_adapter_leaves_names,
    "pruned_heads": pruned_heads_are_kept_as_they_are,
    "lora_dropout": dropout_on_experts_is_refused_by_name,
    "size mismatch": other_shapes_are_a_size_mismatch,
    "safetensors": pickled_weights_alone_name_safetensors,
    "FULL": writer_gives_the_words_of_the_system,
    "ACCELERATE_USE_FSDP": launch_asks_for_sharding,
    "FSDP_": plugin_reads_its_variables,
    "fsdp_plugin": state_has_a_plugin,
    "auto_wrap_policy": plugin_has("auto_wrap_policy"),
    "transformer_cls_names_to_wrap": plugin_has("transformer_cls_names_to_wrap"),
    "cpu_ram_efficient_loading": plugin_has("cpu_ram_efficient_loading"),
    "state_dict_config": plugin_has("state_dict_config"),
    "optim_state_dict_config": plugin_has("optim_state_dict_config"),
    "fsdp_version": plugin_has("fsdp_version"),
    "activation_checkpointing": plugin_has("activation_checkpointing"),
    "ranges": ranges_are_given_by_name,
    "current_gradient_accumulation_steps": trainer_divides_by,
    "can_return_loss": trainer_measures_without_labels,
    "_int_mm": integers_multiply_without_overflow,
    "_flash_attention_forward": flash_attention_takes_offsets_and_dropout,
    "_compiled_call_impl": a_compiled_module_can_be_put_back,
    "_schema": flash_attention_takes_offsets_and_dropout,
    "aot_eager_decomp_partition": the_compiler_can_stop_after_its_division,
}
"""For each name of the table, a call that is true while the library has it as we use it."""


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_library_still_has_it(row, tmp_path, monkeypatch):
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    probe = PROBES[row.name]
    options = {name: given[name] for name in inspect.signature(probe).parameters}
    said = f"{row.library} no longer has {row.name} as {row.where} uses it. {row.breaks}"
    try:
        assert probe(**options), said
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        pytest.fail(f"{said} ({type(error).__name__}: {error})")


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_table_is_about_code_that_is_there(row):
    file = SOURCE / row.where
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    assert row.name in text, f"{row.where} no longer has {row.name}: take it out of the table"
    assert row.why.endswith(".") and row.breaks.endswith(".")


def test_every_name_has_a_probe_and_every_probe_a_name():
    assert set(PROBES) == {row.name for row in rows()}


# --- and we use nothing else ----------------------------------------------------------------------

DOCUMENTED = {"_asdict", "_fields", "_make", "_replace"}  # of named tuples, by Python's own manual
COLUMNS = {"_id"}  # of BEIR's files
BY_NAME = {"delattr", "getattr", "hasattr", "setattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Private names that the package itself defines: functions, classes, variables, attributes."""
    found = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= {node.attr} if own else set()
    return found


def imported(node: ast.AST) -> list[str]:
    """Every part of the names in an import of another package."""
    if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("unmasked"):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    return []


def asked_for(node: ast.AST) -> list[str]:
    """Attributes, and names given as keywords, as keys of options, or to `getattr` and the like."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Call):
        names = [keyword.arg or "" for keyword in node.keywords]
        if isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            names += [a.value for a in node.args if isinstance(a, ast.Constant)]
        return [name for name in names if isinstance(name, str)]
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return [key for key in keys if isinstance(key, str) and key.isidentifier()]
    return []


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[str, int]]:
    """(name, line) of each private name of a library in a file."""
    for node in ast.walk(tree):
        of_parent = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"
        names = asked_for(node)
        if not of_parent:
            names = [name for name in names if name not in own]
        for name in (*imported(node), *names):
            if is_private(name):
                yield name, node.lineno


def overrides(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """(name, line) of each private method with which a class replaces one of a library's."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        methods = {n.name: n.lineno for n in node.body if isinstance(n, ast.FunctionDef)}
        names = [name for name in methods if is_private(name)]
        if not names:
            continue
        parents = getattr(importlib.import_module(module), node.name).__mro__[1:]
        foreign = [p for p in parents if not p.__module__.startswith("unmasked")]
        for name in names:
            if any(name in vars(parent) for parent in foreign):
                yield name, methods[name]


def test_no_other_private_name_of_a_library_is_used():
    files = sorted(SOURCE.rglob("*.py"))
    trees = {
        file.relative_to(SOURCE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in files
    }
    allowed = {(row.where, row.name) for row in rows()}
    public = DOCUMENTED | COLUMNS
    own, faults = own_names(trees), []
    for file, tree in trees.items():
        module = ".".join(["unmasked", *file.removesuffix(".py").split("/")])
        module = module.removesuffix(".__init__")
        found = [*private_uses(tree, own)]
        if any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body):
            found += overrides(tree, module)
        for name, line in found:
            if name not in public and (file, name) not in allowed:
                faults.append(f"src/unmasked/{file}:{line}: {name}")
    assert not faults, f"private names that are not in docs/upstream.md: {'; '.join(faults)}"


def test_the_walk_finds_what_it_is_for():
    code = """
from library._inner import thing
import library._other
from library import _name
class Ours(library.Theirs):
    def method(self):
        self._own = thing._attribute
        return super()._parent(self._own, self._inherited, getattr(thing, "_by_name"))
library.call(_keyword=1, **{"_option": 2})
"""
    tree = ast.parse(code)
    found = {name for name, _ in private_uses(tree, own_names({"a.py": tree}))}
    expected = {"_inner", "_other", "_name", "_attribute", "_parent", "_inherited", "_by_name"}
    assert found == expected | {"_keyword", "_option"}
