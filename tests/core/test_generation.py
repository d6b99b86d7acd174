"""Generation against transformers' own `generate` and warpers, and a brute-force oracle for the sets drawn from."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import actkit
from actkit import zoo
from actkit.core.ground.errors import DataError, NonFiniteError, UnsupportedModelError
from actkit.core.measure import decoding, generation
from actkit.core.measure.generation import check_generation, end_tokens, generate, generate_ids
from actkit.core.measure.sampling import Sampling
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder

SMALL = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5}
LLAMA = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | SMALL
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64} | SMALL
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA, max_position_embeddings=64)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=4, num_key_value_heads=1)),
    "bloom": (BloomForCausalLM, BloomConfig(hidden_size=24, n_layer=2, n_head=2, **SMALL)),
}


def small(name="llama", seed=6):
    torch.manual_seed(seed)  # 6: greedy texts of a dozen different tokens, where 0 repeats itself
    kind, config = ARCHITECTURES[name]
    return kind(copy.deepcopy(config)).eval()


@pytest.fixture(scope="module")
def swiglu():
    return zoo.load("swiglu"), zoo.tokenizer("swiglu")


def peer(model, ids, new, **settings):
    """transformers' own continuation."""
    ids = torch.tensor([ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
    )
    return output[0, ids.shape[1] :].tolist()


# -- greedy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_transformers_own(name):
    model = small(name, seed=2)
    prompt = torch.randint(61, (9,), generator=torch.Generator().manual_seed(4)).tolist()
    expected = peer(model, prompt, 25)
    assert list(generate_ids(model, prompt, max_new_tokens=25)) == expected
    assert list(generate_ids(model, torch.tensor([prompt]), max_new_tokens=25)) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_text_of_the_zoo(swiglu, dtype):
    model, tokenizer = swiglu[0] if dtype == torch.float32 else zoo.load("swiglu", dtype=dtype), swiglu[1]
    for prompt in ("Return the", "Raised when a", "class"):
        ids = tokenizer(prompt)["input_ids"]
        expected = peer(model, ids, 40)
        assert list(generate_ids(model, ids, max_new_tokens=40)) == expected
        engine = []
        pieces = list(generate(model, tokenizer, prompt, max_new_tokens=40, announce=engine.append))
        assert len(pieces) > 5 and all(pieces)
        assert len(engine) == 1 and engine[0].startswith("decoder, ")
        if dtype == torch.bfloat16:  # which the decoder rounds less often than transformers
            expected = list(Decoder(model).generate(ids, max_new_tokens=40))
        assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)


def test_it_ends_where_transformers_ends():
    model = small()
    free = peer(model, [3, 5], 20)
    end = free[7]
    for given in (end, [60, end]):
        model.generation_config.eos_token_id = given
        expected = peer(model, [3, 5], 20)
        assert len(expected) <= 8 and list(generate_ids(model, [3, 5], max_new_tokens=20)) == expected
    assert list(generate_ids(model, [3, 5], max_new_tokens=20, end=())) == free
    assert list(generate_ids(model, [3, 5], max_new_tokens=20, end=[free[2]])) == free[: free.index(free[2]) + 1]


def test_end_tokens():
    model = small()
    assert end_tokens(model) == frozenset()

    class Names:
        eos_token_id = 9

    assert end_tokens(model, Names()) == {9}
    model.config.eos_token_id = 8
    assert end_tokens(model, Names()) == {8}
    model.generation_config.eos_token_id = [6, 7]
    assert end_tokens(model, Names()) == {6, 7}


def test_a_model_without_a_cache_reads_all_again():
    model = small()
    expected = peer(model, [3, 5], 12)

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.lengths = model, model.config, []

        def can_generate(self):
            return True

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            self.lengths.append(input_ids.shape[1])
            output = self.inner(input_ids=input_ids, use_cache=False)
            output.past_key_values = None
            return output

    forgetful = Forgetful()
    assert list(generate_ids(forgetful, [3, 5], max_new_tokens=12)) == expected
    assert forgetful.lengths == list(range(2, 14))


# -- sampling ----------------------------------------------------------------------------------------------------------


def brute_force(logits, temperature, top_k, top_p):
    """Probabilities token by token, in plain Python."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order if top_k is None else order[:top_k]
    total = sum(weights[i] for i in kept)
    if top_p is not None:
        held, chosen = 0.0, []
        for i in kept:
            if held >= top_p and chosen:
                break
            chosen.append(i)
            held += weights[i] / total
        kept = chosen
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [None, 1, 5, 19, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sets_equal_brute_force_and_transformers_warpers(top_k, top_p, temperature):
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(7))
    found = Sampling(temperature, top_k, top_p).distribution(logits)
    assert found.tolist() == pytest.approx(brute_force(logits.tolist(), temperature, top_k, top_p), abs=1e-12)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
    scores = logits.double()[None]
    for warper in warpers:
        scores = warper(None, scores)
    assert found.tolist() == pytest.approx(scores.softmax(-1)[0].tolist(), abs=1e-9)


def test_of_equally_likely_tokens_the_first_are_kept():
    assert Sampling(1.0, top_k=2).distribution(torch.zeros(5)).tolist() == [0.5, 0.5, 0, 0, 0]
    assert Sampling(1.0, top_p=0.5).distribution(torch.zeros(4)).tolist() == [0.5, 0.5, 0, 0]
    assert Sampling(1.0, top_p=1e-9).distribution(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_drawn_tokens_follow_the_distribution():
    model = small()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 5]])).logits[0, -1]
    settings = {"temperature": 1.5, "top_k": 6, "top_p": 0.9}
    expected = Sampling(**settings).distribution(logits)
    draws = 1500
    counts = Counter(
        next(generate_ids(model, [3, 5], max_new_tokens=1, sampling=Sampling(seed=seed, **settings)))
        for seed in range(draws)
    )
    for token, chance in enumerate(expected.tolist()):
        spread = 4 * math.sqrt(draws * chance * (1 - chance))
        assert abs(counts[token] - draws * chance) <= spread, token


def test_seed_makes_it_reproducible():
    model = small()

    def run(seed, **settings):
        return list(generate_ids(model, [3, 5], max_new_tokens=20, sampling=Sampling(2.0, seed=seed, **settings)))

    assert run(0) == run(0) != run(1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert run(3, top_k=5) == run(3, top_k=5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert run(0, top_k=1) == list(generate_ids(model, [3, 5], max_new_tokens=20))


# -- text --------------------------------------------------------------------------------------------------------------

TEXT = "naïve 你好, wörld 🙂🙃 end  two\n\tspaces é́"


def byte_fallback():
    """A tokenizer as Llama 2's: what is not in the vocabulary becomes bytes; the text's first space is dropped."""
    words = ["<unk>", "▁", "a", "e", "n", "d", "▁n", "▁e"]
    vocabulary = {word: at for at, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "n"), ("▁", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("cut", [0, 1, 7, 15])
def test_pieces_are_whole_characters(swiglu, kind, cut):
    tokenizer = swiglu[1] if kind == "byte level" else byte_fallback()
    ids = tokenizer(TEXT)["input_ids"]
    while "�" in tokenizer.decode(ids[:cut]):  # a prompt holds whole characters
        cut += 1
    prompt, tokens = ids[:cut], ids[cut:]
    pieces = list(generation._pieces(tokenizer, prompt, iter(tokens)))
    assert tokenizer.decode(prompt) + "".join(pieces) == TEXT
    assert "�" not in "".join(pieces) and len(pieces) > 10
    assert len(tokens) > len(pieces)  # some tokens are parts of characters


def test_bytes_that_are_no_character(swiglu):
    tokenizer = swiglu[1]
    emoji = tokenizer("🙂")["input_ids"]
    ids = [*emoji[:2], *tokenizer("ab")["input_ids"], *emoji[:1]]
    pieces = list(generation._pieces(tokenizer, tokenizer("x")["input_ids"], iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[-1].endswith("�") and "ab" in "".join(pieces)


def test_a_piece_comes_as_soon_as_it_is_known(swiglu):
    tokenizer = swiglu[1]
    asked = []

    def tokens():
        for token in tokenizer("one two three")["input_ids"]:
            asked.append(token)
            yield token

    next(generation._pieces(tokenizer, [], tokens()))
    assert len(asked) == 1


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_stop_texts(size):
    text = "aab aabaa END and END"
    for stops in (["END"], ["aabaa", "END"], ["aba", "ab "], ["xyz"], ["and ENDx"], []):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = "".join(generation._until(stops, iter(pieces)))
        # The stop that is complete first ends it.
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        if size == 1 and ends:
            first = min((stop for stop in stops if stop in text), key=lambda stop: text.index(stop) + len(stop))
            assert found == text[: text.index(first)]
        elif ends:
            assert found == text[: min(text.index(stop) for stop in stops if stop in text)]
        else:
            assert found == text


def test_nothing_of_a_stop_text_is_returned_early():
    pieces = iter(["ab", "c", "x", "abc", "d", "rest"])
    assert list(generation._until(["abcd"], pieces)) == ["abcx"]
    assert next(pieces) == "rest"  # nothing was read after the stop


def test_stop_in_generate(swiglu):
    model, tokenizer = swiglu
    whole = "".join(generate(model, tokenizer, "Return the", max_new_tokens=30))
    word = whole.split()[3]
    assert "".join(generate(model, tokenizer, "Return the", max_new_tokens=30, stop=word)) == whole[: whole.index(word)]
    ids = list(generate_ids(model, tokenizer("Return the")["input_ids"], max_new_tokens=30))
    expected = tokenizer.decode(ids[: ids.index(ids[5])])
    assert "".join(generate(model, tokenizer, "Return the", max_new_tokens=30, stop=ids[5])) == expected
    with pytest.raises(ValueError, match="stop: an empty text"):
        generate(model, tokenizer, "a", stop=["b", ""])


def test_empty_prompt(swiglu):
    model, tokenizer = swiglu
    text = "".join(generate(model, tokenizer, "", max_new_tokens=12))
    assert text == tokenizer.decode(peer(model, [tokenizer.bos_token_id], 12), skip_special_tokens=True)
    bare, silent = byte_fallback(), small()  # names neither a beginning nor an end
    bare.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(DataError, match="prompt: it holds no token, and neither tokenizer nor model names"):
        generate(silent, bare, "")


def test_a_chat_is_what_transformers_makes_of_the_template(swiglu):
    model, tokenizer = swiglu
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m['content'] }}\n{% endfor %}A: "
    turn = [{"role": "user", "content": "Return the"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = peer(model, ids, 8)
    found = "".join(generate(model, tokenizer, "Return the", chat=True, max_new_tokens=8))
    assert ids[0] == tokenizer.eos_token_id and found == tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(DataError, match="chat: the tokenizer has no chat template"):
        generate(*swiglu, "Return the", chat=True)


def test_a_tokenizer_without_an_end():
    torch.manual_seed(0)
    tokenizer = byte_fallback()
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer)}, max_position_embeddings=64)).eval()
    assert tokenizer.eos_token_id is None and end_tokens(model, tokenizer) == frozenset()
    ids = peer(model, tokenizer("an end")["input_ids"], 20)
    assert len(ids) == 20
    prompt = tokenizer("an end")["input_ids"]
    whole = tokenizer.decode(prompt + ids)
    assert "an end" + "".join(generate(model, tokenizer, "an end", max_new_tokens=20)) == whole


# -- through a decoder, and through transformers -----------------------------------------------------------------------


@pytest.fixture
def without_decoders(monkeypatch):
    monkeypatch.setattr(decoding.registry, "decoder_names", list)


def test_what_is_drawn_does_not_depend_on_the_engine(swiglu, request):
    model, tokenizer = swiglu
    settings = [Sampling(1.0, seed=3), Sampling(0.8, top_k=20, top_p=0.9, seed=1), Sampling()]

    def write():
        return [
            "".join(generate(model, tokenizer, "Return the", max_new_tokens=30, sampling=each)) for each in settings
        ]

    decoded = write()
    assert len(set(decoded)) == 3
    request.getfixturevalue("without_decoders")
    assert write() == decoded


def test_the_engine_is_announced_before_the_first_token(swiglu):
    class Spelled:  # a tokenizer of 61 letters
        eos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(each) - 64 for each in text]}

        def decode(self, ids, **_):
            return "".join(chr(each + 64) for each in ids)

    engine = []
    pieces = generate(small("gpt2"), Spelled(), "AB", max_new_tokens=5, announce=engine.append)
    assert engine == ["transformers (its model_type is 'gpt2'; docs/architectures.md lists what the decoder takes)"]
    assert "".join(pieces) == Spelled().decode(peer(small("gpt2"), [1, 2], 5))
    with pytest.raises(DataError, match="context of 64"):
        generate(small(), Spelled(), "AB", max_new_tokens=63, announce=engine.append)
    with pytest.raises(UnsupportedModelError, match="does not write text"):
        generate(nn.Linear(2, 2), Spelled(), "AB", announce=engine.append)
    assert len(engine) == 1


def test_a_kernel_multiplies_integer_weights_if_transformers_writes(swiglu, without_decoders):
    model, tokenizer = actkit.load("swiglu"), swiglu[1]
    actkit.apply(model, [RoundToNearest(bits=8, group_size=64)], progress=False)
    layer = model.model.layers[0].mlp.up_proj
    plain = "".join(generate(model, tokenizer, "Return the", max_new_tokens=12))
    assert layer._packed is None  # the model is the caller's, who has not asked for a second copy of its weights
    assert "".join(generate(model, tokenizer, "Return the", max_new_tokens=12, decode_only=True)) == plain
    assert layer._packed is not None


def test_interrupted_inside_the_decoder(swiglu, monkeypatch):
    model, tokenizer = swiglu
    whole = "".join(generate(model, tokenizer, "Return the", max_new_tokens=12))
    calls, call = itertools.count(), Decoder.__call__

    def interrupt(self, new):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return call(self, new)

    monkeypatch.setattr(Decoder, "__call__", interrupt)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for piece in generate(model, tokenizer, "Return the", max_new_tokens=12):
            found.append(piece)
    assert found and whole.startswith("".join(found)) and torch.is_grad_enabled()
    assert "".join(generate(model, tokenizer, "Return the", max_new_tokens=12)) == whole


def test_a_vocabulary_that_is_wider_than_the_embedding_through_a_decoder():
    model = small()
    model.lm_head = nn.Linear(24, 80, bias=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[70] = model(torch.tensor([[3, 5]]), output_hidden_states=True).hidden_states[-1][0, -1]
    steps = generate_ids(model, [3, 5], max_new_tokens=4, decoder=Decoder(model))
    assert next(steps) == 70
    with pytest.raises(UnsupportedModelError, match="chose token 70, but embeds 0 to 60"):
        next(steps)


# -- the model stays as it was -----------------------------------------------------------------------------------------


def test_between_tokens_the_caller_is_undisturbed():
    model = small().train()
    model.lm_head.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    steps = generate_ids(model, [3, 5], max_new_tokens=10)
    for _ in range(3):
        next(steps)
        assert torch.is_grad_enabled()
        assert {name: module.training for name, module in model.named_modules()} == flags
    steps.close()
    assert list(generate_ids(model, [3, 5], max_new_tokens=10)) == peer(small(), [3, 5], 10)


def test_interrupted_inside_a_pass():
    model = small().train()
    expected = list(generate_ids(small(), [3, 5], max_new_tokens=10))
    calls = itertools.count()

    def interrupt(module, args):
        if next(calls) == 4:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for token in generate_ids(model, [3, 5], max_new_tokens=10):
            found.append(token)
    handle.remove()
    assert found == expected[:4] and model.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(generate_ids(model, [3, 5], max_new_tokens=10)) == expected


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (
            [1] * 50,
            {"max_new_tokens": 15},
            "15 after a prompt of 50 tokens exceed the model's context of 64.*at most 14",
        ),
        ([1] * 64, {"max_new_tokens": 1}, "context of 64; shorten the prompt"),
        ([1, 61], {}, "vocabulary mismatch: the prompt holds token 61, the model embeds 0 to 60"),
        ([-1, 3], {}, "the prompt holds token -1"),
        ([], {}, r"input_ids: shape \[0\] was given"),
        ([[1, 2], [3, 4]], {}, r"input_ids: shape \[2, 2\] was given; give one text"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)
def test_bad_input_is_refused_before_the_first_token(ids, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_ids(small(), ids, **{"max_new_tokens": 4} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": 3}, "top_k: 3 was given with temperature 0"),
    ],
)
def test_bad_sampling_is_refused_when_it_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_the_context_can_be_filled():
    assert len(list(generate_ids(small(), [1] * 50, max_new_tokens=14))) == 14


def test_models_that_write_nothing(swiglu):
    bert = BertModel(BertConfig(**{k: v for k, v in LLAMA.items() if k != "bos_token_id"}))
    for model in (bert, nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} does not write text"):
            generate_ids(model, [1])
    with pytest.raises(UnsupportedModelError):
        generate(bert, swiglu[1], "a")


def test_nan_logits():
    model = small()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    steps = generate_ids(model, [1, 2], max_new_tokens=4)
    with pytest.raises(NonFiniteError, match="NaN or Inf at token 1 after the prompt"):
        next(steps)


# -- the check ---------------------------------------------------------------------------------------------------------


def test_check_of_a_model_that_writes():
    model, other = small(), small(seed=10)
    prompts = torch.tensor([[3, 5], [7, 8]])
    found = check_generation(model, prompts, max_new_tokens=12, reference=other)
    tokens = [peer(model, prompt, 12) for prompt in prompts.tolist()]
    others = [peer(other, prompt, 12) for prompt in prompts.tolist()]
    assert found.passed and found.reason == "" and [list(each) for each in found.tokens] == tokens
    agreeing = [len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(a, b)))) for a, b in zip(tokens, others)]
    assert found.agreeing_prefix == sum(agreeing) / 2
    assert found.distinct_share == min(len(set(each)) / 12 for each in tokens)
    for reference in (model, small()):
        assert check_generation(model, prompts[0], max_new_tokens=12, reference=reference).agreeing_prefix == 12
    assert check_generation(model, prompts[0], max_new_tokens=12).agreeing_prefix is None
    assert found.to_dict()["tokens"] == found.tokens


def test_check_goes_on_past_the_end_of_a_text():
    model = small()
    model.generation_config.eos_token_id = peer(model, [3, 5], 1)[0]
    assert len(check_generation(model, torch.tensor([3, 5]), max_new_tokens=8).tokens[0]) == 8


def stuck():
    model = small()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits are equal: always token 0
    return model


def test_check_of_one_token_throughout():
    prompt = torch.tensor([3, 5])
    found = check_generation(stuck(), prompt, max_new_tokens=6, reference=small())
    assert not found.passed and found.reason == "prompt 1 is continued by token 0 6 times over"
    assert found.distinct_share == 1 / 6
    assert check_generation(stuck(), prompt, max_new_tokens=6, reference=stuck()).passed
    assert not check_generation(stuck(), prompt, max_new_tokens=6).passed


def test_check_of_nan_and_of_tokens_outside_the_vocabulary():
    model, prompt = small(), torch.tensor([3, 5])
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.inf
    found = check_generation(model, prompt, max_new_tokens=6, reference=small())
    assert not found.passed and "NaN or Inf" in found.reason and found.tokens == ((),) and found.agreeing_prefix == 0
    with pytest.raises(NonFiniteError, match="reference: it does not write either"):
        check_generation(small(), prompt, max_new_tokens=6, reference=model)

    class Outside(nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.full(hidden.shape[:2], 70), 80).float()

    for new_tokens in (1, 4):
        wide = small()
        wide.lm_head = Outside()
        found = check_generation(wide, prompt, max_new_tokens=new_tokens)
        assert not found.passed and "chose token 70, but embeds 0 to 60" in found.reason
    with pytest.raises(DataError, match="context of 64"):
        check_generation(small(), prompt, max_new_tokens=63)
