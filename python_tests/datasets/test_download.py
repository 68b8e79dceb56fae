"""The downloader against a server on this machine: one that knows ranges, one that does not, and none."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from knowedit_ext.datasets import cache_folder, download, load_known
from knowedit_ext.world import world_facts

module = importlib.import_module("knowedit_ext.datasets.download")
CONTENT = random.Random(0).randbytes(3_000_001)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviour
        self.server.asked.append(self.headers.get("Range"))
        if behaviour.status:
            self.send_error(behaviour.status)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and behaviour.ranges else 0
        self.send_response(206 if wanted and behaviour.ranges else 200)
        if wanted and behaviour.ranges:
            first = start + behaviour.shift
            self.send_header("Content-Range", f"bytes {first}-{len(behaviour.content) - 1}/{len(behaviour.content)}")
        if behaviour.length:
            self.send_header("Content-Length", str(len(behaviour.content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client may have heard enough
            self.wfile.write(behaviour.content[start : behaviour.stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server whose `behaviour` a test changes; `data` is the only known file."""
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.behaviour = SimpleNamespace(content=CONTENT, ranges=True, stop=None, length=True, shift=0, status=None)
    http_server.asked = []
    url = f"http://127.0.0.1:{http_server.server_port}/data.bin"
    remote = module.RemoteFile(url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(module, "FILES", {"data": remote})
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http_server
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def fetch(folder):
    return download("data", folder, progress=False)


@pytest.mark.parametrize("length", [True, False])
def test_whole(server, tmp_path, length):
    server.behaviour.length = length
    path = fetch(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "data.bin" and path.read_bytes() == CONTENT
    assert server.asked == [None] and not list(path.parent.glob("*.part"))


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert fetch(tmp_path) == tmp_path / "data.bin" and server.asked == []
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]  # so the folder may be read-only


def test_a_broken_off_download_goes_on(server, tmp_path):
    server.behaviour.stop = 1_000_000
    with pytest.raises(ConnectionError, match="broke off after 1000000 of 3000001 bytes|goes on from there"):
        fetch(tmp_path)
    part = tmp_path / "data.bin.part"
    assert part.read_bytes() == CONTENT[:1_000_000] and not (tmp_path / "data.bin").exists()
    server.behaviour.stop = None
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"] and not part.exists()


def test_a_server_without_ranges_sends_all_of_it(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"something else")
    server.behaviour.ranges = False
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=14-"]


def test_a_part_that_is_whole_is_only_verified(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert fetch(tmp_path).read_bytes() == CONTENT and server.asked == []


def test_a_part_that_is_too_long_is_begun_again(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"x")
    assert fetch(tmp_path).read_bytes() == CONTENT and server.asked == [None]


def test_a_corrupted_part_is_named_and_deleted(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="data.bin' arrived corrupted and was deleted: sha256 .* expected"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("data*.part")) and not (tmp_path / "data.bin").exists()
    assert fetch(tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"xyz"], ids=["short", "long"])
def test_a_file_of_another_size_is_named_and_not_kept(server, tmp_path, content):
    server.behaviour.content = content
    with pytest.raises(ValueError, match=f"data.bin' has {len(content)} bytes, expected 3000001"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("data.bin*[!k]"))


def test_a_longer_file_of_unannounced_size_is_deleted(server, tmp_path):
    server.behaviour.content, server.behaviour.length = CONTENT * 2, False
    with pytest.raises(ValueError, match="arrived corrupted and was deleted: .* bytes, expected 3000001"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("data.bin*[!k]"))


def test_another_file_under_the_name_is_left_and_named(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="data.bin' is not the published file: 4 bytes, expected 3000001. Remove it"):
        fetch(tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    (tmp_path / "data.bin").write_bytes(bytes(len(CONTENT)))
    with pytest.raises(ValueError, match="sha256"):
        fetch(tmp_path)


def test_a_wrong_range_is_not_appended(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:10])
    server.behaviour.shift = 5
    with pytest.raises(ConnectionError, match="from 10 on, the server sent 'bytes 15-"):
        fetch(tmp_path)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:10]


def test_what_to_do_without_a_connection(server, tmp_path):
    server.behaviour.status = 503
    with pytest.raises(ConnectionError, match="HTTP 503"):
        fetch(tmp_path)
    remote = module.FILES["data"]
    closed = module.RemoteFile("http://127.0.0.1:1/data.bin", remote.size, remote.sha256)
    module.FILES["data"] = closed
    with pytest.raises(ConnectionError, match="cannot download http://127.0.0.1:1/data.bin: ") as error:
        fetch(tmp_path)
    for hint in (str(remote.size), remote.sha256, str(tmp_path / "data.bin"), "KNOWEDIT_CACHE"):
        assert hint in str(error.value)


def test_several_at_once_fetch_it_once(server, tmp_path):
    contents = []
    threads = [threading.Thread(target=lambda: contents.append(fetch(tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [CONTENT] * 4 and server.asked == [None]


def test_the_cache_folder(monkeypatch, server, tmp_path):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert download("data", progress=False) == tmp_path / "chosen" / "data.bin"
    monkeypatch.delenv("KNOWEDIT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "knowedit"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown file 'wiki': expected one of known_1000, zsre, counterfact, attr"):
        download("wiki")


def test_the_published_files_are_fetched_over_https():
    for remote in module.FILES.values():
        assert remote.url.startswith("https://rome.baulab.info/data/dsets/")
        if remote.load is None:
            assert remote.size > 10_000_000 and re.fullmatch("[0-9a-f]{64}", remote.sha256)


@pytest.mark.parametrize("length", [True, False])
def test_a_file_without_a_published_checksum_is_what_its_loader_reads(server, tmp_path, monkeypatch, length):
    url = f"http://127.0.0.1:{server.server_port}/known.json"
    monkeypatch.setattr(module, "FILES", {"data": module.RemoteFile(url, load=("known", "load_known"))})
    server.behaviour.length = length
    server.behaviour.content = json.dumps(world_facts()[:3]).encode()
    assert len(load_known(fetch(tmp_path))) == 3
    (tmp_path / "known.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the published file: .*no facts"):
        fetch(tmp_path)
    (tmp_path / "known.json").unlink()
    server.behaviour.content = b"<html>moved</html>"
    with pytest.raises(ValueError, match="arrived corrupted and was deleted"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("known.json*.part")) and not (tmp_path / "known.json").exists()
