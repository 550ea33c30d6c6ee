"""Which sources a measurement was made with: a digest of the packages, and their commit.

The tree that is measured is often a copy, without its history or with an older one. So a result
carries the digest of the package sources, which any checkout can be compared with:
`python -m vitgraph.bench digest` prints that of the files here, and `digest COMMIT` that of a
commit. The digest takes every .py file that is there, so a file that was never committed shows.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("bench", "capture", "encoder", "kernels")
ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "VITGRAPH_COMMIT"


@dataclass(frozen=True)
class Sources:
    """What was measured.

    Attributes:
        source_digest: of the .py files of the packages, see `source_digest`.
        commit: what VITGRAPH_COMMIT says, else the HEAD of the history here; None without either.
        dirty: whether the sources differ from those of `commit`; None if git cannot tell.
    """

    source_digest: str
    commit: str | None
    dirty: bool | None


def sources(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Sources:
    """Digest, commit and dirtiness of the packages under `root`.

    Raises:
        ValueError: VITGRAPH_COMMIT is set and is not 7 to 40 hexadecimal digits.
    """
    told = environ.get(VARIABLE)
    if told and not re.fullmatch("[0-9a-fA-F]{7,40}", told):
        raise ValueError(
            f"bench: {VARIABLE} = {told!r} names no commit; set it to 7 to 40 hexadecimal digits, "
            "or unset it"
        )
    digest = source_digest(root)
    commit = told.lower() if told else _resolve("HEAD", root)
    committed = commit and commit_digest(commit, root)
    return Sources(digest, commit or None, committed != digest if committed else None)


def source_digest(root: Path = ROOT) -> str:
    """sha256 in hexadecimal over every .py file of the packages under `root`.

    Files go in by order of their paths relative to `root`: path, size and bytes.
    """
    files = (path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return _digest({p.relative_to(root).as_posix(): p.read_bytes() for p in files if p.is_file()})


def commit_digest(revision: str, root: Path = ROOT) -> str | None:
    """The `source_digest` of a checkout of `revision`; None if the history here does not say."""
    commit = _resolve(revision, root)
    listing = commit and _git(root, "ls-tree", "-r", "-z", "--full-tree", commit, "--", *FOLDERS)
    if not listing:
        return None
    blobs = dict[str, bytes]()
    for entry in listing.rstrip(b"\0").split(b"\0"):
        attributes, _, path = entry.partition(b"\t")
        if path.endswith(b".py"):
            blobs[path.decode()] = attributes.split()[2]
    contents = _git(root, "cat-file", "--batch", sent=b"\n".join([*blobs.values(), b""]))
    if contents is None:
        return None
    files: dict[str, bytes] = {}
    for path in blobs:
        header, _, contents = contents.partition(b"\n")  # <object> blob <size>
        size = int(header.split()[2])
        files[path], contents = contents[:size], contents[size + 1 :]
    return _digest(files)


def _digest(files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    return total.hexdigest()


def _resolve(revision: str, root: Path) -> str | None:
    """Full name of a commit; None without a history, or if it does not hold it."""
    # git would look for a history above `root` too, and that is not the one of these files
    if not (root / ".git").exists():
        return None
    wanted = f"{revision}^{{commit}}"
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", wanted)
    return found.decode().strip() if found else None


def _git(root: Path, *arguments: str, sent: bytes = b"") -> bytes | None:
    """What git prints; None if it is missing or fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, input=sent, capture_output=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
