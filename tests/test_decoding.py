"""Decoding with a static cache: the tokens of transformers' own generation, and no more than there is room for."""

import pytest
import torch

from gfwsvd.decoding import GraphDecoder
from gfwsvd.errors import GfwsvdError
from tiny_models import random_tokens, tiny_model

IDS = random_tokens(3, 10)


def _decoder(kind="llama", max_length=32):
    model = tiny_model(kind).eval()
    return model, GraphDecoder(model, batch_size=3, max_length=max_length)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_tokens_are_those_of_greedy_generation(kind):
    model, decoder = _decoder(kind)
    for ids in (IDS, random_tokens(3, 14, seed=4)):  # a decoder starts anew with each prompt
        expected = model.generate(
            ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        assert torch.equal(decoder.generate(ids, max_new_tokens=12), expected)


def test_steps_have_the_logits_of_one_pass_over_all_tokens():
    model, decoder = _decoder()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    found = [decoder.prefill(IDS[:, :4])] + [decoder.step(IDS[:, i]).clone() for i in range(4, 10)]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 3:], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_pads_a_prompt_changes_neither_its_logits_nor_those_of_the_steps_behind_it(kind):
    _, decoder = _decoder(kind, max_length=24)
    for length, size in ((10, 16), (3, 16), (17, 24)):  # no longer than the cache; tokens of a longer prompt stay
        ids = random_tokens(3, length, seed=length)
        expected = [decoder.prefill(ids), *(decoder.step(IDS[:, i]).clone() for i in range(7))]
        assert decoder._padded_size(length) == size
        decoder._make_room(0, length)
        found = [decoder._padded(ids, size), *(decoder.step(IDS[:, i]).clone() for i in range(7))]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_sequence_that_ended_repeats_its_last_token():
    _, decoder = _decoder()
    free = decoder.generate(IDS, max_new_tokens=12)
    end = int(free[0, 13])
    ended = decoder.generate(IDS, max_new_tokens=12, eos_token_id=end)
    for row, other in zip(free.tolist(), ended.tolist(), strict=True):
        new = row[10:]
        stop = new.index(end) + 1 if end in new else len(new)
        assert other[10 : 10 + stop] == new[:stop] and set(other[10 + stop :]) <= {end}


def test_what_does_not_fit_is_refused():
    model, decoder = _decoder(max_length=12)
    with pytest.raises(GfwsvdError, match="10 tokens of prompt and 3 new ones are more than the decoder's 12"):
        decoder.generate(IDS, max_new_tokens=3)
    with pytest.raises(GfwsvdError, match=r"expected prompts \(3, S\), got \(2, 10\)"):
        decoder.prefill(IDS[:2])
    with pytest.raises(GfwsvdError, match="room for 1 to 12 tokens, got 13"):
        decoder.prefill(random_tokens(3, 13))
    decoder.prefill(random_tokens(3, 12))
    with pytest.raises(GfwsvdError, match="room for 1 to 12 tokens, got 13"):
        decoder.step(IDS[:, 0])
    with pytest.raises(GfwsvdError, match="must be at least 1, got 0 and 12"):
        GraphDecoder(model, batch_size=0, max_length=12)
    with pytest.raises(GfwsvdError, match="at most the model's 128 positions, got 129"):
        GraphDecoder(model, batch_size=1, max_length=129)
