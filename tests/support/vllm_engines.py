"""Real vLLM on the CPU: one engine after another in this process."""

import contextlib
import gc
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: no start-up of a second one
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
WORKER = "meswitch.vllm.DeltaWorker"
EXPERTS = ("math", "code", "instruct", "sql")
PROMPT = list(range(5, 40))  # more than a block of 32, so that a prefix can be shared
NEW_TOKENS = 24


@contextlib.contextmanager
def running(model, **options):
    """An engine in float32, so that a token's result does not hang on how a batch is cut."""
    from vllm import LLM

    defaults = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "seed": 0, "dtype": "float32"}
    defaults |= {"block_size": 32}  # the least that attention on a CPU takes
    engine = LLM(model=str(model), **defaults | options)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def with_deltas(model, **options):
    defaults = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 8, "worker_cls": WORKER}
    return running(model, **defaults | options)


def ask(engine, prompts, adapters=None, **params):
    """Greedy answers of one batch.

    Args:
        prompts: token ids. adapters: for each prompt an adapter's (name, id, directory), or None for the base.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = None
    if adapters is not None:
        requests = [None if a is None else LoRARequest(a[0], a[1], str(a[2])) for a in adapters]
    options = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    outputs = engine.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(**options | params),
        lora_request=requests,
        use_tqdm=False,
    )
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def behind(engine, adapter, prompt, answer):
    """How much less likely than the likeliest token an answer's worst one is to an expert that is asked alone."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    (output,) = engine.generate(
        [{"prompt_token_ids": [*prompt, *answer]}],
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, prompt_logprobs=1),
        lora_request=adapter and LoRARequest(adapter[0], adapter[1], str(adapter[2])),
        use_tqdm=False,
    )
    places = output.prompt_logprobs[len(prompt) :]
    return max(
        max(entry.logprob for entry in place.values()) - place[token].logprob
        for token, place in zip(answer, places, strict=True)
    )


def adapters_of(deltas):
    """(name, id, directory) by name; the base is None."""
    return {"base": None} | {name: (name, i + 1, path) for i, (name, path) in enumerate(deltas.items())}
