"""From the engine's threads into the event loop: all answers to one HTTP request as one stream of pieces."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

from meswitch.engine import Chunk, Engine, Request
from meswitch.errors import MeswitchError
from meswitch.server.answers import Usage
from meswitch.server.errors import ApiError
from meswitch.server.schema import GenerationRequest
from meswitch.tokenizer import Prompt


class Generation:
    """The running answers, `request.n` for each prompt, in the order of the prompts.

    Make it inside the event loop. Whoever makes it calls `cancel` in the end, whatever happened.

    Raises:
        ApiError: the engine refuses one of them; then none runs.
    """

    def __init__(
        self, engine: Engine, model: str, prompts: Sequence[Prompt], request: GenerationRequest, prompt_field: str
    ) -> None:
        if engine.failure is not None:
            raise _dead(engine)
        count = len(prompts) * request.n
        if count > engine.max_queue:
            field = "n" if len(prompts) == 1 else prompt_field
            message = f"{field}: {count} answers in one request, the queue holds {engine.max_queue}; ask for less"
            raise ApiError(400, message, param=field, code="invalid_value")
        self._engine = engine
        self._choices = request.n
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
        self._requests: list[Request] = []
        try:
            for prompt in prompts:
                tokens: Prompt = prompt
                for choice in range(request.n):
                    listen = partial(self._post, len(self._requests))
                    started = engine.submit(tokens, model=model, params=request.params(choice), on_chunk=listen)
                    self._requests.append(started)
                    tokens = started.prompt  # encoded once
        except MeswitchError as error:
            self.cancel()
            raise ApiError.refused(error, prompt_field) from error

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(index of the answer, piece) until all answers are complete.

        Raises:
            ApiError: an answer failed.
        """
        running = len(self._requests)
        while running:
            index, chunk = await self._pieces.get()
            if chunk.error is not None:
                raise _dead(self._engine) if self._engine.failure else ApiError(500, chunk.error, code="engine_error")
            running -= chunk.finish_reason is not None
            yield index, chunk

    async def whole(self) -> list[tuple[str, str]]:
        """(text, finish reason) of every answer."""
        texts, reasons = [""] * len(self._requests), ["stop"] * len(self._requests)
        async for index, chunk in self.pieces():
            texts[index] += chunk.text
            reasons[index] = chunk.finish_reason or reasons[index]
        return list(zip(texts, reasons, strict=True))

    def usage(self) -> Usage:
        """Of complete answers."""
        prompt = sum(len(request.prompt) for request in self._requests[:: self._choices])
        completion = sum(len(request.tokens) for request in self._requests)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def cancel(self) -> None:
        """End what still runs."""
        for request in self._requests:
            self._engine.cancel(request)

    def _post(self, index: int, chunk: Chunk) -> None:
        # from the engine's thread, which must survive a loop that was closed meanwhile: then nobody waits any more
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, chunk))


def _dead(engine: Engine) -> ApiError:
    return ApiError(503, f"the engine has stopped: {engine.failure}; restart the server", code="engine_unavailable")
