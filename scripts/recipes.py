"""The page of the recipes that come with the package: makes `docs/recipes.md`.

    python scripts/recipes.py

Bases, licences and published figures are read from the recipes; what they cost is what `unmasked
plan` counts. No hub is asked: the sizes of the bases are in `decoder_sizes.yaml`, from which a
`config.json` is written for the plan to find. Cost: about two processor seconds for each recipe.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import unmasked
from unmasked.cli.terminal import short
from unmasked.files.writing import write_text
from unmasked.recipe.files import load_recipe, shipped_recipes
from unmasked.recipe.schema import Recipe
from unmasked.train.plan.cost import Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "scripts" / "decoder_sizes.yaml").read_text(encoding="utf-8")
)
NOTES = {"published", "fitted"}
"""Keys of the sizes that are for the reader."""
GPU = "mntp.micro_batch_tokens=16384"
"""What MNTP takes by default on a GPU, whatever this machine has."""

HEAD = """# Recipes

Written by `python scripts/recipes.py`. `unmasked recipes show NAME` prints a recipe, `unmasked
recipes copy NAME` copies it to a file of your own, and any setting can be changed on the command
line:

```bash
unmasked run qwen3-0.6b mntp.data=texts.txt simcse.data=texts.txt
```

The licence is that of the base model, as stated on its page. Read it before you use or publish what
you have trained. For models that are not in the LLM2Vec paper (arXiv 2404.05961) the settings are
the paper's for Llama 3: a starting point, not tuned for the model.

For Korean, check the tokenizer first: `unmasked doctor MODEL` shows tokens per character of Korean
and of English prose, and marks a tokenizer that splits letters into bytes. To evaluate on Korean,
set `evaluate.tasks='MTEB(kor, v2)'` in a recipe, or run
`unmasked evaluate MODEL --tasks 'MTEB(kor, v2)'`; `'MTEB(kor, v2):KLUE-STS+Ko-StrategyQA'` selects
two of its tasks.

"""
COSTS = """## What they cost

These are estimates of `unmasked plan RECIPE` for one GPU: the parameters of the transformer without
its output head and, for each stage, the memory and the floating-point operations. Texts are assumed
to have half of the maximum length. `unmasked plan RECIPE --probe` also measures the time on your
machine.

"""
PUBLISHED = """## Published figures

`unmasked reproduce RECIPE` trains a recipe on the paper's texts, scores every stage on the first of
its benchmarks, which is the cheapest, and prints the score beside the published one. `--all` scores
the other benchmarks as well; nothing is trained or scored twice. Public benchmarks report no scores
of single items, so there are no intervals. To reproduce the supervised figures of a model, use the
recipe `e5-public` with that model as its base (for Mistral with the masking given in that file).

"""


def config_folder(base: str, folder: Path) -> Path:
    """A folder with the config of a base, and the bundled tokenizer for what needs any."""
    sizes = {key: value for key, value in SIZES[base].items() if key not in NOTES}
    if kind := sizes.get("layer_types"):
        sizes["layer_types"] = [kind] * sizes["num_hidden_layers"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    nano = Path(unmasked.__file__).parent / "nano"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano / name, folder / name)
    return folder


def plan_without_weights(name: str, folder: Path) -> Plan:
    """The plan of a shipped recipe, as a GPU would run it."""
    base = load_recipe(name).model.base
    return make_plan(load_recipe(name, [f"model.base={config_folder(base, folder)}", GPU]))


def tables(recipes: dict[str, Recipe], plans: dict[str, Plan]) -> Iterator[str]:
    yield from ("| recipe | base | licence |", "|---|---|---|")
    for name, recipe in recipes.items():
        yield f"| `{name}` | {recipe.model.base} | {recipe.model.licence or 'with this package'} |"
    yield f"\n{COSTS}| recipe | parameters | stage | steps | memory | FLOPs |"
    yield "|---|---|---|---|---|---|"
    for name, plan in plans.items():
        fitted = " *" if SIZES[recipes[name].model.base].get("fitted") else ""
        for number, stage in enumerate(plan.stages):
            first = (f"`{name}`", f"{short(plan.parameters)}{fitted}") if not number else ("", "")
            cost = f"{short(stage.memory.total, 'B')} | {stage.flops:.1e}"
            yield f"| {first[0]} | {first[1]} | {stage.name} | {stage.steps:,} | {cost} |"
    yield "\n\\* Sizes assumed after the family's, to match the published number of parameters."
    yield f"\n{PUBLISHED}| recipe | base | benchmark | trained | published | where |"
    yield "|---|---|---|---|---|---|"
    for name, recipe in recipes.items():
        for anchor in recipe.anchors:
            for trained, score in anchor.scores.items():
                row = (f"`{name}`", anchor.base, anchor.benchmark, trained.replace("_", " "))
                yield f"| {' | '.join(row)} | {score:.2f} | {anchor.source} |"


def main() -> None:
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    with tempfile.TemporaryDirectory() as folder:
        plans = {
            name: plan_without_weights(name, Path(folder) / name)
            for name, recipe in recipes.items()
            if recipe.model.base in SIZES
        }
    write_text(ROOT / "docs" / "recipes.md", HEAD + "\n".join(tables(recipes, plans)) + "\n")


if __name__ == "__main__":
    main()
