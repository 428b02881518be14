"""No address with a login, a key or a token gets into a run's folder, and no message quotes one."""

import pytest
from click.testing import CliRunner

from eval import addresses
from launcher import cli
from launcher.config.addresses import refuse_secrets
from launcher.config.profile import Profile
from training.errors import ConfigError

SECRETS = [
    "http://me:geheim@host:5000",
    "http://geheim@host",
    "HTTPS://me:ge/heim@host/v1",
    "https://host/v1?api_key=geheim",
    "https://host/v1?a=1&Token=geheim",
    "https://host/v1#access_token=geheim",
    "https://host/?%6bey=geheim",
    "postgresql://me:geheim@db/mlflow",
    "https://host/x?X-Amz-Signature=geheim",
    "https://host/x?sig=geheim;b=2",
    "http://me:ge\"he'im@host",
    "http://me:geheim host@x/",
]
CLEAN = [
    "",
    "http://host:5000/v1",
    "https://host/v1?api-version=2024-02-01",
    "http://[::1]:8000/v1",
    "file:///home/me@site/mlruns",
    "/home/me@site/mlruns",
    "http://host:80/a@b",
    "sqlite:///mlflow.db",
    "https://host/?max_tokens=5",
    "databricks",
]


@pytest.mark.parametrize("address", SECRETS)
def test_a_secret_in_an_address_is_refused_and_not_quoted(address, tmp_path):
    for key in ("mtbench.judge_url", "sft.mlflow"):
        section, name = key.split(".")
        with pytest.raises(ConfigError, match=f"{key}: the address holds .*; take it out and put it|the key") as error:
            refuse_secrets({section: {name: address}})
        assert "heim" not in str(error.value)
    answer = CliRunner().invoke(
        cli.main,
        [
            "plan",
            "full-pipeline",
            "--runs",
            str(tmp_path),
            "--name",
            "x",
            "--profile",
            "local",
            "--set",
            f"sft.mlflow={address}",
            "--set",
            "sft.nonsense=1",
        ],
    )
    assert answer.exit_code == 2 and "sft.mlflow: the address holds" in answer.output and "heim" not in answer.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", CLEAN)
def test_other_addresses_and_paths_are_not(address):
    refuse_secrets({"mtbench": {"judge_url": address}, "sft": {"mlflow": address}})


def test_profiles_and_lists_are_looked_through():
    for values in (
        {"environment": {"https_proxy": SECRETS[0]}},
        {"setup": ["module load x", f"export http_proxy={SECRETS[0]}"]},
        {"options": {"comment": f"see {SECRETS[3]}"}},
    ):
        with pytest.raises(
            ValueError, match="profile.(environment.https_proxy|setup|options.comment): the address holds"
        ) as error:
            Profile(name="x", scheduler="local", **values)
        assert "geheim" not in str(error.value) and "the file that the profile's secrets name" in str(error.value)
    refuse_secrets({"a": [1, None, {"b": True}], "mtbench": {"template": "mail me@host: {question}"}})


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("localhost", True),
        ("localhost.", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.1", True),
        ("0x7f.1", True),
        ("2130706433", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("10.0.0.1", False),
        ("127.0.0.1.nip.io", False),
        ("host", False),
        ("", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_this_machine_by_all_its_names(host, loopback):
    assert addresses.is_loopback(host) is loopback
