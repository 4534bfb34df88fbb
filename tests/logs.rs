//! What calls print: all of it arrives, live, whole, and behind the index of its input.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use burla_tests::{Burla, LIMIT, Output, Signal, binary, eventually, wait_until};

/// A folder with `f.py`.
fn with(source: &str) -> Burla {
    let burla = Burla::new();
    let here = burla.path("");
    burla.file("f.py", format!("import os, signal, subprocess, sys, time\nHERE = {here:?}\n{source}"));
    burla
}

fn numbers(count: u64) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

#[track_caller]
fn expect(output: &Output, code: i32, stdout: &str) {
    assert_eq!((output.code, output.stdout.as_str()), (code, stdout), "{}", start(&output.stderr));
}

/// Enough of a text that may be very long.
fn start(text: &str) -> &str {
    text.get(..4000).unwrap_or(text)
}

/// The lines of each call. Panics if there is a line that is neither a call's nor burla's own.
#[track_caller]
fn lines(stderr: &str) -> BTreeMap<u64, Vec<&str>> {
    let mut found: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for line in stderr.split_terminator('\n').filter(|line| !line.starts_with("burla: ")) {
        let parts = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
        let parsed = parts.and_then(|(index, text)| Some((index.parse().ok()?, text)));
        let (index, text) = parsed.unwrap_or_else(|| panic!("whose line is {line:?}?"));
        found.entry(index).or_default().push(text);
    }
    found
}

/// Asserts that each of so many calls printed exactly this, stream by stream in order.
#[track_caller]
fn each_printed(output: &Output, count: u64, mut what: impl FnMut(u64) -> Vec<String>) {
    let mut found = lines(&output.stderr);
    for index in 0..count {
        assert_eq!(found.remove(&index).unwrap_or_default(), what(index), "input {index}");
    }
    assert!(found.is_empty(), "calls that there were not: {found:?}");
}

/// The most memory that a process had at once, in MiB, as long as it lives.
fn peak(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? >> 10)
}

// All of it, whole

#[test]
fn a_hundred_thousand_lines_arrive_whole_each_with_its_index() {
    let burla =
        with("def f(x):\n    for i in range(100):\n        print(f'call {x} line {i}')\n    return x\n");
    let output = burla.map(["f.py:f"]).stdin(numbers(1000)).run();
    expect(&output, 0, &numbers(1000));
    each_printed(&output, 1000, |x| (0..100).map(|i| format!("call {x} line {i}")).collect());
}

#[test]
fn fast_calls_get_their_own_lines_whatever_printed_them() {
    let burla = with(
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n    text = f'{x} ' + '.' * (x % 50)\n    way = x % 6\n    \
         if way == 0:\n        print(text)\n    elif way == 1:\n        os.write(1, f'{text}\\n'.encode())\n    \
         elif way == 2:\n        libc.printf(b'%s\\n', text.encode())\n    elif way == 3:\n        print(text, file=sys.stderr)\n    \
         elif way == 4:\n        sys.stdout.buffer.write(f'{text}\\n'.encode())\n    \
         elif x % 30 == 5:\n        subprocess.run(['echo', text])\n    else:\n        os.write(2, f'{text}\\n'.encode())\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(3000)).run();
    expect(&output, 0, &numbers(3000));
    each_printed(&output, 3000, |x| vec![format!("{x} {}", ".".repeat(x as usize % 50))]);
}

#[test]
fn fast_calls_that_only_now_and_then_print_get_their_own_lines() {
    // No native code: nothing makes the runner look at the pipes after every call.
    let burla = with(
        "def f(x):\n    if x % 97 == 0:\n        print(x)\n    elif x % 89 == 0:\n        os.write(1, b'%d\\n' % x)\n    \
         elif x % 83 == 0:\n        os.write(2, b'%d\\n' % x)\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(20_000)).run();
    expect(&output, 0, &numbers(20_000));
    each_printed(&output, 20_000, |x| match x % 97 == 0 || x % 89 == 0 || x % 83 == 0 {
        true => vec![x.to_string()],
        false => vec![],
    });
}

#[test]
fn a_c_library_that_buffers_is_flushed_with_its_call() {
    let burla = with(
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n    for i in range(3):\n        libc.printf(b'%d:%d\\n', x, i)\n    \
         libc.puts(b'end')\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(500)).run();
    expect(&output, 0, &numbers(500));
    each_printed(&output, 500, |x| vec![format!("{x}:0"), format!("{x}:1"), format!("{x}:2"), "end".into()]);
}

#[test]
fn the_end_of_a_call_ends_its_line() {
    let burla = with(
        "def f(x):\n    if x % 2:\n        print(f'{x} half', end='')\n    else:\n        os.write(2, f'{x} half'.encode())\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(500)).run();
    expect(&output, 0, &numbers(500));
    each_printed(&output, 500, |x| vec![format!("{x} half")]);
}

#[test]
fn what_commands_write_to_stderr_is_log_and_to_stdout_result() {
    let burla = Burla::new();
    let script = "echo out {}; echo err {} >&2; printf 'half {}' >&2";
    let output = burla.map(["--", "sh", "-c", script]).stdin(numbers(300)).run();
    expect(&output, 0, &(0..300).map(|i| format!("out {i}\n")).collect::<String>());
    each_printed(&output, 300, |x| vec![format!("err {x}"), format!("half {x}")]);
}

#[test]
fn what_is_printed_while_the_file_is_loaded_is_of_no_call() {
    let burla = with("print('loading')\nos.write(2, b'half')\ndef f(x):\n    print(x)\n    return x\n");
    let output = burla.map(["f.py:f", "--max-parallelism", "1"]).stdin(numbers(10)).run();
    expect(&output, 0, &numbers(10));
    let own: Vec<&str> = output.stderr.lines().filter(|line| !line.starts_with('[')).collect();
    assert!(own.contains(&"loading") && own.contains(&"half"), "{}", output.stderr);
    let mut calls: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with('[')).collect();
    calls.sort_unstable();
    assert_eq!(calls, (0..10).map(|x| format!("[{x}] {x}")).collect::<Vec<_>>());
}

#[test]
fn what_the_first_call_prints_is_whole_however_late_burla_looks() {
    // burla is stopped until the file was loaded, and until the first call has printed half of a line, unless
    // that waits for burla.
    let burla = with(
        r"
def wait_for(name):
    while not os.path.exists(f'{HERE}/{name}'):
        time.sleep(0.002)

print('loading')
open(f'{HERE}/loading', 'w').close()
wait_for('load')

def f(x):
    os.write(1, b'first\nha')
    open(f'{HERE}/printed', 'w').close()
    wait_for('go')
    os.write(1, b'lf\nlast')
    return x

open(f'{HERE}/loaded', 'w').close()
",
    );
    let mut live = burla.map(["f.py:f"]).stdin("0\n").spawn();
    live.close_stdin();
    wait_until("the file is being loaded", LIMIT, || burla.path("loading").exists());
    live.signal(Signal::STOP);
    burla.file("load", "");
    wait_until("the file was loaded", LIMIT, || burla.path("loaded").exists());
    eventually(Duration::from_secs(1), || burla.path("printed").exists());
    live.signal(Signal::CONT);
    wait_until("its first line", LIMIT, || live.stderr().contains("first\n"));
    burla.file("go", "");
    let output = live.wait();
    expect(&output, 0, "0\n");
    let printed: Vec<&str> = output.stderr.lines().filter(|line| !line.starts_with("burla: ")).collect();
    assert_eq!(printed, ["loading", "[0] first", "[0] half", "[0] last"]);
}

#[test]
fn a_return_and_a_line_end_that_come_apart_are_one_line_end() {
    let burla = with(
        "def f(x):\n    os.write(1, b'one\\r')\n    while not os.path.exists(f'{HERE}/go'):\n        time.sleep(0.002)\n    \
         os.write(1, b'\\ntwo\\n')\n    return x\n",
    );
    let live = burla.map(["f.py:f"]).stdin("0\n").spawn();
    wait_until("the line", LIMIT, || live.stderr().contains("[0] one\n"));
    burla.file("go", "");
    let output = live.wait();
    expect(&output, 0, "0\n");
    each_printed(&output, 1, |_| ["one", "two"].map(str::to_owned).into());
}

#[test]
fn what_a_call_printed_before_its_process_died_arrives() {
    for death in ["os._exit(1)", "os.kill(os.getpid(), 9)"] {
        let burla = with(&format!(
            "def f(x):\n    for i in range(2000):\n        os.write(1 + i % 2, f'{{x}}:{{i}}\\n'.encode())\n    {death}\n"
        ));
        let output = burla.map(["f.py:f", "--keep-going"]).stdin(numbers(3)).run();
        expect(&output, 1, "null\nnull\nnull\n");
        let of = |stderr: &str, part: usize| {
            let mut found = BTreeMap::new();
            for line in stderr.lines().filter_map(|line| line.strip_prefix('[')) {
                let (index, text) = line.split_once("] ").expect("a line of a call");
                let (x, i) = text.split_once(':').expect("two numbers");
                assert_eq!(index, x);
                let i: usize = i.parse().expect("a number");
                if i % 2 == part {
                    found.entry(x.to_owned()).or_insert_with(Vec::new).push(i);
                }
            }
            found
        };
        for part in [0, 1] {
            let once: Vec<usize> = (part..2000).step_by(2).collect();
            let thrice = [&once[..], &once, &once].concat();
            let found = of(&output.stderr, part);
            assert_eq!(found.len(), 3, "{}", start(&output.stderr));
            assert!(found.values().all(|lines| *lines == thrice), "{death}: {:?}", found.keys());
        }
    }
}

#[test]
fn what_a_failed_or_stopped_call_printed_arrives() {
    let burla = with(
        "def f(x):\n    print(f'before {x}')\n    if x == 1:\n        raise ValueError\n    if x == 2:\n        print('half', end='')\n        \
         sys.stdout.flush()\n        time.sleep(1000)\n    if x == 3:\n        sys.exit('bye')\n    return x\n",
    );
    let output = burla.map(["f.py:f", "--timeout", "0.5s"]).stdin(numbers(5)).run();
    expect(&output, 1, "0\nnull\nnull\nnull\n4\n");
    for x in 0..5 {
        let count = output.stderr.lines().filter(|line| *line == format!("[{x}] before {x}")).count();
        assert_eq!(count, 1, "{}", output.stderr);
    }
    assert!(output.stderr.contains("\n[2] half\n"), "{}", output.stderr);
}

#[test]
fn fifty_megabytes_from_one_call_arrive_in_bounded_memory() {
    let burla = with(
        "def f(x):\n    for i in range(500):\n        print('\\n'.join(f'{n:099}' for n in range(1000 * i, 1000 * i + 1000)))\n    return x\n",
    );
    let mut live = burla.map(["f.py:f"]).stdin("0\n").spawn();
    let mut most = 0;
    live.close_stdin();
    wait_until("the job ends", LIMIT, || {
        most = peak(live.pid()).unwrap_or(0).max(most);
        live.ended()
    });
    let output = live.wait();
    assert_eq!((output.code, output.stdout.as_str()), (0, "0\n"));
    let found: Vec<&str> = output.stderr.lines().filter_map(|line| line.strip_prefix("[0] ")).collect();
    assert_eq!(found.len(), 500_000);
    for (n, line) in found.into_iter().enumerate() {
        assert!(line.len() == 99 && line.parse() == Ok(n), "line {n}: {line}");
    }
    assert!((1..150).contains(&most), "{most} MiB");
}

/// `burla`, whose stderr nobody reads until the test does.
fn unread(burla: &Burla, args: &[&str], inputs: &str) -> std::process::Child {
    let stdin = fs::File::open(burla.file("inputs", inputs)).expect("open a file");
    let mut command = Command::new(binary());
    command.arg("map").args(args).current_dir(burla.path("")).env("TMPDIR", burla.path("")).process_group(0);
    command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start burla")
}

#[test]
fn who_prints_waits_for_who_reads() {
    // A call prints without end, and nobody reads it: it comes to a stop, and burla's memory is bounded.
    let burla = with(
        "def f(x):\n    for i in range(1 << 40):\n        print(f'{i:0999}')\n        if i % 1000 == 0:\n            \
         with open(f'{HERE}/mebibytes', 'w') as file:\n                file.write(str(i // 1000))\n",
    );
    let mut child = unread(&burla, &["f.py:f"], "0\n");
    let printed = || fs::read_to_string(burla.path("mebibytes")).ok()?.parse::<u64>().ok();
    let mut last = (None, 0);
    let stopped = eventually(Duration::from_secs(30), || {
        let now = printed();
        last = if now == last.0 && now.is_some() { (now, last.1 + 1) } else { (now, 0) };
        // Half a second without a line.
        last.1 > 250 || now > Some(400)
    });
    let most = peak(child.id()).expect("it runs");
    let _ = child.kill();
    let _ = child.wait();
    assert!(stopped && printed() < Some(400), "{:?} MB were printed, and nobody had read them", printed());
    assert!(most < 200, "{most} MiB");
}

#[test]
fn an_interrupt_is_heard_while_nobody_reads_the_messages() {
    let burla = with("def f(x):\n    while True:\n        print('x' * 1000)\n");
    let mut child = unread(&burla, &["f.py:f"], "0\n");
    let stderr = child.stderr.take().expect("a pipe");
    wait_until("the pipe is full", LIMIT, || {
        rustix::io::ioctl_fionread(&stderr).is_ok_and(|held| held > 50_000)
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::INT).expect("send a signal");
    let ended = eventually(Duration::from_secs(3), || child.try_wait().expect("wait").is_some());
    let _ = child.kill();
    assert!(ended, "it did not end");
    assert_eq!(child.wait().expect("wait").code(), Some(130));
}

// Live

#[test]
fn lines_are_shown_while_their_call_runs() {
    let wait = "    while not os.path.exists(f'{HERE}/go{x}'):\n        time.sleep(0.002)\n    return x\n";
    for print in [
        "print('here', x)",
        "print('here', x, file=sys.stderr)",
        "os.write(1, f'here {x}\\n'.encode())",
        "subprocess.run(['echo', 'here', str(x)])",
        "subprocess.Popen(['sh', '-c', f'echo here {x} >&2; sleep 1000'])",
    ] {
        let burla = with(&format!("def f(x):\n    {print}\n{wait}"));
        let live = burla.map(["f.py:f", "--max-parallelism", "1"]).stdin(numbers(3)).spawn();
        let mut left = vec![0, 1, 2];
        while !left.is_empty() {
            // A call goes on only when its line was seen.
            let mut seen = None;
            wait_until("the line of a call", LIMIT, || {
                seen = left.iter().position(|x| live.stderr().contains(&format!("[{x}] here {x}\n")));
                seen.is_some()
            });
            burla.file(&format!("go{}", left.remove(seen.expect("it was seen"))), "");
        }
        expect(&live.wait(), 0, &numbers(3));
    }
}

#[test]
fn lines_of_commands_are_shown_while_they_run() {
    let burla = Burla::new();
    let script = "echo here >&2; until test -e \"$0/go\"; do sleep 0.01; done; echo {}";
    let live = burla.map(["--", "sh", "-c", script]).args([burla.path("")]).stdin("0\n").spawn();
    wait_until("the line of the command", LIMIT, || live.stderr().contains("[0] here\n"));
    burla.file("go", "");
    expect(&live.wait(), 0, "0\n");
}

#[test]
fn a_line_behind_fast_calls_is_shown_while_its_call_runs() {
    // Calls of one batch: the first ones are fast and print, the last one waits.
    let burla = with(
        "def f(x):\n    print(f'line {x}')\n    if x == 299:\n        while not os.path.exists(f'{HERE}/go'):\n            \
         time.sleep(0.002)\n    return x\n",
    );
    let live = burla.map(["f.py:f"]).stdin(numbers(300)).spawn();
    wait_until("the last line", LIMIT, || live.stderr().contains("[299] line 299\n"));
    wait_until("all lines", LIMIT, || lines(&live.stderr()).len() == 300);
    burla.file("go", "");
    let output = live.wait();
    expect(&output, 0, &numbers(300));
    each_printed(&output, 300, |x| vec![format!("line {x}")]);
}

#[test]
fn a_thread_may_print_after_its_call() {
    let burla = with(
        "import threading\ndef work(x):\n    for i in range(20):\n        print(f'thread {x} {i}')\n        time.sleep(0.002)\n\n\
         def f(x):\n    threading.Thread(target=work, args=[x]).start()\n    time.sleep(0.001)\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(200)).run();
    expect(&output, 0, &numbers(200));
    // A text and its line's end are written one by one, so that threads may come between them; and whose
    // lines they are nobody can tell.
    for line in output.stderr.lines().filter(|line| !line.starts_with("burla: ")) {
        let text =
            line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, text)| text);
        assert!(text.is_empty() || text.starts_with("thread "), "{line}");
    }
    let count = output.stderr.matches("thread ").count();
    assert!(count >= 2000, "{count}");
}

// Special lines

#[test]
fn of_a_progress_bar_the_last_state_is_kept() {
    let burla = with(
        "def f(x):\n    for i in range(1001):\n        sys.stdout.write(f'\\r{x}: {i / 10}%')\n        sys.stdout.flush()\n    \
         if x % 2:\n        print()\n        print('after')\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(6)).run();
    expect(&output, 0, &numbers(6));
    let found = lines(&output.stderr);
    for x in 0..6 {
        let mut of = found[&x].clone();
        if x % 2 == 1 {
            assert_eq!(of.pop(), Some("after"), "{of:?}");
        }
        assert_eq!(of.last(), Some(&&*format!("{x}: 100.0%")), "{of:?}");
        assert!(of.iter().all(|line| line.starts_with(&format!("{x}: "))), "{of:?}");
        assert!(of.len() < 300, "{} states of a bar that took no time", of.len());
    }
}

#[test]
fn a_bar_is_shown_while_it_grows() {
    let burla = with(
        "def f(x):\n    print('10%', end='\\r', flush=True)\n    while not os.path.exists(f'{HERE}/go'):\n        time.sleep(0.002)\n    return x\n",
    );
    let live = burla.map(["f.py:f"]).stdin("0\n").spawn();
    wait_until("the state of the bar", LIMIT, || live.stderr().contains("[0] 10%\n"));
    burla.file("go", "");
    expect(&live.wait(), 0, "0\n");
}

#[test]
fn lines_that_end_like_on_windows_are_lines() {
    let burla = with(
        "def f(x):\n    os.write(1, b'one\\r\\ntwo\\r\\n\\r\\nthree\\r')\n    os.write(1, b'\\nfour\\n')\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin("0\n").run();
    expect(&output, 0, "0\n");
    each_printed(&output, 1, |_| ["one", "two", "", "three", "four"].map(str::to_owned).into());
}

#[test]
fn a_line_that_is_too_long_is_split_and_marked() {
    let burla = with(
        "def f(x):\n    print(''.join(f'{n:07};' for n in range(400_000)))\n    print('next')\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin("0\n").run();
    expect(&output, 0, "0\n");
    let mut found = lines(&output.stderr).remove(&0).expect("its lines");
    assert_eq!(found.pop(), Some("next"));
    assert_eq!(found.len(), 4, "3.05 MiB in pieces of at most 1 MiB");
    let (last, others) = found.split_last().expect("pieces");
    let mut whole = String::new();
    for piece in others {
        let piece =
            piece.strip_suffix(" [line goes on]").unwrap_or_else(|| panic!("{}", &piece[piece.len() - 40..]));
        assert_eq!(piece.len(), 1 << 20);
        whole += piece;
    }
    whole += last;
    assert!(whole == (0..400_000).map(|n| format!("{n:07};")).collect::<String>());
}

#[test]
fn lines_may_come_without_a_prefix() {
    let burla = with("def f(x):\n    print(f'line {x}')\n    return x\n");
    let output = burla.map(["f.py:f", "--log-prefix", "none"]).stdin(numbers(50)).run();
    expect(&output, 0, &numbers(50));
    let mut found: Vec<&str> = output.stderr.lines().filter(|line| !line.starts_with("burla: ")).collect();
    found.sort_unstable();
    let mut expected: Vec<String> = (0..50).map(|x| format!("line {x}")).collect();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn bytes_that_are_no_text_arrive_as_they_are() {
    let burla = with(
        "LINE = bytes(b for b in range(256) if b not in b'\\r\\n')\ndef f(x):\n    os.write(1, LINE + b'\\0burla:\\0burla:1:2\\n')\n    \
         sys.stdout.buffer.write(LINE[::-1])\n    return x\n",
    );
    let shell = burla.program("sh").args(["-c", "exec \"$@\" 2> messages", "sh"]).args([binary()]);
    let output = shell.args(["map", "f.py:f", "--log-prefix", "none"]).stdin("0\n").run();
    expect(&output, 0, "0\n");
    let found = fs::read(burla.path("messages")).expect("read a file");
    let line: Vec<u8> = (0..=255).filter(|byte| !b"\r\n".contains(byte)).collect();
    let reverse: Vec<u8> = line.iter().rev().copied().collect();
    let expected = [&line[..], b"\0burla:\0burla:1:2\n", &reverse, b"\n"].concat();
    let at = found.windows(expected.len()).position(|window| window == expected);
    assert!(at.is_some(), "{}", found.escape_ascii());
}

#[test]
fn unpaired_surrogates_and_other_encodings_do_not_stop_a_call() {
    let burla = with("def f(x):\n    print('\\udc80 ünï ☃')\n    return x\n");
    let output =
        burla.map(["f.py:f", "--env", "PYTHONIOENCODING=ascii", "--env", "LC_ALL=C"]).stdin("0\n").run();
    expect(&output, 0, "0\n");
    each_printed(&output, 1, |_| vec!["\\udc80 ünï ☃".into()]);
}

#[test]
fn functions_may_put_other_streams_in_place() {
    let burla = with(
        "import contextlib, io, logging\nlogging.basicConfig(level=logging.INFO, format='%(message)s')\ndef f(x):\n    \
         with contextlib.redirect_stdout(io.StringIO()):\n        print('not to be seen')\n    \
         logging.info('logged %d', x)\n    sys.stdout = os.fdopen(os.dup(1), 'w')\n    print('own', x)\n    return x\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(200)).run();
    expect(&output, 0, &numbers(200));
    let mut found = lines(&output.stderr);
    assert_eq!(found.len(), 200);
    for (x, lines) in &mut found {
        // The two streams have no order among each other.
        lines.sort_unstable();
        assert_eq!(*lines, [format!("logged {x}"), format!("own {x}")]);
    }
}
