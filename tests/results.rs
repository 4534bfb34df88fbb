//! What comes out: values and records, on stdout and in files, and how it ends.

use std::{collections::BTreeSet, time::Duration};

use burla_tests::{Burla, LIMIT, Output, binary, wait_until};
use serde_json::{Value, json};

/// Fails on odd numbers.
const EVEN: &str =
    "def even(x):\n    if x % 2:\n        raise ValueError(f'{x} is odd')\n    return x * 10\n";

/// A folder with a function `f`.
fn with(source: &str) -> Burla {
    let burla = Burla::new();
    burla.file("f.py", source);
    burla
}

fn numbers(count: u64) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

#[track_caller]
fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

#[track_caller]
fn expect(output: &Output, code: i32, stdout: &str) {
    assert_eq!((output.code, output.stdout.as_str()), (code, stdout), "{}", output.stderr);
}

#[test]
fn results_come_in_the_order_of_the_inputs() {
    let burla = with("import time\ndef f(x):\n    time.sleep(0.1 if x < 2 else 0)\n    return x\n");
    expect(&burla.map(["f.py:f"]).stdin(numbers(500)).run(), 0, &numbers(500));
    let output =
        burla.map(["--", "sh", "-c", "test {} -gt 1 || sleep 0.1; echo {}"]).stdin(numbers(20)).run();
    expect(&output, 0, &numbers(20));
}

#[test]
fn unordered_results_are_the_same_ones_as_they_finish() {
    // The first input ends only when the last but one has.
    let burla = with(
        "import os, time\ndef f(x):\n    while x == 0 and not os.path.exists(os.environ['GATE']):\n        time.sleep(0.005)\n    \
         if x == 48:\n        open(os.environ['GATE'], 'w').close()\n    return x\n",
    );
    let gate = format!("GATE={}", burla.path("gate").display());
    let output =
        burla.map(["f.py:f", "--unordered", "--env", &gate, "--cpu", "0.5"]).stdin(numbers(50)).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let found: Vec<u64> = output.stdout.lines().map(|line| line.parse().expect("a number")).collect();
    assert_ne!(found[0], 0);
    assert_eq!(found.iter().copied().collect::<BTreeSet<_>>(), (0..50).collect());
    assert_eq!(found.len(), 50);
}

#[test]
fn a_failed_input_is_null_and_the_summary_names_it() {
    let output = with(EVEN).map(["f.py:even"]).stdin(numbers(6)).run();
    expect(&output, 1, "0\nnull\n20\nnull\n40\nnull\n");
    assert!(output.stderr.contains("3 failed: input 1, 3, 5 (output line 2, 4, 6)"), "{}", output.stderr);
    assert!(output.stderr.contains("6 inputs in "), "{}", output.stderr);
}

#[test]
fn many_failed_inputs_are_not_all_named() {
    let output = with(EVEN).map(["f.py:even"]).stdin(numbers(60)).run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let named = "30 failed: input 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 (output line 2, 4, 6, 8, 10, 12, 14, 16, 18, 20) and 20 more";
    assert!(output.stderr.contains(named), "{}", output.stderr);
}

#[test]
fn with_an_output_file_failures_go_to_a_file_beside_it() {
    let burla = with(EVEN);
    let output = burla.map(["f.py:even", "-o", "out.jsonl"]).stdin(numbers(4)).run();
    expect(&output, 1, "");
    assert_eq!(burla.read("out.jsonl"), "0\nnull\n20\nnull\n");
    let failed = json_lines(&burla.read("out.jsonl.failed.jsonl"));
    let told: Vec<_> = failed.iter().map(|r| (r["index"].as_u64(), r["error"]["message"].as_str())).collect();
    assert_eq!(told, [(Some(1), Some("1 is odd")), (Some(3), Some("3 is odd"))]);
    assert!(output.stderr.contains("see out.jsonl.failed.jsonl"), "{}", output.stderr);

    // Of a run in which nothing failed no such file is there, nor one of a run before it.
    let output = burla.map(["f.py:even", "-o", "out.jsonl"]).stdin("2\n").run();
    expect(&output, 0, "");
    assert_eq!(burla.read("out.jsonl"), "20\n");
    assert!(!burla.path("out.jsonl.failed.jsonl").exists());
}

#[test]
fn failures_go_where_errors_says() {
    let burla = with(EVEN);
    let output = burla.map(["f.py:even", "--errors", "bad.jsonl", "--with-input"]).stdin(numbers(3)).run();
    expect(&output, 1, "0\nnull\n20\n");
    let failed = json_lines(&burla.read("bad.jsonl"));
    assert_eq!((failed.len(), &failed[0]["index"], &failed[0]["input"]), (1, &json!(1), &json!(1)));
    validate(&failed[0]);
    assert!(output.stderr.contains("see bad.jsonl"), "{}", output.stderr);
    let output = burla.map(["f.py:even", "-o", "out", "--errors", "bad.jsonl"]).stdin(numbers(2)).run();
    expect(&output, 1, "");
    assert_eq!(json_lines(&burla.read("bad.jsonl")).len(), 1);
    assert!(!burla.path("out.failed.jsonl").exists());
}

#[test]
fn records_tell_all_about_an_input() {
    let burla = with(EVEN);
    let records = ["--output-format", "records"];
    let output =
        burla.map(["f.py:even", "--with-input", "--retries", "2"]).args(records).stdin(numbers(4)).run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let found = json_lines(&output.stdout);
    assert_eq!(found.len(), 4);
    for (index, record) in found.iter().enumerate() {
        validate(record);
        assert_eq!((&record["index"], &record["input"]), (&json!(index), &json!(index)));
        assert_ne!(record["worker"], json!(""));
        let (status, attempts) = if index % 2 == 0 { ("ok", 1) } else { ("failed", 3) };
        assert_eq!((&record["status"], &record["attempts"]), (&json!(status), &json!(attempts)), "{record}");
    }
    assert_eq!(found[2]["result"], json!(20));
    let error = &found[3]["error"];
    assert_eq!((&error["kind"], &error["type"]), (&json!("exception"), &json!("ValueError")));
    assert_eq!(
        (&error["message"], &error["fingerprint"]),
        (&json!("3 is odd"), &found[1]["error"]["fingerprint"])
    );
    let traceback = error["traceback"].as_str().expect("there is one");
    assert!(traceback.starts_with("Traceback (most recent call last):\n") && traceback.contains("in even"));

    let output = burla.map(["f.py:even"]).args(records).stdin("2\n").run();
    assert_eq!(json_lines(&output.stdout)[0].get("input"), None);
}

#[test]
fn records_of_all_sorts_of_failures_follow_the_schema() {
    let burla = with(
        "import os, time\ndef f(x):\n    if x == 'raise': raise KeyError(x)\n    if x == 'die': os._exit(7)\n    \
         if x == 'hang': time.sleep(600)\n    if x == 'set': return {1}\n    return None\n",
    );
    let args = ["--output-format", "records", "--unordered", "--timeout", "0.3", "--keep-going"];
    let inputs = "\"raise\"\n\"die\"\n\"hang\"\n\"set\"\n\"fine\"\n";
    let output = burla.map(["f.py:f", "--with-input"]).args(args).stdin(inputs).run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let records = json_lines(&output.stdout);
    records.iter().for_each(validate);
    let kind_of = |input: &str| {
        let record =
            records.iter().find(|record| record["input"] == input).expect("every input has a record");
        (record["error"]["kind"].clone(), record["attempts"].as_u64().expect("a count"))
    };
    assert_eq!(kind_of("raise"), (json!("exception"), 1));
    assert_eq!(kind_of("die"), (json!("crashed"), 3));
    assert_eq!(kind_of("hang"), (json!("timeout"), 1));
    assert_eq!(kind_of("set"), (json!("result"), 1));
    assert_eq!(kind_of("fine"), (Value::Null, 1));

    let script = ["--", "sh", "-c", "printf 'said {} \\377'; test {} != 1"];
    let output = burla.map(args).args(["--with-input"]).args(script).stdin("1\n2\n").run();
    let mut records = json_lines(&output.stdout);
    records.sort_by_key(|record| record["index"].as_u64());
    records.iter().for_each(validate);
    assert_eq!((output.code, records.len()), (1, 2));
    assert_eq!(records[0]["error"]["stdout"], json!("said 1 \u{fffd}"));
    assert_eq!((&records[0]["error"]["kind"], &records[0]["input"]), (&json!("exit"), &json!("1")));
    assert_eq!((&records[1]["result"], &records[1]["input"]), (&json!("said 2 \u{fffd}"), &json!("2")));
}

#[test]
fn records_of_a_stopped_job_follow_the_schema() {
    let burla = with("def f(x):\n    raise ValueError(x)\n");
    let args = ["f.py:f", "--output-format", "records", "--fail-fast", "--with-input"];
    let output = burla.map(args).stdin(numbers(5000)).run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let records = json_lines(&output.stdout);
    records.iter().for_each(validate);
    assert!(records.iter().any(|record| record["status"] == "failed"));
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record["index"], json!(index));
    }
}

#[test]
fn records_of_files_name_them() {
    let burla = with("def f(path): return open(path).read()\n");
    burla.file("data/a.txt", "content");
    let args = ["f.py:f", "--files", "data/*.txt", "--output-format", "records", "--with-input"];
    let output = burla.map(args).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let record = &json_lines(&output.stdout)[0];
    validate(record);
    assert_eq!((&record["result"], &record["input"]), (&json!("content"), &json!("data/a.txt")));
}

#[test]
fn nan_and_infinity_become_null_with_one_warning() {
    let burla = with(
        "import math\ndef f(x): return [math.nan, {'a': math.inf, 'b': [-math.inf, 1.5]}] if x % 2 else math.nan\n",
    );
    let output = burla.map(["f.py:f"]).stdin(numbers(30)).run();
    expect(&output, 0, &"null\n[null, {\"a\": null, \"b\": [null, 1.5]}]\n".repeat(15));
    let warnings: Vec<_> = output.stderr.lines().filter(|line| line.contains("warning")).collect();
    assert_eq!(warnings.len(), 1, "{}", output.stderr);
    assert!(warnings[0].contains("NaN") && warnings[0].contains("input 0"), "{}", warnings[0]);
}

#[test]
fn values_of_python_become_the_obvious_json() {
    let burla = with(
        "import collections, dataclasses, datetime, enum, pathlib\n\
         @dataclasses.dataclass\nclass Point:\n    x: int\n    when: object = None\n\
         Pair = collections.namedtuple('Pair', 'a b')\n\
         class Level(enum.IntEnum):\n    LOW = 1\n\
         utc = datetime.timezone.utc\n\
         values = [Point(1, Point(2)), datetime.datetime(2024, 2, 29, 12, 30, tzinfo=utc), datetime.date(2024, 2, 29),\n    \
         datetime.time(12, 30), pathlib.Path('a') / 'b', (1, (2,)), Pair(1, 2), {1: 'a', None: 'b', True: 'c', 2.5: 'd'},\n    \
         [Point(pathlib.PurePosixPath('p'))], {'k': datetime.date(2024, 1, 1)}, Level.LOW, 2**70, True, None, '\\x7f\\u2028é']\n\
         def f(i): return values[i]\n",
    );
    let expected = "{\"x\": 1, \"when\": {\"x\": 2, \"when\": null}}\n\"2024-02-29T12:30:00+00:00\"\n\"2024-02-29\"\n\"12:30:00\"\n\
                    \"a/b\"\n[1, [2]]\n[1, 2]\n{\"1\": \"c\", \"null\": \"b\", \"2.5\": \"d\"}\n[{\"x\": \"p\", \"when\": null}]\n\
                    {\"k\": \"2024-01-01\"}\n1\n1180591620717411303424\ntrue\nnull\n\"\u{7f}\u{2028}é\"\n";
    expect(&burla.map(["f.py:f"]).stdin(numbers(15)).run(), 0, expected);
}

#[test]
fn numbers_of_numpy_become_json_numbers() {
    let burla = Burla::new();
    if burla.program("python3").args(["-c", "import numpy"]).run().code != 0 {
        return;
    }
    burla.file(
        "f.py",
        "import numpy as np\n\
         values = [np.int64(7), np.float32(0.5), np.bool_(True), np.arange(6).reshape(2, 3), np.array([1.5, np.nan]),\n    \
         {'a': np.uint8(255)}, np.datetime64('2024-02-29'), np.array(['x', 'y']), np.float64('nan')]\n\
         def f(i): return values[i]\n",
    );
    let expected = "7\n0.5\ntrue\n[[0, 1, 2], [3, 4, 5]]\n[1.5, null]\n{\"a\": 255}\n\"2024-02-29\"\n[\"x\", \"y\"]\nnull\n";
    expect(&burla.map(["f.py:f"]).stdin(numbers(9)).run(), 0, expected);
}

#[test]
fn a_result_that_json_has_no_form_for_is_named() {
    let burla = with(
        "class Thing: pass\nloop = []\nloop.append(loop)\n\
         values = [1, {2}, b'bytes', {'deep': [Thing()]}, {(1, 2): 3}, loop, lambda: 0, iter([]), 1j]\n\
         def f(i): return values[i]\n",
    );
    let output = burla.map(["f.py:f", "--errors", "failed"]).stdin(numbers(9)).run();
    expect(&output, 1, "1\nnull\nnull\nnull\nnull\nnull\nnull\nnull\nnull\n");
    let types = ["set", "bytes", "Thing", "tuple", "itself", "function", "list_iterator", "complex"];
    for (record, name) in json_lines(&burla.read("failed")).iter().zip(types) {
        validate(record);
        let message = record["error"]["message"].as_str().expect("a message");
        assert!(message.contains(name), "{name} is not named: {message}");
        let index = record["index"].as_u64().expect("an index");
        assert!(
            output.stderr.contains(&format!("input {index} failed:\n  {message}")),
            "{message}: {}",
            output.stderr
        );
    }
}

#[test]
fn what_a_command_wrote_is_printed_whole_and_in_order_whatever_came_of_it() {
    let burla = Burla::new();
    let script = "test {} = 0 && sleep 0.1; printf 'a{}'; printf 'b'; test {} != 2";
    let output = burla.map(["--", "sh", "-c", script]).stdin(numbers(4)).run();
    expect(&output, 1, "a0ba1ba2ba3b");
    assert!(output.stderr.contains("1 failed: input 2"), "{}", output.stderr);
    let large: String = (0..3).map(|i| format!("{i}\n").repeat(1 << 19)).collect();
    let script = "yes {} | head -n 524288; exit {}";
    let output = burla.map(["--", "sh", "-c", script]).stdin("0\n1\n2\n").run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(output.stdout == large, "3 outputs of 1 MiB each are not what they were");
}

#[test]
fn bytes_that_are_no_text_pass_through() {
    let burla = Burla::new();
    let output = burla.map(["--", "printf", "\\377\\0\\n{}\\200"]).stdin("1\n2\n").run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(output.stdout_bytes, b"\xff\0\n1\x80\xff\0\n2\x80");
    let output = burla.map(["--", "cat", "-o", "out"]).stdin("").run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let output = burla.map(["-o", "out", "--", "printf", "\\377{}"]).stdin("1\n2\n").run();
    expect(&output, 0, "");
    assert_eq!(std::fs::read(burla.path("out")).expect("it was written"), b"\xff1\xff2");
}

#[test]
fn quiet_leaves_what_calls_print_and_what_went_wrong() {
    let burla = with(
        "def f(x):\n    if x == 1: print('hello')\n    if x == 2: raise ValueError('two')\n    return x\n",
    );
    let output = burla.map(["f.py:f", "--quiet"]).stdin("0\n1\n").run();
    expect(&output, 0, "0\n1\n");
    assert_eq!(output.stderr, "[1] hello\n");
    let output = burla.map(["f.py:f", "-q"]).stdin("2\n3\n").run();
    expect(&output, 1, "null\n3\n");
    assert!(output.stderr.contains("ValueError: two"), "{}", output.stderr);
    assert!(!output.stderr.contains("slots") && !output.stderr.contains("inputs in"), "{}", output.stderr);
}

#[test]
fn otherwise_the_first_line_says_where_the_job_runs_and_the_last_one_how_long_it_took() {
    let output = with("def f(x): return x\n").map(["f.py:f"]).stdin("1\n2\n").run();
    let lines: Vec<&str> = output.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{}", output.stderr);
    assert!(lines[0].starts_with("burla: embedded, ") && lines[0].contains(" slot"), "{}", lines[0]);
    assert!(lines[1].starts_with("burla: 2 inputs in "), "{}", lines[1]);
}

#[test]
fn a_file_that_cannot_be_written_is_told_before_anything_runs() {
    let burla = with("import os\ndef f(x):\n    open(os.environ['RAN'], 'w').close()\n    return x\n");
    let ran = format!("RAN={}", burla.path("ran").display());
    for args in [["-o", "none/out"], ["-o", "."], ["--errors", "none/errors"]] {
        let output = burla.map(["f.py:f", "--env", &ran]).args(args).stdin("1\n").run();
        expect(&output, 2, "");
        assert!(
            output.stderr.contains("failed to write") && output.stderr.contains(args[1]),
            "{}",
            output.stderr
        );
        assert!(!burla.path("ran").exists());
    }
}

#[test]
fn a_full_disk_is_told() {
    let burla = with("def f(x): return x\n");
    let output = burla.map(["f.py:f", "-o", "/dev/full", "--errors", "failed"]).stdin("1\n").run();
    expect(&output, 1, "");
    assert!(output.stderr.contains("No space left on device"), "{}", output.stderr);
    let script = format!("{} map f.py:f > /dev/full", binary().display());
    let output = burla.program("sh").args(["-c", &script]).stdin("1\n").run();
    expect(&output, 1, "");
    assert!(output.stderr.contains("No space left on device"), "{}", output.stderr);
}

/// Runs `burla map ARGS | head -1` with an open stdin, then prints burla's exit code.
fn headed(burla: &Burla, args: &str) -> burla_tests::Live {
    let script = format!("{} map {args} | head -1; echo ${{PIPESTATUS[0]}}", binary().display());
    burla.program("bash").args(["-c", &script]).spawn()
}

#[test]
fn a_closed_stdout_ends_the_job_quietly() {
    let burla = with("def f(x):\n    if x == 3: print('said')\n    return x\n");
    burla.file("in.jsonl", numbers(200_000));
    let output = headed(&burla, "f.py:f in.jsonl").wait();
    expect(&output, 0, "0\n141\n");
    let mut lines = output.stderr.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("burla: embedded")), "{}", output.stderr);
    assert!(lines.all(|line| line == "[3] said"), "{}", output.stderr);
    let output = headed(&burla, "--quiet in.jsonl -- echo {}").wait();
    expect(&output, 0, "0\n141\n");
    assert_eq!(output.stderr, "");
}

#[test]
fn a_closed_stdout_is_noticed_while_nothing_is_written() {
    // With no input to work on, and with a call that does not end.
    let burla = with("import time\ndef f(x):\n    time.sleep(x)\n    return x\n");
    for inputs in ["0\n", "0\n3000\n3000\n3000\n"] {
        let mut live = headed(&burla, "--quiet f.py:f");
        live.write(inputs);
        wait_until("the end of a job that nobody listens to", Duration::from_secs(30), || live.ended());
        let output = live.wait();
        expect(&output, 0, "0\n141\n");
        assert_eq!(output.stderr, "");
    }
}

#[test]
fn an_output_file_is_written_as_results_come() {
    let burla = with("def f(x): return x\n");
    let mut live = burla.map(["f.py:f", "-o", "out"]).spawn();
    live.write("1\n");
    let written = || std::fs::read_to_string(burla.path("out")).unwrap_or_default();
    wait_until("the first result in the file", LIMIT, || written() == "1\n");
    live.write("2\n");
    assert_eq!(live.wait().code, 0);
    assert_eq!(written(), "1\n2\n");
}

/// Holds a record against docs/record.schema.json.
#[track_caller]
fn validate(record: &Value) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/record.schema.json");
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("the schema is there"))
        .expect("it is JSON");
    if let Err(why) = check(&schema, &schema, record, "record") {
        panic!("{why}: {record}");
    }
    // The schema allows for more; what there is today is described in it.
    for (object, described) in [(record, &schema), (&record["error"], &schema["$defs"]["error"])] {
        for name in object.as_object().into_iter().flat_map(|object| object.keys()) {
            assert!(
                described["properties"].get(name).is_some(),
                "the schema does not describe {name}: {record}"
            );
        }
    }
}

/// As much of JSON Schema as that schema uses.
fn check(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Value::Object(rules) = schema else {
        return if schema == &json!(true) { Ok(()) } else { Err(format!("{at} must not be there")) };
    };
    for (rule, wanted) in rules {
        let list = || wanted.as_array().into_iter().flatten();
        let well = match rule.as_str() {
            "$schema" | "$defs" | "title" | "description" => true,
            "$ref" => {
                let pointer = wanted.as_str().and_then(|text| text.strip_prefix('#')).expect("it is local");
                return check(root, root.pointer(pointer).expect("it is there"), value, at);
            }
            "type" => match wanted.as_str().expect("one type") {
                "object" => value.is_object(),
                "string" => value.is_string(),
                "integer" => value.is_i64() || value.is_u64(),
                "number" => value.is_number(),
                other => panic!("unknown type {other}"),
            },
            "const" => value == wanted,
            "enum" => list().any(|one| one == value),
            "minimum" => value.as_f64() >= wanted.as_f64(),
            "minLength" => value.as_str().map(|text| text.chars().count() as u64) >= wanted.as_u64(),
            "required" => list().all(|name| value.get(name.as_str().expect("a name")).is_some()),
            "properties" => {
                for (name, schema) in wanted.as_object().expect("properties") {
                    if let Some(value) = value.get(name) {
                        check(root, schema, value, &format!("{at}.{name}"))?;
                    }
                }
                true
            }
            "oneOf" => list().filter(|one| check(root, one, value, at).is_ok()).count() == 1,
            other => panic!("unknown rule {other}"),
        };
        if !well {
            return Err(format!("{at} breaks {rule} {wanted}"));
        }
    }
    Ok(())
}

#[test]
fn the_schema_refuses_what_is_no_record() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/record.schema.json");
    let schema: Value =
        serde_json::from_str(&std::fs::read_to_string(path).expect("it is there")).expect("JSON");
    let good = json!({"v": 1, "index": 0, "status": "ok", "result": null, "attempts": 1, "seconds": 0.5, "worker": "w"});
    assert_eq!(check(&schema, &schema, &good, "record"), Ok(()));
    for (name, value) in [
        ("v", json!(2)),
        ("index", json!(-1)),
        ("status", json!("fine")),
        ("error", json!({})),
        ("seconds", json!("1")),
    ] {
        let mut bad = good.clone();
        bad[name] = value;
        assert!(check(&schema, &schema, &bad, "record").is_err(), "{bad}");
    }
    let mut bad = good;
    bad.as_object_mut().expect("an object").remove("result");
    assert!(check(&schema, &schema, &bad, "record").is_err());
}
