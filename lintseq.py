"""A program to a sequence of edits and back: LintSeq and RandSeq (arXiv 2410.02749), and the diff
format both ways.

    python lintseq.py some_file.py                                    # one edit sequence of a file
    python lintseq.py --source=in.jsonl --dest=out.jsonl --samples=5  # instruction data, all cores
    torchrun --nproc_per_node=4 lintseq.py config/finetune_150m.py    # or srun: each rank its share
    cat data/edits.jsonl.*-of-4 > data/edits.jsonl                    # ranks write a file each

LintSeq works backward: while lines of code are left, draw one uniformly, delete it and whatever its
deletion breaks (its indented children; then every line where the linter, pyflakes, reports an
error, until it is silent). What went together is one edit. Forward, the edits are inserted in the
opposite order: the first state is empty, the last is the program, and every state between parses
and has no linter error.

Here no linter looks at the states, for two things alone can break when a line is deleted. A block
loses its header, or a header its block: the syntax tree tells. Or a name loses what binds it: one
pass of pyflakes over the whole program finds, for each use of a name, the statements any one of
which satisfies it. So the program is a graph of what needs what, and a line's fall takes along what
needs it, and what needs that. This closure is what deleting and linting in turn arrive at, for a
use is reported in a state just when the last statement that satisfies it has fallen. In rare cases
the graph is stricter than pyflakes: a name that a function binds is not looked for outside of it
(nor by Python); a `try` falls with its handler of NameError; what binds a name falls with its
`del`; what binds a name in ways of several meanings (from typing and from elsewhere, if only from
typing_extensions) comes in with the last edit. The tests look for cases in which it is looser.
Drawing the next sequence of the same program costs no new pass.

Where this differs from the published generator, and why it is better data: it deletes statements,
not lines. A call over five lines, a triple-quoted text, a decorated `def`, a line continued by a
backslash go as a whole (drawn once for each of their lines), an `else`, `except`, `finally` or
`case` clause falls with the `if`, `try` or `match` that it needs, and a clause or block that is
left empty falls with its last statement. Blank lines and comments are never drawn (as published):
they fall with the block that they stand in, or come in with the first edit.
"""
import ast
import json
import random
import re
import warnings
import zlib
from bisect import bisect, insort
from collections import Counter, defaultdict
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from pyflakes import checker, messages
from pyflakes.checker import Checker, ClassScope, ComprehensionScope, ExportBinding, FunctionScope

import config

DIFF, EOT = "<|diff|>", "<|endoftext|>"
MAX_LINES = 100_000  # of a program


class Settings:
    source = ""  # .jsonl, .jsonl.gz or .parquet with `instruction` and `response` in each row
    dest = ""  # JSONL with `edit_path`, `index`, `source_instruction`, `source_response`
    samples: (1,) = 5  # edit sequences a program
    seed = 1337  # of all draws; a row's sequences depend on it and on the row's number alone
    workers = 0  # processes; 0: one for each core
    method: Literal["lintseq", "randseq"] = "lintseq"  # randseq: random lines, the ablation
    paths = ()  # Python files to show


# What cannot be compiled, or would raise when it is run
ERRORS = tuple(getattr(messages, name) for name in """
    UndefinedName UndefinedLocal UndefinedExport DuplicateArgument ReturnOutsideFunction
    YieldOutsideFunction ContinueOutsideLoop BreakOutsideLoop DefaultExceptNotLast
    TwoStarredExpressions TooManyExpressionsInStarredAssignment ForwardAnnotationSyntaxError
    LateFutureImport FutureFeatureNotDefined ImportStarNotPermitted InvalidPrintSyntax
    RaiseNotImplemented""".split())
# No errors:
#   Unused...                      a program under construction uses its imports and variables later
#   Redefined..., Import...ByLoop  a second definition is legal, and often meant
#   ImportStarUsed, ...Usage       a name that a star import may or may not define
#   MultiValueRepeatedKey..., IsLiteral, IfTuple, AssertTuple, ...MissingPlaceholders
#                                  doubtful, but runs
#   PercentFormat..., StringDotFormat...
#                                  whether these raise hangs on values, and no deletion causes one
#   DoctestSyntaxError             doctests are text
#   ...Lazy...                     Python 3.15's lazy imports, which no published program has yet


def lint(source):
    """Errors of a program: a list of (line, message), empty if it is clean. SyntaxError or
    ValueError if it does not parse (RecursionError or MemoryError: too deep for the parser), and
    what pyflakes raises where it fails itself (`from a import __all__`, then `__all__ += ...`)."""
    found = Checker(ast.parse(source), withDoctest=False).messages
    return sorted((x.lineno, x.message % x.message_args) for x in found if isinstance(x, ERRORS))


# -- A program as a graph of what needs what ------------------------------------------------------

MODULE = 0  # the node that stands until the last unit has fallen


class Program:
    """A parsed program's lines, and the graph of what falls with what.

    A unit is what is deleted as a whole: statements that share their lines, or one clause of a
    compound statement (its header; what stands below it are units of their own). The graph's nodes
    are numbers: MODULE, units, and groups of nodes. A unit falls when one of the nodes that it
    needs has fallen, a group when all of its nodes have.
    Exceptions as of lintseq, if the program cannot be written as edits."""

    def __init__(self, source):
        # A lone \r; or an empty line after a backslash, unless the text ends in a new line: a state
        # could end in that backslash, which is no Python.
        if re.search(r"\r(?!\n)|\\\r?\n(?=\n)(?!(?s:.*)\n\Z)", source):
            raise ValueError("a carriage return within a line, or an empty line after a backslash "
                             "in a text without a newline at the end")
        self.lines = source.split("\n")
        if len(self.lines) > MAX_LINES:
            raise ValueError(f"more than {MAX_LINES} lines")
        tree = ast.parse(source)
        if not tree.body:
            raise ValueError("no line of code")
        self.unit_at = [None] * len(self.lines)  # the unit that a line falls with
        self.lines_of = []  # of each node: the lines that fall with it
        self.dependents = []  # of each node: the nodes that lose a support when it falls
        self.supports = []  # of each node: how many that it needs must still fall for it to fall
        self.broken = set()  # units with an error from the start
        self.add_node()
        self.add_block(tree.body, MODULE)
        self.assign_lines(MODULE, 0, len(self.lines))
        self.code = [i for i, line in enumerate(self.lines)  # what can be drawn: no blank line,
                     if line.strip("\\ \t\f\v\r")[:1] not in "#"]  # no backslash alone, no comment
        NeedsOfNames(self, tree, source)  # it adds to this graph

    def add_node(self, supports=1):
        self.lines_of.append([])
        self.dependents.append(set())
        self.supports.append(supports)
        return len(self.supports) - 1

    def any_of(self, nodes):
        """The node that stands as long as one of these does."""
        if len(nodes) == 1:
            return nodes[0]
        nodes = set(nodes)
        group = self.add_node(len(nodes))
        for node in nodes:
            self.dependents[node].add(group)
        return group

    def need(self, unit, nodes):
        """Let a unit stand only as long as one of these nodes does."""
        self.dependents[self.any_of(nodes)].add(unit)

    def assign_lines(self, unit, first, end):
        """Let the lines from `first` to before `end` that have no unit fall with this one."""
        for i in range(first, end):
            if self.unit_at[i] is None:
                self.unit_at[i] = unit
                self.lines_of[unit].append(i)

    def find_end(self, node):
        """The index of the line after a statement and after what a backslash behind it joins."""
        end, column = node.end_lineno, node.end_col_offset
        while self.lines[end - 1].encode()[column:].strip(b" \t\f\r;") == b"\\":
            end, column = end + 1, 0
        return end

    def add_block(self, block, parent):
        """Add the statements of a block, which needs one of them, as they need its header."""
        units = []
        for node in block:
            decorators = getattr(node, "decorator_list", None)
            first = (decorators or [node])[0].lineno - 1
            # up to the line that begins with @, where it is @(
            while decorators and self.lines[first].lstrip().find("@"):
                first -= 1
            # alone in its line; before the first, lines[-1] never is
            while self.lines[first - 1].strip() == "\\":
                first -= 1
            unit = self.unit_at[first]
            if unit is None:  # else it shares a line: a; b
                unit = self.add_node()
                self.need(unit, [parent])
                units.append(unit)
            self.add_clauses(node, unit, first)
            self.assign_lines(unit, first, self.find_end(node))
        self.need(parent, units)

    def add_clauses(self, node, first_unit, next_line):
        """Add the clauses of a compound statement (a simple one has none), with their blocks. The
        first clause is `first_unit`; `next_line` is where the next one is looked for."""
        units = defaultdict(list)
        if isinstance(node, ast.Match):
            next_line = node.subject.end_lineno
            while not self.lines[next_line].lstrip().startswith("case"):
                next_line += 1
        for kind, body in clauses_of(node, self.lines):
            unit = first_unit
            if kind != "first":
                while self.lines[next_line].strip()[:1] in "#":
                    next_line += 1
                unit = self.add_node()
                self.need(unit, [first_unit])
            units[kind].append(unit)
            if not self.lines[body[0].lineno - 1][:body[0].col_offset].strip():  # not `if x: y`
                self.add_block(body, unit)
            end = self.find_end(body[-1])
            self.assign_lines(unit, next_line, end)
            next_line = end
        if needed := units["one of"] + units["finally"]:
            self.need(first_unit, needed)
            for unit in units["else"]:
                self.need(unit, units["one of"])

    def fall(self, units, supports):
        """The lines that fall with a set of units, which is used up; `supports`, what each node has
        left, is counted down."""
        lines = []
        for unit in units:
            supports[unit] = 0
        while units:
            node = units.pop()
            lines += self.lines_of[node]
            for other in self.dependents[node]:
                supports[other] -= 1
                if supports[other] == 0:
                    units.add(other)
        return lines


def clauses_of(node, lines, kind="first"):
    """(kind, its statements) of each clause of a compound statement, of an `if` with all `elif`s.
    The kind "one of": a `try` or `match` needs one of them."""
    if hasattr(node, "body"):
        yield kind, node.body
    for clause in getattr(node, "handlers", getattr(node, "cases", ())):
        yield "one of", clause.body
    other = getattr(node, "orelse", None)
    if other and re.match(r"\s*elif\b", lines[other[0].lineno - 1]):
        yield from clauses_of(other[0], lines, "elif")
    elif other:
        yield "else", other
    if getattr(node, "finalbody", None):
        yield "finally", node.finalbody


# -- What the names need: pyflakes' pass ----------------------------------------------------------

class Unbound:  # stands for the binding of a name that has none
    bound = declared = []


BUILTINS = Checker(ast.parse("")).builtIns


class NeedsOfNames(Checker):
    """pyflakes' pass over a program, where a scope keeps of each name all that has bound it so far,
    not the last, and where a use is not looked up but becomes a need in the program's graph.

    A binding has two nodes, each in a list: `declared` stands while a statement does that bound
    the name in its scope up to there; `bound` does not count annotations without a value, and is
    an empty list where there is nothing else. Each method in camelCase or capitals takes the place
    of pyflakes' own, which shows what there is to a name; pyflakes calls it for each such node."""

    def __init__(self, program, tree, source):
        self.program = program
        # (unit, nodes of which it needs one, (function's scope, name), how many of the nodes are of
        # that scope); None in place of nodes: the name is in __all__
        self.uses = []
        self.globals = defaultdict(list)  # {name: units that declare it global}
        self.binders = defaultdict(list)  # {(scope, name): units that bind it, or delete it}
        self.deleted = set()  # (scope, name)
        self.kinds = defaultdict(set)  # {name: imported from where, is it an __all__; by what}
        if source.isascii() and "typing" not in source:  # then no argument of a call is a type
            self.CALL = self.handleChildren
        super().__init__(tree, withDoctest=False)

    # pyflakes' constructor would bind each of these in the module: none, handleNodeLoad knows them
    builtIns = property(lambda self: (), lambda self, names: None)
    futuresAllowed, annotationsFutureEnabled = True, False  # until pyflakes says otherwise
    future = []  # the node of `from __future__ import annotations`
    without_future = False  # an annotation is looked at as if that had fallen

    def unit_of(self, node):
        return self.program.unit_at[node.lineno - 1]

    def addBinding(self, node, value):
        scope, unit = self.scope, self.unit_of(node)
        if isinstance(value, checker.NamedExprAssignment):
            if self.without_future or self._in_annotation:  # it hangs on that import when, if ever
                self.program.broken.add(unit)
            scope = next(s for s in reversed(self.scopeStack)
                         if not isinstance(s, ComprehensionScope))
        elif isinstance(value, checker.StarImportation):
            value.name = "*"
        elif self.annotationsFutureEnabled and not self.future:  # this is that import
            self.future = [unit]
        elif isinstance(value, ExportBinding):
            self.uses += [(unit, None, (None, name), 0) for name in value.names]
        self.bind(scope, value, unit)

    def bind(self, scope, value, unit):
        old = scope.get(value.name, Unbound)
        value.names = getattr(value, "names", ())  # pyflakes fails where an __all__ has none
        self.kinds[value.name] |= {  # two for each kind
            getattr(value, "fullName", isinstance(value, ExportBinding)),
            getattr(value, "source_statement", None)}
        self.binders[id(scope), value.name].append(unit)
        value.declared = [self.program.any_of([unit, *old.declared])]
        value.bound = (
            old.bound if isinstance(value, checker.Annotation) else
            value.declared if old.bound == old.declared else
            [self.program.any_of([unit, *old.bound])])
        scope[value.name] = value

    def GLOBAL(self, node):
        unit, (module, *inner) = self.unit_of(node), self.scopeStack
        for name in node.names if inner else ():
            known = module.get(name, Unbound)
            visible = known.bound == known.declared  # an annotation without a value hides it
            self.globals[name] += [unit] * visible
            for scope in inner + [module] * visible:
                self.bind(scope, checker.Assignment(name, node), unit)

    NONLOCAL = GLOBAL

    def EXCEPTHANDLER(self, node):
        if node.type and "'NameError'" in ast.dump(node.type):  # what it covers must not lose it
            self.program.need(self.unit_of(self.getParent(node)), [self.unit_of(node)])
        before = self.scope.pop(node.name, None)  # its name ends with it
        super().EXCEPTHANDLER(node)
        if node.name in self.globals:  # so does a global, and set again it is an UndefinedLocal
            self.program.broken.add(self.unit_of(node))
        if before:
            self.scope[node.name] = before

    def handleNodeLoad(self, node, parent):
        name, here = checker.getNodeName(node), self.scope
        if not name:
            return
        unit, function = self.unit_of(node), isinstance(here, FunctionScope) and id(here)
        nodes, declared = [], []  # of the bindings in sight: bound, declared
        sees_class = True  # a class shows its names only to what stands in it directly
        for scope in reversed(self.scopeStack):
            in_class = isinstance(scope, ClassScope)
            if in_class and (name == "__class__"
                             or scope is here and name in checker.DetectClassScopedMagic.names):
                nodes.append(MODULE)
                break
            if name in scope and (sees_class or not in_class):
                nodes += scope[name].bound
                declared += scope[name].declared
                if scope is not here:  # pyflakes takes what an alias stands for as used, too
                    self.uses += [(unit, [MODULE], (function, other), 0)
                                  for other in self.kinds[name] if other and other != name]
            sees_class &= isinstance(scope, (checker.TypeScope, ComprehensionScope))
        # A name of typing's must stand: by it some strings are annotations. What else one may be:
        if "typing" not in str(self.kinds[name]):
            if name in BUILTINS:
                nodes.append(MODULE)
                declared.append(MODULE)
            if not nodes and "NameError" in self.exceptHandlers[-1]:
                nodes.append(MODULE)
            elif not declared:  # a star may have imported it
                nodes += self.scopeStack[0].get("*", Unbound).bound
        where = (function if declared else None, name), len(here.get(name, Unbound).bound)
        if name == "print" and isinstance(parent, ast.BinOp):  # Python 2's print >> x
            self.program.broken.add(unit)
        # An annotation has two needs: one for the states with that import, one for those without
        if self.future and (self.without_future
                            or self._in_annotation == checker.AnnotationState.BARE):
            self.uses.append((unit, nodes + self.future, *where))
        if self._in_postponed_annotation:
            nodes = nodes + declared
        if not self.without_future:
            self.uses.append((unit, nodes, *where))

    def handleNodeDelete(self, node):
        key = id(self.scope), node.id
        super().handleNodeDelete(node)
        if node.id not in self.scope:  # no condition is around it
            self.binders[key].append(self.unit_of(node))
            self.deleted.add(key)

    def handleAnnotation(self, annotation, node):
        if self.annotationsFutureEnabled:  # it is looked at later; but now, if that falls
            self.without_future = True
            self.handleNode(annotation, node)
            self.without_future = False
        super().handleAnnotation(annotation, node)

    def checkDeadScopes(self):
        """In the place of pyflakes' reports on what is unused: what was found goes to the graph."""
        program, module = self.program, self.deadScopes[-1]
        for unit, nodes, (function, name), own in self.uses:
            if nodes is None:
                nodes = module.get(name, Unbound).declared + module.get("*", Unbound).declared
            if (function, name) in self.binders:  # it is not looked for elsewhere: UndefinedLocal
                nodes = nodes[:own]
            else:
                nodes = nodes + self.globals.get(name, [])
            if nodes:
                program.need(unit, nodes)
            else:
                program.broken.add(unit)
        for key in self.deleted:
            units = self.binders[key]
            # What comes after is to see either what the whole program shows it, or nothing; not the
            # builtin that was hidden, and not a global, which is an UndefinedLocal when set again
            if key[1] in {*BUILTINS, *self.globals}:
                program.broken.update(units)
            for unit in units:
                program.need(unit, units[:1])
                program.need(units[0], [unit])
        for (_, name), units in self.binders.items():
            # by which of them stand, a string is an annotation or not, an __all__ is one or not
            if len(self.kinds[name]) > 2 and re.search("True|typing", str(self.kinds[name])):
                program.broken.update(units)
        program.broken.update(self.unit_of(x) for x in self.messages if isinstance(x, ERRORS))


# -- Edits ----------------------------------------------------------------------------------------

parse_program = lru_cache(1)(Program)  # kept for a program's next sequences


def lintseq(source, rng):
    """One sequence of edits of a program, each as diff text, in the order of writing. rng:
    random.Random.

    Lines with errors that the program has from the start fall with the first line drawn, so they
    come in with the last edit (as published). ValueError or SyntaxError, with the reason, where
    this cannot be done; RecursionError or MemoryError where it is too deep for the parser."""
    program = parse_program(source)
    supports, broken = program.supports[:], program.broken
    falls = []
    # A random order is as good as draws one by one: all lines that are left are equally likely
    for line in sorted(program.code, key=lambda line: rng.random()):
        unit = program.unit_at[line]
        if supports[unit] > 0:
            falls.append(program.fall({unit, *broken}, supports))
            broken = ()
    return write_diffs(program.lines, falls)


def randseq(source, rng):
    """The paper's ablation: each edit is a random set of the lines of code that are left, whatever
    a linter says."""
    program = parse_program(source)
    left = rng.sample(program.code, len(program.code))
    falls = []
    while left:
        falls.append([left.pop() for _ in range(rng.randint(1, len(left)))])
    falls[-1] += set(range(len(program.lines))) - set(program.code)
    return write_diffs(program.lines, falls)


METHODS = {"lintseq": lintseq, "randseq": randseq}  # another: a function, and here, and in Settings


def write_diffs(lines, falls):
    """Diff text from each state to the next; `falls` are the numbers of the lines that fell, step
    by step. Lines that come in at one place make a hunk."""
    present, texts = [], []
    for fallen in reversed(falls):
        hunks = []
        shift = 1  # numbers begin with 1; grows by the lines that came before
        for before, group in groupby(sorted(fallen), partial(bisect, present)):
            new = [f"\n+{lines[i]}" for i in group]
            count = f",{len(new)}" if len(new) > 1 else ""
            hunks.append(f"@@ -{before},0 +{before + shift}{count} @@" + "".join(new))
            shift += len(new)
        texts.append("\n".join(hunks))
        for i in fallen:
            insort(present, i)
    return texts


HUNK = re.compile(r"^(.*)\n((?:(?!@@).*\n)*)", re.M)
HEADER = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+\d{1,9}(?:,(\d{1,9}))? @@")


def apply_edit(lines, text, report):
    """Apply one edit to a list of lines, in place; count into report["hunks"], ["malformed"].

    A hunk whose header is broken or names a place outside the program, or that is to make a program
    of MAX_LINES lines still longer, is left out (so that no hunk costs more than moving so many:
    linear in the text). One whose counts do not fit its lines is applied as it stands: it is the
    lines that a model means. Both are malformed, and so is a hunk with any line in it that is no
    insertion (or deletion or context that fits; the format has none, some models do)."""
    shift = 0  # how far the hunks before have moved the rest
    for header, body in HUNK.findall(text + "\n"):
        report["hunks"] += 1
        match = HEADER.fullmatch(header)
        body = body.split("\n")[:-1]
        if match:
            start, minus, plus = map(int, match.groups("1"))
            at = start - (minus > 0) + shift
        if not match or not 0 <= at <= len(lines) <= MAX_LINES - len(body):
            report["malformed"] += 1
            continue
        new, sound = [], True
        n = 0  # lines of the old program that it names
        for line in body:
            if line.startswith("+"):
                new.append(line[1:])
            elif line[:1] in ("-", " ") and lines[at + n:at + n + 1] == [line[1:]]:
                n += 1
                new += [line[1:]] * (line[0] == " ")
            else:
                sound = False
        lines[at:at + n] = new
        shift += len(new) - n
        report["malformed"] += not sound or (n, len(new)) != (minus, plus)


def split_edits(text):
    """The edits of what a model wrote after its instruction, each without the newline before the
    next marker; empty ones, as at the end, left out. Only at the beginning of a line is a marker
    one (a program's own stand behind a `+`); end-of-text is dropped at the very end alone."""
    pieces = re.split(f"^{re.escape(DIFF)}", text.removesuffix(EOT), flags=re.M)
    return [edit for piece in pieces if (edit := piece.removesuffix("\n"))]


def apply_and_count(text):
    """(program, {"edits", "hunks", "malformed"}) of what a model wrote after its instruction. Never
    raises."""
    lines, report = [], {"edits": 0, "hunks": 0, "malformed": 0}
    for edit in split_edits(text):
        apply_edit(lines, edit, report)
        report["edits"] += 1
    return "\n".join(lines), report


def apply_edits(text):
    """The program that a model wrote as edits after its instruction. Never raises; what is
    malformed is left out."""
    return apply_and_count(text)[0]


# -- In bulk --------------------------------------------------------------------------------------

def make_rows(job, cfg):
    """(text, tally) of a (number, row) of config.read_rows: lines for dest, or of a row that cannot
    be used its line for the list of those; and what to count for the report."""
    index, row = job
    index -= 1
    try:
        instruction, response = config.read_pair(row)
        rng, paths, tries = random.Random(f"{cfg.seed}/{index}"), [], 5
        for _ in range(cfg.samples):
            for _ in range(tries):  # one that is there already is drawn again
                path = METHODS[cfg.method](response, rng)
                if path not in paths:
                    break
            else:
                tries = 1  # a short program has only few: from here on what comes is taken
            paths.append(path)
    except Exception as e:  # too deep for the parser, pyflakes' own: the next row can do
        kind = "does not parse: " if isinstance(e, SyntaxError) else ""
        reason = f"{kind}{str(e) or type(e).__name__}"
        return (json.dumps({"index": index, "reason": reason}) + "\n",
                {"skipped: " + reason.split(":")[0]: 1})
    rows = "".join(json.dumps({
        "edit_path": path, "index": index, "source_instruction": instruction,
        "source_response": response}) + "\n" for path in paths)
    return rows, {"programs": 1, "edits": sum(map(len, paths))}


def make_all_rows(jobs, cfg):
    """What make_rows returns of each job, in their order."""
    make = partial(make_rows, cfg=cfg)
    if cfg.workers == 1:
        yield from map(make, jobs)
        return
    with config.start_pool(cfg.workers, warnings.simplefilter, "ignore") as pool:
        while block := list(islice(jobs, 256 * config.CPUS)):  # so many are in memory
            yield from pool.map(make, block, chunksize=16)


def write_edits(cfg):
    """Write the edit sequences of --source to --dest. A state file says up to where both outputs
    are whole: a run that was stopped cuts them back to there, and goes on."""
    from tqdm import tqdm
    dest = Path(cfg.dest + f".{config.RANK}-of-{config.WORLD}" * (config.WORLD > 1))
    settings = [cfg.source, zlib.crc32(Path(cfg.source).read_bytes()), cfg.samples, cfg.seed,
                cfg.method]
    with config.lock_file(dest) as out, open(f"{dest}.skipped.jsonl", "a") as skipped:
        files = out, skipped
        state = Path(f"{dest}.state.json")
        try:
            was, sizes, counts, finished = (
                json.loads(state.read_bytes()) if out.tell() or state.exists()
                else (settings, [0, 0], {}, False))
            if was != settings or any(f.tell() < size for f, size in zip(files, sizes)):
                raise ValueError
        except Exception:  # missing, broken, of another run
            config.die(f"{dest} is of other settings, of {cfg.source} before it changed, or not as "
                       f"a run left it (see {state.name}): delete both, or choose another --dest")
        if not finished:
            for f, size in zip(files, sizes):
                f.seek(size)
                f.truncate()
        counts = Counter(counts)

        def save(finished=False):  # prepare.py asks whether it is
            sizes = [f.tell() for f in files]  # it flushes
            config.write_whole(state, json.dumps([settings, sizes, counts, finished]).encode())

        jobs = islice(config.read_rows(cfg.source), config.RANK + config.WORLD * counts["rows"],
                      None, config.WORLD)
        for text, tally in tqdm(make_all_rows(jobs, cfg), initial=counts["rows"], unit=" programs"):
            if counts["rows"] % 1000 == 0:
                save()
            (out if "programs" in tally else skipped).write(text)
            counts.update(tally, rows=1)
        save(finished=True)
    if not counts["programs"] and config.WORLD == 1:
        config.die(
            f"{cfg.source} holds no program that can be written as edits: see {skipped.name}")
    print(f"{dest}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))


def show(path, cfg):
    """Print one edit sequence of a file."""
    try:
        source = Path(path).read_bytes().decode("utf-8-sig")
        sequence = METHODS[cfg.method](source, random.Random(cfg.seed))
    except Exception as e:  # no such file, no program
        config.die(f"{path}: {str(e) or type(e).__name__}")
    for n, edit in enumerate(sequence, 1):
        print(f"--- edit {n} of {len(sequence)}\n{edit}")


def main():
    cfg = config.load(Settings)
    if cfg.paths:
        for path in cfg.paths:
            show(path, cfg)
    elif cfg.source and cfg.dest:
        write_edits(cfg)
    else:
        config.die("name a Python file to show, or --source=in.jsonl and --dest=out.jsonl")


if __name__ == "__main__":
    config.run(main)
