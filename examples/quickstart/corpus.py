"""Parallel text for the quick start: LibreOffice's help, or a file of pairs.

The help pages are the Debian packages ``libreoffice-help-LANG`` (MPL-2.0, about 5 MB for two
languages). A page has the same path and a paragraph the same id in every language, so paragraphs
align without a tool. No account and no hub are needed, and nothing is installed.
"""

import random
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Tuple

import lxml.html

Pair = Tuple[str, str]

OWN_FILE = (
    "With a corpus of your own, one pair a line and a tab between:  PAIRS=file.tsv make quickstart"
)

_HELP_FOLDER = {"en": "en-US", "pt-br": "pt-BR", "zh-cn": "zh-CN", "zh-tw": "zh-TW"}
LONGEST = 50
# Chinese and Japanese characters, Thai, Lao, Burmese and Khmer.
_WITHOUT_SPACES = re.compile(
    "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\U00020000-\U0003134f]"
)
_PARAGRAPHS = "//*[self::p or self::h1 or self::h2 or self::h3 or self::h4 or self::h5 or self::h6]"


class CorpusError(Exception):
    """The corpus cannot be had, or is not usable; the message says what to do."""


def fetch_help(languages: Tuple[str, str], folder: Path) -> None:
    """Download and unpack the help pages of two languages below ``folder``, unless they are there.

    Raises
    ------
    CorpusError
        Without Debian's tools or without network.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CorpusError(
                f"The default corpus comes from Debian's packages, and there is no {tool} on this "
                f"machine.\n{OWN_FILE}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for language in languages:
        package = f"libreoffice-help-{_HELP_FOLDER.get(language, language).lower()}"
        if (folder / package).exists():
            continue
        print(f"  downloading {package}", flush=True)
        downloaded = _apt_get("download", package, cwd=folder)
        if downloaded.returncode != 0:
            # A fresh machine has no list of packages yet; only root may fetch one.
            _apt_get("update", cwd=folder)
            downloaded = _apt_get("download", package, cwd=folder)
        archives = sorted(folder.glob(f"{package}_*.deb"))
        if downloaded.returncode != 0 or not archives:
            reason = downloaded.stderr.strip() or "no file came"
            raise CorpusError(f"apt-get download {package} failed: {reason}\n{OWN_FILE}")
        unpacked = folder / f"{package}.unpacking"
        shutil.rmtree(unpacked, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(unpacked)], check=True)
        unpacked.rename(folder / package)


def _apt_get(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["apt-get", "-q", *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def read_help(languages: Tuple[str, str], folder: Path) -> List[Pair]:
    """Read the aligned paragraphs of two languages from what `fetch_help` has unpacked."""
    sides = []
    for language in languages:
        name = _HELP_FOLDER.get(language, language)
        package = f"libreoffice-help-{name.lower()}"
        root = folder / package / "usr" / "share" / "libreoffice" / "help" / name / "text"
        pages = sorted(root.rglob("*.html"))
        side: Dict[Tuple[str, str], str] = {}
        for number, page in enumerate(pages, start=1):
            for paragraph_id, text in _paragraphs(page):
                side[str(page.relative_to(root)), paragraph_id] = text
            if number % 500 == 0 or number == len(pages):
                print(f"  {language}: {number} of {len(pages)} pages", flush=True)
        sides.append(side)
    source, target = sides
    return [(text, target[key]) for key, text in source.items() if key in target]


def _paragraphs(page: Path) -> Iterator[Pair]:
    parser = lxml.html.HTMLParser(encoding="utf-8")
    tree = lxml.html.parse(str(page), parser=parser)
    for element in tree.xpath(_PARAGRAPHS):
        if element.get("id", "").startswith(("par_id", "hd_id")):
            # The same words for a Mac, hidden on other systems.
            for hidden in element.xpath('.//span[@class="MAC"]'):
                hidden.drop_tree()
            yield element.get("id"), element.text_content()


def read_pairs(path: Path) -> List[Pair]:
    """Read a UTF-8 file with one pair a line and a tab between.

    Raises
    ------
    CorpusError
        If there is no such file, or a line is no UTF-8 or has not exactly two columns: it names
        the line.
    """
    if not path.is_file():
        raise CorpusError(f"PAIRS={path}: there is no such file")
    pairs = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                columns = line.decode("utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path}, line {number}: no UTF-8 ({error.reason} {line[error.start]:#x} at "
                    f"byte {error.start}). Of a latin-1 file  iconv -f latin1 -t utf-8  makes one"
                ) from error
            if len(columns) != 2:
                raise CorpusError(
                    f"{path}, line {number}: {len(columns)} columns; each line must be a source "
                    "sentence, one tab and its translation"
                )
            pairs.append((columns[0], columns[1]))
    return pairs


def clean(pairs: Iterable[Pair], longest: int = LONGEST) -> List[Pair]:
    """Keep pairs of real, different sentences of similar length, once each.

    Parameters
    ----------
    pairs : iterable of (str, str)
        Source and target.
    longest : int
        Words that a sentence may have; see `words`.
    """
    kept: Dict[Pair, None] = {}
    for source, target in pairs:
        source, target = " ".join(source.split()), " ".join(target.split())
        lengths = sorted((words(source), words(target)))
        if (
            source != target
            and lengths[0] >= 1
            and lengths[1] <= min(longest, 2.5 * lengths[0] + 3)
            and all(sum(map(_is_letter, side)) * 2 >= len(side) for side in (source, target))
        ):
            kept[source, target] = None
    return list(kept)


def words(text: str) -> float:
    """Return about how many words a text has.

    Between spaces; where a script has none between words, two of its letters count as a word.
    """
    joined = len(_WITHOUT_SPACES.findall(text))
    return len(_WITHOUT_SPACES.sub(" ", text).split()) + joined / 2


def tokens(text: str) -> List[str]:
    """Return a text's words and signs; where a script has no spaces between words, its letters."""
    apart = (
        f" {character} "
        if unicodedata.category(character)[0] in "PS" or _WITHOUT_SPACES.match(character)
        else character
        for character in text
    )
    return "".join(apart).split()


def _is_letter(character: str) -> bool:
    # Vowel signs (of Hindi, say) are marks, of which str.isalpha knows nothing.
    return unicodedata.category(character)[0] in "LM"


def split(pairs: List[Pair], held_out: int, seed: int = 1) -> Dict[str, List[Pair]]:
    """Split into train, valid and test so that no held-out sentence is in train.

    Sentences that differ only in case, punctuation or spacing count as one. ``held_out`` pairs,
    each of another sentence, go to test and as many to valid; train keeps the pairs neither side
    of which is held out.

    Raises
    ------
    CorpusError
        If too little is left to train on.
    """
    by_source: Dict[str, Pair] = {}
    for pair in pairs:
        by_source.setdefault(normalise(pair[0]), pair)
    keys = sorted(by_source)
    random.Random(seed).shuffle(keys)
    test, valid = (
        [by_source[k] for k in part] for part in (keys[:held_out], keys[held_out : 2 * held_out])
    )
    known = [{normalise(pair[side]) for pair in test + valid} for side in (0, 1)]
    train = [p for p in pairs if not any(normalise(p[side]) in known[side] for side in (0, 1))]
    seen = {normalise(pair[0]) for pair in test}, {normalise(pair[1]) for pair in test}
    valid = [p for p in valid if not any(normalise(p[side]) in seen[side] for side in (0, 1))]
    if len(train) < 4 * held_out or not valid or not test:
        raise CorpusError(
            f"{len(pairs)} usable pairs are left, of which {len(train)} can be trained on; that is "
            "too few (a pair is dropped if it is empty, longer than 50 words, mostly not letters, "
            f"very unequal in length, a repetition, or equal on both sides).\n{OWN_FILE}"
        )
    return {"train": train, "valid": valid, "test": test}


def languages_of(text: str) -> Tuple[str, str]:
    """Return the two languages of ``en-de``, ``pt-br-en`` or ``en-zh-cn``.

    Raises
    ------
    CorpusError
        If there are not two different ones.
    """
    parts = text.lower().split("-")
    ways = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
    known = [way for way in ways if all("-" not in one or one in _HELP_FOLDER for one in way)]
    if len(known) != 1 or known[0][0] == known[0][1] or not all(known[0]):
        regional = ", ".join(name for name in _HELP_FOLDER if "-" in name)
        raise CorpusError(
            f"--langs is {text!r}; allowed: two languages, such as en-de, also with {regional}"
        )
    return known[0]


def normalise(text: str) -> str:
    """Return a text's letters and digits alone, in one case."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def write(parts: Dict[str, List[Pair]], languages: Tuple[str, str], folder: Path) -> None:
    """Write ``train.en``, ``train.de`` and so on, one sentence a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        for side, language in enumerate(languages):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")
        found = sum(words(source) for source, _ in pairs)
        print(f"  {name}: {len(pairs)} pairs, {found:.0f} source words", flush=True)


if __name__ == "__main__":
    sys.exit("This is a part of examples/quickstart/run.py; run  make quickstart")
