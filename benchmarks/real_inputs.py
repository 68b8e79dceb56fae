"""What the tables of real models read: the real records in one file, and texts about their new objects.

    python benchmarks/real_inputs.py --data DIR --out DIR

counterfact.json    counterfact_350.json and counterfact_150.json, in this order
snippets.json       in the layout of attribute_snippets.json, for which it stands: where that has Wikipedia's texts
                    about subjects of which the fact is true ("plays the violin"), this has paragraphs of WikiText-2's
                    test split that name the object ("violin"), at most five an object
with_snippets.json  the records whose object has such a paragraph: those of which consistency (RS) can be measured
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from knowedit_ext.runs.files import write_json

FILES = ("counterfact_350.json", "counterfact_150.json")
MOST, WORDS = 5, 40


def paragraphs(text: str) -> list[tuple[str, str]]:
    """(title of the article, paragraph) of WikiText's raw layout; only paragraphs of so many words."""
    found, title = [], ""
    for line in map(str.strip, text.splitlines()):
        if heading := re.fullmatch(r"= ([^=].*[^=]) =", line):
            title = heading[1].strip()
        elif not line.startswith("=") and len(line.split()) >= WORDS:
            found.append((title, line))
    return found


def snippets(records: list[dict[str, Any]], texts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """An entry for each relation and new object that some paragraph names as a whole word."""
    asked = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        asked[rewrite["relation_id"], rewrite["target_new"]["id"]] = rewrite["target_new"]["str"]
    entries = []
    for (relation, target), name in asked.items():
        whole = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        samples = [{"name": title, "text": text} for title, text in texts if whole.search(text)][:MOST]
        if samples:
            entries.append({"relation_id": relation, "target_id": target, "samples": samples})
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    records = [record for name in FILES for record in json.loads((asked.data / name).read_text())]
    entries = snippets(records, paragraphs((asked.data / "wikitext2_test.raw").read_text()))
    named = {(entry["relation_id"], entry["target_id"]) for entry in entries}
    of = lambda record: (record["requested_rewrite"]["relation_id"], record["requested_rewrite"]["target_new"]["id"])  # noqa: E731
    having = [record for record in records if of(record) in named]
    for name, made in (("counterfact", records), ("snippets", entries), ("with_snippets", having)):
        write_json(asked.out / f"{name}.json", made)
    print(f"{len(records)} records, {len(having)} of them with snippets")


if __name__ == "__main__":
    main()
