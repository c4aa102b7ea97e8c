"""Optuna's dashboard on a study's storage: the recommendation as its note, the report as its artifact."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import KnownError
from pipeline.report.doubts import NOTHING_REMEDY, doubts_of, learned_nothing
from pipeline.report.export import keras_code
from pipeline.report.records import StudyRecord, recommend
from pipeline.storage import open_storage, storage_errors
from pipeline.words import counted

if TYPE_CHECKING:
    from pipeline.study_file import Study

ARTIFACT = "report_artifact"
"""Attribute of a study that holds the id of its report among the artifacts."""


def artifact_folder(study: Study) -> Path:
    """Return where the dashboard's copies of reports are kept: beside the study file, for all studies there."""
    return study.path.resolve().parent / ".dashboard"


def serve(study: Study, host: str, port: int) -> None:
    """Serve until interrupted.

    Args:
        study: its storage is shown.
        host: address to bind to.
        port: port to listen on.

    Raises:
        KnownError: when the address cannot be bound.
    """
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    storage = open_storage(study.storage_url, create=False)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Warning: the dashboard has no login; everyone who reaches {host}:{port} can change it.", file=sys.stderr
        )
    store = FileSystemArtifactStore(artifact_folder(study)) if artifact_folder(study).is_dir() else None
    print(f"Optuna dashboard of {study.name}: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        optuna_dashboard.run_server(storage, host=host, port=port, artifact_store=store)
    except OSError as error:
        raise KnownError(
            f"dashboard: {host}:{port} cannot be listened on ({error.strerror or error}). Choose another --port."
        ) from error


def publish(study: Study, record: StudyRecord, report: Path) -> None:
    """Give the dashboard the recommendation as the study's note and the report as its artifact.

    Raises:
        StorageError: when the storage cannot be written.
        KnownError: when the copy of the report cannot be written.
    """
    import optuna
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore, upload_artifact

    folder = artifact_folder(study)
    storage = open_storage(study.storage_url, create=False)
    with storage_errors(study.storage_url):
        stored = optuna.load_study(study_name=study.name, storage=storage)
        text = note(record)
        if optuna_dashboard.get_note(stored) != text:
            optuna_dashboard.save_note(stored, text)
        known: str | None = stored.user_attrs.get(ARTIFACT)
        try:
            folder.mkdir(exist_ok=True)
            store = FileSystemArtifactStore(folder)
            if known is None:
                known = upload_artifact(artifact_store=store, file_path=str(report), study_or_trial=stored)
                stored.set_user_attr(ARTIFACT, known)
            else:
                with report.open("rb") as file:
                    store.write(known, file)
        except OSError as error:
            raise KnownError(
                f"{folder}: the dashboard's copy of the report cannot be written ({error.strerror or error})."
            ) from error


def published(study: Study) -> Path | None:
    """Return the dashboard's copy of a study's report, or None when there is no study or no copy."""
    import optuna

    with contextlib.suppress(KnownError, KeyError):
        storage = open_storage(study.storage_url, create=False)
        with storage_errors(study.storage_url):
            known = optuna.load_study(study_name=study.name, storage=storage).user_attrs.get(ARTIFACT)
        return artifact_folder(study) / Path(known).name if isinstance(known, str) else None
    return None


def note(record: StudyRecord) -> str:
    """Return the recommendation and the main figures as Markdown."""
    answer = recommend(record)
    if answer is None:
        return "\n".join(["**No answer yet.**", "", *(f"- {doubt}" for doubt in doubts_of(record, None))])
    nothing = learned_nothing(record)
    if nothing is not None:
        doubts = [text for text in doubts_of(record, answer) if not text.startswith(nothing)]
        lines = [f"**{nothing} Nothing is recommended.**", "", NOTHING_REMEDY, "", *(f"- {text}" for text in doubts)]
        return "\n".join([*lines, "", "The whole report is among the artifacts.", ""])
    gain = answer.improvement
    lines = [
        f"## Train with {answer.configuration.describe()} for {counted(answer.epochs, 'epoch')}",
        "",
        f"This is {answer.headline}.",
        "",
        "| | |",
        "|---|---|",
        f"| {record.monitor.label} | {answer.value:.4g}"
        + (f" ± {answer.value_std:.2g} |" if answer.value_std is not None else " |"),
    ]
    if answer.baseline_value is not None:
        lines.append(f"| Keras default | {answer.baseline_value:.4g} |")
    if gain is not None and not answer.trial.baseline and answer.tells:
        lines.append(f"| gain, 95% interval | {gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g}) |")
    lines += [
        f"| trials | {record.count('complete')} ran through, {record.count('pruned')} pruned, "
        f"{record.count('diverged')} diverged, {record.count('failed')} failed |",
        f"| batch size | {record.batch_size(answer.configuration)} |",
        "",
        *(f"- {doubt}" for doubt in doubts_of(record, answer)),
        "",
        "```python",
        keras_code(record, answer).rstrip(),
        "```",
        "",
        "`lr_position` is the learning rate's place inside its optimizer's own bounds; the rate itself is the user "
        "attribute `learning_rate`. Trial 0 is the Keras default. The whole report is among the artifacts.",
        "",
    ]
    return "\n".join(lines)
