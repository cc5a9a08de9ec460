"""Checkpoints as people name them: a directory, or the id of a repository of the Hugging Face Hub.

What is downloaded lies in the hub's own cache, where other programs find it too, and is read from there without a
network. Nothing but weights as safetensors, JSON and the files of tokenizers is downloaded: no pickles and no code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mea_compress.checkpoint.untrusted import printable_path
from mea_compress.errors import RequestError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w./-]+", re.ASCII)
_DOCUMENTS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")  # they go with what is made of a checkpoint
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", *_DOCUMENTS)
# Other formats of the same weights lie in folders of their own (original, onnx), Mistral's beside them.
UNWANTED = ("*/*.safetensors", "*/*.json", "*/*.model", "*/*.tiktoken", "*/*.txt", "consolidated*.safetensors")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Return whether ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` means a repository of the hub.

    What exists is a directory, and so is a name whose folder exists here: it may be mistyped. A name with a revision
    is none.
    """
    text = os.fspath(name)
    repository, at, revision = text.partition("@")
    if os.path.lexists(text) or not _ID.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        return False
    return bool(at) or not os.path.isdir(repository.partition("/")[0])


def local_directory(name: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, downloaded to the hub's cache where its name is a hub id.

    Args:
        name: A directory, which need not exist (who reads it says so), or ``OWNER/NAME[@REVISION]``, the revision a
            branch, tag or commit.

    Raises:
        RequestError: The hub has no such repository or revision, it cannot be reached and the cache holds none, or the
            download fails.
    """
    if not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = os.fspath(name).partition("@")
    try:
        path = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except GatedRepoError:
        problem = "its owner asks for consent first; give it on the repository's page and log in with hf auth login"
    except RepositoryNotFoundError:
        problem = (
            "there is no such directory, and no such repository that this user may read on the hub; check the path or "
            "id, and for a private one log in with hf auth login"
        )
    except RevisionNotFoundError:
        problem = f"the repository has no revision {revision or 'main'}; give a branch, tag or commit that it has"
    except LocalEntryNotFoundError:
        problem = (
            "there is no such directory, the hub cannot be reached, and its cache does not hold the whole of such a "
            "repository and revision; check the path or id, or try again with a network"
        )
    except Exception as error:  # of the hub, the network, the disk
        problem = f"the download failed ({first_line(error)}); try again"
    else:
        return Path(path)
    raise RequestError(f"{printable_path(os.fspath(name))}: {problem}")


def repository_of(directory: Path) -> str | None:
    """Return the hub id of a directory in the hub's cache, ``.../models--OWNER--NAME/snapshots/COMMIT``, or None."""
    snapshots = directory.absolute().parent
    kind, *parts = snapshots.parent.name.split("--")
    return "/".join(parts) if snapshots.name == "snapshots" and kind == "models" and parts else None


__all__ = ["is_hub_id", "local_directory", "repository_of"]
