"""What a model writes about records: fluency, consistency, essence (eval_utils_counterfact.py:186-257)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..datasets.snippets import snippets_for
from ..extras import require
from ..model.load import EditableModel
from ..model.tokens import encode
from ..runs.settings import marked
from .edited import Edited
from .generation import MAX_LENGTH, batch_size, generate, record_seed
from .metric import Written
from .metrics import METRICS
from .metrics.consistency import TfIdf

Snippets = Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]


def require_extras(compared: bool) -> None:
    """`MissingExtraError` where a package is missing that measures texts; compared: with reference texts."""
    require("nltk.tokenize")
    if compared:
        require("sklearn.feature_extraction.text")


class Texts:
    """How texts are generated and measured. snippets: relation -> target -> [{"name", "text"}]; None: fluency alone.

    tfidf: the words' weights; None: fitted on the snippets. max_length: tokens of a text, its prompt's included; None:
    100, as published, or the model's positions where it has fewer.
    """

    def __init__(
        self,
        model: EditableModel,
        snippets: Snippets | None,
        tfidf: TfIdf | None = None,
        max_length: int | None = None,
        compat: str | None = None,
    ) -> None:
        if tfidf is not None and snippets is None:
            raise ValueError("tfidf is for the consistency with snippets: give snippets too")
        require_extras(snippets is not None)
        self.model, self.snippets, self.compat = model, snippets, compat
        self.max_length = max_length or min(MAX_LENGTH, model.modules.max_positions or MAX_LENGTH)
        self._given = tfidf
        self.batch: int | None = None  # texts at once; None: from free memory

    @cached_property
    def tfidf(self) -> TfIdf:
        if self._given is not None:
            return self._given
        return TfIdf.fit(
            s["text"] for targets in self.snippets.values() for snippets in targets.values() for s in snippets
        )

    def describe(self) -> dict[str, Any]:
        """What tells these measurements from others; what a record's depend on besides: `describe_record`."""
        words = None
        if self.snippets is not None:
            vocabulary = json.dumps(self.tfidf.vocabulary, sort_keys=True, default=int)
            words = marked(vocabulary, self.tfidf.idf.tobytes())
        return {"max_length": self.max_length, "words": words}

    def describe_record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        if self.snippets is None:
            return {}
        return {"snippets": marked(json.dumps(snippets_for(self.snippets, record), sort_keys=True))}

    def batch_size(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Texts at once: in half precision a text depends on it."""
        prompts = {prompt for record in records for prompt in record["generation_prompts"]}
        longest = max(len(encode(self.model, prompt)[0]) for prompt in prompts)
        return batch_size(self.model, longest, self.max_length)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises ValueError for a record that has nothing to generate from, or nothing to compare with."""
        if not record.get("generation_prompts"):
            raise ValueError("there are none to generate from: generation=False leaves fluency and consistency out")
        for prompt in record["generation_prompts"]:
            if not encode(self.model, prompt)[0]:
                raise ValueError(f"prompt {prompt!r} has no token to go on from")
        if self.snippets is not None:
            snippets_for(self.snippets, record)

    def measure(self, records: Sequence[Mapping[str, Any]], edited: Edited | None) -> list[dict[str, Any]]:
        """For each record what the metrics make of its texts. edited: with record n under its edit n."""
        prompts = [(n, k, p) for n, record in enumerate(records) for k, p in enumerate(record["generation_prompts"])]
        seeds = [record_seed(records[n]["case_id"], k) for n, k, _ in prompts]
        under = {} if edited is None else {"edits": edited, "index": [n for n, _, _ in prompts]}
        written = generate(
            self.model, [p for _, _, p in prompts], seeds, max_length=self.max_length, batch=self.batch, **under
        )
        texts: list[list[str]] = [[] for _ in records]
        for (n, _, _), text in zip(prompts, written, strict=True):
            texts[n].append(text)
        references = None if self.snippets is None else [snippets_for(self.snippets, record) for record in records]
        tfidf = None if self.snippets is None else self.tfidf
        given = Written(self.model, records, texts, references, tfidf, edited, self.max_length, self.compat)
        cases: list[dict[str, Any]] = [{} for _ in records]
        for metric in METRICS:
            if metric.measure is not None:
                for case, measured in zip(cases, metric.measure(given), strict=True):
                    case |= measured
        return cases
