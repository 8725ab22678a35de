"""Surgeon folders on the Hugging Face Hub: pushed in one commit, fetched into the Hub's cache, loaded as untrusted.

Only the files that surgeon writes are fetched from a repository; nothing in them is unpickled or run.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgeon
from surgeon.errors import CheckpointError, ConfigError, HubError, called
from surgeon.models.checkpoint import REPORT, TEXT, load, read_folder, save
from surgeon.models.places import HUB, check_repository, near_folders
from surgeon.models.programs import FILE as PROGRAM
from surgeon.models.weights import bounded_network
from surgeon.records.card import FILE as CARD
from surgeon.records.card import PLACE
from surgeon.records.collapse_report import CollapseReport
from surgeon.records.recipe import FORMAT, BaseModel
from surgeon.records.report import Report
from surgeon.util.files import read_json, read_text, told
from surgeon.util.outputs import RECIPE, WEIGHTS

FILES = (RECIPE, WEIGHTS, PROGRAM, CARD, REPORT, TEXT)


def push_to_hub(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    report: Report | CollapseReport | None = None,
    base: BaseModel | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push a model, or a folder written by `save`, to ORG/NAME; returns the URL of the commit.

    The repository is created if it does not exist, `private` or by the organization's default. `revision` is a branch (main),
    `token` defaults to that of `hf auth login` or HF_TOKEN. A folder is verified first and pushed with its card unchanged; for
    a model (`report` and `base` as for `save`), an existing card in the repository is kept. Raises `CheckpointError` if
    nothing was pushed.
    """
    if not isinstance(source, nn.Module):
        if report is not None or base is not None:
            raise ConfigError("report and base apply to a model; a folder has its own")
        return _push(Path(source), repo_id, False, commit_message, revision, private, token, create_pr)
    with tempfile.TemporaryDirectory(prefix="surgeon-push-") as place:
        folder = Path(place, "model")
        save(source, folder, report=report, base=base)
        return _push(folder, repo_id, True, commit_message, revision, private, token, create_pr)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    base: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
) -> nn.Module:
    """Load the model of a surgeon folder, or of the repository ORG/NAME (also hf-hub:ORG/NAME) on the Hub, in eval mode.

    A folder of that name takes precedence. `revision` is a branch, tag or commit; `base`, `device`, `trust_factory` are those of
    `load`, which does the checks. Raises the errors of `load`, and `CheckpointError` if the repository is unavailable (`HubError`
    if there is none).
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ConfigError(f"{name} is a folder here, which has no revision; hf-hub:{name} is the repository")
        return load(name, base=base, device=device, trust_factory=trust_factory)
    found = HUB.fullmatch(str(name))
    if found is None and str(name).count("/") != 1:
        told = f"there is no surgeon folder {name}, and a repository on the Hub is named ORG/NAME.{near_folders(Path(name))}"
        raise CheckpointError(told.rstrip("."))
    try:
        folder = fetch(
            found["id"] if found is not None else str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except HubError as error:
        if found is not None:
            raise
        raise HubError(f"there is no folder {name}.{near_folders(Path(name))} On the Hub, {error}") from error
    return load(folder, base=base, device=device, trust_factory=trust_factory)


def fetch(repo_id: str, *, revision: str | None = None, **options: Any) -> Path:
    """Fetch the files of a surgeon repository into the Hub's cache; `options` are those of `huggingface_hub.snapshot_download`.

    The recipe is fetched first, so that nothing else of an unrelated repository is fetched. Raises `CheckpointError`.
    """
    import huggingface_hub

    with bounded_network(), _telling(f"hf-hub:{repo_id}"):
        recipe = Path(huggingface_hub.hf_hub_download(repo_id, RECIPE, revision=revision, **options))
        values = read_json(recipe)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CheckpointError(f"hf-hub:{repo_id} is not a surgeon repository: its {RECIPE} is not one of surgeon's")
        commit = recipe.parent.name  # all files come from one commit, even if another is pushed meanwhile
        found = huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=list(FILES), **options)
    return Path(found)


def folder(name: str) -> str:
    """The folder of `hf-hub:ORG/NAME` in the Hub's cache, fetched if needed; other names are returned unchanged."""
    found = HUB.fullmatch(name)
    if found is None or name.startswith("local-dir"):
        return name
    repo_id, _, revision = found["id"].partition("@")
    return str(fetch(repo_id, revision=revision or None))


def folder_if_any(name: str) -> str:
    """Like `folder`, but returns the name of a repository that is not surgeon's or cannot be reached: it may be a timm model."""
    try:
        return folder(name)
    except HubError:
        return name


# --- helpers ------------------------------------------------------------------------------------------------------------


def _push(
    folder: Path,
    repo_id: str,
    keep_card: bool,
    message: str | None,
    revision: str | None,
    private: bool | None,
    token: str | None,
    create_pr: bool,
) -> str:
    import huggingface_hub

    check_repository(repo_id)
    read_folder(folder)
    if not (token or huggingface_hub.get_token()):
        raise CheckpointError(
            f"pushing to {told(repo_id)} requires a token: log in (`hf auth login`), or set HF_TOKEN"
            f"{called('', ', or pass token=')}; create one with write access at https://huggingface.co/settings/tokens"
        )
    api = huggingface_hub.HfApi(token=token, library_name="surgeon", library_version=surgeon.__version__)
    with bounded_network(), _telling(f"{folder} cannot be pushed to {told(repo_id)}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        names = [name for name in FILES if (folder / name).is_file() and name != CARD]
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names
        ]
        there = keep_card and api.file_exists(repo_id, CARD, revision=revision)
        if (folder / CARD).is_file() and not there:
            card = read_text(folder / CARD).replace(PLACE, repo_id)
            operations.append(huggingface_hub.CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message or "Push a network with surgeon",
            revision=revision,
            create_pr=create_pr,
        )
    return str((done.pr_url if create_pr else None) or done.commit_url)


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one `CheckpointError`."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise CheckpointError(f"{what}: expected a repository ORG/NAME: {_line(error)}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{what}: the repository is gated: request access on its page and use a token") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: there is no such repository on the Hub, or it is private and the token may not read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what}: the repository has no such revision (branch, tag or commit)") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(
            f"{what}: it is not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what} is not a surgeon repository: it has no {RECIPE}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "; the token lacks permission" if status in (401, 403) else ""
        raise CheckpointError(f"{what}: the Hub answers {status}: {_line(error)}{hint}") from error
    except Exception as error:  # the client's transports raise arbitrary errors
        raise CheckpointError(f"{what}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
