"""What a stream says when its answer fails half-way, in each protocol's own form."""

import json

import pytest

from meswitch.server.errors import ApiError
from meswitch.server.protocol.answers import Format, TextFormat
from meswitch.server.protocol.chat import AnswerReader
from meswitch.server.protocol.messages import MessagesFormat
from meswitch.server.protocol.responses import ResponsesFormat, ResponsesRequest
from meswitch.server.protocol.schema import CompletionRequest

ERROR = ApiError(500, "model 'math': its numbers are not finite", code="engine_error")


class Reads:
    """A chat whose answers are plain text."""

    def reader(self):
        return AnswerReader()


def formats():
    responses = ResponsesRequest(model="math", input="Hi")
    yield TextFormat("math", CompletionRequest(model="math", prompt="Hi"))
    yield MessagesFormat("math", Reads())
    yield ResponsesFormat("math", responses, Reads())


@pytest.mark.parametrize("shape", formats(), ids=lambda shape: type(shape).__name__)
def test_a_failure_ends_a_stream_in_the_form_of_its_protocol(shape: Format):
    *head, data = shape.failure(ERROR).strip().split("\n")
    said = json.loads(data.removeprefix("data: "))
    assert "its numbers are not finite" in json.dumps(said)
    if isinstance(shape, TextFormat):
        assert (head, said["error"]["code"]) == ([], "engine_error")
    else:
        assert (head, said["type"]) == (["event: error"], "error")


def test_an_error_has_the_form_of_the_protocol_that_was_asked():
    assert json.loads(ERROR.response("/v1/messages").body)["error"]["type"] == "api_error"
    assert json.loads(ERROR.response("/v1/chat/completions").body)["error"]["type"] == "server_error"
