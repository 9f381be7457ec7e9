"""What is served is changed while it is: over HTTP, by the family's file, by a watched directory."""

import json
import re
import shutil

import httpx
import openai
import pytest
from typer.testing import CliRunner

from meswitch import Family
from meswitch.cli import app as command
from meswitch.launch import app_from_family, engine_from_family, experts_from_family, policy_from_family
from meswitch.router.rules import Rule, RulesRouter
from meswitch.server.auto import AutoPolicy
from meswitch.server.keys import ApiKey, Keys
from meswitch.units import format_bytes
from tests.support.http_server import ask_with, serving, user, wait_until

ADMIN = {"authorization": "Bearer admin's"}


@pytest.fixture(scope="module")
def place(family, deltas, tmp_path_factory):
    """A directory with a family of math alone, and artifacts that may be loaded."""
    root = tmp_path_factory.mktemp("come-and-go")
    (root / "family.toml").write_text(text_of(family, {"math": deltas["math"]}))
    shutil.copytree(deltas["code"], root / "more" / "code-v1")
    shutil.copytree(deltas["sql"], root / "outside")
    return root


def text_of(family, experts):
    text = f'[base]\npath = "{family / "base"}"\n[engine]\nslots = 2\n[server]\nexperts_dir = "more"\n'
    for name, path in experts.items():
        text += f'[[expert]]\nname = "{name}"\ndelta = "{path}"\ndescription = "all about {name}"\n'
    return text


@pytest.fixture(scope="module")
def served(place):
    """(its address, what changes its experts)"""
    config = Family.load(place)
    with engine_from_family(config) as engine:
        experts = experts_from_family(config, engine)
        auto = AutoPolicy(None, lambda: engine.names, base=engine.base_name)
        keys = Keys([ApiKey.of("admin", "admin's", admin=True)])
        with serving(app_from_family(config, engine, auto, keys, experts)) as url:
            yield url, experts


@pytest.fixture
def url(served):
    return served[0]


def post(url, where, /, **body):
    return httpx.post(f"{url}/v1/{where}", json=body, headers=ADMIN, timeout=30)


def answer(url, model):
    client = ask_with(url)
    return client.chat.completions.create(model=model, messages=user("add 1"), max_tokens=4).choices[0].message.content


def rows(url):
    return {row["id"]: row for row in httpx.get(f"{url}/v1/experts").json()["data"]}


def models(url):
    return [card.id for card in ask_with(url).models.list()]


def test_an_expert_is_loaded_pinned_reloaded_and_unloaded(url, place):
    made = post(url, "experts", name="code", path="code-v1", description="for code")
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["pinned"], made.json()["requests"]) == ("code", False, 0)
    assert ask_with(url).models.retrieve("code").description == "for code"
    first = answer(url, "code")
    row = rows(url)["code"]
    assert (row["place"], row["requests"], row["loads"], row["running"]) == ("device", 1, 1, 0)
    assert row["bytes"] > 100_000
    assert post(url, "experts/code/pin").json()["pinned"]
    assert post(url, "experts/math/pin").json()["error"]["code"] == "no_room"
    assert not post(url, "experts/code/unpin").json()["pinned"]
    shutil.copytree(place / "outside", place / "more" / "code-v1", dirs_exist_ok=True)
    again = post(url, "experts/code/reload")
    assert again.json()["version"] != row["version"]
    assert answer(url, "code") != first
    assert httpx.delete(f"{url}/v1/experts/code", headers=ADMIN).json()["deleted"]
    assert models(url) == ["base", "math"]
    with pytest.raises(openai.NotFoundError, match="'code' does not exist"):
        answer(url, "code")


def test_top_shows_it_in_a_terminal(url, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    answer(url, "math")
    shown = CliRunner().invoke(command, ["top", url, "--once"])
    assert shown.exit_code == 0
    assert re.search(r"base: \d running, \d waiting", shown.output)
    assert re.search(r"math\b.*\bdevice\b", shown.output)
    assert re.search("running +requests +hits +loads +evictions +failures +version", shown.output), "not cut"
    asked = json.loads(CliRunner().invoke(command, ["top", f"{url}/v1", "--json"]).output)
    assert asked["engine"]["generated_tokens"] >= 4
    sizes = asked["engine"]["memory"]
    assert asked["engine"]["device_bytes"] == sum(sizes.values()) - sizes["host"] > sizes["base"] + sizes["kv_cache"]
    assert f"{format_bytes(asked['engine']['device_bytes'])} on the device" in shown.output
    for wrong in ("http://127.0.0.1:9", "nothing"):
        failed = CliRunner().invoke(command, ["top", wrong, "--once"])
        assert failed.exit_code == 1
        assert "is `meswitch serve` running there?" in " ".join(failed.stderr.split())


def test_vllms_names_do_the_same(url, place):
    path = str(place / "more" / "code-v1")  # absolute, as vLLM's clients give it
    assert post(url, "load_lora_adapter", lora_name="lora", lora_path=path, load_inplace=True).status_code == 200
    assert answer(url, "lora")
    assert "removed successfully" in post(url, "unload_lora_adapter", lora_name="lora").text
    assert models(url) == ["base", "math"]


@pytest.mark.parametrize(
    ("name", "path", "status", "says"),
    [
        ("x", "../outside", 403, "outside server.experts_dir"),
        ("x", "/etc", 403, "outside server.experts_dir"),
        ("x", ".", 403, "outside server.experts_dir"),
        ("x", "link", 403, "outside server.experts_dir"),
        ("x", "nothing", 404, "no such directory"),
        ("x", "empty", 400, "not a meswitch artifact"),
        ("auto", "code-v1", 400, "reserved"),
        ("base", "code-v1", 400, "is taken"),
        ("../x", "code-v1", 400, "name"),
    ],
)
def test_only_what_is_in_the_allowed_directory_is_loaded(url, place, name, path, status, says):
    (place / "more" / "empty").mkdir(exist_ok=True)
    if not (place / "more" / "link").is_symlink():
        (place / "more" / "link").symlink_to(place / "outside")
    refused = post(url, "experts", name=name, path=path)
    assert refused.status_code == status
    assert says in refused.json()["error"]["message"]
    assert str(place) not in refused.text
    assert models(url) == ["base", "math"]


def test_who_is_no_administrator_only_looks(url):
    for headers in ({}, {"authorization": "Bearer guess"}):
        refused = httpx.post(f"{url}/v1/experts", json={"name": "x", "path": "code-v1"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
        assert httpx.delete(f"{url}/v1/experts/math", headers=headers).status_code == 403
        assert httpx.get(f"{url}/v1/experts", headers=headers).json()["engine"]["slots"] == 2
    assert models(url) == ["base", "math"]


def test_the_family_is_read_again(served, place, family, deltas):
    url, experts = served
    assert post(url, "experts", name="by-hand", path="code-v1").status_code == 201
    (place / "family.toml").write_text(text_of(family, {"math": deltas["math"], "sql": deltas["sql"]}))
    experts.reread()
    assert models(url) == ["base", "math", "by-hand", "sql"]
    assert answer(url, "sql")
    moved = text_of(family, {"math": deltas["instruct"]}).replace("all about", "new:")
    before = rows(url)["math"]["version"]
    (place / "family.toml").write_text(moved)
    experts.reread()
    assert models(url) == ["base", "math", "by-hand"]
    assert rows(url)["math"]["version"] != before
    assert rows(url)["math"]["description"] == "new: math"
    (place / "family.toml").write_text("[base")
    with pytest.raises(Exception, match="not valid TOML"):
        experts.reread()
    assert models(url) == ["base", "math", "by-hand"]
    (place / "family.toml").write_text(text_of(family, {"math": deltas["math"]}))
    experts.reread()
    experts.remove("by-hand")


def test_what_appears_in_the_directory_is_served(served, place, deltas):
    url, experts = served
    experts.scan()
    assert models(url) == ["base", "math", "code-v1"]  # and neither `empty` nor what `link` leads to
    half = place / "more" / "late.partial"
    shutil.copytree(deltas["instruct"], half)
    experts.scan()
    half.rename(place / "more" / "late")
    experts.scan()
    assert answer(url, "late")
    shutil.rmtree(place / "more" / "late")
    experts.scan()
    assert wait_until(lambda: models(url) == ["base", "math", "code-v1"])
    experts.remove("code-v1")


@pytest.fixture(scope="module")
def routing(family, deltas, tmp_path_factory):
    """A family that is routed by descriptions: its address, what changes its experts, its directory."""
    root = tmp_path_factory.mktemp("routed")
    (root / "family.toml").write_text(text_of(family, {"math": deltas["math"], "sql": deltas["sql"]}))
    shutil.copytree(deltas["code"], root / "more" / "code")
    config = Family.load(root)
    with engine_from_family(config) as engine:
        auto, problem = policy_from_family(config, engine)
        assert problem is None
        keys = Keys([ApiKey.of("admin", "admin's", admin=True)])
        experts = experts_from_family(config, engine, auto)
        with serving(app_from_family(config, engine, auto, keys, experts)) as url:
            yield url, experts, root


def asked_auto(url, query):
    """Who answers, and the scores of all."""
    asked = {"model": "auto", "messages": user(query), "max_tokens": 2}
    found = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=30)
    pairs = (pair.split("=") for pair in found.headers["x-meswitch-route-scores"].split(","))
    return found.json()["model"], {name: float(score) for name, score in pairs}


@pytest.fixture
def routed(routing):
    return routing[0]


def test_auto_chooses_an_expert_that_came_later(routed):
    query = "Write a Python function that returns the sum of a list."
    asked = {"model": "auto", "messages": user(query), "max_tokens": 2}
    before = httpx.post(f"{routed}/v1/chat/completions", json=asked, timeout=30)
    assert before.headers["x-meswitch-route-scores"].count("=") == 3  # math, sql and none of them
    made = post(routed, "experts", name="code", path="code", description="Programming.", examples=[query])
    assert (made.status_code, made.json()["routed"], "not_routed" in made.json()) == (201, True, False)
    after = httpx.post(f"{routed}/v1/chat/completions", json=asked, timeout=30)  # not what was remembered
    scores = dict(pair.split("=") for pair in after.headers["x-meswitch-route-scores"].split(","))
    assert float(scores["code"]) > max(float(score) for name, score in scores.items() if name != "code")
    assert after.json()["model"] == "code"
    assert httpx.delete(f"{routed}/v1/experts/code", headers=ADMIN).status_code == 200
    gone = httpx.post(f"{routed}/v1/chat/completions", json=asked, timeout=30)
    assert (gone.status_code, gone.json()["model"]) == (200, "base")


def test_an_expert_of_which_nothing_is_said_is_told_to_be_asked_by_name(routed, url):
    made = post(routed, "experts", name="silent", path="code").json()
    assert made["routed"] is False
    assert made["not_routed"].startswith("nothing was said of it to the router: give it `description` and `examples`")
    refused = post(routed, "experts", name="silent", path="code", description="To chat.", examples=[" "]).json()
    assert refused["not_routed"] == "the router does not take it in: 'silent': examples: one is empty; remove it"
    made = post(routed, "experts", name="silent", path="code").json()
    assert answer(routed, "silent")
    listed = rows(routed)
    assert (listed["math"]["routed"], "not_routed" in listed["math"]) == (True, False)
    assert (listed["silent"]["routed"], listed["silent"]["not_routed"]) == (False, made["not_routed"])
    assert "no router" in rows(url)["math"]["not_routed"]
    assert "no router" in post(url, "experts", name="later", path="code-v1").json()["not_routed"]
    assert httpx.delete(f"{url}/v1/experts/later", headers=ADMIN).status_code == 200


def test_an_expert_that_appeared_is_routed_once_the_family_says_what_it_is_for(routing, family, deltas):
    url, experts, root = routing
    (root / "more" / "code").rename(root / "more" / "late")
    experts.scan()
    assert "nothing was said of it" in rows(url)["late"]["not_routed"]
    text = text_of(family, {"math": deltas["math"], "sql": deltas["sql"], "late": root / "more" / "late"})
    (root / "family.toml").write_text(f'{text}examples = ["Write a Python function that adds two numbers."]\n')
    experts.reread()
    assert (rows(url)["late"]["routed"], "not_routed" in rows(url)["late"]) == (True, False)


def test_what_the_family_says_anew_of_an_expert_reaches_the_router(routing, caplog):
    url, experts, root = routing
    query = "Compose a sonnet about the sea at night."
    _, before = asked_auto(url, query)
    text = (root / "family.toml").read_text()
    (root / "family.toml").write_text(text.replace('description = "all about math"', f'examples = ["{query}"]'))
    experts.reread()
    chosen, after = asked_auto(url, query)
    assert chosen == "math"
    assert after["math"] > max(before["math"], *(score for name, score in after.items() if name != "math"))
    assert rows(url)["math"]["description"] == ""
    (root / "family.toml").write_text(text)
    experts.reread()
    assert asked_auto(url, query)[1] == before
    assert "keeps what it learnt" not in caplog.text


def test_what_needs_a_restart_is_named_in_the_log(routing, caplog):
    _, experts, root = routing
    text = (root / "family.toml").read_text()
    experts.reread()
    assert "restart" not in caplog.text
    (root / "family.toml").write_text(text.replace("slots = 2", "slots = 3\nmax_queue = 7"))
    experts.reread()
    (root / "family.toml").write_text(text)
    told = "restart the server for what has changed: engine.slots, engine.max_queue"
    assert f"{root / 'family.toml'}: {told}" in caplog.text


@pytest.mark.parametrize(
    ("said", "reason"),
    [("examples = [' ']", "'math': examples: one is empty; remove it"), ("", "nothing was said of it to the router")],
)
def test_what_the_router_cannot_take_in_of_an_expert_that_it_chooses_is_told_each_time(routing, caplog, said, reason):
    url, experts, root = routing
    query = "Compose a sonnet about the sea at night."
    _, before = asked_auto(url, query)
    text = (root / "family.toml").read_text()
    (root / "family.toml").write_text(text.replace('description = "all about math"', said))
    for _ in range(2):
        caplog.clear()
        experts.reread()
        assert "auto does not choose" not in caplog.text
        assert "expert math: auto chooses it by what was said of it before: " in caplog.text
        assert reason in caplog.text
    assert asked_auto(url, query)[1] == before
    assert rows(url)["math"]["routed"]
    (root / "family.toml").write_text(text)
    caplog.clear()
    experts.reread()
    assert "expert math" not in caplog.text


def test_a_new_version_of_which_nothing_is_said_keeps_what_was_said(routed):
    assert post(routed, "experts", name="twice", path="late", description="Poems.").json()["routed"]
    again = post(routed, "experts", name="twice", path="late").json()
    assert (again["description"], again["routed"], "not_routed" in again) == ("Poems.", True, False)
    assert httpx.delete(f"{routed}/v1/experts/twice", headers=ADMIN).status_code == 200


def test_a_router_that_keeps_what_it_learnt_is_told_of_in_the_log(family, deltas, tmp_path, caplog):
    """Rules alone choose by patterns: what is said of an expert is nothing to them."""
    file = tmp_path / "mine.toml"
    file.write_text(text_of(family, {"math": deltas["math"]}) + '[router]\npath = "router"\n')
    RulesRouter([Rule("math", "text", "sum")], ("math",)).save(tmp_path / "router")
    config = Family.load(file)
    with engine_from_family(config) as engine:
        auto, problem = policy_from_family(config, engine)
        assert problem is None
        experts = experts_from_family(config, engine, auto)
        experts.reread()
        assert "keeps what it learnt" not in caplog.text
        file.write_text(file.read_text().replace("all about", "new:"))
        experts.reread()
        assert f"expert math: what {file} says of it has changed, and this router keeps what it learnt" in caplog.text
        assert experts.descriptions == {"math": "new: math"}
