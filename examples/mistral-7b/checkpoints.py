"""Checkpoints that their authors published as pickles, as safetensors: meswitch reads no pickles."""

from pathlib import Path


def convert_if_pickled(hub_id: str, out: Path) -> None:
    """Write `out` if the hub has no safetensors of this model; needs the model's size of host memory.

    transformers loads the pickle with `weights_only`, which runs no code of it.
    """
    from huggingface_hub import list_repo_files

    if out.is_dir() or any(name.endswith(".safetensors") for name in list_repo_files(hub_id)):
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = out.with_name(out.name + ".partial")
    AutoModelForCausalLM.from_pretrained(hub_id, dtype="auto").save_pretrained(part)
    AutoTokenizer.from_pretrained(hub_id).save_pretrained(part)
    part.rename(out)
