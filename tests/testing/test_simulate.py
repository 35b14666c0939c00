"""Simulated swarms: what `@simulate` gives a test, and that invariants hold under faults."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from swarm_stories import (
    PIPELINE,
    PROMPT,
    all_agree,
    ask_throughout_and_heal,
    plan,
    race_for_an_invite,
)

from swarmpy.errors import RemoteProtocolError
from swarmpy.testing import (
    Faults,
    InvariantBroken,
    LivenessFailed,
    MachineDown,
    Simulation,
    simulate,
    views_agree,
)
from swarmpy.testing.runner import run_test

HERE = Path(__file__).parent


@simulate(nodes=3, seeds=2)
async def test_a_swarm_forms_and_answers(sim: Simulation) -> None:
    await all_agree(sim)
    with sim.within(60, "a reply"):
        assert len(await sim.reply(sim.nodes[0], PROMPT, 20)) == 20


@simulate(nodes=4, seeds=8, faults=Faults())
async def test_replies_are_right_or_break_off_and_come_once_healed(sim: Simulation) -> None:
    """Goal: faults cost replies, never a wrong token. Method: ask all along, heal, ask again."""
    await ask_throughout_and_heal(sim)


@simulate(nodes=4, seeds=4, faults=Faults(lost_disks=0.5, crashes_per_minute=6.0))
async def test_machines_that_lose_their_disks_are_strangers_again(sim: Simulation) -> None:
    await trio.sleep(60)
    await sim.heal()
    await trio.sleep(30)
    lost = [node for node in sim.nodes if not node.node.membership.networks()]
    for node in sim.nodes:
        if node not in lost:
            assert not {item.peer for item in lost} & set(node.node.membership.members())


@simulate(nodes=5, seeds=5, is_joined=False, engine="", faults=Faults(crashes_per_minute=0))
async def test_one_of_many_joiners_wins_an_invite(sim: Simulation) -> None:
    await race_for_an_invite(sim)


@simulate(nodes=50, seeds=1, engine="", faults=Faults())
async def test_a_larger_swarm_agrees_once_healed(sim: Simulation) -> None:
    """Goal: faults leave no ghost and lose no member, among nodes on simulated hosts."""
    await trio.sleep(40)
    await sim.heal()
    await sim.until(lambda: views_agree(sim), within_s=90, what="all nodes agree on who is there")


@pytest.mark.parametrize("lose_disk", [False, True])
@simulate(nodes=3, seeds=1, engine="")
async def test_a_restarted_machine_is_who_its_disk_says(sim: Simulation, lose_disk: bool) -> None:
    node, before = sim.nodes[1], sim.nodes[1].peer
    await node.crash()
    with pytest.raises(MachineDown):
        _ = node.node
    await node.restart(lose_disk=lose_disk)
    assert (node.peer == before) != lose_disk
    assert bool(node.node.membership.networks()) != lose_disk


@pytest.mark.parametrize("nodes", [3, 50])
def test_a_stranger_says_what_it_likes_and_is_served_nothing(nodes: int) -> None:
    """A peer that is no member, on the same kind of host as the nodes."""

    async def knock(sim: Simulation) -> None:
        eve = await sim.stranger("eve")
        target = sim.nodes[0]
        await eve.dial(target.peer, [target.address])
        stream = await eve.open_stream(target.peer, [PIPELINE])
        await stream.send_all(b"let me in")
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await stream.receive_some()

    run_test(plan(nodes, engine="", host="native" if nodes < 50 else "sim"), knock, seed=0)


@simulate(nodes=2, seeds=1, engine="")
async def test_what_is_written_after_a_crash_is_lost(sim: Simulation) -> None:
    folder = sim.nodes[1].folder
    (folder / "before").write_bytes(b"kept")
    seen = []

    async def write_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            (folder / "after").write_bytes(b"lost")
            seen.append("written")

    async def in_the_node() -> None:
        sim.nodes[1].node.stages.spawn(write_when_cancelled)
        await trio.sleep(1)

    await in_the_node()
    await sim.nodes[1].crash()
    assert seen == ["written"]
    assert (folder / "before").exists()
    assert not (folder / "after").exists()


def digest(seed: int, host: str) -> str:
    """Run a seed with all its faults; return what tells runs apart."""
    chosen = plan(4, faults=Faults(), host=host)
    return run_test(chosen, ask_throughout_and_heal, seed=seed).trace.digest


def digest_in_a_process(seed: int, host: str, *, hash_seed: int) -> str:
    """Run a seed in a new process with another hash seed and another heap."""
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r});"
        f"junk = [object() for _ in range({hash_seed} * 1000)];"
        f"from test_simulate import digest; print(digest({seed}, {host!r}))"
    )
    environ = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("host", ["native", "sim"])
def test_a_seed_with_faults_is_one_run_in_any_process(host: str) -> None:
    digests = {digest_in_a_process(3, host, hash_seed=hash_seed).strip() for hash_seed in (1, 7)}
    assert digests == {digest(3, host)}
    assert digest(4, host) not in digests


def test_other_seeds_draw_other_faults() -> None:
    logs = {
        tuple(run_test(plan(3, faults=Faults()), wait_a_minute, seed=seed).fault_log)
        for seed in range(4)
    }
    assert len(logs) == 4


async def wait_a_minute(_: Simulation) -> None:
    await trio.sleep(60)


def test_a_failure_tells_seed_faults_events_and_how_to_replay_it() -> None:
    async def fail(sim: Simulation) -> None:
        await trio.sleep(30)
        sim.violate("something was seen")
        await trio.sleep(1)

    with pytest.raises(InvariantBroken, match="something was seen, at 30") as caught:
        run_test(plan(2, faults=Faults()), fail, seed=5, replay="pytest x --sim-seed 5")
    (note,) = caught.value.__notes__
    for expected in ("seed 5", "drew ", "last events", "pytest x --sim-seed 5"):
        assert expected in note


def test_what_takes_too_long_fails() -> None:
    async def hang(_: Simulation) -> None:
        await trio.sleep_forever()

    async def wait(sim: Simulation) -> None:
        with sim.within(5, "the impossible"):
            await trio.sleep(6)

    with pytest.raises(LivenessFailed, match="did not end within 900"):
        run_test(plan(1), hang, seed=0)
    with pytest.raises(LivenessFailed, match="within 5 s: the impossible"):
        run_test(plan(1), wait, seed=0)


def test_the_plugin_chooses_seeds_and_says_how_to_replay(tmp_path: Path) -> None:
    """Method: seed 1 fails, seed 10 does not; what else the ids hold fits in no `-k` expression."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from swarmpy.testing import Simulation, simulate\n"
        "@pytest.mark.parametrize('what', ['a=b', 'k(1) \"x\"'])\n"
        "@simulate(nodes=1, seeds=2, engine='')\n"
        "async def test_it(sim: Simulation, what: str) -> None:\n"
        "    assert sim.seed != 1\n"
    )
    said = run_pytest(tmp_path, "--sim-runs", "11").stdout
    assert "2 failed, 20 passed" in said
    # Told with each failure, and once more in a summary that is not cut off, as in CI.
    replays = {line.split("replay: ")[1] for line in said.splitlines() if "replay: " in line}
    assert len(replays) == 2
    for replay in replays:
        command, *arguments = shlex.split(replay)
        assert command == "pytest"
        assert "1 failed in" in run_pytest(tmp_path, *arguments).stdout


@pytest.mark.parametrize("count", [0, -1])
def test_to_run_no_seeds_is_refused(tmp_path: Path, count: int) -> None:
    """Every simulated test would be skipped, and the run look green."""
    refused = run_pytest(tmp_path, f"--sim-runs={count}")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"expected at least 1 seed, got {count}" in refused.stderr
    with pytest.raises(ValueError, match="at least 1 seed"):
        simulate(nodes=1, seeds=count)


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
