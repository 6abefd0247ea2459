"""Every way in which files, headers and index can fail to agree is found before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.nn.weights.files import INDEX, entry, read_index, save, write_index, write_raw

from penstock.nn.weights.errors import (
    CheckpointError,
    DuplicateTensor,
    IndexDisagrees,
    MalformedFile,
    MissingShard,
    NoCheckpoint,
    TrailingBytes,
    TruncatedShard,
)
from penstock.nn.weights.headers import DTYPE_BITS, MAX_HEADER_BYTES, read_checkpoint, read_header

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 5),
    "d": torch.tensor(3, dtype=torch.int64),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shard = read_header(tmp_path / "model.safetensors")
    raw = shard.path.read_bytes()
    assert {t.name for t in shard.tensors} == set(TENSORS)
    for stored in shard.tensors:
        expected = TENSORS[stored.name]
        assert stored.shape == tuple(expected.shape)
        assert (stored.end - stored.start) * 8 == expected.numel() * DTYPE_BITS[stored.dtype]
        if expected.numel():
            assert raw[stored.start : stored.end] == expected.view(-1).view(torch.uint8).numpy().tobytes()
    assert [t.start for t in shard.tensors] == sorted(t.start for t in shard.tensors)


def test_an_empty_file_of_tensors_is_fine(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x", {}, b"")).tensors == ()


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}
BAD_HEADERS: dict[str, tuple[Any, bytes, type, str]] = {
    "not JSON": ("{nope", b"", MalformedFile, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", MalformedFile, "not valid JSON"),
    "an array": ([1], b"", MalformedFile, "must hold a JSON object"),
    "nested too deep": ("[" * 100_000, b"", MalformedFile, "not valid JSON"),
    "tensor is no object": ({"a": 3}, b"", MalformedFile, "a: needs dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), MalformedFile, "a: needs dtype"),
    "negative size": ({"a": entry("F32", [-1], 0, 4)}, bytes(4), MalformedFile, "a: needs dtype"),
    "fractional size": ({"a": {**TWO["a"], "shape": [2.0]}}, bytes(8), MalformedFile, "a: needs dtype"),
    "boolean size": ({"a": {**TWO["a"], "shape": [True]}}, bytes(8), MalformedFile, "a: needs dtype"),
    "three offsets": ({"a": {**TWO["a"], "data_offsets": [0, 8, 8]}}, bytes(8), MalformedFile, "a: needs dtype"),
    "unknown dtype": ({"a": entry("F12", [2], 0, 8)}, bytes(8), MalformedFile, "unknown dtype 'F12'"),
    "shape over size": ({"a": entry("F32", [3], 0, 8)}, bytes(8), MalformedFile, "needs 12 bytes"),
    "end before start": ({"a": entry("F32", [0], 8, 0)}, bytes(8), MalformedFile, r"offsets are \[8, 0\)"),
    "overlap": ({**TWO, "b": entry("U8", [4], 4, 8)}, bytes(8), MalformedFile, "b overlaps"),
    "gap": ({**TWO, "b": entry("U8", [4], 12, 16)}, bytes(16), MalformedFile, "b leaves a gap"),
    "gap at the front": ({"b": entry("U8", [4], 8, 12)}, bytes(12), MalformedFile, "b leaves a gap"),
    "a name twice": (
        '{"a": %s, "a": %s}' % (json.dumps(TWO["a"]), json.dumps(entry("U8", [4], 8, 12))),  # noqa: UP031
        bytes(12),
        DuplicateTensor,
        "a occurs twice",
    ),
    "truncated": (TWO, bytes(11), TruncatedShard, "truncated: .* bytes"),
    "trailing bytes": (TWO, bytes(13), TrailingBytes, "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(case: str, tmp_path: Path) -> None:
    """Each is a typed error in one line that names the file."""
    header, payload, kind, text = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, payload)
    with pytest.raises(kind, match=text) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_header_length_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x01\x02")
    with pytest.raises(TruncatedShard, match="2 bytes"):
        read_header(path)
    with pytest.raises(TruncatedShard, match="header needs 1008 bytes"):
        read_header(write_raw(path, "{}", b"", length=1000))
    with pytest.raises(MalformedFile, match="over the limit"):
        read_header(write_raw(path, "{}", b"", length=MAX_HEADER_BYTES + 1))
    with pytest.raises(MalformedFile, match="over the limit"):
        read_header(write_raw(path, "{}", b"", length=2**64 - 1))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_accepts_a_damaged_file_only_if_the_library_does(data: st.DataObject, tmp_path: Path) -> None:
    """Any change of one to three bytes: ours raises a CheckpointError or the safetensors library reads the file too."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"[]{},: ')))
    end = data.draw(st.integers(len(raw) - 9, len(raw) + 9))
    path.write_bytes(bytes(raw[:end]) + bytes(max(0, end - len(raw))))
    try:
        shard = read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {t.name for t in shard.tensors}


def test_absent_or_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="no such directory"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(NoCheckpoint, match="no safetensors file$"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NoCheckpoint, match="convert them to safetensors"):
        read_checkpoint(tmp_path)


def test_which_files_are_read(tmp_path: Path) -> None:
    """The single file wins over an index, an index over strays; numbered ones need none; two others are refused."""
    save_file({"x": TENSORS["a"]}, tmp_path / "only.safetensors")
    assert [s.path.name for s in read_checkpoint(tmp_path).shards] == ["only.safetensors"]
    save_file({"x": TENSORS["a"]}, tmp_path / "consolidated.safetensors")
    with pytest.raises(NoCheckpoint, match="2 safetensors files but neither"):
        read_checkpoint(tmp_path)
    save(tmp_path, TENSORS, num_shards=2)
    sharded = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [s.path.name for s in read_checkpoint(tmp_path).shards] == sharded
    (tmp_path / INDEX).unlink()
    assert [s.path.name for s in read_checkpoint(tmp_path).shards] == sharded
    (tmp_path / sharded[0]).unlink()
    with pytest.raises(MissingShard, match=sharded[0]):
        read_checkpoint(tmp_path)
    save(tmp_path, TENSORS)
    assert [s.path.name for s in read_checkpoint(tmp_path).shards] == ["model.safetensors"]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path, TENSORS, num_shards=2)  # a, c and b, d
    return tmp_path


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingShard, match="missing shard model-00002-of-00002.safetensors"):
        read_checkpoint(sharded)


def test_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedShard, match=path.name):
        read_checkpoint(sharded)


def test_index_names_a_tensor_that_is_nowhere(sharded: Path) -> None:
    write_index(sharded, {**read_index(sharded), "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(IndexDisagrees, match="ghost is not in model-00001-of-00002"):
        read_checkpoint(sharded)


def test_index_puts_a_tensor_into_the_wrong_shard(sharded: Path) -> None:
    write_index(sharded, {**read_index(sharded), "a": "model-00002-of-00002.safetensors"})
    with pytest.raises(IndexDisagrees, match="a is in model-00001-of-00002.safetensors, not in model-00002"):
        read_checkpoint(sharded)


def test_index_forgets_a_tensor(sharded: Path) -> None:
    weight_map = read_index(sharded)
    del weight_map["a"]
    write_index(sharded, weight_map)
    with pytest.raises(IndexDisagrees, match=r"model-00001-of-00002.safetensors: a is not named by"):
        read_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    part = {"a": TENSORS["a"], "b": TENSORS["b"], "d": TENSORS["d"]}
    save_file(part, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(DuplicateTensor, match="a is stored in both .*00001-of-00002.safetensors and .*00002-of-00002"):
        read_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [["a", "b"]], "x"])
def test_index_without_a_map(weight_map: Any, sharded: Path) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(MalformedFile, match="weight_map must be an object"):
        read_checkpoint(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "", ".", "..", "a\\b", 3, None, {"x": 1}])
def test_index_leads_nowhere_else(file: Any, sharded: Path) -> None:
    """An index may name files of its own directory only."""
    write_index(sharded, {**read_index(sharded), "a": file})
    with pytest.raises(MalformedFile, match="which is not a file name"):
        read_checkpoint(sharded)


def test_index_maps_a_tensor_twice(sharded: Path) -> None:
    text = (sharded / INDEX).read_text().replace('"a": ', '"a": "model-00002-of-00002.safetensors", "a": ')
    (sharded / INDEX).write_text(text)
    with pytest.raises(DuplicateTensor, match="a is mapped to both"):
        read_checkpoint(sharded)


def test_index_that_is_no_json(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    with pytest.raises(MalformedFile, match="not valid JSON"):
        read_checkpoint(sharded)
