"""The command line end to end on the digits, its page in a browser, and what W&B wrote read back."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.core import rebuild
from lightning_acc.record import manifest
from lightning_acc.record.store import Store

CONFIG = Path(__file__).parent.parent / "configs/digits.yaml"
SMALL = ["--data.init_args.n_train=60", "--trainer.max_epochs=4", "--data.init_args.batch_size=20"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, local_ray: Path) -> tuple[Path, str]:
    """The directory ``run`` worked in, and what it printed."""
    directory = tmp_path_factory.mktemp("cli")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(directory)
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(directory / "wandb-files"))
        main(["run", "--config", str(CONFIG), *SMALL])
    return directory, printed.getvalue()


def test_the_command_that_fails_says_why_and_ends_with_a_status(tmp_path: Path) -> None:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).parent / "lightning-acc"), "audit", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("lightning-acc: There is no run directory at .*nowhere.*\n", done.stderr)


def test_run_does_everything_in_order(ran: tuple[Path, str]) -> None:
    directory, printed = ran
    steps = [
        "recorded in",
        "audit passed",
        "Scores(loo",
        "Scores(acc-sgd-ie",
        "Scores(sgd-ie",
        "ScoreMatrix(sgd-ie: 60 removals x 60 examples",
        "against",  # of cleaning
        "kendall",
        "W&B (offline)",
        "report:",
    ]
    assert [word for word in steps if word in printed] == steps
    assert sorted(steps, key=printed.index) == steps
    run = la.Run(directory / "runs/digits")
    assert run.n_samples == 60
    assert {path.name for path in (directory / "runs/digits/scores").iterdir()} == {
        f"{method}.parquet" for method in ("loo", "acc-sgd-ie", "acc-low-rank", "sgd-ie", "sgd-ie.along", "tracin")
    }
    info = run.sample_info()
    assert info is not None
    assert sum(info["corrupted"].to_pylist()) == 12
    assert all(
        (label != true) == corrupted
        for label, true, corrupted in zip(*(info[c].to_pylist() for c in ("label", "true_label", "corrupted")), strict=True)
    )


@pytest.mark.parametrize(
    ("absent", "words", "message"),
    [
        ("wandb", ["--trainer.logger=false"], r'type pip install "lightning-acc\[wandb\]", or leave W&B out \('),
        ("ray", [], r'type pip install "lightning-acc\[ray\]", or compute in this process \(--influence.ray_address null\)'),
        ("", ["--influence.methods=[lo]"], "There is no method 'lo'"),
    ],
)
def test_run_refuses_before_the_training_what_it_could_not_do_after_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    absent: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SystemExit) as exit_status:
        main(["run", "--config", str(CONFIG), *SMALL, *words])
    assert exit_status.value.code == 1
    assert re.fullmatch(rf"lightning-acc: .*{message}.*\n", capsys.readouterr().err.splitlines(keepends=True)[-1])
    assert not (tmp_path / "runs").exists()


def test_every_verb_works_on_the_run(ran: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(ran[0] / "runs/digits")
    main(["audit", run])
    assert "bit for bit" in capsys.readouterr().out
    main(["score", run, "--method", "acc-sgd-ie", "--removals", "random:5", "--ray-address", "null", "--top", "3"])
    assert re.search(
        r"Scores\(acc-sgd-ie: 5 removals(.*\n)+most harmful first:\n( +\d+  [-+].*\n){3}$", capsys.readouterr().out
    )
    main(["retrain", run, "--removals", "top:4@sgd-ie", "--ray-address=null"])
    assert "Scores(loo: 4 removals" in capsys.readouterr().out
    (tmp_path / "groups.txt").write_text("1 2 3\n# nothing\n\n7,8\n")
    main(["score", run, "--method=sgd-ie", f"--removals={tmp_path / 'groups.txt'}", "--memory-gb=0.5"])
    assert "Scores(sgd-ie: 2 removals" in capsys.readouterr().out
    main(["retrain", run, "--removals=group:label", "--ray-address=null"])
    row = r"^ +\d+  [-+]\S+  (label \d \(\d+ samples\)|\d+ label \d)$"  # of a group of one, which it is
    assert len(re.findall(row, capsys.readouterr().out, re.MULTILINE)) == 10
    main(["score", run, "--method=acc-low-rank", "--confirm=top:2", "--ray-address=null", "--top=3"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +[12]  -\S+  \d+  \(by retraining; estimated [-+]\S+\)$", out, re.MULTILINE)) == 2
    assert re.search(r"^ +3  [-+]\S+  \d+", out, re.MULTILINE)
    main(["matrix", run, "--examples", "worst:3", "--at", "along", "--ray-address", "null", "--top", "2"])
    out = capsys.readouterr().out
    assert "ScoreMatrix(sgd-ie: 60 removals x 3 examples of query val at along" in out
    assert len(re.findall(r"^  (helped|harmed) most by  \d+ \([-+]\S+\), \d+ \([-+]\S+\)$", out, re.MULTILINE)) == 6
    main(["matrix", run, "--examples=4,2", "--removals=random:5", "--method=acc-sgd-ie", "--check=0", "--ray-address=null"])
    assert re.search(r"5 removals x 2 examples(.*\n)+example 4:(.*\n)+example 2:", capsys.readouterr().out)
    main(["retrain", run, "--removals=random-groups:24x10%", "--ray-address=null"])
    assert re.search(r"random group \d+ \(6 samples\)", capsys.readouterr().out)
    main(["retrain", run, "--removals=top-group:10%@sgd-ie", "--ray-address=null"])
    assert "the 10 % that help most by sgd-ie (6 samples)" in capsys.readouterr().out
    main(["evaluate", run])
    out = capsys.readouterr().out
    assert "verdict" in out
    assert all(column in out for column in ("lds", "qld"))
    main(["report", run])
    assert "index.html" in capsys.readouterr().out
    main(["track", run])
    assert "W&B (offline)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit", "nowhere"], "There is no run directory at .*nowhere"),
        (["score", "RUN", "--removals", "nofile"], "'nofile' names no removals and no file"),
        (["score", "RUN", "--removals", "random:100"], "random:100 asks for 100 samples, but this run has 60"),
        (["score", "RUN", "--removals", "top:3@magic"], r"needs the scores of magic.*it has acc-low-rank, acc-sgd-ie"),
        (["matrix", "RUN", "--examples", "bad"], "'bad' names no examples: use all, worst:N"),
        (["score", "RUN", "--removals", "random-groups:9x0%"], "asks for 0 of the 60 samples"),
        (["score", "RUN", "--confirm", "all"], "'all' does not say what to confirm: use top:N"),
        (["score", "RUN", "--query", "train"], "no query 'train': it has test, val"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_status(
    ran: tuple[Path, str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([str(ran[0] / "runs/digits") if word == "RUN" else word for word in words])
    assert exit_status.value.code == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"lightning-acc: .*{message}.*\n", error)


def test_a_killed_record_is_repaired(ran: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(ran[0] / "runs/digits", tmp_path / "run"))
    content = json.loads((run / "manifest.json").read_text())
    del content["n_steps"], content["stopped"]
    manifest.write(Store(run), {**content, "status": "recording"})
    with pytest.raises(SystemExit):
        main(["audit", str(run)])
    assert "lightning-acc repair" in capsys.readouterr().err
    main(["repair", str(run)])
    assert capsys.readouterr().out == f"{run} is a run of 12 steps now.\n"
    main(["audit", str(run)])
    assert "12 steps reproduce the recorded parameters bit for bit" in capsys.readouterr().out


def test_help_names_the_verbs_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for verb in ("run", "fit", "audit", "repair", "score", "retrain", "evaluate", "report", "track"):
        assert re.search(rf"^ +{verb}  ", out, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    out = capsys.readouterr().out
    assert "top:N@METHOD" in out
    assert "--ray-address" in out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["scor", "runs/x"], "There is no verb scor: did you mean score? See lightning-acc --help."),
        (["frobnicate"], "There is no verb frobnicate. See lightning-acc --help."),
        (
            ["score", "x", "--methd", "loo"],
            "There is no option --methd: did you mean --method? See lightning-acc score --help.",
        ),
        (
            ["score", "x", "--memory_bg=3"],
            "There is no option --memory-bg: did you mean --memory-gb? See lightning-acc score --help.",
        ),
        (
            ["clean", "x", "--fraction", "0.3"],
            "There is no option --fraction: did you mean --fractions? See lightning-acc clean --help.",
        ),
        (
            ["study", "--study.sedes=3"],
            "There is no option --study.sedes: did you mean --study.seeds? See lightning-acc study --help.",
        ),
        (["fit", "--confg=x"], "There is no option --confg: did you mean --config? See lightning-acc fit --help."),
        (["score", "x", "--top=many"], "--top: Expected a int. Got value: many. See lightning-acc score --help."),
        (["audit"], "the following arguments are required: run. See lightning-acc audit --help."),
        (["audit", "a", "b"], "unrecognized arguments: b. See lightning-acc audit --help."),
    ],
)
def test_words_that_are_not_understood_are_one_line(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(words)
    assert exit_status.value.code == 2
    assert capsys.readouterr().err == f"lightning-acc: {meant}\n"


def test_the_module_of_a_local_file_is_a_line_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is typed, in a process that knows nothing of the module but its file: the installed command."""
    from problems import make, record

    record(tmp_path / "a run", make(hidden=4))
    manifest.write(
        store := Store(tmp_path / "a run"),
        {**manifest.read(store), "module": {"class": "my_own_net:Net", "hyper_parameters": {"hidden": 4}}},
    )
    rebuild.LIVE.clear()  # as in a new process
    (tmp_path / "my_own_net.py").write_text("from problems import Net\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parent.parent}")
        with pytest.raises(SystemExit):
            main(["audit", "a run"])
        line = capsys.readouterr().err.partition(" If you trust it, type: ")[2].strip()
        assert line == "PYTHONPATH=.:$PYTHONPATH lightning-acc audit 'a run' --trust my_own_net"
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "audit passed: 12 steps reproduce the recorded parameters bit for bit\n"
        patch.chdir(tmp_path / "a run")  # where it is not
        patch.delenv("PYTHONPATH")
        with pytest.raises(SystemExit):
            main(["audit", "."])
        assert capsys.readouterr().err.endswith(
            "type: PYTHONPATH=FOLDER_OF_my_own_net lightning-acc audit . --trust my_own_net\n"
        )


def test_wandb_files_contain_tables_pictures_and_figures(ran: tuple[Path, str]) -> None:
    (training, influence) = sorted((ran[0] / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    facts = {}
    for name, path in (("training", training), ("influence", influence)):
        leet = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(path)]
        inspected = subprocess.run(leet, capture_output=True, text=True, check=False)
        assert inspected.returncode == 0, inspected.stderr
        facts[name] = inspected.stdout
    manifest = la.Run(ran[0] / "runs/digits").manifest
    assert training.name.endswith(manifest["logger"]["id"])
    assert manifest["logger"]["group"].startswith("digits-")
    assert manifest["logger"]["group"].encode() in b"".join(path.read_bytes() for path in influence.glob("*.wandb"))
    assert "acc-sgd-ie (exact)/kendall" in facts["influence"]
    tables = {str(path): json.loads(path.read_text()) for path in influence.rglob("*.table.json")}
    ranking = next(table for name, table in tables.items() if "acc-sgd-ie" in name and "sample" in table["columns"])
    row = dict(zip(ranking["columns"], ranking["data"][0], strict=True))
    assert row["rank"] == 1
    assert float(row["loo"]) == pytest.approx(row["score"], abs=1)
    assert row["label"] in {str(digit) for digit in range(10)}
    gallery = list((influence / "files/media/images/most harmful").glob("acc-sgd-ie*.png"))
    assert len(gallery) == 24
    # The pictures of a table are part of its artifact, which waits for a connection beside the run.
    staged = [path.read_bytes() for path in (ran[0] / "wandb-files/artifacts/staging").iterdir()]
    assert sum(content.startswith(b"\x89PNG") for content in staged) >= 24
    assert any(b'"image-file"' in content for content in staged)
    names = " ".join(tables)
    for expected in ("ranking", "agreement", "cost", "finding"):
        assert expected in names


def test_the_page_opens_in_a_browser(ran: tuple[Path, str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser on this machine")
    page = ran[0] / "runs/digits/report/index.html"
    assert "http://" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.read_text()
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    done = subprocess.run(
        [browser, *quiet, f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    assert dom.count("<figure><figcaption>") == 4  # the estimates against the truth
    assert dom.count("<circle") == 4 * 60
    extremes, _, predictions = dom.partition('id="predictions"')
    assert extremes.count('class="sample') == 48
    assert 2 <= predictions.count('class="sample') <= 10  # at most five that helped and five that harmed the first
    assert "data:image/png" in dom
    assert "was " in dom
    assert dom.count('class="bar"') == 6  # what each cost, sgd-ie along the run too, for cleaning


def test_the_page_survives_hostile_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from problems import make, record

    from lightning_acc.judge import samples
    from lightning_acc.show import report

    nasty = "</script><script>alert(1)</script><!-- &quot;"
    run = record(tmp_path / "run", make())
    la.score(run, "sgd-ie", ray_address=None, check=0)
    monkeypatch.setattr(samples.SampleViews, "__getitem__", lambda self, sample: samples.SampleView(sample, text=nasty))
    html = Path(report.write_report(run)).read_text()
    assert "alert(1)</script>" not in html
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert content is not None
    assert json.loads(content[1])["samples"]["0"]["text"] == nasty
