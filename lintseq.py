"""A program to a sequence of edits and back: LintSeq and RandSeq (arXiv 2410.02749), and the diff format both ways.

    python lintseq.py some_file.py                                        # one edit sequence of a file, to look at
    python lintseq.py --source=in.jsonl --dest=out.jsonl --samples=5      # instruction data in bulk, on all cores
    torchrun --nproc_per_node=4 lintseq.py config/finetune_150m.py        # or srun: each rank takes its share

LintSeq works backward: while lines of code are left, draw one uniformly, delete it and whatever its deletion breaks
(its indented children; then every line where the linter reports an error, with its children, until it is silent).
What went together is one edit. Forward, the edits are inserted in the opposite order: the first state is empty, the last
is the program, and every state between parses and has no linter error. The linter is pyflakes.

Where this differs from the published generator, and why it is better data: it deletes statements, not lines. A call over
five lines, a triple-quoted text, a decorated `def`, a line continued by a backslash go as a whole (drawn once for each
of their lines), an `else`, `except`, `finally` or `case` clause falls with the `if`, `try` or `match` that it needs, and
a clause or block that is left empty falls with its last statement. Line by line a linter would chew through them too,
but into states whose halves only happen to parse. Blank lines and comments are never drawn (as published): they fall
with the block that they stand in, or come in with the first edit.
"""
import ast
import json
import keyword
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from bisect import bisect
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from heapq import merge
from itertools import chain, groupby, islice
from pathlib import Path

from pyflakes import messages as m
from pyflakes.checker import Builtin, Checker, FunctionScope

import config

DIFF, END = "<|diff|>", "<|endoftext|>"
MAX_LINES = 100_000  # of a program


class Settings:
    source = ""  # JSONL with `instruction` and `response` in each row
    dest = ""  # JSONL with `edit_path`, `index`, `source_instruction`, `source_response`
    samples = 5  # edit sequences a program
    seed = 1337  # of all draws; a row's sequences depend on the seed and the row's number alone
    workers = 0  # processes; 0: one for each core
    method = "lintseq"  # or "randseq": random sets of lines, no linter (the paper's ablation)
    paths = ()  # Python files to show


# -- The linter -------------------------------------------------------------------------------------------------------

ERRORS = (  # what cannot be compiled, or would raise when it is run
    m.UndefinedName, m.UndefinedLocal, m.UndefinedExport, m.DuplicateArgument, m.ReturnOutsideFunction,
    m.YieldOutsideFunction, m.ContinueOutsideLoop, m.BreakOutsideLoop, m.DefaultExceptNotLast, m.TwoStarredExpressions,
    m.TooManyExpressionsInStarredAssignment, m.ForwardAnnotationSyntaxError, m.LateFutureImport,
    m.FutureFeatureNotDefined, m.ImportStarNotPermitted, m.InvalidPrintSyntax, m.RaiseNotImplemented)
# No errors:
#   Unused...                      a program under construction uses its imports and variables later
#   Redefined..., Import...ByLoop  a second definition is legal, and often meant (one for each platform)
#   ImportStarUsed, ...Usage       a name that a star import may or may not define
#   MultiValueRepeatedKey..., IsLiteral, IfTuple, AssertTuple, ...MissingPlaceholders   doubtful, but runs
#   PercentFormat..., StringDotFormat...   whether these raise hangs on values, and no deletion brings one about
#   DoctestSyntaxError             doctests are text
#   ...Lazy...                     Python 3.15's lazy imports, which no published program has yet

# fields of a node that hold no node with a name
LEAVES = {"ctx", "op", "ops", "id", "attr", "arg", "asname", "module", "level", "kind", "conversion", "type_comment"}


def lint(source):
    """Errors of a program: a list of (line, message), empty if it is clean. SyntaxError or ValueError if it does not
    parse."""
    return Linter(ast.parse(source)).errors()


class Linter(Checker):
    """pyflakes' Checker, faster. It leaves out what no error depends on: what is unused or redefined, and where no name
    can come from `typing`, whether each call is one of typing's. It takes the builtins over ready-made. (That a shared
    binding remembers an earlier use has no effect: the one question asked of it is whether that was in the present
    scope.) And after a first run it can judge parts again."""
    ready, handlers = {}, {}

    def __init__(self, tree, typing=True, hidden=()):
        """hidden: functions whose bodies are not looked into."""
        self.typing, self.hidden, self.stacks = typing, hidden, {}
        super().__init__(tree, withDoctest=False)
        self.module = self.deadScopes[-1]

    def errors(self):
        found = [x for x in self.messages if isinstance(x, ERRORS)]
        return [(x.lineno, x.message % x.message_args) for x in sorted(found, key=lambda x: (x.lineno, x.col))]

    def again(self, names, statements, functions):
        """Errors in these statements of the module, without hidden bodies, and in the bodies of these functions, after
        all that bound one of the names has changed; other names are bound as the last run left them."""
        self.messages, self.deadScopes, self.scopeStack = [], [], [self.module]
        self.module._futures_allowed = True  # what is left of those imports was in its place
        for name in names:
            self.module.pop(name, None)
            if name in self.ready:
                self.module[name] = self.ready[name]
        for node in statements:
            self.handleNode(node, self.root)
        for node in functions:
            self.scopeStack = self.stacks[node]
            with self.in_scope(FunctionScope):
                self.handleChildren(node, omit=("decorator_list", "returns", "type_params"))
        self._run_deferred()
        self.deadScopes.append(self.module)
        self.checkDeadScopes()
        return self.errors()

    def LAMBDA(self, node):  # functions, too
        self.stacks[node] = self.scopeStack[:]
        super().LAMBDA(node)
        if node in self.hidden:
            self._deferred.pop()

    @property
    def builtIns(self):  # asked for once, when the module's scope stands
        self.scope.update(self.ready)
        return ()

    @builtIns.setter
    def builtIns(self, names):
        self.ready or self.ready.update({name: Builtin(name) for name in names})

    def checkDeadScopes(self):
        if "__all__" in self.deadScopes[-1]:  # the module's
            super().checkDeadScopes()

    def differentForks(self, lnode, rnode):
        return True  # asked only of what is redefined

    def handleNode(self, node, parent):
        if parent is self.root:  # whether imports from __future__ may still follow
            super().handleNode(node, parent)
        elif node is not None:
            self._parents[node] = parent
            if (kind := node.__class__) not in self.handlers:
                handler = getattr(Linter, kind.__name__.upper(), Checker.handleChildren)
                self.handlers[kind] = Linter.handleChildren if handler is Checker.handleChildren else handler
            self.handlers[kind](self, node)

    def handleChildren(self, tree, omit=()):
        for name in tree._fields:
            if name not in LEAVES and name not in omit:
                field = getattr(tree, name, None)
                if field.__class__ is list:
                    for node in field:
                        if isinstance(node, ast.AST):
                            self.handleNode(node, tree)
                elif isinstance(field, ast.AST):
                    self.handleNode(field, tree)

    def CALL(self, node):
        if self.typing:
            super().CALL(node)
        else:
            self.handleChildren(node)


# -- A program as units, each deleted as a whole ----------------------------------------------------------------------

class Unit:
    """Statements that share their lines, or one clause of a compound statement: its header and the units below it."""

    def __init__(self, parent, nodes, block, keyword="", body=None):
        self.parent, self.alive, self.lines, self.units, self.body = parent, True, [], [], body
        self.nodes, self.block = nodes, block  # the syntax nodes that go when it is deleted, and the list they stand in
        self.keyword = keyword  # of a clause: "main", "elif", "else", "except", "finally", "case"
        self.clauses = ()  # all clauses of the compound statement, the main one first; shared by them
        self.top = parent.top if parent else self  # the (main) unit of the module's statement that it is a part of
        self.function = parent.function if parent else None  # the outermost function that it stands in


BINDERS = {"=", ":=", ":", "import", "for", "as", "del"}  # without one of these a statement binds no name
LEAKS = {"global", "nonlocal"}  # whose names pyflakes binds in the module
SYNTAX = {"=", ":=", ":", "*", *keyword.kwlist}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Program:
    """A parsed source whose units can be deleted, from its lines and from its syntax tree at once, so that the linter
    sees every state without another parse. ValueError or SyntaxError where it cannot be written as edits.

    The linter is asked only about what a deletion can have broken. Names are all that ties statements together, so: of a
    deletion within a function, the function, if a line left in it has a name that was bound in what fell; else the
    module's statements and the functions with such a line. Where a function can change the module's names, a `del`
    takes one back or a star import hides what is missing, it is asked about the module anew, without the bodies of functions that have no such line."""

    def __init__(self, source):
        if "\r" in source.replace("\r\n", ""):
            raise ValueError("a carriage return within a line")
        if DIFF in source or END in source:
            raise ValueError(f"{DIFF} or {END} in the program")
        if source.count("\n") >= MAX_LINES:
            raise ValueError(f"more than {MAX_LINES} lines")
        self.tree = ast.parse(source)
        self.typing = "typing" in source
        self.lines = source.split("\n")
        self.free = [not (text := line.strip()) or text[0] == "#" for line in self.lines]  # blank lines and comments
        self.unit = [None] * len(self.lines)  # the unit that a line falls with; None: it stays to the end
        self.code = []  # the lines that can be drawn
        self.functions = {}  # outermost functions with a block of their own: node: unit
        text = source if source.isascii() else unicodedata.normalize("NFKC", source)
        self.words = [set(WORD.findall(line)) for line in text.split("\n")]
        self.build(self.tree.body, None)
        if not self.code:
            raise ValueError("no line of code")
        self.holders = {}  # word: the lines of statements that have it
        for i, words in enumerate(self.words):
            if self.unit[i]:
                for word in words:
                    self.holders.setdefault(word, []).append(i)
        self.leaks = {self.unit[i].function for word in LEAKS for i in self.holders.get(word, ())}
        self.leaky = bool(self.leaks) or any(not self.unit[i].function for i in self.holders.get("del", ()))
        # what the linter must see: the module anew (else the statements of `tops`, whose `names` changed), the functions
        self.anew, self.names, self.tops, self.touched = True, set(), set(), set(self.functions.values())

    def claim(self, unit, first, last, code=True):
        for i in range(first, last + 1):
            if self.unit[i] is None:
                self.unit[i] = unit
                unit.lines.append(i)
                if code and self.lines[i].strip():
                    self.code.append(i)

    def build(self, block, parent):
        """The units of a list of statements."""
        units, i = [], 0
        while i < len(block):
            node, j = block[i], i + 1
            clauses = self.clauses_of(node)
            if clauses:
                units += self.build_compound(node, clauses, parent, block)
            else:
                last = node.end_lineno
                while j < len(block) and block[j].lineno <= last:  # a; b
                    last = max(last, block[j].end_lineno)
                    j += 1
                unit = Unit(parent, block[i:j], block)
                self.claim(unit, node.lineno - 1, last - 1)
                units.append(unit)
            i = j
        return units

    def clauses_of(self, node):
        """[(keyword, node, its statements)] of a compound statement, an `if` with all its `elif`s; [] of a simple one."""
        if isinstance(node, ast.Match):
            return [("main", node, [])] + [("case", case, case.body) for case in node.cases]
        if not isinstance(getattr(node, "body", None), list):
            return []
        found = [("main", node, node.body)]
        for handler in getattr(node, "handlers", ()):
            found.append(("except", handler, handler.body))
        while isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If) and \
                self.text_at(node.orelse[0]).startswith("elif"):
            node = node.orelse[0]
            found.append(("elif", node, node.body))
        for keyword, field in (("else", "orelse"), ("finally", "finalbody")):
            if getattr(node, field, None):
                found.append((keyword, node, getattr(node, field)))
        return found

    def text_at(self, node):
        return self.lines[node.lineno - 1].encode()[node.col_offset:].decode(errors="replace")

    def build_compound(self, node, clauses, parent, block):
        start = at = first_line(node) - 1
        units = []
        for keyword, owner, body in clauses:
            while self.free[at]:
                at += 1
            unit = Unit(parent, [owner], block, keyword, body)
            unit.top = units[0].top if units else unit.top
            if body:
                first, last = first_line(body[0]) - 1, body[-1].end_lineno - 1
                inline = self.lines[first].encode()[:body[0].col_offset].strip()  # `if x: y` is one unit
                self.claim(unit, at, last if inline else first - 1)
                if not inline:
                    outside = unit.function
                    if not outside and isinstance(node, DEFINITIONS[:2]):
                        unit.function = self.functions[node] = unit
                    unit.units = self.build(body, unit)  # the units below stand in the function, its header does not
                    unit.function = outside
                    self.claim(unit, at, last, code=False)
            else:  # `match x:`
                last = at
                while not self.lines[last + 1].lstrip().startswith("case") or last + 1 < node.subject.end_lineno:
                    last += 1
                self.claim(unit, at, last)
            units.append(unit)
            at = last + 1
        self.claim(units[0], start, at - 1, code=False)  # comments between the clauses
        for unit in units:
            unit.clauses = units
        return units

    def touch(self, unit, gone):
        """Note what the linter must see again now that the lines `gone` fell with the unit."""
        words = set().union(*[self.words[i] for i in gone])
        # its fall may change the verdict on others, too: an `except` (of a NameError), and within a function what has
        # scopes of its own that are run at once, for there the linter reports a local used before its assignment only
        # if no such scope has used it since
        wide = words & LEAKS or unit.clauses and words & {"except", "case"} or unit.function and words & {"for", "class"}
        names = words - SYNTAX if wide else self.bound(unit, words)
        within = unit.function if unit.function not in self.leaks else None  # nothing else can be touched
        if not within:
            self.names |= names
        for name in names:
            for i in self.holders.get(name, ()):
                holder = self.unit[i]
                if holder.alive and (not within or holder.function is within):
                    self.see(holder)
        if wide:
            self.see(unit)
        if "__future__" in words or {"import", "*"} <= words:
            self.anew = True
            self.touched.update(self.functions.values())

    def see(self, unit):
        if unit.function:
            self.touched.add(unit.function)
        else:
            self.tops.add(unit.top)

    def bound(self, unit, words):
        """The names that a unit has bound."""
        node, found = unit.nodes[0], set()
        if isinstance(node, DEFINITIONS) and ":=" not in words and not unit.function:
            return {node.name}  # what is bound within stays within
        if words.isdisjoint(BINDERS):
            return found
        rest = unit.body if unit.keyword in ("else", "finally") else []  # no longer a part of their statement's node
        for top in unit.nodes + rest:
            for n in ast.walk(top):
                if isinstance(n, ast.Name):
                    if not isinstance(n.ctx, ast.Load):
                        found.add(n.id)
                elif isinstance(n, ast.alias):
                    found.add((n.asname or n.name).split(".")[0])
                elif isinstance(n, DEFINITIONS):
                    found.add(n.name)
        return found

    def errors(self):
        """What the linter reports on the parts of the present state that it must see."""
        names, touched = self.names, {f for f in self.touched if f.alive}
        tops = sorted((top for top in self.tops if top.alive), key=lambda top: top.lines[0])
        self.names, self.tops, self.touched = set(), set(), set()
        if self.anew or self.leaky or self.linter.module.importStarred:
            self.anew = False
            shown = {f.nodes[0] for f in touched | self.leaks if f}
            self.linter = Linter(self.tree, self.typing, self.functions.keys() - shown)
            self.linter.hidden = self.functions
            return self.linter.errors()
        return self.linter.again(names, [node for top in tops for node in top.nodes], [f.nodes[0] for f in touched])

    def delete(self, unit):
        """Delete a unit, what stands below it and what cannot stand without it; returns the lines that fell."""
        gone = []
        self.remove(unit, gone)
        self.touch(unit, gone)
        if unit.parent and unit.parent.alive and not any(u.alive for u in unit.parent.units):
            gone += self.delete(unit.parent)
        return gone

    def remove(self, unit, gone):
        fall(unit, gone)
        if unit.clauses:
            main, *others = unit.clauses
            node, alive = main.nodes[0], {u.keyword for u in others if u.alive}
            if isinstance(node, ast.Match):
                stands = "case" in alive
            elif hasattr(node, "handlers"):
                stands = "except" in alive or "finally" in alive
            else:
                stands = True
            if stands and main.alive:
                if "else" in alive and hasattr(node, "handlers") and "except" not in alive:  # try, else, finally
                    fall(next(u for u in others if u.keyword == "else"), gone)
                relink(unit.clauses)
            else:
                for u in unit.clauses:
                    fall(u, gone)
                main.block.remove(node)
        else:
            for node in unit.nodes:
                unit.block.remove(node)

    def delete_errors(self):
        """Delete every line where the linter reports an error until it reports none; returns the lines that fell."""
        gone = []
        while self.anew or self.tops or self.touched:
            for line, message in self.errors():
                unit = self.unit[line - 1]
                if unit is None:
                    raise ValueError(f"line {line}: {message}, on no statement")
                if unit.alive:
                    gone += self.delete(unit)
                self.see(unit)  # for the linter may report only one of several uses
        return gone


def first_line(node):
    return min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", ())])


def fall(unit, gone):
    if unit.alive:
        unit.alive = False
        gone += unit.lines
        for below in unit.units:
            fall(below, gone)


def relink(clauses):
    """Take the clauses that fell out of the syntax tree of a statement that stands."""
    node = last = clauses[0].nodes[0]
    alive = [u for u in clauses if u.alive]
    bodies = {u.keyword: u.body for u in alive}
    for u in alive:
        if u.keyword == "elif":
            last.orelse, last = u.nodes, u.nodes[0]
    if isinstance(node, ast.Match):
        node.cases = [u.nodes[0] for u in alive if u.keyword == "case"]
    elif hasattr(node, "orelse"):
        last.orelse = bodies.get("else", [])
    if hasattr(node, "handlers"):
        node.handlers = [u.nodes[0] for u in alive if u.keyword == "except"]
        node.finalbody = bodies.get("finally", [])


# -- Edits ------------------------------------------------------------------------------------------------------------

def lintseq(source, rng):
    """One sequence of edits of a program, each as diff text, in the order of writing. rng: random.Random.

    Lines with errors that the program has from the start fall with the first line drawn, so they come in with the last
    edit (as published). ValueError, SyntaxError or RecursionError, with the reason, where this cannot be done."""
    return sequence(source, lambda program, left: program.delete(program.unit[rng.choice(left)]) + program.delete_errors())


def randseq(source, rng):
    """The paper's ablation: each edit is a random set of the lines of code that are left, whatever a linter says."""
    return sequence(source, lambda program, left: rng.sample(left, rng.randint(1, len(left))))


def sequence(source, fall):
    """Let lines fall, of those left, until none is; the edits that bring them back."""
    program = Program(source)
    death, step, left = [0] * len(program.lines), 0, program.code
    while left:
        step += 1
        for i in fall(program, left):
            death[i] = step
        left = [i for i in left if not death[i]]
    return edits(program.lines, [d or step for d in death])  # what never fell comes in with the first edit


def edits(lines, death):
    """Diff text from each state to the next; the lines of death `max(death)` are the first edit."""
    by_step = {}
    for i, d in enumerate(death):
        by_step.setdefault(d, []).append(i)
    present, texts = [], []
    for step in sorted(by_step, reverse=True):
        hunks = []  # [lines before it in the old state, in the new state, numbers of the lines]
        for n, i in enumerate(by_step[step]):
            before = bisect(present, i)
            if hunks and hunks[-1][0] == before:
                hunks[-1][2].append(i)
            else:
                hunks.append((before, before + n, [i]))
        for before, after, new in reversed(hunks):
            present[before:before] = new
        texts.append("\n".join(
            f"@@ -{before},0 +{after + 1}{f',{len(new)}' if len(new) > 1 else ''} @@" + "".join("\n+" + lines[i] for i in new)
            for before, after, new in hunks))
    return texts


def training_text(instruction, edit_path):
    """(prompt, response) of an example, as published: each edit behind a marker of its own, two bare markers at the
    end, end-of-text; the loss is on the response. With no edits, the prompt is what a model is asked with."""
    return f"{instruction}\n{DIFF}", f"\n{DIFF}".join(edit_path) + f"\n{DIFF}\n{DIFF}{END}"


WORD = re.compile(r"\w+|:=|[=:*]")
HEADER = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")


def apply_edit(lines, text, report):
    """Apply one edit to a list of lines, in place; count into report["hunks"] and report["malformed"].

    A hunk whose header is broken or names a place outside the program, or that is to make a program of MAX_LINES lines
    still longer, is left out (so that no hunk costs more than moving so many: linear in the text). One whose counts do
    not fit its lines is applied as it stands: it is the lines that a model means. Both are malformed, and so is a hunk
    with any line in it that is no insertion (or deletion or context that fits; the format has none, some models do)."""
    shift = 0  # how far the hunks before have moved the rest
    for hunk in re.split("^(?=@@)", text + "\n", flags=re.M):
        if not hunk:  # before the first header
            continue
        first, *body = hunk[:-1].split("\n")
        report["hunks"] += first.startswith("@@")
        match = HEADER.fullmatch(first)
        minus, plus = (int(match[2] or 1), int(match[4] or 1)) if match else (0, 0)
        at = int(match[1]) - (minus > 0) + shift if match else -1
        if not 0 <= at <= len(lines) <= MAX_LINES - len(body):
            report["malformed"] += 1
            continue
        old = lines[at:at + sum(line[:1] in ("-", " ") for line in body)]
        new, n, sound = [], 0, True
        for line in body:
            if line.startswith("+"):
                new.append(line[1:])
            elif line[:1] in ("-", " ") and n < len(old) and old[n] == line[1:]:
                n += 1
                new += [line[1:]] * (line[0] == " ")
            else:
                sound = False
        lines[at:at + n] = new
        shift += len(new) - n
        report["malformed"] += not sound or (n, len(new)) != (minus, plus)


def split_edits(text):
    """The edits of what a model wrote after its instruction: cut at the markers, each without the newline before the
    next one; empty ones, as at the end, left out."""
    pieces = text.split(END)[0].split(DIFF)
    return [e for piece in pieces if (e := piece[:-1] if piece.endswith("\n") else piece)]


def apply_and_count(text):
    """(program, {"edits", "hunks", "malformed"}) of what a model wrote after its instruction. Never raises."""
    lines, report = [], {"edits": 0, "hunks": 0, "malformed": 0}
    for edit in split_edits(text):
        apply_edit(lines, edit, report)
        report["edits"] += 1
    return "\n".join(lines), report


def apply_edits(text):
    """The program that a model wrote as edits after its instruction. Never raises; what is malformed is left out."""
    return apply_and_count(text)[0]


# -- In bulk ----------------------------------------------------------------------------------------------------------

def die(message):
    print(f"lintseq.py: {message}", file=sys.stderr)
    raise SystemExit(1)


METHODS = {"lintseq": lintseq, "randseq": randseq}


def rows_of(index, line, cfg):
    """([row of the output], [its edits' numbers of lines], "", or both empty and why) of row `index` of the source."""
    try:
        row = json.loads(line)
        instruction, response = row["instruction"], row["response"]
        if DIFF in instruction or END in instruction:
            return [], [], f"{DIFF} or {END} in the instruction"
    except (ValueError, KeyError, TypeError) as e:
        return [], [], f"no JSON with texts `instruction` and `response`: {type(e).__name__}: {e}"
    paths = []
    try:
        for sample in range(cfg.samples):
            for attempt in range(5):  # a repeated sequence is drawn again, a few times: short programs have only a few
                path = METHODS[cfg.method](response, random.Random(f"{cfg.seed}/{index}/{sample}/{attempt}"))
                if path not in paths:
                    break
            paths.append(path)
    except SyntaxError as e:
        return [], [], f"does not parse: line {e.lineno}: {e.msg}"
    except Exception as e:  # too deep for the parser (RecursionError, MemoryError); whatever it is, the next row can do
        return [], [], str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
    return [json.dumps({"edit_path": path, "index": index, "source_instruction": instruction,
                        "source_response": response}) + "\n" for path in paths], [sizes(path) for path in paths], ""


def sizes(path):
    return [edit.count("\n+") for edit in path]


def work(jobs, cfg):
    warnings.simplefilter("ignore")  # what the parser says of others' escape sequences is no news
    return [(index, *rows_of(index, line, cfg)) for index, line in jobs]


def attend(parent):
    """In a worker: leave Ctrl-C to the parent, and end when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_parallel(jobs, cfg):
    """What `work` returns of each job, in their order; at most 16 batches for each worker are under way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cfg.workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    pool, pending = ProcessPoolExecutor(workers, initializer=attend, initargs=(os.getpid(),)), deque()
    try:
        while True:
            while len(pending) < 16 * workers and (batch := list(islice(jobs, 8))):
                pending.append(pool.submit(work, batch, cfg))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def whole_rows(path):
    """(index, file, end of the row, the row) of each row of a JSONL file, up to the first that is broken."""
    path.touch()
    with open(path, "rb") as f:
        for line in f:
            try:
                row = json.loads(line)
                yield row["index"], path, f.tell(), row
            except (ValueError, KeyError, TypeError):
                return


def resume(dest, skipped, mine, samples, count):
    """Go through the programs of both files in order; cut both back to those before the first that is missing or not
    whole. Returns how many of `mine`, the indices of the source, are done."""
    ends, done = {dest: 0, skipped: 0}, 0
    groups = groupby(merge(whole_rows(dest), whole_rows(skipped), key=lambda row: row[0]), key=lambda row: row[0])
    for index, (found, group) in zip(mine, groups):
        _, files, at, rows = zip(*group)
        if found != index or files not in ((skipped,), (dest,) * samples):
            break
        ends[files[0]] = at[-1]
        count([sizes(row["edit_path"]) for row in rows if "edit_path" in row], rows[0].get("reason", ""))
        done += 1
    for file, end in ends.items():
        os.truncate(file, end)
    return done


def quantile(table, q):
    """Of numbers in a Counter."""
    left = q * sum(table.values())
    for value in sorted(table):
        left -= table[value]
        if left < 0:
            return value


def bulk(cfg):
    from tqdm import tqdm
    source, begun = Path(cfg.source), time.time()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dest = Path(cfg.dest + (f".{rank}-of-{world}" if world > 1 else ""))  # `cat` them together
    skipped, state = dest.with_name(dest.name + ".skipped.jsonl"), dest.with_name(dest.name + ".state.json")
    if not source.is_file():
        die(f"--source={source}: no such file")
    if dest.exists() and source.samefile(dest):
        die(f"--dest={dest} is the source itself")
    if cfg.samples < 1 or cfg.workers < 0:
        die("--samples must be 1 or more, --workers 0 (all cores) or more")
    now = {"source": str(source), "bytes": source.stat().st_size, "samples": cfg.samples, "seed": cfg.seed,
           "method": cfg.method}
    try:
        was = json.loads(state.read_text()) if state.is_file() else None
    except ValueError:
        was = "broken"
    if was != now if was else dest.exists():
        die(f"{dest} is of other settings ({state.name}: {was or 'missing'}); choose another --dest, or delete both")
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = state.with_name(state.name + ".tmp")
    temporary.write_text(json.dumps(now))
    temporary.replace(state)
    with open(source, "rb") as f:
        mine = range(rank, sum(1 for _ in f), world)
    programs, lengths, lines, reasons = 0, Counter(), Counter(), Counter()

    def count(paths, reason):
        nonlocal programs
        programs += bool(paths)
        lengths.update(map(len, paths))
        lines.update(chain.from_iterable(paths))
        reasons.update([reason.split(":")[0]] * bool(reason))

    done = resume(dest, skipped, mine, cfg.samples, count)
    print(f"{cfg.method}: {source} -> {dest}, {cfg.samples} edit sequences a program"
          + (f", {done:,} of {len(mine):,} done before" if done else ""))
    tqdm.monitor_interval = 0  # no thread of its own, for the workers are forked
    with open(source, "rb") as f, open(dest, "a") as out, open(skipped, "a") as bad, \
            tqdm(total=len(mine), initial=done, unit=" programs", mininterval=1) as bar:
        jobs = ((i, line) for i, line in enumerate(f) if i >= done * world and i % world == rank)
        for index, rows, paths, reason in in_parallel(jobs, cfg):
            file, text = (out, "".join(rows)) if rows else (bad, json.dumps({"index": index, "reason": reason}) + "\n")
            file.write(text)
            file.flush()  # before a row of the other file is written: resume counts on the order
            count(paths, reason)
            bar.update()
    print(f"lintseq.py: {programs:,} programs, {time.time() - begun:.1f} s; {dest}")
    for what, table in (("edits a program", lengths), ("lines an edit", lines)):
        if table:
            print(f"  {what}: median {quantile(table, 0.5)}, 90th percentile {quantile(table, 0.9)}")
    for reason, n in reasons.most_common():
        print(f"  skipped {n:,}: {reason}")


def show(path, cfg):
    """Print one edit sequence of a file, each edit's lines (green on a terminal) within the program so far."""
    try:
        path = Path(path)
        sequence = METHODS[cfg.method](path.read_bytes().decode(), random.Random(cfg.seed))
    except (OSError, ValueError, SyntaxError, RecursionError) as e:
        die(f"{path}: {e}")
    colour = sys.stdout.isatty()
    green, dim, plain = ("\033[32m", "\033[2m", "\033[0m") if colour else ("", "", "")
    lines = []
    for n, edit in enumerate(sequence, 1):
        new, report = set(), {"hunks": 0, "malformed": 0}
        apply_edit(lines, edit, report)
        for start, count in re.findall(r"^@@ -\d+,0 \+(\d+)(?:,(\d+))? @@$", edit, re.M):
            new.update(range(int(start) - 1, int(start) - 1 + int(count or 1)))
        print(f"{dim}--- edit {n} of {len(sequence)}: {len(new)} lines{plain}")
        for i, line in enumerate(lines):
            if any(j in new for j in range(i - 2, i + 3)):  # two lines of context
                print(f"{green}+ {line}{plain}" if i in new else f"{dim}  {line}{plain}")


def main():
    cfg = config.load(Settings)
    warnings.simplefilter("ignore", SyntaxWarning)  # what the parser says of others' escape sequences is no news
    warnings.simplefilter("ignore", DeprecationWarning)
    if cfg.method not in METHODS:
        die(f"--method={cfg.method} is neither {' nor '.join(METHODS)}")
    if cfg.paths:
        for path in cfg.paths:
            show(path, cfg)
    elif cfg.source and cfg.dest:
        try:
            bulk(cfg)
        except OSError as e:  # a full disk, no right to write
            die(f"{e.filename or cfg.dest}: {e.strerror}; no row is lost, and the same command goes on")
        except BrokenProcessPool:
            die("a worker was killed, perhaps for want of memory; the same command, with fewer --workers, goes on")
        except KeyboardInterrupt:
            die("stopped; the same command goes on")
    else:
        die("name a Python file to show, or --source=in.jsonl and --dest=out.jsonl")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
