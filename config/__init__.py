"""Settings: a script's defaults <- config/file.py <- --key=value.

A script declares its settings once, on top, as a class: the default gives the type, the comment the help.

    class Settings:
        max_iters = 600_000  # optimizer steps

    cfg = config.load(Settings)      # python train.py config/150m.py --max_iters=20

A config file is plain assignments and describes one experiment: every script takes from it the keys that it
knows, so a key that no script knows is a typo and an error. Names that start with `_` are the file's own.
"""
import ast
import difflib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent


def declared(path):
    """{key: (default's source, comment)} of the `class Settings` in the script at `path`, in its order."""
    source = path.read_text(encoding="utf-8")
    found = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Settings"]
    lines = source.splitlines()
    return {a.targets[0].id: (ast.unparse(a.value), lines[a.end_lineno - 1][a.end_col_offset:].strip(" #"))
            for c in found for a in c.body if isinstance(a, ast.Assign)}


def typed(value, default):
    """`value` (text of the command line, or a config file's object) in the type of `default`; ValueError if it is not."""
    if isinstance(default, tuple):  # comma-separated on the command line
        value = [v for v in value.split(",") if v] if isinstance(value, str) else value
        return tuple(typed(v, default[0] if default else "") for v in value)
    if isinstance(default, bool):
        value = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    elif isinstance(default, int):  # 1e6 is one, 1.5 is not
        value = int(float(value)) if float(value).is_integer() else None
    elif isinstance(default, float):
        value = float(value)
    if type(value) is not type(default):
        raise ValueError
    return value


def load(settings, argv=None):
    """The settings as a namespace, from `settings`' defaults, the config file and the `--key=value`s in `argv`.

    Positional arguments go to `cfg.paths` where the script declares it, except a config/*.py file.
    Exits with one line and status 2 on an unknown key, a value of the wrong type or a missing file."""
    script = Path(sys.modules[settings.__module__].__file__)
    keys = {k: v for k, v in vars(settings).items() if not k.startswith("_")}
    every = {k for p in ROOT.glob("*.py") for k in declared(p)} | set(keys)
    cfg = SimpleNamespace(**keys)

    def fail(message):
        print(f"{script.name}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def put(key, value, where, known):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            fail(f"{where}: unknown key {key!r}; " + (f"the nearest is {near[0]!r}" if near else "--help lists the keys"))
        if key in keys:
            try:
                setattr(cfg, key, typed(value, keys[key]))
            except (ValueError, TypeError):
                fail(f"{where}: {key}={value!r} is not of type {type(keys[key]).__name__} (default {keys[key]!r})")

    overrides, paths = [], []
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ("-h", "--help"):
            print((sys.modules[settings.__module__].__doc__ or "").strip(), "\n\nkeys, as --key=value:")
            for key, (default, comment) in declared(script).items():
                print(f"  --{key}={default}".ljust(38), comment)
            raise SystemExit(0)
        if arg.startswith("--"):
            key, _, value = arg[2:].partition("=")
            bare = isinstance(keys.get(key), bool) and "=" not in arg  # --flag alone is --flag=True
            if "=" not in arg and not bare and key in keys:
                fail(f"{arg}: no value; write {arg}={keys[key]!r}")
            overrides.append((key.replace("-", "_"), "True" if bare else value))
        elif arg.endswith(".py") and (Path(arg).resolve().parent.name == "config" or "paths" not in keys):
            if not Path(arg).is_file():
                near = difflib.get_close_matches(arg, [f"config/{p.name}" for p in ROOT.glob("config/[!_]*.py")], 1)
                fail(f"{arg}: no such config file" + (f"; the nearest is {near[0]}" if near else ""))
            names = {"__name__": "config"}
            try:
                exec(compile(Path(arg).read_text(encoding="utf-8"), arg, "exec"), names)
            except Exception as e:
                fail(f"{arg}: {type(e).__name__}: {e}")
            for key, value in names.items():
                if not key.startswith("_") and not isinstance(value, ModuleType):
                    put(key, value, arg, every)
        elif "paths" in keys:
            paths.append(arg)
        else:
            fail(f"{arg}: not a config file (config/*.py) nor --key=value")
    for key, value in overrides:
        put(key, value, f"--{key}", keys)
    if paths:
        cfg.paths = tuple(paths)
    return cfg
