"""`knowedit trace`: of one prompt, or of a file of facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import knowedit_ext as ke

from .names import KIND_NAMES
from .numbers import noise_of
from .options import (
    LARGEST_SEED,
    Device,
    Dtype,
    Html,
    Limit,
    MaxRows,
    ModelName,
    choice,
    data_to_read,
    figure_to_write,
    file_to_write,
    folder_to_fill,
    load,
    meaningless,
    read_by,
    template,
)
from .running import say

if TYPE_CHECKING:
    from ..datasets import KnownFact

KNOCKOUT = "knockout"


def trace(
    model: ModelName,
    prompt: Annotated[str | None, template('Template with one {}, e.g. "{} plays the".')] = None,
    subject: Annotated[str | None, typer.Option(help="What goes into the {}.")] = None,
    target: Annotated[str | None, typer.Option(help="Answer to follow; default: what the model says.")] = None,
    kind: Annotated[
        list[str] | None, choice("kind", KIND_NAMES, "state, mlp or attn; may be repeated. Or knockout (one prompt).")
    ] = None,
    facts: Annotated[Path | None, data_to_read("JSON file of facts in the known_1000 format")] = None,
    out: Annotated[Path | None, folder_to_fill("Folder for a data set's cases, summary and figures.")] = None,
    plot: Annotated[Path | None, figure_to_write("Heat map of one trace (.png, .pdf, .svg).")] = None,
    save: Annotated[Path | None, file_to_write("The trace as .npz.")] = None,
    html: Html = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Layers restored together (mlp, attn); default: 10, or half of a shallow model's."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Noise samples.")] = 10,
    noise: Annotated[str, read_by(noise_of, "A number, or a rule: s3, u0.1.")] = "s3",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="1 reproduces the published noise.")] = 1,
    sever: Annotated[
        str | None, choice("sever", ("mlp", "attn"), "Hold the restored token's mlp or attn outputs corrupted.")
    ] = None,
    method: Annotated[
        str, choice("method", ("exact", "attribution"), "exact; or attribution: estimates, many times cheaper.")
    ] = "exact",
    refine: Annotated[int, typer.Option(min=0, help="So many of the strongest estimates exactly.")] = 0,
    limit: Limit = None,
    max_rows: MaxRows = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Causal tracing: of one prompt, or of a file of facts."""
    if (facts is None) == (prompt is None):
        raise ValueError("give either --prompt and --subject (one fact) or --facts and --out (a data set)")
    if prompt is not None:
        meaningless({"--out": out, "--limit": limit}, "they go with --facts")
        if subject is None:
            raise ValueError("--prompt needs --subject")
        if kind == [KNOCKOUT]:
            given = {"--samples": samples != 10, "--noise": noise != "s3", "--seed": seed != 1, "--sever": sever}
            given |= {"--method": method != "exact"}
            meaningless({name: value or None for name, value in given.items()}, "a knockout corrupts nothing")
            meaningless({"--html": html}, "a knockout has no page")
        suffix, what = (".json", "knockout") if kind == [KNOCKOUT] else (".npz", "trace")
        if save is not None and save.suffix != suffix:
            raise ValueError(f"--save {save}: a {what} is saved as {suffix}")
    else:
        if out is None:
            raise ValueError("--facts needs --out, a folder for the results")
        given = {"--subject": subject, "--target": target, "--plot": plot, "--save": save}
        meaningless(given, "they go with --prompt; --facts writes everything to --out")
    from ..datasets import load_known
    from ..tracing.kinds import KINDS, kinds_of
    from ..tracing.settings import TraceSettings

    common = dict(window=window, samples=samples, noise=noise_of(noise), seed=seed, sever=sever)
    common |= dict(max_rows=max_rows, method=method, refine=refine)
    TraceSettings(**{name: value for name, value in common.items() if name != "noise"})  # before the model is loaded
    if facts is not None:
        known, kinds = load_known(facts)[:limit], kinds_of(kind or list(KINDS))
        return _trace_many(load(model, device, dtype), known, out, html, kinds, common)
    fact = ke.Fact(prompt, subject, target=target)
    if kind == [KNOCKOUT]:
        return _knock_out(load(model, device, dtype), fact, window, max_rows, plot, save)
    kinds = kinds_of(kind or ["state"])
    return _trace_one(load(model, device, dtype), fact, kinds, (plot, save), html, common)


def _written(path: Path | None, write: Callable[[Path], object]) -> list[Path]:
    """The file, if one was asked for."""
    if path is None:
        return []
    write(path)
    say(path)
    return [path]


def _trace_one(
    model: ke.EditableModel,
    fact: ke.Fact,
    kinds: Sequence[str],
    paths: tuple[Path | None, Path | None],
    html: Path | None,
    common: dict[str, Any],
) -> dict[str, Any]:
    found, traces = [], []
    for kind in kinds:
        trace = ke.trace(model, fact, kind=kind, **common)
        token, layer = divmod(int(trace.scores.argmax()), trace.scores.shape[1])
        say(
            f"{kind}: '{fact.text}' ->{trace.answer!r}  clean {trace.high_score:.4f}  corrupted {trace.low_score:.4f}  "
            f"best restored {trace.scores.max():.4f} at token {token} {trace.tokens[token]!r}, layer {layer}"
        )
        if trace.refined:
            say(f"  {len(trace.refined)} cells exact; correlation with their estimates {trace.agreement:.3f}")
        files, traces = [], [*traces, trace]
        for path, write in zip(paths, (trace.plot, trace.save), strict=True):
            several = path is not None and len(kinds) > 1
            files += _written(path.with_stem(f"{path.stem}_{kind}") if several else path, write)
        named = ("kind", "answer", "high_score", "low_score", "tokens", "subject_range", "scores")
        best = {"token": token, "layer": layer, "score": float(trace.scores.max())}
        found.append({name: getattr(trace, name) for name in named} | {"best": best, "files": files})
    _written(html, partial(traces[0].to_html, also=traces[1:]))
    return {"prompt": fact.text, "traces": found, "page": html}


def _knock_out(
    model: ke.EditableModel,
    fact: ke.Fact,
    window: int | None,
    max_rows: int | None,
    plot: Path | None,
    save: Path | None,
) -> dict[str, Any]:
    traced = ke.trace(model, fact, KNOCKOUT, window, max_rows=max_rows)
    say(f"{KNOCKOUT}: '{fact.text}' ->{traced.answer!r}  {traced.clean_score:.4f} with all edges")
    for name, scores in traced.scores.items():
        layer = int(scores.argmin())
        say(f"  without {name}: least {scores[layer]:.4f}, {traced.window} layers around {layer}")
    files = _written(plot, traced.plot) + _written(save, traced.save)
    named = ("answer", "clean_score", "window", "scores")
    return {"prompt": fact.text, "kind": KNOCKOUT, **{name: getattr(traced, name) for name in named}, "files": files}


def _trace_many(
    model: ke.EditableModel,
    known: Sequence[KnownFact],
    out: Path,
    html: Path | None,
    kinds: Sequence[str],
    common: dict[str, Any],
) -> dict[str, Any]:
    effects = ke.trace_dataset(model, known, out, kinds=kinds, **common)
    say(effects.summary() or "the model predicts none of these facts")
    if effects.kinds:
        say(effects.table())
        for path, style in ((out / "aie_lines.png", "lines"), (out / "aie_heatmap.png", "heatmap")):
            effects.plot(path, style=style)
            say(path)
        _written(html, effects.to_html)
    say(out / "summary.json")
    return {"effects": effects.to_dict(), "file": out / "summary.json"}
