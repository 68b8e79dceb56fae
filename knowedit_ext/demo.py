"""`knowedit demo`: trace facts in the built-in world and show where they are kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from .datasets import load_known
from .model import load_model
from .tracing.causal import trace
from .tracing.dataset import trace_dataset
from .tracing.trace import KINDS
from .world import load_world

WINDOW = 3  # of the world's 6 layers; the papers take 10 of 48


def run(out: Path, say: Callable[[str], None], facts: int = 24) -> None:
    """Trace `facts` of the world, say what was found, and write cases, figures and a summary to `out`."""
    world = load_world()
    model = load_model(world.folder, dtype="float32")
    say(f"The built-in world: {len(world.people)} invented people x {len(world.relations)} relations, {model}")
    one_token = [f for f in world.facts() if len(model.tokenizer.encode(" " + f["attribute"])) == 1]
    records = random.Random(1).sample(one_token, facts)
    effects = trace_dataset(model, records, out / "traces", window=WINDOW)
    say(f"\nCausal tracing of {facts} facts, 10 noise samples each, every token and layer:")
    say(effects.summary())
    say("\nAverage indirect effect (what restoring one place brings back), at the layer where it is largest:")
    say(effects.table())
    layer, effect = effects.kinds["state"].peak("Last subject token")
    say(f"\nThe facts are kept at the last subject token: AIE {effect:.2f} at layer {layer}.\n")
    made = [out / "aie_lines.png", out / "aie_heatmap.png"]
    effects.plot(made[0], style="lines")
    effects.plot(made[1], style="heatmap")
    fact = load_known(records[:1])[0].fact
    for kind in KINDS:
        found = trace(model, fact, kind=kind, window=WINDOW)
        made.append(out / f"trace_{kind}.png")
        found.plot(made[-1], title=f"'{fact.text}' →{found.answer}: {kind}")
    say("Made:")
    for path in [*made, out / "traces" / "summary.json", out / "traces" / "cases"]:
        say(f"  {path}")
