from __future__ import annotations

from pathlib import Path

import pytest

from unmasked.errors import RecipeError
from unmasked.recipe.files import load_recipe, recipe_differences, recipe_text, shipped_recipes
from unmasked.recipe.lora import Lora
from unmasked.recipe.schema import MNTP, Evaluate, Model, Pairs, Recipe, SimCSE, Supervised
from unmasked.recipe.settings import explained, settings

SMALL = "name: small\nmodel:\n  base: nano\nmntp:\n  steps: 100\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def error_of(*args) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_keeps_its_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.simcse or recipe.supervised
    assert recipe.mntp or recipe.supervised.teacher


def test_defaults_are_the_papers_numbers():
    stages = {"mntp": {}, "simcse": {}, "supervised": {}}
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "x"}, **stages})
    mntp = {"steps": 1000, "batch_size": 32, "block_length": 512, "learning_rate": 5e-5}
    simcse = {"steps": 1000, "batch_size": 128, "max_length": 128, "learning_rate": 3e-5}
    supervised = {"steps": 1000, "batch_size": 512, "max_length": 512, "learning_rate": 2e-4}
    supervised |= {"temperature": 0.02, "hard_negatives": 1}
    lora = {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": None, "method": "lora"}
    for stage, expected in zip(recipe.stages(), (mntp, simcse, supervised), strict=True):
        warmup = 300 if stage[0] == "supervised" else 0
        expected |= {"warmup_steps": warmup, "weight_decay": 0, "max_grad_norm": 1}
        assert expected.items() <= stage[1].model_dump().items()
        assert lora.items() <= stage[1].lora.model_dump().items()
    assert (recipe.mntp.mask_style, recipe.mntp.mask_probability) == ("bert", 0.2)
    assert (recipe.simcse.temperature, recipe.simcse.attention_dropout) == (0.05, 0.3)
    mistral = load_recipe("mistral-7b").mntp
    assert (mistral.mask_style, mistral.mask_probability) == ("all", 0.8)
    assert load_recipe("sheared-llama-1.3b").simcse.batch_size == 32


def test_b34_the_e5_mix_has_its_data_sets_and_instructions():
    recipe = load_recipe("e5-public")
    data = {pairs.path.removeprefix("echo-data/"): pairs for pairs in recipe.supervised.data}
    assert len(data) == 14
    assert [name for name, pairs in data.items() if pairs.symmetric] == [
        "allnli.jsonl",
        "quora_duplicates.jsonl",
    ]
    assert all(len(pairs.instruction) == 1 + pairs.symmetric for pairs in data.values())
    texts = [text for pairs in data.values() for text in pairs.instruction]
    assert len(set(texts)) == 12
    assert not any(text.endswith((".", ":", " ")) for text in texts)


def test_a_fault_in_one_of_many_data_sets_is_named_with_its_line(recipe_file):
    text = SMALL + "supervised:\n  data:\n    - a.jsonl\n    - path: b.jsonl\n      wieght: 2\n"
    message = error_of(recipe_file(text))
    line = text[: text.index("wieght")].count("\n") + 1
    assert message.startswith("supervised.data.1.wieght: unknown key, did you mean 'weight'?")
    assert f"line {line}" in message


def test_an_adapter_that_goes_on_needs_one_to_go_on_from(recipe_file):
    message = error_of("nano", ["mntp.lora.start=continue"])
    assert "mntp.lora.start continue: the adapter of the stage before does not exist" in message
    load_recipe("nano", ["simcse.lora.start=continue"])
    other = ["simcse.lora.start=continue", "simcse.lora.rank=4"]
    assert "has other settings" in error_of("nano", other)


@pytest.mark.parametrize("given", ["rank=8", "alpha=1", "dropout=0", "targets=q", "start=continue"])
def test_training_of_all_weights_refuses_settings_of_an_adapter(given):
    whole = ["simcse.lora={method: full}", "supervised.lora={method: full}"]
    assert load_recipe("nano-supervised", whole).supervised.lora == Lora(method="full")
    said = error_of("nano-supervised", [*whole, f"supervised.lora.{given}"])
    shown = given.replace("=", " ").replace(" 0", " 0.0").replace(" q", " ['q']")
    assert f"no adapter, so that nothing reads {shown}. Fix: lora: {{method: full}}" in said


def test_unknown_key_names_the_nearest_and_the_line(recipe_file):
    message = error_of(recipe_file(SMALL + "  learning_rte: 1e-4\n"))
    assert message.splitlines() == [
        "mntp.learning_rte: unknown key, did you mean 'learning_rate'? (recipe.yaml line 6)",
        "Fix: see what is allowed: unmasked recipes explain mntp",
    ]


def test_a_key_like_no_other_lists_the_allowed_ones(recipe_file):
    message = error_of(recipe_file(SMALL + "evaluate:\n  zzz: 1\n"))
    assert message.splitlines() == [
        "evaluate.zzz: unknown key. Allowed: tasks, bootstrap. (recipe.yaml line 7)",
        "Fix: see what is allowed: unmasked recipes explain evaluate",
    ]


def test_every_problem_is_reported_at_once(recipe_file):
    text = SMALL + "  lora: {rnk: 2}\n  schedule: linar\nsimcse: 5\n"
    assert error_of(recipe_file(text)).splitlines() == [
        "mntp.schedule: 'linar' should be 'linear', 'cosine' or 'constant', "
        "did you mean 'linear'? (recipe.yaml line 7)",
        "mntp.lora.rnk: unknown key, did you mean 'rank'? (recipe.yaml line 6)",
        "simcse: 5 should be a section with keys: "
        + ", ".join(type(load_recipe("nano").simcse).model_fields)
        + " (recipe.yaml line 8)",
        "Fix: see what is allowed: unmasked recipes explain mntp.schedule; "
        "unmasked recipes explain mntp.lora; unmasked recipes explain simcse",
    ]


@pytest.mark.parametrize(
    ("override", "command"),
    [
        ("mntp.stepz=5", "unmasked recipes explain mntp"),
        ("mntp.steps=0", "unmasked recipes explain mntp.steps"),
        ("supervise.steps=5", "unmasked recipes explain"),
        ("supervised.data=[{path: a, wieght: 2}]", "unmasked recipes explain supervised.data"),
        (
            "supervised.data=[{path: a, weight: 0}]",
            "unmasked recipes explain supervised.data.weight",
        ),
    ],
)
def test_the_command_in_a_fix_explains_a_setting_that_there_is(override, command):
    message = error_of("nano", [override])
    assert message.splitlines()[-1] == f"Fix: see what is allowed: {command}"
    settings(command.removeprefix("unmasked recipes explain").strip())
    own = "supervised={data: a.jsonl, teacher: {loss: cosent}}"  # names its fix itself
    assert "Fix: see" not in error_of("nano", [own])
    assert error_of("nano", [own, override]).endswith(f"allowed: {command}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mntp.stepz=5", "mntp.stepz: unknown key, did you mean 'steps'?"),
        ("supervise.steps=5", "supervise: unknown key, did you mean 'supervised'?"),
        ("mntp.steps=0", "mntp.steps: 0 should be greater than or equal to 1"),
        ("mntp.steps=1.5", "mntp.steps: 1.5 should be a valid integer"),
        ("mntp.steps=true", "mntp.steps: True should be a number"),
        ("mntp.steps=many", "mntp.steps: 'many' should be a number"),
        ("mntp.steps=", "mntp.steps: None should be a valid integer"),
        ("mntp.mask_probability=0", "mntp.mask_probability: 0 should be greater than 0"),
        ("mntp.mask_probability=1.2", "mntp.mask_probability: 1.2 should be less than or equal"),
        ("mntp.learning_rate=.nan", "mntp.learning_rate: nan should be a finite number"),
        ("mntp.block_length=1", "mntp.block_length: 1 should be greater than or equal to 2"),
        ("mntp.lora.dropout=1", "mntp.lora.dropout: 1 should be less than 1"),
        ("simcse.attention_dropout=-1", "simcse.attention_dropout: -1 should be greater than or"),
        ("model.pooling=cls", "model.pooling: 'cls' should be 'mean'"),
        ("model.revision=12", "model.revision: 12 should be a valid string: put it in quotes"),
        ("seed=4294967296", "seed: 4294967296 should be less than 4294967296"),
        ("name=a/b", "name: 'a/b' should match pattern"),
        ("model=null", "model: None should be a section with keys: base"),
    ],
)
def test_a_bad_override_is_named(override, message):
    found = error_of("nano", [override])
    assert found.startswith(message)
    assert found.splitlines()[0].endswith(f"(override '{override}')")


def test_an_argument_of_the_trainer_may_be_written_as_in_science():
    """YAML reads 1e-8 as text, because it has no point."""
    override = "mntp.trainer={adam_epsilon: 1e-8, run_name: '2024', max_steps: 3}"
    given = {"adam_epsilon": 1e-8, "run_name": "2024", "max_steps": 3}
    assert load_recipe("nano", [override]).mntp.trainer == given


def test_a_list_of_files_may_be_longer_than_the_name_of_a_file():
    files = [f"texts-{number}.txt" for number in range(60)]
    assert load_recipe("nano", [f"mntp.data={','.join(files)}"]).mntp.data == files


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mntp.steps", "override 'mntp.steps' should look like mntp.steps=500"),
        ("mntp..steps=1", "override 'mntp..steps=1' should look like"),
        ("name.first=1", "name has no keys (override 'name.first=1')"),
        ("seed=!!timestamp x", "override 'seed=!!timestamp x': the value is not YAML"),
        ("mntp.data=[a", "override 'mntp.data=[a': the value is not YAML"),
    ],
)
def test_an_override_that_is_none_is_refused(override, message):
    assert error_of("nano", [override]).startswith(message)


def test_overrides_are_typed_and_can_add_or_drop_a_stage(recipe_file):
    recipe = load_recipe(
        recipe_file(SMALL),
        [
            "mntp.learning_rate=2e-4",
            "mntp.steps=1e3",
            "mntp.data=[a.txt, b.jsonl]",
            "mntp.lora.targets=q_proj",
            "simcse.data=c=d.txt",
            "model.allow_partial=true",
        ],
    )
    assert recipe.mntp.learning_rate == 2e-4
    assert recipe.mntp.steps == 1000
    assert recipe.mntp.data == ["a.txt", "b.jsonl"]
    assert recipe.mntp.lora.targets == ["q_proj"]
    assert recipe.simcse.data == ["c=d.txt"]
    assert recipe.model.allow_partial is True
    assert load_recipe("nano", ["simcse=null"]).simcse is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mntp.data=a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ("mntp.data=a.jsonl, b c.jsonl,", ["a.jsonl", "b c.jsonl"]),
        ("mntp.data=[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("mntp.data=a=1.txt,b=2.txt", ["a=1.txt", "b=2.txt"]),
        ("mntp.data=one, with a comma.txt", ["one, with a comma.txt"]),
        ("mntp.data=hf:a/b", ["hf:a/b"]),
        ("mntp.lora.targets=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("evaluate.tasks=a.tsv,words:b.tsv", ["a.tsv", "words:b.tsv"]),
        ("trackers=wandb,trackio", ["wandb", "trackio"]),
        ("model.adapters=a,b", ["a", "b"]),
        ("supervised.matryoshka=64,128", [64, 128]),
    ],
)
def test_a_list_needs_no_brackets(override, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one, with a comma.txt").touch()
    found = load_recipe("nano", [override])
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == expected


def test_data_sets_need_no_brackets_either():
    found = load_recipe("nano", ["supervised.data=a.jsonl,b.jsonl"]).supervised.data
    assert [pairs.path for pairs in found] == ["a.jsonl", "b.jsonl"]


def test_a_text_with_a_comma_stays_a_text():
    assert load_recipe("nano", ["model.base=a,b"]).model.base == "a,b"


def test_settings_say_what_is_allowed():
    told = {one.name: (one.default, one.allowed) for one in settings()}
    assert told["mntp.steps"] == ("1000", "a whole number at least 1")
    assert told["model.max_length"] == ("512", "a whole number at least 2")
    assert told["mntp.lora.dropout"] == ("0.05", "a number at least 0 and less than 1")
    assert told["mntp.lora.targets"] == ("null", "a list or null")
    assert told["mntp.max_texts"] == ("null", "a whole number at least 1 or null")
    assert told["model.base"] == ("", "a text that is not empty")
    assert told["supervised.data.weight"] == ("1.0", "a number more than 0")
    assert told["mntp.trainer"] == ("{}", "names and values")
    assert all(one.about for one in settings())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_the_same_with_its_explanations(name, tmp_path):
    path = shipped_recipes()[name]
    text = explained(path.read_text(encoding="utf-8"))
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)
    assert "# Name on the Hugging Face hub, folder, or nano for the bundled decoder." in text
    added = set(text.splitlines()) - set(path.read_text(encoding="utf-8").splitlines())
    assert max(map(len, added)) <= 96


def test_an_override_reaches_only_its_own_section(recipe_file):
    text = SMALL + "  lora: &adapter {rank: 4}\nsimcse:\n  lora: *adapter\n"
    recipe = load_recipe(recipe_file(text), ["mntp.lora.rank=8"])
    assert (recipe.mntp.lora.rank, recipe.simcse.lora.rank) == (8, 4)


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(recipe_file):
    recipe = load_recipe(recipe_file(SMALL + "  learning_rate: 2e-4\n  max_texts: 1e3\n"))
    assert recipe.mntp.learning_rate == 2e-4
    assert recipe.mntp.max_texts == 1000


def test_b31_a_schedule_that_ends_early_is_refused():
    message = error_of("nano", ["mntp.steps=500", "mntp.schedule_steps=400"])
    assert message.startswith("mntp: schedule_steps 400 should be null or at least the 500 steps")
    constant = ["mntp.steps=500", "mntp.schedule_steps=400", "mntp.schedule=constant"]
    assert load_recipe("nano", constant).mntp.schedule_steps == 400
    assert "warmup_steps 300 should be less" in error_of("nano", ["mntp.warmup_steps=300"])


@pytest.mark.parametrize(
    ("overrides", "stage", "warmup"),
    [
        (["mntp.steps=20"], "mntp", 2),
        (["mntp.steps=5"], "mntp", 0),
        (["mntp.steps=21"], "mntp", 20),
        (["mntp.schedule_steps=20", "mntp.steps=10"], "mntp", 2),
        (["simcse.steps=1"], "simcse", 0),
        (["supervised.data=a.jsonl", "supervised.steps=100"], "supervised", 10),
        (["supervised={data: a.jsonl, steps: 300}"], "supervised", 30),
    ],
)
def test_fewer_steps_shorten_the_warm_up_and_say_so(caplog, overrides, stage, warmup):
    found = dict(load_recipe("nano", overrides).stages())[stage]
    assert found.warmup_steps == warmup
    said = [record.getMessage() for record in caplog.records]
    steps = found.schedule_steps or found.steps
    told = f"{stage}.warmup_steps: {warmup} instead of"
    assert [told in line and f"the {steps} steps" in line for line in said] == [True] * (
        warmup != 20
    )


def test_a_warm_up_that_was_asked_for_is_not_shortened(recipe_file):
    assert "should be less" in error_of("nano", ["mntp.steps=20", "mntp.warmup_steps=20"])
    text = SMALL.replace("100", "20") + "  warmup_steps: 20\n"
    assert "should be less" in error_of(recipe_file(text))
    assert "should be less" in error_of("nano", ["mntp={steps: 20, warmup_steps: 20}"])
    assert load_recipe(recipe_file(text), ["mntp.steps=10"]).mntp.warmup_steps == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml is empty"),
        ("- a\n", "recipe.yaml holds a list, not keys"),
        ("name: [\n", "recipe.yaml line 2 is not YAML"),
        ("seed: !!timestamp x\n", "recipe.yaml is not YAML"),
        ("day: 2024-13-45\n", "recipe.yaml is not YAML: month must be in 1..12"),
        ("[" * 2000, "recipe.yaml is not YAML"),
        (b"name: \xff\n", "recipe.yaml is not UTF-8 text (byte 6). Fix: save it as UTF-8."),
        (SMALL + "  steps: 5\n", "mntp.steps: given twice (recipe.yaml lines 5 and 6)"),
        ("name: x\nmodel: {}\n", "model.base: missing (recipe.yaml line 2)"),
        ("name: x\n", "model: missing (recipe.yaml)"),
    ],
)
def test_a_broken_file_says_what_is_wrong(recipe_file, text, message):
    assert message in error_of(recipe_file(text))


def test_a_missing_file_names_the_nearest_shipped_recipe(tmp_path):
    assert "no recipe 'mistral', did you mean 'mistral-7b'?" in error_of("mistral")
    message = error_of(tmp_path / "zzz.yaml")
    assert "no such file" in message
    assert "Shipped recipes: distil, e5-public, exaone-4.0-1.2b" in message
    assert "Is a directory" in error_of(tmp_path)


def test_byte_order_mark_is_ignored(recipe_file):
    assert load_recipe(recipe_file(b"\xef\xbb\xbf" + SMALL.encode())).name == "small"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_written_and_read_is_equal(name, tmp_path):
    recipe = load_recipe(name, ["mntp.data=자료.txt", "simcse.learning_rate=3.7e-07"])
    (tmp_path / "resolved.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert "자료.txt" in (tmp_path / "resolved.yaml").read_text(encoding="utf-8")


def test_differences_name_every_changed_setting_and_nothing_else():
    old = load_recipe("nano", ["mntp.steps=100"])
    changes = ["mntp.steps=200", "mntp.lora.rank=4", "mntp.data=a.txt", "simcse=null"]
    assert recipe_differences(old, load_recipe("nano", changes)) == [
        "mntp.steps: 100 -> 200",
        "mntp.lora.rank: 16 -> 4",
        "mntp.data: [] -> ['a.txt']",
        "simcse: set -> None",
    ]
    assert recipe_differences(old, old) == []
    old, new = (load_recipe("nano-supervised", [f"supervised.data={name}"]) for name in "ab")
    assert recipe_differences(old, new) == ["supervised.data.0.path: a -> b"]


@pytest.mark.parametrize(
    "section", [Recipe, Model, MNTP, SimCSE, Supervised, Pairs, Lora, Evaluate]
)
def test_every_setting_is_described(section):
    """Also where a stage only changes a default: the schema is the reference of recipes."""
    own = section.model_json_schema()["properties"]
    assert [
        name for name, field in own.items() if not field.get("description", "").endswith(".")
    ] == []


def test_a_comma_inside_the_name_of_a_benchmark_parts_nothing():
    recipe = load_recipe("nano", ["evaluate.tasks=MTEB(kor, v2),a.tsv"])
    assert recipe.evaluate.tasks == ["MTEB(kor, v2)", "a.tsv"]
    assert load_recipe("nano", ["evaluate.tasks=MTEB(kor, v2)"]).evaluate.tasks == ["MTEB(kor, v2)"]


ANCHOR = """
anchors:
  - benchmark: some
    base: b
    tasks: a.tsv
    source: here
    scores: {mntp+simcse: 1}
"""


def test_anchors_are_checked_and_are_no_settings_of_a_run(recipe_file):
    recipe = load_recipe(recipe_file(SMALL + ANCHOR))
    (anchor,) = recipe.anchors
    assert (anchor.tasks, anchor.folder) == (["a.tsv"], "benchmarks/some")
    assert recipe_differences(recipe, load_recipe(recipe_file(SMALL))) == []
    wrong = ANCHOR.replace("mntp+simcse: 1", "simcse+mntp: 1")
    assert "anchors.0.scores: 'simcse+mntp' should be one of causal_mean" in error_of(
        recipe_file(SMALL + wrong)
    )
    assert "less than or equal to 100" in error_of(
        recipe_file(SMALL + ANCHOR.replace(": 1}", ": 101}"))
    )
    assert "anchors.0.sourse: unknown key, did you mean 'source'?" in error_of(
        recipe_file(SMALL + ANCHOR.replace("source", "sourse"))
    )
    twice = ANCHOR + ANCHOR.replace("\nanchors:\n", "")
    assert "two of one base have the same benchmark" in error_of(
        recipe_file(SMALL + twice), ["model.base=b"]
    )
