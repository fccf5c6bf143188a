"""What a calibration takes of each device besides the statistics, and the groups that find room in what is left."""

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from gfwsvd import memory
from gfwsvd.budget import Collected, layer_groups
from gfwsvd.calibration import calibrate, input_leaders
from gfwsvd.errors import GfwsvdError
from gfwsvd.hooks import frozen, watch
from gfwsvd.layers import find_linears, weight_shape
from gfwsvd.losses import forward, next_token_loss
from gfwsvd.memory import bytes_in_use, recompute, rooms
from gfwsvd.sources import load_model
from tiny_models import CAUSAL_KINDS, random_tokens, tiny_model, tiny_workspace

BATCH = {"input_ids": random_tokens(8, 96)}


def collected(model) -> Collected:
    linears = find_linears(model)
    sizes = {name: weight_shape(module)[::-1] for name, module in linears.items()}
    return Collected(sizes, input_leaders(model, linears, BATCH, forward))


def in_use(model, batch=BATCH):
    with frozen(model):
        return bytes_in_use(model, find_linears(model), batch, next_token_loss("empirical", 0), backward=True)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_all_that_a_forward_pass_keeps_is_counted_once_and_none_of_it_is_kept(kind):
    model, storages = tiny_model(kind), {}
    weights = {value.data_ptr() for value in model.parameters()}

    def keep(value):
        if value.data_ptr() not in weights:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    taps = watch(find_linears(model), on_input=lambda *_: None, on_gradient=lambda *_: None)
    with frozen(model), taps, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = next_token_loss("empirical", 0)(model, BATCH)
    kept = sum(storage.nbytes() for storage in storages.values())
    largest = max(storage.nbytes() for storage in storages.values())
    del loss
    resident = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    counted = in_use(model).kept["cpu"] - resident - 3 * largest
    assert kept <= counted <= 1.1 * kept, "the inputs of blocks may come on top"


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_model_that_recomputes_is_counted_the_same_whether_or_not_it_does_so_already(kind):
    model = tiny_model(kind)
    found = in_use(model)
    assert found.recomputed is not None and found.recomputed < found.kept
    recompute(model)
    assert in_use(model).kept == found.recomputed and in_use(model).recomputed is None
    assert all(module.gradient_checkpointing for module in model.modules() if memory._recomputable(module))


def test_activations_are_recomputed_where_a_budget_is_short_with_the_same_statistics_to_the_bit():
    model = tiny_model("llama")
    about = collected(model)
    least = max(map(about.bytes, about.families()))
    found = in_use(model)
    assert found.recomputed is not None
    budget = found.recomputed["cpu"] + least
    assert budget < found.kept["cpu"] + least
    with pytest.warns(UserWarning, match="memory is short: activations are recomputed"):
        short = calibrate(model, [BATCH], heldout=0, host_memory=budget)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(module.training for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = calibrate(model, [BATCH], heldout=0, host_memory=found.kept["cpu"] + least)
    for name, stats in whole.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            assert torch.equal(getattr(short.layers[name], matrix), getattr(stats, matrix)), (name, matrix)
    with pytest.raises(GfwsvdError, match="give more memory"):
        calibrate(model, [BATCH], heldout=0, host_memory=budget - 1)


def test_weights_that_wait_on_the_host_count_there_and_those_on_disk_nowhere(tmp_path):
    spec = str(tiny_workspace(tmp_path, words=10) / "model")
    spread = load_model(spec, device="auto", max_memory={"cpu": 100_000})[0]
    resident = sum(value.nbytes for value in (*spread.parameters(), *spread.buffers()) if not value.is_meta)
    assert memory._resident(spread) == {"cpu": resident}
    waiting = torch.zeros(1000)
    store = SimpleNamespace(state_dict={"weight": waiting, "same": waiting}, index={"other": {}})
    for module in list(find_linears(spread).values())[:2]:  # both look into one store, as accelerate's modules do
        module._hf_hook.weights_map = SimpleNamespace(dataset=store)
    assert memory._resident(spread)["cpu"] == resident + waiting.nbytes


class TwoDevices:
    """A model of two GPUs, for those who ask where its layers are: the first half of them is on the first one."""

    def __init__(self) -> None:
        self.model = tiny_model("llama")
        self.about = collected(self.model)
        names = list(self.about.sizes)
        self.places = {name: f"cuda:{int(place >= len(names) / 2)}" for place, name in enumerate(names)}


def test_every_device_has_a_limit_of_its_own_and_the_host_that_of_all_sums():
    two = TwoDevices()
    on = {place: [name for name in two.places if two.places[name] == place] for place in ("cuda:0", "cuda:1")}
    taken = Counter({"cuda:0": 500_000, "cuda:1": 800_000, "cpu": 300_000})
    first, second, host = rooms(taken, two.places, device_memory=1 << 20, host_memory=1 << 30)
    assert (first.place, second.place, host.place) == ("cuda:0", "cuda:1", "cpu")
    assert (first.limit, second.limit, host.limit) == (1 << 20, 1 << 20, 1 << 30)
    assert (first.taken, second.taken, host.taken) == (500_000, 800_000, 300_000)
    assert (set(first.layers), set(second.layers)) == (set(on["cuda:0"]), set(on["cuda:1"]))
    assert set(host.layers) == set(two.places)


def test_weights_of_two_devices_that_exceed_the_limit_of_one_are_collected_within_both(monkeypatch):
    two = TwoDevices()
    least = max(map(two.about.bytes, two.about.families()))
    limit = 1_000_000 + 2 * least
    monkeypatch.setattr(memory, "layer_device", lambda module: two.places[names[module]])
    names = {module: name for name, module in find_linears(two.model).items()}
    taken = Counter({"cuda:0": 1_000_000, "cuda:1": 1_000_000, "cpu": 0})
    monkeypatch.setattr(memory, "bytes_in_use", lambda *_, **__: memory.InUse(taken, None))
    linears, loss = find_linears(two.model), next_token_loss("empirical", 0)
    limits = {"device_memory": limit, "host_memory": None, "backward": True}
    groups, _ = memory.divided(two.model, linears, two.about, BATCH, loss, **limits)
    devices = [{two.places[name] for name in group} for group in groups]
    assert devices[0] == {"cuda:0", "cuda:1"}, "both work for the same pass"
    for group in groups:
        for place in ("cuda:0", "cuda:1"):
            assert two.about.bytes(name for name in group if two.places[name] == place) <= limit - taken[place]
    alone = layer_groups(
        two.about, rooms(taken, dict.fromkeys(two.places, "cuda:0"), device_memory=limit, host_memory=None)
    )
    assert len(alone) > len(groups)


def test_the_lower_limit_counts_on_a_cpu():
    places, taken = dict.fromkeys(collected(tiny_model("llama")).sizes, "cpu"), Counter({"cpu": 5})
    for device, host, limit in ((100, 200, 100), (300, 200, 200), (None, 200, 200), (300, None, 300)):
        (room,) = rooms(taken, places, device_memory=device, host_memory=host)
        assert (room.limit, room.left) == (limit, limit - 5)
