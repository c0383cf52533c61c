"""Tokens a second on all cores: prepare.py, Parquet to bins, against tiktoken's batch encoding.

    python tests/bench/tokenizer.py        # prints a table; SIZE=32e6 for a smoke run

The text is the standard library's, repeated to 256 MB (16 shards). tiktoken has it in memory, in
batches of 1,000 documents (encode_ordinary_batch), with a thread a core, and keeps no result;
prepare.py reads it from Parquet, splits off the validation set and writes bins. The two take turns,
so that whatever else the machine does hits both. The whole command counts: Python's start, the
workers' and the join too. p50k_base if tiktoken can get it (it fetches it on first use), else a BPE
of 50,000 entries trained on the spot. At the end both must have made the same tokens.
"""
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import tiktoken  # noqa: E402

import prepare  # noqa: E402

SIZE, ROUNDS = int(float(os.environ.get("SIZE", 256e6))), 3
os.chdir(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
library = [text for _, text in prepare.read_documents("stdlib")]
texts, size = [], 0
while size < SIZE:
    texts.append(library[len(texts) % len(library)])
    size += len(texts[-1].encode())
os.mkdir("corpus")
for i in range(0, len(texts), len(texts) // 4 + 1):
    table = pa.table({"text": texts[i:i + len(texts) // 4 + 1]})
    pq.write_table(table, f"corpus/{i:06}.parquet", row_group_size=200)
try:
    name, enc = "p50k_base", tiktoken.get_encoding("p50k_base")
except OSError:
    name = "trained.tiktoken"
    prepare.train_tokenizer(name, library, 50_000)
    enc = prepare.get_tokenizer(name)
cores = len(os.sched_getaffinity(0))
print(f"{platform.machine()}, {cores} cores, Linux {platform.release()}, Python "
      f"{platform.python_version()}, tiktoken {tiktoken.__version__}; {len(texts):,} documents, "
      f"{size / 1e6:.0f} MB, {name}")


def peer():
    start, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 1000):
        tokens += sum(map(len, enc.encode_ordinary_batch(texts[i:i + 1000], num_threads=cores)))
    return time.perf_counter() - start, tokens


def ours(n):
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "prepare.py"), "--corpora=corpus", f"--dataset={n}",
                    f"--tokenizer={name}"], check=True, capture_output=True)
    return time.perf_counter() - start


rates = {"encode_ordinary_batch": [], "prepare.py": []}
for n in range(ROUNDS):
    seconds, tokens = peer()
    rates["encode_ordinary_batch"].append(tokens / seconds)
    rates["prepare.py"].append(tokens / ours(n))
for label, found in rates.items():
    print(f"{label:22} {np.median(found) / 1e6:6.2f} million tokens/s   "
          f"({', '.join(f'{rate / 1e6:.2f}' for rate in found)})")
theirs, mine = map(np.median, rates.values())
print(f"ratio: {mine / theirs:.1%}")
wrote = sum(int((np.fromfile(f"data/0/{split}.bin", "<u2") != enc.eot_token).sum())
            for split in ("train", "val"))
assert wrote == tokens, (wrote, tokens)
