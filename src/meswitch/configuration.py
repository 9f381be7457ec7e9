"""The configuration of a model: read from `config.json`, without ever running a repository's own code."""

from pathlib import Path
from typing import Any

from meswitch.errors import CheckpointError
from meswitch.hub import fetch_config, is_hub_id
from meswitch.jsonfile import read_json


def read_config(source: str | Path) -> Any:
    """A model's configuration as transformers understands it.

    Args:
        source: a directory with a `config.json`, such a file, or a hub id.

    Returns:
        a `transformers.PreTrainedConfig`.

    Raises:
        CheckpointError: no such file, a damaged one, a `model_type` that the installed transformers does not have, or
            a value that its class does not take.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = Path(source)
    if file.is_dir():
        file = file / "config.json"
    elif is_hub_id(source):
        file = fetch_config(str(source))
    elif not file.exists():
        raise CheckpointError(f"{source}: no such file or directory; give a config.json, a checkpoint or a hub id")
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a checkpoint needs its configuration")
    fields = read_json(file)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: {_unknown(fields)}")
    try:
        config = transformers.AutoConfig.from_pretrained(
            file.parent if file.name == "config.json" else file, trust_remote_code=False
        )
        config._attn_implementation = None  # of whoever saved it; what is not installed here is no obstacle
        return config
    except Exception as error:  # a configuration's own checks raise whatever they like
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} does not take it as {model_type!r}: {_one_line(error)}"
        ) from error


def _unknown(fields: dict[str, Any]) -> str:
    """Why a configuration belongs to no class of transformers, and what to do."""
    import transformers

    model_type, code = fields.get("model_type"), fields.get("auto_map")
    if code:
        named = code.get("AutoModelForCausalLM") or code.get("AutoConfig") if isinstance(code, dict) else None
        return (
            f"auto_map: {model_type!r} is code of the checkpoint's own ({named or 'custom'}), which meswitch does not "
            "run; load it with transformers and `trust_remote_code=True` and save it as an architecture that "
            "transformers has, if it computes one"
        )
    if model_type is None:
        what = "an adapter's" if "peft_type" in fields else "no model's"
        return f"model_type: missing: this is {what} configuration; give that of a transformers checkpoint"
    return (
        f"model_type: {model_type!r} is none that transformers {transformers.__version__} has; correct it, or "
        "upgrade with `pip install --upgrade transformers`"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
