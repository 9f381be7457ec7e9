"""The tasks of the toy family (`examples/family`): questions from a seeded generator, and how they are checked."""

from meswitch_lab.toy.tasks import CHECKABLE, DOMAINS, Question, accuracy, draw, own_answers, same_function, task

__all__ = ["CHECKABLE", "DOMAINS", "Question", "accuracy", "draw", "own_answers", "same_function", "task"]
