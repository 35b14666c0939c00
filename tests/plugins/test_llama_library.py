"""Which library is opened, and which is refused before anything is done with it."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path

import pytest

from swarmpy.errors import ConfigError, ExtensionNotFound
from swarmpy.plugins.llama import library, structs

INSTALL = 'pip install "swarmpy[llama]"'


@pytest.fixture(scope="session")
def package_library() -> Path:
    try:
        return library.find_library({})
    except ExtensionNotFound as missing:
        pytest.skip(f"no llama.cpp library: {missing}")


def pretend_installed(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    """Have the package be of `version`, its files in `folder`."""

    class Distribution(importlib.metadata.Distribution):
        def read_text(self, filename: str) -> str:
            return f"Metadata-Version: 2.1\nName: {structs.PACKAGE}\nVersion: {version}\n"

        def locate_file(self, path: object) -> Path:
            return folder / str(path)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())


# Finding --------------------------------------------------------------------


def test_a_configured_library_comes_before_the_package(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"
    path.touch()

    assert library.find_library({library.LIBRARY_VARIABLE: str(path)}) == path


def test_a_configured_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"

    with pytest.raises(ExtensionNotFound, match=r"SWARMPY_LLAMA_LIBRARY is .*libllama.so"):
        library.find_library({library.LIBRARY_VARIABLE: str(path)})


def test_the_package_of_the_pinned_version_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_installed(monkeypatch, tmp_path, structs.PACKAGE_VERSION)
    path = tmp_path / structs.PACKAGE / "xllamacpp.abi3.so"
    path.parent.mkdir()
    path.touch()

    assert library.find_library({}) == path


def test_a_package_of_another_version_is_refused_by_naming_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_installed(monkeypatch, tmp_path, "2026.11.1")

    with pytest.raises(ExtensionNotFound) as refused:
        library.find_library({})

    assert "xllamacpp 2026.11.1 is installed, expected 2026.10.11549" in str(refused.value)
    assert refused.value.fix == INSTALL


def test_a_machine_without_the_package_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)

    with pytest.raises(ExtensionNotFound) as refused:
        library.find_library({})

    assert refused.value.fix == INSTALL


def test_a_package_without_a_usable_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on Windows, where only Python's entry point is exported."""
    pretend_installed(monkeypatch, tmp_path, structs.PACKAGE_VERSION)

    with pytest.raises(ExtensionNotFound, match="no library that can be used"):
        library.find_library({})


def test_the_engine_is_not_offered_where_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then a node takes another engine."""
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "missing.so"))

    with pytest.raises(ExtensionNotFound):
        from swarmpy.plugins.llama import LlamaEngine  # noqa: F401


# Opening --------------------------------------------------------------------


def test_the_pinned_library_is_opened_and_names_its_build(package_library: Path) -> None:
    opened = library.open_library(package_library)

    assert opened.build_id.startswith(f"llama.cpp {structs.LLAMA_VERSION} ")
    assert library.open_library(package_library) is opened


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"
    path.write_bytes(b"not a library")

    with pytest.raises(ConfigError, match=r"cannot open libllama\.so"):
        library.open_library(path)


def test_a_library_of_another_version_is_refused(
    package_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structs, "LLAMA_VERSION", "0.5.0")

    with pytest.raises(ConfigError, match=r"is llama.cpp 0\.6\.0-dev, expected 0\.5\.0") as refused:
        library.open_library.__wrapped__(package_library)

    assert INSTALL in str(refused.value)


@pytest.mark.parametrize("removed", ["n_ubatch", "moe_cache_size", "embeddings"])
def test_a_structure_with_one_field_less_or_more_is_refused(
    package_library: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    """Method: forget one field, as an older version would have it; what follows it has moved."""
    table = tuple(field for field in structs.CONTEXT_PARAMS if field[0] != removed)
    monkeypatch.setattr(structs, "CONTEXT_PARAMS", table)
    native = ctypes.CDLL(str(package_library))

    with pytest.raises(ConfigError, match="lays out ContextParams in another way"):
        library.check_layout(native, "libllama.so")
