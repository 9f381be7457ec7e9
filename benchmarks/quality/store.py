"""The file of one suite's results: written whole after every job, read again to go on and to make the documents.

meta        what every job in it shares: questions, seeds, checksums of base and experts
runs        one entry for each start of the command: command, date, versions, machine, commit
bars        the least gain retained that was asked for, by setting and expert
settings    the suite's table: group, label, keywords of `meswitch_lab.options`
references  by expert: right answers of base and full expert
jobs        one line for each (keywords, expert); `run` is the place of its command in `runs`
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.settings import Setting, key_of
from meswitch.evaluate import Score


@dataclass
class Store:
    path: Path
    meta: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    bars: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # by key of the setting, and expert

    @classmethod
    def load(cls, path: Path) -> "Store":
        """What is stored there; empty if there is no such file."""
        store = cls(path)
        if not path.exists():
            return store
        data = json.loads(path.read_text())
        store.meta, store.runs, store.bars = data["meta"], data["runs"], data["bars"]
        store.settings = [Setting(**row) for row in data["settings"]]
        store.references = data["references"]
        store.jobs = {(key_of(job["keywords"]), job["expert"]): job for job in data["jobs"]}
        return store

    def save(self) -> None:
        """Write everything; a reader sees the old file or the new one."""
        parts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in (("meta", self.meta),)]
        parts.append(_lines("runs", self.runs))
        parts.append(f' "bars": {json.dumps(self.bars)}')
        parts.append(_lines("settings", [setting._asdict() for setting in self.settings]))
        inner = (f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in self.references.items())
        parts.append(' "references": {\n' + ",\n".join(inner) + "\n }")
        parts.append(_lines("jobs", list(self.jobs.values())))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        os.replace(partial, self.path)

    def done(self, setting: Setting, expert: str) -> bool:
        """Whether there is nothing left to measure; a failed job is tried again."""
        job = self.jobs.get((setting.key, expert))
        return job is not None and "failed" not in job and ("layers" in job or not setting.layers)

    @property
    def experts(self) -> list[str]:
        return list(self.references)

    def found(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """The setting's finished jobs by expert."""
        jobs = {expert: self.jobs.get((setting.key, expert)) for expert in self.experts}
        return {expert: job for expert, job in jobs.items() if job is not None and "failed" not in job}

    def failed(self) -> Iterator[tuple[Setting, str, str]]:
        """Setting, expert and reason of every job that failed."""
        for setting in self.settings:
            for expert in self.experts:
                job = self.jobs.get((setting.key, expert))
                if job is not None and "failed" in job:
                    yield setting, expert, job["failed"]

    def score(self, outcomes: str | None, expert: str) -> Score | None:
        """Stored outcomes as what `evaluate.compare` takes."""
        return None if outcomes is None else Score(expert, self.meta["seed"], tuple(one == "1" for one in outcomes))


def _lines(name: str, rows: list[dict[str, Any]]) -> str:
    inner = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f" {json.dumps(name)}: [\n{inner}\n ]"
