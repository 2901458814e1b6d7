"""Models from the Hugging Face Hub, found as llama.cpp's -hf finds them.

What is chosen, and in which order, follows common/download.cpp of llama.cpp; the downloads are
huggingface_hub's. Both keep files in the same cache with the same layout.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from imatrix.words import few

__all__ = ["HubModel", "best_model", "best_mtp", "hide_progress", "parts_of"]

_DEFAULT_TAGS = ("Q4_K_M", "Q8_0")
# files that are no model by themselves (gguf_filename_is_model)
_BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_REPO = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*/[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE)
_TAG = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class _Name:
    """What a file's name says. A model in one file is part 1 of 1."""

    prefix: str
    bits: int  # 4 for Q4_K_M; 0 if the name does not say
    part: int
    n_parts: int


class HubModel:
    """A repository with models.

    Args:
        name: USER/MODEL or USER/MODEL:QUANT, the quant in capitals or not.
        token: access token; None for HF_TOKEN, or the one that huggingface_hub has been given.
        offline: use only the cache, and ask nobody.

    The endpoint is MODEL_ENDPOINT or HF_ENDPOINT if one is set. Files go to LLAMA_CACHE if that is
    set, else to huggingface_hub's own cache (HF_HUB_CACHE, HF_HOME).

    Raises:
        ValueError: the name is not of that form, or there is no such repository.
        PermissionError: the token does not give access.
        ImportError: huggingface_hub is not installed.
        OSError: the Hub cannot be reached, and the cache does not have the repository.

    Attributes:
        repo: USER/MODEL.
        quant: as it was given, "" for none.
        files: paths in the repository, in the Hub's order.
        commit: the revision that they are of.
    """

    def __init__(self, name: str, *, token: str | None = None, offline: bool = False) -> None:
        repo, _, rest = name.partition(":")
        self.repo = repo
        self.quant = rest.rpartition(":")[2]
        if _REPO.fullmatch(repo) is None:
            raise ValueError(f"{name!r}: expected USER/MODEL or USER/MODEL:QUANT")
        self._library = _huggingface_hub()
        self._token = token
        self._endpoint = os.environ.get("MODEL_ENDPOINT") or os.environ.get("HF_ENDPOINT")
        self._cache = os.environ.get("LLAMA_CACHE") or self._library.constants.HF_HUB_CACHE
        self.offline = offline
        if offline:
            found = self._cached()
            if found is None:
                raise OSError(
                    f"{self.repo} is not in the cache ({self._cache}); run once without --offline"
                )
            self.commit, self.files = found
        else:
            self.commit, self.files = self._listed()
        if "preset.ini" in self.files:
            raise ValueError(
                f"{self.repo} holds a preset (preset.ini), not a model; name the repository of the "
                "model itself"
            )

    def model(self, file: str | None = None) -> Path:
        """Download the model, all parts of it, and give the path of the first.

        Args:
            file: its path in the repository. None chooses by the quant: the first file whose name
                has it; without a quant, Q4_K_M, else Q8_0, else the first model there is.

        Raises:
            ValueError: there is no such file.
            OSError: see the class.
        """
        return self._fetched(self.model_file(file))

    def model_file(self, file: str | None = None) -> str:
        """The path in the repository that model() downloads.

        Raises:
            ValueError: there is no such file.
        """
        if file is not None:
            if file not in self.files:
                raise ValueError(f"{self.repo} has no file {file!r}; {self._describe_files()}")
            return file
        found = best_model(self.files, self.quant)
        if found is None:
            of = f" of {self.quant}" if self.quant else ""
            raise ValueError(f"{self.repo} has no GGUF model{of}; {self._describe_files()}")
        return found

    def mtp_model(self, beside: str) -> Path | None:
        """Download the MTP head that lies beside a model, `mtp-*.gguf`; None if there is none.

        Args:
            beside: the model's path in the repository.

        Raises:
            OSError: see the class.
        """
        found = best_mtp(self.files, beside, self.quant)
        return None if found is None else self._fetched(found)

    def _describe_files(self) -> str:
        models = [each for each in self.files if each.endswith(".gguf")]
        return f"it has {few(models, 12)}" if models else "it has no .gguf file"

    def _fetched(self, file: str) -> Path:
        # huggingface_hub continues an interrupted download, and keeps what is there
        paths = [self._download(part) for part in parts_of(self.files, file)]
        return next(path for path in paths if path.name == PurePosixPath(file).name)

    def _download(self, file: str) -> Path:
        with self._readable_errors():
            return Path(
                self._library.hf_hub_download(
                    self.repo,
                    file,
                    revision=self.commit,
                    token=self._token,
                    endpoint=self._endpoint,
                    cache_dir=self._cache,
                    local_files_only=self.offline,
                )
            )

    def _listed(self) -> tuple[str, list[str]]:
        """Commit and files of the branch main, or else the first one."""
        api = self._library.HfApi(endpoint=self._endpoint, token=self._token)
        try:
            with self._readable_errors():
                branches = api.list_repo_refs(self.repo).branches
                if not branches:
                    raise ValueError(f"{self.repo} has no branch")
                branch = next((each for each in branches if each.name == "main"), branches[0])
                commit = branch.target_commit
                tree = api.list_repo_tree(self.repo, revision=commit, recursive=True)
                files = [each.path for each in tree if hasattr(each, "blob_id")]
        except (ValueError, PermissionError):
            raise
        except OSError:
            if (cached := self._cached()) is None:
                raise
            self.offline = True
            return cached
        self._remember(branch.name, commit)
        return commit, files

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into what a person can do about it."""
        try:
            yield
        except Exception as error:
            if (readable := self._readable(error)) is None:
                raise
            raise readable from error

    def _readable(self, error: Exception) -> Exception | None:
        """The error to raise instead; None if this one says enough."""
        errors = self._library.errors
        where = self._endpoint or "https://huggingface.co"
        has = "the token given was not enough" if self._has_token() else "no token was given"
        why = _first_line(error)
        set_token = "set HF_TOKEN (or -hft) to"
        if isinstance(error, errors.GatedRepoError):
            page = f"{where.rstrip('/')}/{self.repo}"
            reason = f"is gated, and {has}: accept its terms at {page}, then {set_token} a token of that account"
            return PermissionError(f"{self.repo} {reason}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return ValueError(
                f"{where} has no model {self.repo}, or it is private and {has}: look at the "
                f"spelling, or {set_token} one that may see it"
            )
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = f"a file is not in the cache ({self._cache}) and cannot be fetched: {why}"
        elif isinstance(error, errors.HfHubHTTPError):
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                reason = f"{where} refuses access (HTTP {status}), and {has}: {set_token} one that has it"
                return PermissionError(f"{self.repo}: {reason}")
            reason = f"{where} answers HTTP {status}: {why}"
        elif isinstance(error, (ValueError, OSError)):
            return None
        else:
            # what the HTTP client raises differs from version to version of the library
            reason = f"{where} cannot be reached: {why}"
        return OSError(f"{self.repo}: {reason}")

    def _has_token(self) -> bool:
        return bool(self._token or self._library.get_token())

    def _folder(self) -> Path:
        return Path(self._cache) / f"models--{self.repo.replace('/', '--')}"

    def _remember(self, branch: str, commit: str) -> None:
        """Write which commit a branch is at, where --offline (llama.cpp's too) looks for it."""
        path = self._folder() / "refs" / branch
        if path.is_relative_to(self._folder() / "refs") and ".." not in path.parts:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit, encoding="ascii")

    def _cached(self) -> tuple[str, list[str]] | None:
        """Commit and files that are in the cache; None if there are none."""
        refs = self._folder() / "refs"
        names = (
            sorted(refs.iterdir(), key=lambda each: each.name != "main") if refs.is_dir() else []
        )
        for ref in names:
            commit = ref.read_text(encoding="ascii").strip() if ref.is_file() else ""
            snapshot = self._folder() / "snapshots" / commit
            if commit and snapshot.is_dir():
                found = sorted(path for path in snapshot.rglob("*") if path.is_file())
                return commit, [path.relative_to(snapshot).as_posix() for path in found]
        return None


def hide_progress() -> None:
    """Keep huggingface_hub from drawing progress bars on stderr."""
    _huggingface_hub().utils.disable_progress_bars()


def best_model(files: Sequence[str], quant: str) -> str | None:
    """Choose a model's file, as find_best_model does.

    Args:
        files: paths in the repository.
        quant: the quant; "" for the default ones, else the first model there is.

    Returns:
        Its path; None if there is none.
    """
    models = [each for each in files if _is_model(each) and _name_of(each).part == 1]
    for tag in (quant,) if quant else _DEFAULT_TAGS:
        pattern = re.compile(re.escape(tag) + "[.-]", re.IGNORECASE)
        for each in models:
            if pattern.search(each):
                return each
    return models[0] if models and not quant else None


def best_mtp(files: Sequence[str], model: str, quant: str) -> str | None:
    """Choose the head for a model, as find_best_sibling does.

    It has `mtp-` in its path, and lies in the model's folder or in one above. The nearest folder
    counts first, then the same quant, then the nearest number of bits, then the order.

    Args:
        files: paths in the repository.
        model: the model's path.
        quant: the quant; "" for the model's.

    Returns:
        Its path; None if there is none.
    """
    tag = quant.upper()
    digits = _DIGITS.search(tag)
    bits = (int(digits[0]) if digits else 0) if tag else _name_of(model).bits
    folders = PurePosixPath(model).parent.parts
    best: tuple[tuple[int, bool, int], str] | None = None
    for each in files:
        if not each.endswith(".gguf") or "mtp-" not in each or _name_of(each).part != 1:
            continue
        own = PurePosixPath(each).parent.parts
        if own != folders[: len(own)]:
            continue
        exact = bool(tag) and f"-{tag}." in each.upper()
        # ordered by what is better
        key = (len(own), exact, -abs(_name_of(each).bits - bits))
        if best is None or key > best[0]:
            best = (key, each)
    return None if best is None else best[1]


def parts_of(files: Sequence[str], file: str) -> list[str]:
    """All files of a model, in the order of `files` (get_split_files)."""
    name = _name_of(file)
    if name.n_parts <= 1:
        return [file]
    return [
        each
        for each in files
        if (other := _name_of(each)).n_parts == name.n_parts and other.prefix == name.prefix
    ]


def _is_model(path: str) -> bool:
    name = PurePosixPath(path).name
    return path.endswith(".gguf") and not any(other in name for other in _BESIDE)


def _name_of(path: str) -> _Name:
    if not path.endswith(".gguf"):
        return _Name(path, 0, 0, 0)
    prefix, part, n_parts = path.removesuffix(".gguf"), 1, 1
    if found := _SPLIT.fullmatch(prefix):
        prefix, part, n_parts = found[1], int(found[2]), int(found[3])
    tag = _TAG.search(prefix)
    digits = _DIGITS.search(tag[1]) if tag else None
    return _Name(prefix, int(digits[0]) if digits else 0, part, n_parts)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(
            "-hf needs the library huggingface_hub, which is not installed: "
            "pip install 'imatrix[hub]'"
        ) from error
    return huggingface_hub
