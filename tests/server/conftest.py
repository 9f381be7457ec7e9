"""One real server for all tests: the family's math and code experts, compressed, and a small trained router."""

import json

import pytest

from meswitch import Family
from meswitch.launch import app_from_family, engine_from_family, policy_from_family
from meswitch.router import Encoder, Row, train_router
from tests.support.http_server import EXPERTS, ask_with, serving


@pytest.fixture(scope="session")
def router_directory(family, tmp_path_factory):
    """A router over math, code and other, trained on 180 real queries."""
    rows: dict[str, list[Row]] = {"math": [], "code": [], "other": []}
    for line in (family / "routing.jsonl").read_text().splitlines():
        data = json.loads(line)
        domain = data["domain"] if data["domain"] in EXPERTS else "other"
        if len(rows[domain]) < 60:
            rows[domain].append(Row(data["query"], domain))
    router = train_router([row for some in rows.values() for row in some], EXPERTS, Encoder.load(family / "base"))
    directory = tmp_path_factory.mktemp("router") / "router"
    router.save(directory)
    return directory


@pytest.fixture(scope="session")
def family_file(family, deltas, router_directory, tmp_path_factory):
    """A family.toml of math and code."""
    text = f'[base]\npath = "{family / "base"}"\n[router]\npath = "{router_directory}"\nfallback = "base"\n'
    for name in EXPERTS:
        text += f'[[expert]]\nname = "{name}"\ndelta = "{deltas[name]}"\ndescription = "all about {name}"\n'
    file = tmp_path_factory.mktemp("family") / "family.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def engine(family_file):
    with engine_from_family(Family.load(family_file)) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(family_file, engine):
    config = Family.load(family_file)
    auto, problem = policy_from_family(config, engine)
    assert problem is None
    with serving(app_from_family(config, engine, auto)) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    return ask_with(url)
