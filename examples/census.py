"""A census of Python source: what is in each file, and which files stand out.

For every file of the machine's own Python standard library:

    burla map --files "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')/**/*.py" \\
        --output-format records --with-input examples/census.py:census | python3 examples/census.py

`census` is the function that burla maps; run as a program, this file sums its results up. The records
tell which file each result belongs to: `census` itself only sees the copy of it that travelled.
"""

import ast
import warnings


def census(path):
    """Count what one Python source file holds. Takes its path, so map it with --files."""
    with open(path, "rb") as file:
        source = file.read()
    counts = {"bytes": len(source), "lines": len(source.splitlines())}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old code are not news here
            tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:  # a census counts every file, broken ones too
        return {**counts, "unreadable": str(error)}

    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    longest = max(functions, key=_extent, default=None)
    return {
        **counts,
        "functions": len(functions),
        "documented": sum(ast.get_docstring(f) is not None for f in functions),
        "classes": sum(isinstance(n, ast.ClassDef) for n in nodes),
        "imports": sorted({name for n in nodes for name in _imported(n)}),
        "longest": longest and {"name": longest.name, "line": longest.lineno, "lines": _extent(longest)},
    }


def _extent(node):
    return node.end_lineno - node.lineno + 1


def _imported(node):
    """The top-level modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return []


def main():
    """Sum up the results of a census, read as JSON lines from a file or from stdin."""
    import fileinput
    import json
    import os
    from collections import Counter

    records = map(json.loads, fileinput.input())
    rows = [{**record["result"], "file": record["input"]} for record in records if record["status"] == "ok"]
    if not rows:
        raise SystemExit("census.py: no results on stdin")
    root = os.path.commonpath([os.path.dirname(row["file"]) for row in rows])
    short = {row["file"]: os.path.relpath(row["file"], root) for row in rows}
    read = [row for row in rows if "unreadable" not in row]

    def total(what):
        return sum(row[what] for row in read)

    print(f"{len(rows):,} files, {sum(row['lines'] for row in rows):,} lines, {total('classes'):,} classes, "
          f"{total('functions'):,} functions ({total('documented') / max(1, total('functions')):.0%} documented), "
          f"{len(rows) - len(read)} files that are not valid Python")

    print("\nthe ten longest functions")
    longest = sorted((row for row in read if row["longest"]), key=lambda row: -row["longest"]["lines"])[:10]
    for row in longest:
        function = row["longest"]
        print(f"{function['lines']:8,} lines  {function['name']}  ({short[row['file']]}:{function['line']})")

    print("\nthe ten modules that most files import")
    for name, files in Counter(name for row in read for name in row["imports"]).most_common(10):
        print(f"{files:8,} files  {name}")


if __name__ == "__main__":
    main()
