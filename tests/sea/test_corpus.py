"""Mining a corpus: rules, splits by package, duplicates, licences, equal bytes each time."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.corpus import filters, licences
from polyzoo.sea.corpus.build import build_corpus
from polyzoo.sea.corpus.config import CorpusConfig
from polyzoo.sea.corpus.report import render
from polyzoo.sea.records import read_records
from polyzoo.sea.splitting.documentation import summary
from support.cli import run_cli
from support.functions import LANGUAGES
from support.packages_to_mine import SIX_LANGUAGES, function, npm, sdist, tree, wheel


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def mine(folder: Path, *sources: Path, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    """Records by partition."""
    out = folder / "corpus"
    config = CorpusConfig(sources=tuple(map(str, sources)), out=out, workers=1, **settings)
    report = build_corpus(config)
    found = {name: read(Path(path)) for name, path in report.files.items()}
    assert json.loads((out / "report.json").read_text())["pairs"] == report.pairs
    for name, count in report.pairs.items():
        assert len(found.get(name, [])) == count
    return found


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Four packages with a documented and an undocumented function each."""
    return [
        wheel(
            tmp_path,
            name,
            {
                f"{name}/work.py": function(f"{name}_one", f"Do the first thing of {name}.")
                + function(f"{name}_two", None)
            },
        )
        for name in ("alpha", "beta", "gamma", "delta")
    ]


class TestRecords:
    """What a record holds."""

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_documentation_is_taken_out_of_the_code(self, tmp_path: Path, language: str):
        package = tree(tmp_path / "shapes-1.2.3", {**SIX_LANGUAGES, "PKG-INFO": ""})
        found = mine(tmp_path, package, languages=(language,), licenses=())["train"]
        assert len(found) == 1
        (record,) = found
        assert record["language"] == language
        assert " ".join(record["docstring_tokens"]).endswith("square .")
        assert "SECRET" not in " ".join(record["docstring_tokens"])
        assert "SECRET" in record["docstring"]
        assert "square" not in record["code"]
        assert "SECRET" not in " ".join([record["code"], *record["code_tokens"]])
        assert "result" in record["code_tokens"]
        assert record["func_name"].lower().endswith("area")
        assert record["repo"] == "shapes"
        assert record["partition"] == "train"

    def test_every_field(self, tmp_path: Path):
        package = wheel(tmp_path, "Some_Pack.age", {"p/m.py": function("work", "Do all the work.")})
        (record,) = mine(tmp_path, package)["train"]
        source = function("work", "Do all the work.").rstrip()
        assert record == {
            "repo": "some-pack-age",
            "path": "p/m.py",
            "func_name": "work",
            "original_string": source,
            "language": "python",
            "code": source.replace('    """Do all the work."""\n', ""),
            "code_tokens": record["code_tokens"],
            "docstring": "Do all the work.",
            "docstring_tokens": ["Do", "all", "the", "work", "."],
            "sha": record["sha"],
            "url": "some-pack-age@1.0/p/m.py#L1-L6",
            "partition": "train",
            "license": "MIT",
            "version": "1.0",
        }
        assert "".join(record["code_tokens"]) == "".join(record["code"].split())
        assert len(record["sha"]) == 64

    def test_training_reads_them(self, tmp_path: Path, four: list[Path]):
        mine(tmp_path, *four, test=("beta",))
        records = read_records(tmp_path / "corpus" / "train.jsonl.gz")
        assert [record.query for record in records] == [
            f"Do the first thing of {name} ." for name in ("alpha", "delta", "gamma")
        ]

    def test_functions_on_one_line_have_their_own_keys(self, tmp_path: Path):
        members = ",".join(
            f"/** Do the thing number {index}. */\nf{index}(a) {{\nreturn {index};\n}}"
            for index in range(2)
        ).replace("\n", "\r")
        package = npm(tmp_path / "n", "mini", {"a.js": f"x = {{{members}}};"})
        found = mine(tmp_path, package, languages=("javascript",), min_code_lines=1)["train"]
        assert len({record["url"] for record in found}) == len(found) == 2


class TestSources:
    """Where packages come from, and what they say of themselves."""

    def test_every_kind_of_package(self, tmp_path: Path):
        source = {"m/work.py": function("work", "Do it all again.")}
        sources = [
            wheel(tmp_path, "one", {"m.py": function("one", "Do the work once.")}),
            sdist(tmp_path, "two", {"m.py": function("two", "Do the work twice.")}),
            npm(tmp_path / "three", "three", {"a.py": function("three", "Do the work thrice.")}),
            tree(tmp_path / "four-4.0.1", source),
        ]
        found = mine(tmp_path, *sources, licenses=())["train"]
        assert {(r["repo"], r["version"], r["license"]) for r in found} == {
            ("one", "1.0", "MIT"),
            ("two", "2.0", "MIT"),
            ("three", "3.1.0", "ISC"),
            ("four", "4.0.1", "unknown"),
        }

    def test_an_unpacked_debian_package(self, tmp_path: Path):
        package = tree(
            tmp_path / "golang-thing-dev_1.2-3_all",
            {
                "usr/share/gocode/src/thing.go": SIX_LANGUAGES["lib/shape.go"],
                "usr/share/doc/golang-thing-dev/copyright": (
                    "Format: 1.0\n\nFiles: *\nLicense: Expat\n\nFiles: debian/*\nLicense: GPL-2\n\n"
                    "Files: sub/*\n other/*\nLicense: BSD-3-clause\n\nLicense: GPL-2\n Long text.\n"
                ),
            },
        )
        (record,) = mine(tmp_path, package, languages=("go",))["train"]
        assert record["repo"] == "golang-thing-dev"
        assert record["license"] == "BSD-3-Clause AND MIT"

    def test_an_installed_package(self, tmp_path: Path):
        found = mine(tmp_path, Path("click"))["train"]
        assert len(found) > 50
        assert {record["repo"] for record in found} == {"click"}
        assert all(record["license"] == "BSD-3-Clause" for record in found)

    def test_nothing_of_that_name(self, tmp_path: Path):
        with pytest.raises(DataError, match="nothing-here: no such file or folder, and no instal"):
            mine(tmp_path, Path("nothing-here"))

    def test_a_source_file_is_not_a_package(self, tmp_path: Path):
        path = tmp_path / "work.py"
        path.write_text("x = 1")
        with pytest.raises(DataError, match=r"work\.py: not an archive .*give the folder"):
            mine(tmp_path, path)

    def test_a_broken_archive(self, tmp_path: Path):
        path = tmp_path / "broken-1.0-py3-none-any.whl"
        path.write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(DataError, match=r"broken.*is damaged"):
            mine(tmp_path, path)

    def test_an_archive_that_climbs_out(self, tmp_path: Path):
        path = wheel(tmp_path, "climber", {"../../evil.py": function("evil", "Do evil things.")})
        with pytest.raises(DataError, match=r"evil\.py.*leads out of the folder"):
            mine(tmp_path, path)
        assert not list(tmp_path.parent.rglob("evil.py"))

    def test_files_that_cannot_be_read_are_reported_and_the_rest_is_mined(self, tmp_path: Path):
        path = wheel(
            tmp_path,
            "mixed",
            {
                "good.py": function("good", "Do a good thing."),
                "latin.py": "x = '\xe9'\n".encode("latin-1"),
                "big.py": b"x" * 10_000_000,
            },
        )
        config = CorpusConfig(sources=(str(path),), out=tmp_path / "corpus", workers=1)
        report = build_corpus(config)
        assert report.pairs["train"] == 1
        assert report.refused["unreadable file"] == 2
        assert sorted(line.split(":")[1].strip() for line in report.failed_files) == [
            "big.py",
            "latin.py",
        ]


class TestPartitions:
    """Split by package, never by function."""

    def test_packages_go_where_they_are_named(self, tmp_path: Path, four: list[Path]):
        found = mine(tmp_path, *four, valid=("Beta",), test=("gamma,DELTA",))
        assert {name: {r["repo"] for r in rows} for name, rows in found.items()} == {
            "train": {"alpha"},
            "valid": {"beta"},
            "test": {"gamma", "delta"},
        }
        assert all(r["partition"] == name for name, rows in found.items() for r in rows)

    def test_a_duplicate_stays_in_test_only(self, tmp_path: Path):
        same, other = function("work", "Do the work."), function("work", "Do the work.", tag="x")
        sources = [
            wheel(tmp_path, "aaa", {"m.py": same}),
            wheel(tmp_path, "bbb", {"m.py": other + function("own", "Do its own work.")}),
            wheel(tmp_path, "ccc", {"m.py": same.replace("the work", "  other work")}),
        ]
        found = mine(tmp_path, *sources, test=("ccc",), valid=("bbb",))
        # The same code as in test (aaa), the same documentation as in valid (aaa): gone from train.
        assert [r["func_name"] for r in found["valid"]] == ["work", "own"]
        assert [r["repo"] for r in found["test"]] == ["ccc"]
        assert found["train"] == []

    def test_a_package_cannot_be_two_things(self, tmp_path: Path, four: list[Path]):
        with pytest.raises(ConfigError, match="beta is named for valid and for test"):
            mine(tmp_path, *four, valid=("beta",), test=("beta",))

    def test_a_named_package_must_be_there(self, tmp_path: Path, four: list[Path]):
        with pytest.raises(ConfigError, match=r"test names omega, .*\(alpha, beta, delta, gamma\)"):
            mine(tmp_path, *four, test=("omega",))


class TestExclusion:
    """Packages never to mine."""

    def test_the_file_is_honoured_whatever_the_spelling(self, tmp_path: Path, four: list[Path]):
        path = tmp_path / "exclude.txt"
        path.write_text("# reserved\nALPHA\nBe_Ta  # comment\n\nga-mma\n")
        extra = wheel(tmp_path, "ga_mma", {"m.py": function("more", "Do yet more work.")})
        beta = wheel(tmp_path, "be.ta", {"m.py": function("most", "Do the most work.")})
        found = mine(tmp_path, *four, extra, beta, exclude_file=path)
        assert {r["repo"] for r in found["train"]} == {"beta", "gamma", "delta"}
        report = json.loads((tmp_path / "corpus" / "report.json").read_text())
        assert set(report["skipped_sources"]) == {str(four[0]), str(extra), str(beta)}

    def test_the_name_inside_counts_too(self, tmp_path: Path, four: list[Path]):
        renamed = four[0].rename(tmp_path / "innocent-1.0-py3-none-any.whl")
        found = mine(tmp_path, renamed, *four[1:], exclude=("alpha,beta",))
        assert {r["repo"] for r in found["train"]} == {"gamma", "delta"}

    def test_an_excluded_package_cannot_be_tested_on(self, tmp_path: Path, four: list[Path]):
        with pytest.raises(ConfigError, match="alpha is excluded and named for test"):
            mine(tmp_path, *four, exclude=("alpha",), test=("alpha",))

    def test_an_unreadable_list_is_an_error(self, tmp_path: Path, four: list[Path]):
        with pytest.raises(DataError, match=r"exclude_file=.*none\.txt: cannot be read"):
            mine(tmp_path, *four, exclude_file=tmp_path / "none.txt")

    def test_a_licence_outside_the_list_is_skipped(self, tmp_path: Path, four: list[Path]):
        work = {"m.py": function("work", "Do the work.")}
        bad = wheel(tmp_path, "copyleft", work, licence="GPL-3.0-or-later")
        found = mine(tmp_path, *four, bad)
        assert "copyleft" not in {r["repo"] for r in found["train"]}
        report = json.loads((tmp_path / "corpus" / "report.json").read_text())
        assert "GPL-3.0-or-later" in report["skipped_sources"][str(bad)]


class TestRules:
    """CodeSearchNet's rules, one function refused by each."""

    @pytest.mark.parametrize(
        ("path", "source", "reason"),
        [
            ("m.py", function("work", None), "no documentation"),
            ("m.py", function("work", "Too short."), "documentation too short"),
            ("m.py", function("work", "word " * 300), "documentation too long"),
            ("m.py", function("work", "See https://example.org for it."), "link or image"),
            (
                "m.py",
                function(
                    "work", "Berechnet die Fläche und gibt sie mit Rand zurück, für eine Form."
                ),
                "not English",
            ),
            ("m.py", function("work", "计算正方形的面积 计算 正方形 面积"), "not English"),
            ("m.py", function("work", "Parameters\n    ----------\n    first"), "no documentation"),
            ("m.py", function("work", "Do the work.", lines=0), "too few lines"),
            ("m.py", function("__call__", "Do the work."), "dunder"),
            ("m.py", function("test_work", "Do the work."), "test function"),
            ("m.py", function("work", "Do the work.") + "    x = = 3 4\n", "does not parse"),
            ("tests/m.py", function("work", "Do the work."), "test file"),
            ("test_m.py", function("work", "Do the work."), "test file"),
            ("p/__init__.py", function("work", "Do the work."), "__init__ file"),
            ("p/m_pb2.py", function("work", "Do the work."), "generated file"),
        ],
    )
    def test_refused_with_its_reason(self, tmp_path: Path, path: str, source: str, reason: str):
        good = function("good", "Do one good thing.")
        package = wheel(tmp_path, "pack", {path: source, "good.py": good})
        config = CorpusConfig(sources=(str(package),), out=tmp_path / "corpus", workers=1)
        report = build_corpus(config)
        assert report.pairs["train"] == 1
        assert any(reason in name for name in report.refused), report.refused

    def test_nothing_found_says_why(self, tmp_path: Path):
        package = wheel(tmp_path, "pack", {"m.py": function("work", None)})
        with pytest.raises(DataError, match=r"no pair found in 1 sources; .*no documentation"):
            mine(tmp_path, package)

    @pytest.mark.parametrize(
        ("documentation", "expected"),
        [
            ("One line.", "One line."),
            ("Two\nlines.\n\nMore.", "Two lines."),
            ("Words here.\n:param x: y", "Words here."),
            ("Words here.\n@param x y", "Words here."),
            ("Words here.\nArgs:\n  x: y", "Words here."),
            ("Title\n=====\nWords here.", "Words here."),
            ("\n\nLate words.", "Late words."),
            (".. note:: nothing", ""),
            (">>> f()\n1", ""),
            ("", ""),
        ],
    )
    def test_summary_is_the_first_paragraph(self, documentation: str, expected: str):
        assert summary(documentation) == expected

    def test_english_is_told_from_others(self):
        assert filters.is_english("Return the matrix of the graph.")
        assert filters.is_english("Von Mises distribution for a die with mit license")
        assert not filters.is_english("Renvoie la matrice des liens pour une classe dans le graphe")
        assert not filters.is_english("Возвращает матрицу")


class TestUndocumented:
    """Functions without usable documentation, for distillation."""

    def test_of_training_packages_only(self, tmp_path: Path, four: list[Path]):
        path = tmp_path / "bare" / "undocumented.jsonl.gz"
        found = mine(tmp_path, *four, test=("alpha",), valid=("beta",), undocumented=path)
        assert [r["func_name"] for r in found["undocumented"]] == ["delta_two", "gamma_two"]
        assert all(r["docstring"] == "" for r in found["undocumented"])
        assert all(r["docstring_tokens"] == [] for r in found["undocumented"])
        assert len(read_records(path, need_query=False)) == 2


class TestDeterminism:
    """Equal sources give equal bytes."""

    def test_order_and_processes_do_not_matter(self, tmp_path: Path, four: list[Path]):
        many = {
            f"m{index}.py": function(f"f{index}", f"Do thing {index} here.") for index in range(150)
        }
        sources = [str(path) for path in [*four, wheel(tmp_path, "many", many)]]
        outputs = []
        for workers, seed in ((1, 1), (1, 2), (2, 3)):
            random.Random(seed).shuffle(sources)
            out = tmp_path / f"corpus{seed}"
            build_corpus(
                CorpusConfig(sources=tuple(sources), out=out, test=("beta",), workers=workers)
            )
            outputs.append({path.name: path.read_bytes() for path in out.glob("*.gz")})
        assert outputs[0] == outputs[1] == outputs[2]
        assert set(outputs[0]) == {"train.jsonl.gz", "test.jsonl.gz"}


class TestReport:
    """Counts and histogram."""

    def test_numbers_add_up(self, tmp_path: Path):
        config = CorpusConfig(
            sources=("click", "requests"), out=tmp_path, test=("click",), workers=1
        )
        report = build_corpus(config)
        for partition, bins in report.lengths.items():
            lengths = [len(row["code_tokens"]) for row in read(tmp_path / f"{partition}.jsonl.gz")]
            assert sum(bins.values()) == report.pairs[partition] == len(lengths)
            assert bins["64"] == sum(32 < length <= 64 for length in lengths)
            longer = sum(length > 256 for length in lengths)
            rows = [row for row in report.packages if row.partition == partition]
            assert sum(row.longer_than_256 for row in rows) == longer
        assert report.functions == sum(report.pairs.values()) + sum(
            count for name, count in report.refused.items() if "file" not in name
        )
        text = render(report)
        assert "test: 172 pairs" in text or f"test: {report.pairs['test']:,} pairs" in text


class TestConfig:
    """What a config refuses."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sources": ()}, "sources is empty"),
            ({"languages": ()}, "languages is empty"),
            ({"min_code_lines": 0}, "min_code_lines=0"),
            ({"max_doc_tokens": -1}, "max_doc_tokens=-1"),
            ({"workers": -1}, "workers=-1"),
        ],
    )
    def test_bad_values(self, change: dict[str, Any], message: str):
        good = CorpusConfig(sources=("x",), out=Path("out"))
        with pytest.raises(ConfigError, match=message):
            replace(good, **change)


class TestLicences:
    """SPDX expressions."""

    @pytest.mark.parametrize(
        ("expression", "allowed"),
        [
            ("MIT", True),
            ("mit", True),
            ("GPL-3.0", False),
            ("MIT AND ISC", True),
            ("MIT AND GPL-3.0", False),
            ("MIT OR GPL-3.0", True),
            ("(GPL-3.0 OR MIT) AND ISC", True),
            ("(GPL-3.0 AND MIT) OR LGPL-2.1", False),
            ("MIT WITH some-exception", True),
            ("unknown", False),
            ("", False),
            ("MIT)", False),
            ("((((", False),
        ],
    )
    def test_expressions(self, expression: str, allowed: bool):
        assert licences.is_allowed(expression, ["MIT", "ISC"]) is allowed

    @pytest.mark.parametrize(
        ("statement", "expected"),
        [
            ({"expression": "MIT AND ISC"}, "MIT AND ISC"),
            ({"classifiers": ["License :: OSI Approved :: BSD License"]}, "BSD-3-Clause"),
            ({"classifiers": ["License :: OSI Approved"], "text": "MIT License"}, "MIT"),
            ({"text": "Apache 2.0\nand a long text"}, "Apache-2.0"),
            ({"text": "GNU Lesser General Public License v3"}, "LGPL-3.0"),
            ({"text": "Proprietary"}, "unknown"),
            ({}, "unknown"),
        ],
    )
    def test_statements(self, statement: dict[str, Any], expected: str):
        assert licences.from_statements(**{"expression": None, **statement}) == expected


class TestCommand:
    """`polyzoo sea build-corpus`."""

    def test_json_on_stdout(self, tmp_path: Path, four: list[Path]):
        done = run_cli(
            "sea",
            "build-corpus",
            *four,
            "--out",
            tmp_path / "c",
            "--test",
            "alpha,beta",
            "--valid",
            "gamma",
            "--workers",
            "1",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["pairs"] == {"train": 1, "valid": 1, "test": 2}

    def test_errors_are_one_line(self, tmp_path: Path):
        done = run_cli("sea", "build-corpus", "no-such-package", "--out", tmp_path / "c")
        assert done.returncode == 1
        assert "no-such-package: no such file or folder" in done.stderr
        assert "Traceback" not in done.stderr
