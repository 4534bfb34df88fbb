//! What becomes an input: lines, rows, values and files, and what travels along with the function.

use std::{fs, io::Write, time::Duration};

use burla_tests::{Burla, LIMIT, Live, wait_until};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};

/// Returns what it gets.
const SAME: &str = "def same(x):\n    return x\n";

/// Every format: its name, inputs written in it, and what `same` makes of them.
const FORMATS: [(&str, &str, &str); 4] = [
    ("jsonl", JSONL, "1\n\"two\"\n{\"three\": [3, null, true]}\n"),
    (
        "json",
        "[1,\n \"two\", {\"three\": [3, null, true]}\n]\n",
        "1\n\"two\"\n{\"three\": [3, null, true]}\n",
    ),
    ("lines", "1\n two \n\nünï", "\"1\"\n\" two \"\n\"\"\n\"ünï\"\n"),
    ("csv", "a,b\n1,x\n2,\"y, z\"\n", "{\"a\": \"1\", \"b\": \"x\"}\n{\"a\": \"2\", \"b\": \"y, z\"}\n"),
];

const JSONL: &str = "1\n\"two\"\n{\"three\": [3, null, true]}\n";

fn same() -> Burla {
    let burla = Burla::new();
    burla.file("f.py", SAME);
    burla
}

fn gzip(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes.as_ref()).expect("compress");
    encoder.finish().expect("compress")
}

/// What `same` makes of inputs from stdin.
#[track_caller]
fn piped(args: &[&str], stdin: impl Into<Vec<u8>>) -> String {
    let output = same().map(["f.py:same"]).args(args).stdin(stdin).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    output.stdout
}

#[test]
fn the_ending_of_a_file_says_its_format() {
    let burla = same();
    for (format, content, expected) in FORMATS {
        let ending = if format == "lines" { "txt" } else { format };
        for name in
            [format!("in.{ending}"), format!("in.{ending}.gz"), format!("IN.{}", ending.to_uppercase())]
        {
            let content = if name.ends_with(".gz") { gzip(content) } else { content.into() };
            burla.file(&name, content);
            let output = burla.map(["f.py:same", &name]).run();
            assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{name}: {}", output.stderr);
        }
    }
}

#[test]
fn input_format_says_it_for_a_pipe_and_against_an_ending() {
    let burla = same();
    for (format, content, expected) in FORMATS {
        assert_eq!(piped(&["--input-format", format], content), expected, "{format}");
        assert_eq!(
            piped(&["-", "--input-format", &format!("{format}.gz")], gzip(content)),
            expected,
            "{format}.gz"
        );
        burla.file("misnamed.json.gz", content);
        let output = burla.map(["f.py:same", "misnamed.json.gz", "--input-format", format]).run();
        assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{format}: {}", output.stderr);
    }
}

#[test]
fn stdin_is_jsonl_for_a_function_and_lines_for_a_command() {
    assert_eq!(piped(&[], "1\n[2]\n"), "1\n[2]\n");
    assert_eq!(piped(&["-"], "1\n[2]\n"), "1\n[2]\n");
    let burla = Burla::new();
    for args in [&["--", "echo", "<{}>"][..], &["-", "--", "echo", "<{}>"]] {
        let output = burla.map(args).stdin("1\n\n\"x\" y\n").run();
        assert_eq!((output.code, output.stdout.as_str()), (0, "<1>\n<>\n<\"x\" y>\n"), "{}", output.stderr);
    }
    let output =
        burla.map(["--input-format", "jsonl", "--", "echo", "{}"]).stdin("{\"a\": [1, 2]}\n\"text\"\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "{\"a\": [1, 2]}\ntext\n"), "{}", output.stderr);
}

#[test]
fn several_members_of_gzip_are_one_input_file() {
    let both = [gzip("1\n2\n"), gzip("3\n")].concat();
    assert_eq!(piped(&["--input-format", "jsonl.gz"], both), "1\n2\n3\n");
}

#[test]
fn line_ends_of_windows_and_blank_lines_at_the_end_do_no_harm() {
    assert_eq!(piped(&[], "1\r\n\"x\"\r\n\r\n\n  \n"), "1\n\"x\"\n");
    assert_eq!(piped(&["--input-format", "lines"], "a\r\nb\r\n"), "\"a\"\n\"b\"\n");
    assert_eq!(piped(&["--input-format", "csv"], "a,b\r\n1,2\r\n\r\n"), "{\"a\": \"1\", \"b\": \"2\"}\n");
    assert_eq!(piped(&["--input-format", "json"], "\r\n[1,\r\n2]\r\n\r\n"), "1\n2\n");
    // In text, an empty line is an empty text.
    assert_eq!(piped(&["--input-format", "lines"], "\na\n\n"), "\"\"\n\"a\"\n\"\"\n");
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_input() {
    let mark = "\u{feff}";
    assert_eq!(piped(&[], format!("{mark}1\n2\n")), "1\n2\n");
    assert_eq!(piped(&["--input-format", "json"], format!("{mark}[1]")), "1\n");
    assert_eq!(piped(&["--input-format", "csv"], format!("{mark}a\n1\n")), "{\"a\": \"1\"}\n");
    assert_eq!(piped(&["--input-format", "lines"], format!("{mark}a\n")), "\"a\"\n");
}

#[test]
fn csv_fields_may_hold_quotes_commas_and_newlines() {
    let content = "name,said\n\"O'Hara, Scarlett\",\"\"\"Tomorrow\"\"\nis another day\"\nempty,\n";
    let expected = [
        json!({"name": "O'Hara, Scarlett", "said": "\"Tomorrow\"\nis another day"}),
        json!({"name": "empty", "said": ""}),
    ];
    let found: Vec<Value> = piped(&["--input-format", "csv"], content)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}")))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn values_reach_python_and_come_back_as_they_were() {
    let values = "9007199254740993\n123456789012345678901234567890\n-0.0\n1e-7\n\"\\ud83d\\ude00 \\u0000\"\n\
                  [[], {}, [[[null]]]]\n{\"b\": 1, \"a\": {\"b\": 2}}\n\"\\ud800\"\n";
    let expected = "9007199254740993\n123456789012345678901234567890\n-0.0\n1e-07\n\"😀 \\u0000\"\n\
                    [[], {}, [[[null]]]]\n{\"b\": 1, \"a\": {\"b\": 2}}\n\"\\ud800\"\n";
    assert_eq!(piped(&[], values), expected);
}

/// Feeds one piece at a time, each only when the results of the one before are out.
#[track_caller]
fn feed(mut live: Live, pieces: &[(&str, &str)]) {
    let mut expected = String::new();
    for (piece, results) in pieces {
        live.write(piece);
        expected += results;
        wait_until(&format!("{expected:?} on stdout"), LIMIT, || live.stdout().len() >= expected.len());
        assert_eq!(live.stdout(), expected);
    }
    assert!(!live.ended(), "it ended before its stdin did");
    let output = live.wait();
    assert_eq!((output.code, output.stdout), (0, expected), "{}", output.stderr);
}

#[test]
fn a_result_comes_out_while_its_producer_waits_for_it() {
    let burla = same();
    feed(burla.map(["f.py:same"]).spawn(), &[("1\n", "1\n"), ("2\n3\n", "2\n3\n"), ("4\n", "4\n")]);
    let csv = burla.map(["f.py:same", "-", "--input-format", "csv"]).spawn();
    feed(csv, &[("a\n1\n", "{\"a\": \"1\"}\n"), ("2\n", "{\"a\": \"2\"}\n")]);
    feed(burla.map(["--", "echo", "<{}>"]).spawn(), &[("1\n", "<1>\n"), ("2\n", "<2>\n")]);
    feed(burla.map(["--unordered", "--", "cat"]).spawn(), &[("1\n", "1\n"), ("2\n", "2\n")]);

    let mut json = burla.map(["f.py:same", "--input-format", "json"]).spawn();
    json.write("[1, 2,");
    wait_until("the results of an array that has no end yet", LIMIT, || json.stdout() == "1\n2\n");
    json.write("3]");
    assert_eq!(json.wait().stdout, "1\n2\n3\n");
}

#[test]
fn an_endless_producer_is_read_only_as_far_as_needed() {
    let burla = same();
    let script = format!("yes 1 | {} map f.py:same | head -3", burla_tests::binary().display());
    let output = burla.program("sh").args(["-c", &script]).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n1\n1\n"), "{}", output.stderr);
}

/// Tells where its input lies and what is in it.
const READ: &str = "\
import hashlib, os
def read(path):
    with open(path, 'rb') as file:
        content = file.read()
    return [path, len(content), hashlib.sha256(content).hexdigest(), os.path.isabs(path)]
def spoil(path):
    with open(path, 'w') as file:
        file.write('spoilt')
    return sorted(os.listdir(os.path.dirname(path)))
";

#[test]
fn files_arrive_under_their_own_names_with_their_content() {
    let burla = Burla::new();
    burla.file("f.py", READ);
    let mut expected = Vec::new();
    for i in 0..150 {
        let name = format!("data/sub {}/{i:03}.txt", i % 7);
        expected.push((name.clone(), format!("content {i}\n").repeat(i % 5).into_bytes()));
    }
    let large: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    expected.push(("data/wide/large.txt".into(), large));
    expected.sort();
    for (name, content) in &expected {
        burla.file(name, content);
    }
    burla.file("data/other.bin", "not asked for");
    let output = burla.map(["--files", "data/**/*.txt", "f.py:read"]).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(output.stdout.lines().count(), expected.len());
    let hash = |content: &[u8]| {
        let name = burla.file("hashed", content);
        let output = burla.program("sha256sum").args([&name]).run();
        output.stdout.split(' ').next().expect("a hash").to_owned()
    };
    for (line, (name, content)) in output.stdout.lines().zip(&expected) {
        let (path, len, found, absolute): (String, usize, String, bool) =
            serde_json::from_str(line).expect("JSON");
        assert!(path.ends_with(&format!("/{name}")), "{path} does not end in {name}");
        assert_eq!((len, absolute), (content.len(), true), "{name}");
        if name.ends_with("0.txt") || name.ends_with("large.txt") {
            assert_eq!(found, hash(content), "{name}");
        }
    }
}

#[test]
fn what_a_call_does_to_its_file_stays_there() {
    let burla = Burla::new();
    burla.file("f.py", READ);
    for name in ["a.txt", "b.txt", "c.dat"] {
        burla.file(&format!("data/{name}"), name);
    }
    let output = burla.map(["--files", "data/*.txt", "f.py:spoil"]).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "[\"a.txt\"]\n[\"b.txt\"]\n"), "{}", output.stderr);
    for name in ["a.txt", "b.txt", "c.dat"] {
        assert_eq!(burla.read(&format!("data/{name}")), name);
    }
    assert_eq!(fs::read_dir(burla.path("data")).expect("it is still there").count(), 3);
}

#[test]
fn files_from_elsewhere_and_several_globs_go_together() {
    let (burla, elsewhere) = (Burla::new(), Burla::new());
    burla.file("f.py", "import os\ndef name(path): return [os.path.basename(path), open(path).read()]\n");
    burla.file("here.txt", "here");
    elsewhere.file("there.txt", "there");
    let glob = elsewhere.path("*.txt").display().to_string();
    let output = burla.map(["--files", &glob, "--files", "*.txt", "f.py:name"]).run();
    let expected = "[\"there.txt\", \"there\"]\n[\"here.txt\", \"here\"]\n";
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
}

#[test]
fn files_with_odd_names_arrive() {
    let burla = Burla::new();
    burla.file("f.py", "def read(path): return open(path).read()\n");
    for name in ["data/a b.txt", "data/qu\"ote.txt", "data/new\nline.txt", "data/ünï.txt", "data/{}.txt"] {
        burla.file(name, name);
    }
    let output = burla.map(["--files", "data/*.txt", "f.py:read", "--unordered"]).run();
    let mut found: Vec<String> =
        output.stdout.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    found.sort();
    let expected = ["data/a b.txt", "data/new\nline.txt", "data/qu\"ote.txt", "data/{}.txt", "data/ünï.txt"];
    assert_eq!((output.code, found.as_slice()), (0, &expected.map(String::from)[..]), "{}", output.stderr);
}

#[test]
fn a_command_gets_the_path_of_its_file() {
    let burla = Burla::new();
    burla.file("data/a.txt", "first\n");
    burla.file("data/b.txt", "second\n");
    let output = burla.map(["--files", "data/*.txt", "--", "cat", "{}"]).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "first\nsecond\n"), "{}", output.stderr);
    // Without {} the path is a line on stdin.
    let output =
        burla.map(["--files", "data/*.txt", "--", "sh", "-c", "read path; echo $path; cat $path"]).run();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!((output.code, lines.len()), (0, 4), "{}", output.stderr);
    assert!(lines[0].ends_with("/data/a.txt") && lines[2].ends_with("/data/b.txt"), "{lines:?}");
    assert_eq!([lines[1], lines[3]], ["first", "second"]);
}

#[test]
fn braces_become_the_input_wherever_they_stand() {
    let burla = Burla::new();
    let show = "for a; do printf '<%s>' \"$a\"; done; echo";
    let output = burla
        .map(["--", "sh", "-c", show, "sh", "{}", "--x={}.txt", "{}{}", "{", "}", "{ }"])
        .stdin("1\na b\n")
        .run();
    let expected = "<1><--x=1.txt><11><{><}><{ }>\n<a b><--x=a b.txt><a ba b><{><}><{ }>\n";
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
}

#[test]
fn a_command_without_braces_gets_its_input_as_a_line_on_stdin() {
    let burla = Burla::new();
    let output = burla.map(["--", "od", "-An", "-c"]).stdin("ab\n\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "   a   b  \\n\n  \\n\n"), "{}", output.stderr);
    // With braces there is nothing on stdin, and burla's own stays untouched.
    let output = burla.map(["--", "sh", "-c", "echo {}; cat"]).stdin("1\n2\n3\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n2\n3\n"), "{}", output.stderr);
    // Nobody has to read it, however large it is.
    let large = "x".repeat(1 << 20);
    let output = burla.map(["--", "true"]).stdin(format!("{large}\n{large}\n")).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, ""), "{}", output.stderr);
    let output = burla.map(["--", "wc", "-c"]).stdin(format!("{large}\n{large}\n")).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "1048577\n1048577\n"), "{}", output.stderr);
}

#[test]
fn included_files_and_folders_lie_at_the_same_relative_path() {
    let (burla, elsewhere) = (Burla::new(), Burla::new());
    burla.file("f.py", "def read(path): return open(path).read()\n");
    burla.file("words.txt", "words");
    burla.file("model/deep/weights.bin", "weights");
    burla.file("model/.hidden", "hidden");
    let outside = elsewhere.file("outside.txt", "outside");
    let inputs = "\"words.txt\"\n\"model/deep/weights.bin\"\n\"model/.hidden\"\n\"outside.txt\"\n";
    let include = ["--include", "words.txt", "--include", "./model/", "--include"];
    let output = burla.map(["f.py:read"]).args(include).args([&outside]).stdin(inputs).run();
    let expected = "\"words\"\n\"weights\"\n\"hidden\"\n\"outside\"\n";
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
    // They are what travels: nothing else is there.
    burla.file("secret.txt", "not asked for");
    let output = burla.map(["f.py:read", "--quiet"]).stdin("\"secret.txt\"\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (1, "null\n"), "{}", output.stderr);
    assert!(output.stderr.contains("FileNotFoundError"), "{}", output.stderr);
    let output = burla.map(["--include", "model", "--", "cat", "{}"]).stdin("model/deep/weights.bin\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "weights"), "{}", output.stderr);
}

#[test]
fn a_command_named_by_a_relative_path_travels_along() {
    let burla = Burla::new();
    burla.script("bin/greet", "#!/bin/sh\necho \"hello $1\"\n");
    for program in ["./bin/greet", "bin/greet"] {
        let output = burla.map(["--", program, "{}"]).stdin("Ann\nBob\n").run();
        assert_eq!((output.code, output.stdout.as_str()), (0, "hello Ann\nhello Bob\n"), "{}", output.stderr);
    }
    fs::create_dir(burla.path("below")).expect("make a folder");
    let output = burla.map(["--", "../bin/greet", "{}"]).within(burla.path("below")).stdin("Cy\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "hello Cy\n"), "{}", output.stderr);
}

#[test]
fn modules_beside_the_file_import_as_in_a_plain_run() {
    let burla = Burla::new();
    burla.file(
        "app/f.py",
        "import helper\nfrom pack import core\nimport pack.sub.leaf as leaf\n\
         def f(x):\n    import late\n    import user_data\n    return [helper.A, core.b(), leaf.C, late.D, user_data.E, __name__]\n",
    );
    burla.file("app/helper.py", "import second\nA = 'helper ' + second.S\n");
    burla.file("app/second.py", "S = 'second'\n");
    burla.file("app/pack/__init__.py", "");
    burla.file(
        "app/pack/core.py",
        "import os\nfrom . import data\nfrom .sub import leaf\n\
         def b(): return data.text() + leaf.C\n",
    );
    burla.file(
        "app/pack/data.py",
        "import os\ndef text(): return open(os.path.join(os.path.dirname(__file__), 'data.txt')).read()\n",
    );
    burla.file("app/pack/data.txt", "data file ");
    burla.file("app/pack/sub/__init__.py", "");
    burla.file("app/pack/sub/leaf.py", "C = 'leaf'\n");
    burla.file("app/late.py", "D = 'late'\n");
    burla.file("app/user_data/deep/part.py", "");
    burla.file("app/user_data/__init__.py", "from user_data.deep import part\nE = 'absolute'\n");
    let expected = "[\"helper second\", \"data file leaf\", \"leaf\", \"late\", \"absolute\", \"f\"]\n";
    let output = burla.map(["app/f.py:f"]).stdin("1\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
    // From elsewhere, by its whole path.
    let elsewhere = Burla::new();
    let spelled = format!("{}:f", burla.path("app/f.py").display());
    let output = elsewhere.map([&spelled]).stdin("1\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{}", output.stderr);
}

#[test]
fn calls_run_in_a_folder_of_their_own() {
    let burla = Burla::new();
    burla.file(
        "f.py",
        "import os, sys, tempfile\n\
         def f(x):\n    open('left.txt', 'w').write('x')\n    tempfile.mkstemp()\n    return [os.path.exists('kept.txt'), sys.stdin.read()]\n",
    );
    burla.file("kept.txt", "kept");
    let output = burla.map(["f.py:f"]).stdin("1\n2\n").run();
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (0, "[false, \"\"]\n[false, \"\"]\n"),
        "{}",
        output.stderr
    );
    let mut left: Vec<_> =
        fs::read_dir(burla.path("")).expect("list it").map(|e| e.expect("list it").file_name()).collect();
    left.sort();
    assert_eq!(left, ["f.py", "kept.txt"]);
}

#[test]
fn a_file_may_have_the_name_of_a_module_of_python() {
    let burla = Burla::new();
    burla.file("json.py", "import collections\ndef f(x): return x + 1\n");
    let output = burla.map(["json.py:f"]).stdin("1\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "2\n"), "{}", output.stderr);
}

#[test]
fn a_function_may_be_named_by_its_module() {
    let burla = Burla::new();
    burla.file("pack/__init__.py", "from .inner import twice\n");
    burla.file("pack/inner.py", "import beside\ndef twice(x): return beside.TWO * x\nclass Box:\n    @staticmethod\n    def open(x): return ['box', x]\n");
    burla.file("beside.py", "TWO = 2\n");
    for (spelled, expected) in
        [("pack.inner:twice", "42\n"), ("pack:twice", "42\n"), ("pack.inner:Box.open", "[\"box\", 21]\n")]
    {
        let output = burla.map([spelled]).stdin("21\n").run();
        assert_eq!((output.code, output.stdout.as_str()), (0, expected), "{spelled}: {}", output.stderr);
    }
    // One that Python itself has.
    let output = burla.map(["os.path:basename"]).stdin("\"a/b\"\n").run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "\"b\"\n"), "{}", output.stderr);
}

#[test]
fn one_input_may_be_200_mb() {
    let burla = Burla::new();
    burla.file("f.py", "def size(x): return len(x)\n");
    let megabyte = vec![b'x'; 1_000_000];
    let mut file = fs::File::create(burla.path("in.jsonl")).expect("make a file");
    let mut write = |bytes: &[u8]| file.write_all(bytes).expect("write a file");
    write(b"\"before\"\n\"");
    (0..200).for_each(|_| write(&megabyte));
    write(b"\"\n\"after\"\n");
    let output = burla.map(["f.py:size", "in.jsonl"]).run();
    assert_eq!((output.code, output.stdout.as_str()), (0, "6\n200000000\n5\n"), "{}", output.stderr);
}

#[test]
fn two_jobs_in_one_folder_do_not_meet() {
    let burla = same();
    let mut one = burla.map(["f.py:same", "-o", "one"]).spawn();
    let mut two = burla.map(["f.py:same", "-o", "two"]).spawn();
    for i in 0..20 {
        one.write(format!("{i}\n"));
        two.write(format!("{}\n", i + 100));
    }
    let written = |name: &str| fs::read_to_string(burla.path(name)).unwrap_or_default().lines().count();
    wait_until("both have all results", Duration::from_secs(30), || {
        written("one") == 20 && written("two") == 20
    });
    for (live, name, first) in [(one, "one", 0), (two, "two", 100)] {
        let output = live.wait();
        assert_eq!(output.code, 0, "{}", output.stderr);
        let expected: String = (first..first + 20).map(|i| format!("{i}\n")).collect();
        assert_eq!(burla.read(name), expected);
    }
}
