"""The gallery on a tiny model: pictures, the page, what it says of each method."""

from __future__ import annotations

import base64
import html.parser
import json
import pathlib
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ("streaming_llm(keep=0.25)", "kvzip(keep=0.5, chunk=60)", "kivi(group=4, residual=8)")


START = """
from absl import app
from experiments import gallery
app.run(gallery.main)
"""


def program(*arguments) -> subprocess.CompletedProcess:
    """In a process of its own: two programs cannot define their flags in one."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery")
    run = program(
        f"--model={tiny}", f"--text={tiny / 'text.txt'}", f"--out={out}", "--task=passkey",
        "--length=240", f"--methods={'; '.join(METHODS)}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert METHODS[1] in run.stdout and "50.0%" in run.stdout
    return out


@pytest.fixture(scope="module")
def data(finished):
    page = (finished / "gallery.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])


def test_a_picture_for_every_method(finished):
    names = sorted(path.name for path in finished.glob("*.png"))
    assert names == sorted(re.sub(r"[^a-z0-9]+", "-", m).strip("-") + ".png" for m in METHODS)
    for name in names:
        image = matplotlib.image.imread(finished / name)
        assert image.shape[0] > 200 and image[..., :3].std() > 0.05


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_page_stands_alone(finished):
    source = (finished / "gallery.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<link", source)
    page = Page()
    page.feed(source)
    assert [a[:22] for a in page.addresses] == ["data:image/png;base64,"] * 3
    assert all(method in "\n".join(page.text) for method in METHODS)


def test_text_and_forms_are_those_of_the_caches(data):
    text = "".join(data["pieces"])
    assert text.startswith("There is an important info")
    answer = "".join(data["pieces"][i] for i in data["marked"])
    assert f"The pass key is {answer.strip()}. Remember it." in text
    time, rows = len(data["pieces"]), data["layers"] * data["heads"]
    forms = [
        np.frombuffer(base64.b64decode(m), np.uint8).reshape(rows, time) for m in data["methods"]
    ]
    streaming, zipped, coded = forms
    newest = time // 4 - 4
    want = [i < 4 or i >= time - newest for i in range(time)]
    assert (streaming == np.asarray(want, np.uint8)).all()
    assert (zipped > 0).sum() == rows * (time // 2) and (zipped[:, :4] == 1).all()
    assert len(set((zipped > 0).sum(1))) > 1  # heads differ
    # Keys in groups of four, the newest exactly.
    assert set(np.unique(coded)) == {1, 2} and (coded[:, -1] == 1).all()
    assert (np.diff(coded.astype(int), axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods=kvzip(keep=2)"], ["keep=2", "(0, 1]"]),
        (["--length=20"], ["niah_single_2: length=20"]),
    ],
)
def test_refuses(tiny, tmp_path, more, said):
    run = program(f"--model={tiny}", f"--out={tmp_path}", *more)
    text = run.stdout + run.stderr
    assert run.returncode == 1 and all(part in text for part in said) and "Traceback" not in text
