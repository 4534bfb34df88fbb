//! What cannot work is told in a sentence, with a hint and the right exit code, and early.

use std::fmt::Write as _;

use burla_tests::{Burla, LIMIT, Output, Run, binary, python, wait_until};

/// A folder with a few functions, and a way to see whether any of them ran.
fn folder() -> Burla {
    let burla = Burla::new();
    burla.file(
        "f.py",
        "def same(x):\n    open('/dev/stderr', 'w').write(f'ran {x}\\n')\n    return x\n\
         number = 3\nclass Thing:\n    def method(self, x): return x\n",
    );
    burla.file("in.jsonl", "1\n2\n");
    burla.file("data/part.csv", "a\n1\n");
    burla
}

/// What was told, without what differs from machine to machine.
fn told(burla: &Burla, output: &Output) -> String {
    let mut text = output.stderr.replace(&burla.path("").display().to_string(), "[folder]");
    text = text.replace(&python().display().to_string(), "[python]");
    let mut plain = String::new();
    for line in text.lines() {
        let line = match line.split_once(" in ") {
            Some((start, rest)) if rest.ends_with(" s") && !rest.trim_end_matches(" s").contains(' ') => {
                format!("{start} in [time]")
            }
            _ => line.to_owned(),
        };
        let line = match line.split_once("; the largest node has ") {
            Some((start, _)) => format!("{start}; the largest node has [so much]"),
            None => line,
        };
        let line = if line.starts_with("burla: embedded, ") { "burla: embedded, [n] slots" } else { &line };
        writeln!(plain, "{line}").expect("a String takes all");
    }
    plain
}

/// Runs what is to be refused, and returns what the user sees.
fn refused(burla: &Burla, args: &[&str], stdin: &str) -> String {
    let output = burla.map(args).stdin(stdin).run();
    assert_eq!(output.stdout, "", "{args:?}");
    format!("$ burla map {}\n{}exit code {}\n\n", args.join(" "), told(burla, &output), output.code)
}

#[test]
fn help() {
    let burla = Burla::new();
    for (name, args) in [("help", &["--help"][..]), ("help_map", &["map", "--help"])] {
        let output = burla.burla(args).run();
        assert_eq!((output.code, output.stderr.as_str()), (0, ""));
        insta::assert_snapshot!(name, output.stdout);
    }
    // The short one fits on a screen or so, and leads to the long one.
    let output = burla.burla(["map", "-h"]).run();
    assert!(output.code == 0 && output.stdout.contains("see more with '--help'"), "{}", output.stdout);
    let output = burla.burla(["--version"]).run();
    assert_eq!((output.code, output.stdout), (0, format!("burla {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn what_is_not_there_is_named() {
    let burla = folder();
    let cases: &[&[&str]] = &[
        &["f.py:same", "none.jsonl"],
        &["f.py:same", "data/"],
        &["none.py:same", "in.jsonl"],
        &["data:same", "in.jsonl"],
        &["data/none.py:same", "in.jsonl"],
        &["f.py:sam", "in.jsonl"],
        &["f.py:nothing_like_it", "in.jsonl"],
        &["f.py:Thing.methods", "in.jsonl"],
        &["none.module:same", "in.jsonl"],
        &["--files", "data/*.txt", "f.py:same"],
        &["--files", "data", "f.py:same"],
        &["--include", "none", "f.py:same", "in.jsonl"],
        &["f.py:same", "in.jsonl", "--python", "no-such-python"],
        &["f.py:same", "in.jsonl", "--python", "./f.py"],
        &["in.jsonl", "--", "./none"],
        &["in.jsonl", "--", "no-such-command", "{}"],
        &["f.py:same", "in.jsonl", "-o", "none/out"],
        &["f.py:same", "in.jsonl", "--errors", "none/errors"],
        &["f.py:same", "in.jsonl", "--env", "NOT_SET"],
    ];
    insta::assert_snapshot!(cases.iter().map(|args| refused(&burla, args, "")).collect::<String>());
}

#[test]
fn what_is_not_usable_is_told() {
    let burla = folder();
    let cases: &[&[&str]] = &[
        &[],
        &["f.py"],
        &["f.py:"],
        &[":same"],
        &["f.py:number", "in.jsonl"],
        &["a.txt", "b.txt", "--", "echo"],
        &["f.py:same", "in.jsonl", "--files", "data/*"],
        &["f.py:same", "--files", "data/*", "--input-format", "csv"],
        &["f.py:same", "--files", "["],
        &["f.py:same", "in.jsonl", "--input-format", "xml"],
        &["f.py:same", "in.jsonl", "--output-format", "xml"],
        &["f.py:same", "in.jsonl", "--with-input"],
        &["f.py:same", "in.jsonl", "--keep-going", "--fail-fast"],
        &["f.py:same", "in.jsonl", "--retries", "many"],
        &["f.py:same", "in.jsonl", "--timeout", "soon"],
        &["f.py:same", "in.jsonl", "--timeout", "0"],
        &["f.py:same", "in.jsonl", "--cpu", "0"],
        &["f.py:same", "in.jsonl", "--cpu", "1000000"],
        &["f.py:same", "in.jsonl", "--ram", "100T"],
        &["f.py:same", "in.jsonl", "--ram", "plenty"],
        &["f.py:same", "in.jsonl", "--max-parallelism", "0"],
        &["f.py:same", "in.jsonl", "--env", "=x"],
        &["f.py:same", "in.jsonl", "--no-such-option"],
        &["in.jsonl", "--python", "python3", "--", "echo"],
    ];
    insta::assert_snapshot!(cases.iter().map(|args| refused(&burla, args, "")).collect::<String>());
}

#[test]
fn arguments_that_a_shell_made_of_a_glob_are_told() {
    for args in [&["f.py:same", "a.jsonl", "b.jsonl"][..], &["f.py:same", "a.jsonl", "b.jsonl", "c.jsonl"]] {
        assert_refused(
            folder().map(args),
            &["error: b.jsonl is one argument too many\nhint: ", "--files 'GLOB' (in quotes)"],
        );
    }
}

#[test]
fn results_are_not_written_over_the_inputs() {
    let burla = folder();
    for args in [["-o", "in.jsonl"], ["-o", "./in.jsonl"], ["--errors", "in.jsonl"]] {
        assert_refused(burla.map(["in.jsonl"]).args(args).args(["--", "echo"]), &["error: ", "in.jsonl"]);
        assert_eq!(burla.read("in.jsonl"), "1\n2\n");
    }
}

#[test]
fn what_is_not_csv_or_not_gzip_is_told_in_a_sentence() {
    let burla = folder();
    burla.file("word.txt.gz", "not compressed at all");
    burla.file("rows.csv", "a,b\n1,2\n3\n");
    let output = burla.map(["f.py:same", "rows.csv"]).run();
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (2, "{\"a\": \"1\", \"b\": \"2\"}\n"),
        "{}",
        output.stderr
    );
    assert!(output.stderr.contains("rows.csv, line 3"), "{}", output.stderr);
    assert!(!output.stderr.contains("CSV error"), "{}", output.stderr);
    let run = |args: &[&str]| burla.map(["f.py:same"]).args(args).stdin("1\n");
    assert_refused(run(&["word.txt.gz"]), &["error: word.txt.gz is not gzip", "hint: "]);
    assert_refused(run(&["--input-format", "jsonl.gz"]), &["error: stdin is not gzip", "hint: "]);
}

#[test]
fn inputs_that_are_not_what_they_should_be_are_told_by_their_line() {
    let burla = folder();
    let cases: &[(&[&str], &str)] = &[
        (&["f.py:same"], "not json\n2\n"),
        (&["f.py:same"], "\n\n1\n"),
        (&["f.py:same"], "{\"a\": 1\n"),
        (&["f.py:same"], "1 2\n"),
        (&["f.py:same"], "NaN\n"),
        (&["f.py:same", "--input-format", "json"], "{\"a\": 1}"),
        (&["f.py:same", "--input-format", "json"], "1\n2\n"),
        (&["f.py:same", "--input-format", "csv"], "a,a\n1,2\n"),
        (&["--input-format", "jsonl", "--", "echo", "{}"], "word\n"),
    ];
    insta::assert_snapshot!(
        cases.iter().map(|(args, stdin)| refused(&burla, args, stdin)).collect::<String>()
    );
}

#[test]
fn unknown_commands_are_told() {
    let burla = Burla::new();
    let mut text = String::new();
    for args in [&["mpa"][..], &["f.py:same", "in.jsonl"], &["--nothing"]] {
        let output = burla.burla(args).run();
        assert_eq!(output.stdout, "");
        text += &format!("$ burla {}\n{}exit code {}\n\n", args.join(" "), output.stderr, output.code);
    }
    insta::assert_snapshot!(text);
}

#[track_caller]
fn assert_refused(run: Run, words: &[&str]) {
    let output = run.run();
    assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{}", output.stderr);
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in {}", output.stderr);
    }
}

#[test]
fn errors_in_the_users_file_are_shown_where_they_are() {
    let burla = Burla::new();
    let file = burla.file("code/f.py", "def f(x):\n    return 1 +\n").display().to_string();
    let run = |spelled: &str| burla.map([spelled]).stdin("1\n");
    let place = format!("File \"{file}\", line 2");
    assert_refused(
        run("code/f.py:f"),
        &["error: code/f.py has a syntax error on line 2: ", &place, "return 1 +", "SyntaxError"],
    );
    burla.file("code/f.py", "import helper\ndef f(x): return x\n");
    let helper = burla.file("code/helper.py", "A = 1\ndef g(:\n").display().to_string();
    assert_refused(
        run("code/f.py:f"),
        &["syntax error on line 2", &format!("File \"{helper}\", line 2"), "helper.py"],
    );
    burla.file("code/f.py", "import no_such_module\ndef f(x): return x\n");
    let place = format!("File \"{file}\", line 1, in <module>");
    let words =
        ["code/f.py could not be loaded: No module named 'no_such_module'", &place, "hint: install it for "];
    assert_refused(run("code/f.py:f"), &words);
    burla.file("code/f.py", "x = 1\nraise ValueError('at import')\n");
    let place = format!("File \"{file}\", line 2, in <module>");
    assert_refused(run("code/f.py:f"), &["code/f.py could not be loaded: ValueError: at import", &place]);
    burla.file("code/f.py", "import sys\nsys.exit(0)\n");
    assert_refused(
        run("code/f.py:f"),
        &["code/f.py could not be loaded: SystemExit: 0", "__name__ == \"__main__\""],
    );
    burla.file("code/f.py", "import os\nos._exit(0)\n");
    let output = run("code/f.py:f").run();
    assert!(
        output.code != 0 && output.stdout.is_empty() && output.stderr.contains("error: "),
        "{}",
        output.stderr
    );
    burla.file("code/f.py", b"def f(x): return '\xff'\n");
    assert_refused(run("code/f.py:f"), &["code/f.py", "line 1"]);
    burla.file("code/f.py", "");
    assert_refused(run("code/f.py:f"), &["code/f.py has no function f", "hint: it has no functions"]);
}

#[test]
fn an_error_in_the_users_file_is_told_once_and_nothing_runs() {
    let burla = Burla::new();
    burla.file("f.py", "raise ValueError('at import')\ndef f(x): return x\n");
    let inputs: String = (0..1000).map(|i| format!("{i}\n")).collect();
    let output = burla.map(["f.py:f", "--retries", "5"]).stdin(inputs).run();
    assert_eq!((output.code, output.stdout.as_str()), (2, ""));
    assert_eq!(output.stderr.matches("Traceback").count(), 1, "{}", output.stderr);
}

#[test]
fn results_before_a_bad_line_are_delivered() {
    let burla = folder();
    let output = burla.map(["f.py:same"]).stdin("1\n2\n\"three\nnot json\n5\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (2, "1\n2\n"), "{}", output.stderr);
    assert!(output.stderr.contains("error: stdin, line 3 is not JSON: "), "{}", output.stderr);
    assert!(output.stderr.contains("hint: if each line is an input as it is, add --input-format lines\n"));
    burla.file("bad.jsonl", "1\n\n3\n");
    let output = burla.map(["f.py:same", "bad.jsonl", "-o", "out"]).run();
    assert_eq!(output.code, 2);
    assert!(
        output.stderr.contains("error: bad.jsonl, line 2 is empty, which is not JSON\n"),
        "{}",
        output.stderr
    );
    assert_eq!(burla.read("out"), "1\n");
    let output = burla.map(["f.py:same", "--input-format", "json"]).stdin("[1, 2").run();
    assert_eq!((output.code, output.stdout.as_str()), (2, "1\n2\n"), "{}", output.stderr);
}

#[test]
fn text_that_is_not_utf8_is_told_by_its_line() {
    let burla = folder();
    let latin = b"\"fine\"\n\"caf\xe9\"\n";
    let run = |args: &[&str]| burla.map(["f.py:same"]).args(args).stdin(latin).run();
    for (args, first) in [(&[][..], "\"fine\"\n"), (&["--input-format", "lines"], "\"\\\"fine\\\"\"\n")] {
        let output = run(args);
        assert_eq!((output.code, output.stdout.as_str()), (2, first), "{}", output.stderr);
        assert!(output.stderr.contains("error: stdin, line 2 is not UTF-8"), "{}", output.stderr);
        assert!(output.stderr.contains("hint: convert it first"), "{}", output.stderr);
    }
    let output = run(&["--input-format", "csv"]);
    assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{}", output.stderr);
    assert!(output.stderr.contains("line 2") && output.stderr.contains("UTF-8"), "{}", output.stderr);
    let output = burla.map(["f.py:same", "--input-format", "json"]).stdin(b"[\"\xff\"]").run();
    assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{}", output.stderr);
    // A command takes bytes as they are.
    let output = burla.map(["--", "cat"]).stdin(latin).run();
    assert_eq!((output.code, output.stdout_bytes.as_slice()), (0, &latin[..]), "{}", output.stderr);
}

#[test]
fn no_inputs_are_a_job_of_none() {
    let burla = folder();
    burla.file("empty.jsonl", "");
    burla.file("empty.json", " [ ]\n");
    burla.file("header.csv", "a,b\n");
    burla.file("empty.csv", "");
    for args in [
        &["f.py:same"][..],
        &["f.py:same", "empty.jsonl"],
        &["f.py:same", "empty.json"],
        &["f.py:same", "header.csv"],
        &["f.py:same", "empty.csv"],
        &["--", "echo"],
        &["f.py:same", "--output-format", "records"],
    ] {
        let output = burla.map(args).run();
        assert_eq!((output.code, output.stdout.as_str()), (0, ""), "{args:?}: {}", output.stderr);
        assert!(output.stderr.contains("burla: 0 inputs in "), "{args:?}: {}", output.stderr);
    }
    let output = burla.map(["f.py:same", "empty.jsonl", "-o", "out", "--quiet"]).run();
    assert_eq!((output.code, output.stderr.as_str(), burla.read("out").as_str()), (0, "", ""));
}

#[test]
fn without_a_python_there_is_a_hint() {
    let burla = folder();
    std::fs::create_dir(burla.path("nothing")).expect("make a folder");
    let run = burla.map(["f.py:same", "in.jsonl"]).env("PATH", burla.path("nothing"));
    assert_refused(
        run,
        &["error: there is no python3 on PATH\nhint: install Python 3, or name one with --python"],
    );
    // Named, none is needed there; nor for a command.
    let python = python().display().to_string();
    let run = |args: &[&str]| burla.map(args).env("PATH", burla.path("nothing")).run();
    let output = run(&["f.py:same", "in.jsonl", "--quiet", "--python", &python]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n2\n"), "{}", output.stderr);
    let output = run(&["in.jsonl", "--", "/bin/echo", "{}"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n2\n"), "{}", output.stderr);
}

#[test]
fn a_python_that_is_none_is_told() {
    let burla = folder();
    burla.script("bin/fake", "#!/bin/sh\necho 'I am no Python' >&2\nexit 1\n");
    let output = burla.map(["f.py:same", "in.jsonl", "--python", "bin/fake"]).run();
    assert!(output.code == 2 || output.code == 3, "{}: {}", output.code, output.stderr);
    assert_eq!(output.stdout, "");
    assert!(output.stderr.contains("bin/fake") && output.stderr.contains("error: "), "{}", output.stderr);
    burla.script("bin/silent", "#!/bin/sh\nexit 0\n");
    let output = burla.map(["f.py:same", "in.jsonl", "--python", "bin/silent"]).run();
    assert!(output.code == 2 || output.code == 3, "{}: {}", output.code, output.stderr);
    assert!(output.stderr.contains("bin/silent") && output.stderr.contains("error: "), "{}", output.stderr);
}

#[test]
fn a_terminal_as_stdin_is_refused_with_a_hint() {
    let burla = folder();
    let script = "import os, subprocess, sys\nmaster, slave = os.openpty()\n\
                  sys.exit(subprocess.run(sys.argv[1:], stdin=slave).returncode)\n";
    for args in [&["f.py:same"][..], &["f.py:same", "-"], &["--", "echo", "{}"]] {
        let burla_map = [binary().display().to_string(), "map".into()];
        let run = burla.program("python3").args(["-c", script]).args(&burla_map).args(args);
        assert_refused(run, &["error: there are no inputs\nhint: name a file with inputs"]);
    }
}

#[test]
fn values_of_the_environment_are_passed_on_and_never_shown() {
    let burla = Burla::new();
    burla.file("f.py", "import os\ndef f(x):\n    if x: raise ValueError('failed')\n    return [os.environ['A'], os.environ['B']]\n");
    let secret = "hunter2hunter2";
    let args =
        ["f.py:f", "--env", "A=hunter2hunter2", "--env", "B", "-o", "out", "--output-format", "records"];
    let output = burla.map(args).env("B", "x=1, y=\u{e9}").stdin("0\n1\n").run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let first: serde_json::Value =
        serde_json::from_str(burla.read("out").lines().next().expect("a line")).expect("JSON");
    assert_eq!(first["result"], serde_json::json!([secret, "x=1, y=\u{e9}"]));
    assert!(!output.stderr.contains(secret), "{}", output.stderr);
    assert!(!burla.read("out.failed.jsonl").contains(secret));
    // Nor where the command line is at fault.
    for args in [&["--env", "=hunter2hunter2"][..], &["--env", "A=hunter2hunter2", "--no-such-option"]] {
        let output = burla.map(["f.py:f"]).args(args).stdin("0\n").run();
        assert_eq!(output.code, 2);
        assert!(!output.stderr.contains(secret), "{}", output.stderr);
    }
}

#[test]
fn a_call_sees_only_what_env_names_and_threads_set_to_its_cpus() {
    let burla = Burla::new();
    burla.file("f.py", "import os\ndef f(name): return os.environ.get(name)\n");
    let names = "\"OMP_NUM_THREADS\"\n\"MKL_NUM_THREADS\"\n\"OWN\"\n\"PASSED\"\n\"HOME\"\n";
    let args = ["f.py:f", "--cpu", "0.5", "--env", "MKL_NUM_THREADS=7", "--env", "PASSED"];
    let output =
        burla.map(args).env("OWN", "mine").env("PASSED", "on").env("HOME", "/home").stdin(names).run();
    let expected = "\"1\"\n\"7\"\nnull\n\"on\"\n\"/home\"\n";
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
}

#[test]
fn a_bad_line_of_a_live_producer_ends_the_job() {
    let burla = folder();
    let mut live = burla.map(["f.py:same"]).spawn();
    live.write("1\nnot json\n");
    wait_until("its end, though its stdin is open", LIMIT, || live.ended());
    let output = live.wait();
    assert_eq!((output.code, output.stdout.as_str()), (2, "1\n"), "{}", output.stderr);
}
