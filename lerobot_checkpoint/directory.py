"""The output directory: which checkpoints are in it, which can be trusted, and how to change it without losing one.

Every change is made by renaming, so that a kill at any instant leaves whole checkpoints only. A name that begins
with ".tmp-" is unfinished, and "checkpoint_NNNNNN.old" is a whole checkpoint whose successor was being moved into
its place; every function here knows both.
Must not know: what the files of a checkpoint mean. It compares them with their manifest.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import CheckpointError
from .files import file_sha256, flush, json_content, read_json
from .layout import LISTED_FILES, MANIFEST_FILE, PRETRAINED_DIR, SCORE, TRAINING_DIR

# -- which are there, and are they whole? -------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in OUTPUT_DIR, oldest step first, unverified; [] if there is no such directory."""
    found: dict[int, Path] = {}
    for path in sorted(Path(output_dir).glob("checkpoint_*")):  # sorted: "<name>" before "<name>.old"
        match = re.fullmatch(r"checkpoint_(\d{6,})(\.old)?", path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def newest_checkpoint(output_dir: str | Path, on_bad: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint that verifies, or None; `on_bad` hears of each newer one that does not, and why."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(checkpoint)
            return checkpoint
        except CheckpointError as error:
            on_bad(str(error))
    return None


def verify_checkpoint(checkpoint_dir: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    This reads all of it: about 0.5 s for the default model with its AdamW state. Files that the manifest does not list
    (a file browser's, a note) are nobody's business.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names the first such file.
    """
    verify_folders(Path(checkpoint_dir), (PRETRAINED_DIR, TRAINING_DIR))


def verify_folders(checkpoint: Path, folders: tuple[str, ...]) -> None:
    """Like verify_checkpoint, for some of its folders only: to load a policy, PRETRAINED_DIR is enough."""
    manifest = read_json(checkpoint / MANIFEST_FILE)
    try:
        step, listed = manifest["step"], {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST_FILE}: not a manifest; use another checkpoint") from error
    match = re.fullmatch(r"checkpoint_(\d+)(\.old)?", checkpoint.resolve().name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{checkpoint}: holds step {step} by its manifest; rename it or use another checkpoint")

    expected = {name for name in {*LISTED_FILES, *listed} if name.startswith(folders)}
    for name in sorted(expected):
        if not (checkpoint / name).is_file() or name not in listed:
            raise CheckpointError(f"{checkpoint / name}: missing; restore it or use another checkpoint")
        size, sha256 = listed[name]
        if (checkpoint / name).stat().st_size != size:
            raise CheckpointError(
                f"{checkpoint / name}: {(checkpoint / name).stat().st_size} bytes; expected {size} (truncated or "
                "changed); use another checkpoint"
            )
        if file_sha256(checkpoint / name) != sha256:
            raise CheckpointError(
                f"{checkpoint / name}: its SHA-256 is not the manifest's (changed since it was written); use another "
                f"checkpoint, or, if the change was meant, a copy of {PRETRAINED_DIR}/ elsewhere"
            )


# -- which is the best? -------------------------------------------------------------------------------------------


def score_of(checkpoint_dir: str | Path) -> float | None:
    """A checkpoint's score, the lower the better.

    None if it was never validated, was written before there were scores, or has a manifest that cannot be read.
    """
    try:
        score = read_json(Path(checkpoint_dir) / MANIFEST_FILE).get(SCORE)
    except (CheckpointError, AttributeError):
        return None
    return score if isinstance(score, float) and math.isfinite(score) else None


def set_score(checkpoint_dir: str | Path, score: float) -> None:
    """Give a checkpoint its score after it was written; atomic.

    Raises:
        CheckpointError: its manifest cannot be read or written.
    """
    path = Path(checkpoint_dir) / MANIFEST_FILE
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        json_content({**read_json(path), SCORE: score}, MANIFEST_FILE)(partial)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write the score ({error.strerror or error})") from error


def best_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the lowest score, of equal ones the earlier; None if none has a score."""
    scored = [(score, path) for path in list_checkpoints(output_dir) if (score := score_of(path)) is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else None


def link_best(output_dir: str | Path) -> None:
    """Point `best` at the checkpoint with the lowest score, wherever a kill or a lost link left it.

    Raises:
        CheckpointError: the link cannot be made.
    """
    best = best_checkpoint(output_dir)
    if best is not None:
        point_link(output_dir, "best", best)


# -- changing it --------------------------------------------------------------------------------------------------


def move_into_place(temporary: Path, final: Path) -> None:
    """Rename `temporary`, a whole checkpoint, to `final`, replacing one that is there already.

    The one that was there stays whole until it has been replaced, under its own name or as `final`.old.

    Raises:
        OSError: not renamed; the one that was there is in its place again.
    """
    old = final.with_name(final.name + ".old")
    if final.exists():
        if old.exists():  # left by a kill just before the last line below
            shutil.rmtree(old)
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def point_link(output_dir: str | Path, name: str, checkpoint_dir: str | Path) -> None:
    """Make OUTPUT_DIR/name (`last`, `best`) a relative link to one of its checkpoints, replacing an earlier link.

    The link is there at every instant: a new one is made beside it and renamed.

    Raises:
        CheckpointError: the checkpoint is not in OUTPUT_DIR, or the link cannot be made there.
    """
    link, target = Path(output_dir) / name, Path(checkpoint_dir).name
    temporary = link.with_name(f".tmp-{name}-{os.getpid()}")
    if not (link.parent / target).is_dir():
        raise CheckpointError(f"{link}: {link.parent / target} is not there; link to a checkpoint of this directory")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
        flush(link.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{link}: cannot point it at {target} ({error.strerror or error}); it has to be a link, or absent, on a "
            f"file system with symbolic links; {target} itself is complete"
        ) from error


def prune(output_dir: str | Path, keep: int) -> list[Path]:
    """Remove all checkpoints but the `keep` newest and those that links (`last`, `best`) point at; -> the removed.

    Raises:
        CheckpointError: `keep` is less than 1, or one cannot be removed.
    """
    if keep < 1:
        raise CheckpointError(f"{output_dir}: asked to keep {keep} checkpoints; expected at least 1")
    linked = {path.resolve() for path in Path(output_dir).iterdir() if path.is_symlink()}
    removed = [path for path in list_checkpoints(output_dir)[:-keep] if path.resolve() not in linked]
    for path in removed:
        try:  # renamed first, so that a kill leaves no half of a checkpoint under a checkpoint's name
            hidden = path.with_name(f".tmp-{path.name}-pruned")
            os.rename(path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot remove it ({error.strerror or error})") from error
    return removed


def clean_leftovers(output_dir: str | Path) -> list[str]:
    """Tidy up after killed runs: remove what is unfinished, and give an .old without successor its name back.

    Call it once when a run starts, from one process, never while another writes here.

    Returns:
        The names of what was removed or renamed.

    Raises:
        CheckpointError: something cannot be removed or renamed.
    """
    cleaned = []
    try:
        for path in sorted(Path(output_dir).glob(".tmp-*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            cleaned.append(path.name)
        for old in sorted(Path(output_dir).glob("checkpoint_*.old")):
            current = old.with_suffix("")
            if current.exists():  # complete: it was renamed into place before its predecessor was removed
                shutil.rmtree(old)
            else:
                os.rename(old, current)
            cleaned.append(old.name)
    except OSError as error:
        raise CheckpointError(f"{output_dir}: cannot clean leftovers ({error}); remove .tmp-* by hand") from error
    return cleaned
