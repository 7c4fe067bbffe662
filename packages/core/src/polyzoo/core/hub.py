"""Models in folders and on the hub: config.json, model.safetensors, README.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from polyzoo.core import config as configs
from polyzoo.core.errors import PolyzooError, WeightsError
from polyzoo.core.io import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
# Never a pickle: they are not even fetched.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", CARD_NAME)

T = TypeVar("T")


def resolve_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    files: Sequence[str] = (),
) -> Path:
    """Return a folder with a model's files: the one given, or the hub's copy of a repository.

    Args:
        name_or_path: A folder, or a repository such as "owner/name". A folder of that name wins.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never use the network.
        token: For private repositories.
        files: Names that must be there.

    Raises:
        WeightsError: There is no such folder or file, or the hub cannot give it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_file():
        raise WeightsError(f"{folder}: is a file; give the folder that holds it")
    if not folder.is_dir():
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or not re.fullmatch(r"[\w][\w.\-]*/[\w][\w.\-]*", text):
            raise WeightsError(f"{folder}: no such folder")
        folder = _from_hub(text, revision, local_files_only, token)
    for name in files:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: no such file")
    return folder


def save_pretrained(
    folder: str | Path,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    card: str | None = None,
    int8_rows: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write config.json, model.safetensors and a model card into a folder; each file atomically.

    Args:
        folder: Made where missing; other files in it stay.
        config: The dataclass that describes the architecture.
        tensors: The weights.
        card: Markdown for README.md; the file is left alone where not given.
        int8_rows: See `write_weights`.
        metadata: See `write_weights`.
    """
    from polyzoo.core.weights import FILE_NAME, write_weights

    folder = Path(folder)
    write_weights(folder / FILE_NAME, tensors, metadata=metadata, int8_rows=int8_rows)
    configs.save(config, folder / CONFIG_NAME)
    if card is not None:
        with atomic_write(folder / CARD_NAME, "w") as file:
            file.write(card)
    return folder


def load_pretrained(folder: str | Path, config_cls: type[T]) -> tuple[T, dict[str, Tensor]]:
    """Read what `save_pretrained` wrote.

    Raises:
        ConfigError: config.json does not fit the class.
        WeightsError: A file is missing or damaged.
    """
    from polyzoo.core.weights import read_weights

    folder = resolve_folder(Path(folder), files=(CONFIG_NAME,))
    return configs.load(config_cls, folder / CONFIG_NAME), read_weights(folder)


def push_to_hub(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool = True
) -> str:
    """Upload a model folder, without pickles, and return the commit's address.

    Args:
        folder: As `save_pretrained` wrote it.
        repo_id: "owner/name"; made where missing.
        token: Of an account that may write there; the saved login where not given.
        private: Whether a new repository is private.
    """
    from huggingface_hub import HfApi

    folder = resolve_folder(Path(folder), files=(CONFIG_NAME,))
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(PATTERNS)
        )
    except Exception as error:  # the client raises several libraries' errors
        raise PolyzooError(f"{repo_id}: could not be uploaded: {_first_line(error)}") from error
    return str(commit.commit_url)


def _from_hub(name: str, revision: str | None, local_files_only: bool, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    at = f" at {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=list(PATTERNS),
            )
        )
    except LocalEntryNotFoundError as error:
        why = "local_files_only is set" if local_files_only else "the hub cannot be reached"
        raise WeightsError(
            f"{name}{at}: no such folder, not in the hub's local cache, and {why}; give a local "
            "folder, or fetch it once with a network"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{name}{at}: no such folder, and the hub shows no such repository; if it is private "
            "or gated, pass token="
        ) from error
    except Exception as error:  # the client raises several libraries' errors
        raise WeightsError(
            f"{name}{at}: no such folder, and the hub says: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
