"""zsRE: teacher-forced accuracy of every token of an answer (eval_utils_zsre.py:46-120, dsets/zsre.py:31-56)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model.facts import encode
from ..model.load import EditableModel
from ..model.spelling import spaced
from .counterfact import Asked, ask_extras, filled
from .nll import Question, Score, TokenizedQuestion


def ask(
    model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
) -> Asked:
    """{sort}_correct: right or wrong for each token of the answers, prompt after prompt. `attributes`: zsRE has none.

    Answers are tokenised with their prompt and asked in one pass. compat="reference": as published, each token is asked
    behind the text of those before it, tokenised anew; a token that is no whole character is wrong there.
    """
    rewrite = record["requested_rewrite"]
    new, space = rewrite["target_new"]["str"], rewrite.get("space")
    pairs_of = {
        "rewrite_prompts": [(filled(rewrite), new)],
        "paraphrase_prompts": [(text, new) for text in record["paraphrase_prompts"]],
        "neighborhood_prompts": [(x["prompt"], x["target"]) for x in record["neighborhood_prompts"]],
    }
    asked = {sort: [(text, spaced(answer, text, space)) for text, answer in pairs] for sort, pairs in pairs_of.items()}
    cut = _by_texts if compat == "reference" else lambda _, text, answer, number: [Question(text, (answer,), number)]
    by_sort = {sort: [q for pair in pairs for q in cut(model, *pair, edit)] for sort, pairs in asked.items()}
    extra_questions, read_extras = ask_extras(record, edit)

    def read(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
        left = iter(scores)
        found: dict[str, Any] = {}
        for sort, questions in by_sort.items():
            found[f"{sort}_correct"] = [right for _ in questions for right in next(left)[0].right]
        return found | read_extras(list(left))

    return [question for questions in by_sort.values() for question in questions] + extra_questions, read


def _by_texts(model: EditableModel, text: str, answer: str, edit: int) -> list[TokenizedQuestion]:
    tokenizer = model.tokenizer
    tokens = tokenizer(answer)["input_ids"]
    found = []
    for n, token in enumerate(tokens):
        ids = tuple(encode(model, text + tokenizer.decode(tokens[:n]))[0])
        first = (tokenizer(tokenizer.decode([token]))["input_ids"] or [token])[0]
        found.append(TokenizedQuestion(ids, ((*ids, first),), (len(ids),), edit))
    return found
