"""Trace a data set: one .npz a case and kind, in the published layout; resumable and sharded.

Facts are traced in groups that depend on their order alone, and a group is computed as a whole, so that a run that was
killed and resumed, or spread over ranks, writes the very bytes of one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..datasets import KnownFact, load_known
from ..model.facts import Fact, tokenize_fact
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..runs.files import write_npz
from ..runs.ranks import Ranks
from ..runs.settings import settle
from ..sweep import default_max_rows
from .causal import TraceSettings, model_answer, trace_facts
from .corruption import Noise, Sampler, noise_of
from .effects import Effects
from .kinds import KINDS, kinds_of, window_for

logger = logging.getLogger(__name__)

_KEPT = ("window", "samples", "seed", "sever", "compat", "replace", "answer_tokens", "score", "max_rows")


@at_rest
def trace_dataset(
    model: EditableModel,
    facts: str | Path | Iterable[Fact | Mapping[str, Any]],
    out: str | Path,
    kinds: Sequence[str] = tuple(KINDS),
    window: int | None = None,
    samples: int = 10,
    noise: float | str | Sampler = "s3",
    seed: int = 1,
    *,
    sever: str | None = None,
    compat: str | None = None,
    replace: bool = False,
    answer_tokens: int = 1,
    score: str = "probability",
    texts: Sequence[str] | None = None,
    group: int = 8,
    max_rows: int | None = None,
    progress: bool = True,
) -> Effects:
    """Causal tracing over many facts; returns the average effects, also written to `out`.

    facts: a JSON file in the known_1000 format, its records, or `Fact`s. Facts whose attribute is not the model's
        answer (its next `answer_tokens` tokens) are skipped: their file says `correct_prediction = False`.
    out: folder; `cases/knowledge_{known_id}{|_mlp|_attn}.npz`, `settings.json`, `summary.json`. Cases that are there
        are not computed again; a folder made with other settings is refused.
    answer_tokens, score: as in `trace`: a `Fact` with a target is traced for all of that target's tokens, whatever
        `answer_tokens` is; "logit_difference", which needs a second answer for each fact, is refused.
    window, noise: as in `trace`; a rule takes the subjects of all facts ("m" and "t" rules: the embeddings of `texts`).
    group: facts a sweep; part of the settings, since rounding depends on it. max_rows: rows held at once.

    Under `torchrun` every rank traces its share of the groups; all ranks return the effects of the whole.
    """
    known = load_known(facts)
    kinds = kinds_of(kinds)
    if group < 1:
        raise ValueError(f"group is {group}: expected at least 1")
    settings = TraceSettings(
        window_for(model.num_layers, window, kinds),
        samples,
        seed,
        sever,
        compat,
        replace,
        answer_tokens=answer_tokens,
        score=score,
        max_rows=max_rows or default_max_rows(model),
    )
    for item in known:
        _checked(model, item)
    level = noise_of(model, noise, [item.fact.subject for item in known], replace, texts)
    out = Path(out)
    settings = _agree_on_settings(out, settings, model, known, kinds, noise, level, group)
    ranks = Ranks()
    groups = [known[first : first + group] for first in range(0, len(known), group)][ranks.rank :: ranks.size]
    done = tqdm(total=sum(map(len, groups)), desc="tracing", unit="fact", disable=not progress)
    with done:
        for members in groups:
            _trace_group(model, members, out / "cases", kinds, level, settings)
            done.update(len(members))
    ranks.wait()
    if ranks.first:
        for left in (out / "cases").glob(".*.npz.*.tmp"):  # what a killed run was writing
            left.unlink(missing_ok=True)
    effects = Effects.from_cases([case_path(out / "cases", item.known_id, kind) for item in known for kind in kinds])
    if ranks.first:
        effects.save(out / "summary.json")
    return effects


def case_path(cases: Path, known_id: int, kind: str) -> Path:
    return cases / f"knowledge_{known_id}{KINDS[kind].suffix}.npz"


def _checked(model: EditableModel, item: KnownFact) -> None:
    try:
        tokenize_fact(model, item.fact)
    except ValueError as error:
        raise ValueError(f"known_id {item.known_id}: {error}") from error


def _agree_on_settings(
    out: Path,
    settings: TraceSettings,
    model: EditableModel,
    known: Sequence[KnownFact],
    kinds: tuple[str, ...],
    noise: float | str | Sampler,
    level: Noise,
    group: int,
) -> TraceSettings:
    """Write the settings, or check that a folder that is gone on with was made with the same ones."""
    asked = {
        **{k: getattr(settings, k) for k in _KEPT},
        "noise": noise if isinstance(noise, (str, int, float)) else getattr(noise, "__name__", "sampler"),
        "noise_level": None if callable(level.level) else level.level,
        "model": {
            "name": model.name,
            "type": model.modules.model_type,
            "layers": model.num_layers,
            "dtype": str(model.dtype),
        },
        "group": group,
        "known_ids": [item.known_id for item in known],
        "prompts": [item.fact.text for item in known],
    }
    # Rows held at once were chosen by the memory that was free then: go on as begun.
    asked = settle(out, asked, "trace_dataset", adopted=("max_rows",))
    return TraceSettings(**{k: asked[k] for k in _KEPT})


def _trace_group(
    model: EditableModel,
    members: Sequence[KnownFact],
    cases: Path,
    kinds: Sequence[str],
    noise: Noise,
    s: TraceSettings,
) -> None:
    missing = [(item, kind) for item in members for kind in kinds if not case_path(cases, item.known_id, kind).exists()]
    if not missing:
        return
    right = [item for item in members if _predicts(model, item.fact, s.answer_tokens)]
    traces = {}
    if right:
        found = trace_facts(model, [item.fact for item in right], kinds, noise, s)
        traces = {item.known_id: by_kind for item, by_kind in zip(right, found, strict=True)}
    for item, kind in missing:
        path = case_path(cases, item.known_id, kind)
        if item.known_id in traces:
            traces[item.known_id][kind].save(path)
        else:
            logger.info("known_id %d: the model does not say '%s'", item.known_id, item.fact.attribute)
            write_npz(path, {"correct_prediction": np.bool_(False)})


def _predicts(model: EditableModel, fact: Fact, answer_tokens: int) -> bool:
    """Does the model's answer say the attribute? (causal_trace.py:317-320)"""
    if fact.attribute is None:
        return True
    own, _ = model_answer(model, tokenize_fact(model, fact).ids, answer_tokens)
    return model.tokenizer.decode(list(own)).strip() == fact.attribute.strip()
