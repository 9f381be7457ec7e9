"""Every `meswitch ...` in the documents is a command that there is, with options that it has."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from meswitch.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(r"^ *```(console|)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# a list of commands with a word on each, which is no command line
LISTED = re.compile(r"meswitch [\w-]+ {4,}[a-z]")
# what a shell does with it, or a comment
SHELL = re.compile(r"\s(?:#\s|\||>+\s|<\s|&(?:\s|$)|2>)")


def commands(text: str) -> list[str]:
    """The lines of shell blocks that run meswitch, continued lines joined."""
    found = []
    for kind, block in BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.strip()
            if kind == "console" and not line.startswith("$ "):
                continue  # what a command printed
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.removeprefix("$ ").split("| meswitch ")[-1])
            if line.startswith("meswitch ") and not LISTED.match(line):
                cut = SHELL.search(line)
                found.append(line[: cut.start()] if cut else line)
    return found


LINES = sorted({(str(page.relative_to(ROOT)), line) for page in PAGES for line in commands(page.read_text())})


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_a_command_of_the_documents_parses(page, line):
    command, words = get_command(app), [word for word in shlex.split(line)[1:] if word != "..."]
    while hasattr(command, "commands"):
        name = getattr(command, "default", None) if words[0].startswith("-") else words.pop(0)
        if name is None:
            break
        command = command.commands[name]
    context = command.context_class(command)
    command.make_parser(context).parse_args(list(words))


def test_the_main_commands_are_among_them():
    shown = {line.split()[1] for _, line in LINES}
    assert shown >= {"compress", "verify", "merge", "diff", "plan", "serve", "route", "router", "eval", "top", "key"}
