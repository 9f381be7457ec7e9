"""Change a sentence encoder's weights a little, so that it tells kinds of request apart: `adapted.safetensors`.

    python benchmarks/routing/adapt.py texts --clones DIR --train train.jsonl --out texts.jsonl.gz
    python benchmarks/routing/adapt.py learn --encoder DIR --texts texts.jsonl.gz --out update.safetensors
    python benchmarks/routing/adapt.py finish --encoder DIR --texts texts.jsonl.gz --update update.safetensors \\
        --out src/meswitch/router/adapted.safetensors

The texts are those of `tasks.py`; none is of a set that routing is measured on, but for two of `boards.py`. A linear
layer's weight W becomes W + left @ right.T. A step draws tasks, lines of each from some of its sources and queries from
others, which are told apart by their nearest lines after a map that is learnt beside it, and intents of one source,
which are told apart by the means of five lines. A third term holds the cosines of all texts of a step where the encoder
as it came has them.

What is learnt so knows its sources by heart. So `finish` takes a share of it, cuts the rank, and learns the map anew.
`learn --without FOLD` leaves out sources of every task (`FOLDS`) and measures shares on them: by these the rate and the
share were chosen. A GPU takes a minute or two, with torch and transformers alone. Of a new file the checksum is to be
written into `meswitch.router.encoder`.
"""

import argparse
import gzip
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.router import OTHER, DescribedRouter, RouteOption, Row, Space, evaluate_router
from meswitch.router.base import clip
from meswitch.router.described import EVERYDAY
from meswitch.router.encoder import SentenceEncoder, shortened

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there
from benchmarks.routing.run import Remembering
from benchmarks.routing.tasks import DRAWS, Steps, Text, collect, learn, measured, nearness, parts

RANK, SHARE = 4, 0.4  # of what is shipped: 340 kB
SHARES = (0.0, 0.15, 0.4, 0.6, 1.0)  # that are measured on what was left out
LINEARS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
DOMAINS = {"math": "math", "code": "code", "assistant": "instruct", "database": "sql", "app": OTHER}  # of tasks
FOLDS = {
    "a": {"Differential Equations", "Stack Overflow titles", "mbpp", "OpenTriviaQA", "GPTeacher, tools", "Rasa",
          "t2s_advising", "t2s_atis"},
    "b": {"gsm8k_train", "GPTeacher, code", "ChatterBot, coding", "T0's prompts", "self_instruct_seed", "HWU64",
          "t2s_geography", "patterns"},
    "c": {"Basic Analysis", "30 seconds of code", "The Algorithms", "Open Assistant", "GPTeacher, roles",
          "Schema-Guided Dialogue", "Bot Framework skills", "t2s_restaurants"},
}  # fmt: skip
_MOST = 200  # rows of a source that was left out
_TOKENS = 64
_LAYERS, _LOW = (4, 5, 6), (4, 5)  # that routes read, and broad ones
_ROUTES, _EXAMPLES, _ASKED = 40, 5, 10  # intents of a source that was left out, examples and queries of each


@dataclass(frozen=True)
class Setting:
    """rate: learning rate. hold: how much the cosines of the encoder as it came count. broad: draws of tasks a step,
    beside one of intents. intents: how much that counts.
    """

    rank: int = 8
    rate: float = 3e-4
    hold: float = 10.0
    steps: int = 600
    broad: int = 2
    intents: float = 1.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """From `rank=4,rate=1e-3`."""
        given = dict(part.split("=") for part in text.split(",") if part)
        return replace(cls(), **{name: type(getattr(cls, name))(value) for name, value in given.items()})


def write_texts(texts: list[Text], path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(astuple(text)) + "\n" for text in texts)


def read_texts(path: Path) -> list[Text]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Text(*json.loads(line)) for line in file]


class Batches:
    """Token ids of texts as the router has them."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, device: str) -> None:
        start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        found = tokenizer([clip(text) for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        self.ids = [[start, *shortened(ids, _TOKENS), end] for ids in found]
        self.device = device

    def units(self, model: Any, weights: dict[str, Tensor], rows: Sequence[int], parts: int = 2) -> Tensor:
        """[rows, layers, width] float32, each of length one: means over the tokens.

        Args:
            weights: of the model, in place of its own.
            parts: the rows are sorted by length and computed in so many.
        """
        order = sorted(range(len(rows)), key=lambda i: len(self.ids[rows[i]]))
        found = []
        for part in torch.tensor(order).chunk(parts):
            ids = [self.ids[rows[i]] for i in part]
            width = max(map(len, ids))
            padded = torch.tensor([row + [0] * (width - len(row)) for row in ids]).to(self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]).to(self.device)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                inputs = {"input_ids": padded, "attention_mask": mask, "output_hidden_states": True}
                states = torch.func.functional_call(model, weights, (), inputs).hidden_states
            share = (mask / mask.sum(1, keepdim=True))[:, :, None]
            means = torch.stack([(states[layer].float() * share).sum(1) for layer in _LAYERS], 1)
            found.append(normalize(means, dim=2))
        return torch.cat(found)[torch.tensor(order).argsort()]


def linear_names(model: Any) -> list[str]:
    """Names of the weights that are adapted."""
    return [f"encoder.layer.{i}.{name}.weight" for i in range(len(model.encoder.layer)) for name in LINEARS]


def merged(model: Any, update: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapted weights. update: `<weight>.left` [out, rank] and `<weight>.right` [in, rank]."""
    own = model.state_dict()
    names = [name.removesuffix(".left") for name in update if name.endswith(".left")]
    return {name: own[name] + update[f"{name}.left"] @ update[f"{name}.right"].T for name in names}


def adapt(model: Any, batches: Batches, texts: list[Text], setting: Setting) -> dict[str, Tensor]:
    """The update. batches: of the texts and then of EVERYDAY."""
    device, generator = batches.device, torch.Generator().manual_seed(setting.seed)
    update = {}
    for name in linear_names(model):
        outputs, inputs = model.state_dict()[name].shape
        update[f"{name}.left"] = torch.zeros(outputs, setting.rank, device=device, requires_grad=True)
        right = torch.randn(inputs, setting.rank, generator=generator) / inputs**0.5
        update[f"{name}.right"] = right.to(device).requires_grad_()
    width = len(_LOW) * model.config.hidden_size
    identity = torch.eye(width, device=device)
    form = identity.clone().requires_grad_()
    sharpness = torch.tensor([3.0, 3.0], device=device, requires_grad=True)  # logarithms
    groups = [
        {"params": list(update.values()), "lr": setting.rate},
        {"params": [form], "lr": 1e-3},
        {"params": [sharpness], "lr": 1e-2},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, setting.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, setting.steps - warm),
        ],
        [warm],
    )
    draws, everyday = Steps(texts, setting.seed), range(len(texts), len(batches.ids))
    with torch.no_grad():
        chunks = torch.arange(len(texts)).split(1024)
        before = torch.cat([batches.units(model, {}, chunk.tolist(), 8) for chunk in chunks])
    logged = []
    for step in range(setting.steps):
        weights = merged(model, update)
        if step % 25 == 0:
            with torch.no_grad():
                middle = batches.units(model, weights, everyday).mean(0)
        drawn = [*(draws.of_tasks() for _ in range(setting.broad)), draws.of_intents()]
        rows = torch.cat([torch.cat([lines.flatten(), queries.flatten()]) for lines, queries in drawn]).tolist()
        units = batches.units(model, weights, rows)
        held = (_cosines(units) - _cosines(before[rows])).square()
        losses, at = [], 0
        for i, (lines, queries) in enumerate(drawn):
            own = (units - middle)[at : at + lines.numel() + queries.numel()]
            at += len(own)
            targets = torch.arange(len(queries), device=device).repeat_interleave(queries.shape[1])
            if i < setting.broad:
                own = own[:, : len(_LOW)].flatten(1) / len(_LOW) ** 0.5 @ form
                scores = nearness(own[: lines.numel()].unflatten(0, lines.shape), own[lines.numel() :])
            else:
                own = own.flatten(1) / len(_LAYERS) ** 0.5
                points = own[: lines.numel()].unflatten(0, lines.shape).mean(1)
                scores = own[lines.numel() :] @ points.T - points.square().sum(1) / 2
            losses.append(cross_entropy(scores * sharpness[int(i == setting.broad)].exp(), targets))
        *broad, intents = losses
        near = 0.03 * (form - identity).square().sum()
        loss = sum(broad) / len(broad) + setting.intents * intents + setting.hold * held.mean() + near
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        logged.append(torch.stack([sum(broad).detach() / len(broad), intents.detach(), held.mean().detach()]))
        if step % 100 == 99 or step + 1 == setting.steps:
            print(f"step {step + 1}: tasks, intents, held {torch.stack(logged).mean(0).tolist()}", flush=True)
            logged = []
    return {name: part.detach().half().contiguous() for name, part in update.items()}


def _cosines(units: Tensor) -> Tensor:
    """[n, n, layers], of units [n, layers, width]."""
    return torch.einsum("ild,jld->ijl", units, units)


def figures(space: Space, texts: list[Text], left_out: list[Text]) -> dict[str, Any]:
    """Share right of what was left out of training, with a map that is learnt from the other texts."""
    plain, width = space.form, len(space.low) * space.encoder.hidden_size
    of_form = lambda x: plain(x)[:, :width]  # noqa: E731
    vectors = of_form(space([text.text for text in texts], space.low)).to(space.encoder.device)
    space.form = plain.with_learnt(parts(learn(texts, vectors, 0).cpu(), of_form(space.background)))
    rows, counts = [], Counter[str]()
    for text in left_out:
        counts[text.source] += 1
        if text.task in DOMAINS and counts[text.source] <= _MOST:
            rows.append(Row(text.text, DOMAINS[text.task], text.source))
    found = measured(space, {"tasks": rows})["tasks"]
    intents = {}
    labels = Counter((text.source, text.label) for text in left_out if text.label)
    for source in sorted({source for (source, _), count in labels.items() if count >= 2 * _EXAMPLES}):
        intents[source] = mean(intents_right(space, [t for t in left_out if t.source == source], s) for s in (0, 1))
    return found | {"mean": mean(found["per_domain"].values()), "intents": intents}


def intents_right(space: Space, texts: list[Text], seed: int) -> float:
    """Share right of intents of one source by five examples of each, and nothing else."""
    draw, of = random.Random(seed), {}
    for text in texts:
        of.setdefault(text.label, []).append(text.text)
    enough = sorted(label for label, own in of.items() if len(own) >= 2 * _EXAMPLES)
    options, rows = [], []
    for label in draw.sample(enough, min(_ROUTES, len(enough))):
        own = draw.sample(of[label], min(len(of[label]), _EXAMPLES + _ASKED))
        options.append(RouteOption(label, "", tuple(own[:_EXAMPLES])))
        rows += [Row(text, label) for text in own[_EXAMPLES:]]
    return evaluate_router(DescribedRouter(options, space), rows).accuracy


def load(directory: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer; the model's own weights stay as they are."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(directory)


def scaled(update: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """A share of the change."""
    return {name: part.float() * (share if name.endswith(".left") else 1.0) for name, part in update.items()}


def of_rank(update: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The nearest update of a smaller rank, float16."""
    found = {}
    for name in (key.removesuffix(".left") for key in update if key.endswith(".left")):
        u, s, v = torch.linalg.svd(update[f"{name}.left"] @ update[f"{name}.right"].T, full_matrices=False)
        found[f"{name}.left"] = (u[:, :rank] * s[:rank].sqrt()).half().contiguous()
        found[f"{name}.right"] = (v[:rank].T * s[:rank].sqrt()).half().contiguous()
    return found


def changed(directory: Path, update: dict[str, Tensor], device: str, bits: int) -> Remembering:
    """The encoder with the change in its weights."""
    model, tokenizer = load(directory, device)
    model.load_state_dict(merged(model, {name: part.float().to(device) for name, part in update.items()}), strict=False)
    return Remembering(SentenceEncoder(model, tokenizer, fingerprint(Checkpoint.open(directory)), str(directory), bits))


def run_learn(options: argparse.Namespace) -> None:
    setting, device = Setting.parse(options.setting), "cuda" if torch.cuda.is_available() else "cpu"
    texts = read_texts(options.texts)
    without = FOLDS.get(options.without, set())
    kept = [text for text in texts if text.source not in without]
    model, tokenizer = load(options.encoder, device)
    batches = Batches([*(text.text for text in kept), *EVERYDAY], tokenizer, device)
    update = {name: part.cpu() for name, part in adapt(model, batches, kept, setting).items()}
    save_file(update, options.out)
    for share in SHARES if without else ():
        space = Space(changed(options.encoder, scaled(update, share), device, 32), learnt=False)
        found = figures(space, kept, [text for text in texts if text.source in without])
        print(f"without {options.without}, share {share}: {json.dumps(found)}", flush=True)


def run_finish(options: argparse.Namespace) -> None:
    texts = read_texts(options.texts)
    update = of_rank(scaled(load_file(options.update), SHARE), RANK)
    space = Space(changed(options.encoder, update, "cpu", 8), learnt=False)
    plain, width = space.form, len(space.low) * space.encoder.hidden_size
    vectors = plain(space([text.text for text in texts], space.low))[:, :width]
    form = parts(sum(learn(texts, vectors, seed) for seed in range(DRAWS)) / DRAWS, plain(space.background)[:, :width])
    counts = json.dumps(Counter(text.task for text in texts))
    about = {"encoder": space.encoder.fingerprint, "texts": counts, "date": time.strftime("%Y-%m-%d")}
    save_file(update | {f"form.{name}": part for name, part in form.items()}, options.out, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("texts", help="write the texts of all sources")
    command.add_argument("--clones", type=Path, required=True)
    command.add_argument("--train", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    for name, what in (("learn", "learn an update"), ("finish", "make the file that is shipped")):
        command = commands.add_parser(name, help=what)
        command.add_argument("--encoder", type=Path, required=True)
        command.add_argument("--texts", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        if name == "learn":
            command.add_argument("--setting", default="", help="such as rank=4,rate=1e-3")
            command.add_argument("--without", choices=list(FOLDS), help="leave sources out, and measure on them")
        else:
            command.add_argument("--update", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "texts":
        write_texts(collect(options.clones, options.train), options.out)
    else:
        {"learn": run_learn, "finish": run_finish}[options.command](options)


if __name__ == "__main__":
    main()
