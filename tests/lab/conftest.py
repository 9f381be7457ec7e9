"""The lab's methods are registered; the real commands run in this process."""

import pytest

import meswitch_lab  # noqa: F401 - registers its methods
from tests.support.command_line import Cli


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()
