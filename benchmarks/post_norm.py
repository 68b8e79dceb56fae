"""MEMIT where a norm stands behind the MLP, on real records: the table before and after, all edits at once.

    KNOWEDIT_DATA=DIR python benchmarks/post_norm.py --model DIR --work DIR [--weight 150 500] [--out FILE]

--model: e.g. Gemma 3 270M, whose layers and step the defaults are; they were chosen on the first 12 records, which are
skipped (--skip). Moments are of running prose (WikiText-2), which tells nothing of the records. A killed run goes on in
--work. What it said: results/real/memit_gemma3.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from counterfact_statements import PROSE
from evaluation import DATA

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact
from knowedit_ext.editing.contexts import memit_contexts
from knowedit_ext.editing.methods.memit import memit_values
from knowedit_ext.evaluation.report import side_by_side

KEYS_A_WIDTH = 30
SHORTEST = 200  # letters of a paragraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--skip", type=int, default=12)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--clamp", type=float, default=0.75)
    parser.add_argument("--weight", type=float, nargs="+", default=[150.0])
    parser.add_argument("--lr", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a page to write the tables to")
    args = parser.parse_args()
    model = ke.load_model(args.model, dtype="float32")
    records = load_counterfact(DATA / "counterfact_350.json", limit=args.skip + args.records)[args.skip :]
    paragraphs = [line.strip() for line in (DATA / PROSE).read_text(encoding="utf-8").splitlines()]
    texts = [text for text in paragraphs if len(text) >= SHORTEST]
    random.Random(3).shuffle(texts)
    width = model.modules.down_projection(0).weight.shape[1]
    folder = args.work / f"moments_{'_'.join(map(str, args.layers))}"
    moments = ke.collect_moments(model, texts, args.layers, max_tokens=KEYS_A_WIDTH * width, out=folder)
    params = [
        ke.MEMITParams(
            layers=tuple(args.layers),
            v_num_grad_steps=args.steps,
            v_lr=args.lr,
            clamp_norm_factor=args.clamp,
            mom2_update_weight=weight,
        )
        for weight in args.weight
    ]
    contexts = memit_contexts(model, seed=0)
    values = memit_values(model, records, params[0], contexts=contexts, progress=True, store=args.work / "values")
    reports = {}
    for given in params:
        edit = ke.memit(model, records, given, moments, contexts=contexts, values=values)
        changed = {n: edit.delta(n).norm() / model.hf.get_parameter(n).norm() for n in edit.changes}
        print({name: round(float(size), 3) for name, size in changed.items()}, flush=True)
        reports[f"MEMIT, weight {given.mom2_update_weight:g}"] = ke.evaluate(
            model, records, edit, generation=False, baseline=not reports, progress=True
        )
        print(side_by_side(reports), flush=True)
    if args.out is not None:
        given = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        args.out.write_text(f"{given}\n\n{side_by_side(reports)}", encoding="utf-8")


if __name__ == "__main__":
    main()
