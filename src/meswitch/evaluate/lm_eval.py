"""lm-eval's command line with the model type `meswitch`.

    python -m meswitch.evaluate.lm_eval --model meswitch --model_args base=B,delta=D --tasks arc_easy

lm-eval (0.4.13) finds models in a table of its own and through `register_model`, and nothing in it looks for those of
other packages: hence a command that registers ours and hands over.
"""

import sys

from meswitch.errors import MeswitchError
from meswitch.evaluate.harness import require_lm_eval


def main() -> None:
    """Run lm-eval on `sys.argv`; what meswitch itself refuses is one line on stderr and exit status 1."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import meswitch.evaluate.lm_eval_model  # noqa: F401  (registers)

        cli_evaluate()
    except MeswitchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
