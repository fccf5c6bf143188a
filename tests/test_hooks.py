"""Hooks: what they show is autograd's own, and nothing of them stays."""

import weakref

import pytest
import torch
from torch import nn

from gfwsvd import hooks
from gfwsvd.hooks import frozen, watch
from gfwsvd.layers import find_linears
from tiny_models import CAUSAL_KINDS, random_tokens, tiny_model


def _loss(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def _nothing(*_):
    pass


def _no_hooks(model):
    return not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
def test_hooks_are_removed_however_the_block_ends(failure):
    model = tiny_model("llama")
    try:
        with watch(find_linears(model), on_input=_nothing, on_gradient=_nothing):
            assert not _no_hooks(model)
            if failure:
                raise failure
    except (ValueError, KeyboardInterrupt):
        pass
    assert _no_hooks(model)


@pytest.mark.parametrize("where", ["on_input", "on_gradient"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_what_a_callback_raises_ends_the_pass_and_the_hooks(where, failure):
    def fail(*_):
        raise failure("from the callback")

    model, callbacks = tiny_model("llama"), {"on_input": _nothing, "on_gradient": _nothing}
    with (
        pytest.raises(failure, match="from the callback"),
        frozen(model),
        watch(find_linears(model), **callbacks | {where: fail}),
    ):
        _loss(model, random_tokens(2, 5)).backward()
    assert _no_hooks(model)
    _loss(model, random_tokens(2, 5)).backward()


def test_hooks_are_removed_where_a_layer_cannot_take_one():
    model = tiny_model("llama")
    with pytest.raises(AttributeError), watch({**find_linears(model), "wrong": 3}, on_input=_nothing):
        pass
    assert _no_hooks(model)


def _shown(model, ids, *, freeze=True):
    """x and g of every layer, as the hooks show them."""
    inputs, gradients = {}, {}

    def on_gradient(name, x, g):
        assert name not in gradients, "a gradient is shown once"
        assert not x.requires_grad and not g.requires_grad
        inputs[name], gradients[name] = x.clone(), g.clone()

    with watch(find_linears(model), on_input=_nothing, on_gradient=on_gradient):
        if freeze:
            with frozen(model):
                _loss(model, ids).backward()
        else:
            _loss(model, ids).backward()
    return inputs, gradients


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_inputs_and_gradients_are_those_of_autograd(kind):
    model, ids = tiny_model(kind), random_tokens(2, 7)
    inputs, gradients = _shown(model, ids)
    seen, handles = {}, []
    for name, module in find_linears(model).items():

        def keep(module, arguments, output, name=name):
            output.retain_grad()
            seen[name] = arguments[0], output

        handles.append(module.register_forward_hook(keep))
    _loss(model, ids).backward()
    for handle in handles:
        handle.remove()
    assert set(seen) == set(inputs)
    for name, (x, output) in seen.items():
        torch.testing.assert_close(inputs[name], x.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[name], output.grad, rtol=1e-4, atol=1e-6)


def test_watching_changes_neither_outputs_nor_parameter_gradients():
    model, ids = tiny_model("gpt2"), random_tokens(2, 7)
    _loss(model, ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=ids).logits
    with watch(find_linears(model), on_input=_nothing, on_gradient=_nothing):
        assert torch.equal(model(input_ids=ids).logits, logits)
        _loss(model, ids).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_without_gradients_only_inputs_are_shown():
    model, names = tiny_model("llama"), []
    with torch.no_grad(), watch(find_linears(model), on_input=lambda name, x: names.append(name), on_gradient=_nothing):
        output = model(input_ids=random_tokens(1, 5)).logits
    assert names == list(find_linears(model)) and not output.requires_grad


class InPlace(nn.Module):
    """Changes the outputs of its linear layers in place, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x)
        hidden *= 2
        return self.second(torch.relu_(hidden)).mul_(0.5)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_network_may_change_the_outputs_of_its_layers_in_place(freeze):
    model, x = InPlace(), torch.randn(5, 4)
    first, second = model.first(x).detach().requires_grad_(), None
    second = model.second(torch.relu(2 * first))
    expected = torch.autograd.grad((0.5 * second).square().sum(), first)[0]
    gradients = {}
    model.requires_grad_(not freeze)
    with watch(find_linears(model), on_input=_nothing, on_gradient=lambda name, x, g: gradients.update({name: g})):
        model(x).square().sum().backward()
    torch.testing.assert_close(gradients["first"], expected)


def test_gradients_are_freed_once_their_layer_is_done(monkeypatch):
    model, ids = tiny_model("llama"), random_tokens(2, 7)
    originals, shown, names = [], [], []
    backward = hooks._Tap.backward

    def watched_backward(ctx, *gradients):
        originals.append(weakref.ref(gradients[0]))
        return backward(ctx, *gradients)

    def on_gradient(name, x, g):
        alive = {tensor.data_ptr() for tensor in (ref() for ref in (*originals[:-1], *shown)) if tensor is not None}
        # autograd itself holds the gradient of the residual stream, and those of neighbours until they meet in one sum
        assert len(alive) <= 3, f"{len(alive)} gradients are alive at {name}"
        names.append(name)
        shown.append(weakref.ref(g))

    monkeypatch.setattr(hooks._Tap, "backward", staticmethod(watched_backward))
    with frozen(model), watch(find_linears(model), on_input=_nothing, on_gradient=on_gradient):
        _loss(model, ids).backward()
    assert len(names) == len(originals) == 14
    assert not [reference for reference in (*originals, *shown) if reference() is not None]


def _checkpointed(kind, *, reentrant):
    model = tiny_model(kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_shows_the_same_once(kind, reentrant):
    ids = random_tokens(2, 7)
    plain_inputs, plain_gradients = _shown(tiny_model(kind), ids)
    model = _checkpointed(kind, reentrant=reentrant)
    runs = []
    handle = next(iter(find_linears(model).values())).register_forward_hook(lambda *_: runs.append(1))
    inputs, gradients = _shown(model, ids)
    handle.remove()
    assert len(runs) == 2, "the blocks were not checkpointed"
    assert set(inputs) == set(plain_inputs)
    for name in plain_inputs:
        torch.testing.assert_close(inputs[name], plain_inputs[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[name], plain_gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attribute", ["dropout", "attention_dropout", "activation_dropout", "layerdrop"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_dropped_at_random_while_frozen(attribute, checkpointing):
    from transformers import OPTConfig, OPTForCausalLM

    reference = tiny_model("opt")
    config = OPTConfig(**{**reference.config.to_dict(), "dropout": 0.0, attribute: 0.9})
    model = OPTForCausalLM(config).train()
    model.load_state_dict(reference.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_tokens(2, 7)
    with frozen(model):
        shown = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(shown, reference(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def _state(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [{key: value for key, value in vars(module).items() if "drop" in key} for module in model.modules()],
        model.config.use_cache,
        model.is_gradient_checkpointing,
        len(model.get_input_embeddings()._forward_hooks),
    )


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("use_cache", [False, True])
def test_modes_flags_and_settings_are_restored(failure, use_cache):
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(**tiny_model("opt").config.to_dict())).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.config.use_cache = use_cache
    model.model.decoder.layers[0].eval()
    model.model.decoder.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = _state(model)
    try:
        with frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not model.config.use_cache
            if failure:
                raise failure
    except (ValueError, KeyboardInterrupt):
        pass
    assert _state(model) == before
    assert before[0] != [True] * len(before[0]) and before[1] != [True] * len(before[1])


def test_a_module_that_is_no_transformers_model_can_be_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train()
    with frozen(model):
        assert not model[1].training
        assert torch.equal(model(torch.ones(2, 3)), model(torch.ones(2, 3)))
    assert model[1].training and model[0].weight.requires_grad


def test_a_model_without_input_embeddings_can_be_frozen():
    from transformers import PretrainedConfig, PreTrainedModel

    class Vision(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.projection = nn.Linear(3, 4)

    model = Vision(PretrainedConfig())
    with frozen(model):
        assert not model.projection.weight.requires_grad
    assert find_linears(model)
