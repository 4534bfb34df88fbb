"""What a Python user would write instead of `burla map`: the same job, lines from stdin to lines on stdout.

    python3 peer.py loop FUNCTION            a plain loop in one process, the floor for one core
    python3 peer.py map FUNCTION             multiprocessing.Pool.map, its own chunk size
    python3 peer.py imap FUNCTION CHUNK      multiprocessing.Pool.imap, lazily
    python3 peer.py commands ARG...          multiprocessing with a subprocess.run for every line
    python3 peer.py logs                     multiprocessing over functions that print

FUNCTION is `double` (its lines are JSON) or `length` (its lines are text). Modules that a mode does not need
are not imported, so that the time of a cold start is the least that this way can have.
"""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "examples"))


def pool():
    import multiprocessing

    return multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)))


def function_and_inputs(name):
    if name == "double":
        from arithmetic import double

        return double, map(json.loads, sys.stdin)
    from words import length

    return length, (line.rstrip("\n") for line in sys.stdin)


def show(results):
    dumps = json.dumps
    sys.stdout.writelines(dumps(result) + "\n" for result in results)


def call_command(job):
    import subprocess

    return subprocess.run(job, check=True).returncode


def main():
    mode, args = sys.argv[1], sys.argv[2:]
    if mode == "loop":
        function, inputs = function_and_inputs(args[0])
        show(map(function, inputs))
    elif mode == "map":
        function, inputs = function_and_inputs(args[0])
        with pool() as workers:
            show(workers.map(function, inputs))
    elif mode == "imap":
        function, inputs = function_and_inputs(args[0])
        with pool() as workers:
            show(workers.imap(function, inputs, int(args[1])))
    elif mode == "commands":
        with pool() as workers:
            workers.map(call_command, [[*args, line.rstrip("\n")] for line in sys.stdin])
    elif mode == "logs":
        from chatty import chatty

        workers = pool()
        workers.map(chatty, [json.loads(line) for line in sys.stdin])
        workers.close()  # not `with`: it kills workers that have not written their lines yet
        workers.join()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
