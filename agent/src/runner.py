# SPDX-License-Identifier: Apache-2.0
"""Runs a user's Python function on batches of inputs, for a worker.

The worker starts one of these for every slot it has, and keeps it for as long
as it runs the same function. Three things connect the two processes:

The channel is a stream socket, handed over as descriptor 0. Both sides send
frames: one byte for the kind, a little-endian u64 for the length, a payload.

    from the worker
      J  the job, JSON: which function, from which file, with which folders
      B  a batch: <QII (job index of the first input, and the positions from
         and to that are to be run), then JSON values, each ended by a comma
      C  continue: the window is empty again
    to the worker
      R  ready, JSON: sent at the start and again when the function is loaded
      U  unable to load the function, JSON: message, hint, traceback, usage
      W  doorbell: the window has new records
      F  the window is full: this side waits for C and starts at its beginning
      G  a record that is too large for the window
      D  the batch is done: <I, the position that it reached
    The end of the channel ends this process.

The shared memory is a memfd whose number is in BURLA_SHARED_FD: a page of u64
cells (RUNNING, WRITTEN, LIMIT and DRAINED below) and then the window, to which
the records of the results are written. Results thus cost no system call, and
those of finished calls outlive a crash of this process.

A record is <IfB (length, seconds, status) and then the JSON of the result, or
for a failed call <I and the JSON of the error.

The log pipes are descriptors 1 and 2. After a call that may have written to
them, a marker goes into both: everything before it, back to the marker before,
was written by that call.
"""

import fcntl
import io
import json
import mmap
import os
import sys
import time
from struct import Struct
from termios import FIONREAD

# The cells of the shared page.
RUNNING = 0  # job index + 1 of the running call, 0 when there is none
WRITTEN = 1  # bytes of whole records in the window
LIMIT = 2  # position in the batch at which to stop; the worker may lower it
DRAINED = 3  # counts the worker's reads from the log pipes
PAGE = 4096

# The statuses of a record.
OK = 0
FAILED = 1
ALTERED = 2  # a result in which NaN or an infinity became null

FRAME = Struct("<cQ")
BATCH = Struct("<QII")
RECORD = Struct("<IfB")
LENGTH = Struct("<I")

LARGE_RECORD = 256 << 10  # a larger record goes through the channel
LARGEST_RESULT = (1 << 32) - 1
LONGEST_MESSAGE = 64 << 10
LONGEST_TRACEBACK = 256 << 10
BELL_SECONDS = 0.005  # finished results wait no longer than this, or a call
OWN_DESCRIPTORS = 100  # where private descriptors start, away from the user's


# The channel


class Channel:
    """The frames to and from the worker."""

    def __init__(self):
        self.fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, OWN_DESCRIPTORS)
        os.set_blocking(self.fd, True)
        # What the user's function reads from its standard input is nothing.
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)

    def receive(self):
        kind, length = FRAME.unpack(self._read(FRAME.size))
        return kind, self._read(length)

    def _read(self, length):
        data = bytearray(length)
        with memoryview(data) as view:
            done = 0
            while done < length:
                try:
                    count = os.readv(self.fd, [view[done:]])
                except OSError:
                    count = 0
                if not count:
                    os._exit(0)
                done += count
        return data

    def send(self, kind, *parts):
        parts = [FRAME.pack(kind, sum(map(len, parts))), *parts]
        try:
            sent = os.writev(self.fd, parts)
            for part in parts:
                if sent < len(part):
                    self._write_rest(part, sent)
                sent = max(sent - len(part), 0)
        except OSError:
            os._exit(0)  # the worker is gone

    def _write_rest(self, data, done):
        with memoryview(data) as view:
            while done < len(view):
                done += os.write(self.fd, view[done:])


def shared_memory():
    fd = int(os.environ.pop("BURLA_SHARED_FD"))
    # A Python that the function starts shall not keep what it prints to itself.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    memory = mmap.mmap(fd, 0)
    os.close(fd)
    return memory


# Logs


class Stream(io.TextIOWrapper):
    """sys.stdout or sys.stderr, which tells the logs that it is written to.

    Asking two streams to flush after every call would cost more than many a
    call; this way, calls that print nothing pay nothing.
    """

    def __init__(self, stream, logs):
        self.logs = logs
        self.mode = stream.mode
        super().__init__(
            stream.detach(),
            encoding="utf-8",
            errors="backslashreplace",
            newline="\n",
            line_buffering=True,
        )

    def write(self, text):
        self.logs.quiet = -1.0
        return write_text(self, text)

    @property
    def buffer(self):
        # Whoever has the buffer can fill it behind our back.
        self.logs.distrust()
        return io.TextIOWrapper.buffer.__get__(self)

    def detach(self):
        self.logs.distrust()
        return super().detach()


write_text = io.TextIOWrapper.write


class Logs:
    """Marks in the log pipes which call has written what.

    Looking whether the pipes hold anything takes system calls. `quiet` spares
    most calls that: a call that took no longer than this many seconds cannot
    have made a write of its own. It is negative once a call has given text to
    a stream, and for good when calls can write unseen.
    """

    def __init__(self, cells):
        self.cells = cells
        self.pid = os.getpid()
        self.pipes = [
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OWN_DESCRIPTORS) for fd in (1, 2)
        ]
        self.shortest = self.quiet = shortest_writing_call()
        self.modules = 0
        self.flush_c = None
        sys.stdout = sys.__stdout__ = Stream(sys.stdout, self)
        sys.stderr = sys.__stderr__ = Stream(sys.stderr, self)
        self.streams = (sys.stdout, sys.stderr)
        self.level = self._measure()

    def start(self, nonce):
        """Lets go of what was written so far, which belongs to no call."""
        self.nonce = nonce
        self.flush()
        self.level = self._measure()

    def distrust(self):
        """From now on, no call is too short to have written something."""
        self.shortest = self.quiet = -1.0

    def settle(self, index):
        """Marks what the call of this job index wrote, if it wrote anything.

        Returns whether the pipes hold something that the worker has yet to
        read; `watch` is to be called before every call until they don't.
        """
        if os.getpid() != self.pid:
            # The function forked, and the child came back here as well.
            os._exit(0)
        self.flush()
        if self._measure() == self.level:
            return self._holding()
        mark = b"\0burla:%s:%d\n" % (self.nonce, index)
        for pipe in self.pipes:
            write_mark(pipe, mark)
        self.level = self._measure()
        return True

    def watch(self):
        """Looks again at the pipes before a call, if the worker has read them.

        Else the markers of one call would look like output of the next one,
        which would be marked in turn, and so on for ever.
        """
        if self.cells[DRAINED] != self.level[2]:
            self.level = self._measure()
        return self._holding()

    def flush(self):
        """Pushes everything that is still in some buffer into the pipes."""
        if len(sys.modules) != self.modules:
            self._look_for_native_modules()
        if sys.stdout is not self.streams[0] or sys.stderr is not self.streams[1]:
            self.distrust()
            flush_stream(sys.stdout)
            flush_stream(sys.stderr)
        if self.quiet < 0:
            for stream in self.streams:
                flush_stream(stream)
        if self.flush_c:
            self.flush_c(None)
        self.quiet = self.shortest

    def _measure(self):
        # The counter comes last: what the worker takes away between the looks
        # at the pipes and the look at the counter has then been counted.
        out, err = self.pipes
        return (
            fcntl.ioctl(out, FIONREAD, NOTHING),
            fcntl.ioctl(err, FIONREAD, NOTHING),
            self.cells[DRAINED],
        )

    def _holding(self):
        return self.level[0] != NOTHING or self.level[1] != NOTHING

    def _look_for_native_modules(self):
        """Native code may print through C's stdio, which buffers for pipes."""
        self.modules = len(sys.modules)
        if self.flush_c or not any(map(is_native, list(sys.modules.items()))):
            return
        self.distrust()
        try:
            import ctypes

            self.flush_c = ctypes.PyDLL(None).fflush
        except (ImportError, OSError, AttributeError):
            pass


NOTHING = bytes(4)  # what FIONREAD gives for an empty pipe


def is_native(item):
    name, module = item
    if name in ("_ctypes", "_cffi_backend"):
        return True
    # Not getattr, which would load modules that load themselves on demand.
    file = getattr(module, "__dict__", {}).get("__file__")
    return isinstance(file, str) and file.endswith(".so") and "lib-dynload" not in file


def flush_stream(stream):
    while True:
        try:
            return stream.flush()
        except BlockingIOError:
            wait_until_writable(stream.fileno())
        except Exception:
            return None  # the user closed it, or put something else in its place


def write_mark(pipe, mark):
    while True:
        try:
            return os.write(pipe, mark)
        except BlockingIOError:
            wait_until_writable(pipe)
        except OSError:
            return None


def wait_until_writable(fd):
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
    # A pipe with room for less than what is to be written still refuses it.
    time.sleep(0.0002)


def shortest_writing_call():
    """Fewer seconds than any call takes that makes a write of its own."""
    reader, writer = os.pipe()
    best = 1.0
    for _ in range(50):
        began = time.perf_counter()
        os.write(writer, b".")
        best = min(best, time.perf_counter() - began)
    os.close(reader)
    os.close(writer)
    # Less than the fastest write by a margin, for a processor that speeds up
    # later. Half of it would be about what the simplest functions take.
    return best * 0.7


# Inputs


class Undecodable:
    """Stands for an input that json refuses, such as one nested too deeply."""

    def __init__(self, why):
        self.why = why


def decode(payload):
    """The inputs of a batch frame, and whether there are undecodable ones.

    Empties the payload, which may be large.
    """
    if len(payload) <= BATCH.size:
        return [], False
    # The last byte of the head and the last comma become the brackets.
    payload[BATCH.size - 1], payload[-1] = b"[]"
    with memoryview(payload) as view:
        text = str(view[BATCH.size - 1 :], "utf-8", "surrogatepass")
    payload.clear()
    try:
        return json.loads(text), False
    except (ValueError, RecursionError, MemoryError):
        return [decode_one(part) for part in split_list(text)], True


def decode_one(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, RecursionError):
            return Undecodable("the input is nested too deeply")
        return Undecodable(f"the input could not be decoded: {error}")


def split_list(text):
    """The texts of the values in the text of a JSON list."""
    import re

    start, depth = 1, 0
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', text):
        mark = token.group()
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
        if (mark == "," and depth == 1) or (mark == "]" and depth == 0):
            yield text[start : token.start()]
            start = token.end()


def refusing_undecodable(function):
    def call(value):
        if type(value) is Undecodable:
            raise ValueError(value.why)
        return function(value)

    return call


# Results


def convert(value):
    """Something close to JSON for a value that json does not know."""
    if hasattr(type(value), "__dataclass_fields__"):
        fields = sys.modules["dataclasses"].fields(value)
        return {field.name: getattr(value, field.name) for field in fields}
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    # A value of these modules can only be there if they have been imported.
    datetime = sys.modules.get("datetime")
    if datetime and isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, (numpy.generic, numpy.ndarray)):
        return convert_numpy(numpy, value)
    raise TypeError


def convert_numpy(numpy, value):
    kind = value.dtype.kind
    if kind == "m":
        raise TypeError  # its item() may be a number without its unit
    if isinstance(value, numpy.ndarray):
        return (value.astype(str) if kind == "M" else value).tolist()
    if kind == "M":
        return str(value)
    # The item() of a long double is a long double again.
    return float(value) if kind == "f" else value.item()


quote = json.encoder.encode_basestring
LARGEST_FLOAT = sys.float_info.max

# The containers that json is in the middle of, by which it notices circles.
open_containers = {}


def container_encoder():
    """What turns values other than text and numbers into pieces of JSON."""
    make = json.encoder.c_make_encoder
    if make:
        # JSONEncoder makes one of these for every value, which takes as long
        # as the encoding of a small dict.
        return make(open_containers, convert, quote, None, ": ", ", ", False, False, False)
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=convert)
    return lambda value, _level: encoder.iterencode(value)


pieces_of = container_encoder()


def encode(result):
    """The status and the bytes of a result."""
    try:
        kind = type(result)
        if kind is str:
            data = quote(result).encode()
        elif kind is int:
            data = b"%d" % result
        elif kind is float and -LARGEST_FLOAT <= result <= LARGEST_FLOAT:
            data = repr(result).encode()
        else:
            data = "".join(pieces_of(result, 0)).encode()
        if len(data) <= LARGEST_RESULT:
            return OK, data
    except BaseException:
        open_containers.clear()
        return encode_carefully(result)
    return failed_result("ValueError", "the result is larger than 4 GiB")


def encode_carefully(result):
    """Encodes a result that json refused, or says what is wrong with it."""
    try:
        plain = Plain()
        data = json.dumps(plain.copy(result, ""), allow_nan=False).encode()
        if len(data) <= LARGEST_RESULT:
            return ALTERED if plain.altered else OK, data
        return failed_result("ValueError", "the result is larger than 4 GiB")
    except Unfit as unfit:
        return failed_result(unfit.kind, unfit.message, unfit.hint, unfit.about)
    except RecursionError:
        return failed_result("RecursionError", "the result is nested too deeply")
    except BaseException as error:
        message = f"the result could not be made into JSON: {message_of(error)}"
        return failed_result(qualified(type(error)), message)


class Unfit(Exception):
    """A result that cannot be sent as JSON."""

    def __init__(self, kind, message, hint=None, about=None):
        self.kind, self.message, self.hint = kind, message, hint
        self.about = about  # the name of the offending type


class Plain:
    """A slow second look at a result, to mend it or to find what is wrong."""

    def __init__(self):
        self.altered = False
        self.above = set()  # the ids of the containers around the value

    def copy(self, value, path):
        """A copy that json takes: NaN and the infinities are null in it."""
        if value is None or isinstance(value, (str, bool)):
            return value
        if isinstance(value, int):
            return self._integer(value, path)
        if isinstance(value, float):
            return self._float(value)
        if id(value) in self.above:
            where = f" at {path}" if path else ""
            message = f"the result is not JSON: it contains itself{where}"
            raise Unfit("ValueError", message, about="circle")
        self.above.add(id(value))
        plain = self._container(value, path)
        self.above.discard(id(value))
        return plain

    def _container(self, value, path):
        if isinstance(value, dict):
            return {
                self._key(key, path): self.copy(item, f"{path}[{shown_key(key)}]")
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.copy(item, f"{path}[{at}]") for at, item in enumerate(value)]
        try:
            converted = convert(value)
        except TypeError:
            raise unfit_value(value, path) from None
        return self.copy(converted, path)

    def _key(self, key, path):
        if isinstance(key, float):
            return self._float(key)
        if isinstance(key, int) and not isinstance(key, bool):
            return self._integer(key, path)
        if key is None or isinstance(key, (str, bool)):
            return key
        where = f" at {path}" if path else ""
        raise Unfit(
            "TypeError",
            f"the result is not JSON: it has a dict{where} with {a(key)} as a key",
            "keys are text: use str(key)",
            type(key).__name__,
        )

    def _integer(self, value, path):
        try:
            int.__repr__(value)
        except ValueError as error:
            where = f" at {path}" if path else ""
            message = f"the result has too large an integer{where}: {error}"
            raise Unfit("ValueError", message, about="int") from None
        return value

    def _float(self, value):
        if -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            return value
        self.altered = True
        return None


def shown_key(key):
    return json.dumps(key, ensure_ascii=False) if isinstance(key, str) else repr(key)


def unfit_value(value, path):
    if path:
        message = f"the result is not JSON: it holds {a(value)} at {path}"
    else:
        message = f"the result is {a(value)}, which is not JSON"
    return Unfit("TypeError", message, hint_for(value), type(value).__name__)


def a(value):
    """The type of a value with its article, such as "an int"."""
    name = type(value).__name__
    if name == "bytes":
        return name
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def hint_for(value):
    name = type(value).__name__
    if name == "coroutine":
        value.close()  # or Python warns that nobody awaited it
        return "the function is async: wrap it in one that returns asyncio.run(...)"
    if name == "async_generator":
        return "the function is an async generator: collect its items in a list"
    if name in ("generator", "map", "filter", "zip", "range", "set", "frozenset") or (
        name.startswith("dict_")
    ):
        return "return list(...) of it instead"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "decode it to text, or turn it into text with base64"
    return "return a list, a dict, text or numbers"


def failed_result(kind, message, hint=None, about=None):
    return FAILED, framed(
        kind="result",
        type=kind,
        message=shortened(message, LONGEST_MESSAGE),
        fingerprint=fingerprint(["result", kind, about]),
        hint=hint,
    )


# Errors


def framed(**error):
    """The bytes of a failed call's record."""
    if error.get("hint") is None:
        error.pop("hint", None)
    data = as_text(error)
    return LENGTH.pack(len(data)) + data


def as_text(message):
    """JSON for the worker, in which half a surrogate pair is no text: names
    of files that are not UTF-8 have such."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")


def failed_call(job, error, value):
    try:
        text, mark = job.describe(error)
        return framed(
            kind="exception",
            type=qualified(type(error)),
            message=shortened(message_of(error), LONGEST_MESSAGE),
            traceback=text,
            fingerprint=mark,
            hint=hint_about(job, error, value),
        )
    except BaseException as trouble:
        # Out of memory, most likely.
        kind = type(error).__name__
        return framed(
            kind="exception",
            type=kind,
            message=f"its description failed with {type(trouble).__name__}",
                fingerprint=kind.encode().hex()[:16],
        )


def hint_about(job, error, value):
    if isinstance(error, ModuleNotFoundError):
        return missing_module_hint()
    if isinstance(error, FileNotFoundError) and is_relative(error.filename):
        return (
            "calls run in a folder of their own: send the file along with "
            f"--include {error.filename}"
        )
    if isinstance(error, TypeError) and not error.__traceback__.tb_next:
        # No frame of the function: the call itself was refused.
        return arguments_hint(job, value)
    return None


def is_relative(path):
    return isinstance(path, str) and not os.path.isabs(path)


def arguments_hint(job, value):
    import inspect

    try:
        parameters = inspect.signature(job.function).parameters.values()
    except (TypeError, ValueError):
        return None
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needs = [p.name for p in takes if p.default is p.empty]
    if len(needs) >= 2:
        told = f"{job.spelled} takes {len(needs)} arguments"
        if isinstance(value, list):
            one = "pair" if len(needs) == 2 else "item"
            name = job.name.rpartition(".")[2]
            return (
                f"{told}, but an input is one argument: "
                f"write it as def {name}({one}): {', '.join(needs)} = {one}"
            )
        return f"{told}, but each input is passed as one argument"
    if not takes and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return f"{job.spelled} takes no argument, but each input is passed as one argument"
    return None


def missing_module_hint():
    return (
        f"install it for {sys.executable}, or choose another Python with --python, "
        "or send a file along with --include"
    )


def qualified(kind):
    if kind.__module__ in ("builtins", "__main__"):
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def message_of(error):
    try:
        return str(error)
    except BaseException as trouble:
        return f"<no message: its __str__ raised {type(trouble).__name__}>"


def shortened(text, most):
    """A text without its middle if it is too long: both ends matter."""
    if len(text) <= most:
        return text
    half = most // 2 - 40
    return f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"


def fingerprint(parts):
    import hashlib

    data = "\0".join(map(str, parts)).encode("utf-8", "replace")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def chain_of(report):
    """A traceback.TracebackException and those that are printed along with it."""
    waiting = [report]
    while waiting:
        report = waiting.pop()
        yield report
        if report.__cause__ is not None:
            waiting.append(report.__cause__)
        elif report.__context__ is not None and not report.__suppress_context__:
            waiting.append(report.__context__)
        waiting.extend(getattr(report, "exceptions", None) or ())


def type_name(report):
    # Python 3.13 took the types themselves away.
    return getattr(report, "exc_type_str", None) or qualified(report.exc_type)


OWN_FILE = fingerprint.__code__.co_filename


# The job


class Unusable(Exception):
    """The function cannot be run at all."""

    def __init__(self, message, hint=None, traceback=None, usage=True):
        self.message, self.hint = message, hint
        self.traceback, self.usage = traceback, usage


class Job:
    """The user's function and where it came from."""

    def __init__(self, told):
        self.root = told["root"]
        self.origin = told.get("origin") or self.root
        self.path = told["path"] or []
        self.source = told["source"]
        self.name = told["name"]
        self.spelled = told["spelled"]
        self.file = self.spelled.rpartition(":")[0] or self.spelled
        self.cwd = told["cwd"]
        self.files = told["files"]
        self.nonce = told["nonce"].encode()
        self.function = None

    def load(self):
        self._enter()
        try:
            module = self._module()
            target = self._find(module)
        except Unusable:
            raise
        except BaseException as error:
            raise self._failed_import(error) from None
        if not callable(target):
            raise Unusable(f"{self.spelled} is {a(target)}, not a function")
        self.function = target

    def _enter(self):
        """Makes this process look like one that runs the user's file."""
        if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
            del sys.path[0]  # the folder of this very file
        sys.path[:0] = self.path
        sys.argv = [self.file]
        if self.cwd:
            try:
                os.chdir(self.cwd)
            except OSError as error:
                raise Unusable(f"the working folder: {error}", usage=False) from None

    def _module(self):
        if "module" in self.source:
            name = self.source["module"]
            __import__(name)
            return sys.modules[name]
        path = os.path.join(self.root, self.source["file"])
        if not os.path.isfile(path):
            raise Unusable(f"there is no file {self.file}")
        return import_file(path)

    def _find(self, module):
        found, target = [], module
        for part in self.name.split("."):
            try:
                target = getattr(target, part)
            except AttributeError:
                hint = suggestion(target, part, found, module.__name__)
                message = f"{self.file} has no function {self.name}"
                raise Unusable(message, hint) from None
            found.append(part)
        return target

    def _failed_import(self, error):
        text, _ = self.describe(error)
        message = shortened(message_of(error), LONGEST_MESSAGE)
        if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
            file = self._brief(error.filename)
            where = f" on line {error.lineno}" if error.lineno else ""
            return Unusable(
                f"{file} has a syntax error{where}: {error.msg}", traceback=text
            )
        if isinstance(error, ModuleNotFoundError):
            if error.name and f"{self.source.get('module')}.".startswith(f"{error.name}."):
                return Unusable(f"there is no module {error.name}", missing_module_hint())
            told = f"{self.file} could not be loaded: {message}"
            return Unusable(told, missing_module_hint(), text)
        hint = None
        if isinstance(error, SystemExit):
            hint = 'put what is not for import under: if __name__ == "__main__":'
        kind = qualified(type(error))
        told = f"{kind}: {message}" if message else kind
        return Unusable(f"{self.file} could not be loaded: {told}", hint, text)

    def _shown(self, path):
        """A path as the user knows it."""
        if self.root and path and path.startswith(self.root + "/"):
            return os.path.join(self.origin, path[len(self.root) + 1 :])
        return path

    def _brief(self, path):
        if self.root and path.startswith(self.root + "/"):
            if path == os.path.join(self.root, self.source.get("file", "")):
                return self.file
            return path[len(self.root) + 1 :]
        return path

    def describe(self, error):
        """The traceback of an error as text, and the error's fingerprint."""
        import traceback

        report = traceback.TracebackException(type(error), error, error.__traceback__)
        # Frames that repeat count once: how deep a recursion was says little.
        marks = {}
        for one in chain_of(report):
            marks[type_name(one)] = None
            self._clean(one)
            for frame in one.stack:
                marks[frame.filename, frame.lineno, frame.name] = None
        whole = report.stack or report.__cause__ or report.__context__
        lines = report.format() if whole else report.format_exception_only()
        return shortened("".join(lines), LONGEST_TRACEBACK), fingerprint(marks)

    def _clean(self, report):
        """Leaves the user's frames, with the paths that the user knows."""
        report.stack[:] = [
            frame
            for frame in report.stack
            if frame.filename != OWN_FILE and not frame.filename.startswith("<frozen importlib")
        ]
        # The source lines have been looked up by now.
        for frame in report.stack:
            frame.filename = self._shown(frame.filename)
        if getattr(report, "filename", None):
            report.filename = self._shown(report.filename)


def import_file(path):
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    name = os.path.splitext(os.path.basename(path))[0]
    # A file called json.py must not take the place of the real json.
    while name in sys.modules:
        name = f"user_{name}"
    # The loader is named because the file need not end in .py.
    spec = spec_from_file_location(name, path, loader=SourceFileLoader(name, path))
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def suggestion(owner, missing, found, module):
    """A hint for a name that is not there."""
    import difflib

    values = {name: getattr(owner, name, None) for name in vars(owner)}
    names = [n for n, v in values.items() if callable(v) and not n.startswith("_")]
    near = difflib.get_close_matches(missing, names, 1)
    if near:
        return f"did you mean {'.'.join([*found, near[0]])}?"
    own = [
        ".".join([*found, name])
        for name in names
        if not isinstance(values[name], type)
        and getattr(values[name], "__module__", None) == module
    ]
    if not own:
        return "it has no functions"
    more = ", ..." if len(own) > 10 else ""
    return f"it has {', '.join(own[:10])}{more}"


# The batches


class Runner:
    """Runs batches, and writes the records of their results."""

    def __init__(self, channel, memory, cells, logs, job):
        self.channel = channel
        self.memory = memory
        self.cells = cells
        self.logs = logs
        self.job = job
        self.large = min(LARGE_RECORD, len(memory) - PAGE)
        self.noisy = True  # whether the log pipes may hold something

    def batch(self, payload):
        """Runs a batch, and returns the position that it reached."""
        first, start, stop = BATCH.unpack_from(payload)
        inputs, flawed = decode(payload)
        stop = min(stop, len(inputs))
        function = self.job.function
        if flawed:
            function = refusing_undecodable(function)
        if self.job.files:
            inputs = [
                os.path.join(self.job.files, str(first + at), name)
                for at, name in enumerate(inputs)
            ]
        # Popped from the end, so that an input is gone once it has been run.
        del inputs[stop:], inputs[:start]
        inputs.reverse()
        reached = self._loop(function, inputs.pop, first, start, stop)
        # Not in a finally: should this process end, the call that was running is to be charged.
        self.cells[RUNNING] = 0
        return reached

    def _loop(self, function, take, first, start, stop):
        cells, memory, logs, job = self.cells, self.memory, self.logs, self.job
        clock, put_head, head = time.perf_counter, RECORD.pack_into, RECORD.size
        last, large = len(memory), self.large
        at = PAGE
        cells[WRITTEN] = 0
        noisy = self.noisy
        rung = clock()
        logs.flush()
        for position in range(start, stop):
            # The order matters: the worker lowers the limit and then looks at
            # what is running, so that one of the two sees the other.
            cells[RUNNING] = first + position + 1
            if position >= cells[LIMIT]:
                break
            if noisy:
                noisy = logs.watch()
            value = take()
            began = clock()
            try:
                result = function(value)
                ended = clock()
            except BaseException as error:
                ended = clock()
                status, data = FAILED, failed_call(job, error, value)
                value = None
            else:
                # Large values must not be kept for longer than they are used.
                value = None
                status, data = encode(result)
                result = None
            if ended - began > logs.quiet:
                noisy = logs.settle(first + position)
            body = at + head
            end = body + len(data)
            if end > last or end - at > large:
                at = self._overflow(at, data, ended - began, status)
            else:
                put_head(memory, at, len(data), ended - began, status)
                memory[body:end] = data
                at = end
            cells[WRITTEN] = at - PAGE
            if ended - rung > BELL_SECONDS:
                rung = ended
                self.channel.send(b"W")
        else:
            position = stop
        self.noisy = noisy
        return position

    def _overflow(self, at, data, seconds, status):
        """Sends a record for which the window has no room.

        Returns where in the memory the next record goes.
        """
        if at > PAGE:
            # Also before a record that does not go into the window: they must
            # arrive in order.
            self.channel.send(b"F")
            self.channel.receive()
        head = RECORD.pack(len(data), seconds, status)
        if len(head) + len(data) > self.large:
            self.channel.send(b"G", head, data)
            return PAGE
        end = PAGE + len(head) + len(data)
        self.memory[PAGE:end] = head + data
        return end


def main():
    channel = Channel()
    memory = shared_memory()
    ready = {"python": sys.version.split()[0], "executable": sys.executable}
    ready = json.dumps(ready).encode()
    channel.send(b"R", ready)
    cells = memoryview(memory)[:PAGE].cast("Q")
    logs = Logs(cells)
    _, told = channel.receive()
    job = Job(json.loads(told))
    try:
        job.load()
    except Unusable as reason:
        logs.flush()
        channel.send(b"U", as_text(vars(reason)))
        channel.receive()  # the end, and with it the end of this process
    logs.start(job.nonce)
    channel.send(b"R", ready)
    runner = Runner(channel, memory, cells, logs, job)
    while True:
        _, payload = channel.receive()
        channel.send(b"D", LENGTH.pack(runner.batch(payload)))


if __name__ == "__main__":
    main()
