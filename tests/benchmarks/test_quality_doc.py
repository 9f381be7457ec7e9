"""docs/results/quality.md says what the stored results say."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {"model.layers.0.mlp.up_proj": 0.1, "model.layers.1.mlp.up_proj": 0.2, "lm_head": 0.05}


Command = Callable[..., str | None]


@pytest.fixture(scope="module")
def made(benchmark_script: Callable[[str], ModuleType]) -> Command:
    """The command; gives what it complains about, if anything."""
    main = benchmark_script("quality.doc").main

    def run(*options: str) -> str | None:
        try:
            main(list(options))
        except SystemExit as complaint:
            return str(complaint)
        return None

    return run


def test_the_page_and_its_plots_are_made_from_the_stored_results(made: Command) -> None:
    assert made("--check") is None


def job(keywords: dict, right: int, bits: float, kl: float) -> dict:
    return {
        "expert": "math",
        "keywords": keywords,
        "bits_per_weight": bits,
        "correct": right,
        "outcomes": "1" * right + "0" * (100 - right),
        "gain": right / 90,
        "interval": [right / 90 - 0.05, right / 90 + 0.05],
        "kl": kl,
        "top1": 0.9,
        "kl_by_text": [kl * (1 + i / 100) for i in range(10)],
        "layers": LAYERS,
        "seconds": {"compress": 1.0, "load": 0.1, "accuracy": 2.0, "fidelity": 0.5},
        "run": 0,
    }


def suite(directory: Path, name: str, rows: list[tuple[str, str, dict, int, float, float]]) -> None:
    """Invented results: group, label, keywords, right answers of 100, bits per weight, KL."""
    full = {"correct": 90, "outcomes": "1" * 90 + "0" * 10}
    data = {
        "meta": {"questions": 100, "seed": 2, "fidelity_questions": 10, "checksums": {}},
        "runs": [
            dict.fromkeys(("command", "date", "commit", "device", "python", "torch", "transformers", "meswitch"), "?")
        ],
        "bars": {"2.3 bpw": {"math": 0.97, "code": 0.97}} if name == "family" else {},
        "settings": [
            {"group": group, "label": label, "keywords": keywords, "layers": True}
            for group, label, keywords, *_ in rows
        ],
        "references": {
            "math": {
                "expert": full,
                "base": {"correct": 0, "outcomes": "0" * 100},
                "base_layers": dict.fromkeys(LAYERS, 0.8),
            }
        },
        "jobs": [job(keywords, *figures) for _, _, keywords, *figures in rows],
    }
    (directory / f"quality-{name}.json").write_text(json.dumps(data))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    suite(tmp_path, "family", [("family", "2.3 bpw", {"target_bpw": 2.3}, 80, 2.29, 0.01)])
    rows = [
        ("me-switch", "2 bits", {"bits": 2}, 85, 2.3, 0.01),
        ("me-switch", "1 bits", {"bits": 1}, 30, 1.3, 0.2),
        ("rtn", "2 bits", {"method": "rtn"}, 70, 2.2, 0.05),
        ("dare", "small", {"method": "dare"}, 60, 1.2, 0.1),
        ("dare", "large", {"method": "dare", "bits": 4}, 89, 3.1, 0.001),
    ]
    suite(tmp_path, "frontier", rows)
    rows = [
        ("group size", "32", {"group_size": 32}, 86, 2.5, 0.009),
        ("group size", "64 (default)", {}, 85, 2.3, 0.01),
        ("group size", "128", {"group_size": 128}, 60, 2.2, 0.03),
    ]
    suite(tmp_path, "ablations", rows)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "quality.md").write_text((ROOT / "docs" / "results" / "quality.md").read_text())
    return tmp_path


def test_tables_sentences_and_plots_follow_from_the_results(made: Command, results: Path) -> None:
    page = results / "docs" / "quality.md"
    where = ("--results", str(results), "--doc", str(page))
    assert "quality.md, quality/frontier.svg" in str(made("--check", *where))
    assert made(*where) is None
    assert made("--check", *where) is None
    text = page.read_text()
    # 80 right of a gain of 90 is 88.9 %
    assert "0 of 2 bars are reached; not code at 2.3 bpw (not measured), math at 2.3 bpw (88.9% of 97.0%)." in text
    # ours at 1.3 bpw loses against dare at 1.2 in both; at 2.3 bpw it wins against rtn and the small dare
    assert "more right answers in 2 of 3 comparisons, as many in 0 and fewer in 1, 1 of them beyond chance" in text
    assert (
        "- math, 1 bits (1.30 bpw): dare, small (1.20 bpw) has better right answers and KL: 60 right against 30" in text
    )
    # the best baseline of at most our bytes, then the one of the next more bytes
    assert "| 2 bits | 2.30 | math | 85 | 0.01 | rtn, 2 bits (2.20 bpw) | 70 | 15/0, p = 6e-05 |" in text
    assert "| dare, large (3.10 bpw) | 89 | 0/4, p = 0.1 | 0.001 | 0/10, p = 0.002 |" in text
    assert "Right answers against 64 (default): fewer with 128 (-25, p = 6e-08); " in text
    assert "KL: lower with 32 (x0.90), higher with 128 (x3.00)." in text
    assert {file.stem for file in (page.parent / "quality").iterdir()} == {"frontier", "kl", "layers", "ablations"}


def test_plots_are_the_same_bytes_each_time_and_small(made: Command, results: Path) -> None:
    where = ("--results", str(results), "--doc", str(results / "docs" / "quality.md"))
    made(*where)
    plots = sorted((results / "docs" / "quality").iterdir())
    first = [file.read_bytes() for file in plots]
    assert made("--redraw", *where) is None
    assert [file.read_bytes() for file in plots] == first
    assert max(map(len, first)) < 60_000


def test_a_plot_of_other_results_is_told_by_its_name(made: Command, results: Path) -> None:
    page = results / "docs" / "quality.md"
    where = ("--results", str(results), "--doc", str(page))
    made(*where)
    plot = page.parent / "quality" / "kl.svg"
    plot.write_text(plot.read_text().replace("data sha256", "other sha256"))
    assert str(made("--check", *where)).startswith("quality/kl.svg: older than the results")


def smollm2_row(expert: str, method: str, budget: float | None, bpw: float, kl: float, right: int | None) -> dict:
    """An invented row: of 100 questions the base gets 20 right and the full expert 80."""
    names = ("n", "base", "full", "accuracy", "gain", "gain_low", "gain_high", "lost", "won", "p")
    figures: dict = dict.fromkeys(names)
    if right is not None:
        gain = (right - 20) / 60
        values = (100, 0.2, 0.8, right / 100, gain, gain - 0.1, gain + 0.1, 80 - right, 0, 0.04)
        figures = dict(zip(names, values, strict=True))
    made = {"expert": expert, "method": method, "budget": budget, "bpw": bpw, "kl": kl, "kl_merged": kl * 2}
    return {**made, "seconds": 60.4, **figures}


@pytest.fixture
def smollm2(results: Path) -> Path:
    """Invented results of SmolLM2 beside the others."""
    rows = [
        smollm2_row("math", "me-switch", 2.2, 2.19, 0.01, 74),
        smollm2_row("math", "me-switch", 1.0, 0.99, 0.05, 68),
        smollm2_row("math", "rtn", 2.2, 2.14, 0.04, 50),
        smollm2_row("math", "bitdelta", None, 1.02, 0.03, 60),
        smollm2_row("instruct", "me-switch", 2.2, 2.18, 0.002, None),
        smollm2_row("instruct", "rtn", 2.2, 2.15, 0.006, None),
    ]
    about = {"base_kl": 0.91, "training": {"relative_norm": 0.031}}
    meta = {"card": "a card", "date": "2026-01-02T03:04:05", "versions": {"torch": "1"}, "kl_questions": 200}
    meta |= {"experts": {"math": about}, "served": [{"equal": 32, "questions": 32, "expert": "math"}]}
    (results / "smollm2.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    return results


def test_the_page_leads_with_what_is_stored_of_smollm2(made: Command, smollm2: Path) -> None:
    page = smollm2 / "docs" / "quality.md"
    where = ("--results", str(smollm2), "--doc", str(page))
    assert made(*where) is None
    assert made("--check", *where) is None
    text = page.read_text()
    ours = "| 2.2 | math | 2.19 | 20.0% | 80.0% | 74.0% | 90.0% [80.0%, 100.0%] | 6/0, p = 0.04 | 0.01 | 0.02 | 60 |"
    assert ours in text
    assert "| 2.2 | instruct | 2.18 | - | - | - | - | - | 0.002 | 0.004 | 60 |" in text
    assert "Questions: 100 of math; KL in nats a token on the answers of at most 200 questions an expert." in text
    assert (
        "Fine-tuning moved the block projections by math 3.1% (KL of the base 0.91). a card, torch 1, 2026-01-02"
        in text
    )
    assert "in float32, 32 of 32 answers of math are those of the merged model." in text
    # a method without a choice stands at the nearest budget
    assert (
        "Ours has the lower KL in 2 of 3 comparisons with a peer at its budget; not against bitdelta on math at 1.0."
        in text
    )
    assert "| me-switch | 2.18 to 2.19 | 90.0% [80.0%, 100.0%] | 0.01 | 0.002 | 60 |" in text
    assert "| bitdelta | 1.02 | 66.7% [56.7%, 76.7%] | 0.03 | - | 60 |" in text
    assert (
        text.index("**2.2 bits a weight**")
        < text.index("**1.0 bits a weight**")
        < text.index("The toy family: the bars")
    )
    assert "![SmolLM2: KL from the full expert, bits per weight](quality/smollm2.svg)" in text
    assert (page.parent / "quality" / "smollm2.svg").stat().st_size < 60_000


def test_peers_are_compared_within_a_training_of_an_expert_only(benchmark_script: Callable[[str], ModuleType]) -> None:
    page = benchmark_script("quality.smollm2")

    def row(*arguments, **more) -> dict:
        return smollm2_row(*arguments) | more

    rows = [
        row("math", "me-switch", 2.2, 2.19, 0.01, 74, training="1", scope="block"),
        row("math", "me-switch", 1.0, 0.99, 0.05, 68, training="2", full=0.7),
        row("math", "rtn", 2.2, 2.14, 0.04, 50, training="1"),
        row("math", "svd", 2.2, 2.14, 0.001, 50, training="2", full=0.7),  # nearer, to another full expert
        row("math", "dare", 1.0, 0.99, 0.04, 50, training="2", full=0.7),
        row("math", "bitdelta", 1.0, 1.00, 0.008, 60, training="1"),  # nearer than ours at 2.2, with fewer bytes
    ]
    data = {"meta": {}, "rows": rows}
    assert page.ahead(data) == (
        "Ours has the lower KL in 1 of 2 comparisons with a peer at its budget; not against dare on math at 1.0. With "
        "fewer bytes than ours a peer has the lower KL: bitdelta at 1.00 bits a weight (0.008) on math, ours at 2.19 "
        "bits a weight (0.01). No peer's gain at our budget is above ours beyond both intervals. Not counted, as ours "
        "is of another training of the expert: 2."
    )
    assert page.trainings(data) == [
        "The rows of math are of several trainings of the expert, each with its own base and full figures.",
        "Trained block by block, where end to end is the default for this size: math at 2.2.",
    ]
    rows[5] |= {"gain_low": 1.1}
    rows[1]["training"], rows[1]["full"] = "1", 0.8
    assert "A peer's gain is above ours beyond both intervals: bitdelta on math at 1.0." in page.ahead(data)


def test_base_and_full_are_a_range_where_trainings_differ(made: Command, smollm2: Path) -> None:
    file, page = smollm2 / "smollm2.json", smollm2 / "docs" / "quality.md"
    data = json.loads(file.read_text())
    data["rows"][1] |= {"full": 0.7, "training": "another"}
    file.write_text(json.dumps(data))
    made("--results", str(smollm2), "--doc", str(page))
    ends = "Right answers of base and full fine-tune: math 20.0% and 70.0% to 80.0%."
    assert f"{ends}\n\nThe rows of math" in page.read_text()


def test_the_page_says_what_to_run_where_smollm2_is_not_measured(made: Command, results: Path) -> None:
    page = results / "docs" / "quality.md"
    made("--results", str(results), "--doc", str(page))
    assert "Not measured yet: `python examples/smollm2/run.py --data DIR --work DIR" in page.read_text()
