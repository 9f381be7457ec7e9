"""The real commands, run in this process."""

import pytest

from command_line import Cli


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()
