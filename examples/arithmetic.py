"""Arithmetic on numbers, one number a call.

    seq 10 | burla map examples/arithmetic.py:double
    seq 1000000007 2 1000000107 | burla map examples/arithmetic.py:is_prime
    seq 1 100000 | burla map --unordered examples/arithmetic.py:collatz -o collatz.jsonl
"""


def double(x):
    """Twice x."""
    return x * 2


# As bases of the Miller-Rabin test, these decide every number below 3.3e24.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n):
    """Whether n is a prime number; certain for n below 3.3e24."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return not any(_shows_composite(base, n, odd, twos) for base in _WITNESSES)


def _shows_composite(base, n, odd, twos):
    """One round of Miller-Rabin, where n - 1 == odd * 2**twos."""
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return False
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return False
    return True


def collatz(n):
    """How many steps the Collatz sequence takes from n down to 1, and how high it climbs."""
    start, steps, peak = n, 0, n
    while n > 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps, peak = steps + 1, max(peak, n)
    return {"start": start, "steps": steps, "peak": peak}
