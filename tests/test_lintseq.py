"""lintseq.py: exact on real files, faithful to the algorithm, deaf to nonsense, to be killed."""
import ast
import gzip
import importlib
import io
import json
import pkgutil
import random
import re
import resource
import signal
import sys
import sysconfig
import textwrap
import time
import unittest
from collections import Counter
from pathlib import Path

import pyflakes.test
import pytest
from conftest import call, response, run, start
from hypothesis import HealthCheck, given, settings, strategies as st
from pyflakes.checker import Checker
from pyflakes.test import harness

import lintseq
import sample
from lintseq import DIFF, EOT

STDLIB = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
                if "site-packages" not in p.parts)


def stdlib_sources(n, low, high, seed=0):
    found = []
    for path in random.Random(seed).sample(STDLIB, len(STDLIB)):
        try:
            source = path.read_bytes().decode()
            if low <= source.count("\n") <= high and ast.parse(source):
                found.append(source)
        except (ValueError, SyntaxError):
            continue
        if len(found) == n:
            return found


def errors(source):
    """What pyflakes itself reports."""
    return [str(x) for x in Checker(ast.parse(source)).messages if isinstance(x, lintseq.ERRORS)]


def check_sequence(source, edits, clean=True):
    """Everything that holds of every edit sequence: exact, insertions only, no empty edit, clean
    states."""
    assert lintseq.apply_and_count(response(*edits)) == (
        source, {"edits": len(edits), "hunks": sum(e.count("\n@@ -") + 1 for e in edits),
                 "malformed": 0})
    try:
        dirty = bool(errors(source))
    except (AttributeError, AssertionError):  # pyflakes itself fails
        dirty = True
    before, total = [], 0
    for n, edit in enumerate(edits):
        lines, report = list(before), {"hunks": 0, "malformed": 0}
        lintseq.apply_edit(lines, edit, report)
        added = [line for line in edit.split("\n") if line.startswith("+")]
        assert added and len(lines) == len(before) + len(added)
        assert not [line for line in edit.split("\n") if line[:1] not in ("+", "@")]
        rest = iter(lines)
        assert all(line in rest for line in before)  # the old state is a subsequence of the new one
        total += len(added)
        if clean and not (dirty and n == len(edits) - 1):
            assert errors("\n".join(lines)) == []
        before = lines
    assert total == len(source.split("\n"))


def test_exact_on_the_standard_library():
    for i, source in enumerate(stdlib_sources(40, 5, 250)):
        try:
            edits = lintseq.lintseq(source, random.Random(i))
        except ValueError as e:
            assert "no line of code" in str(e) and not ast.parse(source).body
            continue
        check_sequence(source, edits)
        check_sequence(source, lintseq.randseq(source, random.Random(i)), clean=False)


TRICKY = {
    "no newline at the end": "x = 1\nprint(x)",
    "blanks at the ends": "\n\n  \nx = 1  \n\nprint(x)\t\n   \n\n",
    "tabs": "if 1:\n\tx = 1\n\tif x:\n\t\tprint(x)\n",
    "form feed": "x = 1\n\f\ny = x\n\fz = y\n",
    "crlf": "x = 1\r\nif x:\r\n    print(x)\r\n",
    "line separators": "x = 'a\u2028b\x0bc\x85d\x1ce'\ny = x\n",
    "lines like a diff": 'x = """\n+a\n-b\n@@ -1,0 +2 @@\n@@\n c\n"""\ny = x\n-y\n+y\n',
    "backslash": "x = 1 + \\\n    2\nassert x, \\\n    'no'\n",
    "backslash between statements":
        "# last \\\na = 1; \\\nb = a; \\\n\\\nc = b\ndef f():\n    x = c; \\\n    y = x\n"
        "    return y\nd = c \\\n; e = d\r\nif e: g = 1; \\\r\n  h = g\r\n# last \\",
    "backslashes and semicolons alone":
        "x = 1 \\\n;\ny = x; \\\n\nif y:\n    \\\n\\\n    z = 'é' \\\n; \nelse: w = 1 \\\n  ;\n"
        "try: a = 1\nexcept OSError: a = 2\nelse: b = 1 \\\n \\\n\nfinally: c = 1\n"
        "d = 1  # \\\ne = 1\nf = \"\"\"\n;\n\\\n\"\"\" \\\n;\n",
    "a backslash before an empty line": "x = 1\n\\\n\ny = 2\nif y: x = 3 \\\n\n\\\n# c\nz = 1\n",
    "a clause at the column of its statement":
        "try:\n    a = 1\nexcept OSError:\n    b = 1\nelse: \\\nelif_ = 1\nfinally:\n    c = 1\n"
        "for i in []:\n    a = 1\nelse:\n    \\\nif 2:\n        b = i\n    c = 3\n",
    "a form feed before an if":
        "\f\f\f\fif 1: a = 1\nelse:\n    if 2:\n        b = 1\n    else: c = 1\n    d = 1\n"
        "\fif a: b = 1\nelif 2: c = 1\n\felif d: e = 1\n",
    "semicolons": "x = 1; y = 2\nif x: y = 3; z = 4\nprint(x); print(y)\n",
    "decorators":
        "import functools\n\n@functools.cache\n@functools.wraps(len)\ndef f(a,\n      b):\n"
        "    return a\n\nf(1, 2)\n",
    "try":
        "try:\n    x = 1\nexcept ValueError:\n    x = 2\nexcept (OSError,\n"
        "        KeyError) as e:\n    x = e\n# c\nelse:\n"
           "    x = 3\nfinally:\n    print(1)\n",
    "elif":
        "a = 1\nif a:\n    b = 1\nelif a > 1:\n    b = 2\n# why\nelif a > 2: b = 3\nelse:\n\n"
        "    # no\n    b = 4\nprint(b)\n",
    "loops": "for i in []:\n    print(i)\nelse:\n    i = 2\nwhile 1:\n    break\nelse: pass\n",
    "match":
        "def f(x):\n    match (x,\n           1):\n        # one\n        case (1, _):\n"
        "            return 1\n        case {'a': y}"
             " if y: return y\n        case _:\n            pass\n",
    "nested else": "if 1:\n    pass\nelse:\n    if 2:\n        x = 1\n    else:\n        x = 2\n",
    "class":
        'class A:\n    """Doc\n\n    string."""\n    x = 1\n'
        '    def f(self): return self.x\n\nA().f()\n',
    "async":
        "async def f(x):\n    async with x as y:\n        async for z in y:\n            yield z\n",
    "strings":
        "x = f'''\n{1 +\n 2}\n'''\ny = ('a'\n     # comment\n\n     'b')\nz = [1,\n\n     2]\n"
        "print(x, y, z)\n",
    "unicode": "é = 'ü\U0001f600'\nprint(é)\n",
    "future":
        '"""Doc."""\nfrom __future__ import annotations\nimport os\n\n'
        'def f(x: os.PathLike) -> "os":\n    return x\n',
    "globals": "def f():\n    global x\n    x = 1\n\ndef g():\n    return x\n",
    "star": "from os.path import *\n\ndef f():\n    return join('a', 'b')\n",
    "star in the middle": "import os\nprint(os)\nfrom os.path import *\nprint(join)\n",
    "del":
        "import os\nprint(os)\ndel os\nos = 1\nprint(os)\n\ndef f(x):\n    del x\n    return os\n",
    "typing":
        "from typing import Optional\nimport os\n\ndef f(x: Optional['C']) -> os.PathLike:\n"
        "    y: Optional['C'] = x\n"
              "    return y\n\nclass C:\n    pass\n",
    "rebound":
        "import os\nx = os\nprint(x)\nx = 1\nos = x\n\nclass A:\n    x = x\n"
        "    def f(self, print=print): return x, os\n\n"
               "for print in [x]: print(A)\n",
    "exports": "__all__ = ['f', 'g']\ndef f(): pass\ndef g():\n    pass\n",
    "ligature": "ﬁ = 1\ndef f():\n    return fi\n",
    "exports of joined and escaped strings": "__all__ = ['fo' 'o', 'b\\x61r']\n__all__ += ['baz']\n"
        "def foo(): pass\ndef bar():\n    pass\nbaz = 1\n",
    "exports bound by a star": "from os.path import *\n__all__ = ['join', 'x']\nx = 1\n",
    "exports imported before":
        "from os import __all__\n__all__ = ['x']\n__all__ += ['y']\nx = y = 1\n",
    "escaped annotations": "class foo: pass\nx: 'f\\x6fo' = 1\ny: ('f'\n    'oo') = 2\n",
    "markers":
        "x = '<|diff|>'\ny = '''\n<|diff|>\n<|endoftext|>\n<|diff|>@@ -0,0 +1 @@\n'''\n"
        "z = y + x  # <|endoftext|>",
    "handlers of NameError": "try:\n    unicode\n    x = raw_input\nexcept ImportError:\n    pass\n"
        "except (NameError, OSError):\n    unicode = x = 1\nelse:\n    y = 1\n"
        "def f():\n    try:\n        long\n    except NameError:\n        long = int\n"
        "    return long\n",
    "a handler's name and another":
        "import os\ne = 1\ntry:\n    os.stat('a')\nexcept OSError as e:\n    print(os)\n"
        "print(e)\n",
    "a global hidden by an annotation":
        "x: int\nx = 0\ndef f():\n    global x\n    x = 1\ndef g():\n    print(x)\n",
    "a handler's name":
        "e = 1\ntry:\n    x = e\nexcept OSError as e:\n    print(e)\nexcept KeyError as g:\n"
        "    print(g, e)\nprint(e)\ndef f():\n    try:\n        return x\n"
        "    except OSError as x1:\n        return x1\n",
    "locals and outer names":
        "x = 1\ndef f():\n    x = 2\n    print(x)\n    x = 3\n    return x\ndef g():\n"
        "    import x\n    print(x)\n    for x in [x]:\n        print(x)\ndef h():\n"
        "    id = 1\n    print(id)\n    id = 2\n",
    "a local hidden by a comprehension":
        "x = 1\ndef f():\n    print(x)\n    y = [x for _ in 'a']\n    x = 2\n    return x, y\n",
    "a local read between imports":
        "x = 1\ndef f():\n    print(x)\n    import x\n    x = 5\n    return x\n",
    "globals and annotations":
        "x: int\ndef f():\n    global x, y\n    x = 1\n    y = x\ndef g():\n    print(y)\n"
        "    del y1\n"
        "    global y1\ny1 = y2 = 2\ndef h():\n    def i():\n        nonlocal z\n"
        "        z = 1\n    z = 2\n    i()\n    return z\n",
    "del and conditions":
        "import a, b\nx = a\ndel x\nx = b\nif x:\n    del x\nprint(x)\nfor x in b:\n    del x\n"
        "def f(y):\n    with y as z:\n        print(z)\n    del z, y\n",
    "a builtin that was hidden": "len = 1\nprint(len)\ndel len\nz = 1\n",
    "classes":
        "x = 1\nclass A:\n    x = x\n    y = [x for _ in x]\n    z = [w for w in range(x)]\n"
        "    __module__\n"
        "    def f(self, x=x):\n        return __class__, x\n    class B(object):\n        v = x\n",
    "annotations":
        "from __future__ import annotations\nfrom typing import Optional, cast\nx: A = 1\ny: int\n"
        "def f(a: B, b: 'Optional[A]' = cast('B', 1)) -> y:\n    c: C\n"
        "    z: list[C] = [cast(y, a)]\n    return z, b\n"
        "class A: pass\nclass B:\n    w: B\nclass C: pass\n",
    "typing shadowed":
        "from typing import cast\ndef cast(a, b):\n    return b\ncast('int', 1)\n"
        "cast('no_name', 1)\n",
    "typing shadowed in a function":
        "from typing import cast\ndef f():\n    from mine import cast\n"
        "    return cast('no_name', 1)\n",
    "typing imported in two places":
        "try:\n    from typing import cast\nexcept ImportError:\n    from typing import cast\n"
        "class A: pass\ndef f(x):\n    return cast('A', x)\n",
    "a star and an annotation": "from os.path import *\nx: int\nx = 1\nprint(x, join)\n",
    "walrus":
        "if (n := 1) > 2: pass\nwhile (m := n):\n    print([k := m for _ in [1]], k)\n"
        "f = lambda q=n: (r := q) + r\n",
    "try in parts":
        "try:\n    x = 1\nfinally:\n    y = 1\nfor i in [1]:\n    try: continue\n"
        "    except OSError: break\n    else:\n"
        "        if i: pass\n    finally: i = 2\n",
    "a comment's backslash":
        "if 1:  # \\\n    b = 1\n    c = 2\nelse:  # \\\n    b = 3\n    c = 4\nprint(b, c)\n",
    "a decorator over lines": "@(\n    print\n)\ndef f(): pass\nx = 1\n",
    "signs in a decorator over lines":
        "d = 1\n@(\n    d @ d\n)\ndef f(): pass\n@(  # c\n    # me@x\n    print('@')\n)\n"
        "class A: pass\nx = 1\n",
    "backslashes alone":
        "\\\n@print\n@print\nclass f: pass\nif 1:\n    w = 2\n    \\\n    @print\n"
        "    def g(): pass\n    \\\n    \\\n    y = 1\nz = 2\n",
    "a number sign before a backslash":
        "x = '#'; \\\ny = 2\nz = '#' \\\n; w = 2\nif '#': \\\n  y = '#'; \\\n  z = 2\nv = 1\n",
    "a renamed future": "from __future__ import annotations as a\nx: A\nclass A: pass\n",
    "a global that is deleted and set":
        "x = 1\ndef f():\n    global x\n    print(x)\n    del x\n    x = 1\nz = 1\n",
}
if sys.version_info >= (3, 12):
    TRICKY["type parameters"] = (
        "type A[T: B, *Ts] = dict[T, A]\nclass B[T]:\n    x: T\n"
        "    def f[S](self, s: S) -> T:\n        return s\n"
        "def g[**P](f: A[B], x=f'{'a' + f'{1}'}') -> P: return f\n"
        "try:\n    g(1)\nexcept* OSError as e:\n    print(e)\n")


# where the graph is stricter than pyflakes on the whole program
STRICT = {"a local hidden by a comprehension", "a local read between imports",
          "globals and annotations", "a global that is deleted and set", "typing shadowed",
          "typing shadowed in a function", "exports imported before", "a builtin that was hidden"}


@pytest.mark.parametrize("name", TRICKY)
def test_exact_on_tricky_sources(name):
    assert lintseq.lint(TRICKY[name]) == []
    assert bool(lintseq.parse_program(TRICKY[name]).broken) == (name in STRICT)
    for seed in range(40):
        check_sequence(TRICKY[name], lintseq.lintseq(TRICKY[name], random.Random(seed)))


# Names that the same program binds in ways of different meaning, or deletes, or only annotates:
# where one of them falls, another is seen. pyflakes itself reports or fails on some of them.
ENTANGLED = [
    "from \uff54yping import cast\ncast('x', 1)\nx = 1\n",  # Python reads it as typing
    "class T: pass\nfrom typing import cast as c\nfrom typing import NewType as c\nc('T', 'x')\n"
    "x = 1\n",
    "import typing.io\nimport typing\ntyping.cast('x', 1)\nx = 1\n",
    "from typingfoo import cast\nfrom typing import cast\ncast('x', 1)\nx = 1\n",
    "from __future__ import annotations\nfrom typing import cast\ncast = len\nX: int\n"
    "cast(X, 1)\n",
    "from mine import cast\nfrom typing import cast\nx: cast(int, 'no name')\n",
    "x = 1\ndel x\ndef f():\n    try:\n        print(x)\n    except NameError:\n        pass\n"
    "    x = 2\n",
    "x = 1\ndel x\nfrom os import *\ndef f():\n    print(x)\n    x = 2\n",
    "x: int\ndef f():\n    try:\n        print(x)\n    except NameError:\n        pass\n    x = 2\n"
    "z = 1\n",
    "from __future__ import annotations\nfrom typing import cast\nx: int\ndef f():\n"
    "    cast(x, 1)\n    x = 2\nz = 1\n",
    "x: int\ndel x\nfrom os import *\nprint(x)\n",
    "a: int\ndel a\ndef b():\n    global a\ndef c():\n    print(a)\n",
    "__all__ = ['x']\n(__all__ := 1)\n__all__ += ['y']\nx = y = 1\n",
    "__all__ = ['x']\nclass A:\n    global __all__\n__all__ += ['y']\nx = y = 1\n",
    "__all__ = ['x']\ntry: pass\nexcept OSError as __all__: pass\n__all__ += []\nx = 1\nz = 1\n",
    "__all__: list = ['x']\n__all__: list\n__all__ += ['y']\nx: int\ny: int\n",
    "def f():\n    from __future__ import annotations\n    x: A\nclass A: pass\nz = 1\n",
    "def f():\n    from typing import cast\n    class A:\n        cast = len\n"
    "        x = cast('no name', 1)\n",
    "class A:\n    cast = 1\n    def f(self): return cast('x y', 1)\nfrom typing import cast\n",
    "from mine import cast\nclass A:\n    from typing import cast\n    del cast\n"
    "    def f(self): cast('x y', 1)\n",
    "cast = 1\ndef f():\n    from typing import cast\n    cast: int\n    return cast('x', 1)\n"
    "x = 1\n",
    "cast = 1\ndef f():\n    from typing import cast\n    cast = 2\n    cast('x y', 1)\n",
    "class A:\n    def f(self):\n        __class__ = 1\n        def g():\n"
    "            print(__class__)\n            __class__ = 2\nz = 1\n",
    "def b():\n    b = a + a\nimport b as a\ntry:\n    a = b\nexcept b as a:\n    pass\n",
    "def b():\n    with b as b:\n        from m import a\n    b = a + a\nimport b as a\n",
    "len: int\nprint(len)\ndel print\nprint(1)\ndef f(): print(2)\n",
    "b = a\ntry:\n    del a\nexcept NameError as a:\n    class c:\n        global a\nelse:\n"
    "    if b: b = a\nz = 1\n",
    "import sys\nprint >> sys.stderr, 'x'\nprint\n",
    "from __future__ import annotations\ndef f(x=b) -> (b := (lambda c=1: c)): pass\nb = z = 1\n",
    "def f():\n    nonlocal a\n    try:\n        print(a)\n    except OSError as a: pass\nz = 1\n",
    "b: int\ndef f():\n    try:\n        nonlocal b\n    except (OSError, NameError) as b:\n"
    "        pass\nz = 1\n",
    "class b: pass\nfrom typing import TypeVar\ntry:\n    c: TypeVar('a', bound='b')\n"
    "except NameError as c:\n    pass\nz = 1\n",
    "from typing import TypeVar\nfrom os import *\nc: TypeVar('a b')\nz = 1\n",
    "def f(x):\n    len = len(x)\ndel len\nfrom m import *\nz = 1\n",
    "from typing import cast as len\nx: len(int, 'no name')\nz = 1\n",
    "len = 1\nfrom typing import Literal as len\nx: len['no name']\nz = 1\n",
    "from typing import cast\nimport typing.cast as cast\ncast('no name', 1)\nz = 1\n",
    "from m import *\nclass A:\n    from typing import Literal\n    def f(self):\n"
    "        y: Literal['no name']\nz = 1\n",
    "class A:\n    from typing import Literal\n    def f(self):\n        try:\n"
    "            y: Literal['no name']\n        except NameError:\n            pass\nz = 1\n",
    "from __future__ import annotations\nx: '(n := 1)'\nprint(n)\nz = 1\n",
    "from __future__ import annotations\nx: (n := 1)\ny: n\nz = 1\n",
]


@pytest.mark.parametrize("source", ENTANGLED)
def test_clean_where_a_name_has_several_meanings(source):
    for seed in range(40):
        check_sequence(source, lintseq.lintseq(source, random.Random(seed)))


def test_clean_on_what_pyflakes_tests():
    """Every program in pyflakes' own tests, with errors or without."""
    found = []

    def note(self, source, *args, **kwargs):
        found.append(textwrap.dedent(source))

    modules = [importlib.import_module(f"pyflakes.test.{module.name}")
               for module in pkgutil.iter_modules(pyflakes.test.__path__) 
               if module.name not in ("harness", "test_api")]
    flakes, harness.TestCase.flakes = harness.TestCase.flakes, note
    try:
        unittest.TextTestRunner(io.StringIO()).run(unittest.TestSuite(
            unittest.defaultTestLoader.loadTestsFromTestCase(case) for module in modules
            for case in vars(module).values()
            if isinstance(case, type) and issubclass(case, harness.TestCase)))
    finally:
        harness.TestCase.flakes = flakes
    programs = [source for source in dict.fromkeys(found) if ast.parse(source).body]
    assert len(programs) > 500
    for source in programs:
        for seed in range(2):
            check_sequence(source, lintseq.lintseq(source, random.Random(seed)))


@pytest.mark.parametrize("source, reason", [
    ("x = 1\ry = 2\n", "carriage return"),
    ("x = 1 \\\n\ny", "empty line after a backslash"),
    ("x = 1 \\\r\n\ny = 2", "empty line after a backslash"),
    ("# only\n\n# comments\n", "no line of code"), ("", "no line of code"),
    ("x = (\n", "never closed"), ("\0", "null byte"),
    ("x = 1\n" * 100_000, "more than 100000 lines")])
def test_what_cannot_be_written_is_refused_with_the_reason(source, reason):
    for method in (lintseq.lintseq, lintseq.randseq):
        with pytest.raises((ValueError, SyntaxError), match=reason):
            method(source, random.Random(0))


HEADERS = ("if {0}:", "while {0}:", "for {0} in {1}:", "with {0} as {1}:", "def {0}({1}={1}):",
           "class {0}({1}):", "import {0}", "{0}({1})", "print({0})", "print([{1} for {0} in {1}])")


def random_program(rng, clauses=True):
    """A program of single lines, without an error, of blocks in blocks, whose names are bound again
    and again; with `clauses`, also such as the line-by-line algorithm takes apart otherwise."""
    def name(scope):
        return f"{scope}{rng.randrange(4)}"

    def block(indent, scope):
        lines = [f"{indent}{name(scope)} = {name(scope)}" for _ in range(rng.randrange(1, 4))]
        for _ in range(rng.randrange(3) if len(indent) < 12 else 0):
            header = rng.choice(HEADERS)
            lines.append(indent + header.format(name(scope), name(scope)))
            if header.endswith(":"):
                inner = scope if header[0] not in "dc" else chr(ord(scope) + 1)
                if inner != scope:
                    lines += [f"{indent}    {inner}{i} = {i}" for i in range(4)]
                lines += block(indent + "    ", inner)
                if clauses and header.startswith("if"):
                    for clause in ("elif {0}:", "else:")[rng.randrange(3):]:
                        lines.append(indent + clause.format(name(scope)))
                        lines += block(indent + "    ", scope)
        return lines

    return "\n".join([f"a{i} = {i}" for i in range(4)] + block("", "a"))


def test_clean_on_random_programs():
    rng = random.Random(4)
    for seed in range(150):
        source = random_program(rng)
        check_sequence(source, lintseq.lintseq(source, random.Random(seed)))


STATEMENTS = """{a} = {b}|print({a} + {b})|print([{a} for {b} in {a}])|del {a}|{a}: {b}|{a}: '{b}'
{a}: {b} = {a}|import {a}|import {a} as {b}|from m import {a}|from m import *|global {a}
{a} += {b}|nonlocal {a}|return {a}|({a} := {b})|(lambda {a}={b}: {a})|x = {a}; {b} = x; del {a}
__all__ = ['{a}']|__all__ += ['{a}', '{b}']|from typing import cast|from typing import cast as {a}
import typing as {a}|cast('{a}', {b})|{a}.cast('{b}', 1)|{a}('{b}', 1)|pass
def f({a}: '{b}' = {a}): pass""".replace("\n", "|").split("|")
COMPOUND = """if {a}:|if {a}: del {a}|for {a} in {b}:|with {a} as {b}:|def {a}({b}={a}):
def {a}() -> {b}:|class {a}({b}):|class {a}:|while ({a} := {b}):|try:;except NameError as {a}:
try:;except (OSError, NameError):;else:|try:;except {b} as {a}:;except OSError as {b}:|try:;finally:
if {a}:;else:|for {a} in {b}:;else:""".replace("\n", "|").split("|")


def entangled_program(rng):
    """A program of few names that are bound in every way there is, in any scope."""
    names = rng.choice(["ab", "abc", ["a", "cast"], ["a", "len", "b"], ["a", "__all__"]])

    def fill(text):
        return text.format(a=rng.choice(names), b=rng.choice(names))

    def block(depth):
        lines = []
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.6 or depth > 3:
                lines.append("    " * depth + fill(rng.choice(STATEMENTS)))
                continue
            for header in rng.choice(COMPOUND).split(";"):
                lines.append("    " * depth + fill(header))
                if header.endswith(":"):
                    lines += block(depth + 1)
        return lines

    future = ["from __future__ import annotations"] * (rng.random() < 0.2)
    return "\n".join([*future, *block(0), *block(0), *block(0), "z = 1"])


def test_clean_on_random_programs_of_entangled_names():
    rng, tried = random.Random(5), 0
    while tried < 400:
        source = entangled_program(rng)
        try:
            ast.parse(source)
        except SyntaxError:
            continue
        tried += 1
        for seed in range(3):
            check_sequence(source, lintseq.lintseq(source, random.Random(seed)))


def naive(lines, present, drawn):
    """The algorithm as the paper states it, by indentation and whole-program linting, for programs
    without statements over several lines: what is left after line `drawn` was deleted."""
    def below(i, alive):
        indent = lambda k: len(lines[k]) - len(lines[k].lstrip())
        gone = {i}
        for k in (k for k in alive if k > i):
            if indent(k) <= indent(i):
                break
            gone.add(k)
        return gone
    alive = [k for k in present if k not in below(drawn, present)]
    while alive:
        text = [lines[k] for k in alive]
        try:
            bad = [alive[line - 1] for line, _ in lintseq.lint("\n".join(text))]
        except SyntaxError as e:  # a block that was left empty: its header is the error
            bad = [alive[int(re.search(r"on line (\d+)", e.msg)[1]) - 1]]
        if not bad:
            break
        for i in bad:
            alive = [k for k in alive if k not in below(i, alive)]
    return alive


def test_equals_the_paper_s_algorithm_where_statements_are_single_lines():
    """Nothing is deleted that neither indentation nor the linter asked for, and nothing is left
    that they did: of each edit, one of its lines was drawn."""
    rng = random.Random(3)
    for seed in range(40):
        lines = [f"{line}  # {i}" for i, line in enumerate(random_program(rng, False).split("\n"))]
        left = []
        for edit in lintseq.lintseq("\n".join(lines), random.Random(seed)):
            new = sorted(lines.index(line[1:]) for line in edit.split("\n") if line[0] == "+")
            state = sorted(left + new)
            assert any(naive(lines, state, drawn) == left for drawn in new)
            left = state


def test_lines_are_drawn_uniformly():
    """The frequency of each sequence against its probability by enumeration."""
    source = "a = 1\nb = 2\nif a:\n    b = a\n    c = 3\nprint(b)"
    lines = source.split("\n")

    def enumerate_from(present, p, path, table):
        if not present:
            table[tuple(path)] += p
        for i in present:
            left = naive(lines, present, i)
            gone = tuple(k for k in present if k not in left)
            enumerate_from(left, p / len(present), path + [gone], table)

    expected, n = Counter(), 20_000
    enumerate_from(list(range(6)), 1.0, [], expected)
    assert len(expected) > 30 and abs(sum(expected.values()) - 1) < 1e-9
    seen, rng = Counter(), random.Random(7)
    for _ in range(n):
        seen[tuple(tuple(sorted(lines.index(x[1:]) for x in edit.split("\n") if x[0] == "+"))
                   for edit in reversed(lintseq.lintseq(source, rng)))] += 1
    assert set(seen) <= set(expected)
    chi2 = sum((seen[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5  # five standard deviations


def test_statements_over_several_lines_come_whole():
    source = "import os\n\n@os.register_at_fork\ndef f(a,\n      b):\n" \
        "    x = [a,\n         b]\n    return x\n"
    for seed in range(30):
        for edit in lintseq.lintseq(source, random.Random(seed)):
            for whole in (("@os", "+def f", "+      b"), ("+    x", "+         b]")):
                assert len({part in edit for part in whole}) == 1


def test_a_module_used_by_another_name_is_used():
    """Then the same name in a function is a local read too early (UndefinedLocal)."""
    source = ("from datetime import datetime\nimport datetime as dt\ndef f():\n"
              "    x = dt.now()\n    datetime = x\nz = 1\n")
    for seed in range(20):
        check_sequence(source, lintseq.lintseq(source, random.Random(seed)))


def test_lines_broken_from_the_start_come_last():
    source = "x = 1\nprint(y)\nz = x\nif q:\n    z = 2"
    for seed in range(10):
        edits = lintseq.lintseq(source, random.Random(seed))
        broken = {"+print(y)", "+if q:", "+    z = 2"}  # with the first line drawn
        assert broken <= set(edits[-1].split("\n"))
        assert not broken & set("\n".join(edits[:-1]).split("\n"))
        check_sequence(source, edits)


@pytest.mark.parametrize("source, errors", [
    ("print(x)", 1), ("def f():\n    print(x)\n    x = 1\n", 1),
    ("x = 1\ndef f():\n    print(x)\n    x = 2\n", 1),
    ("return 1", 1), ("__all__ = ['x']", 1), ("import os", 0), ("def f():\n    x = 1\n", 0),
    ("'%s %s' % (1,)", 0),
    ("def f(): pass\ndef f(): pass", 0), ("f''", 0), ("break", 1), ("x: 'a b' = 1", 1)])
def test_what_counts_as_an_error(source, errors):
    try:
        assert len(lintseq.lint(source)) == errors
    except SyntaxError:
        assert errors


def test_where_pyflakes_itself_fails_that_is_an_error():
    source = "from os import __all__\n__all__ += ['x']\n"
    with pytest.raises((AttributeError, AssertionError)):
        lintseq.lint(source)
    assert sample.has_errors(source)


def test_the_linter_is_pyflakes():
    found = 0
    for source in stdlib_sources(20, 1, 300, seed=3) + list(TRICKY.values()):
        source = re.sub(r"^(import|from|def) .*$", "pass", source, count=2, flags=re.M)
        try:
            theirs = errors(source)
        except SyntaxError:
            continue
        assert len(lintseq.lint(source)) == len(theirs)
        assert all(any(text in x for x in theirs) for line, text in lintseq.lint(source))
        found += len(theirs)
    assert found > 50


# -- What a model writes ---------------------------------------------------------------------------

@pytest.mark.parametrize("text, program, malformed", [
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1,0 +2 @@\n+c\n<|diff|>\n<|diff|>", "a\nc\nb", 0),
    ("@@ -0,0 +1,2 @@\n+a\n+b\n@@ -9,0 +3 @@\n+c", "a\nb", 1),  # out of range
    ("@@ -0,0 +1,3 @@\n+a\n+b", "a\nb", 1),  # cut off
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1 +1 @@\n-a\n+c", "c\nb", 0),  # a model's
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1,2 +0,0 @@\n-a\n-b", "", 0),
    ("@@ -0,0 +1 @@\n+a\n<|diff|>@@ -1 +1 @@\n-other\n+c", "c\na", 1),  # nothing to delete
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -0,0 +1 @@\n+x\n@@ -1,0 +3 @@\n+y\n@@ -2,0 +5 @@\n+z",
     "x\na\ny\nb\nz", 0),
    ("@@ -0,0 @@\n+a", "", 1), ("hello", "", 1), ("", "", 0), ("@@ -0,0 +1 @@\n+a\nnoise", "a", 1),
    ("@@ -0,0 +1,2 @@\n+a\n+\n<|diff|>", "a\n", 0),
    ("@@ -0,0 +1,2 @@\n+a<|endoftext|>@@ -0,0 +1 @@\n+b\n<|diff|><|endoftext|>",
     "a<|endoftext|>@@ -0,0 +1 @@\nb", 0),
    ("<|diff|>@@ -0,0 +1,2 @@\n+a<|diff|>\n+<|diff|>b\n"
     "<|diff|>@@ -2,0 +3 @@\n+c<|diff|><|endoftext|>",
     "a<|diff|>\n<|diff|>b\nc<|diff|>", 0)])
def test_apply_edits(text, program, malformed):
    assert lintseq.apply_edits(text) == program
    assert lintseq.apply_and_count(text)[1]["malformed"] == malformed


PIECES = st.sampled_from([
    "@@ -0,0 +1 @@", "@@ -1,0 +2,2 @@", "@@ -3 +3 @@", "+a", "-a", " a", "+", "@@",
    "@@ -99999999999,0 +1 @@", DIFF, "\n", "\n", "\n", EOT, "x", "\r", "\0"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=60).map("".join))
def test_apply_edits_never_raises(text):
    program, report = lintseq.apply_and_count(text)
    assert program == lintseq.apply_edits(text)
    assert 0 <= report["malformed"] <= report["hunks"] + report["edits"]


SOURCES = stdlib_sources(25, 5, 60, seed=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SOURCES), st.integers(0, 2 ** 32), st.data())
def test_mutated_edits_are_applied_as_far_as_they_go(source, seed, data):
    try:
        text = response(*lintseq.lintseq(source, random.Random(seed)))
    except ValueError:
        return
    assert lintseq.apply_edits(text) == source
    cut = data.draw(st.integers(0, len(text)))
    state = lintseq.apply_edits(text[:cut])
    whole = text[:cut].rfind("\n" + DIFF)
    if whole >= 0:  # the edits before the cut are all there
        rest = iter(state.split("\n"))
        assert all(line in rest for line in lintseq.apply_edits(text[:whole]).split("\n"))
    at = data.draw(st.integers(0, len(text)))
    rest = text[at + data.draw(st.integers(0, 9)):]
    lintseq.apply_and_count(text[:at] + data.draw(st.text(max_size=5)) + rest)


def test_a_megabyte_of_noise_is_no_matter():
    rng = random.Random(0)
    pieces = ["@@ -1,0 +2 @@\n", "+x\n", "-x\n", DIFF, "y" * 50, "\n"]
    noise = "".join(rng.choice(pieces) for _ in range(120_000))
    assert len(noise) > 10 ** 6
    program, report = lintseq.apply_and_count(noise)
    assert report["malformed"] > 1000


# -- In bulk ---------------------------------------------------------------------------------------

@pytest.fixture
def rows(tmp_path):
    rng = random.Random(2)
    lines = [json.dumps({"instruction": f"row {i}", "response": random_program(rng)})
             for i in range(300)]
    lines[7] = '{"instruction": "row 7", "response": "x = ("}'
    lines[8] = '{"instruction": "row 8"}'
    lines[9] = '{"instruction": '
    lines[10] = '{"instruction": "row 10 \\ud800", "response": "x = 1"}'
    lines[11] = "  "
    lines[20] = json.dumps({"instruction": f"row 20 {DIFF}\n{DIFF}{EOT}",
                            "response": f"x = '''\n{DIFF}\n{EOT}'''\ny = x"})
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def convert(rows, dest, *args, ranks=1):
    return run("lintseq.py", *ARGS, f"--dest={dest}", *args, cwd=rows, ranks=ranks)


def convert_here(rows, *args):
    """The same into out.jsonl by one worker, in this process."""
    return call("lintseq.py", *ARGS, "--dest=out.jsonl", "--workers=1", *args, cwd=rows)


ARGS = ("--source=in.jsonl", "--samples=3", "--seed=4")


def test_bulk_rows_are_the_published_ones_and_the_same_for_any_workers(rows):
    status, out, err = convert(rows, "one.jsonl", "--workers=1")
    assert status == 0 and "299 rows" in out and "295 programs" in out, err
    (rows / "in.jsonl.gz").write_bytes(gzip.compress((rows / "in.jsonl").read_bytes()))
    assert convert(rows, "two.jsonl", "--source=in.jsonl.gz", "--workers=2")[0] == 0
    assert (rows / "one.jsonl").read_bytes() == (rows / "two.jsonl").read_bytes()
    written = [json.loads(line) for line in open(rows / "one.jsonl")]
    source = [json.loads(line) if i not in (9, 11) else None
              for i, line in enumerate(open(rows / "in.jsonl", encoding="utf-8-sig"))]
    assert [r["index"] for r in written] == [
        i for i in range(300) if i not in range(7, 12) for _ in range(3)]
    for r in written:
        assert set(r) == {"edit_path", "index", "source_instruction", "source_response"}
        assert r["source_instruction"] == source[r["index"]]["instruction"]
        assert r["source_response"] == source[r["index"]]["response"]
        assert lintseq.apply_edits(response(*r["edit_path"])) == r["source_response"]
    distinct = [len({tuple(r["edit_path"]) for r in written[i:i + 3]})
                for i in range(0, len(written), 3)]
    assert sum(distinct) / len(distinct) > 2.9  # repeats are drawn again
    skipped = {r["index"]: r["reason"]
               for r in map(json.loads, open(rows / "one.jsonl.skipped.jsonl"))}
    assert set(skipped) == {7, 8, 9, 10} and "never closed" in skipped[7]
    assert "response" in skipped[8] and "UTF-8" in skipped[10]
    status, again, err = convert(rows, "one.jsonl")  # complete: nothing new
    assert status == 0 and again == out
    assert (rows / "one.jsonl").read_bytes() == (rows / "two.jsonl").read_bytes()
    edits = sum(len(r["edit_path"]) for r in written)
    assert f"{edits:,} edits" in out
    with open(rows / "one.jsonl", "a") as f:  # what a user adds to it stays
        f.write("{}\n")
    assert convert(rows, "one.jsonl")[0] == 0
    assert (rows / "one.jsonl").read_bytes() == (rows / "two.jsonl").read_bytes() + b"{}\n"
    assert "1 skipped: not JSON" in out and "1 skipped: does not parse" in out


@pytest.mark.parametrize("args, status, message", [
    (("--method=randseq",), 1, "is of other settings"), (("--method=x",), 2, "lintseq or randseq"),
    (("--samples=0",), 2, "samples"), (("--workers=-1",), 2, "workers"),
    (("--seed=-1",), 2, "seed"), (("--dest=in.jsonl",), 1, "not as a run left it"),
    (("--dest=in.jsonl/out.jsonl",), 1, "in.jsonl"),
    (("--source=none",), 1, "No such file or directory: 'none'"),
    (("--dest=kept.txt",), 1, "not as a run left it"),
    (("--dest=broken",), 1, "not as a run left it"), (("--dest=cut",), 1, "not as a run left it")])
def test_a_mistake_is_told_in_one_line_and_touches_nothing(rows, args, status, message):
    (rows / "in.jsonl").write_text('{"instruction": "f", "response": "x = 1"}\n')
    assert convert_here(rows)[0] == 0
    (rows / "kept.txt").write_text("no output")
    (rows / "broken.state.json").write_text('{"')
    (rows / "cut.state.json").write_bytes((rows / "out.jsonl.state.json").read_bytes())
    for name in ("in.jsonl", "kept.txt", "broken", "cut"):
        (rows / name).touch()
        (rows / f"{name}.skipped.jsonl").touch()
    before = {p: p.read_bytes() for p in rows.iterdir()}
    found, out, err = convert_here(rows, *args)
    assert found == status and message in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in rows.iterdir()}


def test_a_source_that_changed_is_noticed(rows):
    """Also where it is as long as before: what it was made into is not taken for what it is now."""
    (rows / "in.jsonl").write_text('{"instruction": "f", "response": "x = 1"}\n')
    assert convert_here(rows)[0] == 0
    before = (rows / "out.jsonl").read_bytes()
    (rows / "in.jsonl").write_text('{"instruction": "f", "response": "x = 2"}\n')
    status, out, err = convert(rows, "out.jsonl", "--workers=1")  # as users start it
    assert status == 1 and "is of other settings" in err and err.count("\n") == 1
    assert (rows / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("name, content", [
    ("in.jsonl", b""), ("in.jsonl", b"\n"), ("in.jsonl", b'{"prompt": 1}\n'),
    ("in.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9]), ("in.gz", b"{}"),
    ("in.parquet", b"PAR1")])
def test_a_source_without_a_program_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if not content:  # as users start it, with workers
        status, out, err = run("lintseq.py", f"--source={name}", "--dest=out", cwd=tmp_path)
    else:
        status, out, err = call("lintseq.py", f"--source={name}", "--dest=out", "--workers=1",
                                cwd=tmp_path)
    assert status == 1 and "Traceback" not in err
    assert f"{name} holds no program that can be written as edits" in err


def test_a_run_cut_short_goes_on_without_a_lost_or_doubled_row(rows):
    """By a full disk (here: a limit on the size of files), and by kill -9 at any moment."""
    source = (rows / "in.jsonl").read_text(encoding="utf-8-sig")
    (rows / "in.jsonl").write_text(source * 9)
    status, whole_out, err = convert(rows, "whole.jsonl")
    whole, skipped, state = ((rows / f"whole.jsonl{end}").read_bytes()
                             for end in ("", ".skipped.jsonl", ".state.json"))

    limit = (len(whole) // 9,) * 2
    process = start("lintseq.py", *ARGS, "--dest=cut.jsonl", "--workers=1", cwd=rows,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    out, err = process.communicate()
    assert process.returncode == 1 and "File too large" in err and "Traceback" not in err
    for part in (0.2, 0.5, 0.8):
        process = start("lintseq.py", *ARGS, "--dest=cut.jsonl", "--workers=2", cwd=rows)
        while (rows / "cut.jsonl").stat().st_size < len(whole) * part:
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        workers = children(process)
        status, out, err = convert(rows, "cut.jsonl")  # while the first is still there
        assert status == 1 and "locked" in err and err.count("\n") == 1
        process.kill()
        process.communicate()
        assert workers
    status, out, err = convert(rows, "cut.jsonl", "--workers=1")
    assert status == 0 and out.replace("cut", "whole") == whole_out  # of all rows
    for end, content in (("", whole), (".skipped.jsonl", skipped), (".state.json", state)):
        assert (rows / f"cut.jsonl{end}").read_bytes() == content
    deadline = time.time() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they end with it
        assert time.time() < deadline
        time.sleep(0.1)


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_ranks_take_shares(rows):
    assert convert(rows, "all.jsonl")[0] == 0
    status, out, err = convert(rows, "part.jsonl", "--workers=1", ranks=2)
    assert status == 0, err
    parts = [line for r in (0, 1) for line in open(rows / f"part.jsonl.{r}-of-2")]
    assert sorted(parts) == sorted(open(rows / "all.jsonl"))


def test_a_file_is_shown_edit_by_edit(tmp_path):
    (tmp_path / "f.py").write_text("\ufeff" + TRICKY["elif"], encoding="utf-8")
    status, out, err = run("lintseq.py", "f.py", cwd=tmp_path)
    assert status == 0 and "--- edit 1 of " in out
    edits = re.split(r"--- edit .*\n", out)[1:]
    assert lintseq.apply_edits(DIFF.join(edits)) == TRICKY["elif"]
    (tmp_path / "g.py").write_text("x = (")
    (tmp_path / "h.py").write_bytes(b"x = '\xff'")
    for args, status, message in (
            (("nothing.py",), 1, "nothing.py"), (("f.py", "--method=x"), 2, "--method"),
            ((), 1, "name a Python file"), (("g.py",), 1, "g.py: '(' was never closed"),
            (("h.py",), 1, "h.py"), ((".",), 1, "directory"),
            (("--source=x", "--dest=y"), 1, "No such file"),
            (("--source=.", "--dest=y"), 1, "directory")):
        found, out, err = call("lintseq.py", *args, cwd=tmp_path)
        assert found == status and message in err and err.count("\n") == 1
