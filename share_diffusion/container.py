"""The byte layout of one share file: a plain safetensors file with exactly one spelling for one content.

    8 bytes   length of the header in bytes, unsigned, little-endian
    header    JSON in UTF-8 without white space, then 0 to 7 spaces up to a multiple of 8 bytes:
                {"__metadata__":{"share":S},NAME:{"dtype":D,"shape":[...],"data_offsets":[FIRST,END]},...}
    body      the bytes of every tensor, row-major and little-endian, back to back

D is one of I64 F64 F32 I32 BF16 F16 I16 I8 U8 BOOL. Header and body list the tensors by dtype in that order, then by
name; offsets count from the start of the body. S is a JSON text of its own (ASCII, keys sorted, no white space):

    {"checksum":"sha256:<64 hex digits>","content":{...},"format":"share-subspace","format_version":1,"generation":N}

"content" is the caller's metadata and kept whatever it holds. "checksum" is the SHA-256 of the entire file as it would
be without that field. `safetensors.torch.save(tensors, {"share": S})` writes these very bytes.

What is unusual: a header is accepted only if writing its content again gives the same bytes. That one comparison turns
away duplicate keys, holes, overlaps, reordering and stray white space, whatever a lenient JSON parser makes of them.
Everything here is pure: bytes and tensors in, bytes and values out, no files.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

METADATA_KEY = "share"
FORMAT = "share-subspace"
FORMAT_VERSION = 1
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 4 * 2**20
MAX_METADATA_DEPTH = 64
MAX_TENSORS = 200_000
MAX_TENSOR_BYTES = 2**63 - 1
MAX_AXES = 64

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_ENVELOPE_TYPES = {"checksum": str, "content": dict, "format": str, "format_version": int, "generation": int}


class FormatError(ValueError):
    """Bytes that are no share file, or content that cannot become one."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor; `offsets` are its first and end byte within the body."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """Everything in a share file except the tensors' bytes; `body_start` is where those begin in the file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    generation: int
    checksum: str = ""
    body_start: int = 0


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], generation: int) -> tuple[bytes, bytes]:
    """Return the two parts of the file, prefix with header and body, that hold this content."""
    require_storable(tensors)
    content = _plain_json(metadata)
    infos = _lay_out({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    # One private copy is both hashed and written, so a tensor that changes meanwhile cannot spoil the checksum.
    body = b"".join(raw_bytes(tensors[name]) for name in infos)
    header = Header(content, infos, generation)
    head = encode(replace(header, checksum=checksum(header, [body])))
    if len(head) > PREFIX_BYTES + MAX_HEADER_BYTES:
        raise FormatError(
            f"the header would take {len(head):,} bytes, above the limit of {MAX_HEADER_BYTES:,}: "
            "stack small tensors into fewer large ones"
        )
    return head, body


def encode(header: Header) -> bytes:
    """Return the prefix and header bytes, leaving the checksum field out while it is empty."""
    envelope = {
        "content": header.metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "generation": header.generation,
    }
    if header.checksum:
        envelope["checksum"] = header.checksum
    share = _dump(envelope)
    if len(share) > MAX_METADATA_BYTES:
        raise FormatError(f"the metadata takes {len(share):,} bytes, above the limit of {MAX_METADATA_BYTES:,}")
    fields: dict[str, Any] = {"__metadata__": {METADATA_KEY: share}}
    for name, info in header.tensors.items():
        fields[name] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": info.offsets}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def checksum(header: Header, pieces: Iterable[Any]) -> str:
    """Return the SHA-256 of the file without its checksum field; `pieces` are the body's buffers in file order."""
    digest = hashlib.sha256(encode(replace(header, checksum="")))
    for piece in pieces:
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Return the header's length told by the first 8 bytes, once it is plausible for a file of this size."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or PREFIX_BYTES + length > file_bytes:
        raise FormatError(f"is no safetensors file, or was cut short: it holds only {file_bytes:,} bytes")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"has a header of {length:,} bytes, above the limit of {MAX_HEADER_BYTES:,}")
    return length


def parse(text: bytes, file_bytes: int) -> Header:
    """Return the header spelled by `text` after checking every claim it makes about a file of this size."""
    # Counting what precedes every entry ("NAME":{"dtype") is far cheaper than parsing a flood of them.
    if (count := text.count(b'":{"') - 1) > MAX_TENSORS:
        raise FormatError(f"holds {count:,} tensors, above the limit of {MAX_TENSORS:,}")
    fields = _load(text, "header")
    envelope = _open_envelope(fields.pop("__metadata__", None))
    infos = _lay_out({name: _kind(name, entry) for name, entry in fields.items()})
    body_start = PREFIX_BYTES + len(text)
    _require_layout(fields, infos, file_bytes - body_start)
    header = Header(envelope["content"], infos, envelope["generation"], envelope["checksum"], body_start)
    try:
        spelling = encode(header)[PREFIX_BYTES:]
    except ValueError as fault:
        raise FormatError(f"is damaged: {shorten(str(fault))}") from None
    if spelling != text:
        raise FormatError(
            "is damaged: its header is not spelled the way it is written (a key twice, another order, white space)"
        )
    return header


def raw_bytes(tensor: Tensor) -> Any:
    """Return the tensor's bytes, row-major, as a buffer (a view of it where its memory already is that)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def require_storable(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error naming all tensors that a share file may not hold."""
    if len(tensors) > MAX_TENSORS:
        raise FormatError(f"{len(tensors):,} tensors are above the limit of {MAX_TENSORS:,}: stack them into fewer")
    found = ((name, _fault(name, tensor)) for name, tensor in tensors.items())
    faults = [f"tensor {shorten(name)} {fault}" for name, fault in found if fault]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise FormatError("; ".join(faults[:5]) + more)


def shorten(name: object) -> str:
    """Return a name as it may stand in a message: quoted, escaped and never long."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _fault(name: str, tensor: Tensor) -> str | None:
    """Return why this tensor cannot be stored, or None when it can."""
    # UTF-8 cannot spell a lone surrogate.
    if not isinstance(name, str) or name == "__metadata__" or name.encode(errors="ignore").decode() != name:
        return "needs another name: text that is valid Unicode and not '__metadata__'"
    if tensor.layout != torch.strided or tensor.is_meta:
        return f"holds no dense values (layout {tensor.layout}, device {tensor.device}): make it dense first"
    if tensor.dtype not in _CODES:
        return f"is {tensor.dtype}, not one of {', '.join(DTYPES)}: cast it first"
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        return "holds NaN or infinity"
    return None


def _lay_out(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Return the one order and the one place that tensors of these dtypes and shapes have in a body."""
    infos, end = {}, 0
    # Wide dtypes first keep every tensor aligned to its own element size without any padding.
    for name in sorted(kinds, key=lambda name: (_RANKS[kinds[name][0]], name)):
        dtype, shape = kinds[name]
        first, end = end, end + dtype.itemsize * math.prod(shape)
        infos[name] = TensorInfo(dtype, shape, (first, end))
    return infos


def _kind(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and shape of one header entry, refusing any other form."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"is damaged: the header entry of tensor {shorten(name)} is malformed")
    code, shape = entry["dtype"], entry["shape"]
    if not isinstance(code, str) or code not in DTYPES:
        raise FormatError(f"holds tensor {shorten(name)} as {shorten(code)}, not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES:
        raise FormatError(f"is damaged: tensor {shorten(name)} has no shape, or one of more than {MAX_AXES} axes")
    # bool is an int in Python, so `true` would pass for the size 1.
    if any(type(size) is not int or not 0 <= size <= MAX_TENSOR_BYTES for size in shape):
        raise FormatError(f"is damaged: tensor {shorten(name)} has the shape {shorten(shape)}")
    if DTYPES[code].itemsize * math.prod(size or 1 for size in shape) > MAX_TENSOR_BYTES:
        raise FormatError(f"is damaged: tensor {shorten(name)} has the impossible shape {shorten(shape)}")
    return DTYPES[code], tuple(shape)


def _require_layout(fields: dict[str, Any], infos: dict[str, TensorInfo], body_bytes: int) -> None:
    """Raise an error unless the declared offsets fill the body without overlap, hole or rest."""
    end = 0
    for name, info in infos.items():
        end = info.offsets[1]
        if fields[name]["data_offsets"] != list(info.offsets):
            claim = shorten(fields[name]["data_offsets"])
            raise FormatError(
                f"is damaged: tensor {shorten(name)} lies at {claim} instead of {list(info.offsets)} "
                "(an overlap, a hole or another shape)"
            )
    if end != body_bytes:
        raise FormatError(f"is damaged: {body_bytes:,} bytes follow the header, which accounts for {end:,}")


def _open_envelope(block: Any) -> dict[str, Any]:
    """Return the fields of the share metadata, refusing other formats and newer versions."""
    share = block.get(METADATA_KEY) if isinstance(block, dict) else None
    if not isinstance(share, str):
        raise FormatError(f"is a safetensors file but no share file: it has no {METADATA_KEY!r} metadata")
    if len(share) > MAX_METADATA_BYTES:
        raise FormatError(f"has {len(share):,} bytes of metadata, above the limit of {MAX_METADATA_BYTES:,}")
    envelope = _load(share, "metadata")
    if envelope.get("format") != FORMAT:
        raise FormatError(f"has the format {shorten(envelope.get('format'))} instead of {FORMAT!r}")
    version = envelope.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatError(
            f"has format version {shorten(version)}, newer than version {FORMAT_VERSION} known here: upgrade share-diffusion"
        )
    kinds = {field: type(value) for field, value in envelope.items()}
    if kinds != _ENVELOPE_TYPES or version != FORMAT_VERSION or envelope["generation"] < 1:
        raise FormatError("is damaged: the fields of its share metadata are not those of this format version")
    return envelope


def _plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata as it will be read back, refusing what JSON would silently alter."""
    if not _is_shallow(metadata, MAX_METADATA_DEPTH):
        raise FormatError(f"the metadata is nested more than {MAX_METADATA_DEPTH} levels deep")
    content = _load(_dump(metadata), "metadata")
    if content != metadata:
        raise FormatError("the metadata would not come back as it is: use text keys, lists and plain values only")
    return content


def _is_shallow(value: Any, levels: int) -> bool:
    """Return whether dicts and lists nest at most this many levels deep."""
    if not isinstance(value, dict | list):
        return True
    children = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(child, levels - 1) for child in children)


def _dump(value: Mapping[str, Any]) -> str:
    """Return the one JSON spelling of a value: ASCII, sorted, without white space."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the metadata cannot be written as JSON: {shorten(str(error))}") from None


def _load(text: str | bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `text`; of a key given twice it keeps the last, which `parse` then finds out."""
    try:
        # Left to itself json would also guess UTF-16 and UTF-32.
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise FormatError(f"is damaged or hostile: its {what} is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"is damaged: its {what} is not valid JSON ({shorten(str(error))})") from None
    if not isinstance(value, dict):
        raise FormatError(f"is damaged: its {what} is not a JSON object")
    return value
