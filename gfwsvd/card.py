"""The model card of a checkpoint: `README.md` with the front matter that the hub reads, all from the report."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SETTINGS = ("method", "keep", "ranks", "rank_multiple", "storage", "bits", "damping")
_TEXT = ("text", "sequences", "seq_len", "tokens")
_STEPS = {"rounds": "round_losses", "gains": "gain_losses"}  # one loss more than there are steps
_VLLM = "vLLM reads it as it is where gfwsvd is installed beside it. "
_LOADING = """\
## Loading it

```python
import gfwsvd  # teaches transformers the format
from transformers import AutoTokenizer, {auto_class}

model = {auto_class}.from_pretrained("PATH OR NAME OF THIS MODEL")
```

{vllm}Programs that do not know the format read the dense model
that `gfwsvd convert THIS --merge --out DIR` makes of it: the same function at the size of the original.
"""


def model_card(report: Mapping[str, Any], *, auto_class: str, base_card: str) -> str:
    """The text of a model card.

    Args:
        report: plain JSON values of a `CompressionReport`.
        auto_class: the transformers class that loads the model.
        base_card: the card of the model that was compressed, which may name a licence; "" where there is none.
    """
    provenance = report["provenance"]
    base = str(provenance.get("model", ""))
    licence = licence_of(base_card)
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["gfwsvd", "low-rank", "compressed"]}
    header |= {"base_model": base} if _HUB_NAME.fullmatch(base) else {}
    header |= {"license": licence} if licence else {}
    front = [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML as well
    settings = {key: report[key] for key in _SETTINGS if report[key] is not None}
    settings |= {key: provenance[key] for key in _TEXT if key in provenance} | dict(provenance.get("settings", {}))
    settings |= {what: len(report[key]) - 1 for what, key in _STEPS.items() if report[key]}
    settings |= {"converted_from": provenance["converted_from"]} if "converted_from" in provenance else {}
    sizes_in_bytes = {"whole model": report["model_bytes"], "whole model before": report["model_dense_bytes"]}
    kinds = Counter(layer["kind"] for layer in report["layers"])
    sizes = {
        "share of the linear layers' weights kept": report["kept"],
        "numbers stored for these layers": report["stored"],
        "numbers in them before": report["dense"],
        "numbers of the whole model": report["model_stored"],
        "numbers of the whole model before": report["model_dense"],
        **{f"bytes of the {key}": value for key, value in sizes_in_bytes.items() if value is not None},
        **{f"{kind} layers": count for kind, count in kinds.items()},
        **{f"layers by {choice} metrics": count for choice, count in (report["metrics"] or {}).items()},
    }
    if report["predicts_loss"]:
        predicted = sum(layer["predicted_loss"] for layer in report["layers"])
        sizes["predicted increase of the loss, nats per token"] = predicted
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {_shown(base) if base else 'A language model'}, compressed",
        "Linear layers are products of thin matrices, chosen by "
        f"[gfwsvd](https://arxiv.org/abs/2505.17974), method {_shown(report['method'])}.",
        *([] if licence else ["The licence is that of the original model; no card that names it was at hand."]),
        _table("How it was made", "setting", settings),
        _table("What it holds", "count", sizes),
        "No quality was measured when this card was written; `gfwsvd eval` does it.",
        _LOADING.format(auto_class=auto_class, vllm="" if report["bits"] else _VLLM),
    ]
    return "\n\n".join(parts)


def licence_of(card: str) -> str | None:
    """The licence that the front matter of a model card names."""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _table(title: str, what: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_shown(value)} |" for key, value in rows.items()]
    return "\n".join([f"## {title}", "", f"| {what} | value |", "|---|---|", *lines])


def _shown(value: Any) -> str:
    """A value in one line that means nothing in Markdown."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
