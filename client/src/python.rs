//! What a Python function needs, read off its source without running it.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
};

use crate::error::PrepareError;

/// The interpreter: `wanted` if there is one, else `python3` or `python` on `PATH`.
pub(crate) fn interpreter(wanted: Option<&Path>) -> Result<PathBuf, PrepareError> {
    let Some(wanted) = wanted else {
        return ["python3", "python"].iter().find_map(|name| on_path(name)).ok_or_else(|| {
            PrepareError::new(
                "there is no python3 on PATH",
                "install Python 3, or name one with --python PATH",
            )
        });
    };
    let found = match wanted.to_str() {
        Some(name) if !name.contains('/') => on_path(name),
        _ => std::path::absolute(wanted).ok().filter(|path| executable(path)),
    };
    found.ok_or_else(|| {
        PrepareError::new(
            format!("there is no Python at {}", wanted.display()),
            "--python takes the path of an interpreter, or its name on PATH",
        )
    })
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| executable(path));
    // Calls run elsewhere, where a relative entry of PATH leads nowhere.
    std::path::absolute(found?).ok()
}

fn executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// The files below `root` that `start` needs: these files, the modules below `root` that they
/// import, and what those import. A package travels whole, with its data.
pub(crate) fn imported(root: &Path, start: Vec<PathBuf>) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    let mut packages = HashSet::new();
    let mut todo = start;
    while let Some(file) = todo.pop() {
        if !files.insert(file.clone()) || file.extension().is_none_or(|ending| ending != "py") {
            continue;
        }
        let source = fs::read(&file).unwrap_or_default();
        for module in imports(&String::from_utf8_lossy(&source)) {
            let top = module.split('.').next().unwrap_or_default();
            if packages.insert(top.to_owned()) {
                todo.extend(resolve(root, top));
            }
        }
    }
    files
}

/// The files of the top-level module that `module` is in, if that lies in `root`.
pub(crate) fn resolve(root: &Path, module: &str) -> Vec<PathBuf> {
    let top = module.split('.').next().unwrap_or_default();
    if top.is_empty() {
        return Vec::new();
    }
    // In the order in which Python looks: a package, a module, a folder that is a namespace.
    let package = root.join(top);
    let whole = || {
        let mut files = Vec::new();
        collect(&package, &mut files);
        files
    };
    if package.join("__init__.py").is_file() {
        return whole();
    }
    let file = root.join(format!("{top}.py"));
    if file.is_file() {
        return vec![file];
    }
    // Extension modules carry their interpreter's name in theirs.
    let entries = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_extension = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix(top).is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".so"))
    };
    let extensions: Vec<PathBuf> = entries.filter(is_extension).collect();
    if !extensions.is_empty() || !package.is_dir() {
        return extensions;
    }
    let files = whole();
    // A folder without Python in it is no package, whatever is imported by that name.
    let python = files.iter().any(|file| file.extension().is_some_and(|ending| ending == "py"));
    if python { files } else { Vec::new() }
}

/// All files in a folder, but for caches and hidden ones.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let path = entry.path();
        if name == "__pycache__" || name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            collect(&path, files);
        } else if path.is_file() {
            files.push(path);
        }
    }
}

/// The modules that a source imports by absolute name, anywhere in it. Text that only looks like an
/// import names a module too many, which does no harm.
fn imports(source: &str) -> BTreeSet<String> {
    let source = source.replace("\\\n", " ");
    let mut modules = BTreeSet::new();
    for line in source.lines() {
        let code = line.split('#').next().unwrap_or_default();
        // Statements are separated by semicolons, and may follow a colon: `try: import fast`.
        for statement in code.split(';').flat_map(|part| part.split(": ")).map(str::trim) {
            if let Some(names) = statement.strip_prefix("import ") {
                modules.extend(names.split(',').filter_map(first_name));
            } else if let Some(rest) = statement.strip_prefix("from ") {
                modules.extend(first_name(rest));
            }
        }
    }
    modules
}

fn first_name(text: &str) -> Option<String> {
    let name = text.split_whitespace().next()?;
    let dotted = !name.starts_with('.') && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.');
    dotted.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_found_wherever_they_stand() {
        let source = "import a, b.c as d\nfrom e.f import (\n  g)\ntry: import h\nexcept ImportError: pass\n\
                      def f():\n    from i import j; import k\nfrom . import l\nimport = 3\n# import m\n\
                      import n  # type: ignore\nfrom o import p  # noqa: E402\nimport q, \\\n  r\n";
        let found: Vec<String> = imports(source).into_iter().collect();
        assert_eq!(found, ["a", "b.c", "e.f", "h", "i", "k", "n", "o", "q", "r"]);
    }
}
