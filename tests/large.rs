//! Many inputs and large ones: all of it right, in bounded memory.

use std::{
    fs,
    io::{BufRead, BufReader},
    time::Duration,
};

use burla_tests::{Burla, LIMIT, Live, binary, wait_until};

/// A folder with `f.py`, and one for temporary files.
fn with(source: &str) -> Burla {
    let burla = Burla::new();
    let here = burla.path("");
    burla.file("f.py", format!("import os, sys, time\nHERE = {here:?}\n{source}"));
    fs::create_dir(burla.path("tmp")).expect("make a folder");
    burla
}

fn numbers(count: u64) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

/// Waits for the end of burla, and tells the most memory that it had at once, in MiB.
#[track_caller]
fn peak_until_end(live: &mut Live) -> u64 {
    let mut most = 0;
    wait_until("the job ends", LIMIT, || {
        most = peak(live.pid()).unwrap_or(0).max(most);
        live.ended()
    });
    assert!(most > 0, "its memory was never seen");
    most
}

fn peak(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? >> 10)
}

fn is_empty(burla: &Burla, folder: &str) -> bool {
    fs::read_dir(burla.path(folder)).expect("list a folder").next().is_none()
}

fn gone(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[test]
fn a_million_calls_are_right_in_bounded_memory() {
    let burla = with("def double(x):\n    return 2 * x\n");
    burla.file("in.jsonl", numbers(1_000_000));
    let mut live =
        burla.map(["f.py:double", "in.jsonl", "-o", "out"]).env("TMPDIR", burla.path("tmp")).spawn();
    let peak = peak_until_end(&mut live);
    let output = live.wait();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let out = burla.read("out");
    let mut count = 0;
    for (i, line) in out.lines().enumerate() {
        assert_eq!(line.parse(), Ok(2 * i), "line {i}");
        count += 1;
    }
    assert_eq!(count, 1_000_000);
    assert!(peak < 300, "{peak} MiB");
    assert!(is_empty(&burla, "tmp"));
}

#[test]
fn an_endless_producer_meets_a_reader_that_stops() {
    let burla = with(
        "with open(f'{HERE}/pids', 'a') as pids:\n    pids.write(f'{os.getpid()}\\n')\n\ndef f(x):\n    return x\n",
    );
    let script = "yes 1 | { \"$@\"; echo $? > code; } | head -5";
    let shell = burla.program("sh").args(["-c", script, "sh"]).args([binary()]).args(["map", "f.py:f"]);
    let output = shell.env("TMPDIR", burla.path("tmp")).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n1\n1\n1\n1\n"), "{}", output.stderr);
    assert_eq!(burla.read("code"), "141\n");
    assert_eq!(
        output.stderr,
        "burla: embedded, ".to_owned() + output.stderr.split(", ").nth(1).unwrap_or_default()
    );
    assert!(is_empty(&burla, "tmp"));
    assert!(burla.read("pids").lines().all(gone));
}

#[test]
fn a_reader_that_goes_is_noticed_while_there_is_nothing_to_write() {
    let burla = with("def f(x):\n    if x:\n        time.sleep(1000)\n    return x\n");
    let script = "printf '0\\n1\\n' | { \"$@\"; echo $? > code; } | head -1";
    let shell = burla.program("sh").args(["-c", script, "sh"]).args([binary()]).args(["map", "f.py:f"]);
    let output = shell.env("TMPDIR", burla.path("tmp")).run();
    assert_eq!(output.stdout, "0\n", "{}", output.stderr);
    assert_eq!(burla.read("code"), "141\n");
}

#[test]
fn an_endless_producer_is_read_no_faster_than_its_results_are() {
    let burla = with("def f(x):\n    return x\n");
    let script = "yes '\"some text that takes room\"' | \"$0\" map f.py:f & echo $! > pid; wait";
    let mut child = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(binary())
        .current_dir(burla.path(""))
        .env("TMPDIR", burla.path("tmp"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("start a shell");
    let mut results = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let pid = || fs::read_to_string(burla.path("pid")).ok()?.trim().parse::<u32>().ok();
    // Results come at once, although the inputs never end.
    for _ in 0..300_000 {
        assert_eq!(results.next().expect("a result").expect("a line"), "\"some text that takes room\"");
    }
    let after_some = pid().and_then(peak).expect("burla runs");
    for _ in 0..1_000_000 {
        assert!(results.next().expect("a result").is_ok());
    }
    let after_many = pid().and_then(peak).expect("burla runs");
    drop(results);
    wait_until("burla has ended", Duration::from_secs(20), || child.try_wait().expect("wait").is_some());
    assert!(after_many < after_some + 60 && after_many < 200, "{after_some} MiB, then {after_many} MiB");
    wait_until("nothing is left", Duration::from_secs(20), || is_empty(&burla, "tmp"));
}

#[test]
fn results_behind_a_slow_input_wait_on_disk_in_order() {
    // 250 MB wait for the first input, which ends only when the progress has named it.
    let burla = with(
        "def f(x):\n    while x == 0 and not os.path.exists(f'{HERE}/go'):\n        time.sleep(0.005)\n    return f'{x:07}' + 'y' * 100_000\n",
    );
    burla.file("in.jsonl", numbers(2500));
    let run = burla.map(["f.py:f", "in.jsonl", "-o", "out"]).args(["--cpu", "0.5"]);
    let mut live = run.env("TMPDIR", burla.path("tmp")).spawn();
    let waited = "2499 results wait for input 0";
    wait_until("the progress names the input waited for", Duration::from_secs(45), || {
        live.stderr().contains(waited)
    });
    assert_eq!(burla.read("out"), "");
    burla.file("go", "");
    let peak = peak_until_end(&mut live);
    let output = live.wait();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let mut count = 0;
    for line in BufReader::new(fs::File::open(burla.path("out")).expect("the results")).lines() {
        let line = line.expect("a line");
        assert!(line.len() == 100_009 && line.starts_with(&format!("\"{count:07}yyy")), "line {count}");
        count += 1;
    }
    assert_eq!(count, 2500);
    assert!(peak < 160, "{peak} MiB, with 250 MB of results");
    assert!(is_empty(&burla, "tmp"));
}

#[test]
fn a_hundred_results_of_a_mebibyte() {
    let burla = with("def f(x):\n    return chr(97 + x % 26) * (1 << 20)\n");
    let mut live = burla.map(["f.py:f", "-o", "out"]).stdin(numbers(100)).spawn();
    live.close_stdin();
    let peak = peak_until_end(&mut live);
    let output = live.wait();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let out = burla.read("out");
    let mut count = 0;
    for (x, line) in out.lines().enumerate() {
        let letter = char::from(b'a' + (x % 26) as u8);
        assert!(
            line.len() == (1 << 20) + 2 && line.trim_matches('"').chars().all(|c| c == letter),
            "line {x}"
        );
        count += 1;
    }
    assert_eq!(count, 100);
    assert!(peak < 250, "{peak} MiB");
}

#[test]
fn one_result_of_two_hundred_megabytes_among_small_ones() {
    let burla = with("def f(x):\n    return 'x' * (200_000_000 if x == 5 else 10)\n");
    let output = burla.map(["f.py:f", "-o", "out"]).stdin(numbers(10)).env("TMPDIR", burla.path("tmp")).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let out = fs::read(burla.path("out")).expect("the results");
    let lengths: Vec<usize> = out.split(|byte| *byte == b'\n').map(<[u8]>::len).collect();
    let mut expected = vec![12; 10];
    expected[5] = 200_000_002;
    expected.push(0);
    assert_eq!(lengths, expected);
    assert!(out.iter().all(|byte| b"x\"\n".contains(byte)));
    assert!(is_empty(&burla, "tmp"));
}

#[test]
fn one_output_of_a_hundred_megabytes_of_a_command() {
    let burla = with("");
    let script = "if test {} = 1; then head -c 100000000 /dev/zero; else echo {}; fi";
    let output = burla.map(["-o", "out", "--", "sh", "-c", script]).stdin(numbers(3)).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let out = fs::read(burla.path("out")).expect("the results");
    assert_eq!(out.len(), 100_000_004);
    assert!(out.starts_with(b"0\n\0") && out.ends_with(b"\x002\n"));
}

#[test]
fn two_thousand_commands() {
    let burla = with("");
    let output = burla.map(["--", "/bin/true", "{}"]).stdin(numbers(2000)).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, ""), "{}", output.stderr);
    assert!(output.stderr.contains("2000 inputs in "), "{}", output.stderr);

    let output = burla.map(["--", "echo", "{}"]).stdin(numbers(2000)).run();
    assert_eq!((output.code, output.stdout), (0, numbers(2000)), "{}", output.stderr);
}

#[test]
fn a_thousand_inputs_of_hundred_kilobytes() {
    let burla = with("def f(text):\n    return [len(text), text[:5]]\n");
    let input: String = (0..1000).map(|i| format!("\"{i:05}{}\"\n", "z".repeat(100_000))).collect();
    burla.file("in.jsonl", input);
    let mut live = burla.map(["f.py:f", "in.jsonl"]).spawn();
    let peak = peak_until_end(&mut live);
    let output = live.wait();
    let expected: String = (0..1000).map(|i| format!("[100005, \"{i:05}\"]\n")).collect();
    assert_eq!((output.code, output.stdout), (0, expected), "{}", output.stderr);
    assert!(peak < 250, "{peak} MiB");
}
