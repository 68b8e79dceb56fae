"""The `knowedit` command."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Locate and edit facts in language models.", no_args_is_help=True, add_completion=False)
world_app = typer.Typer(help="The built-in world of invented people.", no_args_is_help=True)
app.add_typer(world_app, name="world")

Device = Annotated[str | None, typer.Option(help='Where to run, e.g. "cpu" or "cuda".')]
Dtype = Annotated[str | None, typer.Option(help='e.g. "float32", "bfloat16"; default: as the checkpoint says.')]
Kinds = ("state", "mlp", "attn")


@app.command()
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
    window: Annotated[int, typer.Option(help="Layers restored together (mlp, attn).")] = 10,
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
        _trace_one(_load(model, device, dtype), prompt, subject, target, kind or ["state"], plot, save, common)
    else:
        if out is None:
            raise ValueError("--facts needs --out, a folder for the results")
        if target or plot or save:
            raise ValueError("--target, --plot and --save go with --prompt; --facts writes everything to --out")
        _trace_many(lambda: _load(model, device, dtype), facts, out, kind or list(Kinds), limit, common)


def _trace_one(model, prompt, subject, target, kinds, plot, save, common) -> None:
    import knowedit_ext as ke

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
    import knowedit_ext as ke
    from knowedit_ext.datasets import load_known

    known = load_known(facts)[:limit]  # before the model: a bad file is said at once
    effects = ke.trace_dataset(load(), known, out, kinds=kinds, **common)
    typer.echo(effects.summary() or "the model predicts none of these facts")
    if effects.kinds:
        typer.echo(effects.table())
        for path, style in ((out / "aie_lines.png", "lines"), (out / "aie_heatmap.png", "heatmap")):
            effects.plot(path, style=style)
            typer.echo(str(path))
    typer.echo(str(out / "summary.json"))


@app.command()
def edit(
    model: Annotated[str | None, typer.Argument(help='Hub name or folder; "world": the built-in one.')] = None,
    method: Annotated[str, typer.Option(help="rome (one request), memit, ft or ft-l.")] = "memit",
    requests: Annotated[Path | None, typer.Option(help="JSON list of requests or CounterFact records.")] = None,
    moments: Annotated[Path | None, typer.Option(help="Folder made by `knowedit moments`.")] = None,
    params: Annotated[str, typer.Option(help='A preset, e.g. "gpt2-xl", or a JSON file with the published keys.')] = "",
    out: Annotated[Path | None, typer.Option(help="Where the edit goes (.safetensors).")] = None,
    show: Annotated[Path | None, typer.Option(help="Print what a saved edit holds, and do nothing else.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N requests.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated contexts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compute an edit and save it, or show a saved one."""
    import knowedit_ext as ke

    if show is not None:
        typer.echo(ke.Edit.load(show).summary())
        return
    given = {"MODEL": model, "--requests": requests, "--out": out, "--params": params or None}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing (or give --show FILE)")
    from knowedit_ext.datasets.records import read_records
    from knowedit_ext.evaluation.methods import PARAMS, params_of

    if method not in PARAMS:
        raise ValueError(f"unknown method '{method}': expected one of {', '.join(PARAMS)}")
    found = [ke.EditRequest.of(record) for record in read_records(requests)[:limit]]
    chosen = params_of(method, params)
    stored = None if moments is None else ke.Moments.load(moments)
    loaded = _load(model, device, dtype)
    if method == "rome":
        if len(found) != 1:
            raise ValueError(f"rome edits one fact at a time, '{requests}' has {len(found)}: use --limit 1 or memit")
        made = ke.rome(loaded, found[0], chosen, stored, seed=seed)
    elif method == "memit":
        made = ke.memit(loaded, found, chosen, stored, seed=seed, progress=True)
    else:
        made = ke.finetune(loaded, found, chosen, progress=True)
    made.save(out)
    typer.echo(made.summary())
    typer.echo(str(out))


@app.command()
def moments(
    model: Annotated[
        str, typer.Argument(help='Hub name or folder of a Hugging Face decoder; "world": the built-in one.')
    ],
    text: Annotated[str, typer.Argument(help="File, folder of files, or name of a data set (wikipedia, wikitext).")],
    layers: Annotated[str, typer.Option(help="e.g. 13-17, or 3,5,8-10.")],
    out: Annotated[Path, typer.Option(help="Folder for the moments; a run that was killed goes on there.")],
    max_tokens: Annotated[int | None, typer.Option(help="No more keys than that.")] = None,
    max_texts: Annotated[int | None, typer.Option(help="Only the first N texts.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed to shuffle the texts; 1: the published sample.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a forward pass.")] = 8192,
    stop: Annotated[str | None, typer.Option(help='"tolerance": stop when solutions have settled.')] = None,
    tolerance: Annotated[float, typer.Option(help="Relative error of solutions to stop at.")] = 0.1,
    npz: Annotated[Path | None, typer.Option(help="Also write the published .npz files below this folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Second moments of the keys that the down projections of LAYERS read; runs under torchrun too."""
    import os

    import knowedit_ext as ke
    from knowedit_ext.moments import export_npz

    wanted, loaded = _numbers(layers), _load(model, device, dtype)
    common = dict(max_tokens=max_tokens, max_texts=max_texts, shuffle=shuffle, batch_tokens=batch_tokens)
    found = ke.collect_moments(loaded, text, wanted, out=out, stop=stop, tolerance=tolerance, **common)
    if int(os.environ.get("RANK", 0)):
        return
    for layer in found.layers:
        left = "" if found[layer].missing is None else f", estimated error of solutions {found[layer].missing:.2g}"
        typer.echo(f"layer {layer}: {found[layer].width} x {found[layer].width} over {found[layer].count} keys{left}")
    typer.echo(str(out))
    if npz is not None:
        dataset = Path(text).stem.partition(":")[0]
        for path in export_npz(found, npz, loaded, dataset=dataset, sample_size=max_texts):
            typer.echo(str(path))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help='Hub name or folder; "world": the built-in one.')],
    out: Annotated[Path, typer.Option(help="Folder for cases and report; a run that was killed goes on there.")],
    data: Annotated[
        Path | None,
        typer.Option(help="JSON of CounterFact (also the flat schema) or zsRE; default: the world's facts."),
    ] = None,
    method: Annotated[str, typer.Option(help="none, rome, memit, ft or ft-l.")] = "none",
    params: Annotated[str, typer.Option(help='A preset, e.g. "gpt2-xl", or a JSON file with the published keys.')] = "",
    moments: Annotated[Path | None, typer.Option(help="Folder made by `knowedit moments` (rome, memit).")] = None,
    num_edits: Annotated[int | None, typer.Option(help="Facts edited at once; default: memit all, others 1.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N records.")] = None,
    snippets: Annotated[Path | None, typer.Option(help="attribute_snippets.json, for consistency.")] = None,
    tfidf: Annotated[tuple[Path, Path] | None, typer.Option(help="idf.npy and tfidf_vocab.json.")] = None,
    zsre_target: Annotated[
        str, typer.Option(help='zsRE: edit to the "answer", as published, or to the false "alt", for portability.')
    ] = "answer",
    generation: Annotated[bool, typer.Option(help="Fluency and consistency of generated text.")] = True,
    baseline: Annotated[bool, typer.Option(help="Also measure the unedited model.")] = True,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad records out, and count them.")] = False,
    compat: Annotated[str | None, typer.Option(help='"reference": the published code\'s quirks too.')] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated contexts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Edit facts and measure the edits: the papers' table for one method; runs under torchrun too."""
    from .evaluation.command import run

    choices = dict(method=method, params=params, moments=moments, num_edits=num_edits, seed=seed)
    texts = dict(generation=generation, snippets=snippets, tfidf=tfidf)
    chosen = dict(limit=limit, zsre_target=zsre_target, skip_bad=skip_bad)
    asked = dict(baseline=baseline, compat=compat)
    run(lambda: _load(model, device, dtype), model == "world", data, out, choices, texts, chosen, asked, typer.echo)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders made by `knowedit evaluate`, or published case files.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where the Markdown table goes; default: the terminal.")] = None,
) -> None:
    """Runs side by side, in the papers' column order."""
    import knowedit_ext as ke
    from knowedit_ext.evaluation.report import side_by_side
    from knowedit_ext.runs.files import atomic_write

    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    text = side_by_side({name: ke.Report.load(folder) for name, folder in zip(names, folders, strict=True)})
    if out is None:
        typer.echo(text)
    else:
        atomic_write(out, lambda file: file.write(text.encode()))
        typer.echo(str(out))


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="counterfact, attribute_snippets, idf or tfidf_vocab.")],
    folder: Annotated[Path | None, typer.Option(help="Where it goes; default: the cache.")] = None,
) -> None:
    """Fetch a published data file, check it, and say where it is."""
    from .datasets import download as fetch

    typer.echo(str(fetch(name, folder)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path("demo_out"),
    edits: Annotated[int, typer.Option(help="Facts to edit by MEMIT, after three by ROME; 0: none.")] = 100,
) -> None:
    """Trace facts of the built-in world, show where they are kept, and edit some."""
    from .demo import run

    run(out, typer.echo, edits=edits)


@app.command()
def doctor() -> None:
    """Versions, which native bodies loaded, why one did not, and the way out."""
    from .doctor import report

    typer.echo(report())


@world_app.command("train")
def world_train(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the shipped recipe.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of world and training.")] = 0,
) -> None:
    """Generate the world and train its model on the CPU (the recipe of the shipped checkpoint)."""
    from .world.train import train

    typer.echo(str(train(out, seed=seed, **({} if steps is None else {"steps": steps}))))


def _load(model: str, device: str | None, dtype: str | None):
    import knowedit_ext as ke

    if model == "world":
        from .world import load_world

        return ke.load_model(load_world().folder, device=device, dtype=dtype or "float32")
    return ke.load_model(model, device=device, dtype=dtype)


def _numbers(ranges: str) -> list[int]:
    """Layers of "3,5,8-10": [3, 5, 8, 9, 10]."""
    found: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"'{ranges}' is no list of layers: expected e.g. 13-17, or 3,5,8-10")
        found += range(int(first), int(last or first) + 1)
    return found


def _number(noise: str) -> float | str:
    try:
        return float(noise)
    except ValueError:
        return noise


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr, exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, OSError, NotImplementedError) as error:
        typer.echo(f"knowedit: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's own usage errors
            error.show() if hasattr(error, "show") else typer.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
