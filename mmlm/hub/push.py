"""Sending a saved model to the Hub, without running over what somebody else put there.

The model is saved first, with every check that saving has; then the folder is sent in one
commit. A repository that holds anything but an earlier version of the same kind of folder is
left alone, unless it is forced.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmlm.errors import CheckpointError
from mmlm.hub.aside import OURS
from mmlm.hub.save import save
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor

HARMLESS = (".gitattributes", "LICENSE*")
MARKS = ("mmlm.json", "delta.json", "Modelfile")
"""Files that stand in every folder of ours, and say whose an earlier version is."""


def push(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    repo: str,
    *,
    force: bool = False,
    private: bool = False,
    recipe: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> str:
    """Save a model and send it to the Hub; see `push_folder`.

    Returns:
        The address of the repository.
    """
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(model, processor, folder, recipe=recipe, notes=notes)
        return push_folder(folder, repo, force=force, private=private)


def push_folder(folder: Path, repo: str, *, force: bool = False, private: bool = False) -> str:
    """Send a saved folder to the Hub, in one commit.

    Args:
        folder: A folder that `save` or `save_delta` wrote.
        repo: ``owner/name``; made if it is not there.
        force: Replace what the repository holds, whatever it is.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: if the repository holds something else, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
    except Exception as error:  # the client raises errors of many libraries
        raise CheckpointError(
            f"The Hub refused the repository {repo!r}: {error}. Check the name (owner/name) and "
            f"that you are logged in with a token that may write:  hf auth login"
        ) from error
    there = [entry.rfilename for entry in info.siblings or ()]
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not force and (foreign := _foreign(there)):
        raise CheckpointError(
            f"The repository {repo} holds {len(foreign)} files that are no earlier version of this "
            f"model, such as {foreign[0]!r}. Choose another name, or use --force to replace them."
        )
    try:
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload a model made with MMLM",
            parent_commit=info.sha,  # the Hub refuses if somebody wrote there meanwhile
            delete_patterns=sorted(
                name
                for name in there
                if name not in new and (force or _matches(name, OURS)) and name != ".gitattributes"
            ),
        )
    except Exception as error:  # see above
        raise CheckpointError(
            f"The upload to {repo} failed: {error}. Nothing was changed there; try again."
        ) from error
    return str(address)


def _foreign(there: list[str]) -> list[str]:
    """Return the files of a repository that an earlier version of ours did not bring."""
    ours = (*OURS, *HARMLESS) if any(mark in there for mark in MARKS) else HARMLESS
    return sorted(name for name in there if not _matches(name, ours))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file of a repository, or the folder it is in, has one of these names."""
    return any(fnmatchcase(name.split("/")[0], pattern) for pattern in patterns)
