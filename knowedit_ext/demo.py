"""`knowedit demo`: trace facts in the built-in world, then edit them, and show what changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .datasets import load_known
from .editing.memit import memit
from .editing.params import MEMITParams, ROMEParams
from .editing.request import EditRequest
from .editing.rome import rome
from .facts import encode
from .model import EditableModel, load_model
from .moments import Moments, collect_moments
from .sweep import log_probabilities
from .sweep.capture import clean_runs
from .sweep.packed import PackedPrompts
from .tracing.causal import trace
from .tracing.dataset import trace_dataset
from .tracing.trace import KINDS
from .world import World, load_world

WINDOW = 3  # of the world's 6 layers; the papers take 10 of 48
KEYS_A_WIDTH = 20  # second moments over so many keys for each of their dimensions


def run(out: Path, say: Callable[[str], None], facts: int = 24, edits: int = 100) -> None:
    """Trace `facts` facts; with `edits`, edit three by ROME and so many by MEMIT. Says what was found, fills `out`."""
    world = load_world()
    model = load_model(world.folder, dtype="float32")
    say(f"The built-in world: {len(world.people)} invented people x {len(world.relations)} relations, {model}")
    made = _trace(model, world, out, say, facts)
    if edits:
        made += _edit(model, world, out, say, edits)
    say("\nMade:")
    for path in made:
        say(f"  {path}")


def _trace(model: EditableModel, world: World, out: Path, say: Callable[[str], None], count: int) -> list[Path]:
    one_token = [f for f in world.facts() if len(model.tokenizer.encode(" " + f["attribute"])) == 1]
    records = random.Random(1).sample(one_token, count)
    effects = trace_dataset(model, records, out / "traces", window=WINDOW)
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
        found = trace(model, fact, kind=kind, window=WINDOW)
        made.append(out / f"trace_{kind}.png")
        found.plot(made[-1], title=f"'{fact.text}' →{found.answer}: {kind}")
    return [*made, out / "traces" / "summary.json", out / "traces" / "cases"]


def _edit(model: EditableModel, world: World, out: Path, say: Callable[[str], None], count: int) -> list[Path]:
    records = world.records()[:count]  # each of another person
    moments = _moments(model, world)
    say("\nROME, one fact at a time:")
    for record in records[:3]:
        edit = rome(model, record, ROMEParams.preset("world"), moments)
        with edit.applied(model):
            say(f"  {_sentence(record)} ->{EditRequest.of(record).target_new}")
            after = _share_new(model, [record])
        _table(say, _share_new(model, [record]), after, "    ")
    edit = memit(model, records, MEMITParams.preset("world"), moments, progress=True)
    before = _share_new(model, records)
    with edit.applied(model):
        after = _share_new(model, records)
    say(f"\nMEMIT, {count} facts at once:")
    _table(say, before, after, "  ")
    path = out / "memit.safetensors"
    edit.save(path)
    return [path]


def _moments(model: EditableModel, world: World) -> Moments:
    layers = sorted({*ROMEParams.preset("world").layers, *MEMITParams.preset("world").layers})
    texts = [
        record["prompt"] + " " + record["attribute"] + "." for record in world.facts() + world.held_out(prefix=True)
    ]
    random.Random(3).shuffle(texts)
    width = model.modules.down_projection(0).weight.shape[0]
    return collect_moments(model, texts, layers=layers, max_tokens=KEYS_A_WIDTH * width)


PROMPTS = {"edited prompt": "", "paraphrases": "paraphrase_prompts", "neighbours": "neighborhood_prompts"}


def _share_new(model: EditableModel, records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each sort of prompt the share on which the new target is likelier than the true one."""
    shares = {}
    for name, key in PROMPTS.items():
        cases = [(p, EditRequest.of(r)) for r in records for p in (r[key] if key else [_sentence(r)])]
        new = _mean_logp(model, [(prompt, request.target_new) for prompt, request in cases])
        true = _mean_logp(model, [(prompt, request.target_true) for prompt, request in cases])
        shares[name] = float((new > true).double().mean())
    return shares


@torch.no_grad()
def _mean_logp(model: EditableModel, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Mean token log-probability [pairs] of a target behind a prompt."""
    ids = [(encode(model, prompt)[0], encode(model, prompt + target)[0]) for prompt, target in pairs]
    packed = PackedPrompts(model, clean_runs(model, [whole[:-1] for _, whole in ids]))
    hidden = packed.run(packed.start, 0, model.num_layers)
    places = [(n, t) for n, (prompt, whole) in enumerate(ids) for t in range(len(prompt) - 1, len(whole) - 1)]
    rows = torch.tensor([packed.row(n, t) for n, t in places])
    targets = torch.tensor([ids[n][1][t + 1] for n, t in places])
    logp = log_probabilities(model, model.modules.final_norm(hidden[rows]), targets)
    owner = torch.tensor([n for n, _ in places])
    return torch.zeros(len(ids)).index_add(0, owner, logp) / torch.bincount(owner)


def _sentence(record: dict[str, Any]) -> str:
    rewrite = record["requested_rewrite"]
    return rewrite["prompt"].replace("{}", rewrite["subject"])


def _table(say: Callable[[str], None], before: dict[str, float], after: dict[str, float], indent: str) -> None:
    for name in PROMPTS:
        say(f"{indent}new likelier than true, {name}: {before[name]:.0%} before, {after[name]:.0%} after")
