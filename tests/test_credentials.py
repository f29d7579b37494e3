"""One filter for what must not be shown or stored: by names, by values, in everything nested; and nothing else is hidden."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from problems import make, record

import lightning_acc as la
from lightning_acc.core import rebuild
from lightning_acc.credentials import is_secret, without_credentials
from lightning_acc.show import tracking
from lightning_acc.show.tracking import connection
from lightning_acc.studies import fit

SECRET_NAMES = [
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "secret",
    "client_secret",
    "api_key",
    "apikey",
    "apiKey",
    "x-api-key",
    "X-Api-Key",
    "API_KEY",
    "OPENAI_API_KEY",
    "hf_token",
    "hfToken",
    "hftoken",
    "token",
    "access_token",
    "auth_token",
    "authToken",
    "bearer_token",
    "refresh_token",
    "sas_token",
    "id_token",
    "user_token",
    "aws_session_token",
    "aws_secret_access_key",
    "AWS_ACCESS_KEY_ID",
    "access_key",
    "secret_key",
    "private_key",
    "privateKey",
    "privatekey",
    "ssh_key",
    "signing_key",
    "encryption_key",
    "account_key",
    "authorization",
    "Authorization",
    "proxy-authorization",
    "connection_string",
    "connectionString",
    "conn_str",
    "bearer",
    "cookie",
    "Cookie",
    "cookies",
    "credentials",
    "credential",
    "dsn",
    "sentry_dsn",
    "webhook_url",
    "csrf",
    "csrf_token",
    "jwt",
    "db_password",
    "db_pass",
    "dbPassword",
    "smtp.password",
    "wandb_key",
    "wandb-api-key",
    "api_key_2",
    "apiKey2",
    "password1",
    "optimizer/api_key",
    "huggingface_hub_token",
    "GITHUB_TOKEN",
    "basic_auth",
    "license_key",
    "secrets",
    "api_tokens",
    "passcode",
    "master_key",
    "webhook",
]
ORDINARY: dict[str, Any] = {
    "n_tokens": 3,
    "max_tokens": 512,
    "max_new_tokens": "512",
    "tokenizer": "gpt2",
    "tokenizer_name": "bert-base-uncased",
    "token_dim": 64,
    "token_type": "word",
    "token_embedding": "learned",
    "key_dim": 32,
    "num_keys": 4,
    "author": "me",
    "authors": ["me", "you"],
    "keyframe": "first",
    "pad_token": "<pad>",
    "padToken": "[PAD]",
    "eos_token": "</s>",
    "mask_token": "MASK",
    "user_token": "<|user|>",
    "special_tokens": ["<a>", "<b>"],
    "token": {"kind": "word", "dim": 3},
    "tokens": ["a", "b"],
    "monkey": "yes",
    "turkey": "cold",
    "secretary_hidden": "64",
    "pass_through": "yes",
    "forward_pass": "fast",
    "keys": ["x", "y"],
    "key": "image",
    "sort_key": "length",
    "label_key": "y",
    "batch_key": "inputs",
    "primary_key": "id",
    "session_id": "3",
    "password": None,
    "secret": 5,
    "api_key": True,
    "token_threshold": 0.5,
    "activation": "gelu",
    "optimizer": {"class": "SGD", "lr": 0.1, "betas": (0.9, 0.99)},
    "path": "/home/me/data",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "task": "risk-sk-learn-based-classifier",
    "model": "hf_transformers",
    "formula": "y=x+1; lr=0.1",
    "words": "the bearer of news",
    "url": "https://host:80/run@v2",
    "dsnet": "resnet",
    "compass": "north",
    "bypass": "on",
    "": "empty",
}


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names_hide_their_text(name: str) -> None:
    assert is_secret(name)
    for value in ("hunter2", b"hunter2", ["hunter2", ("hunter2",)], {"a": "hunter2", "n": 3}):
        shown = without_credentials({"outer": [{name: value}]})
        if name == "token" and isinstance(value, dict):
            continue  # a group of hyper-parameters of that name
        assert "hunter2" not in repr(shown), value
        assert "***" in repr(shown)
    for value in (3, 0.5, True, None, ""):
        assert without_credentials({name: value}) == {name: value}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_hyper_parameters_are_kept(name: str) -> None:
    shown = without_credentials({name: ORDINARY[name]})
    assert json.loads(json.dumps(shown)) == json.loads(json.dumps({name: ORDINARY[name]}))


PEM = "-----BEGIN RSA PRIVATE KEY-----\nhunter2\nhunter2\n-----END RSA PRIVATE KEY-----"
SECRET_VALUES = [
    PEM,
    "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2",
    "hf_hunter2AbCdEfGhIjKlMnOpQrStUvWx",
    "sk-hunter2AbCdEfGhIjKlMnOp",
    "sk-proj-hunter2AbCdEfGhIjKlMnOp-hunter2",
    "sk-ant-api03-hunter2AbCdEfGhIjKlMn_hunter2-AA",
    "ghp_hunter2AbCdEfGhIjKlMnOpQrStUvWxYz",
    "gho_hunter2AbCdEfGhIjKlMnOpQrStUvWxYz",
    "github_pat_11AAAA_hunter2AbCdEfGhIjKl",
    "glpat-hunter2AbCdEfGhIjKl",
    "AKIAHUNTER2ABCDEFGHI",
    "ASIAHUNTER2ABCDEFGHI",
    "xoxb-123456-hunter2",
    "xoxp-123456-hunter2",
    "AIzahunter2AbCdEfGhIjKlMnOpQrStUvWxYz12",
    "eyJhunter2AbCd.eyJhunter2AbCd.hunter2",
    "Bearer hunter2",
    "Authorization: Basic hunter2",
    "Server=db;User Id=me;Password=hunter2;Encrypt=true",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=hunter2==;EndpointSuffix=core",
    "host=db user=me password = hunter2 dbname=x",
    "--model.api_key=hunter2",
    "--api-key='hunter2'",
    "{'api_key': 'hunter2', 'lr': 0.1}",
    '{"password":"hunter2"}',
    "ftp://me:hunter2@host/run",
    "ftp://me:se/hunter2@host/run",
    "ftp://me:/hunter2@host",
    "ftp://me:12/hunter2@host/run",
    "https://host/run?sig=hunter2",
    "https://hooks.slack.com/services/T0/B0/hunter2",
]


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_values_that_look_secret_are_hidden_under_any_name(value: str) -> None:
    for given in (value, [value], {"x": value}, {"x": {"y": (value, 1)}}, {value: 1}, {"x": value.encode()}, {value}):
        shown = without_credentials(given)
        assert "hunter2" not in repr(shown).lower()
        assert without_credentials(shown) == shown
    text = without_credentials(f"It failed with {value} and more")
    assert text.startswith("It failed with ")
    assert "hunter2" not in text.lower()


def test_long_hexadecimal_numbers_are_keys_under_the_name_of_a_key() -> None:
    number = "0123456789abcdef0123456789abcdef01234567"
    given = {"key": number, "wandb": number, "commit": number, "keys": [number, "x"]}
    assert without_credentials(given) == {"key": "***", "wandb": "***", "commit": number, "keys": ["***", "x"]}


def test_the_rest_of_a_text_stays() -> None:
    assert without_credentials("Server=db;Password=hunter2;Encrypt=true") == "Server=db;Password=***;Encrypt=true"
    assert without_credentials(f"a {PEM} b") == "a *** b"
    assert without_credentials("GET, Bearer abc.def, next") == "GET, Bearer ***, next"


WORDS = {"api_keys": ["hunter2"], "hub": {"hfToken": "hunter2"}, "pem": PEM, "max_tokens": 512, "pad_token": "<pad>"}


def test_the_manifest_holds_none(tmp_path: Path) -> None:
    module = make()
    module.hparams["optimizer"] = {"lr": 0.2}
    described = rebuild.describe(module)["hyper_parameters"]
    assert described["optimizer"] == {"lr": 0.2}

    class Reads(type(module)):  # type: ignore[misc]
        def __init__(self, **words: Any) -> None:
            super().__init__()

    reads = Reads()
    reads.__dict__.pop("_hparams", None)
    reads._set_hparams(WORDS)
    kept = rebuild.describe(reads)["hyper_parameters"]
    assert "hunter2" not in repr(kept)
    assert (kept["max_tokens"], kept["pad_token"]) == (512, "<pad>")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    run = record(tmp_path_factory.mktemp("run") / "run", make())
    la.score(run, "sgd-ie", ray_address=None, check=0)
    return run


@pytest.mark.parametrize("url", ["ftp://me:hun/ter2@host/run", "ftp://me:hun/ter2@host", "https://host/run?sig=hun/ter2"])
def test_wandb_is_told_none(run: la.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    opened = la.Run(run.store.url)
    words = {**opened.manifest["module"], "hyper_parameters": WORDS}
    opened.manifest = {**opened.manifest, "module": words, "logger": {"project": "p", "group": "x hunter2=1"}}
    opened.manifest["logger"] = {"project": "p", "group": "Bearer hunter2", "id": "ghp_hunter2AbCdEfGhIjKlMnOp"}
    monkeypatch.setattr(type(opened), "path", url)
    for argument in ([url], ["--api-key", "hunter2"], ["--model.api_key=hunter2"], ["--config", "hf_hunter2AbCdEfGhIjKlMnOp"]):
        monkeypatch.setattr(sys, "argv", ["lightning-acc", "track", *argument])
        assert connection._settings().x_disable_meta
    path = Path(tracking.track(opened, None, directory=str(tmp_path), over_time=0))
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"hunter2" not in content
    assert b"ter2" not in content
    assert b"max_tokens" in content


def test_a_command_without_secrets_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-acc", "track", "runs/a", "--max-tokens", "512"])
    assert not connection._settings().x_disable_meta


def test_the_logger_of_a_training_is_told_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for url in ("ftp://me:hun/ter2@host", "memory://me:hunter2@host/run?sig=hunter2"):
        logger = fit.wandb_logger(url, "p")
        try:
            logger.log_hyperparams(WORDS)
            group = logger.experiment.group
            config = dict(logger.experiment.config)
        finally:
            tracking.finish()
        assert "ter2" not in group
        assert "hunter2" not in repr(config)
        assert config["max_tokens"] == 512


def test_the_command_line_says_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lightning_acc.cli.main import main

    for words in (["audit", "memory://me:hunter2@host/none"], ["plan", f"{tmp_path}/password=hunter2"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "hunter2" not in "".join(capsys.readouterr())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part", ["sk-", "://", "://a:", "://a:80/", "://a@", "eyJa.", "-----BEGIN PRIVATE KEY-----", "a=", " ", "aB"]
)
def test_no_text_takes_forever(part: str) -> None:
    """Of a text from a run directory the time is not its square: 50 kB took a minute."""
    without_credentials({part * 15_000: part * 15_000})
