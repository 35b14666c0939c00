"""What a hop of a decode step is made of, part by part, each measured alone and warm.

* engine pipe: a request to an engine child and its reply, less the time inside the engine; the mean
  of a first, a middle and a last stage (token id in, hidden state through, logits out).
* serialisation: a step's frame taken apart and checked, and the next one put together.
* wire: half a round trip of such a frame between two nodes' hosts on loopback (Noise, Yamux, TCP).

What a ring's hop takes beyond these is told as `wake_ups`: processes woken on CPUs that went to
sleep or computed meanwhile, and caches that the engines have swept.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import trio
from transport.driver import LOOPBACK, STACKS, pair

from swarmpy.abc import Row, Want
from swarmpy.config import EngineConfig
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto.pipeline import HiddenStep, decode_step, encode_step
from swarmpy.proto.tensor import Tensor, TensorSpec, check_hidden
from swarmpy.testing.engine import EchoModel

ENGINE = "spin_engine:ChildEchoEngine"
STEPS = 300
WARM_UP_STEPS = 20
ROUND_TRIPS = 400
ROUND_TRIPS_S_MAX = 2.0


@dataclass(frozen=True)
class Parts:
    """Microseconds of one hop, medians."""

    engine_pipe: float
    serialisation: float
    wire: float

    @property
    def sum(self) -> float:
        return self.engine_pipe + self.serialisation + self.wire


async def measure_parts(*, hidden_size: int, vocabulary_size: int) -> Parts:
    """Measure the parts for hidden states of `hidden_size` float32."""
    step, hidden = _step(hidden_size)
    return Parts(
        engine_pipe=await _engine_pipe_us(hidden_size, vocabulary_size),
        serialisation=_serialisation_us(step, hidden),
        wire=await _wire_us(len(encode_step(step, (hidden,)))),
    )


def _step(hidden_size: int) -> tuple[HiddenStep, Tensor]:
    numbers = np.random.default_rng(1).standard_normal((1, hidden_size), np.float32)
    hidden = Tensor("float32", (1, hidden_size), numbers.tobytes())
    step = HiddenStep(
        session=bytes(range(16)),
        epoch=0,
        step=100,
        position=200,
        count=1,
        want="last_logits",
        tensors=(hidden.spec,),
        engine_us=(2500,),
    )
    return step, hidden


async def _engine_pipe_us(hidden_size: int, vocabulary_size: int) -> float:
    model = EchoModel(layers=3, hidden_size=hidden_size, vocabulary_size=vocabulary_size)
    with tempfile.TemporaryDirectory(prefix="swarmpy-bench-") as folder:
        path = model.write(Path(folder) / "echo")
        host = EngineHost(ENGINE, config=EngineConfig(), cache_folder=Path(folder) / "cache")
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            medians = []
            for start in range(model.layers):
                shard = await host.load(
                    path, start=start, end=start + 1, slots=1, context=1024, exact=True
                )
                medians.append(await _shard_us(shard, hidden_size))
                await shard.close()
            nursery.cancel_scope.cancel()
    return statistics.mean(medians)


async def _shard_us(shard: HostedShard, hidden_size: int) -> float:
    """Median microseconds of a step outside the engine, for layer `shard.start` of three."""
    hidden = Tensor("float32", (1, hidden_size), np.zeros((1, hidden_size), np.float32).tobytes())
    times_us = []
    for position in range(WARM_UP_STEPS + STEPS):
        row = Row(
            slot=0,
            position=position,
            count=1,
            token_ids=np.ones(1, np.int32) if shard.start == 0 else None,
            hidden=None if shard.start == 0 else (hidden,),
            want=Want.HIDDEN if shard.end < 3 else Want.LAST_LOGITS,
        )
        began = perf_counter()
        outcome = await shard.step((row,))
        times_us.append((perf_counter() - began - outcome.engine_s) * 1e6)
        assert not outcome.outputs[0].error, outcome.outputs[0].error
    return statistics.median(times_us[WARM_UP_STEPS:])


def _serialisation_us(step: HiddenStep, hidden: Tensor) -> float:
    frame = encode_step(step, (hidden,))
    spec = (TensorSpec("float32", (-1, hidden.shape[1])),)

    def times_us() -> Iterator[float]:
        for _ in range(WARM_UP_STEPS + STEPS):
            began = perf_counter()
            received, tensors = decode_step(memoryview(frame))
            check_hidden(tensors, spec, count=received.count)
            assert all(is_finite(tensor) for tensor in tensors)
            encode_step(received, tensors)
            yield (perf_counter() - began) * 1e6

    return statistics.median(list(times_us())[WARM_UP_STEPS:])


async def _wire_us(frame_bytes: int) -> float:
    with tempfile.TemporaryDirectory(prefix="swarmpy-bench-") as folder:
        async with pair(STACKS["swarmpy"](Path(folder), LOOPBACK)) as both:
            times_ms = await both.dialing.do(
                "rtt", size=frame_bytes, count=ROUND_TRIPS, seconds_max=ROUND_TRIPS_S_MAX
            )
    return statistics.median(times_ms) * 1e3 / 2
