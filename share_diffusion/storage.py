"""A careful store for one safetensors file: read whole and verified, or written whole or not at all.

    with locked(path):                                    # one process at a time; write() alone takes the lock too
        metadata, tensors, generation = read(path)        # checksum verified, NaN refused
        ...                                               # change them in memory
        write(path, tensors, metadata, expected_generation=generation)

A write goes lock, check of the generation, free space, temporary file, fsync, hard link of the old file to NAME.bak,
rename, fsync of the folder. A crash at any point leaves the old file or the new one, and what it strews about is
removed by the next write. Every file counts its generations, so that a writer who read an older one is told instead of
overwriting what it never saw. Readers need no lock: a rename replaces the file under them in one step, and they
copy it to memory instead of mapping it, so nothing that happens to the file later reaches their tensors.

Beside NAME lie NAME.bak (the previous generation), .NAME.lock (empty, stays) and, while the lock is held, .NAME.holder
(the process id that a waiting process names when it gives up). A symbolic link is followed: its target is updated.
What the bytes mean is told in container.py.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any, BinaryIO, TypeAlias

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from share_diffusion import container
from share_diffusion.container import FormatError, Header

AnyPath: TypeAlias = str | os.PathLike[str]

LOCK_TIMEOUT_SECONDS = 60.0
WRITE_CHUNK_BYTES = 8 * 2**20

_REMEDIES = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space in your quota and try again",
    errno.EFBIG: "raise the limit on file sizes or choose another disk",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions and attributes of the file and its folder",
    errno.EROFS: "the disk is mounted read-only: choose another folder",
    errno.ENOENT: "check the spelling, and create the folder first if it is missing",
    errno.ENOSYS: "its file system cannot do this: move the file to a local disk",
    errno.ENAMETOOLONG: "choose a shorter name: some 40 bytes are added to it for temporary files",
}
_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class StorageError(ValueError):
    """A share file that cannot be read or written; the message tells the path, the fault and the remedy."""


class ConflictError(StorageError):
    """The file on disk is not the one that the writer had read."""


def read_header(path: AnyPath) -> Header:
    """Return what the file says about itself without reading any tensor (so the checksum is not verified)."""
    with _diagnosed(path), _open(path) as file:
        return _read_header(file)


def read(path: AnyPath, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Return the metadata, all tensors and the generation; `verify=False` skips the checksum but nothing else."""
    with _diagnosed(path):
        header, tensors = _load(path, verify=verify)
    return header.metadata, tensors, header.generation


def read_tensors(path: AnyPath, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors alone, reading nothing else of the body.

    The checksum covers the whole file and cannot be verified here: call `verify` once before trusting the file.
    """
    with _diagnosed(path), _open(path) as file:
        header = _read_header(file)
        names = list(names)
        if missing := [container.shorten(name) for name in names if name not in header.tensors]:
            raise StorageError(
                f"{os.fspath(path)} holds no tensor {', '.join(missing[:5])} "
                f"({len(missing)} of {len(names)} names missing): see read_header for those it holds"
            )
        tensors = {name: _read_tensor(file, header, name) for name in names}
        _require_usable(tensors)
    return tensors


def verify(path: AnyPath) -> None:
    """Raise a StorageError if anything at all is wrong with the file."""
    read(path)


def write(
    path: AnyPath,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    expected_generation: int | None,
    replace: bool = False,
) -> int:
    """Put this content in place of the generation that was read and return its new generation.

    `expected_generation=None` means that the file must not exist yet; with `replace=True` it means that whatever is
    there may be overwritten. A damaged file never becomes the backup.
    """
    if replace and expected_generation is not None:
        raise ValueError(f"replace=True overwrites any generation: pass None instead of {expected_generation}")
    target = _target(path)
    with locked(target):
        with _explained(target, "look at the present file"):
            _remove_leftovers(target)
            generation = _next_generation(target, expected_generation, replace)
        try:
            parts = container.pack(tensors, metadata, generation)
        except FormatError as fault:
            raise StorageError(f"{target} was not written: {fault}") from fault
        with _explained(target, f"write {sum(map(len, parts)):,} bytes (the file is as it was)"):
            _install(target, parts)
        with _explained(target, "make sure that the new version, now in place, would survive a power failure"):
            _sync_folder(target.parent)
    return generation


@contextmanager
def locked(path: AnyPath, timeout: float = LOCK_TIMEOUT_SECONDS, *, needed: bool = True) -> Iterator[None]:
    """Hold the file's lock against other processes and threads; the thread that holds it may take it again.

    Where nothing will be written it is not `needed`, and nothing is left beside the file.
    """
    if not needed:
        yield
        return
    target = _target(path)
    holder = target.with_name(f".{target.name}.holder")
    lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
    outermost = not lock.is_locked
    with _explained(target, "lock it"):
        if not target.parent.is_dir():  # which the lock would create
            raise FileNotFoundError(errno.ENOENT, f"no folder {target.parent}")
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise StorageError(_busy_message(target, holder, timeout)) from None
        except NotImplementedError as error:  # from releases of filelock without a fallback
            raise OSError(errno.ENOSYS, str(error)) from error
    try:
        if outermost:
            _sign(holder)
        yield
    finally:
        if outermost:
            with suppress(OSError):
                holder.unlink()
        lock.release()


def backup_path(path: AnyPath) -> Path:
    """Return where the previous generation of the file is kept."""
    target = _target(path)
    return target.with_name(f"{target.name}.bak")


def _target(path: AnyPath) -> Path:
    """Return the path with all symbolic links followed, so that two names of one file share one lock."""
    return Path(os.path.realpath(path))


@contextmanager
def _diagnosed(path: AnyPath) -> Iterator[None]:
    """Turn a fault found while reading into a StorageError that tells whether a sound backup exists."""
    try:
        yield
    except FormatError as fault:
        raise StorageError(f"{os.fspath(path)} {fault}; {_backup_advice(path)}") from fault
    except OSError as error:
        raise StorageError(f"{_system_message(path, 'read it', error)}; {_backup_advice(path)}") from error


@contextmanager
def _explained(path: AnyPath, attempt: str) -> Iterator[None]:
    """Turn an error of the operating system into a StorageError with its remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(_system_message(path, attempt, error)) from error


def _system_message(path: AnyPath, attempt: str, error: OSError) -> str:
    """Return path, attempt, reason and remedy as one sentence."""
    code = error.errno or errno.EIO
    reason = f"{error.strerror or os.strerror(code)} ({errno.errorcode.get(code, code)})"
    return f"{os.fspath(path)}: cannot {attempt}: {reason}; {_REMEDIES.get(code, 'check the disk and its connection')}"


def _backup_advice(path: AnyPath) -> str:
    """Return one clause telling whether the backup beside the file can replace it."""
    backup = backup_path(path)
    if _is_sound(backup):
        return f"its backup is sound: copy {backup} over it to go back one generation"
    return f"there is no sound backup beside it ({backup.name})"


def _open(path: AnyPath) -> BinaryIO:
    """Open a regular file for reading."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    """Return a descriptor of a regular file, never waiting as the open of a FIFO otherwise would."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError("is not a regular file")
    return descriptor


def _load(path: AnyPath, *, verify: bool = True) -> tuple[Header, dict[str, Tensor]]:
    """Return the header and all tensors, verified against the checksum and for NaN."""
    with _open(path) as file:
        header = _read_header(file)
        tensors = {name: _read_tensor(file, header, name) for name in header.tensors}
    if verify and container.checksum(header, map(container.raw_bytes, tensors.values())) != header.checksum:
        raise FormatError("is damaged: its checksum does not match its content")
    _require_usable(tensors)
    return header, tensors


def _require_usable(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for NaN and infinity, which another writer may have stored under a right checksum."""
    try:
        container.require_storable(tensors)
    except FormatError as fault:
        raise FormatError(f"is unusable: {fault}") from None


def _read_header(file: BinaryIO) -> Header:
    """Return the parsed header at the start of an open file."""
    size = os.fstat(file.fileno()).st_size
    length = container.header_length(file.read(container.PREFIX_BYTES), size)
    return container.parse(file.read(length), size)


def _read_tensor(file: BinaryIO, header: Header, name: str) -> Tensor:
    """Return one tensor in memory of its own."""
    info = header.tensors[name]
    first, end = info.offsets
    buffer = torch.empty(end - first, dtype=torch.uint8)
    file.seek(header.body_start + first)
    if file.readinto(buffer.numpy()) != end - first:  # pyright: ignore[reportAttributeAccessIssue]
        raise FormatError(f"was cut short while tensor {container.shorten(name)} was being read")
    return buffer.view(info.dtype).reshape(info.shape)


def _next_generation(target: Path, expected: int | None, replace: bool) -> int:
    """Return the generation that a write would create, or raise when the file is not the one expected."""
    if replace:
        return _last_known_generation(target) + 1
    if not os.path.lexists(target):
        if expected is not None:
            raise ConflictError(f"{target} is gone: generation {expected} was read; pass replace=True to create it anew")
        return 1
    if expected is None:
        raise ConflictError(f"{target} exists already: read it and pass its generation, or pass replace=True")
    found = read_header(target).generation
    if found != expected:
        raise ConflictError(
            f"{target} has changed: generation {expected} was read but it is at {found} now; "
            "read it again and repeat the change"
        )
    return expected + 1


def _last_known_generation(target: Path) -> int:
    """Return the generation of the file, or what it must have been judging by its backup, or 0."""
    for path, step in ((target, 0), (backup_path(target), 1)):
        with suppress(FormatError, OSError), _open(path) as file:
            return _read_header(file).generation + step
    return 0


def _install(target: Path, parts: tuple[bytes, ...]) -> None:
    """Write a new file beside the target, keep the old one as backup and rename the new one into its place."""
    existing = target.stat() if target.exists() else None
    if existing and not stat.S_ISREG(existing.st_mode):
        raise StorageError(f"{target} is not a regular file: choose another path")
    _require_space(target.parent, sum(map(len, parts)))
    temporary = _temporary_path(target)
    try:
        _write_new(temporary, parts, existing)
        # A file that has rotted on the disk must not push a sound backup out.
        if existing and _is_sound(target):
            _back_up(target, existing)
        os.replace(temporary, target)
    finally:
        # After the rename there is nothing left to remove, and a second error would hide the first.
        with suppress(OSError):
            temporary.unlink()


def _require_space(folder: Path, needed: int) -> None:
    """Raise ENOSPC before writing anything when the disk cannot hold this many bytes more."""
    usage = disk_usage(folder)
    # Some network file systems report no size at all.
    if usage.total and usage.free < needed:
        raise OSError(errno.ENOSPC, f"only {usage.free:,} bytes are free")


def _temporary_path(target: Path) -> Path:
    """Return a fresh name beside the target that `_remove_leftovers` recognises."""
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of writers that died; under the lock no living one has any."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def _write_new(path: Path, parts: Iterable[bytes], like: os.stat_result | None) -> None:
    """Create a file that must not exist, on disk when this returns, with the owner and mode of `like`."""
    # Without a model the umask decides; with one nobody may look in before the mode is set.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o600 if like else 0o666)
    try:
        if like:
            _imitate(descriptor, like)
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest[:WRITE_CHUNK_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _imitate(descriptor: int, like: os.stat_result) -> None:
    """Give an open file the owner, group and mode of another as far as the system lets us."""
    if hasattr(os, "fchown"):
        for owner, group in ((like.st_uid, -1), (-1, like.st_gid)):
            with suppress(PermissionError):
                os.fchown(descriptor, owner, group)
        with suppress(PermissionError):
            os.fchmod(descriptor, stat.S_IMODE(like.st_mode))


def _is_sound(path: Path) -> bool:
    """Return whether the file can be read and matches its checksum."""
    try:
        _load(path)
    except (FormatError, OSError):
        return False
    return True


def _back_up(target: Path, existing: os.stat_result) -> None:
    """Make NAME.bak a second name of the present file, or a copy where there are no hard links."""
    spare = _temporary_path(target)
    try:
        try:
            os.link(target, spare)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            _write_new(spare, [target.read_bytes()], existing)
        os.replace(spare, backup_path(target))
    finally:
        # Where NAME.bak already is this very file, the rename did nothing and left the spare name behind.
        with suppress(OSError):
            spare.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _sign(holder: Path) -> None:
    """Leave this process's id for those who wait in vain."""
    # A full disk must not prevent locking: the number serves nothing but a message.
    with suppress(OSError):
        holder.unlink(missing_ok=True)
        with open(holder, "x") as file:
            file.write(str(os.getpid()))


def _busy_message(target: Path, holder: Path, timeout: float) -> str:
    """Return the message for a lock that another process kept too long."""
    try:
        with _open(holder) as file:
            owner = f"process {int(file.read(20))}"
    except (OSError, ValueError):
        owner = "another process or thread"
    return f"{target} is in use: {owner} held its lock for more than {timeout:g} s; wait for it to finish, or end it"
