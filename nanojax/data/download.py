"""Fetches pre-shuffled text shards from the Hugging Face hub: resumed, retried, checked, and never seen half-written."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojax.data.corpus import MANIFEST
from nanojax.errors import NanoJaxError, StorageError, UserError
from nanojax.tokenizer import write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

TRIES = 5
BACKOFF_S = 2.0  # nanochat's: 2, 4, 8 and 16 seconds between five tries
TIMEOUT_S = 60.0
SHA256_HEX = 64
PARTIAL_CONTENT = 206


@dataclass(frozen=True)
class Dataset:
    """A repository of shards shard_00000.parquet ... whose last one validates."""

    repo: str
    shards: int


DATASETS = {
    "fineweb-edu": Dataset("karpathy/fineweb-edu-100b-shuffle", 1823),
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", 6543),
}


def download(name: str, n: int, folder: str | Path, workers: int = 4, log: Callable[[str], None] = print) -> Path:
    """Put the first n training shards and the validation shard (the repository's last) into `folder`; returns the folder.

    Complete files are kept and partial ones resumed. HF_ENDPOINT names another hub. Raises UserError on a wrong request or
    a hub that does not answer, StorageError when the disk refuses.
    """
    names = shard_names(name, n)
    hub = _hub()
    folder = Path(os.path.expanduser(folder))
    missing = [shard for shard in names if not (folder / shard).is_file()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, DATASETS[name].repo, names)
        if missing:
            log(f"{DATASETS[name].repo}: {len(missing)} of {len(names)} shards to fetch into {folder}")
            _fetch_all(hub, DATASETS[name].repo, missing, folder, workers)
    except NanoJaxError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror or error}; free space there, or choose a folder with --out"
        ) from error
    return folder


def shard_names(name: str, n: int) -> list[str]:
    """File names of n training shards and, last, the validation shard. Raises UserError on what the data set does not have."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; have {', '.join(DATASETS)}")
    last = DATASETS[name].shards - 1
    if not 1 <= n <= last:
        raise UserError(f"{name} has 1 to {last} training shards, given -n {n}; try -n {min(max(n, 1), last)}")
    return [f"shard_{i:05d}.parquet" for i in (*range(n), last)]


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError("downloads need huggingface_hub, which is not installed; pip install 'nanojax[hf]'") from error
    return huggingface_hub


def _write_manifest(folder: Path, repo: str, names: list[str]) -> None:
    """Say which shard validates and which must be there. Written before the first byte, so that half a download is seen as one."""
    path = folder / MANIFEST
    earlier: list[str] = []
    if path.is_file():
        try:
            saved = json.loads(path.read_bytes())
            earlier = [name for name in saved["files"] if (folder / name).is_file()]
            other = saved["repo"]
        except (ValueError, KeyError, TypeError):
            other = repo
        if other != repo:
            raise UserError(f"{folder} holds shards of {other}, asked were those of {repo}; choose another folder with --out")
    files = sorted({*earlier, *names})
    write_atomically(path, json.dumps({"repo": repo, "validation": names[-1], "files": files}, indent=1) + "\n")


def _fetch_all(hub: Any, repo: str, names: list[str], folder: Path, workers: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        ThreadPoolExecutor(min(workers, len(names))) as pool,
    ):
        fetch = _Fetch(hub, repo, folder, bar)
        jobs = [pool.submit(fetch.shard, name) for name in names]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            fetch.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Damaged(Exception):
    """The bytes that came are not those that the hub announced."""


@dataclass(frozen=True)
class _Fetch:
    """What the threads of one download share."""

    hub: Any
    repo: str
    folder: Path
    bar: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when one of them has failed, or the user has had enough."""

    def shard(self, name: str) -> None:
        """Fetch one shard, in at most TRIES tries; each goes on where the last one stopped."""
        errors = self.hub.errors
        # The hub's client moved from httpx to httpx2; its own error derives from whichever it is built on.
        http_error = errors.HfHubHTTPError.__bases__[0]
        url = self.hub.hf_hub_url(self.repo, name, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT"))
        for attempt in range(1, TRIES + 1):
            try:
                return self.try_once(url, self.folder / name)
            except (http_error, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, _Damaged) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                hopeless = status in (401, 403, 404) or isinstance(error, errors.OfflineModeIsEnabled)
                if hopeless or attempt == TRIES or self.stop.is_set():
                    reason = str(error).split("\n")[0][:160] or type(error).__name__
                    raise UserError(
                        f"{url} could not be fetched (try {attempt} of {TRIES}: {reason}); "
                        f"check the network and HF_ENDPOINT, then run it again, it resumes"
                    ) from error
            self.stop.wait(BACKOFF_S**attempt)

    def try_once(self, url: str, path: Path) -> None:
        """Fetch what `path`.tmp still lacks, check size and, where the hub states one, SHA-256; then rename."""
        meta = self.hub.get_hf_file_metadata(url, timeout=TIMEOUT_S)
        partial = path.with_name(path.name + ".tmp")
        have = partial.stat().st_size if partial.exists() else 0
        if meta.size is not None and have > meta.size:
            have = 0
        task = self.bar.add_task(path.name, total=meta.size, completed=have)
        try:
            if have == 0 or have != meta.size:
                self.stream(url, partial, have, task)
            _check(partial, meta.size, meta.etag)
        finally:
            self.bar.remove_task(task)
        os.replace(partial, path)

    def stream(self, url: str, partial: Path, have: int, task: TaskID) -> None:
        """Append to `partial`, `have` bytes long, the bytes that it lacks; or all of them when the server ignores the range."""
        # identity: of a compressed stream, a range would mean other bytes
        headers = self.hub.utils.build_hf_headers(library_name="nanojax") | {"accept-encoding": "identity"}
        if have:
            headers["range"] = f"bytes={have}-"
        with self.hub.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
            self.hub.utils.hf_raise_for_status(answer)
            resumes = have > 0 and answer.status_code == PARTIAL_CONTENT
            self.bar.update(task, completed=have if resumes else 0)
            with open(partial, "ab" if resumes else "wb") as file:
                for chunk in answer.iter_bytes():  # of no fixed size: those wait to be full, and a cut would lose up to one
                    if self.stop.is_set():
                        raise UserError("the download was stopped; run it again, it resumes")
                    file.write(chunk)
                    self.bar.advance(task, len(chunk))


def _check(partial: Path, size: int | None, etag: str | None) -> None:
    """Raise _Damaged unless the file is as long as announced and, when the ETag is a SHA-256 as for large files, hashes to it."""
    found = partial.stat().st_size
    if size is not None and found < size:
        raise _Damaged(f"the connection ended after {found} of {size} bytes")  # what came is kept, the next try resumes
    with open(partial, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if (size is not None and found > size) or (etag and len(etag) == SHA256_HEX and digest != etag):
        partial.unlink()  # nothing of it can be trusted
        raise _Damaged(f"{found} bytes with SHA-256 {digest[:16]}..., expected {size} with {str(etag)[:16]}...")
