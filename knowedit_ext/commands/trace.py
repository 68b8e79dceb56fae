"""`knowedit trace`: of one prompt, or of a file of facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import knowedit_ext as ke

from ..datasets import load_known
from ..tracing.kinds import KINDS
from .options import Device, Dtype, load


def trace(
    model: Annotated[
        str, typer.Argument(help='Hub name or folder of a Hugging Face decoder; "world": the built-in one.')
    ],
    prompt: Annotated[str | None, typer.Option(help='Template with one {}, e.g. "{} plays the".')] = None,
    subject: Annotated[str | None, typer.Option(help="What goes into the {}.")] = None,
    target: Annotated[str | None, typer.Option(help="Answer to follow; default: what the model says.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="state, mlp or attn; may be repeated.")] = None,
    facts: Annotated[Path | None, typer.Option(help="JSON file of facts in the known_1000 format.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a data set's cases, summary and figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Heat map of one trace (.png, .pdf, .svg).")] = None,
    save: Annotated[Path | None, typer.Option(help="The trace as .npz.")] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Layers restored together (mlp, attn); default: 10, or half of a shallow model's."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Noise samples.")] = 10,
    noise: Annotated[str, typer.Option(help="A number, or a rule: s3, u0.1.")] = "s3",
    seed: Annotated[int, typer.Option(help="1 reproduces the published noise.")] = 1,
    sever: Annotated[str | None, typer.Option(help="Hold the restored token's mlp or attn outputs corrupted.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N facts.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows held at once; default: from free memory.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Causal tracing: of one prompt, or of a file of facts."""
    if (facts is None) == (prompt is None):
        raise ValueError("give either --prompt and --subject (one fact) or --facts and --out (a data set)")
    common = dict(window=window, samples=samples, noise=_number(noise), seed=seed, sever=sever, max_rows=max_rows)
    if prompt is not None:
        if subject is None:
            raise ValueError("--prompt needs --subject")
        _trace_one(load(model, device, dtype), prompt, subject, target, kind or ["state"], plot, save, common)
    else:
        if out is None:
            raise ValueError("--facts needs --out, a folder for the results")
        if target or plot or save:
            raise ValueError("--target, --plot and --save go with --prompt; --facts writes everything to --out")
        _trace_many(lambda: load(model, device, dtype), facts, out, kind or list(KINDS), limit, common)


def _trace_one(model, prompt, subject, target, kinds, plot, save, common) -> None:
    fact = ke.Fact(prompt, subject, target=target)
    for kind in kinds:
        found = ke.trace(model, fact, kind=kind, **common)
        token, layer = divmod(int(found.scores.argmax()), found.scores.shape[1])
        typer.echo(
            f"{kind}: '{fact.text}' ->{found.answer!r}  clean {found.high_score:.4f}  corrupted {found.low_score:.4f}  "
            f"best restored {found.scores.max():.4f} at token {token} {found.tokens[token]!r}, layer {layer}"
        )
        for path, write in ((plot, found.plot), (save, found.save)):
            if path is not None:
                path = path if len(kinds) == 1 else path.with_stem(f"{path.stem}_{kind}")
                write(path)
                typer.echo(str(path))


def _trace_many(load, facts, out, kinds, limit, common) -> None:
    known = load_known(facts)[:limit]  # before the model: a bad file is said at once
    effects = ke.trace_dataset(load(), known, out, kinds=kinds, **common)
    typer.echo(effects.summary() or "the model predicts none of these facts")
    if effects.kinds:
        typer.echo(effects.table())
        for path, style in ((out / "aie_lines.png", "lines"), (out / "aie_heatmap.png", "heatmap")):
            effects.plot(path, style=style)
            typer.echo(str(path))
    typer.echo(str(out / "summary.json"))


def _number(noise: str) -> float | str:
    try:
        return float(noise)
    except ValueError:
        return noise
