"""MEMIT where a norm stands behind the MLP, on real records: the table before and after, all edits at once.

    python benchmarks/post_norm.py --model DIR [--records 50] [--layers 4 5 6 7 8] [--clamp .75] [--weight 15000]

DIR: e.g. Gemma 3 270M. A killed run goes on in --work.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from counterfact_statements import collect, read_data
from evaluation import DATA

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact
from knowedit_ext.evaluation.report import side_by_side

KEYS_A_WIDTH = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    parser.add_argument("--clamp", type=float, default=0.75)
    parser.add_argument("--weight", type=float, default=15000.0)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    model = ke.load_model(args.model, dtype="float32")
    records = load_counterfact(DATA / "counterfact_350.json", limit=args.records)
    knowledge = collect(*read_data(DATA))
    texts = [f"{s.prompt()} {s.object}." for s in knowledge.asked] + knowledge.prose
    random.Random(3).shuffle(texts)
    width = model.modules.down_projection(0).weight.shape[1]
    folder = args.work / f"moments_{'_'.join(map(str, args.layers))}"
    moments = ke.collect_moments(model, texts, args.layers, max_tokens=KEYS_A_WIDTH * width, out=folder)
    params = ke.MEMITParams(
        layers=tuple(args.layers),
        v_num_grad_steps=args.steps,
        v_lr=args.lr,
        clamp_norm_factor=args.clamp,
        mom2_update_weight=args.weight,
    )
    edit = ke.memit(model, records, params, moments, progress=True)
    report = ke.evaluate(model, records, edit, generation=False, progress=True)
    print(args, side_by_side({"MEMIT": report}), report.markdown(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
