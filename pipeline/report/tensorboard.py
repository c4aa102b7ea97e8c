"""The learning curves once more, as event files for TensorBoard."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pipeline.errors import KnownError, require_package
from pipeline.report.records import StudyRecord


def write_logs(record: StudyRecord, folder: Path) -> Path:
    """Write every trial's mean curves, as runs "trial-7/training" and "trial-7/validation".

    The folder is written aside and moved into place.

    Args:
        record: the study.
        folder: where to; what an earlier call wrote there is replaced.

    Returns:
        The folder.

    Raises:
        KnownError: when it cannot be written, or the package is missing.
    """
    require_package("tensorboard", "tensorboard.logs")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tensorboard."))
        try:
            aside.chmod(0o755)
            for trial in record.trials:
                for part, names in (
                    ("training", [name for name in trial.curves if not name.startswith("val_")]),
                    ("validation", [name for name in trial.curves if name.startswith("val_")]),
                ):
                    if not names:
                        continue
                    writer = EventFileWriter(str(aside / f"trial-{trial.number}" / part))
                    for name in names:
                        for epoch, value in enumerate(trial.mean_curve(name), start=1):
                            entry = Summary.Value(tag=name.removeprefix("val_"), simple_value=float(value))
                            writer.add_event(Event(step=epoch, summary=Summary(value=[entry])))
                    writer.close()
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise KnownError(f"{folder}: the logs cannot be written ({error.strerror or error}).") from error
    return folder
