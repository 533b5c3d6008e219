"""Recipes run from raw files in their source's format to a printed score, and refuse bad input."""

import gzip
import io
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fairseq.criterions import CRITERION_REGISTRY
from omegaconf import OmegaConf

from experiments import figures
from tests.conftest import PLUGIN, ROOT

EXAMPLES = ROOT / "examples"
MULTI30K = EXAMPLES / "translation" / "multi30k"
IWSLT = EXAMPLES / "translation" / "iwslt14_de_en"
WMT = EXAMPLES / "translation" / "wmt14_en_de"
WIKITEXT2 = EXAMPLES / "language_model" / "wikitext2"
WIKITEXT103 = EXAMPLES / "language_model" / "wikitext103"
R_DROP = "label_smoothed_cross_entropy_with_rdrop"
RECIPES = [MULTI30K, IWSLT, WMT, WIKITEXT2, WIKITEXT103]
# A recipe is a dozen commands, each of which loads torch: on a busy machine minutes.
pytestmark = pytest.mark.timeout(900)
# What an author of the recipes has on the path, without what is tested for being there.
SYSTEM = "/usr/bin:/bin"


def script(path, *arguments, fails=False, first_on_path="", **environment):
    """Run a script; return what it printed."""
    folders = [first_on_path, Path(sys.executable).parent, SYSTEM]
    done = subprocess.run(
        [str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "PATH": ":".join(str(folder) for folder in folders if folder),
            "HOME": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert (done.returncode != 0) == fails, f"{path} {arguments}\n{done.stdout[-5000:]}"
    return done.stdout


def sentences(count, seed, language):
    """Sentences with capitals, punctuation, a compound and a letter outside ASCII."""
    draw = random.Random(seed)
    words = {
        "en": "the,a,dog,man,woman,red,green,runs,sits,near,street-car,house,it's,big",
        "de": "der,ein,Hund,Mann,Frau,roter,grüner,läuft,sitzt,nahe,U-Bahn,Haus,es,groß",
    }[language].split(",")
    lines = []
    for _ in range(count):
        line = " ".join(words[draw.randrange(len(words))] for _ in range(draw.randint(4, 9)))
        lines.append(line[0].upper() + line[1:] + ".")
    return lines


def uneven(lines, language):
    """Make every ninth German sentence three times as long as its English one."""
    return [
        f"{line} {line} {line}" if language == "de" and number % 9 == 4 else line
        for number, line in enumerate(lines)
    ]


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, lines in members.items():
            content = "".join(line + "\n" for line in lines).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Folders with small files that have the names and the formats of the sources."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("multi30k", "iwslt14_de_en", "wmt14_en_de", "wikitext2", "wikitext103"):
        (folder / name).mkdir()
    iwslt, europarl, news, crawl, valid, test = {}, {}, {}, {}, {}, {}
    for language in ("en", "de"):
        for number, part in enumerate(
            ["train", "val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco"]
        ):
            lines = sentences(150 if part == "train" else 12, number, language)
            with gzip.open(
                folder / "multi30k" / f"{part}.{language}.gz", "wt", encoding="utf-8"
            ) as f:
                f.write("".join(line + "\n" for line in lines))
        talk = uneven(sentences(200, 7, language), language)
        iwslt[f"de-en/train.tags.de-en.{language}"] = [
            "<url>http://www.ted.com/</url>",
            "<keywords>talks</keywords>",
            "<talkid>1</talkid>",
            f"<title>{talk[0]}</title>",
            f"<description>{talk[1]}</description>",
            *talk[2:],
        ]
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            iwslt[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = [
                '<?xml version="1.0" encoding="UTF-8"?>',
                f'<mteval><srcset setid="x" srclang="{language}"><doc docid="1">',
                *(
                    f'<seg id="{number}"> {line} </seg>'
                    for number, line in enumerate(sentences(4, 8, language), start=1)
                ),
                "</doc></srcset></mteval>",
            ]
        europarl[f"training/europarl-v7.de-en.{language}"] = sentences(90, 1, language)
        news[f"training/news-commentary-v9.de-en.{language}"] = uneven(
            sentences(60, 2, language), language
        )
        # Bytes that Python takes for the end of a line, and that are none.
        crawl[f"commoncrawl.de-en.{language}"] = [
            line.replace(" ", "\u2028", 1) for line in sentences(20, 3, language)
        ]
        segments = [
            f'<seg id="{number}">{line}</seg>'
            for number, line in enumerate(sentences(15, 4, language), start=1)
        ]
        valid[f"test/newstest2013-src.{language}.sgm"] = segments
        side = "src" if language == "en" else "ref"
        test[f"test-full/newstest2014-deen-{side}.{language}.sgm"] = segments
    archive(folder / "iwslt14_de_en" / "de-en.tgz", iwslt)
    archive(folder / "wmt14_en_de" / "training-parallel-europarl-v7.tgz", europarl)
    archive(folder / "wmt14_en_de" / "training-parallel-nc-v9.tgz", news)
    archive(folder / "wmt14_en_de" / "training-parallel-commoncrawl.tgz", crawl)
    archive(folder / "wmt14_en_de" / "test.tgz", valid)
    archive(folder / "wmt14_en_de" / "test-full.tgz", test)
    for name, source in (("wikitext2", "wikitext-2"), ("wikitext103", "wikitext-103")):
        with zipfile.ZipFile(folder / name / f"{source}-v1.zip", "w") as zipped:
            for number, part in enumerate(("train", "valid", "test")):
                lines = sentences(320 if part == "train" else 120, number, "en")
                text = " \n = Title = \n \n" + "".join(f" {line[:-1]} . \n" for line in lines)
                zipped.writestr(f"{source}/wiki.{part}.tokens", text)
    return folder


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory):
    """Return a function that prepares a recipe once and gives its folder and what was printed."""
    known = {}

    def prepare(recipe, *options):
        if (recipe, options) not in known:
            out = tmp_path_factory.mktemp(recipe.name)
            arguments = ["--smoke", "--raw", raw / recipe.name, "--out", out, "--workers", 1]
            known[recipe, options] = out, script(recipe / "prepare.sh", *arguments, *options)
            assert f"train.sh self_kd --smoke --out {out}" in known[recipe, options][1]
        return known[recipe, options]

    return prepare


def run(recipe, out, criterion, *options):
    arguments = [criterion, "--smoke", "--out", out, *options]
    trained = script(recipe / "train.sh", *arguments)
    return trained, script(recipe / "evaluate.sh", *arguments)


@pytest.mark.parametrize(
    ("recipe", "options", "tests"),
    [(MULTI30K, [], 3), (IWSLT, ["--joined-dictionary"], 1), (WMT, ["--big"], 1)],
    ids=["multi30k", "iwslt14_de_en", "wmt14_en_de"],
)
def test_a_translation_recipe_from_raw_text_to_bleu(recipe, options, tests, prepared):
    out, _ = prepared(recipe, *(options if recipe == IWSLT else []))
    trained, evaluated = run(recipe, out, "self_kd", *options)
    assert f"$ fairseq-train {out}-smoke/data" in trained
    assert f"evaluate.sh self_kd --smoke --out {out}" in trained
    assert "self_kd|cand:neighbors|" in trained
    assert "self_kd_mass" in trained
    case = "mixed" if recipe == WMT else "lc"
    assert evaluated.count(f"BLEU|nrefs:1|case:{case}|eff:no|tok:13a|smooth:exp|version:") == tests
    assert evaluated.count(f"chrF2|nrefs:1|case:{case}|") == tests
    assert evaluated.count("|tok:none|") == tests
    assert len(list(figures.scores(evaluated))) == 2 * tests  # BLEU and chrF
    assert ("reading" in evaluated) == (recipe != IWSLT)  # averaged
    assert "has not come to its end" not in evaluated


@pytest.mark.parametrize(
    ("recipe", "criterion"), [(WIKITEXT2, "self_kd"), (WIKITEXT103, "cross_entropy")]
)
def test_a_language_model_recipe_from_raw_text_to_perplexity(recipe, criterion, prepared):
    out, _ = prepared(recipe)
    trained, evaluated = run(recipe, out, criterion)
    assert ("self_kd_mass" in trained) == (criterion == "self_kd")
    context = 96 if recipe == WIKITEXT2 else 400
    for part in ("valid", "test"):
        (line,) = [li for li in evaluated.splitlines() if li.startswith(f"{part}: perplexity")]
        assert 1 < float(line.split()[2]) < 1000
        assert f"at least {context} words before it" in line
    assert len(list(figures.scores(evaluated))) == 2


def test_a_student_is_taught_by_finished_runs(prepared):
    """Of another size than its teachers; the same command goes on, and repeats nothing."""
    out, _ = prepared(MULTI30K)
    for seed in (1, 2):
        arguments = ["label_smoothed_cross_entropy", "--smoke", "--out", out, "--seed", seed]
        script(MULTI30K / "train.sh", *arguments)
    student = MULTI30K.parent / "distil" / "student.sh"
    runs = "label_smoothed_cross_entropy-seed1:label_smoothed_cross_entropy-seed2"
    arguments_of_student = ["--smoke", "--out", out, "--encoder-embed-dim", 64]
    arguments_of_student += ["--decoder-embed-dim", 64]
    wrong = [*arguments_of_student, "--teaches", "x"]
    mistyped = script(student, "multi30k", runs, *wrong, fails=True)
    assert "10 words of every position, the mean of 2 model(s)" in mistyped
    assert "unrecognized arguments: --teaches x" in mistyped
    printed = script(student, "multi30k", runs, *arguments_of_student)
    assert "is complete: nothing is left to do" in printed  # taught before the option was seen
    assert "|cand:stored|teacher:2x10@1#" in printed
    assert "soft targets: stored: what finished models give" in printed
    assert f"evaluate.sh self_kd --smoke --out {out} --name taught-seed1" in printed
    arguments = ["self_kd", "--smoke", "--out", out, "--name", "taught-seed1"]
    assert script(MULTI30K / "evaluate.sh", *arguments).count("BLEU|nrefs:1|case:lc") == 3
    assert "Taught already" in script(student, "multi30k", runs, *arguments_of_student)
    folder = Path(f"{out}-smoke", "label_smoothed_cross_entropy-seed1")
    shutil.copy(folder / "checkpoint_best.pt", folder / "average.pt")  # as evaluate.sh would
    other = script(student, "multi30k", runs, *arguments_of_student, "--seed", 2)
    assert "Taught already" not in other
    assert (folder.parent / f"teacher-{runs.replace(':', '-average+')}.skd").exists()
    for wrong, message in (
        (
            ["multi30k", "absent", "--name", "other"],
            "absent is no finished run; train.sh of multi30k makes one",
        ),
        (["mine", runs], "the recipe is mine; allowed: multi30k"),
    ):
        assert message in refused(student, *wrong, "--smoke", "--out", out)

    # Sequence-level distillation: the same runs translate the text that a student is trained on.
    translate = student.with_name("translate.sh")
    command = [translate, "multi30k", runs, "--smoke", "--out", out, "--beam", 1, "--max-len-b", 9]
    printed = script(*command)
    assert "translated sentences to train on: 150" in printed
    new = Path(f"{out}-translated-smoke")
    assert printed.count("--distributed-world-size 2") == 2
    old_text, text = (
        [
            (folder / f"train.{language}").read_text(encoding="utf-8").splitlines()
            for language in ("en", "de")
        ]
        for folder in (Path(f"{out}-smoke", "bpe"), new)
    )
    assert text[0] == old_text[0]  # in its order
    assert text[1] != old_text[1]
    for name in ("dict.de.txt", "valid.en-de.de.bin", "test2.en-de.en.bin"):
        ours = (new / "data" / name).read_bytes()
        assert ours == Path(f"{out}-smoke", "data", name).read_bytes()
    binary = "train.en-de.de.bin"
    old_binary = Path(f"{out}-smoke", "data", binary).read_bytes()
    assert (new / "data" / binary).read_bytes() != old_binary
    following = f"train.sh label_smoothed_cross_entropy --out {out}-translated --smoke\n"
    assert printed.endswith(following)
    trained, evaluated = run(MULTI30K, f"{out}-translated", "label_smoothed_cross_entropy")
    assert "valid on 'valid' subset" in trained
    assert evaluated.count("BLEU|nrefs:1|case:lc") == 3
    (new / "generated-1").rename(new / "generated-1.partial")  # as after an interruption
    again = script(*command)
    assert again.count("--distributed-world-size 2") == 1
    assert "done already" in again
    message = "was translated by other runs, or with other options; --into DIR"
    assert message in refused(*command, "--lenpen", 2)
    assert "holds another text; --into DIR" in refused(*command, "--into", out)
    assert "translate.sh has no option --name" in refused(*command, "--name=other")
    assert "absent is no finished run" in refused(translate, "multi30k", "absent", *command[3:6])


@pytest.mark.skipif(R_DROP not in CRITERION_REGISTRY, reason="fairseq 0.12.2 has no R-Drop")
@pytest.mark.parametrize("recipe", [MULTI30K, WIKITEXT2], ids=lambda recipe: recipe.name)
def test_r_drop_trains(recipe, prepared):
    out, _ = prepared(recipe)
    trained = script(recipe / "train.sh", R_DROP, "--smoke", "--out", out)
    assert "rdrop_kl_loss" in trained
    assert "valid on 'valid' subset" in trained


def test_iwslt_text_is_read_and_split_as_fairseqs_example_does(raw, prepared):
    out, _ = prepared(IWSLT, "--joined-dictionary")
    # The same text without a joined dictionary: only the last step is new.
    arguments = ["--smoke", "--raw", raw / IWSLT.name, "--out", out, "--workers", 1]
    printed = script(IWSLT / "prepare.sh", *arguments)
    assert printed.count("done already") == 3
    out = Path(f"{out}-smoke")
    assert (out / "data" / "dict.en.txt").read_text() != (out / "data" / "dict.de.txt").read_text()
    text = (out / "text" / "train.de").read_text(encoding="utf-8").splitlines()
    assert text == uneven(sentences(200, 7, "de"), "de")
    test = (out / "text" / "test.en").read_text(encoding="utf-8").splitlines()
    assert test == sentences(4, 8, "en") * 5
    train, valid = (
        (out / "tokens" / f"{part}.de").read_text(encoding="utf-8").splitlines()
        for part in ("train", "valid")
    )
    # Put back where they were, every 23rd pair, they are the text in its order.
    for number, line in enumerate(valid, start=1):
        train.insert(23 * number - 1, line)
    words = [line.lower().replace(".", " .") for line in text]
    assert 100 < len(train) < 200  # pairs of unequal length are gone
    assert train == [line for line in words if line in train]
    assert len(valid) == len(train) // 23


def test_one_line_stays_one_line_and_pairs_of_unequal_length_go(prepared):
    out, printed = prepared(WMT)
    out = Path(f"{out}-smoke")
    lines = (out / "text" / "train.de").read_text(encoding="utf-8").split("\n")[:-1]
    assert lines[-20:] == sentences(20, 3, "de")
    assert "of 170 pairs kept" in printed
    english, german = (
        (out / "tokens" / f"train.{language}").read_text(encoding="utf-8").splitlines()
        for language in ("en", "de")
    )
    assert 100 < len(english) == len(german) < 170
    for one, two in zip(english, german):
        lengths = sorted([len(one.split()), len(two.split())])
        assert lengths[1] <= 1.5 * lengths[0]


def test_a_second_run_repeats_nothing_and_an_unfinished_step_is_done_again(raw, tmp_path):
    arguments = ["--smoke", "--raw", raw / "wikitext2", "--out", tmp_path, "--workers", 1]
    arguments += ["--words", 9]
    # As after an interruption: a step that was begun, and nothing that is complete.
    out = Path(f"{tmp_path}-smoke")
    (out / "text.partial").mkdir(parents=True)
    (out / "text.partial" / "half").write_text("half a li")
    first = script(WIKITEXT2 / "prepare.sh", *arguments)
    assert "done already" not in first
    assert sorted(path.name for path in (out / "text").iterdir()) == ["test", "train", "valid"]
    assert script(WIKITEXT2 / "prepare.sh", *arguments).count("done already") == 2
    words = (out / "data" / "dict.txt").read_text().splitlines()
    assert [line for line in words if not line.startswith("madeupword")] == words[:9]


# ---- Two workers --------------------------------------------------------------------------------


def test_two_workers_under_torchrun(prepared):
    out, _ = prepared(MULTI30K)
    arguments = ["--nnodes", 1, "--nproc-per-node", 2, "--standalone", "--no-python"]
    arguments += [MULTI30K / "train.sh", "self_kd", "--smoke", "--out", out, "--name", "torchrun"]
    torchrun = Path(sys.executable).parent / "torchrun"
    printed = script(torchrun, *arguments)
    assert "training on 2 devices" in printed
    assert printed.count("Training with self_kd, 2 CPU process(es)") == 1
    assert "self_kd_mass" in printed
    assert Path(f"{out}-smoke", "torchrun", "done").exists()
    # Once more: no process waits for another one.
    second = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    assert "Trained already" in script(
        *arguments[arguments.index(MULTI30K / "train.sh") :], **second
    )


def test_slurm_tasks_are_told_what_torchrun_tells_them(tmp_path):
    """With the environment of srun, and a stand-in for scontrol that knows one host."""
    job = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    printed = refused(WMT / "train.sh", "self_kd", "--out", data(tmp_path / "batch"), **job)
    assert "start it with srun" in printed
    job["SLURM_STEP_NODELIST"] = "here"
    scontrol = '#!/bin/sh\ntest "$*" = "show hostnames here" && echo first && echo second\n'
    given = arguments_of(WMT, tmp_path / "one", "--big", stand_ins={"scontrol": scontrol}, **job)
    expected = {"world-size": "16", "rank": "9", "init-method": "env://", "backend": "gloo"}
    for name, value in expected.items():
        assert given[given.index(f"--distributed-{name}") + 1] == value
    assert given[given.index("--update-freq") + 1] == "8"
    assert (tmp_path / "one" / "environment").read_text().split() == ["first", "10007", "16", "9"]


@pytest.mark.parametrize(
    ("gpus", "environment", "options", "expected"),
    [
        # The machine's GPUs, no more of them than an update has batches; fp16 by itself.
        ("4 fp16", {}, [], "--distributed-world-size 4 --update-freq 2 --fp16"),
        ("16 fp32", {}, [], "--distributed-world-size 8 --update-freq 1"),
        ("4 fp16", {}, ["--precision", "fp32"], "--distributed-world-size 4 --update-freq 2"),
        ("4 fp16", {}, ["--amp"], "--distributed-world-size 4 --update-freq 2 --amp"),
        # One process of three, which sees all GPUs, or its own alone.
        ("3 fp32", {"LOCAL_RANK": "2"}, [], "--device-id 2 --update-freq 3"),
        ("1 fp32", {"LOCAL_RANK": "2"}, [], "--device-id 0 --update-freq 3"),
    ],
)
def test_gpus_share_an_update(gpus, environment, options, expected, tmp_path):
    """A stand-in for python tells the script what torch would tell it of the GPUs."""
    if environment:
        environment = {**environment, "WORLD_SIZE": "3", "RANK": "2"}
    python = f"#!/bin/sh\necho {gpus}\n"
    given = arguments_of(WMT, tmp_path, *options, stand_ins={"python": python}, **environment)
    text = " ".join(given)
    assert text.endswith(expected)
    assert "--cpu" not in text
    assert "gloo" not in text


# ---- The same run from a YAML -------------------------------------------------------------------


def data(out):
    (out / "data").mkdir(parents=True, exist_ok=True)
    return out


def arguments_of(recipe, out, *options, stand_ins=(), **environment):
    """Return the arguments that train.sh gives to fairseq-train; one that only notes them runs."""
    tools = data(out) / "tools"
    tools.mkdir(exist_ok=True)
    note = f"cd {shlex.quote(str(out))}\n"
    note += "printf '%s\\0' \"$@\" > arguments\n"
    note += "echo $MASTER_ADDR $MASTER_PORT $WORLD_SIZE $RANK > environment\n"
    note += "test -d run && touch run/checkpoint_last.pt\nexit 0\n"
    for name, text in {**dict(stand_ins), "fairseq-train": f"#!/bin/sh\n{note}"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    arguments = ["self_kd", "--out", out, "--name", "run", *options]
    script(recipe / "train.sh", *arguments, first_on_path=tools, **environment)
    return (out / "arguments").read_text().split("\0")[:-1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_yaml_is_the_run_of_train_sh(recipe, tmp_path):
    from fairseq import options
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.dataclass.initialize import add_defaults
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    gpus = 8 if recipe in (WMT, WIKITEXT103) else 1
    # A stand-in for python says that there is no GPU.
    arguments = arguments_of(recipe, tmp_path, stand_ins={"python": "#!/bin/sh\necho 0 fp32\n"})
    on_one = int(arguments[arguments.index("--update-freq") + 1])
    parser = options.get_training_parser()
    expected = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
    config = OmegaConf.load(recipe / "train.yaml")
    config.common.user_dir = str(PLUGIN)
    config.task.data = str(tmp_path / "data")
    config.checkpoint.save_dir = str(tmp_path / "run")
    assert [on_one // gpus] == config.optimization.update_freq
    config.optimization.update_freq = [on_one]
    groups = ["task", "criterion", "model", "optimizer", "lr_scheduler"]
    full = OmegaConf.merge(OmegaConf.structured(FairseqConfig), config)
    add_defaults(full)
    # On a machine without a GPU train.sh adds --cpu, which is no part of the recipe.
    full.common.cpu = expected.common.cpu
    for group in ["common", "optimization", "dataset", "checkpoint", *groups]:
        one = OmegaConf.to_container(full[group], resolve=True, enum_to_str=True)
        two = expected[group]
        two = (
            OmegaConf.to_container(two, resolve=True, enum_to_str=True)
            if OmegaConf.is_config(two)
            else vars(two)
        )
        compare = set(one) & set(two) - {"_name", "no_progress_bar"}
        assert set(config[group]) - {"_name"} <= compare if group != "model" else compare
        for key in compare:
            if group != "model" or not isinstance(one[key], dict):
                assert one[key] == two[key], f"{group}.{key}"
    _same_model(full.model, expected.model)


def _same_model(config, arguments):
    """Compare every field, which a command line and a YAML spell differently."""
    from fairseq.models.transformer import TransformerConfig

    if config._name != "transformer":
        return
    config = {key: value for key, value in config.items() if key != "_name"}
    found = OmegaConf.merge(OmegaConf.structured(TransformerConfig), config)
    expected = OmegaConf.structured(TransformerConfig.from_namespace(arguments))
    # Defaults refer to each other from the root.
    found, expected = (
        OmegaConf.to_container(OmegaConf.create({"model": model}), resolve=True)["model"]
        for model in (found, expected)
    )
    for key, value in expected.items():
        for inner, one in (value if isinstance(value, dict) else {"": value}).items():
            two = found[key][inner] if inner else found[key]
            if "_name" not in (key, inner):
                assert one == two or {one, two} <= {None, 0}, f"{key} {inner}: {one} {two}"


# ---- Bad input ----------------------------------------------------------------------------------


def disk_with(tools, gib):
    """Make a folder of tools in which df finds so many GiB free."""
    tools.mkdir()
    (tools / "df").write_text(f"#!/bin/sh\necho head\necho /dev/x 100 100 {gib * 2**20} 50% /\n")
    (tools / "df").chmod(0o755)
    return tools


def refused(*arguments, **keywords):
    printed = script(*arguments, fails=True, **keywords)
    assert "has stopped: " in printed
    return printed.split("has stopped: ")[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_bad_arguments_are_refused_and_help_is_given(recipe, tmp_path):
    allowed = "self_kd, label_smoothed_cross_entropy, cross_entropy, "
    printed = refused(recipe / "train.sh", "selfkd", "--out", tmp_path)
    assert printed.startswith("the criterion is selfkd; allowed: " + allowed)
    printed = refused(recipe / "train.sh", "self_kd", "--out", tmp_path / "none")
    assert printed.startswith("there is no data in")
    assert f"{recipe}/prepare.sh" in printed
    assert "needs a value" in refused(recipe / "prepare.sh", "--raw")
    assert "there is no option --row" in refused(recipe / "prepare.sh", "--row", "x")
    printed = refused(recipe / "prepare.sh", "--raw", tmp_path / "none", "--out", tmp_path)
    assert "which is no folder" in printed
    absent = "--joined-dictionary" if recipe != IWSLT else "--big"
    printed = refused(recipe / "train.sh", "self_kd", "--out", tmp_path, absent)
    assert printed.startswith(f"{recipe.name} has no option {absent}")
    printed = refused(recipe / "train.sh", "self_kd", "--save-dir", "x")
    assert "--out DIR and --name NAME" in printed
    for name in ("prepare.sh", "train.sh", "evaluate.sh"):
        printed = script(recipe / name, "--help")
        assert name in printed
        assert "set -euo" not in printed


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_an_archive_that_is_cut_off_is_refused(recipe, raw, tmp_path):
    for file in (raw / recipe.name).iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2])
    out = tmp_path / "out"
    printed = refused(recipe / "prepare.sh", "--smoke", "--raw", tmp_path, "--out", out)
    assert "complete" in printed
    assert str(tmp_path) in printed
    assert not Path(f"{out}-smoke", "text").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_file_of_another_edition_or_none_is_refused(recipe, raw, tmp_path):
    roomy = disk_with(tmp_path / "tools", gib=100)  # whatever this machine has
    if recipe != IWSLT:  # whose source states neither size nor checksum
        printed = refused(
            recipe / "prepare.sh",
            *("--raw", raw / recipe.name, "--out", tmp_path / "out"),
            first_on_path=roomy,
        )
        assert "another edition" in printed
    printed = refused(
        recipe / "prepare.sh",
        *("--raw", tmp_path, "--out", tmp_path / "out"),
        first_on_path=roomy,
    )
    assert "has no file" in printed
    assert "https://" in printed


def test_a_source_that_is_gone_is_named(tmp_path):
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\necho 'curl: (22) 404' >&2\nexit 22\n")
    curl.chmod(0o755)
    printed = refused(WIKITEXT2 / "prepare.sh", "--out", tmp_path / "out", first_on_path=tmp_path)
    assert printed.startswith("wikitext-2-v1.zip could not be downloaded from https://")
    assert "pass --raw DIR" in printed


def test_a_download_is_checked_and_not_repeated(raw, tmp_path):
    """A stand-in for curl brings the files of the fixture, which are not the real ones."""
    curl = tmp_path / "curl"
    curl.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --output ]; do shift; done\n'
        f'cp {raw}/iwslt14_de_en/de-en.tgz "$2"\n'
        f"echo called >> {tmp_path}/calls\n"
    )
    curl.chmod(0o755)
    out = tmp_path / "out"
    for _ in range(2):
        script(
            IWSLT / "prepare.sh", "--smoke", "--out", out, "--workers", 1, first_on_path=tmp_path
        )
    assert (tmp_path / "calls").read_text() == "called\n"
    # Interrupted between the download and its acceptance.
    archive = Path(f"{out}-smoke", "raw", "de-en.tgz")
    archive.rename(f"{archive}.partial")
    script(IWSLT / "prepare.sh", "--smoke", "--out", out, first_on_path=tmp_path)
    assert (tmp_path / "calls").read_text() == "called\n"
    assert archive.exists()
    printed = refused(
        WIKITEXT2 / "prepare.sh", "--smoke", "--out", tmp_path / "two", first_on_path=tmp_path
    )
    assert "could not be downloaded" in printed
    assert not list((tmp_path / "two-smoke" / "raw").glob("*.zip*"))


def test_different_numbers_of_lines_are_refused(raw, tmp_path):
    for file in (raw / "multi30k").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with gzip.open(tmp_path / "train.de.gz", "at", encoding="utf-8") as file:
        file.write("Ein Satz zu viel.\n")
    out = tmp_path / "out"
    printed = refused(MULTI30K / "prepare.sh", "--smoke", "--raw", tmp_path, "--out", out)
    assert "has 150 lines and" in printed
    assert "has 151;" in printed
    assert not Path(f"{out}-smoke", "text").exists()


def test_a_text_that_is_no_utf8_is_named(raw, tmp_path):
    for file in (raw / "multi30k").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with gzip.open(tmp_path / "train.de.gz", "rb") as file:
        text = file.read()
    with gzip.open(tmp_path / "train.de.gz", "wb") as file:
        file.write("schön \n".encode("latin-1") + text.split(b"\n", 1)[1])
    out = tmp_path / "out"
    printed = refused(MULTI30K / "prepare.sh", "--smoke", "--raw", tmp_path, "--out", out)
    assert "is no UTF-8 text; of a latin-1 file  iconv -f latin1 -t utf-8  makes one" in printed
    assert not Path(f"{out}-smoke", "text").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "neighbors: words near the target"),
        (["--self-kd-candidates", "past"], "past: what the model gave when it last saw"),
        (["--self-kd-candidates=prediction"], "prediction: the word that the model predicts (near"),
        (
            ["--self-kd-candidates", "stored", "--self-kd-teacher", "t.skd"],
            "stored: what finished models give, from t.skd",
        ),
    ],
)
def test_the_soft_targets_are_named(tmp_path, options, said):
    data(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "fairseq-train").write_text("#!/bin/sh\n")
    (tools / "fairseq-train").chmod(0o755)
    printed = script(
        MULTI30K / "train.sh", "self_kd", "--out", tmp_path, *options, first_on_path=tools
    )
    assert f"  soft targets: {said}" in printed


def test_a_missing_tool_and_a_full_disk_are_named(raw, tmp_path):
    printed = refused(
        WIKITEXT103 / "prepare.sh",
        *("--raw", raw / "wikitext103", "--out", tmp_path / "out"),
        first_on_path=disk_with(tmp_path / "tools", gib=1),
    )
    assert "has 1 GiB free and this needs about 3" in printed
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname", "basename", "nproc", "mkdir", "gzip", "tar"):
        os.symlink(f"/usr/bin/{tool}", few / tool)
    for tool in ("python", "fairseq-train", "sacremoses"):
        os.symlink(Path(sys.executable).parent / tool, few / tool)
    printed = refused(
        MULTI30K / "prepare.sh",
        *("--smoke", "--raw", raw / "multi30k", "--out", tmp_path / "out"),
        PATH=str(few),
    )
    assert printed.startswith("there is no command 'subword-nmt'")
    assert "pip install" in printed


def test_a_run_with_other_settings_is_refused_and_a_finished_one_is_not_repeated(tmp_path):
    arguments_of(MULTI30K, tmp_path)
    arguments = [MULTI30K / "train.sh", "self_kd", "--out", tmp_path, "--name", "run"]
    (tmp_path / "arguments").unlink()
    assert "Trained already" in script(*arguments, first_on_path=tmp_path / "tools")
    assert not (tmp_path / "arguments").exists()
    printed = refused(*arguments, "--lr", 1, first_on_path=tmp_path / "tools")
    assert "was begun with other settings: > --lr > 1" in printed
    assert "--name NAME" in printed
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "run" / "settings").unlink()
    again = script(*arguments, "--lr", 1, first_on_path=tmp_path / "tools")
    assert "going on from" in again
    printed = refused(*arguments, "--precision=fp8")
    assert printed.startswith("--precision is fp8; allowed: auto, fp32, fp16")
    printed = refused(*arguments, f"--save-dir={tmp_path}")
    assert printed.startswith("--save-dir is set by the recipe")


def test_the_next_command_can_be_pasted(tmp_path):
    out = tmp_path / "my runs"
    arguments_of(WIKITEXT2, out, "--seed=2", "--lr=1")
    given = (out / "arguments").read_text().split("\0")
    assert given[given.index("--seed") + 1] == "2"
    assert given[-3:-1] == ["--lr", "1"]
    (out / "run" / "done").unlink()
    printed = script(
        *(WIKITEXT2 / "train.sh", "self_kd", "--out", out, "--name=run", "--seed=2", "--lr=1"),
        first_on_path=out / "tools",
    )
    shown = printed.split("Next:  ")[1].splitlines()[0]
    assert shlex.split(shown)[1:] == ["self_kd", "--out", str(out), "--name", "run", "--seed", "2"]


def test_a_training_that_was_stopped_is_not_taken_for_finished(tmp_path):
    tools = data(tmp_path) / "tools"
    tools.mkdir()
    line = "Stopping training due to cumulative_training_time: 9 > stop_time_hours: 1 hour(s)"
    (tools / "fairseq-train").write_text(
        f"#!/bin/sh\necho '{line}'\ntouch {tmp_path}/run/checkpoint_last.pt\n"
        f"touch {tmp_path}/run/checkpoint_best.pt\n"
    )
    (tools / "fairseq-train").chmod(0o755)
    arguments = ["self_kd", "--out", tmp_path, "--name", "run"]
    printed = script(IWSLT / "train.sh", *arguments, first_on_path=tools)
    assert "has ended before the end" in printed
    assert not (tmp_path / "run" / "done").exists()
    (tools / "fairseq-generate").write_text("#!/bin/sh\necho no translation\n")
    (tools / "fairseq-generate").chmod(0o755)
    printed = script(IWSLT / "evaluate.sh", *arguments, fails=True, first_on_path=tools)
    assert "Note: the training in" in printed
    assert "there are no translations in" in printed
