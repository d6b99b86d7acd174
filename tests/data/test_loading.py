"""Every source becomes checked batches, and every bad input a clear error."""

import builtins
import json

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import nn

from actkit import zoo
from actkit.core.ground.errors import DataError
from actkit.data import Batches, load_data
from actkit.data.text import split_of


@pytest.fixture(scope="module")
def causal():
    return zoo.load("swiglu"), zoo.tokenizer("swiglu")


@pytest.fixture(scope="module")
def encoder():
    """A small BERT with MiniLM's tokenizer: the shape of an encoder without the cost of one."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).eval(), zoo.tokenizer("minilm")


@pytest.fixture
def lines(tmp_path):
    def write(*texts, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        return path

    return write


def test_embedded_text_is_packed_in_full_rows(causal):
    model, tokenizer = causal
    data = load_data(None, model, tokenizer, sequences=6, length=128, batch_size=4)
    assert [batch["input_ids"].shape for batch in data] == [(4, 128), (2, 128)]
    assert len(data) == 2 and data.rows == 6 and data.tokens == 6 * 128
    assert data[0]["input_ids"][0, 0] == tokenizer.eos_token_id
    for batch, owners in zip(data, data.document_ids):
        assert batch.keys() == {"input_ids", "attention_mask"} and batch["attention_mask"].all()
        assert owners.shape == batch["input_ids"].shape
    stream = torch.cat([batch["input_ids"].flatten() for batch in data])[:-1]
    owners = torch.cat([ids.flatten() for ids in data.document_ids])
    # A document changes exactly behind its end-of-text token.
    assert torch.equal((owners.diff() > 0)[1:], (stream == tokenizer.eos_token_id)[1:])


def test_packing_keeps_every_token(causal, lines):
    model, tokenizer = causal
    texts = ["Return a list of names.", "Raised when a key is missing. " * 30, "A third text."]
    data = load_data(lines(*texts), model, tokenizer, length=64, batch_size=2)
    kept = torch.cat([batch["input_ids"][batch["attention_mask"] == 1] for batch in data]).tolist()
    decoded = tokenizer.decode(kept).split("<|endoftext|>")
    assert sorted(decoded) == sorted(["", *texts, ""])
    assert all((ids == -1).equal(batch["attention_mask"] == 0) for batch, ids in zip(data, data.document_ids))


def test_packed_rows_begin_as_the_tokenizer_begins_a_text(causal, lines):
    model, plain = causal
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<bos>")
    big = zoo.load("swiglu")
    big.resize_token_embeddings(bos + 1, mean_resizing=False)
    texts = ["Return a list of names.", "Raised when a key is missing. " * 30, "A third text."]
    data = load_data(lines(*texts), big, tokenizer, length=16, batch_size=1)
    rows = [batch["input_ids"][0].tolist() for batch in data]
    assert all(row[0] == bos and row[:2] != [bos, bos] for row in rows)
    assert all(len(row) == 16 for row in rows[:-1])
    assert all(owners[0, 0] == owners[0, 1] for owners in data.document_ids)
    text = tokenizer.decode([token for row in rows for token in row if token != bos])
    assert sorted(text.split("<|endoftext|>")) == sorted([*texts, ""])  # nothing else was added, and nothing lost
    assert data.description.endswith("rows of up to 16 tokens, each begins with <bos>")
    assert "begins" not in load_data(lines(*texts), model, plain, length=16).description
    with pytest.raises(DataError, match="leaves no room beside the tokenizer's 1 special tokens"):
        load_data(lines(*texts), big, tokenizer, length=1)


def test_same_seed_same_data_and_other_split_other_data(causal):
    model, tokenizer = causal
    make = lambda **kw: load_data(None, model, tokenizer, sequences=4, length=64, **kw)  # noqa: E731
    assert make().fingerprint == make().fingerprint == make(split="calibration").fingerprint
    assert len({make(seed=seed, split=split).fingerprint for seed in (0, 1) for split in ("search", "test")}) == 4


def test_documents_as_rows_are_windowed_and_masked(causal, lines):
    model, tokenizer = causal
    data = load_data(lines("Short.", "long words " * 60), model, tokenizer, length=32, pack=False, batch_size=16)
    batch, owners = data[0], data.document_ids[0]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < 32 and max(lengths) == 32
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert (owners[batch["attention_mask"] == 0] == -1).all()
    assert len(owners[:, 0].unique()) == 2


def test_padding_does_not_change_the_result(causal, lines):
    model, tokenizer = causal
    path = lines("Return a list.", "Return the name of the module as a string, or None.")
    alone = {
        len(b["input_ids"][0]): model(**b).logits[0]
        for b in load_data(path, model, tokenizer, pack=False, batch_size=1)
    }
    (together,) = load_data(path, model, tokenizer, pack=False, batch_size=2)
    for logits, mask in zip(model(**together).logits, together["attention_mask"]):
        torch.testing.assert_close(logits[mask == 1], alone[int(mask.sum())], rtol=1e-3, atol=1e-3)


def test_encoders_read_sentences_with_their_special_tokens(encoder):
    model, tokenizer = encoder
    data = load_data(None, model, tokenizer, sequences=12, length=16)
    for batch in data:
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
        ends = batch["attention_mask"].sum(1) - 1
        assert (batch["input_ids"].gather(1, ends[:, None]) == tokenizer.sep_token_id).all()
        assert model(**batch).last_hidden_state.isfinite().all()
    text = "the quick brown fox"
    from_list = load_data([tokenizer(text, return_tensors="pt")], model)
    assert from_list[0]["input_ids"].tolist() == [tokenizer(text)["input_ids"]]


def test_windows_agree_with_the_tokenizer(encoder, lines):
    model, tokenizer = encoder
    text = "the quick brown fox jumps over the lazy dog " * 4
    data = load_data(lines(text), model, tokenizer, length=16)
    expected = tokenizer(text, truncation=True, max_length=16, return_overflowing_tokens=True)["input_ids"]
    rows = [ids[mask == 1].tolist() for b in data for ids, mask in zip(b["input_ids"], b["attention_mask"])]
    assert rows == expected


def test_text_file(causal, tmp_path):
    model, tokenizer = causal
    path = tmp_path / "book.txt"
    path.write_text("It was a dark night. " * 400, encoding="utf-8")
    whole = load_data(path, model, tokenizer, length=64)
    assert whole.document_ids[0][:3, 0].tolist() == [0, 1, 2]  # rows stand in for documents
    parts = [load_data(path, model, tokenizer, length=64, split=split) for split in ("train", "test")]
    assert parts[0].tokens > 8 * parts[1].tokens


def test_a_folder_of_texts(causal, tmp_path, lines):
    """Each .txt or .md is a document and each line of a .jsonl; what else lies there is not read."""
    model, tokenizer = causal
    texts = {"a.txt": "The first text.", "in/b.MD": "The second text, which is longer.", "c.txt": " \n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    lines("A third text.", "A fourth text.")
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "e.txt").mkdir()
    data = load_data(tmp_path, model, tokenizer, pack=False)
    found = {
        tokenizer.decode(ids[mask == 1])
        for batch in data
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    }
    assert found == {"The first text.", texts["in/b.MD"], "A third text.", "A fourth text."}
    assert len({int(row[0]) for ids in data.document_ids for row in ids}) == 4
    packed = load_data(tmp_path, model, tokenizer, length=8)
    assert len(torch.cat([ids.flatten() for ids in packed.document_ids]).unique()) - 1 in (3, 4)  # -1 on padding


def test_a_folder_of_texts_is_split_by_file_name(causal, tmp_path):
    model, tokenizer = causal
    for index in range(60):
        (tmp_path / f"{index}.txt").write_text(f"This is the text number {index}.")
    parts = {split: load_data(tmp_path, model, tokenizer, pack=False, split=split).rows for split in ("train", "test")}
    for split, rows in parts.items():
        assert rows == sum(split_of(f"{index}.txt") == split for index in range(60))
    one = tmp_path / "one"
    one.mkdir()
    (one / "book.md").write_text("It was a dark night. " * 40)
    data = load_data(one, model, tokenizer, length=32)
    assert data.document_ids[0][:3, 0].tolist() == [0, 1, 2]  # of a single text rows stand in for documents


def test_the_model_says_what_a_folder_of_both_is(causal, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.txt").write_text("The labels of the images.")
    assert "pixel_values" in load_data(tmp_path, zoo.load("cnn"))[0]
    assert "input_ids" in load_data(tmp_path, *causal)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        load_data(tmp_path / "empty", *causal)


def test_a_file_of_lines_is_split_by_text(causal, lines):
    model, tokenizer = causal
    path = lines(*(f"This is the text number {index}." for index in range(200)))
    total = load_data(path, model, tokenizer, pack=False).rows
    rows = [
        load_data(path, model, tokenizer, pack=False, split=s).rows for s in ("train", "calibration", "search", "test")
    ]
    assert sum(rows) == total == 200 and rows[0] > 150


def test_digits_are_the_default_of_their_models():
    model = zoo.load("cnn")
    data = load_data(None, model, sequences=20, batch_size=8)
    assert [batch["pixel_values"].shape[0] for batch in data] == [8, 8, 4]
    assert data[0]["labels"].shape == (8,) and data.document_ids[2].tolist() == [16, 17, 18, 19]
    assert model(data[0]["pixel_values"]).shape == (8, 10)


def test_random(causal):
    model, _ = causal
    data = load_data("random", model, sequences=5, length=32, batch_size=4)
    assert data.rows == 5 and data[0]["input_ids"].max() < 2048
    assert data.fingerprint == load_data("random", model, sequences=5, length=32, batch_size=4).fingerprint
    assert (
        data.fingerprint != load_data("random", model, sequences=5, length=32, batch_size=4, split="test").fingerprint
    )
    assert load_data("random", zoo.load("vit"), sequences=3)[0]["pixel_values"].shape == (3, 1, 8, 8)
    plain = nn.Sequential(nn.Linear(7, 3), nn.ReLU())
    assert load_data("random", plain, sequences=3)[0].shape == (3, 7)
    with pytest.raises(DataError, match="input_shape"):
        load_data("random", nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_given_batches(causal):
    model, _ = causal
    ids = torch.arange(24).view(4, 6)
    data = load_data(({"input_ids": part} for part in ids.split(3)), model)
    assert list(data) == list(data.items) and data.rows == 4  # a generator, and yet it can be read twice
    assert data.document_ids[1].tolist() == [[3] * 6]
    assert load_data(data, model) is data
    assert load_data(data, model, sequences=2).rows == 2
    assert load_data(ids, model).rows == 4
    assert data[:1].rows == 3


def test_a_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for index, name in enumerate(("3", "5")):
        (tmp_path / name).mkdir()
        image.new("RGB", (20, 10), (index * 255,) * 3).save(tmp_path / name / "a.png")
    (batch,) = load_data(tmp_path, zoo.load("vit"))
    order = batch["labels"].tolist()
    assert sorted(order) == [3, 5]
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    assert batch["pixel_values"][order.index(5)].min() == 1 and batch["pixel_values"][order.index(3)].max() == -1


def test_a_folder_of_images_without_pillow(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pillow"):
        load_data(tmp_path, zoo.load("cnn"))


BAD_ARGUMENTS = [
    ({"length": 513}, "513 tokens.*context is 512"),
    ({"length": 0}, "length=0.*at least 1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"sequences": -1}, "sequences=-1"),
    ({"sequences": 10**6}, "sequences=1000000.*give at most"),
    ({"split": "dev"}, "split='dev'"),
    ({"source": "missing.txt"}, "missing.txt.*does not exist.*random"),
    ({"source": __file__}, "unknown kind"),
    ({"source": []}, "0 batches"),
    ({"source": ["words"]}, "a batch is a str"),
    ({"source": [torch.zeros(2, 0, dtype=torch.int64)]}, "no token"),
    ({"source": [torch.zeros(1, 600, dtype=torch.int64)]}, "600 tokens.*context is 512"),
    ({"source": [torch.full((1, 4), 2048)]}, "model and tokenizer vocabulary mismatch.*2048.*2047"),
    ({"source": [torch.full((1, 4), -1)]}, "vocabulary mismatch"),
    ({"source": [torch.zeros(1, 4, dtype=torch.int64)], "split": "test"}, "split='test'"),
    ({"source": [torch.zeros(1, 4, dtype=torch.int64)], "sequences": 2}, "sequences=2"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD_ARGUMENTS, ids=[text[:24] for _, text in BAD_ARGUMENTS])
def test_bad_arguments(causal, arguments, text):
    model, tokenizer = causal
    with pytest.raises(ValueError, match=text):
        load_data(**{"source": None, "model": model, "tokenizer": tokenizer, **arguments})


def test_no_tokenizer(causal):
    with pytest.raises(ValueError, match="--data random"):
        load_data(None, causal[0])


def test_foreign_tokenizer(causal):
    with pytest.raises(DataError, match="model and tokenizer vocabulary mismatch"):
        load_data(None, causal[0], zoo.tokenizer("minilm"), sequences=2)


def test_bad_files(causal, tmp_path, lines):
    model, tokenizer = causal
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "ab\\ud83d"}\n')
    (tmp_path / "digits.jsonl").write_text('{"text": ' + "1" * 5000 + "}\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    cases = {
        "empty.txt": "no text",
        "latin.txt": "not UTF-8",
        "broken.jsonl": "line 2",
        "number.jsonl": '"text" is a int',
        "half.jsonl": r"line 2.*'\\ud83d' at character 2, a lone surrogate",
        "digits.jsonl": "line 1: not a JSON object",
        "deep.jsonl": "line 1: not a JSON object",
    }
    for name, text in cases.items():
        with pytest.raises(DataError, match=text):
            load_data(tmp_path / name, model, tokenizer)
    with pytest.raises(DataError, match="no text"):
        load_data(lines("", name="blank.jsonl"), model, tokenizer)
    (tmp_path / "folder").mkdir()
    if pytest.importorskip("PIL", reason="the folder of images needs pillow"):
        with pytest.raises(DataError, match="is empty"):
            load_data(tmp_path / "folder", zoo.load("cnn"))


def test_bad_masks_and_document_ids(causal):
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(DataError, match="attention_mask"):
        load_data([{"input_ids": ids, "attention_mask": torch.ones(2, 3)}], causal[0])
    with pytest.raises(DataError, match="document_ids"):
        Batches([ids], [])
