"""A PostgreSQL server of one's own: a temporary cluster, run by an unprivileged user, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def programs() -> Path | None:
    """Return the folder of the server's programs, or None when it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class Server:
    """A temporary cluster with a database `lrtune` and a role of the same name that has a password.

    Attributes:
        url: the storage's URL, without the password.
        password: the password, to be given in the environment as PGPASSWORD or in a .pgpass file.
    """

    password = "s3cret-word"  # pragma: allowlist secret

    def __init__(self) -> None:
        found = programs()
        assert found is not None
        self.programs = found
        self.folder = Path(tempfile.mkdtemp(prefix="lrtune-pg-"))
        self._user = None
        if os.getuid() == 0:  # the server refuses to run as root
            self._user = next(name for name in ("postgres", "nobody") if _exists(name))
            shutil.chown(self.folder, self._user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.data = self.folder / "data"
        (self.folder / "word").write_text(self.password)
        if self._user:
            shutil.chown(self.folder / "word", self._user)
        word = f"--pwfile={self.folder / 'word'}"
        self._run("initdb", "-D", str(self.data), "-U", "lrtune", "-A", "scram-sha-256", word, "--no-sync")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "lrtune", "lrtune")

    @property
    def url(self) -> str:
        """Return the storage's URL."""
        return f"postgresql+psycopg://lrtune@127.0.0.1:{self.port}/lrtune"

    @property
    def pid(self) -> int:
        """Return the process id of the server."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def start(self) -> None:
        """Start the server, also after a crash, and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c max_connections=200 -c fsync=off"
        log = str(self.folder / "log")
        for _ in range(30):
            done = self._run("pg_ctl", "-D", str(self.data), "-w", "-l", log, "-o", options, "start", check=False)
            if done.returncode == 0:
                return
            time.sleep(0.5)  # children of a server that was killed may still be ending
        raise RuntimeError(f"the server does not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Stop the server, cutting every connection."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop", check=False)

    def kill(self) -> None:
        """kill -9 the server, as a crash does."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Stop the server and remove everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        as_user = ["setpriv", f"--reuid={self._user}", "--regid=" + _group(self._user), "--clear-groups"]
        return subprocess.run(
            [*(as_user if self._user else []), str(self.programs / program), *arguments],
            env={**os.environ, "PGPASSWORD": self.password, "LC_ALL": "C", "HOME": str(self.folder)},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=check,
        )


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _group(user: str | None) -> str:
    return str(pwd.getpwnam(user).pw_gid) if user else ""
