"""One router for all tests, trained on every fourth row of the family's routing data."""

import pytest

from meswitch.router import Encoder, evaluate_router, read_rows, train_router

EXPERTS = ("math", "code", "instruct", "sql")


@pytest.fixture(scope="session")
def base(family):
    return family / "base"


@pytest.fixture(scope="session")
def encoder(base):
    return Encoder.load(base)


@pytest.fixture(scope="session")
def all_rows(family):
    return read_rows(family / "routing.jsonl", EXPERTS)


@pytest.fixture(scope="session")
def rows(all_rows):
    return all_rows[::4]


@pytest.fixture(scope="session")
def unseen(all_rows, rows):
    seen = {row.query for row in rows}
    return [row for row in all_rows[1::8] if row.query not in seen]


@pytest.fixture(scope="session")
def router(rows, encoder):
    return train_router(rows, EXPERTS, encoder)


@pytest.fixture(scope="session")
def result(router, unseen):
    """The router's figures on unseen rows."""
    return evaluate_router(router, unseen)


@pytest.fixture(scope="session")
def saved(router, tmp_path_factory):
    path = tmp_path_factory.mktemp("router") / "router"
    router.save(path)
    return path
