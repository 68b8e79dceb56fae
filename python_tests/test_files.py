"""Files that are whole or not there."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from knowedit_ext.runs.files import atomic_write, load_npz, read_tensors, save_npz, write_tensors


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


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    atomic_write(path, lambda file: save_npz(file, {"a": np.arange(3), "b": np.float32(2)}))
    found = load_npz(path, ["b", "a"])
    assert found["b"] == 2 and np.array_equal(found["a"], np.load(path)["a"])
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
