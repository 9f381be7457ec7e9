"""`meswitch compress`: where calibration text comes from, and what it says on the way."""

import json

from meswitch import Artifact


def arguments(family, out, *more):
    return ("compress", "--base", family / "base", "--expert", family / "math", "--out", out, *more)


def test_an_expert_writes_its_own_text(cli, family, tmp_path):
    out = tmp_path / "delta"
    options = ("--calibration", "self", "--calibration-tokens", 400, "--distill", 0)
    result = cli.ok(*arguments(family, out, *options, "--json"))
    assert "math: calibration: the full expert is loaded on cpu (8 MB) to write its own text" in result.stderr
    notices = json.loads(result.stdout)["notices"]
    assert notices[1].startswith("calibration: it wrote ")
    calibration = Artifact.open(out).manifest.method.calibration
    assert (calibration.source, calibration.tokens, calibration.seed) == ("self", 400, 0)


def test_it_answers_the_questions_of_a_file_or_fills_it_up(cli, family, tmp_path):
    (tmp_path / "q.txt").write_text("How many are 2 and 3 nuts?\nHow many are 4 and 5 nuts?\n")
    for source, recorded in ((f"self:{tmp_path}/q.txt", "self:q.txt"), (f"{tmp_path}/q.txt+self", "q.txt+self")):
        options = ("--calibration", source, "--calibration-tokens", 200, "--distill", 0, "--overwrite")
        cli.ok(*arguments(family, tmp_path / "delta", *options))
        assert Artifact.open(tmp_path / "delta").manifest.method.calibration.source == recorded


def test_a_source_without_its_file_is_one_line(cli, family, tmp_path):
    line = cli.error(*arguments(family, tmp_path / "delta", "--calibration", "self:"))
    assert line == "calibration: 'self:' names no file; give FILE, self, self:FILE or FILE+self"
    line = cli.error(*arguments(family, tmp_path / "delta", "--calibration", "self:nowhere.txt"))
    assert line.startswith("nowhere.txt: no such calibration file")


def test_large_deltas_are_told_on_stderr_and_in_json(cli, family, tmp_path):
    result = cli.ok(*arguments(family, tmp_path / "delta", "--json"))
    (notice,) = json.loads(result.stdout)["notices"]
    assert notice.startswith("large deltas: 4 of 44 matrices moved by 0.3 of their norm or more: lm_head (0.40), ")
    assert " and 1 more; more bits keep them closer" in notice
    assert f"math: {notice}" in result.stderr


def test_all_experts_of_a_family_can_write_their_own_text(cli, new_family, tmp_path):
    file = new_family("math", "sql", head="[compress]\ndistill = 0")
    options = ("--calibration", "self", "--calibration-tokens", 200)
    rows = cli.json("compress", "--family", file, *options)
    for row in rows:
        assert Artifact.open(row["artifact"]).manifest.method.calibration.source == "self"
    kept = cli.json("compress", "--family", file, *options)
    assert [row["notices"] for row in kept] == [[], []]
    line = cli.error("compress", "--family", file, "--calibration", "text.txt")
    assert "names each expert's text; change it there, or give `self` or `none`" in line


def test_a_family_may_say_that_an_expert_answers_questions(cli, new_family, tmp_path):
    file = new_family("math", head="[compress]\ndistill = 0")
    lines = file.read_text().splitlines()
    lines[-1] = 'calibration = "self:q.txt"'
    file.write_text("\n".join(lines))
    (tmp_path / "q.txt").write_text("How many are 2 and 3 nuts?")
    cli.ok("compress", "--family", file, "--calibration-tokens", 100)
    assert Artifact.open(tmp_path / "runs/math").manifest.method.calibration.source == "self:q.txt"
