"""Sampled rows against the model's whole softmax, and the kinds of their beginnings."""

import pytest
import torch
from letters import VOCABULARY, character_tokenizer, ids_of, tiny_llama

from mea_compress.errors import RequestError
from mea_compress.text.sampling import _starts, sample_sequences

CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
OPENING = [1, *ids_of("user ")]


def chat_tokenizer(template=CHATML, bos=True):
    tokenizer = character_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def test_sampling_is_seeded_full_length_and_never_ends():
    model = tiny_llama()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows = sample_sequences(model, None, 5, 20, seed=3, batch_size=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert rows.shape == (5, 20) and rows.dtype == torch.int64
    assert (rows[:, 0] == 1).all() and not (rows == 2).any()
    assert torch.equal(rows, sample_sequences(model, None, 5, 20, seed=3, batch_size=2, progress=False))
    assert not torch.equal(rows, sample_sequences(model, None, 5, 20, seed=4, batch_size=2, progress=False))


@pytest.mark.parametrize("tokenizer", [None, chat_tokenizer()], ids=["none", "chat"])
def test_samples_are_drawn_in_turn_from_one_generator(tokenizer):
    """Written out: whole softmax of each last position, float32, end token taken out where no conversation is."""
    model, generator, rows = tiny_llama(), torch.Generator().manual_seed(3), []
    starts = _starts(model, tokenizer, 5, 20, 3, "auto")
    assert len({len(start.ids) for start in starts}) == (3 if tokenizer else 2)
    for first in (0, 2, 4):
        batch = starts[first : first + 2]
        row = torch.tensor([start.ids[: min(len(start.ids) for start in batch)] for start in batch])
        for position in range(row.shape[1], 20):
            with torch.no_grad():
                logits = model(input_ids=row).logits[:, -1]
            for index, start in enumerate(batch):
                if position < len(start.ids):
                    logits[index] = -torch.inf
                    logits[index, start.ids[position]] = 0.0
                elif 2 not in start.ends:
                    logits[index, 2] = -torch.inf
            row = torch.cat((row, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
        rows.append(row)
    assert torch.equal(sample_sequences(model, tokenizer, 5, 20, seed=3, batch_size=2, progress=False), torch.cat(rows))


def counts(rows):
    return rows.bincount(minlength=len(VOCABULARY)).double()


def test_samples_follow_the_models_distribution():
    # Against the uncached softmax, with the end token taken out; half of the rows have a letter drawn after BOS.
    model = tiny_llama()
    rows = sample_sequences(model, character_tokenizer(), 8000, 3, batch_size=8000, progress=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, token] for token in range(len(VOCABULARY))])).logits.double()
    logits[:, :, 2] = -torch.inf
    p = logits.softmax(-1)
    letters = torch.zeros(len(VOCABULARY), dtype=torch.float64)
    letters[ids_of("abcdefghijklmnopqrstuvwxyz")] = 1 / 26
    likeliest = int(rows[:, 1].mode().values)
    for observed, expected in (
        (rows[:, 1], (p[0, 0] + letters) / 2),
        (rows[rows[:, 1] == likeliest][:, 2], p[likeliest, 1]),
    ):
        found = counts(observed)
        spread = (expected * (1 - expected) / found.sum()).sqrt()
        assert ((found / found.sum() - expected).abs() <= 5 * spread + 1e-9).all()


def test_rows_are_dealt_out_evenly_to_the_kinds_of_beginnings():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = sample_sequences(model, chat_tokenizer(), 300, 16, progress=False)
    chats = (rows[:, :6] == torch.tensor(OPENING)).all(1)
    assert chats.sum() == 100 and (rows[:, 0] == 1).all()
    assert 20 < chats[:100].sum() < 50  # shuffled
    second = counts(rows[~chats][:, 1])
    letters = set(ids_of("abcdefghijklmnopqrstuvwxyz"))
    assert sum(second[sorted(letters)]) > 100 + 50
    order = sample_sequences(model, chat_tokenizer(), 300, 16, seed=1, progress=False)
    assert not torch.equal(chats, (order[:, :6] == torch.tensor(OPENING)).all(1))


def test_a_turn_may_end_in_a_conversation_and_nowhere_else():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = sample_sequences(model, chat_tokenizer(), 300, 32, progress=False)
    chats = (rows[:, :6] == torch.tensor(OPENING)).all(1)
    assert (rows[chats] == 2).any(1).float().mean() > 0.3 and not (rows[~chats] == 2).any()
    # This template ends no turn by the end token.
    template = "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] }}{% endfor %}"
    assert not (sample_sequences(model, chat_tokenizer(template), 60, 32, progress=False) == 2).any()


@pytest.mark.parametrize("end", ["</s>", "<s>"])
def test_an_opening_may_hold_end_tokens(end):
    template = "{{ 'sys" + end + "' }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
    rows = sample_sequences(tiny_llama(), chat_tokenizer(template), 30, 24, progress=False)
    opening = torch.tensor([1, *ids_of("sys"), VOCABULARY[end], *ids_of("user ")])
    assert (rows[:, : len(opening)] == opening).all(1).sum() == 10
    assert (rows[:, 0] == 1).all()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'][0]['text'] }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "nothing of them",
        "{{ 'long' * 9 }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ],
    ids=["lists", "refuses", "no-opening", "no-content", "too-long"],
)
def test_templates_that_open_no_turn_are_left_out(template):
    model = tiny_llama()
    plain = sample_sequences(model, character_tokenizer(), 12, 16, progress=False)
    assert torch.equal(sample_sequences(model, chat_tokenizer(template), 12, 16, progress=False), plain)


def test_the_users_choice_of_what_stands_in_front():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokenizer = character_tokenizer()
    letters = set(ids_of("abcdefghijklmnopqrstuvwxyz"))
    assert set(sample_sequences(model, tokenizer, 60, 2, bos="never", progress=False)[:, 0].tolist()) <= letters
    without = character_tokenizer(bos=False)
    assert set(sample_sequences(model, without, 60, 2, progress=False)[:, 0].tolist()) <= letters
    assert set(sample_sequences(model, None, 60, 2, bos="never", progress=False)[:, 0].tolist()) <= {0, *range(3, 30)}
    assert (sample_sequences(model, tokenizer, 9, 2, bos="always", progress=False)[:, 0] == 1).all()
    tokenizer.backend_tokenizer.post_processor = None
    assert set(sample_sequences(model, tokenizer, 60, 2, progress=False)[:, 0].tolist()) <= letters
    assert (sample_sequences(model, tokenizer, 9, 2, bos="always", progress=False)[:, 0] == 1).all()
    nameless = tiny_llama(bos_token_id=None)
    assert len(set(sample_sequences(nameless, None, 60, 2, progress=False)[:, 0].tolist())) > 5
    with pytest.raises(RequestError, match="`bos`"):
        sample_sequences(nameless, None, 9, 2, bos="always", progress=False)


def test_what_a_checkpoint_says_of_generation_is_put_aside_and_back():
    model, tuned = tiny_llama(), tiny_llama()
    tuned.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1, max_new_tokens=2, eos_token_id=2)
    before = tuned.generation_config.to_dict()
    rows = sample_sequences(tuned, None, 4, 12, progress=False)
    assert torch.equal(rows, sample_sequences(model, None, 4, 12, progress=False))
    with pytest.raises(RuntimeError, match="stop"):
        tuned.register_forward_pre_hook(stop)
        sample_sequences(tuned, None, 4, 12, progress=False)
    assert tuned.generation_config.to_dict() == before


def stop(*_):
    raise RuntimeError("stop")


def test_the_bar_counts_every_token(capsys):
    sample_sequences(tiny_llama(), chat_tokenizer(), 5, 16, batch_size=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "sampling text" in captured.err and "80/80" in captured.err


def test_it_computes_in_the_models_dtype_and_with_a_cache():
    model, seen = tiny_llama().bfloat16(), []
    model.register_forward_pre_hook(
        lambda _, args, settings: seen.append((settings["input_ids"].shape[1], settings["use_cache"])), with_kwargs=True
    )
    rows = sample_sequences(model, character_tokenizer(), 70, 12, progress=False)
    assert rows.shape == (70, 12) and model.dtype == torch.bfloat16
    assert seen == [(1, True)] * 11 * 2


def test_wrong_requests():
    with pytest.raises(RequestError, match="context of 32"):
        sample_sequences(tiny_llama(), None, 1, 33, progress=False)
    with pytest.raises(RequestError, match="makes no text"):
        sample_sequences(tiny_llama(), None, 0, 8, progress=False)
    assert sample_sequences(tiny_llama(), None, 3, 1, progress=False).tolist() == [[1]] * 3
