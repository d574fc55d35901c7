"""Downloads against a small server on this host that stands in for the hub and fails on request."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.progress import Progress

from nanojax.config import DataConfig
from nanojax.data import corpus, download
from nanojax.errors import StorageError, UserError

pytest.importorskip("huggingface_hub")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

REPO = "/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/"
LAST = "shard_01822.parquet"


class Hub(ThreadingHTTPServer):
    """Serves `files`; `plan` says what goes wrong with the next requests of (method, name)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: dict[tuple[str, str], list[str]] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        name = self.path.removeprefix(REPO)
        wanted = self.headers.get("Range")
        self.server.seen.append((self.command, name, wanted))
        content = self.server.files.get(name)
        trouble = (self.server.plan.get((self.command, name)) or ["none"]).pop(0)
        if content is None or trouble.isdigit():
            self.send_response(404 if content is None else int(trouble))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        digest = hashlib.sha256(content).hexdigest()
        total = len(content)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if trouble == "wrong":
            body = bytes(len(body))
        if with_body:
            self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    for i in (*range(4), 1822):
        path = tmp_path / "made.parquet"
        pq.write_table(pa.table({"text": [f"shard {i} document {k} {'x' * 50 * k}" for k in range(20)]}), path)
        server.files[f"shard_{i:05d}.parquet"] = path.read_bytes()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(n: int, folder: Path) -> list[str]:
    lines: list[str] = []
    download.download("fineweb-edu", n, folder, 2, lines.append)
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_a_corpus_whose_last_shard_validates(hub, tmp_path):
    folder = tmp_path / "deep" / "out"
    fetch(2, folder)
    shards = ["shard_00000.parquet", "shard_00001.parquet", LAST]
    assert names(folder) == [corpus.MANIFEST, *shards]  # nothing half-written is left
    assert all((folder / name).read_bytes() == hub.files[name] for name in shards)
    manifest = json.loads((folder / corpus.MANIFEST).read_text())
    assert manifest == {"repo": "karpathy/fineweb-edu-100b-shuffle", "validation": LAST, "files": shards}
    data = DataConfig(path=str(folder))
    assert list(corpus.documents(data, "val")) == [f"shard 1822 document {k} {'x' * 50 * k}" for k in range(20)]
    train = list(corpus.documents(data, "train"))
    assert len(train) == 40
    assert train[0].startswith("shard 0 ")


@pytest.mark.parametrize(
    ("method", "trouble"),
    [("GET", "500"), ("GET", "503"), ("GET", "429"), ("GET", "cut"), ("GET", "wrong"), ("HEAD", "500"), ("HEAD", "503"), ("HEAD", "429")],
)
def test_a_request_that_fails_is_tried_again(hub, tmp_path, trouble, method):
    hub.plan[method, LAST] = [trouble, trouble]
    fetch(1, tmp_path / "out")
    assert (tmp_path / "out" / LAST).read_bytes() == hub.files[LAST]
    assert sum(seen[:2] == (method, LAST) for seen in hub.seen) == 3


def test_a_cut_connection_is_resumed_where_it_stopped(hub, tmp_path):
    hub.plan["GET", LAST] = ["cut"]
    fetch(1, tmp_path / "out")
    half = len(hub.files[LAST]) // 2
    assert [wanted for method, name, wanted in hub.seen if (method, name) == ("GET", LAST)] == [None, f"bytes={half}-"]
    assert (tmp_path / "out" / LAST).read_bytes() == hub.files[LAST]


def test_a_partial_file_of_an_earlier_run_is_resumed_by_range(hub, tmp_path):
    (tmp_path / f"{LAST}.tmp").write_bytes(hub.files[LAST][:100])
    (tmp_path / "shard_00000.parquet.tmp").write_bytes(hub.files["shard_00000.parquet"])  # whole, but for its renaming
    fetch(1, tmp_path)
    assert [seen for seen in hub.seen if seen[0] == "GET"] == [("GET", LAST, "bytes=100-")]
    assert (tmp_path / LAST).read_bytes() == hub.files[LAST]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_server_that_ignores_the_range_starts_the_file_over(hub, tmp_path):
    hub.ranges = False
    (tmp_path / f"{LAST}.tmp").write_bytes(hub.files[LAST][:100])
    fetch(1, tmp_path)
    assert [seen for seen in hub.seen if seen[:2] == ("GET", LAST)] == [("GET", LAST, "bytes=100-")]
    assert (tmp_path / LAST).read_bytes() == hub.files[LAST]


def test_a_partial_file_with_other_bytes_is_thrown_away_and_fetched_anew(hub, tmp_path):
    (tmp_path / f"{LAST}.tmp").write_bytes(b"of another version" * 5)
    fetch(1, tmp_path)
    assert (tmp_path / LAST).read_bytes() == hub.files[LAST]


def test_complete_files_are_not_fetched_again(hub, tmp_path):
    fetch(1, tmp_path)
    before = len(hub.seen)
    assert fetch(1, tmp_path) == []
    assert len(hub.seen) == before
    fetch(3, tmp_path)
    fetched = [name for method, name, _ in hub.seen[before:] if method == "GET"]
    assert sorted(fetched) == ["shard_00001.parquet", "shard_00002.parquet"]
    fetch(1, tmp_path)  # asking for fewer forgets none that are there
    assert len(json.loads((tmp_path / corpus.MANIFEST).read_text())["files"]) == 4


def test_after_five_tries_one_line_says_so_and_the_folder_is_no_corpus_yet(hub, tmp_path):
    hub.plan["GET", LAST] = ["500"] * 50
    with pytest.raises(UserError, match=r"try 5 of 5.*HF_ENDPOINT.*resumes") as refused:
        fetch(1, tmp_path)
    assert "\n" not in str(refused.value)
    assert sum(seen[:2] == ("GET", LAST) for seen in hub.seen) == 5
    with pytest.raises(UserError, match="not complete"):
        corpus.find(DataConfig(path=str(tmp_path)))


def test_a_file_that_the_hub_does_not_have_is_not_asked_for_five_times(hub, tmp_path):
    del hub.files[LAST]
    with pytest.raises(UserError, match="try 1 of 5"):
        fetch(1, tmp_path)


def test_no_server_at_all_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)
    with pytest.raises(UserError, match="try 5 of 5"):
        fetch(1, tmp_path)


def test_tries_are_spaced_exponentially(hub, tmp_path, monkeypatch):
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return False

    monkeypatch.setattr(download, "BACKOFF_S", 2.0)
    hub.plan["GET", LAST] = ["500"] * 3
    download._Fetch(download._hub(), "karpathy/fineweb-edu-100b-shuffle", tmp_path, Progress(disable=True), Stop()).shard(LAST)
    assert waits == [2, 4, 8]
    assert names(tmp_path) == ["made.parquet", LAST]


def test_a_folder_of_another_data_set_or_one_that_cannot_be_written_is_refused(hub, tmp_path):
    fetch(1, tmp_path / "out")
    with pytest.raises(UserError, match="another folder with --out"):
        download.download("climbmix", 1, tmp_path / "out", 1, print)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        fetch(1, tmp_path / "file")


@pytest.mark.parametrize(("name", "n"), [("fineweb-edu", 0), ("fineweb-edu", 1823), ("climbmix", 6543), ("wikipedia", 1)])
def test_what_a_data_set_does_not_have_is_refused_before_any_request(hub, tmp_path, name, n):
    with pytest.raises(UserError):
        download.download(name, n, tmp_path / "out", 1, print)
    assert not hub.seen
    assert not (tmp_path / "out").exists()


def test_names_of_shards_end_with_the_validation_shard():
    assert download.shard_names("climbmix", 2) == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    every = download.shard_names("fineweb-edu", 1822)
    assert len(set(every)) == 1823
    assert all(a < b for a, b in itertools.pairwise(every))


def test_without_the_hubs_client_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'nanojax\[hf\]'"):
        fetch(1, tmp_path)
