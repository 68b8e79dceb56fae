"""`knowedit demo`: trace facts in the built-in world, then edit them, and show what changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from .datasets import load_known
from .editing.methods.memit import MEMITParams, memit
from .editing.methods.rome import ROMEParams, rome_each
from .editing.request import EditRequest
from .evaluation.evaluate import evaluate
from .evaluation.report import Report
from .model.load import EditableModel, load_model
from .model.tokens import encode_part
from .moments import Moments, collect_moments
from .tracing.causal import trace
from .tracing.dataset import trace_dataset
from .tracing.kinds import KINDS
from .world import World, load_world

KEYS_A_WIDTH = 20  # second moments over so many keys for each of their dimensions


def run(out: Path, say: Callable[[str], None], facts: int = 24, edits: int = 100) -> list[Path]:
    """Trace `facts` facts; with `edits`, edit three by ROME and so many by MEMIT. The files made."""
    world = load_world()
    model = load_model("world")
    say(f"The built-in world: {len(world.people)} invented people x {len(world.relations)} relations, {model}")
    made = _trace(model, world, out, say, facts)
    if edits:
        made += _edit(model, world, out, say, edits)
    say("\nMade:")
    for path in made:
        say(f"  {path}")
    return made


def _trace(model: EditableModel, world: World, out: Path, say: Callable[[str], None], count: int) -> list[Path]:
    one_token = [f for f in world.facts() if len(encode_part(model, " " + f["attribute"])) == 1]
    records = random.Random(1).sample(one_token, count)
    effects = trace_dataset(model, records, out / "traces")
    say(f"\nCausal tracing of {count} facts, 10 noise samples each, every token and layer:")
    say(effects.summary())
    say("\nAverage indirect effect (what restoring one place brings back), at the layer where it is largest:")
    say(effects.table())
    layer, effect = effects.kinds["state"].peak("Last subject token")
    say(f"\nThe facts are kept at the last subject token: AIE {effect:.2f} at layer {layer}.")
    made = [out / "aie_lines.png", out / "aie_heatmap.png"]
    effects.plot(made[0], style="lines")
    effects.plot(made[1], style="heatmap")
    fact = load_known(records[:1])[0].fact
    for kind in KINDS:
        traced = trace(model, fact, kind=kind)
        made.append(out / f"trace_{kind}.png")
        traced.plot(made[-1], title=f"'{fact.text}' →{traced.answer}: {kind}")
    return [*made, out / "traces" / "summary.json", out / "traces" / "cases"]


def _edit(model: EditableModel, world: World, out: Path, say: Callable[[str], None], count: int) -> list[Path]:
    records = world.records()[:count]  # each of another person
    moments = _moments(model, world)
    say("\nROME, one fact at a time:")
    edits = rome_each(model, records[:3], ROMEParams.preset("world"), moments)
    for record, edit in zip(records, edits, strict=False):
        request = EditRequest.of(record)
        say(f"  {request.prompt.replace('{}', request.subject)} ->{request.target_new}")
        _table(say, evaluate(model, [record], edit, generation=False), "    ")
    edit = memit(model, records, MEMITParams.preset("world"), moments, progress=True)
    say(f"\nMEMIT, {count} facts at once:")
    _table(say, evaluate(model, records, edit, generation=False), "  ")
    path = out / "memit.safetensors"
    edit.save(path)
    return [path]


def _moments(model: EditableModel, world: World) -> Moments:
    layers = sorted({*ROMEParams.preset("world").layers, *MEMITParams.preset("world").layers})
    width = model.modules.down_projection(0).weight.shape[0]
    return collect_moments(model, world.statements(), layers=layers, max_tokens=KEYS_A_WIDTH * width)


QUESTIONS = {
    "ES": "the new object is likelier than the true one, edited prompt",
    "PS": "the same, paraphrases",
    "NS": "the true object is likelier than the new one, neighbours",
}


def _table(say: Callable[[str], None], report: Report, indent: str) -> None:
    before, after = report.summary("pre"), report.summary("post")
    for name, question in QUESTIONS.items():
        say(f"{indent}{name}, {question}: {before[name].mean:.0f} % before, {after[name].mean:.0f} % after")
