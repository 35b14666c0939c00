"""Half-open connections: how many are admitted, and who is dropped."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from swarmpy.abc import Address
from swarmpy.net.handshakes import Handshakes, subnet_of


async def hold(
    handshakes: Handshakes,
    remote: str,
    dropped: list[str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stay in a handshake until dropped."""
    with handshakes.admit(Address(remote)):
        task_status.started()
        await trio.sleep_forever()
    dropped.append(remote)


async def dropped_by(remotes: list[str], *, count_max: int, per_subnet_max: int) -> list[str]:
    """Return who is dropped when these come one after the other."""
    handshakes = Handshakes(count_max=count_max, per_subnet_max=per_subnet_max)
    dropped: list[str] = []
    async with trio.open_nursery() as nursery:
        for remote in remotes:
            await nursery.start(hold, handshakes, remote, dropped)
        await trio.testing.wait_all_tasks_blocked()
        result = list(dropped)
        assert handshakes.count == len(remotes) - len(result)
        nursery.cancel_scope.cancel()
    assert handshakes.count == 0
    return result


def remote(host: int, port: int) -> str:
    return f"/ip4/192.0.2.{host}/tcp/{port}"


@pytest.mark.parametrize(("count", "dropped"), [(2, 0), (3, 0), (4, 1)])
async def test_the_bound_in_total_drops_the_oldest(count: int, dropped: int) -> None:
    remotes = [remote(host, 1) for host in range(1, count + 1)]
    assert await dropped_by(remotes, count_max=3, per_subnet_max=2) == remotes[:dropped]


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (2, 0), (3, 1)])
async def test_the_bound_of_one_place_drops_its_own_oldest(count: int, dropped: int) -> None:
    flood = [remote(7, port) for port in range(1, count + 1)]
    remotes = [remote(1, 1), *flood]
    assert await dropped_by(remotes, count_max=9, per_subnet_max=2) == flood[:dropped]


async def test_a_finished_handshake_frees_its_place() -> None:
    handshakes = Handshakes(count_max=1, per_subnet_max=1)
    for port in range(3):
        with handshakes.admit(Address(remote(1, port))):
            assert handshakes.count == 1
    assert handshakes.count == 0


def test_an_ipv6_party_holds_its_64_bit_prefix() -> None:
    first = subnet_of(Address("/ip6/2001:db8:1:2:3::4/tcp/1"))
    assert first == subnet_of(Address("/ip6/2001:db8:1:2:ffff::1/tcp/9"))
    assert first != subnet_of(Address("/ip6/2001:db8:1:3::4/tcp/1"))
