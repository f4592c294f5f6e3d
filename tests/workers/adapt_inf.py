"""Releases of AdaptInf in a process: `adapt_inf.py STATE RELEASES SHARDS` dies in that shard of the last one."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from corpora import small_corpus, tiny_reader
from datasets import Dataset

import salience as sal
import salience.hosts.scoring as scoring
from salience.core.documents import Reading

state, dies = sys.argv[1], int(sys.argv[3])
releases = [int(number) for number in sys.argv[2].split(",")]
write, written, passed = scoring.write_part, [], []


def counted(path, columns):
    if dies and release == releases[-1] and len(written) == dies - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, columns)
    written.append(path)


scoring.write_part = counted
model, tokenizer = tiny_reader()
model.register_forward_pre_hook(
    lambda _, args, kwargs: passed.append(len(kwargs["input_ids"])), with_kwargs=True
)
method = sal.AdaptInf(model=(model, tokenizer), keep=7, clusters=3, dim=32, pool_limit=25, state=state)
for release in releases:
    written.clear()
    passed.clear()
    texts = small_corpus(20, release)
    rows = {
        "id": [f"{release}-{n}" for n in range(20)],
        "prompt": texts,
        "completion": [f" {t}" for t in texts],
    }
    picked = sal.focus(Dataset.from_dict(rows), method, data=Reading(shard_documents=4)).dataset
sys.stdout.write("\n" + json.dumps({"picked": list(picked["id"]), "passed": sum(passed)}) + "\n")
