"""Checkpoint folders that may be ids on the hub: what is needed of them is fetched into huggingface's cache."""

from __future__ import annotations

import re
from pathlib import Path

from salience.core.errors import ParameterError, first_line

# weights in safetensors, and what stands beside them; not the same weights in other formats
_WANTED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "adapter_model.safetensors",
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(source: str | Path, name: str) -> Path:
    """A folder of this machine: the one that is named, or a snapshot of `owner/name` on the hub.

    Args:
        source (str | Path): a folder, or an id on the hub. A folder of that name wins.
        name (str): the parameter as the user wrote it, for errors.

    Raises:
        ParameterError: if it is neither; if the hub does not have it, does not show it to this user, or cannot be
            reached and the cache does not have it either.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not _ID.fullmatch(str(source)) or path.exists():
        raise ParameterError(
            f"{name} must be an existing local folder or an owner/name on the hub, got {source}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = f"{name} must be an existing local folder or an owner/name on the hub, got {source}"
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_WANTED)))
    except GatedRepoError as error:
        raise ParameterError(f"{wanted}, which wants an agreement: visit its page and log in") from error
    except RepositoryNotFoundError as error:
        raise ParameterError(f"{wanted}, which is neither (or private: hf auth login)") from error
    except LocalEntryNotFoundError as error:
        raise ParameterError(
            f"{wanted}: no such folder, and the hub cannot be reached (nor is it in the cache)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ParameterError(f"{wanted}: the hub failed ({first_line(error)})") from error
