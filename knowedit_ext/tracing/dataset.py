"""Trace a data set: one .npz a case and kind, in the published layout; resumable and sharded.

Facts are traced in groups that depend on their order alone, each kind by itself, and a group is computed as a whole, so
that a run that was killed and resumed, spread over ranks, or enlarged, writes the very bytes of one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..checks import Count, typed
from ..datasets import KnownFact, load_known
from ..model.facts import Fact, tokenize_fact
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..runs.checksums import checksum
from ..runs.files import file_name, load_npz, write_npz
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import Growth, marked, settle
from ..sweep import default_max_rows
from .answer import knows
from .causal import plan_facts, trace_plans
from .corruption import Noise, Sampler, noise_of
from .effects import Effects
from .kinds import KINDS, kinds_of, window_for
from .settings import TraceSettings

logger = logging.getLogger(__name__)

_KEPT = ("window", "samples", "seed", "sever", "compat", "replace", "answer_tokens", "score", "max_rows")


@at_rest
@typed
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
    group: Count = 8,
    max_rows: int | None = None,
    method: str = "exact",
    refine: int = 0,
    progress: bool = True,
) -> Effects:
    """Causal tracing over many facts; returns the average effects, also written to `out`.

    facts: a JSON file in the known_1000 format, its records, or `Fact`s. Facts whose attribute is not the model's
        answer (its next `answer_tokens` tokens; with a target of the fact's own as many as the attribute takes) are
        skipped: their file says `correct_prediction = False`.
    out: folder; `cases/knowledge_{known_id}{|_mlp|_attn}.npz`, `settings.json`, `summary.json`. Cases that are there
        are not computed again; a folder that was made with another model (its weights and edits as they are), other
        facts or settings is refused, and so is one that another run is writing to. A run may be enlarged, by kinds and
        by facts at the end of the list: of the cases that are there only those of a last group that was not full are
        computed again. A smaller run is served from the folder (a case's rounding is then that of its larger group),
        which stays as it is. `summary.json` is of all that the folder was asked for.
    answer_tokens, score: as in `trace`: a `Fact` with a target is traced for all of that target's tokens, whatever
        `answer_tokens` is; "logit_difference", which needs a second answer for each fact, is refused.
    window, noise: as in `trace`; a rule takes the subjects of all facts ("m" and "t" rules: the embeddings of `texts`).
        With more facts "s3" is another level: to enlarge such a run give the number. A sampler has to give the same
        noise for the same draws. method, refine: as in `trace`.
    group: facts a sweep; part of the settings, since rounding depends on it. max_rows: rows held at once.

    Under `torchrun` every rank traces its share of the groups; all ranks return the effects of the whole.
    """
    known = load_known(facts)
    kinds = kinds_of(kinds)
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
        method=method,
        refine=refine,
    )
    kept = _KEPT if method == "exact" else (*_KEPT, "method", "refine")
    described = [_describe_fact(model, item) for item in known]
    level = noise_of(model, noise, [item.fact.subject for item in known], replace, texts)
    out, growth = Path(out), Growth("facts", "known_id", sets=("kinds",))
    asked = {
        "run": "trace_dataset",
        **{k: getattr(settings, k) for k in kept},
        "noise": _describe_noise(model, noise, level, texts, settings),
        "model": identity(model),
        "group": group,
        "kinds": list(kinds),
        "facts": described,
    }
    ranks = Ranks()
    with alone(out, ranks):
        # Rows held at once were chosen by the memory that was free then: go on as begun.
        folder_settings = settle(
            out,
            asked,
            ranks,
            adopted=("max_rows", "model.name"),
            growth=growth,
            enlarge=lambda folder_settings: _forget(out / "cases", growth.unfilled(folder_settings)),
            hints={
                "noise.level": lambda there: f"a rule is over the subjects of all known_ids; noise={there!r} keeps it"
            },
        )
        settings = TraceSettings(**{k: folder_settings[k] for k in kept})
        groups = growth.groups(len(known), folder_settings)[ranks.rank :: ranks.size]
        for item in (known[n] for numbers in groups for n in numbers if n < len(known)):
            _check_whole(out / "cases", item, kinds)
        with tqdm(total=sum(map(len, groups)), desc="tracing", unit="fact", disable=not progress) as done:
            for numbers in groups:
                members = known[numbers.start : numbers.stop]
                if _absent(out / "cases", members, kinds):
                    growth.refuse_part(numbers, len(known), folder_settings)
                    _trace_group(model, members, out / "cases", kinds, level, settings)
                done.update(len(members))
        ranks.wait()
        paths = [case_path(out / "cases", item.known_id, kind) for item in known for kind in kinds]
        effects = Effects.from_cases(paths)
        if ranks.first and (len(folder_settings["facts"]), folder_settings["kinds"]) == (len(known), sorted(kinds)):
            effects.save(out / "summary.json")
        ranks.wait()
    return effects


def case_path(cases: Path, known_id: int, kind: str) -> Path:
    return cases / f"knowledge_{file_name(known_id, 'known_id')}{KINDS[kind].suffix}.npz"


def _describe_fact(model: EditableModel, item: KnownFact) -> dict[str, Any]:
    """All that a trace of it depends on; ValueError for a fact that cannot be traced."""
    file_name(item.known_id, "known_id")
    try:
        tokenized = tokenize_fact(model, item.fact)
    except ValueError as error:
        raise ValueError(f"known_id {item.known_id}: {error}") from error
    return {"known_id": item.known_id, **asdict(item.fact), "subject_range": tokenized.subject_range}


def _describe_noise(
    model: EditableModel,
    noise: float | str | Sampler,
    resolved: Noise,
    texts: Sequence[str] | None,
    settings: TraceSettings,
) -> dict[str, Any]:
    """What the noise depends on. A number and a rule that comes to it are the same."""
    if not callable(resolved.level):
        return {"level": resolved.level, "uniform": resolved.uniform}
    if isinstance(noise, str):
        return {"rule": noise, "texts": marked(*texts)}
    shapes = [(settings.samples, 1), (1, 4)]
    draws = [
        [checksum(resolved.draw(np.random.RandomState(settings.seed), *shape, model.hidden_size)) for shape in shapes]
        for _ in range(2)
    ]
    if draws[0] != draws[1]:
        raise ValueError(
            "the sampler gives other noise for the same draws: a run that goes on would mix two. It has to depend on "
            "the draws that it is given alone"
        )
    return {"sampler": marked(*draws[0])}


def _check_whole(cases: Path, item: KnownFact, kinds: Sequence[str]) -> None:
    """ValueError for a case that is damaged, or was altered; before hours are spent on the others."""
    for kind in kinds:
        path = case_path(cases, item.known_id, kind)
        if path.exists():
            load_npz(path, sealed=True)


def _absent(cases: Path, members: Sequence[KnownFact], kinds: Sequence[str]) -> list[tuple[KnownFact, str]]:
    return [(item, kind) for item in members for kind in kinds if not case_path(cases, item.known_id, kind).exists()]


def _forget(cases: Path, known_ids: Sequence[int]) -> None:
    """Remove the cases of a group that was not full: rounding depends on the whole group."""
    for known_id in known_ids:
        for kind in KINDS:
            case_path(cases, known_id, kind).unlink(missing_ok=True)


def _trace_group(
    model: EditableModel,
    members: Sequence[KnownFact],
    cases: Path,
    kinds: Sequence[str],
    noise: Noise,
    s: TraceSettings,
) -> None:
    """Write the cases that are absent. A kind is swept by itself: its rounding does not depend on the others."""
    known = [item for item in members if knows(model, tokenize_fact(model, item.fact), s.answer_tokens)]
    facts = [replace_fields(item.fact, attribute=None) for item in known]
    plans = plan_facts(model, facts, kinds, noise, s) if facts else []
    for kind in kinds:
        absent = [item for item, _ in _absent(cases, members, (kind,))]
        fact_traces = trace_plans(model, plans, (kind,)) if absent and facts else []
        traces = {item.known_id: by_kind[kind] for item, by_kind in zip(known, fact_traces, strict=bool(fact_traces))}
        for item in absent:
            path = case_path(cases, item.known_id, kind)
            if item.known_id in traces:
                traces[item.known_id].save(path)
            else:
                logger.info("known_id %d: the model does not say '%s'", item.known_id, item.fact.attribute)
                write_npz(path, {"correct_prediction": np.bool_(False)})
