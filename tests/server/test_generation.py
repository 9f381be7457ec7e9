"""What comes in crowds is done a few at a time, all of it, and in order."""

import asyncio
import threading
from functools import partial

from meswitch.server.generation import PIECES
from meswitch.server.middleware import REQUESTS, TurnMiddleware


def test_every_piece_comes_once_and_in_order_whoever_posts_it():
    async def collect():
        here, streams = PIECES.here(), [asyncio.Queue() for _ in range(4)]

        def post(stream):
            for number in range(2000):
                here.post(partial(streams[stream].put_nowait, number))

        threads = [threading.Thread(target=post, args=(stream,)) for stream in range(4)]
        for thread in threads:
            thread.start()
        return [[await stream.get() for _ in range(2000)] for stream in streams], streams

    found, streams = asyncio.run(asyncio.wait_for(collect(), 60))
    assert found == [list(range(2000))] * 4
    assert all(stream.empty() for stream in streams)


def test_a_step_of_many_streams_does_not_keep_others_waiting():
    async def ask_in_between():
        here, streams = PIECES.here(), [asyncio.Queue() for _ in range(300)]
        for stream in streams:
            here.post(partial(stream.put_nowait, 0))
        for _ in range(3):  # the loop goes round three times
            await asyncio.sleep(0)
        return sum(not stream.empty() for stream in streams)

    assert 0 < asyncio.run(ask_in_between()) < 100


def test_a_loop_that_is_closed_is_left_alone():
    async def here():
        return PIECES.here(), asyncio.Queue()

    crowd, stream = asyncio.run(here())
    crowd.post(partial(stream.put_nowait, 0))
    assert stream.empty()


def test_of_requests_that_come_together_a_few_begin_and_others_pass_them():
    begun = []

    async def app(scope, receive, send):
        begun.append(scope["path"])

    async def crowd():
        middleware = TurnMiddleware(app)
        scopes = [{"type": "http", "method": "POST", "path": number} for number in range(50)]
        posts = [asyncio.create_task(middleware(scope, None, None)) for scope in scopes]
        await asyncio.sleep(0)
        await middleware({"type": "http", "method": "GET", "path": "/health"}, None, None)
        await asyncio.gather(*posts)
        assert REQUESTS.here() is not PIECES.here()

    asyncio.run(crowd())
    assert begun.index("/health") < 10
    assert [path for path in begun if path != "/health"] == list(range(50))
