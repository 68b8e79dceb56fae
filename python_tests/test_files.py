"""Files that are whole or not there, and tell when they are not what was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from knowedit_ext.runs.checksums import checksum, json_digest
from knowedit_ext.runs.files import (
    SEAL,
    atomic_write,
    file_name,
    load_json,
    load_npz,
    model_file_name,
    read_tensors,
    save_npz,
    write_json,
    write_npz,
    write_tensors,
)

from .support.forked import Forked
from .support.processes import fork


def stop(*args, **kwargs) -> None:
    raise KeyboardInterrupt


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    atomic_write(path, lambda file: file.write(b"old"))
    assert path.read_bytes() == b"old" and stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, lambda file: (file.write(b"half"), stop()))
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "a.safetensors", torch.arange(12.0).view(3, 4)
    write_tensors(path, {"x": x.T.requires_grad_()}, {"format": "pt"})
    tensors, metadata = read_tensors(path)
    assert (
        torch.equal(tensors["x"], x.T) and metadata == {"format": "pt"} and stat.S_IMODE(path.stat().st_mode) == 0o644
    )
    monkeypatch.setattr("knowedit_ext.runs.files.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"x": -x}, {})
    assert torch.equal(read_tensors(path)[0]["x"], x.T) and list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a.safetensors' is not a whole safetensors file"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"b.safetensors' does not exist"):
        read_tensors(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is no file"):
        read_tensors(tmp_path)


def test_equal_tensors_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from knowedit_ext.runs.files import write_tensors;"
        "write_tensors(sys.argv[1], {'b': torch.arange(3), 'ä': torch.zeros(0, 2)}, {k: k + '\"' for k in 'zyxabcä'})"
    )
    paths = [tmp_path / str(n) for n in range(3)]
    for path in paths:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert len({path.read_bytes() for path in paths}) == 1
    assert list(read_tensors(paths[0])[1]) == sorted("zyxabcä")


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    x = torch.arange(4.0)
    write_tensors(tmp_path / "a", {"a": x, "b": x, "c": x[2:]}, {})
    assert {name: y.tolist() for name, y in read_tensors(tmp_path / "a")[0].items()} == {
        "a": x.tolist(),
        "b": x.tolist(),
        "c": [2, 3],
    }


def test_only_the_tensors_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2), "b": torch.ones(3)}, {})
    assert set(read_tensors(path, ["b", "c"])[0]) == {"b"}


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    atomic_write(path, lambda file: save_npz(file, {"a": np.arange(3), "b": np.float32(2)}))
    arrays = load_npz(path, ["b", "a"])
    assert arrays["b"] == 2 and np.array_equal(arrays["a"], np.load(path)["a"])
    with pytest.raises(ValueError, match=r"a.npz' is not the .npz file expected: it lacks c and holds a, b"):
        load_npz(path, ["a", "c"])
    np.savez_compressed(path, o=np.array([{}]), a=np.arange(3))
    assert np.array_equal(load_npz(path, ["a"])["a"], np.arange(3))
    with pytest.raises(ValueError, match=r"a.npz' .* cannot be loaded when allow_pickle=False"):
        load_npz(path, ["o"])
    for content in (b"", b"PK", path.read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.npz' is not the .npz file expected"):
            load_npz(path, ["a"])


@pytest.mark.parametrize(
    "array",
    [np.array(""), np.array("ä"), np.bool_(False), np.zeros((0, 3)), np.asfortranarray(np.arange(6).reshape(2, 3))],
)
def test_any_array_comes_back(tmp_path: Path, array: np.ndarray) -> None:
    write_npz(tmp_path / "a.npz", {"x": array})
    arrays = load_npz(tmp_path / "a.npz")
    assert set(arrays) == {"x"} and arrays["x"].dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(arrays["x"], array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["x"], array)


# -- damage -----------------------------------------------------------------------------------------------------------


def write_each(folder: Path) -> dict[Path, object]:
    """A file of each kind, and what reads it."""
    paths = [folder / name for name in ("a.json", "a.npz", "a.safetensors")]
    write_json(paths[0], {"case_id": 7, "pre": {"x": [0.25, 1e-9, None]}, "text": "ä"}, sealed=True)
    write_npz(paths[1], {"a": np.arange(5.0), "s": np.array("text")})
    write_tensors(paths[2], {"x": torch.arange(40.0), "y": torch.ones(3, 2)}, {"format": "1", "more": '{"k": 1}'})
    return dict(zip(paths, (load_json, load_npz, read_tensors), strict=True))


def spelled(value: object) -> str:
    """Any of these contents as text, to compare by."""
    return (
        repr(value)
        if not isinstance(value, tuple)
        else repr({k: v.tolist() for k, v in value[0].items()}) + repr(value[1])
    )


@pytest.mark.parametrize("number", range(3))
def test_whatever_is_damaged_is_found_or_changes_nothing(tmp_path: Path, number: int) -> None:
    """Each byte in turn, three of its bits; and every length."""
    path, read = list(write_each(tmp_path).items())[number]
    whole, want = path.read_bytes(), spelled(read(path))
    refusals = 0
    for at in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                got = spelled(read(path))
                if SEAL.encode() in damaged:  # without the name of the seal it is a file that has none
                    assert got == want, (at, bit)
            except ValueError as error:
                refusals += 1
                assert str(path) in str(error) and "delete it" in str(error)
    assert refusals > len(whole)
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        try:
            assert spelled(read(path)) == want
        except ValueError as error:
            assert str(path) in str(error)


def test_what_was_altered_is_refused(tmp_path: Path) -> None:
    json_path, npz, tensors = write_each(tmp_path)
    json_path.write_text(json_path.read_text().replace("0.25", "0.75"))
    with np.load(npz) as file:
        np.savez(npz, **(dict(file) | {"a": np.arange(5.0) + 1}))
    with safe_open(tensors, "pt") as file:
        held, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for path, read in ((json_path, load_json), (npz, load_npz)):
        with pytest.raises(ValueError, match=f"'{path}' was altered after it was written"):
            read(path)
    for change in (dict(x=held["x"] + 1), dict(z=held["x"].clone())):
        save_file(held | change, tensors, metadata)
        with pytest.raises(ValueError, match="was altered"):
            read_tensors(tensors)
    save_file(held, tensors, metadata | {"format": "2"})
    with pytest.raises(ValueError, match="was altered"):
        read_tensors(tensors)
    save_file({"x": held["x"]}, tensors, metadata)
    with pytest.raises(ValueError, match="was altered"):
        read_tensors(tensors)
    for same_bits in (held["x"].view(torch.int32), held["x"].view(torch.float16), held["x"][None]):
        save_file(held | {"x": same_bits}, tensors, metadata)
        with pytest.raises(ValueError, match="was altered"):
            read_tensors(tensors)


def test_seals_of_earlier_versions_are_checksums_alone(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", torch.arange(3.0)
    stored = {SEAL: json.dumps({"": json_digest({"format": "1"}), "x": checksum(x)}), "format": "1"}
    save_file({"x": x}, path, stored)
    assert torch.equal(read_tensors(path)[0]["x"], x)
    save_file({"x": x + 1}, path, stored)
    with pytest.raises(ValueError, match="was altered"):
        read_tensors(path)


# -- killed, or two at once ------------------------------------------------------------------------------------------

WRITER = """
import os, signal, sys, time
from knowedit_ext.runs.files import replacing
with replacing(sys.argv[1]) as file:
    file.write_text("half")
    (file.parent / ".tmpAbC123").write_text("of the library's own")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """A process in the middle of writing `tmp_path / "a"`."""
    process = fork(WRITER, tmp_path / "a", folder=tmp_path_factory.mktemp("script"))
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_by_the_next_write(writer: Forked, tmp_path: Path) -> None:
    writer.kill()
    writer.wait()
    assert os.listdir(tmp_path) != []
    atomic_write(tmp_path / "a", lambda file: file.write(b"whole"))
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


def test_two_write_one_file(writer: Forked, tmp_path: Path) -> None:
    (place,) = tmp_path.iterdir()
    atomic_write(tmp_path / "a", lambda file: file.write(b"whole"))
    assert {p.name for p in tmp_path.iterdir()} == {"a", place.name}
    assert (place / "a").read_text() == "half"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null", b'{"a": 1} x'],
)
def test_what_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json'"):
        load_json(path)


def test_foreign_files_have_no_seal(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    np.savez(tmp_path / "a.npz", a=np.arange(2))
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_json(tmp_path / "a.json") == {"a": 1} and set(load_npz(tmp_path / "a.npz")) == {"a"}
    assert read_tensors(tmp_path / "a.safetensors")[1] == {}


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    leaves,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3) | st.dictionaries(st.integers(), x),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text().filter(lambda name: name != SEAL), values, max_size=4))
def test_json_keeps_its_seal(tmp_path_factory: pytest.TempPathFactory, value: dict) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, value, sealed=True)
    assert load_json(path) == json.loads(json.dumps(value))
    assert json_digest(value) == json_digest(json.loads(json.dumps(value)))


def test_claims_of_size_are_not_believed(tmp_path: Path) -> None:
    """A header that promises more than the file has, and one that is much smaller than what it unpacks to."""
    path = tmp_path / "a.npz"
    for shape in ((10**12,), (10**30,), (2**31, 2**31)):
        with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
            member.write(bytes(64))
        with pytest.raises(ValueError, match=r"a\.npz'.*expected float64"):
            load_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (200 << 20,)})
        for _ in range(200):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="a claims 2097"):
        load_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 1])
def test_header_lengths_of_tensors_are_not_believed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(4)}, {})
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_tensors(path)


# -- full disks -------------------------------------------------------------------------------------------------------

WRITERS = {
    "a.json": lambda path: write_json(path, {"a": "x" * 200_000}, sealed=True),
    "a.npz": lambda path: write_npz(path, {"a": np.zeros(50_000), "b": np.zeros(9)}),
    "a.safetensors": lambda path: write_tensors(path, {"a": torch.zeros(50_000)}, {"b": "c"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_where_no_more_can_be_written(tmp_path: Path, name: str) -> None:
    """The system refuses bytes beyond a limit, as a full disk does: an OSError with the path, and the old file."""
    path = tmp_path / name
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large, so this was left as it was.*{name}") as caught:
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device.*{name}"):
        WRITERS[name](tmp_path / name)
    assert not list(tmp_path.iterdir())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    ["", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "x" * 151, "ä" * 76, 10**200, "\ud800"],
)
def test_names_that_lead_elsewhere_are_refused(part: object) -> None:
    with pytest.raises(ValueError, match="case_id .* cannot name a file"):
        file_name(part, "case_id")


@pytest.mark.parametrize("part", [0, -3, "7", "a.b", "Miles Davis", "ä", "..x", "x" * 150])
def test_other_names_are_kept(part: object) -> None:
    assert file_name(part, "case_id") == str(part)


def test_a_models_name_is_one_part() -> None:
    assert model_file_name("EleutherAI/gpt-j-6B") == "EleutherAI_gpt-j-6B"
    assert model_file_name("../../x\\y") == ".._.._x_y"
    with pytest.raises(ValueError, match="the model's name"):
        model_file_name("..")


@given(st.text() | st.integers())
def test_a_name_stays_in_its_folder(part: object) -> None:
    try:
        name = file_name(part, "case_id")
    except ValueError:
        return
    folder = Path("/somewhere/out")
    assert Path(os.path.normpath(folder / name)).parent == folder
