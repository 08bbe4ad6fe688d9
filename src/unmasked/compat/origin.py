"""Which decoder was a model made from?

A run may start from the result of another run: an adapter, or an encoder whose mask is already
open. Such a model is compared with the decoder that it was made from. Cost: a few small files of
each model on the way to the decoder; for a repository on the hub, a request for each file.
"""

from __future__ import annotations

from pathlib import Path

from unmasked.checkpoint import adapters
from unmasked.checkpoint.location import BUNDLED, Location, locate
from unmasked.checkpoint.snapshot import made_from
from unmasked.errors import ModelError, UnmaskedError
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import Recipe

RESULTS = {"merged", "model", "mntp", "simcse", "supervised"}
"""Folders in a run folder that contain a model or an adapter."""


def find_base(model: str | Path, revision: str | None = None) -> Location:
    """The decoder that a model was made from, as far back as can be found.

    An adapter names its base. The base of a model in a run folder is the one in the run's recipe.
    Another folder that this package saved has its base in its model card. A model without any of
    these is its own decoder. The decoder is not read, so it may no longer exist.
    """
    place, passed = _place(model, revision), set[str]()
    while place.name not in passed:  # models may name each other in a circle
        passed.add(place.name)
        place = _made_from(place) or place
    return place


def training_data(model: str | Path, revision: str | None = None) -> list[str]:
    """The data that this package trained a model on, from its card; empty if it names none."""
    return made_from(_place(model, revision))[1]


def _made_from(place: Location) -> Location | None:
    """The model that a model says it was made from; None if it names none."""
    try:
        is_adapter = adapters.is_adapter(place.require())
    except ModelError:
        return None  # out of reach: requesting each of its files would take half a minute
    if is_adapter:
        config = adapters.read_adapter_config(place)
        base = config.base_model_name_or_path
        return _place(base, config.revision) if base else None
    if (recipe := _recipe_of(Path(place.name))) is not None:
        return _place(recipe.model.base, recipe.model.revision)
    base, _ = made_from(place)
    # Without a slash, it is the name of a folder, without its place.
    return locate(base) if base and (base == BUNDLED or "/" in base) else None


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that produced a folder; None if it is not in a run folder."""
    file = folder.parent / "recipe.yaml"
    if folder.name not in RESULTS or not folder.is_dir() or not file.is_file():
        return None
    try:
        return load_recipe(file)
    except UnmaskedError:
        return None  # the recipe of another version, or the file of another program


def _place(name: str | Path, revision: str | None) -> Location:
    return locate(name, **({"revision": revision} if revision else {}))
