"""Writing a sparse delta and putting it back, against mergekit's DARE and against torch with both models in memory.

A Llama with random weights in bfloat16 (8 layers, width 1024) and a copy of it with noise. Every arm is a whole
process, imports included, and gets base and fine-tuned folder; it drops the delta to a tenth and rescales. mergekit
and torch give the merged checkpoint in one go, salience by way of the delta folder. Arms take turns. Peak memory is
the largest resident set of the process; mergekit reads by memory maps, whose pages count there while they are mapped.
CPU seconds (user and system) hold on a machine that others use too, wall seconds do not.

    python benchmarks/deltas.py [--rounds 3] [--layers 8] [--mergekit PYTHON] [--folder TMP] [--out FILE]

`--mergekit` names the Python of an environment with mergekit (0.1.5 was used); without it that arm is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEEP = 0.1
MERGEKIT = """
merge_method: dare_linear
base_model: {base}
models:
  - model: {tuned}
    parameters: {{weight: 1.0, density: {keep}}}
dtype: bfloat16
"""
IN_MEMORY = """
import sys, torch
from transformers import AutoModelForCausalLM
base, tuned, out, keep = sys.argv[1:4] + [float(sys.argv[4])]
base, tuned = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16) for one in (base, tuned))
draw = torch.Generator().manual_seed(0)
with torch.no_grad():
    for old, new in zip(base.parameters(), tuned.parameters()):
        delta = new.float() - old.float()
        kept = torch.bernoulli(torch.full_like(delta, keep), generator=draw)
        new.copy_(old.float() + kept * delta / keep)
tuned.save_pretrained(out)
"""
MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=int(sys.argv[2]),
                     num_attention_heads=16, num_key_value_heads=8, dtype="bfloat16")
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1] + "/base")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.002 * torch.randn_like(parameter))
model.save_pretrained(sys.argv[1] + "/tuned")
"""


def run(command: list[str]) -> dict[str, float]:
    """Seconds and the largest resident set of a whole process."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read().decode()[-2000:]}")
    return {
        "seconds": seconds,
        "cpu seconds": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss * 1024 / 1e6,
    }


def arms(folder: Path, number: int, mergekit: str) -> dict[str, list[str]]:
    """The commands of one round, each writing to a folder of its own."""
    base, tuned = str(folder / "base"), str(folder / "tuned")
    out = {name: str(folder / f"{name}-{number}") for name in ("delta", "applied", "mergekit", "memory")}
    salience = [sys.executable, "-m", "salience", "delta", "--base", base]
    method = f"darex:keep={KEEP},scope=all,heads=()"
    commands = {
        "salience: import only": [
            sys.executable,
            "-c",
            "import salience.jobs.delta, salience.methods.weights.darex",
        ],
        "salience: write delta": [*salience, "--tuned", tuned, "--method", method, "--out", out["delta"]],
        "salience: apply delta": [*salience, "--apply", out["delta"], "--out", out["applied"]],
        "torch: both in memory": [
            sys.executable,
            "-c",
            IN_MEMORY,
            base,
            tuned,
            out["memory"],
            str(KEEP),
        ],
    }
    if mergekit:
        (folder / "merge.yaml").write_text(MERGEKIT.format(base=base, tuned=tuned, keep=KEEP))
        commands["mergekit: dare_linear"] = [
            mergekit, "-m", "mergekit.scripts.run_yaml", str(folder / "merge.yaml"), out["mergekit"],
            "--no-copy-tokenizer", "--random-seed", "0",
        ]  # fmt: skip
    return commands


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--mergekit", default="", help="Python of an environment with mergekit")
    parser.add_argument("--folder", default=None, help="where the temporary checkpoints go")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from salience.core.evidence import about

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        subprocess.run([sys.executable, "-c", MAKE, made, str(args.layers)], check=True, capture_output=True)
        size = (folder / "tuned" / "model.safetensors").stat().st_size
        for number in range(args.rounds):
            for name, command in arms(folder, number, args.mergekit).items():
                found.setdefault(name, []).append(run(command))
        delta = (folder / "delta-0" / "delta.safetensors").stat().st_size
        header = json.loads((folder / "delta-0" / "delta.json").read_text())
    start = statistics.median(one["cpu seconds"] for one in found["salience: import only"])
    rows = {}
    for name, rounds in found.items():
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        row["MB/s of the fine-tuned checkpoint"] = size / 1e6 / row["seconds"]
        row["MB per CPU second"] = size / 1e6 / row["cpu seconds"]
        if name.startswith("salience: ") and "only" not in name:
            row["MB per CPU second without imports"] = size / 1e6 / (row["cpu seconds"] - start)
        rows[name] = row
        print(f"{name:24s} {row['seconds']:7.2f} s {row['cpu seconds']:7.2f} CPU s {row['peak MB']:8.0f} MB "
              f"{row['MB/s of the fine-tuned checkpoint']:7.1f} MB/s")  # fmt: skip
    print(f"checkpoint {size / 1e6:.1f} MB, delta {delta / 1e6:.1f} MB ({100 * delta / size:.1f} %)")
    if args.out:
        content = {
            "command": f"python benchmarks/deltas.py --rounds {args.rounds} --layers {args.layers}"
            + (" --mergekit PYTHON" if args.mergekit else "")
            + f" --out {args.out}",
            "about": about("cpu") | ({"mergekit": version_of(args.mergekit)} if args.mergekit else {}),
            "keep": KEEP,
            "checkpoint bytes": size,
            "delta bytes": delta,
            "entries kept": header["kept_share"],
            "medians": rows,
            "rounds": found,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def version_of(python: str) -> str:
    """Of mergekit, in that environment."""
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
