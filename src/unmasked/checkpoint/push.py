"""Uploads a saved model folder to the Hugging Face hub: private unless told otherwise.

Only files that are part of a model are uploaded, never training checkpoints or anything else in the
folder. The same commit removes what loaders would read of an earlier model in the repository, such
as its `adapter_config.json`; it stays in the history of the repository. Cost: the upload.
"""

from __future__ import annotations

from pathlib import Path

from unmasked.checkpoint.leftovers import READ_BY_LOADERS
from unmasked.checkpoint.location import Location, locate
from unmasked.errors import ModelError, OutputError, first_line

PARTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", "adapter_model.safetensors", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "*.tiktoken",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "config_sentence_transformers.json", "sentence_bert_config.json", "llm2vec_config.json",
    "onnx/*", "openvino/*", "*.gguf", "unmasked_export.json", "README.md", "LICENSE*",
)  # fmt: skip
"""The files of a model, apart from the folders of the modules in `modules.json`."""
OF_A_MODULE = (*PARTS, "sentence_*_config.json")
"""The files in the folder of a module."""
WEIGHTS = (".safetensors", ".onnx", ".xml", ".gguf")
"""How the names of files of weights end; a graph of OpenVINO is an .xml file and its .bin file."""
MODULES = "modules.json"


def list_files(folder: Path) -> list[tuple[str, int]]:
    """Path and size in bytes of each file that is part of the model.

    Raises:
        ModelError: the folder does not hold a model or its weights, or its `modules.json` is
            broken.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if not folder.exists():
            hint = locate(folder).hint()
            raise ModelError(f"{folder}: no such folder{hint} Fix: check the name.")
        inner = folder / "model"
        hint = f"did you mean {inner}?" if (inner / "config.json").is_file() else "save one there."
        raise ModelError(f"{folder} does not hold a model (no config.json). Fix: {hint}")
    folder = folder.resolve()
    found = {file for part in PARTS for file in folder.glob(part)}
    modules = folder / MODULES
    if modules.is_file():
        found.add(modules)
        for module in Location(str(folder)).read_list(MODULES):
            inside = (folder / str(module.get("path", ""))).resolve()
            if inside.parent == folder:
                found |= {file for part in OF_A_MODULE for file in inside.glob(part)}
    found = {file for file in found if file.is_file()}
    if not any(file.name.endswith(WEIGHTS) for file in found):
        raise ModelError(
            f"{folder} has no file of weights that can be pushed. Allowed: model*.safetensors, "
            "adapter_model.safetensors, onnx/*, openvino/*, *.gguf. Fix: save the model again, "
            "with model.save(DIR) or unmasked export."
        )
    return [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in sorted(found)]


def push(folder: Path, repository: str, private: bool = True, message: str = "Add model") -> str:
    """Upload a model folder; the repository is created if it does not exist.

    Files of an earlier model that a loader would read besides the new ones are removed from it.

    Args:
        folder: as `TextEncoder.save` writes it.
        repository: ``NAME`` or ``ORGANISATION/NAME``.
        private: whether a new repository is private; an existing one stays as it is.
        message: the message of the commit.

    Returns:
        The address of the repository.

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
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=list(READ_BY_LOADERS),  # but not what is uploaded
            commit_message=message,
        )
    except Exception as error:  # every layer below (http, auth, xet) has errors of its own
        answered = isinstance(error, HfHubHTTPError | LocalTokenNotFoundError)
        what = "the hub refused the upload" if answered else "the hub cannot be reached"
        login = "log in with 'hf auth login' or set HF_TOKEN, with the right to write there"
        network = "connect to the network (and unset HF_HUB_OFFLINE), and run the same command"
        raise OutputError(
            f"{repository}: {what} ({first_line(error)[:200]}). "
            f"Fix: {login if answered else network}."
        ) from error
    return str(made)


def check_name(repository: str) -> None:
    """Refuse an invalid name of a repository, by the hub's own rule.

    Raises:
        OutputError: the name is not valid.
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
