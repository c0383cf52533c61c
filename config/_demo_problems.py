"""The demo's instruction data: problems made by a procedure, and pairs from the standard library.

The family of problems is filter x map x reduce x finish over a list of integers, each an English
phrase and some lines of Python. It cannot be solved by copying: the instruction holds no code, and
a composition (which filter, map, reduction and finish, whatever their constants) that is held out
never stands in the training data, so that its program is nowhere to be found; only the constants
and names are copied, and to the places where they belong.
"""
import ast
import random
import re
import sysconfig
from pathlib import Path

import config
import lintseq

# {k}: a constant, {a}: the argument, {x}: an item, {y}: what the map makes of it, {r}: the result
HELPERS = {
    "is_prime": "def is_prime(n):\n    return n > 1 and all(n % d for d in range(2, n))\n",
    "digit_sum": "def digit_sum(n):\n    return sum(int(d) for d in str(abs(n)))\n",
    "collatz": "def collatz(n):\n    if n % 2 == 0:\n        return n // 2\n    return 3 * n + 1\n",
}
FILTERS = {  # phrases, condition
    "even": (("takes the even numbers in {a}", "keeps what is even in {a}"), "{x} % 2 == 0"),
    "odd": (("takes the odd numbers in {a}", "keeps what is odd in {a}"), "{x} % 2 == 1"),
    "positive": (("takes the positive numbers in {a}", "keeps what is above zero in {a}"),
                 "{x} > 0"),
    "negative": (("takes the negative numbers in {a}", "keeps what is below zero in {a}"),
                 "{x} < 0"),
    "above": (("takes the numbers in {a} that are greater than {k}",
               "keeps what is above {k} in {a}"),
              "{x} > {k}"),
    "below": (("takes the numbers in {a} that are less than {k}", "keeps what is below {k} in {a}"),
              "{x} < {k}"),
    "multiple": (("takes the multiples of {k} in {a}", "keeps what is divisible by {k} in {a}"),
                 "{x} % {k} == 0"),
    "not_multiple": (("leaves out the multiples of {k} in {a}",
                      "keeps what is not divisible by {k} in {a}"),
                     "{x} % {k} != 0"),
    "not_equal": (("leaves out every {k} in {a}", "keeps what is not {k} in {a}"), "{x} != {k}"),
    "near": (("takes the numbers in {a} that are less than {k} away from zero",
              "keeps what is within {k} of zero in {a}, {k} not included"),
             "abs({x}) < {k}"),
    "prime": (("takes the prime numbers in {a}", "keeps what is prime in {a}"), "is_prime({x})"),
    "digits": (("takes the numbers in {a} whose digits add up to more than {k}",
                "keeps what has a digit sum above {k} in {a}"),
               "digit_sum({x}) > {k}"),
    "last_digit": (("takes the numbers in {a} that end in an even digit other than zero",
                    "keeps what is even but not divisible by 10 in {a}"),
                   "{x} % 2 == 0 and {x} % 10 != 0"),
    "all": (("takes all the numbers in {a}", "goes through {a}"), None),
}
MAPS = {  # phrases, value
    "double": (("doubles each", "takes each twice"), "{x} * 2"),
    "times": (("multiplies each by {k}", "takes each {k} times"), "{x} * {k}"),
    "plus": (("adds {k} to each", "increases each by {k}"), "{x} + {k}"),
    "minus": (("subtracts {k} from each", "decreases each by {k}"), "{x} - {k}"),
    "from": (("subtracts each from {k}", "takes {k} minus each"), "{k} - {x}"),
    "square": (("squares each", "multiplies each by itself"), "{x} * {x}"),
    "negate": (("negates each", "flips the sign of each"), "-{x}"),
    "absolute": (("takes the absolute value of each", "drops the sign of each"), "abs({x})"),
    "half": (("divides each by {k}, rounding down", "takes the whole part of each over {k}"),
             "{x} // {k}"),
    "modulo": (("takes each modulo {k}", "takes the remainder of each by {k}"), "{x} % {k}"),
    "cap": (("limits each to at most {k}", "cuts each down to {k}"), "min({x}, {k})"),
    "floor": (("raises each to at least {k}", "lifts each up to {k}"), "max({x}, {k})"),
    "digit_sum": (("replaces each by the sum of its digits", "adds up the digits of each"),
                  "digit_sum({x})"),
    "collatz": (("halves each that is even and makes the others three times as large plus one",
                 "takes the Collatz step of each"),
                "collatz({x})"),
    "distance": (("takes the distance of each from {k}", "measures how far each is from {k}"),
                 "abs({x} - {k})"),
}
REDUCES = {  # phrases, lines before the loop, lines for each value {y}, result, its type
    "sum": (("returns the sum", "adds them up"), ["total = 0"], ["total += {y}"], "total", "int"),
    "product": (("returns the product", "multiplies them together"),
                ["product = 1"], ["product *= {y}"], "product", "int"),
    "count_above": (("counts the results above {k}", "returns how many results exceed {k}"),
                    ["count = 0"], ["if {y} > {k}:", "    count += 1"], "count", "int"),
    "largest": (("returns the largest, or 0 if there is none above it",
                 "finds the maximum, starting from 0"),
                ["best = 0"], ["if {y} > best:", "    best = {y}"], "best", "int"),
    "smallest": (("returns the smallest, or 0 if there is none below it",
                  "finds the minimum, starting from 0"),
                 ["best = 0"], ["if {y} < best:", "    best = {y}"], "best", "int"),
    "alternate": (("returns the alternating sum, first plus then minus",
                   "adds and subtracts them in turn"),
                  ["total = 0", "sign = 1"],
                  ["total += sign * {y}", "sign = -sign"],
                  "total", "int"),
    "weighted": (("returns the sum of each times its place, counting from 1",
                  "adds them up, the first once, the second twice and so on"),
                 ["total = 0", "place = 1"],
                 ["total += place * {y}", "place += 1"],
                 "total", "int"),
    "horner": (("returns the result of adding each to {k} times what was there before",
                "folds them with factor {k}"),
               ["value = 0"], ["value = value * {k} + {y}"], "value", "int"),
    "last": (("returns the last one, or {k} if there is none", "gives the final one, or else {k}"),
             ["last = {k}"], ["last = {y}"], "last", "int"),
    "list": (("returns them as a list", "lists them"),
             ["result = []"], ["result.append({y})"], "result", "list"),
    "distinct": (("returns a list without repeats", "lists them, each only once"),
                 ["result = []"],
                 ["if {y} not in result:", "    result.append({y})"],
                 "result", "list"),
    "running": (("returns the running totals", "lists the sums so far"),
                ["total = 0", "result = []"],
                ["total += {y}", "result.append(total)"],
                "result", "list"),
    "steps": (("returns the differences from one to the next, starting from 0",
               "lists the change from each to the next, from 0 on"),
              ["before = 0", "result = []"],
              ["result.append({y} - before)", "before = {y}"],
              "result", "list"),
    "records": (("returns those greater than all before them and 0",
                 "lists the new records above 0"),
                ["best = 0", "result = []"],
                ["if {y} > best:", "    best = {y}", "    result.append({y})"],
                "result", "list"),
    "reverse": (("returns them in reverse order", "lists them backwards"),
                ["result = []"], ["result.insert(0, {y})"], "result", "list"),
}
FINISHES = {  # phrases, lines after the loop ({r}: the result), what is returned, type of result
    "plain": (("",), [], "{r}", "any"),
    "plus": ((", plus {k}", ", increased by {k}"), [], "{r} + {k}", "int"),
    "times": ((", times {k}", ", multiplied by {k}"), [], "{r} * {k}", "int"),
    "modulo": ((", modulo {k}", ", reduced modulo {k}"), [], "{r} % {k}", "int"),
    "absolute": ((", without its sign", ", as an absolute value"), [], "abs({r})", "int"),
    "cap": ((", but at most {k}", ", limited to {k}"),
            ["if {r} > {k}:", "    {r} = {k}"], "{r}", "int"),
    "negate": ((", negated", ", with its sign flipped"), [], "-{r}", "int"),
    "text": ((", as a string", ", turned into text"), [], "str({r})", "int"),
    "first": ((", only the first {k}", ", cut to length {k}"), [], "{r}[:{k}]", "list"),
    "sorted": ((", sorted", ", in increasing order"), ["{r}.sort()"], "{r}", "list"),
    "append": ((", with {k} at the end", ", followed by {k}"), ["{r}.append({k})"], "{r}", "list"),
    "length": ((", and of that only the length", ", and of that how many there are"),
               [], "len({r})", "list"),
    "skip": ((", without the first", ", all but the first"), [], "{r}[1:]", "list"),
    "default": ((", or [{k}] if nothing is left", ", or else [{k}]"),
                ["if not {r}:", "    {r} = [{k}]"], "{r}", "list"),
    "joined": ((", joined by spaces", ", as text with spaces between"),
               [], '" ".join(str(x) for x in {r})', "list"),
}
NAMES = "solve compute process combine answer convert collect handle".split()
ARGUMENTS = "nums values items data numbers".split()


def family_compositions():
    """Every (filter, map, reduce, finish) whose types fit: 25,200, in a fixed order."""
    return [(f, m, r, e) for f in FILTERS for m in MAPS for r in REDUCES for e in FINISHES
            if FINISHES[e][3] in ("any", REDUCES[r][4])]


def family_program(composition, name, argument, constants):
    """The program of one composition; constants: of the filter, map, reduction and finish."""
    # keys of FILTERS, MAPS, REDUCES, FINISHES, and the constant {k} of each
    (f, m, r, e), (kf, km, kr, ke) = composition, constants

    def fill(text, k):
        return text.format(x="x", y="y", a=argument, k=k, r=REDUCES[r][3])

    inner = [f"y = {fill(MAPS[m][1], km)}"] + [fill(line, kr) for line in REDUCES[r][2]]
    if FILTERS[f][1]:
        inner = [f"if {fill(FILTERS[f][1], kf)}:"] + ["    " + line for line in inner]
    body = [fill(line, kr) for line in REDUCES[r][1]]
    body += [f"for x in {argument}:"] + ["    " + line for line in inner]
    body += [fill(line, ke) for line in FINISHES[e][1]] + [f"return {fill(FINISHES[e][2], ke)}"]
    program = "\n    ".join([f"def {name}({argument}):"] + body)
    helpers = [code + "\n" for helper, code in HELPERS.items() if helper + "(" in program]
    return "".join(helpers) + program


def family_problem(composition, rng):
    """{instruction, response, entry_point, test} of one composition: names, constants and phrases
    drawn by `rng`, the assertions computed by running the program."""
    name, argument, finish = rng.choice(NAMES), rng.choice(ARGUMENTS), composition[3]
    constants = [rng.randint(2, 20) for _ in range(3)]
    constants.append(rng.randint(2, 4 if finish == "first" else 20))
    phrases = [rng.choice(table[key][0]).format(a=argument, k=k) for table, key, k in
               zip((FILTERS, MAPS, REDUCES, FINISHES), composition, constants)]
    program, namespace = family_program(composition, name, argument, constants), {}
    exec(program, namespace)  # ours, not a model's
    lists = [[]] + [[rng.randint(-12, 30) for _ in range(rng.randint(3, 9))] for _ in range(9)]
    return {
        "instruction": f"Write a Python function `{name}({argument})` that "
                       f"{phrases[0]}, {phrases[1]} and {phrases[2]}{phrases[3]}.",
        "response": program, "entry_point": name,
        "test": "".join(f"assert {name}({x}) == {namespace[name](list(x))!r}\n" for x in lists)}


def family(size, heldout, seed):
    """(`size` training pairs, `heldout` problems). What is held out shares no composition with
    training, and no program that is the same but for its constants (doubling and multiplying by k
    are such) either. Training takes its compositions in turn."""
    rng, groups = random.Random(seed), {}
    for c in family_compositions():
        groups.setdefault(re.sub(r"\d+", "", family_program(c, "f", "a", [0] * 4)), []).append(c)
    groups = list(groups.values())
    if heldout >= len(groups):
        config.die(f"--family_heldout={heldout}: the family has {len(groups):,} kinds of problems, "
                   "and some are to train on", 2)
    rng.shuffle(groups)
    test = [rng.choice(group) for group in groups[:heldout]]
    train = [c for group in groups[heldout:] for c in group]
    rng.shuffle(train)
    pairs = [family_problem(train[i % len(train)], rng) for i in range(size)]
    problems = [{"task_id": f"family/{i}", **family_problem(c, rng)}
                for i, c in enumerate(test)]
    return ([{key: p[key] for key in ("instruction", "response")} for p in pairs],
            [{**p, "canonical_solution": p.pop("response")} for p in problems])


def family_pairs(cfg):
    """The family's pairs to train on; the held-out problems go to cfg.benchmark, unless that holds
    others: then die."""
    pairs, problems = family(cfg.family_size, cfg.family_heldout, cfg.seed)
    path = Path(cfg.benchmark)
    if path.is_file() and [row for _, row in config.read_rows(path)] != problems:
        config.die(f"{path} holds other problems: delete it, or choose another --benchmark")
    config.write_jsonl(path, problems)
    return pairs


def stdlib_files():
    """The files of this Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def imports_of(tree):
    """{name: the line that binds it} of a module's absolute imports."""
    imports = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            for alias in node.names:
                one = (ast.Import([alias]) if isinstance(node, ast.Import)
                       else ast.ImportFrom(node.module, [alias], 0))
                imports[alias.asname or alias.name.split(".")[0]] = ast.unparse(one) + "\n"
    return imports


def stdlib_pairs(most_lines=10):
    """Yield {instruction, response} from the standard library: each module-level function that has
    a docstring and needs nothing but builtins and imports, as "docstring to function", without its
    docstring, with the imports, where that is up to `most_lines` (the demo's block_size would cut
    longer ones)."""
    seen = set()
    for path in stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
            tree, lines = ast.parse(text), text.split("\n")
        except (SyntaxError, ValueError):
            continue
        imports = imports_of(tree)
        for node in tree.body:
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not doc or not doc.isascii() or node.decorator_list or len(node.body) < 2:
                continue
            summary, first = " ".join(doc.split("\n\n")[0].split()), node.body[0]
            code = "\n".join(lines[node.lineno - 1:first.lineno - 1]
                             + lines[first.end_lineno:node.end_lineno])
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(imports)
            code = "".join(imports[name] for name in sorted(used)) + ("\n" if used else "") + code
            if code.count("\n") >= most_lines or len(summary) < 20:
                continue
            body = ast.dump(ast.Module(node.body[1:], []))
            try:
                clean = "Global(" not in body and not lintseq.lint(code)
            except SyntaxError:
                continue
            if clean and body not in seen:
                seen.add(body)
                signature = f"{node.name}({ast.unparse(node.args)})"
                yield {"instruction": f"Write a Python function `{signature}`: {summary}",
                       "response": code}
