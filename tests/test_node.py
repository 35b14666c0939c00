"""A node as a program uses it: real nodes over real TCP on loopback, with the EchoEngine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from swarmpy.abc import ProtocolId
from swarmpy.config import Config, EngineConfig
from swarmpy.errors import (
    ConfigError,
    ConnectionLost,
    ContextExceeded,
    ExtensionNotFound,
    InviteUsed,
    ModelNotFound,
    NoPipeline,
    NotAMember,
    RemoteProtocolError,
    SamplingError,
    StageLost,
    StreamReset,
)
from swarmpy.node import Node
from swarmpy.pipeline.session import Generation
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing.engine import reply
from tests.small_nodes import until
from tests.swarms import MODEL, WHOLE_BYTES, config, environment, tcp_swarm, wait_no_sessions

PROMPT = list(range(150))
GREEDY = Sampling()


async def tokens_of(generation: Generation) -> list[int]:
    async with generation:
        return [token.id async for token in generation]


async def test_three_nodes_split_a_model_and_answer_as_one_would(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path) as (first, _, _):
        generation = await first.generate("echo", PROMPT, GREEDY, max_tokens=50)

        assert await tokens_of(generation) == reply(MODEL, PROMPT, 50)
        stages = generation.pipeline.stages
        assert [stage.start for stage in stages[1:]] == [stage.end for stage in stages[:-1]]
        assert {stage.name for stage in stages} == {"a", "b", "c"}
        assert [stage.sees_prompt for stage in stages] == [True, False, False]


async def test_a_name_that_cannot_be_printed_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.name"):
        async with Node.open(config("a\tb"), environment(tmp_path, "a")):
            pass


async def test_a_model_in_a_folder_of_any_name_is_announced(tmp_path: Path) -> None:
    """Goal: what a folder is called cannot make a node's announcements malformed."""
    async with Node.open(config("a"), environment(tmp_path, "a")) as node:
        node.found_network()
        pulled = await node.pull(str(MODEL.write(tmp_path / "\x1b[31mred")))

        assert pulled.display_name == "[31mred"
        told = node.discovery.announcement(node.peer_id)
        assert told is not None
        assert [model.display_name for model in told.models] == ["[31mred"]


async def test_any_member_can_ask_and_several_at_once(tmp_path: Path) -> None:
    answers: dict[str, list[int]] = {}

    async def ask_one(node: Node) -> None:
        prompt = [ord(node.name)] * 70
        answers[node.name] = await tokens_of(
            await node.generate("echo", prompt, GREEDY, max_tokens=20)
        )

    async with tcp_swarm(tmp_path) as nodes, trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(ask_one, node)

    assert answers == {name: reply(MODEL, [ord(name)] * 70, 20) for name in "abc"}


async def test_node_that_can_hold_the_model_answers_alone(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path, memory_bytes=WHOLE_BYTES) as (first, _, _):
        view = await first.prepare("echo")

    assert [(stage.name, stage.start, stage.end) for stage in view.stages] == [("a", 0, 12)]


async def test_member_that_never_saw_the_invite_is_accepted(tmp_path: Path) -> None:
    """Node c joined by an invite of a; b knows c by its membership record alone."""
    async with tcp_swarm(tmp_path) as (_, second, third):
        assert second.membership.is_member(third.peer_id)
        assert third.membership.is_member(second.peer_id)


async def ask(node: Node, other: Node, protocol: str) -> bytes:
    stream = await node.host.open_stream(other.peer_id, [ProtocolId(protocol)])
    return await stream.receive_some()


async def test_stranger_is_served_nothing(tmp_path: Path) -> None:
    refusals = (RemoteProtocolError, StreamReset, ConnectionLost)
    async with (
        tcp_swarm(tmp_path, ("a", "b")) as (first, _),
        Node.open(config("stranger"), environment(tmp_path, "stranger")) as stranger,
    ):
        for protocol in ("/swarmpy/pipeline/1", "/swarmpy/announce/1"):
            await stranger.host.dial(first.peer_id, first.host.addresses)
            with pytest.raises(refusals):
                await ask(stranger, first, protocol)
        assert not first.membership.is_member(stranger.peer_id)
        assert not stranger.membership.is_member(first.peer_id)


async def test_invite_admits_one_machine_only(tmp_path: Path) -> None:
    async with (
        Node.open(config("a"), environment(tmp_path, "a")) as issuer,
        Node.open(config("b"), environment(tmp_path, "b")) as winner,
        Node.open(config("c"), environment(tmp_path, "c")) as loser,
    ):
        code = (await issuer.create_invite()).code
        joined = await winner.join(code)

        with pytest.raises(InviteUsed):
            await loser.join(code)

        assert joined.issuer == "a"
        assert joined.seconds < 2.0
        assert loser.membership.networks() == []


async def test_restarted_node_is_reconnected_from_its_cache_within_a_second(
    tmp_path: Path,
) -> None:
    async with Node.open(config("a"), environment(tmp_path, "a")) as first:
        async with Node.open(config("b"), environment(tmp_path, "b")) as second:
            await second.join((await first.create_invite()).code)
            await second.wait_members(1)
        began_s = trio.current_time()
        async with Node.open(config("b"), environment(tmp_path, "b")) as again:
            with trio.fail_after(5):
                await again.wait_members(1)
            assert trio.current_time() - began_s < 1.0


async def test_both_restarted_nodes_find_each_other_again(tmp_path: Path) -> None:
    """Ports are kept, so the cached addresses still hold."""
    async with (
        Node.open(config("a"), environment(tmp_path, "a")) as first,
        Node.open(config("b"), environment(tmp_path, "b")) as second,
    ):
        await second.join((await first.create_invite()).code)
        await second.wait_members(1)

    async with (
        Node.open(config("a"), environment(tmp_path, "a")) as first,
        Node.open(config("b"), environment(tmp_path, "b")) as second,
    ):
        with trio.fail_after(5):
            await first.wait_members(1)
            await second.wait_members(1)


async def test_closed_reply_frees_its_slots_everywhere(tmp_path: Path) -> None:
    """Two slots a stage: five replies that are cut short must leave room for a sixth."""
    async with tcp_swarm(tmp_path) as (first, second, third):
        for _ in range(5):
            async with await first.generate("echo", PROMPT, GREEDY, max_tokens=300) as generation:
                await anext(generation)
        with trio.fail_after(5):
            await tokens_of(await first.generate("echo", PROMPT, GREEDY, max_tokens=3))
            await wait_no_sessions(first, second, third)


async def test_lost_stage_ends_the_reply_and_the_next_plan_does_without_it(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path) as (first, second, third):
        generation = await first.generate("echo", PROMPT, GREEDY, max_tokens=300)
        await anext(generation)
        second.host.close()
        with pytest.raises(StageLost):
            await tokens_of(generation)
        with pytest.raises(NoPipeline) as caught:
            await first.generate("echo", PROMPT, GREEDY, max_tokens=3)

    assert "bytes" in str(caught.value)
    assert "c" in str(caught.value)
    assert third.name == "c"


async def test_stopping_node_admits_nothing_and_lets_replies_finish(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path) as (first, _, _):
        generation = await first.generate("echo", PROMPT, GREEDY, max_tokens=50)
        first.request_stop()
        with pytest.raises(NoPipeline, match="stopping"):
            await first.generate("echo", PROMPT, GREEDY, max_tokens=1)

        assert await tokens_of(generation) == reply(MODEL, PROMPT, 50)
        with trio.fail_after(1):
            await first.wait_idle()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"model": "unknown"}, ModelNotFound),
        ({"sampling": Sampling(temperature=-1.0)}, SamplingError),
        ({"token_ids": [1] * 600}, ContextExceeded),
        ({"max_tokens": 0}, SamplingError),
    ],
)
async def test_bad_request_is_refused_by_name(
    tmp_path: Path, request_: dict[str, object], error: type[Exception]
) -> None:
    arguments = {"model": "echo", "token_ids": PROMPT, "sampling": GREEDY, "max_tokens": 5}
    arguments |= request_
    async with tcp_swarm(tmp_path, ("a",), WHOLE_BYTES) as (node,):
        with pytest.raises(error):
            await node.generate(**arguments)  # type: ignore[arg-type]


async def test_model_too_large_for_all_says_what_is_missing(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path, ("a", "b"), 200_000_000) as (first, _):
        with pytest.raises(NoPipeline) as caught:
            await first.generate("echo", PROMPT, GREEDY, max_tokens=5)

    assert "bytes" in str(caught.value)
    assert "missing" in str(caught.value)


async def test_invite_of_a_member_without_delegation_is_refused(tmp_path: Path) -> None:
    async with (
        Node.open(config("a"), environment(tmp_path, "a")) as first,
        Node.open(config("b"), environment(tmp_path, "b")) as second,
    ):
        await second.join((await first.create_invite(can_invite=False)).code)

        with pytest.raises(NotAMember):
            await second.create_invite()


async def test_engine_that_is_not_installed_is_named_with_the_fix(tmp_path: Path) -> None:
    settings = Config(engine=EngineConfig(name="warp"))

    with pytest.raises(ExtensionNotFound) as caught:
        async with Node.open(settings, environment(tmp_path, "a")):
            pass

    assert "warp" in str(caught.value)
    assert "install" in caught.value.fix.lower()


async def test_node_without_an_engine_routes_to_the_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the extra `mlx` brings an engine; without it a node still joins and asks others."""
    async with tcp_swarm(tmp_path, ("a",), WHOLE_BYTES) as (engine,):
        monkeypatch.setattr("swarmpy.pipeline.engines.engine_names", lambda: ["none-of-this-name"])
        settings = replace(config("router"), engine=EngineConfig(context=512))
        async with Node.open(settings, environment(tmp_path, "router")) as router:
            await router.pull(str(tmp_path / "echo"))
            await router.join((await engine.create_invite()).code)
            await router.wait_members(1)
            generation = await router.generate("echo", PROMPT, GREEDY, max_tokens=10)

            assert await tokens_of(generation) == reply(MODEL, PROMPT, 10)
            assert [stage.name for stage in generation.pipeline.stages] == ["a"]


async def test_folder_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a file where the folder should be")

    with pytest.raises(ConfigError, match="cannot use the folder"):
        async with Node.open(config("a"), environment(tmp_path, "a")):
            pass


async def test_own_error_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Node.open(config("a"), environment(tmp_path, "a")):
            raise KeyError("mine")


async def test_an_application_can_speak_its_own_protocol_over_the_host(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path, ("a", "b")) as (first, second):

        async def shout(stream: object) -> None:
            data = await stream.receive_some()  # type: ignore[attr-defined]
            await stream.send_all(data.upper())  # type: ignore[attr-defined]

        second.host.set_handler("/example/shout/1", shout)
        stream = await first.host.open_stream(second.peer_id, ["/example/shout/1"])
        await stream.send_all(b"hello")

        assert await stream.receive_some() == b"HELLO"


async def test_status_tells_what_the_node_holds(tmp_path: Path) -> None:
    async with tcp_swarm(tmp_path) as nodes:
        await tokens_of(await nodes[0].generate("echo", PROMPT, GREEDY, max_tokens=2))
        status = nodes[0].status()
        states = {peer.name: peer.state for peer in nodes[0].peers()}

    assert states == {"a": "self", "b": "member", "c": "member"}
    assert status.peers_connected == 2
    assert status.networks[0].members_connected == 2
    assert len(status.networks[0].words.split()) == 4
    assert [shard.split()[0] for shard in status.shards] == ["echo"]
    assert status.memory_bytes_free < status.memory_bytes_max


async def test_a_member_that_was_let_go_is_shown_as_revoked(tmp_path: Path) -> None:
    """Not as a stranger: by who revoked it, and by who was told."""
    async with tcp_swarm(tmp_path) as nodes:
        first, second, third = nodes
        first.revoke(third.peer_id)

        def states(node: Node) -> dict[str, str]:
            return {peer.name: peer.state for peer in node.peers()}

        assert states(first) == {"a": "self", "b": "member", "c": "revoked"}
        await until(lambda: states(second) == {"a": "member", "b": "self", "c": "revoked"})
