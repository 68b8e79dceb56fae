"""MEND and KE on a real model: trained on CounterFact's records of other subjects, one edit of each record, scored.

    python benchmarks/real_editors.py MODEL --method mend --train counterfact-train.json --texts wikitext2_test.raw \
        --data counterfact.json --limit 300 --work DIR --out DIR

--texts: running text, of which edits should leave the sentences alone. --out is an evaluation's folder, as `knowedit
report` reads them. What was killed goes on in --work and --out.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from trained_editors import PARAMS, edits_by, of_other_people, trained

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact

WORDS = (8, 30)  # of a sentence that counts as a text


def sentences(text: str) -> list[str]:
    found = (part.strip() for line in text.splitlines() for part in re.split(r"(?<= \.)", line))
    return [each for each in found if WORDS[0] <= len(each.split()) <= WORDS[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=("mend", "efk"), required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = ke.load_model(asked.model, dtype="float32")
    records = load_counterfact(asked.data, limit=asked.limit)
    others = of_other_people(load_counterfact(asked.train), records)
    params = replace(PARAMS, iterations=asked.iterations)
    editor = trained(model, asked.method, others, sentences(asked.texts.read_text()), asked.work, params)
    edits = edits_by(model, editor, records)
    ke.evaluate(model, records, edits, generation=False, baseline=False, out=asked.out, progress=True)


if __name__ == "__main__":
    main()
