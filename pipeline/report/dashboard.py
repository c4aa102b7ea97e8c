"""Serve Optuna's dashboard on a study's storage, on this machine only unless told otherwise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pipeline.errors import KnownError
from pipeline.storage import open_storage

if TYPE_CHECKING:
    from pipeline.study_file import Study


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

    storage = open_storage(study.storage_url, create=False)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Warning: the dashboard has no login; everyone who reaches {host}:{port} can change it.", file=sys.stderr
        )
    print(f"Optuna dashboard of {study.name}: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        optuna_dashboard.run_server(storage, host=host, port=port)
    except OSError as error:
        raise KnownError(
            f"dashboard: {host}:{port} cannot be listened on ({error.strerror or error}). Choose another --port."
        ) from error
