"""Canonical tensor names are spelled in one module, and read back as they were written."""

import re
from pathlib import Path

import pytest

from app.sites import SIDES, Embedding, Site, parse_prefix_tensor

ROOT = Path(__file__).parent.parent
SPELLED = re.compile(r"\b(enc|dec)\.(embeds|self|cross)\b")


def test_no_other_module_spells_a_tensor_name() -> None:
    sources = [path for room in ("app", "benchmarks", "demo") for path in (ROOT / room).rglob("*.py")]
    spelling = [path.relative_to(ROOT).as_posix() for path in sources if SPELLED.search(path.read_text())]
    assert spelling == ["app/sites.py"]


def test_names_are_those_of_the_format() -> None:
    assert [*Embedding] == ["enc.embeds", "dec.embeds"]
    assert [site.tensor(0, "k") for site in Site] == ["enc.self.0.k", "dec.self.0.k", "dec.cross.0.k"]


@pytest.mark.parametrize("site", Site)
@pytest.mark.parametrize("side", SIDES)
def test_a_name_reads_back(site: Site, side: str) -> None:
    assert parse_prefix_tensor(site.tensor(12, side)) == (site, 12, side)


@pytest.mark.parametrize(
    "name",
    ["dec.self.00.k", "dec.self.1.q", "dec.self.12345.k", "dec.self.0.k\n", "decxself.0.k", "dec.embeds"],
)
def test_other_names_are_none(name: str) -> None:
    assert parse_prefix_tensor(name) is None
