"""The user's own code: found, imported and called as if it were run by itself.

Loading an objective runs a program that was not written for lrtune.  Its folder is where it imports
from, whatever else of the same name is installed or running here; files that it names by a relative
path are looked for in the working directory, then beside the study file, then beside the program.
Everything it raises becomes one message that says where.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import random
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from pipeline.errors import ObjectiveError, did_you_mean, plain_text
from pipeline.words import cut

T = TypeVar("T")

KEPT = "_lrtune_kept"
"""Name under which a module given by a notebook keeps what outlives its models."""

PREFIX = "lrtune_objective_"
"""Begins the names of modules that are the user's, so that they are told from everything else."""


def find_objective(name: str, study_folder: Path) -> Path | None:
    """Return the objective's file, or None when `name` is a module.

    Args:
        name: a path relative to the study file's folder, else to the working directory; or a module.
        study_folder: the study file's folder.

    Raises:
        ObjectiveError: when there is no such file.
    """
    if name.endswith(".py") or "/" in name or "\\" in name:
        tried = [study_folder / name, Path.cwd() / name]
        for path in tried:
            if path.is_file():
                return path.resolve()
        beside = [p.name for folder in {t.parent for t in tried} if folder.is_dir() for p in folder.glob("*.py")]
        hint = did_you_mean(Path(name).name, beside) if beside else ""
        places = " nor ".join(dict.fromkeys(str(path.parent) for path in tried))
        raise ObjectiveError(f"objective: '{name}' does not exist, neither in {places}{hint}")
    return None


class UserCode:
    """An objective's program: its module, and how its functions are called.

    Attributes:
        name: the file or module, as the study file names it.
        path: the file, or None for a module.
        module: what was imported.
        elsewhere: the folder in which a file was found that the working directory lacks, or None.
        notes: what its author should know, a line each.
    """

    def __init__(self, name: str, study_folder: Path, module: ModuleType | None = None) -> None:
        """Import the program.

        Args:
            name: path or module, as in the study file.
            study_folder: the study file's folder.
            module: the program itself, where it is no file.

        Raises:
            ObjectiveError: when it is missing or cannot be imported.
        """
        self.name, self.path = name, find_objective(name, study_folder) if module is None else None
        self.elsewhere: Path | None = None
        self._given = module is not None
        self.notes: list[str] = []
        self._folders = [study_folder, *([self.path.parent] if self.path else [])]
        self.module = self._import() if module is None else module

    def _import(self) -> ModuleType:
        name, path = self.name, self.path
        try:
            if path is not None:
                line = training_line(path)
                if line is not None:
                    self.notes.append(
                        f"{name} trains whenever it is imported (line {line}), here and in every worker; put that "
                        "under 'if __name__ == \"__main__\":'"
                    )
                return self._where_files_are(lambda: _import_file(path))
            if str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            return self._where_files_are(lambda: importlib.import_module(name))
        except ModuleNotFoundError as error:
            if path is None and error.name and (name == error.name or name.startswith(error.name + ".")):
                raise ObjectiveError(
                    f"objective: '{name}' is neither a .py file nor a module that can be imported ({error})."
                ) from error
            missing = re.sub(rf"{PREFIX}folder_\w+\.", "", str(error))
            raise ObjectiveError(
                f"{name}: cannot be imported: {missing}{_line(error, path)}. Install what it needs into this "
                "environment."
            ) from error
        except SyntaxError as error:
            file = "" if path is None or error.filename == str(path) else f"{Path(error.filename or '').name}, "
            raise ObjectiveError(f"{name}: cannot be imported: {error.msg} ({file}line {error.lineno}).") from error
        except ImportError as error:
            remedy = ""
            if "relative import" in str(error) and path is not None:
                remedy = f' Name it as a module of its package: objective = "{path.parent.name}.{path.stem}".'
            raise ObjectiveError(f"{name}: cannot be imported: {describe_fault(error, path)}.{remedy}") from error
        except (Exception, SystemExit) as error:
            download = _failed_download(error)
            if download is not None:
                raise ObjectiveError(f"{name}: cannot be imported: it {download}") from error
            raise ObjectiveError(f"{name}: cannot be imported: {describe_fault(error, path)}.") from error

    def call(self, function_name: str, function: Callable[[], Any]) -> Any:
        """Call a function of the program; what it raises says where.

        Args:
            function_name: its name, for messages.
            function: the function, with its arguments filled in.

        Raises:
            ObjectiveError: when it needs arguments, or for whatever else it raises.
        """
        required = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if required:
            raise ObjectiveError(
                f"{self.name}: {function_name}() must work without arguments, got required {', '.join(required)}. "
                "Give them defaults."
            )
        try:
            return self._where_files_are(function)
        except ObjectiveError:
            raise
        except (Exception, SystemExit) as error:
            download = _failed_download(error)
            if download is not None:
                raise ObjectiveError(f"{self.name}: {function_name}() {download}") from error
            raise ObjectiveError(
                f"{self.name}: {function_name}() raised {describe_fault(error, self.path)}."
            ) from error

    def kept_with_module(self, make: Callable[[], T]) -> T:
        """Return what was made for this program before; a module that lives in this process alone is not run again."""
        if not self._given:
            return make()
        return vars(self.module).setdefault(KEPT, make())  # type: ignore[no-any-return]

    def _where_files_are(self, run: Callable[[], T]) -> T:
        """Run in the working directory; where a file is missing there, again in the folders that may have it.

        Every attempt begins with the same random numbers and names of layers, wherever the file is.
        """
        begin = _beginning()
        try:
            with self._as_a_program():
                return run()
        except Exception as error:
            for folder in _other_folders(error, self._folders):
                begin()
                try:
                    with self._as_a_program(), contextlib.chdir(folder):
                        result = run()
                except Exception as again:
                    if not _is_missing_file(again):
                        raise
                else:
                    self.elsewhere = folder
                    return result
            raise

    @contextlib.contextmanager
    def _as_a_program(self) -> Iterator[None]:
        """Give it the command line it would have by itself; what it prints is no result of ours."""
        if self._given:
            yield
            return
        arguments = sys.argv
        sys.argv = [str(self.path or self.name)]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            sys.argv = arguments


def _beginning() -> Callable[[], None]:
    """Return what sets random numbers and Keras's counters of names back to how they are now."""
    drawn, numbers = random.getstate(), np.random.get_state()
    names = layer_names() if "keras" in sys.modules else None
    context = sys.modules.get("tensorflow.python.eager.context")
    rng = getattr(context.context(), "_rng", None) if context is not None else None
    operations = rng.getstate() if rng is not None else None

    def begin() -> None:
        random.setstate(drawn)
        np.random.set_state(numbers)
        if names is not None:
            layer_names(names)
        if rng is not None:
            rng.setstate(operations)

    return begin


def layer_names(given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many layers and metrics of each kind Keras has named so far; or go back to that.

    Keras numbers what has no name of its own as it is made; without going back, the second model's
    `Precision()` would be called `precision_1`.

    Args:
        given: counts to go back to.
    """
    from keras.src.backend.common import global_state

    if given is not None:
        global_state.set_global_attribute("object_name_uids", defaultdict(int, given))
    return dict(global_state.get_global_attribute("object_name_uids", {}))


def _is_missing_file(error: Exception) -> bool:
    """Return whether Python, TensorFlow or Keras say by an exception that a file does not exist."""
    said = isinstance(error, ValueError) and re.search(
        r"not found|no such file|does not exist|no files", str(error), re.I
    )
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError" or bool(said)


def _other_folders(error: Exception, folders: Sequence[Path]) -> list[Path]:
    """Return the folders, other than the working directory, that may have a file that was not found."""
    if not _is_missing_file(error):
        return []
    others = [folder for folder in dict.fromkeys(f.resolve() for f in folders) if folder != Path.cwd().resolve()]
    name = getattr(error, "filename", None)
    if isinstance(name, str | bytes):
        path = name if isinstance(name, str) else name.decode(errors="replace")
        return [] if Path(path).is_absolute() else [folder for folder in others if (folder / path).exists()]
    return others


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own; what it imports from its folder comes before all else."""
    module_name = f"{PREFIX}{path.stem}_{_digest(path)}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_Uncached(module_name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    own = _own_names(path.parent)
    if any(_is_taken(name, path.parent) for name in own):
        vars(module)["__builtins__"] = _builtins_of(path.parent, own)
        _look_last(path.parent)
    elif str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def training_line(path: Path) -> int | None:
    """Return the line of a call of `fit` that runs when a file is imported, or None.

    Args:
        path: a Python file; it is read, not run.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return None
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            continue
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "fit"
                and any(keyword.arg in ("epochs", "batch_size", "validation_data") for keyword in node.keywords)
            ):
                return node.lineno
    return None


def _digest(path: Path) -> str:
    return hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()


class _Uncached(importlib.machinery.SourceFileLoader):
    """Loads the source as it is now: a cached compilation is told from an edit only by size and second."""

    def path_stats(self, path: Any) -> Any:
        """Say that nothing is known of the file, so that no cache is read or written."""
        raise OSError(path)


# Where a name of the folder is taken, by lrtune itself ("pipeline"), by a package or by another
# objective's helper, the folder is made a package of its own, and the import statements of its files
# look there first.  It stays off the import path, which worker processes inherit before they have
# imported lrtune.


def _own_names(folder: Path) -> frozenset[str]:
    """Return the names of modules and packages in a folder."""
    found = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    # A folder without __init__.py gives way to a package of its name, but not to lrtune's own.
    loose = {p.parent.name for p in folder.glob("*/*.py")} - found
    found |= {name for name in loose if name == __package__ or not _is_taken(name, folder)}
    return frozenset(name for name in found if name.isidentifier())


def _is_taken(name: str, folder: Path) -> bool:
    """Return whether an import of a name would find something else than what is in the folder."""
    loaded = sys.modules.get(name)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None and folder not in Path(spec.origin).parents


@cache
def _look_last(folder: Path) -> None:
    """Let everything else that asks for a module of the folder find it, as pickles do, after all other places."""
    sys.meta_path.append(_LastFinder(folder))


class _LastFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a folder by their plain names, where nothing else has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the module's place."""
        return importlib.machinery.PathFinder.find_spec(fullname, [str(self.folder)]) if path is None else None


@cache
def _folder_package(folder: Path) -> ModuleType:
    """Return an empty package whose modules are those of a folder."""
    name = f"{PREFIX}folder_{_digest(folder)}"
    package = ModuleType(name, f"The modules of {folder}.")
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    sys.meta_path.insert(0, _OwnFinder(folder, name))
    return package


def _builtins_of(folder: Path, own: frozenset[str]) -> dict[str, Any]:
    """Return Python's built-in names with an import that looks into the folder first."""
    package = _folder_package(folder).__name__
    taken = {name for name in own if _is_taken(name, folder)}

    def own_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        top = name.partition(".")[0]
        if level or top not in own:
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or ("",), 0)
        if top not in taken:  # so that pickles and importlib find the same module
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                plain = ".".join(parts[:end])
                sys.modules.setdefault(plain, sys.modules[f"{package}.{plain}"])
        return found if fromlist else sys.modules[f"{package}.{top}"]

    return {**vars(builtins), "__import__": own_import}


class _OwnFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a folder's package, whose own imports look into the folder first too."""

    def __init__(self, folder: Path, package: str) -> None:
        self.folder, self.package = folder, package

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the module's place, with a loader that gives it the folder's import."""
        if not fullname.startswith(self.package + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _OwnLoader(self.folder, spec.loader.name, spec.loader.path)
        return spec


class _OwnLoader(_Uncached):
    """Loads a module with the folder's import among its built-in names."""

    def __init__(self, folder: Path, name: str, path: str) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        vars(module)["__builtins__"] = _builtins_of(self.folder, _own_names(self.folder))
        super().exec_module(module)


def _failed_download(error: BaseException) -> str | None:
    """Return what Keras's `get_file` tried and how to do it by hand, when that is what failed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals
        if frame.f_code.co_name != "get_file" or not {"origin", "download_target"} <= found.keys():
            continue
        reason = " ".join(str(error).split()).rpartition(" -- ")[2] or type(error).__name__
        without = ""
        if str(found["origin"]).endswith((".h5", ".keras")):
            without = ' To go without trained weights, give weights = "random" where the objective takes it.'
        checked = " (Keras compares its checksum and removes a file that differs)" if found.get("file_hash") else ""
        return (
            f"could not download {found['origin']} ({reason[:200]}). On a machine with a network, download this file "
            f"and place it at {found['download_target']}, under exactly this name{checked}; or set KERAS_HOME to a "
            f"folder that has it.{without}"
        )
    return None


def describe_fault(error: BaseException, path: Path | None) -> str:
    """Return what an exception in the user's code says, in one line, with the line of their file.

    Args:
        error: the exception.
        path: the objective's file, or None.
    """
    if isinstance(error, SystemExit):
        return _ended(error, path)
    text = _cause(plain_text(str(error)))
    remedy = next((said for pattern, said in REMEDIES if re.search(pattern, text)), "")
    said = f"{type(error).__name__}: {cut(text, LONGEST_FAULT)}".rstrip(": .")
    return said + _line(error, path) + (f". {remedy}" if remedy else "")


LONGEST_FAULT = 500
"""So many characters of an exception are shown at the most."""

REMEDIES = (
    (
        r"expects 2D inputs .*y_true\.shape=\((None|\d+),\)",
        "Give the targets a second axis in load_data(): y.reshape(-1, 1)",
    ),
    (
        r"indices\[.*\] = -?\d+ is not in \[0, \d+\)",
        "A token number has no row in an Embedding: raise its input_dim, or limit the vocabulary",
    ),
    (
        r"Incompatible shapes: \[\d+\] vs\. \[\d+,\d+\]|Incompatible shapes: \[\d+,\d+\] vs\. \[\d+\]",
        "Targets and outputs differ in shape: give the model as many units as the targets have columns, or class "
        "numbers the loss 'sparse_categorical_crossentropy'",
    ),
    (
        r"No gradients provided",
        "No gradient reaches a weight: compute the loss inside the GradientTape, by operations that have one",
    ),
    (
        r"Unknown variable",
        "An optimizer that is made once, at the top of the program, knows the variables of its first model alone: let "
        "self.optimizer train everything, which is the one that is searched",
    ),
    (
        r"[Rr]agged",
        "Pad the samples to one length, x.to_tensor() or keras.utils.pad_sequences, and let the model mask what is "
        "padded",
    ),
    (
        r"labels must be .*rank|[Rr]eceived a label value of|[Ll]abels? (value )?(is )?outside",
        "Number the classes from 0 to the model's outputs - 1",
    ),
    (
        r"target.*output.*must have the same|Arguments `target` and `output` must have the same shape",
        "Class numbers go with 'sparse_categorical_crossentropy', one-hot rows with 'categorical_crossentropy'",
    ),
)
"""What mends an error, by what the error says."""


def _cause(text: str) -> str:
    """Return what an error says without its frame: where Keras was, what it was called with, which node it was."""
    text = re.sub(
        r"\{\{function_node [^}]*\}\}\s*|, value=\[.*?(?=>)|\s*\[Op:\w+\]\s*(name:)?", "", text, flags=re.DOTALL
    )
    before, _, _ = text.partition("[[{{node")
    if before != text and before.strip():  # TensorFlow tells the cause last, after the frames that led to it
        lines = [line.strip() for line in before.splitlines() if line.strip()]
        return " ".join(lines[-1].split())
    text = text.partition("Arguments received by")[0]
    return " ".join(text.split())


def _ended(error: SystemExit, path: Path | None) -> str:
    """Return what is said of a program that ends its process."""
    parses = path is not None and re.search(r"parse_args|sys\.argv|app\.run|absl|typer|click", _source(path))
    code = "" if error.code is None else f" with {error.code}"
    remedy = (
        "it parses command-line arguments where it is imported; lrtune gives it none. Give every argument a default, "
        'parse them under if __name__ == "__main__":, or make them parameters of build_model and load_data, which '
        "objective.kwargs sets"
        if parses
        else "nothing that ends the process may run where it is imported or called"
    )
    return f"it ends its process{code}{_line(error, path)}: {remedy}"


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _line(error: BaseException, path: Path | None) -> str:
    """Return " (line n)" of the last frame inside the objective's own file."""
    if path is None:
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path]
    return f" (line {frames[-1].lineno})" if frames else ""
