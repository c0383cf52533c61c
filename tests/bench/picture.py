"""A picture of a program as a model writes it, edit by edit: an SVG for the README.

    python tests/bench/picture.py out-demo-edits > tests/bench/results/edits.svg

--problem=N takes the N-th problem of --benchmark (0). Each panel is the program after an edit, with
the lines that the edit put in on green.
"""
import argparse
import html
import sys
import textwrap
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import config  # noqa: E402
import lintseq  # noqa: E402
import sample  # noqa: E402

COLUMNS, LINE, CHARACTER = 3, 17, 7.3  # panels in a row; pixels


class Old(str):
    """A line that was there before an edit."""


def states(edits):
    """(lines of the program, numbers of those that are new) after each edit."""
    lines = []
    for edit in edits:
        lines = list(map(Old, lines))
        lintseq.apply_edit(lines, edit, {"hunks": 0, "malformed": 0})
        yield lines, {i for i, line in enumerate(lines) if not isinstance(line, Old)}


def draw(title, panels):
    """The SVG's text."""
    width = 30 + CHARACTER * max(len(line) for lines, _ in panels for line in lines)
    height = LINE * (max(len(lines) for lines, _ in panels) + 2)
    title = textwrap.wrap(title, int(min(COLUMNS, len(panels)) * width / CHARACTER) - 2)
    top = LINE * (len(title) + 1)
    rows = -(-len(panels) // COLUMNS)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * min(COLUMNS, len(panels)):.0f}"'
           f' height="{top + rows * height:.0f}" font-family="monospace" font-size="12">',
           '<rect width="100%" height="100%" fill="#ffffff"/>']

    def text(x, y, line, colour="#24292f"):
        svg.append(f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" xml:space="preserve">'
                   f"{html.escape(line)}</text>")

    for i, line in enumerate(title):
        text(10, LINE * (i + 1), line)
    for n, (lines, new) in enumerate(panels):
        x, y = n % COLUMNS * width + 10, top + n // COLUMNS * height
        text(x, y + LINE, f"edit {n + 1}", "#6e7781")
        for i, line in enumerate(lines):
            if i in new:
                svg.append(f'<rect x="{x - 4:.0f}" y="{y + LINE * (i + 1) + 5:.0f}" '
                           f'width="{width - 14:.0f}" height="{LINE}" fill="#dafbe1"/>')
            text(x, y + LINE * (i + 2), line)
    return "\n".join(svg + ["</svg>"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder with ckpt.pt")
    parser.add_argument("--benchmark", default="data/demo-problems.jsonl")
    parser.add_argument("--problem", type=int, default=0)
    args = parser.parse_args()
    prompt = [row for _, row in config.read_rows(args.benchmark)][args.problem]["instruction"]
    model, enc, info = sample.load_model(args.model)
    raw, = sample.complete(model, enc, info["form"], [prompt], max_new_tokens=512, temperature=0.0,
                           top_p=1.0, seeds=[0], edit_retries=2)
    print(draw(prompt, list(states(lintseq.split_edits(raw)))))


if __name__ == "__main__":
    config.run(main)
