"""The page at `/`, in a real browser."""

import re

import httpx
import pytest

from meswitch import Family
from meswitch.launch import experts_from_family, policy_from_family
from meswitch.server import Web, create_app
from meswitch.server.keys import ApiKey, Keys
from tests.support.chromium import PROGRAM, Page
from tests.support.http_server import QUESTIONS, ask_with, serving, user

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
ANSWERS = "document.querySelectorAll('.answer').length"


@pytest.fixture(scope="module")
def url(family_file, engine):
    """A server that asks for a key, behind a path."""
    pytest.importorskip("websockets")
    config = Family.load(family_file)
    auto, _ = policy_from_family(config, engine)
    keys = Keys([ApiKey.of("one", "secret")])
    experts = experts_from_family(config, engine)
    app = create_app(engine, auto=auto, keys=keys, experts=experts, web=Web(root_path="/llm"), close_engine=False)
    with serving(app) as url:
        yield f"{url}/llm"


@pytest.fixture(scope="module")
def page(url, tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("browser"), url)
    page.until("document.querySelector('dialog')?.open")
    page.js("document.getElementById('key-text').focus()")
    page.type("wrong")
    page.press("Enter")
    page.until(
        "document.querySelector('dialog').open && document.getElementById('key-why').textContent.includes('not known')"
    )
    page.js("document.getElementById('key-text').value = ''; document.getElementById('key-text').focus()")
    page.type("secret")
    page.press("Enter")
    page.until("document.querySelectorAll('#left option').length == 4")
    page.js("document.getElementById('question').focus()")
    yield page
    page.close()


@pytest.fixture(autouse=True)
def new_chat(page):
    page.js("document.getElementById('clear').click()")


def ask(page, text, answers):
    page.type(text)
    page.press("Enter")
    page.until(f"{ANSWERS} == {answers} && !running")


def texts(page, name):
    return page.js(f"[...document.querySelectorAll('.answer .{name}')].map(one => one.textContent)")


def test_auto_answers_with_the_routers_scores(page, engine):
    ask(page, QUESTIONS["math"], 1)
    (alone,) = engine.generate([user(QUESTIONS["math"])], model="math", max_new_tokens=256)
    assert (texts(page, "who"), texts(page, "text")) == (["math"], [alone.text])
    names = texts(page, "scores .name")
    assert set(names) == {"math", "code", "other"}
    assert names[0] == "math"
    width = page.js("document.querySelector('.bar.chosen i').style.width")
    assert 50 < float(width.rstrip("%")) <= 100
    assert texts(page, "why") == ["auto: scored"]


def test_two_experts_answer_side_by_side_and_each_keeps_its_history(page, url):
    page.js("document.getElementById('both').click()")
    page.js("document.getElementById('left').value = 'math'; document.getElementById('right').value = 'code'")
    try:
        for count in (2, 4):
            ask(page, QUESTIONS["math"], count)
        assert texts(page, "who") == ["math", "code"] * 2
        client = ask_with(url, "secret")
        for side, name in enumerate(("math", "code")):
            said = texts(page, "text")[side::2]
            talk = [*user(QUESTIONS["math"]), {"role": "assistant", "content": said[0]}, *user(QUESTIONS["math"])]
            again = client.chat.completions.create(model=name, messages=talk, max_tokens=256, temperature=0)
            assert said[1] == again.choices[0].message.content
    finally:
        page.js("document.getElementById('both').click(); document.getElementById('left').value = 'auto'")


def test_an_answer_is_stopped_and_an_error_is_read(page, engine):
    page.js("document.getElementById('tokens').value = 1500; document.getElementById('temperature').value = 1")
    page.js("document.getElementById('left').value = 'base'")
    page.type("The sea")
    page.press("Enter")
    page.until("document.querySelector('.answer .text')?.textContent.length > 5")
    page.press("Escape")
    page.until("!running")
    assert texts(page, "error") == ["stopped"]
    page.js("document.getElementById('temperature').value = 5")
    ask(page, "x", 2)
    assert "temperature" in texts(page, "error")[1]
    page.js("document.getElementById('tokens').value = 256; document.getElementById('temperature').value = 0")
    page.js("document.getElementById('left').value = 'auto'")


def test_what_the_server_does_is_shown(page, engine):
    ask(page, QUESTIONS["code"], 1)
    page.until("Number(document.getElementById('rate').textContent) >= 0 && rates.length > 1")
    rows = page.js("[...document.querySelectorAll('#experts tbody tr')].map(row => row.textContent)")
    assert [re.match("math|code", row)[0] for row in rows] == ["math", "code"]
    assert any("device" in row for row in rows)
    assert page.js("document.querySelectorAll('.tier').length") == 5
    assert page.js("document.getElementById('state').className") == "ok"


def test_markup_in_an_answer_or_a_question_stays_text(page):
    ask(page, "<img src=x onerror=alert(1)>", 1)
    assert page.js("document.querySelectorAll('#log img').length") == 0
    assert page.js("document.querySelector('.user').textContent") == "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_every_width(page, width):
    page.resize(width, 700)
    try:
        ask(page, QUESTIONS["math"], 1)
        assert page.js("document.documentElement.scrollWidth") <= width
        box = page.js("JSON.stringify(document.getElementById('question').getBoundingClientRect())")
        assert '"width":0' not in box
    finally:
        page.resize(1200, 800)


def test_every_control_has_a_name_and_is_reached_by_tab(page):
    unnamed = page.js(
        "[...document.querySelectorAll('input, select, textarea, button')].filter(one => !one.labels?.length && "
        "!one.ariaLabel && !one.textContent.trim()).map(one => one.id)"
    )
    assert unnamed == []
    page.js("document.getElementById('question').blur(); document.activeElement?.blur?.(); window.focus()")
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(page.js("document.activeElement.id"))
    assert {"left", "both", "tokens", "temperature", "clear", "log", "question", "send"} <= set(seen)


def test_nothing_comes_from_elsewhere_and_nothing_fails(page, url):
    names = page.js("performance.getEntriesByType('resource').map(one => one.name)")
    assert names
    assert all(name.startswith((url, "data:")) for name in names)
    wanted = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in wanted
    errors = [line for line in page.log if "401" not in line and "400" not in line]
    assert errors == []
