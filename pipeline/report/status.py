"""Where a study stands, from its storage, also while it runs elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from pipeline.errors import StorageError
from pipeline.progress import duration
from pipeline.search.stored import configuration_of
from pipeline.storage import open_storage, storage_errors, without_password

if TYPE_CHECKING:
    from pipeline.study_file import Study

STATES = (
    ("ran through", TrialState.COMPLETE),
    ("pruned", TrialState.PRUNED),
    ("failed", TrialState.FAIL),
    ("running", TrialState.RUNNING),
    ("waiting", TrialState.WAITING),
)


def status_text(study: Study) -> str:
    """Return trials by state, the best so far, and the time left at the pace so far.

    Raises:
        StorageError: when the storage or the study is not there.
    """
    url = study.storage_url
    storage = open_storage(url, create=False)
    with storage_errors(url):
        if study.name not in optuna.get_all_study_names(storage):
            raise StorageError(
                f"{study.path}: the storage {without_password(url)} holds no study named '{study.name}'. "
                f"Run 'lrtune tune {study.path}' first."
            )
        stored = optuna.load_study(study_name=study.name, storage=storage)
        trials, attributes = stored.get_trials(deepcopy=False), stored.user_attrs
    finished = [t for t in trials if t.state.is_finished()]
    total = max(study.config.trials, len(trials))
    diverged = sum(bool(t.user_attrs.get("diverged_at")) for t in trials)
    counts = {label: sum(t.state == state for t in trials) for label, state in STATES}
    counts["pruned"] -= diverged
    counts = {"ran through": counts.pop("ran through"), "pruned": counts.pop("pruned"), "diverged": diverged, **counts}
    lines = [
        f"{study.name}: {len(finished)} of {total} trials",
        "  " + ", ".join(f"{count} {label}" for label, count in counts.items() if count),
    ]
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    if complete:
        sign = 1.0 if stored.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        best = min(complete, key=lambda t: (sign * (t.value or 0.0), t.number))
        monitor = attributes.get("about", {}).get("monitor", "value")
        lines.append(f"  best {monitor} {best.value:.5g}: {configuration_of(best).describe()} (trial {best.number})")
    seconds = [t.duration.total_seconds() for t in finished if t.duration is not None]
    if seconds and len(finished) < total:
        lines.append(f"  about {duration(sum(seconds) / len(seconds) * (total - len(finished)))} of trials left")
    if len(finished) >= total and study.config.confirm.finalists:
        confirm = attributes.get("confirm") or {"values": {}, "candidates": [], "repeats": 0}
        done = sum(len(confirm["values"].get(str(number), [])) for number in confirm["candidates"])
        asked = confirm["repeats"] * len(confirm["candidates"])
        whole = asked and done >= asked
        lines.append("  confirmed on fresh seeds" if whole else f"  not confirmed yet ({done} confirmation runs)")
    return "\n".join(lines)
