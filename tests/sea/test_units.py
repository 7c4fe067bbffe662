"""Units of an index: symbols, kinds, line ranges, documentation, in all six languages."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.search.units import Unit, extract_units
from polyzoo.sea.splitting import split
from support.functions import LANGUAGES, package_files
from support.tokenizing import numbered_pieces

PYTHON = '''"""About the file."""
import os

LIMIT = 3


@cached(
    1)
async def fetch(url: str,
                *rest) -> bytes:
    """Fetch it."""
    def inner():
        return 1
    return inner()


if os.name == "posix":
    class Store(Base):
        """A store."""
        size: int = 3

        def get(self, key):
            return key

        class Row:
            def cell(self):
                return 1

        after = 4
'''

JAVASCRIPT = """/** Adds numbers.
 * @param a one
 */
export function add(a, b) { return a + b; }
const twice = async (x) => {
  return 2 * x;
};
// Makes things
// of all sorts.
exports.make = function () { function hidden() {} };
Thing.prototype.run = function () {};
class Shape {
  #side = 1;
  area() { return 1; }
  get side() { return this.#side; }
  static of = () => new Shape();
}
(function (root) {
  const api = {
    open: function () {},
    close() {},
  };
  root.api = api;
})(this);
"""

JAVA = """package a;

/** A shape. */
@Deprecated
public class Shape<T> extends Base {
  int side;

  /** Its area. */
  @Override
  public int area() { return side; }

  Shape(int side) { this.side = side; }

  enum Kind { ROUND; int code() { return 1; } }
}
interface Named { String name(); }
"""

GO = """package a

import "fmt"

// Shape is a shape.
type Shape struct {
	side int
}

// Area is
// its area.
func (s *Shape) Area() int {
	return s.side
}

func (l List[T]) Len() int { return 1 }

func main() { fmt.Println(1) }
"""

PHP = """<?php
namespace A;

const LIMIT = 1;

/** A shape. */
#[Attr]
class Shape
{
    private $side = 1;

    /**
     * Its area.
     */
    public function area(): int { return $this->side; }
}

function main() { return 1; }
"""

RUBY = """require "set"

# A shape.
class Shape < Base
  attr_reader :side

  # Its area.
  def area
    side
  end

  def self.of(x) = new(x)

  class << self
    def default
      1
    end
  end

  private def hidden?
    true
  end
end

module Tools
  def self.run; end
end
"""

EXPECTED = {
    "python": [
        ("module", "file", 1, 17),
        ("function", "fetch", 7, 14),
        ("class", "Store", 18, 29),
        ("method", "Store.get", 22, 23),
        ("class", "Store.Row", 25, 25),
        ("method", "Store.Row.cell", 26, 27),
    ],
    "javascript": [
        ("module", "file", 1, 24),
        ("function", "add", 4, 4),
        ("function", "twice", 5, 7),
        ("function", "make", 10, 10),
        ("method", "Thing.run", 11, 11),
        ("class", "Shape", 12, 17),
        ("method", "Shape.area", 14, 14),
        ("method", "Shape.side", 15, 15),
        ("method", "Shape.of", 16, 16),
        ("function", "api.open", 20, 20),
        ("function", "api.close", 21, 21),
    ],
    "java": [
        ("module", "file", 1, 3),
        ("class", "Shape", 4, 15),
        ("method", "Shape.area", 9, 10),
        ("method", "Shape.Shape", 12, 12),
        ("class", "Shape.Kind", 14, 14),
        ("method", "Shape.Kind.code", 14, 14),
        ("class", "Named", 16, 16),
        ("method", "Named.name", 16, 16),
    ],
    "go": [
        ("module", "file", 1, 11),
        ("class", "Shape", 6, 8),
        ("method", "Shape.Area", 12, 14),
        ("method", "List.Len", 16, 16),
        ("function", "main", 18, 18),
    ],
    "php": [
        ("module", "file", 1, 6),
        ("class", "Shape", 7, 16),
        ("method", "Shape.area", 15, 15),
        ("function", "main", 18, 18),
    ],
    "ruby": [
        ("module", "file", 1, 3),
        ("class", "Shape", 4, 23),
        ("method", "Shape.area", 8, 10),
        ("method", "Shape.of", 12, 12),
        ("method", "Shape.default", 15, 17),
        ("method", "Shape.hidden?", 20, 22),
        ("class", "Tools", 25, 27),
        ("method", "Tools.run", 26, 26),
    ],
}
SOURCES = {
    "python": PYTHON,
    "javascript": JAVASCRIPT,
    "java": JAVA,
    "go": GO,
    "php": PHP,
    "ruby": RUBY,
}


def check_places(source: str, units: list[Unit]) -> None:
    """Offsets, lines and text agree; the units together hold every character once."""
    owners = [0] * len(source)
    for unit in units:
        assert unit.first_line == source.count("\n", 0, unit.start) + 1
        assert unit.last_line == source.count("\n", 0, max(unit.end - 1, unit.start)) + 1
        assert len(unit.text) == unit.end - unit.start
        for place, character in enumerate(unit.text):
            assert character in (source[unit.start + place], " ")
            if not character.isspace():
                owners[unit.start + place] += 1
    assert all(
        count == 1
        for count, character in zip(owners, source, strict=True)
        if not character.isspace()
    )


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


class TestSixLanguages:
    """Small files with everything in them."""

    def test_symbols_kinds_and_lines(self, language: str):
        units = extract_units(SOURCES[language], language=language, path="lib/file.x")
        found = [(unit.kind, unit.symbol, unit.first_line, unit.last_line) for unit in units]
        assert found == EXPECTED[language]

    @pytest.mark.parametrize("line_end", ["\n", "\r\n"])
    def test_every_character_is_in_one_unit(self, language: str, line_end: str):
        source = SOURCES[language].replace("\n", line_end)
        check_places(source, extract_units(source, language=language, path="x"))

    def test_documentation(self, language: str):
        units = extract_units(SOURCES[language], language=language, path="x")
        found = {unit.symbol: unit.docstring for unit in units if unit.docstring}
        assert (
            found
            == {
                "python": {
                    "x": "About the file.",
                    "fetch": "Fetch it.",
                    "Store": "A store.",
                },
                "javascript": {
                    "add": "Adds numbers.\n@param a one",
                    "make": "Makes things\nof all sorts.",
                },
                "java": {"Shape": "A shape.", "Shape.area": "Its area."},
                "go": {"Shape": "Shape is a shape.", "Shape.Area": "Area is\nits area."},
                "php": {"Shape": "A shape.", "Shape.area": "Its area."},
                "ruby": {"Shape": "A shape.", "Shape.area": "Its area."},
            }[language]
        )
        for unit in units:
            assert (unit.docstring_span is not None) == (unit.docstring is not None)
            if unit.docstring_span and unit.docstring:
                start, end = unit.docstring_span
                assert unit.docstring.split()[0] in SOURCES[language][start:end]

    def test_functions_are_blanked_in_classes_and_modules(self, language: str):
        source = SOURCES[language]
        for unit in extract_units(source, language=language, path="x"):
            if unit.kind in ("class", "module"):
                assert "return" not in unit.text

    def test_broken_text_gives_what_can_be_seen(self, language: str):
        source = SOURCES[language] + "\n)]} ((( <<< \n" + SOURCES[language]
        units = extract_units(source, language=language, path="x")
        names = {unit.symbol for unit in units}
        assert names & {symbol for kind, symbol, _, _ in EXPECTED[language] if kind == "method"}
        check_places(source, units)

    @pytest.mark.parametrize("source", ["", "\n", "\ufeff", "\x00\x00"])
    def test_empty_files_have_no_units(self, language: str, source: str):
        assert extract_units(source, language=language, path="x") == []


class TestSplittingThem:
    """Every unit can be cut, and the cut leads back to the file."""

    @pytest.mark.parametrize("budget", [5, 20, 254])
    def test_blocks_of_units_lie_in_the_file(self, language: str, budget: int):
        source = SOURCES[language]
        lines = source.split("\n")
        config = SplitConfig(budget=budget, max_blocks=1000)
        for unit in extract_units(source, language=language, path="x"):
            found = split(unit.text, language=language, config=config, tokenize=numbered_pieces)
            assert [piece for block in found.blocks for piece in block.ids] == found.whole
            assert all(len(block.ids) <= budget for block in found.blocks)
            for block in found.blocks:
                first = source[unit.start + block.start]
                assert first == unit.text[block.start]
                assert first in lines[unit.first_line - 1 + block.first_line]
                assert unit.first_line + block.last_line <= unit.last_line


class TestSignatures:
    """The head of a unit on one line."""

    def test_python(self):
        units = {u.symbol: u for u in extract_units(PYTHON, language="python", path="x")}
        assert units["fetch"].signature == "async def fetch(url: str, *rest) -> bytes:"
        assert units["Store"].signature == "class Store(Base):"
        assert units["fetch"].text.startswith("@cached(")
        assert PYTHON[units["fetch"].definition_start :].startswith("async def")
        assert units["x"].signature == ""

    def test_javascript(self):
        units = {u.symbol: u for u in extract_units(JAVASCRIPT, language="javascript", path="x")}
        assert units["add"].signature == "export function add(a, b)"
        assert units["twice"].signature == "const twice = async (x) =>"


class TestAgainstPython:
    """The standard library's parser as the oracle."""

    @pytest.mark.parametrize("package", ["requests", "pyyaml", "click", "tqdm", "pathspec"])
    def test_the_same_functions_and_classes(self, package: str):
        for path in package_files(package):
            source = path.read_text(encoding="utf-8")
            found = [
                (unit.symbol, unit.definition_start, unit.kind == "class", unit.docstring)
                for unit in extract_units(source, language="python", path=str(path))
                if unit.kind != "module"
            ]
            assert found == list(expected_units(source)), path


def expected_units(source: str):
    """Functions and classes that stand in no function, in text order."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines(keepends=True)

    def visit(node: ast.AST, prefix: str):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                symbol = prefix + child.name
                column = len(lines[child.lineno - 1].encode()[: child.col_offset].decode())
                is_class = isinstance(child, ast.ClassDef)
                yield symbol, starts[child.lineno - 1] + column, is_class, ast.get_docstring(child)
                if is_class:
                    yield from visit(child, symbol + ".")
            else:
                yield from visit(child, prefix)

    return visit(ast.parse(source), "")


class TestOddFiles:
    """Files nobody should write."""

    def test_unknown_language(self):
        with pytest.raises(ConfigError, match="'cobol' is not known"):
            extract_units("x", language="cobol", path="x")

    def test_fifty_megabytes_on_one_line(self):
        with pytest.raises(DataError, match="the limit is"):
            extract_units("x" * 50_000_000, language="javascript", path="x")

    def test_classes_nested_deeply_stay_in_the_one_around(self):
        depth = 300
        source = "".join(f"{' ' * level}class C{level}:\n" for level in range(depth))
        source += " " * depth + "def f(self): pass\n"
        units = extract_units(source, language="python", path="x")
        assert 30 < len(units) < 40
        check_places(source, units)

    def test_code_nested_thousands_deep(self, language: str):
        source = "f = " + "(" * 20_000 + "1" + ")" * 20_000
        units = extract_units(source, language=language, path="x")
        assert [unit.kind for unit in units] == ["module"]

    def test_a_trailing_comment_is_not_documentation(self):
        source = "a = 1; // about a\nfunction f() { return 1; }\n"
        units = extract_units(source, language="javascript", path="x")
        assert [unit.docstring for unit in units] == [None, None]

    def test_a_comment_apart_is_not_documentation(self):
        source = "// A section\n\nfunc f() int { return 1 }\n"
        units = extract_units(source, language="go", path="x")
        assert [unit.docstring for unit in units] == [None]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LANGUAGES),
    st.lists(
        st.sampled_from(
            [
                *"ab(){};:,.=\n \t'\"#/*@",
                "é",
                "class A",
                "def f",
                "end\n",
                "function f",
                "func f",
                "<?php ",
                "module B\n",
                " => ",
                "\r\n",
                "return 1",
                "/** d */",
            ]
        ),
        max_size=80,
    ),
)
def test_any_text_in_any_language(language: str, parts: list[str]):
    source = "".join(parts)
    units = extract_units(source, language=language, path="x")
    for unit in units:
        assert source[unit.start : unit.end].count("\n") == unit.text.count("\n")
        assert unit.first_line <= unit.last_line
        assert unit.symbol
