"""The documents: the site builds, nothing comes from elsewhere, every link and every named file exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chromium import PROGRAM, Page

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("*/README.md")]
)
FENCE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)")
# A file of the repository, named in backquotes or in a command.
NAMED = re.compile(
    r"(?<![\w./<'-])((?:src/meswitch|lab/meswitch_lab|tests|benchmarks|examples)/[\w./-]+\.(?:py|json|toml|jsonl|yaml))\b"
)
# of vLLM's repository
ELSEWHERE = ("tests/lora/", "test_worker.py")
INVENTED = ("largest.py", "mine.py")  # that the pages have somebody write
ENTRY_POINTS = ("meswitch.codecs", "meswitch.routers")
PACKAGE = ROOT / "src" / "meswitch"
CODE = ("src", "lab", "tests", "benchmarks", "examples")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the extra `docs`")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert loaded == [], page.name


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
def test_a_page_that_was_opened_as_a_file_is_searched(site, tmp_path):
    page = Page(tmp_path, (site / "use" / "serve.html").as_uri())
    try:
        page.until("document.querySelector('[data-md-component=search-query]') !== null")
        page.js("document.querySelector('[data-md-toggle=search]').click()")
        page.js("document.querySelector('[data-md-component=search-query]').focus()")
        page.type("salient")
        page.until("document.querySelector('.md-search-result__link')?.href.startsWith('file:') === true", seconds=60)
    finally:
        page.close()


def test_the_long_tables_are_folded_and_are_tables(site):
    page = (site / "results" / "quality.html").read_text()
    assert page.count("<details>") > 10
    folded = page.split("<details>")[1].split("</details>")[0]
    assert "<table>" in folded
    assert "| ---" not in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if not target.startswith(("http", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_file_exists(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names what there was")
    for name in NAMED.findall(page.read_text()):
        assert (ROOT / name).exists() or name.startswith(ELSEWHERE), name


def found(name: str) -> object:
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(found(module), attribute)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_module_exists(page):
    """`engine/scheduler.py` is a module of the package, or a file's name; `meswitch.codec.Codec` is there."""
    if page.name == "CHANGELOG.md":
        pytest.skip("names what there was")
    text = page.read_text()
    names = {file.name for folder in CODE for file in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        there = name in names or any((place / name).exists() for place in (PACKAGE, ROOT, page.parent))
        assert there or name.startswith(ELSEWHERE) or name in INVENTED, name
    for name in re.findall(r"`(meswitch(?:\.\w+)+)`", text):
        if not name.startswith(("meswitch.vllm", "meswitch.evaluate.lm_eval", "meswitch.json", *ENTRY_POINTS)):
            assert found(name) is not None
