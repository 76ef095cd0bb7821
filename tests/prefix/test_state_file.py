"""The file of states: an ordinary safetensors file, trusted only where its seal tells to."""

import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from locft_easyedit.errors import OutputError
from locft_easyedit.prefix import state_file as statefile
from locft_easyedit.prefix.state_file import StateFile

T, W = 23, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def states(dtype=torch.float32, n_tokens=T):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n_tokens, W, generator=generator).to(dtype)


def sealed(path, fingerprint="a model", dtype=torch.float32):
    file = StateFile.create(path, T, W, dtype)
    file.put(torch.arange(T), states(dtype))
    file.seal(fingerprint)
    file.close()
    return path


def opened(path, fingerprint="a model", n_tokens=T, width=W, dtype=torch.float32):
    return StateFile.open_whole(path, fingerprint, n_tokens, width, dtype)


def seal_of(path):
    return path.with_name(path.name + ".json")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "folder" / "prefix.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_safetensors_file(dtype, path):
    sealed(path, dtype=dtype)
    loaded = load_file(path)
    assert list(loaded) == ["states"]
    assert loaded["states"].dtype == dtype
    assert torch.equal(loaded["states"], states(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 64 * 2**20])
def test_a_sealed_file_is_opened_again(dtype, block, path, monkeypatch):
    monkeypatch.setattr(statefile, "_BLOCK", block)
    sealed(path, dtype=dtype)
    n_blocks = -(-T * W * dtype.itemsize // block)
    assert len(json.loads(seal_of(path).read_text())["crc32"]) == n_blocks
    file, why_not = opened(path, dtype=dtype)
    assert why_not == ""
    assert torch.equal(file.get(torch.arange(T)), states(dtype))
    file.close()
    again, _ = opened(path, dtype=dtype)  # closing a whole file keeps it
    assert again is not None
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".json"]


# What is not trusted


def refused(path, reason, **what):
    file, why_not = opened(path, **what)
    assert file is None
    assert reason in why_not


def test_without_a_seal_it_is_not_used(path):
    refused(path, "there is none")
    file = StateFile.create(path, T, W, torch.float32)
    file.put(torch.arange(T), states())
    refused(path, "there is none")
    file.seal("a model")
    assert opened(path)[0] is not None
    seal_of(path).unlink()
    refused(path, "there is none")


def test_a_seal_without_its_file(path):
    sealed(path).unlink()
    refused(path, "there is none")


def test_another_fingerprint(path):
    refused(sealed(path), "another model, text or setting", fingerprint="another")


@pytest.mark.parametrize(
    "what", [{"n_tokens": T - 1}, {"n_tokens": W, "width": T}, {"dtype": torch.float16}]
)
def test_another_shape_or_precision(what, path):
    refused(sealed(path), "its header is another one", **what)


@pytest.mark.parametrize("block", [64, 64 * 2**20])
@pytest.mark.parametrize("byte", [0, 100, T * W * 4 - 1])
def test_one_byte_that_changed(byte, block, path, monkeypatch):
    monkeypatch.setattr(statefile, "_BLOCK", block)
    data = bytearray(sealed(path).read_bytes())
    data[len(data) - T * W * 4 + byte] ^= 1
    path.write_bytes(data)
    refused(path, "damaged")


def test_two_blocks_that_changed_places(path, monkeypatch):
    monkeypatch.setattr(statefile, "_BLOCK", 20)
    data = sealed(path).read_bytes()
    start = len(data) - T * W * 4
    swapped = data[:start] + data[start + 20 : start + 40] + data[start : start + 20]
    path.write_bytes(swapped + data[start + 40 :])
    refused(path, "damaged")


@pytest.mark.parametrize("change", [-1, -T * W * 4, 1])
def test_another_length(change, path):
    data = sealed(path).read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    refused(path, "damaged")


def test_a_header_that_is_cut_off(path):
    path.write_bytes(sealed(path).read_bytes()[:50])
    refused(path, "its header is another one")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"crc32": 3}',
        '{"crc32": ["x"], "format": 1, "fingerprint": "a model"}',
        '{"crc32": [Infinity], "format": 1, "fingerprint": "a model"}',
        '{"crc32": [], "format": 1, "fingerprint": "a model"}',
        '{"crc32": [1, 2, 3], "format": 1, "fingerprint": "a model"}',
        '{"crc32": [1], "format": 2, "fingerprint": "a model"}',
        '{"crc32": [1], "fingerprint": "a model"}',
    ],
)
def test_a_damaged_seal(text, path):
    seal_of(sealed(path)).write_text(text)
    file, why_not = opened(path)
    assert file is None
    assert why_not


def test_a_seal_that_is_no_text(path):
    seal_of(sealed(path)).write_bytes(b"\xff\xfe\x00")
    refused(path, "it cannot be read (UnicodeDecodeError")


def test_a_file_that_may_not_be_opened(path, monkeypatch):
    sealed(path)

    def forbidden(name, mode="r", **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(statefile, "open", forbidden, raising=False)
    refused(path, "it cannot be read (PermissionError")


def test_making_a_file_anew_first_breaks_the_old_seal(path, monkeypatch):
    sealed(path)
    reserve, seals = statefile._reserve, []

    def reserving(*args):
        seals.append(seal_of(path).exists())
        return reserve(*args)

    monkeypatch.setattr(statefile, "_reserve", reserving)
    file = StateFile.create(path, T, W, torch.float32)
    assert seals == [False]
    refused(path, "there is none")
    file.put(torch.arange(T), 2 * states())
    file.seal("a model")
    assert torch.equal(opened(path)[0].get(torch.arange(T)), 2 * states())


def test_a_file_that_is_closed_before_it_is_sealed_goes(path):
    file = StateFile.create(path, T, W, torch.float32)
    assert path.is_file()
    file.close()
    file.close()
    assert list(path.parent.iterdir()) == []


# Disks


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_beginning(path, monkeypatch):
    sealed(path)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(
        OutputError, match=r"prefix\.safetensors cannot .*No space.*`prefix_dir` at a"
    ):
        StateFile.create(path, T, W, torch.float32)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(
        OutputError, match=r"locft-.*\.states cannot be written.*lower `prefix_disk_gib`"
    ):
        StateFile.temporary(T, W, torch.float32, str(path.parent))
    assert list(path.parent.iterdir()) == []


def test_room_is_reserved_at_once(path):
    file = StateFile.create(path, 2**16, W, torch.float32)
    assert os.stat(path).st_size >= 2**16 * W * 4
    assert os.stat(path).st_blocks * 512 >= 2**16 * W * 4
    file.close()


def test_a_system_that_cannot_reserve(path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(load_file(sealed(path))["states"], states())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="`prefix_dir`"):
        StateFile.create(tmp_path / "file" / "prefix", T, W, torch.float32)
    with pytest.raises(OutputError, match="`prefix_dir`"):
        StateFile.temporary(T, W, torch.float32, str(tmp_path / "file"))


def test_a_disk_that_is_full_in_the_middle(path, monkeypatch):
    sealed(path)
    write, written = os.pwrite, []

    def soon_full(descriptor, data, offset):
        written.append(len(data))
        return no_space() if len(written) > 2 else write(descriptor, data, offset)

    file = StateFile.create(path, T, W, torch.float32)
    monkeypatch.setattr(os, "pwrite", soon_full)
    with pytest.raises(
        OutputError, match=r"prefix\.safetensors cannot be written: No space left.*Free some space"
    ):
        file.put(torch.arange(0, T, 2), states()[::2])
    assert len(written) == 3
    refused(path, "there is none")
    file.close()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_is_full_when_it_is_sealed(step, path, monkeypatch):
    file = StateFile.create(path, T, W, torch.float32)
    file.put(torch.arange(T), states())
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(OutputError, match="No space left"):
        file.seal("a model")
    refused(path, "there is none")


def test_writes_that_come_out_short_go_on(path, monkeypatch):
    write, sizes = os.pwrite, []

    def short(descriptor, data, offset):
        sizes.append(min(7, len(data)))
        return write(descriptor, data[: sizes[-1]], offset)

    monkeypatch.setattr(os, "pwrite", short)
    sealed(path)
    assert sum(sizes) == T * W * 4
    assert torch.equal(load_file(path)["states"], states())


# Rows


@pytest.mark.parametrize("bad", [states(torch.float16), states()[:, :-1], states()[:-1]])
def test_rows_of_another_form_are_refused(bad, path):
    file = StateFile.create(path, T, W, torch.float32)
    with pytest.raises(ValueError, match=r"are no rows of 5 torch.float32 for 23 tokens"):
        file.put(torch.arange(T), bad)
    file.close()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, T - 1), unique=True), max_size=6),
    asked=st.lists(st.integers(0, T - 1)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_puts_and_gets(steps, asked, dtype):
    file = StateFile.temporary(T, W, dtype)
    expected = torch.zeros(T, W, dtype=dtype)
    for number, tokens in enumerate(steps):
        where = torch.tensor(tokens, dtype=torch.long)
        rows = states(dtype, len(tokens)) + number
        file.put(where, rows)
        expected[where] = rows
        # What is read is what was written last.
        assert torch.equal(file.get(where), rows)
    where = torch.tensor(asked, dtype=torch.long)
    assert torch.equal(file.get(where), expected[where])
    file.close()
