"""File names that every system accepts, from concept names that people chose."""

from __future__ import annotations

import hashlib
import re
import unicodedata

BYTES = 80  # leaves room for endings and numbers within the 255 bytes of every file system
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
UNSAFE = re.compile(r'[<>:"/\\|?*%\x00-\x1f\x7f]')


def safe_name(name: str) -> str:
    """Return a file name without an ending for a concept; one that had to be changed carries a digest of the name.

    So two names never share a file unless they differ in case alone, which concept names of one file never do.
    """
    plain = unicodedata.normalize("NFC", name)
    cleaned = "".join("_" if unicodedata.category(c)[0] == "C" else c for c in UNSAFE.sub("_", plain))
    cleaned = cleaned.strip(" .").lstrip("-~")
    if cleaned and cleaned == plain and not RESERVED.fullmatch(cleaned) and len(cleaned.encode()) <= BYTES:
        return cleaned
    short = cleaned.encode()[: BYTES - 9].decode(errors="ignore").rstrip(" .") or "concept"
    digest = hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{short.replace('.', '_') if RESERVED.fullmatch(short) else short}-{digest}"


def name_problem(name: str) -> str | None:
    """Return why some system would refuse or change this file name, or None."""
    stem = name.partition(".")[0]
    if UNSAFE.search(name) or name != name.strip(" ") or name.endswith(".") or name.startswith("-"):
        return f"the name {name!r} is not safe on every system; use letters, digits, '-', '_' and '.'"
    if RESERVED.fullmatch(stem):
        return f"the name {name!r} is reserved by Windows; choose another"
    if len(name.encode()) > 200:
        return f"the name {name[:20]!r}... has {len(name.encode())} bytes; 200 is the most"
    return None
