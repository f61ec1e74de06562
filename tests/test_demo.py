"""The demo's text, its NumPy layers, its checkpoints, its words, and one short run of the whole of it."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
from numoe import checkpoint, demo
from numoe.demo import data, model, pictures, report
from numoe.demo.training import Recipe, Result, Trainer, sample, train

MOE = {"num_experts": 4, "top_k": 2, "d_ff": 8, "choice_bias": True}
SMALL = model.ModelConfig(moe=MOE, context=3, embedding=4, d_model=6)


@pytest.fixture(scope="module")
def corpus():
    return data.load_corpus()


def tiny_corpus(*texts):
    arrays = tuple(np.frombuffer(text, np.uint8) for text in texts)
    return data.Corpus(tuple("abcd"[: len(texts)]), arrays, arrays)


# ------------------------------------------------------------------------------------------------------- text


def test_this_python_has_all_four_kinds_of_text(corpus):
    assert corpus.kinds == data.KINDS
    for train_part, held_out in zip(corpus.train, corpus.held_out, strict=True):
        assert data.MIN_BYTES < len(train_part) + len(held_out) <= data.MAX_BYTES
        assert len(held_out) == pytest.approx(data.HELD_OUT * data.MAX_BYTES, rel=0.2)


def test_no_held_out_paragraph_was_trained_on(corpus):
    for kind, train_part, held_out in zip(corpus.kinds, corpus.train, corpus.held_out, strict=True):
        separator = rb"\n\n+" if kind in ("prose", "code") else rb"\n"
        old, new = (
            {b" ".join(piece.split()) for piece in re.split(separator, part.tobytes())}
            for part in (train_part, held_out)
        )
        assert len(new) > 50
        assert old & new <= {b""}


def test_the_corpus_is_the_same_every_time(corpus):
    again = data.load_corpus()
    assert all((a == b).all() for a, b in zip(corpus.train, again.train, strict=True))


def test_a_python_without_sources_is_told(monkeypatch):
    monkeypatch.setattr(data, "_sources", lambda: {"prose": [], "code": iter(()), "names": data._names()})
    with pytest.raises(data.NoTextError, match=r"needs text from the standard library; found only \['names'\]"):
        data.load_corpus()


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    one, same = (data.training_batch(corpus, 1, 7, 64, 5) for _ in range(2))
    other = data.training_batch(corpus, 1, 8, 64, 5)
    assert (one.contexts == same.contexts).all() and (one.targets == same.targets).all()
    assert not (one.contexts == other.contexts).all()
    assert np.bincount(one.kinds).tolist() == [16] * 4


def test_contexts_are_the_bytes_before_the_target():
    batch = data.held_out_batch(tiny_corpus(b"hello", b"xyz"), 100, 3)
    pairs = [(c.tobytes(), bytes([t])) for c, t in zip(batch.contexts, batch.targets, strict=True)]
    assert pairs[:5] == [(b"\0\0\0", b"h"), (b"\0\0h", b"e"), (b"\0he", b"l"), (b"hel", b"l"), (b"ell", b"o")]
    assert pairs[5:] == [(b"\0\0\0", b"x"), (b"\0\0x", b"y"), (b"\0xy", b"z")]
    assert batch.kinds.tolist() == [0] * 5 + [1] * 3


def test_ngram_bits_by_hand():
    corpus = tiny_corpus(b"aab")
    batch = data.held_out_batch(corpus, 3, 2)
    bits = data.ngram_bits(corpus, batch)
    # unigram: a 3/259, b 2/259 (add-one);  bigram: 'a' is followed by a once, b once: (1 + p) / (2 + 1)
    a, b = 3 / 259, 2 / 259
    assert bits["unigram"] == pytest.approx(-np.log2([a, a, b]))
    assert bits["bigram"] == pytest.approx(-np.log2([a, (1 + a) / 3, (1 + b) / 3]))


# ------------------------------------------------------------------------------------------------------ model


def test_embedding_gradient_adds_up_repeated_bytes(rng):
    contexts = rng.integers(0, 5, (20, 3)).astype(np.uint8)
    dx = rng.normal(size=(20, 12)).astype(np.float32)
    expected = np.zeros((256, 4), np.float64)
    np.add.at(expected, contexts.ravel(), dx.reshape(-1, 4))
    np.testing.assert_allclose(model.embed_backward(dx, contexts), expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_by_hand():
    nats, gradient = model.cross_entropy(np.log(np.array([[1.0, 3.0], [2.0, 2.0]])), np.array([1, 0], np.uint8))
    assert nats == pytest.approx(-np.log([3 / 4, 1 / 2]))
    assert gradient == pytest.approx(np.array([[1 / 8, -1 / 8], [-1 / 4, 1 / 4]]))
    far, _ = model.cross_entropy(np.array([[1000.0, 0.0]]), np.array([1], np.uint8))
    assert far == [1000.0]


def test_gradients_of_the_whole_model(rng):
    """Finite differences in float64 through every parameter, balancing loss included."""
    options = {**MOE, "choice_bias": False, "dtype": "float64", "aux_losses": {"megatron": 0.1}}
    net = model.ByteModel(dataclasses.replace(SMALL, moe=options), 0)
    for name, value in net.params.items():
        if name != "moe":
            net.params[name] = rng.normal(size=value.shape)
    net.params["moe"]["w_router"][...] = rng.normal(size=(6, 4))
    contexts = rng.integers(0, 4, (20, 3)).astype(np.uint8)
    targets = rng.integers(0, 256, 20).astype(np.uint8)

    def loss():
        done = net.forward(contexts)
        nats, dlogits = model.cross_entropy(done.logits, targets)
        return nats.mean() + done.moe.aux_loss, dlogits, done

    _, dlogits, done = loss()
    flat, grads = demo.flatten(net.params), demo.flatten(net.backward(dlogits, done))
    assert flat.keys() == grads.keys()
    for name, array in flat.items():
        direction = rng.normal(size=array.shape)
        direction[4:] *= name != "embedding"  # only bytes 0..3 occur
        start, step = array.copy(), 1e-6
        array[...] = start + step * direction
        up = loss()[0]
        array[...] = start - step * direction
        slope = (up - loss()[0]) / (2 * step)
        array[...] = start
        assert slope == pytest.approx((grads[name] * direction).sum(), rel=1e-5, abs=1e-8), name


def test_both_models_do_the_same_work_per_byte():
    dense = model.ByteModel(model.ModelConfig(moe=demo.DENSE), 0)
    moe = model.ByteModel(model.ModelConfig(moe=demo.EXPERTS), 0)
    assert dense.num_params()[1] == pytest.approx(moe.num_params()[1], rel=0.02)  # they differ by the router
    assert dense.num_params()[0] < moe.num_params()[0] / 4


def test_a_sample_continues_its_prompt_reproducibly():
    net = model.ByteModel(SMALL, 0)
    texts = [sample(net, b"ab", 20, np.random.default_rng(3)) for _ in range(2)]
    assert texts[0] == texts[1] and len(texts[0]) == 20


# ----------------------------------------------------------------------------------------------------- training

RECIPE = Recipe(label="tiny", model=SMALL, steps=12, seed=5, batch=32, bias_rate=0.01)


def test_training_learns_and_is_repeatable():
    text = tiny_corpus(b"the cat sat on the mat. " * 50, b"0123456789" * 100)
    held_out = data.held_out_batch(text, 100, 3)
    recipe = dataclasses.replace(RECIPE, steps=60)
    one, two = (train(text, recipe, held_out, lambda bits: None) for _ in range(2))
    assert one.losses == two.losses and (one.bits == two.bits).all()
    assert one.losses[0] > 5 and one.bits.mean() < 2
    assert one.load().sum() == 2 * len(held_out.targets)
    assert one.shares.shape == (60, 4) and one.shares.sum(axis=1) == pytest.approx(np.ones(60))


def test_a_checkpoint_continues_with_identical_numbers(tmp_path):
    text, path = tiny_corpus(b"the cat sat on the mat. " * 50, b"0123456789" * 100), tmp_path / "c.safetensors"
    held_out = data.held_out_batch(text, 50, 3)
    whole = train(text, RECIPE, held_out, lambda bits: None, save_at=5, path=path)
    again = Trainer.load(path, text)
    assert again.recipe == RECIPE and again.step_count == 5
    assert [again.step()[0] for _ in range(7)] == whole.losses[5:]
    mine, theirs = again.state_dict(), whole.trainer.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert any(again.model.moe.buffers["choice_bias"] != 0)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    trainer = Trainer(tiny_corpus(b"abc" * 100), RECIPE)
    path = tmp_path / "c.safetensors"
    state = trainer.state_dict()
    del state["model.w_context"]
    checkpoint.save(path, state, config=RECIPE.to_dict())
    with pytest.raises(checkpoint.CheckpointError, match=r"missing: .model\.w_context"):
        Trainer.load(path, trainer.corpus)


# ------------------------------------------------------------------------------------------------------- report


def result(bits, chosen=((0, 1), (2, 3)), label="x"):
    chosen = np.resize(np.array(chosen), (len(bits), 2))
    trainer = Trainer(tiny_corpus(b"abc" * 100), dataclasses.replace(RECIPE, label=label))
    return Result(trainer.recipe, trainer, [], np.zeros((0, 4)), np.array(bits, float), chosen)


@pytest.mark.parametrize(
    ("dense", "moe", "words"),
    [
        (2.5, 2.0, r"0\.49\d ± 0\.00\d below the dense layer that does the same work"),
        (2.0, 2.5, r"0\.50\d ± 0\.00\d ABOVE the dense layer: here the mixture did not pay"),
        (2.0, 2.0, "no clear difference to the dense layer"),
    ],
)
def test_the_words_follow_the_numbers(dense, moe, words):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 1000))
    sentence = report.prediction_sentence(
        {"bigram": np.full(1000, 3.0)}, result(dense + noise[0]), result(moe + noise[1])
    )
    assert re.search(words, sentence) and "below the bigram table" in sentence
    worse = report.prediction_sentence({"bigram": np.full(1000, 1.0)}, result(dense + noise[0]), result(moe + noise[1]))
    assert "ABOVE the bigram table" in worse


def test_collapse_is_only_claimed_when_it_was_measured():
    even, collapsed = ((0, 1), (2, 3)), ((0, 1), (0, 1))
    noise = np.random.default_rng(0).normal(0, 0.1, 1000)
    cure = result(np.full(1000, 2.0), even, "cure")
    assert "no collapse in this run" in report.balance_sentence(result(2.0 + noise, even), [cure])
    bad = report.balance_sentence(result(2.5 + noise, collapsed), [cure])
    assert "collapses onto 2.0 of 4 experts" in bad and "“cure” it is 4.0" in bad and "better" in bad
    assert "WORSE" in report.balance_sentence(result(1.5 + noise, collapsed), [cure])
    assert "not measurably different" in report.balance_sentence(result(2.0 + noise, collapsed), [cure])


def test_who_does_what_counts_by_kind():
    batch = data.held_out_batch(tiny_corpus(b"aaaa", b"bbbb"), 4, 3)
    chosen = np.repeat([[0, 1], [2, 1]], 4, axis=0)
    run = result(np.ones(8), chosen)
    shares = report.kind_shares(run, batch, 2)
    assert shares.tolist() == [[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]]
    # joint over (kind, expert): experts 0 and 2 tell the kind (1 bit, half of the choices), expert 1 nothing
    assert "tells 0.50 of the 1.00 bits" in report.specialist_sentence(shares, ("a", "b"))
    lines = report.specialist_table(run, batch, ("a", "b")).splitlines()
    assert re.search(r"expert 2 +25.0 +0.0 +50.0 +b +b", "\n".join(lines))
    assert re.search(r"expert 3 +0.0 +0.0 +0.0 +\(idle\)", "\n".join(lines))


def test_tables_are_aligned():
    assert report.table(("", "n"), [("ab", "1"), ("c", "23")]) == "       n\n  ab   1\n  c   23"


# ------------------------------------------------------------------------------------------------------ pictures


def test_pictures(tmp_path):
    pictures.draw_specialists(tmp_path / "a.png", np.eye(4)[:, :3], list("wxyz"), [2, 0, 1])
    pictures.draw_balance(tmp_path / "b.png", ["x", "y"], [np.ones(3)] * 2, [np.ones(4) / 4] * 2)
    for name in "ab":
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------- all together


def test_the_whole_demo_in_a_few_steps(tmp_path, monkeypatch):
    """Also on a terminal that knows ASCII only."""
    monkeypatch.setattr(demo, "HELD_OUT_PER_KIND", 64)
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    assert demo.main(["--steps", "2", "--out", str(tmp_path / "new" / "out"), "--seed", "3"]) == 0
    text = screen.getvalue().decode("ascii")
    for part in ("1  Predicting", "2  Who does what", "3  Balance", "4  What it writes", "5  A checkpoint"):
        assert part in text
    assert "losses identical bit for bit" in text and "DIFFERENT" not in text
    out = tmp_path / "new" / "out"
    assert {path.name for path in out.iterdir()} == {
        "specialists.png",
        "balance.png",
        "checkpoint.safetensors",
        "results.json",
    }
    found = json.loads((out / "results.json").read_text())
    assert found["checkpoint_identical"] is True
    assert found["bits_per_byte"].keys() == {
        "unigram", "bigram", "dense", "moe", "unbalanced", "balance_loss", "choice_bias"
    }  # fmt: skip
    assert all(0 < bits["all"] < 12 for bits in found["bits_per_byte"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected a number >= 1; got 0"),
        (["--steps", "many"], "expected a whole number; got 'many'"),
        (["--seed", "-1"], "expected a number >= 0; got -1"),
    ],
)
def test_wrong_options_get_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(option in text for option in ("--steps", "--out", "--seed"))


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert "the folder cannot be made" in capsys.readouterr().err


def test_no_text_is_no_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "_sources", dict)
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "the demo needs text from the standard library" in capsys.readouterr().err
