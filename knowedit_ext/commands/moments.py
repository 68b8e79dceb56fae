"""`knowedit moments`: second moments of the keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from .numbers import layers_of
from .options import Device, Dtype, ModelName, choice, folder_to_fill, load, positive, read_by
from .running import say


def moments(
    model: ModelName,
    text: Annotated[
        str, typer.Argument(help="File, folder of files, name of a data set (wikipedia, wikitext), or world.")
    ],
    layers: Annotated[str, read_by(layers_of, "e.g. 13-17, or 3,5,8-10.")],
    out: Annotated[Path, folder_to_fill("Folder for the moments; a run that was killed goes on there.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="No more keys than that.")] = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Only the first N texts.")] = None,
    shuffle: Annotated[
        int | None, typer.Option(min=0, help="Seed to shuffle the texts; 1: the published sample.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 8192,
    stop: Annotated[
        str | None, choice("stop", ("tolerance",), '"tolerance": stop when solutions have settled.')
    ] = None,
    tolerance: Annotated[float, positive("--tolerance", "Relative error of solutions to stop at.")] = 0.1,
    npz: Annotated[Path | None, folder_to_fill("Also write the published .npz files below this folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any] | None:
    """Second moments of the keys that the down projections of LAYERS read; runs under torchrun too."""
    wanted = layers_of(layers)
    from ..moments import export_npz
    from ..moments.corpora import check_name

    check_name(text)
    loaded = load(model, device, dtype)
    common = dict(max_tokens=max_tokens, max_texts=max_texts, shuffle=shuffle, batch_tokens=batch_tokens)
    moments = ke.collect_moments(loaded, text, wanted, out=out, stop=stop, tolerance=tolerance, **common)
    if int(os.environ.get("RANK", 0)):
        return None
    for layer in moments.layers:
        left = "" if moments[layer].missing is None else f", estimated error of solutions {moments[layer].missing:.2g}"
        say(f"layer {layer}: {moments[layer].width} x {moments[layer].width} over {moments[layer].count} keys{left}")
    say(out)
    files = [out]
    if npz is not None:
        dataset = Path(text).stem.partition(":")[0]
        for path in export_npz(moments, npz, loaded, dataset=dataset, sample_size=max_texts):
            say(path)
            files.append(path)
    described = [{"layer": n, "width": moments[n].width, "keys": moments[n].count} for n in moments.layers]
    return {"layers": described, "files": files}
