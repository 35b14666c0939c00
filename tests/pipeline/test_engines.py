"""Which of a node's engines runs a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarmpy.abc import Inspection
from swarmpy.config import EngineConfig
from swarmpy.errors import EngineLost, ExtensionNotFound, ModelRefused
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.pipeline import engines
from swarmpy.pipeline.engine_host import EngineHost
from swarmpy.pipeline.engines import Choice, Engines
from swarmpy.pipeline.stage import StageService
from swarmpy.testing.engine import EchoModel
from swarmpy.testing.network import SimNetwork

FOLDERS, ALL, PROUD = (f"picky_engines:{name}" for name in ("FoldersOnly", "AllRounder", "Proud"))


async def choice(folder: Path, *names: str, path: Path | None = None) -> Choice:
    hosts = [EngineHost(name, config=EngineConfig(), cache_folder=folder) for name in names]
    return await Engines(hosts).choose(path or EchoModel().write(folder / "model"))


@pytest.mark.parametrize("names", [(FOLDERS, ALL), (ALL, FOLDERS)])
async def test_the_engine_that_suits_the_format_best_runs_the_model(
    tmp_path: Path, names: Sequence[str]
) -> None:
    chosen = await choice(tmp_path, *names)

    assert (chosen.inspection.engine, chosen.why) == ("folders", "made for folders")


async def test_an_engine_that_does_not_know_the_format_is_not_asked(tmp_path: Path) -> None:
    chosen = await choice(tmp_path, FOLDERS, ALL, path=tmp_path / "model.gguf")

    assert (chosen.inspection.engine, chosen.why) == ("all", "takes anything")


async def test_where_the_first_refuses_the_next_runs_the_model_and_the_reason_is_kept(
    tmp_path: Path,
) -> None:
    chosen = await choice(tmp_path, PROUD, FOLDERS, ALL)

    assert chosen.inspection.engine == "folders"
    assert chosen.why == f"made for folders; {PROUD}: not good enough"


class LostOnce(EngineHost):
    """Its child is killed while it is asked for the first time."""

    was_lost = False

    async def inspect(self, path: Path) -> Inspection:
        if not self.was_lost:
            self.was_lost = True
            raise EngineLost("killed: out of memory")
        return await super().inspect(path)


async def test_an_engine_that_was_lost_while_it_was_asked_is_asked_again(tmp_path: Path) -> None:
    path = EchoModel().write(tmp_path / "model")
    first, other = (
        kind(name, config=EngineConfig(), cache_folder=tmp_path)
        for kind, name in ((LostOnce, FOLDERS), (EngineHost, ALL))
    )
    draw = random.Random(1)
    host = NativeHost(Identity.generate(draw), SimNetwork().network("10.0.0.1"), random=draw)
    stages = StageService(
        host, Engines([first, other]), memory_bytes_max=1, find_model=lambda _: path
    )

    at_first = await stages.choose("ab" * 32)
    remembered = stages.chosen("ab" * 32)
    afterwards = await stages.choose("ab" * 32)

    assert (at_first.host, at_first.is_certain, remembered) == (other, False, None)
    assert f"{FOLDERS}: killed: out of memory" in at_first.why
    assert (afterwards.host, stages.chosen("ab" * 32)) == (first, afterwards)


async def test_where_all_refuse_each_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="not good enough"):
        await choice(tmp_path, PROUD)
    with pytest.raises(ModelRefused, match=r"no engine here runs model \(.*not good enough.*; "):
        await choice(tmp_path, PROUD, PROUD)


async def test_where_no_engine_knows_the_format_those_installed_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="FoldersOnly") as caught:
        await choice(tmp_path, FOLDERS, path=tmp_path / "model.gguf")
    assert "llama" in caught.value.fix


async def test_the_engine_that_the_settings_name_is_the_only_one(tmp_path: Path) -> None:
    found = Engines.find(EngineConfig(name=ALL), cache_folder=tmp_path)

    chosen = await found.choose(EchoModel().write(tmp_path / "model"))

    assert found.names == (ALL,)
    assert (chosen.inspection.engine, chosen.why) == (
        "all",
        "the settings name it (engine.name)",
    )


def test_engines_that_cannot_be_imported_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "engine_names", lambda: ["no_such_module:Engine", ALL])

    assert Engines.find(EngineConfig(), cache_folder=tmp_path).names == (ALL,)


def test_a_configured_engine_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExtensionNotFound):
        Engines.find(EngineConfig(name="no_such_module:Engine"), cache_folder=tmp_path)


def test_a_node_may_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "engine_names", list)

    found = Engines.find(EngineConfig(), cache_folder=tmp_path)

    assert (bool(found), found.names) == (False, ())
