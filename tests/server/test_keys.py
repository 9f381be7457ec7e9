"""Who may ask: several keys, each with its models and its share."""

import re
import tomllib

import httpx
import openai
import pytest
from typer.testing import CliRunner

from meswitch.cli import app as command
from meswitch.errors import ConfigError
from meswitch.server import create_app
from meswitch.server.keys import ApiKey, Keys, read_keys
from tests.server.test_auto import Counting
from tests.support.http_server import ask_with, is_idle, policy, serving, user, wait_until

LONG = {"model": "math", "prompt": "The sea", "max_tokens": 1500, "temperature": 1.0, "seed": 1}


@pytest.fixture
def keys():
    def made(name, **limits):
        return ApiKey.of(name, f"key of {name}").model_copy(update=limits)

    return Keys(
        [made("all"), made("math", models=("math",)), made("auto", models=("auto",)), made("one", concurrency=1)]
    )


@pytest.fixture
def url(engine, keys):
    app = create_app(engine, auto=policy(engine, Counting()), keys=keys, close_engine=False)
    with serving(app) as url:
        yield url


def asked(url, key, model, **more):
    client = ask_with(url, f"key of {key}")
    return client.chat.completions.create(model=model, messages=user("code"), max_tokens=1, **more).model


def test_a_key_is_for_its_models(url):
    assert [asked(url, "all", model) for model in ("base", "math", "auto")] == ["base", "math", "code"]
    assert asked(url, "math", "math") == "math"
    assert asked(url, "auto", "auto") == "code"  # whomever the router chooses
    for key, model, more in (
        ("math", "code", {}),
        ("math", "auto", {}),
        ("auto", "code", {}),
        ("auto", "auto", {"extra_headers": {"x-meswitch-expert": "code"}}),
    ):
        with pytest.raises(openai.PermissionDeniedError, match=f"key '{key}' is not for model"):
            asked(url, key, model, **more)
    assert [card.id for card in ask_with(url, "key of math").models.list()] == ["math"]


def test_a_key_has_so_many_requests_at_a_time(url, engine):
    client = ask_with(url, "key of one")
    with client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 request running") as caught:
            asked(url, "one", "math")
        assert caught.value.code == "too_many_requests"
        assert asked(url, "all", "math") == "math"
        assert client.models.list().data  # a look costs nothing
    assert wait_until(lambda: is_idle(engine))
    assert asked(url, "one", "math") == "math"


def test_other_keys_from_now_on(url, keys):
    keys.replace([ApiKey.of("new", "key of new")])
    assert asked(url, "new", "math") == "math"
    with pytest.raises(openai.AuthenticationError):
        asked(url, "all", "math")
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "basic key of new"}).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "bEARER  key of new"}).status_code == 200


def test_the_command_makes_what_the_file_takes(tmp_path, monkeypatch):
    made = CliRunner().invoke(
        command, ["key", "team-a", "--model", "auto", "--model", "math", "--concurrency", "8", "--admin"]
    )
    text, table = re.search(r"msk-\S+", made.stderr)[0], made.stdout
    (tmp_path / "keys.toml").write_text(table)
    monkeypatch.setenv("MESWITCH_API_KEY", "default's")
    default, key = read_keys(tmp_path / "keys.toml")
    assert (default.name, default.models, default.admin) == ("default", None, False)
    assert key == ApiKey.of("team-a", text).model_copy(
        update={"models": ("auto", "math"), "concurrency": 8, "admin": True}
    )
    assert text not in table
    assert tomllib.loads(table)["key"][0]["concurrency"] == 8


def test_a_file_of_keys_that_is_missing_is_named_with_what_makes_one(tmp_path):
    with pytest.raises(
        ConfigError, match=rf"^server.keys: {tmp_path}/none.toml: cannot be read .*; `meswitch key NAME"
    ):
        read_keys(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[key", "not valid TOML"),
        ('[[keys]]\nname = "a"', "keys: no such field"),
        ('[[key]]\nname = "a"', r"key\[0\].sha256: Field required"),
        ('[[key]]\nname = "a"\nsha256 = "abc"', r"key\[0\].sha256: "),
        (f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\nmodel = "x"', r"key\[0\].model: "),
        (f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\n' * 2, "key.name: 'a' is used twice"),
    ],
)
def test_a_file_of_keys_that_is_wrong_names_the_field(tmp_path, text, says):
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_keys(tmp_path / "keys.toml")
    assert "keys.toml" in str(error.value)
