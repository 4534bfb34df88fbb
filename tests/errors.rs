//! Calls that fail: what is told about them, what is repeated, and when the job stops.

use std::fs;

use burla_tests::{Burla, Output};
use serde_json::{Value, json};

fn with(source: &str) -> Burla {
    let burla = Burla::new();
    burla.file("f.py", source);
    burla
}

fn numbers(count: u64) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

/// Stderr without the lines in which newer Pythons underline things.
fn told(output: &Output) -> String {
    let marks = |line: &str| !line.is_empty() && line.trim_matches([' ', '~', '^']).is_empty();
    output.stderr.lines().filter(|line| !marks(line)).map(|line| format!("{line}\n")).collect()
}

/// The records of the failures, by the order of their inputs.
fn failures(burla: &Burla) -> Vec<Value> {
    burla.read("failed").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[track_caller]
fn assert_told(output: &Output, expected: &str) {
    let told = told(output);
    assert!(told.contains(expected), "--- expected:\n{expected}\n--- told:\n{told}");
}

#[test]
fn the_first_of_equal_tracebacks_is_shown_and_the_others_are_counted() {
    let burla = with(
        "import helper\n\ndef f(x):\n    if x == 5:\n        return helper.other(x)\n    if x % 2:\n        return helper.deep(x)\n    return x\n",
    );
    burla.file(
        "helper.py",
        "def deep(x):\n    raise ValueError(f'{x} is odd')\n\ndef other(x):\n    return {}['missing']\n",
    );
    let output =
        burla.map(["f.py:f", "--errors", "failed", "--max-parallelism", "1"]).stdin(numbers(10)).run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "0\nnull\n2\nnull\n4\nnull\n6\nnull\n8\nnull\n"));
    let (f, helper) = (burla.path("f.py"), burla.path("helper.py"));
    let (f, helper) = (f.display(), helper.display());
    assert_told(
        &output,
        &format!(
            "burla: input 1 failed:\n  Traceback (most recent call last):\n    File \"{f}\", line 7, in f\n      return helper.deep(x)\n    \
             File \"{helper}\", line 2, in deep\n      raise ValueError(f'{{x}} is odd')\n  ValueError: 1 is odd\n"
        ),
    );
    assert_told(
        &output,
        &format!(
            "burla: input 5 failed:\n  Traceback (most recent call last):\n    File \"{f}\", line 5, in f\n      return helper.other(x)\n    \
             File \"{helper}\", line 5, in other\n      return {{}}['missing']\n  KeyError: 'missing'\n"
        ),
    );
    assert_eq!(output.stderr.matches("Traceback").count(), 2, "{}", output.stderr);
    assert_told(&output, "burla: 4 inputs failed like this: ValueError: ");
    assert_told(&output, "5 failed: input 1, 3, 5, 7, 9 (output line 2, 4, 6, 8, 10)");
    assert!(!output.stderr.contains("runner"), "{}", output.stderr);
    let told: Vec<_> = failures(&burla).iter().map(|r| r["error"]["message"].clone()).collect();
    assert_eq!(told, ["1 is odd", "3 is odd", "'missing'", "7 is odd", "9 is odd"]);
}

#[test]
fn a_file_from_elsewhere_is_named_by_its_whole_path() {
    let (burla, elsewhere) = (with("def f(x):\n    raise ValueError(x)\n"), Burla::new());
    let file = burla.path("f.py").display().to_string();
    let output = elsewhere.map([format!("{file}:f")]).stdin("1\n").run();
    assert_eq!(output.code, 1);
    assert_told(&output, &format!("\n    File \"{file}\", line 2, in f\n      raise ValueError(x)\n"));
    // So is one of a module.
    burla.file("pack/__init__.py", "");
    let inner = burla.file("pack/inner.py", "def g(x):\n    raise ValueError(x)\n");
    let output = burla.map(["pack.inner:g"]).stdin("1\n").run();
    assert_told(
        &output,
        &format!("\n    File \"{}\", line 2, in g\n      raise ValueError(x)\n", inner.display()),
    );
}

#[test]
fn the_traceback_is_told_while_the_job_goes_on() {
    let burla = with("def f(x):\n    raise ValueError(x)\n");
    let mut live = burla.map(["f.py:f"]).spawn();
    live.write("1\n");
    burla_tests::wait_until("the traceback", burla_tests::LIMIT, || live.stderr().contains("ValueError: 1"));
    assert!(!live.ended());
    assert_eq!(live.wait().code, 1);
}

/// A function that leaves a byte for each of its calls and then fails as `fail` says.
fn counted(fail: &str) -> Burla {
    with(&format!(
        "import os, time\ndef f(x):\n    fd = os.open(os.environ['CALLS'], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n    \
         os.write(fd, b'.')\n    os.close(fd)\n    time.sleep(0.002)\n    {fail}\n    return x\n"
    ))
}

/// Runs it, and tells how many calls there were.
fn run_counted(burla: &Burla, args: &[&str], inputs: u64) -> (Output, u64) {
    let calls = burla.path("calls");
    let output = burla
        .map(["f.py:f", "--env", &format!("CALLS={}", calls.display())])
        .args(args)
        .stdin(numbers(inputs))
        .run();
    let count = fs::metadata(&calls).expect("there were calls").len();
    fs::remove_file(&calls).expect("remove it");
    (output, count)
}

#[test]
fn a_job_of_which_the_first_100_all_fail_alike_is_stopped() {
    let burla = counted("raise ValueError(x)");
    let (output, calls) = run_counted(&burla, &[], 6000);
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!((100..4000).contains(&calls), "{calls} calls; {}", output.stderr);
    assert_told(&output, "the first 100 inputs have all failed alike: stopping (--keep-going goes on)\n");
    assert_eq!(output.stderr.matches("Traceback").count(), 1, "{}", output.stderr);
    assert!(output.stdout.lines().count() >= 100 && output.stdout.lines().all(|line| line == "null"));

    // Not the 99 first ones.
    let (output, calls) = run_counted(&burla, &[], 99);
    assert_eq!((output.code, calls), (1, 99), "{}", output.stderr);
    assert!(!output.stderr.contains("stopping"), "{}", output.stderr);
}

#[test]
fn quiet_does_not_hide_why_a_job_was_stopped() {
    let (output, _) = run_counted(&counted("raise ValueError(x)"), &["--quiet"], 6000);
    assert_eq!(output.code, 1);
    assert_told(&output, "the first 100 inputs have all failed alike: stopping");
}

#[test]
fn keep_going_runs_them_all() {
    let (output, calls) = run_counted(&counted("raise ValueError(x)"), &["--keep-going"], 400);
    assert_eq!((output.code, calls), (1, 400), "{}", output.stderr);
    assert_eq!(output.stdout, "null\n".repeat(400));
    assert_told(&output, "burla: 400 inputs failed like this: ValueError: ");
}

#[test]
fn failures_of_several_kinds_or_a_single_success_do_not_stop_a_job() {
    let (output, calls) = run_counted(&counted("raise ValueError(x) if x % 2 else KeyError(x)"), &[], 300);
    assert_eq!((output.code, calls), (1, 300), "{}", output.stderr);
    let source = counted("\n    if x != 0: raise ValueError(x)");
    let (output, calls) = run_counted(&source, &[], 300);
    assert_eq!((output.code, calls), (1, 300), "{}", output.stderr);
    assert_eq!(output.stdout, format!("0\n{}", "null\n".repeat(299)));
}

#[test]
fn fail_fast_stops_at_the_first_failure() {
    let burla = counted("\n    if x == 10: raise ValueError(x)");
    let (output, calls) = run_counted(&burla, &["--fail-fast", "--max-parallelism", "1"], 6000);
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!((10..4000).contains(&calls), "{calls} calls; {}", output.stderr);
    assert_told(&output, "ValueError: 10");
    // What was finished before is delivered.
    assert!(output.stdout.starts_with(&format!("{}null\n", numbers(10))), "{}", output.stdout);
}

#[test]
fn one_bad_input_among_good_ones_keeps_none_of_them_back() {
    let (output, calls) = run_counted(&counted("\n    if x == 150: raise ValueError(x)"), &[], 400);
    assert_eq!((output.code, calls), (1, 400), "{}", output.stderr);
    assert_eq!(output.stdout, numbers(400).replace("\n150\n", "\nnull\n"));
    assert_told(&output, "1 failed: input 150 (output line 151)");
    // Commands alike.
    let output = Burla::new().map(["--", "sh", "-c", "test {} != 3 && echo {}"]).stdin(numbers(6)).run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "0\n1\n2\n4\n5\n"), "{}", output.stderr);
}

#[test]
fn a_failed_call_is_repeated_as_often_as_retries_says() {
    let burla = counted("raise ValueError(x)");
    let (output, calls) = run_counted(&burla, &["--retries", "3", "--errors", "failed"], 5);
    assert_eq!((output.code, calls, output.stdout.as_str()), (1, 20, "null\nnull\nnull\nnull\nnull\n"));
    assert!(failures(&burla).iter().all(|record| record["attempts"] == json!(4)), "{}", burla.read("failed"));
    let (_, calls) = run_counted(&burla, &[], 5);
    assert_eq!(calls, 5);

    // The third call goes well: only what is in the end is told.
    let burla = counted(
        "\n    path = os.environ['CALLS'] + str(x)\n    open(path, 'a').write('.')\n    \
         if x % 2 and os.path.getsize(path) < 3: raise ValueError(x)",
    );
    let args = ["--retries", "2", "--output-format", "records"];
    let (output, calls) = run_counted(&burla, &args, 6);
    assert_eq!((output.code, calls), (0, 12), "{}", output.stderr);
    let attempts: Vec<Value> = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["attempts"].clone())
        .collect();
    assert_eq!(attempts, [1, 3, 1, 3, 1, 3]);
    assert!(!output.stderr.contains("failed"), "{}", output.stderr);
}

#[test]
fn a_failed_command_is_repeated_too() {
    let burla = Burla::new();
    let script = format!(
        "echo x >> {0}/calls{{}}; test $(wc -l < {0}/calls{{}}) = 2 && echo done {{}}",
        burla.path("").display()
    );
    let output = burla.map(["--retries", "1", "--", "sh", "-c", &script]).stdin("1\n2\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "done 1\ndone 2\n"), "{}", output.stderr);
    assert_eq!(burla.read("calls1"), "x\nx\n");
}

#[test]
fn how_a_command_failed_is_told() {
    let burla = Burla::new();
    burla.file("not-executable", "#!/bin/sh\n");
    let script = "case {} in 0) exit 3;; 1) kill -TERM $$;; 2) exit 0;; esac";
    let output = burla.map(["--errors", "failed", "--", "sh", "-c", script]).stdin(numbers(3)).run();
    assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{}", output.stderr);
    assert_told(&output, "burla: input 0 failed:\n  exit status 3\n");
    assert_told(&output, "burla: input 1 failed:\n  killed by signal 15 (SIGTERM)\n");
    // What a command prints has no line for each input.
    assert_told(&output, "2 failed: input 0, 1, see failed\n");
    let output = burla.map(["--", "./not-executable"]).stdin("1\n").run();
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert_told(
        &output,
        "error: command ./not-executable can't be executed\nhint: chmod +x ./not-executable\n",
    );
}

#[test]
fn causes_contexts_and_notes_are_part_of_the_traceback() {
    let burla = with(
        "def f(x):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        if x == 0:\n            raise KeyError('k') from e\n        \
         if x == 1:\n            raise RuntimeError('second')\n        raise RuntimeError('alone') from None\n",
    );
    let output = burla.map(["f.py:f", "--errors", "failed"]).stdin(numbers(3)).run();
    assert_eq!(output.code, 1);
    let texts: Vec<String> =
        failures(&burla).iter().map(|r| r["error"]["traceback"].as_str().expect("text").to_owned()).collect();
    let cause = "\nThe above exception was the direct cause of the following exception:\n\nTraceback";
    assert!(texts[0].contains(&format!("ZeroDivisionError: division by zero\n{cause}")), "{}", texts[0]);
    assert!(texts[0].ends_with("KeyError: 'k'\n"), "{}", texts[0]);
    assert!(
        texts[1].contains("During handling of the above exception, another exception occurred:"),
        "{}",
        texts[1]
    );
    assert!(
        !texts[2].contains("ZeroDivisionError") && texts[2].ends_with("RuntimeError: alone\n"),
        "{}",
        texts[2]
    );
    assert!(texts.iter().all(|text| !text.contains("runner")), "{texts:?}");
    assert_told(&output, "  ZeroDivisionError: division by zero\n");

    if burla.program("python3").args(["-c", "BaseException.add_note, ExceptionGroup"]).run().code == 0 {
        burla.file(
            "g.py",
            "def f(x):\n    e = ValueError('noted')\n    e.add_note('try turning it off')\n    raise ExceptionGroup('several', [e, KeyError('k')])\n",
        );
        let output = burla.map(["g.py:f"]).stdin("1\n").run();
        assert_told(&output, "ExceptionGroup: several (2 sub-exceptions)\n");
        assert_told(&output, "ValueError: noted\n");
        assert_told(&output, "try turning it off\n");
    }
}

#[test]
fn exceptions_that_end_a_program_only_fail_their_input() {
    let burla = with(
        "import sys\nclass Odd(BaseException): pass\n\
         def f(x):\n    if x == 0: sys.exit(0)\n    if x == 1: raise SystemExit('bye')\n    if x == 2: raise KeyboardInterrupt\n    \
         if x == 3: raise GeneratorExit\n    if x == 4: raise Odd\n    if x == 5: raise StopIteration(7)\n    return x\n",
    );
    let output = burla.map(["f.py:f", "--errors", "failed"]).stdin(numbers(8)).run();
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (1, "null\nnull\nnull\nnull\nnull\nnull\n6\n7\n"),
        "{}",
        output.stderr
    );
    let types: Vec<Value> = failures(&burla).iter().map(|record| record["error"]["type"].clone()).collect();
    assert_eq!(
        types,
        ["SystemExit", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "f.Odd", "StopIteration"]
    );
    assert!(failures(&burla).iter().all(|record| record["attempts"] == json!(1)));
    assert_told(&output, "  SystemExit: bye\n");
}

#[test]
fn exceptions_that_cannot_be_shown_still_fail_only_their_input() {
    let burla = with(
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError('no')\n    __repr__ = __str__\n\
         class Liar(Exception):\n    def __str__(self): return 7\n\
         def deep(n): return deep(n + 1)\n\
         def f(x):\n    if x == 0: raise Mute('x')\n    if x == 1: raise Liar\n    if x == 2: deep(0)\n    if x == 3: raise ValueError('\\udc80 \\x00 \\x1b[31m')\n    \
         if x == 4: raise ValueError('long ' * 1000000)\n    if x == 5: raise ValueError('two\\nlines')\n    if x == 6: eval('1 +')\n    return x\n",
    );
    let output = burla.map(["f.py:f", "--errors", "failed"]).stdin(numbers(8)).run();
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (1, &*format!("{}7\n", "null\n".repeat(7))),
        "{}",
        output.stderr
    );
    let found = failures(&burla);
    let types: Vec<Value> = found.iter().map(|record| record["error"]["type"].clone()).collect();
    let expected =
        ["f.Mute", "f.Liar", "RecursionError", "ValueError", "ValueError", "ValueError", "SyntaxError"];
    assert_eq!(types, expected);
    let mute = found[0]["error"]["message"].as_str().expect("text");
    assert!(mute.contains("__str__") && mute.contains("RuntimeError"), "{mute}");
    assert!(output.stderr.len() < 1_000_000, "{} bytes on stderr", output.stderr.len());
    assert_told(&output, "  ValueError: two\n  lines\n");
    assert_told(&output, "[Previous line repeated ");
}

#[test]
fn a_function_that_takes_two_arguments_is_told_that_an_input_is_one() {
    let burla = with(
        "def add(a, b):\n    return a + b\ndef none():\n    pass\ndef fine(a, b=1, *, c=2):\n    return a\n",
    );
    let output = burla.map(["f.py:add"]).stdin("[1, 2]\n[3, 4]\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "null\nnull\n"));
    assert_told(&output, "TypeError: add() missing 1 required positional argument: 'b'\n");
    let hint = "hint: f.py:add takes 2 arguments, but an input is one argument: write it as def add(pair): a, b = pair\n";
    assert_told(&output, hint);
    assert_eq!(output.stderr.matches("hint:").count(), 1, "{}", output.stderr);
    let output = burla.map(["f.py:add"]).stdin("1\n").run();
    assert_told(&output, "hint: f.py:add takes 2 arguments, but each input is passed as one argument\n");
    let output = burla.map(["f.py:none"]).stdin("1\n").run();
    assert_told(&output, "hint: f.py:none takes no argument, but each input is passed as one argument\n");
    let output = burla.map(["f.py:fine"]).stdin("[1, 2]\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "[1, 2]\n"));
}

#[test]
fn what_is_no_result_yet_has_a_hint() {
    let burla = with("async def wait(x): return x\ndef steps(x): yield x\n");
    let output = burla.map(["f.py:steps"]).stdin("1\n").run();
    assert_eq!(output.code, 1);
    assert_told(&output, "generator");
    assert_told(&output, "hint: return list(...) of it instead");
    let output = burla.map(["f.py:wait"]).stdin("1\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "null\n"), "{}", output.stderr);
    assert_told(&output, "coroutine");
    assert_told(&output, "hint: ");
}

#[test]
fn a_module_that_a_call_does_not_find_has_a_hint() {
    let burla = with("def f(x):\n    import no_such_module\n");
    let output = burla.map(["f.py:f"]).stdin("1\n").run();
    assert_eq!(output.code, 1);
    assert_told(&output, "ModuleNotFoundError: No module named 'no_such_module'\n");
    assert_told(&output, "hint: install it for ");
}

#[test]
fn a_file_that_a_call_does_not_find_has_a_hint() {
    let burla = with("def f(x):\n    return open('data.txt').read()\n");
    burla.file("data.txt", "here");
    let output = burla.map(["f.py:f"]).stdin("1\n").run();
    assert_eq!(output.code, 1);
    assert_told(&output, "FileNotFoundError: [Errno 2] No such file or directory: 'data.txt'\n");
    assert_told(&output, "hint: ");
    assert_told(&output, "--include");
}

#[test]
fn an_input_that_python_cannot_read_only_fails_itself() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let burla = with("def f(x):\n    return 1\n");
    let output = burla.map(["f.py:f"]).stdin(format!("1\n{deep}\n3\n")).run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "1\nnull\n1\n"), "{}", output.stderr);
    assert_told(&output, "1 failed: input 1 (output line 2)");
    assert!(!output.stderr.contains("decoder.py"), "frames that are not the user's: {}", output.stderr);
}

#[test]
fn an_input_that_does_not_fit_into_an_argument_only_fails_itself() {
    let large = "x".repeat(200_000);
    let output = Burla::new().map(["--", "echo", "{}"]).stdin(format!("{large}\na\0b\nc\n")).run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "c\n"), "{}", output.stderr);
    assert_told(&output, "2 failed: input 0, 1");
    assert_told(&output, "stdin");
}
