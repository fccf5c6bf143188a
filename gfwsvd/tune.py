"""Recovery training: a short training of the factors of a compressed model, in place, by transformers' Trainer.

The factors are parameters already, so nothing is added to the model and nothing has to be folded back: ranks, sizes and
the checkpoint format stay what they were.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .batches import data_sha256
from .checks import check_causal
from .errors import GfwsvdError
from .evaluate import Evaluation, evaluate
from .folders import read_json
from .hooks import frozen
from .layers import LowRankLinear, model_device, model_sha256
from .logits import LogitsSource, ReferenceLogits, check_windows
from .losses import CHUNK_LOGITS
from .sources import quiet, token_batches, windows
from .track import Track, silent
from .work import Claim, open_work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELDOUT, _HELDOUT_WINDOWS = 0.05, 16  # of the text, its end; of that, at most
_SAVES = 0.1  # of all steps, between two checkpoints
_WARMUP = 0.1  # of all steps
_TORCH_SAVE = "inline_container"  # the source that torch.save's RuntimeError of a full disk names


@dataclass(frozen=True)
class Tuning:
    """What `tune` did.

    Attributes:
        settings: what the training was asked for, and the digests of the model, the reference and the tokens.
        steps: updates of the factors in all, those of an interrupted run included.
        before, after: evaluations of the model, in its own dtype, on the held-out windows.
        improved: whether the loss (KL with a reference, else the log of the perplexity) fell there; if not, the model
            has its old factors.
        seconds: wall time of this run.
    """

    settings: dict[str, Any]
    steps: int
    before: Evaluation
    after: Evaluation
    improved: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def tune(
    model: nn.Module,
    sequences: Tensor,
    heldout: Tensor,
    folder: Path | Claim,
    *,
    reference: nn.Module | None = None,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str | None = None,
    track: Track[int] = silent,
) -> Tuning:
    """Trains the factors and biases of the low-rank layers of `model`, in place; all other tensors stay as they are.

    AdamW without weight decay, gradients clipped at norm 1, the learning rate rising over the first tenth of the steps
    and falling to zero as a cosine; no dropout. Factors and moments are in float32 during training, whatever the model
    is stored in. Trainer's checkpoints go to `folder` ten times, and a call with the same arguments goes on from the
    last one: in float32 on a CPU it ends in the same bits. If the held-out loss did not fall, the model gets its old
    factors back, as it does after any error. Trainer seeds the global random generators.

    Args:
        model: a transformers causal language model with `LowRankLinear` layers, on the CPU or the first GPU.
        sequences: (N, S) token ids, int64 or int32, to train on.
        heldout: (M, S') token ids to evaluate on.
        folder: new, or of an interrupted run, or the caller's claim of it (`gfwsvd.work.claimed`). The caller deletes
            it when the result is safe.
        reference: the dense model; with it the loss is KL(reference || model), without it that of the next tokens.
        epochs: passes over the sequences.
        learning_rate: the highest.
        batch_size: sequences in a step.
        seed: of the order of the sequences.
        dtype: of the matrix products in training, "float32" or "bfloat16"; by default the latter on a GPU alone.
        track: wraps the steps and the evaluations to show progress.

    Raises:
        GfwsvdError: for a model without low-rank layers, what `evaluate` refuses, a setting out of range, a `folder`
            of a run with other arguments or of one that goes on at the moment, and a loss that is NaN or infinite.
    """
    began = time.perf_counter()
    check_windows(sequences, batch_size)
    check_training(epochs, learning_rate, dtype)
    for causal in (model, reference):
        if causal is not None:
            check_causal(causal)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise GfwsvdError(f"{type(model).__name__} has no low-rank layer to train: compress it first")
    if bits := next((layer.bits for layer in layers.values() if layer.bits), None):
        raise GfwsvdError(
            f"factors in {bits} bits cannot be trained: tune those in the model's dtype, then convert --bits {bits}"
        )
    device = model_device(model)
    dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    settings = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
        "sequences": list(sequences.shape),
        "model_sha256": model_sha256(model),
        "reference_sha256": None if reference is None else model_sha256(reference),
        "data_sha256": data_sha256([{"input_ids": sequences}, {"input_ids": heldout}]),
    }
    about = settings | {"torch": torch.__version__, "transformers": transformers.__version__}
    trained = [parameter for layer in layers.values() for parameter in layer.parameters()]
    originals = [parameter.detach().clone() for parameter in trained]
    improved = False
    try:
        with open_work(folder, about) as work:
            expected = None if reference is None else ReferenceLogits(reference, heldout, track=track)
            before = evaluate(model, heldout, reference=expected, track=track)
            with frozen(model), _in_float32(model), contextlib.ExitStack() as stack:
                if reference is not None:
                    stack.enter_context(frozen(reference))
                for parameter in trained:
                    parameter.requires_grad_()
                student = _Student(model, reference, layers, sequences, dtype == "bfloat16")
                steps = _train(student, settings, work.path, track)
            after = evaluate(model, heldout, reference=expected, track=track)
            improved = _loss(after) < _loss(before)
    finally:
        if not improved:
            for parameter, original in zip(trained, originals, strict=True):
                parameter.data = original
    return Tuning(settings, steps, before, after, improved, time.perf_counter() - began)


def check_training(epochs: int, learning_rate: float, dtype: str | None) -> None:
    """GfwsvdError for a setting that `tune` does not take."""
    if epochs < 1:
        raise GfwsvdError(f"epochs must be at least 1, got {epochs}")
    if not 0 < learning_rate < math.inf:
        raise GfwsvdError(f"learning_rate must be positive, got {learning_rate}")
    if dtype not in (None, "float32", "bfloat16"):
        raise GfwsvdError(f"dtype must be one of float32, bfloat16 in training, got {dtype!r}")


def training_tokens(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    sequences: int,
    seq_len: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequences for `tune`, drawn from a text but its last 5 %, and at most 16 held-out windows from these.

    Args:
        text, tokenizer, sequences, seq_len, seed: see `token_batches`.

    Returns:
        (sequences, seq_len) and (M, seq_len) int64, M from 1 to 16.

    Raises:
        GfwsvdError: what `token_batches` raises; and when the last 5 % are less than one window.
    """
    cut = round(len(text) * (1 - _HELDOUT))
    cut = text.rfind("\n", 0, cut) + 1 or cut  # at the end of a line where there is one
    batches = token_batches(text[:cut], tokenizer, sequences=sequences, seq_len=seq_len, seed=seed)
    try:
        heldout = windows(text[cut:], tokenizer, window=seq_len, limit=_HELDOUT_WINDOWS)
    except GfwsvdError as error:
        raise GfwsvdError(f"the end of the text is held out from training, and there {error}") from error
    return torch.cat([batch["input_ids"] for batch in batches]), heldout


class _Student(nn.Module):
    """What Trainer trains, and saves: the low-rank layers alone. They stay in the model, which makes the loss."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | None,
        layers: dict[str, LowRankLinear],
        sequences: Tensor,
        autocast: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self.sequences, self.autocast = sequences, autocast
        with torch.no_grad():
            self.source = LogitsSource(model, sequences)
            self.other = None if reference is None else LogitsSource(reference, sequences)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The mean loss over the predicted tokens of `input_ids` (B, S)."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            states = self.source.states_of(input_ids).flatten(0, 1)
            with torch.no_grad():
                expected = None if self.other is None else self.other.states_of(input_ids).flatten(0, 1)
            loss, gradient = self._loss(states, expected, input_ids[:, 1:].flatten().long())
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise GfwsvdError(
                "the loss of the training or its gradient is NaN or infinite; remove the work folder and start again "
                "with a lower learning rate"
            )
        # Has the value of the loss, and the gradient that was computed along with it.
        surrogate = (states * gradient).sum()
        return {"loss": loss + surrogate - surrogate.detach()}

    def _loss(self, states: Tensor, expected: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of states (T, D), and its gradient (T, D): only a chunk's logits exist at a time."""
        rows = max(1, CHUNK_LOGITS // self.source.vocabulary)
        total = torch.zeros((), device=states.device)
        gradients: list[Tensor] = []
        for first in range(0, len(targets), rows):
            part = slice(first, first + rows)
            leaf = states[part].detach().requires_grad_()
            logs = self.source.logits(leaf).log_softmax(-1, dtype=torch.float32)
            if self.other is None or expected is None:
                loss = F.nll_loss(logs, targets[part], reduction="sum") / len(targets)
            else:
                with torch.no_grad():
                    aim = self.other.logits(expected[part]).to(logs.device).log_softmax(-1, dtype=torch.float32)
                loss = F.kl_div(logs, aim, reduction="sum", log_target=True) / len(targets)
            gradients += torch.autograd.grad(loss, leaf)
            total += loss.detach()
        return total, torch.cat(gradients)


class _Progress(TrainerCallback):
    """Shows the steps through a `Track`."""

    def __init__(self, track: Track[int]) -> None:
        self.track = track
        self.ticks = self._steps(0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ticks = self._steps(state.global_step, state.max_steps)
        next(self.ticks, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        next(self.ticks, None)

    def _steps(self, start: int, stop: int) -> Generator[int]:
        yield from self.track(range(start, stop), f"training: {stop - start} steps")


def _train(student: _Student, settings: dict[str, Any], folder: Path, track: Track[int]) -> int:
    """Trains the layers of `student` from the last checkpoint in the folder on; the number of steps in all."""
    device = model_device(student)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=_WARMUP,
        seed=settings["seed"],
        save_steps=_SAVES,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
    )
    if device != arguments.device:
        raise GfwsvdError(
            f"the model is on {device}, and training would run on {arguments.device}: choose the GPU by "
            "CUDA_VISIBLE_DEVICES, and the device as cuda"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer copies the layers to every GPU, out of their model
    progress = _Progress(track)
    rows = [{"input_ids": row} for row in student.sequences]
    trainer = Trainer(student, arguments, train_dataset=rows, callbacks=[progress])
    trainer.remove_callback(PrinterCallback)
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_SAVE not in str(error):
            raise
        raise GfwsvdError(f"could not keep the training in {folder}: {error}; its last checkpoint is there") from error
    finally:
        progress.ticks.close()
    return int(trainer.state.global_step)


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of Trainer in a folder, if there is one; later ones, cut short, are removed."""
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*")}
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(GfwsvdError):
            read_json(steps[step] / "trainer_state.json")  # which Trainer writes last
            return str(steps[step])
        shutil.rmtree(steps[step])
    return None


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, half-precision parameters and buffers of `model` are float32."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    halves = [(tensor, tensor.dtype) for tensor in tensors if tensor.element_size() < 4]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        model.zero_grad()  # a gradient keeps its tensor's dtype
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def _loss(evaluation: Evaluation) -> float:
    return evaluation.perplexity if evaluation.kl is None else evaluation.kl
