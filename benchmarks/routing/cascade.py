"""An embedding router, an LLM router, and the two as a cascade: accuracy and latency on the same rows.

    python benchmarks/routing/cascade.py --encoder DIR --router DIR --model DIR --train train.jsonl --dev dev.jsonl \\
        --out benchmarks/results/routing-llm.json

`--router` is the tuned router that `llm_router.py` left in its `--work`, `--model` the model that it was made of. The
embedding router is trained on the rows that the LLM router was trained on; the cascades are fitted on those of its
calibration, and measured on the tenth of `--train` that neither has seen (`held-out`) and on `--dev`.
"""

import argparse
import sys
from pathlib import Path

import torch

from meswitch.router import Router, evaluate_router, fit_cascade, load_router, open_encoder, read_rows, train_router
from meswitch.router.base import user_turns
from meswitch.router.cascade import CascadeRouter, log_scores, unsure
from meswitch.router.data import hold_out
from meswitch.router.evaluate import latency
from meswitch.router.train import default_settings

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.routing.llm_router import descriptions, measured_on, nbytes, rounded, store, test_split


class Remembered(Router):
    """A router that scores each text once, for figures; not for latency."""

    def __init__(self, router):
        self.router, self.known = router, {}
        self.experts, self.threshold, self.fallback = router.experts, router.threshold, router.fallback

    def scores(self, batch):
        texts = [user_turns(messages)[-1] for messages in batch]
        new = [i for i, text in enumerate(texts) if text not in self.known]
        for i, scores in zip(new, self.router.scores([batch[i] for i in new]), strict=True):
            self.known[texts[i]] = scores
        return [self.known[text] for text in texts]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    known = descriptions()
    second = load_router(options.router, options.model, llm=options.model, device=options.device)
    rows, held_out = test_split(read_rows(options.train, known), second.settings.seed)
    seen, calibration = hold_out(rows, second.settings.holdout, second.settings.seed)
    encoder = open_encoder(options.encoder, bits=options.bits)
    first = train_router(seen, list(known), encoder, settings=default_settings(encoder))
    data = {"held-out": held_out, "dev": read_rows(options.dev, known) if options.dev else []}
    # both routers' temperatures are those that they were saved or trained with; a cascade has its own
    one, two = Remembered(first), Remembered(second)
    routers = {"embedding": (first, one), "llm": (second, two)}
    for asked in options.asked:
        fitted = fit_cascade(one, two, calibration, asked=None if asked == "all" else float(asked))
        real = CascadeRouter(first, second, fitted.calibration, margin=fitted.margin, weight=fitted.weight)
        routers["both always" if asked == "all" else f"cascade {asked}"] = real, fitted
    for variant, (real, quick) in routers.items():
        for kind, some in data.items():
            if not some:
                continue
            figures = evaluate_router(quick, some).to_dict() | {"rows": len(some)}
            figures["latency_ms"] = latency(real, some, options.timed)
            figures["bytes"] = 0 if variant == "llm" else first.nbytes()
            figures["bytes"] += 0 if variant == "embedding" else nbytes(second)
            figures["asked"] = share_asked(quick, one, some)
            shown = ("accuracy", "per_domain", "ece", "auroc", "accepted_other", "latency_ms", "asked")
            print(variant, kind, rounded({key: figures[key] for key in shown}), flush=True)
            entry = {
                "model": f"{options.name} + {options.llm_name}",
                "params": second.llm.info.parameters,
                "kind": "cascade",
                "variant": variant,
                "data": kind,
                **figures,
                **measured_on(options.device),
            }
            store(options.out, entry)


def share_asked(router, first, rows) -> float | None:
    """Of the queries, that go on to the second router; None for a router alone."""
    if not isinstance(router, CascadeRouter):
        return None
    batch = [[{"role": "user", "content": row.query}] for row in rows]
    return float(unsure(log_scores(first, batch, router.labels), router.margin).double().mean())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a sentence encoder's directory or hub id")
    parser.add_argument("--name", default="minilm-l6-int8", help="what the results call it")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--router", type=Path, required=True, help="of a tuned LLM router")
    parser.add_argument("--model", type=Path, required=True, help="the LLM router's model")
    parser.add_argument("--llm-name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    shares = "shares of the queries for the LLM; `all`: both for every query"
    parser.add_argument("--asked", nargs="+", default=["0.05", "0.2", "all"], help=shares)
    parser.add_argument("--timed", type=int, default=100, help="queries timed one at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the LLM router")
    return parser.parse_args()


if __name__ == "__main__":
    main()
