"""``fairseq-skd compare``: which of several systems translates better, and is it chance?"""

import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import sacrebleu
import typer
from sacrebleu.significance import PairedTest
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError, output
from fairseq_skd.commands.output import AsCSV, AsJSON, Rows, Titled

__all__ = ["compare", "paired", "read_generated", "student_interval"]

SAMPLES = 1000


class Translation(NamedTuple):
    """One system's translations of a text."""

    path: Path
    hypotheses: List[str]
    references: Optional[List[str]]
    sources: Optional[List[str]]


def compare(
    systems: Annotated[
        List[str],
        typer.Argument(
            help="The baseline first: FILE, NAME=FILE, or with a file a seed NAME=FILE,FILE,... "
            "Outputs of fairseq-generate, or plain hypotheses, one a line."
        ),
    ],
    reference: Annotated[Optional[Path], typer.Option(help="Plain references, one a line.")] = None,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Ignore case.")] = False,
    changed: Annotated[
        int, typer.Option(help="Sentences shown that changed most, in each direction.")
    ] = 3,
    as_json: AsJSON = False,
    as_csv: AsCSV = False,
) -> None:
    """Compare translations of one text: BLEU, chrF and TER by sacrebleu, with significance.

    p is of the paired bootstrap and of approximate randomisation: how likely a difference as
    large would be by chance, with these models. With several seeds an arm, the interval over
    seeds says what another training would do; seeds are paired in the order in which they are
    given.

    Examples:

      fairseq-skd compare smoothing/test.out self-kd/test.out

      fairseq-skd compare smoothing=s1.out,s2.out,s3.out self-kd=k1.out,k2.out,k3.out
    """
    arms = _arms(systems)
    files = {name: [_read(path) for path in paths] for name, paths in arms.items()}
    first = next(iter(files.values()))[0]
    references = _lines(reference) if reference is not None else first.references
    if references is None:
        raise CommandError(
            f"{first.path} holds no references (lines T-0, T-1, ... of fairseq-generate); "
            "--reference takes a file of them"
        )
    unknown = sum("<<unk>>" in line for line in references)
    if unknown:
        output.note(
            f"{unknown} of the references hold <<unk>>, since fairseq-generate writes them as the "
            "dictionary knows them; --reference takes the text as it was written"
        )
    for translations in files.values():
        for one in translations:
            _check(one, references, reference or first.path, reference is None)
    metrics = {
        "BLEU": sacrebleu.BLEU(lowercase=lowercase),
        "chrF2": sacrebleu.CHRF(lowercase=lowercase),
        "TER": sacrebleu.TER(case_sensitive=not lowercase),
    }
    scores: Rows = []
    differences: Rows = []
    seeds = len(next(iter(files.values())))
    for seed in output.progress(range(seeds), "resampling"):
        together = [(name, found[seed].hypotheses) for name, found in files.items()]
        signatures, found = paired(together, metrics, references)
        for place, (name, hypotheses) in enumerate(together):
            row: Dict[str, Any] = {"system": name, "seed": seed + 1}
            row.update({metric: found[metric][place][0] for metric in metrics})
            row["length_ratio"] = _length_ratio(hypotheses, references, metrics["BLEU"])
            scores.append(row)
            if place == 0:
                continue
            for metric in metrics:
                score, bootstrap, randomisation = found[metric][place]
                baseline = found[metric][0][0]
                differences.append(
                    {
                        **{"system": name, "seed": seed + 1, "metric": metric},
                        **{"difference": score - baseline, "p_bootstrap": bootstrap},
                        "p_randomisation": randomisation,
                    }
                )
    if seeds == 1:
        for row in (*scores, *differences):
            del row["seed"]
    baseline_name = next(iter(files))
    about = f"{len(references)} sentences; " + "; ".join(
        f"{metric}|{signatures[metric]}" for metric in metrics
    )
    tables = {
        "scores": Titled(about, scores),
        "differences": Titled(f"Difference to {baseline_name}, and p for none", differences),
    }
    if seeds > 1:
        tables["over_seeds"] = Titled(
            f"Over seeds: mean, deviation, difference to {baseline_name}, its 95 % interval",
            _over_seeds(scores, list(metrics)),
        )
    if changed and len(files) > 1:
        tables["changed"] = Titled(
            "Sentences whose chrF changed most (seed 1)",
            _changed(files, references, metrics["chrF2"], changed),
        )
    formats = {
        **dict.fromkeys(metrics, ".2f"),
        **dict.fromkeys(("mean", "deviation", "difference", "from", "to"), ".2f"),
        **dict.fromkeys(("p_bootstrap", "p_randomisation", "length_ratio"), ".3f"),
        "chrF": ".1f",
    }
    output.show(tables, formats, as_json, as_csv)


def _arms(systems: Sequence[str]) -> Dict[str, List[Path]]:
    arms: Dict[str, List[Path]] = {}
    for system in systems:
        name, equals, files = system.partition("=")
        paths = [Path(file) for file in (files if equals else name).split(",")]
        name = name if equals else str(paths[0])
        if name in arms:
            raise CommandError(f"two systems are called {name}; NAME=FILE gives them names")
        arms[name] = paths
    first, *others = arms
    for name in others:
        if len(arms[name]) != len(arms[first]):
            raise CommandError(
                f"{name} has {len(arms[name])} files and {first} {len(arms[first])}; allowed: as "
                "many for each system, in the order of the seeds, which are paired"
            )
    return arms


def _read(path: Path) -> Translation:
    lines = _lines(path)
    found = read_generated(lines)
    if found is None:
        return Translation(path, lines, None, None)
    return Translation(path, *found)


def _lines(path: Path) -> List[str]:
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no UTF-8 text: {error}") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise CommandError(f"{path} is empty")
    return lines


def read_generated(
    lines: Sequence[str],
) -> Optional[Tuple[List[str], Optional[List[str]], Optional[List[str]]]]:
    """Return hypotheses, references and sources in what fairseq-generate printed.

    In the order of the text. Of the hypotheses the detokenised ones (``D-``), of several a sentence
    the first; references and sources are None where they are missing. None if it is another file.
    """
    found: Dict[str, Dict[int, str]] = {kind: {} for kind in "DHTS"}
    for line in lines:
        kind, dash, rest = line.partition("-")
        number, *fields = rest.split("\t")
        if kind in found and dash and number.isdigit() and fields:
            found[kind].setdefault(int(number), fields[-1])
    hypotheses = found["D"] or found["H"]
    if not hypotheses:
        return None
    order = sorted(hypotheses)
    references, sources = (
        [found[kind][i] for i in order] if set(found[kind]) >= set(order) else None for kind in "TS"
    )
    return [hypotheses[i] for i in order], references, sources


def _check(one: Translation, references: List[str], where: Path, same: bool) -> None:
    if len(one.hypotheses) != len(references):
        raise CommandError(
            f"{one.path} has {len(one.hypotheses)} translations, and {where} {len(references)} "
            "references: all systems must translate the same text"
        )
    if same and one.references not in (None, references):
        raise CommandError(f"{one.path} and {where} have other references: another text, or order")


def paired(
    systems: Sequence[Tuple[str, List[str]]],
    metrics: Dict[str, Any],
    references: List[str],
    tests: Sequence[str] = ("bs", "ar"),
) -> Tuple[Dict[str, str], Dict[str, List[Tuple[float, ...]]]]:
    """Compare systems with the first one by sacrebleu's paired tests.

    Parameters
    ----------
    tests : sequence of {"bs", "ar"}
        The paired bootstrap (Koehn 2004) and approximate randomisation, which takes ten times as
        many trials.

    Returns
    -------
    signatures : dict
        Of each metric, of the first test.
    figures : dict
        For each metric and system the score and p of each test; of the first system the score
        alone.
    """
    if len(systems) == 1:
        ((_, hypotheses),) = systems
        scores = {name: m.corpus_score(hypotheses, [references]) for name, m in metrics.items()}
        alone = {name: str(metric.get_signature()) for name, metric in metrics.items()}
        return alone, {name: [(score.score,)] for name, score in scores.items()}
    trials = {"bs": SAMPLES, "ar": 10 * SAMPLES}
    found = [PairedTest(list(systems), metrics, [references], t, trials[t])() for t in tests]
    signatures = found[0][0]
    figures: Dict[str, List[Tuple[float, ...]]] = {}
    for name in metrics:
        by_system: Any = zip(*(results[name] for _, results in found))
        figures[name] = [
            (one[0].score, *(test.p_value for test in one if place))
            for place, one in enumerate(by_system)
        ]
    return {name: str(signatures[name]) for name in metrics}, figures


def _length_ratio(hypotheses: List[str], references: List[str], bleu: Any) -> float:
    found = bleu.corpus_score(hypotheses, [references])
    return found.sys_len / found.ref_len


def _over_seeds(scores: Rows, metrics: Sequence[str]) -> Rows:
    """Return for each system and metric the mean and deviation, and the difference to the first."""
    names = list(dict.fromkeys(row["system"] for row in scores))
    rows: Rows = []
    for metric in (*metrics, "length_ratio"):
        values = {name: [row[metric] for row in scores if row["system"] == name] for name in names}
        for name in names:
            found, base = values[name], values[names[0]]
            row = {"system": name, "metric": metric, "seeds": len(found)}
            row["mean"] = statistics.fmean(found)
            row["deviation"] = statistics.stdev(found) if len(found) > 1 else None
            pairs = [a - b for a, b in zip(found, base)] if name != names[0] else []
            row["difference"] = statistics.fmean(pairs) if pairs else None
            low, high = student_interval(pairs) if len(pairs) > 1 else (None, None)
            rows.append({**row, "from": low, "to": high})
    return rows


def student_interval(differences: Sequence[float], level: float = 0.95) -> Tuple[float, float]:
    """Return the interval in which the mean of paired differences lies (Student's t).

    Parameters
    ----------
    differences : sequence of float
        One a seed, at least two.
    level : float
        Confidence.
    """
    try:
        from scipy.stats import t  # type: ignore[import-untyped]
    except ImportError:
        raise CommandError("intervals need scipy:  pip install scipy") from None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(differences) - 1)) * error
    return mean - half, mean + half


def _changed(
    files: Dict[str, List[Translation]], references: List[str], chrf: Any, count: int
) -> Rows:
    """Return the sentences that changed most from the first system to each other one."""
    (base_name, base), *others = ((name, found[0]) for name, found in files.items())
    rows: Rows = []
    for name, other in others:
        gains = [
            (
                chrf.sentence_score(b, [r]).score - chrf.sentence_score(a, [r]).score,
                i,
            )
            for i, (a, b, r) in enumerate(zip(base.hypotheses, other.hypotheses, references))
        ]
        ordered = sorted(gains)
        chosen = [g for g in (*ordered[::-1][:count], *ordered[:count]) if g[0] != 0]
        for gain, i in dict.fromkeys(chosen):
            lines = [("reference", references[i]), (base_name, base.hypotheses[i])]
            lines.append((name, other.hypotheses[i]))
            if base.sources is not None:
                lines.insert(0, ("source", base.sources[i]))
            for which, text in lines:
                rows.append({"sentence": i, "chrF": gain, "of": which, "text": text})
    return rows
