"""One seed is one run, in any process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from swarmpy.abc import Address, ProtocolId, Stream
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.testing import Link, Simulation, run_simulation

ECHO = ProtocolId("/swarmpy-test/echo/1")


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def conversation(simulation: Simulation) -> int:
    """Five hosts dial each other and talk on many streams at once; return the bytes echoed."""
    hosts = []
    echoed = 0

    async def talk(near: NativeHost, far: NativeHost) -> None:
        nonlocal echoed
        peer = far.identity.peer_id
        await near.dial(peer, far.addresses)
        stream = await near.open_stream(peer, [ECHO])
        for _ in range(5):
            await stream.send_all(simulation.random.randbytes(simulation.random.randrange(1, 9000)))
            echoed += len(await stream.receive_some())
            await trio.sleep(simulation.random.choice([0, 0.01]))
        await stream.close_write()

    async with trio.open_nursery() as nursery:
        for index in range(5):
            source = simulation.random_for(f"host {index}")
            network = simulation.world.network(f"10.0.0.{index + 1}")
            host = NativeHost(
                Identity.generate(source), network, random=source, wall_time=simulation.wall_time
            )
            host.set_handler(ECHO, echo)
            await nursery.start(host.run)
            await host.listen(Address("/ip4/0.0.0.0/tcp/0"))
            hosts.append(host)
        async with trio.open_nursery() as talks:
            for near in hosts:
                for far in hosts:
                    if near is not far:
                        talks.start_soon(talk, near, far)
        await trio.sleep(60)
        simulation.trace.record("over")
        nursery.cancel_scope.cancel()
    return echoed


def digest(seed: int) -> str:
    return run_simulation(conversation, seed=seed, link=Link(latency_s=0.01)).trace.digest


def digest_in_a_process(seed: int, *, hash_seed: int) -> str:
    """Run a seed in a new process with another hash seed and another heap."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        f"junk = [object() for _ in range({hash_seed} * 1000)];"
        f"from test_run_simulation import digest; print(digest({seed}))"
    )
    environ = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout


def test_one_seed_gives_one_trace_in_any_process() -> None:
    """The guard over the two private names of trio."""
    first = digest_in_a_process(7, hash_seed=1)
    assert first == digest_in_a_process(7, hash_seed=2)
    assert first.strip() == digest(7)


def test_another_seed_gives_another_trace() -> None:
    assert digest(1) != digest(2)


def test_the_result_and_the_first_lines_of_the_trace_are_kept() -> None:
    run = run_simulation(conversation, seed=1)
    assert run.result > 0
    assert run.trace.lines[0].startswith("0.000000000 dial /ip4/10.0.0.")
    assert any(line.endswith(" over") for line in run.trace.lines)


def test_trio_schedules_as_before_afterwards() -> None:
    module = importlib.import_module("trio._core._run")
    before = (module._r, module._ALLOW_DETERMINISTIC_SCHEDULING)

    async def fail(_: Simulation) -> None:
        raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        run_simulation(fail, seed=1)
    assert (module._r, module._ALLOW_DETERMINISTIC_SCHEDULING) == before


def test_an_environment_is_a_machine_of_the_world(tmp_path: Path) -> None:
    async def scenario(simulation: Simulation) -> None:
        environment = simulation.environment("10.0.0.9", tmp_path / "node")
        assert environment.network.interface_addresses() == ["10.0.0.9"]
        start_s = environment.wall_time()
        await trio.sleep(86400)
        assert environment.wall_time() == start_s + 86400
        assert not environment.mdns

    run_simulation(scenario, seed=1)
