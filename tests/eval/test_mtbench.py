"""``python -m eval.mtbench`` on folders of its own: no run, no launcher."""

import dataclasses
import json
import shutil

import pytest

from eval import mtbench
from eval.answers.chat import settled
from eval.config import HH_STOP, HH_TURN, MTBenchConfig
from eval.errors import DataError
from tests.eval.conftest import tokenizer
from tests.support.judge import good
from training.data.dialogue import CUE, HUMAN


def test_two_folders_a_judge_and_a_table(folders, tmp_path, serve, capsys):  # noqa: F811
    server = serve(rest=lambda body: good("[[B]]" if "[[A]]" in body["messages"][0]["content"] else "[[8]]"))
    code = mtbench.main(
        [
            f"before={folders['sft']}",
            f"after={folders['rlhf']}",
            "--output",
            str(tmp_path / "out"),
            "--max-new-tokens",
            "4",
            "--judge",
            "openai",
            "--judge-url",
            server.url,
            "--judge-model",
            "j",
            "--judge-pairwise",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and "template: '\\n\\nHuman: {question}" in out
    assert "| before | 8.00 [8.00, 8.00] |" in out and "| after | before |" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "question.jsonl",
        "model_answer",
        "model_judgment",
        "metrics.jsonl",
        "results.json",
        "table.md",
        "table.csv",
        "report.html",
    }
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["heldout"]["gold"] == {} and found["heldout"]["kl"] == {} and found["pairwise"]["after"]["ties"] == 48


def test_a_chat_template_is_used_where_there_is_one(folders, tmp_path):
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    words.save_pretrained(tmp_path)
    from eval.answers.dialogue import dialogue

    assert dialogue(["a", "b"], ["first"], "chat", words) == "<user>a<assistant>first<user>b<assistant>"
    with_template = settled(mtbench.settings([str(tmp_path)])[0])
    assert (with_template.template, with_template.stop) == ("chat", "")
    plain = settled(mtbench.settings([str(folders["sft"])])[0])
    assert (plain.template, plain.stop) == (HH_TURN, HH_STOP) == (HUMAN + " {question}" + CUE, HUMAN)
    with pytest.raises(DataError, match="b of the models have no chat template, the others have one"):
        settled(mtbench.settings([f"a={tmp_path}", f"b={folders['sft']}"])[0])
    thinking = mtbench.settings([str(tmp_path), "--chat-template-kwargs", '{"enable_thinking": false}'])[0]
    assert thinking.chat_template_kwargs == {"enable_thinking": False}
    assert mtbench.settings([str(tmp_path), "--template", r"Q: {question}\nA:"])[0].template == "Q: {question}\nA:"
    foreign = mtbench.settings([str(tmp_path), "--template", r"Süß 问: {question}\n答:", "--stop", r"\n问"])[0]
    assert (foreign.template, foreign.stop) == ("Süß 问: {question}\n答:", "\n问")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "b/a"], "two models are called a: a and b/a; name them: first=a second=b/a"),
        (["x/y=b"], "x/y=b: expected a folder"),
        (["a", "--judge", "gpt"], "judge = 'gpt': expected one of none, openai, local"),
        (["a", "--judge", "openai"], "set judge_url"),
        (["a", "--template", "no question"], 'expected "auto", "chat" or a text with {question}'),
        (["a", "--judge-max-cost", "5"], "set judge_price_in and judge_price_out"),
        (["a", "--batch-sise", "5"], "unrecognized arguments"),
        (
            ["a", "--judge-url", "http://x/v1", "--judge-pairwise"],
            "--judge-url, --judge-pairwise without a judge: add --judge openai",
        ),
        *(
            (["a", "--judge", "openai", "--judge-url", url], "not an address")
            for url in ("http://", "http://x:y/v1", "http://x y/v1", "http://[/")
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        mtbench.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_password_in_an_address_is_refused_and_not_printed(capsys):
    with pytest.raises(SystemExit):
        mtbench.main(["a", "--judge", "openai", "--judge-url", "https://me:geheim@host/v1"])
    said = capsys.readouterr().err
    assert "judge_url: the address holds a user name or password" in said and "geheim" not in said


def test_a_folder_that_is_no_model_is_named(tmp_path, folders, capsys):
    (tmp_path / "config.json").write_text('{"paths": 1}')
    assert mtbench.main([f"a={tmp_path}", "--output", str(tmp_path / "out")]) == 65
    assert "its config.json names no model_type" in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes((folders["sft"] / "config.json").read_bytes())
    assert mtbench.main([f"a={tmp_path}", "--output", str(tmp_path / "out")]) == 65
    assert "no tokenizer there" in capsys.readouterr().err


def test_every_option_is_explained_where_its_field_is():
    texts, fields = mtbench.described(), {field.name for field in dataclasses.fields(MTBenchConfig)} - {"paths"}
    assert fields <= texts.keys() and all(texts[name] for name in fields)
    page = mtbench.parser().format_help()
    assert all("--" + name.replace("_", "-") in page for name in fields) and "Exit codes" in page


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"5", "its config.json names no model_type"),
        ("config.json", b'{"model_type": "no-such"}', "can't load it: "),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "can't load it: SafetensorError"),
        ("tokenizer.json", b"{}", "can't load it: "),
    ],
)
def test_a_damaged_model_folder_is_named(tmp_path, folders, capsys, file, content, message):
    shutil.copytree(folders["sft"], tmp_path / "m")
    (tmp_path / "m" / file).write_bytes(content)
    assert mtbench.main([f"a={tmp_path / 'm'}", "--output", str(tmp_path / "out")]) == 65
    said = capsys.readouterr().err
    assert str(tmp_path / "m") in said and message in said


def test_a_chat_template_of_null_is_none(tmp_path, folders, capsys):
    shutil.copytree(folders["sft"], tmp_path / "m")
    place = tmp_path / "m/tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": None}))
    assert settled(mtbench.settings([str(tmp_path / "m")])[0]).template == HH_TURN
    assert mtbench.main([f"a={tmp_path / 'm'}", "--output", str(tmp_path / "out"), "--template", "chat"]) == 65
    assert "tokenizer has no chat template" in capsys.readouterr().err
