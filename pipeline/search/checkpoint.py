"""Checkpoints inside a trial: one that is cut off goes on where it was, to the same last digit.

After every fold that took its time the curves so far are kept, and every so many minutes inside a fold also the
model's variables, the optimizer's, all random states and the position in the data.  A checkpoint
is a file of plain numbers, written aside and moved into place, one per running trial; it is
removed when the trial ends.  Where machines share a study, the curves of whole folds are also kept
in the storage, so that another machine can go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

State = dict[str, NDArray[Any]]
"""What a run is made of: arrays by name."""

FOLD_SECONDS = 0.5
"""Folds that took less than so many seconds are trained again rather than kept."""

STORAGE_SECONDS = 10.0
"""Whole folds are kept in a storage that machines share at most every so many seconds."""


@dataclass
class Position:
    """How far a trial has come.

    Attributes:
        fold: folds that are done.
        epoch: epochs done of the fold after them.
        curves: every metric's value per fold and epoch so far.
        plateau: state of a scheme that reacts to the run.
        seconds: time spent so far.
        state: the run inside the fold; empty between folds.
    """

    fold: int = 0
    epoch: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    plateau: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    state: State = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the run inside the fold."""
        names = ("fold", "epoch", "curves", "plateau", "seconds")
        return {name: getattr(self, name) for name in names}


class Checkpoints:
    """The checkpoints of a study on this machine.

    Args:
        folder: where the files lie; made when the first is written, and removed with the last.
        minutes: between two checkpoints inside a fold.
        disk: bytes that all files together may take; inside folds nothing is kept beyond it.
        on_full: told once when there is no room.
    """

    def __init__(
        self, folder: Path, *, minutes: float, disk: float, on_full: Callable[[str], object] = lambda text: None
    ) -> None:
        self.folder, self.seconds, self.disk, self.on_full = folder, 60 * minutes, disk, on_full
        self._said = False

    def path(self, number: int) -> Path:
        """Return the file of a trial."""
        return self.folder / f"trial-{number}.npz"

    def remove(self, number: int) -> None:
        """Remove the checkpoint of a trial that has ended, and the folder with its last file."""
        with contextlib.suppress(OSError):
            self.path(number).unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def tidy(self, unfinished: Iterable[int]) -> None:
        """Remove what trials left that have ended."""
        kept = {self.path(number).name for number in unfinished}
        for path in self.folder.glob("*trial-*.npz*") if self.folder.is_dir() else ():
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def has_room(self, size: int, number: int) -> bool:
        """Return whether a checkpoint of so many bytes may be written."""
        taken = 0
        for path in self.folder.glob("*.npz*") if self.folder.is_dir() else ():
            if path != self.path(number):
                with contextlib.suppress(OSError):
                    taken += path.stat().st_size
        if size + taken <= self.disk:
            return True
        if not self._said:
            self._said = True
            self.on_full(
                f"a checkpoint of {size / 2**20:.0f} MiB does not fit into checkpoint.disk = {self.disk / 2**20:.0f} "
                "MiB: a trial that is cut off goes on from its last whole fold"
            )
        return False


class Checkpoint:
    """The checkpoint of one trial.

    Args:
        place: the study's checkpoints.
        number: the trial's number.
        facts: what the numbers depend on; a checkpoint of other facts is not used.
        shared: what a storage shared by machines holds of it, or None.
        share: keeps the position between folds in such a storage; None where one machine works alone.

    Attributes:
        is_shared: whether the storage holds a position, to be taken away with the trial's end.
    """

    def __init__(
        self,
        place: Checkpoints,
        number: int,
        facts: Any,
        *,
        shared: Mapping[str, Any] | None = None,
        share: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        text = json.dumps(facts, sort_keys=True, default=str)
        self.place, self.number = place, number
        self.digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self._shared, self._share, self.is_shared = shared, share, shared is not None
        self._began = self._kept = self._stored = time.monotonic()
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds that the trial has taken, those before it was cut off included."""
        return self._before + time.monotonic() - self._began

    def load(self) -> Position:
        """Return where the trial goes on: the furthest position that was kept, else its beginning."""
        found = [Position()]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            found.append(self._read())
        if self._shared is not None and self._shared.get("digest") == self.digest:
            known = {name: value for name, value in self._shared.items() if name in Position().as_json()}
            found.append(Position(**known))
        best = max(found, key=lambda position: (position.fold, position.epoch))
        self._before = best.seconds
        return best

    def after_epoch(self, position: Callable[[], Position]) -> None:
        """Keep the run inside a fold, when it is time.

        Args:
            position: returns the position, state included.
        """
        if time.monotonic() - self._kept < self.place.seconds or not self.place.disk:
            return
        found = position()
        if self.place.has_room(sum(array.nbytes for array in found.state.values()), self.number):
            self._write(found)
        self._kept = time.monotonic()

    def at_once(self, position: Callable[[], Position]) -> None:
        """Keep the run inside a fold now, whatever the time: it is about to end.

        Args:
            position: as for `after_epoch`.
        """
        self._kept = -math.inf
        self.after_epoch(position)

    def after_fold(self, position: Position) -> None:
        """Keep the curves of the folds that are done, where that took longer than writing them."""
        if time.monotonic() - self._kept < min(FOLD_SECONDS, self.place.seconds):
            return
        self._write(position)
        self._kept = time.monotonic()
        if self._share is not None and self._kept - self._stored >= STORAGE_SECONDS:
            self._share({**position.as_json(), "seconds": self.seconds, "digest": self.digest})
            self._stored, self.is_shared = self._kept, True

    def _read(self) -> Position:
        with np.load(self.place.path(self.number), allow_pickle=False) as arrays:
            said = json.loads(bytes(arrays["position"]).decode())
            if said.pop("digest") != self.digest:
                raise ValueError("of another trial")
            kinds = said.pop("kinds")
            state = {name: arrays[f"state-{name}"].view(_kind(kind)) for name, kind in kinds.items()}
        return Position(**said, state=state)

    def _write(self, position: Position) -> None:
        """Write the file; a disk that is full costs the checkpoint, not the trial."""
        said = {
            **position.as_json(),
            "seconds": self.seconds,
            "digest": self.digest,
            "kinds": {name: array.dtype.name for name, array in position.state.items()},
        }
        arrays: dict[str, Any] = {f"state-{name}": _plain(array) for name, array in position.state.items()}
        aside = self.place.folder / f".trial-{self.number}.npz.{os.getpid()}"
        try:
            self.place.folder.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                np.savez(file, position=np.frombuffer(json.dumps(said).encode(), np.uint8), **arrays)
            aside.replace(self.place.path(self.number))
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            self.place.on_full(f"no checkpoint could be written ({error})")


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array as a file of numbers can hold it: types that are not NumPy's own as their bits."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def _kind(name: str) -> Any:
    """Return the type of a name, those of TensorFlow included."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
