from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftune.errors import RecipeError
from ftune.models.generate import encode, fitted, generate_answers, settings
from ftune.models.load import load_model, load_tokenizer
from ftune.plugin import Conversation, PlainText, Turn
from ftune.recipe.schema import Model


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_model(Model(model_name_or_path=str(tiny_model), dtype="float32", attn_implementation="eager"))


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(Model(model_name_or_path=str(tiny_model)))


def by_hand(model: Any, tokenizer: Any, ids: list[int], count: int, ends: set[int]) -> str:
    """Greedy decoding as a plain loop, without a cache: the oracle."""
    made: list[int] = []
    while len(made) < count:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
        made.append(best)
        if best in ends:
            break
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_answers_are_the_greedy_ones(model: Any, tokenizer: Any) -> None:
    prompts = ["Hello", "What?", Conversation((Turn("system", "Be brief."), Turn("user", "Hi")))]
    texts = [
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ]
    expected = [by_hand(model, tokenizer, tokenizer(text)["input_ids"], 12, {1}) for text in texts]
    assert len(set(expected)) == 3
    assert generate_answers(model, tokenizer, prompts, 12) == expected


def test_no_template_means_plain_text(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert encode(tokenizer, "Hello").tolist() == [tokenizer("Hello")["input_ids"]]
    assert encode(tokenizer, "").shape == (1, 1)
    assert generate_answers(model, tokenizer, ["Hello"], 8) == [
        by_hand(model, tokenizer, tokenizer("Hello")["input_ids"], 8, {1})
    ]


def test_it_stops_at_the_models_own_end_token_too(model: Any, tokenizer: Any) -> None:
    ids = encode(tokenizer, "Hello")
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    second = int(made[0, ids.shape[1] + 1])
    model.generation_config.eos_token_id = [second]
    ends = {1, second}
    assert generate_answers(model, tokenizer, ["Hello"], 30) == [by_hand(model, tokenizer, ids[0].tolist(), 30, ends)]


def test_nothing_is_changed_by_asking(model: Any, tokenizer: Any) -> None:
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.train()
    model.model.layers[0].eval()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    checkpointing = [name for name, part in model.named_modules() if getattr(part, "gradient_checkpointing", False)]
    assert checkpointing
    random = torch.get_rng_state()
    first = generate_answers(model, tokenizer, ["Hello"], 8)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert model.config.use_cache is False
    after = [name for name, part in model.named_modules() if getattr(part, "gradient_checkpointing", False)]
    assert after == checkpointing
    assert generate_answers(model, tokenizer, ["Hello"], 8) == first
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft calls it by its old name
def test_an_adapter_answers_with_what_it_learnt(model: Any, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = generate_answers(model, tokenizer, ["Hello"], 8)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.train()
    assert generate_answers(adapted, tokenizer, ["Hello"], 8) == plain
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    assert generate_answers(adapted, tokenizer, ["Hello"], 8) != plain


def test_under_autocast(model: Any, tokenizer: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = generate_answers(model, tokenizer, ["Hello", "What?"], 4)
    assert len(answers) == 2


def test_plain_text_is_continued_without_the_template(model: Any, tokenizer: Any) -> None:
    assert encode(tokenizer, PlainText("Q: ")).tolist() == [tokenizer("Q: ")["input_ids"]]
    assert encode(tokenizer, "Q: ").tolist() != encode(tokenizer, PlainText("Q: ")).tolist()


def test_a_template_that_refuses_is_no_crash(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(RecipeError, match="System role not supported"):
        encode(tokenizer, Conversation((Turn("system", "Be kind."), Turn("user", "Hi"))))


@pytest.mark.parametrize(("length", "wanted", "kept", "new"), [(10, 8, 10, 8), (250, 40, 216, 40), (900, 500, 192, 64),
                                                              (10, 500, 10, 246)])  # fmt: skip
def test_no_more_than_the_positions(model: Any, length: int, wanted: int, kept: int, new: int) -> None:
    ids = torch.arange(length)[None]
    fitting, most = fitted(model, ids, wanted)
    assert fitting[0].tolist() == ids[0, -kept:].tolist()
    assert most == new


@pytest.mark.parametrize("temperature", [1e-45, 9e-5, 1e-4])
def test_hardly_any_temperature_takes_the_likeliest(model: Any, tokenizer: Any, temperature: float) -> None:
    ids = encode(tokenizer, "Hello")
    made = model.generate(ids, max_new_tokens=8, **settings(model, tokenizer, temperature))
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert text == by_hand(model, tokenizer, ids[0].tolist(), 8, {1})


def test_learned_positions_are_not_left(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    for prompt in ("x" * 100, "x"):
        assert len(generate_answers(small, tokenizer, [PlainText(prompt)], 64)) == 1
