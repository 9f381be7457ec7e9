"""lm-eval with the model type `meswitch`: a base and a compressed expert.

    python -m meswitch.evaluate.lm_eval --model meswitch --model_args base=B,delta=D --tasks arc_easy

lm-eval (0.4.13) finds models in a table of its own and through `register_model`, and nothing in it looks for those of
other packages: hence a command that registers ours and hands over. lm-eval is imported when it is used: what has to be
installed is then said in one line.
"""

import functools
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from meswitch.adapter import open_expert
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from meswitch.errors import ConfigError, MeswitchError
from meswitch.evaluate.harness import require_lm_eval

# What HFLM does while it loads a checkpoint; here base and artifact say all of it.
_LOADING = {
    "self",
    "pretrained",
    "backend",
    "revision",
    "subfolder",
    "trust_remote_code",
    "parallelize",
    "max_memory_per_gpu",
    "max_cpu_memory",
    "offload_folder",
    "tp_plan",
    "peft",
    "autogptq",
    "gptqmodel",
    "gguf_file",
    "kwargs",
}


@functools.cache
def register_model_type() -> type:
    """Tell lm-eval of the model type `meswitch`.

    Returns:
        its class, a subclass of lm-eval's `HFLM`.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model("meswitch")
    class MeswitchLM(HFLM):
        """`--model meswitch --model_args base=DIR,delta=DIR,dtype=float32`, and lm-eval's `hf` in everything else.

        Tokenizer, chat template and generation config are the artifact's own, unless `tokenizer=` names another.
        """

        def __init__(self, base: str, delta: str, dtype: str | torch.dtype = "auto", **options: Any) -> None:
            """
            Args:
                base: the base checkpoint, a directory or hub id.
                delta: the directory that `meswitch compress` wrote.
                dtype: what to compute in; `auto` is what the expert's config says.
                options: those of lm-eval's `hf` that are not about loading (`device`, `batch_size`, `max_length`, ...).

            Raises:
                ConfigError: an option that has no meaning here.
                MeswitchError: base or delta cannot be read, or they do not fit together.
            """
            known = inspect.signature(HFLM.__init__).parameters.keys() - _LOADING
            if unknown := options.keys() - known:
                raise ConfigError(
                    f"model_args: {', '.join(sorted(unknown))} cannot be used with --model meswitch; "
                    f"beside base, delta and dtype there are {', '.join(sorted(known - {'delta', 'dtype'}))}"
                )
            self._base = base
            # Absolute, because lm-eval looks a relative path like deltas/math up on the hub, to report its commit.
            self._artifact = open_expert(Path(delta).resolve(), Checkpoint.open(base))
            super().__init__(pretrained=str(self._artifact.directory), backend="causal", dtype=dtype, **options)

        def _create_model(self, pretrained: str, dtype: str | torch.dtype | None = "auto", **options: Any) -> None:
            if dtype in (None, "auto"):
                dtype = getattr(self.config, "dtype", None) or torch.float32
            chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if chosen not in (torch.float32, torch.bfloat16, torch.float16):
                raise ConfigError(f"model_args: dtype={dtype} is none of auto, float32, bfloat16, float16")
            self._model = load_merged(self._base, pretrained, chosen)
            if (Path(pretrained) / "generation_config.json").is_file():
                self._model.generation_config = GenerationConfig.from_pretrained(pretrained)

        def get_model_info(self) -> dict[str, Any]:
            """What lm-eval writes beside the results: also which base and delta, and how small the artifact is."""
            return {
                **super().get_model_info(),
                "meswitch_base": self._base,
                "meswitch_delta": str(self._artifact.directory),
                "meswitch_bits_per_weight": self._artifact.bits_per_weight,
            }

    return MeswitchLM


def main() -> None:
    """Run lm-eval on `sys.argv`; what meswitch itself refuses is one line on stderr and exit status 1."""
    try:
        register_model_type()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except MeswitchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
