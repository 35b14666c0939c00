"""Finds the llama.cpp library, opens it, and makes sure that it is the one the tables describe.

Opened by its path with no Python module around it, its symbols kept to itself: a second copy of
ggml in one process that saw them would crash. Only the engine's child may open it; an assertion in
it ends the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import platform
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from swarmpy.errors import ConfigError, ExtensionNotFound
from swarmpy.plugins.llama import structs

LIBRARY_VARIABLE = "SWARMPY_LLAMA_LIBRARY"
"""Environment: path of another build of the pinned version, say one for a GPU."""

INSTALL = 'pip install "swarmpy[llama]"'

ERRORS_KEPT = 4
"""Last error lines of the library, for our own errors' messages."""

_LEVELS: Mapping[int, int] = {2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
"""ggml's info, warning and error: it calls much an error that a caller handles."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Library:
    """An opened and checked library. There is one of a process, and it is never closed."""

    path: Path
    native: ctypes.CDLL
    """Its functions, with the types of `structs.SIGNATURES`."""
    build_id: str
    """Version, machine, CPU features and hash of the file: same id, same bits."""
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERRORS_KEPT))
    """What it logged as errors last."""
    _log: object = None
    """Called by the library as long as the process lives."""

    def last_errors(self) -> str:
        """Return the last error lines as one, and forget them."""
        text = "; ".join(self.errors)
        self.errors.clear()
        return text or "no reason given"


def find_library(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the library's path: the configured one, else the pinned package's. Opens nothing.

    Raises:
        ExtensionNotFound: Neither is there, or the package is of another version.
    """
    configured = environment.get(LIBRARY_VARIABLE)
    if configured:
        path = Path(configured)
        if not path.is_file():
            raise ExtensionNotFound(
                f"{LIBRARY_VARIABLE} is {configured!r:.200}, where no file is",
                fix=f"Correct {LIBRARY_VARIABLE}, or unset it and: {INSTALL}",
            )
        return path
    try:
        package = importlib.metadata.distribution(structs.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ExtensionNotFound(
            f"package {structs.PACKAGE} is not installed", fix=INSTALL
        ) from None
    if package.version != structs.PACKAGE_VERSION:
        raise ExtensionNotFound(
            f"{structs.PACKAGE} {package.version} is installed, expected "
            f"{structs.PACKAGE_VERSION}: {INSTALL}",
            fix=INSTALL,
        )
    folder = Path(str(package.locate_file(structs.PACKAGE)))
    for path in sorted(folder.glob(f"{structs.PACKAGE}*.so")):
        return path
    # On Windows the package's library shows Python's entry point only.
    raise ExtensionNotFound(
        f"{structs.PACKAGE} {package.version} has no library that can be used on "
        f"{platform.system()} {platform.machine()}",
        fix=f"Build llama.cpp {structs.LLAMA_VERSION} and set {LIBRARY_VARIABLE} to its path.",
    )


@cache
def open_library(path: Path) -> Library:
    """Open the library, once in a process.

    Raises:
        ConfigError: It cannot be opened, or is not the version the tables describe.
    """
    # An assertion would start a debugger for a backtrace: slow, and it shows prompts.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    try:
        native = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        for name, (result, arguments) in structs.SIGNATURES.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
        version = _text(native.llama_version())
    except (OSError, AttributeError) as error:
        raise ConfigError(f"cannot open {path.name}: {error}", fix=INSTALL) from error
    if version != structs.LLAMA_VERSION:
        raise ConfigError(
            f"{path.name} is llama.cpp {version:.40}, expected {structs.LLAMA_VERSION}: {INSTALL}",
            fix=INSTALL,
        )
    check_layout(native, path.name)
    errors: deque[str] = deque(maxlen=ERRORS_KEPT)
    log = structs.LogCallback(_Log(errors))
    native.llama_log_set(log, None)
    native.llama_backend_init()
    return Library(path, native, _build_id(native, path), errors, log)


def check_layout(native: ctypes.CDLL, name: str) -> None:
    """Check that the defaults the library gives are where the tables say.

    Raises:
        ConfigError: A field holds something else.
    """
    for function, table, kind in (
        (native.llama_model_default_params, structs.MODEL_PARAMS, structs.ModelParams),
        (native.llama_context_default_params, structs.CONTEXT_PARAMS, structs.ContextParams),
    ):
        wrong = structs.differing_defaults(structs.read_defaults(function, table), table)
        if wrong:
            raise ConfigError(
                f"{name} lays out {kind.__name__} in another way ({', '.join(wrong[:5])}): "
                f"expected the build of {structs.PACKAGE} {structs.PACKAGE_VERSION}: {INSTALL}",
                fix=INSTALL,
            )
        function.restype = kind


class _Log:
    """Hands the library's log on to Python's, a line at a time."""

    def __init__(self, errors: deque[str]) -> None:
        self._errors = errors
        self._level = logging.DEBUG

    def __call__(self, level: int, text: bytes | None, _: object) -> None:
        self._level = _LEVELS.get(level, self._level if level == 5 else logging.DEBUG)
        line = _text(text).strip()[:500]
        if line:
            if level == 4:
                self._errors.append(line)
            logger.log(self._level, "%s", line)


def _build_id(native: ctypes.CDLL, path: Path) -> str:
    """Name the build, and which of its code paths this CPU takes."""
    features = [
        part.rpartition(":")[2].split("=")[0].strip()
        for part in _text(native.llama_print_system_info()).split("|")
        if part.strip().endswith("= 1")
    ]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = "+".join(features)
    return f"llama.cpp {structs.LLAMA_VERSION} {digest[:12]} {platform.machine()} {names}"


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
