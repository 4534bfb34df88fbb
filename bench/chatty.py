"""A function that prints a lot, for the benchmark of logs."""

LINES = 100


def chatty(call):
    """Print numbered lines that tell which call printed them."""
    for line in range(LINES):
        print("L", call, line)
