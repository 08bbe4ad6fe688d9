"""Uploads a saved model folder to the Hugging Face hub: private unless told otherwise.

Only what is part of a model is sent, never training checkpoints or anything else that lies beside
it. Cost: the upload.
"""

from __future__ import annotations

from pathlib import Path

from unmasked.errors import ModelError, OutputError, first_line

PARTS = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*",
    "1_Pooling/config.json",
)  # fmt: skip


def list_files(folder: Path) -> list[tuple[str, int]]:
    """Path and size in bytes of each file that is part of the model.

    Raises:
        ModelError: the folder does not hold a model.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        inner = folder / "model"
        hint = f"did you mean {inner}?" if (inner / "config.json").is_file() else "save one there."
        raise ModelError(f"{folder} does not hold a model (no config.json). Fix: {hint}")
    found = {file for part in PARTS for file in folder.glob(part) if file.is_file()}
    return [(str(file.relative_to(folder)), file.stat().st_size) for file in sorted(found)]


def push(folder: Path, repository: str, private: bool = True, message: str = "Add model") -> str:
    """Upload a model folder; the repository is made if it does not exist.

    Args:
        folder: as `TextEncoder.save` writes it.
        repository: ``NAME`` or ``ORGANISATION/NAME``.
        private: who may see a repository that is made now; an existing one stays as it is.
        message: of the commit.

    Returns:
        The address of what was uploaded.

    Raises:
        ModelError: the folder does not hold a model.
        OutputError: the name is not valid, nobody is logged in, or the hub refuses or is out of
            reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    names = [name for name, _ in list_files(folder)]
    check_name(repository)
    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=names, commit_message=message
        )
    except Exception as error:  # every layer below (http, auth, xet) has errors of its own
        answered = isinstance(error, HfHubHTTPError | LocalTokenNotFoundError)
        what = "the hub did not take it" if answered else "the hub cannot be reached"
        login = "log in with 'hf auth login' or set HF_TOKEN, with the right to write there"
        network = "connect to the network (and unset HF_HUB_OFFLINE), and run the same command"
        raise OutputError(
            f"{repository}: {what} ({first_line(error)[:200]}). "
            f"Fix: {login if answered else network}."
        ) from error
    return str(made)


def check_name(repository: str) -> None:
    """Refuse what cannot be the name of a repository, by the hub's own rule.

    Raises:
        OutputError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(
            f"'{repository}' is not a valid name of a repository. "
            "Fix: NAME or ORGANISATION/NAME, of letters, digits, '.', '_' and '-'."
        ) from error
