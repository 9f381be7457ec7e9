"""The checker of `questions/code.jsonl`: a reply is right if its function computes what the answer's does."""

from meswitch_lab.toy import same_function

__all__ = ["same_function"]
