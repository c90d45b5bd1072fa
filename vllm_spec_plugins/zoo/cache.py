"""Where built models live: one folder each, complete or absent, checksummed, built once.

A folder is named by a hash of all that decides its content, so it never goes stale: other
inputs give another name. It appears by one rename, after its files have reached the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

#: Overrides the cache folder of everything this project stores.
CACHE_VARIABLE = "VLLM_SPEC_PLUGINS_CACHE"

_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """`$VLLM_SPEC_PLUGINS_CACHE`, else `vllm-spec-plugins` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser() / "zoo"
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "vllm-spec-plugins" / "zoo"


def key_of(facts: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits naming everything that decides a model's weights."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def obtain(
    name: str, build: Callable[[Path, Path], None], on_wait: Callable[[], None] = lambda: None
) -> Path:
    """The complete folder `name` of the cache, built if it is not there.

    Two processes that ask at once build once: the second waits. A folder whose files do not
    match their checksums is thrown away and built again.

    Args:
        name: Folder name, with its key.
        build: Called with a fresh folder to fill, and a folder for unfinished work that is
            still there when a build was killed and begins again.
        on_wait: Called once when another process is building this model.

    Returns:
        The folder. Its files are verified.
    """
    root = cache_folder()
    folder = root / name
    if intact(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock", on_wait):
        if intact(folder):
            return folder  # built while we waited
        if folder.exists():
            logger.warning("%s does not match its checksums: building it again", folder)
            shutil.rmtree(folder)
        fresh, unfinished = root / f".{name}.new", root / f".{name}.unfinished"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        unfinished.mkdir(exist_ok=True)
        build(fresh, unfinished)
        _seal(fresh)
        fresh.rename(folder)
        _sync(root)
        shutil.rmtree(unfinished)
    return folder


def intact(folder: Path) -> bool:
    """Whether the folder has a manifest and every file in it has the checksum listed there."""
    try:
        listed: dict[str, str] = json.loads((folder / _MANIFEST).read_text())["sha256"]
        return all(_sha256(folder / file) == digest for file, digest in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a neighbour of `path`, then put it in place of `path` at once."""
    neighbour = path.with_name(path.name + ".new")
    write(neighbour)
    _sync(neighbour)
    neighbour.replace(path)
    _sync(path.parent)


def _seal(folder: Path) -> None:
    """Write the manifest, and all of the folder through to the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {"sha256": {path.name: _sha256(path) for path in files}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*files, folder / _MANIFEST, folder):
        _sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock. The system releases it when the holder dies, however it dies.

    The file stays: removing it would let a third process lock a new file of the same name
    while a second one still waits for the old.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
