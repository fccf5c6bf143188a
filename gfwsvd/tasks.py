"""Tasks of the lm-evaluation-harness (lm_eval, an optional dependency), run by the harness itself."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .checks import check_causal
from .errors import GfwsvdError
from .logits import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, groups or tags, and the harness's TaskManager, which knows all of them."""

    names: tuple[str, ...]
    manager: Any


def find_tasks(names: Sequence[str], *, folder: Path | None = None) -> Tasks:
    """Looks tasks up, without their data.

    Args:
        names: of tasks, groups or tags.
        folder: where the YAML files of the tasks are, in place of the harness's own.

    Raises:
        GfwsvdError: without the harness, for a folder that does not exist, without names, or for an unknown one.
    """
    if not all(names) or not names:
        raise GfwsvdError(f"expected names of tasks such as arc_easy, got {', '.join(map(repr, names)) or 'none'}")
    if folder is not None and not folder.is_dir():
        raise GfwsvdError(f"there is no folder of tasks {folder}")
    manager = _harness().tasks.TaskManager(include_path=folder, include_defaults=folder is None)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
            near = f"; the closest are {', '.join(close)}" if close else ""
            where = "the harness" if folder is None else f"the YAML files of {folder}"
            raise GfwsvdError(f"there is no task {name!r} among the {len(known)} of {where}{near}")
    return Tasks(tuple(names), manager)


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """What the harness's `simple_evaluate` finds of `model`, as plain JSON values. It seeds random, numpy and torch.

    Args:
        model: a transformers causal language model, dense or compressed; its training flags are left as they were.
        num_fewshot: examples before each question; by default what each task says. A task that says 0 keeps it.
        limit: most questions of each task, its first ones; by default all.
        batch_size: requests in a forward pass.

    Returns:
        `harness` and its version, `limit`, and `tasks`: for each task and metric a row of `task`, `metric`, `filter`
        (of the answers, "none" for most), `value`, `stderr` (None where the harness has none), `num_fewshot` and
        `questions`.

    Raises:
        GfwsvdError: for a model that predicts no next tokens or has no tokenizer, a tokenizer without a token of the
            beginning or end, and when the harness fails, such as on data that it cannot load.
    """
    check_causal(model)
    if tokenizer is None:
        raise GfwsvdError("the model has no tokenizer, so no task can be read for it")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise GfwsvdError(
            "the tokenizer has neither a bos nor an eos token, expected one of them: the harness needs it"
        )
    harness = _harness()
    try:
        with evaluating(model):
            found = harness.simple_evaluate(
                model=harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                log_samples=False,
            )
    except Exception as error:  # of many kinds: tasks are data and code of others
        raise GfwsvdError(f"the harness failed on {', '.join(tasks.names)}: {type(error).__name__}: {error}") from error
    return {"harness": f"lm_eval {harness.__version__}", "limit": limit, "tasks": _rows(found)}


def task_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `run_tasks` as a table for people."""
    table = Table("task", "metric", "value", "± stderr", "few-shot", "questions")
    for row in rows:
        table.add_row(
            row["task"],
            row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}",
            *("" if number is None else f"{number:.4f}" for number in (row["value"], row["stderr"])),
            *("" if count is None else str(count) for count in (row["num_fewshot"], row["questions"])),
        )
    return table


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, entries in found["results"].items():
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": _number(value),
                    "stderr": _number(entries.get(f"{metric}_stderr,{kind}")),
                    "num_fewshot": found["n-shot"].get(task),
                    "questions": entries.get("sample_len"),
                }
            )
    return rows


def _number(value: Any) -> float | None:
    """None for what is no finite number, such as the harness's "N/A"."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _harness() -> Any:
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise GfwsvdError(
            f"tasks need the lm-evaluation-harness, which cannot be imported ({error}): pip install 'gfwsvd[eval]'"
        ) from error
    return lm_eval
