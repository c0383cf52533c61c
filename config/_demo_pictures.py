"""The demo in pictures, from what evaluate.py left in out-demo-eval/: `make demo` runs this last.

    python -m config._demo_pictures      # out-demo-eval/edits.svg and, with matplotlib, plot.png

edits.svg: a program as the edit model wrote it, a panel an edit, what is new on green.
plot.png: pass@k over k, a line a model, at temperature 1.
"""
import html
import json
import textwrap
from pathlib import Path
from statistics import mean

import config
import evaluate
import lintseq

RESULTS = Path("out-demo-eval")
LINE, CHARACTER = 17, 7.3  # pixels


class Old(str):
    """A line that was there before an edit."""


def states(edits):
    """The lines of the program after each edit, those that the edit did not put in as Old."""
    lines = []
    for edit in edits:
        lines = list(map(Old, lines))
        lintseq.apply_edit(lines, edit, {"hunks": 0, "malformed": 0})
        yield lines


def draw_edits(instruction, panels):
    """An SVG of a program's states side by side."""
    width = max([300, *(20 + CHARACTER * len(line) for lines in panels for line in lines)])
    title = textwrap.wrap(instruction, int(len(panels) * width / CHARACTER) - 3)
    top = LINE * (len(title) + 1)
    height = top + LINE * (len(panels[-1]) + 2)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * width:.0f}" '
           f'height="{height}" font-family="monospace" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']

    def write(x, line, text, colour="#24292f"):
        svg.append(f'<text x="{x:.0f}" y="{LINE * line}" fill="{colour}" xml:space="preserve">'
                   f"{html.escape(text)}</text>")

    for n, line in enumerate(title, 1):
        write(10, n, line)
    for n, lines in enumerate(panels):
        x = n * width + 10
        write(x, len(title) + 2, f"edit {n + 1}", "#6e7781")
        for at, line in enumerate(lines, len(title) + 3):
            if not isinstance(line, Old):
                svg.append(f'<rect x="{x - 4:.0f}" y="{LINE * at - 12}" width="{width - 8:.0f}" '
                           f'height="{LINE}" fill="#dafbe1"/>')
            write(x, at, line)
    return "\n".join(svg + ["</svg>\n"])


def plot_scores(runs, path):
    """pass@k over k of the runs at a temperature above 0."""
    import matplotlib.pyplot as plt
    for run in runs:
        if run["temperature"]:
            counts = list(run["correct"].values())  # (samples, right ones) of each problem
            ks = range(1, min(n for n, _ in counts) + 1)
            scores = [100 * mean(evaluate.pass_at_k(n, c, k) for n, c in counts) for k in ks]
            plt.plot(ks, scores, marker="o", label=run["model"])
    plt.xlabel("k")
    plt.ylabel("pass@k, %")
    plt.legend()
    plt.savefig(path)


def main():
    problems = [row for _, row in config.read_rows("data/demo-problems.jsonl")]
    samples = [row for _, row in config.read_rows(RESULTS / "out-demo-edits-t0/samples.jsonl")]
    right = [row for row in samples if row["passed"] and 3 <= row["edits"] <= 4]
    row = (right or [max(samples, key=lambda row: row["edits"])])[0]
    panels = list(states(lintseq.split_edits(row["raw"] or ""))) or [[]]
    instruction = {row["task_id"]: row["instruction"] for row in problems}[row["task_id"]]
    (RESULTS / "edits.svg").write_text(draw_edits(instruction, panels), encoding="utf-8")
    plot_scores(json.loads((RESULTS / "results.json").read_text())["runs"], RESULTS / "plot.png")
    print(f"{RESULTS}/edits.svg, {RESULTS}/plot.png")


if __name__ == "__main__":
    config.run(main)
