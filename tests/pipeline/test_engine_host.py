"""The engine host: a child's misbehaviour costs its shard, never the node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import odd_engine
import psutil
import pytest
import trio

from swarmpy.abc import Progress, Row, Want
from swarmpy.config import EngineConfig
from swarmpy.errors import EngineLost, ExtensionNotFound, ModelRefused, RowError
from swarmpy.pipeline import engine_process
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.pipeline.engine_threads import ChildLock, core_count, count_children, threads_for
from swarmpy.proto.tensor import Tensor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")

ODD = "odd_engine:OddEngine"


@asynccontextmanager
async def running_host(
    cache: Path, *, name: str = ODD, config: EngineConfig | None = None
) -> AsyncIterator[EngineHost]:
    host = EngineHost(name, config=config or EngineConfig(threads=1), cache_folder=cache)
    async with trio.open_nursery() as nursery:
        await nursery.start(_run, host)
        yield host
        nursery.cancel_scope.cancel()


async def _run(host: EngineHost, task_status: trio.TaskStatus[None]) -> None:
    await host.run(task_status=task_status)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[EngineHost]:
    async with running_host(tmp_path) as host:
        yield host


async def load(host: EngineHost, path: Path, *, start: int = 0, end: int = 2) -> HostedShard:
    return await host.load(path, start=start, end=end, slots=2, context=100, exact=True)


def row(what: int = odd_engine.FINE, *, slot: int = 0, position: int = 0) -> Row:
    ids = np.array([what], np.int32)
    return Row(slot=slot, position=position, count=1, token_ids=ids, hidden=None, want=Want.HIDDEN)


def hidden_row(numbers: Sequence[float]) -> Row:
    data = np.array([numbers], np.float32)
    tensor = Tensor("float32", data.shape, data.tobytes())
    return Row(slot=0, position=0, count=1, token_ids=None, hidden=(tensor,), want=Want.LAST_LOGITS)


def mode_of(folder: Path) -> int | None:
    return folder.stat().st_mode & 0o777 if folder.exists() else None


# What works -----------------------------------------------------------------


async def test_the_child_that_inspected_loads_the_shard(host: EngineHost, tmp_path: Path) -> None:
    """Imports cost a second; the child that paid them is kept for the load."""
    inspection = await host.inspect(tmp_path)
    assert host._spare is not None
    spare = host._spare.pid

    shard = await load(host, tmp_path)

    assert shard.pid == spare
    assert inspection.layer_count == odd_engine.LAYERS


async def test_rows_come_back_in_order_with_the_engines_own_time(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path)

    outcome = await shard.step([row(slot=0, position=3), row(slot=1, position=5)])

    numbers = [np.frombuffer(output.hidden[0].data, np.float32)[0] for output in outcome.outputs]
    assert numbers == [3.0, 5.0]
    assert [output.slot for output in outcome.outputs] == [0, 1]
    assert 0 < outcome.engine_s < 1


async def test_the_last_stage_gives_logits(host: EngineHost, tmp_path: Path) -> None:
    shard = await load(host, tmp_path, start=2, end=4)

    outcome = await shard.step([hidden_row([1.0] * odd_engine.WIDTH)])

    logits = outcome.outputs[0].logits
    assert logits is not None
    assert logits.shape == (odd_engine.VOCABULARY,)


async def test_slot_calls_reach_the_shard_and_its_errors_come_back(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path)

    await shard.free(0)
    assert await shard.snapshot(1) == 11
    await shard.restore(1, 11)
    state = await shard.export_state(0, 2, 6)
    await shard.import_state(1, 2, 6, state)
    with pytest.raises(RowError, match="cannot cut slot 1 back to 7"):
        await shard.truncate(1, 7)

    assert shard.is_alive


async def test_progress_of_a_load_is_told(host: EngineHost, tmp_path: Path) -> None:
    told: list[Progress] = []

    await host.load(tmp_path, start=0, end=1, slots=1, context=10, exact=True, progress=told.append)

    assert [(progress.done, progress.total) for progress in told] == [(1, 2), (2, 2)]


async def test_a_refused_model_is_refused_by_name_and_the_child_lives(
    host: EngineHost, tmp_path: Path
) -> None:
    with pytest.raises(ModelRefused, match="asks for code"):
        await host.inspect(tmp_path / "refused")

    assert (await host.inspect(tmp_path)).engine == "odd"


def test_an_unknown_engine_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExtensionNotFound, match="no engine 'nope'"):
        EngineHost("nope", config=EngineConfig(), cache_folder=tmp_path)


async def test_an_engine_in_process_has_the_same_interface(tmp_path: Path) -> None:
    async with running_host(tmp_path, name="swarmpy.testing.engine:EchoEngine") as host:
        inspection = await host.inspect(tmp_path)
        shard = await load(host, tmp_path, end=inspection.layer_count)
        first = replace(row(7), want=Want.LAST_LOGITS)

        outcome = await shard.step([first])
        await shard.close()

        assert outcome.outputs[0].logits is not None
        assert shard.pid == os.getpid()
        with pytest.raises(EngineLost, match="closed"):
            await shard.step([first])


# What a row must not break --------------------------------------------------


async def test_a_nan_in_a_hidden_state_never_reaches_the_engine(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path, start=2, end=4)

    outcome = await shard.step([hidden_row([float("nan")] * odd_engine.WIDTH)])

    assert outcome.outputs[0].error == "hidden state not finite"


async def test_a_hidden_state_of_another_width_is_not_even_sent(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path, start=2, end=4)

    with pytest.raises(RowError, match="expected float32"):
        await shard.step([hidden_row([1.0])])

    assert shard.is_alive


async def test_a_token_outside_the_vocabulary_is_that_rows_error(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path)

    outcome = await shard.step([row(odd_engine.VOCABULARY), row(slot=1)])

    assert "outside the vocabulary" in outcome.outputs[0].error
    assert outcome.outputs[1].error == ""


async def test_a_nan_from_the_engine_is_that_rows_error(host: EngineHost, tmp_path: Path) -> None:
    shard = await load(host, tmp_path)

    outcome = await shard.step([row(odd_engine.NOT_FINITE), row(slot=1)])

    assert outcome.outputs[0].error == "engine output not finite"
    assert outcome.outputs[1].error == ""


# What costs the child -------------------------------------------------------


@pytest.mark.parametrize("what", [odd_engine.WRONG_SHAPE, odd_engine.WRONG_SLOT])
async def test_an_output_that_was_not_asked_for_costs_the_child(
    host: EngineHost, tmp_path: Path, what: int
) -> None:
    shard = await load(host, tmp_path)

    with pytest.raises(EngineLost, match="broke the protocol"):
        await shard.step([row(what)])

    assert not shard.is_alive


async def test_an_abort_is_an_error_and_the_next_load_works(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path)

    with pytest.raises(EngineLost, match="SIGABRT"):
        await shard.step([row(odd_engine.CRASH)])

    again = await load(host, tmp_path)
    assert (await again.step([row()])).outputs[0].error == ""


async def test_a_childs_last_words_are_in_the_error(host: EngineHost, tmp_path: Path) -> None:
    shard = await load(host, tmp_path)

    with pytest.raises(EngineLost, match=r"exit code 3\):\nthe model does not like it"):
        await shard.step([row(odd_engine.EXIT)])


async def test_an_idle_childs_death_is_noticed(host: EngineHost, tmp_path: Path) -> None:
    shard = await load(host, tmp_path)

    os.kill(shard.pid, signal.SIGKILL)
    with trio.fail_after(5):
        reason = await shard.wait_lost()

    assert "SIGKILL" in reason
    assert not shard.is_alive
    assert host.shards == ()


async def test_a_step_beyond_its_deadline_costs_the_child(tmp_path: Path) -> None:
    config = EngineConfig(threads=1, step_timeout_s=0.2)
    async with running_host(tmp_path, config=config) as host:
        shard = await load(host, tmp_path)

        with trio.fail_after(5), pytest.raises(EngineLost, match="before the deadline"):
            await shard.step([row(odd_engine.SLEEP)])


async def test_a_busy_child_is_not_taken_for_a_frozen_one(
    host: EngineHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both give no reply; only the busy one answers pings. Method: stop it once it has answered."""
    monkeypatch.setattr(engine_process, "HEARTBEAT_S", 0.5)
    shard = await load(host, tmp_path)

    with trio.move_on_after(1.5):
        await shard.step([row(odd_engine.SLEEP)])
    assert shard.is_alive

    os.kill(shard.pid, signal.SIGSTOP)
    with trio.fail_after(10), pytest.raises(EngineLost, match="frozen"):
        await shard.free(0)


async def test_a_cancelled_step_leaves_the_next_one_its_own_reply(
    host: EngineHost, tmp_path: Path
) -> None:
    shard = await load(host, tmp_path)

    with trio.CancelScope() as scope:
        scope.cancel()
        await shard.step([row(position=1)])
    outcome = await shard.step([row(position=2)])

    assert np.frombuffer(outcome.outputs[0].hidden[0].data, np.float32)[0] == 2.0


async def test_three_crashes_withdraw_the_shard_with_the_reason(
    host: EngineHost, tmp_path: Path
) -> None:
    path = tmp_path / "crashes"
    for _ in range(3):
        with pytest.raises(EngineLost, match="SIGABRT"):
            await load(host, path)

    with pytest.raises(EngineLost, match=r"withdrawn: the engine crashed 3 times.*SIGABRT"):
        await load(host, path)


# What a child has, and leaves -----------------------------------------------


async def test_a_child_inherits_only_what_the_list_allows(
    host: EngineHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMPY_TEST_SECRET", "x")

    inspection = await host.inspect(tmp_path)

    names = set(inspection.build_id.split())
    assert "SWARMPY_TEST_SECRET" not in names
    assert {"OPENBLAS_NUM_THREADS", "TMPDIR", "MLX_DISABLE_COMPILE"} <= names


async def test_a_closed_child_ends_cleanly_and_leaves_nothing(
    host: EngineHost, tmp_path: Path
) -> None:
    folder = Path((await host.inspect(tmp_path)).architecture)
    assert mode_of(folder) == 0o700
    shard = await load(host, tmp_path)
    process = host._shards[0]._process  # type: ignore[attr-defined]

    await shard.close()
    await shard.close()

    assert process.exit_code == 0
    assert mode_of(folder) is None
    assert count_children(tmp_path / "run" / "engines") == 0
    with pytest.raises(EngineLost, match="closed"):
        await shard.step([row()])


async def test_a_node_that_stops_takes_its_children_along(tmp_path: Path) -> None:
    async with running_host(tmp_path) as host:
        shard = await load(host, tmp_path)
        child = psutil.Process(shard.pid)

    assert not child.is_running()


@pytest.mark.parametrize("what", [odd_engine.FINE, odd_engine.SLEEP])
def test_no_child_outlives_a_killed_node_by_two_seconds(tmp_path: Path, what: int) -> None:
    """Idle or computing. Method: a node in a process of its own, killed without a chance to act."""
    program = textwrap.dedent(f"""
        import sys, trio
        from pathlib import Path
        import test_engine_host as t

        async def main():
            async with t.running_host(Path({str(tmp_path)!r})) as host:
                shard = await t.load(host, Path({str(tmp_path)!r}))
                print(shard.pid, flush=True)
                await shard.step([t.row({what})])
                await trio.sleep_forever()

        trio.run(main)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    ) as node:
        assert node.stdout is not None
        child = psutil.Process(int(node.stdout.readline()))
        node.kill()

    child.wait(timeout=2)
    engines = tmp_path / "run" / "engines"
    assert count_children(engines) == 0
    assert list(engines.iterdir()) == []


def test_a_child_whose_parent_is_gone_ends_at_once() -> None:
    """It may end between the spawn and the request to the kernel."""
    command = [sys.executable, "-m", "swarmpy.pipeline.engine_child", ODD, "0", "1"]

    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 1


def test_the_childs_module_can_be_imported_where_no_limits_can_be_set() -> None:
    """As on Windows, whose Python has no module `resource`."""
    code = "import sys; sys.modules['resource'] = None; import swarmpy.pipeline.engine_child"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Threads --------------------------------------------------------------------


def test_children_are_counted_while_any_process_holds_their_lock(tmp_path: Path) -> None:
    one, two = ChildLock(tmp_path), ChildLock(tmp_path)
    both = count_children(tmp_path)

    one.hand_over()  # Nobody inherited it, so this ends it.

    assert both == 2
    assert count_children(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == [two.scratch, two.path]
    two.hand_over()


def test_cores_are_shared_out_among_the_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpy.pipeline.engine_threads.core_count", lambda: 9)
    locks = [ChildLock(tmp_path)]
    alone = threads_for(tmp_path, configured=0)
    locks += [ChildLock(tmp_path), ChildLock(tmp_path)]

    assert alone == 8
    assert threads_for(tmp_path, configured=0) == 2
    assert threads_for(tmp_path, configured=5) == 5
    for lock in locks:
        lock.hand_over()


def test_a_machine_has_a_core() -> None:
    assert core_count() >= 1
