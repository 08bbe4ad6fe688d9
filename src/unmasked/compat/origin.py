"""Which decoder was a model made from?

A stage may begin with what another run has left: an adapter, or an encoder whose mask is open
already. What such a model has to beat is the decoder behind it. Cost: a few small files of each
model on the way; for a repository on the hub, a request for each.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load

from unmasked.checkpoint import adapters
from unmasked.checkpoint.card import TRAINED_ON
from unmasked.checkpoint.folder import SETTINGS_NAME
from unmasked.checkpoint.location import Location, locate
from unmasked.errors import ModelError, UnmaskedError
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import Recipe

RESULTS = {"merged", "model", "mntp", "simcse", "supervised"}
"""Folders of a run folder that hold a model or an adapter."""


def find_base(model: str | Path, revision: str | None = None) -> Location:
    """The decoder that a model was made from, as far back as can be told.

    That is what an adapter names; for a folder of a run, what the run's recipe names; for another
    folder that this package saved, the base model of its card, if that is on the hub; else the
    model itself.

    Args:
        model: hub name, folder, or ``nano``.
        revision: of `model` on the hub.

    Returns:
        Where the decoder is; nothing of it was read, so it may be out of reach by now.
    """
    place, passed = _place(model, revision), set[str]()
    while place.name not in passed:
        passed.add(place.name)
        place = _step(place) or place
    return place


def training_data(model: str | Path, revision: str | None = None) -> list[str]:
    """The data that a model was trained on by this package, as its card names it; perhaps none."""
    place = _place(model, revision)
    card = place.fetch("README.md") if place.read_json(SETTINGS_NAME) else None
    named = (metadata_load(card) or {}).get(TRAINED_ON) if card else None
    return [str(name) for name in named] if isinstance(named, list) else []


def _step(place: Location) -> Location | None:
    """What a model names as the one it was made from; None if it names none."""
    try:
        place.require()
    except ModelError:
        return None  # out of reach; each of its files would be asked for in vain, for half a minute
    if adapters.is_adapter(place):
        config = adapters.read_adapter_config(place)
        base = config.base_model_name_or_path
        return _place(base, config.revision) if base else None
    if (recipe := _recipe_of(Path(place.name))) is not None:
        return _place(recipe.model.base, recipe.model.revision)
    card = place.fetch("README.md") if place.read_json(SETTINGS_NAME) else None
    base = (metadata_load(card) or {}).get("base_model") if card else None
    return locate(base) if isinstance(base, str) else None


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that a folder is a result of."""
    file = folder.parent / "recipe.yaml"
    if folder.name not in RESULTS or not folder.is_dir() or not file.is_file():
        return None
    try:
        return load_recipe(file)
    except UnmaskedError:
        return None  # of another version, or not of a run at all


def _place(name: str | Path, revision: str | None) -> Location:
    return locate(name, **({"revision": revision} if revision else {}))
