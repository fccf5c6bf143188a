"""Tasks of the lm-evaluation-harness: its accuracies against log-likelihoods summed in float64, and what users ask."""

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from gfwsvd.cli import app
from gfwsvd.errors import GfwsvdError
from gfwsvd.sources import load_model
from gfwsvd.tasks import find_tasks, run_tasks
from tiny_models import VOCABULARY, tiny_model, word_tokenizer

QUESTIONS, CHOICES = 8, 4
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/questions.jsonl"}}
  cache_dir: "{folder}/cache"
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def harness():
    return pytest.importorskip(
        "lm_eval", reason="the lm-evaluation-harness is not installed: pip install '.[eval]' brings it"
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny model, a compressed one, and two tasks of the same questions."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w0"  # w2 would be found within w27
    tokenizer.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(f"w{n}" for n in torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    questions = [
        {"question": words(5), "choices": [words(1 + n % 2) for n in range(CHOICES)]} for _ in range(QUESTIONS)
    ]
    model = tiny_model("llama").double()
    for index, question in enumerate(questions):
        ranked = sorted(range(CHOICES), key=lambda n: log_likelihoods(model, question, [])[n])
        question["label"] = ranked[-1] if index % 3 else ranked[-2]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "yaml").mkdir()
    for name in ("made_up", "made_up_too"):
        (folder / "yaml" / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder))
    run("compress", folder / "model", "--method", "svd", "--keep", "0.5", "--out", folder / "small")
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def ask(workspace, *options, model="model"):
    tasks = ("--tasks", "made_up", "--task-folder", workspace / "yaml")
    return json.loads(run("eval", workspace / model, *tasks, *options, "--json").stdout.splitlines()[-1])


def log_likelihoods(model, question, shots):
    """Of each choice after the question, and after answered ones before it, in the dtype of `model`."""
    before = "".join(f"{shot['question']} {shot['choices'][shot['label']]}\n\n" for shot in shots)
    context = [int(word[1:]) for word in (before + question["question"]).split()]
    sums = []
    for choice in question["choices"]:
        answer = [int(word[1:]) for word in choice.split()]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
        sums.append(sum(logs[len(context) - 1 + n, token].item() for n, token in enumerate(answer)))
    return sums


def accuracy(folder, *, num_fewshot=0, limit=QUESTIONS):
    """The share of the first questions whose likeliest choice is the label, in float64."""
    model = load_model(str(folder))[0].double()
    questions = [json.loads(line) for line in (folder.parent / "questions.jsonl").read_text().splitlines()]
    right = 0
    for question in questions[:limit]:
        shots = [other for other in questions if other != question][:num_fewshot]
        sums = log_likelihoods(model, question, shots)
        right += max(range(CHOICES), key=sums.__getitem__) == question["label"]
    return right / limit


@pytest.mark.parametrize("model", ["model", "small"])
@pytest.mark.parametrize(("num_fewshot", "limit"), [(None, None), (2, None), (None, 5)])
def test_accuracy_is_that_of_summed_log_likelihoods(harness, workspace, model, num_fewshot, limit):
    options = () if num_fewshot is None else ("--num-fewshot", num_fewshot)
    options += () if limit is None else ("--limit", limit)
    found = ask(workspace, *options, "--batch-size", "3", model=model)
    (row,) = found["tasks"]
    count = limit or QUESTIONS
    expected = accuracy(workspace / model, num_fewshot=num_fewshot or 0, limit=count)
    assert row["value"] == expected
    assert row["stderr"] == pytest.approx(math.sqrt(expected * (1 - expected) / (count - 1)))
    assert (row["task"], row["metric"], row["filter"]) == ("made_up", "acc", "none")
    assert (row["num_fewshot"], row["questions"], found["limit"]) == (num_fewshot or 0, count, limit)
    assert found["harness"] == f"lm_eval {harness.__version__}"


def test_the_questions_tell_models_and_settings_apart(workspace):
    """Else equal accuracies would prove nothing."""
    dense = accuracy(workspace / "model")
    assert dense == 5 / 8
    assert dense != accuracy(workspace / "small") and dense != accuracy(workspace / "model", num_fewshot=2)


def test_text_and_tasks_are_evaluated_together_and_shown_as_a_table(harness, workspace, tmp_path):
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 " * 20)
    options = ("--text", tmp_path / "text.txt", "--window", "16")
    both = ask(workspace, *options)
    assert both["tokens"] == 5 * 15 and both["tasks"][0]["value"] == accuracy(workspace / "model")
    tasks = ("--tasks", "made_up, made_up_too", "--task-folder", workspace / "yaml")
    shown = run("eval", workspace / "model", *tasks, *options).stdout
    assert "made_up_too" in shown and shown.count("0.6250") == 2 and "perplexity" in shown and "lm_eval" in shown


def test_one_question_has_no_standard_error(harness, workspace):
    assert ask(workspace, "--limit", "1")["tasks"][0]["stderr"] is None


def test_the_model_is_left_as_it_was(harness, workspace):
    model, tokenizer, _ = load_model(str(workspace / "model"))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    run_tasks(model, tokenizer, find_tasks(["made_up"], folder=workspace / "yaml"), limit=2)
    assert [module.training for module in model.modules()] == modes


def test_an_unknown_task_is_refused_with_the_closest_before_the_model_is_loaded(harness, workspace):
    folder = ("--task-folder", workspace / "yaml")
    error = run("eval", "no-such-model", "--tasks", "made_up,made_upp", *folder, status=1).stderr
    assert "there is no task 'made_upp' among the 2 of the YAML files" in error
    assert "the closest are made_up, made_up_too" in error and error.count("\n") == 1


def test_the_tasks_of_the_harness_are_known_without_a_folder(harness):
    with pytest.raises(GfwsvdError, match="there is no task 'arc_eesy' among .* closest are arc_easy"):
        find_tasks(["arc_eesy"])


def test_a_task_whose_data_is_missing_is_one_line(harness, workspace, tmp_path):
    (tmp_path / "lost.yaml").write_text(YAML.format(name="lost", folder=tmp_path / "nowhere"))
    error = run("eval", workspace / "model", "--tasks", "lost", "--task-folder", tmp_path, status=1).stderr
    assert "gfwsvd: error: the harness failed on lost: " in error and "questions.jsonl" in error


def test_a_model_that_the_harness_cannot_ask_is_refused(harness, workspace):
    tasks = find_tasks(["made_up"], folder=workspace / "yaml")
    for kind, tokenizer, message in [
        ("bert", word_tokenizer(), "predicts no next tokens"),
        ("llama", None, "has no tokenizer"),
        ("llama", word_tokenizer(), "neither a bos nor an eos token"),
    ]:
        with pytest.raises(GfwsvdError, match=message):
            run_tasks(tiny_model(kind), tokenizer, tasks)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    error = run("eval", "no-such-model", "--tasks", "arc_easy", status=1).stderr
    assert "pip install 'gfwsvd[eval]'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --text TEXT, --tasks NAME, or both"),
        (("--tasks", "a", "--window", "8"), "--window would have no effect without --text"),
        (("--tasks", "a", "--stride", "8", "--reference", "b"), "--stride, --reference would have no effect"),
        (("--text", "a", "--num-fewshot", "2"), "--num-fewshot would have no effect without --tasks"),
        (("--text", "a", "--task-folder", "b"), "--task-folder would have no effect without --tasks"),
        (("--tasks", "a,,b"), "expected names of tasks such as arc_easy, got 'a', '', 'b'"),
        (("--tasks", "a", "--task-folder", "nowhere"), "there is no folder of tasks nowhere"),
    ],
)
def test_a_bad_request_is_one_line_before_any_work(options, message):
    error = run("eval", "no-such-model", *options, status=1).stderr
    assert message in error and error.count("\n") == 1
