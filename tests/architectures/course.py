"""What a user does with a pair of checkpoints, from `compress` to answers, and where it ends for an architecture."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

import meswitch
from meswitch.architecture import architecture_of, model_class
from meswitch.artifact import Artifact
from meswitch.compression.merge import merge
from meswitch.errors import IncompatibleError, MeswitchError
from tests.architectures import tiny

PROMPTS = ([5, 77, 1200, 300, 9, 41], [17, 401, 8], [99, 1033, 54, 720, 6, 7, 8, 1900, 12])
TEXT = ("What is seven times eight? It is 56.", "select name from city where state = 'ohio'", "Say hello. Hello!")
UNCALIBRATED = "cannot be run block by block: "  # how a model that cannot be calibrated is refused
NEW_TOKENS = 6
TIE = 1e-3  # logits that are nearer than this to each other may change places


@dataclass
class Outcome:
    """Where a model type's way ended.

    Args:
        compressed: whether both experts were compressed, verified and merged, and their merged models load.
        calibrated: whether the second of them was compressed with calibration. uncalibrated: why not.
        distance: of the logits of the merged model from the full fine-tune's, relative to what fine-tuning changed.
        kind: class of transformers that is served.
        runner: `batch` or `turns`; None if it is not served.
        reasons: why not in a batch.
        right: answers that are the merged model's own. wrong: those that are not.
        error: the message that ended it.
    """

    kind: str = ""
    compressed: bool = False
    calibrated: bool = False
    uncalibrated: str | None = None
    distance: float = 0.0
    runner: str | None = None
    reasons: list[str] = field(default_factory=list)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    error: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is known of the model type then."""
        reason = self.error if self.runner is None else "; ".join(self.reasons) or None
        return {
            "class": self.kind,
            "compressed": self.compressed,
            "calibrated": self.calibrated,
            "uncalibrated": self.uncalibrated,
            "runner": self.runner,
            "reason": reason,
        }


def follow(model_type: str, root: Path, tokenizer: Path, device: str = "cpu", **fields: Any) -> Outcome:
    """Compress two fine-tunes of a tiny base, verify, merge, load, and serve them and the base mixed.

    Args:
        device: that compresses and serves; what it gives is compared on the CPU.
    """
    config = tiny.config_of(model_type, **fields)
    outcome = Outcome(kind=model_class(config, text_only=True).__name__)
    base = tiny.write(config, root / "base", tokenizer)
    try:
        models = _compress(outcome, root, base, device)
        _serve(outcome, root, base, device, models)
    except MeswitchError as error:
        outcome.error = str(error)
    return outcome


def load(directory: Path) -> Any:
    """A checkpoint's language model, by transformers alone."""
    found = architecture_of(AutoConfig.from_pretrained(directory), text_only=True)
    attention = "sdpa" if found.model_class._supports_sdpa else "eager"
    model = found.model_class.from_pretrained(
        directory, config=copy.deepcopy(found.config), dtype=torch.float32, attn_implementation=attention
    )
    model.generation_config = GenerationConfig()
    return model.eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in PROMPTS])


def _compress(outcome: Outcome, root: Path, base: Path, device: str) -> dict[str, Any]:
    """Returns the base's model and both merged ones."""
    models = {"base": load(base)}
    plain = _logits(models["base"])
    for seed, name in enumerate(("a", "b"), start=1):
        full = tiny.tune(base, root / name, seed)
        if name == "a":
            meswitch.compress(base, full, root / "delta-a", bits=4, device=device)
        else:
            _calibrate(outcome, root, base, full, device)
        Artifact.open(root / f"delta-{name}").verify()
        merge(base, root / f"delta-{name}", root / f"merged-{name}")
        wanted = _logits(load(full))
        models[name] = load(root / f"merged-{name}")
        found = _logits(models[name])
        distance = float((found - wanted).norm() / (wanted - plain).norm())
        outcome.distance = max(outcome.distance, distance)
    outcome.compressed = True
    return models


def _calibrate(outcome: Outcome, root: Path, base: Path, full: Path, device: str) -> None:
    """Compress the second expert, calibrated if it can be."""
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in TEXT))
    try:
        meswitch.compress(base, full, root / "delta-b", bits=4, calibration=text, distill=0, device=device)
        outcome.calibrated = True
    except IncompatibleError as error:
        outcome.uncalibrated = str(error).partition(UNCALIBRATED)[2].partition(";")[0]
        if not outcome.uncalibrated:
            raise
        meswitch.compress(base, full, root / "delta-b", bits=4, device=device)


def _serve(outcome: Outcome, root: Path, base: Path, device: str, models: dict[str, Any]) -> None:
    experts = {name: root / f"delta-{name}" for name in ("a", "b")}
    names = [name for _ in PROMPTS for name in ("a", "b", "base")]
    prompts = [list(ids) for ids in PROMPTS for _ in range(3)]
    with meswitch.Engine(base, experts, device=device, dtype="float32", slots=2, kv_cache_tokens=4096) as engine:
        outcome.reasons = list(engine.by_turns)
        outcome.runner = "turns" if engine.by_turns else "batch"
        for tokenizer in engine.tokenizers.values():
            tokenizer.ends = []
        answers = engine.generate(prompts, model=names, max_new_tokens=NEW_TOKENS)
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        fault = differs(models[name], prompt, list(answer.tokens))
        if fault is None:
            outcome.right += 1
        else:
            outcome.wrong.append(f"{name}: {fault}")


@torch.no_grad()
def differs(model: Any, prompt: list[int], answer: list[int]) -> str | None:
    """Where a greedy answer is not the model's own, alone and by transformers' `generate`; near ties do not count."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    if len(answer) != NEW_TOKENS:
        return f"{len(answer)} tokens"
    for place, (token, wanted, scores) in enumerate(
        zip(answer, out.sequences[0, len(prompt) :].tolist(), out.logits, strict=True)
    ):
        if token != wanted:
            lost = float(scores[0, wanted] - scores[0, token])
            tie = lost <= TIE * max(1.0, float(scores[scores.isfinite()].abs().max()))
            return None if tie else f"token {place} is {token}, {lost:.3g} below the best"
    return None
