"""The quick start's text: reading help pages, cleaning, and a split without leakage."""

import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import corpus as text


def page(folder, language, name, body):
    root = (
        folder / f"libreoffice-help-{language.lower()}/usr/share/libreoffice/help/{language}/text"
    )
    (root / "swriter").mkdir(parents=True, exist_ok=True)
    html = f'<html><head><meta charset="UTF-8"></head><body>{body}</body></html>'
    (root / "swriter" / name).write_text(html, encoding="utf-8")


def test_help_pages_align_by_page_and_paragraph(tmp_path):
    page(
        tmp_path,
        "en-US",
        "a.html",
        '<h1 id="hd_id1">Open <b>files</b></h1>'
        '<p id="par_id2">Press <span hidden="true" class="MAC">'
        '<span class="k">Command</span></span><span class="DEFAULT">Ctrl</span>+O.</p>'
        '<p id="bm_id3">not a paragraph</p><p id="par_id4">only in English</p>',
    )
    page(tmp_path, "en-US", "b.html", '<p id="par_id2">another page</p>')
    page(
        tmp_path,
        "de",
        "a.html",
        '<p id="par_id2">Drücken Sie Strg+O.</p><h1 id="hd_id1">Öffnen</h1>',
    )
    pairs = text.read_help(("en", "de"), tmp_path)
    assert pairs == [("Open files", "Öffnen"), ("Press Ctrl+O.", "Drücken Sie Strg+O.")]


def test_clean():
    long = "word " * 51
    good = [("a  good\npair", "ein gutes Paar"), ("two words", "zwei Worte und noch drei mehr")]
    bad = [("", "leer"), ("same", "same"), ("1 + 1 = 2", "eins und eins"), (long, long + "!")]
    bad += [("one", "eins zwei drei vier fünf sechs"), ("a good pair", "ein gutes Paar")]
    assert text.clean(bad[:-1] + good + bad[-1:]) == [("a good pair", "ein gutes Paar"), good[1]]


def test_no_held_out_sentence_is_in_train_on_either_side():
    pairs = [(f"Sentence {i}.", f"Satz {i}.") for i in range(200)]
    pairs += [(f"sentence, {i}!", f"anderer Satz {i}") for i in range(200)]
    pairs += [(f"further {i}", f"SATZ {i}") for i in range(200)]
    parts = text.split(pairs, 30)
    for side in (0, 1):
        train = {text.normalise(pair[side]) for pair in parts["train"]}
        for held_out in ("valid", "test"):
            assert not train & {text.normalise(pair[side]) for pair in parts[held_out]}
        valid, test = ({text.normalise(p[side]) for p in parts[x]} for x in ("valid", "test"))
        assert not valid & test
    assert len(parts["test"]) == 30
    assert text.split(pairs, 30) == parts


def test_too_little_text():
    with pytest.raises(text.CorpusError, match=r"3 usable pairs.*too few(.|\n)*PAIRS=file"):
        text.split([("a", "b"), ("c", "d"), ("e", "f")], 1)


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("apt-get", "dpkg-deb"):
        (tools / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    with pytest.raises(
        text.CorpusError, match=r"failed: E: Unable to locate(.|\n)*PAIRS=file\.tsv"
    ):
        text.fetch_help(("en", "xx"), tmp_path / "download")
