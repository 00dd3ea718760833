"""Every problem of a recipe at once, each where it stands and with the nearest key."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftune import plugin
from ftune.cli.console import problem_as_json, render
from ftune.errors import Problem, RecipeError
from ftune.recipe import Loaded, load
from ftune.recipe.problems import RENAMED
from ftune.recipe.reference import all_keys
from ftune.recipe.schema import SECTIONS, Recipe

SMALLEST = "model: {model_name_or_path: my-model}\ndata: {train: train.jsonl}\ntraining:\n  output_dir: runs/x\n"
Refused = Callable[..., list[Problem]]
Load = Callable[..., Loaded]


def test_smallest_recipe(loaded: Load) -> None:
    recipe = loaded().recipe
    assert (recipe.objective.method, recipe.tuning.method, recipe.optimizer.method) == ("sft", "full", "adamw_torch")


def test_recipe_survives_its_own_dictionary(loaded: Load) -> None:
    recipe = loaded("  optim: adamw_8bit\n  optim_args: {betas: [0.9, 0.99]}\ntuning: {method: lora, r: 8}\n").recipe
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_all_problems_at_once_in_the_order_of_the_file(refused: Refused) -> None:
    problems = refused(
        "data: {trian: x}\ntraining:\n  gradient_acumulation_steps: 8\n  seed: x\n  optim: sgd\n"
        "  optim_args: {betas: [1, 2]}\nmodle: {}\n"
    )
    places = [
        (problem.where.line, problem.where.column) for problem in problems if problem.where and problem.where.line
    ]
    assert places == sorted(places)
    said = "\n".join(f"{problem.what} {problem.label}" for problem in problems)
    for piece in (
        "`data.train` is missing",
        "did you mean `train`?",
        "did you mean `gradient_accumulation_steps`?",
        "`training.output_dir` is missing",
        "`training.seed` cannot be",
        "unknown key `betas` in `sgd`",
        "did you mean `model`?",
        "`model.model_name_or_path` is missing",
    ):
        assert piece in said


def test_a_problem_as_a_compiler_shows_it(write: Callable[[str], Path]) -> None:
    path = write(SMALLEST + "  gradient_acumulation_steps: 8\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert render(caught.value.problems[0], io.StringIO()) == (
        "error: unknown key `gradient_acumulation_steps` in `training`\n"
        f" --> {path}:5:3\n"
        "  |\n"
        "5 |   gradient_acumulation_steps: 8\n"
        "  |   ^^^^^^^^^^^^^^^^^^^^^^^^^^ did you mean `gradient_accumulation_steps`?\n"
        "  |\n"
        "  = fix: `ftune explain training` lists every key and its default"
    )


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_renamed_keys_say_their_new_name(name: str, refused: Refused) -> None:
    (problem,) = refused(SMALLEST + f"  {name}: 1\n")
    assert problem.label == RENAMED[name]
    (problem,) = refused(SMALLEST + f"{name}: 1\n")
    assert problem.label == RENAMED[name]


def test_an_adapters_rank_is_r(refused: Refused) -> None:
    (problem,) = refused(SMALLEST + "tuning: {method: lora, rank: 8}\n")
    assert problem.label == "this is `r`"


def test_renamed_keys_are_no_keys_of_ours() -> None:
    assert not set(RENAMED) & {key.name for key in all_keys()}


@pytest.mark.parametrize(
    ("more", "label"),
    [
        ("  dtype: auto\n", "`dtype` is a key of `model`; this is `training`"),
        ("  lora_alpha: 8\n", "`lora_alpha` is a key of `tuning` (of lora); this is `training`"),
        ("  betas: [0.9, 0.9]\n", "`betas` is a key of `training.optim_args` (of adamw_8bit); this is `training`"),
        ("learning_rate: 1\n", "`learning_rate` is a key of `training`"),
        ("tuning: {r: 8}\n", "`r` belongs to lora, lora_and_full, qalora, qlora, vera; full has no options"),
        ("tuning: {method: lora, rr: 8}\n", ""),
        ("tuning: {method: lora, lora_alhpa: 8}\n", "did you mean `lora_alpha`?"),
        ("tuning: {method: lroa}\n", "did you mean `lora`?"),
        ("  optim: adamw_troch\n", "did you mean `adamw_torch`?"),
        ("  lr_scheduler_type: cosin\n", "did you mean `cosine`?"),
        ("  lr_scheduler_kwargs: {num_cycles: 2}\n", "linear has no options"),
        ("  lr_scheduler_type: constant\n  lr_scheduler_kwargs: {min_lr: 0}\n", "constant has no options"),
        ("  lr_scheduler_type: cosine\n  lr_scheduler_kwargs: {num_cycels: 2}\n", "did you mean `num_cycles`?"),
        ("  optim: sgd\n  optim_args: {betas: [0.9, 0.9]}\n", "sgd has: momentum, nesterov"),
        ("  optim: sgd\n  optim_args: {momentun: 0.9}\n", "did you mean `momentum`?"),
        ("  bf16: no\n", "write `false`: in YAML 1.2 `no` is text"),
        ("  torch_compile: yes\n", "write `true`: in YAML 1.2 `yes` is text"),
        ("  run_name: 2024\n", 'write it in quotes to make it text: "2024"'),
        ("  learning_rate: -1\n", "must be 0 or more"),
        ("  learning_rate: .inf\n", "expected a finite number or auto"),
        ("  num_train_epochs: .nan\n", "expected a finite number"),
        ("  seed: 4294967296\n", "must be less than 4294967296"),
        ("  seed: true\n", "expected a whole number"),
        ("  max_steps: 1.5\n", "expected a whole number"),
        ("  optim_args: 3\n", "expected a mapping"),
        ("  optim_args: {betas: [0.9]}\n", "too few items"),
        ("  optim_args: {betas: [0.9, 0.9, 0.9]}\n", "too many items"),
        ("  optim_args: {betas: [0.9, true]}\n", "expected a number"),
        ("  optim_args: {betas: [0.9, 1.0]}\n", "must be less than 1"),
        ("  report_to: wanbd\n", "did you mean `wandb`?"),
        ("tuning: {method: 5}\n", "" ),
        ("tuning: 5\n", ""),
        ("tuning: {method: lora, init_lora_weights: yes}\n", ""),
        ("tuning: {method: lora, target_modules: []}\n", "at least one item"),
        ("  output_dir: x\n", "again here"),
    ],
)  # fmt: skip
def test_what_a_wrong_line_is_told(more: str, label: str, refused: Refused) -> None:
    problems = refused(SMALLEST + more)
    assert len(problems) == 1, [problem.what for problem in problems]
    assert label in f"{problems[0].label} {problems[0].why}"


def test_two_carets_on_line_and_column(refused: Refused) -> None:
    (problem,) = refused("model: {model_name_or_path: m}\ndata: {train: [a, 5]}\ntraining: {output_dir: x}\n")
    assert problem.where is not None
    assert (problem.where.line, problem.where.column, problem.where.length) == (2, 19, 1)
    assert problem.what == "`data.train.1` cannot be `5`"


@pytest.mark.parametrize("value", ["{a: 1}", "[]", '""', '"  "', "5", "true", '"a\\nb"', '"a\\0"', "[a, '']"])
def test_data_that_names_nothing(value: str, refused: Refused) -> None:
    problems = refused(f"model: {{model_name_or_path: m}}\ndata: {{train: {value}}}\ntraining: {{output_dir: x}}\n")
    assert len(problems) == 1
    assert "data.train" in problems[0].what


@pytest.mark.parametrize(("value", "wanted"), [('"2e-4"', 2e-4), ('" 3 "', 3.0), ("1", 1.0), ("auto", "auto")])
def test_a_quoted_number_is_a_number(value: str, wanted: float | str, loaded: Load) -> None:
    assert loaded(f"  learning_rate: {value}\n").recipe.training.learning_rate == wanted


def test_a_quoted_whole_number_keeps_every_digit(loaded: Load) -> None:
    assert loaded('  max_steps: "9007199254740993"\n').recipe.training.max_steps == 9007199254740993


def test_schedule_options_reach_hugging_face_as_numbers(loaded: Load) -> None:
    more = '  lr_scheduler_type: cosine_with_min_lr\n  lr_scheduler_kwargs: {min_lr: "1e-6"}\n'
    assert loaded(more).recipe.training.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize("key", sorted({(key.owner, key.name) for key in all_keys() if key.owner in SECTIONS}))
def test_null_is_refused_where_it_is_no_value(key: tuple[str, str], refused: Refused, write: Any) -> None:
    section, name = key
    data: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": "m"},
        "data": {"train": "t"},
        "training": {"output_dir": "o"},
    }
    data.setdefault(section, {})[name] = None
    default = {found.name: found.default for found in all_keys() if found.owner == section}[name]
    if default in ("null", "{}") or name == "save_total_limit":
        load(data)
        return
    with pytest.raises(RecipeError) as caught:
        load(data)
    (problem,) = caught.value.problems
    assert problem.what == f"`{section}.{name}` has no value"
    assert default == "required" or default in problem.fix


def test_empty_sections_and_headings_count_as_absent(loaded: Load) -> None:
    assert loaded("  optim_args:\n  lr_scheduler_kwargs:\ntuning:\nobjective:\n").recipe.tuning.method == "full"


def test_empty_file_says_what_a_recipe_needs(refused: Refused) -> None:
    for text in ("", "# nothing but a remark\n"):
        assert [problem.rule for problem in refused(text)] == ["missing-key"] * 3


def test_merge_keys_are_explained(refused: Refused) -> None:
    (problem,) = refused("base: &base {seed: 1}\n" + SMALLEST)[:1]
    assert "unknown section `base`" in problem.what
    assert "no merge keys" in refused(SMALLEST + "  <<: {seed: 1}\n")[0].label


# --set


def test_overrides(loaded: Load) -> None:
    recipe = loaded(
        "tuning: {method: lora}\n",
        [
            "training.learning_rate=2e-4",
            "data.train=[a.jsonl, b.jsonl]",
            "training.run_name=a=b",
            "tuning.target_modules=[q_proj, v_proj]",
            "training.optim_args.betas=[0.8, 0.9]",
            "training.seed=1",
            "training.seed=2",
            "data.chat_template=",
        ],
    ).recipe
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.training.run_name == "a=b"
    assert recipe.tuning.options.target_modules == ["q_proj", "v_proj"]
    assert recipe.optimizer.options.betas == (0.8, 0.9)
    assert recipe.training.seed == 2, "the last one counts"


@pytest.mark.parametrize(
    ("argument", "says", "column"),
    [
        ("nonsense", "is not section.key=value", 1),
        ("seed=3", "is not section.key=value", 1),
        ("training.=3", "is not section.key=value", 1),
        ("", "is not section.key=value", 1),
        ("training.sede=3", "unknown key `sede`", 1),
        ("training.seed=x", "`training.seed` cannot be", 15),
        ("data.train=[a", "cannot be read", 12),
        ("data.train=a: b: c", "cannot be read", 12),
        ("data.train=[a, 5]", "`data.train.1` cannot be", 12),
        ("data.train.0=x", "`data.train` is a value", 1),
        ("training.optim_args={nothing: 1}", "unknown key `nothing`", 21),
        ("tuning.method=lroa", "there is no tuning", 15),
        ("trainng.seed=1", "unknown section `trainng`", None),
    ],
)
def test_problems_of_set_point_at_the_argument(
    argument: str, says: str, column: int | None, write: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(SMALLEST), ["training.seed=1", argument])
    (problem,) = caught.value.problems
    assert says in problem.what
    if column is not None:
        assert problem.where is not None
        assert (str(problem.where), problem.where.column) == ("--set #2", column)
        assert " --> --set #2\n" in render(problem, io.StringIO())


@pytest.mark.parametrize(
    ("written", "name"),
    [("try #2", "try #2"), ("#1", "#1"), (" a#b ", "a#b"), ("'a #b'", "a #b"), ("\u00e9 # ", "\u00e9 #")],
)
def test_a_name_with_a_hash_is_taken_whole(written: str, name: str, loaded: Load) -> None:
    assert loaded("", [f"training.run_name={written}"]).recipe.training.run_name == name


def test_lines_are_no_harm_inside_brackets(loaded: Load) -> None:
    assert loaded("", ["data.train=[a,\n b]"]).recipe.data.train == ["a", "b"]


@pytest.mark.parametrize(
    "argument",
    [
        "training.seed=3 # three",
        "training.run_name='a' # b",
        "data.train=[a, b] # c",
        "data.train=[a, # c\n b]",
        "training.run_name=a\n# b",
        "training.run_name=a\nseed: 2",
        "training.run_name=a\n...",
        "training.run_name=&a #1",
    ],
)
def test_no_part_of_an_argument_is_left_out_in_silence(argument: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(SMALLEST), [argument])
    (problem,) = caught.value.problems
    assert str(problem.where) == "--set #1"


def test_problems_of_file_and_arguments_come_together(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(SMALLEST + "  sede: 3\n"), ["nonsense", "training.max_steps=x"])
    assert [problem.rule for problem in caught.value.problems] == ["unknown-key", "override", "bad-value"]


# a mapping instead of a file


def test_mapping_keeps_its_types() -> None:
    recipe = load(
        {
            "model": {"model_name_or_path": PurePosixPath("some") / "model", "revision": "2e4"},
            "data": {"train": ("a", "012")},
            "training": {
                "output_dir": "no",
                "run_name": "1e5",
                "learning_rate": 1e-5,
                "optim_args": {"betas": (0.9, 0.9)},
            },
        }
    ).recipe
    assert recipe.model.model_name_or_path == "some/model"
    assert recipe.model.revision == "2e4"
    assert recipe.data.train == ["a", "012"]
    assert (recipe.training.output_dir, recipe.training.run_name) == ("no", "1e5")
    assert recipe.training.learning_rate == 1e-5


@pytest.mark.parametrize("junk", [object(), {1, 2}, b"bytes", lambda: None, [[object()]]])
def test_mapping_that_cannot_be_written(junk: object) -> None:
    with pytest.raises(RecipeError):
        load({"model": {"model_name_or_path": junk}})


def test_mapping_that_holds_itself() -> None:
    data: dict[str, Any] = {"model": {}}
    data["model"]["model"] = data
    with pytest.raises(RecipeError):
        load(data)


# anything at all


_NAMES = sorted({key.name for key in all_keys()} | set(SECTIONS) | {"method", "a.b", "\u00e9\u4e2d", "x" * 300, ""})
_METHODS = sorted({name for kind in ("optimizers", "tuning", "objectives", "formats") for name in plugin.names(kind)})
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**20, max_value=10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*_METHODS, "auto", "no", "2e-4", "-1", "cosine", "1e999", math.inf])
)
_KEYS = st.sampled_from(_NAMES) | st.text(max_size=4)
_JUNK = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)
_RECIPES = st.dictionaries(
    st.sampled_from([*SECTIONS, "other"]),
    st.dictionaries(st.sampled_from(_NAMES), _JUNK, max_size=6) | _JUNK,
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_RECIPES)
def test_junk_is_a_recipe_or_refused(data: Mapping[str, Any]) -> None:
    check_that_it_is_a_recipe_or_refused(data)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted({(key.owner.split(" ")[0], key.name) for key in all_keys()})), _JUNK)
def test_junk_for_one_key_is_a_value_or_refused(key: tuple[str, str], value: Any) -> None:
    section, name = key
    data: dict[str, Any] = {
        "model": {"model_name_or_path": "m"},
        "data": {"train": "t"},
        "tuning": {"method": "lora"},
        "training": {"output_dir": "o"},
    }
    group, _, inner = section.partition(".")
    data.setdefault(group, {})[inner or name] = {name: value} if inner else value
    check_that_it_is_a_recipe_or_refused(data)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text(max_size=12) | st.builds("training.{}={}".format, st.sampled_from(_NAMES), st.text(max_size=6)))
)
def test_junk_arguments_are_read_or_refused(arguments: list[str]) -> None:
    check_that_it_is_a_recipe_or_refused({"model": {"model_name_or_path": "m"}}, arguments)


def check_that_it_is_a_recipe_or_refused(data: Mapping[str, Any], arguments: list[str] | None = None) -> None:
    try:
        loaded = load(data, arguments or [])
    except RecipeError as error:
        problems = error.problems
    else:
        assert Recipe.from_dict(loaded.recipe.as_dict()) == loaded.recipe
        return
    assert problems
    for problem in problems:
        assert render(problem, io.StringIO())
        assert problem_as_json(problem)["message"]
