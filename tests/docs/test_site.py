"""The documentation is built strictly, and its pages load nothing from another host."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_strictly_and_every_page_loads_only_files_of_its_own(tmp_path):
    pytest.importorskip("material")
    site = tmp_path / "site"
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    # its links start at a server's root
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert site / "index.html" in pages
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="([^"]+)"', page.read_text(encoding="utf-8")
        )
        assert any("iframe-worker" in address for address in loaded), page
        for address in loaded:
            assert not re.match(r"(https?:)?//", address), (page, address)
            assert (page.parent / address.partition("?")[0]).exists(), (page, address)
