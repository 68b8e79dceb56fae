"""What nvcc makes of a kernel: registers, spilled bytes, instructions, and those of each loop that holds a shuffle.

    python benchmarks/instructions.py tree_attention sm_90a [ROOT] [--plain]

ROOT: another checkout to read csrc/ of. --plain: without what a model without soft-cap and bias never runs. Needs nvcc
and nvdisasm (PyPI: nvidia-cuda-nvdisasm) on PATH; no GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PLAIN = {"if (!(p.softcap > 0)) return plain;": "return plain;", "return p.bias ?": "return false ?"}
KINDS = ("SHFL", "LDG", "LDG.*128", "FMA", "IMAD|IADD|LEA")


def compiled(root: Path, kernel: str, arch: str, plain: bool, folder: Path) -> tuple[str, str]:
    """(ptxas's report, disassembly)."""
    shutil.copytree(root / "csrc", folder / "csrc")
    if plain:
        tree = folder / "csrc/cuda/tree.cuh"
        text = tree.read_text()
        for there, instead in PLAIN.items():
            if there not in text:
                raise SystemExit(f"{tree.name} has no line '{there}': --plain does not know this version")
            text = text.replace(there, instead)
        tree.write_text(text)
    source, target = folder / f"csrc/cuda/{kernel}.cu", folder / "kernel.cubin"
    command = ["nvcc", f"-arch={arch}", f"-I{folder / 'csrc/include'}", "-std=c++17", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    code = subprocess.run(["nvdisasm", "-c", str(target)], capture_output=True, text=True, check=True).stdout
    return done.stderr, code


def kernels(report: str, code: str) -> list[dict]:
    """One row a kernel: name, registers, spilled bytes, instructions, loops (instructions of each kind)."""
    found = []
    for part in re.split(r"\n(?=\s*\.section\s+\.text\.)", code):
        named = re.match(r"\s*\.section\s+\.text\.(\S+?),", part)
        if named is None:
            continue
        after = report.split(f"Function properties for {named[1]}", 1)[1]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", after.split("Used")[0])))
        lines, labels = [], {}
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(instruction[1])
        loops = []
        for at, line in enumerate(lines):
            back = re.search(r"BRA.*?(\.L_x_\d+)", line)
            body = lines[labels[back[1]] : at + 1] if back else []
            if any("SHFL" in one for one in body):
                counts = {kind: sum(bool(re.search(kind, one)) for one in body) for kind in KINDS}
                loops.append({"all": len(body), **counts})
        name = subprocess.run(["c++filt", named[1]], capture_output=True, text=True).stdout.strip()
        name = re.sub(r"^void |\w+::|\(.*", "", name.replace("(anonymous namespace)::", ""))
        registers = int(re.search(r"Used (\d+) registers", after)[1])
        found.append(dict(name=name, registers=registers, spilled=spilled, instructions=len(lines), loops=loops))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("arch")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = kernels(*compiled(args.root, args.kernel, args.arch, args.plain, Path(folder)))
    for row in sorted(rows, key=lambda row: row["name"]):
        print("{name}: {registers} registers, {spilled} spilled, {instructions} instructions".format(**row))
        for loop in row["loops"]:
            print("    loop of", ", ".join(f"{count} {kind}" for kind, count in loop.items()))


if __name__ == "__main__":
    main()
