"""How likely continuations are behind prompts, before and after an edit.

A prompt runs once; each continuation is a child of it that starts at its first token, and its last token is never run:
nothing is read behind it. Floor: 2 x parameters x (prompt tokens + target tokens - 1 a target) flops, and the head at
the scored rows only. Layers below the lowest edited one are the same before and after, and run once for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..checks import quoted
from ..datasets.questions import Question, Score, TokenizedQuestion
from ..model.head import final_states, read_targets
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.tokens import encode
from ..sweep.capture import EmbeddingNoise, clean_runs
from ..sweep.engine import default_max_rows
from ..sweep.packed import PackedPrompts, parts_of
from .edited import Edited


def tokenize_question(model: EditableModel, question: Question | TokenizedQuestion) -> TokenizedQuestion:
    """Prompt and target are tokenised jointly; where they merge, scoring starts with the merged token.

    Raises ValueError for a target without a token of its own, and for texts longer than the model's positions.
    """
    if isinstance(question, TokenizedQuestion):
        return question
    ids, _ = encode(model, question.prompt)
    joints, shared = [], []
    for target in question.targets:
        joint, _ = encode(model, question.prompt + target)
        same = next((n for n, (a, b) in enumerate(zip(ids, joint)) if a != b), min(len(ids), len(joint)))  # noqa: B905
        if same == 0 or same == len(joint):
            raise ValueError(f"target {quoted(target)} behind {quoted(question.prompt)} gives no token of its own")
        most = model.modules.max_positions
        if most is not None and len(joint) - 1 > most:
            raise ValueError(
                f"prompt '{_short(question.prompt)}' with target '{_short(target)}' has {len(joint)} tokens, more than "
                f"the model's {most} positions hold"
            )
        joints.append(tuple(joint))
        shared.append(same)
    return TokenizedQuestion(tuple(ids), tuple(joints), tuple(shared), question.edit)


@at_rest
def score(
    model: EditableModel,
    questions: Sequence[Question | TokenizedQuestion],
    edited: Edited | None = None,
    before: bool = True,
    max_rows: int | None = None,
) -> tuple[list[list[Score]] | None, list[list[Score]] | None]:
    """(before the edit, after it): for each question a `Score` for each target.

    edited: None, or the edits that the questions are asked under; the second result is None without it, the first
    without `before`. max_rows: rows run at once; None: from free memory.
    """
    tokenized = [tokenize_question(model, question) for question in questions]
    pre: list[list[Score]] | None = [] if before or edited is None else None
    post: list[list[Score]] | None = [] if edited is not None else None
    for part in parts_of([t.rows for t in tokenized], max_rows or default_max_rows(model)):
        sheet = _Sheet(model, tokenized[part])
        first = model.num_layers if edited is None else edited.first_layer
        hidden = sheet.packed.run(sheet.packed.start, 0, first)
        if pre is not None:
            pre += sheet.read(sheet.packed.run(hidden, first, model.num_layers))
        if edited is not None and post is not None:
            numbers = torch.tensor([question.edit for question in tokenized[part]])
            with edited.rows(numbers[sheet.question_of_row]):
                if edited.changes_embedding:
                    sheet = _Sheet(model, tokenized[part])
                    hidden = sheet.packed.start
                post += sheet.read(sheet.packed.run(hidden, first, model.num_layers))
    return pre, post


class _Sheet:
    """Questions as packed rows."""

    def __init__(self, model: EditableModel, questions: Sequence[TokenizedQuestion]) -> None:
        self.model, self.questions = model, questions
        texts: list[tuple[int, ...]] = []
        noises: list[EmbeddingNoise | None] = []
        begins: list[tuple[int, int] | None] = []
        owners, self._places, self._targets = [], [], []
        places: list[tuple[int, int]] = []  # (text, token) of every scored row
        for number, question in enumerate(questions):
            root = len(texts)
            texts.append(question.ids)
            noises.append(question.noise)
            begins.append(None)
            owners.append(number)
            for joint, shared in zip(question.joint, question.shared, strict=True):
                places.append((root, shared - 1))
                if len(joint) - shared > 1:
                    places += [(len(texts), token) for token in range(shared, len(joint) - 1)]
                    texts.append(joint[:-1])
                    noises.append(question.noise)
                    begins.append((root, shared))
                    owners.append(number)
                self._targets += joint[shared:]
        self.packed = PackedPrompts(model, clean_runs(model, texts, noises), begins)
        self._rows = torch.tensor([self.packed.row(*place) for place in places])
        self.question_of_row = torch.tensor(owners)[self.packed.prompt_of_row]

    def read(self, hidden: torch.Tensor) -> list[list[Score]]:
        """From the rows behind the last layer [rows, hidden]."""
        rows, places = torch.unique(self._rows, return_inverse=True)  # targets share their prompt's last row
        states = final_states(self.model, hidden[rows.to(hidden.device)])
        logp, said = read_targets(self.model, states, places, torch.tensor(self._targets))
        broken = torch.isnan(logp)
        if broken.any():
            owners = [
                question for question in self.questions for joint, shared in _pairs(question) for _ in joint[shared:]
            ]
            prompt = self.model.tokenizer.decode(owners[int(broken.nonzero()[0])].ids)
            raise ValueError(f"the logits behind '{_short(prompt)}' are not finite: the model, or its edit, is broken")
        taken = iter(zip(logp.tolist(), said.tolist(), self._targets, strict=True))
        return [
            [_mean([next(taken) for _ in range(len(joint) - shared)]) for joint, shared in _pairs(question)]
            for question in self.questions
        ]


def _pairs(question: TokenizedQuestion) -> Iterator[tuple[tuple[int, ...], int]]:
    return zip(question.joint, question.shared, strict=True)


def _mean(tokens: Sequence[tuple[float, int, int]]) -> Score:
    """tokens: of each its log-probability, what was likeliest in its place, itself."""
    logps, said, targets = zip(*tokens, strict=True)
    return Score(-sum(logps) / len(tokens), tuple(a == b for a, b in zip(said, targets, strict=True)), said)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
