"""Pi by throwing darts: every input is a seed, so the same seeds give the same answer.

    seq 200 | burla map examples/pi.py:estimate | python3 examples/pi.py
"""

import math
import random

DARTS = 200_000


def estimate(seed):
    """An estimate of pi from the share of random points that fall inside a quarter circle."""
    rng = random.Random(seed).random
    inside = 0
    for _ in range(DARTS):
        x, y = rng(), rng()
        inside += x * x + y * y <= 1.0
    return 4 * inside / DARTS


def main():
    """Read estimates from stdin and print their mean and its standard error."""
    import json
    import statistics
    import sys

    estimates = [json.loads(line) for line in sys.stdin]
    if len(estimates) < 2:
        sys.exit("pi.py: at least two estimates are needed on stdin")
    error = statistics.stdev(estimates) / math.sqrt(len(estimates))
    mean = statistics.mean(estimates)
    print(f"pi is about {mean:.6f} +- {error:.6f} ({DARTS * len(estimates):,} darts; off by {mean - math.pi:+.6f})")


if __name__ == "__main__":
    main()
