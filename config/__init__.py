"""What every script shares: settings, ranks, rows of files, workers, and how a script ends.

Settings are a script's defaults <- config/file.py <- --key=value. A script declares them on top:

    class Settings:
        max_iters = 600_000  # optimizer steps
        decay: Literal["cosine", "linear"] = "cosine"  # of the learning rate
        top_p: (0, 1) = 0.95  # nucleus

    cfg = config.load(Settings)      # python train.py config/150m.py --max_iters=20

The default gives the type, the comment the help; the annotation, where there is one, the words that
a text can be, or the least (and the most) that a number can be. Other numbers are at least 0, and
other counts at most LARGEST: what is larger is a typo that ends in an overflow somewhere.

A config file is plain assignments and describes one experiment: every script takes from it the
keys that it knows, so a key that no script knows is a typo and an error. Names that start with `_`
are the file's own.
"""
import difflib
import fcntl
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2 ** 31 - 1

# -- Ranks: torchrun's variables, else those that srun gives each task of a step -------------------

if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a batch script has none
    # of "gpu[03-04,7]" the first is gpu03, where the ranks meet; "2(x2)" is 2 on each of two
    _node, _number = re.match(r"([^\[,]+)\[?(\d*)", os.environ["SLURM_STEP_NODELIST"]).groups()
    _per_node = re.match(r"\d+", os.environ["SLURM_STEP_TASKS_PER_NODE"])[0]
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"], LOCAL_WORLD_SIZE=_per_node)
    os.environ.setdefault("MASTER_ADDR", _node + _number)
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000))
try:
    RANK = int(os.environ.get("RANK", 0))
    WORLD = int(os.environ.get("WORLD_SIZE", 1))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
    _local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not 0 <= RANK < WORLD or _local_world < 1:
        raise ValueError(f"rank {RANK} of {WORLD}, {_local_world} on this machine")
except ValueError as e:
    sys.exit(f"the environment's RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is wrong: {e}")
_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CPUS = max(1, _cpus // _local_world)  # for this rank alone


def die(message, status=1):
    """End the script with one line that says what is wrong, where, and how to mend it."""
    who = Path(sys.argv[0]).name + (f": rank {RANK}" if RANK else "")
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def say(line):
    """Print a line, on rank 0 alone, and at once."""
    if RANK == 0:
        print(line, flush=True)


FAULTS = {  # a pattern in what torch's RuntimeErrors and IndexErrors say: how a user mends it
    "out of memory|allocate memory":
        "out of memory: halve --micro_batch (of train.py; it changes no result) or --decode_batch "
        "(of evaluate.py), or take a smaller model",
    "index out of range in self|Target .* out of bounds|index out of bounds:|device-side assert":
        "the data holds numbers that its meta.json's vocab_size does not: prepare it again",
    "No working C": "torch.compile wants a C++ compiler (g++): install one, or --compile=no",
    "by peer|Broken pipe|imed out":
        "another rank has ended: the same command goes on from the last save"}


def run(main):
    """Run a script's main(). What a user has caused or can mend (Ctrl-C, a full disk, no network, a
    package that is not installed) ends the script with one line, not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # another encoding than UTF-8 lacks some letters
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.simplefilter("ignore", SyntaxWarning)  # what the parser says of others' programs
    try:
        main()
    except KeyboardInterrupt:
        die("stopped; the same command goes on from what is saved", 130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141)  # as of a program that SIGPIPE ends: the work is not done
    except BrokenProcessPool:
        die("a worker was killed (out of memory?): the same command goes on, with fewer --workers")
    except ModuleNotFoundError as e:  # an optional one
        die(f"this needs a package that is not installed: pip install {e.name}")
    except OSError as e:  # a full disk, no right to write, no network
        die(f"{e}; what is written so far is kept")
    except (RuntimeError, IndexError) as e:
        for pattern, line in FAULTS.items():
            if re.search(pattern, str(e)):
                die(line)
        raise


def pick_device(name):
    """A device's name; for "auto" cuda, mps or cpu, the first that there is."""
    if name != "auto":
        return name
    import torch  # here: --help and a wrong key need not wait for it
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def read_cpu_seconds():
    """Seconds that the CPUs which we may use have been busy, and those of this process."""
    ours, ticks = {f"cpu{n}" for n in os.sched_getaffinity(0)}, 0
    with open("/proc/stat") as f:
        for name, *times in map(str.split, f):
            if name in ours:
                user, nice, system, _, _, irq, softirq, *_ = map(int, times)
                ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


_last_look = None  # of adapt_threads: when, what read_cpu_seconds said, torch's own threads


def adapt_threads():
    """Let torch compute with one thread less for each core that other processes keep busy: a thread
    whose core is taken holds up all others. To be called now and then in long work; once a second
    it looks. It does nothing where the user has set OMP_NUM_THREADS, or without Linux's /proc/stat.

    Measured by tests/bench/beside.py. Another number of threads changes at most last bits."""
    global _last_look
    now = time.monotonic()
    if "OMP_NUM_THREADS" in os.environ or _last_look and now - _last_look[0] < 1:
        return
    import torch
    try:
        busy, own = read_cpu_seconds()
    except (OSError, AttributeError):
        return
    if not _last_look:
        _last_look = now, busy, own, torch.get_num_threads()
        return
    then, busy_then, own_then, most = _last_look
    _last_look = now, busy, own, most
    others = (busy - busy_then - (own - own_then)) / (now - then)
    threads = min(most, max(1, _cpus - round(others)))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


# -- Settings --------------------------------------------------------------------------------------

def read_settings(path):
    """{key: (default, comment)} of the script at `path`, from the lines of its `class Settings`,
    each `key = default  # comment`. They are read as text: to import every script takes seconds."""
    body = path.read_text(encoding="utf-8").partition("\nclass Settings:")[2]
    body = re.split(r"\n(?=\S)", body)[0]
    return {key: (default, comment) for key, default, comment
            in re.findall(r"^    (\w+).*? = (.*?)(?:  # (.*))?$", body, re.M)}


def describe(allowed):
    """A key's words or range, in words."""
    if isinstance(allowed[0], str):
        return " or ".join(filter(None, allowed))
    least, most = (*allowed, math.inf)[:2]
    return f"at least {least}" + (f" and at most {most}" if most < math.inf else "")


SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def convert(value, default, allowed=None):
    """`value` (text of the command line, or a config file's object) in the type of `default`.
    ValueError, with what it should be, where it does not fit that or what is `allowed`."""
    if isinstance(default, tuple):  # comma-separated on the command line
        values = [v for v in value.split(",") if v] if isinstance(value, str) else value
        values = values if isinstance(values, (list, tuple)) else [values]
        if default and not values:
            raise ValueError(f"is no list like {default!r}")
        return tuple(convert(v, default[0] if default else "", allowed) for v in values)
    kind, text = type(default), str(value).lower()
    try:
        if kind is bool:
            value = SWITCH[text]
        elif kind is float:
            value = float(text)
        elif kind is int:  # 1e6 is one, 1.5 is not
            number = int(text) if text.isdecimal() else float(text)
            value = int(number) if number == int(number) else None
        elif allowed and "yes" in allowed and text in SWITCH:  # --compile=True means yes
            value = "yes" if SWITCH[text] else "no"
    except (KeyError, ValueError, OverflowError):
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"is not of type {kind.__name__} (default {default!r})")
    if kind in (int, float):
        allowed = (*(allowed or (0,)), LARGEST if kind is int else math.inf)[:2]
        fits = allowed[0] <= value <= allowed[1] and value < math.inf
    else:
        fits = not allowed or value in allowed
    if not fits:
        raise ValueError(f"is not {'finite and ' * (value == math.inf)}{describe(allowed)}")
    return value


def nearest(word, words):
    """The end of a message on a word that is not among `words`."""
    near = [w for w in sorted(words) if word and w.startswith(word)]
    near = near or difflib.get_close_matches(word, words, 1)
    return f"; the nearest is {near[0]!r}" if near else ""


def load(settings, argv=None):
    """The settings as a namespace: `settings`' defaults, then the config file, then --key=value.

    Positional arguments go to `cfg.paths` where the script declares it, except a config/*.py file.
    Exits with one line and status 2 on an unknown key, a value that does not fit, no such file."""
    module = sys.modules[settings.__module__]
    defaults = {k: v for k, v in vars(settings).items() if not k.startswith("_")}
    known_keys = set(defaults).union(*map(read_settings, ROOT.glob("[a-z]*.py")))  # of all scripts
    allowed = {k: get_args(v) or v for k, v in settings.__annotations__.items()}
    cfg = SimpleNamespace(**defaults)

    def set_key(key, value, where, known):
        if key not in known:
            die(f"{where}: unknown key {key!r}"
                + (nearest(key, known) or "; --help lists the keys"), 2)
        if key in defaults:
            try:
                setattr(cfg, key, convert(value, defaults[key], allowed.get(key)))
            except ValueError as e:
                die(f"{where}: {key}={value!r} {e}", 2)

    argv = sys.argv[1:] if argv is None else argv
    for arg in sorted(argv, key=lambda arg: arg.startswith("-")):  # config files first
        if arg in ("-h", "--help"):
            print((module.__doc__ or "").strip(), "\n\nkeys, as --key=value:")
            for key, (default, comment) in read_settings(Path(module.__file__)).items():
                limits = f" ({describe(allowed[key])})" if key in allowed else ""
                print(f"  --{key}={default}".ljust(38), comment + limits)
            raise SystemExit(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            is_switch = isinstance(defaults.get(key), bool) or "yes" in allowed.get(key, ())
            if key in defaults and not equals and not is_switch:
                die(f"{arg}: no value; write {arg}={defaults[key]!r}", 2)
            value = value if equals else "True"  # --flag is --flag=True
            set_key(key, value, f"--{key}", defaults)
        elif arg.endswith(".py") and (
                Path(arg).resolve().parent.name == "config" or "paths" not in defaults):
            for key, value in read_config_file(arg).items():
                if not key.startswith("_") and not isinstance(value, ModuleType):
                    set_key(key, value, arg, known_keys)
        elif "paths" in defaults:
            cfg.paths += (arg,)
        else:
            die(f"{arg}: not a config file (config/*.py) nor --key=value", 2)
    return cfg


def read_config_file(path):
    """{name: value} of a config file's assignments."""
    if not Path(path).is_file():
        files = [f"config/{p.name}" for p in ROOT.glob("config/[!_]*.py")]
        die(f"{path}: no such config file" + nearest(path, files), 2)
    try:
        return runpy.run_path(path, run_name="config_file")
    except Exception as e:
        die(f"{path}: {type(e).__name__}: {e}", 2)


# -- Files -----------------------------------------------------------------------------------------

def digest(text):
    """16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path, data):
    """Write bytes to a temporary file, flush, rename: a crash leaves the old file, or the new one,
    whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(f"{path}.{RANK}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_jsonl(path, rows):
    """write_whole, a line a row."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_json(path, key=None):
    """What write_whole wrote into a file as JSON, or the list of objects that it has under `key`;
    die where it is something else now."""
    try:
        value = json.loads(path.read_bytes())
        return [dict(row) for row in value[key]] if key else value
    except (ValueError, KeyError, TypeError) as e:
        die(f"{path} is broken, or another's ({e!r}): move it away, and the same command makes it "
            "anew")


def lock_file(path):
    """Keep other runs from writing what `path` stands for, as long as the returned file is held;
    die if another does. Its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"another run is writing there ({path} is locked): wait for it, or write elsewhere")
    return file


def open_lines(path):
    """A JSONL file, gzipped or not, as bytes."""
    return gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")


def parse_row(line):
    """The object in one line (bytes) of a JSONL file. ValueError, with the reason, where it is not
    UTF-8, no JSON, no object, or holds half of a surrogate pair (which nothing can write)."""
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as e:
        raise ValueError(f"not UTF-8: {e.reason}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def read_rows(path):
    """Yield (number from 1, row) of a .jsonl, .jsonl.gz or .parquet file; in place of a row that
    cannot be read, the ValueError that says why. Blank lines count, but are passed over; a file
    that breaks off ends with a ValueError."""
    n = 0
    try:
        if str(path).endswith(".parquet"):
            for batch in open_parquet(path).iter_batches():
                for n, row in enumerate(batch.to_pylist(), n + 1):
                    yield n, row
            return
        with open_lines(path) as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    try:
                        row = parse_row(line)
                    except ValueError as e:
                        row = e
                    yield n, row
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as e:  # pyarrow's are ValueErrors
        yield n + 1, ValueError(f"cannot be read: {e}".splitlines()[0])


def read_pair(row, instruction="instruction", response="response"):
    """(instruction, response) of a row; the arguments name the two fields. The response is a text,
    or under the name `edit_path` a list of texts. ValueError, with the reason, where one of them is
    missing; a row that is a ValueError itself (read_rows) is raised."""
    if isinstance(row, ValueError):
        raise row
    pair = row.get(instruction), row.get(response)
    texts = pair[1] if response == "edit_path" else [pair[1]]
    if not (pair[1] and isinstance(texts, list)
            and all(isinstance(text, str) for text in [pair[0], *texts])):
        raise ValueError(f"no {instruction} and {response}")
    return pair


def open_parquet(path):
    """pyarrow's ParquetFile, which reads piece by piece."""
    import pyarrow.parquet
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)


# -- Workers ---------------------------------------------------------------------------------------

def start_pool(workers, initializer, *args):
    """A ProcessPoolExecutor of `workers` processes (0: one a CPU), where initializer(*args) is the
    first that each calls."""
    return ProcessPoolExecutor(workers or CPUS, multiprocessing.get_context("spawn"), start_worker,
                               (os.getpid(), initializer, args))


def start_worker(parent, initializer, args):
    """What each worker does first: it leaves Ctrl-C to its parent, ends when that is gone (killed,
    too), and calls the initializer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    initializer(*args)
