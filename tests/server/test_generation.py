"""Pieces of answers on their way from the engine's threads into the event loop."""

import asyncio
import threading

from meswitch.engine import Chunk
from meswitch.server.generation import Deliveries

PIECE = Chunk("a", 1)


def test_every_piece_comes_once_and_in_order_whoever_posts_it():
    async def collect():
        here, streams = Deliveries.here(), [asyncio.Queue() for _ in range(4)]

        def post(stream):
            for number in range(2000):
                here.post(streams[stream], number, PIECE)

        threads = [threading.Thread(target=post, args=(stream,)) for stream in range(4)]
        for thread in threads:
            thread.start()
        return [[(await stream.get())[0] for _ in range(2000)] for stream in streams], streams

    found, streams = asyncio.run(asyncio.wait_for(collect(), 60))
    assert found == [list(range(2000))] * 4
    assert all(stream.empty() for stream in streams)


def test_a_step_of_many_streams_does_not_keep_others_waiting():
    async def ask_in_between():
        here, streams = Deliveries.here(), [asyncio.Queue() for _ in range(300)]
        for stream in streams:
            here.post(stream, 0, PIECE)
        for _ in range(3):  # the loop goes round three times
            await asyncio.sleep(0)
        return sum(not stream.empty() for stream in streams)

    assert 0 < asyncio.run(ask_in_between()) < 100


def test_a_loop_that_is_closed_is_left_alone():
    async def here():
        return Deliveries.here(), asyncio.Queue()

    deliveries, stream = asyncio.run(here())
    deliveries.post(stream, 0, PIECE)
    assert stream.empty()
