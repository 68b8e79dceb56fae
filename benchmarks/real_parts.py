"""The parts of `real.py`: each command of each table and figure of real models, one a line."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = {"FT": "ft", "FT-L": "ft-l", "KN": "kn", "ROME": "rome", "R-ROME": "r-rome", "MEMIT": "memit"}
METHODS |= {"EMMET": "emmet", "PMET": "pmet", "ENCORE": "encore", "AlphaEdit": "alphaedit", "UltraEdit": "ultraedit"}
FIRST = ("MEMIT", "AlphaEdit", "ROME")  # what is worth most is computed first
WITHOUT_MOMENTS = ("ft", "ft-l", "kn", "ultraedit")
# whose values are whose
VALUES = {"rome": "rome", "r-rome": "rome", "pmet": "pmet", "encore": "encore"}
VALUES |= dict.fromkeys(("memit", "emmet", "alphaedit"), "memit")
PRESET = {"memit": "smollm2-135m"}  # of the others there are files; ROME's: its presets, in 5 contexts instead of 21
FILES = {"r-rome": "rome"} | dict.fromkeys(("emmet", "pmet", "encore"), "weight_1000")  # where not by the method's name


@dataclass(frozen=True)
class Part:
    """commands: one a line, `> file` keeps what it prints. kept: what else stays, patterns below --work."""

    about: str
    commands: str
    kept: tuple[str, ...] = ()


def table(records: str, name: str, more: str, published: tuple[str, ...] = ()) -> str:
    """All methods on the same records, side by side; those in `published` by the published rule too, and paired."""
    out = f"{{work}}/{name}"
    start = f"knowedit evaluate {{smollm2}} --data {records} {more} --dtype float32"
    lines = [f"{start} --out {out}/unedited"]
    for row in (*FIRST, *(each for each in METHODS if each not in FIRST)):
        method = METHODS[row]
        moments = "" if method in WITHOUT_MOMENTS else " --moments {work}/moments"
        store = f" --store {{work}}/values/{name}_{VALUES[method]}" if method in VALUES else ""
        params = PRESET.get(method, f"{{here}}/real_params/{FILES.get(method, method)}.json")
        lines.append(f"{start} --method {method} --params {params}{moments} --no-baseline{store} --out {out}/{row}")
        if row in published:
            lines.append(f"{lines[-1]}-published --compat reference")
            lines.append(f"knowedit compare {out}/{row}-published {out}/{row} > {row.lower()}_default.md")
    rows = ["unedited"]
    for row in METHODS:
        rows += [row, f"{row}-published"] if row in published else [row]
    return "\n".join([*lines, f"knowedit report {' '.join(f'{out}/{row}' for row in rows)} > table.md"])


def editor(row: str, method: str) -> str:
    return (
        f"python {{here}}/real_editors.py {{smollm2}} --method {method} --train {{data}}/counterfact-train.json "
        "--texts {data}/wikitext2_test.raw --data {work}/counterfact.json --limit {records} "
        f"--work {{work}}/editors/{method} --out {{work}}/counterfact/{row}"
    )


def defaults(model: str, params: str, moments: str, name: str) -> str:
    """ROME by default and as published, by the same values."""
    given = (
        "" if model == "world" else f" --data {{work}}/counterfact.json --moments {{work}}/{moments} --dtype float32"
    )
    start = f"knowedit evaluate {model}{given} --method rome --params {params} --no-generation --no-baseline"
    start += f" --limit {{records}} --store {{work}}/values/{name} --out {{work}}/{name}"
    return f"""\
{start}_reference --compat reference
{start}
knowedit compare {{work}}/{name}_reference {{work}}/{name} > compared.md"""


def keys(model: str, params: str, moments: str, name: str) -> Part:
    return Part(
        "whose key is on which side of ROME's change; values computed once, in 5 contexts of 21",
        f"python {{here}}/rome_keys.py {model} --data {{work}}/counterfact.json --params {params} --first 300 "
        f"--moments {{work}}/{moments} --value-contexts 4 --rules reference half default --out {{work}}/{name}",
        (f"{name}/rome_keys.md",),
    )  # fmt: skip


def tracing(model: str, facts: int, samples: int, name: str, noise: str = "s3") -> Part:
    return Part(
        f"causal tracing of those of the first {facts} facts that the model knows",
        f"knowedit trace {model} --facts {{data}}/known_1000.json --limit {facts} --noise {noise} --samples {samples} "
        f"--dtype float32 --out {{work}}/{name} > effects.md",
        (f"{name}/summary.json", f"{name}/aie_lines.png", f"{name}/aie_heatmap.png"),
    )


PARTS = {
    "inputs": Part(
        "the real records in one file, and snippets",
        "python {here}/real_inputs.py --data {data} --out {work}",
    ),
    "moments": Part(
        "second moments of the keys, over WikiText-2's test split",
        """\
knowedit moments {smollm2} {data}/wikitext2_test.raw --layers 0-28 --max-tokens 20000 --batch-tokens 2048 \
--dtype float32 --out {work}/moments
knowedit moments {gemma3} {data}/wikitext2_test.raw --layers 3-7 --max-tokens 20000 --batch-tokens 2048 \
--dtype float32 --out {work}/moments_gemma3""",
    ),
    # "s3" of the first 250 facts; more were added to their folder
    "tracing_smollm2": tracing("{smollm2}", 300, 3, "tracing_smollm2", "0.35146594047546387"),
    "estimated_smollm2": Part(
        "effects of all cells, estimated by attribution; their correlation with exact ones",
        "knowedit trace {smollm2} --facts {data}/known_1000.json --limit 300 --method attribution --dtype float32 "
        "--out {work}/attribution_smollm2 > effects.md\n"
        "python {here}/attribution.py --traced {work}/tracing_smollm2 {work}/attribution_smollm2 > agreement.md",
        ("attribution_smollm2/summary.json", "attribution_smollm2/aie_lines.png"),
    ),
    "severed_smollm2": Part(
        "severed paths",
        "knowedit study severed {smollm2} --data {data}/known_1000.json --limit 120 --samples 3 --dtype float32 "
        "--out {work}/severed",
        ("severed/study.md", "severed/study.csv", "severed/severed.png"),
    ),
    "rome_keys_first": Part(
        "whose key is on which side of ROME's change, four rules on the first 20 records, in all 21 contexts",
        "python {here}/rome_keys.py {smollm2} --data {work}/counterfact.json --params smollm2-135m --moments "
        "{work}/moments --limit 20 --rules reference one_key half default --out {work}/rome_keys_first",
        ("rome_keys_first/rome_keys.md",),
    ),
    "rome_keys_smollm2": keys("{smollm2}", "smollm2-135m", "moments", "rome_keys_smollm2"),
    "rome_keys_gemma3": keys("{gemma3}", "gemma-3-270m", "moments_gemma3", "rome_keys_gemma3"),
    "rome_keys_world": Part(
        "whose key is on which side of ROME's change; the world's preset",
        "python {here}/rome_keys.py world --limit 300 --rules reference half default --out {work}/rome_keys_world",
        ("rome_keys_world/rome_keys.md",),
    ),
    "defaults_gemma3": Part(
        "ROME by default and as published, paired; in 5 contexts of 21",
        defaults("{gemma3}", "{here}/real_params/rome.json", "moments_gemma3", "rome_gemma3"),
    ),
    "defaults_world": Part("ROME by default and as published, paired", defaults("world", "world", "", "rome_world")),
    "weights": Part(
        "one parameter of MEMIT, on records that were not looked at before",
        "python {here}/settings.py {smollm2} {here}/real_params/weight_1000.json {here}/real_params/weight_15000.json "
        "{here}/real_params/weight_100.json --data {data}/counterfact_150.json --limit 100 --moments {work}/moments "
        "--out {work}/weights",
        ("weights/settings.md", "weights/settings.json"),
    ),
    "suggest": Part(
        "a search for MEMIT's settings; what it found beside hand-made presets, on records that it did not see",
        """\
knowedit suggest {smollm2} --method memit --data {data}/counterfact_350.json --moments {work}/moments \
--params smollm2-135m --facts {data}/known_1000.json --limit 64 --variants 3 --draws 2 --dtype float32 \
--out {work}/suggest
python {here}/settings.py {smollm2} {work}/suggest/params.json smollm2-135m gpt-j llama-3-8b \
--data {data}/counterfact_150.json --moments {work}/moments --out {work}/settings""",
        (
            "suggest/params.json",
            "suggest/suggest.md",
            "suggest/suggest.csv",
            "suggest/by_layer.png",
            "settings/settings.md",
        ),
    ),
    "memit": Part(
        "MEMIT of 1, 10, 100 and 500 records",
        """\
knowedit study scaling {smollm2} --data {work}/counterfact.json --moments {work}/moments \
--params smollm2-135m --method memit --counts 1,10,100,500 --least 10 --dtype float32 \
--store {work}/values/counterfact_memit --out {work}/scaling
knowedit compare {work}/scaling/cells/unedited-n500-part0-seed0/evaluation \
{work}/scaling/cells/memit-n500-part0-seed0/evaluation > unedited_and_500.md
knowedit compare {work}/scaling/cells/memit-n100-part0-seed0/evaluation \
{work}/scaling/cells/memit-n500-part0-seed0/evaluation > the_first_100_of_100_and_of_500.md""",
        ("scaling/study.md", "scaling/study.csv", "scaling/curves.png"),
    ),
    "counterfact": Part(
        "the papers' CounterFact table; ROME, FT+L and KN by default and as published, paired",
        table("{work}/counterfact.json", "counterfact", "--no-generation --limit {records}", ("ROME", "FT-L", "KN")),
    ),
    "editors": Part(
        "MEND and KE, trained on CounterFact's records of other subjects",
        f"{editor('MEND', 'mend')}\n{editor('KE', 'efk')}\n"
        "knowedit report {work}/counterfact/KE {work}/counterfact/MEND > table.md",
    ),
    "generated": Part(
        "fluency and consistency, of records whose new object WikiText-2 names",
        table("{work}/with_snippets.json", "generated", "--snippets {work}/snippets.json --limit {generated}"),
    ),
    "zsre": Part(
        "the papers' zsRE table",
        table("{data}/zsre_mend_eval_1037.json", "zsre", "--limit {records}"),
    ),
    "tracing_gemma3": tracing("{gemma3}", 120, 3, "tracing_gemma3"),
}
