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


def test_words_and_signs_of_the_language_model():
    assert text.tokens("Press  Ctrl+O, (don't)!") == (
        ["Press", "Ctrl", "+", "O", ",", "(", "don", "'", "t", ")", "!"]
    )
    # Vowel signs stay in their word; without spaces a letter is a word.
    assert text.tokens("हिन्दी में 打开 a") == ["हिन्दी", "में", "打", "开", "a"]


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


def test_languages_without_spaces_and_with_vowel_signs_are_kept():
    pairs = [
        (
            "This is a very small house by the sea.",
            "\u8fd9\u662f\u6d77\u8fb9\u7684\u4e00\u5ea7\u5c0f\u623f\u5b50\u3002",
        ),
        (
            "This is a very small house by the sea.",
            "\u3053\u308c\u306f\u6d77\u8fba\u306e\u5c0f\u3055\u306a\u5bb6\u3067\u3059\u3002",
        ),
        (
            "This is a very small house.",
            "\u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d\u0e1a\u0e49\u0e32\u0e19\u0e2b\u0e25\u0e31\u0e07\u0e40\u0e25\u0e47\u0e01",
        ),
        ("This is a house.", "\u092f\u0939 \u090f\u0915 \u0918\u0930 \u0939\u0948"),
    ]
    assert text.clean(pairs) == pairs
    assert text.words("\u6d77\u8fb9 house") == 2
    assert text.clean([("one", "\u6d77" * 40)]) == []  # far longer than the other side
    assert text.clean(pairs, longest=4) == pairs[3:]


@pytest.mark.parametrize(
    ("given", "languages"),
    [("en-de", ("en", "de")), ("pt-br-en", ("pt-br", "en")), ("en-zh-CN", ("en", "zh-cn"))],
)
def test_languages_of_regions(given, languages):
    assert text.languages_of(given) == languages


@pytest.mark.parametrize("given", ["en", "en-en", "a-b-c", "-de"])
def test_other_languages_are_refused(given):
    with pytest.raises(text.CorpusError, match=f"--langs is '{given}'; allowed: two languages"):
        text.languages_of(given)


def test_a_corpus_that_is_no_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("a\tein\nb\tschön\n".encode("latin-1"))
    with pytest.raises(text.CorpusError, match=r"pairs.tsv, line 2: no UTF-8 .* 0xf6 at byte 5"):
        text.read_pairs(path)
