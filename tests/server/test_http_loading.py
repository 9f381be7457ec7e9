"""What a client sees of an expert that cannot be loaded, or was replaced."""

import shutil

import openai
import pytest

import meswitch
from meswitch import Engine
from meswitch.server import create_app
from tests.support.http_server import QUESTIONS, ask_with, serving, user


def test_a_damaged_expert_is_an_error_of_its_own_without_a_path(family, deltas, tmp_path):
    own = {name: shutil.copytree(deltas[name], tmp_path / name) for name in ("math", "code", "sql")}
    with (
        Engine(family / "base", own, device="cpu", slots=1, host_bytes=600_000) as engine,
        serving(create_app(engine, close_engine=False)) as url,
    ):
        client = ask_with(url)

        def ask(model, **options):
            return client.chat.completions.create(
                model=model, messages=user(QUESTIONS["math"]), max_tokens=8, **options
            )

        right = ask("math").choices[0].message.content
        assert ask("code").model == "code"
        shutil.move(own["math"], tmp_path / "away")
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.InternalServerError, match="expert 'math' cannot be loaded: its files") as error:
                ask("math", **options)
            assert error.value.code == "engine_error"
            assert str(tmp_path) not in error.value.response.text
        assert ask("code").model == "code"
        shutil.move(tmp_path / "away", own["math"])
        assert ask("math").choices[0].message.content == right
        meswitch.compress(family / "base", family / "sql", own["math"], overwrite=True)
        assert ask("math").choices[0].message.content == ask("sql").choices[0].message.content != right
