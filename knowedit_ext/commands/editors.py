"""`knowedit train-editor` and `knowedit convert-editor`: editors by MEND and KE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..documents import read_json
from .numbers import layers_of
from .options import (
    WORLD_DATA,
    Device,
    Dtype,
    Limit,
    ModelName,
    choice,
    data_to_read,
    file_to_read,
    folder_to_fill,
    load,
    read_by,
)
from .running import say


def train_editor(
    model: ModelName,
    data: Annotated[
        Path,
        data_to_read("What to learn by, the last ones for validation: a JSON list of CounterFact records; or texts"),
    ],
    texts: Annotated[
        str, typer.Option(help="Texts that edits should leave alone: a file, a folder, a data set, or world.")
    ],
    out: Annotated[Path, folder_to_fill("Folder for the editor; a training that was killed goes on there.")],
    method: Annotated[str, choice("method", ("mend", "efk"), "mend or efk (KE).")] = "mend",
    layers: Annotated[
        str | None, read_by(layers_of, "Whose MLPs are edited, e.g. 45-47; default: the last three.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of MEND's network.")] = 1920,
    params: Annotated[Path | None, file_to_read("JSON of EditorTrainingParams.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    limit: Limit = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Only the first N texts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the start, and of the order of records.")] = 0,
    compat: Annotated[
        str | None, choice("compat", ("reference",), '"reference": as published, dead rate and all.')
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Train an editor by MEND or KE on records of facts, or on texts."""
    from ..datasets.records import read_records
    from ..moments.corpora import open_corpus

    settings = dict(read_json(params)) if params is not None else {}
    settings |= {"seed": seed} | ({} if iterations is None else {"iterations": iterations})
    chosen = ke.EditorTrainingParams.from_dict(settings)
    records = (read_records(data) if data.suffix == ".json" or data == WORLD_DATA else list(open_corpus(data)))[:limit]
    loc = list(open_corpus(texts, max_texts=max_texts))
    loaded = load(model, device, dtype)
    wanted = None if layers is None else layers_of(layers)
    if method == "mend":
        editor = ke.MEND.new(loaded, wanted, rank, seed)
    else:
        editor = ke.EFK.new(loaded, wanted, seed)
    ke.train_editor(loaded, editor, records, loc, chosen, out, compat, progress=True)
    say(out / "editor.safetensors")
    return {"file": out / "editor.safetensors"}


def convert_editor(
    source: Annotated[Path, typer.Argument(help="A released archive (.pt).")],
    target: Annotated[Path, typer.Argument(help="Where its editor goes (.safetensors).")],
) -> dict[str, Any]:
    """Turn a released MEND or KE archive into a file that ke.MEND.load or ke.EFK.load reads."""
    about = ke.convert_editor(source, target)
    say(f"{about['method']} editor of {about['inner_params']}")
    say(target)
    return {"method": about["method"], "inner_params": about["inner_params"], "file": target}
