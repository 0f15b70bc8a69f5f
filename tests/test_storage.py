"""Facts about the store of one share file: exact, refusing what is damaged, and whole after any interruption.

Every file, hostile ones included, lives below pytest's tmp_path.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from filelock import FileLock

from share_diffusion import container, storage
from share_diffusion.storage import ConflictError, StorageError, read, read_header, read_tensors, verify, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
METADATA = {"name": "Zoë", "rank": 4, "nested": {"list": [1, 2.5, None, True, "x"]}, "from the future": {"a": []}}


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, a scalar, an empty one, a transposed one and awkward names."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator) * 50
    tensors = {f"of {code}": values.abs().to(dtype) for code, dtype in container.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 7), "transposed": values.T}
    return tensors | {'ünï "code" \\ \n\x01\x7f/': torch.tensor([-0.0, 1e-40, 3e38])}


def small(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), float(value)), "b": torch.arange(6)}


def create(path: Path, generations: int = 1) -> Path:
    """Write the content small(1), small(2), ... one generation after another."""
    for generation in range(1, generations + 1):
        write(path, small(generation), METADATA, expected_generation=generation - 1 or None)
    return path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes are equal (so that -0.0 differs from 0.0)."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bytes(container.raw_bytes(left[name])) == bytes(container.raw_bytes(right[name]))
        for name in left
    )


def junk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".holder")))


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- content -----------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    tensors = every_dtype()
    assert write(tmp_path / "f", tensors, METADATA, expected_generation=None) == 1
    metadata, loaded, generation = read(tmp_path / "f")
    assert same(tensors, loaded)
    assert (metadata, generation) == (METADATA, 1)


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, every_dtype(), METADATA, expected_generation=None)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == [container.METADATA_KEY]
    assert same(safetensors.torch.load_file(path), every_dtype())
    dense = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    assert safetensors.torch.save(dense, metadata) == path.read_bytes()


def test_same_content_in_any_order_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "f", every_dtype(), METADATA, expected_generation=None)
    backwards = dict(reversed(every_dtype().items())), dict(reversed(METADATA.items()))
    write(tmp_path / "g", *backwards, expected_generation=None)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


def test_saving_what_was_read_changes_the_generation_and_checksum_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, every_dtype(), METADATA, expected_generation=None)
    first, size = read_header(path), path.stat().st_size
    for expected in range(1, 6):
        metadata, tensors, generation = read(path)
        assert generation == expected
        assert write(path, tensors, metadata, expected_generation=generation) == expected + 1
    metadata, tensors, _ = read(path)
    assert (metadata, read_header(path).tensors) == (METADATA, first.tensors)
    assert same(tensors, every_dtype())
    assert path.stat().st_size == size
    assert container.pack(tensors, metadata, 1) == container.pack(every_dtype(), METADATA, 1)
    assert b"".join(container.pack(tensors, metadata, 6)) == path.read_bytes()


def test_checksum_is_the_hash_of_the_file_without_it(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    share = json.loads(fields["__metadata__"]["share"])
    told = share.pop("checksum")
    fields["__metadata__"]["share"] = json.dumps(share, sort_keys=True, separators=(",", ":"))
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert told == "sha256:" + hashlib.sha256(struct.pack("<Q", len(text)) + text + raw[8 + length :]).hexdigest()


def test_content_changes_the_checksum_down_to_a_name_and_a_shape() -> None:
    def told(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str:
        head, body = container.pack(tensors, metadata, 1)
        return container.parse(head[8:], len(head) + len(body)).checksum

    zeros = torch.zeros(2, 3)
    variants = [({"a": zeros}, {}), ({"b": zeros}, {}), ({"a": zeros.T}, {}), ({"a": zeros.int()}, {})]
    variants += [({"a": zeros}, {"x": 1}), ({"a": zeros + 1}, {})]
    assert len({told(*variant) for variant in variants}) == len(variants)


def test_named_tensors_are_read_without_the_rest(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    header = read_header(path)
    raw = bytearray(path.read_bytes())
    raw[header.body_start + header.tensors["b"].offsets[0]] ^= 1
    path.write_bytes(raw)
    assert same(read_tensors(path, ["a"]), {"a": small()["a"]})
    assert read_tensors(path, []) == {}
    with pytest.raises(StorageError, match=r"holds no tensor 'x', 'y' \(2 of 3 names missing\)"):
        read_tensors(path, ["a", "x", "y"])


def test_loaded_tensors_survive_truncation_of_the_file(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    _, tensors, _ = read(path)
    os.truncate(path, 0)
    assert same(tensors, small())
    tensors["a"] += 1


def test_ten_thousand_tensors_list_quickly_and_without_their_body(tmp_path: Path) -> None:
    path = tmp_path / "f"
    tensors = {f"concept {number:05d}": torch.full((8,), float(number)) for number in range(10_000)}
    write(path, tensors, {"k": 1}, expected_generation=None)
    start = time.perf_counter()
    header = read_header(path)
    assert time.perf_counter() - start < 3  # 0.05 to 0.13 s measured; the rest is for a busy machine
    assert len(header.tensors) == 10_000
    with open(path, "r+b") as file:
        file.seek(header.body_start)
        file.write(b"\xff" * (path.stat().st_size - header.body_start))
    assert read_header(path) == header
    with pytest.raises(StorageError):
        verify(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused_when_writing_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: torch.dtype
) -> None:
    tensors = small() | {"the bad one": torch.tensor([0, value], dtype=dtype)}
    with pytest.raises(StorageError, match="was not written: tensor 'the bad one' holds NaN or infinity"):
        write(tmp_path / "f", tensors, {}, expected_generation=None)
    assert not (tmp_path / "f").exists()
    with monkeypatch.context() as patch:
        patch.setattr(container, "require_storable", lambda tensors: None)
        write(tmp_path / "f", tensors, {}, expected_generation=None)
    for attempt in (verify, lambda path: read(path, verify=False), lambda path: read_tensors(path, ["the bad one"])):
        with pytest.raises(StorageError, match="is unusable: tensor 'the bad one' holds NaN or infinity"):
            attempt(tmp_path / "f")


UNSTORABLE = {
    "float8": ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, {}, "not one of I64, F64"),
    "complex": ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, "cast it first"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, {}, "make it dense first"),
    "meta": ({"a": torch.empty(2, device="meta")}, {}, "make it dense first"),
    "reserved name": ({"__metadata__": torch.zeros(1)}, {}, "needs another name"),
    "surrogate": ({"\ud800": torch.zeros(1)}, {}, "needs another name"),
    "integer key": ({}, {1: "a"}, "would not come back as it is"),
    "tuple": ({}, {"a": (1, 2)}, "would not come back as it is"),
    "nan": ({}, {"a": math.nan}, "cannot be written as JSON"),
    "object": ({}, {"a": Path("x")}, "cannot be written as JSON"),
    "large metadata": ({}, {"a": "x" * container.MAX_METADATA_BYTES}, "above the limit of 4,194,304"),
    "long names": ({"x" * 2**20 * n: torch.zeros(1) for n in range(1, 7)}, {}, "above the limit of 16,777,216"),
}


@pytest.mark.parametrize("case", UNSTORABLE)
def test_content_that_could_not_be_read_back_is_not_written(tmp_path: Path, case: str) -> None:
    tensors, metadata, message = UNSTORABLE[case]
    with pytest.raises(StorageError, match=message) as caught:
        write(tmp_path / "f", tensors, metadata, expected_generation=None)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "f").exists()
    assert junk(tmp_path) == []


def test_metadata_may_nest_to_the_limit_and_no_deeper(tmp_path: Path) -> None:
    def nested(levels: int) -> dict[str, Any]:
        return {} if levels == 1 else {"a": nested(levels - 1)}

    deepest = nested(container.MAX_METADATA_DEPTH)
    write(tmp_path / "f", {}, deepest, expected_generation=None)
    assert read(tmp_path / "f")[0] == deepest
    circular: dict[str, Any] = {}
    circular["a"] = circular
    for metadata in (nested(container.MAX_METADATA_DEPTH + 1), circular):
        with pytest.raises(StorageError, match="nested more than 64 levels deep"):
            write(tmp_path / "g", {}, metadata, expected_generation=None)


# --- damage and hostility ----------------------------------------------------------------------------------------


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """Damage bytes the way disks, transfers and people do."""
    at, other, length = chance.randrange(len(raw)), chance.randrange(len(raw)), chance.randrange(1, 600)
    kind = chance.choice(["flip", "flip", "flip", "zero", "swap", "cut", "cut front", "append", "insert", "noise"])
    data = bytearray(raw)
    if kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "swap":
        first, second = sorted((at % (len(raw) // 2), len(raw) // 2 + other % (len(raw) // 2 - 64)))
        data[first : first + 64], data[second : second + 64] = data[second : second + 64], data[first : first + 64]
    elif kind == "noise":
        data[at : at + length] = chance.randbytes(len(data[at : at + length]))
    elif kind == "cut":
        del data[at:]
    elif kind == "cut front":
        del data[: at + 1]
    else:
        where = len(data) if kind == "append" else at
        data[where:where] = chance.choice([b"\0", b" ", b"PK\x05\x06", chance.randbytes(length)])
    return bytes(data)


def test_no_mutant_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "f", every_dtype() | {"w": torch.randn(20, 20)}, METADATA, expected_generation=None)
    raw, chance, refused = (tmp_path / "f").read_bytes(), random.Random(1), 0
    while refused < 300:
        mutant = mutate(raw, chance)
        if mutant == raw:
            continue
        (tmp_path / "f").write_bytes(mutant)
        with pytest.raises(StorageError):
            read(tmp_path / "f")
        refused += 1


def is_accepted(raw: bytes) -> bool:
    """Whether a file of these bytes would be read."""
    try:
        length = container.header_length(raw[:8], len(raw))
        header = container.parse(raw[8 : 8 + length], len(raw))
    except container.FormatError:
        return False
    return container.checksum(header, [raw[header.body_start :]]) == header.checksum


def test_every_single_bit_of_a_file_is_guarded() -> None:
    raw = b"".join(container.pack({"é": torch.ones(1)}, {"Zoë": [1]}, 1))
    assert is_accepted(raw)
    for position in range(8 * len(raw)):
        mutant = bytearray(raw)
        mutant[position // 8] ^= 1 << position % 8
        assert not is_accepted(bytes(mutant))


def test_every_truncation_of_a_file_is_refused() -> None:
    raw = b"".join(container.pack(small(), METADATA, 1))
    assert not any(is_accepted(raw[:length]) for length in range(len(raw)))


def spelled(text: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header text, whatever it says."""
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def share_text(**changes: Any) -> str:
    """The JSON spelling of a valid share metadata block with some fields changed (None takes a field away)."""
    fields = {"checksum": "sha256:", "content": {}, "format": "share-subspace", "format_version": 1, "generation": 1}
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets}, separators=(",", ":"))


def with_entries(*entries: str, share: str | None = None, body: int = 4) -> bytes:
    """A file with one valid metadata block and these `"name":{...}` entries."""
    block = json.dumps({"share": share_text() if share is None else share}, separators=(",", ":"))
    text = "{" + ",".join([f'"__metadata__":{block}', *entries]) + "}"
    return spelled(text + " " * (-len(text) % 8), bytes(body))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cut short"),
    "three bytes": (lambda: b"abc", "cut short"),
    "length 2^63": (lambda: spelled("{}", length=2**63), "cut short"),
    "length 2^64-1": (lambda: spelled("{}", length=2**64 - 1), "cut short"),
    "header of 17 MB": (lambda: spelled(b" " * 17 * 2**20), "above the limit of 16,777,216"),
    "pickle": (lambda: b"\x80\x02}q\x00." * 100, "no safetensors file"),
    "not JSON": (lambda: spelled("{]"), "not valid JSON"),
    "not UTF-8": (lambda: spelled(b'{"\xff":1}'), "not valid JSON"),
    "UTF-16": (lambda: spelled('{"a":1}'.encode("utf-16")), "not valid JSON"),
    "a list": (lambda: spelled("[]"), "not a JSON object"),
    "NaN": (lambda: with_entries(share=share_text(content={"a": math.nan}), body=0), "cannot be written as JSON"),
    "long number": (lambda: spelled('{"a":' + "9" * 10**6 + "}"), "not valid JSON"),
    "deep JSON": (lambda: spelled("[" * 10**7), "nested too deeply"),
    "deep objects": (lambda: spelled('{"a":' * 10**5), "nested too deeply"),
    "deep metadata": (lambda: with_entries(share='{"a":' * 10**5), "nested too deeply"),
    "no metadata": (lambda: spelled("{" + f'"a":{entry()}' + "}", bytes(4)), "no share file"),
    "metadata is text": (lambda: spelled('{"__metadata__":"share"}'), "no share file"),
    "share is a number": (lambda: spelled('{"__metadata__":{"share":1}}'), "no share file"),
    "second metadata key": (
        lambda: spelled('{"__metadata__":' + json.dumps({"share": share_text(), "x": "y"}) + "}"),
        "not spelled the way it is written",
    ),
    "large metadata": (lambda: with_entries(share=" " * 5 * 2**20), "above the limit of 4,194,304"),
    "other format": (lambda: with_entries(share=share_text(format="else")), "has the format 'else'"),
    "no version": (lambda: with_entries(share=share_text(format_version=None)), "fields of its share metadata"),
    "version true": (lambda: with_entries(share=share_text(format_version=True)), "fields of its share metadata"),
    "version 0": (lambda: with_entries(share=share_text(format_version=0)), "fields of its share metadata"),
    "generation 0": (lambda: with_entries(share=share_text(generation=0)), "fields of its share metadata"),
    "generation 1.0": (lambda: with_entries(share=share_text(generation=1.0)), "fields of its share metadata"),
    "content is a list": (lambda: with_entries(share=share_text(content=[])), "fields of its share metadata"),
    "extra field": (lambda: with_entries(share=share_text(more=1)), "fields of its share metadata"),
    "infinite number": (
        lambda: with_entries(share=share_text(content={"a": 7}).replace("7", "1e999"), body=0),
        "cannot be written as JSON",
    ),
    "duplicate tensor": (lambda: with_entries(f'"a":{entry()}', f'"a":{entry()}'), "a key twice"),
    "duplicate field": (
        lambda: with_entries('"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
        "a key twice",
    ),
    "duplicate metadata": (
        lambda: with_entries(share=share_text(content={"_x": 1, "_y": 1}).replace("_y", "_x"), body=0),
        "a key twice",
    ),
    "many duplicates": (lambda: with_entries(*[f'"{n}":1' for n in range(400_000)], '"7":1'), "malformed"),
    "overlap": (lambda: with_entries(f'"a":{entry()}', f'"b":{entry(offsets=(2, 6))}', body=6), "an overlap, a hole"),
    "hole": (lambda: with_entries(f'"a":{entry()}', f'"b":{entry(offsets=(8, 12))}', body=12), "an overlap, a hole"),
    "same place": (lambda: with_entries(f'"a":{entry()}', f'"b":{entry()}'), "an overlap, a hole"),
    "negative": (lambda: with_entries(f'"a":{entry(offsets=(-4, 0))}'), "an overlap, a hole"),
    "overflow": (lambda: with_entries(f'"a":{entry(offsets=(2**64 - 4, 2**64))}'), "an overlap, a hole"),
    "offsets are text": (lambda: with_entries(f'"a":{entry(offsets="04")}'), "an overlap, a hole"),
    "offsets are decimals": (lambda: with_entries(f'"a":{entry(offsets=(0.0, 4.0))}'), "not spelled the way"),
    "three offsets": (lambda: with_entries(f'"a":{entry(offsets=(0, 4, 4))}'), "an overlap, a hole"),
    "shape too small": (lambda: with_entries(f'"a":{entry(offsets=(0, 8))}', body=8), "or another shape"),
    "shape too large": (lambda: with_entries(f'"a":{entry(shape=(2,))}'), "or another shape"),
    "shape overflows": (lambda: with_entries(f'"a":{entry(shape=(2**32, 2**32))}'), "impossible shape"),
    "shape overflows to 0": (lambda: with_entries(f'"a":{entry(shape=(2**62, 4, 0), offsets=(0, 0))}'), "impossible"),
    "negative size": (lambda: with_entries(f'"a":{entry(shape=(-1,))}'), "has the shape"),
    "size true": (lambda: with_entries(f'"a":{entry(shape=(True,))}'), "has the shape"),
    "size null": (lambda: with_entries(f'"a":{entry(shape=None)}'), "has no shape"),
    "million axes": (lambda: with_entries(f'"a":{entry(shape=(1,) * 10**6)}'), "more than 64 axes"),
    "million digits": (lambda: with_entries(f'"a":{entry(shape=(10**4000,) * 64)}'), "has the shape"),
    "unknown dtype": (lambda: with_entries(f'"a":{entry("F8_E4M3")}'), "as 'F8_E4M3', not one of"),
    "dtype is a list": (lambda: with_entries(f'"a":{entry(["F32"])}'), "not one of"),
    "entry is text": (lambda: with_entries('"a":"b"'), "malformed"),
    "extra entry field": (
        lambda: with_entries('"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0}'),
        "malform",
    ),
    "petabyte": (lambda: with_entries(f'"a":{entry(shape=(2**48,), offsets=(0, 2**50))}'), "which accounts for"),
    "appended": (lambda: with_entries(f'"a":{entry()}', body=5), "5 bytes follow the header"),
    "missing": (lambda: with_entries(f'"a":{entry()}', body=3), "3 bytes follow the header"),
    "order": (lambda: with_entries(f'"b":{entry()}', f'"a":{entry(offsets=(4, 8))}', body=8), "an overlap, a hole"),
    "order in the header": (
        lambda: with_entries(f'"b":{entry(offsets=(4, 8))}', f'"a":{entry()}', body=8),
        "not spelled the way",
    ),
    "white space": (lambda: with_entries(f' "a":{entry()}'), "not spelled the way"),
    "too many tensors": (
        lambda: with_entries(*[f'"{n}":{{"shape":[0]}}' for n in range(200_001)]),
        "200,001 tensors, above the limit of 200,000",
    ),
    "surrogate in a name": (lambda: with_entries(f'"\\ud800":{entry()}'), "surrogates not allowed"),
    "script in a name": (
        lambda: with_entries('"</script>\\u001b[31m":1'),
        r"tensor '</script>\\x1b\[31m' is malformed",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_quickly_with_a_short_message(tmp_path: Path, case: str) -> None:
    build, message = HOSTILE[case]
    (tmp_path / "f").write_bytes(build())
    for attempt in (read_header, read, lambda path: read_tensors(path, ["a"])):
        start = time.perf_counter()
        with pytest.raises(StorageError, match=message) as caught:
            attempt(tmp_path / "f")
        assert time.perf_counter() - start < 2
        assert len(str(caught.value).replace(str(tmp_path), "")) < 500


def test_newer_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(with_entries(share=share_text(format_version=2, novelty={})))
    with pytest.raises(StorageError, match="format version 2, newer than version 1 known here: upgrade share-diffusion"):
        read_header(tmp_path / "f")


def test_ordinary_safetensors_file_is_told_apart(tmp_path: Path) -> None:
    safetensors.torch.save_file(small(), tmp_path / "f", {"format": "pt"})
    with pytest.raises(StorageError, match="is a safetensors file but no share file"):
        read(tmp_path / "f")


def test_damage_names_the_backup_only_when_it_is_sound(tmp_path: Path) -> None:
    path = create(tmp_path / "f", 2)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StorageError, match=r"f is damaged: .*; its backup is sound: copy .*f\.bak over it"):
        verify(path)
    os.truncate(tmp_path / "f.bak", 40)
    with pytest.raises(StorageError, match=r"there is no sound backup beside it \(f\.bak\)"):
        verify(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    messages = {
        "fifo": "not a regular",
        "folder": "not a regular",
        "dangling": "ENOENT",
        "loop": "ELOOP",
        "x": "ENOENT",
    }
    start = time.perf_counter()
    for name, message in messages.items():
        for attempt in (read_header, read, lambda path: read_tensors(path, ["a"])):
            with pytest.raises(StorageError, match=message):
                attempt(tmp_path / name)
    for name in ("fifo", "folder"):
        with pytest.raises(StorageError, match="is not a regular file"):
            write(tmp_path / name, {}, {}, expected_generation=None, replace=True)
    assert time.perf_counter() - start < 1
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


# --- generations and backup --------------------------------------------------------------------------------------


def test_stale_generation_leaves_the_file_untouched(tmp_path: Path) -> None:
    path = create(tmp_path / "f", 3)
    before = path.read_bytes()
    cases = {2: "generation 2 was read but it is at 3 now", 4: "it is at 3 now", None: "exists already: read it"}
    for expected, message in cases.items():
        with pytest.raises(ConflictError, match=message):
            write(path, small(9), {}, expected_generation=expected)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(ConflictError, match="is gone: generation 3 was read"):
        write(path, small(9), {}, expected_generation=3)
    assert not path.exists()
    assert junk(tmp_path) == []


def test_replace_overwrites_and_counts_on(tmp_path: Path) -> None:
    path = create(tmp_path / "f", 3)
    assert write(path, small(9), {}, expected_generation=None, replace=True) == 4
    assert write(tmp_path / "new", small(9), {}, expected_generation=None, replace=True) == 1
    with pytest.raises(ValueError, match="pass None instead of 4"):
        write(path, small(), {}, expected_generation=4, replace=True)


def test_backup_is_the_previous_generation(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    assert not storage.backup_path(path).exists()
    for generation in (2, 3, 4):
        before = path.read_bytes()
        write(path, small(generation), METADATA, expected_generation=generation - 1)
        assert storage.backup_path(path).read_bytes() == before
    assert same(read(storage.backup_path(path))[1], small(3))
    assert sorted(os.listdir(tmp_path)) == [".f.lock", "f", "f.bak"]


@pytest.mark.parametrize("damage", ["header", "body"])
def test_damaged_file_never_pushes_the_backup_out(tmp_path: Path, damage: str) -> None:
    path = create(tmp_path / "f", 2)
    kept = storage.backup_path(path).read_bytes()
    raw = bytearray(path.read_bytes())
    raw[20 if damage == "header" else -1] ^= 1
    path.write_bytes(raw)
    assert write(path, small(3), METADATA, expected_generation=None, replace=True) == 3
    assert storage.backup_path(path).read_bytes() == kept
    assert same(read(path)[1], small(3))


def test_backup_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*names: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    path = create(tmp_path / "f")
    path.chmod(0o640)
    before = path.read_bytes()
    monkeypatch.setattr(os, "link", link)
    write(path, small(2), METADATA, expected_generation=1)
    assert storage.backup_path(path).read_bytes() == before
    assert stat.S_IMODE(storage.backup_path(path).stat().st_mode) == 0o640
    assert junk(tmp_path) == []


def test_backup_that_already_is_the_file_leaves_no_spare_name(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    os.link(path, storage.backup_path(path))  # as after a crash between backup and rename
    write(path, small(2), METADATA, expected_generation=1)
    assert junk(tmp_path) == []
    assert same(read(storage.backup_path(path))[1], small(1))


# --- links, modes, leftovers -------------------------------------------------------------------------------------


def test_symlink_stays_and_its_target_is_updated(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = create(tmp_path / "real" / "f")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert write(link, small(2), {}, expected_generation=1) == 2
    assert link.is_symlink()
    assert same(read(path)[1], small(2))
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert storage.backup_path(link) == storage.backup_path(path)


def test_dangling_symlink_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "f")
    create(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(read(tmp_path / "f")[1], small(1))


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o755])
def test_mode_is_kept(tmp_path: Path, mode: int) -> None:
    path = create(tmp_path / "f")
    path.chmod(mode)
    write(path, small(2), {}, expected_generation=1)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_new_file_obeys_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        create(tmp_path / "f")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_leftovers_of_dead_writers_go_and_nothing_else(tmp_path: Path) -> None:
    path = create(tmp_path / "f.x")
    kept = [
        ".f.x.12.0123abcd.tmp.y",
        ".f_x.12.0123abcd.tmp",
        "f.x.12.0123abcd.tmp",
        ".f.x.me.tmp",
        ".g.12.0123abcd.tmp",
    ]
    for name in [*kept, ".f.x.12.0123abcd.tmp", ".f.x.99999.ffffffff.tmp"]:
        (tmp_path / name).write_text("?")
    write(path, small(2), {}, expected_generation=1)
    assert sorted(set(os.listdir(tmp_path)) - {".f.x.lock", "f.x", "f.x.bak"}) == sorted(kept)


# --- failures ----------------------------------------------------------------------------------------------------


def failing(real: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
    """A system call whose `at`-th use fails with this error."""
    calls = iter(range(10**6))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write 0", "write 1", "fsync 0", "close 0", "link 0", "replace 0", "replace 1"])
def test_failing_call_leaves_the_old_file_and_no_junk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    name, at = call.split()
    path = create(tmp_path / "f")
    before = path.read_bytes()
    with storage.locked(path):  # so that the lock itself is not what fails
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), int(at), code))
            with pytest.raises(StorageError, match=rf"f: cannot write [\d,]+ bytes .*{errno.errorcode[code]}\); "):
                write(path, small(2), {}, expected_generation=1)
        assert path.read_bytes() == before
        assert not [left for left in junk(tmp_path) if left.endswith(".tmp")]
        assert write(path, small(2), {}, expected_generation=1) == 2


def test_failing_sync_of_the_folder_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "f")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 1, errno.EIO))
    with pytest.raises(StorageError, match="the new version, now in place, would survive a power failure"):
        write(path, small(2), {}, expected_generation=1)
    assert read(path)[2] == 2


def test_interrupt_leaves_the_old_file_and_no_junk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    path = create(tmp_path / "f")
    for name in ("write", "fsync", "link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(path, small(2), {}, expected_generation=1)
        assert read(path)[2] == 1
        assert junk(tmp_path) == []


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "f")
    before = path.read_bytes()
    monkeypatch.setattr(storage, "disk_usage", lambda folder: SimpleNamespace(total=10**9, free=100))
    monkeypatch.setattr(os, "write", lambda *arguments: pytest.fail("wrote something"))
    with pytest.raises(StorageError, match=r"cannot write [\d,]+ bytes .*: only 100 bytes are free \(ENOSPC\); free some"):
        write(path, small(2), {}, expected_generation=1)
    assert path.read_bytes() == before


def test_data_reaches_the_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = create(tmp_path / "f"), []

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            kind = name
            if name == "fsync":
                kind = "fsync folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "fsync file"
            order.append(kind)
            return real(*arguments)

        return call

    for name in ("write", "fsync", "link", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write(path, small(2), {}, expected_generation=1)
    assert order == ["write", "write", "fsync file", "link", "replace", "replace", "fsync folder"]


def test_missing_folder_is_named_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no folder .*nowhere \(ENOENT\); .*create the folder first"):
        write(tmp_path / "nowhere" / "f", {}, {}, expected_generation=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_folder_that_admits_no_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(*arguments: Any, **options: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match=rf"f: cannot lock it: .* \({errno.errorcode[code]}\); (the disk|check the)"):
        write(tmp_path / "f", {}, {}, expected_generation=None)


@needs_fork
def test_limit_on_file_sizes_is_told_and_harmless(tmp_path: Path) -> None:
    path = create(tmp_path / "f")

    def limited() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(StorageError, match=r"cannot write [\d,]+ bytes .*EFBIG\); raise the limit on file sizes"):
            write(path, {"large": torch.zeros(5000)}, {}, expected_generation=1)
        assert junk(tmp_path) == []

    assert in_child(limited) == 0
    assert same(read(path)[1], small(1))


def test_name_too_long_for_the_temporary_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="choose a shorter name"):
        write(tmp_path / ("n" * 250), {}, {}, expected_generation=None)


def test_read_only_folder_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(StorageError, match=r"EACCES.*check the permissions of the file and its folder"):
        write(folder / "f", {}, {}, expected_generation=None)


# --- crashes -----------------------------------------------------------------------------------------------------

STEPS = ("open", "fchown", "fchmod", "write", "fsync", "close", "link", "replace", "unlink")


def write_until_killed(path: Path, kill_at: int, before: bool) -> None:
    """Write generation 2 and die by SIGKILL just before or after the `kill_at`-th system call."""
    calls = iter(range(10**6))

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number = next(calls)
            if number == kill_at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))
    storage.WRITE_CHUNK_BYTES = 100  # several writes, so that some kills leave a part of the file
    write(path, small(2), METADATA, expected_generation=1)


@needs_fork
def test_kill_at_every_system_call_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    outcomes = {1: 0, 2: 0}
    for before in (True, False):
        for kill_at in range(100):
            folder = tmp_path / f"{kill_at} {before}"
            folder.mkdir()
            path = create(folder / "f")
            ended = in_child(lambda path=path, at=kill_at, before=before: write_until_killed(path, at, before))
            _, tensors, generation = read(path)
            assert same(tensors, small(generation))
            outcomes[generation] += 1
            assert write(path, small(generation + 1), METADATA, expected_generation=generation) == generation + 1
            assert junk(folder) == []
            assert same(read(storage.backup_path(path))[1], small(generation))
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
        else:
            pytest.fail("the write never got through")
    assert outcomes[1] > 15
    assert outcomes[2] > 3


# --- lock --------------------------------------------------------------------------------------------------------


def add_counts(path: Path, times: int) -> None:
    """Raise both the tensor and the number in the metadata by one, many times."""
    for _ in range(times):
        with storage.locked(path):
            metadata, tensors, generation = read(path)
            tensors["count"] += 1
            write(path, tensors, {"count": metadata["count"] + 1}, expected_generation=generation)


def started(target: Callable[..., Any], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


@needs_fork
def test_concurrent_updates_are_never_lost(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, {"count": torch.zeros(1, dtype=torch.int64)}, {"count": 0}, expected_generation=None)
    processes = [started(add_counts, path, 20) for _ in range(2)]
    thread = threading.Thread(target=add_counts, args=(path, 5))
    thread.start()
    while any(process.is_alive() for process in processes):
        verify(path)  # a reader without the lock sees whole files only
    thread.join()
    assert [process.exitcode for process in processes] == [0, 0]
    metadata, tensors, generation = read(path)
    assert (metadata["count"], int(tensors["count"]), generation) == (45, 45, 46)


def hold(path: Path, ready: Any, seconds: float) -> None:
    with storage.locked(path):
        ready.set()
        time.sleep(seconds)


@needs_fork
def test_timeout_names_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    path, ready = create(tmp_path / "f"), multiprocessing.get_context("fork").Event()
    process = started(hold, path, ready, 60)
    assert ready.wait(20)
    with pytest.raises(StorageError, match=rf"f is in use: process {process.pid} held its lock for more than 0.1 s"):
        storage.locked(path, timeout=0.1).__enter__()
    read(path)
    process.kill()  # the system frees the lock of the dead
    process.join()
    with storage.locked(path, timeout=5):
        write(path, small(2), {}, expected_generation=1)
    assert junk(tmp_path) == []


def test_lock_is_reentrant_also_by_another_name(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    (tmp_path / "link").symlink_to(path)
    with storage.locked(path), storage.locked(tmp_path / "link", timeout=0.1):
        with storage.locked(path, timeout=0.1):
            assert write(path, small(2), {}, expected_generation=1) == 2
        assert (tmp_path / ".f.holder").read_text() == str(os.getpid())
    assert junk(tmp_path) == []


def test_lock_excludes_other_threads(tmp_path: Path) -> None:
    path, messages = create(tmp_path / "f"), []

    def attempt() -> None:
        try:
            storage.locked(path, timeout=0.05).__enter__()
        except StorageError as error:
            messages.append(str(error))

    with storage.locked(path):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(messages) == 1
    assert "is in use" in messages[0]


@needs_fork
def test_missing_file_locks_are_not_passed_over_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr("fcntl.flock", missing)
    # Newer releases of filelock warn and lock by the existence of a file, older ones give up.
    if hasattr(FileLock, "fallback_to_soft"):
        with pytest.warns(UserWarning, match="flock not supported"):
            create(tmp_path / "f")
        assert read(tmp_path / "f")[2] == 1
    else:
        with pytest.raises(StorageError, match="move the file to a local disk"):
            create(tmp_path / "f")


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    path = create(tmp_path / "f")
    with pytest.raises(RuntimeError), storage.locked(path):
        raise RuntimeError
    assert junk(tmp_path) == []
    code = in_child(lambda: write(path, small(2), {}, expected_generation=1))
    assert code == 0
