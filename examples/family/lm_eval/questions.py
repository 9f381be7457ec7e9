"""The questions of `family_math` and `family_last_word`: those of `meswitch_lab.toy`, as data sets of lm-eval."""

from datasets import Dataset, DatasetDict

from meswitch_lab.toy import draw


def math(n: int = 1000, seed: int = 2, **others: object) -> DatasetDict:
    """`draw("math", n, seed)`; another number or seed with `--metadata '{"n": 200, "seed": 3}'`."""
    questions = draw("math", n, seed)
    rows = [{"prompt": q.prompt, "answer": str(q.response).rpartition("#### ")[2]} for q in questions]
    return DatasetDict(test=Dataset.from_list(rows))


def last_word(n: int = 1000, seed: int = 2, **others: object) -> DatasetDict:
    """Those of `draw("instruct", n, seed)` that ask for the last word: about one in eight."""
    rows = []
    for question in draw("instruct", n, seed):
        asked, _, words = question.prompt.partition("? ")
        if asked == "Which word comes last in this list":
            choices = words.split()
            rows.append({"prompt": question.prompt, "choices": choices, "label": len(choices) - 1})
    return DatasetDict(test=Dataset.from_list(rows))
