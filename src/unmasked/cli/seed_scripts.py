"""The seed system's two commands, `train_mntp.py` and `train_simcse.py`, run as recipes.

`unmasked.compat.seed` reads their flags and knows where they put their files. The folder of the
results is also a run folder, so the same command continues it, and its ``model`` is the merged
encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unmasked.cli.failures import end
from unmasked.compat import seed


def main(stage: str) -> None:
    """Run ``mntp`` or ``simcse`` with the process's command line; errors are shown as by a verb."""
    try:
        run_script(stage)
    except (KeyboardInterrupt, Exception) as error:
        end(error, "train")


def run_script(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Train a stage as the flags say, and put the results where the seed system put them."""
    seed.read_environment(Path(".env"))
    flags, further = seed.parser(stage).parse_known_args(arguments)
    seed.prepare_environment(flags)
    name = f"{Path(flags.model_name).name.lower()}-{stage}"
    folder, logs = Path(flags.output_dir) / name, Path(flags.logging_dir) / name
    recipe = seed.to_recipe(stage, flags, seed.trainer_options(further), name)
    from unmasked.cli.run_display import run_recipe

    seed.link_logs(folder / stage, logs)
    run_recipe(recipe, folder)
    seed.publish(folder, stage, recipe.model.base, logs)
