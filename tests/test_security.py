"""A run directory from someone else: nothing in it is executed, leads outside, or gives credentials away."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import pytorch_lightning as pl
import safetensors
import torch
from PIL import Image
from problems import N, Net, make, record

import lightning_acc as la
from lightning_acc.core import rebuild
from lightning_acc.judge import samples
from lightning_acc.record import manifest as manifests
from lightning_acc.record.store import Store, check_name, digest, without_credentials
from lightning_acc.scoring import scores
from lightning_acc.show.report.samples import thumbnail
from lightning_acc.show.tracking import panels

EVIL = """
import pathlib
pathlib.Path({sign!r}).touch()
import pytorch_lightning as pl
class Net(pl.LightningModule):
    pass
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    record(path, make(hidden=4))
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


@pytest.fixture
def sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that importing the package ``evil_package`` or one of its modules makes."""
    package = tmp_path / "path/evil_package"
    package.mkdir(parents=True)
    sign = tmp_path / "executed"
    (package / "__init__.py").write_text(EVIL.format(sign=str(sign)))
    (package / "nets.py").write_text(EVIL.format(sign=str(sign)))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delenv(rebuild.TRUST_VARIABLE, raising=False)
    monkeypatch.setattr(rebuild, "_trusted", set())
    for name in [name for name in sys.modules if name.startswith("evil_package")]:
        monkeypatch.delitem(sys.modules, name)
    return sign


def edit(path: Path, **changes: Any) -> Path:
    """Change the manifest and seal it again, as an attacker would; its run is not the one this process has recorded."""
    content = json.loads((path / "manifest.json").read_text())
    manifests.write(Store(path), {**content, "run_id": "from elsewhere", **changes})
    return path


def names_class(path: Path, name: str, **arguments: Any) -> Path:
    return edit(path, module={"class": name, "hyper_parameters": arguments})


class Planted:
    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return Path.touch, (self.sign,)


def test_planted_files_are_never_executed(path: Path, tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    planted = pickle.dumps(Planted(sign))
    for folder in (".", "steps", "parameters", "samples", "queries"):
        for name in ("data.pkl", "last.ckpt", "000009.pt", "module.bin"):
            (path / folder / name).write_bytes(planted)
        for name in ("__init__.py", "conftest.py", "sitecustomize.py", "torch.py", "problems.py"):
            (path / folder / name).write_text(EVIL.format(sign=str(sign)))
    (path / "scores").mkdir()
    (path / "scores/loo.pkl").write_bytes(planted)
    run = la.Run(path)
    assert run.audit().ok
    la.score(run, "sgd-ie", ray_address=None, check=0)
    assert run.query_names() == ["val"]
    assert not sign.exists()
    pickle.loads(planted)
    assert sign.exists()  # so it would have been seen


@pytest.mark.parametrize("name", ["steps/000000.safetensors", "queries/val.safetensors", "module.safetensors"])
def test_a_pickle_in_place_of_a_file_is_not_loaded(path: Path, tmp_path: Path, name: str) -> None:
    sign = tmp_path / "executed"
    planted = pickle.dumps(Planted(sign))
    (path / name).write_bytes(planted)
    (path / "queries/val.json").write_text(json.dumps({"sha256": digest((path / "queries/val.safetensors").read_bytes())}))
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {**files.get(name, {}), "bytes": len(planted), "sha256": digest(planted)}
    run = la.Run(edit(path, files=files))
    with pytest.raises((la.RunError, safetensors.SafetensorError, ValueError)):
        la.score(run, "sgd-ie", ray_address=None, check=0)
    assert not sign.exists()


@pytest.mark.parametrize("name", ["evil_package:Net", "evil_package.nets:Net"])
def test_a_package_that_nothing_here_has_imported_is_refused(path: Path, sign: Path, name: str) -> None:
    run = la.Run(names_class(path, name))
    with pytest.raises(la.RunError) as error:
        run.audit()
    assert str(error.value) == (
        f"The run's module {name} is in the package 'evil_package', which importing would execute and nothing here has "
        "imported: if you trust it, import it first, or open the run as Run(path, trust=['evil_package']), with "
        "--trust evil_package, or with LIGHTNING_ACC_TRUST=evil_package in the environment."
    )
    assert not sign.exists()
    assert "evil_package" not in sys.modules
    for trust in (False, ["other", "evil"], "evil_packag", ["evil_package.net"]):
        with pytest.raises(la.RunError, match="if you trust it"):
            la.Run(path, trust=trust).module()
    assert not sign.exists()


@pytest.mark.parametrize("trust", [True, "evil_package", ["other", "evil_package"], ["evil_package.nets"]])
def test_a_trusted_package_is_imported(path: Path, sign: Path, trust: Any) -> None:
    run = la.Run(names_class(path, "evil_package.nets:Net"), trust=trust)
    assert not sign.exists()
    assert type(run.module()).__name__ == "Net"
    assert sign.exists()


def test_the_environment_and_the_process_may_trust(path: Path, sign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = la.Run(names_class(path, "evil_package:Net"))
    monkeypatch.setenv(rebuild.TRUST_VARIABLE, "other, evil_package")
    assert rebuild.is_allowed("evil_package")
    monkeypatch.setenv(rebuild.TRUST_VARIABLE, ",")
    assert not rebuild.is_allowed("evil_package")
    rebuild.allow(["evil_package"])
    assert type(run.module()).__name__ == "Net"


WORKER = """
import pickle, sys
sys.path[:0] = {path!r}
run = pickle.loads({pickled!r})
assert "evil_package" not in sys.modules
print(run.trust)
print(type(run.module()).__name__)
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_what_the_driver_may_build_a_worker_may_build(path: Path, sign: Path, trusted: bool) -> None:
    run = la.Run(names_class(path, "evil_package.nets:Net"))
    if trusted:
        rebuild.allow("evil_package")  # known to this process alone
    script = WORKER.format(path=sys.path, pickled=pickle.dumps(run))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert sign.exists() == trusted
    if trusted:
        assert done.stdout == "('evil_package.nets',)\nNet\n"
    else:
        assert done.stdout == "()\n"
        assert "if you trust it" in done.stderr


def executes(package: Path, sign: Path) -> str:
    """A package whose parent, module and program each leave a sign when they are imported."""
    (package / "inner").mkdir(parents=True)
    for name in ("__init__", "inner/__init__", "inner/nets", "inner/__main__"):
        (package / f"{name}.py").write_text(EVIL.format(sign=str(sign)))
    return package.name


@pytest.mark.parametrize("trust", [False, ["evil_package.other", "evil_packag"]])
@pytest.mark.parametrize("place", ["evil_package.inner.nets", "evil_package.inner", "evil_package.inner.__main__"])
def test_that_its_parent_is_imported_opens_no_module(
    path: Path, tmp_path: Path, sign: Path, monkeypatch: pytest.MonkeyPatch, trust: Any, place: str
) -> None:
    """Whoever can write a manifest would else choose among all modules of torch, unittest and whatever is imported."""
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    executes(tmp_path / "other/evil_package", sign)
    monkeypatch.setitem(sys.modules, "evil_package", ModuleType("evil_package"))
    sys.modules["evil_package"].__path__ = [str(tmp_path / "other/evil_package")]
    before = set(sys.modules)
    run = la.Run(names_class(path, f"{place}:Net"), trust=trust)
    with pytest.raises(la.RunError, match=r"nothing here has imported|is a program") as error:
        run.module()
    assert not sign.exists()
    assert set(sys.modules) == before
    assert "\n" not in str(error.value)
    if "__main__" not in place:
        assert f"trust=['{place}']" in str(error.value)
        type_name = type(la.Run(path, trust=[place]).module()).__name__
        assert (type_name, sign.exists()) == ("Net", True)


@pytest.mark.parametrize("place", ["unittest.__main__", "evil_package.__main__", "evil_package.__main__.x"])
@pytest.mark.parametrize("trust", [False, True])
def test_programs_are_never_imported(path: Path, sign: Path, trust: bool, place: str) -> None:
    (sign.parent / "path/evil_package/__main__.py").write_text(EVIL.format(sign=str(sign)))
    with pytest.raises(la.RunError, match="is a program, which is never imported"):
        la.Run(names_class(path, f"{place}:Net"), trust=trust).module()
    assert not sign.exists()
    assert place not in sys.modules


def test_names_are_looked_up_without_executing_anything(path: Path, sign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lazy_package")

    def answers(name: str) -> Any:
        sign.touch()
        return Net

    class Touches:
        def __get__(self, *_: Any) -> Any:
            return answers("")

    module.__getattr__ = answers  # type: ignore[method-assign]
    module.Outer = type("Outer", (), {"Net": Touches()})  # type: ignore[attr-defined]
    module.Meta = type("Meta", (type,), {"Net": property(answers)})("Meta", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy_package", module)
    for name in ("Net", "Outer.Net", "Meta.Net"):
        with pytest.raises(la.RunError, match=r"cannot be imported here|is no LightningModule"):
            la.Run(names_class(path, f"lazy_package:{name}"), trust=True).module()
        assert not sign.exists(), name


class Ends(pl.LightningModule):
    def __init__(self, how: str) -> None:
        raise {"SystemExit": SystemExit, "GeneratorExit": GeneratorExit, "BaseException": BaseException}[how]("a\nb")


@pytest.mark.parametrize("how", ["SystemExit", "GeneratorExit", "BaseException"])
def test_whatever_building_raises_is_one_sentence(path: Path, sign: Path, how: str) -> None:
    with pytest.raises(la.RunError, match=r"cannot be rebuilt from its saved hyper-parameters \['how'\] \(a\)") as error:
        la.Run(names_class(path, f"{__name__}:Ends", how=how)).module()
    assert "\n" not in str(error.value)
    (sign.parent / "path/evil_package/nets.py").write_text(f"raise {how}('a\\nb')")
    with pytest.raises(la.RunError, match=r"cannot be imported here \(a\)") as error:
        la.Run(names_class(path, "evil_package.nets:Net"), trust=True).module()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("described", [{}, {"class": "problems:Net"}, {"class": "problems:Net", "hyper_parameters": 3}, 3])
def test_a_module_that_is_not_described_is_one_sentence(path: Path, described: Any) -> None:
    with pytest.raises(la.RunError, match=r"is no manifest of a run: it.* module"):
        la.Run(edit(path, module=described))


@pytest.mark.parametrize(
    "name",
    ["os:system", "subprocess:Popen", "builtins:eval", "torch:load", "problems:data", "torch.nn:Linear", "builtins:type"],
)
def test_only_modules_are_ever_called(path: Path, tmp_path: Path, name: str) -> None:
    command = f"touch {tmp_path / 'executed'}"
    run = la.Run(names_class(path, name, command=command, args=command), trust=True)
    with pytest.raises(la.RunError, match=rf"{name} as its module, which is no LightningModule and is not called"):
        run.module()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../evil:Net", ":Net", "evil package:Net", "problems:", "problems:Net.__init__.x", "a/b:C", 3, "a\nb:C"]
)
def test_strange_names_of_classes_are_one_sentence(path: Path, name: Any) -> None:
    with pytest.raises(la.RunError, match=r"cannot be imported here|module\.class is .* and not a text"):
        la.Run(names_class(path, name), trust=True).module()


OUTSIDE = [
    "../x",
    "steps/../../x",
    "/etc/passwd",
    "steps\\..\\x",
    "steps/x\0y",
    "steps//x",
    "./x",
    "",
    "s3://b/x",
    "a?versionId=1",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_is_refused(path: Path, name: str) -> None:
    (path.parent / "x").write_bytes(b"secret")
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"bytes": 6, "sha256": digest(b"secret"), "count": 1}
    with pytest.raises(la.RunError, match=r"manifest.json names the file .* lies outside of it, and is refused") as error:
        la.Run(edit(path, files=files))
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)


def test_a_manifest_without_what_it_must_tell_is_damaged(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    with pytest.raises(la.RunError, match=r"tells no size and hash of steps/000000.safetensors"):
        la.Run(edit(path, files={**files, "steps/000000.safetensors": 3}))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a\\b", "a\0b", ".."])
def test_no_name_leads_outside(path: Path, name: str) -> None:
    run = la.Run(path)
    before = set(path.parent.rglob("*"))
    table = la.score(run, "sgd-ie", [0], ray_address=None, save=False, check=0)
    with pytest.raises(la.RequestError, match="no name for a query"):
        run.add_query(name, [])
    with pytest.raises(la.RequestError, match="no query"):
        run.query(name)
    with pytest.raises(la.RunError, match="no name for a file of a run directory"):
        scores.write(run.store, f"{name}/x", table)
    with pytest.raises(la.RunError, match="no name for a file of a run directory"):
        scores.read(run.store, f"{name}/x")
    for do in (run.store.read, run.store.exists, run.store.size, run.store.names, run.store.remove, check_name):
        with pytest.raises(la.RunError, match="no name for a file"):
            do(name)
    assert set(path.parent.rglob("*")) == before


@pytest.mark.parametrize("column", ["../../x", "/etc/x", "a\\..\\b", "a\0b", ".."])
def test_columns_that_are_paths_are_refused(path: Path, column: str) -> None:
    content = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"and/or": [1] * N, column: [2] * N}), content)
    data = content.getvalue().to_pybytes()
    (path / "samples/info.parquet").write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["samples/info.parquet"] = {"bytes": len(data), "sha256": digest(data)}
    run = la.Run(edit(path, files=files))
    with pytest.raises(la.RunError, match=r"info.parquet has a column .*, which is a path"):
        run.sample_info()


SHOWN = {
    "s3://bucket/run": "s3://bucket/run",
    "ftp://me:secret@host/run": "ftp://host/run",
    "sftp://me:se/cr@et@host:22/run": "sftp://host:22/run",
    "https://token@host:80/run@v2?sig=secret&x=1": "https://host:80/run@v2",
    "simplecache::ftp://me:secret@host/run": "simplecache::ftp://host/run",
    "see 'https://host/a?sig=secret' and s3://host:9000/b@c": "see 'https://host/a' and s3://host:9000/b@c",
    "abfs://container@account/run": "abfs://container@account/run",
    "/home/me?x@y": "/home/me?x@y",
}


@pytest.mark.parametrize("given", SHOWN)
def test_urls_are_shown_without_credentials(given: str) -> None:
    assert without_credentials(given) == SHOWN[given]
    assert without_credentials(SHOWN[given]) == SHOWN[given]


def test_the_working_url_keeps_its_credentials_and_nothing_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://me:hunter2@host/run"
    run = record(url, make())  # type: ignore[arg-type]
    assert run.store.url == url
    again = pickle.loads(pickle.dumps(run))
    assert again.hash == run.hash
    table = la.score(run, "sgd-ie", ray_address=None, check=0)
    shown = [repr(run), run.path, run.name, str(run.store), run.store.locate("x"), la.write_report(run), str(table.conditions)]
    for do in (lambda: run.store.read("nowhere"), lambda: la.evaluate(run), lambda: la.Run(f"{url}2")):
        with pytest.raises(la.InfluenceError) as error:
            do()
        shown.append(str(error.value))
    files = run.store.filesystem
    content = b"".join(files.cat_file(name) for name in files.find(run.store.path))
    assert "hunter2" not in "".join(shown) + content.decode("latin-1")


def test_credentials_among_hyper_parameters_are_not_recorded(path: Path) -> None:
    words = {
        "url": "ftp://me:hunter2@host/x",
        "storage_options": {"key": "me", "secret": "hunter2"},
        "api_key": "hunter2",
        "nested": [{"auth_token": "hunter2", "token_count": 3, "hidden": 4}],
    }
    edit(path, data={"class": "x:Data", "hyper_parameters": words}, module={"class": "x:Y", "hyper_parameters": words})
    text = (path / "manifest.json").read_text()
    assert "hunter2" not in text
    assert la.Run(path).manifest["data"]["hyper_parameters"]["nested"] == [{"auth_token": "***", "token_count": 3, "hidden": 4}]

    class Reads(torch.nn.Module):
        def __init__(self, url: str, storage_options: Any) -> None:
            super().__init__()

    module = Reads("", {})
    module.hparams = words  # type: ignore[assignment]
    described = rebuild.describe(module)["hyper_parameters"]
    assert described == {"url": "ftp://host/x", "storage_options": "***"}


def test_web_addresses_keep_their_query_behind_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("https://host/run?sig=secret")
    assert store._path("steps/a") == "https://host/run/steps/a?sig=secret"
    assert store.locate("steps/a") == "https://host/run/steps/a"

    def answers(*_: Any, **__: Any) -> None:
        raise OSError(22, "no such thing: https://host/run/steps/a?sig=secret")

    monkeypatch.setattr(store._filesystem, "cat_file", answers)
    with pytest.raises(la.RunError, match="no such thing: https://host/run/steps/a") as error:
        store.read("steps/a")
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_links_within_a_run_do_not_lead_writing_astray(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (path / "scores").mkdir()
    os.symlink(outside, path / "scores/sgd-ie.parquet")
    Store(path).write("scores/sgd-ie.parquet", b"scores")
    assert outside.read_text() == "mine"


def test_the_command_line_trusts_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.cli.main import _trusting
    from lightning_acc.core import rebuild

    monkeypatch.setattr(rebuild, "_trusted", set())
    assert _trusting(["score", "RUN", "--trust", "mine,yours", "--method", "loo", "--trust=theirs"]) == [
        "score",
        "RUN",
        "--method",
        "loo",
    ]
    assert rebuild._trusted == {"mine", "yours", "theirs"}


def test_a_worker_is_given_the_module_itself(tmp_path: Path) -> None:
    """So that a class of a notebook, which no worker can import, goes along; and no worker spends seconds on its imports."""
    run = rebuild.portable(record(tmp_path / "run", make()))
    sent = pickle.loads(pickle.dumps(run))
    assert type(sent.given_module).__name__ == "Net"


def picture(kind: str, size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def bomb(side: int) -> bytes:
    """A small PNG of many pixels."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


NO_PICTURES = {
    "eps": picture("EPS"),  # which Pillow gives to Ghostscript
    "eps of a header alone": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%Page: 1 1\n",
    "tiff": picture("TIFF"),
    "bmp": picture("BMP"),
    "truncated": picture("PNG")[:1000],
    "many pixels": bomb(12000),
    "very many pixels": bomb(20000),
    "many bytes": picture("PNG") + bytes(samples.MOST_BYTES),
    "damaged text": picture("PNG")[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))) + picture("PNG")[33:],
    "nothing": b"",
    "text": "a.png",
    "mapping": {"bytes": picture("PNG"), "path": "/etc/passwd"},
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_no_picture_is_left_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    data: Any = NO_PICTURES[kind]
    assert samples.opened_picture(data) is None
    assert thumbnail(data) is None
    assert panels.image(data) is None


def test_what_hangs_behind_a_picture_is_not_embedded() -> None:
    assert len(thumbnail(picture("PNG") + bytes(2**20)) or "") < 2**14


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_pictures_are_shown(kind: str) -> None:
    for size in ((40, 40), (300, 100)):
        data = picture(kind, size)
        assert panels.image(data).format == "png"
        assert (thumbnail(data) or "").startswith(f"data:image/{kind.lower() if size == (40, 40) else 'jpeg'};base64,")
