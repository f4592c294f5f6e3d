"""Start-up: `import salience` and `salience --help`, whole processes, median of 15 after one warm-up.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import salience": [sys.executable, "-c", "import salience"],
    "salience --help": [sys.executable, "-m", "salience", "--help"],
    "salience methods": [sys.executable, "-m", "salience", "methods"],
}


def main():
    for name, command in COMMANDS.items():
        times = []
        for _ in range(16):
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            times.append(time.perf_counter() - started)
        kept = sorted(times[1:])
        print(f"{name:18s} median {statistics.median(kept):.3f} s  min {kept[0]:.3f}  max {kept[-1]:.3f}")


if __name__ == "__main__":
    main()
