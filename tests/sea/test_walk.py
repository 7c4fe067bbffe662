"""Which files the walk yields, and what it says about the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.search.walk import MAX_FILE_BYTES, Skipped, WalkRules, reason_to_skip, walk


def write(root: Path, *paths: str, text: str = "x = 1\n") -> None:
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def found(root: Path, **rules: object) -> list[str]:
    return [file.path for file in walk(root, WalkRules(**rules), Skipped())]


def reasons(root: Path, **rules: object) -> dict[str, int]:
    skipped = Skipped()
    list(walk(root, WalkRules(**rules), skipped))
    return dict(skipped.counts)


def test_order_is_by_folder_and_name_and_paths_are_relative(tmp_path):
    write(tmp_path, "b.py", "a.py", "z/c.py", "m/d.js", "notes.txt")
    assert found(tmp_path) == ["a.py", "b.py", "m/d.js", "z/c.py"]


def test_nested_gitignore_the_deepest_opinion_wins(tmp_path):
    write(tmp_path, "keep.py", "skip_1.py", "pkg/skip_2.py", "pkg/deep/skip_3.py", "pkg/own.py")
    write(tmp_path, "out/generated.py", "pkg/out/kept.py")
    (tmp_path / ".gitignore").write_text("skip_*.py\n/out/\n")
    (tmp_path / "pkg" / ".gitignore").write_text("own.py\n!skip_2.py\n")
    assert found(tmp_path) == ["keep.py", "pkg/skip_2.py", "pkg/out/kept.py"]
    assert reasons(tmp_path)[".gitignore"] == 4
    assert "skip_1.py" in found(tmp_path, gitignore=False)


def test_rules_of_the_repository_above_apply_to_a_part_of_it(tmp_path):
    (tmp_path / ".git" / "info").mkdir(parents=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("secret.py\n")
    (tmp_path / ".gitignore").write_text("sub/generated.py\n*.tmp.py\n")
    write(tmp_path, "sub/a.py", "sub/generated.py", "sub/b.tmp.py", "sub/secret.py")
    assert found(tmp_path / "sub") == ["a.py"]


def test_a_folder_that_is_itself_ignored_can_still_be_asked_for(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text(".venv/\n*.skip.py\n")
    write(tmp_path, ".venv/lib/site-packages/library/a.py")
    assert found(tmp_path / ".venv" / "lib" / "site-packages" / "library") == ["a.py"]
    assert found(tmp_path) == []


def test_a_broken_pattern_in_gitignore_costs_only_itself(tmp_path):
    write(tmp_path, "a.py", "b.py")
    (tmp_path / ".gitignore").write_text("!\nb.py\n")
    assert found(tmp_path) == ["a.py"]


def test_vendored_hidden_generated_and_large_files_are_counted_not_lost(tmp_path):
    write(tmp_path, "a.py", "node_modules/x/i.js", "vendor/v.go", ".hidden/h.py", "my_env/lib/e.py")
    (tmp_path / "my_env" / "pyvenv.cfg").touch()
    write(tmp_path, "proto/thing_pb2.py", "web/site.min.js", "__pycache__/a.py")
    write(tmp_path, "large.py", text="# " + "x" * MAX_FILE_BYTES)
    assert found(tmp_path) == ["a.py"]
    counts = reasons(tmp_path)
    assert counts["vendored folder"] == 3
    assert counts["hidden folder"] == 1
    assert counts["generated"] == 2
    assert counts["cache folder"] == 1
    assert counts[f"above {MAX_FILE_BYTES:,} bytes"] == 1
    assert "node_modules/x/i.js" in found(tmp_path, vendored=True)


def test_include_exclude_and_languages(tmp_path):
    write(tmp_path, "src/a.py", "src/b.js", "tests/c.py", "docs/d.py")
    assert found(tmp_path, include=("src/**",)) == ["src/a.py", "src/b.js"]
    assert found(tmp_path, exclude=("tests/", "*.js")) == ["docs/d.py", "src/a.py"]
    assert found(tmp_path, languages=("javascript",)) == ["src/b.js"]
    assert reasons(tmp_path, languages=("javascript",))["language not asked for"] == 3


def test_links_are_not_followed_and_loops_end(tmp_path):
    write(tmp_path, "real/a.py")
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "b.py").symlink_to(tmp_path / "real" / "a.py")
    assert found(tmp_path) == ["real/a.py"]
    assert reasons(tmp_path)["symbolic link"] == 3


def test_pipes_and_odd_names_are_reported(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py")).write_text("x = 1\n")
    counts = reasons(tmp_path)
    assert counts["not a regular file"] == 1
    assert counts["name is not UTF-8"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything; run as another user")
def test_an_unreadable_folder_is_reported(tmp_path):
    write(tmp_path, "closed/a.py", "b.py")
    (tmp_path / "closed").chmod(0)
    assert found(tmp_path) == ["b.py"]
    assert reasons(tmp_path) == {"unreadable folder (Permission denied)": 1}


def test_wrong_roots_and_patterns_say_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="does not exist; give the folder of a repository"):
        found(tmp_path / "missing")
    write(tmp_path, "file.py")
    with pytest.raises(DataError, match="is not a folder"):
        found(tmp_path / "file.py")
    with pytest.raises(ConfigError, match="exclude='!' is not a pattern"):
        found(tmp_path, exclude=("!",))


def test_content_that_is_no_source():
    assert reason_to_skip(b"def f(): pass\n", "a.py") is None
    assert reason_to_skip(b"", "a.py") is None
    assert reason_to_skip(b"x" * 9000 + b"\0", "a.py") == "binary (NUL bytes)"
    assert "minified" in reason_to_skip(b"var a=1;" * 300, "a.js")
    one_long_literal = b"x = '" + b"y" * 3000 + b"'\n" + b"def f():\n    return x\n" * 300
    assert reason_to_skip(one_long_literal, "a.py") is None
    go = b"// Code generated by tool. DO NOT EDIT.\n\npackage a\n"
    assert reason_to_skip(go, "a.go") == "generated"
    assert reason_to_skip(go, "a.py") is None
